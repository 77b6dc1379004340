"""Other uses of autograd: graphs of gradients, checkpointing, torch.func, forward mode."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils import checkpoint

import packext as px
from packext._refusals import knows_weight_norm
from tests.helpers import assert_exact, batch, mlp, rows_of

pytestmark = pytest.mark.usefixtures("double")

N = 4


# -- create_graph -------------------------------------------------------------------------------------------


def conv() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3))


class Tokens(nn.Module):
    """Lookup, norm, attention-like product and a tied head on features of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.mix = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.scale, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x.abs().mul(3).long().clamp(max=5)))
        return self.head((self.mix(h).tanh() * self.scale).mean(1))


def recurrent() -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.lstm = nn.GRU(1, 3, batch_first=True), nn.LSTM(3, 3, batch_first=True)
            self.head = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(self.gru(x[..., None])[0])[0][:, -1])

    return Last()


GRAPHS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv": conv, "tokens": Tokens, "recurrent": recurrent}
FUNCTIONS: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Tensor]]] = {
    "grad_batch": (px.BatchGrad, lambda rows: rows),
    "batch_l2": (px.BatchL2Grad, lambda rows: rows.flatten(1).square().sum(1)),
    "variance": (px.Variance, lambda rows: rows.var(0, unbiased=False)),
    "sum_grad_squared": (px.SumGradSquared, lambda rows: rows.square().sum(0)),
    "batch_dot": (px.BatchDotGrad, lambda rows: rows.flatten(1) @ rows.flatten(1).T),
    "grad_dot": (px.GradDot, lambda rows: rows.flatten(1) @ rows.flatten(1).sum(0)),
}


@pytest.mark.parametrize("build", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("field", FUNCTIONS)
def test_results_are_differentiable(build: Any, field: str) -> None:
    """The gradient of a sum over weighted entries of the result, against the one through single samples."""
    model, (x, y), (quantity, of_rows) = build(), batch(), FUNCTIONS[field]
    named = dict(model.named_parameters())
    seeds: dict[str, Tensor] = {}

    def weighted(values: dict[str, Tensor]) -> Tensor:
        for name, value in values.items():
            seeds.setdefault(name, torch.randn_like(value))
        return sum((seeds[name] * value).sum() for name, value in values.items())

    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for sample in range(N):
        loss = F.cross_entropy(model(x[sample : sample + 1]), y[sample : sample + 1]) / N
        for name, g in zip(named, torch.autograd.grad(loss, list(named.values()), create_graph=True), strict=True):
            rows[name].append(g)
    want = torch.autograd.grad(
        weighted({k: of_rows(torch.stack(r)) for k, r in rows.items()}), list(named.values()), materialize_grads=True
    )
    px.extend(model)
    with px.backpack(quantity()):
        torch.autograd.grad(F.cross_entropy(model(x), y), list(named.values()), create_graph=True)
    values = {name: getattr(p, field) for name, p in named.items()}
    assert all(v.requires_grad for v in values.values())
    got = torch.autograd.grad(weighted(values), list(named.values()), materialize_grads=True)
    for name, a, b in zip(named, got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("build", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("context", [False, True])
def test_hessian_vector_products(build: Any, context: bool) -> None:
    model, (x, y) = build(), batch()
    vectors = [torch.randn_like(p) for p in model.parameters()]

    def hvp() -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()), create_graph=True)
        with px.disable():
            return torch.autograd.grad(
                sum((g * v).sum() for g, v in zip(grads, vectors, strict=True)), list(model.parameters())
            )

    want = hvp()
    px.extend(model)
    if context:
        with px.backpack(px.Variance()):
            got = hvp()
    else:
        got = hvp()
    torch.testing.assert_close(got, want)


def test_gradient_of_the_gradient_norm_with_respect_to_the_input() -> None:
    model, (x, y) = mlp(), batch()
    x.requires_grad_()

    def penalty() -> Tensor:
        (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    want = penalty()
    px.extend(model)
    torch.testing.assert_close(penalty(), want)


def test_a_pass_through_a_gradient_of_the_parameters_is_no_samples() -> None:
    """It reaches the parameters through their gradients as well, which no tap sees: refused inside of a context."""
    model, (x, y) = mlp(), batch()
    parameters, beside = list(model.parameters()), False

    def total() -> Tensor:
        out = model(x)
        found = sum(g.sum() for g in torch.autograd.grad(F.cross_entropy(out, y), parameters, create_graph=True))
        return found + torch.autograd.grad(out.sum(), x, create_graph=True)[0].square().sum() if beside else found

    want = torch.autograd.grad(total(), parameters, allow_unused=True)
    px.extend(model)
    with px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y, reduction="sum").backward()
        model.zero_grad()
        with pytest.raises(px.PackextError, match=r"px\.disable"):
            torch.autograd.grad(total(), parameters, allow_unused=True)
        loss = total()
        with px.disable():
            torch.testing.assert_close(torch.autograd.grad(loss, parameters, allow_unused=True), want)
    torch.testing.assert_close(torch.autograd.grad(total(), parameters, allow_unused=True), want)
    beside = x.requires_grad_() is x  # nor where a derivative by the inputs, of which there are rows, is a term as well
    with pytest.raises(px.PackextError, match=r"px\.disable"), px.backpack(px.BatchGrad()):
        total().backward()
    assert all(p.grad is None for p in parameters)


ROOTS: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Tensor]]] = {
    "diag_ggn_exact": (px.DiagGGNExact, lambda root: root.square().sum((0, 1))),
    "diag_ggn_exact_batch": (px.BatchDiagGGNExact, lambda root: root.square().sum(0)),
    "sqrt_ggn_exact": (px.SqrtGGNExact, lambda root: root),
    "ggn_gram": (px.GGNGram, lambda root: torch.tensordot(root.flatten(2), root.flatten(2), ([2], [2]))),
}


