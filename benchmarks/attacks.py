"""What gradients give away, measured: ``python -m benchmarks.attacks``; writes the tables of docs/attacks.md."""

from __future__ import annotations

import argparse
import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.summary import fill
from packext import attacks, defences
from packext.attacks import DeepLeakage, InvertingGradients, Shared, psnr, share

HERE = Path(__file__).parent
TITLES = {
    "labels": "model, batch",
    "aggregation": "clients",
    "searches": "search",
    "grid": "what is shared",
    "membership": "",
}
RESULTS = HERE / "results" / "attacks.json"
PAGE = HERE.parent / "docs" / "attacks.md"


def digits(n: int, seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    index = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]
    return F.interpolate(torch.tensor(x)[index].view(-1, 1, 8, 8) / 16, size), torch.tensor(y)[index]


def photo(seed: int) -> tuple[Tensor, Tensor]:
    """A patch of one of scikit-learn's two photographs, 32 x 32, and one of 100 labels."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.tensor(load_sample_images().images[seed % 2]).permute(2, 0, 1).double() / 255
    top, left = (int(torch.randint(s - 128, (1,), generator=generator)) for s in image.shape[1:])
    return F.avg_pool2d(image[None, :, top : top + 128, left : left + 128], 4), torch.tensor([seed * 7 % 100])


def sigmoid_net(channels: int, size: int, classes: int) -> nn.Module:
    """The network of Deep Leakage from Gradients, with its initialisation."""
    layers: list[nn.Module] = []
    for c, stride in ((channels, 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(c, 12, 5, stride, 2), nn.Sigmoid()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * (size // 4) ** 2, classes)).double()
    for p in net.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    return net


def packed(x: Tensor) -> str:
    """Pictures with values in [0, 1] as text, a byte for each pixel."""
    return base64.b64encode((x.clamp(0, 1) * 255).round().byte().numpy().tobytes()).decode()


def inversion(
    size: int,
    data: Callable[[int], Any],
    attack: Any,
    change: Any,
    seeds: int,
    known: bool,
    curves: bool = False,
) -> dict:
    """One row: an attack on several seeds; with the objective after each iteration and the pictures if asked."""
    rows = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        x, y = data(seed)
        classes = 100 if x.shape[1] == 3 else 10
        model = sigmoid_net(x.shape[1], size, classes)
        loss = nn.CrossEntropyLoss()
        shared = change(model, loss, x, y) if isinstance(change, defences.Clipped) else change(share(model, loss, x, y))
        shape = tuple(x.shape[1:])
        if isinstance(attack, InvertingGradients):
            found = attack(model, shared, shape, y)
        else:
            found = attack(model, shared, shape, **({"labels": y} if known else {"classes": classes}))
        inputs = torch.nan_to_num(found.inputs, nan=0.0, posinf=1e6, neginf=-1e6)
        order = attacks.in_order(inputs, x)
        error = (inputs[order] - x).square().flatten(1).mean(1)
        rows.append(
            {
                "mse": error.tolist(),
                "psnr": psnr(inputs[order], x).tolist(),
                "labels": float((found.labels[order] == y).double().mean()),
                "matched": found.matched,
                "restarts": found.restarts,
            }
        )
        if curves:
            rows[-1] |= {"objective": [float(f"{v:.4g}") for v in found.objective], "picture": packed(inputs[order])}
    return {"seeds": rows}


def same(shared: Shared) -> Shared:
    return shared


def searches() -> dict[str, Callable[[], dict]]:
    """Rows of the first table."""
    one = lambda seed: digits(1, seed)  # noqa: E731
    return {
        "DLG, digit 16 x 16": lambda: inversion(16, one, DeepLeakage(60, 3), same, 10, False),
        "iDLG, digit 16 x 16": lambda: inversion(16, one, DeepLeakage(60, 3), same, 10, True),
        "DLG, 8 digits 16 x 16": lambda: inversion(16, lambda seed: digits(8, seed), DeepLeakage(150), same, 3, False),
        "DLG, photograph 32 x 32": lambda: inversion(32, photo, DeepLeakage(300), same, 10, False),
        "DLG without line search, photograph 32 x 32": lambda: inversion(
            32, photo, DeepLeakage(300, line_search=False), same, 10, False
        ),
    }


def grid() -> dict[str, Callable[[], dict]]:
    """Rows of the second table: defences against an attacker who does not know of them."""
    levels: dict[str, Any] = {"the gradient itself": same}
    for level in (1e-4, 1e-3, 1e-2, 1e-1):
        levels[f"Gaussian noise {level:g}"] = defences.GaussianNoise(level, seed=0)
        levels[f"Laplacian noise {level:g}"] = defences.LaplacianNoise(level, seed=0)
    for kind in ("float16", "bfloat16", "int8"):
        levels[kind] = defences.Quantisation(kind)
    for part in (0.01, 0.1, 0.2, 0.3, 0.5, 0.7):
        levels[f"pruning {part:.0%}"] = defences.Pruning(part)
    clip, noisy = defences.Clipped(0.1), defences.Clipped(0.1, 0.1, seed=0)
    searches: dict[str, tuple[Any, Any]] = {name: (DeepLeakage(30), defence) for name, defence in levels.items()}
    searches["clipping to 0.1"] = DeepLeakage(30), clip
    searches["clipping to 0.1, cosine"] = InvertingGradients(300), clip
    searches["clipping to 0.1, noise 0.1, cosine"] = InvertingGradients(300), noisy
    return {
        name: lambda attack=attack, defence=defence: inversion(
            16, lambda seed: digits(1, seed), attack, defence, 5, True, curves=True
        )
        for name, (attack, defence) in searches.items()
    }


def relu_net() -> nn.Module:
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(512, 10)).double()


def trained(steps: int, seed: int) -> nn.Module:
    """A network after some steps of Adam on digits."""
    torch.manual_seed(seed)
    model, loss = relu_net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        x, y = digits(64, 1000 * seed + step, 8)
        loss(model(x), y).backward()
        optimizer.step()
    return model


def labels(n: int, steps: int, seeds: int = 5) -> dict:
    """Share of a batch's labels that each rule counts, on a model trained for some steps."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        model, loss = trained(steps, seed), nn.CrossEntropyLoss()
        x, y = digits(n, seed + 500, 8)
        shared = share(model, loss, x, y)
        for rule in (attacks.LLG(), attacks.LLGStar((1, 8, 8), 3), attacks.ILRG()):
            found.setdefault(type(rule).__name__, []).append(attacks.count_accuracy(rule(model, shared), y))
        found.setdefault("guess", []).append(attacks.guessed(y, 10))
        counts = attacks.identity(model(x).softmax(1).detach(), attacks.Head.of(model).bias_gradient(shared))
        found.setdefault("identity", []).append(attacks.count_accuracy(counts.round().long(), y))
    return {"cells": {name: spread(values) for name, values in found.items()}}


