"""The record of a run on disk: append-only, readable at any time, also after the process was killed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

import packext as px
from packext.diagnostics._verdict import Verdict

#: Of the format. A reader opens its own version and all before it.
VERSION = 1
RECORD, ARRAYS = "record.jsonl", "arrays.bin"


class Run:
    """A folder with the record of one training run; a sink of `Cockpit`.

    `record.jsonl` has a header and then a line for each step that was tracked: numbers by name, why others are absent,
    and where in `arrays.bin` its arrays are, each in numpy's own format; and a line for each verdict. Lines are only
    ever appended, each after the arrays that it names: what a killed process leaves opens, without the step that it was
    writing. A step may have several lines.

    Example:
        >>> run = Run.open("runs/first")
        >>> run.column("Loss"), run.arrays("GradHist1d"), run.frame()
    """

    def __init__(self, path: str | Path) -> None:
        """Record into a folder, which is created; a record in it is continued, with its next step."""
        self.path = Path(path)
        self._lines: list[dict[str, Any]] = []
        self._said: list[Verdict] = []
        self.header: dict[str, Any] = {}
        self._end = 0
        if (self.path / RECORD).exists():
            self._read()

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Read a record; one that is being written is read as far as it goes.

        Args:
            path: the folder.

        Returns:
            The run, as it is now.

        Raises:
            FileNotFoundError: if there is no record.
        """
        run = cls(path)
        if not run.header:
            raise FileNotFoundError(f"{run.path} has no record of a run ({RECORD}).")
        return run

    def _read(self) -> None:
        data = (self.path / RECORD).read_bytes()
        self._end = data.rfind(b"\n") + 1  # what follows is a line that was not finished
        lines = data[: self._end].splitlines()
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
            except ValueError:
                raise px.PackextError(
                    f"{self.path / RECORD}, line {number + 1}, is damaged: delete the line, or restore the file."
                ) from None
            if "verdict" in entry:
                self._said.append(Verdict(**entry["verdict"] | {"where": tuple(entry["verdict"]["where"])}))
            elif number:
                self._lines.append(entry)
            else:
                self.header = entry
        if lines and self.header.get("format") != "packext run":
            raise px.PackextError(
                f"{self.path / RECORD} is not the record of a run: its first line says no such thing."
            )
        if lines and self.header["version"] > VERSION:
            raise px.PackextError(
                f"{self.path / RECORD} has version {self.header['version']} of the format, written by packext "
                f"{self.header['packext']}; this is packext {px.__version__}, which reads up to {VERSION}: upgrade it."
            )

    # -- writing -----------------------------------------------------------------------------------
    def begin(self, names: list[str]) -> int:
        """Start or continue the record.

        Args:
            names: of the instruments.

        Returns:
            The number of the next step: one after the last that is recorded.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / RECORD).exists():
            with (self.path / RECORD).open("rb+") as file:
                file.truncate(self._end)
        if not self.header:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self.header = {"format": "packext run", "version": VERSION, "packext": px.__version__, "began": now}
            self._append(self.header | {"instruments": names})
        following = max(self.steps, default=-1) + 1
        for verdict in self.verdicts():
            if verdict.until is None:  # rules begin anew: what holds still will be said again
                self.say(replace(verdict, until=following))
        return following

    def write(self, step: int, values: Mapping[str, float | np.ndarray], absent: Mapping[str, str]) -> None:
        """Append what is known of a step.

        Args:
            step: its number.
            values: numbers and arrays by name.
            absent: why others are missing.
        """
        numbers = {k: _written(v) for k, v in values.items() if not isinstance(v, np.ndarray)}
        given = {k: v for k, v in values.items() if isinstance(v, np.ndarray)}
        arrays = {}
        if given:
            with (self.path / ARRAYS).open("ab") as file:
                for name, array in given.items():
                    arrays[name] = file.tell()
                    np.lib.format.write_array(file, array, allow_pickle=False)
        entry: dict[str, Any] = {"step": step, "values": numbers}
        entry |= {"arrays": arrays} if arrays else {}
        entry |= {"absent": dict(absent)} if absent else {}
        self._lines.append(entry)
        self._append(entry)

    def say(self, verdict: Verdict) -> None:
        """Append a verdict.

        Args:
            verdict: new, changed or withdrawn.
        """
        self._said.append(verdict)
        self._append({"verdict": asdict(verdict)})

    def _append(self, entry: dict[str, Any]) -> None:
        with (self.path / RECORD).open("ab") as file:
            file.write(json.dumps(entry, allow_nan=False, separators=(",", ":")).encode() + b"\n")

    # -- reading -----------------------------------------------------------------------------------
    @property
    def steps(self) -> list[int]:
        """Numbers of the steps in the record, ascending."""
        return sorted({line["step"] for line in self._lines})

    @property
    def names(self) -> list[str]:
        """Of everything that is a number in some step."""
        return list(dict.fromkeys(name for line in self._lines for name in line["values"]))

    @property
    def array_names(self) -> list[str]:
        """Of everything that is an array in some step."""
        return list(dict.fromkeys(name for line in self._lines for name in line.get("arrays", {})))

    def column(self, name: str) -> np.ndarray:
        """Values of one name at all of `steps`, float64; NaN where there is none (`absent` says why)."""
        if name not in self.names:
            raise KeyError(f"{name!r} is no column of the record: {', '.join(self.names) or 'it is empty'}")
        found = {line["step"]: float(line["values"][name]) for line in self._lines if name in line["values"]}
        return np.array([found.get(step, math.nan) for step in self.steps])

    def arrays(self, name: str) -> dict[int, np.ndarray]:
        """Arrays of one name, by step."""
        if name not in self.array_names:
            raise KeyError(f"{name!r} is no array of the record: {', '.join(self.array_names) or 'it has none'}")
        found = {}
        with (self.path / ARRAYS).open("rb") as file:
            for line in self._lines:
                if name in line.get("arrays", {}):
                    file.seek(line["arrays"][name])
                    found[line["step"]] = np.load(file, allow_pickle=False)
        return found

    def absent(self) -> list[tuple[int, str, str]]:
        """Step, name and reason of everything that was absent."""
        return [(line["step"], k, why) for line in self._lines for k, why in line.get("absent", {}).items()]

    def verdicts(self) -> list[Verdict]:
        """Verdicts by the step at which they were first said, each as it was said last."""
        last = {(verdict.name, verdict.step): verdict for verdict in self._said}
        return sorted(last.values(), key=lambda verdict: verdict.step)

    def frame(self) -> Any:
        """The numbers as a pandas frame.

        Returns:
            A row for each step, by its number, and a column for each name; NaN where there is no number.

        Raises:
            ImportError: if pandas is not installed.
        """
        try:
            import pandas  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ImportError("Run.frame() needs pandas: pip install 'packext[pandas]'.") from None
        index = pandas.Index(self.steps, name="step")
        return pandas.DataFrame({name: self.column(name) for name in self.names}, index=index)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {len(self.steps)} steps)"


def _written(value: float) -> float | str:
    """JSON has no NaN and no infinity: they become words that `float` reads."""
    return value if math.isfinite(value) else str(value)
