"""Factors, their inverses and the Hessian against curvlinops, where it is installed (`make bench` does so)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import linalg, testing

pytestmark = pytest.mark.usefixtures("double")

curvlinops = pytest.importorskip("curvlinops")
N = 6


def cnn() -> tuple[nn.Module, Tensor]:
    """Convolutions with padding, stride and dilation, a global mean."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 5, 3, stride=2, dilation=2, padding=2, bias=False),
        nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3),
    )  # fmt: skip
    return net, torch.randn(N, 2, 8, 8)


class Block(nn.Module):
    """Attention over tokens, a feed-forward part and residual connections, with the mean over tokens at the end."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.Linear(d, 3)
        self.first, self.second = (nn.LayerNorm(d, elementwise_affine=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        weights = (self.q(h) @ self.k(h).mT / h.shape[-1] ** 0.5).softmax(-1)
        x = x + self.o(weights @ self.v(h))
        x = x + self.down(nn.functional.gelu(self.up(self.second(x))))
        return self.head(x.mean(1))


def transformer() -> tuple[nn.Module, Tensor]:
    return Block(), torch.randn(N, 5, 6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("loss", ["mean", "sum", "squares"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("build", [cnn, transformer])
def test_curvlinops_agrees(build: Any, approx: str, loss: str, bias: str) -> None:
    model, x = build()
    criterion: nn.Module = nn.MSELoss() if loss == "squares" else nn.CrossEntropyLoss(reduction=loss)
    y = torch.randn(N, 3) if loss == "squares" else torch.randint(3, (N,))
    named = dict(model.named_parameters())
    theirs = curvlinops.KFACLinearOperator(
        model, criterion, list(named.values()), [(x, y)], fisher_type="type-2", kfac_approx=approx,
        separate_weight_and_bias=bias == "separate", progressbar=False, check_deterministic=False,
    )  # fmt: skip
    vectors = {name: torch.randn_like(p) for name, p in named.items()}
    want = dict(zip(named, theirs @ list(vectors.values()), strict=True))
    px.extend(model)
    px.extend(criterion)
    with px.backpack(px.KFAC(fisher="exact", approx=approx, bias=bias)):
        criterion(model(x), y).backward()
    got = {name: linalg.kron_matvec(p.kfac, vectors[name]) for name, p in named.items() if bias == "separate"}
    for name, p in named.items():
        if isinstance(p.kfac, linalg.Joint):
            weight = name.removesuffix("bias") + "weight"
            both = linalg.kron_matvec(p.kfac.weight.kfac, p.kfac.join(vectors[weight], vectors[name]))
            got[weight], got[name] = p.kfac.split(both)
        elif bias == "joint" and name.endswith("weight") and name.replace("weight", "bias") not in named:
            got[name] = linalg.kron_matvec(p.kfac, vectors[name])
    assert got.keys() == want.keys()
    for name in got:
        assert testing.relative_error(got[name], want[name]) < 1e-9, name


def dense() -> tuple[nn.Sequential, nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, nn.CrossEntropyLoss(), torch.randn(N, 5), torch.randint(3, (N,))


def operator(kind: str, model: nn.Module, criterion: nn.Module, data: Any, **options: Any) -> Any:
    if kind in ("KFACLinearOperator", "EKFACLinearOperator"):
        options = {"fisher_type": "type-2", "separate_weight_and_bias": True} | options
    parameters = list(model.parameters())
    return getattr(curvlinops, kind)(
        model, criterion, parameters, data, progressbar=False, check_deterministic=False, **options
    )


def applied(model: Any, field: str, vectors: list[Tensor], product: Any) -> list[Tensor]:
    """The product of each block with its vector; of a bias in its weight's block, of both with both."""
    found = []
    for k in (0, 2):
        (weight, bias), layer = vectors[k : k + 2], model[k]
        held, other = getattr(layer.weight, field), getattr(layer.bias, field)
        if isinstance(other, linalg.Joint):
            found += other.split(product(held, other.join(weight, bias)))
        else:
            found += [product(held, weight), product(other, bias)]
    return found


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for one, other in zip(got, want, strict=True):
        assert testing.relative_error(one, other) < 1e-9


