"""The definition of each quantity of curvature, from dense rows and matrices, and what of a result they determine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packext._quantity import Quantity, Sampled
from packext.linalg import Joint, KronEigh
from packext.quantities import (
    EKFAC,
    GGNMP,
    HMP,
    KFAC,
    KFLR,
    KFRA,
    PCHMP,
    BatchDiagGGNExact,
    BatchDiagGGNMC,
    BatchDiagHessian,
    DiagEF,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    DiagHessianMC,
    GGNGram,
    HessianTrace,
    SqrtGGNExact,
    SqrtGGNMC,
    TopEigenvalues,
)
from packext.testing._kronecker import VECTORS, nearest, outputs_of_square
from packext.testing._reference import NoOracle, Reference
from packext.testing._samples import Rows

#: Random vectors for which products with a matrix are compared.
PRODUCTS = 3


class Definition(NamedTuple):
    """How a result is read, and what it should be.

    Attributes:
        read: `(quantity, reference, results, name)`, with the results of all parameters by name: tensors that the
            definition determines. A root, which is one of many, is read as products of its square with vectors.
        wanted: `(quantity, reference, name)`: the same tensors by the definition.
    """

    read: Callable[[Any, Reference, dict[str, Any], str], list[Tensor]]
    wanted: Callable[[Any, Reference, str], list[Tensor]]


def drawn(quantity: Quantity) -> bool:
    """Whether the result is random, and its mean is what is defined."""
    return isinstance(quantity, Sampled) and getattr(quantity, "fisher", "mc") == "mc"


def _same(q: Any, ref: Reference, results: dict[str, Any], name: str) -> list[Tensor]:
    return [results[name]]


def _value(q: Any, ref: Reference, results: dict[str, Any], name: str) -> list[Tensor]:
    return [results[name].value]


# -- roots ---------------------------------------------------------------------------------------------------


def _outer(roots: Rows, ref: Reference, name: str) -> list[Tensor]:
    """Of roots `[V, N, *p]`: each sample's GGN times random vectors, rows of one parameter `[N, p, PRODUCTS]`."""
    own = roots[name].reshape(*roots[name].shape[:2], -1)
    numbers, along = torch.Generator().manual_seed(20251121), own.new_zeros(*own.shape[:2], PRODUCTS)
    for k, p in ref.parameters.items():
        vectors = torch.randn(p.numel(), PRODUCTS, generator=numbers).to(own)
        if k in roots:
            along += roots[k].reshape(*own.shape[:2], -1) @ vectors
    return [torch.einsum("vnp,vnr->npr", own, along)]


def _root(q: Any, ref: Reference, name: str) -> list[Tensor]:
    kept = slice(None) if q.subsampling is None else q.subsampling
    return _outer({k: r[:, kept] for k, r in ref.roots.items()}, ref, name)


def _invariants(grams: Rows, ref: Reference, name: str) -> list[Tensor]:
    """Of Gram matrices `[V, N, V, N]` what is the same for all roots: eigenvalues, and products of pairs' blocks."""
    # Roots of other numbers of columns differ by zeros. The block of a pair of samples is multiplied with that of the
    # whole model, entry by entry, and summed up.
    own, whole = grams[name], torch.stack(list(grams.values())).sum(0)
    values = torch.linalg.eigvalsh(own.flatten(2).flatten(0, 1)).flip(0)
    padded = torch.cat([values, values.new_zeros(ref.n * ref.outputs)])[: ref.n * ref.outputs]
    return [padded, torch.einsum("vnwm,vnwm->nm", own, whole)]


def _gram(q: Any, ref: Reference, name: str) -> list[Tensor]:
    ref.limit((ref.n * ref.outputs) ** 2, "the Gram matrix of a root's columns")
    grams = {}
    for k, rows in ref.roots.items():
        flat = rows.reshape(rows.shape[0] * rows.shape[1], -1)
        grams[k] = (flat @ flat.T).reshape(*rows.shape[:2], *rows.shape[:2])
    return _invariants(grams, ref, name)


