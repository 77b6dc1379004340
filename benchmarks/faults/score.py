"""What counts as detected, as said beside, and as a false alarm."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from statistics import median

from benchmarks.faults.faults import FAULTS
from benchmarks.faults.run import VALID_EVERY, WINDOW, Case, Outcome


@dataclass
class Row:
    """One run, as far as the score goes.

    Attributes:
        case: what was run.
        said: the step at which each failure was first named.
        valid: validation losses.
        named: of the samples that were named as mislabelled, how many, and how many of them are.
        broken: whether the loss became NaN or infinite, and when.
    """

    case: Case
    said: dict[str, int]
    valid: list[float]
    named: tuple[int, int]
    broken: int | None


def summary(outcome: Outcome) -> Row:
    """Keep what the score needs."""
    said: dict[str, int] = {}
    for verdict in outcome.said:
        said.setdefault(verdict.name, verdict.step)
    last = next((v for v in reversed(outcome.said) if v.name == "label noise"), None)
    samples = [int(place.split()[1]) for place in last.where] if last else []
    named = len(samples), sum(s in outcome.guilty for s in samples)
    return Row(outcome.case, said, outcome.valid, named, outcome.broken)


def delay(row: Row) -> int | None:
    """Steps from the onset to the verdict that is looked for, if it came within the window."""
    fault = FAULTS[row.case.fault]
    at = row.said.get(fault.verdict)
    # What grows must be seen before it is not a number any more.
    limit = fault.onset + WINDOW if row.broken is None or fault.verdict != "NaN about to happen" else row.broken
    return at - fault.onset if at is not None and fault.onset <= at < limit else None


@dataclass
class Score:
    """Of several runs with one fault."""

    runs: int
    detected: int
    delay: float | None
    harmed: int | None
    beside: Counter[str]


def score(rows: list[Row], healthy: list[Row]) -> Score:
    """Score runs with one fault.

    Args:
        rows: the runs.
        healthy: with which validation losses are compared; without any, nothing is said of harm.

    Returns:
        The score.
    """
    delays = [d for row in rows if (d := delay(row)) is not None]
    beside = Counter(name for row in rows for name in row.said if name != FAULTS[row.case.fault].verdict)
    harm = sum(harmed(r, healthy) for r in rows) if healthy else None
    return Score(len(rows), len(delays), median(delays) if delays else None, harm, beside)


def harmed(row: Row, healthy: list[Row]) -> bool:
    """Whether the validation loss ends above the median of healthy runs at that step by 10 % of it, or is no number."""
    at = (FAULTS[row.case.fault].onset + WINDOW - 1) // VALID_EVERY
    peers = [h for h in healthy if (h.case.problem, h.case.optimizer) == (row.case.problem, row.case.optimizer)]
    usual = median(h.valid[at] for h in peers)
    return row.broken is not None or not math.isfinite(row.valid[-1]) or row.valid[-1] > usual + 0.1 * abs(usual)
