"""curvlinops: its Kronecker factors ("expand"), in a pass of their own beside the gradient's."""

from __future__ import annotations

from curvlinops import FisherType, KFACLinearOperator
from torch import nn

from benchmarks.contenders.base import Contender, Maker
from benchmarks.problems import Instance
from benchmarks.quantities import Results, Row

FISHER = {("kfac",): FisherType.MC, ("kflr",): FisherType.TYPE2}


class Factors(Contender):
    """A plain step, then the factors of all layers that it knows."""

    def __init__(self, instance: Instance, quantity: str) -> None:
        """Copy the model.

        Args:
            instance: The problem.
            quantity: ``kfac`` or ``kflr``.
        """
        super().__init__(instance.copy_model(), instance)
        self.quantity = quantity
        known = [m for m in self.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        self.known = [p for m in known for p in m.parameters()]
        self.predictions = self.targets[0].numel()

    def compute(self) -> None:
        """Run both passes, and give each parameter its factors."""
        super().compute()
        operator = KFACLinearOperator(
            self.model,
            self.loss_fn,  # pyright: ignore[reportArgumentType]
            self.known,
            [(self.inputs, self.targets)],
            check_deterministic=False,
            fisher_type=FISHER[self.quantity,],
            num_per_example_loss_terms=self.predictions,
            num_data=self.batch,
        )
        operator.compute_kronecker_factors()
        state = operator.state_dict()
        for name, b in state["gradient_covariances"].items():
            layer = self.model.get_submodule(name)
            setattr(layer.weight, self.quantity, [b, state["input_covariances"][name]])
            if layer.bias is not None:
                setattr(layer.bias, self.quantity, [b])

    def read(self) -> Results:
        """Return the results of a step that is watched."""
        if self.quantity == "kfac":
            (self.drawn["kfac"],) = self.watched_labels()
        return super().read()


def variants(instance: Instance, row: Row) -> dict[str, Maker]:
    """Return its one way of doing a row's work."""
    if row.quantities not in FISHER:
        return {}
    return {"a pass of its own": lambda: Factors(instance, row.quantities[0])}
