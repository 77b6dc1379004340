"""Each controller against numbers that can be worked out by hand."""

from __future__ import annotations

import itertools
import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import packext as px
from packext import optim
from tests.control_cases import CASES, EACH, HALF, LOSS, Shift, noise, sgd, step
from tests.test_optim import data, network

pytestmark = pytest.mark.usefixtures("double")


class Given(px.Results):
    """Results that are known beforehand."""

    def __init__(self, **values: Any) -> None:
        super().__init__(())
        self.__dict__.update(values)


# -- |θ - x|² / 2 with x of variance s²: gradient θ, covariance s² I, curvature 1 --------------------------


def watched(control: Any, at: list[float], s: float, steps: int, n: int, args: Any = lambda loss: ()) -> Shift:
    model = px.extend(Shift(at))
    if isinstance(control, type(lambda: 0)):
        control = control(model)
    for seed in range(steps):
        model.zero_grad()
        x = noise(n, s, seed)
        with optim.emit(control):
            loss = HALF(model(x), torch.zeros_like(x))
            loss.backward()
        control.step(*args(loss))
    return model


def test_batch_sizes_of_a_quadratic_with_known_noise() -> None:
    """tr = 2 s² = 8, |G|² = 0.25, loss (0.25 + 8) / 2."""
    at, s = [0.3, 0.4], 2.0
    scale = optim.NoiseScale(2, decay=0.99)
    scale._steps, scale._averages = 1000, [8.0, 0.25]  # averages that have settled
    watched(scale, at, s, 40, 64)
    assert scale.noise_scale == pytest.approx(8 / 0.25, rel=0.2) and scale.batch_size == math.ceil(scale.noise_scale)
    norm = optim.NormTest(2, theta=2.0, decay=0.99)
    norm._steps, norm._averages = 1000, [8.0, 0.25]
    watched(norm, at, s, 40, 64)
    assert norm.batch_size == pytest.approx(8 / (4 * 0.25), rel=0.2)
    for theta, nu, expected in ((0.5, 5.84, 4 / (0.25 * 0.25)), (9.0, 0.5, 4 / (0.25 * 0.25)), (9.0, 9.0, 4)):
        inner = optim.InnerProductTest(4, theta=theta, nu=nu, decay=0.99)
        inner._steps, inner._averages = 1000, [8.0, 0.25, 4 * 0.25, 0.0625]
        watched(inner, at, s, 25, 64)
        assert inner.batch_size == pytest.approx(expected, rel=0.25), (theta, nu)

    def cabs(model: Shift) -> optim.CABS:
        made.append(optim.CABS(torch.optim.SGD(model.parameters(), 8.0), 2, decay=0.99))
        return made[0]

    made: list[optim.CABS] = []
    watched(cabs, at, s, 60, 64, lambda loss: (loss,))
    assert made[0].batch_size == pytest.approx(8 * 8 / 4.125, abs=1)


def test_where_nothing_but_noise_is_left_batches_grow_to_the_largest() -> None:
    """The plain tests pass there with a batch of 16 and a fitting theta, as noise inflates |g|² by tr / 16."""
    for control in (optim.NoiseScale(16, 256), optim.NormTest(16, 256), optim.InnerProductTest(16, 256)):
        model = px.extend(Shift([0.0, 0.0]))
        sizes = []
        for seed in range(28):
            x = noise(16, 1.0, seed)
            x = x - x.mean(0) * (seed % 2)  # half of the batches balanced: signals below 0
            with optim.emit(control):
                HALF(model(x), torch.zeros_like(x)).backward()
            before = control.batch_size
            control.step()
            sizes.append(control.batch_size)
            assert control.batch_size <= 2 * before
            waits = len(sizes) < round(1 / (1 - control.decay))
            assert control.batch_size == 16 or not waits
        assert sizes[-1] == 256, type(control).__name__
        resumed = type(control)(16, 64)
        resumed.load_state_dict(control.state_dict())
        assert resumed.batch_size == 64


def test_where_all_gradients_are_zero_batches_stay() -> None:
    """At a minimum of all samples there is no noise either, whatever a larger batch would be for."""
    for control in (optim.NoiseScale(16, 256), optim.NormTest(16, 256), optim.InnerProductTest(16, 256)):
        model, x = px.extend(Shift([0.0, 0.0])), torch.zeros(16, 2)
        for _ in range(28):
            with optim.emit(control):
                HALF(model(x), torch.zeros_like(x)).backward()
            control.step()
        assert control.batch_size == 16, type(control).__name__


