"""One contract for all optimizers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

import packext as px
from packext import optim
from tests import optim_oracles as oracles
from tests.cases import TwoHeads


@dataclass
class Case:
    """An optimizer, and its slow re-implementation.

    Attributes:
        make: from parameters.
        slow: from nothing: a function that takes parameters by name and a batch, and gives new parameters.
        of_draws: whether its curvature is drawn.
    """

    make: Callable[..., optim.Optimizer]
    slow: Callable[[], oracles.Step] | None
    of_draws: bool = False


def rule(curvature: str, decay: float | None = None) -> Callable[..., optim.Optimizer]:
    return lambda params, **more: optim.Preconditioned(
        params, curvature, **{"lr": 0.1, "damping": 0.1, "weight_decay": 0.01, "decay": decay, **more}
    )


def of(kind: Any, **options: Any) -> Callable[..., optim.Optimizer]:
    def make(params: Any, **more: Any) -> optim.Optimizer:
        if "seed" in more and "seed" not in signature(kind).parameters:
            del more["seed"]
        return kind(params, **{**options, **more})

    return make


CASES: dict[str, Case] = {
    "DiagGGN": Case(rule("diag_ggn_exact"), lambda: oracles.preconditioned("diagonal", 0.1, 0.1, 0.01, None)),
    "DiagGGN, decay": Case(
        rule("diag_ggn_exact", 0.6), lambda: oracles.preconditioned("diagonal", 0.1, 0.1, 0.01, 0.6)
    ),
    "DiagGGN-MC": Case(rule("diag_ggn_mc"), None, True),
    "KFLR": Case(rule("kflr"), lambda: oracles.preconditioned("kronecker", 0.1, 0.1, 0.01, None)),
    "KFAC (paper)": Case(rule("kfac"), None, True),
    "KFRA": Case(rule("kfra"), None),
    "KFAC": Case(
        of(optim.KFAC, lr=0.1, damping=0.01, weight_decay=0.01, decay=0.6, factors_every=2, inverses_every=2),
        None,
        True,
    ),
    "KFAC, exact": Case(
        of(optim.KFAC, fisher="exact", lr=0.1, damping=0.01, weight_decay=0.01, decay=0.6, factors_every=1),
        lambda: oracles.kfac(0.1, 0.01, 0.9, 0.01, 0.6, 1, 100, 1e-3),
    ),
    "KFAC, exact, every second": Case(
        of(
            optim.KFAC,
            fisher="exact",
            bias="separate",
            lr=0.1,
            damping=0.01,
            factors_every=2,
            inverses_every=4,
            kl_clip=None,
            momentum=0.5,
        ),  # fmt: skip
        lambda: oracles.kfac(0.1, 0.01, 0.5, 0.0, 0.95, 2, 4, None, False),
    ),
    "EKFAC": Case(of(optim.EKFAC, lr=0.05, scales_every=1, basis_every=2), None, True),
    "EKFAC, exact": Case(
        of(
            optim.EKFAC,
            fisher="exact",
            lr=0.05,
            damping=0.01,
            weight_decay=0.01,
            decay=0.6,
            scales_every=1,
            basis_every=4,
        ),  # fmt: skip
        lambda: oracles.kfac(0.05, 0.01, 0.9, 0.01, 0.6, 1, 4, 1e-3, eigen=True),
    ),
    "SINGD": Case(of(optim.SINGD, lr=0.02, every=2), None, True),
    "SINGD, exact": Case(
        of(optim.SINGD, fisher="exact", lr=0.1, weight_decay=0.01, every=2, precondition_lr=0.2),
        lambda: oracles.singd(0.1, 1e-3, 0.9, 0.01, 2, 0.2, 0.5),
    ),
    "Sophia": Case(of(optim.Sophia, lr=0.02, every=2, rho=10.0), None, True),
    "Sophia, exact": Case(
        of(optim.Sophia, lr=0.02, every=2, rho=10.0, curvature="diag_ggn_exact"),
        lambda: oracles.sophia(0.02, (0.965, 0.99), 10.0, 0.1, 2),
    ),
    "AdaHessian": Case(of(optim.AdaHessian, lr=0.05), None, True),
    "M-SVAG": Case(of(optim.MSVAG, weight_decay=0.01), lambda: oracles.msvag(0.1, 0.9, 0.01)),
    "SVAG": Case(of(optim.MSVAG, momentum=0.0), lambda: oracles.msvag(0.1, 0.0, 0.0)),
    "SPRING": Case(of(optim.SPRING, lr=0.3, damping=0.01, momentum=0.9), lambda: oracles.spring(0.3, 0.01, 0.9, 1e-3)),
    "ENGD-W": Case(of(optim.ENGDW, lr=0.3, damping=0.1), lambda: oracles.spring(0.3, 0.1, 0.0, None)),
}
NAMES = list(CASES)
#: One of each kind, as users have them; those with an exact curvature are compared with their re-implementations.
KINDS = [n for n in NAMES if CASES[n].slow is None or n in ("M-SVAG", "SPRING", "ENGD-W")]


pytestmark = pytest.mark.usefixtures("double")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return px.extend(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def data(seed: int = 1, n: int = 12) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=draw)
    return x, (x[:, :3] + 0.3 * torch.randn(n, 3, generator=draw)).argmax(1)


LOSS = px.extend(nn.CrossEntropyLoss())


def step(model: nn.Module, optimizer: Any, batch: tuple[Tensor, Tensor], loss: Any = LOSS) -> float:
    optimizer.zero_grad()
    with optim.emit(optimizer):
        value = loss(model(batch[0]), batch[1])
        value.backward()
    optimizer.step()
    return value.item()


def state_of(optimizer: torch.optim.Optimizer) -> Any:
    return copy.deepcopy(optimizer.state_dict())


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    held = [each for s in optimizer.state.values() for each in s.values()]
    return [t for each in held for t in (each if isinstance(each, list) else [each]) if isinstance(t, Tensor)]


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", KINDS)
def test_decreases_the_loss(name: str) -> None:
    model = network()
    optimizer = CASES[name].make(model.parameters())
    batch = data(n=40)
    losses = [step(model, optimizer, batch) for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(not hasattr(p, q) for p in model.parameters() for q in ("kfac", "diag_ggn_mc"))  # nothing is left


@pytest.mark.parametrize("name", [n for n in NAMES if CASES[n].slow])
def test_is_its_slow_re_implementation(name: str) -> None:
    model, slow = network(), CASES[name].slow
    assert slow is not None
    optimizer, again = CASES[name].make(model.parameters()), slow()
    theta = {k: p.detach().clone() for k, p in model.named_parameters()}
    for seed in range(5):
        batch = data(seed)
        step(model, optimizer, batch)
        theta = again(theta, *batch)
        for k, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), theta[k], rtol=1e-9, atol=1e-11, msg=f"{k}, step {seed}")


@pytest.mark.parametrize("name", KINDS)
def test_goes_on_from_a_saved_state_to_the_last_bit(name: str) -> None:
    model = network()
    optimizer = CASES[name].make(model.parameters())
    for seed in range(3):
        step(model, optimizer, data(seed))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network(7)
    other.load_state_dict(saved["model"])
    resumed = CASES[name].make(other.parameters())
    resumed.skipped = 1
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.skipped == 0
    copied_model, copied = copy.deepcopy((model, optimizer))
    for seed in range(3, 6):
        for m, o in ((model, optimizer), (other, resumed), (copied_model, copied)):
            step(m, o, data(seed))
        assert same(values(model), values(other)) and same(values(model), values(copied_model))
    assert same(state_of(optimizer), state_of(resumed))


def test_a_state_that_other_parts_keep_is_refused() -> None:
    """Where the groups are alike, by what is kept of each parameter; a part of one's own may say nothing of that."""
    kinds = [optim.KFAC, optim.EKFAC, optim.SINGD, optim.MSVAG, optim.SPRING, optim.Preconditioned]
    model = network()
    for kind in kinds:
        trained = kind(model.parameters())
        step(model, trained, data())
        for other in kinds:
            fresh = other(model.parameters())
            if other is not kind:
                with pytest.raises(px.PackextError, match=f"of another optimizer than {other.__name__}: it"):
                    fresh.load_state_dict(trained.state_dict())
            assert not fresh.state and fresh.steps == 0

    class Counted(optim.Part):
        def __call__(self, work: optim.Work) -> None:
            work.set("seen", [1 + n for n in work.old("seen", 0)])

    made = [optim.Optimizer(model.parameters(), [Counted(), optim.Descend()]) for _ in range(2)]
    step(model, made[0], data())
    made[1].load_state_dict(made[0].state_dict())
    assert all(s["seen"] == 1 for s in made[1].state.values()) and made[1].state
    Counted.keeps = ("count",)
    with pytest.raises(px.PackextError, match=r"it keeps seen of a parameter, where Optimizer keeps count, m, t, v\."):
        made[1].load_state_dict(made[0].state_dict())


