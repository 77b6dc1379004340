"""laplace-torch finds the same posterior with packext's backend as with its own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import packext as px
from packext import testing
from tests.helpers import fields

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of a function that asdl compiles
    laplace = pytest.importorskip("laplace")
from laplace.curvature import BackPackGGN, CurvlinopsEF, CurvlinopsGGN, EFInterface, GGNInterface  # noqa: E402

from packext.adapters.laplace import PackextEF, PackextGGN  # noqa: E402

N = 11

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # in linear_operator, of curvlinops
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),  # BackPACK's, on a first layer
]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)
    )


def data(likelihood: str, *shape: int) -> tuple[Tensor, Tensor]:
    y = torch.randint(3, (N,)) if likelihood == "classification" else torch.randn(N, 3)
    return torch.randn(N, *shape), y


def loader(*tensors: Tensor, size: int = 4) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), batch_size=size)


def fitted(model: nn.Module, likelihood: str, subset: str, structure: str, backend: Any, batches: Any) -> Any:
    la = laplace.Laplace(
        copy.deepcopy(model), likelihood, subset, structure, backend=backend, prior_precision=0.3,
        **({"sigma_noise": 0.7} if likelihood == "regression" else {}),
    )  # fmt: skip
    la.fit(batches)
    return la


def hessian(la: Any) -> Any:
    return la.H_facs.kfacs if hasattr(la, "H_facs") else la.H


@pytest.mark.parametrize(
    "likelihood, subset", [("classification", "all"), ("regression", "all"), ("regression", "last_layer")]
)
@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_posterior_and_marginal_likelihood_are_those_of_curvlinops(
    likelihood: str, subset: str, structure: str
) -> None:
    model, (x, y) = network(), data(likelihood, 1, 4, 4)
    ours, theirs = (fitted(model, likelihood, subset, structure, b, loader(x, y)) for b in (PackextGGN, CurvlinopsGGN))
    torch.testing.assert_close(hessian(ours), hessian(theirs))
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    queries = torch.randn(5, 1, 4, 4)
    for a, b in zip(*(la._glm_predictive_distribution(queries) for la in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_empirical_fisher_of_a_classifier_is_that_of_curvlinops(structure: str) -> None:
    model, (x, y) = network(), data("classification", 1, 4, 4)
    ours, theirs = (
        fitted(model, "classification", "all", structure, b, loader(x, y)) for b in (PackextEF, CurvlinopsEF)
    )
    torch.testing.assert_close(hessian(ours), hessian(theirs))
    torch.testing.assert_close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_empirical_fisher_by_its_definition(likelihood: str, subset: str) -> None:
    """Where laplace-torch's own are a factor of 2 away (regression), or wrong (curvlinops, last layer, diagonal)."""
    model, (x, y) = network(), data(likelihood, 1, 4, 4)

    def nll(f: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(f, y) if likelihood == "classification" else 0.5 * (f - y).square().sum()

    rows = testing.individual_gradients(model, nll, x, y)
    flat = torch.cat([r.flatten(1) for k, r in rows.items() if subset == "all" or k.startswith("5.")], 1)
    for structure, want in (("full", flat.mT @ flat), ("diag", flat.square().sum(0))):
        torch.testing.assert_close(fitted(model, likelihood, subset, structure, PackextEF, loader(x, y)).H, want)
    if subset == "all":
        theirs = fitted(model, likelihood, subset, "diag", CurvlinopsEF, loader(x, y)).H
        torch.testing.assert_close(theirs, flat.square().sum(0) * (1 if likelihood == "classification" else 2))
        kron = fitted(model, likelihood, subset, "kron", PackextEF, loader(x, y, size=N)).H_facs.kfacs
        bias = rows["3.bias"]
        torch.testing.assert_close(kron[3][0], bias.mT @ bias)


def test_kronecker_factors_are_those_of_backpack_without_positions() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), data("classification", 6)
    ours, theirs = (fitted(model, "classification", "all", "kron", b, loader(x, y)) for b in (PackextGGN, BackPackGGN))
    torch.testing.assert_close(hessian(ours), hessian(theirs))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_positions_are_shared_as_curvlinops_shares_them(approx: str) -> None:
    model, (x, y) = network(), data("classification", 1, 4, 4)
    found = []
    for backend in (PackextGGN, CurvlinopsGGN):
        la = laplace.Laplace(
            copy.deepcopy(model), "classification", "all", "kron", backend=backend,
            asdl_fisher_kwargs={"kfac_approx": approx},
        )  # fmt: skip
        la.fit(loader(x, y))
        found.append(hessian(la))
    torch.testing.assert_close(*found)


