"""How curved the mean of the samples' losses is: trace, largest eigenvalue, and Takeuchi's criterion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.diagnostics._instrument import Instrument
from packext.diagnostics._step import Absent, Step
from packext.diagnostics._tensors import CHUNK, total

DIAGONALS = {"ggn_mc": px.DiagGGNMC, "ggn": px.DiagGGNExact}


def _diagonal(curvature: str, *others: str) -> Any:
    if curvature not in DIAGONALS:
        known = ", ".join(map(repr, (*DIAGONALS, *others)))
        raise ValueError(f"curvature must be one of {known}, got {curvature!r}.")
    return DIAGONALS[curvature]()


class MeanHessianTrace(px.HessianTrace):
    """Of the mean of the samples' own losses, in `mean_hessian_trace`."""

    savefield = "mean_hessian_trace"

    def land(self, held: Any, n: int, factor: float) -> Any:
        return super().land(held, n, factor / n)


class MeanTopEigenvalues(px.TopEigenvalues):
    """Of the mean of the samples' own losses over the parameters of one model, in `mean_top_eigenvalues`.

    Why there are none, where Lanczos has failed, or of several losses in one pass. The loss may pass through other
    extended models (a generator's through its discriminator), whose parameters a Hessian of all would have, too.
    """

    savefield = "mean_top_eigenvalues"
    additive = True  # so that other instruments go on

    def __init__(self, model: nn.Module, **options: Any) -> None:
        """Take the model, and what `TopEigenvalues` takes."""
        super().__init__(**options)
        self.model = model

    def measure(self, point: Any, generator: torch.Generator) -> list[Any]:
        own = {id(p) for p in self.model.parameters()}
        places = [k for k, p in enumerate(point.parameters) if id(p) in own]
        try:
            found = super().measure(point.part(places), generator) if places else []
        except px.PackextError as error:
            if not str(error).startswith("eigsh: "):  # of the model, not of what its products are
                raise
            why = "products with the Hessian are not symmetric to rounding, as under autocast to less than float32, or"
            found = [f"{why} not finite ({error})"] * len(places)
        whole: list[Any] = ["a parameter of another model"] * len(point.parameters)
        for k, one in zip(places, found, strict=True):
            whole[k] = one
        return whole

    def add(self, held: Any, value: Any) -> str:
        return "the pass is one through several losses: add them up in one loss module"

    def land(self, held: Any, n: int, factor: float) -> Any:
        return held if isinstance(held, str) else super().land(held, n, factor / n)


class HessTrace(Instrument):
    """Trace of the loss's curvature, whole and of each parameter's block: of the GGN, or of the Hessian.

    By default the GGN's, from one target per sample drawn from the model's predictions. With "hessian" the standard
    error of the whole is in "HessTrace.standard_error".

    - Formula: sum over entries d of h_d, with h the diagonal of the GGN of the mean loss; of the Hessian H, mean of `zᵀ
      H z` over random signs z
    - Units: those of the loss, over those of the parameters squared
    - Cost: `DiagGGNMC`, one cotangent more in the pass that runs anyway; "ggn" `DiagGGNExact`, one for each column of
      the root; "hessian" `HessianTrace`, one product with the Hessian for each draw
    - Source: Schraudolph 2002 for the GGN, Hutchinson 1989 for the estimate
    - Absent: with BatchNorm in training mode, but for "hessian"; there in a step of several backward passes
    """

    def __init__(self, curvature: str = "ggn_mc", draws: int = 4) -> None:
        """Choose "ggn_mc", "ggn" (exact) or "hessian" (for which BatchNorm is no obstacle), and its draws."""
        self.hessian = curvature == "hessian"
        self.needs = (_diagonal(curvature, "hessian"),) if not self.hessian else (MeanHessianTrace(draws),)

    def measure(self, step: Step) -> dict[str, Any]:
        if not self.hessian:
            n = step.n
            found = {name: total(d) / n for name, d in step.layers(self.needs[-1].savefield).items()}
            return {"": sum(found.values()), **found}
        traces = step.layers("mean_hessian_trace")
        draws = torch.stack([t.draws.double() for t in traces.values()]).sum(0)
        one = Absent("a single draw has no standard error")
        error = draws.std() / len(draws) ** 0.5 if len(draws) > 1 else one
        return {"": draws.mean(), ".standard_error": error, **{name: t.value for name, t in traces.items()}}


