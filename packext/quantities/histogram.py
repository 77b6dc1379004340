"""Histograms of individual gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packext._quantity import Ask, Quantity, sum_of
from packext._statistics import Visitor
from packext._union import Here, Part


class Histogram(NamedTuple):
    """Counts, `[bins]` or `[parameter bins, gradient bins]`, and the edges of each axis."""

    counts: Tensor
    grad_edges: Tensor
    param_edges: Tensor | None = None


class GradHistogram(Quantity):
    """Histogram of all N x P entries of individual gradients, in `grad_histogram`.

    In one dimension over the gradient's value, in two also over the parameter's value. Entries outside of
    a range are counted in its outermost bins; NaN is counted nowhere.
    """

    savefield = "grad_histogram"
    indivisible = ""

    def __init__(
        self,
        dim: int = 1,
        bins: int = 100,
        range: tuple[float, float] = (-2.0, 2.0),  # noqa: A002 - numpy's name
        param_bins: int = 40,
        param_range: tuple[float, float] = (-1.0, 1.0),
    ) -> None:
        """Choose the bins.

        Args:
            dim: 1, or 2 for gradient against parameter.
            bins: of the gradient.
            range: of the gradient, in the context's scale.
            param_bins: of the parameter, if dim is 2.
            param_range: of the parameter, if dim is 2.

        Raises:
            ValueError: for another dim, no bins, or an empty range.
        """
        if dim not in (1, 2):
            raise ValueError(f"dim must be 1 or 2, got {dim}.")
        for count, ends in ((bins, range), (param_bins, param_range)):
            pair = isinstance(ends, Sequence) and len(ends) == 2 and all(isinstance(e, Real) for e in ends)
            if not (isinstance(count, Integral) and count >= 1 and pair and -math.inf < ends[0] < ends[1] < math.inf):
                raise ValueError(
                    f"a histogram needs a whole number of bins >= 1 and low < high, finite; got {count!r} on {ends!r}."
                )
        self.dim, self.bins, self.range = dim, bins, range
        self.param_bins, self.param_range = param_bins, param_range

    def visitor(self, ask: Ask) -> Visitor:
        device, (low, high) = ask.parameter.device, self.range
        size = self.bins if self.dim == 1 else self.param_bins * self.bins
        counts = torch.zeros(size, dtype=torch.int64, device=device)
        ask.notes[self] = counts
        offset = unknown = None
        if self.dim == 2:
            values = ask.parameter.detach().to(ask.statistics.form.acc)
            offset, unknown = _bin(values, self.param_bins, *self.param_range) * self.bins, values.isnan()

        def visit(rows: Tensor) -> None:
            rows = rows.detach() * ask.factor
            index, lost = _bin(rows, self.bins, low, high), rows.isnan()
            if offset is not None and unknown is not None:
                index, lost = index + offset, lost | unknown
            index = index[~lost]
            counts.add_(torch.bincount(index.flatten(), minlength=size))

        return visit

    def result(self, ask: Ask) -> Histogram:
        counts = ask.notes.pop(self)
        grad_edges = torch.linspace(*self.range, self.bins + 1, device=counts.device)
        if self.dim == 1:
            return Histogram(counts, grad_edges)
        param_edges = torch.linspace(*self.param_range, self.param_bins + 1, device=counts.device)
        return Histogram(counts.reshape(self.param_bins, self.bins), grad_edges, param_edges)

    def unite(self, parts: Sequence[Part], over: Here) -> Part:
        counts = over.sum(sum_of([p.value.counts for p in parts]))
        return Part(parts[0].value._replace(counts=counts), over.count(sum(p.n for p in parts)))

    def whole(self, values: dict[str, Any]) -> Histogram:
        histograms = list(values.values())
        return histograms[0]._replace(counts=sum((h.counts for h in histograms[1:]), histograms[0].counts))


def _bin(values: Tensor, bins: int, low: float, high: float) -> Tensor:
    position = (values - low) * (bins / (high - low))
    return position.nan_to_num(0.0).floor().clamp(0, bins - 1).long()
