"""Proxies against their definitions, one sample at a time."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packext as px
from packext.search import PROXIES, scores


class Shared(nn.Module):
    """A layer used twice, one that the loss does not reach, a ReLU that is a function, a bias on data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.idle = nn.Linear(20, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.shift, self.last = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = torch.relu(self.twice(x) + self.shift).clone()
        return self.last(self.twice(x).relu())


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6).eval(), nn.ReLU(inplace=True), nn.Dropout(0.5).eval(), nn.Flatten(), nn.Linear(54, 5),
    )  # fmt: skip


def problem(kind: str, n: int = 8) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    if kind == "shared":
        return Shared().double(), torch.randn(n, 20).double(), torch.randint(3, (n,))
    model = convolutional()
    model[4].running_mean.normal_()
    return model.double(), torch.randn(n, 1, 8, 8).double(), torch.randint(5, (n,))


class Naive:
    """Every proxy by its definition, with a loop over samples and plain autograd."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = copy.deepcopy(model), x, y
        self.named = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        self.rows: dict[str, list[Tensor]] = {k: [] for k in self.named}
        for i in range(len(x)):
            loss = F.cross_entropy(self.model(x[i : i + 1]), y[i : i + 1])
            grads = torch.autograd.grad(loss, list(self.named.values()), allow_unused=True)
            for (k, p), g in zip(self.named.items(), grads, strict=True):
                self.rows[k].append(torch.zeros_like(p) if g is None else g)

    def parameters(self) -> float:
        return float(sum(math.prod(p.shape) for p in self.named.values()))

    def batch(self) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.model(self.x), self.y)
        grads = torch.autograd.grad(loss, list(self.named.values()), allow_unused=True, materialize_grads=True)
        return {name: g.detach() for name, g in zip(self.named, grads, strict=True)}

    def grad_norm(self) -> float:
        return sum(float(g.pow(2).sum().sqrt()) for g in self.batch().values() if g.dim() > 1)

    def snip(self) -> float:
        return sum(float((g * self.named[k].detach()).abs().sum()) for k, g in self.batch().items() if g.dim() > 1)

    def grad_sign(self) -> float:
        total = 0.0
        for rows in self.rows.values():
            agree = torch.zeros_like(rows[0])
            for row in rows:
                agree += (row > 0).double() - (row < 0).double()
            total += float(agree.abs().sum())
        return total

    def zico(self) -> float:
        total = 0.0
        for rows in self.rows.values():
            g = np.stack([row.numpy() for row in rows])
            std = np.std(g, axis=0)
            if g.ndim > 2 and (std > 0).any():
                total += math.log(np.sum(np.mean(np.abs(g), axis=0)[std > 0] / std[std > 0]))
        return total

    def fisher(self) -> float:
        total, n = 0.0, len(self.x)
        layers = [m for m in self.model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        for i in range(n):
            seen: list[tuple[nn.Module, Tensor]] = []

            def note(module: nn.Module, args: Any, output: Tensor, seen: Any = seen) -> Tensor:
                seen.append((module, output))
                return output + 0  # what follows may write in place

            handles = [m.register_forward_hook(note) for m in layers]
            loss = F.cross_entropy(self.model(self.x[i : i + 1]), self.y[i : i + 1])
            for handle in handles:
                handle.remove()
            grads = torch.autograd.grad(loss, [a for _, a in seen])
            channels: dict[nn.Module, Tensor] = {}  # uses of one layer are one channel
            for (module, a), g in zip(seen, grads, strict=True):
                channels[module] = channels.get(module, 0) + (a * g).detach()[0].flatten(
                    1 if a.dim() > 2 else 0
                ).reshape(a.shape[1], -1).sum(1)
            total += sum(float(c.pow(2).sum()) for c in channels.values()) / (2 * n)
        return total

    def outputs(self) -> tuple[np.ndarray, np.ndarray]:
        by_weights, by_x = [], []
        weights = [p for p in self.named.values() if p.dim() > 1]
        for i in range(len(self.x)):
            x = self.x[i : i + 1].clone().requires_grad_()
            grads = torch.autograd.grad(self.model(x).sum(), [x, *weights], allow_unused=True, materialize_grads=True)
            by_x.append(grads[0].flatten().numpy())
            by_weights.append(np.concatenate([g.detach().flatten().numpy() for g in grads[1:]]))
        return np.stack(by_weights), np.stack(by_x)

    def jacob_cov(self) -> float:
        values = np.linalg.eigvals(np.corrcoef(self.outputs()[1])).real
        return -float(np.sum(np.log(values + 1e-5) + 1 / (values + 1e-5)))

    def ntk_condition(self) -> float:
        return float(np.linalg.cond(self.outputs()[0]) ** 2)


@pytest.mark.parametrize("name", [n for n in PROXIES if n not in ("flops", "synflow", "naswot")])
@pytest.mark.parametrize("kind", ["convolutional", "shared"])
def test_proxies_are_what_they_are_defined_to_be(kind: str, name: str) -> None:
    model, x, y = problem(kind)
    want = getattr(Naive(model, x, y), name)()
    for reduction in ("mean", "sum"):
        got = scores(model, nn.CrossEntropyLoss(reduction=reduction), x, y, [name])
        assert list(got) == [name] and got[name] == pytest.approx(want, rel=1e-8)


def test_synflow_sums_over_paths() -> None:
    # By hand: 2 inputs, 2 hidden units, 1 output. The sum over paths of |w1 w2| is counted once for each layer.
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.LayerNorm(2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    model[3].weight.data = torch.tensor([[-4.0, 0.25]])
    paths = 4 * (1 + 2) + 0.25 * (3 + 0.5)
    x, y = torch.randn(3, 2), torch.tensor([0, 0, 0])
    assert scores(model, nn.CrossEntropyLoss(), x, y, ["synflow"])["synflow"] == pytest.approx(2 * paths, rel=1e-12)
    deep = nn.Sequential(*[nn.Linear(100, 100, bias=False) for _ in range(25)])
    for layer in deep:
        layer.weight.data.fill_(1.0)
    got = scores(deep, nn.MSELoss(), torch.randn(2, 100), torch.randn(2, 100), ["synflow"])["synflow"]
    assert got == pytest.approx(25 * 100.0**26, rel=1e-9)  # more than float32 holds
    norm, first, second = nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Linear(2, 2)
    norm(5 + 3 * torch.randn(8, 2))
    twice, without = nn.Sequential(first, norm, second, norm).eval(), nn.Sequential(first, second)
    found = [scores(m, nn.CrossEntropyLoss(), x, y, ["synflow"])["synflow"] for m in (twice, without)]
    assert found[0] == pytest.approx(found[1], rel=1e-12)  # of one that stands in two places, too


def test_naswot_counts_codes_that_are_alike() -> None:
    for kind in ("convolutional", "shared"):
        model, x, y = problem(kind)
        codes: list[list[Tensor]] = []
        for i in range(len(x)):
            codes.append([])
            mine, h = codes[-1], x[i : i + 1]
            if kind == "shared":
                for layer, shift in ((model.first, 0), (model.twice, model.shift), (model.twice, 0)):
                    h = layer(h) + shift
                    mine.append((h > 0).flatten())
                    h = torch.relu(h)
            else:
                for module in model:
                    if isinstance(module, nn.ReLU):
                        mine.append((h > 0).flatten())
                    h = module(h)
        on = [torch.cat(code) for code in codes]
        kernel = np.array([[float((a == b).sum()) for a in on] for b in on])
        want = np.linalg.slogdet(kernel)[1]
        assert scores(model, nn.CrossEntropyLoss(), x, y, ["naswot"])["naswot"] == pytest.approx(want, rel=1e-10)


def test_flops_are_of_one_sample() -> None:
    model, x, y = problem("convolutional")
    want = 2 * (64 * 4 * 9 + 9 * 6 * 4 * 9 + 54 * 5)
    for n in (2, 5):
        assert scores(model, nn.CrossEntropyLoss(), x[:n], y[:n], ["flops"]) == {"flops": want}


class Products(nn.Module):
    """Attention, a bilinear map and a product with a vector, for which torch has operations of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.pair, self.last = nn.Bilinear(8, 8, 3), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        x = self.attention(x, x, x, need_weights=False)[0].mean(1)
        return self.pair(x, x.tanh()) @ self.last


