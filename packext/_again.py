"""What is checkpointed runs again in the backward pass, module by module, and has to get the same taps there.

Which these are depends on what is behind the tensors that it reads, of which the forward pass around it knew. For each
call of activation checkpointing torch makes an object, which is found both times.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from packext._use import Source

#: What is behind a tensor, as a mark has it, and the value that it is an expanded view of.
Behind = tuple["tuple[Source, ...] | None", "Tensor | None"]


@dataclass
class Before:
    """What a forward pass knew where a checkpointed part ran.

    Attributes:
        token: of the forward pass.
        table: parameters that it knew, by their ids.
        inputs: of the model.
        calls: of each module that the part calls itself, in order: what is behind the tensors in its arguments.
        at: the pass in which it has last run again, and how many of these calls it has made.
    """

    token: int
    table: dict[int, tuple[Source, Tensor]]
    inputs: Sequence[TensorWeakRef]
    calls: list[list[Behind]] = field(default_factory=list)
    at: tuple[Any, int] = (None, 0)

    def next(self, task: Any) -> list[Behind]:
        """Of the next call in the pass `task`; nothing, if there were fewer in the forward pass."""
        count = self.at[1] if self.at[0] == task else 0
        self.at = task, count + 1
        return self.calls[count] if count < len(self.calls) else []


_BEFORE: weakref.WeakKeyDictionary[Any, Before] = weakref.WeakKeyDictionary()


def _part(hooks: Any) -> tuple[Any, Any]:
    """The part that tensors are packed for, and the pass in which it runs again: the function closes over both.

    Returns:
        These. Libraries that have copied torch's checkpointing may have neither: then there is nothing to go by.
    """
    function = inspect.unwrap(hooks)
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    held = dict(zip(names, [cell.cell_contents for cell in cells], strict=True))
    part = held["target_frame_ref"]() if "target_frame_ref" in held else held.get("frame")
    return part, held.get("gid", torch._C._current_graph_task_id())


def note(hooks: Any, token: int, table: dict[int, tuple[Source, Tensor]], inputs: Sequence[Tensor]) -> Before:
    """A module is called by a part that is checkpointed with `hooks`; what is kept for when it runs again."""
    part, _ = _part(hooks)
    before = _BEFORE.get(part) if part is not None else None
    if before is None:
        before = Before(token, table, [TensorWeakRef(t) for t in inputs])
        if part is not None:
            _BEFORE[part] = before
    return before


def recall(hooks: Any) -> tuple[Before, list[Behind]] | None:
    """What was kept, and what is behind the arguments of the call that a part makes which runs again, if one does."""
    part, task = _part(hooks) if runs_again(hooks) else (None, None)
    before = None if part is None else _BEFORE.get(part)
    return None if before is None else (before, before.next(task))


def on_copies(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Have modules run on copies of their buffers, for a pass of packext's own: what they write is no part of training.

    Returns:
        What gives them their buffers back.
    """
    before = [(module._buffers, name, t) for module in modules for name, t in module._buffers.items() if t is not None]
    copies = {id(t): t.detach().clone() for _, _, t in before}
    for buffers, name, t in before:
        buffers[name] = copies[id(t)]
        vars(buffers[name]).update(vars(t))  # what is known of it

    def back() -> None:
        for buffers, name, t in before:
            buffers[name] = t

    return back


def checkpoints(hooks: Any) -> bool:
    """Whether a function that packs saved tensors is that of activation checkpointing, in the forward pass."""
    return "_checkpoint_hook" in getattr(hooks, "__qualname__", "")


def runs_again(hooks: Any) -> bool:
    """The same when what is checkpointed runs again."""
    return "_recomputation_hook" in getattr(hooks, "__qualname__", "")
