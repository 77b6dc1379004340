"""Arithmetic of lists of tensors, entry by entry: torch's own `_foreach`, which has one kernel for many on a GPU.

The second argument is a list of tensors, or of a number for each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _run(name: str, *lists: Sequence[Any]) -> list[Tensor]:
    f: Callable[..., Any] = getattr(torch, f"_foreach_{name}")
    return list(f(*(list(each) for each in lists))) if lists[0] else []


def add(one: Sequence[Tensor], other: Sequence[Any]) -> list[Tensor]:
    """Sums."""
    return _run("add", one, other)


def mul(one: Sequence[Tensor], other: Sequence[Any]) -> list[Tensor]:
    """Products."""
    return _run("mul", one, other)


def div(one: Sequence[Tensor], other: Sequence[Any]) -> list[Tensor]:
    """Quotients."""
    return _run("div", one, other)


def sqrt(one: Sequence[Tensor]) -> list[Tensor]:
    """Roots."""
    return _run("sqrt", one)


def lerp(one: Sequence[Tensor], other: Sequence[Tensor], weights: Sequence[float]) -> list[Tensor]:
    """`one + weight (other - one)`."""
    return _run("lerp", one, other, weights)


def norms(one: Sequence[Tensor]) -> list[Tensor]:
    """Euclidean norms, in float64."""
    return [n.double() for n in _run("norm", one)]


def norm(one: Sequence[Tensor]) -> float:
    """The norm of all together."""
    found = norms([t for t in one if t.numel()])
    return float(torch.stack([n.to(found[0].device) for n in found]).norm()) if found else 0.0


def add_(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Add in place."""
    _run("add_", one, other)
