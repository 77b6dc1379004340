"""Every instrument against its definition, from individual gradients by a loop over samples, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import packext as px
from packext import testing
from packext.diagnostics import (
    CABS,
    ActivationScale,
    Alpha,
    Cockpit,
    DeadUnits,
    Distance,
    EarlyStopping,
    EffectiveRank,
    GradHist1d,
    GradHist2d,
    GradNorm,
    GradSNR,
    HessMaxEV,
    HessTrace,
    InnerTest,
    Loss,
    MeanGSNR,
    NoiseScale,
    NormLayerNoiseScale,
    NormTest,
    NTKCondition,
    OrthoTest,
    OutputScale,
    SampleNorms,
    Step,
    TICDiag,
    TICTrace,
    UpdateCurvature,
    UpdateSize,
)
from packext.diagnostics.instruments.curvature import MeanTopEigenvalues
from tests.cases import CASES, Case
from tests.helpers import batch, mlp
from tests.test_curvature import curved

#: torch's own advice on even kernels, for the plain model as well.
pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings("ignore:Using padding='same'")]
N = 4
LR = 0.1


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.reshape(len(t), -1) for t in tensors], 1)


def first_order() -> list[Any]:
    return [
        Loss(), GradNorm(), UpdateSize(), Distance(), NormTest(), InnerTest(), OrthoTest(), NoiseScale(), GradSNR(),
        MeanGSNR(), EarlyStopping(), SampleNorms(2), EffectiveRank(), GradHist1d(7, 0.3, None),
        GradHist2d(5, 4, 0.3, 0.4, None), Alpha(), UpdateCurvature(),
    ]  # fmt: skip


def definitions(rows: testing.Rows, losses: Tensor, start: testing.Rows, update: testing.Rows) -> dict[str, Any]:
    """What the instruments are defined to be, from the samples' own gradients `[N, *p]` by parameter."""
    g, n = flat(rows.values()), len(losses)
    mean = g.mean(0)
    want: dict[str, Any] = {"Loss": losses.mean()}
    for name in rows:
        want[f"GradNorm/{name}"] = rows[name].mean(0).norm()
        want[f"UpdateSize/{name}"] = update[name].norm()
    want["GradNorm"] = mean.norm()
    want["UpdateSize"] = torch.cat([u.flatten() for u in update.values()]).norm()
    want["Distance"] = torch.zeros(())
    apart = sum(float((g[k] - mean).square().sum()) for k in range(n))
    want["NormTest"] = (apart / (n * (n - 1) * mean @ mean)) ** 0.5
    along = [float(g[k] @ mean / (mean @ mean)) for k in range(n)]
    want["InnerTest"] = np.std(along, ddof=1) / n**0.5
    across = sum(float((g[k] - along[k] * mean).square().sum()) for k in range(n))
    want["OrthoTest"] = (across / (n * (n - 1) * mean @ mean)) ** 0.5
    variance = g.var(0)
    for name, r in {"": g, **rows}.items():
        r = r.reshape(n, -1)
        trace = float(r.var(0).sum())
        signal = float(r.mean(0).square().sum()) - trace / n
        part = f"/{name}" if name else ""
        want[f"GradSNR{part}"] = signal / trace if trace > 0 else None
        want[f"NoiseScale{part}"] = trace / signal if signal > 0 else None
        if not name:
            want["NoiseScale.trace"], want["NoiseScale.signal"] = trace, signal
            want["NoiseScale.critical_batch"] = want["NoiseScale"]
    want["MeanGSNR"] = ((mean**2 - variance / n) / (variance + 1e-5)).mean()
    want["EarlyStopping"] = 1 - n * (mean**2 / (variance + 1e-5)).mean()
    norms = g.norm(dim=1)
    want["SampleNorms"], want["SampleNorms.quantiles"] = (
        norms.mean(),
        np.quantile(norms, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]),
    )
    want["SampleNorms.largest"] = norms.sort(descending=True).values[:2]
    singular = torch.linalg.svdvals(g)
    shares = singular[singular > 1e-7 * singular[0]] / singular.sum()
    want["EffectiveRank"] = torch.exp(-(shares * shares.log()).sum())
    want["EffectiveRank.participation"] = singular.square().sum() ** 2 / singular.pow(4).sum()
    theta = torch.cat([start[name].flatten() for name in rows]).expand_as(g)
    inside = [np.clip(np.asarray(v).ravel(), -lim + 1e-12, lim - 1e-12) for v, lim in ((g, 0.3), (theta, 0.4))]
    want["GradHist1d"] = np.histogram(inside[0], 7, (-0.3, 0.3))[0] / g.numel()
    want["GradHist2d"] = np.histogram2d(inside[1], inside[0], (4, 5), ((-0.4, 0.4), (-0.3, 0.3)))[0] / g.numel()
    return want


