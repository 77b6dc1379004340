"""One contract for all controllers."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import optim
from tests.control_cases import CASES, EACH, LOSS, NAMES, flat, give, plain, sgd, step
from tests.test_optim import data, network

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_from_a_saved_state(name: str) -> None:
    model = network()
    optimizer = sgd(model)
    control = CASES[name][0](optimizer)
    for seed in range(3):
        step(name, control, model, optimizer, data(seed))
    file = io.BytesIO()
    kept = control.state_dict()
    then = plain(kept)
    torch.save([model.state_dict(), optimizer.state_dict(), kept], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = network(7)
    other_optimizer = sgd(others)
    other = CASES[name][0](other_optimizer)
    for loaded, state in zip((others, other_optimizer, other), saved, strict=True):
        loaded.load_state_dict(state)
    for seed in range(3, 6):
        step(name, control, model, optimizer, data(seed))
        step(name, other, others, other_optimizer, data(seed))
    assert plain(control.state_dict()) == plain(other.state_dict()) != plain(kept)
    assert plain(kept) == plain(saved[2]) == then
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), others.parameters(), strict=True))
    with pytest.raises(ValueError, match=f"{name}.* has the state .*, got wrong: it is of another controller"):
        control.load_state_dict({"wrong": 1})


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_finite_is_skipped(name: str) -> None:
    model = network()
    optimizer = sgd(model)
    control = CASES[name][0](optimizer)
    for seed in range(3):
        step(name, control, model, optimizer, data(seed))
    before, rate = copy.deepcopy(plain(control.state_dict())), optimizer.param_groups[0]["lr"]
    x, y = data(3)
    x[4, 2] = float("nan")
    each = give(name, control, model, (x, y))
    with pytest.warns(optim.SkippedStep, match=f"{name} skipped a step: the .* is NaN or infinite"):
        control.step(*CASES[name][1](each))
    after = plain(control.state_dict())
    if name == "ImportanceSampler":  # draws are no harm
        del before["_generator"], after["_generator"]
    assert after == before and control.skipped == 1 and optimizer.param_groups[0]["lr"] == rate
    optimizer.zero_grad()
    step(name, control, model, optimizer, data(4))
    assert plain(control.state_dict()) != before


@pytest.mark.parametrize("name", NAMES)
def test_passes_that_are_missing_or_too_many_are_refused(name: str) -> None:
    model = network()
    optimizer = sgd(model)
    control = CASES[name][0](optimizer)
    each = EACH(model(data()[0]), data()[1])
    each.mean().backward()
    field = control.quantities()[0].savefield
    before = plain(control.state_dict())
    with pytest.raises(px.PackextError, match=f"{name}: no {field}.* since the last step"):
        control.step(*CASES[name][1](each))
    if name != "ImportanceSampler":
        for options in ({}, {} if name == "InnerProductTest" else {"accumulate": True}):
            optimizer.zero_grad()
            each = give(name, control, model, data(), **options)
        with pytest.raises(px.PackextError, match=f"{name}: 2 backward passes since the last step"):
            control.step(*CASES[name][1](each))
        optimizer.zero_grad()
        each = give(name, control, model, data(n=1))
        with pytest.raises(px.PackextError, match=f"{name}: a batch of 1; .* of {control.least} samples or more"):
            control.step(*CASES[name][1](each))
        assert plain(control.state_dict()) == before
    if name not in ("ImportanceSampler", "Alpha"):  # which are handed the losses
        with pytest.raises(px.NotExtendedError, match="own loss is not known"), optim.emit(control):
            nn.CrossEntropyLoss()(model(data()[0]), data()[1]).backward()
    with pytest.raises(ValueError, match=f"{name}, pass_hook=...\\): the controller chooses that itself"):
        give(name, control, model, data(), pass_hook=print)


@pytest.mark.parametrize("name", NAMES)
def test_leaves_the_model_and_its_gradient_as_a_plain_pass_does(name: str) -> None:
    model, other = network(), network()
    control = CASES[name][0](sgd(model))
    hooks = len(model._forward_hooks)
    if name == "ImportanceSampler":  # uniform weights at first
        index = torch.tensor(next(iter(optim.ImportanceSampler(12, 12))))
        EACH(other(data()[0][index]), data()[1][index]).mean().backward()
    else:
        EACH(other(data()[0]), data()[1]).mean().backward()
    give(name, control, model, data())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
        assert vars(p).keys() == vars(q).keys()
    assert len(model._forward_hooks) == hooks


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("ImportanceSampler", "InnerProductTest", "Alpha")])
def test_parts_of_a_batch_are_the_batch(name: str) -> None:
    x, y = data(n=12)
    states = []
    for parts in (1, 3):
        model = network()
        optimizer = sgd(model)
        control = CASES[name][0](optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            losses = []
            with optim.emit(control, accumulate=True):
                for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    losses.append(EACH(model(a), b))
                    (losses[-1].mean() / parts).backward()
            control.step(*CASES[name][1](torch.cat(losses)))
            optimizer.step()
        states.append(control.state_dict())
    one, many = (torch.tensor(list(flat(s))) for s in states)
    torch.testing.assert_close(one, many, rtol=1e-9, atol=1e-12)


def test_scales_of_the_loss_change_nothing_but_what_the_learning_rate_means() -> None:
    found = {}
    for reduction, factor in (("mean", 1.0), ("mean", 1024.0), ("sum", 1.0)):
        model = network()
        controls = [CASES[n][0](sgd(model)) for n in ("NoiseScale", "InnerProductTest", "EvidenceStopping", "CABS")]
        with optim.emit(*controls):
            loss = px.extend(nn.CrossEntropyLoss(reduction=reduction))(model(data()[0]), data()[1])
            (loss * factor).backward()
        for control in controls[:3]:
            control.step()
        found[reduction, factor] = list(flat([c.state_dict() for c in controls[:3]]))
        if (reduction, factor) != ("mean", 1.0):
            with pytest.raises(px.PackextError, match="CABS: `.grad` has the norm .* one of that mean"):
                controls[3].step(loss)
    for values in found.values():
        assert values == pytest.approx(found["mean", 1.0], rel=1e-9)


class Spare(nn.Module):
    """Of `network`, with a first layer that is frozen, or made of constants, and a layer that is not used."""

    def __init__(self, bare: bool) -> None:
        super().__init__()
        layers: Any = network()
        first, self.last = layers[0], layers[2]
        self.first: Any = (lambda x: x @ first.weight.detach().T + first.bias.detach()) if bare else first
        first.requires_grad_(False)
        if not bare:
            self.spare = nn.Linear(2, 2)
        px.extend(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.parametrize("name", NAMES)
def test_frozen_and_unused_parameters_count_for_nothing(name: str) -> None:
    """A model with a frozen layer and an unused one goes as one whose first layer has no parameters."""
    states = []
    for bare in (True, False):
        model = Spare(bare)
        optimizer = sgd(model)
        control = CASES[name][0](optimizer)
        for seed in range(3):
            step(name, control, model, optimizer, data(seed))
        state = control.state_dict()
        if name == "Alpha":
            del state["_before"]  # of all parameters that may move
        states.append(plain(state))
    assert str(states[0]) == str(states[1])
    with pytest.raises(px.PackextError, match="the batch is empty"):
        with optim.emit(control):
            LOSS(model(torch.ones(0, 4)), torch.ones(0, dtype=torch.long)).backward()


# -- in one context with others -----------------------------------------------------------------------------


def test_shares_a_pass_with_an_optimizer() -> None:
    states, values = [], []
    for together in (True, False):
        model = network()
        optimizer = optim.KFAC(model.parameters(), lr=0.05, factors_every=2)
        controls = [optim.NoiseScale(2), optim.NormTest(2), optim.EvidenceStopping(), optim.Alpha(optimizer)]
        for seed in range(4):
            x, y = data(seed)
            optimizer.zero_grad()
            if together:
                with optim.emit(optimizer, *controls):
                    controls[3].loss(EACH(model(x), y)).backward()
            else:
                with optim.emit(*controls):
                    controls[3].loss(EACH(model(x), y)).backward()
                optimizer.zero_grad()
                with optim.emit(optimizer):
                    EACH(model(x), y).mean().backward()
            optimizer.step()
            for control in controls:
                control.step()
        states.append(torch.tensor(list(flat([c.state_dict() for c in controls]))))
        values.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-11)


def test_what_cannot_share_a_pass_is_refused() -> None:
    model = network()
    some = optim.KFAC([{"params": model[0].parameters()}, {"params": model[2].parameters(), "fallback": True, "lr": 1}])
    private = optim.DPSGD(model.parameters(), max_norm=1.0, noise_multiplier=1.0, expected_batch_size=4.0)
    control = optim.NoiseScale()
    for others, options, text in (
        ((some, control), {}, "not all are for the same parameters"),
        ((private, control), {}, "DPSGD takes a pass of its own"),
        ((optim.KFAC(model.parameters()), control), {"scale": 0.5}, "read options of the pass differently"),
        ((optim.Alpha(sgd(model)), optim.Alpha(torch.optim.SGD(model[0].parameters()))), {}, "the same parameters"),
        ((), {}, "needs an optimizer or a controller"),
    ):
        with pytest.raises(ValueError, match=text), optim.emit(*others, **options):
            pass
    for p in model.parameters():
        assert p.grad is None
    with (
        pytest.raises(ValueError, match=r"emit\(InnerProductTest\): .*from each"),
        optim.emit(optim.InnerProductTest(4), accumulate=True),
    ):
        pass


# -- wrong inputs -------------------------------------------------------------------------------------------


def test_numbers_out_of_range_are_refused() -> None:
    optimizer = sgd(network())
    two = [{"params": [p], "lr": 0.1 + k} for k, p in enumerate(network().parameters())]
    for make, text in (
        (lambda: optim.CABS(torch.optim.Adam(network().parameters())), "not for Adam"),
        (lambda: optim.CABS(torch.optim.SGD(network().parameters(), 0.1, momentum=0.9)), "this SGD has momentum"),
        (lambda: optim.CABS(torch.optim.SGD(two)), "one learning rate; the groups have"),
        (lambda: optim.CABS(optimizer, decay=1.0), "decay must be at least 0 and less than 1"),
        (lambda: optim.NoiseScale(1), "batch_size must be an int of 2 or more"),
        (lambda: optim.NoiseScale(32, 16), "max_batch_size must be an int of 32 or more"),
        (lambda: optim.NormTest(theta=0.0), "theta must be positive"),
        (lambda: optim.InnerProductTest(3), "batch_size must be an int of 4 or more"),
        (lambda: optim.InnerProductTest(nu=math.nan), "nu must be positive"),
        (lambda: optim.EvidenceStopping(0), "patience must be an int of 1 or more"),
        (lambda: optim.EvidenceStopping(5, 1), "samples must be an int of 2 or more"),
        (lambda: optim.Alpha(optimizer, kappa=-1.0), "kappa must be positive"),
        (lambda: optim.Alpha(optimizer, decay=1.0), "decay must be at least 0 and less than 1"),
        (lambda: optim.Alpha(torch.optim.SGD(network().parameters(), 0.1, maximize=True)), "leave maximize out"),
        (lambda: optim.ImportanceSampler(4, 5), "a batch of 5 out of 4"),
        (lambda: optim.ImportanceSampler(4, 2, uniform=0.0), "uniform must be more than 0"),
        (lambda: optim.ProbabilisticLineSearch(network().parameters(), lr=0.0), "lr must be positive"),
    ):
        with pytest.raises(ValueError, match=text):
            make()


def test_losses_that_do_not_fit_are_refused() -> None:
    model = network()
    optimizer = sgd(model)
    cabs, alpha = optim.CABS(optimizer, 2), optim.Alpha(optimizer)
    for control, loss, error, text in (
        (cabs, torch.ones(12), ValueError, "the mean loss of the batch, got a tensor of shape \\[12\\]"),
        (cabs, torch.tensor(-1.0), px.PackextError, "losses that are positive, and this one is -1"),
    ):
        optimizer.zero_grad()
        before = plain(control.state_dict())
        with optim.emit(control):
            LOSS(model(data()[0]), data()[1]).backward()
        with pytest.raises(error, match=text):
            control.step(loss)
        assert plain(control.state_dict()) == before
    each = EACH(model(data()[0]), data()[1])
    sampler = optim.ImportanceSampler(12, 12)
    for losses, text in (
        (each.mean(), r"individual losses \[N\].* got torch.float64 \[\]"),
        (each.detach(), "without a graph"),
        (each.expand(2, 12), r"got torch.float64 \[2, 12\]"),
    ):
        for take in (alpha.loss, lambda v: sampler.loss(v, torch.arange(12))):
            with pytest.raises(ValueError, match=text):
                take(losses)
    for given in (None, each[:11]):
        optimizer.zero_grad()
        with optim.emit(alpha):
            loss = LOSS(model(data()[0]), data()[1])
            (loss if given is None else loss + 0 * alpha.loss(EACH(model(data()[0])[:11], data()[1][:11]))).backward()
        with pytest.raises(px.PackextError, match="Alpha: the backward pass did not go through control.loss"):
            alpha.step()
