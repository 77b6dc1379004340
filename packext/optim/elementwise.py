"""Optimizers that treat each entry by itself: Sophia, AdaHessian, M-SVAG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import packext as px
from packext.optim import _lists as lists
from packext.optim._base import Optimizer, is_real
from packext.optim._merge import Count
from packext.optim._parts import DecoupledDecay, Descend, average
from packext.optim._precondition import diagonal, interval
from packext.optim._work import Part, Work, at_least_float32


class Sophia(Optimizer):
    """Momentum, divided by a diagonal of the curvature and clipped entry by entry.

        m <- β1 m + (1 - β1) g
        h <- β2 h + (1 - β2) diag(GGN)
        θ <- θ - lr weight_decay θ - lr clip(m / max(rho h, eps), -1, 1)

    with a new h every `every` steps. The diagonal is `px.DiagGGNMC`, a sum of squares of each sample, where the paper
    squares the batch's gradient for drawn targets and multiplies by the batch size: both have the same mean, and this
    one less variance (the docs have it measured). So there is no factor of the batch size beside rho, and the paper's
    values of rho apply. Neither average is corrected for its start, as in the paper.

    The paper tunes rho such that between 10 and 50 % of the entries are not clipped: `unclipped` says how many are.

    - Cost: `DiagGGNMC` (or `DiagGGNExact`, `DiagEF`) every `every` steps, for drawn targets an inner pass for each
      draw; holds two tensors of each parameter's size
    - Source: Liu et al. 2023, "Sophia", algorithm 3
    - Refused: with `curvature="diag_ef"` several passes for a step, several processes, and a loss scale
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.05,
        weight_decay: float = 0.1,
        eps: float = 1e-15,
        every: int = 10,
        curvature: str = "diag_ggn_mc",
        mc_samples: int = 1,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        """Choose.

        Args:
            params: as for any optimizer of torch.
            lr: learning rate, the largest change of an entry.
            betas: β1 and β2.
            rho: how much of a Newton step counts as too long.
            weight_decay: decoupled.
            eps: least value of `rho h`.
            every: steps from one diagonal to the next; nothing is emitted between.
            curvature: "diag_ggn_mc", "diag_ggn_exact" or "diag_ef".
            mc_samples: draws for each sample.
            seed: of the draws.
            process_group: over which gradients are averaged; that of all processes by default.
        """
        part = ClippedNewton(betas, rho, eps, every, curvature, mc_samples)
        super().__init__(params, [part, DecoupledDecay(weight_decay), Descend(lr)], seed, process_group)

    @property
    def unclipped(self) -> float:
        """The share of entries that the last step did not clip."""
        parts = [(self.state[p]["unclipped"], p.numel()) for p in self.preconditioned() if self.state.get(p)]
        return sum(float(n) for n, _ in parts) / max(1, sum(n for _, n in parts))


class ClippedNewton(Part):
    """`clip(m / max(rho h, eps), -1, 1)`, see `Sophia`."""

    keeps = ("m", "h", "unclipped")

    def __init__(
        self, betas: tuple[float, float], rho: float, eps: float, every: int, curvature: str, mc_samples: int
    ) -> None:
        """As for `Sophia`."""
        diagonal(curvature, mc_samples)  # refuses what is unknown
        super().__init__(betas=betas, rho=rho, eps=eps)
        self.every, self.curvature, self.mc_samples = interval(every), curvature, mc_samples

    @property
    def kind(self) -> str:
        """With the curvature."""
        return f"{type(self).__name__} of {self.curvature}"

    def quantities(self, optimizer: Optimizer) -> Sequence[Any]:
        """The diagonal, every so many steps."""
        return [] if optimizer.steps % self.every else [diagonal(self.curvature, self.mc_samples, optimizer.generator)]

    def __call__(self, work: Work) -> None:
        """Average and clip."""
        m = average(work, "m", work.updates, [b[0] for b in work.of("betas")])
        if work.optimizer.steps % self.every == 0:
            h: list[Any] = average(work, "h", work.emitted(self.curvature), [b[1] for b in work.of("betas")])
        else:
            h = [torch.zeros_like(g) if each is None else each for g, each in zip(m, work.old("h"), strict=True)]
        scaled = zip(m, h, work.of("rho"), work.of("eps"), strict=True)
        ratio = [one / (rho * c).clamp(min=eps) for one, c, rho, eps in scaled]
        work.set("unclipped", ((r.abs() < 1).sum() for r in ratio))
        work.updates = [r.clamp(-1, 1) for r in ratio]


