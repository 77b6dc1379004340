"""Where data decides anew in each pass which rows go where: whose each row is now, by three cotangents.

The probe has found before that a structure keeps samples apart, with many cotangents. What may differ in the next
pass is where the rows are. One cotangent of all samples, and the same one with a weight for each sample, tell: at
every tap a row of the second is its sample's weight times the row of the first. A row that is no multiple of it, by a
weight that there is, belongs to several samples, or the plan does not hold: then all is probed again. The third has
other weights, as a row of two samples may by chance be a multiple by the weight of another one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from packext._layout import Layout, Scattered
from packext._use import TARGET, Use

#: Relative errors of rows that rounding may leave in a backward pass; other types are probed anew.
ROUNDING = {torch.float64: 1e-8, torch.float32: 3e-4}

#: Numbers that are kept of a row: its products with as many random vectors.
PRODUCTS = 3


class Owners:
    """Both cotangents on their way."""

    compare: int | None = None

    def __init__(self, n: int, layouts: dict[int, tuple[Layout | None, ...]], generator: torch.Generator) -> None:
        """Expect the layouts of a plan, by the uses' ids, of `n` samples."""
        self.n, self.layouts, self.generator = n, layouts, generator
        self.weights: Tensor | None = None
        self.agrees = True
        self.found: dict[int, list[Layout | None]] = {}
        self._products: dict[tuple[int, int], Tensor] = {}
        self._left: set[tuple[int, int]] = set()
        self._vectors = torch.empty(0, PRODUCTS)

    def visit(self, use: Use, saved: Sequence[Tensor], gs: Sequence[Tensor | None]) -> None:
        """A gradient arrives at a tap."""
        layouts = self.found.get(id(use)) or self.layouts.get(id(use))
        self.agrees &= layouts is not None and use.record.n == self.n
        if layouts is None or not self.agrees:
            return
        for i, (g, layout) in enumerate(zip(gs, layouts, strict=True)):
            if g is None:
                self.agrees &= (id(use), i) not in self._left
                continue
            self.agrees &= g.dtype in ROUNDING and layout is not None and layout.axis is not None
            if layout is None or layout.axis is None or not self.agrees:
                return
            if not isinstance(layout, Scattered) and g.shape[layout.axis] % self.n:
                self.agrees = False
                return
            products = self._of_rows(layout, g)
            if self.weights is None:
                self._products[id(use), i] = products
                continue
            self._left.discard((id(use), i))
            before = self._products.get((id(use), i))
            here = None if before is None else self._whose(layout, before, products, ROUNDING[g.dtype])
            if here is None:
                self.agrees = False
                return
            self.found.setdefault(id(use), list(use.layouts or layouts))[i] = here

    def weigh(self) -> Tensor:
        """A weight for each sample of the next cotangent, 1 / n apart, in an order of its own."""
        self._left = set(self._products)
        self.weights = 0.5 + (torch.randperm(self.n, generator=self.generator).double() + 0.5) / self.n
        return self.weights

    def holds(self) -> bool:
        """Whether every row that arrived with the first cotangent did with this one, and has its sample."""
        return self.agrees and not self._left

    def _of_rows(self, layout: Layout, g: Tensor) -> Tensor:
        """`[rows, PRODUCTS]`; where the layout is plain, all that is a sample's is one row."""
        if isinstance(layout, Scattered):
            assert layout.axis is not None
            rows = g.movedim(layout.axis, 0)[..., None].flatten(1)
        else:
            rows = layout.by_sample(g)
        more = rows.shape[1] - len(self._vectors)
        if more > 0:
            self._vectors = torch.cat([self._vectors, torch.randn(more, PRODUCTS, generator=self.generator)])
        return rows @ self._vectors[: rows.shape[1]].to(rows)

    def _whose(self, layout: Layout, first: Tensor, second: Tensor, rounding: float) -> Layout | None:
        """The layout as it is now; None if a row is no sample's."""
        assert self.weights is not None
        weights = self.weights.to(first)
        size = first.square().sum(1)
        slack = rounding * (size.sqrt() + rounding * size.max().sqrt()) if len(size) else size
        if isinstance(layout, Scattered) and layout.possible:  # of the cotangent before
            owner = layout.owner
        elif isinstance(layout, Scattered):
            ratio = (first * second).sum(1) / size.where(size > 0, torch.ones_like(size))
            owner = (ratio[:, None] - weights).abs().argmin(1)
        else:
            owner = torch.arange(self.n, device=first.device)
        if not bool(((second - weights[owner, None] * first).norm(dim=1) <= slack).all()):
            return None
        if not isinstance(layout, Scattered):
            return layout
        assert layout.axis is not None
        whose = torch.nn.functional.one_hot(owner, self.n).bool() | (size == 0)[:, None]
        return Scattered(layout.axis, self.n, possible=[whose])


def whose_now(
    uses: Sequence[Use],
    layouts: Sequence[tuple[Layout | None, ...] | None],
    edges: Sequence[Any],
    starts: Sequence[tuple[Tensor, Layout]],
    send: Callable[..., Any],
    generator: torch.Generator,
) -> bool:
    """Find whose the rows are at each tap, and tell the uses.

    Args:
        uses: of the record.
        layouts: of each use in the plan; None for those that its pass did not reach.
        edges: of the graph where the cotangents start.
        starts: a cotangent of all samples at each of them, and where its samples are.
        send: runs an inner pass.
        generator: of weights and random vectors.

    Returns:
        Whether the plan holds. If not, nothing has changed.
    """
    n = uses[0].record.n if uses else 0
    spacing = 10 * max((ROUNDING.get(t.dtype, 1.0) for t, _ in starts), default=1.0)
    if n < 2 or n * spacing > 1:
        return False
    expected = {id(use): found for use, found in zip(uses, layouts, strict=True) if found is not None}
    run = Owners(n, expected, generator)
    send(run, edges, [t for t, _ in starts], [TARGET])
    if not run.agrees:
        return False
    for _ in range(2):  # a row of several samples may look like one of another sample once, by chance
        weights = run.weigh()
        send(run, edges, [t * at.spread(weights, t).to(t) for t, at in starts], [TARGET])
        if not run.holds():
            return False
    for use in uses:
        if id(use) in run.found:
            use.layouts = tuple(run.found[id(use)])
    return True
