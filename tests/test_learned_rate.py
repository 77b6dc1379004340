"""The learned step size: what it sees, what it does to a step, what it refuses, and how it was trained."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import packext as px
from packext import optim, testing
from packext.optim import learned

WEIGHTS = (0.12, -0.05, 0.03, -0.02, -2.0)
POLICY = learned.Policy(WEIGHTS)


pytestmark = pytest.mark.usefixtures("double")


class Positions(nn.Module):
    """A table whose layer is a value of parameters alone until it meets the data."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.table.expand(len(x), 3, 4)) * x[:, :3, None]
        return self.head(h.flatten(1))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 3, 2), nn.GroupNorm(1, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    )


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))
    net[0].weight.requires_grad_(False)
    return net


MODELS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": lambda: nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)),
    "convolution": conv,
    "positions": Positions,
    "frozen": frozen,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.9, momentum=0.5, centered=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


def data(n: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 12, generator=draw), torch.randint(3, (n,), generator=draw)


def one_pass(
    model: nn.Module, controller: Any, x: Tensor, y: Tensor, reduce: Callable[[Tensor], Tensor] = torch.mean
) -> Tensor:
    with optim.emit(controller):
        losses = controller.watch(F.cross_entropy(model(x), y, reduction="none"))
        reduce(losses).backward()
    return losses.detach()


def setup(rate: float = 0.01, policy: Any = POLICY, model: str = "perceptron") -> tuple[Any, Any, Any]:
    net = px.extend(MODELS[model]())
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
    return net, optimizer, optim.LearnedRate(optimizer, policy)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# -- what it sees, and what it does with it ---------------------------------------------------------------


def test_groups_that_share_a_tensor_of_the_rate_have_the_chosen_one() -> None:
    rates = []
    for rate in (0.01, torch.tensor(0.01)):
        torch.manual_seed(0)
        net = px.extend(MODELS["perceptron"]())
        optimizer = torch.optim.SGD([{"params": [p]} for p in net.parameters()], rate, momentum=0.9)
        controller = optim.LearnedRate(optimizer, POLICY)
        for seed in range(3):
            optimizer.zero_grad()
            one_pass(net, controller, *data(seed=seed))
            optimizer.step()
        rates.append((controller.get_last_lr(), values(net)))
        assert len({*controller.get_last_lr()}) == 1
    torch.testing.assert_close(*rates)
    assert all(group["lr"] is rate for group in optimizer.param_groups)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_are_those_of_a_loop_over_samples(kind: str, model: str) -> None:
    """The oracle: individual gradients one by one, a copy of the optimizer for the proposal, sums written out."""
    net = px.extend(MODELS[model]())
    optimizer = OPTIMIZERS[kind](net.parameters())
    controller = optim.LearnedRate(optimizer, POLICY)
    twin = px.extend(copy.deepcopy(px.unextend(MODELS[model]())))
    twin.load_state_dict(net.state_dict())
    plain = OPTIMIZERS[kind](twin.parameters())
    rate = plain.param_groups[0]["lr"]
    seen: list[list[float]] = []
    for step in range(4):
        x, y = data(seed=step)
        rows = testing.individual_gradients(twin, F.cross_entropy, x, y)
        losses = [F.cross_entropy(twin(x[i : i + 1]), y[i : i + 1]).item() for i in range(len(x))]
        before = values(twin)
        plain.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        plain.param_groups[0]["lr"] = rate
        plain.step()
        proposed = [p.detach() - q for p, q in zip(twin.parameters(), before, strict=True)]
        named = [(name, u) for (name, _), u in zip(twin.named_parameters(), proposed, strict=True) if name in rows]
        changes = [sum(float((rows[name][i] * u).sum()) for name, u in named) for i in range(len(x))]
        pair = []
        for numbers in (changes, losses):
            mean = sum(numbers) / len(numbers)
            pair.append(math.log(sum((v - mean) ** 2 for v in numbers) / (len(numbers) - 1)))
        seen.append(pair)
        expected = features(seen, 0.9)
        new = math.exp(sum(w * f for w, f in zip(WEIGHTS, expected, strict=True)))
        with torch.no_grad():
            for p, q, u in zip(twin.parameters(), before, proposed, strict=True):
                p.copy_(q + u * (new / rate))

        optimizer.zero_grad()
        one_pass(net, controller, x, y)
        optimizer.step()
        torch.testing.assert_close(controller.features, torch.tensor(expected), rtol=1e-7, atol=1e-7)
        assert controller.get_last_lr()[0] == pytest.approx(new, rel=1e-7)
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
        rate = new


