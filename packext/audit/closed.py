"""Closed forms: what can be read off the message without a search."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import packext as px
from packext.attacks import Shared, Threat, rank, spanned, tokens_present
from packext.audit.case import Case, Clock
from packext.audit.section import Interval, Section

SEEN = Threat("the message", "the model", "honest", "inputs of a layer that can be told apart in its gradient")

#: A candidate this near to an input is that input: relative to its norm, and for a quotient to what it differs by from
#: the mean of inputs, which all are near to where they vary little.
NEAR = 1e-2

#: Entries of a weight up to which its singular values are computed, and candidates of a span test.
LARGEST, CANDIDATES = 4_000_000, 256


@dataclass
class LayerCheck:
    """A fully connected layer.

    Attributes:
        name: of the layer; of a model that is a layer itself, its class.
        features: of its input.
        outputs: rows of its weight.
        is_input: whether its input is the client's input itself.
        inputs: of the layer in a batch: samples times positions.
        divided: share of a batch's inputs that a row of the weight's gradient over an entry of the bias's gives, to
            1 % (and of what they differ by from the mean of inputs); None without a bias.
        alone: the same of messages with one sample.
        rank: of the weight's gradient, mean over draws.
        spanned: share of a batch's inputs that lie in the span of the gradient's rows, to 1 %; None if it spans all.
        false_alarms: the same share of inputs that were not in the batch.
    """

    name: str
    features: int
    outputs: int
    is_input: bool
    inputs: int
    divided: Interval | None = None
    alone: Interval | None = None
    rank: float | None = None
    spanned: Interval | None = None
    false_alarms: float | None = None


@dataclass
class EmbeddingCheck:
    """An embedding.

    Attributes:
        name: of the layer.
        vocabulary: rows of its table.
        tokens: different ones in a batch, mean over draws.
        found: share of the batches whose set of tokens is exactly that of the rows with a gradient.
        false_alarms: share of the batches for which that is also the set of other samples' tokens, as it is of
            positions, which all batches have.
    """

    name: str
    vocabulary: int
    tokens: float
    found: Interval
    false_alarms: float | None = None


@dataclass(kw_only=True)
class Closed(Section):
    """What closed forms recover.

    Attributes:
        layers: fully connected ones.
        embeddings: lookups of tokens.
        draws: batches.
        samples: behind each message.
    """

    layers: list[LayerCheck] = field(default_factory=list)
    embeddings: list[EmbeddingCheck] = field(default_factory=list)
    draws: int = 0
    samples: int = 0


def closed(case: Case, clock: Clock) -> Closed:
    """Try all closed forms on several batches.

    Args:
        case: model, data and sharing.
        clock: of the section.

    Returns:
        Counts of what they recover.
    """
    found = Closed(threats={"closed forms": SEEN}, samples=case.sharing.behind)
    layers = {k: m for k, m in case.model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))}
    for name in [k for k, m in layers.items() if m.weight.numel() > LARGEST]:
        found.absent[name] = f"its weight has more than {LARGEST:,} entries"
        del layers[name]
    kinds = (("fully connected layers", nn.Linear), ("embeddings", nn.Embedding))
    for what, kind in kinds:
        if not any(isinstance(m, kind) for m in layers.values()):
            found.absent.setdefault(what, "the model has none that could be checked")
    tried: dict[str, dict[str, list]] = {name: {} for name in layers}
    sizes: dict[str, tuple[int, bool]] = {}
    while layers and clock.go_on(found.draws, case.budget.draws):
        whole = case.draw(found.draws, min(len(case.x), 2 * case.sharing.behind))
        index, rest = whole[: case.sharing.behind], whole[case.sharing.behind :]
        found.draws += 1
        message, inputs, others, alone = None, {}, {}, None
        with found.unless_refused("message"):
            inputs = inputs_of(case.model, case.by_client(case.x[index]), list(layers))
            message = case.message(case.x[index], case.y[index])
        if message is None:
            continue
        with found.unless_refused("inputs that were not in the batch"):
            others = inputs_of(case.model, case.by_client(case.x[rest]), list(layers)) if len(rest) else {}
        if not len(rest):
            found.absent["inputs that were not in the batch"] = "all members are in every batch"
        with found.unless_refused("messages with one sample"):
            x, y = case.x[index[:1]], case.y[index[:1]]
            own = inputs_of(case.model, (x,), list(layers))
            alone = case.client(x, y), own
        for name, layer in layers.items():
            if name not in inputs:
                found.absent[name] = "the model does not call it as a module, so that its inputs are not seen"
                continue
            note = tried[name]
            if isinstance(layer, nn.Embedding):
                with found.unless_refused(f"{name}: rows with a gradient"):
                    true, *away = (
                        set(of[name].flatten().tolist()) - {layer.padding_idx} for of in (inputs, others) if name in of
                    )
                    seen = set(tokens_present(message, _entry(name, "weight")).tolist())
                    note.setdefault("tokens", []).append(len(true))
                    note.setdefault("found", []).append(int(seen == true))
                    note.setdefault("false", []).extend(int(seen == tokens) for tokens in away)
                continue
            e = inputs[name].flatten(0, -2)
            sizes[name] = len(e), same(inputs[name], case.x[index])
            every = torch.cat([e, others[name].flatten(0, -2)]) if name in others else e
            centre = every.double().mean(0) if len(every) > 1 else torch.zeros_like(e[0])
            _try_linear(found, layer, name, message, e, others.get(name), centre, note)
            if layer.bias is not None and alone is not None and name in alone[1]:
                with found.unless_refused(f"{_shown(name, layer)}: bias division, one sample"):
                    note.setdefault("alone", []).append(divided(alone[0], name, alone[1][name].flatten(0, -2), centre))
    for name, note in tried.items():
        _conclude(found, layers[name], name, note, sizes.get(name))
    return found


def _try_linear(
    found: Closed,
    layer: nn.Linear,
    name: str,
    message: Shared,
    e: Tensor,
    others: Tensor | None,
    centre: Tensor,
    note: dict[str, list],
) -> None:
    """All forms for a fully connected layer and one message."""
    shown, weight = _shown(name, layer), _entry(name, "weight")
    if layer.bias is not None:
        with found.unless_refused(f"{shown}: bias division"):
            note.setdefault("divided", []).append(divided(message, name, e, centre))
    with found.unless_refused(f"{shown}: rank"):
        note.setdefault("rank", []).append(rank(message, weight))
    with found.unless_refused(f"{shown}: span test"):
        distances = spanned(message, weight, e[:CANDIDATES])
        note.setdefault("spanned", []).append(float((distances < NEAR).double().mean()))
        if others is not None:
            away = spanned(message, weight, others.flatten(0, -2)[:CANDIDATES])
            note.setdefault("false", []).append(float((away < NEAR).double().mean()))


def _entry(layer: str, part: str) -> str:
    """Name of a layer's parameter; a model that is a layer itself has no name."""
    return f"{layer}.{part}".removeprefix(".")


