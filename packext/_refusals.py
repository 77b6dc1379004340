"""What a backward pass is refused for where it enters a model: parameters past the taps, gradients of gradients."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packext._errors import CoupledSamplesError, PackextError, UnsupportedUseError, due_to
from packext._graph import inputs_first, leaf_of, name_of
from packext._kronecker import KronEigh
from packext._use import Source, live_nodes

if TYPE_CHECKING:
    from packext._backpack import backpack
    from packext._pass import Pass
    from packext._quantity import Quantity
    from packext._record import Record


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
            "shapes: run one step outside of the context. Schedules that split their passes "
            "(ScheduleInterleavedZeroBubble, ScheduleZBVZeroBubble, ScheduleDualPipeV) make them in every step: take "
            "one that does not, such as Schedule1F1B."
        )


def refuse_moved(record: Record) -> None:
    """Refuse parameters that were given another dtype or device since the forward pass.

    Torch makes another node that accumulates their gradients then. The graph has the old one, so that `.grad` arrives,
    and none for who asks for the gradient of such a parameter by itself.

    Raises:
        PackextError: if there is one.
    """
    for source in record.parameters():
        p = source.tensor
        if (p.dtype, p.device) != source.kind:
            was, now = (f"{dtype} on {device}" for dtype, device in (source.kind, (p.dtype, p.device)))
            raise PackextError(
                f"{source.name} {list(p.shape)} was {was} in the forward pass, and is {now} in its backward pass: the "
                "model was converted or moved between them (.to(...), .half(), .float(), .cpu()). Do that before the "
                "forward pass, or when backward() has run."
            )


def refuse_apart(record: Record, before: Iterable[Source]) -> None:
    """Refuse a pass through other models than those of the passes `before`, whose results it would join.

    Raises:
        PackextError: if so.
    """
    earlier = [source.tensor for source in before]
    if not earlier or any(will_accumulate(p) for p in earlier):
        return
    own = {id(p) for module in record.modules() for p in module._parameters.values()}
    if not any(id(p) in own for p in earlier):  # nor did they go through other parts of the same model
        raise PackextError(
            "With accumulate=True each backward pass is a part of the batch, and this one goes through "
            f"{type(record.root()).__name__}, while those before it went through other extended models alone: "
            "their samples would be rows of zeros in its results, and its samples in theirs. "
            "Open a context for each model. Schedules of torch.distributed.pipelining with several stages on a rank "
            "(ScheduleInterleaved1F1B, ScheduleLoopedBFS) make passes of one and the other in turn: take one that has "
            "a single stage on each, such as Schedule1F1B."
        )


def refuse_unbounded(record: Record, bounded: Sequence[Quantity], wants: Callable[[Tensor], bool]) -> None:
    """Refuse a pass in which a sample has more of a part than what its own clipped gradient adds.

    Raises:
        PackextError: for a forward pass that was counted before, and one that has written to buffers.
        CoupledSamplesError: for gradients that are divided by what all samples have looked up.
    """
    if any(q.bounded is owner for q in bounded for owner in record.counted):
        raise PackextError(
            "A second backward pass goes through one forward pass of the model: its samples would count twice, and "
            "their part is bounded for one. Add the losses, and call backward() once."
        )
    if record.written:
        raise PackextError(
            f"The forward pass has written to the buffers {', '.join(record.written)}: what they keep of the samples "
            "leaves without noise. Normalisations: build them with track_running_stats=False, call .eval() on them "
            "after each model.train(), or take GroupNorm. Own modules: write to no buffer in forward."
        )
    if divided := _divided(record, wants):
        raise CoupledSamplesError(
            f"scale_grad_by_freq divides a sample's gradient by how often all samples have looked up a row, in "
            f"{divided}: a sample changes what others add. Build the embedding without it."
        )


def refuse_replaced(node: Any, sources: Sequence[Source]) -> None:
    """Refuse parameters that were converted since the forward pass, and converted back (see `refuse_moved`).

    Args:
        node: of autograd's graph, behind all of the model.
        sources: parameters of which the pass seems to compute no gradient.

    Raises:
        PackextError: if it computes that of one, by the node that accumulated it in the forward pass.
    """
    known = {id(source.tensor): source for source in sources}
    for each in inputs_first([node]) if known else ():
        source = known.get(id(leaf_of(each)))
        if source is not None and awaited(each):
            raise PackextError(
                f"{source.name} {list(source.tensor.shape)} was converted or moved between the forward and its "
                "backward pass, and back (.to(...), .half(), .cpu()). Do that before the forward pass, or when "
                "backward() has run."
            )


def refuse_divided(record: Record, contexts: Iterable[backpack]) -> None:
    """Refuse curvature of tables whose gradient torch divides by frequencies: what it then calls one is no derivative.

    Raises:
        UnsupportedUseError: if it is asked for.
    """
    for context in contexts:
        asked = ", ".join(type(q).__name__ for q in (*context.curvature, *context.hessian))
        if asked and (divided := _divided(record, context._wants)):
            raise UnsupportedUseError(
                f"{asked}: scale_grad_by_freq divides the gradient by how often a row was looked up, so that it is no "
                f"derivative of the loss, and has none that is its Hessian, in {divided}. Build the embedding without "
                "it, or leave its table out (parameters=...)."
            )


def _divided(record: Record, wants: Callable[[Tensor], bool]) -> str:
    """Uses of wanted tables whose gradient torch divides by frequencies."""
    return ", ".join(
        use.describe()
        for use in record.uses
        if use.consts.get("scale_grad_by_freq") and any(wants(s.tensor) for g in use.sources.values() for s in g)
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
        if p is not None and p.requires_grad and id(p) not in known and wants(p) and will_accumulate(p)
        if not any(awaited(tap) for tap in live_nodes(p))  # of another forward pass; those of passes before may live on
    }
    for why, sources, _ in record.refused:
        if any(id(source.tensor) in missed for source in sources):
            raise UnsupportedUseError(why)
    if missed:
        names = ", ".join(name for name, p in modules[0].named_parameters() if id(p) in missed)
        new = [
            f"{path or '(the model itself)'} [{type(m).__name__}]"
            for path, m in modules[0].named_modules()
            if not ("_packext" in vars(m) or isinstance(m, torch.jit.ScriptModule))
            and any(id(p) in missed for p in m._parameters.values())
        ]
        if new:
            raise UnsupportedUseError(
                f"A gradient will reach {names}, of modules that were put into the model after px.extend, or were "
                f"taken out of it by px.unextend: {', '.join(new)}. Call px.extend(model) again."
            )
        raise UnsupportedUseError(
            f"A gradient will reach {names}, but packext saw no use of it: it meets data outside of the extended "
            "model's forward (in another method, or in the loss), or inside of a torch.autograd.Function, a torch.func "
            "transform or TorchScript, into which packext does not see, or is what a weight was computed from that the "
            "model was given in its place (functional_call). Have these give the value that the parameter is "
            "multiplied with, and multiply in forward, detach such a weight (and have it require grad), or leave the "
            "parameter out (parameters=...)."
            f"{after_distributed(record)}"
        )


def refuse_opacus(modules: list[nn.Module]) -> None:
    """Refuse a model that Opacus has wrapped: its hooks would count the passes that look at samples as its own."""
    for module in modules if "opacus" in sys.modules else ():
        for hook in module._forward_hooks.values():
            if str(getattr(hook, "__module__", "")).startswith("opacus."):
                raise PackextError(
                    f"Opacus's GradSampleModule has hooks on this model ({type(module).__name__}), which compute "
                    "individual gradients of their own in every pass. Take the model as it was before "
                    "(to_standard_module()); for private training there are px.optim.DPSGD, and "
                    "packext.adapters.opacus with Opacus's optimizers."
                )


def _before_models(node: Any) -> bool:
    """Whether `node` is neither a gate nor a tap, behind which a model is."""
    return not (hasattr(node, "record") or hasattr(node, "use"))


def refuse_beside(name: str, edges: Iterable[Any], wants: Callable[[Tensor], bool]) -> None:
    """Refuse parameters of extended models that data meet again between the models and the extended loss.

    Args:
        name: of the loss.
        edges: where gradients enter the graphs of what the loss is called with.
        wants: tells of which parameters individual gradients are wanted.

    Raises:
        UnsupportedUseError: if such a parameter has uses in a model as well: of these alone the results would be.
    """
    for node in inputs_first([edge.node for edge in edges], _before_models):
        p = leaf_of(node)
        if p is None or not wants(p):
            continue
        uses = [tap.use for tap in live_nodes(p) if torch._C._will_engine_execute_node(tap)]
        if uses:
            known = next(s.name for group in uses[0].sources.values() for s in group if s.tensor is p)
            raise UnsupportedUseError(
                f"{known} {list(p.shape)} is used in the extended model ({uses[0].describe()}), and once more between "
                f"its output and the extended {name}, where packext does not see it. Do all of it in the forward of "
                "one extended module, and call that module: model.forward(...), other methods and hooks that are put "
                "on it after px.extend run outside of it. Or leave the parameter out (parameters=...)."
            )


#: Nodes (weak) on extended losses whose graph may be alive, with the losses' names.
_LOSSES: list[tuple[Callable[[], Any], str]] = []


def note_loss(node: Any, name: str) -> None:
    """Remember, weakly, the node on an extended loss."""
    if len(_LOSSES) > 8 and len(_LOSSES) & (len(_LOSSES) - 1) == 0:
        _LOSSES[:] = [(ref, name) for ref, name in _LOSSES if ref() is not None]
    _LOSSES.append((weakref.ref(node), name))


def awaited_loss() -> str | None:
    """The name of an extended loss that the pass under way is yet to come through; None without one."""
    nodes = ((ref(), name) for ref, name in tuple(_LOSSES))
    return next((name for node, name in nodes if node is not None and awaited(node)), None)


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


@functools.cache
def knows_weight_norm() -> bool:
    """Whether torch's second derivative of its fused weight_norm is right: 2.13 takes the norm for a constant in it."""
    with torch.enable_grad():
        v = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(torch.ops.aten._weight_norm(v, v.new_ones(1, 1))[0, 0], v, create_graph=True)
        return abs(float(torch.autograd.grad(slope[0, 0], v)[0][0, 0]) + 3 * 3 * 4**2 / 5**5) < 1e-6


