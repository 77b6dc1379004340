"""Who knows what was done to a gradient: what is probable of it, and the search for the most probable inputs."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import packext as px
from packext import attacks, defences

pytestmark = pytest.mark.usefixtures("double")
LOSS, SHAPE = nn.CrossEntropyLoss(), (1, 8, 8)
KINDS = [("int8", False), ("int8", True), ("bfloat16", False), ("float16", False)]


@cache
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x).double().view(-1, *SHAPE) / 16, torch.tensor(y)


def net(seed: int) -> nn.Module:
    """Convolutions, so that nothing can be read off by division."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.Sigmoid(), nn.Conv2d(8, 8, 3, 2, 1), nn.Sigmoid(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    return model


def rms(shared: attacks.Shared) -> float:
    return float(torch.cat([g.flatten() for g in shared.gradient.values()]).square().mean().sqrt())


def others(k: int, n: int = 300) -> attacks.Prior:
    """Of n digits after the k-th."""
    return attacks.Prior.of(digits()[0][k + 1 : k + 1 + n])


def test_a_prior_is_a_normal_distribution() -> None:
    """With the covariance as Chen et al. (2010) shrink it; of samples fewer than entries, and of more."""
    for m, d in ((40, 7), (9, 20)):
        samples = torch.randn(m, d) @ torch.randn(d, d)
        prior, (x, z) = attacks.Prior.of(samples.view(m, d, 1)), torch.randn(2, 3, d)
        assert prior.mean.shape == (d, 1)
        s = torch.cov(samples.T, correction=0)
        trace, squares = s.trace(), (s @ s).trace()
        shrunk = ((1 - 2 / d) * squares + trace**2) / ((m + 1 - 2 / d) * (squares - trace**2 / d))
        assert 0 < shrunk < 1
        covariance = (1 - shrunk) * s + shrunk * trace / d * torch.eye(d)
        normal = torch.distributions.MultivariateNormal(samples.mean(0), covariance)
        want = normal.log_prob(z).sum() - normal.log_prob(x).sum()
        assert float(prior(x[..., None]) - prior(z[..., None])) == pytest.approx(float(want), rel=1e-9)


def test_a_prior_of_what_varies_in_all_directions_alike_and_not_at_all() -> None:
    prior = attacks.Prior.of(torch.tensor([[1.0], [3.0]]))  # of one entry: the variance, whatever is shrunk
    assert float(prior(torch.tensor([[4.0]]))) == pytest.approx(2.0)
    with pytest.raises(px.PackextError, match=r"5 sample\(s\) \[3\] do not vary"):
        attacks.Prior.of(torch.ones(5, 3))


def test_what_noise_costs() -> None:
    u, v = torch.randn(2, 1000)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob
    laplace = torch.distributions.Laplace(0.0, 1.0).log_prob
    for misfit, log, within in (
        (attacks.GaussianMisfit(0.3), normal, 1e-9),
        (attacks.LaplacianMisfit(0.3), laplace, 0.1),
    ):
        assert torch.equal(misfit.widths(u), torch.full_like(u, 0.3))
        assert ((misfit.cost(u) - misfit.cost(v)) - (log(v) - log(u))).abs().max() < within
    noise = {
        attacks.GaussianMisfit(0.3): defences.GaussianNoise(1.0, seed=0),
        attacks.LaplacianMisfit(0.3): defences.LaplacianNoise(1.0, seed=0),
    }
    for misfit, defence in noise.items():
        drawn = defence(attacks.Shared({"w": torch.zeros(10_000)}, 1, LOSS)).gradient["w"]
        assert misfit.fits(drawn) and not misfit.fits(1.1 * drawn)


