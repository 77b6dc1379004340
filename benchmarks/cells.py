"""Cells of NAS-Bench-201's kind at the size of scikit-learn's digits, and how they are trained."""

from __future__ import annotations

import random

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

OPERATIONS = ("none", "skip", "conv1", "conv3", "pool")
#: Edges of a cell: from node i to node j, of which 0 is the input and 3 the output.
EDGES = [(i, j) for j in range(1, 4) for i in range(j)]
Genotype = tuple[str, ...]


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """ReLU, convolution, normalisation: of groups of a sample's channels, since BatchNorm would couple samples."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False),
        nn.GroupNorm(4, outputs),
    )


def operation(name: str, channels: int) -> nn.Module:
    if name == "skip":
        return nn.Identity()
    if name == "pool":
        return nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    return convolution(channels, channels, {"conv1": 1, "conv3": 3}[name])


class Cell(nn.Module):
    def __init__(self, genotype: Genotype, channels: int) -> None:
        super().__init__()
        pairs = zip(EDGES, genotype, strict=True)
        self.edges = nn.ModuleDict({f"{i}{j}": operation(o, channels) for (i, j), o in pairs if o != "none"})

    def forward(self, x: Tensor) -> Tensor:
        nodes = [x]
        for j in range(1, 4):
            into = [self.edges[f"{i}{j}"](nodes[i]) for i in range(j) if f"{i}{j}" in self.edges]
            nodes.append(torch.stack(into).sum(0) if into else torch.zeros_like(x))
        return nodes[-1]


def network(genotype: Genotype, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.GroupNorm(4, 8), Cell(genotype, 8),
        convolution(8, 16, 3, stride=2), Cell(genotype, 16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def connected(genotype: Genotype) -> bool:
    """Whether the cell's output depends on its input."""
    reached = {0}
    for (i, j), name in zip(EDGES, genotype, strict=True):
        if i in reached and name != "none":
            reached.add(j)
    return 3 in reached


def genotypes(count: int, seed: int = 0) -> list[Genotype]:
    """Different connected cells, drawn uniformly."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        genotype = tuple(draw.choice(OPERATIONS) for _ in EDGES)
        if connected(genotype) and genotype not in found:
            found.append(genotype)
    return found


def digits() -> list[tuple[Tensor, Tensor]]:
    """600 images to train with, 597 to choose by, 600 to test with: x `[N, 1, 8, 8]` from 0 to 1, and labels."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(x).float().view(-1, 1, 8, 8)[order] / 16, torch.tensor(y)[order]
    return [(images[part], labels[part]) for part in (slice(600), slice(600, 1197), slice(1197, None))]


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int, lr: float = 0.05, batch: int = 50) -> None:
    """SGD with Nesterov momentum and a cosine schedule."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(len(x), (batch,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
        schedule.step()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())
