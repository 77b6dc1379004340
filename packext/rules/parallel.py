"""Linear layers that tensor parallelism splits: each process runs the part of the call that its parameters make.

With the weight split by outputs (ColwiseParallel) the part gives some of the outputs; split by inputs
(RowwiseParallel) it gives a term of all of them, which are sums over the processes. In both cases the part of the
weight's gradient that a process holds is that of its own part of the call, sample by sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from packext._factored import Factored
from packext._shards import contiguous, is_distributed, like, part
from packext._use import Gradients, Layouts, Use
from packext.rules.linear import Linear

if TYPE_CHECKING:
    from packext._lineage import Tracer


class ParallelLinear(Linear):
    """This process's part of `y = x weightᵀ + bias`; weight and bias are DTensors, all others what they are here."""

    name = "linear of parts"
    splits = True
    delivers = False

    def spares(self, use: Use) -> tuple[str, ...]:
        return ("bias",)

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Tensor:
        return super().call(use, _here(tensors, () if use.consts["adds bias"] else ("bias",)))

    def gradients(self, use: Use, t: dict[str, Tensor], g: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        found = super().gradients(use, _here(t), g, wanted)
        return {name: like(grad, t[name]) if is_distributed(t[name]) else grad for name, grad in found.items()}

    def factors(self, use: Use, t: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored] | None:
        return super().factors(use, _here(t), gs, layouts)


def _here(tensors: dict[str, Tensor], without: Sequence[str] = ()) -> dict[str, Tensor]:
    return {name: part(t) for name, t in tensors.items() if name not in without}


PARALLEL = ParallelLinear()


def linear_of_parts(tracer: Tracer, func: Any, tensors: dict[str, Tensor]) -> Any:
    """Place the tap of `F.linear` with a DTensor for its weight; NotImplemented where it is split in another way."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    x, w, b = tensors["input"], tensors["weight"], tensors.get("bias")
    if not (isinstance(x, DTensor) and isinstance(w, DTensor) and (b is None or isinstance(b, DTensor))):
        return NotImplemented
    mesh, last = w.device_mesh, x.dim() - 1
    if mesh.ndim != 1 or x.device_mesh != mesh or b is not None and b.device_mesh != mesh:
        return NotImplemented
    if w.dim() != 2 or x.shape[last] != w.shape[1]:  # torch will say so
        return NotImplemented
    if any(t is not s.tensor for t in (w, b) if t is not None for s in tracer.sources(t)):
        return NotImplemented  # it is made of parameters, and no parameter itself
    (reads,), (splits,), (adds,) = x.placements, w.placements, b.placements if b is not None else (None,)
    if splits == Shard(0) and reads == Replicate() and adds in (None, Shard(0)):
        data, gives, adds_bias = x.to_local(grad_placements=[Partial()]), Shard(last), True
    elif splits == Shard(1) and reads == Shard(last) and adds in (None, Replicate()):
        # A sum over the processes: one of them adds the bias.
        data, gives, adds_bias = x.to_local(), Partial(), mesh.get_local_rank() == 0
    else:
        return NotImplemented
    y = tracer.owned(PARALLEL, func, {**tensors, "input": data}, {"transposed": False, "adds bias": adds_bias})
    if y is NotImplemented:
        return y
    shape = torch.Size([*x.shape[:-1], w.shape[0]])
    return DTensor.from_local(y, mesh, [gives], run_check=False, shape=shape, stride=contiguous(shape))