class Words(nn.Module):
    """A table, a weight that is stored `[I, O]`, a normalisation, a skip, and a parameter that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(6, 4), nn.LayerNorm(4)
        self.inner, self.spare = nn.Parameter(torch.randn(4, 4)), nn.Linear(2, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Any) -> Tensor:
        h = self.norm(self.table(ids["words"] if isinstance(ids, dict) else ids))
        return self.head((h + (h @ self.inner).tanh()).mean(1))


def dense_ggn(model: nn.Module, x: Tensor) -> Tensor:
    """J^T H J by autograd, of a classifier."""
    named = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros(())
    for each in x:
        f = model(each[None])[0]
        rows = [
            torch.cat(
                [
                    torch.zeros(p.numel()) if g is None else g.flatten()
                    for p, g in zip(
                        named, torch.autograd.grad(v, named, retain_graph=True, allow_unused=True), strict=True
                    )
                ]
            )
            for v in f
        ]
        j, p = torch.stack(rows), f.softmax(0).detach()
        total = total + j.mT @ (p.diag() - p[:, None] * p) @ j
    return total


def test_a_model_that_the_other_backends_refuse() -> None:
    model, x, y = Words(), torch.randint(6, (N, 5)), torch.randint(3, (N,))
    want = dense_ggn(model, x)
    full, diag, kron = (
        fitted(model, "classification", "all", s, PackextGGN, loader(x, y)) for s in ("full", "diag", "kron")
    )
    torch.testing.assert_close(full.H, want)
    torch.testing.assert_close(diag.H, want.diagonal())
    factors = dict(zip((n for n, _ in model.named_parameters()), hessian(kron), strict=True))
    counts = torch.stack([(x == k).sum() for k in range(6)]) / (N * 5.0)
    torch.testing.assert_close(factors["table.weight"][0], counts.diag())  # inputs first, as the table is stored
    with torch.no_grad():
        h = model.norm(model.table(x)).flatten(0, 1)
    torch.testing.assert_close(factors["inner"][0], h.mT @ h / (N * 5))
    torch.testing.assert_close(factors["head.bias"][0], want[-3:, -3:])
    assert not any(f.any() for f in factors["spare.weight"] + factors["spare.bias"])
    assert kron.log_marginal_likelihood().isfinite()


def test_inputs_in_a_dictionary() -> None:
    model, x, y = Words(), torch.randint(6, (N, 5)), torch.randint(3, (N,))
    plain, nested = (
        fitted(model, "classification", "all", "diag", PackextGGN, batches)
        for batches in (loader(x, y), Named([{"words": x[i], "labels": y[i]} for i in range(N)]).batches())
    )
    torch.testing.assert_close(hessian(nested), hessian(plain))
    torch.testing.assert_close(nested.loss, plain.loss)


class Named(list):
    """A data set of dictionaries."""

    def batches(self) -> DataLoader:
        return DataLoader(self, batch_size=4)


def test_jacobians_are_those_of_torch_func() -> None:
    model, (x, y) = network(), data("classification", 1, 4, 4)
    ours, theirs = (kind(copy.deepcopy(model), "classification") for kind in (PackextGGN, GGNInterface))
    torch.testing.assert_close(ours.jacobians(x), theirs.jacobians(x))
    for outputs in (torch.randint(3, (N,)), torch.randint(3, (N, 2))):
        torch.testing.assert_close(
            ours.selected_output_jacobians(x, outputs), theirs.selected_output_jacobians(x, outputs)
        )
    slopes = []
    for backend in (ours, theirs):
        inputs = x.clone().requires_grad_()
        backend.jacobians(inputs, enable_backprop=True)[0].square().sum().backward()
        slopes.append(inputs.grad)
    torch.testing.assert_close(*slopes)
    with torch.no_grad():
        torch.testing.assert_close(ours.jacobians(x), theirs.jacobians(x))
    ef, other = PackextEF(model, "classification"), EFInterface(copy.deepcopy(model), "classification")
    torch.testing.assert_close(ef.gradients(x, y), other.gradients(x, y))


def test_a_subnetwork() -> None:
    model, (x, y) = network(), data("regression", 1, 4, 4)
    indices = torch.tensor([0, 3, 14, 20, 100])
    for structure in ("full", "diag"):
        found = []
        for backend in (PackextGGN, CurvlinopsGGN):
            la = laplace.Laplace(
                copy.deepcopy(model), "regression", "subnetwork", structure, backend=backend, subnetwork_indices=indices
            )
            la.fit(loader(x, y))
            found.append(la.H)
        torch.testing.assert_close(*found)


def test_frozen_parameters_are_no_part_of_the_posterior() -> None:
    model, (x, y) = network(), data("classification", 1, 4, 4)
    model[0].requires_grad_(False)
    for structure, reference in (("full", GGNInterface), ("diag", GGNInterface), ("kron", CurvlinopsGGN)):
        ours, theirs = (
            fitted(model, "classification", "all", structure, b, loader(x, y)) for b in (PackextGGN, reference)
        )
        torch.testing.assert_close(hessian(ours), hessian(theirs))


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_drawn_targets_have_the_ggn_as_their_mean(likelihood: str) -> None:
    """6000 draws are within a few hundredths of it; a factor of 2 or a missing 1/2 is not."""
    model, (x, y) = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), data(likelihood, 4)
    x, y = torch.randn(3000, 4), y.repeat_interleave(300, 0)[:3000]
    exact, drawn = (
        PackextGGN(copy.deepcopy(model), likelihood, stochastic=stochastic, num_samples=2)
        for stochastic in (False, True)
    )
    for method in ("full", "diag"):
        a, b = (getattr(backend, method)(x, y)[1] for backend in (exact, drawn))
        assert 0 < (a - b).norm() / a.norm() < 0.06, method
    for a, b in zip(*(backend.kron(x, y, 3000)[1].kfacs for backend in (exact, drawn)), strict=True):
        assert (a[0] - b[0]).norm() / a[0].norm() < 0.06
        assert len(a) == 1 or torch.equal(a[1], b[1])


@pytest.mark.parametrize("last_layer", [False, True])
def test_the_model_stays_as_it_was(last_layer: bool) -> None:
    model, (x, y) = network(), data("classification", 1, 4, 4)
    if last_layer:
        model = laplace.utils.FeatureExtractor(model, last_layer_name="5")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    first, second = list(model.parameters())[:2]
    before = fields(model)
    for kind in (PackextGGN, PackextEF):
        first.requires_grad_(False)
        second.requires_grad_(True)
        backend, inputs = kind(model, "classification", last_layer=last_layer), x.clone().requires_grad_()
        first.requires_grad_(True)  # thawed and frozen since
        second.requires_grad_(not last_layer)
        wanted = [p.requires_grad for p in model.parameters()]
        (
            backend.full(inputs, y),
            backend.diag(inputs, y, N=N),
            backend.kron(inputs, y, N=N),
            backend.gradients(inputs, y),
        )
        assert inputs.grad is None
        with pytest.raises(px.PackextError, match="the loss of a batch is nan"):
            backend.diag(x * torch.nan, y)
    assert fields(model) == before and wanted == [p.requires_grad for p in model.parameters()]
    assert all((p.grad == 1).all() for p in model.parameters())


def test_what_is_refused() -> None:
    x, y = torch.randn(N, 4, 4), torch.randint(3, (N,))
    with pytest.raises(px.UnsupportedUseError, match=r"outputs \[N, C\] of Linear, got \[11, 4, 3\]"):
        PackextGGN(nn.Linear(4, 3), "classification").diag(x, y)
    grouped = nn.Sequential(nn.Conv1d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(12, 3))
    backend = PackextGGN(grouped, "classification")
    with pytest.raises(px.UnsupportedUseError, match=r"groups, as the weight \[4, 2, 2\]"):
        backend.kron(x, y, N)
    torch.testing.assert_close(backend.diag(x, y)[1], dense_ggn(grouped, x).diagonal())
    coupled = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3))
    with pytest.raises(px.CoupledSamplesError):
        PackextGGN(coupled, "classification").diag(x, y)
    assert all(p.grad is None and p.requires_grad for p in coupled.parameters())
