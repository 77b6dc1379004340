"""The table of models on which every quantity is compared with the slow oracle."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


@dataclass(frozen=True)
class Case:
    """A model with inputs and targets, and what is special about it."""

    name: str
    build: Callable[[], tuple[nn.Module, Any, Any]]
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss
    batch_axis: int = 0
    weights: Callable[[Any], list[float]] | None = None


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
    "conv transpose 2d": lambda: nn.ConvTranspose2d(
        4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2
    ),
    "conv2d lazy": lambda: nn.LazyConv2d(5, 3),
    "conv2d groups circular dilation": lambda: nn.Conv2d(
        4, 6, 3, groups=2, padding=2, dilation=2, padding_mode="circular"
    ),
    "conv2d stride leaves a rest": lambda: nn.Conv2d(4, 5, 2, stride=4, padding=(1, 0)),
}.items():
    case(_name)(lambda conv=_conv: image_net(conv()))

for _name, _conv, _dims in [
    ("conv1d", lambda: nn.Conv1d(4, 5, 3, padding=2, dilation=2), 1),
    ("conv3d", lambda: nn.Conv3d(4, 2, 2, stride=(1, 2, 1), padding=(0, 1, 1)), 3),
    ("conv transpose 1d", lambda: nn.ConvTranspose1d(4, 5, 4, stride=3), 1),
    ("conv transpose 3d", lambda: nn.ConvTranspose3d(4, 2, 2, padding=1), 3),
    ("conv1d groups stride", lambda: nn.Conv1d(4, 6, 3, groups=2, stride=2, dilation=2, padding=2), 1),
    ("conv1d depthwise", lambda: nn.Conv1d(4, 8, 3, groups=4), 1),
    ("conv1d same, even kernel", lambda: nn.Conv1d(4, 5, 4, padding="same"), 1),
    ("conv1d reflect", lambda: nn.Conv1d(4, 5, 3, padding=2, padding_mode="reflect"), 1),
    ("conv1d circular same", lambda: nn.Conv1d(4, 5, 3, padding="same", padding_mode="circular"), 1),
    ("conv3d groups dilation", lambda: nn.Conv3d(4, 2, 2, groups=2, dilation=(1, 2, 2), padding=1), 3),
    ("conv3d circular", lambda: nn.Conv3d(4, 2, 3, padding=1, padding_mode="circular"), 3),
    ("conv3d replicate", lambda: nn.Conv3d(4, 2, 2, padding=1, padding_mode="replicate", bias=False), 3),
    (
        "conv transpose 1d groups",
        lambda: nn.ConvTranspose1d(4, 6, 3, groups=2, stride=2, output_padding=1, padding=1),
        1,
    ),
    ("conv transpose 3d dilation", lambda: nn.ConvTranspose3d(4, 2, 2, groups=2, dilation=2, padding=1), 3),
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
    return (
        nn.Sequential(nn.Embedding(5, 6, padding_idx=2), nn.Tanh(), Pool(), nn.Linear(6, 3)),
        torch.randint(5, (N, 7)),
        labels(),
    )


for _mode in ("sum", "mean", "max"):

    @case(f"embedding bag {_mode}")
    def _(mode: str = _mode) -> Any:
        return (
            nn.Sequential(nn.EmbeddingBag(6, 5, mode=mode, padding_idx=1), nn.Linear(5, 3)),
            torch.randint(6, (N, 5)),
            labels(),
        )


for _name, _norm in {
    "layer norm no bias": lambda: nn.LayerNorm(6, bias=False),
    "layer norm 2 axes": lambda: nn.LayerNorm([5, 6]),
    "rms norm": lambda: nn.RMSNorm(6),
}.items():

    @case(_name)
    def _(norm: Any = _norm) -> Any:
        return (
            nn.Sequential(nn.Linear(4, 6), norm(), nn.Tanh(), Pool(), nn.Linear(6, 3)),
            torch.randn(N, 5, 4),
            labels(),
        )


for _name, _norm in {
    "group norm": lambda: nn.GroupNorm(2, 6),
    "instance norm": lambda: nn.InstanceNorm2d(6, affine=True),
    "instance norm running": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "batch norm eval": lambda: nn.BatchNorm2d(6).eval(),
    "sync batch norm eval": lambda: nn.SyncBatchNorm(6).eval(),
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
        with warnings.catch_warnings():
            # torch says that its own default of enable_nested_tensor does nothing here.
            warnings.simplefilter("ignore", UserWarning)
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


class Packed(nn.Module):
    """Sequences of different lengths, packed; all steps and the last states go on."""

    def __init__(self, rnn: Any, words: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 5) if words else nn.Identity()
        self.rnn, self.head = rnn, nn.LazyLinear(3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        sequences = pack_padded_sequence(self.embed(x), lengths, batch_first=True, enforce_sorted=False)
        rows, last = self.rnn(sequences)
        steps, _ = pad_packed_sequence(rows, batch_first=True)
        last = torch.cat(last, -1) if isinstance(last, tuple) else last
        return self.head(torch.cat([steps.sum(1), *last.unbind()], -1))


for _name, _rnn, _words in [
    ("lstm packed", lambda: nn.LSTM(5, 6), 0),
    ("lstm packed, 2 layers both ways", lambda: nn.LSTM(5, 4, 2, bidirectional=True), 7),
    ("lstm packed, projection", lambda: nn.LSTM(5, 6, bias=False, proj_size=3), 7),
    ("gru packed", lambda: nn.GRU(5, 6, 2), 7),
    ("rnn packed, both ways", lambda: nn.RNN(5, 6, bidirectional=True), 0),
]:

    @case(_name)
    def _(rnn: Any = _rnn, words: int = _words) -> Any:
        lengths = torch.tensor([2, 4, 1, 4])
        x = torch.randint(words, (N, 4)) if words else torch.randn(N, 4, 5)
        model = Packed(rnn(), words)
        model(x, lengths)  # the head learns its size
        return model, (x, lengths), labels()


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
        self.pos, self.block = (
            nn.Parameter(torch.randn(1, 5, 8)),
            nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True),
        )
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
        self.weight, self.bias, self.head = (
            nn.Parameter(torch.randn(5, 6)),
            nn.Parameter(torch.randn(6)),
            nn.Linear(6, 3),
        )

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


# -- more layers ---------------------------------------------------------------------------------


def running(norm: nn.Module) -> nn.Module:
    """A batch norm in evaluation mode, with statistics that are not 0 and 1."""
    for t in (*norm.parameters(), norm.running_mean):
        nn.init.normal_(t)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm.eval()


@case("batch norm 1d eval")
def _() -> Any:
    return (
        nn.Sequential(nn.Linear(5, 6), running(nn.BatchNorm1d(6)), nn.Tanh(), nn.Linear(6, 3)),
        torch.randn(N, 5),
        labels(),
    )


@case("batch norm 3d eval")
def _() -> Any:
    return image_net(nn.Sequential(nn.Conv3d(4, 2, 2), running(nn.BatchNorm3d(2))), size=4, dims=3)


@case("batch norm first, training, one sample")
def _() -> Any:
    model = nn.Sequential(nn.BatchNorm2d(4, momentum=0.0), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(45, 3))
    return model, torch.randn(1, 4, 5, 5), labels(1)


@case("rms norm 2 axes")
def _() -> Any:
    return nn.Sequential(nn.Linear(4, 6), nn.RMSNorm([5, 6]), Pool(), nn.Linear(6, 3)), torch.randn(N, 5, 4), labels()


@case("instance norm 1d")
def _() -> Any:
    return image_net(nn.Sequential(nn.Conv1d(4, 6, 3), nn.InstanceNorm1d(6, affine=True)), dims=1)


@case("prelu on vectors")
def _() -> Any:
    return nn.Sequential(nn.Linear(5, 6), nn.PReLU(6), nn.Linear(6, 3)), torch.randn(N, 5), labels()


class Bag(nn.Module):
    """Embedding bag with offsets, of five words a sample."""

    def __init__(self, mode: str, weighted: str = "", last: bool = False) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 6, mode=mode, include_last_offset=last)
        self.head, self.weighted, self.last = nn.Linear(6, 3), weighted, last
        if weighted == "learned":
            self.w = nn.Parameter(torch.randn(5))

    def forward(self, ids: Tensor) -> Tensor:
        n = len(ids)
        offsets = torch.arange(n + self.last) * 5
        weights = None
        if self.weighted == "learned":
            weights = self.w.expand(n, 5).reshape(-1)
        elif self.weighted:
            weights = ids.flatten().cos()
        return self.head(self.bag(ids.flatten(), offsets, per_sample_weights=weights).tanh())


for _name, _options in {
    "offsets sum": ("sum",),
    "offsets mean": ("mean", "", True),
    "offsets max": ("max",),
    "weights": ("sum", "data"),
    "learned weights": ("sum", "learned"),
}.items():

    @case(f"embedding bag {_name}")
    def _(options: Any = _options) -> Any:
        return Bag(*options), torch.randint(7, (N, 5)), labels()


@case("embedding on 3d ids")
def _() -> Any:
    return nn.Sequential(nn.Embedding(5, 6), Pool(), nn.Linear(6, 3)), torch.randint(5, (N, 2, 3)), labels()


class Indexing(nn.Module):
    """A table of raw parameters, indexed by data, with negative indices as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(7, 6)), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table[ids - 3].tanh().mean(1))


