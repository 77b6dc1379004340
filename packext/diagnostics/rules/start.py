"""What is wrong from the start: inputs, weights, and a loss that does not see the inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from packext.diagnostics._verdict import Finding, Rule
from packext.diagnostics.rules._history import SinceStart, by_layer, percent


class BadInputScaling(Rule):
    """The inputs are far from one in size.

    Initialisations assume inputs with a root mean square of about 1 (Glorot & Bengio 2010; LeCun et al. 1998); pixels
    from 0 to 1 have 0.3 to 0.6, raw ones from 0 to 255 have 70 to 150. Beyond 5, or under 0.01, is far; under 0.01 by
    the numbers that are not 0, since where words are counted most are not there. A model that begins with a
    normalisation of its own does not mind, which is not seen here.
    """

    failure = "bad input scaling"
    advice = "Scale the inputs to mean 0 and standard deviation 1 (pixels: at least divide by 255)."
    reads = ("InputScale",)
    hold, release = 3, 3
    large, small = 5.0, 0.01

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        size, zeros = values.get("InputScale"), values.get("InputScale.zeros", 0.0)
        if size is None or math.isnan(size) or self.small * math.sqrt(1 - zeros) <= size <= self.large and zeros < 1:
            return None
        return Finding(
            f"The root mean square of the inputs is {size:.3g}, their mean {values['InputScale.mean']:.3g}, the "
            f"largest {values['InputScale.largest']:.3g}."
        )


class BadInitialisation(SinceStart):
    """Weights started far too large, far too small, or as copies of each other.

    By the root mean square of a matrix times the root of its fan-in: from 0.3 to 1.5 in usual initialisations, so that
    a layer keeps the scale of what goes through it. More than 4 in any matrix is too large. Less than 0.1 is too small
    if it holds of more than half of them (single ones are started at zero on purpose, and so is the only one). Rows
    that are all the same stay copies. The verdict is withdrawn when the loss has fallen to a half.
    """

    failure = "bad initialisation"
    advice = "Start weights with standard deviation sqrt(2 / fan-in) before a ReLU, sqrt(1 / fan-in) else (nn.init)."
    reads = ("Loss", "InitialScale")
    hold, release = 1, 5
    large, small = 4.0, 0.1

    def __init__(self) -> None:
        """Start before the first step."""
        super().__init__()
        self._finding: Finding | None = None

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        loss, gains = values.get("Loss"), by_layer(values, "InitialScale")
        if loss is None or not self.begin(step, values) or self.first is None:
            return None
        if gains:
            self._finding = self._judge(gains, values.get("InitialScale.alike", 0.0))
        return self._finding if not self.left(loss) < 0.5 * self.first else None

    def _judge(self, gains: dict[str, float], alike: float) -> Finding | None:
        high = tuple(name for name, gain in gains.items() if not gain <= self.large)
        low = tuple(name for name, gain in gains.items() if gain < self.small)
        if high:
            worst = max(high, key=lambda name: gains[name])
            return Finding(f"{worst} started {gains[worst]:.3g} / sqrt(fan-in) large; 0.3 to 1.5 is usual.", high)
        if 2 * len(low) > len(gains) > 1:
            worst = min(low, key=lambda name: gains[name])
            return Finding(f"{worst} started {gains[worst]:.2g} / sqrt(fan-in) large; 0.3 to 1.5 is usual.", low)
        if alike:
            return Finding(f"In {alike:.0f} matrices all rows started the same: their units are copies of each other.")
        return None


class LossIgnoresInput(Rule):
    """The model puts out the same for all samples.

    The standard deviation of its output over the samples is under 1 % of its size, or under 0.01 where it is larger
    than 1, for ten looks: what is to be told apart may be little beside a constant, such as years. Deep networks start
    near that, and leave it within a few steps.
    """

    failure = "loss does not depend on the input"
    advice = "Look whether the inputs differ at all, and for a layer that multiplies by zero, detaches or saturates."
    reads = ("OutputScale",)
    hold, release = 10, 5
    spread = 0.01

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        spread, size = values.get("OutputScale.spread"), values.get("OutputScale")
        if spread is None or size is None or not spread * max(1.0, size) < self.spread:
            return None
        return Finding(f"Outputs differ between samples by {percent(spread)} % of their size, which is {size:.3g}.")
