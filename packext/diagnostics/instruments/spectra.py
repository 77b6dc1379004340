"""Spectra of small matrices between samples: rank of the gradients, condition of the tangent kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import packext as px
from packext.diagnostics._instrument import Instrument
from packext.diagnostics._step import Absent, Step


def _eigenvalues(gram: Tensor) -> Tensor:
    """Of a symmetric matrix `[K, K]`, ascending `[K]`, in float64."""
    if not gram.isfinite().all():
        raise Absent("not finite: a gradient is NaN or infinite")
    return torch.linalg.eigvalsh(gram.double())


class EffectiveRank(Instrument):
    """In how many directions the samples' own gradients point: their effective rank, between 1 and N.

    With λ the eigenvalues of the Gram matrix of the g_n, that is, sqrt(λ) the singular values of the matrix of all g_n.
    "EffectiveRank.participation" is `(sum λ)² / sum λ²`. Eigenvalues below rounding of the largest count as 0.

    - Formula: exp of the entropy of the shares `sqrt(λ_i) / sum sqrt(λ_j)`
    - Units: directions
    - Cost: `BatchDotGrad`, in the pass that runs anyway, and the eigenvalues of a matrix `[N, N]`
    - Source: Roy & Vetterli 2007
    - Absent: where all g_n are zero or one is not finite; in a step of several backward passes
    """

    needs = (px.BatchDotGrad(),)

    def measure(self, step: Step) -> dict[str, Any]:
        gram = step["batch_dot"]
        eigenvalues = _eigenvalues(gram).clamp(min=0)
        if not eigenvalues.sum() > 0:
            raise Absent("all individual gradients are zero")
        # What is below rounding of the largest is none: its root would count.
        tiny = len(gram) * torch.finfo(gram.dtype).eps * eigenvalues[-1]
        values = torch.where(eigenvalues > tiny, eigenvalues, 0.0)
        shares = values.sqrt() / values.sqrt().sum()
        return {
            "": torch.special.entr(shares).sum().exp(),
            ".participation": values.sum() ** 2 / values.square().sum(),
        }


class _Kernel(px.GGNGram):
    """Inner products of the gradients of outputs: `GGNGram` with 1 in the place of the loss's Hessian."""

    savefield = "output_gram"
    compact = True  # which decides nothing here, and would for others

    @property
    def root(self) -> tuple[str, int, None]:
        return ("entries", 0, None)

    def land(self, held: list[Any], n: int, factor: float) -> Tensor:
        return super().land(held, n, 1.0)  # the kernel does not know the loss


class NTKCondition(Instrument):
    """Condition number of the neural tangent kernel of the batch: of all V outputs of all samples, `[V N, V N]`.

    Outputs are what the loss takes, of any loss that is an extended module.

    - Formula: largest eigenvalue over the smallest, of inner products of the outputs' gradients
    - Units: none
    - Cost: a pass through the model for each output of a sample, as `GGNGram`, and the eigenvalues of a matrix
      `[V N, V N]`
    - Source: Jacot, Gabriel & Hongler 2018 for the kernel
    - Absent: where the kernel is singular or not finite; in a step of several backward passes
    """

    needs = (_Kernel(),)

    def measure(self, step: Step) -> float:
        eigenvalues = _eigenvalues(gram := step["output_gram"].flatten(2).flatten(0, 1))
        if not eigenvalues[0] > len(gram) * torch.finfo(gram.dtype).eps * eigenvalues[-1]:
            raise Absent("singular: the smallest eigenvalue is zero to working precision")
        return float(eigenvalues[-1] / eigenvalues[0])
