"""What each process of `test_world.py` runs: delayed, periodic and gathered training, next to one process."""

from __future__ import annotations

import copy
import os
import pickle
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import packext as px
from packext.optim import distributed as pd
from tests.world_compression import LOSS, data, gradients, network, same_everywhere

Weights = dict[str, Tensor]


def weights(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def local_steps(model: nn.Module, optimizer: Any, rank: int, which: range) -> None:
    for step in which:
        optimizer.zero_grad()
        x, y = data(step, rank)
        LOSS(model(x), y).backward()
        optimizer.step()


def at(model: nn.Module, w: Weights, step: int, rank: int) -> Weights:
    """The gradient of a process's batch at given weights."""
    model.load_state_dict(w)
    return gradients(model, step, rank)


def delayed(world: int, steps: int, delay: int, every: int, lr: Callable[[int], float]) -> list[Weights]:
    """All processes in one, as Delayed Gradient Averaging is written: gradients corrected by means that arrive late."""
    model = network()
    w = [weights(model) for _ in range(world)]
    mine: list[list[Weights]] = [[] for _ in range(world)]  # lr times gradient, of each process and step
    for step in range(steps):
        for r in range(world):
            g = at(model, w[r], step, r)
            mine[r].append({k: lr(step) * g[k] for k in g})
            w[r] = {k: w[r][k] - mine[r][step][k] for k in g}
        sent = step - delay  # the block that ended with this step is averaged now
        if sent >= 0 and (sent + 1) % every == 0:
            for k in w[0]:
                total = [sum(mine[r][s][k] for s in range(sent + 1 - every, sent + 1)) for r in range(world)]
                for r in range(world):
                    w[r][k] = w[r][k] + total[r] - sum(total) / world
    return w


def synchronous(world: int, steps: int, **options: Any) -> Weights:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), **options)
    for step in range(steps):
        each = [gradients(model, step, r) for r in range(world)]
        for name, p in model.named_parameters():
            p.grad = sum(g[name] for g in each) / world
        optimizer.step()
    return weights(model)


def close(model: nn.Module, expected: Weights, what: Any) -> None:
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-11, atol=1e-13, msg=f"{what}, {name}")


def delayed_as_simulated(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float64)
    for options in ({"lr": 0.3}, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}):
        model = network()
        local_steps(model, pd.DSSGD(torch.optim.SGD(model.parameters(), **options)), rank, range(6))
        close(model, synchronous(world, 6, **options), options)
        same_everywhere(model)
    schedule = lambda step: 0.3 / (1 + step)  # noqa: E731
    for delay, every in ((0, 3), (2, 1), (3, 2), (1, 4)):
        model = network()
        sgd = torch.optim.SGD(model.parameters(), 0.3)
        optimizer = pd.DSSGD(sgd, delay, every, timeout=timedelta(seconds=60))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step) / 0.3)
        for step in range(9):
            local_steps(model, optimizer, rank, range(step, step + 1))
            scheduler.step()
        close(model, delayed(world, 9, delay, every, schedule)[rank], (delay, every))
        total = sum(p.numel() for p in model.parameters())
        assert optimizer.payload == 9 // every * total * 8 and optimizer.steps == 9
        optimizer.flush()
        same_everywhere(model)
    model = network()  # the telescope: a mean of processes of which none has seen a mean before
    optimizer = pd.DSSGD(torch.optim.SGD(model.parameters(), 0.3), delay=100, every=100)
    local_steps(model, optimizer, rank, range(9))
    optimizer.flush()
    w = delayed(world, 9, 10**6, 1, lambda step: 0.3)
    close(model, {k: sum(v[k] for v in w) / world for k in w[0]}, "flushed")
    same_everywhere(model)


def no_drift(rank: int, world: int) -> None:
    """In float32 processes have the same bits after a flush, however many roundings there were."""
    torch.set_default_dtype(torch.float32)
    model = network()
    if rank:
        with torch.no_grad():
            model[0].weight.mul_(2)  # the first process's count
    optimizer, stepped = pd.DSSGD(torch.optim.Adam(model.parameters(), 0.01), 3, 2), []
    optimizer.register_step_pre_hook(lambda *_: stepped.append("pre"))
    optimizer.register_step_post_hook(lambda *_: stepped.append("post"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), network().parameters(), strict=True))
    for step in range(41):
        local_steps(model, optimizer, rank, range(step, step + 1))
        if step % 10 == 0:
            optimizer.flush()
            same_everywhere(model)
    assert stepped == ["pre", "post"] * 41