@pytest.mark.parametrize("build", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("field", ROOTS)
def test_curvature_is_differentiable(build: Any, field: str) -> None:
    """The gradient of a sum over weighted entries, against the one through columns of each sample's root."""
    model, (x, y), (quantity, of_root) = build(), batch(), ROOTS[field]
    named = dict(model.named_parameters())
    columns: list[list[tuple[Tensor, ...]]] = []
    for v in range(3):
        columns.append([])
        for n in range(N):
            out = model(x[n : n + 1])[0]
            p = out.softmax(0)
            s = p[v].sqrt() * (F.one_hot(torch.tensor(v), 3) - p) / N**0.5
            columns[-1].append(torch.autograd.grad(out, list(named.values()), s, create_graph=True))
    roots = [torch.stack([torch.stack([row[k] for row in rows]) for rows in columns]) for k in range(len(named))]
    wanted = [of_root(root) for root in roots]
    seeds = [torch.randn_like(value) for value in wanted]
    want = torch.autograd.grad(
        sum((a * b).sum() for a, b in zip(seeds, wanted, strict=True)), list(named.values()), materialize_grads=True
    )
    loss = px.extend(nn.CrossEntropyLoss())
    px.extend(model)
    with px.backpack(quantity(), px.KFLR()):
        torch.autograd.grad(loss(model(x), y), list(named.values()), create_graph=True)
    values = [getattr(p, field) for p in named.values()]
    for a, b in zip(values, wanted, strict=True):
        torch.testing.assert_close(a, b)
    total = sum((a * b).sum() for a, b in zip(seeds, values, strict=True))
    for name, a, b in zip(
        named, torch.autograd.grad(total, list(named.values()), materialize_grads=True), want, strict=True
    ):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("quantity", [px.DiagGGNMC, px.KFAC, px.SqrtGGNMC])
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss])
def test_curvature_by_drawn_targets_is_differentiable(quantity: Any, criterion: Any) -> None:
    """Draws held fast, along a direction, against differences."""
    model, (x, y) = conv(), batch()
    y = y if criterion is nn.CrossEntropyLoss else torch.rand(N, 3)
    directions = [torch.randn_like(p) for p in model.parameters()]

    def total(at: float, graph: bool) -> tuple[Tensor, list[Tensor]]:
        moved, asked = px.extend(copy.deepcopy(model)), quantity(generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            for p, d in zip(moved.parameters(), directions, strict=True):
                p.add_(d, alpha=at)
        parameters = list(moved.parameters())
        with px.backpack(asked):
            torch.autograd.grad(px.extend(criterion())(moved(x), y), parameters, create_graph=graph)
        found = [getattr(p, asked.savefield) for p in parameters]
        factors = [t for value in found for t in (value if isinstance(value, list) else [value])]
        return torch.stack([t.sin().sum() for t in factors]).sum(), parameters

    value, parameters = total(0.0, True)
    grads = torch.autograd.grad(value, parameters, materialize_grads=True)
    got = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    want = (total(1e-6, False)[0] - total(-1e-6, False)[0]) / 2e-6
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_confident_predictions_have_derivatives_of_their_curvature() -> None:
    """Probabilities that are zero in floating point, whose root has none."""
    layer, loss = px.extend(nn.Linear(1, 3)), px.extend(nn.CrossEntropyLoss())
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0], [1e4], [-1e4]]))
    with px.backpack(px.DiagGGNExact(), px.SqrtGGNExact()):
        torch.autograd.grad(loss(layer(torch.ones(2, 1)), torch.tensor([1, 1])), layer.weight, create_graph=True)
    total = layer.weight.diag_ggn_exact.sum() + layer.weight.sqrt_ggn_exact.sum()
    assert torch.autograd.grad(total, layer.weight)[0].isfinite().all()


