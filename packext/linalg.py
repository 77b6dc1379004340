"""Linear algebra of curvature: Kronecker factors, and operators known by their products with vectors.

The Kronecker factors of a parameter are a list of symmetric matrices: `[B, A]` for a weight seen as a matrix
`[O, I]`, `[B]` for a bias, in general any number. They stand for the matrix kron(B, A) that multiplies the
parameter's entries in row-major order. A factor may have a leading axis of groups, `[G, n, n]`: the matrix is then
block-diagonal, with one Kronecker product for each group; a factor without that axis is shared by the groups.
A factor `[n]` is a diagonal matrix; nothing but `kron` makes a matrix `[n, n]` of it.

An operator is a callable `matvec` that takes and returns vectors in one structure: a tensor, or a list, tuple or
dictionary of tensors (nested, too), such as the parameters of a model. A function that multiplies many vectors at once,
`[V, *p]`, is one after `lambda v: f(v[None])[0]`. Operators are taken to be symmetric. Arithmetic is in float32 or
better, under autocast as well, which is as it was within operators. Random vectors come from a generator of their own,
seeded with 0 if none is given; torch's stays as it was.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packext._errors import PackextError
from packext._kronecker import Joint as Joint
from packext._kronecker import KronEigh as KronEigh
from packext._kronecker import check as _check
from packext._kronecker import kron as kron
from packext._kronecker import kron_eigh as kron_eigh
from packext._kronecker import kron_inv as kron_inv
from packext._kronecker import kron_matvec as kron_matvec
from packext._kronecker import kron_trace as kron_trace
from packext._kronecker import nearest_kron as nearest_kron
from packext._precision import as_now, unrounded

Matvec = Callable[[Any], Any]


def _shapes(tree: Any) -> Any:
    """What to print of a structure of tensors."""
    if isinstance(tree, Tensor):
        return list(tree.shape)
    if isinstance(tree, Mapping):
        return {key: _shapes(value) for key, value in tree.items()}
    return tuple(map(_shapes, tree)) if isinstance(tree, (list, tuple)) else type(tree).__name__


class _Space:
    """Vectors in the structure of `like`, packed into one tensor `[P]`."""

    def __init__(self, like: Any, name: str) -> None:
        self.like, self.name, self.calls = like, name, 0
        self.leaves = list(self._leaves(like, like, "a vector"))
        self.sizes = [leaf.numel() for leaf in self.leaves]
        self.size = sum(self.sizes)
        _check(self.size > 0, f"{name}: vectors have no entries: {_shapes(like)}.")
        _check(all(leaf.is_floating_point() for leaf in self.leaves), f"{name}: vectors must be real floating point.")
        self.dtype = functools.reduce(torch.promote_types, (leaf.dtype for leaf in self.leaves), torch.float32)
        self.device = self.leaves[0].device
        self.eps = max(torch.finfo(leaf.dtype).eps for leaf in self.leaves)
        self.around = as_now(self.device.type)

    def _leaves(self, like: Any, tree: Any, what: str) -> Iterator[Tensor]:
        """The tensors of `tree`, in the order of `like`."""
        if isinstance(like, Tensor) and isinstance(tree, Tensor) and like.shape == tree.shape:
            yield tree
        elif isinstance(like, Mapping) and isinstance(tree, Mapping) and like.keys() == tree.keys():
            for key in like:
                yield from self._leaves(like[key], tree[key], f"{what}[{key!r}]")
        elif isinstance(like, (list, tuple)) and isinstance(tree, (list, tuple)) and len(like) == len(tree):
            for index, (one, other) in enumerate(zip(like, tree, strict=True)):
                yield from self._leaves(one, other, f"{what}[{index}]")
        else:
            needed = "a tensor, or a list, tuple or dict of them" if like is tree else f"shapes {_shapes(like)}"
            raise ValueError(f"{self.name}: {what} is {_shapes(tree)}; needed {needed}.")

    def pack(self, tree: Any, what: str, out: Tensor | None = None) -> Tensor:
        leaves = self._leaves(self.like, tree, what)
        return torch.cat([leaf.detach().reshape(-1).to(self.device, self.dtype) for leaf in leaves], out=out)

    def given(self, tree: Any, what: str) -> Tensor:
        """Pack an argument."""
        flat = self.pack(tree, what)
        _check(_finite(flat), f"{self.name}: {what} has entries that are NaN or infinite.")
        return flat

    def unpack(self, flat: Tensor) -> Any:
        """`[P]` in the structure of `like`; `[V, P]` as `[V, *p]`."""
        parts = flat.split(self.sizes, -1)
        shaped = (part.reshape(flat.shape[:-1] + leaf.shape) for part, leaf in zip(parts, self.leaves, strict=True))
        return _built(
            self.like, iter([part.to(leaf.device, leaf.dtype) for part, leaf in zip(shaped, self.leaves, strict=True)])
        )

    def operator(self, matvec: Matvec, what: str = "matvec") -> Callable[..., Tensor]:
        _check(callable(matvec), f"{self.name}: {what} must be a function, such as matrix.mv of a matrix.")

        def apply(flat: Tensor, out: Tensor | None = None) -> Tensor:
            self.calls += 1
            with self.around():
                image = matvec(self.unpack(flat))
            found = self.pack(image, f"the result of {what}", out)
            if not _finite(found):
                raise PackextError(
                    f"{self.name}: {what} gave entries that are NaN or infinite. (Of a model's curvature: check that "
                    "its inputs, parameters and outputs are finite.)"
                )
            return found

        return apply

    def random(self, generator: torch.Generator, distribution: str = "normal") -> Tensor:
        kind = {"generator": generator, "dtype": self.dtype, "device": generator.device}
        if distribution == "normal":
            return torch.randn(self.size, **kind).to(self.device)
        return torch.randint(2, (self.size,), **kind).to(self.device) * 2 - 1


def _built(like: Any, tensors: Iterator[Tensor]) -> Any:
    """The structure of `like`, of these tensors in turn."""
    if isinstance(like, Tensor):
        return next(tensors)
    if isinstance(like, Mapping):
        return {key: _built(value, tensors) for key, value in like.items()}
    built = [_built(each, tensors) for each in like]
    return built if isinstance(like, list) else tuple(built)


def _finite(flat: Tensor) -> bool:
    """Whether all entries are; of a sum that is not, one of them may not be."""
    return math.isfinite(float(flat.sum())) or bool(flat.isfinite().all())


def _own(generator: torch.Generator | None) -> torch.Generator:
    return torch.Generator().manual_seed(0) if generator is None else generator


class Solution(NamedTuple):
    """What `cg` returns."""

    solution: Any
    residual_norm: float
    iterations: int
    converged: bool
    negative_curvature: Any


def cg(
    matvec: Matvec,
    b: Any,
    tol: float = 1e-6,
    atol: float = 0.0,
    maxiter: int | None = None,
    preconditioner: Matvec | None = None,
    x0: Any = None,
) -> Solution:
    """Solve `A x = b` by conjugate gradients, truncated where the curvature is not positive.

    Args:
        matvec: the product with A.
        b: the right side; vectors have its structure.
        tol: converged is a residual of norm at most `tol` times that of b. In float32, rounding leaves about
            2e-8 times the condition number of A.
        atol: or of norm at most this.
        maxiter: products with A in the iteration; ten for each entry of b by default.
        preconditioner: the product with an approximate inverse of A, positive definite.
        x0: where to start; zero by default.

    Returns:
        The solution, the norm of its residual, the iterations, whether it converged, and None or a direction p with
        `p A p <= 0`. Such a direction ends the iteration; the solution is then the iterate
        before (x0 at first), and, from zero, `p b >= 0`: a descent direction where b is the negative gradient. A
        solution counts as converged by its true residual, for which A is applied once more; where rounding keeps that
        above the tolerance, the iteration ends.

    Raises:
        PackextError: if matvec gives NaN, the preconditioner is not positive definite, or the solution is too large for
            its type.
    """
    _check(tol >= 0 and atol >= 0, f"cg: tolerances must not be negative, got {tol} and {atol}.")
    _check(maxiter is None or maxiter >= 0, f"cg: maxiter must not be negative, got {maxiter}.")
    space = _Space(b, "cg")
    apply = space.operator(matvec)
    precondition = space.operator(preconditioner, "the preconditioner") if preconditioner else lambda r: r
    b = space.given(b, "b")
    unit = float(b.abs().max()) or 1.0  # all is in units of b, so that squares do not underflow
    b = b / unit
    x = torch.zeros_like(b) if x0 is None else space.given(x0, "x0") / unit
    with unrounded(space.device.type):
        r = b if x0 is None else b - apply(x)
        target = max(max(tol, torch.finfo(space.dtype).eps) * float(b.norm()), atol / unit)
        limit = 10 * space.size if maxiter is None else maxiter
        iterations, best = 0, math.inf
        while True:  # once, and again where the updated residual has drifted away from the true one
            norm = float(r.norm())
            if norm <= target or iterations >= limit or norm > best / 2:
                break
            best, p, rz = norm, None, 1.0
            while norm > target and iterations < limit:
                z = precondition(r)
                last, rz = rz, float(r @ z)
                if rz <= 0:
                    raise PackextError(f"cg: the preconditioner is not positive definite: r M r = {rz:.3g}.")
                p = z if p is None else z + (rz / last) * p
                ap = apply(p)
                curvature = float(p @ ap)
                if curvature <= 0:
                    return Solution(space.unpack(x * unit), norm * unit, iterations, False, space.unpack(p * unit))
                x, r = x + (rz / curvature) * p, r - (rz / curvature) * ap
                norm, iterations = float(r.norm()), iterations + 1
                if not math.isfinite(norm):
                    raise PackextError(
                        f"cg: the solution is beyond the range of {space.dtype}: p A p = {curvature:.3g} along a "
                        f"direction of length {float(p.norm()):.3g}. Add damping to A, or compute in float64."
                    )
            if norm <= target:
                r = b - apply(x)
    return Solution(space.unpack(x * unit), norm * unit, iterations, norm <= target, None)


def _norm(flat: Tensor) -> float:
    """The Euclidean norm, also where squares in float32 are zero or infinite."""
    norm = float(flat.norm())
    if 1e-12 < norm < math.inf:
        return norm
    unit = float(flat.abs().max())
    return unit * float((flat / unit).norm()) if unit else 0.0


def _orthonormal(w: Tensor, basis: Tensor, floor: float, out: Tensor) -> float:
    """As `_split`, the norm alone."""
    return _split(w, basis, floor, out)[1]


def _split(w: Tensor, basis: Tensor, floor: float, out: Tensor) -> tuple[Tensor, float]:
    """Write to `out` (which may be `w`) what of `w` is orthogonal to the rows of `basis`, as a unit vector.

    Returns:
        The coefficients of the rest in the basis, in float64; the norm before, or 0 if that is at most `floor`, and
        `out` then holds nothing of use. All is written in place: on the CPU, fresh pages of vectors as long as all
        parameters cost more than the arithmetic.
    """
    along = basis @ w
    torch.addmv(w, basis.mT, along, alpha=-1, out=out)
    norm, found = _norm(out), _double(along)
    if norm > floor:
        out /= norm
        along = basis @ out
        out.addmv_(basis.mT, along, alpha=-1)
        again = float(out.norm())
        if again > 0.5:  # else it was rounding
            out /= again
            return found + norm * _double(along), norm * again
    return found, 0.0


class Lanczos(NamedTuple):
    """What `lanczos` returns."""

    alphas: Tensor
    betas: Tensor
    basis: Any


def lanczos(matvec: Matvec, like: Any, k: int, generator: torch.Generator | None = None) -> Lanczos:
    """Tridiagonalise A in k steps from a random vector, with full reorthogonalisation.

    Args:
        matvec: the product with A, symmetric.
        like: vectors have the structure of this one.
        k: the number of steps.
        generator: of the first vector.

    Returns:
        The diagonal alphas `[k]`, the betas `[k]` (all but the last beside the diagonal; the last is the norm of what
        follows), and the orthonormal basis in the structure of `like`, `[k, *p]`. Fewer than k steps, with a
        last beta of zero, where what follows is rounding: at most 100 eps of the largest norm of an `A v` seen. Beside
        eigenvalues close to each other, rounding is more; the steps that follow then hardly weigh in the first vector.
    """
    space = _Space(like, "lanczos")
    _check(1 <= k <= space.size, f"lanczos: k must be between 1 and {space.size}, the entries of a vector; got {k}.")
    apply, eps = space.operator(matvec), torch.finfo(space.dtype).eps
    basis = torch.zeros(k, space.size, dtype=space.dtype, device=space.device)
    with unrounded(space.device.type):
        beta = _orthonormal(space.random(_own(generator)), basis[:0], 0.0, basis[0])
        alphas, betas, scale = [], [], 0.0
        while beta and len(alphas) < k:
            v = basis[len(alphas)]
            w = apply(v)
            alphas.append(v @ w)
            scale = max(scale, _norm(w))
            used = len(alphas)
            beta = _orthonormal(w, basis[:used], 100 * eps * scale, basis[used] if used < k else w)
            betas.append(beta)
    return Lanczos(torch.stack(alphas), basis.new_tensor(betas), space.unpack(basis[: len(alphas)]))


class Eigenpairs(NamedTuple):
    """What `eigsh` returns."""

    values: Tensor
    vectors: Any
    residuals: Tensor
    converged: bool
    matvecs: int


def eigsh(
    matvec: Matvec,
    like: Any,
    k: int = 1,
    which: str = "LA",
    ncv: int | None = None,
    maxiter: int = 100,
    tol: float = 1e-5,
    generator: torch.Generator | None = None,
    start: Any = None,
) -> Eigenpairs:
    """Eigenvalues at an end of the spectrum of A, by Lanczos with full reorthogonalisation and thick restarts.

    With k > 1, a new random vector looks for copies of multiple eigenvalues once k pairs have converged, until what it
    finds next is below them; so twice the products may be needed. Converged are then all of them, but for bad luck.

    Args:
        matvec: the product with A, symmetric.
        like: vectors have the structure of this one.
        k: how many.
        which: "LA" the largest, "SA" the smallest (the most negative), "LM" those of the largest magnitude.
        ncv: vectors of the basis, all of which are held; `max(2 k + 1, 20)` by default. More than k, and with k > 1
            more than k + 1; below 2 k + 1 it takes many cycles.
        maxiter: cycles, each of up to `ncv` products with A.
        tol: converged are residuals `|A v - value v|` of at most `tol` times the largest norm of an `A v` seen.
        generator: of the first vector.
        start: the first vector in place of a random one; eigenvectors to which it is orthogonal are not found. With
            k = 1, the products end as soon as they suffice, but not before the third.

    Returns:
        Values `[k]` from the wanted end inwards, vectors `[k, *p]` in the structure of `like`, and residuals `[k]`,
        none below what rounding leaves: of the largest norm of an `A v`, `ncv` eps, and 4 of the eps of `like` where
        that is in half precision.

    Raises:
        PackextError: if A is not symmetric, or not the same at each call, or gives NaN.
    """
    orders: dict[str, Callable[[Tensor], Tensor]] = {"LA": lambda e: e, "SA": lambda e: -e, "LM": lambda e: e.abs()}
    _check(which in orders, f'eigsh: which must be "LA", "SA" or "LM", got {which!r}.')
    space = _Space(like, "eigsh")
    _check(1 <= k <= space.size, f"eigsh: k must be between 1 and {space.size}, the entries of a vector; got {k}.")
    _check(maxiter >= 1 and tol >= 0, f"eigsh: needed maxiter >= 1 and tol >= 0, got {maxiter} and {tol}.")
    m = min(space.size, max(2 * k + 1, 20) if ncv is None else ncv)
    enough = m >= k + min(k, 2) or m == space.size
    _check(enough, f"eigsh: ncv must be larger than {k + (k > 1)} for k = {k}, got {ncv}.")
    apply, generator, eps = space.operator(matvec), _own(generator), torch.finfo(space.dtype).eps
    rounding = max(m * eps, 4 * space.eps)
    # With the rows of `basis` as columns of V, A V = V h + looseᵀ mass, which is what images have outside of the basis:
    # as a rule one direction, in the row behind, that comes next; where a random vector does, there are more.
    basis = torch.empty(m + 1, space.size, dtype=space.dtype, device=space.device)
    loose, mass = basis[:0], torch.zeros(0, m, dtype=torch.double)
    h, filled, used, looking, scale, worst = torch.zeros(m, m, dtype=torch.double), 0, 0, False, 0.0, 0
    before = None  # the values that were there when a random vector was sent to look for copies
    new = None if start is None else space.given(start, "start")
    with unrounded(space.device.type):
        for cycle in range(maxiter):
            for j in range(filled, m):
                # What is left of them by rounding goes: a random vector finds more copies of multiple eigenvalues.
                if bool((weak := mass.norm(dim=1) <= 10 * eps * scale).any()):
                    loose, mass = loose[~weak.to(loose.device)], mass[~weak]
                if len(loose) and not (looking and j == filled):
                    if j == filled and len(loose) > 1:
                        loose, mass = _turned(loose, mass, worst)
                    basis[j], h[j] = loose[-1], mass[-1]
                    loose, mass = loose[:-1], mass[:-1]
                else:
                    found = new is not None and _orthonormal(new, basis[:j], 0.0, basis[j])
                    while not found:  # at first, looking for copies, or where the basis spans an invariant subspace
                        found = _orthonormal(space.random(generator), basis[:j], 0.0, basis[j])
                    new = None
                    if len(loose):
                        loose, mass, h[j] = _without(loose, mass, basis[j])
                image = apply(basis[j], basis[j + 1])
                scale, used = max(scale, _norm(image)), j + 1
                rows = torch.cat([basis[:used], loose]) if len(loose) else basis[:used]
                along, norm = _split(image, rows, 10 * eps * scale, image)
                h[:used, j], mass[:, j] = along[:used], along[used:]
                if norm:
                    loose = torch.cat([loose, image[None]]) if len(loose) else image[None]
                    mass = torch.cat([mass, torch.zeros(1, m, dtype=torch.double)])
                    mass[-1, j] = norm
                if k == 1 and start is not None and 2 <= j < m - 1:
                    _, s = _ritz(h[:used, :used], orders[which])
                    if float((mass[:, :used] @ s[0]).norm()) <= tol * scale:
                        break
            if float((h - h.mT)[:used, :used].abs().max()) > space.eps**0.5 * scale:
                raise PackextError(
                    "eigsh: matvec is not a symmetric operator, or not the same one at each call. What autocast rounds "
                    "to half precision is not symmetric to float32: compute without it (a Hessian: the forward pass)."
                )
            values, s = _ritz(h[:used, :used], orders[which])
            norms, ends = (mass[:, :used] @ s[: k + 1].mT).norm(dim=0), orders[which](values)
            residuals = norms[:k].clamp(min=rounding * scale)
            worst, bound = int(residuals.argmax()), max(tol, rounding) * scale
            settled = float(residuals.max()) <= bound
            if before is not None and float((ends[:k] - before).abs().max()) > bound:
                before = None  # a copy was found: there may be another
            converged = settled and (k == 1 or m == space.size)
            if settled and before is not None:  # while the next one may still rise to the last, a copy is not ruled out
                converged = float(norms[k]) <= max(bound, float(ends[k - 1] - ends[k]) / 10)
            coefficients = s.to(basis)
            if converged or cycle == maxiter - 1:
                break
            # A Krylov space has one copy of a multiple eigenvalue, so a random vector begins one of its own.
            looking = settled and before is None
            before = ends[:k] if looking else before
            filled = k if looking else min(used, k + max(1, (m - k) // 2), m - 1)
            basis[:filled] = coefficients[:filled] @ basis[:used]
            h, mass = torch.zeros(m, m, dtype=torch.double), mass[:, :used] @ s.mT
            h.diagonal()[:filled] = values[:filled]
            mass = torch.cat([mass[:, :filled], mass.new_zeros(len(mass), m - filled)], 1)
        vectors, values = coefficients[:k] @ basis[:used], values[:k].to(basis)
    return Eigenpairs(values, space.unpack(vectors), residuals.to(basis), converged, space.calls)


def _turned(loose: Tensor, mass: Tensor, column: int) -> tuple[Tensor, Tensor]:
    """The same `looseᵀ mass` by other rows, of which the last alone has a part in this column."""
    turn = torch.linalg.qr(torch.cat([mass[:, column, None], torch.eye(len(mass), dtype=mass.dtype)], 1))[0].flip(1).mT
    return turn.to(loose) @ loose, turn @ mass


def _without(loose: Tensor, mass: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`looseᵀ mass` as `v rowᵀ` and the same of rows orthogonal to the unit vector v; these, their mass, and `row`."""
    along = loose @ v
    q, r = torch.linalg.qr((loose - along[:, None] * v).mT)
    return q.mT, _double(r) @ mass, _double(along) @ mass


