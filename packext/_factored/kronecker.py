"""Second moments of the two sides of a linear map, and how those of several uses of a parameter add up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Kronecker(NamedTuple):
    """Second moments of the two sides of a linear map that a parameter, or a block of it, is.

    Attributes:
        outputs: sum of products of the gradients at its outputs, `[G, O, O]`.
        inputs: gives the sum of products of its inputs, `[G, I, I]`; their diagonal `[G, I]` where no product of two
            different inputs is there. None: the parameter is a vector, to which each output is its own.
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


def added(found: Sequence[Kronecker]) -> list[Kronecker]:
    """Those of all uses of a parameter: where the same block is used in the same orientation, positions of one map.

    Args:
        found: of each use.

    Returns:
        One for each orientation, "IO" first, for all blocks of the parameter; zeros for blocks without a use. Nothing
        where uses divide the parameter into blocks in different ways.
    """
    kinds = {stored: [k for k in found if k.stored == stored] for stored in ("IO", "OI")}
    sums = [_sum(kind) for kind in kinds.values() if kind]
    whole = [k for k in sums if k is not None]
    if len(whole) < len(sums) or len({k.sides[0] for k in whole}) > 1:
        return []
    return [] if len(whole) > 1 and any(k.inputs is None for k in whole) else whole


def _sum(kind: Sequence[Kronecker]) -> Kronecker | None:
    """Those of one orientation."""
    first = kind[0]
    if len({k.sides for k in kind}) > 1 or len({k.inputs is None for k in kind}) > 1:
        return None
    if len(kind) == 1 and first.at is None:
        return first
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

    counts = [float(k.positions) for k in kind]
    each = first.outputs.new_tensor([count for count, blocks_ in zip(counts, at, strict=True) for _ in blocks_])
    return first._replace(
        outputs=placed([k.outputs for k in kind]),
        inputs=None if first.inputs is None else inputs,
        positions=sum(counts) if blocks == 1 else each.new_zeros(blocks).index_add(0, index, each),
        at=None,
    )
