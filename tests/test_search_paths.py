"""Binary gates, intervals, latency and memory of the search of paths."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import packext as px
from packext.search import LatencyTable, MixedOp, ProxylessNAS, Race, Zero


def ops(channels: int = 4) -> dict[str, nn.Module]:
    def conv(size: int) -> nn.Module:
        return nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, channels, size, padding=size // 2), nn.GroupNorm(2, channels)
        )

    return {"conv3": conv(3), "conv1": conv(1), "skip": nn.Identity(), "pool": nn.AvgPool2d(3, 1, 1)}


def network(seed: int = 0, channels: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), MixedOp(ops(channels)), nn.Tanh(), MixedOp(ops(channels)),
        nn.Flatten(), nn.Linear(36 * channels, 3),
    )  # fmt: skip


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 1, 6, 6), torch.randint(3, (n,))


def at(net: nn.Module, **paths: tuple[str, str]) -> Callable[[Tensor], tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]]:
    """A plain forward pass on paths: the output, and at each edge the outputs of both operations."""

    def run(x: Tensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        seen = {}
        for name, module in net.named_children():
            if isinstance(module, MixedOp):
                active, other = (module.ops[k] for k in paths[f"e{name}"])
                seen[f"e{name}"] = (active(x), other(x))
                x = seen[f"e{name}"][0]
            else:
                x = module(x)
        return x, seen

    return run


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_those_of_each_sample_by_its_gates(reduction: str) -> None:
    net, (x, y) = network().double(), batch()
    x = x.double()
    for edge in (net[1], net[3]):
        edge.alpha.data = torch.randn(4).double()
    search = ProxylessNAS(net, nn.CrossEntropyLoss(reduction=reduction), level=0.1, prune=False)
    for _ in range(4):
        alphas = {"1": net[1].alpha.detach().clone(), "3": net[3].alpha.detach().clone()}
        found = {g.edge: g for g in search.step(x, y)}
        run = at(net, **{f"e{k}": (g.active, g.inactive) for k, g in found.items()})
        differences: dict[str, list[float]] = {k: [] for k in found}
        for i in range(len(x)):
            output, seen = run(x[i : i + 1])
            loss = F.cross_entropy(output, y[i : i + 1])
            for k, (active, other) in seen.items():
                (slope,) = torch.autograd.grad(loss, active, retain_graph=True)
                differences[k[1:]].append(float((slope * (active - other).detach()).sum()))
        for k, g in found.items():
            module = net[int(k)]
            a, b = (math.exp(alphas[k][module.names.index(name)]) for name in (g.active, g.inactive))
            slope, d = a * b / (a + b) ** 2, np.array(differences[k])
            assert g.gradient == pytest.approx(slope * d.mean(), rel=1e-9)
            half = stats.t.ppf(0.95, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
            assert g.half_width == pytest.approx(slope * half, rel=1e-9)
            assert g.certain == (abs(g.gradient) > g.half_width)


class Linear(nn.Module):
    """A loss that is linear in the network's output, whose expectation over binary gates is linear in them, too."""

    reduction = "mean"

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return (output * F.one_hot(y, 3)).sum(1).mean()


def test_gradient_is_that_of_the_expected_loss_of_the_two_paths() -> None:
    torch.manual_seed(0)
    choices = {"a": nn.Linear(5, 3), "b": nn.Linear(5, 3), "c": nn.Linear(5, 3)}
    net = nn.Sequential(nn.Identity(), MixedOp(choices)).double()
    x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
    net[1].alpha.data = torch.tensor([0.3, -0.5, 0.1]).double()
    search, losses = ProxylessNAS(net, Linear(), prune=False), {}
    for name in choices:
        losses[name] = Linear()(net[1].ops[name](x), y).item()

    def expected(alpha: Tensor, pair: list[int]) -> float:
        return float(alpha[pair].softmax(0) @ torch.tensor([losses["abc"[k]] for k in pair]).double())

    for _ in range(5):
        alpha = net[1].alpha.detach().clone()
        (g,) = search.step(x, y)
        pair = ["abc".index(g.active), "abc".index(g.inactive)]
        step = torch.zeros(3).double()
        step[pair[0]] = 1e-5
        want = (expected(alpha + step, pair) - expected(alpha - step, pair)) / 2e-5
        assert g.gradient == pytest.approx(want, rel=1e-6)


