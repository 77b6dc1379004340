"""Labels through a secure aggregation that was not written here: Flower's SecAgg+."""

from __future__ import annotations

import logging
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import attacks
from tests.helpers import double_precision

pytest.importorskip("flwr")
from packext.attacks import flower  # noqa: E402
from packext.attacks.flower import SecAggPlus  # noqa: E402

logging.getLogger("flwr").setLevel(logging.ERROR)


def messages(k: int, scale: float = 1.0) -> list[dict[str, Tensor]]:
    return [{"w": scale * torch.randn(5, 4), "b": scale * torch.randn(3)} for _ in range(k)]


@pytest.mark.parametrize("samples", [[3, 40], [8, 256, 100, 9, 1]])
def test_a_weighted_mean(samples: list[int]) -> None:
    """Within the rounding of Flower's integers."""
    torch.manual_seed(0)
    sent = messages(len(samples))
    found = SecAggPlus(samples)(sent)
    # Each client rounds samples / max_weight times its message to steps of 2 * 8 / 2**22, up or down.
    step = 16 / 2**22 * 1000 / sum(samples) * len(samples)
    for name in ("w", "b"):
        want = sum(m[name].double() * n for m, n in zip(sent, samples, strict=True)) / sum(samples)
        assert found[name].dtype == torch.float64 and 0 < (found[name] - want).abs().max() <= step
    assert all(torch.equal(found[name], value) for name, value in SecAggPlus(samples)(sent).items())


def test_generators_are_as_they_were() -> None:
    before, drawn = np.random.get_state()[1].copy(), []
    SecAggPlus([3, 40])(messages(2))
    assert (np.random.get_state()[1] == before).all()
    state = random.getstate()  # from here on, since checks of shapes draw from this one
    for _ in range(2):
        with flower._round(0):
            drawn.append(random.random())
        assert random.getstate() == state
    assert drawn[0] == drawn[1]


def test_what_is_too_large_is_cut_off() -> None:
    found = SecAggPlus([250, 750])([{"w": torch.tensor([100.0])}, {"w": torch.tensor([1.0])}])
    assert float(found["w"]) == pytest.approx(8.0 + 0.75, abs=1e-4)  # in place of 25.75


@pytest.mark.parametrize("magnitude, exact", [(10.0, True), (3000.0, False)])
def test_labels_through_secagg_plus(magnitude: float, exact: bool) -> None:
    """Of all clients; shifts that are too large for the clipping range hide them again."""
    torch.manual_seed(0)
    with double_precision():
        model = nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 30))
        batches = [(torch.randn(n, 20), torch.randint(30, (n,))) for n in (8, 23, 64, 100, 17, 40, 9, 30)]
        loss, sizes = nn.CrossEntropyLoss(), [len(y) for _, y in batches]
        attack = attacks.SecureAggregationLabels(magnitude=magnitude)
        plan = attack.plan(model, torch.randn(4, 20), len(batches))
        cohort = attacks.Cohort(model, loss, batches, sum=SecAggPlus(sizes))
        found = attack.counts(plan, cohort.round(plan.states), sizes, loss, weighted=True)
    true = torch.stack([torch.bincount(y, minlength=30) for _, y in batches])
    assert bool((found.counts == true).all()) == exact
    assert (found.error.max() < 0.05) if exact else (found.error.max() > 0.2)


@pytest.mark.parametrize(
    "of, sent, match",
    [
        (SecAggPlus([1]), messages(1), "two clients or more; got 1"),
        (SecAggPlus([1, 1]), [{"w": torch.zeros(2)}, {"w": torch.zeros(3)}], "same names and shapes"),
        (SecAggPlus([1, 1]), messages(3), "3 messages need 3 weights"),
        (SecAggPlus([0, 1]), messages(2), "from 1 to max_weight = 1000"),
        (SecAggPlus([1, 1001]), messages(2), "from 1 to max_weight = 1000"),
        (SecAggPlus([1, 1, 1], modulus_range=2**23), messages(3), "can exceed the modulus 8388608"),
        (SecAggPlus([1, 1]), messages(2, math.nan), "Client 0 sends 'w' with entries that are not finite"),
    ],
)
def test_what_it_cannot_sum(of: SecAggPlus, sent: Any, match: str) -> None:
    with pytest.raises(px.PackextError, match=match):
        of(sent)
