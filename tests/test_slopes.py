"""Losses that contain derivatives with respect to the inputs: penalties, forces, differential equations."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint

import packext as px
from packext import _flight, _pass, testing
from packext._factored import Sum
from packext._record import tensors_in
from packext.rules.convolution import Convolution
from packext.rules.linear import Linear, OwnedContraction
from tests import test_union
from tests.cases import CASES as CASES_OF_ALL
from tests.cases import Case
from tests.helpers import assert_exact_sum, assert_private_step

pytestmark = pytest.mark.usefixtures("double")

N = 4


# -- losses: sums over samples of what each has by itself ------------------------------------------------------


def slope(value: Tensor, x: Tensor) -> Tensor:
    """The derivative of a sum over samples, to be differentiated again."""
    return torch.autograd.grad(value.sum(), x, create_graph=True)[0]


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    """That of a Wasserstein critic (Gulrajani et al., 2017, equation 3), beside its output."""
    y = model(x)
    return y.sum() + (slope(y, x).flatten(1).norm(dim=1) - 1).square().sum()


def penalty_alone(model: nn.Module, x: Tensor) -> Tensor:
    """The same without the output, which no gradient then enters."""
    return (slope(model(x), x).flatten(1).norm(dim=1) - 1).square().sum()


def equation(model: nn.Module, x: Tensor) -> Tensor:
    """The residual of u u_0 + u_00 + u_11 + ... = sin(x_0), second derivatives."""
    u = model(x)
    first = slope(u, x)
    second = [slope(first[:, i], x)[:, i] for i in range(x.shape[1])]
    return (u[:, 0] * first[:, 0] + torch.stack(second).sum(0) - x[:, 0].sin()).square().sum()


def laplacian_alone(model: nn.Module, x: Tensor) -> Tensor:
    first = slope(model(x), x)
    return torch.stack([slope(first[:, i], x)[:, i] for i in range(x.shape[1])]).sum(0).square().sum()


def third(model: nn.Module, x: Tensor) -> Tensor:
    """The third derivative, as in the equation of Korteweg and de Vries."""
    u = model(x)
    value = u[:, 0]
    for _ in range(3):
        value = slope(value, x)[:, 0]
    return (value + u[:, 0]).square().sum()


def forces(model: nn.Module, x: Tensor) -> Tensor:
    energy = model(x)
    return (energy - 1).square().sum() + 3 * (-slope(energy, x) - x.detach().cos()).square().sum()


def smooth(model: nn.Module, x: Tensor) -> Tensor:
    """A penalty on the derivative of the loss (double backpropagation, Drucker and Le Cun, 1992)."""
    loss = F.cross_entropy(model(x), x.detach().sum(tuple(range(1, x.dim()))).abs().long() % 3, reduction="sum")
    return loss + 0.3 * slope(loss, x).square().sum()


def two_forwards(model: nn.Module, x: Tensor) -> Tensor:
    first, other = model(x), model(0.5 * x)
    return slope(first * other, x).square().sum() + first.sum() - model(x.detach()).sum()


def inside(model: nn.Module, x: Tensor) -> Tensor:
    """A model that returns its own derivative."""
    energy, force = model(x)
    return (energy - 1).square().sum() + (force - x.detach()).square().sum()


# -- models ----------------------------------------------------------------------------------------------------


def mlp(out: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, out))


def critic(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), *between, nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 2, groups=2, dilation=2),
        nn.Softplus(), nn.ConvTranspose2d(4, 3, 3, stride=2, output_padding=1), nn.Tanh(), nn.Flatten(),
        nn.Linear(108, 1),
    )  # fmt: skip


def convolutions(d: int) -> nn.Sequential:
    """In `d` dimensions, with positions that the stride leaves out, and a transposed one of every option."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[d - 1]
    back = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[d - 1]
    return nn.Sequential(
        nn.Unflatten(1, (2, *(3,) * d)), conv(2, 4, 2, stride=2, padding=1, groups=2), nn.Tanh(),
        back(4, 2, 2, stride=2, padding=1, output_padding=1, dilation=2, groups=2), nn.Softplus(),
        conv(2, 2, 3, padding="same", bias=False), nn.Tanh(), nn.Flatten(), nn.LazyLinear(1),
    )  # fmt: skip


