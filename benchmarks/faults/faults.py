"""The faults: what each does to a healthy run, at full and at half severity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.faults.data import Data
from benchmarks.faults.later import Sine
from benchmarks.faults.problems import BATCH, Problem

ONSET = 30
"""The step at which faults begin that begin in the middle of a run."""


@dataclass
class Setup:
    """A run before it starts; faults change it."""

    problem: Problem
    model: nn.Module
    data: Data
    rate: float
    seed: int
    batch: int = BATCH
    rates: dict[str, float] = field(default_factory=dict)
    """Factors on the learning rate, by the beginning of parameters' names; 0 leaves the parameter out."""
    before: list[Callable[[int], None]] = field(default_factory=list)
    """Called with the step's number before each step."""
    guilty: set[int] = field(default_factory=set)
    """Samples with corrupted labels."""
    sharpness: bool = False
    """Whether the largest eigenvalue is looked at, which costs products with the Hessian."""

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 12345)


@dataclass
class Fault:
    """A fault.

    Attributes:
        verdict: what it should be called.
        what: it is, in words for a table.
        full: does it to a setup.
        half: the same, half as severe.
        fits: whether a problem can have it.
        onset: the step at which it begins.
        optimizers: with which it can happen; with any, unless some are named.
    """

    verdict: str
    what: str
    full: Callable[[Setup], Any]
    half: Callable[[Setup], Any]
    fits: Callable[[Problem], bool] = lambda problem: True
    onset: int = 0
    optimizers: tuple[str, ...] = ()


def learning_rate(factor: float) -> Callable[[Setup], None]:
    def change(s: Setup) -> None:
        s.rate *= factor

    return change


def gradient_factor(factor: float) -> Callable[[Setup], None]:
    """From ONSET on, gradients are multiplied on their way back out of each block."""

    def change(s: Setup) -> None:
        now = [1.0]
        s.before.append(lambda step: now.__setitem__(0, factor if step >= ONSET else 1.0))

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad and now[0] != 1.0:
                output.register_hook(lambda g: g * now[0])

        for path in s.problem.blocks:
            s.model.get_submodule(path).register_forward_hook(hook)

    return change


def sigmoids(share: float) -> Callable[[Setup], None]:
    """Two sigmoids, with a halving between them, in place of (the last of) the activations."""

    def change(s: Setup) -> None:
        kinds = nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.GELU, nn.SiLU, Sine
        paths = [k for k, m in s.model.named_modules() if isinstance(m, kinds)]
        assert paths
        for path in paths[len(paths) - round(share * len(paths)) :]:
            parent, _, name = path.rpartition(".")
            setattr(s.model.get_submodule(parent), name, nn.Sequential(nn.Sigmoid(), Squash(), nn.Sigmoid()))

    return change


class Squash(nn.Module):
    """Half of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def shut(share: float) -> Callable[[Setup], None]:
    """A share of the units before a ReLU starts far below zero."""

    def change(s: Setup) -> None:
        layer = s.model.get_submodule(s.problem.relu or "")
        bias = layer.bias
        assert isinstance(bias, Tensor)
        with torch.no_grad():
            bias[: round(share * len(bias))] -= 100.0

    return change


def scaled_inputs(factor: float) -> Callable[[Setup], None]:
    def change(s: Setup) -> None:
        s.data = Data(s.data.x * factor, s.data.y, s.data.valid_x * factor, s.data.valid_y)

    return change


def matrices(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.dim() > 1]


def scaled_weights(factor: float) -> Callable[[Setup], None]:
    def change(s: Setup) -> None:
        with torch.no_grad():
            for w in matrices(s.model):
                w *= factor

    return change


def alike(share: float) -> Callable[[Setup], None]:
    """All entries of (the first of) the matrices are the same number."""

    def change(s: Setup) -> None:
        found = matrices(s.model)
        with torch.no_grad():
            for w in found[: max(1, round(share * len(found)))]:
                w.fill_(float(w.square().mean().sqrt()))

    return change


def wrong_labels(share: float) -> Callable[[Setup], None]:
    """A share of the training targets is that of another sample, or the other one of two."""

    def change(s: Setup) -> None:
        g, y = s.generator(), s.data.y.clone()
        chosen = torch.randperm(len(y), generator=g)[: round(share * len(y))]
        if y[0].numel() == 1 and y.is_floating_point() and y.unique().tolist() == [0.0, 1.0]:
            y[chosen] = 1 - y[chosen]
        elif y.is_floating_point() or y.dim() > 1:
            y[chosen] = y[chosen].roll(1, 0)
        else:
            classes = int(y.max()) + 1
            y[chosen] = (y[chosen] + torch.randint(1, classes, chosen.shape, generator=g)) % classes
        s.guilty = {int(k) for k in chosen if (y[k] != s.data.y[k]).any()}
        s.data = Data(s.data.x, y, s.data.valid_x, s.data.valid_y)

    return change


def batch_size(n: int) -> Callable[[Setup], None]:
    def change(s: Setup) -> None:
        s.batch = min(n, len(s.data.x))

    return change


def slow_layer(factor: float) -> Callable[[Setup], None]:
    def change(s: Setup) -> None:
        s.rates[s.problem.middle + "."] = factor

    return change


def runaway(factor: float) -> Callable[[Setup], None]:
    """From ONSET on, the last layer's weights are multiplied before each step."""

    def change(s: Setup) -> None:
        weight = matrices(s.model)[-1]

        def grow(step: int) -> None:
            if step >= ONSET:
                with torch.no_grad():
                    weight.mul_(factor)

        s.before.append(grow)

    return change


