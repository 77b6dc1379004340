"""Random models against the slow oracles: every result is right, or the model is refused.

One model by hand: `python -m tests.test_fuzz SEED`. Many: `pytest tests/test_fuzz.py --fuzz-models=10000`.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import _columns, _scratch, _statistics, testing
from packext._factored import outer
from packext.rules import convolution
from tests.generator import Problem, generate
from tests.generator_draw import Coupler, Draw, Made
from tests.generator_losses import Whole, flat
from tests.helpers import double_precision

#: Of well-posed models, at most this share may be refused.
REFUSED = 0.05

#: Of all models, at most this share may have tokens taken for samples where samples are coupled (docs/design.md).
MISTAKEN = 0.001


@dataclass
class Outcome:
    """What became of one problem: "right", "refused", "wrong", "crashed" or "void" (not finite).

    "right, coupled": the values of some samples decide which entries of others go on, as sorting does, and every row
    is the gradient of its own sample's loss all the same. "mistaken": samples are coupled, but the outputs have them
    elsewhere than the inputs, and N sets of tokens in their place, which are not.
    """

    seed: int
    kind: str
    ill: str
    label: str
    detail: str = ""

    def __str__(self) -> str:
        return (
            f"{self.kind.upper()} {f'({self.ill}) ' if self.ill else ''}{self.label}\n    {self.detail}\n"
            f"    again: python -m tests.test_fuzz {self.seed}"
        )


@dataclass
class Truth:
    """What the oracles say of one batch."""

    rows: dict[str, Tensor]
    coupled: bool
    grads: dict[str, Tensor | None] = field(default_factory=dict)


class Void(Exception):
    """The problem tells nothing: values overflow, or its samples have no axis of their own."""


def truth(problem: Problem, inputs: Any, targets: Any, n: int) -> Truth:
    """Rows of the Jacobian of the samples' losses, confirmed by the loop over single samples.

    Raises:
        Void: if there is no gradient to speak of, or the outputs break the rule about the batch axis and T = N.
        AssertionError: if a problem that should be well-posed is not.
    """
    model, axis = problem.model, problem.out_axis
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weight = 1.0 if problem.loss.reduction == "sum" else 1 / n

    def part(outputs: Any, sample: int, at: int) -> Tensor:
        alone = [y.narrow(axis, at, 1) for y in flat(outputs)]
        wanted = [t.narrow(axis, sample, 1) for t in targets]
        loss = whole(alone, wanted)
        if problem.aux:
            assert model.aux is not None
            loss = loss + model.aux[at].square().sum()
        return loss * weight

    if _ends_the_process(problem, inputs):
        raise Void
    torch.manual_seed(problem.seed)
    outputs = testing.call(model, inputs)
    if n > 1 and any(_ambiguous(y, n, problem) for y in flat(outputs)):
        raise Void
    total, whole = problem.total(outputs, targets), problem.whole(outputs, targets)
    if not total.requires_grad:
        raise Void
    grads = torch.autograd.grad(total, list(named.values()), retain_graph=True, allow_unused=True)
    couplers = [m for m in model.modules() if isinstance(m, Coupler)]
    couplers = [m for m in couplers if m.seen is not None and m.seen.requires_grad]
    if any(m.folds and m.seen.shape[0] == m.seen.shape[1] for m in couplers):
        raise Void
    seen = [m.seen for m in couplers]
    lists: dict[str, list[Tensor]] = {name: [] for name in named}
    coupled = False
    for sample in range(n):
        loss = part(outputs, sample, sample)
        found = torch.autograd.grad(loss, [*named.values(), *seen], retain_graph=True, allow_unused=True)
        for (name, p), g in zip(named.items(), found, strict=False):
            lists[name].append(torch.zeros_like(p) if g is None else g.to_dense())
        for m, g in zip(couplers, found[len(named) :], strict=True):
            if g is not None:
                others = g.movedim(m.axis, 0)
                coupled |= bool(others[torch.arange(n) != sample].any())
    rows = {name: torch.stack(each) for name, each in lists.items()}
    # Some blocks compute in float32: gradients of the size of its rounding are none to speak of.
    if not all(bool(torch.isfinite(r).all()) for r in rows.values()) or _size(rows) < 1e-5:
        raise Void
    if not problem.ill:
        loop = testing.individual_gradients(
            model,
            lambda y, at: part(y, int(at), 0),
            inputs,
            torch.arange(n),
            problem.axis,
        )
        for name, r in rows.items():
            assert _error(loop[name], r, _size(rows)) < 1e-6, f"the loop disagrees: {name}"
            g = grads[list(named).index(name)]
            g = torch.zeros_like(r[0]) if g is None else g
            assert _error(r.sum(0), g, _size(rows)) < 1e-6, f"rows do not add up: {name}"
    return Truth(rows, coupled, dict(zip(named, grads, strict=True)))


def _ambiguous(y: Tensor, n: int, problem: Problem) -> bool:
    """Whether an output has its samples elsewhere than the inputs, and N entries where they should be."""
    return problem.axis != problem.out_axis and y.dim() > problem.axis and y.shape[problem.axis] == n


def _another_axis(outputs: Any, n: int, problem: Problem) -> bool:
    """Whether an output has its samples elsewhere than the inputs, and where they should be what N divides."""
    axis = problem.axis
    return axis != problem.out_axis and any(y.dim() > axis and y.shape[axis] % n == 0 for y in flat(outputs))


def _size(rows: dict[str, Tensor]) -> float:
    return max((float(r.abs().max()) for r in rows.values() if r.numel()), default=0.0)


def _error(got: Tensor, want: Tensor, size: float) -> float:
    """Largest difference, relative to the largest value, and forgiving beside a much larger `size`."""
    if got.shape != want.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    top = max(float(want.abs().max()), 1e-5 * size, 1e-30)
    error = float((got.detach() - want).abs().max()) / top
    return error if error == error else float("inf")


@contextmanager
def routes(problem: Problem) -> Iterator[None]:
    """Small tiles and other costs, so that small models take every route."""
    d = problem.draw
    suits = d.choice([convolution._suits, lambda *_: True])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_scratch, "TILE", d.choice([1 << 18, 64, 8]))
        patch.setattr(_statistics, "ELEMENTWISE", d.choice([20.0, 0.01, 1e4]))
        patch.setattr(_statistics, "KEEP", d.choice([1 << 18, 1]))
        patch.setattr(outer, "VECTOR", d.choice([1, 2]))
        patch.setattr(convolution, "LARGE", d.choice([1 << 60, 0]))
        patch.setattr(convolution, "_suits", suits)
        yield


@contextmanager
def some_at_once(seed: int) -> Iterator[None]:
    """All columns of a root at once, some, or one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_columns, "LARGEST", (1 << 21, 300, 0)[seed % 3])
        yield


