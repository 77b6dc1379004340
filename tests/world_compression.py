"""What each process of `test_world.py` runs: compressed gradients, next to simulations in one process."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import packext as px
from packext.optim import distributed as pd

LOSS = nn.CrossEntropyLoss()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9), nn.Tanh(), nn.Linear(9, 3))


def data(step: int, rank: int, n: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(n, 12, generator=draw, dtype=torch.float64)
    return x.to(torch.get_default_dtype()), torch.randint(3, (n,), generator=draw)


def gradients(model: nn.Module, step: int, rank: int) -> dict[str, Tensor]:
    x, y = data(step, rank)
    grads = torch.autograd.grad(LOSS(model(x), y), [*model.parameters()])
    return dict(zip(dict(model.named_parameters()), grads, strict=True))


def wrapped(model: nn.Module, **options: Any) -> DDP:
    """With several buckets, which change after the first pass."""
    return DDP(model, bucket_cap_mb=0.001, **options)


def same_everywhere(model: nn.Module) -> None:
    for p in model.parameters():
        everyone = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, p.detach())
        assert all(torch.equal(p, q) for q in everyone)


def ratio_one_is_plain(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float32)

    def run(register: Callable[[DDP, Any], None]) -> list[Tensor]:
        model = wrapped(network())
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        register(model, optimizer)
        for step in range(4):
            optimizer.zero_grad()
            x, y = data(step, rank)
            LOSS(model(x), y).backward()
            optimizer.step()
        return list(model.parameters())

    plain = run(lambda ddp, sgd: None)
    for make in (
        lambda ddp, sgd: pd.TopK(ddp.named_parameters(), 1.0),
        lambda ddp, sgd: pd.GaussianK(ddp.named_parameters(), 0.9),  # less would not be less to send
        lambda ddp, sgd: pd.DGC(ddp.named_parameters(), sgd, 1.0, momentum=0.0),
    ):
        found = run(lambda ddp, sgd: ddp.register_comm_hook(make(ddp, sgd), pd.compression_hook))  # noqa: B023
        assert all(torch.equal(p, q) for p, q in zip(plain, found, strict=True))


# -- simulations of all processes in one -----------------------------------------------------------------------


def largest(t: Tensor, count: int) -> list[int]:
    return sorted(range(t.numel()), key=lambda k: -abs(t.flatten()[k].item()))[:count]


def above(u: Tensor, count: int) -> list[int]:
    """GaussianK's entries, in plain Python."""
    values, n = u.flatten().tolist(), u.numel()
    mean = sum(values) / n
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / n)
    # The quantile by bisection of the error function.
    low, high = 0.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erfc(middle / math.sqrt(2)) > count / n else (low, middle)
    threshold = mean + low * std
    for _ in range(3):
        passing = sum(abs(v) > threshold for v in values)
        if passing < 2 * count / 3:
            threshold *= 0.5
        elif passing > 4 * count / 3:
            threshold *= 1.5
    chosen = [k for k in largest(u, n) if abs(values[k]) > threshold]
    return chosen[: math.ceil(4 * count / 3)] or largest(u, count)


class Simulated:
    """All processes in one: error feedback, and DGC's momentum, of one parameter."""

    def __init__(self, pick: Callable[[Tensor, int], list[int]], momentum: float | None, nesterov: bool, clip: Any):
        self.pick, self.m, self.nesterov, self.clip = pick, momentum, nesterov, clip
        self.u: dict[Any, Any] = {}
        self.v: dict[Any, Any] = {}

    def __call__(self, name: str, rank: int, world: int, g: Tensor, count: int, whole: bool) -> Tensor:
        """What a rank sends of a parameter."""
        key = (name, rank)
        u, v = self.u.get(key, torch.zeros_like(g)), self.v.get(key, torch.zeros_like(g))
        if self.clip is not None and g.norm() > self.clip / world**0.5:
            g = g * (self.clip / world**0.5 / g.norm())
        if self.m is None:
            v = v + g
        elif self.nesterov:
            u = self.m * (u + g)
            v = v + u + g
        else:
            u = self.m * u + g
            v = v + u
        sent = v.clone()
        if not whole:
            mask = torch.zeros(g.numel(), dtype=torch.bool)
            mask[self.pick(v, count)] = True
            mask = mask.view_as(g)
            sent, u = torch.where(mask, v, 0.0), torch.where(mask, 0.0, u)
        self.u[key], self.v[key] = u, v - sent
        return sent


KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Simulated]]] = {
    "topk": (lambda ps, sgd, **o: pd.TopK(ps, 0.1, **o), lambda: Simulated(largest, None, False, None)),
    "gaussian": (lambda ps, sgd, **o: pd.GaussianK(ps, 0.1, **o), lambda: Simulated(above, None, False, None)),
    "dgc": (lambda ps, sgd, **o: pd.DGC(ps, sgd, 0.1, momentum=0.7, **o), lambda: Simulated(largest, 0.7, False, None)),
    "dgc, all": (
        lambda ps, sgd, **o: pd.DGC(ps, sgd, 0.1, momentum=0.7, nesterov=True, max_norm=0.2, **o),
        lambda: Simulated(largest, 0.7, True, 0.2),
    ),
}


def as_simulated(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float64)
    for name, (make, simulated) in KINDS.items():
        alone, oracle = network(), simulated()
        model = wrapped(network())
        optimizer = torch.optim.SGD(model.parameters(), 0.3, weight_decay=0.01)
        state = make(model.module.named_parameters(), optimizer, warmup=(0.3, 0.2), warmup_passes=2)
        layouts: list[int] = []

        def hook(state, bucket):  # type: ignore[no-untyped-def]  # DistributedDataParallel looks at annotations
            if bucket.index() == 0:
                layouts.append(0)  # noqa: B023
            layouts[-1] += 1  # noqa: B023
            return pd.compression_hook(state, bucket)

        model.register_comm_hook(state, hook)
        payload = 0
        for step in range(7):
            ratio = (0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.1)[step]
            assert state.ratio == ratio
            optimizer.zero_grad()
            x, y = data(step, rank)
            LOSS(model(x), y).backward()
            optimizer.step()
            each = [gradients(alone, step, r) for r in range(world)]
            with torch.no_grad():
                for key, p in alone.named_parameters():
                    count = max(1, round(ratio * p.numel()))
                    room = math.ceil(4 * count / 3) if name == "gaussian" else count
                    whole = room * 12 >= p.numel() * 8 or (name.startswith("dgc") and p.dim() == 1)
                    payload += p.numel() * 8 if whole else room * 12
                    sent = [oracle(key, r, world, g[key], count, whole) for r, g in enumerate(each)]
                    p -= 0.3 * (sum(sent) / world + 0.01 * p)
        for (key, p), q in zip(alone.named_parameters(), model.module.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13, msg=f"{name}, {key}")
            kept = state.kept(key)
            expected = oracle.v[key, rank]
            torch.testing.assert_close(torch.zeros_like(p) if kept is None else kept, expected, rtol=1e-9, atol=1e-13)
        assert state.payload == payload and state.passes == 7, name
        assert layouts[0] != layouts[1], "the trap: buckets change after the first pass"
        same_everywhere(model)


