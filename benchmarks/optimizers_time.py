"""K-FAC against AdamW and SGD, in steps and in time: ``python -m benchmarks.optimizers_time [text] [cnn] [between]``.

Writes benchmarks/results/optimizers-time.json and its table in docs/optim.md. Every row has a grid of 12 pairs of
hyperparameters (K-FAC's of 6 on text), tried with seed 0; the pair with the least loss on data for evaluation is run
with three other seeds. Rows that are in the results already are left as they are.
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
from torch import Tensor, nn

import packext as px
from benchmarks.learned_train import split
from benchmarks.optimizers import alternately
from benchmarks.small_tasks import LanguageModel, Problem, batches, characters, classes, cnn, evaluate, tokens
from benchmarks.summary import fill
from packext import optim

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "optimizers-time.json"
PAGE = HERE.parent / "docs" / "optim.md"
PROBLEMS = {
    "text": Problem(characters, lambda: LanguageModel(32, 1), tokens, 16, 200),
    "cnn": Problem(split, cnn, classes, 64, 150),
}
SHORT, SPARSE = "KFAC, in AdamW's time", "KFAC, every 10 and 100, plain between, in AdamW's time"
TITLES = {"text": "characters, transformer", "cnn": "digits, CNN"}
SEEDS, LOOKS = range(1, 4), 15


def kfac(model: nn.Module, lr: float, damping: float, every: tuple[int, int] = (5, 25)) -> optim.KFAC:
    """Linear maps and convolutions; AdamW trains tables and normalisations, and the map to the symbols.

    Args:
        model: the network.
        lr: learning rate.
        damping: damping.
        every: steps between factors, and between inverses.
    """
    parts: dict[bool, list[Any]] = {False: [], True: []}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        parts[isinstance(module, (nn.Embedding, nn.LayerNorm)) or name == "head"] += own
    groups: list[dict[str, Any]] = [{"params": parts[False]}]
    if parts[True]:  # with what AdamW was found to do best with
        groups.append({"params": parts[True], "fallback": True, "lr": 0.03, "betas": (0.9, 0.99)})
    return optim.KFAC(groups, lr, damping, factors_every=every[0], inverses_every=every[1], kl_clip=1e-2)


ON_TEXT = [0.03, 0.1, 0.3], [0.01, 0.1]
#: Of each: from a model and two hyperparameters, and the values that are tried of them.
OPTIMIZERS: dict[str, tuple[Callable[..., Any], list[float], list[float]]] = {
    "SGD, momentum": (
        lambda m, lr, beta: torch.optim.SGD(m.parameters(), lr, momentum=beta), [0.03, 0.1, 0.3, 1.0], [0.0, 0.9, 0.95],
    ),
    "AdamW": (
        lambda m, lr, beta: torch.optim.AdamW(m.parameters(), lr, betas=(0.9, beta)),
        [1e-3, 3e-3, 0.01, 0.03], [0.9, 0.99, 0.999],
    ),
    "KFAC": (kfac, [0.01, 0.03, 0.1, 0.3], [1e-3, 1e-2, 0.1]),
}  # fmt: skip


def stepper(model: nn.Module, optimizer: Any, plain: bool = False) -> Callable[[Tensor, Tensor], float]:
    """A step; if `plain`, those that need nothing of the backward pass run as if the model were not extended."""
    emitting = isinstance(optimizer, optim.Emitting)
    loss_fn: nn.Module = nn.CrossEntropyLoss()
    if emitting:
        model, loss_fn = px.extend(model), px.extend(loss_fn)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        outputs = model(x)
        value = loss_fn(outputs.transpose(1, 2) if y.dim() == 2 else outputs, y)
        value.backward()
        return value

    def step(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        if emitting:
            with px.disable() if plain and not optimizer.quantities() else optim.emit(optimizer):
                value = loss(x, y)
        else:
            value = loss(x, y)
        optimizer.step()
        return value.item()

    return step


def train(p: Problem, name: str, pair: tuple[float, float], seed: int, steps: int) -> dict[str, Any]:
    """One run, with rates that fall to zero by a cosine; loss on data for evaluation LOOKS times, and at the end."""
    torch.manual_seed(seed)
    model = p.model()
    optimizer = kfac(model, *pair, (10, 100)) if name == SPARSE else OPTIMIZERS[name][0](model, *pair)
    first = [group["lr"] for group in optimizer.param_groups]
    step = stepper(model, optimizer, name == SPARSE)
    x, y = p.data()[0]
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optim.SkippedStep)
        for t, index in enumerate(batches(p, seed, steps)):
            for group, rate in zip(optimizer.param_groups, first, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * t / steps)) / 2
            try:
                value = step(x[index], y[index])
            except px.PackextError:  # a factor that is singular: this pair failed
                value = math.inf
            if not value < 1e6:
                return {"loss": math.inf, "accuracy": 0.0, "seen": seen}
            if (t + 1) * LOOKS // steps > t * LOOKS // steps:
                with px.disable():
                    seen.append((t + 1, evaluate(p, model, 1, 300)[0]))
    with px.disable():
        loss, accuracy = evaluate(p, model, 1, 1000)
    return {"loss": loss if math.isfinite(loss) else math.inf, "accuracy": accuracy, "seen": seen}


def row(p: Problem, name: str, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    _, *usual = OPTIMIZERS["KFAC" if name == SPARSE else name]
    begin = time.perf_counter()
    pairs = list(itertools.product(*(ON_TEXT if "KFAC" in name and p is PROBLEMS["text"] else usual)))
    grid = [train(p, name, pair, 0, steps)["loss"] for pair in pairs]
    best = min(range(len(pairs)), key=lambda k: grid[k])
    runs = [train(p, name, pairs[best], seed, steps) for seed in SEEDS]
    last = [round(r["loss"], 4) for r in runs]
    say(f"{name}, {steps} steps: {pairs[best]} {last} {time.perf_counter() - begin:.0f} s")
    return {"pair": pairs[best], "grid": grid, "steps": steps, "runs": runs}


def ratios(p: Problem) -> dict[str, dict[str, float]]:
    """Time of a step, as a multiple of AdamW's, in turns in one process."""
    x, y = (t[: p.batch] for t in p.data()[0])
    steps = {}
    for name, (make, one, other) in OPTIMIZERS.items():
        torch.manual_seed(0)
        model = p.model()
        step = stepper(model, make(model, one[1], other[1]))
        steps[name] = lambda step=step: step(x, y)
    # Blocks of as many steps as there are between inverses, so that each block of K-FAC has one batch of them.
    return alternately(steps, "AdamW", 9, 25, warmup=3)


