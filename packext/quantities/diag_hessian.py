"""The diagonal of the Hessian, per sample or summed, exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packext._errors import PackextError
from packext._quantity import Ask, Curvature
from packext.quantities.ggn import BatchDiagonal, Diagonal

#: What rounding may leave where positive and negative terms cancel, relative to the largest entry of the parameter and
#: to that of all parameters: entries that are truly zero, such as those of a bias of attention's keys, are no failure.
OWN, ALL = 1e-3, 1e-5


class _Hessian(Curvature):
    """Keeps what columns of either sign sum up to, by the sign."""

    @property
    def root(self) -> tuple[str, int, torch.Generator | None]:
        return ("hessian", 0, None)

    def absorb(self, ask: Ask, held: Any) -> dict[float, Tensor]:
        held = {} if held is None else held
        held[ask.sign] = super().absorb(ask, held.get(ask.sign))
        return held

    def settle(self, held: dict[str, dict[float, Tensor]]) -> None:
        both = {k: (h[1.0], h[-1.0]) for k, h in held.items() if len(h) == 2 and h[1.0].numel()}
        results = {
            k: float(self.land(h, 1, 1.0).abs().max()) for k, h in held.items() if next(iter(h.values())).numel()
        }
        for name, (up, down) in both.items():
            size = float((up + down).max())
            if torch.finfo(up.dtype).eps * size > max(OWN * results[name], ALL * max(results.values())):
                finer = "" if up.dtype == torch.float64 else "Use float64. "
                raise PackextError(
                    f"{type(self).__name__} of {name} {list(up.shape)}: positive and negative terms as large as "
                    f"{size:.1e} cancel to {results[name]:.1e}, which {up.dtype} does not resolve. {finer}Avoid "
                    "functions of extreme curvature, such as the normalisation of values that are almost zero. Where "
                    "the whole diagonal is zero (of a model that is linear in each entry by itself, before a loss "
                    "without curvature) nothing tells it from rounding: HMP shows it beside the other entries."
                )

    def land(self, held: dict[float, Tensor], n: int, factor: float) -> Tensor:
        zero = torch.zeros_like(next(iter(held.values())))
        return (held.get(1.0, zero) - held.get(-1.0, zero)) * factor


class DiagHessian(_Hessian, Diagonal):
    """Diagonal of the Hessian of the loss as written `[*p]`, in `diag_h`; exact, and of any sign.

    Of the sum of the extended losses, each times the gradient that arrives at it; the losses need not be convex. It is
    the diagonal of the GGN and what the curvature of the model's own functions adds to it (Dangel, Harmeling & Hennig,
    2020): for every function `y = f(x)` in the graph that is not piecewise linear, columns of a root of the matrix
    `sum over k of d_k y_k''(x)`, with d the gradient at y, are sent from x on. An elementwise function of F features
    (channels times pixels) takes little more than F inner passes, 2 F at worst; others, such as softmax, norms
    and products of activations, take up to one for every entry of their inputs of a sample.

    Refused, with an `UnsupportedUseError`: a parameter that is used on data which depends on it already (a layer called
    twice in a row, an embedding tied to the head), or through a function that is not linear in it (recurrent layers,
    weight normalisation); hooks on tensors inside of the model that change a gradient; functions that torch cannot
    differentiate twice (fused attention: run the forward pass under
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`), autograd functions written in Python, and functions that are not
    elementwise of more than 1024 inputs per sample. A result of which rounding is all that is left, the difference of
    terms so much larger, raises a `PackextError`.
    """

    savefield = "diag_h"


class BatchDiagHessian(_Hessian, BatchDiagonal):
    """Each sample's share of the Hessian's diagonal `[N, *p]`, in `diag_h_batch`: as `DiagHessian`, not summed."""

    savefield = "diag_h_batch"
