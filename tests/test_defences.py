"""Defences on the gradient that leaves a client."""

from __future__ import annotations

import copy
import math
import os
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import attacks, defences
from packext.attacks import Shared


def shared(*tensors: Tensor) -> Shared:
    return Shared({str(i): t for i, t in enumerate(tensors)}, 1, nn.CrossEntropyLoss())


def only(s: Shared) -> Tensor:
    (g,) = s.gradient.values()
    return g


@pytest.mark.parametrize("kind", [defences.GaussianNoise, defences.LaplacianNoise])
def test_noise_has_its_scale(kind: Any) -> None:
    g = torch.ones(200, 500)
    noisy = kind(0.3, seed=3)
    noise = only(noisy(shared(g))) - g
    want = 0.3 if kind is defences.GaussianNoise else 0.3 * math.sqrt(2)
    assert float(noise.std()) == pytest.approx(want, rel=0.02) and abs(float(noise.mean())) < 0.01
    if kind is defences.LaplacianNoise:
        assert float(noise.abs().mean()) == pytest.approx(0.3, rel=0.02)
    again = only(noisy(shared(g))) - g
    assert not torch.equal(noise, again)
    torch.testing.assert_close(only(kind(0.3, seed=3)(shared(g))) - g, noise)
    state = torch.get_rng_state()
    noisy(shared(g))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "fork"])
