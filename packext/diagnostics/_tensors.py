"""Norms and inner products of tensors as large as the parameters, without copies of them: memory is what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

#: Products that are summed up in the precision of the tensors, before their sums are in float64; and where a sum is
#: a tree, as on accelerators.
BLOCK, TREE = 1 << 15, 1 << 30

#: Entries of a difference, or of a copy in another dtype, that are in memory at once.
CHUNK = 1 << 16


def inner(one: Tensor, other: Tensor) -> float:
    """The inner product of two tensors of one shape and dtype."""
    size = BLOCK if one.device.type == "cpu" else TREE
    blocks = zip(one.reshape(-1).split(size), other.reshape(-1).split(size), strict=True)
    return sum(float(torch.dot(a, b)) for a, b in blocks)


def total(t: Tensor) -> Tensor:
    """The sum of all entries `[]`, in float64."""
    if t.device.type != "cpu":
        return t.sum(dtype=torch.double)
    # torch's own sum of another dtype converts entry by entry.
    return torch.stack([part.double().sum() for part in t.reshape(-1).split(CHUNK)]).sum()


def largest(tensors: Iterable[Tensor]) -> float:
    """The largest magnitude of an entry; NaN if one is."""
    return float(torch.stack([torch.stack(t.aminmax()).abs().max().double().cpu() for t in tensors]).max())


def square(tensors: dict[str, Tensor]) -> float:
    """The squared Euclidean norm of all together."""
    return sum(inner(t, t) for t in tensors.values())


def norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Euclidean norms: of all together in float64 under "", and of each."""
    each = [t.float() if t.itemsize < 4 else t for t in tensors.values()]
    return _together(tensors, torch._foreach_norm(each))  # pyright: ignore[reportPrivateImportUsage]


def norms_apart(ones: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norms of the differences of tensors of one name, as `norms` gives them."""
    found = []
    for name, one in ones.items():
        pairs = zip(one.reshape(-1).split(CHUNK), others[name].reshape(-1).split(CHUNK), strict=True)
        parts = [torch.linalg.vector_norm((a - b).float() if a.itemsize < 4 else a - b) for a, b in pairs]
        found.append(parts[0] if len(parts) == 1 else torch.stack(parts).norm())
    return _together(ones, found)


def _together(names: dict[str, Tensor], each: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"": torch.stack([v.double().cpu() for v in each]).norm(), **dict(zip(names, each, strict=True))}
