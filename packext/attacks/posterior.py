"""Inputs that are most probable given what was received, for attackers who know how the gradient was changed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import packext as px
from packext.attacks._objectives import clipped
from packext.attacks._shared import Shared, Threat
from packext.attacks.inversion import LocalSteps, Matching, Reconstruction, unrolled


class Misfit(ABC):
    """Base of what is known of the difference between a gradient and what was received of it."""

    @abstractmethod
    def widths(self, received: Tensor) -> Tensor:
        """How far the gradient may be from each entry that was received; infinite where that says nothing of it."""

    @abstractmethod
    def cost(self, u: Tensor) -> Tensor:
        """Minus the logarithm of the probability of differences, in widths, up to a constant: of each by itself."""

    @abstractmethod
    def fits(self, u: Tensor) -> bool:
        """Whether differences, in widths, are no larger than they are of the client's own inputs."""


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}.")


@dataclass(frozen=True)
class GaussianMisfit(Misfit):
    """Of `packext.defences.GaussianNoise`, and of `Clipped` with noise.

    Attributes:
        std: standard deviation of what was added to each entry that was received.
    """

    std: float

    def __post_init__(self) -> None:
        """Refuse what is no width."""
        _positive("std", self.std)

    def widths(self, received: Tensor) -> Tensor:
        """The standard deviation."""
        return torch.full_like(received, self.std)

    def cost(self, u: Tensor) -> Tensor:
        """Half the square."""
        return u.square() / 2

    def fits(self, u: Tensor) -> bool:
        """Whether the mean square is that of noise, within three of its standard deviations."""
        return float(u.square().mean()) < 1 + 3 * math.sqrt(2 / len(u))


@dataclass(frozen=True)
class LaplacianMisfit(Misfit):
    """Of `packext.defences.LaplacianNoise`.

    Attributes:
        scale: mean absolute value of what was added.
    """

    scale: float

    def __post_init__(self) -> None:
        """Refuse what is no width."""
        _positive("scale", self.scale)

    def widths(self, received: Tensor) -> Tensor:
        """The scale."""
        return torch.full_like(received, self.scale)

    def cost(self, u: Tensor) -> Tensor:
        """The absolute value, rounded off where it has no derivative."""
        return (u.square() + 0.01).sqrt()

    def fits(self, u: Tensor) -> bool:
        """Whether the mean absolute value is that of noise, within three of its standard deviations."""
        return float(u.abs().mean()) < 1 + 3 / math.sqrt(len(u))


@dataclass(frozen=True)
class RoundingMisfit(Misfit):
    """Of `packext.defences.Quantisation`: each entry came from a cell around what was received.

    The grid of "int8" can be read off what was received, whose largest entry is 127 steps.

    Attributes:
        kind: "float16", "bfloat16" or "int8".
        stochastic: whether "int8" was rounded at random, from up to a whole step away.
    """

    kind: str
    stochastic: bool = False

    def __post_init__(self) -> None:
        """Refuse another kind."""
        if self.kind not in ("float16", "bfloat16", "int8"):
            raise ValueError(f'kind must be "float16", "bfloat16" or "int8", got {self.kind!r}.')
        if self.stochastic and self.kind != "int8":
            raise ValueError(f'stochastic is of "int8" alone: {self.kind} is rounded to the nearest.')

    def widths(self, received: Tensor) -> Tensor:
        """From the middle of a cell to its edge."""
        largest = received.abs().max()
        if not largest:  # a scale of nothing
            return torch.full_like(received, math.inf)
        if self.kind == "int8":
            return (largest / 127 * (1.0 if self.stochastic else 0.5)).expand_as(received)
        short = torch.finfo(getattr(torch, self.kind))
        octave = received.abs().clamp_min(short.smallest_normal).log2().floor()
        # The client's own arithmetic is no better: cells of entries near zero are narrower than its rounding.
        return (short.eps / 2 * 2**octave).clamp_min(float(largest) * torch.finfo(torch.float32).eps)

    def cost(self, u: Tensor) -> Tensor:
        """Of steps of one size a barrier at the edges of the cell; of a float's half the square over its variance."""
        if self.kind != "int8":
            return 1.5 * u.square()
        edge = 0.95  # from where on the barrier goes on as a line, for searches that come from outside
        inside = -torch.log1p(-u.abs().clamp_max(edge).square())
        return inside + (u.abs() - edge).relu() * 2 * edge / (1 - edge**2)

    def fits(self, u: Tensor) -> bool:
        """Whether all are in their cells, or no further beyond an edge than half the way to it, as searches end."""
        return float(u.abs().max()) < 1.5


