"""The samples' own losses."""

from __future__ import annotations

from typing import Any

from packext.diagnostics._instrument import Instrument
from packext.diagnostics._step import Count, Step
from packext.diagnostics.instruments.noise import quantiles


class SampleLosses(Instrument):
    """The samples' own losses: their median, their distribution, and which samples have the largest.

    "SampleLosses.quantiles" has those at 0, 5, 25, 50, 75, 95 and 100 % (`[7]`), "SampleLosses.largest" the largest
    ones, the largest first (`[count]`). "SampleLosses.hardest" names their samples by index in the data set
    (`[count]`), where the step was given indices (`monitor.step(samples=...)`). All of them in a batch of up to
    `count`, so that the visits of a sample can be followed.

    - Formula: median of l_n, of an even number the lower of the two in the middle
    - Units: those of the loss
    - Cost: the loss alone is evaluated once more, without its reduction; no quantity
    - Source: the definition
    - Absent: where the loss is none of torch's and was not handed over, or its rows are not samples; for the mean of
      `CTCLoss`, which divides by the lengths of the targets
    """

    losses = True
    needs = (Count(),)

    def __init__(self, count: int = 256) -> None:
        """Choose how many samples to name.

        Raises:
            ValueError: if that is less than one.
        """
        if count < 1:
            raise ValueError(f"count must be an int of 1 or more, got {count!r}.")
        self.count = count

    def measure(self, step: Step) -> dict[str, Any]:
        losses = step.losses.double()
        top = losses.topk(min(self.count, len(losses)))
        found = {"": losses.median(), ".quantiles": quantiles(losses), ".largest": top.values}
        named = step.indices(top.indices)
        return found if named is None else {**found, ".hardest": named}
