"""TensorBoard as a sink."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from packext.diagnostics._verdict import Verdict
from packext.diagnostics.sinks._names import histograms


class TensorBoard:
    """Writes for TensorBoard: numbers as scalars, `GradHist1d` as histograms, and verdicts as text.

    A histogram holds the shares of the entries, which sum to 1 and not to their number. Other arrays and the reasons of
    what is absent are for `Run`, which may be a sink of the same monitor and says where to continue.

    Example:
        >>> monitor = Cockpit(model, optimizer, sinks=[Run("runs/first"), TensorBoard("runs/first")])
    """

    def __init__(self, writer: str | Path | Any) -> None:
        """Take a folder for the event files, or a `torch.utils.tensorboard.SummaryWriter`.

        Raises:
            ImportError: if TensorBoard is not installed.
            TypeError: for what is neither.
        """
        if not isinstance(writer, (str, Path)) and not hasattr(writer, "add_scalar"):
            raise TypeError(f"TensorBoard takes a folder or a SummaryWriter, got {writer!r}.")
        self.writer: Any
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError("TensorBoard is not installed: pip install 'packext[tensorboard]'.") from None
        self._make, self.writer = SummaryWriter, writer

    def begin(self, names: list[str]) -> None:
        """Open the folder.

        Args:
            names: of the instruments.
        """
        if isinstance(self.writer, (str, Path)):
            self.writer = self._make(str(self.writer))

    def write(self, step: int, values: Mapping[str, float | np.ndarray], absent: Mapping[str, str]) -> None:
        """Write what is known of a step, to the disk.

        Args:
            step: its number.
            values: numbers and arrays by name.
            absent: not written.
        """
        for name, value in values.items():
            if isinstance(value, float):
                self.writer.add_scalar(name, value, step)
        for name, shares, edges in histograms(values):
            middle = (edges[1:] + edges[:-1]) / 2
            self.writer.add_histogram_raw(
                name,
                min=edges[0],
                max=edges[-1],
                num=shares.sum(),
                sum=shares @ middle,
                sum_squares=shares @ middle**2,
                bucket_limits=edges[1:].tolist(),
                bucket_counts=shares.tolist(),
                global_step=step,
            )
        self.writer.flush()  # a process that is killed, or never closes the writer, loses nothing

    def say(self, verdict: Verdict) -> None:
        """Write a verdict, to the disk.

        Args:
            verdict: new, changed or withdrawn.
        """
        self.writer.add_text("verdicts", str(verdict), verdict.step if verdict.until is None else verdict.until)
        self.writer.flush()
