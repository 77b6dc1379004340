"""Tests of whether a batch is large enough for its gradient to be a descent direction."""

from __future__ import annotations

import math
from typing import Any

import packext as px
from packext.optim.control._base import positive
from packext.optim.control._batch_size import AveragingController
from packext.optim.control._quantities import OwnGram


class NormTest(AveragingController):
    """Grows the batch until the gradient's error is a fraction theta of its norm.

    tr is the trace of the covariance of the samples' own gradients, G the true gradient. Batches never shrink. |G|² is
    not the squared norm of the batch's gradient, which noise inflates by tr / B, so that the plain test passes where
    there is nothing but noise: both sides are unbiased estimates, and moving averages of them. From one step to the
    next the size at most doubles, and does so while the average of |G|² is not positive; in the first `1 / (1 - decay)`
    steps it stays as it is.

    Example:
        >>> control = px.optim.NormTest(batch_size=16, max_batch_size=1024)
        >>> with px.optim.emit(control):
        ...     loss_fn(model(x), y).backward()
        >>> optimizer.step()
        >>> control.step()

    - Formula: the test is `tr / B <= theta² |G|²`; where it fails, the next batch has `tr / (theta² |G|²)` samples
    - Cost: `BatchL2Grad` and the sum of the gradients, in the pass that runs anyway; holds the sum
    - Source: Byrd, Chin, Nocedal & Wu 2012; unbiased estimates and the bound of two are ours
    - Refused: a batch of one

    Attributes:
        batch_size: of the next batch.
    """

    def __init__(
        self, batch_size: int = 16, max_batch_size: int = 2048, theta: float = 0.9, decay: float = 0.9
    ) -> None:
        """Take the bounds.

        Args:
            batch_size: the first batch.
            max_batch_size: the largest one.
            theta: standard error of the gradient that is allowed, in units of its norm.
            decay: weight that the moving averages keep of the past, per step.

        A ValueError refuses numbers out of their range.
        """
        super().__init__(batch_size, max_batch_size, decay)
        positive(self, theta=theta)
        self.theta = theta

    def _choose(self, *averages: float) -> int:
        trace, signal = averages
        return max(self.batch_size, self._grow_to(_needed(trace, self.theta**2 * signal)))


class InnerProductTest(AveragingController):
    """Grows the batch until the gradient points downhill with a given certainty (augmented inner product test).

    g_n are the samples' own gradients, G is the true one. The first test is of the variance along G, the second of that
    across it. If one fails, the next batch has as many samples as the larger of the two needs; batches never shrink.
    The authors put the gradient of the same batch in the place of G, which passes where there is nothing but noise, and
    average ten gradients to notice. Here tr, |G|², `var(g_n·G) = G' Cov G` and |G|⁴ are U-statistics of the inner
    products of all pairs of samples: unbiased, with moving averages of them compared. From one step to the next the
    size at most doubles, and does so while the average of |G|² or |G|⁴ is not positive; in the first `1 / (1 - decay)`
    steps it stays as it is.

    Example:
        >>> control = px.optim.InnerProductTest(batch_size=16, max_batch_size=1024)
        >>> with px.optim.emit(control):
        ...     loss_fn(model(x), y).backward()
        >>> optimizer.step()
        >>> control.step()

    - Formula: `var(g_n·G) / B <= theta² |G|⁴` and `(tr - var(g_n·G) / |G|²) / B <= nu² |G|²`
    - Cost: `BatchDotGrad`, in the pass that runs anyway; holds N² numbers
    - Source: Bollapragada, Byrd & Nocedal 2018, sections 2.1 and 3; the estimates and the bound of two are ours
    - Refused: a batch of less than 4; `accumulate` and `group`, as the inner products of all pairs are of one pass in
      one process

    Attributes:
        batch_size: of the next batch.
    """

    least = 4
    estimates = 4

    def __init__(
        self,
        batch_size: int = 16,
        max_batch_size: int = 2048,
        theta: float = 0.9,
        nu: float = 5.84,
        decay: float = 0.9,
    ) -> None:
        """Take the bounds.

        Args:
            batch_size: the first batch, of 4 or more.
            max_batch_size: the largest one.
            theta: standard error of the gradient's length along itself that is allowed, in units of its norm.
            nu: standard error across that is allowed, in units of the norm; 5.84 is the tangent of 80.3 degrees.
            decay: weight that the moving averages keep of the past, per step.

        A ValueError refuses numbers out of their range.
        """
        super().__init__(batch_size, max_batch_size, decay)
        positive(self, theta=theta, nu=nu)
        self.theta, self.nu = theta, nu

    def quantities(self) -> list[Any]:
        """Inner products of all pairs of individual gradients."""
        return [OwnGram()]

    def observe(self, results: px.Results) -> dict[str, Any]:
        """Number of samples, and four U-statistics."""
        gram = results.own_gram.double()
        n, norms = len(gram), gram.diagonal()
        if n < self.least:
            return {"samples": n}
        off = gram - norms.diag()
        rows, squares = off.sum(1), float(off.square().sum())
        pairs, total = float(rows.square().sum()), float(rows.sum())
        signal = total / (n * (n - 1))
        # Of g_i·g_j g_i·g_k, and of g_i·g_j g_k·g_l, over all that are different samples.
        second = (pairs - squares) / (n * (n - 1) * (n - 2))
        fourth = (total**2 - 4 * pairs + 2 * squares) / (n * (n - 1) * (n - 2) * (n - 3))
        return {
            "samples": n,
            "trace of the covariance": float(norms.mean()) - signal,
            "norm of the gradient": signal,
            "variance along the gradient": second - fourth,
            "fourth power of its norm": fourth,
        }

    def _choose(self, *averages: float) -> int:
        trace, signal, along, fourth = averages
        needed = [_needed(along, self.theta**2 * fourth)]
        across = trace - along / signal if signal > 0 else trace  # which no batch makes small enough, unless it is 0
        needed.append(_needed(across, self.nu**2 * signal))
        return max(self.batch_size, self._grow_to(max(needed)))


def _needed(noise: float, allowed: float) -> float:
    """Samples with which noise is as small as is allowed."""
    if allowed > 0:
        return max(noise, 0.0) / allowed
    return math.inf if noise > 0 else 0.0
