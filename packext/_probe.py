"""Once per structure: does the pass keep samples apart, where do they sit, and are the rules right?

Cotangents that are non-zero for some samples only are sent from the model's outputs through its graph, so
chosen that every sample is once sent without every other. At every tap, rows of other samples that are not
zero mean that samples influence each other, or that the batch axis was taken wrongly; the layouts that agree
are kept. The last cotangent belongs to one sample alone, and what the rules make of it is compared with
autograd's gradient of every parameter. What is found is tried again, by one cotangent, in later passes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from packext._errors import CoupledSamplesError, PackextError, WrongRuleError
from packext._layout import Layout, Scattered, candidates, separating
from packext._owners import whose_now
from packext._refusals import awaited, refuse_replaced
from packext._shards import group_of, is_distributed, part
from packext._union import everyone
from packext._use import AIM, TARGET, Source, Use

if TYPE_CHECKING:
    from packext._record import Record, Slope

#: Relative disagreement between a rule and autograd beyond which the model is refused.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}
#: That of float32 on CUDA: unless told not to, convolutions and recurrent layers of cuDNN round factors to 11 bits.
TF32 = 2e-2


class Probe:
    """One cotangent on its way: collects what arrives at the taps."""

    def __init__(self, n: int, members: Tensor, compare: int | None, scattered: bool) -> None:
        """Send a cotangent of the samples in `members` `[N]`; compare the rows of sample `compare`."""
        self.n, self.members, self.compare, self.scattered = n, members, compare, scattered
        self.visited: dict[int, Use] = {}
        self.conflict: Use | None = None
        self.found: dict[int, Tensor] = {}
        self.size: dict[int, float] = {}
        self.rules: dict[int, list[Use]] = {}
        #: Whether a rule is at work, parameters whose gradient was compared, those with hooks of the user, and errors.
        self.busy = False
        self.compared: set[int] = set()
        self.hooked: set[int] = set()
        self.wrong: list[str] = []
        #: Parameters of which nothing is asked, as some of their uses have no tap.
        self.unchecked: set[int] = set()

    def visit(self, use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None]) -> None:
        """A gradient arrives at a tap."""
        if use.record.n != self.n:
            raise CoupledSamplesError(
                f"The gradient passes through two forwards of extended models with {self.n} and "
                f"{use.record.n} samples ({use.describe()}). Give both the same batch, or run one backward each."
            )
        self.visited[id(use)] = use
        if not use.options:
            use.options = [None] * len(use.outputs)
        scattered = self._scattered(use)
        for i, g in enumerate(gs):
            if g is None:
                continue
            members = self.members.to(g.device)
            options = use.options[i]
            if options is None:
                options = candidates(torch.Size(use.outputs[i]), self.n, use.record.batch_axis, scattered)
            left = [layout for layout in options if layout.agrees(g, members)]
            if self.n > 1 and use.ties.intersection(use.rule.leads):
                left = [layout for layout in left if layout == Layout(use.record.batch_axis, self.n)]
            if not left:
                self.conflict = self.conflict or use
                return
            use.options[i] = left
        if self.compare is None and self.conflict is None and not self._apart(use, saved, gs):
            self.conflict = use
        if self.compare is not None and self.conflict is None:
            settle(use)
            self.busy = True  # for a value made of parameters, it asks autograd for their gradients
            for source, form in use.factors(saved, gs):
                key = id(source.tensor)
                row = form.rows(self.compare, self.compare + 1)[0].detach()
                self.found[key] = self.found[key] + row if key in self.found else row
                size = sum(float(torch.linalg.vector_norm(g, 1)) for g in gs if g is not None)
                size *= use.rule.cancels(use, dict(zip(use.names, saved, strict=True)))
                self.size[key] = self.size.get(key, 0.0) + size
                self.rules.setdefault(key, []).append(use)
            self.busy = False

    def _scattered(self, use: Use) -> bool:
        """Whether rows of `use` may be in any order."""
        return self.scattered and (use.rooted or use.rule.tells_rows(use))

    def _apart(self, use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None]) -> bool:
        """Whether the call itself keeps samples apart, seen at what it read (no tap may stand before that).

        What the model was given itself has its samples along the batch axis; other tensors along any.

        Returns:
            Whether what arrives at each of them belongs to the samples of this probe alone.
        """
        tensors = dict(zip(use.names, saved, strict=True))
        reads = [
            k
            for k, v in tensors.items()
            if (k in use.rule.reads or k in use.ties) and k not in use.sources and v.is_floating_point()
        ]
        if not reads or self.n == 1:
            return True
        grads = use.rule.pulled(use, tensors, gs, reads)
        for name, grad in grads.items():
            if grad is None:
                continue
            options = use.read_options.get(name)
            if options is None:
                own = [Layout(use.record.batch_axis, self.n)]
                options = own if name in use.ties else candidates(grad.shape, self.n, 0, self._scattered(use))
            members = self.members.to(grad.device)
            use.read_options[name] = [layout for layout in options if layout.agrees(grad, members)]
            if not use.read_options[name]:
                return False
        return True


class Check:
    """A cotangent on its way through a graph whose layouts are known."""

    compare: int | None = None

    def __init__(self, members: Tensor) -> None:
        """Send one of the samples in `members` `[N]`."""
        self.members, self.agrees = members, True

    def visit(self, use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None]) -> None:
        """A gradient arrives at a tap."""
        for g, layout in zip(gs, use.layouts or (), strict=False):
            if g is not None and layout is not None:
                self.agrees &= layout.agrees(g, self.members.to(g.device))


def settle(use: Use) -> None:
    """Take the likeliest of the layouts left; keep what is known of outputs that only another pass reaches."""
    known = use.layouts or (None,) * len(use.options)
    use.layouts = tuple(options[0] if options else before for options, before in zip(use.options, known, strict=True))


def is_settled(use: Use) -> bool:
    """Whether the probe left nothing open, and found nothing that may differ in the next pass."""
    return all(options is None or [type(o) for o in options].count(Layout) == 1 for options in use.options)


def known(record: Record, gates: frozenset[int]) -> bool:
    """Whether a pass through these gates needs no inner pass, as one has been probed before."""
    plan = record.extension.shared.plans.get((record.structure(), gates))
    return plan is not None and not record.routed and not _is_due(plan.passes + 1)


def _is_due(passes: int) -> bool:
    """Whether the plan of so many passes is tried again: what mixes samples may do so later (a gate that was 0)."""
    return passes & (passes - 1) == 0


def probe(record: Record, gates: frozenset[int], send: Any) -> None:
    """Find the layouts of those of `record`'s uses that a backward pass will reach, and check the rules.

    Layouts of a pass before are taken, and tried by one cotangent in the second, fourth, eighth, ... pass.

    Args:
        record: whose gates are about to be passed.
        gates: which of them.
        send: runs an inner pass: `send(probe, edges, cotangents, targets) -> gradients`.

    Raises:
        CoupledSamplesError: if samples influence each other.
        WrongRuleError: if a rule disagrees with autograd.
        PackextError: if parameters were converted and converted back since the forward pass, or nothing tells the
            samples of an output apart.
    """
    key = (record.structure(), gates)
    n, plan = record.n, record.extension.shared.plans.get(key)
    passes = 1 if plan is None else plan.passes + 1
    if record.among is not None or plan is not None and not record.routed and not _adopt(record, plan):
        plan = None
    if plan is not None and not record.routed and (n == 1 or not _is_due(passes)):
        plan.passes = passes
        _same_axes(record, key, plan.places)
        return
    generator = torch.Generator().manual_seed(20250101)
    starts = _starts(record, gates, send, generator)
    if not all(start.layouts for start in starts):
        # A loss computed inside of the model: from what it was computed from, or the outputs beside it.
        inside = [
            _Start(-1 - k, edge, list(candidates(meta[0], n, record.batch_axis)), meta)
            for k, (edge, meta) in enumerate(
                (edge, meta) for loss in record.losses for edge, meta in zip(loss.edges, loss.inputs, strict=True)
            )
        ]
        starts = starts + inside if inside else _starts(record, frozenset(range(len(record.gates))), send, generator)
        starts = [start for start in starts if start.layouts]
    if plan is not None and (_follow if record.routed else _holds)(record, starts, plan, send, generator):
        plan.passes = passes  # not before: one that does not hold is tried again in the next pass
        _same_axes(record, key, plan.places)
        return
    if not starts:
        gone = [list(shape) for ref, shape, *_ in record.gates if ref() is None and n in shape]
        if gone:
            raise PackextError(
                f"The loss that the extended model returns does not tell its {n} samples apart, and the output "
                f"{gone[0]} that it returns beside it is not there any more: keep that until backward(), as in "
                "`out = model(x); out.loss.backward()`, in place of `model(x).loss.backward()`."
            )
        raise PackextError(
            f"No output of the extended model has an axis of {n} entries (the batch, axis {record.batch_axis} of its "
            f"inputs), so that nothing tells its samples apart: outputs are {_shapes(record)}. Return the outputs of "
            "the batch from forward (a loss computed inside may stand beside them) and choose rows (output[mask]) "
            "between model and loss, or give px.extend(model, batch_axis=...): None where inputs have no axis of "
            "samples, or several entries for each, and the rows of the outputs are the samples."
        )
    lone = int(torch.randint(n, (1,), generator=generator))
    cotangents_of = separating(n)
    cotangents_of += [torch.ones(n, dtype=torch.bool) for _ in range(record.rounds - len(cotangents_of))]
    cotangents_of.append(torch.arange(n) == lone)
    # Rows in any order cost masks of what passes: where data chose none, they are looked for if all else has failed.
    count = max(len(start.layouts) for start in starts)
    several = range(count if record.among is None else max(everyone(count, record.among)))
    attempts = [(k, scattered) for scattered in ((True,) if record.routed else (False, True)) for k in several]
    first: Use | None = None
    for attempt, scattered in attempts:
        chosen = [start.layouts[min(attempt, len(start.layouts) - 1)] for start in starts]
        for use in record.uses:
            use.options, use.read_options = [], {}
        conflict = None
        for members in cotangents_of:
            compare = lone if members is cotangents_of[-1] else None
            run = Probe(n, members, compare, scattered)
            run.unchecked = {id(s.tensor) for _, sources in record.half_followed(gates) for s in sources}
            edges = [start.edge for start in starts]
            sources = [] if compare is None else [s for s in record.parameters() if s.tensor.requires_grad]
            parameters = [source.tensor for source in sources]
            with nullcontext() if compare is None else _compared(run, record, sources):
                cotangents = (
                    _cotangent(s.meta, layout, members, generator) for s, layout in zip(starts, chosen, strict=True)
                )
                grads = send(run, edges, list(cotangents), [TARGET, *parameters])
            conflict = _of_all(record, run.conflict)
            if conflict is not None:
                for use in run.visited.values():
                    use.options, use.read_options = [], {}
                break
            if compare is not None:
                expected = dict(zip(map(id, parameters), grads[1:], strict=True))
                for source in sources:  # those that had no gradient, or rows after it
                    if (key_ := id(source.tensor)) not in run.compared or key_ in run.found:
                        _compare(run, record, source, expected[key_])
                if run.wrong:
                    missed = [source for source in sources if expected[id(source.tensor)] is None]
                    for edge in edges:
                        refuse_replaced(edge.node, missed)
                    raise WrongRuleError(run.wrong[0])
        if conflict is None:
            places = {start.gate: at for start, at in zip(starts, chosen, strict=True)}
            record.places.update(places)
            break
        first = first or conflict
    else:
        assert first is not None
        raise CoupledSamplesError(_coupled(record, first))
    # A use that this pass does not reach stays as it is: without layouts, or with those of another pass.
    if record.routed or all(is_settled(use) for use in record.uses):
        layouts = [use.layouts if use.options else None for use in record.uses]
        record.extension.shared.remember(key, Plan(layouts, places, passes).here(record))
    _same_axes(record, key, places)


def _same_axes(record: Record, key: Any, places: dict[int, Layout]) -> None:
    """Compare where samples are in the outputs with earlier passes of the same uses.

    Raises:
        PackextError: if it is along another axis. Where both are as long, the one that extend was told is taken, and no
            cotangent need show that it is the other.
    """
    (trail, _, uses, _), _ = key
    for (before, _), plan in record.extension.shared.plans.items():
        for gate, at in plan.places.items() if before[0] == trail else ():
            here = places[gate].axis if gate in places else None
            if here is None or at.axis is None or here == at.axis:
                continue
            if [use[:4] for use in before[2]] != [use[:4] for use in uses]:
                break
            what = f"output {list(record.gates[gate][1])}" if gate >= 0 else "what its loss was computed from"
            raise PackextError(
                f"In {what} of the extended model, the {record.n} samples are along axis {here}, and in an earlier "
                f"pass they were along axis {at.axis}. Where both axes are as long, it cannot be known which of them "
                f"has the samples. Have forward return them along axis {record.batch_axis}, as it takes them."
            )


def _of_all(record: Record, conflict: Use | None) -> Use | None:
    """Where parameters are split or sharded, every pass has exchanges: a conflict on one of the ranks is one on all."""
    group = group_of(next(iter(record.distributed.values()))[1]) if record.distributed else record.among
    if group is None:
        return conflict
    here = -1 if conflict is None else next(k for k, use in enumerate(record.uses) if use is conflict)
    found = max(everyone(here, group))
    return conflict if found < 0 or conflict is not None else record.uses[min(found, len(record.uses) - 1)]


@dataclass
class Plan:
    """What a probe found of a structure: layouts at each use (None: not reached), and at each gate it started from.

    The input of a loss computed inside counts as gate -1, -2, ... `passes` have had this structure.
    """

    layouts: list[tuple[Layout | None, ...] | None]
    places: dict[int, Layout]
    passes: int

    def here(self, record: Record) -> Plan:
        """The same for the samples of this pass; of scattered rows, without whose they were."""

        def of(layout: Layout) -> Layout:
            if isinstance(layout, Scattered):
                return Scattered(layout.axis, record.n)
            return Layout(layout.axis, record.n if layout.axis is not None else 1, layout.inner)

        layouts = [found and tuple(at and of(at) for at in found) for found in self.layouts]
        return Plan(layouts, {gate: of(at) for gate, at in self.places.items()}, self.passes)

    def begin(self, record: Record, starts: list[_Start]) -> list[tuple[_Start, Layout]]:
        """Where cotangents of this pass start, and where the samples are there; nothing if these are other places."""
        if {start.gate for start in starts} != self.places.keys():
            return []
        return [(s, s.layouts[0] if s.gate in record.slopes else self.places[s.gate]) for s in starts]


def _holds(record: Record, starts: list[_Start], plan: Plan, send: Any, generator: torch.Generator) -> bool:
    """Whether one cotangent finds the samples where the plan says, which `record`'s uses have adopted."""
    begin = plan.here(record).begin(record, starts)
    if not begin:  # outputs that nobody has kept in this pass: nothing to look from
        return True
    cotangents_of = separating(record.n)
    members = cotangents_of[plan.passes.bit_length() % len(cotangents_of)]
    run = Probe(record.n, members, None, scattered=False)
    for use in record.uses:
        use.options, use.read_options = [layout and [layout] for layout in use.layouts or ()], {}
    cotangents = [_cotangent(s.meta, at, members, generator) for s, at in begin]
    send(run, [s.edge for s, _ in begin], cotangents, [TARGET])
    return _of_all(record, run.conflict) is None


