"""The exact diagonal of the Hessian against the dense Hessian of each sample's loss, in float64."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import packext as px
from packext import _residual, testing
from tests.cases import CASES, Case
from tests.helpers import mlp

#: torch's own advice on even kernels, for the plain model as well.
pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings("ignore:Using padding='same'")]
N = 4

#: Cases that are refused, and why. All others are exact.
REFUSED = {
    "uses it on data that already depends on it": {
        "tied embedding and head", "one linear called twice", "one convolution called twice",
        "conv1d blocks with a tied head", "pieces of one weight", "stacked weights, transposed",
        "LSTMCell", "GRUCell", "RNNCell",
    },
    "is not linear in it": {
        "lstm", "lstm time first", "lstm 2 layers both ways", "lstm loss on states", "lstm projection", "gru",
        "gru both ways, loss on state", "rnn", "rnn relu", "gru with initial state", "lstm packed", "gru packed",
        "lstm packed, 2 layers both ways", "lstm packed, projection", "rnn packed, both ways",
        "weight norm", "spectral norm", "subclass of conv2d", "time first, 6 steps", "time first, 4 steps",
    },
    "no tensor was found": {"output data class"},
    "has complex inputs": {"complex numbers of real parameters"},
}  # fmt: skip


def run(model: nn.Module, loss: nn.Module, x: Any, y: Any, *asked: Any, **options: Any) -> px.Results:
    """One step of an extended model and loss."""
    px.extend(model)
    px.extend(loss)
    model.zero_grad()
    with px.backpack(*(asked or (px.DiagHessian(), px.BatchDiagHessian())), **options) as results:
        loss(testing.call(model, x), y).backward()
    return results


def compare(model: nn.Module, rows: testing.Rows, factor: float = 1.0, tolerance: float = 1e-8) -> None:
    """Compare what is attached to the parameters with the shares of the samples."""
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if not hasattr(p, "diag_h"):
            assert not rows[name].any(), name
            continue
        assert testing.relative_error(p.diag_h, rows[name].sum(0) * factor) < tolerance, name
        assert testing.relative_error(p.diag_h_batch, rows[name] * factor) < tolerance, name


def agrees(model: nn.Module, loss: nn.Module, x: Any, y: Any, mean: bool = True, **options: Any) -> None:
    """Run, and compare with the oracle."""
    n = testing.batch_size(x)
    rows = testing.hessian_diagonals(model, loss, x, y, weights=[1 / n] * n if mean else None)
    run(model, loss, x, y, **options)
    compare(model, rows)


# -- every case ----------------------------------------------------------------------------------------------


def differences(model: nn.Module, value: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The Hessian's diagonal by central differences of the gradient, for what torch cannot differentiate twice."""
    found = {}
    with px.disable():
        for name, p in model.named_parameters():
            found[name] = torch.zeros_like(p)
            for k in range(p.numel()):
                ends = []
                for step in (1e-5, -1e-5):
                    with torch.no_grad():
                        p.view(-1)[k] += step
                    ends.append(torch.autograd.grad(value(), p)[0].flatten()[k])
                    with torch.no_grad():
                        p.view(-1)[k] -= step
                found[name].view(-1)[k] = (ends[0] - ends[1]) / 2e-5
    return found