class Reused(nn.Module):
    """Residual connections, a layer that is called twice, its weight as a matrix, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        h = h + self.shared(h).sigmoid() * self.scale
        h = self.shared(h).tanh() @ self.shared.weight + self.scale.exp()
        return self.last(h) + x.sum(1, keepdim=True)


class Products(nn.Module):
    """Einsum, bmm and addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.w = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(2, 3, 4))
        self.u, self.last = nn.Parameter(torch.randn(2, 4, 2)), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("ni,ij->nj", x, self.v).tanh()
        h = torch.bmm(h.expand(2, -1, -1), self.w).transpose(0, 1).sigmoid()
        h = torch.einsum("goj,ngo->ngj", self.u, h).tanh()
        return torch.addmm(self.last.bias, h.flatten(1), self.last.weight.t())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, 1)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x[..., None])).mean(1))


class Conservative(nn.Module):
    """Energies and forces; `across` divides by the norm of all forces."""

    def __init__(self, across: bool = False) -> None:
        super().__init__()
        self.net, self.across = mlp(), across

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        energy = self.net(x)
        force = -slope(energy, x)
        return energy, force / force.norm() if self.across else force


class Parts(nn.Module):
    """A layer beside another; `between` may keep an activation, or hand samples to each other."""

    def __init__(self, *layers: nn.Module, checkpointed: bool = False) -> None:
        super().__init__()
        self.body, self.checkpointed = nn.Sequential(*layers), checkpointed
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 1)
        self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.seen = self.first(x).tanh()
        h = checkpoint.checkpoint(self.body, h, use_reentrant=False) if self.checkpointed else self.body(h)
        return self.last(h[0][:, -1] if isinstance(h, tuple) else h)


def frozen() -> nn.Module:
    model = mlp()
    model[2].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    return model


def normalised(seed: int = 1) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.RMSNorm(6), nn.PReLU(6), nn.PReLU(),
                          nn.Linear(6, 1))  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(seed))
    return model


def channels() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    model = critic(nn.GroupNorm(2, 4), nn.Tanh(), norm, nn.InstanceNorm2d(4, affine=True)).eval()
    for p in (*model[1].parameters(), *norm.parameters()):
        nn.init.normal_(p)
    return model


def parametrised() -> nn.Module:
    norm = nn.utils.parametrizations
    return nn.Sequential(norm.weight_norm(nn.Linear(3, 5)), nn.Tanh(), norm.spectral_norm(nn.Linear(5, 1)).eval())


IMAGE, VOLUME = (2, 7, 7), 54
CASES: dict[str, tuple[Callable[[], nn.Module], Any, tuple[int, ...]]] = {
    **{f"mlp {f.__name__}": (mlp, f, (3,)) for f in (
        penalty, penalty_alone, equation, laplacian_alone, third, forces, two_forwards)},
    "mlp smooth": (lambda: mlp(3), smooth, (3,)),
    "frozen penalty": (frozen, penalty, (3,)),
    "frozen equation": (frozen, equation, (3,)),
    "critic penalty": (critic, penalty, IMAGE),
    "critic penalty alone": (critic, penalty_alone, IMAGE),
    "channels penalty": (channels, penalty, IMAGE),
    "1d equation": (lambda: convolutions(1), equation, (6,)),
    "1d small": (lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), nn.Tanh(), nn.Flatten(),
                                       nn.Linear(8, 1)), penalty, (3,)),
    "2d penalty": (lambda: convolutions(2), penalty, (18,)),
    "3d penalty": (lambda: convolutions(3), penalty, (54,)),
    "reused penalty": (Reused, penalty, (3,)),
    "reused equation": (Reused, equation, (3,)),
    "products equation": (Products, equation, (3,)),
    "normalised equation": (normalised, equation, (3,)),
    "parametrised equation": (parametrised, equation, (3,)),
    "attention forces": (Attention, forces, (3,)),
    "attention equation": (Attention, equation, (3,)),
    "checkpointed equation": (lambda: Parts(nn.Linear(6, 6), nn.Tanh(), checkpointed=True), equation, (3,)),
    "inside": (Conservative, inside, (3,)),
}  # fmt: skip


def rows_of(model: nn.Module, total: Any, x: Tensor) -> testing.Rows:
    """One sample at a time, by autograd alone, on a copy that is not extended."""
    alone = copy.deepcopy(model)
    named = {name: p for name, p in alone.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for sample in range(len(x)):
        loss = total(alone, x[sample : sample + 1].detach().requires_grad_())
        for name, g in zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True), strict=True):
            rows[name].append(g)
    return {name: torch.stack(r) for name, r in rows.items()}


def built(name: str, n: int = N) -> tuple[nn.Module, Any, Tensor]:
    build, total, shape = CASES[name]
    model, x = build(), torch.randn(n, *shape)
    with torch.no_grad():
        if not isinstance(model, Conservative):
            model(x)  # lazy layers
    return model, total, x.requires_grad_()