def parabola(
    losses: list[Tensor], slopes: list[Tensor], spread: float, length: float
) -> tuple[float | None, float | None]:
    """Alpha and curvature by the normal equations of generalised least squares."""
    y = torch.stack([losses[0].mean(), losses[1].mean(), slopes[0].mean(), slopes[1].mean()])
    var = [losses[0].var() / len(losses[0]), losses[1].var() / len(losses[1]), spread, spread]
    v = torch.as_tensor(var)
    if not v.max() > 0:
        v = torch.ones(4)
    v = v.clamp(min=1e-12 * float(v.max()))
    x = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 1, 2]])
    w = torch.linalg.solve(x.T @ (x / v[:, None]), x.T @ (y / v))
    return (float(-2 * w[2] / w[1] - 1) if w[2] > 0 else None), float(2 * w[2] / length**2)


def own(case: Case, model: Any, loss: Any, inputs: Any, targets: Any) -> tuple[testing.Rows, Tensor]:
    """The samples' own gradients and losses."""
    n = testing.batch_size(inputs, case.batch_axis)
    weights = [1.0] * n if case.weights is None else [n * w for w in case.weights(targets)]
    rows = testing.individual_gradients(model, loss, inputs, targets, case.batch_axis, weights)
    axis = case.batch_axis if testing._samples.has_axis(targets, case.batch_axis, n) else 0
    losses = []
    for k in range(n):
        with px.disable(), torch.no_grad():
            output = testing.call(model, testing.select(inputs, k, n, case.batch_axis))
            losses.append(loss(output, testing.select(targets, k, n, axis)) * weights[k])
    return rows, torch.stack(losses)


def agree(got: Any, want: Any, name: str, tolerance: float = 1e-7) -> None:
    want = torch.as_tensor(np.asarray(want, dtype=float))
    assert testing.relative_error(torch.as_tensor(np.asarray(got, dtype=float)), want) < tolerance, (name, got, want)


def steady(model: nn.Module) -> bool:
    """Whether no BatchNorm of the model looks at the batch."""
    return not any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())


def reached(rows: testing.Rows, names: Any) -> testing.Rows:
    """Rows of the parameters that the gradient reached; those of others are zero."""
    assert not any(r.any() for name, r in rows.items() if name not in names)
    return {name: r for name, r in rows.items() if name in names}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_first_order_on_every_case(case: Case) -> None:
    model, inputs, targets = case.build()
    loss = case.loss()
    if any(p.dtype != torch.float64 for p in model.parameters()):
        pytest.skip("not in float64")
    px.extend(model, case.batch_axis)
    px.extend(loss)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    monitor = Cockpit(model, optimizer, None, instruments=first_order())
    seen, places, after = [], [], []
    for _ in range(2):
        places.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        after.append(own(case, model, loss, inputs, targets))
        optimizer.zero_grad()
        with monitor.step():
            loss(testing.call(model, inputs), targets).backward()
            names = [name for name, p in model.named_parameters() if p.grad is not None]
            optimizer.step()
        seen.append((monitor.values, monitor.absent))
    rows = reached(after[0][0], names)
    if not steady(model):
        assert "BatchNorm" in seen[0][1]["NormTest"]
        return
    if len(after[0][1]) == 1:
        agree(seen[0][0]["Loss"], after[0][1].mean(), "Loss")
        agree(seen[0][0]["GradNorm"], flat(rows.values()).norm(), "GradNorm")
        for name in (
            "NormTest",
            "InnerTest",
            "OrthoTest",
            "NoiseScale",
            "GradSNR",
            "MeanGSNR",
            "EarlyStopping",
            "Alpha",
        ):
            assert seen[0][1][name] == "one sample: no variance"
        return
    update = {name: places[1][name] - places[0][name] for name in places[0]}
    want = definitions(rows, after[0][1], places[0], {name: update[name] for name in rows})
    values, absent = seen[0]
    # Gradients of a bias in front of a normalisation are zero but for rounding, whose noise is not compared.
    noise = {f"/{k}" for k, r in rows.items() if float(r.norm()) < 1e-12 * float(flat(rows.values()).norm())}
    for name, value in want.items():
        if any(name.endswith(k) for k in noise):
            continue
        if value is None or (name == "NoiseScale.critical_batch" and want["NoiseScale"] is None):
            assert name in absent or abs(float(want.get("NoiseScale.signal", 1))) < 1e-12, name
        elif name.startswith("GradHist"):  # an entry on the edge of a bin may fall on either side
            assert np.abs(values[name] - value).sum() < 0.02, name
        elif name not in values:
            assert "zero" in absent[name.partition(".")[0]], (name, absent)
        elif "SNR" in name or "NoiseScale" in name:  # differences of what may be nearly equal
            assert abs(values[name] - value) < 1e-6 * max(1.0, abs(value)) + 1e-6 * abs(value) ** 2, (name, value)
        else:
            agree(values[name], value, name)
    if "Alpha" not in seen[1][0]:
        reason = seen[1][1].get("Alpha") or absent["Alpha"]
        assert any(word in reason for word in ("concave", "rows for", "gives no", "is not one of torch", "which axis"))
    slopes = [
        sum((r.reshape(len(r), -1) @ update[name].flatten() for name, r in a[0].items()), torch.zeros(N)) for a in after
    ]
    length = float(torch.cat([u.flatten() for u in update.values()]).norm())
    alpha, curvature = parabola([a[1] for a in after], slopes, slopes[1].var() / len(slopes[1]), length)
    if "UpdateCurvature" in seen[1][0]:
        agree(seen[1][0]["UpdateCurvature"], curvature, "curvature", 1e-5)
    if "Alpha" in seen[1][0]:
        agree(seen[1][0]["Alpha"], alpha, "alpha", 1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if curved(c)], ids=lambda c: c.name)
