"""What is wrong with the data, or with how it is cut into batches."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any, ClassVar

import numpy as np

from packext.diagnostics._verdict import Finding
from packext.diagnostics.rules._history import Fall, Recent, SinceStart, Steady, percent


class _Strangers:
    """Samples whose targets might as well be another sample's, of a model that tells the targets of most.

    What is wrong ranks anywhere among the targets of others (`TargetRanks`), whatever the loss, its units and how low
    it can get; what is right but hard is a near miss, and ranks low. A sample is a stranger if its target has ranked in
    the upper third in both of its last two visits: of targets that have nothing to do with their samples that is one in
    three where ranks stay, and fewer where the model wavers between what it rules out. So three times their share is a
    cautious estimate of the share of such targets (after Storey 2002). It is of the last 600 samples that came for the
    second time or more (of 100, where there are no more), since one that was met before the model learned says little.

    Nothing is said before the other samples' targets are told: of what is left when the part that has nothing to do
    with its samples is taken away, 85 % have to rank in the lowest fifth. Numbers of which much is chance never get
    there. Nor is anything said of few classes, where the second guess already ranks high: other targets that give the
    same loss, of which there are half with two classes and a tenth with ten, have to be fewer than 15 %. Nor of batches
    of 8 or fewer, in which single targets that fit by chance rank a right one high, twice in a row often enough.
    """

    high, low, window, fewest, known, most, coarse, memory = 2 / 3, 0.2, 600, 100, 0.85, 0.5, 0.15, 100_000
    others = 8

    def __init__(self) -> None:
        """Start before the first step."""
        self._visits: dict[int, tuple[float, int, bool]] = {}  # last rank, high ones in a row, whether it came again
        self._same = Recent(100)

    def add(self, values: Mapping[str, Any]) -> tuple[float, float] | None:
        """Take the ranks of one more look; return the share of strangers' targets, and its standard error."""
        samples = values.get("TargetRanks.samples")
        if samples is None or len(samples) <= self.others:
            return None
        self._same.add(values["TargetRanks.same"])
        for sample, rank in zip(samples.tolist(), values["TargetRanks.each"].tolist(), strict=True):
            last = self._visits.pop(sample, None)
            row = 0 if last is None else last[1]
            self._visits[sample] = rank, (row + 1 if rank > self.high else 0), last is not None
        while len(self._visits) > self.memory:
            del self._visits[next(iter(self._visits))]
        again = (visit for visit in reversed(self._visits.values()) if visit[2])
        recent = [*itertools.islice(again, self.window)]
        n = len(recent)
        if n < self.fewest or self._same.mean >= self.coarse:
            return None
        strange, lowest = (sum(found) / n for found in ([v[1] >= 2 for v in recent], [v[0] < self.low for v in recent]))
        share = strange / (1 - self.high)
        if share > self.most or lowest - self.low * share < self.known * (1 - share):
            return None
        return share, math.sqrt(strange * (1 - strange) / n) / (1 - self.high)

    @property
    def named(self) -> list[int]:
        """The strangers, the highest rank first."""
        found = {sample: visit[0] for sample, visit in self._visits.items() if visit[1] >= 2}
        return sorted(found, key=lambda sample: -found[sample])


