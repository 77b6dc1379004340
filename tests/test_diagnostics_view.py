"""Records as they are shown: nothing that is drawn differs from what was written, and every mistake has a message."""

from __future__ import annotations

import base64
import gzip
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import packext as px
from packext import _cli
from packext.diagnostics import LEVELS, Cockpit, Run, Server, Verdict, view, write_report
from packext.diagnostics.view import server as server_module
from packext.diagnostics.view.bins import Bins
from packext.diagnostics.view.content import Content, _labels
from packext.diagnostics.view.panels import HEATS, PANELS, panels_of
from tests.helpers import batch, mlp

NASTY = "</script><b>0.weight"


def record(path: Path, steps: int = 40, first: int = 0, layers: int = 3) -> Run:
    run = Run(path)
    run.begin(["Loss", "GradNorm", "GradHist1d"])
    for step in range(first, first + steps):
        values: dict[str, Any] = {"Loss": 2.0 / (step + 1), "Alpha": (step % 5) - 2.0, "Mine": float(-step)}
        values |= {f"GradNorm/{k}.weight": 10.0**-k * (step + 1) for k in range(layers)}
        values |= {"GradHist1d": np.arange(4) / 6, "GradHist1d.limit": step + 1.0}
        values |= {f"GradHist1d/{k}.weight": np.roll(np.arange(4) / 6, k) for k in range(layers)}
        run.write(step, values, {"NoiseScale/0.weight": "all noise"} if step % 2 else {})
    return run


