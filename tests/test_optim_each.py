"""What one optimizer does and others do not."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import packext as px
from packext import optim
from packext.optim import _precondition as precondition
from tests import optim_oracles as oracles

LOSS = px.extend(nn.CrossEntropyLoss())


pytestmark = pytest.mark.usefixtures("double")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return px.extend(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def data(n: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=draw), torch.randint(3, (n,), generator=draw)


def passed(model: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor], loss: Any = LOSS) -> Tensor:
    optimizer.zero_grad()
    with optim.emit(optimizer):
        value = loss(model(batch[0]), batch[1])
        value.backward()
    return value.detach()


def theta(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters()}


# -- products with the inverses -------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_gradients_of_few_samples_are_preconditioned_by_their_range(bias: str, monkeypatch: Any) -> None:
    """Steps are those of plain products, also where the gradient is not what the passes gave or has more samples."""
    drawn = torch.Generator().manual_seed(1)
    steps = [(torch.randn(n, 200, generator=drawn), torch.randint(3, (n,), generator=drawn)) for n in (5, 5, 5, 30)]

    def train(by_range: bool) -> tuple[dict[str, Tensor], list[bool]]:
        took: list[bool] = []
        with monkeypatch.context() as patch:
            by = precondition._by_range

            def seen(*given: Any) -> Tensor | None:
                found = by(*given) if by_range else None
                took.append(found is not None)
                return found

            patch.setattr(precondition, "_by_range", seen)
            torch.manual_seed(0)
            model = px.extend(nn.Sequential(nn.Linear(200, 150), nn.Tanh(), nn.Linear(150, 3)))
            optimizer = optim.KFAC(model.parameters(), 0.1, factors_every=4, inverses_every=4, bias=bias)
            for k, (x, y) in enumerate(steps):
                passed(model, optimizer, (x, y))
                if k == 2:  # by hand, and of full rank
                    model[0].weight.grad += 1e-3 * torch.randn(150, 200, generator=torch.Generator().manual_seed(2))
                optimizer.step()
        return theta(model), took

    (found, took), (expected, _) = train(True), train(False)
    assert took == [True, False, True, False, False, False, False, False]  # of both layers; the second is too small
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_rank_is_not_known_with_weight_decay_and_of_pooled_positions(monkeypatch: Any) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(precondition, "_by_range", lambda *given: tried.append(given))
    for options in ({"weight_decay": 0.1}, {"approx": "reduce"}, {}):
        model = network()
        optimizer = optim.KFAC(model.parameters(), **options)
        passed(model, optimizer, data())
        optimizer.step()
        assert bool(tried) == (not options)


# -- emit -----------------------------------------------------------------------------------------------


def test_any_object_with_quantities_gets_them_as_attributes() -> None:
    class Own:
        def quantities(self) -> list[Any]:
            return [px.BatchL2Grad()]

    model, (x, y) = network(), data()
    with optim.emit(Own()) as results:
        LOSS(model(x), y).backward()
    assert isinstance(Own(), optim.Emitting)
    torch.testing.assert_close(results.batch_l2, sum(p.batch_l2 for p in model.parameters()))


def test_emit_finds_what_is_within_another_optimizer() -> None:
    class Around(torch.optim.Optimizer):
        """As accelerate's."""

        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer

    model, (x, y) = network(), data()
    optimizer = optim.KFAC(model.parameters())
    with optim.emit(Around(Around(optimizer))):
        LOSS(model(x), y).backward()
    optimizer.step()
    assert optimizer.steps == 1
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    for plain in (sgd, Around(sgd)):
        with pytest.raises(ValueError, match=r"emit\(SGD\): it asks nothing .* Leave emit out"), optim.emit(plain):
            pass