def test_a_step_moves_two_probabilities_and_keeps_the_others() -> None:
    net, (x, y) = network(), batch()
    search = ProxylessNAS(net, nn.CrossEntropyLoss(), lr=0.3)
    for _ in range(5):
        before = {k: net[int(k)].probabilities().detach() for k in ("1", "3")}
        for g in search.step(x, y):
            op, after = net[int(g.edge)], net[int(g.edge)].probabilities().detach()
            pair = [op.names.index(g.active), op.names.index(g.inactive)]
            others = [k for k in range(4) if k not in pair]
            torch.testing.assert_close(after[others], before[g.edge][others], rtol=1e-5, atol=0)
            moved = float(after[pair[0]] - before[g.edge][pair[0]])
            assert moved * g.gradient < 0
    first = ProxylessNAS(net, nn.CrossEntropyLoss(), lr=0.3)
    odds = {k: net[k].alpha.detach().clone() for k in (1, 3)}
    for g in first.step(x, y):
        op = net[int(g.edge)]
        a, b = op.names.index(g.active), op.names.index(g.inactive)
        change = (op.alpha[a] - op.alpha[b]) - (odds[int(g.edge)][a] - odds[int(g.edge)][b])
        assert abs(change.item()) == pytest.approx(0.6, rel=1e-4)  # Adam's first step moves each by its rate


def test_a_step_leaves_weights_gradients_and_paths_alone() -> None:
    net, (x, y) = network(), batch()
    search = ProxylessNAS(net, nn.CrossEntropyLoss())
    paths = search.sample()
    nn.CrossEntropyLoss()(net(x), y).backward()
    weights = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in search.weights()]
    state, hooks = torch.get_rng_state(), [len(m._forward_hooks) for m in net.modules()]
    search.step(x, y)
    for (value, grad), p in zip(weights, search.weights(), strict=True):
        assert torch.equal(value, p) and ((grad is None) == (p.grad is None)) and (grad is None or p.grad.equal(grad))
    assert torch.equal(state, torch.get_rng_state()) and net[1].alpha.grad is None and net[1].gates.grad is None
    assert hooks == [len(m._forward_hooks) for m in net.modules()]
    assert {k: net[int(k)].names[net[int(k)].active] for k in paths} == paths and net[1].inactive is None
    assert not any("gate" in name for name, _ in net.named_parameters())
    assert {id(p) for p in net.parameters()} - {id(p) for p in search.weights()} == {id(net[1].alpha), id(net[3].alpha)}


def test_an_operation_may_write_into_its_input() -> None:
    (x, y), found = batch(), []
    for inplace in (False, True):
        net = network()
        net[2] = nn.Identity()  # the backward pass of Tanh needs what it has given
        for module in net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = inplace
        found.append([ProxylessNAS(net, nn.CrossEntropyLoss(), lr=0.1, seed=k).step(x, y) for k in range(8)])
    assert found[0] == found[1]


def test_paths_are_drawn_by_their_probabilities() -> None:
    net = network()
    net[1].alpha.data = torch.tensor([0.0, 1.0, -1.0, 0.5])
    net[1].alive[3] = False
    search = ProxylessNAS(net, nn.CrossEntropyLoss(), seed=3)
    counts, weight = dict.fromkeys(net[1].names, 0), net[1].ops["conv3"][1].weight
    weight.grad = torch.ones(4, 4, 3, 3)
    for _ in range(2000):
        path = search.sample()["1"]
        counts[path] += 1
        assert (weight.grad is not None) == (list(counts.values()) == [counts["conv3"], 0, 0, 0])
    p = np.exp([0.0, 1.0, -1.0])
    assert stats.chisquare([counts[k] for k in ("conv3", "conv1", "skip")], 2000 * p / p.sum()).pvalue > 0.01
    assert counts["pool"] == 0
    state = torch.get_rng_state()
    first, second = (ProxylessNAS(net, nn.CrossEntropyLoss(), seed=3) for _ in range(2))
    assert [first.sample() for _ in range(9)] == [second.sample() for _ in range(9)]
    assert torch.equal(state, torch.get_rng_state())


