"""The monitor: it sees what happens in a step, changes nothing, and says why something is missing."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import threading
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import packext as px
from packext import testing
from packext.diagnostics import (
    CABS,
    RULES,
    Absent,
    Alpha,
    BatchSize,
    Cockpit,
    DeadUnits,
    Distance,
    EffectiveRank,
    GradHist1d,
    GradNorm,
    GradSNR,
    HessMaxEV,
    HessTrace,
    IdleUnits,
    InnerTest,
    InputScale,
    Instrument,
    LearningRate,
    Loss,
    NoiseScale,
    NormTest,
    OutputScale,
    SampleLosses,
    SampleNorms,
    Step,
    TICDiag,
    TICTrace,
    Time,
    Untrained,
    UpdateSize,
    linear,
    logarithmic,
)
from packext.diagnostics._step import DrawnGrad, SlopeDot
from packext.diagnostics._tensors import BLOCK, CHUNK, inner, largest, total
from tests.helpers import batch, left_behind, mlp

pytestmark = pytest.mark.usefixtures("double")

LR = 0.1


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.LayerNorm(54), nn.Linear(54, 4)
    ).float()


def images(n: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 5, 5, dtype=torch.float32), torch.randint(4, (n,))


def pair(*instruments: Any, **options: Any) -> Any:
    """A monitor of a small model, and the loss."""
    model = px.extend(mlp())
    optimizer = torch.optim.SGD(model.parameters(), LR)
    return Cockpit(model, optimizer, None, instruments=instruments, **options), px.extend(nn.CrossEntropyLoss())


def train(monitor: Any, loss: nn.Module, x: Tensor, y: Tensor) -> None:
    with monitor.step():
        loss(monitor.model(x), y).backward()
        monitor.optimizer.step()
        monitor.optimizer.zero_grad()


def traces(model: nn.Module) -> Any:
    """All that a monitor might leave behind."""
    return (
        [dict(p.__dict__) for p in model.parameters()],
        [p._backward_hooks for p in model.parameters()],
        [
            [dict(hooks) for name, hooks in m.__dict__.items() if name.startswith("_forward_") and "hooks" in name]
            for m in model.modules()
        ],
        [dict(m.__dict__) for m in model.modules()],
        dict(torch.nn.modules.module._global_forward_pre_hooks),
        dict(torch.nn.modules.module._global_forward_hooks),
    )


# -- nothing is changed -----------------------------------------------------------------------------


@pytest.mark.parametrize("level", [None, "economy", "business", "full"])
def test_training_is_the_same_to_the_last_bit(level: str | None) -> None:
    def run(watched: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        torch.manual_seed(3)
        model, loss = net(), nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        monitor = Cockpit(px.extend(model), optimizer, level, every=1) if watched else None
        if watched:
            px.extend(loss)
        for _ in range(50):
            x, y = images()
            with nullcontext() if monitor is None else monitor.step():
                optimizer.zero_grad()
                loss(model(x), y).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        return [p.detach() for p in model.parameters()], torch.get_rng_state(), grads

    (theta, state, grads), (want, drawn, plain) = run(True), run(False)
    assert all(torch.equal(p, q) for p, q in zip(theta, want, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(grads, plain, strict=True))
    assert torch.equal(state, drawn)


@pytest.mark.parametrize("level", ["economy", "business", "full"])
def test_a_step_leaves_nothing_to_the_garbage_collector(level: str) -> None:
    """Copies of the parameters would stay in memory for many steps."""
    model = px.extend(mlp())
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), 0.1), level=level)
    loss_fn, (x, y) = px.extend(nn.CrossEntropyLoss()), batch()

    def step() -> None:
        train(monitor, loss_fn, x, y)

    step()
    assert not left_behind(step)


@pytest.mark.parametrize("fails", [None, "forward", "backward", "after"])
def test_a_step_leaves_nothing_behind(fails: str | None) -> None:
    model, loss = px.extend(net()), px.extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), LR)
    monitor = Cockpit(model, optimizer, "full", instruments=[DeadUnits()])
    x, y = images()
    train(monitor, loss, x, y)
    train(monitor, loss, x, y)
    before, about = traces(model), traces(loss)

    def boom(*_: Any) -> None:
        raise ZeroDivisionError

    try:
        with monitor.step():
            if fails == "forward":
                model(x, 1)
            output = model(x)
            if fails == "backward":
                output.register_hook(boom)
            loss(output, y).backward()
            if fails == "after":
                boom()
            optimizer.step()
            optimizer.zero_grad()
    except (ZeroDivisionError, TypeError):
        assert fails is not None
    else:
        assert fails is None
    assert traces(model) == before and traces(loss) == about
    with px.backpack(px.BatchL2Grad()) as results:
        loss(model(x), y).backward()
    assert "0.weight" in results
    optimizer.zero_grad()
    for p in model.parameters():
        del p.batch_l2
    train(monitor, loss, x, y)
    assert monitor.steps == 4 and "Loss" in monitor.values


def test_attributes_of_an_earlier_context_stay() -> None:
    monitor, loss = pair(NormTest())
    x, y = batch()
    with px.backpack(px.BatchL2Grad()):
        loss(monitor.model(x), y).backward()
    held = monitor.model[0].weight.batch_l2
    train(monitor, loss, x, y)
    assert monitor.model[0].weight.batch_l2 is held


def test_a_part_of_packext_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'diagnostic'"):
        px.diagnostic  # noqa: B018


# -- schedules --------------------------------------------------------------------------------------


def test_schedules() -> None:
    assert [s for s in range(10) if linear(3)(s)] == [0, 3, 6, 9]
    assert [s for s in range(10) if linear(4, 1)(s)] == [1, 5, 9]
    assert [s for s in range(1001) if logarithmic(2)(s)] == [0, 1, 3, 10, 32, 100, 316, 1000]
    assert [s for s in range(12) if logarithmic(20)(s)] == list(range(12))
    for wrong in (lambda: linear(0), lambda: logarithmic(0), lambda: logarithmic(1, 0)):
        with pytest.raises(ValueError, match="1 or more"):
            wrong()


def test_only_scheduled_steps_are_looked_at() -> None:
    monitor, loss = pair(Loss(), every=lambda step: step in (1, 4))
    x, y = batch()
    seen = []
    for _ in range(6):
        monitor.values = {}
        train(monitor, loss, x, y)
        seen.append("Loss" in monitor.values)
    assert seen == [False, True, False, False, True, False]


def test_alpha_looks_at_the_step_after() -> None:
    monitor, loss = pair(Alpha(), every=3)
    every, _ = pair(Alpha())
    every.model.load_state_dict(monitor.model.state_dict())
    x, y = batch()
    wrote: dict[int, float] = {}
    monitor.sinks = [Keep(wrote)]
    every.sinks = [Keep(want := {})]
    for _ in range(7):
        train(monitor, loss, x, y)
        train(every, loss, x, y)
    assert wrote.keys() == {0, 3} and all(wrote[k] == pytest.approx(want[k]) for k in wrote)


def test_values_are_all_those_of_the_last_look() -> None:
    """Whether its next step has come or not."""
    monitor, loss = pair(Alpha(), Loss(), GradNorm(), every=3)
    looked: list[set[str]] = []
    for _ in range(5):
        train(monitor, loss, *batch())
        looked.append({name.partition("/")[0] for name in monitor.values} | monitor.absent.keys())
    assert looked == [{"Loss", "GradNorm"}, *[{"Alpha", "Loss", "GradNorm"}] * 2, {"Loss", "GradNorm"}, looked[1]]


class Keep:
    def __init__(self, into: dict[int, Any], name: str = "Alpha") -> None:
        self.into, self.name = into, name

    def begin(self, names: list[str]) -> int:
        return 0

    def write(self, step: int, values: Any, absent: Any) -> None:
        if self.name in values or self.name in absent:
            self.into[step] = values.get(self.name, absent.get(self.name))

    def say(self, verdict: Any) -> None:
        pass


# -- accumulation, closures, scalers, several models --------------------------------------------------


@pytest.mark.parametrize("parts", [[4, 4], [5, 3]])
@pytest.mark.parametrize("zero", [False, True])
def test_accumulated_passes_count_as_one_batch(parts: list[int], zero: bool) -> None:
    asked = (Loss(), GradNorm(), NormTest(), NoiseScale(), GradSNR(), SampleNorms(), Alpha(), UpdateSize())
    x, y = batch(8)
    whole, loss = pair(*asked)
    model = px.extend(copy.deepcopy(whole.model))
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), None, instruments=copy.deepcopy(asked))
    monitor.instruments.append(InnerTest())
    for _ in range(2):
        train(whole, loss, x, y)
        with monitor.step() as step:
            if zero:
                monitor.optimizer.zero_grad(set_to_none=False)
            for a, b in zip(x.split(parts), y.split(parts), strict=True):
                (loss(model(a), b) * len(a) / 8).backward()
            held = [part for p in step._observer.step.passes for part in p.results if part.get("grad_dot")]
            assert not held, "of no more use"
            monitor.optimizer.step()
            if not zero:
                monitor.optimizer.zero_grad()
    assert monitor.values.keys() == whole.values.keys()
    for name, value in whole.values.items():
        assert monitor.values[name] == pytest.approx(value, rel=1e-6), name
    assert "within one backward pass; this step had 2" in monitor.absent["InnerTest"]


def test_a_gradient_from_before_the_step_is_not_counted() -> None:
    monitor, loss = pair(GradNorm())
    x, y = batch()
    rows = testing.individual_gradients(monitor.model, loss, x, y)
    monitor.optimizer.zero_grad()
    loss(monitor.model(x), y).backward()
    train(monitor, loss, x, y)
    want = torch.cat([r.mean(0).flatten() for r in rows.values()]).norm()
    assert monitor.values["GradNorm"] == pytest.approx(float(want))


def test_closures_of_lbfgs() -> None:
    monitor, loss = pair(Loss(), GradNorm(), NormTest(), Alpha(), UpdateSize(), Distance())
    monitor.optimizer = torch.optim.LBFGS(monitor.model.parameters(), max_iter=4)
    x, y = batch()
    calls = []

    def closure() -> Tensor:
        monitor.optimizer.zero_grad()
        value = loss(monitor.model(x), y)
        value.backward()
        calls.append(float(value.detach()))
        return value

    for _ in range(2):
        start = [p.detach().clone() for p in monitor.model.parameters()]
        first = len(calls)
        with monitor.step():
            monitor.optimizer.step(closure)
        moved = torch.cat([(p - q).flatten() for p, q in zip(monitor.model.parameters(), start, strict=True)])
        assert monitor.values["Loss"] == pytest.approx(calls[first]) and len(calls) - first > 2
        assert monitor.values["UpdateSize"] == pytest.approx(float(moved.detach().norm()))
        assert "NormTest" in monitor.values
    assert "Alpha" in monitor.values or "concave" in monitor.absent["Alpha"]


def test_a_loss_scale_is_divided_out() -> None:
    """A power of two changes no digit of what autocast rounds: all values are those of a run without it."""

    def run(scale: float) -> list[tuple[dict[str, Any], dict[str, str]]]:
        torch.manual_seed(5)
        model, loss = px.extend(net()), px.extend(nn.CrossEntropyLoss())
        optimizer = torch.optim.SGD(model.parameters(), LR)
        asked = [Loss(), GradNorm(), NoiseScale(), SampleNorms(), HessTrace("ggn"), GradHist1d(), Alpha()]
        monitor = Cockpit(model, optimizer, None, instruments=asked)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
        x, y = images()
        seen = []
        for _ in range(2):
            with monitor.step():
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    value = loss(model(x), y)
                scaler.scale(value).backward()
                scaler.step(optimizer)
                scaler.update()
            assert monitor.values["Loss"] == pytest.approx(float(value.detach()), rel=1e-5)
            seen.append((monitor.values, monitor.absent))
        return seen

    for (values, absent), (want, missing) in zip(run(2.0**14), run(1.0), strict=True):
        assert absent.keys() == missing.keys() and values.keys() == want.keys()
        for name in want:
            assert values[name] == pytest.approx(want[name], rel=1e-3, abs=1e-6), name


def test_a_step_that_the_scaler_skips() -> None:
    monitor, loss = pair(UpdateSize(), Alpha(), GradNorm())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    x, y = batch()
    x[0, 0] = torch.inf
    with monitor.step():
        scaler.scale(loss(monitor.model(x), y)).backward()
        scaler.step(monitor.optimizer)
        scaler.update()
    assert "no update" in monitor.absent["UpdateSize"] and "no update" in monitor.absent["Alpha"]


@pytest.mark.parametrize("nested", [False, True])
def test_two_models_under_two_monitors(nested: bool) -> None:
    """A generator and a discriminator, with the same names of parameters."""
    torch.manual_seed(0)
    g, d = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(4, 1))
    plain_g, plain_d = copy.deepcopy(g), copy.deepcopy(d)
    px.extend(g), px.extend(d)
    loss = px.extend(nn.BCEWithLogitsLoss())
    optimizers = [torch.optim.SGD(m.parameters(), LR) for m in (g, d)]
    asked = [Loss(), GradNorm(), NormTest(), InnerTest(), SampleNorms(), Alpha(), GradHist1d()]
    monitors = [Cockpit(m, o, None, instruments=copy.deepcopy(asked)) for m, o in zip((g, d), optimizers, strict=True)]
    z, x, one, zero = torch.randn(6, 3), torch.randn(6, 4), torch.ones(6, 1), torch.zeros(6, 1)

    def train_d() -> None:
        optimizers[1].zero_grad()
        (loss(d(x), one) + loss(d(g(z).detach()), zero)).backward()
        optimizers[1].step()

    def train_g() -> None:
        optimizers[0].zero_grad()
        loss(d(g(z)), one).backward()
        optimizers[0].step()

    for _ in range(2):
        before = copy.deepcopy((g.state_dict(), d.state_dict()))
        if nested:
            with monitors[0].step(), monitors[1].step():
                train_d()
                train_g()
        else:
            with monitors[1].step():
                train_d()
            with monitors[0].step():
                train_g()
        assert not any(hasattr(p, "batch_l2") for m in (g, d) for p in m.parameters())
    # The second step's discriminator, by hand.
    plain_g.load_state_dict(before[0])
    plain_d.load_state_dict(before[1])
    rows = []
    for k in range(6):
        plain_d.zero_grad()
        with torch.no_grad():
            fake = plain_g(z[k : k + 1])
        value = F.binary_cross_entropy_with_logits(plain_d(x[k : k + 1]), one[:1])
        value = value + F.binary_cross_entropy_with_logits(plain_d(fake), zero[:1])
        value.backward()
        rows.append(torch.cat([p.grad.flatten() for p in plain_d.parameters() if p.grad is not None]))
    matrix = torch.stack(rows)
    norms = matrix.norm(dim=1).sort(descending=True).values
    assert monitors[1].values["GradNorm"] == pytest.approx(float(matrix.mean(0).norm()))
    assert monitors[1].values["SampleNorms.largest"] == pytest.approx(norms.numpy())
    assert "NormTest" in monitors[0].values and "Alpha" in {**monitors[0].values, **monitors[0].absent}
    assert monitors[0].values["GradNorm"] != pytest.approx(monitors[1].values["GradNorm"])


def pruned(model: nn.Sequential) -> None:
    prune.l1_unstructured(model[2], "weight", 0.4)


def deepened(model: nn.Sequential) -> None:
    model.insert(2, nn.Linear(6, 6))
    px.extend(model)


def other_head(model: nn.Sequential) -> None:
    model[2] = nn.Linear(6, 3)
    px.extend(model)


@pytest.mark.parametrize("operate", [pruned, deepened, other_head])
def test_parameters_that_others_replace_during_the_training(operate: Any) -> None:
    """What is kept of a parameter is not that of another one which has got its name."""
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), px.extend(nn.CrossEntropyLoss())
    with torch.no_grad():
        model[0].bias.fill_(10.0)[:2] = -100.0  # two units are never on, the others always
    monitor = Cockpit(px.extend(model), torch.optim.SGD(model.parameters(), LR), "full", instruments=[])
    kept = next(i for i in monitor.instruments if isinstance(i, IdleUnits))
    kept.steps = 3
    for step in range(9):
        if step == 4:
            operate(model)
            monitor.optimizer = torch.optim.SGD(model.parameters(), LR)
        train(monitor, loss, *batch())
        assert ("Distance" in monitor.values) == (step < 4)
        assert monitor.values.get("IdleUnits/0.bias", 0.0) == (0.0 if step < 2 else pytest.approx(1 / 3))
        if operate is not pruned:  # two steps before there is a value
            assert ("IdleUnits/2.bias" in monitor.values) == (step in (2, 3) or step >= 6)
        if step == 4:
            assert "the parameters changed" in monitor.absent["Alpha"]
        elif step:
            assert "the parameters changed" not in monitor.absent.get("Alpha", "")


# -- where a statistic is undefined --------------------------------------------------------------------


def test_batch_norm_in_training_mode() -> None:
    model = px.extend(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    loss = px.extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), LR)
    monitor = Cockpit(model, optimizer, "full", instruments=[Trace("hessian")])
    x, y = batch(8)
    train(monitor, loss, x, y)
    for name in ("NormTest", "NoiseScale", "Alpha", "GradHist1d", "TICDiag"):
        assert "statistics of the batch in 1: samples influence" in monitor.absent[name]
    for name in ("Loss", "GradNorm", "UpdateSize", "HessMaxEV", "Trace"):
        assert name in monitor.values, (name, monitor.absent)
    model.eval()
    train(monitor, loss, x, y)
    assert "NormTest" in monitor.values


class Trace(HessTrace):
    """Beside that of the level."""


def test_nothing_happens_in_a_step() -> None:
    monitor, loss = pair(Loss(), NormTest(), UpdateSize(), Time())
    x, y = batch()
    with monitor.step():
        pass
    why = "no backward pass through an extended loss has added to `.grad` in this step"
    assert set(monitor.absent.values()) == {why}
    with monitor.step():
        loss(monitor.model(x), y).backward()
    assert "no update" in monitor.absent["UpdateSize"] and monitor.values["Time"] > monitor.values["Time.step"] > 0


def test_a_value_that_is_absent_says_why_when_it_is_asked_for() -> None:
    monitor, loss = pair(NoiseScale(), Loss())
    train(monitor, loss, *batch(1))
    values, why = monitor.values, monitor.absent["NoiseScale"]
    assert "one sample" in why
    for name in ("NoiseScale", "NoiseScale/0.weight", "NoiseScale.critical_batch"):
        with pytest.raises(KeyError) as error:
            values[name]
        assert error.value.args == (f"{name}: {why}",)
    with pytest.raises(KeyError, match="GradNorm: the last step that was looked at has Loss"):
        values["GradNorm"]
    with pytest.raises(KeyError):
        values[0]
    assert "NoiseScale" not in values and values.get("NoiseScale") is None
    want = {"Loss": values["Loss"]}
    file = io.BytesIO()
    torch.save(values, file)
    file.seek(0)
    twins = copy.copy(values), copy.deepcopy(values), pickle.loads(pickle.dumps(values)), torch.load(file)
    assert all(twin == want for twin in (*twins, {**values}, json.loads(json.dumps(values))))


def test_a_pass_to_the_inputs_is_none_of_the_step() -> None:
    """As of adversarial training, before the pass to the parameters; with `.grad` kept from before, and without."""
    for keep in (False, True):
        asked = [Loss(), GradNorm(), NormTest(), InnerTest(), BatchSize()]
        plain, loss = pair(*asked)
        model = px.extend(copy.deepcopy(plain.model))
        monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), None, instruments=copy.deepcopy(asked))
        x, y = batch(6)
        if keep:
            for one in (plain, monitor):
                loss(one.model(x), y).backward()
        inputs = x.clone().requires_grad_()
        train(plain, loss, x, y)
        with monitor.step():
            torch.autograd.grad(loss(model(inputs), y), inputs)
            loss(model(x), y).backward()
            monitor.optimizer.step()
        assert monitor.values == plain.values and monitor.values["BatchSize"] == 6 and not monitor.absent


def test_a_gradient_that_is_not_added_to_grad() -> None:
    monitor, loss = pair(Loss(), NormTest())
    x, y = batch()
    with monitor.step():
        torch.autograd.grad(loss(monitor.model(x), y), list(monitor.model.parameters()))
    assert "has added to `.grad`" in monitor.absent["Loss"] and not monitor.values


@pytest.mark.parametrize("asked", [[], [BatchSize()]])
def test_a_gradient_of_zero_is_one(asked: list[Any]) -> None:
    """Of a hinge loss whose margins are all kept."""
    model, loss = px.extend(nn.Linear(2, 2)), px.extend(nn.MultiMarginLoss())
    with torch.no_grad():
        model.weight.copy_(9 * torch.eye(2))
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), None, instruments=[Loss(), GradNorm(), *asked])
    for _ in range(2):  # then with gradients of zero from before
        with monitor.step():
            loss(model(torch.eye(2)), torch.arange(2)).backward()
        assert monitor.values["Loss"] == monitor.values["GradNorm"] == 0 and not monitor.absent


def test_two_threads_that_train_at_once() -> None:
    """Each is in a step of its own while the other calls its model and its loss and goes backward."""
    together, seen, wanted = threading.Barrier(2, timeout=60), {}, {}

    def run(k: int, meet: Any, into: dict[int, Any]) -> None:
        asked = Loss(), GradNorm(), NormTest(), BatchSize()
        monitor, (model, loss, x, y) = monitors[k], parts[k]
        monitor.instruments = list(asked)
        with monitor.step():
            meet()
            value = loss(model(x), y)
            meet()
            value.backward()
            meet()
        into[k] = monitor.values, monitor.absent

    parts, monitors = [], []
    for k in range(2):
        model = px.extend(mlp())
        parts.append((model, px.extend(nn.CrossEntropyLoss()), *batch(4 + k)))
        monitors.append(Cockpit(model, torch.optim.SGD(model.parameters(), LR), None))
        run(k, lambda: None, wanted)
        model.zero_grad()
    threads = [threading.Thread(target=run, args=(k, together.wait, seen)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == wanted and [seen[k][0]["BatchSize"] for k in range(2)] == [4, 5]


def test_a_last_batch_of_one_sample_that_is_squeezed() -> None:
    model, loss = px.extend(nn.Linear(5, 1)), px.extend(nn.MSELoss())
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), None, instruments=[Loss(), SampleLosses()])
    for n in (4, 1):
        x, y = torch.randn(n, 5), torch.randn(n)
        with monitor.step():
            output = model(x).squeeze()
            loss(output, y.squeeze()).backward()
        each = (output.detach() - y).square().reshape(-1)
        assert monitor.values["SampleLosses.largest"] == pytest.approx(each.sort(descending=True).values.numpy())


def test_losses_that_are_divided_before_their_mean() -> None:
    model, x = px.extend(nn.Linear(5, 6)), torch.randn(3, 12, 5)
    y, lengths, inputs = torch.randint(1, 6, (3, 6)), torch.tensor([1, 3, 6]), torch.full((3,), 12)
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), None, instruments=[Loss(), SampleLosses()])
    for reduction in ("sum", "mean"):
        loss = px.extend(nn.CTCLoss(reduction=reduction))
        with monitor.step():
            scores = model(x).log_softmax(2).transpose(0, 1)
            value = loss(scores, y, inputs, lengths)
            value.backward()
        each = F.ctc_loss(scores.detach(), y, inputs, lengths, reduction="none").sort(descending=True).values
        if reduction == "sum":
            assert monitor.values["SampleLosses.largest"] == pytest.approx(each.numpy())
        else:
            assert monitor.values == {"Loss": pytest.approx(float(value.detach()))}
            assert "lengths of their targets" in monitor.absent["SampleLosses"]


def test_a_loss_that_is_climbed() -> None:
    monitor, loss = pair(Loss(), GradNorm(), CABS())
    x, y = batch()
    with monitor.step():
        value = loss(monitor.model(x), y)
        (-value).backward()
    assert monitor.values["Loss"] == pytest.approx(float(value.detach())) and "`.grad` is -1" in monitor.absent["CABS"]


def test_passes_that_are_added_up_as_they_are() -> None:
    """Means with the factor 1 each, of different sizes, are of the mean of all samples all the same."""
    monitor, loss = pair(Loss(), GradNorm(), NoiseScale(), SampleLosses(), NormTest())
    x, y = batch(6)
    with monitor.step():
        for part in (slice(0, 3), slice(3, 5), slice(5, 6)):
            loss(monitor.model(x[part]), y[part]).backward()
    with px.disable():
        value = F.cross_entropy(monitor.model(x), y)
        grads = torch.autograd.grad(value, list(monitor.model.parameters()))
    norm = torch.cat([g.flatten() for g in grads]).norm()
    assert monitor.values["Loss"] == pytest.approx(float(value.detach()))
    assert monitor.values["GradNorm"] == pytest.approx(float(norm))
    for name, g in zip(dict(monitor.model.named_parameters()), grads, strict=True):
        assert monitor.values[f"GradNorm/{name}"] == pytest.approx(float(g.norm()))


def test_a_second_pass_of_which_the_loss_is_not_seen() -> None:
    monitor, _ = pair(Loss(), NormTest())
    x, y = batch()
    with pytest.raises(px.PackextError, match="does not see the loss"), monitor.step(scale=float(len(x))) as step:
        each = F.cross_entropy(monitor.model(x), y, reduction="none")
        step.losses(each)
        each.mean().backward()
        F.cross_entropy(monitor.model(x), y).backward()


class Root(nn.Module):
    """A loss that is no sum of that which it is made of."""

    reduction = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MSELoss()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.inner(output, target).sqrt()


def test_of_a_loss_that_is_made_of_a_loss_the_outermost_counts() -> None:
    monitor, _ = pair(Loss(), GradNorm(), SampleLosses())
    loss, (x, y) = px.extend(Root()), (torch.randn(4, 5), torch.randn(4, 3))
    with monitor.step():
        value = loss(monitor.model(x), y)
        value.backward()
    assert monitor.values["Loss"] == pytest.approx(float(value.detach()))
    assert "Root is not one of torch's losses" in monitor.absent["SampleLosses"]


@pytest.mark.parametrize("rest", [0.0, 1.0])
def test_a_loss_with_the_factor_zero(rest: float) -> None:
    """As while a term is not yet switched on."""
    monitor, loss = pair(Loss(), GradNorm(), SampleLosses())
    x, y = batch()
    with monitor.step():
        (0.0 * loss(monitor.model(2 * x), y) + rest * loss(monitor.model(x), y)).backward()
    with torch.no_grad():
        each = rest * F.cross_entropy(monitor.model(x), y, reduction="none")
    assert monitor.values["Loss"] == pytest.approx(float(each.mean()))
    assert monitor.values["SampleLosses.largest"] == pytest.approx(each.sort(descending=True).values.numpy())


def test_a_loss_that_is_computed_while_packext_is_off() -> None:
    monitor, loss = pair(Loss(), GradNorm())
    x, y = batch()
    with monitor.step():
        with px.disable():
            value = loss(monitor.model(x), y)
        value.backward()
    assert monitor.values["Loss"] == pytest.approx(float(value.detach())) and monitor.values["GradNorm"] > 0


def test_a_call_of_a_loss_that_fails_hides_no_other() -> None:
    monitor, loss = pair(Loss(), NormTest())
    other, (x, y) = px.extend(nn.MultiMarginLoss()), batch()
    with monitor.step():
        with pytest.raises(ValueError, match="batch"):
            loss(monitor.model(x), y[:2])
        other(monitor.model(x), y).backward()
    assert "NormTest" in monitor.values


def test_parameters_moved_between_two_steps() -> None:
    monitor, loss = pair(Alpha())
    x, y = batch()
    train(monitor, loss, x, y)
    with torch.no_grad():
        monitor.model[0].weight.mul_(0.5)
    train(monitor, loss, x, y)
    assert "changed between this step and the next" in monitor.absent["Alpha"]


def test_terms_of_the_loss_that_pass_by_the_model() -> None:
    monitor, loss = pair(Alpha(), NormTest(), GradNorm())
    x, y = batch()
    with monitor.step():
        penalty = sum(p.square().sum() for p in monitor.model.parameters())
        (loss(monitor.model(x), y) + penalty).backward()
        norm = torch.cat([p.grad.flatten() for p in monitor.model.parameters()]).norm()
        monitor.optimizer.step()
    assert "terms of the loss pass by the model" in monitor.absent["Alpha"]
    assert monitor.values["GradNorm"] == pytest.approx(float(norm)) and "NormTest" in monitor.values


@pytest.mark.parametrize("passes", [(0, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
def test_terms_that_pass_by_the_model_in_some_passes_of_a_step(passes: tuple[int, ...]) -> None:
    monitor, loss = pair(Alpha(), NormTest(), NoiseScale(), SampleNorms())
    x, y = batch(12)
    with monitor.step():
        for on, inputs, targets in zip(passes, x.chunk(3), y.chunk(3), strict=True):
            penalty = sum(p.square().sum() for p in monitor.model.parameters())
            (loss(monitor.model(inputs), targets) + on * penalty).backward()
        monitor.optimizer.step()
    if any(passes):
        for name in ("Alpha", "NormTest", "NoiseScale"):
            assert "terms of the loss pass by the model" in monitor.absent[name]
    assert ("NormTest" in monitor.values) == (not any(passes)) and "SampleNorms" in monitor.values


@pytest.mark.parametrize("on", [0.0, 1.0])
def test_what_rounding_leaves_of_a_pass_is_no_term_of_the_loss(on: float) -> None:
    """In bfloat16, 40 passes: of the last ones `.grad` keeps few digits."""
    torch.manual_seed(0)
    model, loss = px.extend(mlp().bfloat16()), px.extend(nn.CrossEntropyLoss())
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), None, instruments=[NormTest(), GradNorm()])
    x, y = torch.randn(320, 5, dtype=torch.bfloat16), torch.randint(3, (320,))
    with monitor.step():
        for k, (inputs, targets) in enumerate(zip(x.chunk(40), y.chunk(40), strict=True)):
            penalty = sum(p.square().sum() for p in model.parameters()) if k == 39 else 0.0
            ((loss(model(inputs), targets) + on * penalty) / 40).backward()
    assert "GradNorm" in monitor.values and ("NormTest" in monitor.values) == (not on)


def test_a_context_per_token_takes_the_pass() -> None:
    monitor, _ = pair(NormTest())
    x, y = torch.randn(4, 2, 5), torch.randn(4, 2, 3)
    with monitor.step(scale=1.0) as step, px.backpack(px.BatchL2Grad(), per="token"):
        value = (monitor.model(x) - y).square().mean()
        step.loss(value)
        value.backward()
    assert 'px.backpack(per="token") has taken them' in monitor.absent["NormTest"] and not monitor.values


def test_not_finite() -> None:
    monitor, loss = pair(Loss(), Alpha(), NoiseScale(), GradHist1d(), NormTest())
    x, y = batch()
    x[0, 0] = torch.nan
    train(monitor, loss, x, y)
    assert monitor.values["Loss"] != monitor.values["Loss"]
    for name in ("NoiseScale", "GradHist1d", "NormTest"):
        assert "not finite" in monitor.absent[name] or "not a number" in monitor.absent[name]


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_a_factor_that_is_not_finite(factor: float) -> None:
    monitor, loss = pair(Loss(), GradNorm(), NormTest())
    x, y = batch()
    with monitor.step():
        (loss(monitor.model(x), y) * factor).backward()
    assert monitor.absent["Loss"] == monitor.absent["GradNorm"] == "not finite: a factor on the loss is NaN or infinite"


def test_the_largest_magnitude_of_several_tensors() -> None:
    tensors = [torch.tensor([1.0, -3.0]), torch.tensor([[2.0]], dtype=torch.float32)]
    assert largest(tensors) == largest(tensors[::-1]) == 3.0
    for broken in (torch.nan, torch.inf, -torch.inf):
        tensors[1][0, 0] = broken
        assert not largest(tensors) < float("inf") and not largest(tensors[::-1]) < float("inf")


@pytest.mark.parametrize("size", [0, 1, 5, 3 * BLOCK, 3 * BLOCK + 7])
def test_inner_products_of_long_tensors(size: int) -> None:
    one, other = torch.rand(2, size, dtype=torch.float32)
    assert inner(one, other) == pytest.approx(float((one.double() * other.double()).sum()), rel=1e-6)
    matrix = torch.rand(2, 7, 3).mT  # not in the order of memory
    assert inner(matrix[0], matrix[1]) == pytest.approx(float((matrix[0] * matrix[1]).sum()))


@pytest.mark.parametrize("size", [0, 1, CHUNK + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_of_long_tensors(size: int, dtype: torch.dtype) -> None:
    t = torch.rand(size, dtype=dtype)
    assert total(t).dtype == torch.float64
    assert float(total(t)) == pytest.approx(float(t.double().sum()), rel=1e-13)


def test_an_instrument_leaves_results_as_they_are() -> None:
    x, y = batch()
    found = []
    for kinds in ((HessTrace, TICDiag, TICTrace), (TICTrace, TICDiag, HessTrace)):
        torch.manual_seed(0)
        monitor, loss = pair(*(kind("ggn") for kind in kinds))
        train(monitor, loss, x, y)
        found.append(monitor.values)
    assert found[0] == found[1] and len(found[0]) > 3


class Turn(Instrument):
    """Inner product of an update with the one before, known with the step after; keeps the step that told it."""

    needs = (px.BatchL2Grad(),)
    reads = True

    def measure(self, step: Step) -> None:
        self.before = step.update

    def follow(self) -> tuple[Any, ...]:
        return (px.BatchL2Grad(),)

    def conclude(self, step: Step) -> float:
        self.step = step
        return sum(float((u * self.before[k]).sum()) for k, u in step.update.items()) if self.reads else 0.0


def test_the_update_of_a_step_that_only_completes_the_last_one() -> None:
    turn = Turn()
    monitor, loss = pair(turn, every=2)
    places = []
    for reads in (True, True, False, False):
        turn.reads = reads
        places.append([p.detach().clone() for p in monitor.model.parameters()])
        train(monitor, loss, *batch())
        if monitor.steps == 2:
            places.append([p.detach().clone() for p in monitor.model.parameters()])
            (a, b, c) = places
            turned = sum(float(((y - x) * (z - y)).sum()) for x, y, z in zip(a, b, c, strict=True))
            assert monitor.values["Turn"] == pytest.approx(turned, rel=1e-12)
            assert turn.step.update is not None  # it has been formed
    # Nobody has read it while it could be known.
    with pytest.raises(px.PackextError, match="read it in conclude"):
        _ = turn.step.update


def test_inner_products_with_directions_that_are_gone() -> None:
    class Along(Instrument):
        """With directions that nobody holds."""

        def measure(self, step: Step) -> dict[str, float]:
            g = step.gradient
            return {f".{k}": step.along(g, {name: k * v for name, v in g.items()}) for k in range(4)}

    monitor, loss = pair(Along(), GradNorm())
    train(monitor, loss, *batch())
    found = [monitor.values[f"Along.{k}"] for k in range(4)]
    assert found == pytest.approx([k * monitor.values["GradNorm"] ** 2 for k in range(4)])


def test_instruments_of_one_monitor_after_another() -> None:
    """They begin anew, with another model, too."""
    asked = [Distance(), HessMaxEV(), IdleUnits(2), NoiseScale(0.9)]
    (x, y), loss = batch(8), px.extend(nn.CrossEntropyLoss())
    for width in (4, 7):
        found = []
        for instruments in (asked, [Distance(), HessMaxEV(), IdleUnits(2), NoiseScale(0.9)]):
            torch.manual_seed(width)
            model = px.extend(nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3)))
            monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), None, instruments=instruments)
            train(monitor, loss, x, y)
            found.append(monitor.values)
        found = [{k: v for k, v in values.items() if not k.startswith("HessMaxEV")} for values in found]
        assert found[0] == found[1] and found[0]["Distance"] == 0 and "IdleUnits/0.bias" not in found[0]


def test_an_instrument_that_fails_as_a_step_begins_leaves_nothing_behind() -> None:
    class Fails(Instrument):
        def enter(self, step: int, model: nn.Module) -> None:
            raise ZeroDivisionError

        def leave(self) -> None:
            pytest.fail("it has not entered")

    monitor, loss = pair(InputScale(), Fails(), OutputScale())
    before = traces(monitor.model)
    with pytest.raises(ZeroDivisionError), monitor.step():
        pass
    assert traces(monitor.model) == before
    monitor.instruments.pop(1)
    train(monitor, loss, *batch())
    assert "InputScale" in monitor.values and traces(monitor.model)[2] == before[2]


def test_parameters_without_entries() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.none = nn.Linear(5, 3), nn.Parameter(torch.zeros(0, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x) + self.none.sum(0)

    model, loss = px.extend(Empty()), px.extend(nn.CrossEntropyLoss())
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), "full")
    train(monitor, loss, *batch(8))
    assert {"NormTest", "GradHist1d", "GradHist2d"} <= monitor.values.keys()
    assert not any("none" in name for name in monitor.values)


def test_arrays_of_half_precision() -> None:
    class Each(Instrument):
        """In the precision of the model."""

        losses = True
        needs = (px.BatchL2Grad(),)

        def measure(self, step: Step) -> Tensor:
            return step.losses

    model, loss = px.extend(mlp().bfloat16()), px.extend(nn.CrossEntropyLoss())
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), None, instruments=[Each()])
    x, y = batch()
    train(monitor, loss, x.bfloat16(), y)
    assert monitor.values["Each"].dtype == np.float32 and monitor.values["Each"].shape == (len(x),)


# -- other losses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "none", "given", "number", "counted", "scalar"])
def test_losses_of_all_kinds_give_the_same(reduction: str) -> None:
    asked = (Loss(), GradNorm(), NormTest(), SampleNorms(), Alpha(), GradHist1d())
    x, y = batch(6)
    mean, loss = pair(*asked)
    model = px.extend(copy.deepcopy(mean.model))
    rate = LR / 6 if reduction == "sum" else LR
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), rate), None, instruments=copy.deepcopy(asked))
    other = px.extend(nn.CrossEntropyLoss(reduction="none" if reduction == "none" else "sum"))
    for _ in range(2):
        train(mean, loss, x, y)
        scale = {"given": 6.0, "number": 6.0, "counted": "mean", "scalar": "mean"}.get(reduction, "sample")
        with monitor.step(scale) as step:
            if reduction == "scalar":
                each = F.cross_entropy(model(x), y, reduction="none")
                value = each.mean()
                step.loss(value, lambda each=each: each.detach() / 6)
                value.backward()
            elif reduction in ("given", "counted"):
                each = F.cross_entropy(model(x), y, reduction="none")
                step.losses(each)
                each.mean().backward()
            elif reduction == "number":
                loss(model(x), y).backward()
            elif reduction == "none":
                other(model(x), y).mean().backward()
            else:
                other(model(x), y).backward()
            monitor.optimizer.step()
            monitor.optimizer.zero_grad()
    assert monitor.values.keys() == mean.values.keys(), monitor.absent
    for name, value in mean.values.items():
        assert monitor.values[name] == pytest.approx(value, rel=1e-6), name


def test_a_factor_that_the_number_of_samples_makes_one() -> None:
    monitor, _ = pair(GradNorm(), NormTest(), GradHist1d(samples=None, limit=1.0))
    monitor.every = lambda step: step == 0
    x, y = batch(4)
    for _ in range(2):  # of which the second is not looked at, and takes the loss all the same
        monitor.optimizer.zero_grad()
        with monitor.step("mean", loss_scale=0.25) as step:
            value = F.cross_entropy(monitor.model(x), y) * 0.25
            step.loss(value)
            value.backward()
    norm = torch.cat([p.grad.flatten() for p in monitor.model.parameters()]).norm()
    assert monitor.values["GradNorm"] == pytest.approx(4 * float(norm))
    # Entries were counted before it was known how large they are.
    assert "the loss was multiplied by 0.25" in monitor.absent["GradHist1d"]


@pytest.mark.parametrize("parts", [[8], [4, 4], [5, 3]])
def test_a_mean_over_all_samples_of_a_step(parts: list[int]) -> None:
    """As `transformers` has it: each pass brings the sum of its samples over the number of samples in the step."""
    asked = (Loss(), GradNorm(), NormTest(), SampleNorms(), GradHist1d(), Alpha())
    x, y = batch(8)
    whole, loss = pair(*asked)
    model = px.extend(copy.deepcopy(whole.model))
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), None, instruments=copy.deepcopy(asked))
    for _ in range(2):
        train(whole, loss, x, y)
        with monitor.step("mean") as step:
            for a, b in zip(x.split(parts), y.split(parts), strict=True):
                each = F.cross_entropy(model(a), b, reduction="none") / 8
                value = each.sum()
                step.loss(value, lambda each=each: each.detach())
                value.backward()
            monitor.optimizer.step()
            monitor.optimizer.zero_grad()
        names = [n for n in whole.values if len(parts) == 1 or not n.startswith("GradHist1d")]  # others are drawn
        for name in names:
            assert monitor.values[name] == pytest.approx(whole.values[name], rel=1e-6), name
    assert "NormTest" in names and "Alpha" in {**whole.values, **whole.absent}
    with monitor.step("mean") as step:
        value = F.cross_entropy(model(x), y)
        step.loss(value)
        value.backward()
        monitor.optimizer.step()
    assert monitor.absent["Alpha"] == "the samples' parts of the loss are not known"
    with pytest.raises(ValueError, match=r"loss\(\) takes the scalar that backward\(\) will go through, got \[8\]"):
        with monitor.step("mean") as step:
            step.loss(F.cross_entropy(model(x), y, reduction="none"))


def test_extended_losses_that_are_parts_of_one_that_is_handed_over() -> None:
    x, y = batch(6)
    plain, loss = pair(Loss(), GradNorm(), NormTest())
    model = px.extend(copy.deepcopy(plain.model))
    monitor = Cockpit(
        model, torch.optim.SGD(model.parameters(), LR), None, instruments=[Loss(), GradNorm(), NormTest()]
    )
    second = px.extend(nn.MultiMarginLoss())
    with plain.step():
        output = plain.model(x)
        (loss(output, y) + 0.5 * second(output, y)).backward()
    with monitor.step("mean") as step:
        output = model(x)
        value = loss(output, y) + 0.5 * second(output, y)
        second(output, y)  # of which the backward pass knows nothing
        step.loss(value)
        value.backward()
    assert monitor.values.keys() == plain.values.keys()
    for name, value in plain.values.items():
        assert monitor.values[name] == pytest.approx(value), name
    with pytest.raises(px.PackextError, match=r"loss\(\) was given what an extended MultiMarginLoss has computed"):
        with monitor.step("mean") as step:
            output = model(x)
            value = F.cross_entropy(output, y)
            step.loss(value)
            (value + second(output, y)).backward()


def test_padding_counts_no_sample_twice() -> None:
    """Tokens whose target is ignored: a sample's own loss is N times its share in the mean."""
    model = px.extend(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)))
    loss = px.extend(nn.CrossEntropyLoss(ignore_index=-1))
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), None, instruments=[Loss(), NormTest(), Alpha()])
    x, y = torch.randint(7, (4, 5)), torch.randint(3, (4, 5))
    y[0, 1:] = -1
    for _ in range(2):
        places = (y >= 0).sum()
        with px.disable():
            each = F.cross_entropy(model(x).mT, y, ignore_index=-1, reduction="none").sum(1) * 4 / places
        with monitor.step():
            loss(model(x).mT, y).backward()
            monitor.optimizer.step()
            monitor.optimizer.zero_grad()
        assert monitor.values["Loss"] == pytest.approx(float(each.mean().detach()))
    assert "Alpha" in monitor.values or "concave" in monitor.absent["Alpha"]
    with monitor.step():
        loss(model(x).flatten(0, 1), y.flatten()).backward()
        monitor.optimizer.step()
    assert "20 rows for 4 samples" in monitor.absent["Alpha"]


