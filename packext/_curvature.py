"""Sends roots of the loss Hessian from where the loss met the model's output to all taps.

A root of the Hessian is a set of columns; one column of every sample at once is a cotangent, which autograd
carries through whatever the model is made of. At each tap it gives the same pair (a, g) as the gradient does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from packext import _roots
from packext._chain import Chain, Positive, average, kept
from packext._columns import spread as send_columns
from packext._distributed import refuse_tensors, sharding
from packext._errors import CoupledSamplesError, PackextError, UnsupportedUseError, due_to
from packext._factored import Factored
from packext._flight import Sweep
from packext._graph import inputs_first, name_of
from packext._layout import Layout, Scattered, ranks
from packext._lineage import disable
from packext._listening import silence
from packext._pass import Pass
from packext._places import gates_of, place, records_of
from packext._quantity import Ask, Curvature, HessianQuantity, Point, Quantity
from packext._refusals import (
    is_weight_norm,
    knows_weight_norm,
    loses_bias,
    refuse_divided,
    refuse_moved,
    refuse_replaced,
    unseen,
    will_accumulate,
)
from packext._residual import residual
from packext._scratch import release
from packext._statistics import Statistics
from packext._union import everyone
from packext._use import Source

if TYPE_CHECKING:
    from packext._scale import Seen
    from packext._union import Ranks

#: A generator of our own: observing a run never changes it.
_GENERATOR = torch.Generator().manual_seed(20251121)


def _numbers(ranks: Ranks | None) -> torch.Generator:
    """What targets are drawn with where a quantity has no generator of its own.

    Returns:
        packext's own, which is the same in all processes; with a group another one on each rank, as samples of
        different ranks would share their draws.
    """
    if ranks is None:
        return _GENERATOR
    seed = int(torch.randint(1 << 62, (), generator=_GENERATOR)) + dist.get_rank(ranks.group)
    return torch.Generator().manual_seed(seed)


def _refuse_uneven(flight: Pass, seen: Seen, edge: GradientEdge, live: list[Tensor], places: list[Layout]) -> None:
    """Refuse exact roots of other sizes on other ranks, where each column's pass gathers parameters (FSDP2).

    Raises:
        PackextError: if so, on all ranks, which would wait for each other otherwise.
    """
    exact = [q for each in flight.heard for q in each.context.spreading if q.root[0] != "mc"]
    groups = (sharding(record.modules()) for record in records_of(seen, edge)) if exact else ()
    if (group := next((g for g in groups if g is not None), None)) is None:
        return
    sizes = [t.numel() // layout.n for t, layout in zip(live, places, strict=True)]
    found = everyone(sizes, group)
    if any(other != sizes for other in found):
        raise PackextError(
            f"{', '.join(map(repr, exact))}: outputs have {found} entries for each sample on the ranks that share this "
            "model's parameters (FSDP2), and each entry is a pass in which these are gathered. Pad batches to one "
            "length on all ranks, or take drawn targets (KFAC, DiagGGNMC), of which all have as many."
        )


def spread(flight: Pass, seen: Seen, edge: GradientEdge, g: Tensor) -> None:
    """Send what the quantities of the pass need from the loss `seen`, computed at `edge`, where `g` arrived.

    Raises:
        CoupledSamplesError: if rows of the model's output were chosen for an input of several tensors.
        PackextError: if the loss has no such root, or its input is gone or does not come from an extended model.
    """
    leaves = seen.leaves()
    if leaves is None:
        raise PackextError(_GONE.format(seen.name))
    if not seen.edges:
        kinds = ", ".join(dict.fromkeys(type(t).__name__ for t in leaves))
        raise PackextError(
            f"The extended {seen.name} was called with {kinds} as its first argument: no tensor was found there that "
            "requires grad. The model's output comes first: a tensor, or a tuple, list or dictionary of tensors."
        )
    for quantity in (q for each in flight.heard for q in each.context.spreading if len(flight.losses) > 1):
        if not quantity.additive:
            _refuse_several(quantity)
    seen = seen.fixed()
    live = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    places = [place(seen, e, t) for e, t in zip(seen.edges, live, strict=True)]
    _refuse_uneven(flight, seen, edge, live, places)
    direct = seen.spec.is_leaf() and places[0].axis in (None, 0)  # and no dictionary of one tensor
    if not direct and any(isinstance(layout, Scattered) for layout in places):
        raise CoupledSamplesError(_ROWS.format(seen.name))
    rows = places[0]

    @functools.cache
    def split_at(own: bool) -> tuple[_roots.Call, Callable[[Tensor], list[Tensor]]]:
        found = (seen.module, seen.args, seen.kwargs)
        loss, args, kwargs = found if own else _roots.of_logits(found[0], leaves[0], *found[1:])
        if direct:
            return _roots.Call(loss, live[0].detach(), args, kwargs, g), _alone
        joined = Joined(loss, leaves, seen.spec, places)
        return _roots.Call(joined, joined.output(), args, kwargs, g), joined.split

    # Whether results are to have a graph (create_graph=True), and can: a factor that is learned is not followed.
    graph, g = flight.graph and not g.requires_grad, g.detach()
    groups: dict[Any, dict[Pass, list[Curvature]]] = {}
    for each in flight.heard:
        # What a context gets is what it would get by itself: the same columns, of which others may have their part.
        compact = all(q.compact for q in each.context.spreading)
        numbers = _numbers(each.context.ranks) if any(q.root[0] == "mc" for q in each.context.spreading) else None
        for quantity in each.context.spreading:
            kind, draws, generator = quantity.root
            root = (kind, draws, numbers if kind == "mc" and generator is None else generator)
            only = frozenset(each.context.parameters or ()) if kind == "hessian" else None
            groups.setdefault((root, compact, only), {}).setdefault(each, []).append(quantity)
    for ((kind, draws, generator), compact, _), members in groups.items():
        # Second derivatives of the functions before the loss, and what is averaged after each, go with the loss itself.
        call, back = split_at(kind in ("hessian", "averaged"))
        traced = graph and any(q.traced for quantities in members.values() for q in quantities)
        traced = traced and direct and seen.input is not None and kind in ("exact", "mc") and _roots.closed(call.loss)
        for each, quantities in members.items() if flight.graph else ():
            each.constants.update(q for q in quantities if not (traced and q.traced))
        if traced:
            call = call._replace(output=seen.input)
        with disable(), torch.set_grad_enabled(traced):  # the loss may have extended parts of its own
            if kind == "hessian":
                columns = _roots.signed(call)
            elif kind == "entries":
                columns = ((s, 1.0) for s in _entries(call, seen, edge, g))
            elif kind == "mc":
                columns = ((s, 1.0) for s in _roots.sampled(call, draws, generator))
            else:
                columns = ((s, 1.0) for s in _roots.exact(call, compact))
        parts = (
            (part, sign) for column, sign in columns for part in ([column] if kind == "mc" else _apart(column, rows))
        )
        # All columns reach what the first does: later ones are told the same, also when their pass has ended.
        partners = {each: functools.cache(each.context._partner) for each in members}
        absorb = functools.partial(_absorb, members, partners, edge.node)
        if kind == "averaged":
            if not direct:
                raise PackextError(_SEVERAL.format("KFRA", seen.name))
            chain = Chain(seen.edges[0], seen.name, "KFRA", "KFLR")
            chain.check_samples(rows.n)
            with torch.autocast(g.device.type, enabled=False):  # sums stay in float32
                average(flight, chain, (part for part, _ in parts), rows.n, functools.partial(absorb, 1.0))
            continue
        with torch.set_grad_enabled(traced):
            stacks = kind != "hessian" and all(q.columns for each in members.values() for q in each)
            send_columns(flight, seen.edges, ((back(part), sign) for part, sign in parts), absorb, stacks)
        if kind == "hessian":
            wants = next(iter(members)).context._wants
            for edges, cotangents, sign in residual(flight, wants, seen.edges, live, places, edge, g):
                Sweep(flight, functools.partial(absorb, sign)).send(edges, cotangents)
        for each, quantities in members.items():
            for q in quantities:
                q.settle({source.name: sums[id(q)] for source, sums in each.sums.values() if id(q) in sums})


def _entries(call: _roots.Call, seen: Seen, edge: GradientEdge, g: Tensor) -> Iterator[Tensor]:
    """Cotangents that are 1 at one entry of each sample's output, of tensors that the loss uses: others send none."""
    with silence():
        parts = torch.autograd.grad([edge], list(seen.edges), [g], retain_graph=True, allow_unused=True)
    x, loss = call.output.detach(), call.loss
    flat = x.reshape(len(x), -1)
    sizes = [p.shape[1] for p in loss.places] if isinstance(loss, Joined) else [flat.shape[1]]
    used = [part is not None for part, size in zip(parts, sizes, strict=True) for _ in range(size)]
    eye = torch.eye(flat.shape[1], dtype=x.dtype, device=x.device)
    return (row.expand_as(flat).reshape(x.shape) for row, wanted in zip(eye, used, strict=True) if wanted)


