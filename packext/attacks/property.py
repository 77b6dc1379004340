"""Does a batch hold samples with some property? Read off its gradient, by a classifier of gradients of mixtures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import packext as px
from packext.attacks._shared import Shared, Threat, share

#: Of half the squared coefficients of standardised features, beside the mean log loss: mixtures of few samples repeat
#: themselves, and with much less the classifier learns the samples.
PENALTY = 0.01


@dataclass(frozen=True)
class PropertyClassifier:
    """What tells from a shared gradient whether its batch holds the property; made by `PropertyInference`.

    Attributes:
        score: from features `[M, F]` to log odds `[M]`, higher for batches that hold the property.
        features: from what was shared to `[F]`.
    """

    score: Callable[[Tensor], Tensor]
    features: Callable[[Shared], Tensor]

    def __call__(self, *shared: Shared) -> Tensor:
        """Judge gradients.

        Args:
            *shared: by clients, of batches of the size that the attack was made for.

        Returns:
            Log odds `[M]`, float64: scores for `packext.attacks.judge`.
        """
        return self.score(torch.stack([self.features(one) for one in shared]))


@dataclass(frozen=True)
class PropertyInference:
    """Passive property inference: a logistic regression on gradients of batches.

    One backward pass gives the gradients of all samples that the attacker has, projected at random. The gradient of
    any batch of them is the mean of its samples', so that the training batches cost no further pass. That this mean is
    right is checked with one more gradient.

    - Formula: log odds `w·f + b` of the standardised features f of a batch's gradient, `f = mean of the projected g_n`,
      with w of the least mean log loss plus `0.01 / 2 |w|²`
    - Cost: `ProjectedGrad` of the attacker's samples, or `BatchGrad` without a projection, and one gradient of a batch
    - Source: Melis et al., S&P 2019
    - Refused: too few samples of either kind; losses that weight samples, and random models, whose batch's gradient is
      not the mean

    Args:
        batch: samples in the batches that are to be judged.
        present: of them, samples with the property in a batch that holds it; none in one that does not.
        mixtures: training batches of each of both kinds.
        dim: of the projection of each parameter's gradient (see `packext.ProjectedGrad`); None for whole gradients.
        seed: of batches and projection.
    """

    batch: int
    present: int = 1
    mixtures: int = 1000
    dim: int | None = 16
    seed: int = 0

    threat: ClassVar[Threat] = Threat(
        "one client's gradient of all parameters",
        "the model, the batch size, labelled samples with the property and without",
        "honest",
        "one local step; no dropout; samples like the client's",
    )
    """Who attacks, and what must hold."""

    def __post_init__(self) -> None:
        """Refuse numbers that make no batch."""
        if not 1 <= self.present <= self.batch or self.mixtures < 1:
            raise ValueError(
                f"need 1 <= present <= batch, got {self.present} and {self.batch}; and mixtures, got {self.mixtures}."
            )

    def __call__(self, model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, has: Tensor) -> PropertyClassifier:
        """Train the classifier.

        Args:
            model: with the parameters at which gradients are taken, in the client's mode; stays as it is.
            loss_fn: of the client, with `reduction` "mean" or "sum".
            x: the attacker's own samples `[N, ...]`.
            y: their labels `[N, ...]`.
            has: which have the property `[N]`, bool.

        Returns:
            The classifier.

        Raises:
            PackextError: if there are too few samples, or a batch's gradient is not the mean of its samples'.
            ImportError: if scikit-learn is not installed.
        """
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError:
            raise ImportError("PropertyInference needs scikit-learn: pip install 'packext[attacks]'.") from None
        if has.dtype != torch.bool or has.shape != (len(y),):
            raise px.PackextError(f"has must be bool [{len(y)}], got {has.dtype} {list(has.shape)}.")
        having, others = (v.nonzero()[:, 0].cpu() for v in (has, ~has))
        if len(having) < self.present or len(others) < self.batch:
            raise px.PackextError(
                f"Batches of {self.batch} need {self.present} samples with the property and {self.batch} without; "
                f"there are {len(having)} and {len(others)}."
            )
        quantity = px.BatchGrad() if self.dim is None else px.ProjectedGrad(self.dim, self.seed)
        rows, names = _rows(model, loss_fn, x, y, quantity)

        def features(shared: Shared) -> Tensor:
            missing = [name for name in names if name not in shared.gradient]
            if missing or shared.n != self.batch:
                what = f"without {missing}" if missing else f"of {shared.n} samples"
                raise px.PackextError(
                    f"The attack is on gradients of {self.batch} samples and {names}; got one {what}."
                )
            mean = shared.summed / shared.n
            return torch.cat([_project(quantity, k, shared.gradient[k].double()).flatten() * mean for k in names])

        generator = torch.Generator().manual_seed(self.seed)
        plain = _mixtures(rows, generator, self.mixtures, (others, self.batch))
        holding = _mixtures(rows, generator, self.mixtures, (having, self.present), (others, self.batch - self.present))
        some = torch.cat([having[: self.present], others[: self.batch - self.present]])
        found, mean = features(share(model, loss_fn, x[some], y[some])), rows[some].mean(0)
        if not (found - mean).norm() <= 1e-3 * mean.norm():
            raise px.PackextError(
                f"The gradient of {self.batch} samples is not the mean of their own (off by "
                f"{float((found - mean).norm() / mean.norm()):.1e}): the loss weights samples, or the model is random. "
                "Call model.eval(), and take a loss without class weights."
            )
        truth = torch.cat([torch.zeros(self.mixtures), torch.ones(self.mixtures)]).numpy()
        regression = LogisticRegression(C=1 / (2 * self.mixtures * PENALTY), max_iter=1000)
        fitted = make_pipeline(StandardScaler(), regression).fit(torch.cat([plain, holding]).numpy(), truth)
        return PropertyClassifier(lambda f: torch.from_numpy(fitted.decision_function(f.cpu().numpy())), features)


def _rows(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, quantity: Any) -> tuple[Tensor, list[str]]:
    """Individual gradients `[N, F]`, float64 on the CPU, and whose they are."""
    model, loss_fn = px.extend(copy.deepcopy(model)), px.extend(copy.deepcopy(loss_fn))
    with px.backpack(quantity, scale="sample", attach=False) as results:
        loss_fn(model(x), y).backward()
    names = list(results)
    rows = torch.cat([getattr(results[name], quantity.savefield).flatten(1).double() for name in names], 1).cpu()
    if not rows.isfinite().all():
        bad = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
        raise px.PackextError(f"The gradients of samples {bad[:10]} are not finite: nothing can be learnt of them.")
    return rows, names


def _project(quantity: Any, name: str, g: Tensor) -> Tensor:
    """A gradient as the quantity gives individual ones."""
    if isinstance(quantity, px.BatchGrad):
        return g.cpu()
    left, right = quantity.matrices(name, g.shape)
    return left @ g.cpu().reshape(left.shape[1], -1) @ (torch.ones(1, 1).to(left) if right is None else right.T)


def _mixtures(rows: Tensor, generator: torch.Generator, count: int, *parts: tuple[Tensor, int]) -> Tensor:
    """Mean gradients `[count, F]` of batches with so many samples of each pool, drawn without replacement."""
    picked = torch.zeros(count, len(rows), dtype=rows.dtype)
    for pool, k in parts:
        chosen = torch.rand(count, len(pool), generator=generator).topk(k, dim=1).indices
        picked.scatter_(1, pool[chosen], 1.0)
    return picked @ rows / sum(k for _, k in parts)
