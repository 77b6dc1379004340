"""What a backward pass is refused for where it enters a model: parameters past the taps, gradients of gradients."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from packext._errors import CoupledSamplesError, PackextError, UnsupportedUseError
from packext._use import live_nodes

if TYPE_CHECKING:
    from packext._backpack import backpack
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


def _fsdp() -> Any:
    """`torch.distributed.fsdp`, which torch does not import by itself, and takes a while; None if nobody can use it."""
    module = sys.modules.get("torch.distributed.fsdp")  # other libraries import it, and every pass asks
    return module if module is not None and dist.is_initialized() else None


def _sharded(modules: list[nn.Module]) -> list[Any]:
    """What FSDP2 keeps of the parameters that it shards with each of `modules`."""
    fsdp = _fsdp()
    if fsdp is None:
        return []
    held: list[Any] = [module for module in modules if isinstance(module, fsdp.FSDPModule)]
    states = [module._get_fsdp_state() for module in held]
    return [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]


def sharding(modules: list[nn.Module]) -> Any:
    """The process group over which FSDP2 shards the parameters of one of `modules`; None if it does of none."""
    return next((group.mesh_info.shard_process_group for group in _sharded(modules)), None)


def unshard(record: Record) -> None:
    """Have FSDP2 gather the parameters that it shards with the whole model, as it does where the gradient arrives.

    A loss is reached before that, and torch reads memory that is not there.
    """
    fsdp = _fsdp()
    root: Any = record.root()
    if fsdp is not None and isinstance(root, fsdp.FSDPModule):
        root.unshard()


def _refuse_absent(record: Record) -> None:
    """Refuse to read parameters whose memory FSDP2 has taken back for a module around the extended one.

    torch does not notice: the process would end.

    Raises:
        UnsupportedUseError: if so.
    """
    if _fsdp() is None:
        return
    groups = _sharded(record.modules())
    own = {id(getattr(p, "_unsharded_param", None)) for group in groups for p in group.fsdp_params}
    for source in record.parameters():
        t = source.tensor
        if type(t) not in (Tensor, nn.Parameter) or id(t) in own or _is_flat(t) or _is_flat(t._base):
            continue  # a module within the model gathers what it has
        if t.numel() and not t.untyped_storage().nbytes():
            raise UnsupportedUseError(
                f"{source.name} {list(t.shape)} is sharded by FSDP2 with a module around the extended one, which has "
                "not gathered it yet. Call px.extend on that module, or fully_shard on the extended one as well."
            )


def refuse_flat(record: Record, contexts: Sequence[backpack]) -> None:
    """Refuse what is not to be had where `FullyShardedDataParallel` keeps parameters as parts of a flat one.

    Raises:
        UnsupportedUseError: if it was wrapped in a way in which samples are not seen, or something is wanted that needs
            more passes, or the tensors that the user holds.
    """
    fsdp = _fsdp()
    if fsdp is None:
        return
    if any(isinstance(m, fsdp.FullyShardedDataParallel) and getattr(m, "_is_root", None) for m in record.modules()):
        raise UnsupportedUseError(f"The extended model is or has a FullyShardedDataParallel of its own. {_WRAP}")
    name, p = next(((k, p) for k, p in record.names.items() if _is_flat(p) or _is_flat(p._base)), ("", None))
    if p is None:
        return
    if _is_flat(p):
        raise UnsupportedUseError(f"{name} {list(p.shape)} is several parameters of FullyShardedDataParallel. {_WRAP}")
    what = f"{name} [FullyShardedDataParallel] is a view of a flat parameter"
    for context in contexts:
        more = ", ".join(repr(q) for q in (*context.curvature, *context.hessian))
        if more:
            raise UnsupportedUseError(
                f"{what}, which is not there for passes that carry curvature ({more}). Shard with fully_shard instead."
            )
        if context.parameters is not None or context.extension_hook is not None:
            raise UnsupportedUseError(
                f"{what}, and in the place of the tensors that you hold: leave parameters=... and extension_hook out, "
                "and read results by name."
            )


_WRAP = (
    "Extend the module first and wrap it then, FullyShardedDataParallel(px.extend(model), use_orig_params=True), or "
    "shard with fully_shard."
)


def _is_flat(t: Tensor | None) -> bool:
    return getattr(t, "_is_flat_param", False)


def of_parts(name: str, p: Any) -> tuple[str, str]:
    """Why there is nothing of a DTensor, and what to do."""
    return (
        f"{name} is a DTensor {list(p.shape)} placed {list(p.placements)}: of what tensor parallelism splits, there "
        "are individual gradients of linear layers (ColwiseParallel, RowwiseParallel)",
        "Leave it out (parameters=...), shard with fully_shard instead, whose parameters are whole while they are "
        "used, or run this pass inside of `with px.disable():`.",
    )


def refuse_tensors(record: Record, contexts: Sequence[backpack]) -> None:
    """Refuse tensors without numbers (on the meta device), and what is not known of DTensors.

    Parameters that FSDP2 has sharded are whole while they are used: they get here only if something else splits them.

    Args:
        record: of the forward pass.
        contexts: that hear the pass.

    Raises:
        UnsupportedUseError: if the model has parameters without numbers, or returns a DTensor, if something is wanted
            of a DTensor that parts do not tell, or what ranks would draw apart, or second derivatives of a model with
            one. All ranks find the same, so that none waits for another.
    """
    empty = [f"{name} {list(p.shape)}" for name, p in record.names.items() if p.is_meta]
    if empty:
        raise UnsupportedUseError(
            f"Parameters of the extended model are on the meta device, where tensors have shapes and no numbers: "
            f"{', '.join(empty)}. Give them memory, model.to_empty(device=...), and their values, load_state_dict."
        )
    refuse_flat(record, contexts)
    _refuse_absent(record)
    twice = [q for c in contexts for q in (*c.hessian, *(q for q in c.curvature if q.root[0] == "hessian"))]
    if twice and sharding(record.modules()) is not None:
        raise UnsupportedUseError(
            f"{', '.join(map(repr, twice))}: FSDP2 hooks what modules give by functions that torch differentiates "
            "once, and the Hessian differentiates twice. Take DistributedDataParallel, or quantities of the GGN."
        )
    named = any(c.distributed for c in contexts)
    if not record.distributed and not record.distributed_output and not named:
        return
    sharded = sharding(record.modules()) is not None
    if named and sharded:
        raise UnsupportedUseError(
            "parameters=... has DTensors, and FSDP2 has other tensors in their place while they are used: leave "
            "parameters=... out, and read results by name."
        )
    for context in contexts:
        _refuse_parts(record, context, sharded)
    if record.distributed_output:
        raise UnsupportedUseError(
            "The extended model returned a DTensor, in which samples cannot be told apart. Return its full_tensor() "
            "(or its to_local() if it is replicated) from forward, as use_local_output=True of a parallel style does."
        )


def _refuse_parts(record: Record, context: backpack, sharded: bool) -> None:
    """Refuse what `context` wants of DTensors and is not to be had."""
    found = {
        name: (kind, p)
        for name, (kind, p) in record.distributed.items()
        if p.requires_grad and context._wants(p) and will_accumulate(p)
    }
    for name, (kind, p) in found.items():
        others = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        where = f"{name} [{kind}]{others}"
        why, what = of_parts(where, p)
        if sharded:
            raise UnsupportedUseError(f"{why}, and none where FSDP2 shards the parts further. {what}")
        alone = ", ".join(repr(q) for q in context.extensions if not q.parts)
        if alone:
            raise UnsupportedUseError(f"{why}. Parts of a parameter do not tell {alone} of it. {what}")
        if context.extension_hook is not None or context.overhear:
            raise UnsupportedUseError(
                f"{where} is a DTensor {list(p.shape)}, of which results are complete when the pass has ended: read "
                "them then, or in a pass_hook. extension_hook and overhear=True (as a monitor's) read them before."
            )
        mesh: Any = getattr(p, "device_mesh")  # noqa: B009 - of a DTensor
        ranks = {*mesh.mesh.flatten().tolist()}
        if context.ranks is not None and len(ranks & {*dist.get_process_group_ranks(context.ranks.group)}) > 1:
            raise UnsupportedUseError(
                f"{where} is split over ranks {sorted(ranks)}, and group=... has several of them: they see the same "
                "samples, which would count more than once. Give a group of ranks that see different samples (one "
                "dimension of a mesh), or none."
            )
    for name, (kind, p) in record.distributed.items():
        where = f"{name} [{kind}] is a DTensor {list(p.shape)}"
        again = torch.is_grad_enabled() or record.slopes or record.inside
        if again or context.hessian or any(q.root[0] == "hessian" for q in context.curvature):
            raise UnsupportedUseError(
                f"{where}, and torch's second derivatives through DTensors are wrong where a layer is split. In a "
                "model that has one, ask for quantities of first order or for DiagGGNExact, KFLR and the like, and do "
                "not pass create_graph=True."
            )
        drawn = ", ".join(repr(q) for q in context.curvature if q.root[0] == "mc")
        if drawn:
            raise UnsupportedUseError(
                f"{where}, and ranks that share a layer might draw different targets for {drawn}. Ask for the exact "
                "quantity (DiagGGNExact, KFLR)."
            )


def refuse_inputs_alone(record: Record) -> None:
    """Refuse a pass that would count as one of several, though no gradient of a parameter is wanted of it.

    Raises:
        PackextError: if so.
    """
    sources = record.parameters()
    if sources and not any(will_accumulate(source.tensor) for source in sources):
        raise PackextError(
            "With accumulate=True each backward pass is a part of the batch, and this one gives no parameter of the "
            "model a gradient (autograd.grad or backward with other inputs=...): run it inside of `with "
            "px.disable():`. The first step of a schedule of torch.distributed.pipelining makes such a pass, to learn "
            "shapes: run one step outside of the context."
        )


def after_distributed(record: Record) -> str:
    """What to add to a message where uses of parameters may be missing since DTensors hide where data went."""
    if not record.distributed:
        return ""
    name, (kind, _) = next(iter(record.distributed.items()))
    return (
        f" What {name} [{kind}] and other DTensors give is not followed any further: of layers that run after "
        "them, there are no individual gradients (parameters=... leaves layers out)."
    )


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
            f"{after_distributed(record)}"
        )


def will_accumulate(parameter: Tensor) -> bool:
    """Whether the pass under way computes the gradient of `parameter`."""
    return awaited(torch.autograd.graph.get_gradient_edge(parameter).node)


def awaited(node: Any) -> bool:
    """Whether the pass under way needs what arrives at autograd's `node`."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient autograd.grad returns: it is executed
        return True


