"""packext: extensions named in a context around ``loss.backward()``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

import packext as px
from benchmarks.contenders.base import Contender, Maker, UnavailableError
from benchmarks.problems import Instance
from benchmarks.quantities import KRONECKER, SAMPLED, Results, Row

EXTENSIONS: dict[str, str] = {
    "grad_batch": "BatchGrad",
    "batch_l2": "BatchL2Grad",
    "sum_grad_squared": "SumGradSquared",
    "variance": "Variance",
    "grad_dot": "GradDot",
    "batch_dot": "BatchDotGrad",
    "clipped_grad": "ClippedGrad",
    "diag_ggn_mc": "DiagGGNMC",
    "diag_ggn_exact": "DiagGGNExact",
    "kfac": "KFAC",
    "kflr": "KFLR",
    "diag_h": "DiagHessian",
}


class Extended(Contender):
    """An extended model outside of any context."""

    def __init__(self, instance: Instance) -> None:
        """Extend a copy of the model and a loss."""
        super().__init__(px.extend(instance.copy_model()), instance)
        self.loss_fn = px.extend(nn.CrossEntropyLoss())


class InContext(Extended):
    """An extended model inside a context that asks for some quantities."""

    def __init__(self, instance: Instance, row: Row, extensions: list[Callable[[], Any]]) -> None:
        """Keep the quantities, and the extensions' makers."""
        super().__init__(instance)
        self.wanted = row.quantities
        self.extensions = extensions
        linear = [p for p, there in zip(self.model.parameters(), instance.linear, strict=True) if there]
        self.of = linear if row.linear else None

    def compute(self) -> None:
        """Run one pass inside the context."""
        with px.backpack(*(make() for make in self.extensions), parameters=self.of):
            self.loss_fn(self.model(self.inputs), self.targets).backward()

    def read(self) -> Results:
        """Return the results of a step that is watched: all estimates share their draws."""
        if set(self.wanted) & set(SAMPLED):
            (labels,) = self.watched_labels()
            self.drawn = dict.fromkeys(SAMPLED, labels)
        found = super().read()
        for quantity in set(KRONECKER) & set(found):  # a table has its diagonal factor first, as it is stored
            found[quantity] = [f[::-1] if f and len(f) > 1 and f[0].dim() == 1 else f for f in found[quantity]]
        return found


def variants(instance: Instance, row: Row) -> dict[str, Maker]:
    """Return the one way of doing a row's work."""
    if not hasattr(px, "backpack"):
        raise UnavailableError("not built")
    if row.key == "extended":
        return {"no context": lambda: Extended(instance)}
    makers: list[Callable[[], Any]] = []
    for quantity in row.quantities:
        extension = getattr(px, EXTENSIONS[quantity], None)
        if extension is None:
            raise UnavailableError("not built")
        options = {}
        if quantity == "clipped_grad":
            options["max_norm"] = instance.problem.max_norm
        makers.append(functools.partial(extension, **options))
    return {"extensions": lambda: InContext(instance, row, makers)}
