"""Exceptions, one per remedy. Every message names where, what, and the call that would help."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class PackextError(RuntimeError):
    """Base of the errors that packext raises; what is wrong in an argument is a ValueError or TypeError.

    Attributes:
        quantities: of the context, to which alone the error is due; empty where it may be due to all of them.
    """

    quantities: tuple[Any, ...] = ()


@contextmanager
def due_to(quantities: Iterable[Any]) -> Iterator[None]:
    """Errors in here have a note that they concern these quantities alone, unless they have one; () is all."""
    try:
        yield
    except PackextError as error:
        vars(error).setdefault("quantities", tuple(quantities))
        raise


class NotExtendedError(PackextError):
    """A context asked for quantities, but no extended model (or loss) took part."""


class UnsupportedUseError(PackextError):
    """A parameter is used in a way whose per-sample gradient packext cannot give."""


class CoupledSamplesError(PackextError):
    """Samples influence each other, or the batch axis is not where it was said to be."""


class WrongRuleError(PackextError):
    """The probe found that rules disagree with autograd: a path not seen, randomness, a hook, or a defect of theirs."""
