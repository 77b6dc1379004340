"""Relative entropy policy search: a Gaussian over weights, moved towards those that did well."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Search:
    """What a search found.

    Attributes:
        mean: of the last Gaussian over weights `[D]`.
        covariance: of it `[D, D]`.
        rewards: median of the samples' rewards in each iteration.
    """

    mean: Tensor
    covariance: Tensor
    rewards: list[float]


def weights(rewards: Tensor, epsilon: float) -> Tensor:
    """Weights `exp(r/η)` with a Kullback-Leibler divergence of epsilon from equal ones.

    η minimises the dual `η ε + η log mean exp(r/η)` (Peters, Mülling & Altun, 2010, for episodes). Its derivative is ε
    less that divergence, which falls as η grows, so that the root is found by halving.

    Args:
        rewards: of each sample `[K]`; NaN or -inf for a crash, which counts as the worst of the others.
        epsilon: the bound, larger than 0.

    Returns:
        `[K]`, summing to 1. With a bound that no weights reach, the best share all (the dual's infimum, at η = 0).

    Raises:
        ValueError: if no reward is finite, or epsilon is not positive.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}.")
    r = rewards.double()
    good = r.isfinite()
    if not bool(good.any()):
        raise ValueError("no sample has a finite reward: start from other weights, or with less spread.")
    r = torch.where(good, r, r[good].min())
    best = r == r.max()
    if math.log(len(r) / int(best.sum())) <= epsilon:
        return best / best.sum()
    spread = float(r.max() - r.min())
    low, high = math.log(spread) - 40, math.log(spread) + 40  # of log η
    for _ in range(100):
        middle = (low + high) / 2
        w = torch.softmax(r / math.exp(middle), 0)
        divergence = float(torch.special.xlogy(w, w * len(r)).sum())
        low, high = (middle, high) if divergence > epsilon else (low, middle)
    return w


def reps(
    reward: Callable[[Tensor, int], Tensor],
    mean: Tensor,
    deviation: Tensor,
    iterations: int = 25,
    samples: int = 40,
    epsilon: float = 0.7,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
) -> Search:
    """Search for weights with a high reward.

    In each iteration `samples` weights are drawn from the Gaussian, rewarded, weighted by `weights`, and the Gaussian
    becomes that of largest weighted likelihood.

    Args:
        reward: from weights `[K, D]` and the number of the iteration, which tells its tasks, to rewards `[K]`. All
            weights of an iteration should see the same tasks.
        mean: of the first Gaussian `[D]`.
        deviation: standard deviations of it `[D]`; an entry of zero stays as it is.
        iterations: how many.
        samples: K.
        epsilon: bound on the divergence of the weights of an iteration.
        bounds: between which the first weight must be: others are drawn again. The interval is convex, so that the
            mean is in it, too.
        seed: of the draws.

    Returns:
        The last Gaussian.

    Raises:
        ValueError: if rewards have another shape, or the first mean is out of bounds.
    """
    draw = torch.Generator().manual_seed(seed)
    mean, covariance = mean.double(), torch.diag(deviation.double().square())
    low, high = bounds or (-math.inf, math.inf)
    if not low < float(mean[0]) < high:
        raise ValueError(f"the first weight must start between {low:g} and {high:g}, got {float(mean[0]):g}.")
    rewards = []
    for k in range(iterations):
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp(min=0).sqrt()
        kept: list[Tensor] = []
        while len(kept) < samples:
            x = mean + root @ torch.randn(len(mean), generator=draw, dtype=torch.float64)
            if low < float(x[0]) < high:
                kept.append(x)
        drawn = torch.stack(kept)
        found = reward(drawn, k)
        if found.shape != (samples,):
            raise ValueError(
                f"reward gave a tensor of shape {list(found.shape)} for {samples} weights, needed [{samples}]."
            )
        w = weights(found, epsilon)
        mean = w @ drawn
        covariance = (drawn - mean).T @ (w[:, None] * (drawn - mean))
        finite = found[found.isfinite()]
        rewards.append(float(finite.median()))
    return Search(mean, covariance, rewards)