def test_samples_without_a_target_have_no_statistics() -> None:
    """Zeros in place of their gradients would count as gradients: all that is made of these is absent."""
    model = px.extend(mlp())
    loss = px.extend(nn.CrossEntropyLoss(ignore_index=3))
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), "business", instruments=[CABS(), EffectiveRank()])
    x, y = batch()
    y[0] = 3
    train(monitor, loss, x, y)
    found = {name for name in monitor.values if "/" not in name and "." not in name}
    apart = {"Loss", "Time", "GradNorm", "Distance", "UpdateSize", "BatchSize", "LearningRate", "ParamNorm"}
    assert found == apart | {"InputScale", "OutputScale", "Untrained", "HessTrace"}
    assert set(monitor.absent.values()) == {
        f"1 of {len(y)} samples have no target that counts (ignore_index): they have no loss and no gradient, which "
        "zeros are not. Leave them out of the batch"
    }
    with monitor.step():  # of another loss, they have gradients
        output = model(x)
        (loss(output, y) + px.extend(nn.MSELoss())(output, torch.zeros_like(output))).backward()
    assert "NormTest" in monitor.values


def test_targets_are_looked_for_in_the_arguments_of_torchs_own_losses_alone() -> None:
    class Masked(nn.CrossEntropyLoss):
        def forward(self, input: Tensor, ignored: Tensor, target: Tensor) -> Tensor:
            return super().forward(input, target)

    model, loss, (x, y) = px.extend(mlp()), px.extend(Masked()), batch()
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), None, instruments=[NormTest()])
    with monitor.step():
        loss(model(x), torch.full_like(y, -100), y).backward()
    assert "NormTest" in monitor.values, monitor.absent


