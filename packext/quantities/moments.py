"""Second moment and variance of individual gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from packext._factored import Factored
from packext._quantity import Ask, Quantity, Summed, sum_of
from packext._union import Here, Part


class SumGradSquared(Summed, Quantity):
    """Sum over samples of squared individual gradients, entry by entry `[*p]`, in `sum_grad_squared`."""

    savefield = "sum_grad_squared"
    parts = "split"

    def wants(self, form: Factored) -> tuple[str, ...]:
        return ("second_moment",)

    def result(self, ask: Ask) -> Tensor:
        return ask.statistics.scaled("second_moment", ask.factor**2)


class Variance(Quantity):
    """Biased (1/N) variance over samples of individual gradients, entry by entry `[*p]`, in `variance`.

    Computed from deviations, never as a difference of moments: it is not negative, and right for
    gradients that hardly differ.
    """

    savefield = "variance"
    parts = "split"

    def wants(self, form: Factored) -> tuple[str, ...]:
        return ("scatter",)

    def result(self, ask: Ask) -> Tensor:
        return ask.statistics.scaled("scatter", ask.factor**2 / ask.n)

    indivisible = ""

    def aside(self, ask: Ask, held: Any) -> Tensor:
        """The mean."""
        return ask.statistics["total"] * (ask.factor / ask.n)

    def unite(self, parts: Sequence[Part], over: Here) -> Part:
        """Deviations from the mean of all are those from the parts' own, and of these (Chan, Golub & LeVeque, 1983)."""
        n = over.count(sum(p.n for p in parts))
        mean = over.sum(sum_of([p.aside * p.n for p in parts])) / n
        scatter = sum_of([(p.value + (p.aside - mean).square()) * p.n for p in parts])
        return Part(over.sum(scatter) / n, n, mean)

    def absent(self, part: Part, n: int) -> Part:
        return Part(torch.zeros_like(part.value), n, torch.zeros_like(part.aside))
