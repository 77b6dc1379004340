"""Draws an `Explanation` with matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch
from matplotlib.path import Path
from matplotlib.textpath import TextToPath

if TYPE_CHECKING:
    from packext._explain import Explanation, ParameterUse

#: Fill and edge by `ParameterUse.flow`.
COLOURS = {
    "factors": ("#e3f1ec", "#2a8c6b"),
    "tiles": ("#e6eefa", "#3b6fb6"),
    "factors and tiles": ("#e2eff6", "#25899f"),
    "kernel": ("#efe8fa", "#7a4fb5"),
    "one sample at a time": ("#fdf2d8", "#c58a12"),
    "no gradient": ("#f2f2f2", "#9a9a9a"),
    "not known": ("#f2f2f2", "#9a9a9a"),
    "refused": ("#fbe3e1", "#c0392b"),
}
LABELS = {
    "factors": "from the factors",
    "tiles": "through tiles of rows",
    "factors and tiles": "some of both",
    "kernel": "by the fused kernel",
}
INK, FAINT, DATA, GRADIENT = "#22272e", "#6b7280", "#4b5563", "#b4423c"
LEFT, RIGHT = 1.35, 7.65  # sides of the boxes, in inches
WIDTHS = TextToPath()
GAP, TITLE, LINE, PAD = 0.34, 0.25, 0.21, 0.12
INDENT, FORMS, SPACE = 0.30, 2.55, 0.15  # of parameters and of their forms in a box; between two texts


@dataclass
class _Box:
    """One use, or one of the ends, with its place on the page."""

    title: str
    detail: str
    lines: list[tuple[str, str, str, str]]
    fill: str
    edge: str
    after: tuple[int, ...] = ()
    reason: tuple[str, ...] = ()
    top: float = 0.0
    middle: float = 0.0
    gradient: bool = True
    size: float = field(init=False)

    def __post_init__(self) -> None:
        lines = len(self.lines) + len(self.reason)
        self.size = TITLE + LINE * lines + PAD * (2 if lines else 1)

    @property
    def bottom(self) -> float:
        return self.top + self.size


def draw(explanation: Explanation) -> Figure:
    """Draw uses from top to bottom, with data flowing down on the left, gradients up on the right.

    Args:
        explanation: what to draw.

    Returns:
        The figure.
    """
    boxes = _boxes(explanation)
    y = 0.85
    for box in boxes:
        box.top, y = y, y + box.size + GAP
        box.middle = box.top + box.size / 2
    height, width = y + 0.42, 9.0
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    _heading(axes, explanation, width)
    for k, box in enumerate(boxes):
        for j in box.after:
            _arrows(axes, boxes, j, k)
    for box in boxes:
        _draw_box(axes, box)
    flows = dict.fromkeys(u.flow for u in explanation.uses)
    handles = [
        Patch(facecolor=COLOURS[f][0], edgecolor=COLOURS[f][1], label=LABELS.get(f, f)) for f in COLOURS if f in flows
    ]
    if handles:
        axes.legend(
            handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=8, labelcolor=INK,
            bbox_to_anchor=(0.5, 0.05 / height), handlelength=1.4,
        )  # fmt: skip
    return figure


def _boxes(e: Explanation) -> list[_Box]:
    """The input, a box for each use, and the output; `after` counts from the input."""
    groups = [list(group) for _, group in groupby(e.uses, key=lambda u: u.index)]
    place = {group[0].index: k + 1 for k, group in enumerate(groups)} | {-1: 0}
    boxes = [_Box("input", _shapes(e.inputs), [], "white", FAINT)]
    for group in groups:
        u = group[0]
        flow = max((u.flow for u in group), key=list(COLOURS).index)
        fill, edge = COLOURS[flow]
        lines = [_line(u) for u in group]
        after = tuple(place[j] for j in u.after if j in place)
        box = _Box(_title(u), _passage(u), lines, fill, edge, after, _reason(u.refused))
        box.gradient = any(v.n is not None for v in group) and not u.refused
        boxes.append(box)
    ends = tuple(place[k] for k in e.ends if k in place)
    last = _Box("output", _shapes(e.outputs), [], "white", FAINT, ends)
    return [*boxes, last]


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes[:3]) + (", ..." if len(shapes) > 3 else "")


def _title(u: ParameterUse) -> str:
    return f"{u.module} · {u.kind}" if u.module else f"{u.kind} itself"


def _passage(u: ParameterUse) -> str:
    data = next((u.inputs[k] for k in ("input", "indices", "data", "input1") if k in u.inputs), None)
    if data is None and "arg0" in u.inputs and u.inputs["arg0"] != u.shape:
        data = u.inputs["arg0"]
    ends = " → ".join(str(list(shape)) for shape in (data, *u.outputs[:1]) if shape is not None)
    return f"{u.function}   {ends}".strip()


def _line(u: ParameterUse) -> tuple[str, str, str, str]:
    """Name and shape of a parameter, its form, its route, and the colour of that."""
    name = u.parameter.removeprefix(f"{u.module}.") if u.module else u.parameter
    form = {"": "", "dense": f"{u.n} rows"}.get(u.form.removeprefix("pulled "), u.form)
    if "outer" in u.form:
        matrix = f"g [{u.o}] aᵀ [{u.i}]" + (f", {u.g} groups" if u.g and u.g > 1 else "")
        form = f"Σ{u.s} {matrix}" if u.s and u.s > 1 else matrix
    if "lookup" in u.form:
        form = f"{u.s} of {u.i} rows"
    if "pulled" in u.form:
        form += ", pulled back"
    route = u.route if not u.refused else ""
    return f"{name} {list(u.shape)}", form, route, COLOURS[u.flow][1]


def _reason(message: str) -> tuple[str, ...]:
    """A message in four lines at most, without the place that the box names anyway."""
    lines = textwrap.wrap(message.partition("]: ")[2] or message, 92)
    return tuple(lines) if len(lines) <= 4 else (*lines[:3], lines[3][:88] + " ...")


def _write(axes: Axes, x: float, y: float, text: str, room: float, **style: Any) -> float:
    """Write without the middle of what is wider than the room, in inches; how wide it is then."""
    shown, most = axes.text(x, y, text, va="center", parse_math=False, **style), len(text)
    font = shown.get_fontproperties()
    while (width := WIDTHS.get_text_width_height_descent(shown.get_text(), font, False)[0] / 72) > room and most > 2:
        most = max(2, min(most - 1, int(most * room / width)))
        shown.set_text(f"{text[: (most - 1) // 2]}…{text[len(text) - most // 2 :]}")
    return width


def _heading(axes: Axes, e: Explanation, width: float) -> None:
    room = RIGHT - LEFT
    if e.refusals:
        said = f"refused: {len(e.refusals)} reason{'s' if len(e.refusals) > 1 else ''}"
        room -= SPACE + _write(axes, RIGHT, 0.30, said, room, fontsize=10, color=COLOURS["refused"][1], ha="right")
    _write(axes, LEFT, 0.30, e.model, room, fontsize=13, fontweight="bold", color=INK)
    _write(axes, LEFT, 0.56, f"N = {e.n};  {', '.join(e.quantities)}", RIGHT - LEFT, fontsize=8, color=FAINT)
    axes.text(0.62, 0.56, "data  ↓", fontsize=9, color=DATA, ha="center", va="center")
    axes.text(width - 0.62, 0.56, "↑  gradients", fontsize=9, color=GRADIENT, ha="center", va="center")


def _draw_box(axes: Axes, box: _Box) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (LEFT, box.top), RIGHT - LEFT, box.size, boxstyle="round,pad=0,rounding_size=0.07",
            facecolor=box.fill, edgecolor=box.edge, linewidth=1.1, zorder=2,
        )
    )  # fmt: skip
    left, right = LEFT + 0.14, RIGHT - 0.14
    y = box.top + PAD / 2 + TITLE / 2
    room = right - left - SPACE
    room -= _write(axes, right, y, box.detail, 0.7 * room, fontsize=8, color=FAINT, ha="right", zorder=3)
    _write(axes, left, y, box.title, room, fontsize=9, fontweight="bold", color=INK, zorder=3)
    first, second = LEFT + INDENT, LEFT + FORMS
    y = box.top + PAD + TITLE + LINE / 2
    for name, form, route, colour in box.lines:
        room = right - second - SPACE
        room -= _write(axes, right, y, route, 0.7 * room, fontsize=7.2, color=colour, ha="right", zorder=3)
        _write(axes, second, y, form, room, fontsize=7.6, color=INK, zorder=3)
        _write(axes, first, y, name, second - first - SPACE, fontsize=7.6, color=INK, zorder=3)
        y += LINE
    for line in box.reason:
        _write(axes, first, y, line, right - first, fontsize=7.6, color=box.edge, zorder=3)
        y += LINE


def _arrows(axes: Axes, boxes: list[_Box], j: int, k: int) -> None:
    """Data from box j to box k, and the gradient back."""
    upper, lower = boxes[j], boxes[k]
    style = {} if upper.gradient and lower.gradient else {"linestyle": (0, (2, 2)), "alpha": 0.55}
    back = upper.title != "input"
    if k == j + 1:
        _arrow(axes, (LEFT + 0.45, upper.bottom), (LEFT + 0.45, lower.top), DATA)
        if back:
            _arrow(axes, (RIGHT - 0.45, lower.top), (RIGHT - 0.45, upper.bottom), GRADIENT, **style)
        return
    reach = min(1.0, 0.30 + 0.07 * (k - j))
    ends = (upper.middle + 0.09, lower.middle - 0.09)
    _bend(axes, LEFT, ends, -reach, DATA)
    if back:
        _bend(axes, RIGHT, (ends[1], ends[0]), reach, GRADIENT, **style)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, **style: Any) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, shrinkA=1, shrinkB=1, color=colour, linewidth=1.3,
            zorder=1, **style,
        )
    )  # fmt: skip


def _bend(axes: Axes, x: float, ends: tuple[float, float], reach: float, colour: str, **style: Any) -> None:
    """An arrow that leaves the column, passes other boxes, and comes back."""
    start, stop = ends
    turn = min(0.25, abs(stop - start) / 2) * (1 if stop > start else -1)
    out = x + reach
    points = [(x, start), (out, start), (out, start + turn), (out, stop - turn), (out, stop), (x, stop)]
    codes = [Path.MOVETO, Path.CURVE3, Path.CURVE3, Path.LINETO, Path.CURVE3, Path.CURVE3]
    axes.add_patch(
        FancyArrowPatch(
            path=Path(points, codes), arrowstyle="-|>", mutation_scale=9, color=colour, linewidth=1.3,
            zorder=1, **style,
        )
    )  # fmt: skip
