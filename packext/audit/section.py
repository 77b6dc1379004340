"""A section of the report: plain numbers that become JSON and come back, and reasons for those that there are not."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

import packext as px
from packext.attacks import Threat


@dataclass(kw_only=True)
class Section:
    """Base of all sections.

    Attributes:
        threats: of the attacks that were made, by name.
        absent: what was not measured, and why.
        seconds: that it took.
        arrays: what pictures are drawn from; kept beside the JSON.
    """

    threats: dict[str, Threat] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    arrays: dict[str, np.ndarray] = field(default_factory=dict, repr=False, metadata={"json": False})

    @contextmanager
    def unless_refused(self, what: str) -> Iterator[None]:
        """Note as absent what is refused inside.

        Errors of torch count as well: a model that cannot be differentiated twice, or normalises a batch of one, is no
        failure of the audit.
        """
        try:
            yield
        except (px.PackextError, RuntimeError, ValueError, ImportError) as error:
            kind = "" if isinstance(error, (px.PackextError, ImportError)) else f"{type(error).__name__}: "
            self.absent[what] = kind + " ".join(str(error).split())[:600]


@dataclass(frozen=True)
class Interval:
    """A mean or a rate, with an interval of 95 %.

    Attributes:
        value: estimated.
        low: end of the interval.
        high: end of the interval.
    """

    value: float
    low: float
    high: float

    @classmethod
    def mean(cls, values: Sequence[float], least: float = 0.0, most: float = 1.0, draws: int = 4000) -> Interval:
        """Of a mean of values with known ends, by bootstrap with one more value, at the end (Gaffke 2005).

        It holds for few values as well, of which it is wide, and is no point where all are equal. Of hits and misses
        alone it is that of `share`.

        Args:
            values: one for each draw.
            least: that a value can be.
            most: that a value can be.
            draws: of the bootstrap, from a generator of its own.

        Returns:
            The mean with its interval.
        """
        if set(values) <= {0.0, 1.0} and (least, most) == (0.0, 1.0):
            return cls.share(round(sum(values)), len(values))
        v = torch.tensor(values, dtype=torch.float64)
        weights = -torch.rand(draws, len(v) + 1, generator=torch.Generator().manual_seed(0), dtype=v.dtype).log()
        weights /= weights.sum(1, keepdim=True)
        seen, rest = weights[:, :-1] @ v, weights[:, -1]
        return cls(
            float(v.mean()), float((seen + rest * least).quantile(0.025)), float((seen + rest * most).quantile(0.975))
        )

    @classmethod
    def share(cls, hits: int, of: int) -> Interval:
        """Of a share of successes, exact (Clopper and Pearson).

        Args:
            hits: successes.
            of: attempts.

        Returns:
            The share with its interval.
        """
        return cls(hits / of, _least(hits, of), 1 - _least(of - hits, of))


def chances(of: int, rate: float) -> torch.Tensor:
    """Probabilities `[of + 1]` of each number of successes, at a rate between 0 and 1."""
    k = torch.arange(of + 1, dtype=torch.float64)
    ways = torch.lgamma(k[-1] + 1) - torch.lgamma(k + 1) - torch.lgamma(k[-1] - k + 1)
    return (ways + k * math.log(rate) + (k[-1] - k) * math.log1p(-rate)).exp()


def _least(hits: int, of: int) -> float:
    """The rate at which so many hits or more have the probability 2.5 %."""
    low, high = 0.0, 1.0
    while hits and high - low > 1e-12:
        rate = (low + high) / 2
        low, high = (rate, high) if float(chances(of, rate)[hits:].sum()) <= 0.025 else (low, rate)
    return low


def plain(value: Any) -> Any:
    """As JSON has it: dataclasses as objects, tuples as lists, what is not finite as null.

    Args:
        value: of dataclasses, dictionaries, sequences and numbers.

    Returns:
        Of dictionaries, lists, strings and numbers.
    """
    if dataclasses.is_dataclass(value):
        shown = [f for f in dataclasses.fields(value) if f.metadata.get("json", True)]
        return {f.name: plain(getattr(value, f.name)) for f in shown}
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def restored(kind: Any, value: Any) -> Any:
    """The inverse of `plain`, for a type that says what its parts are.

    Args:
        kind: a dataclass, a list, dictionary or union of such, or a plain type.
        value: as `plain` made it.

    Returns:
        An object of that type.
    """
    if value is None or kind is Any:
        return value
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return restored(next(a for a in args if a is not type(None)), value)
    if origin is list:
        return [restored(args[0], v) for v in value]
    if origin is dict:
        return {k: restored(args[1], v) for k, v in value.items()}
    if origin is tuple:
        return tuple(value)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{k: restored(hints[k], v) for k, v in value.items()})
    return value
