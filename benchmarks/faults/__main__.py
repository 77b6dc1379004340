"""Score the verdicts: ``python -m benchmarks.faults``. Runs on seeds that no threshold was chosen on."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.faults import report
from benchmarks.faults.faults import FAULTS
from benchmarks.faults.problems import OPTIMIZERS, PROBLEMS
from benchmarks.faults.run import Case, train
from benchmarks.faults.score import Row, summary

#: Thresholds were chosen on seeds below 100; seeds from 100 on were scored before some rules were changed.
SEED = 200


def cases(healthy: int, small: bool) -> Iterator[Case]:
    """What is run: healthy runs, and faults.

    Args:
        healthy: runs of each model and optimizer.
        small: whether each fault is run with one optimizer in turn, and at half severity on every second problem; else
            at full severity with all optimizers, and at half with one in turn.
    """
    for problem in PROBLEMS:
        for optimizer in OPTIMIZERS:
            for k in range(healthy):
                yield Case(problem, optimizer, SEED + k)
    for k, (name, fault) in enumerate(FAULTS.items()):
        for i, problem in enumerate(PROBLEMS):
            if fault.fits(PROBLEMS[problem]):
                turn = [fault.optimizers[(k + i + j) % len(fault.optimizers)] for j in range(len(fault.optimizers))]
                for optimizer in turn[:1] if small else turn:
                    yield Case(problem, optimizer, SEED, name, "full")
                if not small or (k + i) % 2 == 0:
                    yield Case(problem, turn[0], SEED + 1, name, "half")


def run(case: Case) -> Row:
    """In a process of the pool: train and keep what the score needs."""
    torch.set_num_threads(1)
    return summary(train(case))


def main() -> None:
    """Run, score and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--healthy", type=int, default=5, help="healthy runs of each model and optimizer")
    parser.add_argument("--small", action="store_true", help="one optimizer, half severity on every second problem")
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), metavar="NAME", help="some only; writes nothing")
    parser.add_argument("--tables", action="store_true", help="no runs: write the tables of the last whole run again")
    options = parser.parse_args()
    if options.tables:
        report.write(report.load())
        return
    chosen = [c for c in cases(options.healthy, options.small) if not options.faults or c.fault in options.faults]
    console, rows = Console(), []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress, ProcessPoolExecutor(options.jobs) as pool:
        task = progress.add_task("runs", total=len(chosen))
        for done in as_completed([pool.submit(run, case) for case in chosen]):
            rows.append(done.result())
            progress.advance(task)
    rows.sort(key=lambda row: chosen.index(row.case))
    console.print(report.markdown(rows), markup=False)
    if not options.faults:
        report.write(rows)
        console.print(f"Tables written to {report.PAGE}.")


if __name__ == "__main__":
    main()
