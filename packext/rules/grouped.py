"""Products of groups of rows with a matrix each, as the experts of a mixture have them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packext._factored import Factored, Outer
from packext._layout import gathered
from packext._use import Gradients, Layouts, Rule, Use
from packext.rules._common import bind, handles

if TYPE_CHECKING:
    from packext._lineage import Tracer

_NAMES = ("input", "weight", "offs", "bias", "out_dtype")


class Grouped(Rule):
    """`y[r] = x[r] weight[e]`, with x `[R, I]`, weight `[E, I, O]`, and rows `offs[e - 1]` to `offs[e]` of expert e."""

    name = "grouped"

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Tensor:
        return use.func(tensors["input"], tensors["weight"], offs=tensors["offs"], **use.consts)

    def factors(self, use: Use, t: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored] | None:
        (g,), (layout,) = gs, layouts
        assert g is not None and layout is not None
        x, (experts, features, outputs) = t["input"], t["weight"].shape
        if layout.axis not in (None, 0):
            return None
        n, count = layout.n, len(x)
        owner = layout.spread(torch.arange(n, device=g.device), g).flatten().expand(count)
        expert = torch.searchsorted(t["offs"], torch.arange(count, device=g.device, dtype=t["offs"].dtype), right=True)
        known = expert < experts  # rows behind the last expert belong to none
        together = gathered((owner * experts + expert)[known], n * experts)
        b, a = (together(rows[known]).unflatten(0, (n, experts)) for rows in (g, x))
        positions = expert[known].bincount(minlength=experts) / n  # of each expert
        return {"weight": Outer(b, a.mT, (experts, features, outputs), stored="IO", positions=positions)}


GROUPED = Grouped()


@handles(getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
def grouped(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`F.grouped_mm(input, weight, offs=offs)` of a matrix of rows; other forms go the generic way."""
    tensors, consts = bind(_NAMES, args, kwargs)
    if set(tensors) != {"input", "weight", "offs"} or tensors["input"].dim() != 2 or tensors["weight"].dim() != 3:
        return NotImplemented
    if tracer.sources(tensors["input"]) or not tracer.sources(tensors["weight"]):
        return NotImplemented
    return tracer.observed(GROUPED, func, tensors, {k: v for k, v in consts.items() if v is not None})
