"""One contract for all controllers, and each against numbers that can be worked out by hand."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import packext as px
from packext import optim
from packext.optim.control.alpha import alpha_of, parabola

LOSS, EACH = px.extend(nn.CrossEntropyLoss()), px.extend(nn.CrossEntropyLoss(reduction="none"))


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return px.extend(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def data(seed: int = 1, n: int = 12) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=draw)
    return x, (x[:, :3] + 0.3 * torch.randn(n, 3, generator=draw)).argmax(1)


def sgd(model: nn.Module, lr: float = 0.2) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr)


class Given(px.Results):
    """Results that are known beforehand."""

    def __init__(self, **values: Any) -> None:
        super().__init__(())
        self.__dict__.update(values)


#: From an optimizer a controller, and what its step takes of the individual losses.
CASES: dict[str, tuple[Callable[[Any], optim.Controller], Callable[[Tensor], tuple[Any, ...]]]] = {
    "CABS": (lambda o: optim.CABS(o, 2), lambda each: (each.mean(),)),
    "NoiseScale": (lambda o: optim.NoiseScale(2, 512), lambda each: ()),
    "NormTest": (lambda o: optim.NormTest(2, 512), lambda each: ()),
    "InnerProductTest": (lambda o: optim.InnerProductTest(4, 512), lambda each: ()),
    "EvidenceStopping": (lambda o: optim.EvidenceStopping(), lambda each: ()),
    "Alpha": (lambda o: optim.Alpha(o), lambda each: ()),
    "ImportanceSampler": (lambda o: optim.ImportanceSampler(12, 12), lambda each: ()),
}
NAMES = list(CASES)


def give(name: str, control: Any, model: nn.Module, batch: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    """A backward pass within `emit`; the individual losses."""
    with optim.emit(control, **options):
        if name == "ImportanceSampler":
            index = torch.tensor(next(iter(control)))
            each = EACH(model(batch[0][index]), batch[1][index])
            control.loss(each, index).backward()
        else:
            each = EACH(model(batch[0]), batch[1])
            (control.loss(each) if name == "Alpha" else each.mean()).backward()
    return each


def step(name: str, control: Any, model: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    each = give(name, control, model, batch)
    control.step(*CASES[name][1](each))
    optimizer.step()


def plain(state: Any) -> Any:
    """State for comparisons, NaN like NaN."""
    if isinstance(state, Tensor):
        return torch.nan_to_num(state.double(), nan=-7.0).tolist()
    if isinstance(state, dict):
        return {k: plain(v) for k, v in state.items()}
    return [plain(v) for v in state] if isinstance(state, list) else state


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


def flat(state: Any) -> Iterator[float]:
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, list):
        for v in state:
            yield from flat(v)
    elif isinstance(state, Tensor):
        yield from state.double().flatten().tolist()
    elif state is not None:
        yield float(state)


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


@pytest.mark.parametrize("name", NAMES)
def test_frozen_and_unused_parameters_count_for_nothing(name: str) -> None:
    """A model with a frozen layer and an unused one goes as one whose layer is no parameter."""
    states = []
    for bare in (True, False):
        model = network()
        first, last = model[0], model[2]
        if bare:
            weight, bias = first.weight.detach().clone(), first.bias.detach().clone()
            fixed = nn.Module()
            fixed.forward = lambda x, w=weight, b=bias: x @ w.T + b
            model = px.extend(nn.Sequential(fixed, nn.Tanh(), last))
        else:
            first.requires_grad_(False)
            model.register_module("spare", nn.Linear(2, 2))
            model.forward = lambda x, m=(first, model[1], last): m[2](m[1](m[0](x)))
            px.extend(model)
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
    with pytest.raises(ValueError, match="own_gram|OwnGram"), optim.emit(optim.InnerProductTest(4), accumulate=True):
        pass


# -- wrong inputs -------------------------------------------------------------------------------------------


def test_numbers_out_of_range_are_refused() -> None:
    optimizer = sgd(network())
    for make, text in (
        (lambda: optim.CABS(torch.optim.Adam(network().parameters())), "not for Adam"),
        (lambda: optim.CABS(torch.optim.SGD(network().parameters(), 0.1, momentum=0.9)), "this SGD has momentum"),
        (lambda: optim.CABS(optimizer, decay=1.0), "decay must be at least 0 and less than 1"),
        (lambda: optim.NoiseScale(1), "batch_size must be an int of 2 or more"),
        (lambda: optim.NoiseScale(32, 16), "max_batch_size must be an int of 32 or more"),
        (lambda: optim.NormTest(theta=0.0), "theta must be positive"),
        (lambda: optim.InnerProductTest(3), "batch_size must be an int of 4 or more"),
        (lambda: optim.InnerProductTest(nu=math.nan), "nu must be positive"),
        (lambda: optim.EvidenceStopping(0), "patience must be an int of 1 or more"),
        (lambda: optim.Alpha(optimizer, kappa=-1.0), "kappa must be positive"),
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


# -- |θ - x|² / 2 with x of variance s²: gradient θ, covariance s² I, curvature 1 --------------------------


class Shift(nn.Module):
    def __init__(self, at: list[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(at))

    def forward(self, x: Tensor) -> Tensor:
        return self.theta - x


HALF = px.extend(nn.MSELoss())  # the mean over two entries is half of the squared norm


def noise(n: int, s: float, seed: int) -> Tensor:
    return s * torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))


def watched(control: Any, at: list[float], s: float, steps: int, n: int, args: Any = lambda loss: ()) -> Shift:
    model = px.extend(Shift(at))
    if isinstance(control, type(lambda: 0)):
        control = control(model)
    for seed in range(steps):
        model.zero_grad()
        x = noise(n, s, seed)
        with optim.emit(control):
            loss = HALF(model(x), torch.zeros_like(x))
            loss.backward()
        control.step(*args(loss))
    return model


def test_batch_sizes_of_a_quadratic_with_known_noise() -> None:
    """tr = 2 s² = 8, |G|² = 0.25, loss (0.25 + 8) / 2."""
    at, s = [0.3, 0.4], 2.0
    scale = optim.NoiseScale(2, decay=0.99)
    scale._steps, scale._averages = 1000, [8.0, 0.25]  # averages that have settled
    watched(scale, at, s, 40, 64)
    assert scale.noise_scale == pytest.approx(8 / 0.25, rel=0.2) and scale.batch_size == math.ceil(scale.noise_scale)
    norm = optim.NormTest(2, theta=2.0, decay=0.99)
    norm._steps, norm._averages = 1000, [8.0, 0.25]
    watched(norm, at, s, 40, 64)
    assert norm.batch_size == pytest.approx(8 / (4 * 0.25), rel=0.2)
    for theta, nu, expected in ((0.5, 5.84, 4 / (0.25 * 0.25)), (9.0, 0.5, 4 / (0.25 * 0.25)), (9.0, 9.0, 4)):
        inner = optim.InnerProductTest(4, theta=theta, nu=nu, decay=0.99)
        inner._steps, inner._averages = 1000, [8.0, 0.25, 4 * 0.25, 0.0625]
        watched(inner, at, s, 25, 64)
        assert inner.batch_size == pytest.approx(expected, rel=0.25), (theta, nu)

    def cabs(model: Shift) -> optim.CABS:
        made.append(optim.CABS(torch.optim.SGD(model.parameters(), 8.0), 2, decay=0.99))
        return made[0]

    made: list[optim.CABS] = []
    watched(cabs, at, s, 60, 64, lambda loss: (loss,))
    assert made[0].batch_size == pytest.approx(8 * 8 / 4.125, abs=1)


def test_where_nothing_but_noise_is_left_batches_grow_to_the_largest() -> None:
    """The plain tests pass there with a batch of 16 and a fitting theta, as noise inflates |g|² by tr / 16."""
    for control in (optim.NoiseScale(16, 256), optim.NormTest(16, 256), optim.InnerProductTest(16, 256)):
        model = px.extend(Shift([0.0, 0.0]))
        sizes = []
        for seed in range(28):
            x = noise(16, 1.0, seed)
            x = x - x.mean(0) * (seed % 2)  # half of the batches balanced: signals below 0
            with optim.emit(control):
                HALF(model(x), torch.zeros_like(x)).backward()
            before = control.batch_size
            control.step()
            sizes.append(control.batch_size)
            assert control.batch_size <= 2 * before
            waits = len(sizes) < round(1 / (1 - control.decay))
            assert control.batch_size == 16 or not waits
        assert sizes[-1] == 256, type(control).__name__


def test_statistics_of_the_tests_are_unbiased() -> None:
    """Over 3,000 batches of 5; with the batch's own gradient in place of the true one they are far off."""
    draw, n = torch.Generator().manual_seed(0), 5
    root = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [0.0, -0.3, 0.5]])
    mean, covariance = torch.tensor([0.4, -0.2, 0.1]), root @ root.T
    g = mean + torch.randn(3_000, n, 3, generator=draw) @ root.T
    truth = torch.stack([covariance.trace(), mean @ mean, mean @ covariance @ mean, (mean @ mean) ** 2])
    control, other = optim.InnerProductTest(4), optim.NormTest(4)
    rows, norms = [], []
    for gram in g @ g.mT:
        seen = control.observe(Given(own_gram=gram))
        rows.append([v for k, v in seen.items() if k != "samples"])
        again = Given(own_norms=gram.diagonal(), own_sum=gram.sum())
        norms.append([other.observe(again)[k] for k in ("trace of the covariance", "norm of the gradient")])
    for found in (torch.tensor(rows), torch.tensor(norms)):
        z = (found.mean(0) - truth[: found.shape[1]]) / (found.std(0) / len(found) ** 0.5)
        assert z.abs().max() < 4, z
    mine = g.mean(1)
    dots = torch.einsum("kni,ki->kn", g, mine)
    naive = torch.stack([mine.square().sum(1), dots.var(1), mine.square().sum(1).square()], 1)
    z = (naive.mean(0) - truth[1:]) / (naive.std(0) / len(naive) ** 0.5)
    assert z.min() > 12, z