def test_passes_that_go_to_a_context_within_are_refused() -> None:
    """A private optimizer would take a step of noise alone, as after an empty batch."""
    model, batch = network(), data()
    private = {"max_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 12}
    for optimizer in (
        optim.DPSGD(model.parameters(), **private),
        optim.MSVAG(model.parameters()),
        optim.NoiseScale(),
    ):
        text = rf"emit\({type(optimizer).__name__}\): all passes within went to another context within"
        with pytest.raises(px.PackextError, match=text), optim.emit(optimizer), px.backpack(px.BatchL2Grad()):
            LOSS(model(batch[0]), batch[1]).backward()
    with optim.emit(optimizer):  # one of two may
        with px.backpack(px.BatchL2Grad()):
            LOSS(model(batch[0]), batch[1]).backward()
        LOSS(model(batch[0]), batch[1]).backward()


def test_emit_refuses_what_the_optimizer_chooses() -> None:
    model = network()
    optimizer = optim.KFAC(model.parameters())
    chosen = {"attach": True, "parameters": [], "pass_hook": print, "accumulate": True, "group": None}
    for name, value in {"scale": "sample", **chosen}.items():
        with pytest.raises(ValueError, match=rf"emit\(KFAC, {name}=...\)"), optim.emit(optimizer, **{name: value}):
            pass
    empirical = optim.KFAC(model.parameters(), fisher="empirical")
    with pytest.raises(ValueError, match="squares of gradients do not scale"), optim.emit(empirical, scale=0.5):
        pass
    for _ in range(2):
        with optim.emit(empirical):
            LOSS(model(data()[0]), data()[1]).backward()
    with pytest.raises(px.PackextError, match="Take a step after each pass"):
        empirical.step()


# -- Kronecker factors ----------------------------------------------------------------------------------


def test_steps_between_two_batches_of_factors_ask_nothing() -> None:
    model = network()
    optimizer = optim.KFAC(model.parameters(), factors_every=3, inverses_every=6)
    asked = []
    for _ in range(7):
        asked.append(len(optimizer.quantities()))
        passed(model, optimizer, data())
        optimizer.step()
    assert asked == [1, 0, 0, 1, 0, 0, 1]
    assert optimizer.state[model[0].weight]["batches"] == 3


def thawed() -> tuple[nn.Sequential, optim.KFAC]:
    """A layer that was frozen in the first of four steps, of which the factors are those."""
    model = network()
    model[2].requires_grad_(False)
    optimizer = optim.KFAC(model.named_parameters(), factors_every=4, inverses_every=4)
    passed(model, optimizer, data())
    optimizer.step()
    model[2].requires_grad_(True)
    return model, optimizer


def test_a_first_gradient_between_two_batches_is_reported_and_waits_one_step() -> None:
    model, optimizer = thawed()
    before = theta(model)
    passed(model, optimizer, data())
    with pytest.warns(optim.SkippedStep, match=r"2.weight, shape \[3, 5\] has its first gradient between two batches"):
        optimizer.step()
    assert all(torch.equal(p, before[k]) for k, p in model.named_parameters()) and optimizer.steps == 1
    passed(model, optimizer, data())
    optimizer.step()
    assert optimizer.steps == 2 and optimizer.quantities() == []
    assert all(not torch.equal(p, before[k]) for k, p in model.named_parameters())


def test_a_run_that_is_saved_while_it_waits_goes_on_alike() -> None:
    model, optimizer = thawed()
    passed(model, optimizer, data())
    with pytest.warns(optim.SkippedStep, match="between two batches"):
        optimizer.step()
    other = network()
    other.load_state_dict(model.state_dict())
    resumed = optim.KFAC(other.named_parameters(), factors_every=4, inverses_every=4)
    resumed.load_state_dict(optimizer.state_dict())
    assert optimizer.lacking and resumed.lacking
    for m, o in ((model, optimizer), (other, resumed)):
        passed(m, o, data())
        o.step()
        assert o.steps == 2 and not o.lacking
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", [optim.KFAC, optim.EKFAC, optim.SINGD])
@pytest.mark.parametrize(
    ("index", "frozen"),
    [(1, False), (1, True), (0, False), (0, True)],
    ids=["bias", "thawed bias", "weight", "thawed weight"],
)
def test_a_parameter_may_be_frozen_or_thawed_that_has_one_block_with_another(
    kind: Any, index: int, frozen: bool
) -> None:
    """Factors of that layer begin anew: with no average and no momentum the step is that of a new optimizer."""
    every: dict[Any, list[str]] = {
        optim.KFAC: ["factors_every", "inverses_every"], optim.EKFAC: ["scales_every", "basis_every"],
        optim.SINGD: ["every"],
    }  # fmt: skip
    options = {"fisher": "exact", "momentum": 0.0, "lr": 0.1} | ({} if kind is optim.SINGD else {"kl_clip": None})
    for intervals, when in (((1, 1), 3), ((2, 12), 7), ((2, 12), 8)):
        model = network()
        p = [*model.parameters()][index].requires_grad_(not frozen)
        chosen = dict(zip(every[kind], intervals, strict=False))
        optimizer = kind(
            model.named_parameters(), **options, **chosen, **({} if kind is optim.SINGD else {"decay": 0.0})
        )
        for k in range(when):
            passed(model, optimizer, data(seed=k))
            optimizer.step()
        p.requires_grad_(frozen)
        passed(model, optimizer, data(seed=7))
        waits = any(when % chosen[name] for name in every[kind])
        if waits:
            with pytest.warns(optim.SkippedStep, match="between two batches of curvature; the next step has one"):
                optimizer.step()
            passed(model, optimizer, data(seed=7))
        twin = copy.deepcopy(model)
        optimizer.step()
        assert optimizer.steps == when + 1 and optimizer.skipped == waits
        fresh = kind(twin.named_parameters(), **options)
        passed(twin, fresh, data(seed=7))
        fresh.step()
        for name in ("0.weight", "0.bias"):
            found = model.get_parameter(name).detach()
            torch.testing.assert_close(found, twin.get_parameter(name).detach(), rtol=1e-10, atol=1e-12)
        for k in range(3):
            passed(model, optimizer, data(seed=k))
            optimizer.step()
        assert optimizer.steps == when + 4


def test_a_parameter_that_is_never_used_leaves_the_bases_as_they_are() -> None:
    asked, ends = [], []
    for more in ({}, {"idle": nn.Linear(2, 2)}):
        model = network()
        idle = [p for each in more.values() for p in each.parameters()]
        optimizer = optim.EKFAC([*model.parameters(), *idle], scales_every=1, basis_every=100, fisher="exact")
        asked.append([])
        assert not any(optimizer.state[p] for p in idle)  # torch makes what is looked at
        for seed in range(6):
            asked[-1] += [q.savefield for q in optimizer.quantities()]
            passed(model, optimizer, data(seed=seed))
            optimizer.step()
        ends.append(theta(model))
    assert asked[0] == asked[1] == ["kfac"] * 3 + ["ekfac"] * 3
    torch.testing.assert_close(*ends)


def test_a_first_gradient_between_two_bases_waits_one_step() -> None:
    model = network()
    model[2].requires_grad_(False)
    optimizer = optim.EKFAC(model.named_parameters(), scales_every=1, basis_every=100)
    for seed in range(4):
        passed(model, optimizer, data(seed=seed))
        optimizer.step()
    model[2].requires_grad_(True)
    passed(model, optimizer, data())
    with pytest.warns(optim.SkippedStep, match=r"2.weight, shape \[3, 5\] has its first gradient between two batches"):
        optimizer.step()
    for fields in (["kfac"], ["ekfac"]):
        assert [q.savefield for q in optimizer.quantities()] == fields
        passed(model, optimizer, data())
        optimizer.step()
    assert optimizer.steps == 6


class Experts(nn.Module):
    """Two experts, each called with the samples that are its own; weights in one tensor, or in layers."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(5, 3)
        self.own = nn.Parameter(torch.randn(2, 5, 4)) if together else nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5)])

    def forward(self, x: Tensor) -> Tensor:
        h, out = self.first(x), x.new_zeros(len(x), 5)
        for k in range(2):
            to = (x[:, 0] == k).nonzero()[:, 0]
            one = self.own[k]
            out = out.index_add(0, to, one(h[to]) if isinstance(one, nn.Linear) else nn.functional.linear(h[to], one))
        return self.last(torch.tanh(out))


@pytest.mark.parametrize("together", [False, True])
def test_an_expert_that_nothing_reached_keeps_its_a(together: bool) -> None:
    torch.manual_seed(0)
    model = px.extend(Experts(together))
    optimizer = optim.KFAC(
        model.named_parameters(), lr=1e-12, factors_every=1, inverses_every=1, decay=0.5, bias="separate"
    )
    x, y = data()
    expert = model.own if together else model.own[1].weight
    held = []
    for first in (torch.arange(12.0) % 2, torch.zeros(12), torch.zeros(12)):
        passed(model, optimizer, (torch.cat([first[:, None], x[:, 1:]], 1), y))
        optimizer.step()
        held.append([f[-1] if together else f for f in optimizer.state[expert]["factors"]])
    for _, inputs in held[1:]:
        torch.testing.assert_close(inputs, held[0][1], rtol=1e-9, atol=0)
    torch.testing.assert_close(held[2][0], held[0][0] / 4, rtol=1e-9, atol=0)


def test_a_singular_factor_is_refused_by_name() -> None:
    model = network()
    optimizer = optim.Preconditioned(model.named_parameters(), "kflr", damping=0.0)
    passed(model, optimizer, data())
    with pytest.raises(px.PackextError, match=r"Preconditioned, .*\.(weight|bias), .* not positive definite.* More"):
        optimizer.step()
    assert not optimizer.state and optimizer.steps == 0


def test_a_bias_without_its_weight_is_refused() -> None:
    model = network()
    groups = [{"params": [model[0].weight, *model[2].parameters()]}, {"params": [model[0].bias]}]
    optimizer = optim.KFAC(groups)
    passed(model, optimizer, data())
    text = r'parameter 0 of group 1.*with its weight, parameter 0 of group 0.*"separate"'
    with pytest.raises(px.PackextError, match=text):
        optimizer.step()
    optimizer = optim.KFAC(groups, bias="separate")
    passed(model, optimizer, data())
    optimizer.step()


def test_the_balance_of_the_damping_does_not_depend_on_the_factors_scales() -> None:
    model = network()
    ends = []
    for c in (1.0, 64.0):
        optimizer = optim.Preconditioned(model.parameters(), "kflr", lr=0.1, damping=0.1)
        passed(model, optimizer, data())
        for held in optimizer._received.values():
            (pair,) = held["kflr"].pairs
            if pair.inputs is not None:
                scaled = pair._replace(outputs=pair.outputs / c, inputs=pair.inputs * c)
                held["kflr"] = type(held["kflr"])([scaled], held["kflr"].n)
        before = theta(model)
        optimizer.step()
        ends.append(theta(model))
        model.load_state_dict(before)
    for k in ends[0]:
        torch.testing.assert_close(ends[0][k], ends[1][k], rtol=1e-12, atol=1e-14)


def test_the_factors_of_one_sample_of_softmax_regression_are_the_ggn() -> None:
    model, (x, y) = px.extend(nn.Sequential(nn.Linear(4, 3))), data(1)
    optimizer = optim.Preconditioned(model.parameters(), "kflr", lr=0.0)
    passed(model, optimizer, (x, y))
    optimizer.step()
    p = torch.softmax(model(x)[0].detach(), 0)
    h = torch.diag(p) - torch.outer(p, p)
    ggn = torch.kron(h, torch.outer(x[0], x[0]))
    torch.testing.assert_close(px.linalg.kron(optimizer.state[model[0].weight]["factors"]), ggn, rtol=1e-12, atol=1e-14)


class Mixed(nn.Module):
    """Weights of many kinds: a table, a transposed and a grouped convolution, a weight stored [I, O] with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 4)
        self.up = nn.ConvTranspose1d(4, 4, 2)
        self.groups = nn.Conv1d(4, 4, 2, groups=2)
        self.norm = nn.LayerNorm(4)
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.groups(torch.tanh(self.up(self.table(ids).mT))).mean(2)
        return self.norm(x) @ self.weight + self.bias


