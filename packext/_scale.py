"""What an extended loss leaves in the graph: how it reduces, and what its curvature needs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils.weak import TensorWeakRef

from packext import _flight, _listening
from packext._errors import PackextError
from packext._layout import Layout, Scattered
from packext._places import gates_of, place, read_at
from packext._precision import as_now, unrounded
from packext._record import Inside, Record
from packext._refusals import note_loss, refuse_beside


def is_loss(module: nn.Module) -> bool:
    """Whether `module` is a loss: it has a reduction and no parameters."""
    reduction = module.__dict__.get("reduction") or getattr(type(module), "reduction", None)
    return isinstance(reduction, str) and next(module.parameters(), None) is None


#: Losses that a model may compute inside of its forward by a function, of one tensor that it made.
FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.l1_loss: nn.L1Loss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
    F.huber_loss: nn.HuberLoss,
    F.kl_div: nn.KLDivLoss,
    F.binary_cross_entropy: nn.BCELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.ctc_loss: nn.CTCLoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
    F.soft_margin_loss: nn.SoftMarginLoss,
    F.hinge_embedding_loss: nn.HingeEmbeddingLoss,
    F.multi_margin_loss: nn.MultiMarginLoss,
    F.multilabel_margin_loss: nn.MultiLabelMarginLoss,
    F.multilabel_soft_margin_loss: nn.MultiLabelSoftMarginLoss,
}


_signature = functools.cache(inspect.signature)


def _first(module: nn.Module) -> str:
    """Name of the first argument of its forward, behind `self`."""
    return next(iter(list(_signature(type(module).forward).parameters)[1:]), "input")


def called(func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[nn.Module, tuple[Any, ...]] | None:
    """The module that does what a call of a function in `FUNCTIONS` did, and what to call it with; None without one."""
    kind, given = FUNCTIONS[func], _signature(func).bind(*args, **kwargs).arguments
    data = list(given)[: len(_signature(kind.forward).parameters) - 1]  # what the module's forward takes comes first
    options = {k: v for k, v in given.items() if k not in data and v is not None}
    if not options.keys() <= _signature(kind).parameters.keys():
        return None
    return kind(**options), tuple([given[name] for name in data])


#: Entries of a loss's input up to which it is kept for curvature, even if no context asks for that (yet).
SMALL = 1 << 20


@dataclass
class Seen:
    """A call of an extended loss, as its curvature needs it.

    Attributes:
        module: the loss.
        edges: where gradients enter the graphs of the tensors in its input, as many as require grad.
        leaves: gives the leaves of its input (the model's output), detached; None if one is gone.
        spec: how the leaves are nested.
        args: the other positional arguments.
        kwargs: keyword arguments, without the input.
        record: gives the forward pass of the model that computed the loss itself.
        value: what the loss gave, detached.
        around: gives contexts in which autocast is as it was.
        input: the model's output with its graph, for derivatives of what is made of it; None if it is several tensors,
            or large and not asked for.
    """

    module: nn.Module
    edges: list[GradientEdge]
    leaves: Callable[[], list[Any] | None]
    spec: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    record: Callable[[], Record | None]
    value: Tensor
    around: Callable[[], AbstractContextManager[Any]]
    input: Tensor | None

    @property
    def name(self) -> str:
        """Class of the loss."""
        return type(self.module).__name__

    def fixed(self) -> Seen:
        """The same with a copy of the loss, which what is done to the loss later does not change.

        Returns:
            The copy.

        Raises:
            PackextError: if the loss is no more what was called, as far as its value tells.
        """
        module = copy.copy(self.module)
        own = module._buffers.items()  # which forward may write to
        module._buffers = {k: None if b is None else b.clone() for k, b in own}
        leaves, cuda = self.leaves(), [self.value.device] if self.value.is_cuda else []
        if leaves is not None and not self.value.is_meta:
            torchs = type(module).__module__.startswith("torch.nn.")  # others may write into what they are given
            inner = [(t.detach() if torchs else t.detach().clone()) if isinstance(t, Tensor) else t for t in leaves]
            with (
                torch.no_grad(),
                torch.random.fork_rng(cuda),
                _listening.silence(),
                unrounded(self.value.device.type),
                self.around(),
            ):
                again = module.forward(pytree.tree_unflatten(inner, self.spec), *self.args, **self.kwargs)
            if not isinstance(again, Tensor) or not _same(again, self.value):
                now = again.flatten()[:3].tolist() if isinstance(again, Tensor) else type(again).__name__
                raise PackextError(
                    f"The extended {self.name} gave {self.value.flatten()[:3].tolist()} when it was called, and gives "
                    f"{now} now: its curvature would be that of another loss. It draws random numbers, counts its "
                    "calls, has a hook that changes what it gives, or was changed since (a weight set anew for each "
                    "call: use a module for each)."
                )
        return dataclasses.replace(self, module=module)

    def uneven(self) -> str:
        """Why a sample changes what others add to the loss; nothing if it does not, or nothing is known."""
        instead = (
            ' Take reduction="sum"; the divisor of the step is expected_batch_size. (Models of Hugging Face compute '
            "that with num_items_in_batch=1 among their arguments.)"
        )
        if self.module.reduction in ("mean", "batchmean") and not self._as_many():
            return (
                f"{self.name} with reduction={self.module.reduction!r} divides by the number of rows that it is given, "
                "which is not the same for each sample, as where rows of the model's output are chosen (output[mask]): "
                f"a sample changes what others add.{instead}"
            )
        for part in self.module.modules():
            if not isinstance(part, (nn.CrossEntropyLoss, nn.NLLLoss)) or part.reduction != "mean":
                continue
            given = (*self.args, *self.kwargs.values()) if part is self.module else ()
            target = next((t for t in given if isinstance(t, Tensor)), None)
            if target is not None and target.is_floating_point():
                continue  # probabilities: the divisor is the number of samples
            name = type(part).__name__
            if part.weight is not None:
                return (
                    f"{name}(weight=...) with reduction='mean' divides by the weights of all samples' classes: a "
                    f"sample changes what others add.{instead}"
                )
            if target is not None and not self._alike(target != part.ignore_index):
                return (
                    f"{name} with reduction='mean' divides by the number of targets that are not ignored "
                    f"(ignore_index={part.ignore_index}), which is not known to be the same for each sample: a "
                    f"sample changes what others add.{instead}"
                )
        return ""

    def _alike(self, counts: Tensor) -> bool:
        """Whether all targets count, or as many of each sample."""
        if bool(counts.all()):
            return True
        if len(self.edges) != 1 or type(self.module).forward not in (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward):
            return False
        layout = next(self._places(), None)
        if type(layout) is not Layout or layout.axis in (None, 1):  # axis 1 of the input is that of the classes
            return False
        each = layout.at(layout.axis - (layout.axis > 1)).by_sample(counts).sum(1)
        return bool((each == each[0]).all())

    def _as_many(self) -> bool:
        """Whether each sample has as many entries as others in the input."""
        for layout in self._places():
            if isinstance(layout, Scattered):
                count = layout.owner.bincount(minlength=layout.n)
                if bool((count != count[0]).any()):
                    return False
        return True

    def _places(self) -> Iterator[Layout | None]:
        """Where samples are in each tensor of the input; None where that is not known."""
        record = self.record()
        for edge in self.edges:
            shape, dtype, device = _meta(edge)
            if record is None:
                gate = getattr(edge.node, "record", None)
                at = gate.batch_axis if isinstance(gate, Record) else 0
                if isinstance(gate, Record) and shape[at : at + 1] == (gate.n,):
                    yield Layout(at, gate.n)
                elif gates_of(edge):
                    like = torch.empty((), dtype=dtype, device=device).expand(shape)  # which takes no memory
                    yield place(self, edge, like)
                continue
            yield read_at(record, edge, shape)


def _meta(edge: GradientEdge) -> tuple[torch.Size, torch.dtype, torch.device]:
    node: Any = edge.node
    meta = node._input_metadata[edge.output_nr]
    return torch.Size(meta.shape), meta.dtype, meta.device


def _keeps(leaves: list[Any]) -> bool:
    """Whether they are kept for curvature: asked for, or small."""
    asked = any(context.curvature for context in _listening.here().hearing)
    return asked or sum(t.numel() for t in leaves if isinstance(t, Tensor)) <= SMALL


def _given(leaves: list[Any], keep: bool) -> Callable[[], list[Any] | None]:
    """A function that gives `leaves` again: detached, or, if they are not to be kept, as long as somebody else does."""
    if keep:
        kept = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in leaves]
        return lambda: kept
    here = [isinstance(t, Tensor) for t in leaves]
    refs = [TensorWeakRef(t) if isinstance(t, Tensor) else (lambda t=t: t) for t in leaves]

    def again() -> list[Any] | None:
        found = [ref() for ref in refs]
        return None if any(f is None for f, t in zip(found, here, strict=True) if t) else found

    return again


def _same(value: Tensor, other: Tensor) -> bool:
    """Whether a loss gave `other` before, but for rounding in another order of sums."""
    if value.shape != other.shape or value.dtype != other.dtype:
        return False
    if torch.equal(value, other):
        return True
    rounding = torch.finfo(other.dtype).eps ** 0.5
    size = float(other.abs().nan_to_num(0.0, 0.0, 0.0).max()) if other.numel() else 0.0
    return torch.allclose(value, other, rounding, rounding * size, equal_nan=True)


class LossMark(torch.autograd.Function):
    """Sits on the output of an extended loss: tells a backward pass how it reduces, and sends its curvature."""

    @staticmethod
    def mark(
        module: nn.Module, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], record: Record | None = None
    ) -> Tensor:
        """Put the mark on `output`; `record` is of the forward pass that goes on, if one does."""
        kwargs = dict(kwargs)
        x, *rest = args if args else (kwargs.pop(_first(module), None),)
        leaves, spec = pytree.tree_flatten(x)
        live = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        edges = [get_gradient_edge(t) for t in live]
        for t in live:
            _flight.may_retain(t)
        keep = _keeps(leaves)
        seen = Seen(
            module, edges, _given(leaves, keep), spec, tuple(rest), kwargs,
            weakref.ref(record) if record else lambda: None, output.detach(), as_now(output.device.type),
            x if isinstance(x, Tensor) and keep else None,
        )  # fmt: skip
        marked = LossMark.apply(output, type(module).__name__, module.reduction, seen)
        if record is None:
            note_loss(marked.grad_fn, type(module).__name__)
        else:
            record.losses.append(
                Inside(weakref.ref(marked.grad_fn), edges, [(t.shape, t.dtype, t.device) for t in live])
            )
        return marked

    @staticmethod
    def forward(ctx: Any, loss: Tensor, name: str, reduction: str, seen: Seen) -> Tensor:
        ctx.name, ctx.reduction, ctx.seen = name, reduction, seen
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inside = ctx if ctx.seen.record() is not None else None
        flight = _flight.loss_seen(ctx.name, ctx.reduction, grads[0], inside, ctx.seen.uneven)
        if flight is not None:
            edge, record = GradientEdge(*ctx.next_functions[0]), ctx.seen.record()
            if record is not None:  # whose gate could not tell yet
                flight.check(record.n)
            elif flight.by_sample:
                refuse_beside(ctx.name, ctx.seen.edges, flight.wants)
            with _flight.undisturbed():
                flight.context._spread(flight, ctx.seen, edge, grads[0])
        return grads[0], None, None, None


def coupled(value: Tensor, why: str) -> Tensor:
    """Mark a loss, or a term of one, that couples the samples of a batch: a contrastive loss, a statistic of the batch.

    What a loss does beside the model's outputs is nothing that the probe can see. A backward pass that reaches a marked
    value inside of a `backpack` context is refused before any gradient is accumulated; outside, nothing changes.

    Args:
        value: the value, a scalar in most cases; mark the whole loss, so that nothing else is reached first.
        why: the error's message: what couples the samples, and what to do.

    Returns:
        The same tensor. The pass that is refused raises `CoupledSamplesError`.
    """
    if value.requires_grad:
        value.register_hook(functools.partial(_flight.refuse_coupled, why))
    return value
