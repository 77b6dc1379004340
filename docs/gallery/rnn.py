"""RNN: individual gradients through time, and how much of them comes back to the first character of a text.

The loss asks for the character after the last. The first one is looked up in rows of its own, so that the gradient of
these rows is what has come back through all steps. Networks are those of torch, untrained.
"""

from __future__ import annotations

from typing import Any

import torch
from frame import BLUE, GREEN, ORANGE, Shown, run, text, tidy
from matplotlib.figure import Figure
from torch import Tensor, nn

import packext as px
from packext import testing

WIDTH = 32


class Reader(nn.Module):
    """The next character after some others; the first has an embedding of its own."""

    def __init__(self, kind: Any, letters: int) -> None:
        super().__init__()
        self.letters = letters
        self.embedding = nn.Embedding(2 * letters, WIDTH)
        self.cell, self.head = kind(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, letters)

    def forward(self, tokens: Tensor) -> Tensor:
        first = torch.cat([tokens[:, :1] + self.letters, tokens[:, 1:]], 1)
        return self.head(self.cell(self.embedding(first))[0][:, -1])


def show(small: bool) -> Shown:
    n, lengths = (8, (2, 8)) if small else (64, (2, 4, 8, 12, 16, 24, 32, 48))
    body, letters = text(20_000)
    starts = torch.linspace(0, len(body) - 100, n).long()
    figure = Figure((9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers: dict[str, Any] = {}
    loss_fn = px.extend(nn.CrossEntropyLoss())
    for kind, color in ((nn.RNN, ORANGE), (nn.GRU, GREEN), (nn.LSTM, BLUE)):
        torch.manual_seed(0)
        model = px.extend(Reader(kind, letters).double())
        first, recurrent = [], []
        for length in lengths:
            tokens = torch.stack([body[s : s + length + 1] for s in starts.tolist()])
            x, y = tokens[:, :-1], tokens[:, -1]
            with px.backpack(px.BatchGrad(), scale="sample", attach=False) as results:
                loss_fn(model(x), y).backward()
            first.append(results["embedding.weight"].grad_batch[:, letters:].flatten(1).norm(dim=1))
            recurrent.append(results["cell.weight_hh_l0"].grad_batch.flatten(1).norm(dim=1).mean().item())
        want = testing.individual_gradients(model, nn.CrossEntropyLoss(), x[:4], y[:4])
        errors = [testing.relative_error(results[k].grad_batch[:4], w) for k, w in want.items()]
        name = kind.__name__
        numbers[f"{name}: largest relative error of an individual gradient"] = max(errors)
        medians = [norms.median().item() for norms in first]
        numbers[f"{name}: norm for the first of {lengths[0]} and of {lengths[-1]} characters"] = medians[0], medians[-1]
        left.plot(lengths, medians, "o-", ms=3, color=color, label=name)
        quartiles = [[norms.quantile(q).item() for norms in first] for q in (0.25, 0.75)]
        left.fill_between(lengths, *quartiles, color=color, alpha=0.15)
        right.plot(lengths, recurrent, "o-", ms=3, color=color)
    left.set(xlabel="characters", ylabel="norm of the gradient for the first one", yscale="log")
    right.set(xlabel="characters", ylabel="norm of the recurrent weights' gradient", ylim=(0, None))
    left.legend(frameon=False, title="median, quartiles")
    tidy(left, right)
    return figure, numbers


if __name__ == "__main__":
    run(show)
