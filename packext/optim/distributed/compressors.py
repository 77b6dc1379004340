"""Ways to choose what is sent of a gradient, and what becomes of the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import GradBucket  # pyright: ignore

import packext as px
from packext.optim.distributed.compression import Compression


class TopK(Compression):
    """The largest entries are sent; the others are kept, and added to the next gradient (error feedback).

    The k entries of u with the largest magnitudes are sent, the others are the new residual. Nothing is lost: sent +
    residual = u in each entry, exactly.

    - Formula: `u = gradient + residual`, `residual = u - sent`
    - Cost: 4 bytes and a value for each entry that is sent, to all processes; holds a residual, twice during a pass
    - Source: Stich, Cordonnier & Jaggi 2018, Algorithm 1, with the learning rate applied by the optimizer, after the
      sum
    - Refused: sparse gradients; values that are not finite, in all processes; the state of another rank or world
    """

    def _add(self, kept: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
        return {"residual": grad + kept["residual"] if "residual" in kept else grad.clone()}


class GaussianK(TopK):
    """`TopK`, by a threshold in place of a sort.

    Entries above the threshold t are sent. Up to three times t is halved if it lets fewer than 2k/3 pass, and
    multiplied by 1.5 for more than 4k/3. As messages of all processes have one size, there is room for 4k/3 entries; of
    more, the largest are sent. The message has its full size even if fewer are sent. If none passes, the k largest are
    sent: entries of about one size would never pass, however large they become.

    - Formula: `|u| > t` with `t = mean(u) + |z| std(u)`, z the ratio/2 quantile of the normal distribution
    - Cost: as `TopK`, with messages of 4/3 their size
    - Source: Shi et al. 2019
    - Refused: as by `TopK`
    """

    def _capacity(self, count: int, n: int) -> int:
        return min(n, math.ceil(4 * count / 3))

    def _pick(self, values: Tensor, count: int) -> Tensor:
        u = values.float() if values.dtype.itemsize < 4 else values
        sizes = u.abs()
        z = torch.special.ndtri(torch.tensor(count / len(u) / 2, dtype=torch.float64))
        threshold = u.mean() + z.abs().item() * u.std(correction=0)
        if not threshold.isfinite():
            return super()._pick(values, count)  # which takes what is not finite
        for _ in range(3):
            passing = int((sizes > threshold).sum())
            if 3 * passing < 2 * count:
                threshold = threshold * 0.5
            elif 3 * passing > 4 * count:
                threshold = threshold * 1.5
            else:
                break
        chosen = (sizes > threshold).nonzero().flatten()
        if not len(chosen):
            return super()._pick(values, count)  # entries of one size would wait for ever
        room = self._capacity(count, len(u))
        return chosen if len(chosen) <= room else chosen[sizes[chosen].topk(room).indices]


class DGC(Compression):
    """Deep Gradient Compression: momentum before the selection, and clipping before momentum.

    The k entries of v with the largest magnitudes are sent, and u and v are set to zero there (momentum factor
    masking). Parameters of one axis are sent whole, as u, and keep their momentum. The momentum m is here, so the
    optimizer is `torch.optim.SGD` without one. Clipping is of each parameter's own gradient, to `max_norm` divided by
    the square root of the number of processes, before it is added. For the warm-up of the paper, `warmup=(0.25, 0.0625,
    0.015625, 0.004)` with an epoch's passes each.

    - Formula: `u = m u + g` and `v = v + u` (momentum correction); with Nesterov's `u = m (u + g)` and `v = v + u + g`
    - Cost: as `TopK`; holds u and v, twice during a pass
    - Source: Lin et al. 2018
    - Refused: another optimizer than SGD without momentum; what `TopK` refuses
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        optimizer: torch.optim.Optimizer,
        ratio: float = 0.001,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        max_norm: float | None = None,
        warmup: Sequence[float] = (),
        warmup_passes: int = 0,
        process_group: Any = None,
    ) -> None:
        """Say what is compressed, for which optimizer.

        Args:
            named_parameters: of the model, with the names under which `state_dict` has them.
            optimizer: the one that takes the steps, `torch.optim.SGD` without momentum.
            ratio: share of the entries that is sent, in (0, 1].
            momentum: m, in [0, 1).
            nesterov: whether it is Nesterov's.
            max_norm: largest norm of a parameter's gradient for one process alone; no clipping if None.
            warmup: ratios of the first passes, one after the other.
            warmup_passes: how many passes each of them holds.
            process_group: that of DistributedDataParallel.

        Raises:
            ValueError: for a momentum outside [0, 1), or a norm that is not positive.
        """
        if not 0 <= momentum < 1 or (max_norm is not None and not max_norm > 0):
            raise ValueError(f"need a momentum in [0, 1) and a positive max_norm, got {momentum} and {max_norm}.")
        super().__init__(
            named_parameters, ratio, warmup=warmup, warmup_passes=warmup_passes, process_group=process_group
        )
        self.optimizer, self.momentum, self.nesterov, self.max_norm = optimizer, momentum, nesterov, max_norm
        self._check()

    def _check(self) -> None:
        """Refuse an optimizer that would add a second momentum, which loading a state can do as well.

        Raises:
            PackextError: for any but SGD without momentum.
        """
        plain = isinstance(self.optimizer, torch.optim.SGD)
        if not plain or any(group["momentum"] != 0 for group in self.optimizer.param_groups):
            raise px.PackextError(
                f"DGC has the momentum before the compression, and {type(self.optimizer).__name__} has one behind it "
                "or is no SGD: use torch.optim.SGD(..., momentum=0)."
            )

    def _compress(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        self._check()
        return super()._compress(bucket)

    def _whole(self, parameter: Tensor, count: int) -> bool:
        return parameter.dim() <= 1 or super()._whole(parameter, count)

    def _add(self, kept: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
        if self.max_norm is not None:
            norm = torch.linalg.vector_norm(grad)
            grad = grad * (self.max_norm / math.sqrt(self.size) / norm).clamp(max=1)  # of zero: infinity, clamped
        u = kept["momentum"] if "momentum" in kept else torch.zeros_like(grad)
        u = (u + grad) * self.momentum if self.nesterov else u * self.momentum + grad
        v = u + grad if self.nesterov else u.clone()
        if "residual" in kept:
            v = v + kept["residual"]
        return {"residual": v, "momentum": u}
