"""Answers every question about one parameter in as few passes over its tiles as possible.

Each statistic has a direct route (from the factors) or goes through tiles of rows; tiles are formed
once and serve every statistic that asked for them, the sum of the rows (`.grad`) included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from packext import _fused, _scratch
from packext._factored import Dense, Factored, Outer, Patches
from packext._factored.outer import DOUBT, ELEMENTWISE, WRITE
from packext._scratch import release, scratch

Visitor = Callable[[Tensor], None]

#: Entries of one parameter's rows that may be in memory at once, for inner products with their sum or each other.
KEEP = 3 << 20

#: Entries of a row below which a call costs more than what it does.
SMALL = 1 << 13

_NOTHING = torch.empty(0)


def _references() -> int:
    thing = object()
    return sys.getrefcount(thing)


#: What `sys.getrefcount` says of a local name's only value: 2, or 1 where calls borrow references (Python 3.14).
NAMED = _references()

#: Outputs of all samples' rows that a tile has to hold for its product to run at full speed.
BROAD = 64


class Statistics:
    """What is known of the rows of one parameter; computed on demand, each thing once."""

    __slots__ = ("_asked", "form", "known", "route", "shared")

    def __init__(self, form: Factored) -> None:
        """Take the factored rows."""
        self.form = form
        self.known: dict[str, Tensor] = {}
        self.route: dict[str, str] = {}
        self._asked: list[str] = []
        self.shared = False  # whether somebody keeps the rows

    def apart(self) -> Statistics:
        """The same for another listener, who may write to what it gets: all that is known but the rows, copied."""
        other = Statistics(self.form)
        other.known = {want: value.clone() for want, value in self.known.items() if want != "rows"}
        return other

    def prepare(
        self,
        wants: Iterable[str],
        visitors: Iterable[Visitor] = (),
        deliver: bool = False,
        buffer: Tensor | None = None,
    ) -> None:
        """Compute `wants` (and serve `visitors`) now, sharing tiles.

        Args:
            wants: of "total", "sq_norms", "second_moment", "scatter", "gram", "rows" and "dots" (inner products
                of the rows with their sum).
            visitors: called with every tile of rows, in the order of the samples.
            deliver: the sum of the rows will be `.grad`, so it is wanted where tiles are formed anyway.
            buffer: where to write "rows", `[N, *shape]`.
        """
        self._asked = list(wants)
        missing = [w for w in dict.fromkeys(self._asked) if w not in self.known]
        visitors = list(visitors)
        asked = list(dict.fromkeys([*missing, "total"])) if deliver and "total" not in self.known else missing
        found = None if visitors else _fused.answers(self.form, asked, lambda: Statistics(self.form)._plainly(asked))
        if found is None:
            self._prepare(missing, visitors, deliver, buffer)
        else:
            self.known.update(found)
            self.route.update(dict.fromkeys(found, "kernel"))

    def _plainly(self, wants: list[str]) -> dict[str, Tensor]:
        """What the kernel would answer, by the other routes."""
        self._prepare([want for want in wants if want != "total"], [], "total" in wants, None)
        if "total" in wants and "total" not in self.known:
            self._prepare(["total"], [], False, None)
        return {want: self.known[want] for want in wants}

    def _prepare(self, missing: list[str], visitors: list[Visitor], deliver: bool, buffer: Tensor | None) -> None:
        f = self.form
        if (rows := f.all_rows()) is not None:
            self.known["rows"] = rows
            if deliver:
                self.known["total"] = rows.sum(0)
        tiled = [w for w in missing if w == "rows" and w not in self.known]
        one_term = isinstance(f, Outer) and f.s == 1
        # With the sum known, inner products with it need one tile at a time.
        sums = "dots" in missing and "total" in self.known and not one_term and "rows" not in self.known
        for want in sorted(missing, key="sq_norms".__eq__):  # last, as they are cheap where tiles are formed
            if want not in ("rows", "dots") and not self._direct(want, bool(tiled or visitors), deliver, sums):
                tiled.append(want)
        if sums and (tiled or visitors):
            tiled.append("dots")
        blocks = self._blocks() if not (visitors or "rows" in tiled) else 0
        together = "dots" in missing and not sums and not one_term and (blocks > 0 or self._keepable(KEEP))
        if tiled or visitors or (together and deliver):
            if deliver and not one_term:
                tiled.append("total")
            if together:
                tiled += ["total", "dots"]
            wanted = [w for w in dict.fromkeys(tiled) if w not in self.known]
            paired = "dots" in wanted or "gram" in wanted
            if blocks and (paired or self._broad(blocks)):
                self._by_outputs(wanted, blocks)
            else:
                self._tiles(wanted, visitors, buffer)
        if "dots" in missing and "dots" not in self.known:
            quick = self.form.dots_with_sum()
            self.known["dots"], self.route["dots"] = self.dots(self["total"]) if quick is None else quick, "factors"
        release()

    def _direct(self, want: str, tiles_run: bool, deliver: bool, dots: bool) -> bool:
        one_term = isinstance(self.form, Outer) and self.form.s == 1
        if want == "total" and tiles_run and not one_term:
            return False
        if want == "sq_norms" and self._tiles_beat_gram(tiles_run, deliver, dots):
            return False
        if want == "gram" and not (isinstance(self.form, Outer) and self.form.tokens_are_few):
            if self._keepable(2 * KEEP) or self._blocks():
                return False
        value = self.form.weighted(None) if want == "total" else getattr(self.form, want)()
        if value is None:
            return False
        self.known[want], self.route[want] = value, "factors"
        return True

    def _keepable(self, limit: int) -> bool:
        """Whether all rows may be in memory at once, being no larger than activations are."""
        return self.form.all_rows() is None and self.form.n * self.form.numel <= limit

    def _blocks(self) -> int:
        """How many outputs of all samples make a tile, for what needs all samples at once; 0: no such tiles."""
        f = self.form
        return f.outputs_at_once() if isinstance(f, Outer) and f.s > 1 and f.n and not torch.is_grad_enabled() else 0

    def _tiles_beat_gram(self, tiles_run: bool, deliver: bool, dots: bool) -> bool:
        f = self.form
        if not isinstance(f, Outer) or f.s == 1:
            return False
        inner = f.a.inner_cost if isinstance(f.a, Patches) else f.s * f.s * f.i
        gram = f.groups * (inner + f.s * f.s * (f.o + ELEMENTWISE))
        product = f.groups * f.s * f.i * f.o
        tiles = ELEMENTWISE * f.groups * f.o * f.i
        if dots:  # which then come from the tiles, too, and not from a product of their own
            gram, tiles = gram + product, 2 * tiles
        if isinstance(f.a, Patches):
            tiles += 0 if tiles_run else WRITE * f.groups * f.s * f.i
        if not (tiles_run or deliver):
            tiles += product
        return tiles < gram

    def _broad(self, step: int) -> bool:
        """Whether products for that many outputs of all samples run as fast as those for all outputs of a few."""
        f = self.form
        return isinstance(f, Outer) and not isinstance(f.a, Patches) and step >= min(f.o, BROAD)

    def _by_outputs(self, wants: list[str], step: int) -> None:
        """Tiles of all samples and some outputs: each knows its own mean, and inner products are sums over them."""
        f = self.form
        assert isinstance(f, Outer)
        known = self.known["total"].reshape(f.groups, f.o, f.i) if "total" in self.known else None
        wants = [*wants, "total"] if known is None and ("scatter" in wants or "dots" in wants) else wants
        # What has the parameter's shape is written once, by one of the tiles; sums over outputs are kept of each.
        found = {
            w: torch.empty(f.groups, f.o, f.i, dtype=f.acc, device=f.device)
            for w in ("total", "second_moment", "scatter")
            if w in wants
        }
        parts = {w: value.split(step, 1) for w, value in found.items()}
        totals = parts["total"] if "total" in found else () if known is None else known.split(step, 1)
        norms: list[Tensor] = []
        dots: list[Tensor] = []
        grams: list[Tensor] = []
        for k, rows in enumerate(f.outputs_in_scratch(step)):
            flat = rows.flatten(1)
            if "total" in found:
                torch.sum(rows, 0, out=totals[k])
            if "sq_norms" in wants:
                norms.append(torch.linalg.vector_norm(flat, dim=1))
            if "dots" in wants:
                dots.append(flat @ totals[k].flatten())
            if "gram" in wants:
                grams.append(flat @ flat.T)
            if "second_moment" in found:
                _sum_squares(rows, parts["second_moment"][k])
            if "scatter" in found:
                if "second_moment" in found:
                    spread = parts["second_moment"][k]
                else:
                    spread = _sum_squares(rows, scratch("spread", rows.shape[1:], f.acc, f.device))
                out = parts["scatter"][k]
                if not _settled(spread, totals[k], f.n, out):
                    _sum_squares(rows.sub_(totals[k], alpha=1.0 / f.n), out)
        for want, value in found.items():
            self.known[want] = value.view(f.shape)
        for want, values in (("dots", dots), ("gram", grams)):
            if values:
                self.known[want] = torch.stack(values).sum(0)
        if norms:
            self.known["sq_norms"] = torch.stack(norms).square_().sum(0)
        self.route.update(dict.fromkeys([*found, *wants], "tiles"))

    def _tiles(self, wants: list[str], visitors: list[Visitor], buffer: Tensor | None) -> None:
        f = self.form
        total = second = rows = _NOTHING
        norms: list[Tensor] = []
        kept: list[Tensor] = []
        dots: list[Tensor] = []
        direction = self.known["total"].reshape(-1) if "dots" in wants and "total" in self.known else None
        need_rows = "rows" in wants or "gram" in wants or ("dots" in wants and direction is None)
        # In place only where no graph is being recorded (create_graph=True records one).
        recorded = torch.is_grad_enabled()
        out: Tensor | None = None
        if not recorded and need_rows:
            out = torch.empty(f.n, *f.shape, dtype=f.acc, device=f.device) if buffer is None else buffer
        for lo, hi in f.tiles():
            if out is not None:
                rows = out[lo:hi]
                f.rows_into(lo, hi, rows)
            elif isinstance(f, Outer) and not recorded:
                rows = f.rows_in_scratch(lo, hi)
            else:
                rows = f.rows(lo, hi)
                if need_rows:
                    kept.append(rows)
            for visit in visitors:
                visit(rows)
            flat = rows.reshape(hi - lo, -1)
            if "sq_norms" in wants:
                # The first allocates no tile, the second has a gradient at zero.
                norms.append(torch.linalg.vecdot(flat, flat) if recorded else torch.linalg.vector_norm(flat, dim=1))
            if direction is not None:
                dots.append(flat @ direction)
            if "total" in wants or "scatter" in wants:
                total = _add_rows(rows, total if lo else None, recorded)
            if "second_moment" in wants or ("scatter" in wants and not recorded):
                second = _add_squares(rows, second if lo else None, recorded)
        if not f.n:
            total, second = (torch.zeros(f.shape, dtype=f.acc, device=f.device) for _ in range(2))
        found: dict[str, Tensor] = {}
        if "sq_norms" in wants:
            norm = torch.cat(norms) if norms else total.new_zeros(0)
            found["sq_norms"] = norm if recorded else norm.square_()
        if "total" in wants:
            found["total"] = total
        if "second_moment" in wants:
            found["second_moment"] = second
        if "scatter" in wants:
            spread = torch.empty_like(total)
            if recorded or not _settled(second.view(-1), total.view(-1), f.n, spread.view(-1)):
                there = out if out is not None else rows if f.tile() >= f.n else torch.cat(kept) if kept else None
                spread = self._spread(total / max(1, f.n), there)
            found["scatter"] = spread
        if need_rows:
            rows = out if out is not None else torch.cat(kept)
            flat = rows.reshape(f.n, -1)
            if "rows" in wants:
                found["rows"] = rows
            if "gram" in wants:
                found["gram"] = flat @ flat.T
            if "dots" in wants and direction is None:
                found["dots"] = flat @ total.reshape(-1)
        if direction is not None:
            found["dots"] = torch.cat(dots) if dots else total.new_zeros(0)
        self.known.update(found)
        self.route.update(dict.fromkeys(found, "tiles"))

    def _spread(self, mean: Tensor, rows: Tensor | None) -> Tensor:
        """Sum of the squared deviations from a mean that is known by now; of all rows, if they are there."""
        f = self.form
        found = torch.zeros_like(mean)
        for lo, hi in f.tiles():
            some = (f.rows(lo, hi) if rows is None else rows[lo:hi]) - mean
            found = _add_squares(some, found if lo else None, torch.is_grad_enabled())
        return found

    def __getitem__(self, want: str) -> Tensor:
        """A statistic by name, computed now if it is not known yet."""
        if want not in self.known:
            self.prepare([want])
        return self.known[want]

    def scaled(self, want: str, factor: float) -> Tensor:
        """A statistic times `factor`, for the caller to keep; in place where nobody else asked for it or holds it."""
        value = self[want]
        # Held by `known`, and by this function's name.
        if self._asked.count(want) != 1 or torch.is_grad_enabled() or sys.getrefcount(value) > 1 + NAMED:
            return value * factor
        value = self.known.pop(want)
        return value if factor == 1.0 else value.mul_(factor)

    def kept(self, rows: Tensor) -> Tensor:
        """`rows` for the caller to keep and to write to: a copy of the statistic where its memory is another's."""
        if rows is not self.known.get("rows"):
            return rows
        holder = self.form if isinstance(self.form, Dense) else self
        taken, holder.shared = holder.shared, True
        return rows.clone() if taken else rows

    def hold(self) -> None:
        """Keep the rows in place of the form, in memory that is nobody's result: those may be written to."""
        rows = self.known["rows"] = self.kept(self["rows"])
        self.form = Dense(rows)
        self.form.shared = True

    def dots(self, direction: Tensor) -> Tensor:
        """Inner products of the rows with `direction`, `[N]`."""
        direction = direction.to(self.form.acc)
        if "rows" in self.known:
            return self.known["rows"].reshape(self.form.n, -1) @ direction.reshape(-1)
        answer = self.form.dots(direction)
        if answer is not None:
            return answer
        parts = [self.form.rows(lo, hi).reshape(hi - lo, -1) @ direction.reshape(-1) for lo, hi in self.form.tiles()]
        return torch.cat(parts)

    def weighted(self, weight: Tensor) -> Tensor:
        """`sum over n of weight_n row_n`, `[*shape]`."""
        weight = weight.to(self.form.acc)
        answer = self.form.weighted(weight)
        if answer is None:
            answer = torch.zeros(self.form.shape, dtype=self.form.acc, device=self.form.device)
            for lo, hi in self.form.tiles():
                answer = answer + torch.tensordot(weight[lo:hi], self.form.rows(lo, hi), 1)
        return answer


