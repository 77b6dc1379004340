"""Does a private training keep what it claims? Canary gradients in one run, and a lower bound on its epsilon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

import packext as px
from packext.attacks._shared import Threat
from packext.attacks.membership import epsilon_lower_bound


@dataclass(frozen=True)
class CanaryAudit:
    """What the canaries of a run say.

    Attributes:
        epsilon: lower bound on the training's; above what an accountant claims, the training has a defect.
        delta: at which it holds.
        confidence: with which it holds.
        correct: guesses that were right.
        guesses: how many were made.
        canaries: how many there were, half of them included.
        choices: among how many numbers of guesses this one was chosen, which the bound pays for.
    """

    epsilon: float
    delta: float
    confidence: float
    correct: int
    guesses: int
    canaries: int
    choices: int = 1


class GradientCanaries:
    """Canaries in the training of a private optimizer, which tell what its epsilon is at least.

    A canary is a gradient in a random direction, longer than the clipping norm, that the optimizer gets among those of
    samples, clips and hides as it does them. Each is included with probability 1/2, and then sampled in each step as a
    sample is. The attacker knows the gradients of all samples, as the guarantee allows: what is left of the private
    gradient without them is noise and canaries. They take the inner products with the directions, say of the canaries
    with the highest sums that they were included and of those with the lowest that they were not. Whoever is right too
    often has found that the training is not as private as it claims: noise that is missing or too small, norms that are
    not bounded, a scale that is wrong. What a pass makes of samples is not tested: that is what oracles are for.

    Example:
        >>> canaries = GradientCanaries(optimizer, 500, rate=64 / len(x))
        >>> ...  # the training as ever, with canaries.step() in place of optimizer.step()
        >>> canaries.audit(delta=1e-5).epsilon <= px.optim.epsilon(optimizer.spent, len(x), delta=1e-5)

    - Formula: score of canary m, sum over the steps of `u_m·(B g - sum of clipped g_n)`, with u_m its direction, g the
      private gradient and B the expected batch size; the bound is that of `epsilon_lower_bound`
    - Cost: for each step a product of the canaries' directions with a gradient, in `entries` entries; no pass
    - Source: Steinke, Nasr & Jagielski, NeurIPS 2023, for the bound; Nasr et al. 2021 for canaries that are gradients
    - Refused: several processes; numbers out of their range

    Attributes:
        included: which canaries are in the training `[M]`.
        scores: sums of inner products so far `[M]`.
    """

    threat: ClassVar[Threat] = Threat(
        "the private gradient of every step",
        "all samples, which of them are in each batch, and the canaries; not which canaries are included",
        "honest",
        "a private optimizer of this package, in one process; canaries cost some accuracy",
    )
    """Who attacks, and what must hold."""

    def __init__(
        self,
        optimizer: px.optim.DPSGD | px.optim.DPAdam,
        count: int = 500,
        rate: float = 1.0,
        *,
        multiple: float = 10.0,
        entries: int = 8192,
        seed: int = 0,
    ) -> None:
        """Draw the canaries.

        Args:
            optimizer: whose claim is tested.
            count: M.
            rate: probability of a sample to be in a batch; a claim for a smaller one is not tested by a larger one.
            multiple: norm of a canary before it is clipped, over the optimizer's sensitivity.
            entries: of the parameters, chosen at random, in which canaries live; all if there are no more. Fewer than
                canaries, and they hide each other.
            seed: of directions, inclusion and sampling.

        Raises:
            TypeError: for an optimizer that is not private.
            PackextError: in several processes.
            ValueError: for a number out of its range.
        """
        if not isinstance(optimizer, (px.optim.DPSGD, px.optim.DPAdam)):
            raise TypeError(f"canaries test a px.optim.DPSGD or DPAdam, got a {type(optimizer).__name__}.")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise px.PackextError("Canaries are for a training in one process: others would have them again.")
        if not (count >= 1 and 0 < rate <= 1 and multiple > 0 and entries >= 1):
            raise ValueError(
                "need count >= 1, 0 < rate <= 1, multiple > 0 and entries >= 1, got "
                f"{count}, {rate}, {multiple}, {entries}."
            )
        self.optimizer, self.rate, self.multiple = optimizer, rate, multiple
        self._draw = torch.Generator().manual_seed(seed)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        total = sum(p.numel() for p in self._parameters)
        self._at = torch.randperm(total, generator=self._draw)[:entries].sort().values
        directions = torch.randn(count, len(self._at), generator=self._draw)
        self.directions = directions / directions.norm(dim=1, keepdim=True)
        self.included = torch.rand(count, generator=self._draw) < 0.5
        self.scores = torch.zeros(count, dtype=torch.float64)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """The optimizer's step, with the canaries of the batch among its samples.

        Args:
            closure: as of the optimizer.

        Returns:
            What the optimizer's step does.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        known = torch.cat([s.detach().flatten().cpu() for s in self.optimizer.pending])
        batch = self.optimizer.expected_batch_size
        chosen = self.included & (torch.rand(len(self.included), generator=self._draw) < self.rate)
        total = sum(p.numel() for p in self._parameters)
        for some in chosen.nonzero().flatten().split(max(1, (1 << 24) // total)):
            rows = torch.zeros(len(some), total)
            rows[:, self._at] = self.directions[some] * (self.multiple * self.optimizer.sensitivity)
            parts = rows.split([p.numel() for p in self._parameters], 1)
            self.optimizer.contribute(
                [r.view(-1, *p.shape).to(p) for r, p in zip(parts, self._parameters, strict=True)]
            )
        self.optimizer.step()
        seen = torch.cat([p.grad.detach().flatten().cpu() for p in self._parameters if p.grad is not None]) * batch
        self.scores += (self.directions @ (seen - known)[self._at].float()).double()
        return loss

    def audit(self, delta: float, guesses: int | Sequence[int] | None = None, confidence: float = 0.95) -> CanaryAudit:
        """The lower bound on epsilon from the steps so far.

        Args:
            delta: of the claim.
            guesses: how many canaries to guess about, half of which are said to be included; of several numbers the
                best one, which is paid for (Bonferroni). By default 5, 10, 20, 50 and 100 % of the canaries.
            confidence: of the bound.

        Returns:
            The bound, and what it is made of.

        Raises:
            ValueError: if there are fewer canaries than guesses.
        """
        count = len(self.included)
        if guesses is None:
            guesses = [min(count, max(2, count * part // 100)) for part in (5, 10, 20, 50, 100)]
        tried = [guesses] if isinstance(guesses, int) else list(dict.fromkeys(guesses))
        if not tried or not all(1 <= r <= count for r in tried):
            raise ValueError(f"guesses must be from 1 to the {count} canaries, got {tried}.")
        order = self.scores.argsort(descending=True)
        found = []
        for r in tried:
            inside, outside = order[: r - r // 2], order[count - r // 2 :]
            correct = int(self.included[inside].sum() + (~self.included[outside]).sum())
            bound = epsilon_lower_bound(correct, r, count, delta, confidence, len(tried))
            found.append(CanaryAudit(bound, delta, confidence, correct, r, count, len(tried)))
        return max(found, key=lambda audit: audit.epsilon)
