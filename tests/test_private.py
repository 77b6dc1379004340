"""Private optimizers: clipped sums, their noise, what is counted, and what is refused."""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

import packext as px
from packext._statistics import Statistics
from packext.optim import DPSGD, AdaptiveClipping, DPAdam, PoissonSampler
from tests.helpers import processes

#: Of the 7 samples of `data()`, three have a norm below C over all layers; C_LAYER is between those of a layer.
C, C_LAYER = 5.0, 2.6
SETTINGS: dict[str, Any] = {"max_norm": C, "noise_multiplier": 0.5, "expected_batch_size": 10.0}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 6), nn.LayerNorm(6), nn.Linear(6, 4)
    ).double()


def data(n: int = 7, seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 5, 5, generator=draw, dtype=torch.float64), torch.randint(4, (n,), generator=draw)


def extended(reduction: str = "mean") -> tuple[nn.Sequential, nn.Module]:
    return px.extend(network()), px.extend(nn.CrossEntropyLoss(reduction=reduction))


def optimizer(model: nn.Module, kind: Any = DPSGD, **options: Any) -> Any:
    return kind(model.named_parameters(), **{"lr": 0.1, **SETTINGS, "seed": 5, **options})


def backward(o: Any, model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> None:
    with px.optim.emit(o):
        loss(model(x), y).backward()


def rows(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, list[Tensor]]:
    """Gradients of samples, one at a time."""
    named = dict(model.named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for i in range(len(y)):
        with px.disable():
            loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        for name, g in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            found[name].append(g)
    return found


def norms_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Norms of samples' gradients over all parameters."""
    return torch.stack([torch.stack(g).flatten(1).norm(dim=1) for g in rows(model, x, y).values()]).norm(dim=0)


def clipped(model: nn.Module, x: Tensor, y: Tensor, c: float, per_layer: bool = False) -> dict[str, Tensor]:
    """Sums of clipped gradients by a loop."""
    each = rows(model, x, y)
    sums = {name: torch.zeros_like(g[0]) for name, g in each.items()}
    for i in range(len(y)):
        for name in sums:
            layer = name.rpartition(".")[0]
            part = [k for k in sums if not per_layer or k.rpartition(".")[0] == layer]
            norm = math.sqrt(sum(float(each[k][i].square().sum()) for k in part))
            sums[name] += each[name][i] * min(1.0, c / norm)
    return sums


def streams(model: nn.Module) -> list[torch.Generator]:
    """The optimizer's generators, four of them."""
    return optimizer(model).generators


def noises(model: nn.Module, std: float, draws: list[torch.Generator] | None = None) -> list[Tensor]:
    """Tensors here are one chunk each, which the generators take in turn."""
    draws = streams(model) if draws is None else draws
    return [torch.empty_like(p).normal_(0, std, generator=draws[k % 4]) for k, p in enumerate(model.parameters())]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_step_is_that_of_the_algorithm(reduction: str, per_layer: bool) -> None:
    """Against a loop over samples, with the noise drawn in the same order."""
    model, loss = extended(reduction)
    (x, y), start = data(), [p.detach().clone() for p in model.parameters()]
    c = C_LAYER if per_layer else C
    sums = clipped(model, x, y, c, per_layer)
    o = optimizer(model, per_layer=per_layer, max_norm=c)
    state = torch.get_rng_state()
    with px.optim.emit(o):
        loss(model(x), y).sum().backward()
    assert all(p.grad is None for p in model.parameters())  # what is not private is gone
    o.step()
    assert torch.equal(state, torch.get_rng_state())
    layers = 4 if per_layer else 1
    assert o.sensitivity == pytest.approx(c * math.sqrt(layers))
    for p, q, s, noise in zip(
        model.parameters(), start, sums.values(), noises(model, 0.5 * o.sensitivity), strict=True
    ):
        torch.testing.assert_close(p.grad, (s + noise) / 10, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(p.detach(), q - 0.1 * (s + noise) / 10, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [DPSGD, DPAdam])
def test_what_follows_is_torchs_own_step(kind: Any) -> None:
    """Groups with rates of their own, a schedule, weight decay: as torch does with the private gradient."""
    options = {"weight_decay": 0.1, **({"momentum": 0.9} if kind is DPSGD else {})}
    model, loss = extended()
    twin = network()
    groups = [[*m.parameters()] for m in (nn.ModuleList([model[0], model[3]]), nn.ModuleList([model[4], model[5]]))]
    others = [[*m.parameters()] for m in (nn.ModuleList([twin[0], twin[3]]), nn.ModuleList([twin[4], twin[5]]))]
    o = kind([{"params": groups[0]}, {"params": groups[1], "lr": 0.02}], 0.1, **SETTINGS, **options)
    plain = {DPSGD: torch.optim.SGD, DPAdam: torch.optim.Adam}[kind]
    reference = plain([{"params": others[0]}, {"params": others[1], "lr": 0.02}], 0.1, **options)
    schedules = [torch.optim.lr_scheduler.StepLR(each, 2, 0.5) for each in (o, reference)]
    for k in range(5):
        backward(o, model, loss, *data(seed=k))
        o.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        reference.step()
        for schedule in schedules:
            schedule.step()
    assert o.param_groups[1]["lr"] == 0.005
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_micro_batches_add_up_with_noise_once() -> None:
    model, loss = extended()
    x, y = data(9)
    sums, noise = clipped(model, x, y, C), noises(model, 0.5 * C)
    o = optimizer(model)
    backward(o, model, loss, x[:4], y[:4])
    with px.optim.emit(o):  # several passes in one context, too
        loss(model(x[4:5]), y[4:5]).backward()
        loss(model(x[5:]), y[5:]).backward()
    o.step()
    for p, s, e in zip(model.parameters(), sums.values(), noise, strict=True):
        torch.testing.assert_close(p.grad, (s + e) / 10, rtol=1e-9, atol=1e-12)
    assert [tuple(kind) for kind in o.spent] == [(0.5, 10.0, 1)]


def test_batches_of_several_sizes() -> None:
    """Nothing of the pass before is left in a sum."""
    model, loss = extended()
    o = optimizer(model, noise_multiplier=0.0, lr=0.0)
    for n in (3, 7, 2, 1, 5):
        x, y = data(n, seed=n)
        backward(o, model, loss, x, y)
        o.step()
        for p, s in zip(model.parameters(), clipped(model, x, y, C).values(), strict=True):
            torch.testing.assert_close(p.grad, s / 10, rtol=1e-9, atol=1e-12)


def test_what_the_optimizer_chooses_is_refused() -> None:
    """Sums that were united before, or are over tokens, would have more of a sample in them than the noise hides."""
    model, _ = extended()
    o = optimizer(model)
    chosen = {"accumulate": True, "group": "world", "per": "token", "pass_hook": print, "attach": True}
    for name, value in chosen.items():
        with pytest.raises(ValueError, match=rf"emit\(DPSGD, {name}=...\): the optimizer chooses that itself"):
            with px.optim.emit(o, **{name: value}):
                pass


class Words(nn.Module):
    """A table that is the last layer, too, a narrow waist, and a layer that reads the first of six tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.wide, self.narrow, self.back = nn.Linear(16, 40), nn.Linear(40, 2), nn.Linear(2, 16)
        self.first = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids).tanh()
        logits = nn.functional.linear(self.back(self.narrow(self.wide(h).tanh())).tanh(), self.table.weight)
        return torch.cat([logits.mean(1), self.first(h[:, 0])], 1)


def test_what_is_held_is_the_smaller_one_and_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each parameter factors or rows, each until its sum is taken; a part of a tensor counts as the whole."""
    torch.manual_seed(0)
    model, loss = px.extend(Words().double()), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randint(50, (4, 6)), torch.randint(54, (4,))
    held: dict[str, str] = {}
    forms: list[Any] = []
    alive: list[int] = []

    class Watched(px.ClippedGrad):
        def finish(self, asks: dict[int, Any]) -> dict[int, Tensor]:
            held.update({ask.name: type(ask.statistics.form).__name__ for ask in asks.values()})
            forms.extend(weakref.ref(ask.statistics.form) for ask in asks.values())
            return super().finish(asks)

    weighted = Statistics.weighted

    def counted(self: Statistics, weight: Tensor) -> Tensor:
        alive.append(sum(form() is not None for form in forms))
        return weighted(self, weight)

    monkeypatch.setattr(Statistics, "weighted", counted)
    norms = norms_of(model, x, y)
    c = float(norms.median())  # of four, two have a smaller norm
    with px.backpack(Watched(c)):
        loss(model(x), y).backward()
    biases = {f"{name}.bias": "Dense" for name in ("wide", "narrow", "back", "first")}
    weights = {"wide": "Outer", "narrow": "Dense", "back": "Dense", "first": "Dense"}
    assert held == {"table.weight": "Sum", **{f"{name}.weight": kind for name, kind in weights.items()}, **biases}
    assert alive == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    for (_, p), want in zip(model.named_parameters(), clipped(model, x, y, c).values(), strict=True):
        torch.testing.assert_close(p.clipped_grad, want, rtol=1e-9, atol=1e-12)  # type: ignore[attr-defined]


def test_an_empty_batch_is_noise_alone() -> None:
    model, loss = extended()
    o = optimizer(model)
    o.step()
    for p, e in zip(model.parameters(), noises(model, 0.5 * C), strict=True):
        torch.testing.assert_close(p.grad, e / 10)
    o.zero_grad()
    o.step()
    assert o.spent[0].steps == 2
    # What no pass here has made is not taken for an empty batch.
    with pytest.raises(px.PackextError, match=r"0.weight has a gradient that no pass within px.optim.emit"):
        o.step()
    o.zero_grad(set_to_none=False)
    loss(model(data()[0]), data()[1]).backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(px.PackextError, match="run backward\\(\\) there"):
        o.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert o.spent[0].steps == 2


def test_gradients_of_zeros_that_nobody_made_are_no_empty_batch() -> None:
    """As torch's checkpoints make them to ask for a state; but those that a step has left, and somebody set to zero."""
    model, loss = extended()
    o = optimizer(model, momentum=0.9)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(px.PackextError, match=r"0.weight has a gradient of zeros .* optimizer.state_dict\(\)"):
        get_optimizer_state_dict(model, o)
    assert not o.spent and not o.state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    o.param_groups[0]["lr"] = 0.1
    o.zero_grad()
    backward(o, model, loss, *data())
    o.step()
    model.zero_grad(set_to_none=False)
    o.step()
    assert o.spent[0].steps == 2


def test_noise_has_its_moments() -> None:
    model = px.extend(nn.Linear(300, 300))
    o = DPSGD(model.parameters(), 1.0, max_norm=3.0, noise_multiplier=2.0, expected_batch_size=4.0)
    draws = []
    for _ in range(3):
        o.zero_grad()
        o.step()
        draws.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    n = len(draws[0])
    for d in draws:
        assert float(d.mean()) == pytest.approx(0, abs=5 * 1.5 / math.sqrt(n))
        assert float(d.std()) == pytest.approx(1.5, rel=5 / math.sqrt(2 * n))
        assert float((d / 1.5).pow(4).mean()) == pytest.approx(3, abs=5 * math.sqrt(96 / n))
    assert abs(float((draws[0] * draws[1]).mean())) < 5 * 2.25 / math.sqrt(n)
    other = DPSGD(model.parameters(), 1.0, max_norm=3.0, noise_multiplier=2.0, expected_batch_size=4.0)
    assert not {g.initial_seed() for g in other.generators} & {g.initial_seed() for g in o.generators}


def test_noise_does_not_depend_on_the_number_of_threads() -> None:
    """Also where a tensor is drawn in several chunks."""
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        model = px.extend(nn.Linear(600, 500))
        o = DPSGD(model.parameters(), 1.0, max_norm=3.0, noise_multiplier=2.0, expected_batch_size=1.0, seed=3)
        o.step()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    torch.set_num_threads(before)
    assert torch.equal(*found)
    parts = found[0][:300000].split(1 << 16)
    assert all(
        abs(float((a[: len(b)] * b).mean())) < 5 * 36 / math.sqrt(len(b))
        for a, b in zip(parts, parts[1:], strict=False)
    )


def test_adaptive_clipping() -> None:
    """The norm after some steps, from counts and their noise drawn by hand."""
    model, loss = extended()
    o = optimizer(model, lr=0.0, adaptive=AdaptiveClipping(0.7, 0.3, count_noise=2.0))
    rest = (0.5**-2 - 4.0**-2) ** -0.5
    draws, c = streams(model), C
    for k in range(4):
        x, y = data(seed=k)
        norms, sums = norms_of(model, x, y), clipped(model, x, y, c)
        if k == 2:  # an empty batch
            norms, sums = norms[:0], {name: torch.zeros_like(s) for name, s in sums.items()}
        else:
            backward(o, model, loss, x[:3], y[:3])
            backward(o, model, loss, x[3:], y[3:])
        o.step()
        for p, s, noise in zip(model.parameters(), sums.values(), noises(model, rest * c, draws), strict=True):
            torch.testing.assert_close(p.grad, (s + noise) / 10, rtol=1e-9, atol=1e-12)
        count = float(((norms <= c).double() - 0.5).sum())
        count += float(torch.empty((), dtype=torch.float64).normal_(0, 2.0, generator=draws[0]))
        c *= math.exp(-0.3 * (0.5 + count / 10 - 0.7))
        assert o.max_norm == pytest.approx(c)
        o.zero_grad()
    assert [tuple(kind) for kind in o.spent] == [(0.5, 10.0, 4)]  # the whole step's, the count included
    assert optimizer(model, adaptive=AdaptiveClipping())._count_noise() == 0.5


def test_adaptive_clipping_finds_the_quantile() -> None:
    model, loss = extended()
    x, y = data(200)
    o = optimizer(model, lr=0.0, noise_multiplier=0.1, expected_batch_size=200.0, adaptive=AdaptiveClipping(0.3))
    for _ in range(40):
        backward(o, model, loss, x, y)
        o.step()
    norms = norms_of(model, x, y)
    assert float((norms <= o.max_norm).double().mean()) == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("kind", [DPSGD, DPAdam])
@pytest.mark.parametrize("way", ["state_dict", "torch.save", "pickle", "deepcopy"])
def test_what_is_saved_goes_on_to_the_last_bit(kind: Any, way: str) -> None:
    model, loss = extended()
    options: dict[str, Any] = {"adaptive": AdaptiveClipping()} | ({"momentum": 0.9} if kind is DPSGD else {})
    o = optimizer(model, kind, **options)

    def train(o: Any, model: Any, first: int) -> None:
        for k in range(first, first + 3):
            backward(o, model, loss, *data(seed=k))
            o.step()

    train(o, model, 0)
    if way in ("state_dict", "torch.save"):
        kept = copy.deepcopy((model.state_dict(), o.state_dict()))
        if way == "torch.save":
            file = io.BytesIO()
            torch.save(kept, file)
            file.seek(0)
            kept = torch.load(file)
        twin = px.extend(network(seed=9))
        other = optimizer(twin, kind, max_norm=7.0, seed=77, **options)
        twin.load_state_dict(kept[0])
        other.load_state_dict(kept[1])
    else:
        px.unextend(model)
        twin, other = pickle.loads(pickle.dumps((model, o))) if way == "pickle" else copy.deepcopy((model, o))
        px.extend(model), px.extend(twin)
    train(o, model, 3)
    train(other, twin, 3)
    assert other.max_norm == o.max_norm and other.spent == o.spent and o.spent[0].steps == 6
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(px.PackextError, match="not of a private optimizer"):
        o.load_state_dict(torch.optim.SGD(model.parameters(), 0.1).state_dict())
    backward(o, model, loss, *data())
    with pytest.raises(px.PackextError, match="save after step"):
        o.state_dict()
    with pytest.raises(px.PackextError, match="save after step"):
        pickle.dumps(o)


def test_hooks_of_the_step_run_once() -> None:
    """Also where torch has prepared the class that private ones derive from."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    model, loss = extended()
    o, calls = optimizer(model), []
    o.register_step_pre_hook(lambda *_: calls.append(model[0].weight.grad is not None))
    o.register_step_post_hook(lambda *_: calls.append("post"))
    backward(o, model, loss, *data())
    o.step()
    assert calls == [True, "post"]


def test_closures_run_once() -> None:
    model, loss = extended()
    twin = px.extend(network())
    o, other, calls = optimizer(model), optimizer(twin), []

    def closure() -> Tensor:
        o.zero_grad()
        with px.optim.emit(o):
            value = loss(model(data()[0]), data()[1])
            value.backward()
        calls.append(value)
        return value

    assert o.step(closure) is calls[0] and len(calls) == 1
    backward(other, twin, loss, *data())
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_an_infinite_gradient_changes_nothing() -> None:
    model, loss = extended()
    o = optimizer(model, momentum=0.9)
    x, y = data()
    backward(o, model, loss, x, y)
    o.step()
    before = copy.deepcopy((model.state_dict(), o.state_dict()["state"]))
    bad = x.clone()
    bad[2] = math.nan
    with pytest.raises(px.PackextError):
        backward(o, model, loss, bad, y)
        o.step()
    assert str(before) == str((model.state_dict(), o.state_dict()["state"])) and o.spent[0].steps == 1
    backward(o, model, loss, x, y)
    o.step()
    assert all(p.isfinite().all() for p in model.parameters()) and o.spent[0].steps == 2


def test_what_has_no_gradients_of_samples_is_named() -> None:
    model, loss = extended()
    other = nn.Linear(3, 2).double()
    o = DPSGD([*model.parameters(), *other.parameters()], 0.1, **SETTINGS)
    with pytest.raises(px.PackextError, match=r"reached parameter 8 of group 0 \[2, 3\], parameter 9 of group 0 \[2\]"):
        backward(o, model, loss, *data())
    o = DPSGD([*model.named_parameters(), ("head.weight", other.weight)], 0.1, **SETTINGS)
    with pytest.raises(px.PackextError, match=r"reached head.weight \[2, 3\]: .* Freeze it"):
        backward(o, model, loss, *data())
    other.requires_grad_(False)
    backward(o, model, loss, *data())
    o.step()
    assert other.weight.grad is None
    with pytest.raises(px.NotExtendedError):
        backward(optimizer(network()), network(), loss, *data())


def test_some_parameters_of_a_model() -> None:
    """The norm is of those that the optimizer has; others keep their plain gradient, and frozen ones have none."""
    model, loss = extended()
    x, y = data()
    model[0].weight.requires_grad_(False)
    loss(model(x), y).backward()
    plain = model[3].weight.grad.clone()
    model.zero_grad()
    o = DPSGD(model[5].parameters(), 0.1, **{**SETTINGS, "noise_multiplier": 0.0, "max_norm": 2.6})
    backward(o, model, loss, x, y)
    torch.testing.assert_close(model[3].weight.grad, plain)
    assert model[0].weight.grad is None and model[5].weight.grad is None
    o.step()
    model[0].weight.requires_grad_(True)
    each = rows(model, x, y)
    with torch.no_grad():
        model[5].weight += 0.1 * model[5].weight.grad
        model[5].bias += 0.1 * model[5].bias.grad
    each = rows(model, x, y)
    norms = [
        math.hypot(float(w.norm()), float(b.norm())) for w, b in zip(each["5.weight"], each["5.bias"], strict=True)
    ]
    want = sum(w * min(1.0, 2.6 / n) for w, n in zip(each["5.weight"], norms, strict=True)) / 10
    torch.testing.assert_close(model[5].weight.grad, want)


def test_grad_scaler_is_refused() -> None:
    model, loss = extended()
    for early in (False, True):
        scaler, o = torch.amp.GradScaler("cpu"), optimizer(model)
        with px.optim.emit(o):
            scaler.scale(loss(model(data()[0]), data()[1])).backward()
        if early:
            scaler.unscale_(o)
        with pytest.raises(px.PackextError, match="refuses GradScaler"):
            scaler.step(o)
        assert not o.spent


def test_autocast_keeps_the_norm() -> None:
    """A sample adds no more than C, whatever the precision that its gradient was computed in."""
    torch.manual_seed(0)
    model = px.extend(nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)))
    loss = px.extend(nn.CrossEntropyLoss())
    o = DPSGD(model.parameters(), 0.0, max_norm=1e-2, noise_multiplier=0.0, expected_batch_size=1.0)
    for seed in range(5):
        x, y = data(1, seed)
        with torch.autocast("cpu", dtype=torch.bfloat16), px.optim.emit(o):
            loss(model(x.float()), y).backward()
        o.step()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
        assert norm == pytest.approx(1e-2, rel=1e-3)


def test_refusals() -> None:
    model, loss = extended()
    parameters = [*model.parameters()]
    for wrong in ({"max_norm": 0.0}, {"noise_multiplier": -1.0}, {"expected_batch_size": 0.0}, {"max_norm": math.inf}):
        with pytest.raises(ValueError, match="must be positive"):
            DPSGD(parameters, 0.1, **{**SETTINGS, **wrong})
    with pytest.raises(ValueError, match="leave per_layer out"):
        optimizer(model, per_layer=True, adaptive=AdaptiveClipping())
    with pytest.raises(ValueError, match="named_parameters"):
        DPSGD(parameters, 0.1, per_layer=True, **SETTINGS)
    with pytest.raises(ValueError, match="twice the noise of the count"):
        optimizer(model, adaptive=AdaptiveClipping(count_noise=0.2))
    with pytest.raises(ValueError, match="quantile"):
        AdaptiveClipping(1.5)
    half = nn.Linear(3, 2).to(torch.bfloat16)
    with pytest.raises(px.PackextError, match="weight .* of torch.bfloat16: .* torch.autocast"):
        DPSGD(half.named_parameters(), 0.1, **SETTINGS).step()
    o = DPSGD(
        [(f"one.{n}", p) for n, p in model.named_parameters() if n.startswith("3")], 0.1, per_layer=True, **SETTINGS
    )
    o.add_param_group({"params": [("two", model[5].weight), ("5.bias", model[5].bias)]})
    with pytest.raises(px.PackextError, match="2 layers with private parameters, the names given .* have 3"):
        backward(o, model, loss, *data())
    coupled = px.extend(nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).double())
    with pytest.raises(px.CoupledSamplesError, match="BatchNorm"):
        backward(optimizer(coupled), coupled, loss, *data())
    assert all(p.grad is None for p in coupled.parameters())
    model.zero_grad()
    (x, y), said = data(0), "^Per-sample quantities .* the batch is empty. Make no pass for it"
    for kept in (True, False):  # what lies between model and loss is looked at by itself
        with pytest.raises(px.PackextError, match=said), px.optim.emit(optimizer(model)):
            loss(model(x) if kept else 2 * model(x), y).backward()
    o = optimizer(model)
    backward(o, model, loss, *data())
    model[0].requires_grad_(False)
    with pytest.raises(px.PackextError, match="frozen or added"):
        o.step()
    with pytest.raises(ValueError, match="contradict"):
        px.backpack(px.ClippedGrad(1.0), grad=False, exact_grad=True)


def test_poisson_batches() -> None:
    sampler = PoissonSampler(50, 0.1, 4000, torch.Generator().manual_seed(0))
    assert len(sampler) == 4000
    batches = list(sampler)
    inside = torch.zeros(4000, 50)
    for k, index in enumerate(batches):
        assert sorted(set(index)) == index
        inside[k, index] = 1
    error = math.sqrt(0.09 / 4000)
    assert (inside.mean(0) - 0.1).abs().max() < 4 * error
    sizes = inside.sum(1)
    assert float(sizes.var()) == pytest.approx(4.5, rel=0.12) and float((sizes == 0).float().mean()) > 0.001
    together = (inside.T @ inside / 4000).fill_diagonal_(0.01)
    assert (together - 0.01).abs().max() < 6 * math.sqrt(0.0099 / 4000)
    assert [*sampler][:10] != batches[:10]  # others when iterated again
    for wrong in ((0, 0.1, 3), (5, 0.0, 3), (5, 1.5, 3)):
        with pytest.raises(ValueError, match="rate in"):
            PoissonSampler(*wrong)


def test_the_state_of_another_private_optimizer_is_refused() -> None:
    """Else the step would fail, counted as one that was taken."""
    model = nn.Linear(3, 2)
    for kind, other, name in ((DPSGD, DPAdam, "betas"), (DPAdam, DPSGD, "momentum")):
        made, fresh = (k(model.parameters(), 0.1, **SETTINGS) for k in (kind, other))
        made.zero_grad()
        made.step()
        with pytest.raises(
            px.PackextError, match=f"of another optimizer than {other.__name__}: its groups have no {name}"
        ):
            fresh.load_state_dict(made.state_dict())
        assert not fresh.spent and not fresh.state
        again = kind(model.parameters(), 0.2, **SETTINGS)
        again.load_state_dict(made.state_dict())
        assert again.spent == made.spent and again.param_groups[0]["lr"] == 0.1


def test_copies_of_a_sampler_draw_batches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """But where the generator is the user's, as a seed is."""
    for seed in (None, 3):
        given = None if seed is None else torch.Generator().manual_seed(seed)
        sampler = PoissonSampler(50, 0.2, 5, given)
        copies = [copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))]
        fork = copy.deepcopy(sampler)
        fork.generator.set_state(sampler.generator.get_state())  # as memory has it
        first = list(sampler)
        assert all((list(c) == first) == (seed is not None) for c in copies)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            assert (list(fork) == first) == (seed is not None)


# -- what a sample adds -------------------------------------------------------------------------------


def total(o: Any) -> Tensor:
    """The sums of the next step, as one vector."""
    return torch.cat([s.flatten() for s in o.pending])


def test_what_is_discarded_does_not_count() -> None:
    """A batch that is done again in smaller parts, as after an error."""
    model, loss = extended()
    x, y = data()
    o = optimizer(model)
    backward(o, model, loss, x[:4], y[:4])
    o.zero_grad()
    assert not o.pending[0].any()
    backward(o, model, loss, x[:2], y[:2])
    backward(o, model, loss, x[2:], y[2:])
    want = torch.cat([s.flatten() for s in clipped(model, x, y, C).values()])
    torch.testing.assert_close(total(o), want, rtol=1e-9, atol=1e-12)
    o.zero_grad()
    state = o.state_dict()  # nothing is under way
    assert not state["private"]["spent"]


@pytest.mark.parametrize("kind", ["again", "another loss", "next step"])
def test_a_sample_is_in_one_pass_of_a_forward_pass(kind: str) -> None:
    model, loss = extended()
    x, y = data(1)
    o = optimizer(model, max_norm=0.1)
    out = model(x)
    with px.optim.emit(o):
        loss(out, y).backward(retain_graph=True)
    assert float(total(o).norm()) == pytest.approx(0.1)
    if kind == "next step":
        o.step()
        o.zero_grad()
    before = total(o)
    with pytest.raises(px.PackextError, match="second backward pass goes through one forward pass"):
        with px.optim.emit(o):
            (loss(out, y) if kind != "another loss" else px.extend(nn.MSELoss())(out, torch.zeros_like(out))).backward()
    assert torch.equal(total(o), before)
    backward(o, model, loss, x, y)
    other = optimizer(model, max_norm=0.1)  # which counts by itself
    out = model(x)
    for each in (o, other):
        with px.optim.emit(each):
            loss(out, y).backward(retain_graph=True)
    o.zero_grad()
    with px.optim.emit(o):  # the sum of two losses is one pass
        out = model(x)
        (loss(out, y) + 2 * px.extend(nn.CrossEntropyLoss())(out, 1 - y)).backward()
    assert float(total(o).norm()) <= 0.1 * (1 + 1e-9)


class Tagger(nn.Module):
    """Classes of words, or their loss as well."""

    def __init__(self, inside: Callable[..., Tensor] | None = None, **table: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.inside = nn.Embedding(7, 4, **table), nn.Linear(4, 3), inside

    def forward(self, ids: Tensor, y: Tensor | None = None) -> Tensor:
        out = self.head(self.table(ids).tanh())
        if self.inside is None or y is None:
            return out.mT
        return self.inside(out.flatten(0, 1), y.flatten())


def tagged(
    model: Tagger, loss: nn.Module | None, ids: Tensor, y: Tensor, make: Callable[[Any], Any] = lambda m: m
) -> tuple[Tensor, float]:
    """Clipped sum and sensitivity."""
    o = DPSGD(make(model).parameters(), 0.1, **{**SETTINGS, "max_norm": 0.5})
    with px.optim.emit(o):
        (model(ids, y) if loss is None else loss(model(ids), y)).backward()
    return total(o), o.sensitivity


class Scores(nn.NLLLoss):
    """A loss that has another as its base."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input.log_softmax(1), target)


CE, NLL = nn.functional.cross_entropy, nn.functional.nll_loss
WEIGHT = torch.tensor([100.0, 1.0, 1.0])
IGNORED = torch.tensor([[1, 2, -100], [1, -100, -100], [2, 1, 1], [0, 0, 0]])
SOME: dict[str, tuple[Any, Any, Tensor]] = {
    "weight": (nn.CrossEntropyLoss(WEIGHT), None, IGNORED.clamp(min=0)),
    "weight of nll": (Scores(WEIGHT), None, IGNORED.clamp(min=0)),
    "weight inside": (None, lambda z, y: CE(z, y, WEIGHT), IGNORED.clamp(min=0)),
    "weight of nll inside": (None, lambda z, y: NLL(z.log_softmax(1), y, WEIGHT), IGNORED.clamp(min=0)),
    "ignored": (nn.CrossEntropyLoss(), None, IGNORED),
    "ignored class": (nn.CrossEntropyLoss(ignore_index=2), None, IGNORED.clamp(min=0)),
    "ignored inside": (None, CE, IGNORED),
}


@pytest.mark.parametrize("name", SOME)
def test_means_that_other_samples_rescale_are_refused(name: str) -> None:
    """With a sum, the sum of clipped gradients with and without a sample differs by no more than is claimed."""
    loss, inside, y = SOME[name]
    ids = torch.arange(12).view(4, 3) % 7
    model = px.extend(Tagger(inside))
    loss = None if loss is None else px.extend(copy.deepcopy(loss))
    with pytest.raises(px.CoupledSamplesError, match='a sample changes what others add. Take reduction="sum"'):
        tagged(model, loss, ids, y)
    assert all(p.grad is None for p in model.parameters())
    tagged(model, loss, ids[2:3], y[2:3])  # there are no others
    if inside is not None:
        return
    loss.reduction = "sum"
    whole, sensitivity = tagged(model, loss, ids, y)
    for k in range(4):
        rest = [i for i in range(4) if i != k]
        change = float((whole - tagged(model, loss, ids[rest], y[rest])[0]).norm())
        assert 0.9 * sensitivity < change <= sensitivity * (1 + 1e-5)
    with px.backpack(px.ClippedGrad(0.5)):  # which nobody adds noise to
        px.extend(nn.CrossEntropyLoss(WEIGHT))(model(ids), y.clamp(min=0)).backward()


@pytest.mark.parametrize("inside", [False, True])
def test_means_over_as_many_targets_of_each_sample(inside: bool) -> None:
    """As those of language models, of which the last word has no target; against a loop over samples."""
    ids, y = torch.arange(12).view(4, 3) % 7, torch.tensor([[1, 2, -100], [-100, 1, 2], [2, 1, -100], [0, -100, 0]])
    model = px.extend(Tagger(CE if inside else None))
    loss = None if inside else px.extend(nn.CrossEntropyLoss())
    want = sum(tagged(model, loss, ids[k : k + 1], y[k : k + 1])[0] for k in range(4))
    torch.testing.assert_close(tagged(model, loss, ids, y)[0], want)
    parts = [tagged(model, loss, ids[part], y[part])[0] for part in (slice(3), slice(3, 4))]
    torch.testing.assert_close(sum(parts), want)  # as is known from the first pass
    probabilities = px.extend(nn.CrossEntropyLoss(WEIGHT))  # over the number of samples
    model = px.extend(Tagger())
    tagged(model, probabilities, ids, torch.rand(4, 3, 3))
    flat = px.extend(Tagger())
    o = DPSGD(flat.parameters(), 0.1, **{**SETTINGS, "max_norm": 0.5})
    with px.optim.emit(o):
        px.extend(nn.CrossEntropyLoss())(flat(ids).mT.transpose(0, 1).flatten(0, 1), y.T.flatten()).backward()
    torch.testing.assert_close(total(o), want)


class Two(nn.Module):
    """Two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.c((self.a(x) + self.b(z)).tanh())


def test_a_loss_behind_penalties_on_several_inputs_is_looked_at() -> None:
    model, loss = px.extend(Two()), px.extend(nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 4.0])))
    x, z, o = (
        torch.randn(6, 5, requires_grad=True),
        torch.randn(6, 3, requires_grad=True),
        DPSGD(model.parameters(), 0.1, **SETTINGS),
    )
    with pytest.raises(px.CoupledSamplesError, match="divides by the weights"), px.optim.emit(o):
        y = model(x, z)
        slopes = torch.autograd.grad(y.sum(), (x, z), create_graph=True)
        penalty = sum(g.square().sum(1) for g in slopes).mean()
        (loss(y, torch.arange(6) % 4) + penalty).backward()


