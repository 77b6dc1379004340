"""Kronecker factors by the definition, from calls of the modules with one sample each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from packext._lineage import disable
from packext.testing._curvature import columns
from packext.testing._samples import singles

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TABLES = (nn.Embedding, nn.EmbeddingBag)
#: Vectors of these stand for no linear map: B is the parameter's own block.
VECTORS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.PReLU,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


def _sides(module: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Inputs `[G, S, I]` of the linear map that a module is at each position, and how a gradient there splits."""
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]), lambda b: b.reshape(1, -1, y.shape[-1])
    if isinstance(module, nn.EmbeddingBag):  # each token that counts is a position
        counts = torch.ones_like(x, dtype=torch.bool) if module.padding_idx is None else x != module.padding_idx
        bag = torch.arange(len(y)).repeat_interleave(x.numel() // len(y)).to(x.device)[counts.flatten()]
        share = 1 / bag.bincount(minlength=len(y))[bag, None] if module.mode == "mean" else 1.0
        hot = F.one_hot(x[counts], module.num_embeddings).to(module.weight)
        return hot[None], lambda b: (b[bag] * share)[None]
    if isinstance(module, nn.Embedding):
        hot = F.one_hot(x.flatten(), module.num_embeddings).to(module.weight)
        if module.padding_idx is not None:
            hot[x.flatten() == module.padding_idx] = 0
        return hot[None], lambda b: b.reshape(1, -1, y.shape[-1])
    groups, inputs = module.groups, module.weight[0].numel()
    eye = torch.eye(inputs).to(module.weight).reshape(inputs, *module.weight.shape[1:])
    eye = eye.repeat(groups, *[1] * (module.weight.dim() - 1))
    split = lambda t: t.unflatten(1, (groups, -1)).flatten(3).movedim(2, 3).movedim(1, 0).flatten(1, 2)  # noqa: E731
    return split(module._conv_forward(x, eye, None)).detach(), split


#: Of a module: inputs `[G, S, I]`, and a gradient `[G, S, O]` for each column.
Call = tuple[Any, Tensor, list[Tensor]]


class Factors:
    """A and B of the linear layers, convolutions, embeddings and bags of them of a model.

    Attributes:
        modules: those of which they are defined, by the name of the weight, which belongs to these alone, and to no use
            outside of their calls; all samples have as many positions, but for those of bags.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        inputs: Any,
        targets: Any,
        batch_axis: int = 0,
        weights: Sequence[float] | None = None,
        fisher: str = "exact",
    ) -> None:
        """Run the model on each sample.

        Args:
            model: not extended; left as it is.
            loss_fn: `loss_fn(model(inputs), targets)`.
            inputs: as for `individual_gradients`.
            targets: as for `individual_gradients`.
            batch_axis: the axis of the samples in inputs and outputs.
            weights: factor of each sample's loss in the loss of the batch; 1 for each by default.
            fisher: "exact", with columns of the loss's Hessian, or "empirical", with the gradient of the sample's loss.
        """
        names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        every = [id(p) for m in model.modules() for p in m._parameters.values() if p is not None]
        held: dict[int, list[Any]] = {}
        for m in model.modules():
            if (
                type(m) in (*CONVOLUTIONS, nn.Linear, *TABLES)
                and (w := m._parameters.get("weight")) is not None
                and not getattr(m, "scale_grad_by_freq", False)
                and getattr(m, "mode", "sum") in ("sum", "mean")
                and any(p is not None and p.requires_grad for p in m._parameters.values())
            ):
                held.setdefault(id(w), []).append(m)
        self.modules = {names[w]: tuple(ms) for w, ms in held.items() if every.count(w) == len(ms)}
        #: Of each weight and sample its calls: module, inputs `[G, S, I]`, and a gradient `[G, S, O]` for each column.
        self.calls: dict[str, list[list[Call]]] = {name: [] for name in self.modules}
        self.n = 0
        seen: list[tuple[str, Any, Tensor, Tensor]] = []

        def hook(name: str, module: Any, args: Any, kwargs: Any, y: Tensor) -> Tensor:
            seen.append((name, module, [*args, *kwargs.values()][0].detach().clone(), y))
            return y.clone()  # what follows may write into it

        hooks = [
            m.register_forward_hook(functools.partial(hook, name), with_kwargs=True)
            for name, modules in self.modules.items()
            for m in modules
        ]
        try:
            with disable(), torch.enable_grad():
                for output, target, weight in singles(model, inputs, targets, batch_axis, weights):
                    calls = seen.copy()  # what is checkpointed runs again in each backward pass
                    self._add(calls, *_cotangents(loss_fn, output, target, weight, fisher))
                    seen.clear()
                    self.n += 1
        finally:
            for handle in hooks:
                handle.remove()
        for name, each in list(self.calls.items()):
            sizes = {sum(a.shape[1] for _, a, _ in calls) for calls in each}
            if (len(sizes) > 1 and not isinstance(self.modules[name][0], nn.EmbeddingBag)) or sizes == {0}:
                self._leave(name)

    def _leave(self, name: str) -> None:
        self.calls.pop(name, None)
        self.modules.pop(name, None)

    def _add(self, seen: list[tuple[str, Any, Tensor, Tensor]], output: Tensor, root: Tensor) -> None:
        """Keep one sample's factors, and leave out modules of whose parameters they do not make the gradient."""
        ours = {
            (name, id(p)): p
            for name, modules in self.modules.items()
            for m in modules
            for p in m._parameters.values()
            if p is not None and p.requires_grad
        }
        targets = [*(y for *_, y in seen), *ours.values()]
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        found = [torch.autograd.grad(output, targets, column, **options) for column in root] if targets else []
        each: dict[str, list[Call]] = {name: [] for name in self.modules}
        for k, (name, module, x, y) in enumerate(seen):
            if name in self.modules:
                a, split = _sides(module, x, y)
                each[name].append((module, a, [split(g[k]).detach() for g in found]))
        for k, ((name, _), p) in enumerate(ours.items(), len(seen)):
            if name in self.modules and not self._makes(p, each[name], [g[k] for g in found]):
                self._leave(name)
        for name in self.modules:
            self.calls[name].append(each[name])

    def _makes(self, p: Tensor, calls: list[Call], rows: list[Tensor]) -> bool:
        """Whether the factors make the rows of a parameter: it is not used elsewhere."""
        for v, row in enumerate(rows):
            made = torch.zeros_like(row).flatten()
            for module, a, each in calls:
                b = each[v]
                if p is not module.weight:
                    made += b.sum(1).flatten() if module.bias is p else 0.0
                else:
                    made += (a.mT @ b if isinstance(module, TABLES) else b.mT @ a).flatten()
            if not torch.allclose(made, row.flatten(), rtol=1e-6, atol=1e-9 * float(1 + row.detach().abs().max())):
                return False
        return True

    def _of(self, name: str, kind: Any) -> Iterator[list[Call]]:
        """Of each sample the calls of modules of a kind: tables, others, or one module."""
        for calls in self.calls[name]:
            if kind in ("IO", "OI"):
                yield [call for call in calls if isinstance(call[0], TABLES) == (kind == "IO")]
            else:
                yield [call for call in calls if call[0] is kind]

    def kinds(self, name: str) -> list[str]:
        """How a weight is stored in its uses: "IO" for those of a table, "OI"."""
        return [kind for kind in ("IO", "OI") if any(self._of(name, kind))]

    def inputs(self, name: str, approx: str, joint: bool, kind: str = "OI") -> Tensor:
        """A `[G, I, I]`, of a weight's name; with an input more, which is 1, if it is joint with the bias."""
        total: Any = 0
        terms = 0
        for calls in self._of(name, kind):
            a = torch.cat([a for _, a, _ in calls], 1)
            if joint:
                a = torch.cat([a, torch.ones_like(a[..., :1])], 2)
            a = a.mean(1, keepdim=True) if approx == "reduce" else a
            total, terms = total + a.mT @ a, terms + a.shape[1]
        return total / terms

    def outputs(self, name: str, approx: str, whole: bool = False, kind: Any = "OI") -> Tensor:
        """B `[G, O, O]`, of a weight's name; of all groups together `[1, G O, G O]` for a bias, `kind` its module."""
        total: Any = 0
        for calls in self._of(name, kind):
            for each in zip(*(cotangents for *_, cotangents in calls), strict=True):
                b = torch.cat(each, 1)
                b = b.movedim(0, 1).flatten(1)[None] if whole else b
                b = b.sum(1, keepdim=True) if approx == "reduce" else b
                total = total + b.mT @ b
        return total


def nearest(products: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The Kronecker product nearest to a sum of them, by the singular values of the rearranged matrix.

    Args:
        products: of dense factors `[n, n]` and `[m, m]`.

    Returns:
        Two factors of one norm.
    """
    left, right = products[0]
    rearranged = torch.stack([torch.outer(one.flatten(), other.flatten()) for one, other in products]).sum(0)
    u, s, v = torch.linalg.svd(rearranged, full_matrices=False)
    sign = s[0].sqrt() * u[:, 0].view(left.shape).trace().sign()
    return [sign * u[:, 0].view(left.shape), sign * v[0].view(right.shape)]


#: Functions in which a tensor meets another entry by entry, or stands beside it.
ENTRYWISE = frozenset({"add", "sub", "mul", "__radd__", "__rsub__", "rsub", "__rmul__", "cat", "stack"})


class _Meetings(TorchFunctionMode):
    """Names of parameters, by whether all functions that they meet others in are entry by entry, and of all entries."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.at = {p.untyped_storage().data_ptr(): name for name, p in parameters.items()}
        self.sizes = {name: p.numel() for name, p in parameters.items()}
        self.met: set[str] = set()
        self.otherwise: set[str] = set()

    def _names(self, values: Any) -> list[str | None]:
        leaves = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
        return [self.at.get(t.untyped_storage().data_ptr()) for t in leaves]

    def _partly(self, *values: Any) -> bool:
        leaves = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
        return any(
            t.numel() < self.sizes.get(name or "", 0) for t, name in zip(leaves, self._names(leaves), strict=True)
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = self._names((args, kwargs)), self._names(out)
        found = {name for name in given if name is not None}
        if found and made and not found & set(made):  # neither a question nor a view
            alone = len(found) == given.count(next(iter(found))) == 1 < len(given) and not self._partly(args, kwargs)
            (self.met if alone and func.__name__ in ENTRYWISE else self.otherwise).update(found)
        return out


def entrywise(parameters: Mapping[str, Tensor], run: Callable[[], Any]) -> frozenset[str]:
    """Which parameters meet data in sums and products entry by entry, and beside it in a tensor, and nowhere else.

    Args:
        parameters: by name.
        run: the forward pass.

    Returns:
        Their names; not those of parameters that others are made of first.
    """
    with _Meetings(parameters) as seen:
        run()
    return frozenset(seen.met - seen.otherwise)


def outputs_of_square(module: Any, x: Tensor, square: Tensor, whole: bool = False) -> Tensor:
    """B `[G, O, O]` of a module (`[1, G O, G O]` for a bias, `whole`), from a matrix at its output.

    Args:
        module: a linear layer or convolution.
        x: what one sample gives to it.
        square: `[D, D]`, of all entries of its output for one sample.
        whole: whether groups are to be seen as one.

    Returns:
        The blocks of each position, summed up.
    """
    with disable():
        y = module(x)
    _, split = _sides(module, x, y)
    values, vectors = torch.linalg.eigh(square)
    total: Any = 0
    for row in (vectors * values.clamp(min=0).sqrt()).T:
        b = split(row.reshape(y.shape))
        b = b.movedim(0, 1).flatten(1)[None] if whole else b
        total = total + b.mT @ b
    return total


def _cotangents(
    loss_fn: Callable[[Any, Any], Tensor], output: Any, target: Any, weight: float, fisher: str
) -> tuple[Tensor, Tensor]:
    """What is differentiated, and the cotangents of it that are taken back."""
    if fisher == "exact":
        return columns(loss_fn, output, target, weight)
    # The gradient of the sample's own loss, whose square counts with the weight that it has in the loss.
    loss = loss_fn(output, target) * weight**0.5
    return (loss if loss.requires_grad else loss.detach().requires_grad_())[None], torch.ones(1, 1).to(torch.float64)
