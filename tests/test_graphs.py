"""Batches whose inputs have no axis of samples: nodes and edges of several graphs, in any order."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import packext as px
from packext import testing
from tests import test_union
from tests.cases import CASES, Case, Packed
from tests.helpers import assert_private_step, rows_of

pytestmark = pytest.mark.usefixtures("double")
LOSS = nn.CrossEntropyLoss()


class Graphs(nn.Module):
    """Two rounds of messages along edges, a weight for each node, and the weighted sum of each graph."""

    def __init__(self, kinds: int = 0, mix: str = "index_add") -> None:
        super().__init__()
        self.first = nn.Embedding(kinds, 6) if kinds else nn.Linear(5, 6)
        self.second, self.norm, self.mix = nn.Linear(6, 6), nn.LayerNorm(6), mix
        self.gate, self.last = nn.Linear(6, 1), nn.Linear(6, 3)

    def messages(self, h: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        if self.mix == "sparse":
            adjacency = torch.sparse_coo_tensor(
                edges.flip(0), h.new_ones(edges.shape[1]), 2 * h.shape[:1], check_invariants=True
            )
            return torch.sparse.mm(adjacency, h)
        if self.mix == "amax":
            index = target[:, None].expand(-1, h.shape[1])
            return torch.zeros_like(h).scatter_reduce(0, index, h[source], "amax")
        return torch.zeros_like(h).index_add(0, target, h[source])

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        h = self.first(nodes)
        h = (h + self.messages(h, edges)).tanh()
        h = self.norm(self.second(h))
        h = h + self.messages(h, edges)
        weight = self.gate(h).sigmoid()
        count = int(graph.max()) + 1
        return self.last(h.new_zeros(count, 6).index_add(0, graph, weight * h))


Batch = tuple[Tensor, Tensor, Tensor]


def graphs(sizes: list[int], kinds: int = 0, shuffled: bool = True) -> tuple[Batch, list[Batch]]:
    """Nodes, edges and the graph of each node; and the same of every graph by itself."""
    singles, start, edges = [], 0, []
    for size in sizes:
        nodes = torch.randint(kinds, (size,)) if kinds else torch.randn(size, 5)
        own = torch.randint(size, (2, 2 * size))
        singles.append((nodes, own, torch.zeros(size, dtype=torch.long)))
        edges.append(own + start)
        start += size
    graph = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    order = torch.randperm(start) if shuffled else torch.arange(start)
    nodes = torch.cat([nodes for nodes, _, _ in singles])
    return (nodes[order], order.argsort()[torch.cat(edges, 1)], graph[order]), singles


def rows(model: nn.Module, singles: Sequence[tuple[Tensor, ...]], y: Tensor) -> list[Tensor]:
    """Individual gradients `[N, *p]` of the mean loss, one graph at a time."""
    with px.disable():
        found = [
            torch.autograd.grad(
                LOSS(model(*single), label[None]) / len(y), list(model.parameters()), materialize_grads=True
            )
            for single, label in zip(singles, y, strict=True)
        ]
    return [torch.stack(each) for each in zip(*found, strict=True)]


def diagonals(model: nn.Module, singles: Sequence[tuple[Any, ...]], y: Tensor) -> list[Tensor]:
    """The diagonal of the GGN, by a square root of the Hessian of each graph's loss."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for single in singles:
        with px.disable():
            z = model(*single)[0]
        chance = z.detach().softmax(0)
        root = chance.sqrt().diag() - torch.outer(chance, chance.sqrt())
        for column in root.T:
            found = torch.autograd.grad(z @ column, parameters, retain_graph=True)
            total = [t + g.square() / len(y) for t, g in zip(total, found, strict=True)]
    return total


