"""Individual gradients for Opacus's optimizers, of models that Opacus itself refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor

import packext as px
from packext.adapters._shared import kept_grads

try:
    from opacus.optimizers import (  # pyright: ignore[reportMissingImports]
        DPOptimizer,
        DPOptimizerFastGradientClipping,
    )
except ImportError:
    raise ImportError("Opacus is not installed: pip install 'packext[opacus]'.") from None

#: What is filled for each: Opacus's optimizers that clip read all individual gradients, those of its ghost clipping
#: the sum of clipped ones.
KEEPING = ("DPOptimizer", "DPPerLayerOptimizer", "AdaClipDPOptimizer")
GHOST = ("DPOptimizerFastGradientClipping",)


class _Clipped(px.ClippedGrad):
    """Clipped sums as Opacus defines them, which adds 1e-6 to the norms."""

    parts = ""  # Opacus knows no parts of parameters

    def weight(self, norms: Tensor) -> Tensor:
        return (self.max_norm / (norms + 1e-6)).clamp(max=1.0)


class _Rows(px.BatchGrad):
    """Individual gradients, also where no sample has reached a parameter."""

    def nothing(self, parameter: Tensor, n: int) -> Tensor:
        return parameter.new_zeros(n, *parameter.shape)


def _before_step(optimizer: Any, closure: Any = None) -> Any:
    """In place of `pre_step` of ghost clipping, which draws noise for `max_grad_norm` as it is by then."""
    other = [norm for norm in optimizer._packext_clips if norm != optimizer.max_grad_norm]
    if other:
        raise px.PackextError(
            f"max_grad_norm was {other[0]} in a backward pass and is {optimizer.max_grad_norm} at the step: the noise "
            "would be for another norm than the samples' gradients were clipped to. Change it after the step, or call "
            "zero_grad() and repeat the pass."
        )
    taken = type(optimizer).pre_step(optimizer, closure)
    if taken:  # Opacus sums up over steps that it skips
        optimizer._packext_clips = []
    return taken


@contextmanager
def emit(optimizer: Any, scale: str | float = "sample") -> Iterator[px.Results]:
    """Have the backward passes inside give an optimizer of Opacus what its step reads.

    Example:
        >>> optimizer = DPOptimizer(SGD(model.parameters()), noise_multiplier=1.0, max_grad_norm=1.0, ...)
        >>> optimizer.zero_grad()
        >>> with emit(optimizer):
        ...     loss_fn(model(x), y).backward()
        >>> optimizer.step()

    Model and loss are extended (`px.extend`) in place of being wrapped in Opacus's `GradSampleModule`. `DPOptimizer`
    and its like get `grad_sample` `[N, *p]` on every parameter, and a list of them after several passes, as Opacus
    keeps them. `DPOptimizerFastGradientClipping` gets the sum of clipped gradients in `.grad`: ghost clipping, in one
    backward pass with the ordinary loss, where Opacus makes two with a loss of its own. Both are of the samples' own
    losses, as Opacus's are, whichever `loss_reduction` its optimizer has been told. `.grad` of the optimizer's
    parameters is otherwise what it was before, so that no gradient without noise is left in it. A parameter that no
    sample reaches has zeros. A `PackextError` is raised for what `px.optim.DPSGD` refuses (a parameter of the optimizer
    that the extended model has not, a second pass through one forward pass, means over class weights or ignored
    targets, running statistics; by the step of ghost clipping, a `max_grad_norm` that is not that of its passes), and
    for an empty batch, which Poisson sampling may draw: for a step of noise alone, let each p of `optimizer.params`
    have a `grad_sample` of `p.new_zeros(0, *p.shape)` (for ghost clipping, zeros in `.grad`).

    Args:
        optimizer: of Opacus.
        scale: as for `px.backpack`: a number where the loss cannot be extended (N for a mean, 1 for a sum). Ghost
            clipping needs a loss that is extended, or is computed by the model.

    Yields:
        The results, as `px.backpack` does.

    Raises:
        TypeError: for an optimizer that is not Opacus's, or one of its for several processes.
        ValueError: for a scale of "loss", ghost clipping with a number, or a parameter that is there twice.
    """
    kind = type(optimizer).__name__
    ghost = isinstance(optimizer, DPOptimizerFastGradientClipping)
    if not isinstance(optimizer, DPOptimizer) or kind not in KEEPING + GHOST:
        raise TypeError(f"emit() fills what {', '.join(KEEPING + GHOST)} of Opacus read; got a {kind}.")
    if scale == "loss" or (ghost and scale != "sample"):
        raise ValueError(
            f'{kind} clips the gradients of the samples\' own losses: scale="sample" with an extended loss'
            f"{'' if ghost else ', or a number (N for a mean, 1 for a sum)'}; got {scale!r}."
        )
    parameters: list[Any] = optimizer.params
    if len(set(map(id, parameters))) < len(parameters):
        raise ValueError("A parameter is in the optimizer's groups twice, and would be counted twice in the norms.")
    max_norm = optimizer.max_grad_norm
    quantity = _Clipped(max_norm) if ghost else _Rows()
    quantity.bounded = vars(optimizer).setdefault("_packext", object())  # to which the samples of a pass are counted

    if ghost:
        some = any(p.summed_grad is not None or (p.grad is not None and p.grad.any()) for p in parameters)
        vars(optimizer)["_packext_clips"] = vars(optimizer).get("_packext_clips", []) if some else []
        optimizer.pre_step = MethodType(_before_step, optimizer)

    def collect(results: px.Results) -> None:
        missing = [list(p.shape) for p in parameters if p not in results]
        if missing:
            raise px.PackextError(
                f"No gradients of samples reached {len(missing)} of the optimizer's {len(parameters)} parameters, of "
                f"shapes {missing[:5]}: freeze them (requires_grad_(False)) or leave them out of the optimizer."
            )
        if ghost:
            vars(optimizer)["_packext_clips"].append(max_norm)
        for i, p in enumerate(parameters):
            p.grad = None  # incomplete, and not private
            found = getattr(results[p], quantity.savefield)
            if ghost:
                held[i] = found if held[i] is None else held[i] + found
                continue
            before = getattr(p, "grad_sample", None)
            p.grad_sample = found if before is None else [*(before if isinstance(before, list) else [before]), found]

    with kept_grads(parameters) as held:
        with px.backpack(
            quantity, scale=scale, parameters=parameters, attach=False, grad=False, pass_hook=collect
        ) as results:
            yield results
