"""How near what an inversion found is to what was there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def nearest_tokens(vectors: Tensor, table: Tensor) -> Tensor:
    """Tokens whose embeddings lie nearest, by the cosine.

    Args:
        vectors: `[..., D]`.
        table: of embeddings `[V, D]`.

    Returns:
        Tokens `[...]`, int64.
    """
    return (F.normalize(vectors, dim=-1) @ F.normalize(table.to(vectors), dim=-1).T).argmax(-1)


def psnr(found: Tensor, true: Tensor, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each sample, in dB.

    Args:
        found: `[N, ...]`.
        true: `[N, ...]`, or `[1, ...]`: one for all.
        peak: range of the values.

    Returns:
        `[N]`.

    Raises:
        ValueError: if they are of other shapes.
    """
    if found.shape[1:] != true.shape[1:] or len(true) not in (1, len(found)):
        raise ValueError(f"psnr() compares samples one to one, got {list(found.shape)} and {list(true.shape)}.")
    return 10 * (peak**2 / (found - true).square()[..., None].flatten(1).mean(1).clamp_min(1e-30)).log10()


def in_order(found: Tensor, true: Tensor) -> Tensor:
    """Which found sample belongs to which true one, by the least sum of squared errors.

    Args:
        found: `[N, ...]`, in any order.
        true: `[N, ...]`.

    Returns:
        Indices into `found` `[N]`.

    Raises:
        ValueError: if their shapes differ.
        ImportError: if SciPy is not installed, for more than one sample.
    """
    if found.shape != true.shape:
        raise ValueError(f"in_order() compares samples one to one, got {list(found.shape)} and {list(true.shape)}.")
    if len(true) == 1:
        return torch.zeros(1, dtype=torch.int64)
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ImportError("in_order() needs SciPy: pip install 'packext[attacks]'.") from None
    first, second = (t[..., None].flatten(1).double() for t in (true, found))
    cost = torch.cdist(first, second).square()
    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])
