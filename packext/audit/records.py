"""Per-sample table: whose gradient stands out, and membership: who can be told to have been trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

import packext as px
from packext.attacks import CanaryAudit, LiRA, Threat, epsilon_lower_bound, judge, membership_bound, signals
from packext.audit.case import Case, Clock, Train
from packext.audit.section import Interval, Section, chances

#: Samples of the table; members and others that membership is judged on, each; records that are named.
TABLE, JUDGED, WORST = 1024, 1500, 12


@dataclass
class Record:
    """A member whose gradient stands out.

    Attributes:
        index: in the members.
        label: where there is one for each sample.
        loss: of the sample.
        norm: of its gradient.
        leverage: how much of its gradient the other samples' do not span, between 0 and 1.
        share: norm of its own gradient over that of its batch's sum.
    """

    index: int
    label: int | None
    loss: float
    norm: float
    leverage: float
    share: float | None


@dataclass(kw_only=True)
class Records(Section):
    """Individual gradients, before any defence.

    Attributes:
        samples: that were looked at.
        batch: size of the batches of which `share` is a share.
        worst: records with the highest leverage.
        norm_quantiles: of the gradients' norms, at 0, 10, 50, 90, 99 and 100 %.
        share_quantiles: of the shares, at the same.
        dominating: share of the samples that make up more than half of the norm of their batch's gradient.
        suggested_clip: the median norm, which clips half of the samples (Andrew et al. 2021); None where it is below
            1 % of the 90 % quantile, as of a model that has learnt most samples: what the others tell would be gone.
        norms: of each sample in `indices`.
        leverages: the same.
        indices: in the members.
    """

    samples: int = 0
    batch: int = 0
    worst: list[Record] = field(default_factory=list)
    norm_quantiles: list[float] = field(default_factory=list)
    share_quantiles: list[float] = field(default_factory=list)
    dominating: float | None = None
    suggested_clip: float | None = None
    norms: list[float] = field(default_factory=list)
    leverages: list[float] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)


def records(case: Case, clock: Clock) -> Records:
    """Norm, leverage and share of individual gradients.

    Args:
        case: model, data and sharing.
        clock: of the section.

    Returns:
        The table.
    """
    found = Records(batch=case.sharing.behind)
    index = case.draw(0, min(TABLE, len(case.x)))
    with found.unless_refused("individual gradients"):
        model, wide = case.readable(evaluating=False)
        seen = signals(model, case.loss_fn, wide(case.x[index]), case.y[index])
        found.norms, found.leverages = seen.gradient_norm.tolist(), seen.leverage.tolist()
        found.indices, found.samples = index.tolist(), len(index)
        at = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.99, 1.0], dtype=torch.float64, device=index.device)
        found.norm_quantiles = seen.gradient_norm.quantile(at).tolist()
        found.suggested_clip = fitting_clip(seen.gradient_norm)
        ranked = seen.leverage.argsort(descending=True)[:WORST].tolist()
        drawn, shares = _shares(case, found, index, clock, ranked)
        if drawn.numel():
            found.share_quantiles = drawn.quantile(at).tolist()
            found.dominating = float((drawn > 0.5).double().mean())
        plain = case.y.dim() == 1 and not case.y.is_floating_point()
        for k in ranked:
            i = int(index[k])
            loss, norm, leverage = (float(v[k]) for v in (seen.loss, seen.gradient_norm, seen.leverage))
            found.worst.append(Record(i, int(case.y[i]) if plain else None, loss, norm, leverage, shares.get(k)))
        if case.images:
            found.arrays["worst"] = case.x[[r.index for r in found.worst]].cpu().float().numpy()
    return found


def fitting_clip(norms: Tensor) -> float | None:
    """The median norm, unless half of the samples have next to no gradient.

    Args:
        norms: of samples' gradients `[N]`, float64.

    Returns:
        None where it is below 1 % of the 90 % quantile.
    """
    median, large = norms.quantile(torch.tensor([0.5, 0.9]).to(norms)).tolist()
    return median if median > 0.01 * large else None


def _shares(
    case: Case, found: Records, index: Tensor, clock: Clock, ranked: list[int]
) -> tuple[Tensor, dict[int, float]]:
    """Samples' shares of the gradient of a batch of the real size: of whole batches, while there is time, and by place.

    Returns:
        Those of the batches, and those of the ranked samples, which stand out and would bias what is said of all.
    """
    n = found.batch
    if n == 1 or len(index) < n:
        many = f"the table has {len(index)} samples, and a batch {n}"
        found.absent["share of the batch gradient"] = "a batch of one sample is that sample" if n == 1 else many
        return torch.zeros(0), {}
    model, wide = case.readable(evaluating=False)
    made: dict[int, Tensor] = {}

    def batch(start: int) -> Tensor:
        if start not in made:
            part = index[start : start + n]
            made[start] = signals(model, case.loss_fn, wide(case.x[part]), case.y[part]).share
        return made[start]

    drawn: list[Tensor] = []
    while clock.go_on(len(drawn), len(index) // n):
        drawn.append(batch(len(drawn) * n))
    starts = {k: min(k // n * n, len(index) - n) for k in ranked}
    return torch.cat(drawn), {k: float(batch(start)[k - start]) for k, start in starts.items()}


@dataclass
class ScoreResult:
    """How well one score tells members from others.

    Attributes:
        score: its name.
        auc: area under the ROC curve.
        tpr_001: true positive rate at 0.1 % false positives, or None with fewer than 1000 others.
        tpr_01: at 1 %, or None with fewer than 100.
        advantage: the largest difference of true and false positive rate over all thresholds, either way.
    """

    score: str
    auc: Interval
    tpr_001: Interval | None
    tpr_01: Interval | None
    advantage: float


@dataclass(kw_only=True)
class Membership(Section):
    """Whether members can be told from others.

    Attributes:
        members: that were judged.
        others: that were judged.
        scores: of the attacks.
        bound: the largest advantage that any threshold on the loss reaches on these samples.
        bound_by_chance: what it is below in 95 % of the cases where there is nothing to tell.
        shadows: models of LiRA.
    """

    members: int = 0
    others: int = 0
    scores: list[ScoreResult] = field(default_factory=list)
    bound: float | None = None
    bound_by_chance: float | None = None
    shadows: int = 0


def membership(case: Case, clock: Clock, train: Train | None = None) -> Membership:
    """Judge all scores.

    Args:
        case: model, data and sharing.
        clock: of the section.
        train: trains a model as the audited one was, for LiRA's shadow models.

    Returns:
        Areas and rates, with intervals.
    """
    found = Membership()
    if case.held is None:
        found.absent["membership"] = "no data were held out: pass Data(members=..., heldout=...)"
        return found
    inside = case.draw(7, min(JUDGED, len(case.x)))
    generator = torch.Generator().manual_seed(case.seed)
    outside = torch.randperm(len(case.held[0]), generator=generator)[:JUDGED].to(inside.device)
    x, y = (torch.cat([a[inside], b[outside]]) for a, b in ((case.x, case.held[0]), (case.y, case.held[1])))
    n = found.members = len(inside)
    found.others = len(outside)
    threat = Threat(
        "the trained model", "the record in question and its label", "honest", "data held out of the same kind"
    )
    scores: dict[str, Tensor] = {}
    with found.unless_refused("loss, gradient norm, leverage"):
        model, wide = case.readable(evaluating=True)
        seen = signals(model, case.loss_fn, wide(x), y)
        scores = {"loss": -seen.loss, "gradient norm": -seen.gradient_norm, "leverage": -seen.leverage}
        found.threats = dict.fromkeys(scores, threat)
        found.bound = membership_bound(seen.loss[:n].cpu(), seen.loss[n:].cpu())
        found.bound_by_chance = min(1.0, 1.358 * math.sqrt((n + found.others) / (n * found.others)))
    if train is None:
        found.absent["LiRA"] = "it trains shadow models: pass train="
    else:
        with found.unless_refused("LiRA"):
            case.classes  # noqa: B018 - refuses what is no classifier
            scores["LiRA"] = _lira(case, found, train, x, y, clock)
            found.threats["LiRA"] = LiRA.threat
    for name, score in scores.items():
        with found.unless_refused(name):
            found.scores.append(_judged(found, name, score[:n].cpu(), score[n:].cpu()))
            fpr, tpr = roc(score[:n].cpu(), score[n:].cpu())
            found.arrays |= {f"{name}|fpr": fpr, f"{name}|tpr": tpr}
    for name, rate in (("0.1 %", 0.001), ("1 %", 0.01)):
        if rate * found.others < 1:
            found.absent[f"true positives at {name} false positives"] = (
                f"{found.others} others allow no false positive at that rate: {math.ceil(1 / rate)} are needed"
            )
    return found


def _lira(case: Case, found: Membership, train: Train, x: Tensor, y: Tensor, clock: Clock) -> Tensor:
    """LiRA with the shadow models that there is time for, by the first one's training."""
    target, wide = case.readable(evaluating=True)
    if wide(x).dtype != x.dtype:
        raise px.PackextError(f"confidences are compared in float32, and the model's inputs are {x.dtype}.")
    start = perf_counter()
    train(x[::2], y[::2])
    each = perf_counter() - start
    found.shadows = max(4, min(case.budget.shadows, int(clock.left / max(each, 1e-9))))
    return LiRA(found.shadows, case.seed)(target, train, x, y, lambda k: clock.tell((k + 1) / found.shadows))