def _follow(record: Record, starts: list[_Start], plan: Plan, send: Any, generator: torch.Generator) -> bool:
    """Whether the plan holds, but for rows that have other places in this pass; these are found."""
    plan = plan.here(record)
    begin = plan.begin(record, starts)
    if not begin:
        return False
    everyone = torch.ones(record.n, dtype=torch.bool)
    sent = [(_cotangent(s.meta, at, everyone, generator), at) for s, at in begin]
    if not whose_now(record.uses, plan.layouts, [start.edge for start in starts], sent, send, generator):
        return False
    record.places.update(plan.places)
    return True


def _adopt(record: Record, plan: Plan) -> bool:
    plan = plan.here(record)
    for gate, layout in plan.places.items():
        if gate >= 0 and layout.axis is not None and record.gates[gate][1][layout.axis] % record.n:
            return False
    record.places.update(plan.places)
    for use, layouts in zip(record.uses, plan.layouts, strict=True):
        if layouts is None:
            continue
        known = use.layouts or (None,) * len(layouts)
        use.layouts = tuple(layout or before for layout, before in zip(layouts, known, strict=True))
        for layout, shape in zip(use.layouts, use.outputs, strict=True):
            if layout is not None and layout.axis is not None and shape[layout.axis] % record.n:
                return False
    return True