@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("kind", [optim.KFAC, optim.EKFAC, optim.SINGD])
def test_weights_of_all_kinds_are_multiplied_along_their_own_axes(kind: Any, bias: str) -> None:
    model = px.extend(Mixed())
    ids, y = torch.randint(7, (9, 5)), torch.randint(3, (9,))
    damping, lr = 0.02, 0.5
    options = {"momentum": 0.0, "fisher": "exact", "bias": bias, "lr": lr, "damping": damping}
    optimizer = kind(model.parameters(), **options, **({} if kind is optim.SINGD else {"kl_clip": None}))
    with px.backpack(px.KFAC(fisher="exact", bias=bias), attach=False) as results:
        LOSS(model(ids), y).backward()
    before, found = theta(model), {k: r.kfac for k, r in results.items()}
    passed(model, optimizer, (ids, y))
    grads = {k: p.grad.clone() for k, p in model.named_parameters()}
    optimizer.step()
    joints = {k: f for k, f in found.items() if isinstance(f, px.linalg.Joint)}
    assert len(joints) == (0 if bias == "separate" else 1)
    changed = 0
    for name, factors in found.items():
        if isinstance(factors, px.linalg.Joint):
            continue
        partner = next((k for k, j in joints.items() if j.weight is model.get_parameter(name)), None)

        def whole(values: dict[str, Tensor], name: str = name, partner: str | None = partner) -> Tensor:
            return values[name] if partner is None else joints[partner].join(values[name], values[partner])

        g, change = whole(grads).flatten(), whole(before).flatten() - whole(theta(model)).flatten()
        if kind is optim.SINGD:
            ones = [[torch.eye(f.shape[-1])] if f.dim() < 3 else [torch.eye(f.shape[-1])] * len(f) for f in factors]
            blocks = [dense(each, roots) for each, roots in zip(split(factors), split_list(ones), strict=True)]
            expected = torch.block_diag(*blocks) @ g
        elif kind is optim.EKFAC:
            expected = torch.linalg.solve(px.linalg.kron(factors) + damping * torch.eye(len(g)), g)
        else:
            inverses = [oracles.split_inverse([diagonal(f) for f in each], damping) for each in split(factors)]
            expected = torch.block_diag(*inverses) @ g
        torch.testing.assert_close(change, lr * expected, rtol=1e-8, atol=1e-11, msg=name)
        changed += 1
    assert changed == 9 - len(joints)


