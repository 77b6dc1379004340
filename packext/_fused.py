"""Statistics of `g aᵀ` by one fused kernel: which forms it takes, and where it is used (where it is the faster way)."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from packext._factored import Outer, Patches

#: What the kernel answers; inner products with the sum, which it finds, are the convolution with that.
ANSWERS = frozenset(["sq_norms", "total", "second_moment", "scatter", "dots"])

#: Types of factors that it takes; in float64, tensor cores have no part.
TYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Programs that are worth having before samples are not shared out among more of them, by multiprocessor.
BUSY = 4

#: Whether the kernel was right and faster when a case came for the first time.
_WINS: dict[tuple, bool] = {}


def takes(form: Any, wants: Sequence[str]) -> bool:
    """Whether the kernel answers `wants` of a form, on any device."""
    if not isinstance(form, Outer) or form.s == 1 or not wants or not ANSWERS.issuperset(wants) or not form.numel:
        return False
    source = form.a.source if isinstance(form.a, Patches) else form.a
    if source.dtype != form.g.dtype or source.dtype not in TYPES or not form.n:
        return False
    if isinstance(form.a, Patches):  # of images that are samples
        window = form.a.window
        return window is not None and len(window.kernel) < 3 and len(source) == form.n
    return True


def answers(form: Any, wants: Sequence[str], plain: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor] | None:
    """Statistics by the kernel, on CUDA and where it wins.

    The first time that a case (shapes, types, device, `wants`) comes, both ways are gone and timed, for which the host
    waits; from then on the faster one is taken without waiting. A kernel whose numbers are not the plain
    route's is never taken.

    Args:
        form: the individual gradients.
        wants: what `Statistics` is asked for.
        plain: gives them by the plain routes.

    Returns:
        They by name; None where the plain routes are to be gone.
    """
    if form.device.type != "cuda" or torch.is_grad_enabled() or not takes(form, wants) or not _installed():
        return None
    case = _case(form, wants)
    if case not in _WINS:
        if torch.cuda.is_current_stream_capturing():
            return None  # a graph is being captured, in which nobody can wait
        _WINS[case] = _race(lambda: moments(form, wants), plain)
    return moments(form, wants) if _WINS[case] else None


def moments(form: Outer, wants: Sequence[str]) -> dict[str, Tensor]:
    """What the kernel finds.

    Args:
        form: individual gradients `g aᵀ` of a linear map or convolution that `takes` agrees to.
        wants: of "sq_norms" and "dots" (`[N]`), "total", "second_moment" and "scatter" (`[*shape]`), as `Statistics`
            has them.

    Returns:
        Float32 tensors by name.
    """
    from packext import _kernel  # imports Triton

    summed = "total" in wants or "dots" in wants
    x, geometry = _image(form)
    g, (n, groups, o, i) = form.g, (form.n, form.groups, form.o, form.i)
    block_o, block_i = _block(o), _block(i)
    blocks = -(-o // block_o) * -(-i // block_i)
    per_part = _per_part(n, blocks * groups, g.device)
    parts = -(-n // per_part)

    def space(wanted: bool, *shape: int) -> Tensor:
        return torch.empty(shape if wanted else (1,), dtype=torch.float32, device=g.device)

    norms = space("sq_norms" in wants, n, groups * blocks)
    total, squares, mean, spread = (
        space(wanted, parts, groups, o, i)
        for wanted in (summed, "second_moment" in wants, "scatter" in wants, "scatter" in wants)
    )
    launch: Any = _kernel.moments
    with torch.cuda.device_of(g):  # Triton launches on the current one
        launch[blocks, groups, parts](
            x,
            g,
            norms,
            total,
            squares,
            mean,
            spread,
            n,
            per_part,
            o,
            i,
            form.s,
            geometry["out"][1],
            *x.shape[2:],
            x.shape[1] // groups,
            *x.stride(),
            *g.stride(),
            *geometry["stride"],
            *geometry["padding"],
            *geometry["dilation"],
            *geometry["kernel"],
            block_o,
            block_i,
            32,
            "sq_norms" in wants,
            summed,
            "second_moment" in wants,
            "scatter" in wants,
            _precision(),
            num_warps=8 if block_o * block_i > 2048 else 4,
        )
    found: dict[str, Tensor] = {}
    if "sq_norms" in wants:
        found["sq_norms"] = norms.sum(1)
    if summed:
        found["total"] = total.sum(0).reshape(form.shape)
    if "second_moment" in wants:
        found["second_moment"] = squares.sum(0).reshape(form.shape)
    if "scatter" in wants:  # of parts about their own means, and of these means (Chan, Golub and LeVeque 1983)
        count = torch.full((parts, 1, 1, 1), per_part, dtype=torch.float32, device=g.device)
        count[-1] = n - (parts - 1) * per_part
        apart = mean - (count * mean).sum(0) / n
        found["scatter"] = (spread + count * apart.square()).sum(0).reshape(form.shape)
    if "dots" in wants:
        dots = form.dots(found["total"])
        assert dots is not None  # of convolutions and linear maps
        found["dots"] = dots
    return found


def _image(form: Outer) -> tuple[Tensor, dict[str, list[int]]]:
    """What multiplied the weight as images `[N, C, height, width]`, and how the weight moves over them."""
    if isinstance(form.a, Patches):
        window, x = form.a.window, form.a.source
        assert window is not None
        geometry = {name: list(getattr(window, name)) for name in ("kernel", "stride", "padding", "dilation", "out")}
        if x.dim() == 4:
            return x, geometry
        neutral = {"kernel": 1, "stride": 1, "padding": 0, "dilation": 1, "out": 1}
        return x[:, :, None], {name: [neutral[name], *sizes] for name, sizes in geometry.items()}
    n, groups, s, i = form.a.shape
    column = form.a.transpose(2, 3).reshape(n, groups * i, s, 1) if groups > 1 else form.a[:, 0].mT[..., None]
    return column, {"kernel": [1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "out": [s, 1]}


def _block(size: int) -> int:
    """Entries of a block's side: a power of two, and no fewer than a tensor core takes."""
    return min(64, max(16, 1 << (size - 1).bit_length()))


def _per_part(n: int, programs: int, device: torch.device) -> int:
    """How many samples one program takes."""
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(1, n * programs // max(n, BUSY * count)) if programs < BUSY * count else n


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _case(form: Outer, wants: Sequence[str]) -> tuple:
    x, geometry = _image(form)
    sizes = tuple((name, *values) for name, values in geometry.items())
    layout = (x.shape, x.stride(), form.g.shape, form.g.stride(), x.dtype, x.device)
    return (*layout, sizes, tuple(sorted(wants)), _precision())


def _race(kernel: Callable[[], dict[str, Tensor]], plain: Callable[[], dict[str, Tensor]]) -> bool:
    """Whether the kernel gives what the plain routes give, and sooner."""
    theirs = plain()
    try:  # Triton wants a compiler, a device that it knows, and memory for its measurements
        from triton import testing

        bench: Any = testing.do_bench
        mine = kernel()
        for want, value in theirs.items():
            size = float(torch.nan_to_num(value).abs().max())
            if not torch.allclose(mine[want], value, rtol=1e-2, atol=1e-2 * size, equal_nan=True):
                return False
        mine, theirs = (bench(way, warmup=2, rep=10, return_mode="median") for way in (kernel, plain))
    except Exception:
        return False
    return bool(mine < theirs)