@pytest.mark.parametrize("criterion", [nn.BCEWithLogitsLoss, nn.PoissonNLLLoss])
def test_samples_of_weight_zero_have_derivatives_of_their_curvature(criterion: Any) -> None:
    """As if they were not there: the root of zero has no derivative."""
    model, (x, _) = px.extend(mlp()), batch()
    y, weights, loss = torch.rand(N, 3), (torch.arange(N) % 2)[:, None], px.extend(criterion(reduction="none"))

    def slopes(some: Any) -> tuple[Tensor, ...]:
        with px.backpack(px.DiagGGNExact(), px.KFLR()):
            total = (weights[some] * loss(model(x[some]), y[some])).sum()
            torch.autograd.grad(total, list(model.parameters()), create_graph=True)
        total = sum(p.diag_ggn_exact.square().sum() for p in model.parameters())
        return torch.autograd.grad(total + model[2].weight.kflr[0].square().sum(), list(model.parameters()))

    for got, want in zip(slopes(slice(None)), slopes(weights[:, 0] > 0), strict=True):
        torch.testing.assert_close(got, want)


def differentiated(
    model: nn.Module, x: Tensor, y: Tensor, *asked: Any, criterion: nn.Module | None = None, factor: Any = 1
) -> Any:
    loss = px.extend(nn.CrossEntropyLoss() if criterion is None else criterion)
    with px.backpack(px.Variance(), *asked) as results:
        torch.autograd.grad(factor * loss(px.extend(model)(x), y), list(model.parameters()), create_graph=True)
    return results


