"""The definition of each quantity of individual gradients, from their rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from packext._quantity import Quantity
from packext.quantities import (
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    ClippedGrad,
    GradDot,
    GradHistogram,
    Histogram,
    ProjectedGrad,
    SumGradSquared,
    Variance,
)
from packext.testing._report import Entry, Report, relative_error
from packext.testing._samples import Rows


def _flat(rows: Tensor) -> Tensor:
    return rows.reshape(len(rows), -1)


def _position(values: Tensor, count: int, low: float, high: float) -> Tensor:
    """Where values stand among bins of width 1."""
    return (values - low) / (high - low) * count


def _histogram(rows: Tensor, q: GradHistogram, p: Tensor) -> Histogram:
    def bins(values: Tensor, count: int, low: float, high: float) -> Tensor:
        return _position(values, count, low, high).nan_to_num(0.0).floor().clamp(0, count - 1).long()

    index, counted = bins(rows, q.bins, *q.range), ~rows.isnan()
    grad_edges = torch.linspace(*q.range, q.bins + 1)
    if q.dim == 1:
        return Histogram(torch.bincount(index[counted], minlength=q.bins), grad_edges)
    index = index + bins(p, q.param_bins, *q.param_range) * q.bins
    counts = torch.bincount(index[counted & ~p.isnan()], minlength=q.bins * q.param_bins)
    return Histogram(
        counts.reshape(q.param_bins, q.bins),
        grad_edges,
        torch.linspace(*q.param_range, q.param_bins + 1),
    )


def _histogram_error(
    got: Histogram, want: Histogram, q: GradHistogram, rows: Tensor, p: Tensor, tolerance: float
) -> float:
    """The share of entries in another bin; those as close to an edge as the tolerance may fall on either side."""
    edges = [(got.grad_edges, want.grad_edges), (got.param_edges, want.param_edges)]
    for one, other in edges if q.dim == 2 else edges[:1]:
        if one is None or other is None or relative_error(one, other) > 1e-6:
            return math.inf
    counts = got.counts.to(want.counts)
    if counts.shape != want.counts.shape or counts.sum() != want.counts.sum():
        return math.inf

    def unsure(values: Tensor, count: int, low: float, high: float) -> Tensor:
        at = _position(values, count, low, high)
        finite = values[values.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        off = tolerance * (largest + max(abs(low), abs(high))) * count / (high - low)
        return (at - at.round().clamp(1, count - 1)).abs() <= off

    loose = unsure(rows, q.bins, *q.range)
    if q.dim == 2:
        loose = loose | unsure(p, q.param_bins, *q.param_range)
    moved = (counts - want.counts).abs().sum() - 2 * loose.sum()
    return max(0.0, float(moved) / max(1, rows.numel()))


def _projected(rows: Tensor, q: ProjectedGrad, name: str) -> Tensor:
    left, right = (None if m is None else m.to(rows) for m in q.matrices(name, rows.shape[1:]))
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


def all_quantities() -> tuple[Quantity, ...]:
    """One of each, with arguments that suit small models."""
    return (
        BatchGrad(), BatchL2Grad(), BatchDotGrad(), GradDot(), SumGradSquared(), Variance(),
        GradHistogram(range=(-0.1, 0.11)), ProjectedGrad((2, 3), seed=5), ClippedGrad(0.5),
    )  # fmt: skip


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
        One entry for each parameter that has rows and quantity.
    """
    report = Report()
    for name, p in model.named_parameters():
        if name not in rows:
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
            if isinstance(quantity, GradHistogram):
                error = _histogram_error(got, want, quantity, rows[name], p.detach(), tolerance)
                report.append(Entry(name, label, error, tolerance))
            else:
                report.append(Entry(name, label, relative_error(got, want), tolerance))
    return report
