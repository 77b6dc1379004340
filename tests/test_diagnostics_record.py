"""The record of a run: it holds what was written, and survives what happens to processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import packext as px
from packext.diagnostics import Alpha, Cockpit, Distance, GradNorm, Loss, NTKCondition, Run, SampleNorms
from tests.helpers import batch, double_precision, mlp


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with double_precision():
        yield


def monitor(path: Path) -> Any:
    model = px.extend(mlp())
    asked = [Loss(), GradNorm(), SampleNorms(2), NTKCondition(), Alpha(), Distance()]
    return Cockpit(model, torch.optim.SGD(model.parameters(), 0.1), None, 1, [Run(path)], asked)


def train(watch: Any, steps: int) -> list[Any]:
    loss, (x, y) = px.extend(nn.CrossEntropyLoss()), batch()
    seen = []
    for _ in range(steps):
        with watch.step():
            loss(watch.model(x), y).backward()
            watch.optimizer.step()
            watch.optimizer.zero_grad()
        seen.append((watch.values, watch.absent))
    return seen


def test_what_is_written_is_read(tmp_path: Path) -> None:
    seen = train(monitor(tmp_path / "a" / "run"), 4)
    run = Run.open(tmp_path / "a" / "run")
    assert run.steps == [0, 1, 2, 3] and repr(run).endswith("4 steps)")
    for name in ("Loss", "GradNorm", "GradNorm/0.weight", "SampleNorms", "Distance/2.bias"):
        assert run.column(name).tolist() == [values[name] for values, _ in seen]
    assert run.column("Alpha").tolist()[:3] == [v.get("Alpha", np.nan) for v, _ in seen[1:]]
    assert np.isnan(run.column("Alpha")[3])
    assert run.column("Loss").dtype == np.float64
    arrays = run.arrays("SampleNorms.hardest")
    assert arrays.keys() == {0, 1, 2, 3} and arrays[0].dtype == np.int64
    assert all((arrays[k] == v["SampleNorms.hardest"]).all() for k, (v, _) in enumerate(seen))
    assert set(run.array_names) == {"SampleNorms.quantiles", "SampleNorms.hardest", "SampleNorms.largest"}
    assert [step for step, name, _ in run.absent() if name == "NTKCondition"] == [0, 1, 2, 3]
    assert run.header["instruments"][0] == "Loss" and run.header["packext"] == px.__version__
    with pytest.raises(KeyError, match="'loss' is no column of the record: Loss, GradNorm"):
        run.column("loss")
    with pytest.raises(KeyError, match="is no array of the record: SampleNorms.quantiles"):
        run.arrays("Loss")


def test_no_number_and_infinity_are_kept(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin(["A"])
    run.write(0, {"A": float("nan"), "B": float("inf"), "C": -float("inf")}, {})
    for line in (tmp_path / "record.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    again = Run.open(tmp_path)
    assert np.isnan(again.column("A")[0]) and again.column("B")[0] == np.inf and again.column("C")[0] == -np.inf


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_torn_line_is_left_out_and_written_over(tmp_path: Path, cut: int) -> None:
    train(monitor(tmp_path), 3)
    record = tmp_path / "record.jsonl"
    data = record.read_bytes()
    record.write_bytes(data[:-cut])
    with (tmp_path / "arrays.bin").open("ab") as file:
        file.write(b"\x93NUMPY torn")
    assert Run.open(tmp_path).steps == [0, 1]
    resumed = monitor(tmp_path)
    assert resumed.steps == 2
    seen = train(resumed, 2)
    run = Run.open(tmp_path)
    assert run.steps == [0, 1, 2, 3]
    assert run.column("Loss")[2:].tolist() == [values["Loss"] for values, _ in seen]
    assert (run.arrays("SampleNorms.largest")[3] == seen[1][0]["SampleNorms.largest"]).all()
    assert "where the parameters started is not in it" in seen[0][1]["Distance"]
    assert len([line for line in record.read_text().splitlines() if "format" in line]) == 1


def test_killed_before_the_header_was_complete(tmp_path: Path) -> None:
    (tmp_path / "record.jsonl").write_bytes(b'{"format":"pack')
    with pytest.raises(FileNotFoundError, match="has no record of a run"):
        Run.open(tmp_path)
    train(monitor(tmp_path), 1)
    assert Run.open(tmp_path).steps == [0]


def test_a_killed_process(tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import os, signal, torch
import numpy as np
from packext.diagnostics import Run
run = Run({str(tmp_path)!r})
run.begin(["A"])
for step in range(5):
    run.write(step, {{"A": float(step), "B": np.full(3, step)}}, {{}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    run = Run.open(tmp_path)
    assert run.column("A").tolist() == [0, 1, 2, 3, 4]
    assert [a.tolist() for a in run.arrays("B").values()] == [[k] * 3 for k in range(5)]


def test_records_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no record of a run"):
        Run.open(tmp_path)
    record = tmp_path / "record.jsonl"
    record.write_text('{"format": "packext run", "version": 2, "packext": "9.9"}\n')
    with pytest.raises(px.PackextError, match="version 2 of the format, written by packext 9.9; .* upgrade it"):
        Run.open(tmp_path)
    record.write_text('{"step": 3}\n')
    with pytest.raises(px.PackextError, match="is not the record of a run"):
        Run.open(tmp_path)
    record.write_text('{"format": "packext run", "version": 1, "packext": "0.1.0"}\n{"step\n{"step": 1}\n')
    with pytest.raises(px.PackextError, match="line 2, is damaged"):
        Run.open(tmp_path)


def test_a_frame(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    train(monitor(tmp_path), 3)
    run = Run.open(tmp_path)
    frame = run.frame()
    assert frame.index.name == "step" and frame.index.tolist() == [0, 1, 2] and list(frame.columns) == run.names
    assert frame["Loss"].tolist() == run.column("Loss").tolist()


def test_a_frame_without_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(monitor(tmp_path), 1)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install 'packext"):
        Run.open(tmp_path).frame()
