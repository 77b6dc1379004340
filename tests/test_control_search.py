"""The probabilistic line search: its Gaussian process, the conditions, and the steps that it takes."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor, nn

import packext as px
from packext import optim
from packext.optim.control import line_search
from packext.optim.control._gaussian import OFFSET, Posterior, kernel, quadrant
from packext.optim.control.line_search import ProbabilisticLineSearch
from tests.control_cases import Shift

pytestmark = pytest.mark.usefixtures("double")


# -- the process ----------------------------------------------------------------------------------------------


def test_the_kernel_is_that_of_an_integrated_wiener_process() -> None:
    """k(a, b) = integral of (a - s)(b - s) from 0 to min(a, b), and its derivatives."""
    for a, b in ((0.3, 1.7), (2.0, 0.5), (-9.0, 4.0)):
        got = kernel(np.array([a]), np.array([b]))[:, :, 0, 0]
        x, y = a + OFFSET, b + OFFSET
        low = min(x, y)
        parts = [lambda s, x=x, y=y: (x - s) * (y - s), lambda s, x=x: x - s, lambda s, y=y: y - s, lambda s: 1.0]
        expected = np.reshape([quad(part, 0, low)[0] for part in parts], (2, 2))
        np.testing.assert_allclose(got, expected, rtol=1e-12)


AT = [0.0, 1.0, 2.5, 0.4]
Y = [(0.0, -1.0), (-0.6, -0.2), (-0.1, 0.7), (-0.3, -0.5)]
NOISE = [(0.01, 0.05), (0.02, 0.1), (0.01, 0.2), (0.03, 0.04)]


def test_the_posterior_is_conditioning() -> None:
    """A joint Gaussian over everything, and Schur's complement; the mean's slope is its derivative."""
    where = np.array([*AT, 0.0, 1.7])
    n = len(where)
    full = np.block([[kernel(where, where)[i, j] for j in (0, 1)] for i in (0, 1)])
    seen = [*range(4), *range(n, n + 4)]
    asked = [4, 5, n + 4, n + 5]
    observed = np.array([y for y, _ in Y] + [d for _, d in Y])
    inner = full[np.ix_(seen, seen)] + np.diag([v for v, _ in NOISE] + [d for _, d in NOISE])
    gain = full[np.ix_(asked, seen)] @ np.linalg.inv(inner)
    posterior = Posterior(AT, Y, NOISE)
    mean, covariance = posterior.joint(1.7)
    np.testing.assert_allclose(mean, gain @ observed, rtol=1e-7)
    expected = full[np.ix_(asked, asked)] - gain @ full[np.ix_(seen, asked)]
    np.testing.assert_allclose(covariance, expected, rtol=1e-5, atol=1e-8)
    value, slope = posterior.mean(1.7)
    ahead, behind = posterior.mean(1.7 + 1e-5)[0], posterior.mean(1.7 - 1e-5)[0]
    assert value == pytest.approx(mean[1]) and slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-5)


def test_minima_are_those_that_a_fine_grid_has() -> None:
    hill = Posterior([0.0, 1.0, 2.0], [(0.0, 1.0), (0.3, -1.0), (0.2, 1.0)], [(1e-3, 1e-3)] * 3)  # before a valley
    for posterior, end in ((Posterior(AT, Y, NOISE), 2.5), (hill, 2.0)):
        grid = np.linspace(0, end, 4001)
        values = np.array([posterior.mean(t)[0] for t in grid])
        inside = (values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])
        np.testing.assert_allclose(posterior.minima(), grid[1:-1][inside], atol=1e-3)
        assert len(posterior.minima()) == 1


def test_the_probability_is_that_of_draws() -> None:
    draw = np.random.default_rng(0)
    for mean, root, upper in (
        ((0.3, 0.5), [[0.5, 0.0], [0.3, 0.4]], 0.9),
        ((-0.2, 0.1), [[0.2, 0.1], [-0.3, 0.2]], 2.0),
        ((1.0, 3.0), [[0.5, 0.0], [0.0, 0.5]], 1.0),
    ):
        covariance = np.array(root) @ np.array(root).T
        a, b = draw.multivariate_normal(mean, covariance, 400_000).T
        found = quadrant(np.array(mean), covariance, upper)
        expected = ((a >= 0) & (b >= 0) & (b <= upper)).mean()
        assert found == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 400_000))
    alone = quadrant(np.array([0.3, 0.5]), np.diag([0.04, 0.09]), 0.8)
    exact = norm.cdf(0.3 / 0.2) * (norm.cdf(1.0) - norm.cdf(-0.5 / 0.3))
    assert alone == pytest.approx(exact, rel=1e-9)
    assert quadrant(np.array([0.3, 0.5]), np.diag([0.04, 0.0]), 0.8) == pytest.approx(norm.cdf(1.5))
    assert quadrant(np.array([0.3, 0.9]), np.diag([0.04, 0.0]), 0.8) == 0.0


def test_without_noise_the_conditions_are_wolfes() -> None:
    """Of t² / 2 - t (minimum at 1), with c2 = 0.5: met between 0.5 and 1.5."""
    where = [0.0, 0.3, 0.49, 0.51, 1.0, 1.49, 1.51, 1.95]
    tiny = [(1e-12, 1e-12)] * len(where)
    posterior = Posterior(where, [(t * t / 2 - t, t - 1) for t in where], tiny)
    found = [posterior.wolfe(t, 0.05, 0.5) for t in where[1:]]
    assert [round(p) for p in found] == [0, 0, 1, 1, 1, 0, 0]
    for t, value, met in ((1.0, -0.02, 0), (1.0, -0.08, 1), (2.0, -0.08, 0), (2.0, -0.12, 1)):
        flat = Posterior([0.0, t], [(0.0, -1.0), (value, 0.0)], tiny[:2])  # where a decrease of c1 t is asked for
        assert round(flat.wolfe(t, 0.05, 0.5)) == met


def test_expected_improvement_is_an_integral() -> None:
    posterior = Posterior(AT, Y, NOISE)
    mean, covariance = posterior.joint(1.4)
    s, best = covariance[1, 1] ** 0.5, -0.55
    expected = quad(lambda z: max(best - (mean[1] + s * z), 0) * norm.pdf(z), -9, 9, limit=200)[0]
    assert posterior.improvement(1.4, best) == pytest.approx(expected, rel=1e-6)


# -- the search -----------------------------------------------------------------------------------------------


def searching(rate: float, h: float, s: float, n: int = 16) -> tuple[Any, Any, Any]:
    model = px.extend(Shift([3.0, -4.0]))
    optimizer = ProbabilisticLineSearch(model.parameters(), rate)
    draw = torch.Generator().manual_seed(0)
    return model, optimizer, lambda: model(s * torch.randn(n, 2, generator=draw)).square().sum(1) * h / 2


@pytest.mark.parametrize("rate", [1e-4, 1e-2, 1.0, 1e2])
@pytest.mark.parametrize("h", [0.1, 30.0])
def test_a_quadratic_without_noise_from_any_first_step(rate: float, h: float) -> None:
    """Once the trial step has come near 1 / h, each search ends within the Wolfe conditions: between 0.5 and 1.5."""
    model, optimizer, closure = searching(rate, h, 0.0)
    steps, counts = [], []
    for _ in range(10):
        before = model.theta.detach().clone()
        if float(before.norm()) < 1e-6:
            break
        loss = optimizer.step(closure)
        steps.append(float((before - model.theta.detach()).norm() / (h * before.norm())) * h)
        counts.append(optimizer.evaluations)
        assert loss == pytest.approx(float(h * model.theta.detach().square().sum() / 2))
    assert float(model.theta.detach().norm()) < 0.05
    assert all(0.5 <= step <= 1.5 for step in steps[4:]), steps
    assert max(counts) <= line_search.EVALUATIONS + 1


def test_ends_at_the_trial_that_is_accepted_also_if_it_is_not_the_last() -> None:
    model, optimizer, closure = searching(1e-3, 1.0, 1.0, 4)
    seen: list[tuple[float, Tensor]] = []

    def looking() -> Tensor:
        losses = closure()
        seen.append((float(losses.detach().mean()), model.theta.detach().clone()))
        return losses

    earlier = 0
    for _ in range(40):
        seen.clear()
        loss = optimizer.step(looking)
        (there,) = [where for value, where in seen if value == loss]
        assert torch.equal(model.theta, there)
        earlier += loss != seen[-1][0]
    assert earlier


def test_noise_is_that_of_the_mean_and_exact_along_the_line() -> None:
    model = px.extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    params: list[Tensor] = list(model.parameters())
    optimizer = ProbabilisticLineSearch(params)
    x, y = torch.randn(9, 3), torch.randint(2, (9,))
    direction = {p: torch.randn_like(p) for p in params}
    seen = optimizer._evaluate(lambda: nn.functional.cross_entropy(model(x), y, reduction="none"), params, direction)
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    rows = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(v, params, retain_graph=True)]) for v in losses]
    )
    mean, along = rows.mean(0), rows @ torch.cat([d.flatten() for d in direction.values()])
    expected = [losses.mean(), losses.var() / 9, along.mean(), along.var() / 9, mean @ mean, (rows @ mean).var() / 9]
    torch.testing.assert_close(torch.tensor(seen[:-1]), torch.stack(expected).detach())
    for p in params:  # what happens to `.grad` afterwards is nobody's business
        assert p.grad is not None
        p.grad.zero_()
    torch.testing.assert_close(torch.cat([g.flatten() for g in seen.gradients]), mean)


@pytest.mark.parametrize("written", [False, True])
def test_goes_on_from_a_saved_state_to_the_last_bit(written: bool) -> None:
    model, optimizer, closure = searching(0.1, 1.0, 0.3)
    for _ in range(3):
        optimizer.step(closure)
    if written:
        model.theta.detach().mul_(1.5)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, other, again = searching(5.0, 1.0, 0.3)
    others.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    copied, third = copy.deepcopy((model, optimizer))
    px.extend(copied)
    draw = torch.Generator()

    def copies() -> Tensor:
        return copied(0.3 * torch.randn(16, 2, generator=draw)).square().sum(1) / 2

    for g in (*(f.__closure__[0].cell_contents for f in (closure, again)), draw):  # all draw alike from here
        g.manual_seed(5)
    for _ in range(4):
        one, two, three = optimizer.step(closure), other.step(again), third.step(copies)
        assert one == two == three and optimizer.evaluations == other.evaluations == third.evaluations
    assert torch.equal(model.theta, others.theta) and torch.equal(model.theta, copied.theta)
    with torch.no_grad():
        model.theta.add_(1.0)  # what was seen is no longer where the search starts, so that it looks there first
    start, seen = model.theta.detach().clone(), []

    def looking() -> Tensor:
        seen.append(model.theta.detach().clone())
        return closure()

    optimizer.step(looking)
    assert torch.equal(seen[0], start) and len(seen) == optimizer.evaluations >= 2


def test_what_is_not_finite_is_not_believed() -> None:
    model, optimizer, closure = searching(0.1, 1.0, 0.1)
    optimizer.step(closure)
    before, state = model.theta.detach().clone(), copy.deepcopy(optimizer.state_dict())
    with pytest.warns(optim.SkippedStep, match="ProbabilisticLineSearch skipped a step: .* at all trial steps"):
        assert optimizer.step(lambda: closure() * float("nan")) is None
    after = optimizer.state_dict()
    assert torch.equal(model.theta, before) and after["param_groups"] == state["param_groups"]
    assert torch.equal(after["state"][0]["gradient"], state["state"][0]["gradient"]) and optimizer.skipped == 1
    optimizer.step(closure)
    fresh = searching(0.1, 1.0, 0.1)
    with pytest.warns(optim.SkippedStep, match="skipped a step: the loss or the gradient is NaN or infinite."):
        fresh[1].step(lambda: fresh[2]() + float("inf"))
    assert torch.equal(fresh[0].theta, torch.tensor([3.0, -4.0])) and not fresh[1].state

    model, optimizer, closure = searching(1e3, 1.0, 0.0)  # beyond |θ| = 40 the loss overflows
    optimizer.step(lambda: closure().where(model.theta.norm() < 40, torch.inf))
    assert float(model.theta.detach().norm()) < 5 and optimizer.skipped == 0


def test_wrong_inputs_leave_everything_as_it_was() -> None:
    model, optimizer, closure = searching(0.1, 1.0, 0.1)
    optimizer.step(closure)
    before, state = model.theta.detach().clone(), copy.deepcopy(optimizer.state_dict())
    for wrong, error, text in (
        (
            lambda: closure().mean(),
            ValueError,
            r"individual losses \[N\], one for each sample .* got torch.float64 \[\]",
        ),
        (lambda: closure()[:5], ValueError, "5 losses for a batch of 16 samples"),
        (lambda: closure().detach(), ValueError, "without a graph"),
        (lambda: model(torch.zeros(1, 2)).square().sum(1), px.PackextError, "a batch of one has no variance"),
        (lambda: model.theta.square(), px.PackextError, "extend"),
    ):
        with pytest.raises(error, match=text):
            optimizer.step(wrong)
        assert torch.equal(model.theta, before) and str(optimizer.state_dict()) == str(state)
    with pytest.raises(ValueError, match="takes one group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match="takes one group"):
        ProbabilisticLineSearch([{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))]}])
    stray = nn.Parameter(torch.ones(2))
    other = ProbabilisticLineSearch([model.theta, stray])
    with pytest.raises(px.PackextError, match=r"parameter 1, shape \[2\], was not used by an extended model"):
        other.step(closure)


def test_a_flat_start_stays() -> None:
    model, optimizer, closure = searching(0.1, 0.0, 0.1)
    assert optimizer.step(closure) == 0.0 and torch.equal(model.theta, torch.tensor([3.0, -4.0]))
