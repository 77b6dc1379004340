"""Rules: each failure is named in a run that has it, with its place, and a run that trains well is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext.diagnostics import RULES, Cockpit, HessMaxEV, Instrument, Verdict, rules
from packext.diagnostics import instruments as seen
from packext.diagnostics._verdict import Judge

INSTRUMENTS = (
    seen.BatchSize, seen.GradNorm, seen.IdleUnits, seen.InitialScale, seen.InputScale, seen.LearningRate, seen.Loss,
    seen.NoiseScale, seen.OutputScale, seen.ParamNorm, seen.SampleLosses, seen.UpdateSize, seen.Untrained,
)  # fmt: skip


def task(n: int = 512) -> tuple[Tensor, Tensor]:
    """Four classes of points in ten dimensions, some of them hard to tell."""
    centres = torch.randn(4, 10)
    y = torch.randint(4, (n,))
    return (centres[y] * 1.2 + torch.randn(n, 10)) / 1.6, y


def net(depth: int = 3, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    widths = [10, *[24] * depth, 4]
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
        nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")  # type: ignore[arg-type]
    nn.init.xavier_normal_(layers[-2].weight)  # type: ignore[arg-type]
    return nn.Sequential(*layers[:-1])


def train(
    model: nn.Module | None = None,
    change: Callable[..., Any] | None = None,
    lr: float = 0.1,
    steps: int = 60,
    n: int = 32,
    data: tuple[Tensor, Tensor] | None = None,
    valid: tuple[Tensor, Tensor] | None = None,
    optimizer: Any = None,
    extra: tuple[Instrument, ...] = (),
    momentum: float = 0.0,
    loss_fn: nn.Module | None = None,
) -> list[Verdict]:
    """Train under the monitor with all rules; what they said."""
    said: list[Verdict] = []

    class Listener:
        def begin(self, names: list[str]) -> int:
            return 0

        def write(self, step: int, values: Any, absent: Any) -> None:
            pass

        def say(self, verdict: Verdict) -> None:
            said.append(verdict)

    x, y = data or task()
    model = px.extend(model if model is not None else net())
    loss_fn = px.extend(loss_fn or nn.CrossEntropyLoss())
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr, momentum=momentum)
    found = [*(kind() for kind in INSTRUMENTS), *extra]
    monitor = Cockpit(model, optimizer, None, sinks=[Listener()], instruments=found)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if change is not None:
            change(step, model)
        if len(order) < n:
            order = torch.randperm(len(x))
        chosen, order = order[:n], order[n:]
        with monitor.step(samples=chosen):
            loss = loss_fn(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if valid is not None and step % 5 == 0:
            with torch.no_grad(), px.disable():
                monitor.log(valid_loss=float(loss_fn(model(valid[0]), valid[1])))
    return said


def first(said: list[Verdict], name: str) -> Verdict:
    found = [v for v in said if v.name == name]
    assert found, (name, [(v.name, v.step) for v in said])
    return found[0]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_nothing_is_said_of_a_run_that_trains_well(optimizer: str) -> None:
    x, y = task(768)
    model = net()
    kinds = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), 0.1),
        "momentum": lambda: torch.optim.SGD(model.parameters(), 0.02, momentum=0.9),
        "adam": lambda: torch.optim.AdamW(model.parameters(), 3e-3),
    }
    said = train(model, data=(x[:512], y[:512]), valid=(x[512:], y[512:]), steps=110, optimizer=kinds[optimizer]())
    assert said == []
    with torch.no_grad(), px.disable():
        assert float(nn.functional.cross_entropy(model(x[512:]), y[512:])) < 0.6


def test_learning_rate_too_high() -> None:
    verdict = first(train(lr=3.0, steps=20), "learning rate too high")
    assert verdict.step <= 10 and "times as long as the parameters" in verdict.evidence


def test_learning_rate_too_low() -> None:
    verdict = first(train(lr=1e-4, steps=52, n=64), "learning rate too low")
    assert verdict.step <= 50 and verdict.until is None


def test_a_warm_up_is_no_rate_too_low() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def warm(step: int, model: Any) -> None:
        optimizer.param_groups[0]["lr"] = 1e-4 * 1.05**step

    assert not any(v.name == "learning rate too low" for v in train(model, warm, optimizer=optimizer, steps=60))


def test_edge_of_stability() -> None:
    x, y = task(64)
    said = train(data=(x, y), n=64, lr=1.0, steps=40, extra=(HessMaxEV(),))
    verdict = first(said, "edge of stability")
    assert "steps are stable up to 2" in verdict.evidence


def test_exploding_gradients_with_the_layers() -> None:
    factor = [1.0]

    def change(step: int, model: Any) -> None:
        if step == 0:
            model[3].register_forward_hook(lambda m, a, out: out.register_hook(lambda g: g * factor[0]) and None)
        factor[0] = 100.0 if step >= 20 else 1.0

    verdict = first(train(net(), change, lr=1e-3, steps=30), "exploding gradients")
    assert verdict.step == 22
    assert verdict.where and {w.split(".")[0] for w in verdict.where} <= {"0", "2"}


def test_vanishing_gradients_with_the_layers() -> None:
    verdict = first(train(net(8, nn.Sigmoid), steps=12), "vanishing gradients")
    assert verdict.where[0] == "0.weight" and "16.weight" not in verdict.where


def test_a_number_that_will_overflow() -> None:
    def change(step: int, model: Any) -> None:
        if step >= 20:
            with torch.no_grad():
                model[4].weight.mul_(1.3)

    verdict = first(train(net(), change, lr=1e-3, steps=40), "NaN about to happen")
    assert verdict.step <= 30 and "4.weight" in verdict.where


def test_an_input_that_is_no_number() -> None:
    x, y = task()
    x[7, 3] = float("nan")
    verdict = first(train(data=(x, y), steps=16), "NaN about to happen")
    assert "of the inputs are NaN or infinite" in verdict.evidence


def test_steps_that_a_scaler_skips_while_it_looks_for_its_factor() -> None:
    x, y = task()
    model, loss_fn = px.extend(net()), px.extend(nn.CrossEntropyLoss())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**23)
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), 0.05))
    overflows = 0
    for _ in range(12):
        with monitor.step():
            with torch.autocast("cpu", torch.float16):
                loss = loss_fn(model(x[:64]), y[:64])
            scaler.scale(loss).backward()
            scaler.step(monitor.optimizer), scaler.update()
            monitor.optimizer.zero_grad()
        overflows += not np.isfinite(monitor.values["GradNorm"])
        assert monitor.verdicts == []
    assert 0 < overflows < 12
    page = {"Loss": 1.0, "GradNorm": np.nan, "ParamNorm": 1.0}
    assert names(rules.NaNAhead(), [page, page]) == []
    assert names(rules.NaNAhead(), [page, {**page, "UpdateSize": np.nan}]) == [("NaN about to happen", 1)]


def test_dead_relus_with_the_layer() -> None:
    model = net()
    with torch.no_grad():
        model[2].bias[:14] -= 50.0
    said = train(model, steps=40, lr=0.03)
    assert first(said, "dead ReLUs").where == ("2.bias",)
    assert first(said, "dead ReLUs").evidence.startswith(f"{100 * 14 / 24:.0f} % of the units of 2.bias")


def test_a_layer_that_does_not_learn() -> None:
    model = net()
    rest = [p for name, p in model.named_parameters() if not name.startswith("2.")]
    optimizer = torch.optim.SGD([{"params": rest}, {"params": model[2].parameters(), "lr": 1e-5}], 0.1)
    assert first(train(model, steps=20, optimizer=optimizer), "layer does not learn").where == ("2.weight",)


def frozen_in_the_middle(model: Any) -> Any:
    model[2].requires_grad_(False)


def detached(model: Any) -> Any:
    model[3].register_forward_hook(lambda m, a, out: out.detach())


@pytest.mark.parametrize(
    ("change", "where", "words", "at"),
    [
        (frozen_in_the_middle, ("2.weight", "2.bias"), "2.weight does not require grad, though layers before it do", 2),
        (detached, ("0.weight", "0.bias", "2.weight", "2.bias"), "0.weight gets no gradient from the loss", 19),
        (
            lambda model: torch.optim.SGD([p for k, p in model.named_parameters() if k != "4.bias"], 0.1),
            ("4.bias",),
            "4.bias is not held by the optimizer.",
            2,
        ),
        (
            lambda model: torch.optim.SGD(
                [{"params": model[:4].parameters()}, {"params": model[4:].parameters(), "lr": 0.0}], 0.1
            ),
            ("4.weight", "4.bias", "6.weight", "6.bias"),
            "4.weight has a learning rate of 0",
            2,
        ),
    ],
)
def test_frozen_by_mistake(change: Callable[[Any], Any], where: tuple[str, ...], words: str, at: int) -> None:
    model = net()
    verdict = first(train(model, optimizer=change(model), steps=at + 3), "frozen by mistake")
    assert verdict.step == at and verdict.where == where and verdict.evidence.startswith(words)


def test_a_moving_average_of_other_layers_is_not_frozen() -> None:
    def average(step: int, model: Any) -> None:
        for own, other in zip(model[2].parameters(), model[4].parameters(), strict=True):
            own.data = 0.9 * own.data + 0.1 * other.data  # which leaves the parameter's version as it is

    model = net(4)
    model[2].requires_grad_(False)
    assert train(model, average, steps=8) == []


def test_a_target_that_is_copied_now_and_then_is_frozen_until_it_has_moved() -> None:
    def copied(step: int, model: Any) -> None:
        if step % 10 == 5:
            model[2].load_state_dict(model[4].state_dict())

    model = net(4)
    model[2].requires_grad_(False)
    said = [str(verdict).partition(",")[0] for verdict in train(model, copied, steps=40)]
    assert len(said) <= 2, said  # once, and that it is over


def test_a_frozen_backbone_and_adapters_are_no_mistake() -> None:
    model = net()
    model[:4].requires_grad_(False)
    assert not any(v.name == "frozen by mistake" for v in train(model, steps=6))
    values = {"Untrained": 2.0, "Untrained/a": 1.0, "Untrained/b": 2.0}
    for share, said in ((0.95, []), (0.3, [("frozen by mistake", 2)])):
        assert names(rules.FrozenByMistake(), [{**values, "Untrained.share": share}] * 4) == said


def test_layers_that_are_left_out_at_times_are_not_frozen() -> None:
    left_out = [[layer for k, layer in enumerate("abcdef") if step % 6 != k] for step in range(60)]
    pages = [{"Untrained": 1.0, **{f"Untrained/{layer}": 5.0 for layer in found}} for found in left_out]
    assert names(rules.FrozenByMistake(), pages) == []
    pages = [{**page, "Untrained/never": 5.0} for page in pages]
    assert names(rules.FrozenByMistake(), pages) == [("frozen by mistake", 19)]


@pytest.mark.parametrize("factor", [255.0, 1e-3])
def test_input_scaling(factor: float) -> None:
    x, y = task()
    assert first(train(data=(x * factor, y), steps=5, lr=1e-3), "bad input scaling").step == 2


@pytest.mark.parametrize("kind", ["large", "small", "alike"])
def test_initialisation(kind: str) -> None:
    model = net()
    with torch.no_grad():
        if kind == "large":
            model[2].weight.mul_(10)
        for k in (0, 2, 4) if kind == "small" else ():
            model[k].weight.mul_(0.01)
        if kind == "alike":
            model[2].weight.fill_(0.2)
    verdict = first(train(model, steps=3, lr=1e-3), "bad initialisation")
    assert verdict.step == 0
    assert verdict.where == {"large": ("2.weight",), "small": ("0.weight", "2.weight", "4.weight"), "alike": ()}[kind]


def test_a_bad_initialisation_that_trains_is_withdrawn() -> None:
    rule, said = rules.BadInitialisation(), []
    judge = Judge([rule])
    for step in range(10):
        start = {"InitialScale/0.weight": 9.0} if step == 0 else {}
        said += judge.hear(step, {"Loss": 2.0 if step < 3 else 0.9, **start})
    assert [(v.step, v.until) for v in said] == [(0, None), (0, 7)]


def test_a_loss_that_does_not_see_the_inputs() -> None:
    x, y = task()
    verdict = first(
        train(data=(x.mean(0).expand(512, 10) + 1e-4 * x, y), steps=15), "loss does not depend on the input"
    )
    assert verdict.step <= 12


def test_wrong_labels_by_sample() -> None:
    x, y = task()
    wrong = torch.randperm(512)[:80]
    y[wrong] = (y[wrong] + torch.randint(1, 4, (80,))) % 4
    model = net()
    with torch.no_grad():
        list(model.parameters())[-2].mul_(0.1)  # the loss begins at log(4), and lines are drawn from there
    verdict = first(train(model, data=(x, y), steps=120, lr=0.15), "label noise")
    named = {int(place.removeprefix("sample ")) for place in verdict.where}
    assert len(named) >= 10 and len(named & set(wrong.tolist())) >= 0.8 * len(named)


def test_overfitting() -> None:
    x, y = task(300)
    small = x[:24], torch.randint(4, (24,))
    optimizer = torch.optim.Adam((model := net()).parameters(), 1e-2)
    assert first(train(model, data=small, valid=(x[24:], y[24:]), n=12, optimizer=optimizer), "overfitting").step <= 60


def test_batch_too_small() -> None:
    x, y = task()
    said = train(data=(x, torch.randint(4, (512,))), n=2, steps=50, lr=0.02)
    assert "The batch has 2 samples" in first(said, "batch too small").evidence


def test_batch_too_large() -> None:
    assert "The batch has 512 samples" in first(train(n=512, steps=14, lr=0.03), "batch wastefully large").evidence


def names(rule: Any, pages: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """What a rule says of pages that nobody measured, and at which step."""
    judge = Judge([rule])
    return [(v.name, v.step) for step, page in enumerate(pages) for v in judge.hear(step, page)]


@pytest.mark.parametrize(
    "losses, said",
    [
        ([1.0] * 9 + [0.95, 0.93, 0.94, 0.91, 0.92, 0.90, 0.89, 0.88, 0.87, 0.86, *[0.7] * 10], False),
        ([1.0, 0.99, 1.01] * 8, True),  # not lower than noise is
        ([1.0, *[1.3] * 3, *[1.0] * 5, 0.95, 0.93, 0.94, 0.91, 0.92, 0.90, 0.89, 0.88], True),  # it had risen
        ([1.0, 1.3, *[1.0] * 7, 0.95, 0.93, 0.94, 0.91, 0.92, 0.90, 0.89, 0.88, *[0.8] * 3], False),  # a single batch
    ],
)
def test_long_steps_of_which_the_loss_falls(losses: list[float], said: bool) -> None:
    pages = [{"Loss": loss, "UpdateSize": 0.15, "ParamNorm": 1.0} for loss in losses]
    found = names(rules.LearningRateTooHigh(), pages)
    assert found[:1] == ([("learning rate too high", 12)] if said else [])


@pytest.mark.parametrize(
    "share, loss, at", [(0.55, 1.0, None), (0.55, 0.8, 17), (0.8, 1.0, None), (0.95, 1.0, 2), (0.45, 0.8, None)]
)
def test_units_that_are_shut_where_samples_look_alike(share: float, loss: float, at: int | None) -> None:
    shut = {"IdleUnits/a": share, "IdleUnits/z": 0.0}
    pages = [{"Loss": 1.0 if step == 0 else loss, **shut} for step in range(60)]
    assert names(rules.DeadReLUs(), pages) == ([] if at is None else [("dead ReLUs", at)])


def test_units_that_are_shut_for_a_while_or_in_a_model_that_has_learned() -> None:
    opened = [
        {"Loss": 0.8 if step else 1.0, "IdleUnits/a": 0.6 * (step % 14 > 0), "IdleUnits/z": 0.0} for step in range(60)
    ]
    assert names(rules.DeadReLUs(), opened) == []
    losses = [1.0, *[0.1] * 19, 0.3, 0.4, 0.3, *[0.1] * 10]  # single losses that jump
    jumping = [{"Loss": v, "IdleUnits/a": 0.95 * (k > 1), "IdleUnits/z": 0.0} for k, v in enumerate(losses)]
    assert names(rules.DeadReLUs(), jumping) == []


@pytest.mark.parametrize("share, loss, at", [(0.6, 0.8, None), (0.95, 0.8, None), (0.95, 1.0, 22)])
def test_units_that_took_part_once_are_seldom_dead(share: float, loss: float, at: int | None) -> None:
    shares = [0.4] * 20 + [share] * 40
    pages = [{"Loss": loss if k else 1.0, "IdleUnits/a": s, "IdleUnits/z": 0.0} for k, s in enumerate(shares)]
    assert names(rules.DeadReLUs(), pages) == ([] if at is None else [("dead ReLUs", at)])


@pytest.mark.parametrize("spread, at", [(0.01, 6), (1.0, None)])
def test_a_first_batch_that_was_low_by_chance(spread: float, at: int | None) -> None:
    quantiles = 1.0 + spread * np.array([-1.0, -1.0, -0.5, 0.0, 0.5, 1.0, 6.0])
    first = {"SampleLosses.quantiles": quantiles, "BatchSize": 64.0}
    pages = [{"Loss": 1.3 if k else 1.0, "UpdateSize": 0.05, "ParamNorm": 1.0, **first} for k in range(40)]
    assert names(rules.LearningRateTooHigh(), pages) == ([] if at is None else [("learning rate too high", at)])


def test_a_first_loss_that_was_high_by_chance_is_no_fall() -> None:
    page = {"UpdateSize": 1e-5, "ParamNorm": 1.0, "GradNorm": 1.0}
    pages = [{"Loss": 1.0 + 0.01 * (k % 3) if k else 1.5, **page} for k in range(60)]
    assert names(rules.LearningRateTooLow(), pages) == [("learning rate too low", 43)]


@pytest.mark.parametrize(
    "norms, at",
    [
        ([5.0] * 20, 32),
        ([3.5] * 20, None),
        ([500.0] + [1.0] * 19, None),  # one hard sample
        ([500.0, 500.0] + [1.0] * 18, None),
        ([1.1**k for k in range(60)], None),  # slowly, as a plateau is left
    ],
)
def test_gradients_that_leap_and_stay(norms: list[float], at: int | None) -> None:
    pages = [{"GradNorm": norm} for norm in [0.7, 1.0] * 15 + norms]
    assert names(rules.ExplodingGradients(), pages) == ([] if at is None else [("exploding gradients", at)])


def test_a_layer_of_which_the_loss_asks_little_is_not_slow() -> None:
    for asked, said in ((1e-3, []), (0.1, [("layer does not learn", 9)])):
        page = {f"{kind}/{k}": 1.0 for kind in ("GradNorm", "ParamNorm", "InitialScale", "UpdateSize") for k in "abc"}
        pages = [page | {"GradNorm/b": asked, "UpdateSize/b": 1e-3} for _ in range(12)]
        assert names(rules.LayerDoesNotLearn(), pages) == said


@pytest.mark.parametrize(
    "factors, at",
    [
        ([1.0] * 30 + [0.03] * 20, 34),
        ([1.0] * 30 + [0.1] * 20, 34),
        ([1.0] * 30 + [0.4] * 20, None),
        ([0.1, 1.0] * 20 + [0.1] * 20, None),  # as small as it often is
        ([0.95**k for k in range(80)], None),  # slowly
        ([1.0] * 30 + [0.0, 0.03] * 10, None),  # another set of layers each time
    ],
)
def test_first_layers_whose_share_falls_at_once(factors: list[float], at: int | None) -> None:
    fixed = {"InitialScale/a": 1.0, "InitialScale/b": 1.0, "InitialScale/c": 1.0}
    fixed |= {"ParamNorm/a": 1.0, "ParamNorm/b": 1.0, "ParamNorm/c": 1.0, "GradNorm/c": 0.5}
    pages = [{"GradNorm/a": 0.8 * f, "GradNorm/b": 1.0 * f, **fixed} for f in factors]
    assert names(rules.VanishingGradients(), pages) == ([] if at is None else [("vanishing gradients", at)])


@pytest.mark.parametrize("valid, every, at", [(0.7, 5, 20), (0.5, 5, None), (0.7, 1, 5)])
@pytest.mark.parametrize("early", [False, True])
def test_what_does_not_hold_for_other_samples(valid: float, every: int, at: int | None, early: bool) -> None:
    said = Judge([rules.Overfitting()])
    found: list[tuple[str, int]] = []
    for step in range(41):
        pages = [{"Loss": max(0.1, 1.0 - 0.2 * step) + 0.001 * (step % 2)}]
        if step % every == 0:
            pages.append({"valid_loss": max(valid, 1.0 - 0.2 * step) + 0.001 * (step % 3)})
        for page in pages[::-1] if early else pages:  # logged within the step, before its loss is known, or after it
            found += [(v.name, v.step) for v in said.hear(step, page)]
    if at is None:
        assert found == []
    else:
        assert found[0][0] == "overfitting" and at <= found[0][1] <= at + early


@pytest.mark.parametrize("slope, said", [(0.0, []), (0.005, []), (-0.02, ["overfitting"])])
def test_a_loss_below_zero_falls_where_it_goes_down(slope: float, said: list[str]) -> None:
    judge, found = Judge([rules.Overfitting()]), []
    for step in range(100):  # of a density: from 1 to -3, and then on, to stay, or up a little
        judge.hear(step, {"Loss": max(-3.0, 1.0 - 0.2 * step) + slope * max(0, step - 40)})
        if step % 2 == 0:
            valid = max(-2.5, 1.0 - 0.2 * step) + 0.02 * max(0, step - 30) + 1e-4 * (step % 3)
            found += [v.name for v in judge.hear(step, {"valid_loss": valid})]
    assert found[:1] == said


def test_a_loss_that_ends_below_zero_has_fallen() -> None:
    steps = {"UpdateSize": 1e-4, "ParamNorm": 5.0, "GradNorm": 1.0}
    for end, said in ((4.0, ["learning rate too low"]), (-4.0, [])):
        pages = [{"Loss": 5.0, **steps}, *[{"Loss": end, **steps}] * 60]
        assert [name for name, _ in names(rules.LearningRateTooLow(), pages)] == said
    for end, said in ((4.0, 1), (-4.0, 2)):  # withdrawn
        pages = [{"Loss": 5.0, "InitialScale/a": 9.0}, *[{"Loss": end}] * 9]
        assert len(names(rules.BadInitialisation(), pages)) == said
    for end, said in ((0.99, 1), (-4.0, 0)):
        pages = [
            {"Loss": end if k else 1.0, "IdleUnits/a": 0.95 if k >= 20 else 0.4, "IdleUnits/z": 0.0} for k in range(60)
        ]
        assert len(names(rules.DeadReLUs(), pages)) == said
    noise = {"NoiseScale": 1e3, "NoiseScale.trace": 1.0, "NoiseScale.signal": 1e-3, "BatchSize": 8.0}
    for end, said in ((6.0, 1), (-6.0, 0)):
        assert len(names(rules.BatchTooSmall(), [{"Loss": end if k else 5.0, **noise} for k in range(160)])) == said
    judge, said_of = Judge([rules.LearningRateTooHigh()]), []
    for step in range(9):
        said_of += judge.hear(step, {"Loss": 3.0 if step else -2.0, "UpdateSize": 1.0, "ParamNorm": 5.0})
    assert "was -2 " in said_of[0].evidence


@pytest.mark.parametrize("n, loss, at", [(3, 1.0, 43), (4, 1.1, 153), (4, 1.0, None), (32, 1.1, 153), (32, 1.0, None)])
def test_a_plateau_at_the_start_is_no_small_batch(n: int, loss: float, at: int | None) -> None:
    noise = {"NoiseScale": 1e3, "NoiseScale.trace": 1.0, "NoiseScale.signal": 1e-3}
    pages = [
        {"Loss": (loss if step else 1.0) + 0.01 * (step % 3), "BatchSize": float(n), **noise} for step in range(160)
    ]
    assert names(rules.BatchTooSmall(), pages) == ([] if at is None else [("batch too small", at)])


def warmed(steps: int, until: int) -> list[dict[str, float]]:
    """A loss that stays where it began in noise, while the rate rises up to some step."""
    found = []
    for step in range(steps):
        rate = 1e-5 * min(step + 1, until)
        page = {"Loss": 1.0 + 0.01 * (step % 3), "LearningRate": rate, "UpdateSize": rate, "ParamNorm": 1.0}
        noise = {"NoiseScale": 1e3, "NoiseScale.trace": 1.0, "NoiseScale.signal": 1e-3, "BatchSize": 3.0}
        found.append({**page, **noise, "GradNorm": 1.0})
    return found


@pytest.mark.parametrize("until, small, low", [(1, 43, 43), (60, 102, 67), (90, 132, 97), (200, None, None)])
def test_nothing_can_be_learned_in_a_warm_up(until: int, small: int | None, low: int | None) -> None:
    pages = warmed(180, until)
    assert names(rules.BatchTooSmall(), pages)[:1] == ([] if small is None else [("batch too small", small)])
    assert names(rules.LearningRateTooLow(), pages)[:1] == ([] if low is None else [("learning rate too low", low)])


# -- runs that go well though something about them is unusual ---------------------------------------------


def test_a_policy_gradient_is_no_label_noise() -> None:
    x, worth = torch.randn(512, 10), torch.randn(512, 4)
    action = torch.randint(4, (512,))
    reward = worth[torch.arange(512), action] + x[torch.arange(512), action]
    y = nn.functional.one_hot(action, 4) * ((reward - reward.mean()) / reward.std())[:, None]
    valid = torch.randn(256, 10), nn.functional.one_hot(torch.randint(4, (256,)), 4).float()
    optimizer = torch.optim.Adam((model := net(2)).parameters(), 3e-3)
    assert train(model, data=(x, y), valid=valid, optimizer=optimizer, steps=160) == []


def test_a_loss_of_both_signs_does_not_tell_what_is_learned() -> None:
    noise = {"NoiseScale": 1e3, "NoiseScale.trace": 1.0, "NoiseScale.signal": 1e-3, "BatchSize": 3.0}
    for least, said in ((-1.0, []), (0.001, [("batch too small", 43)])):
        quantiles = np.array([least, least, least / 2, 0.01, 0.02 - least / 2, 0.02 - least, 0.02 - least])
        page = {"Loss": 0.01, "SampleLosses.quantiles": quantiles, **noise}
        assert names(rules.BatchTooSmall(), [page] * 60) == said


@pytest.mark.parametrize("rest, said", [(0.1, ["label noise"]), (-1.0, [])])
def test_losses_below_zero_have_no_line_above_which_labels_are_wrong(rest: float, said: list[str]) -> None:
    judge, found = Judge([rules.LabelNoise()]), []
    for step in range(60):
        losses = np.array([1.0 + 0.1 * step] * 16 + [rest if step else 1.0] * 48)
        page = {"Loss": 1.0, "BatchSize": 64.0, "SampleLosses": losses[-1], "SampleLosses.largest": losses}
        page |= {
            "SampleLosses.hardest": np.arange(64),
            "SampleLosses.quantiles": np.quantile(losses, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]),
        }
        found += [v.name for v in judge.hear(step, page)]
    assert found[:1] == said


class Difference(nn.Module):
    """Of what a network makes of two halves; the last bias of that network cancels."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.head = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.each(x[:, :5]) - self.each(x[:, 5:])).abs())


