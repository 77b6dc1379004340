"""Laplace approximation: how sure a small transformer should be, by the curvature of its last layer.

Digits as sequences of eight rows. The last layer gets a Gaussian posterior around its trained weights, whose precision
is the GGN of all samples and a prior's; predictions are means over draws of the layer. The prior, and the temperature
of the alternative that needs no curvature, are chosen on the same 100 clean samples; then noise is added to others. The
temperature does as much here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from frame import BLUE, GREEN, GREY, ORANGE, Shown, digits, fit, run, tidy
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import nll_loss

import packext as px

TRAINING, CHOOSING, WIDTH, DRAWS = 200, 100, 32, 100


class Transformer(nn.Module):
    """Rows of a digit as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.place = nn.Linear(8, WIDTH), nn.Parameter(torch.randn(8, WIDTH) / 4)
        layers = [nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True) for _ in range(2)]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(WIDTH, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.body(self.rows(x.view(-1, 8, 8)) + self.place).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def posterior(model: Transformer, x: Tensor, y: Tensor) -> Callable[[Tensor, float], Tensor]:
    """Predictions `[N, 10]` for inputs and a precision of the prior: means over draws of the last layer."""
    head, loss_fn = list(model.head.parameters()), px.extend(nn.CrossEntropyLoss())
    with px.backpack(px.SqrtGGNExact(), scale="sample", parameters=head, grad=False, attach=False) as results:
        loss_fn(model(x), y).backward()
    root = torch.cat([results[p].sqrt_ggn_exact.flatten(2) for p in head], 2).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(root.T @ root)
    mean = torch.cat([p.detach().flatten() for p in head]).double()

    @torch.no_grad()
    def predict(x: Tensor, precision: float) -> Tensor:
        normal = torch.randn(DRAWS, len(mean), generator=torch.Generator().manual_seed(0), dtype=mean.dtype)
        heads = mean + normal / (values.clamp(min=0) + precision).sqrt() @ vectors.T
        weights, biases = heads[:, : 10 * WIDTH].view(-1, 10, WIDTH), heads[:, 10 * WIDTH :]
        outputs = torch.einsum("nw,dcw->dnc", model.features(x).double(), weights) + biases[:, None]
        return outputs.softmax(-1).mean(0)

    return predict


def reliability(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean confidence and accuracy in ten bins of confidence, and the calibration error over them."""
    sure, said = p.max(1)
    of = (sure * 10).long().clamp(max=9)
    count, sums, right = (torch.bincount(of, v, minlength=10) for v in (None, sure, (said == y).double()))
    full = count > 0
    return (sums / count)[full], (right / count)[full], ((sums - right).abs().sum() / len(y)).item()


def show(small: bool) -> Shown:
    torch.manual_seed(0)
    x, y = digits()
    model, end = Transformer(), TRAINING + CHOOSING
    fit(model, x[:TRAINING], y[:TRAINING], 200 if small else 500, 0.003, 64)
    laplace = posterior(px.extend(model), x[:TRAINING], y[:TRAINING])
    tempered = lambda x, t: (model(x).detach().double() / t).softmax(1)  # noqa: E731
    some, known, grid = x[TRAINING:end], y[TRAINING:end], torch.logspace(-1, 3, 25).tolist()
    prior = min(grid, key=lambda p: nll_loss(laplace(some, p).log(), known).item())
    heat = min(grid, key=lambda t: nll_loss(tempered(some, t).log(), known).item())
    ways = {"trained weights": (tempered, 1.0, ORANGE), "temperature": (tempered, heat, GREEN)}
    ways["Laplace"] = laplace, prior, BLUE

    numbers: dict[str, Any] = {"chosen precision of the prior, temperature": (prior, heat)}
    noises, y = (0.0, 0.4) if small else (0.0, 0.1, 0.2, 0.3, 0.4, 0.5), y[end:]
    figure = Figure((9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, (way, setting, color) in ways.items():
        losses: list[float] = []
        for noise in noises:
            seen = x[end:] + noise * torch.randn(len(y), 64, generator=torch.Generator().manual_seed(1))
            p = way(seen, setting)
            sure, correct, error = reliability(p, y)
            losses.append(nll_loss(p.log(), y).item())
            rate = (p.argmax(1) == y).double().mean().item()
            if noise in (0.0, 0.4):
                what = f"{name}, noise {noise:g}: accuracy, negative log-likelihood, calibration error"
                numbers[what] = rate, losses[-1], error
            if noise == 0.4:
                left.plot(sure, correct, "o-", ms=4, color=color)
        right.plot(noises, losses, "o-", ms=4, color=color, label=name)
    left.plot([0, 1], [0, 1], color=GREY, lw=1, zorder=0)
    left.set(xlabel="confidence", ylabel="accuracy", title="held-out digits with noise of 0.4")
    right.set(xlabel="noise added to held-out digits", ylabel="negative log-likelihood")
    right.legend(frameon=False)
    tidy(left, right)
    return figure, numbers


if __name__ == "__main__":
    run(show)
