"""Reconstruction: searches for inputs with the gradient that was shared, over seeds and restarts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import packext as px
from packext.attacks import (
    IDLG,
    DeepLeakage,
    InvertingGradients,
    Reconstruction,
    Shared,
    Threat,
    in_order,
    psnr,
)
from packext.audit.case import Case, Clock
from packext.audit.section import Interval, Section
from packext.audit.sharing import clip_of

#: Mean squared error below which an input counts as recovered: over the squared range of inputs (20 dB), and over what
#: the candidates' mean has. The range alone would let the mean pass for a reconstruction where outliers make it wide.
RECOVERED, NEARER = 1e-2, 0.1

#: Candidates among which a reconstruction is to be recognised, samples of a batch that are shown, and entries of them.
CANDIDATES, SHOWN, ENTRIES = 1000, 8, 200_000


@dataclass
class SearchResult:
    """One search at one batch size.

    Attributes:
        search: its name.
        samples: behind the message.
        seeds: batches and messages, each searched by itself.
        restarts: of each search.
        iterations: of each restart.
        recovered: share of the inputs with a mean squared error below 1 % of the squared range (20 dB), and a tenth of
            the error of the candidates' mean.
        identified: share of the reconstructions whose nearest candidate is the client's input; they come in the order
            of the inputs that fit them best, so that chance alone gives up to `samples / candidates`.
        candidates: that there were.
        mse: relative to the squared range of inputs, mean.
        mse_best: of all samples.
        mse_worst: of all samples.
        psnr: in dB, mean.
        psnr_best: of all samples: the attacker's best.
        psnr_worst: of all samples.
        labels: share of the labels found; None where they were taken as known.
        matched: searches that have found inputs with the gradient that was shared.
        objective: at the end, median: squared distance over the squared norm, or one minus the cosine; None where none
            is finite, as of a gradient of zero, of which who sees it guesses the mean of the candidates.
    """

    search: str
    samples: int
    seeds: int
    restarts: int
    iterations: int
    recovered: Interval
    identified: Interval
    candidates: int
    mse: float | None
    mse_best: float | None
    mse_worst: float | None
    psnr: float
    psnr_best: float
    psnr_worst: float
    labels: float | None
    matched: int
    objective: float | None


@dataclass
class TextResult:
    """One search for vectors in place of embeddings, at one batch size, and the tokens nearest to them.

    Attributes:
        search: its name.
        embedding: the layer whose output is searched for.
        samples: texts behind the message.
        seeds: batches and messages, each searched by itself.
        restarts: of each search.
        iterations: of each restart.
        tokens: share of a message's tokens that are found, each in its place; padding is known, and does not count.
            Texts come in the order that fits the clients' best.
        exact: share of the texts of which all tokens are.
        guess: share of the tokens that who sees no more than which occurred gets: the most frequent of these in each
            place, or, of several texts, tokens drawn by their frequency there, in the order that fits best.
        named: tokens among which the nearest is taken, mean over messages: those of which the embedding's gradient says
            that they occurred; of one that is not shared, or has a gradient in every row, the whole vocabulary.
        counted: tokens that there were to find, in all messages.
        labels: share of the labels found; None where they were taken as known.
        matched: searches that have found vectors with the gradient that was shared, the embedding's left out.
        objective: at the end, median: squared distance over the squared norm, or one minus the cosine; None where none
            is finite.
        true: tokens of the first texts, row after row.
        found: tokens that were found in their place.
    """

    search: str
    embedding: str
    samples: int
    seeds: int
    restarts: int
    iterations: int
    tokens: Interval
    exact: Interval
    guess: float
    named: float
    counted: int
    labels: float | None
    matched: int
    objective: float | None
    true: list[list[int]]
    found: list[list[int]]


@dataclass(kw_only=True)
class Inversion(Section):
    """What searches recover.

    Attributes:
        searches: at the real batch size, and of one sample by itself.
        texts: the same where inputs are tokens.
        words: of the tokens of `texts`, where `Data.decode` says them.
        planned: seeds of each search that the budget has.
        psnr_guess: in dB, of who knows no message and guesses the mean of all candidates, mean over them.
    """

    searches: list[SearchResult] = field(default_factory=list)
    texts: list[TextResult] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)
    planned: int = 0
    psnr_guess: float | None = None


@dataclass
class Attempt:
    """One search of one message, compared with the truth.

    Attributes:
        found: what the attacker got, in the order of the true samples.
        true: inputs.
        mse: of each sample, relative to the squared range.
        psnr: of each sample.
        labels: share found, or None.
        identified: samples whose nearest candidate is the truth.
        recovered: which samples are.
        result: of the search.
    """

    found: Tensor
    true: Tensor
    mse: Tensor
    psnr: Tensor
    labels: float | None
    identified: int
    recovered: Tensor
    result: Reconstruction


def inversion(case: Case, clock: Clock) -> Inversion:
    """Search for inputs: one sample by itself, and the real batch.

    Args:
        case: model, data and sharing.
        clock: of the section.

    Returns:
        Success over seeds, with whether searches have matched.
    """
    found = Inversion(planned=case.budget.seeds)
    with found.unless_refused("reconstruction"):
        searches = searches_for(case, found.absent, *case.bounds())
        found.psnr_guess = guess(case)

        def note(name: str, n: int, what: str, made: list[Attempt], attack: Any) -> None:
            found.searches.append(_summary(name, n, made, attack, case))
            found.threats[name] = threat_of(attack)
            found.arrays |= _pictures(case, what, made)

        at_both_sizes(case, clock, found, searches, attempt, note)
    return found


def at_both_sizes(
    case: Case,
    clock: Clock,
    found: Inversion,
    searches: dict[str, Any],
    one: Callable[..., Any],
    note: Callable[..., None],
) -> None:
    """Search of one sample by itself, and of the real batch, over seeds.

    Args:
        case: model, data and sharing.
        clock: of the section.
        found: where is noted what is refused.
        searches: attacks by name.
        one: makes an attempt, called as `attempt`.
        note: called with the name, the number of samples, both in words, the attempts, and the attack as it was made.
    """
    sizes = sorted({1, case.sharing.behind})
    jobs = [(name, n) for n in sizes for name in searches]
    for k, (name, n) in enumerate(jobs):
        part = Clock(clock.left / (len(jobs) - k), lambda done, k=k: clock.tell((k + done) / len(jobs)))
        what = f"{name}, {n} sample" + ("s" if n > 1 else "")
        with found.unless_refused(what):
            note(name, n, what, *_repeat(case, searches[name], n, part, one))
    clock.tell(1.0)


def searchable(case: Case) -> None:
    """Refuse inputs that no descent finds.

    Args:
        case: model, data and sharing.

    Raises:
        PackextError: for tokens and other whole numbers.
    """
    if not case.continuous:
        raise px.PackextError(
            f"inputs are {case.x.dtype}, which no descent finds. Vectors in place of embeddings are searched for in "
            "the audited message alone: make an audit with Sharing(defence=...) for each defence."
        )


def searches_for(
    case: Case, absent: dict[str, str], low: float | None = None, high: float | None = None
) -> dict[str, Any]:
    """Searches that fit what is shared.

    Args:
        case: model, data and sharing.
        absent: where reasons go why others do not.
        low: end of the range of what is searched for; that of the inputs by default.
        high: the other end.

    Returns:
        Attacks by name, as the budget has them.

    Raises:
        PackextError: if none fits.
    """
    b, local = case.budget, case.sharing.local
    if local is not None and case.sharing.secure_aggregation:
        raise px.PackextError("no search here unrolls the local steps of several clients whose sum alone is seen.")
    if low is None or high is None:
        low, high = case.bounds()
    if not high > low:
        raise px.PackextError("all inputs are the same number.")
    tv = 1e-4 if case.x.dim() == 4 else 0.0
    adam = InvertingGradients(10 * b.iterations, b.restarts, 0.1 * (high - low), tv, low, high, local, seed=case.seed)
    searches: dict[str, Any] = {"Inverting Gradients": adam}
    try:
        c = case.classes
    except px.PackextError as error:
        absent["Deep Leakage from Gradients"] = f"it searches for classes as well. {error}"
        return searches
    if local is not None:
        absent["Deep Leakage from Gradients"] = "it does not unroll local steps, which Inverting Gradients does"
        return searches
    deep = DeepLeakage(b.iterations, b.restarts, seed=case.seed)
    return {"Deep Leakage from Gradients": (deep, c), **searches}


def attempt(case: Case, attack: Any, message: Shared, x: Tensor, y: Tensor, mask: Any = None) -> Attempt:
    """Search once, and compare with the truth.

    Args:
        case: model, data and sharing.
        attack: `InvertingGradients`, or `DeepLeakage` with the number of classes, as `searches_for` gives them.
        message: what the attacker sees.
        x: the truth.
        y: its labels, which `InvertingGradients` is told.
        mask: entries that are matched, by parameter name; all by default.

    Returns:
        What was found.
    """
    low, high = case.bounds()
    true = x.to(case.precise()[1])
    guessed = candidates(case).to(true).mean(0)
    result = searched(case, attack, message, y, guessed.expand_as(true), mask=mask)
    inputs = torch.nan_to_num(result.inputs.detach(), nan=low).clamp(2 * low - high, 2 * high - low)
    order = in_order(inputs, true).to(inputs.device)
    inputs = inputs[order]
    mse, by_guess = ((v - true).square().reshape(len(x), -1).mean(1) / (high - low) ** 2 for v in (inputs, guessed))
    labels = float((result.labels[order] == y).double().mean()) if isinstance(attack, tuple) else None
    hits = _identified(case, inputs, true)
    recovered = mse < (NEARER * by_guess).clamp_max(RECOVERED)
    return Attempt(inputs, true, mse, psnr(inputs, true, high - low), labels, hits, recovered, result)


def searched(case: Case, attack: Any, message: Shared, y: Tensor, guessed: Tensor, **how: Any) -> Reconstruction:
    """Search once.

    Args:
        case: model, data and sharing.
        attack: as `searches_for` gives it.
        message: what the attacker sees.
        y: the true labels, which `InvertingGradients` is told.
        guessed: what is found where the message says nothing, in the shape of what is searched for.
        how: `mask` and `forward` of the attack.

    Returns:
        What was found, in the precision of the search.

    Raises:
        PackextError: if the message is of other samples than these.
    """
    if message.n != len(y):
        raise px.PackextError(
            f"{message.n} of {len(y)} samples are behind the message; which ones, no search here knows."
        )
    model, dtype = case.precise()
    gradient = {k: g.to(dtype) for k, g in message.gradient.items()}
    if not any(g.any() for g in gradient.values()):  # of a loss that is flat: who sees nothing guesses
        return Reconstruction(guessed, torch.full_like(y, -1), (math.nan,), False, 0)
    sent = replace(message, gradient=gradient, loss_fn=copy.deepcopy(message.loss_fn).to(dtype))
    shape = tuple(guessed.shape[1:])
    if not isinstance(attack, tuple):
        return attack(model, sent, shape, y.to(dtype) if y.is_floating_point() else y, **how)
    deep, classes = attack
    given: dict[str, Any] = {"classes": classes}
    if len(y) == 1:  # iDLG: the label first, which is exact for one sample, where the loss lets it be read
        with suppress(px.PackextError):
            given = {"labels": IDLG()(model, sent).argmax()[None].to(y.device)}
    return deep(model, sent, shape, **given, **how)


def _repeat(case: Case, attack: Any, n: int, clock: Clock, one: Callable[..., Any]) -> tuple[list[Any], Any]:
    """Attempts on several batches, with as many iterations as the time allows for a few of them."""
    attack = affordable(case, attack, n, clock.left / max(1, min(4, case.budget.seeds)), one)
    made: list[Any] = []
    while clock.go_on(len(made), case.budget.seeds):
        k = len(made)
        index = case.draw(100 + k, n)
        x, y = case.x[index], case.y[index]
        message = case.client(x, y) if n == 1 else case.message(x, y)
        begun = seeded(attack, case.seed + 1000 * k, clip_of(case.sharing.defence) if n == 1 else None)
        made.append(one(case, begun, message, x, y))
    return made, attack


def affordable(case: Case, attack: Any, n: int, seconds: float, one: Callable[..., Any] = attempt) -> Any:
    """The attack with fewer restarts and iterations, never under a fifth, if one search would take longer.

    Args:
        case: model, data and sharing.
        attack: as `searches_for` gives it.
        n: samples behind a message.
        seconds: for one search.
        one: makes an attempt, called as `attempt`.

    Returns:
        An attack of the same kind.
    """
    deep = isinstance(attack, tuple)
    bare = attack[0] if deep else attack
    trial = replace(bare, iterations=2 if deep else 10, restarts=1)
    index = case.draw(99, n)
    x, y = case.x[index], case.y[index]
    message = case.client(x, y) if n == 1 else case.message(x, y)
    start = perf_counter()
    one(case, (trial, attack[1]) if deep else trial, message, x, y)
    each = (perf_counter() - start) / trial.iterations
    most = max(1, int(seconds / each))
    restarts = max(1, min(bare.restarts, most // bare.iterations))
    iterations = min(bare.iterations, max(bare.iterations // 5, most // restarts))
    bare = replace(bare, iterations=iterations, restarts=restarts)
    return (bare, attack[1]) if deep else bare


def seeded(attack: Any, seed: int, clip: float | None) -> Any:
    """The attack from other random inputs, and who is not blind to clipping told to what the one sample is clipped."""
    if isinstance(attack, tuple):
        return replace(attack[0], seed=seed, clip=clip), attack[1]
    return replace(attack, seed=seed)


def threat_of(attack: Any) -> Threat:
    """Who makes an attack, as `searches_for` gives it."""
    return attack[0].threat if isinstance(attack, tuple) else attack.threat


def _identified(case: Case, inputs: Tensor, true: Tensor) -> int:
    """Reconstructions that are nearer to the truth than to any other candidate."""
    found, own, others = (t.reshape(len(t), -1) for t in (inputs, inputs - true, candidates(case).to(true)))
    apart = torch.cdist(found, others, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    return int((own.norm(dim=1) <= apart * (1 + 1e-9)).sum())


def candidates(case: Case) -> Tensor:
    """Inputs that an attacker may compare with: auxiliary ones, those held out, and members.

    Args:
        case: model, data and sharing.

    Returns:
        At most `CANDIDATES` of them.
    """
    parts = [case.auxiliary, case.held[0] if case.held else None, case.x]
    every = torch.cat([p for p in parts if p is not None])
    generator = torch.Generator().manual_seed(0)
    return every[torch.randperm(len(every), generator=generator)[:CANDIDATES].to(every.device)]


def guess(case: Case) -> float:
    """How near the mean of all candidates is to one of them: what can be had without any message.

    Args:
        case: model, data and sharing.

    Returns:
        Their mean PSNR, in dB.
    """
    every, (low, high) = candidates(case).double(), case.bounds()
    return float(psnr(every.mean(0).expand_as(every), every, high - low).mean())


def _summary(name: str, n: int, made: list[Attempt], attack: Any, case: Case) -> SearchResult:
    mse, ratio = torch.cat([a.mse for a in made]), torch.cat([a.psnr for a in made])
    words = [a.labels for a in made if a.labels is not None]
    bare = attack[0] if isinstance(attack, tuple) else attack
    return SearchResult(
        name,
        n,
        len(made),
        bare.restarts,
        bare.iterations,
        # Samples of one message are found together or not at all: messages are what there are several of.
        Interval.mean([float(a.recovered.double().mean()) for a in made]),
        Interval.mean([a.identified / len(a.mse) for a in made]),
        len(candidates(case)),
        float(mse.mean()),
        float(mse.min()),
        float(mse.max()),
        float(ratio.mean()),
        float(ratio.max()),
        float(ratio.min()),
        sum(words) / len(words) if words else None,
        sum(a.result.matched for a in made),
        final([a.result for a in made]),
    )


def final(made: list[Reconstruction]) -> float | None:
    """Median of what searches have reached.

    Args:
        made: their results.

    Returns:
        The objective; None where none is finite.
    """
    last = torch.tensor([one.objective[-1] for one in made], dtype=torch.float64).nanmedian()
    return float(last) if last.isfinite() else None


def _pictures(case: Case, what: str, made: list[Attempt]) -> dict[str, Any]:
    """Originals and reconstructions of the first seeds, for one sample, or of the first batch; with their PSNR."""
    if not case.images or not made:
        return {}
    few = max(1, min(SHOWN, ENTRIES // made[0].true[0].numel()))
    kept: dict[str, Callable[[Attempt], Tensor]] = {
        "true": lambda a: a.true,
        "found": lambda a: a.found,
        "psnr": lambda a: a.psnr,
    }
    low, high = case.bounds()
    arrays = {f"{what}|{key}": torch.cat([f(a) for a in made])[:few] for key, f in kept.items()}
    return {k: v.cpu().float().numpy() for k, v in arrays.items()} | {"range": torch.tensor([low, high]).numpy()}
