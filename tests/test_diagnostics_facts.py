"""Instruments of inputs, outputs, samples and of model and optimizer themselves; numbers of the user's own."""

from __future__ import annotations

import copy
import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import packext as px
from packext.diagnostics import (
    CABS,
    ActivationScale,
    BatchSize,
    Cockpit,
    DeadUnits,
    GradNorm,
    IdleUnits,
    InitialScale,
    InputScale,
    LearningRate,
    Loss,
    NoiseScale,
    NormTest,
    OutputScale,
    ParamNorm,
    Run,
    SampleLosses,
    SampleNorms,
    Untrained,
)
from packext.diagnostics._observe import Hook, nothing
from tests.helpers import batch, mlp

pytestmark = pytest.mark.usefixtures("double")


def watch(model: nn.Module, *instruments: Any, optimizer: Any = None, **options: Any) -> Cockpit:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
    return Cockpit(px.extend(model), optimizer, None, instruments=instruments, **options)


def step(monitor: Cockpit, x: Tensor, y: Tensor, **options: Any) -> None:
    loss = px.extend(nn.CrossEntropyLoss())
    with monitor.step(**options):
        loss(monitor.model(x), y).backward()
        monitor.optimizer.step()
        monitor.optimizer.zero_grad()


def test_scale_of_inputs_and_outputs() -> None:
    monitor, (x, y) = watch(mlp(), InputScale(), OutputScale(), BatchSize()), batch(6)
    x = x * 3 + 1
    hooks = dict(monitor.model._forward_pre_hooks), dict(monitor.model._forward_hooks)
    with torch.no_grad():
        out = monitor.model(x)
    step(monitor, x, y)
    values = monitor.values
    assert np.isclose(values["InputScale"], x.square().mean() ** 0.5)
    assert np.isclose(values["InputScale.mean"], x.mean())
    assert np.isclose(values["InputScale.largest"], x.abs().max())
    assert values["InputScale.infinite"] == 0
    assert np.isclose(values["OutputScale"], out.square().mean() ** 0.5)
    spread = (out - out.mean(0)).square().mean() ** 0.5 / out.square().mean() ** 0.5
    assert np.isclose(values["OutputScale.spread"], spread)
    assert values["BatchSize"] == 6
    assert (dict(monitor.model._forward_pre_hooks), dict(monitor.model._forward_hooks)) == hooks
    bad = x.clone()
    bad[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    step(monitor, bad, y)
    assert monitor.values["InputScale.infinite"] == 3 / 30


class Keywords(nn.Module):
    """Takes tokens and features by keyword, and puts out several things."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 2)

    def forward(self, tokens: Tensor, *, features: Any = None) -> dict[str, Any]:
        h = self.table(tokens)
        return {"none": None, "logits": self.head(h if features is None else h + features[0])}


def test_inputs_of_all_kinds() -> None:
    monitor, loss = watch(Keywords(), InputScale(), OutputScale()), px.extend(nn.CrossEntropyLoss())
    tokens, features, y = torch.randint(7, (4,)), torch.randn(4, 3), torch.randint(2, (4,))
    with monitor.step():
        loss(monitor.model(tokens, features=[features])["logits"], y).backward()
    assert np.isclose(monitor.values["InputScale"], features.square().mean() ** 0.5)
    assert 0 < monitor.values["OutputScale.spread"]
    with monitor.step():
        loss(monitor.model(tokens)["logits"], y).backward()
    assert "no floating-point numbers" in monitor.absent["InputScale"]


class Masked(nn.Module):
    """Attends to what a mask allows, is told a time for each sample, and divides by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, time: Tensor, causal: Tensor, padding: Tensor, count: Tensor, grid: Tensor) -> Tensor:
        scores = x @ x.mT + causal + padding
        return self.head((scores.softmax(-1) @ x + grid + time[:, None] / 1000).mean(1) / count)