UNEVEN = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1]]).bool()


def divergence() -> nn.Module:
    return nn.KLDivLoss(reduction="batchmean")


@pytest.mark.parametrize("make", [nn.CrossEntropyLoss, nn.MSELoss, divergence], ids=lambda kind: kind.__name__)
def test_means_over_chosen_rows(make: Any) -> None:
    """As many of each sample, in any order, or refused: another sample's rows would change the divisor."""
    ids = torch.arange(12).view(4, 3) % 7
    y = torch.arange(12).view(4, 3) % 3 if make is nn.CrossEntropyLoss else torch.ones(4, 3, 3)
    model, loss = px.extend(Tagger()), px.extend(make())

    def chosen(choose: Callable[[Tensor], Tensor], *samples: int) -> Tensor:
        o = DPSGD(model.parameters(), 0.1, **{**SETTINGS, "max_norm": 0.5})
        with px.optim.emit(o):
            loss(choose(model(ids[[*samples]]).mT), choose(y[[*samples]])).backward()
        return total(o)

    even = UNEVEN & torch.tensor([[1, 0, 1], [0, 1, 1], [0, 1, 1], [1, 1, 1]]).bool()
    even[3, 0] = True
    assert even.sum(1).tolist() == [2] * 4
    order = torch.randperm(8)
    whole = chosen(lambda t: t[even][order], 0, 1, 2, 3)
    torch.testing.assert_close(whole, sum(chosen(lambda t, k=k: t[even[k : k + 1]], k) for k in range(4)))
    for mask in (UNEVEN, even & (torch.arange(4) > 0)[:, None], ~even | (torch.arange(4) == 2)[:, None]):
        with pytest.raises(px.CoupledSamplesError, match="divides by the number of rows"):
            chosen(lambda t, mask=mask: t[mask], 0, 1, 2, 3)
    chosen(lambda t: t[UNEVEN[1:2]], 1)  # there are no others


