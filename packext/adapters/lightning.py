"""Quantities of your choice during a training by Lightning's Trainer."""

from __future__ import annotations

from typing import Any

import packext as px
from packext.adapters._emission import Emission, Receive

try:
    from lightning.pytorch.callbacks import Callback  # pyright: ignore[reportMissingImports]
    from lightning.pytorch.strategies import DDPStrategy  # pyright: ignore[reportMissingImports]
except ImportError:
    raise ImportError("Lightning is not installed: pip install 'packext[lightning]'.") from None


class EmitCallback(Callback):
    """Emits quantities in the backward passes of every few steps, and logs what you make of them.

    Example:
        >>> def receive(step, results):
        ...     return {"largest gradient": results.batch_l2.max().sqrt()}
        >>> Trainer(callbacks=[EmitCallback(px.BatchL2Grad(), receive=receive, every=10)])

    The training is the same to the last bit; of what `torch.compile` compiles, steps that are observed run as it is
    written, and it is the same but for the compiler's rounding. Batches that are accumulated for a step are one, as
    `px.backpack` with `accumulate=True` has them, and in several processes results are of the samples of all, in each
    of them. For instruments, verdicts and a page there is `packext.diagnostics.lightning`.
    """

    def __init__(self, *quantities: Any, receive: Receive, every: int = 1, scale: str | float = "loss") -> None:
        """Say what is to be emitted; what `px.backpack` refuses is refused here.

        Args:
            *quantities: as for `px.backpack`; or controllers of `px.optim`, as for `px.optim.emit`, whose `step()` is
                then called in `receive`.
            receive: called with the step's number, from 0, and its results, before the optimizer's step; what it
                returns is logged by the module's `log_dict`.
            every: steps of the optimizer.
            scale: as for `px.backpack`; "sample" needs a loss module that is an attribute of the LightningModule. The
                factor of a `GradScaler` is taken out again; of a step that it skips, results are not finite.
        """
        super().__init__()
        self._emission = Emission(quantities, receive, every, scale)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Extend the module, if it is not, until the end of the training.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.

        Raises:
            PackextError: with manual optimization, several processes that are not those of Lightning's DDP strategy, or
                these with scale "loss".
        """
        alien = trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy)
        for wrong, what in (
            (not pl_module.automatic_optimization, "manual optimization: open px.backpack in training_step"),
            (alien, f"{type(trainer.strategy).__name__}, but with one process or DDPStrategy"),
        ):
            if wrong:
                raise px.PackextError(f"EmitCallback does not work with {what}.")
        self._emission.over(trainer.world_size)
        self._emission.extend(pl_module)
        self._passed = False  # whether the step has had a backward pass

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Open the context, unless it is: before the forward pass, which a compiled module makes as it is written then.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.
            batch: not looked at.
            batch_idx: not looked at.
        """
        self._emission.open(trainer.global_step, getattr(trainer.precision_plugin, "scaler", None))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Note that there is a backward pass: `training_step` may return None, so that a batch has none.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.
            loss: not looked at.
        """
        self._passed = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Close it, and log.

        Args:
            trainer: of Lightning.
            pl_module: the LightningModule.
            optimizer: not looked at.
        """
        passed, self._passed = self._passed, False
        if not passed:
            self._emission.leave()
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
