"""Losses that a model computes itself: which of its calls are losses, and that they give what one outside gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packext as px
from packext import testing
from tests.cases import Lambda

pytestmark = pytest.mark.usefixtures("double")

N, T, C = 4, 3, 5


class Model(nn.Module):
    """Logits of tokens, with a loss that `compute(hidden, logits, y)` makes of them inside."""

    def __init__(self, compute: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, C)
        self.compute = compute

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x).tanh()
        logits = self.second(hidden)
        return {"loss": self.compute(hidden, logits, y), "logits": logits}


def entropy(_: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=2)


def squares(hidden: Tensor, *_: Tensor) -> Tensor:
    return F.mse_loss(hidden, torch.zeros_like(hidden), reduction="sum")


def curvature() -> list[Any]:
    return [px.DiagGGNExact(), px.KFLR(), px.SqrtGGNExact(), px.DiagEF()]


def values(model: nn.Module) -> dict[str, Any]:
    found = {}
    for name, p in model.named_parameters():
        root = p.sqrt_ggn_exact.flatten(2)
        found[name] = [p.diag_ggn_exact, *p.kflr, torch.einsum("vnp,vnq->npq", root, root), p.diag_ef]
    return found


def run(model: nn.Module, loss: Callable[[], Tensor], **options: Any) -> dict[str, Any]:
    with px.backpack(*curvature(), **options):
        loss().backward()
    return values(model)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(N, T, 6), torch.randint(C, (N, T))


@pytest.mark.parametrize("scale", ["loss", "sample"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_loss_inside_gives_what_one_outside_gives(keep: bool, scale: str) -> None:
    model, (x, y) = px.extend(Model(entropy)), data()
    loss_fn = px.extend(nn.CrossEntropyLoss(ignore_index=2))
    want = run(model, lambda: loss_fn(model(x, y)["logits"].flatten(0, 1), y.flatten()), scale=scale)
    kept = []

    def inside() -> Tensor:
        output = model(x, y)
        if keep:
            kept.append(output)
        return output["loss"]

    torch.testing.assert_close(run(model, inside, scale=scale), want)


def test_a_module_inside_is_one_loss() -> None:
    loss = nn.CrossEntropyLoss(ignore_index=2)
    model, (x, y) = Model(lambda _, logits, y: loss(logits.flatten(0, 1), y.flatten())), data()
    model.loss = loss
    px.extend(model)
    found = run(model, lambda: model(x, y)["loss"])
    other = px.extend(Model(entropy))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(found, run(other, lambda: other(x, y)["loss"]))


class Together(nn.Module):
    """A loss that is made of losses: modules and functions, called by itself and by a part of it that is none."""

    reduction = "mean"

    def __init__(self) -> None:
        super().__init__()
        self.entropy, self.part = nn.CrossEntropyLoss(), Lambda(lambda z: 0.3 * F.mse_loss(z, torch.zeros_like(z)))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return self.entropy(logits, y) + self.part(logits)


def test_losses_that_a_loss_calls_are_parts_of_it() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, C)), (torch.randn(N, 6), torch.arange(N))
    quantities = [px.DiagGGNExact(), px.SqrtGGNExact(), px.DiagHessian(), px.HMP(), px.BatchGrad()]
    report = testing.check(model, Together(), x, y, quantities)
    assert report.ok, str(report)

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss = model, Together()

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            z = self.net(x)
            return self.loss(z, y), z

    loss_fn, whole = px.extend(Together()), px.extend(Inside())
    with px.backpack(*curvature()):
        loss_fn(whole(x, y)[1], y).backward()
    want = values(whole)
    with px.backpack(*curvature()):
        whole(x, y)[0].backward()
    torch.testing.assert_close(values(whole), want)


@pytest.mark.parametrize("error", [Exception, KeyboardInterrupt])
def test_a_loss_that_fails_hides_no_later_one(error: type[BaseException]) -> None:
    class Fails(nn.Module):
        reduction = "mean"

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            raise error

    fails, (x, y) = px.extend(Fails()), (torch.randn(N, 6), torch.arange(N))
    with pytest.raises(error):
        fails(x, y)
    assert testing.check(nn.Linear(6, C), nn.CrossEntropyLoss(), x, y, [px.DiagGGNExact()]).ok


def test_weighted_sums_of_losses_add_up() -> None:
    parts = []
    for compute in (entropy, squares, lambda *args: 0.5 * entropy(*args) + squares(*args) / 3):
        torch.manual_seed(0)
        model = px.extend(Model(compute))
        x, y = data()
        with px.backpack(px.BatchDiagGGNExact(), scale="loss"):
            model(x, y)["loss"].backward()
        parts.append([getattr(p, "diag_ggn_exact_batch", torch.zeros(N, *p.shape)) for p in model.parameters()])
    torch.testing.assert_close(parts[2], [0.5 * a + b / 3 for a, b in zip(*parts[:2], strict=True)])


@pytest.mark.parametrize(
    "compute",
    [
        lambda *args: entropy(*args).exp(),
        lambda *args: entropy(*args) * entropy(*args),
        lambda *args: 1 / entropy(*args),
        lambda hidden, logits, _: (logits - hidden.sum()).square().mean(),
    ],
)
def test_what_is_not_linear_in_a_loss_is_no_loss(compute: Any) -> None:
    model, (x, y) = px.extend(Model(compute)), data()
    with pytest.raises(px.NotExtendedError, match="no extended loss"), px.backpack(px.DiagGGNExact()):
        model(x, y)["loss"].backward()
    with px.backpack(px.BatchGrad()):
        model(x, y)["logits"].sum().backward()


@pytest.mark.parametrize("quantity", [px.DiagGGNExact, px.DiagHessian, px.HMP])
def test_other_terms_beside_a_loss_inside_are_refused(quantity: Any) -> None:
    def penalised(hidden: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        return entropy(hidden, logits, y) + 0.1 * logits.exp().mean()

    x, y = data()
    model, other = px.extend(Model(penalised)), px.extend(Model(entropy))
    with pytest.raises(px.PackextError, match="other terms"), px.backpack(quantity()):
        model(x, y)["loss"].backward()
    with pytest.raises(px.PackextError, match="other terms"), px.backpack(quantity()):
        output = other(x, y)
        (output["loss"] + output["logits"].exp().mean()).backward()


def test_a_model_that_reads_another_one() -> None:
    """The loss is computed in the second of two extended models."""
    x, y = data()
    first, second, plain = (
        nn.Sequential(nn.Linear(6, 6), nn.Tanh()),
        Model(entropy),
        nn.CrossEntropyLoss(ignore_index=2),
    )
    whole = nn.Sequential(first, second.first, nn.Tanh(), second.second)
    loss_fn = px.extend(plain)
    px.extend(whole)

    def found(loss: Callable[[], Tensor]) -> list[Any]:
        for p in whole.parameters():
            p.__dict__.clear()
        with px.backpack(px.HMP(), px.DiagGGNExact()):
            loss().backward(retain_graph=True)
        return [(p.hmp(torch.ones(1, *p.shape)), p.diag_ggn_exact) for p in whole.parameters()]

    want = found(lambda: loss_fn(whole(x).flatten(0, 1), y.flatten()))
    px.unextend(whole)
    px.extend(first), px.extend(second)
    torch.testing.assert_close(found(lambda: second(first(x), y)["loss"]), want)


class Distances(nn.Module):
    """Squared distances to prototypes are logits: a function of a loss's name that is a step on the way."""

    def __init__(self, function: bool, inside: bool) -> None:
        super().__init__()
        self.first, self.prototypes = nn.Linear(6, 4), nn.Parameter(torch.randn(C, 4))
        self.function, self.inside = function, inside

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.first(x)[:, None].expand(-1, C, -1), self.prototypes.expand(len(x), -1, -1)
        logits = -(F.mse_loss(a, b, reduction="none") if self.function else (a - b).square()).sum(-1)
        return F.cross_entropy(logits, y) if self.inside else logits


