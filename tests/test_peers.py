"""Kronecker factors against curvlinops, where it is installed (`make bench` does so)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import linalg, testing

pytestmark = pytest.mark.usefixtures("double")

curvlinops = pytest.importorskip("curvlinops")
N = 6


def cnn() -> tuple[nn.Module, Tensor]:
    """Convolutions with padding, stride and dilation, a global mean."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 5, 3, stride=2, dilation=2, padding=2, bias=False),
        nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3),
    )  # fmt: skip
    return net, torch.randn(N, 2, 8, 8)


class Block(nn.Module):
    """Attention over tokens, a feed-forward part and residual connections, with the mean over tokens at the end."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.Linear(d, 3)
        self.first, self.second = (nn.LayerNorm(d, elementwise_affine=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        weights = (self.q(h) @ self.k(h).mT / h.shape[-1] ** 0.5).softmax(-1)
        x = x + self.o(weights @ self.v(h))
        x = x + self.down(nn.functional.gelu(self.up(self.second(x))))
        return self.head(x.mean(1))


def transformer() -> tuple[nn.Module, Tensor]:
    return Block(), torch.randn(N, 5, 6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bias", ["separate", "joint"])
@pytest.mark.parametrize("loss", ["mean", "sum", "squares"])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("build", [cnn, transformer])
def test_curvlinops_agrees(build: Any, approx: str, loss: str, bias: str) -> None:
    model, x = build()
    criterion: nn.Module = nn.MSELoss() if loss == "squares" else nn.CrossEntropyLoss(reduction=loss)
    y = torch.randn(N, 3) if loss == "squares" else torch.randint(3, (N,))
    named = dict(model.named_parameters())
    theirs = curvlinops.KFACLinearOperator(
        model, criterion, list(named.values()), [(x, y)], fisher_type="type-2", kfac_approx=approx,
        separate_weight_and_bias=bias == "separate", progressbar=False, check_deterministic=False,
    )  # fmt: skip
    vectors = {name: torch.randn_like(p) for name, p in named.items()}
    want = dict(zip(named, theirs @ list(vectors.values()), strict=True))
    px.extend(model)
    px.extend(criterion)
    with px.backpack(px.KFAC(fisher="exact", approx=approx, bias=bias)):
        criterion(model(x), y).backward()
    got = {name: linalg.kron_matvec(p.kfac, vectors[name]) for name, p in named.items() if bias == "separate"}
    for name, p in named.items():
        if isinstance(p.kfac, linalg.Joint):
            weight = name.removesuffix("bias") + "weight"
            both = linalg.kron_matvec(p.kfac.weight.kfac, p.kfac.join(vectors[weight], vectors[name]))
            got[weight], got[name] = p.kfac.split(both)
        elif bias == "joint" and name.endswith("weight") and name.replace("weight", "bias") not in named:
            got[name] = linalg.kron_matvec(p.kfac, vectors[name])
    assert got.keys() == want.keys()
    for name in got:
        assert testing.relative_error(got[name], want[name]) < 1e-9, name