class _Start(NamedTuple):
    """A gate (its index) or the input of a loss computed inside (-1, -2, ...): the edge below it, its layouts and meta.

    Layouts are those that it allows; the meta are shape, dtype and device.
    """

    gate: int
    edge: GradientEdge
    layouts: list[Layout]
    meta: tuple[Any, ...]


def _starts(record: Record, gates: frozenset[int], send: Any, generator: torch.Generator) -> list[_Start]:
    starts = []
    for i in sorted(gates):
        ref, shape, dtype, device = record.gates[i]
        node = ref()
        if node is None:
            continue
        layouts: list[Layout] = list(candidates(shape, record.n, record.batch_axis))
        if record.n > 1 and len(shape) > record.batch_axis and shape[record.batch_axis] == record.n:
            layouts = [Layout(record.batch_axis, record.n)]  # where extend was told that they are
        elif record.n > 1 and record.n in shape:
            # Features in groups, which layers may keep apart, are no samples where an axis has N entries.
            axes = {0, record.batch_axis, *(k for k, size in enumerate(shape) if size == record.n)}
            layouts = [at for at in layouts if at.axis in axes]
        slope = record.slopes.get(i)
        if slope is not None and record.n > 1:
            layouts = [_of_input(slope, shape, record.n, send, generator)]
        function, index = node.next_functions[0]
        starts.append(_Start(i, GradientEdge(function, index), layouts, (shape, dtype, device)))
    return starts


