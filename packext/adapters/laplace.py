"""A backend for laplace-torch: its curvature from packext's backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import packext as px
from packext.adapters._shared import kept_grads

try:
    from laplace.curvature import (  # pyright: ignore[reportMissingImports]
        CurvatureInterface,
        EFInterface,
        GGNInterface,
    )
    from laplace.utils import Kron  # pyright: ignore[reportMissingImports]
except ImportError:
    raise ImportError("laplace-torch is not installed: pip install 'packext[laplace]'.") from None


class _Kron(px.KFAC):
    """Kronecker factors of a batch that has `share` of the data: A is to be the mean over all of it, B the sum."""

    share = 1.0

    def land(self, held: Any, n: int, factor: float) -> Any:
        if len(held) > 1:
            raise px.UnsupportedUseError(
                f"laplace-torch adds up the Kronecker factors of batches, and those of the weight {held[0].shape} "
                "are not made so, which is used as it is and transposed (as a table tied to the last layer): choose "
                'hessian_structure="diag" or "full".'
            )
        (pair,) = held
        inputs = None if pair.inputs is None else pair.inputs * self.share
        return super().land([pair._replace(inputs=inputs)], n, factor)


class _Passes(CurvatureInterface):
    """What both backends have in common."""

    #: What KFAC calls the gradients that B is made of, and how many targets it draws where it does.
    fisher: str = "exact"
    num_samples = 1
    #: Of `factor`, in the curvature: squares of gradients have its square.
    power = 1
    lossfunc: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not px.is_extended(self.model):
            px.extend(self.model)
        px.extend(self.lossfunc)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nothing but the parameters asked for takes part, and their `.grad` stays as it is."""
        mine = {id(p) for p in self.params}
        moving = [p for p in self.model.parameters() if p.requires_grad]
        others = [p for p in moving if id(p) not in mine]
        with kept_grads(moving), torch.enable_grad():
            for p in others:
                p.requires_grad_(False)
            try:
                yield
            finally:
                for p in others:
                    p.requires_grad_(True)

    def _run(self, x: Any) -> Tensor:
        output = self.model(x.detach() if isinstance(x, Tensor) else x)
        if output.dim() != 2:
            raise px.UnsupportedUseError(
                f"{type(self).__name__} needs outputs [N, C] of {type(self.model).__name__}, got {list(output.shape)}."
            )
        return output

    def _pass(self, x: Any, y: Tensor, quantity: Any) -> tuple[Tensor, list[Any]]:
        """The loss, and a quantity of each parameter, None where the loss does not reach it."""
        with self._alone(), px.backpack(quantity, parameters=self.params, attach=False, grad=False) as results:
            loss = self.lossfunc(self._run(x), y)
            loss.backward()
        loss = loss.detach()
        if not bool(loss.isfinite()):
            raise px.PackextError(f"{type(self).__name__}: the loss of a batch is {float(loss)}.")
        found = [getattr(results[p], quantity.savefield) if p in results else None for p in self.params]
        return loss, found

    def _flat(self, found: list[Any], *rows: int) -> Tensor:
        """One vector of all parameters, or those of the subnetwork, for each of `rows`."""
        parts = [
            p.new_zeros(*rows, p.numel()) if f is None else f.reshape(*rows, p.numel())
            for p, f in zip(self.params, found, strict=True)
        ]
        flat = torch.cat(parts, -1)
        return flat if self.subnetwork_indices is None else flat[..., self.subnetwork_indices]

    def _jacobians(self, x: Any, pick: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Jacobians of the outputs `[N, S]` that `pick` chooses of `[N, C]`, and all outputs."""
        with self._alone():
            output = self._run(x)
            chosen, rows = pick(output).sum(0), []
            for k, value in enumerate(chosen):
                with px.backpack(px.BatchGrad(), parameters=self.params, attach=False, grad=False) as results:
                    value.backward(retain_graph=k < len(chosen) - 1)
                found = [results[p].grad_batch if p in results else None for p in self.params]
                rows.append(self._flat(found, len(output)))
        return torch.stack(rows, 1), output.detach()

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Jacobians of the outputs: one backward pass for each output, without a copy of the graph for each sample.

        Args:
            x: input of the model.
            enable_backprop: whether the result is to be differentiated; torch.func then computes it, as in the
                interface's own.

        Returns:
            Jacobians `[N, C, P]` and outputs `[N, C]`.
        """
        if enable_backprop:
            return super().jacobians(x, enable_backprop=True)
        return self._jacobians(x, lambda output: output)

    def selected_output_jacobians(
        self, x: Any, outputs: Tensor, enable_backprop: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Jacobians of some outputs of each sample.

        Args:
            x: input of the model.
            outputs: their indices `[N]` or `[N, S]`.
            enable_backprop: as for `jacobians`.

        Returns:
            Jacobians `[N, S, P]` and outputs `[N, C]`.
        """
        if enable_backprop:
            return super().selected_output_jacobians(x, outputs, enable_backprop=True)
        index = outputs[:, None] if outputs.dim() == 1 else outputs
        return self._jacobians(x, lambda output: output.gather(1, index.to(output.device)))

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the samples' losses, as `lossfunc` has them.

        Args:
            x: input of the model.
            y: targets.

        Returns:
            Gradients `[N, P]` and the loss.
        """
        loss, found = self._pass(x, y, px.BatchGrad())
        return self._flat(found, len(y)), loss

    def _diagonal(self) -> Any:
        raise NotImplementedError

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The diagonal.

        Args:
            x: input of the model.
            y: targets.
            **kwargs: not used.

        Returns:
            The loss, and `[P]`.
        """
        loss, found = self._pass(x, y, self._diagonal())
        return self.factor * loss, self.factor**self.power * self._flat(found)

    def kron(self, x: Any, y: Tensor, N: int, kfac_approx: str = "expand") -> tuple[Tensor, Kron]:
        """Kronecker factors.

        Args:
            x: input of the model.
            y: targets.
            N: samples of the whole data set.
            kfac_approx: "expand" or "reduce", as for `px.KFAC`.

        Returns:
            The loss, and a `Kron` with factors for each parameter.
        """
        quantity = _Kron(self.num_samples, kfac_approx, self.fisher)
        quantity.share = len(y) / N
        loss, found = self._pass(x, y, quantity)
        factors: list[Any] = [_factors(p, f) for p, f in zip(self.params, found, strict=True)]
        return self.factor * loss, Kron(factors) * self.factor**self.power


def _factors(p: Tensor, found: list[Tensor] | None) -> list[Tensor]:
    """A parameter's factors as laplace-torch adds them up: dense, in the order of the parameter's axes."""
    if found is None:
        sizes = [p.numel()] if p.dim() < 2 else [p.shape[0], p.shape[1:].numel()]
        return [p.new_zeros(size, size) for size in sizes]
    if any(f.dim() > 2 for f in found):
        raise px.UnsupportedUseError(
            f"laplace-torch has no Kronecker factors of groups, as the weight {list(p.shape)} of a grouped convolution "
            'or of experts has: choose hessian_structure="diag" or "full".'
        )
    return [(f.diag() if f.dim() == 1 else f).to(p.dtype) for f in found]


class PackextGGN(_Passes, GGNInterface):
    """Backend for the generalized Gauss-Newton matrix, exact or (`stochastic`) by drawn targets.

    Example:
        >>> la = Laplace(model, "classification", hessian_structure="kron", backend=PackextGGN)
        >>> la.fit(train_loader)

    Full, diagonal and Kronecker-factored ("expand" by default, `asdl_fisher_kwargs={"kfac_approx": "reduce"}`), of all
    parameters, a subnetwork or the last layer, from one forward and backward pass of each batch. The model is extended,
    and otherwise left as it was. The scale is that of laplace-torch: of -log p(y | f), summed over the data, where
    regression has unit variance; of the Kronecker factors B is summed and A averaged over the data.

    What packext refuses (BatchNorm in training mode, Kronecker factors of a position table) is an error, not a zero.
    """

    def __init__(self, *args: Any, stochastic: bool = False, num_samples: int = 1, **kwargs: Any) -> None:
        """Take what the interface takes.

        Args:
            *args: `model`, `likelihood` and others of laplace-torch's `CurvatureInterface`.
            stochastic: whether targets are drawn from the model's predictions, in place of the exact GGN.
            num_samples: how many for each sample.
            **kwargs: as `args`.
        """
        super().__init__(*args, stochastic=stochastic, num_samples=num_samples, **kwargs)
        self.fisher = "mc" if stochastic else "exact"

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The GGN.

        Args:
            x: input of the model.
            y: targets.
            **kwargs: not used.

        Returns:
            The loss, and `[P, P]`.
        """
        quantity = px.SqrtGGNMC(self.num_samples) if self.stochastic else px.SqrtGGNExact()
        loss, found = self._pass(x, y, quantity)
        columns = next(f.shape[0] for f in found if f is not None)
        root = self._flat(found, columns, len(y)).flatten(0, 1)
        return self.factor * loss, self.factor * root.mT @ root

    def _diagonal(self) -> Any:
        return px.DiagGGNMC(self.num_samples) if self.stochastic else px.DiagGGNExact()


class PackextEF(_Passes, EFInterface):
    """Backend for the empirical Fisher: of gradients of -log p(y | f) at the targets themselves.

    For regression, laplace-torch 0.3's other backends give twice as much: they scale squares of the gradients of
    `MSELoss`, which are twice those of -log p, by 1/2 and not by 1/4. Otherwise as `PackextGGN`.
    """

    fisher, power = "empirical", 2

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The sum of outer products of the gradients.

        Args:
            x: input of the model.
            y: targets.
            **kwargs: not used.

        Returns:
            The loss, and `[P, P]`.
        """
        rows, loss = self.gradients(x, y)
        return self.factor * loss, self.factor**2 * rows.mT @ rows

    def _diagonal(self) -> Any:
        return px.SumGradSquared()