def test_a_bias_that_cancels_is_no_dead_relu() -> None:
    assert train(Difference(), steps=14) == []
    for norm, said in ((0.1, []), (0.0, [("dead ReLUs", 2)])):
        page = {"Loss": 1.0, "IdleUnits/a.bias": 1.0, "IdleUnits/z.bias": 0.0, "GradNorm/a.weight": norm}
        assert names(rules.DeadReLUs(), [page] * 5) == said


def test_what_starts_at_zero_and_is_small_does_not_overflow() -> None:
    for size, said in ((1e-3, []), (1.0, [("NaN about to happen", 9)])):
        pages = [{"Loss": 1.0 + 0.3 * bool(step), "ParamNorm": 3.0} for step in range(20)]
        for step, page in enumerate(pages):
            page["ParamNorm/a.bias"] = size * 1.1**step if step else 0.0
        assert names(rules.NaNAhead(), pages)[:1] == said
    for high, said in ((2, []), (3, [("NaN about to happen", 11)])):
        pages = [{"Loss": 1.3 if 0 < step % 4 <= high else 1.0, "ParamNorm/a": 1.2**step} for step in range(12)]
        assert names(rules.NaNAhead(), pages)[:1] == said


def zero_head() -> nn.Sequential:
    model = net(activation=nn.GELU)
    nn.init.zeros_(model[6].weight)  # type: ignore[arg-type]
    return model


