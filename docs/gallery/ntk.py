"""NTK spectrum: which directions a network learns fast, and how much training changes that.

`GGNGram` has the spectrum of the GGN without the GGN. For half a sum of squares it is the neural tangent kernel: an
error along an eigenvector falls as exp(-rate · eigenvalue · steps), as long as the kernel stays the same. Wide networks
keep theirs (Jacot, Gabriel & Hongler 2018), which the second figure measures.
"""

from __future__ import annotations

from typing import Any

import torch
from frame import BLUE, GREY, ORANGE, Shown, digits, run, tidy
from matplotlib.figure import Figure
from torch import Tensor, nn

import packext as px


class Network(nn.Module):
    """One number for each input; outputs are scaled with the width, so that wide ones have a kernel in the limit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer, self.scale = nn.Linear(64, width), nn.Linear(width, 1, bias=False), width**-0.5
        nn.init.normal_(self.inner.weight, std=0.25), nn.init.normal_(self.outer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).relu()) * self.scale


def kernel(model: nn.Module, x: Tensor) -> Tensor:
    """The neural tangent kernel `[N, N]`."""
    loss_fn = px.extend(nn.MSELoss(reduction="sum"))
    with px.backpack(px.GGNGram(), attach=False, grad=False) as results:
        output = model(x)
        (loss_fn(output, output.detach()) / 2).backward()
    return results.ggn_gram[0, :, 0]


def show(small: bool) -> Shown:
    n, (x, y) = 40 if small else 100, digits(torch.float64)
    x, y = x[:n], (y[:n] % 2 * 2 - 1).to(x.dtype)[:, None]
    figure = Figure((9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers: dict[str, Any] = {}
    widths, changes = (32, 512) if small else (32, 128, 512, 2048), []
    for width in widths:
        model = px.extend(Network(width).double())
        before = kernel(model, x)
        values, vectors = torch.linalg.eigh(before)
        rate, steps = 1.0 / values[-1].item(), 100 if small else 300
        errors = [(model(x) - y).detach()]
        for _ in range(steps):
            model.zero_grad()
            (nn.functional.mse_loss(model(x), y, reduction="sum") / 2).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= rate * p.grad
        errors.append((model(x) - y).detach())
        after = kernel(model, x)
        changes.append(((after - before).norm() / before.norm()).item())
        predicted = vectors * (1 - rate * values) ** steps @ vectors.T @ errors[0]
        off = ((predicted - errors[1]).norm() / errors[0].norm()).item()
        numbers[f"width {width}: relative change of the kernel; error of the predicted output"] = changes[-1], off
        if width == widths[0]:
            left.plot(values.flip(0), color=BLUE, label=f"width {width}, before")
            left.plot(torch.linalg.eigvalsh(after).flip(0), color=ORANGE, label=f"after {steps} steps")
    left.set(xlabel="eigenvalue", yscale="log", ylabel="of the neural tangent kernel")
    left.legend(frameon=False)
    right.plot(widths, changes, "o-", color=BLUE, label="measured")
    for power, style, name in ((0.5, ":", "1 / root of width"), (1, "--", "1 / width")):
        right.plot(widths, [changes[0] * (widths[0] / w) ** power for w in widths], style, color=GREY, label=name)
    right.set(xlabel="width", ylabel="relative change of the kernel", xscale="log", yscale="log")
    right.legend(frameon=False)
    tidy(left, right)
    return figure, numbers


if __name__ == "__main__":
    run(show)
