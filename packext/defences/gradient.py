"""Defences on the gradient that leaves a client: noise, pruning, quantisation, sparsification, clipping.

All but `Clipped` take what would be shared and give what is shared instead. `Clipped` needs individual gradients and
takes the place of `packext.attacks.share`. `Compose` chains them.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.attacks import Shared


class _Drawing:
    """What draws from a generator of its own: without a seed each copy from another one, as each client does."""

    seed: int | None
    _drawn: tuple[int, torch.Generator] | None = None

    @property
    def _generator(self) -> torch.Generator:
        if self._drawn is None or (self.seed is None and self._drawn[0] != os.getpid()):  # a fork is a copy as well
            seed = secrets.randbits(32) if self.seed is None else self.seed
            self._drawn = os.getpid(), torch.Generator().manual_seed(seed)
        return self._drawn[1]

    def __getstate__(self) -> dict[str, Any]:
        """For copies: with its generator only where a seed says that they draw the same."""
        return {k: v for k, v in self.__dict__.items() if k != "_drawn" or self.seed is not None}


def _each(shared: Shared, f: Callable[[str, Tensor], Tensor]) -> Shared:
    return replace(shared, gradient={name: f(name, g) for name, g in _gradient(shared).items()})


def _gradient(shared: Shared) -> Mapping[str, Tensor]:
    if not isinstance(shared, Shared):
        raise TypeError(
            f"A defence acts on what attacks.share(model, loss_fn, x, y) returns, got a {type(shared).__name__}."
        )
    return shared.gradient


def replaces_share(defence: Callable[..., Any]) -> bool:
    """Whether a defence takes the place of `packext.attacks.share` (model, loss, x, y), and not its result.

    Args:
        defence: of a client.

    Returns:
        True for one such as `Clipped`, False for one such as `Pruning`; of several what the first is.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(defence, Compose):
        return replaces_share(defence.defences[0])
    needed = -1
    if callable(defence):
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(defence).parameters.values()
        needed = sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)
    if needed not in (1, 4):
        raise ValueError(
            f"a defence is called with what is shared, or with (model, loss_fn, x, y) as packext.attacks.share is; "
            f"{defence!r} is neither."
        )
    return needed == 4


class Compose:
    """Defences one after the other.

    The first may take the place of `packext.attacks.share`, as `Clipped` does, and the whole takes it then.

    Attributes:
        defences: in their order; of one that is a `Compose` itself, its own.
    """

    def __init__(self, *defences: Callable[..., Shared]) -> None:
        """Take them in the order in which they act.

        Raises:
            TypeError: for none, a list, a class, or one after the first that takes the place of `attacks.share`.
        """
        bad = [d for d in defences if not callable(d) or isinstance(d, type)]
        if bad or not defences:
            got = repr(bad[0]) if bad else "none"
            raise TypeError(f"Compose takes defences one by one: Compose(Pruning(0.5), TopK(0.1)), got {got}.")
        self.defences = [p for d in defences for p in (d.defences if isinstance(d, Compose) else [d])]
        for defence in self.defences[1:]:
            if replaces_share(defence):
                raise TypeError(
                    f"{defence!r} takes the place of attacks.share and can only be the first: Compose(Clipped(1.0), "
                    "Pruning(0.5))."
                )

    def __call__(self, *given: Any, **named: Any) -> Shared:
        """What the last one gives.

        Args:
            *given: as the first one takes: what would be shared, or model, loss, inputs and labels.
            **named: the same.

        Returns:
            What is shared instead.
        """
        shared = self.defences[0](*given, **named)
        for defence in self.defences[1:]:
            shared = defence(shared)
        return shared

    def __repr__(self) -> str:  # noqa: D105
        return " + ".join(map(repr, self.defences))


