"""Batched Jacobians: the derivatives of all outputs of all samples in one backward pass.

Half a sum of squares has the identity for its Hessian, so that the root of its GGN is the Jacobian. The picture is what
it is for: inner products of its rows, the neural tangent kernel, with digits in order. Training makes it tell classes
apart. torch.func takes less time on a network as small as this.
"""

from __future__ import annotations

from typing import Any

import torch
from frame import Shown, digits, fit, perceptron, picture, ratio, run
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import packext as px


def jacobians(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Derivatives `[C, N, *p]` of the outputs, for every parameter by name."""
    loss_fn = px.extend(nn.MSELoss(reduction="sum"))
    with px.backpack(px.SqrtGGNExact(), attach=False) as results:
        output = model(x)
        torch.autograd.grad(loss_fn(output, output.detach()), list(model.parameters()))
    return {name: results[name].sqrt_ggn_exact / 2**0.5 for name, _ in model.named_parameters()}


def by_torch_func(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The same from torch.func, `[N, C, *p]`."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    with px.disable():
        return vmap(jacrev(lambda p, x: functional_call(model, p, (x,))), (None, 0))(parameters, x)


def by_outputs(model: nn.Module, x: Tensor) -> None:
    """The same with a backward pass for each output."""
    with px.backpack(px.BatchGrad(), attach=False) as results:
        output, rows = model(x), []
        for column in output.sum(0):
            torch.autograd.grad(column, list(model.parameters()), retain_graph=True)
            rows.append([results[p].grad_batch for p in model.parameters()])
    for _ in zip(*rows, strict=True):
        torch.stack(_)


def kernel(model: nn.Module, x: Tensor) -> Tensor:
    """Inner products of the Jacobians of two samples `[N, N]`, as a cosine."""
    rows = torch.cat([j.flatten(2) for j in jacobians(model, x).values()], 2).transpose(0, 1).flatten(1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    return rows @ rows.T


def show(small: bool) -> Shown:
    x, y = digits(torch.float64)
    x, y = x[:60][y[:60].argsort()], y[:60].sort().values
    model = px.extend(perceptron(64, 16 if small else 32, 10, activation=nn.Tanh).double())
    rows, want = jacobians(model, x), by_torch_func(model, x)
    difference = max((rows[k] - w.transpose(0, 1)).abs().max() / w.abs().max() for k, w in want.items())
    numbers: dict[str, Any] = {"shapes": ", ".join(str(list(j.shape)) for j in rows.values())}
    numbers["largest difference to torch.func"] = difference.item()
    if not small:
        one = lambda: jacobians(model, x)  # noqa: E731
        numbers["time of a pass for each output, in that of one pass"] = ratio(lambda: by_outputs(model, x), one)
        numbers["time of torch.func, in that of one pass"] = ratio(lambda: by_torch_func(model, x), one)

    same = y[:, None] == y
    figure = Figure((8, 4), layout="constrained")
    parts = figure.subplots(1, 2)
    for axes, when in zip(parts, ("before training", "after 100 steps"), strict=True):
        cosine = kernel(model, x)
        inside, across = cosine[same].mean().item(), cosine[~same].mean().item()
        numbers[f"{when}: mean cosine in a class, and across classes"] = inside, across
        picture(axes, cosine, f"{when}: {inside:.2f} in a class, {across:.2f} across", limits=(0, 1))
        fit(model, x, y, 100)
    return figure, numbers


if __name__ == "__main__":
    run(show)