class MyKFAC(optim.KFAC):
    """A class of a user's, with the parts of KFAC."""


def test_a_state_of_another_curvature_or_rule_is_refused() -> None:
    """Where groups and what is kept are alike; the message names who wrote it and who was to read it."""
    kinds = {
        "Preconditioned .* of kfac expand": lambda p: optim.Preconditioned(p, "kfac"),
        "Preconditioned .* of kflr expand": lambda p: optim.Preconditioned(p, "kflr"),
        "Preconditioned .* of kfra expand": lambda p: optim.Preconditioned(p, "kfra"),
        "Preconditioned .* of diag_ggn_mc": lambda p: optim.Preconditioned(p, "diag_ggn_mc"),
        "Preconditioned .* of diag_ef": lambda p: optim.Preconditioned(p, "diag_ef"),
        "KFAC .* of kfac expand,": optim.KFAC,
        "KFAC .* of kfac reduce,": lambda p: optim.KFAC(p, approx="reduce"),
        "KFAC .* of kfac expand empirical,": lambda p: optim.KFAC(p, fisher="empirical"),
        "Sophia .* of diag_ggn_mc": optim.Sophia,
        "Sophia .* of diag_ggn_exact": lambda p: optim.Sophia(p, curvature="diag_ggn_exact"),
        "SPRING .*SampleSpace": optim.SPRING,
        "ENGDW .*SampleSpace": optim.ENGDW,
    }
    params = [nn.Parameter(torch.zeros(2))]
    for writes, write in kinds.items():
        for reads, read in kinds.items():
            if reads == writes:
                read(params).load_state_dict(write(params).state_dict())
                continue
            with pytest.raises(px.PackextError, match=f"another optimizer.* is of {writes}.* this is {reads}"):
                read(params).load_state_dict(write(params).state_dict())
    for mine in (MyKFAC(params), optim.KFAC(params, fisher="exact", bias="separate", lr=1.0)):  # estimates of the same
        mine.load_state_dict(optim.KFAC(params).state_dict())