def test_curvature_on_every_case(case: Case) -> None:
    model, inputs, targets = case.build()
    if not steady(model):
        return
    loss = case.loss()
    n = testing.batch_size(inputs, case.batch_axis)
    weights = [1.0 / n] * n if case.weights is None else case.weights(targets)
    factor = n if case.weights is not None and loss.reduction == "sum" else 1
    rows = testing.curvature_rows(model, loss, inputs, targets, case.batch_axis, weights)
    gradients, _ = own(case, model, loss, inputs, targets)
    px.extend(model, case.batch_axis)
    px.extend(loss)
    asked = [HessTrace("ggn"), TICDiag("ggn", 1e-3), TICTrace("ggn", 1e-3), NTKCondition()]
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), LR), None, instruments=asked)
    with monitor.step():
        loss(testing.call(model, inputs), targets).backward()
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    h = {name: rows[name].square().sum((0, 1)) / factor for name in names}
    s = {name: gradients[name].square().mean(0) for name in names}
    for name in names:
        if f"HessTrace/{name}" in monitor.values:
            agree(monitor.values[f"HessTrace/{name}"], h[name].sum(), name)
    agree(monitor.values["HessTrace"], sum(v.sum() for v in h.values()), "HessTrace")
    agree(monitor.values["TICDiag"], sum((s[k] / (h[k] + 1e-3)).sum() for k in names), "TICDiag")
    total = sum(v.sum() for v in h.values()) + 1e-3
    agree(monitor.values["TICTrace"], sum(v.sum() for v in s.values()) / total, "TICTrace")
    spectrum = torch.linalg.eigvalsh(kernel(model, inputs, lambda output: loss(output, targets)))
    if "NTKCondition" in monitor.values:
        assert 1 / monitor.values["NTKCondition"] == pytest.approx(float(spectrum[0] / spectrum[-1]), 1e-6, 1e-13)
    else:
        assert "singular" in monitor.absent["NTKCondition"] and spectrum[0] < 1e-12 * spectrum[-1]


def kernel(model: nn.Module, inputs: Any, loss: Callable[[Any], Tensor]) -> Tensor:
    """Inner products of the gradients of all entries of the outputs that the loss uses, one after the other."""
    outputs = testing.call(model, inputs)
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    parts = torch.autograd.grad(loss(outputs), tensors, retain_graph=True, allow_unused=True)
    outputs = [t for t, part in zip(tensors, parts, strict=True) if part is not None]
    found, trained = [], [p for p in model.parameters() if p.requires_grad]
    for entry in torch.cat([t.flatten() for t in outputs]):
        grads = torch.autograd.grad(entry, trained, retain_graph=True, materialize_grads=True)
        found.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(found) @ torch.stack(found).mT


@pytest.mark.parametrize("bad, inputs", [(math.nan, 1.0), (1.0, 1e12)])
def test_what_is_not_finite_is_not_said_to_be_anything_else(bad: float, inputs: float) -> None:
    asked = [Alpha(), NormTest(), InnerTest(), OrthoTest(), NoiseScale(), GradSNR(), MeanGSNR(), EarlyStopping()]
    others = [EffectiveRank(), NTKCondition()] if inputs == 1 else []
    model = px.extend(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).float())
    x, y = torch.randn(8, 5).float() * inputs, torch.randn(8, 3).float() * inputs
    x[0] *= bad
    optimizer = torch.optim.SGD(model.parameters(), 1e-24)
    monitor = Cockpit(model, optimizer, None, instruments=[*asked, OutputScale(), *others])
    with monitor.step():
        px.extend(nn.MSELoss())(model(x), y).backward()
        optimizer.step()
    why = "not finite: a gradient, or its square, is NaN or infinite"
    assert {name: monitor.absent[name] for name in (i.name for i in asked)} == {i.name: why for i in asked}
    if inputs == 1:
        for name in ("EffectiveRank", "NTKCondition"):
            assert monitor.absent[name] == "not finite: a gradient is NaN or infinite"
    if inputs == 1:
        assert monitor.absent["OutputScale.spread"] == "not finite: the output is NaN or infinite"


