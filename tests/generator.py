"""Random models, each from a seed: layers, sharing, branches, views, and values made of parameters.

`generate(seed)` draws a `Problem`. Its model is a chain of blocks over a hidden state of one of four
kinds: "vec" [N, C], "seq" [N, T, C], "tmj" (time-major) [T, N, C], "img" [N, C, H, W]. Some problems
are ill on purpose: a block lets samples influence each other, or uses what packext may refuse.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

IDS = 7  # integer inputs are below this


@dataclass(frozen=True)
class State:
    """Kind and sizes of the hidden state."""

    kind: str
    c: int
    t: int = 1
    side: int = 1

    @property
    def axis(self) -> int:
        """The axis of the samples."""
        return int(self.kind == "tmj")


class Made(nn.Module):
    """A value made of parameters alone, by a module that runs (its hooks fire), or quietly."""

    def __init__(self, quiet: bool, make: Callable[[Any], Tensor], **members: Any) -> None:
        super().__init__()
        self.quiet, self.make = quiet, make
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self) -> Tensor:
        return self.make(self)

    def get(self) -> Tensor:
        return self.forward() if self.quiet else self()


class Block(nn.Module):
    """A step of the model, as a function of the hidden state and the other inputs."""

    def __init__(self, label: str, f: Callable[..., Tensor], **members: Any) -> None:
        super().__init__()
        self.label, self.f = label, f
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, h: Tensor, extra: dict[str, Tensor]) -> Tensor:
        return self.f(self, h, extra)

    def __repr__(self) -> str:
        return self.label


class Coupler(Block):
    """A step that mixes samples; keeps what it got, so that the oracle can see whether that matters."""

    seen: Tensor | None = None
    axis = 0

    @property
    def folds(self) -> bool:
        """Whether it is a plain transpose where N = T, which keeps samples apart."""
        return self.label.startswith("wrong fold")

    def at(self, axis: int) -> Coupler:
        """Say along which axis the samples come."""
        self.axis = axis
        return self

    def forward(self, h: Tensor, extra: dict[str, Tensor]) -> Tensor:
        self.seen = h
        return self.f(self, h, extra)


class Draw(random.Random):
    """The source of all choices of one problem."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        torch.manual_seed(seed)
        self.n = self.choice([1, 2, 2, 3, 3, 4, 4, 5])
        self.t = self.n if self.random() < 0.4 else self.randint(1, 6)
        self.fixed_t = False
        self.tied: list[nn.Parameter] = []
        self.training_random = False

    def chance(self, p: float) -> bool:
        return self.random() < p

    def width(self) -> int:
        """A number of features: often as many as samples or positions, sometimes large."""
        odd = self.choice([self.n, self.t, self.randint(1, 8), self.randint(2, 4) * 2])
        return self.choice([12, 24]) if self.chance(0.1) else odd

    def param(self, *shape: int, share: float = 0.25) -> nn.Parameter:
        """A parameter, at times one that is used elsewhere, or frozen."""
        same = [p for p in self.tied if p.shape == shape]
        if same and self.chance(share):
            return self.choice(same)
        p = nn.Parameter(torch.randn(shape) * 0.6)
        if self.chance(0.03):
            p.requires_grad_(False)
        self.tied.append(p)
        return p

    def made(self, make: Callable[[Any], Tensor], **members: Any) -> Made:
        return Made(self.chance(0.5), make, **members)

    # -- values made of parameters alone ---------------------------------------------------------
    def scalar(self) -> Made:
        c = self.randint(2, 4)
        return self.choice(
            [
                lambda: self.made(lambda m: m.p, p=self.param()),
                lambda: self.made(lambda m: m.p.mean(), p=self.param(c)),
                lambda: self.made(lambda m: m.p[1], p=self.param(c)),
                lambda: self.made(lambda m: m.p.norm(), p=self.param(c, c)),
                lambda: self.made(lambda m: m.p.sigmoid() + 0.5, p=self.param()),
                lambda: self.made(lambda m: m.p, p=self.param(1)),
            ]
        )()

    def vector(self, c: int, depth: int = 2) -> Made:
        """`[c]`."""
        if depth == 0:
            return self.made(lambda m: m.p, p=self.param(c))
        inner = lambda: self.vector(c, depth - 1)  # noqa: E731
        k, cut = self.randint(1, 3), self.randint(0, c)
        row, plain = self.randrange(k), self.made
        big = [p for p in self.tied if p.numel() >= c]
        options = [
            lambda: plain(lambda m: m.p, p=self.param(c)),
            lambda: plain(lambda m: m.p, p=self.param(c)),
            lambda: plain(lambda m: m.p / m.p.norm(), p=self.param(c)),
            lambda: plain(lambda m: m.v.get().softmax(0), v=inner()),
            lambda: plain(lambda m: m.v.get().tanh() * m.s.get(), v=inner(), s=self.scalar()),
            lambda: plain(lambda m: m.a @ m.b, a=self.param(c, k), b=self.param(k)),
            lambda: plain(lambda m: m.a[row], a=self.param(k, c)),
            lambda: plain(lambda m: m.a[:, row], a=self.param(c, k)),
            lambda: plain(lambda m: m.a.sum(0), a=self.param(k, c)),
            lambda: plain(lambda m: m.a.T.mean(1), a=self.param(k, c)),
            lambda: plain(lambda m: m.v.get().exp().clamp(max=2.0), v=inner()),
            lambda: plain(lambda m: torch.outer(m.p, m.p).diagonal(), p=self.param(c)),
            lambda: plain(lambda m: m.e(torch.arange(c)).squeeze(-1), e=nn.Embedding(c, 1)),
            lambda: plain(lambda m: m.p[torch.arange(c).flip(0)], p=self.param(c)),
            lambda: plain(lambda m: torch.cat([m.p, m.q]), p=self.param(cut), q=self.param(c - cut)),
            lambda: plain(lambda m: m.p.detach() + m.q, p=self.param(c), q=self.param(c)),
            lambda: plain(lambda m: m.v.get().cumsum(0), v=inner()),
            lambda: plain(lambda m: F.layer_norm(m.p, (c,), m.q), p=self.param(c), q=self.param(c)),
            lambda: plain(lambda m: m.l(m.p), p=self.param(k), l=nn.Linear(k, c)),
            lambda: plain(lambda m: m.p[None].expand(3, c)[1], p=self.param(c)),
            lambda: plain(lambda m: torch.where(m.p > 0, m.p, 0.3 * m.q), p=self.param(c), q=self.param(c)),
            lambda: plain(lambda m: _written(m.p, m.q), p=self.param(c), q=self.param(1)),
            lambda: plain(lambda m: m.p.clone().double(), p=self.param(c)),
        ]
        if big:
            p = self.choice(big)
            options += [lambda: plain(lambda m: m.p.flatten()[:c], p=p)] * 3
            options += [lambda: plain(lambda m: m.p.reshape(-1)[-c:] * 2, p=p)]
        return self.choice(options)()

    def matrix(self, a: int, b: int, depth: int = 2) -> Made:
        """`[a, b]`."""
        if depth == 0:
            return self.made(lambda m: m.p, p=self.param(a, b))
        inner = lambda: self.matrix(a, b, depth - 1)  # noqa: E731
        k, plain = self.randint(1, 3), self.made
        frozen = nn.Parameter(torch.randn(a, b), requires_grad=False)
        order = torch.randperm(a)
        options = [
            *[lambda: plain(lambda m: m.p, p=self.param(a, b))] * 3,
            lambda: plain(lambda m: m.p.T, p=self.param(b, a)),
            lambda: plain(lambda m: m.p.t().contiguous(), p=self.param(b, a, share=0.8)),
            lambda: plain(lambda m: m.p @ m.q, p=self.param(a, k), q=self.param(k, b)),
            lambda: plain(lambda m: m.f + m.p @ m.q, f=frozen, p=self.param(a, k), q=self.param(k, b)),
            lambda: plain(lambda m: m.p / m.p.norm(dim=1, keepdim=True), p=self.param(a, b)),
            lambda: plain(lambda m: F.normalize(m.p, dim=-1) * m.s.get(), p=self.param(a, b), s=self.scalar()),
            lambda: plain(lambda m: m.w.get().softmax(-1), w=inner()),
            lambda: plain(lambda m: torch.outer(m.u.get(), m.v.get()), u=self.vector(a, 1), v=self.vector(b, 1)),
            lambda: plain(lambda m: m.u.get()[:, None] * m.v.get(), u=self.vector(a, 1), v=self.vector(b, 1)),
            lambda: plain(lambda m: m.w.get().triu(-1), w=inner()),
            lambda: plain(lambda m: m.e(torch.arange(a)), e=nn.Embedding(a + 1, b)),
            lambda: plain(lambda m: m.e.weight[:a], e=nn.Embedding(a + 1, b)),
            lambda: plain(lambda m: torch.stack([m.v.get()] * a) * m.p, v=self.vector(b, 1), p=self.param(a, b)),
            lambda: plain(lambda m: m.w.get()[order], w=inner()),
            lambda: plain(lambda m: m.p.view(a, k, b).mean(1), p=self.param(a, k * b)),
            lambda: plain(lambda m: torch.cat(m.p.chunk(2, 0)[::-1]), p=self.param(a, b)),
            lambda: plain(lambda m: F.linear(m.p, m.q), p=self.param(a, k), q=self.param(b, k)),
            lambda: plain(lambda m: torch.einsum("ak,kb->ab", m.p, m.q), p=self.param(a, k), q=self.param(k, b)),
            lambda: plain(lambda m: m.l(m.p).view(a, b), p=self.param(k), l=nn.Linear(k, a * b)),
            lambda: plain(lambda m: m.p.repeat(a, 1), p=self.param(1, b)),
            lambda: plain(lambda m: m.p.expand(a, b), p=self.param(1, b)),
            lambda: plain(lambda m: torch.block_diag(m.p, m.q)[:a, :b], p=self.param(a, k), q=self.param(1, b)),
            lambda: plain(
                lambda m: F.interpolate(m.p[None, None], size=(a, b), mode="bilinear")[0, 0], p=self.param(k, k)
            ),
        ]
        if a == b:
            options += [
                lambda: plain(lambda m: m.p + m.p.T, p=self.param(a, a)),
                lambda: plain(lambda m: torch.linalg.matrix_exp(m.p * 0.3), p=self.param(a, a)),
                lambda: plain(lambda m: torch.diag(m.v.get()), v=self.vector(a, 1)),
            ]
        return self.choice(options)()


