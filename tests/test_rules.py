"""Rules: each agrees with the generic one, a broken one is found, and shapes do not matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings
from torch import Tensor, nn

import packext as px
from packext import _listening, _probe, _scratch, testing
from packext._factored import Factored, Masked, Patches, Pulled, Sum, gram
from packext._factored.windows import Window
from packext._use import Rule
from packext.rules import _lstm, convolution, elementwise, embedding, linear, norm, recurrent
from tests.cases import CASES, Case
from tests.helpers import double_precision
from tests.test_quantities import Prepared

pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings("ignore:Using padding='same'")]

RULES: dict[str, Rule] = {
    "linear": linear.LINEAR,
    "einsum": linear.CONTRACTION,
    "convolution": convolution.CONVOLUTION,
    "elementwise": elementwise.ARGUMENT,
    "embedding": embedding.EMBEDDING,
    "indexed": embedding.INDEXED,
    "bag": embedding.BAG,
    "norm": norm.NORM,
    "prelu": norm.PRELU,
    "bilinear": norm.BILINEAR,
    "recurrent": recurrent.RECURRENT,
}
#: A case in which each rule takes part.
EXAMPLES = {
    "linear": "mlp",
    "einsum": "einsum heads with relative bias",
    "convolution": "conv2d groups",
    "elementwise": "raw parameters",
    "embedding": "embedding padding_idx",
    "indexed": "indexed table",
    "bag": "embedding bag mean",
    "norm": "group norm",
    "prelu": "prelu",
    "bilinear": "bilinear",
    "recurrent": "gru",
}


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_every_rule_is_in_this_table() -> None:
    modules = (linear, convolution, elementwise, embedding, norm, recurrent)
    rules = {id(value) for module in modules for value in vars(module).values() if isinstance(value, Rule)}
    # The last one makes the same forms, where an input requires grad: tests/test_slopes.py.
    assert rules == {id(rule) for rule in (*RULES.values(), linear.OWNED_CONTRACTION)}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_rules_agree_with_the_generic_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.name == "channels last":
        pytest.skip("torch 2.13 crashes where group_norm on channels-last data asks for the weight's gradient alone")
    torch.manual_seed(0)
    model, inputs, targets = case.build()
    loss_fn = case.loss()
    px.extend(model, case.batch_axis)
    found = []
    for generic in (False, True):
        if generic:
            for kind in {type(rule) for rule in RULES.values()}:
                monkeypatch.setattr(kind, "factors", lambda *args: None)
        model.zero_grad()
        with px.backpack(px.BatchGrad()) as results:
            loss_fn(testing.call(model, inputs), targets).backward()
        found.append({name: results[name].grad_batch for name in results})
    assert found[0].keys() == found[1].keys()
    for name, fast in found[0].items():
        assert testing.relative_error(fast, found[1][name]) < 1e-9, name


def is_slow(form: Factored) -> bool:
    """Whether a form takes one pass for each sample."""
    parts = form.parts if isinstance(form, Sum) else [form.inner] if isinstance(form, Pulled) else []
    return isinstance(form, Masked) or any(is_slow(part) for part in parts)


#: Cases in which some form takes one pass for each sample.
GENERIC = {
    "embedding bag max",
    "embedding bag offsets max",
    "embedding bag learned weights",
    "lstm projection",
    "lstm packed, projection",
    "complex numbers of real parameters",  # gradients are products with conjugates
    "attention bias_kv zero",  # a parameter repeated over the batch, with entries of its own for each sample
}


def test_the_generic_rule_is_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that ceases to apply costs a pass per sample: it should not go unnoticed."""
    slow: set[str] = set()
    emit = px.backpack._emit
    for case in CASES:

        def spy(self: Any, flights: Any, source: Any, statistics: Any, *rest: Any, case: Case = case) -> Any:
            if is_slow(statistics.form) and statistics.form.n > 1:
                slow.add(case.name)
            return emit(self, flights, source, statistics, *rest)

        monkeypatch.setattr(px.backpack, "_emit", spy)
        torch.manual_seed(0)
        model, inputs, targets = case.build()
        px.extend(model, case.batch_axis)
        with px.backpack(px.BatchL2Grad()):
            case.loss()(testing.call(model, inputs), targets).backward()
    assert slow == GENERIC


