"""What the generator of random models draws from: values made of parameters, and the register of blocks."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        self.depth = 0
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
    known = sorted(BLOCKS[s.kind], key=lambda entry: entry[0].__name__)
    builders, weights = zip(*known, strict=True)
    return d.choices(builders, weights)[0](d, s)


def keep(d: Draw, s: State) -> nn.Module:
    """A block that leaves kind and sizes as they are."""
    for _ in range(20):
        m, after = pick(d, s)
        if after == s:
            return m
    return Block("nothing", lambda b, h, e: h)


def uses_ids(m: nn.Module) -> bool:
    return any("ids" in getattr(x, "label", "") for x in m.modules())


def coupler(kinds: str) -> Callable[[Builder], Builder]:
    """Register a builder of a block that lets samples influence each other."""

    def register(build: Builder) -> Builder:
        for kind in kinds.split():
            COUPLERS[kind].append(build)
        return build

    return register


def maybe(kinds: str) -> Callable[[Builder], Builder]:
    """Register a builder of a block that packext may refuse, but must not get wrong."""

    def register(build: Builder) -> Builder:
        for kind in kinds.split():
            MAYBE[kind].append(build)
        return build

    return register
