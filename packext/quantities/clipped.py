"""Sums of clipped individual gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import SupportsFloat

import torch
from torch import Tensor

from packext._factored import Factored, Lookup, Outer, Sum
from packext._quantity import Ask, Quantity, Summed
from packext._shards import added, is_distributed, part


class ClippedGrad(Summed, Quantity):
    """`sum over n of min(1, C / |g_n|) g_n` `[*p]`, in `clipped_grad` (Abadi et al. 2016, Algorithm 1, before noise).

    g_n is the gradient of the samples' own loss l_n (see `backpack`, scale="sample"), whatever the reduction and the
    context's scale; |g_n| is over all parameters, or with `per_layer` over those of one module. One backward
    pass: the factors of every parameter are held until the norms are known, or its individual gradients where those are
    no larger, and let go as its sum is taken. NaN where a squared norm is not finite (in float32, norms from 2e19 on).
    """

    savefield = "clipped_grad"
    deferred = True
    parts = "split"

    def __init__(self, max_norm: float, per_layer: bool = False) -> None:
        """Take C, and whether it bounds each module's part or the whole gradient.

        Raises:
            ValueError: if `max_norm` is no positive number.
        """
        if not isinstance(max_norm, SupportsFloat) or not float(max_norm) > 0:
            raise ValueError(f"max_norm must be a positive number, got {max_norm!r}.")
        self.max_norm, self.per_layer = float(max_norm), per_layer

    def check(self, sample_factor: Callable[[], float]) -> None:
        sample_factor()

    def wants(self, form: Factored) -> tuple[str, ...]:
        return ("sq_norms",) if self._lasts(form) else ("sq_norms", "rows")

    @staticmethod
    def _lasts(form: Factored) -> bool:
        """Whether the form outlives the backward pass: where its factors take less memory than its rows would."""
        parts = form.parts if isinstance(form, Sum) else [form]
        rows = form.n * form.numel * torch.finfo(form.acc).bits // 8
        factored = [part for part in parts if isinstance(part, (Outer, Lookup))]
        return len(factored) == len(parts) and sum(part.bytes_held() for part in factored) < rows

    def result(self, ask: Ask) -> None:
        ask.sample_factor()
        if not self._lasts(ask.statistics.form):
            ask.statistics.hold()
        return None

    def nothing(self, parameter: Tensor, n: int) -> Tensor:
        return torch.zeros_like(parameter)

    def weight(self, norms: Tensor) -> Tensor:
        """What samples are multiplied with; other ways of clipping override it.

        Args:
            norms: of the samples' own gradients `[N]`, over all parameters, or with `per_layer` over those of a module.

        Returns:
            `[N]`.
        """
        return (self.max_norm / norms).clamp(max=1.0)

    def finish(self, asks: dict[int, Ask]) -> dict[int, Tensor]:
        groups: dict[str, list[int]] = {}
        names = [ask.name for ask in asks.values()] if self.per_layer else []
        if len(set(names)) < len(names):
            raise ValueError(
                "ClippedGrad(per_layer=True): modules of several models have equal names. Extend an nn.ModuleDict of "
                "the models, whose names differ."
            )
        for key, ask in asks.items():
            groups.setdefault(ask.name.rpartition(".")[0] if self.per_layer else "", []).append(key)
        found = {key: ask.statistics["sq_norms"] for key, ask in asks.items()}
        split = [key for key, ask in asks.items() if is_distributed(ask.parameter)]
        split.sort(key=lambda key: asks[key].name)  # in the order in which all processes come to them
        found.update(zip(split, added([(asks[key].parameter, found[key]) for key in split]), strict=True))
        results: dict[int, Tensor] = {}
        for keys in groups.values():
            factor = asks[keys[0]].sample_factor()
            squares = [found[key] for key in keys]
            if len({len(s) for s in squares}) > 1:
                raise ValueError(
                    "ClippedGrad: parameters have seen different batches; use per_layer=True or one batch."
                )
            norms = torch.stack([s.to(squares[0].dtype) for s in squares]).sum(0).sqrt() * abs(factor)
            # A norm whose square is infinite would make nothing of its sample, and say nothing of it.
            weight = torch.where(norms.isfinite(), self.weight(norms) * factor, torch.nan)
            for key in reversed(keys):  # the last to arrive has the most beside it, and holds nothing from here on
                ask = asks.pop(key)
                shape, dtype = part(ask.parameter).shape, ask.parameter.dtype
                results[key] = ask.statistics.weighted(weight).reshape(shape).to(dtype)
        return results
