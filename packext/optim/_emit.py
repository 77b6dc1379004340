"""What an optimizer asks of the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

    Args:
        optimizer: with a method `quantities`.
        options: of `px.backpack`, such as `scale`, beside those that the optimizer asks for itself.

    Yields:
        The results, as `px.backpack` does.
    """
    own = getattr(optimizer, "options", dict)()
    with px.backpack(*optimizer.quantities(), **own, **options) as results:
        yield results
