"""Canary gradients: what they say of a private training, and of one that only claims to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import packext as px
from packext.attacks import GradientCanaries
from packext.optim import DPSGD, AdaptiveClipping, DPAdam, PoissonSampler, epsilon
from packext.optim._private import _Clipped

STEPS, SAMPLES, BATCH = 4, 40, 20.0


def trained(kind: Any = DPSGD, z: float = 3.0, seed: int = 0, rate: float = 0.5, **options: Any) -> GradientCanaries:
    """A small network trained with canaries."""
    torch.manual_seed(seed)
    model = px.extend(nn.Sequential(nn.Linear(30, 60), nn.Tanh(), nn.Linear(60, 4)))
    loss, x = px.extend(nn.CrossEntropyLoss()), torch.randn(SAMPLES, 30)
    y = torch.randint(4, (SAMPLES,))
    settings = {"max_norm": 1.0, "noise_multiplier": z, "expected_batch_size": BATCH, "seed": seed, **options}
    optimizer = kind(model.named_parameters(), 0.01, **settings)
    canaries = GradientCanaries(optimizer, 300, rate, seed=seed + 100)
    for index in PoissonSampler(SAMPLES, rate, STEPS, torch.Generator().manual_seed(seed)):
        if index:
            with px.optim.emit(optimizer):
                loss(model(x[index]), y[index]).backward()
        canaries.step()
    return canaries


def test_the_scores_are_those_of_the_definition() -> None:
    """One step without noise: inner products of directions with the sum of clipped canaries."""
    model, loss = px.extend(nn.Linear(30, 20).double()), px.extend(nn.CrossEntropyLoss())
    optimizer = DPSGD(model.parameters(), 0.1, max_norm=2.0, noise_multiplier=0.0, expected_batch_size=4.0)
    canaries = GradientCanaries(optimizer, 12, entries=400, seed=3)
    values: list[Tensor] = []

    def closure() -> Tensor:
        with px.optim.emit(optimizer):
            values.append(loss(model(torch.randn(4, 30).double()), torch.arange(4)))
            values[0].backward()
        samples.extend(s.float().flatten() for s in optimizer.pending)
        return values[0]

    samples: list[Tensor] = []
    assert canaries.step(closure) is values[0] and len(values) == 1
    v = torch.zeros(12, 620)
    v[:, canaries._at] = canaries.directions
    assert len(canaries._at.unique()) == 400 and 0 < int(canaries.included.sum()) < 12
    torch.testing.assert_close(v.norm(dim=1), torch.ones(12))
    sums = 2.0 * v[canaries.included].sum(0)  # ten times as long before they were clipped
    torch.testing.assert_close(canaries.scores.float(), v @ sums, rtol=1e-5, atol=1e-6)
    grads = torch.cat([p.grad.flatten().float() for p in model.parameters()])  # type: ignore[union-attr]
    assert torch.cat(samples).any()
    torch.testing.assert_close(grads * 4, sums + torch.cat(samples), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"kind": DPAdam}, {"per_layer": True}, {"adaptive": AdaptiveClipping(count_noise=5.0)}]
)
def test_a_sound_training_keeps_its_claim(options: Any) -> None:
    pytest.importorskip("dp_accounting")
    canaries = trained(**options)
    claimed = epsilon(canaries.optimizer.spent, SAMPLES, 1e-5)
    assert canaries.audit(1e-5).epsilon <= claimed < 4


def test_the_bound_is_not_idle() -> None:
    """With noise that claims much, in every step, something is found; and less than is claimed."""
    pytest.importorskip("dp_accounting")
    canaries = trained(z=0.5, rate=1.0, expected_batch_size=40.0)
    found = canaries.audit(1e-5)
    assert 1.0 < found.epsilon < epsilon(canaries.optimizer.spent, SAMPLES, 1e-5)


def forgets_noise(o: Any) -> None:
    noisy = type(o)._noisy
    o._noisy = lambda totals, std, *divisor: noisy(o, totals, 0.0, *divisor)


def noise_of_the_mean(o: Any) -> None:
    """Drawn as if the batch's size had been divided by already."""
    noisy = type(o)._noisy
    o._noisy = lambda totals, std, *divisor: noisy(o, totals, std / BATCH, *divisor)


