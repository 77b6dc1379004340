"""Score the verdicts: ``python -m benchmarks.faults``. Runs on seeds that no threshold was chosen on."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.faults import report
from benchmarks.faults.faults import FAULTS
from benchmarks.faults.problems import PROBLEMS
from benchmarks.faults.run import Case, Outcome, hear, train
from benchmarks.faults.score import Row, summary

#: Rules were made on seeds below 100; scores at seeds from 100 to 1199 had been seen before these rules were scored.
SEED = 1200


def cases(healthy: int, small: bool, half: bool = True) -> Iterator[Case]:
    """What is run: healthy runs, and faults, but for those that are known to do no harm.

    Args:
        healthy: runs of each model and optimizer.
        small: whether each fault is run with one optimizer in turn, and at half severity on every second problem; else
            at full severity with all optimizers, and at half with one in turn.
        half: whether there are runs at half severity.
    """
    for problem in PROBLEMS:
        for optimizer in PROBLEMS[problem].rates:
            for k in range(healthy):
                yield Case(problem, optimizer, SEED + k)
    for k, (name, fault) in enumerate(FAULTS.items()):
        for i, problem in enumerate(PROBLEMS):
            if fault.fits(PROBLEMS[problem]):
                able = [o for o in PROBLEMS[problem].rates if not fault.optimizers or o in fault.optimizers]
                turn = [able[(k + i + j) % len(able)] for j in range(len(able))]
                harmless = PROBLEMS[problem].harmless
                for optimizer in turn[:1] if small else turn:
                    if name not in harmless.get("full", ()):
                        yield Case(problem, optimizer, SEED, name, "full")
                if half and (not small or (k + i) % 2 == 0) and name not in harmless.get("half", ()):
                    yield Case(problem, turn[0], SEED + 1, name, "half")


def record(case: Case, folder: Path | None) -> Outcome:
    """In a process of the pool: train, unless the folder has what the instruments said of that run already."""
    torch.set_num_threads(1)
    if folder is None:
        return train(case)
    path = folder / ("-".join([case.problem, case.optimizer, str(case.seed), case.fault, case.severity]) + ".pickle")
    if path.exists():
        return pickle.loads(path.read_bytes())
    outcome = train(case)
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(outcome))
    part.rename(path)
    return outcome


def run(case: Case, folder: Path | None) -> Row:
    """Train, let the rules hear, and keep what the score needs."""
    return summary(hear(record(case, folder)))


def main() -> None:
    """Run, score and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--healthy", type=int, default=5, help="healthy runs of each model and optimizer")
    parser.add_argument("--small", action="store_true", help="one optimizer, half severity on every second problem")
    parser.add_argument("--full", action="store_true", help="no runs at half severity")
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), metavar="NAME", help="some only; writes nothing")
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), metavar="NAME", help="likewise")
    parser.add_argument("--records", type=Path, metavar="FOLDER", help="train what is not there, and judge from there")
    parser.add_argument("--tables", action="store_true", help="no runs: write the tables of the last whole run again")
    options = parser.parse_args()
    if options.tables:
        report.write(report.load(), report.known())
        return
    listed = cases(options.healthy, options.small, not options.full)
    chosen = [c for c in listed if c.fault in (options.faults or [c.fault])]
    chosen = [c for c in chosen if c.problem in (options.problems or [c.problem])]
    if options.records:
        options.records.mkdir(parents=True, exist_ok=True)
    console, rows = Console(), []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress, ProcessPoolExecutor(options.jobs) as pool:
        task = progress.add_task("runs", total=len(chosen))
        for done in as_completed([pool.submit(run, case, options.records) for case in chosen]):
            rows.append(done.result())
            progress.advance(task)
    rows.sort(key=lambda row: chosen.index(row.case))
    console.print(report.markdown(rows, report.today()), markup=False)
    if not (options.faults or options.problems):
        report.write(rows, report.today())
        console.print(f"Tables written to {report.PAGE}.")


if __name__ == "__main__":
    main()