def test_most_cases_are_exact() -> None:
    refused = set().union(*REFUSED.values())
    assert refused <= {case.name for case in CASES}
    assert len(CASES) - len(refused) >= 115


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_exact_or_refused_on_every_case(case: Case) -> None:
    model, inputs, targets = case.build()
    loss = case.loss()
    n = testing.batch_size(inputs, case.batch_axis)
    why = next((why for why, names in REFUSED.items() if case.name in names), None)
    weights = [1 / n] * n if loss.reduction == "mean" else [1.0] * n
    if case.weights is not None:
        weights = case.weights(targets)
    with sdpa_kernel(SDPBackend.MATH):
        rows, central = None, None
        if "embedding bag" in case.name:
            central = differences(model, lambda: loss(testing.call(model, inputs), targets))
        elif case.name == "channels last":  # torch crashes in second derivatives of a normalised sample in that order
            plain = model.to(memory_format=torch.contiguous_format)
            rows = testing.hessian_diagonals(plain, loss, inputs.contiguous(), targets, weights=weights)
            model.to(memory_format=torch.channels_last)
        elif why is None:
            rows = testing.hessian_diagonals(model, loss, inputs, targets, case.batch_axis, weights)
        px.extend(model, case.batch_axis)
        px.extend(loss)

        def step() -> None:
            with px.backpack(px.DiagHessian(), px.BatchDiagHessian(), px.BatchGrad()):
                loss(testing.call(model, inputs), targets).backward()

        if why is not None:
            with pytest.raises(px.PackextError, match=why):
                step()
            assert all(p.grad is None for p in model.parameters())
            return
        step()
    if rows is not None:
        compare(model, rows)
    for name, want in (central or {}).items():
        p = model.get_parameter(name)
        assert testing.relative_error(p.diag_h, want) < 1e-6, name
        assert testing.relative_error(p.diag_h_batch.sum(0), want) < 1e-6, name
    for p in model.parameters():
        if p.grad is not None:
            assert testing.relative_error(p.grad_batch.sum(0), p.grad) < 1e-9


# -- what models do ------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A chain of blocks `x + f(x)`, with any activation."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        for block in self.blocks:
            x = x + self.act(block(x))
        return self.last(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "acos": lambda x: (x.tanh() / 2).acos(), "acosh": lambda x: (x.square() + 2).acosh(),
    "asin": lambda x: (x.tanh() / 2).asin(), "asinh": torch.asinh, "atan": torch.atan,
    "atanh": lambda x: (x.tanh() / 2).atanh(), "celu": lambda x: F.celu(x, 0.7), "cos": torch.cos, "cosh": torch.cosh,
    "div": lambda x: (x + 1) / (x.square() + 1), "elu": F.elu, "erf": torch.erf, "erfc": torch.erfc, "exp": torch.exp,
    "exp2": torch.exp2, "expm1": torch.expm1, "gelu": F.gelu, "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish, "leaky relu": F.leaky_relu,
    "log": lambda x: (x.square() + 1).log(), "log10": lambda x: (x.square() + 1).log10(),
    "log1p": lambda x: x.square().log1p(), "log2": lambda x: (x.square() + 1).log2(), "log sigmoid": F.logsigmoid,
    "mish": F.mish, "pow": lambda x: x**3, "tensor pow": lambda x: (x.square() + 1) ** torch.full((6,), 1.5),
    "to the power": lambda x: 1.5**x, "reciprocal": lambda x: (x.square() + 1).reciprocal(), "relu": F.relu,
    "rsqrt": lambda x: (x.square() + 1).rsqrt(), "selu": F.selu, "sigmoid": torch.sigmoid, "silu": F.silu,
    "sin": torch.sin, "sinh": torch.sinh, "softplus": F.softplus, "softsign": F.softsign,
    "sqrt": lambda x: (x.square() + 1).sqrt(), "square": torch.square, "squared relu": lambda x: x.relu().square(),
    "tan": lambda x: (x.tanh() / 2).tan(), "tanh": torch.tanh, "tanhshrink": F.tanhshrink,
    "times itself": lambda x: x * x, "swish by hand": lambda x: x * x.sigmoid(),
    "of one another": lambda x: x.exp() / x.exp().cosh(), "three at once": lambda x: torch.addcmul(x, x.sin(), x.cos()),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_in_residual_nets(name: str) -> None:
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    model = Residual(ACTIVATIONS[name])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.7)
    agrees(model, nn.CrossEntropyLoss(), x, y)


def test_a_piecewise_linear_function_that_torch_cannot_differentiate_twice() -> None:
    model, other = Residual(F.hardsigmoid), Residual(lambda x: F.relu6(x + 3) / 6)
    other.load_state_dict(model.state_dict())
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    rows = testing.hessian_diagonals(other, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)
    run(model, nn.CrossEntropyLoss(), x, y)
    compare(model, rows, tolerance=1e-6)  # torch's 1/6 is a float32