class AdaHessian(Optimizer):
    """Adam with Hutchinson's diagonal of the Hessian in place of the gradient's square.

        D = |mean over the axes of a convolution's kernel of z * H z|,  z random signs
        m <- β1 m + (1 - β1) g,   v <- β2 v + (1 - β2) D²
        θ <- θ - lr weight_decay θ - lr m̂ / (v̂^(power / 2) + eps)

    with m̂ and v̂ corrected for their start. The mean is over all axes but the first two, of parameters with three or
    more, and of numbers with their signs, as the paper defines it: noise averages out. The authors' code takes absolute
    values before this mean, which makes D larger for convolutions, and their steps shorter; all else is as theirs.

    - Cost: `DiagHessianMC` at each step: the gradient is differentiated once more for each draw; holds two tensors of
      each parameter's size
    - Source: Yao et al. 2021, "AdaHessian"
    - Refused: a power below 0 or above 1
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        power: float = 1.0,
        weight_decay: float = 0.0,
        mc_samples: int = 1,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        """Choose.

        Args:
            params: as for any optimizer of torch.
            lr: learning rate.
            betas: β1 and β2.
            eps: added to the root.
            power: of the curvature, between 0 and 1.
            weight_decay: decoupled.
            mc_samples: draws of z for a step.
            seed: of the draws.
            process_group: over which gradients are averaged; that of all processes by default.

        Raises:
            ValueError: for a power out of its range.
        """
        if not (is_real(power) and 0 <= power <= 1):
            raise ValueError(f"power must be between 0 and 1, got {power!r}.")
        part = HessianMoments(betas, eps, power, mc_samples)
        super().__init__(params, [part, DecoupledDecay(weight_decay), Descend(lr)], seed, process_group)


class HessianMoments(Part):
    """`m̂ / (v̂^(power / 2) + eps)`, see `AdaHessian`."""

    keeps = ("m", "v", "t")

    def __init__(self, betas: tuple[float, float], eps: float, power: float, mc_samples: int) -> None:
        """As for `AdaHessian`."""
        super().__init__(betas=betas, eps=eps, power=power)
        self.mc_samples = mc_samples
        px.DiagHessianMC(mc_samples)  # refuses what is none

    def quantities(self, optimizer: Optimizer) -> Sequence[Any]:
        """The diagonal of the Hessian."""
        return [px.DiagHessianMC(self.mc_samples, optimizer.generator)]

    def __call__(self, work: Work) -> None:
        """Average and divide."""
        diagonals = [
            d.mean(tuple(range(2, d.dim())), keepdim=True).expand(d.shape) if d.dim() > 2 else d
            for d in map(at_least_float32, work.emitted("diag_h_mc"))
        ]
        times = [t + 1 for t in work.old("t", 0)]
        work.set("t", times)
        betas = work.of("betas")
        m = average(work, "m", work.updates, [b[0] for b in betas])
        v = average(work, "v", lists.mul(diagonals, diagonals), [b[1] for b in betas])
        first = lists.div(m, [1 - b[0] ** t for b, t in zip(betas, times, strict=True)])
        second = lists.div(v, [1 - b[1] ** t for b, t in zip(betas, times, strict=True)])
        roots = [c.pow(k / 2) for c, k in zip(second, work.of("power"), strict=True)]
        work.updates = lists.div(first, lists.add(roots, work.of("eps")))


class MSVAG(Optimizer):
    """Momentum shrunk where it is noise.

        m <- β m + (1 - β) g,   m̂ = m / (1 - β^t)
        ρ = (1 - β) (1 + β^t) / ((1 + β) (1 - β^t))
        θ <- θ - lr weight_decay θ - lr m̂² / (m̂² + ρ s) m̂

    s is the variance of the batch's gradient, from the individual gradients of this batch (unbiased, over the
    number of samples), where the paper takes moving averages of squares for it. With `momentum=0` it is
    SVAG, the scaling of each entry's rate by `r / (r + 1/N)`, with r the signal-to-noise ratio `g² / Var(g_n)` (GSNR,
    Liu et al., 2020).

    - Cost: `SumGradSquared` at each step, in the pass of the gradient; holds one tensor of each parameter's size
    - Source: Balles & Hennig 2018, "Dissecting Adam", M-SVAG
    - Refused: a batch of one sample, whose variance is not defined
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        process_group: Any = None,
    ) -> None:
        """Choose.

        Args:
            params: as for any optimizer of torch.
            lr: learning rate.
            momentum: β.
            weight_decay: decoupled.
            process_group: over which gradients are averaged; that of all processes by default.
        """
        parts = [NoiseShrunk(momentum), DecoupledDecay(weight_decay), Descend(lr)]
        super().__init__(params, parts, 0, process_group)


class NoiseShrunk(Part):
    """`m̂² / (m̂² + ρ s) m̂`, see `MSVAG`."""

    keeps = ("m", "t")

    def __init__(self, momentum: float) -> None:
        """Take β."""
        super().__init__(momentum=momentum)

    def quantities(self, optimizer: Optimizer) -> Sequence[Any]:
        """Sums of squares, and the number of samples."""
        return [px.SumGradSquared(), Count()]

    def __call__(self, work: Work) -> None:
        """Average and shrink.

        Raises:
            PackextError: for a batch of one sample, whose variance is not defined.
        """
        times = [t + 1 for t in work.old("t", 0)]
        work.set("t", times)
        m = average(work, "m", work.updates, work.of("momentum"))
        updates = []
        emitted = zip(work.emitted("sum_grad_squared"), work.emitted("samples"), strict=True)
        for k, (squares, n) in enumerate(emitted):
            if n < 2:
                name = work.optimizer.name_of(work.params[k])
                raise px.PackextError(f"{type(work.optimizer).__name__}: {name} has seen a batch of one: no variance.")
            beta, t = work.groups[k]["momentum"], times[k]
            rho = (1 - beta) * (1 + beta**t) / ((1 + beta) * (1 - beta**t))
            mean = m[k] / (1 - beta**t)
            # Individual gradients carry 1/N, and sum to the gradient.
            variance = ((n * squares - work.grads[k] ** 2) / (n - 1)).clamp(min=0)
            signal = mean**2
            updates.append(torch.where(signal > 0, signal / (signal + rho * variance), 0.0) * mean)
        work.updates = updates
