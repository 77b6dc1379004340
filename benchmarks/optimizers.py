"""Optimizers on small problems: ``python -m benchmarks.optimizers [table] [cost] [poisson] [estimators]``.

Writes benchmarks/results/optimizers.json and the tables of docs/optim.md; without names, all of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import packext as px
from benchmarks.problems import PROBLEMS, instantiate
from benchmarks.summary import fill
from packext import optim

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "optimizers.json"
PAGE = HERE.parent / "docs" / "optim.md"
BATCH, EPOCHS, SEEDS = 128, 10, range(42, 47)

# -- the table of the BackPACK paper, on digits ---------------------------------------------------------


def paper(curvature: str) -> tuple[Callable[..., Any], list[float], list[Any]]:
    make = lambda p, lr, damping: optim.Preconditioned(p, curvature, lr, damping)  # noqa: E731
    return make, [0.01, 0.1, 1.0], [1e-4, 1e-3, 1e-2, 1.0]


LOW, HIGH = [1e-3, 3e-3, 0.01, 0.03], [0.03, 0.1, 0.3, 1.0]
DAMPING, DECAYS = [1e-3, 1e-2, 0.1], [0.0, 0.9, 0.99]
#: Of each optimizer: from parameters and two hyperparameters, and the values that are tried of them, 12 pairs each.
OPTIMIZERS: dict[str, tuple[Callable[..., Any], list[float], list[Any]]] = {
    "SGD, momentum": (lambda p, lr, m: torch.optim.SGD(p, lr, momentum=m), HIGH, DECAYS),
    "Adam": (lambda p, lr, b: torch.optim.Adam(p, lr, betas=(0.9, b)), [3e-3, 0.01, 0.03, 0.1], [0.9, 0.99, 0.999]),
    "DiagGGN exact (paper)": paper("diag_ggn_exact"),
    "DiagGGN-MC (paper)": paper("diag_ggn_mc"),
    "KFAC (paper)": paper("kfac"),
    "KFLR (paper)": paper("kflr"),
    "KFAC": (
        lambda p, lr, d: optim.KFAC(p, lr, d, factors_every=5, inverses_every=5), [0.01, 0.03, 0.1, 0.3], DAMPING,
    ),
    "EKFAC": (
        lambda p, lr, d: optim.EKFAC(p, lr, d, scales_every=5, basis_every=20), [0.01, 0.03, 0.1, 0.3], DAMPING,
    ),
    "SINGD": (
        lambda p, lr, b: optim.SINGD(p, lr, every=5, precondition_lr=b), [3e-3, 0.01, 0.03, 0.1], [0.01, 0.03, 0.1],
    ),
    "Sophia": (lambda p, lr, rho: optim.Sophia(p, lr, rho=rho, weight_decay=0.0), LOW, [0.05, 0.5, 5.0]),
    "AdaHessian": (lambda p, lr, eps: optim.AdaHessian(p, lr, eps=eps), [0.01, 0.03, 0.1, 0.3], [1e-6, 1e-4, 1e-2]),
    "M-SVAG": (lambda p, lr, m: optim.MSVAG(p, lr, m), HIGH, DECAYS),
}  # fmt: skip


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    inputs, labels = (torch.tensor(x)[order] / 16).float(), torch.tensor(y)[order]
    return inputs[:1437], labels[:1437], inputs[1437:], labels[1437:]


def train(make: Callable[..., Any], pair: tuple[Any, Any], seed: int) -> dict[str, float]:
    """One run of 64-100-10; a loss that is not finite, or larger than 1e10, ends it."""
    x, y, test_x, test_y = digits()
    torch.manual_seed(seed)
    model, loss_fn = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)), nn.CrossEntropyLoss()
    optimizer = make(model.parameters(), *pair)
    emitting = isinstance(optimizer, optim.Emitting)
    if emitting:
        model, loss_fn = px.extend(model), px.extend(loss_fn)
    order = torch.Generator().manual_seed(seed)
    steps, reached = 0, math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optim.SkippedStep)
        for _ in range(EPOCHS):
            for index in torch.randperm(len(x), generator=order).split(BATCH):
                if len(index) < BATCH:
                    continue
                optimizer.zero_grad()
                try:
                    if emitting:
                        with optim.emit(optimizer):
                            loss = loss_fn(model(x[index]), y[index])
                            loss.backward()
                    else:
                        loss = loss_fn(model(x[index]), y[index])
                        loss.backward()
                    optimizer.step()
                except px.PackextError:  # a factor that is singular: this pair failed
                    return {"loss": math.inf, "accuracy": 0.0, "reached": math.inf}
                steps += 1
                if loss.item() < 0.1 and not math.isfinite(reached):
                    reached = steps
                if not loss.item() < 1e10:
                    return {"loss": math.inf, "accuracy": 0.0, "reached": math.inf}
    with torch.no_grad(), px.disable():
        loss, right = loss_fn(model(x), y), (model(test_x).argmax(1) == test_y).float().mean()
    return {"loss": loss.item(), "accuracy": right.item(), "reached": reached}


def table(say: Callable[[str], None]) -> dict[str, Any]:
    """For each optimizer the best pair by test accuracy (ties by training loss) of one seed, and five runs with it."""
    rows = {}
    for name, (make, one, other) in OPTIMIZERS.items():
        begin = time.perf_counter()
        pairs = list(itertools.product(one, other))
        grid = [train(make, pair, 0) for pair in pairs]
        best = max(range(len(pairs)), key=lambda k: (grid[k]["accuracy"], -grid[k]["loss"]))  # noqa: B023
        runs = [train(make, pairs[best], seed) for seed in SEEDS]
        rows[name] = {"pair": pairs[best], "pairs": len(pairs), "failed": sum(g["accuracy"] < 0.9 for g in grid)}
        rows[name]["runs"] = runs
        say(f"{name}: {pairs[best]} {[round(r['loss'], 5) for r in runs]} {time.perf_counter() - begin:.0f} s")
    # How long a step takes, as a multiple of SGD's: the runs themselves, one after the other, do not tell.
    steps = {name: stepper(OPTIMIZERS[name][0], rows[name]["pair"]) for name in rows}
    for name, ratio in alternately(steps, "SGD, momentum", 15, 20).items():
        rows[name]["step"] = ratio
    return rows


def stepper(make: Callable[..., Any], pair: tuple[Any, Any]) -> Callable[[], None]:
    x, y, _, _ = digits()
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)), nn.CrossEntropyLoss()
    return one_step(model, loss_fn, make(model.parameters(), *pair), x[:BATCH], y[:BATCH])


def one_step(model: Any, loss_fn: Any, optimizer: Any, x: Tensor, y: Tensor) -> Callable[[], None]:
    if not isinstance(optimizer, optim.Emitting):

        def plain() -> None:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()

        return plain
    model, loss_fn = px.extend(model), px.extend(loss_fn)

    def step() -> None:
        optimizer.zero_grad()
        with optim.emit(optimizer):
            loss_fn(model(x), y).backward()
        optimizer.step()

    return step


def alternately(
    steps: dict[str, Callable[[], None]],
    unit: str,
    rounds: int,
    block: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Blocks of steps of each in turn: the median over the rounds of their time over that of `unit`, and quartiles."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for k in range(warmup + rounds):
        for name, step in steps.items():
            begin = clock()
            for _ in range(block):
                step()
            if k >= warmup:
                times[name].append(clock() - begin)
    out = {}
    for name in steps:
        ratios = [a / b for a, b in zip(times[name], times[unit], strict=True)]
        low, mid, high = statistics.quantiles(ratios, n=4, method="inclusive")
        out[name] = {"median": mid, "low": low, "high": high}
    return out


# -- the cost of a step ---------------------------------------------------------------------------------


def cost(say: Callable[[str], None]) -> dict[str, Any]:
    """Steps of 3C3D, factors every 10 steps, in multiples of AdamW's, on 2 threads."""
    torch.set_num_threads(2)
    instance = instantiate(PROBLEMS["3c3d"], torch.device("cpu"))
    made: dict[str, Callable[[Any], Any]] = {
        "AdamW": lambda p: torch.optim.AdamW(p, 1e-3),
        "KFAC": lambda p: optim.KFAC(p, 1e-4),
        "KFAC, separate": lambda p: optim.KFAC(p, 1e-4, bias="separate"),
        "KFAC, separate, reduce": lambda p: optim.KFAC(p, 1e-4, bias="separate", approx="reduce"),
        "Sophia": lambda p: optim.Sophia(p, 1e-4),
    }
    steps = {}
    for name, make in made.items():
        model = instance.copy_model()
        steps[name] = one_step(
            model, nn.CrossEntropyLoss(), make(model.parameters()), instance.inputs, instance.targets
        )
    # With the first three batches of factors inverses are made at once: three blocks of ten steps that do not count.
    found = alternately(steps, "AdamW", 5, 10, warmup=3)
    for name, ratio in found.items():
        say(f"{name}: {ratio['median']:.2f}")
    torch.set_num_threads(1)
    return found


