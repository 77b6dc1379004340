"""K-FAC in its eigenbasis."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import packext as px
from packext.optim._base import Optimizer
from packext.optim._parts import L2, Descend, KLClip, Momentum
from packext.optim._precondition import Kronecker, averaged, damping_of, has_all, multiply, shared
from packext.optim._work import Work


class EKFAC(Optimizer):
    """K-FAC in its eigenbasis, with second moments of the gradients themselves.

        s <- decay s + (1 - decay) mean over samples of (Qᵀ g_n)²
        u <- Q (s + λ)⁻¹ Qᵀ g

    entry by entry, with λ = damping + weight_decay, Q the eigenvectors of the averaged factors of `KFAC`, made anew
    with the first three batches of them and then every `basis_every` steps, and with g_n from drawn targets every
    `scales_every` steps. With a new basis, s is the product of the factors' eigenvalues at first. The whole damping
    goes to each entry: no split of it over the factors. Clipping, momentum and weight decay are as for `KFAC`.

    - Cost: every `scales_every` steps `KFAC` where a basis is made, and `EKFAC` in the basis where none is (with drawn
      targets an inner pass for each draw); eigenvectors of all factors with each basis; holds factors, bases, second
      moments and momentum
    - Source: George et al. 2018 (arXiv:1806.03884), algorithm 1
    - Refused: as for `KFAC`
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.05,
        damping: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decay: float = 0.95,
        scales_every: int = 10,
        basis_every: int = 100,
        kl_clip: float | None = 1e-3,
        approx: str = "expand",
        fisher: str = "mc",
        bias: str = "joint",
        mc_samples: int = 1,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        """Choose.

        Args:
            params: as for `KFAC`, which says the same of all that is not listed here.
            lr: learning rate.
            damping: added to s.
            momentum: of the heavy ball.
            weight_decay: added to the damping and, times the parameter, to the gradient.
            decay: of the averages of factors and of s.
            scales_every: steps between new second moments.
            basis_every: steps between new bases, a multiple of `scales_every`.
            kl_clip: bound of the step's change of predictions; None for no bound.
            approx: "expand" or "reduce".
            fisher: "mc", "exact" or "empirical".
            bias: "joint" or "separate".
            mc_samples: draws for each sample.
            seed: of the draws.
            process_group: over which gradients are averaged.
        """
        options = {"mc_samples": mc_samples, "approx": approx, "fisher": fisher, "bias": bias}
        eigen = Eigenbasis(damping, decay, scales_every, basis_every, **options)
        parts = [L2(weight_decay), eigen, KLClip(kl_clip), Momentum(momentum), Descend(lr)]
        super().__init__(params, parts, seed, process_group)


class _Moments(px.EKFAC):
    """Second moments in the bases that there are; nothing for a parameter without one, or with one of another block."""

    def absorb(self, ask: Any, held: Any) -> Any:
        """As `px.EKFAC`."""
        try:
            return super().absorb(ask, held)
        except (KeyError, px.UnsupportedUseError):
            return None  # the step waits for factors

    def land(self, held: Any, n: int, factor: float) -> Any:
        """As `px.EKFAC`."""
        return None if held is None else super().land(held, n, factor)


class Eigenbasis(Kronecker):
    """`Q (s + damping)⁻¹ Qᵀ u`, see `EKFAC`."""

    keeps = ("batches", "partner", "factors", "vectors", "scales")

    def __init__(self, damping: float, decay: float, every: int, basis_every: int, **options: Any) -> None:
        """As for `Kronecker`; a new basis comes every `basis_every` steps.

        Raises:
            ValueError: if that is no multiple of `every`.
        """
        super().__init__("kfac", damping, decay, every, basis_every, **options)
        if basis_every % every:
            raise ValueError(f"basis_every must be a multiple of scales_every, got {basis_every} and {every}.")

    def quantities(self, optimizer: Optimizer) -> list[Any]:
        """Factors for a new basis, second moments in the old one, or nothing."""
        if not self.due(optimizer):
            return []
        if self.inverting(optimizer):
            return [self._make(optimizer.generator)]
        params = [p for g in optimizer.param_groups for p in g["params"]]
        basis: dict[Tensor, Any] = {}
        for p in optimizer.preconditioned():
            state = optimizer.state.get(p)
            if not state:  # it has had no gradient yet; who looks at the state of such a one makes an empty one
                continue
            if state["partner"] is None:
                basis[p] = px.linalg.KronEigh(state["vectors"], state["scales"])
            else:
                basis[p] = px.linalg.Joint(params[state["partner"][0]], state["partner"][1])
        return [_Moments(basis, generator=optimizer.generator, **self.options)]

    def __call__(self, work: Work) -> None:
        """Average, and divide in the eigenbasis."""
        vectors, scales, damping = work.old("vectors"), work.old("scales"), damping_of(work)
        if self.due(work.optimizer) and self.inverting(work.optimizer):
            vectors, scales = self._bases(work)
            work.set("vectors", vectors)
        elif self.due(work.optimizer):
            assert self.decay is not None
            new = [getattr(e, "eigenvalues", None) for e in work.emitted("ekfac")]
            scales = [
                s if s is None or n is None else torch.lerp(n.reshape(-1), s, self.decay)
                for s, n in zip(scales, new, strict=True)
            ]
        work.set("scales", scales)
        has_all(work, vectors)

        def divide(k: int, x: Tensor) -> Tensor:
            s = scales[k]
            assert s is not None  # of a bias that has one block with its weight
            return px.linalg.KronEigh(vectors[k], s).matvec(x, lambda e: 1 / (e + damping[k]))

        work.updates = multiply(work, work.updates, divide)

    def _bases(self, work: Work) -> tuple[list[Any], list[Any]]:
        factors = averaged(work, work.emitted("kfac"), self.decay)

        def decompose(k: int) -> list[Tensor]:
            found = px.linalg.KronEigh.of(factors[k])
            return [*(v.contiguous() for v in found.vectors), found.eigenvalues.reshape(-1)]

        def room(k: int) -> list[Tensor]:
            groups = max((len(f) for f in factors[k] if f.dim() == 3), default=1)
            entries = groups * math.prod(f.shape[-1] for f in factors[k])
            return [*(torch.empty_like(f) for f in factors[k]), factors[k][0].new_empty(entries)]

        made = shared(work, factors, decompose, room)
        return [m[:-1] for m in made], [m[-1] if m else None for m in made]