class HessMaxEV(Instrument):
    """The largest eigenvalue of the Hessian H of the loss in the model's parameters, by Lanczos; its residual's norm.

    An eigenvalue lies within "HessMaxEV.residual" of the value, whose own error is of the order of the residual's
    square over the distance to the next eigenvalue. Each step starts from the eigenvector of the last one that was
    tracked, with a random part, so that a direction which has become the largest is found.

    - Formula: λ of `H v = λ v`; the residual is `|H v - λ v|` of a unit vector v
    - Units: those of the loss, over those of the parameters squared
    - Cost: `TopEigenvalues`: three products with the Hessian, each a backward pass that is differentiated, and more
      until the residual is small enough; 20 in the first step, which starts from nothing
    - Source: Lanczos, with thick restarts (Wu & Simon 2000)
    - Absent: where the residual ends above a tenth of the value (or `tol` of it, if that is more): that may be no
      eigenvalue, let alone the largest. The next step goes on from there. Where products are not those of a
      symmetric matrix to the rounding of the parameters' precision, as under autocast to bfloat16 or float16, or not
      finite. In a step of several backward passes, or of one through several losses
    """

    def __init__(self, tol: float = 0.1) -> None:
        """Choose the residual that is small enough, relative to the Hessian's norm.

        Raises:
            ValueError: if it is not positive.
        """
        if not tol > 0:
            raise ValueError(f"tol must be positive, got {tol!r}.")
        self.tol = tol
        self._model = nn.Module()  # until `check` gives it
        self.start(0)

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model

    def start(self, step: int) -> None:
        self._vector: dict[Tensor, Tensor] | None = None
        self._generator = torch.Generator().manual_seed(0)

    @property
    def needs(self) -> tuple[Any, ...]:  # type: ignore[override]
        ncv = None if self._vector is None else 5
        return (MeanTopEigenvalues(self._model, tol=self.tol, start=self._vector, ncv=ncv),)

    def measure(self, step: Step) -> dict[str, Any]:
        found = step.layers("mean_top_eigenvalues")
        first = next(iter(found.values()))
        if isinstance(first, str):
            raise Absent(first)
        size = sum(e.vectors[0].numel() for e in found.values())
        self._vector = {step.parameters[name]: self._shaken(e.vectors[0], 0.2 / size**0.5) for name, e in found.items()}
        value, residual = float(first.values[0]), float(first.residuals[0])
        if residual > max(self.tol, 0.1) * abs(value):
            raise Absent(f"Lanczos has not converged: {value:.6g} has a residual of {residual:.3g}")
        return {"": value, ".residual": residual}

    def _shaken(self, vector: Tensor, by: float) -> Tensor:
        """The vector, and a random part of entries up to `by`."""
        noise = torch.empty(vector.shape).uniform_(-1, 1, generator=self._generator).to(vector)
        return noise.mul_(by).add_(vector)


class _Criterion(Instrument):
    """Shared by the two forms of Takeuchi's criterion."""

    def __init__(self, curvature: str = "ggn_mc", epsilon: float = 1e-7) -> None:
        """Choose the curvature, "ggn_mc" or "ggn" (exact), and what is added to it."""
        self.needs = (px.SumGradSquared(), _diagonal(curvature))
        self.epsilon = epsilon

    def _pairs(self, step: Step) -> list[tuple[Tensor, Tensor]]:
        """Sums over the samples of squared gradient and curvature of each entry, of each parameter."""
        squares, diagonals = step.layers("sum_grad_squared"), step.layers(self.needs[-1].savefield)
        return [(s.reshape(-1), diagonals[name].reshape(-1)) for name, s in squares.items()]


class TICDiag(_Criterion):
    """Takeuchi's information criterion with diagonal matrices: near a minimum, the generalisation gap times N.

    The Monte-Carlo diagonal is noisy in each entry, and this divides by it: with `curvature="ggn"` it is exact, for
    more time.

    - Formula: sum over entries d of `s_d / (h_d + epsilon)`, with s_d the mean of g_nd² over the samples and h the
      diagonal of the GGN of the mean loss
    - Units: those of the loss
    - Cost: `SumGradSquared` and `DiagGGNMC`, one cotangent more in the pass that runs anyway; with "ggn" `DiagGGNExact`
    - Source: Thomas et al. 2020, section 3
    - Absent: with BatchNorm in training mode
    """

    def measure(self, step: Step) -> float:
        n, parts = step.n, [zip(s.split(CHUNK), h.split(CHUNK), strict=True) for s, h in self._pairs(step)]
        return sum(self._ratios(s, h, n) for part in parts for s, h in part)

    def _ratios(self, s: Tensor, h: Tensor, n: int) -> float:
        # Copies even of float64, which are written over.
        s, h = s.to(torch.double, copy=True), h.to(torch.double, copy=True)
        return float(s.div_(h.add_(n * self.epsilon)).sum())


class TICTrace(_Criterion):
    """Takeuchi's information criterion from traces alone.

    - Formula: `sum of s_d / (sum of h_d + epsilon)`, with s and h as for `TICDiag`
    - Units: those of the loss
    - Cost: `SumGradSquared` and `DiagGGNMC`, as `TICDiag`
    - Source: Thomas et al. 2020, section 3
    - Absent: with BatchNorm in training mode
    """

    def measure(self, step: Step) -> float:
        s, h = (sum(float(total(t)) for t in parts) for parts in zip(*self._pairs(step), strict=True))
        return s / (h + step.n * self.epsilon)
