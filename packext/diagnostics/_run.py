"""The record of a run on disk: append-only, readable at any time, also after the process was killed."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

import packext as px
from packext.diagnostics._arrays import Arrays, lacking
from packext.diagnostics._verdict import Verdict

#: Of the format. A reader opens its own version and all before it.
VERSION = 2
RECORD, ARRAYS, LAYERS = "record.jsonl", "arrays.bin", "layers.bin"


class Replaced(px.PackextError):
    """Another record has taken the place of the one that was being read."""


class Run:
    """A folder with the record of one training run; a sink of `Cockpit`.

    `record.jsonl` has a header and then a line for each step that was tracked: numbers by name, why others are absent,
    and where its arrays and the numbers of single layers are; a line for each verdict; and lines with names, so that
    those of layers are written once. `arrays.bin` has arrays in numpy's own format, those of layers with one shape as
    one; `layers.bin` rows of float64, little-endian. All files are only ever appended to, a line after what it refers
    to: what a killed process leaves opens, without the step that it was writing. A step may have several lines.

    Example:
        >>> run = Run.open("runs/first")
        >>> run.column("Loss"), run.arrays("GradHist1d"), run.frame()
    """

    def __init__(self, path: str | Path) -> None:
        """Take the folder; `begin` creates it, or continues the record in it, and `refresh` reads that."""
        self.path = Path(path)
        self.header: dict[str, Any] = {}
        self.end = self._count = self._file = 0
        self._said: list[Verdict] = []
        self._steps: dict[int, None] = {}
        self._columns: dict[str, tuple[array[int], array[float]]] = {}  # steps and numbers, in the order of lines
        self._groups: list[list[str]] = []
        self._rows = (array("q"), array("q"), array("q"))  # step, group, place in `layers.bin`
        self._arrays: dict[str, tuple[array[int], array[int]]] = {}  # steps and places
        self._stacks: dict[int, tuple[array[int], array[int]]] = {}  # the same, by group
        self._absent: list[tuple[int, str, list[str] | list[int], int]] = []

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
        if (run.path / RECORD).exists():
            run.refresh()
        if not run.header:
            raise FileNotFoundError(f"{run.path} has no record of a run ({RECORD}).")
        return run

    def refresh(self, most: int | None = None) -> bool:
        """Read the lines that were appended since the last look.

        Args:
            most: of how many bytes, about; all by default.

        Returns:
            Whether there is more.

        Raises:
            PackextError: if a line is damaged.
            Replaced: if another record has taken its place.
        """
        record = self.path / RECORD
        with record.open("rb") as file:
            stat = record.stat()
            if self.end and (stat.st_size < self.end or stat.st_ino != self._file):
                raise Replaced(f"{record} is another file than before: open it anew.")
            self._file = stat.st_ino
            file.seek(self.end)
            data = file.read() if most is None else file.read(most) + file.readline()
        whole = data.rfind(b"\n") + 1  # what follows is a line that was not finished
        for line in data[:whole].splitlines(keepends=True):
            try:
                (self._take if self.header else self._begun)(json.loads(line))
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
                remedy = "delete the line, or restore the file" if self.header else "restore the file"
                raise px.PackextError(f"{record}, line {self._count + 1}, is damaged: {remedy}.") from None
            self.end, self._count = self.end + len(line), self._count + 1
        return most is not None and len(data) >= most

    def _begun(self, header: Any) -> None:
        if header.get("format") != "packext run":
            raise px.PackextError(
                f"{self.path / RECORD} is not the record of a run: its first line says no such thing."
            )
        if header["version"] > VERSION:
            raise px.PackextError(
                f"{self.path / RECORD} has version {header['version']} of the format, written by packext "
                f"{header['packext']}; this is packext {px.__version__}, which reads up to {VERSION}: upgrade it."
            )
        self.header = header

    def _take(self, entry: Any) -> None:
        """Remember what a line says: all of it, or nothing if it is damaged."""
        if "verdict" in entry:
            self._said.append(Verdict(**entry["verdict"] | {"where": tuple(entry["verdict"]["where"])}))
            return
        if "group" in entry:
            if entry.get("number", len(self._groups)) != len(self._groups):
                raise ValueError  # the line of another one was deleted: numbers would go by the wrong names
            self._groups.append(list(entry["group"]))
            return
        step, row = entry["step"], entry.get("layers", [])
        values = {name: float(value) for name, value in entry["values"].items()}
        arrays = entry.get("arrays", {})
        stacks = {int(group): place for group, place in entry.get("stacks", {}).items()}
        absences = [(step, why, places, group) for group, why, places in entry.get("absences", ())]
        groups = [*row[:1], *stacks, *(group for *_, group in absences)]
        array("q", [step, *row, *arrays.values(), *stacks.values()])  # which takes whole numbers alone
        if len(row) not in (0, 2) or max(groups, default=-1) >= len(self._groups):
            raise ValueError
        self._steps[step] = None
        for name, value in values.items():
            _note(self._columns, name, "d", step, value)
        for column, number in zip(self._rows, (step, *row) if row else (), strict=False):
            column.append(number)
        for name, place in arrays.items():
            _note(self._arrays, name, "q", step, place)
        for group, place in stacks.items():
            _note(self._stacks, group, "q", step, place)
        self._absent += [(step, why, [name], -1) for name, why in entry.get("absent", {}).items()]
        self._absent += absences

    # -- writing -----------------------------------------------------------------------------------
    def begin(self, names: list[str]) -> int:
        """Start or continue the record.

        Args:
            names: of the instruments.

        Returns:
            The number of the next step: one after the last that is recorded.

        Raises:
            PackextError: if the record has an older version of the format, is damaged, or another of its files ends
                before what it refers to.
        """
        if (self.path / RECORD).exists():
            self.refresh()
        if self.header and self.header["version"] < VERSION:
            raise px.PackextError(
                f"{self.path / RECORD} has version {self.header['version']} of the format, which this packext reads "
                "but does not continue: record into another folder."
            )
        self._complete()
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / RECORD).exists():
            with (self.path / RECORD).open("rb+") as file:
                file.truncate(self.end)
        if not self.header:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self.header = {"format": "packext run", "version": VERSION, "packext": px.__version__, "began": now}
            self._append(self.header | {"instruments": names})
        following = max(self._steps, default=-1) + 1
        for verdict in self.verdicts():
            if verdict.until is None:  # rules begin anew: what holds still will be said again
                self.say(replace(verdict, until=following))
        return following

    def _complete(self) -> None:
        """Raise if a file ends before what the record refers to, whose place the next step would take."""
        if self._rows[0]:
            self._held(np.array(self._rows[1]), np.array(self._rows[2]))
        columns = (*self._arrays.values(), *self._stacks.values())
        last = max((place for _, places in columns for place in places), default=None)
        if last is not None:
            Arrays(self.path / ARRAYS, {0: (last, None)})[0]

    def write(self, step: int, values: Mapping[str, float | np.ndarray], absent: Mapping[str, str]) -> None:
        """Append what is known of a step.

        Args:
            step: its number.
            values: numbers and arrays by name.
            absent: why others are missing.
        """
        numbers = {k: float(v) for k, v in values.items() if not isinstance(v, np.ndarray)}
        layers = {k: numbers.pop(k) for k in list(numbers) if "/" in k}
        missing: dict[str, list[str]] = {}
        for name, why in absent.items():
            if "/" in name:
                missing.setdefault(why, []).append(name)
        entry: dict[str, Any] = {"step": step, "values": {k: _written(v) for k, v in numbers.items()}}
        if layers or missing:
            group = self._covering([*layers, *(name for names in missing.values() for name in names)])
            places = {name: k for k, name in enumerate(self._groups[group])}
            row = np.full(len(places), math.nan, "<f8")
            row[[places[name] for name in layers]] = list(layers.values())
            with (self.path / LAYERS).open("ab") as file:
                file.write(bytes(-file.tell() % 8))  # a row that a killed process left unfinished is made whole
                entry["layers"] = [group, file.tell() // 8]
                file.write(row.tobytes())
            if missing:
                entry["absences"] = [[group, why, [places[name] for name in names]] for why, names in missing.items()]
        self._write_arrays(entry, {k: v for k, v in values.items() if isinstance(v, np.ndarray)})
        if whole := {name: why for name, why in absent.items() if "/" not in name}:
            entry["absent"] = whole
        self._append(entry)

    def _write_arrays(self, entry: dict[str, Any], given: dict[str, np.ndarray]) -> None:
        alike: dict[Any, list[str]] = {}
        for name, value in given.items():
            alike.setdefault((value.dtype.str, value.shape) if "/" in name else name, []).append(name)
        groups = {key: self._group(names) for key, names in alike.items() if not isinstance(key, str)}
        if not given:
            return
        with (self.path / ARRAYS).open("ab") as file:
            for key, names in alike.items():
                kind, of = ("arrays", key) if isinstance(key, str) else ("stacks", str(groups[key]))
                entry.setdefault(kind, {})[of] = file.tell()
                value = given[key] if isinstance(key, str) else np.stack([given[name] for name in names])
                np.lib.format.write_array(file, value, allow_pickle=False)

    def _group(self, names: list[str]) -> int:
        """The number of a group of names, which is written down if it is new."""
        if names not in self._groups:
            self._append({"group": names, "number": len(self._groups)})
        return self._groups.index(names)

    def _covering(self, names: list[str]) -> int:
        """The group with all names of layers that were seen so far."""
        known = self._groups[self._rows[1][-1]] if self._rows[1] else []
        return self._group(list(dict.fromkeys([*known, *names])))

    def say(self, verdict: Verdict) -> None:
        """Append a verdict.

        Args:
            verdict: new, changed or withdrawn.
        """
        self._append({"verdict": asdict(verdict)})

    def _append(self, entry: dict[str, Any]) -> None:
        record, line = self.path / RECORD, json.dumps(entry, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            with record.open("ab") as file:
                if file.tell() != self.end:
                    raise px.PackextError(
                        f"{record} is not as this Run has left it: it was replaced, or another monitor writes to it. "
                        "Give each monitor a folder of its own."
                    )
                file.write(line)
        except OSError:  # no space: half a line would be taken for the start of the next
            with suppress(OSError):
                os.truncate(record, self.end)
            raise
        self.end, self._count, self._file = self.end + len(line), self._count + 1, record.stat().st_ino
        if "format" not in entry:
            self._take(entry)

    # -- reading -----------------------------------------------------------------------------------
    @property
    def steps(self) -> list[int]:
        """Numbers of the steps in the record, ascending."""
        return sorted(self._steps)

    @property
    def names(self) -> list[str]:
        """Of everything that is a number in some step."""
        return [*self._columns, *(self._groups[self._rows[1][-1]] if self._rows[1] else [])]

    @property
    def array_names(self) -> list[str]:
        """Of everything that is an array in some step."""
        return [*self._arrays, *dict.fromkeys(name for k in self._stacks for name in self._groups[k])]

    def column(self, name: str) -> np.ndarray:
        """Numbers of one name over the steps.

        Args:
            name: as in `names`.

        Returns:
            `[steps]`, float64, at all of `steps`; NaN where there is none (`absent` says why).

        Raises:
            KeyError: for another name.
        """
        if name not in self._columns and name not in self.names:
            raise KeyError(f"{name!r} is no column of the record: {', '.join(self.names) or 'it is empty'}")
        if name in self._columns:
            at, numbers = self.numbers(name)
        else:
            at, matrix = self._gathered([name])
            known = ~np.isnan(matrix[:, 0])  # a later line of a step need not have it
            at, numbers = at[known], matrix[known, 0]
        steps = np.array(self.steps)
        found = np.full(len(steps), math.nan)
        found[np.searchsorted(steps, at)] = numbers
        return found

    def numbers(self, name: str, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """What was written under the name of a number of the whole model.

        Args:
            name: without a layer.
            first: numbers to leave out, which were read before.

        Returns:
            Steps `[numbers]` in the order of writing, and the numbers `[numbers]`; none for a name that is unknown.
        """
        steps, numbers = self._columns.get(name, (array("q"), array("d")))
        return np.array(steps[first:]), np.array(numbers[first:])

    def layers(self, instrument: str, first: int = 0) -> tuple[np.ndarray, list[str], np.ndarray]:
        """What one instrument said of single layers.

        Args:
            instrument: its name.
            first: rows to leave out, which were read before.

        Returns:
            Steps `[rows]` in the order of writing, names, and numbers `[rows, names]`; NaN where there is none.

        Raises:
            KeyError: for one that has said nothing of a layer.
        """
        of = {name: name.split("/")[0] for name in self.names if "/" in name}
        names = [name for name, its in of.items() if its == instrument]
        if not names:
            known = ", ".join(dict.fromkeys(of.values())) or "none"
            raise KeyError(f"{instrument!r} has no numbers of layers in the record; these have: {known}")
        if self.header.get("version") == 1:  # which wrote them among all numbers
            steps = np.array(self.steps)[first:]
            return steps, names, np.array([self.column(n)[first:] for n in names]).T.reshape(len(steps), len(names))
        steps, matrix = self._gathered(names, first)
        return steps, names, matrix

    def _gathered(self, names: list[str], first: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Steps `[rows]` and numbers of layers `[rows, names]`, from a row on."""
        steps, groups, places = (np.array(column[first:]) for column in self._rows)
        found = np.full((len(steps), len(names)), math.nan)
        if not found.size:
            return steps, found
        rows = np.memmap(self.path / LAYERS, "<f8", "r", shape=(self._held(groups, places),))
        for group in np.unique(groups).tolist():
            at = {name: k for k, name in enumerate(self._groups[group])}
            columns = [k for k, name in enumerate(names) if name in at]
            here = np.flatnonzero(groups == group)
            offsets = np.array([at[names[k]] for k in columns], dtype=np.int64)
            found[here[:, None], columns] = rows[places[here][:, None] + offsets]
        return steps, found

    def _held(self, groups: np.ndarray, places: np.ndarray) -> int:
        """How many numbers `layers.bin` has, if these rows are among them."""
        layers = self.path / LAYERS
        written = layers.stat().st_size // 8 if layers.exists() else 0  # without a number that was not finished
        if (places + np.array([len(group) for group in self._groups])[groups]).max() > written:
            raise lacking(layers)
        return written

    def arrays(self, name: str) -> Arrays:
        """Arrays of one name.

        Args:
            name: as in `array_names`.

        Returns:
            The arrays by step, each read from disk when it is asked for.

        Raises:
            KeyError: for another name.
        """
        if name not in self.array_names:
            raise KeyError(f"{name!r} is no array of the record: {', '.join(self.array_names) or 'it has none'}")
        places: dict[int, tuple[int, int | None]] = {}
        if name in self._arrays:
            places.update((step, (place, None)) for step, place in zip(*self._arrays[name], strict=True))
        for group, columns in self._stacks.items():
            if name in self._groups[group]:
                k = self._groups[group].index(name)
                places.update((step, (place, k)) for step, place in zip(*columns, strict=True))
        return Arrays(self.path / ARRAYS, places)

    def absent(self) -> list[tuple[int, str, str]]:
        """Step, name and reason of everything that was absent."""
        return [(step, name, why) for step, why, names in self.reasons() for name in names]

    def reasons(self, first: int = 0) -> Iterator[tuple[int, str, list[str]]]:
        """Reasons why something was absent.

        Args:
            first: reasons to leave out, which were read before.

        Yields:
            Step, reason, and names of what was absent for it.
        """
        for step, why, names, group in self._absent[first:]:
            yield step, why, [name if isinstance(name, str) else self._groups[group][name] for name in names]

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
        return f"Run({str(self.path)!r}, {len(self._steps)} steps)"


def _note(columns: dict[Any, Any], key: Any, kind: str, step: int, value: Any) -> None:
    if key not in columns:
        columns[key] = array("q"), array(kind)
    steps, values = columns[key]
    steps.append(step)
    values.append(value)


def _written(value: float) -> float | str:
    """JSON has no NaN and no infinity: they become words that `float` reads."""
    return value if math.isfinite(value) else str(value)
