"""Rules by hand: numbers made up for one rule each, and what it has to say of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from packext.diagnostics import RULES, Rule, rules
from packext.diagnostics import instruments as seen
from packext.diagnostics._verdict import Judge
from packext.diagnostics.rules._history import Fall


def hear(rule: Rule, pages: list[dict[str, Any]]) -> list[tuple[int, int | None]]:
    judge, said = Judge([rule]), []
    for step, values in enumerate(pages):
        said += judge.hear(step, values)
    return [(v.step, v.until) for v in said]


@pytest.mark.parametrize("kind", RULES)
def test_a_rule_says_nothing_where_what_it_reads_is_absent_or_not_finite(kind: type[Rule]) -> None:
    for missing in (None, *kind.reads):
        judge = Judge([kind()])
        for step in range(60):
            values: dict[str, Any] = {name: 1.0 for name in kind.reads if name != missing}
            values = values if missing else {}
            judge.hear(step, {**values, "Other": 1.0})
        assert not judge.standing
    if kind not in (rules.NaNAhead, rules.FrozenByMistake):  # the first looks for them, the second reads codes
        judge = Judge([kind()])
        for step in range(60):
            names = [part for k in kind.reads for part in (k, f"{k}/a", f"{k}.mean", f"{k}.largest")]
            judge.hear(step, {name: math.nan for name in names if not name.startswith("SampleLosses.")})
        assert not judge.standing


@pytest.mark.parametrize("kind", RULES)
def test_a_rule_is_documented(kind: type[Rule]) -> None:
    assert kind.failure and kind.advice.endswith((".", "(nn.init).")) and kind.__doc__
    assert kind.hold >= 1 and kind.release >= 1
    levels = {i.__name__ for i in seen.LEVELS["full"]} | {"valid_loss"}
    assert set(kind.reads) <= levels, "the levels have what it reads"


def test_a_continued_run_has_no_first_loss() -> None:
    page = {"Loss": 2.0, "UpdateSize": 5.0, "ParamNorm": 1.0}
    assert hear(rules.LearningRateTooHigh(), [page] * 20) == [(12, None)]
    judge = Judge([rules.LearningRateTooHigh()])
    assert not any(judge.hear(100 + step, page) for step in range(20))


def test_the_rate_that_was_too_high_comes_down() -> None:
    page = {"UpdateSize": 0.5, "ParamNorm": 1.0}
    losses = [1.0, *[3.0] * 10, *[0.5] * 20]
    assert hear(rules.LearningRateTooHigh(), [{**page, "Loss": v} for v in losses]) == [(6, None), (6, 22)]


def test_growth_is_exponential_or_nothing() -> None:
    def pages(norms: list[float]) -> list[dict[str, Any]]:
        return [{"InitialScale/w": 1.0, "ParamNorm/w": v} for v in norms]

    assert hear(rules.NaNAhead(), pages([1.1**k for k in range(12)])) == [(8, None)]
    assert hear(rules.NaNAhead(), pages([1.04**k for k in range(12)])) == []
    assert hear(rules.NaNAhead(), pages([1 + 0.3 * k for k in range(12)])) == []
    assert hear(rules.NaNAhead(), pages([1.0, math.inf])) == [(1, None)]


def test_a_layer_in_the_middle_has_not_vanished() -> None:
    def pages(norms: list[float]) -> list[dict[str, Any]]:
        page = {f"GradNorm/{k}": v for k, v in zip("abc", norms, strict=True)}
        return [{**page, **{f"ParamNorm/{k}": 1.0 for k in "abc"}, **{f"InitialScale/{k}": 1.0 for k in "abc"}}] * 6

    assert hear(rules.VanishingGradients(), pages([1e-3, 1e-3, 1.0])) == [(4, None)]
    assert hear(rules.VanishingGradients(), pages([1.0, 1e-3, 1.0])) == []
    assert hear(rules.VanishingGradients(), pages([1e-2, 1.0, 1.0])) == []
    assert hear(rules.VanishingGradients(), pages([0.0, 1.0, 1.0])) == []  # a frozen or dead layer is something else


def logs(valid: Sequence[float], train: Sequence[float]) -> list[dict[str, Any]]:
    """A step with each loss, and a log after it: the k-th log is page 2 k + 1."""
    return [page for v, t in zip(valid, train, strict=True) for page in ({"Loss": t}, {"Loss": t, "valid_loss": v})]


def overfitting(valid: Sequence[float], train: Sequence[float]) -> list[tuple[int, int | None]]:
    return hear(rules.Overfitting(), logs(valid, train))


def test_a_rise_counts_by_what_had_been_learned() -> None:
    def rise(*last: float) -> list[tuple[int, int | None]]:
        valid = [*np.linspace(1, 0.1, 10), *[0.1] * 5, *last]
        return overfitting(valid, [1.0, *np.linspace(0.9, 0.06, len(valid) - 1)])

    assert rise(*[0.18] * 5) == []  # 0.08 of the 0.9 that were learned, though 80 % above the lowest
    assert rise(*[0.20] * 5) == [(39, None)]  # 0.10 of 0.9, with the fifth value
    assert rise(*[0.20] * 4, 0.18) == []  # one of the five is not that high


def test_a_rise_counts_by_the_lowest_value_too() -> None:
    def rise(to: float, loss: float) -> list[tuple[int, int | None]]:
        return overfitting([*[0.9] * 10, *[to] * 5], [1.0, *np.linspace(0.9, loss, 14)])

    assert rise(0.98, 0.6) == []  # 80 % of the 0.1 that were learned, and 9 % above the lowest
    assert rise(1.00, 0.6) == [(29, None)]
    assert rise(1.00, 0.9) == []  # the loss has not fallen


def test_a_rise_counts_by_its_noise() -> None:
    # Values that jump by s to both sides have second differences of 4 s. Two means of five have a standard error of
    # sqrt(2) 4 s / (0.6745 sqrt(30)) = 1.53 s together, and a rise of 0.3 is five of them with s = 0.039.
    loss, jumps = [1.0, *np.linspace(0.9, 0.6, 19)], np.resize([-1.0, 1.0], 20)
    valid = np.array([*[0.7] * 10, *[1.0] * 10])
    assert overfitting((valid + 0.03 * jumps).tolist(), loss) != []
    assert overfitting((valid + 0.05 * jumps).tolist(), loss) == []


def fitted(
    valid: Sequence[float], train: Sequence[float], above: Sequence[int], n: int = 128, kept: int = 16
) -> list[tuple[int, int | None]]:
    """Logs, each after a batch of n samples, of which some have a loss of 9 and all others one of 0.1."""
    pages = logs(valid, train)
    for page, odd in zip(pages[::2], above, strict=True):
        page |= {"BatchSize": float(n), "SampleLosses.largest": np.where(np.arange(kept) < odd, 9.0, 0.1)}
    return hear(rules.Overfitting(), pages)


def test_a_gap_counts_if_samples_are_known_by_heart() -> None:
    valid, train = [0.9, *[0.5] * 9], [1.0, *[0.2] * 9]
    assert fitted(valid, train, [0] * 10) == [(9, None)]  # with the fifth log
    assert fitted(valid, train, [1] * 10) == []  # 5 of 640 have a loss above that of validation: 6.4 - 5 < 2 sqrt(6.4)
    assert fitted(valid, train, [1] * 10, n=256) == [(9, None)]  # 12.8 - 5 > 2 sqrt(12.8)
    assert fitted(valid, train, [0, 0, 4, 0, 0, 0, 0, 0, 0, 0]) == [(15, None)]  # when that batch is the sixth last
    assert fitted(valid, train, [0] * 7 + [4] * 3) == [(9, None), (9, 15)]
    assert fitted(valid, train, [0] * 10, n=79) == []  # of 395 losses none is not surely one in a hundred
    assert fitted(valid, train, [0] * 10, n=80) == [(9, None)]
    assert fitted(valid, train, [16] * 10, n=4096) == []  # how many are above is not known
    assert overfitting(valid, train) == []  # nor here


def test_a_run_whose_validation_is_never_logged_costs_bounded_memory() -> None:
    rule = rules.Overfitting()
    for step in range(1100):
        rule.look(step, {"Loss": 1.0, "BatchSize": 4.0, "SampleLosses.largest": np.ones(4)})
    assert len(rule._hardest) == 1000


def test_a_gap_counts_by_what_there_was_to_learn_and_by_its_noise() -> None:
    def gap(size: float, jump: float = 0.0, first: float = 1.0) -> list[tuple[int, int | None]]:
        valid = 0.49 + jump * np.resize([-1.0, 1.0], 10)
        return fitted([0.9, *valid], [first, *[0.49 - size] * 10], [0] * 11)

    assert gap(0.11) != [] and gap(0.09) == []
    assert gap(0.11, first=0.9) != [] and gap(0.11, first=1.2) == []
    assert gap(0.11, first=0.7) == []  # the loss is more than half of the first
    assert gap(0.3, jump=0.02) != []  # a standard error of 4 * 0.02 / (0.6745 sqrt(30)) = 0.022
    assert gap(0.3, jump=0.1) == []  # of 0.11


def test_a_run_that_diverges_or_jumps_is_not_overfitted() -> None:
    pages: list[dict[str, Any]] = []
    for step, loss in enumerate([*np.linspace(1, 0.4, 50), *0.4 * 1.5 ** np.arange(30)]):
        pages.append({"Loss": float(loss)})
        if step % 5 == 4:  # at the end of a growth that the mean of five losses has not seen
            pages.append({"Loss": float(loss), "valid_loss": 1.5 * float(loss)})
    assert hear(rules.Overfitting(), pages) == []
    for odd in (4.0, math.nan, math.inf):
        assert overfitting([0.9, *[0.5] * 6, odd, *[0.5] * 8], [1.0, *[0.4] * 15]) == []
    assert overfitting([math.nan, *[0.5] * 12, *[0.7] * 5], [1.0, *np.linspace(0.6, 0.45, 17)]) == [(35, None)]


def test_a_continued_run_overfits_by_its_rise_over_the_lowest_value() -> None:
    judge, found = Judge([rules.Overfitting()]), []
    for step, page in enumerate(logs([*[0.5] * 10, *[0.6] * 5], np.linspace(0.4, 0.2, 15).tolist())):
        found += judge.hear(1000 + step, page)
    assert [v.step for v in found] == [1029] and "learned" not in found[0].evidence


def test_gradients_explode_if_three_are_above_all_before() -> None:
    def norms(*odd: float) -> list[tuple[int, int | None]]:
        return hear(rules.ExplodingGradients(), [{"GradNorm": v} for v in (8.0, *[1.0] * 19, *odd, *[1.0] * 9)])

    assert norms(33.0, 33.0) == [] and norms(1e6) == []
    assert norms(33.0, 33.0, 33.0) == [(22, None)]
    assert norms(33.0, 33.0, 31.0) == []  # less than 4 times the largest
    assert norms(33.0, 33.0, 1.0, 33.0) == []
    for ones, said in ((12, []), (13, [(15, None)])):  # too early to say with 12
        assert hear(rules.ExplodingGradients(), [{"GradNorm": v} for v in (*[1.0] * ones, *[1e3] * 3)]) == said


def wrong(*last: float, others: float = 0.1, count: int = 16, n: float = 100.0) -> list[tuple[int, int | None]]:
    """Some of 100 samples, which are named in each batch, go from 0.5 to these in turn from look 30 on."""
    fixed = {"Loss": 1.0, "BatchSize": n, "SampleLosses.hardest": np.arange(100)}
    pages = []
    for step in range(80):
        own = 0.5 if step < 30 else last[(step - 30) % len(last)]
        losses = np.array([own] * count + [others] * (100 - count))
        pages.append({**fixed, "SampleLosses": others, "SampleLosses.largest": losses})
    return hear(rules.LabelNoise(), pages)[:1]


def test_wrong_labels_count_by_what_they_cost() -> None:
    # Of k samples with 2.0 it is 2 k %, with a standard error of 2 sqrt(k) %.
    assert wrong(2.0) == [(31, None)]  # 32 - 24 %, with the second visit above
    assert wrong(2.0, count=15) == wrong(2.0, count=13) == [(32, None)]  # 26 - 21.6 %, and above half of it: the third
    assert wrong(2.0, count=12) == []  # 24 - 20.8 %
    assert wrong(2.0, 2.0, 0.5, count=15) == []  # two visits of three, again and again
    assert wrong(2.0, others=0.6) == []  # nothing has been learned yet
    assert wrong(1.15, count=40) == []  # though they have risen, and come to 46 %: below 1.2
    assert wrong(1.25, count=40) == [(31, None)]
    assert wrong(2.0, n=200.0) == [(32, None)]  # half of the batch is not named, and counts: 16 - 12 %
    assert wrong(2.0, count=13, n=200.0) == []


def test_a_few_samples_that_weigh_more_are_no_wrong_labels() -> None:
    assert wrong(20.0, count=1) == wrong(5.0, count=9) == []  # 20 and 45 % in all 50 looks, of one and of nine samples
    assert wrong(math.inf, count=20) == wrong(math.nan, count=20) == []


def test_a_loss_that_bursts_is_said_at_once() -> None:
    def run(loss: float, update: float) -> list[tuple[int, int | None]]:
        first = {"Loss": 1.0, "UpdateSize": update, "ParamNorm": 1.0}
        return hear(rules.LearningRateTooHigh(), [first, {"Loss": loss, "UpdateSize": 0.001, "ParamNorm": 1.0}])

    assert run(11.0, 0.2) == run(math.inf, 0.2) == run(math.nan, 0.2) == [(1, None)]
    assert run(9.0, 0.2) == run(11.0, 0.05) == run(math.nan, 0.05) == []


def test_a_rate_is_too_low_only_where_the_loss_does_not_fall() -> None:
    def run(losses: np.ndarray, update: float = 1e-4) -> list[tuple[int, int | None]]:
        page = {"UpdateSize": update, "ParamNorm": 1.0, "GradNorm": 1.0}
        return hear(rules.LearningRateTooLow(), [{**page, "Loss": float(v)} for v in losses])

    noise = 0.01 * np.random.default_rng(0).standard_normal(60)
    assert run(1 + noise) == [(43, None)]
    assert run(1 + noise - 0.0015 * np.arange(60)) == []  # by 6 % until look 40, in noise of 1 %
    assert run(1 + noise, update=0.01) == []
    # The first batch is high by chance, and 41 steps of 1e-4 take off 0.4 %; 41 of 3e-3 might have taken off a tenth.
    chance = np.array([1.3, *(1 + noise)])
    assert run(chance) == [(43, None)]
    assert run(chance, update=3e-3) == run(chance, update=4e-3) == []
    assert run(chance[1:], update=9e-4) == [(43, None)]


def test_a_fall_is_told_by_ranks() -> None:
    """Against the sum over all pairs, and Mann's variance."""
    g = np.random.default_rng(1)

    def statistic(values: np.ndarray) -> float:
        pairs = sum(np.sign(a - b) for k, a in enumerate(values) for b in values[k + 1 :])
        n = len(values)
        return float(pairs / math.sqrt(n * (n - 1) * (2 * n + 5) / 18))

    def sure(values: np.ndarray, length: int = Fall.length) -> int | None:
        """After how many values."""
        fall = Fall()
        fall.length = length
        for k, value in enumerate(values):
            fall.add(float(value))
            if fall.sure:
                return k + 1
        return None

    for slope in (0.02, 0.05, 0.2):
        values = np.round(g.standard_normal(120) - slope * np.arange(120), 1)  # with ties
        first = next((n for n in range(2, 121) if statistic(values[:n]) >= 5), None)
        assert sure(values) == first is not None
        assert sure(values, 30) == next((n for n in range(2, 121) if statistic(values[max(0, n - 30) : n]) >= 5), None)
    assert sure(np.exp(np.linspace(0, -9, 14))) is None and sure(np.exp(np.linspace(0, -9, 15))) == 15
    assert sure(np.array([1e9, *g.standard_normal(300)])) is None  # one value, however high, is no trend
    assert sum(sure(g.standard_normal(250)) is not None for _ in range(100)) == 0
    fall = Fall()
    for _ in range(1100):
        fall.add(1.0)
    assert len(fall._values) == Fall.length and not fall.sure
    for value in (math.nan, math.inf, 1.0):
        fall.add(value)
    assert not fall.sure


