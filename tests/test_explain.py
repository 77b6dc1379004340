"""`explain`: the uses it finds, the refusals it shows, and that it leaves no trace."""

from __future__ import annotations

import inspect
import io
import re
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import packext as px
from packext._explain import INPUT, Explanation, ParameterUse, explain
from tests.cases import CASES, Case, Vit
from tests.helpers import left_behind


def conv_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def by_name(explanation: Explanation) -> dict[str, ParameterUse]:
    return {u.parameter: u for u in explanation.uses}


def test_sizes_of_a_convolutional_net() -> None:
    found = explain(conv_net(), torch.randn(5, 1, 6, 6))
    uses = by_name(found)
    assert list(uses) == ["0.weight", "0.bias", "3.weight", "3.bias"]
    u = uses["0.weight"]
    assert (u.module, u.kind, u.function, u.rule, u.form) == ("0", "Conv2d", "conv2d", "convolution", "outer")
    assert (u.n, u.s, u.g, u.i, u.o) == (5, 36, 1, 9, 8)
    assert (u.after, uses["3.weight"].after, found.ends) == ((INPUT,), (0,), (1,))
    assert u.outputs == ((5, 8, 6, 6),)
    assert found.n == 5 and found.supported and not found.unused and not found.frozen
    assert found.inputs == ((5, 1, 6, 6),) and found.outputs == ((5, 10),)


def test_routes_and_costs_follow_the_quantities() -> None:
    model, x = nn.Linear(64, 32), torch.randn(8, 4, 64)
    norms = by_name(explain(model, x, quantities=[px.BatchL2Grad()]))["weight"]
    rows = by_name(explain(model, x, quantities=[px.BatchGrad(), px.BatchL2Grad()]))["weight"]
    assert norms.routes["sq_norms"] == "factors" and rows.routes["rows"] == "tiles"
    assert norms.cost is not None and rows.cost is not None
    # Two Gram matrices of 4 positions and their product, over a gradient that has 65 x 32 entries with the bias's.
    assert norms.cost == pytest.approx(4 * 4 * (64 + 32 + 1) / (4 * 65 * 32))
    assert norms.cost < 0.5 < rows.cost
    assert "factors: norms" in norms.route


def test_residuals_and_elementwise_uses_take_their_place() -> None:
    found = explain(Vit(), torch.randn(4, 3, 4, 4))
    order = {u.parameter: u for u in found.uses}
    assert order["cls"].after == (order["patch.weight"].index,)
    assert order["pos"].after == (order["cls"].index,)
    norm, attention = order["block.norm1.weight"], order["block.self_attn.out_proj.weight"]
    assert norm.after == (order["pos"].index, attention.index)
    assert (order["pos"].form, order["pos"].o) == ("dense", 5 * 8)


class Several(nn.Module):
    """A table used twice, a merged weight, a frozen one, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))
        self.still = nn.Linear(6, 6).requires_grad_(False)
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, ids: Tensor) -> dict[str, Any]:
        h = self.still(self.table(ids) @ (self.a @ self.b))
        return {"logits": h @ self.table.weight.T, "ids": ids}


def test_shared_merged_frozen_and_unused_parameters() -> None:
    found = explain(Several(), ids=torch.randint(9, (3, 5)))
    forms = [(u.parameter, u.form, u.s) for u in found.uses]
    assert forms[0] == ("table.weight", "lookup", 5)
    assert ("a", "pulled outer", 5) in forms and ("b", "pulled outer", 5) in forms
    assert [u.function for u in found.uses if u.parameter == "table.weight"] == ["embedding", "matmul"]
    assert found.unused == ("spare",) and found.frozen == ("still.weight", "still.bias")
    assert "No gradient reaches: spare." in str(found) and "Frozen: still.weight" in str(found)


@pytest.mark.parametrize("extended", [False, True])
def test_leaves_no_trace(extended: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    if extended:
        px.extend(model)
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    keys = [set(m.__dict__) for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    model[0].weight.grad = torch.ones(4, 4)
    x, draws = torch.randn(6, 4), torch.get_rng_state()
    explain(model, x)
    assert torch.equal(torch.get_rng_state(), draws)
    assert all(torch.equal(v, buffers[k]) for k, v in model.state_dict().items())
    assert [set(m.__dict__) for m in model.modules()] == keys
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert px.is_extended(model) == extended and torch.equal(model[0].weight.grad, torch.ones(4, 4))


def test_leaves_nothing_to_the_garbage_collector() -> None:
    """It looks at a copy of the model."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 4)
    explain(model, x)
    assert not left_behind(lambda: explain(model, x))
    assert not hasattr(model[0].weight, "batch_l2") and not x.requires_grad and not hasattr(x, "_packext_lineage")


