"""One row of the table: check all variants, choose each library's best, time those together."""

from __future__ import annotations

import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.contenders import LIBRARIES, REPLACED, Contender, UnavailableError, plain
from benchmarks.problems import Instance
from benchmarks.quantities import Reference, Row, judge
from benchmarks.timing import Ratio, once, ratios, round_robin

TRIALS = 3
PATIENCE = 5.0
"""Seconds after which a variant gets no further trial."""
UNIT = "plain"
TWIN = "plain, again"


@dataclass
class Cell:
    """What is known of one library on one row."""

    status: str
    """ok, unit, none (no such thing here), not built, not installed, missing, wrong or error"""
    text: str = ""
    variant: str = ""
    error: float | None = None
    ratio: Ratio | None = None
    memory: float | None = None
    first_memory: float | None = None
    bytes: int | None = None
    trials: dict[str, float] = field(default_factory=dict)
    """Time of every correct variant over that of the chosen one, from a few trials."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Why a variant was not considered."""
    traces: dict[str, str] = field(default_factory=dict)
    """Full tracebacks of the variants that raised."""


@dataclass
class RowResult:
    """The cells of a row, and how well two identical contenders agreed in it."""

    cells: dict[str, Cell]
    twin: Ratio | None = None


def run_row(
    instance: Instance,
    row: Row,
    libraries: list[str],
    reference: Reference,
    *,
    rounds: int,
    budget: float,
    tick: Callable[[str], None],
) -> RowResult:
    """Fill one row.

    Args:
        instance: The problem.
        row: The work item.
        libraries: Keys of the columns.
        reference: True values.
        rounds: Rounds of timing.
        budget: Seconds that the timing of this row may take.
        tick: Called with a word on what is going on.

    Returns:
        The row's cells.
    """
    device = instance.inputs.device
    cells: dict[str, Cell] = {}
    chosen: dict[str, Contender] = {UNIT: plain(instance)}
    if row.key == "gradient":
        chosen[TWIN] = plain(instance)
    chosen[UNIT].step()
    for key in libraries:
        tick(f"{LIBRARIES[key].title}: check")
        cells[key], contender = check(instance, row, key, reference)
        if contender is not None:
            chosen[key] = contender
    tick("timing")
    steps = {name: contender.step for name, contender in chosen.items()}
    found: dict[str, Ratio] = {}
    if len(steps) > 1:
        times = round_robin(
            steps,
            device,
            rounds=rounds,
            warmup=2,
            budget=budget,
            tick=lambda: tick("timing"),
        )
        found = ratios(times, UNIT)
    for key, cell in cells.items():
        cell.ratio = found.get(key)
    return RowResult(cells, found.get(TWIN))


def check(instance: Instance, row: Row, key: str, reference: Reference) -> tuple[Cell, Contender | None]:
    """Try all of a library's variants; return the cell so far and the fastest correct contender."""
    library = LIBRARIES[key]
    if not library.installed:
        word = "not built" if key == "packext" else "not installed"
        return Cell(word, word), None
    try:
        makers = library.variants(instance, row)
    except UnavailableError as reason:
        return Cell(str(reason), str(reason)), None
    if row.key == "gradient":
        return Cell("unit", "1"), None
    cell, best, least = Cell("none", "–"), None, float("inf")
    for name, make in makers.items():
        try:
            contender = make()
            contender.step()
            verdict = judge(contender.read(), row, reference, contender.drawn, pooled=contender.pooled)
            if verdict.status == "ok":
                cell.trials[name] = trial(contender, instance.inputs.device)
        except Exception as problem:  # a library that raises is a result, too
            cell.rejected[name] = describe(problem)
            cell.traces[name] = anywhere(traceback.format_exc())
            continue
        if verdict.status != "ok":
            cell.rejected[name] = str(verdict)
        elif cell.trials[name] < (0.8 if name.endswith(REPLACED) else 1.0) * least:  # it has to be worth its memory
            least, best = cell.trials[name], contender
            cell.variant, cell.error = name, verdict.error
    if best is not None:
        cell.status = cell.text = "ok"
        cell.trials = {name: seconds / least for name, seconds in cell.trials.items()}
    elif makers:
        cell.text = next(iter(cell.rejected.values()))
        cell.status = cell.text.partition(":")[0]
    return cell, best


def anywhere(text: str) -> str:
    """Take this machine's folders out of the names of files."""
    for folder in (sys.prefix, sys.base_prefix, str(Path(__file__).parents[1])):
        text = text.replace(f"{folder}/", "")
    return text


def trial(contender: Contender, device: torch.device) -> float:
    """Time a few steps of a variant, for the choice among them."""
    seconds: list[float] = []
    while len(seconds) < TRIALS and sum(seconds) < PATIENCE:
        seconds.append(once(contender.step, device))
    return statistics.median(seconds)


def describe(problem: Exception) -> str:
    """Return an exception in the words of a table cell."""
    words = " ".join(str(problem).split())
    short = words if len(words) <= 60 else words[:57] + "..."
    return f"error: {type(problem).__name__}: {short}"