@pytest.mark.parametrize("inside", [False, True])
def test_a_function_on_the_way_to_a_loss_is_none(inside: bool) -> None:
    found = []
    loss_fn = px.extend(nn.CrossEntropyLoss())
    for function in (False, True):
        torch.manual_seed(0)
        model = px.extend(Distances(function, inside))
        x, y = torch.randn(N, 6), torch.randint(C, (N,))
        with px.backpack(px.DiagGGNExact(), px.BatchGrad(), scale="sample"):
            output = model(x, y)
            (output if inside else loss_fn(output, y)).backward()
        found.append([(p.diag_ggn_exact, p.grad_batch) for p in model.parameters()])
    torch.testing.assert_close(*found)


def test_individual_gradients_where_only_the_loss_is_kept() -> None:
    model, (x, y) = px.extend(Model(entropy)), data()
    share = [float((y[n] != 2).sum() / (y != 2).sum()) for n in range(N)]
    rows = testing.individual_gradients(model, lambda output, _: output["loss"], {"x": x, "y": y}, y, weights=share)
    with px.backpack(px.BatchGrad()):
        model(x, y)["loss"].backward()
    for name, p in model.named_parameters():
        assert testing.relative_error(p.grad_batch, rows[name]) < 1e-12


class Fused(nn.Module):
    """A classifier whose last layer is a part of the loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.body, self.loss = nn.Linear(6, 4), nn.LinearCrossEntropyLoss(4, C, bias=True, **options)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(self.body(x).tanh(), y)


class Parts(nn.Module):
    """The same of the modules that it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 4), nn.Linear(4, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has none")
@pytest.mark.parametrize("apart", [False, True])
def test_a_loss_with_a_layer_in_it(apart: bool) -> None:
    parts, fused, x, y = Parts(), Fused(), torch.randn(N, 6), torch.randint(C, (N,))
    fused.load_state_dict({k.replace("head", "loss.linear"): v for k, v in parts.state_dict().items()})
    loss_fn = px.extend(nn.CrossEntropyLoss())
    px.extend(parts)
    want = run(parts, lambda: loss_fn(parts(x), y), scale="sample")
    if apart:  # a loss that is extended by itself, behind an extended model
        body = px.extend(nn.Sequential(fused.body, nn.Tanh()))
        px.extend(fused.loss)
        with px.backpack(*curvature(), scale="sample"):
            fused.loss(body(x), y).backward()
        found = values(fused)
    else:
        px.extend(fused)
        found = run(fused, lambda: fused(x, y), scale="sample")
    torch.testing.assert_close({k.replace("loss.linear", "head"): v for k, v in found.items()}, want)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has none")
@pytest.mark.parametrize("quantity", [px.BatchGrad(), px.KFLR()])
def test_a_loss_in_chunks_is_refused(quantity: Any) -> None:
    model, x, y = Fused(options=nn.LinearCrossEntropyOptions()), torch.randn(N, 6), torch.randint(C, (N,))
    model(x, y).backward()
    before = [p.grad for p in model.parameters()]
    model.zero_grad()
    px.extend(model)
    with pytest.raises(px.UnsupportedUseError, match=r"in module loss \[LinearCrossEntropyLoss\].*options"):
        with px.backpack(quantity):
            model(x, y).backward()
    assert all(p.grad is None for p in model.parameters())
    model(x, y).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], before)


