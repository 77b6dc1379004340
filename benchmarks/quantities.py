"""What the rows of the table ask for, the torch code a user would write for it, and the reference.

Scale follows the loss as written: with a mean loss the individual gradient of a sample carries 1/N,
so that the rows sum to the gradient. Clipping alone works on the gradients of un-averaged losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.problems import FIRST_SEED, Instance, Problem, instantiate

TOLERANCE = 1e-3
# A parameter whose value is this much smaller than the largest is compared on that scale instead:
# the key bias of an attention layer, for one, has a gradient of exactly zero but for rounding.
FLOOR = 1e-4

Results = dict[str, list[Tensor | None]]
"""Quantity name to one tensor per parameter, None where a library left it out."""


@dataclass(frozen=True)
class Row:
    """One work item: a gradient together with the named quantities, in one pass where possible."""

    key: str
    title: str
    quantities: tuple[str, ...]


ROWS: dict[str, Row] = {
    row.key: row
    for row in (
        Row("gradient", "gradient", ()),
        Row("extended", "extended model, nothing asked for", ()),
        Row("batch_grad", "BatchGrad", ("grad_batch",)),
        Row("batch_l2", "BatchL2Grad", ("batch_l2",)),
        Row("sum_grad_squared", "SumGradSquared", ("sum_grad_squared",)),
        Row("variance", "Variance", ("variance",)),
        Row("l2_variance", "BatchL2Grad + Variance", ("batch_l2", "variance")),
        Row(
            "l2_variance_dot",
            "BatchL2Grad + Variance + GradDot",
            ("batch_l2", "variance", "grad_dot"),
        ),
        Row("batch_dot", "BatchDotGrad", ("batch_dot",)),
        Row("clipped", "ClippedGrad", ("clipped_grad",)),
    )
}


def reduce_rows(rows: Tensor, quantities: Sequence[str], grad: Tensor | None = None) -> dict[str, Tensor]:
    """Compute one parameter's quantities from its individual gradients, which may be overwritten.

    Args:
        rows: Individual gradients [N, *p]; used as scratch space, as nothing needs them afterwards.
        quantities: Names of what is wanted; any but ``clipped_grad``.
        grad: Their sum, where it is at hand already.

    Returns:
        The quantities by name.
    """
    n, flat = rows.shape[0], rows.flatten(1)
    out: dict[str, Tensor] = {}
    if "grad_batch" in quantities:
        return {"grad_batch": rows}
    if "batch_l2" in quantities:
        out["batch_l2"] = torch.linalg.vector_norm(flat, dim=1).square_()
    if "batch_dot" in quantities:
        out["batch_dot"] = flat @ flat.T
    if grad is None and {"variance", "grad_dot"} & set(quantities):
        grad = rows.sum(0)
    if "grad_dot" in quantities:
        assert grad is not None
        out["grad_dot"] = flat @ grad.flatten()
    if {"sum_grad_squared", "variance"} & set(quantities):
        squared = rows.square_().sum(0)
        if "sum_grad_squared" in quantities:
            out["sum_grad_squared"] = squared
        if "variance" in quantities:
            assert grad is not None
            out["variance"] = squared.div(n).sub_((grad / n).square_())
    return out


def clip_factors(squared_norms: Sequence[Tensor], n: int, max_norm: float) -> Tensor:
    """Return N min(1, C / |g_n|), g_n the un-averaged gradient, from rows' squared norms [N]."""
    norms = torch.stack(list(squared_norms)).sum(0).sqrt_().mul_(n)
    return (max_norm / norms).clamp_(max=1.0).mul_(n)


def clipped_sums(rows: Sequence[Tensor], n: int, max_norm: float) -> list[Tensor]:
    """Return the clipped sum of every parameter from the individual gradients of all of them.

    Args:
        rows: Individual gradients [M, *p] of all parameters; M samples of a batch of ``n``.
        n: Size of the batch, for undoing the mean.
        max_norm: Bound on the norm of an un-averaged gradient over all parameters.
    """
    squares = [torch.linalg.vector_norm(r.flatten(1), dim=1).square_() for r in rows]
    factors = clip_factors(squares, n, max_norm)
    return [(factors @ r.flatten(1)).view(r.shape[1:]) for r in rows]


