"""The samples' own losses, and what they would be under the targets of others."""

from __future__ import annotations

from typing import Any

from packext.diagnostics._instrument import Instrument
from packext.diagnostics._step import Absent, Count, Step
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


class TargetRanks(Instrument):
    """How well the outputs fit their own targets, beside those of other samples of the batch: mean rank of their own.

    A sample's rank is the share of other targets, among those that would change its loss, under which it would be less.
    It is 0 where no other target fits better, and 1/2 on average where outputs tell nothing of the targets, whatever
    the loss and its units. "TargetRanks.same" is the share of other targets under which a loss would be the same: half
    of them with two classes, a tenth with ten. Where the step was given indices (`monitor.step(samples=...)`),
    "TargetRanks.each" has the rank of each sample `[N]`, and "TargetRanks.samples" these indices `[N]`.

    - Formula: mean over n of `#{m: l(f_n, y_m) < l(f_n, y_n)} / #{m: l(f_n, y_m) != l(f_n, y_n)}`, over 8 other m; 0
      where no other target would change the loss
    - Units: none
    - Cost: the loss alone is evaluated 9 times more, on parts of outputs that are there (of `CrossEntropyLoss` the
      softmax once); no quantity
    - Source: the rank of a permutation test (Fisher 1935)
    - Absent: where the loss is none of torch's, has weights of targets, is given more than outputs and targets, is one
      of several, or its rows are not samples; for one sample; where a loss is not finite; in several processes
    """

    targets = True

    def measure(self, step: Step) -> dict[str, Any]:
        less, same = step.compared.unbind(1)
        ranks = less / (1 - same).where(same < 1, 1.0)
        found = {"": ranks.mean(), ".same": same.mean()}
        if step.samples is None:
            return found
        if len(step.samples) != len(ranks):
            raise Absent(f"step(samples=...) was given {len(step.samples)} indices for {len(ranks)} rows of the loss")
        return {**found, ".each": ranks, ".samples": step.samples}
