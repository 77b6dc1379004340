"""Gradient of the variance: differentiate what a pass has found, and train on it.

With `create_graph=True` results have a graph (or refuse to be differentiated, as those of the Hessian do). Here the sum
of the variances of all entries of the individual gradients is a term of the loss: a network whose samples agree on the
gradient. The gradient of that term is compared with one through a loop over the samples.
"""

from __future__ import annotations

import torch
from frame import BLUE, ORANGE, Shown, accuracy, digits, perceptron, run, tidy
from matplotlib.figure import Figure
from torch import Tensor, nn

import packext as px

WEIGHT, TRAINING = 0.05, 1000


def loss_and_variance(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the variance of the individual gradients over the batch, summed over all parameters."""
    parameters = list(model.parameters())
    with px.backpack(px.Variance(), scale="sample", attach=False) as results:
        loss = loss_fn(model(x), y)
        torch.autograd.grad(loss, parameters, create_graph=True)
    return loss, sum((results[p].variance.sum() for p in parameters), torch.zeros(()))


def by_loop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The same variance from one gradient after another."""
    rows = []
    for n in range(len(y)):
        loss = nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows).var(0, unbiased=False).sum()


def train(weight: float, steps: int) -> tuple[list[float], list[float], nn.Module]:
    """Losses and variances of a training with so much of the variance in its loss."""
    x, y = digits()
    model, loss_fn = px.extend(perceptron(64, 32, 10, activation=nn.Tanh)), px.extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    losses, variances = [], []
    for _ in range(steps):
        batch = torch.randint(TRAINING, (64,))
        loss, variance = loss_and_variance(model, loss_fn, x[batch], y[batch])
        optimizer.zero_grad()
        (loss + weight * variance).backward()
        optimizer.step()
        losses.append(loss.item()), variances.append(variance.item())
    return losses, variances, model


def show(small: bool) -> Shown:
    x, y = digits(torch.float64)
    model, loss_fn = px.extend(perceptron(64, 16, 10, activation=nn.Tanh).double()), px.extend(nn.CrossEntropyLoss())
    parameters = list(model.parameters())
    got = torch.autograd.grad(loss_and_variance(model, loss_fn, x[:16], y[:16])[1], parameters)
    want = torch.autograd.grad(by_loop(model, x[:16], y[:16]), parameters)
    numbers: dict[str, object] = {
        "largest difference of the gradient to that of the loop": max(
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True)
        )
    }
    figure = Figure((9, 3.4), layout="constrained")
    parts = figure.subplots(1, 2)
    for weight, color in ((0.0, BLUE), (WEIGHT, ORANGE)):
        losses, variances, model = train(weight, 60 if small else 400)
        last = sum(losses[-20:]) / 20, sum(variances[-20:]) / 20
        numbers[f"weight {weight:g}: loss and variance, means of the last 20 steps"] = last
        right = accuracy(model, x[TRAINING:].float(), y[TRAINING:])
        numbers[f"weight {weight:g}: accuracy on held-out digits"] = right
        for axes, curve in zip(parts, (losses, variances), strict=True):
            axes.plot(curve, color=color, lw=0.8, label=f"{weight:g} times the variance in the loss")
    for axes, what in zip(parts, ("loss", "variance of individual gradients"), strict=True):
        axes.set(xlabel="step", ylabel=what, yscale="log")
        tidy(axes)
    parts[1].legend(frameon=False)
    return figure, numbers


if __name__ == "__main__":
    run(show)
