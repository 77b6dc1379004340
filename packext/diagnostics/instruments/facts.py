"""Facts about model and optimizer: what is trained at all, how it started, which units get no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from packext.diagnostics._instrument import Instrument
from packext.diagnostics._step import Absent, Count, Step


class BatchSize(Instrument):
    """Number of samples in the step, over all its backward passes.

    - Formula: N
    - Units: samples
    - Cost: a number is read; no quantity
    - Source: the definition
    - Absent: where samples influence each other, or no backward pass came through the model
    """

    needs = (Count(),)

    def measure(self, step: Step) -> int:
        return step.n


class LearningRate(Instrument):
    """The optimizer's largest learning rate, as it was when the gradient was taken (without one, at the step's end).

    "LearningRate.edge" is the curvature beyond which heavy-ball gradient descent on a quadratic diverges, for
    `torch.optim.SGD` with one learning rate: of the mean of the samples' own losses, as `HessMaxEV` is.

    - Formula: largest `lr` of the groups; of the edge `(2 + 2 momentum) / lr`
    - Units: those of the parameters squared, over those of the loss; of the edge the reverse
    - Cost: a number is read; no quantity
    - Source: Cohen, Kaur, Li, Kolter & Talwalkar 2021, for the edge
    - Absent: if the optimizer has no learning rate. The edge is given for that SGD alone, without Nesterov's momentum,
      dampening and `maximize`, and where `.grad` is the mean of the g_n, and no multiple of it (a sum over the samples,
      a factor on the loss)
    """

    def measure(self, step: Step) -> dict[str, Any]:
        groups = step.groups
        rates = [float(group["lr"]) for group in groups if "lr" in group]
        if not rates:
            raise Absent(f"{type(step.optimizer).__name__} has no learning rate")
        found: dict[str, Any] = {"": max(rates)}
        plain = type(step.optimizer) is torch.optim.SGD and len({(g["lr"], g["momentum"]) for g in groups}) == 1
        if plain and rates[0] > 0 and not any(g["nesterov"] or g["dampening"] or g["maximize"] for g in groups):
            try:
                multiple = step.factor
            except Absent as reason:
                return {**found, ".edge": reason}
            found[".edge"] = (2 + 2 * float(groups[0]["momentum"])) / rates[0]
            if abs(multiple - 1) > 1e-6:
                found[".edge"] = Absent(
                    f"`.grad` is {multiple:.6g} times the mean of the samples' own gradients, which is not what steps "
                    "of that rate follow"
                )
        return found


#: What `Untrained` says of a parameter.
FROZEN_FRONT, FROZEN, NOT_HELD, NO_RATE, NO_GRADIENT = 1.0, 2.0, 3.0, 4.0, 5.0


class Untrained(Instrument):
    """How many parameters are not trained, and of each of these why, by a number.

    "Untrained/0.weight" is 1 for a parameter that does not require grad, and neither does any before it (as a frozen
    backbone is), or that is none of a layer's weights and biases (as fixed positions and embeddings are), or of a layer
    that an adapter was put into (two matrices beside it that are trained, whose product has its shape); 2 for one
    that does not require grad though one before it does, and has not moved from look to look (as a moving average of
    others does); 3 for one that the optimizer does not hold and that has not moved either; 4 for one whose learning
    rate is 0; 5 for one that got no gradient (its `.grad` is None). Parameters that are trained are not listed.
    "Untrained.share" is the share of those that are in the entries of all parameters.

    - Formula: how many parameters have one of these numbers
    - Units: parameters
    - Cost: a copy of the parameters, which several instruments share, and of about 64 entries of each that does not
      require grad; no quantity
    - Source: the definition
    - Absent: if no parameter has got a gradient
    """

    def start(self, step: int) -> None:
        self._held: dict[str, Tensor] = {}  # some entries of parameters that do not require grad, by name
        self._moved: set[str] = set()  # those that have, since then

    def measure(self, step: Step) -> dict[str, Any]:
        gradient, start = step.gradient, step.start
        try:
            update: dict[str, Tensor] | None = step.update
        except Absent:
            update = None
        rates = {id(p): group.get("lr") for group in step.optimizer.param_groups for p in group["params"]}
        idle = update is None and not any(id(p) in rates for p in step.model.parameters())  # nothing has moved, either
        found, front, entries, all_entries = {}, True, 0, 0
        apart = _tables(step.model) | _adapters(step.model)
        held, self._held = self._held, _some(step.model)
        self._moved |= {k for k, some in self._held.items() if k in held and not torch.equal(some, held[k])}
        for name, p in step.model.named_parameters():
            all_entries += p.numel()
            code = None
            if not p.requires_grad:
                of_layer = id(p) not in apart and any(kind in name.rpartition(".")[2] for kind in ("weight", "bias"))
                code = FROZEN_FRONT if front or not of_layer else FROZEN if name not in self._moved else None
            else:
                front = False
                if name not in start:
                    continue  # it did not require grad when the step began
                if id(p) not in rates:
                    code = NOT_HELD if idle or (update is not None and not bool(update[name].any())) else None
                elif rates[id(p)] == 0:
                    code = NO_RATE
                elif name not in gradient:
                    code = NO_GRADIENT
            if code is not None:
                found[name] = code
                entries += p.numel()
        return {"": len(found), ".share": entries / max(1, all_entries), **found}


def _some(model: nn.Module, count: int = 64) -> dict[str, Tensor]:
    """About so many entries of each parameter that does not require grad, from all over it, on the CPU in float64."""
    frozen = {k: p.detach() for k, p in model.named_parameters() if not p.requires_grad and p.is_floating_point()}
    # Not of quantised ones, which are tensors of another kind, nor of sparse ones.
    frozen = {k: t for k, t in frozen.items() if type(t) is Tensor and t.layout is torch.strided and not t.is_meta}
    # Of types of a byte their bits: four of torch's bits convert to no other type.
    plain = [t.view(torch.uint8) if t.element_size() == 1 else t for t in frozen.values()]
    parts = [t.flatten()[:: max(1, t.numel() // count)].double() for t in plain]
    if not parts:
        return {}
    whole = torch.cat([part.to(parts[0].device) for part in parts]).cpu()  # once: an accelerator is waited for
    return dict(zip(frozen, whole.split([len(part) for part in parts]), strict=True))


class InitialScale(Instrument):
    """How large the matrices were at the start: root mean square of a weight's entries times the root of its fan-in.

    Of each parameter with two axes or more (`[out, in, ...]`, fan-in is the product of all sizes but the first), except
    matrices of one row, embeddings, scales and shifts of `nn.LayerNorm` and `nn.RMSNorm` over several axes, those of an
    adapter beside the weight that it was put into (one of them starts at zero), and what a module with layers of its
    own adds to them (positions, a class token: parameters beside parts with parameters that
    are not called a weight). PyTorch's default is 0.58, Glorot's (2010)
    about 1, that of He et al. (2015) 1.41. "InitialScale.alike" is the number of matrices whose rows are all the same
    (and not zero), so that their units stay copies of each other, and "InitialScale.usual" the norm that all matrices
    together, those of one row too, have in PyTorch's default.

    - Formula: `sqrt(mean of w²) sqrt(fan-in)`, by parameter
    - Units: none
    - Cost: a sum over the parameters, once, in the first step of a run; no quantity
    - Source: He et al. 2015, for the scale
    - Absent: in all later steps, and in a record that was continued, there is no value
    """

    def start(self, step: int) -> None:
        self._late = step > 0

    def measure(self, step: Step) -> dict[str, Any]:
        if self._late:
            return {}
        start, self._late = step.start, True
        none = (
            _tables(step.model)
            | _adapters(step.model)
            | {id(p) for m in step.model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm)) for p in m.parameters()}
        )
        matrices = {name: w for name, w in start.items() if w.dim() > 1 and id(step.parameters[name]) not in none}
        usual = (sum(len(w) for w in matrices.values()) / 3) ** 0.5
        weights = {name: w for name, w in matrices.items() if len(w) > 1}
        alike = [bool((w == w[:1]).all()) and bool(w.any()) for w in weights.values()]
        gains = {name: w.double().square().mean().sqrt() * w[0].numel() ** 0.5 for name, w in weights.items()}
        return {".alike": sum(alike), ".usual": usual, **gains}


def _tables(model: nn.Module) -> set[int]:
    """Ids of parameters that are looked up in, or added: of embeddings, and of modules with layers of their own."""
    found = set()
    for m in model.modules():
        lookup = isinstance(m, (nn.Embedding, nn.EmbeddingBag))
        if lookup or any(next(part.parameters(), None) is not None for part in m.children()):
            found |= {id(p) for k, p in m._parameters.items() if lookup or "weight" not in k}
    return found


def _adapters(model: nn.Module) -> set[int]:
    """Ids of the matrices of low-rank adapters, and of the parameters that these were put beside."""
    found = set()
    if all(p.requires_grad for p in model.parameters()):
        return found
    for m in model.modules():
        matrices = [p for p in m.parameters() if p.dim() > 1]
        held, free = ([p for p in matrices if p.requires_grad == trained] for trained in (False, True))
        if len(held) == 1 and len(free) == 2:
            down, up = free
            outputs, inputs, rank = len(held[0]), held[0][0].numel(), len(down)
            if rank < min(outputs, inputs) and (len(up), up[0].numel(), down[0].numel()) == (outputs, rank, inputs):
                found |= {id(p) for p in m.parameters() if p.dim() > 1 or not p.requires_grad}
    return found


class IdleUnits(Instrument):
    """Share of the units that have got no gradient from any sample in the last tracked steps, by layer.

    A unit is an entry of a bias, or of the scale of a norm: of a parameter with one axis in a module with a weight of
    as many rows. "No gradient" is an exact zero: what a ReLU that is shut for all samples leaves of the gradient of the
    bias before it, whether the ReLU is a module or a function. By name of these parameters, from the `steps`-th tracked
    step on.

    - Formula: entries of g that were 0 in the last `steps` tracked steps, over all entries of the parameter
    - Units: a share
    - Cost: vectors of the gradient are compared with 0; no quantity
    - Source: the definition
    - Absent: if no such parameter has got a gradient
    """

    def __init__(self, steps: int = 10) -> None:
        """Choose for how many tracked steps in a row.

        Raises:
            ValueError: if that is less than one.
        """
        if steps < 1:
            raise ValueError(f"steps must be an int of 1 or more, got {steps!r}.")
        self.steps = steps

    def start(self, step: int) -> None:
        # Of each parameter, by name: itself, in how many tracked steps it had a gradient, and how many it is since each
        # entry last had one.
        self._idle: dict[str, tuple[Tensor, int, Tensor]] = {}

    def measure(self, step: Step) -> dict[str, Any]:
        units = _units(step.model)
        vectors = {name: g for name, g in step.gradient.items() if id(step.parameters[name]) in units}
        if not vectors:
            raise Absent("no parameter with one axis, beside a weight with as many rows, has got a gradient")
        for name, g in vectors.items():
            parameter = step.parameters[name]
            held, seen, since = self._idle.get(name, (parameter, 0, torch.zeros_like(g)))
            if held is not parameter:  # another one has its name now
                seen, since = 0, torch.zeros_like(g)
            self._idle[name] = parameter, seen + 1, torch.where(g == 0, since + 1, 0.0)
        known = [name for name in vectors if self._idle[name][1] >= self.steps]
        if not known:
            return {}
        shares = torch.stack([(self._idle[name][2] >= self.steps).float().mean() for name in known]).tolist()
        return dict(zip(known, shares, strict=True))


def _units(model: nn.Module) -> set[int]:
    """Ids of the parameters with one axis in whose module a weight has as many rows (transposed: columns)."""
    found = set()
    for m in model.modules():
        own = {k: p for k, p in m._parameters.items() if p is not None}
        sizes = {size for k, p in own.items() if "weight" in k for size in p.shape[:2]}
        found |= {id(p) for p in own.values() if p.dim() == 1 and len(p) in sizes}
    return found
