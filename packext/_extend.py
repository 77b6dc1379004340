"""`extend` and `unextend`: the hooks that start and stop the tracer."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from packext import _checkpointing, _compiler, _listening
from packext._again import on_copies, runs_again
from packext._calls import saved_tensor_hooks, taken_over
from packext._lineage import LOCAL, MARK, Tracer
from packext._record import Record
from packext._scale import LossMark, is_loss

M = TypeVar("M", bound=nn.Module)

#: How many structures of one model are remembered.
PLANS = 64


def _none() -> None:
    """There was no pass, or it is gone."""


@dataclass
class Shared:
    """What the modules of one extended model share: its batch axis, layouts found by the probe, and the last pass.

    `whole` gives the module that was extended: parts of it may run by themselves, where a method calls them. `apart`
    tells that its graph does not take several columns of a root at once.
    """

    batch_axis: int | None
    plans: dict[Any, Any] = field(default_factory=dict)
    flight: Callable[[], Any] = _none
    whole: Callable[[], Any] = _none
    apart: bool = False

    def remember(self, key: Any, plan: Any) -> None:
        """Keep a plan, dropping the oldest beyond `PLANS`."""
        while len(self.plans) >= PLANS:
            self.plans.pop(next(iter(self.plans)))
        self.plans[key] = plan

    def __getstate__(self) -> dict[str, Any]:
        return {"batch_axis": self.batch_axis, "plans": {}, "flight": _none, "whole": _none}

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        copied = Shared(self.batch_axis)
        if (whole := memo.get(id(self.whole()))) is not None:  # the copy of it that is being made
            copied.whole = weakref.ref(whole)
        return copied


@dataclass
class Extension:
    """What `extend` leaves on a module: its path in the extended model, and what all of them share."""

    path: str
    shared: Shared

    @property
    def batch_axis(self) -> int | None:
        """The axis of the samples in the model's inputs and outputs; None if the inputs have none."""
        return self.shared.batch_axis


def extend(module: M, batch_axis: int | None = 0, *, debug: bool = False, use_converter: bool = False) -> M:
    """Make a model or loss module report its per-sample quantities to `backpack`.

    Args:
        module: the model, or the loss: a module with an attribute `reduction`, which tells mean from sum, and without
            parameters. Changed in place: it gets hooks on its submodules and nothing else; parameters, buffers and
            `state_dict` stay. May be compiled (`torch.compile`): it runs as compiled outside of contexts, and as it was
            written inside.
        batch_axis: the axis of the samples in the model's inputs and outputs. None where the inputs have none, as the
            nodes and edges of a batch of graphs: then samples are along axis 0 of the outputs, and each row inside of
            the model belongs to the one sample whose output uses it. A row that several use is an error.
        debug: accepted for code written for BackPACK; has no effect.
        use_converter: accepted for code written for BackPACK; no conversion is needed here.

    Returns:
        The same module.

    Raises:
        TypeError: if `module` is not an `nn.Module`, or TorchScript.
        ValueError: if `batch_axis` is not an int of 0 or more, or None.
    """
    if not isinstance(module, nn.Module):
        what = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
        raise TypeError(
            f"extend expects an nn.Module instance, got {what}. Functions need no extend, but for losses: take the "
            "module, such as nn.CrossEntropyLoss(), or call the function in the forward of the model."
        )
    if batch_axis is not None and (type(batch_axis) is not int or batch_axis < 0):
        raise ValueError(f"batch_axis must be an int of 0 or more, or None, got {batch_axis!r}.")
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"extend got TorchScript ({type(module).__name__}), which runs where packext sees nothing. Extend the "
            "module as it was written."
        )
    unextend(module)
    root = _compiler.original(module)
    shared = Shared(batch_axis, whole=weakref.ref(root))
    for path, m in root.named_modules():
        if isinstance(m, torch.jit.ScriptModule):
            continue  # it takes no hooks; what it does with parameters is refused when their gradient is asked for
        m.__dict__["_packext"] = Extension(path, shared)
        if m is not root and _meets_no_parameter(m):
            continue
        m.register_forward_pre_hook(_before, with_kwargs=True)
        m.register_forward_hook(_after, with_kwargs=True, always_call=True)
    return module


def _meets_no_parameter(module: nn.Module) -> bool:
    """Whether a module is one of torch's without parameters, state or parts, such as an activation: no use is in it."""
    own = type(module).__module__.startswith("torch.nn.modules")
    return own and not (module._parameters or module._buffers or module._modules or is_loss(module))