class Weighted(nn.Module):
    """A learned weight of the loss, which has another term for it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return (-self.weight).exp() * F.mse_loss(output, y) + self.weight


def test_a_parameter_behind_a_loss_inside_is_refused() -> None:
    """Be it a loss that is extended as a model is, since it has a parameter; what the error says to do is right."""
    model, x, y = px.extend(nn.Linear(6, C)), torch.randn(N, 6), torch.randn(N, C)
    whole, outside = px.extend(Weighted()), Weighted()
    with pytest.raises(px.PackextError, match="parameters weight comes behind a loss that the model has computed"):
        with px.backpack(px.BatchGrad()):
            whole(model(x), y).backward()
    with px.backpack(px.BatchGrad()) as rows:
        outside(model(x), y).backward()
    with px.backpack(px.BatchGrad(), parameters=model.parameters()) as without:
        whole(model(x), y).backward()
    torch.testing.assert_close(without[model.weight].grad_batch, rows[model.weight].grad_batch)
    slopes = 2 * (-outside.weight.detach()).exp() * (model(x) - y).detach() / (N * C)
    torch.testing.assert_close(rows[model.bias].grad_batch, slopes)


def spoken(logits: Tensor, y: Tensor, **options: Any) -> Tensor:
    """The steps of each sample are told as its labels, but for those that are 0, as a speech recogniser's are."""
    keep = (y > 0) & (torch.arange(T) < 1)
    lengths = torch.full((len(y),), T)
    return F.ctc_loss(logits.log_softmax(-1).transpose(0, 1), y[keep], lengths, keep.sum(1), **options)


