"""torch.func: ``vmap(grad)``, over the whole batch or chunk by chunk, reduced by torch code.

The GGN's diagonal comes from ``vjp`` with columns of a root of the loss Hessian, beside a plain pass for the gradient.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.contenders.base import Contender, Maker
from benchmarks.problems import Instance
from benchmarks.quantities import KRONECKER, Row, clipped_sums, reduce_rows

MOST_ROWS = 160
"""Rows of a root at once: beyond it they take gigabytes, and longer."""


class PerSample(Contender):
    """Individual gradients by ``vmap(grad)``; the gradient is their sum."""

    def __init__(self, instance: Instance, quantities: tuple[str, ...], chunk: int, *, math: bool) -> None:
        """Build the transformed function.

        Args:
            instance: The problem.
            quantities: What the individual gradients are reduced to.
            chunk: Samples per call of the transformed function.
            math: Whether attention is spelled out, which batches where the fused kernel loops.
        """
        super().__init__(instance.copy_model(), instance)
        self.quantities = quantities
        self.chunk = chunk
        self.math = math

        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            output = functional_call(self.model, parameters, (x.unsqueeze(0),))
            return self.loss_fn(output, y.unsqueeze(0)) / self.batch

        self.per_sample = vmap(grad(loss), in_dims=(None, 0, 0))

    def rows(self, part: slice) -> list[Tensor]:
        """Return the individual gradients of some samples, one tensor per parameter."""
        detached = {name: p.detach() for name, p in self.model.named_parameters()}
        kernel = sdpa_kernel(SDPBackend.MATH) if self.math else contextlib.nullcontext()
        with kernel:
            found = self.per_sample(detached, self.inputs[part], self.targets[part])
        rows: list[Tensor] = []
        for name in detached:
            # two parameters can share one gradient tensor, as an LSTM's biases do
            shared = any(found[name].data_ptr() == r.data_ptr() for r in rows)
            rows.append(found[name].clone() if shared else found[name])
        return rows

    def compute(self) -> None:
        """Go through the batch chunk by chunk."""
        if self.chunk == self.batch or set(self.quantities) & {"grad_batch", "grad_dot"}:
            self.compute_at_once()
        else:
            self.compute_by_chunks()

    def compute_at_once(self) -> None:
        """Hold all individual gradients, then reduce them."""
        parts = [self.rows(part) for part in self.parts()]
        rows = parts[0] if len(parts) == 1 else [torch.cat(r) for r in zip(*parts, strict=True)]
        del parts
        if "clipped_grad" in self.quantities:
            sums = clipped_sums(rows, self.batch, self.max_norm)
            for p, value in zip(self.parameters, sums, strict=True):
                p.clipped_grad = value
        for i, p in enumerate(self.parameters):
            p.grad = rows[i].sum(0)
            for name, value in reduce_rows(rows[i], self.quantities, p.grad).items():
                setattr(p, name, value)
            rows[i] = p.grad  # lets the individual gradients go

    def compute_by_chunks(self) -> None:
        """Reduce every chunk before the next, where the quantities allow it."""
        squares = "variance" in self.quantities or "sum_grad_squared" in self.quantities
        concatenated: dict[str, list[list[Tensor]]] = {"batch_l2": [], "rows": []}
        for part in self.parts():
            rows = self.rows(part)
            if "batch_dot" in self.quantities:
                concatenated["rows"].append(rows)
            if "batch_l2" in self.quantities:
                concatenated["batch_l2"].append([reduce_rows(r, ("batch_l2",))["batch_l2"] for r in rows])
            clipped = None
            if "clipped_grad" in self.quantities:
                clipped = clipped_sums(rows, self.batch, self.max_norm)
            for i, p in enumerate(self.parameters):
                total = rows[i].sum(0)
                p.grad = total if p.grad is None else p.grad.add_(total)
                if squares:
                    accumulate(p, "sum_grad_squared", rows[i].square_().sum(0))
                if clipped is not None:
                    accumulate(p, "clipped_grad", clipped[i])
        self.finish(concatenated)

    def finish(self, concatenated: dict[str, list[list[Tensor]]]) -> None:
        """Form what needs all chunks."""
        for i, p in enumerate(self.parameters):
            if "batch_l2" in self.quantities:
                p.batch_l2 = torch.cat([part[i] for part in concatenated["batch_l2"]])
            if "batch_dot" in self.quantities:
                flat = torch.cat([part[i].flatten(1) for part in concatenated["rows"]])
                p.batch_dot = flat @ flat.T
            if "variance" in self.quantities:
                mean = p.grad / self.batch
                p.variance = p.sum_grad_squared.div_(self.batch).sub_(mean.square_())
                del p.sum_grad_squared

    def parts(self) -> list[slice]:
        """Return the chunks."""
        return [slice(i, i + self.chunk) for i in range(0, self.batch, self.chunk)]


class Diagonal(Contender):
    """The GGN's diagonal from squared rows of its root, by ``vmap`` over samples."""

    def __init__(
        self, instance: Instance, quantity: str, chunk: int, *, together: bool = False, math: bool = False
    ) -> None:
        """Build the transformed function.

        Args:
            instance: The problem.
            quantity: ``diag_ggn_mc``, or ``diag_ggn_exact``, for outputs of one prediction per sample.
            chunk: Samples per call of the transformed function.
            together: Whether all columns of a sample are sent back by another ``vmap``, or one after the other.
            math: Whether attention is spelled out.
        """
        super().__init__(instance.copy_model(), instance)
        self.quantity = quantity
        self.chunk = chunk
        self.math = math
        scale = (self.targets[0].numel() / self.batch) ** 0.5

        def squares(parameters: dict[str, Tensor], x: Tensor, uniform: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            output, pull, *_ = vjp(lambda p: functional_call(self.model, p, (x.unsqueeze(0),)), parameters)
            p = output.softmax(1)
            label = (p.cumsum(1) < uniform * p.sum(1, keepdim=True)).sum(1)
            if quantity == "diag_ggn_mc":
                slope = grad(lambda z: self.loss_fn(z, label))(output)
                return {k: v.square() for k, v in pull(scale * slope)[0].items()}, label[0]
            columns = scale * p.mT.sqrt() * (p - torch.eye(p.shape[1], device=p.device))
            if together:
                return {k: v.square().sum(0) for k, v in vmap(pull)(columns[:, None])[0].items()}, label[0]
            total, *others = ({k: v.square() for k, v in pull(c[None])[0].items()} for c in columns)
            for other in others:
                total = {k: v + other[k] for k, v in total.items()}
            return total, label[0]

        self.per_sample = vmap(squares, in_dims=(None, 0, 0))

    def compute(self) -> None:
        """Run a plain pass, then go through the batch chunk by chunk."""
        super().compute()
        detached = {name: p.detach() for name, p in self.model.named_parameters()}
        uniform = torch.rand(self.batch, 1, 1, *self.targets.shape[1:], device=self.inputs.device)
        labels = []
        for i in range(0, self.batch, self.chunk):
            part = slice(i, i + self.chunk)
            with sdpa_kernel(SDPBackend.MATH) if self.math else contextlib.nullcontext():
                found, label = self.per_sample(detached, self.inputs[part], uniform[part])
            labels.append(label)
            for p, value in zip(self.parameters, found.values(), strict=True):
                accumulate(p, self.quantity, value.sum(0))
        self.drawn = {self.quantity: torch.cat(labels)}


def accumulate(parameter: Any, name: str, value: Tensor) -> None:
    """Add to an attribute of a parameter, which may not be there yet."""
    known = getattr(parameter, name, None)
    setattr(parameter, name, value if known is None else known.add_(value))


def variants(instance: Instance, row: Row) -> dict[str, Maker]:
    """Return the whole batch and smaller chunks, with and without the fused attention kernel."""
    if row.key == "extended" or set(row.quantities) & {*KRONECKER, "diag_h"}:
        return {}
    n = instance.batch
    ways: dict[str, Maker] = {}
    if row.key == "diag_ggn_exact":
        for chunk in sorted({n, max(n // 4, 1), max(n // 8, 1), 1}, reverse=True):
            for together in (False, True):
                if chunk * instance.problem.classes <= MOST_ROWS if together else chunk > 1:
                    name = size_of(chunk, n) + (", columns together" if together else ", column by column")
                    ways[name] = lambda c=chunk, t=together: Diagonal(instance, row.quantities[0], c, together=t)
        return ways
    for chunk in sorted({n, max(n // 4, 1), max(n // 8, 1)}, reverse=True):
        for math in (False, True) if instance.problem.attention else (False,):
            name = size_of(chunk, n) + (", attention spelled out" if math else "")
            if row.key == "diag_ggn_mc":
                ways[name] = lambda c=chunk, m=math: Diagonal(instance, row.quantities[0], c, math=m)
            else:
                ways[name] = lambda c=chunk, m=math: PerSample(instance, row.quantities, c, math=m)
    return ways


def size_of(chunk: int, n: int) -> str:
    """Return how many samples go through one call, in words."""
    return "whole batch" if chunk == n else f"chunks of {chunk}" if chunk > 1 else "sample by sample"