def test_memory_is_that_of_one_path() -> None:
    saved = pytest.importorskip("benchmarks.search_paths", reason="the source distribution has no benchmarks").saved
    x, y = batch(16)
    net = network(channels=8)
    wide = nn.Sequential(*[
        MixedOp({f"{name}{k}": op for k in range(5) for name, op in ops(8).items()}) if isinstance(m, MixedOp) else m
        for m in network(channels=8)
    ])  # fmt: skip
    for model in (net, wide):
        ran: list[nn.Module] = []
        search = ProxylessNAS(model, nn.CrossEntropyLoss())
        search.sample()
        for edge in (model[1], model[3]):
            edge.active = 0
            for op in edge.ops.values():
                op.register_forward_hook(lambda module, args, output, ran=ran: ran.append(module))
        derived = search.derive()
        assert saved(lambda model=model: model(x)) == saved(lambda derived=derived: derived(x)) > 0
        ran.clear()
        model(x)
        assert ran == [model[1].ops[model[1].names[0]], model[3].ops[model[3].names[0]]]
    one = saved(lambda: net(x))
    assert saved(lambda: wide(x)) == one

    def everything() -> Tensor:  # what a sum over all paths, weighted with their probabilities, would keep
        h = net[0](x)
        for k in (1, 3):
            p = net[k].probabilities().float()
            h = sum(p[i] * op(h) for i, op in enumerate(net[k].ops.values()))
            h = net[2](h) if k == 1 else h
        return net[5](net[4](h))

    assert saved(everything) > 2 * one
    # A step of the architecture keeps one path, and the outputs of one more: those of no inner layer.
    search = ProxylessNAS(net, nn.CrossEntropyLoss(), prune=False)
    search.step(x, y)  # the check for samples that influence each other has run, and gates have been probed
    outputs = 2 * 2 * 16 * 8 * 36 * 4  # at each edge, of both operations
    for _ in range(3):
        extra = saved(lambda: search.step(x, y)) - one
        assert extra <= outputs + 2048


def test_the_latency_enters_the_gradient_and_the_expectation() -> None:
    net, (x, y) = network().double(), batch()
    x = x.double()
    table = LatencyTable({k: {n: 1e-3 * (i + 1) * int(k) for i, n in enumerate(net[1].names)} for k in ("1", "3")}, {})
    net[1].alpha.data = torch.randn(4).double()
    p = net[1].probabilities()
    want = 1e-3 * (p @ torch.arange(1, 5).double()) + 3e-3 * 2.5
    assert table.expected(net).item() == pytest.approx(want.item())
    plain = ProxylessNAS(copy.deepcopy(net), nn.CrossEntropyLoss()).step(x, y)
    search = ProxylessNAS(net, nn.CrossEntropyLoss(), latency=table, tradeoff=0.7)
    assert search.reference == pytest.approx(want.item())
    alphas = {k: net[int(k)].alpha.detach().clone() for k in ("1", "3")}
    for g, without in zip(search.step(x, y), plain, strict=True):
        pair = [net[1].names.index(g.active), net[1].names.index(g.inactive)]
        alpha = alphas[g.edge][pair].requires_grad_()
        seconds = table.of(g.edge, net[int(g.edge)])[pair]
        (slope, _) = torch.autograd.grad(0.7 * (alpha.softmax(0) @ seconds) / search.reference, alpha)[0]
        assert g.gradient - without.gradient == pytest.approx(float(slope), rel=1e-9)
        assert g.half_width == pytest.approx(without.half_width, rel=1e-9)


def test_latencies_are_measured_and_kept(tmp_path: Any) -> None:
    net, (x, _) = network(channels=16), batch(64)
    net[2].eval()
    net[1].active = 2
    table = LatencyTable.measure(net, x, turns=5)
    assert net[0].training and not net[2].training and net[1].active == 2 and net[3].active is None
    assert not net[1]._forward_pre_hooks
    for edge in ("1", "3"):
        assert list(table.seconds[edge]) == net[1].names
        assert 0 < table.seconds[edge]["skip"] < table.seconds[edge]["conv3"] < 1
        assert table.about["inputs"][edge] == [[64, 16, 6, 6], "torch.float32"]
    table.save(tmp_path / "latency.json")
    again = LatencyTable.load(tmp_path / "latency.json")
    assert (again.seconds, again.about) == (table.seconds, table.about)
    del again.seconds["3"]["pool"]
    with pytest.raises(px.PackextError, match="no latency of pool at '3'"):
        ProxylessNAS(net, nn.CrossEntropyLoss(), latency=again)
    with pytest.raises(px.PackextError, match="'a' at '1' is -1"):
        LatencyTable({"1": {"a": -1.0}}, {})
    assert LatencyTable.measure(Named(net[1]), torch.randn(2, 16, 6, 6), turns=1).about["inputs"]["edge"][0][0] == 2


