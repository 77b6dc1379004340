"""What defences would change: leakage, next to what is left of the training, next to time."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor

import packext as px
from packext.attacks import (
    GaussianMisfit,
    LaplacianMisfit,
    MaximumPosterior,
    Misfit,
    Prior,
    RoundingMisfit,
    Shared,
    count_accuracy,
    guessed,
    sent,
    share,
)
from packext.audit.case import Case, Clock, Utility
from packext.audit.closed import read_off
from packext.audit.inversion import affordable, attempt, guess, searchable, searches_for, seeded
from packext.audit.inversion import candidates as others
from packext.audit.labels import rules_for
from packext.audit.records import fitting_clip
from packext.audit.section import Section
from packext.audit.sharing import clip_of, fresh, name_of
from packext.defences import (
    Clipped,
    Compose,
    GaussianNoise,
    LaplacianNoise,
    Pruning,
    Quantisation,
    Soteria,
    TopK,
    replaces_share,
)

#: Batches for labels and for the direction of the gradient; alternations for its time, within 0.25 s or so.
DRAWS, TURNS = 5, 40

#: Operations, or so, for the decomposition of the candidates that a prior is made of.
EFFORT = 2e9

#: Defences that set entries to zero: who knows of them does not match these.
ZEROS = (Pruning, TopK, Soteria)

#: Defences that may be set to a level at which they do nothing.
NOISES = (GaussianNoise, LaplacianNoise)


@dataclass
class Defended:
    """One defence.

    Attributes:
        name: what the client does.
        adapted: whether one of the searches knows of the defence, see `known`.
        labels: share of the labels that the best rule counts at the real batch size, mean over draws.
        rule: which one.
        guess: of the same labels.
        divided: share of the inputs that are read off a layer which sees them, by division, at the real batch size,
            mean over draws; None where no layer does.
        psnr: in dB, of one sample by itself, the best of the searches, mean over seeds.
        psnr_best: the attacker's best seed.
        recovered: seeds whose input was recovered (see `SearchResult`).
        seeds: searched.
        signal: cosine of what is shared and the undefended gradient, at the real batch size, mean over draws.
        accuracy: of a training with the defence; None if no way to train was given.
        time: of a client's call over that without a defence, the processor's, or for a model on a GPU the clock's;
            median of alternations. Of clipping that of a step of `packext.optim.DPSGD`.
    """

    name: str
    adapted: bool = False
    labels: float | None = None
    rule: str | None = None
    guess: float | None = None
    divided: float | None = None
    psnr: float | None = None
    psnr_best: float | None = None
    recovered: int = 0
    seeds: int = 0
    signal: float | None = None
    accuracy: float | None = None
    time: float | None = None


@dataclass(kw_only=True)
class Sweep(Section):
    """Defences next to each other.

    Attributes:
        rows: of defences, the first without one.
        iterations: of the searches, of which the best counts; of that for the most probable input, where a defence adds
            noise or rounds.
        psnr_guess: in dB, of who guesses the mean of all candidates, mean over them.
    """

    rows: list[Defended] = field(default_factory=list)
    iterations: dict[str, int] = field(default_factory=dict)
    psnr_guess: float | None = None


def sweep(case: Case, clock: Clock, utility: Utility | None = None) -> Sweep:
    """Attack several defences.

    Args:
        case: model, data and sharing.
        clock: of the section.
        utility: trains with a way to share, called as `packext.attacks.share`, and returns the accuracy.

    Returns:
        A row for each defence.
    """
    found = Sweep()
    if utility is None:
        found.absent["accuracy"] = "no way to train with a defence was given: pass utility="
    defences = candidates(case, found)
    base: dict[str, Any] = {"nothing": lambda shared: shared}
    every = base | defences
    for k, (name, defence) in enumerate(every.items()):
        clock.tell(k / len(every) / 2)
        # Vectors that are searched for in place of tokens are none of the inputs that the prior is made of.
        row = Defended(name, adapted=not k or (known(defence) and (case.continuous or not misfit_of(defence))))
        with found.unless_refused(f"{name}: cosine"):
            row.signal = _signal(case, defence)
        with found.unless_refused(f"{name}: time"):
            row.time = _time(case, defence)
        with found.unless_refused(f"{name}: labels"):
            _labels(case, defence, row)
        with found.unless_refused(f"{name}: inputs by division"):
            _divided(case, defence, row)
        if utility is not None:
            with found.unless_refused(f"{name}: accuracy"):
                row.accuracy = _accuracy(utility(local(defence)))
        found.rows.append(row)
    with found.unless_refused("reconstruction"):
        searchable(case)
        rest = Clock(max(clock.seconds / 2, clock.left), lambda done: clock.tell(0.5 + done / 2))
        _reconstruct(case, rest, every, found)
    clock.tell(1.0)
    return found


def _accuracy(value: Any) -> float:
    if not 0 <= (accuracy := float(value)) <= 1:
        raise px.PackextError(f"utility(share) returns an accuracy from 0 to 1, and returned {accuracy}.")
    return accuracy


def known(defence: Any) -> bool:
    """Whether a search knows of all that a defence does to what is shared.

    Args:
        defence: of a client, or several by `Compose`.

    Returns:
        True of clipping, of entries set to zero, and of what `misfit_of` has; not of entries set to zero under noise,
        which nobody sees, nor of several that add noise or round.
    """
    parts = [*_parts(defence)]
    blurs = [k for k, part in enumerate(parts) if misfit_of(part) is not None]
    none = all(isinstance(part, (Clipped, *ZEROS, *NOISES)) for k, part in enumerate(parts) if k not in blurs)
    hidden = any(isinstance(part, ZEROS) for part in parts[: max(blurs, default=0)])
    return none and len(blurs) < 2 and not (hidden and not isinstance(parts[blurs[0]], Quantisation))


def misfit_of(defence: Any) -> Misfit | None:
    """What an attacker who knows a defence knows of the difference that it makes to the gradient of one sample.

    Args:
        defence: of a client; of several, the first that adds noise or rounds counts.

    Returns:
        None if it adds no noise and does not round.
    """
    for part in _parts(defence):
        if isinstance(part, Clipped) and part.noise_multiplier:
            return GaussianMisfit(part.noise_multiplier * part.max_norm)
        if isinstance(part, GaussianNoise) and part.std:
            return GaussianMisfit(part.std)
        if isinstance(part, LaplacianNoise) and part.scale:
            return LaplacianMisfit(part.scale)
        if isinstance(part, Quantisation):
            return RoundingMisfit(part.kind, part.stochastic)
    return None


def _parts(defence: Any) -> Sequence[Any]:
    return defence.defences if isinstance(defence, Compose) else (defence,)


def candidates(case: Case, found: Sweep) -> dict[str, Any]:
    """Defences at levels that fit the model's own gradient.

    Args:
        case: model, data and sharing.
        found: where it is noted why there are none of a kind.

    Returns:
        The audited one, if there is one, and others, by name.
    """
    made: dict[str, Any] = {}
    if case.sharing.defence is not None:
        made[f"as audited: {name_of(case.sharing.defence)}"] = case.sharing.defence
    with found.unless_refused("noise"):
        drawn = [case.draw(60 + k, case.sharing.held) for k in range(DRAWS)]
        whole = [_flat(case.client(case.x[index], case.y[index], defended=False)) for index in drawn]
        rms = statistics.median(float(g.square().mean().sqrt()) for g in whole)  # of one batch it may be anything
        made |= {f"noise of {level:g} x RMS": GaussianNoise(level * rms, seed=case.seed) for level in (0.1, 1.0)}
    made |= {"pruning 90 %": Pruning(0.9), "8 bits": Quantisation("int8")}
    if case.sharing.local is not None:
        found.absent["clipping"] = "it is of one gradient, and what is shared is an update of several local steps"
        return made
    with found.unless_refused("clipping"):
        each = [case.client(case.x[i, None], case.y[i, None], defended=False) for i in case.draw(51, 32).tolist()]
        norms = torch.stack([_flat(one).norm() for one in each])
        clip = fitting_clip(norms) or float(norms.max())  # of a model that has learnt most samples: of those it has not
        for noise in (0.0, 0.1, 1.0):
            made[f"clip {clip:.2g}" + (f", noise x {noise:g}" if noise else "")] = Clipped(clip, noise, seed=case.seed)
    return made


def _flat(shared: Shared) -> Tensor:
    return torch.cat([g.flatten().double() for g in shared.gradient.values()])


def local(defence: Any) -> Callable[..., Shared]:
    """A way to share, called as `packext.attacks.share`, with a defence that remembers as a client's does.

    Args:
        defence: of either kind.

    Returns:
        The way.
    """
    own = fresh(defence, 0)
    return own if replaces_share(defence) else lambda *args, **kwargs: own(share(*args, **kwargs))


def _signal(case: Case, defence: Any) -> float:
    cosines = []
    for k in range(DRAWS):
        index = case.draw(60 + k, case.sharing.behind)
        pair = []
        for how in ({"defence": defence}, {"defended": False}):
            case.begin(60 + k)  # each: with dropout, two messages would be of other masks
            pair.append(case.message(case.x[index], case.y[index], **how))
        a, b = map(_flat, pair)
        cosines.append(float(a @ b / (a.norm() * b.norm()).clamp_min(1e-300)))
    return statistics.mean(cosines)


def _time(case: Case, defence: Any) -> float:
    """Median of ratios of neighbours in time; of processor time, which other processes on the machine disturb less."""
    index = case.draw(70, case.sharing.held)
    x, y = case.x[index], case.y[index]

    whole = isinstance(defence, Clipped) and case.sharing.local is None
    step = _private_step(case, defence, x, y) if whole else lambda: case.client(x, y, defence=defence)

    def spent(call: Callable[[], Any]) -> float:
        on_gpu = x.device.type == "cuda"
        now = perf_counter if on_gpu else process_time
        start = now()
        call()
        if on_gpu:
            torch.cuda.synchronize(x.device)
        return now() - start

    ratios: list[float] = []
    clock = Clock(0.25)
    # How often they are called is a matter of time, and moves the random numbers of nothing else.
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        while clock.go_on(len(ratios), TURNS) or len(ratios) < 6:
            plain = spent(lambda: case.client(x, y, defended=False))
            ratios.append(spent(step) / max(plain, 1e-9))
    return statistics.median(ratios[1:])  # the first calls do what is done once


def _private_step(case: Case, defence: Clipped, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A training's step with this clipping; `Clipped` itself copies the model and probes it in each call."""
    model, loss_fn = px.extend(copy.deepcopy(case.model)), px.extend(copy.deepcopy(case.loss_fn))
    optimizer = px.optim.DPSGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=1e-12,
        max_norm=defence.max_norm,
        noise_multiplier=defence.noise_multiplier,
        expected_batch_size=float(len(x)),
    )

    def step() -> None:
        optimizer.zero_grad()
        with px.optim.emit(optimizer):
            loss_fn(model(x), y).backward()
        optimizer.step()

    return step


