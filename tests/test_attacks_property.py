"""Properties of a batch, read off its gradient."""

from __future__ import annotations

import sys
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import packext as px
from packext import attacks
from packext.attacks import PropertyInference, Shared, property, share


@cache
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x).float().view(-1, 1, 8, 8)[order] / 16, torch.tensor(y)[order]


def net() -> nn.Module:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def batches(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, has: Tensor, present: int) -> list[Shared]:
    """Gradients of 60 batches of 16, with so many samples that have the property."""
    found = []
    for _ in range(60):
        one, other = (v.nonzero()[:, 0] for v in (has, ~has))
        rows = [one[torch.randperm(len(one))[:present]], other[torch.randperm(len(other))[: 16 - present]]]
        found.append(share(model, loss, x[torch.cat(rows)], y[torch.cat(rows)]))
    return found


@pytest.mark.parametrize(("dim", "reduction"), [(16, "mean"), (None, "sum")])
def test_a_property_that_is_there_is_found_and_one_that_is_not_is_not(dim: int | None, reduction: str) -> None:
    """Half of the digits are inverted, at random: nothing to do with which digit they are."""
    torch.manual_seed(0)
    (x, y), loss, model = digits(), nn.CrossEntropyLoss(reduction=reduction), net()
    for inverted in (True, False):
        has = torch.rand(len(x)) < 0.5
        seen = torch.where(has[:, None, None, None], 1 - x, x) if inverted else x
        attack = PropertyInference(16, 4, 500, dim)
        classifier = attack(model, loss, seen[:600], y[:600], has[:600])
        scores = [classifier(*batches(model, loss, seen[600:], y[600:], has[600:], present)) for present in (4, 0)]
        judged = attacks.judge(scores[0], scores[1])
        if inverted:
            assert judged.auc > 0.97 and judged.interval[0] > 0.9
            assert scores[0].median() > 0 > scores[1].median()
        else:
            assert judged.interval[0] < 0.5 < judged.interval[1] and 0.35 < judged.auc < 0.65
    assert not px.is_extended(model) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dim", [3, None])
def test_features_and_mixtures_against_one_backward_pass_each(dim: int | None, reduction: str) -> None:
    torch.manual_seed(0)
    model, loss = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(),
        nn.CrossEntropyLoss(reduction=reduction),
    )
    x, y, has = torch.randn(12, 4).double(), torch.randint(3, (12,)), torch.arange(12) < 5
    quantity = px.BatchGrad() if dim is None else px.ProjectedGrad(dim, 4)
    rows, names = property._rows(model, loss, x, y, quantity)
    assert names == [name for name, _ in model.named_parameters()] and len(rows) == 12
    classifier = PropertyInference(4, 2, 50, dim, seed=4)(model, loss, x, y, has)
    for picked in ([3], [0, 7, 9], [1, 2, 10, 11]):
        shared = share(model, loss, x[picked], y[picked])
        parts = []
        for name, g in shared.gradient.items():
            if isinstance(quantity, px.ProjectedGrad):
                left, right = quantity.matrices(name, g.shape)
                g = left @ g if right is None else left @ g @ right.T
            parts.append(g.flatten() / (len(picked) if reduction == "sum" else 1))
        torch.testing.assert_close(torch.cat(parts), rows[picked].mean(0))
        if len(picked) == 4:
            torch.testing.assert_close(classifier.features(shared), torch.cat(parts))
    pools = torch.arange(5), torch.arange(5, 12)
    drawn = property._mixtures(
        torch.eye(12).double(), torch.Generator().manual_seed(0), 3000, (pools[0], 2), (pools[1], 3)
    )
    assert (drawn.count_nonzero(1) == 5).all() and ((drawn > 0)[:, :5].sum(1) == 2).all()
    torch.testing.assert_close(drawn.sum(1), torch.ones(3000).double())
    share_of_each = (drawn > 0).double().mean(0)
    want = torch.tensor([2 / 5] * 5 + [3 / 7] * 7).double()
    assert ((share_of_each - want).abs() < 4 * (want * (1 - want) / 3000).sqrt()).all()


