"""The libraries: for each, the variants in which it can do the work of a row.

Every module here has a function ``variants(instance, row)`` that returns the fair ways of doing
that work with its library, by name. All are checked; the fastest correct one stands in the table.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from dataclasses import dataclass

from benchmarks.contenders.base import Contender, Maker, UnavailableError, replacing
from benchmarks.problems import Instance
from benchmarks.quantities import Row

__all__ = ["LIBRARIES", "REPLACED", "Contender", "Library", "Maker", "UnavailableError", "plain"]


REPLACED = ", results replaced"
"""What the name of a way ends with in which the last step's results stand until the next replaces them."""


@dataclass(frozen=True)
class Library:
    """A column of the table."""

    key: str
    title: str
    distribution: str
    package: str
    module: str

    @property
    def installed(self) -> bool:
        """Whether the library can be imported."""
        try:
            importlib.import_module(self.package)
        except ImportError:
            return False
        return True

    @property
    def version(self) -> str | None:
        """Version of the library, None where it is not installed."""
        if not self.installed:
            return None
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return getattr(importlib.import_module(self.package), "__version__", "unreleased")

    def variants(self, instance: Instance, row: Row) -> dict[str, Maker]:
        """Return the ways of doing a row's work, empty where the row has no meaning here.

        Where results are as large as N gradients, fresh memory costs more than the arithmetic: each way of filling it
        stands there twice, with the last step's results dropped first, and left to be replaced.
        """
        module = importlib.import_module(f"benchmarks.contenders.{self.module}")
        ways: dict[str, Maker] = module.variants(instance, row)
        if row.key == "batch_grad":
            ways |= {name + REPLACED: functools.partial(replacing, make) for name, make in ways.items()}
        return ways


LIBRARIES: dict[str, Library] = {
    library.key: library
    for library in (
        Library("packext", "packext", "packext", "packext", "with_packext"),
        Library("backpack", "BackPACK", "backpack-for-pytorch", "backpack", "with_backpack"),
        Library("opacus", "Opacus", "opacus", "opacus", "with_opacus"),
        Library("curvlinops", "curvlinops", "curvlinops-for-pytorch", "curvlinops", "with_curvlinops"),
        Library("func", "torch.func", "torch", "torch", "with_func"),
    )
}


def plain(instance: Instance) -> Contender:
    """Return the plain gradient, the unit of every figure."""
    return Contender(instance.copy_model(), instance)
