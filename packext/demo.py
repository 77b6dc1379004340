"""Train a small network on handwritten digits and look into its gradients on the way.

Some training labels are wrong on purpose. Besides the gradient, every backward pass yields the
norms of the per-sample gradients g_n and their variance: the norms point out the wrong labels, and
the variance says, layer by layer, how much of the mean gradient G is noise. Some also yield the
curvature of the loss. Then SGD and K-FAC train for the same time, and a monitor watches a training, and reports.
"""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import packext as px
from packext.attacks import Shared, share
from packext.audit import Audit, Data, Sharing
from packext.diagnostics import Cockpit, Run, Verdict, write_report

BATCH_SIZE = 64
WRONG_LABELS = 16
CURVATURE_EVERY = 20  # steps: it takes a cotangent for each class but one through the network
SHOWN = 20  # samples with the largest gradients that are listed
SHARED = 8  # samples behind the gradient that a client of an audit sends
MEMBERS = 697  # of an audit: the other 1100 are held out, which 0.1 % false positives need 1000 of


class Noise(NamedTuple):
    """What the per-sample gradients of one layer say: numbers, or arrays over the training."""

    step: Any  # when this was measured
    gradient: Any  # |G|^2, the squared norm of the mean gradient
    trace: Any  # tr(Sigma), the variance of a per-sample gradient summed over its entries
    sample_norm: Any  # the norm of a per-sample gradient, averaged over the samples
    opposed: Any  # the share of samples whose gradient points against the mean gradient

    @property
    def scale(self) -> Any:
        """Noise scale: the batch size at which noise equals signal; infinite without signal."""
        signal = self.gradient - self.trace / BATCH_SIZE  # |G|^2 contains noise: take it out
        return np.where(signal > 0, self.trace / np.where(signal > 0, signal, 1), np.inf)


def load_data() -> tuple[Tensor, Tensor, Tensor]:
    """Return images, their labels (some are wrong), and the true digits."""
    images, digits = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    truth = torch.tensor(digits)
    wrong = torch.randperm(len(truth))[:WRONG_LABELS]
    labels = truth.index_add(0, wrong, torch.randint(1, 10, wrong.shape))
    return x, labels % 10, truth


def measure(step: int, results: Any, parameters: list[str]) -> Noise:
    """Combine what one backward pass found for the parameters of one layer."""
    found = [results[name] for name in parameters]
    agreement = torch.stack([p.grad_dot for p in found]).sum(0)
    return Noise(
        step=step,
        gradient=agreement.mean().item(),  # the mean of <g_n, G> over the samples is <G, G>
        trace=BATCH_SIZE / (BATCH_SIZE - 1) * sum(p.variance.sum().item() for p in found),
        sample_norm=torch.stack([p.batch_l2 for p in found]).sum(0).sqrt().mean().item(),
        opposed=(agreement < 0).float().mean().item(),
    )


def curvature(results: Any, parameters: list[str]) -> tuple[float, float]:
    """Return the trace of the GGN of the mean loss in the parameters of one layer, and its largest eigenvalue."""
    gram = torch.stack([results[name].ggn_gram for name in parameters]).sum(0)  # has the eigenvalues of N times the GGN
    matrix = gram.flatten(2).flatten(0, 1) / BATCH_SIZE
    return matrix.trace().item(), torch.linalg.eigvalsh(matrix)[-1].item()


def average(history: list[Noise]) -> Noise:
    """Average over windows that grow with the training time: one batch alone says little."""
    edges = np.geomspace(min(10, len(history)), len(history), num=16).astype(int)
    windows = np.split(np.array(history), np.unique(edges)[:-1])
    return Noise(*np.array([window.mean(0) for window in windows]).T)


def network() -> nn.Module:
    """Make the network, with new weights."""
    modules: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(1, 8, 3),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(8, 16, 3, stride=2),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        linear=nn.Linear(64, 10),
    )
    return nn.Sequential(modules)


