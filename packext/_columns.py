"""Columns of a root on their way through the model: one after the other, or several at once under `torch.vmap`.

What a small network's pass takes is the calls and not what they compute: several columns at once take about as long as
one. Of a large one they would take their memory. So the first column goes by itself, which tells how much arrives, and
the others as many at a time as stay within `LARGEST`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

from packext._distributed import sharding
from packext._errors import due_to
from packext._factored import Outer, accumulation_dtype, merge
from packext._flight import Sweep, kept_apart, send, undisturbed, watched
from packext._gathering import Gathering
from packext._layout import Layout
from packext._listening import meanwhile
from packext._pass import Pass, wants_of
from packext._precision import unrounded
from packext._switch import Switch
from packext._use import TARGET, Use

if TYPE_CHECKING:
    from packext._record import Record

#: Entries that arrive at taps at once, gradients and what they are multiplied with.
LARGEST = 1 << 21

#: Takes a parameter's form, whose rows are those of so many columns, one after the other.
Absorb = Callable[..., None]


def _without_fallback() -> bool:
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    return before


#: In there, torch.vmap refuses functions that it has no rule for, in place of running them one after the other.
_NO_FALLBACK = Switch(_without_fallback, functorch._set_vmap_fallback_enabled)


class _First(Sweep):
    """The first column: counts the entries at the taps, and asks whether all uses can take columns as samples."""

    def __init__(self, flight: Pass, absorb: Absorb) -> None:
        super().__init__(flight, absorb)
        self.entries, self.stacks = 0, True

    def visit(self, use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None]) -> None:
        super().visit(use, saved, gs)
        data = [t for name, t in zip(use.names, saved, strict=True) if name not in use.sources]
        self.entries += sum(t.numel() for t in (*gs, *data) if t is not None)
        self.stacks = self.stacks and _stacks(use)


def _stacks(use: Use) -> bool:
    """Whether columns may stand beside the samples, in what a tap got and kept."""
    layout = use.layouts[0] if use.layouts else None
    return use.rule.stacks and type(layout) is Layout and layout.axis == 0 and not layout.inner


class _Together:
    """Several columns under way, as one cotangent `[V, ...]`; what arrives is kept until all have passed."""

    #: Whether a part of the model ran again on the way, where no taps are placed.
    missed = False

    def __init__(self, flight: Pass, count: int) -> None:
        self.flight, self.count = flight, count
        self.arrived: list[tuple[Use, Sequence[Tensor], list[Tensor | None]]] = []

    def visit(self, use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None]) -> None:
        """The columns arrive at a tap."""
        with temporarily_pop_interpreter_stack():
            self.arrived.append((use, saved, [None if g is None else _unwrapped(g, self.count) for g in gs]))

    def send(self, edges: Any, cotangents: Sequence[Tensor]) -> bool:
        """Send `cotangents`, `[V, ...]` each; False where torch.vmap does not take what they pass."""

        def one(*each: Tensor) -> Tensor:
            send(edges, list(each), (TARGET,))
            return each[0].new_zeros(())

        try:
            with _NO_FALLBACK, meanwhile(sweep=self), kept_apart(self.flight.records), undisturbed(), due_to(()):
                torch.func.vmap(one)(*cotangents)
        except Exception:  # of whatever kind: columns that go one by one will meet it again if it is not vmap's
            return False
        return not self.missed

    def hand_on(self, absorb: Absorb, signs: Sequence[float]) -> None:
        """The merged form of every parameter that was reached: of each column, or of all where there is one sign."""
        wants = wants_of([f.context for f in self.flight.heard if f.context.curvature])
        for k, sign in enumerate(signs):
            gathering = Gathering(wants, frees=False)
            for use, saved, columns in self.arrived:
                if len(signs) == 1:
                    gathering.take(*_beside(use, saved, columns), records=self.flight.records)
                else:
                    gs = [None if c is None else c[k] for c in columns]
                    gathering.take(use, saved, gs, records=self.flight.records)
            for source, _, forms in gathering.rest():
                form, count = merge(forms), self.count if len(signs) == 1 else 1
                if len(forms) == 1 and isinstance(form, Outer):
                    form.columns = count
                absorb(sign, source, form, count)


class _Sum(Sweep):
    """A sum of columns, by itself, of which has to arrive the sum of what arrived of them at once."""

    def __init__(self, flight: Pass, weights: Tensor, together: _Together) -> None:
        super().__init__(flight, lambda source, form: None)
        self.weights, self.alike = weights, True
        self.awaited = {id(use): columns for use, _, columns in together.arrived}
        self.found: list[tuple[Tensor, float]] = []  # how far off it is, and its size; and how it may be rounded

    def visit(self, use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None]) -> None:
        for g, columns in zip(gs, self.awaited.pop(id(use), [None] * len(gs)), strict=True):
            if g is None or columns is None:
                self.alike = self.alike and g is columns
                continue
            wide = columns.to(accumulation_dtype(columns.dtype)).flatten(1)
            weights = self.weights.to(wide)
            size = (weights.abs() * torch.linalg.vector_norm(wide, dim=1)).sum()
            off = torch.linalg.vector_norm(weights @ wide - g.to(wide.dtype).flatten())
            self.found.append((torch.stack([off, size]).double(), torch.finfo(columns.dtype).eps))

    def agrees(self) -> bool | None:
        """Whether they are equal; None where what is not a number hides it."""
        if not self.alike or self.awaited:
            return False
        if not self.found:
            return True
        sizes = torch.stack([both.to(self.found[0][0].device) for both, _ in self.found]).tolist()
        if not all(map(math.isfinite, itertools.chain(*sizes))):
            return None
        largest = max(size for _, size in sizes)  # beside which others may be nothing but rounding
        slack = [eps for _, eps in self.found]
        return all(off <= max(e**0.5 * size, 64 * e * largest) for (off, size), e in zip(sizes, slack, strict=True))


def _agree(flight: Pass, edges: Any, cotangents: Sequence[Tensor], together: _Together) -> bool | None:
    """Whether torch.vmap was right of all that columns passed: of cdist's backward it is not, in 2.13.

    Args:
        flight: the pass under way.
        edges: where they have entered the graph.
        cotangents: they.
        together: what arrived of them.

    Returns:
        Whether it was; None where that cannot be told of this pass. Looked at in each pass: what runs depends on sizes.
    """
    weights = torch.randn(together.count, generator=torch.Generator().manual_seed(20261124))
    alone = _Sum(flight, weights, together)
    alone.send(edges, [torch.tensordot(weights.to(t), t, 1) for t in cotangents])
    return alone.agrees()


def _unwrapped(g: Tensor, count: int) -> Tensor:
    """What there is of a tensor under `torch.vmap`, `[V, ...]`."""
    axis = functorch.maybe_get_bdim(g)
    return g.expand(count, *g.shape) if axis < 0 else functorch.get_unwrapped(g).movedim(axis, 0)


def _beside(use: Use, saved: Sequence[Tensor], columns: Sequence[Tensor | None]) -> Any:
    """A use as of V times as many samples: those of the first column, and so on."""
    layout, g = use.layouts[0] if use.layouts else None, columns[0]
    assert layout is not None and g is not None
    count = len(g)
    wide = [
        t.expand(count, *t.shape).flatten(0, 1) if name == "input" else t
        for name, t in zip(use.names, saved, strict=True)
    ]
    return use, wide, [g.flatten(0, 1)], (replace(layout, n=count * layout.n),)


def _one_by_one(record: Record) -> bool:
    """Whether a forward pass has what does not take several columns at once, or hooks of the user's, who may look."""
    if record.extension.shared.apart or record.distributed or record.hooked or sharding(record.modules()) is not None:
        return True
    if any(module._backward_hooks or module._backward_pre_hooks for module in record.modules()):
        return True
    outputs = {node() for node, *_ in record.gates}
    return any(t._backward_hooks and t.grad_fn in outputs for t in watched())


