"""The table of models on which every quantity is compared with the slow oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


@dataclass(frozen=True)
class Case:
    """A model with inputs and targets, and what is special about it."""

    name: str
    build: Callable[[], tuple[nn.Module, Any, Any]]
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss
    batch_axis: int = 0
    weights: Callable[[Any], list[float]] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


CASES: list[Case] = []
N = 4


def case(name: str, **options: Any) -> Callable[[Callable[[], tuple[nn.Module, Any, Any]]], Any]:
    """Register a builder."""

    def register(build: Callable[[], tuple[nn.Module, Any, Any]]) -> Any:
        CASES.append(Case(name, build, **options))
        return build

    return register


def labels(n: int = N, classes: int = 3) -> Tensor:
    return torch.randint(classes, (n,))


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.f = f

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.f(*args, **kwargs)


class Pool(nn.Module):
    """Mean over everything but samples and the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1)


def image_net(conv: nn.Module, channels: int = 4, size: int = 7, dims: int = 2) -> tuple[nn.Module, Tensor, Tensor]:
    x = torch.randn(N, channels, *[size] * dims)
    with torch.no_grad():
        features = conv(x).flatten(1).shape[1]
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3)), x, labels()


@case("mlp")
def _() -> Any:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), torch.randn(N, 5), labels()


@case("mlp, sum", loss=lambda: nn.CrossEntropyLoss(reduction="sum"))
def _() -> Any:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), torch.randn(N, 5), labels()


for _name, _conv in {
    "conv2d stride dilation": lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=2),
    "conv2d groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv2d depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1),
    "conv2d same": lambda: nn.Conv2d(4, 5, (3, 5), padding="same", dilation=(2, 1)),
    "conv2d valid": lambda: nn.Conv2d(4, 5, 3, padding="valid", bias=False),
    "conv2d circular": lambda: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"),
    "conv2d reflect": lambda: nn.Conv2d(4, 5, 3, padding=(2, 1), padding_mode="reflect"),
    "conv2d replicate same": lambda: nn.Conv2d(4, 5, 3, padding="same", padding_mode="replicate"),
    "conv2d 1x1": lambda: nn.Conv2d(4, 5, 1),
    "conv2d whole map": lambda: nn.Conv2d(4, 5, 7),
    "conv transpose 2d": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
    "conv2d lazy": lambda: nn.LazyConv2d(5, 3),
}.items():
    case(_name)(lambda conv=_conv: image_net(conv()))

for _name, _conv, _dims in [
    ("conv1d", lambda: nn.Conv1d(4, 5, 3, padding=2, dilation=2), 1),
    ("conv3d", lambda: nn.Conv3d(4, 2, 2, stride=(1, 2, 1), padding=(0, 1, 1)), 3),
    ("conv transpose 1d", lambda: nn.ConvTranspose1d(4, 5, 4, stride=3), 1),
    ("conv transpose 3d", lambda: nn.ConvTranspose3d(4, 2, 2, padding=1), 3),
]:
    case(_name)(lambda conv=_conv, dims=_dims: image_net(conv(), size=5 if dims == 3 else 7, dims=dims))


@case("linear on sequence")
def _() -> Any:
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), Pool(), nn.Linear(6, 3)), torch.randn(N, 9, 5), labels()


@case("linear on 4d")
def _() -> Any:
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), Pool(), nn.Linear(6, 3)), torch.randn(N, 2, 3, 5), labels()


@case("sequence of n tokens")
def _() -> Any:
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), Pool(), nn.Linear(6, 3)), torch.randn(N, N, 5), labels()


