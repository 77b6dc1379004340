"""Kronecker factors of parameters with several uses: tied, divided among experts or heads, or read in several places.

The sum over uses is made dense, rearranged, and its dominant singular pair taken (Van Loan & Pitsianis 1993).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packext as px
from packext import linalg, testing
from packext._factored import View
from packext.testing._kronecker import nearest
from tests.cases import Pieces, Relative, Routed, Tied

pytestmark = pytest.mark.usefixtures("double")

N = 5


def run(model: nn.Module, x: Tensor, y: Tensor, *asked: Any, parts: Any = (N,), **options: Any) -> px.Results:
    px.extend(model)
    loss = px.extend(nn.CrossEntropyLoss())
    model.zero_grad()
    with px.backpack(*asked, accumulate=len(parts) > 1, **options) as results:
        for inputs, targets in zip(x.split(parts), y.split(parts), strict=True):
            (loss(model(inputs), targets) * (len(inputs) / N)).backward()
    return results


def close(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


#: The choices that draw nothing, and draws that two models of one structure share.
FISHERS = ("exact", "empirical", "mc")


def kfac(fisher: str, **options: Any) -> px.KFAC:
    return px.KFAC(fisher=fisher, generator=torch.Generator().manual_seed(3), **options)


# -- a matrix used as it is and transposed -------------------------------------------------------------------


class Both(nn.Module):
    """A weight that reads the data, and whose transpose gives it back; with two weights, the same in two parameters."""

    def __init__(self, tied: bool, how: str) -> None:
        super().__init__()
        self.how = how
        self.w, self.head = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 3)
        self.other = self.w if tied else nn.Parameter(self.w.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.w).tanh()
        y = h @ self.other if self.how == "product" else F.linear(h, self.other.t())
        return self.head(y.tanh().mean(1))


def both(tied: bool, how: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Both(tied, how), torch.randn(N, 3, 4), torch.randint(3, (N,))


def table(tied: bool, how: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Tied()
    if not tied:
        model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    return model, torch.randint(8, (N, 4)), torch.randint(8, (N,))


PAIRS = {
    "transposed": (both, "w", "other"),
    "product": (both, "w", "other"),
    "table": (table, "embed.weight", "head.weight"),
}


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("how", PAIRS)
def test_uses_in_both_orientations_have_the_product_nearest_to_their_sum(how: str, approx: str, fisher: str) -> None:
    build, one, other = PAIRS[how]
    if how == "table" and approx == "reduce":
        pytest.skip("a sample reads several rows")
    apart, x, y = build(False, how)
    results = run(apart, x, y, kfac(fisher, approx=approx))
    products = [results[name].kfac for name in (one, other)]
    dense = [tuple(f.diag() if f.dim() == 1 else f for f in product) for product in products]
    tied, *_ = build(True, how)
    got = run(tied, x, y, kfac(fisher, approx=approx))[one].kfac
    for found, want in zip(got, nearest(dense), strict=True):
        close(found, want)
        assert torch.linalg.eigvalsh(found)[0] > -1e-12
    total = sum(linalg.kron(product) for product in dense)
    error = (linalg.kron(got) - total).norm()
    assert 0 < error < min((linalg.kron(product) - total).norm() for product in dense)


@pytest.mark.parametrize("how", PAIRS)
def test_parts_of_a_batch_are_added_up_before_the_nearest_product_is_taken(how: str) -> None:
    build, one, _ = PAIRS[how]
    for fisher in ("exact", "empirical"):
        for scale in ("loss", "sample"):
            model, x, y = build(True, how)
            whole = run(model, x, y, kfac(fisher), scale=scale)[one].kfac
            close(run(model, x, y, kfac(fisher), scale=scale, parts=(1, 3, 1))[one].kfac, whole)


@pytest.mark.parametrize("how", PAIRS)
def test_corrected_eigenvalues_of_both_orientations(how: str) -> None:
    build, one, _ = PAIRS[how]
    model, x, y = build(True, how)
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)[one]
    first = run(model, x, y, px.EKFAC(fisher="exact"), kfac("exact"))
    basis = {name: first[name].ekfac for name in first}
    close(basis[one].matvec(rows[0, 0]), linalg.kron_matvec(first[one].kfac, rows[0, 0]))
    got = run(model, x, y, px.EKFAC(basis, fisher="exact"))[one].ekfac.eigenvalues
    close(got.flatten(), basis[one].rotate(rows).square().sum((0, 1)).flatten())


# -- blocks of one tensor --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("how", ["rows", "stacked", "product", "turned"])
def test_blocks_of_a_parameter_have_the_factors_of_parameters_of_their_own(how: str, fisher: str) -> None:
    x, y = torch.randn(N, 3, 4), torch.randint(3, (N,))
    found = []
    for together in (True, False):
        torch.manual_seed(1)
        found.append(run(Pieces(how, together), x, y, kfac(fisher)))
    for side, factor in enumerate(found[0]["w"].kfac):
        for block in (0, 1, 3):
            close(factor[block], found[1][f"w.{block}"].kfac[side])
        assert not factor[2].any() and "w.2" not in found[1]


@pytest.mark.parametrize("how", ["rows", "stacked", "product", "turned"])
def test_corrected_eigenvalues_of_blocks(how: str) -> None:
    model, x, y = Pieces(how, True), torch.randn(N, 3, 4), torch.randint(3, (N,))
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)["w"]
    first = run(model, x, y, px.EKFAC(fisher="exact"))
    basis = {name: first[name].ekfac for name in first}
    got = run(model, x, y, px.EKFAC(basis, fisher="exact"))["w"].ekfac.eigenvalues
    close(got.flatten(), basis["w"].rotate(rows).square().sum((0, 1)).flatten())


class Kernels(nn.Module):
    """Convolutions with some of three kernels, in one tensor or in three."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        w = torch.randn(3, 2, 2, 3, 3)
        self.w = nn.Parameter(w) if together else nn.ParameterList(list(w))
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(F.conv2d(x, self.w[2]).tanh(), self.w[0], stride=2).tanh().mean((2, 3)))


