"""Forms of values made of parameters, pulled back to one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from packext._factored.base import Dense, Factored, is_vector, table
from packext._factored.kronecker import FINEST, Kronecker
from packext._factored.other import Lookup, Masked
from packext._factored.outer import Outer
from packext._factored.tables import View


class Pulled(Factored):
    """A form of a value `u` made of parameters alone, pulled back to one of them."""

    def __init__(
        self,
        inner: Factored,
        like: Tensor,
        pull: Callable[[Tensor], Tensor],
        rows_in: Callable[[], tuple[Tensor, Tensor] | None] = lambda: None,
        view: View | None = None,
        value: Hashable = None,
    ) -> None:
        """Take the form of u, and how it is made of the parameter.

        Args:
            inner: the form of u.
            like: the parameter.
            pull: `[c, *u.shape] -> [c, *shape]`.
            rows_in: what `rows_in` says of u and the parameter.
            view: where the entries of u stand in the parameter, if u is a view of it; `pull` then needs no graph.
            value: the same for all uses of this u.
        """
        self.inner, self.like, self.pull, self._rows_in, self.view, self.value = inner, like, pull, rows_in, view, value
        self.n, self.shape = inner.n, like.shape
        self.acc, self.device = inner.acc if like.is_complex() else inner.acc.to_real(), inner.device

    def around(self, inner: Factored) -> Pulled:
        """Another form of the same value, pulled back in the same way."""
        return Pulled(inner, self.like, self.pull, self._rows_in, self.view, self.value)

    def without_graph(self, tables: bool) -> Factored:
        """The same once what lies between u and the parameter is freed: rows, where nothing else is known."""
        if self.view is not None:
            return self
        found = self._rows_in() if tables and self._entrywise else None
        if found is None:
            return Dense(self.rows(0, self.n))
        place, row = found
        count, columns = table(self.shape)

        def put(rows: Tensor) -> Tensor:
            out = rows.new_zeros(len(rows), count, columns).index_add(1, row, rows.flatten(1)[:, place])
            return out.reshape(len(rows), *self.shape)

        return Pulled(self.inner, self.like, put, lambda: found, None, self.value)

    def tile(self) -> int:
        own = super().tile()
        return own if isinstance(self.inner, Masked) else max(1, min(own, self.inner.tile()))

    def rows(self, lo: int, hi: int) -> Tensor:
        if lo == hi:
            return torch.zeros(0, *self.shape, dtype=self.acc, device=self.device)
        if isinstance(self.inner, Masked):  # a row of u at a time: each is as large as what all samples have there
            return torch.cat([self.pull(self.inner.rows(i, i + 1)) for i in range(lo, hi)]).to(self.acc)
        return self.pull(self.inner.rows(lo, hi)).to(self.acc)

    def weighted(self, weight: Tensor | None) -> Tensor | None:
        total = self.inner.weighted(None if weight is None else weight.to(self.inner.acc))
        return None if total is None else self.pull(total[None])[0].to(self.acc)

    @property
    def _entrywise(self) -> bool:
        """Whether u meets data entry by entry."""
        inner = self.inner
        return inner.own is not None if isinstance(inner, Masked) else isinstance(inner, Dense) and inner.entrywise

    def lookup(self) -> Lookup | None:
        """The same as a lookup, where u holds rows of a table and meets data entry by entry."""
        inner, shape = self.inner, table(self.shape)
        if not self._entrywise or (found := self._rows_in()) is None:
            return None
        place, row = found
        if isinstance(inner, Dense):  # each sample has all of the value
            return Lookup(row.expand(self.n, -1), inner.flat[:, place], shape)
        assert isinstance(inner, Masked) and inner.own is not None
        total, owner = inner.own()
        sample = owner.flatten()[place]
        count = sample[:, 0].bincount(minlength=self.n)
        if not torch.equal(sample, sample[:, :1].expand_as(sample)) or not (count == count[0]).all():
            return None  # samples along the rows, or with different numbers of them
        order = sample[:, 0].argsort(stable=True)
        index, g = row[order].view(self.n, -1), total.flatten()[place[order]].view(self.n, -1, shape[1])
        return Lookup(index, g, shape)

    def _rows_of_blocks(self, size: int = 0) -> tuple[tuple[int, ...], int, int] | None:
        """Of a weight that is some rows of the parameter: blocks of so many of them, as many as can be by default.

        Returns:
            Which of how many blocks it is, and the rows of a block; None where it is not made of such.
        """
        inner, view = self.inner, self.view
        if view is None or not isinstance(inner, Outer) or inner.shape != view.size:
            return None
        if inner.groups > 1 or inner.stored != "OI" or view.along((inner.o, inner.i)) != (inner.i, 1):
            return None
        first, rest = divmod(view.offset, inner.i)
        count = math.prod(self.shape) // inner.i
        size = size or math.gcd(inner.o, first, count)
        if rest or count * inner.i != math.prod(self.shape) or size * FINEST < inner.o:
            return None
        if inner.o % size or first % size or count % size:
            return None
        return tuple(range(first // size, (first + inner.o) // size)), count // size, size

    def _blocks(self) -> tuple[tuple[int, ...], int, bool] | None:
        """Of a weight that is a block of the parameter: which of how many, of each group; whether it is transposed."""
        inner, view = self.inner, self.view
        if view is None or not isinstance(inner, Outer) or inner.shape != view.size:
            return None
        strides = view.along((inner.groups, inner.o, inner.i))
        size, count = inner.o * inner.i, math.prod(self.shape)
        if strides is None or view.offset % size or count % size or strides[0] % size:
            return None
        straight, turned = (inner.i, 1), (1, inner.o)
        stands = [all(n == 1 or s == w for n, s, w in zip((inner.o, inner.i), strides[1:], way, strict=True))
                  for way in (straight, turned)]  # fmt: skip
        first, step = view.offset // size, strides[0] // size
        at = tuple(first + step * k for k in range(inner.groups))
        return (at, count // size, not stands[0]) if any(stands) else None

    def kronecker(self, reduce: bool) -> list[Kronecker]:
        if is_vector(self.shape):
            return super().kronecker(reduce)
        if (found := self._blocks()) is not None:
            at, count, turned = found
            other = {"OI": "IO", "IO": "OI"}
            return [
                k._replace(at=at, blocks=count, stored=other[k.stored] if turned else k.stored)
                for k in self.inner.kronecker(reduce)
            ]
        if (rows := self._rows_of_blocks()) is not None:
            at, count, size = rows
            parts = [k.divided(k.outputs.shape[-1] // size) for k in self.inner.kronecker(reduce)]
            return [k._replace(at=at, blocks=count) for k in parts if k is not None]
        lookup = self.lookup()
        return [] if lookup is None else lookup.kronecker(reduce)

    def rotated(self, bases: Sequence[Tensor]) -> Factored | None:
        if is_vector(self.shape):
            return super().rotated(bases)
        inner = self.inner
        if (rows := self._rows_of_blocks(bases[0].shape[-1])) is not None and isinstance(inner, Outer):
            at, count, size = rows
            if any(len(basis) not in (1, count) for basis in bases):
                return None
            own = [basis if len(basis) == 1 else basis[list(at)] for basis in bases]
            apart = inner.apart(inner.o // size)
            if apart is not None and (form := apart.rotated(own)) is not None:
                return self.around(form)
        if (found := self._blocks()) is not None:
            at, count, turned = found
            if any(len(basis) not in (1, count) for basis in bases):
                return None
            own = [basis if len(basis) == 1 else basis[list(at)] for basis in bases]
            inner = self.inner.rotated(own[::-1] if turned else own)
            return None if inner is None else self.around(inner)
        lookup = self.lookup()
        return None if lookup is None else lookup.rotated(bases)
