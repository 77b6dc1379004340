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

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from packext import _flight
from packext._errors import PackextError
from packext._listening import here
from packext._record import Slope
from packext._refusals import Again, awaited, will_accumulate
from packext._use import TARGET, Rule, Use

if TYPE_CHECKING:
    from packext._record import Record


class OwnedRule(Rule):
    """A rule whose call the tap runs itself. Tensors are `input`, `weight` and maybe `bias`."""

    delivers = True

    def gradients(self, use: Use, t: dict[str, Tensor], g: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Gradients of the tensors named in `wanted`, in as few calls as torch has for them."""
        raise NotImplementedError

    def back(self, use: Use, t: dict[str, Tensor]) -> tuple[Callable[..., Any], dict[str, Any]] | None:
        """The input's gradient as a call of this rule on g and the weight.

        Returns:
            Its function and constants; None if it is no such call.
        """
        return None

    def pulled(
        self, use: Use, tensors: dict[str, Tensor], gs: Sequence[Tensor | None], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Gradients of the tensors in `names`: the function need not run again."""
        (g,) = gs
        assert g is not None
        return self.gradients(use, tensors, g, names)


class Tap(torch.autograd.Function):
    """A node of autograd's graph, put there without what torch does for transforms, within which there are no taps."""

    apply = torch._C._FunctionBase.__dict__["apply"]


def keep(ctx: Any, use: Use, tensors: Sequence[Tensor]) -> None:
    """Save the tensors of a use; those of which no value is needed may be changed and let go of, as in torch."""
    names, spared = use.names, {}
    for name in use.rule.spares(use):
        if name in names and (name in use.direct or name not in use.sources):  # a value made of them leads back to them
            spared[name] = tensors[names.index(name)].dtype
    if spared:
        tensors = [t for k, t in zip(names, tensors, strict=True) if k not in spared]
    ctx.use, ctx.spared = use, spared
    ctx.save_for_backward(*tensors)


def kept(ctx: Any) -> Sequence[Tensor]:
    """The tensors of a use again: those that were spared are the parameter itself, or zeros in its place."""
    use, saved, spared = ctx.use, ctx.saved_tensors, ctx.spared
    if not spared:
        return saved
    rest = iter(saved)
    return [
        next(rest) if k not in spared
        else use.sources[k][0].tensor if k in use.direct
        else saved[0].new_zeros((), dtype=spared[k]).expand(use.shapes[k])
        for k in use.names
    ]  # fmt: skip


class Owned(Tap):
    """Runs a call, and delivers the parameters' gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, use: Use, target: Tensor, *tensors: Tensor) -> Tensor:
        keep(ctx, use, tensors)
        ctx.set_materialize_grads(False)
        y = use.rule.call(use, dict(zip(use.names, tensors, strict=True)))
        # What torch calls a view (a product of matrices seen with more axes) could not be changed in place afterwards.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (g,) = grads
        use: Use = ctx.use
        if g is None:
            return (None, None, *(None for _ in use.names))
        saved = kept(ctx)
        names, rule, state = use.names, use.rule, here()
        t = dict(zip(names, saved, strict=True))
        assert isinstance(rule, OwnedRule)
        wanted = [name for name, needed in zip(names, ctx.needs_input_grad[2:], strict=True) if needed]
        if state.idle(use):
            grads_of = rule.gradients(use, t, g, wanted)
            return (None, None, *[grads_of.get(name) for name in names])
        if state.cuts(use):
            return (None, None, *[None] * len(saved))
        g = strayed(use, g)
        grads_of = {}
        if state.by_inputs(use):
            nodes = [node for node, _ in ctx.next_functions[1:]]
            wanted = [k for k, node in zip(names, nodes, strict=True) if node is not None and awaited(node)]
            inside(use)
            if torch.is_grad_enabled() and "input" in wanted:
                grads_of["input"] = further(use, t, g)
        elif not state.deaf:
            wanted = [name for name in wanted if name == "input" or not state.unwanted(use, name)]
            if wanted and state.exact:  # torch's own, of which quantities of the sum of rows can be made
                grads_of, wanted = rule.gradients(use, t, g, wanted), []
            delivered = _flight.arrive(use, saved, grads, grads_of)
            grads_of, wanted = {**delivered, **grads_of}, [name for name in wanted if name not in delivered]
        wanted = [name for name in wanted if name not in grads_of]
        if wanted:
            grads_of = {**grads_of, **rule.gradients(use, t, g, wanted)}
        return (None, None, *[grads_of.get(name) for name in names])


def further(use: Use, t: dict[str, Tensor], g: Tensor) -> Tensor:
    """The gradient of the input of `use`, where the loss is made of it: there its weight is used a second time.

    Args:
        use: of an owned call.
        t: what its tap kept, by name.
        g: gradient at the output.

    Returns:
        The gradient, through a tap of its own, so that derivatives of any order are uses like all others.
    """
    rule, record = use.rule, use.record
    assert isinstance(rule, OwnedRule)
    if "weight" in use.sources:
        found = rule.back(use, t)
        if found is None:
            unfollowed(use, f"the derivative of {use.describe()} is no call of a kind that packext follows")
        else:
            shapes: dict[str, tuple[int, ...]] = {"input": g.shape, "weight": t["weight"].shape}
            sources = {"weight": use.sources["weight"]}
            again = Use(rule, found[0], ("input", "weight"), found[1], sources, use.where, shapes, use.owner)
            again.direct, again.second, again.rooted = use.direct & {"weight"}, True, use.rooted
            y = Owned.apply(again, TARGET, g, t["weight"])
            again.placed(y.grad_fn, (y,))
            record.uses.append(again)
            return y.to(t["input"].dtype)
    return rule.gradients(use, t, g, ["input"])["input"]


def strayed(use: Use, g: Tensor) -> Tensor:
    """`g`, marked if it has a graph and came from within the model: of what is made of it, no sample is known."""
    if not torch.is_grad_enabled() or (record := use.owner()) is None or record.running or here().inner:
        return g
    return g if record.entered == torch._C._current_graph_task_id() else Again.on(g, record)


def inside(use: Use) -> None:
    """A pass that started while the forward pass went on is at `use`.

    Raises:
        PackextError: if a context listens, and the gradient of a parameter is accumulated.
    """
    record, graph = use.record, torch.is_grad_enabled()
    if not record.running:
        return
    record.inside |= graph
    if any(will_accumulate(source.tensor) for group in use.sources.values() for source in group):
        if graph:
            unfollowed(use, f"the gradient of parameters of {use.describe()} is computed inside of forward")
        elif not here().deaf:
            raise PackextError(use.bypassed())


def unfollowed(use: Use, why: str) -> None:
    """A derivative that a loss is made of, of which there will be no individual gradients."""
    sources = tuple(source for group in use.sources.values() for source in group)
    why = (
        f"{why}: of a loss that is made of derivatives of the model there are individual gradients where the "
        "parameters on their way belong to linear layers, convolutions, products (einsum, matmul, bmm), elementwise "
        "functions and, not checkpointed, normalisations and PReLU. Leave these parameters out (parameters=...), run "
        "the pass inside of `with px.disable():`, or take torch.func.vmap(torch.func.grad(loss of one sample), (None, "
        "0)) for it."
    )
    use.record.unfollowed.append((why, sources, use.record.running))


class Observed(Tap):
    """Hands on what it gets; sees the gradients at a call's outputs."""

    @staticmethod
    def forward(ctx: Any, use: Use, count: int, target: Tensor, *tensors: Tensor) -> Any:
        keep(ctx, use, tensors[count:])
        ctx.set_materialize_grads(False)
        return tuple([y.detach() for y in tensors[:count]])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        use: Use = ctx.use
        state = here()
        if state.idle(use):
            return (None, None, None, *grads, *[None] * len(use.names))
        if state.cuts(use):
            return (None, None, None, *[None] * (len(grads) + len(use.names)))
        if state.by_inputs(use):
            inside(use)
            data = [t for k, t in zip(use.names, kept(ctx), strict=True) if k not in use.sources]
            if torch.is_grad_enabled() and any(t.requires_grad for t in data):
                unfollowed(use, f"{use.describe()} is differentiated twice, and packext does not follow its derivative")
        elif not state.deaf and any(g is not None for g in grads):
            _flight.arrive(use, kept(ctx), grads)
        grads = tuple(None if g is None else strayed(use, g) for g in grads)
        return (None, None, None, *grads, *[None] * len(use.names))


class Argument(Tap):
    """Broadcasts a parameter to the shape in which it meets the data."""

    @staticmethod
    def forward(ctx: Any, use: Use, target: Tensor, value: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
        keep(ctx, use, (value,))
        ctx.set_materialize_grads(False)
        return value.detach().to(dtype).expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (g,), state = grads, here()
        if g is None or state.cuts(ctx.use):
            return None, None, None, None, None
        saved = kept(ctx)
        if state.by_inputs(ctx.use):
            inside(ctx.use)
        elif not state.deaf:
            _flight.arrive(ctx.use, saved, grads)
            if g.shape == saved[0].shape:
                g = g.clone()  # what has arrived may be held, and `.grad` be written to
        return None, None, g.sum_to_size(saved[0].shape).to(saved[0].dtype), None, None


def slope(owner: Callable[[], Record | None], input: Callable[[], Tensor | None], g: Tensor | None) -> Tensor | None:
    """Hook of an input: the derivative with respect to it, where the loss is made of it, is an output of the model."""
    record = owner()
    if record is None or g is None or not g.requires_grad or record.aside != torch._C._current_graph_task_id():
        return None
    x = input() if record.by_use else None
    record.slopes[len(record.gates)] = None if x is None else Slope(get_gradient_edge(x), record.below())
    return gate(record, g)


def gate(record: Record, y: Tensor) -> Tensor:
    """`y`, an output of the model, behind a gate."""
    gated: Any = Gate.apply(record, y)
    gated.grad_fn.register_hook(functools.partial(Again.watch, record))
    _flight.may_retain(gated)
    record.gates.append((weakref.ref(gated.grad_fn), y.shape, y.dtype, y.device))
    return gated


class Gate(Tap):
    """Sits on an output of the model: here a backward pass enters it."""

    @staticmethod
    def forward(ctx: Any, record: Any, y: Tensor) -> Tensor:
        ctx.record = record
        ctx.set_materialize_grads(False)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if grads[0] is not None:
            _flight.enter(ctx.record, grads[0])
            _flight.compare(ctx, grads[0])
        return None, grads[0]
