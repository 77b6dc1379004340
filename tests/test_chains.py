"""Curvature of chains of layers: KFRA and PCHMP against BackPACK, against what they come down to, and on every case."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import backpack
import pytest
import torch
from backpack import extensions as theirs
from backpack.extensions.curvature import Curvature
from backpack.extensions.secondorder.hbp.hbp_options import ExpectationApproximation
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import packext as px
from packext import _chain, testing
from packext._quantity import Point
from tests.cases import CASES, Case
from tests.helpers import mlp

#: torch's own advice on even kernels, for the plain model as well.
pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings("ignore:Using padding='same'")]
N = 4


def run(model: nn.Module, loss: nn.Module, x: Any, y: Any, *asked: Any, axis: int = 0, **options: Any) -> None:
    px.extend(model, axis)
    px.extend(loss)
    model.zero_grad()
    keep = any(isinstance(q, (px.PCHMP, px.HMP, px.GGNMP)) for q in asked)
    with px.backpack(*asked, **options):
        loss(testing.call(model, x), y).backward(retain_graph=keep)


def backpacks(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, *asked: Any) -> nn.Module:
    """A copy of the model with what BackPACK finds."""
    torch.manual_seed(3)
    model = backpack.extend(copy.deepcopy(px.unextend(model)))
    loss = backpack.extend(copy.deepcopy(px.unextend(loss)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with backpack.backpack(*asked):
            loss(model(x), y).backward(retain_graph=True)
    return model


# -- BackPACK --------------------------------------------------------------------------------------------------

#: Chains; with a convolution, only such whose output is one position.
CHAINS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "one layer": (lambda: nn.Sequential(nn.Linear(5, 3)), (5,)),
    "sigmoid": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 3)),
        (5,),
    ),
    "tanh and relu": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7, bias=False), nn.ReLU(), nn.Linear(7, 3)),
        (5,),
    ),
    "ends in a sigmoid": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3), nn.Sigmoid()), (5,)),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.4), nn.Sigmoid(), nn.Dropout(0.3), nn.Linear(8, 3)),
        (5,),
    ),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(5, 3)),
        (2, 3, 3),
    ),
    "pooling": (
        lambda: nn.Sequential(
            nn.ZeroPad2d((1, 0, 1, 1)), nn.MaxPool2d(2), nn.AvgPool2d(2, ceil_mode=False), nn.Conv2d(2, 4, 2),
            nn.Tanh(), nn.Flatten(), nn.Linear(4, 3),
        ),
        (2, 7, 8),
    ),
    "pooling and padding between layers": (
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(6, 36), nn.Tanh(), nn.Unflatten(1, (1, 6, 6)), nn.MaxPool2d(2), nn.ZeroPad2d(1),
            nn.AvgPool2d(5), nn.Flatten(), nn.Linear(1, 3),
        ),
        (6,),
    ),
}  # fmt: skip
WITH_UNFLATTEN = "pooling and padding between layers"  # which BackPACK does not know
POSITIONS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "positions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 2, padding=1), nn.Sigmoid(), nn.Conv2d(3, 2, 2, stride=2), nn.Tanh(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(2, 3),
        ),
        (2, 4, 3),
    ),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(10, 3)),
        (5, 4),
    ),
}  # fmt: skip
LOSSES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "cross entropy": lambda: (nn.CrossEntropyLoss(), torch.randint(3, (N,))),
    "cross entropy, sum": lambda: (nn.CrossEntropyLoss(reduction="sum"), torch.randint(3, (N,))),
    "squares": lambda: (nn.MSELoss(), torch.randn(N, 3)),
}


def chain(name: str) -> tuple[nn.Sequential, Tensor]:
    build, shape = {**CHAINS, **POSITIONS}[name]
    return build(), torch.randn(N, *shape)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", [n for n in CHAINS if n != WITH_UNFLATTEN])
def test_backpack_agrees_on_chains(name: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = chain(name)
    criterion, y = LOSSES[loss]()
    other = backpacks(model, criterion, x, y, theirs.KFRA(), theirs.PCHMP("clip", "clip"), theirs.PCHMP("abs", "abs"))
    residual = _chain._residual

    def twice(upper: Any, lower: Any, slope: Tensor) -> Tensor | None:
        """As in BackPACK 1.7.1, whose residuals have the gradient as a factor once too often."""
        found = residual(upper, lower, slope)
        return None if found is None else found * slope

    monkeypatch.setattr(_chain, "_residual", twice)
    for modify in ("clip", "abs"):
        torch.manual_seed(3)
        run(model, criterion, x, y, px.KFRA(), px.PCHMP(modify=modify))
        for (key, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            for got, want in zip(p.kfra, q.kfra, strict=True):
                assert testing.relative_error(got, want) < 1e-9, key
            v = torch.randn(2, *p.shape)
            assert testing.relative_error(p.pchmp(v), getattr(q, modify)(v)) < 1e-9, key


# -- the definitions, with dense Jacobians of the modules --------------------------------------------------------

DRAWING_NOTHING = [name for name in (*CHAINS, *POSITIONS) if name != "dropout"]


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`[entries of f(x), entries of x]`."""
    return torch.autograd.functional.jacobian(f, x).reshape(f(x).numel(), x.numel())


