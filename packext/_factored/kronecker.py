"""Second moments of the two sides of a linear map, and how those of several uses of a parameter add up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: Into how many blocks outputs of one use may be divided, so that all uses of a parameter have the same.
FINEST = 8


class Kronecker(NamedTuple):
    """Second moments of the two sides of a linear map that a parameter, or a block of it, is.

    Attributes:
        outputs: sum of products of the gradients at its outputs, `[G, O, O]`.
        inputs: gives the sum of products of its inputs, `[G, I, I]`; their diagonal `[G, I]` where no product of two
            different inputs is there. It may be written to. None: the parameter is a vector, to which each output is
            its own.
        positions: S, how many terms of a sample these sums have, on average over the samples; `[G]` of each group.
        stored: whether the parameter's first axes are the outputs ("OI"), or the inputs ("IO").
        at: which of the parameter's blocks the G groups are, where they are some of them.
        blocks: how many the parameter has then.
    """

    outputs: Tensor
    inputs: Callable[[], Tensor] | None
    positions: int | float | Tensor
    stored: str = "OI"
    at: tuple[int, ...] | None = None
    blocks: int = 1

    @property
    def sides(self) -> tuple[int, int]:
        """How many blocks of the parameter there are, and outputs of each."""
        return len(self.outputs) if self.at is None else self.blocks, self.outputs.shape[-1]

    def divided(self, parts: int) -> Kronecker | None:
        """The same with each block's outputs in so many blocks, without the products between these."""
        if parts == 1:
            return self
        outputs, size = self.outputs, self.outputs.shape[-1] // parts
        if self.stored == "IO" or self.inputs is None or size * parts != outputs.shape[-1]:
            return None
        inputs = self.inputs
        apart = outputs.view(-1, parts, size, parts, size).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        return self._replace(
            outputs=apart.reshape(-1, size, size),
            inputs=lambda: inputs().repeat_interleave(parts, 0),
            at=None if self.at is None else tuple(parts * k + j for k in self.at for j in range(parts)),
            blocks=self.blocks * parts,
        )


def overlap(found: Sequence[Kronecker]) -> bool:
    """Whether two of them are of the same outputs, in one orientation."""
    spans = sorted(
        (k.stored, block * k.sides[1], (block + 1) * k.sides[1])
        for k in found
        for block in (range(len(k.outputs)) if k.at is None else k.at)
    )
    return any(a[0] == b[0] and a[2] > b[1] for a, b in zip(spans, spans[1:], strict=False))


def added(found: Sequence[Kronecker]) -> list[Kronecker]:
    """Those of all uses of a parameter: where the same block is used in the same orientation, positions of one map.

    Args:
        found: of each use.

    Returns:
        One for each orientation, "IO" first, for all blocks of the parameter; zeros for blocks without a use. Where
        uses divide it into blocks of different sizes, those of the largest size that divides all. Nothing where there
        is no such size, or only a small one.
    """
    kinds = {stored: [k for k in found if k.stored == stored] for stored in ("IO", "OI")}
    sums = [_sum(kind) for kind in kinds.values() if kind]
    whole = [k for k in sums if k is not None]
    if len(whole) < len(sums) or len({k.sides[0] for k in whole}) > 1:
        return []
    return [] if len(whole) > 1 and any(k.inputs is None for k in whole) else whole


def _sum(kind: Sequence[Kronecker]) -> Kronecker | None:
    """Those of one orientation."""
    if len({k.inputs is None for k in kind}) > 1:
        return None
    if len(kind) == 1 and kind[0].at is None:
        return kind[0]
    sizes = [k.sides[1] for k in kind]
    size = math.gcd(*sizes)
    if size * FINEST < max(sizes):
        return None
    kind = [finer for k in kind if (finer := k.divided(k.sides[1] // size)) is not None]
    if len(kind) < len(sizes) or len({k.sides for k in kind}) > 1:
        return None
    first = kind[0]
    blocks = first.sides[0]
    at = [tuple(range(blocks)) if k.at is None else k.at for k in kind]
    index = torch.tensor([block for each in at for block in each], device=first.outputs.device)

    def placed(parts: Sequence[Tensor]) -> Tensor:
        if blocks == 1:
            return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(0)
        together = torch.cat(list(parts))
        return together.new_zeros(blocks, *together.shape[1:]).index_add(0, index, together)

    def inputs() -> Tensor:
        parts = [k.inputs() for k in kind if k.inputs is not None]
        dense = any(part.dim() == 3 for part in parts)
        return placed([part.diag_embed() if dense and part.dim() == 2 else part for part in parts])

    counts = [torch.as_tensor(k.positions).to(first.outputs).expand(len(own)) for k, own in zip(kind, at, strict=True)]
    return first._replace(
        outputs=placed([k.outputs for k in kind]),
        inputs=None if first.inputs is None else inputs,
        positions=first.outputs.new_zeros(blocks).index_add(0, index, torch.cat(counts)),
        at=None,
    )