def test_hooks_of_loading_have_the_last_word() -> None:
    model = network()
    optimizer = optim.Sophia(model.parameters(), every=1)
    step(model, optimizer, data())
    saved = optimizer.state_dict()

    def scaled(state: dict[Any, Any], factor: float) -> dict[Any, Any]:
        return {p: {**each, "m": factor * each["m"]} for p, each in state.items()}

    def after(other: torch.optim.Optimizer) -> None:
        for p, each in scaled(other.state, 3.0).items():
            other.state[p] = each

    other = optim.Sophia(model.parameters(), every=1)
    other.register_load_state_dict_pre_hook(lambda _, given: {**given, "state": scaled(given["state"], 2.0)})
    other.register_load_state_dict_post_hook(after)
    for _ in range(2):
        other.load_state_dict(saved)
        for p, each in optimizer.state.items():
            assert torch.equal(other.state[p]["m"], 6 * each["m"]) and torch.equal(other.state[p]["h"], each["h"])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_state_goes_on_in_the_dtype_of_the_parameters(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """As torch's optimizers have it; steps are those of the model that it was saved with, but for rounding."""
    pairs = []
    for dtype in dtypes:
        model = network().to(dtype)
        optimizer = CASES[name].make(model.parameters())
        if pairs:
            model.load_state_dict(pairs[0][0].state_dict())
            optimizer.load_state_dict(pairs[0][1].state_dict())
        else:
            for seed in range(3):
                x, y = data(seed)
                step(model, optimizer, (x.to(dtype), y))
        pairs.append((model, optimizer))
    x, y = data(3)
    for dtype, (model, optimizer) in zip(dtypes, pairs, strict=True):
        step(model, optimizer, (x.to(dtype), y))
    for p, q in zip(*(values(model) for model, _ in pairs), strict=True):
        torch.testing.assert_close(p, q, check_dtype=False, rtol=1e-3, atol=1e-4)
    assert {t.dtype for t in tensors_of(pairs[1][1]) if t.is_floating_point()} <= {dtypes[1]}


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_keeps_its_state_in_single(name: str) -> None:
    model = network().bfloat16()
    optimizer = CASES[name].make(model.parameters())
    x, y = data()
    step(model, optimizer, (x.bfloat16(), y))
    again = CASES[name].make(model.parameters())
    again.load_state_dict(optimizer.state_dict())
    assert same(state_of(optimizer), state_of(again))
    kinds = {t.dtype for t in tensors_of(optimizer) if t.is_floating_point()}
    assert kinds == {torch.float32} and optimizer.steps == 1
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_hooks_of_the_step_run_once(name: str) -> None:
    """Also where torch has prepared the class that all derive from."""
    optim.Optimizer(network().parameters(), [optim.Descend()])
    model, calls = network(), []
    optimizer = CASES[name].make(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    step(model, optimizer, data())
    assert calls == ["before", "after"]


@pytest.mark.parametrize("name", KINDS)
def test_a_step_that_is_not_finite_is_skipped_and_reported(name: str) -> None:
    model = network()
    optimizer = CASES[name].make(model.named_parameters())
    step(model, optimizer, data())
    before, state = values(model), state_of(optimizer)
    x, y = data(2)
    optimizer.zero_grad()
    with optim.emit(optimizer):
        loss = LOSS(model(x), y)
        loss.backward()
    model[0].weight.grad[1, 2] = float("nan")
    with pytest.warns(optim.SkippedStep, match=r"skipped a step: the gradient of 0.weight, shape \[5, 4\] is NaN"):
        optimizer.step()
    assert same(before, values(model)) and same(state, state_of(optimizer)) and optimizer.skipped == 1
    twin = copy.deepcopy(optimizer.state_dict())
    step(model, optimizer, (x, y))  # as if nothing had been
    assert not same(before, values(model)) and not same(twin, state_of(optimizer))


@pytest.mark.parametrize("name", KINDS)
def test_a_step_with_a_quantity_that_is_not_finite_is_skipped_where_the_gradient_is(name: str) -> None:
    model, (x, y) = network(), data()
    optimizer = CASES[name].make(model.named_parameters())
    with optim.emit(optimizer):
        LOSS(model(x), y).backward()
    before, weight = values(model), model[0].weight
    for field, value in optimizer._received[weight].items():
        found = value.pairs[0].outputs if hasattr(value, "pairs") else value
        if isinstance(found, Tensor):
            found.view(-1)[0] = torch.inf
            with pytest.warns(optim.SkippedStep, match=f"the {field} of 0.weight"):
                optimizer.step()
            break
    else:
        pytest.fail("nothing was emitted")
    assert same(before, values(model)) and not optimizer.state and bool(weight.grad.isfinite().all())


@pytest.mark.parametrize("name", KINDS)
def test_torchs_random_numbers_are_left_alone_and_a_seed_gives_the_same_run(name: str) -> None:
    ends = []
    for start, seed in ((0, 0), (5, 0), (5, 1)):
        model = network()
        optimizer = CASES[name].make(model.parameters(), seed=seed)
        torch.manual_seed(start)
        before = torch.get_rng_state()
        for k in range(3):
            step(model, optimizer, data(k))
        assert torch.equal(before, torch.get_rng_state())
        ends.append(values(model))
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2]) == (not CASES[name].of_draws)


