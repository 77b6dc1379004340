"""Private training, measured: ``python -m benchmarks.privacy``; writes the tables of docs/privacy.md.

Accounting and bounds are compared with Opacus and with the auditing module of jax-privacy, of which nothing but that
file is loaded: ``pip install --no-deps jax-privacy``. Without it that column stays empty.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

import packext as px
from benchmarks import memory, timing
from benchmarks.attacks import digits
from benchmarks.problems import PROBLEMS, Instance, instantiate
from benchmarks.summary import fill
from packext.attacks import GradientCanaries, epsilon_lower_bound
from packext.optim import DPSGD, PoissonSampler, Spent, epsilon

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "privacy.json"
PAGE = HERE.parent / "docs" / "privacy.md"
DELTA = 1e-5


# -- accountants ----------------------------------------------------------------------------------------


def accountants() -> dict[str, dict[str, float]]:
    """Epsilon of the same training by each accountant."""
    found = {}
    for rate, z, steps in ((0.00512, 1.0, 2000), (0.01, 0.8, 1000), (0.05, 2.0, 500), (1.0, 4.0, 10)):
        row = {}
        for name, kind in (("Opacus RDP", RDPAccountant), ("Opacus PRV", PRVAccountant)):
            accountant = kind()
            accountant.history = [(z, rate, steps)]
            row[name] = float(accountant.get_epsilon(DELTA))
        spent = [Spent(z, rate * 100_000, steps)]
        row["packext RDP"] = epsilon(spent, 100_000, DELTA, "rdp")
        row["packext PLD"] = epsilon(spent, 100_000, DELTA)
        found[f"rate {rate:g}, noise {z:g}, {steps} steps"] = row
    return found


# -- lower bounds ---------------------------------------------------------------------------------------


def jax_privacy() -> Any:
    """The auditing module of jax-privacy by itself, which needs no JAX; None if it is not installed."""
    package = importlib.util.find_spec("jax_privacy")
    if package is None or not package.submodule_search_locations:
        return None
    path = Path(next(iter(package.submodule_search_locations))) / "auditing.py"
    spec = importlib.util.spec_from_file_location("jax_privacy_auditing", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def bounds() -> dict[str, dict[str, float | None]]:
    """The lower bound on epsilon from the same guesses."""
    peer, found = jax_privacy(), {}
    for canaries, guesses, correct in (
        (500, 100, 90),
        (500, 500, 350),
        (1000, 100, 100),
        (1000, 50, 30),
        (5000, 500, 480),
    ):
        theirs = peer._epsilon_one_run(0, canaries, guesses, correct, 0.05, DELTA) if peer else None
        ours = epsilon_lower_bound(correct, guesses, canaries, DELTA)
        found[f"{correct} of {guesses} right, {canaries} canaries"] = {"packext": ours, "jax-privacy": theirs}
    return found


# -- audits ---------------------------------------------------------------------------------------------


def forget_noise(optimizer: Any) -> None:
    noisy = type(optimizer)._noisy
    optimizer._noisy = lambda totals, std, *divisor: noisy(optimizer, totals, 0.0, *divisor)


def forget_clipping(optimizer: Any) -> None:
    clip = SimpleNamespace(max_norm=optimizer.max_norm, per_layer=optimizer.per_layer, balance=0.0)
    optimizer.contribute = lambda rows: optimizer._add([r.sum(0) for r in rows], clip)


def audited(z: float, rate: float, steps: int, seed: int, defect: Callable[[Any], None] | None) -> tuple[float, float]:
    """Claimed epsilon and lower bound of one training on 500 digits with 500 canaries."""
    x, y = digits(500, seed, 8)
    x = x.float().flatten(1)
    torch.manual_seed(seed)
    model = px.extend(nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10)))
    loss = px.extend(nn.CrossEntropyLoss())
    batch = rate * 500
    optimizer = DPSGD(model.parameters(), 0.5, max_norm=1.0, noise_multiplier=z, expected_batch_size=batch)
    canaries = GradientCanaries(optimizer, 500, rate, seed=seed)
    if defect is not None:
        defect(optimizer)
    for index in PoissonSampler(500, rate, steps):
        if index:
            with px.optim.emit(optimizer):
                loss(model(x[index]), y[index]).backward()
        canaries.step()
    return epsilon(optimizer.spent, 500, DELTA), canaries.audit(DELTA).epsilon


def audits(seeds: int = 20) -> dict[str, dict[str, Any]]:
    """Trainings that keep their claim, and two that do not."""
    rows: dict[str, tuple[float, float, int, Callable[[Any], None] | None]] = {
        "all samples, 1 step, noise 2": (2.0, 1.0, 1, None),
        "all samples, 1 step, noise 1": (1.0, 1.0, 1, None),
        "all samples, 1 step, noise 0.5": (0.5, 1.0, 1, None),
        "all samples, 10 steps, noise 3": (3.0, 1.0, 10, None),
        "rate 0.1, 100 steps, noise 1": (1.0, 0.1, 100, None),
        "all samples, 10 steps, noise 5, but forgotten": (5.0, 1.0, 10, forget_noise),
        "all samples, 10 steps, noise 5, no clipping": (5.0, 1.0, 10, forget_clipping),
    }
    found = {}
    for name, (z, rate, steps, defect) in track(rows.items(), "audits"):
        runs = [audited(z, rate, steps, seed, defect) for seed in range(seeds)]
        found[name] = {"claimed": runs[0][0], "bounds": [bound for _, bound in runs]}
    return found


# -- cost -----------------------------------------------------------------------------------------------


class Plain:
    """An ordinary step of SGD; the others are it with a private gradient."""

    def __init__(self, instance: Instance, noise: float = 1.0) -> None:
        """Take a copy of the model."""
        self.model: Any = instance.copy_model()
        self.x, self.y, self.batch = instance.inputs, instance.targets, instance.batch
        self.settings = {"noise_multiplier": noise, "expected_batch_size": float(self.batch)}
        self.norm = instance.problem.max_norm
        self.parameters = list(self.model.parameters())
        self.loss: Any = nn.CrossEntropyLoss()
        self.optimizer: Any = torch.optim.SGD(self.parameters, 1e-3)
        self.prepare()

    def prepare(self) -> None:
        """Make the step private."""

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model(self.x), self.y).backward()
        self.optimizer.step()


class Ours(Plain):
    """`DPSGD`: one backward pass."""

    def prepare(self) -> None:
        px.extend(self.model), px.extend(self.loss)
        self.optimizer = DPSGD(self.parameters, 1e-3, max_norm=self.norm, **self.settings)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with px.optim.emit(self.optimizer):
            self.loss(self.model(self.x), self.y).backward()
        self.optimizer.step()


class Rows(Plain):
    """Opacus' flat clipping of individual gradients."""

    def prepare(self) -> None:
        self.model = GradSampleModule(self.model)
        self.optimizer = DPOptimizer(self.optimizer, max_grad_norm=self.norm, **self.settings)