def test_batches_by_hand() -> None:
    def page(n: float, trace: float, signal: float, loss: float) -> dict[str, Any]:
        return {"NoiseScale.trace": trace, "NoiseScale.signal": signal, "BatchSize": n, "Loss": loss}

    assert hear(rules.BatchTooSmall(), [page(3.0, 40.0, 1.0, 1.0)] * 50) == [(43, None)]
    assert hear(rules.BatchTooSmall(), [page(3.0, 40.0, -1.0, 1.0)] * 50) == [(43, None)]
    assert hear(rules.BatchTooSmall(), [page(3.0, 12.0, 1.0, 1.0)] * 50) == [(43, None)]
    assert hear(rules.BatchTooSmall(), [page(3.0, 11.0, 1.0, 1.0)] * 50) == []
    # Of 4 and more: after 150 looks, of a loss that has risen.
    risen = [page(4.0, 40.0, 1.0, 1.0), *[page(4.0, 40.0, 1.0, 1.06)] * 160]
    assert hear(rules.BatchTooSmall(), risen) == [(153, None)]
    assert hear(rules.BatchTooSmall(), [page(4.0, 40.0, 1.0, 1.0)] * 160) == []
    learned = [page(3.0, 40.0, 1.0, 1.0), *[page(3.0, 40.0, 1.0, 0.1)] * 60]
    assert hear(rules.BatchTooSmall(), learned) == []
    # A loss that falls is learned through the noise, and one that falls no more has been.
    falls = [page(3.0, 40.0, 1.0, 1 - 0.01 * k) for k in range(20)]
    assert hear(rules.BatchTooSmall(), [*falls, *[page(3.0, 40.0, 1.0, 0.8)] * 60]) == []
    assert hear(rules.BatchTooSmall(), [*falls[:10], *[page(3.0, 40.0, 1.0, 0.9)] * 60]) == [(43, None)]
    assert hear(rules.BatchTooLarge(), [page(256.0, 30.0, 1.0, 1.0)] * 20) == [(11, None)]
    assert hear(rules.BatchTooLarge(), [page(256.0, 40.0, 1.0, 1.0)] * 20) == []
    assert hear(rules.BatchTooLarge(), [page(64.0, 1.0, 1.0, 1.0)] * 20) == []


