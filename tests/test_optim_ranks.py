"""Optimizers in several processes: together they take the step that one process with all samples takes."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import packext as px
from packext import optim
from tests.control_cases import flat
from tests.helpers import processes

WORLD = 2
SIZES = [5, 3]
ALONE: list[Any] = []
EARLY: list[Any] = []
LOSS = px.extend(nn.CrossEntropyLoss())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.LayerNorm(16)]
    return nn.Sequential(*layers, nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()


def data(seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 5, 5, generator=draw, dtype=torch.float64), torch.randint(3, (8,), generator=draw)


MAKE: dict[str, Callable[..., optim.Optimizer]] = {
    "rule": lambda p, **more: optim.Preconditioned(p, "kflr", lr=0.05, damping=0.1, **more),
    "diagonal": lambda p, **more: optim.Preconditioned(p, "diag_ggn_exact", lr=0.05, damping=0.1, **more),
    "kfac": lambda p, **more: optim.KFAC(
        p, fisher="exact", factors_every=2, inverses_every=2, adapt_every=3, damping=0.01, **more
    ),
    "ekfac": lambda p, **more: optim.EKFAC(p, fisher="exact", scales_every=1, basis_every=4, damping=0.01, **more),
    "singd": lambda p, **more: optim.SINGD(p, fisher="exact", lr=0.05, every=2, precondition_lr=0.1, **more),
    "sophia": lambda p, **more: optim.Sophia(p, lr=0.02, every=2, rho=1.0, curvature="diag_ggn_exact", **more),
    "msvag": lambda p, **more: optim.MSVAG(p, **more),
}


def train(model: nn.Module, optimizer: optim.Optimizer, mine: Callable[[Tensor], Tensor], factor: float) -> None:
    for seed in range(5):
        x, y = (mine(t) for t in data(seed))
        optimizer.zero_grad()
        with optim.emit(optimizer):
            loss = LOSS(model(x), y) * factor
            loss.backward()
        optimizer.step()
        if isinstance(optimizer, optim.KFAC) and optimizer.adapts:
            with torch.no_grad():
                optimizer.adapt(loss, LOSS(model(x), y) * factor)


# -- what each process runs ---------------------------------------------------------------------------


def as_one_process(rank: int) -> None:
    """5 and 3 samples, each loss with its share of the mean over all."""
    for name, make in MAKE.items():
        alone = px.extend(network())
        train(alone, make(alone.parameters(), process_group=ALONE[rank]), lambda t: t, 1.0)
        model = px.extend(network())
        parallel, optimizer = DistributedDataParallel(model), make(model.parameters())
        assert optimizer.ranks.size == WORLD
        train(parallel, optimizer, lambda t: t.split(SIZES)[rank], SIZES[rank] * WORLD / 8)
        for (k, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10, msg=f"{name}, {k}")
            everyone = [torch.empty_like(p) for _ in range(WORLD)]
            dist.all_gather(everyone, p.detach())
            assert torch.equal(*everyone), (name, k)


class Tied(nn.Module):
    """A weight that is used as it is and transposed, and two that are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.pair, self.head = nn.Linear(4, 6), nn.Parameter(torch.randn(2, 4, 4) / 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :4]
        y = (self.w(x).tanh() @ self.w.weight).tanh()
        return self.head(y @ self.pair[0] + y.tanh() @ self.pair[1])


def made_before_the_processes_met(rank: int) -> None:
    """Itself, and copies of it."""
    alone = px.extend(network())
    train(alone, MAKE["kfac"](alone.parameters(), process_group=ALONE[rank]), lambda t: t, 1.0)
    for model, optimizer in (pickle.loads(pickle.dumps(EARLY)), copy.deepcopy(EARLY), EARLY):
        train(DistributedDataParallel(model), optimizer, lambda t: t.split(SIZES)[rank], SIZES[rank] * WORLD / 8)
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def several_uses(rank: int) -> None:
    """The factors of all processes are put together before the nearest product is taken."""
    torch.manual_seed(0)
    start = Tied().double()
    for name in ("kfac", "ekfac"):
        ends = []
        for together in (False, True):
            model = px.extend(copy.deepcopy(start))
            group = None if together else ALONE[rank]
            optimizer = MAKE[name](model.parameters(), process_group=group)
            net = DistributedDataParallel(model) if together else model
            split = (lambda t: t.split(SIZES)[rank]) if together else (lambda t: t)
            train(net, optimizer, split, SIZES[rank] * WORLD / 8 if together else 1.0)
            ends.append([p.detach() for p in model.parameters()])
        torch.testing.assert_close(*ends, rtol=1e-8, atol=1e-10)


