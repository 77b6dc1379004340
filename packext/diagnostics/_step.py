"""What an instrument sees of a step."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

import packext as px
from packext.diagnostics._tensors import inner, norms

T = TypeVar("T")


class Absent(Exception):  # noqa: N818 - an answer, not an error
    """Raised by an instrument (or by what it asks of a step) where its statistic is undefined; says why."""


NONE = (
    "no individual gradients: the backward pass did not come through the extended model, or "
    'px.backpack(per="token") has taken them, whose pass is not shared: let the step have one of its own'
)
NO_NUMBER = "the number of samples is not known: no quantity of individual gradients was asked for"
OUTSIDE = "`.grad` is not the mean of the individual gradients: terms of the loss pass by the model"
NOT_FINITE = "not finite: {} is NaN or infinite"
OVERFLOW = NOT_FINITE.format("a gradient, or its square,")


def outside(rows: float, whole: float, rounding: float = 0.0) -> str:
    """Why the mean of the individual gradients is not `.grad`, judging by the squared norms of both; empty if it is.

    Args:
        rows: squared norm of that mean.
        whole: squared norm of what was added to `.grad`.
        rounding: by how much the root of `whole` may be off.

    Returns:
        The reason, or nothing.
    """
    if not (math.isfinite(rows) and math.isfinite(whole)):
        return OVERFLOW
    most = max(rows, whole)
    return "" if abs(rows - whole) <= 0.01 * most + (2 * math.sqrt(most) + rounding) * rounding else OUTSIDE


def same(ones: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether they are the same parameters by the same names."""
    return ones.keys() == others.keys() and all(p is others[name] for name, p in ones.items())


def _sum(values: list[Any]) -> Any:
    return sum(values[1:], values[0])


#: How results of several backward passes in one step become those of all their samples, by savefield. What is not
#: here is defined within one pass only.
COMBINE: dict[str, Callable[[list[Any]], Any]] = {
    "batch_l2": torch.cat,
    "slope_dot": torch.cat,
    "drawn_grad": lambda parts: Drawn(*map(torch.cat, zip(*parts, strict=True))),
    "sum_grad_squared": _sum,
    "diag_ggn_exact": _sum,
    "diag_ggn_mc": _sum,
    "grad_histogram": lambda parts: parts[0]._replace(counts=_sum([p.counts for p in parts])),
}

#: How results grow with a factor on the loss, by savefield: that power of it is divided out.
POWERS: dict[str, int] = {
    "batch_l2": 2, "grad_dot": 2, "batch_dot": 2, "sum_grad_squared": 2, "variance": 2,
    "grad_batch": 1, "drawn_grad": 1, "slope_dot": 1, "grad_projected": 1,
    "diag_ggn_exact": 1, "diag_ggn_mc": 1, "ggn_gram": 1, "hessian_trace": 1, "mean_hessian_trace": 1,
    "top_eigenvalues": 1, "mean_top_eigenvalues": 1, "mean_grad": 1,
    "output_gram": 0,  # of the outputs, and not of the loss
    "kept": 0,  # divided when it is read
}  # fmt: skip


#: Results that are, or are made of, the samples' own gradients.
INDIVIDUAL = {
    "batch_l2", "grad_dot", "batch_dot", "sum_grad_squared", "variance", "grad_batch", "drawn_grad", "slope_dot",
    "grad_projected", "grad_histogram",
}  # fmt: skip


