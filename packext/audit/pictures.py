"""The report's pictures, drawn by matplotlib from the sections alone."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from packext.audit.findings import BY_CHANCE
from packext.audit.inversion import Inversion
from packext.audit.labels import Labels
from packext.audit.records import Membership, Records
from packext.audit.sweep import Sweep

if TYPE_CHECKING:
    from packext.audit._run import Audit

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
GREY = "#8a9097"
WIDTH = 9.0


def pictures(audit: Audit) -> dict[str, Figure]:
    """Draw what there is to draw.

    Args:
        audit: all sections.

    Returns:
        A figure for each section that has one.
    """
    made = {
        "labels": _labels(audit.labels),
        "inversion": _inversion(audit.inversion),
        "records": _records(audit.records),
        "membership": _membership(audit.membership),
        "sweep": _sweep(audit.sweep),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _mark(axes: Axes, at: float, word: str) -> None:
    """A line across, named above the axes, where nothing is drawn."""
    axes.axvline(at, color="#222", ls="--", lw=1)
    axes.text(at, 1.0, word, transform=axes.get_xaxis_transform(), fontsize=8, va="bottom", ha="center")


def _labels(s: Labels) -> Figure | None:
    """Rules as points with intervals, guessing as a line."""
    if not s.rules:
        return None
    rules = sorted(s.rules, key=lambda r: r.accuracy.value)
    figure = Figure(figsize=(WIDTH, 1.1 + 0.34 * len(rules)), layout="constrained")
    axes = figure.subplots()
    for k, r in enumerate(rules):
        beats = r.chance <= BY_CHANCE
        axes.plot([r.accuracy.low, r.accuracy.high], [k, k], color=COLOURS[1] if beats else GREY, lw=3, alpha=0.5)
        axes.plot(r.accuracy.value, k, "o", color=COLOURS[1] if beats else GREY, ms=8)
    if s.guess is not None:
        _mark(axes, s.guess, "guessing")
    axes.set_yticks(range(len(rules)), [r.rule for r in rules])
    axes.set(xlim=(0, 1.02), ylim=(-0.6, len(rules) - 0.4), xlabel="share of a batch's labels that are counted")
    _bare(axes)
    return figure


def _inversion(s: Inversion) -> Figure | None:
    """Originals above what each search found, one sample by itself and the real batch."""
    names = [key[: -len("|found")] for key in s.arrays if key.endswith("|found")]
    if not names:
        return None
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rsplit(", ", 1)[1], []).append(name)
    low, high = s.arrays["range"].tolist()
    wide = max(len(s.arrays[f"{n}|true"]) for n in names)
    plan: list[tuple[str, str]] = []
    for group, members in groups.items():
        longest = max(members, key=lambda n: len(s.arrays[f"{n}|true"]))
        plan.append((f"original\n{group}", f"{longest}|true"))
        plan += [
            (n.rsplit(", ", 1)[0].replace(" from ", "\nfrom ").replace("Inverting ", "Inverting\n"), f"{n}|found")
            for n in members
        ]
    figure = Figure(figsize=(WIDTH, 0.2 + 1.06 * len(plan)), layout="constrained")
    grid = figure.subplots(len(plan), wide, squeeze=False)
    for line, (title, key) in zip(grid, plan, strict=True):
        images = s.arrays[key]
        ratios = s.arrays[key.replace("|found", "|psnr")] if key.endswith("found") else None
        for k, axes in enumerate(line):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if k < len(images):
                _image(axes, images[k], low, high)
                if ratios is not None:
                    axes.set_xlabel(f"{round(float(ratios[k]), 1) or 0.0:.1f} dB", fontsize=8, labelpad=1)
        line[0].set_ylabel(title, fontsize=8, rotation=0, ha="right", va="center", labelpad=8)
    return figure


def _image(axes: Axes, image: np.ndarray, low: float, high: float) -> None:
    shown = np.clip((image - low) / (high - low), 0, 1)
    if len(shown) == 1:
        axes.imshow(shown[0], cmap="gray_r", vmin=0, vmax=1)
    else:
        axes.imshow(shown.transpose(1, 2, 0))


def _records(s: Records) -> Figure | None:
    """Norms as a histogram with the suggested clip, and the records that stand out."""
    norms = np.array(s.norms)
    if not len(norms) or not (norms > 0).any():
        return None
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    images = s.arrays.get("worst")
    if images is None:
        left = figure.subplots()
    else:
        parts = figure.subfigures(1, 2, width_ratios=[1.1, 1], squeeze=False)[0]
        left = parts[0].subplots()
        for k, axes in enumerate(parts[1].subplots(3, 4).flat):
            axes.axis("off")
            if k < len(images):
                record = s.worst[k]
                _image(axes, images[k], float(images.min()), float(images.max()))
                label = "" if record.label is None else f", label {record.label}"
                axes.set_title(f"{record.index}{label}", fontsize=8, pad=2)
        parts[1].suptitle("highest leverage: index of the member", fontsize=9)
    positive = norms[norms > 0]
    left.hist(positive, bins=np.geomspace(positive.min(), positive.max() * 1.001, 40).tolist(), color=COLOURS[0])
    if s.suggested_clip:
        left.axvline(s.suggested_clip, color=COLOURS[1], lw=2)
        left.set_title(f"suggested C {s.suggested_clip:.2g}", color=COLOURS[1], fontsize=9)
    left.set(xscale="log", xlabel="norm of a sample's gradient", ylabel="samples")
    if positive.max() < 30 * positive.min():  # no two decades to name: matplotlib would name all parts of one
        left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter(NullFormatter())
    _bare(left)
    return figure


def _membership(s: Membership) -> Figure | None:
    """ROC curves on two scales: all of it, and where false positives are few."""
    if not s.scores:
        return None
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    whole, corner = figure.subplots(1, 2)
    for axes in (whole, corner):
        for score, colour in zip(s.scores, COLOURS, strict=False):
            fpr, tpr = s.arrays[f"{score.score}|fpr"], s.arrays[f"{score.score}|tpr"]
            axes.plot(fpr, tpr, color=colour, lw=1.8, label=f"{score.score}, area {score.auc.value:.2f}")
        line = np.geomspace(1e-4, 1, 50)
        axes.plot(line, line, color=GREY, ls="--", lw=1, label="guessing")
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
        _bare(axes)
    least = max(1e-4, 1 / max(s.others, 1))
    corner.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(max(1e-4, 1 / max(s.members, 1)), 1.1))
    whole.legend(frameon=False, fontsize=8, loc="lower right")
    corner.set_title("the same, where false positives are few", fontsize=9)
    return figure


def _sweep(s: Sweep) -> Figure | None:
    """What is left of the training beside leakage of inputs and of labels, with a line for each defence."""
    trained = any(r.accuracy is not None for r in s.rows)
    left = ("accuracy after training with it", [r.accuracy for r in s.rows])
    if not trained:
        left = ("cosine to the undefended gradient", [r.signal for r in s.rows])
    guess = next((r.guess for r in s.rows if r.labels is not None), None)
    panels = [
        (*left, None, ""),
        ("best reconstruction of one sample, dB", [r.psnr_best for r in s.rows], s.psnr_guess, "guessing"),
        ("labels counted at the real batch size", [r.labels for r in s.rows], guess, "guessing"),
    ]
    panels = [p for p in panels if any(v is not None for v in p[1])]
    if len(panels) < 2 or len(s.rows) < 2:
        return None
    names = [fill(r.name, 40) for r in s.rows]
    pitch = max(0.32, *(0.16 * (name.count("\n") + 1) + 0.06 for name in names))
    figure = Figure(figsize=(WIDTH, 1.2 + pitch * len(s.rows)), layout="constrained")
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for k, (axes, (title, values, mark, word)) in enumerate(zip(every, panels, strict=True)):
        for line, value in enumerate(values):
            colour = "#222222" if not line else COLOURS[k > 0]
            if value is not None:
                axes.plot(value, line, "o" if line else "D", color=colour, ms=7)
        if mark is not None:
            _mark(axes, mark, word)
        axes.margins(x=0.08)
        if not title.endswith("dB"):
            axes.set_xlim(min(-0.04, axes.get_xlim()[0]), 1.04)
        axes.set_xlabel(title, fontsize=9)
        axes.set_ylim(len(s.rows) - 0.4, -0.6)
        axes.set_yticks(range(len(s.rows)), names)
        axes.grid(axis="y", color=GREY, lw=0.4, alpha=0.6)
        _bare(axes)
    return figure
