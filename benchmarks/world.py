"""Training over slow networks: ``python -m benchmarks.world [latency] [bandwidth] [digits] [thousand]``.

As root on Linux: processes are in network namespaces, between which packets are delayed (`benchmarks/network.py`).
Writes benchmarks/results/world.json, the tables of docs/world.md and docs/world.png; without names, all of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.network import Network
from benchmarks.summary import fill
from benchmarks.world_simulation import Schedule, ring, simulate, tree

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "world.json"
PAGE = HERE.parent / "docs" / "world.md"
PICTURE = HERE.parent / "docs" / "world.png"

COMPUTE, LATENCIES = 0.1, (0.0, 0.03, 0.06, 0.12, 0.24, 0.48)
SMALL, LARGE = [64, 100, 10], [64, 512, 512, 10]
SCHEDULES = {
    "synchronous": Schedule(0, 1),
    "DSSGD 0 12": Schedule(0, 12),
    "DSSGD 4 4": Schedule(4, 4),
    "DSSGD 20 12": Schedule(20, 12),
}
NAMES = {
    "synchronous": "synchronous (DDP)",
    "DSSGD 0 12": "local steps: d = 0, T = 12",
    "DSSGD 4 4": "DSSGD, d = 4, T = 4",
    "DSSGD 20 12": "DSSGD, d = 20, T = 12",
    "TopK 0.01": "top-k, 1 %",
    "GaussianK 0.01": "GaussianK, 1 %",
    "DGC 0.01": "DGC, 1 %",
    "ADPSGD": "ADPSGD",
}


def entries(widths: list[int]) -> int:
    return sum((one + 1) * two for one, two in zip(widths, widths[1:], strict=False))


class World:
    """Processes that wait for commands, each in a namespace."""

    def __init__(self, size: int) -> None:
        self.size, self.network = size, Network(size)

    def __enter__(self) -> World:
        self.network.__enter__()
        where = f"{self.network.addresses[0]}:29500"
        command = lambda k: [sys.executable, "-m", "benchmarks.world_worker", str(k), str(self.size), where, "tun0"]  # noqa: E731
        self.processes = [self.network.start(k, command(k)) for k in range(self.size)]
        for p in self.processes:
            assert p.stdout is not None and p.stdout.readline().strip() == "ready"
        return self

    def __exit__(self, *error: Any) -> None:
        for p in self.processes:
            assert p.stdin is not None
            p.stdin.close()
        for p in self.processes:
            p.wait()
        self.network.__exit__(*error)

    def __call__(self, latency: float = 0.0, bandwidth: float = 0.0, **command: Any) -> list[dict[str, Any]]:
        """The answers of all; `traffic` is what left each namespace, in bytes."""
        self.network.latency, self.network.bandwidth = latency, bandwidth
        before = list(self.network.sent)
        for p in self.processes:
            assert p.stdin is not None
            p.stdin.write(json.dumps(command) + "\n")
            p.stdin.flush()
        answers = [json.loads(p.stdout.readline()) for p in self.processes if p.stdout is not None]
        self.network.latency = self.network.bandwidth = 0.0
        time.sleep(0.1)
        for answer, now, then in zip(answers, self.network.sent, before, strict=True):
            answer["traffic"] = now - then
        return answers


def latency(say: Any) -> dict[str, Any]:
    """Efficiency, and what the simulation says of the same."""
    rows: list[dict[str, Any]] = []
    for size in (2, 4):
        with World(size) as world:
            world(do="pace", method="synchronous", widths=SMALL, compute=0.01, warm=1, steps=5)
            for method, schedule in SCHEDULES.items():
                for lat in LATENCIES if size == 4 else (0.0, 0.12, 0.48):
                    warm, steps = (2, 4) if schedule.every == 1 else (3 * schedule.every, 4 * schedule.every)
                    found = world(lat, do="pace", method=method, widths=SMALL, compute=COMPUTE, warm=warm, steps=steps)
                    seconds = max(a["seconds"] for a in found)
                    reduce = ring(size, lat, 4 * entries(SMALL))
                    row = {
                        "workers": size, "method": method, "latency": lat, "seconds": seconds,
                        "efficiency": COMPUTE / seconds, "late": max(a["late"] for a in found), "steps": steps,
                        "simulated": COMPUTE / simulate(size, schedule, COMPUTE, reduce, warm + steps, warm),
                    }  # fmt: skip
                    rows.append(row)
                    say(row)
    return {"rows": rows, "compute": COMPUTE}


def bandwidth(say: Any) -> dict[str, Any]:
    """A network of 10 Mbit/s and 20 ms: bytes, and times as parts of the synchronous one's of the same round."""
    methods = ("synchronous", "TopK 0.01", "GaussianK 0.01", "DGC 0.01", "DSSGD 0 12", "DSSGD 20 12")
    rows: dict[str, dict[str, Any]] = {name: {"method": name, "ratios": []} for name in methods}
    with World(4) as world:
        for turn in range(3):
            first = 0.0
            for name, row in rows.items():
                warm, steps = (24, 24) if name.startswith("DSSGD") else (1, 4)
                pace = {"do": "pace", "method": name, "widths": LARGE, "compute": COMPUTE, "warm": warm}
                found = world(0.02, 1.25e6, **pace, steps=steps)
                seconds = max(a["seconds"] for a in found)
                first = first or seconds
                row["ratios"].append(seconds / first)
                if turn == 0:  # without what is sent at the beginning
                    begun = world(0.02, 1.25e6, **pace, steps=0)
                    sent = [a["traffic"] - b["traffic"] for a, b in zip(found, begun, strict=True)]
                    row["traffic"] = statistics.mean(sent) / steps
                say((row, seconds))
    return {"rows": list(rows.values()), "entries": entries(LARGE), "bandwidth": 1.25e6, "latency": 0.02}


