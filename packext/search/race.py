"""Which of K operations is worse than another beyond doubt: intervals over samples and steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import packext as px


def student(tail: float, dof: float) -> float:
    """The t that a Student variable exceeds with probability `tail`.

    Args:
        tail: between 0 and 1/2.
        dof: degrees of freedom.

    Returns:
        t.

    Raises:
        ImportError: without scipy.
    """
    try:
        from scipy.special import stdtrit
    except ImportError as error:
        raise ImportError("Intervals of gates need scipy: pip install 'packext[search]'.") from error
    return -float(stdtrit(dof, tail))


class Race:
    """Gathers each sample's gradients by the gates of two operations, and tells which one has lost.

    What is compared is `d = dl/dg_a - dl/dg_b`: to first order what a sample's loss is more with a than with b. At a
    point where a is active this is too large for a convex loss, where b is active too small; so the two are gathered
    apart, and the mean of their means is the trapezoid rule for the difference of the losses.

    Steps differ by more than their samples: weights and other edges' paths change. So of each kind the variance of the
    mean over T steps is `max(W, S) / T`: W is the mean of the steps' own `var(d) / N`, S the variance of the steps'
    means (the moment estimate of a random effect; Cochran 1954, Hedges & Olkin 1985). Quantiles are Student's with
    T - 1 degrees of freedom, by Welch and Satterthwaite for the two kinds: also where W is the larger, as S is small by
    chance after few steps. Either end of the t-th interval of a pair is missed with probability
    `level / (K (K - 1) t (t + 1))`, so that all looks at all pairs together err with at most `level`, if differences
    stay as they are and means are normal.

    Attributes:
        level: probability that an operation is said to have lost to another that is not better, over all looks.
        steps: `[K, K]` number of steps with a active and b inactive.
    """

    def __init__(self, k: int, level: float) -> None:
        """Start without a step.

        Args:
            k: number of operations.
            level: see above.

        Raises:
            ValueError: if there are no two operations, or the level is not between 0 and 1.
        """
        if k < 2:
            raise ValueError(f"a race is between 2 operations or more, got {k!r}.")
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, got {level!r}.")
        self.level = level
        self.steps = torch.zeros(k, k, dtype=torch.long)
        self._mean, self._squares, self._within = (torch.zeros(k, k, dtype=torch.float64) for _ in range(3))

    def add(self, active: int, inactive: int, differences: Tensor) -> None:
        """Take a step.

        Args:
            active: index a.
            inactive: index b.
            differences: `[N]`, each sample's gradient by the gate of a less that by the gate of b; N of 2 or more.
        """
        at = active, inactive
        d = differences.double()
        self.steps[at] += 1
        mean, off = d.mean().cpu(), float(d.mean()) - float(self._mean[at])
        self._mean[at] += off / int(self.steps[at])
        self._squares[at] += off * float(mean - self._mean[at])
        self._within[at] += float(d.var()) / len(d)

    def interval(self, a: int, b: int) -> tuple[float, float] | None:
        """What the loss is more with a than with b, to first order.

        Args:
            a: index of an operation.
            b: of another.

        Returns:
            Lower and upper end at the level of this look; None before both have been active twice beside the other,
            or if no difference has varied.
        """
        if min(int(self.steps[a, b]), int(self.steps[b, a])) < 2:
            return None
        parts, weighted = [], 0.0
        for at in ((a, b), (b, a)):
            t = int(self.steps[at])
            within, between = float(self._within[at]) / t, float(self._squares[at]) / (t - 1)
            parts.append(max(within, between) / t)
            weighted += parts[-1] ** 2 / (t - 1)
        total, looks = sum(parts), int(self.steps[a, b] + self.steps[b, a])
        if total == 0:
            return None
        k = len(self.steps)
        tail = self.level / (k * (k - 1) * looks * (looks + 1))
        centre = (float(self._mean[a, b]) - float(self._mean[b, a])) / 2
        half = student(tail, total**2 / weighted) * math.sqrt(total) / 2
        return centre - half, centre + half

    def lost(self, alive: Tensor, leader: int) -> list[int]:
        """Operations whose interval to the leader's excludes zero, on the side where their loss is larger.

        Args:
            alive: `[K]`, which are in the race.
            leader: index.

        Returns:
            Their indices.
        """
        found = []
        for k in alive.nonzero().flatten().tolist():
            ends = None if k == leader else self.interval(k, leader)
            if ends is not None and ends[0] > 0:
                found.append(k)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What has been gathered."""
        return {name: value.clone() for name, value in vars(self).items() if isinstance(value, Tensor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Args:
            state: of a race of as many operations.

        Raises:
            PackextError: if it is of another number.
        """
        if state["steps"].shape != self.steps.shape:
            raise px.PackextError(f"A race of {len(self.steps)} operations got the state of {len(state['steps'])}.")
        for name in self.state_dict():
            setattr(self, name, state[name].clone())