def test_weights_that_start_at_zero_do_not_explode() -> None:
    assert train(zero_head(), lr=0.05, momentum=0.9, steps=20) == []
    model = zero_head()
    optimizer = torch.optim.Adam(model.parameters(), 1e-5)

    def warm(step: int, model: Any) -> None:
        optimizer.param_groups[0]["lr"] = 2e-5 * (step + 1)

    assert train(model, warm, optimizer=optimizer, steps=20) == []


@pytest.mark.parametrize("loss, gain, said", [(0.9, 0.6, True), (1.1, 0.0, False), (1.3, 0.0, True)])
def test_what_grows_exponentially(loss: float, gain: float, said: bool) -> None:
    start = {"InitialScale/a": gain, "ParamNorm/a": 1.0}
    pages = [{"Loss": 1.0, **start}, *({"Loss": loss, "ParamNorm/a": 1.2**step} for step in range(1, 20))]
    assert bool(names(rules.NaNAhead(), pages)) is said
    assert names(rules.NaNAhead(), [{"Loss": 1.0}, *({"Loss": 1.3, "GradNorm": 1.07**k} for k in range(20))]) == []
    # What grows by as much in each step, or by as much more, does not; wherever one begins to look.
    for power in (1, 2):
        for begin in (0, 5, 30):
            grown = ({"Loss": 1.3, "ParamNorm/a": float(step + begin) ** power} for step in range(1, 60))
            assert names(rules.NaNAhead(), [{"Loss": 1.0, **start}, *grown]) == []


