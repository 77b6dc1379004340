"""How many labels of a batch the message gives away, next to guessing, and through secure aggregation."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import packext as px
from packext.attacks import (
    IDLG,
    ILRG,
    LLG,
    Head,
    LabelRule,
    LLGStar,
    SecureAggregationLabels,
    Shared,
    Yin,
    count_accuracy,
    guessed,
    identity,
)
from packext.audit.case import Case, Clock
from packext.audit.section import Interval, Section
from packext.audit.sharing import clip_of

#: Runs of the model that a rule may make for one message.
RUNS = 400


@dataclass
class RuleResult:
    """What one rule reads off messages.

    Attributes:
        rule: its name.
        accuracy: share of the labels that are counted, mean over draws.
        exact: share of the draws in which all counts are exact.
        over_guess: accuracy minus that of guessing on the same draws.
        draws: messages.
        chance: probability that the best of as many rules would be as far above guessing if none were better: how
            often it is with the signs of the draws' differences flipped at random.
    """

    rule: str
    accuracy: Interval
    exact: Interval
    over_guess: Interval
    draws: int
    chance: float = 1.0


@dataclass(kw_only=True)
class Labels(Section):
    """Label leakage.

    Attributes:
        samples: behind each message.
        classes: that the model tells apart.
        guess: accuracy of who guesses classes as often as the members have them.
        identity: accuracy of the counts from what no attacker knows, the batch's mean probabilities: the bound.
        rules: of the attackers.
        cohort: clients of the simulated round behind secure aggregation.
        capacity: clients that a malicious server can tell apart in one sum at most.
        clients_exact: share of the clients whose counts were all exact.
        rounds: that were simulated.
        doubt: the attacker's own: largest distance of a count from a whole number, median over clients.
    """

    samples: int = 0
    classes: int = 0
    guess: float | None = None
    identity: float | None = None
    rules: list[RuleResult] = field(default_factory=list)
    cohort: int = 0
    capacity: int | None = None
    clients_exact: Interval | None = None
    rounds: int = 0
    doubt: float | None = None


def labels(case: Case, clock: Clock) -> Labels:
    """Every rule on several batches, and a round behind secure aggregation.

    Args:
        case: model, data and sharing.
        clock: of the section.

    Returns:
        Accuracies with intervals.
    """
    found = Labels(samples=case.sharing.behind)
    with found.unless_refused("labels"):
        found.classes = case.classes
    if not found.classes:
        return found
    rules = rules_for(case, found.absent)
    scores: dict[str, dict[int, tuple[float, float]]] = {}
    bounds: list[float] = []
    guesses: list[float] = []
    made = 0
    while clock.go_on(made, case.budget.draws):
        index = case.draw(made, case.sharing.behind)
        x, y = case.x[index], case.y[index]
        with found.unless_refused("message"):
            message = case.as_gradient(case.message(x, y))
            guesses.append(guessed(y, found.classes, case.frequencies))
            for name, rule in rules.items():
                with found.unless_refused(name):
                    accuracy = count_accuracy(rule(case.model, message), y)
                    scores.setdefault(name, {})[made] = accuracy, guesses[-1]
                    found.threats[name] = rule.threat
            if scores:  # the identity is of the losses that rules read
                with found.unless_refused("identity"):
                    bounds.append(count_accuracy(_identity(case, message, x), y))
        made += 1
    above = torch.zeros(len(scores), made, dtype=torch.float64)
    for row, pairs in zip(above, scores.values(), strict=True):
        row[list(pairs)] = torch.tensor([a - g for a, g in pairs.values()], dtype=torch.float64)
    chances = by_chance(above).tolist() if scores else []
    for (name, pairs), chance in zip(scores.items(), chances, strict=True):
        accuracy = [a for a, _ in pairs.values()]
        exact = Interval.share(sum(a == 1 for a in accuracy), len(accuracy))
        over = Interval.mean([a - g for a, g in pairs.values()], -1.0, 1.0)
        found.rules.append(RuleResult(name, Interval.mean(accuracy), exact, over, len(pairs), chance))
    found.guess, found.identity = (sum(v) / len(v) if v else None for v in (guesses, bounds))
    _through_aggregation(case, found)
    return found


def by_chance(above: Tensor) -> Tensor:
    """How often the best of several rules is as far above guessing with signs flipped as each of them is without.

    Args:
        above: what rules count more than guessing does, by draw `[R, K]`.

    Returns:
        Probabilities `[R]`, corrected for the choice among the rules; at least one of two to the number of draws.
    """
    k = above.shape[1]
    if k <= 12:  # all of them
        signs = (torch.arange(2**k)[:, None] >> torch.arange(k)) % 2
    else:
        signs = torch.randint(2, (4096, k), generator=torch.Generator().manual_seed(0))
        signs[0] = 1  # as it was seen
    best = (2.0 * signs.to(above) - 1.0) @ above.T
    return (best.amax(1, keepdim=True) >= above.sum(1) - 1e-9).double().mean(0)


def rules_for(case: Case, absent: dict[str, str]) -> dict[str, LabelRule]:
    """The rules that fit a message; why others do not is noted.

    Args:
        case: model, data and sharing.
        absent: where reasons go.

    Returns:
        Rules by name.
    """
    n, c = case.sharing.behind, case.classes
    rules: dict[str, LabelRule] = {"LLG": LLG(), "iLRG": ILRG()}
    if n == 1:
        rules = {"iDLG": IDLG(), **rules}
    if n <= c:
        rules["Yin"] = Yin()
    if not case.continuous:
        absent["LLG*"] = f"it runs the model on noise, and inputs are {case.x.dtype}"
    elif c > RUNS:
        absent["LLG*"] = f"it would run the model on a batch of noise for each of {c} classes"
    else:
        rules["LLG*"] = LLGStar(tuple(case.x.shape[1:]), runs=max(1, min(5, RUNS // c)))
    return rules


def _identity(case: Case, message: Shared, x: Tensor) -> Tensor:
    """Counts from the message and the batch's own probabilities."""
    if case.sharing.local is not None:
        raise px.PackextError("probabilities change from one local step to the next.")
    if any(m.training for m in case.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)):
        raise px.PackextError("dropout draws other probabilities each time.")
    with torch.no_grad():
        outputs = [copy.deepcopy(case.model)(part) for part in case.by_client(x)]
        probabilities = torch.cat(outputs).double().softmax(1)
    return identity(probabilities, Head.of(case.model).bias_gradient(message)).round().long()


