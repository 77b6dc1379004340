"""Norms and inner products of tensors as large as the parameters, without copies of them: memory is what they cost."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

#: Products that are summed up in the precision of the tensors, before their sums are in float64; and where a sum is
#: a tree, as on accelerators.
BLOCK, TREE = 1 << 15, 1 << 30

#: Entries of a difference, or of a copy in another dtype, that are in memory at once.
CHUNK = 1 << 16

#: Between these a norm in float32 is right: squares of its entries have not overflowed, nor those that count vanished.
SMALL, LARGE = 1e-12, 1e18

#: Gives a tensor in pieces, again at each call.
Parts = Callable[[], Iterable[Tensor]]


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


def norm(t: Tensor) -> Tensor:
    """The Euclidean norm of a tensor of 32 bits or more `[]`; finite wherever the entries are."""
    return _sound(torch.linalg.vector_norm(t), functools.partial(_chunks, t))


def norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Euclidean norms: of all together in float64 under "", and of each."""
    each = [t.float() if t.itemsize < 4 else t for t in tensors.values()]
    found = torch._foreach_norm(each)  # pyright: ignore[reportPrivateImportUsage]
    return _together(tensors, found, [functools.partial(_chunks, t) for t in each])


def norms_apart(ones: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norms of the differences of tensors of one name, as `norms` gives them."""
    parts = [functools.partial(_differences, one, others[name]) for name, one in ones.items()]
    found = [torch.stack([torch.linalg.vector_norm(part) for part in each()]).norm() for each in parts]
    return _together(ones, found, parts)


def _chunks(t: Tensor) -> Iterator[Tensor]:
    yield from t.reshape(-1).split(CHUNK)


def _differences(one: Tensor, other: Tensor) -> Iterator[Tensor]:
    for a, b in zip(_chunks(one), _chunks(other), strict=True):
        yield (a - b).float() if a.itemsize < 4 else a - b


def _together(names: dict[str, Tensor], found: Sequence[Tensor], parts: Sequence[Parts]) -> dict[str, Tensor]:
    each, whole = [], []
    for v, part in zip(found, parts, strict=True):
        read = v.double().cpu()  # once: an accelerator is waited for
        sound = _sound(read, part)
        each.append(v if sound is read else sound)
        whole.append(sound.cpu())
    return {"": norm(torch.stack(whole)), **dict(zip(names, each, strict=True))}


def _sound(found: Tensor, parts: Parts) -> Tensor:
    """A norm; taken again, in units of the largest entry, where squares of entries are too large or too small."""
    if SMALL < float(found) < LARGE:
        return found
    size = largest(parts())
    if not 0 < size < math.inf:
        return found
    return size * torch.stack([torch.linalg.vector_norm(part.double() / size) for part in parts()]).norm()
