"""Influence scores are those of dense gradients, by definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import testing
from packext.adapters import Attributor
from tests.helpers import batch, mlp

pytestmark = pytest.mark.usefixtures("double")

N, Q = 11, 3


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.Tanh(), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(9, 4), nn.Sigmoid(), nn.Linear(4, 3)
    )


def signals(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 4), torch.randint(3, (n,))


def parts(data: tuple[Tensor, ...], size: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(size) for t in data), strict=True))


def dense(model: nn.Module, data: tuple[Tensor, Tensor], project: px.ProjectedGrad | None) -> Tensor:
    """Gradients one by one, each multiplied by the matrix of its projection, which is formed."""
    found = []
    for name, rows in testing.individual_gradients(model, nn.CrossEntropyLoss(), *data).items():
        rows = rows.flatten(1)
        if project is not None:
            left, right = project.matrices(name, dict(model.named_parameters())[name].shape)
            rows = rows @ (left if right is None else torch.kron(left, right)).mT
        found.append(rows)
    return torch.cat(found, 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dim, damping", [((2, 3), 0.1), (4, 3.0), (None, 0.1)])
def test_scores_are_those_of_dense_gradients(reduction: str, dim: Any, damping: float) -> None:
    model, train, queries = network(), signals(N), signals(Q)
    project = None if dim is None else px.ProjectedGrad(dim, seed=4)
    f, q = dense(model, train, project), dense(model, queries, project)
    moment = torch.einsum("ni,nj->ij", f, f) / N
    inverse = torch.linalg.inv(moment + damping * moment.diagonal().mean() * torch.eye(len(moment)))
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss(reduction=reduction))
    attributor = Attributor(model, lambda b: loss_fn(model(b[0]), b[1]), dim, seed=4, damping=damping)
    attributor.fit(parts(train, 4))
    torch.testing.assert_close(attributor.features, f)
    torch.testing.assert_close(attributor.scores(parts(queries, 2)), q @ inverse @ f.mT)
    torch.testing.assert_close(attributor.self_influence(), torch.einsum("ni,ij,nj->n", f, inverse, f))
    torch.testing.assert_close(attributor.scores([queries]), attributor.scores(parts(queries, 1)))


def test_a_positive_score_is_of_a_sample_that_helps() -> None:
    """Least squares of which everything is known: what retraining with twice a sample's weight does."""
    x, y = torch.randn(40, 3), torch.randn(40, 1)
    model = nn.Linear(3, 1, bias=False)

    def solve(weight: Tensor) -> Tensor:
        return torch.linalg.solve((x * weight[:, None]).mT @ x, (x * weight[:, None]).mT @ y).mT

    with torch.no_grad():
        model.weight.copy_(solve(torch.ones(40)))
    px.extend(model)
    loss_fn = px.extend(nn.MSELoss(reduction="sum"))
    attributor = Attributor(model, lambda b: loss_fn(model(b[0]), b[1]), dim=None, damping=1e-6).fit([(x, y)])
    query = (x[:1] + 0.5, y[:1] + 1)
    before = (query[0] @ model.weight.mT - query[1]).square().sum()
    changes = []
    for i in range(40):
        after = (query[0] @ solve(torch.ones(40) + 1e-4 * torch.eye(40)[i]).mT - query[1]).square().sum()
        changes.append((after - before) / 1e-4)
    # The empirical Fisher stands in for the Hessian: signs and order, and not the size.
    scores, lowered = attributor.scores([query])[0].detach(), -torch.stack(changes).detach()
    assert torch.corrcoef(torch.stack([scores, lowered]))[0, 1] > 0.9


def test_parameters_that_were_chosen_and_gradients_that_stay() -> None:
    model, data = px.extend(mlp()), batch(N)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model[0].bias.requires_grad_(False)
    with torch.no_grad():
        some = Attributor(
            model, lambda b: loss_fn(model(b[0]), b[1]), None, parameters=[model[2].weight, model[0].bias]
        )
        model[0].bias.requires_grad_(True)  # thawed since
        some.fit([data])
    rows = testing.individual_gradients(model, nn.CrossEntropyLoss(), *data)
    torch.testing.assert_close(some.features, rows["2.weight"].flatten(1))
    one = Attributor(model, some.loss, None, parameters=model[2].weight).fit([data])
    torch.testing.assert_close(one.features, some.features)
    assert all((p.grad == 1).all() and not hasattr(p, "grad_batch") for p in model.parameters())


