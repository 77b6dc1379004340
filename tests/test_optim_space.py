"""The optimizers that solve one system in the space of samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import optim
from tests import optim_oracles as oracles
from tests.test_optim_each import LOSS, data, network, passed, theta

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("n", [6, 40])
@pytest.mark.parametrize("squared", [False, True])
def test_either_side_of_the_system_gives_the_direction(n: int, squared: bool) -> None:
    """With 43 parameters, and 2 columns for each of the samples (3 for a squared error)."""
    model, (x, y) = network(), data(n)
    target = nn.functional.one_hot(y, 3).double() if squared else y
    loss = px.extend(nn.MSELoss()) if squared else LOSS
    optimizer = optim.SPRING(model.parameters(), lr=0.3, damping=1e-3, momentum=0.5, max_step=None)
    memory = torch.zeros(43)
    for _ in range(3):
        before = theta(model)
        j = torch.cat(list(oracles.jacobians(before, x).values()), 2)
        h = 2 / 3 * torch.eye(3).expand(n, 3, 3) if squared else oracles.hessians(before, x)
        ggn = torch.einsum("nci,ncd,ndj->ij", j, h, j) / n
        passed(model, optimizer, (x, target), loss)
        g = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        memory = torch.linalg.solve(ggn + 1e-3 * torch.eye(43), g + 1e-3 * 0.5 * memory)
        change = torch.cat([(before[k] - p.detach()).flatten() for k, p in model.named_parameters()])
        torch.testing.assert_close(change, 0.3 * memory, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("n", [6, 60])
@pytest.mark.parametrize("damping", [1e-3, 0.0])
@pytest.mark.parametrize("what", ["penalty", "clipped", "linear"])
def test_what_the_samples_do_not_hold_of_the_gradient_counts_all_the_same(what: str, damping: float, n: int) -> None:
    model, (x, _) = network(), data(n)
    y = 2 * torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
    loss = px.extend(nn.HuberLoss() if what == "linear" else nn.MSELoss())
    optimizer = optim.SPRING(model.parameters(), lr=1.0, damping=damping, momentum=0.5, max_step=None)
    memory = torch.zeros(43)
    for _ in range(2 if damping else 1):
        before = theta(model)
        error = torch.func.functional_call(model, before, (x,)).detach() - y
        second = (error.abs() < 1).double() if what == "linear" else torch.full_like(error, 2.0)
        j = torch.cat(list(oracles.jacobians(before, x).values()), 2)
        ggn = torch.einsum("nci,nc,ncj->ij", j, second / (3 * n), j)
        optimizer.zero_grad()
        with optim.emit(optimizer):
            penalty = 0.1 * sum((p**2).sum() for p in model.parameters()) if what == "penalty" else 0.0
            (loss(model(x), y) + penalty).backward()
        if what == "clipped":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        g = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        right = g - 0.5 * ggn @ memory
        damped = ggn + damping * torch.eye(43)
        inverse = torch.linalg.inv(damped) if damping else torch.linalg.pinv(damped, rtol=1e-12)
        memory = 0.5 * memory + inverse @ right
        change = torch.cat([(before[k] - p.detach()).flatten() for k, p in model.named_parameters()])
        torch.testing.assert_close(change, memory, rtol=1e-5, atol=1e-6 * float(memory.abs().max()))


@pytest.mark.parametrize("seed", range(3))
def test_columns_of_a_softmax_that_depend_on_each_other_are_not_told_by_rounding(seed: int) -> None:
    """In float32, where the null direction of a sample's columns is known to 1e-7, and squared to 1e-14."""
    changes = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        x, y = torch.randn(8, 4), torch.randint(3, (8,))
        model, x = px.extend(model.to(dtype)), x.to(dtype)
        optimizer = optim.ENGDW(model.parameters(), lr=1.0, damping=1e-3)
        before = theta(model)
        passed(model, optimizer, (x, y))
        optimizer.step()
        changes.append(torch.cat([(before[k] - p.detach()).flatten() for k, p in model.named_parameters()]).double())
    torch.testing.assert_close(changes[1], changes[0], rtol=1e-4, atol=1e-4 * float(changes[0].abs().max()))


@pytest.mark.parametrize("n", [6, 40])
@pytest.mark.parametrize("damping", [0.0, 1e-17])
def test_without_damping_the_direction_is_that_of_the_pseudo_inverse(n: int, damping: float) -> None:
    """Of a GGN of rank 12, and of one that a softmax leaves singular; a damping below rounding is none."""
    model, (x, y) = network(), data(n)
    optimizer = optim.ENGDW(model.parameters(), lr=1.0, damping=damping)
    before = theta(model)
    j = torch.cat(list(oracles.jacobians(before, x).values()), 2)
    ggn = torch.einsum("nci,ncd,ndj->ij", j, oracles.hessians(before, x), j) / n
    passed(model, optimizer, (x, y))
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    change = torch.cat([(before[k] - p.detach()).flatten() for k, p in model.named_parameters()])
    values, vectors = torch.linalg.eigh(ggn)
    kept = values > 1e-11
    assert kept.sum() < 43 and values[~kept].abs().max() < 1e-15
    torch.testing.assert_close(change, vectors[:, kept] @ (vectors[:, kept].T @ g / values[kept]), rtol=1e-5, atol=1e-6)