@dataclass
class GaussianNoise(_Drawing):
    """Adds noise of a standard deviation to every entry, whatever the gradient's size: no privacy by itself.

    - Formula: `g + std z`, z of independent standard normal draws
    - Cost: a draw for each entry
    - Source: as a defence, Zhu, Liu & Han, NeurIPS 2019
    - Refused: a negative level

    Attributes:
        std: standard deviation, in units of the gradient.
        seed: of the draws, which go on from call to call; unpredictable by default. Who knows it subtracts the noise.
    """

    std: float
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse a negative level."""
        _not_negative("std", self.std)

    def __call__(self, shared: Shared) -> Shared:
        """Noise added."""
        return _each(shared, lambda _, g: g + self.std * _normal(g, self._generator))


@dataclass
class LaplacianNoise(_Drawing):
    """Adds Laplacian noise to every entry, whatever the gradient's size: no privacy by itself.

    - Formula: `g + scale z`, z of independent draws with the density `exp(-|z|) / 2`
    - Cost: two draws for each entry
    - Source: as a defence, Zhu, Liu & Han, NeurIPS 2019
    - Refused: a negative level

    Attributes:
        scale: mean absolute value of the noise, in units of the gradient.
        seed: of the draws, which go on from call to call; unpredictable by default. Who knows it subtracts the noise.
    """

    scale: float
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse a negative level."""
        _not_negative("scale", self.scale)

    def __call__(self, shared: Shared) -> Shared:
        """Noise added."""

        def noisy(_: str, g: Tensor) -> Tensor:
            u = torch.rand(2, *g.shape, generator=self._generator, dtype=torch.float64).clamp_min(1e-300).log()
            return g + self.scale * (u[0] - u[1]).to(g)  # the difference of two exponential variables

        return _each(shared, noisy)


@dataclass(frozen=True)
class Pruning:
    """Sets the entries of smallest magnitude to zero, in each tensor by itself.

    - Formula: 0 for the `int(share P)` smallest |g_d| of P entries, g_d for the others
    - Cost: the entries are sorted
    - Source: as a defence, Zhu, Liu & Han, NeurIPS 2019
    - Refused: what is no share

    Attributes:
        share: of the entries that are set to zero, from 0 to 1.
    """

    share: float

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        _share(self.share)

    def __call__(self, shared: Shared) -> Shared:
        """The rest."""

        def prune(_: str, g: Tensor) -> Tensor:
            return _largest(g, g.numel() - pruned_of(g.numel(), self.share))

        return _each(shared, prune)


def pruned_of(count: int, share: float) -> int:
    """How many of `count` a share is, rounded down."""
    return int(share * count + 1e-9)  # 0.29 * 100 is below 29


def _largest(g: Tensor, count: int) -> Tensor:
    """The entries of largest magnitude, and zeros for the rest."""
    kept, flat = torch.zeros_like(g).flatten(), g.flatten()
    order = flat.abs().argsort(descending=True)[:count]
    kept[order] = flat[order]
    return kept.view_as(g)


