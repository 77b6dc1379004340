"""Reconstruction of text: searches for vectors in place of embeddings, and the tokens that are nearest to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.attacks import (
    DeepLeakage,
    Reconstruction,
    Shared,
    Threat,
    in_order,
    nearest_tokens,
    tokens_present,
    without,
)
from packext.audit.case import Case, Clock
from packext.audit.closed import inputs_of, same
from packext.audit.inversion import (
    SHOWN,
    Inversion,
    TextResult,
    at_both_sizes,
    candidates,
    final,
    searched,
    searches_for,
    threat_of,
)
from packext.audit.section import Interval

#: Members on which the model is run with vectors in place of tokens, to see whether it reads these elsewhere.
CHECKED = 64


@dataclass(frozen=True)
class Lookup:
    """The embedding that makes vectors of the clients' tokens.

    Attributes:
        name: of the layer.
        weight: name of its parameter, which may be another layer's where it is tied.
        table: its rows, centred and over their standard deviation `[V, D]`: what is searched for is of that scale.
        centre: their mean `[D]`.
        unit: their standard deviation.
        padding: the token that stands where a text has none, which an attacker is taken to know; None if there is none.
        filler: the token that the model is handed where the text is not known.
    """

    name: str
    weight: str
    table: Tensor
    centre: Tensor
    unit: Tensor
    padding: int | None
    filler: int

    @classmethod
    def of(cls, case: Case) -> Lookup:
        """Find it.

        Args:
            case: model, data and sharing.

        Returns:
            The only `nn.Embedding` that sees the inputs and nothing else.

        Raises:
            PackextError: if there is none, or several; or the model reads the tokens elsewhere as well.
        """
        model, dtype = case.precise()
        layers = {k: m for k, m in model.eval().named_modules() if isinstance(m, nn.Embedding)}
        x = case.x[:CHECKED]
        readers = [name for name, seen in inputs_of(model, (x,), list(layers)).items() if same(seen, x)]
        if len(readers) != 1:
            raise px.PackextError(
                f"inputs are {x.dtype}, of which an nn.Embedding makes the vectors that are searched for: one that "
                f"{type(model).__name__} calls as a module, once, with the inputs and nothing else. Such are: "
                f"{', '.join(map(repr, readers)) or 'none'}."
            )
        layer = layers[readers[0]]
        weight = next((k for k, p in model.named_parameters() if p is layer.weight), None)
        if weight is None:
            raise px.PackextError(f"the table of {readers[0]!r} is no parameter, but made of others.")
        rows = layer.weight.detach()
        kept = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        if layer.padding_idx is not None:
            kept[layer.padding_idx] = False
        centre = rows[kept].mean(0)
        unit = (rows[kept] - centre).square().mean().sqrt()
        if not unit > 0:
            raise px.PackextError(f"all rows of {readers[0]!r} are the same: no token can be told from another.")
        often = torch.bincount(case.x.flatten(), minlength=len(rows)) * kept
        found = cls(readers[0], weight, (rows - centre) / unit, centre, unit, layer.padding_idx, int(often.argmax()))
        found._check(model, x)
        return found

    def _check(self, model: nn.Module, x: Tensor) -> None:
        outputs = []
        for run in (model, partial(self.forward(x), model)):
            with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []), torch.no_grad():
                torch.manual_seed(0)
                outputs.append(run(x if run is model else self.table[x]))
        if not torch.allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-6 * float(outputs[0].abs().max())):
            raise px.PackextError(
                f"{type(model).__name__} reads the tokens elsewhere than by {self.name!r} as well: with the vectors of "
                "the true tokens it does not give the same output. Of a mask the padding is known here, where the "
                "embedding has it as padding_idx."
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """The range of what is searched for."""
        return float(self.table.min()), float(self.table.max())

    def padded(self, x: Tensor) -> Tensor:
        """Where texts have no token."""
        return torch.zeros_like(x, dtype=torch.bool) if self.padding is None else x == self.padding

    def forward(self, x: Tensor) -> Callable[[nn.Module, Tensor], Tensor]:
        """How the model is run on vectors in place of what the embedding makes of texts, of which the padding is known.

        Args:
            x: texts.

        Returns:
            A function of model and vectors `[..., D]`, of the scale of `table`; the model is handed fillers.
        """
        padded = self.padded(x)
        ids = torch.where(padded, x, self.filler)

        def run(model: nn.Module, vectors: Tensor) -> Tensor:
            if len(vectors) != len(ids) and padded.any():
                raise px.PackextError("texts of a local step with padding are searched for among all alone.")
            made = self.centre + self.unit * vectors
            if padded.any():
                made = torch.where(padded[..., None], self.centre + self.unit * self.table[self.padding], made)
            hook = model.get_submodule(self.name).register_forward_hook(
                lambda layer, args, out: made.reshape(out.shape)
            )
            try:
                return model(ids[: len(vectors)])
            finally:
                hook.remove()

        return run

    def named(self, message: Shared) -> Tensor:
        """Tokens that the message says occurred; all but the padding where it does not say.

        Args:
            message: what the attacker sees.

        Returns:
            Tokens, ascending.
        """
        every = torch.arange(len(self.table), device=self.table.device)
        try:
            found = tokens_present(message, self.weight)
        except px.PackextError:  # not shared, or a gradient in every row: it is tied, or noise was added
            found = every
        found = found if len(found) else every
        return found if self.padding is None else found[found != self.padding]


@dataclass
class TextAttempt:
    """One search of one message, compared with the truth.

    Attributes:
        true: tokens.
        found: in the order of the true texts.
        counted: which are no padding.
        guess: share that the most frequent tokens in each place get.
        drawn: share that tokens drawn by their frequency get, in the order that fits best.
        named: tokens among which the nearest is taken.
        labels: share found, or None.
        result: of the search.
    """

    true: Tensor
    found: Tensor
    counted: Tensor
    guess: float
    drawn: float
    named: int
    labels: float | None
    result: Reconstruction

    @property
    def tokens(self) -> float:
        """Share that is found."""
        return share_of(self.found, self.true, self.counted)

    @property
    def exact(self) -> float:
        """Share of the texts of which all is found."""
        right = (self.found == self.true) | ~self.counted
        return float(right.reshape(len(right), -1).all(1).double().mean())


def share_of(found: Tensor, true: Tensor, counted: Tensor) -> float:
    """Share of the tokens that count which are the true ones."""
    return float((found == true)[counted].double().mean())


def text(case: Case, clock: Clock) -> Inversion:
    """Search for texts: one by itself, and the real batch.

    Args:
        case: model, data and sharing.
        clock: of the section.

    Returns:
        Success over seeds, with whether searches have matched.
    """
    found = Inversion(planned=case.budget.seeds)
    with found.unless_refused("reconstruction"):
        lookup = Lookup.of(case)
        searches = _searches(case, lookup, found.absent)

        def note(name: str, n: int, what: str, made: list[TextAttempt], attack: Any) -> None:
            found.texts.append(_summary(name, n, made, attack, lookup))
            found.threats[name] = _threat(attack)

        at_both_sizes(case, clock, found, searches, partial(attempt, lookup=lookup), note)
        if case.data.decode is not None and found.texts:
            with found.unless_refused("words of tokens"):
                found.words = _words(case.data.decode, found.texts)
    return found


def _searches(case: Case, lookup: Lookup, absent: dict[str, str]) -> dict[str, Any]:
    """Searches that fit what is shared; nobody is told labels of tokens, which for a language model are the text."""
    if case.y.is_floating_point() or case.y.dim() == 1:
        return searches_for(case, absent, *lookup.bounds)
    loss, output = case.loss_fn, case.output
    ignored = isinstance(loss, nn.CrossEntropyLoss) and bool((case.y == loss.ignore_index).any())
    if not isinstance(loss, nn.CrossEntropyLoss) or output.shape[2:] != case.y.shape[1:] or ignored:
        raise px.PackextError(
            "labels of tokens, which may be the text, are searched for as well: for nn.CrossEntropyLoss, outputs "
            f"[N, C, T] and labels [N, T] of which it ignores none; here it is {loss} with outputs "
            f"{list(output.shape)} and labels {list(case.y.shape)}{', some of which it ignores' if ignored else ''}."
        )
    if case.sharing.local is not None:
        raise px.PackextError("no search here that finds labels of tokens as well unrolls local steps.")
    absent["Inverting Gradients"] = "it is told the labels, and those of tokens may be the text itself"
    b = case.budget
    return {
        "Deep Leakage from Gradients": (DeepLeakage(b.iterations, b.restarts, seed=case.seed), tuple(output.shape[1:]))
    }


def attempt(case: Case, attack: Any, message: Shared, x: Tensor, y: Tensor, lookup: Lookup) -> TextAttempt:
    """Search once, and compare with the truth.

    Args:
        case: model, data and sharing.
        attack: as `searches_for` gives it.
        message: what the attacker sees.
        x: the true tokens.
        y: labels.
        lookup: the embedding.

    Returns:
        What was found.

    Raises:
        PackextError: if the texts are nothing but padding.
    """
    padded, named = lookup.padded(x), lookup.named(message)
    if bool(padded.all()):
        raise px.PackextError(f"texts of {tuple(x.shape)} tokens are nothing but padding.")
    often = _often(case, named)
    guess = named[often.argmax(1)].reshape(x[0].shape).expand_as(x)
    drawn = named[often.multinomial(len(x), replacement=True, generator=torch.Generator(x.device).manual_seed(0)).T]
    rest = without(message, lookup.weight) if lookup.weight in message.gradient else message
    result = searched(case, attack, rest, y, lookup.table[guess], forward=lookup.forward(x))

    def in_place(vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens nearest to vectors, and the order of texts that fits best; the attacker knows where none is."""
        known = torch.where(padded[..., None], lookup.table[x], torch.nan_to_num(vectors.detach()))
        order = in_order(known, lookup.table[x]).to(x.device)
        tokens = torch.where(padded, x, named[nearest_tokens(known, lookup.table[named])])
        return tokens[order], order

    found, order = in_place(result.inputs)
    labels = float((result.labels[order] == y).double().mean()) if isinstance(attack, tuple) else None
    by_chance, _ = in_place(lookup.table[drawn.reshape(x.shape)])
    shares = share_of(guess, x, ~padded), share_of(by_chance, x, ~padded)
    return TextAttempt(x, found, ~padded, *shares, len(named), labels, result)


