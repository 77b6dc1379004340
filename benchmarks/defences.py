"""Defences, and who knows of them: ``python -m benchmarks.defences``; writes the tables of docs/defences.md."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.attacks import cells, digits, relu_net, sigmoid_net, spread
from benchmarks.attacks import trained as classifier
from benchmarks.summary import fill
from packext import attacks, defences
from packext.attacks import (
    DeepLeakage,
    GaussianMisfit,
    InvertingGradients,
    LaplacianMisfit,
    MaximumPosterior,
    Misfit,
    Prior,
    RoundingMisfit,
    Shared,
    judge,
    psnr,
    sent,
    share,
    without,
)
from packext.defences import NoPeek, distance_correlation, u_distance_correlation_sqr

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "defences.json", HERE.parent / "docs" / "defences.md"
FIGURE = HERE.parent / "docs" / "nopeek.png"
TITLES = {
    "knowing": "what is shared",
    "levels": "network, what is shared",
    "withholding": "nearest to",
    "property": "property, model",
    "nopeek": "alpha",
    "dcor": "samples, dimensions",
}
SEEDS, MORE = range(10, 15), range(100, 110)
LOSS, SHAPE, SIZE = nn.CrossEntropyLoss(), (1, 16, 16), 32

# -- one digit, its label known: an attacker who does not know of the defence, and one who does ---------

Attack = Callable[[nn.Module, Shared, Tensor], Tensor]


def search(attack: Any, mask: bool = False) -> Attack:
    """What a search finds; with a mask, of the entries that were sent alone."""
    return lambda model, shared, y: attack(model, shared, SHAPE, labels=y, mask=sent(shared) if mask else None).inputs


def with_draw(model: nn.Module, shared: Shared, y: Tensor) -> Tensor:
    """PRECODE's draw is searched for together with the input; gradients of the bottleneck and behind are ignored."""
    pixels = 256
    found = DeepLeakage(30, 5)(
        model, without(shared, "encoder", "decoder", "head"), (pixels + SIZE,), labels=y,
        forward=lambda m, v: m(v[:, :pixels].view(-1, *SHAPE), v[:, pixels:]),
    )  # fmt: skip
    return found.inputs[:, :pixels].view(-1, *SHAPE)


def probable(misfit: Misfit, clip: float | None = None) -> Attack:
    """The most probable input, from where the searches that know of clipping alone end."""

    def run(model: nn.Module, shared: Shared, y: Tensor) -> Tensor:
        starts = [DeepLeakage(30, clip=clip)(model, shared, SHAPE, labels=y).inputs]
        starts.append(InvertingGradients(300)(model, shared, SHAPE, y).inputs)
        prior = None if isinstance(misfit, RoundingMisfit) else expected(16, SEEDS)
        return MaximumPosterior(misfit, prior, starts, clip=clip)(model, shared, SHAPE, y).inputs

    return run


def expected(size: int, seeds: range) -> Prior:
    """Of 1000 digits that are attacked with none of these seeds."""
    every = digits(1000 + len(seeds), 0, size)[0]
    drawn = torch.cat([digits(1, seed, size)[0] for seed in seeds])
    return Prior.of(every[(every[:, None] != drawn).flatten(2).any(2).all(1)][:1000])


def pair(change: Any, blind: Attack, knowing: Attack, how: str, precode: bool = False) -> Callable[[], dict]:
    """One row: both attackers on the same gradients."""

    def row() -> dict:
        found: dict[str, list[float]] = {"blind": [], "knowing": []}
        for seed in SEEDS:
            torch.manual_seed(seed)
            x, y = digits(1, seed)
            model, loss = sigmoid_net(1, 16, 10), LOSS
            if precode:
                model = defences.Precode(model[:-1], model[-1], SIZE).double()  # type: ignore[index]
                loss = defences.PrecodeLoss()
                for p in model.parameters():
                    nn.init.uniform_(p, -0.5, 0.5)
            direct = isinstance(change, (defences.Clipped, defences.Soteria))
            shared = change(model, loss, x, y) if direct else change(share(model, loss, x, y))
            for who, attack in (("blind", blind), ("knowing", knowing)):
                found[who].append(float(psnr(clean(attack(model, shared, y)), x)))
        return {"psnr": found, "how": how}

    return row


def clean(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 1e6, -1e6)


