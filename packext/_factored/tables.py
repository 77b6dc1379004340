"""Tables whose rows are read at constant indices: which row of a parameter stands where in a value made of it.

A position table meets data as a value, `table[positions]` or a view of the table itself, in which entries of the
parameter stand in other places. Where they stand is read from autograd's graph of the value, when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packext._factored.base import table
from packext._graph import inputs_first, leaf_of, name_of


def _nodes(*names: str) -> frozenset[str]:
    return frozenset(f"{name}Backward{k}" for name in names for k in range(3))


#: Autograd's nodes of functions whose result is a view of what they read.
VIEWS = _nodes(
    "Alias", "Permute", "ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "T", "Transpose",
    "Unbind", "UnsafeView", "Unsqueeze", "View",
)  # fmt: skip

#: Those, and of others that put entries in other places, several times, or nowhere.
MOVES = VIEWS | _nodes(
    "Cat", "Clone", "Embedding", "Expand", "Flip", "Gather", "IndexSelect", "Index", "MaskedFill", "Repeat", "Roll",
    "Stack", "ToCopy", "Where",
)  # fmt: skip

#: Digits below this are exact in floating-point types of two bytes and more.
BASE = 128


class View(NamedTuple):
    """Where the entries of a value stand in the parameter that it is a view of, each of them once.

    Attributes:
        size: of the value.
        stride: along its axes, in entries of the parameter, which is contiguous.
        offset: of its first entry.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, value: Tensor, parameter: Tensor) -> View | None:
        """Of a value with the graph that made it; None where it is no such view. A cast of all of it counts as one."""
        if value.dtype != parameter.dtype:
            return cls._cast(value, parameter)
        if value._base is not parameter:
            return None
        if not parameter.is_contiguous():
            return None
        node: Any = value.grad_fn
        while node is not None and name_of(node) in VIEWS:
            node = node.next_functions[0][0]
        if leaf_of(node) is not parameter:
            return None
        return cls(tuple(value.shape), value.stride(), int(value.storage_offset() - parameter.storage_offset()))

    @classmethod
    def _cast(cls, value: Tensor, parameter: Tensor) -> View | None:
        node: Any = value.grad_fn
        if node is None or name_of(node) != "ToCopyBackward0" or not value.is_floating_point():
            return None
        alike = value.stride() == parameter.stride() and value.device == parameter.device
        if not alike or leaf_of(node.next_functions[0][0]) is not parameter:
            return None
        return cls(tuple(value.shape), value.stride(), 0) if parameter.is_contiguous() else None

    def pull(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """`[c, *size] -> [c, *parameter.shape]`: zeros where the value has no entry."""
        out, numel = rows.new_zeros(len(rows), *parameter.shape), parameter.numel()
        there = (len(rows), *self.size), (numel, *self.stride), self.offset
        if torch.is_grad_enabled():
            return out.as_strided_scatter(rows, *there)
        out.as_strided(*there).copy_(rows)
        return out

    def rows_in(self, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """As the function of that name, without a graph."""
        entries = torch.arange(parameter.numel(), device=parameter.device)
        return rows_of(entries.as_strided(self.size, self.stride, self.offset), table(parameter.shape)[1])

    def along(self, parts: Sequence[int]) -> tuple[int, ...] | None:
        """Strides of the value seen with axes `parts`, as many entries in all; None where it has not one for each."""
        axes = [(n, s) for n, s in zip(self.size, self.stride, strict=True) if n > 1]
        found: list[int] = []
        for part in reversed(parts):
            stride, have = 0, 1
            while have < part:
                if not axes:
                    return None
                n, s = axes.pop()
                if have > 1 and s != stride * have:
                    return None
                stride, have = (s if have == 1 else stride), have * n
            if have != part:
                return None
            found.append(stride)
        return tuple(reversed(found))


def rows_in(value: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
    """Where rows of a parameter stand in a value made of parameters alone: what `rows_of` gives, if they do."""
    entries = entries_of(value, parameter)
    return None if entries is None else rows_of(entries, table(parameter.shape)[1])


def entries_of(value: Tensor, parameter: Tensor) -> Tensor | None:
    """Which entry of a parameter each entry of a value made of parameters alone is.

    Args:
        value: with the graph that made it.
        parameter: one of those that it is made of.

    Returns:
        Numbers of the parameter's entries, `[*value.shape]`, -1 where there is none of them. None where entries are
        computed, and not put in other places.
    """
    if not _moves(value.grad_fn, parameter):
        return None
    number = torch.arange(1, parameter.numel() + 1, device=parameter.device).view(parameter.shape)
    found = torch.zeros(value.shape, dtype=torch.int64, device=value.device)
    with torch.enable_grad():
        # What pulls u back to the parameter is linear in u: its derivative by u puts numbers where the entries stand.
        u = torch.zeros_like(value, requires_grad=True)
        (pulled,) = torch.autograd.grad(value, parameter, u, retain_graph=True, create_graph=True)
        unit = 1
        while unit <= parameter.numel():
            digit = (number // unit % BASE).to(pulled.dtype)
            (part,) = torch.autograd.grad(pulled, u, digit, retain_graph=True)
            found += part.long() * unit
            unit *= BASE
    return found - 1


def _moves(root: Any, parameter: Tensor) -> bool:
    """Whether a graph puts entries of a parameter in other places, and does no more with them."""
    leads: dict[Any, int] = {}
    for node in inputs_first([root]):
        children = [child for child, _ in node.next_functions if child is not None]
        leads[node] = sum(leads[child] for child in children) or int(leaf_of(node) is parameter)
        name = name_of(node)
        # In a sum with what other parameters make, entries of this one stand as they are.
        added = name == "AddBackward0" and leads[node] == 1 and getattr(node, "_saved_alpha", 1) == 1
        if children and leads[node] and not (added or (name in MOVES and _plain(node))):
            return False
        leads[node] = min(leads[node], 1)
    return leads[root] > 0


def _plain(node: Any) -> bool:
    """Whether a node that may be an embedding's hands on each gradient as it is."""
    if not name_of(node).startswith("Embedding"):
        return True
    padding = bool((node._saved_indices == node._saved_padding_idx).any()) if node._saved_padding_idx < 2**62 else False
    return not (padding or node._saved_scale_grad_by_freq or node._saved_sparse)


def rows_of(entries: Tensor, columns: int) -> tuple[Tensor, Tensor] | None:
    """Where whole rows of a table stand in a value.

    Args:
        entries: of the table, as `entries_of` has them.
        columns: E, of the table.

    Returns:
        Places in the flattened value `[M, E]`, a row of the table each, and its number `[M]`. None where the value
        has no axes (or several) along which the columns of each row stand, all of them.
    """
    if not columns:
        return None
    there, column = entries >= 0, entries % columns
    across = [axis for axis in range(entries.dim()) if _varies(column, there, axis)]
    along = [axis for axis in range(entries.dim()) if axis not in across]
    count = max(1, torch.Size(entries.shape[axis] for axis in along).numel())
    place = torch.arange(entries.numel(), device=entries.device).view(entries.shape)
    place = place.permute(*along, *across).reshape(count, -1)
    found = entries.flatten()[place]
    place, found = (t[(found >= 0).any(1)][:, (found >= 0).any(0)] for t in (place, found))
    if not len(found) or found.shape[1] != columns:
        return None
    order = (found[0] % columns).argsort()
    place, found = place[:, order], found[:, order]
    row = found[:, 0].div(columns, rounding_mode="floor")
    whole = row[:, None] * columns + torch.arange(columns, device=row.device)
    return (place, row) if torch.equal(found, whole) else None


def _varies(column: Tensor, there: Tensor, axis: int) -> bool:
    """Whether another column follows along an axis."""
    size = column.shape[axis] - 1
    both = there.narrow(axis, 0, size) & there.narrow(axis, 1, size)
    return bool((both & (column.narrow(axis, 0, size) != column.narrow(axis, 1, size))).any())
