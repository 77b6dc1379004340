"""Kronecker-factored curvature: KFAC with the loss Hessian sampled, exact or empirical.

For a weight that meets a at S positions, with columns b of a root of the loss Hessian carried back to the output:

    expand   A = 1/(N S) sum over n, s of a aᵀ           B = sum over n, s and columns of b bᵀ
    reduce   A = 1/N sum over n of (mean_s a)(mean_s a)ᵀ  B = sum over n and columns of (sum_s b)(sum_s b)ᵀ

(Eschenhagen et al., 2023, "Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures",
section 3). The curvature of the weight, its rows one after the other, is B ⊗ A; that of a vector, the one factor B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from packext import linalg
from packext._errors import UnsupportedUseError
from packext._quantity import Ask, Curvature, Sampled
from packext._statistics import Statistics


class _Kronecker(Curvature):
    approx: str = "expand"

    def absorb(self, ask: Ask, held: Any) -> list[Tensor]:
        form = ask.statistics.form
        found = form.kronecker(self.approx == "reduce")
        if found is None:
            raise UnsupportedUseError(
                f"{type(self).__name__} has no Kronecker factors for {ask.name} {list(form.shape)}, which is not the "
                "weight of a linear map or convolution, nor a vector. Choose the parameters, "
                "px.backpack(..., parameters=[...]), or ask for DiagGGNExact or DiagGGNMC."
            )
        outputs, inputs, positions = found
        if held is not None:
            held[0] = held[0] + outputs  # not in place: weight and bias may share what came first
            return held
        if inputs is None:
            return [outputs]
        return [outputs, inputs() / (ask.n if self.approx == "reduce" else ask.n * positions)]

    def land(self, held: Any, n: int, factor: float) -> list[Tensor]:
        first, *rest = (t[0] if len(t) == 1 else t for t in held)
        return [first * factor, *rest]


class KFAC(Sampled, _Kronecker):
    """Kronecker factors of the Fisher, in `kfac`: `[B, A]` for a weight, `[B]` for a vector.

    B is `[O, O]` and A `[I, I]`, with a leading axis of groups for a grouped convolution. Weight and bias have blocks
    of their own. For parameters without positions they are BackPACK's; for convolutions BackPACK mixes A of "expand"
    with B of "reduce", which is off by a factor that grows with the number of positions.
    """

    savefield = "kfac"

    def __init__(
        self,
        mc_samples: int = 1,
        approx: str = "expand",
        fisher: str = "mc",
        generator: torch.Generator | None = None,
    ) -> None:
        """Choose the approximation.

        Args:
            mc_samples: draws for each sample, with fisher "mc".
            approx: "expand", where every position counts as a sample; or "reduce", where positions are pooled.
            fisher: "mc": targets drawn from the model's predictions; "exact": the loss's Hessian (type 2, as KFLR);
                "empirical": the gradients of the loss as it is.
            generator: for the draws; one of packext's own by default.

        Raises:
            ValueError: for an unknown choice.
        """
        super().__init__(mc_samples, generator)
        for what, choice, known in (
            ("approx", approx, ("expand", "reduce")),
            ("fisher", fisher, ("mc", "exact", "empirical")),
        ):
            if choice not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}, got {choice!r}.")
        self.approx, self.fisher = approx, fisher

    @property
    def root(self) -> tuple[str, int, torch.Generator | None]:
        return ("mc", self.mc_samples, self.generator) if self.fisher == "mc" else (self.fisher, 0, None)

    def __repr__(self) -> str:
        """As it was made."""
        return f"KFAC(mc_samples={self.mc_samples}, approx={self.approx!r}, fisher={self.fisher!r})"


class EKFAC(KFAC):
    """Eigenvalue-corrected Kronecker factors of the Fisher, in `ekfac`: a `linalg.KronEigh` for each parameter.

    With a `basis`, its eigenvalues are the second moments of the (sampled, exact or empirical) gradients in that basis:
    the diagonal that is best in Frobenius norm (George et al., 2018, "Fast Approximate Natural Gradient Descent in a
    Kronecker-factored Eigenbasis", section 3.1). Without, it has the eigenvectors of `KFAC`, and the products of the
    factors' eigenvalues: the basis for the passes that follow.
    """

    savefield = "ekfac"

    def __init__(
        self,
        basis: Mapping[Any, linalg.KronEigh] | None = None,
        mc_samples: int = 1,
        approx: str = "expand",
        fisher: str = "mc",
        generator: torch.Generator | None = None,
    ) -> None:
        """Take an earlier result for each parameter, by name or by the parameter itself, and what `KFAC` takes."""
        super().__init__(mc_samples, approx, fisher, generator)
        self.basis = basis

    def _basis(self, ask: Ask) -> linalg.KronEigh | None:
        if self.basis is None:
            return None
        found = self.basis.get(ask.name)
        if found is None:
            found = next((b for key, b in self.basis.items() if key is ask.parameter), None)
        if found is None:
            raise KeyError(f"EKFAC(basis=...) has nothing for {ask.name}, shape {list(ask.parameter.shape)}.")
        return found

    def absorb(self, ask: Ask, held: Any) -> Any:
        basis = self._basis(ask)
        if basis is None:
            return super().absorb(ask, held)
        left, *right = (v if v.dim() == 3 else v[None] for v in basis.vectors)
        form = ask.statistics.form.rotated(left, right[0] if right else None)
        if form is None:
            raise UnsupportedUseError(f"EKFAC: the basis of {ask.name} {list(ask.parameter.shape)} does not fit it.")
        moment = Statistics(form)["second_moment"].reshape(ask.parameter.shape)
        return (basis.vectors, moment if held is None else held[1].add_(moment))

    def land(self, held: Any, n: int, factor: float) -> linalg.KronEigh:
        if isinstance(held, tuple):
            return linalg.KronEigh(held[0], held[1] * factor)
        return linalg.KronEigh.of(super().land(held, n, factor))

    def __repr__(self) -> str:
        """As it was made."""
        return f"E{super().__repr__()}"


class KFLR(_Kronecker):
    """Kronecker factors with the exact Hessian of the loss, "expand", in `kflr`; see `KFAC`."""

    savefield = "kflr"
