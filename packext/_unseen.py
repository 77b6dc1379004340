"""What no handler sees: torch.autograd.Functions, torch.func transforms, and functions of torch that take functions.

What comes out of them is told by its graph. If parameters met data in there, a tap is put on it that goes back through
the graph (`rules.OPAQUE`), and stands for it in all that follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch.autograd.graph import get_gradient_edge
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from packext import _compiler, rules
from packext._errors import UnsupportedUseError
from packext._graph import leaf_of, name_of
from packext._record import tensors_in
from packext._taps import Observed
from packext._use import TARGET, Use

if TYPE_CHECKING:
    from packext._lineage import Tracer
    from packext._use import Source


def made(tracer: Tracer, t: Tensor, data: bool = False) -> tuple[Source, ...] | None:
    """What `t` was made of, which has a graph and no mark.

    Args:
        tracer: of the forward pass.
        t: the tensor.
        data: whether it is known to be made of data.

    Returns:
        The parameters that it is made of alone, or None.
    """
    leaves, tapped, given = _origins(tracer, t)
    behind = [tracer.behind(leaf) for leaf in leaves]
    known = tuple(dict.fromkeys(source for found in behind for source in found or ()))
    # Of parameters that met data without a tap, it may be made as well.
    refused = {source for _, sources, _ in tracer.record.refused for source in sources}
    # A transform that has read inputs without a gradient may have made it of these, of which its graph says nothing.
    data = data or given or tapped or tracer.raw or None in behind or bool(refused.intersection(known))
    made_of = None if data else known
    if torch.is_grad_enabled():  # and else it is an argument of the next such function, which runs
        tracer.mark(t, made_of)
        if known and made_of is None:
            _tap(tracer, t, known, tapped, tracer.raw)
    return made_of


def _origins(tracer: Tracer, t: Tensor) -> tuple[list[Tensor], bool, bool]:
    """Where autograd has computed `t` from.

    Returns:
        The leaves that no tap of this forward pass is before; whether there is such a tap; and whether the model's
        inputs are there.
    """
    # What is checkpointed gets inputs that have a graph when it is computed again. They may have been written to since.
    inputs = set(tracer.record.behind)
    leaves, seen, open_, tapped, given = [], set(), [t.grad_fn], False, False
    while open_:
        node = open_.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        use = getattr(node, "use", None)
        if isinstance(use, Use) and use.owner() is tracer.record:
            tapped = True
        elif node in inputs:
            given = True
        else:
            if (leaf := leaf_of(node)) is not None:
                leaves.append(leaf)
            open_.extend(child for child, _ in node.next_functions)
    return leaves, tapped, given


def called(tracer: Tracer, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
    """Call `torch.cond`, `scan`, `map`, flex attention or the like."""
    if any(callable(arg) and not isinstance(arg, GraphModule) for arg in (*args, *kwargs.values())):
        # torch compiles what it is given, which tells what functions close over: that alone gets a gradient. Where
        # compiled code runs as it was written, it was not, and is now; what is found comes here again.
        if func.name() == "flex_attention":
            args = args[:7]  # two more are for what is found
        elif func.name() == "map_impl":
            kwargs = {k: v for k, v in kwargs.items() if v}  # that nothing is written to, the compiler need not be told
        with _compiler.as_usual(), tracer:
            return torch.compile(lambda *a, **k: func(*a, **k), backend="eager", fullgraph=True)(*args, **kwargs)
    behind = [(t, tracer.sources(t)) for t in tensors_in((args, kwargs))]
    sources = tuple(dict.fromkeys(source for _, found in behind for source in found))
    data = any(not found and tracer.is_data(t) for t, found in behind)
    raw = any(tracer.is_raw(t) for t, _ in behind)
    out = func(*args, **kwargs)
    if data and sources:
        return pytree.tree_map_only(Tensor, lambda t: _tap(tracer, t, sources, _origins(tracer, t)[1], raw), out)
    if data or sources:
        tracer.mark(out, None if data else sources)
    return out


def _tap(tracer: Tracer, t: Tensor, sources: tuple[Source, ...], tapped: bool, raw: bool) -> Tensor:
    """A tap on `t`, which was made of data and of `sources` where nobody saw how; `t` if there can be none.

    Args:
        tracer: of the forward pass.
        t: what came out.
        sources: the parameters.
        tapped: whether another tap is before it.
        raw: whether data without a gradient went in.

    Returns:
        What stands for `t` from now on.
    """
    tracer.mark(t, None)
    if not t.requires_grad or t.grad_fn is None:
        return t
    node, tensors = name_of(t.grad_fn), {source.name: source.tensor for source in sources}
    func = rules.named(node)
    if "CheckpointFunction" in node:
        return t
    try:
        if "RegisterPostBackward" in node:
            met = f"what is made of {', '.join(tensors)} in another module is an argument of one that FSDP2 shards"
            raise tracer.refuse(func, met, _SHARDED)
        for why, so in (
            # Of what has no gradient, no tap would see that samples meet.
            ("before any layer", not tapped),
            ("and it reads data that has no gradient", raw),
            ("and it is checkpointed", tracer.checkpointed()),
        ):
            if so:
                met = f"data meets {', '.join(tensors)} in it, into which packext does not see, {why}"
                raise tracer.refuse(func, met, _INSTEAD)
        use = tracer.use(rules.OPAQUE, func, tensors, {"edge": get_gradient_edge(t)})
    except UnsupportedUseError as error:
        tracer.record.refused.append((str(error), sources, len(tracer.record.uses)))
        return t
    (instead,) = Observed.apply(use, 1, TARGET, t, *tensors.values())
    tracer.put(t, instead, use)
    return instead


#: FSDP2 sends all arguments through one node, and where a pass comes there, takes the module's memory back.
_SHARDED = (
    "Shard with fully_shard a module that has both, and none of the two by itself; or compute it anew from its "
    "parameters in each module, freeze them, or take DistributedDataParallel."
)

_INSTEAD = (
    "Have torch's own functions multiply these parameters with data, leave them out (parameters=...), or run the pass "
    "inside of `with px.disable():`."
)
