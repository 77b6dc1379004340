"""Sets the rate of an optimizer at each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import packext as px
from packext.optim import _lists as lists
from packext.optim._emit import Emitting
from packext.optim._merge import Ranks
from packext.optim._work import name_of
from packext.optim.learned.policy import Averages, Policy, observation, trained, trained_for

#: Rate at which an update is proposed where the last one is smaller: at 1e-10 float32 parameters would swallow it.
PROPOSED = 1.0


class Held(px.ClippedGrad):
    """Individual gradients as factors, held until the update is known, in `held`.

    Of each parameter what was asked of the engine: the number of samples `n`, and `statistics.dots`, from a direction
    `[*p]` to inner products with it `[N]`. Nothing is clipped; it is the way in which `ClippedGrad` holds what it
    weights when the pass has ended.
    """

    savefield = "held"

    def __init__(self) -> None:
        """No norm is of any account."""
        super().__init__(1.0)

    def check(self, sample_factor: Callable[[], float]) -> None:
        """All losses will do: what they are weighted with is read where it arrives."""

    def wants(self, form: Any) -> tuple[str, ...]:
        """No norms."""
        return tuple(w for w in super().wants(form) if w != "sq_norms")

    def result(self, ask: Any) -> None:
        """At the end of the pass."""
        super().result(replace(ask, sample_factor=lambda: 1.0))

    def finish(self, asks: dict[int, Any]) -> dict[int, Any]:
        """What is held."""
        return dict(asks)


class LearnedRate:
    """Controller of an optimizer's learning rate: a learned log-linear policy.

    Example:
        >>> model = px.extend(model)
        >>> optimizer = torch.optim.RMSprop(model.parameters(), alpha=0.9, eps=1e-6)
        >>> controller = px.optim.LearnedRate(optimizer)
        >>> for x, y in batches:
        ...     optimizer.zero_grad()
        ...     with px.optim.emit(controller):
        ...         controller.watch(F.cross_entropy(model(x), y, reduction="none")).mean().backward()
        ...     optimizer.step()

    At each step the optimizer proposes an update Δω with its last rate. From the same backward pass come the changes
    `g_nᵀ Δω` that it predicts for each sample's own loss l_n, by factors that are held until Δω is known (individual
    gradients only of parameters where those are about as small). The policy sees discounted averages of
    `log Var(g_nᵀ Δω)` and `log Var(l_n)` and how uncertain these are; the update is then scaled to the rate that it
    chooses, and `lr` of the groups is set. All of this happens within `optimizer.step()`, by two hooks. Between them
    `lr` is 1 where it was less, so that no update is lost in the rounding of the parameters.

    The update has to be proportional to the rate, as it is for SGD, RMSprop, Adam, AdamW and the like. The first group
    has the chosen rate, and others keep their ratio to it. The rate at the start matters as the first "last rate" only.
    A step without an update (one that a `GradScaler` skips makes none) is not observed.

    Under `DistributedDataParallel` variances are those over the samples of all processes.

    - Formula: `lr = exp(θᵀ φ)`, between 1e-12 and 1e3, with φ both averages, the averages of their squared deviations,
      and 1
    - Cost: factors of the individual gradients are held as for `ClippedGrad`, and give inner products with the update;
      holds a copy of the parameters during the step
    - Source: Daniel, Taylor & Nowozin, AAAI 2016
    - Refused: optimizers without a trained policy, or whose update is not proportional to the rate; a closure; a batch
      of one; losses, gradients or updated parameters that are not finite

    Attributes:
        policy: as given.
        features: what the policy saw at the last step `[5]`; nothing before the first.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, policy: Policy | str | None = None, process_group: Any = None
    ) -> None:
        """Attach to an optimizer.

        Args:
            optimizer: of `torch.optim`.
            policy: or the name of one that comes with packext; by default the one that was trained for such an
                optimizer.
            process_group: over which gradients are averaged; that of all processes by default.

        Raises:
            ValueError: if no policy was trained for it, its first rate is not positive, it asks for quantities of its
                own as `KFAC` does, or updates are not proportional to the rate.
        """
        name = type(optimizer).__name__
        if isinstance(optimizer, (torch.optim.LBFGS, torch.optim.Rprop, torch.optim.ASGD, torch.optim.Adafactor)):
            raise ValueError(f"LearnedRate scales updates, and those of {name} are not proportional to its rate.")
        if isinstance(optimizer, Emitting):
            raise ValueError(
                f"{name} asks for quantities of its own: LearnedRate is for optimizers that read gradients."
            )
        self.policy = trained(policy) if isinstance(policy, str) else policy or trained_for(optimizer)
        rate = float(optimizer.param_groups[0]["lr"])
        if not (rate > 0 and math.isfinite(rate)):
            raise ValueError(
                f"LearnedRate needs a positive rate of the first group of {name} to start from, got {rate}."
            )
        self.optimizer, self.process_group = optimizer, process_group
        self._averages = Averages(self.policy.discount)
        self.features: Tensor | None = None
        self._start: list[tuple[Tensor, Tensor]] = []
        self._last: list[float] = []  # rates, while an update is proposed
        self._observed = torch.zeros(0)
        self._open = False
        self._forget()
        self._attach()

    def _attach(self) -> None:
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Leave the optimizer alone from now on, with the rate that it has."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._settle()
        self._forget()

    def get_last_lr(self) -> list[float]:
        """The rate of each group, as schedulers of torch give it."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def _set(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):  # which groups may share
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _settle(self) -> None:
        """Put back the rates that the groups had before an update was proposed, also where that has failed."""
        if self._last:
            self._set(self._last)
        self._last = []

    # -- the backward pass -------------------------------------------------------------------------
    def quantities(self) -> Sequence[Any]:
        """What the backward passes before a step have to emit."""
        return (Held(),)

    @contextmanager
    def receiving(self, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """While results come to this controller; `px.optim.emit` enters it.

        Args:
            options: of `px.backpack` that the user gave.

        Yields:
            Those with which results come.

        Raises:
            ValueError: if there are any: results would be others.
            PackextError: if one is open already.
        """
        if options:
            raise ValueError(
                f"px.optim.emit(LearnedRate, {next(iter(options))}=...): the controller chooses that itself."
            )
        if self._open:
            raise px.PackextError("px.optim.emit(LearnedRate) within itself: a backward pass would count twice.")
        self._settle()
        wanted = [p for p in self._parameters() if p.requires_grad]
        self._open = True
        try:
            yield {"attach": False, "pass_hook": self._receive, "parameters": wanted}
        finally:
            self._open = False

    def watch(self, losses: Tensor) -> Tensor:
        """Hand over each sample's own loss, and go on to what `backward()` is called on: their mean, or sum.

        Args:
            losses: of the pass's samples, in their order `[N]`.

        Returns:
            The same.

        Raises:
            ValueError: for another shape, or losses that do not come from the model.
            PackextError: outside of `px.optim.emit`.
        """
        if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.requires_grad or not len(losses):
            what = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"watch() takes a loss of each sample [N] that backward() will go through, got {what}. Of losses of "
                "tokens or pixels take the mean over all but the first axis; reduction='none' keeps samples apart."
            )
        if not self._open:
            raise px.PackextError("watch() belongs within px.optim.emit(controller), as does backward().")
        losses.register_hook(partial(self._arrived, losses.detach()))
        return losses

    def _arrived(self, losses: Tensor, g: Tensor) -> None:
        grads = [p.grad for p in self._parameters() if p.requires_grad]
        if self._passes and not any(grad is not None and bool(grad.any()) for grad in grads):
            self._forget()  # of a step that was not taken
        self._losses.append((losses, g.detach()))

    def _receive(self, results: px.Results) -> None:
        found = {p: results[p].held for p in self._parameters() if p in results}
        if found:
            self._passes.append(found)

    def _forget(self) -> None:
        self._losses: list[tuple[Tensor, Tensor]] = []
        self._passes: list[dict[Tensor, Any]] = []

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # -- the step ----------------------------------------------------------------------------------
    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if any(callable(c) for c in (*args[1:], kwargs.get("closure"))):
            raise ValueError("LearnedRate needs the backward pass before optimizer.step(): call it without a closure.")
        self._settle()
        moving = [p for p in self._parameters() if p.grad is not None]
        problem = self._problem(moving)
        mine = torch.cat([torch.zeros(0), *(losses.double().cpu() for losses, _ in self._losses)])
        everyone = Ranks(self.process_group).everyone((problem, mine))
        wrong = [f"rank {k}: {text}" if len(everyone) > 1 else text for k, (text, _) in enumerate(everyone) if text]
        if wrong:
            raise px.PackextError("LearnedRate: " + "; ".join(wrong))
        self._observed = torch.cat([losses for _, losses in everyone])
        if len(self._observed) < 2:
            raise px.PackextError("LearnedRate: a batch of one sample has no variance; take two or more.")
        self._start = [(p, p.detach().clone()) for p in moving]
        self._last = self.get_last_lr()
        self._set([rate * max(1.0, PROPOSED / self._last[0]) for rate in self._last])

    def _problem(self, moving: list[Tensor]) -> str:
        """Why this step cannot be taken; empty if it can."""
        call = "controller.watch(losses).mean().backward() in `with px.optim.emit(controller):`"
        if not self._passes or len(self._passes) != len(self._losses):
            return (
                f"{len(self._passes)} backward passes and {len(self._losses)} batches of losses were seen for this "
                f"step. Run {call}, once for each pass before optimizer.step()."
            )
        if not self.get_last_lr()[0] > 0:
            return f"the rate of the first group has become {self.get_last_lr()[0]:g}; others are multiples of it."
        for p in moving:
            where = name_of(self.optimizer, p)
            if not any(p in found for found in self._passes):
                return (
                    f"{where} has a gradient, but no extended model (px.extend) has used it in the backward pass. "
                    f"Extend that model, and run {call}."
                )
            if p.grad is not None and p.grad.layout != torch.strided:
                return f"the gradient of {where} is sparse; use dense."
        for found, (losses, arrived) in zip(self._passes, self._losses, strict=True):
            for p, ask in found.items():
                if ask.n != len(losses):
                    return (
                        f"{len(losses)} losses of a batch of {ask.n} samples, as {name_of(self.optimizer, p)} has seen "
                        "it. Of losses of tokens or pixels take the mean over all but the first axis."
                    )
            if not bool((arrived.isfinite() & (arrived != 0)).all()):
                return (
                    "backward() has to come through the loss of each sample; some have a weight of 0, or one that is "
                    "not finite. Leave these samples out of the batch."
                )
            if not bool(losses.isfinite().all()):
                bad = (~losses.isfinite()).nonzero().flatten().tolist()
                return f"losses of samples {bad[:8]} are NaN or infinite; nothing was changed."
        if not math.isfinite(lists.norm([p.grad for p in moving if p.grad is not None])):
            return "the gradient is NaN or infinite; nothing was changed."
        return ""

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        passes, given, start = self._passes, self._losses, self._start
        self._start = []
        self._forget()
        proposed = self.get_last_lr()[0]
        self._settle()
        last = self.get_last_lr()
        updates: dict[Tensor, Tensor] = {}
        for p, before in start:  # back, to stay there if the update is refused
            after = p.detach().clone()
            p.copy_(before)
            updates[p] = before.neg_().add_(after)
        changes = torch.cat(Ranks(self.process_group).everyone(self._changes(updates, passes, given)))
        changes *= last[0] / proposed
        if not bool(changes.isfinite().all()):
            raise px.PackextError(
                "LearnedRate: changes of losses that the update predicts are NaN or infinite. Parameters are as before "
                f"the step; {type(self.optimizer).__name__}'s state is not: make it anew, or load an earlier one."
            )
        if not any(bool(u.any()) for u in updates.values()):
            return  # nothing is learned from a step that was not taken
        self.features = self._averages.update(observation(changes, self._observed))
        rate = self.policy.rate(self.features)
        for p, update in updates.items():
            if not bool(torch.add(p, update, alpha=rate / proposed).isfinite().all()):
                raise px.PackextError(
                    f"LearnedRate: with the chosen rate, {rate:g}, {name_of(self.optimizer, p)} goes beyond what "
                    f"{p.dtype} holds. Parameters are as before the step; {type(self.optimizer).__name__}'s state and "
                    "the policy's averages are not: make them anew, or load earlier ones."
                )
        for p, update in updates.items():
            p.add_(update, alpha=rate / proposed)
        self._set([each * (rate / last[0]) for each in last])

    def _changes(
        self,
        updates: dict[Tensor, Tensor],
        passes: list[dict[Tensor, Any]],
        given: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """What the update changes each sample's own loss by, to first order `[N]`, of the samples of this process."""
        found = []
        for held, (losses, arrived) in zip(passes, given, strict=True):
            total = torch.zeros(len(losses), dtype=torch.float64)
            for p, update in updates.items():
                if p in held:
                    total += held[p].statistics.dots(update).double().cpu()
            found.append(total / arrived.double().cpu())  # a sample's share of what backward() was called on
        return torch.cat(found)

    # -- saving ------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Averages and weights; rates are in the optimizer's own state."""
        a = self._averages
        return {
            "weights": list(self.policy.weights),
            "discount": a.discount,
            "count": a.count,
            "mean": a.mean.tolist(),
            "spread": a.spread.tolist(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Args:
            state_dict: of a controller with the same policy.

        Raises:
            ValueError: if it is of another policy.
        """
        own = [*self.policy.weights, self.policy.discount]
        if [*state_dict["weights"], state_dict["discount"]] != own:
            raise ValueError(f"the state is of a policy with other weights or another discount than these: {own}.")
        self._averages.count = state_dict["count"]
        for name in ("mean", "spread"):
            setattr(self._averages, name, torch.tensor(state_dict[name], dtype=torch.float64))
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without a pass under way, and without hooks, which torch leaves out of copied optimizers."""
        left = ("_hooks", "_losses", "_passes")
        return {**{k: v for k, v in vars(self).items() if k not in left}, "attached": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Attach to the copy of the optimizer."""
        attached = state.pop("attached")
        vars(self).update(state)
        self._hooks = []
        self._forget()
        if attached:
            self._attach()