def compare(model: nn.Module, sizes: list[int], kinds: int = 0, shuffled: bool = True) -> None:
    batch, singles = graphs(sizes, kinds, shuffled)
    y = torch.randint(3, (len(sizes),))
    loss = px.extend(nn.CrossEntropyLoss())
    quantities = (px.BatchGrad(), px.BatchL2Grad(), px.SumGradSquared(), px.Variance(), px.BatchDotGrad())
    model.zero_grad()
    with px.backpack(*quantities, px.DiagGGNExact()):
        loss(model(*batch), y).backward()
    for p, each, diagonal in zip(
        model.parameters(), rows(model, singles, y), diagonals(model, singles, y), strict=True
    ):
        flat = each.flatten(1)
        torch.testing.assert_close(p.grad_batch, each)
        torch.testing.assert_close(p.batch_l2, flat.square().sum(1))
        torch.testing.assert_close(p.sum_grad_squared, each.square().sum(0))
        torch.testing.assert_close(p.variance, each.var(0, correction=0))
        torch.testing.assert_close(p.batch_dot, flat @ flat.T)
        torch.testing.assert_close(p.diag_ggn_exact, diagonal)
        torch.testing.assert_close(p.grad, each.sum(0))


@pytest.mark.parametrize("mix", ["index_add", "sparse", "amax"])
@pytest.mark.parametrize("kinds", [0, 7])
def test_graphs_of_any_size_and_order(kinds: int, mix: str) -> None:
    model = px.extend(Graphs(kinds, mix), batch_axis=None)
    for sizes in ([3, 5, 2, 4], [4, 1, 1, 6], [2, 2, 2, 2], [1, 1, 1, 1], [3, 2], [4]):
        for shuffled in (True, False):
            compare(model, sizes, kinds, shuffled)


class Sums(nn.Module):
    """Of the points of several sets, without an index by which rows are picked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, points: Tensor, edges: Tensor, group: Tensor) -> Tensor:
        h = self.first(points).tanh()
        return self.last(h.new_zeros(int(group.max()) + 1, 6).index_add(0, group, h))


def test_sets_of_one_size_and_then_of_others() -> None:
    model = px.extend(Sums(), batch_axis=None)
    for sizes in ([2, 2, 2, 2], [1, 3, 3, 1], [2, 2, 2, 2], [5, 1, 1, 1]):
        compare(model, sizes, shuffled=False)


class Halves(nn.Module):
    """One layer for the samples whose first entry is positive, and another for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.rest = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out, positive = x.new_zeros(len(x), 3), x[:, 0] > 0
        out[positive], out[~positive] = self.positive(x[positive]), self.rest(x[~positive])
        return out


class OneByOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.last = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.last(self.rnn(sample[None, None])[1][0, 0]) for sample in x])


