"""Attacks beside those of breaching on the same gradients: ``python -m benchmarks.attacks_peers``.

Needs an environment of its own, since breaching imports torchvision, whose wheels expect a CUDA build of torch:

    python -m venv build/breaching && build/breaching/bin/pip install torch einops rich scikit-learn hydra-core scipy
    build/breaching/bin/pip install --no-deps torchvision breaching==0.1.2 lpips

Its code runs unmodified; torchvision is told the schemas of two operators that are never called. Times are CPU seconds
of one thread, of the searches on one gradient one after the other.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.attacks import cells, digits, photo, put, save, sigmoid_net, spread, trained
from packext import attacks
from packext.attacks import DeepLeakage, Shared, psnr, share

RESULTS = Path(__file__).parent / "results" / "attacks-peers.json"
TABLES = ["deepleakage", "rules"]
RULES = ("iDLG", "analytic", "yin", "wainakh-simple", "bias-corrected")


def peer() -> Any:
    """The package breaching."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    peer.library = library  # type: ignore[attr-defined] # schemas live as long as it does
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import breaching
    return breaching


class Metadata(dict):
    __getattr__ = dict.__getitem__


class Breaching:
    """An attack of breaching, called as ours are."""

    def __init__(self, name: str, **overrides: Any) -> None:
        breaching = peer() if not hasattr(peer, "library") else __import__("breaching")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.config = breaching.get_attack_config(name, [f"{k}={v}" for k, v in overrides.items()])
        self.prepare = breaching.attacks.prepare_attack

    def payload(self, model: nn.Module, shared: Shared, shape: Any, labels: Tensor | None) -> Any:
        """Attacker, what the server sent, and what the user did."""
        metadata = Metadata(shape=shape, classes=len(list(shared.gradient.values())[-1]), task="classification")
        metadata |= dict(modality="vision", mean=[0.0] * shape[0], std=[1.0] * shape[0])
        sent = {"parameters": list(model.parameters()), "buffers": list(model.buffers()), "metadata": metadata}
        got = {"num_data_points": shared.n, "labels": labels, "local_hyperparams": None}
        user = {"gradients": [g.clone() for g in shared.gradient.values()], "buffers": None, "metadata": got}
        setup = {"device": torch.device("cpu"), "dtype": torch.float32}
        return self.prepare(model, shared.loss_fn, self.config, setup), [sent], [user]

    def __call__(self, model: nn.Module, shared: Shared, shape: Any, labels: Tensor | None = None) -> Tensor:
        attacker, sent, user = self.payload(model, shared, shape, labels)
        return attacker.reconstruct(sent, user, {})[0]["data"].double()

    def labels(self, model: nn.Module, shared: Shared, shape: Any, classes: int) -> Tensor:
        """Counts by the rule of the configuration."""
        attacker, sent, user = self.payload(model, shared, shape, None)
        models, found, _ = attacker.prepare_attack(sent, user)
        return torch.bincount(found, minlength=classes)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Interrupts as a user would, after CPU seconds: breaching then returns the best that it has found."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGPROF, interrupt)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def timed(f: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.process_time()
    found = f()
    return found, time.process_time() - start


def in_equal_time(ours: float, default: float, found: Tensor, run: Callable[[Breaching], Tensor]) -> Tensor:
    """The peer's outcome with our CPU seconds: interrupted after them, or with as many restarts as they allow."""
    if default > ours:
        with at_most(ours):
            return run(Breaching("deepleakage"))
    trials = int(ours / default)
    return found if trials == 1 else run(Breaching("deepleakage", **{"restarts.num_trials": trials}))