def test_the_batch_axis_is_that_of_the_extended_model() -> None:
    model = px.extend(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), batch_axis=1)
    found = explain(model, torch.randn(7, 2, 4))
    assert found.n == 2 and by_name(found)["0.weight"].s == 7


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6, sparse=True), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).mean(1))


def test_unsupported_use_stands_in_its_place_and_the_rest_is_seen() -> None:
    found = explain(Sparse(), torch.randint(9, (3, 5)))
    table, weight, _ = found.uses
    assert table.parameter == "table.weight" and "sparse" in table.refused and table.flow == "refused"
    assert (table.index, table.after, table.shape) == (0, (INPUT,), (9, 6))
    assert weight.index == 1 and weight.after == (0,) and weight.n == 3 and not weight.refused
    assert not found.supported and "Refused: embedding in module table" in str(found)


class Late(nn.Module):
    """Two refused uses in the model itself, after a layer and before another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.table, self.other = (nn.Parameter(torch.randn(9, 6)) for _ in range(2))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = self.first(x)
        h = h + F.embedding(ids, self.table, sparse=True) + F.embedding(ids, self.other, sparse=True)
        return self.last(h)


def test_uses_of_the_model_itself_stand_where_they_ran() -> None:
    found = explain(Late(), torch.randn(3, 4), torch.randint(9, (3,)))
    order = list(dict.fromkeys(u.parameter for u in found.uses))
    assert order == ["first.weight", "first.bias", "table", "other", "last.weight", "last.bias"]
    assert [bool(u.refused) for u in found.uses] == [False, False, True, True, False, False]


def test_batch_norm_in_training_mode_is_refused_where_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    uses = by_name(found := explain(model, torch.randn(6, 4)))
    assert "model.eval()" in uses["1.weight"].refused and uses["1.weight"].cost is None
    assert not uses["0.weight"].refused and uses["0.weight"].n == 6
    assert len(found.refusals) == 1
    assert explain(model.eval(), torch.randn(6, 4)).supported


class Coupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h - h.mean(0))


def test_coupled_samples_are_told_and_not_raised() -> None:
    found = explain(Coupled(), torch.randn(6, 4))
    assert not found.supported and "influence each other" in found.refusals[0]
    assert [u.flow for u in found.uses].count("refused") == 2
    assert not found.unused


def test_what_is_no_model_raises() -> None:
    with pytest.raises(TypeError, match="a model with parameters"):
        explain(nn.MSELoss(), torch.randn(3), torch.randn(3))
    with pytest.raises(TypeError, match=r"a model with parameters, got ReLU\(\)"):
        explain(nn.ReLU(), torch.randn(3, 3))


def test_one_quantity_is_no_list() -> None:
    with pytest.raises(TypeError, match="a list, got one Variance"):
        inspect.unwrap(explain)(nn.Linear(3, 2), torch.randn(4, 3), quantities=px.Variance())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(mode: Any) -> None:
    model, x = conv_net(), torch.randn(5, 1, 6, 6)
    expected = explain(model, x)
    with mode():
        assert explain(model, x) == expected


@pytest.mark.parametrize("ran", [False, True])
def test_lazy_modules_have_to_run_first(ran: bool) -> None:
    model, x = nn.Sequential(nn.LazyConv1d(3, 2), nn.LazyBatchNorm1d()).eval(), torch.randn(4, 2, 5)
    if ran:
        model(x)
        assert by_name(explain(model, x))["0.weight"].shape == (3, 2, 2)
        return
    with pytest.raises(
        ValueError, match=r"0\.weight, 0\.bias, 1\.weight, .* have no shape yet: call the model on a batch"
    ):
        explain(model, x)
    assert isinstance(model[0].weight, nn.UninitializedParameter)


def test_a_user_error_is_the_users() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        explain(nn.Linear(3, 2), torch.randn(4, 5))
    assert isinstance(explain(nn.Linear(3, 2), torch.randn(4, 3)), Explanation)


@pytest.mark.usefixtures("double")
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", CASES[::4], ids=lambda c: c.name)
def test_every_model_of_the_table(case: Case) -> None:
    model, inputs, _ = case.build()
    model = px.extend(model, case.batch_axis)
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
    found = explain(model, *args, **(inputs if isinstance(inputs, dict) else {}))
    assert found.supported, str(found)
    names = {u.parameter for u in found.uses} | set(found.unused) | set(found.frozen)
    assert {name for name, _ in model.named_parameters()} <= names
    for u in found.uses:
        assert all(k == INPUT or k < u.index for k in u.after)


def test_text_and_rich_table() -> None:
    from rich.console import Console

    found = explain(Sparse(), torch.randint(9, (3, 5)))
    text = str(found)
    assert text.splitlines()[0].split() == list("module function rule parameter form N S G I O route cost".split())
    assert "factors: norms, variance, dots" in text
    assert "S positions, I features in, O out, G groups; cost: multiply-adds relative to those of `.grad`." in text
    console = Console(width=200, file=io.StringIO())
    console.print(found)
    rich = console.file.getvalue()
    assert "head [Linear]" in rich and "head.weight" in rich and "Refused: embedding in module table" in rich


def test_figure(tmp_path: Any) -> None:
    for model, x in ((Vit(), torch.randn(4, 3, 4, 4)), (Coupled(), torch.randn(6, 4))):
        figure = explain(model, x).figure()
        figure.savefig(tmp_path / "passes.png")
        words = " ".join(t.get_text() for t in figure.axes[0].texts)
        assert "input" in words and "output" in words
    assert "influence each other" in words
    assert (tmp_path / "passes.png").stat().st_size > 10_000


class AModelWithANameThatIsMuchTooLongForTheHeadingOfItsOwnDrawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 8, 3, groups=4))
        self.an_encoder_of_many_layers = nn.ModuleDict({"the_projection_of_queries_in_self_attention$": inner})
        self.norm = nn.BatchNorm2d(8)
        self.a_scale_with_a_name_that_is_too_long_as_well = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.an_encoder_of_many_layers["the_projection_of_queries_in_self_attention$"](x)
        return self.norm(x * self.a_scale_with_a_name_that_is_too_long_as_well).mean((2, 3))


def test_texts_of_a_figure_are_apart() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    model = AModelWithANameThatIsMuchTooLongForTheHeadingOfItsOwnDrawing()
    quantities = [px.BatchGrad(), px.BatchL2Grad(), px.SumGradSquared(), px.Variance(), px.GradDot()]
    figure = explain(model, torch.randn(12, 16, 14, 14), quantities=quantities).figure()
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [t for t in figure.axes[0].texts if t.get_text()]
    boxes = [t.get_window_extent(renderer) for t in texts]
    apart = figure.dpi * 0.05
    for k, (one, box) in enumerate(zip(texts, boxes, strict=True)):
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1, one
        for other, beside in zip(texts[:k], boxes, strict=False):
            level = min(box.y1, beside.y1) - max(box.y0, beside.y0) > 1
            near = min(box.x1, beside.x1) - max(box.x0, beside.x0) > -apart
            assert not (level and near), (one, other)
    words = [t.get_text() for t in texts]
    for cut in (
        "AModelWith.*….*Drawing",
        "an_encoder_of_.*….* · ParametrizedConv2d",
        r"parametri.*….*1 \[8, 4, 3, 3\]",
    ):
        assert any(re.fullmatch(cut, word) for word in words), words
    assert not [word for word in words if re.search("pulled.*pulled", word)], words


def test_figure_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = explain(conv_net(), torch.randn(5, 1, 6, 6))
    for name in ("matplotlib", "matplotlib.axes", "packext._drawing"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"packext\[demo\]"):
        found.figure()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts_are_seen(reentrant: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.part, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.part, self.first(x).tanh(), use_reentrant=reentrant))

    found = explain(Net(), torch.randn(4, 5))
    assert found.supported, found
    assert [by_name(found)[name].after for name in ("part.weight", "last.weight")] == [(0,), (1,)]
