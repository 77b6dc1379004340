"""One pass for a monitor and an optimizer: each gets what it would get by itself, and training is not changed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import packext as px
from packext import _flight, _listening, optim
from packext._pass import Pass
from packext._statistics import Statistics
from packext.diagnostics import Alpha, Cockpit, GradHist1d, GradNorm, GradSNR, HessTrace, NormTest, TICDiag, UpdateSize
from tests.helpers import double_precision, processes

pytestmark = pytest.mark.usefixtures("double")

LOSS = px.extend(nn.CrossEntropyLoss())
PRIVATE: dict[str, Any] = {"lr": 0.1, "max_norm": 0.5, "noise_multiplier": 0.5, "expected_batch_size": 6.0, "seed": 1}


def last_layer(m: Any) -> list[dict[str, Any]]:
    return [{"params": m[-1].parameters()}, {"params": m[0].parameters(), "fallback": True, "lr": 1e-2}]


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
    "KFAC": lambda m: optim.KFAC(m.parameters(), lr=0.05, damping=1e-2, factors_every=2, inverses_every=2),
    "KFAC empirical": lambda m: optim.KFAC(m.parameters(), lr=0.05, fisher="empirical", factors_every=1),
    "GGN": lambda m: optim.Preconditioned(m.parameters(), "diag_ggn_exact", lr=0.05),
    "GGN-MC": lambda m: optim.Preconditioned(m.parameters(), "diag_ggn_mc", lr=0.05),
    "last layer": lambda m: optim.Preconditioned(last_layer(m), "kflr", lr=0.05),
    "AdaHessian": lambda m: optim.AdaHessian(m.parameters(), lr=0.05),
    "MSVAG": lambda m: optim.MSVAG(m.parameters(), lr=0.05),
    "SPRING": lambda m: optim.SPRING(m.parameters(), lr=0.05),
    "DPSGD": lambda m: optim.DPSGD(m.parameters(), **PRIVATE),
}
#: What a monitor asks for at levels "economy" and "business", with the GGN exact, so that there is nothing to draw.
INSTRUMENTS = (NormTest, GradNorm, GradSNR, GradHist1d, Alpha, UpdateSize)


def network() -> Any:
    torch.manual_seed(0)
    return px.extend(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(12, 3)))


def images(k: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(k + 1)
    return torch.randn(6, 2, 4, 4), torch.randint(3, (6,))


def test_what_the_optimizer_cannot_have_is_no_matter_of_the_monitor() -> None:
    model = px.extend(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))))
    optimizer = optim.KFAC(model.parameters(), lr=0.05)
    with pytest.raises(px.UnsupportedUseError, match="^KFAC has no Kronecker factors .* With KFAC: put such"):
        with Cockpit(model, optimizer, None, instruments=[NormTest(), TICDiag()]).step(), optim.emit(optimizer):
            LOSS(model(torch.randn(6, 5)), torch.randint(3, (6,))).backward()


def watching(model: nn.Module, optimizer: Any, level: str | None = None) -> Cockpit:
    more = [] if level else [*(kind() for kind in INSTRUMENTS), HessTrace("ggn"), TICDiag("ggn")]
    return Cockpit(model, optimizer, level, instruments=more)


def emitting(optimizer: Any) -> Any:
    return optim.emit(optimizer) if hasattr(optimizer, "quantities") else nullcontext()


def trained(
    name: str, watched: bool, level: str | None = None, wrap: Callable[[Any], Any] = lambda m: m, first: int = 0
) -> tuple[list[list[Tensor]], list[Any]]:
    """Parameters after each step, and what the monitor said of it."""
    model = network()
    optimizer, whole = OPTIMIZERS[name](model), wrap(model)
    monitor = watching(whole, optimizer, level) if watched else None
    thetas, said = [], []
    for k in range(first, first + 2):
        x, y = images(k)
        with nullcontext() if monitor is None else monitor.step():
            optimizer.zero_grad()
            with emitting(optimizer):
                LOSS(whole(x), y).backward()
            optimizer.step()
        thetas.append([p.detach().clone() for p in model.parameters()])
        assert not any(vars(p) for p in model.parameters())
        if monitor is not None:
            said.append((monitor.values, monitor.absent))
    return thetas, said


def by_itself(
    name: str, thetas: list[list[Tensor]], wrap: Callable[[Any], Any] = lambda m: m, first: int = 0
) -> list[Any]:
    """What a monitor says that has a pass of its own, in a run with these parameters."""
    model = network()
    whole = wrap(model)
    monitor = watching(whole, OPTIMIZERS[name](model))
    said = []
    for k, after in enumerate(thetas, first):
        x, y = images(k)
        with monitor.step():
            monitor.optimizer.zero_grad()
            LOSS(whole(x), y).backward()
            with torch.no_grad():
                for p, new in zip(model.parameters(), after, strict=True):
                    p.copy_(new)
        said.append((monitor.values, monitor.absent))
    return said


def same_as_alone(name: str, *where: Any) -> None:
    (thetas, said), (without, _) = trained(name, True, None, *where), trained(name, False, None, *where)
    for one, other in zip(thetas, without, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
    assert not torch.equal(without[0][0], without[1][0])
    for (values, absent), (want, wanting) in zip(said, by_itself(name, thetas, *where), strict=True):
        assert absent == wanting and values.keys() == want.keys()
        assert {"NormTest", "GradNorm", "GradSNR", "HessTrace", "TICDiag", "UpdateSize"} <= values.keys()
        for key in want:
            np.testing.assert_allclose(values[key], want[key], rtol=1e-10, atol=1e-13, err_msg=key)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.keys() - {"GGN-MC"}))
def test_a_monitor_and_an_optimizer_get_what_each_gets_by_itself(name: str) -> None:
    same_as_alone(name)


def worker(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        with double_precision():
            for name in ("KFAC", "AdaHessian", "DPSGD"):
                same_as_alone(name, DistributedDataParallel, 10 * rank)
        dist.barrier()  # who ends first takes the store with it
    finally:
        gc.collect()  # groups that outlive this in a model abort the process at its end
        dist.destroy_process_group()


def test_in_two_processes() -> None:
    processes(worker)


@pytest.mark.parametrize(("name", "level"), [("KFAC", "economy"), ("GGN-MC", "business"), ("DPSGD", "full")])
def test_levels_do_not_change_training(name: str, level: str) -> None:
    (thetas, said), (without, _) = trained(name, True, level), trained(name, False)
    for one, other in zip(thetas, without, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
    assert {"NormTest", "GradNorm"} <= said[-1][0].keys()


# -- contexts of one's own ------------------------------------------------------------------------------------


def test_each_context_has_its_own_scale_parameters_and_results() -> None:
    model, (x, y) = network().eval(), images()
    head = [model[-1].weight]
    alone = []
    both: tuple[dict[str, Any], ...] = ({"parameters": head}, {"scale": "sample", "attach": False})
    for options in both:
        with px.backpack(px.BatchGrad(), px.Variance(), px.DiagGGNExact(), **options) as results:
            LOSS(model(x), y).backward()
        alone.append({name: vars(found) for name, found in results.items()})
    model.zero_grad()
    for p in model.parameters():
        vars(p).clear()
    asked = px.BatchGrad(), px.Variance(), px.DiagGGNExact()  # the very same for both
    inner, outer = (
        px.backpack(*asked, parameters=head),
        px.backpack(*asked, scale="sample", attach=False, overhear=True),
    )
    for order in ((outer, inner), (inner, outer)):
        with order[0] as one, order[1] as other:
            LOSS(model(x), y).backward()
        got, heard = (other, one) if order[0] is outer else (one, other)
        assert list(got) == ["4.weight"] and len(heard) == 4
        assert [bool(vars(p)) for p in model.parameters()] == [False, False, True, False]
        for field, value in vars(got["4.weight"]).items():
            if field != "_name":
                assert torch.equal(value, alone[0]["4.weight"][field]), field
                assert getattr(model[-1].weight, field) is value
        for name, found in heard.items():
            for field, value in vars(found).items():
                if field != "_name":
                    torch.testing.assert_close(value, alone[1][name][field], rtol=1e-12, atol=1e-15)
        kept = heard["4.weight"].grad_batch.clone(), heard["4.weight"].diag_ggn_exact.clone()
        for field in ("grad_batch", "variance", "diag_ggn_exact"):
            getattr(model[-1].weight, field).zero_()  # as clipping in place would
        assert torch.equal(heard["4.weight"].grad_batch, kept[0]) and float(kept[0].abs().sum()) > 0
        assert torch.equal(heard["4.weight"].diag_ggn_exact, kept[1]) and float(kept[1].sum()) > 0


def test_a_column_for_one_is_not_changed_by_the_other() -> None:
    """GGNGram needs a column for each class, and DiagGGNExact one less."""
    model, (x, y) = network().eval(), images()
    with px.backpack(px.DiagGGNExact()) as alone:
        LOSS(model(x), y).backward()
    with px.backpack(px.GGNGram(), attach=False, overhear=True) as heard, px.backpack(px.DiagGGNExact()) as got:
        LOSS(model(x), y).backward()
    assert heard.ggn_gram.shape == (3, 6, 3, 6)
    for name in alone:
        assert torch.equal(got[name].diag_ggn_exact, alone[name].diag_ggn_exact)


def test_grad_is_what_the_other_leaves() -> None:
    """Sums that a quantity has formed serve as `.grad`, and differ from those of torch in the last bits."""
    torch.manual_seed(0)
    model, (x, y) = px.extend(nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(32, 3))).float(), images()
    grads = []
    for outer, inner in ((False, True), (True, True), (True, False)):
        model.zero_grad()
        over = px.backpack(px.GradDot(), attach=False, exact_grad=True, overhear=True) if outer else nullcontext()
        with over, px.backpack(px.BatchGrad()) if inner else nullcontext():
            LOSS(model(x.float()), y).backward()
        grads.append(model[0].weight.grad.clone())
    assert torch.equal(grads[0], grads[1]) and not torch.equal(grads[0], grads[2])


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(4, 5)), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.table).tanh().flatten(1))


def test_what_one_cannot_have_of_a_parameter_the_other_may() -> None:
    model = px.extend(Table())
    x, y = torch.randn(6, 4, 5), torch.randint(3, (6,))
    with px.backpack(px.DiagGGNExact(), attach=False, overhear=True) as heard:
        with px.backpack(px.KFLR(), parameters=model.head.parameters()) as got:
            LOSS(model(x), y).backward()
    assert sorted(got) == ["head.bias", "head.weight"] and heard["table"].diag_ggn_exact.shape == (4, 5)


def test_two_quantities_of_one_name_from_one_pass() -> None:
    """As the error says that refuses them in one context: each is as it is alone."""
    model, (x, y), alone = network().eval(), images(), []
    kinds = [
        (px.KFAC(fisher="exact", approx=a), px.TopEigenvalues(which=w)) for a, w in (("expand", "LA"), ("reduce", "SA"))
    ]
    for kind in kinds:
        with px.backpack(*kind, attach=False) as each:
            LOSS(model(x), y).backward()
        alone.append(each)
    with pytest.raises(ValueError, match=r"'kfac'.*inside of this one.*attach=False, overhear=True\)"):
        px.backpack(kinds[0][0], kinds[1][0])
    with px.backpack(*kinds[0]) as first, px.backpack(*kinds[1], attach=False, overhear=True) as second:
        LOSS(model(x), y).backward()
    for got, want in zip((first, second), alone, strict=True):
        torch.testing.assert_close(got.top_eigenvalues.values, want.top_eigenvalues.values, rtol=1e-6, atol=0)
        for name in want:
            torch.testing.assert_close(got[name].kfac, want[name].kfac)
    assert first.top_eigenvalues.values > 0 > second.top_eigenvalues.values


def test_the_same_draws_serve_both() -> None:
    model, (x, y) = network().eval(), images()
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    with px.backpack(px.DiagGGNMC(generator=draws[0])) as alone:
        LOSS(model(x), y).backward()
    outer = px.backpack(px.DiagGGNMC(generator=draws[1]), scale="sample", attach=False, overhear=True)
    with outer as heard, px.backpack(px.DiagGGNMC(generator=draws[1])) as got:
        LOSS(model(x), y).backward()
    for name in alone:
        assert torch.equal(got[name].diag_ggn_mc, alone[name].diag_ggn_mc)
        torch.testing.assert_close(heard[name].diag_ggn_mc, 6 * alone[name].diag_ggn_mc, rtol=1e-12, atol=0)


def test_passes_that_are_accumulated_inside_are_heard_one_by_one() -> None:
    model = network().eval()
    heard: list[Tensor] = []
    outer = px.backpack(
        px.BatchL2Grad(), attach=False, overhear=True, pass_hook=lambda r: heard.append(r["0.bias"].batch_l2)
    )
    with outer, px.backpack(px.SumGradSquared(), accumulate=True) as got:
        for k in range(2):
            x, y = images(k)
            LOSS(model(x), y).backward()
    assert [len(h) for h in heard] == [6, 6]
    torch.testing.assert_close(got["0.bias"].sum_grad_squared.sum(), torch.cat(heard).sum())


def test_what_both_need_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = network().eval(), images()
    optimizer = OPTIMIZERS["GGN"](model)
    monitor = Cockpit(model, optimizer, None, instruments=[HessTrace("ggn"), GradNorm()])
    sent: list[Any] = []
    computed: list[str] = []
    send, direct = _flight.Sweep.send, Statistics._direct

    def counting(self: Statistics, want: str, *rest: Any) -> bool:
        computed.append(want)
        return direct(self, want, *rest)

    monkeypatch.setattr(_flight.Sweep, "send", lambda self, *a: [sent.append(self), send(self, *a)][1])
    monkeypatch.setattr(Statistics, "_direct", counting)
    counts = []
    for watched in (False, True):
        sent.clear()
        computed.clear()
        with monitor.step() if watched else nullcontext(), optim.emit(optimizer):
            LOSS(model(x), y).backward()
        counts.append((len(sent), computed.count("second_moment")))
    assert counts == [(2, 8), (2, 8)]  # columns of the root of three classes, and four parameters for each
    assert "HessTrace" in monitor.values


@pytest.mark.parametrize("where", ["loss", "hook", "after"])
def test_an_error_leaves_everything_as_it_was(where: str) -> None:
    model, (x, y) = network(), images()
    optimizer = OPTIMIZERS["KFAC"](model)
    monitor = watching(model, optimizer)
    seen: list[Any] = []

    def boom(*_: Any) -> None:
        raise ZeroDivisionError

    before = [dict(m.__dict__) for m in model.modules()], [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), monitor.step():
        with px.backpack(px.Variance(), pass_hook=boom if where == "hook" else seen.append):
            output = model(x)
            if where == "loss":
                output.register_hook(boom)
            LOSS(output, y).backward()
        boom()
    here = _listening.here()
    assert not here.contexts and not here.hearing and not here.passes and not monitor.values
    assert len(seen) == (where == "after")
    assert [dict(m.__dict__) for m in model.modules()] == before[0]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before[1], strict=True))
    if where == "loss":
        assert not any(vars(p) for p in model.parameters())
    with monitor.step(), optim.emit(optimizer):
        LOSS(model(x), y).backward()
    assert "NormTest" in monitor.values and optimizer._received


def test_nothing_is_left_to_the_garbage_collector() -> None:
    model, (x, y) = network(), images()
    optimizer = OPTIMIZERS["DPSGD"](model)
    monitor = watching(model, optimizer)
    gc.collect()
    gc.disable()
    try:
        with monitor.step(), optim.emit(optimizer):
            LOSS(model(x), y).backward()
        assert not any(type(o) is Pass for o in gc.get_objects())
    finally:
        gc.enable()


def test_options_that_need_a_pass_of_their_own_are_refused() -> None:
    refused: list[dict[str, Any]] = [{}, {"attach": False, "grad": False}, {"attach": False, "per": "token"}]
    for options in refused:
        with pytest.raises(ValueError, match="overhear=True goes with attach=False"):
            px.backpack(px.BatchL2Grad(), overhear=True, **options)


def test_without_attributes_those_of_others_stay() -> None:
    """Individual gradients are written over the last ones where nobody holds them: over those of the same context."""
    model, (x, y) = network().eval(), images()
    with px.backpack(px.BatchGrad()):
        LOSS(model(x), y).backward()
    before = [p.grad_batch.clone() for p in model.parameters()]
    with px.backpack(px.BatchGrad(), attach=False):
        LOSS(model(2 * x), y).backward()
    assert all(torch.equal(p.grad_batch, b) for p, b in zip(model.parameters(), before, strict=True))
