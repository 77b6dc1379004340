"""What all contenders share: a training-like step, and a look at what it left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.problems import Instance
from benchmarks.quantities import ROWS, Results

CLEARED = tuple(dict.fromkeys(quantity for row in ROWS.values() for quantity in row.quantities))


class UnavailableError(Exception):
    """A library does not offer what is asked for."""


class Contender:
    """A model and a step; this base class computes the plain gradient."""

    pooled = False
    """Whether Kronecker factors of convolutions are those of BackPACK."""
    replaces = False
    """Whether a step leaves the last one's results for the next to replace, as ``optimizer.zero_grad()`` does."""

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
        self.drawn: dict[str, Tensor] = {}
        """The labels that the step before ``read`` drew for each estimate."""

    def step(self) -> None:
        """Forget the last step's results, then do the whole work of one."""
        self.clear()
        self.compute()

    def clear(self) -> None:
        """Drop gradients and, unless they are to be replaced, results, as before any training step."""
        for p in self.parameters:
            p.grad = None
            for name in () if self.replaces else CLEARED:
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

    def labels(self, column: Tensor) -> Tensor:
        """Return the labels y of which a column is a positive multiple of ``p - e_y`` in every prediction."""
        with torch.no_grad():
            p = self.model(self.inputs).softmax(1)
        y = column.argmin(1)
        wanted = p.scatter_add(1, y[:, None], -torch.ones_like(p[:, :1]))
        if not torch.allclose(column / column.norm(), wanted / wanted.norm(), atol=1e-5):
            raise ValueError("not a column of a sampled root")
        return y

    def watched_labels(self) -> list[Tensor]:
        """Repeat the step, and return the labels of all sampled columns that were sent back from the output."""
        seen: list[Tensor] = []

        def watch(_: nn.Module, __: Any, output: Tensor) -> None:
            output.register_hook(seen.append)

        hook = self.model.register_forward_hook(watch)
        self.step()
        hook.remove()
        found = []
        for column in seen:
            with contextlib.suppress(ValueError):
                found.append(self.labels(column))
        return [y for y in found if not y.equal(self.targets)]  # the gradient is such a column, too


def replacing(make: Callable[[], Contender]) -> Contender:
    """Make a contender whose results stand until the next step replaces them."""
    contender = make()
    contender.replaces = True
    return contender


Maker = Callable[[], Contender]