def features(seen: list[list[float]], discount: float) -> list[float]:
    """By sums over the whole past: averages with weights γ^age, deviations of each step from its own average."""
    out: list[list[float]] = [[], []]
    for j in range(2):
        spreads = []
        for t in range(len(seen)):
            past = [discount ** (t - s) for s in range(t + 1)]
            mean = sum(w * seen[s][j] for s, w in enumerate(past)) / sum(past)
            spreads.append((seen[t][j] - mean) ** 2)
        past = [discount ** (len(seen) - 1 - s) for s in range(len(seen))]
        out[0].append(mean)
        out[1].append(sum(w * v for w, v in zip(past, spreads, strict=True)) / sum(past))
    return [*out[0], *out[1], 1.0]


@pytest.mark.parametrize(
    "reduce", [torch.sum, lambda v: v.mean() * 3, lambda v: (v * torch.linspace(1, 2, len(v))).sum()]
)
def test_what_backward_is_called_on_does_not_matter_to_a_sample(reduce: Any) -> None:
    """The update is the same for gradients of any scale with RMSprop; each sample's slope is of its own loss."""
    found = []
    for each in (torch.sum, reduce):
        net = px.extend(MODELS["perceptron"]())
        torch.manual_seed(1)
        for p in net.parameters():
            nn.init.normal_(p)
        controller = optim.LearnedRate(torch.optim.SGD(net.parameters(), 0.01), POLICY)
        x, y = data()
        one_pass(net, controller, x, y, each)
        update = [-0.01 * p.grad for p in net.parameters() if p.grad is not None]
        rows = testing.individual_gradients(net, F.cross_entropy, x, y)
        changes = torch.stack([(r.flatten(1) @ u.flatten()) for r, u in zip(rows.values(), update, strict=True)]).sum(0)
        controller.optimizer.step()
        found.append(float(controller.features[0] - changes.var().log()))
    assert max(map(abs, found)) < 1e-9


def test_passes_before_a_step_are_one_batch() -> None:
    x, y = data(8)
    nets = []
    for parts in ([8], [5, 3]):
        torch.manual_seed(0)
        net, optimizer, controller = setup()
        for a, b in zip(x.split(parts), y.split(parts), strict=True):
            one_pass(net, controller, a, b, lambda v: v.sum() / 8)
        optimizer.step()
        nets.append((values(net), controller.features))
    torch.testing.assert_close(nets[0], nets[1])


def test_first_rate_is_forgotten() -> None:
    """The difference of logarithms shrinks by γ + 2 (1-γ) θ = 0.7 in each step."""
    rates = []
    for first in (1e-4, 1.0):
        torch.manual_seed(0)
        net, optimizer, controller = setup(first, learned.Policy((0.2, 0.0, 0.0, 0.0, -3.0), 0.5))
        for _ in range(40):
            optimizer.zero_grad()
            with torch.no_grad():  # always from the same place, so that the loop alone is seen
                torch.manual_seed(0)
                for p in net.parameters():
                    p.copy_(torch.randn_like(p))
            optimizer.state.clear()
            one_pass(net, controller, *data(8))
            optimizer.step()
            rates.append(controller.get_last_lr()[0])
    assert abs(math.log(rates[0] / rates[40])) > 1
    assert rates[39] == pytest.approx(rates[79], rel=1e-5)


