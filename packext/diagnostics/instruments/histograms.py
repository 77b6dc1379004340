"""Histograms of the entries of individual gradients, alone and against the parameters' values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.diagnostics._instrument import Instrument
from packext.diagnostics._step import Absent, Step, SubsetGrad


class _Sampled(Instrument):
    """Looks at the individual gradients of a few samples, drawn anew in each step by a generator of its own."""

    samples: int | None

    def enter(self, step: int, model: nn.Module) -> None:
        self._seed = step

    @property
    def needs(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (SubsetGrad(self._seed, self.samples),) if self.samples is not None else (self.exact(),)

    def exact(self) -> px.GradHistogram:
        """The quantity for all entries of all samples."""
        raise NotImplementedError


def _range(given: float | None, values: list[Tensor], what: str) -> float:
    largest = max(float(v.abs().max()) for v in values)
    if not largest < float("inf"):
        raise Absent(f"not finite: a {what} is NaN or infinite")
    return given or largest or 1.0


def _bins(values: Tensor, bins: int, limit: float) -> Tensor:
    return ((values + limit) * (bins / (2 * limit))).long().clamp_(0, bins - 1)


def _check(bins: int, limit: float | None, samples: int | None) -> None:
    if bins < 1 or (limit is not None and not limit > 0) or (samples is not None and samples < 1):
        raise ValueError(f"needed bins >= 1, a positive limit and samples >= 1, got {bins}, {limit} and {samples}.")
    if samples is None and limit is None:
        raise ValueError("a histogram of all samples needs its limits beforehand: pass limit=<number>.")


class GradHist1d(_Sampled):
    """Distribution of the entries of individual gradients over equal bins from -limit to limit.

    "GradHist1d" has the share of all entries in each bin (`[bins]`), "GradHist1d/<parameter>" the same for one
    parameter, "GradHist1d.limit" the limit; entries beyond are in the outermost bins. By default the entries are those
    of a few random samples; "GradHist1d.standard_error" `[bins]` says how far the whole batch may be from them, from
    how much the samples differ. In units of the gradient of a sample's own loss.
    """

    def __init__(self, bins: int = 100, limit: float | None = None, samples: int | None = 4) -> None:
        """Choose the bins.

        Args:
            bins: their number.
            limit: the largest magnitude; by default the largest that is found, in each step anew.
            samples: how many to look at; None for all, which takes much longer.
        """
        _check(bins, limit, samples)
        self.bins, self.limit, self.samples = bins, limit, samples

    def exact(self) -> px.GradHistogram:
        assert self.limit is not None
        return px.GradHistogram(bins=self.bins, range=(-self.limit, self.limit))

    def measure(self, step: Step) -> dict[str, Any]:
        if self.samples is None:
            found = step.layers("grad_histogram")
            counts = {name: h.counts.double() for name, h in found.items()}
            whole = sum(counts.values())
            shares = {name: c / c.sum() for name, c in counts.items()}
            return {"": whole / whole.sum(), ".limit": self.limit, **shares}  # type: ignore[union-attr]
        rows = step.layers("subset_grad")
        m, n = len(next(iter(rows.values()))), step.n
        limit = _range(self.limit, list(rows.values()), "gradient")
        offset = torch.arange(m, device=next(iter(rows.values())).device)[:, None] * self.bins
        each = {  # [m, bins] of each parameter
            name: torch.bincount(
                (_bins(r.reshape(m, -1), self.bins, limit) + offset).flatten(), minlength=m * self.bins
            )
            .view(m, self.bins)
            .double()
            for name, r in rows.items()
        }
        total = torch.stack(list(each.values())).sum(0)
        shares = total / total.sum(1, keepdim=True)
        error = Absent("one sample was drawn") if m < 2 else (shares.var(0) * max(0.0, 1 - m / n) / m).sqrt()
        layers = {name: c.sum(0) / c.sum() for name, c in each.items()}
        return {"": shares.mean(0), ".standard_error": error, ".limit": limit, **layers}


class GradHist2d(_Sampled):
    """Distribution of the entries of individual gradients against the values of their parameters.

    "GradHist2d" has the share of all entries in each bin (`[param_bins, bins]`), "GradHist2d/<parameter>" the same for
    one parameter; bins are equal, from -limit to limit and from -param_limit to param_limit, recorded as such. The
    entries are those of a few random samples by default.
    """

    def __init__(
        self,
        bins: int = 50,
        param_bins: int = 40,
        limit: float | None = None,
        param_limit: float | None = None,
        samples: int | None = 4,
    ) -> None:
        """Choose the bins.

        Args:
            bins: of the gradient.
            param_bins: of the parameter.
            limit: the largest magnitude of a gradient; by default the largest that is found, in each step anew.
            param_limit: the same for the parameters.
            samples: how many to look at; None for all, which takes much longer.
        """
        _check(bins, limit, samples)
        _check(param_bins, param_limit, samples)
        self.bins, self.param_bins, self.limit, self.param_limit = bins, param_bins, limit, param_limit
        self.samples = samples

    def exact(self) -> px.GradHistogram:
        assert self.limit is not None and self.param_limit is not None
        ranges = {"range": (-self.limit, self.limit), "param_range": (-self.param_limit, self.param_limit)}
        return px.GradHistogram(2, self.bins, param_bins=self.param_bins, **ranges)

    def measure(self, step: Step) -> dict[str, Any]:
        if self.samples is None:
            limits = {".limit": self.limit, ".param_limit": self.param_limit}
            counts = {name: h.counts.double() for name, h in step.layers("grad_histogram").items()}
        else:
            rows, start = step.layers("subset_grad"), step.start
            limit = _range(self.limit, list(rows.values()), "gradient")
            param_limit = _range(self.param_limit, [start[name] for name in rows], "parameter")
            limits = {".limit": limit, ".param_limit": param_limit}
            size = self.param_bins * self.bins
            counts = {}
            for name, r in rows.items():
                index = _bins(start[name], self.param_bins, param_limit) * self.bins + _bins(r, self.bins, limit)
                counted = torch.bincount(index.flatten(), minlength=size)
                counts[name] = counted.view(self.param_bins, self.bins).double()
        whole = torch.stack(list(counts.values())).sum(0)
        return {"": whole / whole.sum(), **limits, **{name: c / c.sum() for name, c in counts.items()}}
