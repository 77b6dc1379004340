"""Families that were held out after those of `unseen`: nobody who made rules had looked at them before their score."""

from __future__ import annotations

import math
from functools import cache
from weakref import WeakKeyDictionary

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import avg_pool2d, cross_entropy, ctc_loss, log_softmax, one_hot, smooth_l1_loss

from benchmarks.faults.data import Data, split
from benchmarks.faults.everyday import Own

# -- speech ------------------------------------------------------------------------------------------------


@cache
def speech() -> Data:
    """32 frames of 12 bands with three to five sounds out of six, and which these were: from 1 on, then zeros.

    A sound is a spectrum that lasts two to five frames, at a loudness of its own, and runs into the next one; some
    have a pause between them. Standardised.
    """
    g, n = torch.Generator().manual_seed(22), 2400
    spectra = torch.cat([torch.zeros(1, 12), torch.rand(6, 12, generator=g) ** 2])
    kinds = torch.randint(1, 7, (n, 5), generator=g)
    many = torch.randint(3, 6, (n, 1), generator=g)
    kinds[torch.arange(5) >= many] = 0
    lasts = torch.randint(2, 6, (n, 5), generator=g)
    pauses = torch.randint(0, 4, (n, 5), generator=g).clamp(max=2)
    begins = pauses.cumsum(1) + lasts.cumsum(1) - lasts
    now = torch.arange(32)[:, None]
    loud = ((begins[:, None] <= now) & (now < (begins + lasts)[:, None])) * (0.6 + torch.rand(n, 1, 5, generator=g))
    frames = loud @ spectra[kinds]
    frames[:, 1:] = 0.7 * frames[:, 1:] + 0.3 * frames[:, :-1]
    frames = frames + 0.15 * torch.randn(frames.shape, generator=g)
    return split((frames - frames.mean()) / frames.std(), kinds, 0.1)


class BothWays(nn.Module):
    """A GRU in both directions, that gives its outputs alone."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.cells = nn.GRU(inputs, width, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0]


class Transcriber(nn.Module):
    """Says of each frame which of six sounds is new there, or none."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.frames, self.recurrent = nn.Conv1d(12, width, 3, padding=1), BothWays(width, width)
        self.hidden, self.head = nn.Linear(2 * width, width), nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.relu(self.frames(x.mT)).mT
        return self.head(torch.relu(self.hidden(self.recurrent(frames))))


class Alignments(Own):
    """Connectionist temporal classification (Graves et al. 2006): over all alignments, by the number of sounds."""

    def forward(self, found: Tensor, y: Tensor) -> Tensor:
        lengths = (y > 0).sum(1)
        frames = torch.full_like(lengths, found.shape[1])
        return ctc_loss(log_softmax(found, 2).transpose(0, 1), y, frames, lengths, reduction="none") / lengths


# -- graphs ------------------------------------------------------------------------------------------------


@cache
def molecules() -> Data:
    """Graphs of 6 to 12 atoms: of which of four kinds each is (one-hot, or none), and its bonds; and a property.

    Trees with up to three more bonds. The property is made of what atoms, pairs of bonded ones, atoms with three bonds
    or more, and rings add to it, with noise; standardised.
    """
    g, n = torch.Generator().manual_seed(23), 3200
    many = torch.randint(6, 13, (n,), generator=g)
    there = torch.arange(12) < many[:, None]
    kinds = one_hot(torch.multinomial(torch.tensor([0.5, 0.2, 0.2, 0.1]), n * 12, True, generator=g), 4)
    kinds = kinds.view(n, 12, 4).float() * there[:, :, None]
    bonds, rings = torch.zeros(n, 12, 12), torch.randint(0, 4, (n,), generator=g)
    every = torch.arange(n)
    for atom in range(1, 12):
        other = (torch.rand(n, generator=g) * min(atom, 3)).long() + max(0, atom - 3)
        bonds[every, atom, other] = there[:, atom].float()
    for ring in range(3):
        a, b = ((torch.rand(n, generator=g) * many).long() for _ in range(2))
        bonds[every, a, b] = torch.where((rings > ring) & (a != b), 1.0, bonds[every, a, b])
    bonds = torch.maximum(bonds, bonds.mT)
    own, pair = torch.randn(4, generator=g), torch.randn(4, 4, generator=g)
    y = (kinds @ own).sum(1) + 0.5 * ((kinds @ pair) * (bonds @ kinds)).sum((1, 2))
    y = y + 0.7 * (bonds.sum(2) >= 3).sum(1) + 0.5 * (bonds.sum((1, 2)) / 2 - many)
    y = y + 0.5 * torch.randn(n, generator=g)
    return split(torch.cat([kinds, bonds], 2), (y - y.mean())[:, None] / y.std())