def _through_aggregation(case: Case, found: Labels) -> None:
    """A malicious server's round."""
    s, name = case.sharing, "labels by a fishing model"
    if not s.secure_aggregation and s.server == "honest":
        found.absent[name] = (
            "the server is said to be honest, and sees each message by itself; pass secure_aggregation=True and "
            'clients=, or server="malicious", to simulate it'
        )
        return
    if s.local is not None:
        found.absent[name] = "what is shared is an update of several local steps, for which the attack does not hold"
        return
    found.cohort = s.clients
    found.threats[name] = SecureAggregationLabels.threat
    clip = clip_of(s.defence)
    attack = SecureAggregationLabels(clip=clip, magnitude=100.0 if clip is None else 3.0)
    exact, doubt = [], []
    with found.unless_refused(name):
        found.capacity = attack.limit(case.model)
        plan = attack.plan(case.model, _example(case), found.cohort)
        for round_ in range(3):
            batches = [
                (case.x[i], case.y[i])
                for i in (case.draw(5000 + 1000 * round_ + k, s.held) for k in range(found.cohort))
            ]
            cohort = case.cohort(batches)
            counts, error = attack.counts(plan, cohort.round(plan.states), cohort.sizes, case.loss_fn)
            true = torch.stack([torch.bincount(y.cpu(), minlength=found.classes) for _, y in batches])
            exact.append(float((counts.cpu() == true).all(1).double().mean()))  # one system of equations for all
            doubt += error.tolist()
            found.rounds += 1
        found.clients_exact = Interval.mean(exact)
        found.doubt = float(torch.tensor(doubt).median())


def _example(case: Case) -> Tensor:
    """Inputs that the server has: auxiliary ones, or noise in the range of the clients'."""
    if case.auxiliary is not None and len(case.auxiliary) > 1:
        return case.auxiliary[:4]
    if not case.continuous:
        raise px.PackextError("the server runs the model on inputs of its own: pass auxiliary ones in Data.")
    low, high = case.bounds()
    generator = torch.Generator().manual_seed(0)
    return (low + (high - low) * torch.rand(4, *case.x.shape[1:], generator=generator)).to(case.x)