@pytest.fixture
def _twice_differentiable() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.usefixtures("_twice_differentiable")
@pytest.mark.parametrize("n", [N, 1])
@pytest.mark.parametrize("name", CASES)
def test_individual_gradients_are_exact(name: str, n: int) -> None:
    model, total, x = built(name, n)
    rows = rows_of(model, total, x)
    assert any(r.any() for r in rows.values())
    px.extend(model)
    for _ in range(2):  # probed, and remembered
        assert_exact_sum(model, lambda: total(model, x), rows)


@pytest.mark.parametrize("rule", [Linear, Convolution, OwnedContraction])
def test_the_second_use_is_what_makes_it_so(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, or with another than that of the weight, the probe refuses."""
    name = {Linear: "mlp equation", Convolution: "critic penalty", OwnedContraction: "products equation"}[rule]
    model, total, x = built(name)
    px.extend(model)
    monkeypatch.setattr(rule, "back", lambda self, use, t: None)
    with pytest.raises(px.UnsupportedUseError, match="no call of a kind"), px.backpack(px.BatchGrad()):
        total(model, x).backward()
    unseen = staticmethod(lambda use, t, g: use.rule.gradients(use, t, g, ["input"])["input"])
    monkeypatch.setattr("packext._taps.further", unseen)
    with pytest.raises(px.PackextError), px.backpack(px.BatchGrad()):
        total(model, x).backward()


#: Cases of which parameters are refused, or samples: recurrent layers, rows that data sorts, complex numbers.
REFUSED = {
    "lstm", "lstm time first", "lstm 2 layers both ways", "lstm loss on states", "lstm projection", "gru", "rnn",
    "gru both ways, loss on state", "rnn relu", "gru with initial state", "LSTMCell", "GRUCell", "RNNCell",
    "lstm packed", "rnn packed, both ways",
    "time first, 6 steps", "time first, 4 steps", "batch norm first, training, one sample",
    "complex numbers of real parameters", "tokens routed to experts", "tokens sorted by expert",
}  # fmt: skip


#: Those of them that are exact where rows are whose output uses them.
BY_USE: set[str] = {"tokens routed to experts", "tokens sorted by expert"}


def floats(inputs: Any) -> list[Tensor]:
    """Those among a case's inputs that a loss can be differentiated by."""
    leaves = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


@pytest.mark.usefixtures("_twice_differentiable")
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("case", "by_use"),
    [
        pytest.param(c, b, id=f"{c.name}-by {'use' if b else 'axis'}")
        for c in CASES_OF_ALL
        for b in (False, True)
        if not (b and c.batch_axis)
    ],
)
def test_every_model_is_exact_or_refused(case: Case, by_use: bool) -> None:
    """Each sample's weighted outputs, and the squared derivative of these with respect to all inputs."""
    torch.manual_seed(0)
    model, inputs, _ = case.build()
    xs = [x.requires_grad_() for x in floats(inputs)]
    if not xs:
        pytest.skip("no input has a derivative")
    weights: list[Tensor] = []

    def each(model: nn.Module) -> Tensor:
        y = next(t for t in tensors_in(testing.call(model, inputs)))
        if not weights:
            weights.append(torch.randn_like(y))
        values = (y.tanh() * weights[0]).movedim(case.batch_axis, 0).flatten(1).sum(1)
        slopes = torch.autograd.grad(values.sum(), xs, create_graph=True, materialize_grads=True)
        mine = [g.movedim(case.batch_axis, 0) for g in slopes if g.shape[case.batch_axis] == len(values)]
        return values + sum(g.flatten(1).square().sum(1) for g in mine)

    plain = copy.deepcopy(model)
    named = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(value, list(named.values()), retain_graph=True, materialize_grads=True)
        for value in each(plain)
    ]
    px.extend(model, None if by_use else case.batch_axis)
    if case.name in REFUSED - (BY_USE if by_use else set()):
        with pytest.raises(px.PackextError), px.backpack(px.BatchGrad()):
            each(model).sum().backward()
        return
    with px.backpack(px.BatchGrad()):
        each(model).sum().backward()
    for k, name in enumerate(named):
        p, want = dict(model.named_parameters())[name], torch.stack([r[k] for r in rows])
        got = getattr(p, "grad_batch", torch.zeros_like(want))
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_a_mean_in_the_scale_of_samples() -> None:
    """Energies and forces, both with a mean over the batch."""
    model, x = mlp(), torch.randn(N, 3, requires_grad=True)
    energies, targets = torch.randn(N, 1), torch.randn(N, 3)

    def total(model: nn.Module, x: Tensor, at: slice, loss_fn: nn.Module) -> Tensor:
        energy = model(x)
        return loss_fn(energy, energies[at]) + loss_fn(-slope(energy, x), targets[at])

    rows = [
        rows_of(model, lambda m, x, i=i: total(m, x, slice(i, i + 1), nn.MSELoss()), x[i : i + 1]) for i in range(N)
    ]
    loss_fn = px.extend(nn.MSELoss())
    px.extend(model)
    with px.backpack(px.BatchGrad(), scale="sample"):
        total(model, x, slice(None), loss_fn).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_batch, torch.cat([r[name] for r in rows]))


