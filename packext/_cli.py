"""The command line of packext."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process if omitted.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="packext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small network on handwritten digits and look into its gradients")
    demo.add_argument("--seconds", type=float, default=10.0, help="training time (default: 10)")
    demo.add_argument("--out", type=Path, default=Path(), help="folder for the figure (default: .)")
    demo.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    arguments = parser.parse_args(argv)

    missing = [name for name in ("matplotlib", "rich", "sklearn") if find_spec(name) is None]
    if missing:
        print(f"The demo needs {', '.join(missing)}. Install with:\n", file=sys.stderr)
        print("    pip install 'packext[demo]'", file=sys.stderr)
        return 1
    from packext.demo import run

    run(arguments.seconds, arguments.out, arguments.seed)
    return 0
