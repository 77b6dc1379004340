"""What gradients give away, measured: ``python -m benchmarks.attacks``; writes the tables of docs/attacks.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F

from packext import attacks, defences
from packext.attacks import DeepLeakage, InvertingGradients, Shared, psnr, share

HERE = Path(__file__).parent
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


def inversion(n: int, size: int, data: Callable[[int], Any], attack: Any, change: Any, seeds: int, known: bool) -> dict:
    """One row: an attack on several seeds."""
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
    return {"seeds": rows}


def same(shared: Shared) -> Shared:
    return shared


def searches() -> dict[str, Callable[[], dict]]:
    """Rows of the first table."""
    one = lambda seed: digits(1, seed)  # noqa: E731
    return {
        "DLG, digit 16 x 16": lambda: inversion(1, 16, one, DeepLeakage(60, 3), same, 10, False),
        "iDLG, digit 16 x 16": lambda: inversion(1, 16, one, DeepLeakage(60, 3), same, 10, True),
        "DLG, 8 digits 16 x 16": lambda: inversion(
            8, 16, lambda seed: digits(8, seed), DeepLeakage(150), same, 3, False
        ),
        "DLG, photograph 32 x 32": lambda: inversion(1, 32, photo, DeepLeakage(300), same, 10, False),
        "DLG without line search, photograph 32 x 32": lambda: inversion(
            1, 32, photo, DeepLeakage(300, line_search=False), same, 10, False
        ),
    }


def grid() -> dict[str, Callable[[], dict]]:
    """Rows of the second table: defences against an attacker who does not know of them."""
    levels: dict[str, Any] = {}
    for level in (1e-4, 1e-3, 1e-2, 1e-1):
        levels[f"Gaussian noise {level:g}"] = defences.GaussianNoise(level)
        levels[f"Laplacian noise {level:g}"] = defences.LaplacianNoise(level)
    for kind in ("float16", "bfloat16", "int8"):
        levels[kind] = defences.Quantisation(kind)
    for part in (0.01, 0.1, 0.2, 0.3, 0.5, 0.7):
        levels[f"pruning {part:.0%}"] = defences.Pruning(part)
    one = lambda seed: digits(1, seed)  # noqa: E731
    rows: dict[str, Callable[[], dict]] = {
        name: lambda d=defence: inversion(1, 16, one, DeepLeakage(30), d, 5, True) for name, defence in levels.items()
    }
    clip = defences.Clipped(0.1)
    rows["clipping to 0.1"] = lambda: inversion(1, 16, one, DeepLeakage(30), clip, 5, True)
    rows["clipping to 0.1, cosine"] = lambda: inversion(1, 16, one, InvertingGradients(300), clip, 5, True)
    noisy = defences.Clipped(0.1, 0.1)
    rows["clipping to 0.1, noise 0.1, cosine"] = lambda: inversion(1, 16, one, InvertingGradients(300), noisy, 5, True)
    return rows


def table(rows: dict[str, dict], title: str) -> list[str]:
    """As Markdown."""
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


def write(results: dict[str, dict[str, dict]]) -> None:
    """Put the tables between their marks in the page."""
    text = PAGE.read_text()
    for key, title in (("searches", "search"), ("grid", "what is shared")):
        begin, end = f"<!-- {key}: begin -->", f"<!-- {key}: end -->"
        head, rest = text.split(begin)
        text = "\n".join([head + begin, *table(results[key], title), end + rest.split(end)[1]])
    PAGE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    parser.add_argument("--only", choices=["searches", "grid"], help="measure one of the tables again")
    only = parser.parse_args().only
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    console = Console()
    for key, rows in (("searches", searches()), ("grid", grid())):
        if only not in (None, key):
            continue
        results[key] = {}
        for name, row in track(rows.items(), key, console=console):
            results[key][name] = row()
            console.print(table({name: results[key][name]}, key)[-1])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write(results)


if __name__ == "__main__":
    main()
