"""Autocast, and arithmetic that it leaves alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_has_autocast = functools.cache(torch.amp.is_autocast_available)
_any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


def autocasts(device: str) -> bool:
    """Whether autocast is on for tensors of this type of device; some types, such as meta, have none."""
    return _any_autocast() and _has_autocast(device) and torch.is_autocast_enabled(device)


def computes_in(tensors: Collection[torch.Tensor]) -> torch.dtype | None:
    """What their product is computed in, after autocast; None where they are of several types, which torch refuses."""
    device, kinds = next(iter(tensors)).device.type, {t.dtype for t in tensors}
    if autocasts(device):  # which rounds neither integers nor float64
        to = torch.get_autocast_dtype(device)
        kinds = {to if kind.is_floating_point and kind is not torch.float64 else kind for kind in kinds}
    return kinds.pop() if len(kinds) == 1 else None


def unrounded(device: str) -> AbstractContextManager[Any]:
    """In here autocast rounds no tensor of this type of device."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def as_now(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Gives contexts in which autocast is as it is now, for tensors of this type of device."""
    if not autocasts(device):
        return nullcontext
    return functools.partial(torch.autocast, device, torch.get_autocast_dtype(device))
