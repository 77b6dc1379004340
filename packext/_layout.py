"""Where the N samples sit in a tensor: which axis, and how it is folded.

Shapes alone do not decide it (a sequence may have N tokens), so layouts start as candidates
and the probe keeps those that agree with what a cotangent of known samples leaves behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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

    def by_sample(self, t: Tensor) -> Tensor:
        """`[N, everything else]`."""
        return self._sample_first(t)[0].reshape(self.n, -1)

    def only(self, t: Tensor, sample: int) -> Tensor:
        """`t` with the entries of every other sample set to zero (NaN as well)."""
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


def digits(n: int) -> list[Tensor]:
    """For each binary digit, the samples `[N]` whose index has it: any two differ in one."""
    return [(torch.arange(n) >> k & 1).bool() for k in range((n - 1).bit_length())]


def separating(n: int) -> list[Tensor]:
    """Sets of samples `[N]`, for every pair i, j one that holds i without j: with a digit of the index, and without."""
    return [members for has in digits(n) for members in (has, ~has)]


def candidates(shape: torch.Size, n: int, batch_axis: int) -> Iterator[Layout]:
    """Layouts that `shape` allows, the likeliest first."""
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
