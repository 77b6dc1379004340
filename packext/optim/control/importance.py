"""Batches in which samples with large gradients are more frequent, and the loss that makes up for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

import packext as px
from packext.optim.control._base import Controller, count, heard, individual
from packext.optim.control._quantities import WrittenNorms


class ImportanceSampler(Controller, Sampler[list[int]]):
    """Draws samples with probability by the norm of their gradients, and weighs their losses so that nothing is biased.

    Drawn with replacement: the weighted mean of a batch's losses has the mean over all M samples as its expectation,
    and so has its gradient. s_i is the norm of sample i's own gradient when it was last drawn (those never drawn have
    the mean of the others). With fresh norms it is the distribution of least variance; old ones cost no pass of their
    own. No weight is larger than 1 / uniform.

    Example:
        >>> data = TensorDataset(x, y, torch.arange(len(x)))
        >>> sampler = px.optim.ImportanceSampler(len(data), batch_size=32)
        >>> loss_fn = nn.CrossEntropyLoss(reduction="none")
        >>> for x, y, index in DataLoader(data, batch_sampler=sampler):
        ...     optimizer.zero_grad()
        ...     with px.optim.emit(sampler):
        ...         sampler.loss(loss_fn(model(x), y), index).backward()
        ...     optimizer.step()
        ...     sampler.step()

    Batches that a `DataLoader` with workers draws ahead, or that are left out, do no harm: weights go by the indices.
    In several processes each has a sampler, with a seed of its own. An epoch is `M // batch_size` batches, and does not
    visit each sample once.

    - Formula: `p_i = (1 - uniform) s_i / sum of s + uniform / M`, and weights `1 / (M p_i)`
    - Cost: `BatchL2Grad`, in the pass that runs anyway; holds a number for each sample of the data set
    - Source: Zhao & Zhang 2015; Katharopoulos & Fleuret, ICML 2018, who score a larger batch anew for each step instead
    - Refused: indices that it did not draw in this epoch; a backward pass that did not go through `loss`

    Attributes:
        scores: s `[M]`, in float64, NaN for those never drawn.
    """

    saved = ("scores", "_generator")
    least = 1

    def __init__(self, samples: int, batch_size: int, uniform: float = 0.1, seed: int = 0) -> None:
        """Say how many samples there are.

        Args:
            samples: M, in the data set.
            batch_size: how many are drawn at a time.
            uniform: share of the probability that all have alike, of more than 0 and at most 1.
            seed: of the draws; torch's random numbers are left alone.

        Raises:
            ValueError: for numbers out of their range.
        """
        Controller.__init__(self)
        count(self, samples=samples, batch_size=batch_size)
        if batch_size > samples:
            raise ValueError(f"ImportanceSampler: a batch of {batch_size} out of {samples} samples.")
        if not 0 < uniform <= 1:
            raise ValueError(f"ImportanceSampler: uniform must be more than 0 and at most 1, got {uniform!r}.")
        self.samples, self.batch_size, self.uniform = samples, batch_size, uniform
        self.scores = torch.full((samples,), float("nan"), dtype=torch.float64)
        self._draws = torch.Generator().manual_seed(seed)
        self._pending: list[tuple[Tensor, Tensor]] = []  # indices and weights that were drawn
        self._weighted: tuple[Tensor, list[Tensor]] | None = None  # indices, and what reached their losses

    @property
    def probabilities(self) -> Tensor:
        """Of the next draw: p `[M]`."""
        seen = ~self.scores.isnan()
        scores = torch.where(seen, self.scores, self.scores[seen].mean() if bool(seen.any()) else 1.0)
        total = scores.sum()
        even = torch.full_like(scores, 1 / self.samples)
        return (1 - self.uniform) * (scores / total if total > 0 else even) + self.uniform * even

    @property
    def ratio(self) -> float:
        """Mean squared norm of the weighted gradients over that of uniform draws, if the scores were the norms.

        It is no less than the ratio of the variances of the batch's gradient, where it is at most 1.
        """
        seen = ~self.scores.isnan()
        scores, p = self.scores[seen], self.probabilities[seen]
        square = scores.square()
        return float((square / p).sum() / (self.samples * square.sum())) if bool(square.any()) else 1.0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.samples // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of each batch of an epoch."""
        self._pending = []
        for _ in range(len(self)):
            p = self.probabilities
            index = torch.multinomial(p, self.batch_size, replacement=True, generator=self._draws)
            self._pending.append((index, 1 / (self.samples * p[index])))
            yield index.tolist()

    def loss(self, losses: Tensor, index: Tensor) -> Tensor:
        """The weighted mean loss of a batch.

        Args:
            losses: individual losses `[B]`.
            index: of its samples in the data set `[B]`, as this sampler drew them.

        Returns:
            A scalar, to call `backward()` on.

        Raises:
            ValueError: if shapes do not fit.
            PackextError: for a batch that was not drawn in this epoch, or was used before.
        """
        index = torch.as_tensor(index, device="cpu")
        if individual(self, losses).shape != index.shape:
            raise ValueError(f"ImportanceSampler: {len(losses)} losses, and indices of shape {list(index.shape)}.")
        place = next((k for k, (drawn, _) in enumerate(self._pending) if torch.equal(drawn, index)), None)
        if place is None:
            raise px.PackextError(
                "ImportanceSampler: these indices are no batch that it drew and that waits for its loss: without the "
                "probabilities of the draw there are no weights. Have the data set return the index of each sample."
            )
        _, weights = self._pending[place]
        del self._pending[: place + 1]
        self._weighted = index, heard(losses)
        return (losses * weights.to(losses)).mean()

    def quantities(self) -> list[Any]:
        """Norms of individual gradients of the loss as written."""
        return [WrittenNorms()]

    def observe(self, results: px.Results) -> dict[str, Any]:
        """The norms, and what multiplied each loss."""
        norms = results.written_norms.double().cpu().sqrt()
        if self._weighted is None or len(self._weighted[1]) != 1 or len(self._weighted[0]) != len(norms):
            return {"samples": len(norms), "norms": None}
        index, (reached,) = self._weighted
        return {"samples": len(norms), "index": index, "norms": norms / reached.double().cpu().abs()}

    def step(self) -> None:
        """Remember the norms of the batch's samples.

        Raises:
            PackextError: without a pass through the loss that `loss` gave.
        """
        seen, self._weighted = self._take(), None
        if seen["norms"] is None:
            raise px.PackextError(
                "ImportanceSampler: the backward pass did not go through sampler.loss(losses, index), so that it is "
                "not known what weights its gradients carry."
            )
        norms = seen["norms"]
        if self._finite({"norm of a gradient": float(norms.sum())}):
            self.scores[seen["index"]] = norms

    # -- saving ------------------------------------------------------------------------------------
    @property
    def _generator(self) -> Tensor:
        return self._draws.get_state()

    @_generator.setter
    def _generator(self, state: Tensor) -> None:
        self._draws.set_state(state.cpu().clone())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with a new epoch.

        Args:
            state_dict: of a sampler of as many samples.

        Raises:
            ValueError: if it is of another.
        """
        scores = state_dict.get("scores")
        if isinstance(scores, Tensor) and scores.shape != self.scores.shape:
            raise ValueError(f"ImportanceSampler of {self.samples} samples got the state of one of {len(scores)}.")
        super().load_state_dict(state_dict)
        self._pending, self._weighted = [], None