def diagonal(f: Tensor) -> Tensor:
    return torch.diag(f) if f.dim() == 1 else f


def split(factors: list[Tensor]) -> list[list[Tensor]]:
    """By groups."""
    groups = max((len(f) for f in factors if f.dim() == 3), default=1)
    return [[f[g] if f.dim() == 3 else f for f in factors] for g in range(groups)]


def split_list(ones: list[list[Tensor]]) -> list[list[Tensor]]:
    groups = max(len(each) for each in ones)
    return [[each[g % len(each)] for each in ones] for g in range(groups)]


def dense(factors: list[Tensor], roots: list[Tensor], beta: float = 1e-2, damping: float = 0.02) -> Tensor:
    """SINGD's preconditioner after its first step, from the identity."""
    factors = [diagonal(f) for f in factors]
    out = torch.ones(1, 1)
    for k, f in enumerate(factors):
        other = factors[1 - k].trace() / len(factors[1 - k]) if len(factors) == 2 else 1.0
        m = 0.5 * (other * f + (damping - 1) * roots[k])
        root = roots[k] - beta * m
        out = torch.kron(out, root @ root.T)
    return out


def test_damping_follows_the_reduction_ratio() -> None:
    model, (x, y) = network(), data()
    optimizer = optim.KFAC(
        model.parameters(), fisher="exact", factors_every=1, inverses_every=1, adapt_every=2, lr=0.5, damping=0.3,
        weight_decay=0.1, decay=0.0,
    )  # fmt: skip
    for k in range(4):
        before = theta(model)
        value = passed(model, optimizer, (x, y))
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        assert optimizer.adapts == (k % 2 == 1)
        if k % 2 == 0:
            with pytest.raises(px.PackextError, match="none of those every adapt_every=2"):
                optimizer.adapt(value, value)
            continue
        after, damping = theta(model), optimizer.param_groups[0]["damping"]
        predicted = change = 0.0
        for block in oracles.parts_of(before, True):
            d = oracles.matrix({n: after[n] - before[n] for n in block}, block).flatten()
            g = oracles.matrix({n: grads[n] + 0.1 * before[n] for n in block}, block).flatten()
            b, a = oracles.factors(before, x, True)[block[0]]
            c = torch.kron(b.contiguous(), a.contiguous())
            predicted += float(g @ d + 0.5 * d @ (c @ d) + 0.5 * (damping + 0.1) * d @ d)
        change = float(oracles.loss(after, x, y)) - float(value)
        change += 0.05 * sum(float(after[n].square().sum() - before[n].square().sum()) for n in after)
        ratio = optimizer.adapt(value, oracles.loss(after, x, y))
        assert ratio == pytest.approx(change / predicted, rel=1e-9) and ratio > 0.75
        assert optimizer.param_groups[0]["damping"] == pytest.approx(damping * 0.95**2)
    for after, factor in ((value, 1 / 0.95**2), (math.inf, 1 / 0.95**2)):  # no progress, and a loss that blows up
        for _ in range(2):
            passed(model, optimizer, (x, y))
            optimizer.step()
        damping = optimizer.param_groups[0]["damping"]
        optimizer.adapt(value, after)
        assert optimizer.param_groups[0]["damping"] == pytest.approx(damping * factor)


