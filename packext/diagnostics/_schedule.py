"""When to look: functions of the step's number."""

from __future__ import annotations

from collections.abc import Callable
from math import log10


def linear(interval: int, offset: int = 0) -> Callable[[int], bool]:
    """Every `interval` steps, from step `offset` on.

    Args:
        interval: in steps.
        offset: the first of them.

    Returns:
        A function of a step's number.

    Raises:
        ValueError: if the interval is less than 1.
    """
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ValueError(f"every (or interval) must be an int of 1 or more, or a function, got {interval!r}.")
    return lambda step: step >= offset and (step - offset) % interval == 0


def logarithmic(per_decade: int = 10, first: int = 1) -> Callable[[int], bool]:
    """Step 0, and from step `first` on steps in equal ratios, rounded to whole ones.

    Args:
        per_decade: how many to a factor of ten.
        first: the step from which on.

    Returns:
        A function of a step's number.

    Raises:
        ValueError: if either is less than 1.
    """
    if per_decade < 1 or first < 1:
        raise ValueError(f"per_decade and first must be ints of 1 or more, got {per_decade!r} and {first!r}.")

    def due(step: int) -> bool:
        if step < first:
            return step == 0
        # The k of which round(first * 10^(k / per_decade)) is nearest to the step.
        k = round(per_decade * log10(step / first))
        return any(round(first * 10 ** (j / per_decade)) == step for j in (k - 1, k, k + 1))

    return due
