"""The page's panels as figures of matplotlib: the same table, the same bins."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from packext.diagnostics.view.content import Content
from packext.diagnostics.view.panels import COLUMNS

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
GREY = "#8a9097"


def pictures(content: Content, message: dict[str, Any]) -> dict[str, Figure]:
    """Draw what the page shows.

    Args:
        content: of the run.
        message: all that the page knows of it.

    Returns:
        A figure for each column that has panels, and "layers".
    """
    found = {}
    for column in COLUMNS:
        panels = [panel for panel in message["panels"] if panel["column"] == column]
        if panels:
            wide = min(3, len(panels))
            figure, grid = _grid(f"{message['name']}: {column.lower()}", len(panels), wide, 4.2, 2.9)
            for axes, panel in zip(grid, panels, strict=False):
                axes.set_title(panel["title"], fontsize=10, loc="left")
                DRAWERS[panel["kind"]](axes, panel, content, message)
            found[column.lower().replace(" ", "-")] = figure
    if message["maps"]:
        longest = max(len(table["layers"]) for table in message["maps"].values())
        height = max(2.2, min(7.0, 0.9 + 0.16 * longest))
        figure, grid = _grid(f"{message['name']}: layers", len(message["maps"]), 2, 6.4, height)
        for axes, (name, table) in zip(grid, message["maps"].items(), strict=False):
            _map(axes, message["heats"][name], table)
        found["layers"] = figure
    return found


def _grid(title: str, panels: int, wide: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    rows = math.ceil(panels / wide)
    figure = Figure(figsize=(wide * width, rows * height + 0.3), layout="constrained")
    figure.suptitle(title, fontsize=12)
    grid = list(figure.subplots(rows, wide, squeeze=False).flat)
    for axes in grid[panels:]:
        axes.set_visible(False)
    return figure, grid


def _numbers(values: list[float | None]) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in values])


def _lines(axes: Axes, panel: dict[str, Any], content: Content, message: dict[str, Any]) -> None:
    lowest, odd = [], []
    many = len(panel["names"].keys() & message["lines"].keys()) > 1
    for colour, (name, label) in zip(COLOURS, panel["names"].items(), strict=False):
        line = message["lines"].get(name)
        if line is None:
            continue
        mean, low, high = (_numbers(line[key]) for key in ("mean", "low", "high"))
        axes.plot(line["at"], mean, color=colour, linewidth=1.2, label=label, marker="." if len(mean) < 40 else "")
        if line["width"] > 1:
            axes.fill_between(line["at"], low, high, color=colour, alpha=0.22, linewidth=0)
        lowest += low[np.isfinite(low)].tolist()
        if line["odd"]:
            steps, first = line["odd"]
            said = f"not finite in {steps} step{'s' if steps > 1 else ''}, first in step {first}"
            odd.append(f"{label} {said}" if many else said)
    if odd:
        axes.text(0.02, 0.02, "\n".join(odd), transform=axes.transAxes, fontsize=7, color="#9b1c00")
    if panel["log"] and lowest and min(lowest) >= 0 and max(lowest) > 0:
        for line in axes.lines:  # the way to 0 would be a vertical line
            line.set_ydata([y if y > 0 else math.nan for y in line.get_ydata()])  # pyright: ignore
        _logarithmic(axes)
    for height, text in panel["marks"]:
        axes.axhline(height, color=GREY, linewidth=0.8, linestyle=":")
        behind = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}
        place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate(text, (1, height), fontsize=7, bbox=behind, zorder=1, **place)  # lines pass over it
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(panel["axis"], fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e8eaed", linewidth=0.6)
    if len(axes.lines) - len(panel["marks"]) > 1:
        axes.legend(fontsize=7, frameon=False)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic axis whose ticks are numbers, few of them."""
    axes.set_yscale("log")
    _readable(axes, 8)


def _readable(axes: Axes, size: int) -> None:
    low, high = np.log10(axes.get_ylim())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if high - low < 0.6:  # which may have no digit and power of ten in it
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
    few = FuncFormatter(lambda value, _: f"{value:g}" if high - low < 2 and f"{value:e}"[0] in "25" else "")
    axes.yaxis.set_minor_formatter(few)
    axes.tick_params(which="both", labelsize=size)


def _alpha(axes: Axes, panel: dict[str, Any], content: Content, message: dict[str, Any]) -> None:
    alpha = message["alpha"]
    if alpha is None:
        return
    edges = np.array(alpha["edges"])
    for part, text, style in (
        ("all", "all steps", {"fill": True, "color": "#c9cdd2"}),
        ("end", "last tenth", {"color": COLOURS[0], "linewidth": 1.5}),
    ):
        label = f"{text}, median {alpha[part]['median']:.2g}"
        axes.stairs(_numbers(alpha[part]["shares"]), edges, label=label, **style)
    parabola = axes.twinx()
    parabola.plot(edges, edges**2, color=GREY, linestyle=":", linewidth=1)
    parabola.set(ylim=(0, 4.4), yticks=[])
    axes.set_xlabel("alpha (what lies beyond is in the outermost bins)", fontsize=8)
    axes.set_ylabel(panel["axis"], fontsize=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, frameon=False)