def test_the_line_search_takes_the_best_of_the_grid_or_none() -> None:
    model, (x, y) = network(), data()
    optimizer = optim.ENGDW(model.parameters(), lr=4.0, damping=1e-3)
    passed(model, optimizer, (x, y))
    before = theta(model)
    with px.disable():
        optimizer.step(evaluate=lambda: LOSS(model(x), y))
    change = {k: p.detach() - before[k] for k, p in model.named_parameters()}
    taken = float(oracles.loss(theta(model), x, y))
    for factor in (0.5, 2.0, 0.25, 4.0):
        other = {k: before[k] + factor * change[k] for k in before}
        assert taken < float(oracles.loss(other, x, y))
    before = theta(model)
    passed(model, optimizer, (x, y))
    with pytest.warns(optim.SkippedStep, match="no step of the line search makes the loss smaller"):
        optimizer.step(evaluate=lambda: 1.0)
    assert all(torch.equal(p, before[k]) for k, p in model.named_parameters())
    passed(model, optimizer, (x, y))
    with pytest.raises(ZeroDivisionError):
        optimizer.step(evaluate=lambda: 1 / 0)
    assert all(torch.equal(p, before[k]) for k, p in model.named_parameters())


def test_the_step_of_spring_is_bounded() -> None:
    model = network()
    optimizer = optim.SPRING(model.parameters(), lr=10.0, max_step=1e-4)
    before = theta(model)
    passed(model, optimizer, data())
    optimizer.step()
    change = sum(float((p.detach() - before[k]).square().sum()) for k, p in model.named_parameters())
    assert change == pytest.approx(1e-4)


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_a_pass_that_misses_a_parameter_has_rows_of_zeros_for_it(order: tuple[bool, bool]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight, self.shift = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(()))

        def forward(self, x: Tensor, shifted: bool) -> Tensor:
            y = torch.tanh(nn.functional.linear(x, self.weight))
            return y + self.shift if shifted else y

    model, loss = px.extend(Net()), px.extend(nn.MSELoss())
    optimizer = optim.ENGDW(model.parameters(), lr=1.0, damping=0.01)
    w, b = model.weight.detach().clone(), model.shift.detach().clone()
    rows, residuals = [], []
    for k, shifted in enumerate(order):
        x, y = data(3 + k, k)[0], torch.randn(3 + k, 1)
        with optim.emit(optimizer):
            loss(model(x, shifted), y).backward()
        out = torch.tanh(x @ w.T)
        jacobian = torch.cat([(1 - out**2) * x, torch.ones_like(out) * shifted], 1)
        rows.append(jacobian * (2 / len(x)) ** 0.5)
        residuals.append((out + b * shifted - y) * (2 / len(x)) ** 0.5)
    s, r = torch.cat(rows), torch.cat(residuals)
    optimizer.step()
    d = torch.linalg.solve(s.T @ s + 0.01 * torch.eye(5), s.T @ r)[:, 0]
    change = torch.cat([(w - model.weight.detach()).flatten(), (b - model.shift.detach())[None]])
    torch.testing.assert_close(change, d, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("order", [(1, 2), (2, 1), (2, 1, 2)])
@pytest.mark.parametrize("sizes", [(2, 3, 2), (9, 8, 9)])
def test_passes_may_differ_in_how_many_outputs_they_have(order: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """As one equation inside of a domain and two on its boundary, where one parameter more is met."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.outer, self.shift = nn.Linear(2, 4), nn.Linear(4, 2), nn.Parameter(torch.randn(2))

        def forward(self, x: Tensor, outputs: int) -> Tensor:
            y = self.outer(torch.tanh(self.inner(x)))
            return y.sum(1, keepdim=True) if outputs == 1 else y + self.shift

    model, loss = px.extend(Net()), px.extend(nn.MSELoss())
    optimizer = optim.ENGDW(model.parameters(), lr=1.0, damping=0.01)
    before = theta(model)
    ggn, g = torch.zeros(24, 24), torch.zeros(24)
    for outputs, n in zip(order, sizes, strict=False):
        x, y = torch.randn(n, 2), torch.randn(n, outputs)
        with optim.emit(optimizer):
            loss(model(x, outputs), y).backward()
        with px.disable():
            found = torch.func.jacrev(lambda v, x=x, k=outputs: torch.func.functional_call(model, v, (x, k)))(before)
            residuals = (model(x, outputs).detach() - y).flatten()
        j = torch.cat([found[name].reshape(n * outputs, -1) for name in before], 1)
        ggn, g = ggn + 2 / len(j) * j.T @ j, g + 2 / len(j) * j.T @ residuals
    optimizer.step()
    change = torch.cat([(before[k] - p.detach()).flatten() for k, p in model.named_parameters()])
    torch.testing.assert_close(change, torch.linalg.solve(ggn + 0.01 * torch.eye(24), g), rtol=1e-8, atol=1e-11)
