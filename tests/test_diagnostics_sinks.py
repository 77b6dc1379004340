"""TensorBoard and Weights & Biases get what the record gets."""

from __future__ import annotations

import json
import struct
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
from packext.diagnostics import (
    Alpha,
    Cockpit,
    Finding,
    GradHist1d,
    GradHist2d,
    GradNorm,
    Loss,
    Rule,
    Run,
    SampleNorms,
    TensorBoard,
    WandB,
)
from tests.helpers import batch, mlp

pytestmark = pytest.mark.usefixtures("double")


class There(Rule):
    failure, advice, reads, hold, release = "a loss", "Train on.", ("Loss",), 1, 1

    def look(self, step: int, values: Any) -> Finding | None:
        return Finding(f"At step {step}.") if step == 1 else None


def trained(run: Path, sink: Any, steps: int = 3) -> Run:
    """A small model after some steps, watched by a record and the sink."""
    model, loss = px.extend(mlp()), px.extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    asked = [Loss(), GradNorm(), Alpha(), SampleNorms(2), GradHist1d(10), GradHist2d()]
    monitor = Cockpit(model, optimizer, None, 1, [sink, Run(run)], asked, rules=[There()])
    x, y = batch()
    for _ in range(steps):
        with monitor.step():
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return Run.open(run)


def scalars(run: Run, name: str) -> list[tuple[int, float]]:
    return [(k, v) for k, v in zip(run.steps, run.column(name), strict=True) if not np.isnan(v)]


@pytest.mark.parametrize("made", [False, True])
def test_tensorboard(tmp_path: Path, made: bool) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    first, second = TensorBoard(SummaryWriter(str(tmp_path)) if made else tmp_path), TensorBoard(tmp_path)
    trained(tmp_path, first)
    run = trained(tmp_path, second, 2)  # beside a record that is continued
    assert run.steps == [0, 1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path))  # all is on the disk, though nobody has closed the writer
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(run.names)
    for name in run.names:
        found = [(e.step, e.value) for e in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in scalars(run, name)]
        assert [v for _, v in found] == pytest.approx([v for _, v in scalars(run, name)], rel=1e-6)
    names = {n for n in run.array_names if n.split("/")[0] == "GradHist1d"}
    assert len(names) == 5 and set(events.Tags()["histograms"]) == names
    for name in names:
        shares, limits = run.arrays(name), dict(scalars(run, "GradHist1d.limit"))
        for e in events.Histograms(name):
            h, edges = e.histogram_value, np.linspace(-limits[e.step], limits[e.step], 11)
            assert h.bucket == pytest.approx(shares[e.step]) and h.bucket_limit == pytest.approx(edges[1:])
            assert (h.min, h.max, h.num) == pytest.approx((edges[0], edges[-1], 1.0))
            centers = (edges[:-1] + edges[1:]) / 2
            assert (h.sum, h.sum_squares) == pytest.approx(
                ((centers * shares[e.step]).sum(), (centers**2 * shares[e.step]).sum())
            )
    texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("verdicts/text_summary")]
    assert texts == [(1, "a loss, step 1: At step 1. Train on."), (2, "a loss, steps 1 to 2: At step 1. Train on.")]


def test_what_a_killed_process_has_written_is_on_the_disk(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from packext.diagnostics import TensorBoard
sink = TensorBoard({str(tmp_path)!r})
sink.begin([])
for step in range(50):
    sink.write(step, {{"A": float(step)}}, {{}})
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("A")] == list(range(50))


def records(data: bytes) -> Iterator[bytes]:
    """What is in a file of W&B: 7 bytes, then LevelDB's log format."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        room = -at % 32768
        if 0 < room < 7:  # too little for a header: the rest of the block is empty
            at += room
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.parametrize("given", [False, True])
def test_weights_and_biases(tmp_path: Path, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = WandB(wandb.init(mode="offline") if given else None)
    record = trained(tmp_path / "run", sink)
    assert sink.run.settings.mode == "offline" and sink.run is wandb.run
    sink.run.finish()
    wandb.teardown()  # W&B's process ends: all is on the disk
    file = Path(sink.run.settings.sync_file)
    rows, alerts = [], []
    for data in records(file.read_bytes()):
        message = wandb_internal_pb2.Record()
        message.ParseFromString(data)
        if message.WhichOneof("record_type") == "history":
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in message.history.item})
        elif message.WhichOneof("record_type") == "alert":
            alerts.append((message.alert.title, message.alert.text))
    assert [title for title, _ in alerts] == ["a loss", "a loss (withdrawn)"]
    assert alerts[0][1] == "a loss, step 1: At step 1. Train on."
    for name in record.names:
        found = [(r["packext/step"], r[f"packext/{name}"]) for r in rows if f"packext/{name}" in r]
        assert found == scalars(record, name), name
    limit, name = record.column("GradHist1d.limit")[-1], "packext/GradHist1d/0.weight"
    last = [r for r in rows if f"{name}/bins" in r][-1]
    assert last["packext/step"] == 2 and last[f"{name}/_type"] == "histogram"
    assert last[f"{name}/values"] == pytest.approx(record.arrays("GradHist1d/0.weight")[2])
    assert last[f"{name}/bins"] == pytest.approx(np.linspace(-limit, limit, 11))


@pytest.mark.parametrize("sink, module", [(TensorBoard, "torch.utils.tensorboard"), (WandB, "wandb")])
def test_without_the_package(sink: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'packext\[{sink.__name__.lower()}\]'"):
        sink("runs/first")


def test_sinks_that_continue_nowhere(tmp_path: Path) -> None:
    """One without steps of its own goes with one that has some, and alone."""

    class Silent:
        def begin(self, names: list[str]) -> None:
            self.names = names

        def write(self, step: int, values: Any, absent: Any) -> None:
            self.last = step

        def say(self, verdict: Any) -> None:
            self.said = verdict

    sink = Silent()
    trained(tmp_path, sink)
    assert sink.last == 2 and sink.names[0] == "Loss"
    trained(tmp_path, sink)
    assert sink.last == 5
    model = px.extend(mlp())
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), 0.1), None, 1, [sink], [Loss()])
    assert monitor.steps == 0
