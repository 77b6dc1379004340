"""The benchmark of verdicts: what faults do to data, and what the tables count."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks.faults import later, report
from benchmarks.faults.__main__ import cases
from benchmarks.faults.data import Data
from benchmarks.faults.faults import FAULTS, Setup, constant_inputs, wrong_labels
from benchmarks.faults.problems import PROBLEMS
from benchmarks.faults.run import Case
from benchmarks.faults.score import Row, harmed


def setup(problem: str, data: Data) -> Setup:
    return Setup(PROBLEMS[problem], torch.nn.Identity(), data, 0.1, 0)


def row(problem: str, optimizer: str, last: float, fault: str = "", said: dict[str, int] | None = None) -> Row:
    return Row(Case(problem, optimizer, 0, fault), said or {}, [0.0] * 19 + [last], (0, 0), None)


def test_a_wrong_mask_is_that_of_another_sample():
    masks = torch.eye(50).view(50, 1, 5, 10)
    s = setup("segmenter", Data(masks, masks, masks, masks))
    wrong_labels(0.2)(s)
    assert len(s.guilty) == 10
    assert (s.data.y.flatten(1).sum(1) == 1).all()


def test_a_wrong_answer_of_two_is_the_other_one():
    y = torch.tensor([[0.0], [1.0]]).repeat(25, 1)
    s = setup("claims", Data(y, y, y, y))
    wrong_labels(0.2)(s)
    assert len(s.guilty) == 10


def test_ids_are_all_those_of_the_first_sample():
    x = torch.arange(20000).view(100, 200)
    full, half = (setup("gpt", Data(x, x, x, x)) for _ in range(2))
    constant_inputs(0)(full)
    constant_inputs(0.01)(half)
    for name in ("x", "valid_x"):
        assert (getattr(full.data, name) == x[0]).all()
        assert 0.005 < float((getattr(half.data, name) != x[0]).float().mean()) < 0.015


def test_faults_that_do_no_harm_are_not_run():
    run = {(c.problem, c.severity, c.fault) for c in cases(0, False)}
    for name, problem in PROBLEMS.items():
        for severity in ("full", "half"):
            left_out = set(problem.harmless.get(severity, ()))
            assert left_out <= set(FAULTS)
            fitting = {fault for fault, what in FAULTS.items() if what.fits(problem)}
            assert {f for p, s, f in run if (p, s) == (name, severity)} == fitting - left_out


def test_values_of_next_states_are_those_of_parameters_that_follow():
    model = torch.nn.Linear(6, 4)
    x, y = (
        torch.randn(3, 6),
        torch.cat([torch.tensor([[2.0, 0.5, 0.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]]), torch.randn(3, 6)], 1),
    )
    later.bootstrapped(model, x, y)
    start = model.weight.clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    _, target = later.bootstrapped(model, x, y)
    best = torch.nn.functional.linear(y[:, 3:], start + 0.1, model.bias).amax(1)
    wanted = torch.zeros(3, 8)
    wanted[0, 2], wanted[1, 1], wanted[2, 0] = 0.5 + 0.8 * best[0], -1.0, 0.8 * best[2]
    wanted[0, 6] = wanted[1, 5] = wanted[2, 4] = 1.0
    torch.testing.assert_close(target, wanted)


def test_a_density_of_a_flow_is_a_density():
    torch.manual_seed(0)
    flow = later.Flow().double()
    x = torch.randn(6, dtype=torch.float64)
    slopes = torch.autograd.functional.jacobian(lambda z: flow(z[None])[0, :6], x)
    found = flow(x[None])
    torch.testing.assert_close(found[0, 6], slopes.det().abs().log())
    normal = torch.distributions.MultivariateNormal(torch.zeros(6).double(), torch.eye(6).double())
    wanted = -normal.log_prob(found[:, :6]) - found[:, 6]
    torch.testing.assert_close(later.Surprise()(found, x), wanted)


@pytest.mark.parametrize(("usual", "slightly", "far"), [(2.0, 2.19, 2.21), (-2.0, -1.81, -1.79)])
def test_harm_is_a_tenth_above_the_usual_loss_of_either_sign(usual: float, slightly: float, far: float):
    healthy = [row("counts", "sgd", usual)]
    assert not harmed(row("counts", "sgd", usual, "inputs"), healthy)
    assert not harmed(row("counts", "sgd", slightly, "inputs"), healthy)
    assert harmed(row("counts", "sgd", far, "inputs"), healthy)


def test_held_out_families_have_a_column_where_they_were_run_beside_known_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PROBLEMS, "siren", dataclasses.replace(PROBLEMS["siren"], held_out=True))
    found = {"bad input scaling": 2}
    known = [row("mlp", "sgd", 1.0), row("mlp", "sgd", 1.0, "inputs", found)]
    later = [row("siren", "sgd", 1.0), row("siren", "sgd", 1.0, "inputs")]
    both = report.faults([*known, *later], [known[0], later[0]])
    assert "| 1 / 2 (50 %) | 1 / 1 (100 %) | 0 / 1 (0 %) | 2 |" in both
    assert "Of known families: 1 / 1 (100 %). Of held-out families: 0 / 1 (0 %)." in both
    assert "held-out" not in report.faults(known, known[:1])
