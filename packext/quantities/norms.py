"""Norms and inner products of individual gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from packext._factored import Factored
from packext._quantity import Ask, PerSample, Quantity, Total


class BatchL2Grad(Total, PerSample, Quantity):
    """Squared Euclidean norms of individual gradients `[N]`, in `batch_l2`; summed over parameters in `results`."""

    savefield = "batch_l2"
    parts = "sum"

    def wants(self, form: Factored) -> tuple[str, ...]:
        return ("sq_norms",)

    def result(self, ask: Ask) -> Tensor:
        return ask.statistics.scaled("sq_norms", ask.factor**2)


class BatchDotGrad(Total, Quantity):
    """Inner products of all pairs of individual gradients `[N, N]`, in `batch_dot`.

    Summed over parameters in `results`.
    """

    savefield = "batch_dot"
    parts = "sum"
    indivisible = "pairs of samples of different parts have inner products too"

    def wants(self, form: Factored) -> tuple[str, ...]:
        return ("gram",)

    def result(self, ask: Ask) -> Tensor:
        return ask.statistics.scaled("gram", ask.factor**2)


class GradDot(Total, PerSample, Quantity):
    """Inner products of individual gradients with a direction `[N]`, in `grad_dot`.

    Summed over parameters in `results`.

    The default direction is the gradient of the loss as written, `.grad` of this pass (for a mean, the mean
    gradient). With scale "sample" or a number it is the mean of the scaled individual gradients.
    """

    savefield = "grad_dot"
    parts = "sum"

    def __init__(self, direction: Mapping[Any, Tensor] | None = None) -> None:
        """Take a direction for each parameter, by name or by the parameter itself."""
        if direction is not None and not isinstance(direction, Mapping):
            raise ValueError(
                "direction must be a dictionary of tensors by name, such as {name: torch.ones_like(p) for name, p in "
                f"model.named_parameters()}}, got a {type(direction).__name__}."
            )
        self.direction = direction
        if direction is None:
            self.indivisible = "its direction is the gradient of all (pass direction=...)"
        else:
            self.parts = ""

    def wants(self, form: Factored) -> tuple[str, ...]:
        return ("dots",) if self.direction is None else ()

    def result(self, ask: Ask) -> Tensor:
        if self.direction is not None:
            return ask.statistics.dots(self._given(ask)) * ask.factor
        share = 1.0 if ask.scale == "loss" else ask.factor / ask.n
        return ask.statistics["dots"] * (ask.factor * share)

    def _given(self, ask: Ask) -> Tensor:
        assert self.direction is not None
        d = self.direction.get(ask.name)
        if d is None:
            d = self.direction.get(ask.parameter)
        if d is None:
            raise KeyError(f"GradDot(direction=...) has nothing for {ask.name}, shape {list(ask.parameter.shape)}.")
        if d.shape != ask.parameter.shape:
            raise ValueError(
                f"GradDot: direction for {ask.name} has shape {list(d.shape)}, needed {list(ask.parameter.shape)}."
            )
        return d.to(ask.parameter.device)
