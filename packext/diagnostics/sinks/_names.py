"""Which of a step's arrays are histograms."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def histograms(values: Mapping[str, float | np.ndarray]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Find what is laid out as `GradHist1d` is: an array with one axis, beside a number "Name.limit".

    Args:
        values: of a step, by name.

    Returns:
        Name, shares `[bins]` and edges `[bins + 1]` of each.
    """
    found = []
    for name, shares in values.items():
        limit = values.get(name.partition("/")[0] + ".limit")
        if isinstance(shares, np.ndarray) and shares.ndim == 1 and isinstance(limit, float):
            found.append((name, shares, np.linspace(-limit, limit, len(shares) + 1)))
    return found
