"""Kronecker factors on every case against their definition, one sample and one column at a time, in float64."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packext as px
from packext import linalg, testing
from tests.cases import CASES, Case
from tests.helpers import batch, mlp

#: torch's own advice on even kernels, for the plain model as well.
pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings("ignore:Using padding='same'")]
N = 4
#: A weight to which others are added before it is used.
ADDED_TO = ("base.weight",)


def run(model: nn.Module, loss: nn.Module, x: Any, y: Any, *asked: Any, axis: int = 0, **options: Any) -> px.Results:
    px.extend(model, axis)
    px.extend(loss)
    model.zero_grad()
    with px.backpack(*asked, **options) as results:
        loss(testing.call(model, x), y).backward()
    return results


# -- the definition ------------------------------------------------------------------------------------------


def curved(case: Case) -> bool:
    return isinstance(case.loss(), (nn.CrossEntropyLoss, nn.MSELoss)) and case.name != "output data class"


@functools.cache
def reference(name: str, tables: bool) -> testing.Reference:
    """Of the parameters of a case's linear maps, convolutions and embeddings (or without these)."""
    case = next(c for c in CASES if c.name == name)
    model, inputs, targets = case.build()
    weights = None if case.weights is None else case.weights(targets)
    rest = (case.loss(), inputs, targets, case.batch_axis, weights)
    this = testing.Reference(model, *rest)
    modules = {k: m for k, m in this.factors("exact").modules.items() if k not in ADDED_TO}
    own = {
        id(p)
        for ms in modules.values()
        if tables or not any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in ms)
        for m in ms
        for p in m.parameters()
    }
    names = [k for k, p in this.parameters.items() if id(p) in own]
    return testing.Reference(model, *rest, [model.get_parameter(k) for k in names])


def check(case: Case, approx: str, bias: str) -> int:
    """Compare the factors of every module that the definition knows; how many parameters there were."""
    this = reference(case.name, approx == "expand")
    if not this.parameters:
        return 0
    asked = px.KFAC(fisher="exact", approx=approx, bias=bias)
    if case.name == "one convolution called twice" and approx == "reduce":  # positions of several uses are not pooled
        with pytest.raises(px.UnsupportedUseError, match='approx="reduce".*Use approx="expand"'):
            testing.against(this, [asked])
        return len(this.parameters)
    report = testing.against(this, [asked], 1e-9)
    assert report.ok, str(report)
    return len(this.parameters)


@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", [c for c in CASES if curved(c)], ids=lambda c: c.name)
def test_factors_on_every_case(case: Case, approx: str, bias: str) -> None:
    if not check(case, approx, bias):
        pytest.skip("no linear map, convolution or embedding of its own")


