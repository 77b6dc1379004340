"""Small training problems: data, models and optimizers at rates that were found on a grid."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_sample_images
from torch import Tensor, nn

BATCH = 64
SYMBOLS = "abcdefghijklmnopqrstuvwxyz "


@dataclass
class Data:
    """Inputs and targets, split."""

    x: Tensor
    y: Tensor
    valid_x: Tensor
    valid_y: Tensor


def _split(x: Tensor, y: Tensor, valid: float = 0.25) -> Data:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, cut = x[order], y[order], int(len(x) * valid)
    return Data(x[cut:], y[cut:], x[:cut], y[:cut])


@cache
def digits(shape: tuple[int, ...]) -> Data:
    """8 x 8 images of digits, pixels from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    return _split(torch.tensor(images, dtype=torch.float32).view(-1, *shape) / 16, torch.tensor(labels))


@cache
def waves() -> Data:
    """Regression: a smooth function of eight numbers, with a little noise."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1600, 8, generator=g)
    y = torch.sin(x[:, :1] + x[:, 1:2]) + 0.5 * x[:, 2:3] * x[:, 3:4] + 0.3 * x[:, 4:5]
    return _split(x, y + 0.1 * torch.randn(y.shape, generator=g))


@cache
def cancer() -> Data:
    """Thirty standardised features, two classes."""
    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32)
    return _split((x - x.mean(0)) / x.std(0), torch.tensor(y))


@cache
def patches() -> Data:
    """Regression: the middle of 9 x 9 pixels of two photographs, of which the inner 3 x 3 are hidden; standardised."""
    g, parts = torch.Generator().manual_seed(2), []
    for image in load_sample_images().images:
        grey = torch.tensor(image, dtype=torch.float32).mean(-1)
        rows, columns = (torch.randint(0, size - 8, (900,), generator=g) for size in grey.shape)
        parts.append(grey.unfold(0, 9, 1).unfold(1, 9, 1)[rows, columns])
    x = torch.cat(parts)[:, None]
    x = (x - x.mean()) / x.std()
    y = x[:, :, 4, 4].clone()
    x[:, :, 3:6, 3:6] = 0.0
    return _split(x, y)


def _prose() -> str:
    return " ".join(" ".join(topics[k] for k in sorted(topics)).lower().split())


def _numbers(text: str) -> Tensor:
    """Of 29 symbols: a letter or a space, another sign, a digit."""
    return torch.tensor([SYMBOLS.find(c) if c in SYMBOLS else 27 + c.isdigit() for c in text])


@cache
def texts() -> Data:
    """24 characters each: Python's reference, the same backwards, or code; of 29 symbols, with a mean square of 1."""
    prose = _prose()
    code = " ".join(Path(inspect.getfile(nn.Transformer)).read_text().lower().split())
    g, length, pieces, kinds = torch.Generator().manual_seed(3), 24, [], []
    for kind, text in enumerate((prose, prose[::-1], code)):
        numbers = _numbers(text)
        starts = torch.randint(0, len(numbers) - length, (600,), generator=g)
        pieces.append(numbers.unfold(0, length, 1)[starts])
        kinds.append(torch.full((600,), kind))
    return _split(nn.functional.one_hot(torch.cat(pieces), 29).mT * 29**0.5, torch.cat(kinds))


@cache
def pixels() -> Data:
    """Digits, of which one column is left out, with noise, and the same without, to be told pixel by pixel."""
    data, g = digits((8, 8)), torch.Generator().manual_seed(4)
    clean, valid = (x[:, :, 1:].flatten(1) for x in (data.x, data.valid_x))
    x, valid_x = (y + 0.3 * torch.randn(y.shape, generator=g) for y in (clean, valid))
    return Data(x, clean, valid_x, valid)


