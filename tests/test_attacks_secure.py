"""Labels through secure aggregation, what clients can do about it, and the sum itself."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import attacks, defences
from packext.attacks import secure

D = 16


class Block(nn.Module):
    """Residual: what its last normalisation fixes, the skip connection adds to."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.n1 = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)
        self.b, self.n2 = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.n2(self.b(torch.relu(self.n1(self.a(x))))) + x)


def mlp(c: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Linear(D, c))


def vgg(c: int) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, D, 3, padding=1), nn.BatchNorm2d(D)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, c))


def grouped(c: int) -> nn.Module:
    layers = [nn.Conv2d(3, D, 3, 2, 1), nn.GroupNorm(4, D), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(D, c))


def resnet(c: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, D, 3, 2, 1), Block(D), Block(D), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, c)
    )


def batches(clients: int, classes: int, low: int = 8, high: int = 40) -> list[tuple[Tensor, Tensor]]:
    """Of unequal sizes, with few classes each (Dirichlet 0.1)."""
    found = []
    for _ in range(clients):
        shares = torch.distributions.Dirichlet(torch.full((classes,), 0.1)).sample() + 1e-8
        n = int(torch.randint(low, high + 1, ()))
        found.append((torch.randn(n, 3, 8, 8), shares.multinomial(n, replacement=True)))
    return found


def attacked(
    model: nn.Module, classes: int, clients: int, reduction: str = "mean", after: Any = None, **kwargs: Any
) -> tuple[Tensor, attacks.secure.Counted, list[int]]:
    """True counts, found ones, and the sizes."""
    loss = nn.CrossEntropyLoss(reduction=reduction)
    attack = kwargs.pop("attack", attacks.SecureAggregationLabels())
    known = kwargs.pop("known", True)
    cohort = attacks.Cohort(model, loss, batches(clients, classes), **kwargs)
    plan = attack.plan(model, torch.randn(4, 3, 8, 8), clients)
    total = cohort.round(plan.states)
    total = total if after is None else after(attacks.Shared(total, 1, loss)).gradient
    found = attack.counts(plan, total, cohort.sizes if known else None, loss, cohort.weighted)
    return torch.stack([torch.bincount(y, minlength=classes) for _, y in cohort.batches]), found, cohort.sizes


@pytest.mark.parametrize("make", [mlp, vgg, grouped, resnet])
@pytest.mark.parametrize("clients", [8, D + 1])
@pytest.mark.parametrize("train", [True, False])
def test_every_client_s_labels_are_counted(make: Any, clients: int, train: bool) -> None:
    torch.manual_seed(0)
    model = make(100).train(train)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for weighted, reduction in itertools.product((False, True), ("mean", "sum")):
        true, found, sizes = attacked(model, 100, clients, reduction, weighted=weighted)
        assert (found.counts == true).all() and found.counts.sum(1).tolist() == sizes
        assert found.error.max() < (0.1 if make is resnet else 1e-3)
    assert all((v == before[k]).all() for k, v in model.state_dict().items())


def test_unknown_sizes() -> None:
    torch.manual_seed(0)
    attack = attacks.SecureAggregationLabels(magnitude=1.0)
    true, found, _ = attacked(vgg(100), 100, 5, "sum", known=False, attack=attack)
    assert (found.counts == true).all()
    with pytest.raises(px.PackextError, match='for reduction="sum"'):
        attacked(vgg(100), 100, 5, "mean", known=False)
    with pytest.raises(px.PackextError, match="without clipping and weights"):
        attacked(vgg(100), 100, 5, "sum", known=False, weighted=True)