def quantities(problem: Problem) -> tuple[list[Any], list[Any]]:
    """The usual ones with one more, and a random choice of all."""
    d = problem.draw
    others = [
        px.SumGradSquared(),
        px.BatchDotGrad(),
        px.GradHistogram(range=(-0.11, 0.1)),
        px.ProjectedGrad((2, 3), seed=5),
    ]
    clip = px.ClippedGrad(d.choice([0.05, 0.5, 5.0]))
    usual = [px.BatchGrad(), px.BatchL2Grad(), px.Variance(), px.GradDot(), clip]
    return [*usual, d.choice(others)], d.sample([*usual, *others], d.randint(1, 4))


def compare(problem: Problem, model: Any, asked: list[Any], want: Truth, n: int, scale: str) -> str:
    """What is wrong with the results on the parameters; "" if nothing."""
    factor = 1.0 if problem.loss.reduction == "sum" else float(n)
    named = {k: p for k, p in model.named_parameters() if p.requires_grad}
    all_rows, size = want.rows, _size(want.rows)
    if scale == "sample":
        all_rows, factor = {k: r * factor for k, r in all_rows.items()}, 1.0
    for name, p in named.items():
        expected = want.grads[name]
        got = torch.zeros_like(p) if p.grad is None else p.grad
        plain = torch.zeros_like(p) if expected is None else expected
        if _error(got, plain, size) > 1e-6:
            return f"{name}.grad is off by {_error(got, plain, size):.1e}"
        for q in asked:
            label = f"{name}.{q.savefield}"
            if not hasattr(p, q.savefield):
                if all_rows[name].any():
                    return f"{label} is missing"
                continue
            value = getattr(p, q.savefield)
            oracle = testing.ORACLES[type(q)](q, all_rows, name, p.detach(), factor)
            if isinstance(q, px.GradDot) and scale == "sample":  # with the mean, not with the sum
                oracle = oracle / n
            if isinstance(value, px.Histogram):
                moved = int((value.counts - oracle.counts).abs().sum())
                apart = (all_rows[name].flatten()[:, None] - value.grad_edges).abs().amin(1)
                if moved > 2 * int((apart < 1e-9 * size).sum()):  # rounding tells on which side of an edge they are
                    return f"{label} has {moved} entries in other bins"
                continue
            size = _size(all_rows)
            unit = size**2 * p.numel() if q.savefield not in ("grad_batch", "clipped_grad", "grad_projected") else size
            if q.savefield == "clipped_grad":
                unit *= factor
            if _error(value, oracle, unit) > 1e-6:
                return f"{label} is off by {_error(value, oracle, unit):.1e}"
    return ""