#: Steps between factors and between inverses, and whether the others are plain steps.
BETWEEN: dict[str, tuple[tuple[int, int], bool]] = {
    "factors every 5, inverses every 25": ((5, 25), False),
    "the same, plain between": ((5, 25), True),
    "every 10 and 100, the defaults": ((10, 100), False),
    "the same, plain between, the defaults": ((10, 100), True),
    "one batch of factors at the start, plain after": ((10**6, 10**6), True),
}


#: From its start: with the inverses of the first three batches of factors, and the probe.
WHOLE = "the first 100 steps of a run of these"


def between(say: Callable[[str], None]) -> None:
    """Time of a step of K-FAC as a multiple of AdamW's, by how often there are factors, and by what is between."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for problem, p in PROBLEMS.items():
        x, y = (t[: p.batch] for t in p.data()[0])
        torch.manual_seed(0)
        model = p.model()
        made = {"AdamW": stepper(model, torch.optim.AdamW(model.parameters(), 1e-3))}
        for name, (every, plain) in BETWEEN.items():
            torch.manual_seed(0)
            model = p.model()
            made[name] = stepper(model, kfac(model, 1e-3, 0.1, every), plain)
        # The first three batches of factors, each of which is inverted, are in blocks that do not count.
        steps = {name: lambda step=step, x=x, y=y: step(x, y) for name, step in made.items()}
        ratios = found.setdefault("between", {})[problem] = alternately(steps, "AdamW", 10, 10, warmup=4)

        def whole(sparse: bool, p: Problem = p, x: Tensor = x, y: Tensor = y) -> None:
            torch.manual_seed(0)
            model = p.model()
            made = kfac(model, 1e-3, 0.1, (10, 100)) if sparse else torch.optim.AdamW(model.parameters(), 1e-3)
            step = stepper(model, made, plain=True)
            for _ in range(100):
                step(x, y)

        runs = {"AdamW": lambda whole=whole: whole(False), WHOLE: lambda whole=whole: whole(True)}
        ratios[WHOLE] = alternately(runs, "AdamW", 7, 1)[WHOLE]
        say(f"{problem}: { ({k: round(v['median'], 2) for k, v in found['between'][problem].items()}) }")
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    fill(PAGE, {"between": between_table(found)}, apart=True)


def measure(problem: str, say: Callable[[str], None]) -> None:
    p = PROBLEMS[problem]
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = found.setdefault(problem, {})
    units = {name: rows[name]["step"] for name in rows if "step" in rows[name]}
    if SPARSE not in rows:
        units[SPARSE] = found["between"][problem][WHOLE]
    if "KFAC" not in units:
        units |= ratios(p)
        say(f"{problem}: { ({k: round(v['median'], 2) for k, v in units.items()}) }")
    for name in [*OPTIMIZERS, SHORT, SPARSE]:
        kind = "KFAC" if name == SHORT else name
        if "runs" in rows.get(name, {}):
            continue
        steps = p.steps if name in OPTIMIZERS else round(p.steps / units[kind]["median"])
        rows[name] = {**row(p, kind, steps, say), "step": units[kind]}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    fill(PAGE, {"time": table(found)}, apart=True)


# -- the page -------------------------------------------------------------------------------------------


def reached(run: dict[str, Any], target: float) -> float:
    return next((t for t, loss in run["seen"] if loss <= target), math.inf)


def table(found: dict[str, Any]) -> str:
    lines = [
        "| task, optimizer | chosen pair | steps | time of a step | loss | accuracy | steps to target | time to it |",
        "|---" * 8 + "|",
    ]
    for problem, rows in ((name, found[name]) for name in PROBLEMS if name in found):
        # The worst of the last losses of the three, of full length and where no run broke, so that each reaches it.
        last = [[run["seen"][-1][1] for run in rows[n]["runs"] if math.isfinite(run["loss"])] for n in OPTIMIZERS]
        target = max(map(max, last))
        for name, r in rows.items():
            losses, right = ([run[k] for run in r["runs"]] for k in ("loss", "accuracy"))
            steps, unit = statistics.median(reached(run, target) for run in r["runs"]), r["step"]["median"]
            lines.append(
                f"| {TITLES[problem]}, {name} | {', '.join(f'{v:g}' for v in r['pair'])} | {r['steps']} | "
                f"{unit:.2f} ({r['step']['low']:.2f} to {r['step']['high']:.2f}) | "
                f"{statistics.median(losses):.3f} ({min(losses):.3f} to {max(losses):.3f}) | "
                f"{statistics.median(right):.3f} | "
                + (f"{steps:.0f} | {steps * unit:.0f} |" if math.isfinite(steps) else "not reached | |")
            )
    return "\n".join(lines)


def between_table(found: dict[str, Any]) -> str:
    lines = ["| K-FAC | digits, CNN | characters, transformer |", "|---|---|---|"]
    for name in [*list(BETWEEN)[:4], WHOLE, *list(BETWEEN)[4:]]:
        cells = [found["between"][problem][name] for problem in ("cnn", "text")]
        texts = [f"{c['median']:.2f} ({c['low']:.2f} to {c['high']:.2f})" for c in cells]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PROBLEMS)}, between; all by default")
    torch.set_num_threads(1)

    def say(text: str) -> None:
        print(text, flush=True)

    for part in parser.parse_args().parts or ["between", *PROBLEMS]:
        between(say) if part == "between" else measure(part, say)


if __name__ == "__main__":
    main()
