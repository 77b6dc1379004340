"""Histograms of the entries of individual gradients, alone and against the parameters' values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.diagnostics._instrument import Instrument, Processes
from packext.diagnostics._step import Absent, Drawn, DrawnGrad, Step, chosen_of
from packext.diagnostics._tensors import largest

#: Entries of each parameter that are drawn for each sample; both histograms ask for the same.
ENTRIES = 512


class _Sampled(Instrument):
    """Looks at random entries of individual gradients of some samples, drawn in each step by a generator of its own."""

    samples: int | None

    def enter(self, step: int, model: nn.Module) -> None:
        self._seed = step

    def unite(self, processes: Processes) -> None:
        """Nothing: what is drawn is a result of the pass."""

    @property
    def needs(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (DrawnGrad(self._seed, self.samples, ENTRIES),) if self.samples is not None else (self.exact(),)

    def exact(self) -> px.GradHistogram:
        """The quantity for all entries of all samples."""
        raise NotImplementedError

    def drawn(self, step: Step) -> dict[str, Drawn]:
        """What was drawn of each parameter; of several passes as many samples as of one, each sample as likely."""
        rows, counts = step.layers("drawn_grad"), [p.n or 0 for p in step.passes]
        if len(counts) == 1:
            return rows
        assert self.samples is not None
        [at] = chosen_of([counts], self.samples, step.number)
        return {name: Drawn(r.values[at], r.positions[at]) for name, r in rows.items()}


def _range(given: float | None, values: list[Tensor], what: str) -> float:
    found = largest(values)
    if not found < float("inf"):
        raise Absent(f"not finite: a {what} is NaN or infinite")
    return given or found or 1.0


def _bins(values: Tensor, bins: int, limit: float) -> Tensor:
    # What lies far beyond the limit has no place among whole numbers, and a number of 16 bits not for each of 257 bins.
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values.add(limit).mul_(bins / (2 * limit)).clamp_(0, bins - 1).long()


def _together(parts: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What was drawn from each parameter `[m, k]` side by side `[m, K]`; the k `[L]`; each column's parameter `[K]`."""
    where = parts[0].device
    sizes = torch.tensor([part.shape[1] for part in parts], device=where)
    places = torch.arange(len(parts), device=where).repeat_interleave(sizes)
    return torch.cat([part.to(where) for part in parts], 1), sizes, places


def _counts(index: Tensor, *shape: int) -> Tensor:
    """How often each place of a tensor of this shape is in `index`, in float64."""
    return torch.bincount(index.flatten(), minlength=math.prod(shape)).view(shape).double()


def _whole(step: Step, names: Iterable[str], shares: Tensor) -> Tensor:
    """Shares among the entries of all parameters, from those among the entries of each `[L, ...]`."""
    sizes = torch.tensor([float(step.parameters[name].numel()) for name in names], dtype=torch.double)
    return torch.tensordot((sizes / sizes.sum()).to(shares.device), shares, 1)


def _check(bins: int, limit: float | None, samples: int | None) -> None:
    if bins < 1 or (limit is not None and not limit > 0) or (samples is not None and samples < 1):
        raise ValueError(f"needed bins >= 1, a positive limit and samples >= 1, got {bins}, {limit} and {samples}.")
    if samples is None and limit is None:
        raise ValueError("a histogram of all samples needs its limits beforehand: pass limit=<number>.")


class GradHist1d(_Sampled):
    """Distribution of the entries of individual gradients over equal bins from -limit to limit.

    "GradHist1d" has the share of all entries in each bin (`[bins]`), "GradHist1d/<parameter>" the same for one
    parameter, "GradHist1d.limit" the limit; entries beyond are in the outermost bins. By default it looks at random
    entries (512 of each parameter, or somewhat more) of some random samples, other entries for each of them;
    "GradHist1d.standard_error" `[bins]` says how far all entries of the whole batch may be from them, from how much
    these samples differ.

    - Formula: entries of the g_n in a bin, over all entries; of a whole from random entries, the mean over the
      parameters weighted with their sizes
    - Units: shares; the limit has those of the gradient of a sample's own loss
    - Cost: for 8 samples, 512 entries of each parameter are computed from the factors; with `samples=None` a
      `GradHistogram`, all N gradients in tiles
    - Source: Schneider, Dangel & Hennig 2021, for the instrument; drawing entries is ours
    - Absent: where a gradient is not finite. All samples without a limit are refused when it is made
    """

    def __init__(self, bins: int = 100, limit: float | None = None, samples: int | None = 8) -> None:
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
        rows, n = self.drawn(step), step.n
        values, sizes, places = _together([r.values for r in rows.values()])
        limit, m, bins = _range(self.limit, [values], "gradient"), len(values), self.bins
        own = torch.arange(m, device=values.device)[:, None]
        index = _bins(values, bins, limit).add_((places * m + own) * bins)
        each = _counts(index, len(rows), m, bins) / sizes[:, None, None]
        shares = _whole(step, rows, each)  # [m, bins]
        every = all(r.values.shape[1] == step.parameters[name].numel() for name, r in rows.items())
        left = max(0.0, 1 - m / n) if every else 1.0  # of the variance, where the samples are part of a finite batch
        error = Absent("one sample was drawn") if m < 2 else (shares.var(0) * left / m).sqrt()
        layers = zip(rows, each.mean(1), strict=True)
        return {"": shares.mean(0), ".standard_error": error, ".limit": limit, **dict(layers)}


class GradHist2d(_Sampled):
    """Distribution of the entries of individual gradients against the values of their parameters.

    "GradHist2d" has the share of all entries in each bin (`[param_bins, bins]`), "GradHist2d/<parameter>" the same for
    one parameter; bins are equal, from -limit to limit and from -param_limit to param_limit, recorded as such. By
    default it looks at the same random entries as `GradHist1d`.

    - Formula: pairs of an entry of g_n and its parameter in a bin, over all pairs
    - Units: shares; the limits have those of the gradient of a sample's own loss, and of the parameters
    - Cost: as `GradHist1d`, once for both; with `samples=None` a `GradHistogram` of its own
    - Source: Schneider, Dangel & Hennig 2021, for the instrument; drawing entries is ours
    - Absent: where a gradient or a parameter is not finite. All samples without limits are refused when it is made
    """

    def __init__(
        self,
        bins: int = 50,
        param_bins: int = 40,
        limit: float | None = None,
        param_limit: float | None = None,
        samples: int | None = 8,
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
            rows, start = self.drawn(step), step.start
            values, sizes, places = _together([r.values for r in rows.values()])
            limit = _range(self.limit, [values], "gradient")
            param_limit = _range(self.param_limit, [start[name] for name in rows], "parameter")
            limits = {".limit": limit, ".param_limit": param_limit}
            there = _together([start[name].reshape(-1)[r.positions] for name, r in rows.items()])[0]
            index = _bins(there, self.param_bins, param_limit).add_(places * self.param_bins).mul_(self.bins)
            index.add_(_bins(values, self.bins, limit))
            shares = _counts(index, len(rows), self.param_bins, self.bins) / (sizes * len(values))[:, None, None]
            return {"": _whole(step, rows, shares), **limits, **dict(zip(rows, shares, strict=True))}
        whole = torch.stack(list(counts.values())).sum(0)
        return {"": whole / whole.sum(), **limits, **{name: c / c.sum() for name, c in counts.items()}}