def is_weight_norm(node: Any) -> bool:
    """Whether a node is that of torch's fused weight_norm."""
    return name_of(node).startswith("WeightNormInterface")


def beneath_weight_norm(roots: Sequence[Any]) -> set[int]:
    """Ids of the parameters in whose gradient torch's derivative of a fused weight_norm is, which has a wrong one."""
    norms = [node for node in inputs_first(roots) if is_weight_norm(node)]
    if not norms or knows_weight_norm():
        return set()
    return {id(leaf) for node in inputs_first(norms) if (leaf := leaf_of(node)) is not None}


_NORMALISED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "NativeLayerNorm": lambda x, b: F.layer_norm(x, (2,), None, b),
    "NativeBatchNorm": lambda x, b: F.batch_norm(x, None, None, None, b, training=True),
}


@functools.cache
def _knows_bias(kind: str) -> bool:
    """Whether torch's derivative of the gradient of a bias is right where a normalisation has no weight."""
    with torch.enable_grad():
        b = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        y = _NORMALISED[kind](torch.eye(2, dtype=b.dtype), b)
        (slope,) = torch.autograd.grad(y.square().sum(), b, create_graph=True)
        found = torch.autograd.grad(slope.sum(), b, allow_unused=True)[0]
        return found is not None and bool(found.eq(4).all())


