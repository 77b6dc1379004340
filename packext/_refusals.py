"""What a backward pass is refused for where it enters a model: parameters past the taps, gradients of gradients."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from packext._errors import UnsupportedUseError
from packext._use import live_nodes

if TYPE_CHECKING:
    from packext._record import Record


def refuse_static(module: Any) -> None:
    """Refuse DistributedDataParallel that would take an inner pass for the end of a backward pass.

    Raises:
        UnsupportedUseError: if it was told that its graph is static.
    """
    if module.static_graph:
        raise UnsupportedUseError(
            "DistributedDataParallel(..., static_graph=True) starts to reduce gradients when a pass first reaches it, "
            "which here is one that looks at samples or carries curvature: gradients would never be reduced. Pass "
            "static_graph=False."
        )


def sharding(modules: list[nn.Module]) -> Any:
    """The process group over which FSDP2 shards the parameters of one of `modules`; None if it does of none."""
    if "torch.distributed.fsdp" not in sys.modules:  # which torch does not import, and takes a while
        return None
    from torch.distributed.fsdp import FSDPModule

    for module in modules:
        if isinstance(module, FSDPModule):
            group: Any = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                return group.mesh_info.shard_process_group
    return None


def unseen(record: Record, modules: list[nn.Module], wants: Callable[[Tensor], bool]) -> None:
    """Refuse parameters that the gradient will reach although no use of them was seen."""
    known = {id(s.tensor) for s in record.parameters()}
    missed = {
        id(p)
        for module in modules
        for p in module._parameters.values()
        if p is not None and p.requires_grad and id(p) not in known and not live_nodes(p)
        if wants(p) and will_accumulate(p)
    }
    if missed:
        names = ", ".join(name for name, p in modules[0].named_parameters() if id(p) in missed)
        raise UnsupportedUseError(
            f"A gradient will reach {names}, but packext saw no use of it: it meets data outside of the extended "
            "model, or inside of a torch.autograd.Function, a torch.func transform or TorchScript, into which packext "
            "does not see. Have these give the value that the parameter is multiplied with, and multiply in forward, "
            "or leave the parameter out (parameters=...)."
        )


def will_accumulate(parameter: Tensor) -> bool:
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient autograd.grad returns: it is executed
        return True


class Again(torch.autograd.Function):
    """Sits on the gradient that enters a model, where a graph of it is made (create_graph=True).

    A later pass that differentiates this gradient reaches parameters through it, past the taps. All
    parameters are inputs here, so that every such pass that has one of them for its aim is known by this node.
    """

    @staticmethod
    def watch(record: Record, grad_inputs: Any, grad_outputs: Any) -> Any:
        """Hook of a gate."""
        if not torch.is_grad_enabled():
            return None
        parameters = [source.tensor for source in record.parameters()]
        marked = tuple(None if g is None else Again.apply(g, *parameters) for g in grad_inputs)
        record.again += [weakref.ref(g.grad_fn) for g in marked if g is not None and g.grad_fn is not None]
        return marked

    @staticmethod
    def forward(ctx: Any, g: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return g.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (grads[0], *(None for _ in range(ctx.count)))


AGAIN = (
    "A pass through a gradient of the model (made with create_graph=True, as in a gradient penalty or a Hessian-vector "
    "product) has no individual gradients: run it outside of the context, or inside of `with px.disable():`."
)