def test_tables_that_count_all_samples_are_refused() -> None:
    ids, y = torch.arange(12).view(4, 3) % 7, IGNORED.clamp(min=0)
    model, loss = px.extend(Tagger(scale_grad_by_freq=True)), px.extend(nn.CrossEntropyLoss())
    with pytest.raises(px.CoupledSamplesError, match="scale_grad_by_freq divides .* table"):
        tagged(model, loss, ids, y)
    tagged(model, loss, ids, y, lambda m: m.head)


class Keeps(nn.Module):
    """Keeps something of what passes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("var", torch.ones(1))
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.mean.mul_(0.9).add_(x.detach().mean())
        elif self.how == "replaced":
            self.mean = 0.9 * self.mean + x.detach().mean()
        elif self.how == "by function":
            return nn.functional.batch_norm(x[:, None], self.mean, self.var, training=True).flatten(1)
        elif self.how == "counter":
            self.count += len(x)
        return x


class Channel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, None]


KEEPING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "in place": (lambda: Keeps("in place"), "1.mean"),
    "replaced": (lambda: Keeps("replaced"), "1.mean"),
    "by function": (lambda: Keeps("by function"), "1.mean, 1.var"),
    "instance norm": (
        lambda: nn.Sequential(Channel(), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten()),
        "1.1.running_mean, 1.1.running_var",
    ),
    "batch norm": (
        lambda: nn.Sequential(Channel(), nn.BatchNorm1d(1), nn.Flatten()), "1.1.running_mean, 1.1.running_var",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEEPING)
def test_what_a_forward_pass_keeps_has_no_noise(name: str) -> None:
    make, names = KEEPING[name]
    model = px.extend(nn.Sequential(nn.Linear(5, 6), make(), nn.Linear(6, 4)))
    loss, x, y = px.extend(nn.CrossEntropyLoss()), torch.randn(1, 5), torch.tensor([1])
    o = optimizer(model)
    out = model(x)
    with pytest.raises(px.PackextError, match=rf"written to the buffers {names}: .* leaves without noise"):
        with px.optim.emit(o):
            loss(out, y).backward()
    assert not total(o).any() and not o.spent
    with px.backpack(px.ClippedGrad(1.0)):
        loss(model(x), y).backward()
    model.zero_grad()
    if "norm" in name:
        model[1].eval()
        backward(o, model, loss, torch.randn(3, 5), torch.tensor([1, 0, 2]))


def test_buffers_that_hold_nothing_of_the_samples() -> None:
    narrow = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4))
    model = px.extend(nn.Sequential(nn.Linear(5, 6), Keeps("counter"), narrow))
    loss, x, y = px.extend(nn.CrossEntropyLoss()), torch.randn(3, 5), torch.tensor([1, 0, 2])
    before = narrow.parametrizations.weight[0]._u.clone()
    backward(optimizer(model), model, loss, x, y)
    assert model[1].count == 3 and not torch.equal(narrow.parametrizations.weight[0]._u, before)


class Routed(nn.Module):
    """Experts, of which the inputs choose, and a head that no loss reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.spare = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)]), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.experts[int(x[0, 0] > 0)](x), self.spare(x)