@pytest.mark.parametrize(("kind", "stochastic"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_was_rounded_lies_in_its_cell(kind: str, stochastic: bool, dtype: torch.dtype) -> None:
    """Of entries of all sizes, also where a shorter float is denormal, or rounds to zero; and cells are no wider."""
    torch.manual_seed(0)
    misfit, defence = attacks.RoundingMisfit(kind, stochastic), defences.Quantisation(kind, stochastic, seed=0)
    for scale in (1.0, 1e-3, 1e-6):
        g = (scale * torch.randn(4000) * 10 ** (-6 * torch.rand(4000))).to(dtype)
        received = defence(attacks.Shared({"w": g}, 1, LOSS)).gradient["w"]
        u = ((g - received) / misfit.widths(received)).double()
        assert misfit.fits(u) and u.abs().max() > 0.9 and not misfit.fits(1.7 * u)
        assert misfit.cost(u).max() < 9 < misfit.cost(torch.tensor([3.0])) and bool((misfit.cost(u) >= 0).all())
    assert misfit.widths(torch.zeros(3)).isinf().all()  # a scale of nothing says nothing
    with pytest.raises(ValueError, match="kind must be"):
        attacks.RoundingMisfit("int4")


def test_the_barrier_of_a_cell_has_no_step() -> None:
    misfit = attacks.RoundingMisfit("int8")
    u = torch.linspace(-2, 2, 4001).requires_grad_()
    (slope,) = torch.autograd.grad(misfit.cost(u).sum(), u)
    assert bool((slope.diff() >= -1e-9).all()) and slope.diff().max() < 0.5
    assert misfit.cost(torch.tensor([0.5, -0.5])).tolist() == pytest.approx([-math.log(0.75)] * 2)


LEVELS: dict[str, tuple[Any, float]] = {
    "8 bits": (lambda size: defences.Quantisation("int8"), 4.0),
    "8 bits, stochastic": (lambda size: defences.Quantisation("int8", True, seed=0), 3.0),
    "bfloat16": (lambda size: defences.Quantisation("bfloat16"), 6.0),
    "Gaussian": (lambda size: defences.GaussianNoise(0.3 * size, seed=0), 4.0),
    "Laplacian": (lambda size: defences.LaplacianNoise(0.3 * size, seed=0), 4.0),
}


def misfit_of(defence: Any) -> attacks.Misfit:
    if isinstance(defence, defences.Quantisation):
        return attacks.RoundingMisfit(defence.kind, defence.stochastic)
    noise = isinstance(defence, defences.GaussianNoise)
    return attacks.GaussianMisfit(defence.std) if noise else attacks.LaplacianMisfit(defence.scale)


@pytest.mark.parametrize("name", LEVELS)
def test_who_knows_how_the_gradient_was_changed_finds_more(name: str) -> None:
    """By so many dB, in the mean of three digits, than the better of the searches that do not know."""
    gains = []
    for seed in range(3):
        model, (x, y) = net(seed), (t[seed, None] for t in digits())
        whole = attacks.share(model, LOSS, x, y)
        defence = LEVELS[name][0](rms(whole))
        shared = defence(whole)
        blind = [
            attacks.DeepLeakage(20)(model, shared, SHAPE, labels=y).inputs,
            attacks.InvertingGradients(200)(model, shared, SHAPE, y).inputs,
        ]
        attack = attacks.MaximumPosterior(misfit_of(defence), others(seed), blind)
        found = attack(model, shared, SHAPE, y)
        assert found.matched and 0 <= found.inputs.min() and found.inputs.max() <= 1
        gains.append(float(attacks.psnr(found.inputs, x)) - max(float(attacks.psnr(one, x)) for one in blind))
    assert sum(gains) / 3 > LEVELS[name][1]


def test_who_sees_nothing_but_noise_expects_the_mean() -> None:
    model, (x, y), prior = net(0), (t[:1] for t in digits()), others(0)
    whole = attacks.share(model, LOSS, x, y)
    std = 1e3 * rms(whole)
    found = attacks.MaximumPosterior(attacks.GaussianMisfit(std), prior)(
        model, defences.GaussianNoise(std, seed=0)(whole), SHAPE, y
    )
    assert (found.inputs - prior.mean.clamp(0, 1)).abs().max() < 0.02 and found.matched


def test_what_a_wrong_level_makes_of_noise_is_not_matched() -> None:
    model, (x, y) = net(0), (t[:1] for t in digits())
    whole = attacks.share(model, LOSS, x, y)
    shared = defences.GaussianNoise(rms(whole), seed=0)(whole)
    assert not attacks.MaximumPosterior(attacks.GaussianMisfit(0.5 * rms(whole)), others(0))(
        model, shared, SHAPE, y
    ).matched


def test_clipping_entries_that_were_not_sent_and_local_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5))
    x, y = torch.rand(1, 12), torch.tensor([3])
    exact = attacks.RoundingMisfit("float16")
    clipped = defences.Clipped(0.05)(model, LOSS, x, y)
    pruned = defences.Pruning(0.5)(attacks.share(model, LOSS, x, y))
    steps = attacks.LocalSteps(2, 0.1)
    update = attacks.share_update(model, LOSS, x, y, steps)
    how: dict[str, Any]
    for shared, how, mask in (
        (clipped, {"clip": 0.05}, None),
        (pruned, {}, attacks.sent(pruned)),
        (update, {"local": steps}, None),
    ):
        told = attacks.MaximumPosterior(exact, **how)
        seen: list[float] = []
        found = told(model, shared, (12,), y, mask=mask, progress=lambda i, v, seen=seen: seen.append(v))
        assert found.matched and (found.inputs - x).abs().max() < 1e-3
        assert len(seen) == len(found.objective) - 1 and min(found.objective) < found.objective[0]
        blind = attacks.MaximumPosterior(exact)(model, shared, (12,), y)
        assert not blind.matched and (blind.inputs - x).abs().max() > 1e-2


