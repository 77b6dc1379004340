"""Where on the loss's parabola the last step has ended: alpha, and the curvature along the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import packext as px
from packext.diagnostics._instrument import Instrument
from packext.diagnostics._step import Absent, SlopeDot, Step


@dataclass
class _End:
    """One end of an update: loss and slope along it, and the variances of both as means of n samples."""

    loss: float
    slope: float
    loss_variance: float
    n: int


class _Parabola(Instrument):
    """Fits a parabola to losses and slopes at both ends of an update.

    With u the update that really happened, tau its length and z the position along it in units of tau, the model is
    L(z) = w0 + w1 z + w2 z². Observed are L and its slope at z = 0 and z = 1, from the batch of the step and from that
    of the next one, each with the variance of a mean over its samples: w is the weighted least-squares fit. The
    variance of individual slopes is measured at z = 1 and serves both ends, since the direction is not known yet while
    the gradient at z = 0 is computed; of a backward pass of more than 16, on 16 samples drawn at random.
    """

    losses = True
    needs = (px.GradDot(),)

    def __init__(self) -> None:
        """Start without a step to complete."""
        self._before: _End | None = None
        self._follow: tuple[SlopeDot] | None = None

    def measure(self, step: Step) -> None:
        self._before = self._follow = None
        update, gradient = step.update, step.pure_gradient
        self._before = _end(step, step.along(gradient, update))
        self._length = float(step.update_norms[""])
        self._update = update
        self._follow = (SlopeDot(step.direction, step.number + 1),)

    def follow(self) -> tuple[SlopeDot] | None:
        return self._follow

    def conclude(self, step: Step) -> Any:
        before, follow = self._before, self._follow
        slopes = step["slope_dot"].double()
        after = _end(step, step.along(step.gradient, self._update))
        assert before is not None and follow is not None
        most = follow[0].samples
        # As many are drawn of each backward pass: one of a larger pass stands for more samples.
        stands = [n / m for n in step.counts for m in [min(n, most)] for _ in range(m)]
        variance = slopes.cov(aweights=slopes.new_tensor(stands))
        return self.read(parabola(before, after, float(variance)), self._length)

    def read(self, fit: np.ndarray, length: float) -> Any:
        """What the instrument shows of w0, w1, w2."""
        raise NotImplementedError


def _end(step: Step, slope: float) -> _End:
    losses = step.losses.double()
    if len(losses) < 2:
        raise Absent("one sample: no variance")
    return _End(float(losses.mean()), slope, float(losses.var()) / len(losses), len(losses))


def parabola(before: _End, after: _End, slope_variance: float) -> np.ndarray:
    """Fit a parabola to both ends of an update.

    Args:
        before: the end at z = 0.
        after: the end at z = 1.
        slope_variance: of individual slopes.

    Returns:
        w0, w1, w2 by weighted least squares.

    Raises:
        Absent: if an observation is not finite.
    """
    y = np.array([before.loss, after.loss, before.slope, after.slope])
    variances = np.array(
        [before.loss_variance, after.loss_variance, slope_variance / before.n, slope_variance / after.n]
    )
    if not (np.isfinite(y).all() and np.isfinite(variances).all()):
        raise Absent("not finite: a loss or slope is NaN or infinite")
    # Observations without variance count as far more certain than the others, and alike among themselves.
    largest = variances.max()
    weights = 1 / np.sqrt(np.maximum(variances, 1e-12 * largest)) if largest > 0 else np.ones(4)
    rows = np.array([[1.0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 1, 2]])
    return np.linalg.lstsq(rows * weights[:, None], y * weights, rcond=None)[0]


class Alpha(_Parabola):
    """How far an update went towards the minimum of the loss along it: -1 not at all, 0 to it, 1 as far beyond.

    With u the update that really happened and z the position along it in units of u, a parabola `w0 + w1 z + w2 z²` is
    fitted by weighted least squares to losses and slopes at z = 0, from the batch of the step, and at z = 1, from that
    of the next. Each observation weighs one over the variance of a mean over its batch. That of slopes is measured at z
    = 1, in passes of more than 16 on 16 samples drawn at random, and serves both ends. Below -1 the minimum lies
    behind. Recorded for the step when the next one has been seen; a dropout mask drawn anew counts as noise.

    - Formula: `1 / z* - 1`, with the minimum `z* = -w1 / (2 w2)`
    - Units: none
    - Cost: `GradDot`, in the pass that runs anyway; at the next step inner products of 16 samples with the update; the
      loss alone is evaluated once more at both, without its reduction
    - Source: Schneider, Dangel & Hennig 2021, section 3.1, where the variances are those of samples
    - Absent: where the parabola has no minimum ("concave") or starts at it ("flat"); without an update; for one sample;
      if the parameters have changed between the two steps; where `SampleLosses` is
    """

    def read(self, fit: np.ndarray, length: float) -> float:
        if fit[2] <= 0:
            raise Absent("concave: the parabola along the update has no minimum")
        if fit[1] == 0:
            raise Absent("flat: the update starts at the minimum of the parabola along it")
        return float(-2 * fit[2] / fit[1] - 1)


class UpdateCurvature(_Parabola):
    """Second derivative of the loss along the update, per squared length: of the parabola that `Alpha` fits.

    - Formula: `2 w2 / |u|²`
    - Units: those of the loss, over those of the parameters squared
    - Cost: `GradDot`, and all else that `Alpha` costs, once for both
    - Source: Schneider, Dangel & Hennig 2021, section 3.1, for the fit
    - Absent: as `Alpha`, but for "concave" and "flat"
    """

    def read(self, fit: np.ndarray, length: float) -> float:
        return float(2 * fit[2] / length**2)
