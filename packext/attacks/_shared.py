"""What a client sends, what is known of an attacker, and which layer tells labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import packext as px


@dataclass(frozen=True)
class Threat:
    """Who attacks: what they see, what they know beforehand, and what they must be able to do.

    Attributes:
        sees: what reaches the attacker.
        knows: what they know besides.
        server: "honest" if they follow the protocol and look, "malicious" if they choose what clients compute.
        assumes: what must hold for the attack to work.
    """

    sees: str
    knows: str
    server: str
    assumes: str


@dataclass(frozen=True)
class Shared:
    """What leaves a client: the gradient of its loss over a batch, before or after a defence.

    Attributes:
        gradient: by parameter name, in the parameters' shapes.
        n: samples in the batch.
        loss_fn: whose gradient it is.
        labels: of the batch that a cross-entropy is the mean (or sum) of: not n where a sample has one for each of its
            positions, or some are ignored, or are probabilities of several; None if not known.
    """

    gradient: Mapping[str, Tensor]
    n: int
    loss_fn: nn.Module
    labels: int | None = None

    @classmethod
    def of(cls, gradient: Mapping[str, Tensor], loss_fn: nn.Module, y: Tensor) -> Shared:
        """A gradient and what it is of.

        Args:
            gradient: by parameter name.
            loss_fn: whose it is.
            y: labels of the batch, classes `[N, ...]` or probabilities `[N, C, ...]`.

        Returns:
            Both, with the labels that a cross-entropy counts: none that is ignored; of probabilities the sure ones.
        """
        labels = None
        if isinstance(loss_fn, nn.CrossEntropyLoss):
            labels = int(((y == 1).any(1) if y.is_floating_point() else y != loss_fn.ignore_index).sum())
        return cls(gradient, len(y), loss_fn, labels)

    @property
    def summed(self) -> float:
        """The factor from the gradient as sent to the sum over samples: `n` for a mean, 1 for a sum."""
        if not hasattr(self.loss_fn, "reduction"):
            raise px.PackextError(
                f"Of a {type(self.loss_fn).__name__} without `reduction` it is not known whether it is a mean or a sum "
                "over samples: take a module for the loss, such as nn.CrossEntropyLoss()."
            )
        return float(self.n) if self.loss_fn.reduction in ("mean", "batchmean") else 1.0


def share(model: nn.Module, loss_fn: nn.Module, x: Any, y: Tensor, state: Mapping[str, Tensor] | None = None) -> Shared:
    """The gradient that a client with one batch sends (FedSGD: one local step).

    Model, gradients and buffers stay as they are.

    Args:
        model: as the client received it, in the mode (`train` or `eval`) in which it is run.
        loss_fn: with `reduction` "mean" ("batchmean") or "sum", called as `loss_fn(model(x), y)`.
        x: the batch, or a tuple of the model's arguments.
        y: labels `[N, ...]`.
        state: parameters and buffers to run the model with instead of its own, by name.

    Returns:
        The gradient of every parameter that requires it; zeros for one that the loss does not depend on.

    Raises:
        PackextError: if the loss is no scalar, or depends on no parameter; or the model has none of a name in `state`.
    """
    own = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    first: dict[int, str] = {}  # a tensor with several names goes by the first, as in `own`
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    names = {name: first.setdefault(id(value), name) for name, value in held}
    for name, value in (state or {}).items():
        if name not in names:
            raise px.PackextError(
                f"{type(model).__name__} has no parameter or buffer {name!r}; it has {', '.join(names)}."
            )
        if names[name] in own:
            own[names[name]] = value.detach().clone().requires_grad_()
        else:
            buffers[names[name]] = value.detach().clone()
    loss = loss_fn(torch.func.functional_call(model, {**own, **buffers}, x), y)
    if loss.dim() or not loss.requires_grad:
        raise px.PackextError(
            f"A client shares the gradient of a scalar loss that depends on the model: {type(loss_fn).__name__} gave a "
            f"tensor of shape {list(loss.shape)}" + ("" if loss.requires_grad else " that requires no grad") + ". "
            'Use reduction="mean" or "sum", and train at least one parameter.'
        )
    grads = torch.autograd.grad(loss, list(own.values()), allow_unused=True, materialize_grads=True)
    return Shared.of({name: g.detach() for name, g in zip(own, grads, strict=True)}, loss_fn, y)


def sent(shared: Shared) -> dict[str, Tensor]:
    """Entries that were sent, for an attacker who knows that others were set to zero (pruning, Soteria).

    Args:
        shared: by a client.

    Returns:
        A mask, true where an entry is not zero, by parameter name.
    """
    return {name: g != 0 for name, g in shared.gradient.items()}


def without(shared: Shared, *modules: str) -> Shared:
    """What was shared but for some modules, for an attacker who knows that their gradients mislead.

    Args:
        shared: by a client.
        modules: names of modules, or of parameters.

    Returns:
        The gradients of all other parameters.

    Raises:
        PackextError: if a module has no gradient in what was shared, or nothing would be left.
    """
    of = {m: [name for name in shared.gradient if name == m or name.startswith(f"{m}.")] for m in modules}
    rest = {name: g for name, g in shared.gradient.items() if not any(name in names for names in of.values())}
    if not all(of.values()) or not rest:
        what = "Nothing would be left" if all(of.values()) else f"{[m for m in of if not of[m]]} was not shared"
        raise px.PackextError(f"{what}; what was shared are gradients of {', '.join(shared.gradient)}.")
    return replace(shared, gradient=rest)


@dataclass(frozen=True)
class Head:
    """The last fully connected layer of a classifier: D features to C logits.

    Attributes:
        name: of the module in the model.
        weight: `[C, D]`.
        bias: `[C]`, or None.
    """

    name: str
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None) -> Head:
        """Find it.

        Args:
            model: the classifier.
            name: of the layer; by default the last `nn.Linear` among the model's modules.

        Returns:
            The layer.

        Raises:
            PackextError: if there is none, or it is no `nn.Linear`.
        """
        linear = [k for k, m in model.named_modules() if isinstance(m, nn.Linear)]
        if name is None and not linear:
            raise px.PackextError(f"{type(model).__name__} has no nn.Linear whose gradient could tell labels.")
        name = linear[-1] if name is None else name
        layer = dict(model.named_modules()).get(name)
        if not isinstance(layer, nn.Linear):
            what = f"no module of {type(model).__name__}" if layer is None else f"a {type(layer).__name__}"
            raise px.PackextError(f"{name!r} is {what}; the last layer must be an nn.Linear.")
        return cls(name, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())

    def weight_gradient(self, shared: Shared) -> Tensor:
        """Of the layer in what was shared `[C, D]`, float64, for the sum over samples."""
        return self._part(shared, "weight", self.weight)

    def bias_gradient(self, shared: Shared) -> Tensor:
        """Of the layer in what was shared `[C]`, float64, for the sum over samples."""
        if self.bias is None:
            raise px.PackextError(f"{self.name!r} has no bias, whose gradient this attack reads.")
        return self._part(shared, "bias", self.bias)

    def _part(self, shared: Shared, part: str, like: Tensor) -> Tensor:
        name = f"{self.name}.{part}" if self.name else part
        if name not in shared.gradient:
            raise px.PackextError(f"{name!r} is not in what was shared: {', '.join(shared.gradient) or 'nothing'}.")
        g = shared.gradient[name]
        if g.shape != like.shape or not g.isfinite().all():
            what = f"shape {list(g.shape)} for {list(like.shape)}" if g.shape != like.shape else "entries not finite"
            raise px.PackextError(f"The gradient of {name!r} has {what}: nothing can be read off it.")
        return g.double() * shared.summed


def one_label_each(shared: Shared) -> None:
    """Refuse what was shared of samples with more or fewer labels than one.

    Args:
        shared: by a client.

    Raises:
        PackextError: if it is known to be of another number of labels than of samples.
    """
    if shared.labels not in (None, shared.n):
        raise px.PackextError(
            f"The loss of these {shared.n} samples counts {shared.labels} labels: rules are of one label for each "
            "sample, none for each token, none that is ignored (ignore_index), and no probabilities of several."
        )


def plain_cross_entropy(loss_fn: nn.Module) -> None:
    """Refuse a loss whose gradient at the logits is not `p - y` for each sample.

    Args:
        loss_fn: of the client.

    Raises:
        PackextError: unless it is `nn.CrossEntropyLoss` with nothing but a reduction.
    """
    got = type(loss_fn).__name__
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        weight, ignored, smoothing = loss_fn.weight, loss_fn.ignore_index, loss_fn.label_smoothing
        if weight is None and ignored < 0 and smoothing == 0.0 and loss_fn.reduction in ("mean", "sum"):
            return
        got += f"(weight={'None' if weight is None else list(weight.shape)}, ignore_index={ignored}, "
        got += f"label_smoothing={smoothing}, reduction={loss_fn.reduction!r})"
    raise px.PackextError(
        "Labels are read off gradients of nn.CrossEntropyLoss without class weights, label smoothing and a class that "
        f'is ignored, with reduction "mean" or "sum"; got {got}.'
    )
