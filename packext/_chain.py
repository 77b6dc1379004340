"""Curvature that is defined where a model is a chain: each function has one input that depends on parameters.

The chain is read from autograd's graph, from the loss's input backwards; no layer needs a rule. What happens to a
cotangent from one edge of it to the next is an inner pass through one function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from packext._errors import CoupledSamplesError, PackextError, UnsupportedUseError
from packext._factored import Factored, accumulation_dtype
from packext._flight import Sweep, undisturbed
from packext._graph import inputs_first, name_of
from packext._layout import Layout, separating
from packext._listening import silence
from packext._pass import Pass
from packext._precision import unrounded
from packext._quantity import refuse_vectors
from packext._taps import Argument, Observed, Owned
from packext._use import TARGET, Source, Use

#: The most entries per sample between two functions of a chain for which a matrix `[D, D]` is kept.
LARGEST = 8192


class Chain:
    """The functions between a loss's input and the model's first parameters, where each feeds the next alone.

    Attributes:
        edges: where gradients enter them, from the loss's input on.
        uses: of each parameter behind them, by its id, with the index of its edge.
    """

    def __init__(self, start: GradientEdge, loss: str, asked: str, instead: str) -> None:
        """Follow the graph from the input of a loss.

        Args:
            start: where gradients enter it.
            loss: its class.
            asked: the quantity.
            instead: what else to ask for.

        Raises:
            UnsupportedUseError: if it is no chain of linear maps, convolutions and functions without parameters.
        """
        self.edges: list[GradientEdge] = []
        self.uses: dict[int, tuple[int, Use]] = {}
        useful, edge, before = _toward_taps(start.node), start, f"the extended {loss}"
        while True:
            self.edges.append(edge)
            node: Any = edge.node
            if isinstance(node, _class(Owned)):
                before = node.use.describe()  # pyright: ignore[reportAttributeAccessIssue]
                self._add(node.use, asked, instead)  # pyright: ignore[reportAttributeAccessIssue]
            elif isinstance(node, _TAPS):
                raise UnsupportedUseError(
                    f"{asked} is defined for linear maps and convolutions, and there is {node.use.describe()}. Freeze "
                    f"its parameters with requires_grad_(False), or ask for {instead}."
                )
            following = [GradientEdge(f, k) for f, k in node.next_functions if f in useful]
            if not following:
                return
            if len(following) > 1:
                raise UnsupportedUseError(
                    f"{asked} is defined for a chain of layers, and before {before} comes {name_of(node)} "
                    f"{_shape(edge)}, which joins {len(following)} values that depend on parameters (as residual "
                    f"connections and elementwise parameters do). Ask for {instead}, which needs no chain."
                )
            (edge,) = following

    def _add(self, use: Use, asked: str, instead: str) -> None:
        for name, group in use.sources.items():
            for source in group:
                if id(source.tensor) in self.uses or name not in use.direct:
                    how = "is used more than once" if name in use.direct else "is not used as it is"
                    raise UnsupportedUseError(
                        f"{asked} is not defined for {source.name} {list(source.tensor.shape)}, which {how} "
                        f"({use.describe()}). Freeze it with requires_grad_(False), or ask for {instead}."
                    )
                self.uses[id(source.tensor)] = (len(self.edges) - 1, use)

    def check_samples(self, n: int) -> None:
        """Raise a CoupledSamplesError unless all edges hold `n` samples, apart, along their first axis."""
        generator = torch.Generator().manual_seed(20251121)
        for edge in self.edges:
            if n > 1 and _shape(edge)[:1] != [n]:
                raise CoupledSamplesError(_AXIS.format(n, name_of(edge.node), _shape(edge)))
        start, meta = self.edges[0], _meta(self.edges[0])
        for members in separating(n):
            members = members.to(meta.device)
            values = torch.rand(meta.shape, generator=generator).to(meta.device, meta.dtype) + 0.5
            cotangent = torch.where(Layout(0, n).spread(members, values), values, 0.0)
            with silence():
                arrived = torch.autograd.grad([start], self.edges[1:], [cotangent], retain_graph=True)
            for edge, g in zip(self.edges[1:], arrived, strict=True):
                if not Layout(0, n).agrees(g, members):
                    raise CoupledSamplesError(_AXIS.format(n, name_of(edge.node), _shape(edge)))


_AXIS = (
    "KFRA needs the {} samples apart along axis 0 between all functions of the model, and at {} {} they are not. Keep "
    "the batch axis in front and by itself, or ask for KFLR."
)


def _class(function: type[torch.autograd.Function]) -> type:
    return function._backward_cls  # pyright: ignore[reportAttributeAccessIssue]


_TAPS = (_class(Owned), _class(Observed), _class(Argument))


def _meta(edge: GradientEdge) -> Any:
    return edge.node._input_metadata[edge.output_nr]  # pyright: ignore[reportAttributeAccessIssue]


def _shape(edge: GradientEdge) -> list[int]:
    return list(_meta(edge).shape)


def _toward_taps(start: Any) -> set[Any]:
    """The nodes from which a gradient reaches taps."""
    found: set[Any] = set()
    for node in inputs_first([start]):
        if isinstance(node, _TAPS) or any(child in found for child, _ in node.next_functions):
            found.add(node)
    return found


# -- batch averages ------------------------------------------------------------------------------------------


def average(
    flight: Pass, chain: Chain, columns: Iterator[Tensor], n: int, absorb: Callable[[Source, Factored], None]
) -> None:
    """Take the GGN with respect to a loss's input back through the chain, averaged over samples at every function.

    With J_n the Jacobian of a function for sample n, the matrix B `[D, D]` at its output becomes the mean over n of
    `J_nᵀ B J_n` at its input (Botev, Ritter & Barber, 2017, "Practical Gauss-Newton Optimisation for Deep Learning").
    At a tap each column of a root of B counts as a gradient that is the same for all samples.

    Args:
        flight: the pass.
        chain: of the loss.
        columns: of a root of the loss's Hessian, `[N, *]` each.
        n: the number of samples.
        absorb: takes the forms that arrive at parameters.

    Raises:
        PackextError: if a matrix would be too large.
    """
    for edge in chain.edges:
        entries = torch.Size(_shape(edge)).numel() // n
        if entries > LARGEST:
            raise PackextError(
                f"KFRA keeps a matrix of {entries} x {entries} at {name_of(edge.node)} {_shape(edge)}, and the most is "
                f"{LARGEST}. Ask for KFLR or KFAC, which keep none."
            )
    square: Tensor | None = None
    for column in columns:
        square = _add_square(square, column, n)
    for edge, following in zip(chain.edges, [*chain.edges[1:], None], strict=True):
        assert square is not None
        if not square.isfinite().all():
            where = "the loss's input" if edge is chain.edges[0] else f"what {name_of(edge.node)} gives"
            raise PackextError(
                f"KFRA: the curvature at {where} {_shape(edge)} is not finite. Check that the model's inputs, "
                "parameters and outputs are."
            )
        meta, root, square = _meta(edge), _root(square), None
        for row in root:
            cotangent = (row / n**0.5).expand(n, -1).reshape(meta.shape).to(meta.dtype)
            arrived = Sweep(flight, absorb).send([edge], [cotangent], [TARGET if following is None else following])
            if following is not None:
                found = arrived[0]
                size = torch.Size(_shape(following))
                square = _add_square(square, cotangent.new_zeros(size) if found is None else found, n)


def _add_square(square: Tensor | None, g: Tensor, n: int) -> Tensor:
    rows = g.reshape(n, -1).to(accumulation_dtype(g.dtype))
    return rows.T @ rows if square is None else square.addmm_(rows.T, rows)


def _root(square: Tensor) -> Tensor:
    """Rows whose outer products sum to `square`, the largest first; one of them at least."""
    if not len(square):  # a layer that gives no entry
        return square.new_zeros(1, 0)
    values, vectors = torch.linalg.eigh(square.double())
    keep = values > torch.finfo(square.dtype).eps * values[-1]
    keep[-1] = True
    return (vectors[:, keep] * values[keep].clamp(min=0).sqrt()).T.flip(0).to(square.dtype)


# -- positive curvature --------------------------------------------------------------------------------------


class Positive:
    """Products with blocks of the Hessian in which each function's own second derivatives count as positive."""

    def __init__(
        self,
        chain: Chain,
        edge: GradientEdge,
        g: Tensor,
        loss: Callable[[Tensor], Tensor],
        modify: Callable[[Tensor], Tensor],
    ) -> None:
        """Take second derivatives of the chain's functions.

        Args:
            chain: of the loss.
            edge: where the loss was computed.
            g: the gradient that arrived there.
            loss: product with the Hessian of the loss with respect to its input.
            modify: of a residual, what is to count. Functions that are neither linear nor act on each entry by itself
                are refused.
        """
        self.edges, self.uses, self.loss = chain.edges, chain.uses, loss
        self.residuals: list[Tensor | None] = []
        self._pulls: dict[Any, tuple[Tensor, Tensor]] = {}
        with kept(g.device.type):
            slopes = torch.autograd.grad([edge], self.edges, [g], retain_graph=True)
            for upper, lower, slope in zip(self.edges, self.edges[1:], slopes, strict=False):
                residual = _residual(upper, lower, slope.detach())
                self.residuals.append(None if residual is None else modify(residual))

    def product(self, parameter: Tensor, matrix: Tensor) -> Tensor:
        """Products of `matrix` `[V, *p]` with the block of `parameter`, in the same shape."""
        refuse_vectors(matrix, parameter)
        if id(parameter) not in self.uses:  # the loss does not depend on it
            return torch.zeros_like(matrix)
        rows = [self._one(parameter, v.to(parameter)) for v in matrix]
        return torch.stack(rows) if rows else torch.zeros_like(matrix)

    def _one(self, parameter: Tensor, v: Tensor) -> Tensor:
        last, _ = self.uses[id(parameter)]
        with kept(v.device.type):
            pushed = [self._push(self.edges[last], parameter, v)]
            for k in reversed(range(last)):
                pushed.append(self._push(self.edges[k], self.edges[k + 1], pushed[-1]))
            w = self.loss(pushed.pop())
            for k in range(last):
                u, residual = pushed.pop(), self.residuals[k]
                w = torch.autograd.grad([self.edges[k]], [self.edges[k + 1]], [w], retain_graph=True)[0]
                w = w if residual is None else w + residual * u
            return torch.autograd.grad([self.edges[last]], [parameter], [w], retain_graph=True)[0].detach()

    def _push(self, upper: GradientEdge, lower: Any, u: Tensor) -> Tensor:
        """The derivative at `upper` in direction `u` of `lower`: of what pulls c back, which is linear in c, by c."""
        key = (upper, lower if isinstance(lower, GradientEdge) else id(lower))
        if key not in self._pulls:
            meta = _meta(upper)
            c = torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device, requires_grad=True)
            self._pulls[key] = c, torch.autograd.grad([upper], [lower], [c], create_graph=True)[0]
        c, pulled = self._pulls[key]
        return torch.autograd.grad([pulled], [c], [u], retain_graph=True)[0]