def on_digits(say: Any) -> dict[str, Any]:
    """Loss and accuracy after 300 steps: of each method the best of three rates by one seed, then three other seeds."""
    rows: list[dict[str, Any]] = []
    with World(4) as world:
        for method in NAMES:
            run = lambda lr, seed: world(do="train", method=method, lr=lr, seed=seed, steps=300)[0]  # noqa: B023, E731
            grid = {lr: run(lr, 0)["loss"] for lr in (0.01, 0.03, 0.1)}
            best = min(grid, key=lambda lr: grid[lr])  # noqa: B023
            row = {"method": method, "lr": best, "grid": grid, "runs": [run(best, seed) for seed in (1, 2, 3)]}
            rows.append(row)
            say(row)
    return {"rows": rows, "steps": 300, "workers": 4}


def thousand(say: Any) -> dict[str, Any]:
    """The simulation alone, for up to 1000 workers with steps that vary."""
    rows: list[dict[str, Any]] = []
    for size in (2, 4, 10, 30, 100, 300, 1000):
        for name, hops in (("ring", ring), ("tree", tree)):
            for method, schedule in SCHEDULES.items():
                reduce = hops(size, 0.48)
                warm, steps = (
                    2 * schedule.every + schedule.delay,
                    2 * schedule.every + schedule.delay + 5 * schedule.every,
                )
                seconds = simulate(size, schedule, 0.3, reduce, steps, warm, jitter=0.1)
                rows.append({"workers": size, "network": name, "method": method, "efficiency": 0.3 / seconds})
        say(rows[-1])
    return {"rows": rows, "compute": 0.3, "jitter": 0.1, "latency": 0.48}