def test_damping_where_the_model_predicts_no_progress() -> None:
    model, batch = network(), data()
    for lr, damping in ((0.0, 1e-3), (100.0, 1e-3)):  # nothing predicted, and a rise
        optimizer = optim.KFAC(
            model.parameters(), lr=lr, factors_every=1, inverses_every=1, adapt_every=1, kl_clip=None
        )
        value = passed(model, optimizer, batch)
        optimizer.step()
        assert math.isnan(optimizer.adapt(value, value)) and optimizer.param_groups[0]["damping"] == damping
        value = passed(model, optimizer, batch)
        optimizer.step()
        assert optimizer.adapt(value, math.inf) == -math.inf
        assert optimizer.param_groups[0]["damping"] == pytest.approx(damping / 0.95)


def test_a_step_that_was_skipped_at_its_end_is_none_to_adapt_to() -> None:
    model, rest = network(), nn.Parameter(torch.full((2,), math.inf))
    apart = {"params": [rest], "fallback": True, "lr": 0.1, "weight_decay": 0.1}
    optimizer = optim.KFAC([{"params": list(model.parameters())}, apart], adapt_every=1)
    passed(model, optimizer, data())
    rest.grad = torch.ones(2)
    with pytest.warns(optim.SkippedStep, match="the update of parameter 0 of group 1"):
        optimizer.step()
    assert not optimizer.adapts


