"""How the forms of several uses of a parameter become one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from packext._factored.base import Dense, Factored, Terms
from packext._factored.other import Lookup, Sum
from packext._factored.outer import Outer
from packext._factored.pulled import Pulled


def side_by_side(parts: Sequence[Factored]) -> Factored:
    """The rows of forms of one parameter one after the other, as if they were samples of one batch."""
    pairs = [(p.a, p.g) for p in parts if isinstance(p, Outer) and isinstance(p.a, Tensor)]
    if len(pairs) == len(parts):
        # Where data routes rows, the samples of some forms have more positions than those of others.
        longest = max(a.shape[2] for a, _ in pairs)
        a = torch.cat([F.pad(a, (0, 0, 0, longest - a.shape[2])) for a, _ in pairs])
        g = torch.cat([F.pad(g, (0, longest - g.shape[3])) for _, g in pairs])
        return Outer(a, g, parts[0].shape)
    return Dense(torch.cat([p.rows(0, p.n) for p in parts]))


def merge(parts: Sequence[Factored]) -> Factored:
    """One form for all uses of a parameter; forms of a kind are joined along S."""
    if len(parts) > 1:
        parts = _by_value(parts)
    if len(parts) == 1:
        return parts[0]
    dense = [p for p in parts if isinstance(p, Dense)]
    if len(dense) == len(parts):
        terms = [p.terms for p in dense if p.terms is not None]
        together = Terms(torch.cat([t.g for t in terms], 3)) if len(terms) == len(dense) else None
        return Dense(torch.stack([p.r for p in dense]).sum(0), together, all(p.entrywise for p in dense))
    lookups = [p for p in parts if isinstance(p, Lookup)]
    if len(lookups) == len(parts):
        index, g = torch.cat([p.index for p in lookups], 1), torch.cat([p.g for p in lookups], 1)
        one_hot, positions = all(p.one_hot for p in lookups), sum(p.positions for p in lookups)
        return Lookup(index, g, parts[0].shape, one_hot, positions)
    outers = [(p.a, p.g, p.stored) for p in parts if isinstance(p, Outer) and isinstance(p.a, Tensor)]
    if len(outers) == len(parts) and len({(a.shape[1], a.shape[3], g.shape[2], s) for a, g, s in outers}) == 1:
        a, g = torch.cat([a for a, _, _ in outers], 2), torch.cat([g for _, g, _ in outers], 3)
        uses = [p for p in parts if isinstance(p, Outer)]
        own = functools.partial(_own, [p.own for p in uses])
        return Outer(a, g, parts[0].shape, stored=outers[0][2], positions=sum(p.positions for p in uses), own=own)
    return Sum(parts)


def _own(parts: Sequence[Callable[[], Tensor | None]]) -> Tensor | None:
    """Which positions are a sample's own, of those of all parts."""
    found = [own for part in parts if (own := part()) is not None]
    return torch.cat(found, 1) if len(found) == len(parts) else None


def _by_value(parts: Sequence[Factored]) -> list[Factored]:
    """Uses of one value made of parameters as one use of it, where its forms are of a kind."""
    of: dict[object, list[Pulled]] = {}
    for part in parts:
        if isinstance(part, Pulled) and part.value is not None:
            of.setdefault(part.value, []).append(part)
    inner = {key: merge([p.inner for p in same]) for key, same in of.items() if len(same) > 1}
    one = {id(of[key][0]): of[key][0].around(form) for key, form in inner.items() if not isinstance(form, Sum)}
    gone = {id(p) for key, form in inner.items() if not isinstance(form, Sum) for p in of[key][1:]}
    return [one.get(id(part), part) for part in parts if id(part) not in gone]