class Adapted(nn.Module):
    """A layer that stays, and a product of two small matrices beside it, of which the second starts at zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.held = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.held(x) + self.up(self.down(x))


def test_adapters_of_which_half_start_at_zero_learn() -> None:
    model = nn.Sequential(Adapted(10, 64), nn.Tanh(), Adapted(64, 64), nn.Tanh(), Adapted(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def warm(step: int, model: Any) -> None:
        optimizer.param_groups[0]["lr"] = 2e-5 * (step + 1)

    assert train(model, warm, optimizer=optimizer, steps=40) == []


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_beside_a_head_that_is_trained(wrapped: bool) -> None:
    """The head's share in the gradient is much larger than theirs, of which one half starts at zero."""
    layers = [module for k in range(4) for module in (Adapted(10 if k == 0 else 32, 32), nn.ReLU())]
    model: nn.Module = nn.Sequential(*layers, nn.Linear(32, 4))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 3e-3)
    if wrapped:
        model = nn.Sequential(nn.Identity(), model)
    assert train(model, optimizer=optimizer, steps=60) == []


def test_a_frozen_layer_between_square_ones_is_no_adapter() -> None:
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(3)), nn.Linear(10, 4))
    model = nn.Sequential(model[:3], model[3])
    model[0][1].requires_grad_(False)
    assert first(train(model, steps=6), "frozen by mistake").where == ("0.1.weight", "0.1.bias")


