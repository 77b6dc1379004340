"""Random entries of individual gradients: they are entries of these gradients, and all are as likely."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import packext as px
from packext import testing
from packext._factored import Outer
from packext.diagnostics._step import DrawnGrad
from tests.cases import CASES, Case

#: torch's own advice on even kernels, for the plain model as well.
pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings("ignore:Using padding='same'")]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_entries_that_are_drawn_are_those_of_the_individual_gradients(case: Case) -> None:
    model, inputs, targets = case.build()
    model, loss = px.extend(model, case.batch_axis), px.extend(case.loss())
    with px.backpack(DrawnGrad(3, 2, 5), px.BatchGrad(), scale=2.0) as results:
        loss(testing.call(model, inputs), targets).backward()
    n = testing.batch_size(inputs, case.batch_axis)
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(3))[:2]
    for name in results:
        (values, positions), rows = results[name].drawn_grad, results[name].grad_batch.reshape(n, -1)
        assert values.shape == positions.shape and values.shape[1] >= min(5, rows.shape[1]), name
        torch.testing.assert_close(values, rows[chosen].gather(1, positions), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(3, 8, 2, groups=1), nn.Conv2d(4, 8, 2, groups=2)])
def test_every_entry_of_a_row_is_as_likely_to_be_drawn_as_any_other(layer: nn.Module) -> None:
    model, loss = px.extend(nn.Sequential(layer, nn.Flatten()).double()), px.extend(nn.CrossEntropyLoss())
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, layer.in_channels, 4, 4)
    size, counts, drawn = layer.weight.numel(), 0, 0
    for seed in range(300):
        with px.backpack(DrawnGrad(seed, 2, 4), parameters=[layer.weight]) as results:
            loss(model(x), torch.zeros(2, dtype=torch.long)).backward()
        positions = results["0.weight"].drawn_grad.positions
        counts, drawn = counts + torch.bincount(positions.flatten(), minlength=size), drawn + positions.numel()
    share = drawn / size
    assert ((counts - share) / share**0.5).abs().max() < 4.5


@pytest.mark.parametrize(("groups", "positions"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_entries_of_sums_of_products_in_groups(groups: int, positions: int) -> None:
    a, g = torch.randn(6, groups, positions, 3), torch.randn(6, groups, 4, positions)
    form, index = Outer(a, g, (groups * 4, 3)), torch.tensor([4, 1, 5])
    values, at = form.drawn(index, 5, torch.Generator().manual_seed(0))
    assert len(values.T) >= 5 and len(at.unique()) > 5
    torch.testing.assert_close(values, form.rows(0, 6)[index].flatten(1).gather(1, at))
    torch.testing.assert_close(form.subset(index).rows(0, 3), form.rows(0, 6)[index])
