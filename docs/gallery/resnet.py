"""ResNet: a residual network as one writes it, in-place activations included, and what shortcuts do to its gradients.

Normalised blocks with and without their shortcuts, before training: the norm of an individual gradient and the trace of
the GGN, layer by layer. BatchNorm is in evaluation mode; in training mode samples have no gradients of their own, which
is said.
"""

from __future__ import annotations

from typing import Any

import torch
from frame import BLUE, ORANGE, Shown, digits, run, tidy
from matplotlib.figure import Figure
from torch import Tensor, nn

import packext as px
from packext import testing


class Block(nn.Module):
    """Two convolutions; their input is added to what they give, or not."""

    def __init__(self, channels: int, shortcut: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu, self.shortcut = nn.ReLU(inplace=True), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        if self.shortcut:
            y += x
        return self.relu(y)


def network(blocks: int, shortcut: bool, x: Tensor) -> nn.Module:
    """With statistics of the data in its norms, and in evaluation mode."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True)]
    layers += [Block(8, shortcut) for _ in range(blocks)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).to(x.dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of the batches seen
    with torch.no_grad():
        model(x)
    return model.eval()


def show(small: bool) -> Shown:
    n, blocks = (4, 6) if small else (64, 10)
    x, y = (t[:n] for t in digits(torch.float64))
    numbers: dict[str, Any] = {}
    figure = Figure((9, 3.5), layout="constrained")
    parts = figure.subplots(1, 2)
    for shortcut, color in ((True, BLUE), (False, ORANGE)):
        model, loss_fn = px.extend(network(blocks, shortcut, x)), px.extend(nn.CrossEntropyLoss())
        with px.backpack(px.BatchL2Grad(), px.DiagGGNExact(), scale="sample") as results:
            loss_fn(model(x), y).backward()
        name = f"{'with' if shortcut else 'without'} shortcuts"
        convs = [k for k, p in model.named_parameters() if p.dim() == 4][1:]
        norms = [results[k].batch_l2.sqrt().mean().item() for k in convs]
        traces = [results[k].diag_ggn_exact.sum().item() / n for k in convs]
        for axes, values in zip(parts, (norms, traces), strict=True):
            axes.plot(range(1, len(values) + 1), values, "o-", ms=3, color=color, label=name)
        numbers[f"{name}: norm of an individual gradient, first and last convolution"] = norms[0], norms[-1]
        numbers[f"{name}: trace of the GGN, first and last convolution"] = traces[0], traces[-1]
        if shortcut:
            want = testing.curvature_rows(model, nn.CrossEntropyLoss(), x[:2], y[:2])
            with px.backpack(px.DiagGGNExact(), scale="sample") as few:
                loss_fn(model(x[:2]), y[:2]).backward()
            errors = [testing.relative_error(few[k].diag_ggn_exact, w.square().sum((0, 1))) for k, w in want.items()]
            numbers[f"{name}: largest relative error of the GGN's diagonal"] = max(errors)
    try:
        with px.backpack(px.BatchL2Grad()):
            loss_fn(model.train()(x), y).backward()
    except px.PackextError as error:
        numbers["in training mode"] = str(error).partition(" in ")[0]
    for axes, what in zip(parts, ("mean norm of an individual gradient", "trace of the GGN, per sample"), strict=True):
        axes.set(xlabel="convolution", ylabel=what, yscale="log")
        tidy(axes)
    parts[0].legend(frameon=False)
    return figure, numbers


if __name__ == "__main__":
    run(show)
