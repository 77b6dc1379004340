"""The backward pass in flight: what arrives at gates and taps, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from packext._errors import CoupledSamplesError, PackextError, UnsupportedUseError
from packext._factored import Factored, merge
from packext._probe import Probe, probe
from packext._use import Source, Use, live_nodes

if TYPE_CHECKING:
    from packext._backpack import backpack
    from packext._record import Record

#: Contexts, the innermost last. Backward passes of CUDA run on other threads, so this is global.
CONTEXTS: list[backpack] = []
_probe: Probe | None = None
_pass: Pass | None = None


class Pass:
    """One backward pass inside a context."""

    def __init__(self, context: backpack) -> None:
        """Start when the first gate is passed."""
        self.context = context
        self.task = torch._C._current_graph_task_id()
        self.fired: set[int] = set()
        self.uses: list[Use] = []
        self.held: dict[int, list[Factored]] = {}
        self.seen: dict[int, tuple[Source, Use]] = {}
        self.emitted: set[int] = set()
        self.records: list[Record] = []
        self.losses: list[tuple[str, str, Tensor | None]] = []
        self.values: dict[int, tuple[Source, dict[str, Any]]] = {}
        self.asks: dict[int, dict[int, Any]] = {}
        self.owners: dict[int, tuple[Any, set[int]]] = {}
        torch.autograd.Variable._execution_engine.queue_callback(self.finish)

    def visit(self, use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """A pair arrives; emit what is complete, and return sums of rows that may serve as `.grad`."""
        if use.layouts is None:
            raise PackextError(
                f"A gradient reached {use.describe()} without passing through an output of the extended model. "
                "Return from forward whatever the loss is computed from."
            )
        self.fired.add(id(use))
        self.uses.append(use)
        touched: dict[int, Source] = {}
        for source, form in use.factors(saved, gs):
            key = id(source.tensor)
            done = self.held.setdefault(key, [])
            if key in self.emitted:
                raise PackextError(
                    f"{source.name} is used inside and outside of a region under reentrant checkpointing "
                    f"({use.describe()}). Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
                )
            if done and done[0].n != form.n:
                raise PackextError(
                    f"{source.name} meets {done[0].n} samples in one use and {form.n} in another ({use.describe()}). "
                    "Run one backward pass per batch."
                )
            done.append(form)
            touched[key] = source
            self.seen[key] = (source, use)
        delivered: dict[str, Tensor] = {}
        for key, source in touched.items():
            if self._awaited(source.tensor):
                continue
            forms = self.held.pop(key)
            self.emitted.add(key)
            direct = next((k for k, s in use.sources.items() if s == (source,) and len(forms) == 1), None)
            value = dict(zip(use.names, saved, strict=True))[direct] if direct else None
            deliver = value is not None and value.is_leaf and use.rule.delivers
            total = self.context._emit(self, source, use, merge(forms), deliver)
            if deliver and total is not None and direct is not None:
                delivered[direct] = total.reshape(source.tensor.shape).to(source.tensor.dtype)
        return delivered

    def _awaited(self, parameter: Tensor) -> bool:
        return any(
            id(node.use) not in self.fired and torch._C._will_engine_execute_node(node) for node in live_nodes(parameter)
        )

    def finish(self) -> None:
        """The backward pass is over."""
        global _pass
        if _pass is self:
            _pass = None
        # Uses that were waited for, and got no gradient after all.
        for key, forms in self.held.items():
            self.context._emit(self, *self.seen[key], merge(forms), False)
        self.context._land(self)


def activations_only() -> bool:
    """Whether no parameter's gradient is wanted from the pass that runs."""
    return _probe is not None and _probe.compare is None


def arrive(use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """A tap was reached."""
    if _probe is not None:
        _probe.visit(use, saved, gs)
        return {}
    if not _listening():
        return {}
    return _current(use.record).visit(use, saved, gs)


def enter(record: Record, stray: bool) -> None:
    """A gate was reached: a backward pass enters an extended model."""
    if _probe is not None or not _listening():
        return
    if stray:
        raise PackextError(
            f"The extended model returned a value made of parameters alone ({', '.join(record.strays)}), and the loss "
            "depends on it: its gradient belongs to no sample. Combine it with the data inside of forward, or "
            "compute it outside of the model."
        )
    flight = _current(record)
    if record not in flight.records:
        flight.records.append(record)
    if record.n == 0:
        reason = "the batch is empty" if record.sized else f"no input tensor has an axis {record.batch_axis}"
        raise PackextError(f"Per-sample quantities need samples: {reason}. Pass the batch to the extended model.")
    flight.context._check(flight, record.n)
    if record.ready:
        return
    if record.batch_statistics and record.n > 1:
        raise CoupledSamplesError(
            f"BatchNorm uses the statistics of the batch in {', '.join(record.batch_statistics)}: samples influence each "
            "other, and individual gradients are not defined. Call model.eval() (or .eval() on these layers), or replace "
            "them by GroupNorm."
        )
    _unseen(record)
    probe(record, _send)
    record.ready = True


def _unseen(record: Record) -> None:
    """Refuse parameters that the gradient will reach although no use of them was seen."""
    root = record.root()
    known = {id(s.tensor) for s in record.parameters()}
    missed = [
        name
        for name, p in (root.named_parameters() if root is not None else ())
        if p.requires_grad and id(p) not in known and not live_nodes(p) and _will_accumulate(p)
    ]
    if missed:
        raise UnsupportedUseError(
            f"A gradient will reach {', '.join(missed)}, but packext saw no use of it: it was combined with other values "
            "before the extended model ran, or outside of it. Do so inside of forward."
        )


def _will_accumulate(parameter: Tensor) -> bool:
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient autograd.grad returns: it is executed
        return True


def loss_seen(name: str, reduction: str, g: Tensor) -> None:
    """An extended loss was reached."""
    if _probe is None and _listening():
        _current(None).losses.append((name, reduction, g if reduction == "none" else None))


def drop() -> None:
    """Forget a pass that did not come to its end."""
    global _pass
    _pass = None


def _listening() -> bool:
    return bool(CONTEXTS) and CONTEXTS[-1]._active()


def _current(record: Record | None) -> Pass:
    global _pass
    task = torch._C._current_graph_task_id()
    if _pass is not None and (_pass.task == task or (record is not None and record.born == _pass.task)):
        return _pass
    _pass = Pass(CONTEXTS[-1])
    return _pass


def _send(run: Probe, edges: Any, cotangents: Any, targets: Any) -> Sequence[Tensor | None]:
    with _probing(run):
        return torch.autograd.grad(edges, targets, cotangents, retain_graph=True, allow_unused=True)


@contextmanager
def _probing(run: Probe) -> Any:
    global _probe
    _probe, before = run, _probe
    try:
        yield
    finally:
        _probe = before