@pytest.mark.parametrize("training", [True, False])
def test_flops_are_of_all_products(training: bool) -> None:
    attention = 5 * 8 * 24 + 2 * 5 * 5 * 8 + 5 * 8 * 8
    want = 2 * (attention + 2 * 5 * 8 * 16 + attention + 3 * 8 * (8 + 1) + 3)
    x, y, model = torch.randn(4, 5, 8), torch.ones(4), Products().train(training)
    assert scores(model, nn.MSELoss(), x, y, ["flops"]) == {"flops": want}


def test_weights_of_classes_are_taken_to_float64() -> None:
    """As the model is; equal ones change nothing."""
    model, x, y = problem("shared")
    names = ["zico"]
    weighted = nn.CrossEntropyLoss(torch.full((3,), 2.0, dtype=torch.float32))
    assert scores(model, weighted, x, y, names) == pytest.approx(scores(model, nn.CrossEntropyLoss(), x, y, names))
    assert weighted.weight is not None and weighted.weight.dtype == torch.float32


def test_nothing_is_left_behind() -> None:
    model, x, y = problem("convolutional")
    model, x = px.extend(model.float()), x.float()
    loss_fn = px.extend(nn.CrossEntropyLoss())
    loss_fn(model(x), y).backward()
    model[6].train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    state = torch.get_rng_state()
    found = scores(model, loss_fn, x, y)
    assert list(found) == list(PROXIES) and all(math.isfinite(v) for v in found.values())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert not any("grad_batch" in vars(p) for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state()) and x.grad is None and not x.requires_grad
    assert px.is_extended(model) and px.is_extended(loss_fn)
    plain, bare = px.unextend(model), nn.CrossEntropyLoss()
    scores(plain, bare, x, y, ["grad_sign"])
    assert not px.is_extended(plain) and not px.is_extended(bare)


