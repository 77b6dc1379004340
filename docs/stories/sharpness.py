"""SGD and full gradient descent have the same loss, but the noise of SGD leads it to a flatter place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import BLUE, ORANGE, Said, tell, tidy, watch
from matplotlib.figure import Figure
from torch import nn

from packext.diagnostics import GradNorm, HessMaxEV, LearningRate, Loss, ParamNorm, UpdateSize

N, NOISE, START = 200, 0.87, (1.636, 0.611)  # the product is 1, as the data want it


def run(batch: int, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Said]:
    """Loss and largest eigenvalue on all data every 20 steps, the weights there, and the verdicts."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(N, 1, generator=draw)
    noise = torch.randn(N, 1, generator=draw)
    noise -= x * (x * noise).sum() / (x * x).sum()  # the best slope is 1
    x, noise = x / x.square().mean().sqrt(), noise / noise.square().mean().sqrt()
    y = x + NOISE * noise
    model, loss = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)), nn.MSELoss()
    with torch.no_grad():
        for p, value in zip(model.parameters(), START, strict=True):
            p.fill_(value)
    # All that the monitor sees is a pass over all data without an update, the same for both runs.
    said = Said()
    asked = [Loss(), HessMaxEV(), LearningRate(), GradNorm(), UpdateSize(), ParamNorm()]
    monitor, _ = watch(model, loss, asked, said=said)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses, sharpness, path = [], [], []
    for k in range(steps):
        if k % 20 == 0:
            with monitor.step():
                loss(model(x), y).backward()
            losses.append(monitor.values["Loss"])
            sharpness.append(monitor.values["HessMaxEV"])
            path.append([p.item() for p in model.parameters()])
        part = torch.randint(N, (batch,), generator=draw) if batch < N else slice(None)
        optimizer.zero_grad()
        loss(model(x[part]), y[part]).backward()
        optimizer.step()
    return np.array(losses), np.array(sharpness), np.array(path), said


def story(full: bool) -> tuple[Figure, dict[str, Any]]:
    """Both runs; at full size for ten times as long."""
    steps = 10_000 if full else 1_000
    figure = Figure((11, 3.4), layout="constrained")
    curve, sharp, plane = figure.subplots(1, 3)
    numbers: dict[str, Any] = {}
    along = np.linspace(0.55, 1.85, 100)
    plane.plot(along, 1 / along, color="black", lw=0.8, label="all minima")
    for name, batch, color in (("GD", N, BLUE), ("SGD, batches of 20", 20, ORANGE)):
        losses, sharpness, path, said = run(batch, steps)
        at = np.arange(len(losses)) * 20
        curve.plot(at, losses, color=color, label=name)
        sharp.plot(at, sharpness, color=color)
        plane.plot(*path.T, ".", color=color, ms=3 if batch < N else 10)
        last = len(losses) // 5
        numbers[f"{name}: mean loss of the last fifth"] = float(losses[-last:].mean())
        numbers[f"{name}: largest eigenvalue at the start"] = float(sharpness[0])
        numbers[f"{name}: its mean over the last fifth"] = float(sharpness[-last:].mean())
        numbers[f"verdicts, {name}"] = said
    curve.set(title="loss on all data", xlabel="step", ylim=(0, None))
    curve.legend(frameon=False, loc="lower left")
    sharp.set(title="largest eigenvalue of the Hessian", xlabel="step", ylim=(0, None))
    plane.set(title="the two weights", xlabel="first", ylabel="second")
    plane.legend(frameon=False)
    for axes in (curve, sharp, plane):
        tidy(axes)
    return figure, numbers


if __name__ == "__main__":
    tell(story)
