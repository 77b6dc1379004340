"""The learning rate by alpha: against numbers that can be worked out by hand, and after a divergence."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn

import packext as px
from packext import optim
from packext.optim.control.alpha import alpha_of, parabola
from tests.control_cases import Shift, noise, plain

pytestmark = pytest.mark.usefixtures("double")


def test_alpha_of_steps_whose_end_is_known() -> None:
    x = noise(8, 1.0, 0)
    for rate, expected in ((0.5, -0.5), (1.0, 0.0), (2.0, 1.0), (1.6, 0.6), (3.0, 1.0)):
        model = px.extend(Shift([3.0, -4.0]))
        optimizer = torch.optim.SGD(model.parameters(), rate)
        control = optim.Alpha(optimizer, kappa=1e-9)
        for _ in range(2):
            optimizer.zero_grad()
            with optim.emit(control):
                (3 * control.loss(model(x).square().mean(1))).backward()
            assert model.theta.grad is not None
            model.theta.grad /= 3
            optimizer.step()
            control.step()
        assert control.alpha == pytest.approx(expected, abs=1e-9)
    for w1, w2, expected in ((-1, 0.5, 0), (-1, 0, -1), (-1, -1, -1), (1, 1, 1), (1, -1, 1), (0, 1, 1), (0, 0, -1)):
        assert alpha_of(float(w1), float(w2)) == expected


def test_the_parabola_is_the_weighted_least_squares_fit() -> None:
    y, v = [1.0, 0.4, -1.5, 0.6], [0.1, 0.3, 0.02, 0.05]
    rows = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 1, 2]])
    weight = torch.tensor(v).reciprocal().diag()
    expected = torch.linalg.solve(rows.T @ weight @ rows, rows.T @ weight @ torch.tensor(y))
    torch.testing.assert_close(torch.from_numpy(parabola(y, v)), expected)
    assert parabola([2.0, 1.0, -2.0, 0.0], [0.0] * 4) == pytest.approx([2.0, -2.0, 1.0])


@pytest.mark.parametrize("rate", [1e-3, 1.9])
def test_alpha_moves_the_learning_rate_to_one_over_the_curvature(rate: float) -> None:
    """Batches of small noise, so that steps are seen; θ is put back so that there is a way to go."""
    model = px.extend(Shift([3.0, -4.0]))
    optimizer = torch.optim.SGD(model.parameters(), rate)
    control = optim.Alpha(optimizer, kappa=0.3, decay=0.5)
    for seed in range(50):
        for k in range(2):
            optimizer.zero_grad()
            x = noise(64, 0.05, 2 * seed + k)
            with optim.emit(control):
                control.loss(model(x).square().mean(1)).backward()
            if k == 0:
                optimizer.step()
            control.step()
        with torch.no_grad():
            model.theta.copy_(torch.tensor([3.0, -4.0]))
        control._before = None
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0, rel=0.1)


OPTIMIZERS: dict[str, Any] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "Adam": torch.optim.Adam,
    "MSVAG": optim.MSVAG,
}


class Watched:
    """A training of `Shift` under `Alpha`."""

    def __init__(self, name: str, rate: float, first: str = "optimizer") -> None:
        self.model = px.extend(Shift([3.0, -4.0]))
        self.optimizer = OPTIMIZERS.get(name, torch.optim.SGD)(self.model.parameters(), rate)
        self.control, self.first = optim.Alpha(self.optimizer, kappa=1e-9), first

    def step(self, x: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        with optim.emit(self.control, *([self.optimizer] if isinstance(self.optimizer, optim.Optimizer) else [])):
            self.control.loss(self.model(x).square().mean(1)).backward()
        for each in (self.optimizer, self.control) if self.first == "optimizer" else (self.control, self.optimizer):
            each.step()

    def saved(self) -> list[Any]:
        return [each.state_dict() for each in (self.model, self.optimizer, self.control)]

    def trained(self) -> Any:
        """What the optimizer changes."""
        return copy.deepcopy(plain([self.model.state_dict(), self.optimizer.state_dict()["state"]]))


@pytest.mark.parametrize("first", ["optimizer", "control"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_diverged_update_is_taken_back(name: str, first: str) -> None:
    """Parameters and the optimizer's state, whichever of both steps comes first, and in a run that was resumed."""
    run, resumed = Watched(name, 1e-3, first), Watched(name, 1.0, first)
    for seed in range(3):
        run.step(noise(8, 0.01, seed))
    before = run.trained()
    run.optimizer.param_groups[0]["lr"] = 1e3
    run.step(noise(8, 0.01, 3))
    file = io.BytesIO()
    torch.save(run.saved(), file)
    file.seek(0)
    for each, state in zip(
        (resumed.model, resumed.optimizer, resumed.control), torch.load(file, weights_only=True), strict=True
    ):
        each.load_state_dict(state)
    for each in (run, resumed):
        assert each.trained() != before and each.control.rejected == 0
        each.step(noise(8, 0.01, 4))
        assert each.trained() == before and (each.control.rejected, each.control.average) == (1, 0.0)
        assert each.optimizer.param_groups[0]["lr"] == pytest.approx(100, rel=1e-6)
        each.step(noise(8, 0.01, 5))  # on from there; the same place twice says nothing of the rate
        assert each.trained() != before and each.control.rejected == 1
    assert run.trained() == resumed.trained()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_after_a_divergence_of_the_first_step_is_that_before_it(name: str) -> None:
    run, other = Watched(name, 1e3), Watched(name, 1.0)
    before = plain([run.optimizer.state_dict()])
    run.step(noise(8, 0.01, 0))
    run.step(noise(8, 0.01, 1))
    run.optimizer.param_groups[0]["lr"] = 1e3
    assert run.control.rejected == 1 and plain([run.optimizer.state_dict()]) == before
    other.optimizer.load_state_dict(run.optimizer.state_dict())


@pytest.mark.parametrize(("rate", "factor"), [(2.5, 1 / 2.5), (3.0, 1 / 3.0), (50.0, 0.1), (1e200, 0.1)])
def test_the_rate_after_a_divergence_is_that_of_the_parabola_within_bounds(rate: float, factor: float) -> None:
    run = Watched("plain", rate)
    for _ in range(2):  # the loss after the last of these rates is infinite
        run.step(torch.zeros(4, 2))
    assert run.model.theta.tolist() == [3.0, -4.0]
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(rate * factor) and run.control.rejected == 1


def test_a_rise_within_the_noise_is_no_divergence() -> None:
    """Rises of 0.1 and 4 standard deviations of the difference of two means over batches of 8."""
    x = torch.tensor([1.0, -1.0]).repeat(4)[:, None] * torch.tensor([1.0, 1.0]) + 1.0
    for rise, rejected in ((0.1, 0), (2.9, 0), (3.1, 1), (4.0, 1)):
        model = px.extend(nn.Linear(1, 1, bias=False))
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        control = optim.Alpha(optimizer)
        for k in range(2):
            optimizer.zero_grad()
            with optim.emit(control):  # losses 1 ± 1, with variance 8 / 7; the second batch's are higher
                losses = x[:, 0] + k * rise * math.sqrt(2 * (8 / 7) / 8)
                control.loss(losses + model(torch.ones(8, 1))[:, 0] * 1e-9).backward()
            optimizer.step()
            control.step()
        assert control.rejected == rejected


def test_alpha_recovers_from_rates_that_are_far_too_large() -> None:
    run = Watched("plain", 1e4)
    for seed in range(12):
        run.step(noise(64, 0.05, seed))
    assert run.model.theta.norm() < 0.1 and run.optimizer.param_groups[0]["lr"] <= 1.0
