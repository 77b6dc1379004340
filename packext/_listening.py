"""What a thread is in the middle of: contexts that listen, passes, and those of packext's own; asked at each tap."""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import time
import weakref
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from packext._refusals import awaited, will_accumulate
from packext._use import AIM, Use

if TYPE_CHECKING:
    from packext._backpack import backpack
    from packext._flight import Sweep
    from packext._owners import Owners
    from packext._pass import Pass
    from packext._probe import Check, Probe
    from packext._record import Record


class Here:
    """What goes on in a thread of the user's: two that train at once do not hear each other.

    Attributes:
        contexts: that are open, the innermost last.
        hearing: of those that ask for anything, the innermost that does not overhear, and that does: they hear a pass.
        passes: backward passes that have not ended, by the id of autograd's graph task.
        probe: whose cotangent is on its way.
        sweep: whose cotangent is on its way.
        silent: whether passes are nobody's business.
        aside: the last pass (autograd's number of it) that set a model aside.
        part: whether packext's own pass ends before the taps' common input.
        cut: the model through a piece of whose graph a pass goes that ends at taps.
    """

    def __init__(self) -> None:
        """Nothing goes on."""
        self.contexts: list[backpack] = []
        self.hearing: tuple[backpack, ...] = ()
        self.passes: dict[int, Pass] = {}
        self.probe: Probe | Check | Owners | None = None
        self.sweep: Sweep | None = None
        self.silent = self.part = False
        self.cut: Record | None = None
        self.aside = -2
        self._aimed: tuple[int, bool] = (-2, False)

    @property
    def listening(self) -> bool:
        """Whether a context hears what arrives now."""
        return not self.silent and bool(self.hearing)

    @property
    def inner(self) -> bool:
        """Whether the pass is one of packext's own."""
        return self.silent or self.probe is not None or self.sweep is not None

    @property
    def heard(self) -> bool:
        """Whether the pass is one of the user's, and a context hears it."""
        return self.listening and self.probe is None and self.sweep is None

    @property
    def deaf(self) -> bool:
        """Whether what arrives at taps is nobody's business."""
        return self.probe is None and self.sweep is None and not self.listening

    @property
    def exact(self) -> bool:
        """Whether a tap is to compute `.grad` as torch would, whatever quantities know of it."""
        return self.heard and self.hearing[0].exact_grad

    @property
    def aimed(self) -> bool:
        """Whether what all taps have in common is among the targets of the pass."""
        task = torch._C._current_graph_task_id()
        if self._aimed[0] != task:
            self._aimed = task, awaited(AIM)
        return self._aimed[1]

    @property
    def within(self) -> bool:
        """Whether the pass is one that was started within another, and asks for some gradients alone."""
        return bool(self.passes) and torch._C._current_graph_task_id() not in self.passes and not self.aimed

    @property
    def activations_only(self) -> bool:
        """Whether no parameter's gradient is wanted from the pass that runs."""
        own = self.sweep is not None if self.probe is None else self.probe.compare is None
        return own and (self.part or self.aimed)

    def idle(self, use: Use) -> bool:
        """Whether a plain pass is at `use`: nobody listens, none of packext's own runs, and no graph of it is made."""
        if not self.deaf or torch.is_grad_enabled():
            return False
        record = use.owner()
        return record is None or not record.running

    def cuts(self, use: Use) -> bool:
        """Whether the pass ends at this tap."""
        return self.cut is not None and use.owner() is self.cut

    def by_inputs(self, use: Use) -> bool:
        """Whether a pass is at `use` that computes derivatives by inputs, which the loss is yet to be made of."""
        record = use.owner()
        if record is None or self.inner:
            return False
        return record.running or record.aside == torch._C._current_graph_task_id()

    def unwanted(self, use: Use, name: str) -> bool:
        """Whether nobody reads the gradient of a tensor made of parameters, which a tap would compute for `.grad`."""
        if self.activations_only:
            return True
        if not self.heard or any(c.grad for c in self.hearing):
            return False
        return all(self.hearing[0]._wants(source.tensor) for source in use.sources.get(name, ()))

    def own(self, use: Use) -> bool:
        """Whether the pass is at `use` for its gradient, and none that a hook or a Function runs for its own ends."""
        if self.part or self.aimed:
            return True
        if self.probe is not None or self.sweep is not None or self.within:
            return False
        return any(will_accumulate(source.tensor) for group in use.sources.values() for source in group)


