"""`testing.check`: curvature next to dense definitions, what it refuses, and that it sees what is broken."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packext as px
from packext import _factored, linalg, testing
from packext.testing import _checking, _reference
from tests.cases import CASES
from tests.helpers import batch, fields, mlp

pytestmark = pytest.mark.usefixtures("double")


def drawn(draws: int) -> list[Any]:
    kinds = (px.DiagGGNMC, px.BatchDiagGGNMC, px.SqrtGGNMC, px.KFAC, px.HessianTrace, px.DiagHessianMC)
    return [kind(draws, generator=torch.Generator().manual_seed(3)) for kind in kinds]


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over fewer passes than users have it: seeds decide here."""
    monkeypatch.setattr(_checking, "PASSES", 40)


def wrong(report: testing.Report) -> set[str]:
    return {entry.quantity for entry in report if not entry.ok}


# -- on cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp, sum", "conv1d groups stride", "layer norm no bias", "embedding padding_idx"])
def test_exact_quantities_on_cases(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    model, x, y = case.build()
    asked = testing.exact_curvature()
    report = testing.check(model, case.loss(), x, y, asked)
    assert report.ok, str(report)
    assert {e.quantity for e in report} == {".grad", *(type(q).__name__ for q in asked)}
    assert {e.parameter for e in report} == {k for k, p in model.named_parameters() if p.requires_grad}
    assert all(e.tolerance <= 1e-8 for e in report)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_factors_of_weights_and_biases(fisher: str) -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.GroupNorm(2, 6), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))
    x, y = torch.randn(3, 4, 4), torch.randint(3, (3,))
    for approx, bias in itertools.product(("expand", "reduce"), ("separate", "joint")):
        report = testing.check(model, nn.CrossEntropyLoss(), x, y, [px.KFAC(1, approx, fisher, bias=bias)])
        assert report.ok and len(report) == 12, str(report)


@pytest.mark.usefixtures("fewer")
def test_means_of_random_quantities() -> None:
    (x, y), model = batch(3), nn.Sequential(nn.Linear(5, 3), nn.Tanh())
    report = testing.check(model, nn.CrossEntropyLoss(), x, y, [*drawn(1), px.DiagGGNExact()])
    assert report.ok, str(report)
    random = [e for e in report if e.quantity not in ("DiagGGNExact", ".grad")]
    assert len(random) == 6 * 2 and str(report).count(" allowed") == len(random)
    assert all(1e-2 < e.tolerance < 1.5 for e in random if "Hessian" not in e.quantity)


def test_the_confidence_is_what_it_is_said_to_be() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert abs(2 * stats.t.sf(_checking.STANDARD_ERRORS, _checking.PASSES - 1) / 1e-5 - 1) < 1e-2


@pytest.mark.parametrize("value", [torch.ones(1, 3), torch.tensor([1.0, 1.0, torch.nan])], ids=["shape", "NaN"])
def test_a_mean_of_another_shape_or_without_a_value_is_wrong(value: Tensor) -> None:
    mean = _checking._Mean()
    for _ in range(3):
        mean.add(value)
    assert mean.entry("p", "q", torch.ones(3), 1e-8).error == torch.inf


def test_samples_that_influence_each_other_have_products() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    x, y = batch(6)
    report = testing.check(model, nn.CrossEntropyLoss(), x, y, [px.HMP(), px.GGNMP()])
    assert report.ok, str(report)
    with pytest.raises(px.CoupledSamplesError, match="BatchNorm"):
        testing.check(model, nn.CrossEntropyLoss(), x, y, [px.DiagGGNExact()])


def test_some_parameters() -> None:
    (x, y), model = batch(), mlp()
    asked = [*testing.all_quantities(), *testing.exact_curvature()]
    report = testing.check(model, nn.CrossEntropyLoss(), x, y, asked, parameters=model[2].parameters())
    assert report.ok and {e.parameter for e in report} == {"2.weight", "2.bias"}, str(report)
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"0\.weight, which requires no grad"):
        testing.check(model, nn.CrossEntropyLoss(), x, y, parameters=model.parameters())
    with pytest.raises(ValueError, match="none of the model"):
        testing.check(model, nn.CrossEntropyLoss(), x, y, parameters=mlp().parameters())


def test_the_model_stays_as_it_was() -> None:
    (x, y), model = batch(), px.extend(mlp())
    loss = px.extend(nn.CrossEntropyLoss())
    with px.backpack(px.DiagGGNExact()):
        loss(model(x), y).backward()
    before, grads = fields(model), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert testing.check(model, loss, x, y, testing.exact_curvature(), parameters=model[0].parameters()).ok
    assert fields(model) == before and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True) if p.grad is not None)
    assert px.is_extended(model) and px.is_extended(loss)


