"""CG-Newton: Newton steps by conjugate gradients, with products of three curvatures, on a network of sigmoids.

Each parameter's block of the Hessian (`HMP`), the GGN (`GGNMP`) or the positive-curvature Hessian (`PCHMP`) is a
function, and is never formed. Beside it gradient descent with momentum; of each the best of three settings. With the
two Hessians steps are fewer; none of them is cheap.
"""

from __future__ import annotations

from typing import Any

import torch
from frame import BLUE, GREEN, GREY, ORANGE, Shown, digits, perceptron, ratio, run, tidy
from matplotlib.figure import Figure
from torch import Tensor, nn

import packext as px

DAMPINGS, RATE = (0.03, 0.05, 0.1), 0.5  # of Newton steps
RATES = (1.0, 2.0, 4.0)  # of gradient descent


def newton(curvature: Any, damping: float, x: Tensor, y: Tensor, steps: int) -> list[float]:
    """Losses of a training that solves for each parameter's step by conjugate gradients."""
    model, loss_fn = px.extend(perceptron(64, 32, 32, 10, activation=nn.Sigmoid)), px.extend(nn.CrossEntropyLoss())
    losses: list[float] = []
    for _ in range(steps):
        model.zero_grad()
        with px.backpack(curvature()) as results:
            loss = loss_fn(model(x), y)
            loss.backward(retain_graph=True)
        losses.append(loss.item())
        updates: list[Tensor] = []
        for p in model.parameters():
            product = getattr(results[p], curvature.savefield)
            found = px.linalg.cg(lambda v, f=product: f(v[None])[0] + damping * v, -p.grad, tol=0.1, maxiter=20)
            updates.append(-p.grad / damping if found.negative_curvature is not None else found.solution)
        with torch.no_grad():
            for p, update in zip(model.parameters(), updates, strict=True):
                p.add_(update, alpha=RATE)
    return losses


def descent(rate: float, x: Tensor, y: Tensor, steps: int) -> list[float]:
    """Losses of gradient descent with a momentum of 0.9."""
    model, losses = perceptron(64, 32, 32, 10, activation=nn.Sigmoid), []
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def show(small: bool) -> Shown:
    steps, n = (12, 100) if small else (40, 300)
    x, y = (t[:n] for t in digits())
    dampings, rates = (DAMPINGS[:1], RATES[:1]) if small else (DAMPINGS, RATES)
    runs: dict[str, list[float]] = {}
    for kind in (px.HMP, px.GGNMP, px.PCHMP):
        runs[kind.__name__] = min((newton(kind, d, x, y, steps) for d in dampings), key=lambda losses: losses[-1])
    runs["gradient descent"] = min((descent(rate, x, y, steps) for rate in rates), key=lambda losses: losses[-1])
    numbers: dict[str, Any] = {f"loss at first and last, {name}": (run[0], run[-1]) for name, run in runs.items()}
    if not small:
        few = ratio(lambda: newton(px.GGNMP, 0.05, x, y, 5), lambda: descent(1.0, x, y, 5))
        numbers["time of a step of GGNMP in steps of gradient descent"] = few
    figure = Figure((7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, losses), color in zip(runs.items(), (ORANGE, BLUE, GREEN, GREY), strict=True):
        axes.plot(losses, color=color, label=name)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend(frameon=False)
    tidy(axes)
    return figure, numbers


if __name__ == "__main__":
    run(show)
