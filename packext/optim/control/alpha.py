"""A learning rate that is steered by where on the loss's parabola the last step has ended."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import packext as px
from packext.optim._base import Optimizer
from packext.optim.control._base import Controller, copied, fraction, heard, individual, positive
from packext.optim.control._quantities import Samples, WrittenSlopes, WrittenSum

#: Standard deviations by which the loss has to rise for an update to count as diverged.
SURE = 3.0
#: Of the update's length: bounds of what the rates are cut to after it.
SHORTEST, LONGEST = 0.1, 0.5
#: What the package's own optimizers note in their groups: steps, parameters with a state, and whether one lacks it.
NOTED = ("steps", "kept", "lacking")


class Alpha(Controller):
    """Moves the learning rate by the moving average of alpha, how far steps have gone towards the minimum of the loss.

    For one step, alpha is -1 if it went no way at all towards the minimum of the loss along it, 0 if it ended there,
    and 1 if as far beyond: `alpha = 1 / z* - 1`, z* the minimum of a parabola w0 + w1 z + w2 z² over z in [0, 1] along
    the update that really happened, fitted by weighted least squares to losses and slopes of the batches at both ends.
    Each observation weighs by the variance of its mean over the batch: exact variances of the individual losses and of
    the individual gradients along the update; those of slopes at z = 1 serve both ends, as the update is not known yet
    when the gradients at z = 0 are. Values beyond -1 and 1 count as these; a parabola without a minimum ahead counts as
    -1 if it falls at z = 0, and as 1 if it rises.

    Example:
        >>> control = px.optim.Alpha(optimizer)
        >>> loss_fn = nn.CrossEntropyLoss(reduction="none")
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     with px.optim.emit(control):
        ...         control.loss(loss_fn(model(x), y)).backward()
        ...     optimizer.step()
        ...     control.step()

    An update that has diverged is taken back: where the losses after it are all NaN or infinite, or their mean is above
    that before by more than three standard deviations of the difference of both batches' means. Parameters and the
    optimizer's state are then put back to where they were before it, gradients become None (a step of the optimizer
    that is still to come does nothing), all rates are multiplied by z*, at least 0.1 and at most 0.5 (0.1 if there is
    no minimum ahead), and the average starts anew at 0. `rejected` counts; the next pass is from where the update
    began, with another batch.

    On a quadratic the rate goes to one over the curvature. It is greedy: it seeks the best single step, which for many
    steps in a narrow valley is too short. Where noise is much larger than the gradient, alpha is near 0 for small
    steps, and the rate stays as it was.

    - Formula: `lr <- lr exp(-kappa average)`, `average <- decay average + (1 - decay) alpha`; after a divergence
      `lr <- lr min(max(z*, 0.1), 0.5)`
    - Cost: `GradDot` with the last update and the sum of the gradients, in the pass that runs anyway; holds three
      tensors of each parameter's size, and copies of the optimizer's state
    - Source: Schneider, Dangel & Hennig 2021, section 3.1, for alpha; the controller is ours, with the bounds of a
      backtracking line search (Dennis & Schnabel 1996, section 6.3.2) for the cut
    - Refused: several processes; several passes for a step; a backward pass that did not go through `loss`; a batch of
      one; parameters that were frozen or added since the last step; an optimizer that maximises

    Attributes:
        alpha: of the last step that was completed; None before that.
        average: of alpha, which moves the learning rate.
        rejected: how many updates were taken back.
    """

    saved = ("alpha", "average", "rejected", "_before")

    def __init__(self, optimizer: torch.optim.Optimizer, kappa: float = 0.1, decay: float = 0.9) -> None:
        """Take the optimizer whose learning rates are to be moved.

        Args:
            optimizer: any; all of its groups' `lr` are multiplied.
            kappa: how fast.
            decay: weight that the moving average of alpha keeps of the past, per step.

        Raises:
            PackextError: in one of several processes.
            ValueError: for what is no optimizer, one that maximises, and numbers out of their range.
        """
        super().__init__()
        positive(self, kappa=kappa)
        fraction(self, decay=decay)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"Alpha moves the rates of an optimizer of torch, got a {type(optimizer).__name__}.")
        if any(group.get("maximize") for group in optimizer.param_groups):
            raise ValueError("Alpha is for losses that are minimised: negate the loss, and leave maximize out.")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise px.PackextError(
                f"Alpha is for one process, and this is one of {dist.get_world_size()}: each would choose rates, and "
                "take updates back, by itself."
            )
        self.optimizer, self.kappa, self.decay = optimizer, kappa, decay
        self.alpha: float | None = None
        self.average = 0.0
        self.rejected = 0
        self._before: dict[str, Any] | None = None
        self._losses: tuple[Tensor, list[Tensor]] | None = None  # and what has reached them
        self._update: dict[Tensor, Tensor] = {}

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    @contextmanager
    def receiving(self, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """As that of any controller; the update since the last pass is what the pass is to be projected on."""
        params = self._params()
        self._start = [p.detach().clone() for p in params]
        self._kept = _state(self.optimizer)
        self._update = {}
        if self._before is not None:
            olds = self._before["start"]
            if [o.shape for o in olds] != [p.shape for p in params]:
                raise px.PackextError("Alpha: parameters were frozen, added or exchanged since the last step.")
            update = [p.detach() - old.to(p) for p, old in zip(params, olds, strict=True)]
            if any(bool(u.any()) for u in update):
                self._update = dict(zip(params, update, strict=True))
        with super().receiving(options) as own:
            yield {"parameters": params, **own}

    def loss(self, losses: Tensor) -> Tensor:
        """The mean loss of a batch.

        Args:
            losses: individual losses `[N]`, one for each sample.

        Returns:
            Their mean, to call `backward()` on; what else multiplies it (a loss scale) does not matter.

        A ValueError refuses losses of another shape.
        """
        self._losses = individual(self, losses), heard(losses)
        return losses.mean()

    def quantities(self) -> list[Any]:
        """The mean gradient, and projections on the last update once there is one."""
        return [WrittenSum(), Samples(), *([WrittenSlopes(self._update)] if self._update else [])]

    def observe(self, results: px.Results) -> dict[str, Any]:
        """Number of samples, mean gradient, and the individual slopes along the update."""
        n = results.own_samples
        if (
            self._losses is None
            or len(self._losses[1]) != 1
            or len(self._losses[0]) != n
            or not self._losses[1][0].any()
        ):
            return {"samples": n, "losses": None}
        losses, (reached,) = self._losses
        factor = 1 / float(reached[0])  # from the loss as written to the samples' own
        mean = [results[p].written_sum * (factor / n) if p in results else torch.zeros_like(p) for p in self._params()]
        slopes = results.slopes.double() * factor if self._update else None
        start, update = {"start": self._start, "state": self._kept}, [*self._update.values()]
        losses = losses.detach().double()
        return {"samples": n, "losses": losses, "mean": mean, "slopes": slopes, "update": update, **start}

    def step(self) -> None:
        """Complete alpha of the last update, and move the learning rates; or take a diverged update back.

        Raises:
            PackextError: without a pass through the loss that `loss` gave, and for a batch of one.
        """
        seen, self._losses = self._take(), None
        if seen["losses"] is None:
            raise px.PackextError(
                "Alpha: the backward pass did not go through control.loss(losses), with one loss for each of its "
                f"{seen['samples']} samples, once: the losses are not known."
            )
        each, n, slopes, old = seen["losses"], seen["samples"], seen["slopes"], self._before
        norm = math.sqrt(sum(float(m.double().square().sum()) for m in seen["mean"]))
        here = {"loss": float(each.mean()), "loss_variance": float(each.var()) / n, "samples": n}
        numbers = {"loss": here["loss"], "gradient": norm}
        if slopes is None or old is None:
            if self._finite({**numbers, "variance of losses": here["loss_variance"]}):
                self._before = {**here, **{name: seen[name] for name in ("mean", "start", "state")}}
            return
        along = zip(old["mean"], seen["update"], strict=True)
        before = sum(float((m.to(u) * u).sum(dtype=torch.float64)) for m, u in along)
        slope, variance = float(slopes.mean()), float(slopes.var())
        y = [old["loss"], here["loss"], before, slope]
        variances = [old["loss_variance"], here["loss_variance"], variance / old["samples"], variance / n]
        if not bool(each.isfinite().any()) or y[1] - y[0] > SURE * math.sqrt(variances[0] + variances[1]):
            fitted = parabola(y, variances)[1:] if np.isfinite([*y, *variances]).all() else (0.0, 0.0)
            return self._take_back(old, *map(float, fitted))
        numbers |= {"slope along the last update": slope, "variance of slopes": variance, "slope before it": before}
        if not self._finite({**numbers, "variance of losses": here["loss_variance"]}):
            return
        self.alpha = alpha_of(*parabola(y, variances)[1:])
        self.average = self.decay * self.average + (1 - self.decay) * self.alpha
        self._multiply(math.exp(-self.kappa * self.average))
        self._before = {**here, **{name: seen[name] for name in ("mean", "start", "state")}}

    def _take_back(self, old: dict[str, Any], w1: float, w2: float) -> None:
        """Undo the last update, and whatever step has followed on it."""
        for p, start in zip(self._params(), old["start"], strict=True):
            p.detach().copy_(start)
            p.grad = None
        _restore(self.optimizer, old["state"])
        self.alpha, self.average, self.rejected = 1.0, 0.0, self.rejected + 1
        self._multiply(min(max(-w1 / (2 * w2), SHORTEST), LONGEST) if w1 < 0 < w2 else SHORTEST)

    def _multiply(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor


def _state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of an optimizer's state, by the parameters' places, and of what its groups say of it."""
    places = [p for group in optimizer.param_groups for p in group["params"]]
    # The package's own optimizers replace what is in their state, and never write into it.
    copy = dict if isinstance(optimizer, Optimizer) else copied
    states = [copy(optimizer.state[p]) if p in optimizer.state else None for p in places]
    groups = [{name: group[name] for name in NOTED if name in group} for group in optimizer.param_groups]
    return {"states": states, "groups": groups}