@dataclass
class Quantisation(_Drawing):
    """Rounds entries: to a shorter float, or to the 255 whole multiples of 1/127 of the tensor's largest magnitude.

    - Formula: of "int8" `s round(g / s)` with `s = max |g| / 127`; stochastic `s floor(g / s + u)`, u uniform in `[0,
      1)`
    - Cost: one operation for each entry; stochastic a draw
    - Source: as a defence, Zhu, Liu & Han, NeurIPS 2019
    - Refused: another kind; entries beyond what a shorter float holds

    Attributes:
        kind: "float16", "bfloat16" or "int8".
        stochastic: for "int8", rounds up with the probability that leaves the mean as it is (of a gradient in half
            precision, before what is decoded is rounded to that).
        seed: of the draws; unpredictable by default.
    """

    kind: str
    stochastic: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse another kind."""
        if self.kind not in ("float16", "bfloat16", "int8") or (self.stochastic and self.kind != "int8"):
            raise ValueError(
                f'kind must be "float16", "bfloat16" or "int8" (which may be stochastic), got {self.kind!r}.'
            )

    def __call__(self, shared: Shared) -> Shared:
        """What the receiver decodes."""
        return _each(shared, self._rounded)

    def _rounded(self, name: str, g: Tensor) -> Tensor:
        if self.kind != "int8":
            short = g.to(getattr(torch, self.kind))
            if (short.isinf() & g.isfinite()).any():
                raise px.PackextError(
                    f"Quantisation: the gradient of {name} {list(g.shape)} has entries beyond what {self.kind} holds: "
                    'take "int8", which has a scale for each tensor, or a mean for the loss\'s reduction.'
                )
            return short.to(g.dtype)
        wide = _widened(g)
        step = wide.abs().max() / 127
        if not step:
            return g.clone()
        levels = wide / step
        if self.stochastic:
            levels = (levels + torch.rand(g.shape, generator=self._generator).to(wide)).floor()
        else:
            levels = levels.round()
        return (levels.clamp(-127, 127) * step).to(g.dtype)


@dataclass
class TopK:
    """Sends the entries of largest magnitude, and adds the others to the next gradient (error feedback).

    What was held back stays with the client; nothing else remembers it, so each client has a `TopK` of its own. Of an
    entry that has become larger than the gradient's type holds, what it holds is sent.

    - Formula: `r <- r + g`, send the entries of r with the largest magnitudes, and `r <- r - sent`, with r the residual
    - Cost: the entries are sorted; holds a copy of the gradient
    - Source: Stich et al. 2018, Algorithm 1
    - Refused: what is no share; a gradient that is not finite, which the residual would never be rid of

    Attributes:
        share: of the entries that are sent, from 0 to 1, in each tensor by itself; rounded up.
        residual: what was held back, by name, in float32 or better.
    """

    share: float
    residual: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        _share(self.share)

    def __call__(self, shared: Shared) -> Shared:
        """What is sent; `residual` is brought up to date."""
        bad = [f"{name} {list(g.shape)}" for name, g in _gradient(shared).items() if not g.isfinite().all()]
        if bad:
            raise px.PackextError(f"TopK: the gradient of {', '.join(bad)} is not finite. The residual is as it was.")

        def send(name: str, g: Tensor) -> Tensor:
            whole = _widened(g)
            if name in self.residual:
                whole = whole + self.residual[name]
            most = torch.finfo(g.dtype).max
            kept = _largest(whole, math.ceil(self.share * g.numel() - 1e-9))  # 0.07 * 100 is above 7
            sent = kept.clamp(-most, most).to(g.dtype)
            self.residual[name] = whole - sent
            return sent

        return _each(shared, send)


@dataclass
class Clipped(_Drawing):
    """Gradients of samples, each clipped to a norm, summed with noise: the step of DP-SGD.

    Called as `packext.attacks.share` is, in its place. One backward pass; no individual gradient is formed where its
    norm can be had without.

    - Formula: `sum over n of min(1, C / |g_n|) g_n + noise_multiplier C z`, over N for a mean, z of independent
      standard normal draws
    - Cost: `ClippedGrad` in one pass of a copy of the model, and a draw for each entry
    - Source: Abadi et al. 2016 (arXiv:1607.00133), Algorithm 1
    - Refused: a negative level; a norm that is not positive and finite; a model whose samples influence each other
      (BatchNorm in training mode, a mean over class weights or over targets some of which are ignored), or that keeps
      statistics of them in buffers, by the engine

    Attributes:
        max_norm: C, of a sample's gradient over all parameters.
        noise_multiplier: standard deviation of the noise on the sum, over C.
        seed: of the noise, which goes on from call to call; unpredictable by default. Who knows it subtracts the noise.
    """

    max_norm: float
    noise_multiplier: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse a negative level, and a norm that bounds nothing."""
        _not_negative("noise_multiplier", self.noise_multiplier)
        if not 0 < self.max_norm < math.inf:
            raise ValueError(f"max_norm must be positive and finite, got {self.max_norm}.")
        self._quantity = px.ClippedGrad(self.max_norm)
        self._quantity.bounded = object()
        self._quantity.parts = ""  # of one seed, all parts of a parameter would get the same noise

    def __call__(
        self, model: nn.Module, loss_fn: nn.Module, x: Any, y: Tensor, state: Mapping[str, Tensor] | None = None
    ) -> Shared:
        """What the client shares: as `packext.attacks.share`, of clipped gradients.

        Args:
            model: as the client received it, in the mode in which it is run.
            loss_fn: with `reduction` "mean" ("batchmean") or "sum".
            x: the batch, or a tuple of the model's arguments.
            y: labels `[N, ...]`.
            state: parameters and buffers in place of the model's, by name.

        Returns:
            The sum of clipped gradients and noise, over N for a mean. A model whose samples have no gradients of their
            own, as with BatchNorm in training mode, is refused by the engine, and a state with names that the model
            has not by torch.
        """
        model, loss_fn = px.extend(copy.deepcopy(model)), px.extend(copy.deepcopy(loss_fn))
        model.load_state_dict({**model.state_dict(), **(state or {})})
        arguments = x if isinstance(x, tuple) else (x,)
        with px.backpack(self._quantity, attach=False) as results:
            loss_fn(model(*arguments), y).backward()
        factor = 1 / Shared.of({}, loss_fn, y).summed
        std = self.noise_multiplier * self.max_norm
        gradient = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                total = results[name].clipped_grad if name in results else torch.zeros_like(p)
                gradient[name] = (total + std * _normal(total, self._generator)) * factor
        return Shared.of(gradient, loss_fn, y)


def _widened(g: Tensor) -> Tensor:
    """In float32 or better."""
    return g.to(torch.promote_types(g.dtype, torch.float32))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}.")


def _share(value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"share must be between 0 and 1, got {value}.")
