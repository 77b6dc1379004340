"""Where the samples are in the input of a loss: asked of the graph between it and the gates of the models before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from packext._distributed import refuse_static
from packext._errors import CoupledSamplesError, PackextError
from packext._flight import enter, probe_inputs, slopes
from packext._graph import name_of
from packext._layout import Layout, Scattered, candidates, separating
from packext._taps import Gate

if TYPE_CHECKING:
    from packext._record import Record
    from packext._scale import Seen


def place(seen: Seen, edge: GradientEdge, output: Tensor) -> Layout:
    """Where the samples are in a tensor of the loss's input.

    Args:
        seen: the loss.
        edge: where gradients enter the graph of the tensor.
        output: the tensor, or one like it: its entries are not read.

    Returns:
        Where they are; `Scattered` where rows of several models' outputs, or of one, were chosen in between.

    Raises:
        CoupledSamplesError: if they influence each other in between, or nothing tells where they are.
        PackextError: if the tensor does not come from an extended model, or from batches of several sizes.
    """
    inside = seen.record()
    if inside is not None:
        return _found(seen, edge, output, inside)
    gates = gates_of(edge)
    if not gates:
        raise PackextError(
            f"The input {list(output.shape)} of the extended {seen.name} does not come from an extended model: "
            "call model = px.extend(model) before the forward pass."
        )
    records = [gate.record for gate in gates]
    for record in records:
        record.settle(record.awaited_gates())
    n, axis = records[0].n, records[0].batch_axis
    if n == 0:
        raise PackextError(records[0].without_samples())
    if any(record.n != n for record in records):
        raise PackextError(f"The extended {seen.name} joins forwards of different batches: run one loss for each.")
    places: list[Layout] = []
    for gate, record in zip(gates, records, strict=True):
        enter(record)  # the probe tells where the samples are in the model's outputs
        index = next(i for i, (node, *_) in enumerate(record.gates) if node() is gate)
        places.append(record.places.get(index, Layout(axis if n > 1 else None, n)))
    if len(gates) == 1 and edge.node is gates[0]:
        return places[0]
    edges = [GradientEdge(gate, 0) for gate in gates]
    moved = _moved(edge.node, gates[0]) if type(places[0]) is Layout else None
    key = (places[0], n, axis, output.shape, moved)
    if moved is not None and key in _MOVED:
        return _MOVED[key]

    def agree(cotangent: Tensor, members: Tensor) -> bool:
        grads = probe_inputs(edge, edges, cotangent)
        return all(
            grad is None or place.agrees(grad, members.to(grad.device))
            for place, grad in zip(places, grads, strict=True)
        )

    found = _search(output, n, axis, agree) or _chosen(edge, edges, places, output, n)
    if found is None:
        raise CoupledSamplesError(_LOST.format(seen.name, list(output.shape), n, axis))
    if moved is not None:
        if len(_MOVED) > 99:
            _MOVED.clear()
        _MOVED[key] = found
    return found


_LOST = (
    "Between the extended model and the extended {} samples influence each other, or their axis cannot be told: the "
    "loss's input is {}, the batch has {} samples along axis {}. If rows are chosen or brought into another order "
    "within the model, have it return all of them, and choose (output[mask]) between model and loss; or keep all rows "
    "and have the loss ignore some (ignore_index, or a loss module of your own that weights rows by 0)."
)

#: Functions that give entries other places, which follow from the shapes and from what autograd's node keeps.
_MOVES = {
    "TransposeBackward0": ("_saved_dim0", "_saved_dim1"),
    "PermuteBackward0": ("_saved_dims",),
    "ViewBackward0": ("_saved_self_sym_sizes",),
    "UnsafeViewBackward0": ("_saved_self_sym_sizes",),
    "UnsqueezeBackward0": ("_saved_dim",),
    "SqueezeBackward0": ("_saved_self_sym_sizes",),
    "SqueezeBackward1": ("_saved_self_sym_sizes", "_saved_dim"),
    "SelectBackward0": ("_saved_self_sym_sizes", "_saved_dim", "_saved_index"),
    "SliceBackward0": ("_saved_self_sym_sizes", "_saved_dim", "_saved_start", "_saved_end", "_saved_step"),
    "TBackward0": (),
    "CloneBackward0": (),
    "ToCopyBackward0": (),
}
#: Where the samples are behind such functions, by all that it depends on.
_MOVED: dict[Any, Layout] = {}


def _moved(node: Any, gate: Any) -> tuple[Any, ...] | None:
    """What tells the places of entries at `node` from those at the gate; None if more than that is behind them."""
    way = []
    while node is not gate:
        name = name_of(node)
        if name not in _MOVES or len(node.next_functions) != 1 or node.next_functions[0][1] != 0:
            return None
        way.append((name, *(getattr(node, what) for what in _MOVES[name])))
        node = node.next_functions[0][0]
    return tuple(way)


def _found(seen: Seen, edge: GradientEdge, output: Tensor, record: Record) -> Layout:
    """Where the samples are in the input of a loss that the model computed itself."""
    enter(record)  # the probe starts at what such losses have read: a search here would be other passes on other ranks
    found = read_at(record, edge, output.shape) if record.n > 1 else Layout(None, 1)
    if found is None:
        raise CoupledSamplesError(_LOST.format(seen.name, list(output.shape), record.n, record.batch_axis))
    return found


def read_at(record: Record, edge: GradientEdge, shape: torch.Size) -> Layout | None:
    """Where the probe has found the samples in the input, at `edge`, of a loss inside of the model; None if nowhere."""
    inputs = [e for loss in record.losses for e in loss.edges]
    found = record.places.get(-1 - next(k for k, e in enumerate(inputs) if e is edge))
    return found if found is not None and found.axis is not None and shape[found.axis] % found.n == 0 else None


def _search(output: Tensor, n: int, axis: int, agree: Callable[[Tensor, Tensor], bool]) -> Layout | None:
    """The layout of `output` with which cotangents of some samples, sent down from there, meet no others; if any."""
    generator = torch.Generator().manual_seed(20250101)
    for layout in candidates(output.shape, n, axis):
        for members in separating(n):
            values = torch.rand(output.shape, generator=generator).to(output) + 0.5
            if not agree(torch.where(layout.spread(members.to(output.device), values), values, 0.0), members):
                break
        else:
            return layout
    return None


def _chosen(
    edge: GradientEdge, edges: list[GradientEdge], places: list[Layout], output: Tensor, n: int
) -> Scattered | None:
    """Whose the rows of `output` are where they were chosen between model and loss (`output[mask]`).

    Changes of some samples' outputs, at the gates' `edges`, reach rows of no others: products with the Jacobian of what
    is in between, as the derivative of products with its transpose.

    Returns:
        Their layout; None if a row is of several samples, or what is in between cannot be differentiated twice.
    """
    if not output.dim():
        return None
    generator = torch.Generator().manual_seed(20250101)
    # Not at zero, where products with the transpose of some functions have no derivative (logcumsumexp).
    cotangent = torch.rand(output.shape, generator=generator).to(output).requires_grad_()
    found = Scattered(0, n)
    try:
        pulled = slopes(edge, edges, cotangent)
        pairs = [(g, place) for g, place in zip(pulled, places, strict=True) if g is not None and g.requires_grad]
        values = [torch.rand(g.shape, generator=generator).to(g) + 0.5 for g, _ in pairs]
        for members in separating(n) if pairs else ():
            tangents = [
                torch.where(place.spread(members.to(v.device), v), v, 0.0)
                for v, (_, place) in zip(values, pairs, strict=True)
            ]
            (rows,) = torch.autograd.grad([g for g, _ in pairs], cotangent, tangents, retain_graph=True)
            if not found.agrees(rows, members.to(rows.device)):
                return None
    except RuntimeError:  # what cannot be differentiated twice
        return None
    return found if found.possible else None


def records_of(seen: Seen, edge: GradientEdge) -> list[Record]:
    """Forward passes behind the loss at `edge`: of all its arguments, of what these have read, and the one it is in."""
    inside = seen.record()
    before = [gate.record for gate in gates_of(edge, all=True)]
    return list(dict.fromkeys(before if inside is None else [*before, inside]))


def gates_of(edge: GradientEdge, all: bool = False) -> list[Any]:
    """The gates of extended models through which what is at `edge` was computed; `all` of them, or the last ones."""
    found: dict[int, Any] = {}
    known: set[Any] = set()
    todo: list[Any] = [edge.node]
    while todo:
        node = todo.pop()
        if node is None or node in known:
            continue
        known.add(node)
        ddp = getattr(node, "ddp_weakref", lambda: None)()
        if ddp is not None:
            refuse_static(ddp)
        if isinstance(node, Gate._backward_cls):  # pyright: ignore[reportAttributeAccessIssue]
            found[id(node)] = node
            todo += node.record.behind if all else ()
        else:
            todo += [function for function, _ in node.next_functions]
    return list(found.values())