@pytest.mark.parametrize("never", [-math.inf, torch.finfo(torch.float32).min, -1e4])
def test_arguments_that_are_no_inputs(never: float) -> None:
    monitor, loss = watch(Masked(), InputScale()), px.extend(nn.CrossEntropyLoss())
    x = torch.randn(5, 3, 4)
    x[0, 0, :3] = 0
    causal = torch.full((3, 3), never).triu(1)
    padding = torch.where(torch.rand(5, 1, 3) < 0.3, never, 0.0)
    padding[0, 0, 2] = never
    args = x, torch.full((5, 1), 900.0), causal, padding, torch.tensor(96.0), torch.full((3, 4), 50.0)
    with monitor.step():
        loss(monitor.model(*args), torch.randint(2, (5,))).backward()
    wanted = {"": x.square().mean() ** 0.5, ".mean": x.mean(), ".largest": x.abs().max(), ".zeros": 3 / 60}
    assert all(np.isclose(monitor.values[f"InputScale{part}"], float(value)) for part, value in wanted.items())
    assert monitor.values["InputScale.infinite"] == 0


def test_numbers_in_a_row_of_their_own_count_where_there_is_nothing_else() -> None:
    monitor, x = watch(nn.Linear(1, 2), InputScale()), torch.full((4, 1), 900.0)
    step(monitor, x, torch.randint(2, (4,)))
    assert np.isclose(monitor.values["InputScale"], 900.0)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_inputs_that_are_sparse() -> None:
    found, (x, y) = [], batch(6)
    for layout in (torch.strided, torch.sparse_coo, torch.sparse_csr):
        torch.manual_seed(0)
        monitor = watch(mlp(), InputScale(), GradNorm(), NormTest())
        step(monitor, x.relu() if layout == torch.strided else x.relu().to_sparse(layout=layout), y)
        found.append(monitor.values)
    assert all(found[0] == pytest.approx(other) for other in found[1:]) and found[0]["InputScale.zeros"] > 0


