"""What an instrument is: what it needs of the backward pass, and a formula."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from packext.diagnostics._step import Step


@runtime_checkable
class Processes(Protocol):
    """The processes that train one model. All of them have to make the same calls in the same order."""

    def gather(self, mine: Any) -> list[Any]:
        """What each process has given, in the order of the processes."""
        ...

    def sum(self, mine: torch.Tensor) -> torch.Tensor:
        """The sum over the processes of a tensor that has one shape in all of them."""
        ...


class Instrument:
    """Base of all instruments: one statistic of a step, or a few of one kind.

    A subclass says in `needs` which quantities it reads and in `measure` what it makes of them. It is recorded under
    the name of its class.
    """

    #: Quantities that the backward pass is to emit; equal ones of several instruments are computed once.
    needs: tuple[Any, ...] = ()
    #: Whether it reads `step.losses`.
    losses: ClassVar[bool] = False
    #: Whether it reads `step.compared`.
    targets: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Under which it is recorded."""
        return type(self).__name__

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Raise a `ValueError` if the instrument does not fit the model or the optimizer."""

    def parameters(self, model: nn.Module) -> list[nn.Parameter] | None:
        """Of which the quantities in `needs` are read; of others they are made if another instrument reads these.

        Args:
            model: the monitored model.

        Returns:
            The parameters, or None for all.
        """
        return None

    def start(self, step: int) -> None:
        """A monitor starts at `step`, not 0 where it continues a record; forget what was kept of another run."""

    def enter(self, step: int, model: nn.Module) -> None:
        """A step that is tracked begins."""

    def leave(self) -> None:
        """The step has ended, with or without an error; comes before `measure`."""

    def unite(self, processes: Processes) -> None:
        """Make what `enter` has had collected in this process what all of them have, before `measure`.

        An instrument that overrides `enter` and not this is absent in several processes.
        """

    def measure(self, step: Step) -> Any:
        """The value for this step.

        Args:
            step: what was seen of it.

        Returns:
            A number (or tensor or array without axes); an array; or a dictionary of them: "" for the whole, by the
            names of parameters or modules (recorded as "Name/0.weight"), or of parts that begin with a dot
            ("Name.part"). A member may be an `Absent`. None where the value comes with the next step.

        Raises:
            Absent: where it is undefined, with the reason.
        """
        raise NotImplementedError

    def follow(self) -> tuple[Any, ...] | None:
        """Quantities needed of the next step to complete this one's value; None if it is complete."""
        return None

    def conclude(self, step: Step) -> Any:
        """The value of the last step, as `measure` returns it, now that the next is known.

        Where no instrument is due in the next step, its `update` is formed if it is read in here, and not later.
        """
        raise NotImplementedError
