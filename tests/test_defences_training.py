"""Defences that act in training or on single samples: NoPeek, Soteria, PRECODE, withholding."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import attacks, defences
from packext.defences import (
    NoPeek,
    Precode,
    PrecodeLoss,
    Soteria,
    Withholding,
    distance_correlation,
    u_distance_correlation_sqr,
)
from tests.helpers import assert_exact, rows_of

# -- distance correlation ------------------------------------------------------------------------------


def loops(x: Tensor, z: Tensor) -> tuple[float, float]:
    """V-statistic R and U-statistic R*², by their definitions, one pair of samples at a time in float64."""
    n = len(x)
    parts = []
    for v in (x, z):
        v = v.double().reshape(n, -1)
        d = [[math.sqrt(sum(float(e) ** 2 for e in v[i] - v[j])) for j in range(n)] for i in range(n)]
        row, all_ = [sum(r) for r in d], sum(map(sum, d))
        V = [[d[i][j] - row[i] / n - row[j] / n + all_ / n**2 for j in range(n)] for i in range(n)]
        U = [
            [
                d[i][j] - row[i] / (n - 2) - row[j] / (n - 2) + all_ / ((n - 1) * (n - 2)) if i != j else 0.0
                for j in range(n)
            ]
            for i in range(n)
        ]
        parts.append((V, U))

    def inner(k: int, one: int, other: int) -> float:
        return sum(parts[one][k][i][j] * parts[other][k][i][j] for i in range(n) for j in range(n))

    v = math.sqrt(inner(0, 0, 1) / math.sqrt(inner(0, 0, 0) * inner(0, 1, 1)))
    return v, inner(1, 0, 1) / math.sqrt(inner(1, 0, 0) * inner(1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("related", [True, False])
def test_distance_correlation_against_loops(dtype: torch.dtype, related: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 2, 3).to(dtype)
    z = x.flatten(1)[:, :4].square() if related else torch.randn(9, 4).to(dtype)
    v, u = loops(x, z)
    assert float(distance_correlation(x, z)) == pytest.approx(v, rel=1e-12)
    assert float(u_distance_correlation_sqr(x, z)) == pytest.approx(u, rel=1e-10)
    assert distance_correlation(x, z).dtype == torch.float64
    assert float(distance_correlation(x[:, 0, 0], -2 * x[:, 0, 0])) == pytest.approx(1.0, rel=1e-12)
    assert float(u_distance_correlation_sqr(x, 2 * x + 1)) == pytest.approx(1.0, rel=1e-2)


def test_distance_correlation_against_dcor() -> None:
    dcor = pytest.importorskip("dcor")
    torch.manual_seed(0)
    for n, d in ((4, 2), (31, 50), (128, 300)):
        x, z = torch.randn(n, d).double(), torch.randn(n, 7).double()
        z[:, 0] += x[:, 0].abs()
        want = dcor.distance_correlation(x.numpy(), z.numpy()), dcor.u_distance_correlation_sqr(x.numpy(), z.numpy())
        assert float(distance_correlation(x, z)) == pytest.approx(want[0], rel=1e-10)
        assert float(u_distance_correlation_sqr(x, z)) == pytest.approx(want[1], rel=1e-8, abs=1e-12)


def test_only_the_unbiased_one_is_about_zero_for_independent_samples() -> None:
    draws = [(torch.randn(32, 500), torch.randn(32, 20)) for _ in map(torch.manual_seed, range(40))]
    unbiased = torch.stack([u_distance_correlation_sqr(x, z) for x, z in draws])
    assert unbiased.mean().abs() < 3 * unbiased.std() / 40**0.5 < 0.025
    assert all(distance_correlation(x, z) > 0.8 for x, z in draws)


@pytest.mark.parametrize("n", [4, 8, 32])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_rows_that_are_equally_far_from_each_other_correlate_with_nothing(n: int, offset: float) -> None:
    """Their U-centred distances are 0, and were rounding over rounding: anything from -1 to 1."""
    torch.manual_seed(0)
    x = (torch.eye(n) * 0.1 + offset).double()
    for z in (torch.randn(n, 3), 3 * torch.eye(n), 0.3 * x.flip(0)):
        assert float(u_distance_correlation_sqr(x, z)) == float(u_distance_correlation_sqr(z, x)) == 0.0


def test_distance_correlation_has_gradients_where_rows_repeat() -> None:
    torch.manual_seed(0)
    x, z = torch.randn(6, 3).double(), torch.randn(6, 2).double().requires_grad_()
    for f in (distance_correlation, u_distance_correlation_sqr):
        assert torch.autograd.gradcheck(lambda z, f=f: f(x, z), (z,))
        same = z.detach()[[0, 0, 1, 2, 2, 2]].requires_grad_()
        (g,) = torch.autograd.grad(f(x[[0, 0, 1, 2, 2, 3]], same), same)
        assert g.isfinite().all() and g.any()
        for flat in (torch.ones(6, 2).double(), torch.zeros(6, 2).double()):
            flat.requires_grad_()
            value = f(x, flat)
            assert float(value.detach()) == 0.0 and not torch.autograd.grad(value, flat)[0].any()
    crossed = torch.tensor([[0.0], [1.0], [0.0], [1.0]]).double().requires_grad_()  # R is 0, and has a kink there
    value = distance_correlation(torch.tensor([[0.0], [0.0], [1.0], [1.0]]).double(), crossed)
    assert float(value.detach()) == 0.0 and torch.autograd.grad(value, crossed)[0].isfinite().all()


def test_distance_correlation_refuses_what_it_is_not_of() -> None:
    x = torch.randn(5, 3)
    for f, least in ((distance_correlation, 2), (u_distance_correlation_sqr, 4)):
        with pytest.raises(px.PackextError, match=rf"at least {least}; got {least - 1} and {least - 1}"):
            f(x[: least - 1], x[: least - 1])
        with pytest.raises(px.PackextError, match=r"got 5 and 4 \(shapes \[5, 3\] and \[4, 3\]\)"):
            f(x, x[:4])
        with pytest.raises(px.PackextError, match="z is torch.int64 of shape"):
            f(x, torch.zeros(5, 2, dtype=torch.int64))
        with pytest.raises(px.PackextError, match=r"x is torch.float32 of shape \[0, 3\]"):
            f(x[:0], x[:0])
        bad = x.clone()
        bad[3, 1] = math.nan
        with pytest.raises(px.PackextError, match=r"z \[5, 3\] is not finite in rows \[3\]"):
            f(x, bad)


# -- NoPeek --------------------------------------------------------------------------------------------


def split() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)).double()


def data(n: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6).double(), torch.randint(3, (n,))


@pytest.mark.parametrize("extended", ["no", "before", "after"])
def test_nopeek_is_the_sum_of_its_terms(extended: str) -> None:
    torch.manual_seed(0)
    model, (x, y) = split(), data()
    if extended == "before":
        px.extend(model)
    nopeek = NoPeek(model, "2", nn.CrossEntropyLoss(), 0.3)  # what follows writes into its output
    if extended == "after":
        px.extend(model)
    nopeek(model(x), y).backward()
    found = {k: p.grad for k, p in model.named_parameters()}
    twin = split()
    twin.load_state_dict(model.state_dict())
    z = twin[:3](x)
    r = distance_correlation(x, z)
    want = 0.3 * r + 0.7 * nn.CrossEntropyLoss()(twin[4](z.relu()), y)
    names, parameters = zip(*twin.named_parameters(), strict=True)
    for k, g in zip(names, torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(found[k], g, msg=k)
    assert nopeek.correlation is not None and float(nopeek.correlation) == pytest.approx(float(r.detach()))
    assert "layer='2', alpha=0.3" in repr(nopeek) and not nopeek.correlation.requires_grad


def test_nopeek_lowers_the_correlation() -> None:
    torch.manual_seed(0)
    x, y = data(200)
    held = torch.randn(200, 6).double()
    left: dict[float, float] = {}
    for alpha in (0.0, 0.9):
        torch.manual_seed(1)
        model = split()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        with NoPeek(model, model[1], nn.CrossEntropyLoss(), alpha) as loss_fn:
            for i in range(60):
                rows = slice(20 * (i % 10), 20 * (i % 10) + 20)
                optimizer.zero_grad()
                loss_fn(model(x[rows]), y[rows]).backward()
                optimizer.step()
        left[alpha] = float(u_distance_correlation_sqr(held, model[:2](held).detach()))
    assert left[0.9] < 0.8 * left[0.0]


def test_nopeek_takes_its_hooks_off() -> None:
    model, (x, y) = split(), data()
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), NoPeek(model, "1", nn.CrossEntropyLoss(), 0.5) as loss_fn:
        loss_fn(model(x), y)
        raise ZeroDivisionError
    assert before == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not list(loss_fn.parameters()) and all(p.grad is None for p in model.parameters())
    with pytest.raises(px.PackextError, match="last ran"):
        loss_fn(model(x), y)


@pytest.mark.parametrize("where", ["model", "loss", "task"])
def test_nopeek_has_no_individual_gradients(where: str) -> None:
    model, (x, y), task = px.extend(split()), data(), nn.CrossEntropyLoss()
    nopeek = NoPeek(model, "1", px.extend(task) if where == "task" else task, 0.5)
    if where == "loss":
        px.extend(nopeek)
    for quantity in (px.BatchGrad(), px.Variance(), px.ClippedGrad(1.0)):
        with pytest.raises(px.CoupledSamplesError, match="NoPeek couples samples: .* of '1' is of the whole batch"):
            with px.backpack(quantity):
                nopeek(model(x), y).backward()
        assert all(p.grad is None and not hasattr(p, quantity.savefield) for p in model.parameters())
    with px.backpack(px.BatchGrad()):  # the task's loss alone has them
        with px.disable():
            nopeek(model(x), y).backward()
        task(model(x), y).backward()
    with pytest.raises(px.PackextError, match="not a copy"):
        defences.Clipped(1.0)(model, nopeek, x, y)


def test_a_loss_that_is_said_to_couple_samples_is_refused() -> None:
    model, x = px.extend(split()), data()[0]
    for _ in range(2):
        out = model(x)
        loss = px.coupled((out @ out.T).logsumexp(1).sum(), "contrast")
        with pytest.raises(px.CoupledSamplesError, match="^contrast$"), px.backpack(px.BatchL2Grad()):
            loss.backward()
        assert all(p.grad is None for p in model.parameters())
    out = model(x)
    px.coupled((out @ out.T).logsumexp(1).sum(), "contrast").backward()
    assert model[0].weight.grad is not None
    assert float(px.coupled(torch.tensor(1.0), "no graph")) == 1.0


def test_nopeek_refuses_what_it_cannot_see() -> None:
    model, (x, y), task = split(), data(), nn.CrossEntropyLoss()
    first: Any = model[0]
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
            NoPeek(model, "1", task, bad)
    for layer in ("7", nn.Linear(2, 2), model, ""):
        with pytest.raises(ValueError, match=r"layer must be a module of the Sequential, or its name \(0, 1, 2"):
            NoPeek(model, layer, task, 0.5)

    def refused(
        match: str, model: nn.Module, call: Callable[[NoPeek], Any], layer: str = "1", task: Any = task
    ) -> None:
        with NoPeek(model, layer, task, 0.5) as nopeek:
            with pytest.raises(px.PackextError, match=match):
                call(nopeek)

    refused("at least 2; got 1 and 1", model, lambda f: f(model(x[:1]), y[:1]))
    refused("last ran", model, lambda f: f(torch.randn(8, 3), y))
    out = model(x)
    refused("last ran", model, lambda f: (model(x[:4]), f(out, y)))
    refused("last ran", model, lambda f: (f(kept := model(x), y), f(kept, y)))
    refused("gave shape \\[8\\]", model, lambda f: f(model(x), y), task=nn.CrossEntropyLoss(reduction="none"))
    refused(
        "x \\[8, 6\\] is not finite in rows \\[2\\]",
        model,
        lambda f: f(model(x.index_fill(0, torch.tensor(2), math.inf)), y),
    )
    refused("z the activations that leave '1': .* z \\[8, 5\\] is not finite", model,
            lambda f: (first.weight.data.fill_(math.nan), f(model(x), y)))  # fmt: skip
    frozen = split()
    frozen[0].requires_grad_(False)
    refused("No gradient reaches the activations that leave '1': all parameters below are frozen", frozen,
            lambda f: f(frozen(x), y))  # fmt: skip
    tanh = nn.Tanh()
    twice = nn.Sequential(nn.Linear(6, 3), tanh, nn.Linear(3, 3), tanh).double()
    refused(r"'1' \(Tanh\) ran twice", twice, lambda f: f(twice(x), y))
    words = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3))
    refused("x is torch.int64", words, lambda f: f(words(torch.randint(10, (8, 3))), y))
    with torch.no_grad(), NoPeek(frozen, "1", task, 0.5) as nopeek:
        assert nopeek(frozen(x), y).isfinite()
    with NoPeek(frozen.requires_grad_(False), "1", task, 0.5) as nopeek:  # nothing is trained
        assert nopeek(frozen(x), y).isfinite()


def test_nopeek_after_an_error_of_the_model() -> None:
    """The layer runs by itself again, as often as one likes."""
    model, (x, y) = split(), data()
    with NoPeek(model, "1", nn.CrossEntropyLoss(), 0.5) as nopeek:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.randn(8, 7).double())
        for _ in range(2):
            model[:2](x)
        with pytest.raises(px.PackextError, match="last ran"):
            nopeek(torch.randn(8, 3).double(), y)
        model(x)  # whose loss nobody asks for
        assert nopeek(model(x), y).isfinite()


def test_nopeek_under_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body: Any = split()[:3]
            self.head, self.again = nn.Linear(4, 3).double(), False

        def forward(self, x: Tensor) -> Tensor:
            z = checkpoint(self.body, x, use_reentrant=False) if self.again else self.body(x)
            return self.head(z)

    torch.manual_seed(0)
    net, (x, y) = Net(), data()
    grads = []
    for net.again in (False, True):
        with NoPeek(net, "body.1", nn.CrossEntropyLoss(), 0.5) as nopeek:
            nopeek(net(x), y).backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        net.zero_grad()
    torch.testing.assert_close(grads[0], grads[1])


# -- Soteria -------------------------------------------------------------------------------------------


def conv(norm: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(1, 4, 3, 2, 1), *([nn.BatchNorm2d(4)] if norm else []), nn.ReLU(), nn.Conv2d(4, 5, 3, 2, 1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)).double()


def images(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 1, 8, 8).double(), torch.randint(3, (n,))


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_soteria_against_a_loop(n: int, reduction: str) -> None:
    """One sample and one feature at a time."""
    torch.manual_seed(2)
    model, (x, y), loss = conv(), images(n), nn.CrossEntropyLoss(reduction=reduction)
    ratios: list[list[float]] = [[] for _ in range(20)]
    for one in x:
        one = one[None].clone().requires_grad_()
        r = model[:-1](one)[0]
        for d in range(20):
            (g,) = torch.autograd.grad(r[d], one, retain_graph=True)
            if r[d] != 0:
                ratios[d].append(float(g.norm() / r[d].detach().abs()))
    scores = [sum(v) / len(v) if v else math.inf for v in ratios]
    assert math.inf in scores or n > 1  # features that no ReLU lets through
    dropped = sorted(range(20), key=lambda d: scores[d])[:7]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = Soteria(0.39)(model, loss, x, y).gradient  # int(0.39 * 20) = 7
    assert torch.equal(random, torch.get_rng_state())
    plain = attacks.share(model, loss, x, y).gradient
    for name, g in plain.items():
        want = g.clone()
        if name == "5.weight":
            want[:, dropped] = 0
        torch.testing.assert_close(found[name], want, rtol=0, atol=0)
    assert all(plain["5.weight"][:, d].any() for d in dropped)  # no column is dropped that was zero already
    found = defences.sensitivity(model, x)[0]
    for d in range(20):
        mean = found[:, d][found[:, d].isfinite()].mean()
        assert not ratios[d] or float(mean) == pytest.approx(scores[d], rel=1e-12)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not model[5]._forward_pre_hooks and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_soteria_of_a_received_state_and_a_named_layer() -> None:
    torch.manual_seed(0)
    model, other, (x, y), loss = conv(True).eval(), conv(True).eval(), images(), nn.CrossEntropyLoss()
    assert (want := Soteria(0.5)(other, loss, x, y)).n == 5
    found = Soteria(0.5)(model, loss, x, y, state=other.state_dict())
    assert all(torch.equal(g, want.gradient[k]) for k, g in found.gradient.items())
    two = nn.Sequential(conv(), nn.Tanh(), nn.Linear(3, 3).double())
    g = Soteria(0.5, "0.5")(two, loss, x, y).gradient
    assert int((~g["0.5.weight"].any(0)).sum()) >= 10 and g["2.weight"].any(0).all()
    assert torch.equal(
        Soteria(0.0)(two, loss, x, y).gradient["2.weight"], attacks.share(two, loss, x, y).gradient["2.weight"]
    )
    assert not Soteria(1.0)(two, loss, x, y).gradient["2.weight"].any()
    wide = nn.Sequential(nn.Linear(4, 100), nn.Linear(100, 3)).double()
    part = Soteria(0.29)(wide, loss, torch.randn(5, 4).double(), torch.arange(5) % 3).gradient["1.weight"]
    assert int((~part.any(0)).sum()) == 29
    px.extend(two)
    with px.disable():
        assert torch.equal(Soteria(0.5, "0.5")(two, loss, x, y).gradient["0.5.weight"], g["0.5.weight"])
    assert torch.equal(Soteria(0.5, "0.5")(two, loss, x, y).gradient["0.5.weight"], g["0.5.weight"])


class Neighbours(nn.Module):
    """Sample n sees sample n - 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def test_soteria_refuses() -> None:
    (x, y), loss = images(), nn.CrossEntropyLoss()
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="share must be between 0 and 1"):
            Soteria(bad)
    for model in (conv(norm=True), nn.Sequential(conv()[:-1], Neighbours(), nn.Linear(20, 3).double())):
        with pytest.raises(px.CoupledSamplesError, match="The input of .* depends on other samples"):
            Soteria(0.5)(model, loss, x, y)
    frozen = conv()
    frozen[5].weight.requires_grad_(False)
    with pytest.raises(px.PackextError, match="'5.weight' is frozen"):
        Soteria(0.5)(frozen, loss, x, y)
    words = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(px.PackextError, match="floating tensor; x is torch.int64"):
        Soteria(0.5)(words, loss, torch.randint(9, (5, 3)), y)
    with pytest.raises(px.PackextError, match=r"one vector \[N, D\] .* shapes \[\[5, 1, 8, 8\]\]"):
        Soteria(0.5)(nn.Sequential(nn.Linear(8, 3), nn.Flatten()).double(), loss, x, y)
    with pytest.raises(px.PackextError, match=r"'5' \[5, 20\], or its derivative by x, is not finite"):
        Soteria(0.5)(conv(), loss, x.index_fill(0, torch.tensor([1]), math.nan), y)