@case("embedding and layer norm")
def _() -> Any:
    model = nn.Sequential(nn.Embedding(10, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.ReLU(), Pool(), nn.Linear(6, 3))
    return model, torch.randint(10, (N, 5)), labels()


@case("embedding padding_idx")
def _() -> Any:
    return nn.Sequential(nn.Embedding(5, 6, padding_idx=2), nn.Tanh(), Pool(), nn.Linear(6, 3)), torch.randint(5, (N, 7)), labels()


for _mode in ("sum", "mean", "max"):

    @case(f"embedding bag {_mode}")
    def _(mode: str = _mode) -> Any:
        return nn.Sequential(nn.EmbeddingBag(6, 5, mode=mode, padding_idx=1), nn.Linear(5, 3)), torch.randint(6, (N, 5)), labels()


for _name, _norm in {
    "layer norm no bias": lambda: nn.LayerNorm(6, bias=False),
    "layer norm 2 axes": lambda: nn.LayerNorm([5, 6]),
    "rms norm": lambda: nn.RMSNorm(6),
}.items():

    @case(_name)
    def _(norm: Any = _norm) -> Any:
        return nn.Sequential(nn.Linear(4, 6), norm(), nn.Tanh(), Pool(), nn.Linear(6, 3)), torch.randn(N, 5, 4), labels()


for _name, _norm in {
    "group norm": lambda: nn.GroupNorm(2, 6),
    "instance norm": lambda: nn.InstanceNorm2d(6, affine=True),
    "instance norm running": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "batch norm eval": lambda: nn.BatchNorm2d(6).eval(),
}.items():

    @case(_name)
    def _(norm: Any = _norm) -> Any:
        layer = norm()
        for p in layer.parameters():
            nn.init.normal_(p)
        return image_net(nn.Sequential(nn.Conv2d(4, 6, 3), layer))


@case("prelu")
def _() -> Any:
    return image_net(nn.Sequential(nn.Conv2d(4, 5, 3), nn.PReLU(5), nn.PReLU()))


class TwoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear, self.head = nn.Bilinear(3, 4, 5), nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(self.bilinear(a, b).tanh().mean(1))


@case("bilinear")
def _() -> Any:
    return TwoArguments(), (torch.randn(N, 2, 3), torch.randn(N, 2, 4)), labels()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(8, 6), nn.Linear(6, 6), nn.Linear(6, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mid(self.embed(x)).tanh().mean(1))


@case("tied embedding and head")
def _() -> Any:
    return Tied(), torch.randint(8, (N, 5)), labels(classes=8)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x).relu()).relu())


@case("one linear called twice")
def _() -> Any:
    return Twice(), torch.randn(N, 5), labels()


@case("one convolution called twice")
def _() -> Any:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(conv, nn.Tanh(), conv, nn.Flatten(), nn.Linear(3 * 25, 3)), torch.randn(N, 3, 5, 5), labels()


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = options.get("batch_first", False)
        self.attend = nn.MultiheadAttention(8, 2, **options)
        self.head = nn.Linear(8, 3)
        self.kdim, self.vdim = options.get("kdim", 8), options.get("vdim", 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q = x if self.first else x.transpose(0, 1)
        y = self.attend(q, q[..., : self.kdim], q[..., : self.vdim], key_padding_mask=mask)[0]
        return self.head(y.mean(1 if self.first else 0))


for _name, _options in {
    "attention": {},
    "attention batch first": {"batch_first": True},
    "attention own dims": {"kdim": 6, "vdim": 5, "batch_first": True},
    "attention bias_kv zero": {"add_bias_kv": True, "add_zero_attn": True},
    "attention no bias": {"bias": False},
}.items():

    @case(_name)
    def _(options: Any = _options) -> Any:
        return Attention(**options), torch.randn(N, 5, 8), labels()


@case("attention with padding mask")
def _() -> Any:
    mask = torch.zeros(N, 5, dtype=torch.bool)
    mask[:, 3:] = True
    return Attention(batch_first=True), (torch.randn(N, 5, 8), mask), labels()


@case("transformer encoder layer")
def _() -> Any:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, Pool(), nn.Linear(8, 3)), torch.randn(N, 5, 8), labels()


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        return self.head(self.t(src.transpose(0, 1), tgt.transpose(0, 1)).mean(0))


@case("transformer")
def _() -> Any:
    return Seq2Seq(), (torch.randn(N, 5, 8), torch.randn(N, 3, 8)), labels()


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.scale = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(6))
        self.t, self.head = nn.Parameter(torch.randn(())), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ self.w * self.scale).tanh().mean(1)) / self.t


@case("raw parameters")
def _() -> Any:
    return Raw(), torch.randn(N, 4, 5), labels()


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(input=self.a(input=x).relu())


@case("submodules called with keywords")
def _() -> Any:
    return Keywords(), {"x": torch.randn(N, 5)}, labels()


@case("in-place relu")
def _() -> Any:
    return image_net(nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(inplace=True)))


class Recurrent(nn.Module):
    def __init__(self, rnn: nn.Module, out: int, ends: bool = False, state: bool = False) -> None:
        super().__init__()
        self.rnn, self.head, self.ends, self.state = rnn, nn.Linear(out, 3), ends, state

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        x = x if self.rnn.batch_first else x.transpose(0, 1)
        y, last = self.rnn(x, h.transpose(0, 1)) if h is not None else self.rnn(x)
        if self.ends:
            return self.head(sum(part[-1] for part in last) if isinstance(last, tuple) else last[-1])
        return self.head(y.mean(1 if self.rnn.batch_first else 0))


