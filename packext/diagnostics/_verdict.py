"""What a verdict is, what a rule is that comes to one, and who hears the rules."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class Finding:
    """What a rule sees in one step.

    Attributes:
        evidence: a sentence with the numbers that speak for it.
        where: names of parameters or modules, or of samples; none where it is the whole.
    """

    evidence: str
    where: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a run, where, since when, on what evidence, and what to try.

    Attributes:
        name: of the failure, such as "learning rate too high".
        step: at which it was first said.
        where: names of parameters or modules, or of samples; none where it is the whole.
        evidence: a sentence with the numbers that spoke for it last.
        advice: what to try.
        until: the step at which it was withdrawn; None while it holds.
    """

    name: str
    step: int
    where: tuple[str, ...]
    evidence: str
    advice: str
    until: int | None = None

    def __str__(self) -> str:
        where = f" ({', '.join(self.where[:3])}{', ...' if len(self.where) > 3 else ''})" if self.where else ""
        when = f"step {self.step}" if self.until is None else f"steps {self.step} to {self.until}"
        return f"{self.name}{where}, {when}: {self.evidence} {self.advice}"


class Said(dict[str, Any]):
    """All that was said of a step so far, by the names in the record."""

    @functools.cached_property
    def by_layer(self) -> dict[str, dict[str, Any]]:
        """What instruments say of each parameter, by their names and its own; what was said stays as it is."""
        found: dict[str, dict[str, Any]] = {}
        for key, value in self.items():
            name, slash, layer = key.partition("/")
            if slash:
                found.setdefault(name, {})[layer] = value
        return found


class Rule:
    """Base of all rules: names one failure from what instruments say.

    A rule is asked at each step at which one of the names that it reads has a new value. Its finding becomes a verdict
    when it has come `hold` times in a row, and the verdict is withdrawn when it has failed to come `release` times in a
    row.
    """

    #: Of the failure.
    failure: ClassVar[str]
    #: What to try.
    advice: ClassVar[str]
    #: Names of the instruments (and of logged numbers) that it reads; it is asked when one of them has said something.
    reads: ClassVar[tuple[str, ...]]
    #: How many times in a row it must find the failure.
    hold: ClassVar[int] = 3
    #: After how many times in a row without a finding its verdict is withdrawn.
    release: ClassVar[int] = 10

    def look(self, step: int, values: Mapping[str, float | np.ndarray]) -> Finding | None:
        """What speaks for the failure in one step.

        Args:
            step: its number.
            values: all that was said of this step so far, by the names in the record; what is absent is missing.

        Returns:
            The finding, or None.
        """
        raise NotImplementedError


class Judge:
    """Hears rules, step by step, and says verdicts."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        """Take the rules, which keep state of their own and are heard by one judge."""
        self.rules = list(rules)
        self.standing: dict[Rule, Verdict] = {}
        # What was said of a step comes in parts, of which the last may come when the next step has begun.
        self._pages: dict[int, Said] = {}
        self._run: dict[Rule, int] = {}  # findings in a row; while its verdict stands, misses in a row

    def hear(self, step: int, values: Mapping[str, float | np.ndarray]) -> list[Verdict]:
        """Let the rules look at one step.

        Args:
            step: its number.
            values: by the names in the record; a step may come several times, with other names.

        Returns:
            Verdicts that are new, that hold of other places now, or that are withdrawn.
        """
        said = []
        heard = {name.split("/")[0].split(".")[0] for name in values} if self.rules else set()
        page = self._pages[step] = Said({**self._pages.pop(step, {}), **values})
        if len(self._pages) > 2:
            del self._pages[min(self._pages)]
        for rule in self.rules:
            if heard.isdisjoint(rule.reads):
                continue
            finding, verdict = rule.look(step, page), self.standing.get(rule)
            if verdict is None:
                self._run[rule] = self._run.get(rule, 0) + 1 if finding else 0
                if finding and self._run[rule] >= rule.hold:
                    self._run[rule] = 0
                    self.standing[rule] = Verdict(rule.failure, step, finding.where, finding.evidence, rule.advice)
                    said.append(self.standing[rule])
            elif finding:
                self._run[rule] = 0
                self.standing[rule] = replace(verdict, where=finding.where, evidence=finding.evidence)
                if set(finding.where) != set(verdict.where):
                    said.append(self.standing[rule])
            else:
                self._run[rule] += 1
                if self._run[rule] >= rule.release:
                    self._run[rule] = 0
                    said.append(replace(self.standing.pop(rule), until=step))
        return said
