"""The backward pass in flight: what arrives at gates and taps, and for whom."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor  # pyright: ignore[reportMissingImports]
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdRef

from packext._distributed import not_reduced, refuse_static, refuse_tensors, sharding, unshard
from packext._errors import CoupledSamplesError, NotExtendedError, PackextError, UnsupportedUseError, due_to
from packext._factored import Factored, merge
from packext._gathering import Gathering
from packext._layout import separating
from packext._listening import here, meanwhile, silence
from packext._owners import Owners
from packext._pass import Pass, wants_of
from packext._precision import autocasts
from packext._probe import Check, Probe, known, probe
from packext._record import losses_inside, only_losses
from packext._refusals import (
    HIDDEN,
    after_distributed,
    awaited_loss,
    refuse_again,
    refuse_apart,
    refuse_curvature,
    refuse_divided,
    refuse_inputs_alone,
    refuse_moved,
    refuse_opacus,
    refuse_run_again,
    refuse_unbounded,
    unseen,
    will_accumulate,
)
from packext._union import everyone
from packext._use import TARGET, Source, Use

if TYPE_CHECKING:
    from packext._record import Record


#: Tensors (weak) that may have `retain_grad()`, by id: passes of packext's own come by them, too. Not `weakref.ref`:
#: asked for a tensor that C++ alone holds, it leaves it half dead (seen with torch 2.9).
_RETAINING: dict[int, Callable[[], Tensor | None]] = {}


def may_retain(t: Tensor) -> None:
    """Have `undisturbed` look at `t`, for as long as it lives."""
    key = id(t)
    _RETAINING[key] = WeakIdRef(t, lambda _: _RETAINING.pop(key, None))


def watched() -> list[Tensor]:
    """Those that `may_retain` was told of, outputs of models among them, and that live."""
    return [t for ref in list(_RETAINING.values()) if (t := ref()) is not None]


@contextmanager
def undisturbed() -> Any:
    """Passes of packext's own in here leave `.grad` of tensors that retain it as it was."""
    tensors = [t for t in watched() if t.retains_grad]
    before = [t.grad for t in tensors]
    try:
        yield
    finally:
        for t, g in zip(tensors, before, strict=True):
            t.grad = g


class Sweep:
    """One cotangent on its way from a loss through the model, for curvature; runs inside of a pass."""

    missed = False

    def __init__(self, flight: Pass, absorb: Callable[[Source, Factored], None]) -> None:
        """Hand the merged form of every parameter that the cotangent reaches to `absorb`."""
        self.flight, self.absorb = flight, absorb
        wants = wants_of([f.context for f in flight.heard if f.context.curvature])
        self.gathering = Gathering(wants, frees=False)

    def visit(self, use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None]) -> None:
        """The cotangent arrives at a tap."""
        for source, forms in self.gathering.add(use, saved, gs, self.flight.records):
            self.absorb(source, merge(forms))

    def send(self, edges: Any, cotangents: list[Tensor], targets: Any = (TARGET,)) -> Sequence[Tensor | None]:
        """Send `cotangents` from `edges` to all taps, or as far as `targets`; what arrives there."""
        with meanwhile(sweep=self):
            for record in self.flight.records:
                unshard(record)
            with kept_apart(self.flight.records), due_to(()):  # what is wrong down there may be so for all
                arrived = send(edges, cotangents, targets, torch.is_grad_enabled())
        for source, _, forms in self.gathering.rest():
            self.absorb(source, merge(forms))
        return arrived


class Look(Sweep):
    """A cotangent of which is kept what arrives at some nodes, and nothing that arrives at taps."""

    def __init__(
        self, flight: Pass, nodes: Iterable[Any], check: Callable[[Use, Sequence[Tensor]], None] | None = None
    ) -> None:
        """Look at autograd's `nodes`: `found` has the gradients at the outputs of those that are reached.

        Args:
            flight: the backward pass under way.
            nodes: what to look at.
            check: called with the use of every tap that is reached, and what the tap kept.
        """
        super().__init__(flight, lambda source, form: None)
        self.nodes, self.check = nodes, check
        self.found: dict[Any, tuple[Tensor | None, ...]] = {}

    def visit(self, use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None]) -> None:
        """The cotangent arrives at a tap."""
        if self.check is not None:
            self.check(use, saved)

    def send(self, edges: Any, cotangents: list[Tensor]) -> None:
        """Send `cotangents` from `edges`, and look."""
        hooks = [node.register_prehook(functools.partial(self._note, node)) for node in self.nodes]
        try:
            super().send(edges, cotangents)
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, node: Any, gs: tuple[Tensor | None, ...]) -> None:
        if here().probe is None:  # which starts from within, where a gate is passed for the first time
            self.found[node] = gs