@pytest.mark.parametrize("name", KINDS)
def test_a_scheduler_sets_the_rate(name: str) -> None:
    model = network()
    optimizer = CASES[name].make(model.parameters())
    first = optimizer.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.0 if k == 1 else 1.0)
    step(model, optimizer, data())
    scheduler.step()
    before = values(model)
    step(model, optimizer, data(2))
    assert same(before, values(model)) and optimizer.steps == 2
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == first
    step(model, optimizer, data(3))
    assert not same(before, values(model))
    moving = any(k in optimizer.param_groups[0] for k in ("momentum", "betas"))
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10, cycle_momentum=moving)
    step(model, optimizer, data(4))
    cycle.step()


@pytest.mark.parametrize("name", KINDS)
def test_frozen_and_unused_parameters_stay(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.idle, self.last = nn.Linear(4, 5), nn.Linear(2, 2), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)))

    model = px.extend(Net())
    model.first.requires_grad_(False)
    optimizer = CASES[name].make(model.parameters())
    kept = [p.clone() for p in (*model.first.parameters(), *model.idle.parameters())]
    for k in range(3):
        step(model, optimizer, data(k))
    assert same(kept, [p.detach() for p in (*model.first.parameters(), *model.idle.parameters())])
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.last.parameters()}


@pytest.mark.parametrize("name", KINDS)
def test_a_parameter_without_its_quantity_is_named(name: str) -> None:
    model = network()
    optimizer = CASES[name].make(model.named_parameters())
    before = values(model)
    LOSS(model(data()[0]), data()[1]).backward()
    with pytest.raises(px.PackextError, match=r"0.weight, shape \[5, 4\] has a gradient, but no .* Run the backward"):
        optimizer.step()
    other = px.extend(nn.Linear(4, 3))
    apart = nn.Linear(4, 3)
    optimizer = CASES[name].make([*other.parameters(), *apart.parameters()])
    with optim.emit(optimizer):
        LOSS(other(data()[0]) + apart(data()[0]), data()[1]).backward()
    with pytest.raises(px.PackextError, match=r"parameter 2 of group 0, shape \[3, 4\] has a gradient, but no"):
        optimizer.step()
    assert same(before, values(model)) and not optimizer.state and optimizer.steps == 0


@pytest.mark.parametrize("name", KINDS)
def test_refuses_what_is_out_of_range(name: str) -> None:
    group = CASES[name].make(network().parameters()).param_groups[0]
    for what in ("lr", "damping", "weight_decay"):
        for bad in (-0.1, float("nan"), float("inf")):
            if what in group:
                with pytest.raises(ValueError, match=f"{what} must be finite and not negative, got {bad}"):
                    CASES[name].make([{"params": list(network().parameters()), what: bad}])
                optimizer, more = CASES[name].make(network().parameters()), {"params": [nn.Parameter(torch.ones(2))]}
                with pytest.raises(ValueError, match=what):
                    optimizer.add_param_group({**more, "fallback": True, "lr": 0.1, what: bad})
                assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="empty parameter list"):
        CASES[name].make([])


def test_what_a_group_would_not_get_is_refused() -> None:
    p = nn.Parameter(torch.zeros(2))
    for group, text in (
        ({"decay": 0.5}, "KFAC: decay is for all groups: pass it to KFAC"),
        ({"bias": "separate"}, "bias is for all groups"),
        ({"nesterov": True}, "KFAC has no nesterov"),
        ({"fallback": True, "lr": 0.1, "amsgrad": True}, "KFAC has no amsgrad"),
        ({"betas": (0.9, 0.99)}, "KFAC has no betas"),
        ({"max_norm": 1.0}, "KFAC has no max_norm"),
    ):
        with pytest.raises(ValueError, match=text):
            optim.KFAC([{"params": [p], **group}])
    optim.KFAC([{"params": [p], "nesterov": False, "name": "of the user"}])
    optim.KFAC([{"params": [p], "fallback": True, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6}])
    own = optim.Optimizer([{"params": [p], "decay": 0.5}], [optim.Part(decay=0.1), optim.Descend()])
    assert own.param_groups[0]["decay"] == 0.5