def _last(panel: dict[str, Any], content: Content, message: dict[str, Any]) -> dict[str, Any] | None:
    name = next(iter(panel["names"]))
    return content.histogram(name, message["histograms"][name]["steps"][-1])


def _bars(axes: Axes, panel: dict[str, Any], content: Content, message: dict[str, Any]) -> None:
    found = _last(panel, content, message)
    if found is None:
        return
    shares = _numbers(found["shares"])
    axes.stairs(shares, np.linspace(-found["limit"], found["limit"], len(shares) + 1), fill=True, color=COLOURS[0])
    _logarithmic(axes)
    axes.set_xlabel(f"{panel['axis']}, step {found['step']}", fontsize=8)
    axes.set_ylabel("share of entries", fontsize=8)
    axes.tick_params(labelsize=8)


def _image(axes: Axes, panel: dict[str, Any], content: Content, message: dict[str, Any]) -> None:
    found = _last(panel, content, message)
    if found is None:
        return
    table = np.array([_numbers(row) for row in found["shares"]])
    x, y = found["limit"], found["param_limit"]
    _coloured(axes, table, (-x, x, -y, y), "lower", "share of entries")
    axes.set_xlabel(f"{panel['axis']}, step {found['step']}", fontsize=8)
    axes.set_ylabel("parameter", fontsize=8)


def _samples(axes: Axes, panel: dict[str, Any], content: Content, message: dict[str, Any]) -> None:
    found = _last(panel, content, message)
    if found is None:
        return
    norms = _numbers(found["norms"])
    axes.barh(range(len(norms)), norms, color=COLOURS[0])
    for k, share in enumerate(found["shares"] or ()):
        if share is not None:
            axes.annotate(f" {100 * share:.2g} %", (norms[k], k), fontsize=7, va="center")
    axes.margins(x=0.15)
    axes.set_yticks(range(len(norms)), [f"sample {k}" for k in found["samples"]], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"{panel['axis']}, step {found['step']}", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)


def _coloured(
    axes: Axes, table: np.ndarray, extent: tuple[float, ...], origin: Any, label: str, log: bool = True
) -> None:
    """A table in colour, logarithmic or of shares; what is absent, or has no logarithm, is grey."""
    shown = np.where(np.isfinite(table) & ((table > 0) | (not log)), table, np.nan)
    axes.set_facecolor("#d4d7db")
    axes.tick_params(labelsize=8)
    if np.isnan(shown).all():
        axes.set(xlim=extent[:2], ylim=extent[2:])
        text = "0 everywhere" if (table == 0).all() else "nothing above 0"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=8)
        return
    norm = LogNorm() if log else Normalize(0, 1)
    image = axes.imshow(shown, aspect="auto", origin=origin, extent=extent, norm=norm, interpolation="nearest")  # pyright: ignore[reportArgumentType]
    bar = axes.figure.colorbar(image, ax=axes)
    bar.set_label(label, fontsize=8)
    if log:
        _readable(bar.ax, 7)
    else:
        bar.ax.tick_params(labelsize=7)


def _map(axes: Axes, heat: dict[str, Any], table: dict[str, Any]) -> None:
    layers, at = table["layers"], np.array(table["at"])
    values = np.frombuffer(base64.b64decode(table["values"]), "<f4").reshape(len(at), len(layers)).astype(float)
    # Columns of an image are equally wide: each position shows the bin that began last before it.
    last = max(table["width"], int(at[-1] - at[-2]) if len(at) > 1 else 0)
    edges = np.linspace(at[0], at[-1] + last, 401)
    columns = np.searchsorted(at, edges[:-1], side="right") - 1
    extent = (float(edges[0]), float(edges[-1]), len(layers) - 0.5, -0.5)
    _coloured(axes, values.T[:, columns], extent, "upper", heat["axis"], heat["log"])
    pace = math.ceil(len(layers) / 36)
    axes.set_yticks(range(0, len(layers), pace), table["labels"][::pace], fontsize=7)
    axes.set_title(heat["title"], fontsize=10, loc="left")
    axes.set_xlabel("step" if table["width"] == 1 else f"step (means of up to {table['width']})", fontsize=8)


DRAWERS: dict[str, Callable[[Axes, dict[str, Any], Content, dict[str, Any]], None]] = {
    "lines": _lines, "alpha": _alpha, "bars": _bars, "image": _image, "samples": _samples,
}  # fmt: skip