def test_curvature_is_no_constant_in_silence() -> None:
    """What is computed without a graph says so to who differentiates it, by whatever parameters."""
    model, (x, y), signs = mlp(), batch(), torch.randn(N, 3).sign()
    results = differentiated(
        model, x, y, px.DiagHessian(), px.KFRA(), px.EKFAC(), px.HessianTrace(), px.TopEigenvalues(), px.KFLR()
    )
    found, first = results["0.weight"], model.get_parameter("0.weight")
    values = {
        "DiagHessian": found.diag_h, "KFRA": found.kfra[1], "EKFAC": found.ekfac.eigenvalues,
        "HessianTrace": results.hessian_trace.value, "TopEigenvalues": found.top_eigenvalues.vectors,
    }  # fmt: skip
    refused = [(model, name, value) for name, value in values.items()]
    model = mlp()
    results = differentiated(model, x, signs, px.DiagGGNExact(), criterion=nn.SoftMarginLoss())
    refused.append((model, "DiagGGNExact", results["0.weight"].diag_ggn_exact))
    model = mlp()
    results = differentiated(model, x, y, px.SqrtGGNMC(), factor=torch.tensor(2.0, requires_grad=True))
    refused.append((model, "SqrtGGNMC", results["0.weight"].sqrt_ggn_mc))
    if not knows_weight_norm():  # which torch 2.13 differentiates wrongly once more
        model = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
        results = differentiated(model, x, y, px.GGNGram(), px.ClippedGrad(0.1))
        refused.append((model, "GGNGram", results.ggn_gram))
        refused.append((model, "Variance", results["parametrizations.weight.original0"].variance))
        refused.append((model, "ClippedGrad", results["bias"].clipped_grad))
        torch.autograd.grad(results["bias"].ggn_gram.sum() + results["bias"].variance.sum(), model.bias)
    given, model = x.clone().requires_grad_(), mlp()
    results = differentiated(model, given, y, px.DiagHessian())
    with pytest.raises(px.UnsupportedUseError, match="of DiagHessian has no derivative"):
        torch.autograd.grad(given.sum() + results["0.weight"].diag_h.sum(), given)
    before, model = nn.Linear(4, 5), px.extend(nn.Sequential(nn.Tanh(), nn.Linear(5, 3)))
    with px.backpack(px.DiagHessian()) as results:
        value = px.extend(nn.CrossEntropyLoss())(model(before(torch.randn(N, 4))), y)  # an input that nobody keeps
        torch.autograd.grad(value, list(model.parameters()), create_graph=True)
    with pytest.raises(px.UnsupportedUseError, match="of DiagHessian has no derivative"):
        torch.autograd.grad(before.bias.sum() + results["1.weight"].diag_h.sum(), before.bias)
    for model, name, value in refused:
        last = list(model.parameters())[-1]
        with pytest.raises(px.UnsupportedUseError, match=rf"of {name} has no derivative.*\.detach\(\)"):
            torch.autograd.grad(last.sum() + value.sum(), last)
    torch.autograd.grad(found.variance.sum() + found.diag_h.detach().sum() + found.kflr[0].sum(), first)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_hook_gets_what_refuses_to_be_differentiated() -> None:
    model, (x, y), loss = px.extend(mlp()), batch(), px.extend(nn.CrossEntropyLoss())
    seen: list[bool] = []

    def hook(module: nn.Module) -> None:
        seen.extend(p.diag_h.requires_grad for p in module.parameters(recurse=False))  # pyright: ignore

    with px.backpack(px.DiagHessian(), extension_hook=hook):
        loss(model(x), y).backward(create_graph=True)
    for p in model.parameters():
        p.grad = None
    assert seen and all(seen)
    with px.backpack(px.DiagHessian(), extension_hook=hook):
        loss(model(x), y).backward()
    assert not any(seen[len(seen) // 2 :])


def test_a_derivative_of_curvature_has_no_individual_gradients() -> None:
    model, (x, y), loss = px.extend(mlp()), batch(), px.extend(nn.CrossEntropyLoss())
    with px.backpack(px.DiagGGNExact()):
        torch.autograd.grad(loss(model(x), y), list(model.parameters()), create_graph=True)
    penalty = sum(p.diag_ggn_exact.sum() for p in model.parameters())
    with pytest.raises(px.PackextError, match="through a gradient of the model"), px.backpack(px.BatchGrad()):
        (loss(model(x), y) + penalty).backward()


# -- activation checkpointing ---------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Layers before, inside of and after checkpointed parts; parts are modules, sequences or functions."""

    def __init__(self, reentrant: bool, part: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.block = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 6))
        self.scale = nn.Parameter(torch.randn(6))
        self.reentrant, self.part, self.on = reentrant, part, True

    def method(self, h: Tensor) -> Tensor:
        return self.block(h).tanh() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if not self.on:
            h = self.block(h) if self.part != "method" else self.method(h)
        elif self.part == "module":
            h = checkpoint.checkpoint(self.block, h, use_reentrant=self.reentrant)
        elif self.part == "sequence":
            h = checkpoint.checkpoint_sequential(self.block, 2, h, use_reentrant=self.reentrant)
        else:
            h = checkpoint.checkpoint(self.method, h, use_reentrant=self.reentrant)
        return self.last(h + x.sum(1, keepdim=True))


def checkpointed(reentrant: bool, part: str) -> tuple[Any, Any, Tensor, Tensor]:
    model, (x, y) = Checkpointed(reentrant, part), batch()
    model.on = False
    rows = rows_of(model, lambda: F.cross_entropy(model(x), y, reduction="none") / N)
    model.on = True
    return px.extend(model), rows, x, y


@pytest.mark.parametrize("part", ["module", "sequence"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, part: str) -> None:
    model, rows, x, y = checkpointed(reentrant, part)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    for _ in range(2):
        assert_exact(model, lambda: loss_fn(model(x), y), rows, N)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", [px.KFAC, px.DiagGGNMC, px.SqrtGGNMC, px.DiagGGNExact, px.DiagHessian])
def test_curvature_of_a_first_part_under_reentrant_checkpointing(whole: bool, kind: Any) -> None:
    """Columns of a root come there."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh()), nn.Linear(4, 3), False

        def forward(self, x: Tensor) -> Tensor:
            if self.plain:
                return self.head(self.body(x))
            part = (lambda t: self.head(self.body(t))) if whole else self.body
            h = checkpoint.checkpoint(part, x.requires_grad_(), use_reentrant=True)
            return h if whole else self.head(h)

    model, loss_fn, (x, y) = px.extend(First()), px.extend(nn.CrossEntropyLoss()), batch()
    drawn, found = {px.KFAC, px.DiagGGNMC, px.SqrtGGNMC}, []
    for model.plain in (True, False):
        quantity = kind(generator=torch.Generator().manual_seed(0)) if kind in drawn else kind()
        with px.backpack(quantity) as results:
            loss_fn(model(x), y).backward()
        found.append([getattr(r, quantity.savefield) for r in results.values()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("quantity", [px.KFLR(), px.KFRA(), px.DiagHessian()])
def test_curvature_of_a_model_behind_reentrant_checkpointing(quantity: Any) -> None:
    """What is checkpointed before an extended model hides nothing of it."""
    body, head = nn.Sequential(nn.Linear(5, 4), nn.Tanh()), px.extend(nn.Sequential(nn.Linear(4, 3)))
    loss_fn, (x, y) = px.extend(nn.CrossEntropyLoss()), batch()
    found = []
    for reentrant in (False, True):
        h = checkpoint.checkpoint(body, x.requires_grad_(), use_reentrant=reentrant)
        with px.backpack(quantity) as results:
            loss_fn(head(h), y).backward()
        found.append([getattr(results[name], quantity.savefield) for name in ("0.weight", "0.bias")])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_function_that_holds_a_parameter_is_refused(reentrant: bool) -> None:
    model, rows, x, y = checkpointed(reentrant, "method")
    with (
        pytest.raises(px.UnsupportedUseError, match="mul.*scale|mul.*Checkpointed.*Checkpoint a module"),
        px.backpack(px.BatchGrad()),
    ):
        F.cross_entropy(model(x), y).backward()
    assert all(p.grad is None and not vars(p) for p in model.parameters())


@pytest.mark.parametrize("part", ["module", "sequence", "method"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_without_a_context(reentrant: bool, part: str) -> None:
    model, rows, x, y = checkpointed(reentrant, part)
    F.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, rows[name].sum(0))


@pytest.mark.parametrize("reentrant", [False, True])
def test_coupling_inside_of_a_checkpointed_part(reentrant: bool) -> None:
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

        def part(self, h: Tensor) -> Tensor:
            return self.b(h - h.mean(0))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint.checkpoint(self.part, self.a(x), use_reentrant=reentrant)

    model, (x, y) = px.extend(Coupled()), batch()
    with pytest.raises(px.PackextError), px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y).backward()
    assert all(p.grad is None and not vars(p) for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_parameter_inside_and_outside_of_a_checkpointed_part(reentrant: bool) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor, on: bool = True) -> Tensor:
            h = self.a(x).tanh()
            h = checkpoint.checkpoint(self.a, h, use_reentrant=reentrant) if on else self.a(h)
            return self.b(h.tanh())

    model, (x, y) = Shared(), batch()
    rows = rows_of(model, lambda: F.cross_entropy(model(x, False), y, reduction="none") / N)
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(model, lambda: loss_fn(model(x), y), rows, N)


def test_a_parameter_inside_and_outside_of_a_part_that_was_checkpointed_before_the_context_is_refused() -> None:
    """When the part runs again, the results of the parameter are there already, and lack what it does in there."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(checkpoint.checkpoint(self.a, x, use_reentrant=True).tanh()).tanh())

    model, (x, y) = px.extend(Shared()), batch()
    value = F.cross_entropy(model(x.requires_grad_()), y)
    with pytest.raises(px.PackextError, match="use_reentrant=False"), px.backpack(px.BatchGrad()):
        value.backward()
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())


# -- torch.func and forward mode ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_func_transforms_work_untouched() -> None:
    model, (x, y) = mlp(), batch()
    parameters = {k: v.detach() for k, v in model.named_parameters()}

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (x[None],)), y[None])

    want = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    px.extend(model)
    with px.backpack():
        got = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    torch.testing.assert_close(got, want)
    tangents = {k: torch.randn_like(v) for k, v in parameters.items()}
    out, tangent = jvp(lambda p: functional_call(model, p, (x,)), (parameters,), (tangents,))
    px.unextend(model)
    torch.testing.assert_close(
        (out, tangent), jvp(lambda p: functional_call(model, p, (x,)), (parameters,), (tangents,))
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_forward_mode() -> None:
    model, (x, _), v = mlp(), batch(), torch.randn(N, 5)

    def tangent() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent

    want = tangent()
    px.extend(model)
    torch.testing.assert_close(tangent(), want)


def test_functional_call_with_other_leaves() -> None:
    model, (x, y) = mlp(), batch()
    others = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
    rows: dict[str, list[Tensor]] = {name: [] for name in others}
    for sample in range(N):
        loss = F.cross_entropy(functional_call(model, others, (x[sample : sample + 1],)), y[sample : sample + 1]) / N
        for name, g in zip(others, torch.autograd.grad(loss, list(others.values())), strict=True):
            rows[name].append(g)
    px.extend(model)
    with px.backpack(px.BatchGrad(), px.Variance()) as results:
        F.cross_entropy(functional_call(model, others, (x,)), y).backward()
    for name, p in others.items():
        want = torch.stack(rows[name])
        torch.testing.assert_close(results[name].grad_batch, want)
        torch.testing.assert_close(p.grad_batch, want)
        torch.testing.assert_close(p.grad, want.sum(0))
    assert all(p.grad is None and not vars(p) for p in model.parameters())


def test_functional_call_with_values_made_outside() -> None:
    """Results are for the tensor that the model was given; what it is made of is outside of the model."""
    model, (x, y) = mlp(), batch()
    rows = rows_of(model, lambda: F.cross_entropy(model(x), y, reduction="none") / N)
    base = (model[0].weight.detach() / 2).requires_grad_()
    px.extend(model)
    with px.backpack(px.BatchGrad()) as results:
        F.cross_entropy(functional_call(model, {"0.weight": base * 2}, (x,)), y).backward()
    torch.testing.assert_close(results["0.weight"].grad_batch, rows["0.weight"])
    torch.testing.assert_close(base.grad, 2 * rows["0.weight"].sum(0))
    assert model[0].weight.grad is None and not vars(base)


def test_saved_tensor_hooks() -> None:
    """What a tap keeps goes through autograd's own machinery, so that it can be moved elsewhere."""
    model, (x, y) = mlp(), batch()
    rows = rows_of(model, lambda: F.cross_entropy(model(x), y, reduction="none") / N)
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    packed: list[int] = []

    def pack(t: Tensor) -> Any:
        packed.append(t.numel())
        return t.detach().numpy().copy() if not isinstance(t, nn.Parameter) else t

    def unpack(t: Any) -> Tensor:
        return t if isinstance(t, Tensor) else torch.from_numpy(t)

    def loss() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return loss_fn(model(x), y)

    assert_exact(model, loss, rows, N)
    assert packed


def test_anomaly_mode() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly(), px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y).backward()
    assert model[0].weight.grad_batch.shape[0] == N


