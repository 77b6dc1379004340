"""Blocks of random models that are torch's own layers, with the options that these have, and functions of the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint

from packext import _listening
from tests.generator_draw import IDS, Block, Draw, State, block, keep


@block("seq tmj", 1.5)
def cells(d: Draw, s: State) -> tuple[nn.Module, State]:
    """A cell at each position after the other, a packed sequence, or the last state of a recurrent layer."""
    out, time = d.randint(1, 4), 1 - s.axis
    how = d.randrange(4)
    if how == 0:
        gru = d.chance(0.5)
        cell = (nn.GRUCell if gru else nn.RNNCell)(s.c, out, bias=d.chance(0.7))
        start = d.vector(out)
        f = lambda b, h, e: _along(lambda x, y: b.m(x, y), h, b.p.get().expand(h.shape[s.axis], -1), time)  # noqa: E731
        return Block(type(cell).__name__, f, m=cell, p=start), replace(s, c=out)
    if how == 1:
        f = lambda b, h, e: _along_two(b.m, h, time)  # noqa: E731
        return Block("LSTMCell", f, m=nn.LSTMCell(s.c, out, bias=d.chance(0.7))), replace(s, c=out)
    both, layers = d.chance(0.4), d.choice([1, 2])
    kind = d.choice([nn.LSTM, nn.GRU, nn.RNN])
    options: dict[str, Any] = {"proj_size": 1} if kind is nn.LSTM and out > 1 and d.chance(0.3) else {}
    layer = kind(s.c, out, layers, batch_first=s.kind == "seq", bidirectional=both, **options)
    wide = options.get("proj_size", out) * (1 + both)
    if how == 2 and s.kind == "seq" and not d.fixed_t:
        return Block(f"packed {kind.__name__}", _packed, m=layer), replace(s, c=wide)
    last = lambda b, h, e: _first_of(b.m(h)[1]).movedim(1, 0).flatten(1)  # noqa: E731
    return Block(f"last state of {kind.__name__}", last, m=layer), replace(s, kind="vec", c=wide * layers, t=1)


def _along(f: Callable[[Tensor, Tensor], Tensor], h: Tensor, state: Tensor, time: int) -> Tensor:
    states = []
    for x in h.unbind(time):
        state = f(x, state)
        states.append(state)
    return torch.stack(states, time)


def _along_two(cell: nn.LSTMCell, h: Tensor, time: int) -> Tensor:
    state, states = None, []
    for x in h.unbind(time):
        state = cell(x, state)
        states.append(state[0])
    return torch.stack(states, time)


def _first_of(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


def _packed(b: Any, h: Tensor, e: Any) -> Tensor:
    lengths = 1 + e["ids"].sum(1) % h.shape[1]
    some = rnn.pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
    return rnn.pad_packed_sequence(b.m(some)[0], batch_first=True, total_length=h.shape[1])[0]


@block("seq tmj", 2)
def masked_attention(d: Draw, s: State) -> tuple[nn.Module, State]:
    """Attention with masks, its weights, other keys than queries, fewer heads for these, and whole encoder layers."""
    time_major = s.kind == "tmj"
    time, heads = 1 - s.axis, d.choice([k for k in (1, 2, 4) if s.c % k == 0])
    options: dict[str, Any] = {"batch_first": not time_major, "add_zero_attn": d.chance(0.2)}
    how = d.choice(["causal", "lengths", "float mask", "weights", "cross", "encoder", "decoder", "sdpa", "grouped"])
    layer: Any = nn.MultiheadAttention(s.c, heads, **options)
    need, average = d.chance(0.5), d.chance(0.5)
    if how in ("encoder", "decoder"):
        kind: Any = nn.TransformerEncoderLayer if how == "encoder" else nn.TransformerDecoderLayer
        layer = kind(
            s.c, heads, 5, 0.0, d.choice([F.relu, F.gelu]), batch_first=not time_major, norm_first=d.chance(0.5)
        )
        f = lambda b, h, e: b.m(h) if how == "encoder" else b.m(h, h.tanh())  # noqa: E731
        return Block(f"{how} layer", f, m=layer), s
    if how in ("sdpa", "grouped"):
        k = d.randint(1, 3)
        shared = heads if how == "sdpa" else 1
        causal, scale = d.chance(0.5), d.choice([None, 0.7])
        members = {"q": nn.Linear(s.c, heads * k), "k": nn.Linear(s.c, shared * k), "v": nn.Linear(s.c, shared * k)}
        swap = lambda x: x.transpose(0, 1) if time_major else x  # noqa: E731
        split = lambda x: swap(x).unflatten(-1, (-1, k)).transpose(1, 2)  # noqa: E731
        f = lambda b, h, e: swap(  # noqa: E731
            F.scaled_dot_product_attention(
                split(b.q(h)), split(b.k(h)), split(b.v(h)), is_causal=causal, scale=scale, enable_gqa=how == "grouped"
            ).transpose(1, 2).flatten(2)
        )  # fmt: skip
        return Block(how, f, **members), replace(s, c=heads * k)
    upper = lambda h: torch.ones(h.shape[time], h.shape[time]).triu(1).bool()  # noqa: E731
    fs: dict[str, Callable[..., Tensor]] = {
        "causal": lambda b, h, e: b.m(h, h, h, attn_mask=upper(h), is_causal=True, need_weights=need)[0],
        "lengths": lambda b, h, e: b.m(h, h, h, key_padding_mask=_padding(h, s), need_weights=need)[0],
        "float mask": lambda b, h, e: b.m(h, h, h, attn_mask=upper(h) * -0.5, need_weights=need)[0],
        "weights": lambda b, h, e: h * _weights(b.m(h, h, h, average_attn_weights=average)[1], s),
        "cross": lambda b, h, e: b.m(h, b.k(h).flip(time), b.k(h).flip(time).sin(), need_weights=need)[0],
    }
    key = nn.Linear(s.c, d.width())
    if how == "cross":
        wide = key.out_features
        layer = nn.MultiheadAttention(s.c, heads, kdim=wide, vdim=wide, **options)
    return Block(f"attention with {how}", fs[how], m=layer, k=key), s


def _padding(h: Tensor, s: State) -> Tensor:
    """`[N, T]`: what is left out, never the first position."""
    mask = (h.detach()[..., 0] > 0.5).t() if s.axis else h.detach()[..., 0] > 0.5
    return mask & (torch.arange(mask.shape[1]) > 0)


def _weights(w: Tensor, s: State) -> Tensor:
    """Of attention weights `[N, (H), T, S]` one number for each query."""
    w = (w if w.dim() == 3 else w.prod(1))[..., 0]
    return (w.t() if s.axis else w)[..., None]


@block("seq", 2)
def convolutions_of_time(d: Draw, s: State) -> tuple[nn.Module, State]:
    groups = d.choice([g for g in (1, 2, 3) if s.c % g == 0])
    out = groups * d.randint(1, 3)
    bias, k = d.chance(0.6), d.choice([1, 2, 3])
    turn = lambda f: lambda b, h, e: f(b, h.mT).mT  # noqa: E731
    if d.chance(0.5):
        step = d.choice([1, 2])
        layer: nn.Module = nn.ConvTranspose1d(
            s.c, out, k, step, padding=d.choice([0, k // 2]), output_padding=step - 1, groups=groups, bias=bias,
            dilation=d.choice([step, 2]),
        )  # fmt: skip
        d.fixed_t = True
        long = layer(torch.zeros(1, s.c, s.t)).shape[-1] if _fits(layer, s) else 0
        if long < 1:
            return Block("nothing", lambda b, h, e: h), s
        return Block("ConvTranspose1d", turn(lambda b, h: b.m(h)), m=layer), replace(s, c=out, t=long)
    mode = d.choice(["zeros", "reflect", "replicate", "circular"])
    step, dilation = d.choice([1, 2]), d.choice([1, 2])
    layer = nn.Conv1d(
        s.c, out, k, step, padding=d.choice([0, 1, dilation * (k - 1)]), dilation=dilation, groups=groups, bias=bias,
        padding_mode=mode,
    )  # fmt: skip
    if not _fits(layer, s):
        return Block("nothing", lambda b, h, e: h), s
    d.fixed_t = True
    long = layer(torch.zeros(1, s.c, s.t)).shape[-1]
    return Block(f"Conv1d {mode}", turn(lambda b, h: b.m(h)), m=layer), replace(s, c=out, t=long)


def _fits(layer: nn.Module, s: State) -> bool:
    try:
        layer(torch.zeros(1, s.c, s.t))
    except RuntimeError:  # the kernel is longer than the sequence
        return False
    return True


@block("img", 3)
def convolutions_of_space(d: Draw, s: State) -> tuple[nn.Module, State]:
    groups = d.choice([g for g in (1, s.c) if s.c % g == 0])
    out, k = groups * d.randint(1, 2), d.choice([1, 2, 3])
    bias, depth = d.chance(0.6), d.randint(2, 3)
    volume = lambda h: torch.stack([h * (i + 1) for i in range(depth)], 2).tanh()  # noqa: E731
    how = d.choice(["Conv3d", "ConvTranspose3d", "strided", "reflect", "ConvTranspose2d strided", "rows"])
    if how == "Conv3d":
        layer: Any = nn.Conv3d(
            s.c, out, (2, 1, k), padding=(1, 0, k // 2), stride=(2, 1, 1), groups=groups, bias=bias,
            padding_mode=d.choice(["zeros", "circular"]),
        )  # fmt: skip
        f = lambda b, h, e: b.m(volume(h))[..., : s.side].mean(2)  # noqa: E731
        return Block(how, f, m=layer), replace(s, c=out)
    if how == "ConvTranspose3d":
        layer = nn.ConvTranspose3d(s.c, out, (2, 1, k), stride=(1, 1, 1), dilation=(2, 1, 1), groups=groups, bias=bias)
        f = lambda b, h, e: b.m(volume(h))[..., : s.side].amax(2)  # noqa: E731
        return Block(how, f, m=layer), replace(s, c=out)
    if how == "rows":
        layer = nn.Conv1d(s.c, out, k, padding=k // 2, groups=groups, bias=bias)
        rows = lambda b, h: b.m(h.transpose(1, 2).flatten(0, 1)).unflatten(0, h.shape[::2]).transpose(1, 2)  # noqa: E731
        f = lambda b, h, e: rows(b, h)[..., : s.side]  # noqa: E731
        return Block("Conv1d of rows", f, m=layer), replace(s, c=out)
    if how == "strided":
        layer = nn.Conv2d(s.c, out, k, stride=2, padding=k // 2 + 1, groups=groups, bias=bias)
    elif how == "reflect":
        layer = nn.Conv2d(s.c, out, (k, 1), padding=(k // 2, 0), padding_mode="reflect", groups=groups, bias=bias)
    else:
        layer = nn.ConvTranspose2d(s.c, out, k, stride=2, output_padding=1, dilation=2, groups=groups, bias=bias)
    mode = d.choice(["nearest", "bilinear", "bicubic", "area"])
    f = lambda b, h, e: F.interpolate(b.m(h), size=(s.side, s.side), mode=mode)  # noqa: E731
    return Block(f"Conv2d {how}", f, m=layer), replace(s, c=out)


@block("img", 2)
def space(d: Draw, s: State) -> tuple[nn.Module, State]:
    """Patches, shuffles, resizing, pooling, normalisations with groups."""
    groups = d.choice([g for g in (1, 2, s.c) if s.c % g == 0])
    norms: list[nn.Module] = [
        nn.GroupNorm(groups if s.side > 1 else 1, s.c),
        nn.LayerNorm([s.c, s.side, s.side]),
        nn.LocalResponseNorm(2),
    ]
    layer = d.choice(norms if s.side > 1 else norms[1:])
    side = s.side
    fs: list[tuple[str, Callable[..., Tensor]]] = [
        (type(layer).__name__, lambda b, h, e: b.m(h.contiguous())),
        ("unfold", lambda b, h, e: (F.unfold(h, 2, padding=1).mT @ b.w.get()).mT.reshape(len(h), s.c, side + 1, -1)
            [..., :side, :side]),
        ("fold", lambda b, h, e: F.fold(F.unfold(h, 3, padding=1) * b.u.get()[:, None], side, 3, padding=1)),
        ("pixel_shuffle", lambda b, h, e: F.pixel_shuffle(h.repeat(1, 4, 1, 1) * b.x.get()[:, None, None], 2)
            [..., :side, :side]),
        ("pixel_unshuffle", lambda b, h, e: F.pixel_unshuffle(h.repeat(1, 1, 2, 2) + b.v.get()[:, None, None], 2)
            [:, : s.c]),
        ("avg_pool", lambda b, h, e: F.avg_pool2d(h * b.v.get()[:, None, None], 3, 1, 1, count_include_pad=False)),
        ("lp_pool", lambda b, h, e: F.lp_pool2d(F.pad(h, (0, 1, 0, 1)).exp(), 2, 2, 1)),
        ("resize", lambda b, h, e: F.interpolate(F.interpolate(h, scale_factor=2, mode="bicubic"), size=side)),
        ("adaptive", lambda b, h, e: F.adaptive_avg_pool2d(h, (1, 2)).mean(3, keepdim=True) * h),
        ("grid_sample", lambda b, h, e: F.grid_sample(h, b.g.tanh().expand(len(h), -1, -1, -1), align_corners=False)),
        ("rot90", lambda b, h, e: h.rot90(1, (2, 3)) * b.v.get()[:, None, None]),
        ("channel_shuffle", lambda b, h, e: F.channel_shuffle(h, groups)),
        ("as_strided", lambda b, h, e: h + b.k.as_strided((s.c, side, side), (1, 1, 0))),
        ("max_unpool", lambda b, h, e: F.max_unpool2d(*F.max_pool2d(h, 1, return_indices=True), 1) * b.k[0]),
        ("dropout in eval", lambda b, h, e: F.dropout2d(h, 0.5, training=False) * b.k[0]),
    ]  # fmt: skip
    label, f = d.choice(fs)
    members = {"m": layer, "w": d.matrix(4 * s.c, s.c), "v": d.vector(s.c), "u": d.vector(9 * s.c)}
    members |= {"x": d.vector(4 * s.c), "g": d.param(side, side, 2), "k": d.param(s.c + side)}
    return Block(label, f, **members), s


@block("seq", 2)
def normalise_time(d: Draw, s: State) -> tuple[nn.Module, State]:
    groups = d.choice([g for g in (1, 2, 3) if s.c % g == 0])
    one, affine = nn.InstanceNorm1d, d.chance(0.7)
    layer = d.choice(
        [
            nn.GroupNorm(groups, s.c, affine=affine),
            nn.BatchNorm1d(s.c, affine=affine).eval(),
            nn.BatchNorm1d(s.c, momentum=None).eval(),
            one(s.c, affine=affine, track_running_stats=True).eval(),
            nn.PReLU(s.c),
        ]
    )
    for p in layer.parameters():
        nn.init.normal_(p)
    norm = lambda b, h, e: b.m(h.mT).mT if h[0].numel() > groups else h  # noqa: E731 - torch refuses a group of one
    return Block(f"{type(layer).__name__} of time", norm, m=layer), s


@block("vec seq tmj", 2)
def odd_products(d: Draw, s: State) -> tuple[nn.Module, State]:
    """Contractions of several operands, in any order of letters, with parameters that stand between the data."""
    a, out = "abcdefg"[: 1 if s.kind == "vec" else 2], d.width()
    fs: list[tuple[str, Callable[..., Tensor]]] = [
        ("three", lambda b, h, e: torch.einsum(f"{a}x,xk,ky->{a}y", h, b.p, b.q)),
        ("data at the end", lambda b, h, e: torch.einsum(f"xk,ky,{a}x->{a}y", b.p, b.q, h)),
        ("turned", lambda b, h, e: torch.einsum(f"yx,{a}x->y{a}", b.w.get(), h).movedim(0, -1)),
        ("data twice", lambda b, h, e: torch.einsum(f"{a}x,xy,{a}x->{a}y", h, b.w.get().T, h.tanh())),
        ("scaled", lambda b, h, e: torch.einsum(f"x,{a}x,yx->{a}y", b.v.get(), h, b.w.get())),
        ("diagonal", lambda b, h, e: torch.einsum(f"{a}x,xx,yx->{a}y", h, b.d, b.w.get())),
        ("summed letter", lambda b, h, e: torch.einsum(f"{a}x,yxz->{a}y", h, b.t)),
        ("quadratic", lambda b, h, e: torch.einsum(f"{a}x,yxz,{a}z->{a}y", h, b.t, h[..., :2].tanh().mean(-1, True)
            .expand(*h.shape[:-1], 2))),
        ("exp of w", lambda b, h, e: h @ (b.w.get().T * 0.3).exp()),
        ("chain_matmul", lambda b, h, e: torch.linalg.multi_dot([h.flatten(0, -2), b.p, b.q]).view(*h.shape[:-1], -1)),
        ("inner", lambda b, h, e: torch.inner(h, b.w.get())),
        ("kron", lambda b, h, e: h @ torch.kron(b.p, b.q)[: s.c, :out]),
        ("tensordot", lambda b, h, e: torch.tensordot(h[..., None] * h.new_ones(2), b.t, ([-2, -1], [1, 2]))),
        ("matmul of a vector", lambda b, h, e: torch.matmul(h, b.v.get())[..., None] * b.o.get()),
        ("low rank there and back", lambda b, h, e: F.linear(F.linear(h, b.p.T), b.q.T)),
        ("cdist", lambda b, h, e: torch.cdist(h.unsqueeze(-2), b.w.get() + 3).squeeze(-2)),
        ("baddbmm", lambda b, h, e: torch.baddbmm(b.o.get(), h.reshape(-1, 1, s.c), b.w.get().T
            .expand(h.shape[:-1].numel(), s.c, out)).view(*h.shape[:-1], out)),
    ]  # fmt: skip
    label, f = d.choice(fs)
    k = d.randint(1, 3)
    members = {"p": d.param(s.c, k), "q": d.param(k, out), "w": d.matrix(out, s.c), "v": d.vector(s.c)}
    members |= {"o": d.vector(out), "d": d.param(s.c, s.c), "t": d.param(out, s.c, 2)}
    return Block(f"product, {label}", f, **members), replace(s, c=out)


@block("vec seq tmj", 3)
def by_data(d: Draw, s: State) -> tuple[nn.Module, State]:
    """Entries gathered, scattered, chosen and written where the data say so."""
    order = lambda h: h.detach().argsort(dim=-1, stable=True)  # noqa: E731
    k = d.randint(1, s.c)
    fs: list[tuple[str, Callable[..., Tensor]]] = [
        ("gather", lambda b, h, e: h.gather(-1, order(h)) * b.v.get()),
        ("gather parameter", lambda b, h, e: h + b.v.get().expand_as(h).gather(-1, order(h))),
        ("index parameter", lambda b, h, e: h * b.v.get()[order(h)]),
        ("table", lambda b, h, e: h + b.w.get()[order(h)[..., 0]]),
        ("rows of a table", lambda b, h, e: h + F.embedding(order(h), b.w.get()).mean(-2)),
        ("take_along_dim", lambda b, h, e: torch.take_along_dim(h * b.v.get(), order(h), -1)),
        ("scatter", lambda b, h, e: torch.zeros_like(h).scatter(-1, order(h), h * b.v.get())),
        ("scatter_add", lambda b, h, e: (h * 1.0).scatter_add(-1, order(h) // 2, h * b.v.get())),
        ("scatter_reduce", lambda b, h, e: h.scatter_reduce(-1, order(h) // 2, h * b.v.get(), "amax")),
        ("topk", lambda b, h, e: h * b.v.get() + (h * b.v.get()).topk(k, -1).values.sum(-1, keepdim=True)),
        ("where", lambda b, h, e: torch.where(h > b.v.get(), h * b.v.get(), b.s.get())),
        ("where of one", lambda b, h, e: torch.where(h[..., :1] > 0, h @ b.w.get(), h)),
        ("index_add", lambda b, h, e: h.index_add(-1, torch.arange(s.c).flip(0), h * b.v.get(), alpha=0.5)),
        ("index_fill", lambda b, h, e: (h * b.v.get()).index_fill(-1, torch.tensor([0]), 0.5)),
        ("index_put", lambda b, h, e: (h * b.v.get()).index_put((h > 0.5,), b.s.get().sum())),
        ("nan_to_num", lambda b, h, e: torch.nan_to_num((h * b.v.get()).log()).clamp(-2, 2)),
        ("hard choice", lambda b, h, e: F.one_hot(order(h)[..., -1], s.c).to(h.dtype) @ b.w.get() + h),
        ("median", lambda b, h, e: h * b.v.get() - h.median(-1, keepdim=True).values),
        ("logcumsumexp", lambda b, h, e: (h * b.v.get()).logcumsumexp(-1)),
        ("cummax", lambda b, h, e: (h + b.v.get()).cummax(-1).values),
        ("cumprod", lambda b, h, e: (h * b.v.get()).tanh().cumprod(-1)),
        ("diff", lambda b, h, e: (h * b.v.get()).diff(dim=-1, prepend=b.v.get()[:1].expand(*h.shape[:-1], 1))),
        ("searchsorted", lambda b, h, e: h + b.v.get()[(h.detach() > 0).long().sum(-1, keepdim=True) % s.c]),
        ("straight through", lambda b, h, e: h + ((h * b.v.get()).round() - h * b.v.get()).detach() + h * b.v.get()),
        ("renorm", lambda b, h, e: F.normalize(h, dim=-1) * b.v.get() * b.s.get()),
        ("outer with itself", lambda b, h, e: (h[..., None] * (h * b.v.get())[..., None, :]).mean(-1)),
        ("exp of s", lambda b, h, e: h * (b.s.get() * 0.5).exp() + (-b.v.get().square()).exp()),
        ("logsumexp", lambda b, h, e: h - (h * b.v.get()).logsumexp(-1, keepdim=True)),
    ]  # fmt: skip
    label, f = d.choice(fs)
    return Block(f"by data, {label}", f, v=d.vector(s.c), w=d.matrix(s.c, s.c), s=d.scalar()), s


@block("seq", 1)
def bags(d: Draw, s: State) -> tuple[nn.Module, State]:
    mode, padding = d.choice(["sum", "mean", "max"]), d.choice([None, 3])
    layer = nn.EmbeddingBag(IDS, s.c, mode=mode, padding_idx=padding)
    fs: list[tuple[str, Callable[..., Tensor]]] = [
        ("of rows", lambda b, h, e: h + b.m(e["ids"])[:, None]),
        ("of positions", lambda b, h, e: h + b.m(e["ids"].flatten()[:, None]).view(*e["ids"].shape, -1).mean(1, True)),
        ("with offsets", lambda b, h, e: h + b.m(e["ids"].flatten(), _starts(e["ids"]))[:, None]),
        ("weighted", lambda b, h, e: h + F.embedding_bag(e["ids"], b.w.get(), mode="sum",
            per_sample_weights=h.mean((1, 2))[:, None].expand(e["ids"].shape))[:, None]),
        ("by learned weights", lambda b, h, e: h + F.embedding_bag(e["ids"], b.w.get(), mode="sum",
            per_sample_weights=b.t[e["ids"]])[:, None]),
    ]  # fmt: skip
    label, f = d.choice(fs)
    return Block(f"ids bag {mode} {label}", f, m=layer, w=d.matrix(IDS, s.c), t=d.param(IDS)), s


def _starts(ids: Tensor) -> Tensor:
    return torch.arange(len(ids)) * ids.shape[1]


@block("vec seq tmj", 1.5)
def parametrized(d: Draw, s: State) -> tuple[nn.Module, State]:
    """Parametrizations, and weights that two layers of different kinds share."""
    out = d.randint(1, 4)
    layer = nn.Linear(s.c, out)
    how = d.choice(["orthogonal", "spectral_norm", "own", "tied", "tied conv", "weight_norm of rows"])
    if how == "orthogonal":
        layer = parametrizations.orthogonal(layer, orthogonal_map=d.choice(["cayley", "householder"]))
    elif how == "spectral_norm":
        layer = parametrizations.spectral_norm(layer).eval()
    elif how == "weight_norm of rows":
        layer = parametrizations.weight_norm(layer, dim=d.choice([None, 1]))
    elif how == "own":
        nn.utils.parametrize.register_parametrization(layer, "weight", Softened())
        nn.utils.parametrize.register_parametrization(layer, "bias", Softened())
    elif how == "tied":  # an autoencoder
        f = lambda b, h, e: F.linear(b.m(h).tanh(), b.m.weight.t(), b.v.get())  # noqa: E731
        return Block("tied transposed", f, m=layer, v=d.vector(s.c)), s
    elif how == "tied conv":
        conv = nn.Conv1d(s.c, out, 1)
        f = lambda b, h, e: b.m(h.reshape(-1, s.c, 1)).view(*h.shape[:-1], out) + F.linear(h, b.m.weight[..., 0])  # noqa: E731
        return Block("shared by convolution and linear", f, m=conv), replace(s, c=out)
    return Block(f"parametrized, {how}", lambda b, h, e: b.m(h), m=layer), replace(s, c=out)


class Softened(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.tanh() * 2 + w.mean()


@block("vec seq tmj img", 1.5)
def wrapped(d: Draw, s: State) -> tuple[nn.Module, State]:
    """Checkpoints, autocast, and loops over a module of which all passes count."""
    if d.depth > 2:
        return Block("nothing", lambda b, h, e: h), s
    d.depth += 1
    a = keep(d, s)
    d.depth -= 1
    k = d.randint(2, 4)
    label, f = d.choice(
        [
            ("checkpoint", lambda b, h, e: checkpoint(b.a, h, e, use_reentrant=False)),
            ("checkpoint twice", lambda b, h, e: checkpoint(b.a, checkpoint(b.a, h, e, use_reentrant=False), e,
                use_reentrant=False)),
            ("checkpoint, reentrant in contexts", lambda b, h, e: _checkpoint(b.a, h, e)),
            ("autocast", lambda b, h, e: _autocast(b.a, h, e)),
            ("k times", lambda b, h, e: _times(b.a, h, e, k)),
            ("until", lambda b, h, e: _times(b.a, h, e, k) / (1 + k)),
            ("halves of features", lambda b, h, e: torch.cat([x + 0.0 for x in b.a(h, e).chunk(2, -1)], -1)),
            ("rolled", lambda b, h, e: b.a(h, e).roll(1, -1) + b.a(h.flip(-1), e).flip(-1)),
        ]
    )  # fmt: skip
    return Block(f"{label}({a})", f, a=a), s


def _checkpoint(m: Any, h: Tensor, e: Any) -> Tensor:
    """Of the reentrant kind where torch gives that a gradient, and the oracle does not ask for one by itself."""
    live = h.requires_grad and torch.is_grad_enabled()
    return checkpoint(m, h, e, use_reentrant=live and bool(_listening.here().contexts))


def _autocast(m: Any, h: Tensor, e: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m(h, e)


def _times(m: Any, h: Tensor, e: Any, k: int) -> Tensor:
    for _ in range(k):
        h = m(h, e).tanh()
    return h


@block("vec seq tmj", 1)
def more_activations(d: Draw, s: State) -> tuple[nn.Module, State]:
    label, f = d.choice(
        [
            ("glu", lambda b, h, e: F.glu(torch.cat([h, h * b.v.get()], -1), -1)),
            ("maxout", lambda b, h, e: torch.stack([h, h * b.v.get()], -1).amax(-1)),
            ("mish", lambda b, h, e: F.mish(h * b.v.get())),
            ("hardswish", lambda b, h, e: F.hardswish(h + b.v.get())),
            ("celu", lambda b, h, e: F.celu(h * b.v.get(), 0.5)),
            ("rrelu", lambda b, h, e: F.rrelu(h * b.v.get(), training=False)),
            ("log_softmax", lambda b, h, e: (h + b.v.get()).log_softmax(-1)),
            ("threshold", lambda b, h, e: F.threshold(h * b.v.get(), 0.1, -1.0)),
            ("hardshrink", lambda b, h, e: F.hardshrink(h * b.v.get(), 0.2)),
            ("prelu of features", lambda b, h, e: F.prelu(h.reshape(-1, s.c), b.p).view(h.shape)),
            ("softsign", lambda b, h, e: F.softsign(h) * b.p),
            ("silu inplace", lambda b, h, e: F.silu(h * b.v.get(), inplace=True)),
            ("erf", lambda b, h, e: torch.erf(h * b.v.get()) + torch.expm1(-h.abs() * b.p.abs())),
            ("complex", lambda b, h, e: torch.fft.rfft(h * b.v.get()).abs().sum(-1, keepdim=True) * h),
            ("fft", lambda b, h, e: torch.fft.irfft(torch.fft.rfft(h) * torch.fft.rfft(b.v.get()), s.c)),
        ]
    )  # fmt: skip
    return Block(label, f, v=d.vector(s.c), p=d.param(s.c)), s
