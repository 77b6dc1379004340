"""Draw the defence grid of ``python -m benchmarks.attacks``: ``python -m benchmarks.attacks_figures`` (matplotlib)."""

from __future__ import annotations

import base64
import json
import statistics
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.attacks import PAGE, RESULTS, digits

NONE, GREY = "the gradient itself", "#8a8a8a"
LEVELS = ("0.0001", "0.001", "0.01", "0.1")
PANELS = {
    "Gaussian noise": {f"Gaussian noise {level}": level for level in LEVELS},
    "Laplacian noise": {f"Laplacian noise {level}": level for level in LEVELS},
    "Short formats": {"float16": "fp16", "bfloat16": "bf16", "int8": "int8"},
    "Pruning": {f"pruning {share}%": f"{share} %" for share in (1, 10, 20, 30, 50, 70)},
}


def middle(row: dict[str, Any], what: str) -> float:
    return statistics.median(seed[what][0] for seed in row["seeds"])


def curve(row: dict[str, Any], length: int) -> np.ndarray:
    """Median over seeds of the objective after each iteration; a search that has ended stays where it was."""
    curves = [seed["objective"][:length] for seed in row["seeds"]]
    return np.median([c + c[-1:] * (length - len(c)) for c in curves], axis=0)


def apart(values: list[float], gap: float) -> list[float]:
    """Heights for labels near given ones, none nearer to the next than a gap; from the lowest up."""
    placed: dict[int, float] = {}
    below = -np.inf
    for i in sorted(range(len(values)), key=values.__getitem__):
        below = placed[i] = max(values[i], below + gap)
    return [placed[i] for i in range(len(values))]


def distances(grid: dict[str, Any]) -> Figure:
    """The distance of gradients over iterations, a panel for each kind of defence; later ones are flat."""
    figure, length = Figure(figsize=(11, 6.6), layout="constrained"), 12
    axes: list[Axes] = list(figure.subplots(2, 2, sharex=True, sharey=True).flat)
    for ax, (title, rows) in zip(axes, PANELS.items(), strict=True):
        shades = colormaps["plasma"](np.linspace(0.05, 0.75, len(rows)))
        lines = [(NONE, "none", GREY, "--"), *[(k, n, c, "-") for (k, n), c in zip(rows.items(), shades, strict=True)]]
        curves = [np.maximum(curve(grid[key], length), 1e-11) for key, *_ in lines]
        heights = apart([float(np.log10(c[-1])) for c in curves], 0.6)
        for (key, name, color, style), values, height in zip(lines, curves, heights, strict=True):
            ax.plot(range(1, length + 1), values, style, color=color, lw=1.8)
            text = f"{name}  ({middle(grid[key], 'psnr'):.0f} dB)".replace("(-", "(\N{MINUS SIGN}")
            ax.text(length + 0.2, 10**height, text, color=color, va="center", fontsize=9)
        ax.set_title(title, loc="left", fontsize=11)
        ax.set_yscale("log")
        ax.set_xlim(1, length + 3.4)
        ax.set_xticks([1, 4, 8, 12])
        ax.grid(axis="y", color="#e4e4e4", lw=0.7)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[2:]:
        ax.set_xlabel("iteration, of up to 20 steps of L-BFGS")
    for ax in axes[::2]:
        ax.set_ylabel("distance to the shared gradient")
    return figure


def pictures(grid: dict[str, Any], seeds: int = 3) -> Figure:
    """Originals, and what the search made of each row's gradient."""
    keys = {NONE: "none", **{k: k.replace("Gaussian noise", "Gauss") for k in PANELS["Gaussian noise"]}}
    keys |= {k: k.replace("Laplacian noise", "Laplace") for k in PANELS["Laplacian noise"]}
    keys |= PANELS["Short formats"] | {k: f"pruned {v}" for k, v in PANELS["Pruning"].items()}
    half = (len(keys) + 1) // 2
    blocks = [list(keys.items())[:half], list(keys.items())[half:]]
    figure = Figure(figsize=(11, 1.13 * 2 * seeds + 1.1), layout="constrained")
    for part, block in zip(figure.subfigures(2, 1), blocks, strict=True):
        axes = part.subplots(seeds, half + 1)
        for seed in range(seeds):
            shown = [("original", digits(1, seed)[0].numpy(), None)]
            for key, name in block:
                row = grid[key]["seeds"][seed]
                shown.append((name, np.frombuffer(base64.b64decode(row["picture"]), np.uint8) / 255, row["psnr"][0]))
            for ax, (name, image, ratio) in zip(axes[seed], shown, strict=False):
                ax.imshow(image.reshape(16, 16), cmap="gray_r", vmin=0, vmax=1)
                if seed == 0:
                    ax.set_title(name, fontsize=8.5)
                if ratio is not None:
                    ax.set_xlabel(
                        f"{ratio:.0f} dB".replace("-", "\N{MINUS SIGN}"), fontsize=8, labelpad=2, color="#555555"
                    )
            for ax in axes[seed]:
                ax.set_xticks([])
                ax.set_yticks([])
                ax.spines[:].set_color("#bbbbbb")
            for ax in axes[seed][len(shown) :]:
                ax.axis("off")
    return figure


def main() -> None:
    grid = json.loads(RESULTS.read_text())["grid"]
    distances(grid).savefig(PAGE.parent / "attacks-distance.png", dpi=110)
    pictures(grid).savefig(PAGE.parent / "attacks-pictures.png", dpi=110)


if __name__ == "__main__":
    main()
