"""What an optimizer asks of the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import packext as px


@runtime_checkable
class Emitting(Protocol):
    """An optimizer that reads more than the gradient.

    It may have a method `options`, too, which gives keyword arguments of `px.backpack` for its passes.
    """

    def quantities(self) -> Sequence[Any]:
        """What the next backward pass has to emit for the next step; nothing, if the step needs none."""
        ...


@contextmanager
def emit(optimizer: Emitting, **options: Any) -> Iterator[px.Results]:
    """Have the backward passes inside emit what this optimizer needs for its next step.

    `with px.optim.emit(optimizer): loss_fn(model(x), y).backward()`, then `optimizer.step()` as ever. Model and loss
    are extended (`px.extend`). What is needed is asked of the optimizer when the context is entered, so that it is
    entered anew for each step. Contexts nest: several optimizers have one each.

    Results become attributes of the parameters, which the optimizer reads. A `px.optim.Optimizer` is handed them at the
    end of each backward pass instead, leaves nothing on the parameters, and asks for those of its own groups alone: so
    several passes before a step add up, as `.grad` does.

    Args:
        optimizer: with a method `quantities`.
        options: of `px.backpack`, such as `scale`, beside those that the optimizer asks for itself.

    Yields:
        The results, as `px.backpack` does.

    Raises:
        UnsupportedUseError: where a parameter has no such quantity.
    """
    own = {**getattr(optimizer, "options", dict)(), **options}
    receiving = getattr(optimizer, "receiving", None)
    with nullcontext(own) if receiving is None else receiving(own) as all_options:
        try:
            with px.backpack(*optimizer.quantities(), **all_options) as results:
                yield results
        except px.UnsupportedUseError as error:
            if receiving is None:
                raise
            raise px.UnsupportedUseError(
                f"{error} With {type(optimizer).__name__}: put such parameters into a group of their own, "
                '{"params": [...], "fallback": True, "lr": ...}, which AdamW trains.'
            ) from error
