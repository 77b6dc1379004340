"""What the page shows of a run, kept up to date while its record grows."""

from __future__ import annotations

import base64
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from packext.diagnostics._run import RECORD, Run
from packext.diagnostics.view.bins import Bins
from packext.diagnostics.view.panels import HEATS, HIDDEN, PANELS, panels_of

#: The largest numbers of bins of a line, of columns of a heat map, of stops of a slider, of reasons.
LINE, MAP, STOPS, REASONS = 1000, 250, 400, 40
#: Edges of the distribution of alpha; what lies beyond is in the outermost bins.
ALPHA = np.linspace(-2, 2, 41)
#: What has a slider over the steps, by name in the record: the kind of its panel.
HISTOGRAMS = {name: p.kind for p in PANELS if p.kind in ("bars", "image", "samples") for name in p.names}


class Content:
    """A run as the page shows it, in bounded space and time.

    Attributes:
        run: the record.
        revision: counts the looks that have found something new.
        lines: numbers of the whole model, by name.
        odd: of which names some are not finite: in how many steps, and the first of them.
        maps: numbers of the layers, by instrument, and the names of the layers.
    """

    def __init__(self, path: str | Path) -> None:
        """Take the folder of a record, which `update` reads."""
        self.run = Run(path)
        self.revision = 0
        self.lines: dict[str, Bins] = {}
        self.odd: dict[str, tuple[int, int]] = {}
        self.maps: dict[str, tuple[Bins, list[str]]] = {name: (Bins(MAP), []) for name in HEATS}
        self._read: dict[str, int] = {}
        self._end = -1
        self._rows = self._gaps = 0
        self._absent: dict[tuple[str, str], dict[str, Any]] = {}

    def update(self, most: int | None = None) -> bool:
        """Read what is new in the record.

        Args:
            most: of how many bytes of it; all by default.

        Returns:
            Whether there is more.
        """
        more = self.run.refresh(most)
        if self.run.end == self._end:
            return more
        self.revision += 1
        for name in self.run.names:
            if "/" in name or name in HIDDEN:
                continue
            steps, numbers = self.run.numbers(name, self._read.get(name, 0))
            self._read[name] = self._read.get(name, 0) + len(steps)
            self.lines.setdefault(name, Bins(LINE)).add(steps, _finite(numbers[:, None]), self.revision)
            odd = steps[~np.isfinite(numbers)]
            if len(odd):
                before, first = self.odd.get(name, (0, int(odd.min())))
                self.odd[name] = before + len(odd), min(first, int(odd.min()))
        known = {name.split("/")[0] for name in self.run.names if "/" in name}
        rows = self._rows
        for instrument in self.maps.keys() & known:
            steps, names, matrix = self.run.layers(instrument, rows)
            self.maps[instrument][0].add(steps, _finite(matrix), self.revision)
            self.maps[instrument] = self.maps[instrument][0], names
            self._rows = rows + len(steps)
        for step, why, names in self.run.reasons(self._gaps):
            self._gaps += 1
            for name in names:
                instrument, _, layer = name.partition("/")
                row = self._absent.get((instrument, why))
                if row is None:
                    row = {"count": 0, "first": step, "last": step, "layers": {}, "at": -1}
                    self._absent[instrument, why] = row
                if step != row["at"]:
                    row["count"] += 1
                    row["first"], row["last"] = min(step, row["first"]), max(step, row["last"])
                    row["at"] = step
                if layer:
                    row["layers"][layer] = None
        self._end = self.run.end
        return more

    def message(self, since: int = -1) -> dict[str, Any]:
        """What has changed after a revision, for the page.

        Args:
            since: the revision that the page has; -1 if it has none.

        Returns:
            What `json.dumps` takes: bins that have changed, and everything that is short.
        """
        run = self.run
        name = run.path.resolve().name
        found: dict[str, Any] = {"revision": self.revision, "name": name, "path": str(run.path)}
        if since == self.revision:
            return found
        arrays = run.array_names
        found |= {
            "steps": len(run.steps), "last": max(run.steps, default=None), "header": run.header,
            "panels": [asdict(panel) for panel in panels_of(run.names, arrays)],
            "heats": {name: asdict(heat) for name, heat in HEATS.items() if self.maps[name][1]},
            "lines": {}, "maps": {}, "verdicts": [asdict(v) for v in run.verdicts()], "absent": self.absent(),
            "alpha": self.alpha(), "histograms": {},
        }  # fmt: skip
        for name, bins in self.lines.items():
            at, *columns = bins.since(since)
            digits = _digits(columns)
            numbers = {k: _short(c[:, 0], digits) for k, c in zip(("mean", "low", "high"), columns, strict=True)}
            found["lines"][name] = {"width": bins.width, "at": at.tolist(), "odd": self.odd.get(name), **numbers}
        order = {layer: k for k, layer in enumerate(dict.fromkeys(n.split("/", 1)[1] for n in run.names if "/" in n))}
        for name, (bins, names) in self.maps.items():
            if names:
                at, mean, _, _ = bins.since(since)
                layers = [n.split("/", 1)[1] for n in names]
                # Of the model: an instrument that was absent for a layer at first has it last.
                columns = sorted(range(len(layers)), key=lambda k: order[layers[k]])
                values = base64.b64encode(mean[:, columns].astype("<f4").tobytes()).decode()
                layers = [layers[k] for k in columns]
                found["maps"][name] = {"width": bins.width, "at": at.tolist(), "values": values}
                found["maps"][name] |= {"layers": layers, "labels": _labels(layers)}
        for name, kind in HISTOGRAMS.items():
            if name in arrays:
                steps = sorted(run.arrays(name))
                stops = np.unique(np.linspace(0, len(steps) - 1, min(STOPS, len(steps))).astype(int))
                layers = [n.split("/", 1)[1] for n in arrays if n.startswith(f"{name}/")]
                found["histograms"][name] = {
                    "kind": kind, "of": len(steps), "steps": [steps[k] for k in stops], "layers": layers,
                }  # fmt: skip
        return found

    def absent(self) -> list[dict[str, Any]]:
        """What was absent and why: instrument, reason, number of steps, first and last of them, layers."""
        rows = [
            {"name": name, "why": why, **{k: v for k, v in found.items() if k != "at"}, "layers": list(found["layers"])}
            for (name, why), found in self._absent.items()
        ]
        return sorted(rows, key=lambda row: -row["count"])[:REASONS]

    def alpha(self) -> dict[str, Any] | None:
        """Distribution of alpha over all steps, and over the last tenth of them."""
        _, numbers = self.run.numbers("Alpha")
        numbers = numbers[np.isfinite(numbers)]
        if not len(numbers):
            return None
        found: dict[str, Any] = {"edges": ALPHA.round(6).tolist()}
        for key, part in (("all", numbers), ("end", numbers[-max(1, len(numbers) // 10) :])):
            counts, _ = np.histogram(part.clip(ALPHA[0], ALPHA[-1]), ALPHA)
            found[key] = {"shares": _short(counts / len(part)), "median": float(np.median(part)), "count": len(part)}
        return found

    def histogram(self, name: str, step: int) -> dict[str, Any] | None:
        """The histogram of one step, or its hardest samples.

        Args:
            name: in the record, such as "GradHist1d/0.weight" or "SampleNorms.largest".
            step: its number.

        Returns:
            Shares `[bins]` or `[param_bins, bins]` and the limits of the axes; of samples their norms, their shares in
            the sum of all norms (None where the size of the batch is not recorded) and their indices, each `[count]`.
            None if there is none.
        """
        kind = name.split("/")[0]
        array = self.run.arrays(name).get(step) if name in self.run.array_names else None
        if array is None:
            return None
        if HISTOGRAMS.get(kind) == "samples":
            return self._samples(step, array)
        found: dict[str, Any] = {"step": step, "shares": _short(array)}
        for limit in ("limit", "param_limit"):
            number = self._number(f"{kind}.{limit}", step)
            if number is not None:
                found[limit] = number
        return found

    def _samples(self, step: int, norms: np.ndarray) -> dict[str, Any]:
        mean, n = (self._number(name, step) for name in ("SampleNorms", "BatchSize"))
        shares = _short(norms / (mean * n)) if n and mean and math.isfinite(mean) else None
        samples = self.run.arrays("SampleNorms.hardest")[step]
        return {"step": step, "norms": _short(norms), "shares": shares, "samples": [int(k) for k in samples]}

    def _number(self, name: str, step: int) -> float | None:
        steps, numbers = self.run.numbers(name)
        return float(numbers[np.flatnonzero(steps == step)[-1]]) if step in steps else None

    @property
    def progress(self) -> float:
        """Share of the record that was read."""
        size = (self.run.path / RECORD).stat().st_size
        return self.run.end / size if size else 1.0


def _finite(numbers: np.ndarray) -> np.ndarray:
    """Numbers that can be averaged: infinity counts as none."""
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _labels(names: list[str], most: int = 26) -> list[str]:
    """Names for an axis: without the modules that all have in common, and without the middle of what is too long."""
    parts = [name.split(".")[:-1] for name in names]
    common = next((k for k, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0)
    tails = [".".join(name.split(".")[common:]) for name in names]
    return [tail if len(tail) <= most else f"{tail[: most // 2 - 1]}…{tail[-most // 2 :]}" for tail in tails]


def _digits(columns: list[np.ndarray]) -> int:
    """How many digits tell numbers of one line apart: five of how much they differ."""
    numbers = np.concatenate([c[np.isfinite(c)] for c in columns])
    spread = float(np.ptp(numbers)) if len(numbers) else 0.0
    largest = float(np.abs(numbers).max()) if spread else 0.0
    return 5 + min(7, round(math.log10(largest / spread))) if largest > spread > 0 else 5


def _short(numbers: np.ndarray, digits: int = 5) -> list[Any]:
    """Numbers with few digits for JSON, which has no NaN and no infinity: they become null."""
    if numbers.ndim > 1:
        return [_short(row, digits) for row in numbers]
    return [float(f"{x:.{digits}g}") if math.isfinite(x) else None for x in numbers.tolist()]
