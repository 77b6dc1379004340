"""Where the N samples sit in a tensor: which axis, and how it is folded.

Shapes alone do not decide it (a sequence may have N tokens), so layouts start as candidates
and the probe keeps those that agree with what a cotangent of known samples leaves behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Samples along `axis`, which holds N entries or a multiple m of it.

    `inner` tells how a multiple is folded: False is sample-major (N, m), True is (m, N).
    `axis` None stands for a batch of one, to which every entry belongs.
    """

    axis: int | None
    n: int
    inner: bool = False

    def _sample_first(self, t: Tensor) -> tuple[Tensor, int]:
        """The tensor with the samples in front, and how many axes it gained."""
        if self.axis is None:
            return t[None], 1
        size = t.shape[self.axis]
        if size == self.n:
            return (t if self.axis == 0 else t.movedim(self.axis, 0)), 0
        m = size // self.n
        if self.inner:
            return t.unflatten(self.axis, (m, self.n)).movedim(self.axis + 1, 0), 1
        return t.unflatten(self.axis, (self.n, m)).movedim(self.axis, 0), 1

    def at(self, axis: int) -> Layout:
        """The same samples along another axis."""
        return replace(self, axis=axis)

    def occupied(self, t: Tensor) -> tuple[int, ...]:
        """The axes of `t` along which samples are told apart."""
        return () if self.axis is None else (self.axis,)

    def fits(self, t: Tensor, lead: int) -> bool:
        """Whether the samples are among the first `lead` axes of `t`."""
        if self.axis is None:
            return True
        return self.axis < lead and t.shape[self.axis] % self.n == 0

    def split(self, t: Tensor, lead: int) -> Tensor:
        """`[*lead axes, *features]` as `[N, S, *features]`."""
        first, gained = self._sample_first(t)
        lead += gained
        if lead == 1:
            return first[:, None]
        return first if lead == 2 else first.flatten(1, lead - 1)

    def positions(self, t: Tensor, lead: int) -> float | None:
        """How many positions of `split` are a sample's own on average; None if all are."""
        return None

    def own(self, lead: torch.Size) -> Tensor | None:
        """Which positions of `split` are a sample's own, `[N, S]`, for `[*lead, *features]`; None if all are."""
        return None

    def marked(self, mask: Tensor) -> Tensor:
        """Which positions of `split` a mask over the leading axes marks, `[*lead]` as `[N, S]`; none that fill up."""
        return self.split(mask.float()[..., None], mask.dim())[..., 0] > 0

    def by_sample(self, t: Tensor) -> Tensor:
        """`[N, everything else]`."""
        return self._sample_first(t)[0].reshape(self.n, -1)

    def only(self, t: Tensor, sample: int) -> Tensor:
        """`t` with the entries of every other sample set to zero (NaN as well)."""
        if type(self) is Layout and self.axis is not None and t.shape[self.axis] == self.n:
            out = torch.zeros_like(t)
            out.select(self.axis, sample).copy_(t.select(self.axis, sample))
            return out
        mask = torch.zeros(self.n, dtype=torch.bool, device=t.device)
        mask[sample] = True
        return torch.where(self.spread(mask, t), t, torch.zeros_like(t))

    def spread(self, mask: Tensor, t: Tensor) -> Tensor:
        """A mask `[N]` over samples, shaped to broadcast against `t`."""
        if self.axis is None:
            return mask.reshape([1] * t.dim())
        m = t.shape[self.axis] // self.n
        entries = mask.repeat(m) if self.inner else mask.repeat_interleave(m)
        shape = [1] * t.dim()
        shape[self.axis] = t.shape[self.axis]
        return entries.reshape(shape)

    def members(self, t: Tensor) -> Tensor:
        """For each entry along the axis of `t`, whose it may be: `[entries, N]`."""
        own = self.spread(torch.arange(self.n, device=t.device), t).flatten()
        return own[:, None] == torch.arange(self.n, device=t.device)

    def agrees(self, g: Tensor, members: Tensor) -> bool:
        """Whether only the samples in `members` `[N]` have non-zero entries in `g` (NaN tells nothing)."""
        if self.axis is None:
            return True
        strangers = (~self.spread(members, g)).flatten().nonzero()[:, 0]
        # In parts: masks of the size of g would be the peak of memory of the whole pass.
        for part in strangers.split(max(1, len(strangers) // 8)):
            entries = g.index_select(self.axis, part)
            if bool(((entries != 0) & ~entries.isnan()).any()):
                return False
        return True


@dataclass(frozen=True, eq=False)
class Scattered(Layout):
    """Samples along `axis` in any order and number, as where rows are picked by what is in them.

    Which sample each row belongs to is found out by `agrees`, from cotangents of all sets of `separating`.
    """

    inner: bool = True
    possible: list[Tensor] = field(default_factory=list)

    def agrees(self, g: Tensor, members: Tensor) -> bool:
        """Whether every row of `g` that is not zero may be one of `members` `[N]`; remembers that it is."""
        assert self.axis is not None
        rows = g.movedim(self.axis, 0)[..., None].flatten(1)
        live = ((rows != 0) & ~rows.isnan()).any(1)
        left = ~live[:, None] | members
        self.possible[:] = [left & before for before in self.possible] or [left]
        return bool(self.possible[0].any(1).all())

    @property
    def owner(self) -> Tensor:
        """The sample `[rows]` of each row; any sample for one that no gradient reaches."""
        return self.possible[0].byte().argmax(1)

    def _sample_first(self, t: Tensor) -> tuple[Tensor, int]:
        """The rows of a sample where the axis was, with zeros behind those of samples that have fewer."""
        assert self.axis is not None
        return gathered(self.owner, self.n)(t.movedim(self.axis, 0)).movedim(1, self.axis + 1), 1

    def fits(self, t: Tensor, lead: int) -> bool:
        """Whether the samples are among the first `lead` axes of `t`."""
        return self.axis is not None and self.axis < lead

    def members(self, t: Tensor) -> Tensor:
        """For each row of `t`, whose it may be: `[rows, N]`."""
        return self.possible[0]

    def positions(self, t: Tensor, lead: int) -> float:
        """How many positions of `split` are a sample's own on average."""
        return t.shape[:lead].numel() / self.n

    def own(self, lead: torch.Size) -> Tensor:
        """Which positions of `split` are a sample's own, `[N, S]`, for tensors `[*lead, *features]`."""
        return self.marked(torch.ones(lead, device=self.possible[0].device))

    def spread(self, mask: Tensor, t: Tensor) -> Tensor:
        """A mask `[N]` over samples, shaped to broadcast against `t`."""
        assert self.axis is not None
        shape = [1] * t.dim()
        shape[self.axis] = t.shape[self.axis]
        return mask[self.owner].reshape(shape)


@dataclass(frozen=True, eq=False)
class Tokens(Layout):
    """Tokens in the place of samples: `n` of the `samples` times `length` that there are, sample by sample.

    A sample has at least two. A tensor in which no axis, or more than one, is as long does not tell them apart.
    """

    samples: int = 1
    length: int = 1
    #: Of the `samples * length` tokens, those that count `[n]`; None: all.
    kept: Tensor | None = None

    @property
    def _base(self) -> Layout:
        return Layout(self.axis, self.samples, self.inner)

    def _folded(self, shape: Sequence[int]) -> bool:
        """Whether the tokens are in the axis of the samples."""
        return self.axis is not None and self.samples > 1 and shape[self.axis] == self.samples * self.length

    def _where(self, shape: Sequence[int]) -> int | None:
        """The one axis of tokens; None in a tensor in which they are folded, and where none or several may be it."""
        if self.axis is not None and shape[self.axis] != self.samples:
            return None
        found = [axis for axis, size in enumerate(shape) if size == self.length and axis != self.axis]
        return found[0] if len(found) == 1 and len(shape) > 1 else None

    def tells(self, shape: Sequence[int], reads: Sequence[Sequence[int]]) -> bool:
        """Whether an output of this shape has its tokens in a place beyond doubt, made of what the call `reads`.

        Returns:
            False where what it reads has several axes as long: a map along tokens has channels in their place.
        """
        folded = self._folded(shape)
        most = 0 if folded else 1 + (self.samples == self.length)
        known = folded or self._where(shape) is not None
        return known and all(list(read).count(self.length) <= most for read in reads)

    def occupied(self, t: Tensor) -> tuple[int, ...]:
        """The axes of samples and of tokens."""
        return tuple(axis for axis in (self.axis, self._where(t.shape)) if axis is not None)

    def fits(self, t: Tensor, lead: int) -> bool:
        """Whether the first `lead` axes of `t` are those of samples and tokens."""
        base = self._base
        return base.fits(t, lead) and t.shape[:lead].numel() == self.samples * self.length

    def split(self, t: Tensor, lead: int) -> Tensor:
        """`[*lead axes, *features]` as `[n, 1, *features]`."""
        rows = self._base.split(t, lead).flatten(0, 1)
        return (rows if self.kept is None else rows[self.kept])[:, None]

    def _sample_first(self, t: Tensor) -> tuple[Tensor, int]:
        """The tokens in front, and no axis gained."""
        own = self.occupied(t)
        rows = t.movedim(own, tuple(range(len(own))))
        if self._folded(t.shape):
            rows = rows.unflatten(0, (self.length, self.samples)).transpose(0, 1) if self.inner else rows[None]
        elif self.axis is None:
            rows = rows[None]
        rows = rows.flatten(0, 1)
        return rows if self.kept is None else rows[self.kept], 0

    def spread(self, mask: Tensor, t: Tensor) -> Tensor:
        """A mask `[n]` over tokens, shaped to broadcast against `t`; False for those that do not count."""
        entries = mask
        if self.kept is not None:
            entries = mask.new_zeros(self.samples * self.length).index_put((self.kept,), mask)
        entries = entries.reshape(self.samples, self.length)
        shape = [1] * t.dim()
        for axis in self.occupied(t):
            shape[axis] = t.shape[axis]
        token = self._where(t.shape)
        turned = self.inner if token is None else self.axis is not None and token < self.axis
        return (entries.T if turned else entries).reshape(shape)


def ranks(owner: Tensor, n: int) -> Tensor:
    """The number `[rows]` of each row among those of its owner, of whom there are n."""
    order = owner.argsort(stable=True)
    count = owner.bincount(minlength=n)
    first = (count.cumsum(0) - count)[owner[order]]
    return torch.empty_like(order).index_put((order,), torch.arange(len(order), device=owner.device) - first)


def gathered(owner: Tensor, n: int) -> Callable[[Tensor], Tensor]:
    """How rows with an `owner` `[rows]` below n are put together.

    Returns:
        `[rows, *rest] -> [n, most rows of one, *rest]`, with zeros behind those of an owner who has fewer.
    """
    place = ranks(owner, n)
    most = 1 + int(place.max()) if len(place) else 1
    return lambda rows: rows.new_zeros(n, most, *rows.shape[1:]).index_put((owner, place), rows)


def digits(n: int) -> list[Tensor]:
    """For each binary digit, the samples `[N]` whose index has it: any two differ in one."""
    return [(torch.arange(n) >> k & 1).bool() for k in range((n - 1).bit_length())]


def separating(n: int) -> list[Tensor]:
    """Sets of samples `[N]`, for every pair i, j one that holds i without j: with a digit of the index, and without."""
    return [members for has in digits(n) for members in (has, ~has)]


def candidates(shape: torch.Size, n: int, batch_axis: int, scattered: bool = False) -> Iterator[Layout]:
    """Layouts that `shape` allows, the likeliest first; `scattered` ones, if asked for, last."""
    if n == 1:
        yield Layout(None, 1)
        return
    axes = sorted(range(len(shape)), key=lambda k: (shape[k] != n, k != batch_axis, k))
    for axis in axes:
        if shape[axis] == n:
            yield Layout(axis, n)
        elif shape[axis] and shape[axis] % n == 0:
            yield Layout(axis, n)
            yield Layout(axis, n, inner=True)
    if scattered:
        yield from (Scattered(axis, n) for axis in range(len(shape)))
