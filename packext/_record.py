"""One forward pass of an extended model: its uses, the number of samples, and their layouts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.utils.parametrizations import _SpectralNorm

from packext._graph import inputs_first, name_of
from packext._layout import Layout
from packext._use import Source, Use

if TYPE_CHECKING:
    from packext._extend import Extension

_tokens = iter(range(1, 1 << 62))


class Buffer(NamedTuple):
    """A buffer of a module, as it was at some time."""

    path: str
    module: nn.Module
    name: str
    tensor: Tensor
    version: int

    def written(self) -> bool:
        """Whether it was written to, or replaced, since then."""
        return self.module._buffers.get(self.name) is not self.tensor or _version(self.tensor) != self.version


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def buffers_of(modules: Iterable[nn.Module]) -> list[Buffer]:
    """Buffers as they are now. Whole numbers by themselves count, and spectral norms' are made of parameters alone."""
    # In evaluation torch 2.9's instance norms write their statistics as they are.
    return [
        Buffer(module.__dict__["_packext"].path, module, name, t, _version(t))
        for module in modules
        if module._buffers
        and "_packext" in module.__dict__
        and not isinstance(module, _SpectralNorm)
        and (module.training or not isinstance(module, nn.modules.instancenorm._InstanceNorm))
        for name, t in module._buffers.items()
        if t is not None and (t.is_floating_point() or t.is_complex() or t.dim())
    ]


class Inside(NamedTuple):
    """A loss that a model computed itself: its mark's node (weak), and what it read."""

    node: Callable[[], Any]
    edges: list[GradientEdge]
    inputs: list[tuple[torch.Size, torch.dtype, torch.device]]


class Slope(NamedTuple):
    """A derivative by an input that has no axis of samples: where the input is in the graph, and the outputs are."""

    input: GradientEdge
    outputs: list[tuple[GradientEdge, tuple[Any, ...]]]


