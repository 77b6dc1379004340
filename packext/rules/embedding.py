"""Lookups: `F.embedding`, `F.embedding_bag`, and a parameter indexed by data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packext._factored import Factored, Lookup, accumulation_dtype
from packext._layout import Layout
from packext._use import Gradients, Layouts, Rule, Use
from packext.rules._common import bind, handles

if TYPE_CHECKING:
    from packext._lineage import Tracer


class Embedding(Rule):
    """Rows of a table; the gradient of `padding_idx` is zero, frequencies are those of the batch."""

    name = "lookup"
    leads = ("indices",)
    positionwise = True

    def spares(self, use: Use) -> tuple[str, ...]:
        return ("weight",)

    def factors(self, use: Use, t: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored] | None:
        g, layout = gs[0], layouts[0]
        assert g is not None and layout is not None
        lead = g.dim() - 1
        if not layout.fits(g, lead):
            return None
        index, table = t["indices"], t["weight"]
        if use.consts.get("scale_grad_by_freq"):
            count = torch.bincount(index.flatten(), minlength=table.shape[0])
            g = g / count[index][..., None]
        index = torch.where(index < 0, index + table.shape[0], index)
        padding = use.consts.get("padding_idx", -1)
        if padding is not None and padding >= 0:
            index = torch.where(index == padding, -1, index)
        one_hot = not use.consts.get("scale_grad_by_freq")
        ids, count = _ids(layout, index, index.dim()), layout.positions(g, lead)
        return {"weight": Lookup(ids, layout.split(g, lead), table.shape, one_hot, count)}


def _ids(layout: Layout, index: Tensor, lead: int) -> Tensor:
    """Indices `[N, S, ...]`, of which those that fill up are -1, as those without a gradient are."""
    ids, own = layout.split(index, lead), layout.own(index.shape[:lead])
    return ids if own is None else ids.where(own.reshape(*own.shape, *[1] * (ids.dim() - own.dim())), -1)


class Indexed(Embedding):
    """`weight[indices]` with indices computed from the data."""

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Tensor:
        return tensors["weight"][tensors["indices"]]


EMBEDDING, INDEXED = Embedding(), Indexed()


@handles(torch.embedding)
def embedding(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.embedding(weight, indices, padding_idx, scale_grad_by_freq, sparse)`."""
    names = ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")
    tensors, consts = bind(names, args, kwargs, padding_idx=-1, scale_grad_by_freq=False, sparse=False)
    if consts["sparse"]:
        raise tracer.refuse(func, "the gradient is sparse", "Build the embedding with sparse=False.")
    if not tracer.is_data(tensors["indices"]):
        return NotImplemented
    return tracer.observed(EMBEDDING, func, tensors, consts)


@handles(Tensor.__getitem__)
def indexed(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`weight[indices]`."""
    weight, index = args
    integers = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if not integers or weight.dim() != 2 or not tracer.is_data(index):
        return NotImplemented
    return tracer.observed(INDEXED, func, {"weight": weight, "indices": index}, {})


@handles(F.embedding, F.embedding_bag)
def renormalised(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """Refuse a table that is changed; else these functions come down to `torch.embedding` and `torch.embedding_bag`."""
    tensors, consts = bind(("input", "weight", "padding_idx or offsets", "max_norm"), args, kwargs, max_norm=None)
    if consts["max_norm"] is not None and tracer.sources(tensors["weight"]):
        raise tracer.refuse(
            func,
            "the table is renormalised in place while it is read (max_norm)",
            "Build the embedding without max_norm, and constrain the norm after the step.",
        )
    return NotImplemented


class Bag(Rule):
    """Sums or means over bags of rows."""

    name = "lookup of bags"

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Any:
        return use.func(**tensors, **use.consts["call"])

    def factors(self, use: Use, t: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored] | None:
        g, layout = gs[0], layouts[0]
        c = use.consts
        # With scale_grad_by_freq, torch divides by the frequencies of other rows than those looked up (2.13, CPU);
        # the generic rule gives the rows of the gradient that autograd really computes.
        simple = c["mode"] != 2 and not c["scale_grad_by_freq"] and set(use.sources) == {"weight"}
        if g is None or layout is None or not layout.fits(g, 1) or not simple:
            return None
        index, bags = t["indices"], g.shape[0]
        starts = t["offsets"][:bags]
        position = torch.arange(len(index), device=index.device)
        bag = torch.searchsorted(starts, position, right=True) - 1
        padding = c["padding_idx"]
        real = torch.ones_like(index, dtype=torch.bool) if padding < 0 else index != padding
        acc = accumulation_dtype(g.dtype)  # in which tokens can be counted
        scale = real.to(acc)
        if "per_sample_weights" in t:
            scale = scale * t["per_sample_weights"].to(acc)
        if c["mode"] == 1:
            sizes = torch.zeros(bags, dtype=acc, device=g.device).index_add(0, bag, real.to(acc))
            scale = scale / sizes.clamp(min=1)[bag]
        ends = torch.cat([starts[1:], starts.new_tensor([len(index)])])
        longest = int((ends - starts).max()) if bags else 0
        slot = position - starts[bag]
        ids = index.new_full((bags, longest), -1)
        ids[bag, slot] = torch.where(real, index, -1)
        weights = torch.zeros(bags, longest, dtype=acc, device=g.device).index_put((bag, slot), scale)
        rows = g[:, None, :] * weights[:, :, None]
        positions = (len(index) if padding < 0 else int(real.sum())) / layout.n
        ids, rows = _ids(layout, ids, 1).flatten(1, 2), layout.split(rows, 1).flatten(1, 2)
        # Each token is a position, as those of an embedding whose rows are summed up (or averaged) behind it.
        return {"weight": Lookup(ids, rows, t["weight"].shape, positions=positions)}


BAG = Bag()


@handles(torch.embedding_bag)
def embedding_bag(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.embedding_bag`, to which `F.embedding_bag` comes down."""
    names = (
        "weight", "indices", "offsets", "scale_grad_by_freq", "mode", "sparse",
        "per_sample_weights", "include_last_offset", "padding_idx",
    )  # fmt: skip
    tensors, consts = bind(
        names, args, kwargs, scale_grad_by_freq=False, mode=0, sparse=False,
        per_sample_weights=None, include_last_offset=False, padding_idx=None,
    )  # fmt: skip
    if consts["sparse"]:
        raise tracer.refuse(func, "the gradient is sparse", "Build the embedding with sparse=False.")
    size = tensors["weight"].shape[0]
    padding = consts["padding_idx"]
    consts["padding_idx"] = -1 if padding is None else padding % size
    if not tracer.is_data(tensors["indices"]):
        return NotImplemented
    return tracer.observed(BAG, func, tensors, {**consts, "call": consts | {"padding_idx": padding}})
