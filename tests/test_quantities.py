"""Every quantity on every case against the loop over single samples, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import _scratch, _statistics, testing
from packext._factored import Outer
from tests.cases import CASES, Case

#: torch's own advice on even kernels, for the plain model as well.
pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings("ignore:Using padding='same'")]


class Prepared:
    """A case, its rows by the slow oracle, and the model and loss extended."""

    def __init__(self, case: Case) -> None:
        self.model, self.inputs, self.targets = case.build()
        self.loss = case.loss()
        n = testing.batch_size(self.inputs, case.batch_axis)
        mean = self.loss.reduction == "mean"
        weights = [1 / n] * n if mean else [1.0] * n
        if case.weights is not None:
            weights = case.weights(self.targets)
        self.factor = float(n) if mean else 1.0
        self.rows = testing.individual_gradients(
            self.model, self.loss, self.inputs, self.targets, case.batch_axis, weights
        )
        px.extend(self.model, case.batch_axis)
        px.extend(self.loss)

    def check(self, quantities: Any, scale: Any = "loss") -> px.Results:
        """Compare the quantities of one backward pass, and `.grad`."""
        self.model.zero_grad()
        rows, factor = self.rows, self.factor
        if scale == "sample":
            rows, factor = {k: r * factor for k, r in rows.items()}, 1.0
        with px.backpack(*quantities, scale=scale) as results:
            self.loss(testing.call(self.model, self.inputs), self.targets).backward()
        report = testing.compare(self.model, quantities, rows, factor, 1e-9)
        assert report.ok, str(report)
        for name, p in self.model.named_parameters():
            if p.requires_grad and p.grad is not None:
                assert testing.relative_error(p.grad, self.rows[name].sum(0)) < 1e-9, name
        return results


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_all_in_one_pass(case: Case) -> None:
    quantities = testing.all_quantities()
    this = Prepared(case)
    results = this.check(quantities)
    for name, p in this.model.named_parameters():
        if not p.requires_grad:
            assert p.grad is None and name not in results, name
        elif p.grad is None:
            assert not this.rows[name].any() and name not in results, name
            assert not any(hasattr(p, q.savefield) for q in quantities), name


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_each_alone(case: Case) -> None:
    this = Prepared(case)
    for quantity in testing.all_quantities():
        this.check([quantity])


@pytest.mark.parametrize("name", ["conv2d groups", "mlp", "lstm"])
def test_deviations_in_parts_of_a_tile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner products keep the rows, so that deviations from their mean are not taken in place."""
    monkeypatch.setattr(_statistics, "SMALL", 1)
    this = Prepared(next(case for case in CASES if case.name == name))
    this.check([px.Variance(), px.GradDot()])
    this.check([px.Variance(), px.BatchGrad()])


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("small", [1, 1 << 13])
def test_tiles_of_some_outputs(groups: int, known: bool, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64, 64 and 2 outputs of all samples give what the rows do: together, and each statistic alone."""
    n, s, o, i = 4, 5, 130, 6
    monkeypatch.setattr(_scratch, "TILE", 64 * n * groups * i)
    monkeypatch.setattr(_statistics, "SMALL", small)
    monkeypatch.setattr(_statistics.Statistics, "_tiles_beat_gram", lambda *_: True)
    monkeypatch.setattr(_statistics.Statistics, "_keepable", lambda *_: True)
    a, g = torch.randn(n, groups, s, i), torch.randn(n, groups, o, s)
    rows = torch.einsum("ngos,ngsi->ngoi", g, a).reshape(n, groups * o, i)
    flat, mean = rows.flatten(1), rows.mean(0)
    wanted = {
        "total": rows.sum(0), "sq_norms": flat.square().sum(1), "second_moment": rows.square().sum(0),
        "scatter": (rows - mean).square().sum(0), "gram": flat @ flat.T, "dots": flat @ flat.sum(0),
    }  # fmt: skip
    for wants in (list(wanted), *([want] for want in wanted)):
        statistics = _statistics.Statistics(Outer(a, g, (groups * o, i)))
        with torch.no_grad():
            if known:
                statistics.known["total"] = rows.sum(0)
            statistics.prepare(wants, deliver=not known)
        for want in wants:
            assert testing.relative_error(statistics[want], wanted[want]) < 1e-12, (want, wants)
        for want in set(wants) - ({"total"} if wants != ["dots"] or not known else {"total", "dots"}):
            assert statistics.route[want] == "tiles", (want, wants)


@pytest.mark.parametrize("n", [1, 3, 50])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("recorded", [False, True])
def test_factors_with_one_position(n: int, groups: int, recorded: bool) -> None:
    """All statistics by the factors give what the rows do, together and each alone."""
    o, i = 4, 6
    a, g = torch.randn(n, groups, 1, i), torch.randn(n, groups, o, 1)
    rows = torch.einsum("ngos,ngsi->ngoi", g, a).reshape(n, groups * o, i)
    flat = rows.flatten(1)
    wanted = {
        "total": rows.sum(0), "sq_norms": flat.square().sum(1), "second_moment": rows.square().sum(0),
        "scatter": (rows - rows.mean(0)).square().sum(0), "gram": flat @ flat.T, "dots": flat @ flat.sum(0),
    }  # fmt: skip
    for wants in (list(wanted), *([want] for want in wanted)):
        statistics = _statistics.Statistics(Outer(a, g, (groups * o, i)))
        with torch.set_grad_enabled(recorded):
            statistics.prepare(wants)
        for want in wants:
            assert (statistics[want] - wanted[want]).abs().max() < 1e-12, (want, wants)


@pytest.mark.parametrize("n", [3, 8, 40])
@pytest.mark.parametrize("s", [1, 3])
@pytest.mark.parametrize("keep", [0, 1 << 20])
@pytest.mark.parametrize("lost", [0.0, torch.nan, torch.inf])
def test_deviations_of_rows_that_hardly_differ(
    n: int, s: int, keep: int, lost: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: where all rows are nearly equal, where some entries of them are, and where none is.

    Entries of one input that are not finite take nothing from the others.
    """
    monkeypatch.setattr(_statistics, "KEEP", keep)
    for small in (1, 1 << 13):
        monkeypatch.setattr(_statistics, "SMALL", small)
        for equal in (0, 1, 6) if lost == 0 else (3,):
            for tile in (1, 1 << 10, 1 << 19):  # of a few samples, of all samples and 16 outputs, of all
                monkeypatch.setattr(_scratch, "TILE", tile)
                a, g = torch.randn(n, 1, s, 6).float(), torch.randn(n, 1, 40, s).float()
                a[..., :equal] = a[:1, ..., :equal] + 1e-3 * a[..., :equal]
                g[:, :, : 10 * equal] = g[:1, :, : 10 * equal] + 1e-3 * g[:, :, : 10 * equal]
                a[0, 0, 0, 5] += lost
                rows = torch.einsum("ngos,ngsi->oin", g.double(), a.double())
                truth = (rows - rows.mean(-1, keepdim=True)).square().sum(-1)
                for wants in (["scatter"], ["scatter", "second_moment", "dots"], ["scatter", "rows"]):
                    statistics = _statistics.Statistics(Outer(a, g, (40, 6)))
                    with torch.no_grad():
                        statistics.prepare(wants, deliver=True)
                    assert not (statistics["scatter"] < 0).any()
                    # What float32 leaves of deviations that are a thousandth of their mean.
                    found = statistics["scatter"].double()
                    torch.testing.assert_close(found, truth, rtol=2e-3, atol=0, equal_nan=True)


class Tripled(px.SumGradSquared):
    savefield = "tripled"

    def result(self, ask: Any) -> Any:
        return ask.statistics.scaled("second_moment", 3.0)


@pytest.mark.parametrize("case", CASES[::9], ids=lambda c: c.name)
def test_quantities_that_share_a_statistic(case: Case) -> None:
    """What one makes of it in place is not what another gets, whichever comes first, declared or not."""
    this = Prepared(case)
    triple = [px.SumGradSquared(), Tripled(), px.BatchL2Grad()]
    for quantities in (triple, triple[::-1], [px.SumGradSquared(), px.DiagEF()], [px.DiagEF(), px.SumGradSquared()]):
        scale = 1 / this.factor  # with which `diag_ef` is the sum of squares of rows as the loss has them
        with px.backpack(*quantities, scale=scale):
            this.loss(testing.call(this.model, this.inputs), this.targets).backward()
        times = {"sum_grad_squared": scale**2, "tripled": 3.0, "diag_ef": 1.0}
        for name, p in this.model.named_parameters():
            if p.grad is None or not p.requires_grad:
                continue
            squares = this.rows[name].square().sum(0)
            for field in [q.savefield for q in quantities if q.savefield in times]:
                assert testing.relative_error(getattr(p, field), times[field] * squares) < 1e-9, (name, field)


class Shifts(nn.Module):
    """Parameters whose gradients are the very tensors that arrive: of all samples, of each, and of one."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.p, self.q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(1, 3))
        self.own, self.mid = nn.Parameter(torch.randn(n, 3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.mid(x + self.own) + self.p + self.q


class Again(px.BatchGrad):
    savefield = "again"


@pytest.mark.parametrize("n", [1, 4])
def test_results_that_are_written_to(n: int) -> None:
    """No two of them, nor one and a gradient, share memory: who scales each in place scales each once."""
    model, x, g = Shifts(n), torch.randn(n, 3), torch.randn(n, 3)
    named = dict(model.named_parameters())
    each = [torch.autograd.grad(model(x)[i], list(named.values()), g[i]) for i in range(n)]
    want = {name: torch.stack(rows) for name, rows in zip(named, zip(*each, strict=True), strict=True)}
    px.extend(model)
    with px.backpack(px.BatchGrad(), attach=False, overhear=True) as other:
        with px.backpack(px.ClippedGrad(1e9), px.BatchGrad(), Again(), scale=1.0) as results:
            model(x).backward(g)
    found = [g]
    for name, p in named.items():
        assert p.grad is not None
        mine = results[name]
        found += [p.grad, mine.clipped_grad, mine.grad_batch, mine.again, other[name].grad_batch]
    for t in found:
        t.mul_(0.5)
    for name, p in named.items():
        for rows in (results[name].grad_batch, results[name].again, other[name].grad_batch):
            torch.testing.assert_close(rows, 0.5 * want[name])
        for total in (p.grad, results[name].clipped_grad):
            torch.testing.assert_close(total, 0.5 * want[name].sum(0))


def test_a_hook_that_writes_to_the_gradient_while_rows_are_held() -> None:
    """What is clipped at the end of the pass is what arrived."""
    model, x, g = px.extend(Shifts(1)), torch.randn(1, 3), torch.randn(1, 3)
    model.own.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad.zero_()))
    with px.backpack(px.ClippedGrad(1e9), scale=1.0) as results:
        model(x).backward(g)
    torch.testing.assert_close(results["own"].clipped_grad, g @ model.mid.weight)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("first", [True, False])
def test_a_hook_that_writes_to_individual_gradients_while_they_are_held(n: int, first: bool) -> None:
    """What is clipped at the end of the pass is what arrived, whichever quantity comes first."""
    model = nn.Sequential(Shifts(n), nn.LayerNorm(3), nn.Linear(3, 2))
    x, g = torch.randn(n, 3), torch.randn(n, 2)
    want = torch.autograd.grad(model(x), list(model.parameters()), g)
    px.extend(model)

    def hook(module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            p.grad_batch.mul_(100.0)

    quantities = [px.ClippedGrad(1e9), px.BatchGrad()]
    with px.backpack(*(quantities if first else quantities[::-1]), scale=1.0, extension_hook=hook):
        model(x).backward(g)
    for p, total in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.clipped_grad, total)
        torch.testing.assert_close(p.grad_batch.sum(0), 100 * total)


@pytest.mark.parametrize("case", CASES[::7], ids=lambda c: c.name)
def test_scale_of_the_samples_own_losses(case: Case) -> None:
    # The default direction of GradDot is a mean in this scale: tests/test_context.py.
    this = Prepared(case)
    along = px.GradDot({name: torch.randn_like(p) for name, p in this.model.named_parameters()})
    this.check([along, *(q for q in testing.all_quantities() if not isinstance(q, px.GradDot))], "sample")


def test_the_table_has_one_name_each() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(isinstance(case.loss(), nn.Module) for case in CASES)


def test_a_quantity_says_how_it_was_made() -> None:
    """So that a message which names it tells two of a kind apart."""
    for made in (
        "BatchGrad()", "SqrtGGNExact(subsampling=[2, 0])", "DiagGGNMC(mc_samples=3)", "HMP(savefield='other')",
        "ClippedGrad(max_norm=1.0, per_layer=True)", "PCHMP(savefield='other', modify='abs')",
        "KFAC(mc_samples=1, approx='reduce', fisher='exact', bias='joint')",
        "TopEigenvalues(k=2, which='SA', curvature='ggn', tol=0.001, maxiter=20)",
    ):  # fmt: skip
        assert repr(eval(f"px.{made}")) == made
    assert repr(px.DiagGGNMC(1, torch.Generator())) == "DiagGGNMC(mc_samples=1)"
