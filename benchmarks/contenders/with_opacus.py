"""Opacus: hooks that leave individual gradients, and its fast gradient and ghost clipping."""

from __future__ import annotations

from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.layers import DPLSTM
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from benchmarks.contenders.base import Contender, Maker
from benchmarks.problems import Instance
from benchmarks.quantities import EXACT, SAMPLED, Results, Row, clipped_sums, reduce_rows


def opacus_model(instance: Instance) -> nn.Module:
    """Return a copy of the model with Opacus' own LSTM in place of torch's, which has no hooks."""
    model = instance.copy_model()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LSTM):
            twin = DPLSTM(module.input_size, module.hidden_size, batch_first=module.batch_first)
            twin.load_state_dict(module.state_dict())
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, twin.to(instance.inputs.device))
    return model


class HooksDisabled(Contender):
    """A wrapped model whose hooks are switched off."""

    def __init__(self, instance: Instance) -> None:
        """Wrap a copy of the model."""
        model = opacus_model(instance)
        super().__init__(model, instance)
        self.model = GradSampleModule(model)
        self.model.disable_hooks()


class Hooked(Contender):
    """Individual gradients by hooks, reduced after the pass by torch code.

    The wrapper is told that the loss is a sum, so that it leaves out a multiplication by N and its
    individual gradients carry the 1/N of the mean like everyone else's.
    """

    def __init__(self, instance: Instance, quantities: tuple[str, ...]) -> None:
        """Wrap a copy of the model."""
        model = opacus_model(instance)
        super().__init__(model, instance)
        self.model = GradSampleModule(model, loss_reduction="sum")
        self.quantities = quantities

    def clear(self) -> None:
        """Drop individual gradients too."""
        super().clear()
        for p in self.parameters:
            p.grad_sample = None

    def compute(self) -> None:
        """Run one pass, then reduce one parameter after the other."""
        super().compute()
        for p in self.parameters:
            rows, p.grad_sample = p.grad_sample, None
            if rows is None:
                continue  # left out by Opacus: reported as missing
            for name, value in reduce_rows(rows, self.quantities, p.grad).items():
                setattr(p, name, value)


class ClippedFromRows(Hooked):
    """Clipped sum from the individual gradients of all parameters."""

    def compute(self) -> None:
        """Run one pass, then clip and sum."""
        Contender.compute(self)
        rows = [p.grad_sample for p in self.parameters]
        sums = clipped_sums(rows, self.batch, self.max_norm)
        for p, clipped in zip(self.parameters, sums, strict=True):
            p.clipped_grad = clipped
            p.grad_sample = None


class Norms(Contender):
    """Norms per sample and parameter by ghost clipping's first pass."""

    def __init__(self, instance: Instance, *, ghost: bool) -> None:
        """Wrap a copy of the model.

        Args:
            instance: The problem.
            ghost: Whether dense and embedding layers use the formula that avoids their gradients.
        """
        model = opacus_model(instance)
        super().__init__(model, instance)
        self.model = GradSampleModuleFastGradientClipping(model, use_ghost_clipping=ghost, loss_reduction="sum")

    def compute(self) -> None:
        """Run one pass and square the norms."""
        super().compute()
        for p in self.parameters:
            p.batch_l2 = p._norm_sample.square()


class KeepsGradient:
    """Stands where Opacus expects an optimizer: sets the plain gradient aside, at no cost."""

    loss_reduction = "mean"

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        """Keep the parameters."""
        self.parameters = parameters
        self.gradients: list[Tensor | None] = []

    def zero_grad(self) -> None:
        """Take the gradient of the first backward pass away before the second."""
        self.gradients = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None


class Ghost(Contender):
    """Opacus' two-pass clipping as it stands."""

    def __init__(self, instance: Instance, *, ghost: bool) -> None:
        """Wrap a copy of the model and the loss."""
        model = opacus_model(instance)
        super().__init__(model, instance)
        self.model = GradSampleModuleFastGradientClipping(model, max_grad_norm=self.max_norm, use_ghost_clipping=ghost)
        self.optimizer = KeepsGradient(self.parameters)
        self.loss_fn = DPLossFastGradientClipping(self.model, self.optimizer, nn.CrossEntropyLoss(), "mean")

    def clear(self) -> None:
        """Drop the gradient that was set aside."""
        super().clear()
        self.optimizer.gradients = []

    def compute(self) -> None:
        """Run the forward pass once and the backward pass twice."""
        output = self.model(self.inputs)
        if output.dim() == 2:
            self.loss_fn(output, self.targets).backward()
            return
        n, classes, length = output.shape
        flat = output.transpose(1, 2).reshape(n * length, classes)
        self.loss_fn(flat, self.targets.flatten(), shape=(n, length, classes)).backward()

    def read(self) -> Results:
        """Return the clipped sum, which Opacus leaves in ``.grad``, and the plain gradient."""
        return {
            "clipped_grad": [p.grad for p in self.parameters],
            "grad": self.optimizer.gradients,
        }


def variants(instance: Instance, row: Row) -> dict[str, Maker]:
    """Return Opacus' ways of doing a row's work; it has no curvature."""
    if set(row.quantities) & set(SAMPLED + EXACT):
        return {}
    if row.key == "extended":
        return {"hooks disabled": lambda: HooksDisabled(instance)}
    if row.key == "clipped":
        return {
            "hooks, then clip": lambda: ClippedFromRows(instance, ()),
            "ghost clipping": lambda: Ghost(instance, ghost=True),
            "fast gradient clipping": lambda: Ghost(instance, ghost=False),
        }
    ways: dict[str, Maker] = {"hooks": lambda: Hooked(instance, row.quantities)}
    if row.key == "batch_l2":
        ways["ghost norms"] = lambda: Norms(instance, ghost=True)
        ways["fast gradient norms"] = lambda: Norms(instance, ghost=False)
    return ways