def _of_input(slope: Slope, shape: torch.Size, n: int, send: Any, generator: torch.Generator) -> Scattered:
    """Whose the rows of an input are, by which outputs depend on them.

    Returns:
        The layout of its derivative.

    Raises:
        CoupledSamplesError: if the outputs of several samples depend on one.
    """
    whose = Scattered(0, n, possible=[torch.ones(shape[:1].numel(), n, dtype=torch.bool)])
    outputs = [(edge, meta) for edge, meta in slope.outputs if meta[0][:1] == (n,)]
    for members in separating(n) if outputs else ():
        cotangents = [_cotangent(meta, Layout(0, n), members, generator) for _, meta in outputs]
        (g,) = send(Check(members), [edge for edge, _ in outputs], cotangents, [slope.input])
        if g is not None and not whose.agrees(g.cpu(), members):
            raise CoupledSamplesError(
                f"The loss contains the derivative with respect to an input {list(shape)} of a model with "
                "batch_axis=None, and the outputs of several samples depend on one row of it: individual gradients are "
                "not defined then."
            )
    return whose


def _cotangent(meta: tuple[Any, ...], layout: Layout, members: Tensor, generator: torch.Generator) -> Tensor:
    shape, dtype, device = meta
    values = torch.rand(shape, generator=generator).mul_(2).sub_(1)
    values += torch.copysign(torch.tensor(0.5), values)  # between 0.5 and 1.5 in size
    return values.masked_fill_(~layout.spread(members, values), 0.0).to(device=device, dtype=dtype)


