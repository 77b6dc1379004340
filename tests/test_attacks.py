"""What one gradient gives away: label counts, closed forms, inversion."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import packext as px
from packext import attacks, defences

pytestmark = pytest.mark.usefixtures("double")


@cache
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x).double().view(-1, 1, 8, 8) / 16, torch.tensor(y)


def some(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, y = digits()
    index = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]
    return x[index], y[index]


def relu_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip


def sigmoid_net() -> nn.Module:
    """The network of Deep Leakage from Gradients, for 16 x 16 digits."""
    layers: list[nn.Module] = []
    for c, stride in ((1, 2), (12, 2), (12, 1)):
        layers += [nn.Conv2d(c, 12, 5, stride, 2), nn.Sigmoid()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 10))
    for p in net.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    return net


# -- what is shared -----------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_what_a_client_shares(train: bool) -> None:
    """Is what backward() gives, and leaves model, gradients and buffers alone."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)).train(train)
    model[1].bias.requires_grad_(False)
    (x, y), loss = some(6), nn.CrossEntropyLoss()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    shared = attacks.share(model, loss, x, y)
    assert all(p.grad is None for p in model.parameters())
    assert all((v == before[k]).all() for k, v in model.state_dict().items())
    loss(model(x), y).backward()
    own = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == shared.gradient.keys() and shared.n == 6
    for k, g in own.items():
        torch.testing.assert_close(shared.gradient[k], g)
    other = attacks.share(model, loss, x, y, {"4.bias": torch.arange(10.0)})
    assert not torch.allclose(other.gradient["4.weight"], shared.gradient["4.weight"])
    with pytest.raises(px.PackextError, match=r"CrossEntropyLoss gave a tensor of shape \[6\]"):
        attacks.share(model, nn.CrossEntropyLoss(reduction="none"), x, y)
    with pytest.raises(
        px.PackextError, match="Sequential has no parameter or buffer '4.bais'; it has 1.weight, 1.bias"
    ):
        attacks.share(model, loss, x, y, {"4.bais": torch.arange(10.0)})


def test_a_received_state_of_tied_parameters() -> None:
    model, other = (nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)) for _ in range(2))
    for m in (model, other):
        m[1].weight = m[0].weight
    x, loss = torch.arange(7), nn.CrossEntropyLoss()
    found = attacks.share(model, loss, x, x, other.state_dict()).gradient
    assert list(found) == ["0.weight"]
    torch.testing.assert_close(found["0.weight"], attacks.share(other, loss, x, x).gradient["0.weight"])


# -- label counts -------------------------------------------------------------------------------------


def mean_accuracy(rule: attacks.LabelRule, n: int, seeds: int = 3, change: Callable[[Any], Any] = lambda s: s) -> float:
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model, (x, y) = relu_net(), some(n, seed)
        shared = change(attacks.share(model, nn.CrossEntropyLoss(), x, y))
        counts = rule(model, shared)
        assert counts.dtype == torch.int64 and int(counts.sum()) == n
        found.append(attacks.count_accuracy(counts, y))
    return sum(found) / seeds


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_identity_behind_all_rules(reduction: str, trained: bool) -> None:
    torch.manual_seed(0)
    model, (x, y), loss = relu_net(), some(64), nn.CrossEntropyLoss(reduction=reduction)
    if trained:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    gradient = attacks.Head.of(model).bias_gradient(attacks.share(model, loss, x, y))
    counts = attacks.identity(model(x).softmax(1).detach(), gradient)
    torch.testing.assert_close(counts, torch.bincount(y, minlength=10).double(), rtol=0, atol=1e-10)


RULES = [attacks.IDLG(), attacks.Yin(), attacks.LLG(), attacks.LLGStar((1, 8, 8), runs=1), attacks.ILRG()]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_the_label_of_one_sample(rule: attacks.LabelRule) -> None:
    assert mean_accuracy(rule, 1, 6) == 1.0


