"""Normalisations, PReLU and bilinear maps: parameters with few entries per sample."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packext._errors import CoupledSamplesError
from packext._factored import Dense, Factored, Outer, Terms, accumulation_dtype
from packext._layout import Layout
from packext._precision import autocasts, unrounded
from packext._use import Gradients, Layouts, Rule, Use
from packext.rules._common import bind, handles

if TYPE_CHECKING:
    from packext._lineage import Tracer


def _trailing(t: Tensor, layout: Layout, features: int) -> Tensor | None:
    """Sum of `[*lead, *features]` over everything but samples and features."""
    lead = t.dim() - features
    return layout.split(t, lead).sum(1, dtype=accumulation_dtype(t.dtype)) if layout.fits(t, lead) else None


def _channels(t: Tensor, layout: Layout) -> Tensor | None:
    """Sum of `[B, C, *space]` over everything but samples and channels."""
    acc = accumulation_dtype(t.dtype)
    flat = t.flatten(2).sum(2, dtype=acc) if t.dim() > 2 else t
    return layout.split(flat, 1).sum(1, dtype=acc) if layout.fits(flat, 1) else None


class Norm(Rule):
    """`normalised(x) * weight + bias`; the normalised input is computed again in the backward pass."""

    name = "norm"
    positionwise = True

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Tensor:
        return _normalised(use.consts, tensors, again=bool(use.outputs))

    def cancels(self, use: Use, tensors: dict[str, Tensor]) -> float:
        """Of a LayerNorm: what the mean is taken from, over the deviation; of one feature nothing but that is left."""
        c, x = use.consts, tensors["input"]
        if c["kind"] != "layer" or not x.numel():
            return 1.0
        x = x.detach().flatten(-len(c["normalized_shape"])).to(accumulation_dtype(x.dtype))
        scale = (x.var(-1, correction=0) + c["eps"]).rsqrt()
        return max(1.0, float((x.abs().amax(-1) * scale).nan_to_num(1.0, 1.0, 1.0).max()))

    def factors(self, use: Use, t: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored] | None:
        g, layout, c = gs[0], layouts[0], use.consts
        assert g is not None and layout is not None
        if c["kind"] == "batch" and c["training"] and use.record.n > 1:
            raise CoupledSamplesError(
                f"{use.describe()} uses the statistics of the batch, so that samples influence each other. "
                "Call model.eval() (or .eval() on it, with track_running_stats=True), or replace it by GroupNorm."
            )
        bare = {k: v for k, v in t.items() if k not in ("weight", "bias")}
        product = None
        if "weight" in use.sources:
            normalised = self.call(use, bare).to(g.dtype)
            product = g * normalised if torch.is_grad_enabled() else normalised.mul_(g)
        forms: dict[str, Factored] = {}
        for name, value in (("weight", product), ("bias", g)):
            if name in use.sources and value is not None:
                if c["kind"] in ("layer", "rms"):
                    rows = _trailing(value, layout, len(c["normalized_shape"]))
                else:
                    rows = _channels(value, layout)
                if rows is None:
                    return None
                forms[name] = Dense(rows, entrywise=True)
        return forms


NORM = Norm()


def _normalised(c: dict[str, Any], tensors: dict[str, Tensor], again: bool) -> Tensor:
    x, w, b = tensors["input"], tensors.get("weight"), tensors.get("bias")
    if c["kind"] == "layer":
        return F.layer_norm(x, c["normalized_shape"], w, b, c["eps"])
    if c["kind"] == "rms":
        return F.rms_norm(x, c["normalized_shape"], w, c["eps"])
    if c["kind"] == "group":
        return F.group_norm(x, c["num_groups"], w, b, c["eps"])
    mean, var = tensors.get("running_mean"), tensors.get("running_var")
    if c["training"] and again:
        mean = var = None  # not the first call: running statistics must not move a second time
    function = torch.batch_norm if c["kind"] == "batch" else torch.instance_norm
    return function(x, w, b, mean, var, c["training"], c["momentum"], c["eps"], c["cudnn_enabled"])


def _kind(tensors: dict[str, Tensor], call: Callable[[], Tensor]) -> torch.dtype:
    """The dtype that a call gives; an error of torch's where it does not take these together."""
    x = next(iter(tensors.values()))
    if {t.dtype for t in tensors.values()} == {x.dtype} and not autocasts(x.device.type):
        return x.dtype
    with torch.no_grad():
        return call().dtype


@handles(torch.layer_norm, F.layer_norm)
def layer_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.layer_norm(input, normalized_shape, weight, bias, eps)`."""
    names = ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
    tensors, c = bind(names, args, kwargs, eps=1e-5)
    return _place(tracer, func, tensors, c, "layer")


@handles(torch.rms_norm, F.rms_norm)
def rms_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.rms_norm(input, normalized_shape, weight, eps)`."""
    tensors, c = bind(("input", "normalized_shape", "weight", "eps"), args, kwargs, eps=None)
    return _place(tracer, func, tensors, c, "rms")


@handles(torch.group_norm, F.group_norm)
def group_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.group_norm(input, num_groups, weight, bias, eps)`."""
    names = ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled")
    tensors, c = bind(names, args, kwargs, eps=1e-5)
    return _place(tracer, func, tensors, c, "group")


_BATCH = (
    "input",
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "training",
    "momentum",
    "eps",
    "cudnn_enabled",
)


