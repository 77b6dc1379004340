"""Opacus's optimizers take the same step from packext's pass as from Opacus's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import testing
from tests.cases import Pool
from tests.helpers import batch, fields, mlp

opacus = pytest.importorskip("opacus")
from opacus import grad_sample, optimizers  # noqa: E402
from opacus.accountants import RDPAccountant  # noqa: E402
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping  # noqa: E402

from packext.adapters.opacus import emit  # noqa: E402

pytestmark = pytest.mark.usefixtures("double")

N, C = 6, 0.3


def words() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Tanh(), Pool(), nn.Linear(4, 3))
    return model, torch.randint(9, (N, 5)), torch.randint(3, (N,))


def pictures() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(8, 3)
    )
    return model, torch.randn(N, 2, 4, 4), torch.randint(3, (N,))


ADAPTIVE = {
    "target_unclipped_quantile": 0.5, "clipbound_learning_rate": 0.2, "max_clipbound": 10.0, "min_clipbound": 0.01,
    "unclipped_num_std": 5.0,
}  # fmt: skip


def private(kind: str, model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(5)
    given = {"noise_multiplier": 0.7, "max_grad_norm": C, "expected_batch_size": N} | options
    if kind == "DPPerLayerOptimizer":
        given["max_grad_norm"] = [0.1 * (k + 1) for k, _ in enumerate(model.parameters())]
    if kind == "AdaClipDPOptimizer":
        given |= ADAPTIVE
    generator = torch.Generator().manual_seed(1)
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    return getattr(optimizers, kind)(inner, generator=generator, **given)


def steps(optimizer: Any, backward: Callable[[Tensor, Tensor], None], x: Tensor, y: Tensor) -> list[Tensor]:
    for k in range(2):
        optimizer.zero_grad()
        backward(x.roll(k, 0), y)
        optimizer.step()
    return [p.detach() for p in optimizer.params]


#: torch's, of Opacus's hooks on a first layer.
HOOKS = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@HOOKS
@pytest.mark.parametrize(
    "kind, reduction",
    [("DPOptimizer", "mean"), ("DPOptimizer", "sum"), ("AdaClipDPOptimizer", "sum"), ("DPPerLayerOptimizer", "mean")],
)
@pytest.mark.parametrize("make", [words, pictures])
def test_steps_are_those_from_opacus_own_gradients(make: Any, kind: str, reduction: str) -> None:
    model, x, y = make()
    theirs = grad_sample.GradSampleModule(copy.deepcopy(model), loss_reduction=reduction)
    plain = nn.CrossEntropyLoss(reduction=reduction)
    want = steps(private(kind, theirs, loss_reduction=reduction), lambda x, y: plain(theirs(x), y).backward(), x, y)
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss(reduction=reduction))
    optimizer = private(kind, model, loss_reduction=reduction)

    def backward(x: Tensor, y: Tensor) -> None:
        with emit(optimizer):
            loss_fn(model(x), y).backward()

    torch.testing.assert_close(steps(optimizer, backward, x, y), want, rtol=1e-9, atol=1e-12)


@HOOKS
@pytest.mark.parametrize("make", [words, pictures])
def test_ghost_clipping_is_opacus_ghost_clipping(make: Any) -> None:
    model, x, y = make()
    theirs = grad_sample.GradSampleModuleFastGradientClipping(copy.deepcopy(model), max_grad_norm=C)
    kind = "DPOptimizerFastGradientClipping"
    ghost = private(kind, theirs)
    criterion = DPLossFastGradientClipping(theirs, ghost, nn.CrossEntropyLoss(), loss_reduction="mean")
    want = steps(ghost, lambda x, y: criterion(theirs(x), y).backward(), x, y)
    px.extend(model)
    loss_fn, optimizer = px.extend(nn.CrossEntropyLoss()), private(kind, model)

    def backward(x: Tensor, y: Tensor) -> None:
        with emit(optimizer):
            loss_fn(model(x), y).backward()

    torch.testing.assert_close(steps(optimizer, backward, x, y), want, rtol=1e-9, atol=1e-12)


OURS = {"DPOptimizer": {}, "DPPerLayerOptimizer": {"per_layer": True}, "AdaClipDPOptimizer": {}}


@HOOKS
@pytest.mark.parametrize("kind, bias", [(kind, bias) for kind in OURS for bias in (True, False)])
def test_private_optimizers_without_noise_take_opacus_steps(kind: str, bias: bool) -> None:
    """The table of docs/migrate/opacus.md: all but clipping module by module, where a module has two parameters."""
    model = nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias))
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    theirs, plain = grad_sample.GradSampleModule(copy.deepcopy(model)), nn.CrossEntropyLoss()
    settings: dict[str, Any] = {"noise_multiplier": 0.0, "expected_batch_size": N}
    count = len(list(model.parameters()))
    norm = [C] * count if kind == "DPPerLayerOptimizer" else C
    adaptive = ADAPTIVE | {"unclipped_num_std": 1e-9} if kind == "AdaClipDPOptimizer" else {}
    inner = torch.optim.SGD(theirs.parameters(), lr=1.0)
    other = getattr(optimizers, kind)(inner, max_grad_norm=norm, **settings, **adaptive)
    want = steps(other, lambda x, y: plain(theirs(x), y).backward(), x, y)
    px.extend(model)
    loss_fn, options = px.extend(nn.CrossEntropyLoss()), dict(OURS[kind])
    if adaptive:
        options["adaptive"] = px.optim.AdaptiveClipping(quantile=0.5, rate=0.2, count_noise=1e-9)
    optimizer = px.optim.DPSGD(model.named_parameters(), lr=1.0, max_norm=C, **settings, **options)
    for k in range(2):
        optimizer.zero_grad()
        with px.optim.emit(optimizer):
            loss_fn(model(x.roll(k, 0)), y).backward()
        optimizer.step()
    got = [p.detach() for p in model.parameters()]
    apart = max(testing.relative_error(one, other) for one, other in zip(got, want, strict=True))
    assert (apart > 0.01) if options.get("per_layer") and bias else (apart < 1e-5)  # which adds 1e-6 to norms
    if adaptive:
        assert optimizer.max_norm == pytest.approx(float(other.max_grad_norm), rel=1e-6) != C
    if options.get("per_layer") and not bias:
        assert optimizer.sensitivity == pytest.approx(other.max_grad_norm)


def test_torchs_layers_take_what_opacus_layers_have_learned() -> None:
    from opacus import layers

    x = torch.randn(N, 3, 4)
    theirs, ours = layers.DPLSTM(4, 5, batch_first=True), nn.LSTM(4, 5, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    attending, plain = layers.DPMultiheadAttention(4, 2), nn.MultiheadAttention(4, 2)
    plain.load_state_dict(attending.state_dict())
    torch.testing.assert_close(plain(x, x, x)[0], attending(x, x, x)[0])


class Refused(nn.Module):
    """Tied, with a parameter of its own, BatchNorm of the evaluation, and an input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.shift = nn.Embedding(5, 4), nn.Parameter(torch.randn(4))
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.table.weight
        self.norm.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm((self.table(ids) + self.shift).mean(1)))