def draws_differ(rank: int) -> None:
    model = px.extend(network())
    optimizer = optim.KFAC(model.parameters())
    x, y = data(0)
    with optim.emit(optimizer) as results:
        LOSS(model(x), y).backward()
    mine = results["7.weight"].kfac.pairs[0].outputs
    everyone = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(everyone, mine)
    assert not torch.equal(*everyone)


def skipped_and_refused(rank: int) -> None:
    """What goes wrong in one process, all know."""
    x, y = data(0)

    def passed(optimizer: optim.Optimizer, model: nn.Module, n: int = 8, emit: bool = True) -> None:
        model.zero_grad()
        if emit:
            with optim.emit(optimizer):
                LOSS(model(x[:n]), y[:n]).backward()
        else:
            LOSS(model(x[:n]), y[:n]).backward()

    model = px.extend(network())
    optimizer = MAKE["kfac"](model.parameters())
    passed(optimizer, model, emit=rank == 0)
    with pytest.raises(px.PackextError, match="rank 1: KFAC: parameter 0 of group 0, .* has a gradient, but no kfac"):
        optimizer.step()
    before = [p.clone() for p in model.parameters()]
    passed(optimizer, model)
    if rank == 1:
        factors = optimizer._received[model[5].weight]["kfac"]
        factors.pairs[0].outputs[0, 0] = float("nan")
    with pytest.warns(optim.SkippedStep, match="the kfac of parameter 6 of group 0"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)) and not optimizer.state

    more = px.extend(nn.Linear(3, 3).double())  # which one process does not use
    both = optim.KFAC([*model.parameters(), *more.parameters()])
    model.zero_grad()
    with optim.emit(both):
        LOSS(model(x) if rank else more(model(x)), y).backward()
    for p in more.parameters():
        p.grad = torch.ones_like(p)
    text = "rank 1: KFAC: parameter 9 of .* Of several processes each has to use it"
    with pytest.raises(px.PackextError, match=text):
        both.step()

    weight, bias = model[5].weight, model[5].bias  # a factor that one process inverts, and cannot
    singular = optim.KFAC([weight, bias], fisher="exact", damping=0.0)
    passed(singular, model)
    with pytest.raises(px.PackextError, match=r"rank \d: KFAC, parameter 0 of group 0, .* not positive definite"):
        singular.step()
    assert not singular.state

    optimizer = optim.SPRING(model.parameters())
    passed(optimizer, model)
    with pytest.raises(px.PackextError, match="rank 0: sqrt_ggn_exact is defined within one process.*; rank 1"):
        optimizer.step()
    line = px.extend(nn.Linear(25, 3).double())
    optimizer = optim.Preconditioned(line.parameters(), "kfra")
    with optim.emit(optimizer):
        LOSS(line(x.flatten(1)), y).backward()
    with pytest.raises(px.PackextError, match="rank 0: kfra is defined within one process.*; rank 1"):
        optimizer.step()
    for n, text in ((8 - rank, "batches of one size"), (8, None)):
        model.zero_grad()
        optimizer = optim.KFAC(model.parameters(), fisher="empirical")
        passed(optimizer, model, n)
        if text:
            with pytest.raises(px.PackextError, match=text):
                optimizer.step()
        else:
            optimizer.step()


def outside_of_the_group(rank: int) -> None:
    group, model = dist.new_group([1]), network()
    for make in (
        lambda: optim.KFAC(model.parameters(), process_group=group),
        lambda: optim.distributed.DSSGD(torch.optim.SGD(model.parameters(), 0.1), 1, 1, process_group=group),
    ):
        if rank:
            make()
        else:
            with pytest.raises(px.PackextError, match="Process 0 is not in the process group"):
                make()


def sharded_is_refused(rank: int) -> None:
    """With what the user of an optimizer can do about it."""
    model = px.extend(network())
    fully_shard(model)
    for emitting, name in (
        (optim.KFAC(model.parameters()), "KFAC"), (optim.MSVAG(model.parameters()), "MSVAG"),
        (optim.CABS(torch.optim.SGD(model.parameters(), 0.1), 2), "CABS"),
    ):  # fmt: skip
        with (
            pytest.raises(px.UnsupportedUseError, match=rf"^{name}: parameters that are DTensors, .* Take"),
            optim.emit(emitting),
        ):
            LOSS(model(data(0)[0]), data(0)[1]).backward()


