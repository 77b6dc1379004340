"""The tables of docs/controllers.md, from what `benchmarks.controllers` has found."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.optimizers import middle


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def tables(found: dict[str, Any]) -> dict[str, str]:
    out = {}
    if "batches" in found:
        rows = []
        for name, row in found["batches"].items():
            runs = row["runs"]
            cells = [("loss", ".1e"), ("accuracy", ".3f"), ("updates", ".0f"), ("last", ".0f")]
            chosen = f"{row['pair'][0]:g}, {row['pair'][1]:g}" + (" (not chosen)" if row["pairs"] == 1 else "")
            rows.append([name, chosen, *(middle([r[k] for r in runs], form) for k, form in cells)])
        head = ["batch size", "rate, number", "training loss", "test accuracy", "updates", "last batch size"]
        out["batches"] = _table(head, rows)
    if "rates" in found:
        rows = []
        for rate in found["rates"]["SGD"]:
            cells = []
            for kind in found["rates"]:
                runs = found["rates"][kind][rate]
                cells.append(middle([r["loss"] for r in runs], ".2g"))
                if kind != "SGD":
                    cells.append(f"{statistics.median(r['last'] for r in runs):.2g}")
                if kind == "line search":
                    cells.append(f"{statistics.median(r['calls'] for r in runs):.2f}")
            rows.append([rate, *cells])
        head = ["first rate", "SGD", "line search", "its last step", "passes a step", "Alpha", "its last rate"]
        out["rates"] = _table(head, rows)
    if "slopes" in found:
        rows = [[step, middle(values, ".1f")] for step, values in found["slopes"].items()]
        out["slopes"] = _table(["after steps", "exact variance over that of uncorrelated entries"], rows)
    if "importance" in found:
        rows = []
        for epoch, runs in found["importance"].items():
            rows.append([epoch, *(middle([r[k] for r in runs], ".3f") for k in ("sampler", "fresh", "predicted"))])
        out["importance"] = _table(["after epochs", "as it draws", "with fresh norms", "its `ratio`"], rows)
    if "stopping" in found:
        rows = []
        for name, runs in found["stopping"].items():
            share = middle([r["stop"] / max(r["best"], 1) for r in runs], ".2f")
            cells = [middle([r[k] for r in runs], ".0f") for k in ("stop", "best")]
            losses = [f"{statistics.median(r[k] for r in runs):.3f}" for k in ("at_stop", "at_best", "at_end")]
            rows.append([name, *cells, share, *losses])
        head = [
            "problem",
            "says stop at",
            "best at",
            "the one over the other",
            "test loss at stop",
            "at best",
            "at the end",
        ]
        out["stopping"] = _table(head, rows)
    if "cost" in found:
        problems = list(found["cost"])
        rows = []
        for name in found["cost"][problems[0]]:
            cells = [found["cost"][p][name] for p in problems]
            rows.append([name, *(f"{c['median']:.2f} ({c['low']:.2f} to {c['high']:.2f})" for c in cells)])
        out["cost"] = _table(["a step with", *problems], rows)
    return out
