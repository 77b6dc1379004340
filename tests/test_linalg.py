"""Kronecker factors against dense matrices and BackPACK; cg, eigsh, lanczos and Hutchinson against dense algebra."""

from __future__ import annotations

import gc
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg as sparse
import torch
from backpack.utils import kroneckers as oracle
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor  # pyright: ignore[reportMissingImports]

from packext import PackextError, linalg
from packext.testing._kronecker import nearest
from tests.helpers import double_precision, left_behind

pytestmark = pytest.mark.usefixtures("double")


def psd(*shape: int, rank: int | None = None) -> Tensor:
    """Random symmetric positive semi-definite matrices `[..., n, n]`."""
    root = torch.randn(*shape[:-1], shape[-1] if rank is None else rank)
    return root @ root.mT / root.shape[-1]


def with_spectrum(values: Any) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(len(values), len(values)))[0]
    return q * values @ q.T


def full(f: Tensor) -> Tensor:
    """A diagonal factor as a matrix."""
    return f.diag() if f.dim() == 1 else f.contiguous()


def dense(factors: list[Tensor]) -> Tensor:
    """By torch.kron, group by group."""
    groups = max([len(f) for f in factors if f.dim() == 3], default=1)
    blocks = []
    for g in range(groups):
        block = torch.ones(1, 1)
        for f in map(full, factors):
            block = torch.kron(block, f if f.dim() == 2 else f[g])
        blocks.append(block)
    return torch.block_diag(*blocks)


def damped(m: Tensor, damping: Any) -> Tensor:
    return m + damping * torch.eye(len(m))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


# ---------------------------------------------------------------------------------------------- Kronecker