def controllers_agree(rank: int) -> None:
    """Statistics of 5 and 3 samples in one group are those of 8."""
    alone, model = px.extend(network()), px.extend(network())
    parallel, states = DistributedDataParallel(model), []
    for net, mine, options in (
        (alone, lambda t: t, {}),
        (parallel, lambda t: t.split(SIZES)[rank], {"group": dist.group.WORLD, "scale": "sample"}),
    ):
        sgd = torch.optim.SGD(net.parameters(), 0.1)
        controls = [optim.CABS(sgd, 2), optim.NoiseScale(2), optim.NormTest(2), optim.EvidenceStopping()]
        controls.append(optim.EvidenceStopping(samples=24))
        for seed in range(2):
            x, y = (mine(t) for t in data(seed))
            sgd.zero_grad()
            with optim.emit(*controls, **options):
                (LOSS(net(x), y) * (1 if net is alone else SIZES[rank] * WORLD / 8)).backward()
            for control in controls:
                control.step(*([1.5] if isinstance(control, optim.CABS) else []))
            sgd.step()
        states.append(torch.tensor([*flat([control.state_dict() for control in controls])]))
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)
    local = optim.CABS(torch.optim.SGD(parallel.parameters(), 0.1), 2)
    parallel.zero_grad()
    with optim.emit(local):
        LOSS(parallel(data(0)[0][: 5 - 2 * rank]), data(0)[1][: 5 - 2 * rank]).backward()
    with pytest.raises(px.PackextError, match="CABS: `.grad` has the norm"):
        local.step(1.5)
    with pytest.raises(px.PackextError, match="ProbabilisticLineSearch is for one process, and this is one of 2"):
        optim.ProbabilisticLineSearch(alone.parameters())
    with pytest.raises(px.PackextError, match="Alpha is for one process, and this is one of 2"):
        optim.Alpha(sgd)


def learned_rate(rank: int) -> None:
    """A rate from the samples of both processes; what goes wrong in one, both know."""

    def steps(model: nn.Module, group: Any, mine: Callable[[Tensor], Tensor], factor: float) -> Any:
        policy = optim.learned.Policy((0.12, -0.05, 0.03, -0.02, -2.0))
        controller = optim.LearnedRate(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), policy, group)
        for seed in range(4):
            x, y = (mine(t) for t in data(seed))
            controller.optimizer.zero_grad()
            with optim.emit(controller):
                losses = nn.functional.cross_entropy(model(x), y, reduction="none")
                (controller.watch(losses).mean() * factor).backward()
            controller.optimizer.step()
        return controller

    alone, model = px.extend(network()), px.extend(network())
    one = steps(alone, ALONE[rank], lambda t: t, 1.0)
    parallel = DistributedDataParallel(model)
    both = steps(parallel, None, lambda t: t.split(SIZES)[rank], SIZES[rank] * WORLD / 8)
    torch.testing.assert_close(one.features, both.features, rtol=1e-9, atol=1e-9)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    x, y = data(0)
    with optim.emit(both):
        losses = nn.functional.cross_entropy(parallel(x), y, reduction="none")
        (both.watch(losses) if rank else losses).mean().backward()
    with pytest.raises(px.PackextError, match="LearnedRate: rank 0: 1 backward passes and 0 batches of losses"):
        both.optimizer.step()


TASKS = (
    as_one_process,
    made_before_the_processes_met,
    several_uses,
    draws_differ,
    skipped_and_refused,
    outside_of_the_group,
    sharded_is_refused,
    controllers_agree,
    learned_rate,
)


def worker(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    early = px.extend(network())
    EARLY.extend((early, MAKE["kfac"](early.parameters())))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    ALONE.extend(dist.new_group([k]) for k in range(WORLD))
    try:
        for task in TASKS:
            task(rank)
        dist.barrier()  # who ends first takes the store with it
    finally:
        ALONE.clear()
        EARLY.clear()
        gc.collect()  # groups that outlive this in a model abort the process at its end
        dist.destroy_process_group()


def test_two_processes() -> None:
    processes(worker, world=WORLD)
