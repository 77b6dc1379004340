"""Early stopping without a validation set."""

from __future__ import annotations

from typing import Any

import packext as px
from packext.optim.control._base import Controller, count
from packext.optim.control._quantities import OwnSum, OwnVariance, Samples


class EvidenceStopping(Controller):
    """Says stop when the gradients are no larger than sampling noise makes them, without a validation set.

    With g the mean of the N samples' own gradients and v_d the unbiased variance of entry d over them, the evidence is
    positive where gradients are smaller than those of N samples of a distribution with mean 0 would be. Training is to
    stop when it has been positive `patience` times in a row. Entries that are 0 for all samples say nothing and are
    left out.

    It is early: take it for a lower bound on when to stop rather than an optimum. On logistic regression with wrong
    labels (all data in each pass) it said stop after a quarter to two thirds of the steps that were best on test data,
    in the median of five runs (docs/controllers.md). Where the model does not overfit, training on is better. It is
    meant for passes over all data; in parts, use `px.optim.emit(controller, accumulate=True)`. With batches of 256 out
    of 1,000 it never said stop in 4,000 steps there. Under pure noise it is -2 / (N - 3) on average, not 0.

    Example:
        >>> stopping = px.optim.EvidenceStopping(patience=5)
        >>> for step in range(steps):
        ...     optimizer.zero_grad()
        ...     with px.optim.emit(stopping):
        ...         loss_fn(model(x), y).backward()
        ...     if stopping.step():
        ...         break
        ...     optimizer.step()

    - Formula: `1 - N mean over entries of g_d² / v_d`
    - Cost: `Variance` and the sum of the gradients, in the pass that runs anyway; holds both
    - Source: Mahsereci, Balles, Lassner & Hennig 2017, equation 7
    - Refused: a batch of one

    Attributes:
        evidence: of the last step; None before the first.
    """

    saved = ("evidence", "_positive")

    def __init__(self, patience: int = 5) -> None:
        """Say for how many steps in a row the evidence is to be positive.

        A ValueError refuses less than one.
        """
        super().__init__()
        count(self, patience=patience)
        self.patience = patience
        self.evidence: float | None = None
        self._positive = 0

    @property
    def should_stop(self) -> bool:
        """Whether the evidence was positive in the last `patience` steps."""
        return self._positive >= self.patience

    def quantities(self) -> list[Any]:
        """The sum of individual gradients, and the variance of each entry."""
        return [OwnSum(), OwnVariance(), Samples()]

    def observe(self, results: px.Results) -> dict[str, Any]:
        """Number of samples, and the evidence."""
        n = results.own_samples
        if n < 2:
            return {"samples": n}
        total, entries = 0.0, 0
        for _, found in results.items():
            mean, variance = found.own_sum.double() / n, found.own_variance.double() * (n / (n - 1))
            known = (variance > 0) | (mean != 0)
            total += float((mean[known].square() / variance[known]).sum())
            entries += int(known.sum())
        return {"samples": n, "evidence": 1 - n * total / entries if entries else 1.0}

    def step(self) -> bool:
        """Look at the last pass.

        Returns:
            Whether to stop.

        A PackextError refuses a step without a pass, and a batch of one.
        """
        seen = self._take()
        if seen["evidence"] != -float("inf") and not self._finite({"evidence": seen["evidence"]}):
            return self.should_stop
        self.evidence = seen["evidence"]
        self._positive = self._positive + 1 if seen["evidence"] > 0 else 0
        return self.should_stop
