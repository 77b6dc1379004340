"""`packext check`: each quantity of a user's model next to the slow oracle, one after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import packext as px
from packext import testing
from packext._subject import Mistake, Subject

#: Entries of a sample's output up to which the oracle of the GGN, a pass for each of them, is tried.
OUTPUTS = 64
#: Entries of all parameters up to which that of the Hessian, a pass for each of them, is.
ENTRIES = 4000
#: What an error means that is not one of packext's.
ALONE = "the oracle could not run the model on one sample at a time, or differentiate it twice:"


@dataclass(frozen=True)
class Outcome:
    """What came of one quantity.

    Attributes:
        quantity: its name.
        verdict: "right", "wrong", "refused", "given" (there is no oracle for it), or "not checked".
        error: the largest, relative to the largest value of the parameter; None without an oracle.
        where: the parameter that has it.
        why: of what was refused or not checked.
    """

    quantity: str
    verdict: str
    error: float | None = None
    where: str = ""
    why: str = ""


def outcomes(subject: Subject) -> Iterator[Outcome]:
    """Check one quantity after the other, each in a pass of its own, in float64.

    Args:
        subject: its model, loss and batch are copied.

    Yields:
        The outcome of `.grad`, of each quantity of individual gradients, of those of curvature that have an oracle, and
        of `KFAC`. A model that draws random numbers, so that no two passes are the same, is a `Mistake`.
    """
    _same_again(subject)
    tolerance, seen = 1e-8, False
    for quantity in testing.all_quantities():
        try:
            _results(subject, quantity)
            report = testing.check(subject.model, subject.loss_fn, subject.inputs, subject.targets, [quantity])
        except px.PackextError as error:
            yield Outcome(_name(quantity), "refused", why=str(error))
            continue
        except Exception as error:  # of the model's own code
            yield Outcome(_name(quantity), "not checked", why=f"{ALONE} {type(error).__name__}: {error}")
            continue
        plain = [e for e in report if e.quantity == ".grad"]
        if plain and not seen:
            tolerance, seen = plain[0].tolerance, True
            yield _worst(".grad", plain)
        yield _worst(_name(quantity), [e for e in report if e.quantity != ".grad"])
    yield from _curvature(subject, tolerance)


def _same_again(subject: Subject) -> None:
    with torch.no_grad(), torch.random.fork_rng():
        before = torch.get_rng_state()
        testing.call(copy.deepcopy(subject.model), subject.inputs)
        if not torch.equal(before, torch.get_rng_state()):
            raise Mistake("the model draws random numbers (dropout?), so that no two passes agree: leave out --train.")


def _curvature(subject: Subject, tolerance: float) -> Iterator[Outcome]:
    model, loss_fn = copy.deepcopy(subject.model).double(), copy.deepcopy(subject.loss_fn).double()
    inputs, targets = pytree.tree_map_only(Tensor, _double, (subject.inputs, subject.targets))
    twin = replace(subject, model=model, loss_fn=loss_fn, inputs=inputs, targets=targets)
    n = testing.batch_size(twin.inputs)
    weights = [1 / n] * n if getattr(loss_fn, "reduction", "mean") == "mean" else None
    arguments = (model, loss_fn, twin.inputs, twin.targets, 0, weights)
    outputs = testing.call(model, twin.inputs).numel() // n
    entries = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def ggn() -> testing.Rows:
        return testing.curvature_rows(*arguments)

    def hessian() -> testing.Rows:
        return testing.hessian_diagonals(*arguments)

    few = f"the oracle takes a pass for each of a sample's {outputs} outputs" if outputs > OUTPUTS else ""
    small = f"the oracle takes a pass for each of {entries} parameters" if entries > ENTRIES else ""
    kinds: list[tuple[Any, Callable[[], testing.Rows], Callable[[Tensor], Tensor], str]] = [
        (px.DiagGGNExact(), ggn, testing.GGN_ORACLES[px.DiagGGNExact], few),
        (px.BatchDiagGGNExact(), ggn, testing.GGN_ORACLES[px.BatchDiagGGNExact], few),
        (px.DiagHessian(), hessian, lambda rows: rows.sum(0), small),
        (px.BatchDiagHessian(), hessian, lambda rows: rows, small),
    ]
    known: dict[Callable[[], testing.Rows], testing.Rows] = {}
    for quantity, oracle, definition, why in kinds:
        if why:
            yield Outcome(_name(quantity), "not checked", why=why)
            continue
        try:
            got = _results(twin, quantity)
            rows = known[oracle] = known.get(oracle) or oracle()
        except px.PackextError as error:
            yield Outcome(_name(quantity), "refused", why=str(error))
            continue
        except Exception as error:
            yield Outcome(_name(quantity), "not checked", why=f"{ALONE} {type(error).__name__}: {error}")
            continue
        errors = {name: testing.relative_error(value, definition(rows[name])) for name, value in got.items()}
        yield _worst(_name(quantity), [testing.Entry(k, "", error, tolerance) for k, error in errors.items()])
    try:
        _results(twin, px.KFAC())
        yield Outcome("KFAC", "given", why="there is no oracle for an approximation")
    except px.PackextError as error:
        yield Outcome("KFAC", "refused", why=str(error))


def _results(subject: Subject, quantity: Any) -> dict[str, Any]:
    """Of each parameter that has one."""
    model, loss_fn = px.extend(copy.deepcopy(subject.model)), px.extend(copy.deepcopy(subject.loss_fn))
    with px.backpack(quantity):
        subject.loss(model, loss_fn).backward()
    field = quantity.savefield
    return {name: getattr(p, field) for name, p in model.named_parameters() if hasattr(p, field)}


def _double(t: Tensor) -> Tensor:
    return t.detach().double() if t.is_floating_point() else t


def _worst(name: str, entries: Sequence[testing.Entry]) -> Outcome:
    if not entries:
        return Outcome(name, "not checked", why="no parameter has one")
    worst = max(entries, key=lambda e: (not e.ok, e.error))
    verdict = "right" if all(e.ok for e in entries) else "wrong"
    return Outcome(name, verdict, worst.error, worst.parameter)


def _name(quantity: Any) -> str:
    return type(quantity).__name__


def is_bad(found: Sequence[Outcome]) -> bool:
    """Whether something is wrong, or nothing right."""
    verdicts = {o.verdict for o in found}
    return "wrong" in verdicts or "right" not in verdicts
