"""Time the live page on a long record of many layers: ``python -m benchmarks.watch`` (about ten minutes)."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from benchmarks import report
from packext.diagnostics import Run, Server
from packext.diagnostics.view.content import Content
from packext.diagnostics.view.server import PIECE

PAGE = Path(__file__).resolve().parent.parent / "docs" / "diagnostics.md"
BEGIN, END = "<!-- watch:begin -->", "<!-- watch:end -->"
WHOLE = (
    "Loss", "Alpha", "Time", "Time.step", "UpdateCurvature", "NormTest", "InnerTest", "OrthoTest", "SampleNorms",
    "NoiseScale.critical_batch", "NoiseScale.trace", "NoiseScale.signal", "HessTrace", "TICDiag", "HessMaxEV",
    "GradHist1d.limit",
)  # fmt: skip
LAYERWISE = ("GradNorm", "UpdateSize", "Distance", "NoiseScale", "GradSNR")


def write(run: Run, steps: range, layers: int, every: int) -> None:
    """Append steps of noise about a falling curve; histograms every so many."""
    names = [f"encoder.blocks.{k // 4}.{('query', 'value', 'hidden', 'output')[k % 4]}.weight" for k in range(layers)]
    keys = [f"{kind}/{name}" for kind in LAYERWISE for name in names]
    generator, shares = np.random.default_rng(steps.start), np.full(100, 0.01)
    for step in track(steps, "writing the record") if len(steps) > 100 else steps:
        level = np.exp(-step / 30_000)
        values: dict[str, Any] = dict.fromkeys((*WHOLE, *LAYERWISE), level)
        values |= zip(keys, (level * np.exp(generator.normal(size=len(keys)))).tolist(), strict=True)
        absent = {}
        for name in names[step % 9 :: 9]:
            del values[f"NoiseScale/{name}"]
            absent[f"NoiseScale/{name}"] = "all noise: the estimate of the true gradient's norm is not positive"
        if step % every == 0:
            values |= {f"GradHist1d/{name}": shares for name in names} | {"GradHist1d": shares}
        run.write(step, values, absent)


class Table:
    """Rows of what was done, how long it took, and what was sent."""

    def __init__(self) -> None:
        self.rows = ["| | time | sent |", "|---|---:|---:|"]

    def add(self, what: str, seconds: float, message: Any = None) -> None:
        size = "–" if message is None else f"{len(gzip.compress(json.dumps(message).encode(), 1)) / 1000:.0f} kB"
        self.rows.append(f"| {what} | {seconds:.2g} s | {size} |")


def reading(path: Path, layers: int, steps: int, table: Table) -> None:
    """What the server does for the first look, for all of the record, and for a step more."""
    content, clock = Content(path), time.process_time
    began = clock()
    content.update(PIECE)
    message = content.message()
    table.add("the first answer", clock() - began, message)
    began = clock()
    while content.update(PIECE):
        pass
    table.add("reading all the rest", clock() - began)
    began = clock()
    message = content.message()
    table.add("an answer with everything", clock() - began, message)
    run, known = Run.open(path), content.revision
    write(run, range(steps, steps + 1), layers, 50)
    began = clock()
    content.update(PIECE)
    message = content.message(known)
    table.add("an answer with one step more", clock() - began, message)
    began = clock()
    message = content.histogram("GradHist1d", 0)
    table.add("a histogram, where the slider is", clock() - began, message)


def drawing(path: Path, table: Table) -> None:
    """What somebody with a browser waits for, on the clock."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    profile = tempfile.mkdtemp()
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1500,1200",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(flag)
    server = Server([path], tell=lambda text: None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    began = time.perf_counter()
    browser.get(server.url)
    for what, script in (
        ("in Chromium: the first drawing", "return document.body.dataset.drawn"),
        ("in Chromium: all is drawn", "return runs[0].more === false && !runs[0].stale"),
    ):
        while not browser.execute_script(script):
            time.sleep(0.05)
        table.add(what, time.perf_counter() - began)
    script = "const began = performance.now(); drawAll(); return performance.now() - began"
    table.add("in Chromium: drawing everything again", browser.execute_script(script) / 1000)
    browser.quit()
    server.shutdown()
    shutil.rmtree(profile, ignore_errors=True)


def main() -> None:
    """Write a record, time what the page does with it, and put the table into the page of the docs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watch", description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        run = Run(path)
        run.begin([])
        write(run, range(options.steps), options.layers, 50)
        sizes = ", ".join(f"`{f.name}` {f.stat().st_size / 1e6:.0f} MB" for f in sorted(path.iterdir()))
        table = Table()
        reading(path, options.layers, options.steps, table)
        drawing(path, table)
    about = report.environment("cpu", 1)
    note = (
        f"{options.steps:,} steps, all of them looked at, {options.layers} layers; {sizes} (histograms every 50 "
        f"steps). Processor time of the server; of the browser, time on the clock. {about['date']}, "
        f"{about['processor']}, load {about['load']:.0f} on {os.cpu_count()} cores, Python {about['python']}: "
        "`python -m benchmarks.watch`."
    )
    before, _, rest = PAGE.read_text().partition(BEGIN)
    text = "\n".join([*table.rows, "", note])
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
    print(text)


if __name__ == "__main__":
    main()