class Branches(nn.Module):
    """Gradients that are whole numbers, a branch of which may go unused."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(10, 6).T), nn.Parameter(torch.zeros(50))  # a has its columns in a row

    def forward(self, to_a: Tensor, to_b: Tensor | None) -> Tensor:
        out = (self.a * to_a).sum()
        return out if to_b is None else out + (self.b * to_b).sum()


def conserved(rank: int, world: int) -> None:
    """Sent + residual = all gradients, exactly: in whole numbers, of which nothing is rounded."""
    torch.set_default_dtype(torch.float64)
    for kind in (pd.TopK, pd.GaussianK):
        model = DDP(Branches(), bucket_cap_mb=0.0001, find_unused_parameters=True)
        state = kind(model.module.named_parameters(), 0.07)
        model.register_comm_hook(state, pd.compression_hook)
        arrived = {"a": torch.zeros(6, 10), "b": torch.zeros(50)}
        given = {"a": torch.zeros(6, 10), "b": torch.zeros(50)}
        for step in range(6):
            model.zero_grad()
            draw = torch.Generator().manual_seed(10 * step + rank)
            to_a, to_b = (torch.randint(-9, 10, s, generator=draw) * 1.0 * world for s in ((6, 10), (50,)))
            unused = step in (1, 3) or (step == 4 and rank == 0)  # by all, and by one
            model(to_a, None if unused else to_b).backward()
            for name, p in model.module.named_parameters():
                grad = torch.zeros_like(p) if p.grad is None else p.grad
                arrived[name] += grad
                assert grad.count_nonzero() <= world * (4 if kind is pd.TopK else 6)
                assert (name, step in (1, 3)) != ("b", True) or not grad.any()
            given["a"] += to_a
            given["b"] += 0 if unused else to_b
        for name in given:
            kept = state.kept(name)
            assert kept is not None and kept.any()
            missing = given[name] - kept
            dist.all_reduce(missing)
            assert torch.equal(missing / world, arrived[name]), (kind, name)


def half_precision(rank: int, world: int) -> None:
    """What is kept goes on growing: in bfloat16, 256 and 1 are 256."""
    torch.set_default_dtype(torch.float64)
    for kind in (pd.TopK, pd.DGC):
        net = nn.Linear(20, 2, bias=False).bfloat16()
        model, optimizer = DDP(net), torch.optim.SGD(net.parameters(), 0.0)
        options = {} if kind is pd.TopK else {"optimizer": optimizer, "momentum": 0.0}
        state = kind(net.named_parameters(), ratio=0.025, **options)
        model.register_comm_hook(state, pd.compression_hook)
        x = torch.ones(1, 20).bfloat16()
        x[0, 3] = 4096.0  # is sent each time, for one of the outputs
        for _ in range(300):
            optimizer.zero_grad()
            model(x)[0, 0].backward()
        kept = state.kept("weight")
        assert kept is not None and kept.dtype == torch.float32 and net.weight.grad.dtype == torch.bfloat16
        assert float(net.weight.grad[0, 3]) == 4096.0
        assert sorted(kept[0].tolist()) == [0.0] + 19 * [300.0]
        x[0, 3] = 0.0  # and now another one, as 300: what 301 has beyond that is kept
        optimizer.zero_grad()
        model(x)[0, 0].backward()
        assert float(net.weight.grad.sum()) == 300.0
        kept = state.kept("weight")
        assert kept is not None and sorted(kept[0].tolist()) == [0.0, 1.0] + 18 * [301.0]
    net = nn.Linear(20, 2, bias=False).half()
    model = DDP(net)
    model.register_comm_hook(pd.TopK(net.named_parameters(), 0.025), pd.compression_hook)
    x = torch.zeros(1, 20).half()
    x[0, 3] = 4e4  # of which two are more than float16 holds
    model(x)[0, 0].backward()
    assert net.weight.grad[0, 3] == x[0, 3]


def what_float16_does_not_hold_waits(rank: int, world: int) -> None:
    """Of 80001 that are due here 65504 are sent, and the rest with the next; of a parameter that is sent whole, too."""
    torch.set_default_dtype(torch.float32)
    x = torch.zeros(1, 20).half()
    x[0, 3] = 1.0
    for ratio in (0.05, 1.0):
        net = nn.Linear(20, 1, bias=False).half()
        model = DDP(net)
        state = pd.TopK(net.named_parameters(), ratio)
        model.register_comm_hook(state, pd.compression_hook)
        kept = torch.zeros(20)
        kept[3] = 8e4 if rank == 0 else 0.0
        state.load_state_dict({**state.state_dict(), "kept": {"weight": {"residual": kept}}})
        for sent, rest in ((65504.0, 14497.0), (14496.0, 2.0 if ratio < 1 else 0.0)):  # what rounding takes, as ever
            model.zero_grad()
            model(x).sum().backward()
            mean = torch.tensor((sent + world - 1) / world)
            torch.testing.assert_close(net.weight.grad[0, 3].float(), mean, rtol=2e-3, atol=0.0)
            left = state.kept("weight")
            if rank == 0:
                assert rest == (0.0 if left is None else float(left[0, 3])), (ratio, sent, left)


def entries_of_one_size(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float64)
    model = DDP(nn.Linear(50, 1, bias=False))
    model.register_comm_hook(pd.GaussianK(model.module.named_parameters(), 0.1), pd.compression_hook)
    for _ in range(4):
        model.zero_grad()
        model(torch.ones(1, 50)).sum().backward()
        assert model.module.weight.grad.count_nonzero() == 5


def accumulation(rank: int, world: int) -> None:
    """Passes under `no_sync` are compressed as one."""
    torch.set_default_dtype(torch.float64)
    found = []
    for parts in (1, 3):
        model = wrapped(network())
        state = pd.TopK(model.module.named_parameters(), 0.1)
        model.register_comm_hook(state, pd.compression_hook)
        for step in range(3):
            model.zero_grad()
            x, y = data(step, rank)
            pieces = list(zip(x.split(6 // parts), y.split(6 // parts), strict=True))
            for piece in pieces[:-1]:
                with model.no_sync():
                    (LOSS(model(piece[0]), piece[1]) / parts).backward()
            (LOSS(model(pieces[-1][0]), pieces[-1][1]) / parts).backward()
        assert state.passes == 3
        found.append([p.grad for p in model.parameters()])
    for g, h in zip(*found, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-14)


def saved_and_refused(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float64)

    def steps(model: DDP, optimizer: Any, which: range) -> None:
        for step in which:
            optimizer.zero_grad()
            x, y = data(step, rank)
            LOSS(model(x), y).backward()
            optimizer.step()

    def make() -> tuple[DDP, Any, Any]:
        model = wrapped(network())
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        state = pd.DGC(model.module.named_parameters(), optimizer, 0.1, warmup=(0.3,), warmup_passes=5)
        model.register_comm_hook(state, pd.compression_hook)
        return model, optimizer, state

    model, optimizer, state = make()
    steps(model, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), state.state_dict()))
    steps(model, optimizer, range(4, 8))
    again, other, restored = make()
    again.load_state_dict(saved[0])
    restored.load_state_dict(saved[1])
    steps(again, other, range(4, 8))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert restored.passes == 8 and restored.payload == state.payload

    for wrong in ((world + 1, rank), (world, (rank + 1) % world)):
        with pytest.raises(px.PackextError, match=rf"saved by rank {wrong[1]} of {wrong[0]} processes"):
            restored.load_state_dict({**saved[1], "world": wrong})
    with pytest.raises(px.PackextError, match="what is kept of elsewhere has 4 entries, and the parameter is not"):
        restored.load_state_dict({**saved[1], "kept": {"elsewhere": {"residual": torch.zeros(4)}}})

    before = {name: state.kept(name).clone() for name, p in model.module.named_parameters() if p.dim() == 2}
    x, y = data(9, rank)
    with pytest.raises(RuntimeError, match=rf"DGC: the gradient of .* rank {world - 1} .*not finite|some process"):
        LOSS(model(x * (float("nan") if rank == world - 1 else 1)), y).backward()
    assert all(torch.equal(state.kept(name), t) for name, t in before.items()) and state.passes == 8
    steps(model, optimizer, range(8, 9))  # as good as before
    assert state.passes == 9 and all(p.grad.isfinite().all() for p in model.parameters())
    same_everywhere(model)

    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pytest.raises(px.PackextError, match="SGD has one behind it or is no SGD: use torch.optim.SGD"):
        pd.DGC(model.named_parameters(), optimizer)
    strange = wrapped(network())
    strange.register_comm_hook(pd.TopK(network().named_parameters(), 0.1), pd.compression_hook)
    with pytest.raises(RuntimeError, match=r"TopK does not know a parameter of shape \(3,\)|of shape"):
        LOSS(strange(x), y).backward()
    table = DDP(nn.Embedding(9, 4, sparse=True))
    table.register_comm_hook(pd.TopK(table.module.named_parameters(), 0.1), pd.compression_hook)
    with pytest.raises(RuntimeError, match="TopK: the gradient of weight is sparse already"):
        table(torch.tensor([1, 2])).sum().backward()
    for bad in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"ratios are in \(0, 1\]"):
            pd.TopK(model.named_parameters(), bad)
    with pytest.raises(ValueError, match="a warm-up needs ratios and passes"):
        pd.TopK(model.named_parameters(), 0.1, warmup=(0.5,))


TASKS = (
    ratio_one_is_plain,
    as_simulated,
    conserved,
    half_precision,
    what_float16_does_not_hold_waits,
    entries_of_one_size,
    accumulation,
    saved_and_refused,
)
