"""Slow oracles, and a check of a user's own model against them in one call.

The reference is the definition: one sample at a time, plain autograd, float64. It knows nothing of taps,
rules or factors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from packext._backpack import backpack
from packext._errors import PackextError
from packext._extend import extend, unextend
from packext._lineage import disable
from packext._quantity import Quantity
from packext.quantities import (
    BatchDiagGGNExact,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    DiagGGNExact,
    GradDot,
    GradHistogram,
    Histogram,
    ProjectedGrad,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)

Rows = dict[str, Tensor]


def select(value: Any, sample: int, n: int, batch_axis: int = 0) -> Any:
    """The part of a nested structure that belongs to one sample: tensors with N entries along the axis are cut."""
    if isinstance(value, Tensor):
        has_batch = value.dim() > batch_axis and value.shape[batch_axis] == n
        return value.narrow(batch_axis, sample, 1) if has_batch else value
    if isinstance(value, Mapping):
        return {k: select(v, sample, n, batch_axis) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(select(v, sample, n, batch_axis) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(select(v, sample, n, batch_axis) for v in value)
    return value


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call with one tensor, a tuple of arguments, or a dictionary of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def batch_size(inputs: Any, batch_axis: int = 0) -> int:
    """Entries along the batch axis of the first tensor."""
    leaves = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() > batch_axis:
            return leaf.shape[batch_axis]
        if isinstance(leaf, (Mapping, tuple, list)) and leaf:
            return batch_size(tuple(leaf.values()) if isinstance(leaf, Mapping) else tuple(leaf), batch_axis)
    raise ValueError(f"no input has an axis {batch_axis}")


def individual_gradients(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    batch_axis: int = 0,
    weights: Sequence[float] | None = None,
) -> Rows:
    """Individual gradients by a loop over samples: the slow oracle.

    Args:
        model: extended or not; left as it is.
        loss_fn: `loss_fn(model(inputs), targets)`.
        inputs: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
        targets: any nested structure of tensors with N entries along axis 0 (or `batch_axis`).
        batch_axis: the axis of the samples in inputs and outputs.
        weights: factor of each sample's loss in the loss of the batch; 1 for each by default.

    Returns:
        `[N, *p]` for every parameter that requires grad, by name; zeros where the loss does not reach it.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    with disable(), torch.enable_grad():
        for output, target, weight in _singles(model, inputs, targets, batch_axis, weights):
            loss = loss_fn(output, target) * weight
            grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for (name, p), grad in zip(named.items(), grads, strict=True):
                rows[name].append(torch.zeros_like(p) if grad is None else grad.detach())
    return {name: torch.stack(each) for name, each in rows.items()}


def _singles(
    model: nn.Module, inputs: Any, targets: Any, batch_axis: int, weights: Sequence[float] | None
) -> Iterator[tuple[Any, Any, float]]:
    """Output, target and weight of one sample after another, each run by itself."""
    n = batch_size(inputs, batch_axis)
    target_axis = batch_axis if _has_axis(targets, batch_axis, n) else 0
    for sample in range(n):
        output = call(model, select(inputs, sample, n, batch_axis))
        yield output, select(targets, sample, n, target_axis), 1.0 if weights is None else weights[sample]