def _shown(name: str, layer: nn.Module) -> str:
    return name or type(layer).__name__


def _conclude(found: Closed, layer: nn.Module, name: str, note: dict[str, list], size: tuple[int, bool] | None) -> None:
    if isinstance(layer, nn.Embedding) and note:
        hits, tokens = note["found"], note["tokens"]
        share, mean, false = Interval.share(sum(hits), len(hits)), sum(tokens) / len(tokens), note["false"]
        check = EmbeddingCheck(name, layer.num_embeddings, mean, share, sum(false) / len(false) if false else None)
        found.embeddings.append(check)
    elif isinstance(layer, nn.Linear) and size is not None:
        check = LayerCheck(_shown(name, layer), layer.in_features, layer.out_features, size[1], size[0])
        check.divided, check.alone, check.spanned = (
            Interval.mean(note[k]) if note.get(k) else None for k in ("divided", "alone", "spanned")
        )
        if note.get("rank"):
            check.rank = sum(note["rank"]) / len(note["rank"])
        if note.get("false"):
            check.false_alarms = sum(note["false"]) / len(note["false"])
        found.layers.append(check)


def divided(shared: Shared, layer: str, inputs: Tensor, centre: Tensor) -> float:
    """Share of a layer's inputs that are a row of the weight's gradient over the bias's entry.

    For one input every row is (Geiping et al. 2020, Proposition 3.1); for several, a row whose unit is active for one
    of them alone, which the attacker finds among as many candidates as there are rows. The gradient of both has no
    higher rank than inputs: its nearest neighbour of that rank, which is rid of most of what noise and rounding have
    added, gives as many more. (Of one input that is the most likely one where all entries have the same noise.)

    Args:
        shared: what the attacker sees.
        layer: name of a fully connected layer with bias; "" if the model is the layer.
        inputs: that the layer had `[M, I]`.
        centre: mean of its inputs `[I]`, from which a quotient has to tell an input.

    Returns:
        Between 0 and 1.

    Raises:
        PackextError: if the layer's gradient was not shared, or is not finite.
    """
    parts = [shared.gradient.get(_entry(layer, part)) for part in ("weight", "bias")]
    if any(p is None or not p.isfinite().all() for p in parts):
        raise px.PackextError(f"The gradient of {layer!r} (weight and bias) was not shared, or is not finite.")
    weight, bias = (p.double() for p in parts if p is not None)
    rows = bias != 0
    if not rows.any():
        return 0.0
    candidates, true = weight[rows] / bias[rows, None], inputs.double()
    both, k = torch.cat([weight, bias[:, None]], 1)[rows], len(inputs)
    if k < min(both.shape):
        u, s, v = torch.linalg.svd(both, full_matrices=False)
        near = (u[:, :k] * s[:k]) @ v[:k]
        near = near[:, :-1] / near[:, -1:]
        candidates = torch.cat([candidates, near[near.isfinite().all(1)]])
    # Rows that are rounding error of a gradient that is zero are no candidates for an input of zeros.
    apart = torch.cdist(true, candidates, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    scale = torch.minimum(true.norm(dim=1), (true - centre.double()).norm(dim=1))
    return float((apart < NEAR * scale).double().mean())


def read_off(case: Case, message: Shared, x: Tensor) -> float | None:
    """Share of the clients' inputs that `divided` finds at a layer which sees nothing else.

    Args:
        case: model, data and sharing.
        message: what the attacker sees.
        x: the inputs behind it `[N, ...]`.

    Returns:
        Of the layer that gives most away; None if none that is trained sees them.
    """
    layers = [
        name
        for name, m in case.model.named_modules()
        if isinstance(m, nn.Linear) and m.bias is not None and m.in_features == x[0].numel()
        if m.weight.numel() <= LARGEST and m.weight.requires_grad and m.bias.requires_grad
    ]
    centre = case.x.reshape(len(case.x), -1).double().mean(0)
    seen = inputs_of(case.model, case.by_client(x), layers) if layers else {}
    shares = [divided(message, name, e.flatten(0, -2), centre) for name, e in seen.items() if same(e, x)]
    return max(shares, default=None)


def inputs_of(model: nn.Module, batches: Sequence[Tensor], names: list[str]) -> dict[str, Tensor]:
    """What layers receive on batches, run one by one.

    Args:
        model: stays as it is.
        batches: inputs of the model.
        names: of layers.

    Returns:
        Inputs by layer; of one that is called several times in a run, all of it, and of none that is not called.
    """
    twin = copy.deepcopy(model)
    calls: dict[str, list[Tensor]] = {}
    got: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, kwargs: calls.setdefault(name, []).append(*args, *kwargs.values())

    for name in names:
        twin.get_submodule(name).register_forward_pre_hook(hook(name), with_kwargs=True)
    # Random numbers go on as before: a message that is made next is of the same masks of dropout.
    with torch.random.fork_rng([x.device for x in batches[:1] if x.device.type == "cuda"]), torch.no_grad():
        for x in batches:
            calls.clear()
            twin(x)
            for name, seen in calls.items():
                got.setdefault(name, []).extend(
                    seen if len(seen) == 1 else [c.reshape(-1, *c.shape[-1:]) for c in seen]
                )
    return {name: torch.cat(parts) for name, parts in got.items()}


def same(inputs: Tensor, x: Tensor) -> bool:
    """Whether a layer receives the client's inputs and nothing else, in whatever shape.

    Args:
        inputs: of the layer.
        x: of the model.

    Returns:
        True if they hold the same numbers in the same order.
    """
    return inputs.numel() == x.numel() and bool((inputs.flatten() == x.flatten()).all())
