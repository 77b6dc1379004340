"""Differentially private SGD and Adam in one backward pass, and batches as their accountants assume them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from typing import Any, SupportsIndex

import torch

from packext.optim._private import Private


class DPSGD(Private, torch.optim.SGD):
    """Differentially private SGD in one backward pass.

    The gradient of a step, after which `torch.optim.SGD` goes on, and which `.grad` holds from then:

        (sum over n of min(1, C / |g_n|) g_n + z C N(0, I)) / B

    g_n are of the samples' own losses, B is the batch size that is expected, since the size of a Poisson-sampled batch
    must not be known. With `per_layer` C bounds each layer's part, and the noise has `sqrt(layers) C` in its place;
    with `adaptive` z is larger by what `AdaptiveClipping` says.

    Example:
        >>> optimizer = DPSGD(model.parameters(), 0.1, max_norm=1.0, noise_multiplier=1.1, expected_batch_size=64)
        >>> for index in PoissonSampler(len(x), 64 / len(x), steps=1000):
        ...     optimizer.zero_grad()
        ...     if index:  # a step on an empty batch is noise alone
        ...         with px.optim.emit(optimizer):
        ...             loss_fn(model(x[index]), y[index]).backward()
        ...     optimizer.step()
        >>> epsilon(optimizer.spent, len(x), delta=1e-5)

    Several passes before a step add up (micro-batches; the loss is not divided by their number). With
    `torch.distributed` each process has samples of its own: their sums are added, one process draws the noise. The
    model need not be wrapped; inside of `DistributedDataParallel` use `no_sync()`.

    - Cost: `ClippedGrad` in place of `.grad`, in one pass, and a normal draw for each entry; holds the factors of
      all individual gradients to the end of the pass, or their rows where those are no larger, and a sum
    - Source: Abadi et al. 2016 (arXiv:1607.00133), Algorithm 1
    - Refused: models whose samples influence each other (BatchNorm in training mode), and losses (means over class
      weights or ignored targets); buffers that are written to; a second pass through one forward pass; parameters that
      the extended model has not, or of other types than float32 and float64; gradients that no pass within `emit` has
      made, also of zeros; a `max_norm` that is changed between pass and step; `GradScaler`; gradients that are not
      finite

    Attributes:
        max_norm: C, which adaptive clipping moves.
        noise_multiplier: z, of the whole step.
        generators: of the noise; torch's global one is not touched.
    """


class DPAdam(Private, torch.optim.Adam):
    """Adam on private gradients.

    Moments are those of private gradients, noise included: no correction is made for it.

    - Formula: the gradient of `DPSGD`, and then `torch.optim.Adam`
    - Cost: `ClippedGrad`, as `DPSGD`, and Adam's two tensors of each parameter's size
    - Source: Abadi et al. 2016 (arXiv:1607.00133) for the gradient; Kingma & Ba 2015 for Adam
    - Refused: as by `DPSGD`

    Attributes:
        max_norm: C, which adaptive clipping moves.
        noise_multiplier: z, of the whole step.
        generators: of the noise; torch's global one is not touched.
    """


class PoissonSampler:
    """Batches of indices to which each sample belongs with probability `rate`, independently of all others.

    What accountants assume. Batches differ in size and may be empty; as `batch_sampler` of a `DataLoader` that needs a
    `collate_fn` which accepts an empty list. Iterating again draws other batches, and so do copies and other processes;
    with a `generator` of yours copies and forks draw the same, and a process that goes on has to set its state, or the
    batches are those of before.
    """

    def __init__(self, samples: int, rate: float, steps: int, generator: torch.Generator | None = None) -> None:
        """Say how many batches of how many samples.

        Args:
            samples: in the data set.
            rate: expected batch size over `samples`.
            steps: number of batches.
            generator: of the draws; one with an unpredictable seed by default.

        Raises:
            TypeError: for another thing than a number of samples.
            ValueError: if there are no samples, the rate is no probability, or for a seed in place of a generator.
        """
        if not isinstance(samples, SupportsIndex):
            raise TypeError(f"samples must be their number, such as len(dataset), got a {type(samples).__name__}.")
        if not (samples >= 1 and 0 < rate <= 1 and steps >= 0):
            raise ValueError(f"need samples >= 1, a rate in (0, 1] and steps >= 0, got {samples}, {rate}, {steps}.")
        if not isinstance(generator, (torch.Generator, type(None))):
            raise ValueError(f"generator must be one, such as torch.Generator().manual_seed(0), got {generator!r}.")
        self.samples, self.rate, self.steps = samples, rate, steps
        self._drawn = generator is None
        if generator is None:
            self._draw_anew()
        else:
            self.generator = generator

    def _draw_anew(self) -> None:
        """A generator of batches that were not drawn before."""
        self.generator, self._process = torch.Generator().manual_seed(secrets.randbits(63)), os.getpid()

    def __len__(self) -> int:
        """Number of batches."""
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of each batch."""
        for _ in range(self.steps):
            if self._drawn and self._process != os.getpid():  # a fork has a copy of the generator
                self._draw_anew()
            draws = torch.rand(self.samples, generator=self.generator, dtype=torch.float64)
            yield (draws < self.rate).nonzero().flatten().tolist()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without a generator that is not the user's."""
        return {name: value for name, value in vars(self).items() if not (self._drawn and name == "generator")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make what is not kept anew."""
        vars(self).update(state)
        if self._drawn:
            self._draw_anew()
