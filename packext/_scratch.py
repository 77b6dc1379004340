"""Memory for tiles, used again and again."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

#: Entries of a tile of rows: large enough that a call costs more than its dispatch, small beside the caches and
#: activations.
TILE = 1 << 19


class _Scratch(threading.local):
    def __init__(self) -> None:
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}


_SCRATCH = _Scratch()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a tile, the same at every call with this name: on the CPU, fresh pages cost more than the arithmetic.

    Whoever asks is done with what it got before it, or anything that it calls, asks again. At most `4 * TILE`
    entries are kept for a name, dtype and thread.

    Args:
        name: of the purpose.
        shape: of the result.
        dtype: of the result.
        device: of the result; accelerators have allocators that keep their memory.

    Returns:
        A contiguous tensor with arbitrary entries.
    """
    size = math.prod(shape)
    if device.type != "cpu" or size > 4 * TILE or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return torch.empty(shape, dtype=dtype, device=device)
    held = _SCRATCH.held.get((name, dtype))
    if held is None or held.numel() < size:
        held = _SCRATCH.held[name, dtype] = torch.empty(size, dtype=dtype)
    return held[:size].view(shape)


def release() -> None:
    """Give memory back when a parameter is done: the peak of a backward pass is elsewhere."""
    _SCRATCH.held.clear()
