"""Models that several processes hold, FSDP, tensor parallelism, DDP: what is gathered of them, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from packext._errors import UnsupportedUseError
from packext._refusals import will_accumulate

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


def not_reduced(modules: list[nn.Module]) -> list[tuple[Any, str, Tensor]]:
    """Gradients that FSDP2 holds to reduce them behind a later pass (set_requires_gradient_sync), whatever that is of.

    Returns:
        Each with what holds it, and under which name: sums in another dtype lie apart.
    """
    held = [p for group in _sharded(modules) for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
    places = [(p._unsharded_param, "grad") for p in held]  # all that 2.15 has
    places += [(p, "unsharded_accumulated_grad") for p in held if "unsharded_accumulated_grad" in vars(p)]
    return [(holder, name, g) for holder, name in places if (g := getattr(holder, name)) is not None]


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


def _refuse_flat(record: Record, contexts: Sequence[backpack]) -> None:
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
    _refuse_flat(record, contexts)
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
            raise UnsupportedUseError(
                f"{why}, and none where FSDP2 shards the parts further. Shard with fully_shard alone, whose parameters "
                "are whole while they are used, or run this pass inside of `with px.disable():`."
            )
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