def test_a_step_that_nobody_has_adapted_to_is_past() -> None:
    model, rest = network(), nn.Parameter(torch.ones(2))
    apart = {"params": [rest], "fallback": True, "lr": 0.1}
    optimizer = optim.KFAC([{"params": list(model.parameters())}, apart], adapt_every=2)
    for k in range(5):
        value = passed(model, optimizer, data())
        optimizer.step()
        assert optimizer.adapts == (k % 2 == 1)
    with pytest.raises(px.PackextError, match="none of those every adapt_every=2"):
        optimizer.adapt(value, value)
    optimizer.zero_grad()
    rest.grad = torch.ones(2)  # a step of AdamW alone
    optimizer.step()
    assert optimizer.steps == 6 and not optimizer.adapts


def test_damping_is_not_adapted_to_steps_of_adamw() -> None:
    model, (x, y) = network(), data()
    for lr in (0.0, 0.1):
        apart = {"params": [*model[0].parameters()], "fallback": True, "lr": lr}
        optimizer = optim.KFAC([{"params": [*model[2].parameters()]}, apart], adapt_every=1, fisher="exact")
        value = passed(model, optimizer, (x, y))
        optimizer.step()
        if lr:
            with pytest.raises(px.PackextError, match=r"AdamW has moved parameter 0 of group 1, shape \[5, 4\]"):
                optimizer.adapt(value, LOSS(model(x), y).detach())
        else:
            assert optimizer.adapt(value, LOSS(model(x), y).detach()) > 0


def test_a_bound_over_all_parameters_is_one() -> None:
    def groups(one: Any, other: Any, what: str = "kl_clip") -> list[dict[str, Any]]:
        return [{"params": [*model[k].parameters()], what: bound} for k, bound in ((0, one), (2, other))]

    model = network()
    with pytest.raises(ValueError, match="kl_clip bounds the step of all parameters together, and is None in"):
        optim.KFAC(groups(None, 1e-6))
    with pytest.raises(ValueError, match="Optimizer: max_norm .* is 1.0 in group 0 and 2.0 in group 1: give all"):
        optim.Optimizer(groups(1.0, 2.0, "max_norm"), [optim.ClipNorm(1.0), optim.Descend()])
    optimizer = optim.KFAC(groups(1e-6, 1e-6))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1]["kl_clip"] = optimizer.param_groups[1]["kl_clip"] = 1.0
    with pytest.raises(ValueError, match="kl_clip .* 1e-06 in group 0 and 1.0 in group 1"):
        optimizer.load_state_dict(saved)
    passed(model, optimizer, data())
    before = theta(model)
    with pytest.raises(ValueError, match="kl_clip .* 1e-06 in group 0 and 1.0 in group 1"):
        optimizer.step()
    assert all(torch.equal(p, before[k]) for k, p in model.named_parameters()) and optimizer.steps == 0
    fallback = {"params": [*model[2].parameters()], "fallback": True, "lr": 0.1}
    optim.KFAC([{"params": [*model[0].parameters()], "kl_clip": 1.0}, fallback])  # AdamW is not bounded


