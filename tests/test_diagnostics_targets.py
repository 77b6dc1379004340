"""How targets rank among those of others, and the rule that names samples by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import packext as px
from packext.diagnostics import Cockpit, Loss, TargetRanks, _observe, rules
from packext.diagnostics._verdict import Judge
from tests.helpers import mlp
from tests.test_syncs import watched

pytestmark = pytest.mark.usefixtures("double")


def watch(model: nn.Module) -> Cockpit:
    return Cockpit(
        px.extend(model), torch.optim.SGD(model.parameters(), 0.1), None, instruments=[TargetRanks(), Loss()]
    )


def step(monitor: Cockpit, loss: nn.Module, x: Tensor, *given: Any, **options: Any) -> None:
    with monitor.step(**options):
        px.extend(loss)(monitor.model(x), *given).backward()


def by_hand(out: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[list[float], float]:
    """The rank of each target among all others, one pair at a time, and the share of pairs with the same loss."""
    ranks, alike = [], 0
    for n in range(len(out)):
        own = float(loss(out[n : n + 1], y[n : n + 1]))
        others = [float(loss(out[n : n + 1], y[m : m + 1])) for m in range(len(out)) if m != n]
        equal = sum(abs(o - own) < 1e-9 for o in others)
        lower = sum(o < own - 1e-9 for o in others)
        ranks.append(lower / (len(others) - equal) if equal < len(others) else 0.0)
        alike += equal
    return ranks, alike / (len(out) * (len(out) - 1))


def tokens(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y, ignore_index=2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ranks_are_those_of_all_pairs(reduction: str) -> None:
    x, y = torch.randn(9, 5), torch.randint(3, (9,))
    model = nn.Linear(5, 3)
    ranks, same = by_hand(model(x).detach(), y, F.cross_entropy)
    monitor, index = watch(model), torch.randperm(50)[:9]
    with monitor.step(samples=index):
        px.extend(nn.CrossEntropyLoss(reduction=reduction))(model(x), y).sum().backward()
    values = monitor.values
    assert values["TargetRanks.each"] == pytest.approx(ranks) and values["TargetRanks"] == pytest.approx(np.mean(ranks))
    assert values["TargetRanks.same"] == pytest.approx(same)
    assert values["TargetRanks.samples"].tolist() == index.tolist()


def test_ranks_of_numbers_and_of_tokens_of_which_some_are_ignored() -> None:
    x, y = torch.randn(9, 5), torch.randn(9, 4)
    model = nn.Linear(5, 4)
    monitor = watch(model)
    step(monitor, nn.MSELoss(), x, y, samples=range(9))
    assert monitor.values["TargetRanks.each"] == pytest.approx(by_hand(model(x).detach(), y, F.mse_loss)[0])
    assert monitor.values["TargetRanks.same"] == 0
    model, y = nn.Sequential(nn.Linear(5, 12), nn.Unflatten(1, (3, 4))), torch.randint(3, (9, 4))
    y[:, 0] = torch.arange(9) % 2
    y[3, 1:] = 2  # the sum over its one token is less than that over four, and its mean need not be
    monitor = watch(model)
    step(monitor, nn.CrossEntropyLoss(ignore_index=2), x, y, samples=range(9))
    assert monitor.values["TargetRanks.each"] == pytest.approx(by_hand(model(x).detach(), y, tokens)[0])
    y[3] = 2
    step(monitor, nn.CrossEntropyLoss(ignore_index=2), x, y)
    assert "1 of 9 samples have no target that counts" in monitor.absent["TargetRanks"]
    beside = watch(nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Unflatten(1, (3, 4))))
    step(beside, nn.CrossEntropyLoss(ignore_index=2), x, y)
    assert "all targets are ignored" in beside.absent["TargetRanks"]


def test_each_sample_meets_eight_others_and_a_fit_ranks_first() -> None:
    monitor, y = watch(nn.Linear(5, 1, bias=False)), torch.linspace(-1, 1, 40)[:, None]
    with torch.no_grad():
        monitor.model.weight.copy_(torch.tensor([[1.0, 0, 0, 0, 0]]))
    x = torch.cat([y + 1e-3, torch.randn(40, 4)], 1)
    step(monitor, nn.MSELoss(), x, y)
    assert monitor.values["TargetRanks"] == 0 and "TargetRanks.each" not in monitor.values
    x[7, 0] = -y[7, 0]  # the seventh is met by 33 of the others
    step(monitor, nn.MSELoss(), x, y, samples=range(40))
    each = monitor.values["TargetRanks.each"]
    assert each[7] > 0.2 and set((8 * each).tolist()) <= {float(k) for k in range(9)} and not np.delete(each, 7).any()


def test_ranks_of_several_passes_and_beside_batch_norm() -> None:
    x, y, loss = torch.randn(8, 5), torch.randn(8, 1), px.extend(nn.MSELoss())
    model = nn.Linear(5, 1)
    want = [r for part in (slice(0, 3), slice(3, 8)) for r in by_hand(model(x[part]).detach(), y[part], F.mse_loss)[0]]
    monitor = watch(model)
    with monitor.step(samples=range(8)):
        for part in (slice(0, 3), slice(3, 8)):
            (loss(model(x[part]), y[part]) * (len(x[part]) / 8)).backward()
    assert monitor.values["TargetRanks.each"] == pytest.approx(want)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    out = model(x).detach()
    monitor = watch(model)
    step(monitor, nn.MSELoss(), x, y, samples=range(8))
    assert monitor.values["TargetRanks.each"] == pytest.approx(by_hand(out, y, F.mse_loss)[0])


class Root(nn.MSELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target).sqrt()


@pytest.mark.parametrize("loss, given, why", [
    (nn.CrossEntropyLoss(weight=1 + torch.arange(3.0).double()), (torch.arange(4) % 3,), "weighs its targets"),
    (nn.GaussianNLLLoss(), (torch.zeros(4, 3), torch.ones(4, 3)), "outputs and targets alone"),
    (Root(), (torch.zeros(4, 3),), "not one of torch's losses"),
    (nn.MSELoss(), (torch.full((4, 3), torch.inf),), "not finite"),
])  # fmt: skip
def test_where_ranks_are_unknown(loss: nn.Module, given: tuple[Tensor, ...], why: str) -> None:
    monitor = watch(mlp())
    step(monitor, loss, torch.randn(4, 5), *given)
    assert why in monitor.absent["TargetRanks"]


def test_ranks_of_one_sample_of_two_losses_and_of_losses_that_are_handed_over() -> None:
    monitor, x, y = watch(mlp()), torch.randn(4, 5), torch.arange(4) % 3
    step(monitor, nn.CrossEntropyLoss(), x[:1], y[:1])
    assert "none to compare with" in monitor.absent["TargetRanks"]
    loss = px.extend(nn.CrossEntropyLoss())
    with monitor.step():
        (loss(monitor.model(x), y) + loss(monitor.model(x), y)).backward()
    assert "2 losses" in monitor.absent["TargetRanks"]
    with monitor.step(scale=4.0) as seen:
        each = F.cross_entropy(monitor.model(x), y, reduction="none")
        seen.losses(each)
        each.mean().backward()
    assert "extended losses alone" in monitor.absent["TargetRanks"]


def hear(ranks: np.ndarray, same: float = 0.0, until: int = 0, n: int = 100) -> list[tuple[int, set[str]]]:
    """Each of 400 samples in four epochs by batches of n, with these ranks, but at random before look `until`."""
    judge, said, g = Judge([rules.LabelNoise()]), [], np.random.default_rng(0)
    for look in range(1600 // n):
        samples = np.arange(n) + n * (look % (400 // n))
        each = ranks[samples] if look >= until else g.random(n)
        page = {"TargetRanks": each.mean(), "TargetRanks.same": same, "TargetRanks.each": each}
        said += judge.hear(look, {**page, "TargetRanks.samples": samples})
    return [(v.step, {place.removeprefix("sample ") for place in v.where}) for v in said]


def some(sixteenths: int, rank: float) -> np.ndarray:
    return np.where(np.arange(400) % 16 < sixteenths, rank, 0.05)  # 25 samples each, evenly in all looks


def test_targets_that_rank_high_twice_are_those_of_others() -> None:
    assert hear(some(2, 0.7))[0][0] == 4  # of the first hundred that came again 13, three times that are 39 +- 10 %
    said = hear(some(1, 0.7))
    assert said[0][0] == 6  # 19 +- 4.2 % of 300, and before 6.3 % less
    assert said[-1][1] == {str(k) for k in range(0, 400, 16)}
    lone = np.where(np.arange(400) < 21, 0.9, 0.05)
    assert hear(lone[np.random.default_rng(1).permutation(400)])  # 21 of 400 by three standard errors: 6 %
    lone[19:21] = 0.05
    assert not [v for v in hear(lone[np.random.default_rng(1).permutation(400)]) if v[0] >= 7]  # 19: 4.7 %


def test_near_misses_and_targets_of_few_classes_are_not_blamed() -> None:
    assert hear(some(1, 0.6)) == []
    assert hear(some(1, 0.7), same=0.14) and not hear(some(1, 0.7), same=0.16)


def test_ranks_among_fewer_than_eight_others_say_nothing() -> None:
    assert hear(some(2, 0.7), n=10) and not hear(some(2, 0.7), n=8)


def test_nothing_is_said_of_targets_that_are_not_told_yet() -> None:
    assert hear(some(2, 0.7)) and hear(some(3, 0.7)) == []  # three times that are more than half
    for more, found in ((3, True), (4, False)):  # of what is no stranger's 88 and 80 % are told
        ranks = some(1, 0.7)
        ranks[np.isin(np.arange(400) % 16, range(8, 8 + more))] = 0.3
        assert bool(hear(ranks)) is found
    assert hear(some(0, 0.7), until=4) == []  # at random when they came first


def test_ranks_are_kept_of_a_bounded_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rules.LabelNoise()
    monkeypatch.setattr(type(rule._strangers), "memory", 250)
    for look in range(4):
        page = {"TargetRanks": 0.1, "TargetRanks.same": 0.0, "TargetRanks.each": np.full(100, 0.1)}
        rule.look(look, {**page, "TargetRanks.samples": np.arange(100) + 100 * look})
    assert len(rule._strangers._visits) == 250


def test_tokens_are_no_samples() -> None:
    model = nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Linear(1, 3), nn.Flatten(0, 1))
    monitor = watch(model)
    step(monitor, nn.CrossEntropyLoss(), torch.randn(4, 5), torch.randint(3, (20,)))
    assert monitor.absent["TargetRanks"] == "CrossEntropyLoss has 20 rows for 4 samples"


class Sizes(TorchDispatchMode):
    """The largest result of any operation, and all that softmaxes go through."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.softmax = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given, made = (
            {t.untyped_storage().data_ptr(): t.numel() for t in pytree.tree_leaves(some) if isinstance(t, Tensor)}
            for some in (args, found)
        )
        self.largest = max([self.largest, *(size for place, size in made.items() if place not in given)])
        self.softmax += args[0].numel() if func is torch.ops.aten._log_softmax.default else 0
        return found


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_ranks_of_tokens_take_one_softmax_and_little_memory(monkeypatch: pytest.MonkeyPatch, smoothing: float) -> None:
    out, y = torch.randn(9, 50, 6), torch.randint(50, (9, 6))
    y[4, :5] = y[2, 1] = 7
    loss = nn.CrossEntropyLoss(ignore_index=7, label_smoothing=smoothing)
    whole = _observe._compared(loss, (out, y), {})
    monkeypatch.setattr(_observe, "ENTRIES", 2 * 50 * 6)
    with Sizes() as seen:
        parts = _observe._compared(loss, (out, y), {})
    assert isinstance(whole, Tensor) and isinstance(parts, Tensor) and torch.equal(whole, parts)
    ranks, same = by_hand(out, y, loss)
    assert (parts[:, 0] / (1 - parts[:, 1])).tolist() == pytest.approx(ranks) and parts[:, 1].mean() == same
    assert seen.largest <= 2 * 50 * 6 and seen.softmax == out.numel()


