"""Mislabelled digits: the largest individual gradients, averaged over a training, are those of wrong labels.

One label in twenty is wrong. Samples are ranked by the norm of their gradients, which comes with each backward pass;
beside it the ranking by loss, and what a random order would find.
"""

from __future__ import annotations

import torch
from frame import BLUE, GREY, ORANGE, Shown, digits, perceptron, picture, run, tidy
from matplotlib.figure import Figure
from torch import nn

import packext as px


def show(small: bool) -> Shown:
    torch.manual_seed(0)
    x, truth = digits()
    wrong = torch.randperm(len(truth))[: len(truth) // 20]
    y = truth.index_add(0, wrong, torch.randint(1, 10, wrong.shape)) % 10
    is_wrong = torch.zeros(len(y), dtype=torch.bool).index_fill(0, wrong, True)

    model, loss_fn = px.extend(perceptron(64, 32, 10)), px.extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    norms, losses, visits = torch.zeros(3, len(y))
    for _ in range(100 if small else 600):
        batch = torch.randperm(len(y))[:128]
        optimizer.zero_grad()
        output = model(x[batch])
        with px.backpack(px.BatchL2Grad(), scale="sample", attach=False) as results:
            loss_fn(output, y[batch]).backward()
        norms[batch] += results.batch_l2.sqrt()
        losses[batch] += nn.functional.cross_entropy(output.detach(), y[batch], reduction="none")
        visits[batch] += 1
        optimizer.step()

    k = len(wrong)
    numbers: dict[str, object] = {"wrong labels": f"{k} of {len(y)}"}
    figure = Figure((10, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    axes = left.subplots()
    orders = {name: (score / visits).argsort(descending=True) for name, score in (("norm", norms), ("loss", losses))}
    for (name, order), color in zip(orders.items(), (ORANGE, BLUE), strict=True):
        hits = is_wrong[order].cumsum(0)
        numbers[f"wrong among the first {k} by {name}"] = hits[k - 1].item()
        axes.plot(range(1, 3 * k + 1), hits[: 3 * k], color=color, label=f"by {name}")
    numbers[f"wrong among {k} at random, on average"] = k * k / len(y)
    axes.plot([0, 3 * k], [0, 3 * k * k / len(y)], color=GREY, label="at random")
    axes.set(xlabel="samples looked at", ylabel="wrong labels found")
    axes.legend(frameon=False)
    tidy(axes)
    parts = right.subplots(3, 6)
    for part, index in zip(parts.flat, orders["norm"].tolist(), strict=False):
        said = f"is {truth[index]}" if is_wrong[index] else "is right"
        picture(part, x[index], f'"{y[index]}", {said}', "gray_r")
    right.suptitle("the first by norm", fontsize=10)
    return figure, numbers


if __name__ == "__main__":
    run(show)