def _passes_by(record: Record) -> bool:
    """Whether the pass makes a graph of derivatives by inputs alone: it is no backward pass, but a part of the loss."""
    if here().inner or not torch.is_grad_enabled():
        return False
    if any(will_accumulate(source.tensor) for source in record.parameters()):
        return False
    record.aside = here().aside = torch._C._current_graph_task_id()
    return True


def arrive(
    use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None], sums: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A tap was reached; `sums` are gradients of its parameters that are known already."""
    device = TARGET.device.type if not saved else saved[0].device.type
    if autocasts(device):  # backward() was called where the forward pass ran: sums stay in float32
        with torch.autocast(device, enabled=False):
            return _arrive(use, saved, gs, sums or {})
    return _arrive(use, saved, gs, sums or {})


def _arrive(
    use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None], sums: dict[str, Tensor]
) -> dict[str, Tensor]:
    state = here()
    if not state.own(use):
        return {}
    if state.probe is not None:
        state.probe.visit(use, saved, gs)
        return {}
    if state.sweep is not None:
        state.sweep.visit(use, saved, gs)
        return {}
    flight = _current(use.record)
    if not flight.by_sample:
        return {}
    return flight.visit(use, saved, gs, sums)


@due_to(())  # unless it is said in there: curvature may come here first
def enter(record: Record, g: Tensor | None = None) -> None:
    """A gate was reached, by the gradient `g` if it is known: a backward pass enters an extended model."""
    state = here()
    if state.probe is not None or _passes_by(record) or not state.listening or state.within:
        return
    if state.aside == torch._C._current_graph_task_id():
        raise PackextError(
            "A pass with create_graph=True computes gradients of the parameters of one extended model, and passes "
            "through another to its inputs alone, of which nothing was looked at. Extend a module that holds both, or "
            "run the pass inside of `with px.disable():`."
        )
    if g is not None and is_legacy_batchedtensor(g):
        raise PackextError(
            "A pass with several gradients at once (is_grads_batched=True, vectorize=True) inside of a context: "
            "quantities are of one. Ask for one gradient at a time, or run it inside of `with px.disable():`."
        )
    gates = record.awaited_gates()
    flight = _current(record) if state.sweep is None else state.sweep.flight
    awaits = record.awaits_outputs(gates)
    known = (len(flight.losses), len(flight.uneven), len(flight.inside), len(flight.records), flight.spread, awaits)
    passed = (record.token, gates, *known, state.sweep is None)
    if passed in flight.passed or state.sweep is not None and record in flight.records and gates <= record.probed:
        return  # all that is refused was looked at in this pass
    contexts = [f.context for f in flight.heard]
    _alone(record, flight)
    refuse_tensors(record, contexts)
    refuse_moved(record)
    if any(i in record.strays for i in gates):
        raise PackextError(
            f"The extended model returned a value made of parameters alone ({', '.join(record.strays.values())}), and "
            "the loss depends on it: its gradient belongs to no sample. Combine it with the data inside of forward, or "
            "compute it outside of the model. If it is made of data, they came in a way that packext does not see: "
            "through NumPy, a list of numbers, or together with the parameter in a torch.func transform or TorchScript."
            f"{after_distributed(record)}"
        )
    if record not in flight.records:
        if state.sweep is None and record.born == flight.task:
            refuse_run_again(record, flight)
        flight.records.append(record)
        if state.sweep is None:
            _agree(record, gates)
    refuse_curvature(record, gates, contexts)
    refuse_divided(record, contexts)
    if not flight.by_sample and flight.spread:
        return
    for why, sources, _ in record.refused:
        if any(flight.wants(source.tensor) and will_accumulate(source.tensor) for source in sources):
            raise UnsupportedUseError(why)
    record.settle(gates)
    if record.n == 0:
        raise PackextError(record.without_samples())
    if state.sweep is not None and gates <= record.probed:
        return  # what follows was seen to when the pass around this one, or the first sweep, came here
    if any(c.accumulate for c in contexts) and state.sweep is None:
        refuse_inputs_alone(record)
        for c in contexts:
            refuse_apart(record, (source for source, _ in c._before.values()))
    flight.inside |= losses_inside(record, gates)
    if (flight.losses or not flight.inside) and not record.awaits_outputs(gates):
        flight.check(record.n)
    waiting = [q for c in contexts for q in (*c.spreading, *c.hessian)]
    if state.sweep is None and waiting and not (flight.spread or flight.inside):
        asked = ", ".join(type(q).__name__ for q in waiting)
        with due_to(waiting):
            if (name := awaited_loss()) is not None:
                raise PackextError(
                    f"{asked} asked for, and the gradient came to the model by another term first than the extended "
                    f"{name}: nothing is known of that term's curvature. Compute the whole loss in one nn.Module with "
                    "an attribute `reduction` ('mean' or 'sum') and extend that, or call backward() of the extended "
                    "loss by itself."
                )
            raise NotExtendedError(
                f"{asked} asked for, but the backward pass came through no extended loss. Use "
                "loss_fn = px.extend(nn.CrossEntropyLoss()), applied to the extended model's output. A loss of your "
                "own is an nn.Module with an attribute `reduction` ('mean' or 'sum') and without parameters; others "
                "are taken for models. One that is a function goes into the forward of such a module."
            )
    modules, shared = record.modules(), record.extension.shared
    first = all(r is record or r.extension.shared is not shared for r in flight.records)
    unseen(record, record.extended() if first else modules, flight.wants)
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            refuse_static(module)
    refuse_opacus(modules)
    if record.batch_statistics and record.n > 1:
        raise CoupledSamplesError(
            f"BatchNorm uses the statistics of the batch in {', '.join(record.batch_statistics)}: samples influence "
            "each other, and individual gradients are not defined. Call model.eval() (or .eval() on these layers, with "
            "track_running_stats=True), or replace them by GroupNorm."
        )
    refuse_again(record, gates, contexts)
    if flight.bounded:
        refuse_unbounded(record, flight.bounded, flight.wants)
    if not gates <= record.probed:
        probe(record, gates, functools.partial(_send_probe, record))
        record.probed |= gates
    flight.passed.add(passed)


def _alone(record: Record, flight: Pass) -> None:
    """Refuse two threads at one model: looking at it sets gradients and hooks of its parameters aside for a while."""
    shared = record.extension.shared
    other = shared.flight()
    if other is not None and other.among is not flight.among and other.task in other.among:
        raise PackextError(
            f"Two threads have backward passes through one extended model ({type(record.root()).__name__}) in contexts "
            "at the same time. Give each thread a copy (copy.deepcopy), or have them wait for each other "
            "(threading.Lock around forward and backward)."
        )
    shared.flight = weakref.ref(flight)


def compare(gate: Any, g: Tensor) -> None:
    """The gradient `g` at a gate is known: curvature of no more than a part of what it comes from is refused."""
    state = here()
    if not state.heard or state.within:
        return
    if gate.record.aside == torch._C._current_graph_task_id():
        return  # a derivative by inputs, of which the loss is yet to be made
    flight = _current(gate.record)
    if not flight.whole:
        return
    if flight.inside and not g.dim():
        alone = only_losses(gate, flight.inside)
    else:
        known, wide = flight.accounted.pop(gate, torch.zeros_like(g)), torch.promote_types(g.dtype, torch.float32)
        rest, size = (torch.linalg.vector_norm(t, dtype=wide) for t in (g - known, g))
        alone = not rest > torch.finfo(g.dtype).eps ** 0.5 * size  # what is not a number tells nothing
    if not alone:
        asked = ", ".join(dict.fromkeys(type(q).__name__ for q in flight.whole))
        with due_to(flight.whole):
            raise PackextError(
                f"{asked} asked for, and other terms than extended losses contribute to the gradient at an output "
                f"{list(g.shape)} of the model: nothing is known of their curvature. Compute the whole loss in one "
                "nn.Module with an attribute `reduction` ('mean' or 'sum') and extend that, or call backward() of the "
                "extended loss by itself."
            )


def _agree(record: Record, gates: frozenset[int]) -> None:
    """Where parameters are sharded, each inner pass gathers them: all ranks probe, or none, and with as many passes."""
    group = sharding(record.modules())
    if group is None:
        return
    record.settle(gates)
    heard = everyone((record.n, known(record, gates)), group)
    if all(seen for _, seen in heard):
        return
    counts = [n for n, _ in heard]
    if 0 in counts and record.n:  # without any, there is an error that says more
        raise PackextError(
            f"The ranks that share this model's parameters (FSDP2) have {counts} samples, and this structure of the "
            "model is probed now, which takes one on each at least. Give each rank a sample, or make no pass on any."
        )
    record.among, record.rounds = group, max(len(separating(n)) for n in counts)


def loss_seen(name: str, reduction: str, g: Tensor, inside: Any = None, uneven: Callable[[], str] = str) -> Pass | None:
    """An extended loss was reached; the pass that did, if a context listens.

    Args:
        name: of its class.
        reduction: of the loss.
        g: the gradient that arrived.
        inside: its mark, if the model computed it.
        uneven: tells why samples change what others add to it, if they do.

    Returns:
        The pass; None if nobody listens, or what the model computed is no loss, but a step on the way to one.
    """
    state = here()
    if not state.heard:
        return None
    flight = _current(None)
    if inside is not None and inside not in flight.inside:
        return None
    flight.losses.append((name, reduction, g))
    if flight.bounded and (why := uneven()):
        flight.uneven.append(why)
    return flight


def refuse_coupled(why: str, g: Tensor) -> None:
    """A value that couples samples was reached."""
    if here().listening:
        raise CoupledSamplesError(why)


def _current(record: Record | None) -> Pass:
    task, state = torch._C._current_graph_task_id(), here()
    for key in (task, record.born if record is not None else task):
        if key in state.passes and tuple(f.context for f in state.passes[key].heard) == state.hearing:
            return state.passes[key]
    if any(context._strange() for context in state.hearing):
        raise PackextError(
            "A backward pass of one asyncio task while the context of another is open, on one thread: it would be "
            "heard there. Leave the context before the next await, or run each in a thread of its own "
            "(asyncio.to_thread)."
        )
    state.passes[task] = Pass(state.hearing, state.passes)
    return state.passes[task]


def _send_probe(
    record: Record, run: Probe | Check | Owners, edges: Any, cotangents: Any, targets: Any
) -> Sequence[Tensor | None]:
    unshard(record)
    with meanwhile(probe=run), kept_apart([record]), undisturbed():
        return send(edges, cotangents, targets)


def send(edges: Any, cotangents: Any, targets: Any, graph: bool = False) -> Sequence[Tensor | None]:
    try:
        with meanwhile(part=not any(target is TARGET for target in targets)):
            return torch.autograd.grad(
                edges, targets, cotangents, retain_graph=True, create_graph=graph, allow_unused=True
            )
    except RuntimeError as error:
        if isinstance(error, PackextError):
            raise
        if "storage of size 0" in str(error) or "data is not allocated" in str(error):
            raise UnsupportedUseError(
                "Parameters that FSDP2 has sharded again are not there for a pass that looks at samples or carries "
                "curvature. Call px.extend on the module that is sharded, or on one around it. Of a "
                "loss made of derivatives by the inputs, FSDP2 has no gradient: take DistributedDataParallel."
            ) from error
        if "selective activation checkpoint" in str(error):
            raise UnsupportedUseError(
                "A part of the extended model is under selective activation checkpointing, which keeps what it saves "
                "for one pass alone, and a pass that looks at samples or carries curvature is another. Leave out "
                "context_fn=... of torch.utils.checkpoint.checkpoint."
            ) from error
        if "compatible with .grad()" not in str(error):  # so say torch and who has copied it
            raise
        raise UnsupportedUseError(HIDDEN) from error


def probe_inputs(edge: Any, targets: Any, cotangent: Tensor) -> Sequence[Tensor | None]:
    """Gradients at `targets` of a cotangent at `edge`, unseen by taps and contexts."""
    with silence():
        return send(edge, cotangent, targets)


def slopes(edge: Any, targets: Any, cotangent: Tensor) -> Sequence[Tensor | None]:
    """As `probe_inputs`, as functions of the cotangent, which requires grad: what they are linear in."""
    with silence(), torch.enable_grad():
        return torch.autograd.grad([edge], targets, [cotangent], create_graph=True, allow_unused=True)


@contextmanager
def kept_apart(records: Iterable[Record]) -> Any:
    """In here `.grad` of parameters is not there: some Functions accumulate it by a backward() of their own."""
    modules = [module for record in records for module in record.modules()]
    parameters = [p for module in modules for p in module._parameters.values() if p is not None and p.is_leaf]
    before, waiting = [p.grad for p in parameters], not_reduced(modules)
    for p in parameters:
        p.grad = None
    for holder, name, _ in waiting:
        setattr(holder, name, None)
    try:
        yield
    finally:
        for p, g in zip(parameters, before, strict=True):
            p.grad = g
        for holder, name, g in waiting:
            setattr(holder, name, g)