def test_a_penalty_on_the_derivative_of_an_extended_loss() -> None:
    """The first pass comes to the loss as well, and is not one of those that accumulate."""
    model, x, y = mlp(3), torch.randn(N, 3), torch.randint(3, (N,))
    loss_fn = px.extend(nn.CrossEntropyLoss(reduction="sum"))

    def total(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss = loss_fn(model(x), y)
        return loss + 0.3 * slope(loss, x).square().sum()

    rows = [rows_of(model, lambda m, x, i=i: total(m, x, y[i : i + 1]), x[i : i + 1]) for i in range(N)]
    px.extend(model)
    quantities = [q for q in testing.all_quantities() if not q.indivisible]
    with px.backpack(*quantities, scale="sample", accumulate=True):
        for part in (slice(0, 1), slice(1, N)):
            total(model, x[part].requires_grad_(), y[part]).backward()
    want = {name: torch.cat([r[name] for r in rows]) for name in rows[0]}
    report = testing.compare(model, quantities, want, 1.0, 1e-9)
    assert report.ok, str(report)


def test_generator_and_critic() -> None:
    """Interpolates made of what the generator returned; both are extended."""
    models = nn.ModuleList([nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)), mlp()])
    mix, real = torch.rand(N, 1), torch.randn(N, 3)

    def total(models: Any, x: Tensor, at: slice = slice(None)) -> Tensor:
        made = models[0](x)
        between = mix[at] * real[at] + (1 - mix[at]) * made
        size = (slope(models[1](between), between).norm(dim=1) - 1).square().sum()
        return models[1](made).sum() - models[1](real[at]).sum() + size

    x = torch.randn(N, 2)
    rows = [rows_of(models, lambda m, x, i=i: total(m, x, slice(i, i + 1)), x[i : i + 1]) for i in range(N)]
    for model in models:
        px.extend(model)
    for _ in range(2):
        with px.backpack(px.BatchGrad()):
            total(models, x).backward()
        for name, p in models.named_parameters():
            want = torch.cat([r[name] for r in rows])
            torch.testing.assert_close(p.grad_batch, want) if want.any() else None


@pytest.mark.parametrize("name", ["mlp penalty", "reused equation", "1d small"])
def test_results_are_differentiable(name: str) -> None:
    model, total, x = built(name)
    parameters = list(model.parameters())
    each: list[Any] = [
        torch.autograd.grad(
            total(model, x[i : i + 1].detach().requires_grad_()), parameters, create_graph=True, materialize_grads=True
        )
        for i in range(N)
    ]
    value = sum((torch.stack(rows) ** 3).sum() for rows in zip(*each, strict=True))
    want = torch.autograd.grad(value, parameters, materialize_grads=True)
    px.extend(model)
    with px.backpack(px.BatchGrad()):
        torch.autograd.grad(total(model, x), parameters, create_graph=True, materialize_grads=True)
    value = sum((p.grad_batch**3).sum() for p in parameters if hasattr(p, "grad_batch"))
    torch.testing.assert_close(torch.autograd.grad(value, parameters, materialize_grads=True), want)


@pytest.mark.parametrize("context", [False, True])
def test_the_graph_may_be_made_outside_of_the_context(context: bool) -> None:
    """And be kept: each pass over it gives the same."""
    model, total, x = built("reused equation")
    rows = rows_of(model, total, x)
    px.extend(model)
    with px.backpack(px.Variance()) if context else torch.enable_grad():
        loss = total(model, x)
        loss.backward(retain_graph=True)
    for _ in range(2):
        with px.backpack(px.BatchGrad()):
            loss.backward(retain_graph=True)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad_batch, rows[name])


def test_the_first_pass_is_no_backward_pass_of_the_context() -> None:
    """It computes no more than it would, probes nothing, and leaves results as they were."""
    model, _, x = built("mlp penalty")
    px.extend(model)
    heard: list[px.Results] = []
    with px.backpack(px.BatchGrad(), pass_hook=heard.append):
        model(x.detach()).sum().backward()
        before = {name: p.grad_batch for name, p in model.named_parameters()}
        slope(model(x), x)
        assert all(p.grad_batch is before[name] for name, p in model.named_parameters())
    assert len(heard) == 1