def test_hooks_of_the_user_see_what_they_see_without_packext() -> None:
    model, (x, y) = mlp(), batch()
    x.requires_grad_()
    seen: list[Tensor] = []
    model[0].register_full_backward_hook(lambda m, gi, go: seen.append(go[0].clone()))
    F.cross_entropy(model(x), y).backward()
    px.extend(model)
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(seen[0], seen[1])
    with px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(seen[0], seen[-1])


def test_backward_pass_in_a_hook_of_a_backward_pass() -> None:
    """A pass inside of another pass has its own results."""
    outer, inner, (x, y) = mlp(), mlp(), batch()
    rows = rows_of(outer, lambda: F.cross_entropy(outer(x), y, reduction="none") / N)
    others = rows_of(inner, lambda: F.cross_entropy(inner(x), y, reduction="none") / N)
    px.extend(outer), px.extend(inner)

    def run() -> None:
        with torch.enable_grad():
            F.cross_entropy(inner(x), y).backward()

    with px.backpack(px.BatchGrad()):
        out = outer(x)
        out.register_hook(lambda g: run())
        F.cross_entropy(out, y).backward()
    for name, p in outer.named_parameters():
        torch.testing.assert_close(p.grad_batch, rows[name])
    for name, p in inner.named_parameters():
        torch.testing.assert_close(p.grad_batch, others[name])


