"""What goes into the model and what modules put out; hooks of the monitor are on them during a tracked step."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from packext.diagnostics._instrument import Instrument, Processes
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

    - Formula: units whose outputs are all 0, over all units
    - Units: a share
    - Cost: outputs are compared with 0 in the forward pass; no quantity
    - Source: the definition
    - Absent: if no ReLU has run; of one of which it is not known which axis holds the units, or that was called with
      different numbers of them. A model without modules `nn.ReLU` or `nn.ReLU6` is refused when the monitor is made
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
            self._add(path, Absent(f"which axis of {list(output.shape)} holds the units: pass DeadUnits(axis=...)"))
            return
        units = output.movedim(1 if self.axis is None else self.axis, 0).flatten(1)
        self._add(path, (units != 0).any(1))

    def _add(self, path: str, alive: Tensor | Absent, where: str = "call") -> None:
        """Take the units that were alive in one call (or process), or why these are not known."""
        known = self._seen.setdefault(path, alive)
        if isinstance(known, Absent):
            return
        if isinstance(alive, Absent):
            self._seen[path] = alive
        elif known.shape == alive.shape:
            self._seen[path] = known | alive
        else:
            self._seen[path] = Absent(f"it has {len(known)} units in one {where} and {len(alive)} in another")

    def unite(self, processes: Processes) -> None:
        mine = {path: s.cpu() if isinstance(s, Tensor) else s for path, s in self._seen.items()}
        self._seen = {}
        for seen in processes.gather(mine):
            for path, alive in seen.items():
                self._add(path, alive, "process")

    def measure(self, step: Step) -> dict[str, Any]:
        if not self._seen:
            raise Absent("no ReLU has run in this step")
        masks = [s for s in self._seen.values() if isinstance(s, Tensor)]
        whole = 1 - torch.cat(masks).double().mean() if len(masks) == len(self._seen) else None
        return {"": whole, **{k: 1 - s.double().mean() if isinstance(s, Tensor) else s for k, s in self._seen.items()}}


class ActivationScale(_Hooked):
    """Root mean square of what each module puts out that has parameters and no parts, over all samples of the step.

    - Formula: `sqrt(mean of y²)` over all entries y of the module's output, by module
    - Units: those of the output
    - Cost: a sum of squares of each output in the forward pass; no quantity
    - Source: the definition
    - Absent: if no such module has put out a tensor
    """

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

    def unite(self, processes: Processes) -> None:
        mine = {path: (float(square), count) for path, (square, count) in self._seen.items()}
        self._seen = {}
        for seen in processes.gather(mine):
            for path, (square, count) in seen.items():
                before = self._seen.get(path, (0.0, 0))
                self._seen[path] = before[0] + square, before[1] + count

    def measure(self, step: Step) -> dict[str, Any]:
        if not self._seen:
            raise Absent("no module with parameters has put out a tensor in this step")
        return {k: (s / count) ** 0.5 if count else Absent("no entries") for k, (s, count) in self._seen.items()}


class InputScale(_Hooked):
    """Root mean square of the numbers that the model receives, over all samples of the step.

    "InputScale.mean" is their mean, "InputScale.largest" the largest magnitude, and "InputScale.infinite" the share of
    those that are NaN or infinite.

    - Formula: `sqrt(mean of x²)` over all floating-point entries x of the model's arguments
    - Units: those of the input
    - Cost: norm, mean and largest entry of the input in the forward pass; no quantity
    - Source: the definition
    - Absent: if there are none: integers (such as tokens) have no scale
    """

    def enter(self, step: int, model: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if torch.is_grad_enabled():
                leaves = pytree.tree_leaves((args, kwargs))
                with torch.no_grad():
                    self._parts += [_moments(x) for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]

        self._parts: list[tuple[float, float, float, int, int]] = []
        self._handles = [model.register_forward_pre_hook(hook, with_kwargs=True)]

    def unite(self, processes: Processes) -> None:
        self._parts = [part for parts in processes.gather(self._parts) for part in parts]

    def measure(self, step: Step) -> dict[str, Any]:
        if not sum(part[-1] for part in self._parts):
            raise Absent("the model received no floating-point numbers in this step")
        totals, squares, largest, infinite, counts = zip(*self._parts, strict=True)
        n = sum(counts)
        return {
            "": (sum(squares) / n) ** 0.5,
            ".mean": sum(totals) / n,
            ".largest": max(largest),
            ".infinite": sum(infinite) / n,
        }


def _moments(x: Tensor) -> tuple[float, float, float, int, int]:
    """Sum, sum of squares, largest magnitude, how many are not finite, how many there are."""
    x = x.detach().float() if x.itemsize < 4 else x.detach()
    if not x.numel():
        return 0.0, 0.0, 0.0, 0, 0
    square = float(x.norm()) ** 2
    # The sum of squares is finite unless an entry is not, or overflows: only then is it worth to count.
    infinite = 0 if square < float("inf") else int((~x.isfinite()).sum())
    return float(x.mean()) * x.numel(), square, float(x.abs().max()), infinite, x.numel()


class OutputScale(_Hooked):
    """Root mean square of what the model puts out, over all samples of the step.

    "OutputScale.spread" is how much of that differs between samples: the standard deviation over the samples (root mean
    square over the entries of an output) in units of it. Rows are the samples; of several tensors the first counts.

    - Formula: `sqrt(mean of y²)`; of the spread `sqrt(mean of var(y) / mean of y²)`, with the biased variance over the
      rows of a pass
    - Units: those of the output; of the spread none
    - Cost: mean square and variance of the output in the forward pass; no quantity
    - Source: the definition
    - Absent: if the output has no floating-point tensor. The spread also for one sample, for an output of zeros, and
      where rows are not samples
    """

    def enter(self, step: int, model: nn.Module) -> None:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                tensors = [y for y in pytree.tree_leaves(output) if isinstance(y, Tensor) and y.is_floating_point()]
                tensors = [y.detach() for y in tensors if y.dim() > 0 and y.numel()]
                if tensors:
                    y = tensors[0].float() if tensors[0].itemsize < 4 else tensors[0]
                    variance, mean = torch.var_mean(y, 0, correction=0)
                    self._parts.append((len(y), float(y.square().mean()), float(variance.mean()), mean))

        self._parts: list[tuple[int, float, float | None, Tensor]] = []
        self._handles = [model.register_forward_hook(hook)]

    def unite(self, processes: Processes) -> None:
        parts = processes.gather([(n, square, variance, mean.shape) for n, square, variance, mean in self._parts])
        mine, self._parts = self._parts, []
        if len({tuple(shape for *_, shape in part) for part in parts}) > 1:  # so that no variance unites
            self._parts = [(n, square, None, torch.empty(0)) for part in parts for n, square, *_ in part]
            return
        for (n, _, _, mean), *each in zip(mine, *parts, strict=True):
            rows = sum(part[0] for part in each)
            whole = processes.sum(mean * n) / rows
            apart = processes.sum((mean - whole).square().mean() * n) / rows
            within = sum(part[0] * part[2] for part in each) / rows
            self._parts.append((rows, sum(part[0] * part[1] for part in each) / rows, within + float(apart), whole))

    def measure(self, step: Step) -> dict[str, Any]:
        if not self._parts:
            raise Absent("the model has put out no floating-point numbers in this step")
        rows = sum(part[0] for part in self._parts)
        square = sum(n * s for n, s, *_ in self._parts) / rows
        variances = [v for *_, v, _ in self._parts if v is not None]
        variance = sum(n * v for (n, *_), v in zip(self._parts, variances, strict=False)) / rows
        spread: Any = (variance / square) ** 0.5 if square > 0 else Absent("the output is zero")
        if len(variances) < len(self._parts):
            spread = Absent("the outputs of the processes differ in shape or number")
        elif min(part[0] for part in self._parts) < 2:
            spread = Absent("one sample does not differ from others")
        elif all(p.n for p in step.passes) and rows != step.n:
            spread = Absent(f"the output has {rows} rows for {step.n} samples")
        return {"": square**0.5, ".spread": spread}
