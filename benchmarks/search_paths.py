"""The search of paths on digits, next to random search: a part of ``python -m benchmarks.search``."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.benchmark import Timer

from benchmarks import cells
from packext.search import LatencyTable, MixedOp, ProxylessNAS, Race

BATCH, WARMUP, ROUNDS, EVERY = 50, 200, 300, 2
#: In passes: a step of the architecture counts as two of the weights (see `costs` for what it takes in time).
ARCHITECTURE = 2
FINAL, CANDIDATES = 400, (50, 100)  # steps of a network that was found, and of a candidate of random search
RATE, TRADEOFF, SEEDS = 0.05, 0.1, range(2)
SIZES = {"conv1": 1, "conv3": 3, "conv5": 5}
NAMES = ("conv1", "conv3", "conv5", "separable", "pool", "skip")
EDGES = {"2": 12, "3": 12, "5": 24, "6": 24}


def operation(name: str, channels: int) -> nn.Module:
    if name == "separable":
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        return nn.Sequential(nn.ReLU(), depthwise, pointwise, nn.GroupNorm(4, channels))
    return cells.convolution(channels, channels, SIZES[name]) if name in SIZES else cells.operation(name, channels)


def network(edge: Callable[[str, int], nn.Module], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.GroupNorm(4, 12), edge("2", 12), edge("3", 12),
        cells.convolution(12, 24, 3, stride=2), edge("5", 24), edge("6", 24),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


def supernet(seed: int) -> nn.Sequential:
    return network(lambda edge, channels: MixedOp({name: operation(name, channels) for name in NAMES}), seed)


def plain(path: dict[str, str], seed: int) -> nn.Sequential:
    return network(lambda edge, channels: operation(path[edge], channels), seed)


def seconds(table: LatencyTable, path: dict[str, str]) -> float:
    return sum(table.seconds[edge][name] for edge, name in path.items())


def objective(model: nn.Module, x: Tensor, y: Tensor, slow: float) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y)) + TRADEOFF * slow


def search(seed: int, table: LatencyTable, prune: bool) -> dict[str, Any]:
    """Weights on 600 images, the architecture on 597 others; ends when each edge is decided."""
    (x, y), (choose_x, choose_y), _ = cells.digits()
    net = supernet(seed)
    found = ProxylessNAS(net, nn.CrossEntropyLoss(), lr=RATE, latency=table, tradeoff=TRADEOFF, prune=prune, seed=seed)
    optimizer = torch.optim.SGD(found.weights(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    draw, passes, certain, gradients = torch.Generator().manual_seed(seed), 0, 0, 0
    for step in range(WARMUP + ROUNDS * EVERY):
        index = torch.randint(len(x), (BATCH,), generator=draw)
        found.sample()
        optimizer.zero_grad()
        F.cross_entropy(net(x[index]), y[index]).backward()
        optimizer.step()
        passes += 1
        if step >= WARMUP and step % EVERY == 0:
            index = torch.randint(len(choose_x), (BATCH,), generator=draw)
            gates = found.step(choose_x[index], choose_y[index])
            passes += ARCHITECTURE
            gradients, certain = gradients + len(gates), certain + sum(g.certain for g in gates)
            if found.decided:
                break
    return {
        "path": found.chosen(), "passes": passes, "steps": found.steps, "pruned": len(found.pruned),
        "certain": certain / gradients, "probability": min(net[int(e)].probabilities().max().item() for e in EDGES),
    }  # fmt: skip


def candidates(seed: int, table: LatencyTable, budget: int, reference: float, steps: int) -> dict[str, Any]:
    """Random search: as many candidates as the budget trains, the best by the same objective on the 597 images."""
    (x, y), (choose_x, choose_y), _ = cells.digits()
    draw, best = random.Random(seed), (float("inf"), {})
    for k in range(budget // steps):
        path = {edge: draw.choice(NAMES) for edge in EDGES}
        model = plain(path, 1000 * seed + k)
        cells.train(model, x, y, steps, 1000 * seed + k, batch=BATCH)
        value = objective(model, choose_x, choose_y, seconds(table, path) / reference)
        best = min(best, (value, path), key=lambda pair: pair[0])
    return {"path": best[1], "passes": budget // steps * steps}


def final(path: dict[str, str], seed: int, table: LatencyTable, reference: float) -> dict[str, float]:
    """The network of a path, trained anew, on 600 images that nothing was chosen by."""
    (x, y), _, (test_x, test_y) = cells.digits()
    model, slow = plain(path, 500 + seed), seconds(table, path) / reference
    cells.train(model, x, y, FINAL, 500 + seed, batch=BATCH)
    return {
        "objective": objective(model, test_x, test_y, slow), "latency": slow,
        "accuracy": cells.accuracy(model, test_x, test_y),
    }  # fmt: skip


def paths(say: Callable[[str], None]) -> dict[str, Any]:
    x = cells.digits()[0][0][:BATCH]
    table = LatencyTable.measure(supernet(0), x)
    with torch.no_grad():
        reference = float(table.expected(supernet(0)))
    results: dict[str, Any] = {"table": table.seconds, "about": table.about, "reference": reference}
    results["runs"] = {}
    budget = WARMUP + ROUNDS * (EVERY + ARCHITECTURE)
    for seed in SEEDS:
        path = {edge: random.Random(100 + seed).choice(NAMES) for edge in EDGES}
        for name, found in (
            ("gates, pruned", lambda seed=seed: search(seed, table, True)),
            ("gates, not pruned", lambda seed=seed: search(seed, table, False)),
            *(
                (f"random search, {n} steps", lambda seed=seed, n=n: candidates(seed, table, budget, reference, n))
                for n in CANDIDATES
            ),
            ("a random path", lambda path=path: {"path": path, "passes": 0}),
        ):
            run = found()
            run |= final(run["path"], seed, table, reference)
            results["runs"].setdefault(name, []).append(run)
            say(f"{seed} {name}: {run}")
    return results


def saved(run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass, but for parameters."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        alive = run()
    del alive
    return sum(kept.values())


def costs(say: Callable[[str], None]) -> dict[str, Any]:
    """Memory of a pass of the largest path, of a step of the architecture and of all paths; and times, in turns."""
    x, y = (part[:BATCH] for part in cells.digits()[0])
    net = supernet(0)
    found = ProxylessNAS(net, nn.CrossEntropyLoss(), prune=False)
    mixed = [net[int(e)] for e in EDGES]

    def path(k: int) -> Tensor:
        for m in mixed:
            m.active = k
        return net(x)

    def everything() -> Tensor:
        h = x
        for m in net:
            if m in mixed:
                h = sum(p * op(h) for p, op in zip(m.probabilities().float(), m.ops.values(), strict=True))
            else:
                h = m(h)
        return h

    def weights() -> None:
        found.sample()
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()

    def both() -> None:
        found.step(x, y)

    def summed() -> None:
        net.zero_grad()
        F.cross_entropy(everything(), y).backward()

    both()
    kept = {
        "one path, the largest": max(saved(lambda k=k: path(k)) for k in range(len(NAMES))),
        "a step of the architecture, the largest of 50": max(saved(both) for _ in range(50)),
        "a sum over all paths": saved(everything),
    }
    times: dict[str, list[float]] = {"weights": [], "architecture": [], "all": []}
    for _ in range(100):
        for name, run in (("weights", weights), ("architecture", both), ("all", summed)):
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    ratios = {
        name: statistics.median(t / base for t, base in zip(values, times["weights"], strict=True))
        for name, values in times.items()
    }
    results = {"bytes": kept, "time": ratios, "added": added(x), "orders": orders()}
    say(str(results))
    return results


def added(x: Tensor) -> dict[str, float]:
    """Whether latencies add up: times of 20 random paths as networks, next to sums of their operations' times.

    In seconds of the processor, which other processes on the machine do not lengthen as they do wall time.
    """
    draw = random.Random(0)
    drawn = [{edge: draw.choice(NAMES) for edge in EDGES} for _ in range(20)]
    models = [plain(path, 0).eval() for path in drawn]
    net, inputs = supernet(0).eval(), {}
    for edge in EDGES:
        net[int(edge)].active = 0
        net[int(edge)].register_forward_pre_hook(lambda m, args, edge=edge: inputs.update({edge: args[0]}))
    with torch.no_grad():
        net(x)
        ops = {(edge, name): (net[int(edge)].ops[name], inputs[edge]) for edge in EDGES for name in NAMES}
        timed = [*ops.values(), *((model, x) for model in models)]
        least = [float("inf")] * len(timed)
        for _ in range(30):
            for k, (module, given) in enumerate(timed):
                timer = Timer("m(x)", globals={"m": module, "x": given}, timer=time.process_time)
                least[k] = min(least[k], timer.timeit(10).median)
    of = dict(zip(ops, least, strict=False))
    fit: Any = stats.linregress([sum(of[pair] for pair in path.items()) for path in drawn], least[len(ops) :])
    return {"pearson": float(fit.rvalue), "slope": float(fit.slope)}


def orders() -> dict[str, Any]:
    """Differences of losses, next to what gates say of them with one operation active, the other, or both in turn."""
    (x, y), (choose_x, choose_y), _ = cells.digits()
    net = supernet(0)
    found = ProxylessNAS(net, nn.CrossEntropyLoss(), prune=False)
    optimizer = torch.optim.SGD(found.weights(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    draw = torch.Generator().manual_seed(0)
    for _ in range(WARMUP + 300):
        index = torch.randint(len(x), (BATCH,), generator=draw)
        found.sample()
        optimizer.zero_grad()
        F.cross_entropy(net(x[index]), y[index]).backward()
        optimizer.step()
    rows = []
    for edge in EDGES:
        for a, b in combinations(range(len(NAMES)), 2):
            found.sample()
            true, race = {}, Race(len(NAMES), 0.05)
            for active, other in ((a, b), (b, a)):
                net[int(edge)].active = active
                taken: list[Tensor] = []
                handle = net[int(edge)].register_forward_hook(lambda m, i, o, taken=taken: taken.extend((*i, o)))
                loss = F.cross_entropy(net(choose_x), choose_y, reduction="none")
                handle.remove()
                (slope,) = torch.autograd.grad(loss.sum(), taken[1])
                with torch.no_grad():
                    difference = taken[1] - net[int(edge)].run(other, taken[0])
                true[active] = loss.detach()
                race.add(active, other, (slope * difference).flatten(1).sum(1))
            rows.append([float((true[a] - true[b]).mean()), float(race._mean[a, b]), -float(race._mean[b, a])])
    want, first, second = torch.tensor(rows).double().T
    both = (first + second) / 2
    size = float(want.abs().mean())
    return {
        "difference": size,
        "one": float(torch.cat([first - want, second - want]).abs().mean()) / size,
        "both": float((both - want).abs().mean()) / size,
        "sign, one": float((torch.cat([first * want, second * want]) > 0).double().mean()),
        "sign, both": float((both * want > 0).double().mean()),
    }


def paths_table(results: dict[str, Any]) -> list[str]:
    lines = [
        "| found by | objective | test accuracy | latency | passes | pruned | certain gradients |",
        "|---" * 7 + "|",
    ]
    for name, runs in results["runs"].items():
        shown = [spread([run[key] for run in runs]) for key in ("objective", "accuracy", "latency")]
        passes = f"{statistics.mean(run['passes'] for run in runs):.0f}"
        pruned = certain = ""
        if "pruned" in runs[0]:
            pruned = f"{statistics.mean(run['pruned'] for run in runs):.1f} of 20"
            certain = f"{statistics.mean(run['certain'] for run in runs):.0%}"
        lines.append(f"| {name} | {' | '.join(shown)} | {passes} | {pruned} | {certain} |")
    return lines


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def costs_table(results: dict[str, Any]) -> list[str]:
    kept, times = results["bytes"], results["time"]
    lines = ["| of 50 digits | kept for the backward pass | time |", "|---|---|---|"]
    for (name, size), ratio in zip(kept.items(), times.values(), strict=True):
        lines.append(f"| {name} | {size / 1e6:.2f} MB | {ratio:.1f} |")
    return lines


def orders_table(results: dict[str, Any]) -> list[str]:
    o = results["orders"]
    lines = ["| difference of two operations' losses, by gates | mean error, in mean differences | sign is right |"]
    lines.append("|---|---|---|")
    for name, key in (("with one of the two active", "one"), ("mean of both orders", "both")):
        lines.append(f"| {name} | {o[key]:.2f} | {o[f'sign, {key}']:.0%} |")
    return lines


def added_table(results: dict[str, Any]) -> list[str]:
    a = results["added"]
    return ["| correlation | slope |", "|---|---|", f"| {a['pearson']:.3f} | {a['slope']:.2f} |"]
