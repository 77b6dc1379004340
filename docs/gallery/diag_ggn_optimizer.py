"""Diagonal GGN optimizer: one of your own in ten lines, which divides the gradient by the GGN's diagonal.

A part of `px.optim` says what it needs of the backward pass, and what becomes of the update. Beside it are gradient
descent and Adam, of each the best of the same number of settings.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from frame import BLUE, GREY, ORANGE, Shown, digits, run, tidy
from matplotlib.figure import Figure
from torch import nn
from torch.optim import SGD, Adam

import packext as px

DRAWS = torch.Generator().manual_seed(0)


class DiagonalNewton(px.optim.Part):
    """Divide the update by the diagonal of the GGN of this batch, and a constant."""

    def quantities(self, optimizer: Any) -> list[Any]:
        return [px.DiagGGNMC(generator=DRAWS)]

    def __call__(self, work: Any) -> None:
        diagonals, dampings = work.emitted("diag_ggn_mc"), work.of("damping")
        work.updates = [u / (d + c) for u, d, c in zip(work.updates, diagonals, dampings, strict=True)]


def ours(model: nn.Module, setting: tuple[float, float]) -> torch.optim.Optimizer:
    rate, damping = setting
    parts = [DiagonalNewton(damping=damping), px.optim.Momentum(0.9), px.optim.Descend(lr=rate)]
    return px.optim.Optimizer(model.parameters(), parts)


def train(make: Callable[[nn.Module], torch.optim.Optimizer], steps: int) -> list[float]:
    """Losses of batches of 128."""
    torch.manual_seed(0)
    layers = nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()
    model, loss_fn = nn.Sequential(*layers, nn.Linear(128, 10)), nn.CrossEntropyLoss()
    optimizer, losses = make(model), []
    emits = isinstance(optimizer, px.optim.Optimizer)
    if emits:
        px.extend(model), px.extend(loss_fn)
    x, y = digits()
    for _ in range(steps):
        batch = torch.randint(len(y), (128,))
        optimizer.zero_grad()
        with px.optim.emit(optimizer) if emits else nullcontext():
            loss = loss_fn(model(x[batch]), y[batch])
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def show(small: bool) -> Shown:
    steps = 30 if small else 80
    settings: dict[str, list[Any]] = {
        "divided by the GGN's diagonal": [(0.01, 0.1), (0.03, 0.03), (0.01, 0.03), (0.03, 0.1), (0.1, 0.1), (0.1, 0.3)],
        "gradient descent, momentum 0.9": [0.03, 0.06, 0.1, 0.15, 0.2, 0.4],
        "Adam": [0.005, 0.01, 0.02, 0.04, 0.06, 0.08],
    }
    ways = ours, lambda m, rate: SGD(m.parameters(), rate, momentum=0.9), lambda m, rate: Adam(m.parameters(), rate)
    figure = Figure((7, 3.6), layout="constrained")
    axes, numbers = figure.subplots(), {}
    for (name, tried), way, color in zip(settings.items(), ways, (ORANGE, GREY, BLUE), strict=True):
        runs = {s: train(lambda m, s=s, way=way: way(m, s), steps) for s in (tried[2:3] if small else tried)}
        best, losses = min(runs.items(), key=lambda run: sum(run[1][-10:]))
        numbers[f"{name}: chosen setting"] = best
        numbers[f"{name}: loss of the first and the last 10 steps"] = sum(losses[:10]) / 10, sum(losses[-10:]) / 10
        axes.plot(losses, color=color, label=name)
    axes.set(xlabel="step", ylabel="loss of the batch", yscale="log")
    axes.legend(frameon=False)
    tidy(axes)
    return figure, numbers


if __name__ == "__main__":
    run(show)
