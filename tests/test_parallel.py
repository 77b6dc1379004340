"""Layouts of a model over processes or devices that packext does not follow: right, or refused on all ranks."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import packext as px
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


# -- tensor parallelism ------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Plain layers around a pair of layers that are to be split, with a way around them."""

    def __init__(self, width: int = 6, checkpointed: bool = False) -> None:
        super().__init__()
        self.front, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.pair = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 6))
        self.head, self.checkpointed = nn.Linear(6, 4), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.front(x).tanh())
        return self.head(h + (checkpoint(self.pair, h, use_reentrant=False) if self.checkpointed else self.pair(h)))


PAIR = {"pair.0": ColwiseParallel(), "pair.2": RowwiseParallel()}
SPLIT = [
    px.BatchGrad(), px.BatchL2Grad(), px.BatchDotGrad(), px.GradDot(), px.SumGradSquared(), px.Variance(),
    px.ClippedGrad(0.5), px.DiagGGNExact(), px.BatchDiagGGNExact(), px.SqrtGGNExact(), px.GGNGram(), px.DiagEF(),
]  # fmt: skip


def whole(t: Any) -> Any:
    return t.full_tensor() if isinstance(t, DTensor) else t


def as_in_one_process(
    mesh: Any, model: nn.Module, x: Tensor, y: Tensor, plan: Any = None, quantities: Any = None, **options: Any
) -> px.Results:
    """Results and gradients of a model of which layers are split are those of the model in one process."""
    quantities = SPLIT if quantities is None else quantities
    found = []
    for m in (copy.deepcopy(model), model):
        if m is model:
            frozen = {name for name, p in m.named_parameters() if not p.requires_grad}
            parallelize_module(m, mesh, PAIR if plan is None else plan)
            for name, p in m.named_parameters():  # of which torch 2.9 has all require grad
                p.requires_grad_(name not in frozen)
        for _ in range(2):  # with the probe, and without
            m.zero_grad()
            with px.backpack(*quantities, **options) as results:
                loss_of(m, x, y).backward()
        found.append((results, {name: whole(p.grad) for name, p in m.named_parameters()}))
    (wanted, grads), (results, others) = found
    assert set(results) == set(wanted)
    for name in wanted:
        if options.get("grad", True):
            torch.testing.assert_close(others[name], grads[name])
        for q in quantities:
            got, want = getattr(results[name], q.savefield), getattr(wanted[name], q.savefield)
            torch.testing.assert_close(whole(got), want, msg=lambda m, n=name, q=q: f"{q!r} of {n}: {m}")
    for q in quantities:
        if q.parts == "sum":
            torch.testing.assert_close(getattr(results, q.savefield), getattr(wanted, q.savefield))
    return results


