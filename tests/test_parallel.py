"""Layouts of a model over processes or devices that packext does not follow: right, or refused on all ranks."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import packext as px
from tests import test_union
from tests.helpers import fields
from tests.test_union import together

pytestmark = pytest.mark.usefixtures("double")

N = 8


def perceptron(*front: nn.Module) -> nn.Sequential:
    return nn.Sequential(*front, nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def loss_of(model: nn.Module, x: Any, y: Tensor) -> Tensor:
    out = model(x)
    out = out.full_tensor() if isinstance(out, DTensor) else out
    return px.extend(nn.CrossEntropyLoss())(out if out.dim() == 2 else out.mean(1), y)


def refused(model: nn.Module, match: str, x: Any, y: Tensor, quantities: Any = None, **options: Any) -> None:
    """A pass is refused, changes nothing, and without a context goes its usual way."""
    plain = {}
    for extended in (False, True):
        model.zero_grad()
        (px.extend if extended else px.unextend)(model)
        loss_of(model, x, y).backward()
        plain[extended] = [p.grad for p in model.parameters()]
        plain[extended] = [g.full_tensor() if isinstance(g, DTensor) else g for g in plain[extended]]
    torch.testing.assert_close(plain[True], plain[False])
    model.zero_grad()
    before, hooks = fields(model), [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(px.UnsupportedUseError, match=match):
        with px.backpack(*(quantities or [px.BatchGrad(), px.Variance()]), **options):
            loss_of(model, x, y).backward()
    assert fields(model) == before
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())


def _tensor_parallel(rank: int, world: int) -> None:
    """Parameters in shards or copies are refused; what is before them has its quantities."""
    mesh = init_device_mesh("cpu", (world,))
    x, y = torch.randn(N, 6), torch.randint(4, (N,))
    pair = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    sharded = r"0\.weight \[Linear\] \(and 3 more\) is a DTensor \[8, 6\] placed \[Shard\(dim=0\)\].*parameters=\.\.\."
    refused(parallelize_module(perceptron(), mesh, pair), sharded, x, y)
    for quantity in (px.DiagGGNMC(), px.KFAC(), px.HessianTrace(), px.TopEigenvalues()):
        refused(parallelize_module(perceptron(), mesh, pair), sharded, x, y, [quantity])
    united = {"group": dist.group.WORLD, "scale": "sample"}
    refused(parallelize_module(px.extend(perceptron()), mesh, pair), sharded, x, y, **united)
    plan = {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1)), "3": RowwiseParallel()}
    model = parallelize_module(perceptron(nn.LayerNorm(6)), mesh, plan)
    refused(model, r"0\.weight \[LayerNorm\] .*\[Replicate\(\)\]", torch.randn(N, 4, 6), y)
    copies = perceptron()
    distribute_module(copies, mesh)
    refused(copies, r"0\.weight \[Linear\] .*\[Replicate\(\)\]", DTensor.from_local(x, mesh, [Replicate()]), y)

    with pytest.raises(ValueError, match=r"parameters has a DTensor of \[8, 6\].*by name"):
        px.backpack(px.BatchGrad(), parameters=parallelize_module(perceptron(), mesh, pair).parameters())

    torch.manual_seed(1)
    model = px.extend(perceptron(nn.Linear(6, 6), nn.Tanh()))
    whole = copy.deepcopy(model)
    plan = {"2": ColwiseParallel(), "4": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    asked = [px.BatchGrad(), px.BatchL2Grad(), px.Variance(), px.DiagGGNExact(), px.KFLR()]
    for m in (model, whole):
        with px.backpack(*asked, parameters=list(m[0].parameters())) as results:
            loss_of(m, x, y).backward()
        assert {name for name in results} == {"0.weight", "0.bias"}
    for p, q in zip(model[0].parameters(), whole[0].parameters(), strict=True):
        for quantity in asked:
            torch.testing.assert_close(getattr(p, quantity.savefield), getattr(q, quantity.savefield))
    for part in (model[2], model[4]):
        part.requires_grad_(False)
    for quantity in (px.HessianTrace(), px.TopEigenvalues(), px.DiagHessian()):
        refused(model, r"2\.weight \[Linear\] .*second derivatives through DTensors", x, y, [quantity])
    with pytest.raises(px.UnsupportedUseError, match="create_graph"), px.backpack(px.BatchGrad()):
        loss_of(model, x, y).backward(create_graph=True)
    returned = perceptron(nn.Linear(6, 6))
    parallelize_module(returned, mesh, {"3": ColwiseParallel(use_local_output=False)})
    refused(returned, "returned a DTensor", x, y, parameters=list(returned[0].parameters()))
    behind = perceptron().append(nn.Linear(4, 4))
    parallelize_module(behind, mesh, pair)
    refused(behind, r"0\.weight \[Linear\] .*is a DTensor", x, y)
    with pytest.raises(px.PackextError, match=r"3\.weight.* What 0\.weight \[Linear\] and other DTensors give"):
        with px.backpack(px.BatchGrad(), parameters=list(behind[3].parameters())):
            loss_of(behind, x, y).backward()

    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(perceptron(), mesh["tensor"], pair)
    for part in (*model.children(), model):
        fully_shard(part, mesh=mesh["data"])
    with warnings.catch_warnings():  # torch's own of what a parallel layer returns to FSDP2
        warnings.simplefilter("ignore")
        with pytest.raises(px.UnsupportedUseError, match=r"0\.weight \[FSDPLinear\] .*placed \[Shard\(dim=0\)\]"):
            with px.backpack(px.BatchGrad()):
                loss_of(px.extend(model), x, y).backward()
    assert all(p.grad is None for p in model.parameters())


# -- pipelines ---------------------------------------------------------------------------------------------------


def _pipeline(rank: int, world: int) -> None:
    """Each stage has the rows of its own parameters, its micro-batches being parts of the batch."""
    whole = px.extend(perceptron())
    x, y = torch.randn(N, 6), torch.randint(4, (N,))
    with px.backpack(px.BatchGrad(), px.Variance(), scale="sample") as wanted:
        loss_of(whole, x, y).backward()
    stage = px.extend(nn.Sequential(*list(whole)[2 * rank : 2 * rank + 2]))
    schedule = ScheduleGPipe(
        PipelineStage(stage, rank, world, torch.device("cpu")), 4, loss_fn=px.extend(nn.CrossEntropyLoss())
    )

    def step() -> None:
        stage.zero_grad()
        schedule.step(x) if rank == 0 else schedule.step(target=y)

    step()  # outside of a context: torch learns shapes by a pass of its own
    for _ in range(2):  # with the probe, and without
        with px.backpack(px.BatchGrad(), px.Variance(), scale=N / 4, accumulate=True) as results:
            step()
        assert [p.grad is not None for p in stage.parameters()] == [True, True]
        for name, _ in stage.named_parameters():
            expected = wanted[f"{2 * rank}.{name[2:]}"]
            torch.testing.assert_close(results[name].grad_batch, expected.grad_batch)
            torch.testing.assert_close(results[name].variance, expected.variance)


def test_a_pass_to_the_inputs_alone_is_no_part_of_a_batch() -> None:
    """As the first step of a pipeline makes one, of zeros."""
    model, x, y = px.extend(perceptron()), torch.randn(N, 6, requires_grad=True), torch.randint(4, (N,))
    with px.backpack(px.BatchGrad(), accumulate=True) as results:
        with pytest.raises(px.PackextError, match="no parameter of the model a gradient.*px.disable"):
            torch.autograd.grad(loss_of(model, x, y), x)
        with px.disable():
            torch.autograd.grad(loss_of(model, x, y), x)
        for part in (slice(0, 3), slice(3, N)):
            torch.autograd.grad(loss_of(model, x[part], y[part]), list(model[0].parameters()))
    assert {name: len(found.grad_batch) for name, found in results.items() if name[0] == "0"} == {
        "0.weight": N, "0.bias": N
    }  # fmt: skip


# -- ranks that do not agree ---------------------------------------------------------------------------------------


def _differ(rank: int, world: int) -> None:
    x = torch.randn(N, 6)
    group = dist.group.WORLD
    for model, quantity, match in (
        (nn.Linear(6, 3 + rank), px.BatchL2Grad(), r"bias is \[\d\] torch.float64 on rank . and \[\d\]"),
        (
            nn.Linear(6, 3).to((torch.float32, torch.float64)[rank]),
            px.BatchL2Grad(),
            r"torch\.float32.*torch\.float64|64.*32",
        ),
        (nn.Linear(6, 3), (px.Variance(), px.BatchGrad())[rank], r"asks for .*Variance|this one for .*Variance"),
        (nn.Linear(6, 3), px.ClippedGrad(0.5 + rank), r"max_norm=.*max_norm="),
    ):
        with pytest.raises(px.PackextError, match=match):
            with px.backpack(quantity, scale=1.0, group=group):
                px.extend(model)(x.to(next(model.parameters()).dtype)).sum().backward()
        assert not hasattr(next(model.parameters()), quantity.savefield)


def _each(rank: int, world: int) -> None:
    for work in (_tensor_parallel, _pipeline, _differ):  # in one pair of processes, as these take a second to start
        torch.manual_seed(0)
        work(rank, world)


def test_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_union, "_each", _each, raising=False)  # which forked processes look up there
    together(_each)


# -- devices without numbers ---------------------------------------------------------------------------------------


class Halves(nn.Module):
    """A half on each of two devices."""

    def __init__(self, *devices: str) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(6, 6, device=device) for device in devices)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.a, self.b):
            x = part(x.to(part.weight.device) if not x.is_meta else torch.zeros_like(x, device=part.weight.device))
        return x


@pytest.mark.parametrize("devices", [("cpu", "meta"), ("meta", "cpu"), ("meta", "meta")])
def test_the_meta_device(devices: tuple[str, str]) -> None:
    model, x = px.extend(Halves(*devices)), torch.randn(N, 6)
    assert model(x).shape == (N, 6)  # of shapes alone, as without packext
    for quantity in (px.BatchGrad(), px.DiagGGNExact(), px.HessianTrace()):
        y = torch.zeros(N, 6, device=devices[1])
        with pytest.raises(px.UnsupportedUseError, match=r"on the meta device.*[ab]\.weight \[6, 6\].*to_empty"):
            with px.backpack(quantity, scale="sample"):
                px.extend(nn.MSELoss())(model(x), y).backward()
        assert all(p.grad is None and not hasattr(p, quantity.savefield) for p in model.parameters())
