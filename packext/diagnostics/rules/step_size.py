"""Steps that are too long or too short."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from packext.diagnostics._verdict import Finding, Rule
from packext.diagnostics.rules._history import Fall, Recent, SinceStart, Steady, percent


class LearningRateTooHigh(SinceStart):
    """The loss is a fifth above where it began and steps are long, or it does not fall and they are very long.

    A fifth, and two standard errors of the first batch's mean, from which alone is known where it began. Of the loss
    the median of five looks counts, in three looks in a row, since a single batch's may be high by chance. None is ten
    times where it began by chance, or no number: after a very long step that is said at once.

    Long is a step of more than 2 % of the norm of the parameters (or of what their matrices have in PyTorch's
    initialisation, where that is more: a model may start at zero), and very long one of 10 %; 0.1 % is usual, and the
    first steps at the highest rates that train seldom pass 5 %. Either alone is no evidence: long steps may train, and
    a loss may rise for reasons that no learning rate mends. A diverging run often ends on a plateau without gradients,
    where nothing of it is seen any more: the longest step of the last ten counts. Some optimizers' first steps are
    their longest, as RMSprop's, which divides by averages that begin at zero. So a loss that was lower in the last
    five looks than ever before, and 3 % lower than where it began, does fall, unless its median had once risen by a
    fifth.
    """

    failure = "learning rate too high"
    advice = "Divide the learning rate by 10, or clip the gradient; warm it up if only the first steps fail."
    reads = ("Loss", "UpdateSize", "ParamNorm")
    hold, release = 1, 10
    long, stuck, patience, looks, broken = 0.02, 0.85, 10, 3, 10.0
    lower, since = 0.97, 5

    def __init__(self) -> None:
        """Start before the first step."""
        super().__init__()
        self._loss, self._length = Recent(5), Recent(10)
        self._steps = self._row = self._new = 0
        self._low, self._risen = float("inf"), False

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        loss, update, norm = values.get("Loss"), values.get("UpdateSize"), self.size(values)
        if loss is None or not self.begin(step, values) or self.first is None:
            return None
        self._steps += 1
        self._loss.add(loss)
        length = max(self._length.values, default=0.0)  # of the steps that led to this loss
        burst = not loss <= self.broken * self.first and length > 5 * self.long
        if update is not None and norm:
            self._length.add(update / norm)
            length = max(length, update / norm)
        now = loss if burst else self._loss.median
        if loss < self._low:
            self._low, self._new = loss, self._steps
        high = not now <= self.line
        self._risen = self._risen or high
        falls = not self._risen and self._low < self.lower * self.first and self._steps - self._new < self.since
        stays = self._steps > self.patience and now > self.stuck * self.first and length > 5 * self.long and not falls
        found = self._loss.full and length > self.long and (high or stays)
        self._row = self._row + 1 if found else 0
        if not burst and self._row < self.looks:
            return None
        return Finding(
            f"The loss is {now:.3g}, and was {self.began:.3g} in the first step; a step is up to {length:.2g} times as "
            "long as the parameters."
        )


class LearningRateTooLow(SinceStart):
    """After 40 looks the loss has not fallen, and steps are so short that it could not be otherwise.

    The norm of the gradient times that of the update bounds what a step can take off the loss to first order. That
    bound is under 0.5 % of it: hundreds of steps for a factor of e, if all of them went straight down. Steps are under
    0.1 % of the parameters' norm, too, which is usual. That tells this from a gradient that has vanished, under
    optimizers that make up for its size, and from labels that are mostly chance, of which no step learns more. And
    neither the rate nor steps are growing, as they do in a warm-up.

    Not fallen is by ranks since the start: it is by less than five standard errors (`Fall`). The first loss alone, of
    one batch, says little; more than half of it is left, as what falls in a few steps and then stays is not seen in
    ranks. Nothing is said while `.grad` is not empty when a step begins, since then steps do not follow the gradient.
    """

    failure = "learning rate too low"
    advice = "Multiply the learning rate by 10 until the loss falls, or stops falling."
    reads = ("Loss", "UpdateSize", "ParamNorm", "GradNorm")
    hold, release = 5, 10
    bound, short, unlearned, least = 5e-3, 1e-3, 0.5, 40

    def __init__(self) -> None:
        """Start before the first step."""
        super().__init__()
        self._loss, self._update, self._gain, self._fall = Recent(20), Recent(20), Recent(20), Fall()
        self._looks, self._steady = 0, Steady()

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        loss, update, gradient = (values.get(name) for name in ("Loss", "UpdateSize", "GradNorm"))
        norm = self.size(values)
        if loss is None or not self.begin(step, values) or self.first is None:
            return None
        if update is None or not norm or gradient is None or not update > 0:
            return None
        self._loss.add(loss)
        self._update.add(update)
        self._gain.add(gradient * update)
        self._fall.add(loss)
        self._looks += 1
        if self._steady.add(values) < self.hold or self._looks < self.least or self._fall.sure:
            return None
        mean = fmean(map(self.left, self._loss.values))
        gain, growing = self._gain.mean, self._update.values[-1] > 1.5 * self._update.values[0]
        if (
            mean > self.unlearned * self.first
            and gain < self.bound * mean
            and update < self.short * norm
            and not growing
            and not values.get("GradNorm.before")
        ):
            return Finding(
                f"A step can take {percent(gain / mean)} % off the loss at best, which is {self._loss.mean:.3g} "
                f"and was {self.began:.3g} at first; it moves the parameters by {percent(update / norm)} %."
            )
        return None


class EdgeOfStability(Rule):
    """The largest eigenvalue of the Hessian is where gradient descent with this learning rate stops to be stable.

    (2 + 2 momentum) / learning rate (Cohen et al. 2021). Not a failure as such: with full batches it is where training
    usually ends up, and the loss goes on falling, though not in every step.
    """

    failure = "edge of stability"
    advice = "No failure as such: if the loss is unsteady, a lower learning rate leaves the edge."
    reads = ("HessMaxEV", "LearningRate")
    hold, release = 5, 10
    near = 0.9

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        sharpness, edge = values.get("HessMaxEV"), values.get("LearningRate.edge")
        residual = values.get("HessMaxEV.residual", 0.0)
        if sharpness is None or edge is None or not sharpness - residual > self.near * edge:
            return None
        return Finding(f"The largest eigenvalue is {sharpness:.3g}, and steps are stable up to {edge:.3g}.")
