"""The Hessian of the loss from products with vectors: diagonal, trace, and extreme eigenvalues, for any model."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packext import linalg
from packext._factored import accumulation_dtype
from packext._quantity import HessianQuantity, Point, Sampled, checked_generator, sum_of
from packext._union import Here, Part


class Estimate(NamedTuple):
    """A mean over random draws, and its standard error (infinite for a single draw)."""

    value: Tensor
    standard_error: Tensor


class TraceEstimate(NamedTuple):
    """A mean over random draws, its standard error (infinite for a single draw), and the draws `[mc_samples]`."""

    value: Tensor
    standard_error: Tensor
    draws: Tensor


def _of_draws(draws: Tensor) -> TraceEstimate:
    m = len(draws)
    return TraceEstimate(draws.mean(), draws.std() / m**0.5 if m > 1 else torch.full_like(draws[0], torch.inf), draws)


class _Hutchinson(Sampled, HessianQuantity):
    """Draws signs z, of which `z H z` has the trace as its mean, and `z * H z` the diagonal."""

    def draws(self, point: Point, generator: torch.Generator) -> Iterator[list[Tensor]]:
        """`z * H z` for vectors z of signs in the shapes of the parameters, in float32 or better."""
        generator = self.generator or generator
        for _ in range(self.mc_samples):
            z = [
                torch.randint(2, p.shape, generator=generator, device=generator.device).to(p).mul_(2).sub_(1)
                for p in point.parameters
            ]
            images = point.hessian(z)
            yield [(one * hz).to(accumulation_dtype(hz.dtype)) for one, hz in zip(z, images, strict=True)]


class DiagHessianMC(_Hutchinson):
    """Hutchinson's estimate of the Hessian's diagonal, in `diag_h_mc`: value and standard error, both `[*p]`.

    The mean over signs z of `z * H z` (Bekas, Kokiopoulou & Saad, 2007), for any model and loss that autograd can
    differentiate twice; in float32 or better, also of parameters in half precision.
    """

    savefield = "diag_h_mc"
    indivisible = ""

    def measure(self, point: Point, generator: torch.Generator) -> list[Tensor]:
        # Of each parameter the mean and the root of the sum of squared deviations, by draws (Welford, 1962).
        found = [torch.zeros(2, *p.shape, dtype=accumulation_dtype(p.dtype), device=p.device) for p in point.parameters]
        for count, values in enumerate(self.draws(point, generator), 1):
            for (mean, spread), value in zip(found, values, strict=True):
                away = value - mean
                mean += away / count
                spread.hypot_(away.mul_(math.sqrt(1 - 1 / count)))  # no squares: they would underflow first
        for _, spread in found:
            spread /= math.sqrt(self.mc_samples * (self.mc_samples - 1))
        return found

    def add(self, held: Tensor, value: Tensor) -> Tensor:
        """Of several losses, whose draws are independent."""
        return torch.stack([held[0] + value[0], torch.hypot(held[1], value[1])])

    def land(self, held: Tensor, n: int, factor: float) -> Estimate:
        return Estimate(held[0] * factor, held[1].nan_to_num(nan=torch.inf) * abs(factor))

    def unite(self, parts: Sequence[Part], over: Here) -> Part:
        """Errors of passes are independent; ranks may have drawn the same signs, so that theirs are added up."""
        value = over.sum(sum_of([p.value.value for p in parts]))
        error = over.sum(functools.reduce(torch.hypot, [p.value.standard_error for p in parts]))
        return Part(Estimate(value, error), over.count(sum(p.n for p in parts)))


class HessianTrace(_Hutchinson):
    """Hutchinson's estimate of the trace of the Hessian's block of a parameter, in `hessian_trace`.

    Value, standard error and the draws `[mc_samples]`; in `results` those of the whole Hessian. The mean over signs z
    of `z H z` (Hutchinson, 1989), for any model and loss that autograd can differentiate twice.
    """

    savefield = "hessian_trace"
    indivisible = ""

    def measure(self, point: Point, generator: torch.Generator) -> list[Tensor]:
        found = [[value.sum() for value in values] for values in self.draws(point, generator)]
        return [torch.stack(draws) for draws in zip(*found, strict=True)]

    def land(self, held: Tensor, n: int, factor: float) -> TraceEstimate:
        return _of_draws(held * factor)

    def unite(self, parts: Sequence[Part], over: Here) -> Part:
        draws = over.sum(sum_of([p.value.draws for p in parts]))
        return Part(_of_draws(draws), over.count(sum(p.n for p in parts)))

    def whole(self, values: dict[str, Any]) -> TraceEstimate:
        return _of_draws(torch.stack([v.draws for v in values.values()]).sum(0))


class Eigen(NamedTuple):
    """Eigenvalues `[k]`, a parameter's part of their vectors `[k, *p]` (None for the whole model), residuals `[k]`.

    And whether these are within the tolerance. An eigenvalue lies within the residual of each value in any case, but if
    not, it need not be one of those that were asked for.
    """

    values: Tensor
    vectors: Tensor | None
    residuals: Tensor
    converged: bool


class TopEigenvalues(HessianQuantity):
    """Extreme eigenvalues of the Hessian (or GGN) of the loss over all parameters, by Lanczos, in `top_eigenvalues`.

    Each parameter has the eigenvalues and its part of the eigenvectors; `results` has the eigenvalues. Products of a
    forward pass that autocast rounded are not symmetric enough for Lanczos, and are refused.
    """

    savefield = "top_eigenvalues"
    additive = False

    def __init__(
        self,
        k: int = 1,
        which: str = "LA",
        curvature: str = "hessian",
        tol: float = 1e-3,
        maxiter: int = 20,
        generator: torch.Generator | None = None,
        ncv: int | None = None,
        start: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """Say which.

        Args:
            k: how many.
            which: "LA" the largest in the context's scale, "SA" the smallest (the most negative), "LM" the largest in
                magnitude.
            curvature: "hessian", or "ggn" for the generalised Gauss-Newton matrix.
            tol: of the residuals, relative to the Hessian's norm; `converged` in the result says whether they are less.
            maxiter: restarts, after which the result is what it is.
            generator: of the first vector; one of packext's own by default.
            ncv: vectors of Lanczos' basis, the products of one cycle; `max(2 k + 1, 20)` by default. As for
                `linalg.eigsh`.
            start: the first vector in place of a random one, by parameter (zero where it has none).

        Raises:
            ValueError: for an unknown choice.
        """
        if which not in ("LA", "SA", "LM") or not isinstance(k, Integral) or k < 1:
            raise ValueError(f'which must be "LA", "SA" or "LM" and k an int of 1 or more, got {which!r} and {k!r}.')
        if curvature not in ("hessian", "ggn"):
            raise ValueError(f'curvature must be "hessian" or "ggn", got {curvature!r}.')
        if start is not None and not (isinstance(start, Mapping) and all(isinstance(p, Tensor) for p in start)):
            raise ValueError(f"start must be a dictionary of tensors by the parameter itself, got {start!r:.80}.")
        self.curvature = curvature
        self.k, self.which, self.tol, self.maxiter, self.ncv, self.start = k, which, tol, maxiter, ncv, start
        self.generator = checked_generator(generator)

    def measure(self, point: Point, generator: torch.Generator) -> list[Any]:
        product = point.hessian if self.curvature == "hessian" else point.ggn
        start = None
        if self.start is not None:
            start = [self.start[p] if p in self.start else torch.zeros_like(p) for p in point.parameters]
        other = {"LA": "SA", "SA": "LA"} if point.negative else {}  # whose end the factor turns round
        found = linalg.eigsh(
            product, [p.detach() for p in point.parameters], self.k, other.get(self.which, self.which), self.ncv,
            self.maxiter, self.tol, self.generator or generator, start,
        )  # fmt: skip
        return [Eigen(found.values, part, found.residuals, found.converged) for part in found.vectors]

    def land(self, held: Eigen, n: int, factor: float) -> Eigen:
        return held._replace(values=held.values * factor, residuals=held.residuals * abs(factor))

    def whole(self, values: dict[str, Any]) -> Eigen:
        first = next(iter(values.values()))
        return first._replace(vectors=None)


class Product:
    """A function `[V, *p] -> [V, *p]` that runs through the graph of a loss."""

    def __init__(self, function: Callable[[Tensor], Tensor], factor: float, savefield: str) -> None:
        """Call `function`, and scale what it gives by `factor`; parameters carry this as attribute `savefield`."""
        self.function, self.factor, self.savefield = function, factor, savefield

    def __call__(self, matrix: Tensor) -> Tensor:
        """Products with the vectors in `matrix`, `[V, *p] -> [V, *p]`."""
        products = self.function(matrix)
        return products if self.factor == 1.0 else products * self.factor

    def __reduce__(self) -> Any:
        """Refuse to be pickled.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"A parameter's `{self.savefield}` multiplies through the graph of a loss, which cannot be pickled. "
            f"Delete it first (`del parameter.{self.savefield}`), or save model.state_dict()."
        )


