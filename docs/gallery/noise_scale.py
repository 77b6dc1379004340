"""Gradient noise scale: how large a batch a small language model can use, while it learns.

`tr(covariance of individual gradients) / |mean gradient|²` is the batch size at which noise and signal are equal
(McCandlish et al. 2018). Norms and inner products come with every backward pass. On the right, the same of
normalisations' weights alone, which follow the whole model (Gray et al. 2024). The text is Python's own help.
"""

from __future__ import annotations

from typing import Any

import torch
from frame import BLUE, GREEN, ORANGE, Shown, run, text, tidy
from matplotlib.figure import Figure
from torch import Tensor, nn

import packext as px
from packext import testing

BATCH, LENGTH, WIDTH = 32, 32, 32


class LanguageModel(nn.Module):
    """Characters in, the logits of the next character out `[N, letters, T]`."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(letters, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) / 10)
        self.body = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.place
        for layer in self.body:
            h = layer(h, src_mask=self.mask)
        return self.head(self.norm(h)).transpose(1, 2)


def signal_and_noise(mean_square: float, square_of_mean: float) -> tuple[float, float]:
    """|mean gradient|² and the covariance's trace, without bias, from one batch."""
    noise = (mean_square - square_of_mean) * BATCH / (BATCH - 1)
    return square_of_mean - noise / BATCH, noise


def smooth(pairs: list[tuple[float, float]], weight: float = 0.9) -> list[float]:
    """The noise scale from running means of signal and noise."""
    scales, signal, noise = [], 0.0, 0.0
    for one, other in pairs:
        signal, noise = weight * signal + (1 - weight) * one, weight * noise + (1 - weight) * other
        scales.append(noise / signal)
    return scales


def show(small: bool) -> Shown:
    steps, every = (40, 2) if small else (600, 4)
    body, letters = text(100_000)
    torch.manual_seed(0)
    model, loss_fn = px.extend(LanguageModel(letters)), px.extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    named = dict(model.named_parameters())
    groups = {"all weights": list(named.values()), "normalisations": [p for k, p in named.items() if "norm" in k]}
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in groups}
    losses: list[float] = []
    numbers: dict[str, Any] = {}
    for step in range(steps):
        tokens = body[torch.randint(len(body) - LENGTH - 1, (BATCH, 1)) + torch.arange(LENGTH + 1)]
        x, y = tokens[:, :-1], tokens[:, 1:]
        quantities = () if step % every else (px.BatchL2Grad(), px.GradDot())
        optimizer.zero_grad()
        with px.backpack(*quantities, scale="sample", attach=False) as results:
            loss = loss_fn(model(x), y)
            loss.backward()
        if quantities:
            for name, group in groups.items():
                squares, dots = (
                    torch.stack([getattr(results[p], k) for p in group]).sum(0) for k in ("batch_l2", "grad_dot")
                )
                pairs[name].append(signal_and_noise(squares.mean().item(), dots.mean().item()))
        if step == 0:
            rows = testing.individual_gradients(model, nn.CrossEntropyLoss(), x, y)
            direct = sum(r.var(0).sum().item() for r in rows.values())
            numbers["noise of the first batch, difference to one by one"] = abs(pairs["all weights"][0][1] / direct - 1)
        optimizer.step()
        losses.append(loss.item())

    figure = Figure((9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(losses, color=BLUE, lw=0.8)
    left.set(xlabel="step", ylabel="loss per character")
    tenth = len(pairs["all weights"]) // 10
    for (name, found), color in zip(pairs.items(), (ORANGE, GREEN), strict=True):
        for when, part in (("first", found[:tenth]), ("last", found[-tenth:])):
            signal, noise = (sum(each) for each in zip(*part, strict=True))
            numbers[f"noise scale, {name}, {when} tenth of the training"] = noise / signal
        right.plot(range(0, steps, every), smooth(found), color=color, label=name)
    both = torch.tensor([smooth(found) for found in pairs.values()]).log()
    numbers["correlation of the two, of logarithms of running means"] = torch.corrcoef(both)[0, 1].item()
    right.set(xlabel="step", ylabel="noise scale in sequences", yscale="log")
    right.legend(frameon=False)
    tidy(left, right)
    return figure, numbers


if __name__ == "__main__":
    run(show)
