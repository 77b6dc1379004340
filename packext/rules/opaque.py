"""What nobody sees into: a torch.autograd.Function, TorchScript, a torch.func transform, `torch.cond`.

Of these, autograd keeps a graph. From the value that comes out, it is gone back once per sample, with the gradient of
that sample alone, as far as the parameters and the last tap before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from packext import _flight
from packext._errors import UnsupportedUseError
from packext._factored import Factored, Traced
from packext._layout import Layout
from packext._use import Rule, Use


class Opaque(Rule):
    """`consts["edge"]` is where autograd's graph of the value begins. The tap keeps the parameters."""

    name = "opaque"
    conjugates = True

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Any:
        raise UnsupportedUseError(
            f"{use.describe()} cannot be run again, as packext does not see into it, and what was asked for needs "
            "that: leave these parameters out (parameters=...)."
        )

    def factors(
        self,
        use: Use,
        t: dict[str, Tensor],
        gs: Sequence[Tensor | None],
        layouts: Sequence[Layout | None],
    ) -> dict[str, Factored] | None:
        (g,), (layout,) = gs, layouts
        assert g is not None and layout is not None
        keep = torch.is_grad_enabled()

        def row(name: str, sample: int) -> Tensor:
            with _flight.cutting(use.record):
                found = torch.autograd.grad(
                    [use.consts["edge"]], [t[name]], [layout.only(g, sample)],
                    retain_graph=True, create_graph=keep, allow_unused=True,
                )[0]  # fmt: skip
            return torch.zeros_like(t[name]) if found is None else found

        return {k: Traced(layout.n, t[k], lambda i, k=k: row(k, i)) for k in use.sources}


OPAQUE = Opaque()


def named(node: str) -> Callable[..., Any]:
    """What stands for the function that left an autograd node of this name."""

    def unseen() -> None:
        raise AssertionError("nobody saw what it was given")

    unseen.__name__ = node.rpartition("::")[2].removesuffix("Backward")
    return unseen
