"""A use: one place where a parameter, or a value made of parameters alone, meets data."""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from packext._errors import PackextError, UnsupportedUseError
from packext._factored import Factored, Masked, Pulled, View, rows_in
from packext._graph import name_of
from packext._layout import Layout, Tokens

if TYPE_CHECKING:
    from packext._record import Record


#: The scalar that every tap takes as an input, and where its gradient goes. Not a leaf: of one that is a pass's target,
#: autograd answers with an error whether it is.
with torch.inference_mode(False), torch.enable_grad():  # also where packext is imported without
    TARGET = torch.zeros((), requires_grad=True).clone()
AIM = torch.autograd.graph.get_gradient_edge(TARGET).node

#: Gradients at the outputs of a call, None where none arrived, and where the samples are in them.
Gradients = Sequence[Tensor | None]
Layouts = Sequence[Layout | None]


@dataclass(eq=False, slots=True)
class Source:
    """A parameter as it entered the computation: the tensor, its name, and what it was then."""

    tensor: Tensor
    name: str
    kind: tuple[torch.dtype, torch.device] = field(init=False)

    def __post_init__(self) -> None:
        """Note its dtype and device, which the model's `to()` changes in place."""
        self.kind = self.tensor.dtype, self.tensor.device


@dataclass(eq=False, slots=True)
class Use:
    """What is known of a use once its call has run. Holds no activations.

    Attributes:
        rule: turns (inputs, g) into factored per-sample gradients.
        func: the torch function that was called.
        names: names of the tensors that the tap saves, in order.
        consts: the other arguments, by name.
        sources: for each name that carries parameters, the parameters behind it.
        where: module path and class, for messages.
        shapes: of the saved tensors, by name.
        outputs: shapes of the outputs at which g arrives.
        owner: weak reference to the record of the forward that it belongs to, which the model's outputs keep.
        layouts: where the samples sit in each output, once known.
        positions: of the tapped outputs among those of the call.
        ties: names of saved tensors that are inputs of the model as they came, with the samples along its batch axis.
    """

    rule: Rule
    func: Callable[..., Any]
    names: tuple[str, ...]
    consts: dict[str, Any]
    sources: dict[str, tuple[Source, ...]]
    where: str
    shapes: Mapping[str, tuple[int, ...]]
    owner: Callable[[], Record | None]
    outputs: tuple[tuple[int, ...], ...] = ()
    layouts: tuple[Layout | None, ...] | None = None
    positions: tuple[int, ...] = (0,)
    ties: frozenset[str] = frozenset()
    #: Whether it is the second use of a weight, in a derivative of the model.
    second: bool = False
    #: Names of the tensors that are parameters as they are, and not values made of them.
    direct: frozenset[str] = frozenset()
    #: Names of the tensors that no gradient is wanted of.
    still: frozenset[str] = frozenset()
    #: Whether the data that it meets is what uses have made, so that their own samples have been told apart.
    rooted: bool = False
    #: Of each output, while it is probed: the layouts that are left; None where no gradient arrived.
    options: list[list[Layout] | None] = field(default_factory=list)
    #: The same of the data that the call reads, by name.
    read_options: dict[str, list[Layout]] = field(default_factory=dict)
    node: Callable[[], Any] = lambda: None
    #: The type of device and what autocast computed in there, while the call ran; None where it was off.
    autocast: tuple[str, torch.dtype] | None = None
    #: Where values stand in the parameter that they are views of, by the value's name and the parameter's id.
    views: dict[tuple[str, int], View] = field(default_factory=dict)
    #: Where rows of a parameter stand in a value made of it, by the value's name and the parameter's id.
    rows: dict[tuple[str, int], tuple[Tensor, Tensor] | None] = field(default_factory=dict)
    #: Called with what `factors` gives, where somebody looks on.
    watch: Callable[[list[tuple[Source, Factored]]], None] | None = None

    @property
    def record(self) -> Record:
        """The forward that this use belongs to.

        Raises:
            PackextError: if no output of it is left.
        """
        record = self.owner()
        if record is None:
            raise PackextError(self.bypassed())
        return record

    def bypassed(self) -> str:
        """What to say of a gradient that came another way than through an output of the model."""
        record = self.owner()
        if record is not None and record.losses and all(math.prod(shape) == 1 for shape in self.outputs):
            return (
                f"{self.describe()} comes behind a loss that the model has computed, where samples are added up: it "
                "has no individual gradients. Do it outside of what is extended (a loss with parameters of its own "
                "need not be extended), or leave the parameter out (parameters=...)."
            )
        return (
            f"A gradient reached {self.describe()} without passing through an output of the extended model. "
            "Return from forward whatever the loss is computed from. If it came through a gradient of the model (made "
            "with create_graph=True), that has to be one with respect to arguments of the extended model, which "
            "require grad when it is called: run other passes outside of the context, or inside of "
            "`with px.disable():`."
        )

    def again(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """The tapped outputs of the call, run again on other tensors as it ran in the forward pass."""
        with nullcontext() if self.autocast is None else torch.autocast(*self.autocast, cache_enabled=False):
            return self.tapped(self.rule.call(self, tensors))

    def tapped(self, result: Any) -> list[Tensor]:
        """Those of a call's outputs that the tap sits on; a number as a row, which may be that of one sample."""
        outputs = [result] if isinstance(result, Tensor) else list(result)
        return [outputs[i] if outputs[i].dim() else outputs[i][None] for i in self.positions]

    @property
    def function(self) -> str:
        """The torch function's name."""
        return getattr(self.func, "__name__", str(self.func)).strip("_")

    def describe(self) -> str:
        """Where and what, for messages."""
        shapes = ", ".join(f"{k} {list(v)}" for k, v in self.shapes.items())
        params = ", ".join(dict.fromkeys(s.name for group in self.sources.values() for s in group))
        return f"{self.function}({shapes}) in {self.where}, parameters {params}"

    def placed(self, node: Any, outputs: Sequence[Tensor]) -> None:
        """Remember the autograd node of the tap (weakly) and the shapes of its outputs."""
        self.node = weakref.ref(node)
        self.outputs = tuple([y.shape for y in outputs])
        for group in self.sources.values():
            for source in group:
                _remember(source.tensor, self.node)

    def viewed(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember where values that are views stand in their parameters; what a tap keeps of them is none any more."""
        for name, group in self.sources.items():
            if name not in self.direct and len(group) == 1:
                view = View.of(tensors[name], group[0].tensor)
                if view is not None:
                    self.views[name, id(group[0].tensor)] = view

    def factors(
        self,
        saved: Sequence[Tensor],
        gs: Sequence[Tensor | None],
        tokens: Tokens | None = None,
        layouts: Layouts | None = None,
    ) -> list[tuple[Source, Factored]]:
        """Per-sample gradients of every parameter behind this use.

        Args:
            saved: the tensors that the tap kept, in the order of `names`.
            gs: gradients at the outputs; None where none arrived.
            tokens: what there is of each sample, if tokens are to take the place of samples.
            layouts: where the samples sit in the gradients, if there are others than in the forward pass.

        Returns:
            Parameters and forms; a parameter may occur more than once.

        Raises:
            UnsupportedUseError: if tokens are wanted that are not told apart here.
        """
        tensors = dict(zip(self.names, saved, strict=True))
        assert self.layouts is not None
        layouts = self.layouts if layouts is None else layouts
        if tokens is not None:
            layouts = [None if g is None else self._of_tokens(tokens, at, g) for at, g in zip(layouts, gs, strict=True)]
        forms = self.rule.factors(self, tensors, gs, layouts)
        if forms is None and tokens is not None:
            raise UnsupportedUseError(self._no_tokens(tokens))
        if forms is None:
            forms = masked(self, tensors, gs, layouts)
        result: list[tuple[Source, Factored]] = []
        for name, form in forms.items():
            value = tensors[name]
            for source in self.sources[name]:
                if source.tensor is value or value.is_leaf:
                    result.append((source, form))
                else:
                    result.append((source, self._pulled(form, name, value, source.tensor)))
        if self.watch is not None:
            self.watch(result)
        return result

    def _pulled(self, form: Factored, name: str, value: Tensor, parameter: Tensor) -> Pulled:
        """The form of a value, pulled back to a parameter that it is made of."""
        view = self.views.get((name, id(parameter)))
        if view is not None:
            pull = functools.partial(view.pull, parameter)
            return Pulled(form, parameter, pull, functools.partial(view.rows_in, parameter), view, view)
        rows = functools.partial(self._rows_in, name, value, parameter)
        node: Any = (value.grad_fn, value.output_nr)
        while node[0] is not None and name_of(node[0]) == "CloneBackward0":  # the same value, made contiguous for a use
            (node,) = node[0].next_functions
        return Pulled(form, parameter, functools.partial(_pull, value, parameter), rows, value=node)

    def _rows_in(self, name: str, value: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor] | None:
        """What `rows_in` says of a value that this use meets; asked once of each pass forward."""
        key = (name, id(parameter))
        if key not in self.rows:
            self.rows[key] = rows_in(value, parameter)
        return self.rows[key]

    def _of_tokens(self, tokens: Tokens, at: Layout | None, g: Tensor) -> Tokens:
        """Where the tokens are in g.

        Returns:
            Their layout.

        Raises:
            UnsupportedUseError: if they are not told apart here.
            PackextError: if others than those that count have a gradient.
        """
        assert at is not None
        here = replace(tokens, axis=at.axis, inner=at.inner)
        reads = [shape for k, shape in self.shapes.items() if k in self.rule.reads and k not in self.sources]
        if not self.rule.positionwise or type(at) is not Layout or not here.tells(g.shape, reads):
            raise UnsupportedUseError(self._no_tokens(tokens))
        if here.kept is not None:
            counts = here.spread(torch.ones(here.n, dtype=torch.bool, device=g.device), g)
            if bool((g.masked_fill(counts, 0) != 0).any()):
                raise PackextError(
                    f"Tokens that the mask leaves out have a gradient in {self.describe()}: the loss, or other tokens, "
                    "depend on them. Leave them out of both, or leave them in the mask."
                )
        return here

    def _no_tokens(self, tokens: Tokens) -> str:
        return (
            f"{self.describe()} does not tell the {tokens.length} tokens of a sample apart: it acts on several of them "
            f"at once, none or several of the axes of its output {list(self.outputs[0])} have {tokens.length} "
            "entries, or several of what it reads do. Leave its parameters out (parameters=...), pad the batch by a "
            "token if sizes coincide, pass mask=... of as many tokens as the layers have, or ask for per='sample'."
        )


class Rule:
    """How one torch function turns (inputs, g) into factored per-sample gradients."""

    name = "generic"
    #: Names of tensors that keep the samples of the output apart, as a check may rely on.
    reads: tuple[str, ...] = ("input", "input1", "input2", "data")
    #: Names of tensors that have the samples along an axis of torch's choice, whatever the model's batch axis is.
    own_axis: tuple[str, ...] = ()
    #: Names of integer tensors whose axes lead those of the output.
    leads: tuple[str, ...] = ()
    #: Whether a position of the output comes of the same position of the input alone, where sizes do not show else.
    positionwise = False
    #: Whether `input` has its samples along the first axis where the output has, and nothing else is theirs.
    stacks = False
    #: Whether the tap computes `.grad` itself, so that a sum of rows can serve as it.
    delivers = False
    #: Whether it knows what the part of a parameter that a process holds (of a DTensor) gives.
    splits = False
    #: Whether it is right where gradients are products with conjugates, as those of complex numbers are.
    conjugates = False

    def bias_axis(self, use: Use) -> int | None:
        """The axis of the inputs in `weight`, if `bias` is added to what it gives, at every position; or None."""
        return None

    def spares(self, use: Use) -> tuple[str, ...]:
        """Names of tensors whose values no derivative of the call takes."""
        return ()

    def cancels(self, use: Use, tensors: dict[str, Tensor]) -> float:
        """How much larger than 1 values are that cancel inside the call, of whose rounding its gradients are made."""
        return 1.0

    def tells_rows(self, use: Use) -> bool:
        """Whether it sees by itself that rows of a model's input, in whatever order, are of one sample each."""
        return False

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Any:
        """Run the function again on the saved tensors."""
        return use.func(**tensors, **use.consts)

    def pulled(
        self, use: Use, tensors: dict[str, Tensor], gs: Sequence[Tensor | None], names: Sequence[str]
    ) -> Mapping[str, Tensor | None]:
        """Gradients of the tensors in `names`, from those at the outputs: those of the function, run again."""
        inner = {k: v.detach().requires_grad_(k in names or k in use.sources) for k, v in tensors.items()}
        with torch.enable_grad():
            outputs = use.again(inner)
        live = [(y, g.to(y.dtype)) for y, g in zip(outputs, gs, strict=True) if g is not None and y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in live], [inner[k] for k in names], [g for _, g in live], allow_unused=True
        )
        return dict(zip(names, found, strict=True))

    def factors(self, use: Use, t: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored] | None:
        """A form for every name in `use.sources`; None where this rule does not apply."""
        return None


def masked(use: Use, tensors: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored]:
    """The generic rule: the call's own vjp, with the cotangent masked to one sample at a time.

    It needs to know nothing of the function and is the reference for every rule written for speed.
    It costs one vjp of the whole call per sample.

    Returns:
        A form for every name that carries parameters.
    """
    n = next(layout.n for layout in layouts if layout)
    keep_graph = torch.is_grad_enabled()
    inner = tensors
    if not keep_graph:
        inner = {k: v.detach().requires_grad_(k in use.sources) for k, v in tensors.items()}
    with torch.enable_grad():
        outputs = use.again(inner)
    live = [
        (y, g, layout)
        for y, g, layout in zip(outputs, gs, layouts, strict=True)
        if g is not None and layout and y.requires_grad
    ]

    def vjp(name: str, sample: int) -> Tensor:
        grad = torch.autograd.grad(
            [y for y, _, _ in live],
            inner[name],
            [layout.only(g, sample).to(y.dtype) for y, g, layout in live],
            retain_graph=True,
            create_graph=keep_graph,
            allow_unused=True,
        )[0]
        return torch.zeros_like(inner[name]) if grad is None else grad

    return {name: Masked(n, inner[name], lambda i, name=name: vjp(name, i)) for name in use.sources}


def _pull(value: Tensor, parameter: Tensor, rows: Tensor) -> Tensor:
    """`[c, *value.shape] -> [c, *parameter.shape]` through the function of parameters that made `value`."""
    keep = torch.is_grad_enabled()
    rows = rows.to(value.dtype)
    ways = {"retain_graph": True, "create_graph": keep, "allow_unused": True}
    if len(rows) == 1:
        grad = torch.autograd.grad(value, parameter, rows[0], **ways)[0]
        return torch.zeros_like(parameter)[None] if grad is None else grad[None]
    try:
        grad = torch.autograd.grad(value, parameter, rows, is_grads_batched=True, **ways)[0]
    except RuntimeError:  # a function on the way takes one gradient at a time, or all do not fit
        return torch.cat([_pull(value, parameter, row) for row in rows.split(1)])
    return torch.zeros(len(rows), *parameter.shape, dtype=value.dtype, device=value.device) if grad is None else grad


#: Autograd nodes (weak) of the taps of each parameter, by its id. A node keeps its use, and that the parameter:
#: while one of them is alive, no other tensor can have that id.
_LIVE: dict[int, list[Callable[[], Any]]] = {}
_LOCK = threading.Lock()


def _remember(parameter: Tensor, node: Callable[[], Any]) -> None:
    key = id(parameter)
    with _LOCK:  # several threads may run one model
        if key not in _LIVE and _power_of_two(len(_LIVE)):  # time to forget parameters that died
            for other in [other for other, refs in _LIVE.items() if not any(ref() is not None for ref in refs)]:
                del _LIVE[other]
        refs = _LIVE.setdefault(key, [])
        if len(refs) > 3 and _power_of_two(len(refs)):
            refs[:] = [ref for ref in refs if ref() is not None]
        refs.append(node)


def _power_of_two(count: int) -> bool:
    return count & (count - 1) == 0


def partner(parameter: Tensor) -> tuple[Tensor, int] | None:
    """The bias that a weight meets in every use of either (or the weight that a bias does), and the `bias_axis`."""
    uses = _passed(parameter)
    found: dict[tuple[int, int], Tensor] = {}
    for use in uses.values():
        pair = [use.sources[k][0].tensor for k in ("weight", "bias") if k in use.direct]
        axis = use.rule.bias_axis(use)
        if len(pair) != 2 or axis is None:
            return None
        other = pair[pair[0] is parameter]
        found[id(other), axis] = other
    if len(found) != 1:
        return None
    ((_, axis), other) = found.popitem()
    return (other, axis) if _passed(other).keys() == uses.keys() else None


def _passed(parameter: Tensor) -> dict[int, Use]:
    """Uses that the pass under way comes through, by id: graphs of other passes are alive as long as their losses."""
    nodes = [node for node in live_nodes(parameter) if not node.use.second]
    return {id(node.use): node.use for node in nodes if torch._C._will_engine_execute_node(node)}


def live_nodes(parameter: Tensor) -> list[Any]:
    """Nodes of the taps of `parameter` whose graph is still alive."""
    nodes = [ref() for ref in tuple(_LIVE.get(id(parameter), ()))]
    return [node for node in nodes if node is not None]
