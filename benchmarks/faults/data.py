"""Data of the small training problems."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_sample_images
from torch import Tensor, nn

SYMBOLS = "abcdefghijklmnopqrstuvwxyz "


@dataclass
class Data:
    """Inputs and targets, split."""

    x: Tensor
    y: Tensor
    valid_x: Tensor
    valid_y: Tensor


def split(x: Tensor, y: Tensor, valid: float = 0.25) -> Data:
    """In an order that is always the same, the first of it for validation."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y, cut = x[order], y[order], int(len(x) * valid)
    return Data(x[cut:], y[cut:], x[:cut], y[:cut])


@cache
def digits(shape: tuple[int, ...]) -> Data:
    """8 x 8 images of digits, pixels from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    return split(torch.tensor(images, dtype=torch.float32).view(-1, *shape) / 16, torch.tensor(labels))


@cache
def waves() -> Data:
    """Regression: a smooth function of eight numbers, with a little noise."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1600, 8, generator=g)
    y = torch.sin(x[:, :1] + x[:, 1:2]) + 0.5 * x[:, 2:3] * x[:, 3:4] + 0.3 * x[:, 4:5]
    return split(x, y + 0.1 * torch.randn(y.shape, generator=g))


@cache
def cancer() -> Data:
    """Thirty standardised features, two classes."""
    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32)
    return split((x - x.mean(0)) / x.std(0), torch.tensor(y))


@cache
def patches() -> Data:
    """Regression: the middle of 9 x 9 pixels of two photographs, of which the inner 3 x 3 are hidden; standardised."""
    g, parts = torch.Generator().manual_seed(2), []
    for image in load_sample_images().images:
        grey = torch.tensor(image, dtype=torch.float32).mean(-1)
        rows, columns = (torch.randint(0, size - 8, (900,), generator=g) for size in grey.shape)
        parts.append(grey.unfold(0, 9, 1).unfold(1, 9, 1)[rows, columns])
    x = torch.cat(parts)[:, None]
    x = (x - x.mean()) / x.std()
    y = x[:, :, 4, 4].clone()
    x[:, :, 3:6, 3:6] = 0.0
    return split(x, y)


def _prose() -> str:
    return " ".join(" ".join(topics[k] for k in sorted(topics)).lower().split())


def _numbers(text: str) -> Tensor:
    """Of 29 symbols: a letter or a space, another sign, a digit."""
    return torch.tensor([SYMBOLS.find(c) if c in SYMBOLS else 27 + c.isdigit() for c in text])


@cache
def texts() -> Data:
    """24 characters each: Python's reference, the same backwards, or code; of 29 symbols, with a mean square of 1."""
    prose = _prose()
    code = " ".join(Path(inspect.getfile(nn.Transformer)).read_text().lower().split())
    g, length, pieces, kinds = torch.Generator().manual_seed(3), 24, [], []
    for kind, text in enumerate((prose, prose[::-1], code)):
        numbers = _numbers(text)
        starts = torch.randint(0, len(numbers) - length, (600,), generator=g)
        pieces.append(numbers.unfold(0, length, 1)[starts])
        kinds.append(torch.full((600,), kind))
    return split(nn.functional.one_hot(torch.cat(pieces), 29).mT * 29**0.5, torch.cat(kinds))


@cache
def pixels() -> Data:
    """Digits, of which one column is left out, with noise, and the same without, to be told pixel by pixel."""
    data, g = digits((8, 8)), torch.Generator().manual_seed(4)
    clean, valid = (x[:, :, 1:].flatten(1) for x in (data.x, data.valid_x))
    x, valid_x = (y + 0.3 * torch.randn(y.shape, generator=g) for y in (clean, valid))
    return Data(x, clean, valid_x, valid)


@cache
def sets() -> Data:
    """Regression on 10 points in four dimensions: 40 times how far they scatter, not scaled."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(1600, 10, 4, generator=g) * (0.3 + 1.4 * torch.rand(1600, 1, 1, generator=g))
    y = 40 * x.std(1).mean(1, keepdim=True)
    return split(x, y + torch.randn(y.shape, generator=g))


@cache
def sentences() -> Data:
    """20 characters of Python's reference each, and the 20 that come one after: of 29 symbols, mean square 1."""
    numbers, g, length = _numbers(_prose()), torch.Generator().manual_seed(6), 20
    pieces = numbers.unfold(0, length + 1, 1)[torch.randint(0, len(numbers) - length, (3000,), generator=g)]
    return split(nn.functional.one_hot(pieces[:, :-1], 29) * 29**0.5, pieces[:, 1:])


@cache
def corners() -> Data:
    """Patches of 8 x 8 pixels in colour, standardised: of which of two photographs, and of its upper or lower half."""
    g, parts = torch.Generator().manual_seed(7), []
    for image in load_sample_images().images:
        whole = torch.tensor(image, dtype=torch.float32).movedim(2, 0)
        for half in whole.chunk(2, 1):
            rows, columns = (torch.randint(0, size - 7, (500,), generator=g) for size in half.shape[1:])
            parts.append(half.unfold(1, 8, 1).unfold(2, 8, 1)[:, rows, columns].movedim(1, 0))
    x = torch.cat(parts)
    return split((x - x.mean()) / x.std(), torch.arange(4).repeat_interleave(500))


