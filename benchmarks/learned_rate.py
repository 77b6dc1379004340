"""The learned step size on tasks new to it: ``python -m benchmarks.learned_rate [tried] [runs] [cost]``.

Writes benchmarks/results/learned-rate.json, and the tables and the figure of docs/learned-rate.md; all three parts
without names. `tried`: many rates with seed 0. `runs`: the best of them and the policies with other seeds. `cost`:
times.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn

import packext as px
from benchmarks.learned_train import COMPARED, OPTIMIZER, SHIPPED, Task, run
from benchmarks.optimizers import alternately
from benchmarks.small_tasks import PROBLEMS, Problem, batches, evaluate
from benchmarks.summary import fill
from packext import optim
from packext.optim.learned import Policy, trained

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "learned-rate.json"
PAGE = HERE.parent / "docs" / "learned-rate.md"
FIGURE = HERE.parent / "docs" / "learned-rate.png"
#: Rates that static ones and cosines are chosen from, and those that the controller starts from.
GRID = [10 ** (k / 2) for k in range(-10, -1)]
FIRST = [1e-6, 1e-4, 1e-2, 1.0]
USUAL = 1e-3
#: Rates are chosen with seed 0 and run with others. Perceptrons run side by side, others one after the other.
SEEDS, FEW = range(1, 10), range(1, 4)
SIDE_BY_SIDE = ("digits, 64-128-128-10", "breast cancer, 30-32-2", "digits, 8 hidden layers of 64")
NAMES = {
    "static": "best static", "cosine": "best cosine", "learned": "learned",
    "shallow": "learned, shallow tasks", "bias": "learned constant",
}  # fmt: skip


class Variant(NamedTuple):
    """A way to set the rate, and the rate that it has or starts from."""

    kind: str
    rate: float


def policy(kind: str) -> Policy:
    if kind == "learned":
        return trained("rmsprop")
    entry = json.loads(COMPARED.read_text())[f"rmsprop-{kind}"]
    return Policy(entry["weights"], entry["discount"], entry["optimizer"], kind)


def rates(variant: Variant, steps: int) -> list[float] | None:
    """Of each step; None where a policy sets them."""
    if variant.kind == "cosine":
        return [variant.rate * (1 + math.cos(math.pi * t / steps)) / 2 for t in range(steps)]
    if variant.kind in ("static", "bias"):
        return [variant.rate] * steps
    return None


def losses(problem: str, variants: list[Variant], seed: int) -> list[float]:
    """Training loss at the end of a run of each variant; infinite for a run that broke."""
    if problem in SIDE_BY_SIDE:
        return together(PROBLEMS[problem], variants, seed)
    return [alone(PROBLEMS[problem], v, seed) for v in variants]


def together(p: Problem, variants: list[Variant], seed: int) -> list[float]:
    torch.manual_seed(seed)
    layers = [(m.weight.detach(), m.bias.detach()) for m in p.model() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
    given = [rates(v, p.steps) for v in variants]
    fixed = torch.tensor([[math.nan] * p.steps if g is None else g for g in given], dtype=torch.float64).T
    weights = torch.tensor(
        [[0.0] * 5 if g else list(policy(v.kind).weights) for g, v in zip(given, variants, strict=True)],
        dtype=torch.float64,
    )
    first = torch.tensor([v.rate for v in variants], dtype=torch.float64)
    x, y = p.data()[0]
    (_, after), _ = run(weights, Task(x, y, layers, batches(p, seed, p.steps), first), fixed)
    return [v if math.isfinite(v) else math.inf for v in after.tolist()]


def made(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    options = {k: v for k, v in OPTIMIZER.items() if k != "class"}
    return getattr(torch.optim, OPTIMIZER["class"])(model.parameters(), lr=rate, **options)


def alone(p: Problem, variant: Variant, seed: int) -> float:
    torch.manual_seed(seed)
    model = p.model()
    optimizer = made(model, variant.rate)
    given = rates(variant, p.steps)
    step = stepper(p, model, optimizer, None if given else policy(variant.kind))
    x, y = p.data()[0]
    for t, index in enumerate(batches(p, seed, p.steps)):
        if given:
            optimizer.param_groups[0]["lr"] = given[t]
        try:
            loss = step(x[index], y[index])
        except px.PackextError:
            return math.inf
        if not math.isfinite(loss):
            return math.inf
    with px.disable():
        loss = evaluate(p, model, 0)[0]
    return loss if math.isfinite(loss) else math.inf


def stepper(p: Problem, model: nn.Module, optimizer: Any, policy: Policy | None) -> Callable[[Any, Any], float]:
    def plain(x: Any, y: Any) -> float:
        optimizer.zero_grad()
        loss = p.losses(model(x), y).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    if policy is None:
        return plain
    px.extend(model)
    controller = optim.LearnedRate(optimizer, policy)

    def learned(x: Any, y: Any) -> float:
        optimizer.zero_grad()
        with optim.emit(controller):
            loss = controller.watch(p.losses(model(x), y)).mean()
            loss.backward()
        optimizer.step()
        return loss.item()

    return learned


def tried(problem: str) -> dict[str, list[float]]:
    values = {"static": GRID, "cosine": GRID, "learned": FIRST}
    variants = [Variant(kind, rate) for kind, grid in values.items() for rate in grid]
    found = iter(losses(problem, variants, 0))
    return {kind: [next(found) for _ in grid] for kind, grid in values.items()}


def runs(problem: str, found: dict[str, list[float]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """With other seeds: the rate that was best with seed 0, the policies, and the constant that was learned."""
    chosen = {kind: GRID[found[kind].index(min(found[kind]))] for kind in ("static", "cosine")}
    chosen |= {"learned": USUAL, "shallow": USUAL, "bias": math.exp(policy("bias").weights[4])}
    variants = [Variant(kind, rate) for kind, rate in chosen.items()]
    each = [losses(problem, variants, seed) for seed in (SEEDS if problem in SIDE_BY_SIDE else FEW)]
    return chosen, {kind: [row[k] for row in each] for k, kind in enumerate(chosen)}


def cost() -> dict[str, Any]:
    """Time of a step with the controller, as a multiple of one without, in turns: the processor's, in one thread."""
    out = {}
    for problem, p in PROBLEMS.items():
        x, y = (t[: p.batch] for t in p.data()[0])
        steps = {}
        for kind in ("plain", "learned"):
            torch.manual_seed(0)
            model = p.model()
            step = stepper(p, model, made(model, USUAL), policy("learned") if kind == "learned" else None)
            steps[kind] = lambda step=step: step(x, y)  # noqa: B023
        out[problem] = alternately(steps, "plain", 30, 3, warmup=3, clock=time.process_time)["learned"]
    return out


