"""The report: `audit.json`, one HTML file that needs no network, and its pictures as PNGs."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packext.audit.findings import odds, percent, whole
from packext.audit.section import Section

try:
    from packext.audit.pictures import pictures
except ImportError:
    raise ImportError("The pictures of an audit are drawn by matplotlib: pip install 'packext[audit]'.") from None

if TYPE_CHECKING:
    from packext.audit._run import Audit

TITLES = {
    "setting": "Threat model",
    "integrity": "Is the model what it should be?",
    "closed": "Closed forms: what needs no search",
    "labels": "Labels",
    "inversion": "Reconstruction of inputs",
    "records": "Records that stand out",
    "membership": "Membership",
    "epsilon": "Differential privacy: claimed and measured",
    "sweep": "What defences would change",
}

SAYS = {
    "setting": "All numbers of this report are of this model, at this stage of its training, with this way of sharing.",
    "integrity": "A malicious server can send a model whose normalisation fixes the features of every sample. That no "
    "trace is found proves nothing.",
    "closed": "Divisions, zero rows and spans of a layer's gradient. They cost nothing and are exact where they hold.",
    "labels": "How often each class occurs in a batch, read off the last layer's gradient. A rule says something where "
    "it beats guessing that classes are as frequent in the batch as in the data.",
    "inversion": "Inputs whose gradient is the one that was shared. A search that has not matched the gradient has "
    "failed as a search, which is no protection; nothing matches a gradient that a defence has changed.",
    "records": "Leverage is how much of a sample's gradient the others' do not span; share, how large its own gradient "
    "is next to that of its batch. Records that stand out are those that an update says most about.",
    "membership": "Scores that tell who was trained on from who was not. What counts is the rate of true positives "
    "where false ones are few, more than the area.",
    "epsilon": "A lower bound above the claim shows a bug. One below it proves nothing.",
    "sweep": "The same attacks on defended gradients; reconstruction is of one sample by itself, by the better of the "
    "searches, which know of clipping and match no entries that a defence has set to zero; where it adds noise of a "
    "known level or rounds, another goes on from there to the most probable input; for noise, given what the other "
    "candidates look like. "
    "Read off are inputs of the real batch, by division at a layer that sees them. Levels fit the gradient at "
    "this stage of the training. Time is the processor's for one call, over that without a defence; of clipping that "
    "of a training's step.",
}


def write(audit: Audit, out: Path) -> Path:
    """Write all files.

    Args:
        audit: all sections.
        out: folder, which is created.

    Returns:
        The path of `audit.html`.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures = {}
    for name, figure in pictures(audit).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150, format="png")
        figures[name] = buffer.getvalue()
        (out / f"{name}.png").write_bytes(figures[name])
    (out / "audit.json").write_text(json.dumps(audit.to_json(), indent=1, allow_nan=False) + "\n", "utf-8")
    file = out / "audit.html"
    file.write_text(page(audit, figures), "utf-8")
    return file


def page(audit: Audit, figures: dict[str, bytes]) -> str:
    """Put the page together.

    Args:
        audit: all sections.
        figures: PNGs by section.

    Returns:
        HTML.
    """
    css = files("packext.audit").joinpath("audit.css").read_text("utf-8")
    s = audit.setting
    cards = "".join(
        f'<article class="finding {f.severity}"><span class="tag">{f.severity}</span><h3>{escape(f.title)}</h3>'
        f"<p>{escape(f.evidence)}</p>"
        f'<p class="advice">{escape(f.advice)} <a href="#{f.section}">Numbers</a></p></article>'
        for f in audit.findings
    )
    sections = "".join(_section(name, audit, figures.get(name)) for name in TITLES)
    end = [s.date, f"packext {s.versions.get('packext')}", f"torch {s.versions.get('torch')}"]
    end += [f"model {s.fingerprint[:16]}", f"{sum(getattr(audit, name).seconds for name in TITLES):.0f} s"]
    title = f"What the gradients of this {escape(s.model)} give away"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - packext</title>
