"""Closed forms: what can be read off a gradient without a search. To be tried first, and exact where they hold."""

from __future__ import annotations

import torch
from torch import Tensor

import packext as px
from packext.attacks._shared import Shared


def fully_connected_input(shared: Shared, layer: str) -> Tensor:
    """The input of a fully connected layer with bias, of one sample.

    The row with the largest `|db|` is taken.

    - Formula: `dW_r / db_r`, of any row r of the weight's gradient with `db_r` not 0
    - Cost: none beside the gradient that was shared
    - Source: Geiping et al., NeurIPS 2020, Proposition 3.1
    - Refused: several samples or positions, for which rows disagree; a bias gradient of zero

    Args:
        shared: of one sample, without positions.
        layer: the layer's name; "" if the model is the layer.

    Returns:
        `[I]`, up to rounding.

    Raises:
        PackextError: if the gradient of weight and bias was not shared, is zero, or is of several samples or positions:
            then rows disagree.
    """
    # A model that is a layer itself has no name.
    weight, bias = (_gradient(shared, f"{layer}.{part}".removeprefix(".")) for part in ("weight", "bias"))
    row = bias.abs().argmax()
    if not bias[row]:
        raise px.PackextError(f"The bias gradient of {layer!r} is zero: its input cannot be read off.")
    found = weight[row] / bias[row]
    error = (weight - torch.outer(bias, found)).norm() / weight.norm().clamp_min(1e-300)
    # Of one sample the error is what a short format leaves. Of several that are alike it is small as well: an average.
    if error > (1e-2 if shared.n == 1 else 1e-5):
        raise px.PackextError(
            f"The gradient of {layer!r} {list(weight.shape)} is not of one input (rank one to {float(error):.1e}): "
            f"it is a sum over samples or positions; the batch had {shared.n} sample(s)."
        )
    return found


def tokens_present(shared: Shared, embedding: str) -> Tensor:
    """Tokens that occurred: rows of an embedding's gradient that are not zero.

    - Formula: all v for which `dE_v` is not 0
    - Cost: none beside the gradient that was shared
    - Source: Melis et al., S&P 2019
    - Refused: a gradient in all rows: all tokens occurred, or the embedding is used for more than looking them up

    Args:
        shared: by a client.
        embedding: name of the embedding's parameter `[V, D]`, not tied to an output layer.

    Returns:
        Tokens, ascending, int64. Without order and number.

    Raises:
        PackextError: if the gradient was not shared or is no matrix, or no row is zero.
    """
    rows = _matrix(shared, embedding).any(1)
    if bool(rows.all()):
        raise px.PackextError(
            f"All {len(rows)} rows of {embedding!r} have a gradient: all tokens occurred, or it is used for more than "
            "looking them up."
        )
    return rows.nonzero()[:, 0]


def rank(shared: Shared, weight: str, tolerance: float = 1e-5) -> int:
    """Rank of a weight's gradient: no more than the number of inputs (samples times positions) that made it.

    - Formula: how many singular values are above `tolerance` times the largest
    - Cost: singular values of the gradient
    - Source: the definition; used by Petrov et al., NeurIPS 2024, DAGER
    - Refused: a parameter that is no matrix; entries that are not finite

    Args:
        shared: by a client.
        weight: name of a parameter with two axes.
        tolerance: singular values below it, relative to the largest, count as zero.

    Returns:
        The rank. Below both dimensions, the inputs' span is what `spanned` tells.
    """
    s = torch.linalg.svdvals(_matrix(shared, weight))
    return int((s > tolerance * s[0]).sum())


def spanned(shared: Shared, weight: str, candidates: Tensor, tolerance: float = 1e-5) -> Tensor:
    """How far candidates lie outside of the span of a layer's inputs: 0 for what may have been an input.

    Where the inputs of a layer (samples times positions) are fewer than its features, its gradient's rows lie in
    their span, and fill it unless what follows the layer sees less of them. For token embeddings this finds the
    tokens, in batches too.

    - Formula: `|c - V Vᵀ c| / |c|` of a candidate c, with V an orthonormal basis of the gradient's rows
    - Cost: a singular value decomposition of the gradient, and two products with the candidates
    - Source: Petrov et al., NeurIPS 2024, DAGER
    - Refused: a gradient of zero, or of full rank, in whose span is everything

    Args:
        shared: by a client.
        weight: name of a parameter `[O, I]`.
        candidates: possible inputs of the layer `[..., I]`.
        tolerance: of the rank.

    Returns:
        Distances from the span relative to the candidates' norms `[...]`, between 0 and 1.

    Raises:
        PackextError: if the gradient was not shared, or has full rank, so that everything is in its span.
    """
    g = _matrix(shared, weight)
    _, s, rows = torch.linalg.svd(g, full_matrices=False)
    r = int((s > tolerance * s[0]).sum())
    if r in (0, g.shape[1], *([g.shape[0]] if g.shape[0] < g.shape[1] else [])):
        raise px.PackextError(
            f"The gradient of {weight!r} {list(g.shape)} has rank {r}: "
            + ("it is zero." if not r else "there were as many inputs as it can tell, or more; the span says nothing.")
        )
    c = candidates.to(g)
    outside = c - (c @ rows[:r].T) @ rows[:r]
    return outside.norm(dim=-1) / c.norm(dim=-1).clamp_min(1e-300)


def _gradient(shared: Shared, name: str) -> Tensor:
    if name not in shared.gradient:
        raise px.PackextError(f"{name!r} is not in what was shared: {', '.join(shared.gradient) or 'nothing'}.")
    g = shared.gradient[name].double()
    if not g.isfinite().all():
        raise px.PackextError(f"The shared gradient of {name!r} has entries that are not finite.")
    return g


def _matrix(shared: Shared, name: str) -> Tensor:
    g = _gradient(shared, name)
    if g.dim() != 2:
        raise px.PackextError(f"{name!r} has shape {list(g.shape)}; it must be a matrix.")
    return g