class Wrong(Factored):
    """A form that is off by one percent."""

    def __init__(self, form: Factored) -> None:
        self.form = form
        self.n, self.shape, self.acc, self.device = form.n, form.shape, form.acc, form.device

    def rows(self, lo: int, hi: int) -> Tensor:
        return self.form.rows(lo, hi) * 1.01


@pytest.mark.parametrize("name", RULES)
def test_a_broken_rule_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, used = type(RULES[name]), []
    factors = kind.factors

    def broken(self: Rule, use: Any, t: Any, gs: Any, layouts: Any) -> Any:
        used.append(self)
        forms = factors(self, use, t, gs, layouts)
        return None if forms is None else {k: Wrong(form) for k, form in forms.items()}

    monkeypatch.setattr(kind, "factors", broken)
    torch.manual_seed(0)
    this = Prepared(named(EXAMPLES[name]))
    with pytest.raises(px.WrongRuleError, match="differs from autograd's") as error:
        this.check([px.BatchGrad()])
    assert RULES[name] in used and "parameters" in str(error.value)
    assert all(p.grad is None and not vars(p) for p in this.model.parameters())
    with monkeypatch.context() as blind:  # without the probe's comparison, the oracle finds it
        blind.setattr(_probe, "_compare", lambda *args: None)
        for quantity in (px.BatchGrad(), px.BatchL2Grad(), px.SumGradSquared(), px.Variance()):
            with pytest.raises(AssertionError, match="WRONG"):
                this.check([quantity])
    assert not _listening.here().contexts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_probe_finds_a_broken_rule_in_float32_as_well(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = linear.Linear.factors
    monkeypatch.setattr(
        linear.Linear, "factors", lambda self, *args: {k: Wrong(f) for k, f in (factors(self, *args) or {}).items()}
    )
    model = px.extend(nn.Linear(5, 3).to(dtype))
    with pytest.raises(px.WrongRuleError), px.backpack(px.BatchGrad()):
        model(torch.randn(4, 5, dtype=dtype)).square().mean().backward()


# -- shapes ----------------------------------------------------------------------------------------------------

QUANTITIES = (
    px.BatchGrad(),
    px.BatchL2Grad(),
    px.BatchDotGrad(),
    px.SumGradSquared(),
    px.Variance(),
    px.ProjectedGrad(2),
)
SHAPES = settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
small = st.integers(1, 3)


def exact(model: nn.Module, inputs: Any) -> None:
    with torch.no_grad():
        target = torch.randn_like(model.double()(inputs))
    report = testing.check(model, nn.MSELoss(reduction="sum"), inputs, target, QUANTITIES)
    assert report.ok, str(report)


@SHAPES
@given(
    n=st.integers(1, 5), lead=st.lists(small, max_size=3), i=st.integers(1, 6), o=st.integers(1, 6), bias=st.booleans()
)
def test_linear_of_any_shape(n: int, lead: Sequence[int], i: int, o: int, bias: bool) -> None:
    with double_precision():
        exact(nn.Linear(i, o, bias=bias), torch.randn(n, *lead, i))


@SHAPES
@given(
    n=st.integers(1, 4), dims=small, transposed=st.booleans(), groups=st.integers(1, 2), i=small, o=small,
    kernel=small, stride=small, padding=st.integers(0, 2), dilation=st.integers(1, 2),
    size=st.integers(1, 6), bias=st.booleans(), route=st.sampled_from(["patches", "beside each other", "alone"]),
)  # fmt: skip
def test_convolution_of_any_shape(
    n: int, dims: int, transposed: bool, groups: int, i: int, o: int,
    kernel: int, stride: int, padding: int, dilation: int, size: int, bias: bool, route: str,
) -> None:  # fmt: skip
    extent = (kernel - 1) * dilation + 1
    out = (size - 1) * stride + extent - 2 * padding if transposed else size + 2 * padding - extent + 1
    assume(out >= 1)
    kinds = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    with double_precision(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "_suits", lambda *_: route == "beside each other")
        patch.setattr(convolution, "LARGE", 0 if route == "alone" else 1 << 60)
        conv = kinds[dims - 1](i * groups, o * groups, kernel, **options)
        size = min(size, 3) if dims == 3 and size + 2 * padding - extent >= 3 else size
        assume(transposed or size + 2 * padding >= extent)
        exact(conv, torch.randn(n, i * groups, *[size] * dims))


@SHAPES
@given(n=st.integers(1, 4), shape=st.lists(small, min_size=1, max_size=3), words=st.integers(1, 5), width=small)
def test_lookup_of_any_shape(n: int, shape: Sequence[int], words: int, width: int) -> None:
    with double_precision():
        exact(nn.Embedding(words, width), torch.randint(words, (n, *shape)))


@SHAPES
@example(n=2, t=3, layers=2, both=True, bias=True, first=True, kind=nn.LSTM, part=100, frozen="hr")
@given(
    n=st.integers(1, 4), t=st.integers(1, 4), layers=st.integers(1, 2),
    both=st.booleans(), bias=st.booleans(), first=st.booleans(),
    kind=st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]), part=st.sampled_from([1, 100, 1 << 16]),
    frozen=st.sampled_from(["none", "ih", "weight_hh", "hr"]),
)  # fmt: skip
def test_recurrent_layers_of_any_shape(
    n: int, t: int, layers: int, both: bool, bias: bool, first: bool, kind: Any, part: int, frozen: str
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            projected = {"proj_size": 2} if kind is nn.LSTM and frozen == "hr" else {}
            self.rnn = kind(2, 3, layers, bias=bias, batch_first=first, bidirectional=both, **projected)
            for name, p in self.rnn.named_parameters():
                p.requires_grad_(frozen not in name)

        def forward(self, x: Tensor) -> Tensor:
            y = self.rnn(x if first else x.transpose(0, 1))[0]
            return y if first else y.transpose(0, 1)

    with double_precision(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_lstm, "PART", part)
        exact(Net(), torch.randn(n, t, 2))


@given(
    dims=st.integers(1, 3),
    images=st.integers(1, 5),
    channels=st.sampled_from([1, 3, 48]),
    groups=st.integers(1, 2),
    kernel=st.integers(1, 4),
    size=st.integers(4, 7),
    padding=st.integers(0, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    tile=st.sampled_from([1, 500, 1 << 19]),
)
@settings(max_examples=60, deadline=None)
def test_second_moment_of_patches_of_any_shape(
    dims: int, images: int, channels: int, groups: int, kernel: int, size: int, padding: int, stride: int,
    dilation: int, tile: int,
) -> None:  # fmt: skip
    """The way around patches gives what patches do, wherever it applies."""
    out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    assume(out > 0 and channels**2 * kernel ** (2 * dims) < 1 << 21)
    each = [(value,) * dims for value in (kernel, stride, padding, dilation, out)]
    window = Window(*each, groups=groups)
    x = torch.randn(images, channels * groups, *(size,) * dims, dtype=torch.float64)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_scratch, "TILE", tile)
        found = window.second_moment(x)
        assert (found is not None) == (stride == dilation == 1 and kernel > 1 and out >= kernel)
        columns = window.patches(x).transpose(0, 1).flatten(1, 2)
        wanted = columns.mT @ columns
        for value in (found, gram(columns.mT)):
            assert value is None or torch.allclose(value, wanted, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_inner_products_of_patches_from_pixels(dims: int, groups: int) -> None:
    """Of windows that differ along each axis, whether a graph is recorded or not; and which way is taken."""
    sizes, paddings = (7, 5, 4), (1, 0, 2)
    for kernels, strides, dilations in [((3, 2, 1), (1, 2, 1), (2, 1, 3)), ((1, 3, 2), (3, 1, 2), (1, 1, 2))]:
        parts = [values[:dims] for values in (kernels, strides, paddings, dilations, sizes)]
        out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for k, s, p, d, n in zip(*parts, strict=True)]
        window = Window(*parts[:4], out, groups)
        x = torch.randn(3, 4, *sizes[:dims], dtype=torch.float64)
        a = window.patches(x).clone()
        ways = []
        for some in (window, None):
            patches = Patches(*a.shape, lambda lo, hi: a[lo:hi], x, window=some)  # noqa: B023
            ways.append(patches.inner_cost)
            for recorded in (True, False):
                with torch.set_grad_enabled(recorded):
                    found = patches.inner(1, 3, torch.float64)
                torch.testing.assert_close(found, (a @ a.mT)[1:])
        assert ways[0] <= ways[1]
        with torch.no_grad():
            torch.testing.assert_close(window.inner(x), a @ a.mT)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), (6, 6), 1)
    costs = [
        Patches(2, 1, 36, 864, window.patches, torch.zeros(2, 96, 6, 6), window=w).inner_cost for w in (window, None)
    ]
    assert costs[0] < costs[1] / 4


