"""Float32, half precision and autocast; statistics of gradients that hardly differ."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packext as px
from packext import testing
from packext._quantity import Point
from tests.cases import Pool

N = 8


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def image() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten(), nn.Linear(36, 3))
    return model, torch.randn(N, 2, 5, 5)


def tokens() -> tuple[nn.Module, Tensor]:
    block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), block, Pool(), nn.Linear(8, 3)), torch.randn(N, 6, 5)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"image": image, "tokens": tokens}


def exact(model: nn.Module, x: Tensor, y: Tensor) -> testing.Rows:
    """Rows of the float64 copy."""
    twin = px.unextend(copy.deepcopy(model)).double()
    return testing.individual_gradients(twin, nn.CrossEntropyLoss(), x.double(), y, weights=[1 / N] * N)


def emit(loss: Callable[[], Tensor]) -> tuple[px.Quantity, ...]:
    quantities = testing.all_quantities()
    with px.backpack(*quantities, scale=float(N)):
        loss().backward()
    return quantities


def worst(model: nn.Module, quantities: Any, rows: testing.Rows) -> dict[str, float]:
    scaled = {k: r * N for k, r in rows.items()}
    kinds = [q for q in quantities if not isinstance(q, (px.GradDot, px.GradHistogram))]
    report = testing.compare(model, kinds, scaled, 1.0, 1.0)
    return {kind: max(e.error for e in report if e.quantity == kind) for kind in {e.quantity for e in report}}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_float32(build: Any) -> None:
    model, x = build()
    y = torch.randint(3, (N,))
    rows = exact(model, x, y)
    px.extend(model)
    quantities = emit(lambda: F.cross_entropy(model(x), y))
    for kind, error in worst(model, quantities, rows).items():
        assert error < 2e-4, kind


class TwoTypes(nn.Module):
    """Parameters that meet data in float32 and, cast, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(5, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        again = F.linear(x.double(), self.layer.weight.double(), self.layer.bias.double())
        return (self.layer(x) + self.shift).double() * again.tanh() + self.shift.double()


def test_a_parameter_that_meets_data_in_two_types() -> None:
    model, x, y = TwoTypes(), torch.randn(N, 5), torch.randint(3, (N,))
    rows = exact(model, x, y)
    asked = [*testing.all_quantities(), px.GradDot({name: torch.randn_like(p) for name, p in model.named_parameters()})]
    px.extend(model)
    for quantity in asked:  # each by itself, as others form the rows
        with px.backpack(quantity):
            px.extend(nn.CrossEntropyLoss())(model(x), y).backward()
        report = testing.compare(model, [quantity], rows, float(N), 2e-4)
        assert (report.ok and len(report) == 3) or isinstance(quantity, px.GradHistogram), str(report)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_bfloat16_modules(build: Any) -> None:
    """Values are those of float32 within the accuracy of bfloat16; what is squared or summed over is in float32."""
    model, x = build()
    model, x, y = model.bfloat16(), x.bfloat16(), torch.randint(3, (N,))
    rows = exact(model, x, y)
    px.extend(model)
    quantities = emit(lambda: F.cross_entropy(model(x).float(), y))
    for kind, error in worst(model, quantities, rows).items():
        assert error < 0.15, kind
    for p in model.parameters():
        assert p.grad_batch.dtype == p.clipped_grad.dtype == torch.bfloat16, "of the shape of the parameter: its dtype"
        for field in ("batch_l2", "batch_dot", "variance", "sum_grad_squared", "grad_dot", "grad_projected"):
            assert getattr(p, field).dtype == torch.float32, field


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_autocast(build: Any, inside: bool) -> None:
    model, x = build()
    y = torch.randint(3, (N,))
    rows = exact(model, x, y)
    px.extend(model)
    quantities = testing.all_quantities()
    with px.backpack(*quantities, scale=float(N)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x)
            assert out.dtype == torch.bfloat16
            loss = F.cross_entropy(out.float(), y)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
    for kind, error in worst(model, quantities, rows).items():
        assert error < 0.15, kind
    assert all(p.grad_batch.dtype == p.grad.dtype == p.variance.dtype == torch.float32 for p in model.parameters())


def test_autocast_gradients_are_those_of_the_plain_model() -> None:
    for build in MODELS.values():
        model, x = build()
        y, grads = torch.randint(3, (N,)), []
        for _ in range(2):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
            grads.append([p.grad.clone() for p in model.parameters()])
            px.extend(model)
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))


