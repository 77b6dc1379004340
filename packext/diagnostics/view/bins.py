"""A bounded number of bins over the steps, however many there are."""

from __future__ import annotations

import numpy as np


class Bins:
    """Numbers of some names over the steps: smallest, largest and mean in bins of equal width.

    A bin holds the steps from one of `at` on, of a width that is a power of two and doubles when there are more than
    `most` bins with something in them. So no extreme is lost, and a run that is looked at seldom is not binned at all.

    Attributes:
        width: of a bin, in steps.
        at: first steps of the bins `[bins]`, ascending.
    """

    def __init__(self, most: int) -> None:
        """Choose how many bins there are at most."""
        self.most, self.width = most, 1
        self.at = np.empty(0, np.int64)
        self._changed = np.empty(0, np.int64)  # the revision in which a bin has changed last
        self._folded = [np.empty((0, 0))] * 4  # smallest, largest, sum, count: [bins, names]

    def add(self, steps: np.ndarray, numbers: np.ndarray, revision: int) -> None:
        """Take numbers.

        Args:
            steps: of the rows `[rows]`, in any order.
            numbers: `[rows, names]`; NaN where there is none. There may be more names than before.
            revision: under which the bins that they change will be known.
        """
        if not len(steps):
            return
        none = np.isnan(numbers)
        rows = [np.where(none, empty, numbers) for empty in (np.inf, -np.inf, 0.0)] + [(~none).astype(float)]
        more = numbers.shape[1] - self._folded[0].shape[1]
        if more:  # which may stand among the others: rows of old and of new bins are of the same names
            self._changed[:] = revision
        for k, empty in enumerate((np.inf, -np.inf, 0.0, 0.0)):
            old = np.pad(self._folded[k], ((0, 0), (0, more)), constant_values=empty)
            self._folded[k] = np.concatenate([old, rows[k]])
        self.at = np.concatenate([self.at, steps])
        self._changed = np.concatenate([self._changed, np.full(len(steps), revision)])
        self._fold()
        while len(self.at) > self.most:
            self.width *= 2
            self._changed[:] = revision
            self._fold()

    def _fold(self) -> None:
        self.at = self.at - self.at % self.width
        order = np.argsort(self.at, kind="stable")
        self.at, first = np.unique(self.at[order], return_index=True)
        ways = (np.minimum, np.maximum, np.add, np.add)
        self._folded = [way.reduceat(a[order], first, axis=0) for way, a in zip(ways, self._folded, strict=True)]
        self._changed = np.maximum.reduceat(self._changed[order], first)

    def since(self, revision: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The bins from the first that has changed after a revision.

        Args:
            revision: after which; -1 for all.

        Returns:
            First steps `[bins]`; mean, smallest and largest `[bins, names]`, NaN where there is none.
        """
        new = np.flatnonzero(self._changed > revision)
        first = int(new[0]) if len(new) else len(self.at)
        low, high, total, count = (a[first:] for a in self._folded)
        none = count == 0
        with np.errstate(invalid="ignore"):
            mean = np.where(none, np.nan, total / np.where(none, 1, count))
        return self.at[first:], mean, np.where(none, np.nan, low), np.where(none, np.nan, high)
