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


def parts_of(theta: Values, joint: bool) -> list[list[str]]:
    """Names of what has one block: a weight and its bias, or each by itself."""
    return [["0.weight", "0.bias"], ["2.weight", "2.bias"]] if joint else [[name] for name in theta]


def matrix(values: Values, block: list[str]) -> Tensor:
    """A weight with its bias as one more column; anything else as it is."""
    return torch.cat([values[block[0]], values[block[1]][:, None]], 1) if len(block) == 2 else values[block[0]]


def unmatrix(found: Values, block: list[str], m: Tensor, like: Values) -> None:
    if len(block) == 2:
        found[block[0]], found[block[1]] = m[:, :-1], m[:, -1]
    else:
        found[block[0]] = m.view(like[block[0]].shape)


def dot(one: Values, other: Values) -> float:
    return float(sum((one[k] * other[k]).sum() for k in one))


def kfac(
    lr: float, damping: float, mu: float, eta: float, decay: float, every: int, invert: int, kl: float | None,
    joint: bool = True, eigen: bool = False,
) -> Step:  # fmt: skip
    """K-FAC, or with `eigen` EKFAC, with the exact Hessian of the loss."""
    state: dict[str, Any] = {"t": 0, "batches": 0}
    velocity: Values = {}
    inverses: dict[str, Tensor] = {}
    bases: dict[str, tuple[Tensor, Tensor]] = {}

    def damped(theta: Values, x: Tensor) -> None:
        pairs = factors(theta, x, joint)
        fresh = state["t"] % invert == 0 or state["batches"] < 3
        if not eigen or fresh:
            state["batches"] += 1
        for block in parts_of(theta, joint):
            name = block[0]
            if not eigen:
                mean = running(state, name, pairs[name], decay)
                if fresh:
                    inverses[name] = split_inverse(mean, damping + eta)
            elif fresh:
                pieces = [torch.linalg.eigh(m) for m in running(state, name, pairs[name], decay)]
                values, q = pieces[0]
                for e, v in pieces[1:]:
                    values, q = torch.kron(values, e), torch.kron(q, v)
                bases[name] = (values, q)
            else:
                # Each sample's share of the GGN's diagonal in the basis, from its Jacobian.
                j = jacobians(theta, x)
                own = [j[n].view(*j[n].shape[:2], *theta[n].shape) for n in block]
                rows = torch.cat([own[0], own[1][..., None]], 3) if len(block) == 2 else own[0]
                rows = rows.flatten(2) @ bases[name][1]
                moments = torch.einsum("nci,ncd,ndi->i", rows, hessians(theta, x), rows) / len(x)
                bases[name] = (decay * bases[name][0] + (1 - decay) * moments, bases[name][1])

    def step(theta: Values, x: Tensor, y: Tensor) -> Values:
        g = gradient(theta, x, y)
        g = {k: g[k] + eta * theta[k] for k in g}
        if state["t"] % every == 0:
            damped(theta, x)
        u: Values = {}
        for block in parts_of(theta, joint):
            m = matrix(g, block)
            if eigen:
                values, q = bases[block[0]]
                out = q @ ((q.T @ m.flatten()) / (values + damping + eta))
            else:
                out = inverses[block[0]] @ m.flatten()
            unmatrix(u, block, out.view(m.shape), theta)
        if kl is not None:
            shrink = min(1.0, (kl / (lr**2 * dot(g, u))) ** 0.5)
            u = {k: shrink * each for k, each in u.items()}
        for k in u:
            velocity[k] = u[k] + mu * velocity.get(k, torch.zeros_like(u[k]))
        state["t"] += 1
        return {k: p - lr * velocity[k] for k, p in theta.items()}

    return step