@case("indexed table")
def _() -> Any:
    return Indexing(), torch.randint(7, (N, 5)), labels()


class Attend(nn.Module):
    """Attention with separate inputs and any call options."""

    def __init__(self, average: bool = True, options: Any = None, **call: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True, **(options or {}))
        self.head, self.average, self.call = nn.Linear(8, 3), average, call

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, w = self.attend(q, k, v, average_attn_weights=self.average, **self.call)
        y = self.head(y.mean(1))
        return y if w is None else y + w.flatten(1).square().sum(1, keepdim=True)


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
for _name, _call in {
    "average": {},
    "per head": {"average": False},
    "no weights": {"need_weights": False},
    "2d mask": {"attn_mask": CAUSAL},
    "float mask": {
        "attn_mask": torch.zeros(5, 5, dtype=torch.float64).masked_fill(CAUSAL, -torch.inf),
        "need_weights": False,
    },
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
}.items():

    @case(f"attention q k v {_name}")
    def _(call: Any = _call) -> Any:
        return Attend(**call), tuple(torch.randn(N, 5, 8) for _ in range(3)), labels()


class Masked3d(Attend):
    """A mask for each head of each sample, made from data."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("nte,nse->nts", q, k).detach()
        return self.head(self.attend(q, k, v, attn_mask=scores.repeat_interleave(2, 0))[0].mean(1))


@case("attention q k v 3d mask")
def _() -> Any:
    return Masked3d(), tuple(torch.randn(N, 5, 8) for _ in range(3)), labels()


@case("attention other length of keys")
def _() -> Any:
    return (
        Attend(options={"kdim": 4, "vdim": 6}),
        (torch.randn(N, 3, 8), torch.randn(N, 5, 4), torch.randn(N, 5, 6)),
        labels(),
    )


class Decoder(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=first)
        self.head = nn.Linear(8, 3)

    def forward(self, tgt: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1])
        return self.head(self.layer(tgt, memory, tgt_mask=mask, tgt_is_causal=True).mean(1))


for _first in (False, True):

    @case(f"transformer decoder layer{', norm first' * _first}")
    def _(first: bool = _first) -> Any:
        return Decoder(first), (torch.randn(N, 3, 8), torch.randn(N, 5, 8)), labels()


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=False)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))


@case("transformer encoder, padded, evaluation mode")
def _() -> Any:
    mask = torch.zeros(N, 5, dtype=torch.bool)
    mask[1:, 4:] = True
    return Padded().eval(), (torch.randn(N, 5, 8), mask), labels()


class Gpt(nn.Module):
    """Token and position embeddings, GPT-2's Conv1D, and a head tied to the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.ln = nn.Embedding(9, 6), nn.Embedding(8, 6), nn.LayerNorm(6)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6) / 3), nn.Parameter(torch.randn(6))
        self.lm_head = nn.Linear(6, 9, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1])[None])
        x = x + torch.addmm(self.bias, self.ln(x).view(-1, 6), self.weight).view(x.shape).tanh()
        return self.lm_head(x)