def _labels(case: Case, defence: Any, row: Defended) -> None:
    scores: dict[str, list[float]] = {}
    guesses, refused = [], None
    rules = rules_for(case, {})
    for k in range(DRAWS):
        case.begin(80 + k)
        index = case.draw(80 + k, case.sharing.behind)
        x, y = case.x[index], case.y[index]
        message = case.as_gradient(case.message(x, y, defence=defence))
        guesses.append(guessed(y, case.classes, case.frequencies))
        for name, rule in rules.items():
            try:
                scores.setdefault(name, []).append(count_accuracy(rule(case.model, message), y))
            except px.PackextError as error:
                refused = error
    row.guess = statistics.mean(guesses)
    means = {name: statistics.mean(v) for name, v in scores.items() if len(v) == DRAWS}
    if not means and refused is not None:
        raise refused
    row.rule = max(means, key=lambda name: means[name])
    row.labels = means[row.rule]


def _divided(case: Case, defence: Any, row: Defended) -> None:
    shares = []
    for k in range(DRAWS):
        case.begin(80 + k)
        index = case.draw(80 + k, case.sharing.behind)
        message = case.message(case.x[index], case.y[index], defence=defence)
        shares.append(read_off(case, message, case.x[index]))
    row.divided = statistics.mean(v for v in shares if v is not None) if None not in shares else None


