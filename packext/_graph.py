"""A walk over autograd's graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any


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
