"""The record of a run: it holds what was written, and survives what happens to processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import packext as px
from packext.diagnostics import Absent, Alpha, Cockpit, Distance, GradNorm, Instrument, Loss, Run, SampleNorms, Step
from tests.helpers import batch, mlp

pytestmark = pytest.mark.usefixtures("double")


class Undefined(Instrument):
    """What is never there."""

    def measure(self, step: Step) -> float:
        raise Absent("it is not defined")


def monitor(path: Path) -> Any:
    model = px.extend(mlp())
    asked = [Loss(), GradNorm(), SampleNorms(2), Undefined(), Alpha(), Distance()]
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
    assert [step for step, name, _ in run.absent() if name == "Undefined"] == [0, 1, 2, 3]
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
    with (tmp_path / "layers.bin").open("ab") as file:
        file.write(b"torn")
    torn = Run.open(tmp_path)
    assert torn.steps == [0, 1] and len(torn.column("GradNorm/0.weight")) == 2
    resumed = monitor(tmp_path)
    assert resumed.steps == 2
    seen = train(resumed, 2)
    run = Run.open(tmp_path)
    assert run.steps == [0, 1, 2, 3]
    for name in ("Loss", "GradNorm/0.weight"):
        assert run.column(name)[2:].tolist() == [values[name] for values, _ in seen]
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
    record.write_text('{"format": "packext run", "version": 3, "packext": "9.9"}\n')
    with pytest.raises(px.PackextError, match="version 3 of the format, written by packext 9.9; .* upgrade it"):
        Run.open(tmp_path)
    record.write_text('{"step": 3}\n')
    with pytest.raises(px.PackextError, match="is not the record of a run"):
        Run.open(tmp_path)


HEADER = '{"format":"packext run","version":2,"packext":"0.1.0"}\n{"group":["A/x"],"number":0}\n'


@pytest.mark.parametrize("first", ["[1,2]", "7", '{"format":"packext run"}', '{"format":"packext run","version":"2"}'])
def test_a_damaged_header(tmp_path: Path, first: str) -> None:
    (tmp_path / "record.jsonl").write_text(f'{first}\n{{"step":0,"values":{{}}}}\n')
    for read in (Run.open, lambda path: Run(path).begin([])):
        with pytest.raises(px.PackextError, match="record.jsonl, line 1, is damaged: restore the file"):
            read(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        '{"step', "[1]", "null", '{"foo":1}', '{"step":1}', '{"step":1.5,"values":{}}', '{"step":1,"values":{"A":"b"}}',
        '{"step":1,"values":{},"layers":[0]}', '{"step":1,"values":{},"layers":[1,0]}', '{"verdict":{"name":"b"}}',
        '{"step":1,"values":{},"stacks":{"1":0}}', '{"step":1,"values":{"A":1},"arrays":{"B":"0"}}', '{"group":7}',
        '{"step":1,"values":{},"absences":[[1,"no",[0]]]}', '{"group":["A/y"],"number":2}',
    ],
)  # fmt: skip
def test_a_damaged_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "record.jsonl").write_text(f'{HEADER}{{"step":0,"values":{{"A":2}}}}\n{line}\n')
    with pytest.raises(px.PackextError, match="line 4, is damaged: delete the line"):
        Run.open(tmp_path)
    run = Run(tmp_path)
    for _ in range(2):  # as the page does, which looks again and again
        with pytest.raises(px.PackextError, match="line 4, is damaged"):
            run.refresh()
    assert run.steps == [0] and run.column("A").tolist() == [2]


def test_names_whose_line_was_deleted(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin([])
    run.write(0, {"A/x": 1.0}, {})
    run.write(1, {"A/y": 2.0, "A/x": 3.0}, {})
    record = tmp_path / "record.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(line for line in lines if '["A/x"]' not in line))
    with pytest.raises(px.PackextError, match="line 2, is damaged"):
        Run.open(tmp_path)


@pytest.mark.parametrize(
    ("name", "size"), [("layers.bin", 8), ("layers.bin", None), ("arrays.bin", 8), ("arrays.bin", None)]
)
def test_a_record_without_its_tail_is_not_continued(tmp_path: Path, name: str, size: int | None) -> None:
    train(monitor(tmp_path), 3)
    file = tmp_path / name
    if size is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-size])
    run, before = Run.open(tmp_path), sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    assert len(run.column("Loss")) == 3
    for fails in (
        lambda: run.column("GradNorm/0.weight") if name == "layers.bin" else run.arrays("SampleNorms.largest")[2],
        lambda: monitor(tmp_path),
    ):
        with pytest.raises(px.PackextError, match=f"{name} lacks something .* restore all files .* another"):
            fails()
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == before


def test_two_that_write_into_one_folder(tmp_path: Path) -> None:
    one, two = Run(tmp_path), Run(tmp_path)
    one.begin([])
    two.begin([])
    one.write(0, {"A/x": 1.0}, {})
    with pytest.raises(px.PackextError, match="record.jsonl is not as this Run has left it: .* a folder of its own"):
        two.write(0, {"A/y": 2.0}, {})
    one.write(1, {"A/x": 3.0}, {})
    assert Run.open(tmp_path).column("A/x").tolist() == [1.0, 3.0]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    run = Run(tmp_path)
    run.begin([])
    run.write(0, {"A": 1.0}, {})
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.end + 5, limits[1]))
        with pytest.raises(OSError, match="too large"):
            run.write(1, {"A": 2.0}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    run.write(2, {"A": 3.0}, {})
    for found in (run, Run.open(tmp_path)):
        assert found.steps == [0, 2] and found.column("A").tolist() == [1.0, 3.0]


def test_layers_are_written_without_their_names(tmp_path: Path) -> None:
    names = [f"a.rather.long.name.of.a.module.{k}.weight" for k in range(50)]
    run, seen = Run(tmp_path), []
    run.begin(["A"])
    for step in range(0, 60, 2):
        values = {f"A/{name}": step + k / 50 for k, name in enumerate(names) if k != step} | {"B/" + names[0]: 7.0}
        hists = {f"H/{name}": np.full(3, step + k) for k, name in enumerate(names)}
        seen.append(values)
        run.write(step, {"A": float(step), **values, **hists}, {f"A/{names[step]}": "no"} if step < 50 else {})
    assert (tmp_path / "record.jsonl").stat().st_size < 60 * 50 + 20_000
    for found in (run, Run.open(tmp_path)):
        assert found.steps == [*range(0, 60, 2)] and set(found.names) == {"A", *seen[0], *seen[1]}
        for name in (f"A/{names[4]}", f"A/{names[5]}"):
            np.testing.assert_array_equal(found.column(name), [values.get(name, np.nan) for values in seen])
        assert found.column(f"B/{names[0]}").tolist() == [7.0] * 30
        assert found.arrays(f"H/{names[9]}")[4].tolist() == [13] * 3 and len(found.arrays(f"H/{names[9]}")) == 30
        assert found.absent() == [(step, f"A/{names[step]}", "no") for step in range(0, 50, 2)]
        steps, layers, matrix = found.layers("A", first=10)
        assert steps.tolist() == [*range(20, 60, 2)] and matrix.shape == (20, 50)
        with pytest.raises(KeyError, match="'Typo' has no numbers of layers in the record; these have: A, B"):
            found.layers("Typo")
        for name, column in zip(layers, matrix.T, strict=True):
            np.testing.assert_array_equal(column, found.column(name)[10:])


def test_layers_that_come_later(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin(["A"])
    run.write(0, {"A/x": 1.0}, {})
    run.write(1, {"A/y": 2.0, "A/x": float("inf")}, {})
    run.write(0, {"A/z": 3.0}, {})
    for found in (run, Run.open(tmp_path)):
        assert found.column("A/x").tolist() == [1.0, np.inf]
        np.testing.assert_array_equal(found.column("A/y"), [np.nan, 2.0])
        np.testing.assert_array_equal(found.column("A/z"), [3.0, np.nan])


def test_it_is_read_while_it_is_written(tmp_path: Path) -> None:
    writer = monitor(tmp_path)
    run = Run.open(tmp_path)
    assert run.steps == []
    for step in range(3):
        train(writer, 1)
        assert run.refresh() is False and run.steps == [*range(step + 1)]
        assert run.column("GradNorm/0.weight")[step] == writer.values["GradNorm/0.weight"]
    train(writer, 2)
    calls = 0
    while run.refresh(most=100):
        calls += 1
    assert calls >= 2 and run.steps == [0, 1, 2, 3, 4]
    again = Run.open(tmp_path)
    assert all(np.array_equal(run.column(n), again.column(n), equal_nan=True) for n in again.names)


def test_a_record_that_is_replaced_or_deleted_while_it_is_read(tmp_path: Path) -> None:
    train(monitor(tmp_path / "run"), 2)
    run, record = Run.open(tmp_path / "run"), tmp_path / "run" / "record.jsonl"
    (tmp_path / "copy").write_bytes(record.read_bytes() + b"more")
    (tmp_path / "copy").rename(record)
    with pytest.raises(px.PackextError, match="another file than before"):
        run.refresh()
    record.unlink()
    with pytest.raises(FileNotFoundError):
        run.refresh()


def test_what_is_absent_for_layers_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin(["A"])
    run.write(0, {"A": 1.0}, {"A/0.weight": "no", "A/0.bias": "none"})
    assert Run.open(tmp_path).absent() == [(0, "A/0.weight", "no"), (0, "A/0.bias", "none")]


def test_a_record_of_version_1(tmp_path: Path) -> None:
    with (tmp_path / "arrays.bin").open("wb") as file:
        np.lib.format.write_array(file, np.arange(3.0))
    (tmp_path / "record.jsonl").write_text(
        '{"format":"packext run","version":1,"packext":"0.1.0","began":"2026-01-01","instruments":["A"]}\n'
        '{"step":0,"values":{"A":1.0,"A/0.weight":2.0},"arrays":{"H/0.weight":0},"absent":{"B":"no"}}\n'
    )
    run = Run.open(tmp_path)
    assert run.names == ["A", "A/0.weight"] and run.column("A/0.weight").tolist() == [2.0]
    assert run.arrays("H/0.weight")[0].tolist() == [0, 1, 2] and run.absent() == [(0, "B", "no")]
    steps, names, matrix = run.layers("A")
    assert (steps.tolist(), names, matrix.tolist()) == ([0], ["A/0.weight"], [[2.0]])
    with pytest.raises(KeyError, match="these have: A"):
        run.layers("B")
    with pytest.raises(px.PackextError, match="version 1 of the format, .* another folder"):
        run.begin(["A"])


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
