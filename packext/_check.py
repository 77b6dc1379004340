"""`packext check`: each quantity of a user's model next to the slow oracle, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from packext import testing
from packext._errors import PackextError
from packext._quantity import HessianQuantity, Quantity
from packext._subject import Mistake, Subject

#: What an error means that is not one of packext's, where the oracle by itself has one too, and where it has none.
ALONE = "the oracle could not run the model on one sample at a time, or differentiate it twice:"
FAILED = "packext has failed where the definition can be computed, which is a defect of packext:"


@dataclass(frozen=True)
class Outcome:
    """What came of one quantity.

    Attributes:
        quantity: its name.
        verdict: "right", "wrong", "refused", or "not checked".
        error: the largest, relative to the largest value of the parameter; None without an oracle.
        where: the parameter that has it.
        why: of what was refused or not checked, or has failed.
    """

    quantity: str
    verdict: str
    error: float | None = None
    where: str = ""
    why: str = ""


def quantities() -> list[Quantity]:
    """What is checked: all that have an oracle, draw nothing and know samples."""
    # Products with the Hessian are right for models that couple samples too: they would say nothing of those.
    curvature = [q for q in testing.exact_curvature() if not isinstance(q, HessianQuantity)]
    return [*testing.all_quantities(), *curvature]


def outcomes(subject: Subject) -> Iterator[Outcome]:
    """Check one quantity after the other, each in a pass of its own, in float64.

    Args:
        subject: its model, loss and batch are copied.

    Yields:
        The outcome of `.grad`, of each quantity of individual gradients, and of those of curvature.

    Raises:
        Mistake: if the model draws random numbers, so that no two passes are the same, or there are no samples.
    """
    try:
        reference = testing.Reference(subject.model, subject.loss_fn, subject.inputs, subject.targets)
    except (PackextError, ValueError) as error:
        hint = " Leave out --train." if isinstance(error, PackextError) and subject.model.training else ""
        raise Mistake(_said(error) + hint) from None
    seen = False
    for quantity in quantities():
        name = type(quantity).__name__
        try:
            report = testing.against(reference, [quantity])
        except PackextError as error:
            yield Outcome(name, "refused", why=str(error))
            continue
        except testing.NoOracle as error:
            yield Outcome(name, "not checked", why=_said(error))
            continue
        except Exception as error:  # of the model's own code, or a crash
            verdict, what = ("wrong", FAILED) if _is_defined(reference, quantity) else ("not checked", ALONE)
            yield Outcome(name, verdict, why=f"{what} {type(error).__name__}: {error}")
            continue
        plain = [e for e in report if e.quantity == ".grad"]
        if plain and not seen:
            seen = True
            yield _worst(".grad", plain)
        yield _worst(name, [e for e in report if e.quantity != ".grad"])


def _said(error: Exception) -> str:
    """What `testing.check` would say, under another command's name."""
    return str(error).removeprefix("check: ")


def _is_defined(reference: testing.Reference, quantity: Quantity) -> bool:
    """Whether the oracle by itself says what the results should be."""
    try:
        if type(quantity) in testing.CURVATURE_ORACLES:
            for name in reference.parameters:
                testing.CURVATURE_ORACLES[type(quantity)].wanted(quantity, reference, name)
        else:
            reference.gradients  # noqa: B018 - computed when it is asked for
    except Exception:
        return False
    return True


def _worst(name: str, entries: Sequence[testing.Entry]) -> Outcome:
    worst = max(entries, key=lambda e: (not e.ok, e.error))
    verdict = "right" if all(e.ok for e in entries) else "wrong"
    return Outcome(name, verdict, worst.error, worst.parameter)


def is_bad(found: Sequence[Outcome]) -> bool:
    """Whether something is wrong, or nothing right."""
    verdicts = {o.verdict for o in found}
    return "wrong" in verdicts or "right" not in verdicts