class Passing(nn.Module):
    """A perceptron of each atom's sum with those it is bonded to, over how many there are about."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, b), nn.ReLU())
        for layer in self.body[::2]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, x: Tensor, bonds: Tensor) -> Tensor:
        return self.body((x + bonds @ x) / 3)


class GIN(nn.Module):
    """A graph isomorphism network (Xu et al. 2019): three rounds of messages, and a perceptron of the sum."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.rounds = nn.ModuleList([Passing(4, width), Passing(width, width), Passing(width, width)])
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, bonds = x[:, :, :4], (x[:, :, 4:] > 0).float()
        there = x.sum(2, keepdim=True) > 0
        for each in self.rounds:
            x = each(x, bonds)
        return self.head((x * there).sum(1) / 10)


# -- densities ---------------------------------------------------------------------------------------------


@cache
def clouds() -> Data:
    """Six standardised numbers of a density with two bent clusters and numbers that hang together; no targets."""
    g, n = torch.Generator().manual_seed(24), 4000
    side = torch.randint(0, 2, (n,), generator=g)
    turn = torch.pi * (torch.rand(n, generator=g) + side)
    noise = torch.randn(n, 6, generator=g)
    x = torch.stack([
        turn.cos() + side - 0.5 + 0.1 * noise[:, 0],
        turn.sin() + 0.5 * side - 0.25 + 0.1 * noise[:, 1],
        noise[:, 2],
        noise[:, 2] ** 2 + 0.3 * noise[:, 3],
        (0.8 * noise[:, 4]).exp(),
        noise[:, 5] * (0.2 + turn.sin().abs()),
    ], 1)  # fmt: skip
    return split((x - x.mean(0)) / x.std(0), torch.zeros(n, 1))


class Coupling(nn.Module):
    """Scales and shifts half of the numbers by what the other half says, and puts them first.

    Gets and gives, beside the numbers, the logarithm of the determinant so far.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 6)
        )
        with torch.no_grad():
            for p in self.net[-1].parameters():
                p.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        kept, moved, volume = x.tensor_split([3, 6], 1)
        scale, shift = self.net(kept).chunk(2, 1)
        scale = 2 * torch.tanh(scale / 2)
        return torch.cat([moved * scale.exp() + shift, kept, volume + scale.sum(1, keepdim=True)], 1)


class Flow(nn.Module):
    """Six couplings (RealNVP: Dinh et al. 2017), which begin with the numbers and a volume of one."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.couplings = nn.Sequential(*(Coupling(width) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.couplings(nn.functional.pad(x, (0, 1)))


