"""Arithmetic of lists of tensors, entry by entry: torch's own `_foreach`, which has one kernel for many on a GPU.

The second argument is a list of tensors, or of a number for each tensor.
"""

from __future__ import annotations

import math
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


def norm(one: Sequence[Tensor]) -> float:
    """The norm of all together, in float64, in which squares do not overflow."""
    some = [t for t in one if t.numel()]
    found = float(_stacked(_run("norm", some)).norm())
    return float(_stacked([t.double().norm() for t in some]).norm()) if math.isinf(found) else found


def finite(one: Sequence[Tensor]) -> bool:
    """Whether all entries are; of squares that overflow, one looks at the entries."""
    return math.isfinite(norm(one)) or all(bool(t.isfinite().all()) for t in one)


def nonzero(one: Sequence[Tensor]) -> list[bool]:
    """Of each whether it has an entry that is not 0, as sparse ones are taken to; a GPU is waited for once."""
    some = [t.any() if t.layout == torch.strided else torch.ones((), dtype=torch.bool) for t in one]
    return [bool(each) for each in _stacked(some).tolist()]


def dots(one: Sequence[Tensor], other: Sequence[Tensor]) -> list[float]:
    """Inner products of the two lists' tensors, in float64 where they overflow; a GPU is waited for once."""
    kinds = [torch.promote_types(a.dtype, b.dtype) for a, b in zip(one, other, strict=True)]
    flat = [(a.reshape(-1).to(d), b.reshape(-1).to(d)) for a, b, d in zip(one, other, kinds, strict=True)]
    found = _stacked([torch.dot(a, b) for a, b in flat]).tolist()
    if all(map(math.isfinite, found)):
        return found
    return _stacked([torch.dot(a.double(), b.double()) for a, b in flat]).tolist()


def _stacked(numbers: Sequence[Tensor]) -> Tensor:
    """Tensors of one entry, of any dtypes and devices, as one in float64."""
    if len({(n.dtype, n.device) for n in numbers}) > 1:
        numbers = [n.to(numbers[0].device, torch.float64) for n in numbers]
    return torch.stack(list(numbers)).double() if numbers else torch.zeros(0, dtype=torch.float64)


def add_(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Add in place."""
    _run("add_", one, other)
