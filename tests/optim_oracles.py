"""Optimizers re-implemented slowly, in float64, from dense curvature that torch.func gives; nothing of packext."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacrev
from torch.nn import functional as F

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
Values = dict[str, Tensor]


def forward(theta: Values, x: Tensor, shifts: tuple[Any, Any] = (0.0, 0.0)) -> Tensor:
    """The network of the tests, with something added to what its two layers give."""
    hidden = torch.tanh(x @ theta["0.weight"].T + theta["0.bias"] + shifts[0])
    return hidden @ theta["2.weight"].T + theta["2.bias"] + shifts[1]


def loss(theta: Values, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(forward(theta, x), y)


def gradient(theta: Values, x: Tensor, y: Tensor) -> Values:
    return grad(loss)(theta, x, y)


def hessians(theta: Values, x: Tensor) -> Tensor:
    """Of each sample's cross entropy with respect to its logits, `[N, C, C]`."""
    logits = forward(theta, x)
    return torch.stack([jacrev(grad(lambda f: F.cross_entropy(f, torch.tensor(0))))(f) for f in logits])


def jacobians(theta: Values, x: Tensor) -> Values:
    """Of the logits with respect to each parameter, `[N, C, p]`."""
    found = jacrev(lambda t: forward(t, x))(theta)
    return {name: j.flatten(2) for name, j in found.items()}


def ggn_blocks(theta: Values, x: Tensor) -> Values:
    """The block of each parameter of the GGN of the mean loss, `[p, p]`."""
    h = hessians(theta, x)
    return {name: torch.einsum("nci,ncd,ndj->ij", j, h, j) / len(x) for name, j in jacobians(theta, x).items()}


def factors(theta: Values, x: Tensor, joint: bool = False) -> dict[str, list[Tensor]]:
    """Kronecker factors `[B, A]` of the weights and `[B]` of the biases, with the exact Hessian of the loss."""
    h, n = hessians(theta, x), len(x)
    shifts = (torch.zeros(n, len(theta["0.bias"])), torch.zeros(n, len(theta["2.bias"])))
    inputs = (x, torch.tanh(x @ theta["0.weight"].T + theta["0.bias"]))
    out: dict[str, list[Tensor]] = {}
    for k, layer in enumerate(("0", "2")):
        every = jacrev(lambda s: forward(theta, x, (s, 0.0) if k == 0 else (0.0, s)))(shifts[k])  # noqa: B023
        own = torch.stack([every[i, :, i] for i in range(n)])
        b = torch.einsum("nci,ncd,ndj->ij", own, h, own) / n
        a = torch.cat([inputs[k], torch.ones(n, 1)], 1) if joint else inputs[k]
        out[f"{layer}.weight"], out[f"{layer}.bias"] = [b, a.T @ a / n], [b]
    return out


def split_inverse(pair: list[Tensor], damping: float) -> Tensor:
    """The dense inverse of damped factors, the damping balanced by pi; of one factor, plain."""
    inverse = torch.linalg.inv
    if len(pair) == 1:
        return inverse(pair[0] + damping * torch.eye(len(pair[0])))
    b, a = pair
    pi = torch.sqrt((a.trace() / len(a)) / (b.trace() / len(b)))
    root = damping**0.5
    return torch.kron(inverse(b + root / pi * torch.eye(len(b))), inverse(a + root * pi * torch.eye(len(a))))


def running(state: dict[str, Any], key: str, new: Any, decay: float | None) -> Any:
    """Averages as the optimizers keep them, of lists of matrices or of tensors."""
    old, k = state.get(key, (None, 0))
    keep = 0.0 if old is None else k / (k + 1) if decay is None else min(1 - 1 / (k + 1), decay)
    if isinstance(new, list):
        mean = [n if old is None else keep * o + (1 - keep) * n for n, o in zip(new, old or new, strict=True)]
    else:
        mean = new if old is None else keep * old + (1 - keep) * new
    state[key] = (mean, k + 1)
    return mean


Step = Callable[[Values, Tensor, Tensor], Values]


def preconditioned(curvature: str, lr: float, damping: float, eta: float, decay: float | None) -> Step:
    """The BackPACK paper's rule."""
    state: dict[str, Any] = {}
    inverses: Values = {}

    def step(theta: Values, x: Tensor, y: Tensor) -> Values:
        g, t = gradient(theta, x, y), state.setdefault("t", 0)
        blocks = ggn_blocks(theta, x) if curvature == "diagonal" else {}
        pairs = {} if blocks else factors(theta, x)
        new = {}
        for name, p in theta.items():
            v = (g[name] + eta * p).flatten()
            if blocks:
                mean = running(state, name, blocks[name].diagonal(), decay)
                u = v / (mean + damping + eta)
            else:
                mean = running(state, name, pairs[name], decay)
                if t < 3 or t % 20 == 0:
                    inverses[name] = split_inverse(mean, damping + eta)
                u = inverses[name] @ v
            new[name] = p - lr * u.view(p.shape)
        state["t"] += 1
        return new

    return step
