"""What rules keep of earlier steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, median, stdev
from typing import Any

from packext.diagnostics._verdict import Rule, Said


def by_layer(values: Mapping[str, Any], name: str) -> dict[str, float]:
    """What an instrument says of each parameter, by its name."""
    said = values if isinstance(values, Said) else Said(values)
    return said.by_layer.get(name, {})


class Recent:
    """The last values of something."""

    def __init__(self, length: int) -> None:
        """Choose how many to keep."""
        self.values: deque[float] = deque(maxlen=length)

    def add(self, value: float) -> None:
        """Take one more."""
        self.values.append(value)

    @property
    def full(self) -> bool:
        """Whether there are as many as are kept."""
        return len(self.values) == self.values.maxlen

    @property
    def mean(self) -> float:
        """Their mean."""
        return fmean(self.values)

    @property
    def error(self) -> float:
        """Standard error of their mean, if they are independent; two are needed."""
        return stdev(self.values) / math.sqrt(len(self.values))

    @property
    def median(self) -> float:
        """Their median."""
        return median(self.values)


class SinceStart(Rule):
    """Base of rules that compare with how the run began; of a run whose step 0 they have not seen they say nothing."""

    def __init__(self) -> None:
        """Start before the first step."""
        self.first: float | None = None
        self._asked = False

    def begin(self, step: int, loss: float) -> bool:
        """Note the loss of step 0; return whether it is known."""
        if not self._asked and step == 0:
            self.first = abs(loss)
        self._asked = True
        return self.first is not None and 0 < self.first < float("inf")