def delayed_saved_and_refused(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float64)

    def make() -> tuple[nn.Module, pd.DSSGD]:
        model = network()
        return model, pd.DSSGD(torch.optim.SGD(model.parameters(), 0.2, momentum=0.5), delay=3, every=2)

    model, optimizer = make()
    local_steps(model, optimizer, rank, range(5))
    saved = optimizer.state_dict()
    assert len(saved["pending"]) == 1 and saved["since"] == 1
    local_steps(model, optimizer, rank, range(5, 10))
    again, restored = make()
    local_steps(again, restored, rank, range(3))  # work of its own under way, which is dropped
    for _ in range(2):  # from what is saved, which is as it was
        restored.load_state_dict(saved)
        local_steps(again, restored, rank, range(5, 10))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(px.PackextError, match=rf"saved by rank {rank} of {world + 1} processes"):
        restored.load_state_dict({**saved, "world": (world + 1, rank)})
    with pytest.raises(px.PackextError, match=r"delay and period \(4, 2\), and here they are \(3, 2\)"):
        restored.load_state_dict({**saved, "schedule": (4, 2)})
    with pytest.raises(px.PackextError, match="the state is of 7 parameters"):
        restored.load_state_dict({**saved, "shared": torch.zeros(7)})
    optimizer.flush()
    flushed = {**optimizer.state_dict(), "world": (world + 5, 0)}  # of a world that was larger
    restored.load_state_dict(flushed)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))

    model, optimizer = make()
    local_steps(model, optimizer, rank, range(2))
    if rank == world - 1:
        model[0].bias.grad.fill_(float("inf"))  # pyright: ignore
    with pytest.raises(px.PackextError, match="step 7: the mean of what processes have changed is not finite"):
        for _ in range(6):
            optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(LOSS(again(data(0, rank)[0]), data(0, rank)[1])).backward()
    with pytest.raises(px.PackextError, match="GradScaler skips steps of one process"):
        scaler.step(restored)
    with pytest.raises(px.PackextError, match="before it is wrapped"):
        restored.add_param_group({"params": []})
    model = network()
    model[0].bias.requires_grad_(False)  # pyright: ignore
    thawed = pd.DSSGD(torch.optim.SGD(model.parameters(), 0.1))
    local_steps(model, thawed, rank, range(1))
    before = weights(model)
    model[0].bias.requires_grad_(True)  # pyright: ignore
    with pytest.raises(px.PackextError, match="parameter 1 of group 0, shape .* was frozen when the optimizer was"):
        local_steps(model, thawed, rank, range(1))
    close(model, before, "thawed")
    with pytest.raises(ValueError, match="a delay of at least 0 and a period of at least 1, got -1 and 1"):
        pd.DSSGD(restored.optimizer, -1)
    with pytest.raises(px.PackextError, match="one dtype, float32 or float64, .*bfloat16"):
        pd.DSSGD(torch.optim.SGD(network().bfloat16().parameters(), 0.1))


def delayed_with_curvature(rank: int, world: int) -> None:
    """Of each process's own samples, as its gradients are; means over the processes are refused."""
    torch.set_default_dtype(torch.float64)
    model, alone = px.extend(network()), [dist.new_group([k]) for k in range(world)][rank]
    with pytest.raises(px.PackextError, match=f"MSVAG would put .* over {world} processes: give it a group of this"):
        pd.DSSGD(px.optim.MSVAG(model.parameters()))
    optimizer = pd.DSSGD(px.optim.MSVAG(model.parameters(), process_group=alone))
    loss_fn = px.extend(nn.CrossEntropyLoss())
    twins = [px.extend(network()) for _ in range(world)]
    theirs = [px.optim.MSVAG(twin.parameters(), process_group=alone) for twin in twins]
    for step in range(3):
        for m, o, r in ((model, optimizer, rank), *zip(twins, theirs, range(world), strict=True)):
            o.zero_grad()
            x, y = data(step, r)
            with px.optim.emit(o):
                loss_fn(m(x), y).backward()
            o.step()
        ends = [weights(twin) for twin in twins]
        for twin in twins:
            twin.load_state_dict({k: sum(w[k] for w in ends) / world for k in ends[0]})
    close(model, weights(twins[0]), "MSVAG")


