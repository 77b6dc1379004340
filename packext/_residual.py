"""What the curvature of the model's own functions adds to the Hessian of a loss, beside the GGN.

With x the inputs of a node of autograd's graph, y its outputs and d the gradient that arrives at them, the Hessian
with respect to the parameters is the GGN plus the sum over nodes of `Jᵀ R J`, in which `R = sum over k of d_k y_k''(x)`
and J is the Jacobian of x with respect to the parameters (Dangel, Harmeling & Hennig, 2020, for layers in a chain). R
is what autograd finds by differentiating the node's own backward. Columns of its root are cotangents at x, as those of
the loss are at the model's output.

That is the whole diagonal entry of a parameter if it enters linearly and once on every path: terms of a product of a
parameter and data lie off the diagonal, unless the data depend on the parameter. Whatever else is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from packext._errors import CoupledSamplesError, PackextError, UnsupportedUseError
from packext._flight import Look
from packext._graph import inputs_first, name_of
from packext._layout import Layout, digits, ranks
from packext._listening import here, silence
from packext._pass import Pass
from packext._taps import Gate, OwnedRule
from packext._use import Source, Use
from packext.rules.elementwise import ArgumentRule

#: Nodes whose outputs have one entry for each entry of an input, and depend on no other. For all others R is found as
#: a matrix for each sample.
ELEMENTWISE = frozenset(
    f"{name}Backward"
    for name in (
        "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Celu", "Cos", "Cosh", "Div", "Elu", "Erf", "Erfc", "Exp",
        "Exp2", "Expm1", "Gelu", "Hardswish", "Log", "Log10", "Log1P", "Log2", "LogSigmoid", "Mish", "Mul", "Pow",
        "Reciprocal", "Rsqrt", "Sigmoid", "Silu", "Sin", "Sinh", "Softplus", "Sqrt", "Tan", "Tanh",
    )
)  # fmt: skip

#: Nodes that are piecewise linear, and whose backward torch cannot differentiate.
PIECEWISE_LINEAR = frozenset({"HardsigmoidBackward"})

#: The most inputs per sample of a node that is not elementwise.
LARGEST = 1024

_INSTEAD = "Use DiagHessianMC, an estimate for any model that can be differentiated twice."


def residual(
    flight: Pass,
    wants: Callable[[Tensor], bool],
    edges: list[GradientEdge],
    outputs: list[Tensor],
    layouts: list[Layout],
    loss: GradientEdge,
    g: Tensor,
) -> Iterator[tuple[list[GradientEdge], list[Tensor], float]]:
    """Columns of the roots of all R: cotangents, where to send them from, and their sign.

    Args:
        flight: the backward pass under way.
        wants: tells of which parameters the diagonal is wanted.
        edges: where gradients enter the graphs of the tensors in the loss's input.
        outputs: these tensors.
        layouts: where the samples are in them.
        loss: where the loss was computed.
        g: the gradient that arrived there.

    Yields:
        Edges, a cotangent for each that holds a column of every sample at most, and 1.0 or -1.0. What has other terms
        on the diagonal, or cannot be differentiated twice, is refused with an UnsupportedUseError.
    """
    parts = _curved(flight, wants, *_inspect(edges, loss, wants), loss, g)
    if not parts:
        return
    masks = list(_masks(flight, {part.place.node for part in parts}, edges, outputs, layouts))
    while parts:
        part = parts.pop()
        yield from part.columns([mask[part.place.node] for mask in masks], layouts[0].n)


def _curved(
    flight: Pass,
    wants: Callable[[Tensor], bool],
    places: dict[Any, Place],
    near: dict[Any, Use],
    loss: GradientEdge,
    g: Tensor,
) -> list[Part]:
    """Inputs of nodes in which the second derivatives are not zero."""
    look = _Unhooked(flight, near, functools.partial(_refuse_nonlinear, wants))
    look.send([loss], [g])
    return [
        part
        for node, gradients in look.found.items()
        if node in places and any(d is not None for d in gradients)
        for inputs in _groups(places[node].inputs)
        if (part := Part(places[node], gradients, inputs)).is_curved()
    ]


class _Unhooked(Look):
    """A look that refuses hooks of the user's (`Tensor.register_hook`) that change a gradient on its way.

    `nodes` has the use in whose output, or behind which, each of them is.
    """

    nodes: dict[Any, Use]

    def send(self, edges: Any, cotangents: list[Tensor]) -> None:
        """Send `cotangents` from `edges`, look, and compare what has left all nodes with what has arrived."""
        self.left: dict[Edge, Tensor] = {}
        self.undefined: Any = None
        nodes = inputs_first([edge.node for edge in edges])
        hooks = [node.register_hook(functools.partial(self._leaves, node)) for node in nodes if node.next_functions]
        try:
            super().send(edges, cotangents)
        finally:
            for hook in hooks:
                hook.remove()
        if self.undefined is not None:
            raise PackextError(
                f"DiagHessian: {name_of(self.undefined)} passes on a gradient of NaN to the model. Check that the "
                "model's inputs, parameters and outputs are finite."
            )
        for (node, index), left in self.left.items():
            arrived = self.found[node][index]
            tol = 100 * torch.finfo(left.dtype).eps
            size = float(left.abs().nan_to_num(0.0).max()) if left.numel() else 0.0
            if arrived is None or not torch.allclose(arrived, left, tol, tol * size, equal_nan=True):
                raise UnsupportedUseError(
                    "DiagHessian: a hook (Tensor.register_hook) changes the gradient at an output of "
                    f"{name_of(node)} (behind {self.nodes[node].describe()}), and its derivative is not known. Take it "
                    f"out, or write what it does as functions. {_INSTEAD}"
                )

    def _leaves(self, node: Any, gradients: tuple[Tensor | None, ...], _: Any) -> None:
        for edge, g in zip(node.next_functions, gradients, strict=True):
            if edge[0] in self.nodes and g is not None and here().probe is None:
                if self.undefined is None and g.isnan().any():
                    self.undefined = node
                self.left[edge] = self.left[edge] + g if edge in self.left else g


def _masks(
    flight: Pass, nodes: set[Any], edges: list[GradientEdge], outputs: list[Tensor], layouts: list[Layout]
) -> Iterator[dict[Any, tuple[Tensor | None, ...]]]:
    """For each binary digit of a sample's index, which entries of the nodes' outputs are of samples that have it."""
    n, generator = layouts[0].n, torch.Generator().manual_seed(20251121)
    for members in digits(n):
        cotangents = [
            torch.where(layout.spread(members.to(t.device), t), _random(t.shape, t, generator), 0.0)
            for layout, t in zip(layouts, outputs, strict=True)
        ]
        look = Look(flight, nodes)
        look.send(edges, cotangents)
        yield {node: tuple(None if t is None else t != 0 for t in ts) for node, ts in look.found.items()}


# -- the graph ------------------------------------------------------------------------------------------------


#: A node and the number of one of its outputs.
Edge = tuple[Any, int]


@dataclass(eq=False)
class Place:
    """A node between the loss's input and the parameters.

    Attributes:
        node: autograd's.
        inputs: edges to those of its inputs that depend on parameters, with these parameters as bits.
        after: the use that comes before it in the forward pass, for messages.
    """

    node: Any
    inputs: dict[Edge, int]
    after: Use

    @property
    def kind(self) -> str:
        """What torch calls it, without the number of the overload."""
        return name_of(self.node).rstrip("0123456789")

    @property
    def name(self) -> str:
        """What torch calls it, and where it is."""
        return f"{name_of(self.node)} (behind {self.after.describe()})"


def _inspect(
    edges: list[GradientEdge], loss: GradientEdge, wants: Callable[[Tensor], bool]
) -> tuple[dict[Any, Place], dict[Any, Use]]:
    """Nodes that depend on wanted parameters, without and with taps; refuses what has other terms on the diagonal."""
    bits: dict[int, int] = {}
    reach: dict[Any, int] = {}
    near: dict[Any, Use] = {}
    places: dict[Any, Place] = {}
    for node in inputs_first([e.node for e in edges]):
        children = [child for child, _ in node.next_functions if reach.get(child)]
        below = functools.reduce(int.__or__, (reach[child] for child in children), 0)
        use = getattr(node, "use", None)
        if isinstance(use, Use):
            sources = [source for group in use.sources.values() for source in group if wants(source.tensor)]
            _refuse_repeated(use, [s for s in sources if bits.setdefault(id(s.tensor), 1 << len(bits)) & below])
            own = functools.reduce(int.__or__, (bits[id(s.tensor)] for s in sources), 0)
            reach[node], near[node] = below | own, use
        elif below:
            reach[node], near[node] = below, near[children[0]]
            if not isinstance(node, Gate._backward_cls):  # pyright: ignore[reportAttributeAccessIssue]
                inputs = {edge: reach[edge[0]] for edge in node.next_functions if edge[0] in children}
                places[node] = Place(node, inputs, near[node])
    known = {e.node for e in edges}
    for node in inputs_first([loss.node], lambda node: node not in known):
        if node not in known and (reach.get(node) or isinstance(getattr(node, "use", None), Use)):
            raise UnsupportedUseError(
                "DiagHessian needs a loss that sees the model through the input that it is "
                f"called with, and in no other way. {_INSTEAD}"
            )
    return places, near


def _refuse_repeated(use: Use, repeated: Sequence[Source]) -> None:
    """Refuse a use of parameters on data that depends on them."""
    if repeated:
        raise UnsupportedUseError(
            f"DiagHessian is not known for {repeated[0].name}: {use.describe()} uses it on data that already depends "
            f"on it. {_INSTEAD}"
        )


def _refuse_nonlinear(wants: Callable[[Tensor], bool], use: Use, saved: Sequence[Tensor]) -> None:
    """Refuse a use whose function is not linear in each wanted parameter alone."""
    tensors = dict(zip(use.names, saved, strict=True))
    for source in {id(s.tensor): s for group in use.sources.values() for s in group if wants(s.tensor)}.values():
        names = [k for k, group in use.sources.items() if source in group]
        linear = all(tensors[k].is_leaf or _is_linear([tensors[k]], [source.tensor]) for k in names)
        if linear and not isinstance(use.rule, (OwnedRule, ArgumentRule)):
            inner = {k: v.detach().requires_grad_(k in use.sources) for k, v in tensors.items()}
            with torch.enable_grad():
                outputs = use.again(inner)
            linear = _is_linear(outputs, [inner[k] for k in names])
        if not linear:
            raise UnsupportedUseError(
                f"DiagHessian is not known for {source.name}: {use.describe()} is not linear in it. {_INSTEAD}"
            )


def _is_linear(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether the second derivatives of `outputs` in `inputs` vanish, by autograd."""
    generator = torch.Generator().manual_seed(20251121)
    live = [y for y in outputs if y.requires_grad]
    try:
        with silence(), torch.enable_grad():
            slopes = torch.autograd.grad(
                live, inputs, [_random(y.shape, y, generator) for y in live], create_graph=True, allow_unused=True
            )
            slopes = [s for s in slopes if s is not None and s.requires_grad]
            if not slopes:
                return True
            twice = torch.autograd.grad(
                slopes, inputs, [_random(s.shape, s, generator) for s in slopes], retain_graph=True, allow_unused=True
            )
    except RuntimeError:  # it cannot be differentiated twice
        return False
    return not any(t is not None and t.any() for t in twice)