def curvature_rows(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    batch_axis: int = 0,
    weights: Sequence[float] | None = None,
) -> Rows:
    """Rows of the GGN's root by a loop over samples and columns: the slow oracle of curvature.

    Args:
        model: extended or not; left as it is.
        loss_fn: `loss_fn(model(inputs), targets)`.
        inputs: as for `individual_gradients`.
        targets: as for `individual_gradients`.
        batch_axis: the axis of the samples in inputs and outputs.
        weights: factor of each sample's loss in the loss of the batch; 1 for each by default.

    Returns:
        `[V, N, *p]` for every parameter that requires grad, by name: column v of a root of the Hessian of sample n's
        loss, taken back through the model by autograd. The sum over v and n of their outer products is the GGN.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    with disable(), torch.enable_grad():
        for outputs, target, weight in _singles(model, inputs, targets, batch_axis, weights):
            leaves, spec = pytree.tree_flatten(outputs)
            live = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
            flat = torch.cat([t.detach().flatten() for t in live]).requires_grad_()
            parts = iter(flat.split([t.numel() for t in live]))
            again = [next(parts).view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in leaves]
            loss = loss_fn(pytree.tree_unflatten(again, spec), target)
            slope = torch.autograd.grad(loss, flat, create_graph=True)[0]
            hessian = torch.stack([torch.autograd.grad(d, flat, retain_graph=True)[0] for d in slope])
            output = torch.cat([t.flatten() for t in live])
            values, vectors = torch.linalg.eigh(hessian * weight)
            columns = (vectors * values.clamp(min=0).sqrt()).T
            wanted = list(named.values())
            found = [torch.autograd.grad(output, wanted, c, retain_graph=True, allow_unused=True) for c in columns]
            for k, (name, p) in enumerate(named.items()):
                rows[name].append(torch.stack([torch.zeros_like(p) if g[k] is None else g[k].detach() for g in found]))
    return {name: torch.stack(each, 1) for name, each in rows.items()}


def hessian_diagonals(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    batch_axis: int = 0,
    weights: Sequence[float] | None = None,
) -> Rows:
    """Each sample's share of the Hessian's diagonal by a loop over samples: the slow oracle.

    Args:
        model: extended or not; left as it is.
        loss_fn: `loss_fn(model(inputs), targets)`.
        inputs: as for `individual_gradients`.
        targets: as for `individual_gradients`.
        batch_axis: the axis of the samples in inputs and outputs.
        weights: factor of each sample's loss in the loss of the batch; 1 for each by default.

    Returns:
        `[N, *p]` for every parameter that requires grad, by name: the diagonal of the dense Hessian of the sample's
        loss in that parameter, by differentiating its gradient. They sum to the diagonal for the loss of the batch.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    with disable(), torch.enable_grad():
        for output, target, weight in _singles(model, inputs, targets, batch_axis, weights):
            loss = loss_fn(output, target) * weight
            slopes = torch.autograd.grad(loss, list(named.values()), create_graph=True, materialize_grads=True)
            for (name, p), slope in zip(named.items(), slopes, strict=True):
                hessian = _jacobian(slope, p) if slope.requires_grad else torch.zeros(p.numel(), *p.shape).to(p)
                rows[name].append(hessian.reshape(p.numel(), -1).diagonal().view(p.shape))
    return {name: torch.stack(each) for name, each in rows.items()}


def _jacobian(slope: Tensor, p: Tensor) -> Tensor:
    """Derivatives `[p.numel(), *p]` of the entries of `slope`."""
    units = torch.eye(slope.numel(), dtype=p.dtype, device=p.device).view(-1, *slope.shape)
    found = torch.zeros_like(units)
    try:
        each = torch.autograd.grad(slope, p, units, retain_graph=True, is_grads_batched=True, allow_unused=True)[0]
        return found if each is None else each
    except RuntimeError:  # not every backward can be computed for several cotangents at once
        for k, unit in enumerate(units):
            found[k] = torch.autograd.grad(slope, p, unit, retain_graph=True)[0]
    return found


def _has_axis(value: Any, axis: int, n: int) -> bool:
    if isinstance(value, Tensor):
        return value.dim() > axis and value.shape[axis] == n
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(_has_axis(item, axis, n) for item in items)


def _flat(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), -1)


def _histogram(rows: Tensor, q: GradHistogram, p: Tensor) -> Histogram:
    def bins(values: Tensor, count: int, low: float, high: float) -> Tensor:
        return ((values - low) / (high - low) * count).floor().clamp(0, count - 1).long()

    index = bins(rows, q.bins, *q.range)
    grad_edges = torch.linspace(*q.range, q.bins + 1)
    if q.dim == 1:
        return Histogram(torch.bincount(index.flatten(), minlength=q.bins), grad_edges)
    index = index + bins(p, q.param_bins, *q.param_range) * q.bins
    counts = torch.bincount(index.flatten(), minlength=q.bins * q.param_bins)
    return Histogram(
        counts.reshape(q.param_bins, q.bins),
        grad_edges,
        torch.linspace(*q.param_range, q.param_bins + 1),
    )


def _projected(rows: Tensor, q: ProjectedGrad, name: str) -> Tensor:
    left, right = (None if m is None else m.to(rows.dtype) for m in q.matrices(name, rows.shape[1:]))
    assert left is not None
    if right is None:
        return _flat(rows) @ left.T
    return torch.einsum("rp,npk,qk->nrq", left, rows.reshape(len(rows), rows.shape[1], -1), right)


