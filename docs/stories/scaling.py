"""Inputs between 0 and 255 where they should be between 0 and 1: images look the same, individual gradients do not."""

from __future__ import annotations

from typing import Any

import numpy as np
from common import BLUE, ORANGE, device, images, network, tell, tidy, verdicts, watch
from matplotlib.figure import Figure
from torch import nn

from packext.diagnostics import GradHist1d, SampleNorms

LIMIT = 1.5


def story(full: bool) -> tuple[Figure, dict[str, Any]]:
    """One step on one batch, with the pixels as they are and times 255."""
    where, n = device(full), 128 if full else 64
    pictures, labels = images(full)
    numbers: dict[str, Any] = {}
    figure = Figure((10, 3.6), layout="constrained")
    parts = figure.subplots(2, 2, width_ratios=(1, 3.2))
    for (picture, bars), factor, color in zip(parts, (1, 255), (BLUE, ORANGE), strict=True):
        x = pictures[:n] * factor
        hist = GradHist1d(bins=60, limit=LIMIT, samples=n)
        monitor, step = watch(network(full).to(where), nn.CrossEntropyLoss(), [hist, SampleNorms()])
        step(x.to(where), labels[:n].to(where))
        shares = monitor.values["GradHist1d"]
        edges = np.linspace(-LIMIT, LIMIT, len(shares) + 1)
        outside = float(shares[0] + shares[-1])
        name = "pixels from 0 to 1" if factor == 1 else "pixels from 0 to 255"
        numbers[f"{name}: share of the entries in the two outermost bins"] = outside
        numbers[f"{name}: mean norm of an individual gradient"] = monitor.values["SampleNorms"]
        trained = network(full).to(where)
        numbers[f"verdicts, {name}"] = verdicts(trained, (pictures * factor).to(where), labels.to(where))
        first = x[0].permute(1, 2, 0).numpy()
        picture.imshow(first / (255 if factor == 255 and full else 1), cmap="gray")
        picture.set(xticks=[], yticks=[], title=name)
        picture.title.set_fontsize(10)
        bars.stairs(shares, edges, fill=True, color=color)
        bars.set(yscale="log", ylim=(1e-7, 2), xlim=(-LIMIT, LIMIT), ylabel="share of all entries")
        bars.set_title(f"{100 * outside:.2g} % in the two outermost bins", loc="right", fontsize=10)
        tidy(bars)
    parts[1][1].set_xlabel("entry of an individual gradient (those beyond ±1.5 are in the outermost bins)")
    return figure, numbers


if __name__ == "__main__":
    tell(story)
