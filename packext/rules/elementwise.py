"""Elementwise calls, concatenation and assignment: the parameter is tapped where it meets the data.

It is broadcast to the shape of the data first (a view, without memory), so that autograd's own
backward of the call yields the gradient before it is summed over samples.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packext._factored import Dense, Factored, Masked, accumulation_dtype
from packext._layout import Layout
from packext._use import Gradients, Layouts, Rule, Use
from packext.rules._common import bind, handles, writes_in_place

if TYPE_CHECKING:
    from packext._lineage import Tracer


class ArgumentRule(Rule):
    """A value broadcast to the shape of g: rows are g, summed over the axes that were stretched."""

    name = "elementwise"
    positionwise = True

    def spares(self, use: Use) -> tuple[str, ...]:
        return ("value",)

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Tensor:
        return tensors["value"].expand(use.outputs[0])

    def factors(self, use: Use, t: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored] | None:
        arrived, layout, value = gs[0], layouts[0], t["value"]
        assert arrived is not None and layout is not None
        g = arrived.to(accumulation_dtype(arrived.dtype))
        missing = g.dim() - value.dim()
        extent = [1] * missing + list(value.shape)
        own = layout.occupied(g)
        if not own:
            return {"value": Dense(g.sum_to_size(value.shape)[None], entrywise=True, g=arrived)}
        if any(extent[axis] != 1 for axis in own):
            # The value has entries along the samples' axis: each belongs to one sample.
            rows = lambda i: layout.only(g, i).sum_to_size(value.shape)  # noqa: E731

            def apart() -> tuple[Tensor, Tensor]:
                samples = torch.arange(layout.n, device=g.device)
                return g.sum_to_size(value.shape), layout.at(own[0] - missing).spread(samples, value).expand_as(value)

            return {"value": Masked(layout.n, value, rows, apart if type(layout) is Layout else None)}
        first, gained = layout._sample_first(g)
        rest = [size for axis, size in enumerate(extent) if axis not in own]
        if gained:
            # (N, m) or (m, N): the m is left where the axis was, and stretched as it was.
            rest.insert(own[0], 1)
        stretched = [axis + 1 for axis, size in enumerate(rest) if size == 1 and first.shape[axis + 1] != 1]
        rows_ = first.sum(stretched) if stretched else first
        return {"value": Dense(rows_.reshape(layout.n, *value.shape), entrywise=True, g=arrived)}


ARGUMENT = ArgumentRule()

_NAMES = (
    "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "pow", "float_power",
    "where", "maximum", "minimum", "fmax", "fmin", "atan2", "lerp", "addcmul", "addcdiv", "clamp", "clip", "hypot",
    "logaddexp", "logaddexp2", "copysign", "remainder", "fmod", "xlogy",
)  # fmt: skip
_OPERATORS = ("add", "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "rtruediv", "itruediv",
              "div", "rdiv", "idiv", "pow", "rpow", "ipow", "mod")  # fmt: skip
_FUNCTIONS = [
    *(getattr(torch, name, None) for name in _NAMES),
    *(getattr(Tensor, name, None) for name in _NAMES),
    *(getattr(Tensor, f"{name}_", None) for name in _NAMES),
    Tensor.copy_,
    *(getattr(Tensor, f"__{name}__", None) for name in _OPERATORS),
]


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    return [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]


@handles(*_FUNCTIONS)
def elementwise(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """Broadcasting elementwise functions."""
    if func is Tensor.copy_ and tracer.sources(args[0]):
        raise _written_over(tracer, func)
    if writes_in_place(func, kwargs) and tracer.sources(args[0]):
        raise tracer.refuse(
            func,
            "data is written into a value made of parameters, in place",
            "Use the out-of-place form.",
        )
    operands = _tensors(args, kwargs)
    shape = torch.broadcast_shapes(*(t.shape for t in operands))
    # Tensors without axes do not take part in type promotion; once broadcast they would.
    wide = [t.dtype for t in operands if t.dim() and (t.is_floating_point() or t.is_complex())]
    promoted = functools.reduce(torch.promote_types, wide) if wide else None

    def tapped(t: Any) -> Any:
        if not isinstance(t, Tensor) or not tracer.sources(t):
            return t
        dtype = t.dtype
        if t.dim() == 0 and promoted is not None and t.is_floating_point():
            dtype = promoted.to_real()  # a real one is not made complex
        return tracer.argument(t, shape, dtype, func)

    return func(*(tapped(a) for a in args), **{k: tapped(v) for k, v in kwargs.items()})


@handles(
    torch.cat,
    torch.concat,
    torch.concatenate,
    torch.stack,
    torch.hstack,
    torch.vstack,
    torch.dstack,
)
def joined(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """Concatenation: an entry made of parameters has the samples' axis already."""
    if not args or not isinstance(args[0], (list, tuple)):
        return NotImplemented
    parts = [tracer.argument(t, t.shape, t.dtype, func) if tracer.sources(t) else t for t in args[0]]
    return func(parts, *args[1:], **kwargs)


@handles(Tensor.__setitem__)
def assigned(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`data[index] = value`."""
    target, index, value = args
    if tracer.sources(target) and isinstance(value, Tensor) and tracer.is_data(value):
        raise _written_over(tracer, func)
    if tracer.sources(target) or not isinstance(value, Tensor):
        return NotImplemented
    shape = target.detach()[index].shape
    more = max(0, value.dim() - len(shape))
    if more and value.shape[:more].numel() == 1:  # leading axes of one entry, which torch leaves out
        with tracer:
            value = value.reshape(value.shape[more:])
    masks = isinstance(index, Tensor) and index.dtype == torch.bool
    # A value that reaches only axes behind the masked ones may as well be as large as the target.
    if masks and value.dim() <= target.dim() - index.dim():
        return func(target, index, tracer.argument(value, target.shape, value.dtype, func)[index])
    return func(target, index, tracer.argument(value, shape, value.dtype, func))


def _written_over(tracer: Tracer, func: Any) -> Exception:
    return tracer.refuse(
        func,
        "data is written into a tensor that is made of parameters so far, in place",
        "Write the data first, and the parameters over them, or use a form out of place (torch.cat, torch.where).",
    )


@handles(Tensor.masked_fill, torch.masked_fill)
def filled(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`masked_fill` with a scalar made of parameters."""
    if len(args) != 3 or kwargs or not isinstance(args[2], Tensor) or tracer.sources(args[0]):
        return NotImplemented
    x, mask, value = args
    shape = torch.broadcast_shapes(x.shape, mask.shape)
    return torch.where(mask, tracer.argument(value, shape, x.dtype, func), x)


@handles(F.scaled_dot_product_attention)
def attention(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """Learned queries, keys, values or biases, broadcast over the batch axes of the others."""
    operands, rest = bind(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, kwargs)
    own = 3 if rest.get("enable_gqa") else 2  # then queries have more heads than keys
    batch = torch.broadcast_shapes(*(t.shape[:-own] for t in operands.values()))
    for name, t in operands.items():
        if tracer.sources(t):
            shape = (*batch, *[1] * (own - t.dim()), *t.shape[-own:])
            operands[name] = tracer.argument(t, shape, t.dtype, func)
    return func(**operands, **rest)