@pytest.mark.parametrize("name", KINDS)
def test_closures(name: str) -> None:
    ends = []
    for with_closure in (False, True):
        model = network()
        optimizer = CASES[name].make(model.parameters())
        for k in range(3):
            x, y = data(k)

            def closure() -> Tensor:
                optimizer.zero_grad()  # noqa: B023
                loss = LOSS(model(x), y)  # noqa: B023
                loss.backward()
                return loss

            if with_closure:
                assert float(optimizer.step(closure).detach()) > 0
            else:
                step(model, optimizer, (x, y))
        ends.append(values(model))
    assert same(*ends)

    def within() -> None:
        with optim.emit(optimizer):
            pass

    with pytest.raises(px.PackextError, match="within itself"):
        optimizer.step(within)


@pytest.mark.parametrize("size", [1.0, 1e25])
def test_updates_are_clipped_where_their_squares_overflow(size: float) -> None:
    p = nn.Parameter(torch.zeros(4, dtype=torch.float32))
    optimizer = optim.Optimizer([p], [optim.ClipNorm(0.5), optim.Descend(1.0)])
    p.grad = size * torch.tensor([3.0, 0.0, -4.0, 0.0], dtype=torch.float32)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.3, 0.0, 0.4, 0.0], dtype=torch.float32))


@pytest.mark.parametrize("size", [1.0, 1e20])
def test_steps_are_bounded_where_products_overflow(size: float) -> None:
    """Of one sign, and of both, whose sum is no number."""
    for signs in ([1.0, 1.0], [1.0, -0.5]):

        class Scaled(optim.Part):
            def __call__(self, work: optim.Work) -> None:
                work.updates = [s * g for s, g in zip(signs, work.grads, strict=True)]  # noqa: B023

        params = [nn.Parameter(torch.zeros(2, dtype=torch.float32)) for _ in signs]
        optimizer = optim.Optimizer(params, [Scaled(), optim.KLClip(1e-3), optim.Descend(0.5)])
        for p in params:
            p.grad = size * torch.tensor([3.0, -4.0], dtype=torch.float32)
        optimizer.step()
        shrink = (1e-3 / (0.25 * 25 * sum(signs))) ** 0.5
        for p, s in zip(params, signs, strict=True):
            expected = -0.5 * shrink * s * torch.tensor([3.0, -4.0], dtype=torch.float32)
            torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize("fallback", [False, True])
def test_an_update_that_half_precision_does_not_hold_is_skipped(fallback: bool) -> None:
    p, q = (nn.Parameter(torch.full((2,), 6e4, dtype=torch.float16)) for _ in range(2))
    named = {"params": [("p", p)], "fallback": fallback, "lr": 1e4}
    optimizer = optim.Optimizer([named, {"params": [("q", q)]}], [optim.Momentum(0.5), optim.Descend(1e-3)])
    p.grad, q.grad = (torch.full_like(p, -1.0) for _ in range(2))
    text = r"skipped a step: the update of p, shape \[2\] takes it beyond what torch.float16 holds"
    with pytest.warns(optim.SkippedStep, match=text):
        optimizer.step()
    assert (p == 6e4).all() and (q == 6e4).all() and not optimizer.state and optimizer.steps == 0
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    assert optimizer.steps == 1 and p.isfinite().all()


@pytest.mark.parametrize("make", [lambda p: optim.KFAC(p, factors_every=2), lambda p: optim.AdaHessian(p, 0.1)])
@pytest.mark.parametrize("empty", [False, True])
def test_momentum_goes_on_where_all_gradients_are_zero(make: Any, empty: bool) -> None:
    """As in torch's optimizers, whether the step asks something of the pass or not; so after an empty batch."""
    model = network()
    optimizer = make(model.parameters())
    step(model, optimizer, data())
    before = values(model)
    states = [dict(optimizer.state[p]) for p in model.parameters()]
    optimizer.zero_grad()
    x, y = data()
    with optim.emit(optimizer):
        (LOSS(model(x[:0]), y[:0]) if empty else 0 * LOSS(model(x), y)).backward()
    assert not any(bool(p.grad.any()) for p in model.parameters())
    optimizer.step()
    assert optimizer.steps == 2 and not optimizer.skipped
    for p, old, state in zip(model.parameters(), before, states, strict=True):
        if "velocity" in state:
            torch.testing.assert_close(p.detach(), old - optimizer.param_groups[0]["lr"] * 0.9 * state["velocity"])
        else:
            assert torch.equal(optimizer.state[p]["m"], 0.9 * state["m"]) and (p != old).any()


