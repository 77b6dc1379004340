"""Individual gradients."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import SupportsIndex

import torch
from torch import Tensor

from packext._quantity import Ask, PerSample, Quantity, Subsampled
from packext._statistics import NAMED


def _references(tensor: Tensor) -> tuple[int, int]:
    """To the storage of a tensor, by Python and by tensors: a view shares it."""
    storage = tensor.untyped_storage()
    return sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)


#: Those of a tensor whose storage nobody else has.
_UNSHARED = _references(torch.empty(1))


class BatchGrad(Subsampled, PerSample, Quantity):
    """Individual gradients `[N, *p]`, in `grad_batch`. They sum to `.grad` (scale "loss").

    The memory of the previous result is used again if nobody else refers to it: one that you keep never changes, and
    one that you do not is gone if the pass fails half-way.

    With `subsampling` only the samples at these indices are given, `[len(subsampling), *p]`, in that order;
    their scale stays that of the whole batch.
    """

    savefield = "grad_batch"
    parts = "split"

    def __init__(self, subsampling: Iterable[SupportsIndex] | None = None) -> None:
        """Give all samples, or those in `subsampling`."""
        self.choose(subsampling)

    def buffer(self, ask: Ask, holders: int) -> Tensor | None:
        """The previous result, if nothing but the parameter and `holders` others refer to it, to be written over."""
        old = ask.parameter.__dict__.get(self.savefield)
        form = ask.statistics.form
        if not ask.attached or self.subsampling is not None or ask.factor != 1.0:
            return None
        if type(old) is not Tensor or old.requires_grad:  # a DTensor has a part of it alone
            return None
        if old.shape != (form.n, *form.shape) or old.dtype != form.acc or old.device != form.device:
            return None
        if not old.is_contiguous():
            return None
        if not old.is_cuda and old.is_shared():  # other processes may have it; of CUDA that is always said
            return None
        # Beside the holders: the parameter's dictionary, and this function's name.
        if sys.getrefcount(old) > holders + 1 + NAMED or _references(old) != _UNSHARED:
            return None
        delattr(ask.parameter, self.savefield)
        return old

    def result(self, ask: Ask) -> Tensor:
        rows, dtype = self.rows(ask), ask.parameter.dtype
        # In this order, as rows of the loss as written may be beyond the range of float16.
        return ask.statistics.kept(rows).to(dtype) if ask.factor == 1.0 else (rows * ask.factor).to(dtype)
