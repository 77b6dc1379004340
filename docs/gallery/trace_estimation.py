"""Trace estimation: how many random vectors the Hessian's trace takes, against the exact one.

Hutchinson's estimate for the whole network, its standard error, and the exact value as the sum of the exact diagonal.
"""

from __future__ import annotations

from typing import Any

import torch
from frame import BLUE, ORANGE, Shown, digits, perceptron, ratio, run, tidy
from matplotlib.figure import Figure
from torch import nn

import packext as px


def show(small: bool) -> Shown:
    x, y = (t[: 16 if small else 64] for t in digits(torch.float64))
    model = px.extend(perceptron(64, 24, 10, activation=nn.Sigmoid).double())
    loss_fn = px.extend(nn.CrossEntropyLoss())

    def measure(quantity: Any) -> px.Results:
        with px.backpack(quantity, attach=False) as results:
            loss_fn(model(x), y).backward()
        return results

    found = measure(px.DiagHessian())
    exact = sum(found[p].diag_h.sum().item() for p in model.parameters())
    repeats, counts = (6, (4, 16, 64)) if small else (20, (2, 4, 8, 16, 32, 64, 128, 256))
    numbers: dict[str, object] = {"exact trace": exact}
    spreads, claims = [], []
    figure = Figure((7, 3.8), layout="constrained")
    axes = figure.subplots()
    for count in counts:
        draws = [
            measure(px.HessianTrace(count, torch.Generator().manual_seed(1000 * count + k))).hessian_trace
            for k in range(repeats)
        ]
        errors = torch.stack([abs(d.value - exact) for d in draws]) / exact
        spreads.append(errors.square().mean().sqrt().item())
        claims.append(torch.stack([d.standard_error for d in draws]).square().mean().sqrt().item() / exact)
        axes.plot([count] * repeats, errors, ".", color=BLUE, alpha=0.4)
        numbers[f"{count} vectors: relative error of {repeats} estimates (r.m.s.), and as they state it"] = (
            spreads[-1],
            claims[-1],
        )
    axes.plot(counts, spreads, color=BLUE, label="relative error (root mean square)")
    axes.plot(counts, claims, "--", color=ORANGE, label="standard error, as stated by the estimate")
    axes.set(xscale="log", yscale="log", xlabel="random vectors", ylabel="relative error of the trace")
    axes.legend(frameon=False)
    tidy(axes)
    if not small:
        vectors = lambda: measure(px.HessianTrace(64))  # noqa: E731
        numbers["time of the exact diagonal in that of 64 vectors"] = ratio(
            lambda: measure(px.DiagHessian()), vectors, 5
        )
    return figure, numbers


if __name__ == "__main__":
    run(show)