def test_frozen_parameters_do_not_count() -> None:
    model, x, y = problem("shared")
    model.first.requires_grad_(False)
    names = ["parameters", "grad_norm", "snip", "grad_sign", "zico", "ntk_condition"]
    naive = Naive(model, x, y)
    for name, got in scores(model, nn.CrossEntropyLoss(), x, y, names).items():
        assert got == pytest.approx(getattr(naive, name)(), rel=1e-8), name
    model.requires_grad_(False)
    with pytest.raises(px.PackextError, match="no parameter that requires grad"):
        scores(model, nn.CrossEntropyLoss(), x, y)


def test_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3), nn.ReLU(), nn.Linear(3, 2))
    x, y = torch.randint(7, (5, 3)), torch.randint(2, (5,))
    names = ["grad_sign", "zico", "fisher", "snip", "grad_norm"]
    naive = Naive(model.double(), x, y)
    for name, got in scores(model, nn.CrossEntropyLoss(), x, y, names).items():
        assert got == pytest.approx(getattr(naive, name)(), rel=1e-8), name
    for name, why in (("jacob_cov", "not floating"), ("synflow", "torch.int64")):
        with pytest.raises(px.PackextError, match=why):
            scores(model, nn.CrossEntropyLoss(), x, y, [name])


@pytest.mark.parametrize(
    ("change", "names", "why"),
    [
        (lambda m, x, y: (m.train(), x, y), ["grad_sign"], "BatchNorm"),
        (lambda m, x, y: (m.train(), x, y), ["ntk_condition"], "BatchNorm"),
        (lambda m, x, y: (m, x * torch.nan, y), ["flops"], "inputs x"),
        (lambda m, x, y: (m, x[:0], y[:0]), ["flops"], "at least one sample"),
        (lambda m, x, y: (m, (x, x), y), ["flops"], "a tuple"),
        (lambda m, x, y: (m, x[:1], y[:1]), ["zico"], "two samples"),
        (lambda m, x, y: (m, x[:1], y[:1]), ["jacob_cov"], "2 to 63"),
        (lambda m, x, y: (m, x.repeat(8, 1, 1, 1), y.repeat(8)), ["jacob_cov"], "64 samples of 64 entries"),
        (lambda m, x, y: (m, x[:1].repeat(3, 1, 1, 1), y[:3]), ["ntk_condition"], "gradients of 3 samples is singular"),
        (lambda m, x, y: (m, x[:1].repeat(3, 1, 1, 1), y[:3]), ["naswot"], "have alike, of 3 samples is singular"),
        (lambda m, x, y: (nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), x, y), ["naswot"], "no ReLU"),
        (
            lambda m, x, y: (nn.Sequential(nn.Flatten(), Minus(), nn.Linear(64, 5)), x, y),
            ["synflow"],
            "path",
        ),
        (lambda m, x, y: (nn.Sequential(m, Total()), x, y), ["ntk_condition"], r"one tensor \[N, ...\] .* shape \[\]"),
        (lambda m, x, y: (m, x, y), ["gradsign"], "no proxy 'gradsign'"),
    ],
)
def test_what_is_not_defined_is_refused(change: Any, names: list[str], why: str) -> None:
    model, x, y = change(*problem("convolutional"))
    before = [p.grad for p in model.parameters()]
    with pytest.raises((px.PackextError, ValueError), match=why):
        scores(model, nn.CrossEntropyLoss(), x, y, names)
    assert [p.grad for p in model.parameters()] == before