def unextend(module: M) -> M:
    """Take back what `extend` did. Quantities already computed stay where they are.

    Args:
        module: a model or loss module; need not be extended.

    Returns:
        The same module.

    Raises:
        TypeError: if `module` is not an `nn.Module`.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"unextend expects an nn.Module instance, got a {type(module).__name__}.")
    for m in module.modules():
        m.__dict__.pop("_packext", None)
        for buffer in m._buffers.values():
            if buffer is not None:  # a forward pass may have written to it
                vars(buffer).pop(MARK, None)
        for hooks, ours in ((m._forward_pre_hooks, _before), (m._forward_hooks, _after)):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                for extra in (
                    m._forward_pre_hooks_with_kwargs,
                    m._forward_hooks_with_kwargs,
                    m._forward_hooks_always_called,
                ):
                    extra.pop(key, None)
    return module


def is_extended(module: nn.Module) -> bool:
    """Whether `module` is, or is part of, an extended model or loss; may be compiled."""
    return "_packext" in _compiler.original(module).__dict__


def _out_of_reach() -> bool:
    """Whether something else has taken over differentiation, so that taps would be in its way."""
    return LOCAL.disabled or taken_over() or torch._C._is_tracing()


def _before(module: nn.Module, args: Any, kwargs: Any = None) -> None:
    if torch.compiler.is_compiling():
        return  # nothing of this becomes a part of compiled code, nor a condition for it
    extension: Extension | None = module.__dict__.get("_packext")
    if extension is None:
        return  # the hook was copied to another module, as torch.ao does where it puts a quantised one in the place
    if LOCAL.call is not None and (not extension.path or module is LOCAL.call[0]):
        end_interrupted()
    if is_loss(module) and (LOCAL.loss is None or _left(LOCAL.loss[1])):
        LOCAL.loss = module, sys._getframe(1)
    tracer = LOCAL.tracer
    if tracer is None:
        if LOCAL.unseen is not None or LOCAL.disabled or not torch.is_grad_enabled() or is_loss(module):
            return
        if (sweep := _listening.here().sweep) is not None:  # what a pass runs again, checkpointed or in a Function
            sweep.missed = True
        if _out_of_reach():
            return
        record = Record(module, extension)
        heard = bool(_listening.here().contexts)
        restore = None if not heard and _compiler.compiled(record) else _compiler.eager()
        LOCAL.call = module, sys._getframe(1)
        if restore is None:
            LOCAL.unseen = module  # taps would have its parts run uncompiled, for nobody
            return
        tracer = Tracer(record)
        if _listening.here().inner and runs_again(saved_tensor_hooks()):
            tracer.restore.append(on_copies(record.modules()))
        tracer.push(module)
        tracer.begin(args, kwargs)
        LOCAL.tracer = tracer
        tracer.restore.append(restore)
        if heard:
            tracer.heard = True
            tracer.restore.append(_checkpointing.lead())
        tracer.__enter__()
        return
    tracer.push(module, args, kwargs)


def _left(frame: Any) -> bool:
    """Whether the outermost call is over and no hook was told, as torch runs none after KeyboardInterrupt."""
    try:
        frame.clear()
    except RuntimeError:  # Python's answer as long as the frame runs
        return False
    return True


def end_interrupted() -> None:
    """End the forward pass that this thread is in, if nobody has ended it."""
    if LOCAL.call is not None and _left(LOCAL.call[1]):
        _end()


def _end() -> None:
    """The forward pass is over."""
    tracer = LOCAL.tracer
    LOCAL.tracer = LOCAL.unseen = LOCAL.call = None
    if tracer is not None:
        tracer.__exit__(None, None, None)
        for restore in tracer.restore:
            restore()


def _after(module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> Any:
    if torch.compiler.is_compiling():
        return None
    if LOCAL.unseen is module:
        _end()
    tracer = LOCAL.tracer
    record = tracer.record if tracer is not None else None
    replaced = None
    if tracer is not None and tracer.stack and tracer.stack[-1] is module:
        tracer.pop()
        if not tracer.stack:
            _end()
            replaced = tracer.finish(output)
    if LOCAL.loss is not None and LOCAL.loss[0] is module:  # one that another loss calls is a part of it
        LOCAL.loss = None
        if isinstance(output, Tensor) and output.requires_grad and not _out_of_reach():
            replaced = LossMark.mark(module, output, args, kwargs, record)
    return replaced