class Named(nn.Module):
    """Calls its edge by keyword."""

    def __init__(self, edge: nn.Module) -> None:
        super().__init__()
        self.edge = edge

    def forward(self, x: Tensor) -> Tensor:
        return self.edge(x=x)


def naive(kinds: dict[tuple[int, int], list[np.ndarray]], a: int, b: int, k: int, level: float) -> tuple[float, float]:
    """The interval of a race by its formula, from all differences."""
    centre, variances, dofs, looks = 0.0, [], [], 0
    for at, sign in (((a, b), 1), ((b, a), -1)):
        steps = kinds[at]
        means = [d.mean() for d in steps]
        within = np.mean([d.var(ddof=1) / len(d) for d in steps])
        between = np.var(means, ddof=1)
        variances.append(max(within, between) / len(steps))
        dofs.append(len(steps) - 1)
        centre += sign * np.mean(means) / 2
        looks += len(steps)
    dof = sum(variances) ** 2 / sum(v**2 / f for v, f in zip(variances, dofs, strict=True))
    alpha = level / (k * (k - 1) * looks * (looks + 1))
    half = stats.t.isf(alpha, dof) * math.sqrt(sum(variances)) / 2
    return centre - half, centre + half


def test_intervals_of_a_race() -> None:
    draw, race = np.random.default_rng(0), Race(3, 0.1)
    kinds: dict[tuple[int, int], list[np.ndarray]] = {(a, b): [] for a in range(3) for b in range(3)}
    for t in range(60):
        a, b = draw.permutation(3)[:2]
        d = draw.normal((0.4, 0, 0.1)[a] - (0.4, 0, 0.1)[b], 1, size=6 + t % 3) + draw.normal(0, 0.5 * (t > 30))
        kinds[a, b].append(d)
        race.add(int(a), int(b), torch.tensor(d))
    for a, b in ((0, 1), (2, 1), (1, 0)):
        assert race.interval(a, b) == pytest.approx(naive(kinds, a, b, 3, 0.1), rel=1e-9)
    assert Race(3, 0.1).interval(0, 1) is None
    again = Race(3, 0.1)
    again.load_state_dict(race.state_dict())
    assert again.interval(0, 2) == race.interval(0, 2)
    flat = Race(2, 0.1)
    for at in ((0, 1), (1, 0)) * 2:
        flat.add(*at, torch.ones(4))
    assert flat.interval(0, 1) is None
    with pytest.raises(px.PackextError, match="A race of 2 operations"):
        flat.load_state_dict(race.state_dict())


def test_a_race_seldom_errs_and_finds_what_is_worse() -> None:
    draw, wrong, right, runs = torch.Generator().manual_seed(0), 0, 0, 60
    for run in range(runs):
        race, alive, worse = Race(3, 0.2), torch.ones(3, dtype=torch.bool), torch.tensor([0.0, 0.0, 0.5])
        lost: set[int] = set()
        for t in range(60):
            a, b = torch.randperm(3, generator=draw)[:2].tolist()
            between = 0.2 * torch.randn((), generator=draw) * (run % 2)
            race.add(a, b, worse[a] - worse[b] + between + torch.randn(16, generator=draw))
            lost |= set(race.lost(alive, t % 2))  # either of the two best may lead
        wrong += bool(lost & {0, 1})
        right += 2 in lost
    assert wrong <= 0.2 * runs and right > 0.9 * runs


def test_a_race_errs_no_more_often_than_it_says_where_steps_differ_and_are_few() -> None:
    """Of a pair out of ten operations that are alike: the variance between two steps is often too small by chance."""
    draw, runs, wrong = torch.Generator().manual_seed(0), 1500, 0
    for _ in range(runs):
        race, missed = Race(10, 0.2), False
        for t in range(8):
            means = math.sqrt(10 / 16) * torch.randn((), generator=draw)
            race.add(t % 2, 1 - t % 2, means + torch.randn(16, generator=draw))
            low, high = race.interval(0, 1) or (-1.0, 1.0)
            missed |= not low < 0 < high
        wrong += missed
    assert wrong <= 2 * runs * 0.2 / 45  # 45 pairs share the level