def test_a_label_without_a_bias() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        model, (x, y) = relu_net(), some(1, seed)
        model[-1] = nn.Linear(512, 10, bias=False)
        counts = attacks.IDLG()(model, attacks.share(model, nn.CrossEntropyLoss(), x, y))
        assert counts.argmax() == y and counts.sum() == 1


@pytest.mark.parametrize("classes", [3, 10])
def test_a_label_without_a_bias_of_features_with_signs(classes: int) -> None:
    """As those of text and of tanh are; and of a model that is so sure of another class that all others are at 0."""
    for seed in range(40):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, classes, bias=False))
        x, y = torch.randn(1, 6), torch.randint(classes, (1,))
        counts = attacks.IDLG()(model, attacks.share(model, nn.CrossEntropyLoss(), x, y))
        assert counts.argmax() == y and counts.sum() == 1
        sure = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes, bias=False))
        sure[2].weight.data[0] += 100.0
        counts = attacks.IDLG()(sure, attacks.share(sure, nn.CrossEntropyLoss(), x, torch.tensor([1])))
        assert counts.argmax() == 1


def test_counts_of_an_untrained_model() -> None:
    """Better than guessing, by which rule is known from the papers."""
    guess = sum(attacks.guessed(some(32, seed)[1], 10) for seed in range(3)) / 3
    star, ilrg, llg = (
        mean_accuracy(rule, 32) for rule in (attacks.LLGStar((1, 8, 8), 1), attacks.ILRG(), attacks.LLG())
    )
    assert star > 0.97 and ilrg > 0.97 and 0.4 < llg < star and guess < 0.85


def test_noise_takes_labels_away_and_bfloat16_does_not() -> None:
    assert mean_accuracy(attacks.ILRG(), 32, change=defences.Quantisation("bfloat16")) > 0.9
    assert mean_accuracy(attacks.ILRG(), 32, change=defences.GaussianNoise(0.3)) < 0.8


def test_counts_that_are_guessed_and_rounded() -> None:
    assert attacks.guessed(torch.tensor([0, 0, 0, 0]), 4) == 0.25
    assert attacks.guessed(torch.tensor([0, 0, 0, 1]), 4, torch.tensor([70, 30, 0, 0])) == 1.0
    assert attacks.count_accuracy(torch.tensor([3, 0, 1]), torch.tensor([0, 0, 1, 1])) == 0.5
    assert attacks.labels.rounded(torch.tensor([1.6, -0.4, 2.5]), 4).tolist() == [2, 0, 2]
    assert attacks.labels.rounded(torch.zeros(3), 2).sum() == 2


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.ones(10)),
        nn.CrossEntropyLoss(ignore_index=0),
        nn.MultiMarginLoss(),
    ],
)
def test_rules_are_of_plain_cross_entropy(loss: nn.Module) -> None:
    model, (x, y) = relu_net(), some(4)
    loss = loss.double()
    shared = attacks.share(model, loss, x, y)
    with pytest.raises(px.PackextError, match="Labels are read off gradients of nn.CrossEntropyLoss"):
        attacks.ILRG()(model, shared)


def test_rules_refuse_what_they_cannot_read() -> None:
    model, (x, y), loss = relu_net(), some(12), nn.CrossEntropyLoss()
    shared = attacks.share(model, loss, x, y)
    with pytest.raises(px.PackextError, match="the gradient is of 12"):
        attacks.IDLG()(model, shared)
    with pytest.raises(px.PackextError, match="12 samples of 10 classes"):
        attacks.Yin()(model, shared)
    with pytest.raises(px.PackextError, match="'0' is a Conv2d"):
        attacks.LLG()(model, shared, head="0")
    with pytest.raises(px.PackextError, match="'7' is no module of Sequential; the last layer must be"):
        attacks.LLG()(model, shared, head="7")
    with pytest.raises(px.PackextError, match="'5.weight' is not in what was shared"):
        attacks.LLG()(model, attacks.Shared({"0.weight": torch.zeros(1)}, 12, loss))
    bad = {k: g * math.nan for k, g in shared.gradient.items()}
    with pytest.raises(px.PackextError, match="entries not finite"):
        attacks.ILRG()(model, attacks.Shared(bad, 12, loss))
    with pytest.raises(px.PackextError, match="has no nn.Linear"):
        attacks.LLG()(nn.Conv2d(1, 1, 1), shared)