@pytest.mark.parametrize("name", ["CABS", "NoiseScale", "NormTest", "InnerProductTest"])
def test_statistics_are_those_of_gradients_one_by_one(name: str) -> None:
    model = network()
    optimizer = sgd(model)
    control = CASES[name][0](optimizer)
    expected: dict[str, float] = {}
    for seed in range(3):
        x, y = data(seed)
        rows = []
        for k in range(len(x)):
            loss = nn.functional.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        g = torch.stack(rows)
        trace = g.var(0).sum()
        now = {"_trace": trace}
        now["_loss"] = nn.functional.cross_entropy(model(x), y).detach()
        pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
        now["_averages"] = torch.stack([trace, torch.stack([g[i] @ g[j] for i, j in pairs]).mean()])
        decay = control.decay  # pyright: ignore[reportAttributeAccessIssue]
        expected = {k: decay * expected.get(k, 0.0) + (1 - decay) * v for k, v in now.items()}
        step(name, control, model, optimizer, (x, y))
    for key, value in control.state_dict().items():
        if key == "_averages":
            value = value[:2]
        if key not in ("batch_size", "_steps"):
            torch.testing.assert_close(torch.tensor(value), expected[key])


# -- alpha ----------------------------------------------------------------------------------------------------


def test_alpha_of_steps_whose_end_is_known() -> None:
    x = noise(8, 1.0, 0)
    for rate, expected in ((0.5, -0.5), (1.0, 0.0), (2.0, 1.0), (1.6, 0.6), (3.0, 1.0)):
        model = px.extend(Shift([3.0, -4.0]))
        optimizer = torch.optim.SGD(model.parameters(), rate)
        control = optim.Alpha(optimizer, kappa=1e-9)
        for _ in range(2):
            optimizer.zero_grad()
            with optim.emit(control):
                (3 * control.loss(model(x).square().mean(1))).backward()
            assert model.theta.grad is not None
            model.theta.grad /= 3
            optimizer.step()
            control.step()
        assert control.alpha == pytest.approx(expected, abs=1e-9)
    for w1, w2, expected in ((-1, 0.5, 0), (-1, 0, -1), (-1, -1, -1), (1, 1, 1), (1, -1, 1), (0, 1, 1), (0, 0, -1)):
        assert alpha_of(float(w1), float(w2)) == expected


