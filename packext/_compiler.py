"""torch.compile: taps are placed in models as they were written, so what is compiled runs uncompiled meanwhile."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from packext._record import Record


def _loaded() -> Any:
    """The part of torch that compiles, if anything may have been compiled yet: to import it takes a second."""
    return sys.modules.get("torch._dynamo.eval_frame")


def original(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, or the one that is no result of it."""
    dynamo = _loaded()
    if dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        return original(module.__dict__["_modules"]["_orig_mod"])
    return module


def compiled(record: Record) -> bool:
    """Whether a part of the model is compiled; functions that it calls are not known."""
    dynamo = _loaded()
    if dynamo is None:
        return False
    kind = dynamo.OptimizedModule
    return any([m._compiled_call_impl is not None or isinstance(m, kind) for m in record.modules()])


class _Eager:
    """How many forward passes and contexts want compiled code to run as it was written, in all threads together.

    The stance is one for the process. They do not end in the order in which they began: threads overlap, and a forward
    pass that was interrupted in a context ends after it. So the last to end puts back what the first has found.
    """

    def __init__(self) -> None:
        self.count, self.lock = 0, threading.Lock()
        self.first: Any = None

    def begin(self) -> None:
        with self.lock:
            stance = torch.compiler.set_stance("force_eager")
            if not self.count:
                self.first = stance
            self.count += 1

    def end(self) -> None:
        with self.lock:
            self.count -= 1
            if not self.count:
                self.first.__exit__(None, None, None)


_EAGER = _Eager()


def eager() -> Callable[[], None] | None:
    """From now on compiled code runs as it was written.

    Returns:
        What ends that, to be called once; None inside of code that is compiled, where it cannot be had.
    """
    if torch.compiler.is_compiling():
        return None
    if _loaded() is None:
        return lambda: None
    try:
        _EAGER.begin()
    except RuntimeError:
        return None
    return _EAGER.end


def as_usual() -> AbstractContextManager[Any]:
    """In this context, code is compiled as if nobody had said that it should not be."""
    return nullcontext() if _loaded() is None else torch.compiler.set_stance("default")