class Call(nn.Module):
    """A function of the data, a weight `[5, 5]` and a bias."""

    def __init__(self, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.call, self.weight, self.bias = call, nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight, self.bias)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["data", "data and model"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(5, 5),
        lambda: Call(lambda x, w, b: F.linear(x, w, b[:1].double())),
        lambda: Call(lambda x, w, b: torch.addmm(b, x, w)),
        lambda: Call(lambda x, w, b: x @ w),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3)),
        lambda: nn.MultiheadAttention(5, 1),
    ],
    ids=["linear", "broadcast bias", "addmm", "product", "convolution", "attention"],
)
def test_types_that_torch_does_not_take_together(build: Any, whole: bool, kind: torch.dtype, autocast: bool) -> None:
    """Images that are still bytes, or a batch from numpy, are torch's error; float64 is not rounded by autocast."""
    plain, x = build(), torch.ones(4, 5, dtype=kind)
    if whole and kind.is_floating_point:
        plain = plain.to(kind)
    said = []
    for model in (plain, px.extend(copy.deepcopy(plain))):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            try:
                out = model(*[x] * 3)[0] if isinstance(model, nn.MultiheadAttention) else model(x)
                said.append(out.dtype)
            except RuntimeError as error:
                said.append(str(error))
    assert said[0] == said[1]


@pytest.mark.parametrize(("dtype", "seed"), [(torch.float32, 19), (torch.float32, 24), (torch.float64, 3)])
def test_a_norm_of_which_rounding_is_all_that_is_left(dtype: torch.dtype, seed: int) -> None:
    """Of one feature less its mean, over a deviation of nothing: the probe must not take that for a path not seen."""
    torch.manual_seed(seed)
    model = px.extend(nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1), nn.Linear(1, 2)).to(dtype))
    x, y, loss = torch.randn(8, 3, dtype=dtype), torch.randn(8, 2, dtype=dtype), px.extend(nn.MSELoss(reduction="sum"))
    with px.backpack(px.BatchGrad()):
        loss(model(x), y).backward()
    torch.testing.assert_close(model[2].weight.grad_batch.sum(0), model[2].weight.grad)


def test_coupling_is_found_in_bfloat16() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    model = px.extend(nn.Sequential(nn.Linear(5, 6), Centred(), nn.Linear(6, 3)).bfloat16())
    with pytest.raises(px.CoupledSamplesError), px.backpack(px.BatchGrad()):
        model(torch.randn(N, 5).bfloat16()).square().mean().backward()


def test_a_loss_scale_is_undone_by_a_number() -> None:
    model, x = image()
    y = torch.randint(3, (N,))
    rows = exact(model, x, y)
    px.extend(model)
    with px.backpack(px.Variance(), px.BatchL2Grad(), scale=N / 65536):
        (65536 * F.cross_entropy(model(x), y)).backward()
    for name, p in model.named_parameters():
        assert testing.relative_error(p.batch_l2, (N * rows[name]).flatten(1).square().sum(1)) < 2e-4, name


# -- variance ------------------------------------------------------------------------------------------------


def of_pairs(rows: Tensor) -> Tensor:
    """Reference in float64."""
    rows = rows.double()
    return (rows - rows.mean(0)).square().mean(0)


def variance(model: nn.Module, x: Tensor, v: Tensor) -> None:
    """Emit the variance of the gradients of `sum of v * model(x)`."""
    px.extend(model)
    with px.backpack(px.Variance()):
        (model(x) * v).sum().backward()


