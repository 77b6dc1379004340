"""A monitor as a callback of Lightning's Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import packext as px
from packext.diagnostics._cockpit import Cockpit, Sink, Watch
from packext.diagnostics._instrument import Instrument
from packext.diagnostics._verdict import Rule

try:
    from lightning.pytorch.callbacks import Callback  # pyright: ignore[reportMissingImports]
except ImportError:
    raise ImportError("Lightning is not installed: pip install 'packext[lightning]'.") from None


class CockpitCallback(Callback):
    """Watches the training of a LightningModule.

    Example:
        >>> Trainer(callbacks=[CockpitCallback("economy", every=10, sinks=[Run("runs/first")])])

    The callback extends the LightningModule while it trains, and with it a loss that is a module and an attribute, as
    `self.loss = nn.CrossEntropyLoss()` is. For other losses that are means over samples (functions of
    `torch.nn.functional`) there is `scale="mean"`; curvature and individual losses are absent then. A step of the
    monitor is one of the optimizer: accumulated batches, a loss scale and clipping by the Trainer are seen as in a loop
    of your own.

    Attributes:
        monitor: the `Cockpit`, from the start of the training on; its `values` are those of the last step.
    """

    monitor: Cockpit

    def __init__(
        self,
        level: str | None = "economy",
        every: int | Callable[[int], bool] = 1,
        sinks: Iterable[Sink] = (),
        instruments: Iterable[Instrument] = (),
        scale: str = "sample",
        rules: Iterable[Rule] | None = None,
    ) -> None:
        """Choose what `Cockpit` is to look at, when, and where to write it.

        Args:
            level: as for `Cockpit`.
            every: steps of the optimizer, as for `Cockpit`.
            sinks: as for `Cockpit`.
            instruments: as for `Cockpit`.
            scale: as for `Cockpit.step`: "sample", with a loss that is a module, or "mean".
            rules: as for `Cockpit`; of each training copies, since they keep what they have seen.

        Raises:
            ValueError: for another scale.
        """
        super().__init__()
        if scale not in ("sample", "mean"):
            raise ValueError(f'scale must be "sample" or "mean", got {scale!r}.')
        self._scale = scale
        self._options = {
            "level": level, "every": every, "sinks": list(sinks), "instruments": list(instruments),
            "rules": None if rules is None else list(rules),
        }  # fmt: skip
        self._watch: Watch | None = None
        self._stepped = self._extended = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Extend the module and make the monitor.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.

        Raises:
            PackextError: with manual optimization, several optimizers, or several processes.
        """
        name = type(pl_module).__name__
        if not pl_module.automatic_optimization:
            raise px.PackextError(
                f"CockpitCallback needs automatic optimization, and {name} optimizes manually: open `with "
                "monitor.step():` in training_step, with a Cockpit of your own."
            )
        if len(trainer.optimizers) != 1:
            raise px.PackextError(
                f"CockpitCallback needs one optimizer, and configure_optimizers of {name} gives "
                f"{len(trainer.optimizers)}."
            )
        if trainer.world_size > 1:
            raise px.PackextError(
                f"CockpitCallback watches one process, and the Trainer has {trainer.world_size}: under their strategy "
                "training_step, loss included, is the model. Use a Cockpit in a loop of your own."
            )
        self._extended = not px.is_extended(pl_module)
        if self._extended:
            px.extend(pl_module)
        options = {**self._options, "rules": copy.deepcopy(self._options["rules"])}
        self.monitor = Cockpit(pl_module, trainer.optimizers[0], **options)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin a step, unless batches are being accumulated.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.
            batch: not looked at.
            batch_idx: not looked at.
        """
        if self._watch is None:
            factor = self._factor(trainer) if self._scale == "mean" else 1.0
            self._watch, self._stepped = self.monitor.step(self._scale, loss_scale=factor), False
            self._watch.__enter__()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Take the loss, if no module has computed it.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.
            loss: as `backward()` will go through it: with the factor of a `GradScaler`.
        """
        if self._scale == "mean" and self._watch is not None:
            self._watch.loss(loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Note that the step ends with this batch.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.
            optimizer: not looked at.
        """
        self._stepped = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the step, if the optimizer has made one.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.
            outputs: not looked at.
            batch: not looked at.
            batch_idx: not looked at.
        """
        if self._stepped:
            self._close(None)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the module as it was.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.
        """
        self._close(None)
        if self._extended:
            px.unextend(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was; an error of packext's then names the instruments.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.
            exception: what has stopped the training.

        Raises:
            NotExtendedError: for a loss that is no module, without `scale="mean"`.
        """
        try:
            self._close(exception)
        except px.NotExtendedError as error:
            raise px.NotExtendedError(
                f'{error} For a loss that is a mean over samples, this callback has CockpitCallback(..., scale="mean").'
            ) from error
        finally:
            if self._extended:
                px.unextend(pl_module)

    @staticmethod
    def _factor(trainer: Any) -> float:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _close(self, error: BaseException | None) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.__exit__(type(error) if error else None, error, None)
