"""Individual gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from packext._factored import Factored
from packext._quantity import Ask, Quantity


class BatchGrad(Quantity):
    """Individual gradients `[N, *p]`, in `grad_batch`. They sum to `.grad` (scale "loss").

    With `subsampling` only the samples at these indices are given, `[len(subsampling), *p]`, in that order;
    their scale stays that of the whole batch.
    """

    savefield = "grad_batch"

    def __init__(self, subsampling: Sequence[int] | None = None) -> None:
        """Give all samples, or those in `subsampling`.

        Raises:
            ValueError: if `subsampling` is not a sequence of ints of 0 or more.
        """
        if subsampling is not None:
            subsampling = list(subsampling)
            if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in subsampling):
                raise ValueError(f"subsampling must be a list of sample indices, got {subsampling}.")
        self.subsampling = subsampling

    def wants(self, form: Factored) -> tuple[str, ...]:
        return ("rows",) if self.subsampling is None else ()

    def result(self, ask: Ask) -> Tensor:
        if self.subsampling is None:
            rows = ask.statistics["rows"]
        else:
            beyond = [i for i in self.subsampling if i >= ask.n]
            if beyond:
                raise IndexError(f"BatchGrad(subsampling=...): samples {beyond} of a batch of {ask.n} asked for.")
            index = torch.tensor(self.subsampling, dtype=torch.long, device=ask.parameter.device)
            rows = ask.statistics.form.select(index)
        rows = rows.to(ask.parameter.dtype)
        return rows if ask.factor == 1.0 else rows * ask.factor
