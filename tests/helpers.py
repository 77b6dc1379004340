"""What several test files need."""

from __future__ import annotations

import gc
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import packext as px
from packext import testing


@contextmanager
def double_precision(seed: int = 0) -> Iterator[None]:
    """Float64 by default, and a fixed seed."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def left_behind(step: Callable[[], Any]) -> list[type]:
    """Classes of the tensors, and of what is packext's, that a step leaves for the garbage collector to find."""
    gc.collect()
    gc.disable()
    try:
        step()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        return [type(o) for o in gc.garbage if type(o).__module__.startswith("packext") or isinstance(o, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def rows_of(model: nn.Module, losses: Callable[[], Tensor]) -> testing.Rows:
    """Individual gradients as gradients of the entries of `losses()` `[N]`, all computed from one batch.

    For models in which a sample cut out of its batch sees something else (random numbers, frequencies).
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with px.disable():
        each = losses()
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for loss in each:
        grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        for (name, p), grad in zip(named.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(p) if grad is None else grad.to_dense())
    return {name: torch.stack(parts) for name, parts in rows.items()}


def assert_exact(
    model: nn.Module, loss: Callable[[], Tensor], rows: testing.Rows, factor: float = 1.0, tolerance: float = 1e-9
) -> px.Results:
    """Run `loss().backward()` with every quantity, and compare all of them and `.grad` with `rows`."""
    quantities = testing.all_quantities()
    for p in model.parameters():
        p.grad = None
    with px.backpack(*quantities, scale="loss") as results:
        loss().backward()
    report = testing.compare(model, quantities, rows, float(factor), tolerance)
    assert report.ok, str(report)
    for name, p in model.named_parameters():
        if p.requires_grad and p.grad is not None:
            assert testing.relative_error(p.grad, rows[name].sum(0)) < tolerance, name
    return results


def assert_exact_sum(model: nn.Module, loss: Callable[[], Tensor], rows: testing.Rows) -> None:
    """The same of a sum over samples that no extended loss computes, so that clipping has to be told the scale."""
    *quantities, clipped = testing.all_quantities()
    for some, scale in ((quantities, "loss"), ([clipped], 1.0)):
        model.zero_grad()
        with px.backpack(*some, scale=scale):
            loss().backward()
        report = testing.compare(model, some, rows, 1.0, 1e-9)
        assert report.ok, str(report)
    for name, p in model.named_parameters():
        if p.requires_grad:
            got = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(got, rows[name].sum(0), msg=lambda m, name=name: f"{name}: {m}")


def assert_private_step(model: nn.Module, loss: Callable[[], Tensor], rows: testing.Rows) -> None:
    """A step of DPSGD without noise is the mean of clipped `rows` `[N, *p]`, of the samples' own losses."""
    n, norms = len(next(iter(rows.values()))), sum(g.flatten(1).square().sum(1) for g in rows.values()) ** 0.5
    bound = float(norms.median())
    optimizer = px.optim.DPSGD(model.parameters(), 0.1, max_norm=bound, noise_multiplier=0.0, expected_batch_size=n)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with px.optim.emit(optimizer):
        loss().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        step = torch.tensordot((bound / norms).clamp(max=1), rows[name], 1) / n
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * step)


def processes(worker: Callable[..., None], *arguments: Any, world: int = 2) -> None:
    """Run `worker(rank, port, *arguments)` in new processes, with a port for their process group.

    A server imports torch and packext once, and forks them all. In it, signatures are not checked.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(worker, (port, *arguments), nprocs=world, start_method="forkserver")


def mlp() -> nn.Sequential:
    """Two linear layers."""
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def batch(n: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs and labels for `mlp`."""
    return torch.randn(n, 5), torch.randint(3, (n,))


def fields(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What the parameters of a model carry."""
    return {name: dict(p.__dict__) for name, p in model.named_parameters()}


def run_with_a_hook(model: nn.Sequential, loss: nn.Module, x: Tensor, y: Tensor, hook: Any) -> px.Results:
    """A pass through the model in two parts, with a hook between them; two without it come before.

    So the structure is known, the third pass is none in which the probe looks again, and only the pass calls the hook.

    Returns:
        Individual gradients.
    """
    for hooked in (False, False, True):
        model.zero_grad()
        with px.backpack(px.BatchGrad()) as results:
            hidden = model[:2](x)
            if hooked:
                hidden.register_hook(hook)
            loss(model[2](hidden), y).backward()
    return results
