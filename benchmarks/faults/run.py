"""One training run under the monitor, with or without a fault."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

import packext as px
from benchmarks.faults.everyday import Own
from benchmarks.faults.faults import FAULTS, Setup
from benchmarks.faults.problems import PROBLEMS, optimizer
from packext.diagnostics import (
    RULES,
    BatchSize,
    Cockpit,
    GradNorm,
    HessMaxEV,
    IdleUnits,
    InitialScale,
    InputScale,
    Instrument,
    LearningRate,
    Loss,
    NoiseScale,
    OutputScale,
    ParamNorm,
    SampleLosses,
    TargetRanks,
    Untrained,
    UpdateSize,
    Verdict,
)  # fmt: skip
from packext.diagnostics._verdict import Judge

WINDOW, HEALTHY_STEPS, VALID_EVERY = 100, 250, 5


def instruments() -> list[Instrument]:
    """Those that rules read, beside the largest eigenvalue."""
    return [
        BatchSize(), GradNorm(), IdleUnits(), InitialScale(), InputScale(), LearningRate(), Loss(), NoiseScale(),
        OutputScale(), ParamNorm(), SampleLosses(), UpdateSize(), TargetRanks(), Untrained(),
    ]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What to run: a fault, or none."""

    problem: str
    optimizer: str
    seed: int
    fault: str = ""
    severity: str = "full"
    rate: float | None = None


@dataclass
class Outcome:
    """What came of it."""

    case: Case
    said: list[Verdict] = field(default_factory=list)
    pages: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    valid: list[float] = field(default_factory=list)
    guilty: set[int] = field(default_factory=set)
    broken: int | None = None
    """The first step whose loss was not finite."""


class Listener:
    """A sink that keeps everything."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def begin(self, names: list[str]) -> int:
        return 0

    def write(self, step: int, values: Mapping[str, Any], absent: Mapping[str, str]) -> None:
        self.outcome.pages.append((step, dict(values)))

    def say(self, verdict: Verdict) -> None:
        raise AssertionError("no rule listens while a run is recorded")


def hear(outcome: Outcome) -> Outcome:
    """Let the rules hear a run: they read what instruments said, in the order in which a monitor would tell them."""
    judge = Judge(kind() for kind in RULES)
    outcome.said = [verdict for step, values in outcome.pages for verdict in judge.hear(step, values)]
    return outcome


def train(case: Case, steps: int | None = None, watched: bool = True) -> Outcome:
    """Train, and keep all that instruments say.

    Args:
        case: what.
        steps: how many; by default as many as the score wants.
        watched: whether there is a monitor.

    Returns:
        The outcome, which no rule has heard yet.
    """
    problem = PROBLEMS[case.problem]
    torch.manual_seed(case.seed)
    setup = Setup(
        problem, problem.make(), copy.copy(problem.data()), case.rate or problem.rates[case.optimizer], case.seed
    )
    if case.fault:
        getattr(FAULTS[case.fault], case.severity)(setup)
    model, loss_fn = setup.model, problem.loss()
    groups: dict[float, list[Any]] = {}
    for name, p in model.named_parameters():
        factor = next((f for start, f in setup.rates.items() if name.startswith(start)), 1.0)
        if factor:
            groups.setdefault(factor, []).append(p)
    given = [{"params": ps, "lr": setup.rate * f} for f, ps in groups.items()]
    opt = optimizer(case.optimizer, given, setup.rate, problem.decay)
    own, outcome = isinstance(loss_fn, Own), Outcome(case, guilty=setup.guilty)
    monitor = None
    if watched:
        seen = [*instruments(), HessMaxEV()] if setup.sharpness else instruments()
        px.extend(model)
        if not own:
            px.extend(loss_fn)
        monitor = Cockpit(model, opt, None, sinks=[Listener(outcome)], instruments=seen, rules=[])
    g, order, data = setup.generator(), torch.empty(0, dtype=torch.long), setup.data
    starts = [group["lr"] for group in opt.param_groups]
    for step in range(steps or (FAULTS[case.fault].onset + WINDOW if case.fault else HEALTHY_STEPS)):
        for change in setup.before:
            change(step)
        if len(order) < setup.batch:
            order = torch.randperm(len(data.x), generator=g)
        chosen, order = order[: setup.batch], order[setup.batch :]
        x, y = data.x[chosen], data.y[chosen]
        if problem.draw:
            with px.disable():
                x, y = problem.draw(model, x, y)
        for group, start in zip(opt.param_groups, starts, strict=True):
            group["lr"] = start * (problem.schedule(step) if problem.schedule else 1.0)
        scale = len(x) if own else "sample"
        with monitor.step(scale, chosen) if monitor else nullcontext() as seen_step:
            loss = loss_fn(model(x), y)
            if own:
                if seen_step:
                    seen_step.losses(loss)
                loss = loss.mean()
            opt.zero_grad()
            loss.backward()
            if problem.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), problem.clip)
            opt.step()
        if outcome.broken is None and not math.isfinite(loss.item()):
            outcome.broken = step
        if outcome.broken is not None and step > outcome.broken + 5:
            break
        if step % VALID_EVERY == 0:
            model.eval()
            with torch.no_grad(), px.disable():
                valid = float(loss_fn(model(data.valid_x), data.valid_y).mean())
            model.train()
            outcome.valid.append(valid)
            if monitor:
                monitor.log(valid_loss=valid)
    return outcome
