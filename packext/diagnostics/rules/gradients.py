"""Gradients that grow or shrink on their way through the layers, or over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from packext.diagnostics._verdict import Finding, Rule
from packext.diagnostics.rules._history import Recent, SinceStart, by_layer, percent


class _Matrices(SinceStart):
    """Base of rules that compare layers by their matrices: biases start at zero, and have scales of their own."""

    def __init__(self) -> None:
        """Start before the first step."""
        super().__init__()
        self._matrices: dict[str, float] = {}  # those that `InitialScale` has named at the start, with `usual`

    def usual(self, name: str) -> float:
        """The norm of a matrix in PyTorch's initialisation; 0 of one that started at zero, or if it is not known."""
        return self._matrices.get(name, 0.0)

    def shares(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Norm of each matrix's gradient times that of the matrix, over the largest of these products.

        That is how much the loss depends on the matrix's relative size: it does not change if a layer's scale is moved
        to the next.

        Args:
            values: of the step.

        Returns:
            Numbers from 0 to 1 by name, in the order of the model; none if there is no gradient.
        """
        gradients, sizes = by_layer(values, "GradNorm"), by_layer(values, "ParamNorm")
        if not self._matrices and (gains := by_layer(values, "InitialScale")):
            self._matrices = {k: sizes.get(k, 0.0) / (3**0.5 * gain) if gain > 0 else 0.0 for k, gain in gains.items()}
        products = {name: g * sizes[name] for name, g in gradients.items() if name in sizes and name in self._matrices}
        largest = max(products.values(), default=0.0)
        return {name: p / largest for name, p in products.items()} if 0 < largest < math.inf else {}


class VanishingGradients(_Matrices):
    """Next to nothing of the gradient reaches the first layers.

    All matrices from the first one on, up to some layer, have less than a hundredth of the largest share in the
    gradient (the norm of the gradient times that of the matrix). Or the first ones' shares, compared with those of the
    others by geometric means, are a third of the least that they were in 30 looks before: in five looks in a row, which
    is no chance. Layers learn at paces of their own, but slowly; what multiplies the gradient on its way changes the
    shares before it and those behind it by that factor at once, wherever they were. Layers in the order of the model; a
    single layer in the middle is another failure.
    """

    failure = "vanishing gradients"
    advice = (
        "Use ReLU or GELU in place of saturating activations, He initialisation, normalisation or skip connections."
    )
    reads = ("GradNorm", "ParamNorm", "InitialScale")
    hold, release = 5, 30
    small, fallen = 1e-2, 3.0

    def __init__(self) -> None:
        """Start before the first step."""
        super().__init__()
        self._past: dict[str, Recent] = {}  # how much larger shares were up to a layer than behind it, as logarithms

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        shares = self.shares(values)
        lower, factor = self._lowered(shares)
        front: list[str] = []
        for name, share in shares.items():
            if share >= self.small:
                break
            front.append(name)
        if not front or len(front) == len(shares) or not any(shares[name] > 0 for name in front):
            if not factor >= self.fallen:
                return None
            return Finding(
                f"The share of {lower[0]}, up to {lower[-1]}, in the gradient has fallen to 1 / {factor:.3g} of what "
                f"it was, compared with that of the layers behind.",
                lower,
            )
        least = min(front, key=lambda name: shares[name])
        top = max(shares, key=lambda name: shares[name])
        return Finding(f"The share of {least} in the gradient is {shares[least]:.2g} of that of {top}.", tuple(front))

    def _lowered(self, shares: dict[str, float]) -> tuple[tuple[str, ...], float]:
        """The first layers whose shares have fallen most against those behind, and by which factor."""
        names = [name for name, share in shares.items() if share > 0]
        logs = [math.log(shares[name]) for name in names]
        if self._past.keys() != set(names[:-1]):  # means over other layers are no past
            self._past = {name: Recent(31 + self.hold) for name in names[:-1]}
        most, count, head, whole = 0.0, 0, 0.0, sum(logs)
        for k, name in enumerate(names[:-1], 1):
            head += logs[k - 1]
            ratio, past = head / k - (whole - head) / (len(names) - k), self._past[name]
            past.add(ratio)
            least = min(past.before(self.hold + 1), default=ratio)
            if least - ratio > most:
                most, count = least - ratio, k
        return tuple(names[:count]), math.exp(min(most, 700.0))


class ExplodingGradients(Rule):
    """In three looks in a row the gradient is 4 times as large as it has been in any of 30 before them, or more.

    Three of 33 looks are the largest by chance once in 5456, and by a factor next to never. Gradients that grow as a
    plateau is left take more looks for it; and compared with the largest, and not with their median, gradients of much
    noise have to grow by more: where most losses are near zero, single hard samples make single large ones. Named are
    the layers whose gradients have grown at least half as much as that of the layer which has grown most.
    """

    failure = "exploding gradients"
    advice = "Clip the gradient's norm; normalise between the layers, or lower the scale of their weights."
    reads = ("GradNorm",)
    hold, release = 3, 30
    grown = 4.0

    def __init__(self) -> None:
        """Start before the first step."""
        self._past: dict[str, Recent] = {}

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        whole = values.get("GradNorm")
        if whole is None or not whole < math.inf:
            return None
        norms = {"": whole, **by_layer(values, "GradNorm")}
        for name, norm in norms.items():
            self._past.setdefault(name, Recent(31 + self.hold)).add(norm)
        largest = {name: max(self._past[name].before(self.hold + 1), default=0.0) for name in norms}
        if not whole >= self.grown * largest[""] > 0:
            return None
        growth = {name: norm / largest[name] for name, norm in norms.items() if name and largest[name] > 0}
        most = max(growth.values(), default=0.0)
        return Finding(
            f"The gradient's norm is {whole:.3g}, and was {largest['']:.3g} at most in the looks before.",
            tuple(name for name, g in growth.items() if g >= 0.5 * most),
        )


class NaNAhead(_Matrices):
    """A number is not finite, or grows so steadily that it soon will not be.

    Steadily: a parameter, the loss, the gradient or the output has grown in each of the last 8 looks by 9 % or more, by
    which single precision overflows within a thousand, and by more each time than the time before. Exponential growth
    lasts: the logarithm has grown in the later four by 0.95 times what it has in the first four (0.5 times, of what
    depends on the batch). What starts at zero grows with the square of the steps while the rate is warmed up, or faster
    for a while, and counts from a tenth of the norm of all parameters on. And the loss has to be above where it began
    in three looks in a row, or what grows a matrix that is 2.5 times as large as in PyTorch's initialisation. Or an
    input is not finite already. A gradient that is not finite counts if the parameters have moved by it: a `GradScaler`
    makes such ones to find its factor, and skips the step.
    """

    failure = "NaN about to happen"
    advice = (
        "Look at what grows: lower the learning rate, clip the gradient, add an epsilon to divisors and logarithms."
    )
    reads = ("Loss", "GradNorm", "OutputScale", "ParamNorm", "InputScale", "InitialScale", "UpdateSize")
    hold, release = 1, 20
    looks, growth, lasting, noisy, large, risen, part = 9, 1.09, 0.95, 0.5, 2.5, 3, 0.1

    def __init__(self) -> None:
        """Start before the first step."""
        super().__init__()
        self._past: dict[str, Recent] = {}
        self._zero: set[str] = set()
        self._above = 0  # looks in a row in which the loss was above where it began

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        self.shares(values)
        if "Loss" in values:
            self.begin(step, values)
            self._above = self._above + 1 if values["Loss"] > self.line else 0
        watched = {k: float(values[k]) for k in ("Loss", "GradNorm", "OutputScale") if k in values}
        if not math.isfinite(watched.get("GradNorm", 0.0)) and "UpdateSize" not in values:
            del watched["GradNorm"]
        sizes = {f"ParamNorm/{k}": v for k, v in by_layer(values, "ParamNorm").items()}
        watched |= sizes
        if step == 0:
            self._zero |= {name for name, size in sizes.items() if size == 0}
        broken = [name for name, value in watched.items() if not math.isfinite(value)]
        if values.get("InputScale.infinite", 0.0) > 0:
            return Finding(f"{percent(values['InputScale.infinite'])} % of the inputs are NaN or infinite.")
        if broken:
            return Finding(f"{broken[0]} is {watched[broken[0]]}.", _places(broken))
        grown = {}
        for name, value in watched.items():
            past = self._past.setdefault(name, Recent(self.looks))
            past.add(value)
            if past.full and _exponential(list(past.values), self.growth, self.lasting if "/" in name else self.noisy):
                grown[name] = (value / past.values[0]) ** (1 / (self.looks - 1))
        part = self.part * values.get("ParamNorm", 0.0)
        grown = {name: g for name, g in grown.items() if name not in self._zero or watched[name] > part}
        if self._above < self.risen:
            # Outputs grow fast where learning begins, and gradients for a while at the edge of stability.
            large = {f"ParamNorm/{k}": self.large * self.usual(k) for k in by_layer(values, "ParamNorm")}
            grown = {name: g for name, g in grown.items() if 0 < large.get(name, 0.0) < watched[name]}
        if not grown:
            return None
        name = max(grown, key=lambda k: grown[k])
        left = math.log(3e38 / watched[name]) / math.log(grown[name])
        return Finding(
            f"{name} grows by a factor of {grown[name]:.3g} from look to look: single precision overflows in "
            f"{left:.0f} of them.",
            _places(list(grown)),
        )


def _exponential(v: list[float], growth: float, lasting: float) -> bool:
    """Whether each is larger than the one before by that factor, each rise than the one before, and factors last."""
    if not v[-1] > v[0] > 0 or not all(b > growth * a for a, b in pairwise(v)):
        return False
    middle = v[len(v) // 2]
    if math.log(v[-1] / middle) < lasting * math.log(middle / v[0]):
        return False
    return all(c - b > b - a for a, b, c in zip(v, v[1:], v[2:], strict=False))


def _places(names: list[str]) -> tuple[str, ...]:
    return tuple(name.partition("/")[2] for name in names if "/" in name)