@pytest.mark.parametrize("bias", ["separate", "joint"])
def test_inverses_by_each_kind_of_damping(bias: str) -> None:
    """The table of docs/migrate/curvlinops.md."""
    model, criterion, x, y = dense()
    vectors, d = [torch.randn_like(p) for p in model.parameters()], 1e-2
    k = operator("KFACLinearOperator", model, criterion, [(x, y)], separate_weight_and_bias=bias == "separate")
    px.extend(model), px.extend(criterion)
    with px.backpack(px.KFAC(fisher="exact", bias=bias)):
        criterion(model(x), y).backward()

    def inverse(**options: Any) -> list[Tensor]:
        return curvlinops.KFACInverseLinearOperator(k, **options) @ vectors

    def ours(inverted: Any) -> list[Tensor]:
        return applied(model, "kfac", vectors, lambda f, v: linalg.kron_matvec(inverted(f), v))

    close(ours(lambda f: linalg.kron_inv(f, d ** len(f), pi=False)), inverse(damping=d))
    shares = 0.3, 0.02  # of B and of A
    each = ours(lambda f: [linalg.kron_inv([one], share)[0] for one, share in zip(f, shares, strict=False)])
    close(each, inverse(damping=shares[::-1]))
    exact = applied(model, "kfac", vectors, lambda f, v: linalg.KronEigh.of(f).matvec(v, lambda e: 1 / (e + d)))
    close(exact, inverse(damping=d, use_exact_damping=True))
    heuristic, want = ours(lambda f: linalg.kron_inv(f, d)), inverse(damping=d, use_heuristic_damping=True)
    if bias == "separate":
        assert testing.relative_error(heuristic[1], want[1]) > 0.1  # curvlinops damps it as its weight's B
        for place in (0, 2):
            inverses = linalg.kron_inv(model[place].weight.kfac, d)
            heuristic[place + 1] = linalg.kron_matvec(inverses[:1], vectors[place + 1])
    close(heuristic, want)


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("bias", ["separate", "joint"])
def test_corrected_eigenvalues_take_two_passes(bias: str, fisher: str) -> None:
    model, criterion, x, y = dense()
    vectors, kind = [torch.randn_like(p) for p in model.parameters()], "exact" if fisher == "type-2" else fisher
    options = {"fisher_type": fisher, "separate_weight_and_bias": bias == "separate"}
    corrected = operator("EKFACLinearOperator", model, criterion, [(x, y)], **options)
    plain = operator("KFACLinearOperator", model, criterion, [(x, y)], **options) @ vectors
    px.extend(model), px.extend(criterion)
    with px.backpack(px.EKFAC(fisher=kind, bias=bias)) as results:
        criterion(model(x), y).backward()
    close(applied(model, "ekfac", vectors, lambda e, v: e.matvec(v)), plain)
    basis = {name: result.ekfac for name, result in results.items()}
    with px.backpack(px.EKFAC(basis, fisher=kind, bias=bias)):
        criterion(model(x), y).backward()
    close(applied(model, "ekfac", vectors, lambda e, v: e.matvec(v)), corrected @ vectors)
    inverse = curvlinops.KFACInverseLinearOperator(corrected, damping=1e-2, use_exact_damping=True) @ vectors
    close(applied(model, "ekfac", vectors, lambda e, v: e.matvec(v, lambda e: 1 / (e + 1e-2))), inverse)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_several_batches(reduction: str) -> None:
    model, _, x, y = dense()
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    batches, vectors = list(zip(x.split(4), y.split(4), strict=True)), [torch.randn_like(p) for p in model.parameters()]
    want = operator("KFACLinearOperator", model, criterion, batches) @ vectors
    px.extend(model), px.extend(criterion)
    with px.backpack(px.KFAC(fisher="exact"), scale="sample", accumulate=True):
        for a, b in batches:
            criterion(model(a), b).backward()
    n = N if reduction == "mean" else 1
    close(applied(model, "kfac", vectors, lambda f, v: linalg.kron_matvec([f[0] / n, *f[1:]], v)), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of forward mode
def test_operators_of_curvlinops_are_operators() -> None:
    """`linalg` takes them, and what passes give of the Hessian is what they are."""
    model, criterion, x, y = dense()
    like = [p.detach() for p in model.parameters()]
    vectors = [torch.randn_like(p) for p in like]
    hessian = operator("HessianLinearOperator", model, criterion, [(x, y)])
    eye = torch.eye(sum(p.numel() for p in like))
    h = hessian @ eye
    solved = linalg.cg(lambda v: [a + 9 * b for a, b in zip(hessian @ v, v, strict=True)], vectors, tol=1e-12).solution
    want = torch.linalg.solve(h + 9 * eye, torch.cat([v.flatten() for v in vectors]))
    close([torch.cat([v.flatten() for v in solved])], [want])
    top = torch.linalg.eigvalsh(h).flip(0)[:2]
    close([linalg.eigsh(lambda v: hessian @ v, like, 2, tol=1e-12).values], [top])
    px.extend(model), px.extend(criterion)
    with px.backpack(px.TopEigenvalues(2, tol=1e-12), px.DiagHessian(), px.HMP()) as results:
        criterion(model(x), y).backward(retain_graph=True)
    close([results.top_eigenvalues.values], [top])
    places = torch.arange(len(h)).split([p.numel() for p in like])
    for p, place, v in zip(model.parameters(), places, vectors, strict=True):
        block = h[place][:, place]
        close([p.diag_h.flatten(), p.hmp(v[None])[0].flatten()], [block.diag(), block @ v.flatten()])