# -- bins ----------------------------------------------------------------------------------------------
def expected(steps: np.ndarray, numbers: np.ndarray, width: int) -> dict[int, tuple[float, float, float]]:
    """Mean, smallest and largest by bin, one number at a time."""
    found: dict[int, list[float]] = {}
    for step, number in zip(steps.tolist(), numbers.tolist(), strict=True):
        found.setdefault(step // width * width, [])
        if not np.isnan(number):
            found[step // width * width].append(number)
    none = (np.nan,) * 3
    return {at: (sum(v) / len(v), min(v), max(v)) if v else none for at, v in sorted(found.items())}


@pytest.mark.parametrize("most", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("spacing", [1, 10, 37])
def test_bins_keep_mean_and_extremes(most: int, spacing: int) -> None:
    generator = np.random.default_rng(most + spacing)
    steps = np.arange(500) * spacing
    order = np.argsort(np.arange(500) + generator.integers(0, 3, 500))  # some lines come late
    steps, numbers = steps[order], np.where(generator.random((500, 2)) < 0.3, np.nan, generator.normal(size=(500, 2)))
    bins, seen, k = Bins(most), -1, 0
    page: dict[int, Any] = {}  # what somebody has who only ever gets what is new
    width, alone = 1, 0
    while k < 500:
        size = int(generator.integers(1, 60))
        alone = alone or size
        bins.add(steps[k : k + size], numbers[k : k + size, : 1 if k == 0 else 2], k)
        k += size
        at, *columns = bins.since(seen)
        assert len(at), "something is new"
        page = {b: v for b, v in page.items() if width == bins.width and b < at[0]}
        page |= {b: tuple(c[i] for c in columns) for i, b in enumerate(at.tolist())}
        width, seen = bins.width, k - size
    assert len(bins.at) <= most and list(page) == bins.at.tolist()
    numbers[:alone, 1] = np.nan  # of a name that came later
    for column, found in enumerate(
        [page, dict(zip(bins.at.tolist(), zip(*bins.since(-1)[1:], strict=True), strict=True))]
    ):
        wanted = expected(steps, numbers[:, column], bins.width)
        assert list(wanted) == list(found)
        for at, three in wanted.items():
            np.testing.assert_allclose([c[column] for c in found[at]], three, rtol=1e-9)


def test_a_run_that_is_looked_at_seldom_is_not_binned() -> None:
    bins = Bins(10)
    bins.add(np.array([0, 1, 10, 100, 1000, 100_000]), np.ones((6, 1)), 0)
    assert bins.width == 1 and bins.at.tolist() == [0, 1, 10, 100, 1000, 100_000]
    assert [len(part) for part in bins.since(0)] == [0] * 4  # nothing is new


def test_a_spike_is_never_lost() -> None:
    bins = Bins(100)
    for start in range(0, 30_000, 1000):
        numbers = np.ones((1000, 1))
        if start == 12_000:
            numbers[345] = 50.0
        bins.add(np.arange(start, start + 1000), numbers, start)
    at, mean, _, high = bins.since(-1)
    assert high.max() == 50.0 and at[high[:, 0].argmax()] == 12_345 // bins.width * bins.width
    assert mean.max() == pytest.approx((bins.width - 1 + 50) / bins.width)


# -- content -------------------------------------------------------------------------------------------
def test_what_is_shown_is_what_was_written(tmp_path: Path) -> None:
    run = record(tmp_path)
    content = Content(tmp_path)
    assert content.update() is False and content.progress == 1.0
    message = json.loads(json.dumps(content.message(), allow_nan=False))
    assert (message["steps"], message["last"]) == (40, 39)
    for name in ("Loss", "Alpha", "Mine"):
        line = message["lines"][name]
        assert line["width"] == 1 and line["at"] == run.steps
        np.testing.assert_allclose(line["mean"], run.column(name), rtol=1e-4)
        assert line["mean"] == line["low"] == line["high"]
    table = message["maps"]["GradNorm"]
    assert table["layers"] == ["0.weight", "1.weight", "2.weight"]
    values = np.frombuffer(base64.b64decode(table["values"]), "<f4").reshape(40, 3)
    np.testing.assert_allclose(values[:, 1], run.column("GradNorm/1.weight"), rtol=1e-6)
    [absent] = message["absent"]
    wanted = {"name": "NoiseScale", "why": "all noise", "count": 20, "first": 1, "last": 39, "layers": ["0.weight"]}
    assert absent == wanted
    about = message["histograms"]["GradHist1d"]
    assert (about["of"], about["steps"], about["kind"]) == (40, run.steps, "bars")
    assert content.histogram("GradHist1d/1.weight", 7) == {
        "step": 7, "shares": pytest.approx([0.5, 0, 1 / 6, 1 / 3], abs=1e-4), "limit": 8.0,
    }  # fmt: skip
    assert content.histogram("GradHist1d/9.weight", 7) is None and content.histogram("GradHist1d", 400) is None
    alpha = message["alpha"]
    assert alpha["all"]["median"] == 0 and alpha["all"]["count"] == 40 and alpha["end"]["count"] == 4
    assert alpha["end"]["median"] == 0.5  # of -1, 0, 1, 2
    assert sum(alpha["all"]["shares"]) == pytest.approx(1, abs=1e-3)


def test_only_what_is_new_is_read_and_sent(tmp_path: Path) -> None:
    record(tmp_path, 3000)
    content = Content(tmp_path)
    pieces = 1
    while content.update(100_000):
        pieces += 1
    assert pieces > 5
    whole = content.message()
    assert len(whole["lines"]["Loss"]["at"]) <= 1000 and whole["lines"]["Loss"]["width"] == 4
    assert content.message(content.revision).keys() == {"revision", "name", "path"}
    record(tmp_path, 3, first=3000)
    before = content.revision
    content.update()
    assert content.revision == before + 1
    news = content.message(before)
    assert news["lines"]["Loss"]["at"] == [3000] and news["maps"]["GradNorm"]["at"] == [3000 - 3000 % 16]
    assert len(json.dumps(news)) < 0.2 * len(json.dumps(whole))
    fresh = Content(tmp_path)
    fresh.update()
    again, pieced = fresh.message(), content.message()
    assert {**again, "revision": 0} == {**pieced, "revision": 0}
    np.testing.assert_allclose(again["lines"]["Mine"]["mean"][5], -np.arange(20, 24).mean())
    assert content.message()["histograms"]["GradHist1d"]["steps"][-1] == 3002
    assert len(again["histograms"]["GradHist1d"]["steps"]) == 400


def test_layers_are_in_the_order_of_the_model(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin([])
    run.write(0, {"GradNorm/a": 1.0, "GradNorm/b": 2.0, "NoiseScale/b": 3.0}, {"NoiseScale/a": "all noise"})
    run.write(1, {"GradNorm/a": 1.0, "GradNorm/b": 2.0, "NoiseScale/b": 3.0, "NoiseScale/a": 4.0}, {})
    content = Content(tmp_path)
    content.update()
    table = content.message()["maps"]["NoiseScale"]
    assert table["layers"] == ["a", "b"]
    values = np.frombuffer(base64.b64decode(table["values"]), "<f4").reshape(2, 2)
    np.testing.assert_array_equal(values, [[np.nan, 3], [4, 3]])


def test_layers_that_come_one_after_another_are_sent_in_one_order(tmp_path: Path) -> None:
    """As where a model is unfrozen from its end: the page has rows of the steps before."""
    run, content, page, since = Run(tmp_path), Content(tmp_path), {}, -1
    run.begin([])
    for step, trained in enumerate((["2"], ["1", "2"], ["0", "1", "2"])):
        frozen = {f"Untrained/{name}": 1.0 for name in "012" if name not in trained}
        run.write(step, {f"GradNorm/{name}": 1.0 + int(name) for name in trained} | frozen, {})
        content.update()
        table, since = content.message(since)["maps"]["GradNorm"], content.revision
        rows = np.frombuffer(base64.b64decode(table["values"]), "<f4").reshape(-1, len(table["layers"]))
        page |= dict(zip(table["at"], rows, strict=True))
    names = table["layers"]
    for step, trained in enumerate((["2"], ["1", "2"], ["0", "1", "2"])):
        wanted = [1.0 + int(name) if name in trained else np.nan for name in names]
        np.testing.assert_array_equal(page[step], wanted)


def test_what_is_not_finite_is_said(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin([])
    for step, loss in enumerate([1.0, float("inf"), 2.0, float("nan"), -float("inf")] + [3.0] * 1195):
        run.write(step, {"Loss": loss, "GradNorm": 1.0, "GradNorm/a": loss}, {})
    content = Content(tmp_path)
    while content.update(3000):
        pass
    message = json.loads(json.dumps(content.message(), allow_nan=False))
    line = message["lines"]["Loss"]
    assert line["odd"] == [3, 1] and message["lines"]["GradNorm"]["odd"] is None
    assert line["width"] == 2 and line["mean"][:4] == [1.0, 2.0, 3.0, 3.0]
    values = np.frombuffer(base64.b64decode(message["maps"]["GradNorm"]["values"]), "<f4")
    assert message["maps"]["GradNorm"]["width"] == 8 and values[:2].tolist() == [2.4000000953674316, 3.0]


def test_labels() -> None:
    assert _labels(["model.layers.0.mlp.weight", "model.layers.11.mlp.weight"]) == ["0.mlp.weight", "11.mlp.weight"]
    assert _labels(["weight", "bias"]) == ["weight", "bias"] and _labels(["a.b.weight"]) == ["a.b.weight"]
    [label, _] = _labels(["x." + "long_" * 20 + "weight", "y.bias"])
    assert label == "x.long_long_…g_long_weight" and len(label) <= 26


def test_every_instrument_has_a_place() -> None:
    model, loss, (x, y) = px.extend(mlp()), px.extend(nn.CrossEntropyLoss()), batch()
    chosen = [getattr(px.diagnostics, k)() for k in ("CABS", "EarlyStopping", "EffectiveRank", "MeanGSNR", "TICTrace")]
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), 0.1), "full", instruments=chosen)
    names: set[str] = set()
    arrays: set[str] = set()
    for _ in range(2):
        with monitor.step():
            loss(model(x.float()), y).backward()
            monitor.optimizer.step()
            monitor.optimizer.zero_grad()
        names |= {k for k, v in monitor.values.items() if isinstance(v, float)} | monitor.absent.keys()
        arrays |= monitor.values.keys() - names
    panels = panels_of(sorted(names), sorted(arrays))
    shown = {name for panel in panels for name in panel.names}
    assert not {panel.title for panel in panels} - {panel.title for panel in PANELS}, "no panel of its own"
    once = {"Time", "InitialScale"}  # what says nothing over steps
    assert {kind.__name__ for kind in LEVELS["full"]} - once <= shown | HEATS.keys()
    [own] = [panel for panel in panels_of(["Loss", "valid_loss"], []) if panel.title == "valid_loss"]
    assert own.column == "Other" and own.names == {"valid_loss": "valid_loss"}
    titles = [panel.title for panel in panels_of(["HessTrace", "Trace"], [])]  # by which the page knows panels
    assert titles == ["Trace", "Trace (your own)"]


# -- server --------------------------------------------------------------------------------------------
@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(server_module, "plotly_source", lambda: "// plotly")
    servers: list[Server] = []

    def start(*paths: Path) -> tuple[Server, list[str]]:
        said: list[str] = []
        servers.append(Server(paths, 0, said.append))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1], said

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def get(server: Server, path: str, host: str | None = None) -> Any:
    request = urllib.request.Request(server.url + path, headers={"Host": host} if host else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        body = gzip.decompress(answer.read()).decode()
        return json.loads(body) if "json" in answer.headers["Content-Type"] else body


def test_the_server_sends_the_page_and_what_is_new(tmp_path: Path, serve: Any) -> None:
    record(tmp_path / "a")
    server, said = serve(tmp_path / "a", tmp_path / "b")
    assert server.server_address[0] == "127.0.0.1"
    page = get(server, "")
    assert "<title>a, b - packext</title>" in page and "plotly.js" in page and '{"live":2}' in page
    assert get(server, "plotly.js") == "// plotly"
    first = get(server, "data?run=0&opened=-1&since=-1")
    assert first["error"] is None and first["steps"] == 40 and len(first["lines"]["Loss"]["at"]) == 40
    record(tmp_path / "a", 2, first=40)
    news = get(server, f"data?run=0&opened={first['opened']}&since={first['revision']}")
    assert news["lines"]["Loss"]["at"] == [40, 41] and news["opened"] == first["opened"]
    none = get(server, f"data?run=0&opened={news['opened']}&since={news['revision']}")
    assert "lines" not in none and none["error"] is None
    assert get(server, "histogram?run=0&name=GradHist1d%2F0.weight&step=3")["limit"] == 4.0
    assert get(server, "histogram?run=0&name=GradHist1d&step=99") is None
    for path, code in (("data?run=7&opened=0&since=0", 400), ("data?run=x", 400), ("secret", 404)):
        with pytest.raises(urllib.error.HTTPError, match=str(code)):
            get(server, path)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get(server, "", host="evil.example:80")


def test_a_record_that_comes_late_goes_away_and_comes_back(tmp_path: Path, serve: Any) -> None:
    path = tmp_path / "run"
    server, said = serve(path)
    ask = "data?run=0&opened=-1&since=-1"
    assert "has no record of a run yet" in get(server, ask)["error"]
    assert "has no record of a run yet" in get(server, ask)["error"] and len(said) == 1
    path.mkdir()
    (path / "record.jsonl").write_bytes(b'{"format": "packext r')  # a header of which half is written
    assert get(server, ask)["error"] is None and "lines" in get(server, ask)
    (path / "record.jsonl").unlink()
    get(server, ask)
    record(path)
    with (path / "record.jsonl").open("ab") as file:
        file.write(b'{"step": 40, "val')
    here = get(server, ask)
    assert here["error"] is None and here["steps"] == 40
    (path / "record.jsonl").unlink()
    gone = get(server, f"data?run=0&opened={here['opened']}&since={here['revision']}")
    assert "the record was deleted" in gone["error"] and "lines" not in gone
    record(path, 5)
    back = get(server, f"data?run=0&opened={here['opened']}&since={here['revision']}")
    assert back["error"] is None and back["steps"] == 5 and back["opened"] != here["opened"]
    (path / "record.jsonl").write_text('{"format": "packext run", "version": 9, "packext": "7.0"}\n')
    assert "version 9 of the format, written by packext 7.0" in get(server, ask)["error"]
    (path / "record.jsonl").write_text('{"format": "packext run", "version": 2, "packext": "0.1.0"}\n{"step\n')
    assert "line 2, is damaged" in get(server, ask)["error"]
    assert "line 2, is damaged" in get(server, ask)["error"]
    assert all("Traceback" not in text for text in said) and said[-1].endswith("restore the file.")


def test_a_record_of_which_files_are_missing(tmp_path: Path, serve: Any) -> None:
    record(tmp_path)
    server, said = serve(tmp_path)
    cuts: tuple[int | None, ...] = (40, 41, 0, None)
    for name, cut in ((name, cut) for cut in cuts for name in ("arrays.bin", "layers.bin")):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        if cut is not None:
            (tmp_path / name).write_bytes(whole[:cut])
        server.runs[0].content = None
        for _ in range(2):
            answer = get(server, "data?run=0&opened=-1&since=-1")
            assert (answer["error"] is None) == (name == "arrays.bin") and answer["steps"] == 40
            assert get(server, "histogram?run=0&name=GradHist1d%2F0.weight&step=30") is None or name != "arrays.bin"
        told = said[-1] if name == "arrays.bin" else answer["error"]
        assert name in told and "copy or restore" in told
        (tmp_path / name).write_bytes(whole)
    server.runs[0].content = None
    again = get(server, "data?run=0&opened=-1&since=-1")
    assert again["error"] is None and len(again["maps"]["GradNorm"]["at"]) == 40


# -- report and command line ---------------------------------------------------------------------------
def test_a_report_needs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    run = record(tmp_path / "run", 60)
    verdict = Verdict("too noisy", 4, (NASTY,), "The noise is 3 times the gradient.", "Try a larger batch.")
    run.say(verdict)
    file = write_report(tmp_path / "run", tmp_path / "new" / "out")
    assert file == tmp_path / "new" / "out" / "report.html"
    html = file.read_text("utf-8")
    around = html[: html.index("<style>")] + html[html.index("<body>") :]
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=(?!\"data:)", around)
    assert NASTY not in html
    [data] = re.findall(r'<script type="application/json" id="start">(.*?)</script>', html, re.DOTALL)
    data = json.loads(data)
    [message] = data["runs"]
    assert message["verdicts"] == [json.loads(json.dumps(asdict(verdict)))]
    assert len(message["lines"]["Loss"]["at"]) == 60
    steps = message["histograms"]["GradHist1d"]["steps"]
    assert data["histograms"][0]["GradHist1d/0.weight"].keys() == {str(step) for step in steps}
    pictures = {p.name for p in file.parent.glob("*.png")}
    assert pictures == {"step-size.png", "gradients.png", "other.png", "layers.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in file.parent.glob("*.png"))


def drawn(path: Path) -> dict[str, Any]:
    """The axes of a report's pictures, by the title of their panel."""
    pictures = pytest.importorskip("packext.diagnostics.view.pictures").pictures
    content = Content(path)
    content.update()
    return {axes.get_title("left"): axes for f in pictures(content, content.message()).values() for axes in f.axes}


def test_what_is_not_finite_of_several_lines_is_said_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin([])
    for step, (one, two) in enumerate([(1.0, 1.0), (float("inf"), 2.0), (float("nan"), float("inf"))]):
        run.write(step, {"GradNorm": one, "SampleNorms": two, "Loss": two}, {})
    axes = drawn(tmp_path)
    [text] = axes["Gradient norm"].texts
    assert text.get_text().splitlines() == [
        "mean gradient not finite in 2 steps, first in step 1",
        "of one sample, on average not finite in 1 step, first in step 2",
    ]
    assert [t.get_text() for t in axes["Loss"].texts] == ["not finite in 1 step, first in step 2"]


def test_a_column_of_a_map_reaches_to_the_next(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin([])
    for step in range(0, 50, 10):
        run.write(step, {"GradNorm/a": 1.0 + step}, {})
    axes = drawn(tmp_path)["Gradient norm"]
    [image] = axes.images
    left, right, *_ = image.get_extent()
    assert (left, right) == (0, 50)
    [row] = image.get_array()
    places = (left + (np.arange(len(row)) + 0.5) * (right - left) / len(row)) // 10 * 10
    np.testing.assert_array_equal(row, 1 + places)


def test_a_narrow_logarithmic_axis_has_numbers(tmp_path: Path) -> None:
    """No digit and power of ten lies between 1.48 and 1.66; and a distance of 0 draws no vertical line."""
    run = Run(tmp_path)
    run.begin([])
    for step, loss in enumerate([1.48, 1.66, 1.52]):
        run.write(step, {"Loss": loss, "Distance": 0.1 * step}, {})
    axes = drawn(tmp_path)
    low, high = axes["Loss"].get_ylim()
    shown = [float(t.get_text()) for t in axes["Loss"].get_yticklabels() if t.get_text()]
    assert sum(low <= tick <= high for tick in shown) >= 3
    [line] = axes["Distance and update size"].lines
    assert np.isnan(line.get_ydata()[0]) and line.get_ydata()[1] == pytest.approx(0.1)


def test_a_line_keeps_the_digits_that_change(tmp_path: Path) -> None:
    """Norms of parameters change in their sixth digit: without it, they stand still and jump."""
    run = Run(tmp_path)
    run.begin([])
    for step in range(5):
        run.write(step, {"ParamNorm": 32.684 + step / 9000}, {})
    content = Content(tmp_path)
    content.update()
    assert len(set(content.message()["lines"]["ParamNorm"]["mean"])) == 5


def test_a_share_of_zero_is_not_absent(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin([])
    run.write(0, {}, {"IdleUnits": "no gradient"})
    for step in (1, 2):
        run.write(step, {"IdleUnits/a": 0.0, "IdleUnits/b": 0.5}, {})
    [image] = drawn(tmp_path)["Idle units"].images
    np.testing.assert_array_equal(np.unique(image.get_array()), [0, 0.5])
    assert image.get_clim() == (0, 1)


def test_a_map_of_zeros_keeps_steps_and_layers(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin([])
    for step in range(3):
        run.write(step, {"GradNorm/a": 0.0, "GradNorm/b": 0.0}, {})
    axes = drawn(tmp_path)["Gradient norm"]
    assert [t.get_text() for t in axes.texts] == ["0 everywhere"]
    assert axes.get_xlim() == (0, 3) and axes.get_ylim() == (1.5, -0.5)


def test_a_label_hides_no_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.begin([])
    for step in range(3):
        run.write(step, {"Alpha": -0.95}, {})
    axes = drawn(tmp_path)["Alpha over steps"]
    assert max(t.get_zorder() for t in axes.texts) < min(line.get_zorder() for line in axes.lines)


def test_many_histograms_are_thinned_in_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(view.report, "NUMBERS", 100)
    monkeypatch.setattr(view.report, "plotly_source", lambda: "")
    record(tmp_path)
    [data] = re.findall(r'id="start">(.*?)</script>', write_report(tmp_path).read_text("utf-8"), re.DOTALL)
    about = json.loads(data)["runs"][0]["histograms"]["GradHist1d"]
    assert about["of"] == 40 and len(about["steps"]) == 6 and {0, 39} <= {*about["steps"]}  # 6 x 4 names x 4 bins
    assert {*json.loads(data)["histograms"][0]["GradHist1d"]} == {str(step) for step in about["steps"]}


def test_names_with_dollar_signs_are_no_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(view.report, "plotly_source", lambda: "")
    run = Run(tmp_path / "at_$5_and_$10")
    run.begin([])
    run.write(0, {"us$_per_$token": 1.0, "GradNorm/a$_$.weight": 2.0}, {})
    assert write_report(run.path).exists()


def test_the_command_prints_verdicts_and_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("plotly"), pytest.importorskip("matplotlib")
    run, said = record(tmp_path, 3), f"Report: {tmp_path / 'report' / 'report.html'}"
    assert _cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == ["No verdict: no rule that listened has found a failure.", said]
    run.say(verdict := Verdict("too noisy", 2, (), "Noise.", "Try."))
    assert _cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{verdict}\n{said}\n"


def failing(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert _cli.main(list(arguments)) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"packext {arguments[0]}: ") and "Traceback" not in said.err
    return said.err


def test_mistakes_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (view.report, server_module):
        monkeypatch.setattr(module, "plotly_source", lambda: "")
    assert "nothing has no record of a run" in failing(capsys, "report", str(tmp_path / "nothing"))
    Run(tmp_path / "empty").begin([])
    assert "has no step" in failing(capsys, "report", str(tmp_path / "empty"))
    for line in ("[1,2]", '{"format":"packext run"}'):
        (tmp_path / "empty" / "record.jsonl").write_text(line + "\n")
        for command in ("watch", "report"):
            assert "record.jsonl, line 1, is damaged" in failing(capsys, command, str(tmp_path / "empty"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        _cli.main(["watch", str(tmp_path / "file")])
    assert "file is a file" in capsys.readouterr().err
    (tmp_path / "empty" / "record.jsonl").write_text('{"format": "packext run", "version": 9, "packext": "7.0"}\n')
    for command in ("watch", "report"):
        assert "version 9 of the format" in failing(capsys, command, str(tmp_path / "empty"))
    record(tmp_path / "run", 3)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        said = failing(capsys, "watch", str(tmp_path / "run"), "--port", port)
    assert f"port {port} cannot be had" in said and "choose another with --port" in said
    assert "port 70000 cannot be had" in failing(capsys, "watch", str(tmp_path / "run"), "--port", "70000")
    with pytest.raises(SystemExit, match="2"):
        _cli.main(["watch", "a", "b", "c"])
    assert "one run or two, not 3" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["watch", "report"])
def test_without_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    record(tmp_path, 3)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert "pip install 'packext[watch]'" in failing(capsys, command, str(tmp_path))
    monkeypatch.setattr(view.report, "plotly_source", lambda: "")
    monkeypatch.setitem(sys.modules, "packext.diagnostics.view.pictures", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'packext\[watch\]'"):
        write_report(tmp_path)


def test_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background inherits that it is ignored
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from packext.diagnostics.view import server
server.plotly_source = lambda: ""
from packext._cli import main
sys.exit(main(["watch", {str(tmp_path / "run")!r}, "--port", "0"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "has no record of a run yet: waiting for it" in process.stdout.readline()
    assert "http://127.0.0.1:" in process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out.strip(), err) == (0, "Stopped.", "")


@pytest.mark.parametrize("command", [[], ["watch"], ["report"], ["demo"]])
def test_help_teaches(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        _cli.main([*command, "--help"])
    text = capsys.readouterr().out
    words = {"": "packext watch runs/first", "watch": "Ctrl-C", "report": "PNG", "demo": "--seconds"}
    assert words["".join(command)] in text
