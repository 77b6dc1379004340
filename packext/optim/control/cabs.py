"""Coupled adaptive batch size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import packext as px
from packext.optim.control._base import fraction
from packext.optim.control._batch_size import BatchSizeController


class CABS(BatchSizeController):
    """Coupled adaptive batch size for plain SGD: learning rate times the variance of gradients over the loss.

    With tr the trace of the covariance of the samples' own gradients and L their mean loss, both as moving averages
    over the steps, clipped to the two bounds. The covariance is unbiased here; that of the authors' code has 1/N in
    place of 1/(N - 1).

    Example:
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> control = px.optim.CABS(optimizer)
        >>> for x, y in DataLoader(data, batch_sampler=px.optim.AdaptiveBatchSampler(RandomSampler(data), control)):
        ...     optimizer.zero_grad()
        ...     with px.optim.emit(control):
        ...         loss = loss_fn(model(x), y)
        ...         loss.backward()
        ...     optimizer.step()
        ...     control.step(loss)

    It assumes that the loss could be 0, and that the learning rate is about one over the curvature. On easy problems
    with a small rate it stays at its lower bound, and a constant batch does the same.

    - Formula: `round(lr tr / L)`
    - Cost: `BatchL2Grad` and the sum of the gradients, in the pass that runs anyway; holds the sum
    - Source: Balles, Romero & Hennig, UAI 2017, equation 22 and Algorithm 1
    - Refused: another optimizer than `torch.optim.SGD` without momentum and weight decay, and several learning rates; a
      loss that is not positive; a `.grad` that is not the mean of the samples' own gradients, as the learning rate
      would then mean something else; a batch of one

    Attributes:
        batch_size: of the next batch.
    """

    saved = ("batch_size", "_trace", "_loss")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        min_batch_size: int = 16,
        max_batch_size: int = 2048,
        decay: float = 0.95,
    ) -> None:
        """Take the optimizer and the bounds.

        Args:
            optimizer: `torch.optim.SGD` without momentum and weight decay.
            min_batch_size: the smallest batch, and the first.
            max_batch_size: the largest one.
            decay: weight that the moving averages keep of the past, per step.

        Raises:
            ValueError: for another optimizer, or numbers out of their range.
        """
        super().__init__(min_batch_size, max_batch_size)
        fraction(self, decay=decay)
        if type(optimizer) is not torch.optim.SGD:
            raise ValueError(f"CABS is for torch.optim.SGD without momentum, not for {type(optimizer).__name__}.")
        self.optimizer, self.min_batch_size, self.decay = optimizer, min_batch_size, decay
        self._rate()
        self._trace = self._loss = 0.0

    def _rate(self) -> float:
        rates = {float(group["lr"]) for group in self.optimizer.param_groups}
        for group in self.optimizer.param_groups:
            extras = [k for k in ("momentum", "weight_decay", "maximize") if group[k]]
            if extras:
                raise ValueError(f"CABS is for plain SGD; this SGD has {', '.join(extras)}.")
        if len(rates) > 1:
            raise ValueError(f"CABS is for one learning rate; the groups have {sorted(rates)}.")
        return rates.pop()

    @contextmanager
    def receiving(self, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """As that of any controller, for the optimizer's parameters."""
        mine = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        with super().receiving(options) as own:
            yield {"parameters": mine, **own}

    def observe(self, results: px.Results) -> dict[str, Any]:
        """As other controllers of the batch size, and the norm of the mean gradient."""
        seen = super().observe(results)
        return {**seen, "norm": float(results.own_sum) ** 0.5 / max(seen["samples"], 1)}

    def step(self, loss: Tensor | float) -> None:
        """Choose the next batch size; after `optimizer.step()`, before `zero_grad()`.

        Args:
            loss: mean loss of the batch. The learning rate is read from the optimizer now.

        Raises:
            PackextError: for a loss that is not positive, or a `.grad` that is not the mean of the samples' own
                gradients (a sum over them, or clipped): the learning rate then means something else. Without a pass
                and for a batch of one as well.
        """
        seen, rate, value = self._take(), self._rate(), _number(loss)
        trace = seen["trace of the covariance"]
        grads = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = sum(float(g.double().square().sum()) for g in grads) ** 0.5
        if not self._finite({"loss": value, "trace of the covariance": trace, "gradient": norm}):
            return
        if value <= 0:
            raise px.PackextError(f"CABS is for losses that are positive, and this one is {value:.4g}.")
        if abs(norm - seen["norm"]) > 0.01 * seen["norm"]:
            raise px.PackextError(
                f"CABS: `.grad` has the norm {norm:.4g}, the mean of the samples' own gradients {seen['norm']:.4g}: "
                "the learning rate is not one of that mean. Use a loss with reduction='mean' and no clipping, call "
                "step(loss) before zero_grad(), and in several processes emit(control, group=..., scale='sample')."
            )
        self._trace = self.decay * self._trace + (1 - self.decay) * trace
        self._loss = self.decay * self._loss + (1 - self.decay) * value
        wanted = round(rate * self._trace / self._loss)
        self.batch_size = min(max(wanted, self.min_batch_size), self.max_batch_size)


def _number(loss: Tensor | float) -> float:
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(f"CABS.step(loss) takes the mean loss of the batch, got a tensor of shape {list(loss.shape)}.")
    return float(loss.detach() if isinstance(loss, Tensor) else loss)
