"""Differential privacy done right: what a sample may give away, as an epsilon, against what the network learns.

Gradients of samples are clipped, summed and hidden in noise; batches are drawn as the accountant assumes. On the right,
the norms of individual gradients of one batch after clipping by `min(1, C / norm)`, and by the mistake `min(1, norm /
C)`, which leaves large ones as they are.
"""

from __future__ import annotations

import torch
from frame import BLUE, GREEN, ORANGE, Shown, accuracy, digits, perceptron, run, tidy
from matplotlib.figure import Figure
from torch import nn

import packext as px

TRAINING, EXPECTED, NORM, DELTA = 1500, 100.0, 1.0, 1e-5


def train(noise: float, steps: int, points: int) -> tuple[list[float], list[float]]:
    """Epsilons and accuracies on held-out digits during a private training."""
    x, y = digits()
    model, loss_fn = px.extend(perceptron(64, 32, 10)), px.extend(nn.CrossEntropyLoss())
    optimizer = px.optim.DPSGD(
        model.parameters(), 1.0, max_norm=NORM, noise_multiplier=noise, expected_batch_size=EXPECTED, seed=0
    )
    sampler = px.optim.PoissonSampler(TRAINING, EXPECTED / TRAINING, steps, torch.Generator().manual_seed(0))
    spent, right = [], []
    for step, index in enumerate(sampler, 1):
        optimizer.zero_grad()
        if index:  # a step on an empty batch is noise alone
            with px.optim.emit(optimizer):
                loss_fn(model(x[index]), y[index]).backward()
        optimizer.step()
        if step % (steps // points) == 0:
            spent.append(px.optim.epsilon(optimizer.spent, TRAINING, DELTA))
            right.append(accuracy(model, x[TRAINING:], y[TRAINING:]))
    return spent, right


def show(small: bool) -> Shown:
    figure = Figure((9, 3.6), layout="constrained")
    curve, bars = figure.subplots(1, 2)
    numbers: dict[str, object] = {}
    noises = (1.0,) if small else (4.0, 2.0, 1.0)
    for noise, color in zip(noises, (BLUE, GREEN, ORANGE), strict=False):
        spent, right = train(noise, *((60, 1) if small else (200, 5)))
        curve.plot(spent, right, "o-", ms=3, color=color, label=f"noise {noise:g}")
        numbers[f"noise {noise:g}: epsilon and accuracy on held-out digits"] = spent[-1], right[-1]
    curve.set(xlabel=f"epsilon spent (delta {DELTA:g})", ylabel="accuracy on held-out digits", xlim=(0, None))
    curve.legend(frameon=False)

    x, y = digits()
    model, loss_fn = px.extend(perceptron(64, 32, 10)), px.extend(nn.CrossEntropyLoss())
    with px.backpack(px.BatchL2Grad(), scale="sample") as results:
        loss_fn(model(x[:TRAINING]), y[:TRAINING]).backward()
    norms = results.batch_l2.sqrt()
    clipped, mistaken = norms * (NORM / norms).clamp(max=1), norms * (norms / NORM).clamp(max=1)
    numbers["largest norm: before, clipped, by the mistake"] = tuple(n.max().item() for n in (norms, clipped, mistaken))
    bars.hist([clipped, mistaken], bins=30, color=(BLUE, ORANGE), label=["min(1, C / norm)", "min(1, norm / C)"])
    bars.axvline(NORM, color="black", lw=1, ls=":")
    bars.set(xlabel="norm of an individual gradient (C = 1)", ylabel="samples")
    bars.legend(frameon=False)
    tidy(curve, bars)
    return figure, numbers


if __name__ == "__main__":
    run(show)