def test_threads_do_not_disturb_each_other() -> None:
    """A forward pass on another thread is not part of this one's."""
    import threading

    model, other, (x, y) = mlp(), px.extend(mlp()), batch()
    rows = rows_of(model, lambda: F.cross_entropy(model(x), y, reduction="none") / N)

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=lambda: other(torch.randn(7, 5)))
            thread.start()
            thread.join()
            return x

    model.insert(1, Slow())
    px.extend(model)
    with px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(model[0].weight.grad_batch, rows["0.weight"])
    torch.testing.assert_close(model[3].weight.grad_batch, rows["2.weight"])


@pytest.mark.parametrize("context", [True, False])
def test_a_thread_may_train_while_another_is_in_a_context(context: bool) -> None:
    """In the middle of each inner pass of one thread, another takes a whole step."""
    import threading

    model, other, (x, y), (u, v) = mlp(), mlp(), batch(), batch(7)
    loss_fn, plain = px.extend(nn.CrossEntropyLoss()), copy.deepcopy(other)
    rows = rows_of(model, lambda: F.cross_entropy(model(x), y, reduction="none") / N)
    others = rows_of(other, lambda: F.cross_entropy(other(u), v, reduction="none") / 7)
    F.cross_entropy(plain(u), v).backward()
    px.extend(other)
    started, steps = [], []

    def step() -> None:
        started.append(1)
        torch.set_default_dtype(torch.float64)
        other.zero_grad()
        with px.backpack(*[px.BatchGrad(), px.DiagGGNExact()] * context):
            loss_fn(other(u), v).backward()
        torch.testing.assert_close([p.grad for p in other.parameters()], [p.grad for p in plain.parameters()])
        if context:
            torch.testing.assert_close({n: p.grad_batch for n, p in other.named_parameters()}, others)
        assert context or not any(vars(p) for p in other.parameters())
        steps.append(1)

    def beside(grad: Tensor) -> None:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()

    model[1].register_forward_hook(lambda module, args, output: output.register_hook(beside) and None)
    px.extend(model)
    with px.backpack(px.BatchGrad(), px.DiagGGNExact()):
        loss_fn(model(x), y).backward()
    assert len(started) == len(steps) > 5, "of the probe, of curvature, and of the gradient"
    torch.testing.assert_close({n: p.grad_batch for n, p in model.named_parameters()}, rows)