def _written(p: Tensor, q: Tensor) -> Tensor:
    out = torch.zeros_like(p)
    out[0] = q[0]
    out[1:] = p[1:]
    return out


# -- blocks ----------------------------------------------------------------------------------------
Builder = Callable[[Draw, State], tuple[nn.Module, State]]
BLOCKS: dict[str, list[tuple[Builder, float]]] = {"vec": [], "seq": [], "tmj": [], "img": []}
COUPLERS: dict[str, list[Builder]] = {"vec": [], "seq": [], "tmj": [], "img": []}
MAYBE: dict[str, list[Builder]] = {"vec": [], "seq": [], "tmj": [], "img": []}
LAST = "vec seq tmj"


def block(kinds: str, weight: float = 1.0) -> Callable[[Builder], Builder]:
    """Register a builder for hidden states of these kinds."""

    def register(build: Builder) -> Builder:
        for kind in kinds.split():
            BLOCKS[kind].append((build, weight))
        return build

    return register


def pick(d: Draw, s: State) -> tuple[nn.Module, State]:
    """A block of any sort."""
    builders, weights = zip(*BLOCKS[s.kind], strict=True)
    return d.choices(builders, weights)[0](d, s)


def keep(d: Draw, s: State) -> nn.Module:
    """A block that leaves kind and sizes as they are."""
    for _ in range(20):
        m, after = pick(d, s)
        if after == s:
            return m
    return Block("nothing", lambda b, h, e: h)


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
    letters = "abcdefg"[: 1 if s.kind == "vec" else 2]
    fs: list[tuple[str, Callable[..., Tensor]]] = [
        ("h @ w", lambda b, h, e: h @ b.w.get()),
        ("torch.matmul", lambda b, h, e: torch.matmul(h, b.w.get())),
        ("einsum", lambda b, h, e: torch.einsum(f"{letters}x,xy->{letters}y", h, b.w.get())),
        ("einsum w first", lambda b, h, e: torch.einsum(f"xy,{letters}x->{letters}y", b.w.get(), h)),
        ("einsum ...", lambda b, h, e: torch.einsum("...x,xy->...y", h, b.w.get())),
        ("tensordot", lambda b, h, e: torch.tensordot(h, b.w.get(), 1)),
        ("addmm", lambda b, h, e: torch.addmm(b.v.get(), h.reshape(-1, s.c), b.w.get()).view(*h.shape[:-1], out)),
        ("addmm beta", lambda b, h, e: torch.addmm(b.v.get(), h.reshape(-1, s.c), b.w.get(), beta=0.5, alpha=2).view(*h.shape[:-1], out)),
        ("mm folded", lambda b, h, e: h.flatten(0, -2).mm(b.w.get()).unflatten(0, h.shape[:-1])),
        ("w.T @ h.T", lambda b, h, e: (b.w.get().T @ h.mT).mT),
        ("sum of h * w", lambda b, h, e: (h[..., None] * b.w.get()).sum(-2)),
        ("bmm expanded", lambda b, h, e: torch.bmm(h.unsqueeze(-2).flatten(0, -3), b.w.get().expand(h[..., 0].numel(), s.c, out)).view(*h.shape[:-1], out)),
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
            ("standardise", lambda b, h, e: (h - h.mean(-1, keepdim=True)) / (1 + h.std(-1, keepdim=True, unbiased=False))),
        ]
    )  # fmt: skip
    return Block(label, f, p=d.param(1)), s


