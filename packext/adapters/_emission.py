"""What the callbacks of two Trainers share: a context that is open from a step's first backward pass to its last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch.distributed as dist
from torch import nn

import packext as px

#: Called with the number of the step and its results; gives numbers to log, or nothing.
Receive = Callable[[int, px.Results], Mapping[str, float] | None]


class Emission:
    """Quantities of every few steps of a training."""

    def __init__(self, quantities: tuple[Any, ...], receive: Receive, every: int, scale: str | float) -> None:
        """Take what the callbacks were given.

        Raises:
            ValueError: without quantities, or for an `every` of less than 1.
        """
        if not quantities or every < 1:
            raise ValueError(
                f"EmitCallback needs quantities or a controller, and every of 1 or more; got {quantities} and {every}."
            )
        self._quantities, self._receive, self._every, self._scale = quantities, receive, every, scale
        self._stack, self._results = ExitStack(), None
        self._extended: nn.Module | None = None
        self._group: Any = None
        self._context(1.0)  # what it refuses, it refuses now

    def _context(self, loss_scale: float) -> AbstractContextManager[px.Results]:
        scale: str | float = self._scale
        if scale != "sample" and loss_scale != 1.0:
            scale = (1.0 if isinstance(scale, str) else scale) / loss_scale
        options: dict[str, Any] = {"scale": scale, "accumulate": True, "exact_grad": True, "group": self._group}
        if any(isinstance(q, px.optim.Emitting) for q in self._quantities):
            return px.optim.emit(*self._quantities, **options)
        return px.backpack(*self._quantities, attach=False, **options)

    def over(self, size: int) -> None:
        """Results are to be those of the samples of all `size` processes.

        Raises:
            PackextError: with scale "loss", as no process knows the loss of all.
        """
        self._group = dist.group.WORLD if size > 1 else None
        if size > 1 and self._scale == "loss":
            raise px.PackextError(
                f'EmitCallback in {size} processes needs scale="sample" or a number: no process knows the loss of all.'
            )

    def extend(self, model: nn.Module) -> None:
        """Extend the model, if it is not, until `close`."""
        if not px.is_extended(model):
            self._extended = px.extend(model)

    def open(self, step: int, scaler: Any = None) -> None:
        """The first backward pass of a step comes, or another one; with the `GradScaler` that multiplies the loss."""
        if self._results is None and step % self._every == 0:
            loss_scale = 1.0 if scaler is None else float(scaler.get_scale())
            self._results = self._stack.enter_context(self._context(loss_scale))

    @property
    def is_open(self) -> bool:
        """Whether the passes of a step are observed now."""
        return self._results is not None

    def land(self, step: int) -> dict[str, float]:
        """The step's passes are over: hand on their results.

        Returns:
            What is to be logged.
        """
        results, self._results = self._results, None
        if results is None:
            return {}
        self._stack.close()
        return {name: float(value) for name, value in (self._receive(step, results) or {}).items()}

    def leave(self) -> None:
        """Leave the context, if it is open, with what passes there were."""
        if self._results is not None:
            self._stack.__exit__(StopIteration, StopIteration(), None)
            self._results = None

    def close(self) -> None:
        """The training is over, or has failed: leave the model as it was."""
        self.leave()
        if self._extended is not None:
            px.unextend(self._extended)
            self._extended = None