@pytest.mark.parametrize("size, dtype", [(1e200, torch.double), (1e-200, torch.double), (1e30, torch.float32)])
def test_squares_that_overflow(size: float, dtype: torch.dtype) -> None:
    model = nn.Linear(5, 3, bias=False, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    monitor, x = (
        watch(model, InputScale(), OutputScale(), GradNorm(), BatchSize(), optimizer=optimizer),
        torch.randn(6, 5),
    )
    x = (x * size).to(dtype)
    with monitor.step(1.0) as seen:
        out = monitor.model(x)
        value = out.mean()
        seen.loss(value)
        value.backward()
    assert monitor.absent == {}
    grad = model.weight.grad
    assert grad is not None

    def length(t: Tensor) -> float:
        return math.hypot(*t.detach().double().flatten().tolist())

    wanted = {
        "InputScale": length(x) / 30**0.5,
        "OutputScale": length(out) / 18**0.5,
        "OutputScale.spread": length(out.double() / size - (out.double() / size).mean(0)) / length(out) * size,
        "GradNorm": length(grad) / 6,
        "GradNorm/weight": length(grad) / 6,
    }
    assert {k: monitor.values[k] / v for k, v in wanted.items()} == pytest.approx(dict.fromkeys(wanted, 1.0), rel=1e-5)
    assert monitor.values["InputScale.infinite"] == 0


class Parts(nn.Module):
    """Is not called itself; its parts are, one of which nobody calls by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.stages, self.head = nn.Dropout(0.0), nn.ModuleList([nn.Linear(5, 4)]), nn.Linear(4, 3)


def test_a_model_of_which_the_parts_are_called() -> None:
    monitor, (x, y) = watch(Parts(), InputScale(), OutputScale()), batch(6)
    model, loss = monitor.model, px.extend(nn.CrossEntropyLoss())
    with monitor.step():
        out = model.head(model.stages[0](model.drop(3 * x)).tanh())
        loss(out, y).backward()
    assert np.isclose(monitor.values["InputScale"], 3 * x.square().mean() ** 0.5)
    assert np.isclose(monitor.values["OutputScale"], float(out.detach().square().mean() ** 0.5))
    found = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any(isinstance(h, Hook) for h in found)
    with monitor.step():
        pass
    why = "neither forward of Parts nor one of its parts with parameters was called in this step"
    assert monitor.absent["InputScale"] == monitor.absent["OutputScale"] == why


def test_what_the_scale_of_the_output_cannot_be() -> None:
    monitor, (x, y) = watch(mlp(), OutputScale(), BatchSize()), batch(1)
    step(monitor, x, y)
    assert "OutputScale" in monitor.values and "one sample" in monitor.absent["OutputScale.spread"]
    model = nn.Sequential(nn.Linear(5, 3), nn.Flatten(0, 1))
    monitor = watch(model, OutputScale())
    with monitor.step(scale=4.0) as seen:
        each = monitor.model(torch.randn(4, 2, 5)).view(4, 2, 3).square().sum((1, 2))
        seen.losses(each)
        each.mean().backward()
    assert monitor.absent["OutputScale.spread"] == "the output has 8 rows for 4 samples"


def test_the_rate_of_a_step_in_which_the_schedule_moves_on() -> None:
    monitor, (x, y) = watch(mlp(), LearningRate(), CABS(), NoiseScale(), Loss()), batch(6)
    schedule = torch.optim.lr_scheduler.ExponentialLR(monitor.optimizer, 0.1)
    loss = px.extend(nn.CrossEntropyLoss())
    with monitor.step():
        loss(monitor.model(x), y).backward()
        monitor.optimizer.step()
        schedule.step()
    values = monitor.values
    assert values["LearningRate"] == 0.1 and np.isclose(values["LearningRate.edge"], 2 / 0.1)
    assert np.isclose(values["CABS"], 0.1 * values["NoiseScale.trace"] / values["Loss"])


def test_what_was_in_grad_before_the_step() -> None:
    monitor, (x, y) = watch(mlp(), GradNorm()), batch(6)
    loss = px.extend(nn.CrossEntropyLoss())
    for k in range(3):
        held = [p.grad.clone() for p in monitor.model.parameters() if p.grad is not None]
        with monitor.step():
            loss(monitor.model(x), y).backward()
            monitor.optimizer.step()
        norm = sum(float(g.square().sum()) for g in held) ** 0.5
        assert monitor.values.get("GradNorm.before") == (pytest.approx(norm) if k else None)


@pytest.mark.parametrize("scale", ["sample", "mean"])
@pytest.mark.parametrize("sizes, factor", [([6], 1.0), ([6], 0.5), ([6, 6], 0.5), ([6, 6], 1.0)])
def test_what_was_in_grad_is_in_units_of_the_gradient(scale: str, sizes: list[int], factor: float) -> None:
    monitor, x, y = watch(mlp(), GradNorm(), BatchSize()), *batch(12)
    parameters = list(monitor.model.parameters())
    loss = px.extend(nn.CrossEntropyLoss()) if scale == "sample" else F.cross_entropy
    for p in parameters:
        p.grad = torch.randn_like(p)
    held = [p.grad.clone() for p in parameters if p.grad is not None]
    with monitor.step(scale) as seen:
        for part, labels in zip(x.split(sizes[0])[: len(sizes)], y.split(sizes[0]), strict=False):
            value = factor * loss(monitor.model(part), labels)
            if scale == "mean":
                seen.loss(value)
            value.backward()
    added = [p.grad - g for p, g in zip(parameters, held, strict=True) if p.grad is not None]
    before, gradient = (torch.cat([g.flatten() for g in each]).norm().item() for each in (held, added))
    ratio = monitor.values["GradNorm.before"] / monitor.values["GradNorm"]
    assert ratio == pytest.approx(before / gradient, rel=1e-4)


def test_what_was_in_grad_of_a_step_that_takes_one_loss_from_another() -> None:
    monitor, (x, y), loss = watch(mlp(), GradNorm(), BatchSize()), batch(6), px.extend(nn.CrossEntropyLoss())
    monitor.model[0].bias.grad = torch.ones_like(monitor.model[0].bias)
    with monitor.step():
        loss(monitor.model(x), y).backward()
        (-loss(monitor.model(x), y)).backward()
    assert monitor.values["GradNorm.before"] == pytest.approx(len(monitor.model[0].bias) ** 0.5 / 2)


def test_parameters_norm_and_learning_rate() -> None:
    model, (x, y) = mlp(), batch()
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters()}]
    norms = {name: p.norm().item() for name, p in model.named_parameters()}
    monitor = watch(model, ParamNorm(), LearningRate(), optimizer=torch.optim.SGD(groups, 0.1, momentum=0.5))
    step(monitor, x, y)
    assert np.isclose(monitor.values["ParamNorm"], sum(v**2 for v in norms.values()) ** 0.5)
    assert all(np.isclose(monitor.values[f"ParamNorm/{k}"], v) for k, v in norms.items())
    assert monitor.values["LearningRate"] == 0.2 and "LearningRate.edge" not in monitor.values
    kinds = ({"momentum": 0.5}, 3 / 0.1), ({}, 2 / 0.1), ({"momentum": 0.5, "nesterov": True}, None)
    for options, edge in (*kinds, ({"maximize": True}, None)):
        monitor = watch(mlp(), LearningRate(), optimizer=None)
        monitor.optimizer = torch.optim.SGD(monitor.model.parameters(), 0.1, **options)
        step(monitor, x, y)
        assert monitor.values.get("LearningRate.edge") == (None if edge is None else pytest.approx(edge))


@pytest.mark.parametrize("reduction, factors, known", [
    ("mean", [1.0], True), ("mean", [0.5, 0.5], True), ("mean", [0.25], False), ("mean", [1.0, 1.0], False),
    ("mean", [0.2, 0.8], False), ("sum", [1.0], False), ("sum", [1 / 6], True), ("mean", [-1.0], False),
])  # fmt: skip
def test_the_edge_is_that_of_the_curvature_beside_it(reduction: str, factors: list[float], known: bool) -> None:
    monitor, (x, y) = watch(mlp(), LearningRate(), BatchSize()), batch(6)
    loss = px.extend(nn.CrossEntropyLoss(reduction=reduction))
    with monitor.step():
        for factor in factors:
            (factor * loss(monitor.model(x), y)).backward()
        monitor.optimizer.step()
    assert monitor.values["LearningRate"] == 0.1  # the Hessian of the mean loss is not what these steps see, else
    assert monitor.values.get("LearningRate.edge") == (pytest.approx(2 / 0.1) if known else None)


def test_losses_of_the_samples_by_index() -> None:
    monitor, (x, y) = watch(mlp(), SampleLosses(3), SampleNorms(3), Loss()), batch(8)
    each = F.cross_entropy(monitor.model(x), y, reduction="none").detach()
    index = torch.randperm(100)[:8]
    step(monitor, x, y, samples=index)
    order = each.argsort(descending=True)[:3]
    values = monitor.values
    assert np.allclose(values["SampleLosses.largest"], each[order])
    assert values["SampleLosses.hardest"].tolist() == index[order].tolist()
    assert np.isclose(values["SampleLosses"], each.median())
    assert np.allclose(values["SampleLosses.quantiles"], np.quantile(each, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]))
    named = values["SampleNorms.hardest"].tolist()
    assert set(named) <= set(index.tolist())
    with monitor.step():  # the same batch, not named: positions, and no losses by index
        px.extend(nn.CrossEntropyLoss())(monitor.model(x), y).backward()
    assert "SampleLosses.hardest" not in monitor.values and max(monitor.values["SampleNorms.hardest"]) < 8


def test_all_samples_of_a_usual_batch_are_named() -> None:
    monitor, (x, y) = watch(mlp(), SampleLosses()), batch(64)
    step(monitor, x, y, samples=torch.arange(64))
    assert sorted(monitor.values["SampleLosses.hardest"].tolist()) == [*range(64)]


def test_samples_of_several_passes() -> None:
    monitor, (x, y) = watch(mlp(), SampleLosses(8)), batch(8)
    each = F.cross_entropy(monitor.model(x), y, reduction="none").detach()
    loss = px.extend(nn.CrossEntropyLoss())
    with monitor.step(samples=range(10, 18)):
        for part in (slice(0, 3), slice(3, 8)):
            (loss(monitor.model(x[part]), y[part]) * (len(x[part]) / 8)).backward()
        monitor.optimizer.step()
    assert monitor.values["SampleLosses.hardest"].tolist() == (each.argsort(descending=True) + 10).tolist()


@pytest.mark.parametrize("samples", [torch.randn(4), [[1, 2], [3, 4]], [True, False, True, False]])
def test_samples_that_are_no_indices(samples: Any) -> None:
    with pytest.raises(ValueError, match="samples must be integers"):
        watch(mlp()).step(samples=samples)


def test_as_many_indices_as_samples() -> None:
    monitor, (x, y) = watch(mlp(), SampleNorms()), batch(4)
    with pytest.raises(px.PackextError, match="3 indices for a step of 4 samples"):
        step(monitor, x, y, samples=[1, 2, 3])


def test_numbers_of_the_users_own(tmp_path: Path) -> None:
    monitor, (x, y) = watch(mlp(), Loss(), every=2, sinks=[Run(tmp_path)]), batch()
    with pytest.raises(ValueError, match="none yet"):
        monitor.log(valid_loss=1.0)
    for k in range(3):
        step(monitor, x, y)
        monitor.log(valid_loss=torch.tensor(1.0 + k), accuracy=k)
    run = Run.open(tmp_path)
    assert run.steps == [0, 1, 2]
    assert run.column("valid_loss").tolist() == [1, 2, 3] and run.column("accuracy").tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="Loss is the name of an instrument"):
        monitor.log(Loss=1.0)
    with pytest.raises(ValueError, match=r"valid_loss has shape \[2\]"):
        monitor.log(valid_loss=torch.ones(2))
    for bad in (None, "1.5", "high", {}, 1j, torch.tensor(1j)):
        with pytest.raises(ValueError, match="log.. takes numbers, and accuracy is "):
            monitor.log(valid_loss=1.0, accuracy=bad)
    with pytest.raises(ValueError, match="Loss.smooth is the name of an instrument"):
        monitor.log(**{"Loss.smooth": 1.0})
    with pytest.raises(ValueError, match="val/loss: a slash is between .* such as val_loss"):
        monitor.log(**{"val/loss": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.log(own=torch.tensor(1.0, requires_grad=True))


def test_what_is_not_trained() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)), batch()
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    groups = [{"params": [model[1].weight]}, {"params": [model[3].weight], "lr": 0.0}]
    optimizer = torch.optim.SGD(groups, 0.1)
    monitor = watch(model, Untrained(), optimizer=optimizer)
    step(monitor, x, y)
    found = {k: v for k, v in monitor.values.items() if "/" in k}
    assert found == {
        "Untrained/0.weight": 1, "Untrained/0.bias": 1, "Untrained/1.bias": 3, "Untrained/2.weight": 2,
        "Untrained/2.bias": 2, "Untrained/3.weight": 4, "Untrained/3.bias": 3,
    }  # fmt: skip
    assert monitor.values["Untrained"] == 7
    assert np.isclose(monitor.values["Untrained.share"], 1 - 25 / sum(p.numel() for p in model.parameters()))


class Places(nn.Module):
    """Has positions, learned and fixed ones, beside layers, a table that stays, and a sparse matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table, self.head = nn.Linear(5, 4), nn.Embedding(7, 4), nn.Linear(4, 3)
        self.learned, self.fixed = nn.Parameter(torch.rand(2, 4)), nn.Parameter(torch.rand(2, 4), requires_grad=False)
        self.table.requires_grad_(False)
        self.edges = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        places = self.learned.sum(0) + self.fixed.sum(0) + self.table.weight.sum(0)
        return self.head(self.first(x) + places) @ self.edges


class Short(nn.Module):
    """Keeps a second weight in a type of a byte, which stays or moves."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 3), nn.Module()
        self.second.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.uint8).view(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2])
def test_parameters_of_a_byte_stay_or_move(dtype: torch.dtype) -> None:
    model, (x, y) = Short(dtype), batch()
    monitor = watch(model, Untrained())
    for _ in range(2):
        step(monitor, x, y)
    assert monitor.values["Untrained/second.weight"] == 2
    model.second.weight.data.view(torch.uint8)[1, 1] = 3
    step(monitor, x, y)
    assert "Untrained/second.weight" not in monitor.values


def test_positions_are_no_layer() -> None:
    monitor, (x, y) = watch(Places(), Untrained(), InitialScale()), batch()
    step(monitor, x, y)
    assert all(monitor.values[f"Untrained/{name}"] == 1 for name in ("fixed", "table.weight", "edges"))
    assert {k for k in monitor.values if k.startswith("InitialScale/")} == {
        "InitialScale/first.weight",
        "InitialScale/head.weight",
    }
    assert np.isclose(monitor.values["InitialScale.usual"], (7 / 3) ** 0.5)


def test_parameters_of_another_optimizer_and_without_gradient() -> None:
    model, (x, y) = mlp(), batch()
    other = torch.optim.SGD(model[2].parameters(), 0.1)
    monitor = watch(model, Untrained(), optimizer=torch.optim.SGD(model[0].parameters(), 0.1))
    with monitor.step():
        px.extend(nn.CrossEntropyLoss())(monitor.model(x), y).backward()
        monitor.optimizer.step()
        other.step()
    assert monitor.values == {"Untrained": 0, "Untrained.share": 0}
    model[0].register_forward_hook(lambda module, args, output: output.detach())
    monitor = watch(model, Untrained())
    monitor.optimizer.zero_grad()
    step(monitor, x, y)
    assert {k for k, v in monitor.values.items() if v == 5} == {"Untrained/0.weight", "Untrained/0.bias"}


def test_what_modules_see_is_of_the_first_evaluation_of_a_closure() -> None:
    """LBFGS goes on at other parameters, where the step is not."""
    model, (x, y), loss = mlp(), batch(6), px.extend(nn.CrossEntropyLoss())
    with torch.no_grad():
        output, hidden = model(x), model[0](x)
    asked = [InputScale(), OutputScale(), ActivationScale()]
    px.extend(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    monitor = Cockpit(model, optimizer, None, instruments=asked)
    calls = []

    def closure() -> Tensor:
        calls.append(None)
        optimizer.zero_grad()
        value = loss(model(x * len(calls)), y)
        value.backward()
        return value

    with monitor.step():
        optimizer.step(closure)
    assert len(calls) > 1
    assert np.isclose(monitor.values["InputScale"], float(x.square().mean().sqrt()))
    assert np.isclose(monitor.values["OutputScale"], float(output.square().mean().sqrt()))
    assert np.isclose(monitor.values["ActivationScale/0"], float(hidden.square().mean().sqrt()))
    assert "OutputScale.spread" in monitor.values


class Counting(nn.Module):
    """Counts how often its parameters are looked up, and how often a mode is asked for what they are."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(5, 5), nn.ReLU())))
        self.looks = 0

    def parameters(self, recurse: bool = True) -> Any:
        self.looks += 1
        return super().parameters(recurse)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Reads(TorchFunctionMode):
    """Counts reads of a tensor's version."""

    seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += func == Tensor._version.__get__  # pyright: ignore[reportAttributeAccessIssue]
        return func(*args, **(kwargs or {}))


def test_hooks_of_modules_do_not_go_through_the_model_at_each_call() -> None:
    """Of d layers that would be 2 d times 2 d parameters, each by way of the modes that run."""
    looks = []
    for depth in (2, 12):
        monitor, (x, y) = watch(Counting(depth), DeadUnits(), ActivationScale(), OutputScale(), InputScale()), batch(4)
        model: Any = monitor.model
        model.looks = 0
        with Reads() as reads:
            step(monitor, x, y)
        looks.append((model.looks, reads.seen))
        assert "ActivationScale/net.0" in monitor.values and "DeadUnits" in monitor.values
    assert looks[0][0] == looks[1][0] and looks[1][1] <= 6 * looks[0][1], looks


def test_a_norm_over_several_axes_is_no_matrix() -> None:
    """Its scale is 1 throughout, as it should be, and would be the largest of all matrices, with rows alike."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), nn.LayerNorm([2, 3]), nn.RMSNorm([2, 3]))
    model.extend([nn.Flatten(), nn.Linear(6, 3)])
    monitor, (x, y) = watch(model, InitialScale()), batch()
    step(monitor, x, y)
    assert monitor.values.keys() == {
        "InitialScale.alike", "InitialScale.usual", "InitialScale/0.weight", "InitialScale/5.weight",
    }  # fmt: skip
    assert monitor.values["InitialScale.alike"] == 0 and monitor.values["InitialScale.usual"] == pytest.approx(3**0.5)


def test_how_weights_started() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    nn.init.normal_(model[2].weight, std=2.0)
    nn.init.constant_(model[3].weight, 0.5)
    nn.init.zeros_(model[4].weight)
    want = {
        "InitialScale.alike": 1.0,
        "InitialScale.usual": 5**0.5,
        "InitialScale/3.weight": 0.5 * 6**0.5,
        "InitialScale/4.weight": 0.0,
    }
    want["InitialScale/2.weight"] = float(model[2].weight.detach().norm()) / 48**0.5 * 8**0.5
    monitor, y = watch(model, InitialScale(), Loss()), torch.randint(3, (4,))
    with monitor.step():  # in which nothing happens
        pass
    step(monitor, torch.randint(9, (4, 2)), y)
    assert {k: v for k, v in monitor.values.items() if "Initial" in k} == pytest.approx(want)
    step(monitor, torch.randint(9, (4, 2)), y)
    assert monitor.values.keys() == {"Loss"}


def test_a_continued_run_has_no_start(tmp_path: Path) -> None:
    (x, y) = batch()
    for want in (True, False):
        monitor = watch(mlp(), InitialScale(), Loss(), sinks=[Run(tmp_path)])
        step(monitor, x, y)
        assert ("InitialScale/0.weight" in monitor.values) is want


def test_units_without_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].bias[:3] = torch.tensor([-100.0, -100.0, 100.0])
    monitor, (x, y) = watch(model, IdleUnits(3), optimizer=torch.optim.SGD(model.parameters(), 0.0)), batch(8)
    for k in range(6):
        if k == 4:
            with torch.no_grad():
                model[0].bias[0] = 100.0
        step(monitor, x, y)
        assert monitor.values.get("IdleUnits/0.bias") == (None if k < 2 else 0.5 if k < 4 else 0.25)
        assert monitor.values.get("IdleUnits/2.bias") == (None if k < 2 else 0)


def test_units_are_those_of_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.back = nn.Conv1d(1, 4, 3), nn.ConvTranspose1d(4, 2, 3)
            self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, 3)
            self.scale, self.shift = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.back(self.conv(x[:, None])).flatten(1))) * self.scale + self.shift

    monitor, (x, y) = watch(Net(), IdleUnits(1)), batch()
    step(monitor, x, y)
    layers = {"conv.bias", "back.bias", "norm.weight", "norm.bias", "head.bias"}
    assert monitor.values.keys() == {f"IdleUnits/{name}" for name in layers}


class Held(nn.Module):
    """Holds its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_copies_made_in_a_step_have_no_hooks_that_listen() -> None:
    asked = InputScale(), OutputScale(), DeadUnits(), ActivationScale(), SampleLosses()
    monitor, (x, y), file = watch(Held(), *asked), batch(6), io.BytesIO()
    with monitor.step():
        loss = monitor.model.loss(monitor.model(x), y)
        torch.save(monitor.model, file)
        file.seek(0)
        copies = copy.deepcopy(monitor.model), torch.load(file, weights_only=False)
        with px.disable():
            for other in copies:
                assert torch.equal(other(100 * x), monitor.model(100 * x))
        loss.backward()
    assert monitor.values["ActivationScale/net.0"] > 0
    for other in copies:
        listening = [h for m in other.modules() for h in m._forward_hooks.values() if isinstance(h, Hook)]
        assert listening and {h.run for h in listening} == {nothing}


@pytest.mark.parametrize("make", [lambda: IdleUnits(0), lambda: SampleLosses(0)])
def test_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="must be an int of 1 or more"):
        make()
