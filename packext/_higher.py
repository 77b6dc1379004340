"""Functions of torch that take functions, into which nobody sees: `torch.cond`, `scan`, `map`, flex attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._ops import HigherOrderOperator as HigherOrderOperator
from torch.fx import GraphModule

from packext import _compiler
from packext._record import tensors_in

if TYPE_CHECKING:
    from packext._lineage import Tracer


def called(tracer: Tracer, func: HigherOrderOperator, args: Any, kwargs: Any) -> Any:
    """Call `func`, and note the parameters that meet data in it: nothing is known of each sample's part."""
    if any(callable(arg) and not isinstance(arg, GraphModule) for arg in (*args, *kwargs.values())):
        # torch compiles what it is given, which tells what functions close over: that alone gets a gradient. Where
        # compiled code runs as it was written, it was not, and is now; what is found comes here again.
        if func.name() == "flex_attention":
            args = args[:7]  # two more are for what is found
        with _compiler.as_usual(), tracer:
            return torch.compile(lambda *a, **k: func(*a, **k), backend="eager", fullgraph=True)(*args, **kwargs)
    behind = [(t, tracer.sources(t)) for t in tensors_in((args, kwargs))]
    sources = tuple(dict.fromkeys(source for _, found in behind for source in found))
    data = any(not found and tracer.is_data(t) for t, found in behind)
    if data and sources and torch.is_grad_enabled():
        names = ", ".join(source.name for source in sources)
        why = tracer.refuse(
            func,
            f"data meets {names} inside of functions that it is given, into which packext does not see",
            "Write it in Python (an if for torch.cond, a loop for scan, torch.vmap of the module's parts for map), "
            "leave these parameters out (parameters=...), or run the pass inside of `with px.disable():`.",
        )
        tracer.record.refused.append((str(why), sources, len(tracer.record.uses)))
    out = func(*args, **kwargs)
    if data or sources:
        tracer.mark(out, None if data else sources)
    return out
