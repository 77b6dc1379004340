"""Quantities of your choice during a training by Lightning's Trainer."""

from __future__ import annotations

from typing import Any

import packext as px
from packext.adapters._emission import Emission, Receive

try:
    from lightning.pytorch.callbacks import Callback  # pyright: ignore[reportMissingImports]
except ImportError:
    raise ImportError("Lightning is not installed: pip install 'packext[lightning]'.") from None


class EmitCallback(Callback):
    """Emits quantities in the backward passes of every few steps, and logs what you make of them.

    Example:
        >>> def receive(step, results):
        ...     return {"largest gradient": results.batch_l2.max().sqrt()}
        >>> Trainer(callbacks=[EmitCallback(px.BatchL2Grad(), receive=receive, every=10)])

    The training is the same to the last bit. Batches that are accumulated for a step are one, as `px.backpack` with
    `accumulate=True` has them. For instruments, verdicts and a page there is `packext.diagnostics.lightning`.
    """

    def __init__(self, *quantities: Any, receive: Receive, every: int = 1, scale: str | float = "loss") -> None:
        """Say what is to be emitted; what `px.backpack` refuses is refused here.

        Args:
            *quantities: as for `px.backpack`.
            receive: called with the step's number, from 0, and its results, before the optimizer's step; what it
                returns is logged by the module's `log_dict`.
            every: steps of the optimizer.
            scale: as for `px.backpack`; "sample" needs a loss module that is an attribute of the LightningModule.
        """
        super().__init__()
        self._emission, self._scale = Emission(quantities, receive, every, scale), scale

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Extend the module, if it is not, until the end of the training.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.

        Raises:
            PackextError: with manual optimization, several processes, or a loss scale.
        """
        for wrong, what in (
            (not pl_module.automatic_optimization, "manual optimization: open px.backpack in training_step"),
            (trainer.world_size > 1, "several processes: open px.backpack(group=...) in a loop of your own"),
            (str(trainer.precision) == "16-mixed" and self._scale != "sample", '16-mixed, unless scale="sample"'),
        ):
            if wrong:
                raise px.PackextError(f"EmitCallback does not work with {what}.")
        self._emission.extend(pl_module)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Open the context, unless it is.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.
            loss: not looked at.
        """
        self._emission.open(trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Close it, and log.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.
            optimizer: not looked at.
        """
        values = self._emission.land(trainer.global_step)
        if values:
            pl_module.log_dict(values)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave the module as it was.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.
        """
        self._emission.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.
            exception: what has stopped the training.
        """
        self._emission.close()
