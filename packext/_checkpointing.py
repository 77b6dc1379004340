"""Reentrant activation checkpointing, whose backward runs a part of the model again, as a pass of its own.

No cotangent of packext's gets into that pass, and what is used there is not known before it. So a call of it that an
extended model makes inside of a context is one of torch's other kind, which leaves a graph, and gives what it would
have given. Outside of contexts nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from packext._calls import taken_over
from packext._lineage import LOCAL
from packext._switch import Switch


def _turn() -> Any:
    before = vars(CheckpointFunction).get("apply")  # what somebody else has put there
    CheckpointFunction.apply = classmethod(_apply)  # pyright: ignore[reportAttributeAccessIssue]
    return before


def _back(before: Any) -> None:
    if before is None:
        del CheckpointFunction.apply
    else:
        CheckpointFunction.apply = before


#: In there, `CheckpointFunction.apply` is led here, of which torch has one for all forward passes.
_LED = Switch(_turn, _back)


def _otherwise(cls: Any) -> Any:
    """What `cls.apply` is without packext."""
    torchs: Any = super(CheckpointFunction, cls)
    return torchs.apply if _LED.before is None else _LED.before.__get__(None, cls)


def lead() -> Callable[[], None]:
    """From now on, reentrant checkpointing in the forward pass that this thread begins is of the other kind.

    Returns:
        What ends that, to be called once.
    """
    _LED.__enter__()
    return _LED.__exit__


def _apply(cls: Any, *args: Any) -> Any:
    """What `CheckpointFunction.apply(function, preserve_rng_state, *args)` does meanwhile, in whatever thread."""
    tracer = LOCAL.tracer
    if cls is not CheckpointFunction or tracer is None or not tracer.heard or not _has_graph(args):
        return _otherwise(cls)(*args)
    function, preserve, *given = args
    # It runs the whole part again, as what is written to buffers, or counted, should be written and counted again.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": preserve, "early_stop": False}
    out = tracer.apart(lambda: checkpoint(function, *given, **options))
    return tuple(map(_joined, out)) if isinstance(out, tuple) else _joined(out)


def _has_graph(args: Any) -> bool:
    """Whether torch would give what is returned a graph: that is, if an argument requires grad that is a tensor."""
    if not torch.is_grad_enabled() or taken_over():
        return False
    return any(isinstance(t, Tensor) and t.requires_grad for t in args)


def _joined(t: Any) -> Any:
    """All numbers that such a call returns require grad, even where that is zero: another call may be given these."""
    if not isinstance(t, Tensor) or t.requires_grad or not (t.is_floating_point() or t.is_complex()):
        return t
    return t.detach().requires_grad_()