def test_an_optimizer_of_master_weights() -> None:
    """Copies in float32 are stepped, and copied back to a model in half precision."""
    torch.manual_seed(0)
    model, loss, (x, y) = px.extend(mlp().bfloat16()), px.extend(nn.CrossEntropyLoss()), batch()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    monitor = Cockpit(model, torch.optim.SGD(masters, LR), None, instruments=[Untrained(), LearningRate()])
    with monitor.step():
        loss(model(x.bfloat16()), y).backward()
        for p, master in zip(model.parameters(), masters, strict=True):
            assert p.grad is not None
            master.grad = p.grad.float()
        monitor.optimizer.step()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master)
    assert monitor.values["Untrained"] == 0 and monitor.values["LearningRate"] == LR


# -- refusals ---------------------------------------------------------------------------------------------


def test_refused_at_construction() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    with pytest.raises(px.NotExtendedError, match="Sequential: call model = px.extend"):
        Cockpit(model, optimizer)
    px.extend(model)
    with pytest.raises(ValueError, match="the Adam holds no parameter of Sequential.*give the optimizer of this model"):
        Cockpit(model, torch.optim.Adam(mlp().parameters()))
    with pytest.raises(ValueError, match="'economy', 'business', 'full' or None, got 'cheap'"):
        Cockpit(model, optimizer, "cheap")
    with pytest.raises(ValueError, match="every"):
        Cockpit(model, optimizer, every=0)
    with pytest.raises(ValueError, match="two instruments are called 'Loss'"):
        Cockpit(model, optimizer, instruments=[Loss()])
    with pytest.raises(ValueError, match="scale"):
        Cockpit(model, optimizer).step(scale="loss")
    with pytest.raises(px.PackextError, match="continue at different steps"):
        sinks = [Keep({}), Keep({})]
        sinks[0].begin = lambda names: 3  # type: ignore[method-assign]
        Cockpit(model, optimizer, sinks=sinks)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (lambda o: {"optimizer": [o, o]}, "one torch.optim.Optimizer, got an object of list: of several, give one"),
        (lambda o: {"optimizer": None}, "one torch.optim.Optimizer, got an object of NoneType"),
        (lambda o: {"optimizer": torch.optim.SGD}, "one torch.optim.Optimizer, got the class SGD"),
        (
            lambda o: {"optimizer": torch.optim.lr_scheduler.StepLR(o, 1)},
            "one torch.optim.Optimizer, got an object of StepLR",
        ),
        (lambda o: {"rules": list(RULES)}, "rules must be a list of Rules, .*RULES.*, got the class "),
        (lambda o: {"rules": RULES[0]()}, f"rules must be a list of Rules, .* got an object of {RULES[0].__name__}"),
        (lambda o: {"sinks": ["runs/x"]}, r"sinks must be a list of Sinks, such as .*Run.*, got 'runs/x'"),
        (lambda o: {"sinks": "runs/x"}, "sinks must be a list of Sinks, .* got 'runs/x'"),
        (lambda o: {"sinks": Keep({})}, "sinks must be a list of Sinks, .* got an object of Keep"),
        (lambda o: {"sinks": [Keep]}, "sinks must be a list of Sinks, .* got the class Keep"),
        (lambda o: {"instruments": [Loss]}, "instruments must be a list of Instruments, .* got the class Loss"),
        (lambda o: {"instruments": Loss()}, "instruments must be a list of Instruments, .* got an object of Loss"),
    ],
)
def test_refused_before_it_trains(options: Any, said: str) -> None:
    model = px.extend(mlp())
    optimizer = torch.optim.SGD(model.parameters(), LR)
    unchecked = inspect.unwrap(Cockpit.__init__)  # signatures are checked while tests run
    with pytest.raises(TypeError, match=said):
        unchecked(Cockpit.__new__(Cockpit), model, **{"optimizer": optimizer} | options(optimizer))
    assert Cockpit(model, optimizer, sinks=iter([Keep({})]), rules=(kind() for kind in RULES)).sinks


