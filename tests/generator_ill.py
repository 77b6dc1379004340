"""Blocks that let samples influence each other, and blocks that packext may refuse but must not get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from tests.generator_draw import IDS, Block, Coupler, Draw, State, coupler, maybe


@coupler("vec seq tmj img")
def across_samples(d: Draw, s: State) -> tuple[nn.Module, State]:
    a = s.axis
    label, f = d.choice(
        [
            ("minus batch mean", lambda b, h, e: h - h.mean(a, keepdim=True)),
            ("batch std", lambda b, h, e: h / (1 + h.var(a, keepdim=True, unbiased=False))),
            ("roll samples", lambda b, h, e: h.roll(1, a)),
            ("flip samples", lambda b, h, e: h.flip(a)),
            ("sort samples", lambda b, h, e: h.sort(a).values),
            ("cumsum samples", lambda b, h, e: h.cumsum(a)),
            ("reverse cumsum samples", lambda b, h, e: h.flip(a).cumsum(a).flip(a)),
            ("softmax samples", lambda b, h, e: h.softmax(a)),
            ("max of samples", lambda b, h, e: h + h.amax(a, keepdim=True)),
            ("whole norm", lambda b, h, e: h / (1 + h.norm())),
            ("first sample", lambda b, h, e: h + h.narrow(a, 0, 1)),
            ("last sample", lambda b, h, e: h + h.narrow(a, -1, 1)),
            ("kernel of samples", lambda b, h, e: _mixed(h, a, lambda x: x @ x.T)),
            ("one from another", lambda b, h, e: h + F.pad(h.narrow(a, 0, 1) * 0.5, _pads(h.dim(), a, h.shape[a] - 1))),
            ("mixed", lambda b, h, e: _mixed(h, a, lambda x: torch.ones(len(x), len(x)).tril())),
        ]
    )  # fmt: skip
    return Coupler(label, f).at(a), s


def _mixed(h: Tensor, axis: int, weights: Callable[[Tensor], Tensor]) -> Tensor:
    x = h.movedim(axis, 0)
    return torch.einsum("nm,m...->n...", weights(x.flatten(1)), x).movedim(0, axis)


def _pads(dims: int, axis: int, before: int) -> list[int]:
    return [0] * (2 * (dims - 1 - axis)) + [before, 0]


@coupler("vec img")
def batch_norm(d: Draw, s: State) -> tuple[nn.Module, State]:
    layer = nn.BatchNorm1d(s.c) if s.kind == "vec" else nn.BatchNorm2d(s.c)
    return Coupler("BatchNorm in training", lambda b, h, e: b.m(h) if h.numel() > s.c else h, m=layer), s


@coupler("seq tmj")
def wrong_fold(d: Draw, s: State) -> tuple[nn.Module, State]:
    members = {"w": d.matrix(s.c, s.c), "q": nn.MultiheadAttention(s.c, 1, batch_first=s.kind != "seq")}
    label, f = d.choice(
        [
            ("wrong fold", lambda b, h, e: h.transpose(0, 1).reshape(h.shape)),
            ("wrong fold and w", lambda b, h, e: (h.transpose(0, 1).reshape(-1, s.c) @ b.w.get()).view(h.shape)),
            ("attention over samples", lambda b, h, e: b.q(h, h, h)[0]),
            ("shift of the folded", lambda b, h, e: h.reshape(-1, s.c).roll(1, 0).view(h.shape)),
        ]
    )
    return Coupler(label, f, **members).at(s.axis), s


@maybe("vec seq")
def unusual(d: Draw, s: State) -> tuple[nn.Module, State]:
    shape = (d.n, s.c) if s.kind == "vec" else (d.n, s.t, s.c)
    once = torch.randperm(d.n)
    label, f = d.choice(
        [
            ("a row per sample", lambda b, h, e: h + b.z[: len(h)]),
            ("data into parameters", lambda b, h, e: _into(b.v.get() * 1.0, h)),
            ("data into an expanded one", lambda b, h, e: _columns(b.v.get().expand_as(h).clone(), h)),
            ("buffer by views", lambda b, h, e: _viewed(h, b.v.get())),
            ("parameter by views", lambda b, h, e: h + _param_view(b.v.get())),
            ("there and back", lambda b, h, e: (h[once] * b.v.get())[once.argsort()] if len(h) == d.n else h),
            ("sparse ids", lambda b, h, e: h + F.embedding(e["ids"].flatten()[:1], b.w, sparse=True)),
            ("a kernel per sample", lambda b, h, e: _per_sample_kernels(h, b.v.get())),
            ("a number of the batch", lambda b, h, e: h + b.v.get() * e["ids"].sum().mul(0)),
            ("foreign data", lambda b, h, e: h + torch.ones(h.shape) * b.v.get()),
            ("numpy", lambda b, h, e: h * b.v.get() + torch.from_numpy(h.detach().numpy()).sin() * b.v.get()),
            ("halves", lambda b, h, e: _halves(lambda x: x * b.v.get(), h, s.axis)),
            ("sample by sample", lambda b, h, e: torch.cat([F.linear(x, b.l.weight) for x in h.split(1)])),
            ("routed tokens", lambda b, h, e: _routed(h, h[..., 0] > 0, b.l)),
            ("custom function", lambda b, h, e: Cubed.apply(h, b.v.get())),
            ("vmap", lambda b, h, e: torch.vmap(lambda x: x * b.v.get())(h)),
            ("out of sight", lambda b, h, e: torch.ops.aten.mul(h, b.v.get())),
            ("dropout", lambda b, h, e: F.dropout(h * b.v.get(), 0.5)),
            ("dropout of v", lambda b, h, e: h * F.dropout(b.v.get(), 0.5)),
            ("tolist", lambda b, h, e: torch.stack([x * b.v.get() for x in h])),
            ("positions as input", lambda b, h, e: h + b.w[e["ids"][0, 0] * 0 + torch.arange(s.c) % IDS].mean(-1)),
        ]
    )  # fmt: skip
    if label == "a row per sample":
        d.fixed_t = True
    draws = label.startswith("dropout")
    d.training_random |= draws
    members = {"z": nn.Parameter(torch.randn(shape)), "v": d.vector(s.c), "w": nn.Parameter(torch.randn(IDS, s.c))}
    members["l"] = nn.Linear(s.c, s.c)
    return Block(label, f, **members), s


@maybe("vec seq tmj img")
def unseen(d: Draw, s: State) -> tuple[nn.Module, State]:
    """Parameters that meet data where no handler sees it, once or more, beside uses that are seen."""
    size = lambda v: v.view(-1, *[1] * 2 * (s.kind == "img"))  # noqa: E731
    v = lambda b: size(b.v.get())  # noqa: E731
    u = lambda b: size(b.u)  # noqa: E731
    label, f = d.choice(
        [
            ("Function", lambda b, h, e: Cubed.apply(h, v(b))),
            ("Functions in a row", lambda b, h, e: Cubed.apply(Cubed.apply(h, v(b)), u(b))),
            ("Functions with something between", lambda b, h, e: Cubed.apply(Cubed.apply(h, v(b)).tanh(), v(b))),
            ("Function beside what is seen", lambda b, h, e: Cubed.apply(h * v(b), v(b)) + h * u(b)),
            ("Function around itself", lambda b, h, e: _twice(Cubed.apply(h, v(b)), u(b))),
            ("Function with two outputs", lambda b, h, e: torch.add(*Pair.apply(h.tanh(), v(b), u(b)))),
            ("one of two outputs", lambda b, h, e: Pair.apply(h, v(b), u(b))[1].sin()),
            ("Function, then in place", lambda b, h, e: Cubed.apply(h, v(b)).mul_(0.5).add_(u(b))),
            ("Function of what is not contiguous", lambda b, h, e: Cubed.apply(h.mT.contiguous().mT, v(b)) * u(b)),
            ("vmap", lambda b, h, e: torch.vmap(lambda x: (x * v(b)).tanh() + u(b), s.axis, s.axis)(h)),
            ("vmap of grad", lambda b, h, e: torch.vmap(
                torch.func.grad(lambda x: (x.sin() * v(b)).square().sum()), s.axis, s.axis)(h)),
            ("jvp", lambda b, h, e: torch.func.jvp(lambda x: x.sin() * v(b), (h + 0,), (h.cos(),))[1]),
            ("chunks", lambda b, h, e: torch.vmap(lambda x: x * v(b), s.axis, s.axis, chunk_size=2)(h) + h * u(b)),
            ("Function of halves", lambda b, h, e: _halves(lambda x: Cubed.apply(x, v(b)), h, s.axis)),
            ("forward mode", lambda b, h, e: _derivative(lambda x: x.sin() * v(b) + u(b), h)),
        ]
    )  # fmt: skip
    return Block(label, f, v=d.vector(s.c), u=nn.Parameter(torch.randn(s.c))), s


@coupler("vec seq tmj img")
def unseen_across_samples(d: Draw, s: State) -> tuple[nn.Module, State]:
    v = lambda b: b.v.get().view(-1, *[1] * 2 * (s.kind == "img"))  # noqa: E731
    label, f = d.choice(
        [
            ("Function of h less its mean", lambda b, h, e: Less.apply(h, v(b), s.axis)),
            ("vmap over others", lambda b, h, e: torch.vmap(lambda x: (x - h.mean(s.axis)) * v(b), s.axis, s.axis)(h)),
        ]
    )
    return Coupler(label, f, v=d.vector(s.c)).at(s.axis), s


def _derivative(f: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(h, h.cos()))).tangent


def _twice(h: Tensor, v: Tensor) -> Tensor:
    return h + Cubed.apply(h, v) * v


class Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h, v, u)
        return h * v, h.sin() + u

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (a, b), (h, v, u) = grads, ctx.saved_tensors
        return a * v + b * h.cos(), (a * h).sum_to_size(v.shape), b.sum_to_size(u.shape)


class Less(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, v: Tensor, axis: int) -> Tensor:
        ctx.save_for_backward(h, v)
        ctx.axis = axis
        return (h - h.mean(axis, keepdim=True)) * v

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (h, v) = grads, ctx.saved_tensors
        part = g * v
        less = h - h.mean(ctx.axis, keepdim=True)
        return part - part.mean(ctx.axis, keepdim=True), (g * less).sum_to_size(v.shape), None


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(h, v)
        return h * v**3

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        h, v = ctx.saved_tensors
        g = grads[0]
        return g * v**3, (g * h * 3 * v**2).sum_to_size(v.shape)


def _into(v: Tensor, h: Tensor) -> Tensor:
    out = v.expand(h.shape).contiguous()
    out += h
    return out


def _columns(out: Tensor, h: Tensor) -> Tensor:
    out[..., 0] = h[..., 0]
    return out


def _viewed(h: Tensor, v: Tensor) -> Tensor:
    out = torch.zeros(h.shape)
    out[..., 0].copy_(h[..., 0])
    out[..., 1:].add_(h[..., 1:])
    return out * v


def _param_view(v: Tensor) -> Tensor:
    out = torch.zeros(v.shape)
    out[:1].copy_(v[:1])
    return out


def _per_sample_kernels(h: Tensor, v: Tensor) -> Tensor:
    flat = h.reshape(1, len(h), -1)
    kernel = (h.reshape(len(h), -1)[:, :1, None] * v[0]).expand(-1, -1, 1)
    return F.conv1d(flat, kernel, groups=len(h)).view(h.shape)


def _halves(m: Any, h: Tensor, axis: int) -> Tensor:
    cut = h.shape[axis] // 2
    if not cut:
        return m(h)
    parts = h.narrow(axis, 0, cut), h.narrow(axis, cut, h.shape[axis] - cut)
    return torch.cat([m(part) for part in parts], axis)


def _routed(h: Tensor, mask: Tensor, layer: nn.Module) -> Tensor:
    """Tokens of all samples gathered for an expert, as in a mixture of experts."""
    out = torch.zeros_like(h)
    out[mask] = layer(h[mask])
    return h + out