def withheld(whose: str) -> dict:
    """Two digits, of which one is withheld: how near what was found is to it, or to the other."""
    found: dict[str, list[float]] = {"blind": [], "knowing": []}
    for seed in SEEDS:
        torch.manual_seed(seed)
        x, y = digits(2, seed)
        model, defence = sigmoid_net(1, 16, 10), defences.Withholding(1)
        kept = defence.kept(model, LOSS, x, y)
        shared = defence(model, LOSS, x, y)
        true = x[kept] if whose == "the other" else x[1 - kept]
        for who, seen, labels in (("blind", replace(shared, n=2), y), ("knowing", shared, y[kept])):
            got = clean(DeepLeakage(30)(model, seen, SHAPE, labels=labels).inputs)
            found[who].append(float(psnr(got, true).max()))
    return {"psnr": found, "how": "that one was sent, and which label it has"}


def guess() -> dict:
    """The mean of other digits, and of other digits with the label."""
    found: dict[str, list[float]] = {"blind": [], "knowing": []}
    others, labels = digits(1797, 0)
    for seed in SEEDS:
        x, y = digits(1, seed)
        rest = (others != x).flatten(1).any(1)
        found["blind"].append(float(psnr(others[rest].mean(0, keepdim=True), x)))
        found["knowing"].append(float(psnr(others[rest & (labels == y)].mean(0, keepdim=True), x)))
    return {"psnr": found, "how": "the mean of the label's digits"}


def knowing() -> dict[str, Callable[[], dict]]:
    plain, same = search(DeepLeakage(30)), lambda shared: shared
    rows = {"nothing seen: the mean of all digits": guess, "as it is": pair(same, plain, plain, "")}
    for part in (0.3, 0.5, 0.7, 0.9):
        rows[f"pruning {part:.0%}"] = pair(
            defences.Pruning(part), plain, search(DeepLeakage(30), mask=True), "entries that were sent alone"
        )
    for part in (0.2, 0.5, 0.8):
        rows[f"Soteria {part:.0%}"] = pair(
            defences.Soteria(part), plain, search(DeepLeakage(30), mask=True), "entries that were sent alone"
        )
    rows["PRECODE, 32 variables"] = pair(
        same, search(DeepLeakage(30, 5)), with_draw, "layers below the bottleneck; the draw is searched for", True
    )
    cosine = search(InvertingGradients(300))
    rows["clipping to 0.1"] = pair(defences.Clipped(0.1), plain, cosine, "the cosine")
    noise = "its distribution and level; other digits"
    for std in (0.01, 0.1):
        gauss, laplace = defences.GaussianNoise(std, seed=0), defences.LaplacianNoise(std, seed=0)
        rows[f"Gaussian noise {std:g}"] = pair(gauss, plain, probable(GaussianMisfit(std)), noise)
        rows[f"Laplacian noise {std:g}"] = pair(laplace, plain, probable(LaplacianMisfit(std)), noise)
    for kind, stochastic in (("bfloat16", False), ("int8", False), ("int8", True)):
        rounded = defences.Quantisation(kind, stochastic, seed=0)
        name = kind + ", stochastic" * stochastic
        rows[name] = pair(rounded, plain, probable(RoundingMisfit(kind, stochastic)), "the cells of the grid")
    rows["clipping to 0.1, noise 0.1"] = pair(
        defences.Clipped(0.1, 0.1, seed=0), cosine, probable(GaussianMisfit(0.01), clip=0.1), f"the norm; {noise}"
    )
    return rows


def level(sigmoid: bool, defend: Callable[[float], tuple[Any, Misfit]]) -> dict:
    """One digit, as it is found without knowing the defence, by the better of two searches, and by what else is known.

    `defend` makes the defence, and what is known of it, of the root mean square of the gradient.
    """
    found: dict[str, list[float]] = {}
    size = 16 if sigmoid else 8
    prior = expected(size, MORE)
    for seed in MORE:
        x, y = digits(1, seed, size)
        torch.manual_seed(seed)
        model = sigmoid_net(1, 16, 10) if sigmoid else classifier(80, seed)
        whole, shape = share(model, LOSS, x, y), tuple(x.shape[1:])
        rms = float(torch.cat([g.flatten() for g in whole.gradient.values()]).square().mean().sqrt())
        defence, misfit = defend(rms)
        shared = defence(whole)
        starts = [DeepLeakage(30)(model, shared, shape, labels=y).inputs]
        starts.append(InvertingGradients(300)(model, shared, shape, y).inputs)
        found.setdefault("nothing", []).append(max(float(psnr(clean(one), x)) for one in starts))
        for known, others in (("how it was changed", None), ("and other digits", prior)):
            attack = MaximumPosterior(misfit, others, [clean(one) for one in starts])
            found.setdefault(known, []).append(float(psnr(attack(model, shared, shape, y).inputs, x)))
    found["gain"] = [b - a for a, b in zip(found["nothing"], found["and other digits"], strict=True)]
    return {"psnr": found}


