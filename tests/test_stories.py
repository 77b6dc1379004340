"""The stories in docs/ run, and say what their page says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

STORIES = Path(__file__).parents[1] / "docs" / "stories"


def told(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """Run a script as from the command line; return the numbers that it prints, and its verdicts."""
    import runpy

    monkeypatch.setattr(sys, "argv", [name, "--out", str(folder)])
    monkeypatch.syspath_prepend(str(STORIES))
    runpy.run_path(str(STORIES / f"{name}.py"), run_name="__main__")
    assert (folder / f"{name}.png").stat().st_size > 10_000
    lines = [line.rpartition(": ") for line in capsys.readouterr().out.splitlines()]
    read = {what: value for what, _, value in lines if what.startswith("verdicts")}
    assert read, "a story ends with what the monitor says of it"
    return read | {what: [float(v) for v in value.split(", ")] for what, _, value in lines if what not in read}


def test_alpha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = told("alpha", tmp_path, monkeypatch, capsys)
    across, along = (found[f"{name}: first and last loss"] for name in ("across", "along"))
    assert across == pytest.approx(along, rel=0.05) and across[1] < 0.5 * across[0]
    assert found["across: mean alpha"][0] > 0.95 and found["along: mean alpha"][0] < -0.95


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = told("scaling", tmp_path, monkeypatch, capsys)
    small, _, large, _ = (v[0] for what, v in found.items() if not what.startswith("verdicts"))
    assert small == 0 and large > 0.01
    assert "bad input scaling" in found["verdicts, pixels from 0 to 255"]
    assert "bad input scaling" not in found["verdicts, pixels from 0 to 1"]


def test_sigmoid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = told("sigmoid", tmp_path, monkeypatch, capsys)
    first, last = (
        {k: found[f"{k}, {layer}: root mean square of the gradient"][0] for k in ("ReLU", "Sigmoid")}
        for layer in ("conv 1", "linear 3")
    )
    assert last["Sigmoid"] > 1000 * first["Sigmoid"] and last["ReLU"] < 10 * first["ReLU"]
    assert "vanishing gradients" in found["verdicts, Sigmoid"]
    assert "vanishing gradients" not in found["verdicts, ReLU"]


def test_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = told("learning_rate", tmp_path, monkeypatch, capsys)
    runs = [value for what, value in found.items() if what.startswith("learning rate")]
    loss, alpha = min(runs)
    assert loss < 0.2 and alpha > 0 and found["its median alpha"][0] == pytest.approx(alpha, abs=0.01)
    assert all(a < -0.5 for _, a in runs[:3])
    low, best, high = (value for what, value in found.items() if what.startswith("verdicts"))
    assert "learning rate too low" in low and "learning rate too high" in high and "learning rate" not in best


def test_sharpness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = told("sharpness", tmp_path, monkeypatch, capsys)
    gd, sgd = ([v[0] for what, v in found.items() if what.startswith(name)] for name in ("GD", "SGD"))
    assert gd[0] == pytest.approx(sgd[0], rel=0.05) and gd[1] == pytest.approx(sgd[1])
    assert gd[2] == pytest.approx(gd[1], rel=0.02) and sgd[2] < 0.75 * gd[2]