@pytest.mark.parametrize("deep", [False, True])
def test_labels_that_are_mostly_chance(deep: bool) -> None:
    x = torch.randn(4000, 20)
    y = (torch.rand(4000, 1) < torch.sigmoid(0.1 * x @ torch.randn(20, 1))).float()
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1)) if deep else nn.Linear(20, 1)
    if not deep:
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3) if deep else torch.optim.SGD(model.parameters(), 0.1)
    assert train(model, data=(x, y), loss_fn=nn.BCEWithLogitsLoss(), optimizer=optimizer, n=32, steps=60) == []


@pytest.mark.parametrize("before, said", [(0.0, [("learning rate too low", 43)]), (3.0, [])])
def test_steps_that_follow_more_than_the_gradient_are_not_blamed_on_the_rate(before: float, said: Any) -> None:
    page = {"Loss": 1.0, "UpdateSize": 1e-4, "ParamNorm": 1.0, "GradNorm": 1.0}
    page |= {"GradNorm.before": before} if before else {}
    assert names(rules.LearningRateTooLow(), [page] * 50) == said


def test_what_is_to_be_told_apart_may_be_little_beside_a_constant() -> None:
    x = torch.randn(512, 10)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    nn.init.constant_(model[2].bias, 1998.0)  # type: ignore[arg-type]
    years = 1998 + 3 * x @ torch.randn(10, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    assert train(model, data=(x, years), loss_fn=nn.MSELoss(), optimizer=optimizer, steps=20) == []


class Ratings(nn.Module):
    """Users and things with vectors of their own, and a number for each: no unit of a layer is among these."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.thing = nn.Embedding(500, 8), nn.Embedding(300, 8)
        self.of_user, self.of_thing = nn.Parameter(torch.zeros(500)), nn.Parameter(torch.zeros(300))
        self.of_all = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        user, thing = x.unbind(1)
        both = 0.1 * (self.user(user) * self.thing(thing)).sum(1)
        return both + self.of_user[user] + self.of_thing[thing] + self.of_all


def test_entries_that_no_sample_asks_for_are_no_dead_units() -> None:
    x = torch.stack([torch.randint(500, (512,)), torch.randint(300, (512,))], 1)
    y, model = 3 + torch.randn(500)[x[:, 0]] + torch.randn(300)[x[:, 1]], Ratings()
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    assert train(model, data=(x, y), loss_fn=nn.MSELoss(), optimizer=optimizer, n=16, steps=20) == []


class Places(nn.Module):
    """Adds positions, learned from numbers between 0 and 1 and fixed ones, to what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(2, 64), nn.Linear(64, 4)
        self.learned, self.fixed = nn.Parameter(torch.rand(5, 64)), nn.Parameter(torch.rand(5, 64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x.view(-1, 5, 2)) + self.learned + self.fixed).mean(1))