def test_both_orders_together_are_the_difference_of_a_quadratic_loss() -> None:
    torch.manual_seed(0)
    a, b, target = torch.randn(3, 5, 4).double().unbind(0)
    race = Race(2, 0.05)
    for _ in range(2):
        race.add(0, 1, ((a - target) * (a - b)).sum(1))
        race.add(1, 0, ((b - target) * (b - a)).sum(1))
    low, high = race.interval(0, 1)  # type: ignore[misc]
    want = ((a - target).square().sum(1) - (b - target).square().sum(1)).mean() / 2
    assert (low + high) / 2 == pytest.approx(float(want), rel=1e-12)


def test_a_bad_operation_is_pruned_and_the_search_ends() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    y = (x[:, 0] > 0).long()
    net = nn.Sequential(nn.Linear(6, 8), MixedOp({"zero": Zero(), "skip": nn.Identity()}), nn.Linear(8, 2))
    search = ProxylessNAS(net, nn.CrossEntropyLoss(), lr=0.02)
    optimizer = torch.optim.SGD(search.weights(), 0.5)
    for _ in range(80):
        search.sample()
        optimizer.zero_grad()
        F.cross_entropy(net(x[:128]), y[:128]).backward()
        optimizer.step()
        found = search.step(x[128:], y[128:])
        if search.decided:
            break
    assert search.pruned == [(search.steps, "1", "zero")] and search.steps < 80
    assert search.chosen() == {"1": "skip"} and net[1].probabilities().tolist() == [0.0, 1.0] and found
    assert search.step(x, y) == [] and search.sample() == {"1": "skip"}
    derived = search.derive()
    assert isinstance(derived[1], nn.Identity) and isinstance(net[1], MixedOp)
    torch.testing.assert_close(derived(x), net(x))


def test_an_edge_that_zeros_cut_off_learns_nothing() -> None:
    torch.manual_seed(0)
    last = MixedOp({"zero": Zero(), "null": Zero()})
    net = nn.Sequential(nn.Linear(6, 8), MixedOp({"a": nn.Tanh(), "b": nn.Identity()}), last)
    search = ProxylessNAS(net, nn.CrossEntropyLoss())
    found = search.step(torch.randn(8, 6), torch.randint(8, (8,)))
    assert [g.gradient for g in found] == [0.0, 0.0] and not search._races["1"].steps.any()


def test_a_search_goes_on_where_it_was_saved() -> None:
    (x, y), runs = batch(), []
    first, second = network(), network(1)
    table = LatencyTable({k: {n: 1e-3 * (i + 1) for i, n in enumerate(first[1].names)} for k in ("1", "3")}, {})
    search = ProxylessNAS(first, nn.CrossEntropyLoss(), lr=0.1, latency=table, seed=3)
    for _ in range(4):
        search.step(x, y)
    kept = copy.deepcopy(first.state_dict()), search.state_dict()
    second.load_state_dict(kept[0])
    resumed = ProxylessNAS(second, nn.CrossEntropyLoss(), lr=0.1, latency=table)
    for each in (search, resumed, resumed):
        if each is resumed:
            second.load_state_dict(kept[0])
            resumed.load_state_dict(kept[1])
        runs.append([each.step(x, y) for _ in range(3)] + [each.sample()])
    assert runs[0] == runs[1] == runs[2] and search.steps == resumed.steps == 7
    for edge in ("1", "3"):
        assert torch.equal(search._races[edge].steps, resumed._races[edge].steps)
        assert int(search._races[edge].steps.sum()) == 7
    with pytest.raises(px.PackextError, match="edges"):
        resumed.load_state_dict({"races": {}})
    fewer = network()
    fewer[3] = MixedOp({"a": nn.Tanh(), "b": nn.Identity()})
    other = ProxylessNAS(fewer, nn.CrossEntropyLoss())
    with pytest.raises(px.PackextError, match="A race of 2 operations"):
        other.load_state_dict(kept[1])
    assert not other._races["1"].steps.any() and other.steps == 0