class Surprise(Own):
    """Minus the logarithm of the density, of a flow to standard normal numbers."""

    def forward(self, found: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (found[:, :-1] ** 2 + math.log(2 * math.pi)).sum(1) - found[:, -1]


# -- values of actions -------------------------------------------------------------------------------------

DISCOUNT = 0.8


@cache
def walks() -> Data:
    """Steps on 8 x 8 squares with a goal (1) and three pits (-1): where from, what was done, and what came of it.

    Squares are described by their place and how far away goal and pits are. Targets are the action, the reward,
    whether that was the end, and where to; for validation, what each action is worth under the best policy, from value
    iteration.
    """
    g = torch.Generator().manual_seed(25)
    place = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    special = torch.randperm(64, generator=g)[:4]
    reward = torch.full((64,), -0.02)
    reward[special] = torch.tensor([1.0] + [-1.0] * 3)
    end = torch.zeros(64, dtype=torch.bool)
    end[special] = True
    moves = torch.tensor([[0, 1], [1, 0], [0, -1], [-1, 0]])
    goes = (place[:, None] + moves).clamp(0, 7) @ torch.tensor([8, 1])
    # One step in five goes anywhere.
    chance = 0.8 * one_hot(goes, 64).float() + 0.2 * one_hot(goes, 64).float().mean(1, keepdim=True)
    worth = torch.zeros(64, 4)
    for _ in range(200):
        worth = chance @ (reward + DISCOUNT * ~end * worth.amax(1))
    seen = torch.cat([(place - 3.5) / 2.3, (-torch.cdist(place.float(), place[special].float()) / 1.5).exp()], 1)
    begin = torch.arange(64)[~end]
    start = begin[torch.randint(len(begin), (4000,), generator=g)]
    action = torch.randint(4, (4000,), generator=g)
    to = torch.multinomial(chance[start, action], 1, generator=g)[:, 0]
    y = torch.cat([torch.stack([action, reward[to], end[to]], 1), seen[to]], 1)
    return Data(seen[start], y, seen[begin], torch.cat([worth[begin], torch.ones(len(begin), 4)], 1))


class Temporal(Own):
    """Huber's loss of the actions' values against targets, of those actions that the second half of them marks."""

    def forward(self, found: Tensor, y: Tensor) -> Tensor:
        wanted, marks = y.chunk(2, 1)
        return (marks * smooth_l1_loss(found, wanted, reduction="none")).sum(1) / marks.sum(1)


LATE: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
"""Parameters that follow those of a model."""


def bootstrapped(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards with what the best next action is worth, by parameters that follow the model's (Mnih et al. 2015)."""
    with torch.no_grad():
        late = LATE.setdefault(model, {name: p.clone() for name, p in model.named_parameters()})
        for name, p in model.named_parameters():
            late[name].lerp_(p, 0.1)
        action, reward, end, to = y[:, 0].long(), y[:, 1], y[:, 2], y[:, 3:]
        target = reward + DISCOUNT * (1 - end) * functional_call(model, late, (to,)).amax(1)
    marks = one_hot(action, 4)
    return x, torch.cat([marks * target[:, None], marks], 1)


# -- a picture as a function -------------------------------------------------------------------------------


@cache
def painting() -> Data:
    """Places of 48 x 48 pixels of a photograph, from -1 to 1, and how bright they are; standardised."""
    image = torch.tensor(load_sample_image("flower.jpg"), dtype=torch.float32).mean(-1)
    y = avg_pool2d(image[None, 20:404, 120:504], 8).flatten()
    along = torch.linspace(-1, 1, 48)
    return split(torch.cartesian_prod(along, along), (y - y.mean())[:, None] / y.std())


class Sine(nn.Module):
    """Sine of a multiple."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.factor * x)


def siren(width: int = 48, factor: float = 10.0) -> nn.Sequential:
    """Sines between dense layers, started as Sitzmann et al. (2020) do."""
    model = nn.Sequential(
        nn.Linear(2, width), Sine(factor), nn.Linear(width, width), Sine(factor), nn.Linear(width, width),
        Sine(factor), nn.Linear(width, 1),
    )  # fmt: skip
    with torch.no_grad():
        for k in (0, 2, 4, 6):
            layer = model[k]
            assert isinstance(layer, nn.Linear)
            limit = (6 / layer.in_features) ** 0.5 / factor if k else 1 / layer.in_features
            layer.weight.uniform_(-limit, limit)
    return model


# -- two tasks at once -------------------------------------------------------------------------------------


@cache
def things() -> Data:
    """16 x 16 pixels with a disc, a square or a cross in noise, standardised; which it is, where, and how large."""
    g, n = torch.Generator().manual_seed(26), 2400
    kind = torch.randint(0, 3, (n,), generator=g)
    centre, size = 5 + 5 * torch.rand(n, 2, generator=g), 2.5 + 2 * torch.rand(n, generator=g)
    grid = torch.arange(16.0)
    rows, columns = ((grid - centre[:, k, None]).abs() for k in (0, 1))
    rows, columns, edge = rows[:, :, None], columns[:, None], size[:, None, None]
    disc = rows**2 + columns**2 < edge**2
    square = torch.maximum(rows, columns) < 0.9 * edge
    cross = square & (torch.minimum(rows, columns) < 0.3 * edge)
    drawn = torch.stack([disc, square, cross], 1)[torch.arange(n), kind].float()
    x = drawn * (0.5 + torch.rand(n, 1, 1, generator=g)) + 0.2 * torch.randn(n, 16, 16, generator=g)
    box = torch.cat([(centre - 7.5) / 1.5, (size[:, None] - 3.5) / 0.6], 1)
    return split((x - x.mean())[:, None] / x.std(), torch.cat([kind[:, None], box], 1))


class Detector(nn.Module):
    """Convolutions with strides, a dense layer, and two heads: for what there is, and for where."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 48),
            nn.ReLU(),
        )  # fmt: skip
        for m in self.trunk:
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
        self.what, self.where = nn.Linear(48, 3), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return torch.cat([self.what(x), self.where(x)], 1)


class WhatAndWhere(Own):
    """Cross-entropy of the class, and the smooth L1 loss of the box (Girshick 2015)."""

    def forward(self, found: Tensor, y: Tensor) -> Tensor:
        what = cross_entropy(found[:, :3], y[:, 0].long(), reduction="none")
        return what + smooth_l1_loss(found[:, 3:], y[:, 1:], reduction="none").sum(1)


# -- from one sequence to another --------------------------------------------------------------------------

LETTERS = " 0123456789-/.,abcdefghijlmnoprstuvy^"


@cache
def dates() -> Data:
    """Dates in five forms, and with them the standard one but for its last sign, as ids; and the standard one."""
    g, n = torch.Generator().manual_seed(27), 3200
    names = "january february march april may june july august september october november december".split()
    years, months, days = (torch.randint(a, b, (n,), generator=g) for a, b in ((1950, 2050), (1, 13), (1, 29)))
    lines = []
    for form, year, month, day in zip(torch.randint(5, (n,), generator=g), years, months, days, strict=True):
        year, month, day, name = int(year), int(month), int(day), names[int(month) - 1]
        said = (
            f"{day} {name} {year}", f"{name} {day}, {year}", f"{day}.{month}.{year}", f"{day} {name[:3]} {year}",
            f"{month:02}/{day:02}/{year}",
        )[int(form)]  # fmt: skip
        lines.append([LETTERS.index(c) for c in f"{said:18}^{year}-{month:02}-{day:02}"])
    ids = torch.tensor(lines)
    return split(ids[:, :-1], ids[:, 19:], 0.1)


class Translator(nn.Module):
    """Encoder and decoder (Vaswani et al. 2017), that read both sequences one after the other."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(len(LETTERS), width), nn.Parameter(0.5 * torch.randn(28, width))
        self.both = nn.Transformer(width, 4, 1, 1, 2 * width, dropout=0.05, batch_first=True)
        self.head = nn.Linear(width, len(LETTERS))

    def forward(self, x: Tensor) -> Tensor:
        source, target = (self.token(x) + self.position).tensor_split([18], 1)
        mask = nn.Transformer.generate_square_subsequent_mask(10)
        return self.head(self.both(source, target, tgt_mask=mask, tgt_is_causal=True)).mT


# -- experts -----------------------------------------------------------------------------------------------


@cache
def regimes() -> Data:
    """Twelve numbers, and a function of them that is another one in each of four regions; standardised."""
    g, n = torch.Generator().manual_seed(28), 3200
    x = torch.randn(n, 12, generator=g)
    region = 2 * (x[:, 0] + 0.5 * x[:, 1] > 0) + (x[:, 2] - 0.5 * x[:, 3] > 0)
    slopes = torch.randn(4, 12, generator=g) / 2
    y = (slopes[region] * x).sum(1) + torch.sin(2 * x[torch.arange(n), 4 + region])
    y = y + torch.randn(4, generator=g)[region] + 0.2 * torch.randn(n, generator=g)
    return split(x, (y - y.mean())[:, None] / y.std())


class Mixture(nn.Module):
    """The two of six perceptrons that a gate likes best, by its weights; with the gate's weights of all beside."""

    def __init__(self, width: int, many: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, many)
        self.each = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(many)
        )

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(1)
        best = shares.topk(2, 1).indices
        taken = shares * torch.zeros_like(shares).scatter(1, best, 1.0)
        taken = taken / taken.sum(1, keepdim=True)
        said = torch.stack([each(x) for each in self.each], 2)
        return torch.cat([x + (said * taken[:, None]).sum(2), shares], 1)


class Experts(nn.Module):
    """A dense layer, a mixture of experts (Shazeer et al. 2017), and a dense layer; and the gate's weights."""

    def __init__(self, width: int = 32, many: int = 6) -> None:
        super().__init__()
        self.into, self.mixture = nn.Linear(12, width), Mixture(width, many)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, shares = self.mixture(torch.relu(self.into(x))).tensor_split([32], 1)
        return torch.cat([self.head(self.norm(x)), shares], 1)


class Balanced(Own):
    """Squared error, and a hundredth of how uneven the experts' load is (Fedus et al. 2022)."""

    def forward(self, found: Tensor, y: Tensor) -> Tensor:
        guess, shares = found.tensor_split([1], 1)
        load = one_hot(shares.topk(2, 1).indices, shares.shape[1]).float().mean((0, 1))
        return (guess - y).square().sum(1) + 0.01 * shares.shape[1] * (shares * load).sum(1)


# -- a factor on the learning rate, by the step ------------------------------------------------------------


def inverse_root(step: int, warm: int = 40) -> float:
    """Up in forty steps, and down as one over the root of the step (Vaswani et al. 2017)."""
    return min((step + 1) / warm, (warm / (step + 1)) ** 0.5)