def test_samples_side_by_side_of_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """The input's last axis has one entry, and a stride by which torch took parts of it for channels-last."""
    monkeypatch.setattr(convolution, "_suits", lambda *_: True)
    with double_precision():
        model = nn.Sequential(nn.Conv1d(7, 1, 3, padding=1), nn.Flatten(), nn.Linear(1, 3))
        report = testing.check(model, nn.CrossEntropyLoss(), torch.randn(4, 1, 7).transpose(1, 2), torch.arange(4) % 3)
    assert report.ok, report


class Broadcast(nn.Module):
    """A bias of any shape in a linear layer, or a value assigned to some of what it gives."""

    def __init__(self, shape: Sequence[int], assigned: Any = None) -> None:
        super().__init__()
        self.layer, self.value, self.assigned = nn.Linear(5, 3, bias=False), nn.Parameter(torch.randn(shape)), assigned

    def forward(self, x: Tensor) -> Tensor:
        if self.assigned is None:
            return F.linear(x, self.layer.weight, self.value).flatten(1)
        y = self.layer(x).clone()
        y[y > 0 if self.assigned == "mask" else self.assigned] = self.value
        return y.flatten(1)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 2, 3)])
def test_biases_that_torch_broadcasts(shape: Sequence[int]) -> None:
    try:
        Broadcast(shape).double()(torch.randn(4, 2, 5).double())
    except RuntimeError:
        pytest.skip("not by this one (2.9), in float64")
    exact(Broadcast(shape), torch.randn(4, 2, 5))


