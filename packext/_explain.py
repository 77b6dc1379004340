"""`explain`: every use of every parameter in a table, and a drawing of the forward and backward pass."""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from packext._backpack import backpack
from packext._errors import PackextError
from packext._extend import extend, is_extended
from packext._factored import Factored, Lookup, Masked, Outer, Pulled, Sum
from packext._lineage import LOCAL
from packext._quantity import Ask, Quantity
from packext._record import Record, tensors_in
from packext._scale import is_loss
from packext._taps import Argument
from packext._use import Source, Use
from packext.quantities import BatchL2Grad, GradDot, Variance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What stands for the model's inputs in `ParameterUse.after`.
INPUT = -1

_ROUTES = ("sq_norms", "second_moment", "scatter", "gram", "dots", "total", "rows")
_SHORT = {"sq_norms": "norms", "second_moment": "squares", "total": "sum", "gram": "products"}


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
        routes: for each statistic, whether it comes from the "factors" or from "tiles" of rows. If a parameter has
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
        for way in ("factors", "tiles"):
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
        return "factors and tiles" if len(ways) > 1 else next(iter(ways), "factors")


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

    One forward pass runs on a copy of the model and one backward pass with random cotangents, so that model,
    gradients, results, buffers and the state of torch's random numbers stay as they are. What is unsupported
    stands in the table with its reason, instead of raising.

    Args:
        model: extended or not (then the batch axis is 0).
        *inputs: what the model is called with.
        quantities: whose routes and costs are shown; norms, variance and inner products by default.
        **kwargs: keyword arguments of the model.

    Returns:
        The uses, as data; print it for a table, and call `.figure()` for a drawing.

    Raises:
        TypeError: if `model` is no module with parameters.

    Example:
        >>> print(px.explain(model, x))
    """
    if not isinstance(model, nn.Module) or is_loss(model):
        raise TypeError(f"explain expects a model with parameters, got {model!r:.80}.")
    asked = (BatchL2Grad(), Variance(), GradDot()) if quantities is None else tuple(quantities)
    batch_axis = model.__dict__["_packext"].batch_axis if is_extended(model) else 0
    frozen = tuple(name for name, p in model.named_parameters() if not p.requires_grad)
    twin = extend(copy.deepcopy(model), batch_axis)
    for p in twin.parameters():
        p.grad = None
    devices = sorted({t.device.index for t in twin.parameters() if t.is_cuda})
    observations: list[_Observation] = []
    with torch.random.fork_rng(devices):
        while True:
            before = copy.deepcopy(twin)
            run = _observe(twin, inputs, kwargs, asked)
            observations.append(run)
            twin = before
            if not _set_aside(twin, run):
                break
    return _assemble(model, observations, asked, frozen)


def _set_aside(model: nn.Module, run: _Observation) -> bool:
    """Change the copy so that the rest of it can be looked at.

    Parameters of refused uses are frozen, and normalisations by the statistics of the batch go by their running ones.

    Returns:
        Whether there was anything to change.
    """
    changed = False
    named = {name for _, names in run.refused for name in names}
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


@dataclass
class _Seen:
    """A form in numbers: what remains of it when the pass is over."""

    form: str
    n: int
    sizes: tuple[int | None, int | None, int | None, int | None]
    work: float


class _Watch(Quantity):
    """Sees the form and the routes of each parameter after all other quantities."""

    savefield = "explained"

    def __init__(self) -> None:
        self.found: dict[int, tuple[dict[str, str], float]] = {}

    def result(self, ask: Ask) -> None:
        routes = dict(ask.statistics.route)
        self.found[id(ask.parameter)] = routes, _cost(ask.statistics.form, routes)
        return None


@dataclass
class _Observation:
    """One forward and backward pass of the copy."""

    record: Record | None = None
    inputs: tuple[tuple[int, ...], ...] = ()
    outputs: tuple[tuple[int, ...], ...] = ()
    after: dict[int, set[int]] = field(default_factory=dict)
    ends: set[int] = field(default_factory=set)
    seen: dict[tuple[int, int], _Seen] = field(default_factory=dict)
    watch: _Watch = field(default_factory=_Watch)
    refused: list[tuple[str, list[str]]] = field(default_factory=list)
    starts: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def relative(self, source: Source) -> tuple[dict[str, str], float | None]:
        """Routes and relative cost of a parameter."""
        key = id(source.tensor)
        routes, cost = self.watch.found.get(key, ({}, None))
        if cost is None:
            return routes, None
        indices = {index for index, k in self.seen if k == key}
        formed = sum(seen.work for (_, k), seen in self.seen.items() if k == key and seen.form == "dense")
        work = sum(seen.work for (index, _), seen in self.seen.items() if index in indices)
        return routes, (cost + formed) / max(1.0, work)


def _observe(model: nn.Module, args: Any, kwargs: Any, asked: Sequence[Quantity]) -> _Observation:
    run = _Observation()

    def hold(path: str, *_: Any) -> None:
        if run.record is None and LOCAL.tracer is not None:
            run.record = LOCAL.tracer.record
        if run.record is not None:
            run.starts[path] = len(run.record.uses)

    for path, module in model.named_modules():
        module.register_forward_pre_hook(partial(hold, path))
    run.inputs = tuple(tuple(t.shape) for t in tensors_in((args, kwargs)))
    try:
        with torch.enable_grad():
            output = model(*args, **kwargs)
    except PackextError as error:
        run.errors.append(str(error))
        return run
    record = run.record
    if record is None:
        raise PackextError(
            "explain: the model ran untraced (is it compiled, or inside px.disable or a functional transform?)."
        )
    live = [y for y in tensors_in(output) if y.requires_grad and not y.is_leaf]
    run.outputs = tuple(tuple(y.shape) for y in live)
    run.after, run.ends = _connections(record, live)
    run.refused = [(why, list(dict.fromkeys(s.name for s in sources))) for why, sources in record.refused]
    for index, use in enumerate(record.uses):
        # An attribute of the instance, found before the method of its class.
        use.factors = partial(_factors, run, index, use)  # type: ignore[method-assign]
    if run.refused or not live:
        return run
    generator = torch.Generator().manual_seed(0)
    loss = torch.stack([(y * torch.rand(y.shape, generator=generator).to(y)).sum().real for y in live]).sum()
    try:
        with backpack(*asked, run.watch, scale=1.0):
            loss.backward()
    except PackextError as error:
        run.errors.append(str(error))
    return run


def _factors(run: _Observation, index: int, use: Use, saved: Any, gs: Any) -> list[tuple[Source, Factored]]:
    forms = Use.factors(use, saved, gs)
    size = float(sum(math.prod(shape) for shape in use.outputs))
    for source, form in forms:
        run.seen[index, id(source.tensor)] = _describe(form, size)
    return forms


def _describe(form: Factored, size: float) -> _Seen:
    if isinstance(form, Pulled):
        inner = _describe(form.inner, size)
        return _Seen(f"pulled {inner.form}", inner.n, inner.sizes, inner.work + form.numel)
    if isinstance(form, Outer):
        return _Seen("outer", form.n, (form.s, form.groups, form.i, form.o), _product(form))
    if isinstance(form, Lookup):
        return _Seen("lookup", form.n, (form.s, None, form.shape[0], form.shape[1]), _product(form))
    name = "masked" if isinstance(form, Masked) else "dense"
    return _Seen(name, form.n, (None, None, None, form.numel), max(size, _product(form)))


def _product(form: Factored) -> float:
    """Multiply-adds of the sum of all rows."""
    if isinstance(form, Sum):
        return sum(map(_product, form.parts))
    if isinstance(form, Pulled):
        return _product(form.inner) + form.numel
    if isinstance(form, Outer):
        return float(form.n * form.groups * form.s * form.i * form.o)
    if isinstance(form, Lookup):
        return float(form.n * form.s * form.shape[1])
    return float(form.n * form.numel)


def _rows(form: Factored) -> float:
    """Multiply-adds of forming all rows, beyond what a dense form has done already."""
    if isinstance(form, Sum):
        return sum(map(_rows, form.parts))
    if isinstance(form, Pulled):
        return _rows(form.inner) + form.n * form.numel
    if isinstance(form, Outer):
        return _product(form)
    return float(form.n * form.numel) if isinstance(form, (Masked, Lookup)) else 0.0


def _cost(form: Factored, routes: dict[str, str]) -> float:
    """Multiply-adds of all statistics by their routes."""
    entries = float(form.n * form.numel)
    tiled = sum(way == "tiles" for way in routes.values())
    cost = _rows(form) + entries * tiled if tiled else 0.0
    return cost + sum(_from_factors(form, k) for k, way in routes.items() if way == "factors")


def _from_factors(form: Factored, statistic: str) -> float:
    if not isinstance(form, Outer):
        return _product(form)
    n, g, s, i, o = form.n, form.groups, form.s, form.i, form.o
    if statistic == "sq_norms":
        return float(n * g * (i + o) if s == 1 else n * g * s * s * (i + o + 1))
    if statistic == "gram":
        return float(n * n * g * (i + o))
    if statistic == "scatter":
        return 3.0 * n * g * i * o
    return _product(form)


# -- which use reads what ---------------------------------------------------------------------------
def _connections(record: Record, outputs: Sequence[Tensor]) -> tuple[dict[int, set[int]], set[int]]:
    """For each use those before it, and those at the outputs, read from autograd's graph.

    An elementwise use sits beside the data that its parameter meets: it takes its place between that data and
    what follows.

    Returns:
        By use, the uses before it; and the uses at the outputs.
    """
    index = {id(use): k for k, use in enumerate(record.uses)}
    after: dict[int, set[int]] = {k: set() for k in index.values()}
    reached: dict[Any, set[int]] = {}
    for node in _inputs_first([y.grad_fn for y in outputs]):
        found = [reached[child] for child, _ in node.next_functions if child is not None]
        use = getattr(node, "use", None)
        if use is not None and id(use) in index:
            at = index[id(use)]
            after[at] |= set().union(*found)
            reached[node] = {at}
            continue
        beside = sorted({k for part in found if len(part) == 1 for k in part if _is_argument(record.uses[k])})
        beside = [k for k in beside if not after[k]]
        if beside and len(found) > 1:
            rest = set().union(*found) - set(beside)
            for k in beside:
                after[k] |= rest
                rest = {k}
            reached[node] = rest
        else:
            reached[node] = set().union(*found)
    ends = set().union(*(reached[y.grad_fn] for y in outputs)) if outputs else set()
    return after, ends


def _is_argument(use: Use) -> bool:
    node = use.node()
    return node is not None and getattr(node, "name", str)() == f"{Argument.__name__}Backward"


def _inputs_first(roots: Sequence[Any]) -> Iterator[Any]:
    """Nodes of a graph, each after all that it leads to."""
    done: set[Any] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, expanded = stack.pop()
        if node is None or node in done:
            continue
        if expanded:
            done.add(node)
            yield node
            continue
        stack.append((node, True))
        stack.extend((child, False) for child, _ in node.next_functions)


# -- the result -------------------------------------------------------------------------------------
def _split(where: str) -> tuple[str, str]:
    module, _, kind = where.rpartition(" [")
    return ("" if module.startswith("(") else module), kind.rstrip("]")


def _assemble(
    model: nn.Module, observations: Sequence[_Observation], asked: Sequence[Quantity], frozen: tuple[str, ...]
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
    uses, ends = _insert(uses, sorted(last.ends), refused, last.starts, shapes)
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
        tuple(dict.fromkeys([*(why for why, _ in refused), *errors])),
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
    refused: Sequence[tuple[str, list[str]]],
    starts: dict[str, int],
    shapes: dict[str, tuple[int, ...]],
) -> tuple[list[ParameterUse], list[int]]:
    """Give uses that were refused in the forward pass, which have no tap, a place among the others."""
    placed = []
    for why, names in refused:
        call, _, rest = why.partition(" in module ")
        module, kind = _split(rest.partition("]: ")[0])
        own = [u.index + 1 for u in uses if u.module == module]
        placed.append((max([starts.get(module, 0), *own]), call.strip("_"), module, kind, why, names))
    for index, call, module, kind, why, names in sorted(placed, key=lambda item: item[0], reverse=True):

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