def test_several_rows_of_the_inputs_for_each_sample() -> None:
    """Folded before the model: the error says what to call, and that is right."""

    class Unfolds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).tanh().unflatten(0, (-1, 3)).sum(1)

    model, x, y = px.extend(Unfolds()), torch.randn(12, 5), torch.randint(3, (4,))
    said = r"No output .* axis of 12 entries .* outputs are \[4, 3\].*None where inputs have no axis of samples"
    with pytest.raises(px.PackextError, match=said), px.backpack(px.BatchGrad()):
        LOSS(model(x), y).backward()
    px.extend(model, batch_axis=None)
    rows = rows_of(model, lambda: nn.CrossEntropyLoss(reduction="none")(model(x), y) / 4)
    with px.backpack(px.BatchGrad()):
        LOSS(model(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_batch, rows[name])


@pytest.mark.parametrize("kind", [Halves, OneByOne])
def test_layers_that_run_on_some_of_the_samples(kind: type[nn.Module]) -> None:
    model, y = kind(), torch.randint(3, (6,))
    px.extend(model)
    said = r"px\.extend\(model, batch_axis=None\)"
    with pytest.raises(px.CoupledSamplesError, match=said), px.backpack(px.BatchGrad()):
        LOSS(model(torch.randn(6, 5)), y).backward()
    px.extend(model, batch_axis=None)
    for _ in range(3):
        x = torch.randn(6, 5)
        with px.backpack(px.BatchGrad()):
            LOSS(model(x), y).backward()
        for p, each in zip(model.parameters(), rows(model, [(sample[None],) for sample in x], y), strict=True):
            torch.testing.assert_close(p.grad_batch, each)


def results(case: Case, axis: int | None, *quantities: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, inputs, targets = case.build()
    loss = px.extend(case.loss())
    px.extend(model, axis)
    torch.manual_seed(1)
    with px.backpack(*quantities, attach=False) as found:
        loss(testing.call(model, inputs), targets).backward()
    return {f"{name}.{q.savefield}": getattr(found[name], q.savefield) for name in found for q in quantities}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", [c for c in CASES if c.batch_axis == 0], ids=lambda c: c.name)
def test_every_case_with_an_axis_is_the_same_without(case: Case) -> None:
    """Whose output uses a row decides as much as an axis does, where there is one."""
    for quantities in ((px.BatchGrad(), px.Variance()), (px.DiagGGNExact(),)):
        try:
            wanted = results(case, 0, *quantities)
        except px.PackextError:
            continue
        got = results(case, None, *quantities)
        assert got.keys() == wanted.keys()
        for name, want in wanted.items():
            torch.testing.assert_close(got[name], want, msg=name)


class Starts(nn.Module):
    """A GRU on packed sequences, two of each sample, from a state that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.start, self.last = nn.GRU(5, 6), nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x, lengths = torch.cat([x, x.flip(2)]), lengths.repeat(2)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        ends = self.rnn(packed, self.start.expand(-1, len(x), -1))[1][0]
        return self.last(ends[: len(x) // 2] * ends[len(x) // 2 :])


def test_several_packed_sequences_of_a_sample_and_a_learned_state() -> None:
    model, loss = Starts(), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(4, 4, 5), torch.randint(3, (4,))
    px.extend(model)
    with pytest.raises(px.CoupledSamplesError, match="batch_axis=None"), px.backpack(px.BatchGrad()):
        loss(model(x, torch.tensor([2, 4, 1, 4])), y).backward()
    px.extend(model, batch_axis=None)
    for lengths in (torch.tensor([2, 4, 1, 4]), torch.tensor([3, 3, 3, 3]), torch.tensor([1, 2, 3, 4])):
        with px.backpack(px.BatchGrad()):
            loss(model(x, lengths), y).backward()
        for p, each in zip(
            model.parameters(), rows(model, [(x[k : k + 1], lengths[k : k + 1]) for k in range(4)], y), strict=True
        ):
            torch.testing.assert_close(p.grad_batch, each)


def test_factors_of_rows_that_are_pooled_by_graph() -> None:
    """Inputs are averaged over a graph's own nodes, and gradients summed (Eschenhagen et al., 2023)."""
    model, (batch, _) = px.extend(Graphs(), batch_axis=None), graphs([3, 5, 2, 4])
    seen: dict[str, Tensor] = {}

    def look(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen["a"] = inputs[0].detach()
        output.register_hook(lambda g: seen.__setitem__("g", g))

    model.second.register_forward_hook(look)
    loss, y, graph = px.extend(nn.CrossEntropyLoss()), torch.randint(3, (4,)), batch[2]
    for bias in ("separate", "joint"):
        with px.backpack(px.KFAC(fisher="empirical", approx="reduce", bias=bias), parameters=model.second.parameters()):
            loss(model(*batch), y).backward()
        a = torch.stack([seen["a"][graph == k].mean(0) for k in range(4)])
        a = torch.cat([a, torch.ones(4, 1)], 1) if bias == "joint" else a
        g = torch.stack([seen["g"][graph == k].sum(0) for k in range(4)])
        torch.testing.assert_close(model.second.weight.kfac, [4 * g.T @ g, a.T @ a / 4])


def test_in_float32_the_places_of_later_passes_are_found() -> None:
    torch.set_default_dtype(torch.float32)
    model = px.extend(Graphs(), batch_axis=None)
    loss = px.extend(nn.CrossEntropyLoss())
    for _ in range(4):
        batch, singles = graphs(torch.randint(1, 30, (12,)).tolist())
        y = torch.randint(3, (12,))
        with px.backpack(px.BatchGrad()):
            loss(model(*batch), y).backward()
        for p, each in zip(model.parameters(), rows(model, singles, y), strict=True):
            torch.testing.assert_close(p.grad_batch, each, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("first", [True, False], ids=["at first", "later"])
def test_an_edge_between_graphs_is_refused(first: bool) -> None:
    model, y = px.extend(Graphs(), batch_axis=None), torch.randint(3, (4,))
    (nodes, edges, graph), _ = graphs([3, 5, 2, 4], shuffled=False)
    if not first:
        with px.backpack(px.BatchGrad()):
            LOSS(model(nodes, edges, graph), y).backward()
    model.zero_grad()
    joined = torch.cat([edges, torch.tensor([[0], [13]])], 1)
    said = r"Samples influence each other.*4 samples \(axis 0 of the output\).*a row .* serves several samples"
    with pytest.raises(px.CoupledSamplesError, match=said), px.backpack(px.BatchGrad()):
        LOSS(model(nodes, joined, graph), y).backward()
    assert all(p.grad is None and hasattr(p, "grad_batch") is not first for p in model.parameters())


def test_statistics_over_all_nodes_are_refused() -> None:
    model = Graphs()
    model.norm = nn.BatchNorm1d(6)  # type: ignore[assignment]
    batch, _ = graphs([3, 5, 2, 4])
    px.extend(model, batch_axis=None)
    with pytest.raises(px.CoupledSamplesError, match="BatchNorm"), px.backpack(px.BatchGrad()):
        LOSS(model(*batch), torch.randint(3, (4,))).backward()


class WithNodes(Graphs):
    """Returns features of the nodes beside the outputs of the graphs."""

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(nodes, edges, graph), self.first(nodes)


def test_outputs_of_the_graphs_beside_those_of_the_nodes() -> None:
    batch, singles = graphs([3, 5, 2, 4])
    model, y = px.extend(WithNodes(), batch_axis=None), torch.randint(3, (4,))
    with px.backpack(px.BatchGrad()):
        LOSS(model(*batch)[0], y).backward()
    alone = Graphs()
    alone.load_state_dict(model.state_dict())
    for p, each in zip(model.parameters(), rows(alone, singles, y), strict=True):
        torch.testing.assert_close(p.grad_batch, each)
    with pytest.raises(px.PackextError, match=r"sizes are \[4, 14\]\. Return outputs"), px.backpack(px.BatchGrad()):
        sum(part.sum() for part in model(*batch)).backward()  # type: ignore[union-attr]
    with px.backpack(px.DiagGGNExact()):
        px.extend(nn.CrossEntropyLoss())(model(*batch)[0], y).backward()
    for p, diagonal in zip(model.parameters(), diagonals(alone, singles, y), strict=True):
        torch.testing.assert_close(p.diag_ggn_exact, diagonal)


class Energy(nn.Module):
    """The sum over edges of what a perceptron makes of the squared distances."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 1, bias=False)

    def forward(self, places: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        source, target = edges
        each = self.last(self.first((places[source] - places[target]).square()).tanh())
        return each.new_zeros(int(graph.max()) + 1, 1).index_add(0, graph[target], each)


def of_forces(model: nn.Module, batch: Batch, weight: float) -> Tensor:
    """Squares of energies, times `weight`, and of forces."""
    places, edges, graph = batch
    places = places.clone().requires_grad_()
    energies = model(places, edges, graph)
    (forces,) = torch.autograd.grad(energies.sum(), places, create_graph=True)
    return weight * energies.square().sum() + (forces - 1).square().sum()


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_forces_on_the_nodes_of_graphs(weight: float) -> None:
    """Of losses made of derivatives by nodes, whose each is, the energies say."""
    model = px.extend(Energy(), batch_axis=None)
    for sizes in ([3, 5, 2, 4], [6, 1, 2], [2, 2, 2], [1, 1, 1], [4]):
        batch, singles = graphs(sizes)
        model.zero_grad()
        with px.backpack(px.BatchGrad(), px.BatchL2Grad()):
            of_forces(model, batch, weight).backward()
        with px.disable():
            each = [torch.autograd.grad(of_forces(model, one, weight), list(model.parameters())) for one in singles]
        for p, wanted in zip(model.parameters(), zip(*each, strict=True), strict=True):
            torch.testing.assert_close(p.grad_batch, torch.stack(wanted))
            torch.testing.assert_close(p.batch_l2, torch.stack(wanted).flatten(1).square().sum(1))


def test_forces_between_graphs_are_refused() -> None:
    model, places, graph = px.extend(Energy(), batch_axis=None), torch.randn(4, 5), torch.tensor([0, 0, 1, 1])
    edges = torch.tensor([[0, 1, 2, 3, 0], [1, 0, 3, 2, 3]])  # the last one between the graphs
    said = "outputs of several samples depend on one row"
    for weight in (1.0, 0.0):
        with pytest.raises(px.CoupledSamplesError, match=said), px.backpack(px.BatchGrad()):
            of_forces(model, (places, edges, graph), weight).backward()
    assert all(p.grad is None for p in model.parameters())


def _two_processes(rank: int, world: int) -> None:
    """Each with graphs of its own, or packed sequences, in a plain model, under DDP and under FSDP2."""
    quantities = (px.BatchGrad(), px.BatchL2Grad(), px.Variance(), px.KFAC(fisher="empirical"))
    _, singles = graphs([3, 5, 2, 4])
    y, lengths, words = torch.randint(3, (4,)), torch.tensor([2, 4, 1, 4]), torch.randint(7, (4, 4))
    parts = ((slice(0, 2), slice(2, 4)), (slice(0, 3), slice(3, 4)))  # as many graphs on each, and not

    def joined(some: list[Batch]) -> Batch:
        starts = torch.tensor([0, *[len(nodes) for nodes, _, _ in some]]).cumsum(0)
        edges = torch.cat([own + start for (_, own, _), start in zip(some, starts, strict=False)], 1)
        graph = torch.arange(len(some)).repeat_interleave(starts.diff())
        return torch.cat([nodes for nodes, _, _ in some]), edges, graph

    def recurrent() -> nn.Module:
        model = Packed(nn.GRU(5, 6), 7)
        model(words, lengths)
        return model

    def step(model: nn.Module, part: slice, group: Any) -> px.Results:
        batch = (words[part], lengths[part]) if isinstance(original, Packed) else joined(singles[part])
        with px.backpack(*quantities, scale="sample", group=group, attach=False) as found:
            px.extend(nn.CrossEntropyLoss())(model(*batch), y[part]).backward()
        return found

    for make, axis in ((Graphs, None), (recurrent, 0)):
        torch.manual_seed(0)
        original = make()
        wanted = step(px.extend(copy.deepcopy(original), axis), slice(0, 4), None)
        for kind in ("plain", "DDP", "FSDP2"):
            model = px.extend(copy.deepcopy(original), axis)
            wrapped = test_union.wrapped(model, kind)
            for part in parts:
                found = step(wrapped, part[rank], dist.group.WORLD)
                test_union.agree(found, wanted, quantities, kind)


def test_two_processes() -> None:
    test_union.together(_two_processes)


def test_private_steps_and_half_precision() -> None:
    model, y = px.extend(Graphs(), batch_axis=None), torch.randint(3, (4,))
    batch, singles = graphs([3, 5, 2, 4])
    names = [name for name, _ in model.named_parameters()]
    each = {name: 4 * g for name, g in zip(names, rows(model, singles, y), strict=True)}  # of the samples' own losses
    assert_private_step(model, lambda: px.extend(nn.CrossEntropyLoss())(model(*batch), y), each)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16), px.backpack(px.BatchGrad()):
            px.extend(nn.CrossEntropyLoss())(model.float()(batch[0].float(), *batch[1:]), y).backward()
        for p, wanted in zip(model.parameters(), rows(model.double(), singles, y), strict=True):
            torch.testing.assert_close(p.grad_batch.double(), wanted, rtol=0.1, atol=0.02)


def test_what_is_said_of_them() -> None:
    model, (batch, _) = Graphs(), graphs([3, 5, 2, 4])
    assert "N = 4;" in str(px.explain(px.extend(model, batch_axis=None), *batch))
    with pytest.raises(testing.NoOracle, match="batch_axis=None"):
        testing.check(model, LOSS, batch, torch.randint(3, (4,)), batch_axis=None)
    for wrong in (True, -1):
        with pytest.raises(ValueError, match="0 or more, or None"):
            px.extend(model, batch_axis=wrong)