def test_positions_are_no_layer() -> None:
    assert train(Places(), steps=4) == []


def test_a_single_layer_may_start_at_zero() -> None:
    model = nn.Linear(10, 4)
    nn.init.zeros_(model.weight)
    assert train(model, steps=4) == []


def test_counts_of_words_are_not_too_small() -> None:
    x, y = torch.zeros(64, 20000), torch.randint(4, (64,))
    for row in x:
        row[torch.randperm(20000)[:40]] = 1.0
    x = nn.functional.normalize(x)
    assert x.square().mean() ** 0.5 < 0.01
    assert train(nn.Linear(20000, 4), data=(x, y), steps=4, n=16) == []
    assert first(train(nn.Linear(20000, 4), data=(1e-2 * x, y), steps=4, n=16), "bad input scaling").step == 2


@pytest.mark.parametrize("every, at", [(10, 9), (5, 9), (10, 5), (1, 9)])
def test_overfitting_is_named_whichever_steps_are_looked_at(every: int, at: int) -> None:
    judge, said = Judge([rules.Overfitting()]), []
    for step in range(200):
        if step % every == 0:
            judge.hear(step, {"Loss": 1.0 / (1 + 0.05 * step)})
        if step % 10 == at:
            said += judge.hear(step, {"valid_loss": 1.0 + 0.003 * (step - 60) * (-1 if step < 60 else 1)})
    assert [v.name for v in said] == ["overfitting"] and said[0].step < 160