def averaged(world: int, steps: int, calibration: int, predicted: float | None) -> tuple[list[Weights], list[int]]:
    """ADPSGD of all processes in one; the steps after which there was an average."""
    model, lr = network(), lambda step: 0.3 / (1 + step / 4)
    w = [weights(model) for _ in range(world)]
    period, since, spreads, when, c = 2, 0, [], [], 0.0
    for step in range(steps):
        for r in range(world):
            g = at(model, w[r], step, r)
            w[r] = {k: w[r][k] - lr(step) * g[k] for k in g}
        since += 1
        if since == period:
            since = 0
            when.append(step)
            mean = {k: sum(v[k] for v in w) / world for k in w[0]}
            s = sum(float(((v[k] - mean[k]) ** 2).sum()) for v in w for k in mean) / world / lr(step)
            w = [dict(mean) for _ in range(world)]
            if step + 1 <= calibration:
                spreads.append(s)
                c = sum(spreads) / len(spreads)
            elif predicted is None:
                period = max(1, period + (s < 0.9 * c) - (s > 1.1 * c))
        if predicted is not None and step + 1 >= calibration:
            period = max(1, int(c / ((1 - 1 / world) * lr(step) * predicted)))
    return w, when


def averages(rank: int, world: int) -> None:
    from torch.distributed.optim import PostLocalSGDOptimizer  # whose import warns of torch.jit

    torch.set_default_dtype(torch.float64)
    for predicted in (None, 0.5):
        model = network()
        sgd = torch.optim.SGD(model.parameters(), 0.3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: 1 / (1 + step / 4))
        averager = pd.AdaptiveAverager(2, calibration=6, low=0.9, high=1.1, predicted=predicted is not None)
        optimizer = PostLocalSGDOptimizer(sgd, averager)
        before = 0
        when = []
        for step in range(30):
            local_steps(model, optimizer, rank, range(step, step + 1))
            if averager.averages > before:
                before = averager.averages
                when.append(step)
            if predicted is not None and step + 1 >= 6:
                # Of all processes the mean counts: this one's part of it is rank + 1 times as large as the first's.
                mine = predicted * (rank + 1) / (sum(range(world + 1)) / world)
                averager.predict(torch.tensor(mine * 6), 7, sgd.param_groups[0]["lr"])
            scheduler.step()
        w, expected = averaged(world, 30, 6, predicted)
        assert when == expected and len({b - a for a, b in zip(when, when[1:], strict=False)}) > 1
        close(model, w[rank], predicted)
        state = averager.state_dict()
        if state["_since"]:
            with pytest.raises(px.PackextError, match="saved by rank 0 of 9 processes"):
                averager.load_state_dict({**state, "world": (9, 0)})
        other = pd.AdaptiveAverager(3)
        other.load_state_dict(state)
        assert other.state_dict() == state and other.period == averager.period
        averager.flush(optimizer.param_groups)
        same_everywhere(model)
        other.load_state_dict({**averager.state_dict(), "world": (9, 0)})  # belongs to any number of processes now


def averages_with_curvature(rank: int, world: int) -> None:
    """An optimizer that reads beside its gradient what all processes' passes emit is refused; of its own alone, not."""
    from torch.distributed.optim import PostLocalSGDOptimizer

    torch.set_default_dtype(torch.float64)
    alone = [dist.new_group([k]) for k in range(world)][rank]
    twins = [px.extend(network()) for _ in range(2)]
    whole, own = px.optim.MSVAG(twins[0].parameters()), px.optim.MSVAG(twins[1].parameters(), process_group=alone)
    averager = pd.AdaptiveAverager(2)
    optimizers = [PostLocalSGDOptimizer(whole, pd.AdaptiveAverager(2)), PostLocalSGDOptimizer(own, averager)]
    for step in range(2):
        for model, inner, optimizer in zip(twins, (whole, own), optimizers, strict=True):
            optimizer.zero_grad()
            x, y = data(step, rank)
            with px.optim.emit(inner):
                px.extend(LOSS)(model(x), y).backward()
            if inner is own:
                optimizer.step()
                continue
            with pytest.raises(px.PackextError, match=f"what it reads beside them together over {world} processes"):
                optimizer.step()
    assert averager.averages == 1
    same_everywhere(twins[1])


