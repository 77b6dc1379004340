"""A device that is not there: tensors say that they lie on it, and are computed with on the CPU.

What a GPU would refuse is refused: an operation on tensors of both devices (but for indices and numbers), and random
draws on it by a generator of the CPU. Autograd runs its passes on a thread of the device's own, as it does for CUDA.
A process that has imported this has the device until it ends, so tests run it in one of their own.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class _Module(backend_registration._DummyBackendModule):
    """What `torch.pretend` is."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


backend_registration._setup_privateuseone_for_python_backend("pretend", _Module())
DEVICE = torch.device("pretend", 0)

_aten = torch.ops.aten
#: Operations that take a tensor of the other device.
_BOTH = frozenset(
    [
        _aten._to_copy.default,
        _aten.copy_.default,
        _aten.index.Tensor,
        _aten.index_put.default,
        _aten.index_put_.default,
        _aten._index_put_impl_.default,
    ]
)


class Held(Tensor):
    """A tensor of the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Held:
        own = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        own.held = held
        return own

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()


class Device(TorchDispatchMode):
    """Within it, `device="pretend"` makes tensors of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


_generators: weakref.WeakSet[torch.Generator] = weakref.WeakSet()


class Generator(torch.Generator):
    """Of either device."""

    def __new__(cls, device: Any = "cpu") -> Any:
        own = super().__new__(cls)
        if torch.device(device).type == DEVICE.type:
            _generators.add(own)
        return own


torch.Generator = Generator  # type: ignore[misc]


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    ours = [t for t in leaves if isinstance(t, Held)]
    device = kwargs.get("device")
    there = bool(ours) if device is None else torch.device(device).type == DEVICE.type
    if func is _aten.copy_.default:
        there = isinstance(args[0], Held)
    if ours and func not in _BOTH and any(t.dim() for t in leaves if not isinstance(t, Held)):
        shapes = ", ".join(f"{type(t).__name__} {list(t.shape)}" for t in leaves)
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {shapes}")
    generator = kwargs.get("generator")
    if generator is not None and there is not (generator in _generators):
        raise RuntimeError(f"Expected a generator of the same device: {func}")
    args, kwargs = tree_map(lambda t: t.held if isinstance(t, Held) else t, (args, kwargs))
    if func is _aten.copy_.default and args[0].data_ptr() == args[1].data_ptr() and args[0].shape == args[1].shape:
        return leaves[0]  # of what torch.matmul(out=...) has written there already
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    out = func(*args, **kwargs)
    if not there:
        return out
    known = {id(t.held): t for t in ours}  # of what is changed in place

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Held(value)

    return tree_map(wrap, out)


# What torch makes of a list of numbers, where modes are not asked.
_library = torch.library.Library("aten", "IMPL")  # noqa: TOR901 - for as long as the process lives
_library.impl(
    "empty_strided",
    lambda size, stride, dtype=None, **_: Held(torch.empty_strided(size, stride, dtype=dtype)),
    "PrivateUse1",
)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    plain = [t.held if isinstance(t, Held) else t for t in (target, source)]
    plain[0].copy_(plain[1])
    return target


_library.impl("_copy_from", _copy_from, "PrivateUse1")