@cache
def friedman() -> Data:
    """Regression: Friedman's first function (1991) of five of ten numbers, with its noise; standardised."""
    g = torch.Generator().manual_seed(8)
    x = torch.rand(1600, 10, generator=g)
    y = 10 * torch.sin(torch.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y = (y + torch.randn(1600, generator=g))[:, None]
    return split((x - 0.5) * 12**0.5, (y - y.mean()) / y.std())


@cache
def signals() -> Data:
    """32 samples of an oscillation with noise, which is a sine, a square, a triangle or a saw tooth."""
    g = torch.Generator().manual_seed(9)
    kind = torch.randint(0, 4, (2000,), generator=g)
    steps = torch.arange(32)
    rate, start, height = (
        a + (b - a) * torch.rand(2000, 1, generator=g) for a, b in ((0.06, 0.16), (0, 1), (0.7, 1.3))
    )
    turn = (rate * steps + start) % 1
    shapes = torch.stack([
        2**0.5 * torch.sin(2 * torch.pi * turn), torch.sign(turn - 0.5), 3**0.5 * (4 * (turn - 0.5).abs() - 1),
        3**0.5 * (2 * turn - 1),
    ])  # fmt: skip
    x = height * shapes[kind, torch.arange(2000)] + 0.2 * torch.randn(2000, 32, generator=g)
    return split(x[..., None], kind)


@cache
def recalls() -> Data:
    """Five symbols of six, of which the first is the class; mean square 1."""
    symbols = torch.randint(6, (2000, 5), generator=torch.Generator().manual_seed(10))
    return split(nn.functional.one_hot(symbols, 6) * 6**0.5, symbols[:, 0])


@cache
def parities() -> Data:
    """Twelve signs, and whether the product of the first three of them is positive."""
    signs = 2.0 * torch.randint(2, (3000, 12), generator=torch.Generator().manual_seed(11)) - 1
    return split(signs, (signs[:, :3].prod(1) > 0).long())


@cache
def copies() -> Data:
    """Digits, to be given back."""
    data = digits((64,))
    return Data(data.x, data.x, data.valid_x, data.valid_x)


@cache
def low_digits() -> Data:
    """Digits from 0 to 4."""
    return _of(torch.arange(5))


@cache
def high_digits() -> Data:
    """Digits from 5 to 9, counted from 0."""
    return _of(torch.arange(5, 10))


def _of(classes: Tensor) -> Data:
    data = digits((1, 8, 8))
    kept, valid = (torch.isin(y, classes) for y in (data.y, data.valid_y))
    return Data(
        data.x[kept], data.y[kept] - classes[0], data.valid_x[valid], data.valid_y[valid] - classes[0]
    )  # fmt: skip


@cache
def claims() -> Data:
    """Who makes a claim: one in fifteen, by three kinds (one-hot) and eight numbers with heavy tails, standardised."""
    g, n = torch.Generator().manual_seed(12), 4000
    kinds = [torch.randint(k, (n,), generator=g) for k in (6, 8, 10)]
    numbers = torch.randn(n, 8, generator=g)
    effects = sum(torch.randn(k, generator=g)[own] for k, own in zip((6, 8, 10), kinds, strict=True))
    score = effects + 1.5 * numbers[:, 0] - numbers[:, 1] * numbers[:, 2] + numbers[:, 3].abs()
    y = (score + 0.7 * torch.randn(n, generator=g) > score.quantile(0.93)).float()[:, None]
    heavy = torch.cat([numbers[:, :4], torch.expm1(1.2 * numbers[:, 4:])], 1) + 0.1 * torch.randn(n, 8, generator=g)
    heavy = (heavy - heavy.mean(0)) / heavy.std(0)
    hot = [nn.functional.one_hot(own, k).float() for k, own in zip((6, 8, 10), kinds, strict=True)]
    return split(torch.cat([*hot, heavy], 1), y)


@cache
def noised() -> Data:
    """Digits from -1 to 1, to be noised anew in each step; for validation noised once, and the noise."""
    data, g = digits((64,)), torch.Generator().manual_seed(13)
    valid_x, valid_y = noise(2 * data.valid_x - 1, g)
    return Data(2 * data.x - 1, torch.zeros_like(data.x), valid_x, valid_y)


def noise(x: Tensor, g: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """What is left of each sample at a random time between 0 and 1, with that time; and the noise that is in it."""
    time, added = torch.rand(len(x), 1, generator=g), torch.randn(x.shape, generator=g)
    angle = torch.pi / 2 * (0.02 + 0.96 * time)
    return torch.cat([torch.cos(angle) * x + torch.sin(angle) * added, time], 1), added


@cache
def bandits() -> Data:
    """Eight numbers, and what each of four actions is worth there; for validation, which is the best."""
    g = torch.Generator().manual_seed(14)
    x = torch.randn(2000, 8, generator=g)
    worth = torch.tanh(x @ torch.randn(8, 16, generator=g)) @ torch.randn(16, 4, generator=g) / 4
    data = split(x, worth)
    data.valid_y = nn.functional.one_hot(data.valid_y.argmax(1), 4).float()
    return data


@cache
def tails() -> Data:
    """Regression: a function of ten numbers, with noise of Student's distribution (two degrees of freedom)."""
    g = torch.Generator().manual_seed(15)
    x = torch.randn(2000, 10, generator=g)
    y = x[:, 0] + torch.sin(2 * x[:, 1]) + x[:, 2] * x[:, 3] + x[:, 4].abs()
    chi = torch.randn(2000, 2, generator=g).square().sum(1)
    y = y - y.mean() + 0.3 * torch.randn(2000, generator=g) / (chi / 2).sqrt()
    return split(x, y[:, None])