def test_a_gradient_of_zero_tells_no_label() -> None:
    """A model that is sure of the one class that the sample has: probabilities are 0 and 1 to the last bit."""
    model, x, y = nn.Linear(5, 4), torch.rand(2, 5), torch.tensor([2, 2])
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, 0.0, 1e4, 0.0]))
    plain = nn.Linear(5, 4, bias=False)
    with torch.no_grad():
        plain.weight.zero_()[2] = 1e6
    for net, n, tried in ((model, 1, RULES), (model, 2, RULES[1:]), (plain, 1, RULES[:-1])):
        shared = attacks.share(net, nn.CrossEntropyLoss(), x[:n], y[:n])
        assert not any(g.any() for g in shared.gradient.values())
        for rule in tried:
            with pytest.raises(px.PackextError, match="no negative entry.* it tells no labels"):
                rule(net, shared)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rules_are_of_one_label_for_each_sample(reduction: str) -> None:
    loss = nn.CrossEntropyLoss(reduction=reduction)
    tokens = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9), Swapped())
    x = torch.randint(9, (3, 5))
    ignored = torch.tensor([0, 1, -100, -100])
    mixed = torch.eye(9)[:4] * torch.tensor([[1.0], [1.0], [0.5], [0.9]])
    mixed[2:, 8] = 1 - mixed[2:].sum(1)
    for model, batch, y, n, count in (
        (tokens, x, x, 3, 15),
        (nn.Linear(6, 9), torch.randn(4, 6), ignored, 4, 2),
        (tokens, x, F.one_hot(x, 9).double().mT, 3, 15),
        (nn.Linear(6, 9), torch.randn(4, 6), mixed, 4, 2),
    ):
        local = attacks.LocalSteps(1, 0.1)
        made = [attacks.share(model, loss, batch, y), attacks.share_update(model, loss, batch, y, local)]
        if y is not ignored:  # of a mean over some of the targets, samples have no gradients of their own
            made.append(defences.Clipped(1.0)(model, loss, batch, y))
        for shared in made:
            for sent in (shared, defences.Pruning(0.1)(shared)):
                with pytest.raises(px.PackextError, match=f"The loss of these {n} samples counts {count} labels"):
                    attacks.ILRG()(model, sent)
    counts = attacks.ILRG()(nn.Linear(6, 9), attacks.share(nn.Linear(6, 9), loss, torch.randn(4, 6), ignored.abs() % 9))
    assert int(counts.sum()) == 4


class Swapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}])
def test_soft_labels_of_a_loss_with_class_weights(options: dict[str, Any]) -> None:
    """The label that is found is the client's: a mean over weights cancels that of a single sample's class."""
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 1.0, 9.0, 9.0]).double(), **options)
    for label in (0, 3):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 24), nn.Sigmoid(), nn.Linear(24, 5)).double()
        x, y = torch.rand(1, 12).double(), torch.tensor([label])
        found = attacks.DeepLeakage(60, 2)(model, attacks.share(model, loss, x, y), (12,), classes=5)
        assert found.matched and found.labels.tolist() == [label]
        torch.testing.assert_close(found.inputs, x, rtol=0, atol=1e-3)


# -- closed forms -------------------------------------------------------------------------------------