# A network in two precisions, or in two orders of summation, can disagree by far more than rounding
# where a rectifier or a maximum sits on its kink. Batches on which float32 does so are passed over.
SMOOTH = 1e-4
ATTEMPTS = 20


class Reference:
    """The loop over samples, one backward pass each, in float64."""

    def __init__(self, instance: Instance) -> None:
        """Run the loop."""
        model = instance.copy_model().double()
        parameters = list(model.parameters())
        inputs = instance.inputs
        if inputs.is_floating_point():
            inputs = inputs.double()
        rows = [torch.empty(instance.batch, *p.shape, dtype=torch.float64) for p in parameters]
        for n in range(instance.batch):
            loss = instance.loss_fn(model(inputs[n : n + 1]), instance.targets[n : n + 1])
            for row, g in zip(rows, torch.autograd.grad(loss / instance.batch, parameters), strict=True):
                row[n] = g
        self.rows = rows
        self.batch = instance.batch
        self.max_norm = instance.problem.max_norm

    def expected(self, quantity: str) -> list[Tensor]:
        """Return the true values of a quantity, one tensor per parameter."""
        if quantity == "grad":
            return [r.sum(0) for r in self.rows]
        if quantity == "grad_batch":
            return self.rows
        if quantity == "clipped_grad":
            return clipped_sums(self.rows, self.batch, self.max_norm)
        if quantity == "variance":
            return [r.var(0, correction=0) for r in self.rows]
        return [reduce_rows(r.clone(), (quantity,))[quantity] for r in self.rows]

    def clipped_samples(self) -> int:
        """Return how many samples the norm bound acts on."""
        squares = [r.flatten(1).square().sum(1) for r in self.rows]
        return int((torch.stack(squares).sum(0).sqrt() * self.batch > self.max_norm).sum())


@dataclass(frozen=True)
class Verdict:
    """How a contender's results compare with the reference."""

    error: float
    missing: int
    total: int

    @property
    def status(self) -> str:
        """Return ``ok``, ``missing`` or ``wrong``."""
        if self.missing:
            return "missing"
        return "ok" if self.error <= TOLERANCE else "wrong"

    def __str__(self) -> str:
        """Return the text of a table cell that cannot be timed."""
        if self.missing:
            return f"missing: {self.missing} of {self.total} parameters"
        return f"wrong: error {self.error:.1e}"


def relative_error(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Return the largest relative error over parameters, each in the Euclidean norm."""
    largest = max(float(t.norm()) for t in true)
    worst = 0.0
    for f, t in zip(found, true, strict=True):
        if f.shape != t.shape:
            return float("inf")
        difference = float((f.detach().to("cpu", torch.float64) - t).norm())
        error = difference / max(float(t.norm()), FLOOR * largest)
        worst = float("inf") if math.isnan(error) else max(worst, error)
    return worst


def judge(results: Results, row: Row, reference: Reference) -> Verdict:
    """Compare every quantity of a row, and the gradient where there is one, with the reference."""
    error, missing = 0.0, 0
    total = len(reference.rows)
    for quantity in (*row.quantities, "grad"):
        found = results.get(quantity)
        if found is None and quantity == "grad":
            continue
        present = [] if found is None else [t for t in found if t is not None]
        if len(present) < total:
            missing = max(missing, total - len(present))
            continue
        error = max(error, relative_error(present, reference.expected(quantity)))
    return Verdict(error, missing, total)


def smooth_instance(problem: Problem, device: torch.device) -> tuple[Instance, Reference, int]:
    """Return the first instance whose gradient rounding cannot change much, its truth and seed."""
    for seed in range(FIRST_SEED, FIRST_SEED + ATTEMPTS):
        instance = instantiate(problem, device, seed)
        reference = Reference(instance)
        loss = instance.loss_fn(instance.model(instance.inputs), instance.targets)
        found = torch.autograd.grad(loss, list(instance.model.parameters()))
        if relative_error(found, reference.expected("grad")) < SMOOTH:
            return instance, reference, seed
    raise AssertionError(f"{problem.key}: no seed of {ATTEMPTS} gives a gradient stable in float32")
