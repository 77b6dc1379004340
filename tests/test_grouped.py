"""Grouped products, in float32: torch has none in float64, so the table of cases cannot hold them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packext as px
from packext._factored import Factored
from packext.rules.grouped import Grouped
from tests.test_rules import Wrong, is_slow

pytestmark = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch 2.10 or newer")

N, T, D, E = 5, 7, 8, 3


class Experts(nn.Module):
    """Tokens sorted by expert, as transformers has them."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, D), nn.Linear(D, 3)
        self.w = nn.Parameter(torch.randn(E, D, D) / 3)
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).flatten(0, 1)
        expert = (h[:, 0].detach() * 100).long().abs() % E
        order = expert.argsort(stable=True)
        offs = expert.bincount(minlength=E).cumsum(0).to(torch.int32)
        w = self.w.transpose(1, 2) if self.transposed else self.w
        y = F.grouped_mm(h[order], w, offs=offs).relu()
        return self.last((h + y[order.argsort()]).view(len(x), T, D)).mean(1)


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, T, 4), torch.randint(3, (n,))


@pytest.mark.parametrize("n", [N, 1])
@pytest.mark.parametrize("transposed", [False, True], ids=["stored", "transposed"])
def test_each_sample_has_its_own(transposed: bool, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss = Experts(transposed), nn.CrossEntropyLoss(reduction="sum")
    x, y = batch(n)
    rows = []
    for k in range(n):
        model.zero_grad()
        loss(model(x[k : k + 1]), y[k : k + 1]).backward()
        rows.append([p.grad for p in model.parameters()])
    px.extend(model)
    forms: list[Factored] = []
    emit = px.backpack._emit

    def spy(self: Any, flights: Any, source: Any, statistics: Any, *rest: Any) -> Any:
        forms.append(statistics.form)
        return emit(self, flights, source, statistics, *rest)

    monkeypatch.setattr(px.backpack, "_emit", spy)
    for _ in range(2):  # as the probe sees it, and as later cotangents do
        model.zero_grad()
        with px.backpack(px.BatchGrad(), px.BatchL2Grad(), px.Variance()):
            loss(model(x), y).backward()
        for p, of in zip(model.parameters(), zip(*rows, strict=True), strict=True):
            want = torch.stack([g for g in of if g is not None])
            found = vars(p)
            torch.testing.assert_close(found["grad_batch"], want, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found["batch_l2"], want.flatten(1).square().sum(1), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found["variance"], want.var(0, correction=0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(p.grad, want.sum(0), rtol=1e-4, atol=1e-6)
    assert not any(is_slow(form) for form in forms)


def test_a_broken_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = Grouped.factors

    def broken(self: Any, *args: Any) -> Any:
        return {k: Wrong(form) for k, form in (factors(self, *args) or {}).items()}

    monkeypatch.setattr(Grouped, "factors", broken)
    model, loss = px.extend(Experts(True)), nn.CrossEntropyLoss()
    x, y = batch()
    with pytest.raises(px.WrongRuleError, match="differs from autograd's"), px.backpack(px.BatchGrad()):
        loss(model(x), y).backward()


def test_factors_count_the_tokens_of_each_expert() -> None:
    model, x = Experts(False), torch.randn(N, T, 4)
    px.extend(model)
    loss_fn, read = px.extend(nn.MSELoss(reduction="sum")), []
    original = F.grouped_mm

    def watched(h: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        read.append((h.detach(), offs))
        return original(h, w, offs=offs)

    with pytest.MonkeyPatch.context() as patch, px.backpack(px.KFLR()):
        patch.setattr(F, "grouped_mm", watched)
        loss_fn(model(x), torch.zeros(N, 3)).backward()
    ((h, offs),) = read
    for expert, rows in enumerate(h.tensor_split(offs[:-1].tolist())):
        want = rows.T @ rows / max(1, len(rows))
        torch.testing.assert_close(model.w.kflr[0][expert], want, rtol=1e-4, atol=1e-5)
