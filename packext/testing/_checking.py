"""All quantities of a model next to their definitions, in one call."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from packext._backpack import backpack
from packext._extend import extend
from packext._quantity import HessianQuantity, Quantity
from packext.quantities import GGNMP, HMP, PCHMP
from packext.testing._first_order import ORACLES, all_quantities, compare
from packext.testing._reference import NoOracle, Reference
from packext.testing._report import Entry, Report, relative_error
from packext.testing._samples import call
from packext.testing._second_order import CURVATURE_ORACLES, drawn

#: How far a sum of the samples' gradients may be from that of the batch, relative to it, by rounding in the model.
UNEQUAL = 1e-2
#: Passes that the mean of a random quantity is taken over.
PASSES = 100
#: Standard errors that Student's t of 100 values exceeds once in 100,000 times.
STANDARD_ERRORS = 4.657


def check(
    model: nn.Module,
    loss_fn: nn.Module,
    inputs: Any,
    targets: Any,
    quantities: Sequence[Quantity] | None = None,
    batch_axis: int | None = 0,
    tolerance: float = 1e-8,
    parameters: Iterable[Tensor] | None = None,
) -> Report:
    """Check packext on your own model: every quantity of every parameter against the slow oracle, in float64.

    Quantities of individual gradients are compared with a loop over the samples. Those of curvature are with dense
    matrices: a root of the GGN row by row, the Hessian by differentiating the gradient, and Kronecker factors from
    calls of the modules with one sample each. A root is one of many: its square is compared, by products with random
    vectors, as `HMP` and `GGNMP` are, and a Gram matrix by what is the same for all roots. So is the matrix that an
    `EKFAC` without a basis stands for; a basis that it is given has to be by name, and so has the direction of a
    `GradDot`. Of `TopEigenvalues`, vectors are to be orthonormal, values their Rayleigh quotients and, within the
    residuals, the matrix's own. `KFRA` and `PCHMP` have definitions for `nn.Sequential`s of modules that are one
    function each.

    Args:
        model: copied, so that it, its gradients and hooks stay as they are.
        loss_fn: a loss module with reduction "mean" or "sum" over samples of equal weight.
        inputs: a tensor, a tuple of arguments, or a dictionary of keyword arguments; a few samples suffice.
        targets: what the loss takes beside the output.
        quantities: to check; one of each of individual gradients by default.
        batch_axis: as for `extend`.
        tolerance: of the largest error relative to the largest value. Where the model computes in less than float64
            whatever its dtype, as some normalisations do, the plain gradient of the batch differs from the sum over
            the samples as well: the tolerance is then 30 times the largest such difference, and at most 1e-4.
            Of random quantities, the mean over 100 passes is compared with the exact value: error and tolerance are of
            the norm of the difference, relative to that of the exact value, and the tolerance is 4.7 standard errors
            of that mean. It is exceeded once in 100,000 times where results are about normal (predictions that are
            almost certain need more draws, `mc_samples`, for that). Of estimates this is the value.
        parameters: of the model, of which alone quantities are computed; all by default.

    Returns:
        One entry per parameter and quantity; `print` it, ask `.ok`. A model that is random (the loop over samples would
        draw other numbers), of which a copy uses the parameters of the model itself (by a function that it keeps), or
        which is refused, is a `PackextError`. A quantity that has no definition, or one that is too
        large to compute, is a `NoOracle`, which is a `ValueError`.
    """
    reference = Reference(model, loss_fn, inputs, targets, batch_axis, parameters=parameters)
    return against(reference, all_quantities() if quantities is None else quantities, tolerance)


def against(reference: Reference, quantities: Sequence[Quantity], tolerance: float = 1e-8) -> Report:
    """Compare quantities with a reference.

    Args:
        reference: of the model, the loss and the batch.
        quantities: in one pass (random ones in passes of their own).
        tolerance: as for `check`.

    Returns:
        One entry per parameter and quantity, and one per parameter for `.grad`.

    Raises:
        NoOracle: for a quantity without a definition.
        TypeError: for one quantity that is not in a list, or the class of one.
    """
    if isinstance(quantities, Quantity):
        raise TypeError(f"quantities must be a list, got one {type(quantities).__name__}.")
    for quantity in quantities:
        if type(quantity) not in {**ORACLES, **CURVATURE_ORACLES}:
            if isinstance(quantity, type):
                raise TypeError(
                    f"quantities must be instances, got the class {quantity.__name__}: write {quantity.__name__}()."
                )
            known = ", ".join(sorted(q.__name__ for q in {**ORACLES, **CURVATURE_ORACLES}))
            raise NoOracle(f"check has no slow oracle for {quantity!r}, but for {known}.")
    random = [q for q in quantities if drawn(q)]
    first_order = [q for q in quantities if type(q) in ORACLES]
    curvature = [q for q in quantities if type(q) in CURVATURE_ORACLES and not drawn(q)]
    twin = next(_passes(reference, [*first_order, *curvature] or random, 1))
    apart = not all(isinstance(q, HessianQuantity) for q in quantities)
    if apart:  # those of the Hessian know no samples
        if reference.rounding > UNEQUAL:
            raise NoOracle(
                f"check: the gradient of the batch differs from the sum over the samples by {reference.rounding:.1e}: "
                "the loss does not weight them equally, as a mean with class weights or ignored targets does not: pass "
                'one with reduction="sum". Or a sample alone is read otherwise: by a table with '
                "scale_grad_by_freq=True, or by what forward makes of the batch's data before any parameter, such as "
                "x - x.mean(0)."
            )
        tolerance = max(tolerance, min(1e-4, 30 * reference.rounding))
    report = compare(twin, first_order, reference.gradients, reference.factor, tolerance) if first_order else Report()
    for quantity in curvature:
        report += [_exact(reference, quantity, _results(twin, quantity), k, tolerance) for k in reference.parameters]
    if random:
        report += _random(reference, random, tolerance)
    named = dict(twin.named_parameters())
    for name in reference.parameters:
        grad = named[name].grad
        if grad is not None:
            want = reference.gradients[name].sum(0) if apart else reference.plain[name]
            report.append(Entry(name, ".grad", relative_error(grad, want), tolerance))
    return report


def _passes(reference: Reference, quantities: Sequence[Quantity], count: int) -> Iterator[nn.Module]:
    """An extended copy of the model after one pass, after another, and so on."""
    model = extend(copy.deepcopy(reference.whole), reference.batch_axis)
    loss_fn = extend(copy.deepcopy(reference.loss_fn))
    keep = any(isinstance(q, (HMP, GGNMP, PCHMP)) for q in quantities)
    chosen = None if reference.chosen is None else [model.get_parameter(name) for name in reference.chosen]
    for _ in range(count):
        model.zero_grad(set_to_none=True)
        with backpack(*quantities, parameters=chosen):
            loss_fn(call(model, reference.inputs), reference.targets).backward(retain_graph=keep)
        yield model


def _results(model: nn.Module, quantity: Quantity) -> dict[str, Any]:
    field = quantity.savefield
    return {name: getattr(p, field) for name, p in model.named_parameters() if hasattr(p, field)}


def _exact(reference: Reference, quantity: Quantity, results: dict[str, Any], name: str, tolerance: float) -> Entry:
    """Of one parameter; one that the pass did not reach is right if the definition is zero."""
    definition, label = CURVATURE_ORACLES[type(quantity)], type(quantity).__name__
    wanted = definition.wanted(quantity, reference, name)
    if name not in results:
        return Entry(name, label, min(float(w.abs().max()) for w in wanted), tolerance)  # one factor of zero suffices
    got = definition.read(quantity, reference, results, name)
    error = max(relative_error(g, w) for g, w in zip(got, wanted, strict=True))
    return Entry(name, label, error, tolerance)


def _random(reference: Reference, quantities: Sequence[Quantity], tolerance: float) -> Iterator[Entry]:
    """Means over passes, each in a norm: an entry by itself may be one that few draws reach."""
    found: dict[tuple[int, str], list[_Mean]] = {}
    for model in _passes(reference, quantities, PASSES):
        for k, quantity in enumerate(quantities):
            results = _results(model, quantity)
            for name in results:
                read = CURVATURE_ORACLES[type(quantity)].read(quantity, reference, results, name)
                for mean, value in zip(found.setdefault((k, name), [_Mean() for _ in read]), read, strict=True):
                    mean.add(value)
    for k, quantity in enumerate(quantities):
        label = type(quantity).__name__
        for name in reference.parameters:
            wanted = CURVATURE_ORACLES[type(quantity)].wanted(quantity, reference, name)
            if (k, name) not in found:
                yield Entry(name, label, min(float(w.abs().max()) for w in wanted), tolerance)
                continue
            entries = [m.entry(name, label, w, tolerance) for m, w in zip(found[k, name], wanted, strict=True)]
            yield max(entries, key=lambda e: e.error / e.tolerance)


class _Mean:
    """Of draws, and the sum of their squared deviations (Welford, 1962)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), 0.0

    def add(self, value: Tensor) -> None:
        self.count += 1
        away = value - self.mean
        self.mean = self.mean + away / self.count
        self.squares += float((away * (value - self.mean)).sum())

    def entry(self, name: str, label: str, wanted: Tensor, tolerance: float) -> Entry:
        """Error of the mean, and how large it may be, both relative to the norm of what is wanted."""
        if self.mean.shape != wanted.shape or not math.isfinite(self.squares):
            return Entry(name, label, math.inf, tolerance)
        size = float(wanted.norm()) or 1.0
        standard_error = (self.squares / (self.count - 1) / self.count) ** 0.5
        allowed = max(tolerance, STANDARD_ERRORS * standard_error / size)
        return Entry(name, label, float((self.mean - wanted).norm()) / size, allowed)