@pytest.mark.parametrize("spread", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("tokens", [1, 5])
def test_nearly_equal_gradients_of_a_linear_layer(spread: float, tokens: int) -> None:
    n, shape = 32, (tokens,) if tokens > 1 else ()
    x = 1 + spread * torch.randn(n, *shape, 20)
    v = 1 + spread * torch.randn(n, *shape, 10)
    model = nn.Linear(20, 10)
    variance(model, x, v)
    a, g = x.double().reshape(n, tokens, 20), v.double().reshape(n, tokens, 10)
    rows = torch.einsum("nto,nti->noi", g, a)
    want = of_pairs(rows)
    assert (model.weight.variance >= 0).all()
    assert ((model.weight.variance - want).abs() / want).max() < (1e-3 if spread > 1e-6 else 0.3)
    # The usual formula, E[x²] - E[x]², in the same precision:
    moments = rows.float().square().mean(0) - rows.float().mean(0).square()
    if spread <= 1e-4:
        assert (moments < 0).any() or ((moments - want).abs() / want).max() > 0.5


def test_nearly_equal_gradients_of_a_convolution() -> None:
    n, spread = 32, 1e-4
    model = nn.Conv2d(3, 4, 3)
    x, v = 1 + spread * torch.randn(n, 3, 7, 7), 1 + spread * torch.randn(n, 4, 5, 5)
    variance(model, x, v)
    unfolded = F.unfold(x.double(), 3)
    rows = torch.einsum("nos,nis->noi", v.double().flatten(2), unfolded).reshape(n, 4, 3, 3, 3)
    want = of_pairs(rows)
    assert (model.weight.variance >= 0).all()
    assert ((model.weight.variance - want).abs() / want).max() < 1e-2
    assert (
        (model.bias.variance - of_pairs(v.flatten(2).sum(2))).abs() / of_pairs(v.double().flatten(2).sum(2))
    ).max() < 1e-2


@pytest.mark.parametrize("constant", [3, 20])
@pytest.mark.parametrize("noise", [1e-3, 1e-5])
def test_factors_that_vary_while_their_product_does_not(noise: float, constant: int) -> None:
    """a = ±1 and g = ±1 of the same sign, for some inputs or all: factors vary as they can, gradients do not."""
    n = 64
    sign = torch.randint(2, (n, 1)) * 2.0 - 1
    x = torch.randn(n, 20)
    x[:, :constant] = sign * (1 + noise * torch.randn(n, constant))
    v = sign * (1 + noise * torch.randn(n, 10))
    model = nn.Linear(20, 10, bias=False)
    variance(model, x, v)
    want = of_pairs(torch.einsum("no,ni->noi", v.double(), x.double()))
    assert (model.weight.variance >= 0).all()
    assert ((model.weight.variance - want).abs() / want).max() < (1e-3 if noise > 1e-4 else 2e-2)


def test_equal_gradients_have_no_variance() -> None:
    x, v = torch.randn(1, 20).expand(16, 20), torch.randn(1, 10).expand(16, 10)
    model = nn.Sequential(nn.Linear(20, 10))
    variance(model, x, v)
    scale = float((v[0, :, None] * x[0]).square().max())
    assert (model[0].weight.variance >= 0).all() and model[0].weight.variance.max() < 1e-12 * scale + 1e-20


def test_one_sample_has_no_variance() -> None:
    model = nn.Linear(20, 10)
    variance(model, torch.randn(1, 20), torch.randn(1, 10))
    assert (model.weight.variance == 0).all() and (model.bias.variance == 0).all()


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_extreme_scales_do_not_under_or_overflow_needlessly(scale: float) -> None:
    model, x, v = nn.Linear(20, 10), torch.randn(16, 20), scale * torch.randn(16, 10)
    variance(model, x, v)
    want = of_pairs(torch.einsum("no,ni->noi", v.double(), x.double()))
    assert ((model.weight.variance - want).abs() / want).max() < 1e-3


def test_a_sum_that_torch_has_rounded_is_not_what_inner_products_are_taken_with() -> None:
    model = nn.Sequential(nn.Linear(5, 4), Pool(), nn.Linear(4, 3)).bfloat16()
    x, y = torch.randn(N, 6, 5, dtype=torch.bfloat16), torch.randint(3, (N,))
    model, loss = px.extend(model), px.extend(nn.CrossEntropyLoss())
    found = []
    for exact_grad in (False, True):
        with px.backpack(px.GradDot(), exact_grad=exact_grad) as results:
            loss(model(x).float(), y).backward()
        found.append(results["0.weight"].grad_dot)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-9)


