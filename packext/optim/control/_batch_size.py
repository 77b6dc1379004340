"""What controllers of the batch size share, and the sampler that follows one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar

from torch.utils.data import Dataset, Sampler

import packext as px
from packext.optim.control._base import Controller, count, fraction
from packext.optim.control._quantities import OwnNorms, OwnSum


class BatchSizeController(Controller):
    """Base of what chooses a batch size.

    Attributes:
        batch_size: of the next batch; `AdaptiveBatchSampler` reads it.
    """

    def __init__(self, batch_size: int, max_batch_size: int) -> None:
        """Take the first batch size and the largest one."""
        super().__init__()
        count(self, self.least, batch_size=batch_size)
        count(self, batch_size, max_batch_size=max_batch_size)
        self.batch_size, self.max_batch_size = batch_size, max_batch_size

    def quantities(self) -> list[Any]:
        """Norms of individual gradients, and their sum."""
        return [OwnNorms(), OwnSum()]

    def observe(self, results: px.Results) -> dict[str, Any]:
        """Number of samples, trace of their covariance, and the estimate of the true gradient's squared norm."""
        norms = results.own_norms.double()
        n, total, square = len(norms), float(norms.sum()), float(results.own_sum)
        if n < 2:
            return {"samples": n}
        return {
            "samples": n,
            "trace of the covariance": (total - square / n) / (n - 1),
            "norm of the gradient": (square - total) / (n * (n - 1)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with no more than `max_batch_size` samples.

        Args:
            state_dict: of a controller of this class.

        A ValueError refuses that of another.
        """
        super().load_state_dict(state_dict)
        self.batch_size = min(self.batch_size, self.max_batch_size)

    def _grow_to(self, wanted: float) -> int:
        """A batch size that holds as many samples as are wanted, and no more than twice this one.

        One batch's estimates are noisy: without that bound the first could ask for the largest batch there is.

        Args:
            wanted: how many samples the batch is to hold; inf where no number suffices.

        Returns:
            The size, at most `max_batch_size`.
        """
        limit = min(2 * self.batch_size, self.max_batch_size)
        return limit if wanted > limit else math.ceil(wanted)


class AveragingController(BatchSizeController):
    """Base of what compares moving averages of unbiased estimates, once they are of enough steps.

    Attributes:
        batch_size: of the next batch.
    """

    saved = ("batch_size", "_steps", "_averages")
    #: How many estimates `observe` gives beside the number of samples.
    estimates: ClassVar[int] = 2

    def __init__(self, batch_size: int, max_batch_size: int, decay: float) -> None:
        """Take the bounds, and the weight that the averages keep of the past."""
        super().__init__(batch_size, max_batch_size)
        fraction(self, decay=decay)
        self.decay, self._steps, self._averages = decay, 0, [0.0] * self.estimates

    def step(self) -> None:
        """Choose the next batch size; the first `1 / (1 - decay)` steps leave it as it is.

        A PackextError refuses a step without a pass, and a batch that is too small.
        """
        seen = self._take()
        del seen["samples"]
        if not self._finite(seen):
            return
        # They start at zero, with weights that do not add up to one: alike for all, they drop out of ratios.
        self._averages = [
            self.decay * a + (1 - self.decay) * b for a, b in zip(self._averages, seen.values(), strict=True)
        ]
        self._steps += 1
        if self._steps * (1 - self.decay) >= 1 - 1e-9:
            share = 1 - self.decay**self._steps
            self.batch_size = self._choose(*(a / share for a in self._averages))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Args:
            state_dict: of a controller of this class.

        Raises:
            ValueError: if it is of one that averages something else.
        """
        theirs = len(state_dict.get("_averages", self._averages))
        if theirs != self.estimates:
            raise ValueError(
                f"{type(self).__name__} averages {self.estimates} estimates, and the state has {theirs}: it is of "
                "another controller."
            )
        super().load_state_dict(state_dict)

    def _choose(self, *averages: float) -> int:
        raise NotImplementedError


class AdaptiveBatchSampler(Sampler[list[int]]):
    """Batches of indices of the size that a controller says: `DataLoader(data, batch_sampler=...)`.

    Example:
        >>> control = px.optim.NoiseScale(batch_size=16, max_batch_size=512)
        >>> batches = px.optim.AdaptiveBatchSampler(torch.utils.data.RandomSampler(data), control, drop_last=True)
        >>> for x, y in torch.utils.data.DataLoader(data, batch_sampler=batches):
        ...     ...

    The size is read when a batch is drawn: a `DataLoader` with workers draws ahead (`prefetch_factor` for each), and
    so many batches pass before a new size is seen. It has no length, as the number of batches is not known beforehand.
    In several processes the samplers differ in what they draw, and the controllers agree (`px.optim.emit(controller,
    group=..., scale="sample")`); the size is that of each process.
    """

    def __init__(self, sampler: Iterable[int], controller: BatchSizeController, drop_last: bool = False) -> None:
        """Put indices together.

        Args:
            sampler: gives indices, such as a `RandomSampler`.
            controller: of the batch size.
            drop_last: whether the rest of an epoch, which is no full batch, is left out.

        Raises:
            TypeError: for a data set in place of a sampler, or another thing than a controller of the batch size.
        """
        if isinstance(sampler, Dataset) or not isinstance(controller, BatchSizeController):
            raise TypeError(
                "AdaptiveBatchSampler takes a sampler, such as torch.utils.data.RandomSampler(data), and a controller "
                f"of the batch size, such as px.optim.NoiseScale(); got {type(sampler).__name__} and "
                f"{type(controller).__name__}."
            )
        self.sampler, self.controller, self.drop_last = sampler, controller, drop_last

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of one epoch."""
        indices = iter(self.sampler)
        while batch := list(islice(indices, self.controller.batch_size)):
            if self.drop_last and len(batch) < self.controller.batch_size:
                return
            yield batch