def _double(t: Tensor) -> Tensor:
    """In float64 on the CPU, where small matrices are."""
    return t.to("cpu", torch.double)


def _ritz(h: Tensor, order: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a symmetric matrix in this order, the largest first, and its eigenvectors in rows."""
    values, vectors = torch.linalg.eigh((h + h.mT) / 2)
    places = order(values).argsort(descending=True)
    return values[places], vectors.mT[places]


class Estimate(NamedTuple):
    """A mean over random probes, and its standard error (infinite with a single probe)."""

    estimate: Any
    standard_error: Any


def _probe(
    name: str,
    matvec: Matvec,
    like: Any,
    probes: int,
    generator: torch.Generator | None,
    distribution: str,
    reduce: Callable[[Tensor], Tensor],
) -> tuple[_Space, Tensor, Tensor]:
    """Mean of `reduce(v * A v)` over random v, and its standard error (Welford's update, without squares)."""
    known = ("rademacher", "normal")
    _check(probes >= 1, f"{name}: probes must be at least 1, got {probes}.")
    _check(distribution in known, f"{name}: distribution must be one of {known}, got {distribution!r}.")
    space, generator = _Space(like, name), _own(generator)
    apply = space.operator(matvec)
    mean = spread = torch.zeros((), dtype=space.dtype, device=space.device)
    for count in range(1, probes + 1):
        v = space.random(generator, distribution)
        value = reduce(v * apply(v))
        away = value - mean
        mean = mean + away / count
        spread = torch.hypot(spread, away * math.sqrt(1 - 1 / count))
    error = spread / math.sqrt(probes * (probes - 1)) if probes > 1 else torch.full_like(mean, math.inf)
    return space, mean, error


def trace(
    matvec: Matvec,
    like: Any,
    probes: int = 32,
    generator: torch.Generator | None = None,
    distribution: str = "rademacher",
) -> Estimate:
    """Hutchinson's estimate of the trace of A, and its standard error.

    Args:
        matvec: the product with A.
        like: vectors have the structure of this one.
        probes: how many random vectors.
        generator: of the vectors; without one, each call draws the same.
        distribution: of their entries, "rademacher" (the smaller variance) or "normal".

    Returns:
        Two tensors without axes.
    """
    _, mean, error = _probe("trace", matvec, like, probes, generator, distribution, torch.sum)
    return Estimate(mean, error)


def diagonal(
    matvec: Matvec,
    like: Any,
    probes: int = 32,
    generator: torch.Generator | None = None,
    distribution: str = "rademacher",
) -> Estimate:
    """Hutchinson's estimate of the diagonal of A, and its standard error, as vectors; arguments as for `trace`."""
    space, mean, error = _probe("diagonal", matvec, like, probes, generator, distribution, lambda v: v)
    return Estimate(space.unpack(mean), space.unpack(error))
