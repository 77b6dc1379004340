"""Convolutions in one to three dimensions, and their transposes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packext._factored import Dense, Factored, Outer, Patches, Terms, accumulation_dtype
from packext._factored.windows import Window
from packext._layout import Tokens
from packext._taps import OwnedRule
from packext._use import Gradients, Layouts, Use
from packext.rules._common import bind, handles

if TYPE_CHECKING:
    from packext._lineage import Tracer

#: Multiply-adds of one sample from which on torch's own call for its weight gradient beats unfolding.
LARGE = 64_000_000

#: Positions of one sample from which on that call is as good with many channels as with few.
MANY = 128

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSES = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_NAMES = (
    "input",
    "weight",
    "bias",
    "stride",
    "padding",
    "output_padding",
    "groups",
    "dilation",
)


class Convolution(OwnedRule):
    """`y = conv(x, weight) + bias`, or its transpose, in which the input and g change places."""

    name = "convolution"
    stacks = True

    def bias_axis(self, use: Use) -> int | None:
        return None if use.consts["transposed"] else 1  # positions of the input have no part in the bias

    def spares(self, use: Use) -> tuple[str, ...]:
        return ("bias",)

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Tensor:
        x, w, b = tensors["input"], tensors["weight"], tensors.get("bias")
        w = w if w.dtype is x.dtype else w.to(x.dtype)
        b = b if b is None or b.dtype is x.dtype else b.to(x.dtype)
        return use.func(x, w, b, **use.consts["options"])

    def _backward(self, use: Use, t: dict[str, Tensor], g: Tensor, mask: list[bool], groups: int = 0) -> Any:
        c = use.consts
        x, w = t["input"].to(g.dtype), t["weight"].to(g.dtype)
        bias = [g.shape[1]]
        return torch.ops.aten.convolution_backward.default(
            g,
            x,
            w,
            bias,
            c["stride"],
            c["padding"],
            c["dilation"],
            c["transposed"],
            c["output_padding"],
            groups or c["groups"],
            mask,
        )

    def gradients(self, use: Use, t: dict[str, Tensor], g: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        names = ("input", "weight", "bias")
        found = self._backward(use, t, g, [name in wanted for name in names])
        some = {name: grad for name, grad in zip(names, found, strict=True) if name in wanted}
        return {k: v if v.dtype == t[k].dtype else v.to(t[k].dtype) for k, v in some.items()}

    def back(self, use: Use, t: dict[str, Tensor]) -> tuple[Callable[..., Any], dict[str, Any]] | None:
        c, transposed = use.consts, not use.consts["transposed"]
        stride, padding, dilation, kernel = c["stride"], c["padding"], c["dilation"], t["weight"].shape[2:]
        read, written = t["input"].shape[2:], use.outputs[0][2:]
        ends = [d * (k - 1) - 2 * p for p, d, k in zip(padding, dilation, kernel, strict=True)]
        over = [0] * len(read)
        if transposed:
            over = [r - s * (w - 1) - e - 1 for r, w, s, e in zip(read, written, stride, ends, strict=True)]
        elif any((w - 1 - e) // s + 1 != r for r, w, s, e in zip(read, written, stride, ends, strict=True)):
            return None  # a transposed convolution whose output was padded by a stride or more
        d = len(read)
        function = (_TRANSPOSES if transposed else _CONVOLUTIONS)[d - 1]
        return function, _flags(d, c["groups"], transposed, *map(tuple, (stride, padding, dilation, over)))

    def factors(self, use: Use, t: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored] | None:
        g, layout = gs[0], layouts[0]
        assert g is not None and layout is not None
        # Convolutions keep their samples along axis 0, and several images of one sample are put side by side.
        if layout.axis not in (None, 0) or (layout.inner and isinstance(layout, Tokens)):
            return None
        x, count, own = t["input"], layout.positions(g, 1), functools.partial(layout.own, g.shape[:1])
        if layout.inner:
            x, g = (layout.split(v, 1).flatten(0, 1) for v in (x, g))
        n, images = layout.n, g.shape[0]
        forms: dict[str, Factored] = {}
        acc = accumulation_dtype(g.dtype)
        if "weight" in use.sources:
            forms["weight"] = self._weight(use, x, t["weight"], g, n, count, own)
        if "bias" in use.sources:
            rows = g.flatten(2).sum(2, dtype=acc).reshape(n, images // n, -1).sum(1)
            shared = forms.get("weight")
            if isinstance(shared, Outer) and shared.groups == 1 and not use.consts["transposed"]:
                terms = shared.terms
            else:
                terms = Terms(g.flatten(2).reshape(n, 1, images // n, g.shape[1], -1).movedim(2, 3).flatten(3))
            forms["bias"] = Dense(rows, terms)
        return forms

    def _weight(
        self,
        use: Use,
        x: Tensor,
        w: Tensor,
        g: Tensor,
        n: int,
        count: float | None,
        own: Callable[[], Tensor | None],
    ) -> Outer:
        c = use.consts
        groups, per = c["groups"], g.shape[0] // n
        read, written = (g, x) if c["transposed"] else (x, g)
        kernel, out = w.shape[2:], written.shape[2:]
        features = read.shape[1] // groups * kernel.numel()
        positions = out.numel() * per

        acc = accumulation_dtype(torch.promote_types(x.dtype, g.dtype))
        window = Window(kernel, c["stride"], c["padding"], c["dilation"], out, groups)

        def take(lo: int, hi: int) -> Tensor:
            part = window.patches(read[lo * per : hi * per])
            if per == 1:
                return part
            return part.unflatten(0, (hi - lo, per)).transpose(1, 2).flatten(2, 3)

        def weighted(weight: Tensor | None) -> Tensor:
            scaled = g.to(acc)  # of half precision, torch would round the sum over all samples to it
            if weight is not None:
                scaled = scaled * weight.to(acc).repeat_interleave(per).reshape(-1, *[1] * (g.dim() - 1))
            return self._backward(use, {"input": x, "weight": w}, scaled, [False, True, False])[1]

        def canonical(y: Tensor) -> Tensor:
            y = y.reshape(n, per, groups, -1, out.numel())
            return y.permute(0, 2, 3, 1, 4).reshape(n, groups, -1, positions)

        def apply(direction: Tensor) -> Tensor:
            # That of a transposed one reads g.
            convolve, other = _CONVOLUTIONS[read.dim() - 3], direction.to(acc)
            return canonical(convolve(read.to(acc), other, None, c["stride"], c["padding"], c["dilation"], groups))

        def native(lo: int, hi: int, first: int = 0, last: int | None = None) -> Tensor:
            images, count, outputs = slice(lo * per, hi * per), hi - lo, slice(first, last)
            if count == 1:
                some = (x[images], g[images, outputs], w[outputs])
                if c["transposed"]:
                    some = (x[images, outputs], g[images], w[outputs])
                parts = {"input": some[0], "weight": some[2]}
                return self._backward(use, parts, some[1], [False, True, False])[1][None]
            # Samples side by side as groups of one convolution. All in one axis first: an axis with one entry may have
            # a stride by which torch takes a group for channels-last, and in float64 fails.
            beside = x[images].flatten().view(1, -1, *x.shape[2:])
            # Of the weight, nothing but its shape is read: memory that is not written to takes no pages.
            parts = {"input": beside, "weight": w.new_empty(count * w.shape[0], *w.shape[1:])}
            slope = g[images].flatten().view(1, -1, *g.shape[2:])
            rows = self._backward(use, parts, slope, [False, True, False], count)[1]
            return rows.unflatten(0, (count, -1))

        a = Patches(n, groups, positions, features, take, read, lambda: window.second_moment(read), window)
        alone = positions * features * written.shape[1] >= LARGE
        together = per == 1 and not c["transposed"] and groups == 1 and _suits(x, w, positions)
        # Of a transposed convolution, every position of the input is written to a patch of the output.
        stored = "IO" if c["transposed"] else "OI"
        fast = native if alone or together else None

        def real() -> Tensor | None:
            images = own()
            return None if images is None else images.repeat_interleave(out.numel(), 1)

        total = None if count is None else count * out.numel()
        return Outer(
            a, canonical(written), w.shape, weighted, apply, fast, alone, stored=stored, positions=total, own=real
        )


CONVOLUTION = Convolution()


def _suits(x: Tensor, w: Tensor, positions: int) -> bool:
    """Whether oneDNN is faster with the samples as groups of one convolution than a product with patches is."""
    # Measured on CPUs with AVX-512: so it is for channels in whole vectors, and not many of them, or many positions.
    outputs, inputs, *kernel = w.shape
    fits = max(kernel) > 1 and outputs % 8 == inputs % 8 == 0 and x.device.type == "cpu"
    return fits and (max(outputs, inputs) <= 64 or positions >= MANY)


def _tuple(value: Any, d: int) -> list[int]:
    return [value] * d if isinstance(value, int) else list(value) * (d // len(value) if len(value) == 1 else 1)


@functools.cache
def _flags(
    d: int, groups: int, transposed: bool, stride: Any, padding: Any, dilation: Any, output_padding: Any
) -> dict[str, Any]:
    """The constants of a use, each in full length, and those that torch's function takes; all uses share them."""
    options = {
        "stride": _tuple(stride, d),
        "padding": _tuple(padding, d),
        "dilation": _tuple(dilation, d),
        "groups": groups,
    }
    over = _tuple(output_padding, d)
    if transposed:
        options["output_padding"] = over
    return {**options, "options": options, "transposed": transposed, "output_padding": over}


