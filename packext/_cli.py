"""The command line of packext."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packext._subject import Subject

PORT = 7070

EPILOG = """\
packext demo                             ten seconds of training, and what its gradients say
packext check net.py:Net --input 3x32x32 is every quantity of your model right? each next to a slow oracle
packext bench net.py:Net --input 3x32x32 what quantities of your model cost on this machine
packext watch runs/first                 a page in the browser that follows a recorded run while it goes on
packext watch runs/first runs/second     two runs on the same axes
packext report runs/first                the same in one file, and PNGs
packext audit                            what gradients of a small network give away, in one file

Record a run with px.diagnostics.Cockpit(model, optimizer, sinks=[px.diagnostics.Run("runs/first")]).
packext COMMAND --help says more of each. Exit status: 0; 1 if the command could not do its work, or has found
something wrong; 2 if what was typed does not fit.
"""

DEMO = """\
Train a small convolutional network on handwritten digits, some of which are labelled wrongly on purpose, and look
into its gradients on the way: which samples have the largest, how much of each layer's gradient is noise, where
the loss is curved. Then train again under a monitor. Writes a figure, a record of the run and its report.
"""

MODEL = """\
MODEL is module:name or file.py:name, of a model, a class of models, or a function without arguments that returns
one. Modules are looked for in the current folder, too. What it is called with is drawn at random,

    --input 3x32x32             a sample's input has this shape
    --input 128 --tokens 1000   it is 128 indices below 1000

or comes from a function of yours that returns (inputs, targets): --batch module:name. Inputs are a tensor, a tuple of
arguments or a dictionary of keyword arguments. The model must return the tensor that the loss takes.
"""

CHECK = f"""\
Compute each quantity of each parameter of a model by packext, and again one sample at a time in plain autograd and
float64, and print how far they are apart at most. "refused" is no mistake in a number: below the table stands why,
and what would help. A few samples of a small model suffice: the oracle is slow, and of curvature only tried
for few outputs and parameters.

{MODEL}
    packext check net.py:Net --input 3x32x32 --samples 4
    packext check mylib.models:build --batch mylib.data:one_batch --loss mse
"""

BENCH = f"""\
Time passes, forward and backward, with quantities against those of the plain gradient of the same model and batch, in
turns, and print medians of the ratios: 1.50 takes half as long again. Quartiles, and a second copy of the plain
gradient in the first row, say how much of that is noise. Memory is the ratio of what tensors of a step take at
their peak. Without MODEL, a small convolutional network on 3 x 32 x 32.

