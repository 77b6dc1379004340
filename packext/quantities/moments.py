"""Second moment and variance of individual gradients."""

from __future__ import annotations

from torch import Tensor

from packext._factored import Factored
from packext._quantity import Ask, Quantity


class SumGradSquared(Quantity):
    """Sum over samples of squared individual gradients, entry by entry `[*p]`, in `sum_grad_squared`."""

    savefield = "sum_grad_squared"

    def wants(self, form: Factored) -> tuple[str, ...]:
        return ("second_moment",)

    def result(self, ask: Ask) -> Tensor:
        return ask.statistics["second_moment"] * ask.factor**2


class Variance(Quantity):
    """Biased (1/N) variance over samples of individual gradients, entry by entry `[*p]`, in `variance`.

    Computed from deviations, never as a difference of moments: it is not negative, and right for
    gradients that hardly differ.
    """

    savefield = "variance"

    def wants(self, form: Factored) -> tuple[str, ...]:
        return ("scatter",)

    def result(self, ask: Ask) -> Tensor:
        return ask.statistics["scatter"] * (ask.factor**2 / ask.n)
