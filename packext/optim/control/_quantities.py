"""What controllers ask of the backward pass, which is the same whatever the scale of the pass.

So that they share a pass with an optimizer, whose quantities are of the loss as written. "Own" are those of the
samples' own losses, by packext's definition. "Written" are those of the loss as written, for controllers that
are handed the individual losses, and so know what the loss as written is of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import packext as px


class _Own:
    """Refuses a pass in which the samples' own losses are not known, before anything has changed."""

    def check(self, sample_factor: Callable[[], float]) -> None:
        """Raise where they are not."""
        sample_factor()


class Samples(px.BatchL2Grad):
    """An entry for each sample, in `own_samples`, and their number for the whole model; costs nothing."""

    savefield = "own_samples"

    def wants(self, form: Any) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def result(self, ask: Any) -> Tensor:
        """Zeros, which parts of a batch put together."""
        return torch.zeros(ask.n, device=ask.parameter.device)

    def whole(self, values: dict[str, Any]) -> int:
        """How many; an AttributeError where parameters have seen different batches."""
        return len(super().whole(values))


class OwnNorms(_Own, px.BatchL2Grad):
    """Squared norms of the samples' own gradients `[N]`, in `own_norms`."""

    savefield = "own_norms"

    def result(self, ask: Any) -> Tensor:
        """Of one parameter."""
        return ask.statistics["sq_norms"] * ask.sample_factor() ** 2


class OwnSum(_Own, px.SumGradSquared):
    """Sum over the samples of their own gradients `[*p]`, in `own_sum`; its squared norm for the whole model."""

    savefield = "own_sum"

    def wants(self, form: Any) -> tuple[str, ...]:
        """The sum, which serves as `.grad` as well."""
        return ("total",)

    def result(self, ask: Any) -> Tensor:
        """Of one parameter."""
        return ask.statistics["total"] * ask.sample_factor()

    def whole(self, values: dict[str, Any]) -> float:
        """Squared norm over all parameters."""
        return sum(float(v.double().square().sum()) for v in values.values())


class OwnVariance(_Own, px.Variance):
    """Biased (1/N) variance of the samples' own gradients, entry by entry `[*p]`, in `own_variance`."""

    savefield = "own_variance"

    def result(self, ask: Any) -> Tensor:
        """Of one parameter."""
        return ask.statistics.scaled("scatter", ask.sample_factor() ** 2 / ask.n)

    def aside(self, ask: Any, held: Any) -> Tensor:
        """The mean."""
        return ask.statistics["total"] * (ask.sample_factor() / ask.n)


class OwnGram(_Own, px.BatchDotGrad):
    """Inner products of all pairs of the samples' own gradients `[N, N]`, in `own_gram`."""

    savefield = "own_gram"

    def result(self, ask: Any) -> Tensor:
        """Of one parameter."""
        return ask.statistics["gram"] * ask.sample_factor() ** 2


class WrittenNorms(px.BatchL2Grad):
    """Squared norms of the individual gradients of the loss as written `[N]`, in `written_norms`."""

    savefield = "written_norms"

    def result(self, ask: Any) -> Tensor:
        """Of one parameter."""
        return ask.statistics["sq_norms"]


class WrittenSum(px.SumGradSquared):
    """Sum of the individual gradients of the loss as written `[*p]`, in `written_sum`."""

    savefield = "written_sum"

    def wants(self, form: Any) -> tuple[str, ...]:
        """The sum, which serves as `.grad` as well."""
        return ("total",)

    def result(self, ask: Any) -> Tensor:
        """Of one parameter; a copy, as `.grad` may be the same memory."""
        return ask.statistics["total"].clone()


class WrittenDots(px.GradDot):
    """Inner products of the individual gradients of the loss as written with their sum `[N]`, in `written_dots`."""

    savefield = "written_dots"

    def result(self, ask: Any) -> Tensor:
        """Of one parameter."""
        return ask.statistics["dots"]


class WrittenSlopes(px.GradDot):
    """Inner products of the individual gradients of the loss as written with a given direction `[N]`, in `slopes`."""

    savefield = "slopes"

    def result(self, ask: Any) -> Tensor:
        """Of one parameter."""
        return ask.statistics.dots(self._given(ask))
