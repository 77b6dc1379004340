"""Calls in which values of data choose which entries go on: two passes of one structure may differ in layout then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packext._record import tensors_in

#: Functions that pick entries of their first argument by the values of another.
PICKS = frozenset(
    {Tensor.__getitem__, Tensor.index_select, torch.index_select, Tensor.masked_select, torch.masked_select}
    | {Tensor.gather, torch.gather, Tensor.take, torch.take, torch.take_along_dim, Tensor.take_along_dim}
)

#: Functions that put entries where the values of another argument say.
PUTS = frozenset(
    {Tensor.__setitem__}
    | {
        getattr(owner, name)
        for stem in ("index_put", "index_copy", "index_add", "index_reduce", "scatter", "scatter_add", "scatter_reduce",
                     "masked_scatter", "put")
        for owner, name in ((Tensor, f"{stem}_"), (Tensor, stem), (torch, stem))
        if hasattr(owner, name)
    }
)  # fmt: skip

#: Functions that order entries along an axis: the position of that argument, and what it is if there is none.
ORDERS: dict[Any, tuple[int, int | None]] = {
    getattr(owner, name): (at, default)
    for names, at, default in (
        (("sort", "cummax", "cummin", "mode"), 1, -1),
        (("max", "min", "median", "nanmedian"), 1, None),
        (("topk", "kthvalue"), 2, -1),
        (("msort",), 1, 0),
    )
    for name in names
    for owner in (torch, Tensor)
}

#: All of them: what to ask `chosen` about.
CHOOSE = PICKS | PUTS | ORDERS.keys()


def chosen(func: Callable[..., Any], args: Any, kwargs: Any, axis: int, is_data: Callable[[Tensor], bool]) -> bool:
    """Tell whether a call lets data decide which sample's entries of an activation stand where.

    Args:
        func: What is called.
        args: Its arguments by position.
        kwargs: The others.
        axis: Of the samples, in the model's inputs.
        is_data: Whether a tensor was computed from the model's inputs.

    Returns:
        Whether a pass like this one may have its rows elsewhere the next time.
    """
    first = args[0] if args else kwargs.get("input")
    given = list(tensors_in((args[1:], kwargs)))
    if func in PUTS:
        data = [t.is_floating_point() for t in given if is_data(t)]
        moved = isinstance(first, Tensor) and _reorders(given, first.shape, axis, args, kwargs)
        return any(data) and (moved or not all(data))
    if not (isinstance(first, Tensor) and first.is_floating_point() and is_data(first)):
        return False
    if func in PICKS:
        return any(map(is_data, given)) or _reorders(given, first.shape, axis, args, kwargs)
    if not first.requires_grad:
        return False
    at, default = ORDERS[func]
    dim = kwargs.get("dim", args[at] if len(args) > at else default)
    return isinstance(dim, int) and not isinstance(dim, bool) and dim % max(first.dim(), 1) == axis


def _reorders(given: list[Tensor], shape: torch.Size, axis: int, args: Any, kwargs: Any) -> bool:
    """Whether a constant may be an order of the samples, such as a random permutation: another one the next time."""
    along = any(type(v) is int and v % max(len(shape), 1) == axis for v in (*args[1:3], kwargs.get("dim")))
    whole = [t for t in given if not (t.dtype == torch.bool or t.is_floating_point() or t.is_complex())]
    return any(along or t.dim() == 1 and t.shape == shape[axis : axis + 1] for t in whole)
