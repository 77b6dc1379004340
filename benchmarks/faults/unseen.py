"""Families that were held out once: whoever made rules had looked at none of this before their score."""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
import string
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize, pad, scaled_dot_product_attention

from benchmarks.faults.data import Data, digits, split
from benchmarks.faults.everyday import Own

# -- metric learning ---------------------------------------------------------------------------------------


@cache
def matches() -> Data:
    """A digit and five others in a row `[6, 64]`, of which one is of the same class: which one."""
    data, g = digits((64,)), torch.Generator().manual_seed(16)
    train, valid = _rows(data.x, data.y, 4800, g), _rows(data.valid_x, data.valid_y, 1200, g)
    return Data(*train, *valid)


def _rows(images: Tensor, labels: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the digit, one of its class, and four of other classes; and where among the five the first of them is."""
    same = labels[:, None] == labels
    first = torch.randint(len(labels), (n,), generator=g)
    like = torch.multinomial(same[first].float(), 1, generator=g)
    unlike = torch.multinomial((~same[first]).float(), 4, generator=g)
    place = torch.randint(5, (n,), generator=g)
    others, every = torch.cat([unlike, like], 1), torch.arange(n)
    others[:, 4] = others[every, place]
    others[every, place] = like[:, 0]
    return images[torch.cat([first[:, None], others], 1)], place


class Matcher(nn.Module):
    """Puts digits on a sphere: cosines of the first with the others, over a temperature of 0.2 (InfoNCE's logits)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 16)
        )

    def forward(self, x: Tensor) -> Tensor:
        code = normalize(self.encoder(x), dim=-1)
        return (code[:, 1:] * code[:, :1]).sum(-1) / 0.2


# -- a language model --------------------------------------------------------------------------------------


@cache
def code() -> Data:
    """24 characters of two modules of the standard library each, and the 24 that come one after, as ids below 100.

    The last tenth of each module is for validation.
    """
    g, parts = torch.Generator().manual_seed(17), ([], [])
    for module in (argparse, difflib):
        ids = torch.tensor([k for c in inspect.getsource(module) if (k := string.printable.find(c)) >= 0])
        cut = len(ids) * 9 // 10
        for part, own, n in zip(parts, (ids[:cut], ids[cut:]), (2000, 150), strict=True):
            part.append(own.unfold(0, 25, 1)[torch.randint(len(own) - 24, (n,), generator=g)])
    train, valid = (torch.cat(part) for part in parts)
    return Data(train[:, :-1], train[:, 1:], valid[:, :-1], valid[:, 1:])


class Decoding(nn.Module):
    """Causal attention and a perceptron with GELU, each with LayerNorm before it, dropout and a skip around it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z.unflatten(2, (4, -1)).transpose(1, 2) for z in self.qkv(self.norm1(x)).chunk(3, 2))
        seen = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.drop(self.out(seen))
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """A decoder of two blocks, whose table of tokens is its head, too (Radford et al. 2019)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.position = nn.Parameter(0.1 * torch.randn(24, width))
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.Sequential(Decoding(width), Decoding(width))
        self.norm = nn.LayerNorm(width)
        self.token, self.head = nn.Embedding(100, width), nn.Linear(width, 100, bias=False)
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.drop(self.token(x) + self.position)))).mT


# -- collaborative filtering -------------------------------------------------------------------------------


@cache
def ratings() -> Data:
    """Who rates what (ids below 120 and 80, some far more often than others), and how, less the mean of all."""
    g, n = torch.Generator().manual_seed(18), 8000
    who = (120 * torch.rand(n, generator=g) ** 1.5).long()
    what = (80 * torch.rand(n, generator=g) ** 2).long()
    tastes, kinds = torch.randn(120, 3, generator=g), torch.randn(80, 3, generator=g)
    liked = 0.5 * torch.randn(120, generator=g)[who] + 0.7 * torch.randn(80, generator=g)[what]
    y = 3.5 + liked + 0.5 * (tastes[who] * kinds[what]).sum(1) + 0.4 * torch.randn(n, generator=g)
    y = (2 * y).round().clamp(1, 10)[:, None] / 2
    return split(torch.stack([who, what], 1), y - y.mean())


