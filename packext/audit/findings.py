"""What the numbers mean, in plain words: each with its evidence and what to do, the most severe first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from textwrap import wrap
from typing import TYPE_CHECKING

from packext.audit.inversion import SearchResult, TextResult
from packext.audit.records import ScoreResult
from packext.audit.section import Interval
from packext.audit.sweep import Defended

if TYPE_CHECKING:
    from packext.audit._run import Audit

SEVERITIES = ("high", "medium", "low", "note")

#: A rule that is as far above guessing in no more of the cases where none is better has beaten it.
BY_CHANCE = 0.025


@dataclass(frozen=True)
class Finding:
    """One thing that an audit has found.

    Attributes:
        severity: "high", "medium", "low" or "note".
        section: of the report.
        title: what was found, in one sentence.
        evidence: the numbers.
        advice: what to do.
    """

    severity: str
    section: str
    title: str
    evidence: str
    advice: str

    def __str__(self) -> str:  # noqa: D105
        parts = (self.title, self.evidence, f"What to do: {self.advice}")
        return ("\n" + 8 * " ").join(line for part in parts for line in wrap(part, 100))


def findings(audit: Audit) -> list[Finding]:
    """Read them off the sections.

    Args:
        audit: all sections.

    Returns:
        Findings, the most severe first.
    """
    parts = (_integrity, _epsilon, _inversion, _texts, _closed, _aggregation, _labels, _membership, _records, _sweep)
    found = [finding for part in parts for finding in part(audit)]
    return sorted(found, key=lambda f: SEVERITIES.index(f.severity))


def _integrity(audit: Audit) -> Iterator[Finding]:
    s = audit.integrity
    if s.reasons:
        yield Finding(
            "high",
            "integrity",
            "The model that clients received bears the traces of a fishing model.",
            "; ".join(s.reasons).capitalize() + f" ({s.samples} members).",
            "Send nothing of this model. Compare its hash with that of other clients, and ask who changed it.",
        )


def _epsilon(audit: Audit) -> Iterator[Finding]:
    s = audit.epsilon
    if s.measured is not None and s.claimed is not None and s.measured > s.claimed:
        yield Finding(
            "high",
            "epsilon",
            "The training gives away more than is claimed: its differential privacy has a bug.",
            f"Epsilon is at least {s.measured:.2f} with {whole(s.confidence)} confidence ({s.correct} of {s.guesses} "
            f"guesses right, {s.canaries} canaries), and {s.claimed:g} is claimed at delta {s.delta:g}.",
            "Look at sampling, clipping and noise of the training before anything is released.",
        )
    elif s.claimed is None:
        yield Finding(
            "note",
            "epsilon",
            "Nothing guarantees anything: no differential privacy is claimed.",
            "What the attacks of this report do not reach, others may.",
            "If a guarantee is needed, train with clipping and noise, and have an accountant say epsilon.",
        )
    elif s.measured is not None:
        yield Finding(
            "note",
            "epsilon",
            "The measured epsilon does not contradict the claim.",
            f"At least {s.measured:.2f} ({whole(s.confidence)} confidence), {s.claimed:g} claimed.",
            "Nothing. A bound below the claim does not prove the claim.",
        )


def _closed(audit: Audit) -> Iterator[Finding]:
    s = audit.closed
    protect = "Larger batches mix more samples in a row; noise on clipped gradients hides single ones."
    for layer in s.layers:
        what = "the clients' inputs themselves" if layer.is_input else f"the {layer.features} features that it sees"
        some = "some of " if layer.divided is not None and layer.divided.value < 0.5 else ""
        level = "high" if layer.is_input else "medium"
        if layer.divided is not None and layer.divided.value > 0:
            yield Finding(
                level,
                "closed",
                f"Layer {layer.name!r} gives {some}{what} away without any search.",
                f"Rows of its weight's gradient over entries of its bias's are {percent(layer.divided)} of the "
                f"{layer.inputs} inputs behind a message, to 1 %.",
                protect,
            )
        elif layer.alone is not None and layer.alone.value > 0:
            yield Finding(
                "medium" if layer.is_input else "low",
                "closed",
                f"Of a message with one sample, layer {layer.name!r} gives {what} away.",
                f"Exact for {percent(layer.alone)} of them; for none of the {layer.inputs} inputs of a real one.",
                "Let no client send the gradient of a single sample (the last batch of an epoch is one often).",
            )
        if (
            layer.spanned is not None
            and layer.false_alarms is not None
            and layer.spanned.low > layer.false_alarms + 0.1
        ):
            yield Finding(
                "medium",
                "closed",
                f"Who has candidates can tell which were in the batch, by the span of {layer.name!r}.",
                f"{percent(layer.spanned)} of the batch's inputs lie in the span of the gradient's rows, and "
                f"{whole(layer.false_alarms)} of others (rank {layer.rank:.0f} of {layer.features}).",
                "Use batches with more samples than the layer has outputs or features.",
            )
    for e in s.embeddings:
        if e.false_alarms is not None and e.found.low > e.false_alarms:
            yield Finding(
                "high",
                "closed",
                f"The gradient of {e.name!r} names the tokens of a batch.",
                f"Its rows that are not zero are exactly the tokens that occurred, in {percent(e.found)} of the "
                f"messages (about {e.tokens:.0f} different ones of {e.vocabulary}), and those of other samples in "
                f"{whole(e.false_alarms)}.",
                "Freeze the embedding, or share nothing of it.",
            )


def _inversion(audit: Audit) -> Iterator[Finding]:
    s, behind = audit.inversion, audit.setting.behind
    guess = f", guessing the mean {s.psnr_guess:.1f}" if s.psnr_guess is not None else ""
    best: dict[int, SearchResult] = {}
    for r in s.searches:
        if r.samples not in best or (_told(r), _reached(r)) > (_told(best[r.samples]), _reached(best[r.samples])):
            best[r.samples] = r
    shown, alone = best.get(behind), best.get(1)
    if shown is not None and _told(shown):
        yield Finding(
            "high" if shown.recovered.value > 0 or shown.identified.value > 0.5 else "medium",
            "inversion",
            "Inputs can be reconstructed from what is shared." if shown.recovered.value > 0 else RECOGNISED,
            _evidence(shown, guess) + (f" {_evidence(alone)}" if alone not in (shown, None) else ""),
            "Look at the pictures. Larger batches, more local steps, noise on clipped gradients; see the sweep.",
        )
        return
    if alone is not None and behind > 1 and _told(alone):
        yield Finding(
            "medium",
            "inversion",
            "The gradient of a single sample gives its input away; that of a real batch was not inverted.",
            _evidence(alone, guess) + (" " + _evidence(shown) if shown is not None else ""),
            "Let no client send the gradient of a single sample. Larger batches were hidden from these searches alone.",
        )
        return
    if s.searches:
        matched = sum(r.matched for r in s.searches)
        tried = sum(r.seeds for r in s.searches)
        if matched:
            title = "Searches have matched the gradient with inputs that are not the clients'."
            advice = (
                "The gradient fits several inputs. A stronger prior, such as a generative model, may tell them apart."
            )
        else:
            title = "No search has inverted the gradient. That is no protection: none has matched it either."
            advice = "Do not take this for privacy. Try a larger budget (more restarts and iterations)."
        yield Finding(
            "note",
            "inversion",
            title,
            f"{matched} of {tried} searches have matched. {_evidence(shown or alone, guess)}",
            advice,
        )


def _texts(audit: Audit) -> Iterator[Finding]:
    s, behind = audit.inversion, audit.setting.behind
    best: dict[int, TextResult] = {}
    for r in sorted(s.texts, key=lambda r: r.tokens.value - r.guess):
        best[r.samples] = r
    shown, alone = best.get(behind), best.get(1)
    searches = len({r.search for r in s.texts})
    if shown is not None and _read(shown, searches):
        yield Finding(
            "high" if shown.exact.value > 0 or shown.tokens.value > 0.5 else "medium",
            "inversion",
            "Texts can be reconstructed from what is shared."
            if shown.exact.value > 0
            else "Tokens of texts can be put into their places from what is shared.",
            _spelled(shown) + (f" {_spelled(alone)}" if alone not in (shown, None) else ""),
            "Look at the texts. Larger batches, longer texts, noise on clipped gradients.",
        )
    elif alone is not None and _read(alone, searches):
        yield Finding(
            "medium",
            "inversion",
            "The gradient of a single text gives its tokens away; that of a real batch was not inverted.",
            _spelled(alone) + (f" {_spelled(shown)}" if shown is not None else ""),
            "Let no client send the gradient of a single text. Larger batches were hidden from these searches alone.",
        )
    elif s.texts:
        matched, tried = sum(r.matched for r in s.texts), sum(r.seeds for r in s.texts)
        evidence = f"{matched} of {tried} searches have matched. {_spelled(shown or alone)}"
        if matched:
            title = "Searches have matched the gradient, and place tokens no better than guessing does."
            advice = (
                "Where a model adds tokens up, every order of them fits, and a language model may tell which it was; "
                "which tokens occurred is with the closed forms."
            )
        else:
            title = "No search has inverted the gradient. That is no protection: none has matched it either."
            advice = "Do not take this for privacy. Try a larger budget (more restarts and iterations)."
        yield Finding("note", "inversion", title, evidence, advice)


def _read(r: TextResult, searches: int) -> bool:
    """Whether more tokens were found than by guessing, by the best of several searches."""
    return beyond(Interval.share(round(r.tokens.value * r.counted), r.counted), searches) > r.guess


def _spelled(r: TextResult | None) -> str:
    if r is None:
        return ""
    return (
        f"{r.search}, {r.samples} text{'s' * (r.samples > 1)}: {percent(r.tokens)} of the tokens in their place, "
        f"guessing {whole(r.guess)} (nearest among {r.named:.0f} tokens); {percent(r.exact)} of the texts without an "
        f"error; {r.matched} of {r.seeds} searches matched."
    )


RECOGNISED = "Reconstructions are blurred, and can be recognised among candidates all the same."


def _reached(r: SearchResult) -> float:
    return r.recovered.value + r.identified.value


def _told(r: SearchResult) -> bool:
    """Whether inputs were recovered, or recognised far more often than by chance."""
    made = r.samples * r.seeds  # by chance alone, each of them by itself
    recognised = Interval.share(round(r.identified.value * made), made)
    return r.recovered.value > 0 or recognised.low > max(10 / r.candidates, _at_most_by_chance(r))


def _at_most_by_chance(r: SearchResult) -> float:
    """Share that is recognised of reconstructions which know nothing, in the order that fits the inputs best."""
    return min(1.0, r.samples / r.candidates)  # of the nearest candidate to be one of the inputs, whichever


def _evidence(r: SearchResult | None, guess: str = "") -> str:
    if r is None:
        return ""
    return (
        f"{r.search}, {r.samples} sample{'s' * (r.samples > 1)}: {percent(r.recovered)} of the inputs recovered "
        f"(mean {r.psnr:.1f}{guess}, best {r.psnr_best:.1f} dB), {percent(r.identified)} recognised among "
        f"{r.candidates} candidates (by chance {odds(_at_most_by_chance(r))} at most); {r.matched} of {r.seeds} "
        "searches matched."
    )


def _aggregation(audit: Audit) -> Iterator[Finding]:
    s = audit.labels
    if s.clients_exact is None or s.clients_exact.value == 0:
        return
    malicious = audit.setting.sharing.get("server") == "malicious"
    yield Finding(
        "high" if malicious else "medium",
        "labels",
        "A server that changes one normalisation layer reads every client's labels"
        + (" through secure aggregation." if s.cohort > 1 else "."),
        f"All label counts exact for {percent(s.clients_exact)} of the clients in {s.rounds} simulated rounds of "
        f"{s.cohort}; more than {s.capacity} it cannot tell apart in one sum.",
        "Check received models (packext.defences.check_received), compare their hashes; clip and add noise.",
    )


def _labels(audit: Audit) -> Iterator[Finding]:
    s = audit.labels
    if not s.rules:
        return
    sure = [r for r in s.rules if r.chance <= BY_CHANCE]
    best = max(sure or s.rules, key=lambda r: r.over_guess.value)
    evidence = (
        f"{best.rule} counts {percent(best.accuracy)} of the labels of {s.samples} samples, guessing {whole(s.guess)} "
        f"({best.draws} message{'s' * (best.draws > 1)}; by chance, the best rule is as far above in "
        f"{odds(best.chance)}); all counts were exact in {percent(best.exact)}."
    )
    if sure:
        yield Finding(
            "high" if best.exact.low > 0.5 else "medium",
            "labels",
            "The labels of a batch can be counted from what is shared.",
            evidence,
            "Treat label counts as public, or do not share the last layer's gradient; noise on clipped gradients.",
        )
    else:
        few = 2.0**-best.draws > BY_CHANCE
        yield Finding(
            "note",
            "labels",
            f"Too few messages ({best.draws}) to say whether a label rule beats guessing."
            if few
            else "No label rule beats guessing at this batch size and stage of the training.",
            evidence,
            "Audit the model of the first rounds too: the rules are at their best on an untrained one.",
        )


def _membership(audit: Audit) -> Iterator[Finding]:
    s = audit.membership
    if not s.scores:
        return
    best = max(s.scores, key=lambda r: r.auc.value)
    # A score may be sure of few members and guess the others (Carlini et al. 2022): its area is not the largest then.
    surest = max(s.scores, key=_sure_of)
    strong = _sure_of(surest) > 0.05
    evidence = " ".join(_curve(r) for r in ([surest] if strong and surest is not best else []) + [best])
    if beyond(best.auc, len(s.scores)) > 0.5 or strong:
        level = "high" if best.auc.value > 0.75 or strong else "medium" if best.auc.value > 0.6 else "low"
        bound = f" No threshold on the loss has more than {s.bound:.2f} advantage here." if s.bound is not None else ""
        yield Finding(
            level,
            "membership",
            "Members of the training data can be told from others, better than by guessing.",
            evidence + bound,
            "Train for fewer epochs or regularise: the gap between training and test loss is what these attacks read.",
        )
    else:
        yield Finding(
            "note",
            "membership",
            "The scores tried do not tell members from others.",
            evidence,
            "Nothing for now. LiRA with more shadow models (train=) is the strongest of these scores.",
        )


def _sure_of(r: ScoreResult) -> float:
    """Share of the members that a score names at 1 % false positives, at least."""
    return 0.0 if r.tpr_01 is None else r.tpr_01.low


def _curve(r: ScoreResult) -> str:
    rates = [
        f", {percent(v)} of the members at {name} false positives"
        for name, v in (("0.1 %", r.tpr_001), ("1 %", r.tpr_01))
        if v is not None
    ]
    area = f"{r.auc.value:.2f} ({r.auc.low:.2f} to {r.auc.high:.2f})"
    return f"{r.score}: area under the ROC curve {area}{''.join(rates)}."


def _records(audit: Audit) -> Iterator[Finding]:
    s = audit.records
    if s.dominating and s.batch > 1:
        names = ", ".join(str(r.index) for r in s.worst[:5])
        before = ", before the defence that is audited" if audit.setting.sharing.get("defence") else ""
        yield Finding(
            "low",
            "records",
            "Single records make up most of a batch's gradient.",
            f"{whole(s.dominating)} of the records are more than half of the norm of their batch's gradient{before} "
            f"({s.batch} samples). Highest leverage: members {names}.",
            "Look at these records; clip gradients of samples"
            + (f", to about {s.suggested_clip:.2g} to begin with." if s.suggested_clip else "."),
        )


def _sweep(audit: Audit) -> Iterator[Finding]:
    if audit.sweep.rows and (most := audit.sweep.rows[0].divided):
        leaky = [r.name for r in audit.sweep.rows[1:] if r.divided is not None and r.divided > most / 2]
        if leaky:
            yield Finding(
                "note",
                "sweep",
                "Some defences leave inputs to be read off a layer's gradient without any search.",
                f"{whole(most)} of those behind a message without a defence, and more than half as many with "
                f"{', '.join(leaky)}.",
                "Do not rely on them. Noise on clipped gradients hides single rows.",
            )
    rows = [r for r in audit.sweep.rows if r.psnr is not None and r.signal is not None]
    if len(rows) < 2 or rows[0].psnr is None:
        return
    guess = audit.sweep.psnr_guess
    if not rows[0].recovered and (guess is None or rows[0].psnr < guess + 3):
        known = "" if guess is None else f", guessing the mean {guess:.1f} dB"
        yield Finding(
            "note",
            "sweep",
            "What defences do against reconstruction was not seen: without one, the searches find nothing either.",
            f"Of single samples they reach {rows[0].psnr:.1f} dB without a defence{known} ({rows[0].seeds} "
            f"seed{'s' * (rows[0].seeds > 1)}).",
            "Credit no defence with it. Try a larger budget (more restarts and iterations).",
        )
        return
    weak = [r.name for r in rows[1:] if r.psnr is not None and r.psnr > rows[0].psnr - 3]
    strong = [r for r in rows[1:] if not r.recovered and r.name not in weak]
    if weak:
        yield Finding(
            "note",
            "sweep",
            "Some defences change next to nothing.",
            f"With {', '.join(weak)}, reconstructions of single samples are within 3 dB of those without a defence, or "
            f"better ({rows[0].seeds} seed{'s' * (rows[0].seeds > 1)}).",
            "Do not rely on them.",
        )
    unknown = [r.name for r in strong if not r.adapted]
    if unknown:
        yield Finding(
            "note",
            "sweep",
            "Some defences stop searches that do not know of them, and no other was tried.",
            f"{', '.join(unknown)}: 3 dB less than without, or worse, by searches that do not know what they do to "
            "the gradient.",
            "Do not credit them before an attack that knows of them has failed.",
        )
    adapted = [r for r in strong if r.adapted]
    if adapted:
        trained = [r for r in adapted if r.accuracy is not None]  # which no cosine is compared with
        best = max(trained or adapted, key=lambda r: r.accuracy if r.accuracy is not None else r.signal or 0.0)
        yield Finding(
            "note",
            "sweep",
            f"Of the defences that blur reconstructions for who knows of them, {best.name} costs the least.",
            f"Best reconstruction {best.psnr_best:.1f} dB, without a defence {rows[0].psnr_best:.1f} dB "
            f"({best.seeds} seed{'s' * (best.seeds > 1)}); {_cost(best)} (without: {_cost(rows[0])}).",
            "These searches are not all. Only noise on clipped gradients, with an accountant, is a guarantee.",
        )


def _cost(row: Defended) -> str:
    return f"accuracy {whole(row.accuracy)}" if row.accuracy is not None else f"cosine to the gradient {row.signal:.2f}"


def beyond(value: Interval, choices: int) -> float:
    """The lower end of an interval that holds although the highest of several values was chosen (Bonferroni).

    Args:
        value: the highest.
        choices: of how many.

    Returns:
        The end, with the interval's half taken for that of a normal distribution.
    """
    return value.value - (value.value - value.low) * NormalDist().inv_cdf(1 - 0.025 / choices) / 1.959964


def whole(value: float | None) -> str:
    """A rate without an interval, such as "80 %"."""
    return "-" if value is None else f"{100 * value:.0f} %"


def odds(chance: float) -> str:
    """A probability that may be small, such as "0.012 %"."""
    return whole(chance) if chance >= 0.1 else f"{100 * chance:.2g} %"


def percent(value: Interval) -> str:
    """A rate with its interval.

    Args:
        value: between 0 and 1.

    Returns:
        Such as "80 % (62 to 91)".
    """
    shown = f"{100 * value.value:.0f}" if not 0 < value.value < 0.005 else f"{100 * value.value:.1g}"
    return f"{shown} % ({100 * value.low:.0f} to {100 * value.high:.0f})"
