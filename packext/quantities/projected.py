"""Random projections of individual gradients."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from packext._factored import Factored, two_sided
from packext._quantity import Ask, PerSample, Quantity

_WRAPPERS = re.compile(r"^(module\.)+|\b_checkpoint_wrapped_module\.")


class ProjectedGrad(PerSample, Quantity):
    """Individual gradients under a seeded random projection, in `grad_projected`.

    A gradient seen as a matrix `[p_0, rest]` becomes `L grad Rᵀ` `[N, r, q]` with L `[r, p_0]` and R `[q, rest]`; one
    with a single axis becomes `L grad` `[N, r]`. Entries are Gaussian with variance 1/r and 1/q, so that inner products
    are preserved in expectation. Linear layers, convolutions and lookups are projected from their factors, without
    the gradient being formed (LoGra, Choe et al. 2024, arXiv:2405.13954). In `results`, all parameters side by
    side `[N, sum]`, in the order of the model, with zeros for those that the pass did not reach.
    """

    savefield = "grad_projected"
    placed = True

    def __init__(self, dim: int | tuple[int, int] = 16, seed: int = 0) -> None:
        """Choose r and q (one number: both), and the seed; equal seeds and names give equal projections.

        What wrappers put into names (`DistributedDataParallel`, `checkpoint_wrapper`) does not count, so that features
        of a wrapped model go with those of the model.

        Raises:
            ValueError: if `dim` is not one or two positive ints, or `seed` is none.
        """
        self.dim = tuple(dim) if isinstance(dim, Sequence) else (dim, dim)
        if len(self.dim) != 2 or not all(isinstance(d, int) and d > 0 for d in self.dim):
            raise ValueError(f"dim must be one or two positive ints, got {dim!r}.")
        if not isinstance(seed, int):
            raise ValueError(f"seed must be an int, got {seed!r}.")
        self.seed = seed

    def matrices(self, name: str, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """L and R (None for tensors with fewer than two axes) of a parameter, in float64 on the CPU."""
        name = _WRAPPERS.sub("", name)
        generator = torch.Generator().manual_seed((self.seed * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**63)
        r, q = self.dim
        if len(shape) < 2:
            return torch.randn(r, shape.numel(), generator=generator, dtype=torch.float64) / r**0.5, None
        left = torch.randn(r, shape[0], generator=generator, dtype=torch.float64) / r**0.5
        right = torch.randn(q, shape[1:].numel(), generator=generator, dtype=torch.float64) / q**0.5
        return left, right

    def result(self, ask: Ask) -> Tensor:
        form: Factored = ask.statistics.form
        left, right = self.matrices(ask.name, form.shape)
        left = left.to(form.device, form.acc)
        right = None if right is None else right.to(form.device, form.acc)
        if "rows" in ask.statistics.known:
            out = two_sided(ask.statistics.known["rows"], left, right)
        else:
            out = form.project(left, right)
        if out is None:
            out = torch.cat([two_sided(form.rows(lo, hi), left, right) for lo, hi in form.tiles()])
        return out * ask.factor

    def nothing(self, parameter: Tensor, n: int) -> Tensor:
        shape = (n, *self.dim[: min(max(parameter.dim(), 1), 2)])
        return torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)  # no DTensor, of one that is sharded

    def whole(self, values: dict[str, Any]) -> Tensor:
        return torch.cat([v.flatten(1) for v in values.values()], 1)
