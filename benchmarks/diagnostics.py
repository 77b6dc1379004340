"""What a monitor costs: ``python -m benchmarks.diagnostics``; packext's beside Cockpit's, where that is installed.

A step is all of training: forward, backward, and the step of plain SGD. Networks and batches are those of Cockpit's own
benchmark (3C3D on CIFAR shapes, a perceptron on MNIST shapes, 128 samples), with data drawn at random.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import packext as px
from benchmarks import memory, report
from benchmarks.problems import FIRST_SEED, net_3c3d
from benchmarks.timing import Ratio, ratios, round_robin

LEVELS = ("economy", "business", "full")
RATE = 0.01
BATCHES = 5
UNIT, TWIN, BARE = "plain", "plain, again", "extended"
MARKS = "<!-- diagnostics:begin -->", "<!-- diagnostics:end -->"


def net_mlp() -> nn.Module:
    """Four dense layers on MNIST shapes."""
    widths, layers = (784, 1000, 500, 100, 10), [nn.Flatten()]
    for i, o in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Problem:
    """A network, and the shape of its batch."""

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


PROBLEMS = {
    "3c3d": Problem("3C3D, CIFAR-10 shapes", net_3c3d, (128, 3, 32, 32)),
    "mlp": Problem("MLP 784-1000-500-100-10, MNIST shapes", net_mlp, (128, 1, 28, 28)),
}


class Training:
    """A model in training on a few batches in turn; this base class has nobody look on."""

    def __init__(self, problem: Problem, level: str, every: int) -> None:
        """Build model, batch and optimizer, the same for all."""
        torch.manual_seed(FIRST_SEED)
        self.model = problem.build()
        self.batches = [(torch.randn(problem.shape), torch.randint(10, problem.shape[:1])) for _ in range(BATCHES)]
        self.number = 0
        self.loss_fn: nn.Module = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), RATE)
        self.level, self.every = level, every
        self.prepare()

    def prepare(self) -> None:
        """Do what comes before the loop."""

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next batch."""
        self.number += 1
        return self.batches[self.number % BATCHES]

    def step(self) -> None:
        """Take one step."""
        x, y = self.batch()
        self.optimizer.zero_grad()
        self.loss_fn(self.model(x), y).backward()
        self.optimizer.step()

    def turn(self) -> None:
        """Take as many steps as from one that is looked at to the next."""
        for _ in range(self.every):
            self.step()


class Extended(Training):
    """Model and loss extended by packext, and no monitor."""

    def prepare(self) -> None:
        px.extend(self.model)
        px.extend(self.loss_fn)


class Ours(Extended):
    """packext's monitor."""

    def prepare(self) -> None:
        from packext.diagnostics import Cockpit

        super().prepare()
        self.monitor = Cockpit(self.model, self.optimizer, level=self.level, every=self.every)

    def step(self) -> None:
        with self.monitor.step():
            super().step()


class Theirs(Training):
    """Cockpit's, used as its documentation does."""

    def prepare(self) -> None:
        from backpack import extend
        from cockpit import Cockpit
        from cockpit.utils.configuration import configuration
        from cockpit.utils.schedules import linear

        extend(self.model)
        extend(self.loss_fn)
        self.each = nn.CrossEntropyLoss(reduction="none")
        self.cockpit = Cockpit(self.model.parameters(), configuration(self.level, linear(self.every)))

    def step(self) -> None:
        number, (x, y) = self.number, self.batch()
        self.optimizer.zero_grad()
        outputs = self.model(x)
        loss, losses = self.loss_fn(outputs, y), self.each(outputs, y)
        info = {"batch_size": len(y), "individual_losses": losses, "loss": loss, "optimizer": self.optimizer}
        with self.cockpit(number, info=info):
            loss.backward(create_graph=self.cockpit.create_graph(number))
        self.optimizer.step()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

SIDES: dict[str, type[Training]] = {"plain": Training, "extended": Extended, "packext": Ours, "Cockpit": Theirs}


@dataclass
class Cell:
    """What one side costs on one row, in plain steps."""

    ratio: Ratio
    memory: float | None = None


def sides() -> list[str]:
    """The monitors that are installed."""
    try:
        import cockpit  # noqa: F401
    except ImportError:
        return ["packext"]
    return ["packext", "Cockpit"]


def rows_of(intervals: list[int], levels: list[str]) -> list[tuple[str, int]]:
    """Levels, and how often each looks; the dearer ones at every step alone."""
    return [(level, every) for level in levels for every in intervals if every == 1 or level == LEVELS[0]]


def run_row(problem: Problem, level: str, every: int, options: argparse.Namespace) -> dict[str, Ratio]:
    """Time all sides of one row in turns, beside the plain step."""
    chosen = {UNIT: Training(problem, "", every), TWIN: Training(problem, "", every)}
    chosen[BARE] = Extended(problem, "", every)
    chosen |= {side: SIDES[side](problem, level, every) for side in options.sides}
    steps = {name: training.turn for name, training in chosen.items()}
    times = round_robin(
        steps,
        torch.device("cpu"),
        rounds=options.rounds,
        warmup=2,
        budget=options.budget,
        clock=CLOCKS[options.clock],
    )
    per_step = {name: [seconds / every for seconds in found] for name, found in times.items()}
    return {name: ratio for name, ratio in ratios(per_step, UNIT).items() if name != UNIT}