def test_intervals_that_do_not_fit_are_refused() -> None:
    params = list(network().parameters())
    private: Any = {"max_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4.0}
    for make, text in (
        (lambda: optim.KFAC(params, factors_every=10, inverses_every=15), "multiple of factors_every, got 15 and 10"),
        (lambda: optim.EKFAC(params, scales_every=10, basis_every=15), "multiple of scales_every, got 15 and 10"),
        (lambda: optim.KFAC(params, factors_every=0), "int of 1 or more steps, got 0"),
        (lambda: optim.KFAC(params, adapt_every=-1), "adapt_every must be an int of 0 or more, got -1"),
        (lambda: optim.Preconditioned(params, "hessian"), "curvature must be one of kfac, kflr, kfra, got 'hessian'"),
        (lambda: optim.Sophia(params, curvature="kfac"), "must be one of diag_ggn_exact, diag_ggn_mc, diag_ef"),
        (lambda: optim.Preconditioned(params, "kfac", mc_samples=0), "mc_samples"),
        (lambda: optim.KFAC(params, fisher="true"), "fisher must be one of mc, exact, empirical"),
        (lambda: optim.KFAC(params, momentum=1.0), "momentum must be at least 0 and less than 1, got 1.0"),
        (lambda: optim.KFAC([{"params": params, "maximize": True}]), "KFAC: maximize must be left out"),
        (lambda: optim.KFAC(params, decay=1.5), "Kronecker: decay must be at least 0 and less than 1, got 1.5"),
        (lambda: optim.Preconditioned(params, "diag_ggn_mc", decay=-1.0), "Diagonal: decay must be at least 0"),
        (lambda: optim.SINGD(params, precondition_momentum=-3.0), "precondition_momentum must be at least 0"),
        (lambda: optim.Sophia([{"params": params, "betas": [0.9, 1.0]}]), "betas must be at least 0 and less than 1"),
        (lambda: optim.Sophia([{"params": params, "betas": 0.9}]), "Sophia: betas must be two numbers, got 0.9"),
        (lambda: optim.Sophia([{"params": params, "betas": [0.9]}]), r"betas must be two numbers, got \[0.9\]"),
        (lambda: optim.KFAC(params, seed=-1), "KFAC: seed must be an int of 0 or more, got -1"),
        (lambda: optim.KFAC([{"params": params, "seed": 0.5}]), "seed must be an int of 0 or more, got 0.5"),
        (lambda: optim.KFAC([{"params": params, "lr": "0.1"}]), "KFAC: lr must be a number, got '0.1'"),
        (lambda: optim.KFAC([{"params": params, "lr": None}]), "KFAC: lr must be a number, got None"),
        (lambda: optim.SINGD([{"params": params, "momentum": None}]), "SINGD: momentum must be a number, got None"),
        (lambda: optim.KFAC([{"params": params, "damping": torch.ones(2)}]), "damping must be a number, got tensor"),
        (lambda: optim.DPSGD(params, float("inf"), **private), "DPSGD: lr must be finite and not negative, got inf"),
        (lambda: optim.DPAdam(params, math.inf, **private), "DPAdam: lr must be finite and not negative, got inf"),
        (lambda: optim.Sophia(params, betas=(0.9, 1.0)), "betas must be at least 0 and less than 1"),
        (lambda: optim.AdaHessian(params, power=2.0), "power must be between 0 and 1, got 2.0"),
        (lambda: optim.SPRING(params, max_step=0.0), "max_step must be positive, or None, got 0.0"),
        (lambda: optim.SPRING([{"params": params[:2]}, {"params": params[2:]}]), "give it one group"),
        (
            lambda: optim.SPRING(
                [{"params": params[:1], "fallback": True, "lr": 0.1}, {"params": params[1:2]}, {"params": params[2:]}]
            ),
            "give it one group",
        ),
        (lambda: optim.KFAC([nn.Parameter(torch.zeros(2, dtype=torch.cfloat))]), "takes real parameters, got complex"),
    ):
        with pytest.raises(ValueError, match=text):
            make()


# -- entry by entry -------------------------------------------------------------------------------------


def test_adahessian_with_the_same_signs() -> None:
    """A convolution among the layers: its estimate is the mean over the kernel."""
    torch.manual_seed(0)
    model = px.extend(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)))
    optimizer = optim.AdaHessian(model.parameters(), lr=0.1, power=0.7, weight_decay=0.01)
    names, moments = list(dict(model.named_parameters())), {}
    draw = torch.Generator()
    for t in range(1, 6):
        x, y = torch.randn(6, 1, 3, 3), torch.randint(3, (6,))
        values = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
        draw.manual_seed(int(np.random.SeedSequence((0, t - 1, 0)).generate_state(1, np.uint64)[0]))
        z = [torch.randint(2, v.shape, generator=draw).to(v) * 2 - 1 for v in values.values()]
        with px.disable():
            loss = nn.functional.cross_entropy(functional_call(model, values, (x,)), y)
            g = torch.autograd.grad(loss, list(values.values()), create_graph=True)
            hz = torch.autograd.grad(sum((a * b).sum() for a, b in zip(g, z, strict=True)), list(values.values()))
        passed(model, optimizer, (x, y))
        optimizer.step()
        for k, name in enumerate(names):
            d = z[k] * hz[k]
            if d.dim() == 4:
                d = d.mean((2, 3), keepdim=True).expand_as(d)
            m, v = moments.get(name, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * g[k].detach(), 0.999 * v + 0.001 * d**2
            moments[name] = (m, v)
            root = (v / (1 - 0.999**t)) ** 0.35 + 1e-4
            p = values[name].detach()
            expected = p - 0.1 * 0.01 * p - 0.1 * (m / (1 - 0.9**t)) / root
            torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [partial(optim.Preconditioned, curvature="diag_ggn_mc"), optim.AdaHessian])