def test_units_that_learning_shuts_one_after_the_other() -> None:
    def shut(last: float, leap: int = 0) -> list[tuple[int, int | None]]:
        """A layer shuts by and by, up to a share; or at once, after the loss has leaped and stays there."""
        pages: list[dict[str, Any]] = []
        for step in range(80):
            share = min(last, 0.025 * (step - 1)) if leap < 1 or step >= leap + 10 else 0.1
            pages.append({"Loss": 1.0 if step == 0 else 1.5 if 0 < leap <= step else 0.6})
            if step >= 9:
                pages[-1] |= {"IdleUnits/a": share, "IdleUnits/z": 0.0}
        return hear(rules.DeadReLUs(), pages)

    assert shut(0.8) == []
    assert shut(0.95) == []
    assert shut(0.8, leap=40) == []
    assert shut(0.95, leap=40) == [(52, None)]


def test_label_noise_keeps_a_bounded_memory() -> None:
    class Small(rules.LabelNoise):
        memory = 10

    rule = Small()
    for step in range(20):
        page = {"SampleLosses": 0.1, "Loss": 1.0, "BatchSize": 4.0, "SampleLosses.largest": np.ones(4)}
        rule.look(step, {**page, "SampleLosses.hardest": np.arange(4) + 4 * step})
    assert len(rule._visits) == 10
