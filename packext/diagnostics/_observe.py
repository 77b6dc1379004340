"""Watches one step: which losses were called, what each backward pass left, what became of the parameters."""

from __future__ import annotations

import copy
import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

import packext as px
from packext.diagnostics._step import COMBINE, Call, Count, Pass, Step, options, outside, rescaled
from packext.diagnostics._tensors import inner, norms


class _Here(threading.local):
    """Steps under way in this thread, the innermost last: two threads that train at once do not see each other.

    Where monitors are nested, the innermost context asks for all of them.
    """

    def __init__(self) -> None:
        self.steps: list[Observer] = []


_HERE = _Here()

#: Kinds of losses that are handed over.
GIVEN = ("loss()", "losses()")


class Hook:
    """A hook on a module for the time of a step; copies of the module, such as files, have one that does nothing."""

    def __init__(self, run: Callable[..., Any]) -> None:
        """Take what it does."""
        self.run = run

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def __reduce__(self) -> Any:
        return Hook, (nothing,)


def nothing(*args: Any) -> None:
    """Does nothing."""


class Union:
    """Quantities that several instruments ask for, each once, with savefields that do not clash."""

    def __init__(self) -> None:
        """Start empty."""
        self.quantities: list[Any] = []

    def add(self, asked: Sequence[Any]) -> dict[str, str]:
        """Add an instrument's quantities; return under which savefield the result of each is found, by its own."""
        fields: dict[str, str] = {}
        for quantity in asked:
            held = next((q for q in self.quantities if _equal(q, quantity)), None)
            if held is None:
                held = copy.copy(quantity)
                taken = [q.savefield for q in self.quantities]
                if held.savefield in taken:
                    held.savefield = f"{held.savefield}_{len(taken)}"
                self.quantities.append(held)
            fields[quantity.savefield] = held.savefield
        return fields


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    a, b = ({k: v for k, v in vars(q).items() if k != "savefield"} for q in (one, other))
    plain = (int, float, str, tuple, list)
    return a.keys() == b.keys() and all(v is b[k] or (isinstance(v, plain) and v == b[k]) for k, v in a.items())


