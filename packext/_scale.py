"""Which factor turns a row of the loss as written into the gradient of a sample's own loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from packext import _flight


def is_loss(module: nn.Module) -> bool:
    """Whether `module` is a loss: it has a reduction and no parameters."""
    reduction = module.__dict__.get("reduction") or getattr(type(module), "reduction", None)
    return isinstance(reduction, str) and next(module.parameters(), None) is None


class LossMark(torch.autograd.Function):
    """Sits on the output of an extended loss and tells a backward pass how that loss reduces."""

    @staticmethod
    def mark(module: nn.Module, output: Tensor) -> Tensor:
        """Put the mark on `output`."""
        return LossMark.apply(output, type(module).__name__, module.reduction)

    @staticmethod
    def forward(ctx: Any, loss: Tensor, name: str, reduction: str) -> Tensor:
        ctx.name, ctx.reduction = name, reduction
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _flight.loss_seen(ctx.name, ctx.reduction, grads[0])
        return grads[0], None, None