def test_without_any_gradient() -> None:
    asked = [NormTest(), InnerTest(), OrthoTest(), NoiseScale(), GradSNR(), EffectiveRank()]
    monitor, model, _ = watched(*asked)
    x = torch.randn(N, 5)
    step_of(monitor, model, px.extend(nn.MSELoss()), x, model(x).detach())
    why = {name: monitor.absent[name] for name in (i.name for i in asked)}
    assert all("zero" in why[name] for name in ("NormTest", "InnerTest", "OrthoTest", "EffectiveRank"))
    assert "not positive" in why["NoiseScale"] and "no variance" in why["GradSNR"] and not any(monitor.values.values())


def test_noise_of_two_samples() -> None:
    monitor, model, loss = watched(*first_order()[4:10])
    x, y = torch.randn(2, 5), torch.tensor([0, 1])
    rows = testing.individual_gradients(model, loss, x, y)
    step_of(monitor, model, loss, x, y)
    ones = {name: row[0] for name, row in rows.items()}
    want = definitions(rows, torch.zeros(2), ones, ones)
    for name in ("NormTest", "InnerTest", "OrthoTest", "NoiseScale.trace", "GradSNR", "MeanGSNR"):
        agree(monitor.values[name], want[name], name)


# -- instruments with draws, options, or hooks ------------------------------------------------------


def step_of(monitor: Cockpit, model: nn.Module, loss: nn.Module, x: Tensor, y: Any) -> None:
    model.zero_grad()
    with monitor.step():
        loss(model(x), y).backward()


def watched(*instruments: Any, model: nn.Module | None = None, loss: nn.Module | None = None) -> Any:
    model = px.extend(mlp() if model is None else model)
    loss = px.extend(nn.CrossEntropyLoss() if loss is None else loss)
    return Cockpit(model, torch.optim.SGD(model.parameters(), LR), None, instruments=instruments), model, loss


def test_the_largest_eigenvalue_over_several_steps_is_never_the_smallest() -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        monitor, model, _ = watched(HessMaxEV(1e-3), loss=nn.MSELoss())
        loss = px.extend(nn.MSELoss())
        x, y = torch.randn(N, 5), 8 * torch.randn(N, 3)
        for _ in range(3):
            spectrum = torch.linalg.eigvalsh(testing.hessian(model, loss, x, y))
            assert spectrum[0] < -0.05
            step_of(monitor, model, loss, x, y)
            value, residual = monitor.values["HessMaxEV"], monitor.values["HessMaxEV.residual"]
            assert abs(value - float(spectrum[-1])) <= residual + 1e-9 < 2e-3 * float(spectrum.abs().max())
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.05 * torch.randn_like(p)


