"""All in one: what one backward pass tells of a batch, each quantity as a picture of the weights of one class.

Gradient, second moment, variance, and four diagonals of the curvature of a linear classifier of digits, in one pass;
all are compared with a slow computation, one sample at a time.
"""

from __future__ import annotations

from typing import Any

from frame import Shown, digits, perceptron, picture, run
from matplotlib.figure import Figure
from torch import Generator, nn

import packext as px
from packext import testing


def show(small: bool) -> Shown:
    n, shown_class = 32 if small else 256, 3
    x, y = (t[:n] for t in digits())
    model, loss_fn = px.extend(perceptron(64, 10)), px.extend(nn.CrossEntropyLoss())
    model[0].weight.data.mul_(10)  # a softmax that has an opinion, so that the quantities differ

    drawn = px.DiagGGNMC(1, Generator().manual_seed(0))
    quantities = px.SumGradSquared(), px.Variance(), px.DiagGGNExact(), drawn, px.DiagHessian(), px.DiagEF()
    others = px.BatchGrad(), px.BatchL2Grad(), px.BatchDotGrad(), px.KFAC(), px.GGNGram()
    with px.backpack(*quantities, *others) as found:
        loss_fn(model(x), y).backward()
    weight = model[0].weight
    pictures = {"mean digit": x[y == shown_class].mean(0), "grad": weight.grad[shown_class]}
    pictures |= {q.savefield: getattr(weight, q.savefield)[shown_class] for q in quantities}

    numbers: dict[str, Any] = {
        name: str(list(getattr(found["0.weight"], name).shape)) for name in ("grad_batch", "batch_l2", "batch_dot")
    }
    numbers["kfac"] = " and ".join(str(list(factor.shape)) for factor in weight.kfac)
    numbers["ggn_gram"] = str(list(found.ggn_gram.shape))
    report = testing.check(model, nn.CrossEntropyLoss(), x[:2], y[:2])
    numbers["quantities and parameters compared with the slow computation"] = len(report)
    numbers["all within rounding of it, in float64"] = report.ok
    numbers["largest difference of diag_h and diag_ggn_exact, relative; the model is linear"] = (
        (weight.diag_h - weight.diag_ggn_exact).abs().max() / weight.diag_h.max()
    ).item()

    figure = Figure((10, 4.6), layout="constrained")
    parts = figure.subplots(2, 4)
    for axes, (name, values) in zip(parts.flat, pictures.items(), strict=True):
        limit = values.abs().max().item()
        title = f"{name}, up to {limit:.1e}"
        if name == "grad":
            picture(axes, values, title, "RdBu_r", (-limit, limit))
        else:
            picture(axes, values, title)
    figure.suptitle(f"the weights of class {shown_class}", fontsize=11)
    return figure, numbers


if __name__ == "__main__":
    run(show)
