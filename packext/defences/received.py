"""Is the model that a client received a fishing model? Asked of its own data, before anything is sent.

A model whose normalisation was fixed gives every sample the same features (see `packext.attacks.secure`), which
leaves traces that an honest model does not: the features of a batch do not vary, and the last layer's gradient has rank
one. What lies below the normalisation gets none, as some parameters of honest models do whose branch begins at zero
(LoRA, ReZero).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import packext as px
from packext.attacks import NORMS, Head, share


@dataclass(frozen=True)
class Received:
    """What a client finds out about the model that it received.

    Attributes:
        feature_variance: variance of the last layer's input over the batch, relative to its mean square.
        rank_ratio: second singular value of the last layer's gradient (weight and bias) over the first; None with fewer
            than three classes, or one feature and no bias, where the gradient has rank one whatever the model, and of a
            gradient of zero, as of a hinge loss of samples that are learnt.
        without_gradient: parameters whose gradient is exactly zero.
        zero_scales: normalisation layers whose scale is zero in every channel.
        reasons: what speaks for a fishing model; empty if nothing does.
    """

    feature_variance: float
    rank_ratio: float | None
    without_gradient: tuple[str, ...]
    zero_scales: tuple[str, ...]
    reasons: tuple[str, ...]

    @property
    def suspicious(self) -> bool:
        """Whether anything speaks for a fishing model. That nothing does proves nothing."""
        return bool(self.reasons)


#: Below these, features and gradient are taken for fixed. Honest models, trained and not, are two orders of magnitude
#: above, fishing models one and more below.
VARIANCE, RATIO = 1e-3, 2e-3


def check_received(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, head: str | None = None) -> Received:
    """Look for the traces of a fishing model.

    A model whose normalisation was fixed gives all samples the same features. Honest models, trained and not, are two
    orders of magnitude above the thresholds. Parameters without a gradient count beside these traces alone: honest
    models have them as well, where a branch begins at zero (LoRA, ReZero).

    - Formula: suspicious if the features' variance over the batch is below 1e-3 of their mean square, or the second
      singular value of the last layer's gradient is below 2e-3 of the first
    - Cost: one gradient of the batch, and singular values of the last layer's
    - Source: ours, against Wang et al., INFOCOM 2024
    - Refused: fewer than 8 samples, one label, or inputs that vary by less than 1e-2 of their own mean square, whose
      features hardly vary whatever the model

    Args:
        model: as it was received, in the mode in which it would be run.
        loss_fn: of the client.
        x: inputs of at least 8 samples `[N, ...]` that differ.
        y: labels `[N]`, at least two different ones.
        head: name of the last fully connected layer; by default the last `nn.Linear`.

    Returns:
        What was found.

    Raises:
        PackextError: if the batch is too small or too uniform to tell, or the layer is not run.
    """
    if len(y) < 8 or len(y.unique()) < 2 or bool((x == x[:1]).all()):
        raise px.PackextError(
            f"{len(y)} samples with {len(y.unique())} label(s) cannot tell whether features vary: pass 8 different "
            "ones or more, with two labels at least."
        )
    if x.is_floating_point() and (own := _variance(x.detach().double().reshape(len(x), -1))) < 10 * VARIANCE:
        raise px.PackextError(
            f"Inputs {list(x.shape)} vary by {own:.1e} of their mean square: their features hardly vary whatever the "
            "model. Standardise the inputs, which training wants as well."
        )
    layer = Head.of(model, head)
    features: list[Tensor] = []
    twin = copy.deepcopy(model)
    twin.get_submodule(layer.name).register_forward_pre_hook(
        lambda module, args, kwargs: features.append(*args, *kwargs.values()), with_kwargs=True
    )
    shared = share(twin, loss_fn, x, y)
    if not features:
        raise px.PackextError(
            f"{type(model).__name__} does not run {layer.name!r} (Linear {list(layer.weight.shape)}): pass head=<name> "
            "of its last fully connected layer."
        )
    e = features[-1].detach().double().flatten(0, -2)
    variance = _variance(e)
    g = layer.weight_gradient(shared)
    if layer.bias is not None:
        g = torch.cat([g, layer.bias_gradient(shared)[:, None]], 1)
    ratio = None
    if len(g) > 2 and g.shape[1] > 1:
        s = torch.linalg.svdvals(g)
        ratio = float(s[1] / s[0]) if s[0] > 0 else None
    missing = tuple(name for name, value in shared.gradient.items() if not value.any())
    scales = tuple(
        name
        for name, m in model.named_modules()
        if isinstance(m, NORMS) and m.weight is not None and not m.weight.any()
    )
    reasons = []
    if variance < VARIANCE:
        reasons.append(f"the input of {layer.name!r} hardly varies over the batch (relative variance {variance:.1e})")
    if ratio is not None and ratio < RATIO:
        reasons.append(f"the gradient of {layer.name!r} has rank one (second singular value {ratio:.1e} of the first)")
    if reasons and len(missing) > len(shared.gradient) / 4:  # by itself, it may be a branch that begins at zero
        reasons.append(f"{len(missing)} of {len(shared.gradient)} parameters get no gradient, the first {missing[0]!r}")
    return Received(variance, ratio, missing, scales, tuple(reasons))


def _variance(rows: Tensor) -> float:
    """Of rows around their mean, over their mean square."""
    return float((rows - rows.mean(0)).square().sum(1).mean() / rows.square().sum(1).mean().clamp_min(1e-300))