@pytest.mark.parametrize("nested", [False, True])
def test_the_largest_eigenvalue_is_of_the_monitors_own_model(nested: bool) -> None:
    """The loss of a generator passes through its discriminator, which is extended as well."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    judge = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    z, one = torch.randn(N, 3).double(), torch.ones(N, 1).double()
    plain = copy.deepcopy((model, judge))
    want = []
    for k, moved in enumerate(plain):

        def value(*values: Tensor, k: int = k, moved: nn.Module = moved) -> Tensor:
            other = dict(zip(dict(moved.named_parameters()), values, strict=True))
            run = [(lambda v: torch.func.functional_call(moved, other, (v,))) if j == k else plain[j] for j in (0, 1)]
            return F.binary_cross_entropy_with_logits(run[1](run[0](z)), one)

        blocks = torch.autograd.functional.hessian(value, tuple(moved.parameters()))
        rows = [
            torch.cat([b.reshape(p.numel(), -1) for b in row], 1)
            for p, row in zip(moved.parameters(), blocks, strict=True)
        ]
        want.append(float(torch.linalg.eigvalsh(torch.cat(rows))[-1]))
    first, _, loss = watched(HessMaxEV(1e-6), model=model, loss=nn.BCEWithLogitsLoss())
    second, _, _ = watched(HessMaxEV(1e-6), model=judge)
    for sign in (1, -1):  # the second begins with the vector of the first, and its loss is maximised
        with first.step(), second.step() if nested else nullcontext():
            (sign * loss(judge(model(z)), one)).backward()
        assert first.values["HessMaxEV"] == pytest.approx(want[0], rel=1e-6)
        if nested:
            assert second.values["HessMaxEV"] == pytest.approx(want[1], rel=1e-6)


class Hasty(HessMaxEV):
    """Stops after two products, whatever their residual."""

    @property
    def needs(self) -> tuple[Any, ...]:  # type: ignore[override]
        return (MeanTopEigenvalues(self._model, tol=self.tol, start=self._vector, ncv=2, maxiter=1),)


def test_a_largest_eigenvalue_that_has_not_converged_is_not_given() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3))
    hasty, _, loss = watched(Hasty(), model=model)
    monitor, _, _ = watched(HessMaxEV(), model=model, loss=loss)
    refused = 0
    for _ in range(12):  # a new batch each, from whose eigenvectors the last one is far
        x, y = 3 * torch.randn(N, 5), torch.randint(3, (N,))
        top = float(torch.linalg.eigvalsh(testing.hessian(model, loss, x, y))[-1])
        for one in (monitor, hasty):
            step_of(one, model, loss, x, y)
            if "HessMaxEV" in one.absent or "Hasty" in one.absent:
                assert one is hasty and "has not converged" in one.absent["Hasty"]
                refused += 1
                continue
            name = one.instruments[0].name
            value, residual = one.values[name], one.values[f"{name}.residual"]
            assert residual <= 0.1 * value and abs(value - top) < 0.1 * top
    assert refused > 6


def test_trace_of_the_hessian() -> None:
    monitor, model, loss = watched(HessTrace("hessian", 1000))
    x, y = batch(N)
    step_of(monitor, model, loss, x, y)
    want = float(testing.hessian(model, loss, x, y).trace())
    error = monitor.values["HessTrace.standard_error"]
    assert abs(monitor.values["HessTrace"] - want) < 4 * error < 0.3 * abs(want)


def test_monte_carlo_trace_and_criterion_are_right_on_average() -> None:
    monitor, model, loss = watched(HessTrace(), TICTrace())
    x, y = batch(N)
    exact, _, _ = watched(HessTrace("ggn"), TICTrace("ggn"), model=model, loss=loss)
    step_of(exact, model, loss, x, y)
    found = []
    for _ in range(200):
        step_of(monitor, model, loss, x, y)
        found.append((monitor.values["HessTrace"], 1 / monitor.values["TICTrace"]))
    for value, want in zip(np.array(found).T, (exact.values["HessTrace"], 1 / exact.values["TICTrace"]), strict=True):
        assert abs(value.mean() - want) < 4 * value.std() / len(value) ** 0.5


def test_batch_size_of_cabs() -> None:
    monitor, model, loss = watched(CABS())
    x, y = batch(N)
    rows = testing.individual_gradients(model, loss, x, y)
    step_of(monitor, model, loss, x, y)
    trace = flat(rows.values()).var(0).sum()
    agree(monitor.values["CABS"], LR * trace / loss(model(x), y).detach(), "CABS")
    with pytest.raises(ValueError, match="CABS is defined for torch.optim.SGD without momentum, not for Adam"):
        Cockpit(model, torch.optim.Adam(model.parameters()), None, instruments=[CABS()])
    with pytest.raises(ValueError, match="has momentum"):
        Cockpit(model, torch.optim.SGD(model.parameters(), 1.0, momentum=0.9), None, instruments=[CABS()])
    model.zero_grad()
    with monitor.step():
        (0.5 * loss(model(x), y)).backward()
    assert "0.5 times" in monitor.absent["CABS"]
    for changed in ("momentum", "weight_decay", "maximize"):
        monitor.optimizer.param_groups[0][changed] = 0.5
        step_of(monitor, model, loss, x, y)
        assert monitor.absent["CABS"] == f"the optimizer has got {changed}"
        monitor.optimizer.param_groups[0][changed] = 0.0
    monitor.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 2 * LR})
    step_of(monitor, model, loss, x, y)
    assert "different learning rates" in monitor.absent["CABS"]


def test_scale_of_activations_leaves_out_what_is_no_tensor() -> None:
    monitor, model, _ = watched(ActivationScale(), model=nn.LSTM(3, 4))
    with monitor.step():
        model(torch.randn(5, N, 3))[0].sum().backward()
    assert "no module" in monitor.absent["ActivationScale"]


def test_the_hardest_samples() -> None:
    monitor, model, loss = watched(SampleNorms(3))
    x, y = batch(8)
    rows = flat(testing.individual_gradients(model, loss, x, y).values())
    step_of(monitor, model, loss, x, y)
    assert monitor.values["SampleNorms.hardest"].tolist() == rows.norm(dim=1).argsort(descending=True)[:3].tolist()


def test_dead_units_and_scale_of_activations() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5), nn.ReLU(inplace=True))
    with torch.no_grad():
        model[0].bias[:3] = -100.0
        model[3].bias[1] = -100.0
    monitor, model, loss = watched(DeadUnits(), ActivationScale(), model=model)
    x, y = torch.randn(N, 2, 5, 5), torch.randint(5, (N,))
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    step_of(monitor, model, loss, x, y)
    assert [dict(m._forward_hooks) for m in model.modules()] == hooks
    with torch.no_grad():
        inner = model[0](x)
        outer = model[3](inner.relu().flatten(1))
    assert monitor.values["DeadUnits/1"] == 3 / 4
    dead = float((outer <= 0).all(0).double().mean())
    agree(monitor.values["DeadUnits/4"], dead, "dead")
    agree(monitor.values["DeadUnits"], (3 + 5 * dead) / 9, "dead")
    agree(monitor.values["ActivationScale/0"], inner.square().mean().sqrt(), "scale")
    agree(monitor.values["ActivationScale/3"], outer.square().mean().sqrt(), "scale")
    with pytest.raises(ValueError, match="DeadUnits needs modules nn.ReLU or nn.ReLU6, and Sequential has none"):
        watched(DeadUnits())
    with pytest.raises(ValueError, match="ActivationScale needs modules .* Flatten has none"):
        ActivationScale().check(nn.Flatten(), monitor.optimizer)
    tokens, model, loss = watched(DeadUnits(), model=nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Flatten()))
    step_of(tokens, model, loss, torch.randn(N, 3, 2), torch.randint(9, (N,)))
    assert "axis" in tokens.absent["DeadUnits/1"] and "DeadUnits" not in tokens.values


def test_a_relu_that_is_called_for_several_layers() -> None:
    for width in (4, 6):
        relu = nn.ReLU()
        first, second = nn.Linear(5, 4), nn.Linear(4, width)
        with torch.no_grad():
            first.bias[:] = torch.tensor([-100.0, -100.0, 100.0, 100.0])
            second.weight.zero_()
            second.bias[:] = torch.tensor([-1.0, 1.0, -1.0, 1.0, 1.0, 1.0][:width])
        monitor, model, loss = watched(DeadUnits(), model=nn.Sequential(first, relu, second, relu))
        step_of(monitor, model, loss, torch.randn(N, 5), torch.randint(4, (N,)))
        if width == 4:
            assert monitor.values["DeadUnits/1"] == 1 / 4  # off in both
        else:
            assert monitor.absent["DeadUnits/1"] == "it has 4 units in one call and 6 in another"


def test_a_condition_without_a_pass() -> None:
    monitor, model, loss = watched(NTKCondition())
    with monitor.step():
        pass
    assert "no backward pass" in monitor.absent["NTKCondition"]
    step_of(monitor, model, loss, *batch(N))
    assert monitor.values["NTKCondition"] > 1


class Second(HessMaxEV):
    """Asks for the same as the first, at first."""


def test_two_that_ask_for_eigenvalues_of_what_is_not_symmetric() -> None:
    monitor, model, loss = watched(HessMaxEV(), Second(), SampleNorms(), model=mlp().float())
    x, y = batch(N)
    for scale in ("sample", "mean"):
        with monitor.step(scale) as step:
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(model(x.float()), y)
            if scale == "mean":
                step.loss(value)
            value.backward()
        for name in ("HessMaxEV", "Second"):
            assert "eigsh: matvec is not a symmetric operator" in monitor.absent[name]


def test_sampled_histograms_agree_with_those_of_all_samples_within_their_error() -> None:
    n = 64
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5))
    exact = GradHist1d(10, 0.2, None), GradHist2d(6, 4, 0.2, 0.5, None)
    x, y = torch.randn(n, 2, 5, 5), torch.randint(5, (n,))
    whole, model, loss = watched(*exact, model=model)
    step_of(whole, model, loss, x, y)
    some, _, _ = watched(GradHist1d(10, 0.2, 16), GradHist2d(6, 4, 0.2, 0.5, 16), model=model, loss=loss)
    every, _, _ = watched(GradHist1d(10, 0.2, n), GradHist2d(6, 4, 0.2, 0.5, n), model=model, loss=loss)
    step_of(every, model, loss, x, y)
    for name in whole.values:
        assert np.allclose(whole.values[name], every.values[name], atol=1e-3), name
    assert not every.values["GradHist1d.standard_error"].any()
    away = []
    for _ in range(40):
        step_of(some, model, loss, x, y)
        away.append((some.values["GradHist1d"] - whole.values["GradHist1d"]) / some.values["GradHist1d.standard_error"])
    seen = np.abs(np.array(away))[:, 4:6]
    assert 0.5 < np.mean(seen < 1) < 0.9 and np.mean(seen < 3) > 0.95
    free, _, _ = watched(GradHist1d(10), model=model, loss=loss)
    step_of(free, model, loss, x, y)
    assert free.values["GradHist1d.limit"] > 0 and abs(free.values["GradHist1d"].sum() - 1) < 1e-9
    with pytest.raises(ValueError, match="limit=<number>"):
        GradHist1d(samples=None)


def test_sampled_histograms_of_passes_of_different_sizes() -> None:
    """Of 60 samples and of 4, whose gradients are in a bin of their own: 1/16 of all."""
    asked = GradHist1d(4, 10.0), GradHist2d(4, 1, 10.0, 10.0)
    monitor, model, loss = watched(*asked, model=nn.Linear(1, 1), loss=nn.MSELoss(reduction="sum"))
    x, found, errors = torch.ones(64, 1), [], []
    for _ in range(200):
        with monitor.step():
            loss(model(x[:60]), model(x[:60]).detach() - 1).backward()
            loss(model(x[60:]), model(x[60:]).detach() - 4).backward()
            model.zero_grad()
        assert np.allclose(monitor.values["GradHist2d"][0], monitor.values["GradHist1d"])
        found.append(monitor.values["GradHist1d"][3])
        errors.append(monitor.values["GradHist1d.standard_error"][3])
    assert {round(8 * share, 6) for share in found} <= {0, 1, 2, 3, 4}  # of 8 samples
    spread = (1 / 16 * 15 / 16 / 8 * 56 / 63) ** 0.5
    assert abs(np.mean(found) - 1 / 16) < 4 * spread / 200**0.5
    assert np.mean(np.square(errors)) == pytest.approx(spread**2, rel=0.2)


def test_slopes_of_passes_of_different_sizes() -> None:
    """Of 60 samples that are alike and of 4: the slopes' variance is as of all 64, up to the mean of those drawn."""
    monitor, model, loss = watched(Alpha(), model=nn.Linear(1, 1, bias=False), loss=nn.MSELoss(reduction="sum"))
    x, where, losses, slopes = torch.ones(64, 1), [], [], []
    nn.init.zeros_(model.weight)
    for many, few in ((0.5, 2.0), (0.6, 3.5)):
        y = torch.cat([torch.full((60, 1), many), torch.full((4, 1), few)])
        where.append(model.weight.item())
        losses.append((where[-1] - y).square().flatten())
        slopes.append(2 * (where[-1] - y).flatten())
        with monitor.step():
            for part in (slice(60), slice(60, 64)):
                loss(model(x[part]), y[part]).backward()
            with torch.no_grad():
                model.weight.add_(0.8)
            model.zero_grad()
    along = [0.8 * s for s in slopes]
    want, _ = parabola(losses, along, along[1].var() / 64, 0.8)
    other, _ = parabola(losses, along, torch.cat([along[1][:16], along[1][60:]]).var() / 64, 0.8)
    assert monitor.values["Alpha"] == pytest.approx(want, rel=0.1) and other > 2 * want


