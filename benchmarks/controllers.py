"""Controllers on small problems: ``python -m benchmarks.controllers [batches] [rates] [slopes] [importance] [stopping] [cost]``.

Writes benchmarks/results/controllers.json and the tables of docs/controllers.md; without names, all of it.
"""  # noqa: E501 - one line that can be copied

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.data import RandomSampler

import packext as px
from benchmarks.controllers_page import tables
from benchmarks.optimizers import alternately, digits, write
from benchmarks.problems import PROBLEMS, instantiate
from packext import optim

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "controllers.json"
PAGE = HERE.parent / "docs" / "controllers.md"
SEEDS = range(1, 6)
Say = Callable[[str], None]


def perceptron(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return px.extend(nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)))


def scores(model: nn.Module) -> dict[str, float]:
    x, y, test_x, test_y = digits()
    with torch.no_grad(), px.disable():
        loss = cross_entropy(model(x), y).item()
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    return {"loss": loss if loss < 1e10 else math.inf, "accuracy": accuracy}


# -- batch sizes ----------------------------------------------------------------------------------------------

EPOCHS = 5


class Fixed:
    """A batch size that stays."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size


#: Of each way to choose a batch size: from an optimizer and a number, and the numbers that are tried; with each of them
#: each of the learning rates.
BATCHES: dict[str, tuple[Callable[[Any, Any], Any], list[Any]]] = {
    "fixed": (lambda o, b: Fixed(b), [16, 64, 256]),
    "CABS": (lambda o, b: optim.CABS(o, b), [2, 4, 16]),
    "NoiseScale": (lambda o, decay: optim.NoiseScale(16, 1024, decay), [0.5, 0.9, 0.98]),
    "NormTest": (lambda o, theta: optim.NormTest(16, 1024, theta), [0.5, 0.9, 2.0]),
    "InnerProductTest": (lambda o, theta: optim.InnerProductTest(16, 1024, theta), [0.5, 0.9, 2.0]),
}
RATES = [0.3, 1.0, 3.0]


def with_batches(make: Callable[[Any, Any], Any], rate: float, number: Any, seed: int) -> dict[str, float]:
    x, y, _, _ = digits()
    model, loss_fn = perceptron(seed), px.extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), rate)
    control = make(optimizer, number)
    draw = torch.Generator().manual_seed(seed)
    sampler = optim.AdaptiveBatchSampler(RandomSampler(range(len(x)), generator=draw), control, drop_last=True)
    used = updates = 0
    while used < EPOCHS * len(x):
        for batch in sampler:
            optimizer.zero_grad()
            if isinstance(control, Fixed):
                loss_fn(model(x[batch]), y[batch]).backward()
                optimizer.step()
            else:
                with optim.emit(control):
                    loss = loss_fn(model(x[batch]), y[batch])
                    loss.backward()
                optimizer.step()
                control.step(*([loss] if isinstance(control, optim.CABS) else []))
            used, updates = used + len(batch), updates + 1
            if used >= EPOCHS * len(x):
                break
    return {**scores(model), "updates": updates, "last": control.batch_size}


def batches(say: Say) -> dict[str, Any]:
    """As many samples for all: of nine pairs that of the smallest training loss with seed 0, and five runs with it."""
    rows = {}
    for name, (make, numbers) in BATCHES.items():
        pairs = list(itertools.product(RATES, numbers))
        grid = [with_batches(make, *pair, 0)["loss"] for pair in pairs]
        best = pairs[min(range(len(pairs)), key=grid.__getitem__)]
        rows[name] = {"pair": best, "pairs": len(pairs), "runs": [with_batches(make, *best, seed) for seed in SEEDS]}
        say(f"{name}: {best} {rows[name]['runs']}")
    # One learning rate for all: what the size of a batch does by itself.
    for b in (16, 64, 256):
        rows[f"fixed, {b}"] = {
            "pair": (0.3, b), "pairs": 1, "runs": [with_batches(BATCHES["fixed"][0], 0.3, b, s) for s in SEEDS],
        }  # fmt: skip
    return rows


# -- initial rates over decades -------------------------------------------------------------------------------

STARTS = [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0]
PASSES, SIZE = 300, 64


def from_rate(kind: str, rate: float, seed: int) -> dict[str, float]:
    """As many backward passes for all, each of a new batch."""
    x, y, _, _ = digits()
    model, draw = perceptron(seed), torch.Generator().manual_seed(seed)
    passes = 0

    def losses() -> Tensor:
        nonlocal passes
        passes += 1
        index = torch.randint(len(x), (SIZE,), generator=draw)
        return cross_entropy(model(x[index]), y[index], reduction="none")

    if kind == "line search":
        search, calls = optim.ProbabilisticLineSearch(model.parameters(), rate), []
        while passes < PASSES:
            search.step(losses)
            calls.append(search.evaluations)
        return {**scores(model), "last": search.param_groups[0]["lr"], "calls": statistics.mean(calls)}
    optimizer = torch.optim.SGD(model.parameters(), rate)
    control = optim.Alpha(optimizer)
    while passes < PASSES:
        optimizer.zero_grad()
        if kind == "Alpha":
            with optim.emit(control):
                control.loss(losses()).backward()
            optimizer.step()
            control.step()
        else:
            with px.disable():
                losses().mean().backward()
            optimizer.step()
    return {**scores(model), "last": optimizer.param_groups[0]["lr"]}


def rates(say: Say) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for kind in ("SGD", "line search", "Alpha"):
        rows[kind] = {}
        for rate in STARTS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optim.SkippedStep)
                rows[kind][f"{rate:g}"] = [from_rate(kind, rate, seed) for seed in SEEDS[:3]]
            say(f"{kind} from {rate:g}: {[round(r['loss'], 4) for r in rows[kind][f'{rate:g}']]}")
    return rows


def slopes(say: Say) -> dict[str, Any]:
    """Variance of individual gradients along the mean one: exact, over that of entries taken as uncorrelated."""
    x, y, _, _ = digits()
    rows: dict[str, list[float]] = {}
    for seed in SEEDS:
        model, loss_fn = perceptron(seed), px.extend(nn.CrossEntropyLoss())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        draw = torch.Generator().manual_seed(seed)
        for step in range(201):
            index = torch.randint(len(x), (SIZE,), generator=draw)
            optimizer.zero_grad()
            if step in (0, 20, 200):
                with px.backpack(px.GradDot(), px.Variance(), scale="sample", attach=False) as results:
                    loss_fn(model(x[index]), y[index]).backward()
                exact = results.grad_dot.double().var().item()
                named = dict(model.named_parameters())
                along = [(r.variance * torch.as_tensor(named[k].grad) ** 2).sum() for k, r in results.items()]
                ratio = exact / (torch.stack(along).sum().item() * SIZE / (SIZE - 1))
                rows.setdefault(str(step), []).append(ratio)
            else:
                loss_fn(model(x[index]), y[index]).backward()
            optimizer.step()
    say(str(rows))
    return rows


# -- importance sampling --------------------------------------------------------------------------------------


def importance(say: Say) -> dict[str, Any]:
    """Variance of one draw's gradient over that of a uniform draw, by all gradients: by fresh norms, and as it is."""
    x, y, _, _ = digits()
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        model, loss_fn = perceptron(seed), px.extend(nn.CrossEntropyLoss())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sampler = optim.ImportanceSampler(len(x), 32, seed=seed)
        for epoch in range(21):
            if epoch in (1, 5, 20):
                with px.backpack(
                    px.BatchL2Grad(), scale="sample", attach=False, parameters=model.parameters()
                ) as found:
                    loss_fn(model(x), y).backward()
                squares = found.batch_l2.double()
                mean = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
                optimizer.zero_grad()
                norms, m = squares.sqrt(), len(x)
                fresh = 0.9 * norms / norms.sum() + 0.1 / m
                uniform = float(squares.mean()) - mean
                rows.setdefault(str(epoch), []).append(
                    {
                        "fresh": (float((squares / fresh).sum()) / m**2 - mean) / uniform,
                        "sampler": (float((squares / sampler.probabilities).sum()) / m**2 - mean) / uniform,
                        "predicted": sampler.ratio,
                    }
                )
            for index in map(torch.tensor, sampler):
                optimizer.zero_grad()
                with optim.emit(sampler):
                    sampler.loss(cross_entropy(model(x[index]), y[index], reduction="none"), index).backward()
                optimizer.step()
                sampler.step()
    say(str(rows))
    return rows