<link rel="icon" href="data:,">
<style>{css}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>Shared is {escape(s.shared)}. The server is {escape(s.server)}. {escape(_stage(audit))}</p>
</header>
<p class="rule">An attack that succeeds proves that this much is given away. One that fails proves nothing: an attacker
has more time, and other attacks.</p>
<section id="findings"><h2>Findings</h2>{cards}</section>
{sections}
<footer>{escape(" · ".join(end))}</footer>
</body>
</html>
"""


def _stage(audit: Audit) -> str:
    stage = audit.setting.training_stage
    parts = [f"{k} {100 * v:.1f} %" if k.startswith("accuracy") else f"{k} {v:.3g}" for k, v in stage.items()]
    return ("Now: " + ", ".join(parts) + ".") if parts else ""


def _section(name: str, audit: Audit, png: bytes | None) -> str:
    section: Section = getattr(audit, name)
    parts = [f'<section id="{name}"><h2>{TITLES[name]}</h2><p class="says">{SAYS[name]}</p>']
    if png is not None:
        parts.append(f'<img alt="{TITLES[name]}" src="data:image/png;base64,{base64.b64encode(png).decode()}">')
    parts.append(TABLES[name](section))
    if section.absent:
        by_reason: dict[str, list[str]] = {}
        for what, why in section.absent.items():
            by_reason.setdefault(why, []).append(what)
        items = "".join(
            f"<li><b>{escape('; '.join(what))}</b> {'were' if what[1:] else 'was'} not measured: {escape(why)}</li>"
            for why, what in by_reason.items()
        )
        parts.append(f'<ul class="absent">{items}</ul>')
    if section.threats:
        by_threat: dict[Any, list[str]] = {}
        for attack, threat in section.threats.items():
            by_threat.setdefault(threat, []).append(attack)
        rows = [
            [", ".join(attacks), threat.sees, threat.knows, threat.server, threat.assumes]
            for threat, attacks in by_threat.items()
        ]
        table_ = table(["attack", "sees", "knows", "server", "assumes"], rows)
        parts.append(f"<details><summary>Who attacks</summary>{table_}</details>")
    return "".join([*parts, "</section>"])


def table(head: list[str], rows: Iterable[list[Any]]) -> str:
    """As HTML; columns of numbers to the right, with their names, and none of a column without an entry.

    Args:
        head: names of the columns.
        rows: of strings, numbers and None.

    Returns:
        An element, empty without rows.
    """
    columns = []
    for name, *values in zip(head, *rows, strict=True):
        seen = [v for v in values if v is not None]
        if seen:
            right = all(isinstance(v, (int, float)) for v in seen)
            columns.append([_cell("th", name, right), *(_cell("td", v, right) for v in values)])
    lines = "".join(f"<tr>{''.join(line)}</tr>" for line in zip(*columns, strict=True))
    return f'<div class="scroll"><table>{lines}</table></div>' if lines else ""


def _cell(tag: str, value: Any, right: bool) -> str:
    kinds = " ".join(["number"] * right + ["quiet"] * (value is None))
    shown = "–" if value is None else f"{value:.3g}" if isinstance(value, float) else escape(str(value))
    return f'<{tag} class="{kinds}">{shown}</{tag}>' if kinds else f"<{tag}>{shown}</{tag}>"


def _rate(value: Any) -> str | None:
    return None if value is None else percent(value)


def _setting(s: Any) -> str:
    rows = [
        ["shared", s.shared],
        ["server", s.server],
        ["samples behind what it sees", s.behind],
        ["model", f"{s.model}, {s.parameters} trained parameters, {s.dtype}, mode {s.mode}"],
        ["BatchNorm", s.batchnorm],
        ["loss", s.loss_fn],
        ["stage of the training", ", ".join(f"{k} {v:.4g}" for k, v in s.training_stage.items())],
        ["data", f"{s.members} members, {s.heldout} held out"],
        ["SHA-256 of model", s.fingerprint],
        ["versions", ", ".join(f"{k} {v}" for k, v in s.versions.items())],
    ]
    return (
        table(["", ""], rows) + f"<details><summary>Architecture</summary><pre>{escape(s.architecture)}</pre></details>"
    )


def _integrity(s: Any) -> str:
    if s.feature_variance is None:
        return ""
    verdict = "; ".join(s.reasons) if s.reasons else "no trace"
    rows = [
        ["traces of a fishing model", verdict],
        ["relative variance of the last layer's input", float(s.feature_variance)],
        ["second singular value of the last layer's gradient, over the first", s.rank_ratio],
        ["parameters without gradient", ", ".join(s.without_gradient) or "none"],
        ["normalisations with scale zero", ", ".join(s.zero_scales) or "none"],
    ]
    return table(["", f"of {s.samples} members"], rows)


def _closed(s: Any) -> str:
    layers = [
        [
            r.name + (" (sees the inputs)" if r.is_input else ""),
            f"{r.features} → {r.outputs}",
            r.inputs,
            _rate(r.divided),
            _rate(r.alone),
            r.rank,
            _rate(r.spanned),
            None if r.false_alarms is None else whole(r.false_alarms),
        ]
        for r in s.layers
    ]
    head_of_layers = [
        "layer",
        "size",
        "inputs",
        "by bias division",
        "one sample by itself",
        "rank",
        "in the span",
        "others in it",
    ]
    tokens = [
        [e.name, e.vocabulary, e.tokens, _rate(e.found), None if e.false_alarms is None else whole(e.false_alarms)]
        for e in s.embeddings
    ]
    head = ["embedding", "vocabulary", "tokens in a batch", "batches named exactly", "other samples by the same rows"]
    return table(head_of_layers, layers) + table(head, tokens)


def _labels(s: Any) -> str:
    rows = [
        [r.rule, _rate(r.accuracy), _rate(r.exact), r.draws, odds(r.chance)]
        for r in sorted(s.rules, key=lambda r: -r.accuracy.value)
    ]
    if s.guess is not None:
        rows.append(["guessing", whole(s.guess), None, None, None])
    if s.identity is not None:
        rows.append(["identity (knows the probabilities: the bound)", whole(s.identity), None, None, None])
    found = table(["rule", "labels counted", "all counts exact", "messages", "as far above guessing by chance"], rows)
    if s.clients_exact is not None:
        found += table(
            ["a malicious server, one normalisation layer changed", "clients", "can tell apart at most", "doubt"],
            [[f"all counts exact for {percent(s.clients_exact)} of the clients", s.cohort, s.capacity, s.doubt]],
        )
    return found


def _inversion(s: Any) -> str:
    head = [
        "search",
        "samples",
        "recovered",
        "recognised",
        "PSNR mean",
        "worst",
        "best",
        "labels",
        "matched",
        "objective",
        "tried",
    ]
    rows = [
        [
            r.search,
            r.samples,
            _rate(r.recovered),
            f"{percent(r.identified)} of {r.candidates}",
            *(f"{v:.1f}" for v in (r.psnr, r.psnr_worst, r.psnr_best)),
            "known" if r.labels is None else whole(r.labels),
            f"{r.matched} of {r.seeds}",
            r.objective,
            f"{r.seeds} × {r.restarts} × {r.iterations}",
        ]
        for r in s.searches
    ]
    if s.psnr_guess is not None:
        rows.append(["guessing the mean", *[None] * 3, f"{s.psnr_guess:.1f}", *[None] * 6])
    return table(head, rows) + (
        '<p class="says">An input counts as recovered with a mean squared error below 1 % of the squared range (20 dB) '
        "and a tenth of that of the candidates' mean, which is what guessing is here; and as recognised if it is the "
        "nearest of the candidates. PSNR in dB, of all samples. Matched: searches that have found inputs with the "
        "gradient that was shared. Tried: seeds × restarts × iterations.</p>"
        if rows
        else _texts(s)
    )


def _texts(s: Any) -> str:
    """What searches made of texts: numbers, and the first texts beside what was found of them."""
    head = ["search", "texts", "tokens in their place", "guessing", "whole texts", "nearest among", "labels", "matched"]
    head += ["objective", "tried"]
    rows = [
        [
            r.search,
            r.samples,
            percent(r.tokens),
            whole(r.guess),
            percent(r.exact),
            f"{r.named:.0f} tokens",
            "known" if r.labels is None else whole(r.labels),
            f"{r.matched} of {r.seeds}",
            r.objective,
            f"{r.seeds} × {r.restarts} × {r.iterations}",
        ]
        for r in s.texts
    ]
    if not rows:
        return ""
    names = ", ".join(sorted({repr(r.embedding) for r in s.texts}))
    shown = "".join(
        f"<details open><summary>{escape(r.search)}, {r.samples} text{'s' * (r.samples > 1)} in a message: the "
        f'clients\' above what was found</summary><div class="scroll"><table class="texts">'
        + "".join(_lines(true, found, s.words) for true, found in zip(r.true, r.found, strict=True))
        + "</table></div></details>"
        for r in s.texts
    )
    return (
        f'{table(head, rows)}<p class="says">Searched for are vectors in place of what {escape(names)} makes of the '
        "tokens; found is the nearest of the tokens that its gradient names, or of all where it names none. Padding is "
        "known, and does not count. Guessing takes the most frequent of these tokens in each place. Matched: searches "
        "that have found vectors with the gradient that was shared, the embedding's left out. Tried: seeds × restarts "
        f"× iterations.</p>{shown}"
    )


def _lines(true: list[int], found: list[int], words: dict[str, str]) -> str:
    """A text above what was found of it, token above token, with what is wrong marked."""
    said = [[escape(words.get(str(token), str(token))) for token in line] for line in (true, found)]
    right = [a == b for a, b in zip(true, found, strict=True)]
    lower = [word if ok else f"<mark>{word}</mark>" for word, ok in zip(said[1], right, strict=True)]
    return "".join(
        f"<tr><th>{title}</th>{''.join(f'<td>{word}</td>' for word in line)}</tr>"
        for title, line in (("client", said[0]), ("found", lower))
    )


def _records(s: Any) -> str:
    rows = [
        [r.index, r.label, r.loss, r.norm, r.leverage, None if r.share is None else whole(r.share)] for r in s.worst
    ]
    return table(["member", "label", "loss", "norm", "leverage", "share of its batch's gradient"], rows)


def _membership(s: Any) -> str:
    rows = [
        [
            r.score,
            f"{r.auc.value:.3f} ({r.auc.low:.3f} to {r.auc.high:.3f})",
            _rate(r.tpr_001),
            _rate(r.tpr_01),
            r.advantage,
        ]
        for r in s.scores
    ]
    if s.bound is not None:
        rows.append(["largest advantage of any threshold on the loss", None, None, None, s.bound])
        rows.append(["what chance stays below in 95 %", None, None, None, s.bound_by_chance])
    head = ["score", "area under ROC", "true positives at 0.1 %", "at 1 %", "advantage"]
    return table(head, rows)


def _epsilon(s: Any) -> str:
    if s.claimed is None and s.measured is None:
        return ""
    rows = [["claimed", s.claimed, s.delta, None], ["at least, measured", s.measured, s.delta, None]]
    if s.measured is not None:
        rows[1][3] = (
            f"{s.correct} of {s.guesses} guesses right, {s.canaries} canaries, {whole(s.confidence)} confidence"
        )
    return table(["", "epsilon", "delta", ""], rows)


def _sweep(s: Any) -> str:
    head = ["defence", "attacker knows", "read off", "PSNR", "best", "recovered", "labels", "by", "guessing", "cosine"]
    head += ["accuracy", "time"]
    rows = [
        [
            r.name,
            "yes" if r.adapted else "no",
            None if r.divided is None else whole(r.divided),
            None if r.psnr is None else f"{r.psnr:.1f}",
            None if r.psnr_best is None else f"{r.psnr_best:.1f}",
            f"{r.recovered} of {r.seeds}" if r.seeds else None,
            None if r.labels is None else whole(r.labels),
            r.rule,
            None if r.guess is None else whole(r.guess),
            r.signal,
            None if r.accuracy is None else whole(r.accuracy),
            None if r.time is None else f"× {r.time:.1f}",
        ]
        for r in s.rows
    ]
    return table(head, rows)


TABLES = {
    "setting": _setting,
    "integrity": _integrity,
    "closed": _closed,
    "labels": _labels,
    "inversion": _inversion,
    "records": _records,
    "membership": _membership,
    "epsilon": _epsilon,
    "sweep": _sweep,
}