def _judged(found: Membership, name: str, members: Tensor, others: Tensor) -> ScoreResult:
    """Area with its interval, and rates with theirs."""
    seen = judge(members, others)
    rates = {fpr: _rate(members, others, fpr, value) for fpr, value in seen.tpr.items()}
    advantage = membership_bound(members, others)
    return ScoreResult(name, Interval(seen.auc, *seen.interval), rates[0.001], rates[0.01], advantage)


def _rate(members: Tensor, others: Tensor, fpr: float, value: float | None, draws: int = 500) -> Interval | None:
    """A true positive rate with its interval, by bootstrap over members and others: the threshold is random as well."""
    if value is None:
        return None
    generator = torch.Generator().manual_seed(0)
    m, o = members.double(), others.double()
    allowed = math.floor(fpr * len(o))
    rates = []
    for _ in range(draws):
        drawn = o[torch.randint(len(o), (len(o),), generator=generator)]
        threshold = drawn.topk(allowed + 1).values[-1]
        rates.append(float((m[torch.randint(len(m), (len(m),), generator=generator)] > threshold).double().mean()))
    low, high = torch.tensor(rates, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    # No narrower than that of the hits alone, which is no point where all members are on one side, and that of the
    # threshold alone, which is nowhere among the others where too few of them are to lie beyond it.
    hits = Interval.share(round(value * len(m)), len(m))
    ranked, (fewest, most) = o.sort(descending=True).values, _beyond(len(o), fpr)
    least = float((m > ranked[fewest - 1]).double().mean()) if fewest else 0.0
    greatest = float((m > ranked[most]).double().mean())
    return Interval(value, min(low, hits.low, least), max(high, hits.high, greatest))


def _beyond(count: int, rate: float) -> tuple[int, int]:
    """How many of `count` pass what each passes with probability `rate`: fewer and more each in 2.5 % of the cases."""
    upto = chances(count, rate).cumsum(0)
    return int((upto < 0.025).sum()), int((upto < 0.975).sum())


def roc(members: Tensor, others: Tensor, points: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """The ROC curve of scores, higher for members.

    Args:
        members: scores `[M]`.
        others: scores `[K]`.
        points: at most.

    Returns:
        False and true positive rates, ascending, from (0, 0) to (1, 1).
    """
    m, o = members.double().sort().values, others.double().sort().values
    at = torch.cat([m, o]).unique()
    at = at[torch.linspace(0, len(at) - 1, min(points, len(at))).long()]
    rates = [1 - torch.searchsorted(side, at.flip(0), side="left") / len(side) for side in (o, m)]
    fpr, tpr = (torch.cat([torch.zeros(1), rate]).numpy() for rate in rates)
    return fpr, tpr


@dataclass(kw_only=True)
class Epsilon(Section):
    """The claimed epsilon next to what is measured.

    Attributes:
        claimed: or None.
        delta: of both.
        measured: lower bound on epsilon from one run with canaries, or None.
        confidence: of the bound.
        correct: guesses that were right.
        guesses: that were made.
        canaries: that there were.
        choices: among how many numbers of guesses this one was chosen, which the bound pays for.
    """

    claimed: float | None = None
    delta: float | None = None
    measured: float | None = None
    confidence: float = 0.95
    correct: int | None = None
    guesses: int | None = None
    canaries: int | None = None
    choices: int = 1


def epsilon(case: Case, clock: Clock) -> Epsilon:
    """Compare a claim with canaries.

    Args:
        case: model, data and sharing.
        clock: of the section.

    Returns:
        Claim and lower bound, where there are any.
    """
    s = case.sharing
    found = Epsilon(claimed=s.epsilon, delta=s.delta)
    if s.epsilon is None:
        found.absent["claimed epsilon"] = "no differential privacy is claimed: pass Sharing(epsilon=, delta=)"
    if s.canaries is None or s.delta is None:
        found.absent["measured epsilon"] = (
            "it takes a training run with canaries, each included with probability 1/2: pass Sharing(canaries=)"
        )
        return found
    with found.unless_refused("measured epsilon"):
        seen = s.canaries() if callable(s.canaries) else s.canaries
        found.threats["canaries"] = Threat(
            "what the training releases",
            "the canaries",
            "honest",
            "canaries included independently with probability 1/2",
        )
        if isinstance(seen, CanaryAudit):
            found.confidence, found.choices = seen.confidence, seen.choices
            seen = seen.correct, seen.guesses, seen.canaries
        found.correct, found.guesses, found.canaries = (int(v) for v in seen)
        found.measured = epsilon_lower_bound(
            found.correct, found.guesses, found.canaries, s.delta, found.confidence, found.choices
        )
    return found
