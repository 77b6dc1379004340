"""Every quantity on every case against the loop over single samples, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import nn

import packext as px
from packext import _statistics, testing
from tests.cases import CASES, Case
from tests.helpers import double_precision

#: torch's own advice on even kernels, for the plain model as well.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with double_precision():
        yield


class Prepared:
    """A case, its rows by the slow oracle, and the model and loss extended."""

    def __init__(self, case: Case) -> None:
        self.model, self.inputs, self.targets = case.build()
        self.loss = case.loss()
        n = testing.batch_size(self.inputs, case.batch_axis)
        mean = self.loss.reduction == "mean"
        weights = [1 / n] * n if mean else [1.0] * n
        if case.weights is not None:
            weights = case.weights(self.targets)
        self.factor = float(n) if mean else 1.0
        self.rows = testing.individual_gradients(
            self.model, self.loss, self.inputs, self.targets, case.batch_axis, weights
        )
        px.extend(self.model, case.batch_axis)
        px.extend(self.loss)

    def check(self, quantities: Any, scale: Any = "loss") -> px.Results:
        """Compare the quantities of one backward pass."""
        self.model.zero_grad()
        rows, factor = self.rows, self.factor
        if scale == "sample":
            rows, factor = {k: r * factor for k, r in rows.items()}, 1.0
        with px.backpack(*quantities, scale=scale) as results:
            self.loss(testing.call(self.model, self.inputs), self.targets).backward()
        report = testing.compare(self.model, quantities, rows, factor, 1e-9)
        assert report.ok, str(report)
        return results


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_all_in_one_pass(case: Case) -> None:
    quantities = testing.all_quantities()
    this = Prepared(case)
    results = this.check(quantities)
    for name, p in this.model.named_parameters():
        if not p.requires_grad:
            assert p.grad is None and name not in results, name
        elif p.grad is None:
            assert not this.rows[name].any() and name not in results, name
            assert not any(hasattr(p, q.savefield) for q in quantities), name
        else:
            assert testing.relative_error(p.grad, this.rows[name].sum(0)) < 1e-9, name


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_each_alone(case: Case) -> None:
    this = Prepared(case)
    for quantity in testing.all_quantities():
        this.check([quantity])


@pytest.mark.parametrize("name", ["conv2d groups", "mlp", "lstm"])
def test_deviations_in_parts_of_a_tile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner products keep the rows, so that deviations from their mean are not taken in place."""
    monkeypatch.setattr(_statistics, "SMALL", 1)
    this = Prepared(next(case for case in CASES if case.name == name))
    this.check([px.Variance(), px.GradDot()])
    this.check([px.Variance(), px.BatchGrad()])


@pytest.mark.parametrize("case", CASES[::7], ids=lambda c: c.name)
def test_scale_of_the_samples_own_losses(case: Case) -> None:
    # The default direction of GradDot is a mean in this scale: tests/test_context.py.
    Prepared(case).check([q for q in testing.all_quantities() if not isinstance(q, px.GradDot)], "sample")


def test_the_table_has_one_name_each() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(isinstance(case.loss(), nn.Module) for case in CASES)