def test_the_error_of_a_histogram_of_drawn_entries() -> None:
    """Of all samples, and of some entries each: samples are not all of the error."""
    monitor, model, loss = watched(GradHist1d(10, samples=N), model=nn.Linear(90, 20))
    step_of(monitor, model, loss, torch.randn(N, 90), torch.randint(20, (N,)))
    assert monitor.values["GradHist1d.standard_error"].max() > 0


@pytest.mark.parametrize("far", [1e20, -1e20, 1e38])
def test_entries_far_beyond_the_limits_of_a_histogram_are_in_the_outermost_bins(far: float) -> None:
    monitor, model, loss = watched(GradHist1d(10, 1.0), GradHist2d(10, 4, 1.0), model=nn.Linear(3, 1), loss=nn.L1Loss())
    with monitor.step():  # the gradient of the weights are the inputs
        loss(model(torch.full((2, 3), far)), torch.full((2, 1), -1e300)).backward()
    place = 9 if far > 0 else 0
    assert monitor.values["GradHist1d/weight"][place] == monitor.values["GradHist2d/weight"][:, place].sum() == 1.0


def test_a_histogram_of_many_bins_of_parameters_in_bfloat16() -> None:
    """All entries of all samples are looked at, and none at a border: bins are those of the exact numbers."""
    net = nn.Sequential(nn.Linear(3, 4, bias=False, dtype=torch.bfloat16))
    with torch.no_grad():
        net[0].weight.copy_(torch.linspace(-1.2, 1.2, 12).view(4, 3))
    monitor, model, loss = watched(GradHist2d(1, 400, 1.0, 1.0), model=net, loss=nn.L1Loss())
    values = net[0].weight.detach().double().flatten().clamp(-1, 1).numpy()
    step_of(monitor, model, loss, torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bfloat16))
    want = np.histogram(values, 400, (-1, 1))[0] / 12
    assert np.allclose(monitor.values["GradHist2d"][:, 0], want)