def levels(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The input of each module, and the output."""
    found = [x.detach()]
    for module in model:
        found.append(module(found[-1]).detach())
    return found


def loss_hessian(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(loss, z).reshape(z.numel(), z.numel())


def averaged(model: nn.Sequential, loss: nn.Module, x: Tensor, y: Tensor) -> dict[int, Tensor]:
    """By the index of a module, what KFRA's recursion gives at its output, `[D, D]`."""
    at = levels(model, x)
    whole = loss_hessian(lambda z: loss(z, y), at[-1]).reshape(N, at[-1][0].numel(), N, -1)
    b, found = sum(whole[n, :, n] for n in range(N)), {}
    for k in reversed(range(len(model))):
        found[k] = b
        js = [jacobian(lambda t, k=k: model[k](t), at[k][n : n + 1]) for n in range(N)]
        b = sum(j.T @ b @ j for j in js) / N
    return found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", DRAWING_NOTHING)
def test_kfra_is_its_definition(name: str, loss: str) -> None:
    model, x = chain(name)
    criterion, y = LOSSES[loss]()
    want = averaged(model, criterion, x, y)
    run(model, criterion, x, y, px.KFRA(), px.KFLR())
    for k, module in enumerate(model):
        if not list(module.parameters()):
            continue
        o = module.weight.shape[0]
        b = want[k]
        if isinstance(module, nn.Conv2d):  # the blocks of each position by itself
            b = b.reshape(o, len(b) // o, o, -1).diagonal(dim1=1, dim2=3).sum(-1)
        elif name == "tokens" and k < 2:
            b = b.reshape(len(b) // o, o, -1, o).diagonal(dim1=0, dim2=2).sum(-1)
        assert testing.relative_error(module.weight.kfra[0], b) < 1e-9, k
        assert torch.equal(module.weight.kfra[1], module.weight.kflr[1])
        if module.bias is not None:
            assert testing.relative_error(module.bias.kfra[0], b) < 1e-9, k


@pytest.mark.parametrize("modify", ["clip", "abs"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", DRAWING_NOTHING)
def test_pchmp_is_its_definition(name: str, loss: str, modify: str) -> None:
    model, x = chain(name)
    criterion, y = LOSSES[loss]()
    at = levels(model, x)
    h = loss_hessian(lambda z: criterion(z, y), at[-1])
    slope = torch.autograd.functional.jacobian(lambda z: criterion(z, y), at[-1])
    run(model, criterion, x, y, px.PCHMP(modify=modify))
    for k in reversed(range(len(model))):
        module, names = model[k], [name for name, _ in model[k].named_parameters()]
        for name_ in names:
            p = getattr(module, name_)
            j = jacobian(lambda t, m=module, i=at[k], n=name_: torch.func.functional_call(m, {n: t}, (i,)), p.detach())
            v = torch.randn(3, *p.shape)
            assert testing.relative_error(p.pchmp(v).flatten(1), v.flatten(1) @ (j.T @ h @ j)) < 1e-9, (k, name_)
        f = lambda t, m=module: m(t)  # noqa: E731
        j = jacobian(f, at[k])
        own = torch.autograd.functional.hessian(lambda t, f=f, s=slope: (f(t) * s).sum(), at[k])
        own = own.reshape(len(j.T), -1)
        assert torch.equal(own, own.diagonal().diag())
        h = j.T @ h @ j + (own.clamp(min=0) if modify == "clip" else own.abs())
        slope = (slope.flatten() @ j).reshape(at[k].shape)


# -- what they come down to, on every case -----------------------------------------------------------------------


def curved(case: Case) -> bool:
    return isinstance(case.loss(), (nn.CrossEntropyLoss, nn.MSELoss)) and case.name != "output data class"


class Whole(px.PCHMP):
    """Nothing modified: the Hessian."""

    def measure(self, point: Point, generator: torch.Generator) -> Any:
        return point.positive(lambda r: r)


class Without(px.PCHMP):
    """Second derivatives of functions left out: the GGN."""

    def measure(self, point: Point, generator: torch.Generator) -> Any:
        return point.positive(torch.zeros_like)


#: How many cases at least are chains: a change that refuses more of them is to be seen.
CHAINS_AMONG_CASES = 47


def test_with_one_sample_kfra_is_kflr_on_every_case() -> None:
    accepted = []
    for case in filter(curved, CASES):
        model, inputs, targets = case.build()
        n = testing.batch_size(inputs, case.batch_axis)
        axis = case.batch_axis if testing._samples.has_axis(targets, case.batch_axis, n) else 0
        x, y = testing.select(inputs, 1 % n, n, case.batch_axis), testing.select(targets, 1 % n, n, axis)
        try:
            run(model, case.loss(), x, y, px.KFRA(), axis=case.batch_axis)
        except px.PackextError:
            assert all(p.grad is None for p in model.parameters()), case.name
            continue
        found = {p: p.kfra for p in model.parameters() if hasattr(p, "kfra")}
        run(model, case.loss(), x, y, px.KFLR(), axis=case.batch_axis)
        for name, p in model.named_parameters():
            assert (p in found) == hasattr(p, "kflr"), (case.name, name)
            for got, want in zip(found.get(p, []), getattr(p, "kflr", []), strict=True):
                assert testing.relative_error(got, want) < 1e-9, (case.name, name)
        accepted.append(case.name)
    assert len(accepted) >= CHAINS_AMONG_CASES, accepted


def test_unmodified_products_are_those_of_the_hessian_on_every_case() -> None:
    accepted = []
    for case in filter(curved, CASES):
        model, inputs, targets = case.build()
        try:
            run(model, case.loss(), inputs, targets, Whole(), axis=case.batch_axis)
        except px.PackextError:
            assert all(p.grad is None for p in model.parameters()), case.name
            continue
        for mine, theirs_ in ((Whole(), px.HMP()), (Without(), px.GGNMP())):
            run(model, case.loss(), inputs, targets, mine, theirs_, axis=case.batch_axis)
            for name, p in model.named_parameters():
                assert hasattr(p, "pchmp") == hasattr(p, theirs_.savefield), (case.name, name)
                if hasattr(p, "pchmp"):
                    v = torch.randn(1, *p.shape)
                    want = getattr(p, theirs_.savefield)(v)
                    assert testing.relative_error(p.pchmp(v), want) < 1e-8, (case.name, name, mine)
        accepted.append(case.name)
    assert len(accepted) >= CHAINS_AMONG_CASES, accepted


@pytest.mark.parametrize("wrong", ["average", "root", "residual"])
def test_broken_recursions_are_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add, root, residual = _chain._add_square, _chain._root, _chain._residual
    if wrong == "average":
        monkeypatch.setattr(_chain, "_add_square", lambda square, g, n: add(square, g * (1 + 1e-6), n))
    elif wrong == "root":
        monkeypatch.setattr(_chain, "_root", lambda square: root(square)[:-1])
    else:
        monkeypatch.setattr(_chain, "_residual", lambda *a: None if (r := residual(*a)) is None else -r)
    check = test_pchmp_is_its_definition if wrong == "residual" else test_kfra_is_its_definition
    with pytest.raises(AssertionError):
        check("sigmoid", "cross entropy", *(["clip"] if wrong == "residual" else []))


# -- refusals ------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.c(y + self.b(y.tanh()))


class TwiceUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(self.a(x).tanh()).tanh())


class Swapped(nn.Module):
    """The batch is along axis 1 for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(5, N), nn.Linear(N, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x).t().tanh().t())


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "residual": (Residual, "AddBackward0 .*joins 2 values.*Ask for KFLR", "joins 2 values.*Ask for GGNMP or HMP"),
    "used twice": (TwiceUsed, "a.weight .*used more than once", "a.weight .*used more than once"),
    "norm": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
        "linear maps and convolutions",
        "linear maps and convolutions",
    ),
    "made of parameters": (
        lambda: nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))),
        "not used as it is",
        "not used as it is",
    ),
    "softmax": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Softmax(1), nn.Linear(4, 3)),
        "",
        "SoftmaxBackward0 .*neither",
    ),
    "batch axis": (Swapped, "TanhBackward0 .*Keep the batch axis", ""),
}


@pytest.mark.parametrize("quantity", ["kfra", "pchmp"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_chain_is_refused(name: str, quantity: str) -> None:
    build, *messages = REFUSED[name]
    message = messages[quantity == "pchmp"]
    model, asked = build(), px.KFRA() if quantity == "kfra" else px.PCHMP()
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    if message:
        with pytest.raises(px.PackextError, match=message):
            run(model, nn.CrossEntropyLoss(), x, y, asked)
        assert all(p.grad is None and not hasattr(p, quantity) for p in model.parameters())
    else:
        run(model, nn.CrossEntropyLoss(), x, y, asked)
        assert all(hasattr(p, quantity) for p in model.parameters())


def test_kfra_of_a_wide_layer_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 33, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(33, 3))
    with pytest.raises(px.PackextError, match=r"8448 x 8448 at .*\[4, 33, 16, 16\].*KFLR"):
        run(model, nn.CrossEntropyLoss(), torch.randn(N, 1, 16, 16), torch.randint(3, (N,)), px.KFRA())


def test_losses_of_another_kind_are_refused() -> None:
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    model = nn.Sequential(nn.Linear(5, 3), nn.LogSoftmax(1))
    with pytest.raises(px.PackextError, match="split between"):
        run(model, nn.NLLLoss(), x, y, px.PCHMP())
    with pytest.raises(px.PackextError, match="negative Hessian"):
        model = mlp()
        px.extend(model)
        loss = px.extend(nn.CrossEntropyLoss())
        with px.backpack(px.PCHMP()):
            (-loss(model(x), y)).backward(retain_graph=True)


def test_a_graph_that_is_gone_is_said_to_be() -> None:
    model, loss = px.extend(mlp()), px.extend(nn.CrossEntropyLoss())
    with px.backpack(px.PCHMP()):
        loss(model(torch.randn(N, 5)), torch.randint(3, (N,))).backward(retain_graph=False)
    with pytest.raises(px.PackextError, match="retain_graph=True"):
        model[0].weight.pchmp(torch.randn(1, 7, 5))


def test_several_losses_add_up() -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    loss, found = nn.CrossEntropyLoss(), {}
    for factor in (1.0, 3.0):
        px.extend(model)
        px.extend(loss)
        with px.backpack(px.KFRA(), px.PCHMP()):
            value = loss(model(x), y)
            (value if factor == 1.0 else value + 2 * loss(model(x), y)).backward(retain_graph=True)
        v = torch.ones(1, 7, 5)
        found[factor] = (model[0].weight.kfra, model[0].weight.pchmp(v))
    torch.testing.assert_close(found[3.0][0][0], 3 * found[1.0][0][0])
    torch.testing.assert_close(found[3.0][0][1], found[1.0][0][1])
    torch.testing.assert_close(found[3.0][1], 3 * found[1.0][1])


@pytest.mark.parametrize("scale", ["loss", "sample"])
def test_scale(scale: str) -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    run(model, nn.CrossEntropyLoss(), x, y, px.KFRA(), px.PCHMP(), scale=scale)
    v, b = torch.ones(1, 7, 5), model[0].weight.kfra[0]
    product = model[0].weight.pchmp(v)
    run(model, nn.CrossEntropyLoss(reduction="sum"), x, y, px.KFRA(), px.PCHMP(), scale=scale)
    times = N if scale == "loss" else 1
    torch.testing.assert_close(model[0].weight.kfra[0], times * b)
    torch.testing.assert_close(model[0].weight.pchmp(v), times * product)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.c, self.reentrant = nn.Linear(5, 6), nn.Linear(6, 3), reentrant
        self.inner = nn.Sequential(nn.Tanh(), nn.Linear(6, 6), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(
            self.inner(h) if self.reentrant is None else checkpoint(self.inner, h, use_reentrant=self.reentrant)
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts(reentrant: bool) -> None:
    first, second, x, y = Checkpointed(None), Checkpointed(reentrant), torch.randn(N, 5), torch.randint(3, (N,))
    second.load_state_dict(first.state_dict())
    for model in (first, second):
        run(model, nn.CrossEntropyLoss(), x, y, px.KFRA(), px.PCHMP(), px.KFAC(fisher="exact", bias="joint"))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        v = torch.randn(1, *p.shape)
        torch.testing.assert_close(q.pchmp(v), p.pchmp(v))
        for got, want in zip(q.kfra, p.kfra, strict=True):
            torch.testing.assert_close(got, want)
        if p.dim() == 2:
            for got, want in zip(q.kfac, p.kfac, strict=True):
                torch.testing.assert_close(got, want)


def test_kfra_of_what_is_not_finite_is_refused() -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    with torch.no_grad():
        model[2].weight[1, 1] = torch.nan
    with pytest.raises(px.PackextError, match=r"KFRA: the curvature at the loss's input \[4, 3\] is not finite"):
        run(model, nn.CrossEntropyLoss(), x, y, px.KFRA())


def test_kfra_under_autocast() -> None:
    model, x, y = mlp().float(), torch.randn(N, 5).float(), torch.randint(3, (N,))
    run(model, nn.CrossEntropyLoss(), x, y, px.KFRA())
    want = [p.kfra for p in model.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        run(model, nn.CrossEntropyLoss(), x, y, px.KFRA())
    for p, factors in zip(model.parameters(), want, strict=True):
        for got, factor in zip(p.kfra, factors, strict=True):
            assert got.dtype == torch.float32 and testing.relative_error(got, factor) < 0.02


NAMED = {"kfac": ("sampling", "sqrt"), "kflr": ("exact", "sqrt"), "kfra": ("sum", "average")}


@pytest.mark.parametrize("name", NAMED)
def test_hbp_is_one_of_three(name: str) -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    options = (Curvature.GGN, *NAMED[name], ExpectationApproximation.BOTEV_MARTENS)
    hbp, criterion = px.extensions.HBP(*options), nn.CrossEntropyLoss()
    plain = {"kfac": px.KFAC, "kflr": px.KFLR, "kfra": px.KFRA}[name]()
    run(model, criterion, x, y, hbp, plain)
    other = None if name == "kfac" else backpacks(model, criterion, x, y, theirs.HBP(*options))
    for k, p in enumerate(model.parameters()):
        wanted = [getattr(p, name)] if other is None else [getattr(p, name), list(other.parameters())[k].hbp]
        for want in wanted:
            for got, factor in zip(p.hbp, want, strict=True):
                assert testing.relative_error(got, factor) < 1e-9
    kept = px.extensions.HBP(*options, savefield="mine")
    run(model, criterion, x, y, kept)
    assert hasattr(model[0].weight, "mine")


@pytest.mark.parametrize(
    "options", [("pch-abs", "sum", "average", 0), ("ggn", "sum", "sqrt", 0), ("ggn", "exact", "sqrt", 1)]
)
def test_other_hbp_are_refused(options: tuple[str, str, str, int]) -> None:
    strategies = (ExpectationApproximation.BOTEV_MARTENS, ExpectationApproximation.CHEN)
    with pytest.raises(px.PackextError, match="none of KFAC, KFLR and KFRA"):
        px.extensions.HBP(*options[:3], strategies[options[3]])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="clip"):
        px.PCHMP(modify="positive")
    for quantity in (px.PCHMP, px.HMP, px.GGNMP):
        for field in ("abs", "grad", "my block"):  # "abs": an attribute of tensors, and a choice of PCHMP
            with pytest.raises(ValueError, match=f"savefield must be a name .* got '{field}'"):
                quantity(field)


def test_products_in_fields_of_ones_own() -> None:
    """With fields of their own both choices of PCHMP are had in one pass, under BackPACK's arguments."""
    model, criterion, x, y = mlp(), nn.CrossEntropyLoss(), torch.randn(N, 5), torch.randint(3, (N,))
    found = []
    for asked in ([px.PCHMP(), px.HMP()], [px.PCHMP(modify="abs"), px.GGNMP()]):
        run(model, criterion, x, y, *asked)
        found += [getattr(model[0].weight, q.savefield) for q in asked]
    v = torch.randn(2, 7, 5)
    want = [product(v) for product in found]
    fields = ["clipped", "whole", "turned", "gauss_newton"]
    both = px.PCHMP("clipped", "clip"), px.HMP("whole"), px.PCHMP("turned", "abs"), px.GGNMP(savefield="gauss_newton")
    del model[0].weight.pchmp
    run(model, criterion, x, y, *both)
    for field, product in zip(fields, want, strict=True):
        torch.testing.assert_close(getattr(model[0].weight, field)(v), product)
    assert not torch.allclose(want[0], want[2]) and not hasattr(model[0].weight, "pchmp")


@pytest.mark.parametrize("layer", [0, 2])
def test_some_of_the_parameters(layer: int) -> None:
    """What is asked of one layer is what all layers get; whose bias it is, is asked among those that are wanted."""
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    asked = (px.KFRA(), px.PCHMP(), px.KFAC(fisher="exact", bias="joint"))
    found = []
    for options in ({}, {"parameters": list(model[layer].parameters())}):
        run(model, nn.CrossEntropyLoss(), x, y, *asked, **options)
        weight, bias = model[layer].weight, model[layer].bias
        products = [p.pchmp(torch.ones(1, *p.shape)) for p in (weight, bias)]
        found.append([*weight.kfra, *bias.kfra, *products, *weight.kfac])
        assert bias.kfac.weight is weight
        for p in model[2 - layer].parameters() if options else ():
            assert not any(hasattr(p, q.savefield) for q in asked)
    torch.testing.assert_close(*found)
    run(model, nn.CrossEntropyLoss(), x, y, asked[2], parameters=[model[layer].weight])
    assert [len(f) for f in model[layer].weight.kfac] == [len(model[layer].weight), model[layer].weight.shape[1]]


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


def test_a_layer_that_gives_nothing() -> None:
    """Samples of no tokens at all: what is before them has no curvature, and what is behind them all that there is."""
    model, x, y = (
        nn.Sequential(nn.Linear(5, 4), nn.Tanh(), Sum(), nn.Linear(4, 3)),
        torch.ones(N, 0, 5),
        torch.ones(N, 3),
    )
    run(model, nn.MSELoss(), x, y, px.KFRA(), px.PCHMP(), px.KFLR(), px.GGNMP())
    for p in model.parameters():
        v = torch.randn(2, *p.shape)
        torch.testing.assert_close(p.kfra, p.kflr)
        torch.testing.assert_close(p.pchmp(v), p.ggnmp(v))
    assert model[3].bias.kfra[0].any() and not model[0].bias.kfra[0].any()
