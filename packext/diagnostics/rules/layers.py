"""Units and layers that do not take part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from packext.diagnostics._verdict import Finding, Rule
from packext.diagnostics.instruments.facts import FROZEN, FROZEN_FRONT, NO_GRADIENT, NO_RATE, NOT_HELD
from packext.diagnostics.rules._history import by_layer, percent
from packext.diagnostics.rules.gradients import _Matrices


class DeadReLUs(Rule):
    """Nine tenths of the units of a layer have got no gradient for ten looks, or half of them never have.

    A unit that is shut for one batch may open for the next, and some are shut in most healthy layers. Before a network
    tells samples apart, each unit of a layer is open for all or shut for all, so that half of them are by chance, and
    many open again when it does: half have to be shut from the start on, and still in 15 looks in which the loss is
    under nine tenths of the largest that it has been. A layer of which more than half have once got gradients, and
    which shuts one unit after the other while the loss falls, is one from which learning takes units that it has no use
    for, as where each part of a code costs, or few samples still carry a gradient: of it nine tenths count only while
    the loss is near its largest, as after a leap that shuts many. Says nothing while the last layer's own units get no
    gradient either. Nor of a bias that gets no gradient at all though its weight does: that one cancels, as between two
    halves whose difference is taken.
    """

    failure = "dead ReLUs"
    advice = "Lower the learning rate, start with smaller or no negative biases, or use LeakyReLU or GELU."
    reads = ("IdleUnits", "Loss", "GradNorm")
    hold, release = 3, 10
    share, most, lasting, begun = 0.5, 0.9, 15, 0.1

    def __init__(self) -> None:
        """Start before the first step."""
        self._largest = -math.inf
        self._rows: dict[str, int] = {}  # of layers of which half has always been shut: in how many looks
        self._open: set[str] = set()  # layers of which more than half have once got gradients

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        loss, idle = values.get("Loss"), by_layer(values, "IdleUnits")
        if loss is not None and loss < math.inf:
            self._largest = max(self._largest, loss)
        begun = loss is None or self._largest - loss > self.begun * abs(self._largest)
        if not idle:
            return None
        weights = {k for k, norm in by_layer(values, "GradNorm").items() if norm and "weight" in k}
        idle = {k: share for k, share in idle.items() if share < 1 or k.replace("bias", "weight") not in weights}
        self._open |= {name for name, share in idle.items() if share < self.share}
        self._rows = {k: self._rows.get(k, 0) + begun for k in idle if k not in self._open}
        nearly = {k for k, share in idle.items() if share >= self.most and not (begun and k in self._open)}
        where = tuple(k for k in idle if k in nearly or self._rows.get(k, 0) >= self.lasting)
        if not where or [*idle.values()][-1] >= self.share:
            return None
        worst = max(where, key=lambda name: idle[name])
        return Finding(f"{percent(idle[worst])} % of the units of {worst} got no gradient from any sample.", where)


class LayerDoesNotLearn(_Matrices):
    """A layer's matrix moves thirty times less, compared with its size, than those of the other layers do.

    Compared with the median over the matrices. Layers of healthy networks differ by factors of about ten. The size is
    no less than in PyTorch's initialisation, and matrices that started at zero are left out: nearly all of these is
    what they have moved. So are those whose share in the gradient (`VanishingGradients`) is under a hundredth, as of an
    expert that few samples are sent to: the loss asks little of them.
    """

    failure = "layer does not learn"
    advice = "Look at the layer's learning rate and weight decay, and at what scales its gradient."
    reads = ("UpdateSize", "ParamNorm", "InitialScale", "Untrained", "GradNorm")
    hold, release = 10, 10
    small, asked = 0.03, 0.01

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        shares = self.shares(values)
        updates, sizes, known = (by_layer(values, k) for k in ("UpdateSize", "ParamNorm", "Untrained"))
        moves = {
            name: u / max(sizes[name], usual)
            for name, u in updates.items()
            if sizes.get(name) and name not in known and (usual := self.usual(name))
        }
        if len(moves) < 3:
            return None
        usual = sorted(moves.values())[len(moves) // 2]
        slow = (name for name, move in moves.items() if move < self.small * usual)
        where = tuple(name for name in slow if shares.get(name, 0.0) >= self.asked)
        if not where:
            return None
        least = min(where, key=lambda name: moves[name])
        return Finding(
            f"{least} moves by {percent(moves[least])} % of its norm in a step, and others by {percent(usual)} %.",
            where,
        )


#: What `Untrained` means, in words.
WHY = {
    FROZEN: "does not require grad, though layers before it do",
    NOT_HELD: "is not held by the optimizer",
    NO_RATE: "has a learning rate of 0",
    NO_GRADIENT: "gets no gradient from the loss",
}


class FrozenByMistake(Rule):
    """Parameters are not trained though others before them are, or though they require grad.

    Parameters at the front of the model that do not require grad are a frozen backbone; and where nine tenths of all
    entries are not trained, those that do not require grad are what an adapter was put into. Neither is a mistake, and
    nor are fixed positions and embeddings. It has to be so in three looks in a row for each parameter, and in twenty
    where there is no gradient: stochastic depth leaves out a layer, and a mixture an expert, for some steps.
    """

    failure = "frozen by mistake"
    advice = (
        "Give all parameters to the optimizer, and look for requires_grad, detach() and no_grad() on the way to them."
    )
    reads = ("Untrained",)
    hold, release = 1, 3
    adapter, looks, unused = 0.9, 3, 20

    def __init__(self) -> None:
        """Start before the first step."""
        self._rows: dict[tuple[str, float], int] = {}  # looks in a row, by parameter and why it is not trained

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        found = by_layer(values, "Untrained")
        deliberate = {FROZEN_FRONT, FROZEN} if values.get("Untrained.share", 0.0) >= self.adapter else {FROZEN_FRONT}
        self._rows = {key: self._rows.get(key, 0) + 1 for key in found.items() if key[1] not in deliberate}
        needed = {NO_GRADIENT: self.unused}
        where = tuple(name for (name, code), row in self._rows.items() if row >= needed.get(code, self.looks))
        if not where:
            return None
        return Finding(f"{where[0]} {WHY[found[where[0]]]}{_more(len(where))}.", where)


def _more(count: int) -> str:
    return "" if count == 1 else f" (and {count - 1} more are not trained)"
