"""What every form of a per-sample gradient answers, and the plainest of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from packext import _scratch
from packext._factored.kronecker import Kronecker


@functools.cache
def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32 or better: what squares and sums are accumulated in."""
    return torch.promote_types(dtype, torch.float32)


def gram(rows: Tensor) -> Tensor:
    """Inner products `[G, I, I]` of `rows` `[G, I, S]`; of large ones the upper half is copied from the lower."""
    count, length = rows.shape[1:]
    if count < 256 or length < 512 or torch.is_grad_enabled():
        return rows @ rows.mT
    block = -(-count // 4)
    found = rows.new_empty(rows.shape[0], count, count)
    for lo in range(0, count, block):
        part, hi = slice(lo, lo + block), min(count, lo + block)
        torch.matmul(rows[:, part], rows[:, :hi].mT, out=found[:, part, :hi])
        found[:, :lo, part] = found[:, part, :lo].mT
    return found


def one_axis(t: Tensor) -> Tensor | None:
    """`t` `[G, N, S, I]` as `[G, N * S, I]` where that takes no copy."""
    n, s = t.shape[1:3]
    return t.flatten(1, 2) if n == 1 or s == 1 or t.stride(1) == s * t.stride(2) else None


def storage_bytes(*tensors: Tensor) -> int:
    """Memory that `tensors` keep alive: a part of a tensor keeps all of it, and what they share counts once."""
    storages = {storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


def is_vector(shape: Sequence[int]) -> bool:
    """Whether no more than one axis has more than one entry."""
    return sum(size != 1 for size in shape) <= 1


def table(shape: Sequence[int]) -> tuple[int, int]:
    """Number and length of the rows that a tensor has along its last axis of more than one entry."""
    columns = next((size for size in reversed(shape) if size != 1), 1)
    return math.prod(shape) // max(1, columns), columns


class Terms:
    """Gradients at a use's output before they are summed over positions, `[N, G, O, S]`; weight and bias share them."""

    def __init__(self, g: Tensor) -> None:
        """Take g."""
        self.g = g

    @functools.cached_property
    def squared(self) -> Tensor:
        """Sum over n and s of products of the columns, `[G, O, O]`."""
        g = self.g.to(accumulation_dtype(self.g.dtype))
        n, groups, o, s = g.shape
        columns = g.permute(1, 0, 3, 2)
        together = one_axis(columns)
        if together is None and n * groups * o * o <= 4 * _scratch.TILE:  # without a copy of g
            return torch.matmul(g, g.mT).sum(0)
        return gram((columns.flatten(1, 2) if together is None else together).mT)


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

    def without_graph(self, tables: bool) -> Factored:
        """The same once autograd has freed its graph.

        Args:
            tables: whether it is to be asked where rows of a table stand.

        Returns:
            A form that needs no graph.
        """
        return self

    def subset(self, index: Tensor) -> Factored:
        """The form of the samples in `index` alone."""
        return Dense(self.select(index))

    def drawn(self, index: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random entries of some rows, each entry of a row being as likely as any other.

        Args:
            index: of the samples, `[m]`.
            count: how many of each row; all if there are no more.
            generator: of the draws, on the CPU.

        Returns:
            Entries `[m, k]` with k of at least `count`, and their positions in the flattened rows `[m, k]`.
        """
        if count >= self.numel:
            rows = self.select(index).reshape(len(index), self.numel)
            return rows, torch.arange(self.numel, device=self.device).expand_as(rows)
        at = torch.randint(self.numel, (len(index), count), generator=generator).to(self.device)
        found = [self.rows(n, n + 1).reshape(-1)[k] for n, k in zip(index.tolist(), at, strict=True)]
        return torch.stack(found), at

    def tile(self) -> int:
        """How many samples make one tile."""
        return max(1, min(self.n, _scratch.TILE // max(1, self.numel)))

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

    def dots_with_sum(self) -> Tensor | None:
        """Inner products of the rows with their sum, `[N]`, where there is a cheaper way than by the sum."""
        return None

    def kronecker(self, reduce: bool) -> list[Kronecker]:
        """Second moments of the factors of each use, for Kronecker-factored curvature; see `added`.

        Args:
            reduce: whether positions are pooled before the products are taken (gradients summed, inputs averaged, so
                that there is one term of a sample), or each stands for itself.

        Returns:
            They; nothing where there are none of that kind for some use.
        """
        if not is_vector(self.shape):
            return []
        parts = [self.rows(lo, hi).reshape(hi - lo, self.numel) for lo, hi in self.tiles()]
        return [Kronecker(torch.stack([rows.mT @ rows for rows in parts]).sum(0)[None], None, 1)]

    def with_bias(self) -> Factored | None:
        """The rows of weight and bias as one matrix, where the bias is added to what the weight gives.

        Returns:
            A form `[G O, I + 1]` (`[I + 1, O]` if stored so): that of the weight with an input more, which is 1. None
            where there is no such form.
        """
        return None

    def rotated(self, bases: Sequence[Tensor]) -> Factored | None:
        """The rows in other bases, `basisᵀ` times each of their sides.

        Args:
            bases: of each side in the order of the parameter's axes, `[G, n, n]`, with the groups or blocks that
                `kronecker` has; `[1, n]` for a diagonal one.

        Returns:
            A form of the same shape, or None where the bases do not fit.
        """
        return Dense(self.rows(0, self.n)).rotated(bases) if is_vector(self.shape) else None

    def project(self, left: Tensor, right: Tensor | None) -> Tensor | None:
        """Rows seen as matrices `[shape[0], rest]`, times `left` `[r, shape[0]]` and `right` `[q, rest]`."""
        return None


class Dense(Factored):
    """The rows themselves, `[N, *shape]`; for tensors whose rows are no larger than activations."""

    def __init__(
        self, rows: Tensor, terms: Terms | None = None, entrywise: bool = False, g: Tensor | None = None
    ) -> None:
        """Take the rows.

        Args:
            rows: `[N, *shape]`.
            terms: where they are sums over positions, what they are sums of (in one group).
            entrywise: whether they are of a tensor that meets data entry by entry, as in sums and products.
            g: the gradient that they are made of, where they may be no more than a view of it.
        """
        self.terms, self.entrywise = terms, entrywise
        self.r = rows.to(accumulation_dtype(rows.dtype))
        #: Whether the rows lie in memory that others read or write: that of a gradient, or of a result.
        self.shared = g is not None and g.untyped_storage()._cdata == self.r.untyped_storage()._cdata
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
        return torch.linalg.vecdot(self.flat, self.flat)

    def second_moment(self) -> Tensor:
        return self.r.square().sum(0)

    def scatter(self) -> Tensor:
        off = self.r - self.r.mean(0)
        return off.square().sum(0) if torch.is_grad_enabled() else off.square_().sum(0)

    def gram(self) -> Tensor:
        return self.flat @ self.flat.T

    def dots(self, direction: Tensor) -> Tensor:
        return self.flat @ direction.reshape(-1)

    def all_rows(self) -> Tensor:
        return self.r

    def rotated(self, bases: Sequence[Tensor]) -> Factored | None:
        shapes = [basis.shape for basis in bases]
        if is_vector(self.shape) and shapes == [(1, self.numel, self.numel)]:
            return Dense((self.flat @ bases[0][0].to(self.acc)).reshape(self.n, *self.shape))
        rows, columns = table(self.shape)
        if not self.entrywise or shapes[1:] != [(1, columns, columns)] or shapes[0] not in ((1, rows), (1, rows, rows)):
            return None
        left, right = (b[0].to(self.acc) for b in bases)
        turned = self.r.reshape(self.n, rows, columns) @ right
        turned = turned * left[:, None] if left.dim() == 1 else left.mT @ turned
        return Dense(turned.reshape(self.n, *self.shape))

    def kronecker(self, reduce: bool) -> list[Kronecker]:
        if is_vector(self.shape):
            if reduce or self.terms is None:
                return [Kronecker((self.flat.T @ self.flat)[None], None, 1)]
            return [Kronecker(self.terms.squared, None, self.terms.g.shape[3])]
        rows, columns = table(self.shape)
        if not self.entrywise or (reduce and rows > 1):
            return []
        b = self.r.reshape(-1, columns)
        return [Kronecker((b.T @ b)[None], lambda: b.new_full((1, rows), self.n), rows, "IO")]

    def project(self, left: Tensor, right: Tensor | None) -> Tensor:
        return two_sided(self.r, left, right)


def two_sided(rows: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """Rows `[c, *shape]` as matrices `[c, shape[0], rest]`, times `left` and `right`ᵀ."""
    c = rows.shape[0]
    if right is None:
        return rows.reshape(c, left.shape[1]) @ left.T
    return left @ rows.reshape(c, left.shape[1], right.shape[1]) @ right.T
