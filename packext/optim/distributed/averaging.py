"""Local steps between averages of the parameters, as many as their spread allows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.model_averaging.averagers import ModelAverager

import packext as px
from packext.optim._merge import Ranks
from packext.optim.distributed._processes import same_world, waiting, world


class AdaptiveAverager(ModelAverager):
    """Averages parameters with a period that keeps their spread in proportion to the learning rate.

    ADPSGD (not the asynchronous AD-PSGD), for `torch.distributed.optim.PostLocalSGDOptimizer`. Where groups have
    learning rates of their own, s is the sum over the groups. For the first `calibration` steps the period p stays, and
    c is the mean of all s. Then p grows by one if s < low c, and shrinks by one, at the least to 1, if s > high c.

    With `predicted=True`, p is not found by trial after that: n processes that take p plain SGD steps on their own, on
    batches of B samples, are expected to have s = (1 - 1/n) p lr tr(Sigma) / B, where Sigma is the covariance of the
    samples' gradients. `predict` takes the trace from `px.Variance`, and sets the period with s = c.

    Unlike torch's averagers, all parameters with `requires_grad` are averaged, whether or not this process has a
    gradient of them, and in place. Buffers are not averaged. All processes take equally many steps.

    - Formula: `s = mean over the processes j of |w_j - mean(w)|² / lr`, kept between low c and high c
    - Cost: the parameters and one number are sent once in p steps; `Variance` of a pass for `predict`
    - Source: Jiang & Agrawal 2020 (arXiv:2007.06134); the limits 0.7 and 1.3 are as we recall them, the prediction is
      ours
    - Refused: parameters without groups; an optimizer of `px.optim` that reads of all processes; a spread that is not
      finite; a process that does not answer

    Example:
        >>> averager = AdaptiveAverager(period=4, calibration=100)
        >>> optimizer = PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), 0.1), averager)
        >>> ...  # an ordinary loop
        >>> averager.flush(optimizer.param_groups)  # before the model is evaluated

    Attributes:
        period: p, in steps.
        target: c, in squared units of parameters over those of the learning rate; None before the first average.
        averages: how often parameters were averaged.
        payload: bytes that this process has handed over to be summed.
    """

    def __init__(
        self,
        period: int = 4,
        *,
        calibration: int = 100,
        low: float = 0.7,
        high: float = 1.3,
        predicted: bool = False,
        process_group: Any = None,
    ) -> None:
        """Choose the rule.

        Args:
            period: of the calibration, a few steps.
            calibration: its length in steps, at least one period.
            low: below this multiple of the target the period grows.
            high: above it the period shrinks.
            predicted: whether `predict` sets the period.
            process_group: of the processes that train together; by default all.

        Raises:
            ValueError: for a period below one, a calibration without an average, or limits that are not 0 < low <=
                high.
        """
        if not (1 <= period <= calibration and 0 < low <= high):
            raise ValueError(
                f"need 1 <= period <= calibration and 0 < low <= high, got {period}, {calibration}, {low} and {high}."
            )
        self.size, self.rank = world(process_group)
        super().__init__(process_group)
        self.period, self.calibration, self.low, self.high, self.predicted = period, calibration, low, high, predicted
        self.target: float | None = None
        self.averages = self.payload = self._since = self._measured = 0

    def average_parameters(self, params: Iterable[dict[str, Any]]) -> None:
        """Count a step, and average if the period is over; `PostLocalSGDOptimizer` calls it.

        Args:
            params: groups of an optimizer, with their learning rates.

        Raises:
            PackextError: for parameters without groups, an optimizer of `px.optim` that reads of all processes, a
                spread that is not finite, or a process that does not answer.
        """
        groups = list(params)
        if not all(isinstance(group, dict) and "lr" in group for group in groups):
            raise px.PackextError("AdaptiveAverager needs an optimizer's param_groups, for their learning rates.")
        together = max(group.get("processes", 1) for group in groups)
        if together >= self.size > 1:
            raise px.PackextError(
                "AdaptiveAverager: processes step on their own gradients between two averages, and the optimizer of "
                f"px.optim puts what it reads beside them together over {together} processes: give it a group of this "
                "process alone, process_group=[torch.distributed.new_group([k]) for k in range(world_size)][rank]."
            )
        self.step += 1
        self._since += 1
        if self._since < self.period:
            return
        spread = self._average(groups)
        if spread is None:  # a learning rate of zero
            return
        if self.step <= self.calibration or self.target is None:
            self._measured += 1  # fewer than `averages`, which counts those of `flush` and of a rate of zero, too
            self.target = spread if self.target is None else self.target + (spread - self.target) / self._measured
        elif not self.predicted:
            self.period += (spread < self.low * self.target) - (spread > self.high * self.target)
            self.period = max(1, self.period)

    def predict(self, trace: float | Tensor, samples: int, lr: float) -> None:
        """Set the period from the variance of the samples' gradients; all processes call it after the same step.

        Args:
            trace: sum over all parameters of `px.Variance` in `px.backpack(..., scale="sample")`, here, which divides
                by B.
            samples: B, of the batch here, at least 2.
            lr: learning rate.

        Raises:
            PackextError: before there is a target, or if the variance is no number here or elsewhere.
            ValueError: for fewer than two samples, which have no variance.
        """
        if samples < 2:
            raise ValueError(f"a variance needs at least two samples, got {samples}.")
        if self.target is None:
            raise px.PackextError("AdaptiveAverager.predict: there is no target before the first average.")
        with waiting("AdaptiveAverager.predict"):
            noise = sum(Ranks(self.process_group).everyone(float(trace) / (samples - 1)))
        if not 0 <= noise < math.inf:
            raise px.PackextError(f"AdaptiveAverager.predict: the variances sum to {noise} over all processes.")
        growth = (1 - 1 / self.size) * lr * noise / self.size
        if self.predicted and self.step >= self.calibration and growth > 0:
            self.period = max(1, math.floor(self.target / growth))

    def flush(self, params: Iterable[dict[str, Any]]) -> None:
        """Average now, by all processes, and begin a new period; the rule learns nothing from it.

        Args:
            params: groups of the optimizer.
        """
        self._average(list(params))

    @torch.no_grad()
    def _average(self, groups: Sequence[dict[str, Any]]) -> float | None:
        """Average the parameters; s, or None where a learning rate is zero."""
        groups = [group for group in groups if any(p.requires_grad for p in group["params"])]
        parameters = [[p for p in group["params"] if p.requires_grad] for group in groups]
        flat = [torch.cat([p.detach().reshape(-1) for p in group]) for group in parameters]
        with waiting(f"AdaptiveAverager, step {self.step}"):
            means = [t / self.size for t in flat]
            for mean in means:
                dist.all_reduce(mean, group=self.process_group)
                self.payload += mean.numel() * mean.element_size()
            off = [((t - mean).double() ** 2).sum().cpu() for t, mean in zip(flat, means, strict=True)]
            rates = [float(group["lr"]) for group in groups]
            spread = sum((t / lr if lr else t for t, lr in zip(off, rates, strict=True)), torch.zeros(()).double())
            spread = spread.to(flat[0].device)
            dist.all_reduce(spread, group=self.process_group)
        if not spread.isfinite():
            raise px.PackextError(
                f"AdaptiveAverager, step {self.step}: parameters of some process are not finite. Nothing was averaged; "
                "start again from the last checkpoint."
            )
        for group, mean in zip(parameters, means, strict=True):
            for p, part in zip(group, mean.split([p.numel() for p in group]), strict=True):
                p.copy_(part.view_as(p))
        self._since = 0
        self.averages += 1
        return float(spread) / self.size if all(rates) else None

    def state_dict(self) -> dict[str, Any]:
        """The rule's state, which `PostLocalSGDOptimizer.state_dict` has not; a file for each rank."""
        fields = ("period", "target", "averages", "payload", "step", "_since", "_measured")
        return {"world": (self.size, self.rank), **{name: getattr(self, name) for name in fields}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called; in another world or rank only if parameters had just been averaged."""
        if state["_since"]:
            same_world(state["world"], self.process_group, "state of AdaptiveAverager")
        for name, value in state.items():
            if name != "world":
                setattr(self, name, value)
