"""The command line of packext."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

PORT = 7070

EPILOG = """\
Record a run with px.diagnostics.Cockpit(model, optimizer, sinks=[px.diagnostics.Run("runs/first")]). Then

    packext watch runs/first               a page in the browser that follows the run while it goes on
    packext watch runs/first runs/second   two runs on the same axes
    packext report runs/first              the same in one file, and PNGs
    packext audit                          what gradients of a small network give away, in one file

packext COMMAND --help says more of each.
"""

WATCH = """\
Serve a page, on this machine alone (127.0.0.1), that shows what the instruments said of a run and renews itself while
the run goes on: verdicts, loss, alpha, gradient noise, curvature, histograms with a slider over the steps, and maps
of the layers. Two runs are drawn on the same axes, one over the other or side by side. A record that is not there yet
is waited for. Ctrl-C ends it. From another machine: ssh -L 7070:127.0.0.1:7070 HOST.
"""

REPORT = """\
Write the page that `packext watch` shows into one HTML file that needs no network and no server, and a PNG for
each of its columns. Prints the path and the verdicts.
"""

AUDIT = """\
Train the network of `packext demo` on some of its digits, and measure what the gradient of a batch of 8 gives away:
labels, inputs, who was trained on, and what defences would change. Writes audit.html (one file that needs no
network), audit.json and PNGs, and prints the findings. Sections are kept as they end: after an interruption the same
command goes on. To audit a model of your own, call px.audit.run(model, loss_fn, data, px.audit.Sharing(...)).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process if omitted.

    Returns:
        The exit status: 0, 1 if the command could not do its work, 2 for arguments that it does not know.
    """
    parser = argparse.ArgumentParser("packext", None, __doc__, EPILOG, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="train a small network on handwritten digits and look into its gradients")
    demo.add_argument("--seconds", type=float, default=10.0, help="training time (default: 10)")
    demo.add_argument("--out", type=Path, default=Path(), help="folder for figure, record and report (default: .)")
    demo.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    watch = commands.add_parser("watch", help="follow a recorded run, or two, in the browser", description=WATCH)
    watch.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a record; one or two")
    watch.add_argument("--port", type=int, default=PORT, help=f"of the page; 0 for any (default: {PORT})")
    report = commands.add_parser("report", help="write a recorded run as one HTML file and PNGs", description=REPORT)
    report.add_argument("run", type=Path, metavar="RUN", help="folder of a record")
    report.add_argument("--out", type=Path, help="folder for the report (default: RUN/report)")
    audit = commands.add_parser(
        "audit", help="report what gradients of the demo's network give away", description=AUDIT
    )
    audit.add_argument("--out", type=Path, default=Path("packext-audit"), help="folder (default: packext-audit)")
    length = audit.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=90.0, help="about how long it may take (default: 90)")
    length.add_argument("--quick", action="store_true", help="about 20 seconds, with few attempts")
    audit.add_argument("--fresh", action="store_true", help="remove another audit that the folder holds")
    audit.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    arguments = parser.parse_args(argv)

    if arguments.command == "demo":
        return _demo(arguments)
    if arguments.command == "watch" and len(arguments.runs) > 2:
        watch.error(f"it shows one run or two, not {len(arguments.runs)}")
    if arguments.command == "audit" and not 0 < arguments.seconds < math.inf:
        audit.error(f"--seconds must be positive, got {arguments.seconds}")
    from packext import PackextError

    work = {"watch": _watch, "report": _report, "audit": _audit}[arguments.command]
    try:
        return work(arguments)
    except (PackextError, ImportError, OSError) as error:
        print(f"packext {arguments.command}: {error}", file=sys.stderr)
        return 1


def _demo(arguments: argparse.Namespace) -> int:
    if not _demo_can_run("The demo"):
        return 1
    from packext.demo import run

    run(arguments.seconds, arguments.out, arguments.seed)
    return 0


def _demo_can_run(what: str) -> bool:
    missing = [name for name in ("matplotlib", "plotly", "rich", "scipy", "sklearn") if find_spec(name) is None]
    if missing:
        print(f"{what} needs {', '.join(missing)}. Install with:\n", file=sys.stderr)
        print("    pip install 'packext[demo]'", file=sys.stderr)
    return not missing


def _audit(arguments: argparse.Namespace) -> int:
    if not _demo_can_run("The audit of the demo's network"):
        return 1
    from packext.demo import audit

    try:
        found = audit("quick" if arguments.quick else arguments.seconds, arguments.out, arguments.seed, arguments.fresh)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on after the last section that has ended.", file=sys.stderr)
        return 1
    print(found)
    print(f"\nReport: {arguments.out / 'audit.html'}")
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from packext.diagnostics import Run
    from packext.diagnostics.view import Server

    runs, port = arguments.runs, arguments.port

    def tell(text: str) -> None:
        print(text, flush=True)

    for run in runs:  # what cannot be read is said now, not only in the page
        try:
            Run(run).refresh(most=1)
        except FileNotFoundError:
            tell(f"{run} has no record of a run yet: waiting for it.")
    try:
        server = Server(runs, port, tell)
    except (OSError, OverflowError) as error:
        raise OSError(f"port {port} cannot be had ({error}): choose another with --port, or 0 for any.") from None
    tell(f"{', '.join(map(str, runs))}: {server.url} (Ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        tell("\nStopped.")
    finally:
        server.server_close()
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from packext.diagnostics import Run
    from packext.diagnostics.view import write_report

    file = write_report(arguments.run, arguments.out)
    for verdict in Run.open(arguments.run).verdicts():
        print(verdict)
    print(f"Report: {file}")
    return 0
