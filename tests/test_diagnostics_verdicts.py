"""Rules and verdicts: when a finding becomes one, when it is withdrawn, and where it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import packext as px
from packext.diagnostics import Cockpit, Finding, Loss, Rule, Run, Verdict
from packext.diagnostics._verdict import Judge
from tests.helpers import batch, mlp


class High(Rule):
    failure, advice, reads = "high", "Go down.", ("Level",)
    hold, release = 2, 3

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        where = tuple(name.split("/")[1] for name, value in values.items() if "/" in name and value > 1)
        return Finding(f"It is {values['Level']:g}.", where) if values["Level"] > 1 else None


def hear(levels: list[Any]) -> dict[int, list[Verdict]]:
    judge, said = Judge([High()]), {}
    for step, level in enumerate(levels):
        values = level if isinstance(level, dict) else {"Level": level}
        if verdicts := judge.hear(step, {k: float(v) for k, v in values.items() if v is not None}):
            said[step] = verdicts
    return said


def test_a_verdict_needs_findings_in_a_row() -> None:
    assert hear([2, 0, 2, 0, 2, 0]) == {}
    assert hear([0, 2, 3, 4]) == {2: [Verdict("high", 2, (), "It is 3.", "Go down.")]}


def test_a_verdict_stands_until_findings_fail_to_come() -> None:
    assert list(hear([2, 2, 0, 0, 2, 0, 0, 2, 0, 0])) == [1]
    said = hear([2, 2, 0, 0, 5, 0, 0, 0, 2, 0, 2, 2])
    assert said[7] == [Verdict("high", 1, (), "It is 5.", "Go down.", until=7)]
    assert said[11] == [Verdict("high", 11, (), "It is 2.", "Go down.")]
    assert list(said) == [1, 7, 11]


def test_what_is_absent_speaks_neither_for_nor_against() -> None:
    assert list(hear([2, None, 2, 0, 0, {"Other": 1.0}, {"Other": 1.0}, 2])) == [2]
    assert list(hear([{"Other": 9.0}] * 5)) == []


def test_a_step_is_heard_whole_though_the_last_one_is_completed_meanwhile() -> None:
    class Seen(Rule):
        failure, advice, reads = "seen", "Look.", ("Loss", "Alpha", "mine")
        pages: ClassVar[list[tuple[int, list[str]]]] = []

        def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
            self.pages.append((step, sorted(values)))

    judge = Judge([Seen()])
    for step, names in ((0, ["Loss"]), (1, ["mine"]), (0, ["Alpha"]), (1, ["Loss"]), (2, ["Loss"]), (1, ["Alpha"])):
        judge.hear(step, dict.fromkeys(names, 1.0))
    assert Seen.pages[2:] == [
        (0, ["Alpha", "Loss"]), (1, ["Loss", "mine"]), (2, ["Loss"]), (1, ["Alpha", "Loss", "mine"]),
    ]  # fmt: skip


def test_other_places_are_said() -> None:
    a, b = {"Level": 2, "Level/a": 2, "Level/b": 0}, {"Level": 2, "Level/a": 0, "Level/b": 2}
    said = hear([a, a, a, b, b])
    assert [(step, v.step, v.where) for step, [v] in said.items()] == [(1, 1, ("a",)), (3, 1, ("b",))]


class Growing(Rule):
    failure, advice, reads, hold = "the loss is there", "Train less.", ("Loss",), 2

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        return Finding(f"Loss {values['Loss']:.3g}.", ("0.weight",))


def test_the_monitor_says_verdicts_and_the_record_keeps_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, loss, (x, y) = px.extend(mlp()), px.extend(nn.CrossEntropyLoss()), batch()

    def run(steps: int) -> Cockpit:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        monitor = Cockpit(model, optimizer, None, 1, [Run(tmp_path)], [Loss()], rules=[Growing()])
        for _ in range(steps):
            with monitor.step():
                loss(model(x.float()), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        return monitor

    monitor = run(4)
    [verdict] = monitor.verdicts
    assert (verdict.name, verdict.step, verdict.where, verdict.until) == ("the loss is there", 1, ("0.weight",), None)
    [kept] = Run.open(tmp_path).verdicts()
    assert kept == Verdict("the loss is there", 1, ("0.weight",), kept.evidence, "Train less.")
    assert str(kept).startswith("the loss is there (0.weight), step 1: Loss ")
    run(3)
    first, second = Run.open(tmp_path).verdicts()
    assert (first.step, first.until, second.step, second.until) == (1, 4, 5, None)
    assert Run.open(tmp_path).steps == [*range(7)]