@pytest.mark.parametrize(
    ("function", "said"), [(nn.CrossEntropyLoss(), "no extended loss"), (px.extend(nn.NLLLoss()), "linear")]
)
def test_an_error_about_curvature_names_the_instruments_that_ask_for_it(function: Any, said: str) -> None:
    (monitor, _), (x, y) = pair(NormTest(), HessTrace(), TICDiag()), batch()
    with pytest.raises(
        px.PackextError, match=f"^The instruments HessTrace, TICDiag need .*({said}).*other instruments"
    ):
        with monitor.step(scale=4.0):
            function(monitor.model(x), y).backward()
    monitor.model.append(Centred())
    with pytest.raises(px.CoupledSamplesError, match=r"NormTest, HessTrace, TICDiag need.*influence.*\)\.$"):
        with monitor.step():  # which the first column of a root finds
            px.extend(nn.CrossEntropyLoss())(px.extend(monitor.model)(x), y).backward()


def test_an_eigenvalue_of_two_losses_is_absent_and_other_instruments_go_on() -> None:
    (monitor, loss), (x, y) = pair(NormTest(), HessTrace(), HessMaxEV()), batch()
    with monitor.step("mean"):  # mixup
        z = monitor.model(x)
        (0.3 * loss(z, y) + 0.7 * loss(z, y.flip(0))).backward()
    assert "several losses: add them up" in monitor.absent["HessMaxEV"]
    assert isinstance(monitor.values["HessTrace"], float) and isinstance(monitor.values["NormTest"], float)
    with monitor.step("mean"):
        loss(monitor.model(x), y).backward()
    assert isinstance(monitor.values["HessMaxEV"], float)