@pytest.mark.parametrize("name", ["mlp equation", "products equation"])
def test_forms_of_all_uses_are_joined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of two positions, of which norms need no rows; the head of `Products` is a value made of a parameter."""
    model, total, x = built(name)
    px.extend(model)
    merged: list[Any] = []
    merge = _pass.merge
    monkeypatch.setattr(_pass, "merge", lambda parts: merged.append(merge(parts)) or merged[-1])
    with px.backpack(px.BatchL2Grad()):
        total(model, x).backward()
    sums = [tuple(form.shape) for form in merged if isinstance(form, Sum)]
    assert merged and set(sums) <= ({(1, 4)} if name.startswith("products") else set())


def test_a_structure_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, total, x = built("mlp equation")
    px.extend(model)
    sent: list[Any] = []
    send = _flight._send_probe
    monkeypatch.setattr(_flight, "_send_probe", lambda *args: sent.append(args) or send(*args))
    counts = []
    for n in (N, N, 2, N):  # another number of samples is no other structure
        with px.backpack(px.BatchGrad()):
            total(model, x[:n].detach().requires_grad_()).backward()
        counts.append(len(sent))
    first, second, third, fourth = counts
    assert first > 2 and third == second  # another look at the second and the fourth pass costs one each
    assert second - first == fourth - third == 1


def test_nothing_is_left_on_the_input() -> None:
    """A hook on it lives as long as the forward pass: collocation points stay, and are used in each step."""
    model, total, x = built("mlp equation")
    px.extend(model)
    for _ in range(3):
        with px.backpack(px.BatchGrad()):
            total(model, x).backward()
        gc.collect()
        assert not x._backward_hooks
    y = model(x)
    node = weakref.ref(y.grad_fn)
    slope(y, x)
    del y
    gc.collect()
    assert node() is None and not x._backward_hooks


def test_training_is_as_without_packext() -> None:
    model, total, x = built("channels penalty")
    plain = copy.deepcopy(model)
    px.extend(model)
    for net in (plain, model):
        optimizer = torch.optim.SGD(net.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            with px.backpack(px.Variance()) if net is model else torch.enable_grad():
                total(net, x).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# -- refused ---------------------------------------------------------------------------------------------------


def whole_loss(model: nn.Module, x: Tensor) -> Tensor:
    """The derivative of a loss in which samples meet."""
    return slope(model(x).sum().square(), x).square().sum()


def across(model: nn.Module, x: Tensor) -> Tensor:
    energy, force = model(x)
    return energy.sum() + force.square().sum()


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - x.mean(0))


@pytest.mark.parametrize(
    ("build", "total"),
    [(mlp, whole_loss), (lambda: Conservative(True), across), (Centred, penalty), (Centred, penalty_alone)],
    ids=["loss", "forward", "input", "input alone"],
)
def test_samples_that_influence_each_other_are_found(build: Any, total: Any) -> None:
    model, x = px.extend(build()), torch.randn(N, 3, requires_grad=True)
    with pytest.raises(px.CoupledSamplesError, match="influence each other"), px.backpack(px.BatchGrad()):
        total(model, x).backward()
    assert all(p.grad is None for p in model.parameters())


def test_batch_statistics_are_refused_as_such() -> None:
    model, x = px.extend(critic(nn.BatchNorm2d(4))), torch.randn(N, *IMAGE, requires_grad=True)
    with pytest.raises(px.CoupledSamplesError, match="BatchNorm uses"), px.backpack(px.BatchGrad()):
        penalty(model, x).backward()


def test_an_input_that_samples_share() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.net(x + shift)

    model, shift = px.extend(Shifted()), torch.zeros(3, requires_grad=True)
    with pytest.raises(px.CoupledSamplesError, match=r"input \[3\]"), px.backpack(px.BatchGrad()):
        slope(model(torch.randn(N, 3), shift), shift).square().sum().backward()
    each = torch.zeros(N, 3, requires_grad=True)
    with px.backpack(px.BatchGrad()):
        slope(model(torch.randn(N, 3), each), each).square().sum().backward()


UNFOLLOWED: dict[str, Callable[[], nn.Module]] = {
    "gru": lambda: Parts(nn.Unflatten(1, (6, 1)), nn.GRU(1, 6, batch_first=True)),
    "layer_norm": lambda: Parts(nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 6), checkpointed=True),
}


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_functions_that_are_not_followed(name: str) -> None:
    """Their parameters are refused, and those of other layers are exact."""
    model, x = UNFOLLOWED[name](), torch.randn(N, 3, requires_grad=True)
    rows = rows_of(model, penalty, x)
    px.extend(model)
    with pytest.raises(px.UnsupportedUseError, match=rf"{name}.*body\.\d.*torch\.func") as error:
        with px.backpack(px.BatchGrad()):
            penalty(model, x).backward()
    assert "parameters=..." in str(error.value) and all(p.grad is None for p in model.parameters())
    others = {k: p for k, p in model.named_parameters() if not k.startswith("body")}
    with px.backpack(px.BatchGrad(), parameters=others.values()):
        penalty(model, x).backward()
    for k, p in others.items():
        torch.testing.assert_close(p.grad_batch, rows[k])
    for k, p in model.named_parameters():
        assert k in others or not hasattr(p, "grad_batch")
        torch.testing.assert_close(p.grad, rows[k].sum(0))


CURVATURE = [px.DiagGGNExact, px.KFAC, px.DiagEF, px.HessianTrace, px.DiagHessian]


@pytest.mark.parametrize("quantity", CURVATURE)
def test_curvature_is_refused(quantity: Any) -> None:
    loss_fn, x = px.extend(nn.MSELoss()), torch.randn(N, 3, requires_grad=True)
    model = px.extend(mlp())
    with pytest.raises(px.UnsupportedUseError, match="derivatives with respect to"), px.backpack(quantity()):
        y = model(x)
        (loss_fn(y, torch.zeros_like(y)) + slope(y, x).square().sum()).backward()
    model = px.extend(Conservative())
    if quantity is not px.HessianTrace:  # products with the Hessian need no uses
        with pytest.raises(px.UnsupportedUseError, match="derivatives with respect to"), px.backpack(quantity()):
            loss_fn(model(x)[1], torch.zeros(N, 3)).backward()
    assert all(p.grad is None for p in model.parameters())


def test_curvature_of_another_loss_is_as_before() -> None:
    """While the graph of a derivative is alive: a weight and its bias still meet in every use of either."""
    model, x, loss_fn = px.extend(mlp(3)), torch.randn(N, 3, requires_grad=True), px.extend(nn.CrossEntropyLoss())
    found = []
    for alive in (False, True):
        y = model(x)
        kept = slope(y, x) if alive else None
        with px.backpack(px.KFAC(fisher="exact", bias="joint")):
            loss_fn(y, torch.zeros(N, dtype=torch.long)).backward(retain_graph=True)
        found.append([type(getattr(p, "kfac", None)) for p in model.parameters()])
        del kept
    assert found[1] == found[0]


def test_products_with_the_hessian_of_a_loss_on_forces() -> None:
    model, x, loss_fn = Conservative(), torch.randn(N, 3, requires_grad=True), px.extend(nn.MSELoss())
    alone = copy.deepcopy(model)
    parameters = list(alone.parameters())
    slopes = torch.autograd.grad(
        nn.MSELoss()(alone(x)[1], torch.zeros(N, 3)), parameters, create_graph=True, materialize_grads=True
    )
    vectors = [torch.randn_like(p) for p in parameters]
    px.extend(model)
    with px.backpack(px.HMP()):
        loss_fn(model(x)[1], torch.zeros(N, 3)).backward(retain_graph=True)
    for k, p in enumerate(model.parameters()):
        want = torch.autograd.grad(
            (slopes[k] * vectors[k]).sum(), parameters[k], retain_graph=True, materialize_grads=True
        )[0]
        if hasattr(p, "hmp"):
            torch.testing.assert_close(p.hmp(vectors[k][None])[0], want)


def test_tokens_are_refused() -> None:
    model = px.extend(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
    x = torch.randn(N, 5, 3, requires_grad=True)
    with pytest.raises(px.UnsupportedUseError, match="per="), px.backpack(px.BatchGrad(), per="token"):
        y = model(x)
        (y.sum() + slope(y, x).square().sum()).backward()


def hidden(model: Any, x: Tensor) -> Tensor:
    y = model(x)
    return y.sum() + slope(y, model.seen).square().sum()


def accumulated(model: nn.Module, x: Tensor) -> Tensor:
    model(x).square().sum().backward(create_graph=True)
    assert x.grad is not None
    return x.grad.square().sum()


def with_parameters(model: nn.Module, x: Tensor) -> Tensor:
    g, *_ = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()], create_graph=True)
    return g.square().sum()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("total", [hidden, accumulated, with_parameters])
@pytest.mark.parametrize("between", [nn.Tanh, lambda: nn.LayerNorm(6)], ids=["tanh", "norm"])
def test_other_gradients_are_refused(total: Any, between: Any) -> None:
    """Of activations, of parameters, and those that `backward` leaves."""
    plain, x = Parts(between()), torch.randn(N, 3, requires_grad=True)
    model = px.extend(copy.deepcopy(plain))
    with pytest.raises(px.PackextError, match=r"px\.disable"), px.backpack(px.BatchGrad()):
        loss = total(model, x)
        model.zero_grad()
        loss.backward()
    x.grad = None
    with px.backpack(px.BatchGrad()):
        loss = total(model, x)
        with px.disable():
            got = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        model(x.detach()).sum().backward()
    x.grad = None
    want = torch.autograd.grad(total(plain, x), list(plain.parameters()), allow_unused=True)
    torch.testing.assert_close(got, want)


class Last(nn.Module):
    """A normalisation behind an activation, and no layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.seen = nn.Linear(3, 6), nn.LayerNorm(6), torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.first(x).tanh()
        return self.norm(self.seen).tanh()


