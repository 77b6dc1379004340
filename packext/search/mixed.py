"""An edge of a network of which it is yet to be chosen what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import packext as px


class Zero(nn.Module):
    """Zeros in the shape of the input: the operation that removes an edge."""

    def forward(self, x: Tensor) -> Tensor:
        """Of x, zeros like it."""
        return torch.zeros_like(x)


class _Gate(nn.Module):
    """Two outputs weighted with binary gates, 1 and 0. Extended alone, it tells each sample's gradient by them."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, active: Tensor, inactive: Tensor) -> Tensor:
        return self.gates[0] * active + self.gates[1] * inactive


class MixedOp(nn.Module):
    """One of K operations, of which the search says which (Cai, Zhu & Han, ICLR 2019, section 3).

    Outside of a search step, only the operation at `active` runs: time and memory of a pass are those of a network of
    one path. In a search step two run, the second without a graph, and their outputs are weighted with gates 1 and 0.

    Attributes:
        ops: the operations by name, in the order of `alpha`; all give outputs of one shape.
        alpha: `[K]`, architecture parameters: the logits of the probabilities. Not for the weights' optimizer.
        alive: `[K]`, whether an operation is still in the race; part of `state_dict`.
        active: index of the operation that runs, None before the first `sample`.
        inactive: index of the second one within a search step, otherwise None.
    """

    alive: Tensor

    def __init__(self, ops: Mapping[str, nn.Module]) -> None:
        """Take the operations, as likely as each other.

        Args:
            ops: at least two, by name.

        Raises:
            ValueError: if there are fewer, or they have no names.
        """
        super().__init__()
        if not isinstance(ops, Mapping):
            raise ValueError(f'MixedOp takes its operations by name, as {{"skip": nn.Identity(), ...}}, got {ops!r}.')
        if len(ops) < 2:
            raise ValueError(f"MixedOp chooses between two operations or more, got {list(ops)}.")
        self.ops = nn.ModuleDict(ops)
        self.alpha = nn.Parameter(torch.zeros(len(ops)))
        self.register_buffer("alive", torch.ones(len(ops), dtype=torch.bool))
        self.active: int | None = None
        self.inactive: int | None = None
        # In a list, so that it is no part of the network: gates are nobody's weights.
        self._gate = [px.extend(_Gate())]

    @property
    def names(self) -> list[str]:
        """Of the operations."""
        return list(self.ops)

    @property
    def gates(self) -> nn.Parameter:
        """The binary gates `[2]` of the active and the inactive operation in a search step."""
        return self._gate[0].gates

    def probabilities(self) -> Tensor:
        """`[K]` in float64, softmax of `alpha` over the operations that are alive; 0 for the others."""
        return self.alpha.double().masked_fill(~self.alive, -torch.inf).softmax(0)

    def leader(self) -> int:
        """Index of the most probable operation, the first of several."""
        return int(self.probabilities().argmax())

    def run(self, k: int, x: Tensor) -> Tensor:
        """Output of the operation at index k."""
        return self.ops[self.names[k]](x)

    def forward(self, x: Tensor) -> Any:
        """Run the path.

        Args:
            x: what the operations take.

        Returns:
            Output of the active operation; in a search step, of both, weighted with their gates.

        Raises:
            PackextError: if no operation has been chosen, or two give different shapes.
        """
        if self.active is None:
            raise px.PackextError(
                f"A MixedOp of {', '.join(self.names)} has no path yet: call sample() of the search, or derive() a "
                "network from it."
            )
        if self.inactive is None:
            return self.run(self.active, x)
        same = x.detach().clone()  # an operation may write into its input, as ReLU(inplace=True) does
        output = self.run(self.active, x)
        with torch.no_grad():
            other = self.run(self.inactive, same)
        if output.shape != other.shape:
            raise px.PackextError(
                f"A MixedOp adds outputs of one shape: {self.names[self.active]!r} gives {list(output.shape)}, "
                f"{self.names[self.inactive]!r} gives {list(other.shape)} for an input {list(x.shape)}."
            )
        self.gates.data = self.gates.data.to(output)
        return self._gate[0](output, other)


def mixed_ops(net: nn.Module) -> dict[str, MixedOp]:
    """The mixed operations of a network.

    Args:
        net: with at least one.

    Returns:
        By the path of their modules.

    Raises:
        PackextError: if there is none, one is part of another, or the network is nothing else.
    """
    found = {path: m for path, m in net.named_modules() if isinstance(m, MixedOp)}
    if not found:
        raise px.PackextError(f"{type(net).__name__} has no MixedOp: there is nothing to search.")
    for path in found:
        if not path or any(other.startswith(f"{path}.") for other in found):
            raise px.PackextError(f"The MixedOp at {path!r} must be a part of the network, and hold no other MixedOp.")
    return found


def shown(edges: Mapping[str, MixedOp]) -> str:
    """The paths in use, for messages.

    Args:
        edges: mixed operations by path.

    Returns:
        "edge: operation" of each.
    """
    return ", ".join(f"{edge}: {m.names[m.active or 0]}" for edge, m in edges.items())