def test_kernels_in_one_tensor_have_the_factors_of_kernels_of_their_own() -> None:
    x, y = torch.randn(N, 2, 8, 8), torch.randint(3, (N,))
    found = []
    for together in (True, False):
        torch.manual_seed(1)
        found.append(run(Kernels(together), x, y, kfac("exact")))
    for side, factor in enumerate(found[0]["w"].kfac):
        assert len(factor) == 3 and not factor[1].any()
        for block in (0, 2):
            close(factor[block], found[1][f"w.{block}"].kfac[side])


class Grouped(nn.Module):
    """A convolution in two groups, the first of which runs again by itself; with a kernel each, the same in two."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        w = torch.randn(2, 2, 2, 3)
        self.w = nn.Parameter(w.flatten(0, 1)) if together else nn.ParameterList(list(w))
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.w, nn.Parameter):
            first, h = self.w[:2], F.conv1d(x, self.w, groups=2)
        else:
            first, h = self.w[0], torch.cat([F.conv1d(x[:, :2], self.w[0]), F.conv1d(x[:, 2:], self.w[1])], 1)
        return self.head((F.conv1d(h[:, 1:3].tanh(), first).tanh().mean(2) + h[:, 2:].mean(2)).tanh())


def test_groups_one_of_which_runs_again_have_the_factors_of_kernels_of_their_own() -> None:
    x, y = torch.randn(N, 4, 9), torch.randint(3, (N,))
    found = []
    for together in (True, False):
        torch.manual_seed(1)
        found.append(run(Grouped(together), x, y, kfac("exact")))
    for side, factor in enumerate(found[0]["w"].kfac):
        for block in (0, 1):
            close(factor[block], found[1][f"w.{block}"].kfac[side])


@pytest.mark.parametrize("size", [1, 3])
def test_a_convolution_by_channels_that_runs_twice_is_a_map_in_each_group(size: int) -> None:
    """Also with one number for each channel, where the weight has the shape of a vector."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv1d(4, 4, size, groups=4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(self.conv(x).tanh()).tanh().mean(2))

    x, y = torch.randn(N, 4, 9), torch.randint(3, (N,))
    report = testing.check(Twice(), nn.CrossEntropyLoss(), x, y, [px.KFAC(fisher="exact")])
    assert report.ok, str(report)