class Record:
    """What a forward pass of an extended model leaves for the backward pass.

    Attributes:
        token: marks this forward's tensors.
        n: number of samples; 0 where no input has a batch axis.
        sizes: entries of the inputs along the batch axis.
        lengths: entries of the inputs along the axis of tokens, the other one of the first two.
        batch_axis: where samples are in inputs and outputs.
        by_use: whether inputs have no axis of samples, and rows of theirs belong to the sample that uses them.
        uses: in the order of the forward pass.
        gates: autograd nodes at the model's outputs (weak), with shape, dtype and device.
        routed: whether data chose which rows of an activation went on, so that layouts may differ in every pass.
        hooked: whether hooks were put on tensors while it ran.
        strays: gates on outputs made of parameters alone, with one of these.
        names: every name under which a parameter was seen.
        distributed: those that are DTensors, by name, with the class of the module. No tap is placed on them.
        distributed_output: whether an output is a DTensor.
        among: the processes that gather parameters for each inner pass, and so probe together; None if none do.
        rounds: how many cotangents tell the samples apart on the one of them that has the most.
        behind: autograd nodes of the inputs, where another model may be behind.
        given: gives what leads to the inputs that require grad, or None for a leaf that nobody holds.
        trail: hash of the torch functions that ran, and of the training flags of the modules that did.
        refused: what was seen and cannot be right, with the parameters behind it, and how many uses came before.
        probed: which gates the probe has started from.
        places: where the samples are in the outputs, by gate, once it has; in inputs of `losses` by -1, -2, ...
        losses: losses that were computed inside.
        written: buffers that the forward pass has written to, by name; counters are none.
        counted: for whom a pass through this forward pass was counted (`Quantity.bounded`).
        again: nodes (weak) on gradients of the outputs of which a graph was made, and whether those of parameters were.
        running: whether the forward pass goes on.
        entered: autograd's number of the last pass that made a graph, and came in by an output.
        aside: autograd's number of the last pass that computed derivatives by the inputs alone, with a graph of them.
        slopes: gates on what such passes gave, which are further outputs of the model; None where its axis is known.
        inside: whether a derivative was computed, to be differentiated again, while the forward pass went on.
        unfollowed: what such passes went through and cannot be right, with the parameters behind it, and whether they
            were made while the forward pass went on.
    """

    def __init__(self, root: nn.Module, extension: Extension) -> None:
        """Start the record of one call of `root`."""
        self.root = weakref.ref(root)
        self.extension = extension
        self.token = next(_tokens)
        self.n = 0
        self.sizes: list[int] = []
        self.lengths: list[int] = []
        self.batch_axis = extension.batch_axis or 0
        self.by_use = extension.batch_axis is None
        self.uses: list[Use] = []
        self.gates: list[tuple[Any, torch.Size, torch.dtype, torch.device]] = []
        self.names: dict[str, Tensor] = {}
        self.distributed: dict[str, tuple[str, Tensor]] = {}
        self.distributed_output = False
        self.among: Any = None
        self.rounds = 0
        self.trail = 0
        self.refused: list[tuple[str, tuple[Source, ...], int]] = []
        self.probed: frozenset[int] = frozenset()
        self.places: dict[int, Layout] = {}
        self.again: list[tuple[Any, bool]] = []
        self.running = True
        self.entered = self.aside = -1
        self.slopes: dict[int, Slope | None] = {}
        self.inside = False
        self.unfollowed: list[tuple[str, tuple[Source, ...], bool]] = []
        self.losses: list[Inside] = []
        self.written: list[str] = []
        self.counted: list[Any] = []
        self.routed = self.by_use
        self.hooked = False
        self.strays: dict[int, str] = {}
        self.batch_statistics: list[str] = []
        self.born = torch._C._current_graph_task_id()
        self.behind: list[Any] = []
        self.given: list[Callable[[], Tensor | None]] = []
        self._modules: list[Callable[[], nn.Module | None]] | None = None
        self._paths: dict[int, str] | None = None

    def structure(self) -> tuple[Any, ...]:
        """What must be equal for the layouts of an earlier forward to hold for this one.

        Sizes themselves may differ; which of them equal 1 or N may not.

        Returns:
            A key to compare and hash.
        """
        return (
            self.trail,
            self.n > 1,
            tuple(
                (
                    u.rule.name,
                    u.function,
                    u.where,
                    u.names,
                    tuple(tuple((d == 1, d == self.n) for d in o) for o in u.outputs),
                )
                for u in self.uses
            ),
            tuple([bool(source.tensor._backward_hooks) for source in self.parameters()]),
        )

    def settle(self, gates: Iterable[int]) -> None:
        """Where inputs have no axis of samples and nothing is known, the size of outputs at `gates` is their number."""
        if not self.by_use or self.n:
            return
        axis = self.batch_axis
        shapes = [self.gates[i][1] for i in gates if i not in self.slopes]
        self.sizes = sorted({shape[axis] for shape in shapes if len(shape) > axis})
        self.n = self.sizes[0] if len(self.sizes) == 1 else 0

    def count(self) -> None:
        """The batch is the first input, unless outputs, or else what losses inside have read, have another's size."""
        axis = self.batch_axis
        outputs = {shape[axis] for _, shape, _, _ in self.gates if len(shape) > axis}
        inner = {shape[axis] for loss in self.losses for shape, _, _ in loss.inputs if len(shape) > axis}
        known = outputs or inner
        if self.n in known:
            return
        sizes = [n for n in dict.fromkeys(self.sizes) if n in known]
        if not sizes and not outputs and inner:  # read as rows of all samples, of which each has several
            whole = [n for n in dict.fromkeys(self.sizes) if n and not any(size % n for size in inner)]
            sizes = [n for n in whole if n > 1] or whole
            if len(sizes) > 1:
                self.n = 0
                return
        self.n = sizes[0] if sizes else self.n

    def below(self) -> list[tuple[GradientEdge, tuple[Any, ...]]]:
        """The edges under the outputs that are still there, with shape, dtype and device."""
        nodes = [(ref(), tuple(meta)) for i, (ref, *meta) in enumerate(self.gates) if i not in self.slopes]
        return [(GradientEdge(*node.next_functions[0]), meta) for node, meta in nodes if node is not None]

    def without_samples(self) -> str:
        """Say why there are none, and what to do."""
        return f"Per-sample quantities and curvature need samples: {self._why_none()}"

    def _why_none(self) -> str:
        if self.by_use and len(self.sizes) != 1:
            return (
                f"with batch_axis=None they are along axis 0 of the outputs, of which sizes are {self.sizes}. Return "
                "outputs with a row for each sample."
            )
        several = sorted(set(self.sizes))
        if len(several) > 1:
            return (
                f"inputs have {several} entries along axis {self.batch_axis}, and neither outputs nor losses inside of "
                "the model tell which are the samples. Return the outputs of the batch from forward, beside the loss."
            )
        if not self.sizes:
            return f"no input tensor has an axis {self.batch_axis}. Pass the batch to the extended model."
        return "the batch is empty. Make no pass for it (px.optim.DPSGD and DPAdam step by noise alone then)."

    def awaited_gates(self) -> frozenset[int]:
        """Indices of the gates that the backward pass which runs will reach."""
        nodes = ((i, gate[0]()) for i, gate in enumerate(self.gates))
        # The engine does not count the node that a pass starts from.
        current = torch._C._current_autograd_node()
        return frozenset(
            i for i, node in nodes if node is not None and (node is current or torch._C._will_engine_execute_node(node))
        )

    def half_followed(self, gates: frozenset[int]) -> Iterator[tuple[str, tuple[Source, ...]]]:
        """Parameters of which a pass through `gates` meets uses that have no tap, and why."""
        for why, sources, inside in self.unfollowed:
            if inside or gates & self.slopes.keys():
                yield why, sources

    def awaits_outputs(self, gates: frozenset[int]) -> bool:
        """Whether a pass is at the gate of a derivative, and comes to outputs and their losses by others of `gates`."""
        current = torch._C._current_autograd_node()
        here = {i for i in gates if self.gates[i][0]() is current}
        return here <= self.slopes.keys() and not gates <= self.slopes.keys()

    def modules(self) -> list[nn.Module]:
        """All modules of the model; none if it is gone."""
        root = self.root()
        if root is None:
            return []
        if self._modules is None:
            self._modules = [weakref.ref(module) for module in modules_of(root)]
        return [module for ref in self._modules if (module := ref()) is not None]

    def held(self) -> list[tuple[nn.Module, list[Tensor]]]:
        """All modules with their parameters as the forward pass met them: functional_call and FSDP replace some."""
        modules = self.modules()
        own = {id(p) for module in modules for p in module._parameters.values()}
        found = []
        for module in modules:
            lead = f"{path}." if (path := self.path(module)) else ""
            met = self.names if "_packext" in module.__dict__ else {}
            here = [(p, met.get(lead + name, p)) for name, p in module._parameters.items() if p is not None]
            # Another module's parameter that was put here keeps its place there.
            found.append((module, [p if id(seen) in own else seen for p, seen in here]))
        return found

    def extended(self) -> list[nn.Module]:
        """All modules that were extended with the model's; the first one holds them all."""
        root, whole = self.root(), self.extension.shared.whole()
        every = self.modules() if whole is None or whole is root else modules_of(whole)
        return every if root in every else self.modules()

    def path(self, module: nn.Module) -> str:
        """Where `module` is in the extended model; it may have been extended with another one since, or by itself."""
        extension = module.__dict__.get("_packext")
        if extension is None:
            return ""
        if extension.shared is self.extension.shared or (root := self.root()) is None:
            return extension.path
        if self._paths is None:
            lead = f"{self.extension.path}." if self.extension.path else ""
            self._paths = {id(m): f"{lead}{path}" for path, m in root.named_modules()}
        key = id(module)
        return self._paths[key] if key in self._paths else extension.path

    def parameters(self) -> list[Source]:
        """Every parameter behind a use, once."""
        found: dict[int, Source] = {}
        for use in self.uses:
            for group in use.sources.values():
                for source in group:
                    found.setdefault(id(source.tensor), source)
        return list(found.values())


def tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors in nested lists, tuples, dictionaries and plain objects such as data classes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item, depth)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, depth)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not _calls(value):
        for item in vars(value).values():
            yield from tensors_in(item, depth - 1)


def _calls(value: Any) -> bool:
    """Whether `value` is a function or like one; batches of PyTorch Geometric can be called, but have items."""
    return callable(value) and not hasattr(type(value), "__getitem__")


def modules_of(root: nn.Module) -> list[nn.Module]:
    """What `root.modules()` gives, in less time."""
    found: dict[int, nn.Module] = {}
    todo = [root]
    while todo:
        module = todo.pop()
        if id(module) not in found:
            found[id(module)] = module
            if parts := module._modules:
                todo += [child for child in reversed(parts.values()) if child is not None]
    return list(found.values())


#: Nodes of autograd that are linear in each of their inputs.
_LINEAR = ("Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Sum", "Mean", "ToCopy", "View", "Squeeze", "Unsqueeze", "Stack",
           "Cat", "Select", "Index", "Clone", "Where")  # fmt: skip


def losses_inside(record: Record, gates: frozenset[int]) -> set[Any]:
    """Marks of losses that the model computed and returned, by themselves or in weighted sums, as scalars."""
    known = {node for loss in record.losses if (node := loss.node()) is not None}
    nodes = [(record.gates[i][0](), record.gates[i][1]) for i in gates] if known else []
    roots = [_under(node) for node, shape in nodes if node is not None and not shape]
    ways: dict[Any, list[Any]] = {}  # of each node that a loss is linear in: its inputs with one behind them
    for node in inputs_first(roots, lambda node: node not in known and _kind(node) in _LINEAR):
        if node in known:
            ways[node] = []
            continue
        below, kind = [child for child, _ in node.next_functions], _kind(node)
        behind = [child for child in below if child in ways]
        linear = kind in _LINEAR and len(behind) > 0
        if kind in ("Mul", "Div"):  # in one factor, and in the numerator
            linear = len(behind) == 1 and (below[0] in ways or kind == "Mul")
        if linear:
            ways[node] = behind
    found, todo = set(), [root for root in roots if root in ways]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += ways[node]
    return found & known


def only_losses(gate: Any, marks: set[Any]) -> bool:
    """Whether what stands at `gate` is one of the losses in `marks`, or a weighted sum of such and nothing else."""
    inner = inputs_first([_under(gate)], lambda node: node not in marks and _kind(node) in _LINEAR)
    return all(node in marks or _kind(node) in _LINEAR for node in inner)


def _under(gate: Any) -> Any:
    """The node under a gate, or under the one that DistributedDataParallel may put on all outputs."""
    node, output = gate.next_functions[0]
    while node is not None and _kind(node) == "_DDPSink":
        node, output = node.next_functions[output]
    return node


def _kind(node: Any) -> str:
    return name_of(node).partition("Backward")[0]