def test_what_no_tap_is_on_the_way_of() -> None:
    """A derivative by an activation, through a function that is not followed; one by parameters beside a penalty."""
    model, x = px.extend(Last()), torch.randn(N, 3)
    with pytest.raises(px.PackextError, match="activations have none"), px.backpack(px.BatchGrad()):
        hidden(model, x).backward()
    for between in (nn.Tanh(), nn.LayerNorm(6)):  # outside of the context nothing says so at once
        model, x = px.extend(Parts(between)), x.detach().requires_grad_()
        y = model(x)
        inner = slope(model.seen, x).square().sum()
        for loss in (y.sum() + inner, inner):
            with pytest.raises(px.PackextError, match=r"px\.disable"), px.backpack(px.BatchGrad()):
                loss.backward(retain_graph=True)
    model = px.extend(mlp())
    with pytest.raises(px.PackextError, match="Gradients of parameters"), px.backpack(px.BatchGrad()):
        y = model(x)
        g = torch.autograd.grad(y.square().sum(), list(model.parameters()), create_graph=True)
        (sum(t.square().sum() for t in g) + slope(y, x).square().sum()).backward()


def test_two_models_of_which_one_is_passed_by() -> None:
    """A pass with create_graph=True: of the model whose parameters it leaves out, nothing is looked at."""
    first, last = px.extend(nn.Linear(3, 3)), px.extend(critic_of_vectors())
    with pytest.raises(px.PackextError, match="passes through another"), px.backpack(px.BatchGrad()):
        torch.autograd.grad(last(first(torch.randn(N, 3))).sum(), list(first.parameters()), create_graph=True)


