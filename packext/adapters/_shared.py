"""What several adapters need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def kept_grads(parameters: Sequence[Tensor]) -> Iterator[list[Tensor | None]]:
    """Parameters have no `.grad` inside, and again afterwards what stands in the list that this yields.

    Args:
        parameters: of which.

    Yields:
        What each had in `.grad`; what is written to the list is there afterwards.
    """
    held = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield held
    finally:
        for p, grad in zip(parameters, held, strict=True):
            p.grad = grad