@pytest.mark.parametrize(
    "compute",
    [
        spoken,
        functools.partial(spoken, reduction="sum"),
        lambda z, y: F.poisson_nll_loss(z[..., 0], y.to(z), full=True),
        lambda z, y: F.soft_margin_loss(z[..., 0], 1.0 - 2 * (y > 1)),
        lambda z, y: F.hinge_embedding_loss(input=z[..., 0], target=1 - 2 * (y > 1), margin=0.5, reduction="sum"),
        lambda z, y: F.multi_margin_loss(z[:, 0], y[:, 0], p=2, margin=0.7),
        lambda z, y: F.multilabel_margin_loss(z[:, 0], F.pad(y[:, :2], (0, C - 2), value=-1)),
        lambda z, y: F.multilabel_soft_margin_loss(z[:, 0], F.one_hot(y[:, 0], C).to(z)),
    ],
    ids=["ctc", "ctc sum", "poisson", "soft margin", "hinge", "multi margin", "multilabel", "multilabel soft"],
)
def test_losses_of_torch_are_known_inside(compute: Any) -> None:
    """Rows are those of the samples' own losses: what each gives by itself."""
    model, (x, y) = Model(lambda _, logits, y: compute(logits, y)), data()
    y[:, 0] = torch.tensor([1, 3, 4, 1])
    parameters = list(model.parameters())
    own = [torch.autograd.grad(model(x[n : n + 1], y[n : n + 1])["loss"], parameters) for n in range(N)]
    px.extend(model)
    with px.backpack(px.BatchGrad(), px.ClippedGrad(1e-3), scale="sample"):
        output = model(x, y)
        output["loss"].backward()
    sizes = torch.stack([torch.stack([g.norm() for g in row]).norm() for row in own])
    weights = (1e-3 / sizes).clamp(max=1.0).nan_to_num()
    for p, *rows in zip(parameters, *own, strict=True):
        torch.testing.assert_close(p.grad_batch, torch.stack(rows))
        torch.testing.assert_close(p.clipped_grad, torch.einsum("n,n...->...", weights, torch.stack(rows)))


@pytest.mark.parametrize("quantity", [px.DiagGGNExact(), px.KFAC(), px.DiagHessian()])
def test_a_loss_inside_that_torch_differentiates_once_has_no_curvature(quantity: Any) -> None:
    model, (x, y) = px.extend(Model(lambda _, logits, y: spoken(logits, y))), data()
    with pytest.raises(px.PackextError, match="CTCLoss"), px.backpack(quantity):
        output = model(x, y.clamp(min=1))
        output["loss"].backward()
    assert all(p.grad is None for p in model.parameters())