def test_parts_make_an_optimizer() -> None:
    """A part of one's own, with a hyperparameter, a quantity and a state."""

    class Damped(optim.Part):
        def quantities(self, optimizer: optim.Optimizer) -> list[Any]:
            return [px.DiagGGNExact()]

        def __call__(self, work: optim.Work) -> None:
            diagonals = work.emitted("diag_ggn_exact")
            work.updates = [u / (d + c) for u, d, c in zip(work.updates, diagonals, work.of("shift"), strict=True)]
            work.set("seen", [1 + n for n in work.old("seen", 0)])

    model, batch = network(), data()
    parts = [Damped(shift=0.5), optim.ClipNorm(0.1), optim.Momentum(0.5), optim.Descend(0.2)]
    optimizer = optim.Optimizer(model.parameters(), parts)
    theta = {k: p.detach().clone() for k, p in model.named_parameters()}
    velocity = {k: torch.zeros_like(p) for k, p in theta.items()}
    for _ in range(3):
        step(model, optimizer, batch)
        g, blocks = oracles.gradient(theta, *batch), oracles.ggn_blocks(theta, batch[0])
        u = {k: g[k] / (blocks[k].diagonal().view(g[k].shape) + 0.5) for k in g}
        shrink = min(1.0, 0.1 / float(torch.cat([each.flatten() for each in u.values()]).norm()))
        velocity = {k: 0.5 * velocity[k] + shrink * u[k] for k in u}
        theta = {k: p - 0.2 * velocity[k] for k, p in theta.items()}
    for k, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), theta[k], rtol=1e-9, atol=1e-11)
    assert all(s["seen"] == 3 for s in optimizer.state.values())
    with pytest.raises(ValueError, match="two parts have a hyperparameter 'lr'"):
        optim.Optimizer(model.parameters(), [optim.Descend(), optim.Descend()])
    for wrong in ([], [optim.Momentum()], [optim.Diagonal(), optim.DecoupledDecay(0.1)]):
        with pytest.raises(ValueError, match="no part has a learning rate"):
            optim.Optimizer(model.parameters(), wrong)
    with pytest.raises(ValueError, match="Descend is the last part, and L2 comes after it"):
        optim.Optimizer(model.parameters(), [optim.Momentum(), optim.Descend(), optim.L2(0.1)])