@pytest.mark.parametrize("per_layer", [False, True])
def test_what_no_sample_reaches_gets_noise(per_layer: bool) -> None:
    """So that nobody sees which expert was chosen; the sums of others are as they would be by themselves."""
    model, loss = px.extend(Routed().double()), px.extend(nn.CrossEntropyLoss())
    x, y = torch.ones(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    o = optimizer(model, per_layer=per_layer)
    std = 0.5 * C * (math.sqrt(3) if per_layer else 1)
    noise = dict(zip(dict(model.named_parameters()), noises(model, std), strict=True))
    with px.optim.emit(o):
        loss(model(x)[0], y).backward()
    reached = DPSGD(model.experts[1].parameters(), 0.1, **SETTINGS)
    with px.optim.emit(reached):
        loss(model(x)[0], y).backward(inputs=[*model.experts[1].parameters()])
    sums = {name: s.clone() for (name, _), s in zip(model.named_parameters(), o.pending, strict=True)}
    for k, want in zip(("weight", "bias"), reached.pending, strict=True):
        torch.testing.assert_close(sums[f"experts.1.{k}"], want)
        assert want.any() and not sums[f"experts.0.{k}"].any() and not sums[f"spare.{k}"].any()
    o.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, (sums[name] + noise[name]) / 10, rtol=1e-9, atol=1e-12)