def singd(lr: float, damping: float, mu: float, eta: float, every: int, beta: float, alpha: float) -> Step:
    """SINGD with dense roots, with the exact Hessian of the loss."""
    held: dict[str, list[Tensor]] = {}
    velocity: Values = {}
    state = {"t": 0}

    def step(theta: Values, x: Tensor, y: Tensor) -> Values:
        g = gradient(theta, x, y)
        if state["t"] % every == 0:
            for name, (b, a) in {k: f for k, f in factors(theta, x, True).items() if "weight" in k}.items():
                eye_c, eye_k = torch.eye(len(b)), torch.eye(len(a))
                c, k, mc, mk = held.get(name, [eye_c, eye_k, 0 * eye_c, 0 * eye_k])
                hc, hk = c.T @ b @ c, k.T @ a @ k
                tr = lambda m: m.trace() / len(m)  # noqa: E731
                mk = alpha * mk + 0.5 * (tr(hc) * hk + damping * tr(c.T @ c) * k.T @ k - eye_k)
                mc = alpha * mc + 0.5 * (tr(hk) * hc + damping * tr(k.T @ k) * c.T @ c - eye_c)
                held[name] = [c @ (eye_c - beta * mc), k @ (eye_k - beta * mk), mc, mk]
        u: Values = {}
        for block in parts_of(theta, True):
            c, k = held[block[0]][:2]
            unmatrix(u, block, c @ c.T @ matrix(g, block) @ k @ k.T, theta)
        for name in u:
            velocity[name] = u[name] + eta * theta[name] + mu * velocity.get(name, torch.zeros_like(u[name]))
        state["t"] += 1
        return {name: p - lr * velocity[name] for name, p in theta.items()}

    return step


def sophia(lr: float, betas: tuple[float, float], rho: float, decay: float, every: int) -> Step:
    """Sophia with the exact diagonal of the GGN."""
    m: Values = {}
    h: Values = {}
    state = {"t": 0}

    def step(theta: Values, x: Tensor, y: Tensor) -> Values:
        g, new = gradient(theta, x, y), {}
        blocks = ggn_blocks(theta, x) if state["t"] % every == 0 else None
        for k, p in theta.items():
            m[k] = betas[0] * m.get(k, 0 * p) + (1 - betas[0]) * g[k]
            if blocks is not None:
                h[k] = betas[1] * h.get(k, 0 * p) + (1 - betas[1]) * blocks[k].diagonal().view(p.shape)
            ratio = m[k].abs() / torch.maximum(rho * h[k], torch.tensor(1e-15))
            new[k] = p - lr * decay * p - lr * m[k].sign() * ratio.minimum(torch.tensor(1.0))
        state["t"] += 1
        return new

    return step


def msvag(lr: float, beta: float, decay: float) -> Step:
    """M-SVAG with the variance of individual gradients."""
    m: Values = {}
    state = {"t": 0}

    def step(theta: Values, x: Tensor, y: Tensor) -> Values:
        rows = [gradient(theta, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
        new, t = {}, state["t"]
        rho = (1 - beta) * (1 + beta ** (t + 1)) / ((1 + beta) * (1 - beta ** (t + 1)))
        for k, p in theta.items():
            each = torch.stack([row[k] for row in rows])
            m[k] = beta * m.get(k, 0 * p) + (1 - beta) * each.mean(0)
            mean = m[k] / (1 - beta ** (t + 1))
            s = each.var(0) / len(x)
            new[k] = p - lr * (decay * p + mean**2 / (mean**2 + rho * s) * mean)
        state["t"] += 1
        return new

    return step


def spring(lr: float, damping: float, mu: float, max_step: float | None) -> Step:
    """The regularised least squares that define SPRING, by the dense GGN of all parameters."""
    memory: dict[str, Tensor] = {}

    def step(theta: Values, x: Tensor, y: Tensor) -> Values:
        j = torch.cat(list(jacobians(theta, x).values()), 2)
        ggn = torch.einsum("nci,ncd,ndj->ij", j, hessians(theta, x), j) / len(x)
        g = torch.cat([v.flatten() for v in gradient(theta, x, y).values()])
        before = mu * memory.get("d", torch.zeros_like(g))
        # The minimiser of |S d - rho|² + damping |d - before|², where S'S is the GGN and S' rho the gradient.
        memory["d"] = torch.linalg.solve(ggn + damping * torch.eye(len(g)), g + damping * before)
        change = lr * memory["d"]
        if max_step is not None and change @ change > max_step:
            change = change * (max_step / (change @ change)) ** 0.5
        parts = iter(change.split([p.numel() for p in theta.values()]))
        return {k: p - next(parts).view(p.shape) for k, p in theta.items()}

    return step
