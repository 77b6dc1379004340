"""Subsampling: norms of all individual gradients, and the gradients themselves of a few.

The first pass finds the samples with the largest gradients of a batch, a second through the same graph gives these
gradients, and a third those of the first samples for comparison. Below each digit is its gradient for the weights of
the class that it was taken for.
"""

from __future__ import annotations

from frame import Shown, digits, fit, perceptron, picture, run
from matplotlib.figure import Figure
from torch import nn

import packext as px


def show(small: bool) -> Shown:
    n, few, training = 256 if small else 512, 8, 1000
    x, y = digits()
    model, loss_fn = px.extend(perceptron(64, 10)), px.extend(nn.CrossEntropyLoss())
    fit(model, x[:training], y[:training], 100, rate=0.05)

    x, y = x[training : training + n], y[training : training + n]
    output = model(x)
    loss = loss_fn(output, y)
    with px.backpack(px.BatchL2Grad(), scale="sample", attach=False) as norms:
        loss.backward(retain_graph=True)
    hardest = norms.batch_l2.argsort(descending=True)[:few].tolist()
    with px.backpack(px.BatchGrad(subsampling=hardest), scale="sample", attach=False) as part:
        loss.backward(retain_graph=True)
    with px.backpack(px.BatchGrad(), scale="sample", attach=False) as whole:
        loss.backward()

    rows, all_rows = (results["0.weight"].grad_batch for results in (part, whole))
    taken = output.argmax(1)[hardest]
    numbers = {
        "shape of all gradients": str(list(all_rows.shape)),
        "shape of these": str(list(rows.shape)),
        "largest difference of these to the same of all": (rows - all_rows[hardest]).abs().max().item(),
        "of these, digits that are taken for another": f"{(taken != y[hardest]).sum().item()} of {few}",
        "of the batch": f"{(output.argmax(1) != y).sum().item()} of {n}",
        "their share of the sum of all squared norms": (norms.batch_l2[hardest].sum() / norms.batch_l2.sum()).item(),
    }
    figure = Figure((10, 2.9), layout="constrained")
    parts = figure.subplots(2, few)
    for k, (index, row) in enumerate(zip(hardest, rows, strict=True)):
        picture(parts[0, k], x[index], f"{y[index]}, taken for {taken[k]}", "gray_r")
        picture(parts[1, k], row[taken[k]], f"norm {norms.batch_l2[index].sqrt():.2f}", "RdBu_r", (-1, 1))
    return figure, numbers


if __name__ == "__main__":
    run(show)