# -- noise that is not drawn twice --------------------------------------------------------------------


@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_noise_is_drawn_anew_where_training_goes_on(way: str) -> None:
    """Two continuations of one training differ by their samples and by both of their noises."""
    o = DPSGD(nn.Linear(50, 40).parameters(), 0.0, **SETTINGS)
    o.step()
    if way == "state_dict":
        kept = copy.deepcopy(o.state_dict())
        assert not kept["private"]["generators"]  # which would give away all noise to come
        other = DPSGD(nn.Linear(50, 40).parameters(), 0.0, **SETTINGS)
        other.load_state_dict(kept)
    else:
        other = pickle.loads(pickle.dumps(o)) if way == "pickle" else copy.deepcopy(o)
    assert other.spent == o.spent
    drawn = []
    for each in (o, other, o):
        if way == "state_dict" and len(drawn) == 2:
            each.load_state_dict(kept)  # pyright: ignore[reportPossiblyUnboundVariable]
        each.zero_grad()
        each.step()
        drawn.append(torch.cat([p.grad.flatten() for g in each.param_groups for p in g["params"]]))
    std = 0.5 * C / 10
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float((drawn[a] - drawn[b]).std()) == pytest.approx(std * math.sqrt(2), rel=0.1)


def test_a_fork_draws_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who forks has a copy of the generators; here a copy that keeps them, as memory does."""
    drawn = []
    for seed in (None, 3):
        o = DPSGD(nn.Linear(30, 40).parameters(), 0.0, **SETTINGS, seed=seed)
        kept = [generator.get_state() for generator in o.generators]
        for process in (os.getpid(), -1, -1):
            monkeypatch.setattr(os, "getpid", lambda process=process: process)
            if len(drawn) % 3 == 1:
                for generator, state in zip(o.generators, kept, strict=True):
                    generator.set_state(state)
            o.zero_grad()
            o.step()
            drawn.append(o.param_groups[0]["params"][0].grad.clone())
        monkeypatch.undo()
    std = 0.5 * C / 10
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float((drawn[a] - drawn[b]).std()) == pytest.approx(std * math.sqrt(2), rel=0.1)
    assert torch.equal(drawn[3], drawn[4])  # which a seed is for


def test_optimizers_of_one_training_have_noise_of_their_own() -> None:
    """Also with one seed."""
    body, head = nn.Linear(30, 40), nn.Linear(40, 30)
    drawn = []
    for module in (body, head, copy.deepcopy(body)):
        o = DPSGD(module.parameters(), 0.0, **SETTINGS, seed=3)
        o.step()
        drawn.append(module.weight.grad.flatten())
    assert float(torch.corrcoef(torch.stack(drawn[:2]))[0, 1]) == pytest.approx(0, abs=5 / math.sqrt(1200))
    assert torch.equal(drawn[0], drawn[2])


# -- what does not fit together ------------------------------------------------------------------------


def test_sums_belong_to_their_parameters() -> None:
    """Two layers of one shape, of which now one is frozen and then the other."""
    model = px.extend(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    loss, x, y = px.extend(nn.CrossEntropyLoss()), torch.randn(3, 4), torch.tensor([0, 1, 2])
    o = optimizer(model)
    model[2].requires_grad_(False)
    backward(o, model, loss, x, y)
    model[0].requires_grad_(False)
    model[2].requires_grad_(True)
    for act in (o.step, lambda: backward(o, model, loss, x, y)):
        with pytest.raises(px.PackextError, match="frozen or added"):
            act()
    assert not o.spent


@pytest.mark.parametrize("what", ["max_norm", "per_layer"])
def test_the_noise_is_for_the_norm_that_sums_were_clipped_to(what: str) -> None:
    (model, loss), (x, y) = extended(), data()
    o = optimizer(model)
    before, after = getattr(o, what), 0.25 if what == "max_norm" else True

    def within() -> None:
        with px.optim.emit(o):
            setattr(o, what, after)
            loss(model(x), y).backward()

    for acts in ((o.step,), (lambda: backward(o, model, loss, x, y),), (within, o.step)):
        if acts[0] is not within:
            backward(o, model, loss, x, y)
            setattr(o, what, after)
        for act in acts:
            with pytest.raises(px.PackextError, match="max_norm or per_layer was changed"):
                act()
        assert not o.spent and all(p.grad is None for p in model.parameters())
        setattr(o, what, before)
        o.zero_grad()
    setattr(o, what, after)  # between two steps
    backward(o, model, loss, x, y)
    o.step()
    assert len(o.spent) == 1


def test_passes_that_would_not_count_are_refused() -> None:
    model, loss = extended()
    x, y = data()
    o = optimizer(model)
    backward(o, model, loss, x[:3], y[:3])
    loss(model(x[3:]), y[3:]).backward()
    with pytest.raises(px.PackextError, match="0.weight has a gradient that no pass within px.optim.emit"):
        o.step()
    with pytest.raises(px.PackextError, match="0.weight has a gradient that no pass within px.optim.emit"):
        backward(o, model, loss, x[3:], y[3:])
    o.zero_grad(set_to_none=False)
    for momentum in (0.0, 0.9):  # what a step has left is none of these, Nesterov's own sum neither
        o = optimizer(model, momentum=momentum, nesterov=momentum > 0)
        for _ in range(2):
            backward(o, model, loss, x, y)
            o.step()
        loss(model(x), y).backward()
        with pytest.raises(px.PackextError, match="0.weight has a gradient that no pass within px.optim.emit"):
            backward(o, model, loss, x, y)
        o.zero_grad()


def test_frozen_parameters_stay_where_they_are() -> None:
    model, loss = extended()
    x, y = data()
    loss(model(x), y).backward()
    o = optimizer(model, momentum=0.9)
    for p in (*model[3].parameters(), *model[4].parameters(), *model[5].parameters()):
        p.grad = None
    before = model[0].requires_grad_(False).weight.clone()
    assert model[0].weight.grad.any()
    backward(o, model, loss, x, y)
    o.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("name", ["max_norm", "noise_multiplier", "expected_batch_size", "seed"])
def test_a_group_has_no_privacy_of_its_own(name: str) -> None:
    model = network()
    groups = [{"params": model[0].parameters(), name: 0.01}, {"params": model[3].parameters()}]
    with pytest.raises(ValueError, match=f"{name} is of the whole DPSGD"):
        DPSGD(groups, 0.1, **SETTINGS)
    o = DPSGD(model[0].parameters(), 0.1, **SETTINGS)
    with pytest.raises(ValueError, match=f"{name} is of the whole DPSGD"):
        o.add_param_group(groups[0])


# -- without `.grad` ----------------------------------------------------------------------------------


class Shares(nn.Module):
    """A weight that is used twice, one that is made of another, and one that is used on its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))
        self.twice = nn.Linear(5, 5)
        self.table = nn.Embedding(6, 5)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, i: Tensor) -> Tensor:
        x = self.twice(torch.tanh(self.first(self.table(i)))) * self.scale
        return nn.functional.linear(self.twice(torch.tanh(x)), self.table.weight).mean(1)