@pytest.mark.parametrize("dim", [3, None])
def test_a_parameter_that_a_batch_does_not_reach_has_zeros(dim: int | None) -> None:
    """One stem and three heads, of which a batch takes one, against gradients of the whole model sample by sample."""
    model = nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)])
    project = None if dim is None else px.ProjectedGrad(dim, seed=4)

    def loss(b: Any, loss_fn: nn.Module) -> Tensor:
        return loss_fn(model[b[2]](model[0](b[0]).tanh()), b[1])

    def features(batches: list[Any], kept: tuple[str, ...]) -> Tensor:
        found = []
        for x, y, head in batches:
            for each in zip(x.split(1), y.split(1), strict=True):
                model.zero_grad()
                loss((*each, head), nn.CrossEntropyLoss()).backward()
                rows = []
                for name, p in model.named_parameters():
                    g = torch.zeros_like(p) if p.grad is None else p.grad
                    left, right = (torch.eye(p.numel()), None) if project is None else project.matrices(name, p.shape)
                    if name.startswith(kept):
                        rows.append((left if right is None else torch.kron(left, right)) @ g.flatten())
                found.append(torch.cat(rows))
        return torch.stack(found)

    train, queries = [(*batch(n), head) for n, head in ((4, 2), (3, 1))], [(*batch(2), head) for head in (1, 3)]
    f, q = (features(batches, ("0", "1", "2")) for batches in (train, queries))
    model.zero_grad()
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    attributor = Attributor(model, lambda b: loss(b, loss_fn), dim, seed=4).fit(train)
    torch.testing.assert_close(attributor.features, f)
    moment = f.mT @ f / len(f)
    damped = moment + 0.1 * moment.diagonal().mean() * torch.eye(len(moment))
    torch.testing.assert_close(attributor.scores(queries), q @ torch.linalg.solve(damped, f.mT))
    alone = attributor.scores(queries[1:])  # which reach a head that no training sample has, and none of the others
    torch.testing.assert_close(alone, attributor.scores(queries)[2:])


def test_margins_in_place_of_a_loss() -> None:
    """TRAK's output function, which is no loss of torch's: the sum of it, of which the scale is 1."""
    model, (x, y) = mlp(), batch(N)

    def margins(logits: Tensor, labels: Tensor) -> Tensor:
        p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
        return (p / (1 - p)).log().sum()

    rows = testing.individual_gradients(model, margins, x, y)
    px.extend(model)
    attributor = Attributor(model, lambda b: margins(model(b[0]), b[1]), None, scale=1.0).fit(parts((x, y), 3))
    torch.testing.assert_close(attributor.features, torch.cat([r.flatten(1) for r in rows.values()], 1))


def test_digits_with_wrong_labels_are_found() -> None:
    """A tenth of the labels are wrong; of the tenth with the largest self-influence most are."""
    sklearn = pytest.importorskip("sklearn.datasets")
    digits = sklearn.load_digits()
    x = torch.tensor(digits.data[:600]).to(torch.get_default_dtype()) / 16
    y = torch.tensor(digits.target[:600])
    wrong = torch.randperm(600)[:60]
    labels = y.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, (60,))) % 10
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    attributor = Attributor(model, lambda b: loss_fn(model(b[0]), b[1]), dim=8).fit(parts((x, labels), 100))
    flagged = attributor.self_influence().topk(60).indices
    found = int(torch.isin(flagged, wrong).sum())
    assert found >= 45, found


def test_what_is_refused() -> None:
    model, data = mlp(), batch(N)
    loss_fn = px.extend(nn.CrossEntropyLoss())

    def loss(b: Any) -> Tensor:
        return loss_fn(model(b[0]), b[1])

    with pytest.raises(px.NotExtendedError, match="Sequential is not extended"):
        Attributor(model, loss)
    px.extend(model)
    with pytest.raises(ValueError, match="damping"):
        Attributor(model, loss, damping=0.0)
    with pytest.raises(ValueError, match="scale"):
        Attributor(model, loss, scale="loss")
    with pytest.raises(ValueError, match=r"function of a batch .* got CrossEntropyLoss.*lambda batch: loss_fn\(model"):
        Attributor(model, loss_fn)
    with pytest.raises(px.PackextError, match=r"call fit\(loader\) first"):
        Attributor(model, loss).scores([data])
    with pytest.raises(px.PackextError, match="no batches"):
        Attributor(model, loss).fit([])
    with pytest.raises(px.PackextError, match="batch 1 are not finite"):
        Attributor(model, loss).fit([data, (data[0] * torch.nan, data[1])])
    with pytest.raises(px.PackextError, match="all are zero"):
        Attributor(model, lambda b: 0.0 * loss(b), scale=1.0).fit([data])
    with pytest.raises(px.NotExtendedError, match="not extended"):
        Attributor(model, lambda b: nn.CrossEntropyLoss()(model(b[0]), b[1])).fit([data])

    assert all(p.grad is None for p in model.parameters())