@block("vec seq tmj img", 2)
def combine(d: Draw, s: State) -> tuple[nn.Module, State]:
    """Residuals, branches, re-use, islands."""
    a, b_ = keep(d, s), keep(d, s)
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


def _uses_ids(m: nn.Module) -> bool:
    return any("ids" in getattr(x, "label", "") for x in m.modules())


def _without(m: Any, h: Tensor, e: Any) -> Tensor:
    with torch.no_grad():
        return m(h, e)


def _halves(m: Any, h: Tensor, axis: int) -> Tensor:
    cut = h.shape[axis] // 2
    if not cut:
        return m(h)
    parts = h.narrow(axis, 0, cut), h.narrow(axis, cut, h.shape[axis] - cut)
    return torch.cat([m(part) for part in parts], axis)


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
            ("split", lambda b, h, e: torch.cat([h.split([half, s.c - half], -1)[1], h[..., :half] * b.v.get()[:half]], -1)),
            ("index", lambda b, h, e: h[..., order] * b.v.get()[order]),
            ("strided", lambda b, h, e: torch.cat([h[..., ::2] + b.v.get()[::2], h[..., 1::2]], -1)),
            ("unbind", lambda b, h, e: torch.stack([x * b.s.get() for x in h.unbind(-1)], -1)),
            ("unfold", lambda b, h, e: F.pad(h, (1, 0)).unfold(-1, 2, 1).sum(-1) * b.v.get()),
        ]
    )  # fmt: skip
    return Block(label, f, v=d.vector(s.c), s=d.scalar()), s


