"""Pruning: the weights that matter least by curvature, and by magnitude.

Optimal brain damage (LeCun, Denker & Solla 1989) removes the weights of the smallest `h w² / 2`, with h the diagonal of
the Hessian, here exact, or that of the GGN. Nothing is trained after the weights are gone. Where nine in ten go,
magnitude loses less here.
"""

from __future__ import annotations

from typing import Any

import torch
from frame import BLUE, GREEN, GREY, ORANGE, Shown, accuracy, digits, fit, perceptron, run, tidy
from matplotlib.figure import Figure
from torch import Tensor, nn

import packext as px

TRAINING, SHARES = 1200, (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@torch.no_grad()
def pruned(model: nn.Module, saliencies: list[Tensor], share: float, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Loss and accuracy without this share of the weights."""
    limit = torch.cat([s.flatten() for s in saliencies]).quantile(share)
    left = {name: p * (s > limit) for (name, p), s in zip(model.named_parameters(), saliencies, strict=True)}
    outputs = torch.func.functional_call(model, left, (x,))
    return nn.functional.cross_entropy(outputs, y).item(), (outputs.argmax(1) == y).float().mean().item()


def agreement(model: nn.Module, p: Tensor, diagonals: list[Tensor], x: Tensor, y: Tensor) -> tuple[float, ...]:
    """Correlations of `h w² / 2` and what the loss gains, beyond its slope, when one of the 50 largest weights goes."""
    loss, gains = nn.functional.cross_entropy(model(x), y), []
    slope, flat = torch.autograd.grad(loss, p)[0].flatten(), p.data.view(-1)
    largest = flat.abs().argsort(descending=True)[:50]
    weights = flat[largest].clone()
    for k, w in zip(largest, weights, strict=True):
        flat[k] = 0
        gains.append(nn.functional.cross_entropy(model(x), y).detach() - loss.detach() + slope[k] * w)
        flat[k] = w
    said = [d.flatten()[largest] * weights**2 / 2 for d in diagonals]
    return tuple(torch.corrcoef(torch.stack([one, torch.stack(gains)]))[0, 1].item() for one in said)


def show(small: bool) -> Shown:
    x, y = digits()
    known, new = slice(400 if small else TRAINING), slice(TRAINING, None)
    model, loss_fn = px.extend(perceptron(64, 32, 16, 10, activation=nn.Tanh)), px.extend(nn.CrossEntropyLoss())
    fit(model, x[known], y[known], 200 if small else 800, size=64)

    with px.backpack(px.DiagHessian(), px.DiagGGNExact(), attach=False, grad=False) as results:
        loss_fn(model(x[known]), y[known]).backward()
    first, *_ = parameters = list(model.parameters())
    ways = {
        "Hessian": ([results[p].diag_h * p.detach() ** 2 for p in parameters], ORANGE),
        "GGN": ([results[p].diag_ggn_exact * p.detach() ** 2 for p in parameters], BLUE),
        "magnitude": ([p.detach().abs() for p in parameters], GREEN),
        "random": ([torch.rand_like(p) for p in parameters], GREY),
    }
    numbers: dict[str, Any] = {"weights and biases": sum(p.numel() for p in parameters)}
    found = agreement(model, first, [results[first].diag_h, results[first].diag_ggn_exact], x[known], y[known])
    numbers["correlation with the curvature of the loss along single weights: Hessian, GGN"] = found
    numbers["accuracy on held-out digits, nothing pruned"] = accuracy(model, x[new], y[new])
    figure = Figure((9, 3.5), layout="constrained")
    parts = figure.subplots(1, 2)
    for name, (saliencies, color) in ways.items():
        curves = list(zip(*[pruned(model, saliencies, share, x[new], y[new]) for share in SHARES], strict=True))
        for axes, curve in zip(parts, curves, strict=True):
            axes.plot([100 * s for s in SHARES], curve, "o-", ms=4, color=color, label=name)
        for share in (0.5, 0.7, 0.9):
            numbers[f"{name}: loss and accuracy without {share:.0%}"] = tuple(c[SHARES.index(share)] for c in curves)
    for axes, what in zip(parts, ("loss on held-out digits", "accuracy on held-out digits"), strict=True):
        axes.set(xlabel="per cent of the weights removed", ylabel=what)
        tidy(axes)
    parts[0].set_yscale("log")
    parts[1].legend(frameon=False)
    return figure, numbers


if __name__ == "__main__":
    run(show)
