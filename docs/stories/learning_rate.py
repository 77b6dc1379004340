"""A grid of learning rates against the median alpha of each run: too small creeps, too large bounces."""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np
import torch
from common import BLUE, GREY, ORANGE, device, images, network, tell, tidy, verdicts, watch
from matplotlib.figure import Figure
from torch import nn

from packext.diagnostics import Alpha


def learner(full: bool) -> nn.Sequential:
    """3C3D, or one hidden layer for digits."""
    if full:
        return network(full)
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def story(full: bool) -> tuple[Figure, dict[str, Any]]:
    """Train with each learning rate; draw the training loss at the end and the median alpha."""
    where, n, steps = device(full), 256, 1000 if full else 120
    pictures, labels = (t.to(where) for t in images(full))
    rates = np.logspace(-2.5, 0.5, 13 if full else 7)
    losses, alphas = [], []
    for rate in rates:
        model, loss, draw = learner(full).to(where), nn.CrossEntropyLoss(), torch.Generator().manual_seed(0)
        seen: list[float] = []
        monitor, step = watch(model, loss, [Alpha()], rate=float(rate), every=10)
        for _ in range(steps):
            batch = torch.randint(len(labels), (n,), generator=draw).to(where)
            step(pictures[batch], labels[batch])
            if "Alpha" in monitor.values:
                seen.append(monitor.values.pop("Alpha"))
        with torch.no_grad():
            end = float(loss(model(pictures[:4096]), labels[:4096]))
        losses.append(end)
        alphas.append(median(seen) if seen else float("nan"))
    best = int(np.nanargmin(losses))
    figure = Figure((8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    chance = float(np.log(len(set(labels.tolist()))))
    left.loglog(rates, losses, "o-", color=GREY)
    left.loglog(rates[best], losses[best], "o", color=ORANGE, ms=9)
    left.axhline(chance, color=GREY, lw=0.8, ls=":")
    left.text(rates[0], chance * 1.06, "guessing", color=GREY, fontsize=8)
    left.set(title="training loss at the end", xlabel="learning rate", ylim=(None, 2 * chance))
    right.semilogx(rates, alphas, "o-", color=BLUE)
    right.semilogx(rates[best], alphas[best], "o", color=ORANGE, ms=9, label="lowest loss")
    right.axhline(0, color=GREY, lw=0.8)
    right.set(title="median alpha", xlabel="learning rate")
    right.legend(frameon=False)
    tidy(left), tidy(right)
    numbers: dict[str, Any] = {"best learning rate": float(rates[best]), "its median alpha": alphas[best]}
    for rate in (rates[0], rates[best], rates[-1]):
        said = verdicts(learner(full).to(where), pictures, labels, float(rate), steps, n)
        numbers[f"verdicts, learning rate {rate:.2g}"] = said
    for rate, end, alpha in zip(rates, losses, alphas, strict=True):
        numbers[f"learning rate {rate:.2g}: loss, median alpha"] = f"{end:.3f}, {alpha:.2f}"
    return figure, numbers


if __name__ == "__main__":
    tell(story)