@pytest.mark.parametrize("name", [n for n in NAMES if not CASES[n].of_draws and n != "KFRA"])
def test_accumulated_passes_are_one_batch(name: str) -> None:
    """Of 5 and 7 samples, with the shares of the mean that they have."""
    ends = []
    for sizes in ([12], [5, 7]):
        model = network()
        optimizer = CASES[name].make(model.parameters())
        for seed in range(4):  # EKFAC has second moments in a basis that there is from the fourth
            x, y = data(seed)
            optimizer.zero_grad()
            for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
                with optim.emit(optimizer):
                    (LOSS(model(a), b) * (len(a) / 12)).backward()
            optimizer.step()
        ends.append(values(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-11)


def test_factors_that_are_averaged_at_each_layer_are_of_one_pass() -> None:
    """Of two passes, mean KFRA factors are not those of both batches together."""
    model = network()
    optimizer, before = CASES["KFRA"].make(model.parameters()), values(model)
    x, y = data()
    with optim.emit(optimizer):
        (LOSS(model(x[:5]), y[:5]) * (5 / 12)).backward()
    with pytest.raises(px.PackextError, match="kfra of several backward passes is not defined: take a step after each"):
        with optim.emit(optimizer):
            (LOSS(model(x[5:]), y[5:]) * (7 / 12)).backward()
    assert same(values(model), before)
    step(model, optimizer, (x, y))
    assert optimizer.steps == 1


@pytest.mark.parametrize("kind", [optim.KFAC, optim.EKFAC, optim.SINGD, optim.MSVAG, optim.SPRING])
def test_a_pass_that_does_not_reach_a_parameter_counts_its_samples(kind: Any) -> None:
    options = {"approx": "reduce", "fisher": "exact", "bias": "joint"} if "approx" in signature(kind).parameters else {}
    x, y = data()
    x, first = x[x[:, 0].argsort()], int((x[:, 0] <= 0).sum())
    ends = []
    for parts in ([12], [first, 12 - first], [first, 2, 10 - first]):
        torch.manual_seed(0)
        model = px.extend(TwoHeads(), batch_axis=None)
        optimizer = kind(model.parameters(), **options)
        for _ in range(2):
            optimizer.zero_grad()
            for a, b in zip(x.split(parts), y.split(parts), strict=True):
                with optim.emit(optimizer):
                    (LOSS(model(a), b) * (len(a) / 12)).backward()
            optimizer.step()
        ends.append(values(model))
    for other in ends[1:]:
        torch.testing.assert_close(ends[0], other, rtol=1e-9, atol=1e-11)


FORGET: dict[str, Callable[[nn.Module, Any], Any]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model, to zeros": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "by hand": lambda model, optimizer: [p.grad.zero_() for p in model.parameters() if p.grad is not None],
}


@pytest.mark.parametrize("forget", FORGET)
def test_what_was_emitted_is_forgotten_with_its_gradient(forget: str) -> None:
    ends = []
    for again in (False, True):
        model = network()
        optimizer = CASES["KFLR"].make(model.parameters())
        if again:
            with optim.emit(optimizer):
                (1e3 * LOSS(model(data(5)[0]), data(5)[1])).backward()
            FORGET[forget](model, optimizer)
        with optim.emit(optimizer):
            LOSS(model(data()[0]), data()[1]).backward()
        optimizer.step()
        ends.append(values(model))
    assert same(*ends)


@pytest.mark.parametrize(
    ("name", "heads"), [(n, 1) for n in KINDS] + [(n, 2) for n in ("KFLR", "EKFAC", "AdaHessian", "M-SVAG", "SPRING")]
)
def test_gradients_of_zeros_are_none(name: str, heads: int) -> None:
    """In an ordinary loop, and in one whose passes take turns with two heads."""
    ends = []
    for set_to_none in (True, False):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
        models = [px.extend(nn.Sequential(*body, nn.Linear(5, 3))) for _ in range(heads)]
        model = nn.ModuleList(models)
        optimizer = CASES[name].make(model.parameters())
        for k in range(5):
            model.zero_grad(set_to_none)
            with optim.emit(optimizer):
                LOSS(models[k % heads](data(k)[0]), data(k)[1]).backward()
            optimizer.step()
        assert optimizer.steps == 5
        ends.append(values(model))
    assert same(*ends)


@pytest.mark.parametrize("name", KINDS)
def test_a_step_without_a_gradient_is_none(name: str) -> None:
    ends = []
    for zeros in (None, False, True):
        model = network()
        optimizer = CASES[name].make(model.parameters())
        if zeros is not None:
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if zeros else None
            optimizer.step()
            assert optimizer.steps == 0 and not optimizer.state
        for k in range(3):
            step(model, optimizer, data(k))
        ends.append(values(model))
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", KINDS)
def test_state_by_names_as_torchs_checkpoints_have_it(name: str) -> None:
    model, other = network(), network(7)
    optimizer, resumed = (CASES[name].make(m.parameters()) for m in (model, other))
    for seed in range(3):
        step(model, optimizer, data(seed))
    saved = checkpoint.get_optimizer_state_dict(model, optimizer)
    assert [*saved["state"]] == [k for k, _ in model.named_parameters()]
    other.load_state_dict(model.state_dict())
    checkpoint.set_optimizer_state_dict(other, resumed, copy.deepcopy(saved))
    for seed in range(3, 6):
        for m, o in ((model, optimizer), (other, resumed)):
            step(m, o, data(seed))
    assert same(values(model), values(other)) and same(state_of(optimizer), state_of(resumed))


def test_a_state_that_was_looked_at_is_whole() -> None:
    model, unused = network(), nn.Parameter(torch.zeros(2))
    optimizer, other = (optim.KFAC([*model.parameters(), unused]) for _ in range(2))
    assert not optimizer.state[unused]  # torch's own makes it
    step(model, optimizer, data())
    other.load_state_dict(optimizer.state_dict())
    assert same(state_of(optimizer), state_of(other))


def test_a_state_from_which_something_was_left_out_is_refused() -> None:
    model = network()
    optimizer = CASES["M-SVAG"].make(model.parameters())
    step(model, optimizer, data())
    flat = checkpoint.StateDictOptions(flatten_optimizer_state_dict=True)
    saved = checkpoint.get_optimizer_state_dict(model, optimizer, options=flat)
    fresh = CASES["M-SVAG"].make(model.parameters())
    model.zero_grad()
    with pytest.raises(px.PackextError, match="4 parameters had a state when this was saved, and 0 have one"):
        checkpoint.set_optimizer_state_dict(model, fresh, saved, options=flat)
    assert fresh.steps == 0 and fresh.param_groups[0]["lr"] == 0.1


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.9's own use of it
@pytest.mark.parametrize("name", ["KFAC", "M-SVAG"])
def test_checkpoints_that_are_loaded_into_what_is_there(name: str, tmp_path: Path) -> None:
    """A new optimizer has nothing there: it would go on with the number of steps, and without all else."""
    model, other = network(), network(7)
    optimizer, resumed = (CASES[name].make(m.parameters()) for m in (model, other))
    for seed in range(3):
        step(model, optimizer, data(seed))
    dcp.save(dict(zip("mo", checkpoint.get_state_dict(model, optimizer), strict=True)), checkpoint_id=tmp_path)

    def load() -> None:
        there = dict(zip("mo", checkpoint.get_state_dict(other, resumed), strict=True))
        dcp.load(there, checkpoint_id=tmp_path)
        checkpoint.set_state_dict(other, resumed, model_state_dict=there["m"], optim_state_dict=there["o"])

    with pytest.raises(px.PackextError, match="and 0 have one in it.* take a step of all parameters before load"):
        load()
    step(other, resumed, data(5))
    load()
    for seed in range(3, 6):
        for m, o in ((model, optimizer), (other, resumed)):
            step(m, o, data(seed))
    assert same(values(model), values(other)) and same(state_of(optimizer), state_of(resumed))


@pytest.mark.parametrize("closure", [False, True])
def test_a_gradient_of_passes_that_emitted_nothing_is_refused(closure: bool) -> None:
    """As where only the last of several micro-batches runs within `step(closure)`."""
    model = network()
    optimizer = CASES["KFLR"].make(model.parameters())
    before, (x, y) = values(model), data()

    def loss() -> Tensor:
        total = LOSS(model(x), y)
        total.backward()
        return total

    loss()
    with pytest.raises(px.PackextError, match="had a gradient when px.optim.emit was entered"):
        if closure:
            optimizer.step(loss)
        else:
            with optim.emit(optimizer):
                loss()
            optimizer.step()
    assert same(before, values(model))
    for set_to_none in (True, False):
        optimizer.zero_grad(set_to_none)
        optimizer.step(loss)
    with optim.emit(optimizer):  # the step's gradient is forgotten within
        optimizer.zero_grad() if closure else model.zero_grad()
        loss()
    optimizer.step()
    assert not same(before, values(model))


def test_a_grad_scaler_changes_nothing_and_skips() -> None:
    ends = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)):
        model = network()
        optimizer = CASES["KFLR"].make(model.parameters())
        for k in range(3):
            x, y = data(k)
            optimizer.zero_grad()
            with optim.emit(optimizer, **({} if scaler is None else {"scale": 1 / scaler.get_scale()})):
                loss = LOSS(model(x), y)
                (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                optimizer.step()
                continue
            if k == 1:  # an overflow: the scaler takes no step, and neither does the twin
                model[0].weight.grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
            assert optimizer.steps == (k + 1 if k < 1 else k)
        ends.append((values(model), optimizer))
    model = network()
    optimizer = CASES["KFLR"].make(model.parameters())
    for k in (0, 2):
        step(model, optimizer, data(k))
    torch.testing.assert_close(ends[1][0], values(model), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_the_factor_of_a_grad_scaler_is_out_of_all_or_refused(name: str, unscale: bool) -> None:
    """The scaler takes it out of `.grad` alone, and what was emitted would keep it."""
    model = network()
    optimizer, before = CASES[name].make(model.parameters()), values(model)
    scaler, (x, y) = torch.amp.GradScaler("cpu"), data()
    with optim.emit(optimizer):
        scaler.scale(LOSS(model(x), y)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(px.PackextError, match=r"has the factor of the GradScaler.*scale=1 / scaler.get_scale\(\)"):
        scaler.step(optimizer)
    assert same(values(model), before) and optimizer.steps == 0
    ends = []
    for factor in (1.0, 1024.0):
        model = network()
        optimizer = CASES[name].make(model.parameters())
        scaler = torch.amp.GradScaler("cpu", factor)
        with optim.emit(optimizer, scale=1 / scaler.get_scale()):
            scaler.scale(LOSS(model(x), y)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        ends.append(values(model))
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert not getattr(optimizer, "_step_supports_amp_scaling")  # noqa: B009 - as Lightning asks, before it clips
    half = network().half()
    optimizer, scaler = CASES[name].make(half.parameters()), torch.amp.GradScaler("cpu", 8.0)
    scaler.scale(sum(p.sum() for p in half.parameters())).backward()
    with pytest.raises(px.PackextError, match=f"{type(optimizer).__name__} with a GradScaler: keep parameters in"):
        scaler.step(optimizer)


def test_the_factor_of_a_grad_scaler_is_inverted_once_for_all_gradients() -> None:
    class Inversions(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += func is torch.ops.aten.reciprocal.default and bool(args[0] == 1024.0)
            return func(*args, **(kwargs or {}))

    model, scaler, (x, y) = network(), torch.amp.GradScaler("cpu", 1024.0), data()
    optimizer = CASES["KFLR"].make(model.parameters())
    with optim.emit(optimizer, scale=1 / scaler.get_scale()):
        scaler.scale(LOSS(model(x), y)).backward()
    with Inversions() as inversions:
        scaler.step(optimizer)
    assert inversions.seen == 1 and optimizer.steps == 1


def test_a_fallback_is_adamw_and_named_where_it_is_needed() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 3)
            self.table = nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.table.sum(0)

    model = px.extend(Net())
    x, y = data()
    optimizer = CASES["KFLR"].make(model.named_parameters())
    with pytest.raises(px.UnsupportedUseError, match=r'for table \[2, 3\].* "fallback": True, "lr": ...}, which AdamW'):
        step(model, optimizer, (x, y))
    with pytest.raises(ValueError, match="needs a learning rate of its own"):
        CASES["KFLR"].make([{"params": [model.table], "fallback": True}])
    twin = copy.deepcopy(model)
    rest = {"params": [("table", model.table)], "fallback": True, "lr": 0.01, "weight_decay": 0.1}
    optimizer = CASES["KFLR"].make([{"params": list(model.layer.named_parameters())}, rest])
    adamw = torch.optim.AdamW([twin.table], lr=0.01, weight_decay=0.1)
    for k in range(4):
        twin.zero_grad()
        twin.layer.load_state_dict(model.layer.state_dict())
        LOSS(twin(data(k)[0]), data(k)[1]).backward()
        step(model, optimizer, data(k))
        adamw.step()
        torch.testing.assert_close(model.table, twin.table, rtol=1e-9, atol=1e-12)
