"""Scores of an untrained network from one batch: proxies for the accuracy that it reaches when it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.search._passes import Problem, Undefined


@dataclass(frozen=True)
class Proxy:
    """A score of a network at initialisation.

    Attributes:
        measure: makes the score of a problem.
        sign: 1 if a larger score predicts a better network, -1 if a smaller one does.
        source: who proposed it.
    """

    measure: Callable[[Problem], float]
    sign: int
    source: str


class Scores(dict[str, float]):
    """Scores by name.

    Attributes:
        undefined: of each proxy that is not here because the network or batch does not have it, why.
    """

    def __init__(self, values: Mapping[str, float], undefined: Mapping[str, str]) -> None:
        """With the proxies that are not here, and why."""
        super().__init__(values)
        self.undefined = dict(undefined)

    def __missing__(self, name: Any) -> float:
        """The KeyError says why."""
        raise KeyError(f"{name}: {self.undefined[name]}" if name in self.undefined else name)


def scores(model: nn.Module, loss_fn: nn.Module, x: Any, y: Any, names: Iterable[str] | None = None) -> Scores:
    """Proxies of a network, each from at most one pass, which those that need the same share.

    `PROXIES` has formulas and sources. At most two backward passes run, one of the loss and one of the sum of outputs,
    in float64 and on a copy: model, gradients, buffers, hooks and torch's generator stay as they are. The model runs
    in its mode: with BatchNorm in training mode samples have no gradients of their own, and it is refused.

    Args:
        model: as it was initialised; extended or not. Sums over parameters leave out those that require no grad; what
            is counted of outputs, channels and paths is of a model that has them.
        loss_fn: a loss module with `reduction` "mean" or "sum"; scores do not depend on which.
        x: inputs `[N, ...]`. "jacob_cov" needs fewer samples than a sample has entries.
        y: targets.
        names: of `PROXIES`; by default all that are defined of this network and batch.

    Returns:
        The scores by name, in the order of `names`; `undefined` says why, by default, one is not there.

    Raises:
        ValueError: for a name that is not in `PROXIES`.
        PackextError: where a score that was named is not defined (singular matrices, no ReLU, values that are not
            finite); where the loss has no gradient, and what `backpack` refuses.
    """
    named, names = names, [names] if isinstance(names, str) else list(PROXIES if names is None else names)
    unknown = [name for name in names if name not in PROXIES]
    if unknown:
        raise ValueError(f"There is no proxy {unknown[0]!r}: there are {', '.join(PROXIES)}.")
    devices = [x.device] if isinstance(x, Tensor) and x.device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        problem, found, undefined = Problem(model, loss_fn, x, y, "fisher" in names), {}, {}
        for name in names:
            asked = f"(Asked by the proxy {name!r}; names=... takes others.)"
            try:
                found[name] = _finite(name, PROXIES[name].measure(problem), model)
            except Undefined as error:
                if named is not None:
                    raise px.PackextError(f"{error} {asked}") from error
                undefined[name] = str(error)
            except px.PackextError as error:
                raise type(error)(f"{error} {asked}") from error
    return Scores(found, undefined)


def _finite(name: str, value: float, model: nn.Module) -> float:
    if not math.isfinite(value):
        raise Undefined(f"{name} of {type(model).__name__} is {value}.")
    return float(value)


def _parameters(problem: Problem) -> float:
    return float(sum(p.numel() for p in problem.trained.values()))


def _grad_norm(problem: Problem) -> float:
    return math.fsum(float(problem.losses[0][name].mean.norm()) for name in problem.weights)


def _snip(problem: Problem) -> float:
    return math.fsum(
        float((p.detach() * problem.losses[0][name].mean).abs().sum()) for name, p in problem.weights.items()
    )


def _synflow(problem: Problem) -> float:
    return math.fsum(float(share.sum()) for share in problem.paths.values())


def _naswot(problem: Problem) -> float:
    on = problem.codes
    kernel = on @ on.T + (1 - on) @ (1 - on).T
    return float(_eigenvalues(kernel, "naswot: the kernel of the ReLUs that samples have alike,").log().sum())


def _grad_sign(problem: Problem) -> float:
    return math.fsum(float(moments.signs.abs().sum()) for moments in problem.losses[0].values())


def _zico(problem: Problem) -> float:
    if len(problem.x) < 2:
        raise Undefined("ZiCo is a ratio to a standard deviation: it needs at least two samples.")
    total = 0.0
    for name in problem.weights:
        moments = problem.losses[0][name]
        varies = moments.std > 0
        if varies.any():
            total += math.log(float((moments.mean_abs[varies] / moments.std[varies]).sum()))
    return total


def _fisher(problem: Problem) -> float:
    return problem.losses[1]


def _jacob_cov(problem: Problem) -> float:
    jacobian = problem.outputs[1]
    if jacobian is None:
        raise Undefined(f"jacob_cov is of gradients by x; x is {problem.x.dtype}, not floating.")
    n, d = jacobian.shape
    if n < 2 or n >= d:
        raise Undefined(
            f"jacob_cov is of {n} samples of {d} entries: correlations of fewer than two samples, or of as many as a "
            f"sample has entries, are singular whatever the network. Use 2 to {d - 1} samples."
        )
    centred = jacobian - jacobian.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    if not (norm > 0).all():
        raise Undefined("jacob_cov: the outputs of a sample do not depend on it, or on all its entries alike.")
    values = torch.linalg.eigvalsh((centred / norm) @ (centred / norm).T).clamp(min=0) + 1e-5
    return -float((values.log() + 1 / values).sum())


def _ntk_condition(problem: Problem) -> float:
    values = _eigenvalues(problem.outputs[0], "ntk_condition: the kernel of the outputs' gradients")
    return float(values[-1] / values[0])


def _eigenvalues(matrix: Tensor, what: str) -> Tensor:
    """In ascending order, of a symmetric matrix that must not be singular to rounding."""
    values = torch.linalg.eigvalsh(matrix)
    if not values[0] > values[-1] * len(values) * torch.finfo(values.dtype).eps:
        raise Undefined(
            f"{what} of {len(values)} samples is singular. Use fewer samples, all different, of a network that reads "
            "them."
        )
    return values


#: By name: g_n is the gradient of sample n's own loss, weights are trained parameters with two axes or more.
PROXIES: dict[str, Proxy] = {
    "parameters": Proxy(_parameters, 1, "the baseline: trained parameters"),
    "flops": Proxy(lambda problem: problem.flops, 1, "the baseline: of a forward pass of one sample"),
    "grad_norm": Proxy(_grad_norm, 1, "Abdelfattah et al. (2021): sum over weights of |mean_n g_n|"),
    "snip": Proxy(_snip, 1, "Lee et al. (2019): sum of |w mean_n g_n| over entries of weights"),
    "synflow": Proxy(_synflow, 1, "Tanaka et al. (2020): sum of |w| dR/d|w|, for the sum R of outputs of ones"),
    "naswot": Proxy(_naswot, 1, "Mellor et al. (2021): log det K, K_mn the ReLUs that m and n have alike"),
    "grad_sign": Proxy(_grad_sign, 1, "Zhang & Jia (2022): sum over entries of |sum_n sign g_n|"),
    "zico": Proxy(_zico, 1, "Li et al. (2023), of samples: sum over weights of log sum (mean_n |g_n| / std_n g_n)"),
    "fisher": Proxy(_fisher, 1, "Turner et al. (2020): sum over channels of mean_n (sum_s a dl_n/da)^2 / 2"),
    "jacob_cov": Proxy(_jacob_cov, 1, "Abdelfattah et al. (2021): -sum of log v + 1 / v, correlations' eigenvalues"),
    "ntk_condition": Proxy(_ntk_condition, -1, "Chen et al. (2021): largest / smallest eigenvalue of outputs' kernel"),
}
