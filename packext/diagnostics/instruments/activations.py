"""What modules put out in the forward pass; hooks of the monitor are on them during a tracked step."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from packext.diagnostics._instrument import Instrument
from packext.diagnostics._step import Absent, Step


class _Hooked(Instrument):
    """Has forward hooks on some modules while a step is tracked."""

    def chosen(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules, by path."""
        raise NotImplementedError

    def see(self, path: str, output: Tensor) -> None:
        """A module has put out a tensor."""
        raise NotImplementedError

    def enter(self, step: int, model: nn.Module) -> None:
        def hook(path: str, module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and torch.is_grad_enabled():
                with torch.no_grad():
                    self.see(path, output.detach())

        self._seen: dict[str, Any] = {}
        self._handles = [m.register_forward_hook(functools.partial(hook, k)) for k, m in self.chosen(model).items()]

    def leave(self) -> None:
        for handle in self._handles:
            handle.remove()


class DeadUnits(_Hooked):
    """Share of the units of each ReLU that put out zero for all samples of the step, and of all ReLUs together.

    A unit is a channel: an index along axis 1 of an output `[N, C]` or `[N, C, H, W, ...]`. For `[N, A, B]` the axis
    has to be said. A ReLU called as a function is not seen.
    """

    def __init__(self, axis: int | None = None) -> None:
        """Choose the axis of the units, where it is not axis 1."""
        self.axis = axis

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if not self.chosen(model):
            raise ValueError(f"DeadUnits needs modules nn.ReLU or nn.ReLU6, and {type(model).__name__} has none.")

    def chosen(self, model: nn.Module) -> dict[str, nn.Module]:
        return {name: m for name, m in model.named_modules() if isinstance(m, (nn.ReLU, nn.ReLU6))}

    def see(self, path: str, output: Tensor) -> None:
        if self.axis is None and (output.dim() < 2 or output.dim() == 3):
            self._seen[path] = Absent(f"which axis of {list(output.shape)} holds the units: pass DeadUnits(axis=...)")
            return
        units = output.movedim(1 if self.axis is None else self.axis, 0).flatten(1)
        alive = (units != 0).any(1)
        self._seen[path] = alive | self._seen[path] if isinstance(self._seen.get(path), Tensor) else alive

    def measure(self, step: Step) -> dict[str, Any]:
        if not self._seen:
            raise Absent("no ReLU has run in this step")
        masks = [s for s in self._seen.values() if isinstance(s, Tensor)]
        whole = 1 - torch.cat(masks).double().mean() if len(masks) == len(self._seen) else None
        return {"": whole, **{k: 1 - s.double().mean() if isinstance(s, Tensor) else s for k, s in self._seen.items()}}


class ActivationScale(_Hooked):
    """Root mean square of what each module with parameters of its own puts out, over all samples of the step."""

    def chosen(self, model: nn.Module) -> dict[str, nn.Module]:
        return {name: m for name, m in model.named_modules() if m._parameters and not m._modules}

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if not self.chosen(model):
            raise ValueError(
                f"ActivationScale needs modules with parameters and no parts, and {type(model).__name__} has none."
            )

    def see(self, path: str, output: Tensor) -> None:
        square, count = self._seen.get(path, (0.0, 0))
        self._seen[path] = (square + output.double().square().sum(), count + output.numel())

    def measure(self, step: Step) -> dict[str, Any]:
        if not self._seen:
            raise Absent("no module with parameters has put out a tensor in this step")
        return {k: (s / count) ** 0.5 if count else Absent("no entries") for k, (s, count) in self._seen.items()}