class Picked(nn.CrossEntropyLoss):
    """Cross entropy of what `pick` takes from the model's output."""

    def __init__(self, pick: Callable[[Any], Tensor], **options: Any) -> None:
        super().__init__(**options)
        self.pick = pick

    def forward(self, output: Any, target: Tensor) -> Tensor:
        return super().forward(self.pick(output), target)


@case("conv1d blocks with a tied head", loss=lambda: Picked(lambda y: y.mT))
def _() -> Any:
    return Gpt(), torch.randint(9, (N, 5)), torch.randint(9, (N, 5))


@case("per-layer loops of cells, N positions", loss=lambda: Picked(lambda y: y.mT))
def _() -> Any:
    return nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 9)), torch.randint(9, (N, N)), torch.randint(9, (N, N))


# -- shapes of programs ----------------------------------------------------------------------------


class Named(nn.Module):
    """Submodules under names that others use for their own."""

    def __init__(self) -> None:
        super().__init__()
        self.output, self.input0, self.grad_batch = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.grad_batch(self.input0(self.output(x).relu()).relu())


@case("submodule named output")
def _() -> Any:
    return Named(), torch.randn(N, 5), labels()


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return 2 * super().forward(input.tanh())


class Standardized(nn.Conv2d):
    """Weight standardisation: the weight that is used is made of the parameter."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, w / (w.std((1, 2, 3), keepdim=True) + 1e-3), self.bias)


@case("subclass of linear")
def _() -> Any:
    return nn.Sequential(Scaled(5, 6), Scaled(6, 3)), torch.randn(N, 5), labels()


@case("subclass of conv2d")
def _() -> Any:
    return image_net(Standardized(4, 5, 3))


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


@dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]


class Structured(nn.Module):
    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.wrap = nn.Linear(5, 6), nn.Linear(6, 3), wrap

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).tanh()
        return self.wrap(self.b(h), h)


for _name, _wrap, _pick in [
    ("dictionary", lambda y, h: {"logits": y, "hidden": h, "size": 3}, lambda out: out["logits"]),
    ("tuple", lambda y, h: (h, (None, y)), lambda out: out[1][1]),
    ("named tuple", Pair, lambda out: out.logits),
    ("data class", lambda y, h: Output(y, [h]), lambda out: out.logits + out.hidden[0][:, :3]),
    ("tuple, loss on both", lambda y, h: (h, y), lambda out: out[1] + out[0].sum(1, keepdim=True) * torch.arange(3.0)),
]:

    @case(f"output {_name}", loss=lambda pick=_pick: Picked(pick))
    def _(wrap: Any = _wrap) -> Any:
        return Structured(wrap), torch.randn(N, 5), labels()


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head((self.net(a) - self.net(b)).abs())


@case("siamese")
def _() -> Any:
    return Siamese(), (torch.randn(N, 5), torch.randn(N, 5)), labels()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.conv = nn.Linear(5, 6), nn.Linear(6, 3), nn.Conv1d(1, 1, 3, padding=1)
        self.shift, self.scale = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.shift
        F.leaky_relu_(y, 0.1)
        y = self.conv(y[:, None])[:, 0]
        y *= 0.5
        y += y.detach().cos()
        z = y.clone()
        z.mul_(self.scale).add_(self.shift)
        return self.b(F.silu(z, inplace=True))


@case("in-place activations and sums")
def _() -> Any:
    return InPlace(), torch.randn(N, 5), labels()


class ResBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.relu = nn.GroupNorm(2, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.relu(self.norm(self.a(x))))
        y += x
        return self.relu(y)


@case("residual blocks in place")
def _() -> Any:
    return image_net(nn.Sequential(ResBlock(), ResBlock()), size=4)


class Experts(nn.Module):
    """A gate made of data weights experts whose weights are stacked in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.w = nn.Linear(5, 2), nn.Parameter(torch.randn(2, 3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ne,nec->nc", self.gate(x).softmax(1), torch.einsum("nd,ecd->nec", x, self.w))


@case("mixture of experts")
def _() -> Any:
    return Experts(), torch.randn(N, 5), labels()


class Chosen(nn.Module):
    """One of several matrices, chosen by a number that was computed from the data; a number made an axis again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.w = nn.Linear(5, 4), nn.Parameter(torch.randn(3, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([row.sum()[None] + row for row in self.first(x)])
        return h.sin() @ self.w[(x[0] > -1e9).sum() % 3]


@case("a matrix chosen by data")
def _() -> Any:
    return Chosen(), torch.randn(N, 5), labels()


class Routed(nn.Module):
    """Tokens of all samples gathered for the experts that a gate chooses, as in a mixture of experts."""

    def __init__(self, sort: bool) -> None:
        super().__init__()
        self.embed, self.gate, self.head = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.sort = sort
        self.w, self.b = nn.Parameter(torch.randn(3, 5, 5)), nn.Parameter(torch.randn(3, 5))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 5)) for _ in range(3))
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(0, 1)
        weight, chosen = self.gate(h).softmax(-1).topk(2, -1)
        if self.sort:
            order = chosen.flatten().argsort(stable=True)
            counts = chosen.flatten().bincount(minlength=3).tolist()
            parts = self.norm(h.repeat_interleave(2, 0)[order]).split(counts)
            done = torch.cat([part @ self.w[k] + self.b[k] for k, part in enumerate(parts)]).relu()
            out = (done[order.argsort()].unflatten(0, (-1, 2)) * weight[..., None]).sum(1)
        else:
            out = torch.zeros_like(h)
            for k, expert in enumerate(self.experts):
                token, slot = torch.where(chosen == k)
                out = out.index_add(0, token, self.norm(expert(h[token])) * weight[token, slot, None])
        return self.head((h + out).unflatten(0, (len(x), -1)).mean(1))


@case("tokens routed to experts")
def _() -> Any:
    return Routed(sort=False), torch.randn(N, 3, 4), labels()


@case("tokens sorted by expert")
def _() -> Any:
    return Routed(sort=True), torch.randn(N, 3, 4), labels()


class Pieces(nn.Module):
    """Four matrices `[4, 4]` in one parameter, or each in one of its own."""

    def __init__(self, how: str, together: bool = True) -> None:
        super().__init__()
        self.how = how
        parts = [torch.randn(4, 4) for _ in range(4)]
        self.head = nn.Linear(4, 3)
        whole = torch.cat(parts) if how == "rows" else torch.stack(parts)
        self.w = nn.Parameter(whole) if together else nn.ParameterList(parts)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.w, nn.ParameterList):
            w: Any = list(self.w)
        else:
            w = self.w.chunk(4) if self.how == "rows" else self.w
        q, k = (self.apply_to(x.roll(i, 1), w[i]) for i in range(2))
        z = self.apply_to(q.tanh(), w[3])  # the third is not used at all
        again = self.apply_to(k.tanh(), w[1])  # and the second twice
        return self.head((z + again).tanh().mean(1))

    def apply_to(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ w if self.how == "product" else x @ w.t() if self.how == "turned" else F.linear(x, w)


@case("pieces of one weight")
def _() -> Any:
    return Pieces("rows"), torch.randn(N, 3, 4), labels()


@case("stacked weights, transposed")
def _() -> Any:
    return Pieces("turned"), torch.randn(N, 3, 4), labels()


class Relative(nn.Module):
    """Scores of two layers with biases from one table of relative positions, read once, or in each layer."""

    def __init__(self, once: bool = True) -> None:
        super().__init__()
        self.once = once
        self.table = nn.Embedding(7, 2)
        self.layers = nn.ModuleList(nn.Linear(4, 8) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def bias(self) -> Tensor:
        at = torch.arange(4)
        return self.table((at[:, None] - at).clamp(-2, 3) + 3).permute(2, 0, 1)[None]

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias()
        for layer in self.layers:
            bias = bias if self.once else self.bias()
            q, k = layer(x).unflatten(-1, (2, 4)).transpose(1, 2).chunk(2, -1)
            x = x + ((q @ k.mT + bias).softmax(-1) @ x[:, None]).sum(1)
        return self.head(x.mean(1))


@case("attention with biases from one table")
def _() -> Any:
    return Relative(), torch.randn(N, 4, 4), labels()


class Buffers(nn.Module):
    """Masks and constants that are buffers, and a low-rank update with a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(5, 6), nn.Linear(5, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.head = nn.Linear(6, 3)
        self.register_buffer("mask", torch.rand(6, 5).bernoulli())

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.base.weight * self.mask, self.base.bias) + 0.5 * self.b(self.a(x))
        return self.head(y.tanh())


@case("masked weight and adapter")
def _() -> Any:
    return Buffers(), torch.randn(N, 5), labels()


# -- losses, axes and batches --------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


@case("one sample")
def _() -> Any:
    return mlp(), torch.randn(1, 5), labels(1)


@case("one sample, convolution and norm")
def _() -> Any:
    return (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 3)),
        torch.randn(1, 2, 5, 5),
        labels(1),
    )


