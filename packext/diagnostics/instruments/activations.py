"""What goes into the model and what modules put out; hooks of the monitor are on them during a tracked step."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from packext.diagnostics._instrument import Instrument, Processes
from packext.diagnostics._observe import Hook
from packext.diagnostics._step import NOT_FINITE, Absent, Step
from packext.diagnostics._tensors import norm

#: An entry of a mask that is added to scores, where they do not count: minus infinity, or a number that is as good.
MASKED = -1e4


class _Hooked(Instrument):
    """Has forward hooks on some modules while a step is tracked, for passes at the parameters where it began."""

    def _begin(self, model: nn.Module) -> None:
        """A step begins."""
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._versions: dict[str, list[int]] = {}  # at the first call of each module

    def _counts(self, path: str) -> bool:
        """Whether a call of a module is one of the step's: with gradients, and not a closure's at other parameters."""
        if not torch.is_grad_enabled():
            return False
        with torch._C.DisableTorchFunction():  # 60 times faster where a mode runs, as in extended models
            versions = [p._version for p in self._trained]
        return versions == self._versions.setdefault(path, versions)

    def chosen(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules, by path."""
        raise NotImplementedError

    def see(self, path: str, output: Tensor) -> None:
        """A module has put out a tensor."""
        raise NotImplementedError

    def enter(self, step: int, model: nn.Module) -> None:
        def hook(path: str, module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and self._counts(path):
                with torch.no_grad():
                    self.see(path, output.detach())

        self._begin(model)
        self._seen: dict[str, Any] = {}
        self._handles = [
            m.register_forward_hook(Hook(functools.partial(hook, path))) for path, m in self.chosen(model).items()
        ]

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

    Of the arguments those count that are floating-point tensors with two axes or more and as many rows as the first
    tensor has. Masks are left out: what has no entry above 0, and one of -10,000 or less. So is what has one number in
    a row (a time, a length) where another argument has more.

    "InputScale.mean" is their mean, "InputScale.largest" the largest magnitude, "InputScale.infinite" the share of
    those that are NaN or infinite, and "InputScale.zeros" that of those that are 0. Of a model that is not called
    itself, only parts of it, the arguments are those of the part which is called first.

    - Formula: `sqrt(mean of x²)` over all entries x of the arguments that count
    - Units: those of the input
    - Cost: norm, mean, smallest and largest entry and number of zeros of the input in the forward pass; no quantity
    - Source: the definition
    - Absent: if no argument counts: integers (such as tokens) have no scale; if the model was not called
    """

    def enter(self, step: int, model: nn.Module) -> None:
        def hook(path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
            if path == next(iter(self._calls), path) and self._counts(path):
                with torch.no_grad():
                    self._calls.setdefault(path, []).extend(_received((args, kwargs)))

        self._begin(model)
        self._calls: dict[str, list[_Moments]] = {}  # of the module that was called first, which is the model if it was
        self._handles = [
            m.register_forward_pre_hook(Hook(functools.partial(hook, path)), with_kwargs=True)
            for path, m in _outermost(model).items()
        ]

    def unite(self, processes: Processes) -> None:
        calls = processes.gather(self._calls)
        self._calls = {path: [part for each in calls for part in each.get(path, [])] for path in calls[0]}

    def measure(self, step: Step) -> dict[str, Any]:
        if not self._calls:
            raise Absent(_not_called(step.model))
        [parts] = self._calls.values()
        if not parts:
            raise Absent("the model received no floating-point numbers with a row for each sample in this step")
        counts = [part.count for part in parts]
        n = sum(counts)
        return {
            "": _mean_square([part.size for part in parts], counts),
            ".mean": sum(part.mean * (part.count / n) for part in parts),
            ".largest": max(part.largest for part in parts),
            ".infinite": sum(part.infinite for part in parts) / n,
            ".zeros": sum(part.zeros for part in parts) / n,
        }


def _outermost(model: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """The model, and its parts with parameters, which a step may call in place of it; by path."""
    found = {} if prefix else {"": model}
    for name, part in model.named_children():
        if isinstance(part, (nn.ModuleList, nn.ModuleDict)):  # which nobody calls
            found |= _outermost(part, f"{prefix}{name}.")
        elif next(part.parameters(), None) is not None:
            found[prefix + name] = part
    return found


class _Moments(NamedTuple):
    """Mean, root mean square, largest magnitude, how many are not finite, how many are 0, how many there are."""

    mean: float
    size: float
    largest: float
    infinite: int
    zeros: int
    count: int


def _received(args: Any) -> list[_Moments]:
    tensors = [x.detach() for x in pytree.tree_leaves(args) if isinstance(x, Tensor) and x.dim()]
    found = [x for x in tensors if x.is_floating_point() and x.dim() > 1 and len(x) == len(tensors[0]) and x.numel()]
    found = [(x.numel() // len(x), _moments(x)) for x in found]
    seen = [(width, part) for width, part in found if part is not None]
    most = max((width for width, _ in seen), default=0)
    return [part for width, part in seen if width > 1 or most == 1]


def _moments(x: Tensor) -> _Moments | None:
    """Of an argument; none of a mask."""
    x = x.to_dense() if x.layout != torch.strided else x
    x = x.float() if x.itemsize < 4 else x
    least, most = (float(v) for v in x.aminmax())
    if most <= 0 and least <= MASKED:
        return None
    infinite = 0 if math.isfinite(least) and math.isfinite(most) else int((~x.isfinite()).sum())
    zeros = x.numel() - int(x.count_nonzero())
    size = float(norm(x)) / x.numel() ** 0.5
    return _Moments(float(x.mean()), size, max(-least, most), infinite, zeros, x.numel())


def _mean_square(sizes: list[float], counts: list[int]) -> float:
    """The root mean square of parts that have such ones, and so many entries."""
    # As a length in units of the largest: squares may overflow.
    return math.hypot(*(size * math.sqrt(count / sum(counts)) for size, count in zip(sizes, counts, strict=True)))


def _not_called(model: nn.Module) -> str:
    return f"neither forward of {type(model).__name__} nor one of its parts with parameters was called in this step"


class OutputScale(_Hooked):
    """Root mean square of what the model puts out, over all samples of the step.

    "OutputScale.spread" is how much of that differs between samples: the standard deviation over the samples (root mean
    square over the entries of an output) in units of it. Rows are the samples; of several tensors the first counts. Of
    a model that is not called itself, only parts of it, the output is that of the part which is called last.

    - Formula: `sqrt(mean of y²)`; of the spread `sqrt(mean of var(y) / mean of y²)`, with the biased variance over the
      rows of a pass
    - Units: those of the output; of the spread none
    - Cost: mean square and variance of the output in the forward pass; no quantity
    - Source: the definition
    - Absent: if the output has no floating-point tensor, or the model was not called. The spread also for one sample,
      for an output of zeros or one that is not finite, and where rows are not samples
    """

    def enter(self, step: int, model: nn.Module) -> None:
        def before(module: nn.Module, args: Any) -> None:
            self._whole = self._whole or torch.is_grad_enabled()

        def hook(path: str, module: nn.Module, args: Any, output: Any) -> None:
            if not (path and self._whole) and self._counts(path):
                tensors = [y for y in pytree.tree_leaves(output) if isinstance(y, Tensor) and y.is_floating_point()]
                tensors = [y.detach() for y in tensors if y.dim() > 0 and y.numel()]
                with torch.no_grad():
                    self._calls.setdefault(path, []).extend(map(_spread, tensors[:1]))

        self._begin(model)
        self._whole, self._calls = False, dict[str, list[_Spread]]()
        self._handles = [
            m.register_forward_hook(Hook(functools.partial(hook, path))) for path, m in _outermost(model).items()
        ]
        self._handles.append(model.register_forward_pre_hook(Hook(before)))

    def leave(self) -> None:
        super().leave()
        # Where the model is not called itself, what the part puts out that was called last.
        self._parts = self._calls.get("", next(reversed(self._calls.values()), None))

    def unite(self, processes: Processes) -> None:
        mine = self._parts or []
        parts = processes.gather([(p._replace(mean=None), p.mean.shape) for p in mine if p.mean is not None])
        if len({tuple(shape for _, shape in each) for each in parts}) > 1:  # so that nothing unites
            self._parts = [part._replace(deviation=None) for each in parts for part, _ in each]
            return
        for k, part in enumerate(mine):
            assert part.mean is not None
            each = [one[k][0] for one in parts]
            counts = [one.rows for one in each]
            whole = processes.sum(part.mean * part.rows) / sum(counts)
            apart = processes.gather(float(norm(part.mean - whole)) / whole.numel() ** 0.5)
            within = [one.deviation or 0.0 for one in each]
            both = [math.hypot(a, b) for a, b in zip(within, apart, strict=True)]
            size = _mean_square([one.size for one in each], counts)
            mine[k] = _Spread(sum(counts), size, _mean_square(both, counts), whole)

    def measure(self, step: Step) -> dict[str, Any]:
        if self._parts is None:
            raise Absent(_not_called(step.model))
        if not self._parts:
            raise Absent("the model has put out no floating-point numbers in this step")
        counts = [part.rows for part in self._parts]
        size, rows = _mean_square([part.size for part in self._parts], counts), sum(counts)
        deviations = [part.deviation for part in self._parts if part.deviation is not None]
        spread: Any = Absent("the output is zero")
        if not math.isfinite(size):
            spread = Absent(NOT_FINITE.format("the output"))
        elif len(deviations) < len(counts):
            spread = Absent("the outputs of the processes differ in shape or number")
        elif min(counts) < 2:
            spread = Absent("one sample does not differ from others")
        elif all(p.n for p in step.passes) and rows != step.n:
            spread = Absent(f"the output has {rows} rows for {step.n} samples")
        elif size > 0:
            spread = _mean_square(deviations, counts) / size
        return {"": size, ".spread": spread}


class _Spread(NamedTuple):
    """Of one output: rows, root mean square, that of what differs from the mean over the rows, and this mean."""

    rows: int
    size: float
    deviation: float | None
    mean: Tensor | None


def _spread(y: Tensor) -> _Spread:
    y = y.float() if y.itemsize < 4 else y
    size = float(norm(y)) / y.numel() ** 0.5
    # Squares of what is very large or small are none.
    unit = 1.0 if 1e-12 < size < 1e12 or not 0 < size < math.inf else size
    variance, mean = torch.var_mean(y if unit == 1 else y.double() / unit, 0, correction=0)
    return _Spread(len(y), size, unit * float(variance.mean()) ** 0.5, unit * mean)
