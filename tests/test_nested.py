"""Passes within passes: what hooks and Functions compute for their own purposes, by autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import testing
from tests.helpers import double_precision, run_with_a_hook

N, D = 4, 5


class Equilibrium(nn.Module):
    """The fixed point of a layer, whose gradient a hook finds by solving a linear system (Bai et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        nn.init.normal_(self.inner.weight, std=0.1)

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + self.outer(x))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(40):
                z = self.step(z, x)
        z = self.step(z, x)
        if z.requires_grad:
            start = z.detach().requires_grad_()
            end = self.step(start, x)

            def solve(g: Tensor) -> Tensor:
                y = g
                for _ in range(40):
                    y = g + torch.autograd.grad(end, start, y, retain_graph=True)[0]
                return y

            z.register_hook(solve)
        return self.head(z)


class Again(torch.autograd.Function):
    """Runs a module without keeping anything, and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, *parameters: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x, *parameters)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Any:
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.module(x)
        if not parameters:  # `.grad` is where theirs goes
            torch.autograd.backward(y, gs)
            return x.grad, None
        found = torch.autograd.grad(y, [x, *parameters], gs)
        return found[0], None, *found[1:]


class Reversible(nn.Module):
    def __init__(self, returned: bool) -> None:
        super().__init__()
        self.up, self.inner = nn.Linear(D, D), nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.head, self.returned = nn.Linear(D, 3), returned

    def forward(self, x: Tensor) -> Tensor:
        parameters = self.inner.parameters() if self.returned else ()
        return self.head(Again.apply(self.up(x), self.inner, *parameters))


MODELS = {
    "a hook that solves": Equilibrium,
    "gradients returned": lambda: Reversible(True),
    "gradients accumulated": lambda: Reversible(False),
}


@pytest.mark.parametrize("name", MODELS)
def test_individual_gradients(name: str) -> None:
    """In the first pass, too, in which the structure is probed, `.grad` is added to once."""
    with double_precision():
        model, x, y = MODELS[name](), torch.randn(N, D), torch.randint(3, (N,))
        loss, rows, plain = nn.CrossEntropyLoss(), [], copy.deepcopy(model)
        for i in range(N):  # autograd.grad would not return what a Function accumulates
            plain.zero_grad()
            loss(plain(x[i : i + 1]), y[i : i + 1]).backward()
            rows.append([p.grad.clone() for p in plain.parameters()])
        norms = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])
        px.extend(model), px.extend(loss)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = [p.grad for p in model.parameters()]
        for passes in (1, 2):
            with px.backpack(px.BatchGrad(), px.ClippedGrad(0.3)) as results:
                loss(model(x), y).backward()
            for k, (key, p) in enumerate(model.named_parameters()):
                found = results[key]
                each = torch.stack([row[k] for row in rows])
                clipped = ((0.3 / norms).clamp(max=1).view(-1, *[1] * p.dim()) * each).sum(0)
                torch.testing.assert_close(found.grad_batch * N, each, msg=key)
                torch.testing.assert_close(found.clipped_grad, clipped)
                torch.testing.assert_close(p.grad, 1 + passes * each.mean(0))
                assert p.grad is before[k]


@pytest.mark.parametrize("name", MODELS)
def test_check_knows_them(name: str) -> None:
    """What a Function accumulates by itself belongs to the gradient, which the oracle leaves as it was."""
    with double_precision():
        model, x, y = MODELS[name](), torch.randn(N, D), torch.randint(3, (N,))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        report = testing.check(model, nn.CrossEntropyLoss(), x, y)
        assert report.ok, report
        testing.individual_gradients(model, nn.CrossEntropyLoss(), x, y)
        for p in model.parameters():
            torch.testing.assert_close(p.grad, torch.ones_like(p))


@pytest.mark.parametrize("name", ["a hook that solves", "gradients returned"])
@pytest.mark.parametrize("quantity", [px.DiagGGNExact(), px.GGNGram(), px.HMP()])
def test_curvature(name: str, quantity: Any) -> None:
    with double_precision():
        model, x, y = MODELS[name](), torch.randn(N, D), torch.randint(3, (N,))
        report = testing.check(model, nn.CrossEntropyLoss(), x, y, [quantity])
        assert report.ok, report


def test_a_hook_that_asks_for_gradients_of_the_same_model() -> None:
    with double_precision():
        model, loss = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)), px.extend(nn.CrossEntropyLoss())
        x, y, seen = torch.randn(N, D), torch.randint(3, (N,)), []
        plain, penalty = copy.deepcopy(model), px.extend(model)(torch.randn(7, D)).square().sum()
        loss(plain(x), y).backward()

        def look(g: Tensor) -> None:
            seen.append(torch.autograd.grad(penalty, [*model.parameters()], retain_graph=True))

        hidden = model[1](model[0](x))  # a pass of its own: parts of a model are models
        hidden.register_hook(look)
        loss(model[2](hidden), y).backward()
        model.zero_grad()
        model[1].register_forward_hook(lambda module, args, out: out.register_hook(look) and None)
        with px.backpack(px.BatchGrad()) as results:
            loss(model(x), y).backward()
        for found in seen[1:]:
            torch.testing.assert_close(found, seen[0])
        assert len(seen) > 3
        for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
            torch.testing.assert_close(results[key].grad_batch.sum(0), q.grad)


def test_curvature_is_refused_where_gradients_are_accumulated_within() -> None:
    model, loss = px.extend(Reversible(False)), px.extend(nn.CrossEntropyLoss())
    with pytest.raises(px.PackextError, match="DiagGGNExact"):
        with px.backpack(px.DiagGGNExact()):
            loss(model(torch.randn(N, D)), torch.randint(3, (N,))).backward()


@pytest.mark.parametrize("quantity", [px.DiagGGNMC(), px.KFAC(), px.SqrtGGNMC()])
def test_curvature_of_what_no_column_reaches_is_refused(quantity: Any) -> None:
    """With nothing before it that a column would be sent to, a Function is not run for it."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Sequential(nn.Linear(D, D), nn.Tanh()), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(Again.apply(x.requires_grad_(), self.inner))

    model, loss = px.extend(First()), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(N, D), torch.randint(3, (N,))
    with pytest.raises(px.UnsupportedUseError, match=f"{type(quantity).__name__}.*Sequential again"):
        with px.backpack(quantity):
            loss(model(x), y).backward()
    assert not any(hasattr(p, quantity.savefield) for p in model.parameters())
    with px.backpack(quantity, parameters=model.head.parameters()):
        loss(model(x), y).backward()
    assert hasattr(model.head.weight, quantity.savefield)


def test_a_context_within_a_pass_of_another() -> None:
    """It hears `backward()`, and says why it does not hear `torch.autograd.grad`."""
    model, other = px.extend(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))), px.extend(nn.Linear(D, 1))
    loss, x, y, found = px.extend(nn.CrossEntropyLoss()), torch.randn(N, D), torch.randint(3, (N,)), []

    def look(g: Tensor) -> None:
        with torch.enable_grad(), px.backpack(px.BatchL2Grad()) as results:
            other(x).sum().backward()
        found.append(results["weight"].batch_l2)
        with pytest.raises(px.NotExtendedError, match="within a backward pass"), torch.enable_grad():
            with px.backpack(px.BatchL2Grad()):
                torch.autograd.grad(other(x).sum(), [*other.parameters()])
        found.append(None)

    results = run_with_a_hook(model, loss, x, y, look)
    assert len(found) == 2
    torch.testing.assert_close(found[0], x.square().sum(1))
    for p in model.parameters():
        torch.testing.assert_close(results[p].grad_batch.sum(0), p.grad)
