"""What a check says: an entry for each parameter and quantity, with its error."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """One parameter and quantity: the largest error, relative to the largest value."""

    parameter: str
    quantity: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance (NaN is not)."""
        return self.error <= self.tolerance


class Report(list[Entry]):
    """All entries of a check; prints as a table."""

    @property
    def ok(self) -> bool:
        """Whether there are entries, and all are right."""
        return bool(self) and all(entry.ok for entry in self)

    def __str__(self) -> str:
        """One line for each entry."""
        width = max((len(e.parameter) for e in self), default=9)
        lines = [f"{'parameter':<{width}}  {'quantity':<18} {'error':>9}"]
        for e in self:
            # Of random quantities errors say nothing without it.
            allowed = f" of {e.tolerance:.1e} allowed" if e.tolerance > 1e-3 else ""
            lines.append(f"{e.parameter:<{width}}  {e.quantity:<18} {e.error:9.1e}{allowed}{'' if e.ok else '  WRONG'}")
        return "\n".join(lines)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value; infinite where shapes differ or a value is not finite."""
    if got.shape != want.shape:
        return math.inf
    if not want.numel():
        return 0.0
    got, want = got.detach().to(want.dtype), want.detach().to(got.device)
    size = float(want.abs().max())
    error = float((got - want).abs().max())
    if not math.isfinite(error):
        return math.inf
    return error / size if size > 1e-12 else error