def test_the_input_of_a_fully_connected_layer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    (x, y), loss = some(1), nn.CrossEntropyLoss()
    shared = attacks.share(model, loss, x, y)
    torch.testing.assert_close(attacks.fully_connected_input(shared, "1"), x.flatten(), rtol=0, atol=1e-12)
    short = attacks.share(copy.deepcopy(model).bfloat16(), loss, x.bfloat16(), y)  # rank one but for rounding
    torch.testing.assert_close(attacks.fully_connected_input(short, "1"), x.flatten(), rtol=0.02, atol=0.01)
    alike = (10 + 0.05 * torch.rand(8, 1, 8, 8)).double(), torch.arange(8)
    with pytest.raises(px.PackextError, match="is not of one input .* 8 sample"):
        attacks.fully_connected_input(attacks.share(model, loss, *alike), "1")
    x, y = some(2)
    with pytest.raises(px.PackextError, match=r"'1' \[16, 64\] is not of one input .* 2 sample"):
        attacks.fully_connected_input(attacks.share(model, loss, x, y), "1")
    (x, y), layer = some(1), nn.Linear(64, 10)  # a model that is a layer itself
    found = attacks.fully_connected_input(attacks.share(layer, loss, x.flatten(1), y), "")
    torch.testing.assert_close(found, x.flatten(), rtol=0, atol=1e-12)
    empty = attacks.Shared({"1.weight": torch.zeros(16, 64), "1.bias": torch.zeros(16)}, 1, loss)
    with pytest.raises(px.PackextError, match="is zero"):
        attacks.fully_connected_input(empty, "1")