for _name, _rnn, _out, _ends in [
    ("lstm", lambda: nn.LSTM(5, 6, batch_first=True), 6, False),
    ("lstm time first", lambda: nn.LSTM(5, 6), 6, False),
    ("lstm 2 layers both ways", lambda: nn.LSTM(5, 6, 2, bidirectional=True, batch_first=True), 12, False),
    ("lstm loss on states", lambda: nn.LSTM(5, 6, 2, bias=False), 6, True),
    ("lstm projection", lambda: nn.LSTM(5, 6, proj_size=3, batch_first=True), 3, False),
    ("gru", lambda: nn.GRU(5, 6, 2, batch_first=True), 6, False),
    ("gru both ways, loss on state", lambda: nn.GRU(5, 6, bidirectional=True), 6, True),
    ("rnn", lambda: nn.RNN(5, 6, batch_first=True), 6, False),
    ("rnn relu", lambda: nn.RNN(5, 6, nonlinearity="relu", batch_first=True), 6, True),
]:

    @case(_name)
    def _(rnn: Any = _rnn, out: int = _out, ends: bool = _ends) -> Any:
        return Recurrent(rnn(), out, ends), torch.randn(N, 4, 5), labels()


@case("gru with initial state")
def _() -> Any:
    return Recurrent(nn.GRU(5, 6), 6), (torch.randn(N, 4, 5), torch.randn(N, 1, 6)), labels()


class Cells(nn.Module):
    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = cell(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


for _cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
    case(_cell.__name__)(lambda cell=_cell: (Cells(cell), torch.randn(N, 3, 5), labels()))


@case("weight norm")
def _() -> Any:
    return (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 3)),
        torch.randn(N, 5),
        labels(),
    )


@case("spectral norm")
def _() -> Any:
    conv = parametrizations.spectral_norm(nn.Conv2d(4, 5, 3)).eval()
    return image_net(conv)


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, 8, 2, stride=2), nn.Parameter(torch.randn(1, 1, 8))
        self.pos, self.block = nn.Parameter(torch.randn(1, 5, 8)), nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.head(self.block(x)[:, 0])


@case("vision transformer")
def _() -> Any:
    return Vit(), torch.randn(N, 3, 4, 4), labels()


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok, self.pos, self.head = nn.Embedding(7, 6), nn.Embedding(N, 6), nn.Linear(6, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        return self.head(x.tanh().mean(1))


@case("as many positions as samples")
def _() -> Any:
    return Positions(), torch.randint(7, (N, N)), labels(classes=7)


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(5, 6)
        self.base.weight.requires_grad_(False)
        self.a, self.b, self.head = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(6, 2)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.base.weight + self.b @ self.a, self.base.bias).tanh())


@case("merged low rank, frozen base")
def _() -> Any:
    return LowRank(), torch.randn(N, 5), labels()


class Heads(nn.Module):
    """Per-head weights through einsum, and a learned relative bias by indexing."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Parameter(torch.randn(2, 6, 3)), nn.Parameter(torch.randn(2, 6, 3))
        self.bias, self.head = nn.Parameter(torch.randn(9, 2)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, v = torch.einsum("ntd,hde->nhte", x, self.q), torch.einsum("ntd,hde->nhte", x, self.v)
        t = torch.arange(x.shape[1])
        bias = self.bias[t[:, None] - t[None] + 4].permute(2, 0, 1)
        y = F.scaled_dot_product_attention(q, v, v, attn_mask=bias)
        return self.head(y.transpose(1, 2).flatten(2).mean(1))


@case("einsum heads with relative bias")
def _() -> Any:
    return Heads(), torch.randn(N, 5, 6), labels()


class Conv1D(nn.Module):
    """GPT-2's linear layer with a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.head = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], 6)
        return self.head(y.tanh().mean(1))


@case("addmm on folded tokens")
def _() -> Any:
    return Conv1D(), torch.randn(N, 3, 5), labels()


class TimeMajor(nn.Module):
    """Folds tokens time-major inside, so that samples are the fastest index."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        y = self.a(x.transpose(0, 1).reshape(-1, 5)).tanh()
        return self.head(y.reshape(t, -1, 6).mean(0))


@case("time-major folding inside")
def _() -> Any:
    return TimeMajor(), torch.randn(N, 3, 5), labels()