# -- one node -------------------------------------------------------------------------------------------------


def _groups(inputs: dict[Edge, int]) -> list[list[Edge]]:
    """Inputs of a node, so grouped that no parameter reaches two groups: terms between these are off the diagonal."""
    groups: list[tuple[int, list[Edge]]] = []
    for key, reach in inputs.items():
        members = [key]
        for group in [group for group in groups if group[0] & reach]:
            groups.remove(group)
            reach, members = reach | group[0], group[1] + members
        groups.append((reach, members))
    return [members for _, members in groups]


class Part:
    """Some inputs x of a node, and the matrix R of the second derivatives in their entries."""

    def __init__(self, place: Place, gradients: tuple[Tensor | None, ...], inputs: list[Edge]) -> None:
        """Take the node, the gradients at its outputs, and which inputs."""
        self.place, self.gradients, self.inputs = place, gradients, inputs
        if isinstance(place.node, BackwardCFunction):
            raise UnsupportedUseError(
                f"DiagHessian: {place.name} is an autograd function written in Python, of which nothing tells whether "
                f"its backward can be differentiated. Write it as torch functions. {_INSTEAD}"
            )
        metas = [node._input_metadata[index] for node, index in inputs]
        self.shapes, self.dtypes = [torch.Size(meta.shape) for meta in metas], [meta.dtype for meta in metas]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.slopes = self._slopes(gradients)
        generator = torch.Generator().manual_seed(20251121)
        self.vector = _random([sum(self.sizes)], next(d for d in gradients if d is not None), generator)

    def _slopes(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients at the inputs, as functions of these that can be differentiated."""
        starts = [(GradientEdge(self.place.node, k), d) for k, d in enumerate(gradients) if d is not None]
        with self._differentiable(), torch.enable_grad(), _cut(self.inputs):
            found = torch.autograd.grad(
                [edge for edge, _ in starts], [GradientEdge(*key) for key in self.inputs], [d for _, d in starts],
                create_graph=True, allow_unused=True,
            )  # fmt: skip
        return list(found)

    def _product(self, slopes: Sequence[Tensor | None], vector: Tensor) -> Tensor:
        """R times a vector `[M]` of the entries of all inputs, with the slopes that R is the derivative of."""
        pairs = [
            (slope, v.view(slope.shape).to(slope.dtype))
            for slope, v in zip(slopes, vector.split(self.sizes), strict=True)
            if slope is not None and slope.requires_grad
        ]
        with self._differentiable(), _cut(self.inputs):
            found = torch.autograd.grad(
                [slope for slope, _ in pairs],
                [GradientEdge(*key) for key in self.inputs],
                [v for _, v in pairs],
                retain_graph=True,
                allow_unused=True,
            )
        return torch.cat([
            vector.new_zeros(size) if t is None else t.detach().flatten().to(vector.dtype)
            for t, size in zip(found, self.sizes, strict=True)
        ])  # fmt: skip

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        try:
            with silence():
                yield
        except RuntimeError as error:
            attention = "attention" in str(error)
            how = ", as in `with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):` around the forward pass"
            raise UnsupportedUseError(
                f"DiagHessian: torch cannot differentiate {self.place.name} twice: {error}. Use functions that it can"
                f"{how if attention else ''}."
            ) from error

    def is_curved(self) -> bool:
        """Whether R is other than zero: it is zero if it takes a random vector to zero."""
        if self.place.kind in PIECEWISE_LINEAR or not any(s is not None and s.requires_grad for s in self.slopes):
            return False
        if any(dtype.is_complex for dtype in self.dtypes):
            raise UnsupportedUseError(f"DiagHessian: {self.place.name} has complex inputs. {_INSTEAD}")
        image = self._product(self.slopes, self.vector)
        if not image.isfinite().all():
            raise UnsupportedUseError(f"DiagHessian: second derivatives of {self.place.name} are not finite here.")
        return bool(image.any())

    def columns(
        self, masks: Sequence[tuple[Tensor | None, ...]], n: int
    ) -> Iterator[tuple[list[GradientEdge], list[Tensor], float]]:
        """Columns of roots of R, one of every sample at a time.

        Args:
            masks: for each binary digit of a sample's index, the entries of the outputs of samples that have it.
            n: number of samples.

        Yields:
            The edges, cotangents for them, and the sign.
        """
        slots, owner = self._blocks_of(self._owner(masks, n), n)
        eps = torch.finfo(torch.promote_types(self.vector.dtype, torch.float32)).eps
        values, vectors = torch.linalg.eigh(self._blocks(slots))
        sizes = values.abs()
        kept = sizes > slots.shape[1] * eps * sizes.amax(1, keepdim=True)
        edges = [GradientEdge(*key) for key in self.inputs]
        for sign in (1.0, -1.0):
            block, which = ((sign * values > 0) & kept).nonzero().T
            rank = ranks(owner[block], n)
            for chosen in rank.argsort(stable=True).split(rank.bincount().tolist()):
                b, k = block[chosen], which[chosen]
                flat = self.vector.new_zeros(sum(self.sizes) + 1)
                flat[slots[b]] = (vectors[b, :, k] * sizes[b, k, None].sqrt()).to(flat.dtype)
                kinds = zip(flat[:-1].split(self.sizes), self.shapes, self.dtypes, strict=True)
                yield edges, [v.view(shape).to(dtype) for v, shape, dtype in kinds], sign

    def _owner(self, masks: Sequence[tuple[Tensor | None, ...]], n: int) -> Tensor:
        """The sample of each entry of the inputs `[M]`; -1 where R is zero."""
        owner = torch.zeros(len(self.vector), dtype=torch.long, device=self.vector.device)
        for bit, mask in enumerate(masks):
            own = [
                None if d is None else torch.zeros_like(d) if some is None else torch.where(some, d, 0.0)
                for d, some in zip(self.gradients, mask, strict=True)
            ]
            owner += (self._product(self._slopes(own), self.vector) != 0).long() << bit
        if (owner >= n).any():
            raise CoupledSamplesError(
                f"Samples influence each other in {self.place.name}: their shares of the Hessian are not defined."
            )
        return owner.where(self._product(self.slopes, self.vector) != 0, -1)

    def _blocks_of(self, owner: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Blocks that R consists of: indices of entries `[B, k]` (M stands for none), and each block's sample `[B]`."""
        if self.place.kind in ELEMENTWISE and len(set(self.shapes)) == 1:
            index = torch.arange(len(owner), device=owner.device)
            slots, owners = (t.view(len(self.inputs), -1) for t in (index, owner))
            sample = owners.amax(0)
            real = sample >= 0
            return slots[:, real].T, sample[real]
        entries = (owner >= 0).nonzero()[:, 0]
        sample = owner[entries]
        rank = ranks(sample, n)
        k = int(rank.max()) + 1
        if k > LARGEST:
            raise UnsupportedUseError(
                f"DiagHessian: {self.place.name} has {k} inputs per sample that influence each other; up to {LARGEST} "
                f"are dealt with. {_INSTEAD}"
            )
        slots = entries.new_full((n, k), len(owner))
        slots[sample, rank] = entries
        return slots, torch.arange(n, device=owner.device)

    def _blocks(self, slots: Tensor) -> Tensor:
        """The blocks `[B, k, k]` of R, in float64."""
        blocks = self.vector.new_zeros((*slots.shape, slots.shape[1]), dtype=torch.float64)
        for k in range(slots.shape[1]):
            unit = self.vector.new_zeros(sum(self.sizes) + 1)
            unit[slots[:, k]] = 1
            image = torch.nn.functional.pad(self._product(self.slopes, unit[:-1]), (0, 1))
            blocks[:, :, k] = image[slots].double()
        return (blocks + blocks.mT) / 2


@contextmanager
def _cut(inputs: Sequence[Edge]) -> Iterator[None]:
    """Derivatives in some of a node's inputs go no further than these, one of which may be made of another."""
    hooks = [node.register_prehook(lambda gs: (None,) * len(gs)) for node in {node for node, _ in inputs}]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _random(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers between 0.5 and 1.5: what is linear in them vanishes where it does for all."""
    return (torch.rand(tuple(shape), generator=generator) + 0.5).to(like)