def _clipped(all_rows: Rows, name: str, q: ClippedGrad, factor: float) -> Tensor:
    layer = name.rpartition(".")[0]
    group = [r for k, r in all_rows.items() if not q.per_layer or k.rpartition(".")[0] == layer]
    norms = torch.cat([_flat(r) for r in group], 1).mul(factor).norm(dim=1)
    weight = (q.max_norm / norms).clamp(max=1.0) * factor
    return torch.tensordot(weight, all_rows[name], 1)


#: The definition of each quantity:
#: (quantity, rows of all parameters, name, parameter, factor to the samples' own losses).
ORACLES: dict[type[Quantity], Callable[[Any, Rows, str, Tensor, float], Any]] = {
    BatchGrad: lambda q, r, k, p, f: r[k] if q.subsampling is None else r[k][q.subsampling],
    BatchL2Grad: lambda q, r, k, p, f: _flat(r[k]).square().sum(1),
    BatchDotGrad: lambda q, r, k, p, f: _flat(r[k]) @ _flat(r[k]).T,
    GradDot: lambda q, r, k, p, f: (
        _flat(r[k]) @ (r[k].sum(0) if q.direction is None else q.direction[k]).flatten().to(r[k])
    ),
    SumGradSquared: lambda q, r, k, p, f: r[k].square().sum(0),
    Variance: lambda q, r, k, p, f: (r[k] - r[k].mean(0)).square().mean(0),
    GradHistogram: lambda q, r, k, p, f: _histogram(r[k], q, p),
    ProjectedGrad: lambda q, r, k, p, f: _projected(r[k], q, k),
    ClippedGrad: lambda q, r, k, p, f: _clipped(r, k, q, f),
}


#: The definition of each quantity of the GGN, from `curvature_rows` of a parameter. Roots are compared by their
#: product with themselves.
GGN_ORACLES: dict[type[Quantity], Callable[[Tensor], Tensor]] = {
    DiagGGNExact: lambda r: r.square().sum((0, 1)),
    BatchDiagGGNExact: lambda r: r.square().sum(0),
    SqrtGGNExact: lambda r: torch.einsum("vnp,vnq->npq", *[r.reshape(*r.shape[:2], -1)] * 2),
}


def all_quantities() -> tuple[Quantity, ...]:
    """One of each, with arguments that suit small models."""
    return (
        BatchGrad(), BatchL2Grad(), BatchDotGrad(), GradDot(), SumGradSquared(), Variance(),
        GradHistogram(range=(-0.1, 0.11)), ProjectedGrad((2, 3), seed=5), ClippedGrad(0.5),
    )  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One parameter and quantity: the largest error, relative to the largest value."""

    parameter: str
    quantity: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance (NaN is not)."""
        return self.error <= self.tolerance


