"""Blocks of random models that work along features, whatever the other axes are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.generator_draw import LAST, Block, Draw, State, block, keep


@block(LAST, 3)
def linear(d: Draw, s: State) -> tuple[nn.Module, State]:
    out = d.width()
    how = d.randrange(4)
    if how == 0:
        layer: nn.Module = nn.Linear(s.c, out, bias=d.chance(0.7))
        same = [p for p in d.tied if p.shape == (out, s.c)]
        if same and d.chance(0.5):
            layer.weight = d.choice(same)
        elif d.chance(0.5):
            d.tied.append(layer.weight)
        return Block("Linear", lambda b, h, e: b.m(h), m=layer), replace(s, c=out)
    if how == 1:
        layer = parametrizations.weight_norm(nn.Linear(s.c, out))
        return Block("weight_norm Linear", lambda b, h, e: b.m(h), m=layer), replace(s, c=out)
    w, v = d.matrix(out, s.c), d.vector(out)
    if how == 2:
        return Block("F.linear", lambda b, h, e: F.linear(h, b.w.get(), b.v.get()), w=w, v=v), replace(s, c=out)
    return Block("F.linear no bias", lambda b, h, e: F.linear(h, weight=b.w.get()), w=w), replace(s, c=out)


@block(LAST, 3)
def product(d: Draw, s: State) -> tuple[nn.Module, State]:
    out = d.width()
    fold = lambda h: h.reshape(-1, s.c)  # noqa: E731
    back = lambda y, h: y.view(*h.shape[:-1], out)  # noqa: E731
    letters = "abcdefg"[: 1 if s.kind == "vec" else 2]
    fs: list[tuple[str, Callable[..., Tensor]]] = [
        ("h @ w", lambda b, h, e: h @ b.w.get()),
        ("torch.matmul", lambda b, h, e: torch.matmul(h, b.w.get())),
        ("einsum", lambda b, h, e: torch.einsum(f"{letters}x,xy->{letters}y", h, b.w.get())),
        ("einsum w first", lambda b, h, e: torch.einsum(f"xy,{letters}x->{letters}y", b.w.get(), h)),
        ("einsum ...", lambda b, h, e: torch.einsum("...x,xy->...y", h, b.w.get())),
        ("tensordot", lambda b, h, e: torch.tensordot(h, b.w.get(), 1)),
        ("addmm", lambda b, h, e: back(torch.addmm(b.v.get(), fold(h), b.w.get()), h)),
        ("addmm beta", lambda b, h, e: back(b.v.get().addmm(fold(h), b.w.get(), beta=0.5, alpha=2), h)),
        ("mm folded", lambda b, h, e: h.flatten(0, -2).mm(b.w.get()).unflatten(0, h.shape[:-1])),
        ("w.T @ h.T", lambda b, h, e: (b.w.get().T @ h.mT).mT),
        ("sum of h * w", lambda b, h, e: (h[..., None] * b.w.get()).sum(-2)),
        ("bmm expanded", lambda b, h, e: back(torch.bmm(fold(h)[:, None], b.w.get().expand(len(fold(h)), -1, -1)), h)),
        ("matmul expanded", lambda b, h, e: h @ b.w.get().expand(*h.shape[:-2], s.c, out)),
        ("tiled", lambda b, h, e: torch.cat([h @ b.w.get()[:, :1], h @ b.w.get()[:, 1:]], -1)),
    ]  # fmt: skip
    label, f = d.choice(fs)
    return Block(label, f, w=d.matrix(s.c, out), v=d.vector(out)), replace(s, c=out)


@block(LAST, 3)
def elementwise(d: Draw, s: State) -> tuple[nn.Module, State]:
    fs: list[tuple[str, Callable[..., Tensor]]] = [
        ("h * v", lambda b, h, e: h * b.v.get()),
        ("h + v", lambda b, h, e: h + b.v.get()),
        ("v - h", lambda b, h, e: b.v.get() - h),
        ("h / v", lambda b, h, e: h / (1 + b.v.get() ** 2)),
        ("v / h", lambda b, h, e: b.v.get() / (2 + h.tanh())),
        ("addcmul", lambda b, h, e: torch.addcmul(h, b.v.get(), h.tanh(), value=0.5)),
        ("lerp", lambda b, h, e: torch.lerp(h, b.v.get(), 0.3)),
        ("lerp weight", lambda b, h, e: torch.lerp(h, h.tanh(), b.v.get())),
        ("where", lambda b, h, e: torch.where(h > 0, h, h * b.v.get())),
        ("where v", lambda b, h, e: torch.where(h > 0.1, h, b.v.get())),
        ("where of two", lambda b, h, e: h + torch.where(h > 0, b.v.get(), b.s.get())),
        ("maximum", lambda b, h, e: torch.maximum(h, b.v.get())),
        ("clamp", lambda b, h, e: h.clamp(max=b.v.get())),
        ("clamp both", lambda b, h, e: torch.clamp(h, b.v.get() - 1, b.v.get() + 1)),
        ("add_", lambda b, h, e: h.clone().add_(b.v.get())),
        ("mul_", lambda b, h, e: h.clone().mul_(b.v.get())),
        ("+=", lambda b, h, e: _iadd(h * 1.0, b.v.get())),
        ("*= in a view", lambda b, h, e: _imul_view(h * 1.0, b.s.get())),
        ("masked_fill", lambda b, h, e: h.masked_fill(h > 0.5, b.s.get().sum())),
        ("setitem", lambda b, h, e: _assign(h * 1.0, 0, b.s.get().sum())),
        ("setitem v", lambda b, h, e: _assign_all(h * 1.0, b.v.get())),
        ("h * s", lambda b, h, e: h * b.s.get()),
        ("s ** |h|", lambda b, h, e: (1 + b.s.get() ** 2) ** h.tanh()),
        ("hypot", lambda b, h, e: torch.hypot(h, b.v.get() + 3)),
        ("atan2", lambda b, h, e: torch.atan2(h, 2 + b.v.get().tanh())),
        ("sub alpha", lambda b, h, e: torch.sub(h, b.v.get(), alpha=0.7)),
        ("rsub", lambda b, h, e: torch.rsub(h, b.v.get())),
        ("mse", lambda b, h, e: F.mse_loss(h, b.v.get().expand_as(h), reduction="none")),
        ("dist", lambda b, h, e: h * (h - b.v.get()).square().mean(-1, keepdim=True)),
        ("cosine", lambda b, h, e: h * F.cosine_similarity(h, b.v.get(), dim=-1)[..., None]),
        ("addcdiv", lambda b, h, e: torch.addcdiv(h, b.v.get(), 2 + h.sin())),
        ("gate", lambda b, h, e: h * (h * b.v.get()).sigmoid()),
        ("double use", lambda b, h, e: h * b.v.get() + b.v.get().flip(0)),
        ("softplus beta", lambda b, h, e: F.softplus(h * b.s.get())),
        ("xlogy", lambda b, h, e: torch.xlogy(h, 1 + b.v.get() ** 2)),
        ("broadcast_tensors", lambda b, h, e: h + torch.broadcast_tensors(h, b.v.get())[1].tanh()),
        ("expand_as", lambda b, h, e: h + b.v.get().expand_as(h) * 2),
        ("new_full", lambda b, h, e: h + h.new_zeros(h.shape).copy_(b.v.get())),
        ("layer_norm of v", lambda b, h, e: F.layer_norm(h, (s.c,), b.v.get(), b.v.get())),
        ("dot", lambda b, h, e: h * (h @ b.v.get())[..., None]),
        ("mv", lambda b, h, e: h + torch.einsum("...c,c->...", h, b.v.get()).unsqueeze(-1)),
        ("logaddexp", lambda b, h, e: torch.logaddexp(h, b.v.get())),
        ("cat v", lambda b, h, e: torch.cat([h, b.v.get().expand_as(h)], -1)[..., ::2]),
        ("stack v", lambda b, h, e: torch.stack([h, b.v.get().expand_as(h)], 0).prod(0)),
        ("pow", lambda b, h, e: (1 + h * h) ** b.v.get().tanh()),
    ]  # fmt: skip
    label, f = d.choice(fs)
    return Block(label, f, v=d.vector(s.c), s=d.scalar()), s


def _iadd(h: Tensor, v: Tensor) -> Tensor:
    h += v
    return h


def _imul_view(h: Tensor, v: Tensor) -> Tensor:
    h[..., :1] *= v
    return h


def _assign(h: Tensor, i: int, v: Tensor) -> Tensor:
    h[..., i] = v
    return h


def _assign_all(h: Tensor, v: Tensor) -> Tensor:
    h[..., : len(v) - 1] = v[1:]
    return h


@block(LAST)
def norm(d: Draw, s: State) -> tuple[nn.Module, State]:
    layer = d.choice([nn.LayerNorm, nn.RMSNorm])(s.c)
    for p in layer.parameters():
        nn.init.normal_(p)
    return Block(type(layer).__name__, lambda b, h, e: b.m(h), m=layer), s


@block(LAST, 2)
def activation(d: Draw, s: State) -> tuple[nn.Module, State]:
    label, f = d.choice(
        [
            ("tanh", lambda b, h, e: h.tanh()),
            ("relu", lambda b, h, e: F.relu(h * 1.0, inplace=True)),
            ("gelu", lambda b, h, e: F.gelu(h)),
            ("softmax", lambda b, h, e: h.softmax(-1)),
            ("prelu", lambda b, h, e: F.prelu(h, b.p)),
            ("feature roll", lambda b, h, e: h.roll(1, -1)),
            ("sort features", lambda b, h, e: h.sort(-1).values),
            ("flip features", lambda b, h, e: h.flip(-1)),
            ("standardise", lambda b, h, e: (h - h.mean(-1, True)) / (1 + h.var(-1, unbiased=False, keepdim=True))),
        ]
    )  # fmt: skip
    return Block(label, f, p=d.param(1)), s


@block("vec seq tmj img", 2)
def combine(d: Draw, s: State) -> tuple[nn.Module, State]:
    """Residuals, branches, re-use, islands."""
    if d.depth > 2:
        return Block("nothing", lambda b, h, e: h), s
    d.depth += 1
    a, b_ = keep(d, s), keep(d, s)
    d.depth -= 1
    label, f = d.choice(
        [
            ("residual", lambda b, h, e: h + b.a(h, e)),
            ("branch", lambda b, h, e: b.a(h, e) * b.b(h, e).tanh()),
            ("twice", lambda b, h, e: b.a(b.a(h, e).tanh(), e)),
            ("thrice", lambda b, h, e: b.a(b.b(b.a(h, e), e).tanh(), e) + b.b(h, e)),
            ("detached", lambda b, h, e: h + b.a(h.detach(), e)),
            ("no_grad", lambda b, h, e: b.a(h, e) + _without(b.b, h, e)),
            ("half detached", lambda b, h, e: b.a(h, e) + b.a(h, e).detach() * b.b(h, e)),
            ("stacked", lambda b, h, e: torch.stack([b.a(h, e), b.b(h, e), h], 0).mean(0)),
            ("stacked last", lambda b, h, e: torch.stack([b.a(h, e), b.b(h, e)], -1).amax(-1)),
            ("list", lambda b, h, e: sum([b.a(h, e), b.b(h, e)])),
            ("residual +=", lambda b, h, e: _iadd(b.a(h, e) * 1.0, h)),
            ("dead branch", lambda b, h, e: (b.a(h, e), b.b(h, e))[1]),
        ]
    )  # fmt: skip
    return Block(f"{label}({a}, {b_})", f, a=a, b=b_), s


def _without(m: Any, h: Tensor, e: Any) -> Tensor:
    with torch.no_grad():
        return m(h, e)


@block("vec seq tmj")
def features(d: Draw, s: State) -> tuple[nn.Module, State]:
    """Chunks, splits, and indices along features."""
    if s.c < 2:
        return Block("nothing", lambda b, h, e: h), s
    order = torch.randperm(s.c)
    half = s.c // 2
    label, f = d.choice(
        [
            ("chunk", lambda b, h, e: torch.cat([x * b.s.get() for x in h.chunk(2, -1)], -1)),
            ("split", lambda b, h, e: torch.cat([h.split([half, s.c - half], -1)[1], h[..., :half] * b.s.get()], -1)),
            ("index", lambda b, h, e: h[..., order] * b.v.get()[order]),
            ("strided", lambda b, h, e: torch.cat([h[..., ::2] + b.v.get()[::2], h[..., 1::2]], -1)),
            ("unbind", lambda b, h, e: torch.stack([x * b.s.get() for x in h.unbind(-1)], -1)),
            ("unfold", lambda b, h, e: F.pad(h, (1, 0)).unfold(-1, 2, 1).sum(-1) * b.v.get()),
        ]
    )  # fmt: skip
    return Block(label, f, v=d.vector(s.c), s=d.scalar()), s