def _add_rows(rows: Tensor, into: Tensor | None, recorded: bool) -> Tensor:
    """Sum of `rows` `[m, ...]` and, where there is something yet, `into`: in place, unless a graph is recorded."""
    if recorded:
        return rows.sum(0) if into is None else into + rows.sum(0)
    # A product with ones takes half the time of `sum`.
    flat, ones = rows.reshape(len(rows), -1).T, rows.new_ones(len(rows))
    if into is None:
        return torch.mv(flat, ones).view(rows.shape[1:])
    into.view(-1).addmv_(flat, ones)
    return into


def _add_squares(rows: Tensor, into: Tensor | None, recorded: bool) -> Tensor:
    """The same for the squares of the rows."""
    if recorded:
        return rows.square().sum(0) if into is None else into + rows.square().sum(0)
    if into is None:
        return _sum_squares(rows, rows.new_empty(rows.shape[1:]))
    if into.numel() < SMALL:
        return into.add_(_squares(rows).sum(0))
    for row in rows:
        into.addcmul_(row, row)
    return into


def _sum_squares(rows: Tensor, out: Tensor) -> Tensor:
    """Sum of the squares of `rows` `[m, ...]`, written to `out`."""
    if out.numel() < SMALL:
        return torch.sum(_squares(rows), 0, out=out)
    torch.mul(rows[0], rows[0], out=out)
    for row in rows[1:]:
        out.addcmul_(row, row)
    return out


def _settled(spread: Tensor, total: Tensor, n: int, out: Tensor) -> bool:
    """Write `spread - total² / n` to `out`: squared deviations from the mean, of n rows with that sum of squares.

    Returns:
        Whether that is all right: where most of an entry cancels, its deviations have to be formed. An accelerator is
        not asked, which would make the host wait.
    """
    if out.device.type != "cpu":
        return False
    step = max(1, _scratch.TILE // 4 // max(1, out[:1].numel()))
    all_ = (spread, total, out)
    for squares, shift, part in [all_] if len(out) <= step else zip(*(t.split(step) for t in all_), strict=True):
        torch.addcmul(squares, shift, shift, value=-1.0 / max(1, n), out=part)
        margin = torch.add(part, squares, alpha=-DOUBT, out=scratch("margin", part.shape, part.dtype, part.device))
        if margin.numel() and not margin.amin() >= 0:  # the least of entries of which one is NaN is NaN
            return False
    return True


def _squares(rows: Tensor) -> Tensor:
    return torch.mul(rows, rows, out=scratch("squares", rows.shape, rows.dtype, rows.device))
