"""Lookups, masked gradients and sums of several uses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from packext import _scratch
from packext._factored.base import (
    Dense,
    Factored,
    Terms,
    accumulation_dtype,
    is_vector,
    storage_bytes,
)
from packext._factored.kronecker import Kronecker, overlap
from packext._factored.outer import Outer


class Lookup(Factored):
    """Rows of a table: `row_n[id] = sum over s with index[n, s] = id of g[n, s]`."""

    def __init__(
        self,
        index: Tensor,
        g: Tensor,
        shape: Sequence[int],
        one_hot: bool = True,
        positions: int | float | None = None,
    ) -> None:
        """Take the indices, what arrived for them, and the table.

        Args:
            index: `[N, S]`, negative where there is no gradient.
            g: `[N, S, E]`.
            shape: of the table, `[V, E]`.
            one_hot: whether g is the gradient at the output of the linear map that multiplies the table by a one-hot
                vector at each position (and zeros for a negative index).
            positions: how many of the S a sample has on average, where those behind only fill up.
        """
        self.index, self.g, self.one_hot = index, g, one_hot
        self.n, self.s = index.shape
        self.positions = self.s if positions is None else positions
        self.shape = torch.Size(shape)
        self.acc, self.device = accumulation_dtype(g.dtype), g.device

    def _scatter(self, index: Tensor, g: Tensor) -> Tensor:
        """Dense rows `[c, V, E]` of indices `[c, S]`."""
        c, (v, e) = len(index), self.shape
        keep = index >= 0
        flat = (index + v * torch.arange(c, device=self.device)[:, None])[keep]
        out = torch.zeros(c * v, e, dtype=self.acc, device=self.device)
        return out.index_add(0, flat, g[keep].to(self.acc)).reshape(c, v, e)

    def rows(self, lo: int, hi: int) -> Tensor:
        return self._scatter(self.index[lo:hi], self.g[lo:hi])

    def select(self, index: Tensor) -> Tensor:
        return self._scatter(self.index[index], self.g[index])

    def subset(self, index: Tensor) -> Lookup:
        return Lookup(self.index[index], self.g[index], self.shape, self.one_hot, self.positions)

    @functools.cached_property
    def grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sample `[U]`, id `[U]` and gradient `[U, E]` of each distinct (sample, id)."""
        keep = self.index >= 0
        sample = torch.arange(self.n, device=self.device)[:, None].expand_as(self.index)[keep]
        key = sample * self.shape[0] + self.index[keep]
        unique, inverse = key.unique(return_inverse=True)
        z = torch.zeros(len(unique), self.shape[1], dtype=self.acc, device=self.device)
        z = z.index_add(0, inverse, self.g[keep].to(self.acc))
        return unique // self.shape[0], unique % self.shape[0], z

    def _over_ids(self, values: Tensor) -> Tensor:
        out = torch.zeros(*self.shape, dtype=self.acc, device=self.device)
        return out.index_add(0, self.grouped[1], values)

    def _over_samples(self, values: Tensor) -> Tensor:
        out = torch.zeros(self.n, dtype=self.acc, device=self.device)
        return out.index_add(0, self.grouped[0], values)

    def weighted(self, weight: Tensor | None) -> Tensor:
        sample, _, z = self.grouped
        return self._over_ids(z if weight is None else z * weight[sample, None])

    def sq_norms(self) -> Tensor:
        return self._over_samples(self.grouped[2].square().sum(1))

    def second_moment(self) -> Tensor:
        return self._over_ids(self.grouped[2].square())

    def scatter(self) -> Tensor:
        """Deviations of the rows that are there, and those of the zeros that are not."""
        sample, ids, z = self.grouped
        mean = self._over_ids(z) / self.n
        present = torch.zeros(self.shape[0], dtype=self.acc, device=self.device)
        present = present.index_add(0, ids, torch.ones_like(ids, dtype=self.acc))
        return self._over_ids((z - mean[ids]).square()) + (self.n - present)[:, None] * mean.square()

    def gram(self) -> Tensor:
        sample, ids, z = self.grouped
        used, column = ids.unique(return_inverse=True)
        out = torch.zeros(self.n, self.n, dtype=self.acc, device=self.device)
        step = max(1, 8 * _scratch.TILE // max(1, self.n * len(used)))
        for lo in range(0, self.shape[1], step):
            part = z[:, lo : lo + step]
            dense = torch.zeros(self.n * len(used), part.shape[1], dtype=self.acc, device=self.device)
            dense = dense.index_add(0, sample * len(used) + column, part).reshape(self.n, -1)
            out = out + dense @ dense.T
        return out

    def dots(self, direction: Tensor) -> Tensor:
        _, ids, z = self.grouped
        return self._over_samples((z * direction.reshape(self.shape)[ids]).sum(1))

    def kronecker(self, reduce: bool) -> list[Kronecker]:
        if not self.one_hot or (reduce and self.s > 1):
            return []
        return [Kronecker(Terms(self.g.mT[:, None]).squared, self._counts, 1 if reduce else self.positions, "IO")]

    def _counts(self) -> Tensor:
        ids = self.index[self.index >= 0]
        return torch.bincount(ids, minlength=self.shape[0]).to(self.acc)[None]

    def rotated(self, bases: Sequence[Tensor]) -> Factored | None:
        v, e = self.shape
        shapes = [basis.shape for basis in bases]
        if shapes[1:] != [(1, e, e)] or shapes[0] not in ((1, v), (1, v, v)):
            return None
        left, right = (b[0].to(self.acc) for b in bases)
        turned, index = self.g.to(self.acc) @ right, self.index.clamp(min=0)
        if left.dim() == 1:
            return Lookup(self.index, turned * left[index, None], self.shape, one_hot=False)
        picked = left[index] * (self.index >= 0)[..., None]  # [N, S, V], rows of the basis for one-hot vectors
        return Outer(turned[:, None], picked.mT[:, None], self.shape)

    def project(self, left: Tensor, right: Tensor | None) -> Tensor | None:
        if right is None:
            return None
        sample, ids, z = self.grouped
        pairs = left.T[ids][:, :, None] * (z @ right.T)[:, None, :]
        out = torch.zeros(self.n, *pairs.shape[1:], dtype=self.acc, device=self.device)
        return out.index_add(0, sample, pairs)

    def bytes_held(self) -> int:
        """Memory that the factors keep alive."""
        return storage_bytes(self.index, self.g)


class Masked(Factored):
    """Rows by the vjp of the call itself, with the cotangent of one sample at a time.

    Attributes:
        own: where the tensor is one that meets data entry by entry, each of which belongs to one sample: gives the
            gradient, and the sample of each entry, both `[*shape]`.
    """

    def __init__(
        self,
        n: int,
        like: Tensor,
        vjp: Callable[[int], Tensor],
        own: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Take the number of samples, the tensor, `vjp(n) -> row n`, and `own`."""
        self.n, self.shape, self.own = n, like.shape, own
        self.acc, self.device = accumulation_dtype(like.dtype), like.device
        self._vjp = vjp

    def rows(self, lo: int, hi: int) -> Tensor:
        if lo == hi:
            return torch.zeros(0, *self.shape, dtype=self.acc, device=self.device)
        rows = [self._vjp(i).to(self.acc) for i in range(lo, hi)]
        return rows[0][None] if len(rows) == 1 else torch.stack(rows)


class Traced(Masked):
    """The same, the vjp being that of a graph that autograd frees behind the pass."""

    def without_graph(self, tables: bool) -> Factored:
        """The rows."""
        return Dense(self.rows(0, self.n))


class Sum(Factored):
    """Several uses of one parameter: the row of a sample is the sum of its rows."""

    def __init__(self, parts: Sequence[Factored]) -> None:
        """Take the forms of all uses."""
        self.parts = list(parts)
        first = self.parts[0]
        self.n, self.shape, self.device = first.n, first.shape, first.device
        self.acc = functools.reduce(torch.promote_types, (part.acc for part in self.parts))

    def tile(self) -> int:
        return min(part.tile() for part in self.parts)

    def _total(self, values: Sequence[Tensor | None]) -> Tensor | None:
        out = values[0]
        for value in values[1:]:
            out = None if out is None or value is None else out + value
        return out

    def rows(self, lo: int, hi: int) -> Tensor:
        out = self.parts[0].rows(lo, hi).to(self.acc)
        for part in self.parts[1:]:
            out = out + part.rows(lo, hi)
        return out

    def weighted(self, weight: Tensor | None) -> Tensor | None:
        return self._total([part.weighted(None if weight is None else weight.to(part.acc)) for part in self.parts])

    def dots(self, direction: Tensor) -> Tensor | None:
        return self._total([part.dots(direction.to(part.acc)) for part in self.parts])

    def project(self, left: Tensor, right: Tensor | None) -> Tensor | None:
        sides = [(left.to(part.acc), None if right is None else right.to(part.acc)) for part in self.parts]
        return self._total([part.project(*own) for part, own in zip(self.parts, sides, strict=True)])

    def kronecker(self, reduce: bool) -> list[Kronecker]:
        """Those of all uses; where positions are to be pooled, none of uses of one row in one orientation."""
        if is_vector(self.shape) and not any(isinstance(part, Outer) for part in self.parts):
            return super().kronecker(reduce)
        found = [part.kronecker(reduce) for part in self.parts]
        every = [k for ks in found for k in ks]
        if not all(found) or (reduce and overlap(every)):
            return []
        return every

    def with_bias(self) -> Factored | None:
        parts = [p for part in self.parts if (p := part.with_bias()) is not None]
        return Sum(parts) if len(parts) == len(self.parts) else None

    def rotated(self, bases: Sequence[Tensor]) -> Factored | None:
        parts = [p for part in self.parts if (p := part.rotated(bases)) is not None]
        return Sum(parts) if len(parts) == len(self.parts) else None
