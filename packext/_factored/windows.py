"""What a convolution multiplies its weight with: patches of its input, and second moments of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from packext import _scratch
from packext._factored.base import accumulation_dtype
from packext._factored.outer import gram
from packext._scratch import scratch


@dataclass(frozen=True)
class Window:
    """How a convolution moves over its input: sizes along each axis of space, and groups of channels."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    out: Sequence[int]
    groups: int

    def padded(self, x: Tensor) -> Tensor:
        """`[c, C, *space]` with its padding, and without what no patch reads."""
        if any(self.padding):
            x = F.pad(x, [p for pad in reversed(self.padding) for p in (pad, pad)])
        for axis, size in enumerate(self._sizes()):
            x = x.narrow(axis + 2, 0, size)
        return x

    def _sizes(self) -> list[int]:
        """How much of the padded input is read along each axis of space."""
        extents = zip(self.kernel, self.stride, self.dilation, self.out, strict=True)
        return [(out - 1) * stride + (kernel - 1) * dilation + 1 for kernel, stride, dilation, out in extents]

    def unfold(self, x: Tensor, first: int = 0) -> Tensor:
        """`[c, C, *space]` unfolded along axes of space from `first` on, `[c, C, *out, *kernel]`: a view."""
        x = self.padded(x)
        for axis in range(first, len(self.kernel)):
            x = x.unfold(axis + 2, (self.kernel[axis] - 1) * self.dilation[axis] + 1, self.stride[axis])
            if self.dilation[axis] > 1:
                x = x[..., :: self.dilation[axis]]
        return x

    def patches(self, x: Tensor) -> Tensor:
        """`[c, G, S, I]` of `x` `[c, C, *space]`, with I = C/G x kernel."""
        d = len(self.kernel)
        x = self.unfold(x)
        c, channels = x.shape[:2]
        # [c, C, *out, *kernel] -> [c, C, *kernel, *out]: copies run along the output, where x is contiguous.
        x = x.permute(0, 1, *range(d + 2, 2 * d + 2), *range(2, d + 2))
        rows = channels // self.groups * math.prod(self.kernel)
        if not torch.is_grad_enabled():  # the next call writes over it
            x = scratch("patches", x.shape, x.dtype, x.device).copy_(x)
        return x.reshape(c, self.groups, rows, math.prod(self.out)).mT

    def inner(self, x: Tensor) -> Tensor:
        """Inner products of the patches of each image, from products of its pixels, which patches only add up.

        Those at s and t have `sum over k of <x[s + k], x[t + k]>`: entries of the pixels' matrix, shifted along its
        diagonal, one axis of space after the other.

        Returns:
            `a aᵀ`, `[c, G, S, S]`.
        """
        x = self.padded(x)
        d, sizes = len(self.kernel), x.shape[2:]
        pixels = x.reshape(len(x), self.groups, -1, math.prod(sizes))
        found = torch.matmul(pixels.mT, pixels).view(*pixels.shape[:2], *sizes, *sizes)
        for axis, (kernel, stride, dilation, out) in enumerate(
            zip(self.kernel, self.stride, self.dilation, self.out, strict=True)
        ):
            shifted: Tensor | None = None
            for first in range(0, kernel * dilation, dilation):
                some = slice(first, first + (out - 1) * stride + 1, stride)
                index = [slice(None)] * (2 + 2 * d)
                index[2 + axis] = index[2 + axis + d] = some
                part = found[tuple(index)]
                if shifted is None or first == dilation:
                    shifted = part if shifted is None else shifted + part
                else:
                    shifted += part
            assert shifted is not None
            found = shifted
        return found.reshape(*pixels.shape[:2], math.prod(self.out), math.prod(self.out))

    def inner_cost(self, channels: int, elementwise: float) -> float:
        """Multiply-adds of `inner` for an image and group of so many channels; a sum counts as so many of them."""
        sizes = self._sizes()
        cost = math.prod(sizes) ** 2 * channels
        for axis, kernel in enumerate(self.kernel):
            sizes[axis] = self.out[axis]
            cost += elementwise * math.prod(sizes) ** 2 * (kernel - 1)
        return cost

    def second_moment(self, x: Tensor) -> Tensor | None:
        """Sum over images and positions of `a aᵀ`, from fewer products than patches take.

        Entries of a patch that are d rows apart meet at every position of the kernel, but for the image's first and
        last rows. So rows of x that are d apart are multiplied once, for all pairs of rows of the kernel.

        Returns:
            `[G, I, I]`; None where patches are as good a way to it.
        """
        k, out = self.kernel[0], self.out[0]
        if self.stride[0] != 1 or self.dilation[0] != 1 or k == 1 or out < k or torch.is_grad_enabled():
            return None
        d, channels = len(self.kernel), x.shape[1]
        c, rest, groups = channels // self.groups, math.prod(self.kernel[1:]), self.groups
        acc, height = accumulation_dtype(x.dtype), out + k - 1
        found = torch.zeros(groups, c, k, rest, c, k, rest, dtype=acc, device=x.device)

        def add(product: Tensor, rows: Iterable[int], apart: int) -> None:
            for row in rows:
                found[:, :, row, :, :, row + apart] += product.view(groups, c, rest, c, rest)

        step = max(1, 4 * _scratch.TILE // max(1, channels * rest * height * math.prod(self.out[1:])))
        for images in x.split(step):  # [C, *kernel, rows, images, *out]
            tile = self.unfold(images, 1).permute(1, *range(d + 2, 2 * d + 1), 2, 0, *range(3, d + 2))
            tile = scratch("patches", tile.shape, acc, x.device).copy_(tile).view(groups, c * rest, height, -1)
            for apart in range(k):
                # Every row of the kernel passes rows k - 1 to `out` of the image, some the others.
                some, later = tile[:, :, k - 1 : out].flatten(2), tile[:, :, k - 1 + apart : out + apart].flatten(2)
                product = some @ later.mT if apart else gram(some)
                add(product, range(k - apart), apart)
                for at in (*range(k - 1), *range(out, height - apart)):
                    rows = range(max(0, at - out + 1), min(k - apart, at + 1))
                    add(tile[:, :, at] @ tile[:, :, at + apart].mT, rows, apart)
        for row in range(k):
            for other in range(row + 1, k):
                found[:, :, other, :, :, row] = found[:, :, row, :, :, other].permute(0, 3, 4, 1, 2)
        return found.view(groups, c * k * rest, c * k * rest)