class Tables(nn.Module):
    """A row of a table for each of the two ids, side by side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.who, self.what = nn.Embedding(120, width), nn.Embedding(80, width)
        for table in (self.who, self.what):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.who(x[:, 0]), self.what(x[:, 1])], 1)


class Recommender(nn.Module):
    """The product of two rows, and a perceptron of both (He et al. 2017: neural matrix factorisation)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.tables = Tables(width)
        self.deep = nn.Sequential(nn.Linear(2 * width, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.head = nn.Linear(16 + width, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.tables(x)
        who, what = rows.chunk(2, 1)
        return self.head(torch.cat([self.deep(rows), who * what], 1))


# -- segmentation ------------------------------------------------------------------------------------------


@cache
def shapes() -> Data:
    """16 x 16 pixels with a disc and a square of any brightness in noise, and which pixels are the disc's (few)."""
    g, n = torch.Generator().manual_seed(19), 1200
    grid = torch.arange(16.0)

    def away() -> tuple[Tensor, Tensor]:
        """How far each row and each column is from a random centre."""
        centre = 3 + 10 * torch.rand(n, 2, 1, generator=g)
        return (grid - centre[:, 0]).abs()[:, :, None], (grid - centre[:, 1]).abs()[:, None]

    def any_of(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=g)

    (rows, columns), (other_rows, other_columns) = away(), away()
    disc = rows**2 + columns**2 < any_of(1.7, 3.0) ** 2
    square = torch.maximum(other_rows, other_columns) < any_of(1.2, 2.5)
    x = any_of(0.7, 1.3) * torch.maximum(disc.float(), square * any_of(0.7, 1.3))
    x = x + 0.2 * torch.randn(n, 16, 16, generator=g)
    x = (x - x.mean()) / x.std()
    return split(x[:, None], disc.float()[:, None])


def _conv(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


class UNet(nn.Module):
    """Two scales down and up again, with what was seen on the way down beside (Ronneberger et al. 2015)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = _conv(1, width), _conv(width, width), _conv(width, 2 * width)
        self.pool = nn.MaxPool2d(2)
        self.up2 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge2 = _conv(2 * width, width)
        self.up1 = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.merge1 = _conv(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down1(x)
        coarse = self.down2(self.pool(fine))
        coarse = self.merge2(torch.cat([self.up2(self.bottom(self.pool(coarse))), coarse], 1))
        return self.head(self.merge1(torch.cat([self.up1(coarse), fine], 1)))


class Overlap(Own):
    """Cross-entropy of the pixels and Dice's loss (Milletari et al. 2016), of each image."""

    def forward(self, found: Tensor, y: Tensor) -> Tensor:
        p, t = found.sigmoid().flatten(1), y.flatten(1)
        dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
        return binary_cross_entropy_with_logits(found.flatten(1), t, reduction="none").mean(1) + dice


# -- counts with exposure ----------------------------------------------------------------------------------


@cache
def counts() -> Data:
    """Nine standardised numbers, one of six regions (one-hot), and for how long was counted; and the count.

    Counts are more scattered than Poisson's: rates are multiplied by a number of Gamma's distribution.
    """
    g, n = torch.Generator().manual_seed(20), 3200
    x = torch.randn(n, 9, generator=g)
    region = torch.randint(6, (n,), generator=g)
    time = 0.25 + 3.75 * torch.rand(n, generator=g)
    score = 0.4 * x[:, 0] + 0.3 * torch.sin(2 * x[:, 1]) - 0.3 * x[:, 2] * (x[:, 3] > 0) + 0.2 * x[:, 4].abs()
    score = score + 0.5 * torch.randn(6, generator=g)[region]
    scatter = -torch.rand(n, 5, generator=g).log().sum(1) / 5
    y = torch.poisson(time * score.exp() * scatter, generator=g)[:, None]
    return split(torch.cat([x, nn.functional.one_hot(region, 6), time[:, None]], 1), y)


class Counter(nn.Module):
    """The logarithm of the expected count: that of the rate, by a perceptron with LayerNorm, and that of the time."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(15, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width),
            nn.ReLU(), nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x[:, :15]) + x[:, 15:].log()


# -- forecasts ---------------------------------------------------------------------------------------------


@cache
def delayed() -> Data:
    """32 samples of Mackey and Glass's oscillation (1977, delay 17) with noise, and the next four; standardised.

    Windows are random; those of the last quarter of the time are for validation.
    """
    g, steps = torch.Generator().manual_seed(21), 10
    values = [1.2] * (17 * steps)
    for _ in range(3 * steps * 2400):
        late = values[-17 * steps]
        values.append(values[-1] + (0.2 * late / (1 + late**10) - 0.1 * values[-1]) / steps)
    series = torch.tensor(values[400 * steps :: 3 * steps])
    series = (series - series.mean()) / series.std()
    windows = (series + 0.05 * torch.randn(series.shape, generator=g)).unfold(0, 36, 1)
    cut = len(windows) * 3 // 4
    chosen = torch.randperm(cut - 36, generator=g)
    return Data(windows[chosen, None, :32], windows[chosen, 32:], windows[cut:, None, :32], windows[cut:, 32:])


class Causal(nn.Module):
    """Two dilated convolutions that see the past alone, with ReLU, dropout and a skip around them."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(width, width, 3, dilation=dilation)
        self.second = nn.Conv1d(width, width, 3, dilation=dilation)
        self.drop, self.past = nn.Dropout(0.05), (2 * dilation, 0)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.first(pad(x, self.past)))
        return torch.relu(x + self.drop(self.second(pad(z, self.past))))


class TCN(nn.Module):
    """A temporal convolutional network (Bai et al. 2018): three blocks, of which the last moment is read."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.into = nn.Conv1d(1, width, 1)
        self.blocks = nn.Sequential(*(Causal(width, 2**k) for k in range(3)))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.into(x))[:, :, -1])


# -- factors on the learning rate, by the step -------------------------------------------------------------


def warm_cosine(step: int, steps: int = 250) -> float:
    """Up in 20 steps, and down to a tenth as a cosine."""
    return min((step + 1) / 20, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
