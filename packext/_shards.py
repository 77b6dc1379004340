"""Parameters of which each process holds a part (DTensors): the part, and results of parts as those of the whole.

Tensor parallelism splits a linear layer over processes that see the same samples. What a process finds of its part is
the part of what there is to find, or a term of the sum that norms and inner products are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_WHOLE = (Tensor, torch.nn.Parameter)


def is_distributed(t: Any) -> bool:
    """Whether `t` is a DTensor, of which this process holds a part or one of several copies."""
    if type(t) in _WHOLE:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # which torch does not import, and takes a while
    return module is not None and isinstance(t, module.DTensor)


def part(t: Any) -> Tensor:
    """What this process holds of `t`, without a graph; `t` itself if that is all of it."""
    if not is_distributed(t):
        return t
    with torch.no_grad():
        return t.to_local()


def like(value: Tensor, parameter: Any) -> Tensor:
    """The DTensor of which `value` `[..., *p]` is this process's part, split as `parameter` is."""
    from torch.distributed.tensor import DTensor, Shard

    lead = value.dim() - parameter.dim()
    placements = [Shard(p.dim + lead) if p.is_shard() else p for p in parameter.placements]
    shape = torch.Size([*value.shape[:lead], *parameter.shape])
    return DTensor.from_local(
        value.contiguous(), parameter.device_mesh, placements, run_check=False, shape=shape, stride=contiguous(shape)
    )


def contiguous(shape: torch.Size) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(shape[k + 1 :].numel() for k in range(len(shape)))


def group_of(t: Any) -> Any:
    """The process group over which a DTensor of one mesh dimension is spread."""
    return t.device_mesh.get_group()


def added(values: Sequence[tuple[Any, Tensor]]) -> list[Tensor]:
    """Sums over the processes of what each has found for its parts, in one exchange for each shape.

    Args:
        values: parameters and what was found for them, in an order that all have; copies of all are not summed.

    Returns:
        The sums, in that order.
    """
    found = [value for _, value in values]
    alike: dict[Any, list[int]] = {}
    for k, (parameter, value) in enumerate(values):
        if parameter.placements[0].is_shard():
            alike.setdefault((group_of(parameter), tuple(value.shape), value.dtype), []).append(k)
    for (group, *_), which in alike.items():
        together = torch.stack([found[k] for k in which])
        dist.all_reduce(together, group=group)
        for k, whole in zip(which, together, strict=True):
            found[k] = whole
    return found
