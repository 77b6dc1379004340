"""A report: the page in one file, without a server, and its panels as PNGs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import packext as px
from packext.diagnostics._run import RECORD
from packext.diagnostics.view.content import HISTOGRAMS, Content
from packext.diagnostics.view.page import page, plotly_source

#: How many numbers the histograms of one kind have in a report: with many layers there are fewer steps.
NUMBERS = 400_000


def write_report(path: str | Path, out: str | Path | None = None) -> Path:
    """Write `report.html`, which needs no network and no server, and a PNG for each column of it.

    Args:
        path: the folder of the record.
        out: the folder for the report, which is created; by default `report` in that of the record.

    Returns:
        The path of `report.html`.

    Raises:
        FileNotFoundError: if there is no record.
        PackextError: if it has no step, or cannot be read.
        ImportError: if plotly or matplotlib is not installed.
    """
    plotly = plotly_source()
    try:
        from matplotlib import rc_context

        from packext.diagnostics.view.pictures import pictures
    except ImportError:
        raise ImportError("The PNGs of a report are drawn by matplotlib: pip install 'packext[watch]'.") from None
    content = Content(path)
    run = content.run
    if not (run.path / RECORD).exists():
        raise FileNotFoundError(f"{run.path} has no record of a run ({RECORD}).")
    content.update()
    if not run.steps:
        raise px.PackextError(f"{run.path / RECORD} has no step: there is nothing to report yet.")
    out = run.path / "report" if out is None else Path(out)
    out.mkdir(parents=True, exist_ok=True)
    message = content.message() | {"opened": 0, "error": None, "more": False, "progress": 1.0}
    histograms = _histograms(content, message)
    with rc_context({"text.parse_math": False}):  # names with dollar signs are no formulas
        for name, figure in pictures(content, message).items():
            figure.savefig(out / f"{name}.png", dpi=110)
    file = out / "report.html"
    data = {"runs": [message], "histograms": [histograms]}
    file.write_text(page(f"{message['name']} - packext", f"<script>{plotly}</script>", data), "utf-8")
    return file


def _histograms(content: Content, message: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """Histograms by name and step, at as many steps as there is space for, which the message then names."""
    found: dict[str, dict[int, Any]] = {}
    for name in HISTOGRAMS:
        if name not in message["histograms"]:
            continue
        about = message["histograms"][name]
        names = [name, *(f"{name}/{layer}" for layer in about["layers"])]
        steps = about["steps"]
        size = content.run.arrays(name)[steps[-1]].size * len(names)
        most = max(1, min(len(steps), NUMBERS // size))
        about["steps"] = steps = [steps[-1 - k * (len(steps) - 1) // max(1, most - 1)] for k in range(most)][::-1]
        found |= {part: {step: content.histogram(part, step) for step in steps} for part in names}
    return found