class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.a, self.n1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.b, self.n2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.skip = nn.Identity() if i == o and stride == 1 else nn.Conv2d(i, o, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.n2(self.b(torch.relu(self.n1(self.a(x))))) + self.skip(x))


def cifar_nets() -> dict[str, nn.Module]:
    """Three networks for 3 x 32 x 32 and 100 classes, with 64 features before the last layer."""

    def conv(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]

    pool, end = nn.MaxPool2d(2), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 100)]
    return {
        "MLP": nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 100)),
        "VGG-like": nn.Sequential(*conv(3, 16), pool, *conv(16, 32), pool, *conv(32, 64), *end),
        "ResNet": nn.Sequential(*conv(3, 16), Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), *end),
    }


def drawn(clients: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of 8 to 256 samples with labels of 100 classes (Dirichlet 0.1)."""
    batches = []
    for _ in range(clients):
        shares = torch.distributions.Dirichlet(torch.full((100,), 0.1)).sample() + 1e-8
        n = int(2 ** (3 + 5 * torch.rand(())))
        batches.append((torch.rand(n, 3, 32, 32), shares.multinomial(n, replacement=True)))
    return batches


def aggregated(clients: int, seeds: int = 3) -> dict:
    """Share of the clients all of whose counts are exact, by network."""
    cells: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        for name, model in cifar_nets().items():
            batches = drawn(clients)
            attack, loss = attacks.SecureAggregationLabels(), nn.CrossEntropyLoss()
            cohort = attacks.Cohort(model, loss, batches, weighted=True)
            plan = attack.plan(model, torch.rand(4, 3, 32, 32), clients)
            counts, _ = attack.counts(plan, cohort.round(plan.states), cohort.sizes, loss, weighted=True)
            true = torch.stack([torch.bincount(y, minlength=100) for _, y in batches])
            cells.setdefault(name, []).append(float((counts == true).all(1).double().mean()))
    return {"cells": {name: spread(values) for name, values in cells.items()}}


def membership(seeds: int = 5) -> dict:
    """Area under the ROC curve of each score, on an MLP trained on 400 digits, a fifth of their labels random."""
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        x, y = digits(800, seed, 8)
        x, generator = x.flatten(1), torch.Generator().manual_seed(seed)
        y[::5] = torch.randint(10, (160,), generator=generator)
        calls = iter(range(100))

        def train(inputs: Tensor, targets: Tensor, calls: Any = calls, seed: int = seed) -> nn.Module:
            torch.manual_seed(1000 * seed + next(calls))
            model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()
            optimizer = torch.optim.Adam(model.parameters(), 3e-3)
            for _ in range(150):
                rows = torch.randint(len(inputs), (64,))
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[rows]), targets[rows]).backward()
                optimizer.step()
            return model.eval()

        target = train(x[:400], y[:400])
        seen = attacks.signals(target, nn.CrossEntropyLoss(), x, y)
        scores = {"loss": -seen.loss, "gradient norm": -seen.gradient_norm, "leverage": -seen.leverage}
        scores["LiRA, 16 shadow models"] = attacks.LiRA(16)(target, train, x, y)
        for name, score in scores.items():
            found.setdefault(name, []).append(attacks.judge(score[:400], score[400:], draws=2).auc)
    return {"cells": {name: spread(values) for name, values in found.items()}}


def spread(values: list[float]) -> dict[str, float]:
    t = torch.tensor(values)
    return {"mean": float(t.mean()), "low": float(t.min()), "high": float(t.max())}


def cells(rows: dict[str, dict], title: str, digits: int = 2) -> list[str]:
    """As Markdown: the mean over seeds, and the lowest and highest."""
    names = list(next(iter(rows.values()))["cells"])
    lines = [f"| {title} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row, value in rows.items():
        shown = [
            f"{c['mean']:.{digits}f} ({c['low']:.{digits}f} to {c['high']:.{digits}f})" for c in value["cells"].values()
        ]
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return lines


def table(rows: dict[str, dict], title: str) -> list[str]:
    """As Markdown."""
    if "cells" in next(iter(rows.values())):
        return cells(rows, title)
    lines = [
        f"| {title} | MSE < 1e-3 | MSE < 1e-2 | median PSNR | labels | matched |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        seeds = row["seeds"]
        errors = torch.tensor([e for s in seeds for e in s["mse"]])
        ratio = torch.tensor([e for s in seeds for e in s["psnr"]])
        labels = sum(s["labels"] for s in seeds) / len(seeds)
        sharp, seen = (int((errors < limit).sum()) for limit in (1e-3, 1e-2))
        lines.append(
            f"| {name} | {sharp} of {len(errors)} | {seen} of {len(errors)} | "
            f"{float(ratio.median()):.1f} dB | {labels:.0%} | {sum(s['matched'] for s in seeds)} of {len(seeds)} |"
        )
    return lines


def save(file: Path, results: dict[str, Any]) -> None:
    """As JSON, with each list of numbers on a line of its own."""
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found.group().split()), json.dumps(results, indent=1))
    file.write_text(text + "\n")


def put(key: str, lines: list[str]) -> None:
    """Lines between their marks in the page."""
    fill(PAGE, {key: "\n".join(lines)})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    parser.add_argument("--only", choices=list(TITLES), nargs="+", default=list(TITLES), help="some of the tables")
    only = parser.parse_args().only
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    console = Console()
    everything: dict[str, dict[str, Callable[[], dict]]] = {
        "labels": {
            f"{name}, {n}": lambda n=n, steps=steps: labels(n, steps)
            for name, steps in (("untrained", 0), ("trained", 80))
            for n in (8, 32, 128)
        },
        "aggregation": {str(k): lambda k=k: aggregated(k) for k in (8, 32, 65)},
        "searches": searches(),
        "grid": grid(),
        "membership": {"area under the ROC curve": membership},
    }
    for key, rows in everything.items():
        if key not in only:
            continue
        results[key] = {}
        for name, row in track(rows.items(), key, console=console):
            results[key][name] = row()
            console.print(table({name: results[key][name]}, key)[-1], highlight=False)
        save(RESULTS, results)
    for key, title in TITLES.items():
        put(key, table(results[key], title))


if __name__ == "__main__":
    main()
