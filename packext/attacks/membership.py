"""Was this sample in the training data? Scores of samples, all from one backward pass, and how to judge scores."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import packext as px
from packext.attacks._shared import Threat


@dataclass(frozen=True)
class Signals:
    """What one backward pass tells of each of N samples.

    Attributes:
        loss: the sample's own `[N]`: that of the batch is their mean, or their sum, as the loss's `reduction` says.
        gradient_norm: of the sample's own gradient `[N]`.
        leverage: how much of the sample's gradient the others do not span, between 0 and 1 `[N]` (see `leverage`).
        share: of the batch's gradient norm that the sample's own would be `|g_n| / |sum g|` `[N]`.
    """

    loss: Tensor
    gradient_norm: Tensor
    leverage: Tensor
    share: Tensor


def signals(model: nn.Module, loss_fn: nn.Module, x: Any, y: Tensor, ridge: float = 1e-2) -> Signals:
    """Losses, gradient norms and leverages of samples, from one pass; the model stays as it is.

    - Formula: l_n, `|g_n|`, the diagonal of `K (K + r I)^-1` with K the inner products of all g_n and r the ridge times
      the mean of K's diagonal, and `|g_n| / |sum of all g_n|`
    - Cost: `BatchDotGrad` in one pass, and an inverse `[N, N]`
    - Source: the definitions; ridge leverage as a score of privacy after arXiv:2602.15919
    - Refused: losses or gradients that are not finite; models whose samples influence each other; losses of a user's
      own that are not the mean (sum) of what they are of each sample by itself

    Args:
        model: in the mode in which it is to be judged, mostly `eval`.
        loss_fn: with a `reduction` that says what it does, "mean" or "sum" of the samples' own losses.
        x: the samples `[N, ...]`.
        y: their labels `[N, ...]`.
        ridge: of the leverage, relative to the mean squared norm of gradients; above rounding (see `leverage`).

    Returns:
        A score `[N]` of each kind.

    Raises:
        PackextError: if a loss or a gradient is not finite, or the loss is not what its `reduction` says.
    """
    twin, extended = px.extend(copy.deepcopy(model)), px.extend(copy.deepcopy(loss_fn))
    with px.backpack(px.BatchDotGrad(), scale="sample", attach=False) as results:
        output = twin(x)
        value = extended(output, y).sum()
        value.backward()
    losses = _own_losses(loss_fn, output.detach(), y, float(value.detach()))
    gram = results.batch_dot.double()
    if not gram.isfinite().all() or not losses.isfinite().all():
        bad = (~(gram.diagonal().isfinite() & losses.isfinite())).nonzero().flatten().tolist()
        raise px.PackextError(f"Loss or gradient of samples {bad[:10]} is not finite: the batch tells nothing.")
    norms = gram.diagonal().clamp_min(0).sqrt()
    # Not by the sum of inner products, which is rounding where gradients all but cancel, as in a trained model.
    whole = torch.stack([p.grad.double().norm().to(gram) for p in twin.parameters() if p.grad is not None]).norm()
    whole = whole * (len(y) if loss_fn.reduction in ("mean", "batchmean") else 1)
    return Signals(losses, norms, leverage(results.batch_dot, ridge), norms / whole.clamp_min(1e-300))


def _own_losses(loss_fn: nn.Module, output: Tensor, y: Tensor, value: float) -> Tensor:
    """The losses `[N]`, float64, whose mean (or sum) is `value`, without setting what a user's loss may not read."""
    n, mean = len(y), loss_fn.reduction in ("mean", "batchmean")
    total = n * value if mean else value
    with torch.no_grad():
        if type(loss_fn) in (nn.CrossEntropyLoss, nn.NLLLoss):  # a mean over weights, and targets that are not ignored
            each = copy.deepcopy(loss_fn)
            setattr(each, "reduction", "none")  # noqa: B010 - torch declares attributes of modules as tensors
            rows = each(output, y).double().reshape(n, -1).sum(1)
            factor = total / rows.sum()
            return rows * factor if factor.isfinite() else rows
        try:
            rows = torch.stack([loss_fn(*one).double().sum() for one in zip(output.split(1), y.split(1), strict=True)])
        except Exception as error:  # whatever the user's loss says about its inputs
            raise px.PackextError(
                f"{type(loss_fn).__name__} does not run on one sample by itself, outputs {list(output[:1].shape)} and "
                f"labels {list(y[:1].shape)}: {type(error).__name__}: {error}"
            ) from error
    if (rows.sum() - total).abs() > (1e-4 + 4 * torch.finfo(output.dtype).eps) * rows.abs().sum():
        raise px.PackextError(
            f"The losses of {n} samples, each by itself, {'have the mean' if mean else 'add up to'} "
            f"{float(rows.sum()) / (n if mean else 1):.4g}, and {type(loss_fn).__name__} "
            f"(reduction={loss_fn.reduction!r}) gives {value:.4g} for all at once: what one sample's is, is not known. "
            "Use a loss that is what its reduction says, without weights that depend on the batch."
        )
    return rows