# -- products with blocks --------------------------------------------------------------------------------------


def _vectors(ref: Reference, name: str) -> Tensor:
    p = ref.parameters[name]
    return torch.randn(PRODUCTS, *p.shape, generator=torch.Generator().manual_seed(20251121)).to(p)


def _product(q: Any, ref: Reference, results: dict[str, Any], name: str) -> list[Tensor]:
    return [results[name](_vectors(ref, name)).reshape(PRODUCTS, -1)]


def _hessian_product(q: Any, ref: Reference, name: str) -> list[Tensor]:
    return [_vectors(ref, name).reshape(PRODUCTS, -1) @ ref.hessian_block(name)]


def _ggn_product(q: Any, ref: Reference, name: str) -> list[Tensor]:
    root = ref.ggn_root[name].reshape(len(ref.ggn_root[name]), -1)
    return [_vectors(ref, name).reshape(PRODUCTS, -1) @ root.T @ root]


def _positive_product(q: Any, ref: Reference, name: str) -> list[Tensor]:
    path, _, own = name.rpartition(".")
    block = ref.layers.positive(path, own, torch.abs if q.modify == "abs" else lambda r: r.clamp(min=0))
    return [_vectors(ref, name).reshape(PRODUCTS, -1) @ block]


# -- eigenvalues -----------------------------------------------------------------------------------------------


def _matrix(q: Any, ref: Reference) -> Tensor:
    if q.curvature == "hessian":
        return ref.hessian
    ref.limit(ref.entries**2, "the GGN")
    root = torch.cat([r.reshape(len(r), -1) for r in ref.ggn_root.values()], 1)
    return root.T @ root


def _eigen(q: Any, ref: Reference, results: dict[str, Any], name: str) -> list[Tensor]:
    """Inner products of the vectors, and 1 more than three errors relative to the norm of the matrix.

    Those of values as Rayleigh quotients of the vectors, of residuals, and of values as the matrix's own, beyond what
    the residuals allow.

    Returns:
        These four.
    """
    matrix, found = _matrix(q, ref), results[name]
    values = torch.linalg.eigvalsh(matrix)
    order = {"LA": -values, "SA": values, "LM": -values.abs()}[q.which].argsort()[: q.k]
    size = values.abs().max().clamp(min=1e-300)
    parts = {k: found.vectors for k, found in results.items()}  # of those that the loss reaches
    zeros = matrix.new_zeros(q.k, 1)
    v = [parts[k].reshape(q.k, -1) if k in parts else zeros.expand(-1, p.numel()) for k, p in ref.parameters.items()]
    v = torch.cat(v, 1).to(matrix)
    image = v @ matrix
    quotients = (image * v).sum(1)
    residuals = (image - found.values[:, None] * v).norm(dim=1)
    beyond = ((found.values - values[order]).abs() - found.residuals).clamp(min=0)
    errors = (found.values - quotients, found.residuals - residuals, beyond)
    return [v @ v.T, *(1 + error / size for error in errors)]


def _eigen_wanted(q: Any, ref: Reference, name: str) -> list[Tensor]:
    one = torch.full((q.k,), float(name in ref.plain), dtype=torch.float64)  # of what is not reached there is nothing
    return [one.diag(), one, one, one]


# -- Kronecker factors -----------------------------------------------------------------------------------------


def _factors(q: Any, ref: Reference, results: dict[str, Any], name: str) -> list[Tensor]:
    """With an axis of groups; the axis of the inputs for a bias that is part of its weight's block."""
    found = results[name]
    if isinstance(found, Joint):
        return [torch.tensor(float(found.axis)).double()]
    table = any(t.dim() == 1 for t in found)
    return list(found) if table else [t if t.dim() == 3 else t[None] for t in found]