@pytest.mark.parametrize("weight", [0.5, 0.7, -9.51, -20.0])
def test_a_weight_under_which_the_rate_does_not_settle_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="the rate settles only if it is between -9.5 and 0.5"):
        learned.Policy((weight, 0.0, 0.0, 0.0, -3.0))
    # The bound itself: the loop with constant variances grows at it, and shrinks within.
    for theta, shrinks in (
        ((weight, False), (weight * 0.98, True)) if abs(weight) in (0.5, 9.51) else ((weight, False),)
    ):
        x, s, path = 1.0, 2.0, []
        for _ in range(6000):
            s = 0.9 * s + 0.1 * 2 * x
            x = theta * s
            path.append(abs(x))
        assert (path[-1] < 1e-3 * path[0]) == shrinks


@pytest.mark.parametrize("rate", [1e-12, 1e-9])
def test_a_rate_so_small_that_rounding_swallows_its_update_is_as_in_float64(rate: float) -> None:
    ends = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        net = px.extend(MODELS["perceptron"]().to(dtype))
        optimizer = torch.optim.RMSprop([{"params": net[0].parameters()}, {"params": net[2].parameters()}], rate)
        controller = optim.LearnedRate(optimizer, POLICY)
        begin = values(net)
        x, y = data()
        one_pass(net, controller, x.to(dtype), y)
        optimizer.step()
        moved = torch.cat([(a - b).flatten() for a, b in zip(values(net), begin, strict=True)])
        ends.append((torch.tensor(controller.get_last_lr()), moved.double()))
    assert ends[1][1].abs().min() > 0
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-3 * float(ends[0][1].abs().max()))


def test_a_step_of_the_optimizer_that_fails_leaves_the_rate() -> None:
    net = px.extend(MODELS["perceptron"]())
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    controller = optim.LearnedRate(optimizer, POLICY)
    one_pass(net, controller, *data())
    failing = optimizer.register_step_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    failing.remove()
    optimizer.zero_grad()
    one_pass(net, controller, *data())
    assert controller.get_last_lr() == [0.01]


def test_groups_keep_their_ratio() -> None:
    net = px.extend(MODELS["perceptron"]())
    groups = [{"params": net[0].parameters(), "lr": 0.02}, {"params": net[2].parameters(), "lr": 0.005}]
    optimizer = torch.optim.SGD(groups)
    controller = optim.LearnedRate(optimizer, POLICY)
    before = values(net)
    one_pass(net, controller, *data())
    grads = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    optimizer.step()
    one, other = controller.get_last_lr()
    assert other == pytest.approx(one / 4) and one != 0.02
    for k, (p, q, g) in enumerate(zip(net.parameters(), before, grads, strict=True)):
        torch.testing.assert_close(p.detach(), q - (one if k < 2 else other) * g)


def test_state_goes_on() -> None:
    """Saved after three steps and loaded, the run is the same to the last bit."""
    runs = []
    for stop in (None, 3):
        torch.manual_seed(0)
        net, optimizer, controller = setup()
        for step in range(6):
            if step == stop:
                saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), controller.state_dict()))
                net, optimizer, controller = setup(0.5)
                for part, state in zip((net, optimizer, controller), saved, strict=True):
                    part.load_state_dict(state)
            optimizer.zero_grad()
            one_pass(net, controller, *data(seed=step))
            optimizer.step()
        runs.append((values(net), controller.features, controller.get_last_lr()))
    assert all(torch.equal(p, q) for p, q in zip(runs[0][0], runs[1][0], strict=True))
    assert torch.equal(runs[0][1], runs[1][1]) and runs[0][2] == runs[1][2]
    with pytest.raises(ValueError, match="a policy with other weights"):
        setup(policy=learned.Policy((0.1, 0.0, 0.0, 0.0, -3.0)))[2].load_state_dict(saved[2])