# -- the page -------------------------------------------------------------------------------------------


def number(value: float) -> str:
    return "broke" if math.isinf(value) else f"{value:.1e}"


def tables(found: dict[str, Any]) -> dict[str, str]:
    lines = ["| policy | θ | seconds |", "|---|---|---|"]
    for path in (SHIPPED, COMPARED):
        for name, entry in json.loads(path.read_text()).items():
            lines.append(f"| {name} | {', '.join(f'{w:.3f}' for w in entry['weights'])} | {entry['seconds']:.0f} |")
    out = {"policies": "\n".join(lines)}
    if "runs" in found:
        lines = ["| task | " + " | ".join(NAMES.values()) + " | from 1e-6 to 1 |", "|---" * (len(NAMES) + 2) + "|"]
        for problem, row in found["runs"].items():
            cells = [
                f"{number(statistics.median(v))} ({number(min(v))} to {number(max(v))})" for v in map(row.get, NAMES)
            ]
            first = found["tried"][problem]["learned"]
            lines.append(f"| {problem} | {' | '.join(cells)} | {number(min(first))} to {number(max(first))} |")
        out["losses"] = "\n".join(lines)
    if "cost" in found:
        lines = ["| task | time of a step, a plain one's as 1 (quartiles) |", "|---|---|"]
        lines += [f"| {k} | {r['median']:.1f} ({r['low']:.1f} to {r['high']:.1f}) |" for k, r in found["cost"].items()]
        out["cost"] = "\n".join(lines)
    return out


def draw(found: dict[str, dict[str, list[float]]]) -> None:
    """Training loss at the end against the rate at the start, of each task."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    looks = {"static": ("#8a8a8a", "."), "cosine": ("#3b6fb6", "."), "learned": ("#c0392b", "o")}
    for ax, (problem, row) in zip(axes.flat, found.items(), strict=False):
        for kind, (colour, marker) in looks.items():
            where = FIRST if kind == "learned" else GRID
            points = [(x, y) for x, y in zip(where, row[kind], strict=True) if y < 1e2]
            ax.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.2, label=kind)
        ax.set(xscale="log", yscale="log", xticks=[1e-6, 1e-4, 1e-2, 1])
        ax.set_title(problem, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(which="both", labelsize=8)
    for ax in axes[1]:
        ax.set_xlabel("rate at the start", fontsize=9)
    for ax in axes[:, 0]:
        ax.set_ylabel("training loss at the end", fontsize=9)
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.savefig(FIGURE, dpi=110)


def write(found: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    fill(PAGE, tables(found), apart=True)
    if "tried" in found:
        draw(found["tried"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="tried, runs, cost; all by default")
    torch.set_num_threads(1)
    for part in parser.parse_args().parts or ["tried", "runs", "cost"]:
        result: dict[str, Any] = {}
        for problem in PROBLEMS if part != "cost" else ():
            if part == "tried":
                result[problem] = tried(problem)
            else:
                chosen, result[problem] = runs(problem, json.loads(RESULTS.read_text())["tried"][problem])
                print(chosen)
            print(problem, {k: [number(x) for x in v] for k, v in result[problem].items()}, flush=True)
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        write({**found, part: result or cost()})


if __name__ == "__main__":
    main()
