"""Architecture search on digits: ``python -m benchmarks.search [proxies] [paths] [costs] [tables]``.

Writes benchmarks/results/search.json and the tables of docs/search.md; without names, all of it. "tables" makes the
correlations and tables anew from what was recorded.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from benchmarks import cells
from benchmarks.search_paths import added_table, costs, costs_table, orders_table, paths, paths_table
from benchmarks.summary import fill
from packext.search import PROXIES, scores

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "search.json"
PAGE = HERE.parent / "docs" / "search.md"
CELLS, SEEDS, STEPS, SAMPLES = 60, 3, 100, 60

# -- proxies: does a score before training tell the accuracy after it? -----------------------------------


def proxies(say: Callable[[str], None]) -> dict[str, Any]:
    """Of each cell the accuracies of trained networks, and the scores of untrained ones, of other seeds."""
    (x, y), (choose_x, choose_y), _ = cells.digits()
    rows: list[dict[str, Any]] = []
    seconds: dict[str, list[float]] = {}
    for genotype in cells.genotypes(CELLS):
        row: dict[str, Any] = {"cell": genotype, "accuracy": [], "scores": []}
        for seed in range(SEEDS):
            model = cells.network(genotype, seed)
            begin = time.perf_counter()
            cells.train(model, x, y, STEPS, seed)
            seconds.setdefault("training", []).append(time.perf_counter() - begin)
            row["accuracy"].append(cells.accuracy(model, choose_x, choose_y))
            model = cells.network(genotype, 100 + seed)
            part = slice(seed * SAMPLES, (seed + 1) * SAMPLES)
            begin = time.perf_counter()
            row["scores"].append(scores(model, nn.CrossEntropyLoss(), x[part], y[part]))
            seconds.setdefault("scores", []).append(time.perf_counter() - begin)
        rows.append(row)
        say(f"{len(rows)}: {genotype} {statistics.mean(row['accuracy']):.3f}")
    ratio = statistics.median(a / b for a, b in zip(seconds["training"], seconds["scores"], strict=True))
    return {"cells": rows, "training": ratio, "correlations": correlations(rows)}


def columns(rows: list[dict[str, Any]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Mean accuracies, and of each score the median over seeds, its sign such that more is better."""
    accuracy = np.array([statistics.mean(row["accuracy"]) for row in rows])
    found = {
        name: PROXIES[name].sign * np.array([statistics.median(s[name] for s in row["scores"]) for row in rows])
        for name in PROXIES
    }
    found["grad_sign / parameters"] = found["grad_sign"] / found["parameters"]
    return accuracy, found


def correlations(rows: list[dict[str, Any]], draws: int = 4000) -> dict[str, Any]:
    """Rank correlations, and what they are above that of the number of parameters, with bootstrap intervals.

    Of 95%; of the last also the interval of 99.5%, as ten scores are compared with parameters (FLOPs rank alike here).
    """
    accuracy, found = columns(rows)
    picks = np.random.default_rng(0).integers(len(rows), size=(draws, len(rows)))
    picks[0] = np.arange(len(rows))  # the estimate itself, which stands in front
    taus = {name: kendall(accuracy, values, picks) for name, values in found.items()}
    table = {}
    for name, values in found.items():
        rho, above = spearman(accuracy, values, picks), taus[name] - taus["parameters"]
        table[name] = {
            "tau": [float(taus[name][0]), *interval(taus[name][1:])],
            "rho": [float(rho[0]), *interval(rho[1:])],
            "above": [float(above[0]), *interval(above[1:])],
            "corrected": interval(above[1:], 0.995),
        }
    return table


def kendall(a: np.ndarray, b: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of each resample `[draws]`: scipy's, which would take minutes, from the pairs' signs."""
    signs = [np.sign(v[:, None] - v[None]) for v in (a, b)]
    found = []
    for pick in picks:
        x, y = (s[np.ix_(pick, pick)] for s in signs)
        found.append((x * y).sum() / np.sqrt(np.abs(x).sum() * np.abs(y).sum()))
    return np.array(found)


def spearman(a: np.ndarray, b: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Spearman's rho of each resample `[draws]`."""
    x, y = (stats.rankdata(v[picks], axis=1) for v in (a, b))
    x, y = (v - v.mean(1, keepdims=True) for v in (x, y))
    return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))


def interval(values: np.ndarray, level: float = 0.95) -> list[float]:
    return [float(v) for v in np.quantile(values, [(1 - level) / 2, (1 + level) / 2])]


def proxies_table(results: dict[str, Any]) -> list[str]:
    lines = ["| score | Kendall's tau | Spearman's rho | tau above that of parameters | of 99.5% |", "|---" * 5 + "|"]
    rows = results["correlations"]
    for name in sorted(rows, key=lambda name: -rows[name]["tau"][0]):
        shown = [
            f"{a:.2f} ({low:.2f} to {high:.2f})" for a, low, high in (rows[name][k] for k in ("tau", "rho", "above"))
        ]
        low, high = rows[name]["corrected"]
        shown = [*shown[:2], "", ""] if name == "parameters" else [*shown, f"{low:.2f} to {high:.2f}"]
        lines.append(f"| `{name}` | {' | '.join(shown)} |")
    return lines


# -- writing --------------------------------------------------------------------------------------------


def save(results: dict[str, Any]) -> None:
    """As JSON, with what has no lists in it on a line of its own."""
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda found: " ".join(found.group().split()), json.dumps(results, indent=1))
    RESULTS.write_text(text + "\n")


PARTS: dict[str, Callable[[Callable[[str], None]], dict[str, Any]]] = {
    "proxies": proxies,
    "paths": paths,
    "costs": costs,
}
#: Of each mark in the page, the part and what makes its table.
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "proxies": ("proxies", proxies_table),
    "paths": ("paths", paths_table),
    "costs": ("costs", costs_table),
    "orders": ("costs", orders_table),
    "added": ("costs", added_table),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "tables", []], help="some of the parts")
    parts = parser.parse_args().parts or list(PARTS)
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in parts:
        if part in PARTS:
            results[part] = PARTS[part](print)
        else:
            results["proxies"]["correlations"] = correlations(results["proxies"]["cells"])
        save(results)
    texts = {key: "\n".join(table(results[part])) for key, (part, table) in TABLES.items() if part in results}
    fill(PAGE, texts, apart=True)


if __name__ == "__main__":
    main()