# -- what is written -------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    if "latency" in results:
        rows = [r for r in results["latency"]["rows"] if r["workers"] == 4]
        head = "| latency, one way | " + " | ".join(NAMES[m] for m in SCHEDULES) + " |"
        out["latency"] = [head, "|---" * (len(SCHEDULES) + 1) + "|"]
        for lat in LATENCIES:
            cells = [next(r for r in rows if (r["method"], r["latency"]) == (m, lat)) for m in SCHEDULES]
            text = " | ".join(f"{c['efficiency']:.3f} ({c['simulated']:.3f})" for c in cells)
            out["latency"].append(f"| {1000 * lat:.0f} ms | {text} |")
        all_rows = results["latency"]["rows"]
        off = sorted(abs(r["simulated"] / r["efficiency"] - 1) for r in all_rows)
        slow = max(all_rows, key=lambda r: abs(r["simulated"] / r["efficiency"] - 1))
        out["check"] = [
            f"Over all {len(all_rows)} runs, with 2 and 4 processes, the simulated efficiency differs from the "
            f"measured one by {100 * statistics.median(off):.1f} % in the median and by {100 * off[-1]:.0f} % at most "
            f"({NAMES[slow['method']]}, {slow['workers']} processes, {1000 * slow['latency']:.0f} ms)."
        ]
    if "bandwidth" in results:
        out["bandwidth"] = ["| method | bytes a step | time of a step, the synchronous one's as 1 |", "|---|---|---|"]
        for r in results["bandwidth"]["rows"]:
            text = f"{statistics.median(r['ratios']):.2f} ({min(r['ratios']):.2f} to {max(r['ratios']):.2f})"
            out["bandwidth"].append(f"| {NAMES[r['method']]} | {r['traffic']:,.0f} | {text} |")
    if "digits" in results:
        out["digits"] = ["| method | rate | training loss | test accuracy | payload a step |", "|---|---|---|---|---|"]
        for r in results["digits"]["rows"]:
            loss, right = ([run[k] for run in r["runs"]] for k in ("loss", "accuracy"))
            payload = r["runs"][0]["payload"] / results["digits"]["steps"]
            out["digits"].append(
                f"| {NAMES[r['method']]} | {r['lr']} | {statistics.median(loss):.1e} "
                f"({min(loss):.1e} to {max(loss):.1e}) | {statistics.median(right):.3f} "
                f"({min(right):.3f} to {max(right):.3f}) | {payload:,.0f} |"
            )
    if "thousand" in results:
        sizes = sorted({r["workers"] for r in results["thousand"]["rows"]})
        out["thousand"] = [
            "| workers | " + " | ".join(f"{NAMES[m]}, {n}" for n in ("ring", "tree") for m in SCHEDULES) + " |"
        ]
        out["thousand"].append("|---" * (2 * len(SCHEDULES) + 1) + "|")
        for size in sizes:
            rows = [r for r in results["thousand"]["rows"] if r["workers"] == size]
            cells = [
                next(r["efficiency"] for r in rows if (r["network"], r["method"]) == (n, m))
                for n in ("ring", "tree")
                for m in SCHEDULES
            ]
            out["thousand"].append(
                f"| {size} | " + " | ".join(f"{c:.4f}" if c < 0.01 else f"{c:.3f}" for c in cells) + " |"
            )
    return out


def picture(results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours = dict(zip(SCHEDULES, ("#444444", "#e08214", "#1b9e77", "#3b6fb6"), strict=True))
    rows = [r for r in results["latency"]["rows"] if r["workers"] == 4]
    for method, schedule in SCHEDULES.items():
        mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r["latency"])
        fine = [k / 500 for k in range(251)]
        curve = [COMPUTE / simulate(4, schedule, COMPUTE, ring(4, lat, 4 * entries(SMALL)), 84, 36) for lat in fine]
        left.plot([1000 * v for v in fine], curve, color=colours[method], lw=1)
        left.plot([1000 * r["latency"] for r in mine], [r["efficiency"] for r in mine], "o", color=colours[method],
                  label=NAMES[method])  # fmt: skip
        for network, style in (("ring", "-"), ("tree", "--")):
            many = [r for r in results["thousand"]["rows"] if (r["method"], r["network"]) == (method, network)]
            right.plot(
                [r["workers"] for r in many], [r["efficiency"] for r in many], style, color=colours[method], lw=1.3
            )
    left.set(
        xlabel="latency, one way [ms]",
        ylabel="efficiency",
        yscale="log",
        title="4 processes: runs, and simulation (lines)",
    )
    right.set(xlabel="workers", ylabel="efficiency", xscale="log", yscale="log",
              title="480 ms: simulated; ring (solid), tree (dashed)")  # fmt: skip
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.5)
    figure.savefig(PICTURE, dpi=110)


def write(results: dict[str, Any]) -> None:
    fill(PAGE, {key: "\n".join(lines) for key, lines in tables(results).items()}, apart=True)
    if {"latency", "thousand"} <= results.keys():
        picture(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {"latency": latency, "bandwidth": bandwidth, "digits": on_digits, "thousand": thousand}
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="which; all by default")
    chosen = parser.parse_args().parts or list(parts)
    for name in chosen:
        found = parts[name](lambda row: print(row, flush=True))
        results = {**(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}), name: found}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
