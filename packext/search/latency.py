"""What each operation of a network costs in time: measured once, kept as JSON, and a differentiable expectation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import packext as px
from packext.search.mixed import MixedOp, mixed_ops


class LatencyTable:
    """Seconds of each operation at each edge, on the machine on which they were measured.

    ProxylessNAS's model of latency: that of a path is the sum over its edges of what their operations take by
    themselves, so that its expectation is linear in the probabilities (Cai, Zhu & Han 2019, section 3.3). What lies
    between the edges is the same for all paths and left out.

    Attributes:
        seconds: time of a forward pass, by edge and operation.
        about: of the measurement: shape of the input and dtype by edge, device, threads, version of torch.
    """

    def __init__(self, seconds: dict[str, dict[str, float]], about: dict[str, Any]) -> None:
        """Take measurements.

        Raises:
            PackextError: if a time is not positive and finite.
        """
        for edge, ops in seconds.items():
            for op, value in ops.items():
                if not 0 < value < float("inf"):
                    raise px.PackextError(f"The latency of {op!r} at {edge!r} is {value}, not a positive number.")
        self.seconds, self.about = seconds, about

    @classmethod
    def measure(cls, net: nn.Module, x: Tensor, turns: int = 100) -> LatencyTable:
        """Time every operation by itself with `torch.utils.benchmark`, in evaluation mode and without gradients.

        Of the turns, of three runs each, the least counts: what else runs on the machine adds to most of them. They are
        short, since a longer one would seldom pass without being interrupted.
        Training flags, paths and torch's number of threads stay as they are.

        Args:
            net: with mixed operations. Edges' inputs are those of a path of first operations that are alive.
            x: inputs of the network, of the batch size that counts.
            turns: how often all operations are timed, one after the other.

        Returns:
            The table.

        Raises:
            PackextError: if an edge did not run.
        """
        edges = mixed_ops(net)
        inputs: dict[str, Tensor] = {}
        flags = {m: m.training for m in net.modules()}
        before = {edge: (m.active, m.inactive) for edge, m in edges.items()}

        def note(edge: str) -> Callable[..., None]:
            return lambda module, args, named: inputs.update({edge: (*args, *named.values())[0]})

        handles = [m.register_forward_pre_hook(note(edge), with_kwargs=True) for edge, m in edges.items()]
        try:
            for m in edges.values():
                m.active, m.inactive = int(m.alive.int().argmax()), None
            net.eval()
            with torch.no_grad(), px.disable():
                net(x)
                for edge in edges:
                    if edge not in inputs:
                        raise px.PackextError(f"The edge {edge!r} did not run: its latency depends on the path.")
                turned = [{e: _times(m, inputs[e]) for e, m in edges.items()} for _ in range(turns)]
        finally:
            for handle in handles:
                handle.remove()
            for m, flag in flags.items():
                m.training = flag
            for edge, m in edges.items():
                m.active, m.inactive = before[edge]
        seconds = {e: {op: min(turn[e][op] for turn in turned) for op in m.names} for e, m in edges.items()}
        shapes = {edge: [list(i.shape), str(i.dtype)] for edge, i in inputs.items()}
        threads = torch.get_num_threads()
        return cls(seconds, {"inputs": shapes, "device": str(x.device), "threads": threads, "torch": torch.__version__})

    def save(self, path: str | Path) -> None:
        """Write JSON.

        Args:
            path: of the file.
        """
        Path(path).write_text(json.dumps({"seconds": self.seconds, "about": self.about}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read what `save` wrote.

        Args:
            path: of the file.

        Returns:
            The table.
        """
        found = json.loads(Path(path).read_text())
        return cls(found["seconds"], found["about"])

    def of(self, edge: str, op: MixedOp) -> Tensor:
        """Seconds of one edge's operations.

        Args:
            edge: path of the module.
            op: the mixed operation there.

        Returns:
            `[K]` in float64, on the device of `op`.

        Raises:
            PackextError: if one was not measured.
        """
        known = self.seconds.get(edge, {})
        missing = [name for name in op.names if name not in known]
        if missing:
            raise px.PackextError(
                f"The table has no latency of {', '.join(missing)} at {edge!r}; it has {list(known) or 'nothing'}. "
                "Measure it with LatencyTable.measure(net, x)."
            )
        return torch.tensor([known[name] for name in op.names], dtype=torch.float64, device=op.alpha.device)

    def expected(self, net: nn.Module) -> Tensor:
        """Expected seconds of a path, differentiable in the edges' `alpha`.

        Args:
            net: whose edges are in the table.

        Returns:
            A scalar in float64, the sum over edges of `p . seconds`.
        """
        return torch.stack([m.probabilities() @ self.of(edge, m) for edge, m in mixed_ops(net).items()]).sum()


def _times(edge: MixedOp, x: Tensor) -> dict[str, float]:
    def mean(op: nn.Module) -> float:
        return Timer("op(x)", globals={"op": op, "x": x}, num_threads=torch.get_num_threads()).timeit(3).mean

    return {name: mean(op) for name, op in edge.ops.items()}
