"""What all contenders share: a training-like step, and a look at what it left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.problems import Instance
from benchmarks.quantities import Results

CLEARED = (
    "grad_batch",
    "batch_l2",
    "sum_grad_squared",
    "variance",
    "grad_dot",
    "batch_dot",
    "clipped_grad",
)


class UnavailableError(Exception):
    """A library does not offer what is asked for."""


class Contender:
    """A model and a step; this base class computes the plain gradient."""

    def __init__(self, model: nn.Module, instance: Instance) -> None:
        """Keep the model, which is this contender's own, and the batch.

        Args:
            model: A model with the instance's weights, already prepared for the library.
            instance: Loss and batch, shared with the other contenders.
        """
        self.model = model
        self.loss_fn = instance.loss_fn
        self.inputs = instance.inputs
        self.targets = instance.targets
        self.batch = instance.batch
        self.max_norm = instance.problem.max_norm
        # by name, since a library may need a layer in another order of parameters
        named = dict(model.named_parameters())
        self.parameters: list[Any] = [named[name] for name in instance.names]

    def step(self) -> None:
        """Forget the last step's results, then do the whole work of one."""
        self.clear()
        self.compute()

    def clear(self) -> None:
        """Drop gradients and results, as before any training step."""
        for p in self.parameters:
            p.grad = None
            for name in CLEARED:
                if name in p.__dict__:
                    delattr(p, name)

    def compute(self) -> None:
        """Run forward, backward, and whatever follows them."""
        self.loss_fn(self.model(self.inputs), self.targets).backward()

    def read(self) -> Results:
        """Return what the step computed; not part of any measurement."""
        results: Results = {"grad": [p.grad for p in self.parameters]}
        for name in CLEARED:
            found = [getattr(p, name, None) for p in self.parameters]
            if any(f is not None for f in found):
                results[name] = found
        return results


Maker = Callable[[], Contender]