class Text(nn.Module):
    """A small encoder with embeddings, attention, and a class at the end."""

    def __init__(self, tokens: int = 50, d: int = 32, length: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, d)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.position = nn.Parameter(torch.randn(length, d) / 10)
        self.query, self.key, self.value = (nn.Linear(d, d) for _ in range(3))
        self.up, self.down, self.head = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.Linear(d, 4)

    def body(self, e: Tensor) -> Tensor:
        e = e + self.position
        weight = (self.query(e) @ self.key(e).mT / e.shape[-1] ** 0.5).softmax(-1)
        e = e + weight @ self.value(e)
        return self.head((e + self.down(F.gelu(self.up(e)))).mean(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.embedding(x))


def test_tokens_and_the_span_of_inputs() -> None:
    model, x, y = Text(), torch.tensor([[3, 7, 9, 11, 49, 0], [1, 2, 4, 5, 6, 8]]), torch.tensor([1, 2])
    shared = attacks.share(model, nn.CrossEntropyLoss(), x, y)
    assert attacks.tokens_present(shared, "embedding.weight").tolist() == sorted(set(x.flatten().tolist()))
    # 12 different inputs of 32 features: tokens at their position, and none else.
    assert attacks.rank(shared, "value.weight", 1e-10) == 12
    for position in range(6):
        candidates = model.embedding.weight + model.position[position]
        outside = attacks.spanned(shared, "value.weight", candidates.detach(), 1e-10)
        assert (outside < 1e-6).nonzero().flatten().tolist() == sorted(set(x[:, position].tolist()))
    # All positions at once, and the order of one sample's tokens.
    candidates = (model.embedding.weight + model.position[:, None]).detach()
    one = attacks.spanned(attacks.share(model, nn.CrossEntropyLoss(), x[:1], y[:1]), "value.weight", candidates, 1e-10)
    assert one.shape == (6, 50) and one.argmin(1).tolist() == x[0].tolist() and int((one < 1e-6).sum()) == 6
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    many = attacks.share(wide, nn.CrossEntropyLoss(), *some(40))
    with pytest.raises(px.PackextError, match=r"'1.weight' \[16, 64\] has rank 16: there were as many inputs"):
        attacks.spanned(many, "1.weight", torch.randn(2, 64))
    with pytest.raises(px.PackextError, match="All 10 rows"):
        attacks.tokens_present(attacks.Shared({"w": torch.ones(10, 2)}, 1, nn.MSELoss()), "w")
    with pytest.raises(px.PackextError, match=r"'w' has shape \[10\]; it must be a matrix"):
        attacks.tokens_present(attacks.Shared({"w": torch.ones(10)}, 1, nn.MSELoss()), "w")


class HeadFirst(nn.Module):
    """Its last layer was made first, as in many models with a backbone that is passed in."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(6, 4), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.body(x)))


def test_a_layer_that_makes_no_logits_tells_no_labels() -> None:
    torch.manual_seed(0)
    model, x, y, loss = HeadFirst(), torch.rand(5, 5), torch.tensor([0, 1, 1, 3, 3]), nn.CrossEntropyLoss()
    shared = attacks.share(model, loss, x, y)
    for rule in (attacks.LLG(), attacks.ILRG(), attacks.LLGStar((5,), 2)):
        with pytest.raises(px.PackextError, match=r"'body' \[6, 5\] is the last .* of head does. .*: head='head'"):
            rule(model, shared)
        assert len(rule(model, shared, "head")) == 4
    right = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Sigmoid(), nn.Linear(6, 4))
    shared = attacks.share(right, loss, x, y)  # of '0', in front of the LayerNorm, it sums to 0 as well
    for defence in (defences.GaussianNoise(0.01), defences.Pruning(0.5), defences.Quantisation("bfloat16")):
        assert attacks.ILRG()(right, defence(shared)).sum() == 5
    assert attacks.count_accuracy(attacks.ILRG()(right, shared), y) == 1


# -- inversion ----------------------------------------------------------------------------------------


def upscaled(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, y = some(n, seed)
    return F.interpolate(x, 16), y


@pytest.mark.parametrize("known", [False, True])
def test_deep_leakage_recovers_a_digit(known: bool) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        model, (x, y) = sigmoid_net(), upscaled(1, seed)
        shared = attacks.share(model, nn.CrossEntropyLoss(), x, y)
        given: dict[str, Any] = {"labels": y} if known else {"classes": 10}
        found = attacks.DeepLeakage(iterations=60, restarts=3)(model, shared, (1, 16, 16), **given)
        assert found.matched and found.labels.tolist() == y.tolist()
        assert (found.inputs - x).square().mean() < 1e-4 and found.objective[-1] < 1e-6 < found.objective[0]


def test_deep_leakage_of_a_batch() -> None:
    model, (x, y) = sigmoid_net(), upscaled(2, 1)
    shared = attacks.share(model, nn.CrossEntropyLoss(), x, y)
    steps: list[int] = []
    attack = attacks.DeepLeakage(iterations=40)
    found = attack(model, shared, (1, 16, 16), classes=10, progress=lambda i, value: steps.append(i))
    order = attacks.in_order(found.inputs, x)
    assert found.labels[order].tolist() == y.tolist()
    assert attacks.psnr(found.inputs[order], x).min() > 30 and steps == [*range(len(found.objective))]
    turns = attacks.DeepLeakage(iterations=8, in_turn=True)(model, shared, (1, 16, 16), labels=y)
    assert turns.objective[-1] < 0.3 * turns.objective[0] and not turns.matched


@pytest.mark.parametrize("norm", [0.05, 1e3])
def test_deep_leakage_knows_of_clipping(norm: float) -> None:
    """Of one sample what clipping leaves is the direction, by which the search without `clip` finds nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    x, y, loss = torch.rand(1, 12).double(), torch.tensor([3]), nn.CrossEntropyLoss()
    shared = defences.Clipped(norm)(model, loss, x, y)
    found = attacks.DeepLeakage(iterations=40, clip=norm)(model, shared, (12,), labels=y)
    assert found.matched and (found.inputs - x).square().mean() < 1e-8
    assert attacks.DeepLeakage(iterations=40)(model, shared, (12,), labels=y).matched == (norm > 1)
    with pytest.raises(ValueError, match="of the gradient of one sample; of 2, each was clipped"):
        attacks.DeepLeakage(clip=norm)(model, attacks.share(model, loss, x.expand(2, -1), y.expand(2)), (12,), labels=y)


def test_deep_leakage_with_targets_that_are_no_classes() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(1, 6), torch.randn(1, 3)
    found = attacks.DeepLeakage(40)(model, attacks.share(model, nn.MSELoss(), x, y), (6,), labels=y)
    assert found.matched and torch.equal(found.labels, y)
    torch.testing.assert_close(found.inputs, x, rtol=0, atol=1e-6)


class Attends(nn.Module):
    """A transformer's layer, in which torch takes a kernel without a second derivative where it can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


@pytest.mark.parametrize("train", [True, False])
def test_models_with_attention_can_be_searched(train: bool) -> None:
    torch.manual_seed(0)
    model, loss_fn, x, y = Attends().train(train), nn.CrossEntropyLoss(), torch.randn(1, 4, 8), torch.tensor([1])
    shared = attacks.share(model, loss_fn, x, y)
    found = attacks.DeepLeakage(iterations=60)(model, shared, (4, 8), labels=y)
    assert found.objective[-1] < 0.5 * found.objective[0]


def test_the_last_objective_is_that_of_the_inputs() -> None:
    torch.manual_seed(0)
    model, x, y, loss = nn.Linear(6, 3), torch.rand(2, 6), torch.tensor([0, 2]), nn.CrossEntropyLoss()
    shared = attacks.share(model, loss, x, y)
    for search in (attacks.InvertingGradients(5, tv=0.0), attacks.DeepLeakage(2)):
        found = search(model, shared, (6,), labels=y)
        one, other = (
            torch.cat([g.flatten() for g in s.gradient.values()])
            for s in (attacks.share(model, loss, found.inputs, y), shared)
        )
        deep = isinstance(search, attacks.DeepLeakage)
        want = ((one - other).norm() / other.norm()) ** 2 if deep else 1 - torch.cosine_similarity(one, other, 0)
        assert found.objective[-1] == pytest.approx(float(want), rel=1e-6)


def test_a_search_that_gets_worse_has_its_best_inputs() -> None:
    """Without a line search, of a gradient with noise: the second iteration is worse than the first."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 3)), torch.rand(2, 6), torch.tensor([0, 2])
    shared, seen = defences.GaussianNoise(1.0, seed=7)(attacks.share(model, nn.CrossEntropyLoss(), x, y)), []
    search = attacks.DeepLeakage(iterations=4, line_search=False)
    found = search(model, shared, (6,), labels=y, progress=lambda _, value: seen.append(value))
    assert found.objective[-1] == min(seen)


def test_a_failed_search_says_so() -> None:
    model, (x, y) = sigmoid_net(), upscaled(1, 3)
    shared = attacks.share(model, nn.CrossEntropyLoss(), x, y)
    found = attacks.DeepLeakage(iterations=2, restarts=2)(model, shared, (1, 16, 16), labels=y)
    assert not found.matched and found.restarts == 2
    noisy = attacks.DeepLeakage(iterations=10)(model, defences.GaussianNoise(0.1)(shared), (1, 16, 16), labels=y)
    assert not noisy.matched and attacks.psnr(noisy.inputs, x) < 15


def test_a_search_that_blows_up_is_the_last_choice() -> None:
    def one(objective: float) -> attacks.Reconstruction:
        return attacks.Reconstruction(torch.zeros(1, 2), torch.zeros(1).long(), (1.0, objective), False, 1)

    for order in ([math.nan, 0.3, 0.2], [0.2, math.nan, 0.3], [math.inf, math.nan, 0.2]):
        best = attacks.inversion._best([one(value) for value in order])
        assert best.objective == (1.0, 0.2) and best.restarts == 3


def test_clipping_does_not_stop_the_cosine() -> None:
    torch.manual_seed(0)
    model, (x, y) = sigmoid_net(), upscaled(1, 0)
    shared = defences.Clipped(0.1)(model, nn.CrossEntropyLoss(), x, y)
    assert sum(g.square().sum() for g in shared.gradient.values()).sqrt() == pytest.approx(0.1)  # type: ignore[union-attr]
    found = attacks.InvertingGradients(300)(model, shared, (1, 16, 16), y)
    assert attacks.psnr(found.inputs, x) > 30 and found.matched
    assert not attacks.DeepLeakage(iterations=20)(model, shared, (1, 16, 16), labels=y).matched


class Scaled(nn.Module):
    """Cross-entropy times a factor."""

    reduction = "mean"

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, output: Tensor, y: Tensor) -> Tensor:
        return self.factor * F.cross_entropy(output, y)