@handles(torch.batch_norm)
def batch_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.batch_norm`, sound for running statistics."""
    tensors, c = bind(_BATCH, args, kwargs)
    return _place(tracer, func, tensors, c, "batch")


@handles(torch.instance_norm)
def instance_norm(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.instance_norm`."""
    tensors, c = bind((*_BATCH[:5], "use_input_stats", *_BATCH[6:]), args, kwargs)
    return _place(tracer, func, tensors, {**c, "training": c["use_input_stats"]}, "instance")


def _place(tracer: Tracer, func: Any, tensors: dict[str, Tensor], consts: dict[str, Any], kind: str) -> Any:
    if not tracer.is_data(tensors["input"]):
        return NotImplemented
    consts = {"training": False, **consts, "kind": kind}
    coupled = kind == "batch" and consts["training"]
    if coupled or not tracer.has_slope(tensors["input"]):
        return tracer.observed(NORM, func, tensors, consts)
    gives = _kind(tensors, lambda: _normalised(consts, tensors, again=True))
    bare = {k: v for k, v in tensors.items() if k not in ("weight", "bias")}
    widest = functools.reduce(torch.promote_types, (t.dtype for t in tensors.values()))
    bare["input"] = bare["input"].to(widest)  # of several types, torch too rounds what comes out alone
    tracer.mark(bare["input"], None)
    y = tracer.observed(NORM, func, bare, consts)  # of data alone: no tap
    tracer.mark(y, None)
    with tracer:
        if "weight" in tensors:
            y = y * _stretched(tensors["weight"], y, kind)
        return (y + _stretched(tensors["bias"], y, kind) if "bias" in tensors else y).to(gives)


def _stretched(value: Tensor, x: Tensor, kind: str) -> Tensor:
    """A value for each feature or channel, with axes to be broadcast against `x`."""
    return value if kind in ("layer", "rms") else value.view(-1, *[1] * (x.dim() - 2))


class PReLU(Rule):
    """`x` where positive, `weight x` elsewhere; one weight for all, or one per channel (axis 1)."""

    name = "prelu"
    positionwise = True

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Tensor:
        return torch.prelu(tensors["input"], tensors["weight"])

    def factors(self, use: Use, t: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored] | None:
        g, layout = gs[0], layouts[0]
        assert g is not None and layout is not None
        product = g * t["input"].clamp(max=0)
        if t["weight"].numel() == 1:
            rows = layout.by_sample(product).sum(1, dtype=accumulation_dtype(g.dtype)).reshape(-1, *t["weight"].shape)
        else:
            rows = _channels(product, layout)
        return None if rows is None else {"weight": Dense(rows)}


PRELU = PReLU()


@handles(torch.prelu, Tensor.prelu)
def prelu(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.prelu(input, weight)`."""
    tensors, _ = bind(("input", "weight"), args, kwargs)
    if not tracer.is_data(tensors["input"]):
        return NotImplemented
    x, w = tensors["input"], tensors["weight"]
    if tracer.has_slope(x):
        gives = _kind(tensors, lambda: torch.prelu(x, w))
        with tracer:
            x, w = x.to(gives), w.to(gives)
            return torch.where(x > 0, x, x.clamp(max=0) * (w if w.numel() == 1 else _stretched(w, x, "channels")))
    return tracer.observed(PRELU, func, tensors, {})


class Bilinear(Rule):
    """`y_o = x1ᵀ weight_o x2 + bias_o`: linear in the products of the two inputs' entries."""

    name = "bilinear"
    positionwise = True

    def factors(self, use: Use, t: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored] | None:
        g, layout = gs[0], layouts[0]
        assert g is not None and layout is not None
        lead = g.dim() - 1
        if not layout.fits(g, lead):
            return None
        rows = layout.split(g, lead)
        forms: dict[str, Factored] = {}
        terms = Terms(rows.mT[:, None])
        if "weight" in use.sources:
            first, second = layout.split(t["input1"], lead), layout.split(t["input2"], lead)
            products = (first[..., :, None] * second[..., None, :]).flatten(2)
            forms["weight"] = Outer(
                products[:, None], terms.g, t["weight"].shape, terms=terms, positions=layout.positions(g, lead)
            )
        if "bias" in use.sources:
            forms["bias"] = Dense(rows.sum(1, dtype=accumulation_dtype(g.dtype)), terms)
        return forms


BILINEAR = Bilinear()


@handles(torch.bilinear)
def bilinear(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.bilinear(input1, input2, weight, bias)`."""
    tensors, _ = bind(("input1", "input2", "weight", "bias"), args, kwargs)
    if not (tracer.is_data(tensors["input1"]) and tracer.is_data(tensors["input2"])):
        return NotImplemented
    first, second, w = tensors["input1"], tensors["input2"], tensors["weight"]
    if tracer.has_slope(first) or tracer.has_slope(second):
        gives = _kind(tensors, lambda: torch.bilinear(first, second, w, tensors.get("bias")))
        products = (first.to(gives)[..., :, None] * second.to(gives)[..., None, :]).flatten(-2)
        tracer.mark(products, None)
        with tracer, unrounded(products.device.type):
            b = tensors.get("bias")
            return F.linear(products, w.flatten(1).to(gives), None if b is None else b.to(gives))
    return tracer.observed(BILINEAR, func, tensors, {})