def test_lazy_modules_extended_before_they_know_their_sizes() -> None:
    """The first forward pass initialises them, by functions that are called with keywords alone."""
    model, loss_fn = px.extend(nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3))), nn.CrossEntropyLoss()
    x, y = torch.randn(4, 5), torch.randint(3, (4,))
    for _ in range(2):
        with px.backpack(px.BatchGrad()):
            loss_fn(model(x), y).backward()
    rows = [torch.autograd.grad(loss_fn(model(x[i : i + 1]), y[i : i + 1]) / 4, model[0].weight)[0] for i in range(4)]
    torch.testing.assert_close(model[0].weight.grad_batch, torch.stack(rows))


BATCHED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "jacobian": lambda model, x: torch.autograd.functional.jacobian(model, x, vectorize=True),
    "hessian": lambda model, x: torch.autograd.functional.hessian(lambda a: model(a).square().sum(), x, vectorize=True),
    "grad": lambda model, x: torch.autograd.grad(
        model(x), [*model.parameters()], torch.ones(2, 4, 3), is_grads_batched=True
    ),
}


@pytest.mark.parametrize("name", BATCHED)
def test_several_gradients_at_once(name: str) -> None:
    """As torch gives them outside of contexts, in which they are refused."""
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)), torch.randn(4, 5)
    expected = BATCHED[name](model, x)
    px.extend(model)
    torch.testing.assert_close(BATCHED[name](model, x), expected)
    if name != "grad":
        return
    with pytest.raises(px.PackextError, match="one gradient at a time"), px.backpack(px.BatchGrad()):
        BATCHED[name](model, x)
    assert not any(vars(p) for p in model.parameters())