def test_statistics_of_the_tests_are_unbiased() -> None:
    """Over 3,000 batches of 5; with the batch's own gradient in place of the true one they are far off."""
    draw, n = torch.Generator().manual_seed(0), 5
    root = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [0.0, -0.3, 0.5]])
    mean, covariance = torch.tensor([0.4, -0.2, 0.1]), root @ root.T
    g = mean + torch.randn(3_000, n, 3, generator=draw) @ root.T
    truth = torch.stack([covariance.trace(), mean @ mean, mean @ covariance @ mean, (mean @ mean) ** 2])
    control, other = optim.InnerProductTest(4), optim.NormTest(4)
    rows, norms = [], []
    for gram in g @ g.mT:
        seen = control.observe(Given(own_gram=gram))
        rows.append([v for k, v in seen.items() if k != "samples"])
        again = Given(own_norms=gram.diagonal(), own_sum=gram.sum())
        norms.append([other.observe(again)[k] for k in ("trace of the covariance", "norm of the gradient")])
    for found in (torch.tensor(rows), torch.tensor(norms)):
        z = (found.mean(0) - truth[: found.shape[1]]) / (found.std(0) / len(found) ** 0.5)
        assert z.abs().max() < 4, z
    mine = g.mean(1)
    dots = torch.einsum("kni,ki->kn", g, mine)
    naive = torch.stack([mine.square().sum(1), dots.var(1), mine.square().sum(1).square()], 1)
    z = (naive.mean(0) - truth[1:]) / (naive.std(0) / len(naive) ** 0.5)
    assert z.min() > 12, z


@pytest.mark.parametrize("name", ["CABS", "NoiseScale", "NormTest", "InnerProductTest"])
def test_statistics_are_those_of_gradients_one_by_one(name: str) -> None:
    model = network()
    optimizer = sgd(model)
    control = CASES[name][0](optimizer)
    expected: dict[str, float] = {}
    for seed in range(3):
        x, y = data(seed)
        rows = []
        for k in range(len(x)):
            loss = nn.functional.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        g = torch.stack(rows)
        trace = g.var(0).sum()
        now = {"_trace": trace}
        now["_loss"] = nn.functional.cross_entropy(model(x), y).detach()
        gram = g @ g.mT
        i, j, k, m = torch.tensor([*itertools.permutations(range(12), 4)]).unbind(1)
        fourth = (gram[i, j] * gram[k, m]).mean()
        along = (gram[i, j] * gram[i, k]).mean() - fourth
        now["_averages"] = torch.stack([trace, gram[i, j].mean(), along, fourth])
        decay = control.decay  # pyright: ignore[reportAttributeAccessIssue]
        expected = {k: decay * expected.get(k, 0.0) + (1 - decay) * v for k, v in now.items()}
        step(name, control, model, optimizer, (x, y))
    for key, value in control.state_dict().items():
        if key not in ("batch_size", "_steps"):
            found = torch.tensor(value)
            torch.testing.assert_close(found, expected[key][: len(found)] if found.dim() else expected[key])


# -- early stopping -------------------------------------------------------------------------------------------


def test_evidence_by_hand_and_under_pure_noise() -> None:
    control = optim.EvidenceStopping(patience=2)
    model = watched(control, [0.5, -0.1], 1.0, 1, 6)
    g = model.theta.detach() - noise(6, 1.0, 0)
    assert control.evidence == pytest.approx(float(1 - 6 * (g.mean(0).square() / g.var(0)).mean()))
    found = []
    for seed in range(200):  # 50 parameters of pure noise, batches of 16: the mean of t² is 15 / 13
        z = torch.randn(16, 50, generator=torch.Generator().manual_seed(seed))
        fields = SimpleNamespace(own_sum=z.sum(0), own_variance=z.var(0, correction=0))
        control._receive(Given(own_samples=16, items=lambda f=fields: [("p", f)]))
        control.step()
        found.append(control.evidence)
    assert sum(found) / len(found) == pytest.approx(-2 / 13, abs=0.05)


