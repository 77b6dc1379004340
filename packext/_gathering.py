"""Forms of per-sample gradients on their way through a backward pass, until those of a parameter are complete."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from packext._errors import PackextError
from packext._factored import Factored
from packext._layout import Layout, Tokens
from packext._refusals import HIDDEN
from packext._use import Source, Use, live_nodes

if TYPE_CHECKING:
    from packext._record import Record


class Gathering:
    """The forms that arrive at taps, until those of a parameter are complete."""

    def __init__(
        self,
        wants: Callable[[Tensor], bool],
        tokens: Callable[[Record], Tokens | None] = lambda record: None,
        frees: bool = True,
        tables: bool = False,
    ) -> None:
        """Start empty.

        Args:
            wants: tells of which parameters forms are wanted.
            tokens: those of a forward pass, if they are to take the place of its samples.
            frees: whether autograd frees its graph behind the pass.
            tables: whether it is asked which rows of tables were read, when all forms of a parameter are there.
        """
        self.frees, self.tables = frees, tables
        self.wants, self.tokens = wants, functools.cache(tokens)
        self.fired: set[int] = set()
        self.held: dict[int, list[Factored]] = {}
        self.seen: dict[int, tuple[Source, Use]] = {}
        self.emitted: set[int] = set()

    def add(
        self, use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None], records: Sequence[Record]
    ) -> list[tuple[Source, list[Factored]]]:
        """A pair arrives at a tap.

        Args:
            use: of the tap.
            saved: what the tap kept.
            gs: gradients at its outputs.
            records: of the forwards that the backward pass has entered.

        Returns:
            Parameters that wait for no other of their uses, each with its forms, one per use.
        """
        self.fired.add(id(use))
        complete = []
        for key, source in self.take(use, saved, gs, records=records).items():
            if self._awaited(source.tensor):
                # By the time the others arrive, autograd has freed the way back from a value to its parameters.
                if self.frees:
                    self.held[key] = [form.without_graph(self.tables) for form in self.held[key]]
                continue
            self.emitted.add(key)
            complete.append((source, self.held.pop(key)))
        return complete

    def take(
        self,
        use: Use,
        saved: Sequence[Tensor],
        gs: Sequence[Tensor | None],
        layouts: Sequence[Layout | None] | None = None,
        *,
        records: Sequence[Record],
    ) -> dict[int, Source]:
        """Hold the forms of a pair, with the samples in these `layouts`, else where they were told apart.

        Returns:
            Parameters that have got one, by id.

        Raises:
            PackextError: if it came another way than the samples were told apart on, or of two batches.
        """
        if not any(self.wants(source.tensor) for group in use.sources.values() for source in group):
            return {}
        record, known = use.record, use.layouts
        if known is None or record not in records:
            raise PackextError(use.bypassed())
        if any(g is not None and layout is None for g, layout in zip(gs, known, strict=True)):
            raise PackextError(
                f"A gradient reached an output of {use.describe()} at which none arrived when the samples were told "
                "apart. The model's path must not depend on anything but its inputs' shapes: please report it."
            )
        touched: dict[int, Source] = {}
        for source, form in use.factors(saved, gs, self.tokens(record), layouts):
            if not self.wants(source.tensor):
                continue
            key = id(source.tensor)
            done = self.held.setdefault(key, [])
            if key in self.emitted:
                raise PackextError(f"{source.name} is used there and elsewhere ({use.describe()}). {HIDDEN}")
            if done and done[0].n != form.n:
                raise PackextError(
                    f"{source.name} meets {done[0].n} samples in one use and {form.n} in another ({use.describe()}). "
                    "Run one backward pass per batch."
                )
            done.append(form)
            touched[key] = source
            self.seen[key] = (source, use)
        return touched

    def _awaited(self, parameter: Tensor) -> bool:
        return any(
            id(node.use) not in self.fired and torch._C._will_engine_execute_node(node)
            for node in live_nodes(parameter)
        )

    def rest(self) -> list[tuple[Source, Use, list[Factored]]]:
        """Parameters with uses that were waited for, and got no gradient after all."""
        return [(*self.seen[key], forms) for key, forms in self.held.items()]
