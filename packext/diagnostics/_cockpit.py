"""The monitor: which instruments look at which step, and where what they say is written."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

import packext as px
from packext.diagnostics._instrument import Instrument
from packext.diagnostics._observe import Observer
from packext.diagnostics._ranks import Ranks, inside
from packext.diagnostics._schedule import linear
from packext.diagnostics._step import Absent, Count, Step, same
from packext.diagnostics._united import HESSIAN
from packext.diagnostics._verdict import Judge, Rule, Verdict
from packext.diagnostics.instruments import LEVELS
from packext.diagnostics.rules import RULES


@runtime_checkable
class Sink(Protocol):
    """Where values go."""

    def begin(self, names: list[str]) -> int | None:
        """Take the names of the instruments; return the number of the first step to come, or None for any."""
        ...

    def write(self, step: int, values: Mapping[str, float | np.ndarray], absent: Mapping[str, str]) -> None:
        """Take the values of a step by name, and why others are absent."""
        ...

    def say(self, verdict: Verdict) -> None:
        """Take a verdict that is new, that has changed, or that is withdrawn."""
        ...


class Cockpit:
    """Watches a training run through instruments, without changing it.

    Example:
        >>> monitor = Cockpit(model, optimizer, level="economy", every=10, sinks=[Run("runs/first")])
        >>> for x, y in loader:
        ...     with monitor.step():
        ...         loss = loss_fn(model(x), y)
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> monitor.values["NoiseScale"]

    The quantities that the instruments need are computed in the step's own backward pass, each once; an optimizer may
    read the same one, `with px.optim.emit(optimizer):` around it, inside of the step. Parameters after
    training are what they would be without the monitor to the last bit, and so is the state of random generators;
    hooks, `.grad` and attributes are as they were after each step. Where a statistic is undefined it is absent, with a
    reason. A step may have several backward passes (accumulation): they count as one batch. Passes after the parameters
    have changed, as in the closure of LBFGS, are not looked at.

    Attributes:
        steps: number of steps begun (from the start of the record, where a sink resumes one).
        values: of the last step that was looked at, by name: "GradNorm" for the whole model, "GradNorm/0.weight" for a
            parameter. What the step after a look tells ("Alpha") is added then. For what is absent, a KeyError says
            why.
        absent: why something is missing from `values`, by instrument.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        level: str | None = "economy",
        every: int | Callable[[int], bool] = 1,
        sinks: Iterable[Sink] = (),
        instruments: Iterable[Instrument] = (),
        rules: Iterable[Rule] | None = None,
    ) -> None:
        """Choose what to look at, when, and where to write it.

        Args:
            model: extended by `px.extend`; may be compiled (`torch.compile`). In several processes the
                `DistributedDataParallel` that holds it, or that is extended itself; others are refused there.
            optimizer: of the model's parameters. Of several, give one: its learning rate is recorded, and what the
                others do is seen by how the parameters move.
            level: "economy" (first-order instruments), "business" (and the diagonal of the GGN), "full" (and the
                Hessian's largest eigenvalue and two-dimensional histograms), or None for `instruments` alone.
            every: look at every so many steps, or at the steps for which a function of their number is true
                (`linear`, `logarithmic`).
            sinks: such as `Run`, `TensorBoard` or `WandB`.
            instruments: instances, beside those of the level.
            rules: which come to verdicts; by default all of `px.diagnostics.RULES`, and none with [].

        Raises:
            NotExtendedError: if the model is not extended.
            TypeError: for another thing than one optimizer, a level, or lists of sinks, instruments or rules.
            ValueError: for an optimizer of other parameters, an unknown level, or an instrument that does not fit
                model or optimizer.
        """
        model, parallel = inside(model)
        if not isinstance(model, nn.Module) or not px.is_extended(model):
            raise px.NotExtendedError(
                f"Cockpit needs an extended model, got {type(model).__name__}: call model = px.extend(model) first."
            )
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"Cockpit needs one torch.optim.Optimizer, got {_kind(optimizer)}: of several, give one (its learning "
                "rate is recorded; what the others do is seen by how the parameters move)."
            )
        if not _steps(optimizer, model):
            raise ValueError(
                f"the {type(optimizer).__name__} holds no parameter of {type(model).__name__}, and its learning rate "
                "is not that of this model: give the optimizer of this model."
            )
        if not isinstance(level, (str, type(None))):
            raise TypeError(f"level must be a name or None, got {_kind(level)}: instruments go by instruments=[...].")
        if level is not None and level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(map(repr, LEVELS))} or None, got {level!r}.")
        self.model, self.optimizer = model, optimizer
        self.every = every if callable(every) else linear(every)
        chosen = _instances(instruments, Instrument, "instruments", "[px.diagnostics.EffectiveRank()]")
        self.instruments = [kind() for kind in LEVELS.get(level or "", ())] + chosen
        for instrument in self.instruments:
            instrument.check(model, optimizer)
        names = [instrument.name for instrument in self.instruments]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"two instruments are called {name!r}: give one another name, or choose another level."
                )
        sinks = _instances(sinks, Sink, "sinks", '[px.diagnostics.Run("runs/first")]')
        if rules is not None:
            rules = _instances(rules, Rule, "rules", "[kind() for kind in px.diagnostics.RULES]")
        self.ranks = Ranks(model, parallel)
        self.sinks = sinks if self.ranks.rank == 0 else []
        self.values: dict[str, float | np.ndarray] = _Values({}, {})
        self.absent: dict[str, str] = {}
        self.judge = Judge([kind() for kind in RULES] if rules is None else rules)
        self.born = perf_counter()
        self.steps, self._begun = self.ranks.first_step(lambda: _begin(self.sinks, names)), False
        for instrument in self.instruments:
            instrument.start(self.steps)
        self._left: tuple[int, Mapping[str, Tensor], list[int]] | None = None
        self._waiting = self._open = False
        self._following: list[tuple[int, Instrument, tuple[Any, ...]]] = []

    def step(self, scale: str | float = "sample", samples: Any = None, loss_scale: float = 1.0) -> Watch:
        """A context around all that one training step does: forward, backward, update.

        Args:
            scale: as for `px.backpack`: "sample" with an extended loss; a number for any other (the batch size for a
                mean, 1 for a sum, over the loss scale if there is one), with which losses are to be given, too. "mean"
                is the number of samples in all passes of the step, counted when it ends: a sample's own loss is that
                many times its part of what the passes add up to.
            samples: indices of the step's samples in the data set `[N]`, in the order in which they go through the
                model (over all backward passes). Samples are then named by them, and not by their place in the batch.
            loss_scale: with "mean", the factor of a `GradScaler` on the loss (`scaler.get_scale()`); with "sample" it
                is seen.

        Returns:
            The context. `with monitor.step(...) as step:` gives what has `step.losses(each)`.

        Raises:
            RuntimeError: if the last one was not entered.
            ValueError: for another scale, samples that are not a row of integers, or a loss scale that is not positive
                or not with "mean".
        """
        if not (scale in ("sample", "mean") or (isinstance(scale, (int, float)) and not isinstance(scale, bool))):
            raise ValueError(f'scale must be "sample", "mean" or a number, got {scale!r:.80}.')
        if not loss_scale > 0 or (loss_scale != 1 and scale != "mean"):
            raise ValueError(f'loss_scale must be positive and goes with scale="mean"; got {loss_scale} and {scale!r}.')
        if samples is not None:
            samples = torch.as_tensor(samples, device="cpu")
            if samples.dim() != 1 or samples.is_floating_point() or samples.dtype == torch.bool:
                raise ValueError(
                    f"samples must be integers [N], one for each sample of the step, got {samples.dtype} "
                    f"{list(samples.shape)}."
                )
        if self._waiting:
            raise RuntimeError(
                "step() gives a context, and the last one was not entered: write `with monitor.step():` around forward "
                "pass, backward pass and update."
            )
        self._waiting = True
        return Watch(self, scale, samples, loss_scale)

    def log(self, **numbers: Any) -> None:
        """Record numbers of your own, such as `valid_loss`, with the step that was begun last.

        Args:
            **numbers: by name, which has no slash: that is between an instrument and a layer. `valid_loss` is what the
                rule of overfitting reads.

        Raises:
            ValueError: before the first step, for a name of an instrument or with a slash, or for what is not a number.
        """
        if not self._begun:
            raise ValueError("log() records numbers with the step that was begun last: there was none yet.")
        names = {instrument.name for instrument in self.instruments}
        if clash := sorted(name for name in numbers if name.split(".")[0] in names):
            raise ValueError(f"{', '.join(clash)} is the name of an instrument: log the number by another one.")
        if slashed := sorted(name for name in numbers if "/" in name):
            raise ValueError(
                f"{', '.join(slashed)}: a slash is between an instrument and a layer. Log the number by another name, "
                f"such as {slashed[0].replace('/', '_')}."
            )
        found: dict[str, float | np.ndarray] = {}
        for name, number in numbers.items():
            try:
                value = None if isinstance(number, str) else _plain(number)
            except (ArithmeticError, RuntimeError, TypeError, ValueError):
                value = None
            if not isinstance(value, float):
                shaped = isinstance(value, np.ndarray)
                what = f"has shape {list(value.shape)}" if shaped else f"is {_kind(number)}"
                raise ValueError(f"log() takes numbers, and {name} {what}.")
            found[name] = value
        self._write(self.steps - 1, found, {})

    def _write(self, step: int, values: dict[str, float | np.ndarray], absent: dict[str, str]) -> None:
        verdicts = self.judge.hear(step, values)
        for sink in self.sinks:
            sink.write(step, values, absent)
            for verdict in verdicts:
                sink.say(verdict)

    @property
    def verdicts(self) -> list[Verdict]:
        """What is wrong with the run, as far as the rules see."""
        return list(self.judge.standing.values())

    def __repr__(self) -> str:
        return f"Cockpit({', '.join(i.name for i in self.instruments)})"


