"""The benchmark of verdicts: what faults do to data, and what the tables count."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks.faults import report
from benchmarks.faults.data import Data
from benchmarks.faults.faults import Setup, constant_inputs, wrong_labels
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


@pytest.mark.parametrize(("usual", "slightly", "far"), [(2.0, 2.19, 2.21), (-2.0, -1.81, -1.79)])
def test_harm_is_a_tenth_above_the_usual_loss_of_either_sign(usual: float, slightly: float, far: float):
    healthy = [row("counts", "sgd", usual)]
    assert not harmed(row("counts", "sgd", usual, "inputs"), healthy)
    assert not harmed(row("counts", "sgd", slightly, "inputs"), healthy)
    assert harmed(row("counts", "sgd", far, "inputs"), healthy)


def test_held_out_families_have_a_column_where_they_were_run_beside_known_ones():
    found = {"bad input scaling": 2}
    known = [row("mlp", "sgd", 1.0), row("mlp", "sgd", 1.0, "inputs", found)]
    unseen = [row("counts", "sgd", 1.0), row("counts", "sgd", 1.0, "inputs")]
    both = report.faults([*known, *unseen], [known[0], unseen[0]])
    assert "| 1 / 2 (50 %) | 1 / 1 (100 %) | 0 / 1 (0 %) | 2 |" in both
    assert "Of known families: 1 / 1 (100 %). Of held-out families: 0 / 1 (0 %)." in both
    assert "held-out" not in report.faults(known, known[:1])