def test_the_classifier_is_a_penalised_logistic_regression() -> None:
    """Against its own optimality: the gradient of the penalised loss is zero at scikit-learn's coefficients."""
    torch.manual_seed(0)
    model, loss = nn.Linear(4, 3).double(), nn.CrossEntropyLoss()
    x, y, has = torch.randn(40, 4).double(), torch.randint(3, (40,)), torch.arange(40) < 20
    x[has] += 0.5
    found = PropertyInference(4, 2, 200, None)(model, loss, x, y, has)
    rows, _ = property._rows(model, loss, x, y, px.BatchGrad())
    generator = torch.Generator().manual_seed(0)
    pools = has.nonzero()[:, 0], (~has).nonzero()[:, 0]
    plain = property._mixtures(rows, generator, 200, (pools[1], 4))
    holding = property._mixtures(rows, generator, 200, (pools[0], 2), (pools[1], 2))
    f, truth = torch.cat([plain, holding]), torch.tensor([0.0] * 200 + [1.0] * 200).double()
    z = (f - f.mean(0)) / f.std(0, correction=0)
    w = torch.zeros(15).double().requires_grad_()
    bias = torch.zeros(()).double().requires_grad_()
    optimizer = torch.optim.LBFGS([w, bias], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.binary_cross_entropy_with_logits(z @ w + bias, truth) + 0.01 * w.square().sum() / 2
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(found.score(f), (z @ w + bias).detach(), rtol=0, atol=1e-2)
    assert float((found.score(f).sign() / 2 + 0.5 == truth).double().mean()) > 0.6


def test_property_inference_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    (x, y), model, loss = (v[:40] for v in digits()), net(), nn.CrossEntropyLoss()
    has = torch.arange(40) < 10
    for numbers in ((0, 0), (4, 0), (4, 5), (4, 1, 0)):
        with pytest.raises(ValueError, match="need 1 <= present <= batch"):
            PropertyInference(*numbers)
    attack = PropertyInference(8, 4, 10)
    with pytest.raises(px.PackextError, match=r"has must be bool \[40\], got torch.int64 \[40\]"):
        attack(model, loss, x, y, has.long())
    with pytest.raises(px.PackextError, match="need 4 samples with the property and 8 without; there are 10 and 7"):
        attack(model, loss, x[:17], y[:17], has[:17])
    with pytest.raises(px.PackextError, match="need 4 samples .* there are 0 and 30"):
        attack(model, loss, x[10:], y[10:], has[10:])
    weighted = nn.CrossEntropyLoss(weight=torch.arange(1.0, 11.0))
    with pytest.raises(px.PackextError, match="not the mean of their own .* without class weights"):
        attack(model, weighted, x, y, has)
    with pytest.raises(px.PackextError, match="not the mean of their own"):
        attack(nn.Sequential(nn.Dropout(0.5), net()), loss, x, y, has)
    with pytest.raises(px.CoupledSamplesError):
        attack(nn.Sequential(nn.BatchNorm2d(1), net()), loss, x, y, has)
    bad = x.clone()
    bad[3] = torch.nan
    with pytest.raises(px.PackextError, match="not finite"):
        attack(model, loss, bad, y, has)
    classifier = attack(model, loss, x, y, has)
    with pytest.raises(px.PackextError, match="gradients of 8 samples .* got one of 7 samples"):
        classifier(share(model, loss, x[:7], y[:7]))
    with pytest.raises(px.PackextError, match=r"got one without \['5.bias'\]"):
        classifier(attacks.without(share(model, loss, x[:8], y[:8]), "5.bias"))
    assert attack.threat.server == "honest" and attack.threat.sees and attack.threat.knows and attack.threat.assumes
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"pip install 'packext\[attacks\]'"):
        attack(model, loss, x, y, has)