def test_the_most_probable_start_is_taken() -> None:
    model, (x, y) = net(0), (t[:1] for t in digits())
    shared = defences.Quantisation("int8")(attacks.share(model, LOSS, x, y))
    far, near = torch.rand(1, *SHAPE), (x + 0.01).clamp(0, 1)
    first, second = (
        attacks.MaximumPosterior(attacks.RoundingMisfit("int8"), starts=starts, iterations=1)(
            model, shared, SHAPE, y
        ).objective[0]
        for starts in ((far, near), (far,))
    )
    assert first < second


def test_what_does_not_fit_is_refused() -> None:
    model, (x, y) = net(0), (t[:2] for t in digits())
    shared = attacks.share(model, LOSS, x, y)
    misfit = attacks.GaussianMisfit(1.0)
    with pytest.raises(ValueError, match="of the gradient of one sample; what was shared is of 2"):
        attacks.MaximumPosterior(misfit, clip=1.0)(model, shared, SHAPE, y)
    with pytest.raises(ValueError, match="need iterations >= 1, low < high"):
        attacks.MaximumPosterior(misfit, low=1.0)
    with pytest.raises(ValueError, match=r"do not take inputs \[2, 3\]"):
        attacks.MaximumPosterior(misfit)(model, shared, (3,), y)
    for kind in (attacks.GaussianMisfit, attacks.LaplacianMisfit):
        with pytest.raises(ValueError, match="must be positive and finite, got 0"):
            kind(0.0)
    zeros = attacks.Shared({name: torch.zeros_like(g) for name, g in shared.gradient.items()}, 2, LOSS)
    with pytest.raises(px.PackextError, match="is zero: it tells nothing"):
        attacks.MaximumPosterior(misfit)(model, zeros, SHAPE, y)


def test_starts_and_priors_of_another_shape_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    shared = attacks.share(model, LOSS, torch.rand(1, 2, 2), torch.tensor([1]))
    search, y = attacks.GaussianMisfit(0.1), torch.tensor([1])
    with pytest.raises(ValueError, match=r"a start is \[1, 4\]; searched for is \[1, ...\] with inputs of \[2, 2\]"):
        attacks.MaximumPosterior(search, starts=[torch.rand(1, 2, 2), torch.rand(1, 4)])(model, shared, (2, 2), y)
    with pytest.raises(ValueError, match=r"the prior is of inputs \[4\]"):
        attacks.MaximumPosterior(search, attacks.Prior.of(torch.rand(5, 4)))(model, shared, (2, 2), y)
    with pytest.raises(ValueError, match=r"each in the shape of an input; got \[5\]"):
        attacks.Prior.of(torch.rand(5))
    with pytest.raises(px.PackextError, match="not finite: leave them out"):
        attacks.Prior.of(torch.tensor([[1.0], [torch.nan]]))
    with pytest.raises(ValueError, match='stochastic is of "int8" alone'):
        attacks.RoundingMisfit("float16", stochastic=True)
