"""Watches the forward pass: which tensors come from the data, which from parameters alone, and where they meet.

While an extended model runs, every torch function passes through the tracer. One that receives
parameters (or values made of parameters alone) together with data is a use, and gets a tap. One that
receives parameters alone makes a value that is followed on until it meets data. Shapes decide nothing.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import TensorWeakRef

from packext import _flight, _listening, _unseen, rules
from packext._again import Behind, checkpoints, note, recall, runs_again
from packext._calls import (
    AVERAGING,
    EXPANDS,
    FOLDS,
    PASSIVE,
    any_unusual,
    changed,
    is_composite,
    map_tensors,
    saved_tensor_hooks,
    shallow,
    taken_over,
    told,
    transparent,
)
from packext._choices import CHOOSE, chosen
from packext._distributed import of_parts
from packext._errors import UnsupportedUseError
from packext._precision import autocasts, computes_in
from packext._record import Buffer, Record, buffers_of, tensors_in
from packext._refusals import anchored
from packext._scale import FUNCTIONS, LossMark, called
from packext._shards import is_distributed
from packext._taps import Argument, Observed, Owned, OwnedRule, gate, slope
from packext._use import TARGET, Rule, Source, Use
from packext.rules import mutates

#: What a marked tensor carries: the forward's token, the parameters behind it (None: data), and the
#: value that it is an expanded view of.
MARK = "_packext_lineage"
_UNMARKED = (0, None, None)
#: In a mark: autograd knew nothing of the tensor then, or something else. If it knows it now, a Function returned it.
_FLAT = object()


class _Mark(tuple[int, "tuple[Source, ...] | None", Any]):
    """As it is kept in a tensor's `__dict__`, which is saved and copied with it: of that nothing is left but a size."""

    def __reduce__(self) -> Any:
        return torch.Size, ((0,),)  # which torch.load knows, and which is no mark of any forward pass


class _Local(threading.local):
    tracer: Tracer | None = None
    unseen: nn.Module | None = None  # what runs without a tracer, and its parts with it
    call: tuple[nn.Module, Any] | None = None  # of the outermost module, and its frame
    loss: tuple[nn.Module, Any] | None = None  # the outermost that runs, and its frame
    disabled: bool = False


LOCAL = _Local()


