"""Autograd's graph: a walk over it, and what its nodes are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor


def inputs_first(roots: Sequence[Any], into: Callable[[Any], bool] = lambda node: True) -> Iterator[Any]:
    """Nodes of a graph, each after all that it leads to; what lies behind a node only where `into` is true of it."""
    done: set[Any] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, expanded = stack.pop()
        if node is None or node in done:
            continue
        if expanded or not into(node):
            done.add(node)
            yield node
            continue
        stack.append((node, True))
        stack.extend((child, False) for child, _ in node.next_functions)


def name_of(node: Any) -> str:
    """What autograd calls a node, also where a Function has put something of its own under `ctx.name`."""
    return type(node).name(node)


def leaf_of(node: Any) -> Tensor | None:
    """The tensor into whose `.grad` a node accumulates; None if it does not."""
    return node.variable if type(node).__name__ == "AccumulateGrad" else None