def peak(key: str, side: str, level: str, threads: int) -> int | None:
    """Peak memory of a training whose every step is looked at, in a process of its own; None if that fails."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.diagnostics", "--child", key, side, level]
    variables = {**os.environ, **memory.ALLOCATOR}
    done = subprocess.run(
        [*command, "--threads", str(threads)], cwd=memory.ROOT, env=variables, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def peak_here(key: str, side: str, level: str) -> int:
    """Peak memory of a training in this process, above the start, in bytes."""
    warm = Training(PROBLEMS[key], "", 1)
    warm.step()
    del warm
    training: Any = SIDES[side](PROBLEMS[key], level, 1)
    return memory.peak_on_cpu(training)[1]


def table(key: str, found: dict[str, Any]) -> str:
    """A problem's section of the page."""
    problem, about, known = PROBLEMS[key], found["environment"], found["sides"]
    count = sum(p.numel() for p in problem.build().parameters())
    lines = [f"### {problem.title}; N = {problem.shape[0]}; {count:,} parameters", ""]
    lines += ["| level, every | " + " | ".join(known) + " |", "|---|" + "---:|" * len(known)]
    for row in found["rows"]:
        cells = [row["cells"].get(side) for side in known]
        lines.append(f"| {row['level']}, {row['every']} | " + " | ".join(text(c) for c in cells) + " |")
    bare = [row["cells"][BARE]["ratio"]["median"] for row in found["rows"]]
    twins = [row["cells"][TWIN]["ratio"]["median"] for row in found["rows"]]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    lines += [
        "",
        f"Two plain trainings, timed against each other: {min(twins):.2f} to {max(twins):.2f} over the rows. "
        f"Extended, and nobody looking: {min(bare):.2f} to {max(bare):.2f}.",
        "",
        f"{about['date']}; {about['processor']}; {about['threads']} threads, {about['clock']} time, "
        f"Python {about['python']}; {versions}.",
    ]
    return "\n".join(lines) + "\n"


def text(cell: dict[str, Any] | None) -> str:
    """A cell: time, shortest time, and memory."""
    if cell is None:
        return "–"
    held = "" if cell["memory"] is None else f" ({cell['memory']:.2f})"
    return f"{cell['ratio']['median']:.2f} / {cell['ratio']['least']:.2f}{held}"


def environment(threads: int) -> dict[str, Any]:
    """What a reader needs to place the figures."""
    about = report.environment("cpu", threads)
    names = {"torch": "torch", "packext": "packext", "BackPACK": "backpack-for-pytorch"}
    names |= {"Cockpit": "cockpit-for-pytorch"}
    versions = {}
    for title, name in names.items():
        try:
            versions[title] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if title == "packext":
                versions[title] = px.__version__
    return {**about, "versions": versions}


def run_problem(key: str, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Fill one problem's table."""
    rows = rows_of(options.every, options.levels)
    task = progress.add_task(key, total=len(rows))
    plain = None if options.no_memory else peak(key, "plain", "-", options.threads)
    found = []
    for level, every in rows:
        progress.update(task, description=f"{key}: {level}, every {every}")
        ratio = run_row(PROBLEMS[key], level, every, options)
        cells = {side: Cell(r) for side, r in ratio.items()}
        for side in options.sides if plain and every == 1 else ():
            held = peak(key, side, level, options.threads)
            cells[side].memory = None if held is None else held / plain
        found.append({"level": level, "every": every, "cells": {k: dataclasses.asdict(c) for k, c in cells.items()}})
        progress.advance(task)
    return {
        "environment": {**environment(options.threads), "clock": options.clock},
        "sides": options.sides,
        "rows": found,
    }


def path_for(key: str) -> Path:
    """Where a problem's results are kept."""
    return report.RESULTS / f"diagnostics-{key}-cpu.json"


def keep(key: str, found: dict[str, Any]) -> None:
    """Keep results; of the same machine and versions they take the place of the old, side by side and row by row."""
    path = path_for(key)
    rows = {(row["level"], row["every"]): row for row in found["rows"]}
    known = found["sides"]
    if path.exists():
        before = json.loads(path.read_text())
        about, place = found["environment"], before["environment"]
        if all(about[k] == place[k] for k in about if k not in ("date", "load")):
            known = [side for side in SIDES if side in before["sides"] or side in known]
            for row in before["rows"]:
                new = rows.setdefault((row["level"], row["every"]), row)
                new["cells"] = {**row["cells"], **new["cells"]}
    order = sorted(rows.values(), key=lambda row: (LEVELS.index(row["level"]), row["every"]))
    path.write_text(json.dumps({**found, "sides": known, "rows": order}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diagnostics", description=__doc__)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), metavar="NAME")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS), metavar="NAME")
    parser.add_argument("--every", nargs="+", type=int, default=[1, 4, 16], metavar="K")
    parser.add_argument("--sides", nargs="+", choices=sides(), default=sides(), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing per row")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of timing per row, at most")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: the process's own time, on a busy machine"
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run, show and keep."""
    options = parse()
    warnings.simplefilter("ignore")  # Cockpit's warnings at every step would be part of its time
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(peak_here(*options.child)))
        return
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        for key in options.problems:
            found = run_problem(key, options, progress)
            console.print(table(key, found))
            keep(key, found)
    kept = {key: path_for(key) for key in PROBLEMS if path_for(key).exists()}
    report.insert("\n".join(table(key, json.loads(path.read_text())) for key, path in kept.items()), *MARKS)
    console.print(f"Tables written to {report.PAGE}.")


if __name__ == "__main__":
    main()