# -- early stopping -------------------------------------------------------------------------------------------

STEPS = 4000


def noisy(kind: str, n: int, flipped: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n training samples with a share of wrong labels, and a test set without."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "digits":
        x, y, more, others = digits()
        x, y = torch.cat([x, more]), torch.cat([y, others])
    else:
        raw, labels = load_breast_cancer(return_X_y=True)
        x, y = torch.tensor(raw).float(), torch.tensor(labels)
        x = (x - x.mean(0)) / x.std(0)
    order = torch.randperm(len(x), generator=draw)
    x, y, classes = x[order], y[order].clone(), int(y.max()) + 1
    wrong = torch.rand(n, generator=draw) < flipped
    y[:n] = torch.where(wrong, (y[:n] + torch.randint(1, classes, (n,), generator=draw)) % classes, y[:n])
    return x[:n], y[:n], x[n:], y[n:]


def stopped(kind: str, n: int, flipped: float, size: int | None, rounds: bool, seed: int) -> dict[str, float]:
    """Gradient descent on logistic regression, rate 0.1; all data or batches of `size`, patience 5."""
    x, y, test_x, test_y = noisy(kind, n, flipped, seed)
    torch.manual_seed(seed)
    model, loss_fn = px.extend(nn.Linear(x.shape[1], int(y.max()) + 1)), px.extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    stopping = optim.EvidenceStopping(5, n if rounds else None)
    draw, stop, tests = torch.Generator().manual_seed(seed), None, {}
    orders = (torch.randperm(n, generator=draw).split(size or n) for _ in itertools.count())
    for step, index in enumerate(itertools.islice(itertools.chain.from_iterable(orders), STEPS)):
        optimizer.zero_grad()
        if stop is None:
            with optim.emit(stopping):
                loss_fn(model(x[index]), y[index]).backward()
            stop = step if stopping.step() else None
        else:
            cross_entropy(linear(x[index], model.weight, model.bias), y[index]).backward()
        if step % 5 == 0 or step in (stop, STEPS - 1):
            with torch.no_grad():
                tests[step] = cross_entropy(linear(test_x, model.weight, model.bias), test_y).item()
        optimizer.step()
    best = min(tests, key=tests.__getitem__)
    at = STEPS - 1 if stop is None else stop
    return {"stop": at, "best": best, "at_stop": tests[at], "at_best": tests[best], "at_end": tests[STEPS - 1]}


def stopping(say: Say) -> dict[str, Any]:
    rows = {}
    for kind, n, flipped, size, rounds in (
        ("breast cancer", 100, 0.05, None, False), ("digits", 200, 0.1, None, False), ("digits", 200, 0.1, 20, True),
        ("digits", 1000, 0.1, None, False), ("digits", 1000, 0.1, 250, True), ("digits", 1000, 0.1, 40, True),
        ("digits", 1000, 0.1, 40, False),
    ):  # fmt: skip
        passes = "all at once" if size is None else f"batches of {size}, " + ("in rounds" if rounds else "each alone")
        name = f"{kind}, {n} samples, {flipped:.0%} wrong labels, {passes}"
        rows[name] = [stopped(kind, n, flipped, size, rounds, seed) for seed in SEEDS]
        say(f"{name}: {[(r['stop'], r['best']) for r in rows[name]]}")
    return rows


# -- cost -----------------------------------------------------------------------------------------------------


def stepping(name: str, model: Any, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), 1e-4), nn.CrossEntropyLoss(reduction="none")
    if name == "SGD":

        def plain() -> None:
            optimizer.zero_grad()
            loss_fn(model(x), y).mean().backward()
            optimizer.step()

        return plain
    model, loss_fn = px.extend(model), px.extend(loss_fn)
    if name == "ProbabilisticLineSearch":
        search = optim.ProbabilisticLineSearch(model.parameters(), 1e-4)
        shapes = {p: torch.ones_like(p) for p in search._params()}

        def evaluate() -> None:  # one of the evaluations that a step may take
            search._evaluate(lambda: loss_fn(model(x), y), search._params(), shapes)

        return evaluate
    index = torch.arange(len(x))
    control: Any = {
        "CABS": lambda: optim.CABS(optimizer, 2, 1 << 20), "NoiseScale": optim.NoiseScale, "NormTest": optim.NormTest,
        "InnerProductTest": optim.InnerProductTest, "EvidenceStopping": optim.EvidenceStopping,
        "Alpha": lambda: optim.Alpha(optimizer), "ImportanceSampler": lambda: optim.ImportanceSampler(len(x), len(x)),
    }[name]()  # fmt: skip

    def step() -> None:
        optimizer.zero_grad()
        with optim.emit(control):
            each = loss_fn(model(x), y)
            if name == "ImportanceSampler":
                control._pending = [(index, torch.ones(len(x)))]
                loss = control.loss(each, index)
            else:
                loss = control.loss(each) if name == "Alpha" else each.mean()
            loss.backward()
        optimizer.step()
        control.step(*([loss] if name == "CABS" else []))

    return step


def cost(say: Say) -> dict[str, Any]:
    """A step with each controller in multiples of one of plain SGD, one thread, in turns."""
    names = ["SGD", "CABS", "NoiseScale", "NormTest", "InnerProductTest", "EvidenceStopping", "Alpha"]
    names += ["ImportanceSampler", "ProbabilisticLineSearch"]
    x, y, _, _ = digits()
    instance = instantiate(PROBLEMS["3c3d"], torch.device("cpu"))
    rows = {}
    for problem, rounds, block in (("64-100-10, batches of 128", 15, 20), ("3C3D, batches of 64", 5, 1)):
        made = {}
        for name in names:
            if problem.startswith("3C3D"):
                made[name] = stepping(name, instance.copy_model(), instance.inputs, instance.targets)
            else:
                made[name] = stepping(
                    name, nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)), x[:128], y[:128]
                )
        rows[problem] = alternately(made, "SGD", rounds, block)
        say(f"{problem}: { {k: round(v['median'], 2) for k, v in rows[problem].items()} }")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {
        "batches": batches, "rates": rates, "slopes": slopes, "importance": importance, "stopping": stopping,
        "cost": cost,
    }  # fmt: skip
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