@pytest.mark.parametrize("quantity", [px.ClippedGrad(0.3), px.Variance(), px.BatchGrad(), px.BatchL2Grad()])
def test_quantities_without_gradients_are_the_same(quantity: Any) -> None:
    torch.manual_seed(0)
    model, loss = px.extend(Shares().double()), px.extend(nn.CrossEntropyLoss())
    i, y = torch.randint(6, (4, 3)), torch.randint(6, (4,))
    found = []
    for grad in (True, False):
        with px.backpack(quantity, grad=grad, attach=False) as results:
            loss(model(i), y).backward()
        found.append({name: getattr(r, quantity.savefield) for name, r in results.items()})
    assert found[0].keys() == found[1].keys() == dict(model.named_parameters()).keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-12)


def test_gradients_that_nobody_asked_for_are_not_computed() -> None:
    model, loss = extended()
    with px.backpack(px.ClippedGrad(1.0), grad=False, parameters=model[3].parameters()):
        loss(model(data()[0]), data()[1]).backward()
    assert model[3].weight.grad is None and model[3].bias.grad is None
    assert model[0].weight.grad is not None and model[5].weight.grad is not None


# -- several processes --------------------------------------------------------------------------------

WAYS: tuple[Callable[[nn.Module], nn.Module], ...] = (
    lambda m: px.extend(m),
    lambda m: DistributedDataParallel(px.extend(m)),
    lambda m: px.extend(DistributedDataParallel(m)),
)


