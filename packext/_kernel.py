"""One Triton kernel: norms, sums and second moments of individual gradients `g aᵀ` that are never written to memory.

A program forms one block of one weight's individual gradients after the other, in registers, and adds up what is asked
of them. What multiplied a convolution's weight is read where it lies in the input, without unfolding; a linear map
is a convolution of a column with a kernel of one entry. Triton's interpreter runs the same code on the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def moments(  # noqa: D417 - those along the axes of one thing are described together
    x,
    g,
    norms,
    totals,
    squares,
    means,
    spreads,
    samples,
    per_part,
    outputs,
    features,
    positions,
    width_out,
    height,
    width,
    channels,
    x_n,
    x_c,
    x_h,
    x_w,
    g_n,
    g_g,
    g_o,
    g_s,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NORMS: tl.constexpr,
    TOTAL: tl.constexpr,
    SQUARES: tl.constexpr,
    SPREAD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Statistics of the blocks of some samples' individual gradients.

    Grid: blocks of `[O, I]`, groups, parts of the samples.

    Args:
        x: what multiplied the weight, `[N, G channels, height, width]`.
        g: gradients at the outputs, `[N, G, O, S]`; S counts rows of `width_out` positions.
        norms: `[N, G, blocks]`, squared norms of each sample's blocks.
        totals: `[parts, G, O, I]`, sums over the samples of a part.
        squares: likewise, sums of squares.
        means: likewise, means.
        spreads: likewise, sums of squared deviations from the means (Welford's recurrence).
        samples: N.
        per_part: of which so many make a part, one after the other.
        outputs: O.
        features: I, channels times entries of the weight's window.
        positions: S.
        width_out: positions in a row of the output.
        height, width: rows and columns of an image.
        channels: of a group.
        x_n, x_c, x_h, x_w: strides of x along its axes.
        g_n, g_g, g_o, g_s: strides of g along its axes.
        stride_h, stride_w: of the convolution, down and to the right.
        padding_h, padding_w, dilation_h, dilation_w: likewise.
        KERNEL_H, KERNEL_W: rows and columns of the weight's window.
        BLOCK_O: outputs of a block.
        BLOCK_I: features of a block.
        BLOCK_S: positions that a product takes at once.
        NORMS: whether `norms` are wanted.
        TOTAL: whether `totals` are.
        SQUARES: whether `squares` are.
        SPREAD: whether `means` and `spreads` are.
        PRECISION: of products of float32 numbers, as `tl.dot` names it.
    """
    block, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    across = tl.cdiv(features, BLOCK_I)
    o = block // across * BLOCK_O + tl.arange(0, BLOCK_O)
    i = block % across * BLOCK_I + tl.arange(0, BLOCK_I)
    channel, down, right = i // (KERNEL_H * KERNEL_W), i // KERNEL_W % KERNEL_H, i % KERNEL_W
    x_i = (group * channels + channel).to(tl.int64) * x_c
    g_here = g + group.to(tl.int64) * g_g + o[:, None].to(tl.int64) * g_o
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    square = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    mean = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    spread = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    first = part * per_part
    last = tl.minimum(first + per_part, samples)
    for n in range(first, last):
        row = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        at = tl.cast(n, tl.int64)
        for start in range(0, positions, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            slope = tl.load(
                g_here + at * g_n + s[None, :].to(tl.int64) * g_s,
                mask=(o[:, None] < outputs) & (s[None, :] < positions),
                other=0.0,
            )
            h = (s // width_out * stride_h - padding_h)[:, None] + (down * dilation_h)[None, :]
            w = (s % width_out * stride_w - padding_w)[:, None] + (right * dilation_w)[None, :]
            inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
            patch = tl.load(
                x + at * x_n + x_i[None, :] + h.to(tl.int64) * x_h + w.to(tl.int64) * x_w,
                mask=inside & (s[:, None] < positions) & (i[None, :] < features),
                other=0.0,
            )
            row += tl.dot(slope, patch, input_precision=PRECISION)
        if NORMS:
            where = (at * tl.num_programs(1) + group) * tl.num_programs(0) + block
            tl.store(norms + where, tl.sum(tl.sum(row * row, 1), 0))
        if TOTAL:
            total += row
        if SQUARES:
            square += row * row
        if SPREAD:
            apart = row - mean
            mean += apart / (n - first + 1)
            spread += apart * (row - mean)
    where = ((part * tl.num_programs(1) + group).to(tl.int64) * outputs + o[:, None]) * features + i[None, :]
    known = (o[:, None] < outputs) & (i[None, :] < features)
    if TOTAL:
        tl.store(totals + where, total, mask=known)
    if SQUARES:
        tl.store(squares + where, square, mask=known)
    if SPREAD:
        tl.store(means + where, mean, mask=known)
        tl.store(spreads + where, spread, mask=known)