def _ends_the_process(problem: Problem, inputs: Any) -> bool:
    """Whether a GroupNorm gets channels_last data that need no gradient: torch 2.13 crashes in its backward pass."""
    found = []

    def look(module: nn.Module, args: Any) -> None:
        found.append(isinstance(module, nn.GroupNorm) and not (args[0].requires_grad or args[0].is_contiguous()))

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        torch.manual_seed(problem.seed)
        testing.call(problem.model, inputs)
    finally:
        hook.remove()
    return any(found)


def examine(seed: int, by_use: bool = False) -> Outcome:
    """Compare packext with the oracles on one random model; `by_use`: without telling where its samples are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        problem = generate(seed)
        with routes(problem), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind, detail = _examine(problem, None if by_use else problem.axis)
    finally:
        torch.set_default_dtype(before)
    return Outcome(seed, kind, problem.ill, problem.label, detail)


def _examine(problem: Problem, axis: int | None) -> tuple[str, str]:
    if axis is None and problem.out_axis != 0:
        return "void", ""
    model = px.extend(copy.deepcopy(problem.model), axis)
    loss = px.extend(copy.deepcopy(problem.loss))
    refused, told = "", True
    for n, t in problem.sizes:
        inputs = problem.inputs(n, t)
        torch.manual_seed(problem.seed)
        with torch.no_grad():
            targets = problem.targets(testing.call(problem.model, inputs))
        try:
            want = truth(problem, inputs, targets, n)
        except Void:
            return "void", ""
        for asked in quantities(problem):
            scale = problem.draw.choice(["loss", "sample"])
            torch.manual_seed(problem.seed)
            model.zero_grad()
            aside = copy.copy(problem)
            aside.model, aside.loss = model, loss
            try:
                with px.backpack(*asked, scale=scale):
                    aside.total(testing.call(model, inputs), targets).backward()
            except px.PackextError as error:
                refused = f"{type(error).__name__}: {error}"
                continue
            except Exception:
                return "crashed", traceback.format_exc()
            wrong = compare(problem, model, asked, want, n, scale)
            if wrong:
                fields = ", ".join(q.savefield for q in asked)
                coupled = "samples are coupled, nothing was said, and " if want.coupled else ""
                elsewhere = want.coupled and _another_axis(testing.call(model, inputs), n, problem)
                kind = "mistaken" if elsewhere else "wrong"
                asked_for = f"asked for {fields} in scale {scale}"
                return kind, f"{coupled}{wrong} (N = {n}, T = {t}, {problem.sizes}, {asked_for})"
            told &= not want.coupled
    if refused:
        return "refused", refused
    return "right" if told else "right, coupled", ""


def test_random_models(request: pytest.FixtureRequest) -> None:
    count, start = (request.config.getoption(k) for k in ("--fuzz-models", "--fuzz-start"))
    outcomes = []
    bad = 0
    began = time.perf_counter()
    for seed in range(start, start + count):
        outcomes.append(examine(seed))
        if outcomes[-1].kind in ("wrong", "crashed"):
            bad += 1
        if count > 1000 and (seed + 1) % 100 == 0:
            _progress(f"{seed + 1 - start} of {count} models, {bad} wrong or crashed", began)
    print("\n" + summary(outcomes))
    failures = [o for o in outcomes if o.kind in ("wrong", "crashed")]
    assert not failures, "\n" + "\n".join(map(str, failures[:20]))
    mistaken = [o for o in outcomes if o.kind == "mistaken"]
    assert len(mistaken) <= MISTAKEN * count, "\n" + "\n".join(map(str, mistaken[:20]))
    well = [o for o in outcomes if not o.ill and o.kind != "void"]
    refused = [o for o in well if o.kind == "refused"]
    assert len(refused) <= REFUSED * len(well), "\n" + "\n".join(map(str, refused[:20]))
    assert len(well) > 0.6 * count


def test_random_models_whose_rows_are_whose_output_uses_them(request: pytest.FixtureRequest) -> None:
    count, start = (request.config.getoption(k) for k in ("--fuzz-models", "--fuzz-start"))
    outcomes = [examine(seed, by_use=True) for seed in range(start, start + count // 4)]
    print("\n" + summary(outcomes))
    bad = [o for o in outcomes if o.kind in ("wrong", "crashed", "mistaken")]
    well = [o for o in outcomes if not o.ill and o.kind != "void"]
    assert not bad, "\n" + "\n".join(map(str, bad[:20]))
    assert sum(o.kind == "refused" for o in well) <= REFUSED * len(well) and len(well) > 0.4 * len(outcomes)


def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = px.BatchL2Grad.result
    monkeypatch.setattr(px.BatchL2Grad, "result", lambda self, ask: right(self, ask) * 1.001)
    kinds = Counter(examine(seed).kind for seed in range(20))
    assert kinds["wrong"] >= 10 and not kinds["right"], kinds


def ggn_diagonals(problem: Problem, inputs: Any, targets: Any) -> dict[str, Tensor] | None:
    """The dense GGN's diagonal, which knows nothing of samples; None where it would be large, or not finite."""
    named = {k: p for k, p in problem.model.named_parameters() if p.requires_grad}
    torch.manual_seed(problem.seed)
    outputs = flat(testing.call(problem.model, inputs))
    live = [y for y in outputs if y.requires_grad]
    count = sum(y.numel() for y in live)
    if not live or count > 150 or not all(bool(y.isfinite().all()) for y in live):
        return None
    at = torch.cat([y.detach().flatten() for y in live]).requires_grad_()
    parts = iter(at.split([y.numel() for y in live]))
    again = [next(parts).view_as(y) if y.requires_grad else y for y in outputs]
    total = sum(problem.loss(y, t) for y, t in zip(again, targets, strict=True))
    slope = torch.autograd.grad(total, at, create_graph=True)[0]
    hessian = torch.stack([
        torch.autograd.grad(s, at, retain_graph=True)[0] if s.requires_grad else torch.zeros_like(at) for s in slope
    ])  # fmt: skip
    joined = torch.cat([y.flatten() for y in live])
    found = [
        torch.autograd.grad(y, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for y in joined
    ]
    jacobians = {k: torch.stack([g[i].flatten() for g in found]) for i, k in enumerate(named)}
    return {k: (j * (hessian @ j)).sum(0).view_as(named[k]) for k, j in jacobians.items()}


def posed(seed: int) -> tuple[Problem, Any, Any] | None:
    """A problem with a batch whose samples are kept apart, and are known; None for others."""
    problem = generate(seed)
    if problem.ill or problem.aux or problem.draws:
        return None
    n, t = problem.sizes[0]
    inputs = problem.inputs(n, t)
    with torch.no_grad():
        outputs = testing.call(problem.model, inputs)
        targets = problem.targets(outputs)
    if n > 1 and any(_ambiguous(y, n, problem) for y in flat(outputs)):
        return None
    return None if _ends_the_process(problem, inputs) else (problem, inputs, targets)


def test_curvature_of_random_models(request: pytest.FixtureRequest) -> None:
    """The diagonal of the GGN is that of the dense one wherever outputs have their samples, or refused."""
    count, start = (request.config.getoption(k) for k in ("--fuzz-models", "--fuzz-start"))
    kinds: Counter[str] = Counter()
    count = max(1, count // 4)
    for seed in range(start, start + count):
        with double_precision(seed), some_at_once(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = posed(seed)
            if found is None:
                continue
            problem, inputs, targets = found
            try:
                want = ggn_diagonals(problem, inputs, targets)
            except RuntimeError as error:  # torch cannot differentiate the loss twice
                kinds[f"no oracle: {str(error)[:60]}"] += 1
                continue
            if want is None or _size(want) < 1e-6:  # or the oracle's rounding counts, where the truth is zero
                continue
            if not all(bool(w.isfinite().all()) for w in want.values()):
                continue
            model, problem.loss = px.extend(copy.deepcopy(problem.model), problem.axis), px.extend(problem.loss)
            torch.manual_seed(problem.seed)
            try:
                with px.backpack(px.DiagGGNExact(), px.BatchDiagGGNExact()):
                    problem.total(testing.call(model, inputs), targets).backward()
            except px.PackextError as error:
                kinds[f"refused: {str(error)[:60]}"] += 1
                continue
            size = _size(want)
            for name, p in model.named_parameters():
                if not hasattr(p, "diag_ggn_exact"):
                    assert not p.requires_grad or not want[name].any(), f"{name} is missing: seed {seed}"
                    continue
                for got in (p.diag_ggn_exact, p.diag_ggn_exact_batch.sum(0)):
                    assert _error(got, want[name], size) < 1e-6, f"{name} is wrong: seed {seed}, {problem.label}"
            kinds["right"] += 1
    print(kinds)
    assert kinds["right"] >= 0.9 * kinds.total() > 0.2 * count, kinds


def curvatures(d: Draw) -> list[list[Any]]:
    """Quantities of curvature, by the pass in which they are asked for."""
    how: dict[str, Any] = {"fisher": d.choice(["exact", "empirical"]), "approx": d.choice(["expand", "reduce"])}
    factors = [px.KFAC(**how, bias=d.choice(["separate", "joint"])), px.EKFAC(**how), px.KFLR()]
    root = [px.DiagGGNExact(), px.BatchDiagGGNExact(), px.SqrtGGNExact(), px.GGNGram(), px.DiagEF()]
    return [root, [d.choice([px.HMP(), px.GGNMP()])], [px.DiagHessian(), px.BatchDiagHessian()], [d.choice(factors)]]


def definitions(whole: Whole, asked: list[Any], problem: Problem, inputs: Any, targets: Any) -> dict[str, list[Any]]:
    """Of each parameter that has them: how each result is read, and what it should be."""
    model, batch = problem.model, (inputs, targets, problem.axis)
    oracles = [testing.CURVATURE_ORACLES[type(q)] for q in asked]
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if isinstance(asked[0], (px.KFAC, px.KFLR)):  # not of values made of parameters, and of those that have factors
        made = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, Made))
        for name in list(named):
            alone = testing.Reference(model, whole, *batch, parameters=[named[name]])
            try:
                oracles[0].wanted(asked[0], alone, name)
            except testing.NoOracle:
                made = (*made, name)
        named = {name: p for name, p in named.items() if not name.startswith(made)}
    ref = testing.Reference(model, whole, *batch, parameters=named.values())
    found: dict[str, list[Any]] = {name: [] for name in named}
    for name in named:
        for oracle, q in zip(oracles, asked, strict=True):
            found[name].append((functools.partial(oracle.read, q, ref), oracle.wanted(q, ref, name)))
    return found


def curvature_outcomes(seed: int) -> Iterator[str]:
    """What became of each pass for quantities of curvature: "right", "refused", "no oracle"; or wrong, and where."""
    found = posed(seed)
    if found is None:
        return
    problem, inputs, targets = found
    outputs = testing.call(problem.model, inputs)
    whole = problem.whole(outputs, targets)
    if not all(map(math.isfinite, whole.shares)) or not problem.total(outputs, targets).requires_grad:
        return  # the loss is zero, or no parameter reaches it
    entries, sizes = sum(p.numel() for p in problem.model.parameters()), sum(t.numel() for t in targets)
    if problem.axis != problem.out_axis or problem.model.form["outputs"] == "record" or entries > 500 or sizes > 60:
        return
    n, d = problem.sizes[0][0], problem.draw
    for asked in curvatures(d):
        together, scale = len(targets) > 1 or d.chance(0.3), d.choice(["loss", "sample"])
        if isinstance(asked[0], (px.KFAC, px.KFLR)):
            scale = "loss"
        try:
            wants = definitions(whole, asked, problem, inputs, targets)
        except (RuntimeError, ValueError):  # torch cannot differentiate it twice, or nothing reaches a parameter
            yield "no oracle"
            continue
        model, aside = px.extend(copy.deepcopy(problem.model), problem.axis), copy.copy(problem)
        aside.loss = px.extend(copy.deepcopy(problem.loss))
        loss = px.extend(copy.deepcopy(whole)) if together else aside.total
        chosen = [model.get_parameter(name) for name in wants]
        keep = isinstance(asked[0], (px.HMP, px.GGNMP))
        if not wants:
            yield "no oracle"
            continue
        try:
            with px.backpack(*asked, parameters=chosen, scale=scale):
                loss(testing.call(model, inputs), targets).backward(retain_graph=keep)
            yield from _differences(model, asked, wants, n if scale == "sample" and whole.reduction == "mean" else 1)
        except px.PackextError as error:
            yield f"refused: {error}"


def _differences(model: nn.Module, asked: list[Any], wants: dict[str, list[Any]], factor: int) -> Iterator[str]:
    """ "right", or what is not: of each parameter `(read, wanted)` for each quantity, times powers of a factor."""
    wrong = False
    for k, q in enumerate(asked):
        results = {name: getattr(p, q.savefield) for name, p in model.named_parameters() if hasattr(p, q.savefield)}
        size = max(float(w.abs().max()) for each in wants.values() for w in each[k][1] if w.numel()) * factor
        if size < 1e-6:  # little but rounding
            continue
        for name, each in wants.items():
            read, wanted = each[k]
            if name not in results:
                if min((float(w.abs().max()) for w in wanted if w.numel()), default=0.0) > 1e-9 * size:
                    wrong = True
                    yield f"{name}.{q.savefield} is missing"
                continue
            for part, (got, w) in enumerate(zip(read(results, name), wanted, strict=True), 1):
                power = part if isinstance(q, px.GGNGram) else 1  # its second part has inner products
                error = _error(got, w * factor**power, size**power)
                if error > 1e-6:
                    wrong = True
                    yield f"{name}.{q.savefield} is off by {error:.1e}: {q!r}"
    if not wrong:
        yield "right"


def test_definitions_of_curvature_of_random_models(request: pytest.FixtureRequest) -> None:
    """Roots, products, the Hessian's diagonal and factors are as their definitions say, or refused."""
    count, start = (request.config.getoption(k) for k in ("--fuzz-models", "--fuzz-start"))
    kinds: Counter[str] = Counter()
    for seed in range(start, start + max(1, count // 6)):
        with double_precision(seed), some_at_once(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for outcome in curvature_outcomes(seed):
                kind = outcome.partition(":")[0]
                assert kind in ("right", "refused", "no oracle"), f"{outcome}: seed {seed}, {generate(seed).label}"
                kinds[outcome[:90]] += 1
    print("\n" + "\n".join(f"{count:>4} x {kind}" for kind, count in kinds.most_common(20)))
    assert kinds["right"] > 0.4 * kinds.total() > 0, kinds


def test_seeds_give_equal_models() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        first, second = generate(7), generate(7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert first.label == second.label and first.sizes == second.sizes
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


def _progress(line: str, began: float) -> None:
    print(f"\r{line}, {time.perf_counter() - began:.0f} s", end="", file=sys.__stderr__, flush=True)


def summary(outcomes: list[Outcome]) -> str:
    """Counts by what was intended and what became of it, and the reasons of refusals."""
    counts = Counter((o.ill or "well-posed", o.kind) for o in outcomes)
    lines = [f"{ill:<16}{kind:<10}{count:>6}" for (ill, kind), count in sorted(counts.items())]
    reasons = Counter(o.detail[:110] for o in outcomes if o.kind == "refused" and not o.ill)
    return "\n".join(lines + [f"{count:>4} x {reason}" for reason, count in reasons.most_common(20)])


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(examine(int(argument)))