def train(
    model: nn.Module, x: Tensor, y: Tensor, seconds: float
) -> tuple[dict[str, Noise], dict[str, tuple[float, float]], Tensor]:
    """Train; return the noise and the last curvature of each layer, and for each sample its mean gradient norm."""
    model = px.extend(model)
    loss_function = px.extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8, weight_decay=5e-3)

    layers = {"whole model": [name for name, _ in model.named_parameters()]}
    for name in layers["whole model"]:
        layers.setdefault(name.split(".")[0], []).append(name)
    history: dict[str, list[Noise]] = {layer: [] for layer in layers}
    norms, visits = torch.zeros(len(x)), torch.zeros(len(x))

    with Progress() as progress:
        task = progress.add_task("", total=seconds)
        start, step = perf_counter(), 0
        while not progress.finished:
            batch = torch.randperm(len(x))[:BATCH_SIZE]
            output = model(x[batch])
            loss = loss_function(output, y[batch])
            optimizer.zero_grad()
            quantities = [px.BatchL2Grad(), px.Variance(), px.GradDot()]
            if step % CURVATURE_EVERY == 0:
                quantities.append(px.GGNGram())
            with px.backpack(*quantities, scale="sample") as results:
                loss.backward()
            optimizer.step()
            if step % CURVATURE_EVERY == 0:
                curved = results

            step += 1
            if step == 1:
                start = perf_counter()  # the first step also probes the model: not counted
            for layer, parameters in layers.items():
                history[layer].append(measure(step, results, parameters))
            norms[batch] += results.batch_l2.sqrt()
            visits[batch] += 1

            accuracy = (output.argmax(1) == y[batch]).float().mean().item()
            status = f"step {step:5}   loss {loss.item():.3f}   accuracy {accuracy:4.0%}"
            progress.update(task, completed=perf_counter() - start, description=status)
    noise = {layer: average(steps) for layer, steps in history.items()}
    return noise, {k: curvature(curved, names) for k, names in layers.items()}, norms / visits.clamp(min=1)


def watch(x: Tensor, y: Tensor, seconds: float, path: Path) -> list[Verdict]:
    """Train under a monitor, which records what its instruments say of each step; return its verdicts."""
    shutil.rmtree(path, ignore_errors=True)  # a record that is there would be continued
    model = px.extend(network())
    loss_function = px.extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8, weight_decay=5e-3)
    monitor = Cockpit(model, optimizer, level="business", sinks=[Run(path)])
    end = perf_counter() + seconds
    while perf_counter() < end:
        batch = torch.randperm(len(x))[:BATCH_SIZE]
        with monitor.step(samples=batch):
            loss_function(model(x[batch]), y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return monitor.verdicts


def race(x: Tensor, y: Tensor, seconds: float) -> dict[str, tuple[int, float]]:
    """Train two networks for half of the time each, from the same weights and on the same batches.

    Returns:
        For each optimizer the steps that it took, and the loss over all samples at the end.
    """
    found: dict[str, tuple[int, float]] = {}
    start = torch.get_rng_state()
    for name in ("SGD", "K-FAC"):
        torch.set_rng_state(start)
        model, loss_function = px.extend(network()), px.extend(nn.CrossEntropyLoss())
        if name == "SGD":
            optimizer, emitting = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.8), nullcontext
        else:
            optimizer = px.optim.KFAC(model.parameters(), damping=0.1, kl_clip=1e-2, inverses_every=20)
            emitting = partial(px.optim.emit, optimizer)
        end, steps = perf_counter() + seconds / 2, 0
        while perf_counter() < end:
            batch = torch.randperm(len(x))[:BATCH_SIZE]
            optimizer.zero_grad()
            with emitting():
                loss_function(model(x[batch]), y[batch]).backward()
            optimizer.step()
            steps += 1
        with torch.no_grad():
            found[name] = steps, loss_function(model(x), y).item()
    return found


def race_table(found: dict[str, tuple[int, float]], seconds: float) -> Table:
    """Show how far an optimizer that reads curvature comes in the time of one that does not."""
    table = Table("optimizer", "steps", "training loss", title=f"The same network, {seconds / 2:.2g} s each")
    for name, (steps, loss) in found.items():
        table.add_row(name, str(steps), f"{loss:.4f}")
    return table


def layer_table(layers: dict[str, Noise], curved: dict[str, tuple[float, float]]) -> Table:
    """Show how much of each layer's gradient is noise at the end of training, and how curved the loss is."""
    headers = ("|G|", "mean |g_n|", "|G|²/tr Σ", "noise scale", "against G", "tr GGN", "λ max")
    caption = (
        "End of training: noise scale in samples; samples whose gradient points against G; trace and largest "
        f"eigenvalue of the GGN of a batch. Noise alone would give |G|²/tr Σ = {1 / BATCH_SIZE:.3f}."
    )
    table = Table(
        Column("layer", no_wrap=True), *headers, title="Noise in the mean gradient G, and curvature", caption=caption
    )
    for layer, noise in layers.items():
        last = Noise(*(values[-1] for values in noise))
        numbers = [f"{number:.3f}" for number in (last.gradient**0.5, last.sample_norm, last.gradient / last.trace)]
        table.add_row(layer, *numbers, f"{last.scale:.0f}", f"{last.opposed:.0%}", *(f"{c:.3g}" for c in curved[layer]))
    return table


def sample_table(samples: Tensor, columns: dict[str, Tensor], wrong: Tensor) -> Table:
    """List training samples, in red those whose label is wrong."""
    table = Table("sample", *columns, title="Samples with the largest gradients g_n")
    for n in samples.tolist():
        cells = [f"{column[n].item():.4g}" for column in columns.values()]
        table.add_row(str(n), *cells, style="red" if wrong[n] else None)
    return table