def together(rank: int) -> None:
    """Both processes end where one with all samples does: the noise is there once, with its own standard deviation."""
    loss, alone = px.extend(nn.CrossEntropyLoss()), px.extend(network())
    batches = [data(8, k) for k in range(3)]
    groups = [dist.new_group([k]) for k in range(2)]
    options: dict[str, Any] = {"adaptive": AdaptiveClipping(), "momentum": 0.9}
    reference = optimizer(alone, process_group=groups[rank], **options)
    for x, y in batches:
        backward(reference, alone, loss, x, y)
        reference.step()
    for build in WAYS:
        for cut in (4, 6):
            model = build(network())
            o = optimizer(model, seed=5 + rank, **options)
            for x, y in batches:
                mine = slice(None, cut) if rank == 0 else slice(cut, None)
                o.zero_grad()
                backward(o, model, loss, x[mine], y[mine])
                o.step()
            assert o.max_norm == pytest.approx(reference.max_norm) and o.spent == reference.spent
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
            same_everywhere(model)


def empty_on_one(rank: int) -> None:
    """A process without samples takes part in the step; without `no_sync()` the other one would wait for it."""
    for build in WAYS[:2]:
        loss, model, twin = px.extend(nn.CrossEntropyLoss()), build(network()), px.extend(network())
        x, y = data(4)
        o = optimizer(model)
        if rank == 0:
            with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
                backward(o, model, loss, x, y)
        o.step()
        sums = clipped(twin, x, y, C)
        for p, s, e in zip(model.parameters(), sums.values(), noises(twin, 0.5 * C), strict=True):
            torch.testing.assert_close(p.grad, (s + e) / 10, rtol=1e-9, atol=1e-12)


def all_see_what_is_wrong(rank: int) -> None:
    loss, model = px.extend(nn.CrossEntropyLoss()), px.extend(network())
    o = optimizer(model)
    x, y = data(4)
    backward(o, model, loss, x, y)
    if rank == 1:
        o._sums[0][0] = math.nan
    with pytest.raises(px.PackextError, match="not finite in 0.weight"):
        o.step()
    assert not o.spent


