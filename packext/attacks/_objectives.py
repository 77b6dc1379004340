"""What a search of inputs lowers, and of what."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import packext as px


def clipped(gradient: Sequence[Tensor], norm: float) -> list[Tensor]:
    """A gradient of one sample, clipped to a norm."""
    square = torch.stack([g.square().sum() for g in gradient]).sum()
    factor = norm / square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
    return [factor.clamp_max(1.0) * g for g in gradient]


def squared_distance(found: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Squared distance of two gradients, over the squared norm of the second."""
    pairs = _in_float64(found, target)
    scale = sum(t.square().sum() for _, t in pairs)
    return sum((f - t).square().sum() for f, t in pairs) / scale  # type: ignore[return-value]


def cosine_distance(found: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """One minus the cosine of two gradients: blind to a factor, such as clipping puts on."""
    pairs = _in_float64(found, target)
    dot = sum((f * t).sum() for f, t in pairs)
    one, other = (sum(t.square().sum() for t in side) ** 0.5 for side in zip(*pairs, strict=True))
    return 1 - dot / one.clamp_min(1e-300) / other  # type: ignore[union-attr]


def _in_float64(found: Sequence[Tensor], target: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs whose squares are in range: those of 1e-20, as of a model that is sure, are not in float32."""
    return [(f.double(), t.double()) for f, t in zip(found, target, strict=True)]


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours in the last two axes."""
    if x.dim() < 4:
        raise px.PackextError(f"Total variation is of images [N, C, H, W], not of shape {list(x.shape)}: pass tv=0.")
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()
