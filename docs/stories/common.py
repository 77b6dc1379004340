"""What the stories share: their command line, data that need no download, networks, and the look of the figures."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

import packext as px
from packext.diagnostics import Cockpit, Instrument, Verdict

BLUE, ORANGE, GREY = "#2a6f97", "#d1661c", "#8a8a8a"


def tell(story: Callable[[bool], tuple[Figure, dict[str, Any]]]) -> None:
    """Run a story from the command line: write its figure beside its script and print its numbers."""
    script = Path(inspect.getfile(story))
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(story)))
    parser.add_argument("--full", action="store_true", help="at full size, on a GPU if there is one")
    parser.add_argument("--out", type=Path, default=script.parent, help="folder for the figure (default: the script's)")
    arguments = parser.parse_args()
    figure, numbers = story(arguments.full)
    name = script.stem + ("-full" if arguments.full else "")
    figure.savefig(arguments.out / f"{name}.png", dpi=110)
    for what, number in numbers.items():
        print(f"{what}: {number:.3g}" if isinstance(number, float) else f"{what}: {number}")


def device(full: bool) -> torch.device:
    return torch.device("cuda" if full and torch.cuda.is_available() else "cpu")


def images(full: bool) -> tuple[Tensor, Tensor]:
    """Handwritten digits `[1797, 1, 8, 8]`, or 20,000 pieces of two photographs `[N, 3, 32, 32]` in 8 classes.

    Pixels are between 0 and 1. The class of a piece is which photograph it is from, and the quarter of it.
    """
    draw = torch.Generator().manual_seed(0)
    if not full:
        x, y = load_digits(return_X_y=True)
        return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)
    photos = torch.stack([torch.tensor(p) for p in load_sample_images().images]).permute(0, 3, 1, 2) / 255
    height, width = photos.shape[-2:]
    which = torch.randint(2, (20_000,), generator=draw)
    top = torch.randint(height - 31, (20_000,), generator=draw)
    left = torch.randint(width - 31, (20_000,), generator=draw)
    pieces = [photos[p, :, t : t + 32, s : s + 32] for p, t, s in zip(which, top, left, strict=True)]
    quarter = 2 * (top + 16 > height // 2).long() + (left + 16 > width // 2).long()
    return torch.stack(pieces), 4 * which + quarter


def network(full: bool, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """3C3D for the photographs, and a network of the same kind for digits: convolutions, then linear layers."""
    torch.manual_seed(0)
    if full:
        pool = [nn.MaxPool2d(3, 2, ceil_mode=True)]
        widths, kernels, linear = (3, 64, 96, 128), ((5, 0), (3, 0), (3, 1)), (1152, 512, 256, 8)
    else:
        pool, widths, kernels, linear = [], (1, 8, 16), ((3, 0), (3, 0)), (256, 64, 32, 10)
    layers: list[nn.Module] = []
    for a, b, (kernel, padding) in zip(widths, widths[1:], kernels, strict=False):
        layers += [nn.Conv2d(a, b, kernel, padding=padding), activation(), *pool]
    layers.append(nn.Flatten())
    for a, b in zip(linear, linear[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def weights(model: nn.Module) -> dict[str, str]:
    """Names of the weights of a network, from the first layer to the last, by what they are of."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
            found[f"{kind} {1 + sum(k.startswith(kind) for k in found)}"] = f"{name}.weight"
    return found


class Said:
    """A sink that keeps the verdicts of a run: what each was called, and where it was first said."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}

    def begin(self, names: list[str]) -> None:
        pass

    def write(self, step: int, values: Any, absent: Any) -> None:
        pass

    def say(self, verdict: Verdict) -> None:
        self.names.setdefault(verdict.name, verdict.step)

    def __str__(self) -> str:
        return ", ".join(f"{name} (step {step})" for name, step in self.names.items()) or "none"


def watch(
    model: nn.Module,
    loss: nn.Module,
    instruments: list[Instrument],
    rate: float = 0.1,
    every: Any = 1,
    level: str | None = None,
    said: Said | None = None,
) -> tuple[Cockpit, Callable[[Tensor, Tensor], None]]:
    """A monitor, and a function that takes one step of gradient descent under it."""
    px.extend(model), px.extend(loss)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    monitor = Cockpit(model, optimizer, level, every, [said] if said else [], instruments)

    def step(x: Tensor, y: Tensor) -> None:
        with monitor.step():
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    return monitor, step


def verdicts(model: nn.Module, x: Tensor, y: Tensor, rate: float = 0.1, steps: int = 60, n: int = 64) -> Said:
    """What the monitor says of a training of some steps, from the level "economy"."""
    said, draw = Said(), torch.Generator().manual_seed(0)
    _, step = watch(model, nn.CrossEntropyLoss(), [], rate, 1, "economy", said)
    for _ in range(steps):
        batch = torch.randint(len(y), (n,), generator=draw).to(y.device)
        step(x[batch], y[batch])
    return said


def tidy(axes: Any) -> None:
    """No more ink than needed."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(10)