class Report(list[Entry]):
    """All entries of a check; prints as a table."""

    @property
    def ok(self) -> bool:
        """Whether there are entries, and all are right."""
        return bool(self) and all(entry.ok for entry in self)

    def __str__(self) -> str:
        """One line for each entry."""
        width = max((len(e.parameter) for e in self), default=9)
        lines = [f"{'parameter':<{width}}  {'quantity':<18} {'error':>9}"]
        lines += [f"{e.parameter:<{width}}  {e.quantity:<18} {e.error:9.1e}{'' if e.ok else '  WRONG'}" for e in self]
        return "\n".join(lines)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value; infinite where shapes differ or a value is not finite."""
    if got.shape != want.shape:
        return math.inf
    if not want.numel():
        return 0.0
    got, want = got.detach().to(want.dtype), want.detach()
    size = float(want.abs().max())
    error = float((got - want).abs().max())
    if not math.isfinite(error):
        return math.inf
    return error / size if size > 1e-12 else error


def compare(
    model: nn.Module,
    quantities: Sequence[Quantity],
    rows: Rows,
    factor: float,
    tolerance: float,
    missing_is_zero: bool = True,
) -> Report:
    """Compare the results attached to the parameters with their definitions.

    Args:
        model: after a backward pass inside `backpack(*quantities)`.
        quantities: those of the context.
        rows: from `individual_gradients`, in the scale of the context.
        factor: from rows to the gradients of the samples' own losses (N for a mean in scale "loss").
        tolerance: of relative errors.
        missing_is_zero: whether a parameter without a result is right if its rows are zero.

    Returns:
        One entry for each parameter that requires grad and quantity.
    """
    report = Report()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        for quantity in quantities:
            label = type(quantity).__name__
            if not hasattr(p, quantity.savefield):
                unreached = missing_is_zero and not rows[name].any()
                report.append(Entry(name, label, 0.0 if unreached else math.inf, tolerance))
                continue
            got, want = (
                getattr(p, quantity.savefield),
                ORACLES[type(quantity)](quantity, rows, name, p.detach(), factor),
            )
            if isinstance(want, Histogram):
                # A value on the edge of a bin may fall on either side.
                moved = (got.counts - want.counts).abs().sum().item() / max(1, want.counts.sum().item())
                report.append(Entry(name, label, moved, max(tolerance, 0.02)))
            else:
                report.append(Entry(name, label, relative_error(got, want), tolerance))
    return report


def check(
    model: nn.Module,
    loss_fn: nn.Module,
    inputs: Any,
    targets: Any,
    quantities: Sequence[Quantity] | None = None,
    batch_axis: int = 0,
    tolerance: float = 1e-8,
) -> Report:
    """Check packext on your own model: every quantity of every parameter against the slow oracle, in float64.

    Args:
        model: copied, so that it, its gradients and hooks stay as they are.
        loss_fn: a loss module with reduction "mean" or "sum" over samples of equal weight.
        inputs: a tensor, a tuple of arguments, or a dictionary of keyword arguments; a few samples suffice.
        targets: what the loss takes beside the output.
        quantities: to check; one of each by default.
        batch_axis: as for `extend`.
        tolerance: of the largest error relative to the largest value. Where the model computes in less than float64
            whatever its dtype, as some normalisations do, the plain gradient of the batch differs from the sum over
            the samples as well: the tolerance is then 30 times the largest such difference, and at most 1e-4.

    Returns:
        One entry per parameter and quantity; `print` it, ask `.ok`.

    Raises:
        PackextError: if the model is random (the loop over samples would draw other numbers), or refused.
        ValueError: for a quantity that has no oracle.
    """
    for quantity in quantities or ():
        if type(quantity) not in ORACLES:
            raise ValueError(
                f"check has no slow oracle for {quantity!r}, but for {', '.join(sorted(q.__name__ for q in ORACLES))}. "
                "Compare curvature with `testing.curvature_rows`."
            )
    model = unextend(copy.deepcopy(model)).double()
    loss_fn = unextend(copy.deepcopy(loss_fn)).double()
    inputs, targets = _double(inputs), _double(targets)
    n = batch_size(inputs, batch_axis)
    with torch.no_grad(), torch.random.fork_rng():
        before = torch.get_rng_state()
        call(copy.deepcopy(model), inputs)
        if not torch.equal(before, torch.get_rng_state()):
            raise PackextError("check: the model draws random numbers (dropout?). Call model.eval() first.")
    mean = getattr(loss_fn, "reduction", "mean") == "mean"
    rows = individual_gradients(model, loss_fn, inputs, targets, batch_axis, [1 / n] * n if mean else None)
    quantities = all_quantities() if quantities is None else tuple(quantities)
    model.zero_grad(set_to_none=True)
    loss_fn(call(model, inputs), targets).backward()
    plain = [relative_error(p.grad, rows[k].sum(0)) for k, p in model.named_parameters() if p.grad is not None]
    tolerance = max(tolerance, min(1e-4, 30 * max(plain, default=0.0)))
    extend(model, batch_axis)
    extend(loss_fn)
    model.zero_grad(set_to_none=True)
    with backpack(*quantities):
        loss_fn(call(model, inputs), targets).backward()
    report = compare(model, quantities, rows, float(n) if mean else 1.0, tolerance)
    for name, p in model.named_parameters():
        if p.requires_grad and p.grad is not None:
            report.append(Entry(name, ".grad", relative_error(p.grad, rows[name].sum(0)), tolerance))
    return report


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: _double(v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_double, value))
    return type(value)(map(_double, value)) if isinstance(value, (list, tuple)) else value
