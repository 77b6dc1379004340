"""Small trainings on what comes with Python and scikit-learn, for docs/learned-rate.md and docs/optim.md."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.learned_train import split

CONTEXT = 32


@dataclass(frozen=True)
class Problem:
    """A training.

    Attributes:
        data: inputs and targets for training, and for evaluation.
        model: makes a network; torch's random numbers are seeded before.
        losses: from outputs and targets, a loss of each sample `[N]`.
        batch: samples in a batch.
        steps: how many.
    """

    data: Callable[[], tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]
    model: Callable[[], nn.Module]
    losses: Callable[[Tensor, Tensor], Tensor]
    batch: int
    steps: int


def classes(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets, reduction="none").mean(1)


def tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)


def perceptron(*sizes: int) -> nn.Module:
    layers = [m for i, o in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


class Block(nn.Module):
    """Causal attention of 4 heads and a perceptron, each after a normalisation and beside the way through."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.other = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (4, -1)).transpose(1, 2) for t in self.qkv(self.one(x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.other(x))))


class LanguageModel(nn.Module):
    """Characters: the next one of each of 32."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.symbols, self.positions = nn.Embedding(len(text()[0]), width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(text()[0]))

    def forward(self, x: Tensor) -> Tensor:
        where = torch.arange(x.shape[1]).expand_as(x)
        return self.head(self.norm(self.blocks(self.symbols(x) + self.positions(where))))


@functools.cache
def text() -> tuple[list[str], Tensor]:
    """Symbols, and Python's reference as their numbers."""
    whole = "\n".join(topics[k] for k in sorted(topics))
    symbols = sorted(set(whole))
    number = {c: k for k, c in enumerate(symbols)}
    return symbols, torch.tensor([number[c] for c in whole])


@functools.cache
def characters() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Pieces of 33 characters: the first nine tenths of the text, and the rest."""
    pieces = text()[1]
    pieces = pieces[: len(pieces) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    cut = int(0.9 * len(pieces))
    return tuple((part[:, :-1], part[:, 1:]) for part in (pieces[:cut], pieces[cut:]))  # type: ignore[return-value]


def table(
    load: Callable[..., tuple[object, object]], numbers: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Columns with mean 0 and variance 1, targets too if they are numbers; four fifths and the rest."""
    x, y = (torch.tensor(part) for part in load(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order].double(), y[order]
    x = ((x - x.mean(0)) / x.std(0)).float()
    y = ((y - y.mean()) / y.std()).float()[:, None] if numbers else y
    cut = math.ceil(0.8 * len(x))
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def evaluate(problem: Problem, model: nn.Module, part: int, most: int = 2000) -> tuple[float, float]:
    """Mean loss and accuracy on all data for training (0) or evaluation (1), or on `most` samples spread over it."""
    x, y = problem.data()[part]
    keep = torch.linspace(0, len(x) - 1, min(most, len(x))).long()
    x, y = x[keep], y[keep]
    with torch.no_grad():
        outputs = torch.cat([model(piece) for piece in x.split(500)])
    right = (outputs.argmax(-1) == y).float().mean().item() if y.dtype == torch.long else math.nan
    return problem.losses(outputs, y).mean().item(), right


def batches(problem: Problem, seed: int, steps: int) -> Tensor:
    """Indices `[steps, batch]`."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(len(problem.data()[0][0]), (steps, problem.batch), generator=draw)


PROBLEMS = {
    "digits, 64-128-128-10": Problem(split, lambda: perceptron(64, 128, 128, 10), classes, 64, 400),
    "breast cancer, 30-32-2": Problem(
        functools.partial(table, load_breast_cancer, False), lambda: perceptron(30, 32, 2), classes, 64, 300
    ),
    "diabetes, 10-64-64-1, squared error": Problem(
        functools.partial(table, load_diabetes, True), lambda: perceptron(10, 64, 64, 1), squares, 64, 300
    ),
    "digits, 8 hidden layers of 64": Problem(split, lambda: perceptron(64, *[64] * 8, 10), classes, 64, 400),
    "digits, CNN": Problem(split, cnn, classes, 64, 200),
    "characters, transformer": Problem(characters, lambda: LanguageModel(32, 1), tokens, 16, 150),
}