@block("seq tmj", 3)
def along_time(d: Draw, s: State) -> tuple[nn.Module, State]:
    """Folding, permuting, positions, class tokens, mixing over positions."""
    time_major = s.kind == "tmj"
    fix = (lambda v: v[:, None]) if time_major else (lambda v: v)
    axis = int(not time_major)
    tokens = d.matrix(s.t, s.c)
    inner = keep(d, replace(s, kind="vec"))
    if _uses_ids(inner) or any(isinstance(m, nn.BatchNorm1d) for m in inner.modules()):
        inner = Block("tanh", lambda b, h, e: h.tanh())
    members = {"p": tokens, "q": d.vector(s.c), "inner": inner, "mix": d.matrix(s.t, s.t)}
    extra = d.randint(1, 2)
    members["cls"] = d.matrix(extra, s.c)
    fold = lambda b, h, e: b.inner(h.reshape(-1, s.c), e).reshape(h.shape)  # noqa: E731
    other = lambda b, h, e: fold(b, h.transpose(0, 1), e).transpose(0, 1)  # noqa: E731
    cls = lambda b, h: (  # noqa: E731
        b.cls.get()[:, None].expand(-1, h.shape[1], -1) if time_major else b.cls.get().expand(len(h), -1, -1)
    )
    longer = replace(s, t=s.t + extra)
    fs: list[tuple[str, Callable[..., Tensor], State, bool]] = [
        ("positions", lambda b, h, e: h + fix(b.p.get()), s, True),
        ("positions scaled", lambda b, h, e: h * fix(b.p.get()[None])[0] if not time_major else h * fix(b.p.get()), s, True),
        ("positions repeated", lambda b, h, e: h + (fix(b.p.get()).repeat(1, h.shape[1], 1) if time_major else b.p.get().repeat(len(h), 1, 1)), s, True),
        ("fold", fold, s, False),
        ("fold the other way", other, s, False),
        ("flip time", lambda b, h, e: h.flip(axis), s, False),
        ("roll time", lambda b, h, e: h.roll(1, axis) * b.q.get(), s, False),
        ("cumsum time", lambda b, h, e: h.cumsum(axis) * 0.5, s, False),
        ("unbind time", lambda b, h, e: torch.stack([b.inner(x, e) for x in h.unbind(axis)], axis), s, False),
        ("mix", lambda b, h, e: torch.einsum("st,tnc->snc" if time_major else "st,ntc->nsc", b.mix.get(), h), s, True),
        ("mix @", lambda b, h, e: (h.movedim(axis, -1) @ b.mix.get()).movedim(-1, axis), s, True),
        ("mix from the left", lambda b, h, e: b.mix.get() @ h if not time_major else (b.mix.get() @ h.transpose(0, 1)).transpose(0, 1), s, True),
        ("class token", lambda b, h, e: torch.cat([cls(b, h), h], axis), longer, False),
        ("class token assigned", lambda b, h, e: _tokens(h, cls(b, h), axis), longer, False),
        ("first token", lambda b, h, e: torch.cat([h.narrow(axis, 0, 1) * b.q.get(), h.narrow(axis, 1, s.t - 1)], axis), s, True),
        ("set first", lambda b, h, e: _set_first(h * 1.0, b.q.get(), axis), s, False),
        ("prompt", lambda b, h, e: torch.cat([h, cls(b, h) * h.mean(axis, keepdim=True)], axis), longer, False),
        ("bias by index", lambda b, h, e: h + fix(b.p.get()[torch.arange(h.shape[axis])]), s, True),
        ("transpose", lambda b, h, e: h.transpose(0, 1), replace(s, kind="seq" if time_major else "tmj"), False),
        ("transpose copy", lambda b, h, e: h.permute(1, 0, 2).contiguous(), replace(s, kind="seq" if time_major else "tmj"), False),
    ]  # fmt: skip
    label, f, after, fixes = d.choice(fs)
    d.fixed_t |= fixes
    return Block(label, f, **members), after


def _tokens(h: Tensor, cls: Tensor, axis: int) -> Tensor:
    shape = list(h.shape)
    shape[axis] += cls.shape[axis]
    out = torch.zeros(shape)
    cut = cls.shape[axis]
    if axis:
        out[:, :cut], out[:, cut:] = cls, h
    else:
        out[:cut], out[cut:] = cls, h
    return out


def _set_first(h: Tensor, v: Tensor, axis: int) -> Tensor:
    if axis:
        h[:, 0] = v
    else:
        h[0] = v
    return h