def account(flight: Pass, seen: Seen, edge: GradientEdge, g: Tensor) -> None:
    """Note what of the gradients at the outputs of models comes from a loss behind them, where `g` arrived."""
    gates = gates_of(edge, all=True) if flight.whole else []
    if not gates:
        return
    with silence():
        edges = [GradientEdge(gate, 0) for gate in gates]
        parts = torch.autograd.grad([edge], edges, [g], retain_graph=True, allow_unused=True)
    for gate, part in zip(gates, parts, strict=True):
        if part is not None:
            flight.accounted[gate] = flight.accounted[gate] + part if gate in flight.accounted else part


class Graph(Point):
    """Products through the graph of the loss `sum(g * loss)`."""

    def __init__(
        self, parameters: list[Tensor], seen: Seen, edge: GradientEdge, g: Tensor, scale: str | float = "loss"
    ) -> None:
        """Take parameters, the call of the loss, where it was computed, what arrived there, and the context's scale."""
        self.parameters, self._scale = parameters, scale
        self._seen, self._edge, self._g = seen, edge, g
        self._slopes: list[Tensor | None] | None = None
        self._pull: tuple[Seen, list[Tensor], Sequence[Tensor | None]] | None = None
        self._leaves = seen.leaves()
        self._device = g.device.type

    @property
    def negative(self) -> bool:
        if isinstance(self._scale, str):  # with "sample", what arrived is divided out
            return self._scale == "sample" and bool((self._g < 0).any())
        return self._scale < 0

    def hessian(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        with kept(self._device):
            if self._slopes is None:
                _refuse_unsound([self._edge.node], self.parameters, "Hessian")
                with _refusing_zeros([self._edge.node]):
                    slopes = torch.autograd.grad(
                        [self._edge], self.parameters, [self._g], create_graph=True, allow_unused=True
                    )
                self._slopes = list(slopes)
            return _products(self._slopes, vectors, self.parameters)

    def ggn(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        if self._leaves is None:
            raise PackextError(_GONE.format(self._seen.name))
        _roots.refuse_arguments(f"The extended {self._seen.name}", self._seen.args, self._seen.kwargs)
        with kept(self._device):
            if self._pull is None:
                self._seen = seen = self._seen.fixed()
                loss, args, kwargs = _roots.of_logits(seen.module, self._leaves[0], seen.args, seen.kwargs)
                seen = replace(seen, module=loss, args=args, kwargs=kwargs)
                self._refuse_flat(seen, self._leaves)
                # What pulls u back to the parameters is linear in u: its derivative by u pushes vectors forward.
                us = [u.requires_grad_() for u in _random(self._leaves)]
                _refuse_unsound([edge.node for edge in seen.edges], self.parameters, "GGN")
                with _refusing_zeros([edge.node for edge in seen.edges]):
                    pulled = torch.autograd.grad(seen.edges, self.parameters, us, create_graph=True, allow_unused=True)
                self._pull = seen, us, pulled
            seen, us, pulled = self._pull
            pushed = _products(pulled, vectors, us)
            cotangents = self._loss(seen, self._leaves, pushed)
            found = torch.autograd.grad(seen.edges, self.parameters, cotangents, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if f is None else f.detach() for p, f in zip(self.parameters, found, strict=True)]

    def _refuse_flat(self, seen: Seen, leaves: list[Any]) -> None:
        vectors = _random(leaves)
        _roots.refuse_flat(seen.module, f"The extended {seen.name}", lambda: self._loss(seen, leaves, vectors))

    def _loss(self, seen: Seen, leaves: list[Any], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Products with the Hessian of the loss with respect to its input, computed in float32 or better."""
        inner = [
            _roots.widened(t.detach()).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in leaves
        ]
        at = [t for t in inner if isinstance(t, Tensor) and t.requires_grad]
        args, kwargs = _roots.widened((seen.args, seen.kwargs))
        with _roots.wide(seen.module, self._g.device):
            value = seen.module.forward(pytree.tree_unflatten(inner, seen.spec), *args, **kwargs)
            slopes: Sequence[Tensor | None] = [None] * len(at)
            if value.requires_grad:
                slopes = torch.autograd.grad(
                    [value], at, [self._g.to(value.dtype)], create_graph=True, allow_unused=True
                )
            wide = [_roots.from_most_likely(seen.module, t, v.to(t.dtype)) for t, v in zip(at, vectors, strict=True)]
            products = _products(slopes, wide, at)
        return [product.to(v.dtype) for product, v in zip(products, vectors, strict=True)]

    def positive(self, modify: Callable[[Tensor], Tensor]) -> list[Callable[[Tensor], Tensor]]:
        leaves, seen = self._leaves, self._seen
        if leaves is None:
            raise PackextError(_GONE.format(seen.name))
        if not seen.spec.is_leaf():
            raise PackextError(_SEVERAL.format("PCHMP", seen.name))
        self._seen = seen = seen.fixed()
        with disable():  # for its refusals: of a loss that is not convex, or whose Hessian is zero
            _roots.exact(_roots.Call(seen.module, leaves[0].detach(), seen.args, seen.kwargs, self._g))
        chain = Chain(seen.edges[0], seen.name, "PCHMP", "GGNMP or HMP")
        positive = Positive(chain, self._edge, self._g, lambda u: self._loss(seen, leaves, [u])[0], modify)
        return [functools.partial(positive.product, p) for p in self.parameters]


def _refuse_unsound(starts: Sequence[Any], parameters: Sequence[Tensor], matrix: str) -> None:
    """Refuse parameters of whose gradient torch's derivative is wrong.

    Raises:
        UnsupportedUseError: for the bias of a normalisation without a weight, and, for products with the Hessian, for
            the direction of a `torch._weight_norm`.
    """
    wanted = {torch.autograd.graph.get_gradient_edge(p).node for p in parameters}
    behind: set[Any] = set()
    for node in inputs_first(starts):
        below = [child for child, _ in node.next_functions]
        if matrix == "Hessian" and is_weight_norm(node) and below[0] in behind and not knows_weight_norm():
            raise UnsupportedUseError(_WEIGHT_NORM)
        if loses_bias(node, behind):
            raise UnsupportedUseError(_LOST_BIAS.format(name_of(node)))
        if node in wanted or any(child in behind for child in below):
            behind.add(node)


@contextmanager
def _refusing_zeros(starts: Sequence[Any]) -> Iterator[None]:
    """In here passes with a graph are refused where torch's derivative of a gradient is wrong, as an entry is zero."""
    nodes = [node for node in inputs_first(starts) if name_of(node).startswith("Logcumsumexp")]
    hooks = [node.register_prehook(_refuse_zeros) for node in nodes]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _refuse_zeros(gs: tuple[Tensor | None, ...]) -> None:
    for g in gs:
        if g is not None and bool((g == 0).any()):
            raise UnsupportedUseError(_ZEROS)


_ZEROS = (
    "An entry of what logcumsumexp gives has a gradient of zero, as where the loss does not depend on it. torch "
    "differentiates that gradient by way of its logarithm, and what it gives may be wrong then. Write it without: "
    "torch.stack([x[..., : k + 1].logsumexp(-1) for k in range(x.shape[-1])], -1). The diagonals DiagGGNExact, "
    "DiagGGNMC and DiagHessian are right as it is."
)
_LOST_BIAS = (
    "A parameter is the bias of a normalisation without a weight, or that is made of it ({}), and torch loses the "
    "derivative of the bias's gradient there. Give the function a weight of ones (torch.ones(...), which needs no "
    "gradient) beside it, or add the bias to what the function gives without one."
)
_WEIGHT_NORM = (
    "A parameter is the direction of a weight_norm, of which torch's second derivative is wrong: it takes the norm for "
    "a constant. Write the weight as v * (g / v.norm(...)) in a parametrization of your own "
    "(torch.nn.utils.parametrize.register_parametrization), leave that parameter out with px.backpack(..., "
    "parameters=[...]), or ask for quantities of the GGN, which are right."
)
_ROWS = (
    "Rows of the model's output were chosen for the extended {} (output[mask]), which has another input beside them "
    "or has them in a dictionary: call it with the chosen rows alone, or choose none and weight rows by 0 in the loss."
)
_SEVERAL = "{} needs a loss of one tensor with the samples along axis 0, and the extended {} has another input."


def _random(leaves: list[Any]) -> list[Tensor]:
    """A vector for each of the tensors that require grad, the same ones each time."""
    generator = torch.Generator().manual_seed(20251121)
    live = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    return [torch.randn(t.shape, generator=generator).to(t) for t in live]


def _products(outputs: Sequence[Tensor | None], vectors: Sequence[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o is not None and o.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if pairs:
        found = torch.autograd.grad(
            [o for o, _ in pairs], inputs, [v for _, v in pairs], retain_graph=True, allow_unused=True
        )
    return [torch.zeros_like(i) if f is None else f.detach() for i, f in zip(inputs, found, strict=True)]


_GONE = (
    "The input of the extended {} is gone, and curvature needs it. Run the forward pass inside of the context, or keep "
    "the model's output until backward() has run."
)


def measure(flight: Pass, quantities: Sequence[HessianQuantity], seen: Seen, edge: GradientEdge, g: Tensor) -> None:
    """Give `quantities` products with the Hessian of `sum(g * loss)`, the loss being computed at `edge`.

    Raises:
        PackextError: if it does not come from an extended model, if results of several losses cannot be added, or where
            parameters were converted and converted back since the forward pass.
    """
    sources: dict[int, Source] = {}
    for record in records_of(seen, edge):
        if record not in flight.records:
            flight.records.append(record)
        refuse_tensors(record, [flight.context])
        refuse_moved(record)
        refuse_divided(record, [flight.context])
        unseen(record, record.extended(), flight.context._wants)
        sources.update({id(s.tensor): s for s in record.parameters()})
    if not sources:
        raise PackextError(
            f"The input of the extended {seen.name} does not come from an extended model: call model = "
            "px.extend(model) before the forward pass."
        )
    wanted = [s for s in sources.values() if s.tensor.requires_grad and flight.context._wants(s.tensor)]
    sources = {id(s.tensor): s for s in wanted if will_accumulate(s.tensor)}
    refuse_replaced(edge.node, [s for s in wanted if id(s.tensor) not in sources])
    if not sources:
        return
    point = Graph([s.tensor for s in sources.values()], seen, edge, g, flight.context.scale)
    for quantity in quantities:
        with due_to([quantity]):
            values = quantity.measure(point, _GENERATOR)
        for source, value in zip(sources.values(), values, strict=True):
            found = flight.measured.setdefault(id(source.tensor), (source, {}))[1]
            if id(quantity) in found and not quantity.additive:
                _refuse_several(quantity)
            found[id(quantity)] = quantity.add(found[id(quantity)], value) if id(quantity) in found else value


def _refuse_several(quantity: Quantity) -> None:
    with due_to([quantity]):
        raise PackextError(f"{quantity!r} of a pass through several losses: add them up in one loss module.")


def _alone(column: Tensor) -> list[Tensor]:
    return [column]


class Joined(nn.Module):
    """A loss of several tensors, or with its samples on another axis, as one of a matrix `[N, D]`."""

    def __init__(self, loss: nn.Module, leaves: list[Any], spec: Any, layouts: list[Layout]) -> None:
        """Take the loss, the leaves of its input, how they are nested, and the layouts of those that require grad."""
        super().__init__()
        self.loss = loss
        self.leaves, self.spec = leaves, spec
        self.live = [k for k, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]
        self.n = layouts[0].n
        self.places = [
            layout.by_sample(torch.arange(leaves[k].numel(), device=leaves[k].device).view(leaves[k].shape))
            for k, layout in zip(self.live, layouts, strict=True)
        ]
        self.reduction = getattr(loss, "reduction", "mean")

    def _get_name(self) -> str:
        return self.loss._get_name()

    def output(self) -> Tensor:
        """The loss's input as `[N, D]`."""
        return torch.cat([self.leaves[k].detach().flatten()[p] for k, p in zip(self.live, self.places, strict=True)], 1)

    def split(self, column: Tensor) -> list[Tensor]:
        """`[N, D]` back to the leaves."""
        return [part.to(self.leaves[k].dtype) for k, part in zip(self.live, self._parts(column), strict=True)]

    def _parts(self, column: Tensor) -> list[Tensor]:
        parts = column.split([p.shape[1] for p in self.places], 1)
        return [
            part.flatten()[place.flatten().argsort()].view(self.leaves[k].shape)
            for k, part, place in zip(self.live, parts, self.places, strict=True)
        ]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The loss."""
        leaves = _roots.widened(self.leaves)
        for k, part in zip(self.live, self._parts(x), strict=True):
            leaves[k] = part
        return self.loss.forward(pytree.tree_unflatten(leaves, self.spec), *args, **kwargs)


def _absorb(
    members: dict[Pass, list[Curvature]],
    partners: Mapping[Pass, Callable[[Tensor], tuple[Tensor, int] | None]],
    loss: Any,
    sign: float,
    source: Source,
    form: Factored,
    columns: int = 1,
) -> None:
    statistics: Statistics | None = None
    asks: list[tuple[Pass, list[Curvature], Ask]] = []
    for flight, quantities in members.items():
        if not flight.context._wants(source.tensor):
            continue
        statistics = Statistics(form) if statistics is None else statistics.apart()
        ask = Ask(
            statistics, source.name, source.tensor, form.n // columns, 1.0, flight.context.scale, lambda: 1.0, sign,
            loss, functools.partial(partners[flight], source.tensor), columns,
        )  # fmt: skip
        statistics.prepare([w for q in quantities for w in q.wants(form)])
        asks.append((flight, quantities, ask))
    for flight, quantities, ask in asks:  # now, as they take statistics over
        _, sums = flight.sums.setdefault(id(source.tensor), (source, {}))
        for quantity in quantities:
            sums[id(quantity)] = quantity.absorb(ask, sums.get(id(quantity)))
    release()


def _apart(column: Tensor, layout: Layout) -> Iterator[Tensor]:
    """A column of independent rows, so divided that no two rows of one sample are in one cotangent."""
    if isinstance(layout, Scattered):
        turn = ranks(layout.owner, layout.n)
        several = 1 + int(turn.max())
    else:
        several = len(column) // layout.n
        index = torch.arange(len(column), device=column.device)
        turn = index // layout.n if layout.inner else index % several
    if several == 1:
        yield column
        return
    for k in range(several):
        keep = (turn == k).reshape(-1, *[1] * (column.dim() - 1))
        yield column * keep
