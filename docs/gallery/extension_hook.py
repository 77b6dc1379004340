"""Extension hook: the Hessian's trace of each module, from a diagonal that is forgotten as soon as it is summed.

`extension_hook` is called when a module's results are complete. Exact traces stand beside Hutchinson's estimates, with
their standard errors.
"""

from __future__ import annotations

import torch
from frame import BLUE, ORANGE, Shown, digits, perceptron, run, tidy
from matplotlib.figure import Figure
from torch import nn

import packext as px


def show(small: bool) -> Shown:
    x, y = (t[: 16 if small else 64] for t in digits())
    model, loss_fn = px.extend(perceptron(64, 32, 24, 10, activation=nn.Tanh)), px.extend(nn.CrossEntropyLoss())
    names = {module: name for name, module in model.named_modules()}
    traces: dict[str, float] = {}

    def sum_and_forget(module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            traces[names[module]] = traces.get(names[module], 0.0) + p.diag_h.sum().item()
            del p.diag_h

    with px.backpack(px.DiagHessian(), extension_hook=sum_and_forget):
        loss_fn(model(x), y).backward()
    left = sum(hasattr(p, "diag_h") for p in model.parameters())
    probes = 100 if small else 400
    with px.backpack(px.HessianTrace(probes, torch.Generator().manual_seed(0))) as results:
        loss_fn(model(x), y).backward()

    numbers: dict[str, object] = {"diagonals that are left": left}
    traces = dict(sorted(traces.items()))
    figure = Figure((7, 3.4), layout="constrained")
    axes = figure.subplots()
    for k, (name, exact) in enumerate(traces.items()):
        parts = [results[f"{name}.{kind}"].hessian_trace for kind in ("weight", "bias")]
        estimate = sum(part.value.item() for part in parts)
        error = sum(part.standard_error.item() for part in parts)  # at most: both come of the same vectors
        numbers[f"layer {name}: exact, estimated, standard error"] = exact, estimate, error
        axes.bar(k - 0.18, exact, 0.36, color=BLUE, label="exact, by the hook" if k == 0 else None)
        label = f"{probes} random vectors, ± 2 standard errors" if k == 0 else None
        axes.bar(k + 0.18, estimate, 0.36, yerr=2 * error, color=ORANGE, capsize=4, label=label)
    axes.set(xticks=range(len(traces)), xticklabels=[f"layer {name}" for name in traces], ylabel="trace of the Hessian")
    axes.set_ylim(0, 2.4 * max(traces.values()) / 1.5)
    axes.legend(frameon=False, ncols=2, loc="upper center")
    tidy(axes)
    return figure, numbers


if __name__ == "__main__":
    run(show)