@pytest.mark.parametrize("kind", ["DPOptimizer", "DPOptimizerFastGradientClipping"])
def test_a_step_of_a_model_that_opacus_refuses(kind: str) -> None:
    """Without noise, it is the mean of gradients that are clipped one by one."""
    model, ids, y = Refused(), torch.randint(5, (N, 3)), torch.randint(5, (N,))
    with pytest.raises(Exception):  # noqa: B017 - whichever it is
        grad_sample.GradSampleModule(copy.deepcopy(model))
    rows = testing.individual_gradients(model, nn.CrossEntropyLoss(), ids, y)
    norms = torch.cat([r.flatten(1) for r in rows.values()], 1).norm(dim=1)
    weight = (C / (norms + 1e-6)).clamp(max=1)
    assert weight.min() < 1
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    inner = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer = getattr(optimizers, kind)(inner, noise_multiplier=0.0, max_grad_norm=C, expected_batch_size=N)
    accountant = RDPAccountant()
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    with emit(optimizer):
        loss_fn(model(ids=ids), y).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        want = before[name] - torch.tensordot(weight, rows[name], 1) / N
        torch.testing.assert_close(p.detach(), want, rtol=1e-10, atol=1e-12)
    assert accountant.history == [(0.0, 0.1, 1)]


@pytest.mark.parametrize("kind", ["DPOptimizer", "DPOptimizerFastGradientClipping"])
def test_parts_of_a_batch_are_one_step(kind: str) -> None:
    """As Opacus's BatchMemoryManager splits batches: no step before the last part."""
    results = []
    for sizes in ((N,), (4, 2)):
        torch.manual_seed(2)
        model, x, y = pictures()
        px.extend(model)
        loss_fn, optimizer = px.extend(nn.CrossEntropyLoss()), private(kind, model)
        for k, (inputs, targets) in enumerate(zip(x.split(sizes), y.split(sizes), strict=True)):
            optimizer.signal_skip_step(do_skip=k < len(sizes) - 1)
            optimizer.zero_grad()
            with emit(optimizer):
                loss_fn(model(inputs), targets).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results)


