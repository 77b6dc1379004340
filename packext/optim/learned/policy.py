"""What the policy sees, and the rate that it makes of that; for one run, or for many side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import torch
from torch import Tensor

#: Of a batch whose losses, or slopes, are all alike.
LEAST = 1e-30
#: Rates, as a policy outside of what it was trained on may ask for any.
RANGE = (1e-12, 1e3)


def observation(changes: Tensor, losses: Tensor) -> Tensor:
    """The two observations of a step: `log Var(g_nᵀ Δω)` and `log Var(l_n)` over the samples, unbiased.

    Args:
        changes: what the proposed update would change each sample's own loss by, to first order `[..., N]`.
        losses: each sample's own loss `[..., N]`.

    Returns:
        `[..., 2]` in float64, of variances of 1e-30 at least.
    """
    variances = torch.stack([changes.double().var(-1), losses.double().var(-1)], -1)
    return variances.clamp(min=LEAST).log()


class Averages:
    """Discounted averages of the observations and of their squared deviations, without the bias of their start.

    With φ an observation, γ the discount and t the number of observations, `m ← γ m + (1-γ) φ` and
    `u ← γ u + (1-γ) (φ - m/(1-γᵗ))²`; both are divided by `1-γᵗ` when they are read.

    Attributes:
        discount: γ.
        count: t.
        mean: m `[..., 2]`; a zero before the first observation.
        spread: u, as m.
    """

    def __init__(self, discount: float) -> None:
        """Start without observations."""
        self.discount, self.count = discount, 0
        self.mean: Tensor = torch.zeros(2, dtype=torch.float64)
        self.spread: Tensor = torch.zeros(2, dtype=torch.float64)

    def update(self, observed: Tensor) -> Tensor:
        """Take the observations of a step.

        Args:
            observed: `[..., 2]`, as `observation` gives them.

        Returns:
            What the policy sees `[..., 5]`: both averages, both deviations, and 1.
        """
        keep, self.count = self.discount, self.count + 1
        debias = 1 - keep**self.count
        self.mean = keep * self.mean + (1 - keep) * observed
        mean = self.mean / debias
        self.spread = keep * self.spread + (1 - keep) * (observed - mean).square()
        return torch.cat([mean, self.spread / debias, torch.ones_like(mean[..., :1])], -1)


def log_rate(weights: Tensor, features: Tensor) -> Tensor:
    """The logarithm of the rate: the inner product, between those of 1e-12 and 1e3.

    Args:
        weights: of one or many policies `[..., 5]`.
        features: as `Averages.update` gives them `[..., 5]`.

    Returns:
        `[...]`.
    """
    return (weights * features).sum(-1).clamp(*map(math.log, RANGE))


def bounds(discount: float) -> tuple[float, float]:
    """Between which the first weight must be for the rate to settle.

    The first observation holds twice the logarithm of the last rate, whose average the first weight θ brings back into
    the rate: the loop `x ← (γ + 2 (1-γ) θ) x` shrinks if and only if `-(1+γ) / (2 (1-γ)) < θ < 1/2`.

    Returns:
        Both bounds.
    """
    return -(1 + discount) / (2 * (1 - discount)), 0.5


@dataclass(frozen=True)
class Policy:
    """A log-linear policy, `rate = exp(θᵀ features)`.

    Attributes:
        weights: θ, of the average log-variance of predicted changes, that of losses, their deviations, and 1.
        discount: γ of the averages.
        optimizer: of which `torch.optim` optimizer it sets the rate: its class and hyperparameters; any if empty.
        name: for messages.
    """

    weights: Sequence[float]
    discount: float = 0.9
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    name: str = "policy"

    def __post_init__(self) -> None:
        """Refuse a policy under which the rate would not settle.

        Raises:
            ValueError: for other than five finite weights, a discount outside of [0, 1), or a first weight that is out
                of bounds.
        """
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        if len(self.weights) != 5 or not all(map(math.isfinite, self.weights)):
            raise ValueError(f"a policy has five finite weights, got {list(self.weights)}.")
        if not 0 <= self.discount < 1:
            raise ValueError(f"discount must be at least 0 and less than 1, got {self.discount}.")
        low, high = bounds(self.discount)
        if not low < self.weights[0] < high:
            raise ValueError(
                f"weights[0] is {self.weights[0]:g}: the rate settles only if it is between {low:g} and {high:g}, as "
                "the variance of predicted changes grows with the square of the last rate."
            )

    def rate(self, features: Tensor) -> float:
        """The rate for features `[5]`."""
        return math.exp(float(log_rate(torch.tensor(self.weights, dtype=torch.float64), features)))


def trained(name: str) -> Policy:
    """A policy that comes with packext; `benchmarks/learned_train.py` has made it, and docs/learned-rate.md tests it.

    Args:
        name: "rmsprop".

    Returns:
        The policy.

    Raises:
        ValueError: if there is none of that name.
    """
    found = _shipped()
    if name not in found:
        raise ValueError(f"no trained policy {name!r}: there are {', '.join(found)}.")
    return found[name]


def trained_for(optimizer: torch.optim.Optimizer) -> Policy:
    """The policy that was trained for such an optimizer.

    Returns:
        The policy.

    Raises:
        ValueError: if there is none.
    """
    group = optimizer.param_groups[0]
    for policy in _shipped().values():
        wanted = {k: v for k, v in policy.optimizer.items() if k != "class"}
        if type(optimizer).__name__ == policy.optimizer["class"] and all(group.get(k) == v for k, v in wanted.items()):
            return policy
    known = "; ".join(
        f"{p.name}: {p.optimizer['class']}({', '.join(f'{k}={v}' for k, v in p.optimizer.items() if k != 'class')})"
        for p in _shipped().values()
    )
    raise ValueError(
        f"no policy was trained for {type(optimizer).__name__} with these hyperparameters. There are {known}. To use "
        f'one of them all the same, name it: policy="{next(iter(_shipped()))}".'
    )


def _shipped() -> dict[str, Policy]:
    text = resources.files("packext.optim.learned").joinpath("policies.json").read_text()
    entries = json.loads(text)
    return {k: Policy(v["weights"], v["discount"], v["optimizer"], k) for k, v in entries.items()}
