"""Importance sampling: draw samples by the norms of their gradients, and the gradient of a batch is less noisy.

A sample drawn with probability p_n counts 1 / (N p_n): the mean stays right whatever p_n is, and its noise is the
smallest where p_n is proportional to the norm (Katharopoulos & Fleuret 2018, eq. 6). The variance of many drawn batches
is compared with the formula, again and again during a training.
"""

from __future__ import annotations

import torch
from frame import BLUE, GREY, ORANGE, Shown, digits, perceptron, run, tidy
from matplotlib.figure import Figure
from torch import Tensor, nn

import packext as px

BATCH = 32


def noise(rows: Tensor, chances: Tensor, draws: int) -> float:
    """The mean squared error of drawn batches' gradients against the mean gradient of all samples."""
    n = len(rows)
    index = torch.multinomial(chances, draws * BATCH, replacement=True)
    weights = 1 / (n * chances[index])
    batches = (rows[index] * weights[:, None]).view(draws, BATCH, -1).mean(1)
    return (batches - rows.mean(0)).square().sum(1).mean().item()


def formula(norms: Tensor, mean: Tensor, chances: Tensor) -> float:
    """The same from the norms alone: `(sum of norm² / (N² p) - |mean|²) / batch size`."""
    n = len(norms)
    return ((norms.square() / chances).sum().item() / n**2 - mean.square().sum().item()) / BATCH


def show(small: bool) -> Shown:
    torch.manual_seed(0)
    n, draws, phases = (300, 200, 4) if small else (1000, 1000, 12)
    x, y = (t[:n] for t in digits(torch.float64))
    model, loss_fn = px.extend(perceptron(64, 16, 10).double()), px.extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    uniform = torch.full((n,), 1 / n, dtype=x.dtype)
    table: list[list[float]] = []
    for phase in range(phases):
        with px.backpack(px.BatchGrad(), px.BatchL2Grad(), scale="sample", attach=False) as results:
            loss = loss_fn(model(x), y)
            torch.autograd.grad(loss, list(model.parameters()))
        rows = torch.cat([results[p].grad_batch.flatten(1) for p in model.parameters()], 1)
        norms = results.batch_l2.sqrt()
        by_norm = norms / norms.sum()
        found = [noise(rows, chances, draws) for chances in (uniform, by_norm)]
        claims = [formula(norms, rows.mean(0), chances) for chances in (uniform, by_norm)]
        table.append([loss.item(), *found, *claims])
        for _ in range(30 * (phase + 1)):
            batch = torch.randint(n, (BATCH,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()

    losses, uniforms, sampled, *formulas = map(list, zip(*table, strict=True))
    numbers: dict[str, object] = {}
    for k, when in ((0, "before training"), (-1, "at the end")):
        numbers[f"{when}: loss"] = losses[k]
        numbers[f"{when}: noise by the norms in that of uniform draws"] = sampled[k] / uniforms[k]
    pairs = zip(uniforms + sampled, formulas[0] + formulas[1], strict=True)
    numbers["largest relative difference of a measured noise to the formula"] = max(abs(a / b - 1) for a, b in pairs)
    figure = Figure((7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, uniforms, "o", color=BLUE, label="drawn uniformly")
    axes.plot(losses, sampled, "o", color=ORANGE, label="drawn by the norms")
    for claimed in formulas:
        axes.plot(losses, claimed, color=GREY, lw=1, zorder=0)
    axes.invert_xaxis()
    axes.set(xlabel="loss", ylabel="squared error of a batch's gradient", xscale="log", yscale="log")
    axes.legend(frameon=False, title="lines: by the formula")
    tidy(axes)
    return figure, numbers


if __name__ == "__main__":
    run(show)
