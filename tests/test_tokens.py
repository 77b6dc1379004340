"""Tokens in the place of samples, against a model in which every token has parameters of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packext as px

N, T, D, V = 3, 5, 8, 11


class Model(nn.Module):
    """A transformer of one block; written so that each parameter may have a value for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, D), nn.Parameter(torch.randn(T, D))
        self.norm, self.act = nn.LayerNorm(D), nn.PReLU()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D, bias=False)
        self.wide, self.narrow = nn.Linear(D, 2 * D), nn.Parameter(torch.randn(2 * D, D) / 4)
        self.scale, self.head = nn.Parameter(torch.rand(D)), nn.Linear(D, V)

    def forward(self, ids: Tensor, keep: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(attend(q, k, v, keep))
        x = x + self.act(self.wide(x)) @ self.narrow
        return self.head(x * self.scale)


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.mT / D**0.5).masked_fill(~keep[:, None], -1e9)
    return scores.softmax(-1) @ v


def apart(p: dict[str, Tensor], ids: Tensor, keep: Tensor) -> Tensor:
    """The same with parameters `[N, T, *shape]`."""
    x = torch.gather(p["wte.weight"], 2, ids[..., None, None].expand(N, T, 1, D))[:, :, 0]
    x = x + p["wpe"][:, torch.arange(T), torch.arange(T)]
    h = F.layer_norm(x, (D,)) * p["norm.weight"] + p["norm.bias"]
    q, k, v = (torch.einsum("ntoi,nti->nto", p["qkv.weight"], h) + p["qkv.bias"]).chunk(3, -1)
    x = x + torch.einsum("ntoi,nti->nto", p["out.weight"], attend(q, k, v, keep))
    h = torch.einsum("ntoi,nti->nto", p["wide.weight"], x) + p["wide.bias"]
    h = torch.where(h > 0, h, h * p["act.weight"])
    x = x + torch.einsum("ntio,nti->nto", p["narrow"], h)
    return torch.einsum("ntoi,nti->nto", p["head.weight"], x * p["scale"]) + p["head.bias"]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    return torch.randint(V, (N, T)), torch.randint(V, (N, T)), keep