class Scaled(nn.Module):
    """A layer that autocast rounds, before one that it leaves in float32."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.scale = first, nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = (y[0] if isinstance(y, tuple) else y) * self.scale
        return y.mean(1) if y.dim() == 3 else y


AGAIN: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 4),
    "prelu": lambda: nn.Sequential(nn.Linear(5, 4), nn.PReLU()),
    **{kind.__name__: lambda kind=kind: kind(5, 4, batch_first=True) for kind in (nn.RNN, nn.LSTM, nn.GRU)},
    "after linear": lambda: nn.Sequential(nn.Linear(5, 5), nn.GRU(5, 4, batch_first=True)),
}


@pytest.mark.parametrize("build", AGAIN.values(), ids=AGAIN)
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
def test_functions_run_again_as_autocast_ran_them(build: Any, inside: bool) -> None:
    model, x, y = Scaled(build()), torch.randn(N, 6, 5), torch.randint(4, (N,))
    rows = exact(model, x, y)
    px.extend(model)
    with px.backpack(px.BatchGrad(), scale=float(N)), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            loss.backward()
    assert worst(model, (px.BatchGrad(),), rows)["BatchGrad"] < 0.15


# -- curvature -----------------------------------------------------------------------------------------------


class Noted(Point):
    """Products with a matrix in bfloat16, of which every `z * H z` is noted."""

    def __init__(self) -> None:
        matrix = torch.randn(6, 6)
        self.matrix, self.parameters = (matrix + matrix.T).bfloat16(), [torch.zeros(6, dtype=torch.bfloat16)]
        self.noted: list[Tensor] = []

    def hessian(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        image = self.matrix @ vectors[0]
        self.noted.append(vectors[0].double() * image.double())
        return [image]


def test_estimates_of_bfloat16_parameters_are_those_of_their_draws() -> None:
    """A running mean in bfloat16 would stand still after some hundred draws, and its error would shrink."""
    point, m = Noted(), 3000
    diagonal = px.DiagHessianMC(m)
    found = diagonal.land(diagonal.measure(point, torch.Generator())[0], 1, 1.0)
    draws = torch.stack(point.noted)
    assert found.value.dtype == found.standard_error.dtype == torch.float32
    torch.testing.assert_close(found.value.double(), draws.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.standard_error.double(), draws.std(0) / m**0.5, rtol=1e-4, atol=0)
    point.noted.clear()
    trace = px.HessianTrace(m)
    found = trace.land(trace.measure(point, torch.Generator())[0], 1, 1.0)
    torch.testing.assert_close(found.draws, torch.stack(point.noted).sum(1).float(), rtol=1e-5, atol=1e-5)


def test_estimates_of_the_hessian_are_in_float32() -> None:
    model, loss = px.extend(nn.Linear(5, 3).bfloat16()), px.extend(nn.CrossEntropyLoss())
    with px.backpack(px.DiagHessianMC(2), px.HessianTrace(2)) as results:
        loss(model(torch.randn(N, 5).bfloat16()), torch.randint(3, (N,))).backward()
    assert all(t.dtype == torch.float32 for r in (model.bias.diag_h_mc, results.hessian_trace) for t in r)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_standard_errors_do_not_under_or_overflow_needlessly(scale: float) -> None:
    found = []
    for size in (1.0, scale):
        point, diagonal = Noted(), px.DiagHessianMC(7)
        torch.manual_seed(0)
        matrix = torch.randn(6, 6)
        point.matrix, point.parameters = size * (matrix + matrix.T), [torch.zeros(6)]
        generator = torch.Generator().manual_seed(1)
        two = diagonal.add(diagonal.measure(point, generator)[0], diagonal.measure(point, generator)[0])
        found.append([t.double() / size for t in diagonal.land(two, 1, 1.0)])
        draws = torch.stack(point.noted) / size
        wanted = sum(part.var(0) / 7 for part in (draws[:7], draws[7:]))
        torch.testing.assert_close(found[-1][1], torch.as_tensor(wanted).sqrt(), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(*found, rtol=1e-4, atol=0.0)


def test_a_sample_whose_squared_norm_overflows_is_not_left_out_in_silence() -> None:
    model = px.extend(nn.Linear(5, 3))
    x = torch.randn(N, 5)
    x[2] *= 1e25  # of which the gradient is finite, and its norm
    with px.backpack(px.BatchGrad(), px.ClippedGrad(1.0), scale=1.0):
        model(x).sum().backward()
    assert model.weight.grad_batch.isfinite().all()
    assert model.weight.clipped_grad.isnan().all() and model.bias.clipped_grad.isnan().all()


@pytest.mark.parametrize("quantity", [px.BatchL2Grad, px.ClippedGrad])
def test_norms_where_positions_cancel(quantity: Any) -> None:
    """Products of positions are a thousand times as large as their sum: rows are formed, as autograd forms them."""
    torch.manual_seed(0)
    model = px.extend(nn.Sequential(nn.Conv1d(8, 40, 1), nn.InstanceNorm1d(40), nn.Flatten(), nn.Linear(320, 3)))
    loss, x, y = px.extend(nn.CrossEntropyLoss(reduction="sum")), 3000 + torch.randn(6, 8, 8), torch.randint(3, (6,))
    with px.backpack(px.BatchGrad()):
        loss(model(x), y).backward()
    rows = torch.cat([p.grad_batch.flatten(1) for p in model.parameters()], 1)
    own = rows.norm(dim=1)
    if quantity is px.BatchL2Grad:
        with px.backpack(px.BatchL2Grad()):
            loss(model(x), y).backward()
        found = sum(p.batch_l2 for p in model.parameters())
        torch.testing.assert_close(found.sqrt(), own, rtol=1e-3, atol=0.0)
        return
    bound = float(own.min()) / 2  # of which every sample has its full part
    with px.backpack(px.ClippedGrad(bound)):
        loss(model(x), y).backward()
    clipped = torch.cat([p.clipped_grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(clipped, (bound / own) @ rows, rtol=1e-2, atol=1e-3 * bound)


class Differences(nn.Module):
    """Of few positions, nearly equal, the differences alone count."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 64, bias=False), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.outer(((h - h.mean(1, keepdim=True)) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])).sum(1))