def _place(tracer: Tracer, func: Any, tensors: dict[str, Tensor], consts: dict[str, Any], transposed: bool) -> Any:
    x, w = tensors["input"], tensors["weight"]
    d = w.dim() - 2
    if not tracer.is_data(x):
        return NotImplemented
    if x.dim() == d + 1:
        raise tracer.refuse(
            func,
            f"the input {list(x.shape)} has no batch axis",
            "Pass it with an axis for the samples in front.",
        )
    padding = consts["padding"]
    if padding == "same":
        total = [f * (k - 1) for f, k in zip(_tuple(consts["dilation"], d), w.shape[2:], strict=True)]
        if any(p % 2 for p in total):
            # torch pads one more at the end; so do we, and the rest is symmetric.
            x = F.pad(x, [side for p in reversed(total) for side in (0, p % 2)])
            tensors = {**tensors, "input": x}
            tracer.mark(x, None)
        padding = [p // 2 for p in total]
    elif padding == "valid":
        padding = 0
    given = (consts["stride"], padding, consts["dilation"], consts.get("output_padding", 0))
    flags = _flags(d, consts["groups"], transposed, *(tuple(v) if isinstance(v, list) else v for v in given))
    ordered = {k: tensors[k] for k in ("input", "weight", "bias") if k in tensors}
    return tracer.owned(CONVOLUTION, func, ordered, flags)


@handles(*_CONVOLUTIONS)
def convolution(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`F.conv1d` to `F.conv3d`."""
    tensors, consts = bind(_NAMES, args, kwargs, stride=1, padding=0, dilation=1, groups=1)
    return _place(tracer, func, tensors, consts, transposed=False)


@handles(*_TRANSPOSES)
def transposed(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`F.conv_transpose1d` to `F.conv_transpose3d`."""
    tensors, consts = bind(_TRANSPOSED_NAMES, args, kwargs, stride=1, padding=0, output_padding=0, dilation=1, groups=1)
    return _place(tracer, func, tensors, consts, transposed=True)