@contextmanager
def _compared(run: Probe, record: Record, sources: Sequence[Source]) -> Iterator[None]:
    """Compare the gradient of each parameter as it arrives, and keep neither it nor what the rules made of it."""

    def arrived(source: Source, g: Tensor | None) -> Tensor | None:
        if g is None:  # a derivative of the model is linear in it
            return None
        if run.busy or run.conflict is not None or g.layout != torch.strided or not awaited(AIM):
            return None
        run.compared.add(id(source.tensor))
        _compare(run, record, source, g)
        if is_distributed(g):
            return None
        return g.new_zeros(()).expand_as(g)

    run.hooked = {id(s.tensor) for s in sources if s.tensor._backward_hooks}
    leaves = [(s, s.tensor._backward_hooks is None) for s in sources if s.tensor.is_leaf]
    hooks = [source.tensor.register_hook(functools.partial(arrived, source)) for source, _ in leaves]
    try:
        yield
    finally:
        for hook, (source, first) in zip(hooks, leaves, strict=True):
            hook.remove()
            if first:
                source.tensor._backward_hooks = None


def _compare(run: Probe, record: Record, source: Source, truth: Tensor | None) -> None:
    """Note in `run.wrong` if the rules' gradient of one sample is not autograd's."""
    key, name = id(source.tensor), source.name
    mine = run.found.pop(key, None)
    if key in run.unchecked:
        return
    truth = None if truth is None else part(truth)
    some = truth if truth is not None else mine
    if some is None:
        return
    truth = torch.zeros_like(some) if truth is None else truth
    mine = torch.zeros_like(some) if mine is None else mine
    truth, mine = truth.detach().to_dense().to(mine.dtype), mine.to_dense()
    finite = torch.isfinite(truth) & torch.isfinite(mine)
    error = float(((truth - mine).abs() * finite).nan_to_num(0.0).max()) if truth.numel() else 0.0
    dtype = record_dtype(record, key)
    lowest, relative = torch.finfo(dtype).eps, TOLERANCE.get(dtype, 0.1)
    if dtype == torch.float32 and truth.device.type == "cuda":
        relative = TF32
    allowed = relative * float(truth.abs().nan_to_num(0.0, 0.0, 0.0).max()) if truth.numel() else 0.0
    allowed += 100 * lowest * run.size.get(key, 0.0)
    if error > allowed:
        uses = "; ".join(u.describe() for u in run.rules.get(key, [])) or "no use of it was recognised"
        why = (
            "A part of its path was not seen: parameters must enter through torch functions called while the "
            "extended model runs, and random functions must not be part of a use."
        )
        if key in run.hooked:
            why = (
                "It has a hook (Tensor.register_hook), which changes `.grad` and no individual gradient: take it "
                "off, change `.grad` after the backward pass, or leave the parameter out (parameters=...)."
            )
        run.wrong.append(
            f"The gradient of one sample that packext finds for {name} differs from autograd's by {error:.3g} "
            f"(allowed {allowed:.3g}): {uses}. {why}"
        )


