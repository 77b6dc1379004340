"""Two runs with one loss curve: one bounces across a valley, the other creeps along it. Alpha tells them apart."""

from __future__ import annotations

from typing import Any

import torch
from common import BLUE, GREY, ORANGE, Said, tell, tidy, watch
from matplotlib.figure import Figure
from torch import nn

from packext.diagnostics import Alpha, GradNorm, Loss, ParamNorm, UpdateSize

STEEP, FLAT, NOISE = 1.99, 0.01, 0.01  # second derivatives of the loss; with a learning rate of 1, steps multiply by
STARTS = {"across": (0.7, 0.0), "along": (0.0, 0.7 * (STEEP / FLAT) ** 0.5)}  # 1 - 1.99 and 1 - 0.01


def run(start: tuple[float, float], steps: int, seed: int) -> tuple[list[Any], list[float], list[float], Said]:
    """Where the parameters were, the losses, the alphas of all steps but the last, and the verdicts."""
    draw = torch.Generator().manual_seed(seed)
    # Half of the samples see each axis: the loss is a quadratic, and noise in y is noise in its gradient.
    x = torch.tensor([[STEEP**0.5, 0.0], [0.0, FLAT**0.5]]).repeat(32, 1)
    model, loss = nn.Linear(2, 1, bias=False), nn.MSELoss()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([start]))
    said = Said()
    asked = [Loss(), Alpha(), GradNorm(), UpdateSize(), ParamNorm()]
    monitor, step = watch(model, loss, asked, rate=1.0, said=said)
    path, losses, alphas = [], [], []
    for _ in range(steps):
        path.append(model.weight[0].tolist())
        step(x, NOISE * torch.randn(len(x), 1, generator=draw))
        losses.append(monitor.values["Loss"])
        if "Alpha" in monitor.values:  # from the second step on, that of the step before
            alphas.append(monitor.values["Alpha"])
    return path, losses, alphas, said


def story(full: bool) -> tuple[Figure, dict[str, Any]]:
    """Both runs; at full size with ten draws of the noise."""
    steps, seeds = 40, 10 if full else 1
    figure = Figure((11, 3.4), layout="constrained")
    plane, curve, angle = figure.subplots(1, 3)
    grid = [torch.linspace(-1.1, 1.1, 80), torch.linspace(-2, 11, 80)]
    a, b = torch.meshgrid(*grid, indexing="xy")
    plane.contour(a, b, STEEP / 2 * a**2 + FLAT / 2 * b**2, levels=8, colors=GREY, linewidths=0.6)
    numbers: dict[str, Any] = {}
    for (name, start), color, line in zip(STARTS.items(), (ORANGE, BLUE), ("-", "--"), strict=True):
        runs = [run(start, steps, seed) for seed in range(seeds)]
        path, losses, alphas, said = runs[0]
        plane.plot(*zip(*path, strict=True), ".-", color=color, lw=0.8, ms=4)
        curve.plot(losses, line, color=color, lw=2)
        angle.plot(alphas, color=color, lw=2, label=f"{name} the valley")
        every = torch.tensor([a for r in runs for a in r[2]])
        numbers[f"{name}: first and last loss"] = f"{losses[0]:.3f}, {losses[-1]:.3f}"
        numbers[f"{name}: mean alpha"] = float(every.mean())
        numbers[f"verdicts, {name}"] = said
    plane.set(title="where the runs went", xlabel="steep direction", ylabel="flat direction")
    curve.set(title="their losses: the same", xlabel="step", ylim=(0, None))
    angle.set(title="their alphas: opposite", xlabel="step", ylim=(-1.5, 1.5))
    angle.axhline(0, color=GREY, lw=0.8)
    angle.legend(frameon=False, loc="center right")
    for axes in (plane, curve, angle):
        tidy(axes)
    return figure, numbers


if __name__ == "__main__":
    tell(story)