# -- PRECODE -------------------------------------------------------------------------------------------


def precode() -> Precode:
    return Precode(nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh()), nn.Linear(12, 3), 6).double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_precode_against_its_formula(training: bool, reduction: str) -> None:
    torch.manual_seed(0)
    model, (x, y), loss = precode().train(training), images(4), PrecodeLoss(0.1, reduction)
    torch.manual_seed(1)
    found = loss(model(x), y)
    torch.manual_seed(1)
    noise = torch.randn(4, 6, dtype=torch.float64)
    each = []
    for one, label, e in zip(x, y, noise, strict=True):
        mean, log_variance = model.encoder(model.features(one[None])[0]).split(6)
        p = torch.distributions.Normal(mean, log_variance.exp().sqrt())
        kl = torch.distributions.kl_divergence(p, torch.distributions.Normal(0 * mean, 1 + 0 * mean)).sum()
        z = mean + p.scale * e if training else mean
        each.append(nn.CrossEntropyLoss()(model.head(model.decoder(z))[None], label[None]) + 0.1 * kl)
    want = torch.stack(each)
    torch.testing.assert_close(found, want.mean() if reduction == "mean" else want.sum())
    given = PrecodeLoss(0.1, "none")(model(x, noise), y)
    if training:
        torch.testing.assert_close(given, want)
    soft = nn.functional.one_hot(y, 3).double()
    torch.testing.assert_close(PrecodeLoss(0.1, "none")(model(x, noise), soft), given)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_precode_has_individual_gradients(reduction: str) -> None:
    """Each sample has a draw of its own: all quantities against the samples' own losses, with the same draws."""
    torch.manual_seed(0)
    model, (x, y) = precode(), images(4)
    each = PrecodeLoss(0.1, "none")

    def drawn(loss: PrecodeLoss) -> Tensor:
        torch.manual_seed(7)
        return loss(model(x), y)

    factor = 4 if reduction == "mean" else 1
    rows = rows_of(model, lambda: drawn(each) / factor)
    px.extend(model)
    assert_exact(model, lambda: drawn(px.extend(PrecodeLoss(0.1, reduction))), rows, factor)
    with px.backpack(px.BatchGrad(), scale="sample", attach=False) as results:
        drawn(px.extend(PrecodeLoss(0.1, reduction))).backward()
    torch.testing.assert_close(results["encoder.weight"].grad_batch, factor * rows["encoder.weight"])