def test_the_parabola_is_the_weighted_least_squares_fit() -> None:
    y, v = [1.0, 0.4, -1.5, 0.6], [0.1, 0.3, 0.02, 0.05]
    rows = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 1, 2]])
    weight = torch.tensor(v).reciprocal().diag()
    expected = torch.linalg.solve(rows.T @ weight @ rows, rows.T @ weight @ torch.tensor(y))
    torch.testing.assert_close(torch.from_numpy(parabola(y, v)), expected)
    assert parabola([2.0, 1.0, -2.0, 0.0], [0.0] * 4) == pytest.approx([2.0, -2.0, 1.0])


@pytest.mark.parametrize("rate", [1e-3, 1.9])
def test_alpha_moves_the_learning_rate_to_one_over_the_curvature(rate: float) -> None:
    """Batches of small noise, so that steps are seen; θ is put back so that there is a way to go."""
    model = px.extend(Shift([3.0, -4.0]))
    optimizer = torch.optim.SGD(model.parameters(), rate)
    control = optim.Alpha(optimizer, kappa=0.3, decay=0.5)
    for seed in range(50):
        for k in range(2):
            optimizer.zero_grad()
            x = noise(64, 0.05, 2 * seed + k)
            with optim.emit(control):
                control.loss(model(x).square().mean(1)).backward()
            if k == 0:
                optimizer.step()
            control.step()
        with torch.no_grad():
            model.theta.copy_(torch.tensor([3.0, -4.0]))
        control._before = None
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0, rel=0.1)