def test_experts_count_the_tokens_that_they_were_given() -> None:
    """As matrices of their own do, whose A is a mean over these; also of a batch in parts, some of which miss some."""
    model, x, y = Routed(sort=True), torch.randn(N, 3, 4), torch.randint(3, (N,))
    separate = Separate(model)
    for fisher in ("exact", "empirical"):
        got, want = (run(m, x, y, kfac(fisher)) for m in (model, separate))
        for k in range(3):
            close([f[k] for f in got["w"].kfac], want[f"each.{k}"].kfac)
        counts, outputs = got["b"].kfac
        close(counts.sum(), torch.tensor(1.0))
        assert outputs.shape == (5, 5)
        united = run(model, x, y, kfac(fisher), parts=(1,) * N, scale="sample")
        close(united["w"].kfac, run(model, x, y, kfac(fisher), scale="sample")["w"].kfac)


class Called(nn.Module):
    """Experts that are called also where they are given no token, and a table of bags that may hold padding alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 5, 4))
        self.own = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(4, 5)])
        self.table = nn.EmbeddingBag(6, 5, mode="sum", padding_idx=1)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        given, tokens = x[..., 0].flatten().long(), self.first(x).flatten(0, 1)
        out = tokens.new_zeros(len(tokens), 5)
        for k, own in enumerate(self.own):
            to = (given == k).nonzero()[:, 0]
            out = out.index_add(0, to, F.linear(tokens[to], self.w[k]).sin() + own(tokens[to]))
        return self.last(out.unflatten(0, x.shape[:2]).tanh().sum(1) + self.table(x[..., 1].long()).tanh())


def test_a_part_of_a_batch_that_gives_a_use_nothing_does_not_count() -> None:
    """A is the mean over all that there was, whatever parts the batch came in."""
    x, y = torch.randn(N, 3, 4), torch.randint(3, (N,))
    x[..., 0] = torch.tensor([[0, 0, 1], [1, 1, 0], [0, 1, 0], [2, 1, 1], [2, 2, 0]])  # to whom tokens are given
    x[..., 1] = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 2], [1, 1, 1], [4, 5, 2]])  # what is in the bags
    model = Called()
    whole, parts = (run(model, x, y, kfac("exact"), parts=parts) for parts in ((N,), (2, 1, 2)))
    with px.disable():
        tokens = model.first(x).flatten(0, 1)
    for k in range(3):
        own = tokens[x[..., 0].flatten() == k]
        close(whole["w"].kfac[1][k], own.T @ own / len(own))
        close(whole[f"own.{k}.weight"].kfac[1], own.T @ own / len(own))
    close(whole["table.weight"].kfac[0], torch.tensor([1, 0, 2, 0, 1, 1]) / 5.0)
    for name in whole:
        close(parts[name].kfac, whole[name].kfac)


class Separate(Routed):
    """The same with a parameter for each expert."""

    def __init__(self, model: Routed) -> None:
        super().__init__(sort=True)
        self.load_state_dict(model.state_dict())
        self.each = nn.ParameterList([w.detach().clone() for w in model.w])
        self.w = list(self.each)  # pyright: ignore[reportAttributeAccessIssue]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "w" and isinstance(value, list):
            del self._parameters["w"]
            object.__setattr__(self, name, value)
            return
        super().__setattr__(name, value)


class Uneven(nn.Module):
    """A weight of which rows are used in pieces, and sometimes the whole of it as well."""

    def __init__(self, sizes: list[int], whole: bool = False) -> None:
        super().__init__()
        rows = sum(sizes)
        self.sizes, self.whole = sizes, whole
        self.p, self.head = nn.Parameter(torch.randn(rows, 4)), nn.Linear(rows, 3)

    def pieces(self) -> tuple[Tensor, ...]:
        return self.p.split(self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([F.linear(x.roll(k, -1), part) for k, part in enumerate(self.pieces())], -1)
        return self.head((y + F.linear(x.sin(), self.p) if self.whole else y).tanh()).mean(1)


class Even(Uneven):
    """The same with a parameter for each piece."""

    def __init__(self, model: Uneven) -> None:
        super().__init__(model.sizes, model.whole)
        self.load_state_dict(model.state_dict())
        self.each = nn.ParameterList([part.detach().clone() for part in model.pieces()])
        del self.p

    def pieces(self) -> tuple[Tensor, ...]:
        return tuple(self.each)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("sizes, size", [([2, 4], 2), ([8, 2, 2], 2), ([3, 9, 6], 3), ([4, 4], 4)])
def test_pieces_of_different_sizes_are_seen_as_blocks_of_one(sizes: list[int], size: int, approx: str) -> None:
    """The blocks along the diagonals of what each piece has as a matrix of its own; and a basis of them fits."""
    model, x, y = Uneven(sizes), torch.randn(N, 3, 4), torch.randint(3, (N,))
    want = run(Even(model), x, y, px.KFAC(fisher="exact", approx=approx))
    outputs, inputs = run(model, x, y, px.KFAC(fisher="exact", approx=approx))["p"].kfac
    assert outputs.shape == (sum(sizes) // size, size, size) and inputs.shape == (len(outputs), 4, 4)
    at = 0
    for k, rows in enumerate(sizes):
        b, a = want[f"each.{k}"].kfac
        for lo in range(0, rows, size):
            close(outputs[at], b[lo : lo + size, lo : lo + size])
            close(inputs[at], a)
            at += 1
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)["p"]
    basis = {
        name: run(model, x, y, px.EKFAC(fisher="exact", approx=approx))[name].ekfac
        for name in ("p", "head.weight", "head.bias")
    }
    got = run(model, x, y, px.EKFAC(basis, fisher="exact"))["p"].ekfac.eigenvalues
    close(got.flatten(), basis["p"].rotate(rows).square().sum((0, 1)).flatten())


def test_a_weight_used_as_a_whole_and_in_pieces() -> None:
    """Its factors are the sums over the uses of every block."""
    model, x, y = Uneven([2, 4], whole=True), torch.randn(N, 3, 4), torch.randint(3, (N,))
    outputs, inputs = run(model, x, y, kfac("exact"))["p"].kfac
    close(inputs, (torch.stack([t.flatten(0, 1).mT @ t.flatten(0, 1) for t in (x, x.roll(1, -1), x.roll(1, -1))])
                   + (x.sin().flatten(0, 1).mT @ x.sin().flatten(0, 1))) / (2 * N * 3))  # fmt: skip
    first = run(model, x, y, px.EKFAC(fisher="exact"))
    basis = {name: first[name].ekfac for name in first}
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)["p"]
    got = run(model, x, y, px.EKFAC(basis, fisher="exact"))["p"].ekfac.eigenvalues
    close(got.flatten(), basis["p"].rotate(rows).square().sum((0, 1)).flatten())
    # The outputs' side of the whole use alone, beside those of its pieces, is linear in what arrives there.
    assert outputs.shape == (3, 2, 2) and (torch.linalg.eigvalsh(outputs) > 0).all()


def test_attention_to_other_tokens_has_factors() -> None:
    """In its packed weight are the queries' rows, and in one piece those of keys and values: as blocks of three."""
    layer = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x, x.roll(1, 1).tanh())).mean(1)

    found = run(Net(), torch.randn(N, 3, 4), torch.randint(3, (N,)), kfac("exact"))
    outputs, inputs = found["layer.multihead_attn.in_proj_weight"].kfac
    assert outputs.shape == inputs.shape == (3, 4, 4)
    close(inputs[1], inputs[2])
    assert not torch.allclose(inputs[0], inputs[1])