def record_dtype(record: Record, key: int) -> torch.dtype:
    """The lowest precision of a parameter, the model's outputs and, under autocast, what is between them."""
    dtypes = [meta[2] for meta in record.gates] + [s.tensor.dtype for s in record.parameters() if id(s.tensor) == key]
    dtypes += [use.autocast[1] for use in record.uses if use.autocast is not None]
    return max(dtypes, key=lambda d: torch.finfo(d).eps)


def _shapes(record: Record) -> str:
    return ", ".join(str(list(shape)) for _, shape, _, _ in record.gates) or "none that require grad"


def _coupled(record: Record, use: Use) -> str:
    root = record.root()
    norms = [
        f"{path or type(m).__name__} [{type(m).__name__}]"
        for path, m in (root.named_modules() if root is not None else ())
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and (m.training or not m.track_running_stats)
    ]
    if norms:
        why = (
            f"BatchNorm uses the statistics of the batch in {', '.join(norms)}. Call model.eval() (or .eval() on "
            "these, with track_running_stats=True), or replace it by GroupNorm"
        )
    elif record.by_use:
        why = (
            "a row inside of the model (a node of a graph) serves several samples, as where an edge joins two graphs "
            "of the batch, or the code computes something over all of them"
        )
    else:
        why = (
            "the code computes something across the batch, or calls a layer on some of the samples alone (in a loop, "
            "or where a mask holds: call it on all and choose among its outputs, or px.extend(model, batch_axis=None), "
            "by which rows are whose output uses them), or returns chosen rows of all samples (output[mask]; return "
            "all, and choose between model and loss), or the samples are along another axis: then call "
            "px.extend(model, batch_axis=...)"
        )
    where = "output" if record.by_use else "input"
    return (
        f"Samples influence each other: a gradient that belongs to some of the {record.n} samples (axis "
        f"{record.batch_axis} of the {where}) reaches entries of others, or of all, at {use.describe()}, output "
        f"{[list(o) for o in use.outputs]}. Individual gradients are not defined then. Cause: {why}."
    )