@pytest.mark.parametrize("wrong", range(3))
def test_wrong_factors_are_noticed(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from packext import _factored

    moments, counts = _factored.Outer._moments, _factored.Lookup._counts
    if wrong == 0:
        monkeypatch.setattr(_factored.Outer, "_moments", lambda self, *share: moments(self, *share) * (1 + 1e-6))
    elif wrong == 1:
        monkeypatch.setattr(_factored.Outer, "with_bias", lambda self: self)
    else:
        monkeypatch.setattr(_factored.Lookup, "_counts", lambda self: counts(self).roll(1, -1))
    case = next(c for c in CASES if c.name.startswith("embedding" if wrong == 2 else "mlp"))
    with pytest.raises(AssertionError):
        check(case, "expand", "joint")


# -- weight and bias in one block ------------------------------------------------------------------------------


class WithOne(nn.Module):
    """A linear layer whose bias is the last column of its weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([layer.weight, layer.bias[:, None]], 1).detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.cat([x, torch.ones_like(x[..., :1])], -1), self.weight)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical", "mc"])
def test_a_joint_block_is_that_of_a_layer_with_a_constant_input(fisher: str, approx: str) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3), Mean())
    other = nn.Sequential(WithOne(model[0]), nn.Tanh(), WithOne(model[2]), Mean())
    x, y = torch.randn(N, 4, 5), torch.randint(3, (N,))
    for m in (model, other):
        numbers = torch.Generator().manual_seed(7)
        run(m, nn.CrossEntropyLoss(), x, y, px.KFAC(2, approx, fisher, numbers, bias="joint"), scale="sample")
    for k in (0, 2):
        for got, want in zip(model[k].weight.kfac, other[k].weight.kfac, strict=True):
            torch.testing.assert_close(got, want)
        joint = model[k].bias.kfac
        got = linalg.kron_matvec(model[k].weight.kfac, joint.join(model[k].weight.grad, model[k].bias.grad))
        torch.testing.assert_close(got, linalg.kron_matvec(other[k].weight.kfac, other[k].weight.grad))
        weight, bias = joint.split(got)
        assert weight.shape == model[k].weight.shape and bias.shape == model[k].bias.shape
        torch.testing.assert_close(joint.join(weight, bias), got)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def test_a_joint_block_is_exact_for_one_sample() -> None:
    model, x, y = mlp(), torch.randn(1, 5), torch.randint(3, (1,))
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y)
    run(model, nn.CrossEntropyLoss(), x, y, px.KFAC(fisher="exact", bias="joint"))
    for k in (0, 2):
        both = torch.cat([rows[f"{k}.weight"], rows[f"{k}.bias"][..., None]], -1).flatten(2).flatten(0, 1)
        torch.testing.assert_close(linalg.kron(model[k].weight.kfac), both.T @ both)


@pytest.mark.parametrize("groups", [1, 2])
def test_corrected_eigenvalues_of_a_joint_block(groups: int) -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 2, groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))
    x, y = torch.randn(N, 4, 4), torch.randint(3, (N,))
    loss = nn.CrossEntropyLoss()
    rows = testing.curvature_rows(model, loss, x, y, weights=[1 / N] * N)
    results = run(model, loss, x, y, px.EKFAC(fisher="exact", bias="joint"))
    basis = {name: results[name].ekfac for name in results}
    run(model, loss, x, y, px.EKFAC(basis, fisher="exact", bias="joint"))
    for layer in ("0", "3"):
        joint, decomposed = model[int(layer)].bias.ekfac, model[int(layer)].weight.ekfac
        both = torch.cat([rows[f"{layer}.weight"].flatten(3), rows[f"{layer}.bias"][..., None]], -1)
        want = decomposed.rotate(both).square().sum((0, 1))
        torch.testing.assert_close(decomposed.eigenvalues.reshape(want.shape), want)
        assert joint.weight is model[int(layer)].weight
    for wrong in ("separate", "joint"):
        first = run(model, loss, x, y, px.EKFAC(fisher="exact", bias="joint" if wrong == "separate" else "separate"))
        basis = {name: first[name].ekfac for name in first}
        with pytest.raises(px.UnsupportedUseError, match="does not fit"):
            run(model, loss, x, y, px.EKFAC(basis, fisher="exact", bias=wrong))


class Sharing(nn.Module):
    """A bias in two layers, a weight with and without one, and a value made of a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.d, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).tanh()).tanh()
        x = F.linear(self.c(x).tanh(), self.c.weight).tanh()
        return self.head(F.linear(x, self.d.weight, 2 * self.d.bias).tanh())