def few_samples(n: int) -> Callable[[Setup], None]:
    def change(s: Setup) -> None:
        s.data = Data(s.data.x[:n], s.data.y[:n], s.data.valid_x, s.data.valid_y)
        s.batch = min(s.batch, n // 2)

    return change


def left_out(what: str) -> Callable[[Setup], None]:
    def change(s: Setup) -> None:
        s.rates[f"{s.problem.middle}.{what}"] = 0.0

    return change


def frozen(what: str) -> Callable[[Setup], None]:
    def change(s: Setup) -> None:
        for name, p in s.model.named_parameters():
            if name.startswith(f"{s.problem.middle}.{what}"):
                p.requires_grad_(False)

    return change


def cut_off(share: float) -> Callable[[Setup], None]:
    """The output of a block is detached: of all blocks the last, or the first."""

    def change(s: Setup) -> None:
        path = s.problem.blocks[-1 if share == 1 else 0]
        s.model.get_submodule(path).register_forward_hook(lambda module, args, output: output.detach())

    return change


def constant_inputs(rest: float) -> Callable[[Setup], None]:
    """Every input is the mean of all, but for a share of how it differs from it; ids are the first sample's."""

    def change(s: Setup) -> None:
        if s.problem.ids:
            g = s.generator()
            x, valid_x = (
                torch.where(torch.rand(x.shape, generator=g) < rest, x, s.data.x[0]) for x in (s.data.x, s.data.valid_x)
            )
            s.data = Data(x, s.data.y, valid_x, s.data.valid_y)
            return
        mean = s.data.x.mean(0)
        s.data = Data(mean + rest * (s.data.x - mean), s.data.y, mean + rest * (s.data.valid_x - mean), s.data.valid_y)

    return change


def whole_batch(factor: float) -> Callable[[Setup], None]:
    """Gradient descent on 256 samples at once; with the largest eigenvalue."""

    def change(s: Setup) -> None:
        s.data = Data(s.data.x[:256], s.data.y[:256], s.data.valid_x, s.data.valid_y)
        s.batch, s.sharpness = 256, True
        s.rate *= factor

    return change


FAULTS = {
    "rate too high": Fault(
        "learning rate too high", "learning rate x 100 (half: x 10)", learning_rate(100), learning_rate(10)
    ),
    "rate too low": Fault(
        "learning rate too low", "learning rate / 1000 (half: / 30)", learning_rate(1e-3), learning_rate(1 / 30)
    ),
    "exploding": Fault(
        "exploding gradients", "gradients x 10 at each block from step 30 on (half: x 3)",
        gradient_factor(10), gradient_factor(3), onset=ONSET,
    ),
    "vanishing": Fault(
        "vanishing gradients", "gradients x 0.03 at each block from step 30 on (half: x 0.17)",
        gradient_factor(0.03), gradient_factor(0.17), onset=ONSET,
    ),
    "sigmoids": Fault(
        "vanishing gradients", "two sigmoids in place of each activation (half: of the last half of them)",
        sigmoids(1), sigmoids(0.5), lambda p: p.plain,
    ),
    "dead ReLUs": Fault(
        "dead ReLUs", "all units before one ReLU start shut (half: half of them)", shut(1), shut(0.5),
        lambda p: p.relu is not None,
    ),
    "inputs": Fault(
        "bad input scaling", "inputs x 255 (half: x 16)", scaled_inputs(255), scaled_inputs(16),
        lambda p: not p.ids,
    ),
    "large weights": Fault(
        "bad initialisation", "matrices start x 10 (half: x 3.2)", scaled_weights(10), scaled_weights(10**0.5)
    ),
    "small weights": Fault(
        "bad initialisation", "matrices start x 0.01 (half: x 0.1)", scaled_weights(0.01), scaled_weights(0.1)
    ),
    "equal weights": Fault(
        "bad initialisation", "entries of a matrix start equal, in all (half: the first half) of them",
        alike(1), alike(0.5),
    ),
    "wrong labels": Fault(
        "label noise", "20 % of the targets are wrong (half: 10 %)", wrong_labels(0.2), wrong_labels(0.1),
        lambda p: p.given,
    ),
    "small batch": Fault("batch too small", "batch of 2 (half: 8)", batch_size(2), batch_size(8)),
    "large batch": Fault("batch wastefully large", "batch of 1024 (half: 256)", batch_size(1024), batch_size(256)),
    "slow layer": Fault(
        "layer does not learn", "learning rate of one layer / 10000 (half: / 100)", slow_layer(1e-4), slow_layer(1e-2)
    ),
    "runaway": Fault(
        "NaN about to happen", "last weights x 1.5 per step from step 30 on (half: x 1.15)",
        runaway(1.5), runaway(1.15), onset=ONSET,
    ),
    "few samples": Fault(
        "overfitting", "40 training samples (half: 120)", few_samples(40), few_samples(120)
    ),
    "left out": Fault(
        "frozen by mistake", "one layer (half: its weight alone) not given to the optimizer",
        left_out(""), left_out("weight"),
    ),
    "frozen": Fault(
        "frozen by mistake", "one layer (half: its weight alone) does not require grad", frozen(""), frozen("weight")
    ),
    "detached": Fault(
        "frozen by mistake", "output of the last block (half: the first) detached", cut_off(1), cut_off(0.5)
    ),
    "same inputs": Fault(
        "loss does not depend on the input", "all inputs the same (half: differing by 1 %)",
        constant_inputs(0), constant_inputs(0.01), lambda p: p.given,
    ),
    "whole batch": Fault(
        "edge of stability", "gradient descent on all of 256 samples, learning rate x 2 (half: x 1)",
        whole_batch(2), whole_batch(1), lambda p: p.small, optimizers=("sgd",),
    ),
}  # fmt: skip
