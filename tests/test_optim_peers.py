"""SINGD against the authors' own, where that is installed (singd 0.0.5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import packext as px

singd = pytest.importorskip("singd.optim.optimizer")


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_singd_is_that_of_its_authors(kind: str) -> None:
    """With the empirical Fisher, which theirs is limited to, over steps with and without a new preconditioner."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        if kind == "linear":
            return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False))
        return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))

    ours, theirs, loss = px.extend(build().double()), build().double(), nn.CrossEntropyLoss()
    options: dict[str, Any] = {"lr": 0.1, "damping": 0.02, "momentum": 0.8, "weight_decay": 0.01}
    one = px.optim.SINGD(
        ours.parameters(), every=2, precondition_lr=0.1, precondition_momentum=0.4, fisher="empirical", **options
    )
    other = singd.SINGD(theirs, T=2, lr_cov=0.1, alpha1=0.4, **options)
    extended = px.extend(nn.CrossEntropyLoss())
    for seed in range(6):
        torch.manual_seed(seed)
        x = torch.randn(*((7, 5) if kind == "linear" else (7, 1, 3, 3)), dtype=torch.float64)
        y = torch.randint(3, (7,))
        for optimizer in (one, other):
            optimizer.zero_grad()
        with px.optim.emit(one):
            extended(ours(x), y).backward()
        loss(theirs(x), y).backward()
        one.step()
        other.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