def test_the_cosine_is_blind_to_any_factor() -> None:
    torch.manual_seed(0)
    model, (x, y) = sigmoid_net().float(), upscaled(1, 0)
    x = x.float()
    search = attacks.InvertingGradients(2, tv=0.0)
    whole = search(model, attacks.share(model, Scaled(1.0), x, y), (1, 16, 16), y)
    inverse = attacks.DeepLeakage(2)
    near = inverse(model, attacks.share(model, Scaled(1.0), x, y), (1, 16, 16), labels=y)
    for factor in (1e-30, 1e-24, 1e-20, 1e-12, 1e11):  # in float32, which holds them, and of some not their squares
        shared = attacks.share(model, Scaled(factor), x, y)
        found = search(model, shared, (1, 16, 16), y)
        assert found.objective == pytest.approx(whole.objective, rel=1e-3) and not found.matched
        found = inverse(model, shared, (1, 16, 16), labels=y)
        assert found.objective[0] == pytest.approx(near.objective[0], rel=1e-3) and not found.matched


@pytest.mark.parametrize("defence", [defences.Pruning(0.7), defences.Soteria(0.5)])
def test_who_knows_what_was_not_sent_finds_the_digit(defence: Any) -> None:
    torch.manual_seed(0)
    model, (x, y), loss = sigmoid_net(), upscaled(1, 0), nn.CrossEntropyLoss()
    whole = attacks.share(model, loss, x, y)
    shared = defence(whole) if isinstance(defence, defences.Pruning) else defence(model, loss, x, y)
    search = attacks.DeepLeakage(iterations=12)
    blind = search(model, shared, (1, 16, 16), labels=y)
    found = search(model, shared, (1, 16, 16), labels=y, mask=attacks.sent(shared))
    assert attacks.psnr(blind.inputs, x) < 20 and not blind.matched
    assert attacks.psnr(found.inputs, x) > 30 and found.matched
    cosine = attacks.InvertingGradients(1)
    first, other = (cosine(model, s, (1, 16, 16), y, mask=attacks.sent(shared)).objective[0] for s in (shared, whole))
    assert first == other  # what is masked plays no part on either side
    with pytest.raises(px.PackextError, match=r"fit no parameter: \{'0.weight': \[3\], 'x': \[2\]\}"):
        search(model, shared, (1, 16, 16), labels=y, mask={"0.weight": torch.ones(3), "x": torch.ones(2)})