class Centred(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - super().forward(input).mean(0)


def test_of_monitors_within_each_other_one_names_its_instruments() -> None:
    (first, loss), second = (px.extend(nn.Linear(5, 3)), px.extend(nn.CrossEntropyLoss())), px.extend(nn.Linear(5, 3))
    outer = Cockpit(first, torch.optim.SGD(first.parameters(), LR), None, instruments=[NormTest()])
    inner = Cockpit(second, torch.optim.SGD(second.parameters(), LR), None, instruments=[Loss(), HessMaxEV()])
    x, y = batch()
    with pytest.raises(
        px.PackextError, match="^The instruments HessMaxEV need what Linear did not give: .* another term"
    ):
        with outer.step(), inner.step():
            (loss(second(x), y) + second(x).square().sum()).backward()


def test_an_error_names_the_instruments_and_the_model() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return x - x.mean(0)

    model, loss = px.extend(Mixed()), px.extend(nn.CrossEntropyLoss())
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), None, instruments=[Loss(), NormTest()])
    x, y = batch()
    with pytest.raises(px.CoupledSamplesError, match="instruments NormTest need what Mixed did not give: .*influence"):
        with monitor.step():
            loss(model(x), y).backward()
    plain, optimizer = nn.CrossEntropyLoss(), px.optim.KFAC(model.parameters(), 0.1)

    def closure() -> Tensor:
        loss(model(x), y).backward()
        return torch.zeros(())

    for mistake, message in ((None, "^KFAC: .* has a gradient, but no"), (closure, "^The instruments NormTest need")):
        model.zero_grad()
        with pytest.raises(px.PackextError, match=message):
            with Cockpit(model, optimizer, None, instruments=[NormTest()]).step():
                if mistake is None:
                    with px.disable():
                        loss(model(x), y).backward()
                optimizer.step(mistake)
    monitor, _ = pair(NormTest())
    with pytest.raises(px.NotExtendedError, match="NormTest need .* loss is not extended"):
        with monitor.step():
            plain(monitor.model(x), y).backward()
    with pytest.raises(px.PackextError, match=r'does not see the loss.*monitor.step\("mean"\)'):
        with monitor.step(scale=4.0):
            plain(monitor.model(x), y).backward()
    with pytest.raises(ValueError, match=r"individual losses \[N\]"):
        with monitor.step(scale=4.0) as step:
            step.losses(torch.ones(()))
    with pytest.raises(px.PackextError, match=r"losses\(\) was given what an extended CrossEntropyLoss has computed"):
        extended = px.extend(nn.CrossEntropyLoss(reduction="none"))
        with monitor.step(scale=4.0) as step:
            each = extended(monitor.model(x), y)
            step.losses(each)
            each.mean().backward()


