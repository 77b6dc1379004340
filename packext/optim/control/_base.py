"""What all controllers share: hearing a pass, refusing, skipping what is not finite, and their state."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

import packext as px
from packext.optim._base import SkippedStep


class Controller:
    """Base of what chooses a batch size, a step size or an end of training by statistics of a backward pass.

    Used like a scheduler: `with px.optim.emit(controller):` around the backward pass (an optimizer that is to share the
    pass goes into the same context), then `controller.step()`. A step takes the statistics of one backward pass, or of
    all in one context with `accumulate=True`; `group=` and `scale="sample"` unite those of several processes, so that
    all choose alike.

    A step whose statistics are not finite is skipped with a `SkippedStep` warning, and leaves everything as it was. So
    does a step that raises.

    Attributes:
        skipped: how many steps were skipped since the controller was made or loaded.
    """

    #: Names of the attributes that are its state.
    saved: ClassVar[tuple[str, ...]] = ()
    #: Samples below which its statistics are not defined.
    least: ClassVar[int] = 2

    def __init__(self) -> None:
        """Start without a pass."""
        self.skipped = 0
        self._forget()

    def quantities(self) -> Sequence[Any]:
        """What the next backward pass has to emit."""
        raise NotImplementedError

    def observe(self, results: px.Results) -> dict[str, Any]:
        """What the step needs of a pass, by name; called at its end.

        Args:
            results: of the pass.

        Returns:
            Numbers and tensors, `samples` among them: how many there were.
        """
        raise NotImplementedError

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Draw conclusions from the pass since the last step."""
        raise NotImplementedError

    # -- the pass ----------------------------------------------------------------------------------
    @contextmanager
    def receiving(self, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """While results come to this controller; `px.optim.emit` enters it.

        Args:
            options: of `px.backpack` that the user gave.

        Yields:
            All options of `px.backpack` with which results come.

        Raises:
            ValueError: for options with which results would come to nobody.
        """
        taken = [name for name in ("attach", "pass_hook", "extension_hook") if name in options]
        if taken:
            raise ValueError(
                f"px.optim.emit({type(self).__name__}, {taken[0]}=...): the controller chooses that itself."
            )
        self._united, self._begun = bool(options.get("accumulate")), False
        yield {"attach": False, "pass_hook": self._receive, **options}

    def _receive(self, results: px.Results) -> None:
        self._passes += 0 if self._united and self._begun else 1  # one batch in parts
        self._begun = True
        with torch.no_grad():
            self._seen = self.observe(results)

    def _forget(self) -> None:
        self._seen: dict[str, Any] | None = None
        self._passes, self._united, self._begun = 0, False, False

    def _take(self) -> dict[str, Any]:
        """What the pass since the last step has shown."""
        seen, passes, name = self._seen, self._passes, type(self).__name__
        self._forget()
        if seen is None:
            fields = ", ".join(q.savefield for q in self.quantities())
            raise px.PackextError(
                f"{name}: no {fields} since the last step: run the backward pass in `with px.optim.emit(controller):`, "
                "once before each step."
            )
        if passes > 1:
            raise px.PackextError(
                f"{name}: {passes} backward passes since the last step, each a batch of its own. Step after each, or "
                "have them in one context, px.optim.emit(controller, accumulate=True), as parts of one batch."
            )
        if seen["samples"] < self.least:
            raise px.PackextError(
                f"{name}: a batch of {seen['samples']}; its statistics are of {self.least} samples or more. With a "
                "DataLoader, drop_last=True leaves out the short batch."
            )
        return seen

    def _finite(self, numbers: dict[str, float]) -> bool:
        """Whether all are; otherwise the step is reported as skipped."""
        bad = [name for name, number in numbers.items() if not math.isfinite(number)]
        if bad:
            self.skipped += 1
            warnings.warn(
                f"{type(self).__name__} skipped a step: the {bad[0]} is NaN or infinite.", SkippedStep, stacklevel=3
            )
        return not bad

    # -- saving ------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """The state: plain numbers and tensors, as `torch.save` and `torch.load(weights_only=True)` take them."""
        return {name: copied(getattr(self, name)) for name in self.saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Args:
            state_dict: of a controller of this class.

        Raises:
            ValueError: if it is of another.
        """
        if state_dict.keys() != set(self.saved):
            raise ValueError(
                f"{type(self).__name__} has the state {', '.join(self.saved)}, got {', '.join(state_dict) or 'nothing'}"
                ": it is of another controller."
            )
        for name in self.saved:
            setattr(self, name, copied(state_dict[name]))
        self.skipped = 0
        self._forget()


def copied(value: Any) -> Any:
    """Of a state, whose tensors nobody else writes to."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return [copied(v) for v in value] if isinstance(value, list) else value


def fraction(owner: Any, **values: float) -> None:
    """Refuse weights of averages that are not at least 0 and less than 1."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{type(owner).__name__}: {name} must be at least 0 and less than 1, got {value!r}.")


def positive(owner: Any, **values: float) -> None:
    """Refuse numbers that are not positive and finite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{type(owner).__name__}: {name} must be positive and finite, got {value!r}.")


def count(owner: Any, least: int = 1, **values: int) -> None:
    """Refuse what are not ints of `least` or more."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{type(owner).__name__}: {name} must be an int of {least} or more, got {value!r}.")


def individual(owner: Any, losses: Any) -> Tensor:
    """The same losses; refuses what cannot be individual losses `[N]` that a backward pass goes through."""
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.requires_grad:
        what = f"{losses.dtype} {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        without = ", without a graph" if isinstance(losses, Tensor) and not losses.requires_grad else ""
        raise ValueError(
            f"{type(owner).__name__} takes the individual losses [N], one for each sample (of a loss with "
            f"reduction='none', before their mean and before backward()), got {what}{without}."
        )
    return losses


def heard(losses: Tensor) -> list[Tensor]:
    """A list to which each backward pass adds the gradient `[N]` that has reached the losses."""
    reached: list[Tensor] = []
    losses.register_hook(lambda g: reached.append(g.detach()))
    return reached
