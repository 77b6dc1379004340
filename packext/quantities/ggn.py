"""The generalised Gauss-Newton matrix: its diagonal, per sample or summed, and its root.

The GGN of a loss is `sum over n of J_nᵀ H_n J_n`, with J_n the Jacobian of the loss's input with respect to the
parameters and H_n the Hessian of the loss with respect to that input (Schraudolph, 2002). With columns s of a root of
H_n, `J_nᵀ s` are rows of the same factored form as individual gradients: the diagonal is their second moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from packext._errors import PackextError
from packext._factored import Dense, Factored, Outer, side_by_side
from packext._quantity import Ask, Curvature, PerSample, Sampled, Subsampled, Summed, Total
from packext._statistics import Statistics
from packext._union import Here, Part


class _Sampled(Sampled, Curvature):
    """With the Hessian estimated from targets drawn from the model's own predictions."""

    @property
    def root(self) -> tuple[str, int, torch.Generator | None]:
        return ("mc", self.mc_samples, self.generator)


class Diagonal(Summed, Curvature):
    """Sums over columns and samples of squares."""

    columns = True

    def wants(self, form: Factored) -> tuple[str, ...]:
        return ("second_moment",)

    def absorb(self, ask: Ask, held: Any) -> Tensor:
        if held is None:
            return ask.statistics.scaled("second_moment", 1.0)
        return held.add_(ask.statistics["second_moment"])


class BatchDiagonal(PerSample, Curvature):
    """Sums over columns of squares: rows of several columns at once would take more memory than the result."""

    def wants(self, form: Factored) -> tuple[str, ...]:
        return ("rows",)

    def absorb(self, ask: Ask, held: Any) -> Tensor:
        rows = ask.statistics["rows"]
        return rows.square() if held is None else held.addcmul_(rows, rows)


class DiagGGNExact(Diagonal):
    """Diagonal of the GGN `[*p]`, in `diag_ggn_exact`."""

    savefield = "diag_ggn_exact"
    parts = "split"


class DiagGGNMC(Diagonal, _Sampled):
    """Monte-Carlo estimate of the diagonal of the GGN `[*p]`, in `diag_ggn_mc`."""

    savefield = "diag_ggn_mc"


class BatchDiagGGNExact(BatchDiagonal):
    """Each sample's share of the GGN's diagonal `[N, *p]`, in `diag_ggn_exact_batch`."""

    savefield = "diag_ggn_exact_batch"
    parts = "split"


class BatchDiagGGNMC(BatchDiagonal, _Sampled):
    """Monte-Carlo estimate of each sample's share of the GGN's diagonal `[N, *p]`, in `diag_ggn_mc_batch`."""

    savefield = "diag_ggn_mc_batch"


class DiagEF(Diagonal):
    """Diagonal of the empirical Fisher `[*p]`, in `diag_ef`.

    For a mean over N samples it is 1/N times the sum of the squared gradients of the samples' own losses; N times
    `SumGradSquared`, which squares gradients that carry 1/N.

    With a loss that is a mean over T terms of each sample as well (tokens, pixels, labels), a sample's own loss is the
    mean of its T terms. Fisher matrices and the GGN count the terms one by one: for targets as the model predicts them,
    `DiagGGNExact` is then T times the mean of this one. With `reduction="sum"` both are alike.
    """

    savefield = "diag_ef"
    parts = "split"

    @property
    def root(self) -> tuple[str, int, torch.Generator | None]:
        return ("empirical", 0, None)


class GGNGram(Total, Curvature):
    """Inner products of the columns of the GGN's root `[V, N, V, N]`, in `ggn_gram`; in `results` of the whole model.

    The small side of the GGN: as a matrix `[V N, V N]` it has the GGN's eigenvalues other than zero. For a sum of
    squares, halved, of V outputs it is the neural tangent kernel.
    """

    savefield = "ggn_gram"
    parts = "sum"
    indivisible = "pairs of samples of different parts have inner products too"
    compact = False
    columns = True
    additive = False  # a parameter that one of them does not reach has none of its columns

    def absorb(self, ask: Ask, held: Any) -> list[Factored]:
        form = ask.statistics.form
        # Other forms may need the way back to the parameter, which the gradient's pass frees.
        return [*(held or []), form if isinstance(form, Outer) else Dense(form.rows(0, form.n))]

    def land(self, held: list[Factored], n: int, factor: float) -> Tensor:
        gram = Statistics(side_by_side(held))["gram"] * factor
        return gram.reshape(-1, n, len(gram) // n, n)


class _Root(Subsampled, PerSample, Curvature):
    compact = False
    axis = 1

    @property
    def columns(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.subsampling is None

    def absorb(self, ask: Ask, held: Any) -> list[Tensor]:
        held = [] if held is None else held
        rows = self.rows(ask)
        held.extend(rows.split(ask.n) if ask.columns > 1 else [rows])
        return held

    def land(self, held: Any, n: int, factor: float) -> Tensor:
        return torch.stack(held) if factor == 1.0 else torch.stack(held) * factor**0.5

    def ways(self, part: Part) -> str:
        return f"a root of {len(part.value)} columns, which outputs of one size per sample have alike"

    def unite(self, parts: Sequence[Part], over: Here) -> Part:
        counts = sorted({len(p.value) for p in parts})
        if len(counts) > 1:
            raise PackextError(
                f"{self!r} of passes whose roots have {counts} columns, as many as a sample's output has entries, has "
                "no common shape: pad the batches to one length, or ask for it pass by pass."
            )
        return super().unite(parts, over)


class SqrtGGNExact(_Root):
    """A root of the GGN `[V, N, *p]`, in `sqrt_ggn_exact`.

    With rows flattened and concatenated over parameters, `sum over v, n of s sᵀ` is the GGN. V counts the entries of
    an output of one sample, in their order; a loss without a closed form has its symmetric root.
    """

    savefield = "sqrt_ggn_exact"
    parts = "split"

    def __init__(self, subsampling: Iterable[SupportsIndex] | None = None) -> None:
        """Take indices of the samples to keep (with the scale of the whole batch); all by default."""
        self.choose(subsampling)


class SqrtGGNMC(_Root, _Sampled):
    """A random root `[M, N, *p]` of a Monte-Carlo estimate of the GGN, in `sqrt_ggn_mc`."""

    savefield = "sqrt_ggn_mc"

    def __init__(
        self,
        mc_samples: int = 1,
        subsampling: Iterable[SupportsIndex] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """As for `DiagGGNMC`, and indices of the samples to keep."""
        super().__init__(mc_samples, generator)
        self.choose(subsampling)