def _often(case: Case, named: Tensor) -> Tensor:
    """How frequent tokens are in each place `[T, named]`, as those who know no message expect."""
    every = candidates(case)
    places = every.reshape(len(every), -1).T
    whole = torch.bincount(every.flatten(), minlength=int(named.max()) + 1)[named].double()
    here = torch.stack([torch.bincount(place, minlength=int(named.max()) + 1)[named] for place in places])
    return here + (whole + 1) / (whole.sum() + len(named))  # of those that no place has, what is frequent elsewhere


def _summary(name: str, n: int, made: list[TextAttempt], attack: Any, lookup: Lookup) -> TextResult:
    words = [a.labels for a in made if a.labels is not None]
    bare = attack[0] if isinstance(attack, tuple) else attack
    return TextResult(
        name,
        lookup.name,
        n,
        len(made),
        bare.restarts,
        bare.iterations,
        Interval.mean([a.tokens for a in made]),
        Interval.mean([a.exact for a in made]),
        max(sum(a.guess for a in made), sum(a.drawn for a in made)) / len(made),
        sum(a.named for a in made) / len(made),
        sum(int(a.counted.sum()) for a in made),
        sum(words) / len(words) if words else None,
        sum(a.result.matched for a in made),
        final([a.result for a in made]),
        *(
            torch.cat(part)[:SHOWN, None].flatten(1).tolist()
            for part in ([a.true for a in made], [a.found for a in made])
        ),
    )


def _threat(attack: Any) -> Threat:
    """Who makes it: of the input's shape the length of the texts is known, and of its range that of the embedding."""
    threat = threat_of(attack)
    return replace(threat, knows=f"{threat.knows}; where texts are padded")


def _words(decode: Callable[[list[int]], str], results: list[TextResult]) -> dict[str, str]:
    shown = {token for r in results for line in (*r.true, *r.found) for token in line}
    try:
        words = {str(token): decode([token]) for token in sorted(shown)}
    except Exception as error:  # whatever the user's function says about a token
        raise px.PackextError(f"decode= failed: {type(error).__name__}: {error}") from error
    wrong = next((w for w in words.values() if not isinstance(w, str)), None)
    if wrong is not None:
        raise px.PackextError(f"decode= must make a string of a list of one token, got {type(wrong).__name__}.")
    return words