class Tracer(TorchFunctionMode):
    """The function mode of one forward pass; also what rules place their taps with."""

    def __init__(self, record: Record) -> None:
        """Watch the forward pass that `record` describes."""
        super().__init__()
        self.record = record
        self._record_ref = weakref.ref(record)
        self.stack: list[nn.Module] = []
        self._hooks: list[Any] = []
        self.table: dict[int, tuple[Source, Tensor]] = {}
        self._held: dict[int, tuple[Tensor | None, ...]] = {}  # what modules held at the start
        self._tokens = {record.token}  # with that of the forward pass of which a part runs again
        self._known: dict[int, tuple[Behind, Tensor]] = {}  # what that knew of the inputs, where it is not data
        self._instead: dict[int, tuple[Tensor, Tensor]] = {}  # what nobody saw how it was made, and the tap on it
        self.raw = False  # whether a transform has read data without a gradient
        self.inputs: list[Tensor] = []  # of the model
        self._around: list[Tensor] = []  # and of the model of which a part runs again
        self._given: set[int] = set()  # ids of these: threads may share a tensor, and what is written on it
        self._buffers: list[Buffer] = []  # as they were at the start
        self._averaged: set[int] = set()  # those that batch_norm writes to, of which autograd keeps no version
        self._grad_inputs = False
        self._rooted = False
        self._made: list[TensorWeakRef] | None = None  # in a part of which no more than it returns has a graph
        self.heard = False  # whether a context was open when the forward pass began
        self.restore: list[Callable[[], None]] = []  # what was changed for the time of the forward pass

    # -- modules ---------------------------------------------------------------------------------
    def push(self, module: nn.Module, args: Any = (), kwargs: Any = None) -> None:
        """A module starts to run: learn the parameters it holds at this moment."""
        self.stack.append(module)
        hooks = saved_tensor_hooks()
        if self._hooks and hooks is not self._hooks[-1] and checkpoints(hooks):
            before = note(hooks, self.record.token, self.table, self.inputs)
            before.calls.append([self._behind(t) for t in tensors_in((args, kwargs))])
        self._hooks.append(hooks)
        held = module._parameters
        if held and not (
            len(held) == len(known := self._held.get(id(module), ())) and all(map(is_, held.values(), known))
        ):
            self._register(module)
        self.record.trail = hash((self.record.trail, module.training))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            self.record.batch_statistics.append(self.where())

    def pop(self) -> None:
        """The module that was started last is done."""
        self.stack.pop()
        self._hooks.pop()

    def _register(self, module: nn.Module) -> None:
        self._held.pop(id(module), None)
        path = self.record.path(module)
        record, names, lead = self.record, self.record.names, f"{path}." if path else ""
        for name, p in module._parameters.items():
            full = lead + name
            if p is None or names.get(full) is p or not isinstance(p, Tensor):
                continue
            if is_distributed(p):
                record.distributed[full] = (type(module).__name__, p)
            elif record.distributed:
                record.distributed.pop(full, None)  # FSDP2 shards it when it is not in use
            if not p.requires_grad:
                continue
            if getattr(p, MARK, _UNMARKED)[0] in self._tokens:
                continue  # functional_call has put in its place what this forward pass has computed
            names[full] = p
            if id(p) not in self.table:
                self.table[id(p)] = (Source(p, full), p)

    def _learn(self, t: Tensor) -> bool:
        """Whether a parameter that was not there when its module started belongs to a module that runs."""
        for module in reversed(self.stack):
            if any(p is t for p in module._parameters.values()):
                self._register(module)
                return True
        return False

    def where(self) -> str:
        """Path and class of the module that runs."""
        module = self.stack[-1] if self.stack else self.record.root()
        assert module is not None
        return f"{self.record.path(module) or '(the model itself)'} [{type(module).__name__}]"

    # -- lineage ---------------------------------------------------------------------------------
    def behind(self, t: Tensor) -> tuple[Source, ...] | None:
        """The parameters that `t` is made of alone; None if it was computed from the model's inputs; else nothing."""
        entry = self.table.get(id(t))
        if entry is not None:
            return (entry[0],)
        if type(t) is nn.Parameter and t.requires_grad and self._learn(t):
            return (self.table[id(t)][0],)
        if self._known and id(t) in self._known:
            return self._known[id(t)][0][0]
        mark = getattr(t, MARK, _UNMARKED)
        if mark[0] in self._tokens:
            return mark[1] if mark[2] is not _FLAT or t.grad_fn is None else _unseen.made(self, t, True)
        if id(t) in self._given:
            return None
        if t.grad_fn is None:  # a DTensor is made where nothing is seen: of inputs, if of nothing that has a gradient
            return None if is_distributed(t) and not isinstance(t, nn.Parameter) else ()
        return _unseen.made(self, t)

    def _behind(self, t: Tensor) -> Behind:
        """As `behind`, with what `t` is an expanded view of; what nobody saw how it was made counts as data."""
        mark = getattr(t, MARK, _UNMARKED)
        made = t.grad_fn is not None and (mark[0] not in self._tokens or mark[2] is _FLAT) and id(t) not in self._known
        return (None if made else self.behind(t)), self._base(t)

    def _base(self, value: Tensor) -> Tensor | None:
        """What `value`, made of parameters alone, is an expanded view of."""
        if id(value) in self.table:
            return None
        if id(value) in self._known:
            return self._known[id(value)][0][1]
        base = getattr(value, MARK, _UNMARKED)[2]
        return base if isinstance(base, Tensor) else None

    def put(self, t: Tensor, tapped: Tensor, use: Use) -> None:
        """From now on, `tapped` stands for `t`, on which it is the tap of `use`, and behind another tap."""
        use.rooted = self.record.by_use or not self._grad_inputs
        self._placed(use, tapped.grad_fn, (tapped,))
        self.mark(tapped, None)
        self._instead[id(t)] = t, tapped

    def _stands_for(self, value: Any) -> Any:
        return self._instead[id(value)][1] if id(value) in self._instead else value

    def sources(self, t: Tensor) -> tuple[Source, ...]:
        """The parameters that `t` is made of alone, or nothing."""
        return self.behind(t) or ()

    def is_data(self, t: Tensor) -> bool:
        """Whether `t` was computed from the model's inputs."""
        return self.behind(t) is None

    def is_raw(self, t: Tensor) -> bool:
        """Whether `t` was computed from the model's inputs, and no gradient tells whose its entries are."""
        if t.requires_grad or not t.is_floating_point() or self.behind(t) is not None:
            return False
        return bool(t.any())  # torch.zeros_like takes a shape alone

    def mark_input(self, t: Tensor) -> None:
        """An input of the model."""
        self.inputs.append(t)
        self._given.add(id(t))
        if t.requires_grad:
            self._grad_inputs = True
            if t.grad_fn is not None:
                self.record.behind.append(t.grad_fn)
                way = anchored(t)  # there also when nobody holds t any more
                self.record.given.append(lambda: way)
            else:
                self.record.given.append(TensorWeakRef(t))
            hook = t.register_hook(functools.partial(slope, self._record_ref, TensorWeakRef(t)))
            weakref.finalize(self.record, hook.remove)

    def has_slope(self, t: Tensor) -> bool:
        """Whether `t` may have a derivative with respect to an input of the model, of which a loss can be made.

        Returns:
            False of all that is checkpointed: when it is computed again, its inputs are others.
        """
        if not (t.requires_grad and any(x.requires_grad for x in self.inputs)):
            return False
        return self.record.born == -1 and not self.checkpointed()

    def checkpointed(self) -> bool:
        """Whether what runs is computed again in the backward pass."""
        hooks = saved_tensor_hooks()
        return checkpoints(hooks) or runs_again(hooks)

    def mark(self, out: Any, payload: tuple[Source, ...] | None, base: Any = None) -> None:
        """What a function gave was made of these parameters alone; of data, if there are None."""
        for t in shallow((out,)):
            if id(t) in self.table:
                continue
            if payload is not None and not t.requires_grad:
                continue
            if self._made is not None and t.requires_grad and getattr(t, MARK, _UNMARKED)[0] != self.record.token:
                self._made.append(TensorWeakRef(t))
            setattr(t, MARK, _Mark((self.record.token, payload, base if t.requires_grad else _FLAT)))

    def apart(self, run: Callable[[], Any]) -> Any:
        """Run a part of the model of which torch would give a graph to what it returns alone.

        Args:
            run: the part.

        Returns:
            What it returns. What it leaves elsewhere (in a list, as an attribute of a module) is cut off its graph.
        """
        around, made = self._made, []
        self._made = made
        try:
            out = run()
        finally:
            self._made = around
            if around is not None:
                around += made
        with torch._C.DisableTorchFunction():
            returned = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
            returned += [self._stands_for(t) for t in returned]
            kept = {id(t) for t in returned} | {id(t._base) for t in returned}
            read = {edge.node for loss in self.record.losses for edge in loss.edges}
            for ref in made:
                t = ref()
                if t is None or not t.requires_grad or id(t) in kept or t.grad_fn in read:
                    continue
                if t._is_view():  # which torch does not cut off in place
                    self._instead[id(t)] = t, t.detach()
                else:
                    t.detach_()
        return out

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # what torch.cond and the like are given
            return func(*args, **kwargs)
        record = self.record
        if func not in PASSIVE:
            record.trail = hash((record.trail, func, torch.is_grad_enabled(), told(func, args, kwargs)))
        if taken_over():
            self.raw = self.raw or any(self.is_raw(t) for t in shallow((*args, *kwargs.values())))
            return func(*args, **kwargs)
        if isinstance(func, _unseen.HigherOrderOperator):
            return _unseen.called(self, func, args, kwargs)
        if func is Tensor.register_hook:
            record.hooked = True
        if func in PASSIVE:
            if func is Tensor.retain_grad:
                _flight.may_retain(args[0])
            return func(*args, **kwargs)
        if func in AVERAGING and (kwargs.get("training") or any(args[5:6])):
            self._averaged.update(map(id, shallow((*args, *kwargs.values()))))
        sources: tuple[Source, ...] = ()
        data = rooted = False
        for t in shallow((*args[:1], *kwargs.values()) if func in rules.FIRST_ONLY else (*args, *kwargs.values())):
            found = self.behind(t)
            if found:
                sources += found
            elif found is None:
                rooted |= t.requires_grad
                # A number that data gave chooses among parameters, as a constant would: it meets no sample here.
                data = data or not (func is Tensor.__getitem__ and t.dim() == 0 and t is not args[0])
        # How autograd makes an output of a Function that is its input, of which it then changes the history.
        same = func is Tensor.view_as and len(args) == 2 and args[0] is args[1]
        if self._instead and not same:
            args, kwargs = pytree.tree_map(self._stands_for, (args, kwargs))
        if not sources:
            out = func(*args, **kwargs)
            if data:
                if func in FUNCTIONS and out.requires_grad and LOCAL.loss is None:
                    found = called(func, args, kwargs)
                    out = out if found is None else LossMark.mark(found[0], out, found[1], {}, record)
                if func in CHOOSE and not record.routed:
                    record.routed = chosen(func, args, kwargs, record.batch_axis, self.is_data)
                if func in FOLDS and args and record.n > 1 and args[0].shape[:1] == (record.n,):
                    record.trail = hash((record.trail, out.shape[:1].numel() % record.n == 0))
                self.mark(out, None, _FLAT if same else None)
                if mutates(func):
                    self._written(changed(args, kwargs))
            return out
        if not data:
            out = func(*args, **kwargs)
            if mutates(func):
                self.mark(changed(args, kwargs), tuple(dict.fromkeys(sources)))
            base = args[0] if func in EXPANDS and args else None
            self.mark(out, tuple(dict.fromkeys(sources)), base)
            return out
        self._rooted = record.by_use or (rooted and bool(record.uses) and not self._grad_inputs)
        handler = rules.HANDLERS.get(func)
        if not torch.is_grad_enabled():
            out = func(*args, **kwargs)
            self.mark(out, None)
            return out
        try:
            out = handler(self, func, args, kwargs) if handler else NotImplemented
            if out is NotImplemented and is_composite(func):
                with self:
                    return transparent(func)(*args, **kwargs)
            if out is NotImplemented:
                out = rules.generic(self, func, args, kwargs)
        except UnsupportedUseError as error:
            # Raised when a context asks for what this use cannot give; training without one goes on.
            record.refused.append((str(error), sources, len(record.uses)))
            out = func(*args, **kwargs)
            if mutates(func):  # what it is a view of is made of both by now, and known to be refused
                self.mark([t._base for t in shallow((changed(args, kwargs),))], None)
        self.mark(out, None)
        if mutates(func):
            self._written(changed(args, kwargs))
        return out

    def _written(self, target: Any) -> None:
        """Data was written into a tensor, and so into the one that it is a view of."""
        self.mark(target, None)
        self.mark([t._base for t in shallow((target,)) if t._base is not None and not self.sources(t._base)], None)

    # -- taps ------------------------------------------------------------------------------------
    def use(self, rule: Rule, func: Any, tensors: dict[str, Tensor], consts: dict[str, Any]) -> Use:
        """A use whose parameters are found among `tensors`."""
        hooks = saved_tensor_hooks()
        if self._hooks and hooks is not self._hooks[-1] and checkpoints(hooks):
            # Nothing tells when such a function runs again, and the taps must be there again.
            raise self.refuse(
                func,
                "the parameter is used by a checkpointed function, and not by a module that it calls",
                "Checkpoint a module: its forward is watched when it is computed again.",
            )
        sources: dict[str, tuple[Source, ...]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        direct, ties, axis = [], [], self.record.batch_axis
        inputs = () if self.record.by_use else self._given
        for name, t in tensors.items():
            if t.is_nested:
                raise self.refuse(
                    func,
                    "an argument is a nested tensor, in which packext does not tell samples apart",
                    "Pad the samples to one length (torch.nested.to_padded_tensor) and mask what was padded.",
                )
            shapes[name] = shape = t.shape
            if t.requires_grad and (group := self.behind(t)):
                sources[name] = group
                if group[0].tensor is t:
                    direct.append(name)
                if type(t) is not nn.Parameter or t.is_complex():
                    self._refuse_kinds(func, group, t, rule.splits)
            if id(t) in inputs and len(shape) > axis and name not in rule.own_axis:
                ties.append(name)
        use = Use(rule, func, tuple(tensors), consts, sources, self.where(), shapes, self._record_ref)
        use.direct, use.ties, use.rooted = frozenset(direct), frozenset(ties), self._rooted
        use.still = frozenset([name for name, t in tensors.items() if not t.requires_grad])
        if autocasts(device := next(iter(tensors.values())).device.type):
            use.autocast = device, torch.get_autocast_dtype(device)
        if len(direct) < len(sources):
            use.viewed(tensors)
        return use

    def _refuse_kinds(self, func: Callable[..., Any], group: Sequence[Source], value: Tensor, splits: bool) -> None:
        """Refuse parameters behind `value` that are parts of what processes hold together, or complex."""
        for source in group:
            # DistributedDataParallel makes DTensors of parameters that are parts, and look as if they were whole.
            for t in () if splits else (source.tensor, value):
                if is_distributed(t):
                    raise self.refuse(func, *of_parts(source.name, t))
            if source.tensor.is_complex():
                raise self.refuse(
                    func,
                    f"{source.name} {list(source.tensor.shape)} is complex, and individual gradients are those of "
                    "real parameters",
                    "Make it of two: torch.complex(real, imaginary) in forward.",
                )

    def owned(self, rule: OwnedRule, func: Any, tensors: dict[str, Tensor], consts: dict[str, Any]) -> Any:
        """Run a call inside a tap; NotImplemented where the weight is not what is made of parameters."""
        if any_unusual(tensors):
            return NotImplemented
        use = self.use(rule, func, tensors, consts)
        for name, t in tensors.items():
            if name in use.sources if name == "input" else t.requires_grad and name not in use.sources:
                return NotImplemented
        kind = computes_in(tensors.values())
        if kind is None:  # torch says so
            return NotImplemented
        tensors = {**tensors, "input": tensors["input"].to(kind)}
        if not use.sources:
            return rule.call(use, tensors)
        y = Owned.apply(use, TARGET, *tensors.values())
        self._placed(use, y.grad_fn, (y,))
        return y

    def observed(self, rule: Rule, func: Any, tensors: dict[str, Tensor], consts: dict[str, Any]) -> Any:
        """Run a call, and put a tap on its outputs; NotImplemented where the rule is not made for what it meets."""
        if not rule.conjugates and any_unusual(tensors):
            return NotImplemented
        use = self.use(rule, func, tensors, consts)
        out = rule.call(use, tensors)
        if not use.sources:
            return out
        flat = list(out) if isinstance(out, (tuple, list)) else [out]  # a type or a truth value, of torch.equal
        live = [i for i, y in enumerate(flat) if isinstance(y, Tensor) and y.requires_grad]
        if not live:
            return out
        use.positions = tuple(live)
        tapped = Observed.apply(use, len(live), TARGET, *use.tapped(out), *tensors.values())
        for i, y in zip(live, tapped, strict=True):
            flat[i] = y if flat[i].dim() else y.sum()
        self._placed(use, tapped[0].grad_fn, tapped)
        if isinstance(out, Tensor):
            return flat[0]
        return type(out)(*flat) if hasattr(out, "_fields") else type(out)(flat)  # torch.return_types take a sequence

    def argument(self, value: Tensor, shape: Any, dtype: torch.dtype, func: Callable[..., Any]) -> Tensor:
        """A parameter-only value, tapped where it is broadcast to the data's `shape`."""
        base = self._base(value)
        if base is not None and tuple(value.shape) == tuple(shape):
            value = base
        use = self.use(rules.ARGUMENT, func, {"value": value}, {})
        if not use.sources:
            return value
        y = Argument.apply(use, TARGET, value, tuple(shape) or (1,), dtype)
        self._placed(use, y.grad_fn, (y,))
        return y if len(shape) else y.sum()

    def _placed(self, use: Use, node: Any, outputs: Any) -> None:
        use.placed(node, outputs)
        self.record.uses.append(use)

    def refuse(self, func: Callable[..., Any], why: str, instead: str) -> UnsupportedUseError:
        """An error that says where, what, and what to do."""
        name = getattr(func, "__name__", str(func))
        return UnsupportedUseError(f"{name} in module {self.where()}: {why}. {instead}")

    # -- the two ends of the forward pass ----------------------------------------------------------
    def begin(self, args: Any, kwargs: Any) -> None:
        """Learn the parameters (some modules use those of others that never run), mark the inputs, count samples."""
        known: Iterator[Behind] = iter(())
        if (found := recall(saved_tensor_hooks())) is not None:
            before, known = found[0], iter(found[1])
            self.table.update(before.table)
            self._tokens.add(before.token)
            self._around = [t for ref in before.inputs if (t := ref()) is not None]
            self._given.update(map(id, self._around))
        for module in self.record.modules():
            held = module._parameters
            if held and "_packext" in module.__dict__:
                self._register(module)
                self._held[id(module)] = tuple(held.values())
        self._buffers = buffers_of(self.record.modules())
        axis = self.record.batch_axis
        for t in tensors_in((args, kwargs)):
            behind = next(known, (None, None))
            if id(t) in self.table:
                continue
            if behind[0] is not None:
                self._known[id(t)] = behind, t
                continue
            self.mark_input(t)
            if self.record.by_use:
                continue
            if t.dim() > axis:
                self.record.sizes.append(t.shape[axis])
            if t.dim() > max(axis, 1):
                self.record.lengths.append(t.shape[1 if axis == 0 else 0])
        self.record.n = self.record.sizes[0] if self.record.sizes else 0

    def finish(self, output: Any) -> Any:
        """Put a gate on every output that carries a gradient."""
        for t in self.inputs:
            if getattr(t, MARK, _UNMARKED)[0] == self.record.token:  # the model has written into it
                delattr(t, MARK)
        record = self.record
        record.written = [
            f"{b.path}.{b.name}".lstrip(".") for b in self._buffers if b.written() or id(b.tensor) in self._averaged
        ]
        if not (record.uses or self.table or record.distributed):
            return output

        def behind_gate(y: Any) -> Any:
            if not isinstance(y, Tensor) or not y.requires_grad or y.is_leaf:
                return y
            made_of = self.sources(y)
            y = self._stands_for(y)
            if not y.requires_grad:
                return y
            if made_of:
                record.strays[len(record.gates)] = made_of[0].name
            if is_distributed(y):
                record.distributed_output = True
            return gate(record, y)

        record.running = False
        gated = map_tensors(behind_gate, output)
        record.settle(range(len(record.gates)))
        if not record.by_use:
            record.count()
        for use in record.uses:  # among the inputs may be some that are not of the batch
            if use.ties:
                use.ties = frozenset([k for k in use.ties if use.shapes[k][record.batch_axis] == record.n])
        return gated


@contextmanager
def disable() -> Iterator[None]:
    """Context in which extended models run untapped, and contexts are deaf."""
    before, LOCAL.disabled = LOCAL.disabled, True
    try:
        with _listening.silence():  # passes on autograd's own threads, too
            yield
    finally:
        LOCAL.disabled = before


disable.should_store_io = lambda: not LOCAL.disabled  # type: ignore[attr-defined]