def test_clients_that_are_copies_have_noise_of_their_own(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a seed; with one a copy goes on as its original does."""
    g, model, loss = torch.full((200, 100), 0.355), nn.Linear(60, 40), nn.CrossEntropyLoss()
    x, y = torch.randn(4, 60), torch.randint(40, (4,))
    kinds: list[tuple[Any, ...]] = [(defences.GaussianNoise, 1.0), (defences.LaplacianNoise, 1.0)]
    for kind, *level in [*kinds, (defences.Quantisation, "int8", True), (defences.Clipped, 1.0, 4.0)]:
        for seed in (None, 3):
            client = kind(*level, seed=seed)

            def sent(one: Any) -> Tensor:
                if isinstance(one, defences.Clipped):
                    return one(model, loss, x, y).gradient["weight"]
                return only(one(shared(torch.cat([g, 1.27 * torch.ones_like(g)]))))

            sent(client)
            if way == "fork":  # a child has all of its parent's memory, and a number of its own
                other = copy.copy(client)
                other.__dict__.update(copy.deepcopy(client.__dict__))
                assert torch.equal(other._generator.get_state(), client._generator.get_state())
                first = sent(client)
                monkeypatch.setattr(os, "getpid", lambda: -1)
                second = sent(other)
                monkeypatch.undo()
            else:
                other = copy.deepcopy(client) if way == "deepcopy" else pickle.loads(pickle.dumps(client))
                first, second = sent(client), sent(other)
            assert torch.equal(first, second) == (seed is not None), (kind, seed)


def test_noise_is_not_known_to_who_knows_the_defence() -> None:
    """What two clients with one defence send differs by both of their noises, and not by their gradients alone."""
    torch.manual_seed(0)
    model, loss = nn.Linear(60, 40), nn.CrossEntropyLoss()
    x, y = torch.randn(4, 60), torch.randint(40, (4,))
    g = torch.full((200, 100), 0.35)
    makes: list[tuple[Any, float]] = [
        (lambda: only(defences.GaussianNoise(1.0)(shared(g))), math.sqrt(2)),
        (lambda: only(defences.LaplacianNoise(1.0)(shared(g))), 2.0),
        (lambda: only(defences.Quantisation("int8", stochastic=True)(shared(1.27 * torch.rand_like(g)))), 0.0),
        (lambda: defences.Clipped(1.0, 4.0)(model, loss, x, y).gradient["weight"], math.sqrt(2)),
    ]
    for make, std in makes:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            one = make()
            torch.manual_seed(1)
            other = make()
        if std:
            assert float((one - other).std()) == pytest.approx(std, rel=0.2)
        assert (one != other).any()


def test_pruning_keeps_the_largest() -> None:
    g = torch.tensor([[3.0, -1.0, 0.5], [-4.0, 2.0, 0.1]])
    assert only(defences.Pruning(0.5)(shared(g))).tolist() == [[3.0, 0.0, 0.0], [-4.0, 2.0, 0.0]]
    assert only(defences.Pruning(0.0)(shared(g))).tolist() == g.tolist()
    assert not only(defences.Pruning(1.0)(shared(g))).any()
    for share, n, want in ((0.29, 100, 29), (0.57, 100, 57), (0.999, 10, 9)):
        assert int((only(defences.Pruning(share)(shared(torch.arange(1.0, n + 1)))) == 0).sum()) == want
    ties = only(defences.Pruning(0.5)(shared(torch.ones(10))))
    assert int(ties.sum()) == 5


def test_quantisation() -> None:
    g = torch.randn(1000)
    for kind in ("float16", "bfloat16"):
        assert torch.equal(only(defences.Quantisation(kind)(shared(g))), g.to(getattr(torch, kind)).float())
    levels = only(defences.Quantisation("int8")(shared(g))) / (g.abs().max() / 127)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert levels.unique().numel() <= 255 and (levels * (g.abs().max() / 127) - g).abs().max() <= g.abs().max() / 250
    x = torch.full((40000,), 0.3)
    x[0] = 1.27
    rounded = only(defences.Quantisation("int8", stochastic=True)(shared(x + 0.004)))[1:]
    assert rounded.unique().numel() == 2 and float(rounded.mean()) == pytest.approx(0.304, abs=2e-4)
    assert not only(defences.Quantisation("int8")(shared(torch.zeros(3)))).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_defences_compute_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16, 100 and 1/3 are 100, and 256 and 1 are 256."""
    g = torch.linspace(0, 1, 1001).to(dtype)
    rounded = defences.Quantisation("int8", stochastic=True, seed=0)
    found = torch.stack([only(rounded(shared(g))) for _ in range(200)])
    assert found.dtype == dtype and abs(float((found.double() - g.double()).mean()) * 127) < 0.01
    plain = only(defences.Quantisation("int8")(shared(g)))
    assert torch.equal(plain, (only(defences.Quantisation("int8")(shared(g.float())))).to(dtype))
    top = defences.TopK(0.1)
    for _ in range(300):
        sent = only(top(shared(torch.tensor([1000.0, *9 * [1.0]], dtype=dtype))))
    assert sent.dtype == dtype and top.residual["0"].tolist() == [0.0, *9 * [300.0]]


def test_what_a_type_does_not_hold_is_kept_or_refused() -> None:
    """float16 ends at 65504: of 40000 + 40000 the rest waits, and nothing becomes infinite."""
    top, wide = defences.TopK(0.5), torch.tensor([5e4, 4e4]).half()
    sent = torch.stack([only(top(shared(wide))).double() for _ in range(6)])
    assert sent.isfinite().all() and 65504.0 in sent
    torch.testing.assert_close(sent.sum(0) + top.residual["0"].double(), 6 * wide.double(), rtol=0.0, atol=0.0)
    before = top.residual["0"].clone()
    with pytest.raises(px.PackextError, match=r"TopK: the gradient of .* \[2\] is not finite"):
        top(shared(torch.tensor([math.nan, 1.0]).half()))
    assert torch.equal(top.residual["0"], before)
    for kind, value in (("float16", 1e5), ("bfloat16", 3.4e38)):
        with pytest.raises(px.PackextError, match=rf"the gradient of .* \[2\] has entries beyond what {kind} holds"):
            defences.Quantisation(kind)(shared(torch.tensor([value, 1.0], dtype=torch.float32)))


def test_error_feedback_sends_everything_in_the_end() -> None:
    torch.manual_seed(0)
    top, sent, gave = defences.TopK(0.1), torch.zeros(50), torch.zeros(50)
    for _ in range(30):
        g = torch.randn(50)
        part = only(top(shared(g)))
        assert int((part != 0).sum()) == 5
        sent, gave = sent + part, gave + g
    torch.testing.assert_close(sent + top.residual["0"], gave)


@pytest.mark.parametrize(
    ("share", "n", "want"), [(0.9, 10, 9), (0.7, 10, 7), (0.07, 100, 7), (0.01, 10, 1), (0.0, 9, 0)]
)
def test_as_many_entries_are_sent_as_the_share_says(share: float, n: int, want: int) -> None:
    part = only(defences.TopK(share)(shared(torch.arange(1.0, n + 1))))
    assert part.nonzero()[:, 0].tolist() == list(range(n - want, n))


def test_composition_is_in_order() -> None:
    g = torch.tensor([1.0, 2.0, 3.0, 4.0])
    both = defences.Compose(defences.Pruning(0.5), defences.GaussianNoise(1.0))
    assert (only(both(shared(g))) != 0).all() and repr(both) == "Pruning(share=0.5) + GaussianNoise(std=1.0, seed=None)"
    more = defences.Compose(defences.Compose(defences.Clipped(1.0), both), both)
    assert repr(more) == f"{defences.Clipped(1.0)} + {both} + {both}" and defences.replaces_share(more)


@pytest.mark.parametrize("first", [defences.Clipped(0.1), defences.Withholding(2), defences.Soteria(0.5)])
def test_what_is_shared_in_place_of_a_gradient_can_be_defended_further(first: Any) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(5, 6), torch.randint(3, (5,))
    state = {"0.bias": torch.ones(4)}
    both = defences.Compose(first, defences.Pruning(0.5), defences.Quantisation("int8"))
    want = defences.Quantisation("int8")(defences.Pruning(0.5)(first(model, nn.CrossEntropyLoss(), x, y, state)))
    got = both(model, nn.CrossEntropyLoss(), x, y, state=state)
    assert all(torch.equal(g, want.gradient[name]) for name, g in got.gradient.items()) and len(got.gradient) == 4


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_clipped_gradients(reduction: str) -> None:
    """Against one sample at a time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    x, y, loss = torch.randn(6, 1, 4, 4).double(), torch.randint(3, (6,)), nn.CrossEntropyLoss(reduction=reduction)
    model[3].bias.requires_grad_(False)
    total = {k: torch.zeros_like(p) for k, p in model.named_parameters() if p.requires_grad}
    norms = []
    for i in range(6):
        one = attacks.share(model, nn.CrossEntropyLoss(), x[i : i + 1], y[i : i + 1]).gradient
        norms.append(float(sum(g.square().sum() for g in one.values())) ** 0.5)
        for k in total:
            total[k] += one[k] * min(1.0, 2.0 / norms[-1])
    assert min(norms) < 2.0 < max(norms)
    state = copy.deepcopy(model.state_dict())
    found = defences.Clipped(2.0)(model, loss, x, y)
    assert found.gradient.keys() == total.keys() and not px.is_extended(model) and not px.is_extended(loss)
    for k, g in total.items():
        torch.testing.assert_close(found.gradient[k], g / 6 if reduction == "mean" else g)
    noisy = defences.Clipped(2.0, 1.0)
    draws = torch.stack([noisy(model, loss, x, y).gradient["0.weight"] - found.gradient["0.weight"] for _ in range(60)])
    assert float(draws.std()) == pytest.approx(2.0 / (6 if reduction == "mean" else 1), rel=0.1)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_levels_that_mean_nothing_are_refused() -> None:
    calls = [
        lambda: defences.GaussianNoise(-1.0),
        lambda: defences.LaplacianNoise(float("nan")),
        lambda: defences.Pruning(1.5),
        lambda: defences.TopK(-0.1),
        lambda: defences.Quantisation("int4"),
        lambda: defences.Quantisation("float16", stochastic=True),
        lambda: defences.Clipped(0.0),
        lambda: defences.Clipped(math.inf),
        lambda: defences.Clipped(1.0, -1.0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="must"):
            call()
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(px.CoupledSamplesError):
        defences.Clipped(1.0)(model, nn.CrossEntropyLoss(), torch.randn(5, 4), torch.randint(2, (5,)))


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_what_nothing_clips_is_what_is_shared(reduction: str) -> None:
    """Of a loss whose mean over samples has a name of its own."""
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(6, 4), nn.LogSoftmax(1)).double(), nn.KLDivLoss(reduction=reduction)
    x, y = torch.randn(5, 6).double(), torch.rand(5, 4).double().softmax(1)
    want, found = attacks.share(model, loss, x, y), defences.Clipped(1e6)(model, loss, x, y)
    assert want.summed == (5 if reduction == "batchmean" else 1)
    for name, g in want.gradient.items():
        torch.testing.assert_close(found.gradient[name], g)


def test_clipped_bounds_what_a_sample_changes() -> None:
    """Where a mean would have it change what others add, it is refused."""
    torch.manual_seed(0)
    weight, model = torch.tensor([100.0, 1.0, 1.0]), nn.Linear(4, 3)
    x, y = torch.randn(8, 4), torch.tensor([1, 2, 1, 2, 1, 2, 1, 0])

    def flat(loss: nn.Module, rest: Any, y: Tensor = y) -> Tensor:
        return torch.cat([g.flatten() for g in defences.Clipped(0.5)(model, loss, x[rest], y[rest]).gradient.values()])

    for loss, targets in ((nn.CrossEntropyLoss(weight), y), (nn.CrossEntropyLoss(), torch.where(y == 0, -100, y))):
        with pytest.raises(px.CoupledSamplesError, match='a sample changes what others add. Take reduction="sum"'):
            flat(loss, slice(None), targets)
    loss = nn.CrossEntropyLoss(weight, reduction="sum")
    changes = [(flat(loss, slice(None)) - flat(loss, [i for i in range(8) if i != k])).norm() for k in range(8)]
    assert float(max(changes)) == pytest.approx(0.5, rel=1e-5)


def test_a_state_with_names_that_the_model_has_not_is_refused() -> None:
    x, y, loss = torch.randn(5, 4), torch.randint(2, (5,)), nn.CrossEntropyLoss()
    model, state = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), {"1.bais": torch.zeros(2)}
    for call in (
        lambda: defences.Clipped(1.0)(model, loss, x, y, state),
        lambda: defences.Withholding(1).kept(model, loss, x, y, state),
        lambda: defences.sensitivity(model, x, state=state),
        lambda: defences.Soteria(0.5)(model, loss, x, y, state),
    ):
        with pytest.raises((px.PackextError, RuntimeError), match="1.bais"):
            call()


def test_a_layer_that_is_not_run_tells_nothing_of_the_model() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.other = nn.Linear(6, 3), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    torch.manual_seed(0)
    model, loss, x, y = Unused(), nn.CrossEntropyLoss(), torch.randn(40, 6), torch.randint(3, (40,))
    with pytest.raises(px.PackextError, match=r"Unused does not run 'other' \(Linear \[2, 6\]\): pass head="):
        defences.check_received(model, loss, x, y)
    assert not defences.check_received(model, loss, x, y, "head").zero_scales


def test_inputs_that_hardly_vary_accuse_no_server() -> None:
    """As temperatures in kelvin: the features of an honest model are then as good as fixed."""
    for seed in range(5):
        torch.manual_seed(seed)
        model, y = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4)), torch.arange(64) % 4
        for std in (1e-2, 0.05, 0.3, 0.9):
            with pytest.raises(px.PackextError, match=r"Inputs \[64, 24\] vary by .* Standardise the inputs"):
                defences.check_received(model, nn.CrossEntropyLoss(), 10 + std * torch.randn(64, 24), y)
        honest = defences.check_received(model, nn.CrossEntropyLoss(), 10 + 1.2 * torch.randn(64, 24), y)
        assert not honest.suspicious


@pytest.mark.parametrize("classes", [1, 2])
def test_two_classes_are_no_trace_of_a_fishing_model(classes: int) -> None:
    """Their gradient at the last layer has rank one whatever the model; features that do not vary still tell."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, classes))
    loss = nn.CrossEntropyLoss() if classes == 2 else nn.BCEWithLogitsLoss()
    x, y = torch.randn(40, 6), torch.randint(2, (40,))
    y = y if classes == 2 else y[:, None].float()
    honest = defences.check_received(model, loss, x, y)
    assert honest.rank_ratio is None and not honest.suspicious
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.fill_(3.0)
    assert "hardly varies" in defences.check_received(model, loss, x, y).reasons[0]


def test_a_loss_of_zero_is_no_trace_of_a_fishing_model() -> None:
    """A hinge loss of samples that are learnt has no gradient, whose singular values say nothing of the model."""
    model, x, y = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), torch.eye(3).repeat(4, 1), torch.arange(3)
    for layer in (model[0], model[2]):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    learnt = defences.check_received(model, nn.MultiMarginLoss(), 9 * x, y.repeat(4))
    assert learnt.rank_ratio is None and len(learnt.without_gradient) == 4 and not learnt.suspicious


