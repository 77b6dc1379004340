"""Gradient descent whose step sizes are found by a line search that knows how noisy it sees."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import packext as px
from packext.optim._base import SkippedStep
from packext.optim.control._base import individual, positive
from packext.optim.control._gaussian import Posterior
from packext.optim.control._quantities import WrittenDots, WrittenSlopes, WrittenSum

#: Constants of the paper: of the Wolfe conditions, of their probability, evaluations of a search, growth of the trial
#: step, and the running average of steps that it is put back to when it is so many times larger or smaller.
C1, C2, ACCEPTED = 0.05, 0.5, 0.3
EVALUATIONS = 7
GROWTH, MEMORY, FAR = 1.3, 0.95, 100.0
#: In units of the trial step: what is taken where the line rises at its start, and the factor after what overflows.
TINY, SHRINK = 0.01, 0.1


class Seen(NamedTuple):
    """What one batch shows of a point: loss, mean gradients, and of both the variance of the mean.

    Attributes:
        loss: mean loss.
        loss_variance: of it.
        slope: along the line.
        slope_variance: of it.
        square: squared norm of the mean gradient.
        square_variance: of the individual gradients along it, over their number.
        gradients: mean gradient of each parameter.
    """

    loss: float
    loss_variance: float
    slope: float
    slope_variance: float
    square: float
    square_variance: float
    gradients: list[Tensor]

    @property
    def finite(self) -> bool:
        """Whether all numbers are."""
        return all(map(math.isfinite, self[:-1]))


class ProbabilisticLineSearch(torch.optim.Optimizer):
    """Gradient descent without a learning rate to tune: each step is found by a probabilistic line search.

    Along the negative gradient of the last batch, losses and slopes of new batches are modelled by a Gaussian process
    (an integrated Wiener process), and a step is taken where the strong Wolfe conditions hold with a probability above
    0.3; of several trials for which they do, where the posterior mean of the loss is least. Further trials are a
    minimum of that mean between trials or a step beyond all, whichever has the largest expected improvement times that
    probability; 0.01 of the trial step is taken where the mean rises at the start. The next search starts with 1.3
    times the step (a moving average of steps where that is a hundred times more or less), and at the accepted batch's
    gradient: one evaluation for most steps, seven at most, after which the trial with the least mean is taken.

    The noise of a loss is the variance of the individual losses over their number, that of a slope the variance of the
    individual gradients along the line, over their number. The authors sum the variances of single entries instead, as
    if entries were uncorrelated; on digits that is a small part of it (docs/controllers.md).

    Example:
        >>> optimizer = px.optim.ProbabilisticLineSearch(model.parameters())
        >>> loss_fn = nn.CrossEntropyLoss(reduction="none")
        >>> batches = iter(loader)
        >>> def closure():
        ...     x, y = next(batches)  # a new batch at each call
        ...     return loss_fn(model(x), y)
        >>> loss = optimizer.step(closure)

    Batches are to be large enough that a slope is seen at all: with batches of mostly noise, steps are of the size of
    the trial. As in the paper, the slope at the start is that of the batch which gave the direction, and so too steep
    by the trace of the gradients' covariance over their number.

    A trial that is not finite is not believed: the trial step is taken ten times smaller. Where no trial is
    finite, parameters and state are put back, and a `SkippedStep` warning says so.

    - Formula: `θ <- θ - t g` with the first t for which `f(t) <= f(0) + c1 t f'(0)` and `|f'(t)| <= c2 |f'(0)|`, c1 =
      0.05 and c2 = 0.5, have a joint probability above 0.3
    - Cost: a pass for each trial, with two `GradDot` (along the line, and with the gradient) and the sum of the
      gradients; holds a gradient for each trial, eight at most
    - Source: Mahsereci & Hennig, JMLR 2017, Algorithm 1
    - Refused: a batch of one; several groups or processes; parameters that no extended model has used

    Attributes:
        evaluations: calls of the closure in the last step.
        skipped: how many steps were skipped since the optimizer was made or loaded.
    """

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        """Choose.

        Args:
            params: as for any optimizer of torch, in one group.
            lr: the first trial step, in units of the gradient; later ones are in `param_groups[0]["lr"]`.

        Raises:
            PackextError: in one of several processes.

        A ValueError refuses a trial step that is not positive, and several groups.
        """
        positive(self, lr=lr)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise px.PackextError(
                f"ProbabilisticLineSearch is for one process, and this is one of {dist.get_world_size()}: each would "
                "take steps of its own."
            )
        super().__init__(params, {"lr": lr, "average": lr})
        self.skipped = self.evaluations = 0
        self._start: Seen | None = None
        self._versions: list[int] = []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, once.

        Raises:
            ValueError: for a second group.
        """
        if self.param_groups:
            raise ValueError("ProbabilisticLineSearch takes one group: there is one step for all.")
        super().add_param_group(param_group)

    def _params(self) -> list[Tensor]:
        return [p for p in self.param_groups[0]["params"] if p.requires_grad]

    def step(self, closure: Callable[[], Tensor]) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Search, and step.

        Args:
            closure: draws a new batch, and returns its individual losses `[N]`. It is called once or more; gradients
                are zeroed and computed here, without `px.optim.emit`.

        Returns:
            The mean loss where the step has ended, by the accepted trial's batch; None if the step was skipped.

        A ValueError refuses losses that are not one for each sample, a PackextError batches of one and parameters that
        no extended model uses. Parameters are as before then.
        """
        params = self._params()
        origin = [p.detach().clone() for p in params]
        self.evaluations, stood = 0, self._stands()
        try:
            start = self._start
            if start is None or len(start.gradients) != len(params) or not stood:
                start = self._evaluate(closure, params, None)  # parameters were written to since, or this is the first
            if not start.finite:
                return self._skip("the loss or the gradient is NaN or infinite")
            if start.square == 0:
                self._start = start
                return start.loss
            found = self._search(closure, params, origin, start)
        except BaseException:
            self._put_back(params, origin, stood)
            raise
        if found is None:
            self._put_back(params, origin, stood)
            return self._skip("the loss or the gradient is NaN or infinite at all trial steps")
        step, self._start = found
        _move(params, origin, start.gradients, -step)
        group = self.param_groups[0]
        group["average"] = MEMORY * group["average"] + (1 - MEMORY) * step
        lr = GROWTH * step
        group["lr"] = lr if group["average"] / FAR <= lr <= group["average"] * FAR else group["average"]
        for p, g in zip(params, self._start.gradients, strict=True):
            self.state[p] = {"gradient": g}
        group["start"] = [*self._start[:-1]]
        self._versions = [p._version for p in params]
        return self._start.loss

    def _put_back(self, params: list[Tensor], origin: list[Tensor], stood: bool) -> None:
        _move(params, origin)
        if stood:  # what is saved still does; the next search looks anew all the same, by another batch
            self._start, self._versions = None, [p._version for p in params]

    def _skip(self, why: str) -> None:
        self.skipped += 1
        warnings.warn(f"ProbabilisticLineSearch skipped a step: {why}.", SkippedStep, stacklevel=4)

    def _search(
        self, closure: Callable[[], Tensor], params: list[Tensor], origin: list[Tensor], start: Seen
    ) -> tuple[float, Seen] | None:
        """The step that is accepted, in units of the gradient, and what was seen there; None if nothing is finite."""
        unit, slope = self.param_groups[0]["lr"], start.square
        direction = dict(zip(params, (-g for g in start.gradients), strict=True))
        begin = start._replace(slope=-slope, slope_variance=start.square_variance)
        seen, at, reach, trial, tiny = [begin], [0.0], 1.0, 1.0, False
        for _ in range(EVALUATIONS):
            _move(params, origin, start.gradients, -trial * unit)
            new = self._evaluate(closure, params, direction)
            if not new.finite:
                # Too far, most likely: what was seen nearer is kept, in the new unit.
                unit, at, reach, trial = unit * SHRINK, [t / SHRINK for t in at], 1.0, 1.0
                if len(seen) > 1:
                    break
                continue
            seen.append(new)
            at.append(trial)
            if tiny:
                return trial * unit, new
            posterior = _posterior(at, seen, unit, slope)
            good = [k for k in range(1, len(at)) if posterior.wolfe(at[k], C1, C2) > ACCEPTED]
            if good:
                best = min(good, key=lambda k: posterior.mean(at[k])[0])
                return at[best] * unit, seen[best]
            if posterior.mean(0.0)[1] > 0:
                trial, tiny = TINY, True
                continue
            lowest = min(posterior.mean(t)[0] for t in at)
            candidates = [*posterior.minima(), max(at) + reach]
            worth = [posterior.improvement(t, lowest) * posterior.wolfe(t, C1, C2) for t in candidates]
            best = max(range(len(candidates)), key=worth.__getitem__)
            trial = candidates[best]
            if best == len(candidates) - 1:
                reach *= 2
        if len(seen) == 1:
            return None
        posterior = _posterior(at, seen, unit, slope)
        best = min(range(1, len(at)), key=lambda k: posterior.mean(at[k])[0])
        return at[best] * unit, seen[best]

    def _evaluate(
        self, closure: Callable[[], Tensor], params: list[Tensor], direction: dict[Tensor, Tensor] | None
    ) -> Seen:
        wanted = [WrittenSum(), WrittenDots(), *([] if direction is None else [WrittenSlopes(direction)])]
        self.evaluations += 1
        self.zero_grad()
        with torch.enable_grad(), px.backpack(*wanted, attach=False, parameters=params) as results:
            losses = individual(self, closure())
            losses.mean().backward()
        with torch.no_grad():
            dots, each = results.written_dots.double(), losses.detach().double()
            n = len(dots)
            if len(each) != n:
                raise ValueError(f"ProbabilisticLineSearch: {len(each)} losses for a batch of {n} samples.")
            dots = dots * n  # of the samples' own gradients, N times those of their mean, with the mean
            if n < 2:
                raise px.PackextError(
                    "ProbabilisticLineSearch: a batch of one has no variance. With a DataLoader, drop_last=True leaves "
                    "out the short batch."
                )
            missing = [k for k, p in enumerate(params) if p not in results]
            if missing:
                raise px.PackextError(
                    f"ProbabilisticLineSearch: parameter {missing[0]}, shape {list(params[missing[0]].shape)}, was not "
                    "used by an extended model (px.extend) in the backward pass: leave it out, or freeze it."
                )
            slopes = torch.zeros(n) if direction is None else results.slopes.double() * n
            return Seen(
                float(each.mean()),
                float(each.var()) / n,
                float(slopes.mean()),
                float(slopes.var()) / n,
                float(dots.mean()),
                float(dots.var()) / n,
                [results[p].written_sum.to(p.dtype) for p in params],
            )

    # -- saving ------------------------------------------------------------------------------------
    def _stands(self) -> bool:
        """Whether parameters are where the next search is to start, and nobody has written to them since."""
        return self._versions == [p._version for p in self._params()]

    def state_dict(self) -> dict[str, Any]:
        """As torch's; without the gradient at the start if parameters were written to since it was computed."""
        if not self._stands():
            self.param_groups[0].pop("start", None)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; the next search starts from the saved gradient, unless parameters are written to before it."""
        super().load_state_dict(state_dict)
        self.skipped, self._start = 0, None
        params, numbers = self._params(), self.param_groups[0].get("start")
        if numbers is not None and all("gradient" in self.state[p] for p in params):
            self._start = Seen(*numbers, gradients=[self.state[p]["gradient"] for p in params])
            self._versions = [p._version for p in params]

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what torch keeps, the counts, and where the next search starts."""
        start = self._start if self._stands() else None
        own = {"skipped": self.skipped, "evaluations": self.evaluations, "_start": start}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The copy's parameters are as they were."""
        super().__setstate__(state)
        self._versions = [p._version for p in self._params()]


def _move(params: list[Tensor], origin: list[Tensor], along: list[Tensor] | None = None, factor: float = 0.0) -> None:
    with torch.no_grad():
        for k, (p, o) in enumerate(zip(params, origin, strict=True)):
            p.copy_(o if along is None else o.add(along[k], alpha=factor))


def _posterior(at: list[float], seen: list[Seen], unit: float, slope: float) -> Posterior:
    """Of the line in units in which it starts at 0 with slope -1, and the trial step is 1."""
    scale, base = unit * slope, seen[0].loss
    y = [((s.loss - base) / scale, s.slope / slope) for s in seen]
    noise = [(s.loss_variance / scale**2, s.slope_variance / slope**2) for s in seen]
    return Posterior(at, y, noise)