def critic_of_vectors() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))


class Times(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@pytest.mark.parametrize("net", [lambda: nn.Linear(3, 1), lambda: nn.LayerNorm(3), Times])
def test_gradients_of_parameters_inside_of_forward(net: Callable[[], nn.Module]) -> None:
    """A step on the parameters within forward, whose gradients have no taps; and one that accumulates."""

    class Adapts(nn.Module):
        def __init__(self, accumulates: bool) -> None:
            super().__init__()
            self.net, self.accumulates = net(), accumulates

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            if self.accumulates:
                y.sum().backward(retain_graph=True)
                return y
            return y + slope(y.square(), self.net.weight).sum()

    x = torch.randn(N, 3)
    for accumulates, said in ((False, "inside of forward"), (True, "without passing")):
        model = px.extend(Adapts(accumulates))
        with pytest.raises(px.PackextError, match=said), px.backpack(px.BatchGrad()):
            model(x).square().sum().backward()


class Stretched(nn.Module):
    """A product of matrices along whose axis the data is repeated, for which there is no rule but the generic one."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.last = nn.Parameter(torch.randn(2, 3, 4)), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x[:, None, None] @ self.w).tanh().flatten(1))


def test_what_torch_func_gives_instead() -> None:
    """The recipe that errors name."""
    model, x = Stretched(), torch.randn(N, 3, requires_grad=True)
    rows = rows_of(model, penalty, x)
    px.extend(model)
    with pytest.raises(px.UnsupportedUseError, match="matmul.*parameters w"), px.backpack(px.BatchGrad()):
        penalty(model, x).backward()
    named = {k: p.detach() for k, p in model.named_parameters()}

    def of_one(values: dict[str, Tensor], x: Tensor) -> Tensor:
        def output(x: Tensor) -> Tensor:
            return functional_call(model, values, (x[None],)).sum()

        return output(x) + (grad(output)(x).norm() - 1).square()

    for k, v in vmap(grad(of_one), (None, 0))(named, x.detach()).items():
        torch.testing.assert_close(v, rows[k])


# -- in several processes, in private steps, in half precision ---------------------------------------------------


def normed() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 1)
    )  # fmt: skip


def _penalised(rank: int, world: int) -> None:
    """Each with some of the samples, in a plain model, under DDP and under FSDP2."""
    quantities = (px.BatchL2Grad(), px.Variance(), px.SumGradSquared(), px.BatchGrad())
    torch.manual_seed(0)
    original, x = normed(), torch.randn(8, 3)

    def step(model: nn.Module, total: Any, x: Tensor, group: Any) -> px.Results:
        x = x.clone().requires_grad_()
        with px.backpack(*quantities, scale=1.0, group=group, attach=False) as found:
            total(model, x).backward()
        return found

    for total in (penalty, penalty_alone):
        wanted = step(px.extend(copy.deepcopy(original)), total, x, None)
        for kind in ("plain", "DDP", "FSDP2"):
            model = px.extend(copy.deepcopy(original))
            wrapped = test_union.wrapped(model, kind)
            if kind == "FSDP2":
                with pytest.raises(px.UnsupportedUseError, match="take DistributedDataParallel"):
                    step(wrapped, total, x[4 * rank :][:4], dist.group.WORLD)
                continue
            for part in (x[4 * rank :][:4], x[3 * rank :][: 3 + 2 * rank]):
                found = step(wrapped, total, part, dist.group.WORLD)
                test_union.agree(found, wanted, quantities, kind)


def test_two_processes() -> None:
    test_union.together(_penalised)


def test_private_steps() -> None:
    model, x, squares = normed(), torch.randn(N, 3, requires_grad=True), px.extend(nn.MSELoss(reduction="sum"))

    def total(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x)
        return squares(y, x.detach().sum(1, keepdim=True)) + slope(y, x).square().sum()

    rows = rows_of(model, total, x)
    assert_private_step(px.extend(model), lambda: total(model, x), rows)


@pytest.mark.parametrize("half", ["autocast", "parameters"])
def test_half_precision(half: str) -> None:
    """As near to the rows in float64 as autograd's own gradient of one sample, in the same precision, is."""
    model, x = normed().float(), torch.randn(8, 3).bfloat16().float()
    if half == "parameters":
        model, x = model.bfloat16(), x.bfloat16()

    def total(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast" and x.dtype != torch.float64):
            y = model(x)
            return y.sum() + (slope(y, x).flatten(1).float().norm(dim=1) - 1).square().sum()

    rows = rows_of(copy.deepcopy(model).double(), total, x.double())
    one_by_one = rows_of(model, total, x)
    px.extend(model)
    for _ in range(2):
        with px.backpack(px.BatchGrad()):
            total(model, x.clone().requires_grad_()).backward()
        for name, p in model.named_parameters():
            off, allowed = ((each.double() - rows[name]).norm() for each in (p.grad_batch, one_by_one[name]))
            assert off <= 1.5 * allowed + 1e-3 * rows[name].norm(), (name, float(off), float(allowed))


class Twice(nn.Bilinear):
    """Of one input with itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x.sin())


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of torch, which says that it is slow
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.LayerNorm(6), lambda: nn.RMSNorm(6), lambda: nn.GroupNorm(2, 6), lambda: nn.BatchNorm1d(6).eval(),
        lambda: nn.InstanceNorm1d(6, affine=True), lambda: nn.PReLU(6), lambda: Twice(6, 6, 3),
    ],
    ids=["layer", "rms", "group", "batch", "instance", "prelu", "bilinear"],
)  # fmt: skip
def test_layers_of_float32_give_what_they_give_without_packext(build: Any, inputs: Any, autocast: bool) -> None:
    """Also where an input requires grad, so that they are taken apart: the dtype, the values, or torch's error."""
    layer = build().float()
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 1.5)
    shape = (4, 6, 5) if isinstance(layer, nn.InstanceNorm1d) else (4, 6)
    x = torch.randn(shape).to(inputs)

    def run(layer: nn.Module) -> Tensor | None:
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return layer(x.clone().requires_grad_())
        except RuntimeError:
            return None

    want, got = run(copy.deepcopy(layer)), run(px.extend(layer))
    if want is None or got is None:
        assert want is got, "torch takes these together, and packext does not, or the reverse"
        return
    rounding = 0.01 if torch.bfloat16 in (want.dtype, inputs) or autocast else 1e-6
    assert got.dtype is want.dtype
    assert (got - want).abs().max() <= rounding * want.abs().max()
