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
from packext import defences
from packext.defences import NoPeek, distance_correlation, u_distance_correlation_sqr

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
    extended == "before" and px.extend(model)
    nopeek = NoPeek(model, "2", nn.CrossEntropyLoss(), 0.3)  # what follows writes into its output
    extended == "after" and px.extend(model)
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
    where == "loss" and px.extend(nopeek)
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
            lambda f: (model[0].weight.data.fill_(math.nan), f(model(x), y)))  # fmt: skip
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


def test_nopeek_under_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.again = split()[:3], nn.Linear(4, 3).double(), False

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
