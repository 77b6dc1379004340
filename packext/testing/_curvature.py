"""Curvature by the definition: dense Hessians of losses, and the model's Jacobian row by row, by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from packext._lineage import disable
from packext._roots import of_logits
from packext.testing._samples import Rows, call, singles, wanted

#: Cotangents that are sent at once: as many copies of the activations are held.
AT_ONCE = 64


def columns(loss_fn: Callable[[Any, Any], Tensor], outputs: Any, target: Any, weight: float) -> tuple[Tensor, Tensor]:
    """The outputs that require grad, flat `[D]`, and `[D, D]`: columns of a root of weight times the loss's Hessian."""
    call: tuple[Any, tuple, dict] = (loss_fn, (target,), {})
    if isinstance(loss_fn, nn.Module):  # of a likelihood of log-probabilities the cross entropy, which gives the same
        call = of_logits(loss_fn, outputs, *call[1:])
    leaves, spec = pytree.tree_flatten(outputs)
    if not any(isinstance(t, Tensor) and t.requires_grad for t in leaves):
        # Of a sample that no parameter reaches (another expert's): what the columns are taken back through gives zeros.
        leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in leaves]
    live = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    flat = torch.cat([t.detach().flatten() for t in live]).requires_grad_()
    parts = iter(flat.split([t.numel() for t in live]))
    again = [next(parts).view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in leaves]
    of, args, kwargs = call
    loss = of(pytree.tree_unflatten(again, spec), *args, **kwargs)
    slope = torch.autograd.grad(loss, flat, create_graph=True)[0]
    hessian = torch.stack([torch.autograd.grad(d, flat, retain_graph=True)[0] for d in slope])
    values, vectors = torch.linalg.eigh(hessian * weight)
    return torch.cat([t.flatten() for t in live]), (vectors * values.clamp(min=0).sqrt()).T


def _taken_back(output: Tensor, root: Tensor, named: dict[str, nn.Parameter]) -> Rows:
    """Each column taken back through the model, `[V, *p]`."""
    parameters = list(named.values())
    found = [
        torch.autograd.grad(output, parameters, column, retain_graph=True, allow_unused=True, materialize_grads=True)
        for column in root
    ]
    return {name: torch.stack([g[k].detach() for g in found]) for k, name in enumerate(named)}


def curvature_rows(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    batch_axis: int = 0,
    weights: Sequence[float] | None = None,
) -> Rows:
    """Rows of the GGN's root by a loop over samples and columns: the slow oracle of curvature.

    Args:
        model: extended or not; left as it is.
        loss_fn: `loss_fn(model(inputs), targets)`.
        inputs: as for `individual_gradients`.
        targets: as for `individual_gradients`.
        batch_axis: the axis of the samples in inputs and outputs.
        weights: factor of each sample's loss in the loss of the batch; 1 for each by default.

    Returns:
        `[V, N, *p]` for every parameter that requires grad, by name: column v of a root of the Hessian of sample n's
        loss, taken back through the model by autograd. The sum over v and n of their outer products is the GGN.
    """
    named = wanted(model)
    with disable(), torch.enable_grad():
        each = [
            _taken_back(*columns(loss_fn, output, target, weight), named)
            for output, target, weight in singles(model, inputs, targets, batch_axis, weights)
        ]
    return {name: torch.stack([rows[name] for rows in each], 1) for name in named}


def ggn_root(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any) -> Rows:
    """Rows `[V, *p]` of a root of the GGN, the batch taken as a whole: samples may influence each other.

    Args:
        model: extended or not; left as it is.
        loss_fn: `loss_fn(model(inputs), targets)`.
        inputs: as for `individual_gradients`.
        targets: as for `individual_gradients`.

    Returns:
        V rows, as many as the output of the batch has entries, by the name of the parameter. The sum of their outer
        products is the GGN.
    """
    with disable(), torch.enable_grad():
        return _taken_back(*columns(loss_fn, call(model, inputs), targets, 1.0), wanted(model))


def hessian_diagonals(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    batch_axis: int = 0,
    weights: Sequence[float] | None = None,
) -> Rows:
    """Each sample's share of the Hessian's diagonal by a loop over samples: the slow oracle.

    Args:
        model: extended or not; left as it is.
        loss_fn: `loss_fn(model(inputs), targets)`.
        inputs: as for `individual_gradients`.
        targets: as for `individual_gradients`.
        batch_axis: the axis of the samples in inputs and outputs.
        weights: factor of each sample's loss in the loss of the batch; 1 for each by default.

    Returns:
        `[N, *p]` for every parameter that requires grad, by name: the diagonal of the dense Hessian of the sample's
        loss in that parameter, by differentiating its gradient. They sum to the diagonal for the loss of the batch.
    """
    named = wanted(model)
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    with disable(), torch.enable_grad():
        for output, target, weight in singles(model, inputs, targets, batch_axis, weights):
            loss = loss_fn(output, target) * weight
            slopes = _slopes(loss, list(named.values()))
            for (name, p), slope in zip(named.items(), slopes, strict=True):
                (block,) = _derivatives(slope.flatten(), [p])
                rows[name].append(block.diagonal().view(p.shape))
    return {name: torch.stack(each) for name, each in rows.items()}


def hessian(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], inputs: Any, targets: Any) -> Tensor:
    """The Hessian of the loss of a batch, the batch taken as a whole: samples may influence each other.

    Args:
        model: extended or not; left as it is.
        loss_fn: `loss_fn(model(inputs), targets)`.
        inputs: as for `individual_gradients`.
        targets: as for `individual_gradients`.

    Returns:
        `[P, P]`, with P the entries of all parameters that require grad, one parameter after the other.
    """
    parameters = list(wanted(model).values())
    with disable(), torch.enable_grad():
        loss = loss_fn(call(model, inputs), targets)
        slopes = _slopes(loss, parameters)
        slope = torch.cat([s.flatten() for s in slopes])
        return torch.cat(_derivatives(slope, parameters), 1)


def _slopes(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradient, to be differentiated; zeros where no parameter reaches the loss."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    return torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)


def _derivatives(slope: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Derivatives of the entries of `slope` `[K]` in each parameter, `[K, p.numel()]`."""
    found = [torch.zeros(len(slope), p.numel()).to(p) for p in parameters]
    if not slope.requires_grad:
        return found
    units = torch.eye(len(slope)).to(slope)
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    for lo in range(0, len(units), AT_ONCE):
        some = units[lo : lo + AT_ONCE]
        try:
            grads = torch.autograd.grad(slope, parameters, some, is_grads_batched=True, **options)
            sums = torch.autograd.grad(slope, parameters, some.sum(0), **options)
            tol = 1e3 * torch.finfo(slope.dtype).eps
            right = all(
                g is None or torch.allclose(g.sum(0), s, tol, tol * float(g.abs().sum()))
                for g, s in zip(grads, sums, strict=True)
            )
        except RuntimeError:  # not every backward can be computed for several cotangents at once
            right = False
        if not right:  # as of a group norm, of which torch gives other numbers
            each = [torch.autograd.grad(slope, parameters, unit, **options) for unit in some]
            grads = [None if g[0] is None else torch.stack(g) for g in zip(*each, strict=True)]
        for whole, grad in zip(found, grads, strict=True):
            if grad is not None:
                whole[lo : lo + AT_ONCE] = grad.reshape(len(some), -1)
    return found