class Total(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


class Minus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return -2 * self.inner(x)


def test_losses_that_give_no_gradient() -> None:
    model, x, y = problem("convolutional")
    with pytest.raises(px.PackextError, match="scalar"):
        scores(model, nn.CrossEntropyLoss(reduction="none"), x, y, ["grad_sign"])
    dead = nn.Sequential(model, Constant())
    for name in ("grad_sign", "ntk_condition"):
        with pytest.raises(px.PackextError, match="depends on no parameter"):
            scores(dead, nn.CrossEntropyLoss(), x, y, [name])
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(px.PackextError, match=r"0\.weight, of shape \[4, 1, 3, 3\], is not finite"):
        scores(model, nn.CrossEntropyLoss(), x, y)


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def test_a_proxy_that_is_not_defined_is_named_with_the_way_around_it() -> None:
    model, loss = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), nn.CrossEntropyLoss()
    x, y = torch.randn(5, 4), torch.arange(5) % 3
    with pytest.raises(px.PackextError, match="proxy 'naswot'; names=... takes others"):
        scores(model, loss, x, y, ["snip", "naswot"])
    assert scores(model, loss, x, y, ["snip"]).keys() == {"snip"}


def test_by_default_a_proxy_that_is_not_defined_is_absent_with_its_reason() -> None:
    class Named(nn.Sequential):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(x)}

    class Loss(nn.CrossEntropyLoss):
        def forward(self, output: dict[str, Tensor], y: Tensor) -> Tensor:
            return super().forward(output["logits"], y)

    loss, x, y = nn.CrossEntropyLoss(), torch.randn(3, 4).double(), torch.arange(3)
    smooth = nn.Sequential(nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 3))
    minus = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), Negated())
    named = Named(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    for model, loss_fn, absent in (
        (smooth, loss, {"naswot": "no ReLU"}),
        (minus, loss, {"synflow": "counts less than nothing"}),
        (named, Loss(), dict.fromkeys(("synflow", "jacob_cov", "ntk_condition"), "one tensor")),
    ):
        found = scores(model, loss_fn, x, y)
        assert list(found) == [name for name in PROXIES if name not in absent]
        assert found == scores(model, loss_fn, x, y, list(found)) == pickle.loads(pickle.dumps(found))
        assert found.undefined.keys() == absent.keys()
        for name, why in absent.items():
            assert why in found.undefined[name]
            with pytest.raises(KeyError, match=why):
                found[name]
            with pytest.raises(px.PackextError, match=f"{why}.*Asked by the proxy '{name}'"):
                scores(model, loss_fn, x, y, [name])
    with pytest.raises(KeyError, match="^'gradsign'$"):
        scores(smooth, loss, x, y)["gradsign"]
    with pytest.raises(px.CoupledSamplesError, match="BatchNorm"):  # of no network's score, but of its mode
        scores(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), loss, x, y)


class Negated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return -x