def rows(model: Model, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradients `[N, T, *shape]` of tokens by parameter."""
    ids, _, keep = batch()
    own = {k: p.detach().expand(N, T, *p.shape).clone().requires_grad_() for k, p in model.named_parameters()}
    grads = torch.autograd.grad(loss(apart(own, ids, keep)), list(own.values()))
    return dict(zip(own, grads, strict=True))


def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def ignored() -> Callable[[Tensor], Tensor]:
    _, y, keep = batch()
    return lambda z: px.extend(nn.CrossEntropyLoss())(z.flatten(0, 1), y.masked_fill(~keep, -100).flatten())


def run(m: Model, loss: Callable[[Tensor], Tensor], *quantities: Any, **how: Any) -> Any:
    ids, _, keep = batch()
    with px.backpack(*quantities, per="token", **how) as results:
        loss(m(ids, keep)).backward()
    return results


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [N, 1])
def test_each_token(masked: bool, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    m = px.extend(model())
    if count == 1:
        whole = batch()
        monkeypatch.setattr("tests.test_tokens.N", 1)
        monkeypatch.setattr("tests.test_tokens.batch", lambda: tuple(t[1:2] for t in whole))
    keep = batch()[2]
    want = {k: r[keep] if masked else r.flatten(0, 1) for k, r in rows(model(), ignored()).items()}
    quantities = (px.BatchGrad(), px.BatchL2Grad(), px.Variance(), px.SumGradSquared(), px.BatchDotGrad())
    results = run(m, ignored(), *quantities, mask=keep if masked else None)
    assert set(results) == set(want)
    for name, r in want.items():
        got, flat = results[name], r.flatten(1)
        torch.testing.assert_close(got.grad_batch, r, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got.batch_l2, flat.square().sum(1), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(got.variance, r.var(0, correction=0), rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(got.sum_grad_squared, r.square().sum(0), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(got.batch_dot, flat @ flat.T, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(m.get_parameter(name).grad, r.sum(0), rtol=1e-10, atol=1e-12)


def test_scale_of_the_tokens_own_losses() -> None:
    """The mean is over the tokens that count; a factor of the loss is none of theirs."""
    m, keep = px.extend(model()), batch()[2]
    want = rows(model(), lambda z: F.cross_entropy(z.flatten(0, 1), batch()[1].masked_fill(~keep, -100).flatten()))
    results = run(m, lambda z: 0.5 * ignored()(z), px.BatchGrad(), mask=keep, scale="sample")
    for name, r in want.items():
        torch.testing.assert_close(results[name].grad_batch, r[keep] * keep.sum(), rtol=1e-10, atol=1e-12)


class Shaped(nn.Module):
    """A perceptron of tokens, in one of the ways in which they may lie."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.first, self.norm, self.last = way, nn.Linear(4, 7), nn.LayerNorm(7), nn.Linear(7, 3)
        self.gain = nn.Parameter(torch.rand(7))

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[:2]
        if self.way == "folded":
            x = x.flatten(0, 1)
        elif self.way == "turned and folded":
            x = x.transpose(0, 1).flatten(0, 1)
        elif self.way == "turned":
            x = x.transpose(0, 1)
        x = self.last(self.gain * self.norm(self.first(x)).tanh())
        if self.way == "folded":
            return x.unflatten(0, shape)
        if self.way == "turned and folded":
            return x.unflatten(0, shape[::-1]).transpose(0, 1)
        return x.transpose(0, 1) if self.way == "turned" else x


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", ["as it is", "folded", "turned and folded", "turned"])
@pytest.mark.parametrize("axis", [0, 1])
def test_ways_in_which_tokens_lie(way: str, axis: int, masked: bool) -> None:
    """Without a function that mixes tokens, each is a sample of its own."""
    torch.manual_seed(0)
    m, keep = px.extend(Shaped(way).double(), batch_axis=axis), batch()[2]
    x = torch.randn(N, T, 4).double()
    y = torch.randn(N, T, 3).double()

    def loss(z: Tensor) -> Tensor:
        z = z if axis == 0 else z.transpose(0, 1)
        return ((z - y).square().sum(-1) * keep).sum()

    with px.backpack(px.BatchGrad(), px.Variance(), per="token", mask=keep if masked else None) as results:
        loss(m(x if axis == 0 else x.transpose(0, 1))).backward()
    plain = Shaped("as it is").double()
    plain.load_state_dict(m.state_dict())
    for name, p in plain.named_parameters():
        want = [
            torch.autograd.grad((plain(x[n, t][None, None])[0, 0] - y[n, t]).square().sum() * keep[n, t], p)[0]
            for n in range(N)
            for t in range(T)
            if keep[n, t] or not masked
        ]
        torch.testing.assert_close(results[name].grad_batch, torch.stack(want), rtol=1e-10, atol=1e-12)


def test_passes_add_up() -> None:
    m, keep = px.extend(model()), batch()[2]
    want = rows(model(), ignored())
    with px.backpack(px.BatchGrad(), px.Variance(), per="token", mask=keep, accumulate=True) as results:
        for _ in range(2):
            ignored()(m(batch()[0], keep)).backward()
    for name, r in want.items():
        both = torch.cat([r[keep], r[keep]])
        torch.testing.assert_close(results[name].grad_batch, both, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(results[name].variance, both.var(0, correction=0), rtol=1e-9, atol=1e-14)


def test_masked_tokens_that_have_a_gradient() -> None:
    _, y, keep = batch()
    with pytest.raises(px.PackextError, match="mask leaves out have a gradient in .*head"):
        run(px.extend(model()), lambda z: F.cross_entropy(z.flatten(0, 1), y.flatten()), px.BatchGrad(), mask=keep)


class Pooled(nn.Module):
    def __init__(self, body: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head((x[0] if isinstance(x, tuple) else x).mean(1))


class Channels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT).mT


class Mixer(nn.Module):
    """Maps along the tokens, of which there are as many as channels."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.mix, self.how = nn.Linear(4, T), nn.Linear(T, 3, bias=False), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.how == "from the left":
            return self.mix.weight @ x
        return self.mix(x.mT if self.how == "as they are" else x.mT.flatten(0, 1))


@pytest.mark.parametrize(
    ("m", "where"),
    [
        *((Mixer(how), "mix") for how in ("as they are", "folded", "from the left")),
        (Pooled(nn.Linear(4, 4)), "head"),
        (Pooled(Channels()), "body.conv"),
        (Pooled(nn.LSTM(4, 4, batch_first=True)), "body"),
        (Pooled(nn.Linear(4, T), T), "body"),
    ],
    ids=["mixed", "mixed, folded", "mixed, left", "pooled", "convolution", "recurrent", "as many features as tokens"],
)
def test_uses_that_do_not_tell_tokens_apart(m: nn.Module, where: str) -> None:
    px.extend(m)
    chosen = [p for name, p in m.named_parameters() if name.startswith(where)]
    with pytest.raises(px.UnsupportedUseError, match=rf"{where}.* does not tell the {T} tokens"):
        with px.backpack(px.BatchGrad(), per="token", parameters=chosen):
            m(torch.randn(N, T, 4)).sum().backward()
    assert not any(hasattr(p, "grad_batch") for p in m.parameters())


def test_parameters_can_be_left_out() -> None:
    m = px.extend(Pooled(nn.Linear(4, 4)))
    with px.backpack(px.BatchL2Grad(), per="token", parameters=m.body.parameters()) as results:
        m(torch.randn(N, T, 4)).sum().backward()
    assert results["body.weight"].batch_l2.shape == (N * T,)


def test_what_makes_no_sense() -> None:
    keep = batch()[2]
    with pytest.raises(ValueError, match='per must be "sample" or "token"'):
        px.backpack(px.BatchGrad(), per="word")
    with pytest.raises(ValueError, match="KFAC.*no sum over tokens"):
        px.backpack(px.BatchGrad(), px.KFAC(), per="token")
    for wrong, per in ((keep, "sample"), (keep.long(), "token"), (keep[0], "token")):
        with pytest.raises(ValueError, match="mask goes with"):
            px.backpack(px.BatchGrad(), per=per, mask=wrong)
    with pytest.raises(px.PackextError, match="of 2 samples; there are 3"):
        run(px.extend(model()), ignored(), px.BatchGrad(), mask=keep[:2])
    with pytest.raises(px.PackextError, match="and 0 count in all"):
        run(px.extend(model()), ignored(), px.BatchGrad(), mask=torch.zeros_like(keep))
    m = px.extend(nn.Linear(4, 2))
    with pytest.raises(px.PackextError, match="these have 1"):
        with px.backpack(px.BatchGrad(), per="token"):
            m(torch.randn(N, 1, 4)).sum().backward()
