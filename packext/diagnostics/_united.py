"""What processes ask for in place of a quantity that knows one process alone, and how their results unite."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import packext as px
from packext.diagnostics._step import Count, Drawn, DrawnGrad, chosen_of
from packext.diagnostics.instruments.curvature import MeanHessianTrace, MeanTopEigenvalues

#: Results of which the samples of all processes are put side by side, and those that are sums over them; with the power
#: in which an individual gradient is in them.
SIDE_BY_SIDE = {"batch_l2": 2, "slope_dot": 1, "kept": 1}
SUMS = {"sum_grad_squared": 2, "diag_ggn_exact": 1, "diag_ggn_mc": 1}
#: Quantities that are made of products with the Hessian and know no samples.
HESSIAN = (px.HessianTrace, px.DiagHessianMC, px.TopEigenvalues)


class Kept(px.ClippedGrad):
    """Individual gradients held to the end of the step as for clipping, in `kept`.

    A function for each parameter that gives inner products with a direction `[*p]`: the gradient of all processes is
    known only when the backward pass has ended.
    """

    savefield = "kept"
    parts = ""

    def __init__(self) -> None:
        """Nothing is clipped: the norm is of no account."""
        super().__init__(1.0)

    def finish(self, asks: dict[int, Any]) -> dict[int, Any]:
        """The functions."""
        return {key: functools.partial(_dots, ask) for key, ask in asks.items()}


def _dots(ask: Any, direction: Tensor) -> Tensor:
    return ask.statistics.dots(direction.to(ask.statistics.form.acc)) * ask.factor


class Mean(px.Variance):
    """Mean of the individual gradients of this process `[*p]`, in `mean_grad`."""

    savefield = "mean_grad"

    def wants(self, form: Any) -> tuple[str, ...]:
        """Nothing beforehand."""
        return ()

    def result(self, ask: Any) -> Any:
        """What variances are united about."""
        return self.aside(ask, None)


class TogetherEigenvalues(MeanTopEigenvalues):
    """Of the average over the processes of their losses as written, in `mean_top_eigenvalues`.

    Every product with the Hessian is averaged, within the backward pass that `DistributedDataParallel` averages. Of
    those before it (`no_sync()`) the processes need not have equally many: nothing is exchanged in them, and nothing
    found. (What is defined within one pass is absent then.)
    """

    def __init__(self, one: MeanTopEigenvalues, average: Callable[[Tensor], Tensor], parallel: Any) -> None:
        """Take the quantity of one process, how to average, and the `DistributedDataParallel`."""
        vars(self).update(vars(one))
        # All processes have to start alike, and packext's own generator may have come further in one of them.
        self.generator = torch.Generator().manual_seed(0)
        self._average, self._parallel = average, parallel

    def measure(self, point: Any, generator: torch.Generator) -> list[Any]:
        """The eigenvalues."""
        if self._parallel.require_backward_grad_sync:
            return super().measure(_Averaged(point, self._average), generator)
        return ["a pass that is not averaged"] * len(point.parameters)


class _Averaged:
    """Products with the Hessian, averaged over the processes."""

    def __init__(self, point: Any, average: Callable[[Tensor], Tensor]) -> None:
        self.parameters, self.negative, self._point, self._average = point.parameters, point.negative, point, average

    def part(self, places: Sequence[int]) -> _Averaged:
        return _Averaged(self._point.part(places), self._average)

    def hessian(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        found = self._point.hessian(vectors)
        flat = self._average(torch.cat([t.reshape(-1) for t in found]))
        parts = flat.split([t.numel() for t in found])
        return [part.view_as(t).to(t.dtype) for part, t in zip(parts, found, strict=True)]


def instead(quantity: Any, ranks: Any) -> tuple[Any, ...] | None:
    """What each of several processes asks for in place of a quantity; None if its results do not unite."""
    if type(quantity) is px.GradDot and quantity.direction is None:
        return (Kept(),)
    if type(quantity) is px.Variance:
        return quantity, Mean()
    if type(quantity) is MeanTopEigenvalues:
        return (TogetherEigenvalues(quantity, ranks.mean, ranks.parallel),)
    if type(quantity) is px.DiagGGNMC and quantity.generator is None:  # which is the same in all processes
        return (px.DiagGGNMC(quantity.mc_samples, ranks.numbers),)
    if type(quantity) is DrawnGrad:  # other entries in each process, as they are others for each sample
        return (DrawnGrad(quantity.seed * ranks.size + ranks.rank, quantity.samples, quantity.entries),)
    known = type(quantity) in (Count, px.GradHistogram, MeanHessianTrace)
    return (quantity,) if known or quantity.savefield in {*SIDE_BY_SIDE, *SUMS} else None


@dataclass
class Weighing:
    """How much each process counts.

    Attributes:
        sum: adds up a tensor over the processes.
        rank: of this process.
        shares: of each process's loss in the average of all, which add up to 1.
        weights: of the samples of each process: what their own losses are multiplied with to be N times their share.
        counts: samples of each process, in each of its passes.
        multiplier: of the samples' own losses in this process, divided out of what is read late.
        gradient: of all processes.
    """

    sum: Callable[[Tensor], Tensor]
    rank: int
    shares: list[float]
    weights: list[float]
    counts: list[list[int]]
    multiplier: float
    gradient: dict[str, Tensor]

    def added(self, field: str, found: dict[str, Any]) -> dict[str, Any] | str | None:
        """Results of one field that are had by sums over the processes, or why there are none; None for others."""
        weight, share = self.weights[self.rank], self.shares[self.rank]
        if field in SUMS:
            return {name: self.sum(value * weight ** SUMS[field]) for name, value in found.items()}
        if field == "variance":
            return {name: self._variance(*pair) for name, pair in found.items()}
        if field == "grad_histogram":
            if set(self.weights) != {1.0}:
                return "samples of the processes have different weights, and were counted before these were known"
            return {name: h._replace(counts=self.sum(h.counts)) for name, h in found.items()}
        if field == "mean_hessian_trace":
            return {name: self._trace(trace, share) for name, trace in found.items()}
        if field == "mean_top_eigenvalues":
            # They are of the average of the losses as written, over what this process's mean counts in its own.
            factor = share * len(self.shares)
            return {name: e if isinstance(e, str) else _times(e, factor) for name, e in found.items()}
        return None

    def _variance(self, variance: Tensor, mean: Tensor) -> Tensor:
        # Deviations from the mean of all are those from each process's own, and of these (Chan, Golub & LeVeque 1983).
        n, total = sum(self.counts[self.rank]), sum(map(sum, self.counts))
        weight = self.weights[self.rank]
        away = mean * weight - self.sum(mean * (weight * n)) / total
        return self.sum((variance * weight**2 + away.square()) * n) / total

    def _trace(self, trace: Any, share: float) -> Any:
        draws = self.sum(trace.draws * share)
        error = draws.std(0) / len(draws) ** 0.5 if len(draws) > 1 else torch.full_like(draws[0], torch.inf)
        return trace._replace(value=draws.mean(0), standard_error=error, draws=draws)

    def sent(self, field: str, found: dict[str, Any]) -> dict[str, Any]:
        """What the other processes are to have of results that stand side by side."""
        if field == "kept":
            found = {name: f(self.gradient[name]) / self.multiplier for name, f in found.items()}
        return {name: Drawn(*(t.cpu() for t in v)) if isinstance(v, Drawn) else v.cpu() for name, v in found.items()}

    def joined(self, field: str, parts: list[Any], samples: int, seed: int) -> Any:
        """Side by side what the processes have sent of one parameter; of drawn entries those of random `samples`."""
        if field != "drawn_grad":
            return torch.cat([part * w ** SIDE_BY_SIDE[field] for part, w in zip(parts, self.weights, strict=True)])
        chosen = chosen_of(self.counts, samples, seed)
        values = [d.values[at] * w for d, at, w in zip(parts, chosen, self.weights, strict=True)]
        return Drawn(torch.cat(values), torch.cat([d.positions[at] for d, at in zip(parts, chosen, strict=True)]))


def _times(e: Any, factor: float) -> Any:
    return e._replace(values=e.values * factor, residuals=e.residuals * abs(factor))
