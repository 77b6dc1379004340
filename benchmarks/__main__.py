"""Run the comparison: ``python -m benchmarks``; see ``--help`` for doing less of it."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import warnings
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import memory, report, timing
from benchmarks.bench import RowResult, run_row
from benchmarks.contenders import LIBRARIES
from benchmarks.problems import PROBLEMS
from benchmarks.quantities import ROWS, rows_of, smooth_instance


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    for name, known in (("problems", PROBLEMS), ("rows", ROWS), ("peers", LIBRARIES)):
        parser.add_argument(
            f"--{name}",
            nargs="+",
            choices=list(known),
            default=list(known),
            metavar="NAME",
            help=f"some of: {', '.join(known)} (default: all)",
        )
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing per row")
    parser.add_argument("--budget", type=float, default=180.0, help="seconds of timing per row, at most")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--keep-heap", action="store_true", help="have glibc keep what is freed, for all contenders")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on the CPU")
    return parser.parse_args(arguments)


def run_problem(key: str, options: argparse.Namespace, progress: Progress) -> dict[str, RowResult]:
    """Fill one problem's table."""
    rows: dict[str, RowResult] = {}
    names = [name for name in rows_of(PROBLEMS[key]) if name in options.rows]
    task = progress.add_task(f"{key}: reference", total=len(names))
    instance, reference = smooth_instance(PROBLEMS[key], torch.device(options.device))
    for name in names:

        def tick(word: str, name: str = name) -> None:
            progress.update(task, description=f"{key}: {ROWS[name].title}: {word}")

        rows[name] = run_row(
            instance,
            ROWS[name],
            options.peers,
            reference,
            rounds=options.rounds,
            budget=options.budget,
            tick=tick,
        )
        progress.advance(task)
    progress.update(task, description=f"{key}: time")
    return rows


def add_memory(key: str, rows: dict[str, RowResult], options: argparse.Namespace, progress: Progress) -> None:
    """Measure the peak memory of every cell that was timed, each in its own process."""
    timed = [
        (name, library, cell)
        for name, result in rows.items()
        for library, cell in result.cells.items()
        if cell.ratio is not None
    ]
    task = progress.add_task(f"{key}: memory", total=len(timed) + 1)
    where: dict[str, Any] = {"device": options.device, "threads": options.threads}
    unit = memory.measure(key, "gradient", "plain", "", **where)
    progress.advance(task)
    for name, library, cell in timed:
        found = memory.measure(key, name, library, cell.variant, **where)
        if found is not None and unit is not None:
            cell.bytes = found["bytes"]
            cell.memory = found["bytes"] / unit["bytes"]
            cell.first_memory = found["first"] / unit["bytes"]
        progress.advance(task)


def limit_memory() -> None:
    """Let a pass that needs more memory than there is end in an error, not in the end of the whole run."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (physical * 9 // 10, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> None:
    """Run, show and keep."""
    options = parse()
    if options.device == "cpu":
        limit_memory()
    if options.keep_heap and not (options.device == "cpu" and timing.keep_pages()):
        sys.exit("--keep-heap is for the CPU, and for glibc.")
    warnings.simplefilter("ignore")  # peers warn at every step, which would be part of their time
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False
    console = Console()
    complete = options.peers == list(LIBRARIES) and not options.no_memory
    where = report.KEPT if options.keep_heap else options.device
    kept = {"rounds": options.rounds, "device": where, "complete": complete}
    kept |= {"memory": not options.no_memory, "whole": complete and options.rows == list(ROWS)}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    failures = []
    with Progress(*columns, console=console) as progress:
        for key in options.problems:
            about = report.environment(options.device, options.threads)
            rows = run_problem(key, options, progress)
            if not options.no_memory:
                add_memory(key, rows, options, progress)
            report.save(key, rows, about, kept)
            if complete:
                report.write_page(where)
            report.show(console, key, rows, options.peers)
            failures += [
                f"{key}, {ROWS[name].title}: {result.cells['packext'].text}"
                for name, result in rows.items()
                if "packext" in result.cells and result.cells["packext"].status in ("missing", "wrong", "error")
            ]
    if complete:
        console.print(f"Tables written to {report.PAGE}.")
    else:
        console.print("Not all libraries and memory: the page is left as it was.")
    if failures:
        console.print("[bold red]packext fails:[/bold red]\n" + "\n".join(failures))
        sys.exit(1)


if __name__ == "__main__":
    main()