class Mixes(nn.Module):
    """Takes the mean of neighbours in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + x.roll(1, 0)) / 2


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.edge = MixedOp({"a": nn.Tanh(), "b": nn.Identity()})

    def forward(self, x: Tensor) -> Tensor:
        return self.edge(self.edge(x))


def flat(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), *modules, nn.Linear(36, 3))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: flat(MixedOp({"a": nn.BatchNorm1d(36), "b": nn.Tanh()})), r"At 1, rows \[36\].*BatchNorm"),
        (lambda: flat(nn.BatchNorm1d(36), MixedOp({"a": nn.Tanh(), "b": nn.Identity()})), "change with the inputs"),
        (lambda: flat(MixedOp({"a": nn.Tanh(), "b": Mixes()})), "change with the inputs"),
        (lambda: flat(Twice()), "ran 2 times"),
        (lambda: flat(MixedOp({"a": nn.Identity(), "b": nn.Linear(36, 1)})), "one shape"),
        (
            lambda: flat(MixedOp({"a": nn.Tanh(), "b": nn.Unflatten(0, (4, 2))})),
            r"At 1, one tensor .* not \[4, 2, 36\]",
        ),
    ],
)
def test_networks_that_are_refused(make: Callable[[], nn.Sequential], why: str) -> None:
    torch.manual_seed(0)
    net, (x, y) = make(), batch()
    if "one shape" in why:
        net[2] = Broad()
    search = ProxylessNAS(net, nn.CrossEntropyLoss())
    before = copy.deepcopy(net.state_dict())
    with pytest.raises((px.PackextError, RuntimeError), match=why):
        for _ in range(9):
            search.step(x, y)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and search.steps == 0
    edges = [m for m in net.modules() if isinstance(m, MixedOp)]
    assert all(m.active is None and m.inactive is None and not m._forward_hooks for m in edges)
    if "BatchNorm" in why:  # with running statistics, samples are apart
        net.eval()
        assert len(search.step(x, y)) == 1


class Broad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x[:, :1])


def test_bad_input_is_refused() -> None:
    net, (x, y) = network(), batch()
    with pytest.raises(px.PackextError, match="has no path yet"):
        net(x)
    search = ProxylessNAS(net, nn.CrossEntropyLoss())
    state = copy.deepcopy((net.state_dict(), search.state_dict()))
    for bad, target, why in (
        (x[:1], y[:1], "two samples"),
        (x[:0], y[:0], "two samples"),
        (x * torch.nan, y, "not finite"),
        ([1.0], y, "list"),
    ):
        with pytest.raises(px.PackextError, match=why):
            search.step(bad, target)
    with pytest.raises(px.PackextError, match="scalar"):
        ProxylessNAS(net, nn.CrossEntropyLoss(reduction="none")).step(x, y)
    broken = network()
    broken[0].weight.data[0] = torch.nan
    with pytest.raises(px.PackextError, match=r"At 1, values \[8, 4, 6, 6\] are not finite"):
        ProxylessNAS(broken, nn.CrossEntropyLoss()).step(x, y)
    failing = ProxylessNAS(net, nn.MSELoss())
    drawn = failing.state_dict()["generator"]
    with pytest.raises(px.PackextError, match="is nan: it must be finite"):
        failing.step(x, torch.full((8, 3), torch.nan))
    assert torch.equal(failing.state_dict()["generator"], drawn) and failing.steps == 0
    assert torch.equal(search.state_dict()["generator"], state[1]["generator"])
    assert all(torch.equal(v, state[0][k]) for k, v in net.state_dict().items())
    for wrong in ({"lr": 0.0}, {"level": 1.0}, {"tradeoff": -1.0}):
        with pytest.raises(ValueError):
            ProxylessNAS(net, nn.CrossEntropyLoss(), **wrong)
    with pytest.raises(ValueError, match="two operations or more"):
        MixedOp({"a": nn.Identity()})
    with pytest.raises(px.PackextError, match="nothing to search"):
        ProxylessNAS(nn.Linear(2, 2), nn.CrossEntropyLoss())
    for nested in (MixedOp(ops()), nn.Sequential(MixedOp({"a": MixedOp(ops()), "b": nn.Identity()}))):
        with pytest.raises(px.PackextError, match="part of the network"):
            ProxylessNAS(nested, nn.CrossEntropyLoss())
    with pytest.raises(px.PackextError, match="is extended"):
        ProxylessNAS(px.extend(net), nn.CrossEntropyLoss())


def test_scipy_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = network(), batch()
    search = ProxylessNAS(net, nn.CrossEntropyLoss())
    monkeypatch.setitem(__import__("sys").modules, "scipy.special", None)
    with pytest.raises(ImportError, match=r"pip install 'packext\[search\]'"):
        search.step(x, y)
    assert search.steps == 0 and not net[1].alpha.any()
