"""Spectra of small matrices between samples: rank of the gradients, condition of the tangent kernel."""

from __future__ import annotations

from typing import Any

import torch

import packext as px
from packext.diagnostics._instrument import Instrument
from packext.diagnostics._step import Absent, Step


class EffectiveRank(Instrument):
    """In how many directions the samples' own gradients point: their effective rank, between 1 and N.

    exp of the entropy of the singular values of the matrix of all g_n, as shares of their sum (Roy & Vetterli 2007),
    from the Gram matrix of the g_n. "EffectiveRank.participation" is (sum of eigenvalues)² / sum of squared
    eigenvalues.
    """

    needs = (px.BatchDotGrad(),)

    def measure(self, step: Step) -> dict[str, Any]:
        gram = step["batch_dot"].double()
        if not gram.isfinite().all():
            raise Absent("not finite: a gradient is NaN or infinite")
        eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
        if not eigenvalues.sum() > 0:
            raise Absent("all individual gradients are zero")
        # What is below rounding of the largest is none: its root would count.
        tiny = len(gram) * torch.finfo(step["batch_dot"].dtype).eps * eigenvalues[-1]
        values = torch.where(eigenvalues > tiny, eigenvalues, 0.0)
        shares = values.sqrt() / values.sqrt().sum()
        return {
            "": torch.special.entr(shares).sum().exp(),
            ".participation": values.sum() ** 2 / values.square().sum(),
        }


class NTKCondition(Instrument):
    """Condition number of the neural tangent kernel of the batch: its largest eigenvalue over its smallest.

    The kernel of all outputs of all samples `[V N, V N]` (Jacot, Gabriel & Hongler 2018) is proportional to the Gram
    matrix of the GGN's root for `MSELoss`; for other losses it is absent.
    """

    needs = (px.GGNGram(),)

    def measure(self, step: Step) -> float:
        kinds = {call.kind for p in step.passes for call, _ in p.calls}
        if kinds != {"MSELoss"}:
            raise Absent(f"the tangent kernel is read from the GGN of MSELoss, not of {', '.join(sorted(kinds))}")
        gram = step["ggn_gram"].flatten(2).flatten(0, 1)
        eigenvalues = torch.linalg.eigvalsh(gram.double())
        if not eigenvalues[0] > len(gram) * torch.finfo(gram.dtype).eps * eigenvalues[-1]:
            raise Absent("singular: the smallest eigenvalue is zero to working precision")
        return float(eigenvalues[-1] / eigenvalues[0])