#: What is not elementwise: gates, softmax, norms and products of activations.
COUPLED: dict[str, Callable[[Tensor], Tensor]] = {
    "chunked gate": lambda x: (x[:, :3] * x[:, 3:].sigmoid()).repeat(1, 2),
    "glu": lambda x: F.glu(x).repeat(1, 2),
    "gate of each sample": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "softmax": lambda x: x.softmax(1),
    "log softmax": lambda x: x.log_softmax(1),
    "logsumexp": lambda x: x + x.logsumexp(1, keepdim=True),
    "layer norm": lambda x: F.layer_norm(x, (6,)),
    "rms norm": lambda x: F.rms_norm(x, (6,)),
    "group norm": lambda x: F.group_norm(x, 2),
    "norm": lambda x: x / x.norm(dim=1, keepdim=True),
    "variance": lambda x: x + x.var(1, keepdim=True),
    "product": lambda x: x + x.prod(1, keepdim=True),
    "outer": lambda x: torch.einsum("ni,nj->nij", x, x.cos()).sum(2),
    "bmm": lambda x: (x.view(-1, 2, 3) @ x.view(-1, 3, 2).sin()).flatten(1).repeat(1, 2)[:, :6],
    "maximum": lambda x: torch.maximum(x.tanh(), x.sin()),
    "sorted": lambda x: x.tanh().sort(1)[0] + x.amax(1, keepdim=True),
    "split in two": lambda x: torch.cat(x.tanh().split(3, 1)[::-1], 1) + torch.stack(x.sin().unbind(1), 1),
    "logaddexp": lambda x: torch.logaddexp(x, x.sin()),
    "cumulative": lambda x: x.tanh().cumsum(1).flip(1).roll(1, 1),
    "masked": lambda x: torch.where(x > 0, x.sin(), x.square()).masked_fill(x > 1, 0.5),
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("n", [1, N])
def test_functions_that_couple_entries(name: str, n: int) -> None:
    agrees(Residual(COUPLED[name]), nn.CrossEntropyLoss(), torch.randn(n, 5), torch.randint(3, (n,)))


def test_activations_that_are_zero() -> None:
    """The first derivative of a square is zero there, and the second is not."""

    class Zero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)
            for p in (*self.a.parameters(), *self.b.parameters()):
                nn.init.zeros_(p)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x).square() + self.a(x) * self.b(x))

    model = Zero()
    agrees(model, nn.CrossEntropyLoss(), torch.randn(N, 5), torch.randint(3, (N,)))
    assert model.a.weight.diag_h.any()


def test_a_scale_on_data_that_depends_on_it() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.s, self.b = nn.Linear(5, 6), nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(x) * self.s + self.s).tanh() * self.s)

    agrees(Scale(), nn.CrossEntropyLoss(), torch.randn(N, 5), torch.randint(3, (N,)))


def images() -> tuple[nn.Module, Tensor, Tensor]:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 3),
    )  # fmt: skip
    return net, torch.randn(N, 2, 8, 8), torch.randint(3, (N,))


@pytest.mark.parametrize("n", [1, 2, 3, N])
def test_convolutional_nets(n: int) -> None:
    model, x, y = images()
    agrees(model, nn.CrossEntropyLoss(), x[:n], y[:n])