def _kronecker(q: Any, ref: Reference, name: str) -> list[Tensor]:
    fisher = "empirical" if getattr(q, "fisher", "exact") == "empirical" else "exact"
    factors = ref.factors(fisher)
    weights = {id(m): k for k, modules in factors.modules.items() for m in modules}
    alone = {k for k in ref.parameters if isinstance(_module(ref, k), VECTORS) or k in ref.entrywise}
    unknown = [k for k in ref.parameters if k not in alone and id(_module(ref, k)) not in weights]
    if unknown:
        raise NoOracle(
            f"check has no definition of {type(q).__name__} for {', '.join(unknown)}: factors are defined for linear "
            "layers, convolutions and embeddings of torch.nn whose parameters are used in calls of such alone, at as "
            "many positions in each sample, for normalisations, and for what is added to data or multiplied with it as "
            "a whole. Choose the others: parameters=[...]."
        )
    p, module = ref.parameters[name], _module(ref, name)
    if name in alone:
        return _entrywise((ref.roots if fisher == "exact" else ref.empirical)[name].flatten(0, -1 - p.dim()), p)
    weight, approx, own = weights[id(module)], getattr(q, "approx", "expand"), getattr(module, "bias", None)
    joint = getattr(q, "bias", "") == "joint" and own is not None and own.requires_grad and module.weight.requires_grad
    joint = joint and all(getattr(m, "bias", None) is own for m in factors.modules[weight])
    if p is own and joint:  # the inputs of its weight are axis 1, if the loss reaches it
        return [torch.tensor(float(name in ref.plain)).double()]
    if p is own:
        return [factors.outputs(weight, approx, whole=True, kind=module)]
    products = {}
    for kind in factors.kinds(weight):
        sides = factors.outputs(weight, approx, kind=kind), factors.inputs(weight, approx, joint, kind)
        products[kind] = sides if kind == "OI" else sides[::-1]
    if len(products) > 1:
        ref.limit(p.numel() ** 2, "a sum of Kronecker products")
        return [t[None] for t in nearest([(one[0], other[0]) for one, other in products.values()])]
    ((kind, (left, right)),) = products.items()
    return [left, right] if kind == "OI" else [left[0].diagonal(), right[0]]


def _entrywise(rows: Tensor, p: Tensor) -> list[Tensor]:
    """Of a vector its own block; of a tensor of several axes, those of a table all of whose rows are read."""
    long = [size for size in p.shape if size != 1]
    if len(long) < 2:
        flat = rows.reshape(len(rows), p.numel())
        return [(flat.T @ flat)[None]]
    count = p.numel() // long[-1]
    b = rows.reshape(len(rows), count, long[-1])
    return [b.new_full((count,), 1 / count), torch.einsum("kse,ksf->ef", b, b)]


def _averaged(q: Any, ref: Reference, name: str) -> list[Tensor]:
    path, _, own = name.rpartition(".")
    module, square = ref.layers.modules[path], ref.layers.averaged[path]
    x = ref.layers.inputs[0][list(ref.layers.modules).index(path)]
    if own == "bias":
        return [outputs_of_square(module, x, square, whole=True)]
    return [outputs_of_square(module, x, square), ref.factors("exact").inputs(name, "expand", False)]


# -- their eigenvectors ------------------------------------------------------------------------------------------


def _times(factors: Sequence[Tensor], x: Tensor, back: bool = False) -> Tensor:
    """The Kronecker product of one or two factors `[n]`, `[n, n]` or `[G, n, n]`, transposed if `back`, times rows."""
    matrices = [t.double().diag()[None] if t.dim() == 1 else t.double().reshape(-1, *t.shape[-2:]) for t in factors]
    matrices, x = [m.mT for m in matrices] if back else matrices, x.to(matrices[0])
    y = matrices[0] @ x.reshape(len(x), max(map(len, matrices)), matrices[0].shape[-1], -1)
    return (y if len(matrices) == 1 else y @ matrices[1].mT).reshape(x.shape)


