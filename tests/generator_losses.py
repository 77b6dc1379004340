"""What random models return, losses of that, and targets for these."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.generator_draw import Draw, State


@dataclass
class Record:
    """What some models return."""

    best: Tensor
    others: list[Any]


def flat(outputs: Any) -> list[Tensor]:
    """The tensors of an output that the loss reads."""
    if isinstance(outputs, Record):
        return [outputs.best, outputs.others[1]]
    if isinstance(outputs, dict):
        return [outputs["a"], outputs["b"][0]]
    if isinstance(outputs, tuple):
        return [outputs[0]]
    return [outputs] if isinstance(outputs, Tensor) else outputs


def summed(loss: nn.Module) -> nn.Module:
    """The same loss with another reduction."""
    each = copy.copy(loss)
    each.reduction = "sum"
    return each


class Whole(nn.Module):
    """A loss of all outputs: of one sample N times its share in the loss of the batch, of the batch their mean.

    Attributes:
        reduction: as of the loss that is taken of each output: "mean" or "sum", which gives the share and the sum.
    """

    def __init__(self, loss: nn.Module, shares: Sequence[float], n: int, axis: int) -> None:
        """Take the loss, by how much it divides its sum for each output, and the number and axis of the samples."""
        super().__init__()
        self.each, self.shares, self.n, self.axis = summed(loss), list(shares), n, axis
        self.reduction = "sum" if loss.reduction == "sum" else "mean"

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        parts = [self.each(y, t) / k for y, t, k in zip(flat(outputs), targets, self.shares, strict=True)]
        total = sum(parts[1:], parts[0])
        return total if self.reduction == "sum" else total * self.n / flat(outputs)[0].shape[self.axis]


#: Losses of which a target is a class for each position.
CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)


def any_loss(d: Draw, s: State, alone: bool) -> nn.Module:
    """A loss of an output of this kind.

    Args:
        d: the source of choices.
        s: what kind the output is.
        alone: whether there is no other output, of another size.
    """
    how = d.choice(["mean", "sum"])
    usual = [nn.MSELoss, nn.SmoothL1Loss]
    if d.chance(0.5):
        return d.choice(usual)(reduction=how)
    options = [
        lambda: nn.L1Loss(reduction=how),
        lambda: nn.HuberLoss(reduction=how, delta=0.5),
        lambda: nn.SmoothL1Loss(reduction=how, beta=2.0),
        lambda: nn.BCEWithLogitsLoss(reduction=how),
        lambda: nn.PoissonNLLLoss(reduction=how),
        lambda: nn.SoftMarginLoss(reduction=how),
        lambda: nn.HingeEmbeddingLoss(reduction=how, margin=0.5),
        lambda: nn.KLDivLoss(reduction=d.choice(["mean", "sum", "batchmean"]), log_target=d.chance(0.5)),
    ]
    if s.kind in ("vec", "seq"):  # classes stand along axis 1
        weight = torch.rand(s.c) + 0.5 if alone and s.kind == "vec" and d.chance(0.4) else None
        ignored = d.choice([-100, 0])
        options += [
            lambda: nn.CrossEntropyLoss(weight, reduction=how, ignore_index=ignored),
            lambda: nn.CrossEntropyLoss(weight, reduction=how, label_smoothing=0.2),
            lambda: Soft(weight, reduction=how, label_smoothing=d.choice([0.0, 0.1])),
            lambda: nn.NLLLoss(weight, reduction=how, ignore_index=ignored),
        ]
    if s.kind == "vec":
        options += [
            lambda: nn.MultiLabelSoftMarginLoss(weight, reduction=how),
            lambda: nn.MultiMarginLoss(p=d.choice([1, 2]), weight=weight, reduction=how),
            lambda: nn.BCEWithLogitsLoss(weight, reduction=how, pos_weight=None if weight is None else weight.flip(0)),
        ]
    return d.choice(options)()


class Soft(nn.CrossEntropyLoss):
    """With probabilities as targets."""


def targets_of(loss: nn.Module, y: Tensor) -> Tensor:
    """Targets `[N, ...]` for an output."""
    if isinstance(loss, Soft):
        return torch.rand(y.shape).softmax(1)
    if isinstance(loss, CLASSES):
        return torch.randint(y.shape[1], (y.shape[0], *y.shape[2:]))
    if isinstance(loss, (nn.BCEWithLogitsLoss, nn.PoissonNLLLoss, nn.MultiLabelSoftMarginLoss)):
        return torch.randint(2, y.shape).to(y.dtype)
    if isinstance(loss, (nn.SoftMarginLoss, nn.HingeEmbeddingLoss)):
        return torch.randint(2, y.shape).to(y.dtype) * 2 - 1
    if isinstance(loss, nn.KLDivLoss):
        return torch.rand(y.shape).log() if loss.log_target else torch.rand(y.shape)
    return torch.randn(y.shape)
