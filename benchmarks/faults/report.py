"""The tables of the score, on screen and in the documentation."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections import Counter
from datetime import date
from pathlib import Path
from statistics import median

import torch

from benchmarks.faults.faults import FAULTS
from benchmarks.faults.problems import PROBLEMS
from benchmarks.faults.run import HEALTHY_STEPS, WINDOW, Case
from benchmarks.faults.score import Row, delay, harmed, score
from packext.diagnostics import RULES

RESULTS = Path(__file__).resolve().parent.parent / "results" / "faults.json"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "verdicts.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


def share(part: int | None, whole: int) -> str:
    """`9 / 12`, with a percentage; a dash of none, or where it is not known."""
    return f"{part} / {whole} ({100 * part / whole:.0f} %)" if whole and part is not None else "–"


def today() -> str:
    """When and with what the runs are made that end now."""
    return f"{date.today().isoformat()}; Python {platform.python_version()}, torch {torch.__version__}; CPU."


def known() -> str:
    """The same of the runs whose tables stand in the page: their last line."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()[-1]


def markdown(rows: list[Row], about: str) -> str:
    """All tables, and below them when and with what the runs were made."""
    healthy = [row for row in rows if not row.case.fault]
    parts = []
    if any(row.case.fault for row in rows):
        parts.append(faults(rows, healthy))
    if healthy:
        parts.append(alarms(healthy))
    return "\n".join([*parts, about])


def faults(rows: list[Row], healthy: list[Row]) -> str:
    """Detection by fault, and by family of models; of held-out families apart, where both kinds were run."""
    both = all(groups(rows).values())
    columns = ["full severity", *(f"of {name}" for name in groups(rows) if both)]
    lines = [
        f"Named within {WINDOW} steps, and the median delay in steps:",
        "",
        f"| fault | verdict that is looked for | {' | '.join(columns)} | delay | harm | half | delay "
        "| also said (at full) |",
        "|---|---|" + "---:|" * (len(columns) + 4) + "---|",
    ]
    for name, fault in FAULTS.items():
        full, half = (
            [r for r in rows if r.case.fault == name and r.case.severity == severity] for severity in ("full", "half")
        )
        if not full:
            continue
        a, b = score(full, healthy), score(half, healthy)
        beside = ", ".join(f"{word} {count}" for word, count in a.beside.most_common(4))
        cells = [share(a.detected, a.runs), *(hits(part) for part in groups(full).values() if both)]
        lines.append(
            f"| {fault.what} | {fault.verdict} | {' | '.join(cells)} | {number(a.delay)} | "
            f"{share(a.harmed, a.runs)} | {share(b.detected, b.runs)} | {number(b.delay)} | {beside or '–'} |"
        )
    for severity in ("full", "half"):
        found = [r for r in rows if r.case.fault and r.case.severity == severity]
        if not found:
            continue
        lines += ["", f"All faults at {severity} severity: {hits(found)}."]
        if both:
            lines[-1] += "".join(f" Of {name}: {hits(part)}." for name, part in groups(found).items())
        if healthy:
            worse = [delay(r) is not None for r in found if harmed(r, healthy)]
            lines[-1] += f" Of those that did harm: {share(sum(worse), len(worse))}."
    missed = [r.case for r in rows if r.case.fault and r.case.severity == "full" and delay(r) is None]
    words = "; ".join(f"{FAULTS[c.fault].verdict} ({c.problem} with {c.optimizer})" for c in missed)
    lines += ["", f"Not named at full severity: {words or 'none'}."]
    lines += ["", "| family | full severity | half |", "|---|---:|---:|"]
    for problem in PROBLEMS:
        cells = []
        for severity in ("full", "half"):
            found = [r for r in rows if (r.case.problem, r.case.severity) == (problem, severity) and r.case.fault]
            cells.append(hits(found))
        if any(r.case.problem == problem for r in rows):
            lines.append(f"| {family(problem)} | {cells[0]} | {cells[1]} |")
    noisy = [r.named for r in rows if r.case.fault == "wrong labels"]
    if noisy:
        named, right = (sum(pair[k] for pair in noisy) for k in (0, 1))
        lines += ["", f"Samples named in runs with wrong targets: {named}, of which wrong: {share(right, named)}."]
    return "\n".join(lines) + "\n"


def alarms(healthy: list[Row]) -> str:
    """What was said in healthy runs, by rule."""
    parts = {name: rows for name, rows in groups(healthy).items() if rows}
    lines = [
        f"Verdicts in healthy runs ({HEALTHY_STEPS} steps each):",
        "",
        "| verdict | " + " | ".join(parts) + " | all |",
        "|---|" + "---:|" * (len(parts) + 1),
    ]
    for rule in RULES:
        counts = [sum(rule.failure in r.said for r in rows) for rows in parts.values()]
        cells = [f"{c} / {len(rows)}" for c, rows in zip(counts, parts.values(), strict=True)]
        lines.append(f"| {rule.failure} | {' | '.join(cells)} | {share(sum(counts), len(healthy))} |")
    some = [sum(bool(r.said) for r in rows) for rows in parts.values()]
    cells = [f"{c} / {len(rows)}" for c, rows in zip(some, parts.values(), strict=True)]
    lines.append(f"| any | {' | '.join(cells)} | {share(sum(some), len(healthy))} |")
    where = Counter((r.case.problem, r.case.optimizer, name) for r in healthy for name in r.said)
    if where:
        words = "; ".join(f"{p} with {o}: {name} ({count})" for (p, o, name), count in where.items())
        lines += ["", f"They were: {words}."]
    for words, said in (("that were called overfitting", True), ("that were not", False)):
        rises = [r.valid[-1] / min(r.valid) for r in healthy if ("overfitting" in r.said) is said]
        if rises:
            lines += ["", f"Validation loss at the end over its lowest, of healthy runs {words}: "]
            lines[-1] += f"median {median(rises):.2f}, from {min(rises):.2f} to {max(rises):.2f}."
    return "\n".join(lines) + "\n"


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    """Runs of families that rules were tried on, and of those that were held out, by what the tables call them."""
    parts: dict[str, list[Row]] = {"known families": [], "held-out families": []}
    for row in rows:
        parts["held-out families" if PROBLEMS[row.case.problem].held_out else "known families"].append(row)
    return parts


def hits(rows: list[Row]) -> str:
    """In how many of the runs the verdict that is looked for came in time."""
    return share(sum(delay(row) is not None for row in rows), len(rows))


def family(problem: str) -> str:
    """Its name, and whether it was held out."""
    return f"{problem} (held out)" if PROBLEMS[problem].held_out else problem


def number(value: float | None) -> str:
    """A delay, or a dash."""
    return "–" if value is None else f"{value:g}"


def load() -> list[Row]:
    """The rows of the last whole run."""
    found = json.loads(RESULTS.read_text())
    return [Row(**{**row, "case": Case(**row["case"]), "named": tuple(row["named"])}) for row in found]


def write(rows: list[Row], about: str) -> None:
    """Keep the rows, and put the tables between the page's markers."""
    RESULTS.parent.mkdir(exist_ok=True)
    kept = [dataclasses.asdict(row) | {"valid": [float(f"{v:.5g}") for v in row.valid]} for row in rows]
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in kept) + "\n]\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "\n\n" + markdown(rows, about) + "\n\n" + END + after)
