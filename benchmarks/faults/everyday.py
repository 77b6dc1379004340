"""Networks, losses and schedules as they are met every day: beside those of `problems`, with noise and warm-up."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax, one_hot

from benchmarks.faults.data import high_digits, noise


class Own(nn.Module):
    """A loss of our own: gives that of each sample, of which the mean is trained on."""


class VAE(nn.Module):
    """A variational autoencoder of eight numbers; gives logits of the pixels, means and logarithms of variances."""

    def __init__(self, width: int = 64, code: int = 8) -> None:
        super().__init__()
        self.into = nn.Sequential(nn.Linear(64, width), nn.ReLU())
        self.code = nn.Linear(width, 2 * code)
        self.out = nn.Sequential(nn.Linear(code, width), nn.ReLU(), nn.Linear(width, 64))

    def forward(self, x: Tensor) -> Tensor:
        code = self.code(self.into(x))
        mean, variance = code.chunk(2, 1)
        return torch.cat([self.out(mean + (0.5 * variance).exp() * torch.randn_like(mean)), code], 1)


class Evidence(Own):
    """What a variational autoencoder falls short of: cross-entropy of the pixels and divergence of the code."""

    def forward(self, found: Tensor, y: Tensor) -> Tensor:
        pixels, mean, variance = found.tensor_split([64, 72], 1)
        divergence = 0.5 * (variance.exp() + mean**2 - 1 - variance)
        return binary_cross_entropy_with_logits(pixels, y, reduction="none").sum(1) + divergence.sum(1)


def trunk() -> nn.Sequential:
    """Three convolutions and two dense layers for five classes."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5),
    )  # fmt: skip


@cache
def trained() -> dict[str, Tensor]:
    """The trunk's parameters after ten epochs on the other digits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, data = trunk(), high_digits()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(10):
            for rows in torch.randperm(len(data.x)).split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
                optimizer.step()
    return model.state_dict()


def tuned() -> nn.Sequential:
    """The trunk as it was trained, of which the first two layers are frozen, with a new head."""
    model = trunk()
    model.load_state_dict(trained())
    model[:5].requires_grad_(False)
    model[11] = nn.Linear(48, 5)
    return model


def dropped(widths: list[int]) -> nn.Sequential:
    """A perceptron with ReLU and dropout."""
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def normed(widths: list[int]) -> nn.Sequential:
    """A perceptron with BatchNorm before its ReLUs."""
    layers: list[nn.Module] = []
    for a, b in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


class Eps(nn.Module):
    """Says which noise is in a noised picture, given the time that is its last entry, as sines of it."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(80, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 64),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        turn = x[:, 64:] * torch.pi * 2.0 ** torch.arange(-2, 6)
        return self.body(torch.cat([x[:, :64], turn.sin(), turn.cos()], 1))


class Attending(nn.Module):
    """Self-attention and a perceptron with GELU and dropout, each with LayerNorm before it and a skip around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        x = x + self.drop(self.attention(z, z, z, need_weights=False)[0])
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm2(x)))))


class ViT(nn.Module):
    """Patches of four pixels as tokens, and a token of the class (Dosovitskiy et al. 2021), under bfloat16 autocast."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(17, width))
        self.blocks = nn.Sequential(Attending(width), Attending(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            tokens = self.patches(x).flatten(2).mT
            tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.position
            return self.head(self.norm(self.blocks(tokens))[:, 0]).float()


class Reward(Own):
    """Policy gradient: minus the logarithms of the actions' probabilities, each by its advantage."""

    def forward(self, found: Tensor, y: Tensor) -> Tensor:
        return -(y * log_softmax(found, 1)).sum(1)


# -- what a step is made of, of the samples that were chosen -----------------------------------------------


def noised_anew(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures at random times, and their noise."""
    return noise(x)


def acted(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """An action drawn from the policy for each sample, and its noisy reward, standardised over the batch."""
    with torch.no_grad():
        action = torch.distributions.Categorical(logits=model(x)).sample()
    reward = y[torch.arange(len(x)), action] + 0.3 * torch.randn(len(x))
    advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
    return x, one_hot(action, 4) * advantage[:, None]


def mixed(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al. 2018): each sample with a share of another, and the classes of both."""
    share = float(torch.distributions.Beta(0.2, 0.2).sample())
    other, hot = torch.randperm(len(x)), one_hot(y, 10).float()
    return share * x + (1 - share) * x[other], share * hot + (1 - share) * hot[other]


# -- factors on the learning rate, by the step -------------------------------------------------------------


def warm(step: int) -> float:
    """Up in fifty steps, and there it stays."""
    return min(1.0, (step + 1) / 50)


def cosine(step: int, steps: int = 250) -> float:
    """Up in 25 steps, and down to nothing as a cosine."""
    return min((step + 1) / 25, 0.5 * (1 + math.cos(math.pi * step / steps)))


def one_cycle(step: int, steps: int = 250) -> float:
    """From a 25th up in three tenths of the steps, and down to nothing, both as cosines (Smith 2018)."""
    top = 0.3 * steps
    if step < top:
        return 0.04 + 0.96 * 0.5 * (1 - math.cos(math.pi * step / top))
    return 0.5 * (1 + math.cos(math.pi * (step - top) / (steps - top)))