@dataclass
class _Page:
    values: dict[str, float | np.ndarray] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


class Watch:
    """One step under the eyes of a monitor; made by `Cockpit.step`."""

    def __init__(self, monitor: Cockpit, scale: str | float, samples: Tensor | None, loss_scale: float) -> None:
        """Take the monitor, the scale of its quantities, where in the data set the samples are, and a factor."""
        self._monitor, self._scale, self._samples, self._loss_scale = monitor, scale, samples, loss_scale
        self._observer: Observer | None = None

    def losses(self, each: Tensor) -> None:
        """Hand over individual losses `[N]`, for a loss that is not an extended module, before `backward()`.

        Args:
            each: the losses of the samples, through which the backward pass will go: `each.mean().backward()`.
        """
        if self._observer is not None:
            self._observer.given(each)

    def loss(
        self,
        value: Tensor,
        each: Callable[[], Tensor | None] = lambda: None,
        counted: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        """Hand over a scalar loss that no extended module has computed, before `backward()`.

        Args:
            value: the loss; of extended losses that are parts of it, none counts by itself.
            each: gives the samples' parts of it `[N]`, which add up to it; called if an instrument reads them.
            counted: gives which samples have a share in it `[N]`, as not all of whose targets are ignored; None if all.
        """
        if self._observer is not None:
            self._observer.given_loss(value, each, counted)

    def __enter__(self) -> Watch:
        monitor = self._monitor
        monitor._waiting = False
        if monitor._open:
            raise RuntimeError("monitor.step() within itself: one context is one step of the training.")
        number, monitor.steps, monitor._begun = monitor.steps, monitor.steps + 1, True
        self._due = monitor.instruments if monitor.every(number) else []
        self._entered: list[Instrument] = []
        self._following, monitor._following = monitor._following, []
        if not self._due and not self._following:
            monitor._open = True
            return self
        monitor.ranks.check()
        model = monitor.model
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
        step = Step(number, model, monitor.optimizer, parameters, monitor.born, samples=self._samples)
        try:
            observer = Observer(step, *self._ask(step), self._scale, self._loss_scale)
            observer.begin()
        except BaseException:
            self._leave()
            raise
        self._observer = observer
        monitor._open = True
        return self

    def _ask(self, step: Step) -> tuple[list[tuple[Any, ...]], bool, bool]:
        """Have the instruments enter the step; their quantities, and whether one reads losses, or other targets'."""
        monitor, model, coupled = self._monitor, step.model, _coupled(step.model)
        self._missing: dict[int, str] = {}
        self._needs: list[tuple[Any, ...]] = []
        self._fields: list[tuple[str, ...]] = []
        for instrument in self._due:
            instrument.enter(step.number, model)
            self._entered.append(instrument)
        readers = [(i, tuple(i.needs)) for i in self._due] + [(i, needs) for _, i, needs in self._following]
        for k, (instrument, needs) in enumerate(readers):
            if coupled and any(not isinstance(q, HESSIAN) for q in needs):
                self._missing[k], needs = coupled, ()
            elif (obstacle := monitor.ranks.obstacle(instrument, needs)) is not None:
                self._missing[k], needs = obstacle, ()
            self._needs.append(monitor.ranks.needs(needs))
            self._fields.append(tuple(q.savefield for q in needs))
        of = [i.parameters(model) for (i, _), needs in zip(readers, self._needs, strict=True) if needs]
        step._parts = None if None in of else {p for part in of for p in part or () if p.requires_grad} or None
        targets = any(i.targets for i in self._due)
        if targets and not coupled or any(not isinstance(q, HESSIAN) for needs in self._needs for q in needs):
            self._needs.append((Count(),))
        return self._needs, any(i.losses for i, _ in readers), targets

    def _leave(self) -> None:
        for instrument in self._entered:
            instrument.leave()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        observer, monitor = self._observer, self._monitor
        monitor._open = False
        if observer is None:
            return
        self._observer = None
        observer.end()
        self._leave()
        if kind is not None:
            if isinstance(error, px.PackextError) and not _of_optimizer(error) and "instruments" not in vars(error):
                kinds = tuple({type(q) for q in error.quantities})
                needs = dict(zip(self._due, self._needs, strict=False))
                asked = [i for i, own in needs.items() if any(not kinds or isinstance(q, kinds) for q in own)]
                others = kinds and len(asked) < len(needs)
                if asked:
                    names = ", ".join(i.name for i in asked)
                    said = type(error)(
                        f"The instruments {names} need what {type(monitor.model).__name__} did not give: {error}"
                        f"{_OTHERS if others else ''}"
                    )
                    vars(said)["instruments"] = names  # so that a monitor around this one does not say it of its own
                    raise said from error
            return
        with torch.no_grad():
            observer.finish(bool(self._due))
            monitor.ranks.merge(observer.step, self._needs)
            monitor.ranks.unite(self._due)
            self._record(observer)
        observer.step._shared["over"] = True  # the parameters may go on

    def _record(self, observer: Observer) -> None:
        monitor, step = self._monitor, observer.step
        after = self._goes_on(observer)  # the gradient was taken where the last step ended
        late, due = _Page(), _Page()
        for k, (_, instrument, _) in enumerate(self._following, len(self._due)):
            self._measure(late, k, instrument, instrument.conclude if after else _moved, step)
        for k, instrument in enumerate(self._due):
            if self._measure(due, k, instrument, instrument.measure, step):
                needs = instrument.follow()
                if needs is not None:
                    monitor._following.append((step.number, instrument, needs))
        monitor._left = (step.number, step.parameters, observer.versions())
        # What the next step says of one that was looked at is added to what was said of it.
        values, absent = ({}, {}) if self._due else (monitor.values, monitor.absent)
        monitor.absent = {**absent, **late.absent, **due.absent}
        monitor.values = _Values({**values, **late.values, **due.values}, monitor.absent)
        pages = [(self._following[0][0], late)] if self._following else []
        pages += [(step.number, due)] if self._due else []
        for number, page in pages:
            monitor._write(number, page.values, page.absent)

    def _goes_on(self, observer: Observer) -> bool:
        """Whether the parameters were, in the pass, those that the step before has left, and where it left them."""
        step = observer.step
        number, parameters, versions = self._monitor._left or (-1, {}, [])
        return number == step.number - 1 and versions == observer._versions and same(parameters, step.parameters)

    def _measure(self, page: _Page, k: int, instrument: Instrument, read: Callable[[Step], Any], step: Step) -> bool:
        try:
            if k in self._missing:
                raise Absent(self._missing[k])
            value = read(step.seen_by(k, self._fields[k]))
        except Absent as reason:
            page.absent[instrument.name] = str(reason)
            return False
        for part, one in (value if isinstance(value, Mapping) else {"": value}).items():
            name = instrument.name + (part if part.startswith(".") or not part else f"/{part}")
            if isinstance(one, Absent):
                page.absent[name] = str(one)
            elif one is not None:
                page.values[name] = _plain(one)
        return True


def _of_optimizer(error: px.PackextError) -> bool:
    """Whether an optimizer raised it of its own, and not a pass in its closure."""
    trace = error.__traceback__
    while trace is not None and not isinstance(trace.tb_frame.f_locals.get("self"), torch.optim.Optimizer):
        trace = trace.tb_next
    return trace is not None and "quantities" not in vars(error)


_OTHERS = " The other instruments do not ask for that: take another level, or level=None and a list of instruments."


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else f"an object of {type(value).__name__}"


def _instances(given: Any, kind: type, what: str, example: str) -> list[Any]:
    """What was given as a list; a mistake is said now and not when a step has ended."""
    listed = [given] if isinstance(given, (str, kind)) or not isinstance(given, Iterable) else list(given)
    for one in listed:
        if listed[0] is given or isinstance(one, type) or not isinstance(one, kind):
            raise TypeError(f"{what} must be a list of {kind.__name__}s, such as {example}, got {_kind(one)}.")
    return listed


class _Values(dict[str, "float | np.ndarray"]):
    """Values by name; for one that is not there, the KeyError says why. Copied and saved without the reasons."""

    def __init__(self, values: Mapping[str, float | np.ndarray], absent: Mapping[str, str]) -> None:
        super().__init__(values)
        self._absent = absent

    def __missing__(self, name: Any) -> Any:
        instrument = str(name).replace("/", ".").partition(".")[0]
        why = self._absent.get(name) or self._absent.get(instrument)
        if why is None:
            have = ", ".join(key for key in self if "/" not in key)
            why = f"the last step that was looked at has {have}" if have else "no step was looked at yet"
        raise KeyError(f"{name}: {why}")

    def __reduce__(self) -> Any:
        # Not a dict, which torch.load takes for the name of any other function.
        return OrderedDict, (), None, None, iter(self.items())


def _moved(step: Step) -> Any:
    raise Absent("the parameters changed between this step and the next")


def _plain(value: Any) -> float | np.ndarray:
    if isinstance(value, Tensor) and not value.dim():
        return float(value.detach())
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # which has no bfloat16
    array = np.asarray(value)
    return float(array) if array.ndim == 0 else array.copy()


def _steps(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Whether an optimizer holds a parameter of the model, or copies in another dtype of what is trained of it."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    own = {id(p): p for p in model.parameters()}
    if not own or any(id(p) in own for p in held):
        return True
    trained = [p for p in own.values() if p.requires_grad]
    as_many = sum(p.numel() for p in held) == sum(p.numel() for p in trained)
    return as_many and not {p.dtype for p in held} & {p.dtype for p in trained}


def _begin(sinks: list[Sink], names: list[str]) -> int:
    """Start the sinks; return the number of the first step to come."""
    begun = {first for sink in sinks if (first := sink.begin(names)) is not None} or {0}
    if len(begun) > 1:
        raise px.PackextError(f"The sinks continue at different steps, {sorted(begun)}: start all anew, or none.")
    return begun.pop()


def _coupled(model: nn.Module) -> str | None:
    """Why the samples of the model have no gradients of their own, if that is known beforehand."""
    names = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or m.running_mean is None)
    ]
    if not names:
        return None
    return f"BatchNorm uses the statistics of the batch in {', '.join(names)}: samples influence each other"
