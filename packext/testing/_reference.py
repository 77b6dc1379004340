"""What the results of a model should be: the dense tensors of the definitions, each made when it is first asked for."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from packext._copies import Apart
from packext._errors import PackextError
from packext._extend import unextend
from packext._lineage import disable
from packext.testing import _curvature
from packext.testing._chains import Layers
from packext.testing._kronecker import Factors, entrywise
from packext.testing._report import relative_error
from packext.testing._samples import Rows, batch_size, call, double, gradients, individual_gradients, wanted

#: Entries of the largest tensor that an oracle of curvature makes: 128 MiB.
ENTRIES = 2**24


class NoOracle(ValueError):
    """What `check` cannot tell: the quantity has no definition here, or one that is too large to compute."""


class Reference:
    """A model, a loss and a batch in float64, and what the definitions say of them.

    Attributes:
        model: a copy, not extended; of parameters that are not asked for it requires no grad.
        parameters: those that are asked for, by name.
        n: samples.
        outputs: entries of the output of one sample.
        factor: from the loss as written to the samples' own losses: N for a mean, 1 for a sum.
        weights: factor of each sample's own loss in the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module,
        inputs: Any,
        targets: Any,
        batch_axis: int | None = 0,
        weights: Sequence[float] | None = None,
        parameters: Iterable[Tensor] | None = None,
    ) -> None:
        """Copy model and loss; parameters that are not the model's, or require no grad, are a `ValueError`.

        Args:
            model: left as it is.
            loss_fn: a loss module with reduction "mean" or "sum".
            inputs: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
            targets: what the loss takes beside the output.
            batch_axis: as for `extend`.
            weights: factor of each sample's loss in the loss of the batch; by the reduction if omitted.
            parameters: of the model, to look at; all that require grad by default.

        Raises:
            PackextError: if the model is random: the loop over samples would draw other numbers.
            NoOracle: without a batch axis, along which samples could be cut out of the inputs.
            TypeError: for a model or a loss that is no module.
            ValueError: for an empty batch, or inputs that are no tensors.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"check takes a model, an object of a class of nn.Module, got {model!r:.80}.")
        if not isinstance(loss_fn, nn.Module):
            raise TypeError(f"check takes a loss module, such as nn.CrossEntropyLoss(), got {loss_fn!r}.")
        if batch_axis is None:
            raise NoOracle(
                "check cuts samples out of the inputs, along their batch axis. Of a model with batch_axis=None compare "
                "BatchGrad with the gradients of a loop over samples of your own."
            )
        names = None if parameters is None else _names(model, parameters)
        self.whole = unextend(copy.deepcopy(model)).double()
        self.loss_fn = unextend(copy.deepcopy(loss_fn)).double()
        self.inputs, self.targets, self.batch_axis = double(inputs), double(targets), batch_axis
        self.model = copy.deepcopy(self.whole)
        for name, p in self.model.named_parameters():
            p.requires_grad_(p.requires_grad and (names is None or name in names))
        self.chosen = names
        self.parameters = wanted(self.model)
        self.entries = sum(p.numel() for p in self.parameters.values())
        self.n = batch_size(self.inputs, batch_axis)
        if not self.n:
            raise ValueError("check: the batch is empty, pass a few samples.")
        reduction = getattr(self.loss_fn, "reduction", "mean")
        if reduction not in ("mean", "batchmean", "sum"):
            raise NoOracle(f"check: {self.loss_fn} has reduction={reduction!r}. Pass one with 'mean' or 'sum'.")
        self.factor = 1.0 if reduction == "sum" else float(self.n)
        self.weights = [1 / self.factor] * self.n if weights is None else list(weights)
        self._factors: dict[str, Factors] = {}
        with torch.no_grad(), torch.random.fork_rng(), Apart(model, "check"):
            before = torch.get_rng_state()
            output = call(copy.deepcopy(self.model), self.inputs)
            if not torch.equal(before, torch.get_rng_state()):
                raise PackextError("check: the model draws random numbers (dropout?). Call model.eval() first.")
        leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
        self.outputs = sum(t.numel() for t in leaves) // max(1, self.n)

    def limit(self, entries: int, what: str) -> None:
        """Raise a `NoOracle` for a tensor that is too large."""
        if entries > ENTRIES:
            raise NoOracle(
                f"check: {what} has {entries:,} entries, for {self.n} samples of {self.outputs} outputs and "
                f"{self.entries} parameters; it makes no more than {ENTRIES:,}. Take fewer samples, smaller inputs, or "
                "parameters=[...] of a part of the model."
            )

    @property
    def _batch(self) -> tuple[nn.Module, nn.Module, Any, Any]:
        return self.model, self.loss_fn, self.inputs, self.targets

    @property
    def _samples(self) -> tuple[nn.Module, nn.Module, Any, Any, int, list[float]]:
        return *self._batch, self.batch_axis, self.weights

    @functools.cached_property
    def gradients(self) -> Rows:
        """Individual gradients `[N, *p]` of the loss as written."""
        return individual_gradients(*self._samples)

    @functools.cached_property
    def empirical(self) -> Rows:
        """Rows `[N, *p]` of a root of the empirical Fisher: those of `gradients`, N of each square for a mean."""
        return {name: rows * self.factor**0.5 for name, rows in self.gradients.items()}

    @functools.cached_property
    def roots(self) -> Rows:
        """Rows `[V, N, *p]` of a root of the GGN."""
        self.limit(self.outputs * self.n * self.entries, "the root of the GGN")
        return _curvature.curvature_rows(*self._samples)

    @functools.cached_property
    def ggn_root(self) -> Rows:
        """Rows `[V, *p]` of a root of the GGN, the batch taken as a whole."""
        size = self.outputs * self.n
        self.limit(size * max(size, self.entries), "the root of the GGN")
        return _curvature.ggn_root(*self._batch)

    @functools.cached_property
    def hessian_diagonals(self) -> Rows:
        """Shares `[N, *p]` of the Hessian's diagonal."""
        self.limit(self.entries**2, "the Hessian")
        return _curvature.hessian_diagonals(*self._samples)

    @functools.cached_property
    def hessian(self) -> Tensor:
        """Of all parameters `[P, P]`, the batch taken as a whole."""
        self.limit(self.entries**2, "the Hessian")
        return _curvature.hessian(*self._batch)

    def hessian_block(self, name: str) -> Tensor:
        """A parameter's own `[p, p]`."""
        sizes = {k: p.numel() for k, p in self.parameters.items()}
        start = sum(list(sizes.values())[: list(sizes).index(name)])
        own = slice(start, start + sizes[name])
        return self.hessian[own, own]

    def factors(self, fisher: str) -> Factors:
        """Kronecker factors of the modules that have some, "exact" or "empirical"."""
        if fisher not in self._factors:
            for p in self.parameters.values():
                self.limit(max(len(p), p.numel() // max(1, len(p))) ** 2 if p.dim() else 1, "a Kronecker factor")
            if fisher == "exact":
                self.limit(self.outputs * self.n * self.entries, "the root of the GGN")
            self._factors[fisher] = Factors(*self._samples, fisher)
        return self._factors[fisher]

    @functools.cached_property
    def layers(self) -> Layers:
        """Of a chain of modules."""
        if self.batch_axis or not isinstance(self.inputs, Tensor):
            raise NoOracle(_CHAIN.format("the input is no tensor with the samples along axis 0"))
        try:
            return Layers(*self._batch, self.weights)
        except ValueError as error:
            raise NoOracle(_CHAIN.format(error)) from None

    @functools.cached_property
    def entrywise(self) -> frozenset[str]:
        """Names of the parameters that meet data entry by entry."""
        with disable(), torch.no_grad():
            return entrywise(self.parameters, lambda: call(self.model, self.inputs))

    @functools.cached_property
    def plain(self) -> Rows:
        """Plain gradients of the batch's loss, of the parameters that it reaches."""
        with disable():
            loss = self.loss_fn(call(self.model, self.inputs), self.targets)
            found = gradients(loss, [*self.parameters.values()])
        return {name: g for name, g in zip(self.parameters, found, strict=True) if g is not None}

    @functools.cached_property
    def rounding(self) -> float:
        """How far the plain gradient of the batch is from the sum over the samples, relative to the largest value."""
        errors = [relative_error(g, self.gradients[name].sum(0)) for name, g in self.plain.items()]
        return max(errors, default=0.0)


_CHAIN = "check has definitions of KFRA and PCHMP for nested nn.Sequentials of modules that have no parts, and {}."


def _names(model: nn.Module, parameters: Iterable[Tensor]) -> list[str]:
    """Names of parameters, all of which the model has, and which require grad."""
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    known = {id(p): name for name, p in model.named_parameters()}
    names = []
    for p in parameters:
        if id(p) not in known or not p.requires_grad:
            what = f"{known[id(p)]}, which requires no grad" if id(p) in known else "a tensor that is none of the model"
            raise ValueError(f"check(parameters=...) got {what}: pass such as model.head.parameters().")
        names.append(known[id(p)])
    return names
