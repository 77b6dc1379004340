"""BackPACK: its own extensions where they exist, else torch code on its individual gradients.

Curvature that it cannot take through a model as it is written, it may through one that its converter traced. Its KFAC
has no rule for adaptive pooling: the same average by ``AvgPool2d`` takes that place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from backpack import backpack, extend
from backpack.core.derivatives.crossentropyloss import CrossEntropyLossDerivatives
from backpack.extensions import (
    KFAC,
    KFLR,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SumGradSquared,
    Variance,
)
from torch import Tensor, nn

from benchmarks.contenders.base import Contender, Maker
from benchmarks.problems import Instance
from benchmarks.quantities import EXACT, KRONECKER, SAMPLED, Results, Row, clip_factors, clipped_sums, reduce_rows

EXTENSIONS: dict[str, Callable[[], Any]] = {
    "grad_batch": BatchGrad,
    "batch_l2": BatchL2Grad,
    "sum_grad_squared": SumGradSquared,
    "variance": Variance,
    "diag_ggn_mc": DiagGGNMC,
    "diag_ggn_exact": DiagGGNExact,
    "kfac": KFAC,
    "kflr": KFLR,
    "diag_h": DiagHessian,
}


class Extended(Contender):
    """An extended model outside of any context."""

    def __init__(self, instance: Instance) -> None:
        """Extend a copy of the model; first-order extensions need no extended loss."""
        super().__init__(extend(instance.copy_model()), instance)

    def loss(self) -> Tensor:
        """Return the loss of the batch."""
        return self.loss_fn(self.model(self.inputs), self.targets)


class InContext(Extended):
    """BackPACK's own extensions, all in one pass."""

    def __init__(self, instance: Instance, extensions: list[Callable[[], Any]]) -> None:
        """Keep the extensions' makers."""
        super().__init__(instance)
        self.extensions = extensions

    def compute(self) -> None:
        """Run one pass inside the context."""
        loss = self.loss()
        with backpack(*(make() for make in self.extensions)):
            loss.backward()


class Curved(InContext):
    """Its own extensions with an extended loss; the columns that they sample are watched for the check."""

    pooled = True

    def __init__(self, instance: Instance, wanted: tuple[str, ...], *, converter: bool) -> None:
        """Extend a copy of the model and a loss.

        Args:
            instance: The problem.
            wanted: Names of the quantities, in the order of the extensions.
            converter: Whether the model is traced and rewritten first.
        """
        model = instance.copy_model()
        if set(wanted) & set(KRONECKER):
            fix_pools(model, instance.inputs)
        Contender.__init__(self, extend(model, use_converter=converter), instance)
        self.extensions = [EXTENSIONS[q] for q in wanted]
        self.loss_fn = extend(nn.CrossEntropyLoss())
        self.wanted = wanted

    def read(self) -> Results:
        """Return the results of a step that is watched: every extension draws for itself."""
        sampled = [q for q in self.wanted if q in SAMPLED]
        if not sampled:
            return super().read()
        seen: list[Tensor] = []
        original = CrossEntropyLossDerivatives.sqrt_hessian_sampled

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            seen.append(original(*args, **kwargs))
            return seen[-1]

        with mock.patch.object(CrossEntropyLossDerivatives, "sqrt_hessian_sampled", watched):
            self.step()
        self.drawn = {q: self.labels(s[0]) for q, s in zip(sampled, seen, strict=True)}
        return super().read()