def spread(
    flight: Pass, edges: Any, columns: Iterable[tuple[list[Tensor], float]], absorb: Absorb, stacks: bool
) -> None:
    """Send columns from `edges` to all taps.

    Args:
        flight: the pass under way.
        edges: where they enter the graph.
        columns: cotangents and the sign of each.
        absorb: called with the sign, a parameter, its form, and how many columns the form's rows are of.
        stacks: whether it takes those of several.
    """
    rest = iter(columns)
    first = next(rest, None)
    if first is None:
        return

    def alone(cotangents: list[Tensor], sign: float, kind: type[Sweep] = Sweep) -> Sweep:
        sweep = kind(flight, lambda source, form: absorb(sign, source, form, 1))
        sweep.send(edges, cotangents)
        return sweep

    ahead = alone(*first, _First)
    assert isinstance(ahead, _First)
    apart = torch.is_grad_enabled() or ahead.missed or any(_one_by_one(record) for record in flight.records)
    several = 1 if apart else LARGEST // max(1, ahead.entries)
    right: bool | None = False
    while group := list(itertools.islice(rest, max(1, several))):
        if len(group) > 1:
            together, signs = _Together(flight, len(group)), [sign for _, sign in group]
            cotangents = [torch.stack(each) for each in zip(*(c for c, _ in group), strict=True)]
            # One graph takes all of them: what is right of the first is of the others.
            right = together.send(edges, cotangents) and (right or _agree(flight, edges, cotangents, together))
            if right:
                alike = stacks and ahead.stacks and all(_stacks(use) for use, _, _ in together.arrived)
                with unrounded(group[0][0][0].device.type):  # sums stay in float32
                    together.hand_on(absorb, signs[:1] if alike and len({*signs}) == 1 else signs)
                continue
            several, flight.records[0].extension.shared.apart = 1, right is False
        for cotangents, sign in group:
            alone(cotangents, sign)
