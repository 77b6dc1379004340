"""What `packext check` and `packext bench` print while they work and at the end, by rich."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from packext._bench import Cost
from packext._check import Outcome, quantities
from packext._subject import Subject

COLOURS = {"right": "green", "wrong": "bold red", "refused": "yellow", "not checked": "dim"}
#: How many outcomes `check` has: those of the table below, as its progress counts them.
OUTCOMES = 1 + len(quantities())
#: Wider than any table: names are not cut in a file, in a pipe and in a narrow terminal.
WHOLE = 10_000


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def show_outcomes(subject: Subject, outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Print a table of what was checked, and under it why things were refused.

    Args:
        subject: what was checked.
        outcomes: as they come.

    Returns:
        All of them.
    """
    found = []
    with _progress() as progress:
        task = progress.add_task("checking", total=OUTCOMES)
        for outcome in outcomes:
            found.append(outcome)
            progress.update(task, advance=1, description=f"{outcome.quantity}: {outcome.verdict}")
    console = Console(soft_wrap=True)
    console.print(escape(subject.about), highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for header, justify in (("quantity", "left"), ("", "left"), ("largest error", "right"), ("of", "left")):
        table.add_column(header, justify=justify, no_wrap=True)  # pyright: ignore[reportArgumentType]
    for o in found:
        error = "" if o.error is None else f"{o.error:.1e}"
        table.add_row(o.quantity, f"[{COLOURS[o.verdict]}]{o.verdict}[/]", error, escape(o.where))
    Console(width=WHOLE).print(table)
    reasons: dict[str, list[str]] = {}
    for o in found:
        if o.why:
            reasons.setdefault(o.why, []).append(o.quantity)
    for why, names in reasons.items():
        console.print(f"\n{', '.join(names)}: {escape(why)}", highlight=False)
    return found


def show_costs(subject: Subject, costs: Iterable[Cost], total: int) -> None:
    """Print a table of costs, and under it why things were refused.

    Args:
        subject: what was timed.
        costs: as they come.
        total: how many will come.
    """
    found = []
    with _progress() as progress:
        task = progress.add_task("the plain gradient", total=total)
        for cost in costs:
            found.append(cost)
            progress.update(task, advance=1, description=cost.name)
    console = Console(soft_wrap=True)
    console.print(f"{escape(subject.about)}\nmultiples of the plain gradient; medians of turns", highlight=False)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for header, justify in (("", "left"), ("time", "right"), ("quartiles", "left"), ("memory", "right")):
        table.add_column(header, justify=justify, no_wrap=True)  # pyright: ignore[reportArgumentType]
    for c in found:
        if c.time is None:
            table.add_row(c.name, "[yellow]refused[/]", "", "")
        else:
            low, high = c.quartiles
            table.add_row(c.name, f"{c.time:.2f}", f"{low:.2f} to {high:.2f}", f"{c.memory:.2f}")
    Console(width=WHOLE).print(table)
    for c in found:
        if c.why:
            console.print(f"\n{c.name}: {escape(c.why)}", highlight=False)