def levels() -> dict[str, Callable[[], dict]]:
    """Noise and rounding, on the network with random weights and on a trained one with ReLUs."""
    changes: dict[str, Callable[[float], tuple[Any, Misfit]]] = {}
    for k in (0.1, 1.0):
        changes[f"Gaussian noise, {k:g} x RMS"] = lambda size, k=k: (
            defences.GaussianNoise(k * size, seed=0),
            GaussianMisfit(k * size),
        )
        changes[f"Laplacian noise, {k:g} x RMS"] = lambda size, k=k: (
            defences.LaplacianNoise(k * size, seed=0),
            LaplacianMisfit(k * size),
        )
    for kind, stochastic in (("float16", False), ("bfloat16", False), ("int8", False), ("int8", True)):
        changes[kind + ", stochastic" * stochastic] = lambda size, kind=kind, stochastic=stochastic: (
            defences.Quantisation(kind, stochastic, seed=0),
            RoundingMisfit(kind, stochastic),
        )
    return {
        f"{network}, {name}": lambda sigmoid=sigmoid, change=change: level(sigmoid, change)
        for network, sigmoid in (("sigmoid", True), ("ReLU, trained", False))
        for name, change in changes.items()
    }


# -- properties of a batch -------------------------------------------------------------------------------

CORNER = F.pad(torch.ones(2, 2, dtype=torch.float64), (0, 6, 0, 6))
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "inverted": lambda x: 1 - x,
    "brightened by 0.3": lambda x: x + 0.3,
    "2 x 2 mark in a corner": lambda x: torch.maximum(x, CORNER),
    "none": lambda x: x,
}


def properties(kind: str, steps: int) -> dict:
    """Area under the ROC curve by how many of 16 samples have the property, which half of all digits have at random."""
    found: dict[str, list[float]] = {}
    intervals: list[tuple[float, float]] = []
    for seed in range(5):
        torch.manual_seed(seed)
        x, y = digits(1797, seed, 8)
        has = torch.rand(len(x)) < 0.5
        x = torch.where(has[:, None, None, None], CHANGES[kind](x), x)
        model = relu_net()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(steps):  # on samples of neither attacker nor clients
            rows = 1200 + torch.randint(597, (64,))
            optimizer.zero_grad()
            LOSS(model(x[rows]), y[rows]).backward()
            optimizer.step()
        one, other = (v.nonzero()[:, 0] + 600 for v in (has[600:1200], ~has[600:1200]))
        for present in (1, 4, 8):
            judged = attacks.PropertyInference(16, present, seed=seed)(model, LOSS, x[:600], y[:600], has[:600])
            scores = []
            for count in (present, 0):
                batches = []
                for _ in range(150):
                    rows = torch.cat(
                        [one[torch.randperm(len(one))[:count]], other[torch.randperm(len(other))[: 16 - count]]]
                    )
                    batches.append(share(model, LOSS, x[rows], y[rows]))
                scores.append(judged(*batches))
            result = judge(scores[0], scores[1])
            found.setdefault(f"{present} of 16", []).append(result.auc)
            intervals.append(result.interval)
    return {"cells": {name: spread(values) for name, values in found.items()}, "intervals": intervals}


# -- NoPeek ----------------------------------------------------------------------------------------------


