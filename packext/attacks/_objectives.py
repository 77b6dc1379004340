"""What a search of inputs lowers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import packext as px


def squared_distance(found: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Squared distance of two gradients, over the squared norm of the second."""
    scale = sum(t.square().sum() for t in target)
    return sum((f - t).square().sum() for f, t in zip(found, target, strict=True)) / scale  # type: ignore[return-value]


def cosine_distance(found: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """One minus the cosine of two gradients: blind to a factor, such as clipping puts on."""
    dot = sum((f * t).sum() for f, t in zip(found, target, strict=True))
    # Each by itself: their product leaves the range of float32 for gradients of 1e-11, as of a model that is sure.
    one, other = (sum(t.square().sum() for t in side) ** 0.5 for side in (found, target))
    return 1 - dot / one.clamp_min(1e-30) / other  # type: ignore[union-attr]


def total_variation(x: Tensor) -> Tensor:
    """Mean absolute difference of neighbours in the last two axes."""
    if x.dim() < 4:
        raise px.PackextError(f"Total variation is of images [N, C, H, W], not of shape {list(x.shape)}: pass tv=0.")
    return (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()
