"""Influence and data selection: which training samples serve a task, found by projected gradients.

Of a pool of digits one in four stands on its head; the task is to read such digits, of which there are a few examples.
Gradients are projected in the backward pass, and never formed; each example chooses the samples whose gradients have
the largest cosine with its own, in turn (after LESS, Xia et al. 2024). A mean over examples of all classes chooses
badly.
"""

from __future__ import annotations

from typing import Any

import torch
from frame import BLUE, GREY, ORANGE, Shown, accuracy, digits, fit, perceptron, picture, run, tidy
from matplotlib.figure import Figure
from torch import Tensor, nn

import packext as px

POOL, EXAMPLES, CHOSEN = 1200, 30, 200


def train(x: Tensor, y: Tensor, steps: int, seed: int = 0) -> nn.Module:
    model = perceptron(64, 32, 10, seed=seed)
    fit(model, x, y, steps, size=64)
    return model


def gradients(model: nn.Module, x: Tensor, y: Tensor, quantity: Any) -> Tensor:
    """Individual gradients, or projections of them, of norm 1 `[N, ...]`."""
    loss_fn = px.extend(nn.CrossEntropyLoss())
    with px.backpack(quantity, scale="sample", attach=False, grad=False) as results:
        loss_fn(model(x), y).backward()
    parts = [getattr(results[p], quantity.savefield).flatten(1) for p in model.parameters()]
    return nn.functional.normalize(torch.cat(parts, 1))


def show(small: bool) -> Shown:
    x, y = digits()
    turned = torch.arange(len(y)) % 4 == 0
    x = torch.where(turned[:, None], x.flip(1), x)
    held = torch.arange(POOL, len(y))[turned[POOL:]]
    task, test = held[:EXAMPLES], held[EXAMPLES:]
    model = px.extend(train(x[:POOL], y[:POOL], 20))
    numbers: dict[str, Any] = {}

    def cosines(quantity: Any) -> Tensor:
        return gradients(model, x[:POOL], y[:POOL], quantity) @ gradients(model, x[task], y[task], quantity).T

    exact, dims = cosines(px.BatchGrad()), (2, 8) if small else (1, 2, 4, 8, 16)
    found = {dim: cosines(px.ProjectedGrad(dim)) for dim in dims}
    for dim in dims:
        agreement = torch.corrcoef(torch.stack([found[dim].flatten(), exact.flatten()]))[0, 1].item()
        numbers[f"correlation with exact cosines, projected to {dim} by {dim} for each weight"] = agreement

    places = found[8].argsort(0, descending=True).argsort(0)  # of each sample in the ranking by each example
    choices = {
        "chosen by examples": places.min(1).values.argsort(stable=True)[:CHOSEN],
        "chosen by their mean": found[8].mean(1).argsort(descending=True)[:CHOSEN],
    }
    rights: dict[str, list[float]] = {}
    for name, index in (*choices.items(), ("at random", None)):
        rights[name] = []
        for seed in range(2 if small else 5):
            torch.manual_seed(seed)
            drawn = torch.randperm(POOL)[:CHOSEN] if index is None else index
            rights[name].append(accuracy(train(x[drawn], y[drawn], 200, seed), x[test], y[test]))
        share = turned[:POOL].float().mean() if index is None else turned[index].float().mean()
        numbers[f"{CHOSEN} {name}: share of turned digits, accuracy on those held out"] = (
            share.item(),
            sum(rights[name]) / len(rights[name]),
        )

    figure = Figure((9, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.4, 1))
    parts = left.subplots(4, 7)
    for row, k in zip(parts, range(4), strict=True):
        picture(row[0], x[task[k]], f"example, {y[task[k]]}", "Blues")
        for axes, index in zip(row[1:], found[8][:, k].argsort(descending=True).tolist(), strict=False):
            picture(axes, x[index], f"{y[index]}{', turned' if turned[index] else ''}", "gray_r")
    axes = right.subplots()
    for k, (values, color) in enumerate(zip(rights.values(), (ORANGE, BLUE, GREY), strict=True)):
        axes.plot([k] * len(values), values, "o", color=color)
    labels = [name.replace(" by ", "\nby ") for name in rights]
    axes.set(xlim=(-0.5, 2.5), xticks=range(3), xticklabels=labels, ylabel="accuracy on turned digits")
    tidy(axes)
    return figure, numbers


if __name__ == "__main__":
    run(show)
