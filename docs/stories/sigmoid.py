"""Sigmoids in place of ReLUs: the whole network's gradients look well, but layer by layer the first ones have none."""

from __future__ import annotations

from typing import Any

import numpy as np
from common import BLUE, ORANGE, device, images, network, tell, tidy, verdicts, watch, weights
from matplotlib.figure import Figure
from torch import nn

from packext.diagnostics import GradHist1d, GradNorm


def story(full: bool) -> tuple[Figure, dict[str, Any]]:
    """One step on one batch, with either activation."""
    where, n, limit = device(full), 128 if full else 64, 0.11
    pictures, labels = images(full)
    layers = weights(network(full))
    numbers: dict[str, Any] = {}
    figure = Figure((10, 7.4), layout="constrained")
    parts = figure.subplots(1 + len(layers), 2, sharex=True, sharey=True)
    for column, (kind, color) in enumerate({nn.ReLU: BLUE, nn.Sigmoid: ORANGE}.items()):
        model = network(full, kind).to(where)
        hist = GradHist1d(bins=60, limit=limit, samples=n)
        monitor, step = watch(model, nn.CrossEntropyLoss(), [hist, GradNorm()])
        step(pictures[:n].to(where), labels[:n].to(where))
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        for axes, (layer, name) in zip(parts[:, column], {"all": "", **layers}.items(), strict=True):
            key = f"GradHist1d/{name}" if name else "GradHist1d"
            shares, edges = monitor.values[key], np.linspace(-limit, limit, 61)
            axes.stairs(shares, edges, fill=True, color=color)
            axes.set(
                yscale="log",
                ylim=(1e-6, 3),
                xlim=(-limit, limit),
                yticks=[1e-6, 1e-3, 1],
                xticks=[-0.1, -0.05, 0, 0.05, 0.1],
            )
            tidy(axes)
            text = "whole network"
            if name:
                size = monitor.values[f"GradNorm/{name}"] / sizes[name] ** 0.5
                numbers[f"{kind.__name__}, {layer}: root mean square of the gradient"] = size
                text = f"{layer}: r.m.s. of the gradient {size:.1e}"
            axes.set_title(text, loc="left", fontsize=9)
        trained = network(full, kind).to(where)
        numbers[f"verdicts, {kind.__name__}"] = verdicts(trained, pictures.to(where), labels.to(where))
        parts[0, column].set_title(kind.__name__, fontsize=12, fontweight="bold")
        parts[-1, column].set_xlabel("entry of an individual gradient")
    figure.supylabel("share of the entries", fontsize=10)
    return figure, numbers


if __name__ == "__main__":
    tell(story)
