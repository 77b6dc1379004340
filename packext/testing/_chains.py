"""Curvature of chains of layers by the definition: dense matrices of each sample, taken back module by module."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from packext._lineage import disable
from packext.testing._curvature import columns
from packext.testing._samples import batch_size, singles


def layers_of(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a chain: those of nested `nn.Sequential`s that have no parts.

    Args:
        model: the chain, or a part of it.
        path: of that part.

    Yields:
        Name and module.

    Raises:
        ValueError: for a model that is no such chain.
    """
    if not isinstance(model, nn.Sequential):
        if list(model.children()):
            raise ValueError(f"{path or 'the model'} is a {type(model).__name__}")
        yield path, model
        return
    for name, part in model.named_children():
        yield from layers_of(part, f"{path}.{name}" if path else name)


class Layers:
    """A chain of modules, each of one function at most, and the Hessian of the loss at the output of each.

    Attributes:
        modules: by name, in the order of the chain.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        inputs: Tensor,
        targets: Any,
        weights: Sequence[float],
    ) -> None:
        """Run each sample through the chain.

        Args:
            model: nested `nn.Sequential`s; left as it is.
            loss_fn: `loss_fn(model(inputs), targets)`.
            inputs: with the samples along axis 0.
            targets: as for `individual_gradients`.
            weights: factor of each sample's loss in the loss of the batch.
        """
        self.modules = dict(layers_of(model))
        self.n = batch_size(inputs)
        #: Of each sample: what each module takes, a root of the loss's Hessian `[D, D]`, the gradient at each output.
        self.inputs: list[list[Tensor]] = []
        self.roots: list[Tensor] = []
        self.slopes: list[list[Tensor]] = []

        def collect(x: Tensor) -> Tensor:
            at = [x]
            for module in self.modules.values():
                at.append(module(at[-1]))
            self.inputs.append(at[:-1])
            return at[-1]

        with disable(), torch.enable_grad():
            for output, target, weight in singles(collect, inputs, targets, 0, weights):
                self.roots.append(columns(loss_fn, output, target, weight)[1])
                at = [*self.inputs[-1][1:], output]
                slopes = torch.autograd.grad(loss_fn(output, target) * weight, at, materialize_grads=True)
                self.slopes.append([s.detach() for s in slopes])
                self.inputs[-1] = [t.detach() for t in self.inputs[-1]]

    def _jacobian(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with disable():
            found = torch.autograd.functional.jacobian(f, x)
        assert isinstance(found, Tensor)
        return found.reshape(-1, x.numel())

    @functools.cached_property
    def averaged(self) -> dict[str, Tensor]:
        """At each module's output `[D, D]`, averaged over the samples after each (Botev, Ritter & Barber, 2017)."""
        b = torch.stack([root.T @ root for root in self.roots]).sum(0)
        found: dict[str, Tensor] = {}
        for k, (name, module) in reversed(list(enumerate(self.modules.items()))):
            found[name] = b
            js = [self._jacobian(module, at[k]) for at in self.inputs]
            b = torch.stack([j.T @ b @ j for j in js]).mean(0)
        return found

    def positive(self, name: str, of: str, modify: Callable[[Tensor], Tensor]) -> Tensor:
        """The block `[p, p]` of a module's parameter, with residuals modified (Chen et al., 2018).

        Args:
            name: of the module.
            of: of its parameter.
            modify: of a function's second derivatives times the gradient, which are diagonal, what is to count.

        Returns:
            The sum over the samples of `Jᵀ H J`.
        """
        index = list(self.modules).index(name)
        total: Any = 0
        for at, root, slopes in zip(self.inputs, self.roots, self.slopes, strict=True):
            h = root.T @ root
            for k in reversed(range(index + 1, len(at))):
                module: Any = list(self.modules.values())[k]
                slope, j = slopes[k], self._jacobian(module, at[k])
                with disable():
                    second = torch.autograd.functional.hessian(
                        lambda x, module=module, slope=slope: (module(x) * slope).sum(), at[k]
                    )
                assert isinstance(second, Tensor)
                h = j.T @ h @ j + modify(second.reshape(at[k].numel(), -1).diagonal()).diag()
            own: Any = self.modules[name]
            x = at[index]
            parameter = getattr(own, of).detach()
            j = self._jacobian(lambda p, own=own, x=x: functional_call(own, {of: p}, (x,)), parameter)
            total = total + j.T @ h @ j
        return total