class Adapted(nn.Module):
    """LoRA as it begins: B is zero, so that A has no gradient."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a, self.b = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.b(self.a(x))


class Gated(nn.Module):
    """ReZero as it begins: a gate of zero, behind which nothing has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.gate = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh()), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.block(x)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_branch_that_begins_at_zero_is_no_trace_of_a_fishing_model(rank: int) -> None:
    torch.manual_seed(0)
    lora = nn.Sequential(Adapted(nn.Linear(6, 8), 2), nn.LayerNorm(8), nn.ReLU(), Adapted(nn.Linear(8, 3), rank))
    rezero = nn.Sequential(Gated(), Gated(), nn.Linear(6, 3))
    x, y = torch.randn(40, 6), torch.randint(3, (40,))
    for model in (lora, rezero):
        found = defences.check_received(model, nn.CrossEntropyLoss(), x, y)
        without = [n for n, g in attacks.share(model, nn.CrossEntropyLoss(), x, y).gradient.items() if not g.any()]
        assert not found.suspicious and list(found.without_gradient) == without != []
    with torch.no_grad():
        lora[1].weight.zero_()
        lora[1].bias.fill_(3.0)
    assert defences.check_received(lora, nn.CrossEntropyLoss(), x, y).suspicious


def test_soteria_scores_what_dropout_leaves_in_the_message() -> None:
    """The features that are pruned are some of those that have a gradient, as the masks are the same ones."""
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 3)).train()
    x, y = torch.randn(1, 6), torch.tensor([1])
    state = torch.get_rng_state()
    columns = attacks.share(model, nn.CrossEntropyLoss(), x, y).gradient["3.weight"].any(0)
    torch.set_rng_state(state)
    left = defences.Soteria(0.2)(model, nn.CrossEntropyLoss(), x, y).gradient["3.weight"].any(0)
    assert int(left.sum()) == int(columns.sum()) - 4 and bool((columns | ~left).all())