@dataclass
class Pass:
    """One backward pass of a step.

    Attributes:
        task: autograd's number of it.
        calls: the losses that it came through: value, individual losses (or why there are none), gradient that arrived.
        before: `.grad` of each parameter when it began.
        results: of each instrument, by savefield and parameter; of several processes also why there are none.
        n: number of samples, if known.
        multiplier: of the samples' own losses, known when the step has ended; divided out where that can be done.
        share: factor from the loss as written to the mean of the samples' own losses; NaN if that is not known.
        empty: samples without a share in the loss, since all their targets are ignored.
        balance: for several processes, along `.grad` as it was after the pass: the sum of the individual gradients as
            written, what the pass has added to `.grad`, and `.grad` itself.
    """

    task: int
    before: dict[str, Tensor | None]
    calls: list[tuple[Call, Tensor]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    n: int | None = None
    multiplier: float = 1.0
    share: float = 1.0
    empty: int = 0
    balance: tuple[float, float, float] | None = None


@dataclass
class Call:
    """One call of a loss.

    Attributes:
        kind: the class of an extended loss; "loss()" or "losses()" for one that was handed over.
        reduction: "mean", "sum", "none", or another word for a mean.
        value: what it gave.
        each: individual losses (or those of entries), or why there are none.
        part: whether it is part of a loss that was handed over, which stands for it.
        counted: which rows have a target that is not ignored `[rows]`; None if none is.
        compared: the shares of other targets under which a row's loss is less, and the same `[rows, 2]`, NaN for all
            targets ignored or a loss that is not finite; or why not.
    """

    kind: str
    reduction: str
    value: Tensor
    each: Tensor | str
    part: bool = False
    counted: Tensor | None = None
    compared: Tensor | str = "other targets are known of extended losses alone, in one process"


@dataclass
class Step:
    """What an instrument sees of a step. Anything that is undefined raises `Absent`, with the reason.

    `step["batch_l2"]` is a result summed over the parameters, `step.layers("batch_l2")` one for each parameter, by
    name; both by the savefields of the instrument's own `needs`. All is of the samples' own losses l_n (the backward
    pass's scale "sample"): factors on the loss, such as 1/k of k accumulated passes or a loss scale, are divided out.

    Attributes:
        number: of the step, from 0.
        model: the monitored model.
        optimizer: as given to the monitor.
        parameters: those that require grad and have entries, by name.
        born: when the monitor was made, on the clock of `time.perf_counter`.
        began: when the step began, on that clock.
        seconds: from there to the end of the step.
        passes: the backward passes of the step, made before the parameters changed.
        samples: indices of the step's samples in the data set `[N]`, where the user has given them.
    """

    number: int
    model: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]
    born: float = 0.0
    began: float = 0.0
    seconds: float = 0.0
    passes: list[Pass] = field(default_factory=list)
    samples: Tensor | None = None
    _held: float = 0.0  # norm of what was in `.grad` when the first of the passes began
    _empty: int = 0  # samples without a share in the loss, since all their targets are ignored
    _parts: set[nn.Parameter] | None = None  # that have results, if they are not all
    _groups: list[dict[str, Any]] = field(default_factory=list)
    _gradient: dict[str, Tensor] = field(default_factory=dict)
    _outside: str = ""
    _void: str = ""
    _several: bool = False  # passes of each process, of which the one pass of all was made
    _counts: list[int] = field(default_factory=list)  # samples of these passes
    _start: dict[str, Tensor] = field(default_factory=dict)
    _update: dict[str, Tensor] | None = None
    _shared: dict[str, Any] = field(default_factory=dict)
    _instrument: int = 0
    _needs: tuple[str, ...] = ()

    def seen_by(self, index: int, needs: tuple[str, ...]) -> Step:
        """The same step, with the results that one of the instruments asked for."""
        view = copy.copy(self)
        view._instrument, view._needs = index, needs
        return view

    def _passed(self) -> list[Pass]:
        if self._void:
            raise Absent(self._void)
        if not self.passes:
            raise Absent("no backward pass through an extended loss has added to `.grad` in this step")
        return self.passes

    @property
    def several(self) -> bool:
        """Whether the step had several backward passes."""
        return len(self.passes) > 1 or self._several

    @property
    def counts(self) -> list[int]:
        """Samples of each backward pass; of those of one process after the other."""
        return self._counts or [p.n or 0 for p in self._passed()]

    @property
    def n(self) -> int:
        """Samples in the step; over all its backward passes."""
        counts = [p.n for p in self._passed()]
        if any(n is None for n in counts):
            raise Absent(NONE if self._needs else NO_NUMBER)
        return sum(n for n in counts if n is not None)

    def _all_counted(self) -> None:
        if self._empty:
            raise Absent(
                f"{self._empty} of {self.n} samples have no target that counts (ignore_index): they have no loss and "
                "no gradient, which zeros are not. Leave them out of the batch"
            )

    def indices(self, positions: Tensor) -> Tensor | None:
        """Indices in the data set of the samples at these positions of the step; None if the user has given none."""
        if self.samples is None:
            return None
        if len(self.samples) != self.n:
            raise px.PackextError(
                f"step(samples=...) was given {len(self.samples)} indices for a step of {self.n} samples: pass one for "
                "each sample, in the order in which they go through the model."
            )
        return self.samples[positions.cpu()]

    def _known_share(self) -> None:
        unknown = [p for p in self._passed() if math.isnan(p.share) or not p.share]
        if not all(bool(g.isfinite().all()) for p in unknown for _, g in p.calls):
            raise Absent(NOT_FINITE.format("a factor on the loss"))
        if unknown or (len(self.passes) > 1 and not self.n):
            raise Absent(NO_NUMBER)

    def _mean(self, each: list[float]) -> float:
        """The mean over samples of what is a mean over the samples of each pass."""
        if len(each) == 1:
            return each[0]
        counts = [p.n or 0 for p in self.passes]
        return sum(c * value for c, value in zip(counts, each, strict=True)) / self.n

    @property
    def loss(self) -> float:
        """The mean of the samples' own losses."""
        self._known_share()
        return self._mean([p.share * sum(float((g * c.value).sum()) for c, g in p.calls) for p in self._passed()])

    @property
    def losses(self) -> Tensor:
        """The samples' own losses `[N]`; only for instruments with `losses = True`."""
        return self.once("losses", self._losses)

    def _losses(self) -> Tensor:
        found = []
        self._known_share()
        self._all_counted()
        for p in self._passed():
            parts: list[Tensor] = []
            for call, g in p.calls:
                if isinstance(call.each, str):
                    raise Absent(call.each)
                each = torch.atleast_1d(call.each)  # of a single sample it may have no axis
                if len(each) != p.n:
                    raise Absent(f"{call.kind} has {len(each)} rows for {p.n or 'unknown'} samples")
                if call.reduction == "none":
                    parts.append((each * g.reshape(each.shape)).flatten(1).sum(1) if each.dim() > 1 else each * g)
                    continue
                if sum(size == p.n for size in each.shape) > 1:
                    raise Absent(f"which axis of the losses {list(each.shape)} holds the samples cannot be told")
                rows, total = (each.flatten(1).sum(1) if each.dim() > 1 else each), each.sum()
                if not total and each.any():
                    raise Absent("individual losses cancel: their share in the loss cannot be told")
                parts.append(rows * (g * call.value / total) if total else rows)
            found.append(_sum(parts) * (p.share * (p.n or 0)))
        return torch.cat(found)

    @property
    def compared(self) -> Tensor:
        """Of each sample the shares of some others' targets under which its loss is less, and the same `[N, 2]`.

        Only for instruments with `targets = True`.

        Raises:
            Absent: if that is not known, for a reason that it gives.
        """
        found = []
        self._all_counted()
        for p in self._passed():
            if len(p.calls) != 1:
                raise Absent(f"the pass came through {len(p.calls)} losses")
            compared = p.calls[0][0].compared
            if isinstance(compared, str):
                raise Absent(compared)
            if p.n not in (None, len(compared)):
                raise Absent(f"{p.calls[0][0].kind} has {len(compared)} rows for {p.n} samples")
            if compared.isnan().any():
                counted = p.calls[0][0].counted
                ignored = counted is not None and not counted.all()
                raise Absent("of some samples all targets are ignored" if ignored else "a loss is not finite")
            found.append(compared)
        return torch.cat(found)

    @property
    def gradient(self) -> dict[str, Tensor]:
        """The mean of the samples' own gradients `[*p]` by parameter, from `.grad` before anybody clips it."""
        self._known_share()
        if not self._gradient:
            raise Absent("no parameter has got a gradient in `.grad`")
        return self._gradient

    @property
    def before(self) -> float:
        """Norm of what was in `.grad` when the first of the passes began, in units of `gradient`."""
        self._known_share()
        # So many means of samples' own gradients were added to `.grad`, or taken away by a loss that is negated.
        return self._held / sum(abs(1 / p.share) for p in self._passed()) if self._held else 0.0

    @property
    def pure_gradient(self) -> dict[str, Tensor]:
        """As `gradient`, if it is the mean of the individual gradients (asks for `GradDot` in `needs`)."""
        gradient = self.gradient
        if self._outside:
            raise Absent(self._outside)
        return gradient

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups without their parameters, as they were when the gradient was taken."""
        return self._groups or options(self.optimizer)

    @property
    def start(self) -> dict[str, Tensor]:
        """The parameters where the gradient was taken."""
        self._passed()
        return self._start

    def _of(self, values: Mapping[str, T]) -> dict[str, T]:
        """Those of the parameters that have results, by name."""
        return {k: v for k, v in values.items() if self._parts is None or self.parameters[k] in self._parts}

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gives, computed once for all instruments that name it alike."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    @property
    def gradient_norms(self) -> dict[str, Tensor]:
        """Norms of `gradient`: of the whole under "", and by parameter."""
        gradient = self.gradient
        return self.once("gradient norms", lambda: norms(gradient))

    @property
    def update_norms(self) -> dict[str, Tensor]:
        """Norms of `update`: of the whole under "", and by parameter."""
        _ = self.update  # which says why there is none
        return self._update_norms()

    def along(self, gradient: dict[str, Tensor], direction: dict[str, Tensor]) -> float:
        """The inner product of the gradient with a direction, by parameter."""

        def make() -> tuple[float, Any]:
            total = sum(inner(g, direction[k].to(g.dtype)) for k, g in gradient.items())
            return total, (gradient, direction)  # held, so that nothing else gets their ids

        return self.once(("along", id(gradient), id(direction)), make)[0]

    def _update_norms(self) -> dict[str, Tensor]:
        return self.once("update norms", lambda: norms(self._update or {}))

    def _subtract(self) -> dict[str, Tensor]:
        """The parameters as they are, less what they were where the gradient was taken."""
        if "over" in self._shared:
            raise px.PackextError(
                "step.update is read when the step is over, and the parameters may have moved on: of a step in which "
                "no instrument is due, read it in conclude()."
            )
        return {name: p.detach() - self._start[name] for name, p in self.parameters.items()}

    def _moved(self) -> bool:
        update = self._update or {}
        # The square of what is very small is zero.
        return any(bool(self._update_norms()[k]) or bool(u.any()) for k, u in update.items())

    @property
    def update(self) -> dict[str, Tensor]:
        """What the step has added to the parameters, whoever did it."""
        self._passed()
        if self._update is None:
            self._update = self.once("update", self._subtract)
        if not self.once("moved", self._moved):
            raise Absent("no update: the parameters did not change between the backward pass and the end of the step")
        return self._update

    @property
    def direction(self) -> dict[Tensor, Tensor]:
        """The update by the parameters themselves, as `GradDot` takes directions; the same object at each call."""
        update = self.update
        return self.once("direction", lambda: {self.parameters[name]: u for name, u in update.items()})

    @property
    def factor(self) -> float:
        """What `.grad` has grown by is this times the mean of the samples' own gradients."""
        self._known_share()
        one = len(self.passes) == 1
        factors = [p.share if one else p.share * (p.n or 0) / self.n for p in self.passes]
        if max(factors) - min(factors) > 1e-6 * max(map(abs, factors)):
            raise Absent("the backward passes of the step weigh their samples differently")
        return 1 / factors[0]

    def layers(self, savefield: str) -> dict[str, Any]:
        """Results of a quantity, by parameter."""
        if savefield not in self._needs:
            raise KeyError(f"{savefield!r} is not the savefield of any quantity in `needs`: {', '.join(self._needs)}")
        passes = [p.results[self._instrument].get(savefield, {}) if p.results else {} for p in self._passed()]
        if len(passes) == 1:
            found = passes[0]
        elif savefield not in COMBINE:
            raise Absent(f"{savefield} is defined within one backward pass; this step had {len(passes)}")
        elif any(p.keys() != passes[0].keys() for p in passes):
            raise Absent("the backward passes of the step have reached different parameters")
        else:
            found = {k: COMBINE[savefield]([p[k] for p in passes]) for k in passes[0]}
        if isinstance(found, str):
            raise Absent(found)
        if not found:
            raise Absent(NONE)
        if savefield in INDIVIDUAL:
            self._all_counted()
        for p in self.passes:
            if p.multiplier != 1.0 and savefield not in POWERS:
                raise Absent(f"the loss was multiplied by {p.multiplier:.6g}: pass scale=<number> to monitor.step()")
        return found

    def __getitem__(self, savefield: str) -> Any:
        return _sum(list(self.layers(savefield).values()))


