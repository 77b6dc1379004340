"""The update rule of the BackPACK paper."""

from __future__ import annotations

from typing import Any

from packext.optim._base import Optimizer
from packext.optim._parts import L2, Descend
from packext.optim._precondition import Diagonal, Kronecker


class Preconditioned(Optimizer):
    """Gradient descent, divided by a damped curvature: the update rule of the BackPACK paper.

        θ <- θ - lr (C + λ I)⁻¹ (g + weight_decay θ)

    block by block, with λ = damping + weight_decay and C the diagonal of the GGN, exact or from drawn targets, or the
    Kronecker factors KFAC, KFLR or KFRA. Of two factors A and B

        (C + λ I)⁻¹ = (B + sqrt(λ) / π I)⁻¹ ⊗ (A + π sqrt(λ) I)⁻¹
        π² = (tr A / dim A) / (tr B / dim B)

    and of a bias `(B + λ I)⁻¹`. C is the mean over all batches so far, and new with each step; Kronecker factors are
    inverted after the first three steps, and then every 20. There is no momentum. Factors of convolutions are those of
    "expand" (see `px.KFAC`), where the paper's differ by a scale.

    On small problems the paper and our own benchmark find no more progress than with tuned momentum or Adam; for a
    K-FAC to train with see `px.optim.KFAC`.

    - Cost: at each step `DiagGGNExact`, `DiagGGNMC`, `KFAC`, `KFLR` or `KFRA` in the pass of the gradient; holds the
      diagonal, or factors and inverses
    - Source: Dangel, Kunstner & Hennig 2020 (arXiv:1912.10985), section 4
    - Refused: with Kronecker factors, a parameter that has none, by the backward pass and by name; a factor that is
      singular with its damping; with "kfra", whose averages are of one pass, several passes for a step, several
      processes, and a backward pass with numbers that are not finite, as an error there
    """

    def __init__(
        self,
        params: Any,
        curvature: str = "kfac",
        lr: float = 0.1,
        damping: float = 1e-2,
        weight_decay: float = 0.0,
        decay: float | None = None,
        mc_samples: int = 1,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        """Choose.

        Args:
            params: as for any optimizer of torch.
            curvature: "diag_ggn_exact", "diag_ggn_mc", "kfac", "kflr" or "kfra".
            lr: learning rate.
            damping: λ.
            weight_decay: η, added to the damping and, times the parameter, to the gradient.
            decay: of an exponential average of the curvature, in place of the mean over all batches.
            mc_samples: draws for each sample, of "diag_ggn_mc" and "kfac".
            seed: of these draws.
            process_group: over which gradients are averaged; that of all processes by default.
        """
        if isinstance(curvature, str) and curvature.startswith("diag"):
            part: Any = Diagonal(curvature, damping, decay, mc_samples)
        else:
            options = {"mc_samples": mc_samples} if curvature == "kfac" else {}
            part = Kronecker(curvature, damping, decay, inverses_every=20, **options)
        super().__init__(params, [L2(weight_decay), part, Descend(lr)], seed, process_group)
