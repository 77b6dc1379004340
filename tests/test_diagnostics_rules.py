"""Rules: each failure is named in a run that has it, with its place, and a run that trains well is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    loss_fn = px.extend(nn.CrossEntropyLoss())
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
    assert verdict.step == 20
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


def test_dead_relus_with_the_layer() -> None:
    model = net()
    with torch.no_grad():
        model[2].bias[:14] -= 50.0
    said = train(model, steps=25)
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
    ("change", "where", "words"),
    [
        (frozen_in_the_middle, ("2.weight", "2.bias"), "2.weight does not require grad, though layers before it do"),
        (detached, ("0.weight", "0.bias", "2.weight", "2.bias"), "0.weight gets no gradient from the loss"),
        (
            lambda model: torch.optim.SGD([p for k, p in model.named_parameters() if k != "4.bias"], 0.1),
            ("4.bias",),
            "4.bias is not held by the optimizer.",
        ),
        (
            lambda model: torch.optim.SGD(
                [{"params": model[:4].parameters()}, {"params": model[4:].parameters(), "lr": 0.0}], 0.1
            ),
            ("4.weight", "4.bias", "6.weight", "6.bias"),
            "4.weight has a learning rate of 0",
        ),
    ],
)
def test_frozen_by_mistake(change: Callable[[Any], Any], where: tuple[str, ...], words: str) -> None:
    model = net()
    verdict = first(train(model, optimizer=change(model), steps=5), "frozen by mistake")
    assert verdict.step == 2 and verdict.where == where and verdict.evidence.startswith(words)


def test_a_frozen_backbone_and_adapters_are_no_mistake() -> None:
    model = net()
    model[:4].requires_grad_(False)
    assert not any(v.name == "frozen by mistake" for v in train(model, steps=6))
    rule = rules.FrozenByMistake()
    values = {"Untrained": 2.0, "Untrained/a": 1.0, "Untrained/b": 2.0}
    assert rule.look(0, {**values, "Untrained.share": 0.95}) is None
    assert rule.look(0, {**values, "Untrained.share": 0.3}).where == ("b",)  # type: ignore[union-attr]


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
    verdict = first(train(data=(x, y), steps=120, lr=0.15), "label noise")
    named = {int(place.removeprefix("sample ")) for place in verdict.where}
    assert len(named) >= 10 and len(named & set(wrong.tolist())) >= 0.8 * len(named)


def test_overfitting() -> None:
    x, y = task(300)
    small = x[:24], torch.randint(4, (24,))
    optimizer = torch.optim.Adam((model := net()).parameters(), 1e-2)
    assert first(train(model, data=small, valid=(x[24:], y[24:]), n=12, optimizer=optimizer), "overfitting").step <= 60


def test_batch_too_small() -> None:
    x, y = task()
    said = train(data=(x, torch.randint(4, (512,))), n=4, steps=50, lr=0.02)
    assert "The batch has 4 samples" in first(said, "batch too small").evidence


def test_batch_too_large() -> None:
    assert "The batch has 512 samples" in first(train(n=512, steps=14, lr=0.03), "batch wastefully large").evidence


def names(rule: Any, pages: list[dict[str, float]]) -> list[tuple[str, int]]:
    """What a rule says of pages that nobody measured, and at which step."""
    judge = Judge([rule])
    return [(v.name, v.step) for step, page in enumerate(pages) for v in judge.hear(step, page)]


@pytest.mark.parametrize(
    "losses, said",
    [
        ([1.0] * 9 + [0.95, 0.93, 0.94, 0.91, 0.92, 0.90, 0.89, 0.88, 0.87, 0.86, *[0.7] * 10], False),
        ([1.0, 0.99, 1.01] * 8, True),  # not lower than noise is
        ([1.0, 1.3, *[1.0] * 7, 0.95, 0.93, 0.94, 0.91, 0.92, 0.90, 0.89, 0.88], True),  # it had risen
    ],
)
def test_long_steps_of_which_the_loss_falls(losses: list[float], said: bool) -> None:
    pages = [{"Loss": loss, "UpdateSize": 0.15, "ParamNorm": 1.0} for loss in losses]
    found = names(rules.LearningRateTooHigh(), pages)
    assert found[:1] == ([("learning rate too high", 12)] if said else [])


@pytest.mark.parametrize("share, loss, at", [(0.55, 1.0, 31), (0.55, 0.8, 3), (0.8, 1.0, 2), (0.45, 0.8, None)])
def test_units_that_are_shut_where_samples_look_alike(share: float, loss: float, at: int | None) -> None:
    shut = {"IdleUnits/a": share, "IdleUnits/z": 0.0}
    pages = [{"Loss": 1.0 if step == 0 else loss, **shut} for step in range(60)]
    assert names(rules.DeadReLUs(), pages) == ([] if at is None else [("dead ReLUs", at)])


@pytest.mark.parametrize("n, at", [(4, 43), (31, 43), (32, 153)])
def test_a_plateau_at_the_start_is_no_small_batch(n: int, at: int) -> None:
    noise = {"NoiseScale": 1e3, "NoiseScale.trace": 1.0, "NoiseScale.signal": 1e-3}
    pages = [{"Loss": 1.0 + 0.01 * (step % 3), "BatchSize": float(n), **noise} for step in range(160)]
    assert names(rules.BatchTooSmall(), pages) == [("batch too small", at)]


def test_the_monitor_hears_all_rules_unless_told_otherwise() -> None:
    model = px.extend(net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert {type(rule) for rule in Cockpit(model, optimizer).judge.rules} == set(RULES)
    assert Cockpit(model, optimizer, rules=[]).judge.rules == []