def test_a_joint_block_beside_the_graph_of_another_pass() -> None:
    """As long as somebody holds its loss, there is a use without the bias, which is none of this pass."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor, bare: bool) -> Tensor:
            return F.linear(x, self.layer.weight) if bare else self.layer(x)

    model, loss, (x, y) = px.extend(Net()), px.extend(nn.CrossEntropyLoss()), batch()
    held = loss(model(x, True), y)
    with px.backpack(px.KFAC(bias="joint"), px.EKFAC(bias="joint")):
        loss(model(x, False), y).backward()
    assert [f.shape[0] for f in model.layer.weight.kfac] == [3, 6]
    assert model.layer.bias.kfac.weight is model.layer.bias.ekfac.weight is model.layer.weight
    held.backward()


def test_who_has_a_joint_block() -> None:
    model, x, y = Sharing(), torch.randn(N, 4), torch.randint(3, (N,))
    model.d.bias.requires_grad_(False)
    run(model, nn.CrossEntropyLoss(), x, y, px.KFAC(bias="joint"))
    assert model.head.weight.kfac[1].shape == (5, 5) and model.head.bias.kfac.weight is model.head.weight
    for layer in (model.a, model.b, model.c, model.d):
        assert layer.weight.kfac[1].shape == (4, 4)
        assert not layer.bias.requires_grad or layer.bias.kfac[0].shape == (4, 4)
    with pytest.raises(ValueError, match="together with the weight"):
        inspect.unwrap(linalg.kron_trace)(model.head.bias.kfac)


@pytest.mark.parametrize("k", range(3))
def test_a_step_of_natural_gradient_as_an_optimizer_takes_it(k: int) -> None:
    bias = ("separate", "joint", "joint")[k]
    model = nn.Sequential(nn.Embedding(6, 5), nn.Flatten(), nn.Linear(15, 7), nn.Tanh(), nn.Linear(7, 3))
    x, y, loss = torch.randint(6, (32, 3)), torch.randint(3, (32,)), nn.CrossEntropyLoss()
    values = []
    field = "ekfac" if k == 2 else "kfac"
    for _ in range(10):
        asked = px.EKFAC(fisher="exact", bias=bias) if k == 2 else px.KFAC(fisher="exact", bias=bias)
        run(model, loss, x, y, asked)
        values.append(float(loss(model(x), y).detach()))
        with torch.no_grad():
            parameters = list(model.parameters())
            joints = [(p, getattr(p, field)) for p in parameters if isinstance(getattr(p, field), linalg.Joint)]
            alone = set(parameters) - {p for p, _ in joints} - {joint.weight for _, joint in joints}
            for p, joint in joints:
                step = solve(getattr(joint.weight, field), joint.join(joint.weight.grad, p.grad))
                for q, part in zip((joint.weight, p), joint.split(step), strict=True):
                    q -= 0.5 * part
            for p in alone:
                p -= 0.5 * solve(getattr(p, field), p.grad)
    assert values[-1] < 0.5 * values[0]


def solve(factors: Any, gradient: Tensor) -> Tensor:
    if isinstance(factors, linalg.KronEigh):
        return factors.matvec(gradient, lambda e: 1 / (e + 1e-2))
    return linalg.kron_matvec(linalg.kron_inv(factors, 1e-2), gradient)


# -- weights stored the other way ------------------------------------------------------------------------------


class Product(nn.Module):
    """A linear map in one of the ways to write it; `p` is `[I, O]`, with groups `[H, I, O]`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.p = nn.Parameter(torch.randn(*((2,) if "groups" in how else ()), 4, 6))
        self.bias = nn.Parameter(torch.randn(6)) if how == "addmm" else None
        self.head = nn.Linear(12 if "groups" in how else 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "matmul":
            y = x @ self.p
        elif self.how == "addmm":
            y = torch.addmm(self.bias, x.view(-1, 4), self.p).view(*x.shape[:-1], 6)
        elif self.how == "einsum":
            y = torch.einsum("nti,io->nto", x, self.p)
        elif self.how == "groups, einsum":
            y = torch.einsum("nthi,hio->ntho", torch.stack([x, x.flip(-1)], 2), self.p)
        else:
            y = (torch.stack([x, x.flip(-1)], 1) @ self.p).transpose(1, 2)
        return self.head(y.flatten(2).tanh().mean(1))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("how", ["matmul", "addmm", "einsum", "groups, einsum", "groups, matmul"])
def test_a_weight_that_is_stored_transposed(how: str, approx: str) -> None:
    model, x, y = Product(how), torch.randn(N, 5, 4), torch.randint(3, (N,))
    asked = px.KFAC(fisher="exact", approx=approx, bias="joint")
    run(model, nn.CrossEntropyLoss(), x, y, asked)
    inputs, outputs = model.p.kfac
    if "groups" in how:
        layer = nn.Conv1d(8, 12, 1, groups=2, bias=False)
        layer.weight.data = model.p.detach().mT.reshape(12, 4, 1)
        other = nn.Sequential(Swap(), layer, Swap(), nn.Tanh(), Mean(), model.head)
        z = torch.cat([x, x.flip(-1)], 2)
    else:
        layer = nn.Linear(4, 6, bias=how == "addmm")
        layer.weight.data = model.p.detach().mT.clone()
        if how == "addmm":
            layer.bias.data = model.bias.detach().clone()
        other, z = nn.Sequential(layer, nn.Tanh(), Mean(), model.head), x
    run(other, nn.CrossEntropyLoss(), z, y, asked)
    for got, want in zip((outputs, inputs), layer.weight.kfac, strict=True):
        torch.testing.assert_close(got, want)
    if how != "addmm":
        got, want = (linalg.kron_matvec(p.kfac, p.grad) for p in (model.p, layer.weight))
        torch.testing.assert_close(got.mT.reshape(want.shape), want)
    if how == "addmm":
        joint = model.bias.kfac
        assert joint.axis == 0
        both = joint.join(model.p.grad, model.bias.grad)
        torch.testing.assert_close(both.mT, layer.bias.kfac.join(layer.weight.grad, layer.bias.grad))
        for got, want in zip(joint.split(both), (model.p.grad, model.bias.grad), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("how", ["matmul", "addmm", "einsum", "groups, einsum", "groups, matmul", "table"])
def test_factors_for_two_quantities_of_one_pass_are_those_of_each_alone(how: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), Mean(), nn.Linear(4, 3)) if how == "table" else Product(how)
    x, y = torch.randint(5, (N, 6)) if how == "table" else torch.randn(N, 5, 4), torch.randint(3, (N,))
    asked = px.KFLR(), px.KFAC(fisher="exact")
    together = run(model, nn.CrossEntropyLoss(), x, y, *asked)
    for quantity in asked:
        alone, field = run(model, nn.CrossEntropyLoss(), x, y, quantity), quantity.savefield
        for name, result in alone.items():
            torch.testing.assert_close(getattr(together[name], field), getattr(result, field), rtol=0, atol=0)


class Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


@pytest.mark.parametrize("how", ["matmul", "conv transpose", "conv transpose, groups", "embedding"])
def test_what_is_stored_transposed_is_exact_for_one_sample_and_position(how: str) -> None:
    if how == "embedding":
        model: nn.Module = nn.Sequential(nn.Embedding(5, 4, padding_idx=2), nn.Flatten(), nn.Tanh(), nn.Linear(4, 3))
        x: Tensor = torch.tensor([[3]])
    elif how == "matmul":
        model, x = Product("matmul"), torch.randn(1, 1, 4)
    else:
        layer = nn.ConvTranspose1d(4, 6, 3, groups=2 if "groups" in how else 1, bias=False)
        model, x = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)), torch.randn(1, 4, 1)
    y = torch.randint(3, (1,))
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y)
    run(model, nn.CrossEntropyLoss(), x, y, px.KFAC(fisher="exact"), px.EKFAC(fisher="exact"))
    first = {name: p.ekfac for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        flat = rows[name].flatten(2).flatten(0, 1)
        want = flat.T @ flat
        if p.kfac[0].dim() == 3:  # groups have blocks of their own
            want = torch.block_diag(*(want[k : k + 18, k : k + 18] for k in (0, 18)))
        torch.testing.assert_close(linalg.kron(p.kfac), want)
        v = torch.randn_like(p)
        torch.testing.assert_close(first[name].matvec(v), linalg.kron_matvec(p.kfac, v))
    run(model, nn.CrossEntropyLoss(), x, y, px.EKFAC(first, fisher="exact"))
    for name, p in model.named_parameters():
        want = first[name].rotate(rows[name]).square().sum((0, 1))
        torch.testing.assert_close(p.ekfac.eigenvalues.reshape(want.shape), want)


class PerHead(nn.Module):
    """A weight whose inputs stand between its outputs: no Kronecker product is in the order of its axes."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.head = nn.Parameter(torch.randn(2, 4, 3)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.einsum("ni,hid->nhd", x, self.p).flatten(1))


class Divided(nn.Module):
    """A weight of which the first use takes a part of each row, and the second all."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.head = nn.Parameter(torch.randn(6, 4)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = F.linear(x[:, :2], self.p[:, :2])
        return self.head((first + F.linear(x.tanh(), self.p)).tanh())


@pytest.mark.parametrize("build", [PerHead, Divided])
def test_what_is_stored_in_neither_way_is_refused(build: Callable[[], nn.Module]) -> None:
    model, y = build(), torch.randint(3, (N,))
    x = torch.randn(N, 4)
    with pytest.raises(px.UnsupportedUseError, match="for p .*parameters="):
        run(model, nn.CrossEntropyLoss(), x, y, px.KFAC())
    model.p.requires_grad_(False)
    run(model, nn.CrossEntropyLoss(), x, y, px.KFAC())


# -- embeddings ------------------------------------------------------------------------------------------------


def test_an_embedding_has_a_diagonal_factor_and_builds_no_larger_one() -> None:
    model = nn.Sequential(nn.Embedding(200_000, 2), nn.Flatten(), nn.Linear(6, 3))
    x, y = torch.randint(200_000, (N, 3)), torch.randint(3, (N,))
    x[1] = x[0]
    run(model, nn.CrossEntropyLoss(), x, y, px.KFLR(), px.EKFAC(fisher="exact"))
    table = model[0].weight
    counts, outputs = table.kflr
    assert counts.shape == (200_000,) and outputs.shape == (2, 2)
    torch.testing.assert_close(counts.sum(), torch.tensor(1.0))
    inverse = linalg.kron_inv(table.kflr, 0.1)
    assert inverse[0].shape == counts.shape
    v = torch.randn_like(table)
    shift = 1 / inverse[0] - counts
    assert (shift > 0).all() and testing.relative_error(shift, shift[:1].expand_as(shift)) < 1e-9
    back = linalg.kron_matvec([counts + shift, torch.linalg.inv(inverse[1])], linalg.kron_matvec(inverse, v))
    torch.testing.assert_close(back, v)
    torch.testing.assert_close(table.ekfac.matvec(v), linalg.kron_matvec(table.kflr, v))
    torch.testing.assert_close(linalg.kron_trace(table.kflr), outputs.trace())


def test_corrected_eigenvalues_of_an_embedding() -> None:
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=1), nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randint(6, (N, 3)), torch.randint(3, (N,))
    x[0, 0] = 1
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)
    run(model, nn.CrossEntropyLoss(), x, y, px.EKFAC(fisher="exact"))
    first = {p: p.ekfac for p in model.parameters()}
    run(model, nn.CrossEntropyLoss(), x, y, px.EKFAC(first, fisher="exact"))
    table = model[0].weight
    torch.testing.assert_close(table.ekfac.eigenvalues, first[table].rotate(rows["0.weight"]).square().sum((0, 1)))