@st.composite
def factor_lists(draw: st.DrawFn) -> list[Tensor]:
    """One to three factors, some or all of them with groups, some of the others diagonal."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    groups = draw(st.sampled_from([None, 1, 3]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    shared = [groups is None or draw(st.booleans()) for _ in sizes]
    factors = [psd(n, n) if alone else psd(groups or 1, n, n) for n, alone in zip(sizes, shared, strict=True)]
    return [f.diagonal().clone() if f.dim() == 2 and draw(st.booleans()) else f for f in factors]


@given(factors=factor_lists(), leading=st.sampled_from([(), (1,), (5,), (2, 3), (0,)]))
def test_products_inverses_and_decompositions_are_those_of_the_dense_matrix(
    factors: list[Tensor], leading: tuple[int, ...]
) -> None:
    with double_precision(1):
        matrix = dense(factors)
        x = torch.randn(*leading, len(matrix))
        close(linalg.kron(factors), matrix)
        close(linalg.kron_trace(factors), matrix.trace())
        got = linalg.kron_matvec(factors, x)
        assert got.shape == x.shape and torch.allclose(got, x @ matrix.T)
        inverses = linalg.kron_inv(factors, 0.3, pi=False)
        assert [f.shape for f in inverses] == [f.shape for f in factors]
        share = 0.3 ** (1 / len(factors))
        close(dense(inverses), torch.linalg.inv(dense([full(f) + share * torch.eye(f.shape[-1]) for f in factors])))
        exact = linalg.KronEigh.of(factors)
        assert torch.allclose(exact.matvec(x, lambda e: 1 / (e + 0.3)), x @ torch.linalg.inv(damped(matrix, 0.3)))
        assert torch.allclose(exact.matvec(x), x @ matrix)
        assert torch.allclose(exact.rotate(exact.rotate(x), back=True), x)
        close(exact.trace(), matrix.trace())
        close(exact.logdet(0.3), torch.logdet(damped(matrix, 0.3)))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_nearest_kronecker_product_to_a_sum(count: int, groups: int) -> None:
    """By the singular values of the rearranged sum, whose terms are many powers of ten apart."""
    torch.manual_seed(0)
    products = [[10.0 ** (3 * k) * psd(groups, 4, 4), psd(groups, 3, 3, rank=1)] for k in range(count)]
    products[-1][0] = 0 * products[-1][0] if count == 4 else products[-1][0]
    got = linalg.nearest_kron(products if groups > 1 else [[f[0] for f in p] for p in products])
    for g in range(groups):
        want = nearest([(left[g], right[g]) for left, right in products])
        for found, exact in zip(got, want, strict=True):
            close(found[g] if groups > 1 else found, exact)
    values = torch.linalg.eigvalsh(got[0])
    assert (values[..., 0] > -1e-12 * values[..., -1]).all()


def test_sums_that_are_kronecker_products_are_their_own_nearest() -> None:
    a, b, c, d = psd(3, 3), psd(4, 4), psd(4, 4), torch.rand(4)
    for products in (
        [[b, a], [c, a]],
        [[a, b], [a, c]],
        [[d, a], [b, a]],
        [[d, a]],
        [[a, b]],
        [[0 * b, a], [0 * c, a]],
    ):
        close(linalg.kron(linalg.nearest_kron(products)), sum(linalg.kron(p) for p in products))
    assert [f.shape for f in linalg.nearest_kron([[d, a], [2 * d, a]])] == [(4,), (3, 3)]
    want = linalg.nearest_kron([[d.diag(), a], [b, psd(3, 3)]])
    assert want[0].shape == (4, 4)
    for wrong in ([[a, b], [b, a]], [[a], [a]]):
        with pytest.raises(ValueError, match="products of two factors each, of the same sizes"):
            linalg.nearest_kron(wrong)


def test_a_weight_of_any_shape_in_row_major_order() -> None:
    factors = [psd(3, 3), psd(8, 8)]
    x = torch.randn(5, 3, 2, 2, 2)
    want = torch.einsum("ab,vbi,ij->vaj", factors[0], x.reshape(5, 3, 8), factors[1]).reshape(x.shape)
    close(linalg.kron_matvec(factors, x), want)
    close(linalg.kron_matvec(factors, x[0]), want[0])
    close(linalg.kron_matvec(factors, x[0].flatten()), want[0].flatten())


def test_grouped_convolution() -> None:
    b, a = psd(2, 3, 3), psd(2, 8, 8)
    x = torch.randn(6, 2, 2, 2)  # G O, I, K, K
    want = torch.cat([(torch.kron(b[g], a[g]) @ x[3 * g : 3 * g + 3].flatten()).reshape(3, 2, 2, 2) for g in range(2)])
    close(linalg.kron_matvec([b, a], x), want)
    close(linalg.kron_matvec([b], torch.arange(6.0)), torch.block_diag(*b) @ torch.arange(6.0))


@pytest.mark.parametrize("sizes", [(4,), (3, 5), (2, 3, 4)])
def test_backpack_agrees(sizes: tuple[int, ...]) -> None:
    factors = [damped(psd(n, n), 0.5) for n in sizes]
    x = torch.randn(math.prod(sizes), 3)
    close(linalg.kron(factors), oracle.kfacs_to_mat(factors))
    close(linalg.kron_matvec(factors, x.T).T, oracle.kfac_mat_prod(factors)(x))
    share = 0.2 ** (1 / len(sizes))
    for got, want in zip(
        linalg.kron_inv(factors, 0.2, pi=False), oracle.inv_kfacs(factors, [share] * len(sizes)), strict=True
    ):
        close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_damping_is_balanced_as_by_martens_and_grosse(dtype: torch.dtype) -> None:
    b, a = 100 * psd(3, 3), psd(5, 5)
    pi = math.sqrt(float(a.trace() / 5) / float(b.trace() / 3))
    got_b, got_a = linalg.kron_inv([b.to(dtype), a.to(dtype)], 0.1)
    assert got_a.dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    close(got_a.double(), torch.linalg.inv(damped(a, pi * math.sqrt(0.1))), tolerance)
    close(got_b.double(), torch.linalg.inv(damped(b, math.sqrt(0.1) / pi)), tolerance)


def test_pi_does_not_depend_on_how_the_scale_is_spread_over_the_factors() -> None:
    factors = [psd(2, 2), psd(3, 3), psd(4, 4)]
    want = linalg.kron(linalg.kron_inv(factors, 0.1))
    close(linalg.kron(linalg.kron_inv([1e3 * factors[0], factors[1] / 10, factors[2] / 100], 0.1)), want)
    one = psd(3, 3)
    close(linalg.kron_inv([one], 0.1)[0], torch.linalg.inv(damped(one, 0.1)))


def test_a_diagonal_factor_is_the_matrix_that_it_stands_for() -> None:
    counts, b = torch.tensor([2.0, 0.0, 1.0]), psd(4, 4)
    x = torch.randn(2, 3, 4)
    inverse, want = linalg.kron_inv([counts, b], 0.1), linalg.kron_inv([counts.diag(), b], 0.1)
    assert inverse[0].shape == (3,)
    close(linalg.kron_matvec(inverse, x), linalg.kron_matvec(want, x))
    values, vectors = linalg.kron_eigh([counts, b])
    assert torch.equal(values[0], counts) and torch.equal(vectors[0], torch.ones(3))


def test_pi_of_each_group() -> None:
    b, a = psd(2, 3, 3), psd(2, 4, 4) * torch.tensor([1.0, 50.0])[:, None, None]
    got = linalg.kron_inv([b, a], 0.1)
    shared = linalg.kron_inv([b[0], a], 0.1)
    for g in range(2):
        for inverse, alone in zip(got, linalg.kron_inv([b[g], a[g]], 0.1), strict=True):
            close(inverse[g], alone)
        for inverse, alone in zip(shared, linalg.kron_inv([b[0], a[g]], 0.1), strict=True):
            close(inverse[g], alone)


def test_damping_where_a_trace_is_zero() -> None:
    a = psd(3, 3)
    for pi in (True, False):
        got_b, got_a = linalg.kron_inv([torch.zeros(2, 2), a], 0.04, pi=pi)
        close(got_b, torch.eye(2) / 0.2)
        close(got_a, torch.linalg.inv(damped(a, 0.2)))


def test_float32_whose_cholesky_drowns_in_rounding_is_done_in_float64() -> None:
    a = with_spectrum([1.0] * 20 + [0.0] * 20).float()
    got = linalg.kron_inv([a], 1e-6)[0]
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), torch.linalg.inv(damped(a.double(), 1e-6)), rtol=1e-4, atol=10.0)
    scaled = torch.diag(torch.tensor([1e20, 1.0, 1e-20]))  # far apart, and yet well-posed
    assert torch.allclose(linalg.kron_inv([scaled], 0.0)[0].diagonal(), 1 / scaled.diagonal())


def test_low_precision_factors_are_handled_in_float32() -> None:
    factors = [damped(psd(3, 3), 1.0).bfloat16(), damped(psd(4, 4), 1.0).bfloat16()]
    want = dense([f.double() for f in factors])
    x = torch.randn(12)
    assert linalg.kron_inv(factors, 0.1)[0].dtype == torch.float32
    close(linalg.kron_matvec(factors, x.bfloat16()).double(), want @ x.bfloat16().double(), 1e-5)
    assert linalg.kron_matvec([f.float() for f in factors], x).dtype == torch.float64


def test_eigenvalues_keep_their_sign_and_lose_rounding() -> None:
    values, vectors = linalg.kron_eigh([psd(6, 6, rank=2), with_spectrum([-2.0, 0.5, 1.0])])
    assert float(values[0].min()) >= 0
    close(values[1], torch.tensor([-2.0, 0.5, 1.0]))
    close(vectors[1].T @ vectors[1], torch.eye(3))


def test_eigenvalues_have_the_shape_of_the_outer_product() -> None:
    factors = [psd(3, 3), psd(4, 4)]
    values, _ = linalg.kron_eigh(factors)
    close(linalg.KronEigh.of(factors).eigenvalues, torch.outer(*values))
    grouped = linalg.KronEigh.of([psd(2, 3, 3), psd(4, 4), psd(2, 5, 5)])
    assert grouped.eigenvalues.shape == (2, 3, 4, 5)


def test_ekfac() -> None:
    """Corrected eigenvalues are the diagonal of the matrix of second moments in the eigenbasis."""
    rows = torch.randn(20, 3, 4)
    moments = rows.reshape(20, -1).T @ rows.reshape(20, -1) / 20
    factors = [torch.einsum("noi,npi->op", rows, rows) / 20, torch.einsum("noi,noj->ij", rows, rows) / 20]
    _, vectors = linalg.kron_eigh(factors)
    corrected = linalg.KronEigh(vectors, linalg.KronEigh.of(factors).rotate(rows).square().mean(0))
    q = torch.kron(*vectors)
    matrix = q @ torch.diag((q.T @ moments @ q).diagonal()) @ q.T
    close(corrected.matvec(rows).reshape(20, -1), rows.reshape(20, -1) @ matrix)
    close(corrected.trace(), moments.trace())
    kfac = linalg.kron(factors) / moments.trace()
    assert torch.dist(matrix, moments) <= torch.dist(kfac, moments)


def test_a_failed_decomposition_is_tried_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh = torch.linalg.eigh

    def fails(m: Tensor) -> Any:
        if m.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(m)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    values, vectors = linalg.kron_eigh([torch.eye(3).float()])
    assert values[0].dtype == vectors[0].dtype == torch.float32


def test_products_are_differentiable() -> None:
    factors = [psd(2, 2).requires_grad_(), psd(3, 3).requires_grad_()]
    x = torch.randn(6, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b, a, v: linalg.kron_matvec([b, a], v), (*factors, x))


EYE = torch.eye(3)
BAD_FACTORS: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: linalg.kron([]), "at least one"),
    "a tensor": (lambda: inspect.unwrap(linalg.kron)(torch.ones(2, 3, 3)), "list"),  # type: ignore[arg-type]
    "not square": (lambda: linalg.kron_matvec([torch.ones(2, 3)], torch.ones(3)), r"square.*\[\[2, 3\]\]"),
    "a number": (lambda: linalg.kron_trace([torch.tensor(2.0)]), r"\[\[\]\]"),
    "a joint bias": (lambda: inspect.unwrap(linalg.kron_trace)(linalg.Joint(EYE)), "those of the weight"),
    "empty": (lambda: linalg.kron([torch.ones(0, 0)]), "not empty"),
    "integer": (lambda: linalg.kron([torch.eye(2, dtype=torch.long)]), "floating point"),
    "complex": (lambda: linalg.kron([torch.eye(2, dtype=torch.complex64)]), "floating point"),
    "groups": (lambda: linalg.kron([torch.ones(2, 3, 3), torch.ones(3, 3, 3)]), "equally many groups"),
    "sizes": (lambda: linalg.kron_matvec([EYE, EYE], torch.ones(2, 3, 4)), r"\[2, 3, 4\].*9 entries"),
    "split axis": (lambda: linalg.kron_matvec([EYE, EYE], torch.ones(18)), "9 entries"),
    "negative damping": (lambda: linalg.kron_inv([EYE], -0.1), "not negative, got -0.1"),
    "nan damping": (lambda: linalg.kron_inv([EYE], math.nan), "nan"),
    "nan": (lambda: linalg.kron_inv([EYE, EYE * math.nan], 0.1), r"\[3, 3\].*NaN"),
    "infinite": (lambda: linalg.kron_eigh([EYE * math.inf]), "infinite"),
    "not symmetric": (lambda: linalg.kron_eigh([torch.ones(3, 3).triu()]), r"\[3, 3\] is not symmetric"),
    "eigenvalues": (lambda: linalg.KronEigh([EYE], torch.ones(4)), r"need 3 eigenvalues, got shape \[4\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FACTORS)
def test_refused_factors(case: str) -> None:
    call, message = BAD_FACTORS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_not_positive_definite_is_refused() -> None:
    diagonals = (torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 2.0]))
    for factor in (with_spectrum([-1.0, 1.0, 2.0]), psd(5, 5, rank=2), torch.zeros(2, 2), *diagonals):
        with pytest.raises(PackextError, match="not positive definite.*damping"):
            linalg.kron_inv([factor], 0.0)
    with pytest.raises(PackextError, match="least eigenvalue"):
        linalg.KronEigh.of([psd(5, 5, rank=2)]).logdet()


# ------------------------------------------------------------------------------------ structured vectors


def tree_operator(matrix: Tensor) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """A dictionary of tensors with 10 entries, and an operator that returns it in another order and as tuples."""
    like = {"w": torch.zeros(2, 3), "rest": [torch.zeros(()), torch.zeros(3)]}

    def matvec(v: dict[str, Any]) -> dict[str, Any]:
        y = matrix @ torch.cat([v["w"].flatten(), v["rest"][0][None], v["rest"][1]])
        return {"rest": (y[6], y[7:]), "w": y[:6].reshape(2, 3)}

    return like, matvec


def flat(tree: dict[str, Any]) -> Tensor:
    return torch.cat([tree["w"].flatten(), tree["rest"][0].reshape(1), tree["rest"][1]])


def test_vectors_are_tensors_lists_or_dictionaries() -> None:
    matrix = damped(psd(10, 10), 0.1)
    like, matvec = tree_operator(matrix)
    b = {"w": torch.randn(2, 3), "rest": [torch.randn(()), torch.randn(3)]}
    found = linalg.cg(matvec, b, tol=1e-10)
    assert found.converged and found.solution["w"].shape == (2, 3) and isinstance(found.solution["rest"], list)
    close(flat(found.solution), torch.linalg.solve(matrix, flat(b)), 1e-8)
    pairs = linalg.eigsh(matvec, like, k=2)
    assert pairs.vectors["rest"][1].shape == (2, 3) and pairs.vectors["w"].shape == (2, 2, 3)
    close(pairs.values, torch.linalg.eigvalsh(matrix).flip(0)[:2])
    assert linalg.lanczos(matvec, like, 4).basis["rest"][0].shape == (4,)
    assert linalg.diagonal(matvec, like).standard_error["w"].shape == (2, 3)
    pair = linalg.cg(lambda v: [2 * v[0], 3 * v[1]], (torch.ones(2), torch.ones(1, 3))).solution
    assert isinstance(pair, tuple)
    close(pair[1], torch.full((1, 3), 1 / 3))


def test_a_hessian_of_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    parameters = list(model.parameters())
    x, y = torch.randn(7, 3), torch.randn(7, 2)
    loss = (model(x) - y).square().mean()
    grads = torch.autograd.grad(loss, parameters, create_graph=True)

    def hessian(v: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(grads, parameters, v, retain_graph=True)

    size = sum(p.numel() for p in parameters)
    rows = [torch.cat([h.flatten() for h in hessian(unflatten(parameters, e))]) for e in torch.eye(size)]
    values = torch.linalg.eigvalsh(torch.stack(rows))
    for which, want in (("LA", values[-1]), ("SA", values[0])):
        found = linalg.eigsh(hessian, parameters, which=which, tol=1e-9)
        assert found.converged and not found.vectors[0].requires_grad
        close(found.values[0], want, 1e-8)
    truncated = linalg.cg(hessian, [-g for g in grads], tol=1e-8)
    assert truncated.negative_curvature is not None and values[0] < 0
    slope = sum(float((g * d).sum().detach()) for g, d in zip(grads, truncated.negative_curvature, strict=True))
    assert slope <= 0


def unflatten(parameters: list[Any], vector: Tensor) -> list[Tensor]:
    parts = vector.split([p.numel() for p in parameters])
    return [part.reshape(p.shape) for part, p in zip(parts, parameters, strict=True)]


ALGORITHMS: dict[str, Callable[..., Any]] = {
    "cg": linalg.cg,
    "lanczos": lambda matvec, like: linalg.lanczos(matvec, like, 3),
    "eigsh": linalg.eigsh,
    "trace": linalg.trace,
    "diagonal": linalg.diagonal,
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_bad_vectors_are_refused(name: str) -> None:
    run = ALGORITHMS[name]
    with pytest.raises(ValueError, match=rf"{name}: the result of matvec is \[3\]; needed shapes \[5\]"):
        run(lambda v: v[:3], torch.ones(5))
    with pytest.raises(ValueError, match=r"matvec\[1\] is NoneType; needed shapes \[2\]"):
        run(lambda v: [v[0], None], [torch.ones(5), torch.ones(2)])
    with pytest.raises(ValueError, match=r"\{'b': \[5\]\}; needed shapes \{'a': \[5\]\}"):
        run(lambda v: {"b": v["a"]}, {"a": torch.ones(5)})
    with pytest.raises(ValueError, match=r"the result of matvec is \(\[5\],\); needed shapes \{'a': \[5\]\}"):
        run(lambda v: [v["a"]], {"a": torch.ones(5)})
    with pytest.raises(ValueError, match="generator; needed a tensor, or a list"):
        run(lambda v: v, (t for t in [torch.ones(2)]))
    with pytest.raises(ValueError, match="no entries"):
        run(lambda v: v, [])
    with pytest.raises(ValueError, match="floating point"):
        run(lambda v: v, torch.ones(5, dtype=torch.long))
    with pytest.raises(PackextError, match=f"{name}: matvec gave entries that are NaN"):
        run(lambda v: v * math.nan, torch.ones(5))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_autocast_is_for_operators_and_not_for_arithmetic(name: str) -> None:
    scales, like, seen = torch.arange(1.0, 31.0), torch.ones(30, dtype=torch.float32), []

    def matvec(v: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return scales.to(v) * v

    want = ALGORITHMS[name](matvec, like)
    with torch.autocast("cpu", torch.bfloat16):
        found = ALGORITHMS[name](matvec, like)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] * (len(seen) // 2) + [True] * (len(seen) // 2)
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_kronecker_products_under_autocast() -> None:
    factors, x = [psd(3, 3).float(), psd(4, 4).float()], torch.randn(2, 3, 4).float()
    decomposed = linalg.KronEigh.of(factors)
    for compute in (
        lambda: linalg.kron(factors),
        lambda: linalg.kron_matvec(factors, x),
        lambda: decomposed.matvec(x, torch.sqrt),
        lambda: linalg.kron_matvec(linalg.kron_inv(factors, 0.1), x),
        lambda: linalg.kron_matvec(linalg.nearest_kron([factors, [2 * f + 1 for f in factors]]), x),
    ):
        want = compute()
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compute(), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_torchs_random_numbers_stay_as_they_were_and_results_repeat(name: str) -> None:
    matrix = damped(psd(30, 30), 0.1)
    before = torch.get_rng_state()
    first = ALGORITHMS[name](lambda v: matrix @ v, torch.ones(30))
    second = ALGORITHMS[name](lambda v: matrix @ v, torch.ones(30))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(torch.as_tensor(first[0]), torch.as_tensor(second[0]))


def test_a_generator_gives_other_vectors() -> None:
    matrix, like = psd(30, 30), torch.ones(30)
    generator = torch.Generator().manual_seed(7)
    estimates = {float(linalg.trace(lambda v: matrix @ v, like, 4, generator).estimate) for _ in range(3)}
    bases = [linalg.lanczos(lambda v: matrix @ v, like, 2, generator).basis for _ in range(2)]
    assert len(estimates) == 3 and not torch.allclose(*bases)


# ------------------------------------------------------------------------------------ conjugate gradients


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_cg_agrees_with_scipy(start: bool, preconditioned: bool) -> None:
    matrix = with_spectrum(torch.logspace(-2, 1, 60))
    b, x0 = torch.randn(60), torch.randn(60) if start else None
    m = torch.linalg.inv(damped(matrix, 0.05)) if preconditioned else torch.eye(60)
    steps = []
    want, info = sparse.cg(
        matrix.numpy(), b.numpy(), None if x0 is None else x0.numpy(), rtol=1e-9, M=m.numpy(), callback=steps.append
    )
    found = linalg.cg(
        lambda v: matrix @ v, b, 1e-9, preconditioner=(lambda v: m @ v) if preconditioned else None, x0=x0
    )
    assert info == 0 and found.converged and found.negative_curvature is None
    assert found.iterations == pytest.approx(len(steps), rel=0.05, abs=1)
    close(found.solution, torch.from_numpy(want), 1e-7)
    assert found.residual_norm <= 1e-9 * float(b.norm())
    assert found.residual_norm == pytest.approx(float((b - matrix @ found.solution).norm()), rel=1e-3)


def test_cg_in_as_many_steps_as_there_are_distinct_eigenvalues() -> None:
    matrix = with_spectrum([1.0] * 10 + [3.0] * 10 + [7.0] * 10)
    b = torch.randn(30)
    found = linalg.cg(lambda v: matrix @ v, b)
    assert found.converged and found.iterations == 3
    stopped = linalg.cg(lambda v: matrix @ v, b, maxiter=2)
    assert not stopped.converged and stopped.iterations == 2
    assert stopped.residual_norm == pytest.approx(float((b - matrix @ stopped.solution).norm()))
    assert linalg.cg(lambda v: matrix @ v, b, x0=found.solution).iterations == 0
    loose = linalg.cg(lambda v: matrix @ v, b, tol=0.0, atol=float(b.norm()) / 2)
    assert loose.converged and loose.iterations < 3


def test_cg_of_zero_and_of_tiny_numbers() -> None:
    matrix = damped(psd(10, 10), 0.5)
    zero = linalg.cg(lambda v: matrix @ v, torch.zeros(10))
    assert zero.converged and zero.iterations == 0 and not zero.solution.any()
    b = (1e-25 * torch.randn(10)).float()  # its square is zero in float32
    tiny = linalg.cg(lambda v: matrix.float() @ v, b)
    assert tiny.converged and tiny.solution.dtype == torch.float32
    want = torch.linalg.solve(matrix, b.double())
    assert float((tiny.solution - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("zero", [0.0, 0.5])
def test_cg_refuses_a_solution_beyond_the_range_of_its_type(zero: float) -> None:
    """An entry that is zero times a step that is infinite is no number, at which no comparison ended the loop."""
    b = torch.tensor([1.0, zero, 2.0], dtype=torch.float32)
    with pytest.raises(PackextError, match=r"beyond the range of torch.float32"):
        linalg.cg(lambda v: 1e-42 * v, b)
    close(linalg.cg(lambda v: 1e-42 * v, b.double()).solution * 1e-42, b.double())


def test_cg_stops_at_negative_curvature() -> None:
    matrix = with_spectrum(torch.cat([torch.linspace(0.5, 3, 29), torch.tensor([-1.0])]))
    b = torch.randn(30)
    found = linalg.cg(lambda v: matrix @ v, b)
    p = found.negative_curvature
    assert not found.converged and float(p @ matrix @ p) < 0 and float(p @ b) >= 0
    # The iterate before: it minimises the quadratic over the directions so far, and lies below zero.
    assert found.iterations > 0
    assert float(found.solution @ matrix @ found.solution / 2 - b @ found.solution) < 0
    assert found.residual_norm == pytest.approx(float((b - matrix @ found.solution).norm()))


def test_cg_at_once_at_negative_or_zero_curvature() -> None:
    b = torch.randn(5)
    for factor in (-1.0, 0.0):
        found = linalg.cg(lambda v, factor=factor: factor * v, b)
        assert not found.converged and found.iterations == 0 and not found.solution.any()
        close(found.negative_curvature, b)


def test_cg_says_that_it_converged_only_if_the_true_residual_says_so() -> None:
    """In float32 the updated residual falls without end, the true one does not."""
    matrix = with_spectrum(torch.logspace(-4, 0, 100)).float()
    b = torch.randn(100).float()
    converged = {}
    for tol in (1e-1, 1e-3, 1e-5, 0.0):
        found = linalg.cg(lambda v: matrix @ v, b, tol=tol, maxiter=5000)
        true = float((b.double() - matrix.double() @ found.solution.double()).norm() / b.norm())
        converged[tol] = found.converged
        assert found.iterations < 5000, "ends where no more can be had"
        assert found.residual_norm / float(b.norm()) == pytest.approx(true, rel=0.5)
        assert not found.converged or true <= 1.1 * tol
    assert converged == {1e-1: True, 1e-3: True, 1e-5: False, 0.0: False}


def test_cg_of_a_singular_system_that_has_a_solution() -> None:
    matrix = psd(20, 20, rank=5)
    b = matrix @ torch.randn(20)
    found = linalg.cg(lambda v: matrix @ v, b, tol=1e-8)
    assert found.converged
    close(matrix @ found.solution, b, 1e-6)


def test_refused_arguments_of_cg() -> None:
    b = torch.ones(3)
    for arguments, message in [
        ({"tol": -1.0}, "tolerances"),
        ({"tol": math.nan}, "tolerances"),
        ({"maxiter": -1}, "maxiter"),
        ({"x0": torch.ones(4)}, r"x0 is \[4\]; needed shapes \[3\]"),
        ({"x0": b * math.nan}, "x0 has entries that are NaN"),
        ({"preconditioner": lambda v: v[:2]}, "preconditioner is"),
    ]:
        with pytest.raises(ValueError, match=message):
            linalg.cg(lambda v: v, b, **arguments)
    with pytest.raises(ValueError, match="b has entries that are NaN"):
        linalg.cg(lambda v: v, b * math.nan)
    with pytest.raises(PackextError, match="preconditioner is not positive definite"):
        linalg.cg(lambda v: v, b, preconditioner=lambda v: -v)


# ------------------------------------------------------------------------------------- lanczos and eigsh


@pytest.mark.parametrize("k", [1, 5, 12, 25])
def test_lanczos_relation(k: int) -> None:
    matrix = with_spectrum(torch.linspace(-2, 3, 25))
    alphas, betas, basis = linalg.lanczos(lambda v: matrix @ v, torch.zeros(25), k)
    assert alphas.shape == betas.shape == (k,)
    t = torch.diag(alphas) + torch.diag(betas[:-1], 1) + torch.diag(betas[:-1], -1)
    close(basis @ basis.T, torch.eye(k))
    remainder = matrix @ basis.T - basis.T @ t
    close(remainder[:, :-1], torch.zeros(25, k - 1)) if k > 1 else None
    assert float(remainder[:, -1].norm()) == pytest.approx(float(betas[-1]), abs=1e-9)
    if k == 25:
        assert float(betas[-1]) == 0
        close(torch.linalg.eigvalsh(t), torch.linspace(-2, 3, 25))


@pytest.mark.parametrize("seed", range(5))
def test_lanczos_stops_where_the_space_is_exhausted(seed: int) -> None:
    torch.manual_seed(seed)
    matrix = with_spectrum([1.0] * 8 + [4.0] * 8 + [0.0] * 4)
    alphas, betas, basis = linalg.lanczos(lambda v: matrix @ v, torch.zeros(20), 10)
    assert len(alphas) == len(betas) == len(basis) == 3 and float(betas[-1]) == 0
    t = torch.diag(alphas) + torch.diag(betas[:-1], 1) + torch.diag(betas[:-1], -1)
    close(torch.linalg.eigvalsh(t), torch.tensor([0.0, 1.0, 4.0]))


def test_lanczos_goes_on_where_little_is_left() -> None:
    """Beside an outlier, the bulk is a small part of an operator, and no rounding."""
    matrix = with_spectrum([*torch.linspace(1, 2, 19).tolist(), 1e11])
    assert len(linalg.lanczos(lambda v: matrix @ v, torch.zeros(20), 10).alphas) == 10


def wanted(values: Tensor, which: str, k: int) -> Tensor:
    size = {"LA": values, "SA": -values, "LM": values.abs()}[which]
    return values[size.argsort(descending=True)][:k]


SPECTRA: dict[str, Tensor] = {
    "indefinite": torch.cat([torch.linspace(-9, -1, 30), torch.linspace(0.1, 7, 50)]).double(),
    "mostly negative": torch.linspace(-5, 1, 80).double(),
    "one large": torch.cat(
        [torch.rand(79, generator=torch.Generator().manual_seed(0)), torch.tensor([100.0])]
    ).double(),
    "decaying": torch.logspace(-8, 2, 80).double(),
    "low rank": torch.cat([torch.zeros(77), torch.tensor([1.0, 2.0, 3.0])]).double(),
    "multiple": torch.cat([torch.linspace(0, 4, 76), torch.tensor([5.0, 5.0, 5.0, 4.5])]).double(),
    "identity": torch.ones(80).double(),
    "zero": torch.zeros(80).double(),
}


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_eigsh_against_dense(spectrum: str, which: str, k: int) -> None:
    values = SPECTRA[spectrum]
    matrix = with_spectrum(values)
    ncv = 80 if (spectrum, which) == ("decaying", "SA") else None  # too close together for 20, as for ARPACK
    found = linalg.eigsh(lambda v: matrix @ v, torch.zeros(80), k, which, ncv, tol=1e-8)
    assert found.converged
    size = max(1e-12, float(values.abs().max()))
    assert torch.allclose(found.values, wanted(values, which, k), atol=1e-7 * size)
    close(found.vectors @ found.vectors.T, torch.eye(k))
    true = (found.vectors @ matrix - found.values[:, None] * found.vectors).norm(dim=1)
    assert torch.allclose(found.residuals, true, atol=1e-12 * size)
    assert float(true.max()) <= 2e-8 * size


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_eigsh_agrees_with_scipy(which: str) -> None:
    matrix = psd(60, 60) - psd(60, 60)
    want = sparse.eigsh(matrix.numpy(), k=3, which=which, return_eigenvectors=False, v0=np.ones(60))
    got = linalg.eigsh(lambda v: matrix @ v, torch.zeros(60), 3, which, tol=1e-9).values
    close(got.sort().values, torch.from_numpy(np.sort(want)), 1e-8)


def test_largest_algebraic_is_not_largest_magnitude() -> None:
    matrix = torch.diag(torch.tensor([-3.0, -1.0, 0.0, 2.0]))
    found = {w: float(linalg.eigsh(lambda v: matrix @ v, torch.zeros(4), which=w).values) for w in ("LA", "LM", "SA")}
    assert found == pytest.approx({"LA": 2.0, "LM": -3.0, "SA": -3.0})


@pytest.mark.parametrize(
    ("k", "size", "ncv"), [(1, 1, None), (3, 3, None), (2, 3, None), (1, 50, 2), (3, 50, 5), (5, 5, 2)]
)
def test_eigsh_of_small_spaces_and_bases(k: int, size: int, ncv: int | None) -> None:
    matrix = with_spectrum(2.0 ** torch.arange(size))
    found = linalg.eigsh(lambda v: matrix @ v, torch.zeros(size), k, ncv=max(ncv, k + 1) if ncv else None)
    assert found.converged
    assert torch.allclose(found.values, 2.0 ** torch.arange(size).flip(0)[:k].double())


@given(seed=st.integers(0, 2**16), k=st.integers(1, 5))
def test_eigsh_finds_copies_of_multiple_eigenvalues(seed: int, k: int) -> None:
    with double_precision(seed):
        values = torch.randint(0, 6, (40,)).double()
        matrix = with_spectrum(values)
        found = linalg.eigsh(lambda v: matrix @ v, torch.zeros(40), k, "LA")
    assert found.converged
    assert torch.allclose(found.values, values.sort(descending=True).values[:k], atol=1e-6)


@pytest.mark.parametrize("spectrum", ["pairs", "three"])
def test_eigsh_has_not_converged_before_it_has_all_copies(spectrum: str) -> None:
    """Also where copies of the first eigenvalue stand above a second one, which has converged before they are found."""
    values = torch.arange(20.0).repeat_interleave(2) if spectrum == "pairs" else torch.linspace(0, 5, 40).clamp(max=4.6)
    missed = 0
    for seed in range(5):
        torch.manual_seed(seed)
        matrix = with_spectrum(values.double())
        for k in (2, 3, 5):
            for ncv in (k + 2, 2 * k + 1, None):
                found = linalg.eigsh(
                    lambda v, a=matrix: a @ v, torch.zeros(40), k, "LA", ncv,
                    generator=torch.Generator().manual_seed(seed),
                )  # fmt: skip
                right = torch.allclose(found.values, values.double().flip(0)[:k], atol=1e-4)
                missed += found.converged and not right
                assert found.converged or ncv is not None
    assert missed <= 1  # by chance: what begins the search for copies is random


def test_lanczos_and_eigsh_write_into_nothing_that_is_not_theirs() -> None:
    a, start, images = with_spectrum(torch.arange(1.0, 9)), torch.randn(8), []

    def product(v: Tensor) -> Tensor:
        images.append((v.clone(), a @ v))
        return images[-1][1]

    kept = start.clone()
    linalg.eigsh(product, torch.zeros(8), ncv=4, start=start, tol=1e-8)
    linalg.lanczos(product, torch.zeros(8), 5)
    assert len(images) > 9 and torch.equal(start, kept)  # the basis was filled, and restarted, in place
    assert all(torch.equal(a @ v, image) for v, image in images)
    assert all(float(v.norm()) == pytest.approx(1, abs=1e-12) for v, _ in images)


def test_eigsh_in_float32() -> None:
    matrix = with_spectrum(SPECTRA["indefinite"])
    found = linalg.eigsh(lambda v: matrix.float() @ v, torch.zeros(80, dtype=torch.float32), 3)
    assert found.converged and found.values.dtype == found.vectors.dtype == found.residuals.dtype == torch.float32
    assert torch.allclose(found.values.double(), wanted(SPECTRA["indefinite"], "LA", 3), rtol=1e-5)


def test_residuals_in_float32_are_not_below_those_there_are() -> None:
    """Of long vectors rounding is more than that of a number."""
    diagonal = torch.linspace(0, 1, 100_000).float() ** 8
    diagonal[-1] = 2
    found = linalg.eigsh(lambda v: diagonal * v, torch.zeros_like(diagonal), tol=0.0)
    vector, value = found.vectors[0].double(), float(found.values[0])
    true = float((diagonal.double() * vector - value * vector).norm())
    assert found.converged and abs(value - 2) < 1e-6 and true <= float(found.residuals[0]) < 1e-5


def test_residuals_in_bfloat16_are_not_below_those_there_are() -> None:
    matrix = with_spectrum(torch.linspace(0, 1, 40))

    def rounded(v: Tensor) -> Tensor:
        assert v.dtype == torch.bfloat16
        return (matrix @ v.double()).bfloat16()

    found = linalg.eigsh(rounded, torch.zeros(40).bfloat16(), 2)
    assert found.converged
    for value, v, residual in zip(found.values.double(), found.vectors.double(), found.residuals, strict=True):
        assert 1e-4 < (matrix @ v - value * v).norm() <= residual < 0.05


def test_nothing_is_left_to_the_garbage_collector() -> None:
    like = {"a": torch.randn(3, 4), "b": [torch.randn(2), (torch.randn(1),)]}
    assert not left_behind(lambda: linalg.eigsh(lambda v: v, like, k=2))
    assert not left_behind(lambda: linalg.cg(lambda v: v, like))


def held() -> int:
    """Bytes of all tensors that there are, but for those that another test's vmap has wrapped, which have none."""
    tensors = [t for t in gc.get_objects() if type(t) is Tensor and t.layout is torch.strided]
    tensors = [t for t in tensors if not is_legacy_batchedtensor(t)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("scale", [1e-28, 1e22])
def test_float32_operators_whose_images_have_squares_beyond_it(scale: float) -> None:
    matrix = psd(30, 30)
    small, like = (matrix * scale).float(), torch.zeros(30, dtype=torch.float32)

    def matvec(v: Tensor) -> Tensor:
        return small @ v

    wanted = torch.linalg.eigvalsh(matrix).flip(0)
    found = linalg.eigsh(matvec, like, k=3)
    assert found.converged
    close(found.values.double() / scale, wanted[:3], 1e-4)
    steps = linalg.lanczos(matvec, like, 30)
    beside = steps.betas[:-1].double() / scale
    dense_ = torch.diag(steps.alphas.double() / scale) + torch.diag(beside, 1) + torch.diag(beside, -1)
    close(torch.linalg.eigvalsh(dense_)[-1], wanted[0], 1e-4)
    for estimate in (linalg.trace, linalg.diagonal):
        got, exact = estimate(matvec, like, probes=5), estimate(lambda v: matrix.float() @ v, like, probes=5)
        for one, other in zip(got, exact, strict=True):
            close(one.double() / scale, other.double(), 1e-4)


def test_eigsh_holds_its_basis_once() -> None:
    """And one vector more, beside what the product takes and gives."""
    size, ncv, seen = 1 << 16, 12, []

    def product(v: Tensor) -> Tensor:
        seen.append(held())
        return v.flip(0)

    before = held()
    linalg.eigsh(product, torch.zeros(size, dtype=torch.float32), ncv=ncv)
    assert len(seen) >= 2 and ncv * size * 4 <= max(seen) - before <= (ncv + 3) * size * 4


def test_eigsh_says_when_it_has_not_converged() -> None:
    matrix = with_spectrum(torch.linspace(0, 1, 300))
    found = linalg.eigsh(lambda v: matrix @ v, torch.zeros(300), 2, maxiter=1, tol=1e-10)
    assert not found.converged and float(found.residuals.max()) > 1e-10 and found.matvecs == 20
    done = linalg.eigsh(lambda v: matrix @ v, torch.zeros(300), 2, maxiter=1000, tol=1e-10)
    assert done.converged and done.matvecs > 20


def test_refused_arguments_of_lanczos_and_eigsh() -> None:
    like = torch.ones(3)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and 3.*got {k}"):
            linalg.lanczos(lambda v: v, like, k)
        with pytest.raises(ValueError, match=f"between 1 and 3.*got {k}"):
            linalg.eigsh(lambda v: v, like, k)
    with pytest.raises(ValueError, match="larger than 3 for k = 2, got 3"):
        linalg.eigsh(lambda v: v, torch.ones(9), 2, ncv=3)
    for arguments, message in [({"which": "BE"}, '"LM".*BE'), ({"ncv": 1}, "larger than 1 for k = 1"), ({"maxiter": 0}, "maxiter"), ({"tol": -1.0}, "tol")]:  # fmt: skip  # noqa: E501
        with pytest.raises(ValueError, match=message):
            linalg.eigsh(lambda v: v, like, **arguments)


def test_eigsh_refuses_what_is_not_symmetric_or_not_the_same() -> None:
    matrix = torch.randn(30, 30)
    with pytest.raises(PackextError, match="not a symmetric operator"):
        linalg.eigsh(lambda v: matrix @ v, torch.zeros(30))
    with pytest.raises(PackextError, match="not the same one at each call"):
        linalg.eigsh(lambda v: v * torch.rand(30), torch.zeros(30))


# -------------------------------------------------------------------------------------------- Hutchinson


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_standard_errors_cover_the_truth_as_often_as_they_say(distribution: str) -> None:
    matrix = psd(30, 30) - 0.5 * psd(30, 30)
    generator = torch.Generator().manual_seed(1)
    runs, hits, entries = 120, 0, torch.zeros(30)
    for _ in range(runs):
        found = linalg.trace(lambda v: matrix @ v, torch.zeros(30), 40, generator, distribution)
        hits += int(abs(found.estimate - matrix.trace()) < 2.02 * found.standard_error)  # 95 % of Student's t with 39
        each = linalg.diagonal(lambda v: matrix @ v, torch.zeros(30), 40, generator, distribution)
        entries += (each.estimate - matrix.diagonal()).abs() < 2.02 * each.standard_error
    assert 0.89 <= hits / runs <= 0.995
    assert 0.92 <= float(entries.mean()) / runs <= 0.985


def test_rademacher_is_exact_for_a_diagonal_matrix() -> None:
    values = torch.randn(10)
    total, error = linalg.trace(lambda v: values * v, torch.zeros(10), 3)
    close(total, values.sum())
    assert float(error) < 1e-12
    close(linalg.diagonal(lambda v: values * v, torch.zeros(10), 1).estimate, values)


def test_standard_error_is_that_of_the_mean() -> None:
    matrix, drawn = psd(12, 12), []

    def matvec(v: Tensor) -> Tensor:
        drawn.append(v * (matrix @ v))
        return matrix @ v

    each = linalg.diagonal(matvec, torch.zeros(12), 9, distribution="normal")
    rows = torch.stack(drawn)
    close(each.estimate, rows.mean(0))
    close(each.standard_error, rows.std(0) / 3)
    total = linalg.trace(lambda v: matrix @ v, torch.zeros(12), 9, distribution="normal")
    close(total.estimate, rows.sum(1).mean())
    close(total.standard_error, rows.sum(1).std() / 3)
    assert math.isinf(linalg.trace(matvec, torch.zeros(12), 1).standard_error)


@pytest.mark.parametrize("estimate", [linalg.trace, linalg.diagonal])
def test_refused_arguments_of_hutchinson(estimate: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        estimate(lambda v: v, torch.ones(3), 0)
    with pytest.raises(ValueError, match="rademacher.*uniform"):
        estimate(lambda v: v, torch.ones(3), distribution="uniform")


def test_eigsh_from_a_vector_that_is_nearly_right() -> None:
    matrix = with_spectrum([*range(1, 60), 61.0])
    like = torch.zeros(60)
    cold = linalg.eigsh(lambda v: matrix @ v, like, ncv=8, tol=1e-6)
    start = cold.vectors[0] + 1e-6 * torch.randn(60)
    warm = linalg.eigsh(lambda v: matrix @ v, like, ncv=8, tol=1e-6, start=start)
    assert warm.converged and warm.matvecs < cold.matvecs and math.isclose(warm.values[0], 61.0, rel_tol=1e-9)
    rough = linalg.eigsh(lambda v: matrix @ v, like, ncv=8, tol=1e-2, start=start)
    assert rough.converged and rough.matvecs == 3 and rough.residuals[0] < 0.61
    far = linalg.eigsh(lambda v: matrix @ v, like, ncv=8, tol=1e-2, start=torch.randn(60))
    assert far.converged and far.matvecs > 3 and math.isclose(far.values[0], 61.0, rel_tol=1e-2)
    with pytest.raises(ValueError, match="start"):
        linalg.eigsh(lambda v: matrix @ v, like, start=torch.zeros(3))