class Ghost(Plain):
    """Opacus' ghost clipping: two backward passes."""

    def prepare(self) -> None:
        self.model = GradSampleModuleFastGradientClipping(self.model, max_grad_norm=self.norm, use_ghost_clipping=True)
        self.optimizer = DPOptimizerFastGradientClipping(self.optimizer, max_grad_norm=self.norm, **self.settings)
        self.loss = DPLossFastGradientClipping(self.model, self.optimizer, self.loss, "mean")

    def step(self) -> None:
        self.optimizer.zero_grad()
        output, shape = self.model(self.x), {}
        target = self.y
        if output.dim() == 3:
            n, classes, length = output.shape
            shape = {"shape": (n, length, classes)}
            output, target = output.transpose(1, 2).reshape(n * length, classes), target.flatten()
        self.loss(output, target, **shape).backward()
        self.optimizer.step()


WAYS: dict[str, type[Plain]] = {"plain": Plain, "packext": Ours, "Opacus, flat": Rows, "Opacus, ghost": Ghost}


def gradients(way: type[Plain], instance: Instance) -> Tensor:
    """The private gradient without noise, flattened."""
    run = way(instance, noise=0.0)
    run.step()
    return torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None])


def cost(key: str, options: argparse.Namespace) -> dict[str, Any]:
    """Whole steps in multiples of the plain one, by turns in this process; and peaks of memory."""
    threads = options.threads
    torch.set_num_threads(threads)
    instance = instantiate(PROBLEMS[key], torch.device("cpu"))
    want = gradients(Ours, instance)
    for name, way in WAYS.items():
        if name != "plain":  # all of them compute the same thing
            error = float((gradients(way, instance) - want).norm() / want.norm())
            assert error < 1e-4, (name, error)
    runs = {name: way(instance) for name, way in WAYS.items()}
    times = timing.round_robin(
        {name: run.step for name, run in runs.items()},
        torch.device("cpu"),
        rounds=options.rounds,
        warmup=2,
        clock=time.process_time if options.processor else time.perf_counter,
    )
    found = {name: {"time": vars(ratio)} for name, ratio in timing.ratios(times, "plain").items()}
    if not options.no_memory:
        unit = peak(key, "plain", threads)
        for name in WAYS:
            found[name]["memory"] = peak(key, name, threads) / unit
    return {"threads": threads, "processor": options.processor, "ways": found}


