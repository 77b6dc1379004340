"""The page in a real browser: it draws what is in the record, follows it, and answers clicks and slides."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packext.diagnostics import Run, Server, Verdict, write_report
from packext.diagnostics.view import server as server_module

webdriver = pytest.importorskip("selenium.webdriver")
pytest.importorskip("plotly")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1500,1200",
)  # fmt: skip
NASTY = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def serve(browser: Any) -> Iterator[Callable[..., str]]:
    servers: list[Server] = []

    def start(*paths: Path) -> str:
        servers.append(Server(paths, 0, lambda text: None))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return servers[-1].url

    yield start
    browser.get("about:blank")
    for server in servers:
        server.shutdown()
        server.server_close()
    browser.get_log("browser")


def write(path: Path, steps: range, factor: float = 1.0, layers: tuple[str, ...] = ("0.weight", "0.bias")) -> Run:
    run = Run(path)
    run.begin([])
    for step in steps:
        values: dict[str, Any] = {"Loss": factor / (step + 1), "Alpha": (step % 5) / 2 - 1, "HessTrace": 1.0 + step}
        values |= {"NormTest": 1.0, "InnerTest": 0.6, "OrthoTest": 0.8, "GradHist1d.limit": factor * (step + 1)}
        shares = np.array([0.1, 0.2, 0.3, 0.4])
        values |= {"GradHist1d": shares} | {f"GradHist1d/{name}": shares[::-1] for name in layers}
        values |= {"GradHist2d": np.outer(shares, shares), "GradHist2d.limit": 1.0, "GradHist2d.param_limit": 2.0}
        values |= {f"GradNorm/{name}": factor * (k + 1.0) for k, name in enumerate(layers)}
        values |= {"SampleNorms": 0.5, "BatchSize": 24.0, "SampleNorms.largest": np.array([3.0, 1.5])}
        values |= {"SampleNorms.hardest": np.array([40 + step, 7])}
        run.write(step, values, {"NoiseScale": "all noise"})
    return run


def until(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {seconds} s for {what}")


def text(browser: Any, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0])?.innerText || ''", selector)


def traces(browser: Any, panel: str, plot: int = 0) -> list[dict[str, Any]]:
    """What plotly has drawn in a panel."""
    script = """
        const div = boxes.get(arguments[0])?.plots[arguments[1]];
        return (div?.data || []).map(({ name, mode, x, y, z, type, fill, xaxis, showlegend, text, customdata }) => ({
            name, mode, type, fill, xaxis, showlegend, text, customdata, z, x: Array.from(x || []),
            y: Array.from(y || []),
        }));
    """
    return browser.execute_script(script, panel, plot)


def slide(browser: Any, panel: str, value: int) -> None:
    script = """
        const { input } = boxes.get(arguments[0]).slider;
        input.value = arguments[1];
        input.dispatchEvent(new Event("input"));
    """
    browser.execute_script(script, panel, value)


def no_errors(browser: Any) -> None:
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def no_overflow(browser: Any) -> None:
    script = """
        const wide = [...document.querySelectorAll(".panel")].filter((p) => p.scrollWidth > p.clientWidth + 1);
        return [wide.map((p) => p.dataset.key), document.body.scrollWidth > window.innerWidth];
    """
    assert browser.execute_script(script) == [[], False]


def test_it_follows_a_run(tmp_path: Path, browser: Any, serve: Any) -> None:
    browser.get(serve(tmp_path / "run"))
    until(lambda: "has no record of a run yet" in text(browser, "#runs .error"), "the message")
    Run(tmp_path / "run").begin([])
    until(lambda: text(browser, "#verdicts") == "No step was looked at yet.", "the empty record")
    run = write(tmp_path / "run", range(30))
    until(lambda: "30 steps looked at" in text(browser, "#runs"), "the record")
    assert text(browser, "#runs .error") == ""
    [loss] = traces(browser, "Loss")
    assert loss["x"] == [*range(30)] and loss["y"] == pytest.approx([1 / (k + 1) for k in range(30)], rel=1e-4)
    assert "No verdict stands" in text(browser, "#verdicts")
    assert "all noise" in text(browser, "#absent") and "30" in text(browser, "#absent td.number")
    [heat] = traces(browser, "map GradNorm")
    assert heat["x"] == [*range(31)], "a column begins at its step and ends at the next"
    assert heat["customdata"][1][7] == ["0.bias", 2.0, 7]
    assert heat["y"] == [0, 1] and heat["z"][1] == pytest.approx([np.log10(2)] * 30)
    headings = [h.text for h in browser.find_elements("css selector", "#panels h2")]
    assert headings == ["Step size", "Gradients", "Curvature"]

    run.write(30, {"Loss": 9.0}, {})
    run.say(Verdict("too noisy", 30, (NASTY,), "The noise is 3 times the gradient.", "Try a larger batch."))
    until(lambda: "31 steps looked at" in text(browser, "#runs"), "a step more")
    assert traces(browser, "Loss")[0]["y"][-1] == 9.0
    card = text(browser, ".verdict")
    for word in ("too noisy", NASTY, "since step 30", "3 times the gradient", "Try a larger batch."):
        assert word in card
    run.say(Verdict("too noisy", 30, (), "The noise is 3 times the gradient.", "Try a larger batch.", until=31))
    until(lambda: "No verdict stands" in text(browser, "#verdicts"), "the withdrawal")
    assert "1 verdict withdrawn" in text(browser, "#verdicts")
    no_overflow(browser)

    (tmp_path / "run" / "record.jsonl").unlink()
    until(lambda: "was deleted" in text(browser, "#runs .error"), "the deletion")
    assert len(traces(browser, "Loss")[0]["x"]) == 31, "what was seen stays on the page"
    write(tmp_path / "run", range(3))
    until(lambda: "3 steps looked at" in text(browser, "#runs"), "the new record")
    assert traces(browser, "Loss")[0]["x"] == [0, 1, 2]
    no_errors(browser)


def test_the_hardest_samples_are_named_with_their_shares(tmp_path: Path, browser: Any, serve: Any) -> None:
    write(tmp_path / "run", range(20))
    browser.get(serve(tmp_path / "run"))
    panel = "Hardest samples"
    until(lambda: traces(browser, panel), "the bars")
    [bars] = traces(browser, panel)
    assert bars["x"] == [3.0, 1.5] and bars["text"] == ["25 %", "13 %"] and bars["customdata"] == [59, 7]
    slide(browser, panel, 3)
    until(lambda: traces(browser, panel)[0]["customdata"] == [43, 7], "the step")
    no_errors(browser)


def test_the_slider_goes_over_steps_and_layers(tmp_path: Path, browser: Any, serve: Any) -> None:
    write(tmp_path / "run", range(20))
    browser.get(serve(tmp_path / "run"))
    panel = "Gradient entries"
    until(lambda: traces(browser, panel), "the histogram")
    box = f'[data-key="{panel}"]'
    assert text(browser, f"{box} output") == "step 19" and max(traces(browser, panel)[0]["x"]) == 15.0  # of limit 20
    slide(browser, panel, 3)
    until(lambda: text(browser, f"{box} output") == "step 3", "the step")
    [bars] = traces(browser, panel)
    assert bars["x"] == [-3.0, -1.0, 1.0, 3.0] and bars["y"] == [0.1, 0.2, 0.3, 0.4]
    browser.find_element("css selector", f"{box} option[value='0.bias']").click()
    until(lambda: traces(browser, panel)[0]["y"] == [0.4, 0.3, 0.2, 0.1], "the layer")
    write(tmp_path / "run", range(20, 22))
    until(lambda: "22 steps looked at" in text(browser, "#runs"), "more steps")
    time.sleep(0.3)
    assert text(browser, f"{box} output") == "step 3", "who has moved the slider keeps the step"
    slide(browser, panel, 21)
    write(tmp_path / "run", range(22, 23))
    until(lambda: text(browser, f"{box} output") == "step 22", "who is at the end follows")
    [image] = traces(browser, "Gradient entries and parameters")
    assert image["z"][3][1] == pytest.approx(np.log10(0.08)) and image["x"] == [-0.75, -0.25, 0.25, 0.75]
    no_errors(browser)


def test_a_server_that_was_stopped(tmp_path: Path, browser: Any) -> None:
    write(tmp_path, range(3))
    server = Server([tmp_path])
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    browser.get(server.url)
    until(lambda: "3 steps looked at" in text(browser, "#runs"), "the record")
    server.shutdown()
    server.server_close()
    until(lambda: "does not answer" in text(browser, "#runs .error"), "the message")
    assert traces(browser, "Loss")[0]["x"] == [0, 1, 2]
    browser.get("about:blank")
    browser.get_log("browser")


def test_two_runs_are_compared(tmp_path: Path, browser: Any, serve: Any) -> None:
    write(tmp_path / "first", range(10))
    write(tmp_path / "second", range(0, 30, 3), factor=5.0)
    browser.get(serve(tmp_path / "first", tmp_path / "second"))
    until(lambda: len(traces(browser, "Loss")) == 2, "two runs")
    one, two = traces(browser, "Loss")
    assert (one["name"], two["name"]) == ("first", "second") and two["x"] == [*range(0, 30, 3)]
    assert two["y"][1] == pytest.approx(5 / 4) and one["xaxis"] is None and two["xaxis"] is None
    in_legend = [t["name"] for t in traces(browser, "Noise tests") if t["showlegend"] is None]
    assert in_legend == ["norm", "inner", "orthogonal"]
    both = [traces(browser, "map GradNorm", k)[0] for k in (0, 1)]
    assert [heat["z"][0][0] for heat in both] == pytest.approx([0, np.log10(5)])
    assert both[1]["x"] == [*range(0, 31, 3)], "the last column is as wide as the others"
    script = "const { _fullLayout: f } = boxes.get('map GradNorm').plots[arguments[0]]; return f.xaxis.range;"
    assert [browser.execute_script(script, k) for k in (0, 1)] == [[0, 30], [0, 30]]
    panel = "Gradient entries"
    until(lambda: len(traces(browser, panel)) == 2, "both histograms")
    assert [t["name"] for t in traces(browser, panel)] == ["first, step 9", "second, step 27"]
    slide(browser, panel, 0)
    until(lambda: traces(browser, panel)[1]["name"] == "second, step 0", "the step")
    browser.find_element("id", "columns").click()
    until(lambda: traces(browser, "Loss")[1]["xaxis"] == "x2", "columns")
    script = "const { _fullLayout: f } = boxes.get('Loss').plots[0]; return [f.xaxis.range, f.xaxis2.range, f.yaxis2];"
    left, right, other = browser.execute_script(script)
    assert left == right and other is None, "the same axes"
    no_overflow(browser)
    browser.find_element("id", "overlay").click()
    until(lambda: traces(browser, "Loss")[1]["xaxis"] is None, "overlay")
    no_errors(browser)


def test_a_legend_has_the_lines_that_either_run_has(tmp_path: Path, browser: Any, serve: Any) -> None:
    for name, line in (("first", "NoiseScale.critical_batch"), ("second", "NormLayerNoiseScale")):
        run = Run(tmp_path / name)
        run.begin([])
        for step in range(3):
            run.write(step, {"NoiseScale": 1.0, line: 2.0}, {})
    browser.get(serve(tmp_path / "first", tmp_path / "second"))
    until(lambda: len(traces(browser, "Noise scale")) > 3, "two runs")
    for button in ("overlay", "columns"):
        browser.find_element("id", button).click()
        until(lambda: (traces(browser, "Noise scale")[-1]["xaxis"] == "x2") == (button == "columns"), button)  # noqa: B023
        in_legend = [t["name"] for t in traces(browser, "Noise scale") if t["showlegend"] is not False]
        assert in_legend == ["one step", "critical batch size", "normalisations, one step"]


def test_a_long_run_of_many_layers(tmp_path: Path, browser: Any, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "PIECE", 20_000)  # bins grow while they are sent
    monkeypatch.setattr(server_module, "PATIENCE", 0.0)
    layers = tuple(f"transformer.encoder.blocks.{k}.attention.output_projection.weight" for k in range(200))
    run = Run(tmp_path)
    run.begin([])
    names = [f"GradNorm/{layer}" for layer in layers]
    for step in range(3000):
        spike = 5e5 if step == 1234 else 1.0 + step
        run.write(step, {"Loss": spike} | dict.fromkeys(names, spike), {})
    browser.get(serve(tmp_path))
    until(lambda: "3,000 steps looked at" in text(browser, "#runs"), "the record")
    until(lambda: not text(browser, "#runs .reading"), "its end")
    low, high, mean = traces(browser, "Loss")
    starts = [*range(0, 3000, 4)]
    assert low["x"] == high["x"] == mean["x"] == starts
    means = [s + 2.5 if s != 1232 else (1233 + 1234 + 5e5 + 1236) / 4 for s in starts]
    assert mean["y"] == pytest.approx(means, rel=1e-4) and high["y"][308] == 5e5
    assert low["y"] == pytest.approx([s + 1 for s in starts], rel=1e-4)
    [heat] = traces(browser, "map GradNorm")
    assert len(heat["z"]) == 200 and len(heat["z"][0]) <= 250 and heat["x"] == [*range(0, 3009, 16)]
    assert "mean of up to 16 steps" in text(browser, "#maps .says") and "up to 4 steps" in text(browser, "footer")
    script = """
        const ticks = boxes.get("map GradNorm").plots[0].querySelectorAll(".ytick text");
        const box = (tick) => tick.getBoundingClientRect();
        return [...ticks].map((tick) => [tick.textContent, box(tick).top, box(tick).bottom]);
    """
    labels = browser.execute_script(script)
    assert labels[0][0].startswith("0.attention") and len(labels) >= 20
    edges = sorted((top, bottom) for _, top, bottom in labels)
    assert all(bottom <= top + 1 for (_, bottom), (top, _) in zip(edges, edges[1:], strict=False)), "labels overlap"
    browser.set_window_size(520, 900)
    try:
        until(lambda: browser.execute_script("return boxes.get('Loss').plots[0]._fullLayout.width < 500"), "the width")
        no_overflow(browser)
    finally:
        browser.set_window_size(1500, 1200)
    no_errors(browser)


def test_a_page_that_becomes_wider(tmp_path: Path, browser: Any, serve: Callable[..., str]) -> None:
    """Legends stay above the lines, and what two panels show side by side has the space for its words."""
    for k, name in enumerate(("one", "another one")):
        run = write(tmp_path / name, range(10), 10.0**k)
        long = {"OutputScale": 1.0, "OutputScale.spread": 0.5, "LearningRate.edge": 4.0, "HessMaxEV": 2.0}
        run.write(10, {**long, "HessMaxEV.residual": 0.1, "GradNorm": 1.0}, {})
        run.write(11, long, {})
    browser.get(serve(tmp_path / "one", tmp_path / "another one"))
    until(lambda: len(traces(browser, "Noise tests")) >= 6, "both runs")
    script = """
        const plots = [...boxes.values()].flatMap((box) => box.plots).filter((div) => div.querySelector(".legend"));
        return plots.filter((div) => {
            const top = div.getBoundingClientRect().top + div._fullLayout._size.t;
            return div.querySelector(".legend").getBoundingClientRect().bottom > top;
        }).map((div) => div.closest(".panel").dataset.key);
    """
    try:
        for width in (420, 1500, 1300, 1500):
            browser.set_window_size(width, 1200)
            fits = f"return Math.abs(boxes.get('Loss').plots[0]._fullLayout.width - {width}) < 140 || {width} > 500"
            until(lambda fits=fits: browser.execute_script(fits), "the width")
            time.sleep(0.5)
            assert browser.execute_script(script) == []
            if width == 420:
                places = "return boxes.get('Hardest samples').plots.map((div) => div.getBoundingClientRect().top)"
                above, below = browser.execute_script(places)
                assert below > above + 100
    finally:
        browser.set_window_size(1500, 1200)
    no_errors(browser)


def test_a_report_opens_from_disk(tmp_path: Path, browser: Any) -> None:
    run = write(tmp_path / "run", range(12))
    run.say(Verdict("too noisy", 3, ("0.bias",), "The noise is 3 times the gradient.", "Try a larger batch."))
    browser.get(write_report(tmp_path / "run").as_uri())
    until(lambda: text(browser, "footer"), "the page")
    assert traces(browser, "Loss")[0]["x"] == [*range(12)] and "too noisy in 0.bias" in text(browser, ".verdict")
    until(lambda: traces(browser, "Gradient entries"), "the histogram")
    slide(browser, "Gradient entries", 0)
    until(lambda: text(browser, '[data-key="Gradient entries"] output') == "step 0", "the step")
    assert traces(browser, "Gradient entries")[0]["x"] == [-0.75, -0.25, 0.25, 0.75]
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    no_errors(browser)
