"""The forms that a per-sample gradient takes, and the questions that can be put to it.

A per-sample gradient of one tensor is `[N, *shape]`. It is held in factors and formed only
tile by tile. The forms are a closed handful:

    Outer   sum over S of g aᵀ, with a [N, G, S, I] and g [N, G, O, S]      linear, convolution, ...
    Lookup  rows of a table, addressed by indices [N, S] with g [N, S, E]   embedding
    Dense   the rows themselves [N, *shape]                                 bias, norm, elementwise
    Pulled  a form of a value made of parameters, pulled back to one        weight norm, merged weights
    Masked  anything else: the vjp of the call, cotangent masked to one sample at a time
    Sum     several uses of the same parameter

Axis letters: N samples, G groups, S shared positions, I features in, O features out, P entries.
Every form answers `rows(lo, hi)`; the other questions have a default through tiles of rows (see
`_statistics`) and are answered by a form itself only where its factors make that cheaper.
All arithmetic happens in `acc`: float32, or float64 where the inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from packext._scratch import TILE, scratch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32 or better: what squares and sums are accumulated in."""
    return torch.promote_types(dtype, torch.float32)


class Factored:
    """Per-sample gradient of one tensor: `n` samples, each of `shape`."""

    n: int
    shape: torch.Size
    acc: torch.dtype
    device: torch.device

    @property
    def numel(self) -> int:
        """Entries of one row."""
        return math.prod(self.shape)

    def rows(self, lo: int, hi: int) -> Tensor:
        """Individual gradients `[hi - lo, *shape]` of samples `lo` to `hi`."""
        raise NotImplementedError

    def rows_into(self, lo: int, hi: int, out: Tensor) -> None:
        """Write the rows `lo` to `hi` into `out` `[hi - lo, *shape]`."""
        out.copy_(self.rows(lo, hi))

    def select(self, index: Tensor) -> Tensor:
        """Individual gradients `[len(index), *shape]` of the samples in `index`."""
        picked = [self.rows(i, i + 1) for i in index.tolist()]
        return torch.cat(picked) if picked else self.rows(0, 0)

    def tile(self) -> int:
        """How many samples make one tile."""
        return max(1, min(self.n, TILE // max(1, self.numel)))

    def tiles(self) -> list[tuple[int, int]]:
        """The bounds of all tiles."""
        step = self.tile()
        return [(lo, min(self.n, lo + step)) for lo in range(0, self.n, step)]

    # Questions that a form may answer from its factors; None: ask the tiles.
    def all_rows(self) -> Tensor | None:
        """All rows, where they are in memory already."""
        return None

    def weighted(self, weight: Tensor | None) -> Tensor | None:
        """`sum over n of weight_n row_n`, `[*shape]`; no weight means ones."""
        return None

    def sq_norms(self) -> Tensor | None:
        """Squared norms of the rows, `[N]`."""
        return None

    def second_moment(self) -> Tensor | None:
        """Sum over n of the squared rows, `[*shape]`."""
        return None

    def scatter(self) -> Tensor | None:
        """Sum over n of the squared deviations from the mean row, `[*shape]`."""
        return None

    def gram(self) -> Tensor | None:
        """Inner products of the rows, `[N, N]`."""
        return None

    def dots(self, direction: Tensor) -> Tensor | None:
        """Inner products of the rows with `direction`, `[N]`."""
        return None

    def project(self, left: Tensor, right: Tensor | None) -> Tensor | None:
        """Rows seen as matrices `[shape[0], rest]`, times `left` `[r, shape[0]]` and `right` `[q, rest]`."""
        return None

    def bytes_held(self) -> int:
        """Memory that the factors keep alive."""
        raise NotImplementedError


class Dense(Factored):
    """The rows themselves, `[N, *shape]`; for tensors whose rows are no larger than activations."""

    def __init__(self, rows: Tensor) -> None:
        """Take `rows` `[N, *shape]`."""
        self.r = rows.to(accumulation_dtype(rows.dtype))
        self.n, self.shape = rows.shape[0], rows.shape[1:]
        self.acc, self.device = self.r.dtype, rows.device

    @property
    def flat(self) -> Tensor:
        """The rows as `[N, P]`."""
        return self.r.reshape(self.n, self.numel)

    def rows(self, lo: int, hi: int) -> Tensor:
        return self.r[lo:hi]

    def select(self, index: Tensor) -> Tensor:
        return self.r[index]

    def weighted(self, weight: Tensor | None) -> Tensor:
        if weight is None:
            return self.r.sum(0)
        return (weight @ self.flat).reshape(self.shape)

    def sq_norms(self) -> Tensor:
        return self.flat.square().sum(1)

    def second_moment(self) -> Tensor:
        return self.r.square().sum(0)

    def scatter(self) -> Tensor:
        return (self.r - self.r.mean(0)).square().sum(0)

    def gram(self) -> Tensor:
        return self.flat @ self.flat.T

    def dots(self, direction: Tensor) -> Tensor:
        return self.flat @ direction.reshape(-1)

    def all_rows(self) -> Tensor:
        return self.r

    def project(self, left: Tensor, right: Tensor | None) -> Tensor:
        return two_sided(self.r, left, right)

    def bytes_held(self) -> int:
        return self.r.numel() * self.r.element_size()


class Patches:
    """What multiplied a convolution's weight, `[N, G, S, I]`, unfolded only for the samples asked for."""

    def __init__(
        self,
        n: int,
        groups: int,
        positions: int,
        features: int,
        take: Callable[[int, int], Tensor],
        source: Tensor,
    ) -> None:
        """Take the sizes N, G, S, I, the function that unfolds samples lo to hi, and what it reads."""
        self.shape = (n, groups, positions, features)
        self.take, self.source = take, source

    def __getitem__(self, where: slice) -> Tensor:
        """Unfold samples `where.start` to `where.stop`."""
        return self.take(where.start, where.stop)


class Outer(Factored):
    """`sum over S of g aᵀ`, `[G O, I]` per sample, reshaped to the parameter."""

    def __init__(
        self,
        a: Tensor | Patches,
        g: Tensor,
        shape: Sequence[int],
        weighted: Callable[[Tensor | None], Tensor] | None = None,
        apply: Callable[[Tensor], Tensor] | None = None,
        native: Callable[[int, int], Tensor] | None = None,
        alone: bool = False,
    ) -> None:
        """Take the pair, the parameter's shape, and a faster weighted sum where torch has one.

        Args:
            a: `[N, G, S, I]`, what multiplied the parameter.
            g: `[N, G, O, S]`, gradient at the output of the use.
            shape: of the parameter, `G O I` entries in this order.
            weighted: `weight [N] or None -> sum over n of weight_n row_n`.
            native: `lo, hi -> rows`, where torch has a faster way to them.
            alone: whether `native` takes one row at a time.
            apply: `direction [*shape] -> direction a` `[N, G, O, S]`, the use with other parameters.
        """
        self.a, self.g = a, g
        self.n, self.groups, self.s, self.i = a.shape
        self.o = g.shape[2]
        self.shape = torch.Size(shape)
        source = a.source if isinstance(a, Patches) else a
        self.acc = accumulation_dtype(torch.promote_types(source.dtype, g.dtype))
        self.device = g.device
        self._weighted, self._apply = weighted, apply
        self._native, self._alone = native, alone

    def pair(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """The factors of samples lo to hi, in the accumulation dtype."""
        return self.a[lo:hi].to(self.acc), self.g[lo:hi].to(self.acc)

    def rows(self, lo: int, hi: int) -> Tensor:
        if self._native is not None and hi > lo:
            step = 1 if self._alone else hi - lo
            parts = [self._native(k, k + step).to(self.acc) for k in range(lo, hi, step)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        a, g = self.pair(lo, hi)
        return torch.matmul(g, a).reshape(hi - lo, *self.shape)

    def rows_into(self, lo: int, hi: int, out: Tensor) -> None:
        if self._native is not None:
            for k in range(lo, hi) if self._alone else (lo,):
                rows = self._native(k, k + 1 if self._alone else hi)
                out[k - lo : k - lo + len(rows)] = rows
            return
        a, g = self.pair(lo, hi)
        out = out.view(hi - lo, self.groups, self.o, self.i)
        # A product with one term is a matrix product in name only.
        if self.s == 1:
            torch.mul(g, a, out=out)
        else:
            torch.bmm(g.flatten(0, 1), a.flatten(0, 1), out=out.view(-1, self.o, self.i))

    def rows_in_scratch(self, lo: int, hi: int) -> Tensor:
        """Rows that stand until the next are asked for."""
        if self._native is not None and (hi - lo == 1 or not self._alone):
            return self.rows(lo, hi)
        rows = scratch("rows", (hi - lo, *self.shape), self.acc, self.device)
        self.rows_into(lo, hi, rows)
        return rows

    def select(self, index: Tensor) -> Tensor:
        if isinstance(self.a, Patches):
            return super().select(index)
        return torch.matmul(self.g[index].to(self.acc), self.a[index].to(self.acc)).reshape(len(index), *self.shape)

    def weighted(self, weight: Tensor | None) -> Tensor | None:
        if self._weighted is not None:
            return self._weighted(weight).to(self.acc)
        if isinstance(self.a, Patches):
            return None
        a, g = self.pair(0, self.n)
        if weight is not None:
            g = g * weight[:, None, None, None]
        return torch.einsum("ngos,ngsi->goi", g, a).reshape(self.shape)

    def sq_norms(self) -> Tensor:
        """By `(a aᵀ)(g gᵀ)`, without the rows; whether that is cheaper is for the caller to know."""
        if self.s == 1:
            a, g = self.pair(0, self.n)
            return (a.square().sum((2, 3)) * g.square().sum((2, 3))).sum(1)
        parts = []
        step = max(1, TILE // (self.groups * self.s * max(self.s, self.i)))
        for lo in range(0, self.n, step):
            a, g = self.pair(lo, min(self.n, lo + step))
            parts.append((torch.matmul(a, a.mT) * torch.matmul(g.mT, g)).sum((1, 2, 3)))
        return torch.cat(parts)

    def second_moment(self) -> Tensor | None:
        if self.s != 1:
            return None
        a, g = self.pair(0, self.n)
        return torch.einsum("ngos,ngsi->goi", g.square(), a.square()).reshape(self.shape)

    def scatter(self) -> Tensor | None:
        """Squared deviations from products of the centred factors, without cancellation.

        With b = g - mean g, c = a - mean a, the deviation of a row from (mean g)(mean a)ᵀ is
        d_n = b_n (mean a)ᵀ + g_n c_nᵀ, all small where the rows are nearly equal, so that
        `sum d² - N (mean d)²` is sound. Where a and g vary and their product hardly does, that
        difference cancels all the same: those entries are recognised by it and formed exactly.

        Returns:
            `[*shape]`, or None where there are several positions, or too many entries are in doubt.
        """
        if self.s != 1 or self.n == 1:
            return None
        a, g = self.pair(0, self.n)
        a, g = a[:, :, 0], g[..., 0]  # [N, G, I], [N, G, O]
        step = max(1, TILE // (4 * self.i))
        blocks = []
        doubts = 0
        for k in range(self.groups):
            for lo in range(0, self.o, step):
                block, doubtful = _scatter_of_products(g[:, k, lo : lo + step], a[:, k])
                doubts += doubtful
                if doubts * 4 > self.numel:
                    return None
                blocks.append(block)
        return torch.cat(blocks).reshape(self.shape)

    @property
    def tokens_are_few(self) -> bool:
        """Whether inner products of rows take fewer operations by tokens than by rows."""
        return self.s == 1 or self.s**2 * (self.i + self.o) < self.i * self.o

    def gram(self) -> Tensor:
        """By tokens `(a aᵀ)(g gᵀ)`, or by rows of some outputs at a time, whichever takes fewer operations."""
        n, s = self.n, self.s
        out = torch.zeros(n, n, dtype=self.acc, device=self.device)
        if self.tokens_are_few:
            a, g = self.pair(0, n)
            for k in range(self.groups):
                tokens_a, tokens_g = a[:, k].reshape(n * s, -1), g[:, k].mT.reshape(n * s, -1)
                products = (tokens_a @ tokens_a.T) * (tokens_g @ tokens_g.T)
                out = out + products.reshape(n, s, n, s).sum((1, 3))
            return out
        block = max(1, 2 * TILE // (n * self.groups * self.i))
        for o in range(0, self.o, block):
            rows = []
            for lo, hi in self.tiles():
                a, g = self.pair(lo, hi)
                rows.append(torch.matmul(g[:, :, o : o + block], a).reshape(hi - lo, -1))
            flat = torch.cat(rows)
            out = out + flat @ flat.T
        return out

    def dots(self, direction: Tensor) -> Tensor | None:
        if self._apply is not None:
            return (self._apply(direction) * self.g).sum((1, 2, 3), dtype=self.acc)
        if isinstance(self.a, Patches):
            return None
        a, g = self.pair(0, self.n)
        d = direction.reshape(self.groups, self.o, self.i).to(self.acc)
        return (torch.matmul(d, a.mT) * g).sum((1, 2, 3))

    def project(self, left: Tensor, right: Tensor | None) -> Tensor | None:
        if right is None or right.shape[1] != self.i or left.shape[1] != self.groups * self.o:
            return None
        left_by_group = left.reshape(left.shape[0], self.groups, self.o).transpose(0, 1)
        out = []
        for lo, hi in self.tiles():
            a, g = self.pair(lo, hi)
            out.append(torch.matmul(torch.matmul(left_by_group, g), torch.matmul(a, right.T)).sum(1))
        return torch.cat(out)

    def tile(self) -> int:
        unfolded = self.groups * self.s * self.i if isinstance(self.a, Patches) and self._native is None else 0
        if self._alone:
            return 1
        return max(1, min(self.n, TILE // max(1, self.numel), TILE // max(1, unfolded)))

    def bytes_held(self) -> int:
        source = self.a.source if isinstance(self.a, Patches) else self.a
        return source.numel() * source.element_size() + self.g.numel() * self.g.element_size()


class Lookup(Factored):
    """Rows of a table: `row_n[id] = sum over s with index[n, s] = id of g[n, s]`."""

    def __init__(self, index: Tensor, g: Tensor, shape: Sequence[int]) -> None:
        """Take indices `[N, S]` (negative: no gradient), g `[N, S, E]` and the table's shape `[V, E]`."""
        self.index, self.g = index, g
        self.n, self.s = index.shape
        self.shape = torch.Size(shape)
        self.acc, self.device = accumulation_dtype(g.dtype), g.device
        self._grouped: tuple[Tensor, Tensor, Tensor] | None = None

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

    def grouped(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sample `[U]`, id `[U]` and gradient `[U, E]` of each distinct (sample, id)."""
        if self._grouped is None:
            keep = self.index >= 0
            sample = torch.arange(self.n, device=self.device)[:, None].expand_as(self.index)[keep]
            key = sample * self.shape[0] + self.index[keep]
            unique, inverse = key.unique(return_inverse=True)
            z = torch.zeros(len(unique), self.shape[1], dtype=self.acc, device=self.device)
            z = z.index_add(0, inverse, self.g[keep].to(self.acc))
            self._grouped = unique // self.shape[0], unique % self.shape[0], z
        return self._grouped

    def _over_ids(self, values: Tensor) -> Tensor:
        out = torch.zeros(*self.shape, dtype=self.acc, device=self.device)
        return out.index_add(0, self.grouped()[1], values)

    def _over_samples(self, values: Tensor) -> Tensor:
        out = torch.zeros(self.n, dtype=self.acc, device=self.device)
        return out.index_add(0, self.grouped()[0], values)

    def weighted(self, weight: Tensor | None) -> Tensor:
        sample, _, z = self.grouped()
        return self._over_ids(z if weight is None else z * weight[sample, None])

    def sq_norms(self) -> Tensor:
        return self._over_samples(self.grouped()[2].square().sum(1))

    def second_moment(self) -> Tensor:
        return self._over_ids(self.grouped()[2].square())

    def scatter(self) -> Tensor:
        """Deviations of the rows that are there, and those of the zeros that are not."""
        sample, ids, z = self.grouped()
        mean = self._over_ids(z) / self.n
        present = torch.zeros(self.shape[0], dtype=self.acc, device=self.device)
        present = present.index_add(0, ids, torch.ones_like(ids, dtype=self.acc))
        return self._over_ids((z - mean[ids]).square()) + (self.n - present)[:, None] * mean.square()

    def gram(self) -> Tensor:
        sample, ids, z = self.grouped()
        used, column = ids.unique(return_inverse=True)
        out = torch.zeros(self.n, self.n, dtype=self.acc, device=self.device)
        step = max(1, 8 * TILE // max(1, self.n * len(used)))
        for lo in range(0, self.shape[1], step):
            part = z[:, lo : lo + step]
            dense = torch.zeros(self.n * len(used), part.shape[1], dtype=self.acc, device=self.device)
            dense = dense.index_add(0, sample * len(used) + column, part).reshape(self.n, -1)
            out = out + dense @ dense.T
        return out

    def dots(self, direction: Tensor) -> Tensor:
        _, ids, z = self.grouped()
        return self._over_samples((z * direction.reshape(self.shape)[ids]).sum(1))

    def project(self, left: Tensor, right: Tensor | None) -> Tensor | None:
        if right is None:
            return None
        sample, ids, z = self.grouped()
        pairs = left.T[ids][:, :, None] * (z @ right.T)[:, None, :]
        out = torch.zeros(self.n, *pairs.shape[1:], dtype=self.acc, device=self.device)
        return out.index_add(0, sample, pairs)

    def bytes_held(self) -> int:
        return self.g.numel() * self.g.element_size() + self.index.numel() * self.index.element_size()


class Masked(Factored):
    """Rows by the vjp of the call itself, with the cotangent of one sample at a time."""

    def __init__(self, n: int, like: Tensor, vjp: Callable[[int], Tensor], held: int) -> None:
        """Take the number of samples, the tensor, `vjp(n) -> row n`, and the bytes it keeps alive."""
        self.n, self.shape = n, like.shape
        self.acc, self.device = accumulation_dtype(like.dtype), like.device
        self._vjp, self._held = vjp, held

    def rows(self, lo: int, hi: int) -> Tensor:
        if lo == hi:
            return torch.zeros(0, *self.shape, dtype=self.acc, device=self.device)
        return torch.stack([self._vjp(i).to(self.acc) for i in range(lo, hi)])

    def bytes_held(self) -> int:
        return self._held


class Pulled(Factored):
    """A form of a value `u` made of parameters alone, pulled back to one of them."""

    def __init__(self, inner: Factored, like: Tensor, pull: Callable[[Tensor], Tensor]) -> None:
        """Take the form of u, the parameter, and `pull: [c, *u.shape] -> [c, *shape]`."""
        self.inner, self.pull = inner, pull
        self.n, self.shape = inner.n, like.shape
        self.acc, self.device = inner.acc, inner.device

    def tile(self) -> int:
        return max(1, min(super().tile(), self.inner.tile()))

    def rows(self, lo: int, hi: int) -> Tensor:
        if lo == hi:
            return torch.zeros(0, *self.shape, dtype=self.acc, device=self.device)
        return self.pull(self.inner.rows(lo, hi)).to(self.acc)

    def weighted(self, weight: Tensor | None) -> Tensor | None:
        total = self.inner.weighted(weight)
        return None if total is None else self.pull(total[None])[0].to(self.acc)

    def bytes_held(self) -> int:
        return self.inner.bytes_held()


class Sum(Factored):
    """Several uses of one parameter: the row of a sample is the sum of its rows."""

    def __init__(self, parts: Sequence[Factored]) -> None:
        """Take the forms of all uses."""
        self.parts = list(parts)
        first = self.parts[0]
        self.n, self.shape, self.device = first.n, first.shape, first.device
        self.acc = first.acc
        for part in self.parts[1:]:
            self.acc = torch.promote_types(self.acc, part.acc)

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
        return self._total([part.weighted(weight) for part in self.parts])

    def dots(self, direction: Tensor) -> Tensor | None:
        return self._total([part.dots(direction) for part in self.parts])

    def project(self, left: Tensor, right: Tensor | None) -> Tensor | None:
        return self._total([part.project(left, right) for part in self.parts])

    def bytes_held(self) -> int:
        return sum(part.bytes_held() for part in self.parts)


def _scatter_of_products(g: Tensor, a: Tensor) -> tuple[Tensor, int]:
    """Squared deviations `[O, I]` of g_n a_nᵀ from their mean, for g `[N, O]`, a `[N, I]`; how many were in doubt."""
    n = len(g)
    mean_a, mean_g = a.mean(0), g.mean(0)
    c, b = a - mean_a, g - mean_g
    spread = g.square().T @ c.square()
    spread = spread + (2 * (b * g).T @ c) * mean_a
    spread = spread + b.square().sum(0)[:, None] * mean_a.square()
    result = spread - (g.T @ c).square() / n
    where = ((result <= 1e-3 * spread) & (spread > 0)).nonzero()
    if len(where):
        at_g, at_a = where.unbind(1)
        parts = []
        step = max(1, TILE // (4 * n))
        for lo in range(0, len(where), step):
            rows = g[:, at_g[lo : lo + step]] * a[:, at_a[lo : lo + step]]
            parts.append((rows - rows.mean(0)).square().sum(0))
        result = result.index_put((at_g, at_a), torch.cat(parts))
    return result.clamp(min=0), len(where)


def two_sided(rows: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """Rows `[c, *shape]` as matrices `[c, shape[0], rest]`, times `left` and `right`ᵀ."""
    c = rows.shape[0]
    if right is None:
        return rows.reshape(c, left.shape[1]) @ left.T
    return left @ rows.reshape(c, left.shape[1], right.shape[1]) @ right.T


def merge(parts: Sequence[Factored]) -> Factored:
    """One form for all uses of a parameter; forms of a kind are joined along S."""
    if len(parts) == 1:
        return parts[0]
    dense = [p for p in parts if isinstance(p, Dense)]
    if len(dense) == len(parts):
        return Dense(torch.stack([p.r for p in dense]).sum(0))
    lookups = [p for p in parts if isinstance(p, Lookup)]
    if len(lookups) == len(parts):
        index, g = torch.cat([p.index for p in lookups], 1), torch.cat([p.g for p in lookups], 1)
        return Lookup(index, g, parts[0].shape)
    outers = [(p.a, p.g) for p in parts if isinstance(p, Outer) and isinstance(p.a, Tensor)]
    if len(outers) == len(parts) and len({(a.shape[1], a.shape[3], g.shape[2]) for a, g in outers}) == 1:
        return Outer(torch.cat([a for a, _ in outers], 2), torch.cat([g for _, g in outers], 3), parts[0].shape)
    return Sum(parts)
