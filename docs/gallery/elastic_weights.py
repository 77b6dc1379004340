"""Elastic weight consolidation: learn a second task without forgetting the first, by the Fisher's diagonal.

Digits, then digits with their pixels in another order. Weights are held by `strength · importance · (w - w of the first
task)²` (Kirkpatrick et al. 2017), the importance being the exact diagonal of the Fisher, the same for all weights, or
the square of the batch's gradient, which is often taken for the Fisher. Each is scaled to a mean of 1, and tried with
several strengths.
"""

from __future__ import annotations

from typing import Any

import torch
from frame import BLUE, GREY, ORANGE, Shown, accuracy, digits, fit, perceptron, run, tidy
from matplotlib.figure import Figure
from torch import Tensor, nn

import packext as px

TRAINING = 1200


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, importance: list[Tensor], strength: float) -> None:
    """Train, held where the model is by what is important."""
    torch.manual_seed(1)
    start = [p.detach().clone() for p in model.parameters()]

    def penalty() -> Tensor:
        parts = zip(importance, model.parameters(), start, strict=True)
        return strength * torch.stack([(i * (p - s) ** 2).sum() for i, p, s in parts]).sum()

    fit(model, x[:TRAINING], y[:TRAINING], steps, 0.003, 64, penalty)


def importances(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, list[Tensor]]:
    """Three kinds, for every parameter."""
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    with px.backpack(px.DiagGGNExact()) as results:
        loss_fn(model(x), y).backward()
    parameters = list(model.parameters())
    found = {
        "Fisher": [results[p].diag_ggn_exact for p in parameters],
        "gradient, squared": [p.grad.square() for p in parameters],
        "the same for all": [torch.ones_like(p) for p in parameters],
    }
    px.unextend(model)
    mean = {name: torch.cat([v.flatten() for v in each]).mean() for name, each in found.items()}
    return {name: [v / mean[name] for v in each] for name, each in found.items()}


def show(small: bool) -> Shown:
    steps = 150 if small else 400
    x, y = digits()
    second = x[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    model = perceptron(64, 64, 10)
    nothing = [torch.zeros_like(p) for p in model.parameters()]
    train(model, x, y, steps, nothing, 0.0)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    held = [(x[TRAINING:], y[TRAINING:]), (second[TRAINING:], y[TRAINING:])]
    numbers: dict[str, Any] = {"accuracy on both tasks after the first": tuple(accuracy(model, *t) for t in held)}

    def both(importance: list[Tensor], strength: float) -> tuple[float, ...]:
        model.load_state_dict(start)
        train(model, second, y, steps, importance, strength)
        return tuple(accuracy(model, *task) for task in held)

    none = both(nothing, 0.0)
    numbers["after the second, nothing held"] = none
    model.load_state_dict(start)
    kinds = importances(model, x[:TRAINING], y[:TRAINING])
    strengths = (0.03, 0.3) if small else (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    figure = Figure((5.5, 4), layout="constrained")
    axes = figure.subplots()
    for (name, importance), color in zip(kinds.items(), (ORANGE, GREY, BLUE), strict=True):
        ends = [both(importance, strength) for strength in strengths]
        best = max(ends, key=sum)
        numbers[f"after the second, held by {name}, at the best strength"] = best
        axes.plot(*zip(none, *ends, strict=True), "o-", ms=4, color=color, label=name)
    axes.plot(*none, "s", color="black", label="nothing held")
    axes.set(xlabel="accuracy on the first task", ylabel="accuracy on the second task")
    axes.legend(frameon=False)
    tidy(axes)
    return figure, numbers


if __name__ == "__main__":
    run(show)