def _residual(upper: GradientEdge, lower: GradientEdge, slope: Tensor) -> Tensor | None:
    """Second derivatives of `sum(slope * f(x))` by each entry of x, for an elementwise f; None if f is linear."""
    pulled = torch.autograd.grad([upper], [lower], [slope], create_graph=True)[0]
    if not pulled.requires_grad or not pulled.numel():
        return None

    def product(z: Tensor) -> Tensor | None:
        return torch.autograd.grad([pulled], [lower], [z], retain_graph=True, allow_unused=True)[0]

    residual = product(torch.ones_like(pulled))
    if residual is None:
        return None
    generator = torch.Generator().manual_seed(20251121)
    z = torch.randn(pulled.shape, generator=generator).to(pulled)
    other = product(z)
    apart = 0.0 if other is None else float((other - residual * z).abs().max())
    if apart > torch.finfo(pulled.dtype).eps ** 0.5 * float(residual.abs().max()):
        raise UnsupportedUseError(
            f"PCHMP is defined where functions are linear or act on each entry by itself, and {name_of(upper.node)} "
            f"{list(pulled.shape)} does neither. Ask for GGNMP or HMP."
        )
    return residual.detach() if residual.any() else None


@contextmanager
def kept(device: str) -> Iterator[None]:
    """Passes through a graph that must still be there, unseen by contexts and autocast; errors say so if it is not."""
    try:
        with silence(), undisturbed(), torch.enable_grad(), unrounded(device):
            yield
    except RuntimeError as error:
        if "second time" in str(error):
            raise PackextError(
                "The graph that products with the curvature run through has been freed by a backward pass. Inside of "
                "the context loss.backward() keeps it; say retain_graph=True to torch.autograd.backward and to passes "
                "after it."
            ) from None
        kernel = re.search(r"derivative for (\S+) is not implemented", str(error))
        if kernel is None:
            raise
        if "loss" in kernel[1]:
            raise UnsupportedUseError(
                f"Products with the curvature differentiate a gradient, and torch has no derivative of {kernel[1]}. "
                "Use a loss that torch differentiates twice, or DiagEF, which squares gradients."
            ) from None
        instead = "Use functions that torch differentiates twice"
        if "attention" in kernel[1]:
            instead = (
                "Run the forward pass inside of `with torch.nn.attention.sdpa_kernel("
                'torch.nn.attention.SDPBackend.MATH):` (Hugging Face: attn_implementation="eager")'
            )
        raise UnsupportedUseError(
            f"Products with the curvature differentiate a gradient, and torch has no derivative of {kernel[1]}. "
            f"{instead}, or ask for DiagGGNExact or DiagGGNMC, which do without."
        ) from None
