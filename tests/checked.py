"""Types and shapes in packext's signatures are checked at every call while the tests run, by beartype and jaxtyping.

jaxtyping's import hook puts `jaxtyping.jaxtyped` on each function of the package. That binds the arguments to the
signature and checks them twice in a call, whether there are shapes or not, and compiles two checks whenever an inner
function is defined: more than half of the time of many tests. `install` puts in its place what checks the same once:
beartype alone where there are no shapes, and beartype within `jaxtyped`, which then only holds the sizes of a call's
names together, where there are. What was compiled for an inner function serves for all of its definitions.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import jaxtyping

ORIGINAL = jaxtyping.jaxtyped
#: Of each function: its annotations, one like it of which nothing is referred to, and beartype's wrapper of that.
KNOWN: dict[tuple[Any, ...], tuple[dict[str, Any], Any, Any]] = {}


def install() -> None:
    """From now on, functions that jaxtyping's import hook decorates are checked in this way."""
    jaxtyping.jaxtyped = jaxtyped


def jaxtyped(fn: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """In place of `jaxtyping.jaxtyped`, to which properties, generators and the like are left."""
    if fn is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = jaxtyped(fn.__init__, typechecker=typechecker)
        return fn
    if type(fn) is not FunctionType or inspect.isgeneratorfunction(fn):
        return ORIGINAL(fn, typechecker=typechecker)
    if "_getframe" in fn.__code__.co_names:
        return fn  # it asks who has called it, and that is not to be a check
    key = fn.__module__, fn.__qualname__, fn.__code__, *fn.__annotations__.items()
    if key not in KNOWN:
        hints = resolved(fn)
        hollow = copied(fn, tuple(CellType() for _ in fn.__closure__ or ()), __annotations__=hints)
        KNOWN[key] = hints, hollow, typechecker(hollow)
    hints, hollow, checked = KNOWN[key]
    if checked is hollow:  # there is nothing to check
        return fn
    # beartype's wrapper keeps the function that it calls among its defaults.
    [called] = [name for name, value in checked.__kwdefaults__.items() if value is hollow]
    mine = copied(fn, fn.__closure__, __annotations__=hints)
    checked = copied(checked, checked.__closure__, __kwdefaults__={**checked.__kwdefaults__, called: mine})
    checked = functools.update_wrapper(checked, fn)
    return ORIGINAL(checked, typechecker=None) if any(map(has_shape, hints.values())) else checked


def copied(fn: FunctionType, closure: tuple[CellType, ...] | None, **changes: Any) -> FunctionType:
    """The same function with other captured variables, and some attributes changed."""
    twin = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, closure)
    for name in ("__kwdefaults__", "__qualname__", "__module__"):
        setattr(twin, name, getattr(fn, name))
    for name, value in changes.items():
        setattr(twin, name, value)
    return twin


def resolved(fn: FunctionType) -> dict[str, Any]:
    """The annotations that can be evaluated, as objects; as for jaxtyping, others are for type checkers and people."""
    hints = {}
    for name, annotation in fn.__annotations__.items():
        probe = FunctionType(install.__code__, fn.__globals__)
        probe.__annotations__ = {name: annotation}
        try:
            hints.update(typing.get_type_hints(probe, include_extras=True))
        except Exception:
            continue
    return hints


def has_shape(hint: Any) -> bool:
    """Whether a shape stands somewhere in a type."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    parts = hint if isinstance(hint, list) else typing.get_args(hint)
    return any(map(has_shape, parts))
