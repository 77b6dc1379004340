"""Loss, time, and where the parameters are going: what needs nothing but the gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from packext.diagnostics._instrument import Instrument
from packext.diagnostics._step import Absent, Step
from packext.diagnostics._tensors import norms, norms_apart


class Loss(Instrument):
    """The loss of the step: the mean of the samples' own losses, over all its backward passes."""

    def measure(self, step: Step) -> float:
        return step.loss


class Time(Instrument):
    """Seconds since the monitor was made, at the end of the step; in "Time.step" those that the step took."""

    def measure(self, step: Step) -> dict[str, float]:
        began = step.began - step.born
        return {"": began + step.seconds, ".step": step.seconds}


class GradNorm(Instrument):
    """Norm of the gradient, whole and of each parameter: the mean of the samples' own gradients, before clipping.

    Terms of the loss that pass by the extended loss (weight decay written into the loss) are part of it.
    """

    def measure(self, step: Step) -> dict[str, Any]:
        return step.gradient_norms


class UpdateSize(Instrument):
    """Norm of what the step has added to the parameters, whole and of each parameter."""

    def measure(self, step: Step) -> dict[str, Any]:
        return step.update_norms


class ParamNorm(Instrument):
    """Norm of the parameters, whole and of each; taken where the gradient is."""

    def measure(self, step: Step) -> dict[str, Any]:
        return norms(step.start)


class Distance(Instrument):
    """Distance of the parameters from where they were at the first step that was tracked, whole and of each.

    Taken where the gradient is. Holds a copy of the parameters.
    """

    def __init__(self) -> None:
        """Start without a reference point."""
        self._first: dict[str, Tensor] | None = None
        self._resumed = False

    def start(self, step: int) -> None:
        self._resumed = step > 0

    def measure(self, step: Step) -> dict[str, Any]:
        if self._resumed:
            raise Absent("the record was continued: where the parameters started is not in it")
        if self._first is None:
            self._first = step.start
        start = step.start
        if start.keys() != self._first.keys():
            raise Absent("other parameters require grad than in the first step")
        return norms_apart(start, self._first)