def test_nested_monitors_of_different_scale_are_refused() -> None:
    (first, loss), (second, _) = pair(NormTest()), pair(NormTest())
    with pytest.raises(px.PackextError, match="different scales"), first.step(), second.step(scale=2.0):
        pass
    x, y = batch()
    train(first, loss, x, y)
    assert "NormTest" in first.values


# -- an instrument of one's own -------------------------------------------------------------------------------


class Opposed(Instrument):
    """Share of the samples whose gradient points against the gradient of the batch."""

    needs = (px.GradDot(),)

    def measure(self, step: Step) -> float:
        if step.n < 2:
            raise Absent("one sample agrees with itself")
        return float((step["grad_dot"] < 0).double().mean())


def test_an_instrument_of_ones_own() -> None:
    monitor, loss = pair(Opposed(), NormTest())
    x, y = batch(8)
    rows = testing.individual_gradients(monitor.model, loss, x, y)
    g = torch.cat([r.flatten(1) for r in rows.values()], 1)
    train(monitor, loss, x, y)
    assert monitor.values["Opposed"] == float((g @ g.mean(0) < 0).double().mean())
    train(monitor, loss, x[:1], y[:1])
    assert monitor.absent["Opposed"] == "one sample agrees with itself"

    class Wrong(Opposed):
        def measure(self, step: Step) -> float:
            return step["variance"]

    other, _ = pair(Wrong())
    with pytest.raises(KeyError, match="not the savefield of any quantity in `needs`: grad_dot"):
        train(other, loss, x, y)