def loses_bias(node: Any, wanted: set[Any]) -> bool:
    """Whether torch's derivative of a bias's gradient is wrong at a normalisation without a weight.

    Args:
        node: of the graph.
        wanted: nodes with a bias among them, if it matters.

    Returns:
        Whether it is.
    """
    kind = name_of(node).partition("Backward")[0]
    if kind not in _NORMALISED:
        return False
    weight, bias = (behind for behind, _ in node.next_functions[1:3])
    return weight is None and bias in wanted and not _knows_bias(kind) and _is_none(node._raw_saved_weight)


def _is_none(saved: Any) -> bool:
    """Whether a saved tensor is None, without having it: a checkpointed part would run again."""
    try:
        saved.register_hooks(_identity, _identity)
    except RuntimeError as error:
        return "value None" in str(error)  # the other reason is that it has hooks
    return False


def _identity(t: Tensor) -> Tensor:
    return t


class Constant(torch.autograd.Function):
    """Sits on a result that was computed without a graph, in a pass that makes one: differentiating it is an error."""

    @staticmethod
    def forward(ctx: Any, told: str, value: Tensor, *others: Tensor) -> Tensor:
        ctx.told = told
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedUseError(
            f"The result of {ctx.told} has no derivative, though it is of a pass with create_graph=True: it was "
            "computed without a graph, and would count as a constant, or torch's own is wrong (of parameters beneath "
            "its fused weight_norm). Where it is meant as a constant, take .detach() of it. First-order quantities "
            "have a derivative, and so have those of the GGN (but for EKFAC and KFRA) of one tensor and a loss behind "
            "the model whose Hessian has a formula (CrossEntropyLoss, MSELoss, BCEWithLogitsLoss), times a constant; "
            "of one process, and if all passes that are added up (accumulate=True) have create_graph=True. "
            "For others torch.func has any derivative."
        )


