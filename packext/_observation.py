"""What `explain` sees of one forward and backward pass of a copy of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from packext._backpack import backpack
from packext._errors import PackextError
from packext._factored import Factored, Lookup, Masked, Outer, Pulled, Sum
from packext._graph import inputs_first, name_of
from packext._lineage import LOCAL
from packext._quantity import Ask, Quantity
from packext._record import Record, tensors_in
from packext._taps import Argument
from packext._use import Source, Use

#: What stands for the model's inputs in `Observation.after`.
INPUT = -1


@dataclass
class Seen:
    """A form in numbers: what remains of it when the pass is over."""

    form: str
    n: int
    sizes: tuple[int | None, int | None, int | None, int | None]
    work: float


class Watch(Quantity):
    """Sees the form and the routes of each parameter after all other quantities."""

    savefield = "explained"

    def __init__(self) -> None:
        self.found: dict[int, tuple[dict[str, str], float]] = {}

    def result(self, ask: Ask) -> None:
        routes = dict(ask.statistics.route)
        self.found[id(ask.parameter)] = routes, _cost(ask.statistics.form, routes)
        return None


@dataclass
class Observation:
    """One forward and backward pass of the copy."""

    record: Record | None = None
    inputs: tuple[tuple[int, ...], ...] = ()
    outputs: tuple[tuple[int, ...], ...] = ()
    after: dict[int, set[int]] = field(default_factory=dict)
    ends: set[int] = field(default_factory=set)
    seen: dict[tuple[int, int], Seen] = field(default_factory=dict)
    watch: Watch = field(default_factory=Watch)
    refused: list[tuple[str, list[str], int]] = field(default_factory=list)
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


def observe(
    model: nn.Module, args: Any, kwargs: Any, asked: Sequence[Quantity], watched: AbstractContextManager[Any]
) -> Observation:
    run = Observation()

    def hold(*_: Any) -> None:
        if run.record is None and LOCAL.tracer is not None:
            run.record = LOCAL.tracer.record

    model.register_forward_pre_hook(hold)
    run.inputs = tuple(tuple(t.shape) for t in tensors_in((args, kwargs)))
    try:
        with backpack(), watched:  # a context that asks for nothing, as the forward pass is otherwise without one
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
    run.refused = [(why, list(dict.fromkeys(s.name for s in sources)), at) for why, sources, at in record.refused]
    if run.refused or not live:
        return run
    for index, use in enumerate(record.uses):
        use.watch = partial(_note, run, index, use)
    generator = torch.Generator().manual_seed(0)
    loss = torch.stack([(y * torch.rand(y.shape, generator=generator).to(y)).sum().real for y in live]).sum()
    try:
        with backpack(*asked, run.watch, scale=1.0):
            loss.backward()
    except PackextError as error:
        run.errors.append(str(error))
    for use in record.uses:
        use.watch = None  # which refers to it: the model would wait for the garbage collector
    return run


def _note(run: Observation, index: int, use: Use, forms: Sequence[tuple[Source, Factored]]) -> None:
    size = float(sum(math.prod(shape) for shape in use.outputs))
    for source, form in forms:
        run.seen[index, id(source.tensor)] = _describe(form, size)


def _describe(form: Factored, size: float) -> Seen:
    if isinstance(form, Pulled):
        inner = _describe(form.inner, size)
        return Seen(f"pulled {inner.form}", inner.n, inner.sizes, inner.work + form.numel)
    if isinstance(form, Outer):
        return Seen("outer", form.n, (form.s, form.groups, form.i, form.o), _product(form))
    if isinstance(form, Lookup):
        return Seen("lookup", form.n, (form.s, None, form.shape[0], form.shape[1]), _product(form))
    name = "masked" if isinstance(form, Masked) else "dense"
    return Seen(name, form.n, (None, None, None, form.numel), max(size, _product(form)))


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
    for node in inputs_first([y.grad_fn for y in outputs]):
        found = [reached[child] for child, _ in node.next_functions if child is not None]
        use = getattr(node, "use", None)
        if id(use) in index:
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
    return node is not None and name_of(node) == f"{Argument.__name__}Backward"
