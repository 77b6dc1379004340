"""K-FAC to train with."""

from __future__ import annotations

import math
from typing import Any

import torch

import packext as px
from packext.optim._base import Optimizer
from packext.optim._parts import L2, Descend, KLClip, Momentum
from packext.optim._precondition import Kronecker, apply, damping_of, multiply
from packext.optim._work import Work


class KFAC(Optimizer):
    """K-FAC with averaged factors, momentum and KL clipping.

    Of a layer's weight, with its bias as one more column, and gradient g (plus weight decay):

        A <- ε A + (1 - ε) mean of a aᵀ,   B <- ε B + (1 - ε) mean of b bᵀ
        u <- (B + sqrt(λ)/π I)⁻¹ g (A + π sqrt(λ) I)⁻¹
        u <- min(1, sqrt(kl_clip / (lr² Σ g u))) u
        v <- momentum v + u,   θ <- θ - lr v

    with λ = damping + weight_decay, ε = min(1 - 1/k, decay), and π as for `Preconditioned`; a are the layer's inputs, b
    the gradients at its outputs for drawn targets, k counts batches of factors, and Σ is over all parameters. They are
    emitted every `factors_every` steps, and steps between ask nothing of the backward pass; inverses are made anew with
    the first three batches, and then every `inverses_every` steps. Under `DistributedDataParallel` factors are merged
    over the processes, each of which inverts a share of the layers.

    A group with `fallback=True` has its parameters trained by AdamW: those that have no factors, and better also large
    embeddings, the weights of normalisations, and the last layer of a language model, whose factor is of the size of
    the vocabulary.

    - Cost: `KFAC` every `factors_every` steps (with drawn targets an inner pass for each draw), inverses every
      `inverses_every`, and two products with them for each weight at each step (on a CPU and without weight decay, of
      gradients of linear maps of fewer samples than a tenth of their size, products with a basis of their range);
      holds factors, inverses and momentum
    - Source: Martens & Grosse 2015 (arXiv:1503.05671), sections 5 and 6; clipping after Ba, Grosse & Martens 2017,
      section 5; "expand" and "reduce" after Eschenhagen et al. 2023 (arXiv:2311.00636)
    - Refused: parameters that are no weights of linear maps, convolutions or look-ups, nor vectors, by the backward
      pass and by name; weight and bias of a layer in different groups; with `fisher="empirical"` several passes for a
      step, batches of different sizes in several processes, and a loss scale
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.05,
        damping: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        decay: float = 0.95,
        factors_every: int = 10,
        inverses_every: int = 100,
        kl_clip: float | None = 1e-3,
        approx: str = "expand",
        fisher: str = "mc",
        bias: str = "joint",
        mc_samples: int = 1,
        adapt_every: int = 0,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        """Choose.

        Args:
            params: as for any optimizer of torch. Weight and bias of a layer belong into one group.
            lr: learning rate.
            damping: λ without the weight decay, at first.
            momentum: of the heavy ball.
            weight_decay: η of a regulariser `η / 2 |θ|²`: added to the damping and, times θ, to the gradient.
            decay: of the averages of factors.
            factors_every: steps from one batch of factors to the next.
            inverses_every: steps between new inverses, a multiple of `factors_every`.
            kl_clip: bound of the step's change of predictions; None for no bound.
            approx: "expand" or "reduce", what positions share (see `px.KFAC`).
            fisher: "mc": from drawn targets; "exact", which takes an inner pass for each output; "empirical".
            bias: "joint", or "separate" for blocks of their own.
            mc_samples: draws for each sample.
            adapt_every: after how many steps the damping is adapted to how well the quadratic model of the loss
                predicts the step; never by default. The training loop then calls `adapt`. Not next to a group with
                `fallback=True`, whose part in the step no model predicts.
            seed: of the draws.
            process_group: over which gradients are averaged; that of all processes by default.

        Raises:
            ValueError: for choices that do not fit each other.
        """
        if isinstance(adapt_every, bool) or not isinstance(adapt_every, int) or adapt_every < 0:
            raise ValueError(f"adapt_every must be an int of 0 or more, got {adapt_every!r}.")
        options = {"mc_samples": mc_samples, "approx": approx, "fisher": fisher, "bias": bias}
        kronecker = Kronecker("kfac", damping, decay, factors_every, inverses_every, **options)
        if inverses_every % factors_every:
            raise ValueError(
                f"inverses_every must be a multiple of factors_every, got {inverses_every} and {factors_every}."
            )
        parts = [L2(weight_decay), kronecker, KLClip(kl_clip), Momentum(momentum), Descend(lr)]
        super().__init__(params, parts, seed, process_group)
        self.adapt_every = adapt_every
        self._predicted: tuple[float, float, str] | None = None

    @property
    def adapts(self) -> bool:
        """Whether the step just taken is one after which `adapt` is to be called."""
        return self._predicted is not None

    def adapt(self, before: Any, after: Any) -> float:
        """Adapt the damping to the step just taken, by the Levenberg-Marquardt rule of Martens & Grosse, section 6.5.

        ρ is the change of the loss over the change that the model `gᵀδ + ½ δᵀ (C + λ I) δ` predicted, with C the
        Kronecker factors (there: the exact Fisher). Damping is multiplied by `ω = (19/20) ** adapt_every` if ρ > 3/4,
        and divided by it if ρ < 1/4 or the loss after the step is not finite. Where the model predicted that the step,
        with its momentum, makes the loss larger, ρ means nothing, and the damping stays.

        Args:
            before: the loss of the step, without weight decay.
            after: the loss of the same batch after it: `with torch.no_grad(): loss_fn(model(x), y)`.

        Returns:
            ρ; NaN where it means nothing, and -inf if the loss after the step is not finite.

        Raises:
            PackextError: if the step just taken is not one of those every `adapt_every`, or AdamW has moved parameters
                in it, of groups with `fallback=True`.
        """
        if self._predicted is None:
            raise px.PackextError(
                f"KFAC.adapt: the step just taken is none of those every adapt_every={self.adapt_every}; "
                "ask `if optimizer.adapts:`."
            )
        (predicted, decay, beside), self._predicted = self._predicted, None
        if beside:
            raise px.PackextError(
                f"KFAC.adapt: AdamW has moved {beside} in the same step, and the change of the loss is that of both: "
                "it says nothing of the damping. Leave adapt_every at 0 next to a group with fallback=True."
            )
        change = self.ranks.mean(float(torch.as_tensor(after).detach()) - float(torch.as_tensor(before).detach()))
        if predicted >= 0 and math.isfinite(change):
            return math.nan
        ratio = (change + decay) / predicted if math.isfinite(change) else -math.inf
        omega = 0.95**self.adapt_every
        factor = 1 / omega if ratio < 0.25 else omega if ratio > 0.75 else 1.0
        for group in self.param_groups:
            group["damping"] *= factor
        return ratio

    def _step(self) -> str:
        self._predicted = None
        why = super()._step()
        if why:  # after the step was settled, it may be
            self._predicted = None
        return why

    def _settle(self, work: Work) -> None:
        if not self.adapt_every or (self.steps + 1) % self.adapt_every:
            return
        factors = [new.get("factors", old) for new, old in zip(work.new, work.old("factors"), strict=True)]
        curved = multiply(work, work.updates, lambda k, delta: apply(factors[k], delta))
        groups = zip(damping_of(work), work.of("weight_decay"), strict=True)
        predicted = decay = 0.0
        for p, g, d, c, (damping, eta) in zip(work.params, work.grads, work.updates, curved, groups, strict=True):
            predicted += float((g * d).sum() + 0.5 * (d * (c + damping * d)).sum())
            decay += float(eta * ((p * d).sum() + 0.5 * (d * d).sum()))
        moved = [p for g in self.param_groups if g["fallback"] and g["lr"] for p in g["params"] if p.grad is not None]
        self._predicted = predicted, decay, self.name_of(moved[0]) if moved else ""

    def __getstate__(self) -> dict[str, Any]:
        """As for `Optimizer`."""
        return {**super().__getstate__(), "adapt_every": self.adapt_every, "_predicted": None}