def _restore(optimizer: torch.optim.Optimizer, kept: dict[str, Any]) -> None:
    places = [p for group in optimizer.param_groups for p in group["params"]]
    for p, state in zip(places, kept["states"], strict=True):
        optimizer.state.pop(p, None)
        if state is not None:
            optimizer.state[p] = copied(state)
    for group, noted in zip(optimizer.param_groups, kept["groups"], strict=True):
        group.update(noted)


def parabola(y: list[float], variances: list[float]) -> np.ndarray:
    """Weighted least-squares fit of w0 + w1 z + w2 z² to losses and slopes at z = 0 and z = 1.

    Args:
        y: loss at 0, loss at 1, slope at 0, slope at 1.
        variances: of each. Zeros count as far smaller than the others, and alike among themselves.

    Returns:
        w0, w1, w2.
    """
    largest = max(variances)
    weights = 1 / np.sqrt(np.maximum(variances, 1e-12 * largest)) if largest > 0 else np.ones(4)
    rows = np.array([[1.0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 1, 2]])
    return np.linalg.lstsq(rows * weights[:, None], np.array(y) * weights, rcond=None)[0]


def alpha_of(w1: float, w2: float) -> float:
    """Where between -1 and 1 a step has ended, by the parabola along it."""
    if w1 >= 0:  # downhill was behind the step; a flat start is the minimum itself, if there is one
        return 1.0 if w1 > 0 or w2 > 0 else -1.0
    return -1.0 if w2 <= 0 else float(min(max(-2 * w2 / w1 - 1, -1.0), 1.0))