@block("seq tmj", 1.5)
def attention(d: Draw, s: State) -> tuple[nn.Module, State]:
    time_major = s.kind == "tmj"
    heads = d.choice([k for k in (1, 2, 3) if s.c % k == 0])
    order = d.choice(["nt", "tn"])
    if d.chance(0.5):
        kv = d.chance(0.2)
        layer = nn.MultiheadAttention(s.c, heads, bias=d.chance(0.7), batch_first=not time_major, add_bias_kv=kv)
        weights = d.chance(0.5)
        return Block("attention", lambda b, h, e: b.m(h, h, h, need_weights=weights)[0], m=layer), s
    q, k, v = (d.matrix(s.c, s.c) for _ in range(3))
    t = d.t + 8
    bias = d.param(2 * t + 1, heads)
    learned = d.chance(0.3)

    def attend(b: Any, h: Tensor, e: Any) -> Tensor:
        h = h.transpose(0, 1) if time_major else h
        split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
        queries, keys, values = (split(h @ w.get()) for w in (b.q, b.k, b.v))
        at = torch.arange(h.shape[1])
        relative = b.bias[(at[:, None] - at[None]).clamp(-t, t) + t].permute(2, 0, 1)
        if learned:
            y = F.scaled_dot_product_attention(queries, keys, values, attn_mask=relative)
        else:
            scores = queries @ keys.mT / queries.shape[-1] ** 0.5 + relative
            y = scores.softmax(-1) @ values
        y = y.transpose(1, 2).flatten(2)
        return y.transpose(0, 1) if time_major else y

    return Block(f"own attention {order}", attend, q=q, k=k, v=v, bias=bias), s


@block("seq tmj", 1)
def recurrent(d: Draw, s: State) -> tuple[nn.Module, State]:
    out = d.randint(1, 4)
    kind = d.choice([nn.LSTM, nn.GRU, nn.RNN])
    layers, both = d.choice([1, 1, 2]), d.chance(0.3)
    rnn = kind(s.c, out, layers, bias=d.chance(0.8), batch_first=s.kind == "seq", bidirectional=both)
    start = d.chance(0.15) and kind is not nn.LSTM
    members: dict[str, Any] = {"m": rnn}
    if start:
        members["p"] = d.param(layers * (1 + both), 1, out)

    def run(b: Any, h: Tensor, e: Any) -> Tensor:
        return b.m(h, b.p.expand(-1, h.shape[s.axis], -1))[0] if start else b.m(h)[0]

    return Block(f"{kind.__name__}{' learned start' if start else ''}", run, **members), replace(s, c=out * (1 + both))


@block("seq", 1.5)
def lookups(d: Draw, s: State) -> tuple[nn.Module, State]:
    """Integer inputs: tables, bags, gathers."""
    table = d.matrix(IDS, s.c)
    padding = d.choice([None, 2])
    bag = nn.EmbeddingBag(IDS, s.c, mode=d.choice(["sum", "mean"]))
    ids = lambda h, e: e["ids"][:, torch.arange(h.shape[1]) % e["ids"].shape[1]]  # noqa: E731
    fs: list[tuple[str, Callable[..., Tensor]]] = [
        ("ids Embedding", lambda b, h, e: h + b.emb(ids(h, e))),
        ("ids F.embedding", lambda b, h, e: h * F.embedding(ids(h, e), b.w.get())),
        ("ids index", lambda b, h, e: h + b.w.get()[ids(h, e)]),
        ("ids index_select", lambda b, h, e: h + b.w.get().index_select(0, ids(h, e).flatten()).view_as(h)),
        ("ids one_hot", lambda b, h, e: h + F.one_hot(ids(h, e), IDS).to(h.dtype) @ b.w.get()),
        ("ids bag", lambda b, h, e: h + b.bag(e["ids"])[:, None]),
        ("ids scalar table", lambda b, h, e: h * b.t[ids(h, e)][..., None]),
        ("ids take", lambda b, h, e: h + b.t.take(ids(h, e)).unsqueeze(-1)),
        ("ids mask", lambda b, h, e: torch.where((ids(h, e) > 3)[..., None], b.v.get(), h)),
        ("ids assign", lambda b, h, e: _assign_mask(h * 1.0, ids(h, e) > 2, b.v.get())),
        ("ids gather", lambda b, h, e: h + torch.gather(b.t.expand(*h.shape[:2], IDS), 2, ids(h, e)[..., None])),
        ("ids float", lambda b, h, e: h + ids(h, e)[..., None] * b.v.get()),
        ("ids int times s", lambda b, h, e: h + (ids(h, e) * b.s).unsqueeze(-1)),
        ("ids of first", lambda b, h, e: h + b.w.get()[e["ids"][:, 0]][:, None]),
        ("ids one column", lambda b, h, e: h + b.w.get()[ids(h, e), 0][..., None]),
        ("ids expert", lambda b, h, e: torch.einsum("ntc,ntcd->ntd", h, b.x[ids(h, e) % 2])),
        ("ids scatter_add", lambda b, h, e: h + torch.zeros_like(h[..., :1]).repeat(1, 1, IDS).scatter_add(2, ids(h, e)[..., None], h[..., :1]) @ b.w.get()),
    ]  # fmt: skip
    label, f = d.choice(fs)
    members = {"w": table, "emb": nn.Embedding(IDS, s.c, padding_idx=padding), "bag": bag, "t": d.param(IDS)}
    members |= {"v": d.vector(s.c), "s": d.param(), "x": d.param(2, s.c, s.c)}
    return Block(label, f, **members), s


