"""`packext bench`: what quantities of a user's model cost on a user's machine, next to the plain gradient."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import packext as px
from packext._subject import Mistake, Subject

#: What is timed unless told otherwise: names of quantities, joined by "+" where they share a pass.
USUAL = ("BatchGrad", "BatchL2Grad", "Variance", "BatchL2Grad+Variance+GradDot", "DiagGGNMC", "KFAC")
#: Arguments of those that need some.
ARGUMENTS: dict[str, dict[str, Any]] = {"ClippedGrad": {"max_norm": 1.0}}
#: Rounds before those that count, in which models are probed and memory is warmed.
WARMUP = 2
#: Seconds that a turn takes at least, by repeating a short step.
SLOT = 0.02

Step = Callable[[], None]


@dataclass(frozen=True)
class Cost:
    """What one row costs, as multiples of the plain gradient.

    Attributes:
        name: of the row.
        time: median over the rounds of its time over that of the plain gradient in the same round; None if refused.
        quartiles: of these ratios.
        memory: ratio of the peaks of memory that a step allocates.
        why: it was refused.
    """

    name: str
    time: float | None = None
    quartiles: tuple[float, float] = (math.nan, math.nan)
    memory: float | None = None
    why: str = ""


class SmallNet(nn.Sequential):
    """Two convolutions, a normalisation and a linear layer: what is timed if no model is given."""

    def __init__(self) -> None:
        """Make the layers, for images `[N, 3, 32, 32]`."""
        super().__init__(
            nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.GroupNorm(8, 64),
            nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 7 * 7, 10),
        )  # fmt: skip


def rows(names: Sequence[str]) -> dict[str, Callable[[], list[Any]]]:
    """Of each row how its quantities are made.

    Args:
        names: of quantities of `packext`, joined by "+" where they share a pass.

    Returns:
        By the row's name.

    Raises:
        Mistake: for a name that is none, or a row that is no context of its own (the same quantity twice).
    """
    known = {n for n, v in vars(px).items() if isinstance(v, type) and hasattr(v, "savefield")}
    for name in names:
        for part in name.split("+"):
            if part not in known:
                raise Mistake(f"{part!r} is no quantity. There are {', '.join(sorted(known))}.")
    found = {
        name: lambda name=name: [getattr(px, part)(**ARGUMENTS.get(part, {})) for part in name.split("+")]
        for name in names
    }
    for name, make in found.items():
        try:
            px.backpack(*make())
        except ValueError as error:
            raise Mistake(f"{name}: {error}") from None
    return found


def costs(subject: Subject, wanted: Sequence[str], seconds: float) -> Iterator[Cost]:
    """Time one row after the other against the plain gradient, A B A B.

    Args:
        subject: its model is copied.
        wanted: names of rows.
        seconds: of all rows together, about.

    Yields:
        Costs; of a second copy of the plain gradient first, which says how far a ratio is to be trusted.
    """
    made: dict[str, Callable[[], list[Any]] | None] = {"the plain gradient again": None, **rows(wanted)}
    plain = Work(subject)
    plain()
    peak = peak_memory(plain)
    for name, make in made.items():
        step = Work(subject, make)
        try:
            step()
        except px.PackextError as error:
            yield Cost(name, why=str(error))
            continue
        ratios = against(plain, step, seconds / len(made))
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        yield Cost(name, middle, (low, high), peak_memory(step) / peak)


def against(plain: Step, step: Step, seconds: float) -> list[float]:
    """Ratios of the time of `step` to that of `plain`, one for each round; three rounds at least."""
    turns = {k: max(1, math.ceil(SLOT / _time(s))) for k, s in enumerate((plain, step))}
    ratios: list[float] = []
    start = perf_counter()
    for k in range(WARMUP + 10_000):
        order = (0, 1) if k % 2 else (1, 0)  # A B, B A: what slows down over time slows both
        times = {which: _time((plain, step)[which], turns[which]) for which in order}
        if k >= WARMUP:
            ratios.append(times[1] / times[0])
            if len(ratios) >= 3 and perf_counter() - start > seconds:
                break
    return ratios


def _time(step: Step, turns: int = 1) -> float:
    """Seconds of one step, as the mean of some, with the garbage collector out of the way."""
    gc.disable()
    try:
        _synchronise()
        start = perf_counter()
        for _ in range(turns):
            step()
        _synchronise()
        elapsed = perf_counter() - start
    finally:
        gc.enable()
    return max(elapsed, 1e-9) / turns


def _synchronise() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(step: Work) -> int:
    """Bytes that tensors made in a step take at its peak, results included, by torch's own record of allocations."""
    step()
    step.clear()
    gc.collect()
    if next(step.model.parameters()).is_cuda:
        _synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        _synchronise()
        return max(1, torch.cuda.max_memory_allocated() - before)
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        step()
    kineto = record.profiler.kineto_results if record.profiler is not None else None
    assert kineto is not None
    events = sorted((e for e in kineto.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, held)
    return max(1, peak)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep lines that the profiler's library writes to the standard error stream away from the table."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Work:
    """A step of a copy of the model, forward and backward: the plain gradient, or one with quantities."""

    def __init__(self, subject: Subject, make: Callable[[], list[Any]] | None = None) -> None:
        """Copy the model; `make` gives the quantities of a step, none by default."""
        self.subject, self.make = subject, make
        self.model, self.loss_fn = copy.deepcopy(subject.model), copy.deepcopy(subject.loss_fn)
        if make is not None:
            px.extend(self.model)
            px.extend(self.loss_fn)
        self.fields: list[str] = []

    def __call__(self) -> None:
        """Take the step. Results of the last one stay until then, as they do in a training loop."""
        self.model.zero_grad(set_to_none=True)
        if self.make is None:
            return self.subject.loss(self.model, self.loss_fn).backward()
        quantities = self.make()
        self.fields = [q.savefield for q in quantities]
        with px.backpack(*quantities):
            self.subject.loss(self.model, self.loss_fn).backward()

    def clear(self) -> None:
        """Forget gradients and results."""
        self.model.zero_grad(set_to_none=True)
        for p in self.model.parameters():
            for field in self.fields:
                if hasattr(p, field):
                    delattr(p, field)
