"""What a step under way is, and what a part of an optimizer is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import packext as px

if TYPE_CHECKING:
    from packext.optim._base import Optimizer


#: Attribute of a gradient that is no longer that of the passes, as `TargetBatch` has divided their sum by the samples.
GATHERED = "_packext_gathered"


class Skip(Exception):
    """Raised by a part that cannot take this step: it is skipped, and reported with the text."""


class Part:
    """One of the things that an optimizer does to a step; `Optimizer` runs its parts one after the other.

    A part holds what it is made with and nothing of the run: hyperparameters are in the groups, where schedulers find
    them, and what a parameter's past matters for is in the optimizer's state.

    Attributes:
        defaults: hyperparameters that it wants in each group.
        keeps: names of what it puts into the state of a parameter, by which a state of other parts is refused when it
            is loaded; None: not said, and nothing is refused.
    """

    keeps: Sequence[str] | None = None

    def __init__(self, **defaults: Any) -> None:
        """Take hyperparameters by name."""
        self.defaults = defaults

    @property
    def kind(self) -> str:
        """What a state must agree in to be loaded: the part, and where it has a choice, what its state is of."""
        return type(self).__name__

    def quantities(self, optimizer: Optimizer) -> Sequence[Any]:
        """What the backward passes before the coming step have to emit; nothing by default."""
        return ()

    def __call__(self, work: Work) -> None:
        """Turn `work.updates` into others, and put what the next step needs into `work.new`."""
        raise NotImplementedError


class Work:
    """A step under way, of some of an optimizer's parameters. Nothing is written before all of it is finite.

    Attributes:
        optimizer: whose step it is.
        params: the parameters that have a gradient.
        groups: the group of each.
        grads: the gradient of each, in float32 or better, not to be written to.
        updates: what each is to be changed by, once `Descend` has given it its sign; the gradients at first.
        values: of each what the backward passes have emitted, by savefield.
        new: entries of each parameter's state that the step is to set.
    """

    def __init__(self, optimizer: Optimizer, items: list[tuple[Tensor, dict[str, Any], dict[str, Any]]]) -> None:
        """Take parameters with their groups and what was emitted for them."""
        self.optimizer = optimizer
        self.params = [p for p, _, _ in items]
        self.groups = [group for _, group, _ in items]
        self.values = [values for _, _, values in items]
        self.grads = [at_least_float32(p.grad) for p in self.params if p.grad is not None]
        self.updates = list(self.grads)
        self.new: list[dict[str, Any]] = [{} for _ in items]
        self._states = [optimizer.state.get(p, {}) for p in self.params]

    def of(self, name: str) -> list[Any]:
        """A hyperparameter, for each parameter."""
        return [group[name] for group in self.groups]

    def old(self, name: str, default: Any = None) -> list[Any]:
        """An entry of the state, for each parameter; `default` before its first step."""
        return [state.get(name, default) for state in self._states]

    def set(self, name: str, values: Iterable[Any]) -> None:
        """Set an entry of the state, for each parameter, if the step is taken."""
        for new, value in zip(self.new, values, strict=True):
            new[name] = value

    def emitted(self, field: str) -> list[Any]:
        """What the backward passes have emitted under a name.

        Returns:
            The result for each parameter.

        Raises:
            PackextError: if a parameter has a gradient and no such quantity.
        """
        for p, values in zip(self.params, self.values, strict=True):
            if field not in values:
                raise px.PackextError(self.optimizer._missing(p, field))
        return [values[field] for values in self.values]


def at_least_float32(t: Tensor) -> Tensor:
    """In float32, or float64."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def placed(value: Any, p: Tensor) -> Any:
    """A copy of an entry of a state, where `p` is and in the dtype in which its steps are computed."""
    if isinstance(value, Tensor):
        dtype = torch.promote_types(p.dtype, torch.float32) if value.is_floating_point() else value.dtype
        return value.to(p.device, dtype, copy=True)
    if isinstance(value, (list, tuple)):
        return type(value)(placed(v, p) for v in value)
    return value


def name_of(optimizer: torch.optim.Optimizer, p: Tensor) -> str:
    """The name of a parameter, where names were given, or its place; and its shape."""
    for k, group in enumerate(optimizer.param_groups):
        for j, each in enumerate(group["params"]):
            if each is p:
                names = group.get("param_names")
                where = names[j] if names else f"parameter {j} of group {k}"
                return f"{where}, shape {list(p.shape)}"
    return f"a parameter of shape {list(p.shape)}"