def draw(layers: dict[str, Noise], images: Tensor, titles: list[str], wrong: Tensor) -> Figure:
    """Draw the samples with the largest gradients, and the noise scale of each layer."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, wspace=0.04, squeeze=False)[0]

    left.suptitle("Largest per-sample gradients (red: the label is wrong)")
    for i, axes in enumerate(left.subplots(4, 5).flat):
        axes.imshow(images[i, 0].numpy(), cmap="gray_r")
        axes.set_title(titles[i], color="tab:red" if wrong[i] else "black", fontsize=9)
        axes.axis("off")

    right.suptitle("Noise scale: batch size at which noise equals signal")
    axes = right.subplots()
    axes.set_prop_cycle(color=["black", "tab:blue", "tab:orange", "tab:green"])
    for layer, noise in layers.items():
        axes.plot(noise.step, noise.scale, label=layer)
    axes.axhline(BATCH_SIZE, color="gray", linestyle="--", label="batch size of the training")
    axes.set(xlabel="training step", ylabel="samples", xscale="log", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def run(seconds: float = 10.0, out: Path = Path(), seed: int = 0) -> dict[str, Noise]:
    """Train, print what the gradients said, draw it in ``packext-demo.png``; train again, watched, and report.

    Args:
        seconds: Training time; a third of it again for the race of two optimizers, and for the watched training.
        out: Folder that receives the figure, the record and its report; it is created if necessary.
        seed: Seed of the wrong labels, the initial weights and the batches.

    Returns:
        The noise of each layer over the training.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    x, y, truth = load_data()
    model = network()
    layers, curved, norms = train(model, x, y, seconds)
    with torch.no_grad():
        predicted = model(x).argmax(1)

    wrong, top = y != truth, norms.argsort(descending=True)[:SHOWN]
    columns = {"label": y, "predicted": predicted, "true digit": truth, "mean |g_n|": norms}
    path = out / "packext-demo.png"
    titles = [f"label {y[n]}, pred. {predicted[n]}" for n in top]
    draw(layers, x[top], titles, wrong[top]).savefig(path, dpi=150)

    console = Console()
    console.print(layer_table(layers, curved), sample_table(top, columns, wrong))
    console.print(f"{wrong[top].sum()} of the {WRONG_LABELS} wrong labels are in this list (red).")
    console.print(f"Figure: {path}")

    console.print(race_table(race(x, y, seconds / 3), seconds / 3))
    record = out / "packext-demo-run"
    verdicts = watch(x, y, seconds / 3, record)
    console.print(
        *verdicts or ["No verdict stands: no rule that listened to the monitor has found a failure."],
        sep="\n",
        markup=False,
    )
    console.print(f"Report of that training: {write_report(record)}", soft_wrap=True)
    return layers


def fit(
    x: Tensor, y: Tensor, share: Callable[..., Shared] = share, steps: int = 400, size: int = BATCH_SIZE
) -> nn.Module:
    """Train a network on what clients share of batches, and return it in evaluation mode.

    Adam does not care about the gradient's scale, which clipping changes.

    Args:
        x: images.
        y: labels.
        share: how a client makes of a model, a loss and a batch what it shares.
        steps: of the training.
        size: of the batches.

    Returns:
        The network.
    """
    model, loss_function = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        batch = torch.randint(len(x), (size,))
        gradient = share(model, loss_function, x[batch], y[batch]).gradient
        for name, p in model.named_parameters():
            p.grad = gradient[name]
        optimizer.step()
    return model.eval()


def audit(budget: str | float, out: Path, seed: int = 0, fresh: bool = False) -> Audit:
    """Train the network on some of the digits, and audit what the gradients of small batches give away.

    Args:
        budget: As in `packext.audit.run`.
        out: Folder for the report.
        seed: Seed of the split, the wrong labels, the training and the audit.
        fresh: Starts anew in a folder that holds another audit.

    Returns:
        The audit.
    """
    torch.manual_seed(seed)
    x, y, _ = load_data()
    order = torch.randperm(len(x))
    (x, others_x), (y, others_y) = (t[order].split([MEMBERS, len(t) - MEMBERS]) for t in (x, y))

    def utility(share: Callable[..., Shared]) -> float:
        torch.manual_seed(seed)  # the same start and batches for all defences
        model = fit(x, y, share, steps=100, size=SHARED)
        with torch.no_grad():
            return (model(others_x).argmax(1) == others_y).float().mean().item()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a network of 2000 parameters is slower on two
    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("training", total=1.0)
            return px.audit.run(
                fit(x, y),
                nn.CrossEntropyLoss(),
                Data((x, y), (others_x, others_y)),
                Sharing(batch_size=SHARED),
                budget=budget,
                train=fit,
                utility=None if budget == "quick" else utility,
                out=out,
                fresh=fresh,
                seed=seed,
                progress=lambda name, done: bar.update(task, description=f"{name:10}", completed=done),
            )
    finally:
        torch.set_num_threads(threads)