def test_passes_before_a_step_are_kept_as_opacus_keeps_them() -> None:
    model, (x, y) = px.extend(mlp()), batch(N)
    loss_fn, optimizer = px.extend(nn.CrossEntropyLoss()), private("DPOptimizer", model)
    for _ in range(3):
        with emit(optimizer):
            loss_fn(model(x), y).backward()
    assert optimizer.accumulated_iterations == 3
    assert all(len(p.grad_sample) == 3 for p in model.parameters())
    ghost = private("DPOptimizerFastGradientClipping", model)
    sums = []
    for _ in range(2):
        with emit(ghost):
            loss_fn(model(x), y).backward()
        sums.append(model[0].weight.grad.clone())
    torch.testing.assert_close(sums[1], 2 * sums[0])


def test_ghost_clipping_to_another_norm_than_the_noise_is_of_is_refused() -> None:
    model, (x, y) = px.extend(mlp()), batch(N)
    loss_fn, optimizer = px.extend(nn.CrossEntropyLoss()), private("DPOptimizerFastGradientClipping", model)

    def run() -> None:
        with emit(optimizer):
            loss_fn(model(x), y).backward()

    run()
    optimizer.max_grad_norm = C / 10
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):  # nor the second time
        with pytest.raises(px.PackextError, match=rf"max_grad_norm was {C} in a backward pass and is {C / 10} at"):
            optimizer.step()
    run()  # to the new norm, and added to the sum of the old one
    with pytest.raises(px.PackextError, match=f"was {C} in a"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for clear in (optimizer.zero_grad, lambda: optimizer.zero_grad(set_to_none=True)):
        clear()
        run()
        optimizer.step()  # all passes since are of this norm
        optimizer.zero_grad()
        run()
        optimizer.max_grad_norm *= 2
    optimizer.max_grad_norm = C
    optimizer.zero_grad()
    run()
    optimizer.signal_skip_step(True)  # a part of a batch: Opacus sums up
    optimizer.step()
    optimizer.zero_grad()
    optimizer.max_grad_norm = 2 * C
    run()
    optimizer.signal_skip_step(False)
    with pytest.raises(px.PackextError, match=f"was {C} in a"):
        optimizer.step()
    assert any((p != b).any() for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", ["DPOptimizer", "DPOptimizerFastGradientClipping"])
def test_a_batch_without_samples_is_a_step_of_noise(kind: str) -> None:
    model, (x, y) = px.extend(mlp()), batch(N)
    loss_fn, optimizer = px.extend(nn.CrossEntropyLoss()), private(kind, model)
    optimizer.zero_grad()
    with pytest.raises(px.PackextError, match="the batch is empty"), emit(optimizer):
        loss_fn(model(x[:0]), y[:0]).backward()
    before = [p.detach().clone() for p in model.parameters()]
    for p in optimizer.params:  # what the page says to do
        p.grad_sample, p.grad = p.new_zeros(0, *p.shape), torch.zeros_like(p)
    optimizer.step()
    assert all((p != b).all() for p, b in zip(model.parameters(), before, strict=True))


def test_a_number_where_the_loss_is_a_function() -> None:
    model, (x, y) = px.extend(mlp()), batch(N)
    rows = testing.individual_gradients(model, nn.CrossEntropyLoss(), x, y)
    optimizer = private("DPOptimizer", model)
    with emit(optimizer, scale=float(N)):
        nn.functional.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_sample, rows[name])


def test_what_is_refused_leaves_no_trace() -> None:
    model, (x, y) = px.extend(mlp()), batch(N)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="got a SGD"), emit(torch.optim.SGD(model.parameters(), lr=0.1)):
        pass
    other = private("DPOptimizer", model)
    other.__class__ = type("DistributedDPOptimizer", (optimizers.DPOptimizer,), {})
    with pytest.raises(TypeError, match="got a DistributedDPOptimizer"), emit(other):
        pass
    ghost = private("DPOptimizerFastGradientClipping", model)
    for optimizer, scale in ((ghost, 6.0), (ghost, "loss"), (private("DPOptimizer", model), "loss")):
        with pytest.raises(ValueError, match="samples' own losses"), emit(optimizer, scale=scale):
            pass
    spare = nn.Linear(2, 2)
    inner = torch.optim.SGD([*model.parameters(), *spare.parameters()], lr=0.1)
    for kind in ("DPOptimizer", "DPOptimizerFastGradientClipping"):
        optimizer = getattr(optimizers, kind)(inner, noise_multiplier=1.0, max_grad_norm=C, expected_batch_size=N)
        for p in optimizer.params:
            p.grad, p.grad_sample = torch.ones_like(p), None
        before = fields(model)
        with pytest.raises(px.PackextError, match=r"2 of the optimizer's 6 parameters, of shapes \[\[2, 2\], \[2\]\]"):
            with emit(optimizer):
                loss_fn(model(x), y).backward()
        assert fields(model) == before and all((p.grad == 1).all() for p in optimizer.params)
    with pytest.raises(px.NotExtendedError), emit(private("DPOptimizer", model)):
        nn.CrossEntropyLoss()(model(x), y).backward()
    coupled = px.extend(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)))
    optimizer = private("DPOptimizer", coupled)
    with pytest.raises(px.CoupledSamplesError), emit(optimizer):
        loss_fn(coupled(x), y).backward()
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in coupled.parameters())


class Routed(nn.Module):
    """Experts, of which the inputs choose."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[int(x[0, 0] > 0)](x)


KINDS = ("DPOptimizer", "DPOptimizerFastGradientClipping")


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_sample_reaches_gets_noise(kind: str) -> None:
    model, loss_fn = px.extend(Routed()), px.extend(nn.CrossEntropyLoss())
    optimizer, x = private(kind, model), torch.ones(N, 5)
    optimizer.zero_grad()
    with emit(optimizer):
        loss_fn(model(x), torch.randint(3, (N,))).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all((p != b).all() for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_counts_once_and_for_itself(kind: str) -> None:
    model, (x, y) = px.extend(mlp()), batch(N)
    optimizer, out = private(kind, model), model(x)
    weighted = px.extend(nn.CrossEntropyLoss(torch.rand(3)))
    with pytest.raises(px.CoupledSamplesError, match="a sample changes what others add"), emit(optimizer):
        weighted(model(x), y).backward()
    loss_fn = px.extend(nn.CrossEntropyLoss())
    with emit(optimizer):
        loss_fn(out, y).backward(retain_graph=True)
    with pytest.raises(px.PackextError, match="second backward pass goes through one forward pass"), emit(optimizer):
        loss_fn(out, y).backward()