# -- the Poisson problem --------------------------------------------------------------------------------


class Poisson(nn.Module):
    """What a tanh network u `[N, 2] -> [N]` leaves of `Δu + f = 0`, or u itself.

    The network's derivatives along its two inputs are carried forward with its values, by ordinary linear maps and
    elementwise functions (Li et al., 2023, "Forward Laplacian"): a residual of a sample is then a function of the
    parameters like any other, of which packext has the Jacobian.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, width), nn.Linear(width, 1)

    def forward(self, x: Tensor, laplacian: bool = True) -> Tensor:
        z = self.first(x)
        h = torch.tanh(z)
        if not laplacian:
            return self.last(h)[:, 0]
        slope = 1 - h**2
        # Second derivatives of tanh(w x + b) along the inputs sum to tanh'' times |w|².
        curved = -2 * h * slope * self.first.weight.square().sum(1)
        return nn.functional.linear(curved, self.last.weight)[:, 0]


def solution(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x[:, 0]) * torch.sin(math.pi * x[:, 1])


def points() -> tuple[Tensor, Tensor]:
    """A grid of 30 x 30 inside of the unit square, and 30 points on each side."""
    line = (torch.arange(30) + 0.5) / 30
    inside = torch.cartesian_prod(line, line)
    zero, one = torch.zeros(30), torch.ones(30)
    sides = [(line, zero), (line, one), (zero, line), (one, line)]
    return inside, torch.cat([torch.stack(side, 1) for side in sides])


def poisson(say: Callable[[str], None]) -> dict[str, Any]:
    """`Δu = -2 π² sin(πx) sin(πy)` with u = 0 on the boundary: relative L2 error, by optimizer and steps."""
    torch.set_default_dtype(torch.float64)
    line = torch.linspace(0, 1, 50)
    grid = torch.cartesian_prod(line, line)
    truth = solution(grid)
    rows: dict[str, Any] = {}
    for name, steps, rates_tried in (
        ("Adam", 3000, [1e-3, 3e-3, 1e-2, 3e-2, 0.1]),
        ("ENGD-W", 100, [0.0, 1e-10, 1e-8, 1e-6, 1e-4]),
        ("SPRING", 300, [1e-10, 1e-8, 1e-6, 1e-4, 1e-2]),
    ):
        tried = []
        for setting in rates_tried:
            tried.append(solve(name, setting, steps, 0, grid, truth))
        best = min(range(len(tried)), key=lambda k: tried[k]["error"] if math.isfinite(tried[k]["error"]) else math.inf)  # noqa: B023
        runs = [solve(name, rates_tried[best], steps, seed, grid, truth) for seed in range(1, 6)]
        rows[name] = {"setting": rates_tried[best], "steps": steps, "runs": runs}
        say(f"{name}: {rates_tried[best]} {[r['error'] for r in runs]}")
    torch.set_default_dtype(torch.float32)
    return rows


def solve(name: str, setting: float, steps: int, seed: int, grid: Tensor, truth: Tensor) -> dict[str, float]:
    torch.manual_seed(seed)
    inside, boundary = points()
    model, loss_fn = px.extend(Poisson()), px.extend(nn.MSELoss())
    wanted, zero = -2 * math.pi**2 * solution(inside), torch.zeros(len(boundary))

    def parts() -> tuple[Tensor, Tensor]:
        return loss_fn(model(inside), wanted), loss_fn(model(boundary, False), zero)

    def total() -> Tensor:
        return sum(parts(), torch.tensor(0.0))

    if name == "Adam":
        optimizer: Any = torch.optim.Adam(model.parameters(), setting)
    elif name == "ENGD-W":
        optimizer = optim.ENGDW(model.parameters(), damping=setting)
    else:
        optimizer = optim.SPRING(model.parameters(), lr=0.1, damping=setting, momentum=0.9, max_step=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optim.SkippedStep)
        for _ in range(steps):
            optimizer.zero_grad()
            if name == "Adam":
                with px.disable():
                    total().backward()
                optimizer.step()
                continue
            for k in range(2):  # one pass for each set of points
                with optim.emit(optimizer):
                    parts()[k].backward()
            with px.disable():
                optimizer.step(**({"evaluate": total} if name == "ENGD-W" else {}))
    with torch.no_grad(), px.disable():
        error = ((model(grid, False) - truth).norm() / truth.norm()).item()
    return {"error": error}


# -- two estimators of the diagonal ---------------------------------------------------------------------


def estimators(say: Callable[[str], None]) -> dict[str, Any]:
    """Error of one draw of the GGN's diagonal, relative to it, by Gauss-Newton-Bartlett and by each sample."""
    x, y, _, _ = digits()
    torch.manual_seed(0)
    model = px.extend(nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)))
    loss_fn, x, y = px.extend(nn.CrossEntropyLoss()), x[:64], y[:64]
    with px.backpack(px.DiagGGNExact(), attach=False) as results:
        loss_fn(model(x), y).backward()
    exact = torch.cat([r.diag_ggn_exact.flatten() for _, r in results.items()])
    draw = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {"batch": [], "sample": []}
    for _ in range(100):
        with px.backpack(px.DiagGGNMC(generator=draw), attach=False) as results:
            loss_fn(model(x), y).backward()
        mc = torch.cat([r.diag_ggn_mc.flatten() for _, r in results.items()])
        with px.disable():
            logits = model(x)
            labels = torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]
            g = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), list(model.parameters()))
        gnb = len(x) * torch.cat([each.flatten() for each in g]) ** 2
        found["sample"].append(((mc - exact).norm() / exact.norm()).item())
        found["batch"].append(((gnb - exact).norm() / exact.norm()).item())
    out = {k: {"mean": statistics.mean(v), "sd": statistics.stdev(v)} for k, v in found.items()}
    say(str(out))
    return out


