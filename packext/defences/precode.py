"""PRECODE: a random bottleneck before the classifier, so that a gradient is that of no input alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Precode(nn.Module):
    """A classifier with a variational bottleneck before its last layer.

    Features h `[N, D]` are encoded to mean μ and log variance of a normal distribution of `size` variables; a draw from
    it is decoded to D features again, which the last layer sees. Each sample has a draw of its own, from torch's
    generator, so that per-sample quantities are those of the sample and its draw. In `eval` mode the mean takes the
    draw's place, and gradients are not defended.

    Gradients below the bottleneck do not depend on the last layers alone: an attacker who knows of the defence matches
    those, or searches for the draw as well.

    - Formula: `head(decoder(μ + σ z))` with z standard normal; the loss of a sample, `PrecodeLoss`, is its
      cross-entropy plus `beta / 2 sum of (μ² + σ² - 1 - log σ²)`
    - Cost: two linear maps between D and the bottleneck, forward and backward
    - Source: Scheliga, Mäder & Seeland, WACV 2022
    - Refused: a last layer that is no `nn.Linear`; a size below 1

    Attributes:
        features: from inputs to `[N, D]`.
        encoder: D to 2 `size`: means, then log variances.
        decoder: `size` to D.
        head: D to classes.
    """

    def __init__(self, features: nn.Module, head: nn.Module, size: int) -> None:
        """Put the bottleneck between two parts of a classifier.

        Args:
            features: gives `[N, D]`.
            head: the last layer, of D inputs.
            size: of the bottleneck.

        Raises:
            ValueError: if the last layer is no `nn.Linear`, or the size is not positive.
        """
        super().__init__()
        if not isinstance(head, nn.Linear) or size < 1:
            raise ValueError(f"head must be an nn.Linear, and size 1 or more; got {head} and {size}.")
        d, like = head.in_features, {"dtype": head.weight.dtype, "device": head.weight.device}
        self.features, self.head = features, head
        self.encoder, self.decoder = nn.Linear(d, 2 * size, **like), nn.Linear(size, d, **like)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits, and what `PrecodeLoss` adds to the loss.

        Args:
            x: `[N, ...]`.
            noise: standard normal `[N, size]`, in place of a draw.

        Returns:
            Logits `[N, C]`, and each sample's divergence of its normal distribution from the standard one `[N]`.
        """
        mean, log_variance = self.encoder(self.features(x)).chunk(2, 1)
        z = mean
        if self.training or noise is not None:
            z = mean + (0.5 * log_variance).exp() * (torch.randn_like(mean) if noise is None else noise)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return self.head(self.decoder(z)), divergence


class PrecodeLoss(nn.Module):
    """Cross-entropy plus beta times the divergence, of what `Precode` returns.

    Attributes:
        beta: weight of the divergence.
        reduction: "mean", "sum" or "none", over samples.
    """

    def __init__(self, beta: float = 1e-3, reduction: str = "mean") -> None:
        """Choose the weight, and how samples are put together.

        Raises:
            ValueError: if beta is negative, or the reduction is another one.
        """
        super().__init__()
        if not beta >= 0 or reduction not in ("mean", "sum", "none"):
            raise ValueError(
                f'beta must not be negative and reduction be "mean", "sum" or "none", got {beta}, {reduction!r}.'
            )
        self.beta, self.reduction = beta, reduction

    def forward(self, output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        """The loss.

        Args:
            output: logits `[N, C]` and divergences `[N]`.
            y: labels `[N]`, or probabilities `[N, C]`.

        Returns:
            A scalar, or `[N]` without reduction.
        """
        logits, divergence = output
        each = F.cross_entropy(logits, y, reduction="none") + self.beta * divergence
        return each if self.reduction == "none" else each.mean() if self.reduction == "mean" else each.sum()