def options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups of an optimizer, without their parameters."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return [{k: v.item() if isinstance(v, Tensor) and v.numel() == 1 else v for k, v in g.items()} for g in groups]


def rescaled(savefield: str, value: Any, multiplier: float) -> Any:
    """A result, with a factor on the loss divided out."""
    power = POWERS.get(savefield, 0)
    if multiplier == 1.0 or not power or isinstance(value, str):
        return value
    factor = multiplier**-power
    if isinstance(value, tuple):  # estimates and eigenvalues: vectors and positions have no scale
        plain = (getattr(value, "vectors", None), getattr(value, "positions", None))
        parts = (v if any(v is p for p in plain) else v * factor for v in value)
        return type(value)(*parts)  # type: ignore[arg-type]
    return value * factor


class Count(px.BatchL2Grad):
    """How many samples there were, in `samples`; costs nothing."""

    savefield = "samples"

    def wants(self, form: Any) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def result(self, ask: Any) -> Any:
        """The number."""
        return ask.n


@functools.lru_cache(2)
def _drawn(n: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Some of n samples, the same for all parameters; and the state of the generator that has drawn them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(n, generator=generator)[:samples], generator.get_state()


class SlopeDot(px.GradDot):
    """Inner products of some individual gradients with a direction `[samples]`, drawn anew by seed, in `slope_dot`."""

    savefield = "slope_dot"

    def __init__(self, direction: dict[Tensor, Tensor], seed: int, samples: int = 16) -> None:
        """Take the direction by parameter, the seed of the draw, and how many; all if the batch has no more."""
        super().__init__(direction)
        self.samples, self.seed = samples, seed

    def result(self, ask: Any) -> Any:
        """The inner products for one parameter; None for one without a direction."""
        if self.direction is None or ask.parameter not in self.direction:
            return None
        order, _ = _drawn(ask.n, self.samples, self.seed)
        form = ask.statistics.form.subset(order.to(ask.parameter.device))
        return form.dots(self.direction[ask.parameter].to(form.acc)) * ask.factor


class Drawn(NamedTuple):
    """Entries of individual gradients `[samples, k]`, and their positions in the flattened parameter `[samples, k]`."""

    values: Tensor
    positions: Tensor


class DrawnGrad(px.BatchL2Grad):
    """Random entries of individual gradients of some samples, drawn anew by seed, in `drawn_grad`."""

    savefield = "drawn_grad"

    def __init__(self, seed: int, samples: int, entries: int) -> None:
        """Take the seed of the draw, how many samples, and how many entries of each; all if there are no more."""
        self.seed, self.samples, self.entries = seed, samples, entries

    def wants(self, form: Any) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def result(self, ask: Any) -> Drawn:
        """The entries for one parameter."""
        order, state = _drawn(ask.n, self.samples, self.seed)
        generator = torch.Generator().set_state(state)
        values, positions = ask.statistics.form.drawn(order.to(ask.parameter.device), self.entries, generator)
        return Drawn(values * ask.factor, positions)


def chosen_of(counts: Sequence[Sequence[int]], samples: int, seed: int) -> list[Tensor]:
    """Which of the samples that passes have drawn make a draw from the samples of all of them.

    Each pass has drawn `samples` of its own (all, if it has no more) in random order. How many of these fall to it is
    what a draw from all would give it; all processes make that one alike.

    Args:
        counts: samples of each pass, in each process.
        samples: how many are to be drawn.
        seed: of the draw.

    Returns:
        Of each process, indices into what its passes have drawn, one after the other.
    """
    generator = torch.Generator().manual_seed(seed + (1 << 31))  # passes draw by `seed`: not from the same numbers
    sizes = torch.tensor([n for passes in counts for n in passes])
    owners = torch.arange(len(sizes)).repeat_interleave(sizes)
    picked = owners[torch.randperm(len(owners), generator=generator)[:samples]]
    shares = iter(picked.bincount(minlength=len(sizes)).tolist())
    chosen = []
    for passes in counts:
        begins = itertools.accumulate((min(samples, n) for n in passes), initial=0)
        chosen.append([k for begin, _ in zip(begins, passes, strict=False) for k in range(begin, begin + next(shares))])
    return [torch.tensor(c, dtype=torch.long) for c in chosen]