def peak(key: str, way: str, threads: int) -> int:
    """Bytes at the peak of a step that is not the first, in a process of its own."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.privacy",
        "--peak",
        key,
        way,
        "--threads",
        str(threads),
    ]
    variables = {**os.environ, **memory.ALLOCATOR}
    done = subprocess.run(command, cwd=HERE.parent, env=variables, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


# -- tables ---------------------------------------------------------------------------------------------


def table(name: str, rows: dict[str, Any]) -> list[str]:
    """As Markdown."""
    if name == "cost":
        lines = ["| network | way | time | quartiles | peak memory |", "|---|---|---|---|---|"]
        for key, row in rows.items():
            kind = f"{row['threads']} threads, {'processor' if row['processor'] else 'wall'} time"
            for way, cell in row["ways"].items():
                t = cell["time"]
                shown = f"{t['median']:.2f} | {t['lower']:.2f} to {t['upper']:.2f}"
                peaks = f"{cell['memory']:.2f}" if "memory" in cell else ""
                problem = PROBLEMS[key]
                lines.append(f"| {problem.title}, batch {problem.batch}; {kind} | {way} | {shown} | {peaks} |")
        return lines
    if name == "audits":
        lines = [
            "| training | claimed | lower bound, mean | largest | bounds within the claim |",
            "|---|---|---|---|---|",
        ]
        for key, row in rows.items():
            b = row["bounds"]
            within = sum(bound <= row["claimed"] for bound in b)
            lines.append(
                f"| {key} | {row['claimed']:.2f} | {sum(b) / len(b):.2f} | {max(b):.2f} | {within} of {len(b)} |"
            )
        return lines
    columns = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for key, row in rows.items():
        lines.append(f"| {key} | {' | '.join('' if v is None else f'{v:.4f}' for v in row.values())} |")
    return lines


def write(results: dict[str, Any]) -> None:
    """Put the tables between their marks in the page."""
    fill(PAGE, {name: "\n".join(table(name, rows)) for name, rows in results.items()})


def main() -> None:
    parts = ("accountants", "bounds", "audits", "cost")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.privacy", description=__doc__)
    parser.add_argument("--only", choices=parts, nargs="+", default=parts, help="some of the tables")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--no-memory", action="store_true", help="leave peaks of memory out")
    parser.add_argument(
        "--processor", action="store_true", help="processor time of all threads, where others use the machine"
    )
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # peers warn at every step, which would be part of their time
    torch.set_num_threads(options.threads)
    if options.peak:
        key, way = options.peak
        instance = instantiate(PROBLEMS[key], torch.device("cpu"))
        Plain(instance).step()
        print(memory.peak_on_cpu(WAYS[way](instance))[1])  # type: ignore[arg-type]
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    console = Console()
    for name in options.only:
        if name == "cost":
            results[name] = {key: cost(key, options) for key in ("3c3d", "transformer")}
        else:
            results[name] = {"accountants": accountants, "bounds": bounds, "audits": audits}[name]()
        for line in table(name, results[name]):
            console.print(line, highlight=False)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write(results)


if __name__ == "__main__":
    main()
