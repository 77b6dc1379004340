"""The gradient noise scale as a batch size."""

from __future__ import annotations

import math

from packext.optim.control._batch_size import AveragingController


class NoiseScale(AveragingController):
    """Batch size that follows the gradient noise scale, the batch at which noise is as large as the gradient.

    Below it, twice the batch is worth nearly two steps; above, it is worth little. With g the mean of the samples' own
    gradients g_n, both parts are unbiased estimates of one batch, their moving averages are taken apart, and their
    ratio is rounded up. From one step to the next the size at most doubles, and does so while the average of |G|² is
    not positive; in the first `1 / (1 - decay)` steps it stays as it is. As |G|² goes to 0, batches grow without end:
    the largest is a choice.

    Example:
        >>> control = px.optim.NoiseScale(batch_size=16, max_batch_size=1024)
        >>> for x, y in DataLoader(data, batch_sampler=px.optim.AdaptiveBatchSampler(RandomSampler(data), control)):
        ...     optimizer.zero_grad()
        ...     with px.optim.emit(control):
        ...         loss_fn(model(x), y).backward()
        ...     optimizer.step()
        ...     control.step()

    - Formula: `tr / |G|²`, with `tr = (sum |g_n|² - N |g|²) / (N - 1)` and `|G|² = |g|² - tr / N`
    - Cost: `BatchL2Grad` and the sum of the gradients, in the pass that runs anyway; holds the sum
    - Source: McCandlish, Kaplan & Amodei 2018, the "simple" noise scale
    - Refused: a batch of one

    Attributes:
        batch_size: of the next batch.
    """

    def __init__(self, batch_size: int = 16, max_batch_size: int = 2048, decay: float = 0.95) -> None:
        """Take the bounds.

        Args:
            batch_size: the smallest batch, and the first.
            max_batch_size: the largest one.
            decay: weight that the moving averages keep of the past, per step.

        A ValueError refuses numbers out of their range.
        """
        super().__init__(batch_size, max_batch_size, decay)
        self.min_batch_size = batch_size

    @property
    def noise_scale(self) -> float:
        """Of the moving averages, in samples; infinite where no signal is seen, NaN before the first step."""
        trace, signal = self._averages
        if signal > 0:
            return trace / signal
        return math.inf if trace > 0 else math.nan

    def _choose(self, *averages: float) -> int:
        if math.isnan(self.noise_scale):  # no gradient at all: nothing is known
            return self.batch_size
        return max(self.min_batch_size, self._grow_to(self.noise_scale))
