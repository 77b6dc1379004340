"""The natural gradient, solved for in the space of samples: ENGD-W and SPRING."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import packext as px
from packext.optim._base import Optimizer, is_real
from packext.optim._parts import Descend
from packext.optim._work import Part, Skip, Work


class SPRING(Optimizer):
    """Natural gradient with memory of the last direction, solved for in the space of samples.

    With S `[V N, P]` a root of the GGN of the loss, `Sᵀ S`, and ρ such that the gradient is `Sᵀ ρ` (for a squared error
    they are the Jacobian and the residuals, both times the same number),

        d <- momentum d + Sᵀ (S Sᵀ + damping I)⁻¹ (ρ - momentum S d)
        θ <- θ - lr d

    with `|lr d|² <= max_step`. This minimises `|S d - ρ|² + damping |d - momentum d_before|²`. It takes the whole GGN
    of this batch, and not blocks of it; a system of V N equations is solved in float64, or where the parameters
    are fewer, the same of P equations; eigenvalues of its matrix that are below their rounding errors, max(V N, P) eps
    times the largest, count as 0 where the damping does not cover them. V is the number of columns of a sample's root:
    its outputs, for a squared error; where passes differ in it, the largest.

    What of the gradient is no `Sᵀ ρ` is solved for as well, `(Sᵀ S + damping I)⁻¹` times it: another term of the loss
    (a penalty of the parameters), a change by hand, samples at which the loss is linear. So is what autocast rounds
    off, which a small damping makes large.

    Everything is one system: there is one group, and one process. The losses are the extended ones, such as
    `nn.MSELoss`. Passes before a step add their samples (those inside a domain and those on its boundary).

    - Cost: `SqrtGGNExact` and `BatchGrad` at each step, V inner passes, and a system of V N or P equations; holds V + 1
      times the individual gradients during the step, and one direction
    - Source: Goldshlager, Abrahamsen & Lin 2024, "SPRING"
    - Refused: a second group; several processes
    """

    def __init__(
        self,
        params: Any,
        lr: float = 5e-2,
        damping: float = 1e-3,
        momentum: float = 0.99,
        max_step: float | None = 1e-3,
    ) -> None:
        """Choose.

        Args:
            params: as for any optimizer of torch, in one group.
            lr: learning rate; with `evaluate`, the longest that is tried.
            damping: λ, in units of the GGN of the mean loss.
            momentum: μ; 0 is ENGD-W (MinSR, in variational Monte Carlo).
            max_step: bound of the squared norm of the change; None for no bound.

        Raises:
            ValueError: if `max_step` is not positive.
        """
        if max_step is not None and not (is_real(max_step) and max_step > 0):
            raise ValueError(f"max_step must be positive, or None, got {max_step!r}.")
        parts = [SampleSpace(damping, momentum), Descend(lr)]
        super().__init__(params, parts)
        self.max_step = max_step
        self._evaluate: Callable[[], Any] | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for `Optimizer`, once.

        Raises:
            ValueError: for a second group.
        """
        if not param_group.get("fallback") and any(not group["fallback"] for group in self.param_groups):
            raise ValueError(f"{type(self).__name__} solves one system for all parameters: give it one group.")
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None, evaluate: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Args:
            closure: as for `Optimizer`.
            evaluate: gives the loss at the parameters as they are when it is called, without a backward pass. Of the
                steps `lr 2^-k`, k = 0 to 30, the one with the least loss is taken, and none if that is no less than
                without a step, which is reported as a skipped step.

        Returns:
            What the closure returned, if there is one.
        """
        self._evaluate = evaluate
        try:
            return self._take(closure)
        finally:
            self._evaluate = None

    def _settle(self, work: Work) -> None:
        length = float(torch.stack([u.double().square().sum() for u in work.updates]).sum())
        if self.max_step is not None and length > self.max_step:
            work.updates = [u * (self.max_step / length) ** 0.5 for u in work.updates]
        if self._evaluate is None:
            return
        kept = [p.clone() for p in work.params]
        try:
            losses = []
            for factor in [0.0, *(2.0**-k for k in range(31))]:
                for p, q, u in zip(work.params, kept, work.updates, strict=True):
                    p.copy_(q + factor * u)
                losses.append((float(self._evaluate()), factor))
        finally:
            for p, q in zip(work.params, kept, strict=True):
                p.copy_(q)
        _, factor = min((each for each in losses if each[0] == each[0]), default=(0.0, 0.0))
        if factor == 0.0:  # where losses are alike, too
            raise Skip("no step of the line search makes the loss smaller")
        work.updates = [factor * u for u in work.updates]

    def __getstate__(self) -> dict[str, Any]:
        """As for `Optimizer`."""
        return {**super().__getstate__(), "max_step": self.max_step, "_evaluate": None}


class ENGDW(SPRING):
    """Energy natural gradient by the Woodbury identity: `SPRING` without memory and without a bound.

        d = Sᵀ (S Sᵀ + damping I)⁻¹ ρ = (GGN + damping I)⁻¹ g,   θ <- θ - lr d

    with S and ρ as for `SPRING`.

    - Cost: `SqrtGGNExact` and `BatchGrad`, as `SPRING`; with a line search (`step(evaluate=...)`) 32 evaluations of the
      loss
    - Source: Müller & Zeinhofer 2023, "Achieving High Accuracy with PINNs via Energy Natural Gradients", for method and
      line search; Guzmán-Cordero et al. 2025 for the form in the space of samples
    - Refused: as by `SPRING`; a line search that finds no smaller loss skips the step
    """

    def __init__(self, params: Any, lr: float = 1.0, damping: float = 1e-6) -> None:
        """As for `SPRING`.

        Args:
            params: as for any optimizer of torch, in one group.
            lr: learning rate; with `evaluate`, the longest that is tried.
            damping: in units of the GGN of the mean loss; 0: the pseudo-inverse, as in the paper of 2023, for problems
                without noise and with the line search.
        """
        super().__init__(params, lr, damping, momentum=0.0, max_step=None)


class SampleSpace(Part):
    """The direction of `SPRING`."""

    keeps = ("d",)

    def __init__(self, damping: float, momentum: float) -> None:
        """Take λ and μ."""
        super().__init__(damping=damping, momentum=momentum)

    def quantities(self, optimizer: Optimizer) -> Sequence[Any]:
        """A root of the GGN, and individual gradients."""
        return [px.SqrtGGNExact(), px.BatchGrad()]

    def __call__(self, work: Work) -> None:
        """Solve; where rounding hides a part of the matrix, without that part."""
        group = work.groups[0]
        roots, rows = work.emitted("sqrt_ggn_exact"), work.emitted("grad_batch")
        root = torch.cat([s.reshape(*s.shape[:2], -1).double() for s in roots], 2)  # [V, N, P]
        s, g, damping = root.flatten(0, 1), _flat(work.grads), group["damping"]
        memory = [torch.zeros_like(g) if d is None else d for g, d in zip(work.grads, work.old("d"), strict=True)]
        before = group["momentum"] * _flat(memory)
        if s.shape[0] <= s.shape[1]:
            each = torch.cat([g.reshape(len(g), -1).double() for g in rows], 1)
            eps = max(torch.finfo(t.dtype).eps for t in (*roots, *rows, *work.params))
            rho, gram = _residuals(root, each, eps), s @ s.mT
            d = before + s.mT @ _solved(gram, rho - s @ before, damping, s.shape[1])
            rest = g - s.mT @ rho
            if float(rest.norm()) > 64 * eps * float(each.norm(dim=1).sum()):
                d += _elsewhere(s, gram, rest, damping)
        else:
            d = before + _solved(s.mT @ s, g - s.mT @ (s @ before), damping, s.shape[0])
        parts = d.split([g.numel() for g in work.grads])
        work.updates = [part.view(g.shape).to(g.dtype) for part, g in zip(parts, work.grads, strict=True)]
        work.set("d", work.updates)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten().double() for t in tensors])


def _residuals(root: Tensor, rows: Tensor, eps: float) -> Tensor:
    """ρ `[V N]`, with each sample's gradient `[N, P]` as near as can be to `Σ_v ρ_vn S_vn`; root is `[V, N, P]`."""
    by_sample = root.transpose(0, 1)
    right = torch.einsum("nvp,np->nv", by_sample, rows)
    # Columns of a softmax depend on each other, but for rounding errors of eps, which are no direction.
    least = max(len(root) * torch.finfo(root.dtype).eps, (len(root) * eps) ** 2)
    rho = torch.linalg.pinv(by_sample @ by_sample.mT, rtol=least, hermitian=True) @ right[..., None]
    return rho[..., 0].T.flatten()