# -- the page -------------------------------------------------------------------------------------------


def middle(values: list[float], form: str) -> str:
    return f"{format(statistics.median(values), form)} ({format(min(values), form)} to {format(max(values), form)})"


def tables(found: dict[str, Any]) -> dict[str, str]:
    out = {}
    if "table" in found:
        lines = [
            "| optimizer | chosen pair | training loss | test accuracy | steps to a loss of 0.1 | time of a step |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in found["table"].items():
            runs, pair = row["runs"], ", ".join(f"{v:g}" for v in row["pair"])
            reached = [r["reached"] for r in runs]
            steps = f"{statistics.median(reached):.0f}" if max(reached) < math.inf else "not in all runs"
            lines.append(
                f"| {name} | {pair} | {middle([r['loss'] for r in runs], '.1e')} | "
                f"{middle([r['accuracy'] for r in runs], '.3f')} | {steps} | {row['step']['median']:.1f} |"
            )
        out["table"] = "\n".join(lines)
    if "cost" in found:
        lines = ["| optimizer | time of a step, AdamW's as 1 (quartiles) |", "|---|---|"]
        lines += [f"| {k} | {r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f}) |" for k, r in found["cost"].items()]
        out["cost"] = "\n".join(lines)
    if "poisson" in found:
        lines = ["| optimizer | chosen | steps | relative L2 error |", "|---|---|---|---|"]
        for name, row in found["poisson"].items():
            runs = row["runs"]
            lines.append(
                f"| {name} | {row['setting']:g} | {row['steps']} | {middle([r['error'] for r in runs], '.1e')} |"
            )
        out["poisson"] = "\n".join(lines)
    if "estimators" in found:
        lines = ["| one draw | relative error (standard deviation over 100 draws) |", "|---|---|"]
        names = {"batch": "gradient of the batch, squared", "sample": "gradient of each sample, squared"}
        lines += [f"| {names[k]} | {v['mean']:.2f} ({v['sd']:.2f}) |" for k, v in found["estimators"].items()]
        out["estimators"] = "\n".join(lines)
    return out


def write(found: dict[str, Any], results: Path, page: Path, texts: dict[str, str]) -> None:
    """Keep what was found, and put the tables between their marks on a page."""
    results.write_text(json.dumps(found, indent=1) + "\n")
    fill(page, texts, apart=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {"table": table, "cost": cost, "poisson": poisson, "estimators": estimators}
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="which; all by default")
    chosen = parser.parse_args().parts or list(parts)
    torch.set_num_threads(1)
    for name in chosen:
        result = parts[name](lambda text: print(text, flush=True))
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        found[name] = result
        write(found, RESULTS, PAGE, tables(found))


if __name__ == "__main__":
    main()