class Stopped(torch.autograd.Function):
    """Gives its input no gradient at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None


def test_an_input_without_a_gradient() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(Stopped.apply(x))

    model, x = px.extend(Model()), torch.randn(4, 5, requires_grad=True)
    with px.backpack(px.BatchGrad()):
        model(x).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(model.layer.weight.grad_batch, x.detach()[:, None].expand(4, 3, 5))
    layer, z = px.extend(nn.Linear(5, 3).double()), torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (z,))


def test_what_a_model_computes_can_be_saved_and_copied() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.register_buffer("mean", torch.zeros(3))
            self.kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.mean = self.mean.lerp(self.layer(x).detach().mean(0), 0.1)
            self.kept = [(2 * self.layer.weight).detach(), self.layer(x).detach()]
            return self.layer(x)

    model = px.extend(Model())
    model(torch.randn(4, 5))
    for t in (*model.kept, model.mean):
        file = io.BytesIO()
        torch.save(t, file)
        file.seek(0)
        torch.testing.assert_close(torch.load(file), t)
        torch.testing.assert_close(copy.deepcopy(t), t)
    px.unextend(model)
    assert not vars(model.mean)


class Edited(nn.Module):
    """Of no bias, table or summand does torch keep the values, nor the input of a linear layer with a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bias_alone = nn.Embedding(7, 5), nn.Linear(5, 5)
        self.weight_alone, self.conv = nn.Linear(5, 5), nn.Conv1d(1, 1, 3, padding=1)
        self.shift, self.head = nn.Parameter(torch.randn(5)), nn.Linear(5, 3)
        self.bias_alone.weight.requires_grad_(False)
        self.weight_alone.bias.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids).mean(1)
        h += self.bias_alone(h)
        h = self.conv(self.weight_alone(h)[:, None])[:, 0]
        return self.head((h + self.shift).tanh())


@pytest.mark.parametrize("quantities", [[], [px.BatchGrad(), px.DiagGGNExact()]], ids=["nothing asked", "rows"])
@pytest.mark.parametrize("half", [False, True])
def test_values_that_no_derivative_takes_may_change(half: bool, quantities: list[Any]) -> None:
    """As in torch, data in place at once, and parameters between the two passes."""
    torch.manual_seed(0)
    plain, ids, y = Edited(), torch.randint(7, (4, 6)), torch.randint(3, (4,))
    model, loss_fn = px.extend(copy.deepcopy(plain)), px.extend(nn.CrossEntropyLoss(reduction="sum"))
    names = [name for name, p in plain.named_parameters() if p.requires_grad]
    want: dict[str, Tensor] = {}
    for this in (plain, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = this(ids)
        with torch.no_grad():
            for p in (this.table.weight, this.shift, this.conv.bias, this.bias_alone.bias, this.weight_alone.bias):
                p.mul_(2.0)
        if this is plain:
            ps = [plain.get_parameter(name) for name in names]
            losses = nn.CrossEntropyLoss(reduction="none")(out.float(), y)
            each = zip(*(torch.autograd.grad(loss, ps, retain_graph=True) for loss in losses), strict=True)
            want = dict(zip(names, map(torch.stack, each), strict=True))
        with px.backpack(*quantities if this is model else ()):
            loss_fn(out.float(), y).backward()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if half else {}
    for name in names:
        mine, other = model.get_parameter(name), plain.get_parameter(name)
        torch.testing.assert_close(mine.grad, other.grad, **tolerance)
        if quantities:
            torch.testing.assert_close(mine.grad_batch, want[name], **tolerance)


@pytest.mark.parametrize(
    "quantities", [[], [px.BatchGrad(), px.DiagGGNExact(), px.DiagHessian()]], ids=["nothing", "all"]
)
@pytest.mark.parametrize("exact", [False, True])
def test_weights_of_a_first_layer_may_change_between_the_passes(quantities: list[Any], exact: bool) -> None:
    """Nobody wants the gradient of its input, so that torch does not keep them: two losses may be made at once."""
    plain = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    model, loss_fn = px.extend(copy.deepcopy(plain)), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(4, 5), torch.randint(3, (4,))
    for this in (plain, model):
        for _ in range(2):  # the second pass is one of a structure that is known
            this.zero_grad()
            with px.backpack(*quantities if this is model else (), exact_grad=exact):
                loss = loss_fn(this(x), y)
                with torch.no_grad():
                    for p in this[0].parameters():
                        p.mul_(0.5)
                loss.backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
        if quantities:
            torch.testing.assert_close(q.grad_batch.sum(0), p.grad)
    loss = loss_fn(model(x), y)
    with torch.no_grad():
        model[2].weight.mul_(0.5)  # that of a later layer is needed as it was, and torch says so
    with pytest.raises(RuntimeError, match="modified by an inplace"), px.backpack(*quantities, exact_grad=exact):
        loss.backward()