def test_stops_after_enough_positive_evidence_in_a_row() -> None:
    control = optim.EvidenceStopping(patience=2)
    model = px.extend(Shift([0.0, 0.0]))
    x = noise(8, 1.0, 0)
    said = []
    for shift in (0.0, 5.0, 0.0, 0.0, 0.0, 5.0):
        with optim.emit(control):
            HALF(model(x - x.mean(0) + shift), torch.zeros_like(x)).backward()
        said.append(control.step())
    assert said == [False, False, False, True, True, False] and not control.should_stop


def test_entries_without_gradient_say_nothing() -> None:
    control = optim.EvidenceStopping()
    model = px.extend(Shift([0.5, 0.0]))
    x = noise(6, 1.0, 0) * torch.tensor([1.0, 0.0])
    with optim.emit(control):
        HALF(model(x), torch.zeros_like(x)).backward()
    control.step()
    g = 0.5 - x[:, 0]
    assert control.evidence == pytest.approx(float(1 - 6 * g.mean() ** 2 / g.var()))


def test_a_round_of_passes_is_judged_together() -> None:
    """By hand, with parameters that move meanwhile, and a state that is saved halfway."""
    control, model, parts = optim.EvidenceStopping(1, samples=20), px.extend(Shift([0.5, -0.1])), []
    for k, n in enumerate((8, 7, 9)):  # 24 samples, of 20: more than one round
        x = noise(n, 1.0, k)
        parts.append(model.theta.detach() - x)
        with optim.emit(control):
            HALF(model(x), torch.zeros_like(x)).backward()
        assert control.evidence is None
        control.step()
        state, control = control.state_dict(), optim.EvidenceStopping(1, samples=20)
        control.load_state_dict(state)
        with torch.no_grad():
            model.theta += 0.1
    variance = sum((g - g.mean(0)).square().sum(0) for g in parts) / (7 + 6 + 8)
    expected = 1 - 24 * (torch.cat(parts).mean(0).square() / variance).mean()
    assert control.evidence == pytest.approx(float(expected)) and control.state_dict()["_round"] is None


def test_noise_that_is_fitted_is_seen_in_rounds_and_not_in_batches() -> None:
    """Where the gradient over all 64 samples is 0: batches of 8, by themselves and in rounds, with replacement too."""
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(0))
    x -= x.mean(0)
    found: dict[str, list[float]] = {}
    for name, samples in (("alone", None), ("rounds", 64), ("replaced", 64)):
        control, model = optim.EvidenceStopping(3, samples), px.extend(Shift([0.0] * 40))
        draw = torch.Generator().manual_seed(1)
        for _ in range(8):
            order = torch.randperm(64, generator=draw)
            if name == "replaced":
                order = torch.randint(64, (64,), generator=draw)
            for index in order.split(8):
                with optim.emit(control):
                    HALF(model(x[index]), torch.zeros(8, 40)).backward()
                control.step()
                if control.evidence is not None and (samples is None or control.state_dict()["_round"] is None):
                    found.setdefault(name, []).append(control.evidence)
        assert control.should_stop == (name == "rounds")
    assert found["rounds"] == pytest.approx([1.0] * 8)
    # t² of 8 samples has the mean 7 / 5, less the share 8 / 64 of the data that is not drawn anew.
    assert sum(found["alone"]) / len(found["alone"]) == pytest.approx(1 - 7 / 5 * 56 / 63, abs=0.1)
    assert abs(sum(found["replaced"]) / 8) < 0.2


def test_a_parameter_that_a_pass_does_not_use_has_a_gradient_of_zero_in_it() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Shift([0.5, 0.0]), Shift([1.0, 0.3])])

        def forward(self, x: torch.Tensor, which: int) -> torch.Tensor:
            return self.parts[which](x)

    control, model = optim.EvidenceStopping(1, samples=12), px.extend(Either())
    evidence = 0.0
    for k, start in enumerate(([0.5, 0.0], [1.0, 0.3])):
        x = noise(6, 1.0, k)
        with optim.emit(control):
            HALF(model(x, k), torch.zeros_like(x)).backward()
        control.step()
        g = torch.tensor(start) - x
        evidence += float(12 * (g.sum(0) / 12).square().div((g - g.mean(0)).square().sum(0) / 10).sum() / 4)
    assert control.evidence == pytest.approx(1 - evidence)


# -- samplers -------------------------------------------------------------------------------------------------


