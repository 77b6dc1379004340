"""What optimizers and controllers ask of the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

import packext as px


@runtime_checkable
class Emitting(Protocol):
    """An optimizer or controller that reads more than the gradient.

    It may have a method `options`, too, which gives keyword arguments of `px.backpack` for its passes; `emit` refuses
    others in their place.
    """

    def quantities(self) -> Sequence[Any]:
        """What the next backward pass has to emit for the next step; nothing, if the step needs none."""
        ...


@contextmanager
def emit(*emitting: Emitting | torch.optim.Optimizer, **options: Any) -> Iterator[px.Results]:
    """Have the backward passes inside emit what an optimizer, or controllers, need for their next step.

    `with px.optim.emit(optimizer): loss_fn(model(x), y).backward()`, then `optimizer.step()` as ever. Model and loss
    are extended (`px.extend`). What is needed is asked of the optimizer when the context is entered, so that it is
    entered anew for each step. Contexts nest, and the innermost one hears a pass: where one pass is for several, give
    them all to one context, `px.optim.emit(optimizer, controller)`; what they have in common is computed once. The
    context of a monitor (`px.diagnostics.Cockpit`) around this one shares its passes.

    Results become attributes of the parameters, which the optimizer reads. A `px.optim.Optimizer` is handed them at the
    end of each backward pass instead, leaves nothing on the parameters, and asks for those of its own groups alone: so
    several passes before a step add up, as `.grad` does. A controller is handed them as well, and takes one pass a step
    (or those of one context with `accumulate=True`).

    Args:
        *emitting: each with a method `quantities`, or around such a one, in `.optimizer`, as accelerate's are. Of
            several, all are optimizers or controllers of `px.optim`. Controllers' statistics are then of the
            optimizers' parameters.
        **options: of `px.backpack`, such as `scale`, beside those that the optimizer asks for itself. An optimizer and
            a controller together take none, as they read them differently.

    Yields:
        The results, as `px.backpack` does.

    Raises:
        UnsupportedUseError: where a parameter has no such quantity.
        PackextError: if all passes within went to a context within.
        ValueError: for several that cannot share one pass, an option that the optimizer chooses itself, or an optimizer
            that reads gradients alone.
    """
    if not emitting:
        raise ValueError("px.optim.emit() needs an optimizer or a controller.")
    for e in emitting:
        if isinstance(e, type):
            raise ValueError(f"px.optim.emit() needs an optimizer or a controller, got the class {e.__name__}.")
        if hasattr(e, "savefield"):
            raise ValueError(f"px.optim.emit() needs an optimizer or a controller. For {e!r} write px.backpack({e!r}).")
    found = [_innermost(e) for e in emitting]
    with ExitStack() as stack:
        if len(found) == 1:
            optimizer: Any = found[0]
            own = getattr(optimizer, "options", dict)()
            taken = [name for name in options if name in own]
            if taken:
                raise ValueError(
                    f"px.optim.emit({type(optimizer).__name__}, {taken[0]}=...): the optimizer chooses that itself."
                )
            own = {**own, **options}
            receiving = getattr(optimizer, "receiving", None)
            own = stack.enter_context(nullcontext(own) if receiving is None else receiving(own))
            asked = list(optimizer.quantities())
        else:
            own, asked = _together(stack, found, options)
        names = ", ".join(type(e).__name__ for e in found)
        hook, heard = own.get("pass_hook"), False
        if hook is not None:

            def hear(results: px.Results) -> None:
                nonlocal heard
                heard = True
                hook(results)

            own["pass_hook"] = hear
        try:
            context = px.backpack(*asked, **own)
        except ValueError as error:  # which names what they ask for, and that is not what was typed
            raise ValueError(f"px.optim.emit({names}): {error}") from error
        try:
            with context as results:
                yield results
            if asked and hook is not None and not heard:  # else there was none at all, and backpack has said so
                raise px.PackextError(
                    f"px.optim.emit({names}): all passes within went to another context within, as the innermost one "
                    "hears a pass. Give one context all that read the pass, px.optim.emit(one, other), or have a pass "
                    "for each. A monitor's context belongs around this one."
                )
        except px.UnsupportedUseError as error:
            optimizer = next((e for e in found if hasattr(e, "preconditioned")), None)
            if any(hasattr(p, "device_mesh") for p in own.get("parameters") or ()):
                said = px.UnsupportedUseError(
                    f"{names}: parameters that are DTensors, as FSDP2 makes them, are not supported. Take "
                    f"DistributedDataParallel. (The backward pass says: {error})"
                )
            elif optimizer is None:
                raise
            else:
                said = px.UnsupportedUseError(
                    f"{error} With {type(optimizer).__name__}: put such parameters into a group of their own, "
                    '{"params": [...], "fallback": True, "lr": ...}, which AdamW trains.'
                )
            said.quantities = error.quantities  # which a monitor around this may not have asked for
            raise said from error


def _innermost(emitting: Any) -> Emitting:
    """What emits, of one that may be around it."""
    found = emitting
    while not isinstance(found, Emitting):
        inner = getattr(found, "optimizer", None)
        if inner is None:
            raise ValueError(
                f"px.optim.emit({type(found).__name__}): it asks nothing of the backward pass but the gradient. Leave "
                "emit out, or give it an optimizer or a controller of px.optim."
            )
        found = inner
    return found


def _together(
    stack: ExitStack, emitting: Sequence[Emitting], options: dict[str, Any]
) -> tuple[dict[str, Any], list[Any]]:
    """Options and quantities of one pass for several."""
    names = ", ".join(type(e).__name__ for e in emitting)
    for e in emitting:
        if not hasattr(e, "receiving") or hasattr(e, "options"):
            raise ValueError(
                f"px.optim.emit({names}): {type(e).__name__} takes a pass of its own; use one context for it alone."
            )
        if hasattr(e, "preconditioned") and options:
            raise ValueError(
                f"px.optim.emit({names}, {next(iter(options))}=...): optimizers and controllers read options of the "
                "pass differently. Leave it out, or have a pass for each."
            )
    hooks: list[Callable[[px.Results], Any]] = []
    own, asked = dict(options), dict[str, Any]()
    parameters: list[Tensor] | None = None
    for e in emitting:
        found = stack.enter_context(getattr(e, "receiving")(dict(options)))  # noqa: B009 - not of the protocol
        hooks.append(found.pop("pass_hook"))
        mine = found.pop("parameters", None)
        if mine is not None and "parameters" not in options:
            groups = [p for g in getattr(e, "param_groups", ()) for p in g["params"] if p.requires_grad]
            if len(mine) < len(groups) or (parameters is not None and {*map(id, mine)} != {*map(id, parameters)}):
                raise ValueError(
                    f"px.optim.emit({names}): not all are for the same parameters ({type(e).__name__} leaves out some, "
                    "as those of a group with fallback=True). Have a pass for each."
                )
            parameters = mine
        own |= found
        for quantity in e.quantities():
            held = asked.setdefault(quantity.savefield, quantity)
            if _key(held) != _key(quantity):
                raise ValueError(
                    f"px.optim.emit({names}): two of them ask for {quantity.savefield} in different ways. Have a pass "
                    "for each."
                )
    if parameters is not None:
        own["parameters"] = parameters

    def hear(results: px.Results) -> None:
        for hook in hooks:
            hook(results)

    return {**own, "pass_hook": hear}, list(asked.values())


def _key(quantity: Any) -> Any:
    plain = (bool, int, float, str, tuple, type(None))
    return type(quantity), {k: v if isinstance(v, plain) else id(v) for k, v in vars(quantity).items()}