def spread_as_predicted(rank: int, world: int) -> None:
    """Noise alone, of known covariance: the spread is (1 - 1/n) p lr^2 tr(Sigma) / B."""
    torch.set_default_dtype(torch.float64)
    model, loss_fn = px.extend(nn.Linear(4000, 1, bias=False)), px.extend(nn.MSELoss())
    lr, period, n = 0.01, 5, 4
    with torch.no_grad():
        model.weight.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr)
    averager = pd.AdaptiveAverager(period, calibration=10**6)
    traces = []
    for step in range(40):
        draw = torch.Generator().manual_seed(1000 * rank + step)
        # With a weight of nearly zero, gradients -2 t x of random signs t: a walk.
        x, t = torch.randn(n, 4000, generator=draw) * 1e-3, torch.randint(2, (n, 1), generator=draw) * 2.0 - 1
        optimizer.zero_grad()
        with px.backpack(px.Variance(), scale="sample"):
            loss_fn(model(x), t).backward()
        traces.append(float(model.weight.variance.sum()) * n / (n - 1))  # which divides by n
        optimizer.step()
        averager.average_parameters(optimizer.param_groups)
    trace = torch.tensor(sum(traces) / len(traces))
    dist.all_reduce(trace)
    expected = (1 - 1 / world) * period * lr * float(trace) / world / n
    # 8 averages of 4000 coordinates: about 32000 (n - 1) squares, so the relative deviation is 0.8 % or less.
    assert averager.target is not None and abs(averager.target / expected - 1) < 0.04
    averager.calibration, averager.predicted = 1, True
    averager.predict(traces[-1] * (n - 1) / n, n, lr / 2)
    assert averager.period in (9, 10)  # half the rate, twice the steps; rounded down


def measured(rank: int, world: int) -> None:
    """The target is the mean over the averages of the calibration: those of a flush, or of a rate of zero, are none."""
    torch.set_default_dtype(torch.float64)
    p, frozen = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2), requires_grad=False)
    averager, spreads = pd.AdaptiveAverager(1, calibration=4), []
    for k, lr in enumerate((0.0, 0.5, 1.0, 2.0)):
        groups = [{"params": [frozen], "lr": 0.0}, {"params": [p], "lr": lr}]
        with torch.no_grad():
            p.add_((k + 1.0) * rank)
        if lr:
            spreads.append(3 * (k + 1) ** 2 * float(torch.arange(1.0 * world).var(correction=0)) / lr)
        averager.average_parameters(groups)
        averager.flush(groups)
    assert averager.averages == 8 and averager.target == pytest.approx(sum(spreads) / 3)
    again = pd.AdaptiveAverager()
    again.load_state_dict(averager.state_dict())
    again.calibration = 5
    again.average_parameters(groups)
    assert again.target == pytest.approx(sum(spreads) / 4)