def containers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are made of modules: BackPACK sees through those of its list, the rest is converted."""
    return [m for m in model.modules() if any(True for _ in m.children())]


def fix_pools(model: nn.Module, inputs: Tensor) -> None:
    """Replace averages over all positions by pools of the size that they meet."""
    sizes: dict[nn.Module, torch.Size] = {}
    pools = [m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d) and m.output_size == 1]
    hooks = [m.register_forward_pre_hook(lambda m, args: sizes.update({m: args[0].shape[2:]})) for m in pools]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    for name, module in list(model.named_modules()):
        if module in sizes:
            parent, _, leaf = name.rpartition(".")
            height, width = sizes[module]
            setattr(model.get_submodule(parent), leaf, nn.AvgPool2d((height, width)))


class ReducedPerLayer(Extended):
    """Individual gradients, reduced and dropped layer by layer in an extension hook."""

    def __init__(self, instance: Instance, quantities: tuple[str, ...]) -> None:
        """Keep what the individual gradients are reduced to."""
        super().__init__(instance)
        self.quantities = quantities

    def reduce(self, module: nn.Module) -> None:
        """Reduce the individual gradients of a module's own parameters."""
        for p in module.parameters(recurse=False):
            if hasattr(p, "grad_batch"):
                rows = p.grad_batch
                del p.grad_batch
                for name, value in reduce_rows(rows, self.quantities).items():
                    setattr(p, name, value)

    def compute(self) -> None:
        """Run one pass with the hook."""
        loss = self.loss()
        with backpack(BatchGrad(), extension_hook=self.reduce):
            loss.backward()


class ReducedAfterwards(ReducedPerLayer):
    """Individual gradients, reduced after the pass, when the gradient is at hand."""

    def compute(self) -> None:
        """Run one pass, then reduce."""
        loss = self.loss()
        with backpack(BatchGrad()):
            loss.backward()
        for p in self.parameters:
            if hasattr(p, "grad_batch"):
                rows = p.grad_batch
                del p.grad_batch
                for name, value in reduce_rows(rows, self.quantities, p.grad).items():
                    setattr(p, name, value)


class ClippedFromRows(Extended):
    """Clipped sum from the individual gradients of all parameters."""

    def compute(self) -> None:
        """Run one pass, then clip and sum."""
        loss = self.loss()
        with backpack(BatchGrad()):
            loss.backward()
        # a parameter that BackPACK leaves out has no individual gradient: report it as missing
        known = [p for p in self.parameters if hasattr(p, "grad_batch")]
        sums = clipped_sums([p.grad_batch for p in known], self.batch, self.max_norm)
        for p, clipped in zip(known, sums, strict=True):
            p.clipped_grad = clipped
            del p.grad_batch


class ClippedBySecondPass(Extended):
    """Norms in a first backward pass, the gradient of the reweighted loss in a second."""

    def compute(self) -> None:
        """Run the forward pass once and the backward pass twice."""
        losses = nn.functional.cross_entropy(self.model(self.inputs), self.targets, reduction="none")
        losses = losses.flatten(1).mean(1) if losses.dim() > 1 else losses
        with backpack(BatchL2Grad()):
            losses.mean().backward(retain_graph=True)
        known = [p for p in self.parameters if hasattr(p, "batch_l2")]
        factors = clip_factors([p.batch_l2 for p in known], self.batch, self.max_norm)
        clipped = torch.autograd.grad(factors @ losses / self.batch, known)
        for p, value in zip(known, clipped, strict=True):
            p.clipped_grad = value


def variants(instance: Instance, row: Row) -> dict[str, Maker]:
    """Return BackPACK's ways of doing a row's work."""
    wanted = row.quantities
    if row.key == "extended":
        return {"no context": lambda: Extended(instance)}
    if row.key == "clipped":
        return {
            "BatchGrad, then clip": lambda: ClippedFromRows(instance),
            "BatchL2Grad, second backward": lambda: ClippedBySecondPass(instance),
        }
    if set(wanted) & set(SAMPLED + EXACT):
        if set(map(type, containers(instance.model))) <= {nn.Sequential}:
            return {"extensions": lambda: Curved(instance, wanted, converter=False)}
        return {"extensions, converted model": lambda: Curved(instance, wanted, converter=True)}
    ways: dict[str, Maker] = {}
    if all(q in EXTENSIONS for q in wanted):
        makers = [EXTENSIONS[q] for q in wanted]
        ways["extensions"] = lambda: InContext(instance, makers)
    if row.key != "batch_grad":
        ways["BatchGrad, reduced per layer"] = lambda: ReducedPerLayer(instance, wanted)
    if {"variance", "grad_dot"} & set(wanted):
        ways["BatchGrad, reduced afterwards"] = lambda: ReducedAfterwards(instance, wanted)
    return ways
