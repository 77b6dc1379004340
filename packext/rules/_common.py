"""The table of handlers, argument binding, and the generic rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from packext._use import Rule, Use

if TYPE_CHECKING:
    from packext._lineage import Tracer

Handler = Callable[["Tracer", Callable[..., Any], Any, Any], Any]

#: Handler of each torch function. NotImplemented sends a call to the generic rule.
HANDLERS: dict[Any, Handler] = {}

#: Functions that read no more than shape, type and device of all arguments but the first.
FIRST_ONLY = frozenset(
    {
        Tensor.expand_as,
        Tensor.view_as,
        Tensor.reshape_as,
        Tensor.type_as,
        Tensor.to,
        torch.zeros_like,
        torch.ones_like,
        torch.full_like,
        torch.empty_like,
        torch.rand_like,
        torch.randn_like,
    }
)


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Register a handler for torch functions (None entries are functions that this torch lacks)."""

    def register(handler: Handler) -> Handler:
        for function in functions:
            if function is not None:
                HANDLERS[function] = handler
        return handler

    return register


def bind(
    names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any], **defaults: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arguments by name, tensors apart from the rest; None is dropped from the tensors.

    Args:
        names: of the positional parameters of the torch function.
        args: positional arguments.
        kwargs: keyword arguments.
        **defaults: values of parameters that were not given.

    Returns:
        The tensors, and the rest.
    """
    given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for k, v in given.items():
        if isinstance(v, Tensor):
            tensors[k] = v
        else:
            rest[k] = v
    return tensors, rest


class Generic(Rule):
    """Any call: arguments are kept as they were nested, and the vjp is taken one sample at a time."""

    conjugates = True

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Any:
        leaves = list(use.consts["leaves"])
        for name, value in tensors.items():
            leaves[int(name[3:])] = value
        args, kwargs = pytree.tree_unflatten(leaves, use.consts["spec"])
        return use.func(*args, **kwargs)


GENERIC = Generic()


@functools.cache
def mutates(func: Any) -> bool:
    """Whether a torch function changes its first argument, by torch's naming."""
    name = getattr(func, "__name__", "")
    if not (name.startswith("__") and name.endswith("__")):
        return name.endswith("_")
    return name == "__setitem__" or (name[2] == "i" and name[2:5] not in ("inv", "int", "ind"))


def writes_in_place(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call changes one of its arguments."""
    return kwargs.get("out") is not None or mutates(func)


def generic(tracer: Tracer, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Place an observing tap on any function."""
    if writes_in_place(func, kwargs):
        raise tracer.refuse(
            func,
            "data is written into a tensor together with a parameter, in place, in a form that cannot be followed",
            "Use the out-of-place form of the operation.",
        )
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = {f"arg{i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tracer.observed(GENERIC, func, tensors, {"leaves": rest, "spec": spec})