def _elsewhere(s: Tensor, gram: Tensor, rest: Tensor, damping: float) -> Tensor:
    """`(Sᵀ S + damping I)⁻¹ rest`, for what of the gradient is not `Sᵀ ρ`; without damping, the pseudo-inverse's."""
    within = _solved(gram, s @ rest, 0.0, s.shape[1])
    beyond = rest - s.mT @ within  # where the damping is all there is
    covers = damping > s.shape[1] * torch.finfo(s.dtype).eps * float(gram.trace())
    return s.mT @ _solved(gram, within, damping, s.shape[1]) + (beyond / damping if covers else 0.0)


def _solved(matrix: Tensor, right: Tensor, damping: float, terms: int) -> Tensor:
    """`(matrix + damping I)⁻¹ right`; what is not known of the matrix for rounding counts as 0.

    Args:
        matrix: products of rows, each a sum of `terms` products of two numbers.
        right: a vector.
        damping: added to the matrix.
        terms: how many, at least as many as the matrix has rows.

    Returns:
        The vector.
    """
    # Eigenvalues are wrong by about so much times the largest, which the trace bounds.
    rounding = terms * torch.finfo(matrix.dtype).eps
    if damping > rounding * float(matrix.trace()):
        damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return torch.cholesky_solve(right[:, None], torch.linalg.cholesky(damped))[:, 0]
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp(min=0) + damping
    return vectors @ (torch.where(values <= rounding * values.max(), 0.0, 1 / values) * (vectors.mT @ right))
