"""Calls of torch functions as the tracer meets them: which tensors are in them, and what is known of the functions."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingImports]
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from packext._record import tensors_in


def taken_over() -> bool:
    """Whether a torch.func transform or forward mode differentiates, so that taps would be in its way."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def saved_tensor_hooks() -> Any:
    """The function that packs tensors saved for the backward pass, if there is one."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
    return hooks[0] if hooks else None


def map_tensors(f: Callable[[Any], Any], output: Any, depth: int = 4) -> Any:
    """`output` with `f` of all its leaves; plain objects that hold tensors are copied, as deep as is said."""
    if isinstance(output, Tensor):
        return f(output)
    leaves, spec = pytree.tree_flatten(output)
    new = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor) and hasattr(leaf, "__dict__") and any(True for _ in tensors_in(leaf, depth)):
            clone = copy.copy(leaf)
            for key, item in vars(leaf).items():
                object.__setattr__(clone, key, map_tensors(f, item, depth - 1))
            leaf = clone
        new.append(f(leaf))
    return pytree.tree_unflatten(new, spec)


def shallow(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among `values`, and in lists and tuples among them."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)) and value and not _NUMBERS.issuperset(map(type, value)):
            found += shallow(value)
    return found


_NUMBERS = frozenset({int, float, bool, type(None)})


def any_unusual(tensors: dict[str, Tensor]) -> bool:
    """Whether a tensor is complex, so that gradients are products with conjugates, or sparse."""
    for t in tensors.values():
        if t.layout is not torch.strided or t.is_complex():
            return True
    return False


def changed(args: Any, kwargs: dict[str, Any]) -> Any:
    """The argument that a function changes."""
    return args[0] if args else next(iter(kwargs.values()))


#: Their sixth argument tells whether they write running statistics.
AVERAGING = frozenset({F.batch_norm, torch.batch_norm})

_KINDS = ("shape", "requires_grad", "dtype", "device", "ndim", "is_leaf", "grad_fn")
#: Functions that tell no more than what kind of tensor one is.
PASSIVE = frozenset(
    {
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.is_floating_point,
        Tensor.is_complex,
        Tensor.__len__,
        Tensor.stride,
        Tensor.retain_grad,
    }
    | {getattr(Tensor, name).__get__ for name in _KINDS}
)

#: Functions whose numbers and strings say where entries go, which is a part of a model's structure.
PLACES = frozenset(
    {
        getattr(owner, name)
        for owner in (torch, Tensor)
        for name in (
            "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "flip", "roll", "rot90", "tensordot",
        )
        if hasattr(owner, name)
    }
    | {getattr(torch._VF, "einsum")}  # noqa: B009 - not in torch's stubs
)  # fmt: skip


#: Functions that fold axes into one another: the first size tells whether the samples along it stay whole.
FOLDS = frozenset(
    {getattr(owner, name) for owner in (torch, Tensor) for name in ("reshape", "flatten", "unflatten")}
    | {Tensor.view, Tensor.view_as, Tensor.reshape_as}
)

_INDEXED = frozenset({Tensor.__getitem__, Tensor.__setitem__})
_FLAGS = frozenset({bool, str})


def told(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a call is given beside tensors that may say which entries meet and where they go, to compare.

    These are flags, names and axes, of a number whether it is 0 or 1 (with `lerp`, either may be the weight of nothing
    that mixes samples), and of an index whether it takes one, some or all entries of an axis. Sizes and other values
    may differ from pass to pass, and count for `PLACES` alone.

    Returns:
        What to compare.
    """
    if func in PLACES:
        return tuple([repr(v) for v in pytree.tree_leaves((args, kwargs)) if not isinstance(v, Tensor)])
    if func in _INDEXED:
        return tuple([_taken(v) for v in (args[1] if type(args[1]) is tuple else args[1:2])])
    at, names = _axes(func)
    found: list[Any] = [v for i, v in enumerate(args) if type(v) in _FLAGS or i in at and _plain(v) or _is_end(v)]
    found += [(k, v) for k, v in kwargs.items() if type(v) in _FLAGS or k in names and _plain(v) or _is_end(v)]
    return tuple([repr(v) for v in found])


@functools.cache
def _axes(func: Any) -> tuple[frozenset[int], frozenset[str]]:
    """Which arguments of a function are axes: positions, and names."""
    if isinstance(func, types.FunctionType):
        signatures = [func.__code__.co_varnames[: func.__code__.co_argcount]]
    else:
        found = torch._C._jit_get_schemas_for_operator(f"aten::{getattr(func, '__name__', '')}")
        signatures = [[argument.name for argument in schema.arguments] for schema in found]
    named = [(i, name) for names in signatures for i, name in enumerate(names) if "dim" in name or "axis" in name]
    return frozenset(i for i, _ in named), frozenset(name for _, name in named) | {"dim", "axis"}


def _is_end(value: Any) -> bool:
    return isinstance(value, (int, float)) and value in (0, 1)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, int) or isinstance(value, (tuple, list)) and all(map(_plain, value))


def _taken(index: Any) -> Any:
    """What an index takes of an axis, whichever entries these are."""
    if isinstance(index, slice):
        return index.start is None, index.stop is None, index.step
    return index if index is None or index is Ellipsis else type(index)


EXPANDS = frozenset({Tensor.expand, Tensor.expand_as, Tensor.broadcast_to, torch.broadcast_to})


def is_composite(func: Any) -> bool:
    """Whether `func` is written in Python in torch's functional modules, from other torch functions."""
    return (
        # Others leave dispatch to a private function (torch.meshgrid does), which would hand them to the mode again.
        isinstance(func, types.FunctionType)
        and func.__module__ in ("torch.nn.functional", "torch.functional")
        and any(name.startswith("has_torch_function") for name in func.__code__.co_names)
    )


@functools.cache
def transparent(func: types.FunctionType) -> types.FunctionType:
    """`func` with its own dispatch to function modes switched off, so that its body is seen instead of it.

    Called under an active mode, such functions hand themselves to the mode again, without end.

    Returns:
        A function of the same body and defaults.
    """
    names = {k: _never for k in func.__globals__ if k.startswith("has_torch_function")}
    body = types.FunctionType(
        func.__code__,
        {**func.__globals__, **names},
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def _never(*_: Any) -> bool:
    return False