class Again(torch.autograd.Function):
    """Sits on the gradient that enters a model, where a graph of it is made (create_graph=True).

    A later pass that differentiates this gradient reaches parameters through it. All parameters are inputs here, so
    that every such pass that has one of them for its aim is known by this node.
    """

    @staticmethod
    def watch(record: Record, grad_inputs: Any, grad_outputs: Any) -> Any:
        """Hook of a gate."""
        if not torch.is_grad_enabled():
            return None
        record.entered = torch._C._current_graph_task_id()
        closed = record.aside != record.entered
        return tuple(None if g is None else Again.on(g, record, closed) for g in grad_inputs)

    @staticmethod
    def on(g: Tensor, record: Record, closed: bool = True) -> Tensor:
        """`g`, known to be passed by whoever differentiates it."""
        marked = Again.apply(g, *(source.tensor for source in record.parameters()))
        if marked.grad_fn is not None:
            record.again.append((weakref.ref(marked.grad_fn), closed))
        return marked

    @staticmethod
    def forward(ctx: Any, g: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return g.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (grads[0], *(None for _ in range(ctx.count)))


AGAIN = (
    "A pass through a gradient of the model (made with create_graph=True) has individual gradients where that gradient "
    "is one with respect to the model's inputs alone: torch.autograd.grad(output.sum(), x, create_graph=True), where x "
    "is an argument of the extended model and requires grad when it is called. Gradients of parameters (a "
    "Hessian-vector product, an update within the loss) and of activations have none, nor those that "
    "backward(create_graph=True) leaves: run the pass outside of the context, or inside of `with px.disable():`. "
    "torch.func.vmap(torch.func.grad(loss of one sample), (None, 0)) has them for any loss."
)


def refuse_curvature(record: Record, gates: frozenset[int], contexts: Sequence[backpack]) -> None:
    """Refuse what is not individual gradients, of a loss that contains derivatives of the model.

    Raises:
        UnsupportedUseError: if it is asked for. Of derivatives made in forward, products with the Hessian are right.
    """
    slopes = record.slopes.keys() & gates
    asked = [type(q).__name__ for c in contexts for q in (*c.curvature, *(c.hessian if slopes else ()))]
    asked += ['per="token"' for c in contexts if c.per == "token"]
    if asked and (slopes or record.inside):
        raise UnsupportedUseError(
            f"{', '.join(asked)} of a loss that contains derivatives with respect to the model's inputs: of such a "
            "loss there are individual gradients and what is made of them. Ask for those, or compute it without that "
            "term."
        )


def refuse_again(record: Record, gates: frozenset[int], contexts: Sequence[backpack]) -> None:
    """Refuse a pass through derivatives of the model where what packext makes of it would not be right.

    Args:
        record: of the forward pass.
        gates: through which the pass comes.
        contexts: that hear it.

    Raises:
        PackextError: for gradients of parameters or activations.
        CoupledSamplesError: for those of inputs that are not the samples' own.
        UnsupportedUseError: for functions whose second derivatives are not followed.
    """
    slopes = record.slopes.keys() & gates
    again = [closed for ref, closed in record.again if (node := ref()) is not None and awaited(node)]
    if any(again) or again and not slopes:
        raise PackextError(AGAIN)
    for i in slopes:
        shape = record.gates[i][1]
        if record.n == 1 or record.slopes[i] is not None:
            continue
        if record.by_use:
            raise CoupledSamplesError(
                f"The loss contains the derivative with respect to an input {list(shape)} of a model with "
                "batch_axis=None, and that input is not there any more to see which of its rows are whose: keep it "
                "until backward()."
            )
        if shape[record.batch_axis : record.batch_axis + 1] != (record.n,):
            raise CoupledSamplesError(
                f"The loss contains the derivative with respect to an input {list(shape)}, in which samples are not "
                f"told apart: axis {record.batch_axis} does not have {record.n} entries. Give each sample its own "
                "copy: x.expand(N, ...), which requires grad as x does."
            )
    for why, sources in record.half_followed(gates):
        if any(c._wants(s.tensor) and will_accumulate(s.tensor) for s in sources for c in contexts):
            raise UnsupportedUseError(why)