#: Sizes of bases that are not those of a table [6, 4], a vector [4], or a matrix [3, 4].
MISFITS = {
    "0.weight": [[(4,), (6, 6)], [(6,), (3, 3)], [(9,), (4, 4)], [(24, 24)], [(2, 3, 3), (2, 4, 4)]],
    "1.weight": [[(4,)], [(3, 3)], [(5, 5)], [(4,), (1, 1)]],
    "2.weight": [[(3, 3), (3, 3)], [(4, 4), (3, 3)], [(3,), (4, 4)], [(12, 12)], [(2, 3, 3), (2, 4, 4)]],
}


@pytest.mark.parametrize(("name", "shapes"), [(name, shapes) for name, each in MISFITS.items() for shapes in each])
def test_a_basis_of_other_sizes_is_refused(name: str, shapes: list[tuple[int, ...]]) -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.LayerNorm(4, bias=False), nn.Linear(4, 3, bias=False))
    px.extend(model)
    entries = math.prod(shape[-1] for shape in shapes) * (shapes[0][0] if len(shapes[0]) == 3 else 1)
    basis = linalg.KronEigh([torch.randn(shape) for shape in shapes], torch.ones(entries))
    context = px.backpack(px.EKFAC({name: basis}, fisher="exact"), parameters=[model.get_parameter(name)])
    with pytest.raises(px.UnsupportedUseError, match=f"the basis of {name}.* does not fit it"), context:
        px.extend(nn.CrossEntropyLoss())(model(torch.randint(6, (5,))), torch.randint(3, (5,))).backward()


REFUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "pooled tokens": (
        lambda: nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 3)),
        lambda: px.KFAC(approx="reduce"),
        'Use approx="expand"',
    ),
    "frequencies": (
        lambda: nn.Sequential(nn.Embedding(6, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(12, 3)),
        px.KFAC,
        "0.weight.*parameters=",
    ),
    "the largest of a bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(6, 4, mode="max"), nn.Linear(4, 3)),
        px.KFAC,
        "0.weight.*parameters=",
    ),
    "a bag, pooled": (
        lambda: nn.Sequential(nn.EmbeddingBag(6, 4), nn.Linear(4, 3)),
        lambda: px.KFAC(approx="reduce"),
        'Use approx="expand"',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_lookups_without_factors_are_refused(name: str) -> None:
    build, asked, message = REFUSED[name]
    model = build()
    with pytest.raises(px.UnsupportedUseError, match=message):
        run(model, nn.CrossEntropyLoss(), torch.randint(6, (N, 3)), torch.randint(3, (N,)), asked())
    assert all(p.grad is None and not hasattr(p, "kfac") for p in model.parameters())


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, nn.Bilinear])
def test_a_bias_counts_positions_as_its_weight_does(kind: Any, approx: str) -> None:
    """B of a bias is that of the weight beside it, in layers that have their own rules as well."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(4, 4, 5) if kind is nn.Bilinear else kind(4, 5, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x, x.flip(2)) if kind is nn.Bilinear else self.layer(x)[0]
            return self.head(y.tanh()).mean(1)

    model = px.extend(Net())
    x, y = torch.randn(N, 6, 4), torch.randint(3, (N,))
    run(model, nn.CrossEntropyLoss(), x, y, px.KFAC(fisher="exact", approx=approx))
    found = dict(model.layer.named_parameters())
    pairs = [(k, k.replace("weight", "bias")) for k in found if "weight" in k]
    assert pairs
    for weight, bias in pairs:
        torch.testing.assert_close(found[bias].kfac[0], found[weight].kfac[0])


@pytest.mark.parametrize("bag", [False, True])
def test_a_table_that_is_read_by_samples_of_different_sizes(bag: bool) -> None:
    """Rows that fill up read nothing, and row 0 of the table least of all."""

    class Graphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.EmbeddingBag(5, 3, mode="sum") if bag else nn.Embedding(5, 3)
            self.last = nn.Linear(3, 2)

        def forward(self, kind: Tensor, owner: Tensor) -> Tensor:
            rows = self.table(kind)
            return self.last(rows.new_zeros(2, 3).index_add(0, owner, rows))

    kind = torch.tensor([[1, 2], [3, 3], [4, 1], [2, 2]]) if bag else torch.tensor([1, 2, 3, 1])
    model, loss_fn = px.extend(Graphs().double(), batch_axis=None), px.extend(nn.MSELoss())
    with px.backpack(px.KFLR()):
        loss_fn(model(kind, torch.tensor([0, 0, 0, 1])), torch.zeros(2, 2).double()).backward()
    want = kind.flatten().bincount(minlength=5) / kind.numel()
    torch.testing.assert_close(model.table.weight.kflr[0], want.double())


@pytest.mark.parametrize("quantity", [px.KFLR(), px.KFAC(fisher="exact", bias="joint"), px.KFRA()])
def test_several_losses_are_parts_of_one_batch(quantity: Any) -> None:
    x, y = torch.randn(8, 3).double() * torch.tensor([1.0] * 4 + [10.0] * 4)[:, None], torch.zeros(8, 2).double()
    model, loss_fn, found = px.extend(nn.Linear(3, 2).double()), px.extend(nn.MSELoss(reduction="sum")), []
    for parts in ([slice(8)], [slice(4), slice(4, 8)], [slice(4, 8), slice(4)]):
        with px.backpack(quantity):
            sum(loss_fn(model(x[part]), y[part]) for part in parts).backward()
        found.append(getattr(model.weight, quantity.savefield))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize(("sizes", "bias"), [((0, 5), "separate"), ((4, 0), "separate"), ((4, 0), "joint")])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_parameter_without_entries(sizes: tuple[int, int], bias: str, fisher: str) -> None:
    """Factors of KFAC are empty; a decomposition of what is empty is refused before any gradient is there."""
    layers = nn.Sequential(nn.Linear(*sizes), nn.Tanh(), nn.Linear(sizes[1], 3))
    model, loss_fn = px.extend(layers), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(3, sizes[0]), torch.randint(3, (3,))
    with px.backpack(px.KFAC(fisher=fisher, bias=bias)) as results:
        loss_fn(model(x), y).backward()
    extra = bias == "joint"
    assert [list(f.shape) for f in results["0.weight"].kfac] == [[sizes[1]] * 2, [sizes[0] + extra] * 2]
    model.zero_grad()
    with pytest.raises(px.UnsupportedUseError, match=r"EKFAC has no eigenvectors for \d.weight .*no entries"):
        with px.backpack(px.EKFAC(fisher=fisher, bias=bias)):
            loss_fn(model(x), y).backward()
    if fisher != "empirical":
        assert all(p.grad is None for p in model.parameters())


def test_a_table_without_columns_is_refused_by_name() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.empty, self.table = nn.Parameter(torch.zeros(4, 0)), nn.Parameter(torch.randn(4, 5))
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + torch.cat([self.empty, self.table], 1)).mean(1)

    model, loss_fn = px.extend(Added()), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(3, 4, 5), torch.randint(3, (3,))
    with pytest.raises(px.UnsupportedUseError, match=r"KFAC has no Kronecker factors for empty \[4, 0\]"):
        with px.backpack(px.KFAC()):
            loss_fn(model(x), y).backward()
    with px.backpack(px.KFAC(), parameters=[model.table, *model.head.parameters()]) as results:
        loss_fn(model(x), y).backward()
    assert [list(f.shape) for f in results["table"].kfac] == [[4], [5, 5]]


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_joint_block_of_a_weight_without_inputs_is_that_of_its_bias() -> None:
    model, loss_fn = px.extend(nn.Linear(0, 3)), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(4, 0), torch.randint(3, (4,))
    with px.backpack(px.EKFAC(fisher="exact", bias="joint"), px.KFLR()) as results:
        loss_fn(model(x), y).backward()
    found = results["weight"].ekfac
    dense = found.matvec(torch.eye(3))
    torch.testing.assert_close(dense, results["bias"].kflr[0])


@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_eigenvectors_of_factors_that_are_not_finite_are_refused_by_name(fisher: str, bias: str) -> None:
    model, loss_fn, (x, y) = px.extend(mlp()), px.extend(nn.CrossEntropyLoss()), batch(4)
    x[1, 2] = float("nan")
    with pytest.raises(px.PackextError, match=r"EKFAC: the factors of \d\.\w+ \[.*\] are not finite"):
        with px.backpack(px.EKFAC(fisher=fisher, bias=bias)):
            loss_fn(model(x), y).backward()
    assert not any(hasattr(p, "ekfac") for p in model.parameters())
    if fisher != "empirical":
        assert all(p.grad is None for p in model.parameters())
