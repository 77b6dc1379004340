"""Gradient inversion: inputs whose gradient is the one that was shared.

The attacker runs the model on inputs of its own and moves them until their gradient matches. Whether it matches the
attacker sees; whether the inputs are then the client's, not. A search that has not matched says nothing about privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import packext as px
from packext.attacks._objectives import clipped, cosine_distance, squared_distance, total_variation
from packext.attacks._shared import Shared, Threat


@dataclass(frozen=True)
class Reconstruction:
    """What an inversion found: the best of its restarts, by what the attacker can see.

    Attributes:
        inputs: `[N, ...]`; for text, vectors in place of the embeddings.
        labels: `[N]`, int64; those that were given, where they were known.
        objective: of each iteration of the best restart; the last is that of `inputs`.
        matched: whether the gradient was matched: the last objective is below the attack's `tolerance`. A gradient with
            noise or without some entries is that of no input, and is not matched even where inputs are recovered.
        restarts: how many were made.
    """

    inputs: Tensor
    labels: Tensor
    objective: tuple[float, ...]
    matched: bool
    restarts: int


class Matching:
    """The gradient of a model on inputs that are searched for, as a differentiable function of them."""

    def __init__(
        self,
        model: nn.Module,
        shared: Shared,
        forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
        mask: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take the model, what was shared, how the model is run on what is searched for, and what is to be matched."""
        self.model, self.shared = model, shared
        held = dict(model.named_parameters())
        unknown = [name for name in shared.gradient if name not in held]
        if unknown or not shared.gradient:
            raise px.PackextError(f"{unknown or 'Nothing'} was shared; the model's parameters are {', '.join(held)}.")
        for name, g in shared.gradient.items():
            if g.shape != held[name].shape or not g.isfinite().all():
                fits = g.shape == held[name].shape
                what = "entries that are not finite" if fits else f"shape {list(g.shape)} for {list(held[name].shape)}"
                raise px.PackextError(f"The shared gradient of {name!r} has {what}.")
        wrong = {k: list(m.shape) for k, m in (mask or {}).items() if k not in held or m.shape != held[k].shape}
        if wrong:
            raise px.PackextError(f"The mask has entries that fit no parameter: {wrong}.")
        self.mask = (
            None if mask is None else [mask.get(k, torch.ones_like(g)).to(g) for k, g in shared.gradient.items()]
        )
        self.parameters = {name: held[name].detach().requires_grad_() for name in shared.gradient}
        self.rest = {name: p.detach() for name, p in held.items() if name not in self.parameters}
        self.rest |= {name: b.clone() for name, b in model.named_buffers()}
        self.target = self.seen([g.detach() for g in shared.gradient.values()])
        self.forward = forward

    def outputs(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        """The model's output with given parameters; its gradient can be differentiated, that of attention too."""
        values = {**parameters, **{k: v.clone() for k, v in self.rest.items()}}
        with sdpa_kernel(SDPBackend.MATH):  # of the faster kernels torch has no second derivative
            if self.forward is None:
                return torch.func.functional_call(self.model, values, (x,))
            return torch.func.functional_call(
                _Call(self.model, self.forward), {f"model.{k}": v for k, v in values.items()}, (x,)
            )

    def check(self, x: Tensor, y: Tensor) -> None:
        """Refuse what tells nothing, with a PackextError, and with a ValueError inputs and labels that do not fit."""
        if not any(t.any() for t in self.target):
            raise px.PackextError(
                f"What is to be matched of the gradient of {self.shared.n} sample(s) is zero: it tells nothing of the "
                "inputs, and those of any sample whose loss is flat would match it."
            )
        try:
            with torch.no_grad():
                self.shared.loss_fn(self.outputs(self.parameters, x), y)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise ValueError(
                f"Model and loss do not take inputs {list(x.shape)} with labels {list(y.shape)}: {error}. "
                f"shape= is that of one input of {self.shared.n}, classes= the number of the model's outputs, and "
                "labels= are one for each input."
            ) from error

    def seen(self, gradient: list[Tensor]) -> list[Tensor]:
        """Of a gradient, what is to be matched; zeros for the rest."""
        return gradient if self.mask is None else [g * m for g, m in zip(gradient, self.mask, strict=True)]

    def gradient(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Of the loss on inputs and labels (of classes, or soft), with a graph back to both."""
        loss = self.shared.loss_fn(self.outputs(self.parameters, x), y)
        return list(
            torch.autograd.grad(
                loss, list(self.parameters.values()), create_graph=True, allow_unused=True, materialize_grads=True
            )
        )


class _Call(nn.Module):
    """A model that is run by a function."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.run = model, forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.model, x)


@dataclass(frozen=True)
class DeepLeakage:
    """Deep Leakage from Gradients: inputs and soft labels by L-BFGS on the squared distance of gradients.

    Needs a model that is twice differentiable; with ReLU and max-pooling the search has little to go by. With labels
    given it is iDLG (Zhao et al. 2020), and `packext.attacks.IDLG` or another rule gives them.

    - Formula: inputs x (and logits of labels) of the least `|G(x) - G*|² / |G*|²`, with G(x) the gradient of the loss
      at x and G* what was shared
    - Cost: up to 20 steps of L-BFGS for each iteration, each one or more gradients that are differentiated
    - Source: Zhu, Liu & Han, NeurIPS 2019, there without the division
    - Refused: both or neither of `classes` and `labels`; gradients or masks that do not fit the model; a gradient of
      zero; `clip` with several samples

    Args:
        iterations: outer ones, of up to 20 steps of L-BFGS.
        restarts: searches from new random inputs, until one has matched.
        in_turn: of several samples each outer iteration moves one, as the paper has it, and not all.
        line_search: strong Wolfe. Without, as in the paper's code, a search may blow up and stay there.
        tolerance: on the objective (the squared distance over the squared norm of what was shared): matched below.
        seed: of the random inputs.
        clip: the norm to which the client clips the gradient of its one sample, if it does: G(x) is clipped as well.
    """

    iterations: int = 100
    restarts: int = 1
    in_turn: bool = False
    line_search: bool = True
    tolerance: float = 1e-6
    seed: int = 0
    clip: float | None = None

    threat: ClassVar[Threat] = Threat(
        "one client's gradient of all parameters",
        "the model, the batch size, the input's shape",
        "honest",
        "one local step; a smooth model; small batches",
    )
    """Who attacks, and what must hold."""

    def __post_init__(self) -> None:
        """Refuse a search that would find nothing."""
        if self.iterations < 1 or self.restarts < 1 or not (self.clip is None or self.clip > 0):
            raise ValueError(f"need iterations >= 1, restarts >= 1 and a positive clip or None, got {self}.")

    def __call__(
        self,
        model: nn.Module,
        shared: Shared,
        shape: tuple[int, ...],
        classes: int | tuple[int, ...] | None = None,
        labels: Tensor | None = None,
        forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
        mask: Mapping[str, Tensor] | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> Reconstruction:
        """Search.

        Args:
            model: with the parameters at which the gradient was taken, in the client's mode.
            shared: what the client sent.
            shape: of one input.
            classes: how many there are, where labels are searched for: among probabilities, which add up to 1. What a
                loss takes beside (several classes of one sample, numbers) is not among them, and nothing is matched. Of
                samples with several labels, as each token of a text has one, the output's shape: `(C, T)`.
            labels: `[N]`, or `[N, ...]` for other losses than of classes, where they are known.
            forward: how the model is run on what is searched for; `model(x)` by default.
            mask: entries that are matched, by parameter name, such as `packext.attacks.sent` gives; all by default.
            progress: called after each outer iteration with its number and the objective.

        Returns:
            The best restart.

        Raises:
            ValueError: unless one of `classes` and `labels` is given, or if the model does not take such inputs, or the
                loss such labels; for `clip` with several samples.
        """
        if (classes is None) == (labels is None):
            raise ValueError("give classes=<number> to search for labels as well, or labels=<tensor> that are known.")
        if self.clip is not None and shared.n != 1:
            raise ValueError(
                f"clip={self.clip} is of the gradient of one sample; of {shared.n}, each was clipped before they were "
                "added up: InvertingGradients is blind to a factor on the whole."
            )
        matching = Matching(model, shared, forward, mask)
        like = next(iter(matching.parameters.values()))
        found: list[Reconstruction] = []
        while len(found) < self.restarts and not (found and found[-1].matched):
            generator = torch.Generator().manual_seed(self.seed + len(found))
            x = torch.randn(shared.n, *shape, generator=generator, dtype=torch.float64).to(like)
            y = labels
            if y is None:
                each = classes if isinstance(classes, tuple) else (classes,)
                y = torch.randn(shared.n, *each, generator=generator, dtype=torch.float64).to(like)  # type: ignore[arg-type]
            if not found:
                matching.check(x, y if labels is not None else y.softmax(1))
            found.append(self._search(matching, x, y, labels is None, progress))
        return _best(found)

    def _search(
        self, matching: Matching, x: Tensor, y: Tensor, soft: bool, progress: Callable[[int, float], None] | None
    ) -> Reconstruction:
        """One search from given inputs, and from logits of labels where those are soft and searched for as well."""
        size = 1 if self.in_turn else len(x)
        rows = [part.clone().requires_grad_() for part in x.split(size)]
        words = [part.clone().requires_grad_(soft) for part in y.split(size)]
        n = len(rows)
        # The default tolerances are absolute: a search would end while images still become sharper.
        search: dict[str, Any] = dict(max_iter=20, history_size=100, tolerance_grad=0.0, tolerance_change=0.0)
        search |= {"line_search_fn": "strong_wolfe"} if self.line_search else {}
        optimizers = [torch.optim.LBFGS([rows[i], *([words[i]] if soft else [])], **search) for i in range(n)]

        def objective() -> Tensor:
            whole = torch.cat(words)
            if soft:
                whole = whole.softmax(1)
            found = matching.gradient(torch.cat(rows), whole)
            if soft:
                found = [_divisor(matching.shared.loss_fn, whole) * g for g in found]
            if self.clip is not None:
                found = clipped(found, self.clip)
            return squared_distance(matching.seen(found), matching.target)

        def closure() -> float:
            for tensor in [*rows, *words]:
                tensor.grad = None
            value = objective()
            value.backward(inputs=[t for t in [*rows, *words] if t.requires_grad])
            return float(value.detach())

        seen: list[float] = []
        best, kept = math.inf, (torch.cat(rows).detach(), torch.cat(words).detach())
        for i in range(self.iterations):
            optimizers[i % n].step(closure)
            value = float(objective().detach())
            seen.append(value)
            if progress is not None:
                progress(i, value)
            if value < best:
                best, kept = value, (torch.cat(rows).detach(), torch.cat(words).detach())
            stuck = len(seen) > 5 * n and min(seen[-5 * n :]) > (1 - 1e-4) * min(seen[: -5 * n])
            if not math.isfinite(value) or best < 1e-4 * self.tolerance or stuck:
                break
        x, y = kept
        seen[-1] = best if math.isfinite(best) else seen[-1]
        return Reconstruction(x, y.argmax(1) if soft else y, tuple(seen), best < self.tolerance, 1)


def _divisor(loss_fn: nn.Module, soft: Tensor) -> Tensor | float:
    """What makes a mean for soft labels one over class weights, as it is for classes: there torch divides by N."""
    if not isinstance(loss_fn, nn.CrossEntropyLoss) or loss_fn.weight is None or loss_fn.reduction != "mean":
        return 1.0
    return len(soft) / (soft @ loss_fn.weight.to(soft)).sum()


@dataclass(frozen=True)
class LocalSteps:
    """What a client of FedAvg did between what it received and what it sent.

    Attributes:
        steps: of plain SGD, each on the next `batch` samples, from the start again after the last.
        lr: of them.
        batch: samples of a step; all by default.
    """

    steps: int
    lr: float
    batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse steps that would not be taken."""
        if self.steps < 1 or not self.lr > 0 or (self.batch is not None and self.batch < 1):
            raise ValueError(f"need steps >= 1, lr > 0 and batch >= 1, got {self}.")

    def part(self, step: int, n: int) -> slice:
        """The samples of a step."""
        size = min(self.batch or n, n)
        start = step % math.ceil(n / size) * size
        return slice(start, min(start + size, n))


def share_update(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, local: LocalSteps) -> Shared:
    """What a client of FedAvg sends after local steps, as a gradient: `(received - sent) / lr`.

    Args:
        model: as the client received it; stays as it is.
        loss_fn: with `reduction` "mean" or "sum".
        x: all samples `[N, ...]`.
        y: their labels `[N]`.
        local: what the client does.

    Returns:
        The sum of the steps' gradients.
    """
    matching = Matching(model, Shared({k: p for k, p in model.named_parameters() if p.requires_grad}, len(y), loss_fn))
    steps = zip(matching.parameters, unrolled(matching, x, y, local), strict=True)
    return Shared.of({k: g.detach() for k, g in steps}, loss_fn, y)


def unrolled(matching: Matching, x: Tensor, y: Tensor, local: LocalSteps | None) -> list[Tensor]:
    """The sum of gradients along local steps, with a graph back to the inputs if they require grad."""
    if local is None:
        return matching.gradient(x, y)
    now, names = dict(matching.parameters), list(matching.parameters)
    for step in range(local.steps):
        part = local.part(step, len(y))
        loss = matching.shared.loss_fn(matching.outputs(now, x[part]), y[part])
        grads = torch.autograd.grad(
            loss, list(now.values()), create_graph=x.requires_grad, allow_unused=True, materialize_grads=True
        )
        now = {name: now[name] - local.lr * g for name, g in zip(names, grads, strict=True)}
    return [(matching.parameters[name] - now[name]) / local.lr for name in names]


@dataclass(frozen=True)
class InvertingGradients:
    """Inverting Gradients: cosine distance and total variation, by signed Adam in a box.

    Blind to a factor on the gradient, so that clipping alone does not stop it; labels are to be known. Local steps of
    FedAvg are unrolled.

    - Formula: x in `[low, high]` of the least `1 - G(x)·G* / (|G(x)| |G*|) + tv TV(x)`, with G(x) the gradient of the
      loss at x, G* what was shared, and TV the mean absolute difference of neighbours down plus that of neighbours
      across
    - Cost: for each iteration a gradient that is differentiated; with local steps, one of each of them
    - Source: Geiping et al., NeurIPS 2020
    - Refused: a total variation of what are no images `[N, C, H, W]`; gradients or masks that do not fit the model; a
      gradient of zero

    Args:
        iterations: of Adam, whose rate falls tenfold at 3/8, 5/8 and 7/8 of them.
        restarts: searches from new random inputs; the best is kept.
        lr: of Adam.
        tv: weight of the total variation, for images `[C, H, W]`.
        low: bound of the inputs.
        high: bound of the inputs.
        local: what a client of FedAvg did.
        tolerance: on the cosine distance: matched below.
        seed: of the random inputs.
    """

    iterations: int = 1000
    restarts: int = 1
    lr: float = 0.1
    tv: float = 1e-4
    low: float = 0.0
    high: float = 1.0
    local: LocalSteps | None = None
    tolerance: float = 1e-5
    seed: int = 0

    threat: ClassVar[Threat] = Threat(
        "one client's gradient of all parameters",
        "the model, the labels, the input's shape and range",
        "honest",
        "small batches; few local steps, known",
    )
    """Who attacks, and what must hold."""

    def __post_init__(self) -> None:
        """Refuse a search that would find nothing."""
        if self.iterations < 1 or self.restarts < 1 or not self.low < self.high:
            raise ValueError(f"need iterations >= 1, restarts >= 1 and low < high, got {self}.")

    def __call__(
        self,
        model: nn.Module,
        shared: Shared,
        shape: tuple[int, ...],
        labels: Tensor,
        mask: Mapping[str, Tensor] | None = None,
        progress: Callable[[int, float], None] | None = None,
        forward: Callable[[nn.Module, Tensor], Tensor] | None = None,
    ) -> Reconstruction:
        """Search.

        Args:
            model: with the parameters at which the gradient was taken, in the client's mode.
            shared: what the client sent.
            shape: of one input.
            labels: `[N]`.
            mask: entries that are matched, by parameter name, such as `packext.attacks.sent` gives; all by default.
            progress: called after each iteration with its number and the cosine distance before its step.
            forward: how the model is run on what is searched for; `model(x)` by default.

        Returns:
            The best restart.
        """
        matching = Matching(model, shared, forward, mask)
        like = next(iter(matching.parameters.values()))
        found: list[Reconstruction] = []
        for restart in range(self.restarts):
            generator = torch.Generator().manual_seed(self.seed + restart)
            x = torch.rand(shared.n, *shape, generator=generator, dtype=torch.float64).to(like)
            x = (self.low + (self.high - self.low) * x).requires_grad_()
            if not found:
                matching.check(x, labels)
            adam = torch.optim.Adam([x], self.lr)
            at = [int(self.iterations * k / 8) for k in (3, 5, 7)]
            schedule = torch.optim.lr_scheduler.MultiStepLR(adam, at)
            seen: list[float] = []

            def objective(x: Tensor = x) -> Tensor:
                return cosine_distance(matching.seen(unrolled(matching, x, labels, self.local)), matching.target)

            for i in range(self.iterations):
                distance = objective()
                whole = distance + self.tv * total_variation(x) if self.tv else distance
                x.grad = torch.autograd.grad(whole, x)[0].sign()
                adam.step()
                schedule.step()
                with torch.no_grad():
                    x.clamp_(self.low, self.high)
                seen.append(float(distance.detach()))
                if progress is not None:
                    progress(i, seen[-1])
                if not math.isfinite(seen[-1]):
                    break
            seen[-1] = float(objective().detach())  # each was before its step
            found.append(Reconstruction(x.detach().clone(), labels, tuple(seen), seen[-1] < self.tolerance, 1))
        return _best(found)


def _best(found: Sequence[Reconstruction]) -> Reconstruction:
    """The restart with the lowest objective; one that has ended in NaN is the last choice."""
    best = min(found, key=lambda one: one.objective[-1] if math.isfinite(one.objective[-1]) else math.inf)
    return replace(best, restarts=len(found))
