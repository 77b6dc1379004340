"""The benchmark of cells on digits, in small, and what was recorded of it in full."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from torch import nn

from packext.search import scores

cells = pytest.importorskip("benchmarks.cells", reason="the source distribution has no benchmarks")
ROOT = Path(__file__).parent.parent


def recorded() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "search.json").read_text())


def spread(count: int) -> list[dict[str, Any]]:
    """Cells of the record, evenly from the worst to the best."""
    rows = sorted(recorded()["proxies"]["cells"], key=lambda row: statistics.mean(row["accuracy"]))
    return [rows[round(k * (len(rows) - 1) / (count - 1))] for k in range(count)]


def test_scores_tell_the_accuracy_after_training() -> None:
    (x, y), (choose_x, choose_y), _ = cells.digits()
    accuracy, found = [], []
    for row in spread(6):
        model = cells.network(tuple(row["cell"]), 7)
        found.append(scores(model, nn.CrossEntropyLoss(), x[:32], y[:32], ["grad_sign", "ntk_condition", "parameters"]))
        cells.train(model, x, y, 40, 7, batch=32)
        accuracy.append(cells.accuracy(model, choose_x, choose_y))
    tau = {name: stats.kendalltau([f[name] for f in found], accuracy).statistic for name in found[0]}
    assert tau["grad_sign"] > 0.4 and tau["ntk_condition"] < -0.3 and tau["parameters"] > 0.2, tau


def test_scores_are_those_that_were_recorded() -> None:
    (x, y), _, _ = cells.digits()
    for row in spread(2):
        model = cells.network(tuple(row["cell"]), 100)
        got, want = scores(model, nn.CrossEntropyLoss(), x[:60], y[:60]), row["scores"][0]
        assert got.keys() == want.keys()
        for name in got:  # signs of gradients that are zero but for rounding differ between machines
            assert got[name] == pytest.approx(want[name], rel=1e-3 if name == "grad_sign" else 1e-6), name


def test_tables_are_made_of_what_was_recorded() -> None:
    from benchmarks.search import TABLES, columns

    page, results = (ROOT / "docs" / "search.md").read_text(), recorded()
    for key, (part, table) in TABLES.items():
        shown = page.split(f"<!-- {key}: begin -->")[1].split(f"<!-- {key}: end -->")[0]
        assert shown.strip().splitlines() == table(results[part]), key
    rows = results["proxies"]["correlations"]
    accuracy, values = columns(results["proxies"]["cells"])
    for name, row in rows.items():
        assert row["tau"][0] == pytest.approx(stats.kendalltau(accuracy, values[name]).statistic)
        assert row["rho"][0] == pytest.approx(stats.spearmanr(accuracy, values[name]).statistic)
    above = {name for name, row in rows.items() if row["above"][1] > 0}
    assert above == {"grad_sign"} and rows["fisher"]["above"][2] < 0  # what the page says of them
