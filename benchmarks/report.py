"""What is shown and kept of a run: tables on screen, JSON files, and a Markdown page."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import re
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.bench import Cell, RowResult
from benchmarks.contenders import LIBRARIES
from benchmarks.problems import PROBLEMS
from benchmarks.quantities import ROWS, rows_of
from benchmarks.timing import Ratio

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
KEPT = "cpu-kept"
"""In the place of a device: the CPU, where glibc keeps what is freed."""
KEPT_BEGIN, KEPT_END = "<!-- kept:begin -->", "<!-- kept:end -->"


def environment(device: str, threads: int) -> dict[str, Any]:
    """Return what a reader needs to place the figures."""
    processor = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        processor = found.group(1) if found else processor
    return {
        "date": date.today().isoformat(),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": threads,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {
            "torch": torch.__version__,
            **{x.title: x.version for x in LIBRARIES.values() if x.key != "func"},
        },
        "load": os.getloadavg()[0],
    }


def path_for(problem: str, device: str, *, whole: bool) -> Path:
    """Return where one problem's results are kept."""
    return RESULTS / f"{problem}-{device.replace(':', '')}{'' if whole else '-partial'}.json"


def save(problem: str, rows: dict[str, RowResult], about: dict[str, Any], options: dict[str, Any]) -> None:
    """Write one problem's results.

    Those of some rows take the place of these rows in what is kept of the same machine with the same versions: rows are
    timed one by one, each beside its own plain gradient. Those of all rows that are kept, or more, take the place of
    everything. Anything else that is partial is kept beside it.
    """
    path = path_for(problem, options["device"], whole=options["whole"])
    before = path_for(problem, options["device"], whole=True)
    if options["complete"] and not options["whole"] and before.exists():
        known, place = load(problem, options["device"]) or ({}, {})
        same = all(about[k] == place[k] for k in about if k not in ("date", "load"))
        if known.keys() <= rows.keys() or (same and rows.keys() <= known.keys()):
            rows, path = {**known, **rows}, before
    path.parent.mkdir(exist_ok=True)
    content = {
        "problem": {
            "key": problem,
            "title": PROBLEMS[problem].title,
            "batch": PROBLEMS[problem].batch,
            "parameters": PROBLEMS[problem].parameters,
        },
        "environment": about,
        "options": options,
        "rows": {key: dataclasses.asdict(result) for key, result in rows.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def load(problem: str, device: str) -> tuple[dict[str, RowResult], dict[str, Any]] | None:
    """Return a whole run's results and its environment, None where there was none."""
    path = path_for(problem, device, whole=True)
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    rows = {}
    for key, found in content["rows"].items():
        cells = {
            library: Cell(**{**cell, "ratio": Ratio(**cell["ratio"]) if cell["ratio"] else None})
            for library, cell in found["cells"].items()
        }
        rows[key] = RowResult(cells, Ratio(**found["twin"]) if found["twin"] else None)
    return rows, content["environment"]


def show(console: Console, problem: str, rows: dict[str, RowResult], libraries: list[str]) -> None:
    """Print one problem's table."""
    table = Table(title=f"{heading(problem)}: time (peak memory) over the gradient's")
    table.add_column("")
    for key in libraries:
        table.add_column(LIBRARIES[key].title, justify="right")
    for key, result in rows.items():
        best = fastest(result)
        cells = [f"[bold]{text(result.cells[k])}[/bold]" if k == best else text(result.cells[k]) for k in libraries]
        table.add_row(ROWS[key].title, *cells)
    console.print(table)
    for result in rows.values():
        if result.twin is not None:
            console.print(twin_note(result))


def heading(problem: str) -> str:
    """Return a problem's title with its sizes."""
    found = PROBLEMS[problem]
    return f"{found.title}; N = {found.batch}; {found.parameters:,} parameters"


def text(cell: Cell) -> str:
    """Return a cell's text: ``time (memory)`` or why there is none."""
    if cell.ratio is None:
        return cell.text
    memory = "" if cell.memory is None else f" ({cell.memory:.2f})"
    return f"{cell.ratio.median:.2f}{memory}"


def fastest(result: RowResult) -> str | None:
    """Return the column with the least time, None where there is no race."""
    timed = {k: c.ratio.median for k, c in result.cells.items() if c.ratio is not None}
    return min(timed, key=lambda k: timed[k]) if len(timed) > 1 else None


def twin_note(result: RowResult) -> str:
    """Return the sentence on two identical contenders."""
    assert result.twin is not None
    return (
        f"Two copies of the plain gradient, timed against each other: {result.twin.median:.2f} "
        f"(quartiles {result.twin.lower:.2f} to {result.twin.upper:.2f})."
    )


def markdown(problem: str, rows: dict[str, RowResult], libraries: list[str], about: dict[str, Any]) -> str:
    """Return one problem's section of the page."""
    lines = [f"### {heading(problem)}", ""]
    lines.append("| | " + " | ".join(LIBRARIES[k].title for k in libraries) + " |")
    lines.append("|---|" + "---:|" * len(libraries))
    for key, result in rows.items():
        best = fastest(result)
        cells = [text(result.cells[k]).replace("|", "\\|") for k in libraries]
        cells = [f"**{c}**" if k == best else c for k, c in zip(libraries, cells, strict=True)]
        lines.append(f"| {ROWS[key].title} | " + " | ".join(cells) + " |")
    lines.append("")
    missing = [ROWS[key].title for key in rows_of(PROBLEMS[problem]) if key not in rows]
    if missing:
        lines.append(f"Not measured: {', '.join(missing)}.")
    lines += [twin_note(r) for r in rows.values() if r.twin is not None]
    firsts = [
        c.first_memory
        for name, r in rows.items()
        if name != "batch_grad" and (c := r.cells.get("packext")) is not None and c.first_memory is not None
    ]
    if firsts:
        lines.append(
            f"The first step of a model, in which packext probes it, peaks at up to {max(firsts):.2f} times the "
            "gradient's (BatchGrad apart)."
        )
    lines += ["", *ways(rows, libraries), ""]
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
    threads = f"{about['threads']} threads, " if about["device"] == "cpu" else ""
    lines.append(
        f"{about['date']}; {about['processor'] if about['device'] == 'cpu' else about['device']}; "
        f"{threads}Python {about['python']}; {versions}."
    )
    return "\n".join(lines) + "\n"


def ways(rows: dict[str, RowResult], libraries: list[str]) -> list[str]:
    """Return a line per library on the variants that its cells were timed with."""
    lines = []
    for key in libraries:
        grouped: dict[str, list[str]] = {}
        for name, result in rows.items():
            cell = result.cells[key]
            if cell.ratio is not None and name != "extended":
                grouped.setdefault(cell.variant, []).append(ROWS[name].title)
        if key != "packext" and grouped:
            words = "; ".join(f"*{way}* for {', '.join(w)}" for way, w in grouped.items())
            lines.append(f"- {LIBRARIES[key].title}: {words}.")
    return lines


def write_page(device: str) -> None:
    """Put the tables of all whole runs, on the CPU and on `device`, between the page's markers; all else stays."""
    insert(tables("cpu", *{device} - {"cpu", KEPT}), BEGIN, END)
    insert(tables(KEPT), KEPT_BEGIN, KEPT_END)


def tables(*devices: str) -> str:
    """Return the tables of all whole runs on some devices."""
    sections = []
    for problem, where in itertools.product(PROBLEMS, devices):
        found = load(problem, where)
        if found is not None:
            rows, about = found
            known = [key for key in LIBRARIES if all(key in result.cells for result in rows.values())]
            sections.append(markdown(problem, rows, known, about))
    return "\n".join(sections)


def insert(text: str, begin: str, end: str) -> None:
    """Put text between two markers of the page, leaving all else alone."""
    page = PAGE.read_text() if PAGE.exists() else f"# Benchmarks\n\n{begin}\n{end}\n"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(before + begin + "\n\n" + text + "\n" + end + after)