@pytest.mark.parametrize(
    ("shape", "assigned"),
    [((1, 1, 1, 2), (..., slice(2))), ((1, 1), (slice(None), 0, 1)), ((1, 1), "mask")],
    ids=str,
)
def test_assigned_values_with_leading_axes_of_one_entry(shape: Sequence[int], assigned: Any) -> None:
    exact(Broadcast(shape, assigned), torch.randn(4, 2, 5))


class Called(nn.Module):
    """A function of what a layer gives and of a weight, before a second layer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.layer, self.w, self.head = nn.Linear(5, 4), nn.Parameter(torch.randn(4)), nn.Linear(4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.layer(x), self.w).tanh())


@pytest.mark.parametrize(
    "function",
    [
        lambda h, w: h * w.to(h),
        lambda h, w: h * w.to(torch.float32).to(h),
        lambda h, w: h.to(w) * w,
        lambda h, w: h * w if not torch.equal(h, w) else h,
        lambda h, w: h * w if not torch.allclose(h, w) else h,
        lambda h, w: h.to(torch.result_type(h, w)) * w,
        lambda h, w: h * w.sin() if not h.is_same_size(w) else h,
        lambda h, w: torch.meshgrid(h[:, 0], w, indexing="ij")[0] * w,
    ],
    ids=["to", "and back", "the other's type", "equal", "close", "type", "sizes", "mesh"],
)
def test_calls_that_take_no_values_or_give_none(function: Any) -> None:
    report = testing.check(Called(function), nn.CrossEntropyLoss(), torch.randn(4, 5), torch.arange(4) % 3)
    assert report.ok, report


FORMS: dict[str, Any] = {
    "a product with many axes": lambda h, w: (h.view(-1, *[1] * 9, 1, 4) @ w.view(1, 4, 1)).view(-1, 1) + h,
    "one entry added to a product": lambda h, w: torch.addmm(w[:1], h, torch.outer(w, w)),
    "a product with factors": lambda h, w: torch.addmm(w, h, torch.outer(w, w), alpha=2.0, beta=0.5),
    "data added to a product": lambda h, w: torch.addmm(h, h, torch.outer(w, w)),
    "an equation without its result": lambda h, w: torch.einsum("ni,i", h, w)[:, None] + h,
    "a diagonal in an equation": lambda h, w: torch.einsum("ni,ii->ni", h, torch.outer(w, w)),
    "any axes in an equation": lambda h, w: torch.einsum("...i,ij->...j", h, torch.outer(w, w)),
    "attention without heads": lambda h, w: F.scaled_dot_product_attention(
        w.view(1, 2, 2), h.view(-1, 2, 2), h.view(-1, 2, 2)
    ).flatten(1),
    "slopes of channels, samples last": lambda h, w: F.prelu(h.view(-1, 2, 2).permute(1, 2, 0), w[:2]).permute(2, 0, 1),
    "scales of channels, samples last": lambda h, w: F.batch_norm(
        h.view(-1, 2, 2).permute(1, 2, 0), torch.zeros(2), torch.ones(2), w[:2], w[2:]
    ).permute(2, 0, 1),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_of_calls_that_are_seldom_met(form: Any) -> None:
    exact(Called(lambda h, w: form(h, w).flatten(1)), torch.randn(4, 5))


def test_a_type_taken_from_a_weight_is_no_use_of_it() -> None:
    found = px.explain(Called(lambda h, w: h.to(w) * w), torch.randn(4, 5))
    assert [u.function for u in found.uses if u.parameter == "w"] == ["mul"]


def test_a_mesh_of_data_and_a_parameter() -> None:
    exact(Called(lambda h, w: sum(torch.meshgrid(h[:, 0], w, indexing="ij"))), torch.randn(4, 5))


NUMBERS: dict[str, Any] = {
    "product": lambda row, w: row @ w,
    "distance": lambda row, w: torch.dist(row, w),
    "multiple": lambda row, w: row.sum() * w[0],
    "shift": lambda row, w: row.prod() + w.sum(),
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("n", [1, 4])
def test_a_number_for_each_sample(n: int, number: Any) -> None:
    exact(Called(lambda h, w: torch.stack([number(row, w) for row in h])[:, None] + h), torch.randn(n, 5))


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_a_number_of_all_samples_is_refused(number: Any) -> None:
    model, loss = px.extend(Called(lambda h, w: number(h.sum(0), w) + h)), px.extend(nn.CrossEntropyLoss())
    with pytest.raises(px.CoupledSamplesError, match="Samples influence each other"), px.backpack(px.BatchGrad()):
        loss(model(torch.randn(4, 5)), torch.arange(4) % 3).backward()