def test_a_copy_that_would_run_the_model_itself_is_refused() -> None:
    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)
            self.run = lambda x: self.first(x).relu()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.run(x))

    (x, y), model = batch(), Closed()
    said = r"forward of a copy of Closed uses first.weight \[4, 5\] of the model.*make it a method"
    with pytest.raises(px.PackextError, match="check: " + said):
        testing.check(model, nn.CrossEntropyLoss(), x, y)
    assert re.search("explain: " + said, " ".join(str(px.explain(model, x)).split()))
    assert all(p.grad is None for p in model.parameters()) and not any(fields(model).values())


def test_a_subset_of_samples_and_a_parameter_that_is_not_reached() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.left = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    x, y = batch()
    asked = [*testing.exact_curvature()[:2], px.SqrtGGNExact([2, 0]), px.GGNGram(), px.HMP()]
    report = testing.check(Part(), nn.CrossEntropyLoss(), x, y, asked)
    assert report.ok and {e.parameter for e in report if e.quantity == "SqrtGGNExact"} >= {"left.bias"}, str(report)


@pytest.mark.parametrize("kind", [px.KFAC, px.EKFAC])
def test_a_layer_whose_units_are_dead(kind: Any) -> None:
    model, (x, y) = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), batch()
    nn.init.constant_(model[0].bias, -100.0)
    report = testing.check(model, nn.CrossEntropyLoss(), x, y, [kind(fisher="exact", bias="joint")])
    assert report.ok, str(report)


@pytest.mark.parametrize("shape", [(), (0,)], ids=["a number", "empty"])
def test_a_parameter_that_is(shape: tuple[int, ...]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(5, 3), nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x).tanh()
            return torch.cat([h, self.scale.expand(len(h), -1)], 1) if self.scale.dim() else h * self.scale

    x, y = batch()
    asked = [q for q in testing.exact_curvature() if shape != (0,) or not isinstance(q, px.EKFAC)]
    report = testing.check(Scaled(), nn.CrossEntropyLoss(), x, y, asked)  # EKFAC has no eigenvectors of no entries
    assert report.ok, str(report)


# -- what it cannot tell -----------------------------------------------------------------------------------------


def layers() -> tuple[nn.Sequential, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv1d(4, 6, 2, groups=2), nn.Sigmoid(), nn.Flatten(), nn.Sequential(nn.Linear(18, 4), nn.Tanh()),
        nn.Linear(4, 3, bias=False),
    )  # fmt: skip
    return model, torch.randn(3, 4, 4), torch.randint(3, (3,))


@pytest.mark.parametrize(
    "asked",
    [px.KFRA(), px.PCHMP(modify="clip"), px.PCHMP(modify="abs"), px.TopEigenvalues(3), px.TopEigenvalues(2, "SA"),
     px.TopEigenvalues(2, "LM"), px.TopEigenvalues(2, curvature="ggn", tol=0.1, ncv=4, maxiter=1)],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), nn.MSELoss()], ids=repr)
def test_chains_and_eigenvalues(asked: Any, loss: nn.Module) -> None:
    model, x, y = layers()
    report = testing.check(model, loss, x, torch.randn(3, 3) if isinstance(loss, nn.MSELoss) else y, [asked])
    assert report.ok and len(report) == 10, str(report)
    assert all(e.tolerance <= 1e-8 for e in report)