@cache
def sets() -> Data:
    """Regression on 10 points in four dimensions: 40 times how far they scatter, not scaled."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(1600, 10, 4, generator=g) * (0.3 + 1.4 * torch.rand(1600, 1, 1, generator=g))
    y = 40 * x.std(1).mean(1, keepdim=True)
    return _split(x, y + torch.randn(y.shape, generator=g))


@cache
def sentences() -> Data:
    """20 characters of Python's reference each, and the 20 that come one after: of 29 symbols, mean square 1."""
    numbers, g, length = _numbers(_prose()), torch.Generator().manual_seed(6), 20
    pieces = numbers.unfold(0, length + 1, 1)[torch.randint(0, len(numbers) - length, (3000,), generator=g)]
    return _split(nn.functional.one_hot(pieces[:, :-1], 29) * 29**0.5, pieces[:, 1:])


@cache
def corners() -> Data:
    """Patches of 8 x 8 pixels in colour, standardised: of which of two photographs, and of its upper or lower half."""
    g, parts = torch.Generator().manual_seed(7), []
    for image in load_sample_images().images:
        whole = torch.tensor(image, dtype=torch.float32).movedim(2, 0)
        for half in whole.chunk(2, 1):
            rows, columns = (torch.randint(0, size - 7, (500,), generator=g) for size in half.shape[1:])
            parts.append(half.unfold(1, 8, 1).unfold(2, 8, 1)[:, rows, columns].movedim(1, 0))
    x = torch.cat(parts)
    return _split((x - x.mean()) / x.std(), torch.arange(4).repeat_interleave(500))


@cache
def friedman() -> Data:
    """Regression: Friedman's first function (1991) of five of ten numbers, with its noise; standardised."""
    g = torch.Generator().manual_seed(8)
    x = torch.rand(1600, 10, generator=g)
    y = 10 * torch.sin(torch.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = (y + torch.randn(1600, generator=g))[:, None]
    return _split((x - 0.5) * 12**0.5, (y - y.mean()) / y.std())


@cache
def signals() -> Data:
    """32 samples of an oscillation with noise, which is a sine, a square, a triangle or a saw tooth."""
    g = torch.Generator().manual_seed(9)
    kind = torch.randint(0, 4, (2000,), generator=g)
    steps = torch.arange(32)
    rate, start, height = (
        a + (b - a) * torch.rand(2000, 1, generator=g) for a, b in ((0.06, 0.16), (0, 1), (0.7, 1.3))
    )
    turn = (rate * steps + start) % 1
    shapes = torch.stack([
        2**0.5 * torch.sin(2 * torch.pi * turn), torch.sign(turn - 0.5), 3**0.5 * (4 * (turn - 0.5).abs() - 1),
        3**0.5 * (2 * turn - 1),
    ])  # fmt: skip
    x = height * shapes[kind, torch.arange(2000)] + 0.2 * torch.randn(2000, 32, generator=g)
    return _split(x[..., None], kind)


@cache
def recalls() -> Data:
    """Five symbols of six, of which the first is the class; mean square 1."""
    symbols = torch.randint(6, (2000, 5), generator=torch.Generator().manual_seed(10))
    return _split(nn.functional.one_hot(symbols, 6) * 6**0.5, symbols[:, 0])


@cache
def parities() -> Data:
    """Twelve signs, and whether the product of the first three of them is positive."""
    signs = 2.0 * torch.randint(2, (3000, 12), generator=torch.Generator().manual_seed(11)) - 1
    return _split(signs, (signs[:, :3].prod(1) > 0).long())


def he(model: nn.Sequential) -> nn.Sequential:
    """Start all layers but the last one as He et al. (2015) do."""
    for m in list(model.children())[:-1]:
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
    return model


def mlp(widths: list[int], activation: Callable[[], nn.Module]) -> nn.Sequential:
    """A perceptron."""
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(a, b), activation()]
    return he(nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1])))


def cnn() -> nn.Sequential:
    """Three convolutions and two dense layers."""
    return he(nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10),
    ))  # fmt: skip


def strided() -> nn.Sequential:
    """Two convolutions with strides and two dense layers, with GELU between them."""
    return he(nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2), nn.GELU(), nn.Conv2d(12, 16, 2), nn.GELU(), nn.Flatten(),
        nn.Linear(144, 32), nn.GELU(), nn.Linear(32, 1),
    ))  # fmt: skip