{MODEL}
    packext bench --seconds 20
    packext bench net.py:Net --input 3x32x32 --samples 64 --quantities Variance,KFAC,BatchL2Grad+Variance
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
        The exit status: 0, 1 if the command could not do its work or found something wrong, 2 for what was typed
        and does not fit.
    """
    parser = argparse.ArgumentParser(
        "packext", None, "More than the mean gradient from a PyTorch backward pass.", EPILOG, formatter_class=_Raw
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, work: Callable[[argparse.Namespace], int], line: str, text: str) -> argparse.ArgumentParser:
        new = commands.add_parser(name, help=line, description=text, formatter_class=_Raw)
        new.set_defaults(work=work)
        return new

    demo = command("demo", _demo, "train a small network on handwritten digits and look into its gradients", DEMO)
    demo.add_argument("--seconds", type=_seconds, default=10.0, help="training time (default: 10)")
    demo.add_argument("--out", type=_folder, default=Path(), help="folder for figure, record and report (default: .)")
    bench = command("bench", _bench, "time and memory of quantities of your model on this machine", BENCH)
    _subject_options(bench, "?", 32)
    bench.add_argument("--seconds", type=_seconds, default=30.0, help="about how long it may take (default: 30)")
    bench.add_argument("--quantities", metavar="NAMES", help="joined by commas; by + where they share a pass")
    bench.add_argument("--threads", type=_count, help="of the CPU (default: torch's)")
    bench.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    check = command("check", _check, "compare each quantity of your model with a slow oracle", CHECK)
    _subject_options(check, None, 4)
    watch = command("watch", _watch, "follow a recorded run, or two, in the browser", WATCH)
    watch.add_argument("runs", type=_folder, nargs="+", metavar="RUN", help="folder of a record; one or two")
    watch.add_argument("--port", type=int, default=PORT, help=f"of the page; 0 for any (default: {PORT})")
    report = command("report", _report, "write a recorded run as one HTML file and PNGs", REPORT)
    report.add_argument("run", type=_folder, metavar="RUN", help="folder of a record")
    report.add_argument("--out", type=_folder, help="folder for the report (default: RUN/report)")
    audit = command("audit", _audit, "report what gradients of the demo's network give away", AUDIT)
    audit.add_argument("--out", type=_folder, default=Path("packext-audit"), help="folder (default: packext-audit)")
    length = audit.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=_seconds, default=90.0, help="about how long it may take (default: 90)")
    length.add_argument("--quick", action="store_true", help="about 20 seconds, with few attempts")
    audit.add_argument("--fresh", action="store_true", help="remove another audit that the folder holds")
    for each in (demo, bench, check, audit):
        each.add_argument("--seed", type=_seed, default=0, help="random seed (default: 0)")
    arguments = parser.parse_args(argv)
    if arguments.command == "watch" and len(arguments.runs) > 2:
        watch.error(f"it shows one run or two, not {len(arguments.runs)}")

    from packext import PackextError
    from packext._subject import Mistake

    try:
        return arguments.work(arguments)
    except (PackextError, ImportError, OSError) as error:
        print(f"packext {arguments.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, Mistake) else 1
    except KeyboardInterrupt:
        print(f"\npackext {arguments.command}: stopped.", file=sys.stderr)
        return 1


class _Raw(argparse.RawTextHelpFormatter):
    """Texts as they are written, since they hold examples."""


def _seconds(text: str) -> float:
    with _said("a number", text):
        value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _count(text: str) -> int:
    with _said("a whole number", text):
        value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return value


def _folder(text: str) -> Path:
    if Path(text).exists() and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, and {text} is a file")
    return Path(text)


def _seed(text: str) -> int:
    with _said("a whole number", text):
        value = int(text)
    if abs(value) > 10**12:  # an audit draws by multiples of it, and torch takes 64 bits
        raise argparse.ArgumentTypeError(f"must be at most 10^12 in magnitude, got {text}")
    return value


@contextmanager
def _said(what: str, text: str) -> Iterator[None]:
    """By itself, argparse would name the function that reads the number."""
    try:
        yield
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {what}, got {text}") from None


def _subject_options(parser: argparse.ArgumentParser, times: str | None, samples: int) -> None:
    parser.add_argument("model", nargs=times, metavar="MODEL", help="module:name or file.py:name")
    called = parser.add_mutually_exclusive_group()
    called.add_argument("--input", metavar="SHAPE", help="of one sample's input, as in 3x32x32")
    called.add_argument("--batch", metavar="NAME", help="module:name of a function that returns (inputs, targets)")
    parser.add_argument("--tokens", type=_count, metavar="V", help="draw indices below V in place of numbers")
    parser.add_argument(
        "--loss", metavar="NAME", help="cross-entropy, mse, bce, or module:name (default: by the output)"
    )
    parser.add_argument("--samples", type=_count, help=f"N of what is drawn (default: {samples})")
    parser.set_defaults(drawn=samples)
    parser.add_argument("--train", action="store_true", help="in training mode (default: evaluation)")


def _subject(a: argparse.Namespace, model: str, shape: str | None, device: str | None = None) -> Subject:
    from packext._subject import Mistake, subject

    if a.batch is not None and a.samples is not None:
        raise Mistake(f"{a.batch} returns the samples: leave out --samples, by which some are drawn.")
    return subject(model, shape, a.tokens, a.batch, a.loss, a.samples or a.drawn, a.seed, a.train, device)


def _needs_rich() -> None:
    if find_spec("rich") is None:
        raise ImportError("its tables need rich. Install with: pip install 'packext[cli]'")


def _check(arguments: argparse.Namespace) -> int:
    _needs_rich()
    from packext._check import is_bad, outcomes
    from packext._tables import show_outcomes

    subject = _subject(arguments, arguments.model, arguments.input)
    return int(is_bad(show_outcomes(subject, outcomes(subject))))


def _bench(arguments: argparse.Namespace) -> int:
    _needs_rich()
    import torch

    from packext._bench import USUAL, costs, rows
    from packext._tables import show_costs

    names = USUAL if arguments.quantities is None else tuple(arguments.quantities.split(","))
    rows(names)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model, shape = arguments.model, arguments.input
    if model is None:
        model, shape = "packext._bench:SmallNet", shape or (None if arguments.batch else "3x32x32")
    subject = _subject(arguments, model, shape, arguments.device)
    show_costs(subject, costs(subject, names, arguments.seconds), len(names) + 1)
    return 0


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
    verdicts = Run.open(arguments.run).verdicts()
    print(*verdicts or ["No verdict: no rule that listened has found a failure."], sep="\n")
    print(f"Report: {file}")
    return 0