def none_waits_for_one_that_refuses(rank: int) -> None:
    """What is wrong in one process, and processes whose sums do not belong together."""
    x, y = data(4)
    for wrong in ("outside", "scaler", "norm", "frozen"):
        loss, model = px.extend(nn.CrossEntropyLoss()), px.extend(network())
        if wrong == "frozen" and rank:
            model[0].requires_grad_(False)
        o = optimizer(model, **({"max_norm": 2 * C} if wrong == "norm" and rank else {}))
        backward(o, model, loss, x, y)
        if wrong == "outside" and rank:
            loss(model(x), y).backward()
        if wrong == "scaler" and rank:
            o.grad_scale = torch.ones(())
        before = [p.clone() for p in model.parameters()]
        match = {"outside": "^rank 1: .* no pass within", "scaler": "^rank 1: DPSGD refuses GradScaler"}
        with pytest.raises(px.PackextError, match=match.get(wrong, "clip to other norms")):
            o.step()
        assert all(map(torch.equal, before, model.parameters())) and not o.spent


def same_everywhere(model: nn.Module) -> None:
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    assert torch.equal(*both)


def outside_of_the_group(rank: int) -> None:
    """Who is not in a group would neither draw its noise nor hear of it."""
    group = dist.new_group([1])
    o = DPSGD(network().parameters(), 0.1, **SETTINGS)
    if rank:
        DPSGD(network().parameters(), 0.1, **SETTINGS, process_group=group).step()
        return
    with pytest.raises(px.PackextError, match="Process 0 is not in the process group"):
        DPSGD(network().parameters(), 0.1, **SETTINGS, process_group=group)
    o.process_group = group
    before = [p.clone() for p in o.param_groups[0]["params"]]
    with pytest.raises(px.PackextError, match="Process 0 is not in the process group"):
        o.step()
    assert all(map(torch.equal, before, o.param_groups[0]["params"])) and not o.spent


def worker(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        for task in (
            together,
            empty_on_one,
            all_see_what_is_wrong,
            none_waits_for_one_that_refuses,
            outside_of_the_group,
        ):
            task(rank)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_processes() -> None:
    processes(worker)


# -- what it costs ------------------------------------------------------------------------------------


def test_accounting() -> None:
    """Against values of Opacus and of dp-accounting itself, by hand where there is a formula."""
    pytest.importorskip("dp_accounting")
    from packext.optim import Spent, epsilon, noise_multiplier

    spent = [Spent(1.0, 5.12, 2000)]
    assert epsilon(spent, 1000, 1e-5) == pytest.approx(1.2398, abs=1e-4)
    assert epsilon(spent, 1000, 1e-5, "rdp") == pytest.approx(1.4863, abs=1e-4)
    # The Gaussian mechanism (Balle & Wang 2018, Theorem 8): delta of epsilon is known.
    normal = torch.distributions.Normal(0.0, 1.0)
    for z, steps in ((2.0, 1), (4.0, 3)):
        found, mu = epsilon([Spent(z, 50.0, steps)], 50, 1e-5), math.sqrt(steps) / z
        parts = [normal.cdf(torch.tensor(s * mu / 2 - found / mu, dtype=torch.float64)) for s in (1, -1)]
        assert float(parts[0] - math.exp(found) * parts[1]) == pytest.approx(1e-5, rel=0.02)
    # A noisy count beside the gradients: together they have the noise multiplier of the step.
    rest, count = (0.5**-2 - 4.0**-2) ** -0.5, 2.0
    parts = [Spent(rest, 50.0, 1), Spent(2 * count, 50.0, 1)]
    assert epsilon(parts, 50, 1e-5) == pytest.approx(epsilon([Spent(0.5, 50.0, 1)], 50, 1e-5), rel=1e-3)
    assert epsilon([Spent(1.0, 5.0, 10), Spent(0.0, 5.0, 1)], 50, 1e-5) == math.inf
    assert epsilon([], 50, 1e-5) == 0.0
    for method, steps, batch in (("rdp", 500, 20.0), ("pld", 1, 1000.0)):
        z = noise_multiplier(0.5, 1e-5, steps, batch, 1000, method)
        assert 0.499 < epsilon([Spent(z, batch, steps)], 1000, 1e-5, method) <= 0.5 + 1e-6
    for wrong in ((-1.0, 5.0, 1), (1.0, 60.0, 1), (1.0, 5.0, 0)):
        with pytest.raises(ValueError, match="no number of private steps"):
            epsilon([Spent(*wrong)], 50, 1e-5)
    with pytest.raises(ValueError, match="delta"):
        epsilon(spent, 1000, 0.0)
    with pytest.raises(ValueError, match="pld"):
        epsilon(spent, 1000, 1e-5, "gdp")
    with pytest.raises(ValueError, match="epsilon > 0"):
        noise_multiplier(0.0, 1e-5, 1, 1.0, 1)
    for method in ("rdp", "pld"):
        with pytest.raises(ValueError, match="epsilon 300.0 is so large that a noise multiplier of 0.1 stays within"):
            noise_multiplier(300.0, 1e-5, 1, 10, 10, method)


def test_accounting_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"pip install 'packext\[privacy\]'"):
        px.optim.epsilon([], 10, 1e-5)
    with pytest.raises(ImportError, match="privacy"):
        px.optim.noise_multiplier(1.0, 1e-5, 1, 1.0, 10)


def contributed(model: nn.Module) -> Sequence[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(5, *p.shape, generator=draw, dtype=p.dtype) for p in model.parameters()]


@pytest.mark.parametrize("per_layer", [False, True])
def test_gradients_of_another_origin_are_clipped_alike(per_layer: bool) -> None:
    model, loss = extended()
    x, y = data()
    c = C_LAYER if per_layer else C
    sums = clipped(model, x, y, c, per_layer)
    extra = contributed(model)
    names = [name for name, _ in model.named_parameters()]
    for name, r in zip(names, extra, strict=True):
        same = [q for n, q in zip(names, extra, strict=True) if not per_layer or n[0] == name[0]]
        norms = torch.stack([q.flatten(1).norm(dim=1) for q in same]).norm(dim=0)
        assert (norms > c).any() or per_layer
        sums[name] += torch.tensordot((c / norms).clamp(max=1), r, 1)
    o = optimizer(model, per_layer=per_layer, max_norm=c, noise_multiplier=0.0)
    backward(o, model, loss, x, y)
    o.contribute(extra)
    o.step()
    for p, s in zip(model.parameters(), sums.values(), strict=True):
        torch.testing.assert_close(p.grad, s / 10, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="rows"):
        o.contribute(extra[1:])
    scalar = nn.Parameter(torch.zeros(()))
    o = DPSGD([("one", scalar)], 0.1, **{**SETTINGS, "noise_multiplier": 0.0})
    o.contribute([torch.tensor([1.0, -2.0 * C])])
    torch.testing.assert_close(o.pending[0], torch.tensor(1.0 - C))
    o.contribute([torch.zeros(0)])  # a step may draw none
    torch.testing.assert_close(o.pending[0], torch.tensor(1.0 - C))