def reader() -> nn.Sequential:
    """Two convolutions over the characters, whose largest outputs are classified."""
    return he(nn.Sequential(
        nn.Conv1d(29, 24, 5), nn.ReLU(), nn.Conv1d(24, 24, 3), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(),
        nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3),
    ))  # fmt: skip


class Residual(nn.Module):
    """Two convolutions with GroupNorm around a skip connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(4, width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.GroupNorm(4, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def resnet() -> nn.Sequential:
    """A stem, three residual blocks, and a head."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), Residual(8), Residual(8), Residual(8),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


class Block(nn.Module):
    """Self-attention and a perceptron, each with LayerNorm before it and a skip around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        x = x + self.attention(z, z, z, need_weights=False)[0]
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Reads the rows of an image as tokens."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.position)).mean(1))


class Sets(nn.Module):
    """A perceptron of each point, the sum over the points, and a perceptron of that (Zaheer et al. 2017)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.all = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.all(self.each(x).sum(1))


def separable() -> nn.Sequential:
    """Convolutions of each channel and of each pixel in turn, with LeakyReLU, and their mean over the image."""
    return he(nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.LeakyReLU(0.1),
        nn.Conv2d(16, 16, 3, stride=2, groups=16), nn.Conv2d(16, 32, 1), nn.LeakyReLU(0.1),
        nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 32, 1), nn.LeakyReLU(0.1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    ))  # fmt: skip


class Mixing(nn.Module):
    """Two dense layers with RMSNorm before them, ELU between them and a skip around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.elu(self.up(self.norm(x))))


class Recurrent(nn.Module):
    """An LSTM, or GRU, that gives its outputs alone."""

    def __init__(self, inputs: int, width: int, kind: type[nn.LSTM | nn.GRU] = nn.LSTM) -> None:
        super().__init__()
        self.cells = kind(inputs, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0]


class Writer(nn.Module):
    """Says of each character which one comes next."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed, self.recurrent = nn.Linear(29, 16), Recurrent(16, width)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, 29)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.recurrent(self.embed(x))))).mT


class Hearer(nn.Module):
    """Reads a signal four samples at a time by a GRU, and classifies the mean of what it gives."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.frames, self.recurrent = nn.Conv1d(1, 16, 4, stride=2), Recurrent(16, width, nn.GRU)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.tanh(self.frames(x.mT))
        return self.head(torch.relu(self.hidden(self.recurrent(frames.mT).mean(1))))


class Last(nn.Module):
    """Reads a sequence by an LSTM, and classifies what it gives last."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.recurrent = nn.Linear(6, 16), Recurrent(16, width)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.recurrent(self.embed(x))[:, -1])))


@dataclass
class Problem:
    """A family of models on one data set.

    Attributes:
        make: the model.
        data: the data.
        loss: the loss module.
        middle: path of a layer in the middle.
        blocks: paths of modules that the gradient passes one after the other.
        rates: learning rate of each optimizer, from 0.0003, 0.001, ... 10 (for `sets` from 0.000001 on) by the
            validation loss after 200 steps without a monitor (seeds 0 and 1, models of about this size): the best, or
            the next lower where the next higher fails.
        relu: path of a layer whose output goes into a ReLU, if there is one.
        plain: whether the layers feed each other with no way around them.
        held_out: whether it was kept from whoever chose the thresholds.
    """

    make: Callable[[], nn.Module]
    data: Callable[[], Data]
    loss: Callable[[], nn.Module]
    middle: str
    blocks: tuple[str, ...]
    rates: dict[str, float]
    relu: str | None
    plain: bool
    held_out: bool = False

    @property
    def small(self) -> bool:
        """Whether products with the Hessian are quick: of perceptrons, and of two networks of a few convolutions."""
        return self.plain and self.middle == "2"


