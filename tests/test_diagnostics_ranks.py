"""Several processes under one monitor each: together they say what one process with all samples says."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import packext as px
from packext import _curvature
from packext.diagnostics import (
    ActivationScale,
    Alpha,
    BatchSize,
    Cockpit,
    DeadUnits,
    Distance,
    EarlyStopping,
    EffectiveRank,
    GradHist1d,
    GradHist2d,
    GradNorm,
    GradSNR,
    HessMaxEV,
    HessTrace,
    InnerTest,
    InputScale,
    Instrument,
    Loss,
    MeanGSNR,
    NoiseScale,
    NormLayerNoiseScale,
    NormTest,
    OrthoTest,
    OutputScale,
    Run,
    SampleNorms,
    TICDiag,
    UpdateCurvature,
    UpdateSize,
)
from packext.diagnostics._step import _drawn, chosen_of
from tests.helpers import processes

WORLD = 2
ASKED: tuple[Callable[[], Any], ...] = (
    Loss, GradNorm, UpdateSize, Distance, NormTest, InnerTest, OrthoTest, NoiseScale, GradSNR, SampleNorms, Alpha,
    UpdateCurvature, MeanGSNR, EarlyStopping, BatchSize, InputScale, OutputScale, ActivationScale,
    lambda: GradHist1d(samples=100), lambda: GradHist2d(samples=100),
    lambda: HessTrace("ggn"), lambda: TICDiag("ggn"),
)  # fmt: skip
ALONE: list[Any] = []
WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "DDP(extend)": lambda m: DistributedDataParallel(px.extend(m)),
    "extend(DDP)": lambda m: px.extend(DistributedDataParallel(m)),
}


def by_itself(model: nn.Module) -> Any:
    """A model that this process trains alone: under a group with no other process in it."""
    return DistributedDataParallel(px.extend(model), process_group=ALONE[dist.get_rank()])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).double()


def images() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(36, 3))


def data(n: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=draw, dtype=torch.float64), torch.randint(3, (n,), generator=draw)


class Keep:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, Any], dict[str, str]]] = []

    def begin(self, names: list[str]) -> int:
        return 0

    def write(self, step: int, values: Any, absent: Any) -> None:
        self.lines.append((step, dict(values), dict(absent)))

    def say(self, verdict: Any) -> None:
        pass


def watched(model: Any, sinks: Any = (), asked: Any = ASKED, rate: float = 0.1) -> Cockpit:
    optimizer = torch.optim.SGD(model.parameters(), rate)
    return Cockpit(model, optimizer, None, 1, sinks, [make() for make in asked])


def steps(
    model: nn.Module, monitor: Cockpit, loss: Callable[..., Tensor], batches: Any, parts: int = 1, sync: bool = False
) -> None:
    for x, y in batches:
        with monitor.step():
            monitor.optimizer.zero_grad()
            for k, (a, b) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
                last = sync or k == parts - 1 or not isinstance(model, DistributedDataParallel)
                with contextlib.nullcontext() if last else model.no_sync():  # type: ignore[operator]
                    (loss(model(a), b) / parts).backward()
            monitor.optimizer.step()


def scaled(loss: nn.Module, factor: float) -> Callable[..., Tensor]:
    return lambda output, y: loss(output, y).mean() * factor


def same(found: Keep, wanted: Keep, tolerance: float = 1e-9) -> None:
    names = [[(s, sorted(v), sorted(a)) for s, v, a in sink.lines] for sink in (found, wanted)]
    assert names[0] == names[1], [a for _, _, a in found.lines]
    for (step, values, _), (_, want, _) in zip(found.lines, wanted.lines, strict=True):
        for name, value in want.items():
            got, expected = torch.as_tensor(values[name]), torch.as_tensor(value)
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=1e-12, msg=f"step {step}, {name}")


# -- what each process runs ---------------------------------------------------------------------------


def as_one_process(rank: int) -> None:
    batches = [data(8, seed) for seed in range(3)]
    for scale, reduction in ((1.0, "mean"), (256.0, "mean"), (1.0, "sum"), (1.0, "none")):
        loss = px.extend(nn.CrossEntropyLoss(reduction=reduction))
        whole = scale / WORLD if reduction == "sum" else scale  # DistributedDataParallel averages sums, too

        alone, wanted = by_itself(network()), Keep()
        steps(alone, watched(alone, [wanted], rate=0.1 / scale), scaled(loss, whole), batches)
        for build in WAYS.values():
            model, found = build(network()), Keep()
            monitor = watched(model, [found], rate=0.1 / scale)
            assert monitor.sinks == ([found] if rank == 0 else [])
            mine = [(x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]) for x, y in batches]
            steps(model, monitor, scaled(loss, scale), mine)
            if rank == 0:
                same(found, wanted)
            else:
                assert not found.lines and "NormTest" in monitor.values, (monitor.values, monitor.absent)
            values = [None] * WORLD
            dist.all_gather_object(values, monitor.values["NoiseScale.trace"])
            assert len(set(values)) == 1


def uneven(rank: int) -> None:
    """5 and 3 samples: each process counts alike, so a sample of the smaller batch counts for more."""
    batches, sizes = [data(8, seed) for seed in range(3)], [5, 3]
    weights = torch.tensor([8 / (2 * 5)] * 5 + [8 / (2 * 3)] * 3, dtype=torch.float64)
    alone, wanted, found = by_itself(network()), Keep(), Keep()
    monitor = watched(alone, [wanted], ASKED[:-2])  # curvature is of extended losses
    for x, y in batches:
        with monitor.step(scale=8.0) as step:
            each = nn.functional.cross_entropy(alone(x), y, reduction="none") * weights
            step.losses(each)
            monitor.optimizer.zero_grad()
            each.mean().backward()
            monitor.optimizer.step()
    model = WAYS["DDP(extend)"](network())
    mine = [(x.split(sizes)[rank], y.split(sizes)[rank]) for x, y in batches]
    monitor = watched(model, [found], ASKED[:-2])
    steps(model, monitor, px.extend(nn.CrossEntropyLoss()), mine)
    if rank == 0:
        same(found, wanted)
    # Of sums, all samples count alike.
    loss, alone, wanted = px.extend(nn.CrossEntropyLoss(reduction="sum")), by_itself(network()), Keep()
    steps(alone, watched(alone, [wanted], rate=0.01), scaled(loss, 0.5), batches)
    model, found = WAYS["DDP(extend)"](network()), Keep()
    steps(model, watched(model, [found], rate=0.01), loss, mine)
    if rank == 0:
        same(found, wanted)
    # Curvature is of extended losses alone: the parts by themselves, and what they make together.
    model, top, bottom = WAYS["DDP(extend)"](network()), 0.0, 0.0
    monitor = watched(model, asked=ASKED[-2:])
    steps(model, monitor, px.extend(nn.CrossEntropyLoss()), mine[:1])
    x, y = batches[0]
    for a, b, w in zip(x.split(sizes), y.split(sizes), weights[[0, -1]], strict=True):
        part, loss = px.extend(network()), px.extend(nn.CrossEntropyLoss())
        with px.backpack(px.SumGradSquared(), px.DiagGGNExact(), scale="sample") as results:
            loss(part(a), b).backward()
        top = top + torch.cat([r.sum_grad_squared.flatten() for _, r in results.items()]) * w**2 / 8
        bottom = bottom + torch.cat([r.diag_ggn_exact.flatten() for _, r in results.items()]) * w / 8
    assert monitor.values["HessTrace"] == pytest.approx(float(bottom.sum()))
    assert monitor.values["TICDiag"] == pytest.approx(float((top / (bottom + 1e-7)).sum()))


def of_normalisations(rank: int) -> None:
    """Of these alone there are results, in each process."""
    batches = [data(8, seed) for seed in range(2)]
    mine = [(x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]) for x, y in batches]
    for passes in (1, 2):
        found = []
        for asked in ((NormLayerNoiseScale,), (NormLayerNoiseScale, NoiseScale)):
            model = WAYS["DDP(extend)"](network())
            monitor = watched(model, asked=asked)
            steps(model, monitor, px.extend(nn.CrossEntropyLoss()), mine, passes)
            found.append(monitor.values)
        own = {name: value for name, value in found[1].items() if name.startswith("NormLayer")}
        assert found[0] == pytest.approx(own) and "NormLayerNoiseScale.trace" in own


def without_a_target(rank: int) -> None:
    model = WAYS["DDP(extend)"](network())
    monitor = watched(model)
    x, y = data(4, rank)
    if rank:
        y[2] = -100
    steps(model, monitor, px.extend(nn.CrossEntropyLoss(reduction="sum")), [(x, y)])
    assert "1 of 8 samples have no target" in monitor.absent["NormTest"] and "HessTrace" in monitor.values
    assert "GradNorm" in monitor.values and "Loss" in monitor.values, monitor.absent


def accumulated(rank: int) -> None:
    """Passes of all processes together are those of one with twice the samples, in another order."""
    batches = [data(8, seed) for seed in range(3)]
    order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])
    loss, alone, wanted = px.extend(nn.CrossEntropyLoss()), by_itself(network()), Keep()
    steps(alone, watched(alone, [wanted]), loss, [(x[order], y[order]) for x, y in batches], 2)
    assert "Alpha" in wanted.lines[1][1] and "within one backward pass" in wanted.lines[0][2]["InnerTest"]
    mine = [(x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]) for x, y in batches]
    for sync in (False, True):
        model, found = WAYS["DDP(extend)"](network()), Keep()
        steps(model, watched(model, [found]), loss, mine, 2, sync)
        for _, values, _ in found.lines + wanted.lines:
            values.pop("SampleNorms.hardest", None)
        if rank == 0:
            same(found, wanted)


def outside_in_passes(rank: int) -> None:
    """A term that passes by the model is noticed in whichever pass it is."""
    loss = px.extend(nn.CrossEntropyLoss())
    for sync in (False, True):
        for where in (0, 2, None):
            model = WAYS["DDP(extend)"](network())
            monitor = watched(model, asked=[NormTest, Alpha, GradNorm])
            with monitor.step():
                for k in range(3):
                    x, y = data(4, 7 * rank + k)
                    with contextlib.nullcontext() if sync or k == 2 else model.no_sync():
                        decay = sum(p.square().sum() for p in model.parameters()) if k == where else 0.0
                        (loss(model(x), y) + decay).backward()
                monitor.optimizer.step()
            if where is None:
                assert "NormTest" in monitor.values and "Alpha" not in monitor.absent
            else:
                assert "terms of the loss pass by the model" in monitor.absent["NormTest"], (sync, where)
                assert "terms of the loss pass by the model" in monitor.absent["Alpha"]
            assert "GradNorm" in monitor.values


def hessians(rank: int) -> None:
    batches = [data(8, seed) for seed in range(2)]
    mine = [(x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]) for x, y in batches]
    for scale in (1.0, 256.0, -2.0):
        loss, said = px.extend(nn.CrossEntropyLoss()), []
        for model, parts in ((by_itself(network()), batches), (WAYS["DDP(extend)"](network()), mine)):
            found = []
            optimizer = torch.optim.SGD(model.parameters(), 0.1 / abs(scale))
            monitor = Cockpit(model, optimizer, None, 1, [], [HessTrace("hessian"), HessMaxEV(tol=1e-9)])
            for k, batch in enumerate(parts):
                _curvature._GENERATOR.manual_seed(k)  # for the same draws in one process and in two
                steps(model, monitor, scaled(loss, scale), [batch])
                assert not monitor.absent
                found.append(monitor.values)
            said.append(found)
        for want, got in zip(*said, strict=True):
            assert got.keys() == want.keys()
            for name in want:
                if name != "HessMaxEV.residual":
                    assert got[name] == pytest.approx(want[name], rel=1e-8), name
    # Of sums of 5 and 3 samples, by autograd's own second derivatives.
    model, loss, (x, y) = WAYS["DDP(extend)"](network()), px.extend(nn.CrossEntropyLoss(reduction="sum")), batches[0]
    alone, asked = by_itself(network()), [lambda: HessTrace("hessian"), lambda: HessMaxEV(tol=1e-9), BatchSize]
    one, monitor = watched(alone, asked=asked), watched(model, asked=asked)
    _curvature._GENERATOR.manual_seed(0)
    steps(alone, one, scaled(loss, 0.5), [(x, y)])
    _curvature._GENERATOR.manual_seed(0)
    steps(model, monitor, loss, [(x.split([5, 3])[rank], y.split([5, 3])[rank])])
    assert monitor.values["HessTrace"] == pytest.approx(one.values["HessTrace"], rel=1e-9)
    net = network()
    named = {k: p.detach() for k, p in net.named_parameters()}
    flat = torch.cat([p.flatten() for p in named.values()])

    def whole(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in named.values()])
        values = {k: v.view_as(p) for (k, p), v in zip(named.items(), parts, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(net, values, (x,)), y)

    top = torch.linalg.eigvalsh(torch.autograd.functional.hessian(whole, flat))[-1]
    assert monitor.values["HessMaxEV"] == pytest.approx(float(top), rel=1e-7)
    # Before the pass that is averaged, processes may make different numbers of passes.
    with monitor.step():
        for k in range(2 + rank):
            with contextlib.nullcontext() if k == 1 + rank else model.no_sync():
                loss(model(x), y).backward()
    assert "different numbers of backward passes: [2, 3]" in monitor.absent["HessMaxEV"]
    model.module.register_module("1", nn.SyncBatchNorm(8))  # which only runs, and is only accepted, on GPUs
    with watched(model, asked=[HessMaxEV]).step() as s:
        assert "SyncBatchNorm couples the processes" in s._missing[0]


def gated() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    net[0].bias.data[:2] = torch.tensor([-10.0, -1.0])  # a unit that is off, and one that is off for most samples
    return net


def looked_at(rank: int) -> None:
    """What hooks on modules see, and histograms of all entries of all samples; of 5 and 3 samples."""
    asked = [
        DeadUnits, InputScale, OutputScale, ActivationScale,
        lambda: GradHist1d(limit=0.5, samples=None, bins=7),
        lambda: GradHist2d(limit=0.5, param_limit=1.0, samples=None, bins=5, param_bins=4),
    ]  # fmt: skip
    batches, loss = [data(8, 2)] * 2, px.extend(nn.CrossEntropyLoss(reduction="sum"))
    for sizes, parts, order in (([5, 3], 1, list(range(8))), ([4, 4], 2, [0, 1, 4, 5, 2, 3, 6, 7])):
        alone, model, said = by_itself(gated()), WAYS["DDP(extend)"](gated()), (Keep(), Keep())
        whole = [(x[order], y[order]) for x, y in batches]
        steps(alone, watched(alone, [said[0]], asked, 0.01), scaled(loss, 0.5), whole, parts)
        mine = [(x.split(sizes)[rank], y.split(sizes)[rank]) for x, y in batches]
        steps(model, watched(model, [said[1]], asked, 0.01), loss, mine, parts)
        if rank == 0:
            same(said[1], said[0])
            values = said[0].lines[0][1]
            assert 0 < values["DeadUnits"] < 1 and values["OutputScale.spread"] > 0
            counted = torch.as_tensor(values["GradHist2d"])
            assert (counted > 0).sum() > 10 and abs(float(counted.sum()) - 1) < 1e-12
    # Means weigh the samples of the smaller batch more, which bins that were filled before do not know.
    model = WAYS["DDP(extend)"](gated())
    monitor = watched(model, asked=[asked[-2], lambda: GradHist2d(samples=100), OutputScale])
    (x, y), loss = batches[0], px.extend(nn.CrossEntropyLoss())
    steps(model, monitor, loss, [(x.split([5, 3])[rank], y.split([5, 3])[rank])])
    assert "different weights" in monitor.absent["GradHist1d"]
    assert {"GradHist2d", "OutputScale"} <= monitor.values.keys()
    # Samples of different lengths have no variance together.
    tokens = px.extend(nn.Linear(5, 3).double())
    model = DistributedDataParallel(tokens)
    monitor = watched(model, asked=[OutputScale])
    with monitor.step():
        model(torch.ones(2, 3 + rank, 5, dtype=torch.float64)).sum().backward()
    assert "differ in shape" in monitor.absent["OutputScale.spread"] and "OutputScale" in monitor.values


class Own(Instrument):
    """Collects something, and does not say how it unites."""

    def enter(self, step: int, model: nn.Module) -> None:
        self.seen = step

    def measure(self, step: Any) -> float:
        return self.seen


def unchanged(rank: int) -> None:
    """Convolutions and dropout: the same bits with and without a monitor."""
    ends = []
    for level in (None, "economy", "full"):
        loss, model = nn.CrossEntropyLoss(), images()
        torch.manual_seed(rank)
        parallel = DistributedDataParallel(px.extend(model) if level else model)
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        monitor = Cockpit(parallel, optimizer, level) if level else None
        if level:
            px.extend(loss)
        for _ in range(10):
            x, y = torch.randn(4, 2, 5, 5), torch.randint(3, (4,))
            with monitor.step() if monitor else contextlib.nullcontext():
                optimizer.zero_grad()
                loss(parallel(x), y).backward()
                optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
        if monitor and level == "full":
            assert {"NormTest", "HessTrace", "GradHist1d", "GradHist2d", "InputScale"} <= monitor.values.keys()
            assert {"HessMaxEV"} <= monitor.values.keys() | monitor.absent.keys()
    for end in ends[1:]:
        assert all(torch.equal(p, q) for p, q in zip(end, ends[0], strict=True))


def refused(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model, loss = px.extend(network()), px.extend(nn.CrossEntropyLoss())
    with pytest.raises(px.PackextError, match="2 ranks needs the DistributedDataParallel .* got Sequential: pass it"):
        watched(model)
    with pytest.raises(px.PackextError, match=r"Sharded models \(FSDP\)"):
        watched(fully_shard(px.extend(network())))
    with pytest.raises(px.NotExtendedError, match="got Sequential"):
        watched(DistributedDataParallel(network()))
    parallel = DistributedDataParallel(model)
    x, y = data(4, rank)

    class Broken(Keep):
        def begin(self, names: list[str]) -> int:
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):  # in both, which otherwise would wait for each other
        watched(parallel, [Broken()])
    inside = px.extend(gated())
    whole = DistributedDataParallel(inside)
    monitor = watched(whole, asked=[Own, EffectiveRank, Loss])
    steps(whole, monitor, loss, [(x, y)])
    assert "what it sees in one process does not unite" in monitor.absent["Own"]
    assert "BatchDotGrad is defined within one process, and there are 2" in monitor.absent["EffectiveRank"]
    assert "Loss" in monitor.values
    steps(inside, monitor, loss, [(x, y)])
    assert "`.grad` differs between the processes" in monitor.absent["Loss"]
    with monitor.step():
        if rank == 0:
            loss(inside(x), y).backward()
    assert "different numbers of backward passes: [1, 0]" in monitor.absent["Loss"]
    with whole.join(), pytest.raises(px.PackextError, match=r"does not work within DistributedDataParallel.join"):
        with monitor.step():
            pass


def penalized(rank: int) -> None:
    """A term of the loss that passes by the model is noticed: inner products with the gradient are then of both."""
    model = WAYS["DDP(extend)"](network())
    apart = [Alpha, NormTest, InnerTest, OrthoTest, NoiseScale, GradSNR, MeanGSNR]
    monitor = watched(model, asked=[*apart, GradNorm, SampleNorms])
    x, y = data(4, rank)
    loss = px.extend(nn.CrossEntropyLoss())
    with monitor.step():
        (loss(model(x), y) + sum(p.square().sum() for p in model.parameters())).backward()
        monitor.optimizer.step()
    for kind in apart:
        assert "terms of the loss pass by the model" in monitor.absent[kind.__name__]
    assert {"GradNorm", "SampleNorms"} <= monitor.values.keys()


def climbed(rank: int) -> None:
    """A loss with a negative factor."""
    (x, y), found, loss = data(8, 3), [], px.extend(nn.CrossEntropyLoss())
    for model in (by_itself(network()), WAYS["DDP(extend)"](network())):
        monitor = watched(model, asked=[Loss, NormTest, GradNorm, SampleNorms])
        a, b = (t if monitor.ranks.size == 1 else t.chunk(WORLD)[rank] for t in (x, y))
        steps(model, monitor, scaled(loss, -2.0), [(a, b)])
        found.append({k: v for k, v in monitor.values.items() if isinstance(v, float)})
    assert found[1] == pytest.approx(found[0], rel=1e-9) and "NormTest" in found[0]


def continued(rank: int, path: str) -> None:
    for k in range(2):
        model = WAYS["DDP(extend)"](network())
        monitor = watched(model, [Run(path)], [Loss])
        assert monitor.steps == 2 * k
        steps(model, monitor, px.extend(nn.CrossEntropyLoss()), [data(4, rank)] * 2)
    if rank == 0:
        assert Run.open(path).steps == [0, 1, 2, 3]


def named(rank: int) -> None:
    """Samples are named by their indices in the data set, whichever process has them."""
    (x, y), index, hardest = data(8, 3), torch.arange(100, 108), []
    for model in (by_itself(network()), WAYS["DDP(extend)"](network())):
        monitor = watched(model, asked=[SampleNorms])
        alone = monitor.ranks.size == 1
        a, b, samples = (t if alone else t.chunk(WORLD)[rank] for t in (x, y, index))
        with monitor.step(samples=samples):
            px.extend(nn.CrossEntropyLoss())(model(a), b).backward()
        hardest.append(monitor.values["SampleNorms.hardest"].tolist())
    assert hardest[0] == hardest[1] and min(hardest[0]) >= 100 and set(hardest[0]) - set(samples.tolist())


def drawn(rank: int) -> None:
    """Of the same samples, processes draw other targets."""
    found, (x, y) = [], data(8, 3)
    for model in (by_itself(network()), WAYS["DDP(extend)"](network())):
        monitor = watched(model, asked=[TICDiag])
        steps(model, monitor, px.extend(nn.CrossEntropyLoss()), [(x, y)] * 2)
        found.append(monitor.ranks.needs([px.DiagGGNMC()])[0].generator)
    assert found[0] is None and found[1] is monitor.ranks.numbers
    states: list[Any] = [None] * WORLD
    dist.all_gather_object(states, found[1].get_state().tolist())
    assert states[0] != states[1] and states[rank] != torch.Generator().manual_seed(rank).get_state().tolist()


TASKS = (
    as_one_process, uneven, accumulated, outside_in_passes, hessians, looked_at, unchanged, refused, penalized, climbed,
    named, drawn, without_a_target, of_normalisations,
)  # fmt: skip


def worker(rank: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    ALONE.extend(dist.new_group([k]) for k in range(WORLD))
    try:
        for task in TASKS:
            task(rank)
        continued(rank, path)
        dist.barrier()  # who ends first takes the store with it
    finally:
        ALONE.clear()
        gc.collect()  # groups that outlive this in a model abort the process at its end
        dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    processes(worker, str(tmp_path), world=WORLD)


def test_draws_of_all_are_as_likely_from_each_process_as_from_one() -> None:
    """Of 5 and 2 samples in one process, and 3 and 9 in another, four are drawn."""
    counts, samples, draws = [[5, 2], [3, 9]], 4, 1000
    seen = torch.zeros(2, 2, 5)
    for seed in range(draws):
        taken = 0
        for rank, chosen in enumerate(chosen_of(counts, samples, seed)):
            first = min(samples, counts[rank][0])  # what the first pass has drawn, before the other
            mine = [int((chosen < first).sum()), int((chosen >= first).sum())]
            assert chosen.tolist() == [*range(mine[0]), *range(first, first + mine[1])]
            for k in range(2):
                seen[rank, k, mine[k]] += 1
            taken += sum(mine)
        assert taken == samples
    for n, found in zip((5, 2, 3, 9), seen.flatten(0, 1), strict=True):
        want = torch.tensor(
            [math.comb(n, j) * math.comb(19 - n, samples - j) / math.comb(19, samples) for j in range(5)]
        )
        error = (want * (1 - want) / draws).sqrt()
        assert ((found / draws - want).abs() <= 4 * error).all()


def test_samples_of_several_passes_are_each_as_likely_to_be_drawn() -> None:
    """How many are taken of a pass does not tell which ones it has drawn."""
    sizes, samples, draws = (3, 4), 2, 4000
    seen = torch.zeros(sum(sizes))
    for seed in range(draws):
        drawn = [_drawn(n, samples, seed)[0] for n in sizes]
        seen[torch.cat([drawn[0], 3 + drawn[1]])[chosen_of([sizes], samples, seed)[0]]] += 1
    share = samples / sum(sizes)
    assert ((seen / draws - share).abs() < 3.5 * (share * (1 - share) / draws) ** 0.5).all()
