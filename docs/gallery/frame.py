"""What the scripts of the gallery share: command line, data that need no download, and the look of the figures."""

from __future__ import annotations

import argparse
import inspect
import statistics
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from pydoc_data.topics import topics
from time import process_time
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

BLUE, ORANGE, GREEN, GREY = "#2a6f97", "#d1661c", "#4f8a4b", "#8a8a8a"
Shown = tuple[Figure, dict[str, Any]]


def run(show: Callable[[bool], Shown]) -> None:
    """Run a script from the command line: write its figure beside it and print its numbers."""
    script = Path(inspect.getfile(show))
    parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(show)))
    parser.add_argument("--small", action="store_true", help="at the size at which the tests run it")
    parser.add_argument("--out", type=Path, default=script.parent, help="folder for the figure (default: the script's)")
    arguments = parser.parse_args()
    figure, numbers = show(arguments.small)
    figure.savefig(arguments.out / f"{script.stem}.png", dpi=100)
    for what, number in numbers.items():
        print(f"{what}: {written(number)}")


def written(number: Any) -> str:
    """A number, or several, as they are printed."""
    if isinstance(number, (list, tuple)):
        return ", ".join(map(written, number))
    return f"{number:.3g}" if isinstance(number, float) else str(number)


def digits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Handwritten digits `[1797, 64]` with pixels between 0 and 1, and what they are, in a random order."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x, dtype=dtype)[order] / 16, torch.tensor(y)[order]


def text(length: int) -> tuple[Tensor, int]:
    """Python's own help texts as `[length]` numbers of characters, and how many different characters there are."""
    body = "".join(topics.values())[:length]
    letters = sorted(set(body))
    index = {letter: k for k, letter in enumerate(letters)}
    return torch.tensor([index[letter] for letter in body]), len(letters)


def perceptron(*sizes: int, activation: Callable[[], nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    """Linear layers with an activation between them."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    steps: int,
    rate: float = 0.01,
    size: int | None = None,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Train a classifier by Adam on all samples, or on random batches of a size, with a penalty or without."""
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        batch = slice(None) if size is None else torch.randint(len(y), (size,))
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty()).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of samples whose largest output is the right one."""
    return (model(x).argmax(-1) == y).float().mean().item()


def ratio(way: Callable[[], Any], unit: Callable[[], Any], times: int = 9) -> float:
    """Processor time of one way in multiples of another's: the median over runs by turns, after one of each."""
    way(), unit()
    found: list[float] = []
    for _ in range(times):
        start = process_time()
        unit()
        middle = process_time()
        way()
        found.append((process_time() - middle) / max(middle - start, 1e-9))
    return statistics.median(found)


def peak(way: Callable[[], Any]) -> int:
    """Bytes of tensors that a call holds at its peak beyond what there was before, after one call to warm up."""
    way()
    with torch.profiler.profile(profile_memory=True) as profile:
        way()
    events = profile.profiler.kineto_results.events()  # the only place where each allocation is found
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()) if e.name() == "[memory]"]
    return max(accumulate(sizes), default=0)


def tidy(*parts: Any) -> None:
    """No more ink than needed."""
    for axes in parts:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)


def picture(
    axes: Any, values: Tensor, title: str, colors: str = "magma", limits: tuple[float, float] | None = None
) -> None:
    """A matrix, or the 64 pixels of a digit, as a picture: colors from zero on, or between two limits."""
    values = values.detach().view(8, 8) if values.dim() == 1 else values.detach()
    low, high = limits or (0.0, values.max().item())
    axes.imshow(values.numpy(), colors, vmin=low, vmax=high)
    axes.set_title(title, fontsize=9)
    axes.set(xticks=[], yticks=[])