def test_equal_quantities_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = px.backpack

    def spy(*quantities: Any, **options: Any) -> Any:
        asked.append([(type(q).__name__, q.savefield) for q in quantities])
        return real(*quantities, **options)

    monkeypatch.setattr(px, "backpack", spy)

    class Again(GradHist1d):
        pass

    class Wider(GradHist1d):
        pass

    monitor, loss = pair(
        GradHist1d(5, 1.0, None), Again(5, 1.0, None), Wider(5, 2.0, None), NormTest(), NoiseScale(), HessMaxEV()
    )
    x, y = batch()
    train(monitor, loss, x, y)
    fields = [field for _, field in asked[0]]
    assert [name for name, _ in asked[0]] == [
        "GradHistogram", "GradHistogram", "BatchL2Grad", "GradDot", "MeanTopEigenvalues", "Count",
    ]  # fmt: skip
    assert len(set(fields)) == len(fields)
    assert (monitor.values["GradHist1d"] == monitor.values["Again"]).all()
    assert not (monitor.values["GradHist1d"] == monitor.values["Wider"]).all()


def test_samples_that_stand_for_all_are_the_same_for_all_parameters() -> None:
    model, loss = px.extend(net().double()), px.extend(nn.CrossEntropyLoss())
    model.eval()
    x, y = images(40)
    u = {p: torch.randn_like(p) for p in model.parameters()}
    asked = SlopeDot(u, 3), DrawnGrad(3, 16, 10**6), px.BatchGrad()
    with px.backpack(*asked, scale="sample") as results:
        loss(model(x.double()), y).backward()
    for p in u:
        found = results[p]
        assert found.slope_dot.shape == (16,)
        rows = found.drawn_grad.values
        torch.testing.assert_close(found.slope_dot, rows @ u[p].flatten())
        apart = (rows[:, None] - found.grad_batch.flatten(1)).abs().amax(2)
        assert len(set(apart.argmin(1).tolist())) == 16 and apart.amin(1).max() < 1e-9


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_pass_that_makes_a_graph_is_seen_as_any_other() -> None:
    """As an optimizer of second order asks for one: its numbers are no part of that graph, which torch warns of."""
    seen = []
    for graph in (False, True):
        torch.manual_seed(0)
        model, loss_fn = px.extend(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))), px.extend(nn.MSELoss())
        opt = torch.optim.SGD(model.parameters(), 0.1)
        monitor = Cockpit(model, opt, "full")
        for _ in range(3):
            with monitor.step():
                loss_fn(model(torch.randn(6, 5)), torch.randn(6, 3)).backward(create_graph=graph)
                opt.step()
            opt.zero_grad()
        exact = ("Loss", "GradNorm", "GradSNR", "NoiseScale", "UpdateSize")  # others have random draws
        seen.append({k: v for k, v in monitor.values.items() if k.startswith(exact)})
    assert seen[0].keys() == seen[1].keys()
    assert {"Loss", "GradNorm", "GradSNR"} <= seen[0].keys()
    for name, value in seen[0].items():
        torch.testing.assert_close(
            torch.as_tensor(seen[1][name]), torch.as_tensor(value), rtol=1e-4, atol=1e-6, equal_nan=True
        )