@pytest.mark.parametrize("quantity", [px.BatchDotGrad(), px.GGNGram()])
def test_inner_products_where_positions_cancel(quantity: Any) -> None:
    """As norms: of products of positions, ten thousand times as large as their sum, no more than rounding is left."""
    torch.manual_seed(0)
    model, x, y = Differences(), torch.randn(6, 1, 64) + 1e-4 * torch.randn(6, 4, 64), torch.randint(3, (6,))
    found = []
    for kind in (torch.float32, torch.float64):
        model, loss = px.extend(model.to(kind)), px.extend(nn.CrossEntropyLoss())
        with px.backpack(quantity, parameters=[model.inner.weight]):
            loss(model(x.to(kind)), y).backward()
        found.append(getattr(model.inner.weight, quantity.savefield).double())
    error, size = (found[0] - found[1]).abs().max(), found[1].abs().max()
    assert error <= 1e-3 * size


@pytest.mark.parametrize("build", [lambda: nn.Conv1d(2, 4, 3), lambda: nn.ConvTranspose1d(2, 4, 3, stride=2)])
def test_sums_over_the_samples_of_a_convolution_are_not_rounded_by_autocast(build: Any) -> None:
    """Else the part of one among many is rounded to as much as the sum is: more than what it is clipped to."""
    torch.manual_seed(0)
    model, x = px.extend(nn.Sequential(build(), nn.Flatten(), nn.LazyLinear(3))), 1 + 0.1 * torch.randn(300, 2, 8)
    model(x)
    found = []
    weight = model[0].weight
    for quantity in (px.BatchGrad(), px.ClippedGrad(1e-3), px.GradDot({weight: torch.ones_like(weight)})):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().sum()
        with px.backpack(quantity, parameters=[weight], scale=1.0):
            loss.backward()
        found.append(getattr(weight, quantity.savefield).double())
    rows, clipped, dots = found[0].flatten(1), found[1].flatten(), found[2]
    want = (1e-3 / rows.norm(dim=1)) @ rows
    assert (clipped - want).norm() < 1e-4 * want.norm()
    assert (dots - rows.sum(1)).abs().max() < 1e-4 * rows.sum(1).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bags_of_more_tokens_than_the_type_counts(dtype: torch.dtype) -> None:
    """Adding ones, bfloat16 comes to 256, and float16 to 2048."""
    torch.manual_seed(0)
    sizes = torch.tensor([20, 300, 3000])
    ids, starts = torch.randint(7, (int(sizes.sum()),)), sizes.cumsum(0) - sizes
    model, norms = px.extend(nn.EmbeddingBag(7, 4, mode="mean"), batch_axis=None), []
    for kind in (dtype, torch.float64):
        with px.backpack(px.BatchL2Grad()):
            model.to(kind)(ids, starts).sum().backward()
        norms.append(model.weight.batch_l2.double())
        model.zero_grad()
    torch.testing.assert_close(*norms, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("size", [1e-5, 100.0])
def test_rows_of_float16_are_scaled_before_they_are_rounded(size: float) -> None:
    """As written, they are 1/1024 of a sample's own, or 1024 times as large, and float16 knows neither."""
    model, loss = px.extend(nn.Linear(3, 1, bias=False).half()), px.extend(nn.MSELoss(reduction="sum"))
    nn.init.ones_(model.weight)
    x, weight = torch.full((2, 3), size).half(), 1 / 1024 if size < 1 else 1024.0
    with px.backpack(px.BatchGrad(), scale="sample"):
        (loss(model(x), model(x).detach() - 0.5) * weight).backward()
    torch.testing.assert_close(model.weight.grad_batch[:, 0], x, rtol=2e-3, atol=0.0)