def trained(alpha: float, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A client of two convolutions and a server, trained on 900 digits; and all digits."""
    x, y = digits(1797, seed, 8)
    x = x.float()
    torch.manual_seed(seed)
    client = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
    server = nn.Sequential(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    model = nn.Sequential(client, server)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    with NoPeek(model, client, LOSS, alpha) as loss_fn:
        for _ in range(40):
            for rows in torch.randperm(896).split(128):
                optimizer.zero_grad()
                loss_fn(model(x[rows]), y[rows]).backward()
                optimizer.step()
    return model, x, y


def nopeek(alpha: float) -> dict:
    """Leakage, the error of an attacker with 450 leaked pairs of activations and inputs, accuracy: on 447 digits."""
    found: dict[str, list[float]] = {}
    for seed in range(5):
        model, x, y = trained(alpha, seed)
        with torch.no_grad():
            z = model[0](x).flatten(1)  # type: ignore[index]
            right = (model(x[1350:]).argmax(1) == y[1350:]).double().mean()
        z = (z - z[900:1350].mean(0)) / (z[900:1350].std(0) + 1e-8)
        hidden = [nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
        decoder = nn.Sequential(*hidden, nn.Linear(256, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
        optimizer = torch.optim.Adam(decoder.parameters(), 1e-3)
        for _ in range(1500):
            rows = 900 + torch.randint(450, (64,))
            optimizer.zero_grad()
            F.mse_loss(decoder(z[rows]), x[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            seen, sent_ = x[1350:1606], model[0](x[1350:1606])  # type: ignore[index]
            error = F.mse_loss(decoder(z[1350:]), x[1350:])
            blind = F.mse_loss(x[900:1350].mean(0).expand(447, -1, -1, -1), x[1350:])
            values = {
                "unbiased R*²": u_distance_correlation_sqr(seen, sent_),
                "biased R": distance_correlation(seen, sent_),
                "error of a decoder": error,
                "error of the mean image": blind,
                "accuracy": right,
            }
        for name, value in values.items():
            found.setdefault(name, []).append(float(value))
    return {"cells": {name: spread(values) for name, values in found.items()}}


def draw(rows: dict[str, dict]) -> None:
    """The table as a figure."""
    figure = Figure((10, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    alphas = [float(a) for a in rows]
    panels = [("unbiased R*²", "#2a6f97"), ("error of a decoder", "#d1661c"), ("accuracy", "#4b7f52")]
    for ax, (name, color) in zip(axes, panels, strict=True):
        mean, low, high = ([row["cells"][name][k] for row in rows.values()] for k in ("mean", "low", "high"))
        ax.fill_between(alphas, low, high, color=color, alpha=0.25, lw=0)
        ax.plot(alphas, mean, "o-", color=color, ms=3.5)
        ax.set(title=name, xlabel="alpha", ylim=(0, None))
        ax.spines[["top", "right"]].set_visible(False)
    level = next(iter(rows.values()))["cells"]["error of the mean image"]["mean"]
    axes[1].axhline(level, color="#8a8a8a", ls="--", lw=1)
    axes[1].text(0, level, "mean image", va="bottom", fontsize=8, color="#555555")
    axes[2].axhline(0.1, color="#8a8a8a", ls="--", lw=1)
    axes[2].text(0, 0.1, "guessing", va="bottom", fontsize=8, color="#555555")
    figure.savefig(FIGURE, dpi=110)


# -- dcor ------------------------------------------------------------------------------------------------


def correlate(who: str, n: int, d: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Biased and unbiased distance correlation of related samples, by this package or by dcor."""
    generator = torch.Generator().manual_seed(n + d)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    z = x[:, :64] + torch.randn(n, 64, generator=generator, dtype=torch.float64)
    if who == "packext":
        return lambda: float(distance_correlation(x, z)), lambda: float(u_distance_correlation_sqr(x, z))
    import dcor

    a, b = x.numpy(), z.numpy()
    return lambda: float(dcor.distance_correlation(a, b)), lambda: float(dcor.u_distance_correlation_sqr(a, b))


def both_values(who: str, n: int, d: int) -> list[float]:
    return [f() for f in correlate(who, n, d)]


def timed(who: str, n: int, d: int) -> float:
    """Seconds of one call, in a process of its own: torch is slower by far in one that has imported dcor."""
    f = correlate(who, n, d)[0]
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def status(key: str) -> float:
    """A line of Linux's account of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def peak(who: str, n: int, d: int) -> float:
    """MiB by which memory rises at most during one call."""
    f = correlate(who, n, d)[0]
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    f()
    return status("VmHWM") - before


def against_dcor(n: int, d: int) -> dict:
    spawn = multiprocessing.get_context("spawn")
    start = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with spawn.Pool(1, **start) as theirs, spawn.Pool(1, **start) as ours:
        both = {"dcor": theirs, "packext": ours}
        values = [pool.apply(both_values, (who, n, d)) for who, pool in both.items()]
        times = [[pool.apply(timed, (who, n, d)) for who, pool in both.items()] for _ in range(26)][1:]
        memory = [pool.apply(peak, (who, n, d)) for who, pool in both.items()]
    quartiles = statistics.quantiles([a / b for a, b in times], n=4)
    return {
        "differences": [abs(b - a) / abs(a) for a, b in zip(*values, strict=True)],
        "time": {"median": quartiles[1], "low": quartiles[0], "high": quartiles[2]},
        "memory": memory,
    }


# -- tables ----------------------------------------------------------------------------------------------


def table(key: str, rows: dict[str, dict]) -> list[str]:
    """As Markdown."""
    if key in ("knowing", "withholding"):
        lines = [
            f"| {TITLES[key]} | blind: MSE < 1e-2 | median PSNR | knowing: MSE < 1e-2 | median PSNR | knows and uses |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in rows.items():
            shown = []
            for values in row["psnr"].values():
                t = torch.tensor(values)
                shown += [
                    f"{int((t > 20).sum())} of {len(t)}",
                    f"{float(t.median()):.1f} dB ({float(t.min()):.1f} to {float(t.max()):.1f})",
                ]
            lines.append(f"| {name} | {' | '.join(shown)} | {row['how']} |")
        return lines
    if key == "levels":
        names = ["nothing", "how it was changed", "and other digits", "gain"]
        lines = [f"| {TITLES[key]} | {' | '.join(names)} |", "|---|---|---|---|---|"]
        for name, row in rows.items():
            spans = [torch.tensor(row["psnr"][known]) for known in names]
            shown = [f"{float(t.median()):.1f} ({float(t.min()):.1f} to {float(t.max()):.1f})" for t in spans]
            lines.append(f"| {name} | {' | '.join(shown)} |")
        return lines
    if key == "dcor":
        lines = [f"| {TITLES[key]} | difference, R | difference, R*² | time of dcor | peak of dcor | peak of packext |"]
        lines.append("|---" * 6 + "|")
        for name, row in rows.items():
            biased, unbiased = row["differences"]
            ratio = "{median:.1f} times ({low:.1f} to {high:.1f})".format(**row["time"])
            theirs, ours = row["memory"]
            lines.append(f"| {name} | {biased:.0e} | {unbiased:.0e} | {ratio} | {theirs:.0f} MiB | {ours:.0f} MiB |")
        return lines
    return cells(rows, TITLES[key], 3 if key == "nopeek" else 2)


def read() -> dict[str, dict[str, dict]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write(results: dict[str, dict[str, dict]]) -> None:
    """Put the tables between their marks in the page, and draw the figure."""
    fill(PAGE, {key: "\n".join(table(key, rows)) for key, rows in results.items()})
    if "nopeek" in results:
        draw(results["nopeek"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defences", description=__doc__)
    parser.add_argument("--only", choices=list(TITLES), nargs="*", default=list(TITLES), help="some of the tables")
    only = parser.parse_args().only
    console = Console()
    everything: dict[str, dict[str, Callable[[], dict]]] = {
        "dcor": {f"{n}, {d}": lambda n=n, d=d: against_dcor(n, d) for n in (64, 256) for d in (64, 3072)},
        "knowing": knowing(),
        "levels": levels(),
        "withholding": {whose: lambda whose=whose: withheld(whose) for whose in ("the one withheld", "the other")},
        "property": {
            f"{kind}, {model}": lambda kind=kind, steps=steps: properties(kind, steps)
            for kind in CHANGES
            for model, steps in (("untrained", 0), ("trained", 100))
        },
        "nopeek": {f"{alpha:g}": lambda alpha=alpha: nopeek(alpha) for alpha in (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)},
    }
    for key, rows in everything.items():
        if key not in only:
            continue
        measured = {}
        for name, row in track(rows.items(), key, console=console):
            measured[name] = row()
            console.print(table(key, {name: measured[name]})[-1], highlight=False)
            RESULTS.write_text(json.dumps({**read(), key: measured}, indent=1) + "\n")
    write(read())


if __name__ == "__main__":
    main()