def anchored(*tensors: Tensor) -> Tensor:
    """A number that leads to tensors in autograd's graph, without keeping them, and refuses to be differentiated."""
    return Constant.apply("", torch.zeros(()), *tensors)


def constant(value: Any, told: str, anchor: Tensor) -> Any:
    """`value`, a tensor or several, that refuses to be differentiated; `anchor` leads to the parameters."""
    if isinstance(value, Tensor):
        refuses = hasattr(value.grad_fn, "told") or not value.is_floating_point()
        return value if refuses else Constant.apply(told, value, anchor)
    if isinstance(value, (list, tuple)):
        found = [constant(v, told, anchor) for v in value]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    if isinstance(value, KronEigh):
        return KronEigh(constant(value.vectors, told, anchor), constant(value.eigenvalues, told, anchor))
    return value


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


#: Of checkpointing that packext has not led to torch's other kind, in the forward pass within a context.
HIDDEN = (
    "A part of the extended model, or what is around it, is under reentrant activation checkpointing, into which no "
    "pass gets that looks at samples or carries curvature. Run the forward pass inside of the context as well, where "
    "torch's own within the extended model is of the other kind. Otherwise (another library's CheckpointFunction, a "
    "module around the model) take torch.utils.checkpoint.checkpoint with use_reentrant=False."
)


def refuse_reentrant(node: Any, records: Sequence[Record], wants: Callable[[Tensor], bool]) -> None:
    """Refuse curvature of a part of a model that is hidden from it, before any gradient is accumulated.

    Args:
        node: of autograd's graph, where the loss was computed.
        records: the forward passes behind it.
        wants: tells of a parameter whether curvature of it is wanted.

    Raises:
        UnsupportedUseError: if there is a checkpoint, and such a parameter of these models of which no use was seen.
    """
    seen = {id(source.tensor) for record in records for source in record.parameters()}
    modules = [module for record in records for module in record.extended()]
    every = [p for module in modules for p in module._parameters.values() if p is not None and p.requires_grad]
    if records and all(id(p) in seen for p in every if wants(p)):
        return
    if any(type(each).__name__ == "CheckpointFunctionBackward" for each in inputs_first([node])):
        raise UnsupportedUseError(HIDDEN)


def refuse_run_again(record: Record, flight: Pass) -> None:
    """Refuse curvature of a part of a model that a Function runs again in its backward, and no column has reached.

    Raises:
        UnsupportedUseError: if quantities want it of the parameters in there.
    """
    asked = [q for f in flight.heard for q in (*f.context.spreading, *f.context.hessian)]
    reached = any(other.root() is record.root() for other in flight.records)
    if asked and not reached and any(flight.wants(source.tensor) for source in record.parameters()):
        with due_to(asked):
            raise UnsupportedUseError(
                f"{', '.join(dict.fromkeys(type(q).__name__ for q in asked))} asked for, and a Function runs "
                f"{type(record.root()).__name__} again in its backward and calls backward() of that, where no "
                "curvature of the loss arrives. Return the gradients that torch.autograd.grad gives, or ask for "
                "quantities of individual gradients."
            )
