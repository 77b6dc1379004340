"""What all optimizers share: reading quantities, refusing, skipping steps that are not finite, and composing parts."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

import packext as px
from packext.optim import _lists as lists
from packext.optim._emit import emit
from packext.optim._merge import Ranks, absent, joined, received, tensors_of
from packext.optim._parts import Adam, DecoupledDecay, Descend
from packext.optim._work import GATHERED, Part, Skip, Work, name_of, placed

#: What a group with `fallback=True` gets where it does not say otherwise.
FALLBACK = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}

#: What torch's optimizers find in a group, and no part here does.
TORCHS = ("nesterov", "amsgrad", "dampening")

EMPIRICAL = (
    "squares of gradients do not scale as the loss does, so that a share of a sum of losses, or a scaled loss, is not "
    "known from them; drawn targets (mc) have no such limit."
)


class SkippedStep(RuntimeWarning):
    """A step was not taken, as it says why; parameters and state are as before."""


class Optimizer(torch.optim.Optimizer):
    """A `torch.optim` optimizer made of parts, that reads more of the backward pass than the gradient.

    Example:
        >>> optimizer = px.optim.Optimizer(
        ...     model.parameters(), [px.optim.Diagonal("diag_ggn_mc", damping=0.1), px.optim.Descend(lr=0.1)]
        ... )
        >>> with px.optim.emit(optimizer):
        ...     loss_fn(model(x), y).backward()
        >>> optimizer.step()

    A group with `fallback=True` (and a learning rate of its own) is trained by AdamW: for parameters that have no such
    quantity. Gradients may be accumulated over several passes, each within `emit`; quantities then are those of the sum
    of the losses. Under `DistributedDataParallel` they are those of the mean of the processes' losses. A gradient that
    is clipped or changed by hand between backward pass and step is taken as it is; curvature stays that of the loss.

    A step whose gradients, quantities or updates are not finite is skipped with a `SkippedStep` warning, and leaves
    parameters and state as they were. So does a step that raises.

    Attributes:
        skipped: how many steps were skipped since the optimizer was made or loaded.
        ranks: the processes.
    """

    def __init__(
        self,
        params: Any,
        parts: Sequence[Part],
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        """Compose.

        Args:
            params: as for any optimizer of torch: tensors, groups, or pairs of names and tensors.
            parts: run one after the other; the last is `Descend`, which gives updates their sign and rate.
            seed: of random draws in the backward pass. They are a function of the seed, the number of steps and the
                rank; torch's random numbers are left alone.
            process_group: over which gradients are averaged; that of all processes by default.

        Raises:
            TypeError: for another thing than a list of parts.
            ValueError: for hyperparameters out of range, two parts that want the same one, none that has a learning
                rate, or a part after `Descend`.
        """
        one = isinstance(parts, Part)
        parts = [parts] if one else list(parts)
        wrong = parts if one else [part for part in parts if not isinstance(part, Part)]
        if wrong:
            raise TypeError(
                f"parts must be a list such as [px.optim.Momentum(), px.optim.Descend()], got {wrong[0]!r}."
            )
        defaults: dict[str, Any] = {"fallback": False, "steps": 0, "kept": 0, "lacking": False, "seed": seed}
        defaults["processes"] = 1  # of the last step, for who sees the groups alone
        for part in parts:
            twice = defaults.keys() & part.defaults.keys()
            if twice:
                raise ValueError(f"two parts have a hyperparameter {sorted(twice)[0]!r}: {type(part).__name__} is one.")
            defaults.update(part.defaults)
        own = next(kind for kind in type(self).__mro__ if kind.__module__.partition(".")[0] == "packext")
        defaults["kind"] = f"{own.__name__} ({', '.join(part.kind for part in parts)})"
        if "lr" not in defaults:
            raise ValueError("no part has a learning rate: updates get it, and their sign, from Descend(lr), the last.")
        early = [k for k, part in enumerate(parts[:-1]) if isinstance(part, Descend)]
        if early:
            after = type(parts[early[0] + 1]).__name__
            raise ValueError(f"Descend is the last part, and {after} comes after it: updates have their sign by then.")
        self.parts = parts
        self._last = [Adam(), DecoupledDecay(), Descend()]
        self.generator = torch.Generator()
        self.ranks = Ranks(process_group)
        self.skipped = 0
        self._received: dict[Tensor, dict[str, Any]] = {}
        self._open = False
        self._forget()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, with hyperparameters checked.

        Raises:
            ValueError: for a negative learning rate, damping or the like, an argument that is not of groups, or
                parameters that are not real.
        """
        if isinstance(param_group, dict):
            self._refuse_unread(param_group)
        if isinstance(param_group, dict) and param_group.get("fallback"):
            if "lr" not in param_group:
                raise ValueError("a group with fallback=True is trained by AdamW and needs a learning rate of its own.")
            param_group = {**FALLBACK, **param_group}
        if self.param_groups:
            param_group = {**param_group, "steps": self.steps}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name, value in group.items():
                check(type(self).__name__, name, value)
            alike(type(self).__name__, self.param_groups)
            if any(p.is_complex() for p in group["params"]):
                raise ValueError(f"{type(self).__name__} takes real parameters, got complex ones.")
        except BaseException:
            self.param_groups.pop()
            raise

    def _refuse_unread(self, param_group: dict[str, Any]) -> None:
        """Refuse what a group asks for and would not get: arguments for all groups, and what others have."""
        name, fallback = type(self).__name__, FALLBACK.keys() if param_group.get("fallback") else ()
        for what in param_group.keys() - {"params", *self.defaults, *fallback}:
            if what in signature(type(self).__init__).parameters:
                raise ValueError(f"{name}: {what} is for all groups: pass it to {name}, and leave it out of the group.")
            if what in (*NOT_NEGATIVE, *FRACTIONS, *TORCHS) and param_group[what]:
                raise ValueError(f"{name} has no {what}: leave it out of the group.")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Yes to GradScaler, which then says that it is there; no to Lightning, which would clip no gradients then."""
        return sys._getframe(1).f_globals.get("__name__") == torch.amp.grad_scaler.__name__

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return self.param_groups[0]["steps"]

    @property
    def lacking(self) -> bool:
        """Whether the last step was skipped, as a parameter had no curvature yet."""
        return self.param_groups[0]["lacking"]

    def preconditioned(self) -> list[Tensor]:
        """Parameters that the parts are for: all that require grad, but those of groups with `fallback=True`."""
        return [p for g in self.param_groups if not g["fallback"] for p in g["params"] if p.requires_grad]

    def quantities(self) -> Sequence[Any]:
        """What the backward passes before the next step have to emit."""
        return [q for part in self.parts for q in part.quantities(self)] if self.preconditioned() else []

    # -- between backward pass and step ------------------------------------------------------------
    @contextmanager
    def receiving(self, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """While results come to this optimizer; `emit` enters it.

        Args:
            options: of `px.backpack` that the user gave.

        Yields:
            All options of `px.backpack` with which results come.

        Raises:
            PackextError: if one is open already.
            ValueError: for options with which results would be others, or come to nobody.
        """
        # Results of several passes and processes are put together here, and not by `px.backpack`.
        own = ("attach", "pass_hook", "parameters", "accumulate", "group")
        taken = [name for name in own if name in options]
        if taken or options.get("scale") == "sample":
            raise ValueError(
                f"px.optim.emit({type(self).__name__}, {taken[0] if taken else 'scale'}=...): the optimizer chooses "
                "that itself. With a GradScaler pass scale=1 / scaler.get_scale()."
            )
        if not isinstance(options.get("scale", "loss"), str) and self._empirical():
            raise ValueError(f"{type(self).__name__} with the empirical Fisher: {EMPIRICAL} Leave scale out.")
        if self._open:
            raise px.PackextError(
                f"px.optim.emit({type(self).__name__}) within itself: a backward pass would count twice. step(closure) "
                "enters the context by itself; leave it out of the closure."
            )
        wanted = self.preconditioned()
        older = [(p, p.grad) for p in wanted if p.grad is not None]
        asked = bool(older) and bool(self.quantities())
        if self._received or (asked and not self._passes):  # else a GPU need not be waited for
            some = lists.nonzero([grad for _, grad in older])
            for (_, grad), any_ in zip(older, some, strict=True):
                if not any_:  # of zero_grad(set_to_none=False), whoever has called it
                    vars(grad).pop(GATHERED, None)
            older = [each for each, any_ in zip(older, some, strict=True) if any_]
        if not older:
            self._forget()
        if not self._passes:
            self._older = {p: TensorWeakRef(grad) for p, grad in older if asked}
            key = (self.param_groups[0]["seed"], self.steps, self.ranks.rank)
            self.generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
        self._open, self._scaled = True, self._scaled or isinstance(options.get("scale", "loss"), str)
        try:
            only = {"parameters": wanted} if wanted else {}
            yield {"attach": False, "pass_hook": self._receive, **only, **options}
        finally:
            self._open, self._entered = False, True

    def _empirical(self) -> bool:
        return any(getattr(q, "root", ("",))[0] == "empirical" for q in self.quantities())

    def _receive(self, results: px.Results) -> None:
        self._passes += 1
        self._missed = self._missed or next((p for p, old in self._older.items() if old() is p.grad is not None), None)
        new: dict[Tensor, dict[str, Any]] = {}
        for p in self.preconditioned():
            if p in results:
                new[p] = {k: received(k, v) for k, v in vars(results[p]).items() if not k.startswith("_")}
        held, self._received = self._received, {}
        for p in {**held, **new}:
            fields = {**held.get(p, {}), **new.get(p, {})}
            one, other = (
                {k: d[p][k] if p in d else absent(k, fields[k], d.values()) for k in fields} for d in (held, new)
            )
            self._received[p] = {k: joined(k, one[k], other[k]) for k in fields}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; what was emitted for those gradients is forgotten with them."""
        self._forget()
        super().zero_grad(set_to_none)

    def _forget(self) -> None:
        self._received, self._passes, self._entered = {}, 0, False
        self._scaled = False  # whether some pass had the loss as it was written, with all factors
        self._older: dict[Tensor, Any] = {}  # gradients that were there before the first pass that emits
        self._missed: Tensor | None = None  # a parameter whose gradient such a pass has added to

    # -- the step ----------------------------------------------------------------------------------
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a step.

        Args:
            closure: computes the loss anew, calls `zero_grad` and `backward` and returns the loss. It is called once,
                within `emit`.

        Returns:
            What the closure returned, if there is one.

        A parameter with a gradient but not the quantity that this step needs, and a singular curvature, are refused by
        a `PackextError`; nothing has changed then.
        """
        return self._take(closure)

    def _take(self, closure: Callable[[], Any] | None) -> Any:
        """What `step` does; subclasses call this and not the other `step`, around either of which torch runs hooks."""
        loss = None
        if closure is not None:
            with torch.enable_grad(), emit(self):
                loss = closure()
        try:
            with torch.no_grad():
                why = "" if self._overflowed() else self._step()
        finally:
            self._forget()
        if why:
            self.skipped += 1
            warnings.warn(f"{type(self).__name__} skipped a step: {why}.", SkippedStep, stacklevel=4)
        return loss

    def _overflowed(self) -> bool:
        """Take the factor of a `GradScaler` out of gradients, where it has found them to be finite.

        Returns:
            Whether it has not.

        Raises:
            PackextError: if `emit` was not told of it, or for float16, which loses by that, and torch refuses, too.
        """
        overflow, factor = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if overflow is None:
            return False
        name = type(self).__name__
        if self._received and self._scaled:
            raise px.PackextError(
                f"{name}: what the backward pass emitted has the factor of the GradScaler, and .grad has not. Tell it: "
                "`with px.optim.emit(optimizer, scale=1 / scaler.get_scale()):`."
            )
        if factor is None or overflow:  # None: `unscale_` was called
            return bool(overflow)
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(g.dtype == torch.float16 for g in grads):
            raise px.PackextError(f"{name} with a GradScaler: keep parameters in float32, and use autocast.")
        factor = factor.double().reciprocal().float()  # as torch's `unscale_`
        for g in grads:
            g.mul_(factor.to(g.device))
        return False

    def _step(self) -> str:
        """Why the step was not taken; empty if it was, or if there was no gradient."""
        alike(type(self).__name__, self.param_groups)
        main, rest = [], []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    (rest if group["fallback"] else main).append((p, group))
        for p, _ in main + rest:
            if p.grad.layout != torch.strided:
                raise px.PackextError(f"{type(self).__name__}: the gradient of {self.name_of(p)} is sparse; use dense.")
        main = self._reached(main)
        values = self._merged([p for p, _ in main])
        works = [
            Work(self, [(p, group, found) for (p, group), found in zip(main, values, strict=True)]),
            Work(self, [(p, group, {}) for p, group in rest]),
        ]
        found = [t for w in works for t in (*w.grads, *tensors_of([v for each in w.values for v in each.values()]))]
        size = lists.norm(found)
        if not found or not (self._entered or size or any(lists.nonzero(found))):
            return ""  # no gradient, or zeros that no pass within `emit` has made: nothing to step along
        if not math.isfinite(size) and not lists.finite(found):
            return f"{next(filter(None, map(self._infinite, works)))} is NaN or infinite"
        for work, parts in zip(works, (self.parts, self._last), strict=True):
            if not work.params:
                continue
            try:
                for part in parts:
                    part(work)
                if work is works[0]:
                    self._settle(work)
            except Skip as reason:
                return str(reason)
        pairs = [(p, u) for work in works for p, u in zip(work.params, work.updates, strict=True)]
        # In float16 the sum may overflow where the update, in float32, does not.
        ends = [u if p.dtype == u.dtype else (p + u).to(p.dtype) for p, u in pairs]
        if not lists.finite(ends):
            bad, update = next(pair for pair, end in zip(pairs, ends, strict=True) if not lists.finite([end]))
            if lists.finite([update]):
                return f"the update of {self.name_of(bad)} takes it beyond what {bad.dtype} holds"
            return f"the update of {self.name_of(bad)} is NaN or infinite"
        self.param_groups[0]["lacking"] = False
        for work in works:
            lists.add_(work.params, work.updates)
            for p, new in zip(work.params, work.new, strict=True):
                if new:
                    self.state[p].update(new)
        for group in self.param_groups:
            group["steps"], group["processes"] = group["steps"] + 1, self.ranks.size
        # By which a state tells whether it is whole; to look at a parameter's state gives it one, which is empty.
        self.param_groups[0]["kept"] = sum(map(bool, self.state.values()))
        return ""

    def _settle(self, work: Work) -> None:
        """Called when all parts have run, on some parameters; the last word on the updates."""

    def _infinite(self, work: Work) -> str:
        for p, grad, values in zip(work.params, work.grads, work.values, strict=True):
            for what, tensors in (("gradient", [grad]), *((field, tensors_of([v])) for field, v in values.items())):
                if not lists.finite(tensors):
                    return f"the {what} of {self.name_of(p)}"
        return ""

    def _merged(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """Of each parameter what was emitted, in all processes."""
        fields = [q.savefield for q in self.quantities()]
        if not fields:
            return [{} for _ in params]
        found, problem = [], None if self._missed is None else self._mixed(self._missed)
        for p in params:
            held = self._received.get(p, {})
            if problem is None and getattr(p.grad, GATHERED, False):
                problem = (
                    f"{type(self).__name__}: TargetBatch has divided the gradient of {self.name_of(p)} by the number "
                    "of samples, which what the passes emitted is not: take an optimizer of torch with it."
                )
            missing = [field for field in fields if field not in held]
            if missing and problem is None:
                problem = self._missing(p, missing[0])
            found.append({field: held[field] for field in fields if field in held})
        empirical = self._empirical()
        if problem is None and empirical and self._passes > 1:
            problem = f"{type(self).__name__} with the empirical Fisher: {EMPIRICAL} Take a step after each pass."
        return self.ranks.merge(found, problem, empirical)

    def _reached(self, items: list[tuple[Tensor, dict[str, Any]]]) -> list[tuple[Tensor, dict[str, Any]]]:
        """Without parameters that no pass has reached, with a gradient of zeros, which is as good as none.

        `zero_grad(set_to_none=False)` leaves such gradients. In steps that ask nothing of a pass, momentum goes on with
        them, as in torch's optimizers.

        Args:
            items: parameters with a gradient, and their groups.

        Returns:
            Those that are to be stepped.
        """
        asked = bool(self.quantities())
        doubtful = [p for p, _ in items if p not in self._received and (asked or not self.state.get(p))]
        some = lists.nonzero([p.grad for p in doubtful if p.grad is not None])
        none = {id(p) for p, any_ in zip(doubtful, some, strict=True) if not any_}
        return [(p, group) for p, group in items if id(p) not in none]

    def _mixed(self, p: Tensor) -> str:
        return (
            f"{type(self).__name__}: {self.name_of(p)} had a gradient when px.optim.emit was entered, of a backward "
            "pass that emitted nothing, and the passes within added to it: curvature would be that of some passes, "
            "and .grad that of all. Run all backward passes between two steps in `with px.optim.emit(optimizer):`, and "
            "call optimizer.zero_grad() before the first. (Lightning runs the passes of accumulate_grad_batches but "
            "the last outside of it: leave that at 1.)"
        )

    def _missing(self, p: Tensor, field: str) -> str:
        name, text = type(self).__name__, f"{self.name_of(p)} has a gradient, but no {field}"
        if not self._received:
            return f"{name}: {text}. Run the backward passes in `with px.optim.emit(optimizer):`, before each step."
        everywhere = " Of several processes each has to use it in its own passes." if self.ranks.size > 1 else ""
        return (
            f"{name}: {text}: no extended model (px.extend) has used it in the backward pass. Put it into a group with "
            f'"fallback": True, which AdamW trains, or extend that model.{everywhere}'
        )

    def name_of(self, p: Tensor) -> str:
        """The name of a parameter, where names were given, or its place; and its shape."""
        return name_of(self, p)

    # -- saving ------------------------------------------------------------------------------------
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, with numbers of a parameter in its dtype, but in float32 at least.

        A PackextError refuses a state of an optimizer with other hyperparameters, or from which something was left out,
        a ValueError groups that differ in what is bounded over all parameters.
        """
        found: dict[str, Any] = {}

        def read(_: Any, given: dict[str, Any]) -> None:
            """Runs after the user's hooks, and sees what they have made of it."""
            self._judge(given)
            found.update(given)

        def settle(_: Any) -> None:
            ids = [k for group in found["param_groups"] for k in group["params"]]
            mine = [p for group in self.param_groups for p in group["params"]]
            for k, p in zip(ids, mine, strict=True):
                if k in found["state"]:
                    self.state[p] = {name: placed(v, p) for name, v in found["state"][k].items()}
            self._forget()
            self.skipped = 0

        handles = [
            self.register_load_state_dict_pre_hook(read),
            self.register_load_state_dict_post_hook(settle, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _judge(self, state_dict: dict[str, Any]) -> None:
        """Refuse a state that is not to be loaded.

        Raises:
            PackextError: if it is another optimizer's, or something was left out.
        """
        mine, theirs = self.param_groups[0]["kind"], state_dict["param_groups"][0].get("kind")
        if theirs not in (mine, None):
            raise px.PackextError(
                f"The state is of another optimizer than {type(self).__name__}: it is of {theirs}, and this is {mine}. "
                "Make this one as that one was made."
            )
        read = self.defaults.keys() & self.param_groups[0].keys()  # torch puts names of its own among the defaults
        lacking = sorted({name for group in state_dict["param_groups"] for name in read - group.keys()})
        if lacking:
            raise px.PackextError(
                f"The state is of another optimizer than {type(self).__name__}: its groups have no "
                f"{', '.join(lacking)}."
            )
        known = [part.keeps for part in (*self.parts, *self._last)]
        own = {name for names in known for name in names or ()}
        foreign = sorted({name for state in state_dict["state"].values() for name in state} - own)
        if foreign and None not in known:
            raise px.PackextError(
                f"The state is of another optimizer than {type(self).__name__}: it keeps {', '.join(foreign)} of a "
                f"parameter, where {type(self).__name__} keeps {', '.join(sorted(own))}."
            )
        alike(type(self).__name__, state_dict["param_groups"])
        kept, found = (state_dict["param_groups"][0].get("kept", 0), sum(map(bool, state_dict["state"].values())))
        if found < kept:
            raise px.PackextError(
                f"{type(self).__name__}: {kept} parameters had a state when this was saved, and {found} have one in "
                "it. torch.distributed.checkpoint loads into what is there, and leaves out what a new optimizer has "
                "not made yet: take a step of all parameters before load, and save without "
                "flatten_optimizer_state_dict."
            )

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what torch keeps, and the parts."""
        kept = ("parts", "_last", "ranks", "skipped")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make what is not kept anew."""
        super().__setstate__(state)
        self.generator, self._open = torch.Generator(), False
        self._forget()


#: Hyperparameters of all parameters together, of which groups cannot have their own.
ALIKE = ("kl_clip", "max_norm")


def alike(name: str, groups: Sequence[dict[str, Any]]) -> None:
    """Refuse groups that have bounds of their own of what is bounded over all parameters.

    Args:
        name: of the optimizer.
        groups: its own; those with `fallback=True` have no such bound.

    Raises:
        ValueError: if they differ.
    """
    main = [(k, group) for k, group in enumerate(groups) if not group.get("fallback")]
    for what in ALIKE:
        for k, group in main:
            if group.get(what) != main[0][1].get(what):
                raise ValueError(
                    f"{name}: {what} bounds the step of all parameters together, and is {main[0][1].get(what)} in "
                    f"group {main[0][0]} and {group.get(what)} in group {k}: give all groups the same."
                )


#: Hyperparameters that are at least zero, and those that are averages' weights.
NOT_NEGATIVE = ("lr", "damping", "weight_decay", "eps", "kl_clip", "max_norm", "rho", "precondition_lr")
FRACTIONS = ("momentum", "precondition_momentum", "decay", "betas")
OPTIONAL = ("kl_clip", "max_norm", "decay")


def check(name: str, what: str, value: Any) -> None:
    """Refuse a hyperparameter that is out of its range.

    Args:
        name: of who has it.
        what: its own.
        value: a number, None, or several.

    Raises:
        ValueError: if it is.
    """
    other = _expected(what, value)
    if other:
        raise ValueError(f"{name}: {what} must be {other}, got {value!r}.")
    if what in NOT_NEGATIVE and not (value is None or (math.isfinite(value) and value >= 0)):
        raise ValueError(f"{name}: {what} must be finite and not negative, got {value}.")
    if what in FRACTIONS:
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if each is not None and not 0 <= each < 1:
                raise ValueError(f"{name}: {what} must be at least 0 and less than 1, got {value}.")


def _expected(what: str, value: Any) -> str:
    """What a hyperparameter is to be, where it is something else; empty where it is that."""
    several = list(value) if what == "betas" and isinstance(value, (tuple, list)) else [value]
    if what == "seed" and (not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 0):
        return "an int of 0 or more"
    if what == "betas" and (not isinstance(value, (tuple, list)) or len(value) != 2):
        return "two numbers"
    if what == "maximize" and value:  # which groups of torch's optimizers have
        return "left out (negate the loss: curvature is of what is minimised)"
    known = (
        what not in (*NOT_NEGATIVE, *FRACTIONS) or (value is None and what in OPTIONAL) or all(map(is_real, several))
    )
    return "" if known else "a number"


def is_real(value: Any) -> bool:
    """Whether `value` is one real number, or a tensor of one."""
    return value.numel() == 1 and not value.is_complex() if isinstance(value, Tensor) else isinstance(value, Real)