def _split_layers(rank: int, world: int) -> None:
    """Linear layers in parts: results are DTensors as the parameters are, and sums are sums of all parts."""
    mesh = init_device_mesh("cpu", (world,))
    x, y = torch.randn(N, 5, 6), torch.randint(4, (N,))
    model: Any = px.extend(Block())
    results = as_in_one_process(mesh, model, x, y)
    batch, variance = model.pair[0].weight.grad_batch, results["pair.2.weight"].variance
    assert batch.placements == (Shard(1),) and batch.to_local().shape == (N, 6 // world, 6)
    assert variance.placements == (Shard(1),) and model.pair[2].bias.grad_batch.placements == (Replicate(),)
    assert not isinstance(model.pair[0].weight.batch_l2, DTensor)
    for options in (
        {"scale": "sample"}, {"exact_grad": True}, {"attach": False}, {"grad": False}, {"per": "token"},
        {"accumulate": True, "scale": 2.0},
    ):  # fmt: skip
        asked = [px.BatchGrad(), px.BatchL2Grad(), px.Variance()]
        as_in_one_process(mesh, px.extend(Block()), x, y, quantities=asked, **options)
    for clipped in (px.ClippedGrad(1e-2), px.ClippedGrad(0.1, per_layer=True)):
        as_in_one_process(mesh, px.extend(Block()), x, y, quantities=[clipped])
    as_in_one_process(mesh, px.extend(Block(checkpointed=True)), x, y)
    as_in_one_process(mesh, px.extend(Block()), x[0, :4], y[:4])
    as_in_one_process(mesh, px.extend(Block()), x[:1], y[:1])
    as_in_one_process(mesh, px.extend(Block()), x, y, {"pair.0": ColwiseParallel(output_layouts=Replicate())})
    as_in_one_process(mesh, px.extend(Block()), x, y, {"pair.2": RowwiseParallel(input_layouts=Replicate())})
    frozen = px.extend(Block())
    frozen.pair[0].weight.requires_grad_(False)
    frozen.pair[2].bias.requires_grad_(False)
    as_in_one_process(mesh, frozen, x, y)
    for width in (1, 7):  # no part for a rank; parts of two sizes
        dtensors = {"0": ColwiseParallel(use_local_output=False), "2": RowwiseParallel()}
        model = nn.Sequential(nn.Linear(6, width, bias=False), nn.Tanh(), nn.Linear(width, 4))
        as_in_one_process(mesh, px.extend(model), x, y, dtensors)
    sequence = {"0": ColwiseParallel(), "2": RowwiseParallel(output_layouts=Shard(1))}
    sequence |= {"3": ColwiseParallel(input_layouts=Shard(1)), "5": RowwiseParallel()}
    model = perceptron().extend([nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)])
    as_in_one_process(mesh, px.extend(model), torch.randn(N, 4, 6), y, sequence)