def test_precode_is_random_in_training_and_refuses_what_it_cannot_hold() -> None:
    model, (x, y), loss = precode(), images(2), PrecodeLoss()
    one, other = (attacks.share(model, loss, x, y).gradient["features.1.weight"] for _ in range(2))
    assert (one - other).norm() > 0.1 * one.norm()
    model.eval()
    one, other = (attacks.share(model, loss, x, y).gradient["features.1.weight"] for _ in range(2))
    assert torch.equal(one, other)
    assert defences.Clipped(1.0)(model, loss, x, y).gradient.keys() == dict(model.named_parameters()).keys()
    calls = [
        lambda: Precode(nn.Flatten(), nn.Conv2d(1, 1, 1), 3),
        lambda: Precode(nn.Flatten(), nn.Linear(2, 2), 0),
        lambda: PrecodeLoss(-1.0),
        lambda: PrecodeLoss(math.nan),
        lambda: PrecodeLoss(reduction="max"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="must"):
            call()


# -- withholding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_withholding_against_a_loop(reduction: str) -> None:
    torch.manual_seed(3)
    model, (x, y), loss = conv(), images(7), nn.CrossEntropyLoss(reduction=reduction)
    x[4] *= 5
    rows = []
    for i in range(7):
        one = attacks.share(model, nn.CrossEntropyLoss(), x[i : i + 1], y[i : i + 1]).gradient
        rows.append(torch.cat([g.flatten() for g in one.values()]))
    g = torch.stack(rows)
    ridge = 0.01 * g.square().sum(1).mean()  # ridge regression in parameter space, one sample at a time
    inverse = torch.linalg.inv(g.T @ g + ridge * torch.eye(g.shape[1]))
    leverages = [float(row @ inverse @ row) for row in g]
    order = sorted(range(7), key=lambda i: leverages[i])
    for count in (0, 1, 3):
        kept = sorted(order[: 7 - count])
        found = Withholding(count)(model, loss, x, y)
        want = attacks.share(model, loss, x[kept], y[kept])
        assert found.n == want.n == 7 - count
        assert Withholding(count).kept(model, loss, x, y).tolist() == kept
        for name, value in want.gradient.items():
            torch.testing.assert_close(found.gradient[name], value, rtol=0, atol=0)
    other = conv()
    state = other.state_dict()
    assert torch.equal(Withholding(3).kept(model, loss, x, y, state), Withholding(3).kept(other, loss, x, y))
    assert all(p.grad is None for p in model.parameters()) and not px.is_extended(model)


def test_withholding_refuses() -> None:
    (x, y), loss = images(), nn.CrossEntropyLoss()
    for count, ridge in ((-1, 0.1), (1, 0.0), (1, math.nan)):
        with pytest.raises(ValueError, match="ridge must be positive, got"):
            Withholding(count, ridge)
    with pytest.raises(px.PackextError, match="more samples than it leaves out: count is 5, of 5 samples"):
        Withholding(5)(conv(), loss, x, y)
    with pytest.raises(px.PackextError, match="one tensor, .* a tuple"):
        Withholding(1)(conv(), loss, (x,), y)
    with pytest.raises(px.CoupledSamplesError):
        Withholding(1)(conv(norm=True), loss, x, y)
    with pytest.raises(px.PackextError, match="not finite"):
        Withholding(1)(conv(), loss, x.index_fill(0, torch.tensor([1]), math.nan), y)


# -- attackers who know the defence --------------------------------------------------------------------


def test_what_an_attacker_who_knows_looks_at() -> None:
    model, (x, y) = conv(), images()
    shared = defences.Pruning(0.5)(attacks.share(model, nn.CrossEntropyLoss(), x, y))
    assert all(torch.equal(m, shared.gradient[k] != 0) for k, m in attacks.sent(shared).items())
    rest = attacks.without(shared, "5", "0.bias")
    assert list(rest.gradient) == ["0.weight", "2.weight", "2.bias"] and rest.n == 5
    with pytest.raises(px.PackextError, match=r"\['2.b'\] was not shared"):
        attacks.without(shared, "5", "2.b")
    with pytest.raises(px.PackextError, match="Nothing would be left"):
        attacks.without(shared, "0", "2", "5")