class Described(nn.Module):
    """Has a table of the last layer's shape, which it does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.words = mlp(10), nn.Embedding(10, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_the_last_layer_is_that_of_the_plan() -> None:
    torch.manual_seed(0)
    true, found, _ = attacked(Described(), 10, 5)
    assert (found.counts == true).all() and found.error.max() < 1e-3


def test_no_more_than_d_plus_1_clients() -> None:
    with pytest.raises(px.PackextError, match=r"18 clients .*'4' \(BatchNorm2d, 16 channels\) .* in 17 .* at most 17"):
        attacks.SecureAggregationLabels().plan(vgg(10), torch.randn(4, 3, 8, 8), D + 2)


def test_no_more_than_the_normalisation_has_channels() -> None:
    """Where a channel becomes several features; or where D features are fewer."""
    torch.manual_seed(0)
    attack, x = attacks.SecureAggregationLabels(), torch.randn(4, 3, 8, 8)
    wide = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    narrow, plain = (
        nn.Sequential(*list(mlp(10))[:-1], nn.Linear(D, 7), nn.Linear(7, 10, bias=bias)) for bias in (True, False)
    )
    for model, limit in ((wide, 5), (narrow, 8), (plain, 7)):
        assert attack.limit(model) == limit and len(attack.plan(model, x, limit).states) == limit
        with pytest.raises(px.PackextError, match=f"{limit + 1} clients cannot be told apart"):
            attack.plan(model, x, limit + 1)


def test_a_skip_connection_weighs_less_the_larger_the_shift() -> None:
    torch.manual_seed(0)
    errors = []
    for magnitude in (0.3, 3.0, 300.0):
        torch.manual_seed(1)
        attack = attacks.SecureAggregationLabels(magnitude=magnitude)
        true, found, _ = attacked(resnet(10), 10, 8, attack=attack)
        spread = attack.plan(resnet(10), torch.randn(4, 3, 8, 8), 2).spread
        errors.append((int((found.counts - true).abs().sum()), float(found.error.mean()), spread))
    (wrong, first, some), (_, second, less), (right, third, least) = errors
    assert wrong > 0 == right and first > second > third and some > less > least > 0
    assert attacks.SecureAggregationLabels().plan(vgg(10), torch.randn(4, 3, 8, 8), 2).spread < 1e-6


# -- what clients can do ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"send": defences.Pruning(0.9)},
        {"send": defences.Quantisation("int8")},
        {"send": defences.Quantisation("bfloat16")},
        {"after": defences.GaussianNoise(1e-2)},
        {"send": defences.Compose(defences.Pruning(0.5), defences.Quantisation("float16"))},
    ],
    ids=str,
)
def test_what_does_not_stop_it(kwargs: Any) -> None:
    torch.manual_seed(0)
    true, found, _ = attacked(vgg(10), 10, 6, **kwargs)
    assert (found.counts == true).all()


def test_clipping_stops_only_who_does_not_know_it_and_noise_on_top_stops_all() -> None:
    torch.manual_seed(0)
    model = vgg(10).eval()
    aware = attacks.SecureAggregationLabels(magnitude=3.0, clip=1.0)
    true, found, _ = attacked(model, 10, 6, local=defences.Clipped(1.0), attack=aware)
    assert (found.counts == true).all() and found.error.max() < 1e-2
    naive = attacks.SecureAggregationLabels(magnitude=3.0)
    true, found, _ = attacked(model, 10, 6, local=defences.Clipped(1.0), attack=naive)
    assert (found.counts != true).any(1).all()
    true, found, _ = attacked(model, 10, 6, local=defences.Clipped(1.0, 1.0), attack=aware)
    assert (found.counts != true).any(1).all() and found.error.max() > 0.3


def test_normalisations_without_a_shift() -> None:
    """Are seen by the client, and passed over by the server."""
    torch.manual_seed(0)
    model = nn.Sequential(*list(mlp(10))[:-1], nn.RMSNorm(D), nn.LayerNorm(D, bias=False), nn.Linear(D, 10))
    true, found, _ = attacked(model, 10, 5)
    assert (found.counts == true).all()
    (state,) = attacks.SecureAggregationLabels().plan(model, torch.randn(4, 3, 8, 8), 1).states
    assert list(state) == ["2.weight", "2.bias"]
    for name in ("4", "5"):
        nn.init.zeros_(model.get_submodule(name).weight)  # type: ignore[arg-type]
    received = defences.check_received(model, nn.CrossEntropyLoss(), torch.randn(8, 3, 8, 8), torch.arange(8))
    assert received.zero_scales == ("4", "5") and received.suspicious


@pytest.mark.parametrize("make", [mlp, vgg, resnet])
def test_a_client_can_tell(make: Any) -> None:
    torch.manual_seed(0)
    model, loss = make(10), nn.CrossEntropyLoss()
    x, y = torch.randn(32, 3, 8, 8), torch.randint(10, (32,))
    honest = defences.check_received(model, loss, x, y)
    assert not honest.suspicious and honest.without_gradient == honest.zero_scales == ()
    plan = attacks.SecureAggregationLabels().plan(model, x, 3)
    model.load_state_dict(plan.states[1], strict=False)
    fishing = defences.check_received(model, loss, x, y)
    assert fishing.suspicious and len(fishing.reasons) == 3 and len(fishing.zero_scales) == 1
    assert fishing.feature_variance < 1e-2 * honest.feature_variance and fishing.rank_ratio < 1e-2 * honest.rank_ratio
    with pytest.raises(px.PackextError, match="1 label"):
        defences.check_received(model, loss, x, torch.zeros_like(y))


# -- the sum ------------------------------------------------------------------------------------------


def test_a_secure_sum_reveals_the_sum_alone() -> None:
    messages = [{"w": torch.randn(50, 40) * 1e-3, "b": torch.randn(3)} for _ in range(5)]
    total = secure.secure_sum(messages, bits=30)
    for name in ("w", "b"):
        torch.testing.assert_close(total[name], sum(m[name].double() for m in messages), rtol=0, atol=5 * 2.0**-31)
    sent = [m["w"].double() / 2.0**63 for m in secure.masked(messages, bits=30)]
    zeros = [{"w": 0 * m["w"], "b": m["b"]} for m in messages]
    other = [m["w"].double() / 2.0**63 for m in secure.masked(zeros, bits=30)]
    for wire, value in zip(sent, messages, strict=True):
        assert abs(float(wire.mean())) < 0.05 and abs(float(wire.std()) - 3**-0.5) < 0.02  # uniform on [-1, 1)
        assert abs(float(torch.corrcoef(torch.stack([wire.flatten(), value["w"].flatten().double()]))[0, 1])) < 0.1
    assert all(not (a == b).all() for a, b in zip(sent, other, strict=True))


def test_a_secure_sum_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(px.PackextError, match="same names and shapes"):
        secure.secure_sum([{"w": torch.zeros(2)}, {"w": torch.zeros(3)}])
    for value in (float("nan"), 1e15):
        with pytest.raises(px.PackextError, match="Client 1 sends .* 'w'"):
            secure.secure_sum([{"w": torch.zeros(2)}, {"w": torch.tensor([0.0, value])}])


def test_the_attack_refuses_what_does_not_fit() -> None:
    x = torch.randn(4, 3, 8, 8)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(px.PackextError, match="Sequential has no normalisation"):
        attacks.SecureAggregationLabels().plan(plain, x, 2)
    for name, kind in (("0", "Flatten"), ("1", "Linear"), ("2", "NoneType")):
        with pytest.raises(px.PackextError, match=rf"'{name}' \({kind}\) has no normalisation"):
            attacks.SecureAggregationLabels(norm=name).plan(plain, x, 2)
    with pytest.raises(px.PackextError, match="'1' is not the last layer"):
        attacks.SecureAggregationLabels(head="1").plan(mlp(10), x, 2)
    unused = mlp(10)
    unused[3].head = nn.Linear(16, 10)  # type: ignore[assignment, index] - which does not run
    with pytest.raises(px.PackextError, match="'3.head' is not the last layer"):
        attacks.SecureAggregationLabels(head="3.head").plan(unused, x, 2)
    attack, loss = attacks.SecureAggregationLabels(), nn.CrossEntropyLoss()
    plan = attack.plan(mlp(10), x, 2)
    summed, told = nn.CrossEntropyLoss(reduction="sum"), replace(attack, clip=1.0)
    for wrong, other in (({"loss_fn": loss}, attack), ({"weighted": True}, attack), ({}, told)):
        with pytest.raises(px.PackextError, match="pass sizes="):
            other.counts(plan, {"4.weight": torch.zeros(10, 16)}, None, **({"loss_fn": summed} | wrong))
    with pytest.raises(px.PackextError, match=r"'4', the last layer's weight \[10, 16\], is not in the sum, of 1"):
        attack.counts(plan, {"1.weight": torch.zeros(16, 192)}, [1, 1], loss)
    with pytest.raises(px.PackextError, match="'4' in the sum has entries that are not finite"):
        attack.counts(plan, {"4.weight": torch.full((10, 16), torch.nan)}, [1, 1], loss)
    broken = mlp(10)
    nn.init.constant_(broken[-1].bias, torch.nan)  # type: ignore[arg-type]
    with pytest.raises(px.PackextError, match="shift of 100 in '2' gives probabilities that are not finite"):
        attack.plan(broken, x, 2)
    with pytest.raises(px.PackextError, match="Labels are read off"):
        attack.counts(plan, {"4.weight": torch.zeros(10, 16)}, [1, 1], nn.MSELoss())
