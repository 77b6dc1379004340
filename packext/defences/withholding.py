"""Samples whose gradients stand out are not sent."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.attacks import Shared, share, signals


@dataclass(frozen=True)
class Withholding:
    """Leaves out the samples with the largest ridge leverage, whose gradients the others hide least.

    What it does for them is plain, they are not in what is shared; for the others it does nothing.

    Called as `packext.attacks.share` is, in its place.

    - Formula: the gradient of the N - count samples with the smallest leverage, the diagonal of `K (K + r I)^-1`, with
      K the inner products of all g_n and r the ridge times the mean of K's diagonal
    - Cost: `BatchDotGrad` in one pass of a copy of the model, an inverse `[N, N]`, and the gradient of the others
    - Source: the idea of arXiv:2510.10902, which withholds samples of high gradient uniqueness
    - Refused: no ridge; a count that leaves no sample; a model whose samples influence each other

    Attributes:
        count: samples to leave out of each batch.
        ridge: of the leverage, relative to the mean squared norm of gradients (see `packext.attacks.leverage`).
    """

    count: int
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        """Refuse a negative count, and no ridge: without one, all leverages of a batch are 1."""
        if self.count < 0 or not self.ridge > 0:
            raise ValueError(
                f"count must not be negative and ridge must be positive, got {self.count} and {self.ridge}."
            )

    def __call__(
        self, model: nn.Module, loss_fn: nn.Module, x: Any, y: Tensor, state: Mapping[str, Tensor] | None = None
    ) -> Shared:
        """What the client shares.

        Args:
            model: as the client received it, in the mode in which it is run.
            loss_fn: one of torch's losses, with `reduction` "mean" or "sum".
            x: the batch `[N, ...]`.
            y: labels `[N, ...]`.
            state: parameters and buffers in place of the model's, by name.

        Returns:
            The gradient of the N - count other samples. A model whose samples have no gradients of their own, as with
            BatchNorm in training mode, is refused by the engine.
        """
        kept = self.kept(model, loss_fn, x, y, state)
        return share(model, loss_fn, x[kept], y[kept], state)

    def kept(
        self, model: nn.Module, loss_fn: nn.Module, x: Any, y: Tensor, state: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Which samples are sent: indices `[N - count]`, ascending.

        Args:
            model: as for the call.
            loss_fn: as for the call.
            x: as for the call.
            y: as for the call.
            state: as for the call.

        Returns:
            int64.

        Raises:
            PackextError: if none would be left, or x is not one tensor.
        """
        if not isinstance(x, Tensor) or self.count >= len(y):
            what = f"count is {self.count}, of {len(y)} samples" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise px.PackextError(
                f"Withholding needs a batch as one tensor, of more samples than it leaves out: {what}."
            )
        twin = copy.deepcopy(model)
        twin.load_state_dict({**twin.state_dict(), **(state or {})})
        order = signals(twin, loss_fn, x, y, self.ridge).leverage.argsort(stable=True)
        return torch.sort(order[: len(y) - self.count]).values
