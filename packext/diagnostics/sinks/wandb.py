"""Weights & Biases as a sink."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from packext.diagnostics._verdict import Verdict
from packext.diagnostics.sinks._names import histograms


class WandB:
    """Logs to a run of Weights & Biases: numbers, and `GradHist1d` as histograms, under "packext/" and their names.

    Verdicts are alerts. The number of the step is in "packext/step", which is the axis of all values. Each call logs a
    row of its own, so W&B's own count of steps grows: what you log yourself must not pass `step=`, as W&B drops rows
    that come from before its count. Other arrays and the reasons of what is absent are for `Run`, which may be a sink
    of the same monitor.

    Example:
        >>> monitor = Cockpit(model, optimizer, sinks=[Run("runs/first"), WandB()])
    """

    def __init__(self, run: Any = None) -> None:
        """Take a run.

        Args:
            run: what `wandb.init()` has returned; by default the run that is active when the monitor is made, or a
                new one in offline mode, from which nothing leaves the machine until `wandb sync`.

        Raises:
            ImportError: if W&B is not installed.
        """
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ImportError("Weights & Biases is not installed: pip install 'packext[wandb]'.") from None
        self._wandb: Any = wandb
        self.run = run

    def begin(self, names: list[str]) -> None:
        """Say which axis the values have; start a run if there is none.

        Args:
            names: of the instruments.
        """
        self.run = self.run or self._wandb.run or self._wandb.init(mode="offline", project="packext")
        self.run.define_metric("packext/step", hidden=True)
        self.run.define_metric("packext/*", step_metric="packext/step")

    def write(self, step: int, values: Mapping[str, float | np.ndarray], absent: Mapping[str, str]) -> None:
        """Log what is known of a step.

        Args:
            step: its number.
            values: numbers and arrays by name.
            absent: not logged.
        """
        row: dict[str, Any] = {k: v for k, v in values.items() if isinstance(v, float)}
        for name, shares, edges in histograms(values):
            row[name] = self._wandb.Histogram(np_histogram=(shares, edges))
        self.run.log({"packext/step": step, **{f"packext/{name}": value for name, value in row.items()}})

    def say(self, verdict: Verdict) -> None:
        """Send a verdict as an alert.

        Args:
            verdict: new, changed or withdrawn.
        """
        withdrawn = "" if verdict.until is None else " (withdrawn)"
        self.run.alert(title=f"{verdict.name}{withdrawn}", text=str(verdict), level="WARN" if not withdrawn else "INFO")