def _attention(rank: int, world: int) -> None:
    """Llama with its heads and its MLP over the ranks, as torch's own tutorial splits it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, tie_word_embeddings=False,
    )  # fmt: skip
    plan: dict[str, Any] = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    for k in range(2):
        for names, style in (
            (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"),
                ColwiseParallel(),
            ),
            (("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel()),
        ):
            plan.update({f"model.layers.{k}.{name}": style for name in names})
    ids = torch.randint(20, (4, 6))
    model = transformers.LlamaForCausalLM(config).double()

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(input_ids=x).logits

    as_in_one_process(
        init_device_mesh("cpu", (world,)), px.extend(Loss()), ids, torch.randint(20, (4,)),
        {f"model.{name}": style for name, style in plan.items()}, SPLIT[:7],
    )  # fmt: skip


def _split_refused(rank: int, world: int) -> None:
    """What parts do not tell is refused on all ranks, and so are layers that are not followed."""
    mesh = init_device_mesh("cpu", (world,))
    x, y = torch.randn(N, 6), torch.randint(4, (N,))
    pair = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    sharded = r"0\.weight \[Linear\] \(and 3 more\) is a DTensor \[8, 6\] placed \[Shard\(dim=0\)\].*"
    for quantity in (px.DiagGGNMC(), px.KFLR(), px.GradHistogram(), px.ProjectedGrad(2)):
        told = f"{sharded}do not tell {re.escape(repr(quantity))} of it.*parameters="
        refused(parallelize_module(perceptron(), mesh, pair), told, x, y, [quantity])
    given = px.GradDot({name: torch.ones_like(p) for name, p in perceptron().named_parameters()})
    refused(parallelize_module(perceptron(), mesh, pair), f"{sharded}do not tell GradDot", x, y, [given])
    for quantity in (px.HessianTrace(), px.TopEigenvalues()):
        refused(parallelize_module(perceptron(), mesh, pair), f"{sharded}do not tell", x, y, [quantity])
    model = px.extend(parallelize_module(perceptron(), mesh, pair))
    private = px.optim.DPSGD(model.parameters(), 0.1, max_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)
    with pytest.raises(px.PackextError, match="is a DTensor of torch.float64: the noise is for whole tensors"):
        with px.optim.emit(private):
            loss_of(model, x, y).backward()
    with pytest.raises(px.UnsupportedUseError, match="do not tell"):
        px.defences.Clipped(1.0, 1.0)(model, nn.CrossEntropyLoss(), x, y)
    united = {"group": dist.group.WORLD, "scale": "sample"}
    refused(
        parallelize_module(px.extend(perceptron()), mesh, pair), r"over ranks \[0, 1\].*same samples", x, y, **united
    )
    for early in ({"extension_hook": print}, {"overhear": True, "attach": False}):
        refused(parallelize_module(perceptron(), mesh, pair), "complete when the pass has ended", x, y, **early)
    plan = {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1)), "3": RowwiseParallel()}
    model = parallelize_module(perceptron(nn.LayerNorm(6)), mesh, plan)
    refused(model, r"0\.weight is a DTensor .*\[Replicate\(\)\]", torch.randn(N, 4, 6), y)
    copies = perceptron()
    distribute_module(copies, mesh)
    copies.append(Local())
    refused(copies, r"0\.weight is a DTensor .*\[Replicate\(\)\]", DTensor.from_local(x, mesh, [Replicate()]), y)
    table = nn.Sequential(nn.Embedding(9, 6), *perceptron())
    parallelize_module(table, mesh, {"0": RowwiseParallel(input_layouts=Replicate())})
    refused(table, r"embedding in module 0 .*0\.weight is a DTensor", torch.randint(9, (N, 3)), y)

    model = px.extend(Block())
    one = copy.deepcopy(model)
    parallelize_module(model, mesh, PAIR)
    asked = [px.BatchL2Grad(), px.KFLR()]
    for m in (model, one):  # of other layers there is what there always is
        with px.backpack(*asked, parameters=[*m.front.parameters(), *m.norm.parameters()]) as results:
            loss_of(m, x, y).backward()
        assert set(results) == {"front.weight", "front.bias", "norm.weight", "norm.bias"}
    for p, q in zip(model.front.parameters(), one.front.parameters(), strict=True):
        for field in ("batch_l2", "kflr"):
            torch.testing.assert_close(getattr(p, field), getattr(q, field))
    for part in (0, 2):
        model.pair[part].requires_grad_(False)
    for quantity in (px.HessianTrace(), px.TopEigenvalues(), px.DiagHessian()):
        refused(model, r"pair\.0\.weight \[Linear\] .*second derivatives through DTensors", x, y, [quantity])
    refused(model, r"pair\.0\.weight .*might draw different targets for KFAC", x, y, [px.KFAC()])
    with pytest.raises(px.UnsupportedUseError, match="create_graph"), px.backpack(px.BatchGrad()):
        loss_of(model, x, y).backward(create_graph=True)
    returned = perceptron(nn.Linear(6, 6))
    parallelize_module(returned, mesh, {"3": ColwiseParallel(use_local_output=False)})
    refused(returned, "returned a DTensor", x, y, parameters=list(returned[0].parameters()))

    coupled = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8 // world), nn.Linear(8, 4))
    parallelize_module(coupled, mesh, pair)
    with pytest.raises(px.CoupledSamplesError, match="BatchNorm"), px.backpack(px.BatchGrad()):
        loss_of(px.extend(coupled), x, y).backward()
    mixed = px.extend(nn.Sequential(nn.Linear(6, 8), Mixes(on=0, rank=rank), nn.Linear(8, 4)))
    parallelize_module(mixed, mesh, pair)
    with pytest.raises(px.CoupledSamplesError, match="Samples influence each other"), px.backpack(px.BatchGrad()):
        loss_of(mixed, x, y).backward()

    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(perceptron(), mesh["tensor"], pair)
    united = {"group": mesh["data"].get_group(), "scale": "sample"}
    as_in_one_process(mesh["tensor"], px.extend(Block()), x, y, quantities=[px.Variance(), px.BatchL2Grad()], **united)
    parts = DistributedDataParallel(parallelize_module(Block(), mesh["tensor"], PAIR), device_mesh=mesh["data"])
    match = r"linear in module module\.pair\.0 .*module\.pair\.0\.weight is a DTensor \[6, 6\]"
    with pytest.raises(px.UnsupportedUseError, match=match), px.backpack(px.BatchGrad()):
        loss_of(px.extend(parts), x, y).backward()
    for part in (*model.children(), model):
        fully_shard(part, mesh=mesh["data"])
    with warnings.catch_warnings():  # torch's own of what a parallel layer returns to FSDP2
        warnings.simplefilter("ignore")
        options: dict[str, Any]
        for options, match in (
            ({}, r"0\.weight \[FSDPLinear\] .*placed \[Shard\(dim=0\)\].*FSDP2 shards the parts further. Shard"),
            ({"parameters": list(model.parameters())}, "parameters=... has DTensors, and FSDP2 .*by name"),
        ):
            with pytest.raises(px.UnsupportedUseError, match=match), px.backpack(px.BatchGrad(), **options):
                loss_of(px.extend(model), x, y).backward()
    assert all(p.grad is None for p in model.parameters())


class Local(nn.Module):
    """Of a DTensor what is here."""

    def forward(self, x: Any) -> Tensor:
        return x.to_local()


class Mixes(nn.Module):
    """Adds the mean over the batch, on one rank alone."""

    def __init__(self, on: int, rank: int) -> None:
        super().__init__()
        self.mixes = on == rank

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean(0) if self.mixes else x


# -- pipelines ---------------------------------------------------------------------------------------------------


def _pipeline(rank: int, world: int, gpipe: bool = True) -> None:
    """Each stage has the rows of its own parameters, its micro-batches being parts of the batch."""
    whole = px.extend(perceptron())
    x, y = torch.randn(N, 6), torch.randint(4, (N,))
    with px.backpack(px.BatchGrad(), px.Variance(), scale="sample") as wanted:
        loss_of(whole, x, y).backward()
    stage = px.extend(nn.Sequential(*list(whole)[2 * rank : 2 * rank + 2]))
    schedule: Any = (ScheduleGPipe if gpipe else Schedule1F1B)(
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


def test_passes_of_one_model_and_another_are_no_parts_of_one_batch() -> None:
    """As schedules make with several stages on a rank."""
    one, other, x, y = px.extend(perceptron()), px.extend(perceptron()), torch.randn(N, 6), torch.randint(4, (N,))
    with px.backpack(px.BatchGrad(), accumulate=True) as results:
        loss_of(one, x, y).backward()
        loss = loss_of(other, x, y)
        with pytest.raises(px.PackextError, match="goes through Sequential.*Open a context for each.*Schedule1F1B"):
            loss.backward()
        assert all(p.grad is None for p in other.parameters())
    assert [len(results[p].grad_batch) for p in one.parameters()] == [N] * 4
    with px.backpack(px.BatchGrad(), accumulate=True) as results:
        (loss_of(one, x, y) + loss_of(other, x, y)).backward()
        loss_of(other, x, y).backward()
        loss_of(one, x, y).backward()
    # samples that go through one of the two are zeros in the other
    for model, zeros in ((one, slice(N, 2 * N)), (other, slice(2 * N, 3 * N))):
        for p in model.parameters():
            rows = results[p].grad_batch
            assert len(rows) == 3 * N and rows[:N].any() and not rows[zeros].any()


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
        (nn.Linear(6, 3), (px.Variance(), px.KFAC(fisher="empirical"))[rank], r"Rank . of the group asks for .*KFAC"),
        (nn.Linear(6, 3), px.ClippedGrad(0.5 + rank), r"max_norm=.*max_norm="),
    ):
        with pytest.raises(px.PackextError, match=match):
            with px.backpack(quantity, scale=1.0, group=group):
                px.extend(model)(x.to(next(model.parameters()).dtype)).sum().backward()
        assert not hasattr(next(model.parameters()), quantity.savefield)


def _each(rank: int, world: int) -> None:
    for work in (
        _split_layers,
        _attention,
        _split_refused,
        _pipeline,
        functools.partial(_pipeline, gpipe=False),
        _differ,
    ):  # in one pair of processes, as these take a second to start
        torch.manual_seed(0)
        work(rank, world)


def test_ranks() -> None:
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