@pytest.mark.parametrize(
    ("n", "batch", "want"),
    [(5, 2, ["01", "23", "4", "01"]), (5, 8, ["01234"] * 3), (4, 2, ["01", "23", "01"]), (3, None, ["012"] * 2)],
)
def test_local_steps_begin_again_after_the_last_sample(n: int, batch: int | None, want: list[str]) -> None:
    local = attacks.LocalSteps(len(want), 0.1, batch)
    assert ["01234"[local.part(step, n)] for step in range(len(want))] == want


def test_local_steps_are_unrolled() -> None:
    model, (x, y), loss = sigmoid_net(), upscaled(2, 2), nn.CrossEntropyLoss()
    local = attacks.LocalSteps(steps=3, lr=0.1, batch=1)
    shared = attacks.share_update(model, loss, x, y, local)
    twin = sigmoid_net()
    twin.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    for i in (0, 1, 0):
        optimizer.zero_grad()
        loss(twin(x[i : i + 1]), y[i : i + 1]).backward()
        optimizer.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(shared.gradient[name], ((p - q) / 0.1).detach(), rtol=1e-9, atol=1e-12)
    found = attacks.InvertingGradients(120, local=local)(model, shared, (1, 16, 16), y)
    naive = attacks.InvertingGradients(120)(model, shared, (1, 16, 16), y)
    assert naive.objective[-1] > 3 * found.objective[-1]
    assert attacks.psnr(found.inputs, x).mean() > 2 + attacks.psnr(naive.inputs, x).mean()


def test_text_by_its_embeddings() -> None:
    torch.manual_seed(1)
    model, x, y = Text(), torch.tensor([[3, 7, 9, 11, 49, 0]]), torch.tensor([1])
    shared = attacks.share(model, nn.CrossEntropyLoss(), x, y)
    seen = {k: g for k, g in shared.gradient.items() if not k.startswith("embedding")}
    found = attacks.DeepLeakage(iterations=40)(
        model, attacks.Shared(seen, 1, shared.loss_fn), (6, 32), labels=y, forward=lambda m, e: m.body(e)
    )
    tokens = attacks.nearest_tokens(found.inputs, model.embedding.weight.detach())
    assert found.matched and tokens.tolist() == x.tolist()


