"""Soteria: parts of a representation that tell much of the input leave no gradient in the last layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.attacks import Head, Shared, share
from packext.defences.gradient import pruned_of

#: Columns of the Jacobian that are sent at once: on a CPU more are slower again, as they leave the cache.
COLUMNS = 16


@dataclass(frozen=True)
class Soteria:
    """Sets columns of the last fully connected layer's weight gradient to zero.

    Scores of the features of the layer's input r are averaged over the samples where `r_d` is not 0 (the others add
    nothing to column d). The columns with the smallest scores are those whose pruning disturbs a reconstruction from r
    most, for what it changes in r. Other layers' gradients are sent as they are, and an attacker who knows of the
    defence matches those alone.

    Called as `packext.attacks.share` is, in its place.

    - Formula: column d is set to 0 where `|d r_d / d x| / |r_d|` is among the `int(share D)` smallest of the D features
    - Cost: the gradient, and the Jacobian of r by the input: D cotangents for all samples at once, 16 at a time
    - Source: Sun et al., CVPR 2021
    - Refused: a frozen layer; inputs that are no floating tensor; samples that influence each other

    Attributes:
        share: of the D columns that are set to zero, from 0 to 1.
        head: name of the layer; by default the last `nn.Linear`.
    """

    share: float
    head: str | None = None

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be between 0 and 1, got {self.share}.")

    def __call__(
        self, model: nn.Module, loss_fn: nn.Module, x: Any, y: Tensor, state: Mapping[str, Tensor] | None = None
    ) -> Shared:
        """What the client shares.

        Args:
            model: as the client received it, in the mode in which it is run.
            loss_fn: with `reduction` "mean" or "sum".
            x: the batch `[N, ...]`, floating.
            y: labels `[N, ...]`.
            state: parameters and buffers in place of the model's, by name.

        Returns:
            The batch's gradient, with `int(share * D)` columns of the layer's weight gradient set to zero.

        Raises:
            PackextError: if the layer's weight is frozen; and what `sensitivity` refuses.
        """
        layer = Head.of(model, self.head)
        name = f"{layer.name}.weight" if layer.name else "weight"
        cuda = [x.device] if isinstance(x, Tensor) and x.is_cuda else []
        with torch.random.fork_rng(cuda):  # so that the message has the masks of dropout of what is scored
            ratio, r = sensitivity(model, x, self.head, state)
        shared = share(model, loss_fn, x, y, state)
        if name not in shared.gradient:
            raise px.PackextError(f"{name!r} is frozen: there is no gradient that Soteria could prune.")
        score = ratio.where(r != 0, torch.nan).nanmean(0).nan_to_num(nan=torch.inf)
        pruned = shared.gradient[name].clone()
        pruned[:, score.argsort(stable=True)[: pruned_of(len(score), self.share)]] = 0
        return replace(shared, gradient={**shared.gradient, name: pruned})


def sensitivity(
    model: nn.Module, x: Any, head: str | None = None, state: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """How much each feature of a representation changes with the input: `|d r_d / d x| / |r_d|`.

    One forward pass; the D rows of all samples' Jacobians are sent back `COLUMNS` at a time, each for all samples at
    once. The model stays as it is. Samples that influence each other, as with BatchNorm in training mode, are refused.

    Args:
        model: in the mode in which it is run.
        x: the batch `[N, ...]`, floating.
        head: name of the fully connected layer whose input is the representation; by default the last `nn.Linear`.
        state: parameters and buffers in place of the model's, by name.

    Returns:
        Scores `[N, D]`, infinite or NaN where `r_d` is 0, and the representation `[N, D]`.

    Raises:
        PackextError: if x is no floating tensor, the representation is not one vector per sample, or not finite.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        what = str(x.dtype) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise px.PackextError(f"The derivative by the input needs one floating tensor; x is {what}.")
    layer, twin, seen = Head.of(model, head).name, copy.deepcopy(model).requires_grad_(False), []
    twin.get_submodule(layer).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(*args, *kwargs.values()), with_kwargs=True
    )
    x = x.detach().clone().requires_grad_()
    twin.load_state_dict({**twin.state_dict(), **(state or {})})
    twin(x)
    shapes = [list(r.shape) for r in seen]
    if len(seen) != 1 or seen[0].dim() != 2 or len(seen[0]) != len(x) or not seen[0].requires_grad:
        raise px.PackextError(
            f"The input of {layer!r} must be one vector [N, D] for each of the {len(x)} samples that depends on the "
            f"model's input; its inputs have shapes {shapes}."
        )
    (r,) = seen
    _apart(r, x, layer)
    norms = []
    for columns in torch.eye(r.shape[1], dtype=r.dtype, device=r.device).split(COLUMNS):
        at_once = columns[:, None].expand(-1, len(x), -1)
        (rows,) = torch.autograd.grad(r, x, at_once, retain_graph=True, is_grads_batched=True)
        norms.append(rows.flatten(2).norm(dim=2).T)
    norm, r = torch.cat(norms, 1), r.detach()
    if not norm.isfinite().all() or not r.isfinite().all():
        raise px.PackextError(f"The input of {layer!r} {shapes[0]}, or its derivative by x, is not finite.")
    return norm / r.abs(), r


def _apart(r: Tensor, x: Tensor, layer: str) -> None:
    """Refuse samples that influence each other: any two differ in a binary digit of their number."""
    n, generator = torch.arange(len(x), device=x.device), torch.Generator().manual_seed(0)
    for digit in range((len(x) - 1).bit_length()):
        for side in (0, 1):
            one = (n >> digit) & 1 == side
            drawn = torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r)
            (g,) = torch.autograd.grad(r, x, drawn * one[:, None], retain_graph=True)
            if g[~one].any():
                raise px.CoupledSamplesError(
                    f"The input of {layer!r} of a sample depends on other samples of the batch: samples have no "
                    "derivatives of their own. With BatchNorm, call model.eval()."
                )
