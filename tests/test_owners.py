"""Rows that data puts elsewhere in each pass: three cotangents tell whose they are, or all is probed again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import _flight

pytestmark = pytest.mark.usefixtures("double")

N, T, D = 4, 15, 5


class Experts(nn.Module):
    """Tokens go to one of three layers, by their first entry; each layer reads its own in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))
        self.last = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).flatten(0, 1)
        bounds = torch.linspace(-1, 1, 4)[1:-1]
        expert = torch.bucketize(h[:, 0].detach().contiguous(), bounds)
        out = torch.zeros_like(h)
        for k, layer in enumerate(self.layers):
            where = (expert == k).nonzero()[:, 0]
            out = out.index_add(0, where, torch.relu(layer(h[where])))
        return self.last(out.view_as(x)).sum(1)


class Sorted(nn.Module):
    """Samples change places, by what is in them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        order = h[:, 0].argsort()
        return self.last(h[order])[order.argsort()]


class Slots(nn.Module):
    """Each sample is added to a slot of its own, or two of them to the same, as the data have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        slot = x[:, 0].long()
        h = torch.zeros(len(x), D).index_add(0, slot, torch.tanh(self.first(x)))
        return self.last(h)[slot]


def rows(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Individual gradients, one sample after the other, in plain torch."""
    found = []
    for k in range(len(x)):
        parts = torch.autograd.grad(
            loss(model(x[k : k + 1]), y[k : k + 1]), list(model.parameters()), allow_unused=True
        )
        found.append([torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), parts, strict=True)])
    return [torch.stack(of) for of in zip(*found, strict=True)]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many inner passes each probe has made so far: one number that grows."""
    count, send = [0], _flight.send

    def counted(*args: Any) -> Any:
        count[0] += 1
        return send(*args)

    monkeypatch.setattr(_flight, "send", counted)
    return count


def passed(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    with px.backpack(px.BatchGrad()):
        loss(model(x), y).backward()
    return [vars(p)["grad_batch"] for p in model.parameters()]


@pytest.mark.parametrize(("build", "shape"), [(Experts, (T, D)), (Sorted, (D,))], ids=["experts", "sorted"])
def test_later_passes_send_three_cotangents(build: Callable[[], nn.Module], shape: Any, sent: list[int]) -> None:
    model, loss = px.extend(build()), px.extend(nn.CrossEntropyLoss(reduction="sum"))
    plain = build()
    plain.load_state_dict(model.state_dict())
    made = []
    for n in (N, N, N, N - 1):
        x, y = torch.randn(n, *shape), torch.randint(2, (n,))
        before = sent[0]
        found = passed(model, loss, x, y)
        made.append(sent[0] - before)
        torch.testing.assert_close(found, rows(plain, loss, x, y), rtol=1e-9, atol=1e-10)
    assert made[0] == 5  # two digits and their opposites, and one sample alone
    assert made[1:] == [3, 3, 3]


class Put(Sorted):
    """The same, put where the order says, and not got from there."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        order = h[:, 0].argsort()
        there, back = torch.zeros_like(h), torch.zeros(len(x), 2)
        there[order.argsort()] = h
        back[order] = self.last(there)
        return back


class Added(Sorted):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        order = h[:, 0].argsort()
        there = self.last(torch.zeros_like(h).index_add(0, order.argsort(), h))
        return torch.zeros_like(there).index_copy(0, order, there)


class Shuffled(Sorted):
    """Samples change places by a permutation that is drawn elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        order = torch.tensor(h[:, 0].argsort().tolist())
        return self.last(h[order])[order.argsort()]


@pytest.mark.parametrize("build", [Sorted, Put, Added, Shuffled])
def test_an_order_that_was_there_by_chance_is_not_relied_on(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    model, loss = px.extend(build()), px.extend(nn.CrossEntropyLoss(reduction="sum"))
    x, y = torch.randn(N, D), torch.randint(2, (N,))
    with torch.no_grad():
        x = x[model.get_submodule("first")(x)[:, 0].argsort()]
    plain = build()
    plain.load_state_dict(model.state_dict())
    for data in (x, x.flip(0), x[torch.randperm(N)]):
        torch.testing.assert_close(passed(model, loss, data, y), rows(plain, loss, data, y), rtol=1e-9, atol=1e-10)


class Kept(Sorted):
    """Tokens above a bound go through a layer once more."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound, self.more = bound, nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).flatten(0, 1)
        where = (h[:, 0] > self.bound).nonzero()[:, 0]
        return self.last(h.index_add(0, where, torch.relu(self.more(h[where]))).view_as(x)).sum(1)


def test_rows_that_were_all_there_are_are_not_relied_on() -> None:
    """All are as many for each sample, one sample's behind another's; of some, not even N may divide the number."""
    model, loss, plain = px.extend(Kept(-9.0)), px.extend(nn.CrossEntropyLoss(reduction="sum")), Kept(0.0)
    plain.load_state_dict(model.state_dict())
    passed(model, loss, torch.randn(N, T, D), torch.randint(2, (N,)))
    model.bound = plain.bound
    for _ in range(4):
        x, y = torch.randn(N, T, D), torch.randint(2, (N,))
        torch.testing.assert_close(passed(model, loss, x, y), rows(plain, loss, x, y), rtol=1e-9, atol=1e-10)


def test_samples_that_meet_in_a_later_pass_are_found(sent: list[int]) -> None:
    model, loss = px.extend(Slots()), px.extend(nn.CrossEntropyLoss(reduction="sum"))
    x, y = torch.randn(N, D), torch.randint(2, (N,))
    x[:, 0] = torch.randperm(N)
    passed(model, loss, x, y)
    x[:, 0] = torch.randperm(N)
    before = sent[0]
    passed(model, loss, x, y)
    assert sent[0] - before == 3
    x[0, 0] = x[1, 0]
    with pytest.raises(px.CoupledSamplesError, match="Samples influence each other"):
        passed(model, loss, x, y)


class Graphs(nn.Module):
    """One number for each of several graphs, of nodes that hear of others along edges."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        h = self.first(x)
        h = self.last(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]))
        return torch.zeros(len(x) // 2, 1).index_add(0, graph, h)


def test_a_row_of_two_samples_is_not_taken_for_that_of_a_third() -> None:
    """In float32, with one output, what two samples send to a row is parallel: one cotangent may fit by chance.

    The other one may as well, for another sample yet: both do for two of these.
    """
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    n = 300
    model, loss = px.extend(Graphs(), batch_axis=None), px.extend(nn.MSELoss(reduction="sum"))
    place = torch.randperm(2 * n).argsort()
    graph = torch.empty(2 * n, dtype=torch.long).index_copy(0, place, torch.arange(n).repeat_interleave(2))
    x, edges = torch.randn(2 * n, 3), torch.stack([place[::2], place[1::2]])
    for first in [0, *torch.randint(1, n, (190,))[150:].tolist()]:
        other = edges.clone()
        other[1, 0] = place[2 * first + 1]  # of graph 0 itself at first, and then of another
        with pytest.raises(px.CoupledSamplesError) if first else nullcontext(), px.backpack(px.BatchL2Grad()):
            loss(model(x, other, graph), torch.zeros(n, 1)).backward()


def test_weak_coupling_in_a_later_pass_is_found() -> None:
    """A thousandth of another sample's row: below what rounding leaves of it in float32 it could not be."""

    class Leak(Slots):
        amount = 0.0

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            order = h[:, 0].detach().argsort()
            h = h[order]
            return self.last(h + self.amount * h.roll(1, 0))[order.argsort()]

    model, loss = px.extend(Leak()), px.extend(nn.CrossEntropyLoss(reduction="sum"))
    x, y = torch.randn(N, D), torch.randint(2, (N,))
    passed(model, loss, x, y)
    Leak.amount = 1e-3
    with pytest.raises(px.CoupledSamplesError):
        passed(model, loss, x, y)


def test_types_that_round_too_much_are_probed_again(sent: list[int]) -> None:
    model, loss = px.extend(Experts().bfloat16()), px.extend(nn.CrossEntropyLoss(reduction="sum"))
    for _ in range(2):
        before = sent[0]
        passed(model, loss, torch.randn(N, T, D, dtype=torch.bfloat16), torch.randint(2, (N,)))
        assert sent[0] - before >= 5


def test_without_a_gradient_at_some_rows() -> None:
    """Rows that no gradient reaches are nobody's, and NaN is everybody's own."""
    model, loss = px.extend(Experts()), px.extend(nn.CrossEntropyLoss(reduction="sum", ignore_index=0))
    plain = Experts()
    plain.load_state_dict(model.state_dict())
    for _ in range(3):
        x, y = torch.randn(N, T, D), torch.randint(2, (N,))
        torch.testing.assert_close(passed(model, loss, x, y), rows(plain, loss, x, y), rtol=1e-9, atol=1e-10)
