"""The diagonal of the Hessian, per sample or summed, exactly."""

from __future__ import annotations

import torch

from packext._quantity import Curvature
from packext.quantities.ggn import BatchDiagonal, Diagonal


class _Hessian(Curvature):
    @property
    def root(self) -> tuple[str, int, torch.Generator | None]:
        return ("hessian", 0, None)


class DiagHessian(Diagonal, _Hessian):
    """Diagonal of the Hessian of the loss as written `[*p]`, in `diag_h`; exact, and of any sign.

    Of the sum of the extended losses, each times the gradient that arrives at it; the losses need not be convex. It is
    the diagonal of the GGN and what the curvature of the model's own functions adds to it (Dangel, Harmeling & Hennig,
    2020): for every function `y = f(x)` in the graph that is not piecewise linear, columns of a root of the matrix
    `sum over k of d_k y_k''(x)`, with d the gradient at y, are sent from x on. An elementwise function of F features
    (channels times pixels) takes little more than F inner passes, 2 F at worst; others, such as softmax, norms
    and products of activations, take up to one for every entry of their inputs of a sample.

    Refused, with an `UnsupportedUseError`: a parameter that is used on data which depends on it already (a layer called
    twice in a row, an embedding tied to the head), or through a function that is not linear in it (recurrent layers,
    weight normalisation); functions that torch cannot differentiate twice (fused attention: run the forward pass under
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`), autograd functions written in Python, and functions that are not
    elementwise of more than 1024 inputs per sample.
    """

    savefield = "diag_h"


class BatchDiagHessian(BatchDiagonal, _Hessian):
    """Each sample's share of the Hessian's diagonal `[N, *p]`, in `diag_h_batch`: as `DiagHessian`, not summed."""

    savefield = "diag_h_batch"