_KEY = "packext"
_get, _set = torch._C._get_obj_in_tls, torch._C._stash_obj_in_tls


def here() -> Here:
    """Of the thread that called `backward()`: autograd hands it on to its own threads, on which passes of CUDA run."""
    try:
        return _get(_KEY)
    except RuntimeError:
        state = Here()
        references = sys.getrefcount(state)
        _set(_KEY, state)
        if sys.getrefcount(state) == references:  # torch 2.9 gives back a reference that it has never taken
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(state))
        elif (thread := threading.current_thread()) is not threading.main_thread():
            _threads[state] = thread
        return state


#: Of which thread a state is, until torch lets go of it; but for the main one's.
_threads: weakref.WeakKeyDictionary[Here, threading.Thread] = weakref.WeakKeyDictionary()


@atexit.register
def _wait() -> None:
    """Let threads that have ended let go of their states, which torch does behind Python's back a moment later.

    It needs Python for that, and ends the process (SIGABRT) where Python has begun to shut down.
    """
    end = time.monotonic() + 1
    while time.monotonic() < end and not {*_threads.values()} <= {*threading.enumerate()}:
        time.sleep(1e-3)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.clear)  # the child has none of the threads


@contextmanager
def meanwhile(**changes: Any) -> Any:
    """In here these attributes of what the thread is in the middle of are others."""
    state = here()
    before = {name: getattr(state, name) for name in changes}
    vars(state).update(changes)
    try:
        yield
    finally:
        vars(state).update(before)


def compared() -> int | None:
    """The sample of which the probe compares gradients now, if it does."""
    probe = here().probe
    return None if probe is None else probe.compare


def task() -> int | None:
    """Which of asyncio's tasks runs, if one does: those of a loop share a thread, and so what goes on in it."""
    asyncio = sys.modules.get("asyncio")
    try:
        return None if asyncio is None else id(asyncio.current_task())
    except RuntimeError:  # no loop runs
        return None


class Retaining(TorchFunctionMode):
    """In here `loss.backward()` keeps the graph where a context that needs it hears the pass, unless told not to."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every function of torch."""
        kwargs = kwargs or {}
        if func is torch.Tensor.backward and kwargs.get("retain_graph") is None:
            state = here()  # a context within this one may hear the pass in its place, or nobody
            wanted = state.listening and any(context.retaining is not None for context in state.hearing)
            kwargs = {**kwargs, "retain_graph": wanted or None}
        return func(*args, **kwargs)


def opened(context: backpack) -> None:
    """A context is entered."""
    here().contexts.append(context)
    if context.retaining is not None:
        context.retaining.__enter__()
    _choose()


def closed(context: backpack) -> None:
    """A context is left."""
    if context.retaining is not None:
        context.retaining.__exit__(None, None, None)
    here().contexts.remove(context)
    _choose()


def _choose() -> None:
    state = here()
    innermost = [next((c for c in reversed(state.contexts) if c.overhear == over), None) for over in (False, True)]
    heard = tuple(c for c in innermost if c is not None and c.extensions)
    state.hearing = heard[:1] if heard and heard[0].per == "token" else heard  # whose rows are no samples'


def silence() -> AbstractContextManager[Any]:
    """Passes in here are nobody's business; taps are placed all the same, since what is checkpointed runs again."""
    return meanwhile(silent=True)