def test_ranks_of_images_hold_a_few_copies_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    out, y = torch.randn(9, 1, 40, 40), torch.randn(9, 1, 40, 40)
    whole = _observe._compared(nn.MSELoss(), (out, y), {})
    monkeypatch.setattr(_observe, "ENTRIES", 2 * 1600)
    with Sizes() as seen:
        parts = _observe._compared(nn.MSELoss(), (out, y), {})
    assert isinstance(whole, Tensor) and isinstance(parts, Tensor) and torch.equal(whole, parts)
    assert (parts[:, 0] / (1 - parts[:, 1])).tolist() == pytest.approx(by_hand(out, y, F.mse_loss)[0])
    assert seen.largest <= 2 * 1600


@pytest.mark.parametrize("loss, y", [
    (nn.CrossEntropyLoss(), torch.arange(6) % 3),
    (nn.CrossEntropyLoss(ignore_index=0), torch.arange(6) % 3),
    (nn.MSELoss(), torch.ones(6, 3)),
])  # fmt: skip
def test_ranks_in_the_forward_pass_wait_for_nothing(loss: nn.Module, y: Tensor) -> None:
    monitor, loss = watch(mlp()), px.extend(loss)
    with monitor.step():
        out = monitor.model(torch.randn(6, 5))
        with watched() as found:
            value = loss(out, y.to(out.dtype) if y.is_floating_point() else y)
        value.backward()
    assert "TargetRanks" in {**monitor.values, **monitor.absent} and not found
