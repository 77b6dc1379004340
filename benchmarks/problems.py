"""The networks and synthetic batches that every library is measured on.

All data are drawn once, from a fixed seed, and stay in memory: nothing but the passes themselves
is measured. The networks avoid what only some libraries accept (in-place activations,
``padding="same"``, position tables without a batch axis), so that every contender can run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

FIRST_SEED = 3


def net_3c3d() -> nn.Module:
    """Three convolutions and three dense layers on CIFAR-10 shapes, without dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(64, 96, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(96, 128, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Flatten(),
        nn.Linear(1152, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def net_3c3d_sigmoid() -> nn.Module:
    """3C3D with a sigmoid as its last activation: the Hessian's diagonal is not that of the GGN."""
    net = net_3c3d()
    assert isinstance(net, nn.Sequential)
    net[13] = nn.Sigmoid()
    return net


def net_allcnnc() -> nn.Module:
    """All-CNN-C on CIFAR-100 shapes, without dropout."""
    widths = [
        # channels in, channels out, kernel, stride, padding
        (3, 96, 3, 1, 1),
        (96, 96, 3, 1, 1),
        (96, 96, 3, 2, 1),
        (96, 192, 3, 1, 1),
        (192, 192, 3, 1, 1),
        (192, 192, 3, 2, 1),
        (192, 192, 3, 1, 0),
        (192, 192, 1, 1, 0),
        (192, 100, 1, 1, 0),
    ]
    layers: list[nn.Module] = []
    for channels_in, channels_out, kernel, stride, padding in widths:
        layers.append(nn.Conv2d(channels_in, channels_out, kernel, stride, padding))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group normalisation around a skip connection."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        """Set up the block; the skip is projected where shape changes."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, channels_out)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.skip = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(out)) + self.skip(x))


def net_resnet() -> nn.Module:
    """A 14-layer residual network with group normalisation on CIFAR shapes."""
    blocks: list[nn.Module] = []
    width = 16
    for channels in (16, 32, 64):
        for depth in range(2):
            stride = 2 if depth == 0 and channels > 16 else 1
            blocks.append(ResidualBlock(width, channels, stride))
            width = channels
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.GroupNorm(8, 16), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*stem, *blocks, *head)


class TransformerBlock(nn.Module):
    """Pre-norm causal self-attention and a two-layer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        """Set up the block."""
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.in_projection = nn.Linear(width, 3 * width)
        self.out_projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, of the input's shape (N, T, width)."""
        n, t, width = x.shape
        projected = self.in_projection(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads)
        q, k, v = projected.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out_projection(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A causal language model with learned positions; logits come out as (N, vocabulary, T)."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, depth: int) -> None:
        """Set up embeddings, blocks and head."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Return next-token logits for ids of shape (N, T)."""
        n, t = ids.shape
        positions = torch.arange(t, device=ids.device).repeat(n, 1)
        x = self.tokens(ids) + self.positions(positions)
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


class CharacterLSTM(nn.Module):
    """Embedding, one LSTM layer and a head; logits come out as (N, vocabulary, T)."""

    def __init__(self, vocabulary: int, width: int) -> None:
        """Set up the three layers."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Return next-token logits for ids of shape (N, T)."""
        hidden, _ = self.lstm(self.tokens(ids))
        return self.head(hidden).transpose(1, 2)


@dataclass(frozen=True)
class Problem:
    """A network, its batch size, and how a batch is drawn."""

    key: str
    title: str
    batch: int
    build: Callable[[], nn.Module]
    parameters: int
    vocabulary: int = 0
    length: int = 0
    classes: int = 0
    attention: bool = False
    max_norm: float = 1.0
    """Bound of the clipping row: one that acts on some of the samples."""
    tail: int = 0
    """How many layers, from the last curved one to the end, are not piecewise linear; set for the Hessian's row."""


@dataclass
class Instance:
    """A problem made concrete: a model, a loss and one batch on one device."""

    problem: Problem
    model: nn.Module
    loss_fn: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.inputs.shape[0]

    @property
    def names(self) -> list[str]:
        """Names of the parameters, in the model's order."""
        return [name for name, _ in self.model.named_parameters()]

    @property
    def linear(self) -> list[bool]:
        """Of each parameter, in the model's order, whether it is one of a linear layer."""
        own = {p for m in self.model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
        return [p in own for p in self.model.parameters()]

    def copy_model(self) -> nn.Module:
        """Return an independent copy of the model with the same weights."""
        return copy.deepcopy(self.model)


PROBLEMS: dict[str, Problem] = {
    problem.key: problem
    for problem in (
        Problem("3c3d", "3C3D, CIFAR-10 shapes", 64, net_3c3d, 895_210, classes=10),
        Problem(
            "3c3d-sigmoid",
            "3C3D with one sigmoid, CIFAR-10 shapes",
            8,
            net_3c3d_sigmoid,
            895_210,
            classes=10,
            tail=2,
        ),
        Problem("allcnnc", "All-CNN-C, CIFAR-100 shapes", 16, net_allcnnc, 1_387_108, classes=100),
        Problem("resnet", "ResNet-14 with GroupNorm, CIFAR shapes", 16, net_resnet, 175_066, classes=10),
        Problem(
            "transformer",
            "Transformer, 4 layers, width 256, 128 tokens",
            8,
            lambda: Transformer(1000, 128, 256, 4, 4),
            3_705_320,
            vocabulary=1000,
            length=128,
            attention=True,
        ),
        Problem(
            "gpt",
            "Transformer, 4 layers, width 256, 256 tokens",
            8,
            lambda: Transformer(1000, 256, 256, 4, 4),
            3_738_088,
            vocabulary=1000,
            length=256,
            attention=True,
        ),
        Problem(
            "lstm",
            "LSTM, width 128, 64 tokens",
            16,
            lambda: CharacterLSTM(96, 128),
            156_768,
            vocabulary=96,
            length=64,
            max_norm=0.32,
        ),
    )
}


def instantiate(problem: Problem, device: torch.device, seed: int = FIRST_SEED) -> Instance:
    """Build the model and draw the batch from a seed."""
    torch.manual_seed(seed)
    model = problem.build()
    count = sum(p.numel() for p in model.parameters())
    if count != problem.parameters:
        raise AssertionError(f"{problem.key}: {count} parameters, expected {problem.parameters}")
    if problem.vocabulary:
        shape = (problem.batch, problem.length)
        inputs = torch.randint(problem.vocabulary, shape)
        targets = torch.randint(problem.vocabulary, shape)
    else:
        inputs = torch.randn(problem.batch, 3, 32, 32)
        targets = torch.randint(problem.classes, (problem.batch,))
    return Instance(problem, model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device))