# -- early stopping -------------------------------------------------------------------------------------------


def test_evidence_by_hand_and_under_pure_noise() -> None:
    control = optim.EvidenceStopping(patience=2)
    model = watched(control, [0.5, -0.1], 1.0, 1, 6)
    g = model.theta.detach() - noise(6, 1.0, 0)
    assert control.evidence == pytest.approx(float(1 - 6 * (g.mean(0).square() / g.var(0)).mean()))
    found = []
    for seed in range(200):  # 50 parameters of pure noise, batches of 16: the mean of t² is 15 / 13
        z = torch.randn(16, 50, generator=torch.Generator().manual_seed(seed))
        fields = SimpleNamespace(own_sum=z.sum(0), own_variance=z.var(0, correction=0))
        fake = Given(own_samples=16, items=lambda f=fields: [("p", f)])
        found.append(control.observe(fake)["evidence"])
    assert sum(found) / len(found) == pytest.approx(-2 / 13, abs=0.05)


def test_stops_after_enough_positive_evidence_in_a_row() -> None:
    control = optim.EvidenceStopping(patience=2)
    model = px.extend(Shift([0.0, 0.0]))
    x = noise(8, 1.0, 0)
    said = []
    for shift in (0.0, 5.0, 0.0, 0.0, 0.0, 5.0):
        with optim.emit(control):
            HALF(model(x - x.mean(0) + shift), torch.zeros_like(x)).backward()
        said.append(control.step())
    assert said == [False, False, False, True, True, False] and not control.should_stop


def test_entries_without_gradient_say_nothing() -> None:
    control = optim.EvidenceStopping()
    model = px.extend(Shift([0.5, 0.0]))
    x = noise(6, 1.0, 0) * torch.tensor([1.0, 0.0])
    with optim.emit(control):
        HALF(model(x), torch.zeros_like(x)).backward()
    control.step()
    g = 0.5 - x[:, 0]
    assert control.evidence == pytest.approx(float(1 - 6 * g.mean() ** 2 / g.var()))


