"""What rules keep of earlier steps."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from packext.diagnostics._verdict import Rule, Said


def by_layer(values: Mapping[str, Any], name: str) -> dict[str, float]:
    """What an instrument says of each parameter, by its name."""
    said = values if isinstance(values, Said) else Said(values)
    return said.by_layer.get(name, {})


def percent(share: float) -> str:
    """A share in percent, with two digits or more."""
    return f"{100 * share:.0f}" if abs(share) >= 0.095 else f"{100 * share:.2g}"


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
    def median(self) -> float:
        """Their median."""
        return median(self.values)

    def before(self, looks: int) -> list[float]:
        """All but the last ones; none while these are fewer than ten."""
        kept = [*self.values][:-looks]
        return kept if len(kept) >= 10 else []


class Fall:
    """Whether something falls, by ranks alone: the trend test of Mann (1945) and Kendall (1975).

    Of n values in a row, S counts the pairs of which the later is lower, less those of which it is higher. Without a
    trend, S has mean zero and variance n (n - 1) (2 n + 5) / 18, whatever the values' distribution. So neither the few
    values from which all begins nor single jumps count for more than others, and values that are all noise seldom pass
    five standard errors, however often one looks.
    """

    errors, length = 5.0, 1000

    def __init__(self) -> None:
        """Start before the first value."""
        self.sure = False
        self._values: deque[float] = deque()
        self._pairs = 0

    def add(self, value: float) -> None:
        """Take one more; `sure` is whether the values have fallen for sure since the start, now or once before."""
        if self.sure:
            return
        if len(self._values) == self.length:
            old = self._values.popleft()
            self._pairs -= sum((old > v) - (old < v) for v in self._values)
        self._pairs += sum((v > value) - (v < value) for v in self._values)
        self._values.append(value)
        n = len(self._values)
        self.sure = n > 1 and self._pairs >= self.errors * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)


class Steady:
    """For how many looks the learning rate has not risen, as it does in each step of a warm-up."""

    def __init__(self) -> None:
        """Start before the first step."""
        self.looks = 0
        self._rate = float("inf")

    def add(self, values: Mapping[str, Any]) -> int:
        """Take those of one more look; return how many there were since the last rise, this one counted."""
        rate = values.get("LearningRate", self._rate)
        self.looks = 1 if rate > self._rate else self.looks + 1
        self._rate = rate
        return self.looks


class SinceStart(Rule):
    """Base of rules that compare with how the run began; of a run whose step 0 they have not seen they say nothing.

    Where it began is known from one batch alone: `doubt` is two standard errors of its mean loss, by how its samples'
    losses are spread (by their quantiles, between which lines are drawn), or 0 where these are not known. A loss is
    above where the run began if it lies above `line`, a fifth and these two standard errors more than the first.

    Some losses cancel, and how far they have come is not seen: those of a policy gradient are near zero on average from
    the start, and of any size. `signed` is whether the first step's loss was less than half of the mean absolute loss
    of its samples. Others, as of densities, begin above zero and end below: what is `left` of them is negative then.

    `began` is the loss of step 0, None while that is not known.
    """

    above = 1.2
    _weights = 0.025, 0.125, 0.225, 0.25, 0.225, 0.125, 0.025

    def __init__(self) -> None:
        """Start before the first step."""
        self.began: float | None = None
        self.doubt, self.signed = 0.0, False
        self._asked = False
        self._usual = 0.0

    def begin(self, step: int, values: Mapping[str, Any]) -> bool:
        """Note the loss of step 0, which is among the values of a step; return whether it is known."""
        if not self._asked and step == 0:
            self.began = values["Loss"]
            known = [*zip(values.get("SampleLosses.quantiles", ()), self._weights, strict=False)]
            self.signed = bool(abs(values["Loss"]) < 0.5 * sum(abs(q) * w for q, w in known))
            mean, n = sum(q * w for q, w in known), values.get("BatchSize", math.inf)
            doubt = 2 * math.sqrt(sum((q - mean) ** 2 * w for q, w in known) / n)
            self.doubt = doubt if doubt < math.inf else 0.0
        self._asked = True
        return self.first is not None and 0 < self.first < float("inf")

    @property
    def first(self) -> float | None:
        """Size of the loss of step 0; None while that is not known."""
        return None if self.began is None else abs(self.began)

    @property
    def line(self) -> float:
        """Above which a loss is higher than where the run began; infinite while that is not known."""
        return math.inf if self.first is None else self.above * self.first + self.doubt

    def left(self, loss: float) -> float:
        """What is left of a loss, to compare with `first`: its size where it began below zero, or is of both signs."""
        return abs(loss) if self.began is None or self.began < 0 or self.signed else loss

    def size(self, values: Mapping[str, Any]) -> float | None:
        """Norm of the parameters, but no less than matrices have in PyTorch's initialisation: some start at zero."""
        self._usual = values.get("InitialScale.usual", self._usual)
        return max(values["ParamNorm"], self._usual) if "ParamNorm" in values else None
