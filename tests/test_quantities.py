"""Every quantity on every case against the loop over single samples, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import packext as px
from packext import testing
from tests.cases import CASES, Case


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def run(case: Case, quantities: Any, scale: Any = "loss") -> Any:
    model, inputs, targets = case.build()
    loss = case.loss()
    n = testing.batch_size(inputs, case.batch_axis)
    mean = loss.reduction == "mean"
    weights = [1 / n] * n if mean else [1.0] * n
    if case.weights is not None:
        weights = case.weights(targets)
    rows = testing.individual_gradients(model, loss, inputs, targets, case.batch_axis, weights)
    factor = float(n) if mean else 1.0
    px.extend(model, case.batch_axis)
    px.extend(loss)
    with px.backpack(*quantities, scale=scale) as results:
        loss(testing.call(model, inputs), targets).backward()
    if scale == "sample":
        rows, factor = {k: r * factor for k, r in rows.items()}, 1.0
    return model, results, rows, factor


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_all_in_one_pass(case: Case) -> None:
    quantities = testing.all_quantities()
    model, results, rows, factor = run(case, quantities)
    report = testing.compare(model, quantities, rows, factor, 1e-9)
    assert report.ok, str(report)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert testing.relative_error(p.grad, rows[name].sum(0)) < 1e-9, name


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_each_alone(case: Case) -> None:
    for quantity in testing.all_quantities():
        torch.manual_seed(0)
        model, results, rows, factor = run(case, [quantity])
        report = testing.compare(model, [quantity], rows, factor, 1e-9)
        assert report.ok, str(report)