class _Products(HessianQuantity):
    retains = True

    def __init__(self, savefield: str | None = None) -> None:
        """Name the attribute in which the function is found; the quantity's own by default.

        Raises:
            ValueError: for what is no name, or that of an attribute that tensors have.
        """
        if savefield is not None:
            if not savefield.isidentifier() or hasattr(Tensor, savefield):
                raise ValueError(f"savefield must be a name that no attribute of tensors has, got {savefield!r}.")
            self.savefield = savefield

    def measure(self, point: Point, generator: torch.Generator) -> list[Callable[[Tensor], Tensor]]:
        return [functools.partial(point.block, self._product(point), k) for k in range(len(point.parameters))]

    def _product(self, point: Point) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        raise NotImplementedError

    def add(self, held: Any, value: Any) -> Callable[[Tensor], Tensor]:
        return lambda matrix: held(matrix) + value(matrix)

    def land(self, held: Any, n: int, factor: float) -> Product:
        return Product(held, factor, self.savefield)


class PCHMP(_Products):
    """Products with a block of the positive-curvature Hessian: a function `[V, *p] -> [V, *p]`, in `pchmp`.

    Going back through a chain of layers, the Hessian with respect to a function's output becomes that with respect to
    its input as `Jᵀ H J + R`, R being the second derivatives of the function itself, times the gradient. The
    positive-curvature Hessian takes R without its negative part (Chen et al., 2018, "BDA-PCH: Block-Diagonal
    Approximation of Positive-Curvature Hessian for Training Neural Networks"). It is defined where each function is
    linear or acts on each entry by itself and has one input that depends on parameters, and where the loss is convex;
    other models are refused. It runs through the graph, which is kept as for `HMP`.
    BackPACK 1.7.1 multiplies R by the gradient twice: products agree with it where R is zero, as for ReLU.
    """

    savefield = "pchmp"

    def __init__(self, savefield: str | None = None, modify: str = "clip") -> None:
        """Say what becomes of negative entries of R.

        Args:
            savefield: the attribute in which the function is found; another one lets a context have both choices.
            modify: "clip" makes negative entries zero, "abs" positive.

        Raises:
            ValueError: for another choice, or a field that tensors have.
        """
        super().__init__(savefield)
        if modify not in ("clip", "abs"):
            raise ValueError(f'modify must be "clip" or "abs", got {modify!r}.')
        self.modify = modify

    def measure(self, point: Point, generator: torch.Generator) -> list[Callable[[Tensor], Tensor]]:
        return point.positive(Tensor.abs if self.modify == "abs" else lambda r: r.clamp(min=0))


class HMP(_Products):
    """Products with the Hessian's diagonal block of a parameter: a function `[V, *p] -> [V, *p]`, in `hmp`.

    It runs through the graph of the loss, which `loss.backward()` keeps in the context, unless it is told
    `retain_graph=False`, and which lives as long as the function (`torch.autograd.backward` has to be told to keep it).
    """

    savefield = "hmp"

    def _product(self, point: Point) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        return point.hessian


class GGNMP(_Products):
    """Products with the GGN's diagonal block of a parameter: a function `[V, *p] -> [V, *p]`, in `ggnmp`.

    It runs through the graph of the loss, which is kept as for `HMP`.
    """

    savefield = "ggnmp"

    def _product(self, point: Point) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        return point.ggn