def test_a_data_loader_follows_the_batch_size() -> None:
    control = optim.NormTest(4)
    batches = optim.AdaptiveBatchSampler(range(20), control, drop_last=True)
    sizes = []
    for x in DataLoader(list(range(20)), batch_sampler=batches):  # pyright: ignore[reportArgumentType]
        sizes.append(x.tolist())
        control.batch_size += 2
    assert sizes == [list(range(4)), list(range(4, 10)), list(range(10, 18))]
    left = optim.AdaptiveBatchSampler(RandomSampler(range(5)), optim.NormTest(3))
    assert sorted(sum(left, [])) == list(range(5)) and [len(b) for b in left] == [3, 2]
    with pytest.raises(TypeError):
        len(left)  # pyright: ignore[reportArgumentType]


def test_importance_sampling_is_unbiased_and_scores_are_the_norms() -> None:
    x, y = data(n=10)
    model = network()
    sampler = optim.ImportanceSampler(10, 5)
    losses = EACH(model(x), y)
    rows = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(v, list(model.parameters()), retain_graph=True)])
            for v in losses
        ]
    )
    for _ in range(20):
        for index, each in ((torch.tensor(b), None) for b in sampler):
            with optim.emit(sampler):
                each = EACH(model(x[index]), y[index])
                (7 * sampler.loss(each, index)).backward()  # what else multiplies the loss is undone
            sampler.step()
    torch.testing.assert_close(sampler.scores, rows.norm(dim=1))
    p = 0.9 * rows.norm(dim=1) / rows.norm(dim=1).sum() + 0.01
    torch.testing.assert_close(sampler.probabilities, p)
    second = (rows.square().sum(1) / p).sum() / 10 / rows.square().sum()
    assert sampler.ratio == pytest.approx(float(second)) and sampler.ratio < 1
    estimates = []
    for _ in range(600):
        for batch in sampler:
            index = torch.tensor(batch)
            weights = sampler.loss(torch.ones(5, requires_grad=True), index)  # the mean weight
            estimates.append((rows[index] / (10 * p[index])[:, None]).mean(0))
            assert float(weights.detach()) == pytest.approx(float((1 / (10 * p[index])).mean()))
    found = torch.stack(estimates)
    z = (found.mean(0) - rows.mean(0)) / (found.std(0) / len(found) ** 0.5)
    assert z.abs().max() < 4, z


def test_weights_belong_to_the_batch_that_was_drawn() -> None:
    x, y = data(n=40)
    set_of = TensorDataset(x, y, torch.arange(40))
    model, sampler = network(), optim.ImportanceSampler(40, 8)
    sampler.scores = torch.rand(40)
    batches = list(DataLoader(set_of, batch_sampler=sampler))  # drawn ahead, as workers do
    p = sampler.probabilities
    for _, _, index in batches[1:]:  # the first is left out
        assert sampler.loss(torch.ones(8, requires_grad=True), index).item() == pytest.approx(
            float((1 / (40 * p[index])).mean())
        )
    for wrong, text in (
        (batches[0][2], "no batch that it drew and that waits"),
        (torch.arange(3), "8 losses, and indices of shape"),
    ):
        with pytest.raises((px.PackextError, ValueError), match=text):
            sampler.loss(torch.ones(8, requires_grad=True), wrong)
    with optim.emit(sampler):
        LOSS(model(x[:8]), torch.zeros(8, dtype=torch.long)).backward()
    with pytest.raises(px.PackextError, match="did not go through sampler.loss"):
        sampler.step()
    with pytest.raises(ValueError, match="ImportanceSampler of 40 samples got the state of one of 10"):
        sampler.load_state_dict(optim.ImportanceSampler(10, 5).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(sampler)) == len(sampler) == 5


def test_a_state_of_other_averages_is_refused() -> None:
    norm, inner = optim.NormTest(), optim.InnerProductTest()
    with pytest.raises(ValueError, match="InnerProductTest averages 4 estimates, and the state has 2: .* another"):
        inner.load_state_dict(norm.state_dict())
    with pytest.raises(ValueError, match="NormTest averages 2 estimates, and the state has 4"):
        norm.load_state_dict(inner.state_dict())
    with pytest.raises(ValueError, match="NormTest has the state batch_size.*, got nothing"):
        norm.load_state_dict({})
