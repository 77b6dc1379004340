"""Do compiled reductions of tiles pay? Sums of squares, sums and norms of rows, eager and by torch.compile (inductor).

    python -m benchmarks.compiled            # measure, and write results/compiled-cpu.json and the table
    python -m benchmarks.compiled --page     # the table in docs/performance.md alone

One thread. Both sides get the same tile, hot in cache as `packext._statistics` meets it, and turns alternate
(A B A B): numbers are medians of ratios of neighbouring turns, with their quartiles. Compiling is left out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.summary import ROOT, fill
from packext._scratch import TILE
from packext._statistics import _add_rows, _add_squares

RESULTS = Path(__file__).parent / "results" / "compiled-cpu.json"
#: Outputs and inputs of a sample's row, and the positions that it is a sum over.
SHAPES = {
    "convolution 16 to 32, 3x3": (32, 144, 1024),
    "convolution 64 to 96, 3x3": (96, 576, 256),
    "convolution 192 to 192, 3x3": (192, 1728, 64),
    "linear 256 to 1024": (1024, 256, 64),
}
TURNS = 40


def eager(rows: Tensor, second: Tensor, total: Tensor) -> Tensor:
    """What `Statistics._tiles` does with a tile."""
    norms = torch.linalg.vector_norm(rows.reshape(len(rows), -1), dim=1)
    _add_rows(rows, total, False)
    _add_squares(rows, second, False)
    return norms


def fused(rows: Tensor, second: Tensor, total: Tensor) -> Tensor:
    """The same, written for a compiler to fuse."""
    squares = rows * rows
    second.add_(squares.sum(0))
    total.add_(rows.sum(0))
    return squares.flatten(1).sum(1).sqrt()


def turn(f: Callable[..., Any], *tensors: Tensor) -> float:
    """Seconds of this thread's processor that a turn of several calls takes, whatever else runs."""
    start = time.thread_time()
    for _ in range(4):
        f(*tensors)
    return time.thread_time() - start


@torch.no_grad()
def measure() -> dict[str, dict[str, Any]]:
    """Ratios of times, compiled over eager, for each shape: of the reductions, and with the product before them."""
    torch.set_num_threads(1)
    found = {}
    for name, (outputs, inputs, positions) in SHAPES.items():
        m = max(1, TILE // (outputs * inputs))
        g, a = torch.randn(m, outputs, positions), torch.randn(m, inputs, positions)
        rows = g @ a.mT
        torch.compiler.reset()
        sides = [
            (f, torch.zeros_like(rows[0]), torch.zeros_like(rows[0]))
            for f in (eager, torch.compile(fused, dynamic=False))
        ]
        norms = [f(rows, *sums) for f, *sums in sides]
        torch.testing.assert_close(*norms, rtol=1e-4, atol=0)
        torch.testing.assert_close(sides[0][1:], sides[1][1:], rtol=1e-4, atol=1e-2)
        turns = []
        for _ in range(TURNS):
            product = turn(lambda g, a, out: torch.matmul(g, a.mT, out=out), g, a, rows)
            turns.append([product] + [turn(f, rows, *sums) for f, *sums in sides])
        product, before, after = torch.tensor(turns, dtype=torch.float64).T
        quartiles = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
        found[name] = {
            "rows": m,
            "positions": positions,
            "reductions": (after / before).quantile(quartiles).tolist(),
            "tile": ((product + after) / (product + before)).quantile(quartiles).tolist(),
        }
        print(name, found[name], flush=True)
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| rows of | positions | rows in a tile | reductions | with the product before |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, f in found.items():
        ratios = [f"{k:.2f} ({low:.2f} to {high:.2f})" for k, low, high in (f["reductions"], f["tile"])]
        lines.append(f"| {name} | {f['positions']} | {f['rows']} | {' | '.join(ratios)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--page" not in sys.argv[1:]:
        about = {"torch": torch.__version__, "threads": 1, "turns": TURNS}
        RESULTS.write_text(json.dumps({**about, "found": measure()}, indent=1) + "\n")
    fill(ROOT / "docs" / "performance.md", {"compiled": table(json.loads(RESULTS.read_text())["found"])})
