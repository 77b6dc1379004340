"""Sums of outer products: what linear maps and convolutions give."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from packext import _scratch
from packext._factored.base import Factored, Terms, accumulation_dtype, gram, one_axis, storage_bytes
from packext._factored.kronecker import Kronecker
from packext._scratch import scratch

if TYPE_CHECKING:
    from packext._factored.windows import Window

#: Outputs come in multiples of this where not all are taken at once.
VECTOR = 16

#: Samples that a product takes at once, however large their rows are: threads share samples better than one product.
TOGETHER = 4

#: What has to be left of a sum of squares that another is taken from.
DOUBT = 1e-3

#: Multiply-adds of a matrix product that take as long as one entry of an elementwise step in cache,
#: and one entry unfolded or written to memory (2 threads of a CPU with AVX-512; the order is what counts).
ELEMENTWISE = 20.0
WRITE = 40.0


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
        second_moment: Callable[[], Tensor | None] = lambda: None,
        window: Window | None = None,
    ) -> None:
        """Take the sizes N, G, S, I, what unfolds samples lo to hi, its source, and a way to sum `a aᵀ`.

        The window says how the source is unfolded, where there is no more to it.
        """
        self.shape = (n, groups, positions, features)
        self.take, self.source, self.second_moment, self.window = take, source, second_moment, window

    def __getitem__(self, where: slice) -> Tensor:
        """Unfold samples `where.start` to `where.stop`."""
        return self.take(where.start, where.stop)

    def inner(self, lo: int, hi: int, acc: torch.dtype) -> Tensor:
        """`a aᵀ` of samples lo to hi, `[c, G, S, S]`: products of patches, or of pixels where these are cheaper."""
        if self.window is not None and self.inner_cost < self._by_patches():
            return self.window.inner(self.source[lo:hi].to(acc))
        a = self.take(lo, hi).to(acc)
        return torch.matmul(a, a.mT)

    def total(self, acc: torch.dtype) -> Tensor:
        """Sum over samples and positions, `[G, I]`: patches are linear in the images, whose sum is one image."""
        assert self.window is not None
        return self.window.patches(self.source.sum(0, keepdim=True, dtype=acc)).sum((0, 2))

    @functools.cached_property
    def inner_cost(self) -> float:
        """Multiply-adds of `inner` for a sample and group."""
        cost = self._by_patches()
        if self.window is None or self.source.shape[0] != self.shape[0]:  # several images of a sample
            return cost
        return min(cost, self.window.inner_cost(self.source.shape[1] // self.shape[1], ELEMENTWISE))

    def _by_patches(self) -> float:
        _, _, positions, features = self.shape
        return positions * features * (positions + WRITE)


class Outer(Factored):
    """`sum over S of g aᵀ`, `[G O, I]` per sample, reshaped to the parameter.

    Of a weight that is stored `[I, O]`, g is what multiplied the parameter, and a the gradient.
    """

    def __init__(
        self,
        a: Tensor | Patches,
        g: Tensor,
        shape: Sequence[int],
        weighted: Callable[[Tensor | None], Tensor] | None = None,
        apply: Callable[[Tensor], Tensor] | None = None,
        native: Callable[..., Tensor] | None = None,
        alone: bool = False,
        terms: Terms | None = None,
        stored: str = "OI",
        positions: int | float | Tensor | None = None,
        own: Callable[[], Tensor | None] | None = None,
    ) -> None:
        """Take the pair, the parameter's shape, and a faster weighted sum where torch has one.

        Args:
            a: `[N, G, S, I]`, what multiplied the parameter.
            g: `[N, G, O, S]`, gradient at the output of the use.
            shape: of the parameter, `G O I` entries in this order.
            weighted: `weight [N] or None -> sum over n of weight_n row_n`.
            native: `lo, hi -> rows`, where torch has a faster way to them; with `alone` also `n, n + 1, lo, hi` for
                outputs lo to hi of row n.
            terms: g, where another form shares it.
            alone: whether `native` takes one row at a time.
            apply: `direction [*shape] -> direction a` `[N, G, O, S]`, the use with other parameters.
            stored: "IO" for a weight of which g holds the inputs, and a the gradients.
            positions: how many of the S a sample has on average, where the others are zeros that fill up; `[G]` where
                groups have different numbers.
            own: gives which these are, `[N, S]`, or None where that is not known.
        """
        self.a, self.g = a, g
        self.terms = Terms(g) if terms is None else terms
        self.n, self.groups, self.s, self.i = a.shape
        self.o = g.shape[2]
        self.positions = self.s if positions is None else positions
        self.shape = torch.Size(shape)
        source = a.source if isinstance(a, Patches) else a
        self.acc = accumulation_dtype(torch.promote_types(source.dtype, g.dtype))
        self.device = g.device
        self._weighted, self._apply, self.stored = weighted, apply, stored
        self._native, self._alone = native, alone
        if not isinstance(self.positions, Tensor) and self.positions == self.s:
            own = functools.partial(torch.ones, self.n, self.s, dtype=torch.bool, device=self.device)
        #: Of how many columns of a root the rows are, one after the other, that differ in the gradients alone.
        self.columns = 1
        #: Gives the positions that are a sample's own and do not fill up, `[N, S]`; None where that is not known.
        self.own: Callable[[], Tensor | None] = own or (lambda: None)

    def pair(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """The factors of samples lo to hi, in the accumulation dtype."""
        if hi - lo == self.n and isinstance(self.a, Tensor):
            return self.a.to(self.acc), self.g.to(self.acc)
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
            torch.bmm(g.flatten(0, 1), a.flatten(0, 1), out=out.flatten(0, 1))

    def rows_in_scratch(self, lo: int, hi: int) -> Tensor:
        """Rows that stand until the next are asked for."""
        if self._native is not None and (hi - lo == 1 or not self._alone):
            return self.rows(lo, hi)
        rows = scratch("rows", (hi - lo, *self.shape), self.acc, self.device)
        self.rows_into(lo, hi, rows)
        return rows

    def outputs_at_once(self) -> int:
        """How many outputs of all samples' rows fit into a tile; 0 where too few do, or unfolding would be repeated."""
        native = self._alone and self.groups == 1
        if isinstance(self.a, Patches) and not native:
            return 0
        most = (3 if native else 1) * _scratch.TILE // max(1, self.n * self.groups * self.i)
        return self.o if most >= self.o else most // VECTOR * VECTOR

    def outputs_in_scratch(self, step: int) -> Iterator[Tensor]:
        """All samples' rows, so many outputs at a time, `[N, G, step, I]`; they stand until the next are taken."""
        if isinstance(self.a, Patches):
            assert self._native is not None
            for lo in range(0, self.o, step):
                hi = min(self.o, lo + step)
                rows = scratch("rows", (self.n, self.groups, hi - lo, self.i), self.acc, self.device)
                for k in range(self.n):
                    rows[k] = self._native(k, k + 1, lo, hi).reshape(1, hi - lo, self.i)
                yield rows
            return
        a, g = (t.flatten(0, 1) for t in self.pair(0, self.n))
        for part in g.split(step, 1):
            rows = scratch("rows", (self.n, self.groups, part.shape[1], self.i), self.acc, self.device)
            torch.bmm(part, a, out=rows.flatten(0, 1))
            yield rows

    def select(self, index: Tensor) -> Tensor:
        if isinstance(self.a, Patches):
            return super().select(index)
        return torch.matmul(self.g[index].to(self.acc), self.a[index].to(self.acc)).reshape(len(index), *self.shape)

    def subset(self, index: Tensor) -> Factored:
        if isinstance(self.a, Patches):
            return super().subset(index)
        return Outer(self.a[index], self.g[index], self.shape, stored=self.stored)

    def drawn(self, index: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Where there are positions, all inputs of random outputs: a product with the patches of a sample each."""
        outputs, m = self.groups * self.o, len(index)
        if count >= self.numel:
            return super().drawn(index, count, generator)
        if self.s == 1 and not isinstance(self.a, Patches):
            at = torch.randint(self.numel, (m, count), generator=generator).to(self.device)
            g, a = self.g[index].to(self.acc).flatten(1), self.a[index].to(self.acc).flatten(1)
            out = at // self.i
            inside = at - out * self.i
            if self.groups > 1:
                inside += out // self.o * self.i
            return g.gather(1, out) * a.gather(1, inside), at
        chosen = torch.rand(m, outputs, generator=generator).argsort(1)[:, : -(-count // self.i)].to(self.device)
        found = []
        for n, some in zip(index.tolist(), chosen, strict=True):
            a, g = self.pair(n, n + 1)
            g = g.reshape(outputs, self.s)[some]
            found.append(g @ a[0, 0] if self.groups == 1 else torch.bmm(g[:, None], a[0, some // self.o])[:, 0])
        at = chosen[:, :, None] * self.i + torch.arange(self.i, device=self.device)
        return torch.stack(found).flatten(1), at.flatten(1)

    def weighted(self, weight: Tensor | None) -> Tensor | None:
        if self._weighted is not None:
            return self._weighted(weight).to(self.acc)
        if isinstance(self.a, Patches):
            return None
        a, g = self.pair(0, self.n)
        if weight is not None:  # the smaller one is copied
            weight = weight[:, None, None, None]
            a, g = (a * weight, g) if self.i < self.o else (a, g * weight)
        return torch.einsum("ngos,ngsi->goi", g, a).reshape(self.shape)

    def sq_norms(self) -> Tensor:
        """By `(a aᵀ)(g gᵀ)`, without the rows; whether that is cheaper is for the caller to know."""
        if self.s == 1:
            a, g = self.pair(0, self.n)
            if torch.is_grad_enabled():  # of norms, the gradient at zero is not a number
                return (a.square().sum((2, 3)) * g.square().sum((2, 3))).sum(1)
            lengths = [torch.linalg.vector_norm(t, dim=(2, 3)) for t in (a, g)]  # makes no tensor of squares
            squared = lengths[0].mul_(lengths[1]).square_()
            return squared[:, 0] if self.groups == 1 else squared.sum(1)
        parts, sizes = [], []
        step = max(1, _scratch.TILE // max(1, self.groups * self.s * max(self.s, self.i)))
        for lo in range(0, self.n, step):
            hi = min(self.n, lo + step)
            g = self.g[lo:hi].to(self.acc)
            products = torch.matmul(g.mT, g) * self._inner(lo, hi)
            parts.append(products.sum((1, 2, 3)))
            sizes.append(torch.linalg.vector_norm(products.detach(), 1, dim=(1, 2, 3)))
        return self._sound(torch.cat(parts), torch.cat(sizes))

    def _sound(self, found: Tensor, sizes: Tensor) -> Tensor:
        """Sums of products `found`, of which the absolute values sum to `sizes`, where these do not cancel.

        Where they do (positions whose contributions are all but opposite), a sample's row is formed. An accelerator is
        not asked, which would make the host wait: there it is a bound from above, so that what is clipped is.

        Returns:
            `[N]`.
        """
        doubt = found < DOUBT * sizes
        if found.device.type != "cpu":
            return torch.where(doubt, found.clamp_min(0) + 16 * torch.finfo(self.acc).eps * sizes, found)
        cancelled = doubt.nonzero()[:, 0].tolist()
        if not cancelled:
            return found
        squares = list(found.unbind())
        for i in cancelled:
            squares[i] = self.rows(i, i + 1).square().sum()
        return torch.stack(squares)

    def _inner(self, lo: int, hi: int) -> Tensor:
        if isinstance(self.a, Patches):
            return self.a.inner(lo, hi, self.acc)
        a = self.a[lo:hi].to(self.acc)
        return torch.matmul(a, a.mT)

    def second_moment(self) -> Tensor | None:
        if self.s != 1:
            return None
        a, g = self.pair(0, self.n)
        of_a, of_g = self._squares(a[:, :, 0], self.stored == "IO"), self._squares(g[..., 0], self.stored == "OI")
        if self.groups == 1:
            return (of_g[:, 0].T @ of_a[:, 0]).reshape(self.shape)
        return torch.einsum("ngo,ngi->goi", of_g, of_a).reshape(self.shape)

    def _squares(self, factor: Tensor, differs: bool) -> Tensor:
        """Squares of a factor `[N, G, F]`: summed over columns if it differs between them, else those of one."""
        if self.columns == 1:
            return factor.square()
        apart = factor.view(self.columns, self.n // self.columns, *factor.shape[1:])
        return apart.square().sum(0) if differs else apart[0].square()

    def scatter(self) -> Tensor | None:
        """Squared deviations from products of the factors, without cancellation.

        As a rule, `sum rows² - N mean²` will do. Where that cancels, the factors are centred: with b = g - mean g,
        c = a - mean a, the deviation of a row from (mean g)(mean a)ᵀ is d_n = b_n (mean a)ᵀ + g_n c_nᵀ, all small
        where the rows are nearly equal, so that `sum d² - N (mean d)²` is sound. Where a and g vary and their product
        hardly does, that difference cancels all the same: those entries are recognised by it and formed exactly.

        Returns:
            `[*shape]`, or None where there are several positions, or too many entries are in doubt.
        """
        if self.s != 1 or self.n == 1:
            return None
        a, g = self.pair(0, self.n)
        found = [_scatter_of_products(g[:, k, :, 0], a[:, k, 0]) for k in range(self.groups)]
        parts = [part for part in found if part is not None]
        return torch.cat(parts).reshape(self.shape) if len(parts) == len(found) else None

    @property
    def tokens_are_few(self) -> bool:
        """Whether inner products of rows take fewer operations by tokens than by rows."""
        return self.s == 1 or self.s**2 * (self.i + self.o) < self.i * self.o

    def gram(self) -> Tensor:
        """By tokens `(a aᵀ)(g gᵀ)`, or by rows of some outputs at a time, whichever takes fewer operations."""
        if self.tokens_are_few and (found := self._gram_by_tokens()) is not None:
            return found
        out = torch.zeros(self.n, self.n, dtype=self.acc, device=self.device)
        block = max(1, 2 * _scratch.TILE // max(1, self.n * self.groups * self.i))
        for o in range(0, self.o, block):
            rows = []
            for lo, hi in self.tiles():
                a, g = self.pair(lo, hi)
                rows.append(torch.matmul(g[:, :, o : o + block], a).reshape(hi - lo, -1))
            flat = torch.cat(rows)
            out = out + flat @ flat.T
        return out

    def _gram_by_tokens(self) -> Tensor | None:
        """Sums of products of tokens; None where those of a sample cancel, and what is left of them is rounding."""
        n, s = self.n, self.s
        out, sizes = (torch.zeros(*shape, dtype=self.acc, device=self.device) for shape in ((n, n), (n,)))
        a, g = self.pair(0, n)
        for k in range(self.groups):
            tokens_a, tokens_g = a[:, k].reshape(n * s, self.i), g[:, k].mT.reshape(n * s, self.o)
            products = (tokens_a @ tokens_a.T) * (tokens_g @ tokens_g.T)
            out = out + products.reshape(n, s, n, s).sum((1, 3))
            # Products of a sample's own tokens are no larger in sum than this.
            of_a, of_g = (torch.linalg.vector_norm(t.detach(), dim=1) for t in (tokens_a, tokens_g))
            sizes += (of_a * of_g).view(n, s).sum(1).square_()
        return None if s > 1 and bool((out.diagonal() < DOUBT * sizes).any()) else out

    def dots(self, direction: Tensor) -> Tensor | None:
        if self._apply is not None:
            return (self._apply(direction) * self.g).sum((1, 2, 3), dtype=self.acc)
        if isinstance(self.a, Patches):
            return None
        a, g = self.pair(0, self.n)
        d = direction.reshape(self.groups, self.o, self.i).to(self.acc)
        if self.groups == 1:  # one product for all samples, which reads the direction once
            return (torch.matmul(a[:, 0], d[0].mT) * g[:, 0].mT).sum((1, 2))
        return (torch.matmul(d, a.mT) * g).sum((1, 2, 3))

    def dots_with_sum(self) -> Tensor | None:
        """By products of all pairs of samples, `(a aᵀ)(g gᵀ)` summed over one of them."""
        if self.s != 1 or self.n * (self.i + self.o) >= self.i * self.o:
            return None
        a, g = self.pair(0, self.n)
        return (gram(a[:, :, 0].transpose(0, 1)) * gram(g[..., 0].transpose(0, 1))).sum((0, 1))

    def kronecker(self, reduce: bool) -> list[Kronecker]:
        if not reduce and self.stored == "OI":
            return [Kronecker(self.terms.squared, self._moments, self.positions)]
        if not reduce:
            return [Kronecker(self._moments(), lambda: self.terms.squared.clone(), self.positions, self.stored)]
        own = self.own()
        if own is None:
            return []  # a mean over S would count what fills up
        # Of the pair, gradients are summed over positions, and inputs averaged.
        share = own.sum(1).clamp(min=1).to(self.acc).reciprocal()[:, None, None, None]
        g = self.g.sum(3, keepdim=True, dtype=self.acc)
        if self.stored == "OI":
            return [Kronecker(Terms(g).squared, lambda: self._moments(share), 1)]
        return [Kronecker(self._moments(torch.ones_like(share)), lambda: Terms(g * share).squared, 1, self.stored)]

    def with_bias(self) -> Outer | None:
        a, g, own = self.a, self.g, self.own()
        if own is None:
            return None  # the bias is not added to what fills up
        if self.stored == "IO":
            if self.groups > 1 or isinstance(a, Patches):
                return None
            g = torch.cat([g, own.to(g)[:, None, None]], 2)
            return Outer(a, g, (self.o + 1, self.i), stored=self.stored, positions=self.positions, own=self.own)
        shape = (self.groups * self.o, self.i + 1)

        def one_more(part: Tensor, own: Tensor) -> Tensor:
            return torch.cat([part, own.to(part)[:, None, :, None].expand(-1, part.shape[1], -1, -1)], 3)

        if isinstance(a, Patches):

            def take(lo: int, hi: int) -> Tensor:
                return one_more(a[lo:hi], own[lo:hi])

            longer = Patches(*a.shape[:3], self.i + 1, take, a.source, lambda: self._bordered(a, own))
            return Outer(longer, g, shape, terms=self.terms, positions=self.positions, own=self.own)
        return Outer(one_more(a, own), g, shape, terms=self.terms, positions=self.positions, own=self.own)

    def _bordered(self, a: Patches, own: Tensor) -> Tensor:
        """`_moments` with an input more that is 1 where a position is a sample's own: `[G, I + 1, I + 1]`."""
        inner, sums = self._moments(), a.total(self.acc)
        count = own.sum().to(self.acc).expand(self.groups, 1)
        return torch.cat([torch.cat([inner, sums[:, None]], 1), torch.cat([sums, count], 1)[:, :, None]], 2)

    def apart(self, parts: int) -> Outer | None:
        """The same as a map with its outputs in groups, to which all inputs go; None where it is no such map."""
        if parts == 1:
            return self
        if self.groups > 1 or self.stored != "OI" or isinstance(self.a, Patches) or self.o % parts:
            return None
        a, g = self.a.expand(-1, parts, -1, -1), self.g.reshape(self.n, parts, self.o // parts, self.s)
        return Outer(a, g, self.shape, positions=self.positions, own=self.own)

    def rotated(self, bases: Sequence[Tensor]) -> Factored | None:
        parts = len(bases[0])
        if self.groups == 1 and parts > 1:
            apart = self.apart(parts)
            return None if apart is None else apart.rotated(bases)
        if [basis.shape[1:] for basis in bases] != [(self.o, self.o), (self.i, self.i)]:
            return None
        if any(len(basis) not in (1, self.groups) for basis in bases):
            return None
        left, right = (basis.to(self.acc) for basis in bases)
        a, g = self.a, left.mT @ self.g.to(self.acc)
        if isinstance(a, Patches):
            turned = Patches(*a.shape, lambda lo, hi: a[lo:hi].to(self.acc) @ right, a.source)
            return Outer(turned, g, self.shape)
        return Outer(a.to(self.acc) @ right, g, self.shape)

    def _moments(self, share: Tensor | None = None) -> Tensor:
        """Sum of products of a, or of its sum over positions times `share` `[N, 1, 1, 1]`: `[G, I, I]`."""
        if share is None and isinstance(self.a, Patches) and (quick := self.a.second_moment()) is not None:
            return quick
        if share is None and isinstance(self.a, Tensor) and self.a.dtype == self.acc:
            whole = one_axis(self.a.transpose(0, 1))
            if whole is not None:
                return gram(whole.mT)
        found = torch.zeros(self.groups, self.i, self.i, dtype=self.acc, device=self.device)
        step = max(1, min(self.n, _scratch.TILE // max(1, self.groups * self.s * self.i)))
        for lo in range(0, self.n, step):
            hi = min(self.n, lo + step)
            a, _ = self.pair(lo, hi)
            a = a if share is None else a.sum(2, keepdim=True) * share[lo:hi]
            found = found + gram(a.transpose(0, 1).flatten(1, 2).mT)
        return found

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
        copies = 1 if self._native is None else 3  # torch has two of its own of what it returns
        most = min(_scratch.TILE // max(1, copies * self.numel), _scratch.TILE // max(1, unfolded))
        return max(1, min(self.n, max(most, TOGETHER)))

    def bytes_held(self) -> int:
        """Memory that the factors keep alive."""
        return storage_bytes(self.a.source if isinstance(self.a, Patches) else self.a, self.g)


def _scatter_of_products(g: Tensor, a: Tensor) -> Tensor | None:
    """Squared deviations `[O, I]` of g_n a_nᵀ from their mean, for g `[N, O]`, a `[N, I]`; None: too many in doubt."""
    n, o, i = len(g), g.shape[1], a.shape[1]
    result, doubts = _about(g.square(), a.square(), g, a)
    if len(doubts) * 64 > o * i:
        mean = a.mean(0)
        c, b = a - mean, g - g.mean(0)
        # sum d² is one product of what is made of g with what is made of a
        left = torch.cat([g.square(), 2 * b * g, b.square().sum(0, keepdim=True)])
        right = torch.cat([c.square(), c * mean, mean.square()[None]])
        result, doubts = _about(left, right, g, c)
    if len(doubts) * 4 > o * i:
        return None
    if len(doubts):
        of_g, of_a = g.T.contiguous(), a.T.contiguous()
        parts = []
        step = max(1, _scratch.TILE // max(1, 4 * n))
        for some in doubts.split(step):
            rows = of_g[some // i] * of_a[some % i]
            parts.append((rows - rows.mean(1, keepdim=True)).square().sum(1))
        result.view(-1).index_put_((doubts,), torch.cat(parts))
    return result


def _about(left: Tensor, right: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """`leftᵀ right - (gᵀ c)² / N` `[O, I]`, and which of the flattened entries are in doubt, as too much cancels."""
    n, o, i = len(g), g.shape[1], c.shape[1]
    if torch.is_grad_enabled():
        spread = left.T @ right
        shift = g.T @ c
        result = torch.addcmul(spread, shift, shift, value=-1.0 / n)
        return result, (result < DOUBT * spread).flatten().nonzero()[:, 0]
    result = left.new_empty(o, i)
    doubts = []
    step = max(1, _scratch.TILE // max(1, 4 * i))
    for lo in range(0, o, step):
        hi = min(o, lo + step)
        spread, shift = (scratch(name, (hi - lo, i), c.dtype, c.device) for name in ("spread", "shift"))
        torch.mm(left[:, lo:hi].T, right, out=spread)
        torch.mm(g[:, lo:hi].T, c, out=shift)
        part = torch.addcmul(spread, shift, shift, value=-1.0 / n, out=result[lo:hi])
        margin = torch.add(part, spread, alpha=-DOUBT, out=shift)
        if margin.numel() and not margin.amin() >= 0:  # the least of entries of which one is NaN is NaN
            doubts.append((margin < 0).flatten().nonzero()[:, 0] + lo * i)
    return result, torch.cat(doubts) if doubts else torch.zeros(0, dtype=torch.long, device=g.device)