def does_not_clip(o: Any) -> None:
    """The norm that clips is not the one that noise is for."""
    o.contribute = lambda rows: o._add([r.sum(0) for r in rows], _Clipped(o.max_norm))


@pytest.mark.parametrize("defect", [forgets_noise, noise_of_the_mean, does_not_clip])
def test_a_defect_is_found(defect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is above what the optimizer claims."""
    pytest.importorskip("dp_accounting")
    begin = GradientCanaries.__init__

    def broken(self: Any, optimizer: Any, *args: Any, **options: Any) -> None:
        defect(optimizer)
        begin(self, optimizer, *args, **options)

    monkeypatch.setattr(GradientCanaries, "__init__", broken)
    canaries = trained(rate=1.0, z=4.0, expected_batch_size=40.0)
    assert canaries.audit(1e-5).epsilon > epsilon(canaries.optimizer.spent, SAMPLES, 1e-5) > 1.0


def test_what_is_chosen_after_looking_is_paid_for() -> None:
    canaries = trained(z=0.5, rate=1.0, expected_batch_size=40.0)
    order = canaries.scores.argsort()
    right = int(canaries.included[order[-30:]].sum() + (~canaries.included[order[:30]]).sum())
    one, several = canaries.audit(1e-5, 60), canaries.audit(1e-5, [60, 2])
    assert one.correct == right and (one.guesses, one.canaries) == (60, 300)
    assert several.epsilon < one.epsilon
    odd = canaries.audit(1e-5, 3)
    assert odd.guesses == 3 and odd.correct <= 3
    private = DPSGD(nn.Linear(3, 2).parameters(), max_norm=1.0, noise_multiplier=1.0, expected_batch_size=4.0)
    assert GradientCanaries(private, 1).audit(1e-5).guesses == 1
    for wrong in (0, 301, []):
        with pytest.raises(ValueError, match="from 1 to the 300 canaries"):
            canaries.audit(1e-5, wrong)


def test_a_step_may_have_no_canary() -> None:
    """By chance, as rates are small; nor need it have samples."""
    model = nn.Linear(30, 4)
    optimizer = DPSGD(model.parameters(), 0.1, max_norm=1.0, noise_multiplier=1.0, expected_batch_size=4.0)
    canaries = GradientCanaries(optimizer, 3, rate=1e-9)
    before = model.weight.detach().clone()
    canaries.step()
    assert (model.weight != before).all() and optimizer.spent[0].steps == 1


def test_canaries_do_not_hide_a_forgotten_context() -> None:
    model, loss = px.extend(nn.Linear(30, 4)), px.extend(nn.CrossEntropyLoss())
    optimizer = DPSGD(model.parameters(), 0.1, max_norm=1.0, noise_multiplier=1.0, expected_batch_size=4.0)
    canaries = GradientCanaries(optimizer, 10)
    loss(model(torch.randn(4, 30)), torch.zeros(4, dtype=torch.long)).backward()
    with pytest.raises(px.PackextError, match="run backward\\(\\) there"):
        canaries.step()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = DPSGD(nn.Linear(3, 2).parameters(), max_norm=1.0, noise_multiplier=1.0, expected_batch_size=4.0)
    for wrong in ({"count": 0}, {"rate": 0.0}, {"rate": 1.5}, {"multiple": -1.0}, {"entries": 0}):
        with pytest.raises(ValueError, match="need count >= 1"):
            GradientCanaries(optimizer, **wrong)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(px.PackextError, match="in one process"):
        GradientCanaries(optimizer)
