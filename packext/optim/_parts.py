"""Parts that scale, average and clip."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from packext.optim import _lists as lists
from packext.optim._work import Part, Work


class Descend(Part):
    """`-lr u`: the last part."""

    keeps = ()

    def __init__(self, lr: float = 1e-3) -> None:
        """Take the learning rate."""
        super().__init__(lr=lr)

    def __call__(self, work: Work) -> None:
        """Multiply."""
        work.updates = lists.mul(work.updates, [-float(lr) for lr in work.of("lr")])


class DecoupledDecay(Part):
    """`u + weight_decay p`, before `Descend` (Loshchilov & Hutter, 2019, "Decoupled Weight Decay Regularization")."""

    keeps = ()

    def __init__(self, weight_decay: float = 0.0) -> None:
        """Take the factor."""
        super().__init__(weight_decay=weight_decay)

    def __call__(self, work: Work) -> None:
        """Add."""
        decay = work.of("weight_decay")
        if any(decay):
            work.updates = lists.add(work.updates, lists.mul(work.params, decay))


class Adam(Part):
    """Adam's direction (Kingma & Ba, 2015): m / (sqrt(v) + eps) of bias-corrected averages of gradient and square."""

    keeps = ("m", "v", "t")

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        """Take the decay of both averages, and what is added to the root."""
        super().__init__(betas=betas, eps=eps)

    def __call__(self, work: Work) -> None:
        """Average and divide."""
        averages = []
        times = [t + 1 for t in work.old("t", 0)]
        for k, name in enumerate(("m", "v")):
            new = work.updates if k == 0 else lists.mul(work.updates, work.updates)
            averages.append(average(work, name, new, [b[k] for b in work.of("betas")]))
        first = [1 - b[0] ** t for b, t in zip(work.of("betas"), times, strict=True)]
        second = [1 - b[1] ** t for b, t in zip(work.of("betas"), times, strict=True)]
        # m / first / (sqrt(v / second) + eps), with the roots of `second` taken out of the denominator
        roots = [math.sqrt(s) for s in second]
        below = lists.add(lists.sqrt(averages[1]), [e * r for e, r in zip(work.of("eps"), roots, strict=True)])
        work.updates = lists.mul(lists.div(averages[0], below), [r / f for r, f in zip(roots, first, strict=True)])
        work.set("t", times)


def average(work: Work, name: str, new: Sequence[Tensor], decays: Sequence[float]) -> list[Tensor]:
    """`decay old + (1 - decay) new`, from zero, kept in the state under `name`."""
    old = [torch.zeros_like(x) if m is None else m for m, x in zip(work.old(name), new, strict=True)]
    mixed = lists.lerp(old, new, [1 - float(d) for d in decays])
    work.set(name, mixed)
    return mixed


class L2(Part):
    """`g + weight_decay p`: the gradient of the loss plus `weight_decay / 2 |p|²`, which is damping as well."""

    keeps = ()

    def __init__(self, weight_decay: float = 0.0) -> None:
        """Take the factor."""
        super().__init__(weight_decay=weight_decay)

    def __call__(self, work: Work) -> None:
        """Add, to gradients and updates."""
        decay = work.of("weight_decay")
        if any(decay):
            more = lists.mul(work.params, decay)
            work.grads = lists.add(work.grads, more)
            work.updates = lists.add(work.updates, more)


class KLClip(Part):
    """Shrinks all updates alike, such that the step's second-order change of the predictions stays small.

    By `min(1, sqrt(kl_clip / sum of lr² g u))`, over all parameters, with g the gradient and u the preconditioned one
    (Ba, Grosse & Martens, 2017, "Distributed Second-Order Optimization using Kronecker-Factored Approximations",
    section 5).
    """

    keeps = ()

    def __init__(self, kl_clip: float | None = 1e-3) -> None:
        """Take the bound; None: no clipping."""
        super().__init__(kl_clip=kl_clip)

    def __call__(self, work: Work) -> None:
        """Shrink."""
        bound = work.groups[0]["kl_clip"]
        if bound is None:
            return
        slopes = lists.dots(work.grads, work.updates)
        size = sum(slope * lr**2 for slope, lr in zip(slopes, work.of("lr"), strict=True))
        if size > bound:
            work.updates = lists.mul(work.updates, [math.sqrt(bound / size)] * len(work.updates))


class ClipNorm(Part):
    """Shrinks all updates alike, such that their norm over all parameters is at most `max_norm`."""

    keeps = ()

    def __init__(self, max_norm: float) -> None:
        """Take the bound."""
        super().__init__(max_norm=max_norm)

    def __call__(self, work: Work) -> None:
        """Shrink."""
        bound = work.groups[0]["max_norm"]
        norm = lists.norm(work.updates)
        if norm > bound:
            work.updates = lists.mul(work.updates, [bound / norm] * len(work.updates))


class Momentum(Part):
    """Heavy ball: `v <- momentum v + u`, in place of u."""

    keeps = ("velocity",)

    def __init__(self, momentum: float = 0.9) -> None:
        """Take the factor."""
        super().__init__(momentum=momentum)

    def __call__(self, work: Work) -> None:
        """Add."""
        factors = work.of("momentum")
        if not any(factors):
            return
        old = [torch.zeros_like(u) if v is None else v for u, v in zip(work.updates, work.old("velocity"), strict=True)]
        new = lists.mul(old, factors)
        lists.add_(new, work.updates)
        work.updates = new
        work.set("velocity", new)