def test_draws_of_passes_and_steps_are_new_and_a_step_that_is_done_again_has_the_same(make: Any) -> None:
    model, (x, y) = network(), data()
    optimizer = make([*model.parameters()], lr=0.0, seed=3)

    def emitted() -> Tensor:
        with optim.emit(optimizer):
            LOSS(model(x), y).backward()
        (found,) = optimizer._received[model[0].weight].values()
        return found.clone()

    seen = []
    for _ in range(3):
        one, both = emitted(), emitted()
        seen += [one, both - one]
        optimizer.zero_grad()
        assert torch.equal(emitted(), one)
        optimizer.step()
        optimizer.zero_grad()
    for k, one in enumerate(seen):
        assert not any(torch.allclose(one, other) for other in seen[:k])


def test_sophia_says_how_much_is_not_clipped() -> None:
    for rho, share in ((1e-9, 0.0), (1e9, 1.0)):
        model, idle = network(), nn.Parameter(torch.zeros(2))
        optimizer = optim.Sophia([*model.parameters(), idle], rho=rho, curvature="diag_ggn_exact")
        assert not optimizer.state[idle]
        passed(model, optimizer, data())
        optimizer.step()
        assert optimizer.unclipped == share


def test_the_variance_of_one_sample_is_refused() -> None:
    model = network()
    optimizer = optim.MSVAG(model.named_parameters())
    passed(model, optimizer, data(1))
    with pytest.raises(px.PackextError, match=r"0.weight, shape \[5, 4\] has seen a batch of one"):
        optimizer.step()


def test_an_update_that_overflows_and_a_loss_that_is_nan_are_skipped() -> None:
    model, (x, y) = network(), data()
    optimizer = optim.Preconditioned(model.named_parameters(), "diag_ggn_exact", damping=0.0)
    before = theta(model)
    x[:, 0] = 0.0  # neither gradient nor curvature: 0 / 0
    passed(model, optimizer, (x, y))
    with pytest.warns(optim.SkippedStep, match=r"the update of 0.weight, shape \[5, 4\] is NaN or infinite"):
        optimizer.step()
    x[3, 1] = float("nan")
    for other in (optimizer, optim.KFAC(model.named_parameters()), optim.AdaHessian(model.named_parameters())):
        passed(model, other, (x, y))
        with pytest.warns(optim.SkippedStep, match="the gradient of 0.weight"):
            other.step()
        assert not other.state and other.steps == 0 and other.skipped >= 1
    assert all(torch.equal(p, before[k]) for k, p in model.named_parameters())


def test_steps_that_need_nothing_of_the_pass_can_be_plain() -> None:
    found = []
    for plain in (False, True):
        model = network()
        optimizer = optim.KFAC(model.parameters(), factors_every=3, inverses_every=3)
        asked = []
        for k in range(7):
            optimizer.zero_grad()
            x, y = data(12, k)
            asked.append(bool(optimizer.quantities()))
            with px.disable() if plain and not asked[-1] else optim.emit(optimizer):
                LOSS(model(x), y).backward()
            optimizer.step()
        assert asked == [True, False, False, True, False, False, True]
        found.append(theta(model))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