def leverage(gram: Tensor, ridge: float = 1e-2) -> Tensor:
    """Ridge leverage of individual gradients: the diagonal of `K (K + r I)^-1`.

    Without a ridge it is 1 for every sample as long as gradients are linearly independent, and says nothing.

    Args:
        gram: inner products of individual gradients `[N, N]`.
        ridge: relative to the mean of the diagonal; positive.

    Returns:
        `[N]`, between 0 and 1.

    Raises:
        ValueError: if the ridge is not positive, or drowns in the rounding of the inner products.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}: without one, all leverages of a batch are 1.")
    if ridge < (rounding := 4 * len(gram) * torch.finfo(gram.dtype).eps):
        raise ValueError(
            f"ridge {ridge:g} is less than the rounding of {len(gram)} samples' inner products in {gram.dtype} "
            f"({rounding:.1g}): take a larger one, or a model in float64."
        )
    k = gram.double()
    r = ridge * k.diagonal().mean().clamp_min(1e-300)
    inverse = torch.linalg.inv(k + r * torch.eye(len(k), dtype=k.dtype, device=k.device))
    return (1 - r * inverse.diagonal()).clamp(0, 1)


class Judged(NamedTuple):
    """How well scores tell members from others.

    Attributes:
        auc: area under the ROC curve; 0.5 for guessing.
        tpr: true positive rate at false positive rates of 0.1 % and 1 %; None where there are too few others to tell.
        interval: of the area, 95 %: by Bayesian bootstrap over samples with one more of each side at the end of what
            scores can be (Gaffke 2005, here for two samples). It holds for few samples, of which it is wide, whatever
            the two distributions of scores, and is no point where all members are on one side.
    """

    auc: float
    tpr: dict[float, float | None]
    interval: tuple[float, float]


def judge(
    members: Sequence[float] | Tensor, others: Sequence[float] | Tensor, draws: int = 500, seed: int = 0
) -> Judged:
    """Judge scores, of which higher ones are to say "member".

    Args:
        members: scores of samples that were trained on.
        others: scores of samples that were not.
        draws: of the bootstrap.
        seed: of it.

    Returns:
        Area under the ROC curve with its interval, and true positive rates.

    Raises:
        ValueError: if one of them is empty or holds NaN.
    """
    m, o = (torch.as_tensor(v, dtype=torch.float64).flatten().cpu() for v in (members, others))
    if _tell_nothing(m, o):
        raise ValueError(f"judge() needs scores without NaN of members and others, got {len(m)} and {len(o)}.")
    rates: dict[float, float | None] = {}
    for fpr in (0.001, 0.01):
        allowed = math.floor(fpr * len(o))
        # The threshold is a score of one of the others: with none allowed beyond it, it would be a matter of luck.
        rates[fpr] = float((m > o.sort(descending=True).values[allowed]).double().mean()) if allowed else None
    return Judged(float(_area(m, o)), rates, _area_interval(m, o, draws, torch.Generator().manual_seed(seed)))


def _tell_nothing(*scores: Tensor) -> bool:
    """Whether members or others have none, or NaN among them."""
    return any(not len(v) or bool(v.isnan().any()) for v in scores)


def _area_interval(members: Tensor, others: Tensor, draws: int, generator: torch.Generator) -> tuple[float, float]:
    """The interval of the area, see `Judged`."""
    ordered = others.sort().values
    below, upto = (torch.searchsorted(ordered, members, side=side) for side in ("left", "right"))
    areas = torch.empty(2, draws, dtype=torch.float64)
    for k in range(draws):
        mine, theirs = (_weights(len(scores), generator) for scores in (members, others))
        sums = torch.nn.functional.pad(theirs.cumsum(0), (1, 0))
        seen = float(mine @ (sums[below] + sums[upto])) / 2
        # All pairs with one of the two samples that were not seen are wrong, or right.
        areas[0, k], areas[1, k] = seen, seen + 1 - float(mine.sum() * theirs.sum())
    return max(0.0, float(areas[0].quantile(0.025))), min(1.0, float(areas[1].quantile(0.975)))


def _weights(n: int, generator: torch.Generator) -> Tensor:
    """Of n samples, which with that of one more sum to 1."""
    found = torch.empty(n + 1, dtype=torch.float64).exponential_(generator=generator)
    return found[:-1] / found.sum()


def _area(members: Tensor, others: Tensor) -> Tensor:
    """Share of the pairs in which the member has the higher score; ties count for one half."""
    ordered = others.sort().values
    below = torch.searchsorted(ordered, members, side="left")
    upto = torch.searchsorted(ordered, members, side="right")
    return (below + upto).double().mean() / (2 * len(others))


@dataclass(frozen=True)
class LiRA:
    """Likelihood ratio attack: the sample's confidence against that of shadow models.

    Each shadow model is trained on a random half of the samples. Those with and without a sample give two normal
    distributions of `φ = log(p / (1 - p))`, p being the probability of its label; the score is the log of their ratio
    at the target model's. Their means are the sample's own, each of both variances is one over all samples.

    - Formula: `log N(φ; μ_in, σ_in²) - log N(φ; μ_out, σ_out²)`
    - Cost: as many trainings as there are shadow models; no gradient
    - Source: Carlini et al., S&P 2022; one variance for all after its section VI-C
    - Refused: fewer than 4 shadow models; models whose probabilities make no finite score

    Args:
        shadows: how many models; a few dozen for a stable variance.
        seed: of the halves.
    """

    shadows: int = 16
    seed: int = 0

    threat: ClassVar[Threat] = Threat(
        "the target model's probabilities",
        "data like the training data, and how the model is trained",
        "honest",
        "a classifier; as many trainings as there are shadow models",
    )
    """Who attacks, and what must hold."""

    def __call__(
        self,
        target: nn.Module,
        train: Callable[[Tensor, Tensor], nn.Module],
        x: Tensor,
        y: Tensor,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Scores of samples, higher for members.

        Args:
            target: the model that is attacked, in `eval` mode.
            train: trains a model on inputs and labels, and returns it in `eval` mode.
            x: the samples to be judged, of which shadow models are trained on halves `[N, ...]`.
            y: their labels `[N]`.
            progress: called with the number of each shadow model that is done.

        Returns:
            `[N]`.

        Raises:
            ValueError: with fewer than 4 shadow models.
            PackextError: if scores are not finite: shadow models all give a sample the same probabilities, or none.
        """
        if self.shadows < 4:
            raise ValueError(f"LiRA needs models with and without each sample: 4 shadows or more, got {self.shadows}.")
        generator = torch.Generator().manual_seed(self.seed)
        n = len(y)
        # Halves come in complementary pairs, so that each sample is in half of the models.
        orders = [torch.randperm(n, generator=generator) for _ in range((self.shadows + 1) // 2)]
        halves = [half for order in orders for half in (order[: n // 2], order[n // 2 :])][: self.shadows]
        phi, inside = [], torch.zeros(self.shadows, n, dtype=torch.bool)
        for k, half in enumerate(halves):
            inside[k, half] = True
            phi.append(_confidence(train(x[half], y[half]), x, y))
            if progress is not None:
                progress(k)
        seen, own = torch.stack(phi), _confidence(target, x, y)
        ratio = torch.zeros(n, dtype=torch.float64)
        for member, sign in ((True, 1), (False, -1)):
            mask = (inside == member).double()
            mean = (seen * mask).sum(0) / mask.sum(0)
            # One variance over all samples: with few shadow models a sample's own is mostly noise (section VI-C there).
            variance = ((seen - mean).square() * mask).sum() / (mask.sum() - n).clamp_min(1)
            ratio += sign * (-0.5 * (own - mean).square() / variance - 0.5 * variance.log())
        if not ratio.isfinite().all():
            bad = (~ratio.isfinite()).nonzero().flatten().tolist()
            raise px.PackextError(
                f"LiRA's scores of samples {bad[:10]} are not finite: the target's or a shadow model's probabilities "
                "are not, or all shadow models give the same ones. train(x, y) must start from new weights each time."
            )
        return ratio


def _confidence(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`log(p / (1 - p))` of each label, without a model's probabilities running out of digits."""
    with torch.no_grad():
        logits = model(x).double().cpu()
    own = logits.gather(1, y[:, None].cpu())[:, 0]
    others = logits.scatter(1, y[:, None].cpu(), -math.inf).logsumexp(1)
    return own - others


def membership_bound(training: Sequence[float] | Tensor, test: Sequence[float] | Tensor) -> float:
    """The largest advantage that a threshold on these scores reaches, over all thresholds, either way.

    The Kolmogorov-Smirnov distance of members' scores and others': of losses, what generalisation costs at worst.

    - Formula: largest `|TPR - FPR|` over all thresholds
    - Cost: the scores are sorted
    - Source: the definition
    - Refused: no scores, and NaN among them

    Args:
        training: scores (such as losses) of members.
        test: scores of others.

    Returns:
        Between 0 and 1.

    Raises:
        ValueError: if one of them is empty or holds NaN.
    """
    m, o = (torch.as_tensor(v, dtype=torch.float64).flatten().sort().values for v in (training, test))
    if _tell_nothing(m, o):
        raise ValueError(
            f"membership_bound() needs scores without NaN of members and others, got {len(m)} and {len(o)}."
        )
    at = torch.cat([m, o])
    gap = torch.searchsorted(m, at, side="right") / len(m) - torch.searchsorted(o, at, side="right") / len(o)
    return float(gap.abs().max())


def epsilon_lower_bound(
    correct: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95, choices: int = 1
) -> float:
    """What epsilon is at least, from one run with canaries.

    Each canary was included with probability 1/2; the attacker said of some whether it was. That v = `correct` of
    r = `guesses` were right has at most the probability `1 - confidence` for every smaller epsilon.

    - Formula: least epsilon with `P[W >= v] + 2 m delta max over i of P[v > W >= v - i] / i` above `(1 - confidence) /
      choices`, W binomial of r draws with `1 / (1 + exp(-epsilon))`, m canaries, i from 1 to v
    - Cost: none
    - Source: Steinke, Nasr & Jagielski, NeurIPS 2023, Theorem 5.2
    - Refused: numbers that contradict each other

    Args:
        correct: guesses that were right.
        guesses: how many the attacker made.
        canaries: how many there were.
        delta: of the guarantee.
        confidence: of the bound.
        choices: among how many numbers of guesses this one was chosen after looking (Bonferroni's correction).

    Returns:
        The bound; 0 if nothing can be said.

    Raises:
        ValueError: if the numbers contradict each other.
        ImportError: if SciPy is not installed.
    """
    if not (0 <= correct <= guesses <= canaries and 0 <= delta < 1 and 0 < confidence < 1 and choices >= 1):
        raise ValueError(
            f"need 0 <= correct <= guesses <= canaries, got {correct}, {guesses}, {canaries}; delta {delta} and "
            f"confidence {confidence} between 0 and 1; choices {choices} at least 1."
        )
    try:
        from scipy.stats import binom
    except ImportError:
        raise ImportError("epsilon_lower_bound() needs SciPy: pip install 'packext[attacks]'.") from None
    level = (1 - confidence) / choices

    def probability(epsilon: float) -> float:
        q = 1 / (1 + math.exp(-epsilon))
        tail = float(binom.sf(correct - 1, guesses, q))
        if not delta or not correct:
            return tail
        i = np.arange(1, correct + 1)
        worst = float((binom.pmf(correct - i, guesses, q).cumsum() / i).max())
        return min(1.0, tail + 2 * canaries * delta * worst)

    if probability(0.0) > level:
        return 0.0
    low, high = 0.0, 1.0
    while probability(high) <= level and high < 64:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) <= level else (low, middle)
    return low