@pytest.mark.parametrize("share, words", [(1.0, "100"), (0.996, "100"), (0.44, "44"), (0.0123, "1.2"), (3.5, "350")])
def test_percent(share: float, words: str) -> None:
    [verdict] = Judge([rules.NaNAhead()]).hear(0, {"InputScale.infinite": share, "InputScale": 1.0})
    assert verdict.evidence.startswith(f"{words} % of the inputs")


def test_the_monitor_hears_all_rules_unless_told_otherwise() -> None:
    model = px.extend(net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert {type(rule) for rule in Cockpit(model, optimizer).judge.rules} == set(RULES)
    assert Cockpit(model, optimizer, rules=[]).judge.rules == []


@pytest.mark.parametrize("loss", [float("inf"), float("-inf"), float("nan")])
def test_a_sample_whose_loss_is_no_number_ends_no_run(loss: float) -> None:
    """Of any rule: training may go on with such a sample, and so may the monitor."""
    judge = Judge([kind() for kind in RULES])
    for step in range(80):
        own = np.array([loss if step else 1.0, *[0.1 if step else 1.0] * 3])
        page = {"Loss": 0.5 if step else 1.0, "BatchSize": 4.0, "SampleLosses": 0.1, "SampleLosses.largest": own}
        judge.hear(step, {**page, "SampleLosses.hardest": np.arange(4), "valid_loss": 0.5, "GradNorm": 1.0})
    assert "label noise" not in [verdict.name for verdict in judge.standing.values()]
