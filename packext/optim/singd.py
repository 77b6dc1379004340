"""Kronecker-factored preconditioning without inverses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packext.optim._base import Optimizer
from packext.optim._parts import DecoupledDecay, Descend, Momentum
from packext.optim._precondition import Kronecker, apply, has_all, matrices_of, multiply, same_shapes
from packext.optim._work import Work


class SINGD(Optimizer):
    """Inverse-free natural gradient descent: the Kronecker-factored preconditioner `C Cᵀ ⊗ K Kᵀ` of a layer is learned.

    With A and B as in `KFAC` and `tr` the mean of the diagonal,

        m_K <- α m_K + ½ (tr(Cᵀ B C) Kᵀ A K + λ tr(Cᵀ C) Kᵀ K - I)
        m_C <- α m_C + ½ (tr(Kᵀ A K) Cᵀ B C + λ tr(Kᵀ K) Cᵀ C - I)
        K <- K (I - β m_K),   C <- C (I - β m_C)
        v <- momentum v + C Cᵀ g K Kᵀ + weight_decay θ,   θ <- θ - lr v

    from K = C = I. No matrix is inverted or decomposed, which suits low precision. Factors are dense here; the
    paper's other structures are not. A parameter with one factor has C alone, with traces of K as 1.

    - Cost: `KFAC` every `every` steps (with drawn targets an inner pass for each draw), and products of matrices of the
      factors' size; holds two roots and their momenta for each weight, and momentum
    - Source: Lin et al. 2024, "Structured Inverse-Free Natural Gradient Descent"
    - Refused: as for `KFAC`
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        damping: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        every: int = 10,
        precondition_lr: float = 1e-2,
        precondition_momentum: float = 0.5,
        approx: str = "expand",
        fisher: str = "mc",
        bias: str = "joint",
        mc_samples: int = 1,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        """Choose.

        Args:
            params: as for any optimizer of torch. Weight and bias of a layer belong into one group.
            lr: learning rate.
            damping: λ.
            momentum: of the heavy ball.
            weight_decay: times the parameter, added to the preconditioned gradient.
            every: steps from one update of the preconditioner to the next; nothing is emitted between.
            precondition_lr: β.
            precondition_momentum: α.
            approx: "expand" or "reduce" (see `px.KFAC`).
            fisher: "mc", "exact", or "empirical", as in the paper.
            bias: "joint" or "separate".
            mc_samples: draws for each sample, with "mc".
            seed: of the draws.
            process_group: over which gradients are averaged; that of all processes by default.
        """
        options = {"mc_samples": mc_samples, "approx": approx, "fisher": fisher, "bias": bias}
        part = InverseFree(damping, every, precondition_lr, precondition_momentum, **options)
        super().__init__(
            params, [part, DecoupledDecay(weight_decay), Momentum(momentum), Descend(lr)], seed, process_group
        )


class InverseFree(Kronecker):
    """`C Cᵀ u K Kᵀ`, see `SINGD`."""

    keeps = ("partner", "roots", "momenta")

    def __init__(self, damping: float, every: int, lr: float, momentum: float, **options: Any) -> None:
        """As for `Kronecker`, and the preconditioner's own rate and momentum."""
        super().__init__("kfac", damping, None, every, **options)
        self.defaults |= {"precondition_lr": lr, "precondition_momentum": momentum}

    def __call__(self, work: Work) -> None:
        """Move the preconditioner, and multiply."""
        roots, momenta = work.old("roots"), work.old("momenta")
        if self.due(work.optimizer):
            found = matrices_of(work, work.emitted("kfac"))
            begun = [not same_shapes(r, f) for r, f in zip(roots, found, strict=True)]
            moved = [
                _moved(f, None if new else roots[k], None if new else momenta[k], work.groups[k])
                for k, (f, new) in enumerate(zip(found, begun, strict=True))
            ]
            roots = [m[0] for m in moved]
            work.set("roots", roots)
            work.set("momenta", (m[1] for m in moved))
        has_all(work, roots)
        work.updates = multiply(work, work.updates, lambda k, u: apply([_outer(r) for r in roots[k]], u))


def _moved(factors: list[Tensor], roots: Any, momenta: Any, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The roots C and K (or K and C) of a preconditioner and their momenta, after one step on these factors."""
    roots = roots or [torch.ones_like(f) if f.dim() == 1 else _eye_like(f) for f in factors]
    momenta = momenta or [torch.zeros_like(f) for f in factors]
    alpha, beta, damping = group["precondition_momentum"], group["precondition_lr"], group["damping"]
    turned = [_between(r, f) for r, f in zip(roots, factors, strict=True)]
    squared = [_between(r, None) for r in roots]
    new_roots, new_momenta = [], []
    for j, root in enumerate(roots):
        others = [i for i in range(len(roots)) if i != j]
        weight, damped = (_mean_trace(turned[others[0]]), _mean_trace(squared[others[0]])) if others else (1.0, 1.0)
        one = torch.ones_like(root) if root.dim() == 1 else _eye_like(root)
        m = alpha * momenta[j] + 0.5 * (weight * turned[j] + damping * damped * squared[j] - one)
        new_momenta.append(m)
        new_roots.append(root - beta * (root * m if root.dim() == 1 else root @ m))
    return new_roots, new_momenta


def _eye_like(m: Tensor) -> Tensor:
    return torch.eye(m.shape[-1], dtype=m.dtype, device=m.device).expand(m.shape).clone()


def _outer(root: Tensor) -> Tensor:
    return root * root if root.dim() == 1 else root @ root.mT


def _between(root: Tensor, m: Tensor | None) -> Tensor:
    """`rootᵀ m root`, with m the identity if None."""
    if root.dim() == 1:
        return root * root if m is None else root * m * root
    return root.mT @ (root if m is None else m @ root)


def _mean_trace(m: Tensor) -> Any:
    """Mean of the diagonal, of each group, `[G, 1, 1]`."""
    mean = m.mean() if m.dim() == 1 else m.diagonal(dim1=-2, dim2=-1).mean(-1)
    return mean[:, None, None] if mean.dim() else mean
