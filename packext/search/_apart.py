"""Whether samples stay apart in a network of mixed operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.search.mixed import MixedOp, shown


def check_apart(net: nn.Module, edges: dict[str, MixedOp], x: Tensor) -> None:
    """Refuse samples that influence each other, on paths that together hold every operation that is alive.

    Gates are extended by themselves, so that no pass has to probe a path that was never seen; what the probe of a
    whole model would find is looked for here, in forward passes. Samples with a binary digit of their number are
    replaced by another one: the rows of all others must stay, at each edge and at the output. Any two samples differ
    in a digit. An edge that does not run once in a pass, or has no row for each sample, is refused,
    too, and so is one whose values are not finite. Buffers and torch's generator stay as they are; the paths do not.

    Args:
        net: the network, in the mode in which it is to run.
        edges: its mixed operations by path.
        x: inputs `[N, ...]`.
    """
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    seen: dict[str, list[Any]] = {}
    handles = [
        m.register_forward_hook(lambda module, args, output, edge=edge: seen[edge].append(output))
        for edge, m in edges.items()
    ]
    devices = [x.device] if x.device.type == "cuda" else []
    n = torch.arange(len(x), device=x.device)

    def rows(x: Tensor) -> dict[str, list[Any]]:
        seen.update({edge: [] for edge in edges})
        with torch.no_grad(), torch.random.fork_rng(devices):
            output = net(x)
        return {**seen, "the output": [output]}

    try:
        for k in range(max(len(m.ops) for m in edges.values())):
            for m in edges.values():
                alive = m.alive.nonzero().flatten().tolist()
                m.active, m.inactive = alive[k % len(alive)], None
            want = {edge: _one(edge, values, len(x), edges) for edge, values in rows(x).items()}
            for digit in range((len(x) - 1).bit_length()):
                for side in (0, 1):
                    kept = (n >> digit) & 1 == side
                    others = torch.where(kept.view(-1, *[1] * (x.dim() - 1)), x, x[kept.nonzero()[0]])
                    for edge, values in rows(others).items():
                        _stays(edge, want[edge][kept], values[0][kept], edges)
    finally:
        for handle in handles:
            handle.remove()
        for name, b in net.named_buffers():
            b.copy_(buffers[name])


def _one(edge: str, values: list[Any], n: int, edges: dict[str, MixedOp]) -> Tensor:
    if len(values) != 1:
        raise px.PackextError(
            f"The MixedOp at {edge} ran {len(values)} times in one pass: each must run once (paths {shown(edges)})."
        )
    (value,) = values
    if not isinstance(value, Tensor) or value.dim() < 1 or len(value) != n:
        what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise px.PackextError(f"At {edge}, one tensor [N, ...] with N = {n} samples is needed, not {what}.")
    if not value.isfinite().all():
        raise px.PackextError(f"At {edge}, values {list(value.shape)} are not finite (paths {shown(edges)}).")
    return value


def _stays(edge: str, want: Tensor, got: Tensor, edges: dict[str, MixedOp]) -> None:
    if not torch.allclose(got, want, rtol=0, atol=1e-4 * float(want.abs().max())):
        raise px.CoupledSamplesError(
            f"At {edge}, rows {list(want.shape[1:])} of samples change with the inputs of others (paths "
            f"{shown(edges)}): a sample has no gradient of its own by a gate, or samples are not along the first axis. "
            "With BatchNorm, call net.eval() for the steps of the architecture."
        )
