"""A monitor as a callback of the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn.functional import cross_entropy

import packext as px
from packext.diagnostics._cockpit import Cockpit, Sink, Watch
from packext.diagnostics._instrument import Instrument
from packext.diagnostics._verdict import Rule

try:
    from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]
except ImportError:
    raise ImportError("transformers is not installed: pip install 'packext[transformers]'.") from None


#: Label of a token that does not count.
IGNORED = -100


class _Here(threading.local):
    """The callback of which a step is under way in this thread."""

    callback: CockpitCallback | None = None


_HERE = _Here()


class CockpitCallback(TrainerCallback):
    """Watches the training of a model that computes its own loss, `model(**batch).loss`.

    Example:
        >>> Trainer(model, args, train_dataset=data, callbacks=[CockpitCallback(sinks=[Run("runs/first")])])

    A sample is a row of the batch: its gradient is the sum over its tokens. Its own loss is its part of the loss of the
    optimizer's step, times the number of samples in that step, so that the loss is their mean. The part of a sample
    with many tokens is larger, since the Trainer divides by the number of tokens in the step. Where a row has no token
    that counts (labels of -100 alone), what is of individual gradients and losses is absent. A step of the monitor is
    one of the optimizer, with all its accumulated batches. Instruments that read individual losses (`Alpha`,
    `SampleLosses`) have them where the loss is the cross-entropy of the output's `logits` and the `labels` alone.

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
        rules: Iterable[Rule] | None = None,
    ) -> None:
        """Choose what `Cockpit` is to look at, when, and where to write it.

        Args:
            level: as for `Cockpit`; curvature needs a loss of `torch.nn.functional`, or an `nn` module, in the model.
            every: steps of the optimizer, as for `Cockpit`.
            sinks: as for `Cockpit`.
            instruments: as for `Cockpit`.
            rules: as for `Cockpit`; of each training copies, since they keep what they have seen.
        """
        self._options = {
            "level": level, "every": every, "sinks": list(sinks), "instruments": list(instruments),
            "rules": None if rules is None else list(rules),
        }  # fmt: skip
        self._watch: Watch | None = None
        self._extended: Any = None
        self._hook: Any = None
        self._held: list[Any] = []
        self._stepped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Extend the model and make the monitor.

        Args:
            args: of the Trainer.
            state: of the Trainer.
            control: of the Trainer.
            **kwargs: `model` and `optimizer` are used.

        Raises:
            PackextError: for several processes or devices, or a loss that the Trainer computes.
        """
        for wrong, what in (
            (args.n_gpu > 1, "DataParallel, which cuts a batch among devices"),
            (args.world_size > 1, "several processes: callbacks are not told the module that averages their gradients"),
            (args.label_smoothing_factor, "label_smoothing_factor, with which the loss is not the model's"),
        ):
            if wrong:
                raise px.PackextError(f"CockpitCallback does not work with {what}.")
        self.close()  # after an error nobody need have done so
        if _HERE.callback is not None:  # nor of another one, whose step would ask for its quantities in this training
            _HERE.callback._leave()
        model = kwargs["model"]
        if not px.is_extended(model):
            self._extended = px.extend(model)
        self._hook = model.register_forward_hook(self._ran, with_kwargs=True)
        optimizer = kwargs["optimizer"]
        options = {**self._options, "rules": copy.deepcopy(self._options["rules"])}
        self.monitor = Cockpit(model, getattr(optimizer, "optimizer", optimizer), **options)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a step.

        Args:
            args: of the Trainer.
            state: of the Trainer.
            control: of the Trainer.
            **kwargs: `optimizer` is used.
        """
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        self._watch = self.monitor.step("mean", loss_scale=1.0 if scaler is None else float(scaler.get_scale()))
        self._watch.__enter__()
        _HERE.callback, self._stepped = self, True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End it.

        Args:
            args: of the Trainer.
            state: of the Trainer.
            control: of the Trainer.
            **kwargs: not used.
        """
        watch, self._watch, _HERE.callback = self._watch, None, None
        self._held = []
        if watch is not None:
            watch.__exit__(None, None, None)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the loss of an evaluation within the training as `valid_loss`, which the rule of overfitting reads.

        Args:
            args: of the Trainer.
            state: of the Trainer.
            control: of the Trainer.
            **kwargs: of `metrics` "eval_loss" is used.
        """
        loss = kwargs.get("metrics", {}).get("eval_loss")
        if loss is not None and self._stepped:
            self.monitor.log(valid_loss=loss)

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
        """Leave the model as it was; for you to call after an error in training, of which callbacks are not told."""
        self._leave()
        if self._hook is not None:
            self._hook.remove()
        if self._extended is not None:
            px.unextend(self._extended)
        self._hook = self._extended = None
        self._stepped = False

    def _leave(self) -> None:
        """Leave the step that is under way, if there is one."""
        watch, self._watch = self._watch, None
        self._held = []
        if watch is not None:
            _HERE.callback = None
            watch.__exit__(StopIteration, None, None)

    def _ran(self, model: Any, args: Any, kwargs: Any, output: Any) -> None:
        loss = getattr(output, "loss", None)
        if self._watch is not None and isinstance(loss, Tensor) and loss.requires_grad:
            # The Trainer drops the outputs beside the loss, in which packext sees which sample is which.
            self._held = [get_gradient_edge(v) for v in output.values() if isinstance(v, Tensor) and v.requires_grad]
            self._watch.loss(loss, lambda: _parts(model, kwargs, output), lambda: _counted(model, kwargs, output))


def _parts(model: Any, kwargs: Any, output: Any) -> Tensor | None:
    """The samples' parts of the loss `[N]`; None where they are not known."""
    found = _labelled(model, kwargs, output)
    if found is None:
        return None
    logits, labels, counts = found
    rows = zip(logits, labels, strict=True)  # one after the other: in float64 all would take twice their memory
    sums = torch.stack([cross_entropy(a.double().flatten(0, -2), b.flatten(), reduction="sum") for a, b in rows])
    for n in (kwargs.get("num_items_in_batch"), counts.sum()):
        if n is not None and torch.isclose(sums.sum() / n, output.loss.detach().double(), rtol=1e-3):
            return sums / n
    return None  # other terms are in the loss, or other numbers are to be predicted


def _counted(model: Any, kwargs: Any, output: Any) -> Tensor | None:
    """Which samples have a label that counts `[N]`; None if all have, or where other terms are in the loss."""
    found = _labelled(model, kwargs, output)
    if found is None or (rows := found[2].flatten(1).any(1)).all() or _parts(model, kwargs, output) is None:
        return None
    return rows


def _labelled(model: Any, kwargs: Any, output: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """Logits `[N, ..., C]`, their labels `[N, ...]`, one axis or more, and which count; None if they are no classes."""
    labels, logits = kwargs.get("labels"), getattr(output, "logits", None)
    if not isinstance(labels, Tensor) or not isinstance(logits, Tensor) or labels.shape != logits.shape[:-1]:
        return None
    logits = logits.detach()
    if labels.dim() == 1:
        labels, logits = labels[:, None], logits[:, None]
    elif _causal(model):
        labels, logits = labels[:, 1:], logits[:, :-1]
    counts = labels != IGNORED
    classes = (labels >= 0) & (labels < logits.shape[-1])
    if labels.is_floating_point() or not classes[counts].all():  # numbers that are to be predicted
        return None
    return logits, labels, counts


def _causal(model: Any) -> bool:
    """Whether labels are of the token before, by the name of its loss, which a module of the user's own lacks."""
    return getattr(getattr(model, "loss_function", None), "__name__", "") == "ForCausalLMLoss"