def bases(model: nn.Module, x: Any, y: Tensor, bias: str) -> dict[str, Any]:
    model, loss = px.extend(model), px.extend(nn.CrossEntropyLoss())
    with px.backpack(px.EKFAC(fisher="exact", bias=bias)):
        loss(model(x), y).backward()
    return {name: p.ekfac for name, p in model.named_parameters()}


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("fisher", ["exact", "empirical", "mc"])
@pytest.mark.parametrize("bias", ["separate", "joint"])
def test_eigenvectors_of_factors(fisher: str, bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = layers()
    if fisher == "mc":  # of which there are many passes
        model, (x, y) = nn.Sequential(nn.Linear(5, 3), nn.Tanh()), batch(3)
    numbers = torch.Generator().manual_seed(3)
    for basis in (None, bases(model, x, y, bias)):
        asked = px.EKFAC(basis, 2, fisher=fisher, bias=bias, generator=numbers)
        report = testing.check(model, nn.CrossEntropyLoss(), x, y, [asked])
        assert report.ok and len(report) == 2 * len(list(model.parameters())), str(report)
    if fisher == "exact":  # eigenvalues of another basis
        for form in ("Outer", "Dense"):
            kind = getattr(_factored, form)
            turned = kind.rotated
            monkeypatch.setattr(kind, "rotated", lambda self, b, turned=turned: turned(self, [t.flip(-1) for t in b]))
        assert wrong(testing.check(model, nn.CrossEntropyLoss(), x, y, [asked])) == {"EKFAC"}


def test_a_table_that_counts_lookups_has_no_gradients_of_single_samples() -> None:
    model = nn.Sequential(nn.Embedding(3, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(8, 3))
    with pytest.raises(testing.NoOracle, match="differs from the sum over the samples .* scale_grad_by_freq=True"):
        testing.check(model, nn.CrossEntropyLoss(), torch.randint(3, (4, 2)), torch.arange(4) % 3)


class Shifts(nn.Module):
    """Adds rows of a table, from which the batch's mean is subtracted or not."""

    def __init__(self, rows: Any, centred: bool = False) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 3)
        self.rows, self.centred = rows, centred

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(0) if self.centred else x
        return self.layer((x + self.table[self.rows]).tanh()).sum(1)


def test_factors_of_some_rows_of_a_table_have_no_definition() -> None:
    x, y = torch.randn(4, 5, 4), torch.arange(4) % 3
    assert testing.check(Shifts(slice(None)), nn.CrossEntropyLoss(), x, y, [px.KFLR()]).ok
    for rows in (0, slice(3)):
        given = x[:, :3] if rows else x
        with pytest.raises(testing.NoOracle, match=r"no definition of KFLR for table: .* as a whole"):
            testing.check(Shifts(rows), nn.CrossEntropyLoss(), given, y, [px.KFLR()])


def test_data_that_mix_before_any_parameter_are_noticed() -> None:
    x, y = torch.randn(4, 5, 4), torch.arange(4) % 3
    with pytest.raises(testing.NoOracle, match=r"differs from the sum .* x - x\.mean\(0\)"):
        testing.check(Shifts(slice(None), centred=True), nn.CrossEntropyLoss(), x, y)


def test_what_has_no_definition_is_refused() -> None:
    x, y = batch()

    class Mine(px.Variance):
        pass

    with pytest.raises(testing.NoOracle, match="no slow oracle for Mine.*BatchDiagGGNExact"):
        testing.check(mlp(), nn.CrossEntropyLoss(), x, y, [Mine()])

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    for asked in (px.KFRA(), px.PCHMP()):
        with pytest.raises(testing.NoOracle, match="KFRA and PCHMP for nested nn.Sequentials.*the model is a Chain"):
            testing.check(Chain(), nn.CrossEntropyLoss(), x, y, [asked])

    class Net(nn.Module):
        """One weight is also used outside of its module's call."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.scale = nn.Linear(5, 5), nn.Linear(5, 3), nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.linear(self.a(x).tanh(), self.a.weight) * self.scale)

    model = Net()
    with pytest.raises(testing.NoOracle, match=r"no definition of KFLR for a.weight, a.bias: .*parameters="):
        testing.check(model, nn.CrossEntropyLoss(), x, y, [px.KFLR()])
    assert testing.check(model, nn.CrossEntropyLoss(), x, y, [px.KFLR()], parameters=model.b.parameters()).ok


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (px.DiagGGNExact(), "the root of the GGN has 792 entries"),
        (px.GGNMP(), "the root of the GGN has 792 entries"),
        (px.DiagHessian(), "the Hessian has 4,356 entries"),
        (px.HMP(), "the Hessian has 4,356 entries"),
        (px.KFAC(fisher="exact"), "a Kronecker factor has 49 entries"),
        (px.KFAC(fisher="empirical"), "a Kronecker factor has 49 entries"),
    ],
)
def test_what_is_too_large_is_refused(asked: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_reference, "ENTRIES", 48)
    with pytest.raises(testing.NoOracle, match=f"{said}, for 4 samples of 3 outputs.*fewer samples.*parameters="):
        testing.check(mlp()[:3], nn.CrossEntropyLoss(), *batch(), [asked])


# -- what is broken is seen --------------------------------------------------------------------------------------


def larger(value: Any) -> Any:
    """By a millionth: a tensor, each of a list of tensors, eigenvalues, or what a function returns."""
    if isinstance(value, Tensor):
        return value * (1 + 1e-6)
    if isinstance(value, linalg.KronEigh):
        return linalg.KronEigh(value.vectors, larger(value.eigenvalues))
    if hasattr(value, "_replace"):
        return value._replace(values=larger(value.values))
    return [larger(v) for v in value] if isinstance(value, list) else lambda v: larger(value(v))


@pytest.mark.parametrize("asked", [*testing.exact_curvature(), px.KFRA(), px.PCHMP()], ids=lambda q: type(q).__name__)
def test_a_result_that_is_off_is_seen(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(asked)
    land = kind.land
    monkeypatch.setattr(kind, "land", lambda self, *a: larger(land(self, *a)))
    report = testing.check(mlp(), nn.CrossEntropyLoss(), *batch(), [asked, px.Variance()])
    assert wrong(report) == {kind.__name__}


def moved(value: Any) -> Any:
    """What is off by no more than one entry, one bin, or an axis that broadcasts."""
    if isinstance(value, px.Histogram):
        at = value.counts.argmax()
        changed = value.counts.scatter_add(0, torch.stack([at, (at + 1) % 100]), torch.tensor([-1, 1]))
        return [value._replace(counts=changed), value._replace(grad_edges=value.grad_edges * 1.01)]
    last = torch.zeros_like(value).flatten()
    last[-1] = 1e-6 * value.abs().max()
    return [value + last.view(value.shape), value[None]]


@pytest.mark.parametrize(
    "asked", [*testing.all_quantities(), *testing.exact_curvature()], ids=lambda q: type(q).__name__
)
def test_a_result_that_is_missing_or_off_somewhere_is_seen(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = _checking._passes

    def changed(*given: Any) -> Any:
        for model in passes(*given):
            p = model[0].weight
            value = getattr(p, asked.savefield)
            if kept is None:
                for q in model.parameters():
                    delattr(q, asked.savefield)
            else:
                setattr(p, asked.savefield, moved(value)[kept])
            yield model

    monkeypatch.setattr(_checking, "_passes", changed)
    kept: int | None
    for kept in (None, 0, 1) if type(asked) in testing.ORACLES else (None,):
        report = testing.check(mlp(), nn.CrossEntropyLoss(), *batch(), [asked])
        assert wrong(report) == {type(asked).__name__}, (kept, str(report))


def test_a_broken_rule_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer is given the columns of other samples, which no look at gradients can see."""
    from packext import _curvature

    absorb = _curvature._absorb

    def broken(members: Any, partners: Any, loss: Any, sign: float, source: Any, form: Any, *columns: int) -> None:
        if source.name == "0.weight":
            form.g = form.g.flip(0)
        absorb(members, partners, loss, sign, source, form, *columns)

    monkeypatch.setattr(_curvature, "_absorb", broken)
    report = testing.check(mlp(), nn.CrossEntropyLoss(), *batch(), testing.exact_curvature())
    whole = ("SqrtGGNExact", "GGNGram")  # looked at together with the other parameters
    assert {e.parameter for e in report if not e.ok and e.quantity not in whole} == {"0.weight"}
    assert {"DiagGGNExact", "BatchDiagGGNExact", "SqrtGGNExact", "GGNGram", "DiagHessian"} <= wrong(report)


@pytest.mark.parametrize("broken", ["not the largest", "not orthonormal", "residuals", "no average", "clipped"])
def test_broken_eigenvalues_and_chains_are_seen(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from packext import _chain

    model, x, y = layers()
    eigsh, add = linalg.eigsh, _chain._add_square
    asked: Any = px.TopEigenvalues(2, tol=1e-9)
    if broken == "no average":
        asked = px.KFRA()
        monkeypatch.setattr(_chain, "_add_square", lambda square, g, n: add(square, g[:1].expand_as(g), n))
    elif broken == "clipped":
        asked = px.PCHMP(modify="abs")
        monkeypatch.setattr(Tensor, "abs", lambda r: r.clamp(min=0))
    else:

        def other(matvec: Any, like: Any, k: int, *rest: Any) -> Any:
            found = eigsh(matvec, like, k + 1, *rest)
            last = slice(1, None) if broken == "not the largest" else slice(k)
            values, residuals = found.values[last], found.residuals[last]
            vectors = [v[last] if broken != "not orthonormal" else v[[0] * k] for v in found.vectors]
            return found._replace(
                values=values if broken != "not orthonormal" else values[[0] * k],
                vectors=vectors,
                residuals=residuals + 1e-6 * (broken == "residuals"),
            )

        monkeypatch.setattr(linalg, "eigsh", other)
    assert wrong(testing.check(model, nn.CrossEntropyLoss(), x, y, [asked])) == {type(asked).__name__}


@pytest.mark.usefixtures("fewer")
def test_an_estimate_that_is_biased_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from packext import _roots
    from packext.quantities.hessian import _Hutchinson

    sampled, draws = _roots.sampled, _Hutchinson.draws
    monkeypatch.setattr(_roots, "sampled", lambda *a: (2 * c for c in sampled(*a)))
    monkeypatch.setattr(_Hutchinson, "draws", lambda *a: ([3 * value for value in values] for values in draws(*a)))
    report = testing.check(nn.Linear(5, 3), nn.CrossEntropyLoss(), *batch(), drawn(2))
    assert wrong(report) == {type(q).__name__ for q in drawn(2)}, str(report)


def test_signs_of_a_roots_columns_agree_over_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter's own block is right where its columns are negated; the whole matrix is not."""
    land = px.SqrtGGNExact.land

    def negated(self: Any, held: Any, n: int, factor: float) -> Tensor:
        found = land(self, held, n, factor)
        return -found if found.dim() == 3 else found

    monkeypatch.setattr(px.SqrtGGNExact, "land", negated)
    assert not testing.check(mlp(), nn.CrossEntropyLoss(), *batch(), [px.SqrtGGNExact()]).ok


def test_the_dense_matrices_are_those_of_torch() -> None:
    (x, y), model = batch(), nn.Linear(5, 3, bias=False)
    want = torch.autograd.functional.hessian(lambda w: F.cross_entropy(x @ w.T, y), model.weight.detach())
    want = want.reshape(15, 15)  # of a linear model, the Hessian is the GGN
    torch.testing.assert_close(testing.hessian(model, nn.CrossEntropyLoss(), x, y), want)
    root = testing.ggn_root(model, nn.CrossEntropyLoss(), x, y)["weight"].flatten(1)
    torch.testing.assert_close(root.T @ root, want)
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y, weights=[0.25] * 4)["weight"].reshape(12, 15)
    torch.testing.assert_close(rows.T @ rows, want)


class Experts(nn.Module):
    """Each sample goes to one of two layers, and a sample of the second meets a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        h, out, second = self.trunk(x), torch.zeros(len(x), 3, dtype=x.dtype), x[:, 0] > 0
        for layer, chosen in ((self.first, ~second), (self.second, second)):
            where = torch.where(chosen)[0]
            if len(where):
                out = out.index_add(0, where, layer(h[where]).tanh())
        return out + self.bias * second[:, None] if second.any() else out


@pytest.mark.parametrize("part", ["second.weight", "bias"])
def test_parameters_that_some_samples_alone_depend_on(part: str) -> None:
    """Of the others the output requires no grad, where nothing else is asked for: their rows are zeros."""
    x, y = torch.randn(4, 4), torch.randint(3, (4,))
    x[:, 0] = torch.tensor([1.0, -1.0, -1.0, 1.0])
    model = Experts()
    for quantities in (
        None,
        *([q] for q in (*testing.exact_curvature(), px.DiagGGNMC(8), px.KFAC(fisher="empirical"))),
    ):
        asked = None if quantities is None else [*quantities]
        if part != "bias" and asked and isinstance(asked[0], (px.KFAC, px.KFLR)):
            with pytest.raises(testing.NoOracle, match="at as many positions in each sample"):
                testing.check(model, nn.CrossEntropyLoss(), x, y, asked, parameters=[model.get_parameter(part)])
            continue
        report = testing.check(model, nn.CrossEntropyLoss(), x, y, asked, parameters=[model.get_parameter(part)])
        assert report.ok, report


def test_samples_are_cut_out_of_whatever_a_model_and_a_loss_take() -> None:
    """Inputs with the samples along axis 1, targets along axis 0, and what has no samples beside both."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, how: str, none: list[Any], scale: Tensor, parts: list[Tensor], last: Tensor) -> Tensor:
            assert how == "sum" and not none
            return (self.layer(scale * parts[0]).tanh() + last).transpose(0, 1).flatten(1)

    def loss(output: Tensor, target: dict[str, Any]) -> Tensor:
        return F.cross_entropy(output, target["y"]) if target["kind"] == "cross entropy" else output.sum()

    model, x, last, y = Odd(), torch.randn(2, 4, 5), torch.randn(2, 4, 3), torch.randint(6, (4,))
    inputs = {"how": "sum", "none": [], "scale": torch.randn(5), "parts": [x], "last": last}
    found = testing.individual_gradients(model, loss, inputs, {"kind": "cross entropy", "y": y}, batch_axis=1)
    for n in range(4):
        one = model("sum", [], inputs["scale"], [x[:, n : n + 1]], last[:, n : n + 1])
        want = torch.autograd.grad(F.cross_entropy(one, y[n : n + 1]), list(model.parameters()))
        for (name, _), row in zip(model.named_parameters(), want, strict=True):
            torch.testing.assert_close(found[name][n], row)
