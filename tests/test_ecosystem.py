"""What users of PyTorch put around a model: data parallelism, loss scaling, fused kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

import packext as px
from tests.helpers import processes

WORLD = 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def shard(module: nn.Sequential) -> nn.Sequential:
    for part in (module[0], module[2]):
        fully_shard(part)
    return fully_shard(module)


#: How a model is made parallel, before or after it is extended.
WAYS: dict[str, Callable[[], nn.Module]] = {
    "DDP(extend)": lambda: DistributedDataParallel(px.extend(network())),
    "extend(DDP)": lambda: px.extend(DistributedDataParallel(network())),
    "find unused": lambda: DistributedDataParallel(px.extend(network()), find_unused_parameters=True),
    "bucket view": lambda: DistributedDataParallel(px.extend(network()), gradient_as_bucket_view=True),
    "FSDP2(extend)": lambda: shard(px.extend(network())),
    "extend(FSDP2)": lambda: px.extend(shard(network())),
}


def passes(model: nn.Module, x: Tensor, y: Tensor) -> px.Results:
    quantities = (px.BatchGrad(), px.DiagGGNExact(), px.KFAC(generator=torch.Generator().manual_seed(0)))
    with px.backpack(*quantities) as results:
        px.extend(nn.CrossEntropyLoss())(model(x), y).backward()
    return results


def worker(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        draw = torch.Generator().manual_seed(rank)
        x = torch.randn(4, 5, generator=draw, dtype=torch.float64)
        y = torch.randint(0, 3, (4,), generator=draw)
        alone = px.extend(network())
        wanted = passes(alone, x, y)
        gradients = {k: p.grad.clone() for k, p in alone.named_parameters() if p.grad is not None}
        for g in gradients.values():
            dist.all_reduce(g)
            g /= WORLD
        for way, build in WAYS.items():
            model = build()
            for _ in range(2):
                model.zero_grad()
                found = passes(model, x, y)
            for name, p in model.named_parameters():
                key = name.removeprefix("module.")
                g = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                torch.testing.assert_close(g, gradients[key], msg=f"{way}: {name}.grad")
                got, want = found[name if name in found else key], wanted[key]
                torch.testing.assert_close(got.grad_batch, want.grad_batch, msg=f"{way}: {name}.grad_batch")
                torch.testing.assert_close(got.diag_ggn_exact, want.diag_ggn_exact, msg=f"{way}: {name}.diag_ggn_exact")
                for a, b in zip(got.kfac, want.kfac, strict=True):
                    torch.testing.assert_close(a, b, msg=f"{way}: {name}.kfac")
        for build in (
            lambda: DistributedDataParallel(px.extend(network()), static_graph=True),
            lambda: px.extend(DistributedDataParallel(network(), static_graph=True)),
        ):
            with pytest.raises(px.UnsupportedUseError, match="static_graph=False"):
                passes(build(), x, y)
    finally:
        dist.destroy_process_group()


def test_data_parallel() -> None:
    """Results are those of a rank's own samples; `.grad` is averaged over the ranks, as without packext."""
    processes(worker, world=WORLD)


def test_loss_scaling() -> None:
    """Individual gradients of a scaled loss carry the scale, which a number for `scale` takes out again."""
    model, loss_fn = px.extend(network()), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 3, (4,))
    with px.backpack(px.BatchGrad(), px.DiagGGNExact()) as plain:
        loss_fn(model(x), y).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with px.backpack(px.BatchGrad(), px.DiagGGNExact(), scale=1 / scaler.get_scale()) as scaled:
        scaler.scale(loss_fn(model(x), y)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(scaled[name].grad_batch, plain[name].grad_batch)
        torch.testing.assert_close(scaled[name].diag_ggn_exact, plain[name].diag_ggn_exact)
        assert p.grad is not None
        torch.testing.assert_close(p.grad, 1024.0 * plain[name].grad_batch.sum(0))
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    scaler.step(optimizer)
    scaler.update()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] - 0.1 * plain[name].grad_batch.sum(0))


def test_a_step_that_loss_scaling_skips() -> None:
    """Of a pass that overflows nothing is left: with the next scale results are those of the samples' own losses."""
    model, loss_fn = px.extend(network().float()), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(4, 5), torch.randint(0, 3, (4,))
    with px.backpack(px.BatchGrad(), px.DiagGGNExact(), scale="sample") as plain:
        loss_fn(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-77)
    for factor in (1000.0, 1.0):  # the first of which is too large with that scale
        optimizer.zero_grad()
        with px.backpack(px.BatchGrad(), px.DiagGGNExact(), scale="sample") as scaled:
            scaler.scale(factor * loss_fn(model(x), y)).backward()
        finite = all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        assert finite == (factor == 1)
        if not finite:
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == 2.0**50
            torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    for name in plain:
        torch.testing.assert_close(scaled[name].grad_batch, plain[name].grad_batch)
        torch.testing.assert_close(scaled[name].diag_ggn_exact, plain[name].diag_ggn_exact)


class Attention(nn.Module):
    """One fused call, which torch differentiates once only."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)[:, None].chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))


def test_fused_attention() -> None:
    """The GGN needs one derivative; products with the Hessian say which kernel has a second one."""
    model, loss_fn = px.extend(Attention().double()), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(4, 5, 4, dtype=torch.float64), torch.randint(0, 3, (4,))
    with px.backpack(px.DiagGGNExact()) as fused:
        loss_fn(model(x), y).backward()
    for quantity in (px.HessianTrace(mc_samples=2), px.TopEigenvalues(curvature="ggn")):
        with pytest.raises(px.UnsupportedUseError, match=r"SDPBackend\.MATH"), px.backpack(quantity):
            loss_fn(model(x), y).backward()
    with sdpa_kernel(SDPBackend.MATH), px.backpack(px.DiagGGNExact(), px.HessianTrace(mc_samples=2)) as spelled:
        loss_fn(model(x), y).backward()
    for name in fused:
        torch.testing.assert_close(fused[name].diag_ggn_exact, spelled[name].diag_ggn_exact)