def _some(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(20251121)
    return torch.randn(PRODUCTS, size, generator=generator, dtype=torch.float64)


def _decomposed(q: Any, ref: Reference, results: dict[str, Any], name: str) -> list[Tensor]:
    """Without a basis, products with the matrix and with its eigenvectors' square; with one, both of them."""
    found = results[name]
    if isinstance(found, Joint):
        return [torch.tensor(float(found.axis)).double()]
    values = found.eigenvalues.double().flatten()
    turned = _times(found.vectors, _some(len(values)), back=True)
    if q.basis is not None:
        return [values, turned]
    return [_times(found.vectors, turned * values), _times(found.vectors, turned)]


def _corrected(q: Any, ref: Reference, name: str) -> list[Tensor]:
    given = None if q.basis is None else q.basis.get(name)
    if not isinstance(given, KronEigh):
        factors = _kronecker(q, ref, name)
        if factors[0].dim() == 0:  # of a bias that has one block with its weight
            return factors
        some = _some(math.prod(t.shape[-1] for t in factors) * max(len(t) if t.dim() == 3 else 1 for t in factors))
        return [_times(factors, some), some]
    all_rows = ref.empirical if q.fisher == "empirical" else ref.roots
    p, entries = ref.parameters[name], given.eigenvalues.numel()
    rows = all_rows[name].reshape(-1, *p.shape)
    if entries > p.numel():  # with the bias as an input more
        bias = all_rows[f"{name.rpartition('.')[0]}.bias"]
        rows = torch.cat([rows.flatten(2), bias.reshape(len(rows), -1, 1)], 2)
    return [
        _times(given.vectors, rows.reshape(len(rows), -1), back=True).square().sum(0),
        _times(given.vectors, _some(entries), back=True),
    ]


def _module(ref: Reference, name: str) -> Any:
    return ref.model.get_submodule(name.rpartition(".")[0])


#: The definition of each quantity of curvature.
CURVATURE_ORACLES: dict[type[Quantity], Definition] = {
    DiagGGNExact: Definition(_same, lambda q, ref, k: [ref.roots[k].square().sum((0, 1))]),
    DiagGGNMC: Definition(_same, lambda q, ref, k: [ref.roots[k].square().sum((0, 1))]),
    BatchDiagGGNExact: Definition(_same, lambda q, ref, k: [ref.roots[k].square().sum(0)]),
    BatchDiagGGNMC: Definition(_same, lambda q, ref, k: [ref.roots[k].square().sum(0)]),
    SqrtGGNExact: Definition(lambda q, ref, results, k: _outer(results, ref, k), _root),
    SqrtGGNMC: Definition(lambda q, ref, results, k: _outer(results, ref, k), _root),
    GGNGram: Definition(lambda q, ref, results, k: _invariants(results, ref, k), _gram),
    DiagEF: Definition(_same, lambda q, ref, k: [ref.empirical[k].square().sum(0)]),
    KFLR: Definition(_factors, _kronecker),
    KFAC: Definition(_factors, _kronecker),
    KFRA: Definition(_factors, _averaged),
    EKFAC: Definition(_decomposed, _corrected),
    DiagHessian: Definition(_same, lambda q, ref, k: [ref.hessian_diagonals[k].sum(0)]),
    BatchDiagHessian: Definition(_same, lambda q, ref, k: [ref.hessian_diagonals[k]]),
    DiagHessianMC: Definition(
        _value, lambda q, ref, k: [ref.hessian_block(k).diagonal().view(ref.parameters[k].shape)]
    ),
    HessianTrace: Definition(_value, lambda q, ref, k: [ref.hessian_block(k).trace()]),
    HMP: Definition(_product, _hessian_product),
    GGNMP: Definition(_product, _ggn_product),
    PCHMP: Definition(_product, _positive_product),
    TopEigenvalues: Definition(_eigen, _eigen_wanted),
}


def exact_curvature() -> tuple[Quantity, ...]:
    """One of each quantity of curvature that has a definition and draws nothing, but for those of chains of layers."""
    return (
        DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact(), GGNGram(), DiagEF(), KFAC(fisher="exact"), KFLR(),
        EKFAC(fisher="exact"), DiagHessian(), BatchDiagHessian(), HMP(), GGNMP(), TopEigenvalues(),
    )  # fmt: skip
