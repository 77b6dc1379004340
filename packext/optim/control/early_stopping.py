"""Early stopping without a validation set."""

from __future__ import annotations

from typing import Any

import packext as px
from packext.optim._lists import norm
from packext.optim.control._base import Controller, count
from packext.optim.control._quantities import OwnSum, OwnVariance, Samples


class EvidenceStopping(Controller):
    """Says stop when the gradients are no larger than sampling noise makes them, without a validation set.

    With g the mean of the N samples' own gradients and v_d the unbiased variance of entry d over them, the evidence is
    positive where gradients are smaller than those of N samples of a distribution with mean 0 would be. Training is to
    stop when it has been positive `patience` times in a row. Entries that are 0 for all samples say nothing and are
    left out.

    The N samples are the training data, whose noise the model fits in the end: g then falls below what noise would
    give, and the evidence goes to 1. Give all data in each pass, or `samples`, how many there are: g and v are then
    those of passes until so many samples were seen, as if the parameters had not moved meanwhile, and there is one
    evidence for each round through the data. A single batch of m samples, out of many more, has the evidence
    `-2 / (m - 3)` on average where the gradient over all data is 0, and less elsewhere: below 0 however long one
    trains, as the noise of drawing the batch stays. For the same reason batches are to go through the data without
    replacement, as those of a DataLoader with `shuffle=True` do.

    It is early: take it for a lower bound on when to stop rather than an optimum (docs/controllers.md has runs with all
    data at once and in batches). Where the model does not overfit, training on is better.

    Example:
        >>> stopping = px.optim.EvidenceStopping(samples=len(data))
        >>> for x, y in rounds:  # through a DataLoader, again and again
        ...     optimizer.zero_grad()
        ...     with px.optim.emit(stopping):
        ...         loss_fn(model(x), y).backward()
        ...     if stopping.step():
        ...         break
        ...     optimizer.step()

    - Formula: `1 - N mean over entries of g_d² / v_d`; over several passes, g is the mean over all samples and v the
      mean of the passes' variances, each weighted with its samples less one
    - Cost: `Variance` and the sum of the gradients, in the pass that runs anyway; holds both
    - Source: Mahsereci, Balles, Lassner & Hennig 2017, equation 7; rounds of several passes are ours
    - Refused: a batch of one

    Attributes:
        evidence: of the last round, or pass if `samples` is None; None before the first.
    """

    saved = ("evidence", "_positive", "_round")

    def __init__(self, patience: int = 5, samples: int | None = None) -> None:
        """Say for how many times in a row the evidence is to be positive.

        Args:
            patience: rounds through the data, or passes if `samples` is None.
            samples: how many an epoch goes through; None: each pass has all data.

        A ValueError refuses a patience of less than one, and less than two samples.
        """
        super().__init__()
        count(self, patience=patience)
        if samples is not None:
            count(self, 2, samples=samples)
        self.patience, self.samples = patience, samples
        self.evidence: float | None = None
        self._positive = 0
        self._round: dict[str, Any] | None = None

    @property
    def should_stop(self) -> bool:
        """Whether the evidence was positive the last `patience` times."""
        return self._positive >= self.patience

    def quantities(self) -> list[Any]:
        """The sum of individual gradients, and the variance of each entry."""
        return [OwnSum(), OwnVariance(), Samples()]

    def observe(self, results: px.Results) -> dict[str, Any]:
        """Number of samples, and of each parameter the sum of the gradients and their squared deviations."""
        n = results.own_samples
        sums = {name: found.own_sum for name, found in results.items()}
        squares = {name: found.own_variance * n for name, found in results.items()}
        return {"samples": n, "freedom": n - 1, "sums": sums, "squares": squares}

    def step(self) -> bool:
        """Look at the last pass.

        Returns:
            Whether to stop.

        A PackextError refuses a step without a pass, and a batch of one.
        """
        seen = self._take()
        sizes = {
            "gradient": norm([*seen["sums"].values()]),
            "variance of the gradients": norm([*seen["squares"].values()]),
        }
        if not self._finite(sizes):
            return self.should_stop
        seen = seen if self._round is None else _united(self._round, seen)
        if self.samples is not None and seen["samples"] < self.samples:
            self._round = seen
            return self.should_stop
        self._round, self.evidence = None, _evidence(seen)
        self._positive = self._positive + 1 if self.evidence > 0 else 0
        return self.should_stop


def _united(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Sums over two passes; a parameter that one of them has not used has gradients of 0 in it."""
    both: dict[str, Any] = {name: one[name] + other[name] for name in ("samples", "freedom")}
    for what in ("sums", "squares"):
        names = {**one[what], **other[what]}
        both[what] = {k: sum(part[what][k] for part in (one, other) if k in part[what]) for k in names}
    return both


def _evidence(seen: dict[str, Any]) -> float:
    """Of all entries whose gradient is not 0 for every sample; 1 if there are none."""
    n, total, entries = seen["samples"], 0.0, 0
    for name, value in seen["sums"].items():
        mean, variance = value.double() / n, seen["squares"][name].double() / seen["freedom"]
        known = (variance > 0) | (mean != 0)
        total += float((mean[known].square() / variance[known]).sum())
        entries += int(known.sum())
    return 1 - n * total / entries if entries else 1.0