@pytest.mark.parametrize(
    "sizes, why", [([9, 10], "which is not the weight"), ([32, 32, 16, 10, 6], "which is divided into blocks")]
)
def test_pieces_with_no_common_size_are_refused(sizes: list[int], why: str) -> None:
    with pytest.raises(
        px.UnsupportedUseError, match=rf"KFAC has no Kronecker factors for p \[{sum(sizes)}, 4\], {why}"
    ):
        run(Uneven(sizes), torch.randn(N, 3, 4), torch.randint(3, (N,)), px.KFAC())


def test_a_weight_of_which_another_use_reads_some_inputs_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.p).tanh() * (x[:, :2] @ self.p[:2]).tanh()

    with pytest.raises(px.UnsupportedUseError, match=r"for p \[4, 3\], which is divided into blocks in one way"):
        run(Net(), torch.randn(N, 4), torch.randint(3, (N,)), px.KFAC())


def test_a_view_that_is_not_what_its_gradient_says_is_no_block() -> None:
    """A function of its own between a parameter and its view may change the gradient."""

    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return -2 * grads[0]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.head = nn.Parameter(torch.randn(2, 4, 4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(x, Reversed.apply(self.p)[0]).tanh())

    model, x, y = Net(), torch.randn(N, 4), torch.randint(3, (N,))
    rows = testing.individual_gradients(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)
    close(run(model, x, y, px.BatchGrad())["p"].grad_batch, rows["p"])
    with pytest.raises(px.UnsupportedUseError, match="for p"):
        run(model, x, y, px.KFAC())


# -- a table read in several places ----------------------------------------------------------------------------


def check(model: Relative, x: Tensor, y: Tensor, asked: Any) -> None:
    report = testing.check(model, nn.CrossEntropyLoss(), x, y, [asked], parameters=[model.table.weight])
    assert report.ok, str(report)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_table_that_is_read_once_for_all_layers(fisher: str) -> None:
    """Its outputs are what the module gave: their gradients are those of all layers together."""
    model, x, y = Relative(True), torch.randn(N, 4, 4), torch.randint(3, (N,))
    check(model, x, y, px.KFAC(fisher=fisher))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_table_that_is_read_in_each_layer(fisher: str) -> None:
    """The layers' positions are those of one table."""
    model, x, y = Relative(False), torch.randn(N, 4, 4), torch.randint(3, (N,))
    check(model, x, y, px.KFAC(fisher=fisher))
    first = run(copy.deepcopy(model), x, y, px.EKFAC(fisher=fisher))
    basis = {name: first[name].ekfac for name in first}
    check(model, x, y, px.EKFAC(basis, fisher=fisher))


class Causal(Relative):
    """Of which a mask leaves out the positions to come."""

    def bias(self) -> Tensor:
        return super().bias().masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -1e9)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_positions_that_a_mask_leaves_out_are_none(fisher: str) -> None:
    model, x, y = Causal(), torch.randn(N, 4, 4), torch.randint(3, (N,))
    factors = testing.Reference(model, nn.CrossEntropyLoss(), x, y).factors(fisher)
    want = factors.outputs("table.weight", "expand", kind="IO")
    counts, outputs = run(model, x, y, px.KFAC(fisher=fisher))["table.weight"].kfac
    close(outputs, want[0])
    close(counts, torch.tensor([0.0, 0, 0, 4, 3, 2, 1]) / 10)


class Cast(nn.Module):
    """A layer of another type than what it meets, as routers are computed in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)
        self.last.weight.data = self.last.weight.data.float().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x).tanh(), self.last.weight.to(x.dtype))


@pytest.mark.parametrize("quantity", [px.KFAC(fisher="exact"), px.KFAC(fisher="exact", bias="joint"), px.KFLR()])
def test_a_cast_is_no_other_parameter(quantity: Any) -> None:
    x, y, found = torch.randn(N, 4), torch.randint(3, (N,)), []
    for dtype in (torch.float64, torch.float32):
        model = Cast(dtype)
        run(model, x, y, quantity)
        found.append([f.double() for f in getattr(model.last.weight, quantity.savefield)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-8)


def test_a_cast_to_complex_numbers_is_no_view() -> None:
    p = nn.Parameter(torch.randn(3, 3))
    assert View.of(p.to(torch.complex128), p) is None and View.of(p.float(), p) is not None
    assert View.of(p.float().t(), p) is None and View.of((2 * p).float(), p) is None