class LabelNoise(SinceStart):
    """Targets that might as well be another sample's; or losses that stay above where all began, and rise.

    Said, first, when the share of targets that have nothing to do with their samples, by how they rank among the
    targets of others (`_Strangers`), is 5 % by three standard errors. That needs two epochs, and a loss of torch's.

    Secondly, by losses: some stay above where all began, and rise, while those of the others fall. A model that has
    learned something is sure of it, and so is surest to be wrong on a sample whose label is. Samples that are hard but
    right fall sooner or later. A sample is suspected if its loss in both of its last two visits was above that of its
    first, 30 looks ago or more, and above 1.2 times the mean loss of the first step and two standard errors of that
    mean, which one rare sample that weighs more may have moved. Said when the suspects' losses come to 7.5 % of what
    the losses of all known samples were in the first step, or those of suspects that were above in their last three
    visits to half of that, while the median loss is under half of what it was. Losses are summed, not suspects counted,
    because of two classes or of numbers the hardest of right samples are many, and little above the line.

    It has to be so by three standard errors, over samples: what varies is which samples the set has, and where a few
    weigh more (rare positives) a handful carries the sum. Looks are no independent evidence, since the same samples
    come again. While a model learns, its right samples come to as much for a while, and again, but of these few stay
    above for three visits, which is why half is enough then. Needs to know which samples are which
    (`monitor.step(samples=...)`), and three epochs. A visit is one that `SampleLosses` names: of a batch larger than
    its `count`, these are the samples with the largest losses, and for each of them n / count are taken to be known.
    Named are the suspects, the largest loss first. Nothing is said of losses below zero: it is from there that lines
    are drawn.
    """

    failure = "label noise"
    advice = "Look at the samples that are named and at their labels; train without them, or with a robust loss."
    reads = ("SampleLosses", "BatchSize", "Loss", "TargetRanks")
    hold, release = 1, 20
    strange = 0.05
    learned, errors, since, memory = 0.5, 3.0, 30, 100_000
    shares = (2, 0.075), (3, 0.0375)  # by how many visits in a row

    def __init__(self) -> None:
        """Start before the first step."""
        super().__init__()
        self._visits: dict[int, tuple[int, float, int]] = {}  # look and loss of the first; how many above it in a row
        self._suspects: dict[int, tuple[float, int]] = {}  # loss of the last visit, and how many in a row
        self._looks = 0
        self._below = False  # whether a loss has been below zero
        self._strangers = _Strangers()

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        strange, lost = self._by_ranks(values), self._by_losses(step, values)
        return lost or strange

    def _by_ranks(self, values: Mapping[str, Any]) -> Finding | None:
        found = self._strangers.add(values)
        if found is None or found[0] - self.errors * found[1] < self.strange:
            return None
        named = self._strangers.named
        return Finding(
            f"Two thirds of other samples' targets fit what the model puts out for {len(named)} samples better than "
            f"their own do, twice in a row: {percent(found[0])} % of the targets might as well be another sample's "
            f"(with a standard error of {percent(found[1])} %).",
            tuple(f"sample {sample}" for sample in named),
        )

    def _by_losses(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        loss, n, samples = (values.get(name) for name in ("Loss", "BatchSize", "SampleLosses.hardest"))
        if loss is None or not self.begin(step, values) or self.first is None or n is None or samples is None:
            return None
        self._below = self._below or values.get("SampleLosses.quantiles", (0.0,))[0] < -0.01 * self.first
        if self._below:
            return None
        limit = self.line
        for sample, own in zip(samples.tolist(), values["SampleLosses.largest"].tolist(), strict=True):
            since, first, row = self._visits.pop(sample, (self._looks, own, 0))
            row = row + 1 if max(limit, first) < own < math.inf else 0
            self._suspects.pop(sample, None)
            if self._looks - since >= self.since and row >= 2:
                self._suspects[sample] = own, row
            self._visits[sample] = since, first, row
        while len(self._visits) > self.memory:
            self._suspects.pop(next(iter(self._visits)), None)
            del self._visits[next(iter(self._visits))]
        self._looks += 1
        if not values["SampleLosses"] < self.learned * self.first:
            return None
        whole = self.first * len(self._visits) * n / len(samples)
        losses = {k: [own for own, row in self._suspects.values() if row >= k] for k, _ in self.shares}
        # Of a sum of independent terms that are there or not, the variance is at most the sum of their squares.
        if not any(sum(v := losses[k]) - self.errors * math.hypot(*v) >= share * whole > 0 for k, share in self.shares):
            return None
        worst = sorted(self._suspects, key=lambda sample: -self._suspects[sample][0])
        return Finding(
            f"{len(worst)} samples have losses above {limit:.3g} that have risen since their first visit, and come to "
            f"{percent(sum(losses[2]) / whole)} % of all that was lost at first; the median loss is "
            f"{values['SampleLosses']:.2g}.",
            tuple(f"sample {sample}" for sample in worst),
        )


class Overfitting(SinceStart):
    """The logged `valid_loss` rises while the loss falls, or what is learned does not hold for it, or is by heart.

    Rises: each of its last five values lies above the lowest mean of five in a row, by a tenth of that mean and by a
    tenth of what had been learned until then (the loss of the first step less that mean); and the loss, averaged over
    the same time, has fallen by a tenth since, so that the gap between them has grown. It is what was learned that a
    rise takes away: where 0.7 came down to 0.10, one to 0.12 is a fifth of the lowest value, and 3 % of what the model
    knows. (Early stopping asks for the ratio to the lowest value; Prechelt 1998.)

    Not for others: `valid_loss` lies above the loss by more than half of what that has fallen by since the first step
    (and two standard errors of the first batch), so that less than half of what was learned holds for other samples.

    By heart: over the last five values fewer than one in a hundred of the samples that were trained on had a loss above
    `valid_loss`, by two standard errors of their number (so that 400 losses are needed, of which none is above), while
    of samples that are fitted and not memorised some always have, since losses have a long tail. For both the loss is
    under half of that of the first step, and `valid_loss` lies above it by a tenth of that. A smaller gap alone says
    little: every fitted model has one, and a small validation set that is harder by chance has one from the start. By
    heart needs `SampleLosses`. By the medians of five: one value may jump in the middle of a run that goes well.

    Rise and gap have to be five standard errors: three are no chance, and the lowest of fifty means of noise lies two
    under theirs. The noise of a value is estimated by how far it lies off the line through its two neighbours, over the
    last ten. A continued run has no loss of the first step, so that only the rise over the lowest value counts; and a
    loss that begins below zero has no half. Of a loss of both signs nothing is said.
    """

    failure = "overfitting"
    advice = "Stop at the lowest valid_loss; more data, augmentation, weight decay or dropout."
    reads = ("valid_loss", "Loss", "SampleLosses", "BatchSize")
    hold, release = 1, 1
    risen, fallen, fitted, gap, kept, rare, sure, errors, values = 0.1, 0.1, 0.5, 0.1, 0.5, 0.01, 2.0, 5.0, 5

    def __init__(self) -> None:
        """Start before the first step."""
        super().__init__()
        self._valid, self._train, self._between = Recent(2 * self.values), Recent(2 * self.values), Recent(1000)
        # Batch sizes and their largest losses, since the last value, and between the ones before.
        self._hardest: deque[tuple[float, np.ndarray]] = deque(maxlen=1000)
        self._earlier: deque[list[tuple[float, np.ndarray]]] = deque(maxlen=self.values)
        self._best: tuple[float, float, int] | None = None
        self._last: float | None = None
        self._logged = self._seen = -1
        self._finding: Finding | None = None

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        loss, valid = values.get("Loss"), values.get("valid_loss")
        if loss is not None and step != self._seen:  # `valid_loss` may be logged before the step has ended, or after
            self._seen = step
            self.begin(step, values)
            self._between.add(loss)
            if "BatchSize" in values and "SampleLosses.largest" in values:
                self._hardest.append((values["BatchSize"], values["SampleLosses.largest"]))
        if valid is None or step == self._logged or self.signed:
            return self._finding
        if self._between.values:
            self._last = self._between.mean
        if self._last is None:  # no step has been looked at
            return self._finding
        self._valid.add(valid)
        self._train.add(self._last)
        self._earlier.append([*self._hardest])
        self._between.values.clear()
        self._hardest.clear()
        self._logged = step
        if len(self._valid.values) < self.values or not all(
            map(math.isfinite, (*self._valid.values, *self._train.values))
        ):
            self._finding = None
        else:
            self._finding = self._rises(step) or self._wide_gap()
        return self._finding

    def _rises(self, step: int) -> Finding | None:
        valids, trains = ([*recent.values][-self.values :] for recent in (self._valid, self._train))
        valid, train = fmean(valids), fmean(trains)
        if self._best is None or valid < self._best[0]:
            self._best = valid, train, step
        best, then, when = self._best
        learned = (best if self.began is None else self.began) - best
        noise = math.sqrt(2) * _error(self._valid, self.values)
        least = self.risen * max(best, learned)
        fell = then - train > self.fallen * abs(then)
        if not (min(valids) - best > least > 0 and valid - best > self.errors * noise and fell):
            return None
        lost = f", {percent((valid - best) / learned)} % of what had been learned" if learned > 0 else ""
        return Finding(
            f"valid_loss has risen from {best:.3g} (step {when}) to {valid:.3g}{lost}, with a standard error of "
            f"{noise:.2g}, and the loss fell from {then:.3g} to {train:.3g}."
        )

    def _wide_gap(self) -> Finding | None:
        valid, train = (median([*recent.values][-self.values :]) for recent in (self._valid, self._train))
        if self.began is None or self.began < 0 or not train < self.fitted * self.began:
            return None
        noise = math.hypot(_error(self._valid, self.values), _error(self._train, self.values))
        if not valid - train > max(self.gap * self.began, self.errors * noise):
            return None
        if valid - train > self.kept * (self.began + self.doubt - train):
            return Finding(
                f"The loss has fallen by {self.began - train:.3g}, to {train:.3g}, and valid_loss is {valid:.3g}: less "
                "than half of what was learned holds for other samples."
            )
        looks = [look for between in self._earlier for look in between]
        # If all of those that are kept lie above, nobody knows how many do.
        above = sum(n if all(largest > valid) else (largest > valid).sum() for n, largest in looks)
        seen = sum(n for n, _ in looks)
        expected = self.rare * seen
        if seen == 0 or above > expected - self.sure * math.sqrt(expected):
            return None
        return Finding(
            f"valid_loss is {valid:.3g}, which {above:.0f} of the last {seen:.0f} losses of samples that were trained "
            f"on are above; their mean is {train:.3g}, and was {self.began:.3g} at first."
        )


def _error(recent: Recent, count: int) -> float:
    """Standard error of a mean of `count` values like these, from how far each lies off the line through two others."""
    v = [*recent.values]
    bends = [abs(a - 2 * b + c) for a, b, c in zip(v, v[1:], v[2:], strict=False)]
    # A second difference of white noise has 6 times its variance, and a median size of 0.6745 standard deviations.
    return median(bends) / (0.6745 * math.sqrt(6 * count))


class _Batch(SinceStart):
    """Base of the rules of the batch size: the noise scale (McCandlish et al. 2018), from averages over looks.

    Both its parts are averaged before they are divided: one step's estimate is very noisy.
    """

    reads = ("NoiseScale", "BatchSize", "Loss")
    least: ClassVar[int]
    window: ClassVar[int]

    def __init__(self) -> None:
        """Start before the first step."""
        super().__init__()
        self._trace, self._signal, self._loss = Recent(self.window), Recent(self.window), Recent(20)

    def averages(self, step: int, values: Mapping[str, Any]) -> tuple[float, float, float] | None:
        """Batch size, noise scale (infinite if there is no signal), and the loss."""
        trace, signal = values.get("NoiseScale.trace"), values.get("NoiseScale.signal")
        n, loss = values.get("BatchSize"), values.get("Loss")
        if trace is None or signal is None or n is None or loss is None or not self.begin(step, values):
            return None
        self._trace.add(trace)
        self._signal.add(signal)
        self._loss.add(self.left(loss))
        if len(self._trace.values) < self.least:
            return None
        scale = self._trace.mean / self._signal.mean if self._signal.mean > 0 else math.inf
        return n, scale, self._loss.mean


class BatchTooSmall(_Batch):
    """The gradient is noise, and nothing tells that the model learns.

    The noise scale is more than 4 times the batch while the loss is above a fifth of where it began, and has not fallen
    for sure since then. Noise alone is no failure: a run whose loss falls learns through it, as many do early, before
    the samples agree on anything, and later it is normal, since the signal goes to zero where training ends, and the
    noise stays. For sure is five standard errors by ranks, once in the run (`Fall`). Of 4 samples or more it is said
    after 150 looks and not after 40, and only if the loss is 5 % above that of the first step, and two standard errors
    of that batch's mean: 40 such batches do not tell a slow fall from none, a plateau at the start, which many networks
    leave by themselves, is likelier then, and where labels are mostly chance no loss falls far. Looks count from the
    end of a warm-up, in which nothing can be learned yet. Of a loss of both signs, of which is not seen how far it has
    come, nothing is said.
    """

    failure = "batch too small"
    advice = "Use a batch of the order of the noise scale (or accumulate to it), or lower the learning rate."
    hold, release = 5, 10
    least, window = 40, 60
    times, unlearned, small, patience, risen = 4.0, 0.2, 4, 150, 1.05

    def __init__(self) -> None:
        """Start before the first step."""
        super().__init__()
        self._fall, self._steady = Fall(), Steady()

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        found = self.averages(step, values)
        self._fall.add(values.get("Loss", math.nan))
        looks = self._steady.add(values)
        if found is None or looks < self.least or self._fall.sure or self.signed or self.first is None:
            return None
        n, scale, loss = found
        if scale < self.times * n or loss < self.unlearned * self.first:
            return None
        if n >= self.small and (looks < self.patience or loss < self.risen * self.first + self.doubt):
            return None
        return Finding(f"The batch has {n:.0f} samples, and noise is as large as the gradient for one of {scale:.3g}.")


class BatchTooLarge(_Batch):
    """The batch is 8 times the noise scale or more, and of 128 samples at least: half of it would do nearly as well.

    With a batch of B and a noise scale of b, a step makes 1 / (1 + b / B) of the progress of one without noise
    (McCandlish et al. 2018, equation 2.7): 89 % with B = 8 b, and still 80 % with half of it. The noise scale grows
    while the model learns, so that a batch which is wasted early may be right later.
    """

    failure = "batch wastefully large"
    advice = "Use a smaller batch, of a few times the noise scale: steps are about as good, and cheaper."
    hold, release = 3, 10
    least, window = 10, 20
    times, smallest = 8.0, 128

    def look(self, step: int, values: Mapping[str, Any]) -> Finding | None:
        found = self.averages(step, values)
        if found is None or found[0] < max(self.smallest, self.times * found[1]):
            return None
        return Finding(
            f"The batch has {found[0]:.0f} samples, and noise is as large as the gradient for one of {found[1]:.3g}."
        )