def test_the_cosine_on_what_a_model_is_run_with() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(6, 12), nn.Sigmoid(), nn.Linear(12, 3)), torch.rand(1, 6), torch.tensor([1])
    shared = attacks.share(model, nn.CrossEntropyLoss(), x, y)
    search = attacks.InvertingGradients(300, tv=0.0, low=0.0, high=0.5)
    found = search(model, shared, (6,), y, forward=lambda m, half: m(2 * half))
    assert found.matched and (2 * found.inputs - x).abs().max() < 1e-2
    assert (search(model, shared, (6,), y).inputs - x).abs().max() > 0.1  # of which half are out of the box


def test_labels_of_each_token_are_searched_for() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(20, 40), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x.flatten(1)).sigmoid().unflatten(1, (5, 8))).transpose(1, 2)

    torch.manual_seed(0)
    model, x, y = Tagger(), torch.randn(2, 5, 4), torch.randint(3, (2, 5))
    shared = attacks.share(model, nn.CrossEntropyLoss(), x, y)
    found = attacks.DeepLeakage(60)(model, shared, (5, 4), classes=(3, 5))
    order = attacks.in_order(found.inputs, x)
    assert found.matched and found.labels[order].tolist() == y.tolist()
    torch.testing.assert_close(found.inputs[order], x, rtol=0, atol=1e-2)


def test_inversion_refuses_what_does_not_fit() -> None:
    model, (x, y), loss = sigmoid_net(), upscaled(1, 0), nn.CrossEntropyLoss()
    shared = attacks.share(model, loss, x, y)
    with pytest.raises(ValueError, match="give classes=<number> .* or labels="):
        attacks.DeepLeakage()(model, shared, (1, 16, 16))
    with pytest.raises(px.PackextError, match=r"\['other'\] was shared"):
        attacks.DeepLeakage()(model, attacks.Shared({"other": torch.zeros(1)}, 1, loss), (1, 16, 16), classes=10)
    with pytest.raises(px.PackextError, match="Nothing was shared"):
        attacks.DeepLeakage()(model, attacks.Shared({}, 1, loss), (1, 16, 16), classes=10)
    with pytest.raises(px.PackextError, match=r"'0.bias' has shape \[3\] for \[12\]"):
        attacks.DeepLeakage()(model, attacks.Shared({"0.bias": torch.zeros(3)}, 1, loss), (1, 16, 16), classes=10)
    broken = attacks.Shared({"0.bias": torch.full((12,), torch.nan)}, 1, loss)
    with pytest.raises(px.PackextError, match="'0.bias' has entries that are not finite"):
        attacks.DeepLeakage()(model, broken, (1, 16, 16), classes=10)
    zeros = {name: torch.zeros_like(g) for name, g in shared.gradient.items()}
    for attack in (attacks.DeepLeakage(1), attacks.InvertingGradients(1)):
        for given, mask in ((attacks.Shared(zeros, 1, loss), None), (shared, zeros)):
            with pytest.raises(px.PackextError, match="1 sample.* is zero: it tells nothing of the inputs"):
                attack(model, given, (1, 16, 16), labels=y, mask=mask)
    with pytest.raises(px.PackextError, match="pass tv=0"):
        attacks.InvertingGradients(1)(
            nn.Linear(3, 2), attacks.share(nn.Linear(3, 2), loss, x[0, 0, :1, :3], y % 2), (3,), y % 2
        )


@pytest.mark.parametrize(
    "attack", [*RULES, attacks.DeepLeakage(), attacks.InvertingGradients(), attacks.SecureAggregationLabels()]
)
def test_every_attack_states_its_threat_model(attack: Any) -> None:
    threat = attack.threat
    assert threat.server.split(":")[0] in ("honest", "malicious") and threat.sees and threat.knows and threat.assumes