@dataclass(frozen=True, eq=False)
class Prior:
    """What an attacker expects of inputs: a normal distribution with the mean and covariance of some of the same kind.

    The covariance is that of the samples, shrunk towards a multiple of the identity by as much as their number asks for
    (Chen et al. 2010, OAS).

    Attributes:
        mean: of one input, in its shape.
        directions: orthonormal, in which the samples vary `[K, D]`.
        variances: along them `[K]`.
        rest: variance along all others.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor
    rest: float

    @classmethod
    def of(cls, samples: Tensor) -> Prior:
        """Learn it.

        Args:
            samples: `[M, ...]`, two or more that are not all the same.

        Returns:
            The prior.

        Raises:
            PackextError: if they do not vary, or are not finite.
            ValueError: if they have no axis beside that of the samples.
        """
        if samples.dim() < 2:
            raise ValueError(f"samples are [M, ...], each in the shape of an input; got {list(samples.shape)}.")
        if not samples.isfinite().all():
            raise px.PackextError(f"samples {list(samples.shape)} have entries that are not finite: leave them out.")
        flat = samples.flatten(1).double()
        m, d = flat.shape
        mean = flat.mean(0)
        _, s, rows = torch.linalg.svd(flat - mean, full_matrices=False)
        variances = s.square() / m
        total, squares = float(variances.sum()), float(variances.square().sum())
        if not total > 0:
            raise px.PackextError(f"{m} sample(s) {list(samples.shape[1:])} do not vary: they tell nothing of others.")
        apart = (m + 1 - 2 / d) * (squares - total**2 / d)
        shrunk = min(1.0, ((1 - 2 / d) * squares + total**2) / apart) if apart > 0 else 1.0
        rest = shrunk * total / d
        return cls(mean.view(samples.shape[1:]), rows, (1 - shrunk) * variances + rest, rest)

    def __call__(self, x: Tensor) -> Tensor:
        """Minus the logarithm of the density of inputs `[N, ...]`, up to a constant."""
        away = (x - self.mean.to(x)).flatten(1)
        along = away @ self.directions.to(x).T
        weights = 1 / self.variances - 1 / self.rest
        return (away.square().sum() / self.rest + (along.square() * weights.to(x)).sum()) / 2


@dataclass(frozen=True, eq=False)
class MaximumPosterior:
    """The most probable inputs, for who knows what was done to the gradient, and what inputs look like.

    Where noise was added, the sharpest match is of the noise: its known size is what weighs the match against the
    prior, and nothing is left to choose. Where entries were rounded, any gradient in the cells is as good as another,
    and the search goes for their middle.

    - Formula: x of the least `-log p(G* | G(x)) - log p(x)`, with G(x) the gradient of the loss at x, clipped if the
      client clips, G* what was shared, p(G* | G) as the `misfit` has it, and p(x) the `prior`; beyond the box of
      inputs a penalty of 1000 times the square, in units of the box
    - Cost: up to 20 steps of L-BFGS for each iteration, each one or more gradients that are differentiated
    - Source: Balunović et al., ICLR 2022
    - Refused: gradients or masks that do not fit the model; a gradient of zero; `clip` with several samples

    Args:
        misfit: what lies between the gradient and what was shared.
        prior: of the inputs; all alike by default, as suits rounding, but not noise.
        starts: inputs `[N, ...]` such as other searches have found; the most probable of them, and of the prior's mean,
            is the start. At random without any.
        iterations: outer ones, of up to 20 steps of L-BFGS.
        low: bound of the inputs.
        high: bound of the inputs.
        clip: the norm to which the client clips the gradient of its one sample, if it does.
        local: what a client of FedAvg did.
        seed: of random inputs.
    """

    misfit: Misfit
    prior: Prior | None = None
    starts: Sequence[Tensor] = field(default=(), repr=False)
    iterations: int = 30
    low: float = 0.0
    high: float = 1.0
    clip: float | None = None
    local: LocalSteps | None = None
    seed: int = 0

    restarts: ClassVar[int] = 1
    threat: ClassVar[Threat] = Threat(
        "one client's gradient of all parameters",
        "the model, the labels, the input's shape and range, what was done to the gradient, other inputs",
        "honest",
        "small batches; few local steps, known",
    )
    """Who attacks, and what must hold."""

    def __post_init__(self) -> None:
        """Refuse a search that would find nothing."""
        if self.iterations < 1 or not self.low < self.high or not (self.clip is None or self.clip > 0):
            raise ValueError(f"need iterations >= 1, low < high and a positive clip or None, got {self}.")

    def __call__(
        self,
        model: nn.Module,
        shared: Shared,
        shape: tuple[int, ...],
        labels: Tensor,
        mask: Mapping[str, Tensor] | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> Reconstruction:
        """Search.

        Args:
            model: with the parameters at which the gradient was taken, in the client's mode.
            shared: what the client sent.
            shape: of one input.
            labels: `[N]`.
            mask: entries that are matched, by parameter name, such as `packext.attacks.sent` gives; all by default.
            progress: called after each outer iteration with its number and the objective.

        Returns:
            The most probable inputs that were seen, in the box; `matched` if what was shared is as near to their
            gradient as it would be to the client's.

        Raises:
            ValueError: if the model does not take such inputs, or the loss such labels; for starts or a prior of
                another shape; for `clip` with several samples.
        """
        if self.clip is not None and shared.n != 1:
            raise ValueError(f"clip={self.clip} is of the gradient of one sample; what was shared is of {shared.n}.")
        matching = Matching(model, shared, mask=mask)
        kept = matching.mask or [torch.ones_like(t) for t in matching.target]
        widths = [
            self.misfit.widths(t).masked_fill(m == 0, math.inf) for t, m in zip(matching.target, kept, strict=True)
        ]

        def differences(x: Tensor) -> list[Tensor]:
            found = unrolled(matching, x, labels, self.local)
            if self.clip is not None:
                found = clipped(found, self.clip)
            return [(f - t) / w for f, t, w in zip(matching.seen(found), matching.target, widths, strict=True)]

        def objective(x: Tensor) -> Tensor:
            inside = x.clamp(self.low, self.high)
            cost = torch.stack([self.misfit.cost(u).sum() for u in differences(inside)]).sum()
            cost = cost + 1000 * (x - inside).square().sum() / (self.high - self.low) ** 2
            return cost if self.prior is None else cost + self.prior(inside)

        def value(x: Tensor) -> float:
            found = float(objective(x.requires_grad_()).detach())  # local steps of what requires none have no graph
            return found if math.isfinite(found) else math.inf

        begun = self._begun(shared.n, shape, next(iter(matching.parameters.values())))
        matching.check(begun[0], labels)
        x = min(begun, key=value).detach().clone().requires_grad_()
        best, found, seen = value(x), x.detach().clone(), [value(x)]
        search: dict[str, Any] = dict(max_iter=20, history_size=100, tolerance_grad=0.0, tolerance_change=0.0)
        optimizer = torch.optim.LBFGS([x], **search, line_search_fn="strong_wolfe")

        def closure() -> float:
            x.grad = None
            cost = objective(x)
            cost.backward(inputs=[x])
            return float(cost.detach())

        for i in range(self.iterations):
            optimizer.step(closure)
            seen.append(value(x))
            if progress is not None:
                progress(i, seen[-1])
            if seen[-1] < best:
                best, found = seen[-1], x.detach().clone()
            if not math.isfinite(seen[-1]) or (len(seen) > 5 and min(seen[-5:]) > min(seen[:-5]) - 1e-4):  # nats
                break
        found = found.clamp(self.low, self.high)
        seen[-1] = value(found)
        pairs = zip(differences(found.requires_grad_()), widths, strict=True)
        told = torch.cat([u.detach()[w.isfinite()] for u, w in pairs])
        return Reconstruction(found.detach(), labels, tuple(seen), self.misfit.fits(told), 1)

    def _begun(self, n: int, shape: tuple[int, ...], like: Tensor) -> list[Tensor]:
        """Where the search may start."""
        wrong = [f"a start is {list(start.shape)}" for start in self.starts if start.shape != (n, *shape)]
        if self.prior is not None and self.prior.mean.shape != shape:
            wrong.append(f"the prior is of inputs {list(self.prior.mean.shape)}")
        if wrong:
            raise ValueError(f"{wrong[0]}; searched for is [{n}, ...] with inputs of {list(shape)}.")
        begun = [start.to(like).clamp(self.low, self.high) for start in self.starts]
        if self.prior is not None:
            begun.append(self.prior.mean.to(like).expand(n, *shape))
        if not begun:
            generator = torch.Generator().manual_seed(self.seed)
            x = torch.rand(n, *shape, generator=generator, dtype=torch.float64).to(like)
            begun = [self.low + (self.high - self.low) * x]
        return [x.detach().clone() for x in begun]