def unlike(rank: int, world: int) -> None:
    """A parameter that only some have a gradient of is averaged; what is no number is not."""
    torch.set_default_dtype(torch.float64)
    model = network()
    with torch.no_grad():
        model[4].bias.fill_(float(rank))
    if rank == 0:
        model[0].weight.grad = torch.zeros_like(model[0].weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    averager = pd.AdaptiveAverager(1, calibration=1)
    averager.average_parameters(optimizer.param_groups)
    assert torch.equal(model[4].bias, torch.full((3,), (world - 1) / 2))
    before = weights(model)
    with torch.no_grad():
        if rank == 1:
            model[0].weight[0, 0] = float("nan")
    with pytest.raises(px.PackextError, match="parameters of some process are not finite"):
        averager.average_parameters(optimizer.param_groups)
    assert torch.equal(model[4].bias, before["4.bias"])
    with pytest.raises(px.PackextError, match="param_groups, for their learning rates"):
        averager.average_parameters(model.parameters())  # pyright: ignore
    with pytest.raises(px.PackextError, match="no target before the first average"):
        pd.AdaptiveAverager().predict(1.0, 2, 0.1)
    with pytest.raises(px.PackextError, match="the variances sum to nan"):
        averager.predict(float("nan") if rank == 1 else 1.0, 2, 0.1)
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        averager.predict(1.0, 1, 0.1)
    with pytest.raises(ValueError, match="need 1 <= period <= calibration"):
        pd.AdaptiveAverager(5, calibration=4)


def gathered(rank: int, world: int) -> None:
    """Two batches by processes of different speeds and parts, next to one process with all samples."""
    torch.set_default_dtype(torch.float64)
    model = px.extend(network())
    total_loss = px.extend(nn.CrossEntropyLoss(reduction="sum"))
    model[0].weight.requires_grad_(False)
    target = pd.TargetBatch(model.parameters(), 12)
    model[0].weight.requires_grad_(True)  # thawed since, and of the batch as all others
    size = rank + 1
    taken = 0
    for batch in range(2):
        model.zero_grad()
        start, found = taken, None
        while found is None:
            x, y = (t[taken : taken + size] for t in data(0, rank, n=60))
            with px.backpack(px.SumGradSquared(), px.BatchL2Grad(), scale="sample"):
                total_loss(model(x), y).backward()
            sums = {name: p.sum_grad_squared for name, p in model.named_parameters()}  # pyright: ignore
            found = target.add(len(x), {**sums, "l2": sum(p.batch_l2.sum() for p in model.parameters())})
            taken += size
            time.sleep(0.002 * rank)
        assert found.shares[rank] == taken - start and found.samples == sum(found.shares)
        assert 12 <= found.samples < 12 + sum(range(1, world + 1)) and target.batches == batch + 1
        starts: list[Any] = [None] * world
        dist.all_gather_object(starts, start)
        parts = [data(0, r, n=60) for r in range(world)]
        x = torch.cat([p[0][s : s + n] for p, s, n in zip(parts, starts, found.shares, strict=True)])
        y = torch.cat([p[1][s : s + n] for p, s, n in zip(parts, starts, found.shares, strict=True)])
        whole = network()
        rows: list[Weights] = []
        for k in range(len(x)):
            grads = torch.autograd.grad(LOSS(whole(x[k : k + 1]), y[k : k + 1]), [*whole.parameters()])
            rows.append(dict(zip(sums, grads, strict=True)))
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, sum(r[name] for r in rows) / len(rows), rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(found.mean(name), sum(r[name] ** 2 for r in rows) / len(rows))
        l2 = sum(float((t**2).sum()) for r in rows for t in r.values())
        torch.testing.assert_close(float(found.sums["l2"]), l2)


def gathered_in_half_precision(rank: int, world: int) -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    target = pd.TargetBatch([p], world)
    p.grad = torch.tensor([4e4, 1.0], dtype=torch.float16)  # of which two are more than float16 holds
    dist.barrier()
    found = target.add(1)
    while found is None:
        time.sleep(0.005)
        found = target.add(0)
    assert p.grad.dtype == torch.float16 and p.grad.tolist() == [4e4, 1.0]


def gathered_and_refused(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float64)
    model = Partial()
    target = pd.TargetBatch(model.parameters(), world)
    model(rank == 0).backward()
    while not (found := target.add(1)):
        time.sleep(0.005)
        model(rank == 0).backward()
    share = found.shares[0] / found.samples
    torch.testing.assert_close(model.used.grad, torch.ones(2))
    torch.testing.assert_close(model.sometimes.grad, torch.full((3,), 2 * share))  # the others count as zero
    assert model.never.grad is None

    model.zero_grad()
    model(True).backward()
    before = model.used.grad.clone()
    with pytest.raises(px.PackextError, match=f"rank {world - 1}: a gradient or sum is not finite.* No gradient"):
        while not target.add(world, {"s": torch.tensor(float("nan") if rank == world - 1 else 1.0)}):
            time.sleep(0.005)
    assert torch.equal(model.used.grad, before)
    dist.barrier()
    with pytest.raises(px.PackextError, match="TargetBatch, batch 3: rank"):
        names = {} if rank == 0 else {"s": torch.tensor(1.0)}
        while not target.add(1, names):
            time.sleep(0.005)
    dist.barrier()
    own = 0 if rank == 0 else world  # who has no samples hears of the others
    with pytest.raises(px.PackextError, match=f"TargetBatch, batch 4: rank 1: sums .*; rank {world - 1}: sums"):
        while not target.add(own, {} if rank == 1 else {"s": torch.tensor(1.0)}):
            time.sleep(0.005)
    with pytest.raises(px.PackextError, match="has a target of 9 samples" if rank else "has a target of 5 samples"):
        pd.TargetBatch(model.parameters(), 5 if rank else 9)
    with pytest.raises(ValueError, match="at least one sample"):
        pd.TargetBatch(model.parameters(), 0)
    with pytest.raises(ValueError, match="no -1 samples"):
        target.add(-1)

    net, loss_fn = px.extend(network()), px.extend(nn.CrossEntropyLoss(reduction="sum"))
    optimizer, target = px.optim.MSVAG(net.parameters()), pd.TargetBatch(net.parameters(), 6 * world)
    x, y = data(0, rank)
    with px.optim.emit(optimizer):
        loss_fn(net(x), y).backward()
    samples = 6
    while not target.add(samples):
        samples = 0
        time.sleep(0.005)
    with pytest.raises(px.PackextError, match="rank 0: MSVAG: TargetBatch has divided the gradient of parameter 0"):
        optimizer.step()
    net.zero_grad(set_to_none=False)  # the gradients of a later pass are of that alone
    with px.optim.emit(optimizer):
        loss_fn(net(x), y).backward()
    optimizer.step()
    assert optimizer.steps == 1


class Partial(nn.Module):
    """With parameters that some, or all, processes do not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.never, self.sometimes = (nn.Parameter(torch.zeros(k)) for k in (2, 4, 3))

    def forward(self, more: bool) -> Tensor:
        return self.used.sum() + (2 * self.sometimes.sum() if more else 0)


def joined(rank: int, world: int) -> None:
    """All take the state of the one that is furthest."""
    torch.set_default_dtype(torch.float64)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    local_steps(model, optimizer, rank, range(2 if rank == 1 else rank // 2))
    assert pd.catch_up(2 if rank == 1 else rank // 2, model=model, optimizer=optimizer) == 2
    alone = network()
    expected = torch.optim.SGD(alone.parameters(), 0.1, momentum=0.9)
    local_steps(alone, expected, 1, range(2))
    for m, o in ((model, optimizer), (alone, expected)):
        local_steps(m, o, 0, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), alone.parameters(), strict=True))
    with pytest.raises(px.PackextError, match="processes name different parts"):
        pd.catch_up(0, **{"model" if rank else "other": model})


def late(rank: int, world: int) -> None:
    """A process that does not answer within the time limit, and one that dies, end the others with an error."""
    torch.set_default_dtype(torch.float64)
    model = network()
    optimizer = pd.DSSGD(torch.optim.SGD(model.parameters(), 0.1), timeout=timedelta(seconds=0.5))
    target = pd.TargetBatch(model.parameters(), 1)
    hooked = DistributedDataParallel(network())
    hooked.register_comm_hook(pd.TopK(hooked.named_parameters(), 0.1), pd.compression_hook)
    x, y = data(0, rank)
    dist.barrier()
    begin = time.monotonic()
    if rank == world - 1:
        time.sleep(1.0)
        os._exit(0)
    with pytest.raises(px.PackextError, match="DSSGD, step 1, .* has died, or has not answered within the time limit"):
        optimizer.step()
    assert 0.4 < time.monotonic() - begin < 1.0
    other = pd.AdaptiveAverager(1, calibration=1)
    with pytest.raises(px.PackextError, match="AdaptiveAverager, step 1: another process has died"):
        other.average_parameters(optimizer.param_groups)
    with pytest.raises(px.PackextError, match="TargetBatch: another process has died"):
        target.add(6)
    with pytest.raises(RuntimeError):  # torch's own, out of the backward pass
        LOSS(hooked(x), y).backward()
    assert time.monotonic() - begin < 20


def copied(rank: int, world: int) -> None:
    """A copy goes on as the original does, and the class is as before; hooks are of the wrapped optimizer's state."""
    model = network()
    optimizer = pd.DSSGD(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 3, 2)
    local_steps(model, optimizer, rank, range(3))
    twins = [(model, optimizer), copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for net, o in twins:
        local_steps(net, o, rank, range(3, 8))
        o.flush()
        assert o.steps == 8 and all(
            torch.equal(p, q) for p, q in zip(net.parameters(), model.parameters(), strict=True)
        )
    heard: list[str] = []
    for when in ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
        getattr(optimizer, f"register_{when}_hook")(lambda *_, when=when: heard.append(when))
    optimizer.load_state_dict(optimizer.state_dict())
    assert heard == ["state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"]
    alone = pd.DSSGD(torch.optim.SGD(network().parameters(), 0.1), process_group=dist.group.WORLD)
    with pytest.raises(px.PackextError, match="DSSGD: a process group can be neither copied nor pickled"):
        copy.deepcopy(alone)


TASKS = (
    delayed_as_simulated, delayed_with_curvature, no_drift, delayed_saved_and_refused, averages,
    averages_with_curvature, spread_as_predicted, measured, unlike, gathered, gathered_in_half_precision,
    gathered_and_refused, joined, copied,
)  # fmt: skip
