"""Individual gradients by the definition: one sample at a time, plain autograd; and how one sample is cut out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from packext._lineage import disable

Rows = dict[str, Tensor]


def select(value: Any, sample: int, n: int, batch_axis: int = 0) -> Any:
    """The part of a nested structure that belongs to one sample: tensors with N entries along the axis are cut."""
    if isinstance(value, Tensor):
        has_batch = value.dim() > batch_axis and value.shape[batch_axis] == n
        return value.narrow(batch_axis, sample, 1) if has_batch else value
    if isinstance(value, Mapping):
        return {k: select(v, sample, n, batch_axis) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(select(v, sample, n, batch_axis) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(select(v, sample, n, batch_axis) for v in value)
    return value


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call with one tensor, a tuple of arguments, or a dictionary of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def batch_size(inputs: Any, batch_axis: int = 0) -> int:
    """Entries along the batch axis of the first tensor."""
    leaves = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else (inputs,)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() > batch_axis:
            return leaf.shape[batch_axis]
        if isinstance(leaf, (Mapping, tuple, list)) and leaf:
            return batch_size(tuple(leaf.values()) if isinstance(leaf, Mapping) else tuple(leaf), batch_axis)
    raise ValueError(
        f"no input has an axis {batch_axis}: inputs are a tensor, a tuple of arguments or a dictionary of keyword "
        f"arguments with tensors, got a {type(inputs).__name__}."
    )


def wanted(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require grad, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def individual_gradients(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    batch_axis: int = 0,
    weights: Sequence[float] | None = None,
) -> Rows:
    """Individual gradients by a loop over samples: the slow oracle.

    Args:
        model: extended or not; left as it is.
        loss_fn: `loss_fn(model(inputs), targets)`.
        inputs: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
        targets: any nested structure of tensors with N entries along axis 0 (or `batch_axis`).
        batch_axis: the axis of the samples in inputs and outputs.
        weights: factor of each sample's loss in the loss of the batch; 1 for each by default.

    Returns:
        `[N, *p]` for every parameter that requires grad, by name; zeros where the loss does not reach it.
    """
    named = wanted(model)
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    with disable(), torch.enable_grad():
        for output, target, weight in singles(model, inputs, targets, batch_axis, weights):
            loss = loss_fn(output, target) * weight
            for (name, p), grad in zip(named.items(), gradients(loss, [*named.values()]), strict=True):
                rows[name].append(torch.zeros_like(p) if grad is None else grad)
    return {name: torch.stack(each) for name, each in rows.items()}


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Those of `loss`, with what Functions accumulate in `.grad` by passes of their own; `.grad` stays as it is."""
    before = [p.grad for p in parameters]
    try:
        for p in parameters:
            p.grad = None
        reached = loss.requires_grad  # by any of them; by none of a sample that goes to another expert
        found = torch.autograd.grad(loss, parameters, allow_unused=True) if reached else [None] * len(parameters)
        both = [
            [g.detach() for g in (mine, p.grad) if g is not None] for mine, p in zip(found, parameters, strict=True)
        ]
        return [functools.reduce(torch.add, some) if some else None for some in both]
    finally:
        for p, g in zip(parameters, before, strict=True):
            p.grad = g


def singles(
    model: Callable[..., Any], inputs: Any, targets: Any, batch_axis: int, weights: Sequence[float] | None
) -> Iterator[tuple[Any, Any, float]]:
    """Output, target and weight of one sample after another, each run by itself."""
    n = batch_size(inputs, batch_axis)
    target_axis = batch_axis if has_axis(targets, batch_axis, n) else 0
    for sample in range(n):
        output = call(model, select(inputs, sample, n, batch_axis))
        yield output, select(targets, sample, n, target_axis), 1.0 if weights is None else weights[sample]


def has_axis(value: Any, axis: int, n: int) -> bool:
    """Whether a tensor of a nested structure has n entries along an axis."""
    if isinstance(value, Tensor):
        return value.dim() > axis and value.shape[axis] == n
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(has_axis(item, axis, n) for item in items)


def double(value: Any) -> Any:
    """A nested structure with its real tensors detached, in float64."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: double(v) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(double, value))
    return type(value)(map(double, value)) if isinstance(value, (list, tuple)) else value
