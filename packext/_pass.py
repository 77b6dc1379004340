"""One backward pass: what is gathered of it, and what each context that hears it has made of that."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from packext._factored import Factored, merge
from packext._gathering import Gathering
from packext._listening import here
from packext._refusals import anchored, beneath_weight_norm, will_accumulate
from packext._statistics import Statistics
from packext._use import Source, Use

if TYPE_CHECKING:
    from packext._backpack import backpack
    from packext._quantity import Quantity
    from packext._record import Record

_MISSING = object()


def wants_of(contexts: Sequence[backpack]) -> Callable[[Tensor], bool]:
    """Tells of a parameter whether one of `contexts` wants it."""
    if len(contexts) == 1:
        return contexts[0]._wants
    return lambda parameter: any(c._wants(parameter) for c in contexts)


def aimed_at(parameter: Tensor) -> bool:
    """Whether the pass under way is to give the gradient of `parameter`, and does not only come by (inputs=...)."""
    return parameter.requires_grad and (here().aimed or will_accumulate(parameter))  # all are, without inputs=...


class End:
    """Called by autograd when a pass has ended well, and let go of in any case."""

    def __init__(self, flight: Pass) -> None:
        """Stand for the end of `flight`."""
        self.flight = flight

    def __call__(self) -> None:
        self.flight.finish()

    def __del__(self) -> None:
        self.flight.over()


class Pass:
    """One backward pass as a context hears it; `also` is the same pass for the one that overhears."""

    def __init__(self, contexts: Sequence[backpack], among: dict[int, Pass], main: Pass | None = None) -> None:
        """Start when the first gate is passed, for the first of `contexts`; what they share is that of `main`.

        Args:
            contexts: that hear it.
            among: passes that have not ended, by the id of autograd's graph task; it leaves them when it ends.
            main: the same pass for the context that comes first.
        """
        self.context = contexts[0]
        self.task, self.among = torch._C._current_graph_task_id(), among
        self.graph = torch.is_grad_enabled()  # whether autograd makes a graph of the pass (create_graph=True)
        self.constants: set[Quantity] = set()  # what was computed without a graph all the same
        self.landed = False
        self.replaced: list[tuple[Tensor, str, Any]] = []
        self.wants = wants_of(contexts)
        self.bounded = [q for c in contexts for q in c.extensions if q.bounded is not None]
        tables = any(q.root[0] == "empirical" for c in contexts for q in c.curvature)
        wants = wants_of([c for c in contexts if c.by_sample])
        self.gathering = Gathering(lambda p: wants(p) and aimed_at(p), contexts[0]._tokens, tables=tables)
        self.records: list[Record] = [] if main is None else main.records
        self.passed: set[Any] = set()  # what gates have been asked about
        self.n = 0  # samples, or tokens, once a form has arrived
        self.losses: list[tuple[str, str, Tensor]] = [] if main is None else main.losses
        self.uneven: list[str] = [] if main is None else main.uneven  # why samples change what others add to a loss
        self.factors: dict[tuple[int, int], float] = {}  # to the samples' own losses, by their number and of losses
        self.asides: dict[int, dict[str, Any]] = {}
        #: With passes before: what they have found, the number of their samples, and of what there is no graph.
        self.together: tuple[dict[int, Any], int, set[Quantity]] | None = None
        self.inside: set[Any] = set()  # marks of losses that the model computed
        #: Quantities of which terms beside the extended losses would be a part, and what these losses send to gates.
        self.whole = [q for c in contexts for q in (*c.spreading, *c.hessian) if q.of_all_terms]
        self.accounted: dict[Any, Tensor] = {}
        self.values: dict[int, tuple[Source, dict[str, Any]]] = {}
        #: Whether a loss has sent its curvature, and what quantities have summed up, by parameter and quantity.
        self.spread = False
        self.sums: dict[int, tuple[Source, dict[int, Any]]] = {}
        self.measured: dict[int, tuple[Source, dict[int, Any]]] = {}
        self.asks: dict[int, dict[int, Any]] = {}
        self.owners: dict[int, tuple[Any, set[int], list[Tensor]]] = {}
        self.owned = 0  # records whose modules are among the owners
        self.also = Pass(contexts[1:], among, self) if len(contexts) > 1 else None
        if main is None:
            torch.autograd.Variable._execution_engine.queue_callback(End(self))

    @functools.cached_property
    def anchor(self) -> Tensor:
        """What leads to all parameters and inputs, for results that have no graph of their own (`constant`)."""
        parameters = [source.tensor for record in self.records for source in record.parameters()]
        inputs = [t for record in self.records for ref in record.given if (t := ref()) is not None]
        return anchored(*parameters, *inputs)

    @functools.cached_property
    def unsound(self) -> set[int]:
        """Ids of parameters of whose gradient torch has a wrong derivative."""
        gates = [ref() for record in self.records for ref, *_ in record.gates]
        return beneath_weight_norm([gate for gate in gates if gate is not None])

    @property
    def heard(self) -> tuple[Pass, ...]:
        """The pass as each context hears it."""
        return (self,) if self.also is None else (self, self.also)

    @property
    def by_sample(self) -> bool:
        """Whether what arrives at taps is wanted."""
        return any(f.context.by_sample for f in self.heard)

    def visit(
        self, use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None], sums: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """A pair arrives; emit what is complete, and return sums of rows that may serve as `.grad`.

        Args:
            use: of the tap.
            saved: what the tap kept.
            gs: gradients at its outputs.
            sums: gradients of the use's own parameters that are known already, by name.

        Returns:
            Gradients of the use's own parameters, by name.
        """
        delivered: dict[str, Tensor] = {}
        for source, forms in self.gathering.add(use, saved, gs, self.records):
            direct = next((k for k, s in use.sources.items() if s == (source,) and len(forms) == 1), None)
            value = dict(zip(use.names, saved, strict=True))[direct] if direct else None
            own = value is not None and value.is_leaf and use.rule.delivers
            deliver = own and self.context.grad and not self.context.exact_grad
            known = sums.get(direct) if own and direct else None
            total = self.emit(source, merge(forms), deliver, known)
            if deliver and total is not None and direct is not None:
                delivered[direct] = total.reshape(source.tensor.shape).to(source.tensor.dtype)
        return delivered

    def check(self, n: int) -> None:
        """Everything that can be refused before any gradient is accumulated."""
        for flight in self.heard:
            flight.context._check(flight, n)

    def emit(self, source: Source, form: Factored, deliver: bool = False, total: Tensor | None = None) -> Tensor | None:
        """All forms of a parameter have arrived: hand them on; the sum of its rows, where it may be `.grad`."""
        statistics = Statistics(form)
        if total is not None and total.dtype == form.acc:
            statistics.known["total"] = total.reshape(form.shape)
        waiting = [f for f in self.heard if f.context.by_sample and f.context._wants(source.tensor)]
        first = waiting[0] is self
        total = waiting[0].context._emit(waiting, source, statistics, deliver and first)
        return total if first else None  # `.grad` is what it would be if nobody overheard

    def finish(self) -> None:
        """The backward pass is over."""
        if not self.records:  # it came to a loss, and to no model
            return
        for source, _, forms in self.gathering.rest():
            self.emit(source, merge(forms))
        for flight in reversed(self.heard):  # who overhears is first: a hook may take `.grad` away
            flight.context._land(flight)
        self.landed = True

    def attach(self, parameter: Tensor, field: str, value: Any) -> None:
        """Attach a result before it is known that the pass will succeed."""
        self.replaced.append((parameter, field, parameter.__dict__.get(field, _MISSING)))
        setattr(parameter, field, value)

    def detach(self, parameter: Tensor, field: str) -> None:
        """Take a result of an earlier pass away, if there is one, until it is known that this pass has failed."""
        if field in parameter.__dict__:
            self.replaced.append((parameter, field, parameter.__dict__[field]))
            delattr(parameter, field)

    def forget_deleted(self, parameters: Sequence[Tensor]) -> None:
        """Let go of results that the user has deleted from these parameters."""
        for parameter in parameters:
            if id(parameter) in self.values:
                values = self.values[id(parameter)][1]
                for field in [field for field in values if not hasattr(parameter, field)]:
                    del values[field]

    def over(self) -> None:
        """Autograd has let go of the pass: take back what it has attached, if it failed."""
        self.among.pop(self.task, None)
        for parameter, field, old in () if self.landed else reversed(self.replaced):
            if old is not _MISSING:
                setattr(parameter, field, old)
            elif hasattr(parameter, field):  # not deleted by the user
                delattr(parameter, field)
        self.replaced.clear()
        self.accounted.clear()
        for flight in self.heard:
            flight.asks.clear()  # they refer to this pass, and hold activations until the garbage is collected