def test_copies_go_on_with_the_copy_of_the_optimizer() -> None:
    run = setup()
    for k in range(3):
        run[1].zero_grad()
        one_pass(run[0], run[2], *data(seed=k))
        run[1].step()
    runs = [run, copy.deepcopy(run), pickle.loads(pickle.dumps(run))]
    for net, optimizer, controller in runs:
        for k in range(3, 6):
            optimizer.zero_grad()
            one_pass(net, controller, *data(seed=k))
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), run[0].parameters(), strict=True))
        assert controller.get_last_lr() == run[2].get_last_lr() != [0.01]
    net, optimizer, controller = runs[1]
    controller.remove()
    net, optimizer, controller = copy.deepcopy((net, optimizer, controller))
    rate, before = controller.get_last_lr(), controller.features
    optimizer.zero_grad()
    F.cross_entropy(net(data()[0]), data()[1]).backward()
    optimizer.step()  # of the optimizer alone
    assert controller.get_last_lr() == rate and torch.equal(controller.features, before)


def test_a_step_that_is_not_taken_is_not_observed() -> None:
    net, optimizer, controller = setup()
    one_pass(net, controller, *data())
    optimizer.step()
    state, before = controller.state_dict(), values(net)
    optimizer.zero_grad(set_to_none=False)
    optimizer.state.clear()
    one_pass(net, controller, *data())
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert controller.state_dict() == state
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("to_none", [True, False])
def test_grad_scaler(to_none: bool, within: bool) -> None:
    """The scale is no part of a sample's own loss; a step that overflows is not seen, and its batch is forgotten."""
    found = []
    for seeds, scaler in (([0, 1, 2], None), ([0, 1, 7, 2], torch.amp.GradScaler("cpu", init_scale=2.0**10))):
        torch.manual_seed(0)
        net, optimizer, controller = setup()
        for seed in seeds:
            forget = partial(optimizer.zero_grad, set_to_none=to_none)
            if not within:
                forget()
            one_pass(net, controller, *data(seed=seed), partial(scaled_mean, scaler, forget if within else None))
            if scaler is None:
                optimizer.step()
                continue
            if seed == 7:
                net[0].weight.grad[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        assert controller.state_dict()["count"] == 3
        found.append((values(net), controller.features))
    torch.testing.assert_close(*found)


def scaled_mean(scaler: Any, before: Callable[[], None] | None, losses: Tensor) -> Tensor:
    if before is not None:
        before()
    return losses.mean() if scaler is None else scaler.scale(losses.mean())


def test_removed() -> None:
    net, optimizer, controller = setup()
    controller.remove()
    F.cross_entropy(net(data()[0]), data()[1]).backward()
    before, grads = values(net), [p.grad for p in net.parameters()]
    optimizer.step()
    for p, q, g in zip(net.parameters(), before, grads, strict=True):
        assert g is not None
        torch.testing.assert_close(p.detach(), q - 0.01 * g)


# -- what it refuses --------------------------------------------------------------------------------------


def refused(match: str, act: Callable[[Any, Any, Any], Any], kind: type[Exception] = px.PackextError) -> None:
    net, optimizer, controller = setup()
    before, state = values(net), controller.state_dict()
    with pytest.raises(kind, match=match):
        act(net, optimizer, controller)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert controller.state_dict() == state and optimizer.param_groups[0]["lr"] == 0.01
    optimizer.zero_grad()  # and goes on
    one_pass(net, controller, *data())
    optimizer.step()
    assert controller.features is not None


def test_refused_steps() -> None:
    x, y = data()
    bad = x.clone()
    bad[2, 0] = math.nan

    refused("0 backward passes and 0 batches of losses", lambda n, o, c: F.cross_entropy(n(x), y).backward())

    def no_losses(n: Any, o: Any, c: Any) -> None:
        with optim.emit(c):
            F.cross_entropy(n(x), y).backward()

    refused("1 backward passes and 0 batches", no_losses)
    refused(r"losses of samples \[2\] are NaN", lambda n, o, c: one_pass(n, c, bad, y))
    refused("a batch of one sample", lambda n, o, c: one_pass(n, c, x[:1], y[:1]))
    weight = torch.tensor([0.0, 1, 1, 1, 1, 1])
    refused("some have a weight of 0", lambda n, o, c: one_pass(n, c, x, y, lambda v: (v * weight).sum()))

    def zero(n: Any, o: Any, c: Any) -> None:
        one_pass(n, c, x, y)
        o.param_groups[0]["lr"] = 0.0
        try:
            o.step()
        finally:
            o.param_groups[0]["lr"] = 0.01

    refused("the rate of the first group has become 0", zero)

    def sparse(n: Any, o: Any, c: Any) -> None:
        one_pass(n, c, x, y)
        n[0].weight.grad = n[0].weight.grad.to_sparse()

    refused("the gradient of parameter 0 of group 0, .* is sparse", sparse)

    def infinite(n: Any, o: Any, c: Any) -> None:
        one_pass(n, c, x, y)
        n[0].weight.grad[0, 0] = math.inf

    refused("the gradient is NaN or infinite", infinite)

    def elsewhere(n: Any, o: Any, c: Any) -> None:
        extra = nn.Parameter(torch.ones(2))
        o.add_param_group({"params": [extra]})
        one_pass(n, c, x, y)
        extra.grad = torch.ones(2)
        try:
            o.step()
        finally:
            o.param_groups.pop()

    refused(r"parameter 0 of group 1, shape \[2\] has a gradient, but no extended model", elsewhere)

    def tokens(n: Any, o: Any, c: Any) -> None:
        with optim.emit(c):
            out = n(x)
            c.watch(F.cross_entropy(torch.cat([out, out]), torch.cat([y, y]), reduction="none")).mean().backward()

    refused("12 losses of a batch of 6 samples", tokens)
    refused("without a closure", lambda n, o, c: o.step(lambda: 0.0), ValueError)
    refused(r"watch\(\) takes a loss of each sample", lambda n, o, c: c.watch(F.cross_entropy(n(x), y)), ValueError)
    refused("belongs within", lambda n, o, c: c.watch(F.cross_entropy(n(x), y, reduction="none")))

    def options(n: Any, o: Any, c: Any) -> None:
        with optim.emit(c, scale=2.0):
            pass

    refused("the controller chooses that itself", options, ValueError)

    def nested(n: Any, o: Any, c: Any) -> None:
        with optim.emit(c), optim.emit(c):
            pass

    refused("within itself", nested)


def test_an_update_that_is_not_finite_leaves_the_parameters() -> None:
    net, _, controller = setup()
    controller.remove()
    optimizer = torch.optim.SGD(net.parameters(), 1e300)
    controller = optim.LearnedRate(optimizer, POLICY)
    before = values(net)
    one_pass(net, controller, *data())
    for p in net.parameters():
        p.grad = torch.full_like(p, 1e150)
    with pytest.raises(px.PackextError, match="the update predicts are NaN or infinite.*SGD's state"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_a_rate_with_which_parameters_overflow_is_refused() -> None:
    """At the proposed rate of 1 they do not."""
    net = px.extend(nn.Linear(3, 1, bias=False).half())
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    controller = optim.LearnedRate(optimizer, learned.Policy((0.0, 0.0, 0.0, 0.0, 6.9)))  # a rate of 992, at any sight
    before = values(net)
    with optim.emit(controller):
        controller.watch(torch.tensor([60.0, 80.0]).half() * net(torch.ones(2, 3).half())[:, 0]).mean().backward()
    text = r"chosen rate, 992\.\d+, parameter 0 of group 0, shape \[1, 3\] goes beyond what torch.float16 holds"
    with pytest.raises(px.PackextError, match=text):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_refused_at_once() -> None:
    p = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match="those of LBFGS are not proportional"):
        optim.LearnedRate(torch.optim.LBFGS(p), POLICY)
    with pytest.raises(ValueError, match="those of Adafactor are not proportional"):  # at most 1 / sqrt(steps)
        optim.LearnedRate(torch.optim.Adafactor(p), POLICY)
    with pytest.raises(ValueError, match="KFAC asks for quantities of its own"):
        optim.LearnedRate(optim.KFAC(p), POLICY)
    with pytest.raises(ValueError, match="a positive rate of the first group"):
        optim.LearnedRate(torch.optim.SGD(p, 0.0), POLICY)
    with pytest.raises(
        ValueError, match=r"no policy was trained for RMSprop .* rmsprop: RMSprop\(alpha=0.9, eps=1e-06\)"
    ):
        optim.LearnedRate(torch.optim.RMSprop(p), None)
    with pytest.raises(ValueError, match="no trained policy 'sgd': there are"):
        optim.LearnedRate(torch.optim.SGD(p, 0.1), "sgd")
    for weights, text in (((1.0, 2.0), "five finite weights"), ((0.0, math.nan, 0.0, 0.0, 0.0), "five finite weights")):
        with pytest.raises(ValueError, match=text):
            learned.Policy(weights)
    with pytest.raises(ValueError, match="discount must be"):
        learned.Policy(WEIGHTS, 1.0)


# -- what comes with packext ------------------------------------------------------------------------------


def test_a_shipped_policy_is_found_by_its_optimizer() -> None:
    p = [nn.Parameter(torch.ones(2))]
    assert optim.LearnedRate(torch.optim.RMSprop(p, alpha=0.9, eps=1e-6)).policy == learned.trained("rmsprop")
    assert optim.LearnedRate(torch.optim.SGD(p, 0.1), "rmsprop").policy == learned.trained("rmsprop")


# -- how it was trained -----------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.1, 0.7, 2.0])
def test_weights_minimise_the_dual(epsilon: float) -> None:
    from scipy.optimize import minimize_scalar

    r = torch.randn(40) * 3 + 100
    w = learned.weights(r, epsilon)

    def dual(log_eta: float) -> float:
        eta = math.exp(log_eta)
        return eta * epsilon + eta * float(torch.logsumexp(r / eta, 0) - math.log(len(r)))

    best = minimize_scalar(dual, bounds=(-8, 8), method="bounded", options={"xatol": 1e-10})
    torch.testing.assert_close(w, torch.softmax(r / math.exp(best.x), 0), rtol=1e-4, atol=1e-6)
    assert float((w * (w * 40).log()).sum()) == pytest.approx(epsilon, rel=1e-6)
    torch.testing.assert_close(learned.weights(r * 1e-6 + 5, epsilon), w, rtol=1e-6, atol=1e-9)


def test_weights_where_the_dual_has_no_minimum() -> None:
    torch.testing.assert_close(learned.weights(torch.tensor([1.0, 3, 3, 2]), 1.0), torch.tensor([0, 0.5, 0.5, 0]))
    torch.testing.assert_close(learned.weights(torch.ones(4), 0.5), torch.full((4,), 0.25))
    with_crash = learned.weights(torch.tensor([math.nan, 1.0, 2.0, 3.0]), 0.3)
    torch.testing.assert_close(with_crash, learned.weights(torch.tensor([1.0, 1.0, 2.0, 3.0]), 0.3))
    with pytest.raises(ValueError, match="no sample has a finite reward"):
        learned.weights(torch.tensor([math.nan, -math.inf]), 0.3)
    with pytest.raises(ValueError, match="epsilon must be positive"):
        learned.weights(torch.ones(3), 0.0)


def test_reps_finds_the_top_of_a_hill_within_bounds() -> None:
    top = torch.tensor([1.0, -2.0, 0.5])

    def reward(w: Tensor, k: int) -> Tensor:
        assert w.shape == (40, 3) and bool((w[:, 0] < 0.4).all())
        return -(w - top).square().sum(1)

    found = learned.reps(reward, torch.zeros(3), torch.tensor([1.0, 1.0, 0.0]), 40, bounds=(-1.0, 0.4))
    torch.testing.assert_close(found.mean, torch.tensor([0.4, -2.0, 0.0]), atol=0.03, rtol=0)
    again = learned.reps(reward, torch.zeros(3), torch.tensor([1.0, 1.0, 0.0]), 40, bounds=(-1.0, 0.4))
    assert torch.equal(found.mean, again.mean) and found.rewards[-1] > found.rewards[0]
    with pytest.raises(ValueError, match=r"needed \[40\]"):
        learned.reps(lambda w, k: w, torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match="must start between"):
        learned.reps(reward, torch.ones(3), torch.ones(3), bounds=(-1.0, 0.4))


def test_many_runs_side_by_side_are_those_of_the_controller() -> None:
    """What the policies were trained in is what they are used in: a run of each, step by step."""
    train = pytest.importorskip("benchmarks.learned_train")
    t = train.task(3, (2,))
    layers = [(w.double(), b.double()) for w, b in t.layers]
    t = train.Task(t.x.double(), t.y, layers, t.batches[:8], 1e-3)
    chosen = torch.tensor([list(WEIGHTS), [0.2, 0.05, -0.01, 0.02, -3.0]])
    (before, after), rates = train.run(chosen, t)
    options = {k: v for k, v in train.OPTIMIZER.items() if k != "class"}
    for k in range(2):
        net = nn.Sequential(*[m for w, _ in layers for m in (nn.Linear(*reversed(w.shape)), nn.ReLU())][:-1])
        with torch.no_grad():
            for p, q in zip(net.parameters(), (each for pair in layers for each in pair), strict=True):
                p.copy_(q)
        px.extend(net)
        optimizer = getattr(torch.optim, train.OPTIMIZER["class"])(net.parameters(), lr=1e-3, **options)
        controller = optim.LearnedRate(optimizer, learned.Policy(chosen[k].tolist()))
        assert float(F.cross_entropy(net(t.x), t.y).detach()) == pytest.approx(float(before[k]))
        for step, index in enumerate(t.batches):
            optimizer.zero_grad()
            one_pass(net, controller, t.x[index], t.y[index])
            optimizer.step()
            assert controller.get_last_lr()[0] == pytest.approx(float(rates[step, k]), rel=1e-6), step
        assert float(F.cross_entropy(net(t.x), t.y).detach()) == pytest.approx(float(after[k]), rel=1e-6)


def test_rates_that_are_given_are_taken() -> None:
    """Of many runs side by side, those that follow no policy: a constant rate is that of torch's optimizer."""
    train = pytest.importorskip("benchmarks.learned_train")
    t = train.task(3, (1,))
    layers = [(w.double(), b.double()) for w, b in t.layers]
    t = train.Task(t.x.double(), t.y, layers, t.batches[:12], torch.tensor([1.0, 1e-3]))
    weights = torch.tensor([[0.0] * 5, list(WEIGHTS)])
    (_, after), rates = train.run(weights, t, torch.tensor([[0.003, math.nan]] * 12))
    alone = train.run(weights[1:], train.Task(t.x, t.y, layers, t.batches, 1e-3))
    torch.testing.assert_close(rates[:, 1], alone[1][:, 0])
    (w, b), (v, c) = [(w.clone().requires_grad_(), b.clone().requires_grad_()) for w, b in layers]
    options = {k: v for k, v in train.OPTIMIZER.items() if k != "class"}
    optimizer = getattr(torch.optim, train.OPTIMIZER["class"])([w, b, v, c], lr=0.003, **options)
    for index in t.batches:
        optimizer.zero_grad()
        F.cross_entropy(F.linear(F.linear(t.x[index], w, b).relu(), v, c), t.y[index]).backward()
        optimizer.step()
    torch.testing.assert_close(F.cross_entropy(F.linear(F.linear(t.x, w, b).relu(), v, c), t.y).detach(), after[0])


def test_the_first_rate_hardly_matters_to_the_trained_policy() -> None:
    """On a task that it has not seen: over six decades the final loss stays within a factor of 10, and is low."""
    bench = pytest.importorskip("benchmarks.learned_rate")
    torch.set_default_dtype(torch.float32)
    kinds = [bench.Variant("learned", 10.0**k) for k in (-6, -4, -2, 0)]
    *found, constant = torch.tensor(
        bench.losses("breast cancer, 30-32-2", [*kinds, bench.Variant("static", 1e-4)], 0)
    ).log()
    assert max(found) - min(found) < math.log(10)
    assert max(found) < constant - 2
