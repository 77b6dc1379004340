"""Kronecker factors: products, inverses and decompositions. Public as part of `linalg`, which says what they are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from packext._errors import PackextError
from packext._precision import unrounded


@dataclass(frozen=True, eq=False)
class Joint:
    """What a bias has in place of factors where weight and bias have one block: those of its weight are for both.

    The block multiplies the two as one matrix, the bias being the weight's last column (its last row, for a weight that
    is stored `[I, O]`).

    Args:
        weight: the parameter that has the factors.
        axis: of the inputs in the matrix: 1, or 0 for a weight stored `[I, O]`.
    """

    weight: Tensor
    axis: int = 1

    def join(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Weight and bias (or their gradients) as one matrix, `[O, I + 1]` or `[I + 1, O]`."""
        return torch.cat([weight.flatten(1), bias.unsqueeze(self.axis)], self.axis)

    def split(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """What `join` has joined, in the shapes of weight and bias."""
        inputs = matrix.shape[self.axis] - 1
        return matrix.narrow(self.axis, 0, inputs).reshape(self.weight.shape), matrix.select(self.axis, inputs)


def _batched(factors: Any) -> list[Tensor]:
    """The factors as `[G, n, n]` or `[1, n, n]`, diagonal ones as `[1, n]`, in one dtype, float32 or better."""
    if isinstance(factors, Joint):
        raise ValueError(
            f"The bias has its factors together with the weight {list(factors.weight.shape)}: use those of the weight "
            "on `joint.join(weight.grad, bias.grad)`, with `joint` this object."
        )
    if isinstance(factors, Tensor) or not factors:
        raise ValueError("Kronecker factors must be a list of at least one matrix.")
    shapes = [list(f.shape) for f in factors]
    if any(len(s) not in (1, 2, 3) or s[-1] != s[-2:][0] or 0 in s for s in shapes):
        raise ValueError(
            "Kronecker factors must be square, [n, n] or [G, n, n], or diagonal, [n], and not empty; "
            f"got shapes {shapes}."
        )
    if len({s[0] for s in shapes if len(s) == 3} - {1}) > 1:
        raise ValueError(f"Kronecker factors must have equally many groups; got shapes {shapes}.")
    if not all(f.is_floating_point() for f in factors):
        raise ValueError(f"Kronecker factors must be real floating point; got {[f.dtype for f in factors]}.")
    dtype = functools.reduce(torch.promote_types, (f.dtype for f in factors), torch.float32)
    return [(f if f.dim() == 3 else f[None]).to(dtype) for f in factors]


def _diagonal(m: Tensor) -> Tensor:
    """Diagonals `[G, n]` of what `_batched` gives."""
    return m if m.dim() == 2 else m.diagonal(dim1=-2, dim2=-1)


def _symmetric(factors: Sequence[Tensor]) -> list[Tensor]:
    """As `_batched`, finite, and symmetric to the last digit."""
    matrices = _batched(factors)
    for f, m in zip(factors, matrices, strict=True):
        if not m.isfinite().all():
            raise ValueError(f"the Kronecker factor of shape {list(f.shape)} has entries that are NaN or infinite.")
        if m.dim() == 3 and (m - m.mT).abs().amax() > torch.finfo(f.dtype).eps ** 0.5 * m.abs().amax():
            raise ValueError(f"the Kronecker factor of shape {list(f.shape)} is not symmetric.")
    return [m if m.dim() == 2 else 0.5 * m + 0.5 * m.mT for m in matrices]


def _entries(matrices: list[Tensor]) -> int:
    return max(map(len, matrices)) * math.prod(m.shape[-1] for m in matrices)


def _unbatched(matrices: list[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """Take away the axis of groups where the factor had none (and needed none)."""
    return [
        m[0] if f.dim() < 3 and len(m) == 1 else m.diag_embed() if m.dim() == 2 else m
        for f, m in zip(factors, matrices, strict=True)
    ]


def kron(factors: Sequence[Tensor]) -> Tensor:
    """The dense matrix `[P, P]` of Kronecker factors; block-diagonal where they have groups."""
    matrices = [m.diag_embed() if m.dim() == 2 else m for m in _batched(factors)]
    out = matrices[0]
    for m in matrices[1:]:
        with unrounded(m.device.type):
            blocks = torch.einsum("gab,gcd->gacbd", out, m)
        out = blocks.reshape(len(blocks), out.shape[-1] * m.shape[-1], -1)
    return torch.block_diag(*out)


def nearest_kron(products: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The Kronecker product of two factors that is nearest to a sum of such products, in the Frobenius norm.

    A sum of Kronecker products is in general none. Seen as a matrix of all pairs of the entries of its two sides, it
    has as many terms of rank one as there are products, and the nearest product is its dominant singular pair (Van Loan
    & Pitsianis 1993, "Approximation with Kronecker Products"). That takes inner products of the factors alone. Those of
    positive semi-definite factors are not negative, so that the pair has weights of one sign (Perron-Frobenius), and
    the result is positive semi-definite, too. It is the sum itself where that is a product: of one, or where all
    products share one side.

    Args:
        products: of factors `[left, right]` each, of the same sizes, positive semi-definite: `[n, n]`, with groups
            `[G, n, n]`, or diagonal, `[n]`.

    Returns:
        `[left, right]`, of equal Frobenius norms (in each group); diagonal where that side is in all products.
    """
    terms = [_batched(p) for p in products]
    sizes = {tuple(m.shape[-1] for m in t) for t in terms}
    check(
        len(sizes) == 1 and len(terms[0]) == 2,
        f"nearest_kron takes products of two factors each, of the same sizes; got those of sizes {sorted(sizes)}.",
    )
    lefts, rights = zip(*terms, strict=True)
    (of_left, left), (of_right, right) = _gram(lefts), _gram(rights)
    # The sum is that of `weight l rᵀ` with l and r of norm 1, seen as vectors.
    weight = of_left * of_right
    right = weight[..., None] * right * weight[..., None, :]
    # Coefficients x of the l are the dominant eigenvector of `right left`; by the eigenvectors of a symmetric matrix.
    values, vectors = torch.linalg.eigh(left)
    root = vectors * values.clamp(min=0).sqrt()[..., None, :] @ vectors.mT
    x = (right @ root @ torch.linalg.eigh(root @ right @ root)[1][..., -1:])[..., 0].abs()
    x = x * _inverse_or_zero((x * (left @ x[..., None])[..., 0]).sum(-1, keepdim=True).sqrt())
    z = (left @ x[..., None])[..., 0]
    even = (z * (right @ z[..., None])[..., 0]).sum(-1, keepdim=True).clamp(min=0).sqrt().sqrt()
    found = [
        _weighted(lefts, x * even * _inverse_or_zero(of_left)),
        _weighted(rights, z * of_left * _inverse_or_zero(even)),
    ]
    grouped = any(f.dim() == 3 for p in products for f in p)
    return found if grouped else [m[0] for m in found]


def _gram(side: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Norms `[G, R]` of R factors, and the cosines `[G, R, R]` between them, in float64."""
    rows = [torch.stack(torch.broadcast_tensors(*(_inner(m, other) for other in side)), -1) for m in side]
    gram = torch.stack(torch.broadcast_tensors(*rows), -2)
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = _inverse_or_zero(norms)
    return norms, scale[..., None] * gram * scale[..., None, :]


def _inverse_or_zero(t: Tensor) -> Tensor:
    return torch.where(t > 0, 1 / t, 0.0)


def _inner(m: Tensor, other: Tensor) -> Tensor:
    """Inner products `[G]` of factors, of which diagonal ones are `[G, n]`, in float64."""
    if m.dim() != other.dim():
        m, other = _diagonal(m), _diagonal(other)
    return (m * other).flatten(1).sum(1, dtype=torch.float64)


def _weighted(matrices: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The sum over r of factors `[G, n, n]` or `[G, n]` times weights `[G, R]`; diagonal if all are."""
    parts = [
        m * w.reshape(-1, *[1] * (m.dim() - 1))
        for m, w in zip(matrices, weights.to(matrices[0].dtype).unbind(-1), strict=True)
    ]
    dense = [part for part in parts if part.dim() == 3] or parts
    total = functools.reduce(torch.add, dense)
    for part in parts if len(dense) < len(parts) else ():
        if part.dim() == 2:
            total.diagonal(dim1=-2, dim2=-1).add_(part)
    return total


def kron_matvec(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """Multiply by the matrix of Kronecker factors without forming it.

    Args:
        factors: `P` entries in all, the product of their sizes (times the number of groups).
        x: some of its last axes have P entries together, a vector in row-major order, whatever their shape (`[P]`,
            `[O, I]`, `[O, C, K, K]`); all axes before them count vectors.

    Returns:
        The products, in the shape of `x`.

    Raises:
        ValueError: if the last axes of `x` do not have P entries, or factors are not square.
    """
    matrices = _batched(factors)
    groups, entries = max(map(len, matrices)), _entries(matrices)
    if all(math.prod(x.shape[k:]) != entries for k in range(x.dim() + 1)):
        raise ValueError(
            f"x has shape {list(x.shape)}, but Kronecker factors of shapes {[list(f.shape) for f in factors]} "
            f"multiply vectors of {entries} entries: no number of x's last axes has as many."
        )
    dtype = torch.promote_types(x.dtype, matrices[0].dtype)
    y, before, after = x.to(dtype), 1, entries // groups
    for m in matrices:
        after //= m.shape[-1]
        y = y.reshape(-1, groups, before, m.shape[-1], after)
        if m.dim() == 2:
            y = y * m.to(dtype)[:, None, :, None]
        else:
            with unrounded(y.device.type):
                y = torch.einsum("gab,vgpbq->vgpaq", m.to(dtype), y)
        before *= m.shape[-1]
    return y.reshape(x.shape)


def kron_trace(factors: Sequence[Tensor]) -> Tensor:
    """The trace of the matrix of Kronecker factors."""
    traces = [_diagonal(m).sum(-1) for m in _batched(factors)]
    return math.prod(traces[1:], start=traces[0]).sum()


def kron_inv(factors: Sequence[Tensor], damping: float, pi: bool = True) -> list[Tensor]:
    """Inverses of damped Kronecker factors, by Cholesky: an approximation of the damped matrix's inverse.

    For the inverse of kron(B, A) + damping I itself see `KronEigh`.

    Args:
        factors: positive semi-definite.
        damping: of the whole matrix. A single factor gets all of it, each of k factors `damping ** (1 / k)`.
        pi: balance these shares by the factors' mean eigenvalues: `A + pi sqrt(damping) I` and
            `B + sqrt(damping) / pi I` with `pi² = (tr(A) / dim A) / (tr(B) / dim B)` (Martens & Grosse 2015, section
            6.3); k factors in proportion to their mean eigenvalue over the geometric mean of all. Shares are equal
            where a trace is zero.

    Returns:
        A list like `factors`; one without groups gets them where they ask for different shares.
        Factors that are not positive definite with their damping, to working precision (float64), are refused.
    """
    check(math.isfinite(damping) and damping >= 0, f"damping must be finite and not negative, got {damping}.")
    matrices = _symmetric(factors)
    shares = [m.new_full((1,), damping ** (1 / len(matrices))) for m in matrices]
    if pi:
        means = torch.broadcast_tensors(*(_diagonal(m).mean(-1) for m in matrices))
        logs = torch.stack(means).log()
        ratio = (logs - logs.mean(0)).exp()
        usable = ratio.isfinite().all(0)  # unless a trace is zero
        shares = [share * torch.where(usable, r, 1.0) for share, r in zip(shares, ratio, strict=True)]
    inverses = [
        _reciprocal(m, share[:, None]) if m.dim() == 2 else _inverse(m, share[:, None, None])
        for m, share in zip(matrices, shares, strict=True)
    ]
    return _unbatched(inverses, factors)


def _reciprocal(m: Tensor, shift: Tensor) -> Tensor:
    """`1 / (m + shift)` of diagonals."""
    damped = m + shift
    inverse = 1 / damped
    if (damped > 0).all() and inverse.isfinite().all():
        return inverse
    raise PackextError(
        f"kron_inv: a diagonal factor of size {m.shape[-1]} is not positive definite (damped by up to "
        f"{float(shift.max()):.3g}, its least entry {float(m.min()):.3g}). More damping?"
    )


def _inverse(m: Tensor, shift: Tensor) -> Tensor:
    """`(m + shift I)⁻¹`; in float64 where pivots of the Cholesky factorisation drown in the rounding of `m`'s dtype."""
    n = m.shape[-1]
    for dtype in dict.fromkeys((m.dtype, torch.float64)):
        damped = m.to(dtype) + shift.to(dtype) * torch.eye(n, dtype=dtype, device=m.device)
        lower, info = torch.linalg.cholesky_ex(damped)
        pivots, diagonal = lower.diagonal(dim1=-2, dim2=-1) ** 2, damped.diagonal(dim1=-2, dim2=-1)
        if not info.any() and (pivots > 10 * n * torch.finfo(dtype).eps * diagonal).all():
            inverse = torch.cholesky_inverse(lower).to(m.dtype)
            if inverse.isfinite().all():
                return inverse
    raise PackextError(
        f"kron_inv: a factor of size {n} is not positive definite (damped by up to {float(shift.max()):.3g}, "
        f"mean of its diagonal {float(m.diagonal(dim1=-2, dim2=-1).mean()):.3g}). More damping?"
    )


def kron_eigh(factors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Eigenvalues `[n]` (ascending) and eigenvectors `[n, n]` (columns) of each factor, with its groups if it has any.

    A diagonal factor keeps its entries where they are: its eigenvectors are the identity, as the diagonal `[n]`.
    Negative eigenvalues that are rounding errors become zero; others stay. In float32 those below about 1e-6 of the
    largest are rounding, too: where damping is smaller than that, pass factors in float64.

    Args:
        factors: symmetric; they need not be positive semi-definite.

    Returns:
        The eigenvalues of each factor, and its eigenvectors.
    """
    values, vectors = [], []
    for m in _symmetric(factors):
        if m.dim() == 2:
            values.append(m)
            vectors.append(torch.ones_like(m))
            continue
        try:
            e, q = torch.linalg.eigh(m)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            e, q = (t.to(m.dtype) for t in torch.linalg.eigh(m.double()))
        rounding = m.shape[-1] * torch.finfo(m.dtype).eps * e.abs().amax(-1, keepdim=True)
        values.append(torch.where((e < 0) & (e >= -rounding), 0.0, e))
        vectors.append(q)
    flat = [e[0] if f.dim() < 3 else e for f, e in zip(factors, values, strict=True)]
    return flat, _unbatched(vectors, factors)


@dataclass(frozen=True, eq=False)
class KronEigh:
    """`Q diag(eigenvalues) Qᵀ` with Q the Kronecker product of `vectors`: a decomposed Kronecker product, or EKFAC.

    Args:
        vectors: the eigenvectors (columns) of each factor, as `kron_eigh` has them.
        eigenvalues: as many as the parameter has entries, in any shape, in row-major order. Those of the product are
            the outer product of its factors' (`KronEigh.of`); EKFAC's are the sum over samples and columns of the
            squared entries of `rotate(c)`, with c the columns of the root of the GGN.
    """

    vectors: Sequence[Tensor]
    eigenvalues: Tensor

    def __post_init__(self) -> None:
        """Compare the sizes."""
        entries = _entries(_batched(self.vectors))
        shapes = [list(v.shape) for v in self.vectors]
        check(
            self.eigenvalues.numel() == entries,
            f"eigenvectors of shapes {shapes} need {entries} eigenvalues, got shape {list(self.eigenvalues.shape)}.",
        )

    @classmethod
    def of(cls, factors: Sequence[Tensor]) -> KronEigh:
        """Decompose the factors; `eigenvalues` is `[n_1, ..., n_k]`, with the groups in front if there are any."""
        values, vectors = kron_eigh(factors)
        grouped = any(f.dim() == 3 for f in factors)
        rows = [e if e.dim() == 2 else e[None] for e in values]
        out = rows[0]
        for e in rows[1:]:
            out = out[..., None] * e.reshape(len(e), *[1] * (out.dim() - 1), -1)
        return cls(vectors, out if grouped else out[0])

    def rotate(self, x: Tensor, back: bool = False) -> Tensor:
        """`Qᵀ x`, the coordinates of `x` (`[..., *p]`, as for `kron_matvec`) in the eigenbasis; `Q x` if `back`."""
        return kron_matvec(self.vectors if back else [v if v.dim() == 1 else v.mT for v in self.vectors], x)

    def matvec(self, x: Tensor, f: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """`Q f(eigenvalues) Qᵀ x`; `lambda e: 1 / (e + damping)` is the exact inverse of the damped matrix."""
        e = self.eigenvalues if f is None else f(self.eigenvalues)
        y = self.rotate(x)
        y = (y.reshape(-1, self.eigenvalues.numel()) * e.reshape(-1)).reshape(x.shape)
        return self.rotate(y, back=True)

    def trace(self) -> Tensor:
        """The sum of the eigenvalues."""
        return self.eigenvalues.sum()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Logarithm of the determinant of the matrix plus `damping` times the identity, which is positive definite."""
        damped = self.eigenvalues + damping
        if not (damped > 0).all():
            raise PackextError(f"logdet: the least eigenvalue is {float(damped.min()):.3g} with damping {damping:.3g}.")
        return damped.log().sum()


def check(right: bool, message: str) -> None:
    """Raise a ValueError with `message` unless `right`."""
    if not right:
        raise ValueError(message)
