"""What the rows of the table ask for, the torch code a user would write for it, and the reference.

Scale follows the loss as written: with a mean loss the individual gradient of a sample carries 1/N,
so that the rows sum to the gradient. Clipping alone works on the gradients of un-averaged losses.
Curvature is that of the mean loss, too: it carries 1/N.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.curvature import Curvature, balanced, hessian_diagonal
from benchmarks.problems import FIRST_SEED, Instance, Problem, instantiate

TOLERANCE = 1e-3
# A parameter whose value is this much smaller than the largest is compared on that scale instead:
# the key bias of an attention layer, for one, has a gradient of exactly zero but for rounding.
FLOOR = 1e-4

# Estimated from labels drawn from the model's predictions, or with all columns of roots.
SAMPLED = ("diag_ggn_mc", "kfac")
EXACT = ("diag_ggn_exact", "kflr", "diag_h")
KRONECKER = ("kfac", "kflr")

Results = dict[str, list[Any]]
"""Quantity name to one tensor (or list of Kronecker factors) per parameter, None where a library left it out."""


@dataclass(frozen=True)
class Row:
    """One work item: a gradient together with the named quantities, in one pass where possible."""

    key: str
    title: str
    quantities: tuple[str, ...]
    linear: bool = False
    """Whether the quantities are of linear layers alone."""


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
        Row("diag_ggn_mc", "DiagGGNMC", ("diag_ggn_mc",)),
        Row("diag_ggn_exact", "DiagGGNExact", ("diag_ggn_exact",)),
        Row("kfac", "KFAC", ("kfac",)),
        Row("kfac_linear", "KFAC of linear layers", ("kfac",), linear=True),
        Row("kflr", "KFLR", ("kflr",)),
        Row(
            "kfac_diag_variance_l2",
            "KFAC + DiagGGNMC + Variance + BatchL2Grad",
            ("kfac", "diag_ggn_mc", "variance", "batch_l2"),
        ),
        Row("diag_hessian", "DiagHessian", ("diag_h",)),
    )
}


def rows_of(problem: Problem) -> list[str]:
    """Return the rows of a problem's table.

    Exact curvature of a language model has a column for every class at every position, and Kronecker factors of a table
    of positions none of the others has: of a transformer they are those of its linear layers.
    """
    if problem.tail:
        return ["gradient", "diag_ggn_exact", "diag_hessian"]
    left = {"diag_h", *(EXACT if problem.length else ())}
    rows = [row for row in ROWS.values() if not left & set(row.quantities)]
    if problem.attention:
        return [row.key for row in rows if row.linear or not set(KRONECKER) & set(row.quantities)]
    return [row.key for row in rows if not row.linear]


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
        self.linear = instance.linear
        self.batch = instance.batch
        self.max_norm = instance.problem.max_norm
        self.sampled = functools.lru_cache(maxsize=1)(lambda labels: Curvature(instance, labels))
        self.exact = functools.cache(lambda: Curvature(instance, None))
        self.hessian = functools.cache(lambda: hessian_diagonal(instance))

    def expected(self, quantity: str, labels: Tensor | None = None, *, pooled: bool = False) -> list[Any]:
        """Return the true values of a quantity, one tensor or list of Kronecker factors per parameter.

        Args:
            quantity: Its name.
            labels: Those that were drawn for it, where it is an estimate.
            pooled: Whether Kronecker factors are those of BackPACK, see `Curvature`.
        """
        if quantity == "diag_h":
            return self.hessian()
        if quantity in SAMPLED + EXACT:
            curvature = self.exact() if quantity in EXACT else self.sampled(labels)
            return curvature.factors(pooled=pooled) if quantity in KRONECKER else curvature.diagonal
        if quantity == "grad":
            return [r.sum(0) for r in self.rows]
        if quantity == "grad_batch":
            return self.rows
        if quantity == "clipped_grad":
            return clipped_sums(self.rows, self.batch, self.max_norm)
        if quantity == "variance":
            return [r.var(0, correction=0) for r in self.rows]
        return [reduce_rows(r.clone(), (quantity,))[quantity] for r in self.rows]


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
        difference = float((f.detach().to("cpu", torch.float64) - t.cpu()).norm())
        error = difference / max(float(t.norm()), FLOOR * largest)
        worst = float("inf") if math.isnan(error) else max(worst, error)
    return worst


def kronecker_error(found: Sequence[list[Tensor]], true: Sequence[list[Tensor]]) -> float:
    """Return the largest relative error over parameters and factors, a scalar between the two of a pair being free."""
    if [len(f) for f in found] != [len(t) for t in true]:
        return float("inf")
    both = [[balanced([t.detach().to("cpu", torch.float64) for t in pair]) for pair in side] for side in (found, true)]
    first, second = ([[pair[k] for pair in side if len(pair) > k] for side in both] for k in range(2))
    return max(relative_error(*first), relative_error(*second))


def judge(
    results: Results,
    row: Row,
    reference: Reference,
    drawn: Mapping[str, Tensor] | None = None,
    *,
    pooled: bool = False,
) -> Verdict:
    """Compare every quantity of a row, and the gradient where there is one, with the reference.

    Args:
        results: What a contender found.
        row: What it was asked for.
        reference: True values.
        drawn: The labels that it drew for each estimate.
        pooled: As for `Reference.expected`.
    """
    error, missing = 0.0, 0
    total = sum(reference.linear) if row.linear else len(reference.rows)
    for quantity in (*row.quantities, "grad"):
        found = results.get(quantity)
        if found is None and quantity == "grad":
            continue
        counts = reference.linear if row.linear and quantity != "grad" else [True] * len(reference.rows)
        present = (
            [] if found is None else [t for t, there in zip(found, counts, strict=True) if there and t is not None]
        )
        if len(present) < sum(counts):
            missing = max(missing, sum(counts) - len(present))
            continue
        true = reference.expected(quantity, (drawn or {}).get(quantity), pooled=pooled)
        true = [t for t, there in zip(true, counts, strict=True) if there]
        compare = kronecker_error if quantity in KRONECKER else relative_error
        error = max(error, compare(present, true))
    return Verdict(error, missing, total)


def smooth_instance(problem: Problem, device: torch.device) -> tuple[Instance, Reference]:
    """Return the first instance whose gradient rounding cannot change much, and its truth."""
    for seed in range(FIRST_SEED, FIRST_SEED + ATTEMPTS):
        instance = instantiate(problem, device, seed)
        reference = Reference(instance)
        loss = instance.loss_fn(instance.model(instance.inputs), instance.targets)
        found = torch.autograd.grad(loss, list(instance.model.parameters()))
        if relative_error(found, reference.expected("grad")) < SMOOTH:
            return instance, reference
    raise AssertionError(f"{problem.key}: no seed of {ATTEMPTS} gives a gradient stable in float32")
