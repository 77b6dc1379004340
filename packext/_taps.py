"""Taps: autograd nodes that see the pair (a, g) of a use on its way through the backward pass.

Three kinds, by who computes `.grad`:

    Owned     runs the call itself (linear, convolution): its backward computes the input's gradient,
              and the parameter's either as torch would or from the tiles that a quantity needs anyway
    Observed  sits on the output of a call that autograd differentiates as always
    Argument  sits on a parameter, broadcast to the shape in which it meets the data (elementwise
              calls, cat, assignment), so that the gradient arrives there before it is summed

All of them take one shared scalar as an input that requires grad: a backward pass whose only
target is that scalar visits every tap and computes no parameter's gradient.
What a tap keeps goes through `save_for_backward`, so that checkpointing and offloading see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from packext import _flight
from packext._use import TARGET as TARGET
from packext._use import Rule, Use

if TYPE_CHECKING:
    from packext._record import Record


class OwnedRule(Rule):
    """A rule whose call the tap runs itself. Tensors are `input`, `weight` and maybe `bias`."""

    delivers = True

    def gradients(self, use: Use, t: dict[str, Tensor], g: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Gradients of the tensors named in `wanted`, in as few calls as torch has for them."""
        raise NotImplementedError

    def pulled(
        self, use: Use, tensors: dict[str, Tensor], gs: Sequence[Tensor | None], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Gradients of the tensors in `names`: the function need not run again."""
        (g,) = gs
        assert g is not None
        return self.gradients(use, tensors, g, names)


class Owned(torch.autograd.Function):
    """Runs a call, and delivers the parameters' gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, use: Use, target: Tensor, *tensors: Tensor) -> Tensor:
        ctx.use = use
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        y = use.rule.call(use, dict(zip(use.names, tensors, strict=True)))
        # What torch calls a view (a product of matrices seen with more axes) could not be changed in place afterwards.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (g,) = grads
        use: Use = ctx.use
        saved = ctx.saved_tensors
        if g is None:
            return (None, None, *(None for _ in saved))
        t = dict(zip(use.names, saved, strict=True))
        rule = use.rule
        assert isinstance(rule, OwnedRule)
        wanted = [name for name, needed in zip(use.names, ctx.needs_input_grad[2:], strict=True) if needed]
        grads_of: dict[str, Tensor] = {}
        if not _flight.deaf():
            wanted = [name for name in wanted if name == "input" or not _flight.unwanted(use, name)]
            if wanted and _flight.exact():  # torch's own, of which quantities of the sum of rows can be made
                grads_of, wanted = rule.gradients(use, t, g, wanted), []
            delivered = _flight.arrive(use, saved, grads, grads_of)
            grads_of, wanted = {**delivered, **grads_of}, [name for name in wanted if name not in delivered]
        if wanted:
            grads_of = {**grads_of, **rule.gradients(use, t, g, wanted)}
        return (None, None, *[grads_of.get(name) for name in use.names])


class Observed(torch.autograd.Function):
    """Hands on what it gets; sees the gradients at a call's outputs."""

    @staticmethod
    def forward(ctx: Any, use: Use, count: int, target: Tensor, *tensors: Tensor) -> Any:
        ctx.use, ctx.kept = use, len(tensors) - count
        ctx.save_for_backward(*tensors[count:])
        ctx.set_materialize_grads(False)
        return tuple(y.detach() for y in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if not _flight.deaf() and any(g is not None for g in grads):
            _flight.arrive(ctx.use, ctx.saved_tensors, grads)
        return (None, None, None, *grads, *(None for _ in range(ctx.kept)))


class Argument(torch.autograd.Function):
    """Broadcasts a parameter to the shape in which it meets the data."""

    @staticmethod
    def forward(ctx: Any, use: Use, target: Tensor, value: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
        ctx.use = use
        ctx.save_for_backward(value)
        ctx.set_materialize_grads(False)
        return value.detach().to(dtype).expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (g,) = grads
        if g is None:
            return None, None, None, None, None
        saved = ctx.saved_tensors
        if not _flight.deaf():
            _flight.arrive(ctx.use, saved, grads)
        return None, None, g.sum_to_size(saved[0].shape).to(saved[0].dtype), None, None


class Gate(torch.autograd.Function):
    """Sits on an output of the model: here a backward pass enters it."""

    @staticmethod
    def forward(ctx: Any, record: Any, y: Tensor) -> Tensor:
        ctx.record = record
        ctx.set_materialize_grads(False)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if grads[0] is not None:
            _flight.enter(ctx.record)
            _flight.compare(ctx, grads[0])
        return None, grads[0]


def origins(t: Tensor, record: Record) -> tuple[list[Tensor], bool]:
    """Leaves from which autograd has computed `t`, and whether a tap of `record` is on the way: there it ends."""
    leaves, seen, open_ = [], set(), [t.grad_fn]
    while open_:
        node = open_.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        use = getattr(node, "use", None)
        if isinstance(use, Use) and use.owner() is record:
            return [], True
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        open_.extend(child for child, _ in node.next_functions)
    return leaves, False
