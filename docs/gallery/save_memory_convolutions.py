"""Memory-saving convolutions: statistics of individual gradients, without these in memory.

Nothing is to be switched on: gradients of samples are formed in tiles and forgotten, unless they themselves were asked
for. Bytes are counted by torch's profiler, from the forward pass to the results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from frame import BLUE, GREEN, GREY, ORANGE, Shown, peak, ratio, run, tidy
from matplotlib.figure import Figure
from torch import nn

import packext as px


def network() -> nn.Module:
    """Convolutions for pictures `[3, 16, 16]`, with more parameters than activations."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(a, b, 3, padding=1, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def show(small: bool) -> Shown:
    sizes = (8, 32) if small else (8, 16, 32, 64, 128)
    model, loss_fn = px.extend(network()), px.extend(nn.CrossEntropyLoss())
    parameters = list(model.parameters())
    numbers: dict[str, Any] = {"parameters": sum(p.numel() for p in parameters)}

    def a_pass(n: int, *quantities: Any) -> Callable[[], None]:
        x, y = torch.randn(n, 3, 16, 16), torch.randint(10, (n,))

        def way() -> None:
            with px.backpack(*quantities, attach=False):
                torch.autograd.grad(loss_fn(model(x), y), parameters)

        return way

    ways = {
        "plain gradient": ((), GREY),
        "norms": ((px.BatchL2Grad(),), GREEN),
        "variance": ((px.Variance(),), BLUE),
        "individual gradients": ((px.BatchGrad(),), ORANGE),
    }
    figure = Figure((6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    plain: list[int] = []
    for name, (quantities, color) in ways.items():
        peaks = [peak(a_pass(n, *quantities)) for n in sizes]
        plain = plain or peaks
        axes.plot(sizes, [p / 2**20 for p in peaks], "o-", ms=4, color=color, label=name)
        numbers[f"{name}: peak of memory at {sizes[-1]} samples, in that of the plain gradient"] = peaks[-1] / plain[-1]
        if quantities and not small:
            numbers[f"{name}: time at 64 samples, in that of the plain gradient"] = ratio(
                a_pass(64, *quantities), a_pass(64)
            )
    axes.set(xlabel="samples", ylabel="peak of memory in MiB", ylim=(0, None))
    axes.legend(frameon=False)
    tidy(axes)
    return figure, numbers


if __name__ == "__main__":
    run(show)
