"""Retain graph: several questions to one forward pass, here where in the output an auto-encoder's curvature comes from.

The loss of each pixel of the reconstruction has a backward pass of its own through the same graph; the traces of the
GGN that they find add up to that of the whole loss. Beside it the mean squared error of each pixel, which tells
something else.
"""

from __future__ import annotations

import torch
from frame import Shown, digits, perceptron, picture, ratio, run
from matplotlib.figure import Figure
from torch import nn

import packext as px


def show(small: bool) -> Shown:
    x, _ = (t[: 16 if small else 128] for t in digits(torch.float64))
    model, loss_fn = px.extend(perceptron(64, 24, 6, 24, 64, activation=nn.Tanh).double()), px.extend(nn.MSELoss())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(50 if small else 300):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x).backward()
        optimizer.step()

    def trace(results: px.Results) -> float:
        return sum(results[p].diag_ggn_exact.sum().item() for p in model.parameters())

    def whole() -> float:
        with px.backpack(px.DiagGGNExact(), attach=False, grad=False) as results:
            loss_fn(model(x), x).backward()
        return trace(results)

    def by_pixel(again: bool) -> list[float]:
        found, output = [], model(x)
        for k in range(64):
            output = model(x) if again else output
            with px.backpack(px.DiagGGNExact(), attach=False, grad=False) as results:
                loss = loss_fn(output[:, k : k + 1], x[:, k : k + 1]) / 64  # of the mean over pixels
                loss.backward(retain_graph=True)
            found.append(trace(results))
        return found

    pixels, total = by_pixel(again=False), whole()
    numbers = {"trace of the GGN, whole loss": total, "sum over the pixels": sum(pixels)}
    numbers["relative difference"] = abs(sum(pixels) - total) / total
    if not small:
        once = lambda: by_pixel(again=False)  # noqa: E731
        numbers["time of the pixels with a forward pass for each, in that with one"] = ratio(
            lambda: by_pixel(again=True), once, 3
        )
        numbers["time of the whole loss, in that of the pixels"] = ratio(whole, once, 3)
    errors = (model(x) - x).square().mean(0).detach()
    maps = {"mean digit": x.mean(0), "mean squared error": errors, "share of the trace": torch.tensor(pixels) / total}
    figure = Figure((8, 3), layout="constrained")
    parts = figure.subplots(1, 3)
    for axes, (name, values) in zip(parts, maps.items(), strict=True):
        picture(axes, values, f"{name}, up to {values.max():.2g}")
    return figure, numbers


if __name__ == "__main__":
    run(show)