def _reconstruct(case: Case, clock: Clock, every: dict[str, Any], found: Sweep) -> None:
    """Searches on a message of one sample, for each defence in turn, so that all have seen the same seeds.

    Only those that get anywhere without a defence go on, and the one that is blind to a factor, such as clipping is.
    Where noise was added, or entries were rounded, what they find is where the search for the most probable starts.
    """
    planned, found.psnr_guess = min(5, case.budget.seeds), guess(case)
    misfits = {name: misfit_of(defence) if case.continuous else None for name, defence in every.items()}
    told = [name for name, misfit in misfits.items() if misfit is not None]
    seconds = clock.seconds / ((len(every) + len(told)) * min(3, planned))
    searches = {name: affordable(case, a, 1, seconds) for name, a in searches_for(case, found.absent).items()}
    x, y = (t[case.draw(100, 1)] for t in (case.x, case.y))
    plain = case.client(x, y, defended=False)
    reached = {name: float(attempt(case, seeded(a, case.seed, None), plain, x, y).psnr) for name, a in searches.items()}
    kept = {max(reached, key=lambda name: reached[name]), *(n for n, a in searches.items() if not isinstance(a, tuple))}
    searches = {name: a for name, a in searches.items() if name in kept}
    found.iterations = {name: (a[0] if isinstance(a, tuple) else a).iterations for name, a in searches.items()}
    low, high = case.bounds()
    steps = max(2, max(found.iterations.values()) // 20)  # each of up to 20: as long as Inverting Gradients
    probable = MaximumPosterior(GaussianMisfit(1.0), None, (), steps, low, high, None, case.sharing.local)
    if told:
        found.iterations["Maximum posterior"] = steps
    ratios: dict[str, list[float]] = {name: [] for name in every}
    hits = dict.fromkeys(every, 0)
    seed = 0
    while clock.go_on(seed, planned):
        x, y = (t[case.draw(100 + seed, 1)] for t in (case.x, case.y))
        prior = expected(case, x) if told else None
        for name, defence in every.items():
            with found.unless_refused(f"{name}: reconstruction"):
                case.begin(100 + seed)
                message = case.client(x, y, defence=defence)
                mask = sent(message) if any(isinstance(part, ZEROS) for part in _parts(defence)) else None
                begun = [seeded(a, case.seed + 1000 * seed, clip_of(defence)) for a in searches.values()]
                tried = [attempt(case, a, message, x, y, mask) for a in begun]
                if (misfit := misfits[name]) is not None:
                    starts = [one.found for one in tried]
                    rounds = isinstance(misfit, RoundingMisfit)  # to cells, beside which a prior weighs nothing
                    last = replace(
                        probable,
                        misfit=misfit,
                        prior=None if rounds else prior,
                        starts=starts,
                        clip=clip_of(defence),
                    )
                    tried.append(attempt(case, last, message, x, y, mask))
                ratios[name].append(max(float(one.psnr) for one in tried))
                hits[name] += any(bool(one.recovered) for one in tried)
        seed += 1
    for row in found.rows:
        seen = ratios[row.name]
        if seen:
            row.psnr, row.psnr_best, row.seeds = statistics.mean(seen), max(seen), len(seen)
            row.recovered = hits[row.name]


def expected(case: Case, x: Tensor) -> Prior | None:
    """What an attacker who has the candidates expects of one that they have not.

    Args:
        case: model, data and sharing.
        x: the client's `[1, ...]`, which is left out.

    Returns:
        The prior, of fewer candidates where a decomposition of all would take long; None where they do not vary.
    """
    rest = others(case)
    rest = rest[(rest != x).flatten(1).any(1)]
    rest = rest[: max(2, int((EFFORT / x.numel()) ** 0.5))]
    return Prior.of(rest) if len(rest) > 1 and bool((rest != rest[0]).any()) else None