def test_frozen_parameters_and_inputs_that_require_grad() -> None:
    model, x, y = images()
    for p in (*model[0].parameters(), model[7].weight, model[9].bias):
        p.requires_grad_(False)
    agrees(model, nn.CrossEntropyLoss(), x.requires_grad_(), y)
    assert not hasattr(model[0].weight, "diag_h")


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("create_graph", [False, True])
def test_retained_graphs(create_graph: bool) -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    loss = px.extend(nn.CrossEntropyLoss())
    rows = testing.hessian_diagonals(model, loss, x, y, weights=[1 / N] * N)
    px.extend(model)
    value = loss(model(x), y)
    for _ in range(2):
        with px.backpack(px.DiagHessian(), px.BatchDiagHessian()):
            value.backward(retain_graph=True, create_graph=create_graph)
        compare(model, rows)
        assert model[0].weight.diag_h.requires_grad == create_graph  # for the error that differentiating it is
    for p in model.parameters():
        p.grad = None


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.c, self.reentrant = nn.Linear(5, 6), nn.Linear(6, 3), reentrant
        self.inner = nn.Sequential(nn.Tanh(), nn.Linear(6, 6), nn.Sigmoid(), nn.LayerNorm(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(
            self.inner(h) if self.reentrant is None else checkpoint(self.inner, h, use_reentrant=self.reentrant)
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts(reentrant: bool) -> None:
    found = []
    for model in (Checkpointed(None), Checkpointed(reentrant)):
        torch.manual_seed(0)
        x, y = torch.randn(N, 5), torch.randint(3, (N,))
        for p in model.parameters():
            nn.init.normal_(p)
        run(model, nn.CrossEntropyLoss(), x, y)
        found.append([p.diag_h for p in model.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)
    agrees(Checkpointed(False), nn.CrossEntropyLoss(), x, y)


def test_dropout_keeps_its_mask() -> None:
    model, x, y = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)), torch.randn(N, 5), None
    y, state = torch.randint(3, (N,)), torch.get_rng_state()
    run(model, nn.CrossEntropyLoss(), x, y)
    torch.set_rng_state(state)
    mask = F.dropout(torch.ones(N, 8), 0.5)
    for n in range(N):
        fixed = nn.Sequential(model[0], model[1], Times(mask[n]), model[3])
        rows = testing.hessian_diagonals(fixed, nn.CrossEntropyLoss(), x[n : n + 1], y[n : n + 1], weights=[1 / N])
        for name, p in (("0.weight", model[0].weight), ("3.weight", model[3].weight)):
            torch.testing.assert_close(p.diag_h_batch[n], rows[name][0])


class Times(nn.Module):
    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_float32() -> None:
    model, x, y = images()
    rows = testing.hessian_diagonals(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)
    run(model.float(), nn.CrossEntropyLoss(), x.float(), y)
    compare(model, rows, tolerance=1e-4)
    assert model[0].weight.diag_h.dtype == torch.float32


def test_bfloat16_activations() -> None:
    model, x, y = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)), torch.randn(N, 5), None
    y = torch.randint(3, (N,))
    rows = testing.hessian_diagonals(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        run(model, nn.CrossEntropyLoss(), x.float(), y)
    compare(model, rows, tolerance=0.1)


def test_piecewise_linear_nets_have_the_diagonal_of_the_ggn() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.LeakyReLU(), nn.Linear(6, 3))
    run(model, nn.CrossEntropyLoss(), torch.randn(N, 5), torch.randint(3, (N,)), px.DiagHessian(), px.DiagGGNExact())
    for p in model.parameters():
        torch.testing.assert_close(p.diag_h, p.diag_ggn_exact)


# -- losses --------------------------------------------------------------------------------------------------


class Saddle(nn.Module):
    """Curved both ways, in combinations of outputs that are not axes."""

    reduction = "mean"

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return (z[:, 0] * z[:, 1] - z[:, 2].square() + (z * y).sum(1).sin()).mean()


class Linear(nn.Module):
    reduction = "mean"

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return (z * y).sum(1).mean()


