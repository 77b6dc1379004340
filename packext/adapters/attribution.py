"""Influence of training samples on others, from individual gradients under a random projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.adapters._shared import kept_grads


class Attributor:
    """Says which training samples a model's loss on other samples hangs on.

    Example:
        >>> model, loss_fn = px.extend(model.eval()), px.extend(nn.CrossEntropyLoss())
        >>> attributor = Attributor(model, lambda batch: loss_fn(model(batch[0]), batch[1])).fit(train_loader)
        >>> scores = attributor.scores(test_loader)  # [Q, N]
        >>> scores[0].topk(5).indices  # the five samples that lowered the loss of the first query the most

    With f the gradient of a sample's own loss under a projection P, of K entries, the influence of training sample i
    on query q is

        f_q^T (M + λ I)^-1 f_i      M = (1/N) sum over i of f_i f_i^T      λ = damping times the mean of M's diagonal

    To first order, -1/N of it is what the query's loss changes by when sample i gets twice its weight in training, with
    the empirical Fisher matrix in place of the Hessian (Koh & Liang 2017, arXiv:1703.04730, section 2.1), so positive
    scores are of samples that help. P is `ProjectedGrad`'s, one for each parameter from both sides (LoGra, Choe et al.
    2024, arXiv:2405.13954), and M has entries between parameters, too. With `scale=1.0` and the sum of a
    margin in place of the loss, it is TRAK's feature (Park et al. 2023, arXiv:2303.14186), without its factors
    for the margin. Inner products with P are those without in expectation; their variance falls with `dim`.

    Attributes:
        features: f of all training samples `[N, K]`, in their order, in float32 or better; None before `fit`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any], Tensor],
        dim: int | tuple[int, int] | None = 16,
        seed: int = 0,
        damping: float = 0.1,
        scale: str | float = "sample",
        parameters: Iterable[Tensor] | None = None,
    ) -> None:
        """Say what is to be attributed.

        Args:
            model: extended, in evaluation mode if it has dropout. Its `.grad` are left as they are.
            loss: runs the model on a batch of a loader and returns the scalar loss.
            dim: of the projection of each parameter, as for `px.ProjectedGrad`; None for whole gradients, which are
                exact and for small models.
            seed: of the projection.
            damping: λ over the mean of M's diagonal; positive.
            scale: as for `px.backpack`: "sample" for an extended loss, or a number that makes of the gradients those of
                the samples' own losses.
            parameters: of which gradients are looked at; all that require grad by default.

        Raises:
            ValueError: for a damping that is not positive, a scale of "loss", or a loss that is no function of a batch.
            NotExtendedError: if the model is not extended.
        """
        if not damping > 0:
            raise ValueError(f"damping must be positive, as M may be singular; got {damping}.")
        if scale == "loss":
            raise ValueError('scale must be "sample" or a number: batches of other sizes would have other weights.')
        if not callable(loss) or isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
            raise ValueError(
                f"loss must be a function of a batch that runs the model, got {type(loss).__name__}. With a loss "
                "module: lambda batch: loss_fn(model(batch[0]), batch[1])."
            )
        if not px.is_extended(model):
            raise px.NotExtendedError(f"The {type(model).__name__} is not extended: model = px.extend(model).")
        self.loss, self.damping, self.scale = loss, float(damping), scale
        self.quantity = px.BatchGrad() if dim is None else px.ProjectedGrad(dim, seed)
        self._all = list(model.parameters())
        if isinstance(parameters, Tensor):  # whose rows are no parameters
            parameters = [parameters]
        self.parameters = [p for p in (self._all if parameters is None else parameters) if p.requires_grad]
        self.features: Tensor | None = None
        self._factor: Tensor | None = None
        self._widths: dict[int, int] = {}

    def fit(self, loader: Iterable[Any]) -> Attributor:
        """Take the features of the training samples, and their second moment.

        Args:
            loader: of batches, as `loss` takes them.

        Returns:
            Itself.

        Raises:
            PackextError: if there are no batches, a gradient is not finite, or all gradients are zero.
        """
        features, self._widths = self._project(loader)
        moment = features.mT.double() @ features.double() / len(features)
        shift = self.damping * moment.diagonal().mean()
        moment.diagonal().add_(shift)
        factor, failed = torch.linalg.cholesky_ex(moment)
        if failed or not bool(shift > 0):
            raise px.PackextError(
                f"The second moment of {len(features)} gradients, {list(moment.shape)}, cannot be inverted: "
                f"{'all are zero' if not bool(shift > 0) else 'more damping is needed'}."
            )
        self.features, self._factor = features, factor
        return self

    def scores(self, queries: Iterable[Any]) -> Tensor:
        """Influence of each training sample on the loss of each query.

        Args:
            queries: batches, as `loss` takes them: a loader, or `[batch]`.

        Returns:
            `[Q, N]`, in the dtype of `features`.

        A PackextError refuses a call before `fit`, and gradients that are not finite.
        """
        features, factor = self._fitted()
        # Parameters that no training sample has reached count for nothing: f_i and the entries of M are 0 there.
        found, _ = self._project(queries, self._widths)
        return torch.cholesky_solve(found.mT.double(), factor).mT.to(features) @ features.mT

    def self_influence(self) -> Tensor:
        """Influence of each training sample on its own loss `[N]`: large for labels that are wrong.

        Returns:
            `[N]`, in the dtype of `features`, not negative.
        """
        features, factor = self._fitted()
        return torch.linalg.solve_triangular(factor, features.mT.double(), upper=False).square().sum(0).to(features)

    def _project(self, loader: Iterable[Any], widths: dict[int, int] | None = None) -> tuple[Tensor, dict[int, int]]:
        """Features of a loader's samples `[N, K]`, and how many of the entries each parameter has, by its index."""
        # Zeros where a batch does not reach a parameter. Without `widths`, all count that some batch reaches.
        parts: list[dict[int, Tensor]] = []
        for batch in loader:
            with kept_grads(self._all), self._context() as results, torch.enable_grad():
                loss = self.loss(batch)
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    what = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                    raise ValueError(f"loss(batch) must return one number, as a tensor with a graph, got {what}.")
                loss.backward()
            found = [(i, results[p]) for i, p in enumerate(self.parameters) if p in results]
            rows = {i: getattr(each, self.quantity.savefield).flatten(1) for i, each in found}
            parts.append({i: r.to(torch.promote_types(r.dtype, torch.float32)) for i, r in rows.items()})
            if not all(bool(r.isfinite().all()) for r in parts[-1].values()):
                raise px.PackextError(f"Gradients of batch {len(parts) - 1} are not finite.")
        if not parts:
            raise px.PackextError("The loader has no batches.")
        widths = widths or dict(sorted((i, r.shape[1]) for part in parts for i, r in part.items()))
        each = []
        for part in parts:
            like = next(iter(part.values()))
            zeros = {i: like.new_zeros(len(like), width) for i, width in widths.items() if i not in part}
            each.append(torch.cat([{**part, **zeros}[i] for i in widths], 1))
        return torch.cat(each), widths

    def _context(self) -> px.backpack:
        return px.backpack(self.quantity, scale=self.scale, parameters=self.parameters, attach=False, grad=False)

    def _fitted(self) -> tuple[Tensor, Tensor]:
        if self.features is None or self._factor is None:
            raise px.PackextError("The Attributor knows of no training samples: call fit(loader) first.")
        return self.features, self._factor
