"""Quantities of your choice during a training by the Trainer of Hugging Face's transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

import packext as px
from packext.adapters._emission import Emission, Receive

try:
    from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]
except ImportError:
    raise ImportError("transformers is not installed: pip install 'packext[transformers]'.") from None


class EmitCallback(TrainerCallback):
    """Emits quantities in the backward passes of every few steps, and logs what you make of them.

    Example:
        >>> def receive(step, results):
        ...     return {"largest gradient": results.batch_l2.max().sqrt()}
        >>> Trainer(model, args, train_dataset=data, callbacks=[EmitCallback(px.BatchL2Grad(), receive=receive)])

    The training is the same to the last bit; with `torch_compile` steps that are observed run as the model is written,
    and it is the same but for the compiler's rounding. A sample is a row of the batch. Batches that are accumulated for
    a step are one, as `px.backpack` with `accumulate=True` has them, and in several processes results are of the
    samples of all, in each of them. For instruments, verdicts and a page there is `packext.diagnostics.huggingface`.
    """

    def __init__(self, *quantities: Any, receive: Receive, every: int = 1, scale: str | float = "loss") -> None:
        """Say what is to be emitted; what `px.backpack` refuses is refused here.

        Args:
            *quantities: as for `px.backpack`; or controllers of `px.optim`, as for `px.optim.emit`, whose `step()` is
                then called in `receive`.
            receive: called with the step's number, from 0, and its results, before the optimizer's step; what it
                returns is put into the Trainer's `state.log_history` with the step, and into nothing else: log to other
                places in `receive` itself.
            every: steps of the optimizer.
            scale: as for `px.backpack`. The factor of a `GradScaler` (fp16) is taken out again; of a step that it
                skips, results are not finite.
        """
        self._emission, self._hook = Emission(quantities, receive, every, scale), None
        self._held: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Extend the model, if it is not, until the end of the training.

        Args:
            args: of the Trainer.
            state: of the Trainer.
            control: of the Trainer.
            **kwargs: `model` is used.

        Raises:
            PackextError: for several devices in one process, FSDP, DeepSpeed, or several processes with scale "loss".
        """
        for wrong, what in (
            (args.n_gpu > 1, "DataParallel, which cuts a batch among devices: start a process for each device"),
            (args.fsdp or args.deepspeed, "FSDP or DeepSpeed, but with DistributedDataParallel"),
        ):
            if wrong:
                raise px.PackextError(f"EmitCallback does not work with {what}.")
        self._emission.over(args.world_size)
        self._emission.extend(kwargs["model"])
        self._hook = kwargs["model"].register_forward_hook(self._ran)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the context.

        Args:
            args: of the Trainer.
            state: of the Trainer.
            control: of the Trainer.
            **kwargs: `optimizer` is used.
        """
        self._emission.open(state.global_step, getattr(kwargs["optimizer"], "scaler", None))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close it, and log.

        Args:
            args: of the Trainer.
            state: of the Trainer.
            control: of the Trainer.
            **kwargs: not used.
        """
        self._held = []
        values = self._emission.land(state.global_step)
        if values:
            state.log_history.append({**values, "step": state.global_step})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was.

        Args:
            args: of the Trainer.
            state: of the Trainer.
            control: of the Trainer.
            **kwargs: not used.
        """
        self.close()

    def close(self) -> None:
        """Leave the model as it was; for you to call after an error in the training, which callbacks are not told."""
        self._held = []
        self._emission.close()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _ran(self, model: Any, args: Any, output: Any) -> None:
        if self._emission.is_open and getattr(output, "loss", None) is not None:
            # The Trainer drops the outputs beside the loss, in which packext sees which sample is which.
            self._held = [get_gradient_edge(v) for v in output.values() if isinstance(v, Tensor) and v.requires_grad]
