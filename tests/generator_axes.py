"""Blocks of random models that work along time and space: positions, attention, recurrences, tables, convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.generator_draw import IDS, Block, Draw, State, block, keep, uses_ids


@block("seq tmj", 3)
def along_time(d: Draw, s: State) -> tuple[nn.Module, State]:
    """Folding, permuting, positions, class tokens, mixing over positions."""
    time_major = s.kind == "tmj"
    fix = (lambda v: v[:, None]) if time_major else (lambda v: v)
    axis = int(not time_major)
    tokens = d.matrix(s.t, s.c)
    inner = keep(d, replace(s, kind="vec"))
    if uses_ids(inner) or any(isinstance(m, nn.BatchNorm1d) for m in inner.modules()):
        inner = Block("tanh", lambda b, h, e: h.tanh())
    members = {"p": tokens, "q": d.vector(s.c), "inner": inner, "mix": d.matrix(s.t, s.t)}
    extra = d.randint(1, 2)
    members["cls"] = d.matrix(extra, s.c)
    fold = lambda b, h, e: b.inner(h.reshape(-1, s.c), e).reshape(h.shape)  # noqa: E731
    other = lambda b, h, e: fold(b, h.transpose(0, 1), e).transpose(0, 1)  # noqa: E731
    cls = lambda b, h: (  # noqa: E731
        b.cls.get()[:, None].expand(-1, h.shape[1], -1) if time_major else b.cls.get().expand(len(h), -1, -1)
    )
    longer, turned = replace(s, t=s.t + extra), replace(s, kind="seq" if time_major else "tmj")
    repeated = lambda b, h: (  # noqa: E731
        fix(b.p.get()).repeat(1, h.shape[1], 1) if time_major else b.p.get().repeat(len(h), 1, 1)
    )
    swap = lambda h: h.transpose(0, 1) if time_major else h  # noqa: E731
    fs: list[tuple[str, Callable[..., Tensor], State, bool]] = [
        ("positions", lambda b, h, e: h + fix(b.p.get()), s, True),
        ("positions scaled", lambda b, h, e: h * fix(b.p.get()), s, True),
        ("positions repeated", lambda b, h, e: h + repeated(b, h), s, True),
        ("fold", fold, s, False),
        ("fold the other way", other, s, False),
        ("flip time", lambda b, h, e: h.flip(axis), s, False),
        ("roll time", lambda b, h, e: h.roll(1, axis) * b.q.get(), s, False),
        ("cumsum time", lambda b, h, e: h.cumsum(axis) * 0.5, s, False),
        ("unbind time", lambda b, h, e: torch.stack([b.inner(x, e) for x in h.unbind(axis)], axis), s, False),
        ("mix", lambda b, h, e: torch.einsum("st,tnc->snc" if time_major else "st,ntc->nsc", b.mix.get(), h), s, True),
        ("mix @", lambda b, h, e: (h.movedim(axis, -1) @ b.mix.get()).movedim(-1, axis), s, True),
        ("mix from the left", lambda b, h, e: swap(b.mix.get() @ swap(h)), s, True),
        ("class token", lambda b, h, e: torch.cat([cls(b, h), h], axis), longer, False),
        ("class token assigned", lambda b, h, e: _tokens(h, cls(b, h), axis), longer, False),
        ("first token", lambda b, h, e: _first(h, b.q.get(), axis), s, False),
        ("set first", lambda b, h, e: _set_first(h * 1.0, b.q.get(), axis), s, False),
        ("prompt", lambda b, h, e: torch.cat([h, cls(b, h) * h.mean(axis, keepdim=True)], axis), longer, False),
        ("bias by index", lambda b, h, e: h + fix(b.p.get()[torch.arange(h.shape[axis])]), s, True),
        ("transpose", lambda b, h, e: h.transpose(0, 1), turned, False),
        ("transpose copy", lambda b, h, e: h.permute(1, 0, 2).contiguous(), turned, False),
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


def _first(h: Tensor, v: Tensor, axis: int) -> Tensor:
    return torch.cat([h.narrow(axis, 0, 1) * v, h.narrow(axis, 1, h.shape[axis] - 1)], axis)


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
        ("ids scatter_add", lambda b, h, e: h + _scattered(h[..., :1], ids(h, e)) @ b.w.get()),
    ]  # fmt: skip
    label, f = d.choice(fs)
    members = {"w": table, "emb": nn.Embedding(IDS, s.c, padding_idx=padding), "bag": bag, "t": d.param(IDS)}
    members |= {"v": d.vector(s.c), "s": d.param(), "x": d.param(2, s.c, s.c)}
    return Block(label, f, **members), s


def _scattered(h: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros_like(h).repeat(1, 1, IDS).scatter_add(2, ids[..., None], h)


def _assign_mask(h: Tensor, mask: Tensor, v: Tensor) -> Tensor:
    h[mask] = v
    return h


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
    fs: list[tuple[str, Callable[..., Tensor]]] = [
        ("outer with tokens", lambda b, h, e: h[:, None] * b.w.get()),
        ("plus tokens", lambda b, h, e: b.w.get()[None] + h.unsqueeze(1)),
        ("unfolded", lambda b, h, e: (h @ b.x.get()).view(len(h), t, s.c)),
        ("unfolded features first", lambda b, h, e: (h @ b.x.get()).view(len(h), s.c, t).mT),
        ("repeated", lambda b, h, e: h[:, None].expand(-1, t, -1)),
    ]
    label, f = d.choice(fs)
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
    norms = [nn.GroupNorm(1, s.c), nn.BatchNorm2d(s.c).eval(), nn.InstanceNorm2d(s.c, affine=True)]
    layer = d.choice(norms if s.side > 1 else norms[:2])
    for p in layer.parameters():
        nn.init.normal_(p)
    last = torch.channels_last
    f, label = d.choice(
        [
            (lambda b, h, e: _sound(b.m(h)), type(layer).__name__),
            (lambda b, h, e: h * b.v.get()[:, None, None], "channel scale"),
            (lambda b, h, e: h + b.p.get().view(s.c, s.side, s.side), "map of positions"),
            (lambda b, h, e: F.prelu(h, b.v.get()), "prelu"),
            (lambda b, h, e: F.max_pool2d(h, 3, 1, 1), "max pool"),
            (lambda b, h, e: F.relu(h * 1.0, inplace=True), "relu"),
            (lambda b, h, e: (h.permute(0, 2, 3, 1) * b.v.get()).permute(0, 3, 1, 2), "channels last scale"),
            (lambda b, h, e: h.contiguous(memory_format=last) + b.v.get().view(1, -1, 1, 1), "channels_last"),
            (lambda b, h, e: h * (h.mean((2, 3)) @ b.w.get()).sigmoid()[..., None, None], "squeeze excite"),
        ]
    )  # fmt: skip
    members = {"v": d.vector(s.c), "p": d.matrix(s.c, s.side**2, 1), "w": d.matrix(s.c, s.c), "m": layer}
    return Block(label, f, **members), s


def _sound(y: Tensor) -> Tensor:
    """Torch 2.13 gets the gradient of such norms wrong for a batch of one whose g is in channels-last order."""
    if y.requires_grad:
        y.register_hook(Tensor.contiguous)
    return y


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