class Reached(NormLayerNoiseScale):
    """Of which parameters there are results."""

    def measure(self, step: Step) -> dict[str, Any]:
        return {name: 1.0 for name in step.layers("batch_l2")}


class Looking(NormLayerNoiseScale):
    """Counts how often it goes through the model."""

    looks = 0

    def parameters(self, model: nn.Module) -> list[nn.Parameter] | None:
        self.looks += 1
        return super().parameters(model)


def test_noise_scale_of_normalisations_goes_through_the_model_as_often_for_any_depth() -> None:
    looks = []
    for depth in (1, 9):
        net = nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(5, 5), nn.LayerNorm(5))))
        monitor, model, loss = watched(looking := Looking(), model=net)
        looking.looks = 0
        step_of(monitor, model, loss, *batch(8))
        assert "Looking.trace" in monitor.values
        looks.append(looking.looks)
    assert looks[0] == looks[1]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("beside", [(), (NormTest,)], ids=["alone", "beside"])
def test_noise_scale_of_normalisations_alone(passes: int, beside: tuple[Any, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Unflatten(1, (3, 2)), nn.GroupNorm(3, 3))
    model.extend([nn.Flatten(), nn.Linear(6, 3)])
    monitor, model, loss = watched(NormLayerNoiseScale(), Reached(), *(kind() for kind in beside), model=model)
    x, y = batch(8)
    names = ["1.weight", "1.bias", "4.weight", "4.bias"]
    rows = {name: [] for name in names}
    with px.disable():
        for k in range(8):
            model.zero_grad()
            loss(model(x[k : k + 1]), y[k : k + 1]).backward()
            for name in names:
                rows[name].append(model.get_parameter(name).grad.flatten().clone())  # type: ignore[union-attr]
    model.zero_grad()
    with monitor.step():
        for a, b in zip(x.chunk(passes), y.chunk(passes), strict=True):
            # What is written into the loss of other parameters is nothing to these.
            (loss(model(a), b) / passes + model[0].weight.square().sum()).backward()
    reached = [name.split("/")[1] for name in monitor.values if name.startswith("Reached/")]
    assert set(reached) == (set(dict(model.named_parameters())) if beside else set(names))
    if beside and passes > 1:
        assert "terms of the loss pass by the model" in monitor.absent["NormLayerNoiseScale"]
        return
    total = torch.cat([torch.stack(rows[name]) for name in names], 1)
    for part, g in (("", total), *((f"/{name}", torch.stack(rows[name])) for name in names)):
        trace = float(g.var(0).sum())
        signal = float(g.mean(0).square().sum()) - trace / 8
        if not part:
            agree(monitor.values["NormLayerNoiseScale.trace"], trace, "trace")
            agree(monitor.values["NormLayerNoiseScale.signal"], signal, "signal")
        if signal > 0:
            agree(monitor.values[f"NormLayerNoiseScale{part}"], trace / signal, part, 1e-6)
        else:
            assert "all noise" in monitor.absent[f"NormLayerNoiseScale{part}"]


def test_normalisations_that_are_not_there_or_get_more() -> None:
    with pytest.raises(ValueError, match="NormLayerNoiseScale needs parameters of normalisation layers .* Sequential"):
        watched(NormLayerNoiseScale())
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    monitor, model, loss = watched(NormLayerNoiseScale(), model=model)
    with monitor.step():
        for _ in range(2):
            x, y = batch(8)
            (loss(model(x), y) + model[1].weight.square().sum()).backward()
    assert "terms of the loss pass by the model" in monitor.absent["NormLayerNoiseScale"]


def test_noise_scale_over_steps_is_a_ratio_of_averages() -> None:
    monitor, model, loss = watched(NoiseScale(0.5))
    trace = signal = 0.0
    for _ in range(3):
        x, y = batch(8)
        step_of(monitor, model, loss, x, y)
        trace = 0.5 * trace + 0.5 * monitor.values["NoiseScale.trace"]
        signal = 0.5 * signal + 0.5 * monitor.values["NoiseScale.signal"]
    if signal > 0:
        agree(monitor.values["NoiseScale.critical_batch"], trace / signal, "critical")
    else:
        assert "all noise" in monitor.absent["NoiseScale.critical_batch"]


def test_rows_that_do_not_differ_have_no_noise() -> None:
    monitor, model, loss = watched(GradSNR(), NormTest(), NoiseScale(), Alpha())
    x, y = torch.ones(N, 5), torch.zeros(N, dtype=torch.long)
    for _ in range(2):
        with monitor.step():
            loss(model(x), y).backward()
            monitor.optimizer.step()
            monitor.optimizer.zero_grad()
    assert monitor.values["NormTest"] < 1e-6 and monitor.values["NoiseScale"] < 1e-12
    assert monitor.values.get("GradSNR", 1e99) > 1e12  # but for rounding, there is no variance to divide by
    assert "Alpha" in monitor.values


def test_alpha_of_a_quadratic() -> None:
    model = px.extend(nn.Linear(1, 1, bias=False))
    loss = px.extend(nn.MSELoss())
    x, y = torch.ones(N, 1), torch.zeros(N, 1)
    for lr, want in ((0.25, -0.5), (0.5, 0.0), (1.0, 1.0)):  # loss = theta², minimum at learning rate 1/2
        nn.init.constant_(model.weight, 3.0)
        optimizer = torch.optim.SGD(model.parameters(), lr)
        monitor = Cockpit(model, optimizer, None, instruments=[Alpha(), UpdateCurvature()])
        for _ in range(2):
            with monitor.step():
                loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert monitor.values["Alpha"] == pytest.approx(want, abs=1e-9)
        assert monitor.values["UpdateCurvature"] == pytest.approx(2.0)