LOSSES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "mse": (nn.MSELoss, lambda: torch.randn(N, 3)),
    "cross entropy": (lambda: nn.CrossEntropyLoss(label_smoothing=0.1), lambda: torch.randint(3, (N,))),
    "binary": (nn.BCEWithLogitsLoss, lambda: torch.rand(N, 3)),
    "poisson": (nn.PoissonNLLLoss, lambda: torch.rand(N, 3)),
    "huber": (lambda: nn.HuberLoss(delta=0.7), lambda: torch.randn(N, 3)),
    "absolute": (nn.L1Loss, lambda: torch.randn(N, 3)),
    "saddle": (Saddle, lambda: torch.randn(N, 3)),
    "linear": (Linear, lambda: torch.randn(N, 3)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    loss, target = LOSSES[name]
    agrees(mlp(), loss(), torch.randn(N, 5), target())


def test_gaussian_likelihood() -> None:
    class Likelihood(nn.GaussianNLLLoss):
        def forward(self, z: Tensor, y: Tensor) -> Tensor:  # pyright: ignore
            return super().forward(z, y[:, 0], y[:, 1])

    target = torch.rand(N, 2, 3) + 0.5
    agrees(mlp(), Likelihood(), torch.randn(N, 5), target)
    model, x, loss = mlp(), torch.randn(N, 5), px.extend(nn.GaussianNLLLoss())
    rows = testing.hessian_diagonals(model, Likelihood(), x, target, weights=[1 / N] * N)
    px.extend(model)
    with px.backpack(px.DiagHessian(), px.BatchDiagHessian()):
        loss(model(x), target[:, 0], target[:, 1]).backward()
    compare(model, rows)


def test_mean_and_variance_of_a_gaussian() -> None:
    """The loss is convex in the mean, and not in both: the Hessian is had where the GGN is refused."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.mean, self.spread = nn.Linear(5, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.shared(x).tanh()
            return self.mean(hidden), nn.functional.softplus(self.spread(hidden))

    class Likelihood(nn.Module):
        reduction = "mean"

        def forward(self, outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
            return nn.functional.gaussian_nll_loss(outputs[0], y, outputs[1])

    model, loss, x, y = Heads(), px.extend(Likelihood()), torch.randn(N, 5), torch.randn(N, 2)
    rows = testing.hessian_diagonals(model, Likelihood(), x, y, weights=[1 / N] * N)
    px.extend(model)
    with px.backpack(px.DiagHessian(), px.BatchDiagHessian()):
        loss(model(x), y).backward()
    compare(model, rows)
    with pytest.raises(px.PackextError, match="not convex"), px.backpack(px.DiagGGNExact()):
        loss(model(x), y).backward()


@pytest.mark.parametrize("name", ["mse", "cross entropy", "binary", "saddle"])
def test_losses_that_are_maximised(name: str) -> None:
    """Every sign is turned, in the loss and in the model."""
    loss, target = LOSSES[name]
    model, x, y, loss_fn = mlp(), torch.randn(N, 5), target(), px.extend(loss())
    rows = testing.hessian_diagonals(model, loss_fn, x, y, weights=[-2 / N] * N)
    px.extend(model)
    with px.backpack(px.DiagHessian(), px.BatchDiagHessian()):
        (-2 * loss_fn(model(x), y)).backward()
    compare(model, rows)
    if name != "saddle":
        with pytest.raises(px.PackextError), px.backpack(px.DiagGGNExact()):
            (-2 * loss_fn(model(x), y)).backward()


def test_negative_class_weights() -> None:
    weights = torch.tensor([1.0, -0.5, 2.0])
    loss = nn.CrossEntropyLoss(weight=weights, reduction="sum")
    agrees(mlp(), loss, torch.randn(N, 5), torch.tensor([0, 1, 2, 1]), mean=False)


def test_several_losses_in_one_pass() -> None:
    model, x, y, t = mlp(), torch.randn(N, 5), torch.randint(3, (N,)), torch.randn(N, 3)
    first, second = nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")
    one = testing.hessian_diagonals(model, first, x, y, weights=[0.5 / N] * N)
    two = testing.hessian_diagonals(model, second, x, t, weights=[-3.0] * N)
    px.extend(model)
    px.extend(first)
    px.extend(second)
    with px.backpack(px.DiagHessian(), px.BatchDiagHessian()):
        z = model(x)
        (0.5 * first(z, y) - 3 * second(z, t)).backward()
    compare(model, {k: one[k] + two[k] for k in one})


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_scale_of_the_samples_own_losses(reduction: str) -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    rows = testing.hessian_diagonals(model, nn.CrossEntropyLoss(), x, y)
    loss = px.extend(nn.CrossEntropyLoss(reduction=reduction))
    px.extend(model)
    with px.backpack(px.DiagHessian(), px.BatchDiagHessian(), scale="sample"):
        loss(model(x), y).mean().backward()
    compare(model, rows)


@pytest.mark.parametrize("fold", ["sample-major", "time-major"])
def test_tokens_folded_before_the_loss(fold: str) -> None:
    """With curved functions between the model and the loss."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))
    x, y, loss = torch.randn(N, 3, 5), torch.randint(3, (N, 3)), nn.CrossEntropyLoss()
    rows = testing.hessian_diagonals(model, lambda z, t: loss(z.sin().mT, t), x, y, weights=[1 / N] * N)
    px.extend(model)
    px.extend(loss)
    with px.backpack(px.DiagHessian(), px.BatchDiagHessian()):
        z = model(x).sin()
        if fold == "sample-major":
            loss(z.reshape(-1, 3), y.flatten()).backward()
        else:
            loss(z.transpose(0, 1).reshape(-1, 3), y.T.flatten()).backward()
    compare(model, rows)


def test_a_loss_of_several_tensors() -> None:
    class Both(nn.Module):
        reduction = "mean"

        def forward(self, z: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
            return (z[0].mul(y) + z[1].sin() * z[0]).square().sum(1).mean()

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.a(x).tanh()
            return self.b(h), self.c(h)

    agrees(Heads(), Both(), torch.randn(N, 5), torch.randn(N, 3))


# -- refusals ------------------------------------------------------------------------------------------------


def refuses(model: nn.Module, match: str, loss: nn.Module | None = None, error: type[Exception] | None = None) -> None:
    loss = nn.CrossEntropyLoss() if loss is None else loss
    with pytest.raises(error or px.UnsupportedUseError, match=match):
        run(model, loss, torch.randn(N, 5), torch.randint(3, (N,)))
    assert all(p.grad is None and not hasattr(p, "diag_h") for p in model.parameters())


def test_functions_without_second_derivatives_are_refused() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore
            return 3 * ctx.saved_tensors[0] ** 2 * g

    refuses(Residual(lambda x: Cube.apply(x)), "CubeBackward.*in blocks.1.*written in Python")
    lengths = torch.ones(N, 6, dtype=torch.long)
    mean = functools.partial(torch.segment_reduce, reduce="mean", lengths=lengths, axis=1)
    refuses(Residual(mean), r"SegmentReduceBackward0.*Use functions that it can\.$")
    flash = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(px.UnsupportedUseError, match="SDPBackend.MATH"):
        run(flash, nn.MSELoss(), torch.randn(N, 5, 8), torch.randn(N, 5, 8))


def test_functions_that_are_not_finite_are_refused() -> None:
    refuses(Residual(lambda x: x.relu().sqrt()), "SqrtBackward.*not finite")


@pytest.mark.parametrize("where", ["input", "weight"])
def test_nan_is_refused_by_the_function_that_it_comes_from(where: str) -> None:
    model, x = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(N, 5)
    with torch.no_grad():
        (x if where == "input" else model[2].weight)[1, 1] = torch.nan
    with pytest.raises(px.PackextError, match=r"LogSoftmaxBackward0 passes on a gradient of NaN"):
        run(model, nn.CrossEntropyLoss(), x, torch.randint(3, (N,)))


def test_what_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_residual, "LARGEST", 5)
    refuses(Residual(lambda x: x.softmax(1)), "SoftmaxBackward.*6 inputs per sample.*DiagHessianMC")


def test_terms_that_cancel_are_refused() -> None:
    """A norm of one entry is a sign: its curvature is nil, and that of each of its parts is 1 / x²."""

    class Sign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 1), nn.Linear(1, 3)
            with torch.no_grad():
                self.a.weight.mul_(1e-7)
                self.a.bias.mul_(1e-7)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.rms_norm(self.a(x), (1,)))

    refuses(Sign(), "a.weight.*cancel.*Avoid functions of extreme", None, px.PackextError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_diagonal_of_zeros_is_refused_with_other_advice(dtype: torch.dtype) -> None:
    """What is advised is other than what has been done."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).cumprod(1)

    model, loss, x, y = px.extend(Product().to(dtype)), px.extend(nn.L1Loss()), torch.randn(N, 5), torch.randn(N, 3)
    with pytest.raises(px.PackextError, match="cancel.*HMP shows it") as error, px.backpack(px.DiagHessian()):
        loss(model(x.to(dtype)), y.to(dtype)).backward()
    assert ("Use float64" in str(error.value)) == (dtype == torch.float32)
    with px.backpack(px.HMP()):
        loss(model(x.to(dtype)), y.to(dtype)).backward(retain_graph=True)
    block = model.a.weight.hmp(torch.eye(15).view(15, 3, 5)).flatten(1)
    assert block.diagonal().abs().max() < 100 * torch.finfo(dtype).eps * block.abs().max()


def test_terms_that_cancel_to_zero_are_right() -> None:
    """A shift of all keys, or a common scale of what is normalised, changes nothing."""

    class Keys(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(5, 4) for _ in range(3))
            self.s, self.head = nn.Parameter(torch.tensor([1.3])), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            weights = (self.q(x) @ self.k(x).mT).softmax(-1)
            y = (weights @ self.v(x)).mean(1) * self.s
            return self.head(y / y.norm(dim=1, keepdim=True))

    model, x, y = Keys(), torch.randn(N, 3, 5), torch.randint(3, (N,))
    rows = testing.hessian_diagonals(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)
    run(model, nn.CrossEntropyLoss(), x, y)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.diag_h_batch, rows[name], atol=1e-12, rtol=1e-8)
    assert model.k.bias.diag_h.abs().max() < 1e-12 and model.s.diag_h.abs().max() < 1e-12


def test_a_loss_that_sees_more_of_the_model_is_refused() -> None:
    class Hidden(nn.CrossEntropyLoss):
        net: list[Any]

        def forward(self, z: Tensor, y: Tensor) -> Tensor:  # pyright: ignore
            return super().forward(z, y) + self.net[0].seen.square().mean()

    model = Residual(torch.tanh)
    model.first.register_forward_hook(lambda module, args, out: setattr(model, "seen", out))
    loss = Hidden()
    loss.net = [model]
    refuses(model, "in no other way|bypass|one tensor", loss, px.PackextError)


class Hooked(nn.Module):
    """Has a hook on one of four tensors."""

    def __init__(self, where: int, hook: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.where, self.hook = where, hook

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        t = h.tanh()
        u = self.b(t) + t
        z = self.c(u.sigmoid())
        if z.requires_grad:
            (h, t, u, z)[self.where].register_hook(self.hook)
        return z


@pytest.mark.parametrize("where", range(4))
@pytest.mark.parametrize("changes", [False, True])
def test_hooks_that_change_a_gradient_are_refused(where: int, changes: bool) -> None:
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    if changes:
        refuses(Hooked(where, lambda g: -g), r"hook \(Tensor.register_hook\) changes .*behind linear")
    else:
        seen: list[Tensor] = []
        model = Hooked(where, lambda g: seen.append(g) or g * 1)
        rows = testing.hessian_diagonals(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)
        run(model, nn.CrossEntropyLoss(), x, y)
        assert seen
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.diag_h_batch, rows[name])


def test_what_mixes_samples_is_refused() -> None:
    refuses(
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), "BatchNorm", None, px.CoupledSamplesError
    )


# -- what is left behind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fails:
        monkeypatch.setattr(_residual, "LARGEST", 5)
    model, loss = px.extend(Residual(lambda x: x.softmax(1).tanh())), px.extend(nn.CrossEntropyLoss())
    gc.collect()
    gc.disable()
    try:
        x = torch.randn(N, 5)
        value = loss(model(x), torch.randint(3, (N,)))
        expected = pytest.raises(px.UnsupportedUseError) if fails else contextlib.nullcontext()
        with expected, px.backpack(px.DiagHessian(), px.BatchDiagHessian()):
            value.backward()
        node = weakref.ref(value.grad_fn)
        del value, expected
        if not fails:  # an exception refers to the frames that it came through
            assert node() is None
    finally:
        gc.enable()
    gc.collect()
    assert node() is None


def test_random_numbers_of_the_user_are_not_drawn() -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    state = torch.get_rng_state()
    run(model, nn.CrossEntropyLoss(), x, y)
    assert torch.equal(state, torch.get_rng_state())


def test_a_sweep_carries_an_entry_of_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    from packext import _flight

    sent: list[Any] = []
    send = _flight.Sweep.send
    monkeypatch.setattr(_flight.Sweep, "send", lambda self, *a: [sent.append(self), send(self, *a)][1])
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    run(model, nn.CrossEntropyLoss(), x, y)
    looks = [s for s in sent if isinstance(s, _flight.Look)]
    assert len(looks) == 1 + 2  # the gradient, and two digits for four samples
    # Two columns of the loss; seven features, positive or negative in each sample.
    assert 2 + 7 <= len(sent) - len(looks) <= 2 + 7 + 7


# -- a broken engine -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["no residual", "no sign", "one sample", "scale", "elementwise"])
def test_a_broken_engine_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = _residual.Part.columns
    first = (torch.arange(N) == 0)[:, None]
    changes: dict[str, Callable[[Any, Any, float], Any]] = {
        "no sign": lambda edges, cs, sign: (edges, cs, 1.0),
        "one sample": lambda edges, cs, sign: (edges, [c * first for c in cs], sign),
        "scale": lambda edges, cs, sign: (edges, [1.001 * c for c in cs], sign),
        "no residual": lambda edges, cs, sign: (edges, [0 * c for c in cs], sign),
    }
    model, x, y = Residual(torch.tanh), torch.randn(N, 5), torch.randint(3, (N,))
    if wrong == "elementwise":
        model = Residual(lambda x: x.softmax(1))
        monkeypatch.setattr(_residual, "ELEMENTWISE", _residual.ELEMENTWISE | {"SoftmaxBackward"})
    else:
        change = changes[wrong]
        monkeypatch.setattr(_residual.Part, "columns", lambda self, *args: (change(*c) for c in columns(self, *args)))
    with pytest.raises(AssertionError):
        agrees(model, nn.CrossEntropyLoss(), x, y)


@pytest.mark.parametrize("check", ["series", "linear"])
def test_terms_off_the_columns_matter(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the refusals results would be wrong."""
    if check == "linear":
        monkeypatch.setattr(_residual, "_is_linear", lambda outputs, inputs: True)
        case = next(c for c in CASES if c.name == "weight norm")
    else:
        monkeypatch.setattr(_residual, "_refuse_repeated", lambda use, repeated: None)
        case = next(c for c in CASES if c.name == "one linear called twice")
    model, inputs, targets = case.build()
    with pytest.raises(AssertionError):
        agrees(model, nn.CrossEntropyLoss(), inputs, targets)


def test_other_parameters_do_not_matter() -> None:
    """What is refused for some parameters is right for those that are chosen."""
    model = px.extend(nn.Sequential(nn.RNN(3, 4, batch_first=True), Last(), nn.Tanh(), nn.Linear(4, 3)))
    loss_fn, x, y = px.extend(nn.CrossEntropyLoss()), torch.randn(5, 2, 3), torch.randint(3, (5,))
    with pytest.raises(px.UnsupportedUseError, match="not linear in it"), px.backpack(px.DiagHessian()):
        loss_fn(model(x), y).backward()
    chosen = list(model[3].parameters())
    with px.backpack(px.DiagHessian(), parameters=chosen):
        loss_fn(model(x), y).backward()
    wanted = testing.hessian_diagonals(model, nn.CrossEntropyLoss(), x, y, weights=[0.2] * 5)
    for name, p in model[3].named_parameters(prefix="3"):
        torch.testing.assert_close(p.diag_h, wanted[name].sum(0))


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0][:, -1]
