"""Loss, time, and where the parameters are going: what needs nothing but the gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from packext.diagnostics._instrument import Instrument
from packext.diagnostics._step import Absent, Step, same
from packext.diagnostics._tensors import norms, norms_apart


class Loss(Instrument):
    """The loss of the step, over all its backward passes.

    - Formula: mean of the samples' own losses l_n
    - Units: those of the loss
    - Cost: a number is read; no quantity
    - Source: the definition
    - Absent: if no backward pass came through an extended loss
    """

    def measure(self, step: Step) -> float:
        return step.loss


class Time(Instrument):
    """Seconds since the monitor was made, at the end of the step; in "Time.step" those that the step took.

    - Formula: difference of two readings of `time.perf_counter`; work of a GPU that nobody has waited for is not in it
    - Units: seconds
    - Cost: none; no quantity
    - Source: the definition
    - Absent: never
    """

    def measure(self, step: Step) -> dict[str, float]:
        began = step.began - step.born
        return {"": began + step.seconds, ".step": step.seconds}


class GradNorm(Instrument):
    """Norm of the gradient, whole and of each parameter: of the mean of the samples' own gradients, before clipping.

    Terms of the loss that pass by the extended loss (weight decay written into the loss) are part of it. What was in
    `.grad` when the step's first backward pass began is not; "GradNorm.before" is its norm, where there was something.

    - Formula: `|g|`, g from `.grad`
    - Units: those of the loss, over those of the parameters
    - Cost: a copy of the gradient; no quantity
    - Source: the definition
    - Absent: if no parameter has got a gradient
    """

    def measure(self, step: Step) -> dict[str, Any]:
        return {**step.gradient_norms, ".before": before} if (before := step.before) else step.gradient_norms


class UpdateSize(Instrument):
    """Norm of what the step has added to the parameters, whole and of each parameter, whoever did it.

    - Formula: `|θ_after - θ_before|`
    - Units: those of the parameters
    - Cost: a copy of the parameters; no quantity
    - Source: the definition
    - Absent: if the parameters did not change
    """

    def measure(self, step: Step) -> dict[str, Any]:
        return step.update_norms


class ParamNorm(Instrument):
    """Norm of the parameters, whole and of each; taken where the gradient is.

    - Formula: `|θ|`
    - Units: those of the parameters
    - Cost: a copy of the parameters, which several instruments share; no quantity
    - Source: the definition
    - Absent: if no backward pass came through an extended loss
    """

    def measure(self, step: Step) -> dict[str, Any]:
        return norms(step.start)


class Distance(Instrument):
    """Distance of the parameters from where they were at the first step that was tracked, whole and of each.

    Taken where the gradient is.

    - Formula: `|θ - θ_0|`
    - Units: those of the parameters
    - Cost: a copy of the parameters that is held; no quantity
    - Source: the definition
    - Absent: in a record that was continued; if other parameters require grad than in the first step, also others of
      the same names
    """

    def start(self, step: int) -> None:
        self._first: dict[str, Tensor] | None = None
        self._resumed = step > 0

    def measure(self, step: Step) -> dict[str, Any]:
        if self._resumed:
            raise Absent("the record was continued: where the parameters started is not in it")
        if self._first is None:
            self._first, self._parameters = step.start, step.parameters
        start = step.start
        if not same(self._parameters, step.parameters):
            raise Absent("other parameters require grad than in the first step")
        return norms_apart(start, self._first)