CE, MSE, BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss
PROBLEMS = {
    "mlp": Problem(
        lambda: mlp([64, 96, 64, 48, 10], nn.ReLU), lambda: digits((64,)), CE, "2", ("1", "3", "5"),
        {"sgd": 0.1, "momentum": 0.03, "adam": 3e-3}, "2", True,
    ),
    "cnn": Problem(
        cnn, lambda: digits((1, 8, 8)), CE, "5", ("1", "4", "6", "10"),
        {"sgd": 0.1, "momentum": 0.03, "adam": 1e-2}, "3", True,
    ),
    "resnet": Problem(
        resnet, lambda: digits((1, 8, 8)), CE, "3.body.0", ("1", "2", "3", "4"),
        {"sgd": 0.1, "momentum": 0.01, "adam": 3e-3}, "3.body.1", False,
    ),
    "regression": Problem(
        lambda: mlp([8, 48, 48, 48, 1], nn.Tanh), waves, MSE, "2", ("1", "3", "5"),
        {"sgd": 0.1, "momentum": 0.03, "adam": 1e-2}, None, True,
    ),
    "transformer": Problem(
        Transformer, lambda: digits((8, 8)), CE, "blocks.0.down", ("embed", "blocks.0", "blocks.1"),
        {"sgd": 0.1, "momentum": 0.03, "adam": 3e-3}, "blocks.0.up", False,
    ),
    "tabular": Problem(
        lambda: mlp([30, 48, 48, 32, 2], nn.ReLU), cancer, CE, "2", ("1", "3", "5"),
        {"sgd": 0.1, "momentum": 0.01, "adam": 3e-4}, "2", True,
    ),
    "patches": Problem(
        strided, patches, MSE, "2", ("1", "3", "6"),
        {"sgd": 0.01, "momentum": 0.01, "adam": 3e-3}, None, True,
    ),
    "reader": Problem(
        reader, texts, CE, "2", ("1", "3", "7"),
        {"sgd": 0.1, "momentum": 0.01, "adam": 3e-3}, "6", True,
    ),
    "denoiser": Problem(
        lambda: mlp([56, 64, 16, 64, 56], nn.SiLU), pixels, BCE, "2", ("1", "3", "5"),
        {"sgd": 3.0, "momentum": 1.0, "adam": 1e-2}, None, True,
    ),
    "sets": Problem(
        Sets, sets, MSE, "each.2", ("each.1", "each.3", "all.1"),
        {"sgd": 1e-4, "momentum": 3e-5, "adam": 1e-2}, "all.0", True,
    ),
    "writer": Problem(
        Writer, sentences, CE, "hidden", ("embed", "recurrent", "hidden"),
        {"momentum": 0.3, "adam": 3e-2, "adagrad": 3e-2}, "hidden", False,
    ),
    "corners": Problem(
        separable, corners, CE, "3", ("1", "4", "7"),
        {"sgd": 0.1, "momentum": 0.01, "adam": 1e-2}, None, True,
    ),
    "friedman": Problem(
        lambda: nn.Sequential(nn.Linear(10, 32), Mixing(32), Mixing(32), Mixing(32), nn.Linear(32, 1)), friedman,
        nn.SmoothL1Loss, "2.up", ("0", "1", "2", "3"),
        {"sgd": 0.1, "momentum": 0.03, "rmsprop": 1e-3}, None, False,
    ),
    "hearer": Problem(
        Hearer, signals, CE, "hidden", ("frames", "recurrent", "hidden"),
        {"momentum": 0.1, "adam": 1e-2, "rmsprop": 3e-3}, "hidden", False,
    ),
    "recaller": Problem(
        Last, recalls, CE, "hidden", ("embed", "recurrent", "hidden"),
        {"adam": 1e-2, "adagrad": 3e-2, "rmsprop": 3e-3}, "hidden", False,
    ),
    "parity": Problem(
        lambda: mlp([12, 64, 64, 32, 2], nn.GELU), parities, CE, "2", ("1", "3", "5"),
        {"sgd": 0.3, "momentum": 0.03, "adam": 1e-2}, None, True,
    ),
}  # fmt: skip


def optimizer(name: str, groups: list[dict], rate: float) -> torch.optim.Optimizer:
    """SGD, SGD with momentum 0.9, AdamW, Adagrad, or RMSprop."""
    others = {"adam": torch.optim.AdamW, "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}
    if name in others:
        return others[name](groups, rate)
    return torch.optim.SGD(groups, rate, momentum=0.9 if name == "momentum" else 0.0)
