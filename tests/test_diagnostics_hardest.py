"""The panel of the hardest samples: whose gradients are largest, and by how much."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packext.diagnostics import Run
from packext.diagnostics.view.content import Content

NAME = "SampleNorms.largest"


def read(path: Path, *steps: dict[str, Any]) -> Content:
    """A record of steps whose two largest gradients are those of samples 40 and 7; the mean norm is 0.5."""
    run = Run(path)
    run.begin([])
    for step, values in enumerate(steps):
        hardest = {"SampleNorms.hardest": np.array([40, 7]), NAME: np.array([3.0, 1.5]), "SampleNorms": 0.5}
        run.write(step, hardest | values, {})
    content = Content(path)
    content.update()
    return content


def test_they_have_their_indices_and_shares(tmp_path: Path) -> None:
    infinite = {"BatchSize": 24.0, "SampleNorms": math.inf, NAME: np.array([math.inf, 1.5])}
    content = read(tmp_path, {}, {"BatchSize": 24.0}, infinite)
    assert content.message()["histograms"][NAME] == {"kind": "samples", "of": 3, "steps": [0, 1, 2], "layers": []}
    found = {"norms": [3.0, 1.5], "samples": [40, 7]}
    assert content.histogram(NAME, 0) == {"step": 0, "shares": None, **found}  # of how many samples is not known
    assert content.histogram(NAME, 1) == {"step": 1, "shares": [0.25, 0.125], **found}  # of 0.5 * 24
    assert content.histogram(NAME, 2) == {"step": 2, "norms": [None, 1.5], "shares": None, "samples": [40, 7]}


def test_they_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from packext.diagnostics.view.pictures import pictures

    content = read(tmp_path, {"BatchSize": 24.0})
    figure = pictures(content, content.message())["gradients"]
    axes: Any = next(a for a in figure.axes if a.get_title("left") == "Hardest samples")
    assert [bar.get_width() for bar in axes.patches] == [3.0, 1.5]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["sample 40", "sample 7"]
    assert [note.get_text() for note in axes.texts] == [" 25 %", " 12 %"]
