"""What nobody sees into: a torch.autograd.Function, a torch.func transform, `torch.cond`.

Of these, autograd keeps a graph. From the value that comes out, it is gone back once per sample, with the gradient of
that sample alone, as far as the parameters and the last tap before them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packext import _listening
from packext._errors import UnsupportedUseError
from packext._factored import Factored, Traced
from packext._use import Gradients, Layouts, Rule, Use


class Opaque(Rule):
    """`consts["edge"]` is where autograd's graph of the value begins. The tap keeps the parameters."""

    name = "opaque"
    conjugates = True

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Any:
        raise UnsupportedUseError(
            f"{use.describe()} cannot be run again, as packext does not see into it, and what was asked for needs "
            "that: leave these parameters out (parameters=...)."
        )

    def factors(self, use: Use, t: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored] | None:
        (g,), (layout,) = gs, layouts
        assert g is not None and layout is not None
        keep = torch.is_grad_enabled()

        def row(name: str, sample: int, times: float = 1.0) -> Tensor:
            with _listening.meanwhile(cut=use.record):
                found = torch.autograd.grad(
                    [use.consts["edge"]], [t[name]], [times * layout.only(g, sample)],
                    retain_graph=True, create_graph=keep, allow_unused=True,
                )[0]  # fmt: skip
            return torch.zeros_like(t[name]) if found is None else found

        sample = _listening.compared()
        if sample is not None and not all(_alike(-2 * row(k, sample), row(k, sample, -2.0)) for k in use.sources):
            raise UnsupportedUseError(
                f"{use.describe()}: what it gives back is not proportional to the gradient that arrives (it clips or "
                "normalises that, or adds something of its own), so that gradients of single samples do not add up to "
                "that of the batch. Leave these parameters out (parameters=...)."
            )
        return {k: Traced(layout.n, t[k], lambda i, k=k: row(k, i)) for k in use.sources}


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether these are equal but for rounding; what is not finite tells nothing."""
    allowed = torch.finfo(a.dtype).eps ** 0.5 * a.abs().nan_to_num(0.0, 0.0, 0.0).max() if a.numel() else 0.0
    return not bool(((a - b).abs() > allowed).any())


OPAQUE = Opaque()


def named(node: str) -> Callable[..., Any]:
    """What stands for the function that left an autograd node of this name."""

    def unseen() -> None:
        raise AssertionError("nobody saw what it was given")

    unseen.__name__ = node.rpartition("::")[2].removesuffix("Backward")
    return unseen