def photographs(seed: int) -> dict[str, dict[str, float]]:
    """One photograph, our attack and theirs."""
    torch.manual_seed(seed)
    x, y = photo(seed)
    model, shape = sigmoid_net(3, 32, 100), (3, 32, 32)
    shared = share(model, nn.CrossEntropyLoss(), x, y)
    ours, ours_time = timed(lambda: DeepLeakage(300)(model, shared, shape, classes=100).inputs)

    def run(attack: Breaching) -> Tensor:
        torch.manual_seed(seed)
        return attack(model, shared, shape)

    theirs, their_time = timed(lambda: run(Breaching("deepleakage")))
    equal = in_equal_time(ours_time, their_time, theirs, run)
    outcomes = {"packext": (ours, ours_time), "breaching": (theirs, their_time)}
    outcomes["breaching, our time"] = (equal, ours_time)
    return {
        key: {
            "mse": float((torch.nan_to_num(found, nan=1e6) - x).square().mean().clamp_max(1e6)),
            "psnr": float(psnr(torch.nan_to_num(found, nan=1e6), x)),
            "time": spent / ours_time,
        }
        for key, (found, spent) in outcomes.items()
    }


def rules(n: int, steps: int, seeds: int = 5) -> dict:
    """Share of a batch's labels that each rule counts, ours and theirs."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        model, loss = trained(steps, seed).float(), nn.CrossEntropyLoss()
        x, y = digits(n, seed + 500, 8)
        shared = share(model, loss, x.float(), y)
        own = {"LLG": attacks.LLG(), "LLGStar": attacks.LLGStar((1, 8, 8), 3), "ILRG": attacks.ILRG()}
        for name, rule in own.items():
            found.setdefault(name, []).append(attacks.count_accuracy(rule(model, shared), y))
        for name in RULES:
            torch.manual_seed(seed)
            attack = Breaching("invertinggradients", label_strategy=name)
            found.setdefault(f"breaching {name}", []).append(
                attacks.count_accuracy(attack.labels(model, shared, (1, 8, 8), 10), y)
            )
        found.setdefault("guess", []).append(attacks.guessed(y, 10))
        theirs = Breaching("invertinggradients", label_strategy="wainakh-simple")
        ratios = []
        for _ in range(21):
            _, first = timed(lambda shared=shared, model=model: attacks.LLG()(model, shared))
            _, second = timed(
                lambda shared=shared, model=model, theirs=theirs: theirs.labels(model, shared, (1, 8, 8), 10)
            )
            ratios.append(second / first)
        found.setdefault("time, wainakh-simple over LLG", []).append(statistics.median(ratios))
    return {"cells": {name: spread(values) for name, values in found.items()}}


def beside(rows: list[dict[str, dict[str, float]]]) -> list[str]:
    """As Markdown: each search over the seeds."""
    lines = ["| search | MSE < 1e-3 | MSE < 1e-2 | median PSNR | time |", "|---|---|---|---|---|"]
    for name in rows[0]:
        own = [row[name] for row in rows]
        sharp, seen = (sum(o["mse"] < limit for o in own) for limit in (1e-3, 1e-2))
        ratio, spent = (statistics.median(o[key] for o in own) for key in ("psnr", "time"))
        lines.append(
            f"| {name} | {sharp} of {len(own)} | {seen} of {len(own)} | {ratio:.1f} dB | "
            f"{spent:.2f} ({min(o['time'] for o in own):.2f} to {max(o['time'] for o in own):.2f}) |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks_peers", description=__doc__)
    parser.add_argument("--only", choices=TABLES, nargs="+", default=TABLES)
    parser.add_argument("--seeds", type=int, default=5, help="photographs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    console = Console()
    if "deepleakage" in given.only:
        rows = results["deepleakage"] = []
        for seed in range(given.seeds):
            rows.append(photographs(seed))
            console.print(seed, rows[-1], highlight=False)
            save(RESULTS, results)
    if "rules" in given.only:
        results["rules"] = {
            f"{name}, {n}": rules(n, steps)
            for name, steps in (("untrained", 0), ("trained", 80))
            for n in (1, 8, 32, 128)
        }
        save(RESULTS, results)
    if "deepleakage" in results:
        put("peers-deepleakage", beside(results["deepleakage"]))
    if "rules" in results:
        put("peers-rules", cells(results["rules"], "model, batch"))


if __name__ == "__main__":
    main()