def _assign_mask(h: Tensor, mask: Tensor, v: Tensor) -> Tensor:
    h[mask] = v
    return h


def _routed(h: Tensor, mask: Tensor, layer: nn.Module) -> Tensor:
    """Tokens of all samples gathered for an expert, as in a mixture of experts."""
    out = torch.zeros_like(h)
    out[mask] = layer(h[mask])
    return h + out


@block("seq", 1)
def convolve_time(d: Draw, s: State) -> tuple[nn.Module, State]:
    out = d.width()
    groups = d.choice([g for g in (1, 2, 3) if s.c % g == 0 and out % g == 0])
    kernel = d.choice([1, 3])
    mode = d.choice(["zeros", "zeros", "replicate", "circular"])
    layer = nn.Conv1d(s.c, out, kernel, padding=kernel // 2, groups=groups, padding_mode=mode)
    return Block("Conv1d", lambda b, h, e: b.m(h.transpose(1, 2)).transpose(1, 2), m=layer), replace(s, c=out)


@block("vec seq", 0.7)
def bilinear(d: Draw, s: State) -> tuple[nn.Module, State]:
    out = d.randint(1, 4)
    layer = nn.Bilinear(s.c, s.c, out, bias=d.chance(0.5))
    return Block("Bilinear", lambda b, h, e: b.m(h, h.tanh()), m=layer), replace(s, c=out)


@block("seq tmj", 1.5)
def pool(d: Draw, s: State) -> tuple[nn.Module, State]:
    axis = 1 - s.axis
    fs: list[tuple[str, Callable[..., Tensor]]] = [
        ("mean over time", lambda b, h, e: h.mean(axis)),
        ("first of time", lambda b, h, e: h.select(axis, 0)),
        ("last of time", lambda b, h, e: h.select(axis, -1)),
        ("max over time", lambda b, h, e: h.amax(axis)),
        ("pool by query", lambda b, h, e: ((h @ b.q.get()).softmax(axis)[..., None] * h).sum(axis)),
        ("weighted", lambda b, h, e: torch.einsum("tnc,t->nc" if axis == 0 else "ntc,t->nc", h, b.t.get())),
    ]
    label, f = d.choice(fs)
    d.fixed_t |= label == "weighted"
    return Block(label, f, q=d.vector(s.c), t=d.vector(s.t)), replace(s, kind="vec", t=1)


@block("vec", 1)
def to_sequence(d: Draw, s: State) -> tuple[nn.Module, State]:
    t = d.choice([d.n, d.randint(1, 4)])
    fs: list[tuple[str, Callable[..., Tensor], bool]] = [
        ("outer with tokens", lambda b, h, e: h[:, None] * b.w.get(), False),
        ("plus tokens", lambda b, h, e: b.w.get()[None] + h.unsqueeze(1), False),
        ("unfolded", lambda b, h, e: (h @ b.x.get()).view(len(h), t, s.c), False),
        ("unfolded features first", lambda b, h, e: (h @ b.x.get()).view(len(h), s.c, t).mT, False),
        ("repeated", lambda b, h, e: h[:, None].expand(-1, t, -1), False),
    ]
    label, f, _ = d.choice(fs)
    d.fixed_t = True
    return Block(label, f, w=d.matrix(t, s.c), x=d.matrix(s.c, t * s.c, 1)), replace(s, kind="seq", t=t)


@block("vec", 0.6)
def to_image(d: Draw, s: State) -> tuple[nn.Module, State]:
    side, c = d.choice([2, 3, d.n]), d.choice([2, 4])
    layer = nn.Linear(s.c, c * side * side)
    return Block("to image", lambda b, h, e: b.m(h).view(-1, c, side, side), m=layer), State("img", c, 1, side)


@block("img", 3)
def convolve(d: Draw, s: State) -> tuple[nn.Module, State]:
    out = d.choice([2, 3, 4, d.n])
    groups = d.choice([g for g in (1, 2, s.c) if s.c % g == 0 and out % g == 0])
    kernel = d.choice([1, 3])
    how = d.randrange(4)
    after = replace(s, c=out)
    if how == 0:
        w = d.matrix(out, s.c * kernel * kernel)
        f = lambda b, h, e: F.conv2d(h, b.w.get().view(out, s.c, kernel, kernel), b.v.get(), padding=kernel // 2)  # noqa: E731
        return Block("F.conv2d", f, w=w, v=d.vector(out)), after
    if how == 1:
        transposed = nn.ConvTranspose2d(s.c, out, kernel, padding=kernel // 2, groups=groups)
        return Block("ConvTranspose2d", lambda b, h, e: b.m(h), m=transposed), after
    if how == 2:
        dilated = nn.Conv2d(s.c, out, 3, padding="same", dilation=d.choice([1, 2]), bias=d.chance(0.5))
        return Block("Conv2d dilated", lambda b, h, e: b.m(h), m=dilated), after
    mode = d.choice(["zeros", "circular", "replicate"])
    conv = nn.Conv2d(s.c, out, kernel, padding=kernel // 2, groups=groups, padding_mode=mode)
    return Block("Conv2d", lambda b, h, e: b.m(h), m=conv), after


@block("img", 2)
def image_step(d: Draw, s: State) -> tuple[nn.Module, State]:
    norms = [nn.GroupNorm(1, s.c), nn.InstanceNorm2d(s.c, affine=True), nn.BatchNorm2d(s.c).eval()]
    if s.side == 1:
        norms.pop(1)
    layer = d.choice(norms)
    for p in layer.parameters():
        nn.init.normal_(p)
    f, label = d.choice(
        [
            (lambda b, h, e: b.m(h), type(layer).__name__),
            (lambda b, h, e: h * b.v.get()[:, None, None], "channel scale"),
            (lambda b, h, e: h + b.p.get().view(s.c, s.side, s.side), "map of positions"),
            (lambda b, h, e: F.prelu(h, b.v.get()), "prelu"),
            (lambda b, h, e: F.max_pool2d(h, 3, 1, 1), "max pool"),
            (lambda b, h, e: F.relu(h * 1.0, inplace=True), "relu"),
            (lambda b, h, e: (h.permute(0, 2, 3, 1) * b.v.get()).permute(0, 3, 1, 2), "channels last scale"),
            (lambda b, h, e: h.contiguous(memory_format=torch.channels_last) + b.v.get().view(1, -1, 1, 1), "channels_last"),
            (lambda b, h, e: h * (h.mean((2, 3)) @ b.w.get()).sigmoid()[..., None, None], "squeeze excite"),
        ]
    )  # fmt: skip
    members = {"v": d.vector(s.c), "p": d.matrix(s.c, s.side**2, 1), "w": d.matrix(s.c, s.c), "m": layer}
    return Block(label, f, **members), s


@block("img", 1)
def from_image(d: Draw, s: State) -> tuple[nn.Module, State]:
    label, f, after = d.choice(
        [
            ("flatten", lambda b, h, e: h.flatten(1), State("vec", s.c * s.side**2)),
            ("global mean", lambda b, h, e: h.mean((2, 3)), State("vec", s.c)),
            ("tokens", lambda b, h, e: h.flatten(2).mT, State("seq", s.c, s.side**2)),
            ("rows as time", lambda b, h, e: h.mean(3).permute(2, 0, 1), State("tmj", s.c, s.side)),
        ]
    )
    d.fixed_t = True
    return Block(label, f), after


# -- ill on purpose --------------------------------------------------------------------------------
def coupler(kinds: str) -> Callable[[Builder], Builder]:
    """Register a builder of a block that lets samples influence each other."""

    def register(build: Builder) -> Builder:
        for kind in kinds.split():
            COUPLERS[kind].append(build)
        return build

    return register


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
            ("kernel of samples", lambda b, h, e: torch.einsum("nm,m...->n...", h.movedim(a, 0).flatten(1) @ h.movedim(a, 0).flatten(1).T, h.movedim(a, 0)).movedim(0, a)),
            ("one from another", lambda b, h, e: h + F.pad(h.narrow(a, 0, 1) * 0.5, _pads(h.dim(), a, h.shape[a] - 1))),
            ("mixed", lambda b, h, e: torch.einsum("nm,m...->n...", torch.ones(h.shape[a], h.shape[a]).tril(), h.movedim(a, 0)).movedim(0, a)),
        ]
    )  # fmt: skip
    return Coupler(label, f).at(a), s


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


def maybe(kinds: str) -> Callable[[Builder], Builder]:
    """Register a builder of a block that packext may refuse, but must not get wrong."""

    def register(build: Builder) -> Builder:
        for kind in kinds.split():
            MAYBE[kind].append(build)
        return build

    return register


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
            ("sparse ids", lambda b, h, e: h + F.embedding(e["ids"].flatten()[: 1].expand(len(h)), b.w, sparse=True).view(len(h), *[1] * (h.dim() - 2), s.c)),
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
            ("positions as input", lambda b, h, e: h + b.w[e["ids"][0, 0] * 0 + torch.arange(h.shape[-1]) % IDS].mean(-1)),
        ]
    )  # fmt: skip
    if label == "a row per sample":
        d.fixed_t = True
    draws = label.startswith("dropout")
    d.training_random |= draws
    members = {"z": nn.Parameter(torch.randn(shape)), "v": d.vector(s.c), "w": nn.Parameter(torch.randn(IDS, s.c))}
    members["l"] = nn.Linear(s.c, s.c)
    return Block(label, f, **members), s


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


