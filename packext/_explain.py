"""`explain`: every use of every parameter in a table, and a drawing of the forward and backward pass."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from packext._compiler import original
from packext._copies import Apart
from packext._extend import extend, is_extended
from packext._observation import INPUT as INPUT
from packext._observation import Observation, observe
from packext._quantity import HessianQuantity, Quantity
from packext._scale import is_loss
from packext._use import Use
from packext.quantities import BatchL2Grad, GradDot, Variance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROUTES = ("sq_norms", "second_moment", "scatter", "gram", "dots", "total", "rows")
_SHORT = {"sq_norms": "norms", "second_moment": "squares", "scatter": "variance", "total": "sum", "gram": "products"}


@dataclass(frozen=True)
class ParameterUse:
    """One use of one parameter. Sizes are None where no gradient was factored.

    Attributes:
        index: position of the use in the forward pass; the parameters of one use share it.
        module: path of the module that ran ("" is the model itself).
        kind: class of that module.
        function: torch function that was called.
        rule: name of the rule that factors its gradients.
        parameter: name of the parameter.
        shape: its shape.
        inputs: shapes of the tensors that the use reads, by name.
        outputs: shapes of its outputs.
        after: indices of the uses whose outputs reach this one without passing another; `INPUT` for the model's inputs.
        form: what a per-sample gradient is held as: "outer" (a sum of S outer products), "lookup" (S rows of a table),
            "dense" (itself), "masked" (the generic rule, one sample at a time); "pulled" stands before that of a value
            made of parameters.
        n: samples.
        s: shared positions, whose contributions are summed.
        g: groups.
        i: features in.
        o: features out.
        routes: for each statistic, whether it comes from the "factors", from "tiles" of rows, or from the fused
            "kernel". If a parameter has
            several uses, the routes are those of their sum.
        cost: multiply-adds of all statistics (those of forming the rows included), relative to those of the ordinary
            gradient of all parameters of the use.
        refused: why packext cannot serve this use, or "".
        unknown: whether no backward pass could be made, because the model is refused elsewhere.
    """

    index: int
    module: str
    kind: str
    function: str
    rule: str
    parameter: str
    shape: tuple[int, ...]
    inputs: dict[str, tuple[int, ...]]
    outputs: tuple[tuple[int, ...], ...]
    after: tuple[int, ...] = ()
    form: str = ""
    n: int | None = None
    s: int | None = None
    g: int | None = None
    i: int | None = None
    o: int | None = None
    routes: dict[str, str] = field(default_factory=dict)
    cost: float | None = None
    refused: str = ""
    unknown: bool = False

    @property
    def route(self) -> str:
        """All routes in a few words, "" if there are none."""
        words = []
        for way in ("factors", "tiles", "kernel"):
            names = [_SHORT.get(k, k) for k in _ROUTES if self.routes.get(k) == way]
            if names:
                words.append(f"{way}: {', '.join(names)}")
        return "; ".join(words)

    @property
    def flow(self) -> str:
        """The category by which the drawing colours a use."""
        if self.refused:
            return "refused"
        if self.n is None:
            return "not known" if self.unknown else "no gradient"
        if "masked" in self.form:
            return "one sample at a time"
        ways = set(self.routes.values())
        return "factors and tiles" if {"factors", "tiles"} <= ways else min(ways, default="factors")


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. Prints as a table; `figure` draws it.

    Attributes:
        model: class of the model.
        n: number of samples.
        uses: of every parameter, in the order of the forward pass.
        inputs: shapes of the model's inputs.
        outputs: shapes of its outputs that carry a gradient.
        ends: indices of the uses that the outputs come from.
        quantities: names of those whose routes and costs are shown.
        refusals: messages of the errors that a backward pass in a context would raise; empty if all is supported.
        unused: names of parameters that no gradient reaches.
        frozen: names of parameters that do not require a gradient.
    """

    model: str
    n: int
    uses: tuple[ParameterUse, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]
    quantities: tuple[str, ...]
    refusals: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def supported(self) -> bool:
        """Whether every quantity of every parameter can be had."""
        return not self.refusals

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table; see `HEADERS`."""
        cells = []
        last = None
        for u in self.uses:
            first = u.index != last
            last = u.index
            sizes = ["" if v is None else str(v) for v in (u.n, u.s, u.g, u.i, u.o)]
            route = u.route if u.n is not None and not u.refused else u.flow
            cells.append(
                (
                    f"{u.module or 'the model'} [{u.kind}]" if first else "",
                    u.function if first else "",
                    u.rule if first else "",
                    u.parameter,
                    u.form,
                    *sizes,
                    route,
                    "" if u.cost is None else f"{u.cost:.2f}",
                )
            )
        return cells

    def notes(self) -> list[str]:
        """What stands under the table."""
        batch = f"N = {self.n}" if self.n else "no samples"
        lines = [f"{self.model}, {batch}; routes and costs of {', '.join(self.quantities)}."]
        lines.append("S positions, I features in, O out, G groups; cost: multiply-adds relative to those of `.grad`.")
        lines += [f"Refused: {message}" for message in self.refusals]
        if self.unused:
            lines.append(f"No gradient reaches: {', '.join(self.unused)}.")
        if self.frozen:
            lines.append(f"Frozen: {', '.join(self.frozen)}.")
        return lines

    def __str__(self) -> str:
        """The table as plain text."""
        table = [HEADERS, *self.rows()]
        widths = [max(len(row[k]) for row in table) for k in range(len(HEADERS))]

        def line(row: Sequence[str]) -> str:
            cells = [
                c.rjust(w) if k in _NUMBERS else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            return "  ".join(cells).rstrip()

        ruled = [line(HEADERS), "  ".join("-" * w for w in widths), *map(line, table[1:])]
        notes = [part for note in self.notes() for part in textwrap.wrap(note, 118, subsequent_indent="    ")]
        return "\n".join([*ruled, "", *notes])

    def __rich__(self) -> Any:
        """A table in colours, for `rich.print`."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, header_style="bold", pad_edge=False)
        for k, header in enumerate(HEADERS):
            table.add_column(header, justify="right" if k in _NUMBERS else "left", no_wrap=k in _NUMBERS)
        for u, row in zip(self.uses, self.rows(), strict=True):
            style = _STYLES.get(u.flow)
            table.add_row(*map(escape, row), style=style)
        notes = [f"[red]{escape(n)}[/]" if n.startswith("Refused") else escape(n) for n in self.notes()]
        return Group(table, "", *notes)

    def figure(self) -> Figure:
        """Draw the passes: uses from top to bottom, data on the left going down, gradients on the right going up.

        Returns:
            A matplotlib figure; save it with `.savefig(path)`.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        try:
            from packext._drawing import draw
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "explain(...).figure() needs matplotlib: pip install packext[demo]", name=error.name
            ) from error
        return draw(self)


HEADERS = ("module", "function", "rule", "parameter", "form", "N", "S", "G", "I", "O", "route", "cost")
_NUMBERS = (5, 6, 7, 8, 9, 11)
_STYLES = {"refused": "red", "no gradient": "dim", "not known": "dim", "one sample at a time": "yellow"}


def explain(model: nn.Module, *inputs: Any, quantities: Sequence[Quantity] | None = None, **kwargs: Any) -> Explanation:
    """Say how packext sees a model: every use of every parameter, its factored gradient, its route and cost.

    One forward pass runs on a copy of the model and one backward pass with random cotangents (under `torch.no_grad()`,
    too), so that model, gradients, results, buffers and the state of torch's random numbers stay as they are. What is
    unsupported stands in the table with its reason, instead of raising.

    Args:
        model: extended or not (then the batch axis is 0); may be compiled, and is explained as it was written.
        *inputs: what the model is called with.
        quantities: of gradients, whose routes and costs are shown; norms, variance and inner products by default.
        **kwargs: keyword arguments of the model.

    Returns:
        The uses, as data; print it for a table, and call `.figure()` for a drawing.

    Raises:
        TypeError: if `model` is no module with parameters, or `quantities` are no list.
        ValueError: for quantities of a loss's curvature, or if a lazy module has not got its shapes yet.

    Example:
        >>> print(px.explain(model, x))
    """
    if not isinstance(model, nn.Module) or is_loss(model) or next(model.parameters(), None) is None:
        raise TypeError(f"explain expects a model with parameters, got {repr(model).splitlines()[0]:.80}.")
    model = original(model)
    lazy = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)]
    if lazy:
        raise ValueError(
            f"explain runs a copy of the model, and {', '.join(lazy)} of lazy modules have no shape yet: call the "
            "model on a batch first."
        )
    if isinstance(quantities, Quantity):
        raise TypeError(f"quantities must be a list, got one {type(quantities).__name__}: put it in brackets.")
    asked = (BatchL2Grad(), Variance(), GradDot()) if quantities is None else tuple(quantities)
    blind = [
        type(q).__name__
        for q in asked
        if isinstance(q, HessianQuantity) or getattr(q, "root", ("empirical",))[0] != "empirical"
    ]
    if blind:
        raise ValueError(f"explain runs no loss, of which {', '.join(blind)} are: ask for what is of gradients alone.")
    batch_axis = model.__dict__["_packext"].batch_axis if is_extended(model) else 0
    frozen = tuple(name for name, p in model.named_parameters() if not p.requires_grad)
    devices = sorted({t.device.index for t in model.parameters() if t.is_cuda})
    observations: list[Observation] = []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        twin = extend(copy.deepcopy(model), batch_axis)
        for p in twin.parameters():
            p.grad = None
        while True:
            before = copy.deepcopy(twin)
            run = observe(twin, inputs, kwargs, asked, Apart(model, "explain"))
            observations.append(run)
            twin = before
            if not _set_aside(twin, run):
                break
    return _assemble(model, observations, asked, frozen)


def _set_aside(model: nn.Module, run: Observation) -> bool:
    """Change the copy so that the rest of it can be looked at.

    Parameters of refused uses are frozen, and normalisations by the statistics of the batch go by their running ones.

    Returns:
        Whether there was anything to change.
    """
    changed = False
    named = {name for _, names, _ in run.refused for name in names}
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in named:
            p.requires_grad_(False)
            changed = True
    if not named and run.record is not None and run.errors:
        modules = dict(model.named_modules())
        for where in run.record.batch_statistics:
            module = modules[_split(where)[0]]
            if getattr(module, "running_mean", None) is not None and module.training:
                module.eval()
                changed = True
    return changed


# -- the result -------------------------------------------------------------------------------------
def _split(where: str) -> tuple[str, str]:
    module, _, kind = where.rpartition(" [")
    return ("" if module.startswith("(") else module), kind.rstrip("]")


def _assemble(
    model: nn.Module, observations: Sequence[Observation], asked: Sequence[Quantity], frozen: tuple[str, ...]
) -> Explanation:
    last = observations[-1]
    record = last.record
    errors = [error for run in observations for error in run.errors]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    uses: list[ParameterUse] = []
    for index, use in enumerate(record.uses if record is not None else ()):
        module, kind = _split(use.where)
        blame = _blame(use, errors)
        before = tuple(sorted(last.after.get(index, ()))) or (INPUT,)
        for source in dict.fromkeys(s for group in use.sources.values() for s in group):
            seen = last.seen.get((index, id(source.tensor)))
            n, s, g, i, o = (None,) * 5 if seen is None else (seen.n, *seen.sizes)
            routes, cost = last.relative(source)
            if blame:
                routes, cost = {}, None
            uses.append(
                ParameterUse(
                    index, module, kind, use.function, use.rule.name, source.name, tuple(source.tensor.shape),
                    dict(use.shapes), use.outputs, before, "" if seen is None else seen.form, n, s, g, i, o,
                    routes, cost, blame, bool(last.errors),
                )
            )  # fmt: skip
    refused = [item for run in observations for item in run.refused]
    uses, ends = _insert(uses, sorted(last.ends), refused, shapes)
    have = {u.parameter for u in uses if u.n is not None or u.refused}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return Explanation(
        type(model).__name__,
        0 if record is None else record.n,
        tuple(uses),
        last.inputs,
        last.outputs,
        tuple(ends) or (INPUT,),
        tuple(type(q).__name__ for q in asked),
        tuple(dict.fromkeys([*(why for why, _, _ in refused), *errors])),
        () if last.errors else tuple(name for name in names if name not in have),
        frozen,
    )


def _blame(use: Use, errors: Sequence[str]) -> str:
    """The error that is about this use, if one is."""
    call = use.describe()
    return next((e for e in errors if call in e or (use.rule.name == "norm" and f"in {use.where}" in e)), "")


def _insert(
    uses: list[ParameterUse],
    ends: list[int],
    refused: Sequence[tuple[str, list[str], int]],
    shapes: dict[str, tuple[int, ...]],
) -> tuple[list[ParameterUse], list[int]]:
    """Give uses that were refused in the forward pass, which have no tap, a place among the others."""
    placed = []
    for why, names, before in refused:
        call, _, rest = why.partition(" in module ")
        module, kind = _split(rest.partition("]: ")[0])
        placed.append((before, call.strip("_"), module, kind, why, names))
    for index, call, module, kind, why, names in sorted(placed, key=lambda item: item[0])[::-1]:

        def up(k: int, index: int = index) -> int:
            return k + (k >= index)

        following = next((u.after for u in uses if u.index == index), (index - 1,))
        moved = [replace(u, index=up(u.index), after=tuple(map(up, u.after))) for u in uses]
        moved = [replace(u, after=(index,)) if u.index == index + 1 and u.after == following else u for u in moved]
        rows = [
            ParameterUse(index, module, kind, call, "none", k, shapes.get(k, ()), {}, (), following, refused=why)
            for k in names
        ]
        ends = [index] if ends == [] or ends == [INPUT] else [up(k) for k in ends]
        uses = sorted([*moved, *rows], key=lambda u: u.index)
    return uses, ends
