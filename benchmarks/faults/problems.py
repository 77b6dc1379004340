"""Small training problems: data, models and optimizers at rates that were found on a grid."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.faults import everyday, later, unseen
from benchmarks.faults.data import (
    Data,
    bandits,
    cancer,
    claims,
    copies,
    corners,
    digits,
    friedman,
    low_digits,
    noised,
    parities,
    patches,
    pixels,
    recalls,
    sentences,
    sets,
    signals,
    tails,
    texts,
    waves,
)

BATCH = 64


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
            the next lower where the next higher fails, or where the validation loss jumps (`segmenter` with momentum);
            a tenth of it where a network is tuned that was trained before.
        relu: path of a layer whose output goes into a ReLU, if there is one.
        plain: whether the layers feed each other with no way around them.
        held_out: whether it is kept from whoever chooses the thresholds.
        draw: makes a step's inputs and targets of the samples that were chosen, for those that are drawn anew.
        schedule: a factor on the learning rate, by the step.
        given: whether each sample has inputs and targets of its own; else they are drawn anew in each step, or there
            are no targets.
        ids: whether inputs are ids, which have no scale.
        clip: the norm that gradients are clipped to.
        decay: AdamW's weight decay.
        harmless: faults that are left out since no harm of theirs was shown here, by severity.
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
    draw: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    schedule: Callable[[int], float] | None = None
    given: bool = True
    ids: bool = False
    clip: float | None = None
    decay: float = 0.01
    harmless: Mapping[str, Collection[str]] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        """Whether products with the Hessian are quick: of perceptrons, and of two networks of a few convolutions."""
        return self.plain and self.middle == "2" and self.given


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
    "vae": Problem(
        everyday.VAE, copies, everyday.Evidence, "code", ("into", "code", "out.1"),
        {"momentum": 3e-3, "adam": 1e-2, "rmsprop": 3e-3}, "out.0", True,
    ),
    "tuner": Problem(
        everyday.tuned, low_digits, CE, "9", ("7", "10"),
        {"sgd": 0.03, "momentum": 3e-3, "adam": 1e-3}, "9", True,
    ),
    "claims": Problem(
        lambda: everyday.dropped([32, 48, 48, 32, 1]), claims,
        lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor([13.0])), "3", ("2", "5", "8"),
        {"sgd": 0.1, "momentum": 0.01, "adam": 3e-3}, "3", True,
    ),
    "diffuser": Problem(
        everyday.Eps, noised, MSE, "body.2", ("body.1", "body.3", "body.5"),
        {"momentum": 0.3, "adam": 3e-3}, None, True,
        draw=everyday.noised_anew, schedule=everyday.warm, given=False,
    ),
    "actor": Problem(
        lambda: mlp([8, 48, 48, 4], nn.Tanh), bandits, everyday.Reward, "2", ("1", "3"),
        {"sgd": 0.1, "adam": 3e-3, "rmsprop": 1e-3}, None, True,
        draw=everyday.acted, given=False,
    ),
    "vit": Problem(
        everyday.ViT, lambda: digits((1, 8, 8)), lambda: nn.CrossEntropyLoss(label_smoothing=0.1), "blocks.0.down",
        ("patches", "blocks.0", "blocks.1"), {"adam": 1e-2, "rmsprop": 3e-3}, None, False,
        draw=everyday.mixed, schedule=everyday.cosine,
    ),
    "tails": Problem(
        lambda: everyday.normed([10, 48, 48, 32, 1]), tails, nn.HuberLoss, "3", ("2", "5", "8"),
        {"momentum": 0.1, "adam": 1e-2}, "4", True, schedule=everyday.one_cycle,
    ),
    "matcher": Problem(
        unseen.Matcher, unseen.matches, CE, "encoder.2", ("encoder.1", "encoder.3"),
        {"momentum": 0.03, "adam": 1e-2}, "encoder.2", True,
    ),
    "gpt": Problem(
        unseen.GPT, unseen.code, CE, "blocks.0.down", ("drop", "blocks.0", "blocks.1"),
        {"momentum": 0.3, "adam": 1e-2}, None, False,
        schedule=unseen.warm_cosine, ids=True, clip=1.0, decay=0.1,
    ),
    "recommender": Problem(
        unseen.Recommender, unseen.ratings, MSE, "deep.2", ("tables", "deep.1", "deep.3"),
        {"adam": 3e-2, "adagrad": 0.1}, "deep.2", False, ids=True,
    ),
    "segmenter": Problem(
        unseen.UNet, unseen.shapes, unseen.Overlap, "bottom.0", ("down1", "down2", "bottom", "merge2", "merge1"),
        {"momentum": 0.1, "adam": 3e-2}, "bottom.1", False,
        schedule=everyday.cosine,
    ),
    "counts": Problem(
        unseen.Counter, unseen.counts, nn.PoissonNLLLoss, "body.3", ("body.2", "body.5"),
        {"sgd": 0.01, "momentum": 3e-3, "adam": 3e-3}, "body.4", True,
    ),
    "forecaster": Problem(
        unseen.TCN, unseen.delayed, nn.L1Loss, "blocks.1.first", ("into", "blocks.0", "blocks.1", "blocks.2"),
        {"momentum": 0.03, "adam": 3e-3, "rmsprop": 1e-3}, "blocks.1.first", False,
    ),
    "transcriber": Problem(
        later.Transcriber, later.speech, later.Alignments, "hidden", ("frames", "recurrent", "hidden"),
        {"momentum": 0.03, "adam": 1e-2}, "hidden", False,
        harmless={
            "full": ("exploding", "inputs", "few samples"),
            "half": ("exploding", "inputs", "large weights", "few samples"),
        },
    ),
    "molecules": Problem(
        later.GIN, later.molecules, MSE, "rounds.1.body.0", ("rounds.0", "rounds.1", "rounds.2"),
        {"momentum": 0.01, "adam": 1e-2}, "rounds.1.body.0", True,
        harmless={
            "full": ("wrong labels", "slow layer", "few samples", "left out", "frozen"),
            "half": ("vanishing", "dead ReLUs", "inputs", "wrong labels", "slow layer", "few samples", "left out",
                "frozen", "detached"),
        },
    ),
    "flow": Problem(
        later.Flow, later.clouds, later.Surprise, "couplings.2.net.2", ("couplings.0", "couplings.2", "couplings.4"),
        {"momentum": 0.01, "adam": 1e-2, "rmsprop": 3e-3}, "couplings.2.net.2", False, given=False,
        harmless={
            "full": ("exploding", "vanishing", "dead ReLUs", "slow layer", "left out", "frozen"),
            "half": ("exploding", "vanishing", "dead ReLUs", "large weights", "slow layer", "left out", "frozen",
                "detached"),
        },
    ),
    "critic": Problem(
        lambda: mlp([6, 64, 64, 4], nn.ReLU), later.walks, later.Temporal, "2", ("1", "3"),
        {"momentum": 0.3, "adam": 1e-2, "rmsprop": 3e-3}, "2", True,
        draw=later.bootstrapped, given=False,
        harmless={
            "full": ("slow layer", "left out", "frozen"),
            "half": ("slow layer", "left out", "frozen", "detached"),
        },
    ),
    "siren": Problem(
        later.siren, later.painting, MSE, "4", ("1", "3", "5"),
        {"sgd": 0.01, "adam": 1e-3}, None, True,
        harmless={
            "half": ("vanishing", "detached"),
        },
    ),
    "detector": Problem(
        later.Detector, later.things, later.WhatAndWhere, "trunk.4", ("trunk.1", "trunk.3", "trunk.5", "trunk.8"),
        {"momentum": 0.03, "adam": 1e-2}, "trunk.4", True,
        harmless={
            "full": ("left out",),
            "half": ("dead ReLUs", "slow layer", "left out", "frozen"),
        },
    ),
    "translator": Problem(
        later.Translator, later.dates, lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
        "both.decoder.layers.0.linear1", ("both.encoder", "both.decoder"), {"adam": 1e-2, "rmsprop": 3e-3},
        "both.decoder.layers.0.linear1", False,
        schedule=later.inverse_root, ids=True,
        harmless={
            "full": ("exploding", "dead ReLUs", "slow layer", "left out", "frozen"),
            "half": ("exploding", "dead ReLUs", "slow layer", "left out", "frozen"),
        },
    ),
    "experts": Problem(
        later.Experts, later.regimes, later.Balanced, "into", ("into", "mixture"),
        {"momentum": 0.03, "adam": 1e-2, "adagrad": 0.1}, "into", False,
        harmless={
            "full": ("exploding", "small weights"),
            "half": ("exploding", "dead ReLUs", "inputs", "small weights"),
        },
    ),
}  # fmt: skip


def optimizer(name: str, groups: list[dict], rate: float, decay: float = 0.01) -> torch.optim.Optimizer:
    """SGD, SGD with momentum 0.9, AdamW, Adagrad, or RMSprop."""
    if name == "adam":
        return torch.optim.AdamW(groups, rate, weight_decay=decay)
    others = {"adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}
    if name in others:
        return others[name](groups, rate)
    return torch.optim.SGD(groups, rate, momentum=0.9 if name == "momentum" else 0.0)