# -- the whole -------------------------------------------------------------------------------------
class Model(nn.Module):
    """Blocks in a chain, behind an interface that differs from model to model."""

    def __init__(self, blocks: list[nn.Module], state: State, out: State, form: dict[str, Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.start, self.out, self.form = state, out, form
        self.head = nn.Linear(out.c, 2) if form["outputs"] == "two heads" else None
        self.unused = nn.Parameter(torch.randn(3)) if form["unused"] else None
        self.aux: Tensor | None = None

    def forward(self, x: Any, ids: Any = None) -> Any:
        if isinstance(x, dict):
            x, ids = x["x"], x["ids"]
        if self.form["batch_axis"]:
            ids = ids.t()
        h, extra = x, {"ids": ids}
        for i, step in enumerate(self.blocks):
            h = step(h, extra)
            if i == self.form["aux at"]:
                self.aux = h.movedim(self.form["aux axis"], 0).flatten(1).tanh()
        if self.head is not None:
            return {"a": h, "b": (self.head(h).tanh(), None)}
        return h


@dataclass
class Problem:
    """A model with inputs, and what is known of it.

    Attributes:
        seed: from which it was drawn.
        model: not extended.
        loss: a loss module; the loss of a batch is the mean or the sum of those of the samples.
        axis: of the samples in the inputs.
        out_axis: of the samples in the outputs.
        ill: "" for a model that must come out right; "coupled" or "maybe refused".
        label: the blocks, in words.
        sizes: N and T of each batch.
        aux: "" or how a loss beside the output is formed from a hidden state.
    """

    seed: int
    model: Model
    loss: nn.Module
    axis: int
    out_axis: int
    ill: str
    label: str
    sizes: list[tuple[int, int]]
    draw: Draw = field(repr=False)
    aux: str = ""
    draws: bool = False

    def inputs(self, n: int, t: int) -> Any:
        """A batch of `n` samples with `t` positions."""
        s = self.model.start
        shape = {"vec": (n, s.c), "seq": (n, t, s.c), "tmj": (t, n, s.c), "img": (n, s.c, s.side, s.side)}[s.kind]
        x, ids = torch.randn(shape), torch.randint(IDS, (n, t))
        if self.axis:
            ids = ids.t()
        form = self.model.form["inputs"]
        if form == "kwargs":
            return {"x": x, "ids": ids}
        return ({"x": x, "ids": ids},) if form == "dict" else (x, ids)

    def targets(self, outputs: Any) -> Any:
        """Targets for these outputs."""
        return [torch.randn(y.shape) for y in flat(outputs)]

    def total(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of a batch."""
        parts = [self.loss(y, t) for y, t in zip(flat(outputs), targets, strict=True)]
        total = sum(parts[1:], parts[0])
        if self.aux:
            aux = self.model.aux
            assert aux is not None
            mean = self.loss.reduction == "mean"
            if self.aux == "of the batch":
                return total + aux.mean(0).square().sum()
            return total + (aux.square().sum() / len(aux) if mean else aux.square().sum())
        return total


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of an output."""
    return [outputs] if isinstance(outputs, Tensor) else [outputs["a"], outputs["b"][0]]


def generate(seed: int) -> Problem:
    """The problem of this seed. Build it with float64 as the default dtype."""
    d = Draw(seed)
    kind = d.choice(["vec", "seq", "seq", "seq", "tmj", "img"])
    c = d.width() if kind != "img" else d.choice([1, 2, 4])
    state = start = State(kind, c, d.t, d.choice([2, 3, 4]))
    d.fixed_t = kind == "img"
    fate = d.random()
    ill = "coupled" if fate < 0.12 else "maybe refused" if fate < 0.2 else ""
    length = d.randint(2, 6)
    where = d.randint(1 if ill == "coupled" else 0, length - 1)
    blocks: list[nn.Module] = []
    for i in range(length):
        m, after = pick(d, state)
        if i == where and ill:
            choices = (COUPLERS if ill == "coupled" else MAYBE)[state.kind]
            if choices:
                before, _ = d.choice(choices)(d, state)
                blocks.append(before)
            else:
                ill = ""
        blocks.append(m)
        state = after
    if state.kind == "img" or d.chance(0.4):
        flatten = from_image if state.kind == "img" else None
        if flatten is not None:
            m, state = flatten(d, state)
            blocks.append(m)
        m, state = linear(d, state)
        blocks.append(m)
    form = {
        "batch_axis": start.axis,
        "outputs": d.choice(["one", "one", "two heads"]),
        "inputs": d.choice(["args", "kwargs", "dict"]),
        "unused": d.chance(0.1),
        "aux at": -1,
        "aux axis": 0,
    }
    aux = ""
    if not ill and d.chance(0.04):
        form["aux at"], form["aux axis"] = len(blocks) - 1, state.axis
        aux = d.choice(["of the batch", "of each sample"])
        ill = "coupled aside" if aux == "of the batch" else "maybe refused"
    model = Model(blocks, start, state, form)
    loss = d.choice([nn.MSELoss, nn.SmoothL1Loss])(reduction=d.choice(["mean", "sum"]))
    sizes = [(d.n, d.t)]
    if d.chance(0.5) and ill != "maybe refused":
        n = d.choice([1, 2, 3, 4, 5])
        sizes.append((n, d.t if d.fixed_t else d.choice([n, d.t, d.randint(1, 5)])))
    label = " > ".join(map(str, blocks))
    return Problem(
        seed, model, loss, start.axis, state.axis, ill, label, sizes, d, aux, d.training_random
    )  # fmt: skip