class Observer:
    """One step of one model under observation."""

    def __init__(
        self,
        step: Step,
        asked: Sequence[Sequence[Any]],
        losses: bool,
        targets: bool,
        scale: str | float,
        loss_scale: float,
    ) -> None:
        """Take the step to fill, each instrument's quantities, what to keep of losses, the scale, and a factor."""
        self.step, self.asked, self._wanted, self._comparing = step, asked, losses, targets
        # The number of samples in the step is known at its end: until then all is of the loss as written.
        self._counts = scale == "mean"
        self.scale = 1.0 / loss_scale if self._counts else scale
        self._open: Pass | None = None
        self._held: dict[str, tuple[Tensor | None, int]] = {}  # `.grad` when the pass began, and its version
        self._fresh: tuple[px.Results, list[dict[str, str]]] | None = None
        self._grads: dict[str, Tensor | None] = {}  # when the pass had ended: a private optimizer takes them away
        self._running: nn.Module | None = None
        self._hooks: dict[nn.Module, Any] = {}
        self._computed: list[tuple[Call, Any]] = []  # by extended losses since the last pass, with autograd's nodes
        self._versions: list[int] | None = None
        self._sum: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Install what listens."""
        self._around = _HERE.steps
        self._around.append(self)
        try:
            union = Union()
            self._asking = [(o, [union.add(part) for part in o.asked]) for o in self._around if any(o.asked)]
            if len({o.scale for o, _ in self._asking}) > 1:
                raise px.PackextError(
                    f"Nested monitors have different scales, {[o.scale for o, _ in self._asking]}: "
                    "give each step() the same one. The step of a CockpitCallback whose training has failed is under "
                    "way until its close()."
                )
            self._context = None
            if any(self.asked):
                parts = [o.step._parts for o, _ in self._asking]
                together = None if None in parts else {p for part in parts for p in part or ()}
                for o, _ in self._asking:
                    o.step._parts = together
                self._context = px.backpack(
                    *union.quantities,
                    parameters=together,
                    scale=self.scale,
                    attach=False,
                    exact_grad=True,
                    overhear=True,
                    pass_hook=self._emitted,
                )
                self._context.__enter__()
        except BaseException:
            self._around.remove(self)
            raise
        self._listener = register_module_forward_pre_hook(self._called)
        self.step.began = perf_counter()

    def end(self) -> None:
        """Take back what `begin` and the losses installed, whatever happened since."""
        self.step.seconds = perf_counter() - self.step.began
        self._listener.remove()
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        self._computed.clear()
        self._around.remove(self)
        context, self._context, self._asking = self._context, None, []  # which refer to this one, and it to copies
        if context is not None:
            # The record says that a step had no backward pass; the context need not raise.
            context.__exit__(StopIteration, None, None)

    def finish(self, update: bool) -> None:
        """Complete the step: the mean gradient, and what was added to the parameters; that late unless `update`."""
        step = self.step
        if not step.passes:
            return
        step._empty = sum(p.empty for p in step.passes)
        counts = [p.n for p in step.passes]
        if len(counts) == 1:
            step._gradient = self._sum
        elif all(counts):
            total = sum(n for n in counts if n)
            step._gradient = {name: g / total for name, g in self._sum.items()}
        if self._counts and all(counts):
            self._rescale(float(sum(n for n in counts if n)))
        step._update = step._subtract() if update else None

    def _rescale(self, factor: float) -> None:
        """Multiply individual gradients and losses."""
        step, done = self.step, {}
        step._shared.clear()  # it may hold the gradient's norms
        step._gradient = {name: g * factor for name, g in step._gradient.items()}
        for p in step.passes:
            p.share *= factor
            p.multiplier /= factor  # what cannot be divided by it is absent
            for part in p.results:
                for field, found in part.items():
                    if id(found) not in done:
                        done[id(found)] = found, {k: rescaled(field, v, 1 / factor) for k, v in found.items()}
                    part[field] = done[id(found)][1]

    def versions(self) -> list[int]:
        """Numbers that grow whenever a parameter is written to."""
        return [p._version for p in self.step.parameters.values()]

    # -- losses ------------------------------------------------------------------------------------
    def _called(self, module: nn.Module, args: Any) -> None:
        reduction = module.__dict__.get("reduction") or getattr(type(module), "reduction", None)
        if not isinstance(reduction, str) or self._running is not None or not px.is_extended(module):
            return
        if self not in _HERE.steps:  # another thread's
            return
        if next(module.parameters(), None) is not None:
            return
        self._running = module  # a loss may be made of losses: the outermost counts
        if module not in self._hooks:
            # Registered now, it comes after the hook by which packext marks the loss; also of a call that fails.
            self._hooks[module] = module.register_forward_hook(Hook(self._ran), with_kwargs=True, always_call=True)

    def _ran(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module is not self._running or self not in _HERE.steps:
            return
        self._running = None
        if not (isinstance(output, Tensor) and output.requires_grad):
            return
        reduction: str = module.reduction  # type: ignore[assignment]
        each: Tensor | str = "no instrument asked for individual losses"
        if reduction == "none":
            each = output.detach()
        elif self._wanted:
            each = _individual(module, args, kwargs)
        call = Call(type(module).__name__, reduction, output.detach(), each, counted=_counted(module, args, kwargs))
        if self._comparing:
            call.compared = _compared(module, args, kwargs)
        self._computed.append((call, output.grad_fn))
        self._listen(call, output)

    def given(self, losses: Tensor) -> None:
        """The user's own losses `[N]`, before the backward pass."""
        if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.requires_grad:
            what = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"losses() takes the individual losses [N] that backward() will go through, got {what}.")
        self._listen(Call("losses()", "none", losses.detach(), losses.detach()), losses)

    def given_loss(
        self, value: Tensor, each: Callable[[], Tensor | None], counted: Callable[[], Tensor | None]
    ) -> None:
        """The user's own loss, a scalar, before the pass; the samples' parts of it, if wanted; which samples count."""
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss() takes the scalar that backward() will go through, got {what}.")
        for call, node in self._computed:  # a model that holds its loss as a module
            call.part = call.part or _leads(value.grad_fn, node)
        rows = each() if self._wanted else None
        unknown = "the samples' parts of the loss are not known"
        parts = unknown if rows is None else rows.detach()
        self._listen(Call("loss()", "mean", value.detach(), parts, counted=counted()), value)

    def _listen(self, call: Call, output: Tensor) -> None:
        output.register_hook(functools.partial(self._reached, call))

    # -- backward passes ---------------------------------------------------------------------------
    def _reached(self, call: Call, g: Tensor) -> None:
        if self not in self._around or call.part:
            return
        task = torch._C._current_graph_task_id()
        if self._open is None or self._open.task != task:
            self._fresh = None
            grads = {name: p.grad for name, p in self.step.parameters.items()}
            self._held = {k: (v, 0 if v is None else v._version) for k, v in grads.items()}
            self._open = Pass(task, {k: None if v is None else v.detach().clone() for k, v in grads.items()})
            if self._versions is None:
                self.step._start = {name: p.detach().clone() for name, p in self.step.parameters.items()}
                self._versions = self.versions()
                self.step._groups = options(self.step.optimizer)
            queue = torch.autograd.Variable._execution_engine.queue_callback
            # Queued from a callback, it runs after those that are queued during the pass, such as the context's.
            queue(lambda: queue(functools.partial(self._ended, task)))
        self._open.calls.append((call, g.detach()))
        given, computed = ([c for c, _ in self._open.calls if (c.kind in GIVEN) == own] for own in (True, False))
        if given and computed:
            raise px.PackextError(
                f"{given[0].kind} was given what an extended {computed[0].kind} has computed as well: it is for losses "
                "that are not extended modules."
            )

    def _emitted(self, results: px.Results) -> None:
        for o, fields in self._asking:
            o._fresh = results, fields
            o._grads = {name: p.grad for name, p in o.step.parameters.items()}
            if o._open is None and any(p in results for p in o.step.parameters.values()):
                raise px.PackextError(
                    f"The monitor of {type(o.step.model).__name__} does not see the loss that backward() came from: "
                    "use loss_fn = px.extend(nn.CrossEntropyLoss()), or hand individual losses [N] to losses() of what "
                    "`with monitor.step(scale=<number>) as step` gives, or a scalar, such as a mean that the model has "
                    'computed itself, to loss() of what `with monitor.step("mean") as step` gives.'
                )

    def _ended(self, task: int) -> None:
        p, fresh = self._open, self._fresh
        if p is None or p.task != task:
            return
        self._open = self._fresh = None
        self._computed.clear()  # and with it the graphs
        # Where a private optimizer has taken it away by now, `.grad` as it was at the end of the pass.
        after = {k: self._grads.get(k) if q.grad is None else q.grad for k, q in self.step.parameters.items()}
        held, self._held, self._grads = self._held, {}, {}
        if self.versions() != self._versions:
            return  # a closure that was evaluated elsewhere, as in LBFGS: not where the step began
        if all(g is held[k][0] and (g is None or g._version == held[k][1]) for k, g in after.items()):
            return  # a pass through another model, or to something else than parameters (the inputs of an attack)
        gradient = self._increments(p, after)
        results, fields = fresh or (None, [])
        own = {k: vars(results[q]) for k, q in self.step.parameters.items() if results is not None and q in results}
        raw = {held: {k: r[held] for k, r in own.items() if held in r} for part in fields for held in part.values()}
        if any(g is not None and g.requires_grad for g in after.values()):  # its graph would live to the step's end
            raw = pytree.tree_map_only(Tensor, Tensor.detach, raw)
        p.n = _samples(raw, p)
        p.empty = _empty(p)
        self._scale(p)
        if not self.step.passes and (found := {k: _dense(v) for k, v in p.before.items() if v is not None}):
            self.step._held = float(norms(found)[""])
        p.results = [{field: raw[held] for field, held in part.items()} for part in fields]
        self.step.passes.append(p)
        self._weigh(p, gradient, after)
        self._compare(p, gradient, after)
        p.before = {}
        if len(self.step.passes) > 1:  # what is defined within one pass only is of no more use
            for part in (part for q in self.step.passes for part in q.results):
                for field in part.keys() - COMBINE.keys():
                    part[field] = {}
        self._add(p, gradient)

    def _increments(self, p: Pass, after: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """What the pass has added to `.grad`, by parameter, from what that was after it."""
        found = {}
        for name, grad in after.items():
            if grad is None:
                continue
            g, before = grad.detach(), p.before[name]
            dense = _dense(g).to(torch.promote_types(g.dtype, torch.float32))
            if before is not None:
                found[name] = dense - _dense(before)
            else:
                found[name] = dense.clone() if dense is g else dense
        return found

    def _scale(self, p: Pass) -> None:
        """What makes the loss as written the mean of the samples' own losses."""
        unknown, n = float("nan"), p.n
        if not isinstance(self.scale, str):
            p.share = self.scale / n if n else unknown
            return
        reductions = {c.reduction for c, _ in p.calls}
        if "none" in reductions:
            low = min(float(g.min()) for c, g in p.calls if c.reduction == "none")
            p.share = 1.0 / (low * n) if n and low else unknown
            return
        factors = {float(g) for _, g in p.calls}
        # Several losses with different factors are taken as written, by the context as well.
        multiplier = factors.pop() if len(factors) == 1 and 0.0 not in factors else 1.0
        count = n if reductions == {"sum"} else 1
        p.share = 1.0 / (multiplier * count) if count else unknown

    def _add(self, p: Pass, gradient: dict[str, Tensor]) -> None:
        """Add to the mean of the samples' own gradients; with several passes, to their sum."""
        passes = self.step.passes
        if len(passes) == 2:
            self.step._shared.clear()
            self._sum = {k: g * float(passes[0].n or 0) for k, g in self._sum.items()}
        factor = p.share * (float(p.n or 0) if len(passes) > 1 else 1.0)
        for name, g in gradient.items():
            g = g if factor == 1.0 else g * factor
            self._sum[name] = self._sum[name] + g if name in self._sum else g

    def _weigh(self, p: Pass, gradient: dict[str, Tensor], after: dict[str, Tensor | None]) -> None:
        """Note of each of several passes what tells terms of the loss that pass by the model, in several processes."""
        passes = self.step.passes
        if len(passes) == 2:  # of the first one, now that it is not the only one
            passes[0].balance = self._balance(passes[0], self._sum, p.before, passes[0].share)
        if len(passes) > 1:
            p.balance = self._balance(p, gradient, after)

    def _balance(
        self, p: Pass, added: dict[str, Tensor], after: Mapping[str, Tensor | None], times: float = 1.0
    ) -> tuple[float, float, float] | None:
        """`Pass.balance`, from `times` what the pass has added to `.grad`; None if nothing needs it."""
        kept = next((part["kept"] for part in p.results if part.get("kept")), None)
        if kept is None:
            return None
        rows = whole = along = 0.0
        for name, grad in self.step._of(after).items():
            if grad is not None:
                direction = _dense(grad.detach())
                direction = direction.to(torch.promote_types(direction.dtype, torch.float32))
                whole += inner(direction, direction)
                along += inner(added[name], direction) if name in added else 0.0
                rows += float(kept[name](direction).double().mean()) / p.share if name in kept else 0.0
        return rows, along / times, whole

    def _compare(self, p: Pass, gradient: dict[str, Tensor], after: Mapping[str, Tensor | None]) -> None:
        """Note if `.grad` is not the mean of the individual gradients, judging by the squared norms of both."""
        for part, asked in zip(p.results, self.asked, strict=bool(p.results)):
            if any(type(q) is px.GradDot and q.direction is None for q in asked) and part["grad_dot"]:
                rows = sum(float(v.double().mean()) for v in part["grad_dot"].values())
                found = norms(gradient)
                if p.share == 1.0 and len(self.step.passes) == 1:
                    self.step._shared["gradient norms"] = found
                length = float(norms(self.step._of(gradient))[""] if self.step._parts else found[""]) * p.share
                rounding = _rounding(p, self.step._of(after)) * abs(p.share)
                self.step._outside = outside(rows, length * length, rounding) or self.step._outside
                return


def _rounding(p: Pass, after: Mapping[str, Tensor | None]) -> float:
    """The norm of what a pass has added to `.grad` may be off by this, as what was there was rounded with it."""
    held = {k: _dense(g.detach()) for k, g in after.items() if g is not None and p.before[k] is not None}
    sizes = norms(held) if held else {}
    return math.hypot(*(torch.finfo(g.dtype).eps / 2 * float(sizes[k]) for k, g in held.items()))


def _dense(g: Tensor) -> Tensor:
    return g.to_dense() if g.is_sparse else g


def _samples(raw: dict[str, dict[str, Any]], p: Pass) -> int | None:
    counts = list(raw.get(Count.savefield, {}).values())
    # Of other losses than those that were handed over, rows may be tokens.
    counts += [len(c.value) for c, _ in p.calls if c.kind == "losses()"]
    return counts[0] if counts else None


def _counted(module: nn.Module, args: Any, kwargs: Any) -> Tensor | None:
    """Which rows of a loss's targets have one that is not ignored."""
    target = kwargs.get("target", args[1] if len(args) > 1 else None)
    if not (isinstance(module, (nn.CrossEntropyLoss, nn.NLLLoss)) and isinstance(target, Tensor) and target.dim()):
        return None
    if type(module).forward not in (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward):  # of other arguments
        return None
    if target.is_floating_point():  # probabilities
        return None
    counts = target != module.ignore_index
    return counts.flatten(1).any(1) if counts.dim() > 1 else counts


def _empty(p: Pass) -> int:
    """How many samples have no share in any loss of the pass."""
    counted = [c.counted for c, _ in p.calls]
    masks = [mask for mask in counted if mask is not None and len(mask) == p.n]
    if not masks or len(masks) < len(counted):
        return 0
    return int((~torch.stack(masks).any(0)).sum())


def _leads(start: Any, end: Any) -> bool:
    """Whether a way in autograd's graph leads from one of its nodes to another."""
    seen, todo = set(), [start]
    while todo:
        node = todo.pop()
        if node is not None and node is end:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return False


def _individual(module: nn.Module, args: Any, kwargs: Any) -> Tensor | str:
    """Losses of the entries of a loss's input, before they are reduced; or why there are none."""
    name = type(module).__name__
    if not type(module).__module__.startswith("torch.nn"):
        return f"{name} is not one of torch's losses: calling it again might change it"
    if name == "CTCLoss" and module.reduction == "mean":
        return "CTCLoss divides losses by the lengths of their targets before their mean: take reduction='sum'"
    again = copy.copy(module)
    again.reduction = "none"  # type: ignore[assignment]
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
    with torch.no_grad():
        return type(module).forward(again, *args, **kwargs)


#: With how many other targets each sample's own is compared, and how many entries of outputs are looked at at once.
OTHERS, ENTRIES = 8, 2**22


def _compared(module: nn.Module, args: Any, kwargs: Any) -> Tensor | str:
    """Of each row: the shares of other rows' targets under which its loss is less, and the same `[rows, 2]`."""
    # In parts, since outputs may be the largest tensor that there is; and what is unknown is NaN, since to look at a
    # number here would have the forward pass wait for the device.
    name = type(module).__name__
    given = {**dict(zip(("input", "target"), args, strict=False)), **kwargs}
    outputs, targets = given.get("input"), given.get("target")
    if len(args) + len(kwargs) != 2 or not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return f"{name} was not given outputs and targets alone"
    if not (outputs.dim() and targets.dim() and len(outputs) == len(targets) > 1):
        return "one row of outputs and targets, or not as many of one as of the other: none to compare with"
    if any(getattr(module, weight, None) is not None for weight in ("weight", "pos_weight")):
        return f"{name} weighs its targets: less loss under another one need not be a better fit"
    n, more = len(targets), min(OTHERS, len(targets) - 1)
    shifts = (0, *(1 + k * (n - 1) // more for k in range(more)))
    size = max(1, ENTRIES * n // max(1, outputs.numel()))
    found = []
    for start in range(0, n, size):
        rows = torch.arange(start, min(start + size, n), device=targets.device)
        others = [(rows - shift) % n for shift in shifts]
        each = _means_under(module, outputs.detach()[start : start + size], targets, others)
        if isinstance(each, str):
            return each
        found.append(_shares(*each))
    return torch.cat(found)


def _means_under(module: Any, outputs: Tensor, targets: Tensor, others: list[Tensor]) -> tuple[Tensor, float] | str:
    """Mean losses of rows under targets of several others `[others, rows]`, and the precision of these losses."""
    classes = isinstance(module, (nn.CrossEntropyLoss, nn.NLLLoss)) and not targets.is_floating_point()
    entropy = classes and type(module) is nn.CrossEntropyLoss
    if entropy:  # of whose cost nearly all is the logarithm of the softmax, the same under all targets
        outputs = outputs.log_softmax(1)
    even = outputs.mean(1) if entropy and module.label_smoothing else None
    means, precision = [], 0.0
    for other in others:
        target = targets[other]
        each = _entropies(module, outputs, even, target) if entropy else _individual(module, (outputs, target), {})
        if isinstance(each, str):
            return each
        if each.dim() == 0 or len(each) != len(target):
            return f"{type(module).__name__} has no loss of each row"
        counts = torch.ne(target, module.ignore_index).reshape(len(target), -1).sum(1) if classes else 1  # of none NaN
        means.append(each.reshape(len(target), -1).sum(1, dtype=torch.float64) / counts)
        precision = torch.finfo(each.dtype).eps
    return torch.stack(means), precision


def _entropies(module: Any, logs: Tensor, even: Tensor | None, target: Tensor) -> Tensor:
    """Losses of entries, from logarithms of probabilities and, for smoothed labels, their means over classes."""
    each = F.nll_loss(logs, target, ignore_index=module.ignore_index, reduction="none")
    if even is None:
        return each
    smoothing = module.label_smoothing
    return (1 - smoothing) * each - smoothing * even.masked_fill(target == module.ignore_index, 0.0)


def _shares(means: Tensor, eps: float) -> Tensor:
    """From mean losses under the own target and others: the shares of these that are less, and the same."""
    own, others = means[0], means[1:]
    same = (others - own).abs() <= 16 * eps * torch.maximum(others.abs(), own.abs())  # of sums in another order
    shares = torch.stack([((others < own) & ~same).double().mean(0), same.double().mean(0)], 1)
    return shares.masked_fill(~means.isfinite().all(0)[:, None], torch.nan)
