"""Functions of torch that take functions: `.grad` is torch's, and what meets data in them is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_
from torch._higher_order_ops.scan import scan
from torch.nn.attention.flex_attention import flex_attention

import packext as px
from packext import _compiler, testing
from tests.helpers import double_precision

#: torch's compiler asks for what makes torch warn, and torch warns of its own tensors.
pytestmark = pytest.mark.filterwarnings("ignore")
N, D = 4, 3


@pytest.fixture(autouse=True)
def _compiles() -> None:
    """A forward pass that was interrupted is over when the next one begins: until then nothing is compiled."""
    px.extend(nn.Linear(1, 1))(torch.zeros(1, 1))


class Between(nn.Module):
    """A layer, what is tried, and a layer."""

    def __init__(self, through: Callable[[Between, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.mid, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2)
        self.scale = nn.Parameter(torch.rand(D))
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.through(self, torch.tanh(self.up(x))))


def cond(m: Between, h: Tensor) -> Tensor:
    return torch.cond(h.sum() > -99, lambda z: m.mid(z) * m.scale, lambda z: z * m.scale, (h,))


def mapped(m: Between, h: Tensor) -> Tensor:
    return map_(lambda z: m.mid(z) * m.scale, h)


def scanned(m: Between, h: Tensor) -> Tensor:
    steps = torch.stack([h, 2 * h])
    return scan(lambda c, z: (torch.tanh(c * m.scale + m.mid(z)), c * 2), torch.zeros_like(h), steps, dim=0)[0]


def plain(m: Between, h: Tensor) -> Tensor:
    return m.mid(h) * m.scale + torch.cond(h.sum() > -99, lambda z: z.sin(), lambda z: z.cos(), (h,))


def parameters_alone(m: Between, h: Tensor) -> Tensor:
    return m.mid(h) * torch.cond(torch.tensor(True), lambda z: z.sin(), lambda z: z.cos(), (m.scale,))


def flex(m: Between, h: Tensor) -> Tensor:
    q = h.detach().view(len(h), 1, D, 1)  # torch has no backward pass of it on CPUs
    return m.mid(h) * m.scale + flex_attention(q, q, q, score_mod=lambda s, b, head, i, j: s * (1 + i)).view(len(h), D)


def mixing(m: Between, h: Tensor) -> Tensor:
    return torch.cond(h.sum() > -99, lambda z: z + z.mean(0), lambda z: z.cos(), (m.mid(h) * m.scale,))


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("through", [cond, mapped, scanned])
def test_gradients_are_as_before_and_what_meets_data_is_refused(
    through: Callable, loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not loaded:  # as in a process in which nothing has been compiled before
        monkeypatch.setattr(_compiler, "_loaded", lambda: None)
    with double_precision():
        torch.manual_seed(0)
        model, x, y = Between(through), torch.randn(N, D), torch.randint(2, (N,))
        loss = px.extend(nn.CrossEntropyLoss())
        expected = copy.deepcopy(model)
        nn.CrossEntropyLoss()(expected(x), y).backward()
        px.extend(model)
        loss(model(x), y).backward()
        for p, q in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        with pytest.raises(px.UnsupportedUseError, match=r"in module \(the model itself\).*scale.*functions"):
            with px.backpack(px.BatchGrad()):
                loss(model(x), y).backward()
        seen = [*model.up.parameters(), *model.head.parameters()]
        model.zero_grad()
        with px.backpack(px.BatchGrad(), parameters=seen) as results:
            loss(model(x), y).backward()
        rows = []
        for n in range(N):
            expected.zero_grad()
            (nn.CrossEntropyLoss()(expected(x[n : n + 1]), y[n : n + 1]) / N).backward()
            rows.append([p.grad.clone() for p in (*expected.up.parameters(), *expected.head.parameters())])
        for p, own in zip(seen, zip(*rows, strict=True), strict=True):
            torch.testing.assert_close(results[p].grad_batch, torch.stack(own))


@pytest.mark.parametrize("through", [plain, parameters_alone, flex])
def test_of_data_or_of_parameters_alone_they_are_followed(through: Callable) -> None:
    with double_precision():
        torch.manual_seed(0)
        model = Between(through)
        report = testing.check(model, nn.CrossEntropyLoss(), torch.randn(N, D), torch.randint(2, (N,)))
        assert report.ok, report


def test_samples_that_meet_in_them_are_refused() -> None:
    model, x = px.extend(Between(mixing)), torch.randn(N, D)
    with pytest.raises(px.CoupledSamplesError):
        with px.backpack(px.BatchGrad()):
            px.extend(nn.CrossEntropyLoss())(model(x), torch.randint(2, (N,))).backward()


def test_nested_tensors_are_refused() -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(D, D), nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            ragged = torch.nested.nested_tensor([x[0, :2], *x[1:]], layout=torch.jagged)
            return self.head(self.inner(ragged).to_padded_tensor(0.0).sum(1))

    model, x = px.extend(Ragged()), torch.randn(N, 5, D)
    with pytest.raises(px.UnsupportedUseError, match=r"in module inner \[Linear\].*nested.*Pad"):
        with px.backpack(px.BatchGrad()):
            px.extend(nn.CrossEntropyLoss())(model(x), torch.randint(2, (N,))).backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", ["to_sparse", "to_sparse_csr"])
def test_sparse_inputs(kind: str) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.weight = nn.Linear(D, D), nn.Parameter(torch.randn(D, D))
            self.head = nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = getattr(x, kind)()
            return self.head(torch.tanh(self.inner(x) + x @ self.weight))

    with double_precision():
        torch.manual_seed(0)
        report = testing.check(Sparse(), nn.CrossEntropyLoss(), torch.randn(N, D), torch.randint(2, (N,)))
        assert report.ok, report