# -- samplers -------------------------------------------------------------------------------------------------


def test_a_data_loader_follows_the_batch_size() -> None:
    control = optim.NormTest(4)
    batches = optim.AdaptiveBatchSampler(range(20), control, drop_last=True)
    sizes = []
    for x in DataLoader(list(range(20)), batch_sampler=batches):  # pyright: ignore[reportArgumentType]
        sizes.append(x.tolist())
        control.batch_size += 2
    assert sizes == [list(range(4)), list(range(4, 10)), list(range(10, 18))]
    left = optim.AdaptiveBatchSampler(RandomSampler(range(5)), optim.NormTest(3))
    assert sorted(sum(left, [])) == list(range(5)) and [len(b) for b in left] == [3, 2]
    with pytest.raises(TypeError):
        len(left)  # pyright: ignore[reportArgumentType]


def test_importance_sampling_is_unbiased_and_scores_are_the_norms() -> None:
    x, y = data(n=10)
    model = network()
    sampler = optim.ImportanceSampler(10, 5)
    losses = EACH(model(x), y)
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(v, list(model.parameters()), retain_graph=True)])
            for v in losses
        ]
    )
    for _ in range(20):
        for index, each in ((torch.tensor(b), None) for b in sampler):
            with optim.emit(sampler):
                each = EACH(model(x[index]), y[index])
                (7 * sampler.loss(each, index)).backward()  # what else multiplies the loss is undone
            sampler.step()
    torch.testing.assert_close(sampler.scores, rows.norm(dim=1))
    p = 0.9 * rows.norm(dim=1) / rows.norm(dim=1).sum() + 0.01
    torch.testing.assert_close(sampler.probabilities, p)
    second = (rows.square().sum(1) / p).sum() / 10 / rows.square().sum()
    assert sampler.ratio == pytest.approx(float(second)) and sampler.ratio < 1
    estimates = []
    for _ in range(600):
        for batch in sampler:
            index = torch.tensor(batch)
            weights = sampler.loss(torch.ones(5, requires_grad=True), index)  # the mean weight
            estimates.append((rows[index] / (10 * p[index])[:, None]).mean(0))
            assert float(weights.detach()) == pytest.approx(float((1 / (10 * p[index])).mean()))
    found = torch.stack(estimates)
    z = (found.mean(0) - rows.mean(0)) / (found.std(0) / len(found) ** 0.5)
    assert z.abs().max() < 4, z


def test_weights_belong_to_the_batch_that_was_drawn() -> None:
    x, y = data(n=40)
    set_of = TensorDataset(x, y, torch.arange(40))
    model, sampler = network(), optim.ImportanceSampler(40, 8)
    sampler.scores = torch.rand(40)
    batches = list(DataLoader(set_of, batch_sampler=sampler))  # drawn ahead, as workers do
    p = sampler.probabilities
    for _, _, index in batches[1:]:  # the first is left out
        assert sampler.loss(torch.ones(8, requires_grad=True), index).item() == pytest.approx(
            float((1 / (40 * p[index])).mean())
        )
    for wrong, text in (
        (batches[0][2], "no batch that it drew and that waits"),
        (torch.arange(3), "8 losses, and indices of shape"),
    ):
        with pytest.raises((px.PackextError, ValueError), match=text):
            sampler.loss(torch.ones(8, requires_grad=True), wrong)
    with optim.emit(sampler):
        LOSS(model(x[:8]), torch.zeros(8, dtype=torch.long)).backward()
    with pytest.raises(px.PackextError, match="did not go through sampler.loss"):
        sampler.step()
    with pytest.raises(ValueError, match="ImportanceSampler of 40 samples got the state of one of 10"):
        sampler.load_state_dict(optim.ImportanceSampler(10, 5).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(sampler)) == len(sampler) == 5