@case("one sample, one token")
def _() -> Any:
    return nn.Sequential(nn.Embedding(7, 6), Pool(), nn.Linear(6, 3)), torch.randint(7, (1, 1)), labels(1)


def ignored(targets: Tensor) -> list[float]:
    """Share of each sample in a mean over the targets that are not ignored."""
    real = (targets != 1).sum(1)
    return (real / real.sum()).tolist()


@case("ignored targets", loss=lambda: Picked(lambda y: y.mT, ignore_index=1), weights=ignored)
def _() -> Any:
    targets = torch.tensor([[0, 1, 2], [1, 1, 0], [2, 2, 2], [0, 2, 1]])
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)), torch.randn(N, 3, 5), targets


CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


@case(
    "class weights",
    loss=lambda: nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
    weights=lambda y: (CLASS_WEIGHTS[y] / CLASS_WEIGHTS[y].sum()).tolist(),
)
def _() -> Any:
    return mlp(), torch.randn(N, 5), labels()


@case("scalar multiple inside the loss", loss=lambda: Multiple())
def _() -> Any:
    return mlp(), torch.randn(N, 5), labels()


class Multiple(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return 1024 * super().forward(input, target)


@case("mse", loss=nn.MSELoss)
def _() -> Any:
    return mlp(), torch.randn(N, 5), torch.randn(N, 3)


@case("targets of many pixels")
def _() -> Any:
    return nn.Conv2d(2, 3, 3, padding=1), torch.randn(N, 2, 4, 4), torch.randint(3, (N, 4, 4))


for _t in (6, N):

    @case(f"time first, {_t} steps", batch_axis=1, loss=lambda: Picked(lambda y: y.mean(0)))
    def _(t: int = _t) -> Any:
        return Stacked(), torch.randn(t, N, 5), labels()


class Stacked(nn.Module):
    """Sequence-first: linear maps, a recurrent layer, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rnn, self.attend, self.b = (
            nn.Linear(5, 6),
            nn.GRU(6, 6),
            nn.MultiheadAttention(6, 2),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.rnn(self.a(x).relu())[0]
        return self.b(y + self.attend(y, y, y)[0])


@case("channels last")
def _() -> Any:
    model, x, y = image_net(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.GroupNorm(2, 6)))
    return model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last), y


@case("non-contiguous inputs")
def _() -> Any:
    model, x, y = image_net(nn.Conv2d(4, 6, 3))
    return model, x.transpose(2, 3), y


@case("expanded inputs")
def _() -> Any:
    return mlp(), torch.randn(1, 5).expand(N, 5), labels()


@case("input requires grad")
def _() -> Any:
    model, x, y = image_net(nn.Sequential(nn.Conv2d(4, 5, 3), nn.PReLU()))
    return model, x.requires_grad_(), y


@case("frozen in part")
def _() -> Any:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(27, 5), nn.ReLU(), nn.Linear(5, 3)
    )
    for p in (*model[0].parameters(), model[1].bias, model[3].weight):
        p.requires_grad_(False)
    return model, torch.randn(N, 2, 5, 5), labels()


class Unused(nn.Module):
    """A second head that is run and not used, and a layer that is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.other, self.idle = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        return self.b(h), self.other(h)


@case("two heads, one unused", loss=lambda: Picked(lambda y: y[0]))
def _() -> Any:
    return Unused(), torch.randn(N, 5), labels()


@case("two heads, both used", loss=lambda: Picked(lambda y: y[0] + y[1].sum(1, keepdim=True) * torch.arange(3.0)))
def _() -> Any:
    return Unused(), torch.randn(N, 5), labels()


class Fourier(nn.Module):
    """A filter that is learned where the input is multiplied with its transform, and weights of two real parts."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.out = nn.Parameter(torch.randn(6)), nn.Linear(6, 5)
        self.real, self.imaginary = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5, 3))
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        h = self.out(torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(self.filter) * self.gain, n=6))
        return (torch.view_as_complex(torch.stack([h, h.sin()], 2)) @ torch.complex(self.real, self.imaginary)).abs()


@case("complex numbers of real parameters")
def _() -> Any:
    return Fourier(), torch.randn(N, 6), labels()


class Fast(nn.Module):
    """A layer that is called with weights computed in the same forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.factor = nn.Linear(5, 3), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        values = {name: p * self.factor for name, p in self.base.named_parameters()}
        return torch.func.functional_call(self.base, values, (x,)) + self.base(x)


@case("functional_call with computed weights")
def _() -> Any:
    return Fast(), torch.randn(N, 5), labels()


class TwoHeads(nn.Module):
    """The sign of a sample's first entry says which of two heads it goes to, `[N, 4]` to `[N, 3]`."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(4, 5), nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, x: Tensor) -> Tensor:
        h, out = torch.tanh(self.body(x)), x.new_zeros(len(x), 3)
        for k, head in enumerate(self.heads):
            rows = ((x[:, 0] > 0) == bool(k)).nonzero().flatten()
            if len(rows):
                out = out.index_put((rows,), head(h[rows]))
        return out
