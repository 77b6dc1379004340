"""Quantities of curvature on every case against a loop over samples and columns, in float64."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils.checkpoint import checkpoint

import packext as px
from packext import _columns, _places, testing
from packext._refusals import knows_weight_norm
from tests.cases import CASES, Case, Packed, Routed
from tests.helpers import mlp
from tests.test_saved import Live

#: torch's own advice on even kernels, for the plain model as well.
pytestmark = [pytest.mark.usefixtures("double"), pytest.mark.filterwarnings("ignore:Using padding='same'")]
N = 4


def quantities() -> list[Any]:
    return [px.DiagGGNExact(), px.BatchDiagGGNExact(), px.SqrtGGNExact()]


def compare(model: nn.Module, rows: testing.Rows, factor: float = 1.0) -> None:
    """Compare what is attached to the parameters with rows of the GGN's root."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scaled = {name: r * factor**0.5 for name, r in rows.items()}
    reference = object.__new__(testing.Reference)
    vars(reference).update(roots=scaled, parameters=named)
    for quantity in quantities():
        definition = testing.CURVATURE_ORACLES[type(quantity)]
        results = {k: getattr(p, quantity.savefield) for k, p in named.items() if hasattr(p, quantity.savefield)}
        for name in named:
            (want,) = definition.wanted(quantity, reference, name)
            if name not in results:
                assert not want.any(), (name, quantity)
                continue
            (got,) = definition.read(quantity, reference, results, name)
            assert testing.relative_error(got, want) < 1e-8, (name, quantity)


def curved(case: Case) -> bool:
    """Whether the loss is curved, in something that torch takes apart."""
    return isinstance(case.loss(), (nn.CrossEntropyLoss, nn.MSELoss)) and case.name != "output data class"


@pytest.mark.parametrize("at_once", [True, False], ids=["columns at once", "one by one"])
@pytest.mark.parametrize("case", [c for c in CASES if curved(c)], ids=lambda c: c.name)
def test_the_ggn_on_every_case(case: Case, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:
        monkeypatch.setattr(_columns, "LARGEST", 0)
    model, inputs, targets = case.build()
    weights = None if case.weights is None else case.weights(targets)
    reference = testing.Reference(model, case.loss(), inputs, targets, case.batch_axis, weights)
    report = testing.against(reference, [*quantities(), px.GGNGram(), px.BatchGrad(), px.DiagEF()])
    assert report.ok, str(report)
    assert all(entry.tolerance < 1e-6 for entry in report)


def run(model: nn.Module, loss: nn.Module, x: Any, y: Any, *asked: Any, **options: Any) -> px.Results:
    """One step of an extended model and loss."""
    px.extend(model)
    px.extend(loss)
    model.zero_grad()
    with px.backpack(*asked, **options) as results:
        loss(model(x), y).backward()
    return results


# -- losses between the model and the loss, and beside it ----------------------------------------------------


class Tokens(nn.Module):
    """Logits of every position, `[N, T, C]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 4), nn.LayerNorm(4)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x))
        return self.head(h + self.mix(h.cumsum(1)).tanh())


@pytest.mark.parametrize("steps", [N, 3])
@pytest.mark.parametrize("fold", ["sample-major", "time-major", "classes second"])
def test_a_loss_on_tokens(fold: str, steps: int) -> None:
    model, x, y = Tokens(), torch.randint(7, (N, steps)), torch.randint(3, (N, steps))
    loss = nn.CrossEntropyLoss()
    rows = testing.curvature_rows(model, lambda z, t: loss(z.mT, t), x, y, weights=[1 / N] * N)
    px.extend(model)
    px.extend(loss)
    with px.backpack(*quantities()):
        z = model(x)
        if fold == "classes second":
            loss(z.mT, y).backward()
        elif fold == "sample-major":
            loss(z.reshape(-1, 3), y.flatten()).backward()
        else:
            loss(z.transpose(0, 1).reshape(-1, 3), y.T.flatten()).backward()
    compare(model, rows)


def test_moves_between_model_and_loss_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where samples are behind a transposition follows from it; of other functions it is found out in each pass."""
    sent: list[int] = []
    look = _places.probe_inputs
    monkeypatch.setattr(_places, "probe_inputs", lambda *a: sent.append(1) or look(*a))
    monkeypatch.setattr(_places, "_MOVED", {})
    model, loss = px.extend(Tokens()), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randint(7, (N, N)), torch.randint(3, (N, N))
    ways = {
        "classes second": lambda z: (z.mT, y),
        "time-major": lambda z: (z.transpose(0, 1).reshape(-1, 3), y.T.flatten()),
        "by one": lambda z: (1.0 * z.mT, y),
    }
    plain = Tokens()
    plain.load_state_dict(model.state_dict())
    rows = testing.curvature_rows(plain, lambda z, t: nn.CrossEntropyLoss()(z.mT, t), x, y, weights=[1 / N] * N)
    for k in range(3):
        for way, meet in ways.items():
            before = len(sent)
            with px.backpack(px.DiagGGNExact()):
                loss(*meet(model(x))).backward()
            assert (len(sent) > before) == (k == 0 or way == "by one"), (way, k)
            for name, p in model.named_parameters():
                want = rows[name].square().flatten(0, 1).sum(0)
                assert testing.relative_error(p.diag_ggn_exact, want) < 1e-8, (way, name)


def test_a_moved_batch_is_not_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two moves of one shape, which leave the samples along different axes."""
    monkeypatch.setattr(_places, "_MOVED", {})
    plain = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, N))
    x, y = torch.randint(7, (N, N)), torch.randn(N, N, N)
    rows = testing.curvature_rows(plain, nn.MSELoss(), x, y, weights=[1 / N] * N)
    model, loss = px.extend(copy.deepcopy(plain)), px.extend(nn.MSELoss())
    axes = [*itertools.permutations(range(3))]
    for _ in range(2):
        moves = [lambda z, a=a: z.permute(a) for a in axes]
        moves += [lambda z, a=a: z.transpose(*a) for a in ((0, 1), (1, 2), (0, 2))]
        moves += [lambda z, a=a: z.unsqueeze(a) for a in (0, 1, -1)]
        moves += [lambda z, a=a: z.view(a) for a in ((N, N * N), (N * N, N))] + [lambda z: z.clone()]
        for k, move in enumerate(moves):
            with px.backpack(px.DiagGGNExact()):
                loss(move(model(x)), move(y)).backward()
            for name, p in model.named_parameters():
                want = rows[name].square().flatten(0, 1).sum(0)
                assert testing.relative_error(p.diag_ggn_exact, want) < 1e-8, (name, k)


def test_what_mixes_samples_before_the_loss_is_refused() -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    loss = px.extend(nn.CrossEntropyLoss())
    px.extend(model)
    with pytest.raises(px.CoupledSamplesError, match="influence each other"), px.backpack(px.DiagGGNExact()):
        z = model(x)
        loss(z - z.mean(0), y).backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("which", range(N))
def test_one_sample_that_sees_the_others_is_refused(which: int) -> None:
    """Whichever it is, the first as well, whose index has no binary digit."""
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    loss = px.extend(nn.CrossEntropyLoss())
    px.extend(model)
    with pytest.raises(px.CoupledSamplesError, match="influence each other"), px.backpack(px.DiagGGNExact()):
        z = model(x)
        rows = torch.arange(N)[:, None] == which
        loss(torch.where(rows, z.mean(0), z), y).backward()
    assert all(p.grad is None for p in model.parameters())


def test_multiples_and_sums_of_losses() -> None:
    model, x = mlp(), torch.randn(N, 5)
    y, t = torch.randint(3, (N,)), torch.randn(N, 3)
    first, second = nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")
    one = testing.curvature_rows(model, first, x, y, weights=[0.5 / N] * N)
    two = testing.curvature_rows(model, second, x, t, weights=[3.0] * N)
    px.extend(model)
    px.extend(first)
    px.extend(second)
    with px.backpack(*quantities()):
        z = model(x)
        (0.5 * first(z, y) + 3 * second(z, t)).backward()
    compare(model, {k: torch.cat([one[k], two[k]]) for k in one})


class Two(nn.Module):
    """Logits, and features beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x).tanh()
        return self.second(h), h


@pytest.mark.parametrize("where", ["logits", "features", "none"])
def test_curvature_of_a_part_of_what_is_minimised_is_refused(where: str) -> None:
    model, loss_fn, x, y = px.extend(Two()), px.extend(nn.CrossEntropyLoss()), torch.randn(N, 5), torch.arange(N) % 3
    terms = {"logits": lambda z, h: z.exp().mean(), "features": lambda z, h: h.square().sum(), "none": lambda *_: 0.0}

    def run(quantity: Any) -> None:
        with px.backpack(quantity):
            z, h = model(x)
            decay = sum(p.square().sum() for p in model.parameters())  # passes by the outputs
            (2 * loss_fn(z / 3, y) + terms[where](z, h) + 0.1 * decay).backward()

    whole = [
        px.DiagGGNExact(),
        px.KFLR(),
        px.DiagHessian(),
        px.HessianTrace(),
        px.HMP(),
        px.GGNMP(),
        px.TopEigenvalues(1),
    ]
    for quantity in whole:
        if where == "none":
            run(quantity)
            continue
        with pytest.raises(px.PackextError, match=f"{type(quantity).__name__} asked for.*other terms.*whole loss"):
            run(quantity)
        assert not any(hasattr(p, quantity.savefield) for p in model.parameters())
    for quantity in (px.DiagGGNMC(), px.KFAC(), px.KFAC(fisher="empirical"), px.DiagEF(), px.BatchGrad()):
        run(quantity)


def test_an_error_names_a_loss_of_several_tensors() -> None:
    class Saddle(nn.Module):
        reduction = "mean"

        def forward(self, outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
            z, h = outputs
            return (z.square().sum(1) - h.square().sum(1)).mean()

    model, loss_fn = px.extend(Two()), px.extend(Saddle())
    with pytest.raises(px.PackextError, match="^Saddle of an output .* not convex"), px.backpack(px.DiagGGNExact()):
        loss_fn(model(torch.randn(N, 5)), torch.arange(N)).backward()


class Pull(nn.Module):
    """A loss of two tensors, with a weight in a buffer."""

    reduction = "sum"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.tensor([0.5, 2.0, 1.0]))

    def forward(self, outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        z, h = outputs
        return F.cross_entropy(z, y, self.w, reduction="sum") + h.square().sum()


def test_a_loss_of_several_tensors_in_bfloat16() -> None:
    model, loss, x, y = Two().bfloat16(), Pull().bfloat16(), torch.randn(N, 5).bfloat16(), torch.arange(N) % 3
    rows = testing.curvature_rows(copy.deepcopy(model).double(), copy.deepcopy(loss).double(), x.double(), y)
    run(model, loss, x, y, px.DiagGGNExact())
    assert loss.w.dtype == torch.bfloat16
    for name, p in model.named_parameters():
        assert testing.relative_error(p.diag_ggn_exact, rows[name].square().sum((0, 1))) < 0.03, name


def test_two_forwards_before_one_loss() -> None:
    model, x, x2, y = mlp(), torch.randn(N, 5), torch.randn(N, 5), torch.randint(3, (N,))
    loss = nn.CrossEntropyLoss()
    both = lambda inputs: model(inputs[0]) * model(inputs[1])  # noqa: E731
    rows = testing.curvature_rows(_Twice(model), loss, (x, x2), y, weights=[1 / N] * N)
    px.extend(model)
    px.extend(loss)
    with px.backpack(*quantities()):
        loss(both((x, x2)), y).backward()
    compare(model, {k.removeprefix("model."): r for k, r in rows.items()})


class _Twice(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, x2: Tensor) -> Tensor:
        return self.model(x) * self.model(x2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scale_of_the_samples_own_losses(reduction: str) -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y)
    run(model, nn.CrossEntropyLoss(reduction=reduction), x, y, *quantities(), scale="sample")
    compare(model, rows)


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_extended_is_refused() -> None:
    model = px.extend(mlp())
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    with pytest.raises(px.NotExtendedError, match=r"px.extend\(nn.CrossEntropyLoss"), px.backpack(px.DiagGGNExact()):
        F.cross_entropy(model(x), y).backward()
    assert all(p.grad is None and not hasattr(p, "diag_ggn_exact") for p in model.parameters())


def test_an_input_that_is_gone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packext._scale.SMALL", 0)
    model, loss = px.extend(mlp()), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    value = loss(model(x), y)
    with pytest.raises(px.PackextError, match="inside of the context"), px.backpack(px.DiagGGNExact()):
        value.backward()
    output = model(x)
    value = loss(output, y)
    with px.backpack(px.DiagGGNExact()):
        value.backward()
    assert hasattr(model[0].weight, "diag_ggn_exact")


def test_an_input_of_the_loss_without_tensors_is_refused() -> None:
    case = next(c for c in CASES if c.name == "output data class")
    model, inputs, targets = case.build()
    with pytest.raises(px.PackextError, match="no tensor was found"):
        run(model, case.loss(), inputs, targets, px.DiagGGNExact())


def test_a_loss_that_is_given_the_target_first_is_refused() -> None:
    x, y = torch.randn(N, 5), torch.randn(N, 3)
    model, loss = px.extend(mlp()), px.extend(nn.MSELoss())
    with pytest.raises(px.PackextError, match="Tensor as its first argument.*output comes first"):
        with px.backpack(px.DiagGGNExact()):
            loss(y, model(x)).backward()


def test_batch_norm_in_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(px.CoupledSamplesError, match="BatchNorm"):
        run(model, nn.CrossEntropyLoss(), torch.randn(N, 5), torch.randint(3, (N,)), px.DiagGGNExact())
    assert all(p.grad is None for p in model.parameters())


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(px.PackextError, match="the batch is empty"):
        run(mlp(), nn.CrossEntropyLoss(), torch.randn(0, 5), torch.zeros(0).long(), px.DiagGGNExact())


def test_advice_on_attention_is_for_attention() -> None:
    class Segments(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            lengths = torch.ones(len(input), self.out_features, dtype=torch.long)
            return torch.segment_reduce(super().forward(input), "mean", lengths=lengths, axis=1)

    attention = nn.Sequential(nn.Linear(5, 8), nn.Unflatten(1, (2, 4)), nn.TransformerEncoderLayer(4, 2, 8, 0.0))
    attention[2].self_attn.batch_first = True
    models = (
        (Segments(5, 3), "_segment_reduce_backward.*Use functions"),
        (nn.Sequential(attention, nn.Flatten()), "SDPBackend"),
    )
    for model, said in models:
        with pytest.raises(px.UnsupportedUseError, match=said):
            run(model, nn.CrossEntropyLoss(), torch.randn(N, 5), torch.randint(3, (N,)), px.HessianTrace())


# -- what models do ------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(5, 6), nn.Linear(6, 3)
        self.inner = nn.Sequential(nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(checkpoint(self.inner, self.a(x), use_reentrant=False))


def test_checkpointed_parts() -> None:
    model, x, y = Checkpointed(), torch.randn(N, 5), torch.randint(3, (N,))
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)
    whole = testing.hessian(model, F.cross_entropy, x, y)
    results = run(model, nn.CrossEntropyLoss(), x, y, *quantities(), px.TopEigenvalues(tol=1e-9))
    compare(model, rows)
    torch.testing.assert_close(results.top_eigenvalues.values[0], torch.linalg.eigvalsh(whole)[-1])
    model = Checkpointed()
    model.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())  # of which the linear layer runs again
    assert testing.check(model, nn.CrossEntropyLoss(), x, y, [px.KFLR()]).ok


def test_dropout_keeps_its_mask() -> None:
    model, x, y = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)), torch.randn(N, 5), torch.zeros(N)
    loss = px.extend(nn.CrossEntropyLoss())
    px.extend(model)
    seen: list[Tensor] = []
    model[1].register_forward_hook(lambda m, args, out: seen.append((out != 0).to(out) / 0.5))
    with px.backpack(px.DiagGGNExact()):
        loss(model(x), y.long()).backward()
    masked = nn.Sequential(nn.Linear(5, 8), _Times(seen[0].detach()), nn.Linear(8, 3))
    masked.load_state_dict(model.state_dict())
    run(masked, nn.CrossEntropyLoss(), x, y.long(), px.DiagGGNExact())
    for p, q in zip(model.parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(p.diag_ggn_exact, q.diag_ggn_exact)


class _Times(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def test_frozen_parameters_have_none() -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    model[0].weight.requires_grad_(False)
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)
    run(model, nn.CrossEntropyLoss(), x, y, *quantities(), px.KFLR())
    compare(model, rows)
    assert not hasattr(model[0].weight, "diag_ggn_exact") and not hasattr(model[0].weight, "kflr")


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    model = mlp().float()
    x, y = torch.randn(N, 5).float(), torch.randint(3, (N,))
    loss = px.extend(nn.CrossEntropyLoss())
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)
    px.extend(model)
    with torch.autocast("cpu", torch.bfloat16), px.backpack(*quantities(), px.KFLR(), px.SumGradSquared()):
        value = loss(model(x), y)
        with torch.autocast("cpu", enabled=inside):
            value.backward()
    for name, p in model.named_parameters():
        assert p.diag_ggn_exact.dtype == p.kflr[0].dtype == p.sum_grad_squared.dtype == torch.float32
        assert testing.relative_error(p.diag_ggn_exact, rows[name].square().sum((0, 1))) < 0.05


def test_a_cross_entropy_of_one_class_has_no_curvature() -> None:
    model, x, y = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(N, 5), torch.zeros(N).long()
    asked = [px.DiagGGNExact(), px.BatchDiagGGNExact(), px.KFLR(), px.KFRA(), px.KFAC(), px.DiagHessian()]
    results = run(model, nn.CrossEntropyLoss(), x, y, *asked)
    for name in results:
        for quantity in asked:
            found = getattr(results[name], quantity.savefield)
            assert not (found[0] if isinstance(found, list) else found).any(), (name, quantity)


# -- Monte Carlo ---------------------------------------------------------------------------------------------


def test_sampled_quantities_approach_the_exact_ones() -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    draws, state = 4000, torch.get_rng_state()
    generator = torch.Generator().manual_seed(1)
    asked = [
        px.DiagGGNMC(draws, generator), px.BatchDiagGGNMC(draws, generator), px.SqrtGGNMC(draws, generator=generator),
        px.KFAC(draws, generator=generator),
    ]  # fmt: skip
    run(model, nn.CrossEntropyLoss(), x, y, *asked, *quantities(), px.KFLR())
    assert torch.equal(state, torch.get_rng_state())
    for p in model.parameters():
        # Entries are means of `draws` products: five standard errors of each, from the draws themselves.
        each = p.sqrt_ggn_mc.square() * draws
        error = 5 * each.std(0) / draws**0.5 + 1e-9
        assert ((p.diag_ggn_mc_batch - p.diag_ggn_exact_batch).abs() <= error).all()
        torch.testing.assert_close(p.diag_ggn_mc, p.diag_ggn_mc_batch.sum(0))
        torch.testing.assert_close(p.diag_ggn_mc, p.sqrt_ggn_mc.square().sum((0, 1)))
        assert testing.relative_error(p.kfac[0], p.kflr[0]) < 0.1
        assert len(p.kfac) == len(p.kflr) == p.dim()


def test_a_seed_decides() -> None:
    found = []
    torch.manual_seed(3)
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    for seed in (1, 1, 2):
        run(model, nn.CrossEntropyLoss(), x, y, px.DiagGGNMC(generator=torch.Generator().manual_seed(seed)))
        found.append(model[0].weight.diag_ggn_mc)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_one_propagation_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from packext import _flight

    sent: list[Any] = []
    send = _flight.Sweep.send
    monkeypatch.setattr(_columns, "LARGEST", 0)
    monkeypatch.setattr(_flight.Sweep, "send", lambda self, *a: [sent.append(a), send(self, *a)][1])
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    run(model, nn.CrossEntropyLoss(), x, y, px.DiagGGNExact(), px.BatchDiagGGNExact(), px.KFLR())
    assert len(sent) == 2  # a softmax of three classes has a root of rank two
    sent.clear()
    run(model, nn.CrossEntropyLoss(), x, y, px.DiagGGNMC(), px.KFAC(), px.DiagGGNExact(), px.SqrtGGNExact())
    assert len(sent) == 1 + 3


# -- columns at once -----------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many columns went through the graph at once, in each pass."""
    seen: list[int] = []
    send = _columns.send

    def counted(edges: Any, cotangents: Any, targets: Any) -> Any:
        size = cotangents[0].dim() and functorch.maybe_get_bdim(cotangents[0]) >= 0
        seen.append(len(functorch.get_unwrapped(cotangents[0])) if size else 1)
        return send(edges, cotangents, targets)

    monkeypatch.setattr(_columns, "send", counted)
    return seen


def every() -> list[Any]:
    basis = px.EKFAC(fisher="exact", bias="joint")
    return [*quantities(), px.GGNGram(), px.KFLR(), px.KFAC(fisher="exact", bias="joint", approx="reduce"), basis]


@pytest.mark.parametrize("largest", [1 << 21, 500, 0])
def test_columns_go_at_once_as_far_as_memory_is_to_hold_them(
    largest: int, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_columns, "LARGEST", largest)
    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(15, 9))
    x, y = torch.randn(N, 2, 5), torch.randint(9, (N,))
    run(model, nn.CrossEntropyLoss(), x, y, px.DiagGGNExact())
    assert passes == {1 << 21: [7], 500: [2, 2, 2], 0: []}[largest]  # of eight; the first goes by itself


@pytest.mark.parametrize("norm", [False, True], ids=["beside the samples", "by themselves at each use"])
def test_columns_at_once_are_those_one_by_one(norm: bool, passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for largest in (1 << 21, 0):
        monkeypatch.setattr(_columns, "LARGEST", largest)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), *([nn.LayerNorm(6)] if norm else []), nn.ReLU(), nn.Linear(6, 4))
        px.extend(model)
        x, y = torch.randn(N, 5), torch.randint(4, (N,))
        one = run(model, nn.CrossEntropyLoss(), x, y, *every())
        basis = {name: result.ekfac for name, result in one.items() if name.startswith(("0", str(len(model) - 1)))}
        rest = [p for name, p in model.named_parameters() if name in basis]
        asked = [px.EKFAC(basis, fisher="exact", bias="joint"), px.DiagGGNMC(5, torch.Generator().manual_seed(1))]
        two = run(model, nn.CrossEntropyLoss(), x, y, *asked, parameters=rest)
        found.append((one, two))
    assert max(passes) > 1
    fields = [q.savefield for q in every()], ["ekfac", "diag_ggn_mc"]
    for asked, (one, other) in zip(fields, zip(*found, strict=True), strict=True):
        for (name, result), field in itertools.product(one.items(), asked):
            value, want = getattr(result, field), getattr(other[name], field)
            if isinstance(value, px.linalg.KronEigh):
                value, want = value.eigenvalues, want.eigenvalues
            if not isinstance(value, px.linalg.Joint):
                torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-12, msg=f"{name}.{field}")


class Another(px.DiagGGNExact):
    """The same under another name."""

    savefield = "another"


def test_two_diagonals_of_one_root_have_their_own_memory() -> None:
    model, x, y = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(N, 5), torch.randint(4, (N,))
    alone = run(model, nn.CrossEntropyLoss(), x, y, px.DiagGGNExact())
    both = run(model, nn.CrossEntropyLoss(), x, y, px.DiagGGNExact(), Another())
    for name, result in both.items():
        for got in (result.diag_ggn_exact, result.another):
            torch.testing.assert_close(got, alone[name].diag_ggn_exact, rtol=0, atol=0)
        assert result.diag_ggn_exact.data_ptr() != result.another.data_ptr()


class _Asks(torch.autograd.Function):
    """Its backward looks at what it gets, which torch.vmap refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> Tensor:
        return 2 * gs[0] if gs[0].sum().item() < 1e9 else gs[0]


def test_columns_go_one_by_one_where_they_cannot_at_once(passes: list[int]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(_Asks.apply(self.a(x)).tanh())

    model, loss, x, y = Model(), nn.CrossEntropyLoss(), torch.randn(N, 5), torch.randint(4, (N,))
    rows = testing.curvature_rows(model, loss, x, y, weights=[1 / N] * N)
    px.extend(model), px.extend(loss)
    for _ in range(2):
        with px.backpack(*quantities()):
            loss(model(x), y).backward()
        compare(model, rows)
    assert passes == [4 - 1]  # tried once


def test_what_runs_again_in_the_pass_is_seen_column_by_column(passes: list[int]) -> None:
    """Under torch.vmap there are no taps."""
    model, x, y = Checkpointed(), torch.randn(N, 5), torch.randint(3, (N,))
    model.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)
    run(model, nn.CrossEntropyLoss(), x, y, *quantities())
    compare(model, rows)
    assert passes == []


class Apart(nn.Module):
    """Distances from fixed points: torch.vmap over their backward is wrong in torch 2.13."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("points", torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.points)


@pytest.mark.parametrize("inside", [True, False])
def test_columns_at_once_are_compared_with_a_sum_of_them_by_itself(inside: bool) -> None:
    apart, layer, loss = Apart(), nn.Linear(5, 6), nn.CrossEntropyLoss()
    whole, x, y = nn.Sequential(layer, apart), torch.randn(N, 5), torch.randint(4, (N,))
    rows = testing.curvature_rows(whole, loss, x, y, weights=[1 / N] * N)
    model, loss = px.extend(whole if inside else layer), px.extend(loss)
    for _ in range(2):
        with px.backpack(*quantities()):
            loss(model(x) if inside else apart(model(x)), y).backward()
        compare(whole, rows)


class ToCentres(nn.Module):
    """Distances of rows to points, which torch finds otherwise from 25 rows on: of those torch.vmap is right."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.last, self.scale = nn.Linear(5, 6), nn.Linear(6, 4), nn.Parameter(torch.tensor(scale))
        self.register_buffer("points", torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cdist(self.first(x), self.points) * self.scale)


@pytest.mark.parametrize(("sizes", "scale"), [((30, 20), 1.0), ((8, 8), 0.0)])
def test_columns_are_compared_in_each_pass(sizes: tuple[int, ...], scale: float) -> None:
    """Another number of samples, or gradients that were zero before, and torch.vmap is wrong."""
    plain, loss = ToCentres(scale), px.extend(nn.CrossEntropyLoss())
    model = px.extend(copy.deepcopy(plain))
    for n in sizes:
        x, y = torch.randn(n, 5), torch.arange(n) % 4
        rows = testing.curvature_rows(plain, nn.CrossEntropyLoss(), x, y, weights=[1 / n] * n)
        with px.backpack(*quantities()):
            loss(model(x), y).backward()
        compare(model, rows)
        for m in (model, plain):
            with torch.no_grad():
                m.scale.add_(0.5)


def test_what_is_no_number_leaves_columns_at_once(passes: list[int]) -> None:
    model, loss, y = px.extend(nn.Linear(5, 6)), px.extend(nn.CrossEntropyLoss()), torch.arange(N)
    for x in (torch.full((N, 5), torch.nan), torch.randn(N, 5)):
        passes.clear()
        with px.backpack(px.DiagGGNExact()):
            loss(model(x), y).backward()
    assert max(passes) == 4  # of five columns the first is by itself


class Counts(nn.Module):
    """A layer that remembers of what it has been given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.detach().mean(0))
        return self.layer(x).tanh()


@pytest.mark.parametrize("reentrant", [False, True])
def test_buffers_of_what_runs_again_are_written_as_without_columns(reentrant: bool) -> None:
    class Model(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(checkpoint(self.inner, self.a(x), use_reentrant=reentrant))

    model, x, y = Model(), torch.randn(N, 5), torch.randint(3, (N,))
    model.inner = inner = Counts()
    found = []
    for asked in ([px.BatchL2Grad()], quantities()):
        inner.mean.zero_()
        run(model, nn.CrossEntropyLoss(), x, y, *asked)
        found.append(inner.mean.clone())
    assert torch.equal(*found)


class Looked(nn.Module):
    """Activations with something on them."""

    def __init__(self, look: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.c, self.look = nn.Linear(5, 6), nn.Linear(6, 4), look

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.a(x)
        self.look(self.h)
        return self.c(self.h.tanh())


def test_columns_leave_retained_gradients(passes: list[int]) -> None:
    x, y = torch.randn(N, 5), torch.randint(4, (N,))
    model, loss = Looked(lambda h: h.retain_grad()), nn.CrossEntropyLoss()
    loss(model(x), y).backward()
    assert model.h.grad is not None
    want = model.h.grad
    run(model, loss, x, y, *quantities(), px.DiagGGNMC(3))
    assert passes == [3, 2]
    torch.testing.assert_close(model.h.grad, want)


@pytest.mark.parametrize("where", ["inside", "output", "module"])
def test_hooks_see_one_column_at_a_time(where: str, passes: list[int]) -> None:
    """Who keeps what a hook is given would have something that nobody can read."""
    kept: list[Tensor] = []
    x, y = torch.randn(N, 5), torch.randint(4, (N,))
    model = px.extend(Looked(lambda h: h.register_hook(kept.append) if where == "inside" else None))
    if where == "module":
        model.c.register_full_backward_hook(lambda module, into, out: kept.extend(out))
    loss = px.extend(nn.CrossEntropyLoss())
    with px.backpack(*quantities()):
        out = model(x)
        if where == "output":
            out.register_hook(kept.append)
        loss(out, y).backward()
    assert passes == []
    assert len(kept) > 4
    assert all(bool(g.isfinite().all()) for g in kept)


@pytest.mark.parametrize("q", [px.DiagGGNExact, px.KFLR])
def test_columns_at_once_are_added_up_in_float32_under_autocast(q: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for largest in (1 << 21, 0):
        monkeypatch.setattr(_columns, "LARGEST", largest)
        torch.manual_seed(0)
        model = px.extend(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).float())
        loss, x, y = px.extend(nn.CrossEntropyLoss()), torch.randn(N, 5).float(), torch.randint(4, (N,))
        with torch.autocast("cpu", torch.bfloat16), px.backpack(q()) as results:
            loss(model(x), y).backward()
        found.append([getattr(results[name], q.savefield) for name, _ in model.named_parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_joint_blocks_of_a_head_that_only_columns_reach(passes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss reads one of two outputs, and a root by entries goes through both."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c, self.d = nn.Linear(5, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.a(x).tanh()
            return self.c(h), self.d(h)

    class OfTheFirst(nn.Module):
        reduction = "mean"

        def forward(self, outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
            return F.cross_entropy(outputs[0], y)

    model, x, y = Heads(), torch.randn(N, 5), torch.randint(2, (N,))
    found = []
    for largest in (1 << 21, 0):
        monkeypatch.setattr(_columns, "LARGEST", largest)
        joint = px.KFAC(fisher="exact", bias="joint")
        results = run(model, OfTheFirst(), x, y, joint, px.SqrtGGNExact())
        found.append([results[f"{name}.weight"].kfac for name in "ac"])
    assert passes == [3]
    torch.testing.assert_close(*found)


def test_threads_leave_the_switch_of_vmap_that_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has one for all, that says whether vmap may take one after the other what it has no rule for."""
    met, ended, send = threading.Event(), threading.Event(), _columns.send

    def slow(edges: Any, cotangents: Any, targets: Any) -> Any:
        if threading.current_thread() is other:
            met.set()
            ended.wait(60)
        else:
            other.start()
            met.wait(60)
        return send(edges, cotangents, targets)

    def step() -> None:
        run(nn.Linear(5, 4), nn.CrossEntropyLoss(), torch.randn(N, 5), torch.randint(4, (N,)), px.DiagGGNExact())

    monkeypatch.setattr(_columns, "send", slow)
    assert functorch._is_vmap_fallback_enabled()
    other = threading.Thread(target=step)
    step()
    ended.set()
    other.join()
    assert met.is_set()
    assert functorch._is_vmap_fallback_enabled()


def test_rows_of_all_columns_are_not_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = []
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    x, y = torch.randn(N, 64), torch.randint(10, (N,))
    for largest in (1 << 21, 0):
        monkeypatch.setattr(_columns, "LARGEST", largest)
        run(model, nn.CrossEntropyLoss(), x, y, px.BatchDiagGGNExact())  # the first one probes
        with Live() as live:
            run(model, nn.CrossEntropyLoss(), x, y, px.BatchDiagGGNExact())
        peaks.append(live.peak)
    assert peaks[0] < 2 * peaks[1]


# -- Kronecker factors ---------------------------------------------------------------------------------------


def block(rows: Tensor) -> Tensor:
    """The GGN's block `[P, P]` of rows `[V, N, *p]`."""
    flat = rows.reshape(rows.shape[0] * rows.shape[1], -1)
    return flat.T @ flat


def dense(factors: list[Tensor]) -> Tensor:
    return torch.kron(*factors) if len(factors) == 2 else factors[0]


def test_kflr_is_exact_for_one_sample() -> None:
    model, x, y = mlp(), torch.randn(1, 5), torch.randint(3, (1,))
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y)
    run(model, nn.CrossEntropyLoss(), x, y, px.KFLR(), px.KFAC(fisher="exact", approx="reduce"))
    for name, p in model.named_parameters():
        for factors in (p.kflr, p.kfac):
            torch.testing.assert_close(dense(factors), block(rows[name]))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_factors_are_exact_in_deep_linear_nets(approx: str, layer: str) -> None:
    def build() -> nn.Module:
        if layer == "linear":
            return nn.Linear(4, 4)
        return nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular") if approx == "reduce" else nn.Conv1d(4, 4, 1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = build(), build()

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x))
            return y.mean(1 if layer == "linear" else 2) if approx == "reduce" else y

    model, x = Net(), torch.randn(N, *((6, 4) if layer == "linear" else (4, 6)))
    y = torch.randn_like(model(x))
    rows = testing.curvature_rows(model, nn.MSELoss(), x, y, weights=[1 / N] * N)
    run(model, nn.MSELoss(), x, y, px.KFAC(fisher="exact", approx=approx))
    for name, p in model.named_parameters():
        torch.testing.assert_close(dense(p.kfac), block(rows[name]))


def test_groups_have_factors_of_their_own() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(18, 3))
    x, y = torch.randn(1, 4, 4), torch.randint(3, (1,))
    run(model, nn.CrossEntropyLoss(), x, y, px.KFLR())
    outputs, inputs = model[0].weight.kflr
    assert outputs.shape == (2, 3, 3) and inputs.shape == (2, 4, 4)


def test_empirical_factors() -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    rows = testing.individual_gradients(model, nn.CrossEntropyLoss(), x, y)
    run(model, nn.CrossEntropyLoss(), x, y, px.KFAC(fisher="empirical"))
    for k in (0, 2):
        bias = rows[f"{k}.bias"]
        torch.testing.assert_close(model[k].bias.kfac[0], bias.T @ bias / N)
        torch.testing.assert_close(model[k].weight.kfac[0], bias.T @ bias / N)
    torch.testing.assert_close(model[0].weight.kfac[1], x.T @ x / N)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
def test_large_factors(axis: int, transposed: bool) -> None:
    """Of which one half is computed, in blocks that do not divide their sides, and the other copied."""
    torch.manual_seed(0)
    o, i, length = 257, 270, 135

    class Map(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(i, o) / 16)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    layer = Map() if transposed else nn.Linear(i, o, bias=False)
    seen: list[Tensor] = []
    model = px.extend(nn.Sequential(layer, nn.Tanh()), axis)
    layer.register_forward_hook(lambda m, args, out: out.register_hook(seen.append) and None)
    x = torch.randn(N, length, i) if axis == 0 else torch.randn(length, N, i)
    with px.backpack(px.KFAC(fisher="empirical"), scale=1.0):
        model(x).square().sum().backward()
    g = seen[-1].flatten(0, 1)  # the probe of the first pass came before
    found = layer.weight.kfac[::-1] if transposed else layer.weight.kfac
    flat = x.flatten(0, 1)
    torch.testing.assert_close(found, [g.T @ g, flat.T @ flat / (N * length)])


def test_factors_where_samples_differ_in_their_rows() -> None:
    """An expert's A is the mean over the rows that it was given, not over what fills up those of other samples."""
    torch.manual_seed(0)
    model = px.extend(Routed(sort=False))
    loss, x, y = px.extend(nn.CrossEntropyLoss()), torch.randn(5, 3, 4), torch.arange(5) % 3
    seen: dict[str, Tensor] = {}
    layer = model.experts[1][0]

    def look(_: nn.Module, inputs: Any, output: Tensor) -> None:
        seen["a"] = inputs[0].detach()
        output.register_hook(functools.partial(seen.__setitem__, "g"))

    layer.register_forward_hook(look)
    with px.backpack(px.KFAC(fisher="empirical"), parameters=layer.parameters()):
        loss(model(x), y).backward()
    a, g = seen["a"], seen["g"]
    assert len(a) % 5, "or all could have as many"
    torch.testing.assert_close(layer.weight.kfac, [5 * g.T @ g, a.T @ a / len(a)])
    torch.testing.assert_close(layer.bias.kfac, [5 * g.T @ g])
    with px.backpack(px.KFAC(fisher="empirical", bias="joint"), parameters=layer.parameters()):
        loss(model(x), y).backward()
    longer = torch.cat([a, torch.ones(len(a), 1)], 1)  # and what fills up has no bias
    torch.testing.assert_close(layer.weight.kfac, [5 * g.T @ g, longer.T @ longer / len(a)])


class Frames(nn.Module):
    """A convolution of the frames of films `[T, N, C, W]`, at will with the samples in front, and a mixture of them."""

    def __init__(self, layer: nn.Module, turned: bool) -> None:
        super().__init__()
        self.layer, self.turned, self.mix = layer, turned, torch.arange(9.0).view(3, 3).sin()

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.turned else x
        y = self.layer(x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2])
        return torch.einsum("st,tncw->sncw", self.mix, y.transpose(0, 1) if self.turned else y)


@pytest.mark.parametrize("n", [2, 3])  # as many as frames, or not
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_convolutions_of_frames_that_come_before_the_samples(kind: Any, n: int) -> None:
    model, x = Frames(kind(2, 4, 3, groups=2, stride=2), False), torch.randn(3, n, 2, 5)
    y, loss = torch.randn_like(model(x)), nn.MSELoss()
    other = Frames(model.layer, True)
    asked = [*testing.all_quantities(), px.DiagGGNExact(), px.DiagEF()]
    report = testing.check(model, loss, x, y, asked, batch_axis=1)
    assert report.ok, str(report)
    px.extend(loss)
    for approx in ("expand", "reduce"):
        found = []
        for some in (px.extend(copy.deepcopy(model), 1), px.extend(copy.deepcopy(other), 1)):
            with px.backpack(px.KFAC(fisher="empirical", approx=approx)):
                loss(some(x), y).backward()
            found += [[p.kfac for p in some.parameters()]]
        torch.testing.assert_close(*found)


def test_factors_of_a_convolution_of_chosen_images() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.expert = nn.Conv1d(2, 2, 1), nn.Conv1d(2, 3, 2)

        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            h = self.first(x.flatten(0, 1))
            out = h.new_zeros(len(h), 3, 4).index_put((at,), self.expert(h[at]).tanh())
            return out.unflatten(0, x.shape[:2]).sum(1)

    torch.manual_seed(0)
    model, loss, x, at = Chosen(), nn.MSELoss(reduction="sum"), torch.randn(3, 3, 2, 5), torch.tensor([7, 0, 2, 1, 8])
    a = model.first(x.flatten(0, 1))[at].unfold(2, 2, 1).transpose(1, 2).flatten(2).flatten(0, 1).detach()
    y, seen = model(x, at).detach() + 1, []
    model.expert.register_forward_hook(lambda m, args, out: out.register_hook(seen.append) and None)
    px.extend(model)
    px.extend(loss)
    with px.backpack(px.KFAC(fisher="empirical")):
        loss(model(x, at), y).backward()
    g = seen[-1].transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(model.expert.weight.kfac, [g.T @ g, a.T @ a / len(a)])
    torch.testing.assert_close(model.expert.bias.kfac, [g.T @ g])
    with px.backpack(px.KFAC(fisher="empirical", bias="joint")):
        loss(model(x, at), y).backward()
    longer = torch.cat([a, torch.ones(len(a), 1)], 1)
    torch.testing.assert_close(model.expert.weight.kfac, [g.T @ g, longer.T @ longer / len(a)])


@pytest.mark.parametrize("way", ["module", "einsum"])
def test_factors_of_chosen_tokens_that_a_layer_reads_twice(way: str) -> None:
    """A sample's mean over positions is over those that it has, in all uses: 2, 4, 0 and 10 of 12."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.expert = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, keep: Tensor) -> Tensor:
            h = self.first(x)
            rows = self.expert(h[keep]).tanh()
            calls.append(rows)
            rows = self.expert(rows) if way == "module" else torch.einsum("ni,oi->no", rows, self.expert.weight)
            return h.index_put((keep,), rows).mean(1)

    torch.manual_seed(0)
    calls: list[Tensor] = []
    model, loss, x, y = Chosen(), nn.MSELoss(reduction="sum"), torch.randn(4, 6, 3), torch.randn(4, 4)
    keep = torch.arange(6) < torch.tensor([1, 2, 0, 5])[:, None]
    a, b = torch.zeros(5, 5), torch.zeros(4, 4)
    for n, count in enumerate(keep.sum(1).tolist()):
        output = model(x[n : n + 1], keep[n : n + 1])
        rows = torch.cat([model.first(x[n, :count]), calls[-1]]).detach()
        slope = 2 * (output - y[n : n + 1])
        sums = torch.autograd.grad(output, model.expert.bias, slope)[0]  # in each call it meets what the weight gives
        mean = torch.cat([rows.mean(0), torch.ones(1)]) if count else torch.zeros(5)
        a, b = a + torch.outer(mean, mean) / 4, b + torch.outer(sums, sums)
    px.extend(model)
    bias = "joint" if way == "module" else "separate"
    context = px.backpack(
        px.KFAC(fisher="empirical", approx="reduce", bias=bias), parameters=list(model.expert.parameters())
    )
    if way == "einsum":  # which does not tell whose rows are whose
        with pytest.raises(px.UnsupportedUseError, match='approx="reduce"'), context:
            px.extend(loss)(model(x, keep), y).backward()
        return
    with context:
        px.extend(loss)(model(x, keep), y).backward()
    torch.testing.assert_close(model.expert.weight.kfac, [b.detach(), a])


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_factors_of_packed_sequences(kind: type[nn.Module], approx: str) -> None:
    """Those of the sequences by themselves; A is a mean over the steps that there are, or over the sequences."""
    torch.manual_seed(0)
    model, loss = Packed(kind(5, 4, 2, bidirectional=True)), px.extend(nn.CrossEntropyLoss())
    x, y, lengths = torch.randn(N, 4, 5), torch.randint(3, (N,)), torch.tensor([2, 4, 1, 4])
    model(x, lengths)
    px.extend(model)

    def factors(some: slice) -> list[list[Tensor]]:
        with px.backpack(px.KFAC(approx=approx, fisher="empirical")):
            loss(model(x[some], lengths[some]), y[some]).backward()
        return [p.kfac for p in model.rnn.parameters() if p.dim() == 2]

    alone = [factors(slice(k, k + 1)) for k in range(N)]
    share = lengths / lengths.sum() if approx == "expand" else torch.full((N,), 1 / N)
    for k, (b, a) in enumerate(factors(slice(0, N))):
        torch.testing.assert_close(b, torch.stack([own[k][0] for own in alone]).mean(0))
        torch.testing.assert_close(a, sum(s * own[k][1] for s, own in zip(share, alone, strict=True)))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_eigenvalues_corrected_in_a_basis(fisher: str) -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))
    x, y = torch.randn(N, 4, 4), torch.randint(3, (N,))
    loss = nn.CrossEntropyLoss()
    if fisher == "exact":
        rows = testing.curvature_rows(model, loss, x, y, weights=[1 / N] * N)
    else:
        plain = testing.individual_gradients(model, loss, x, y)
        rows = {k: r[None] / N**0.5 for k, r in plain.items()}
    run(model, loss, x, y, px.KFAC(fisher=fisher), px.EKFAC(fisher=fisher))
    first = {name: p.ekfac for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        v = torch.randn_like(p)
        torch.testing.assert_close(first[name].matvec(v, lambda e: e), px.linalg.kron_matvec(p.kfac, v))
    for basis in (first, {p: first[name] for name, p in model.named_parameters()}):
        run(model, loss, x, y, px.EKFAC(basis, fisher=fisher))
        for name, p in model.named_parameters():
            # In any basis, the best diagonal is the diagonal of the curvature there.
            want = first[name].rotate(rows[name]).square().sum((0, 1))
            torch.testing.assert_close(p.ekfac.eigenvalues, want)
    assert repr(px.EKFAC(fisher=fisher)).startswith(
        "EKFAC(basis=None, eigenvalues not corrected, mc_samples=1, approx="
    )
    assert repr(px.EKFAC(first, fisher=fisher)).startswith("EKFAC(basis of 4, mc_samples=1, approx=")
    with pytest.raises(KeyError, match="has nothing for"):
        run(model, loss, x, y, px.EKFAC({}, fisher=fisher))


def test_what_has_no_factors_is_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)))
    with pytest.raises(px.UnsupportedUseError, match="0.parametrizations.weight"):
        run(model, nn.CrossEntropyLoss(), torch.randn(N, 5), torch.randint(3, (N,)), px.KFLR())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("make", [lambda: px.KFAC(0), lambda: px.KFAC(fisher="all"), lambda: px.DiagGGNMC(True)])
def test_bad_arguments(make: Any) -> None:
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize("name", ["mlp", "conv2d groups", "gru", "raw parameters", "tied embedding and head"])
def test_gram_and_empirical_fisher(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    model, inputs, targets = case.build()
    loss = case.loss()
    n = testing.batch_size(inputs)
    rows = testing.curvature_rows(model, loss, inputs, targets, weights=[1 / n] * n)
    plain = testing.individual_gradients(model, loss, inputs, targets)
    px.extend(model)
    px.extend(loss)
    with px.backpack(px.GGNGram(), px.DiagEF(), px.DiagGGNExact()) as results:
        loss(testing.call(model, inputs), targets).backward()
    whole = torch.cat([r.reshape(*r.shape[:2], -1) for r in rows.values()], 2)
    spectrum = torch.linalg.eigvalsh(block(whole))
    v = results.ggn_gram.shape[0]
    assert results.ggn_gram.shape == (v, n, v, n)
    mine = torch.linalg.eigvalsh(results.ggn_gram.reshape(v * n, v * n))
    size = min(len(mine), len(spectrum))
    torch.testing.assert_close(mine[-size:], spectrum[-size:], atol=1e-10, rtol=1e-8)
    for key, p in model.named_parameters():
        if key in results:
            flat = rows[key].reshape(-1, p.numel())
            torch.testing.assert_close(p.ggn_gram.square().sum(), (flat @ flat.T).square().sum())
            torch.testing.assert_close(p.diag_ef, plain[key].square().sum(0) / n)


class Halved(nn.Module):
    """Half of a sum of squares, of some of the outputs for some of the samples."""

    reduction = "sum"

    def forward(self, output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return (weight * (output - target).square()).sum() / 2


def test_gram_is_the_tangent_kernel_for_a_loss_of_ones_own() -> None:
    """Column v is of output v, whatever eigenvectors the Hessian has, and there are as many for each batch."""
    model, loss, x, y = px.extend(mlp()), px.extend(Halved()), torch.randn(N, 5), torch.randn(N, 3)
    rows = [torch.autograd.grad(f, list(model.parameters()), retain_graph=True) for f in model(x).T.flatten()]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])  # outputs before samples
    for weight in (
        torch.ones(N, 3),
        torch.tensor([[1.0, 4.0, 9.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 1.0]]),
    ):
        root = weight.T.sqrt().flatten()[:, None] * jacobian
        with px.backpack(px.GGNGram(), px.SqrtGGNExact()) as results:
            loss(model(x), y, weight).backward()
        torch.testing.assert_close(results.ggn_gram, (root @ root.T).view(3, N, 3, N))
        found = torch.cat([p.sqrt_ggn_exact.flatten(2) for p in model.parameters()], 2)
        torch.testing.assert_close(found, root.view(3, N, -1))
    with px.backpack(px.SqrtGGNExact(), accumulate=True):  # of batches with Hessians of other ranks
        for part in (slice(0, 1), slice(2, 4)):
            loss(model(x[part]), y[part], weight[part]).backward()
    torch.testing.assert_close(model[0].weight.sqrt_ggn_exact, root.view(3, N, -1)[:, [0, 2, 3], :35].view(3, 3, 7, 5))


def test_gram_of_packed_sequences() -> None:
    """Columns differ in whose rows of zeros are taken for, and so in how many a sample has."""

    class Each(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(2, 3, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            some = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.rnn(some)[0], batch_first=True, total_length=x.shape[1])[0]

    x, lengths, y = torch.randn(3, 4, 2), torch.tensor([2, 4, 1]), torch.randn(3, 4, 3)
    report = testing.check(Each(), nn.MSELoss(), (x, lengths), y, [px.GGNGram(), px.SqrtGGNExact()])
    assert report.ok, str(report)


# -- the Hessian ---------------------------------------------------------------------------------------------


def coupled() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize("build", [mlp, coupled])
def test_hessian_quantities(build: Any) -> None:
    model, x, y = build(), torch.randn(N, 5), torch.randint(3, (N,))
    loss = nn.CrossEntropyLoss()
    want = testing.hessian(model, lambda z, t: 2 * loss(z, t), x, y)
    state = torch.get_rng_state()
    px.extend(model)
    px.extend(loss)
    asked = [
        px.HessianTrace(400),
        px.DiagHessianMC(400),
        px.TopEigenvalues(2, tol=1e-9),
    ]
    with px.backpack(*asked) as results:
        (2 * loss(model(x), y)).backward()
    assert torch.equal(state, torch.get_rng_state())
    trace = results.hessian_trace
    assert abs(trace.value - want.trace()) <= 5 * trace.standard_error
    assert trace.standard_error < 0.2 * want.trace().abs()
    torch.testing.assert_close(trace.draws, torch.stack([p.hessian_trace.draws for p in model.parameters()]).sum(0))
    spectrum = torch.linalg.eigvalsh(want)
    torch.testing.assert_close(results.top_eigenvalues.values, spectrum[-2:].flip(0), rtol=1e-7, atol=1e-9)
    start = 0
    for p in model.parameters():
        stop = start + p.numel()
        diagonal = want.diagonal()[start:stop].view_as(p)
        assert ((p.diag_h_mc.value - diagonal).abs() <= 5 * p.diag_h_mc.standard_error + 1e-9).all()
        assert abs(p.hessian_trace.value - diagonal.sum()) <= 5 * p.hessian_trace.standard_error + 1e-9
        start = stop
    plain = torch.autograd.grad(2 * loss(model(x), y), list(model.parameters()))
    for p, g in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_the_hessian_of_what_backward_is_aimed_at() -> None:
    """Of `backward(inputs=...)` the block of these parameters; and of a head that is not used there is nothing."""
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    loss, head = nn.CrossEntropyLoss(), list(model[2].parameters())
    size = sum(p.numel() for p in head)
    want = testing.hessian(model, loss, x, y)[-size:, -size:]
    px.extend(model), px.extend(loss)
    asked = [px.HessianTrace(), px.DiagHessianMC(), px.TopEigenvalues(2, tol=1e-9), px.HMP(), px.GGNMP()]
    with px.backpack(*asked) as results:
        loss(model(x), y).backward(inputs=head, retain_graph=True)
    assert set(results) == {"2.weight", "2.bias"}
    values = torch.linalg.eigvalsh(want)[-2:].flip(0)
    torch.testing.assert_close(results.top_eigenvalues.values, values, rtol=1e-7, atol=1e-9)
    side = model[2].weight.numel()
    block = model[2].weight.hmp(torch.eye(side).view(side, *model[2].weight.shape))
    torch.testing.assert_close(block.flatten(1), want[:side, :side])
    for p in model[0].parameters():
        assert not any(hasattr(p, q.savefield) for q in asked)


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_ends_of_the_spectrum(which: str) -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randn(N, 3)
    loss = nn.MSELoss()
    spectrum = torch.linalg.eigvalsh(testing.hessian(model, loss, x, y))
    assert spectrum[0] < 0 < spectrum[-1]
    want = {"LA": spectrum[-1], "SA": spectrum[0], "LM": spectrum[spectrum.abs().argmax()]}[which]
    results = run(model, loss, x, y, px.TopEigenvalues(which=which, tol=1e-9), px.BatchGrad())
    torch.testing.assert_close(results.top_eigenvalues.values[0], want, rtol=1e-7, atol=1e-9)
    parts = [p.top_eigenvalues.vectors[0].flatten() for p in model.parameters()]
    torch.testing.assert_close(torch.cat(parts).norm(), torch.tensor(1.0))
    assert model[0].weight.grad_batch.shape == (N, *model[0].weight.shape)
    ends = {"LA": -2 * spectrum[0], "SA": -2 * spectrum[-1], "LM": -2 * want}
    for scale, times, end in (("sample", -0.5, N * want), (-2.0, 1.0, ends[which])):  # of what results are of
        with px.backpack(px.TopEigenvalues(which=which, tol=1e-9), scale=scale) as results:
            (times * loss(model(x), y)).backward()
        torch.testing.assert_close(results.top_eigenvalues.values[0], end, rtol=1e-7, atol=1e-9)


def test_eigenvalues_say_whether_they_have_converged() -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randn(N, 3)
    spectrum = torch.linalg.eigvalsh(testing.hessian(model, nn.MSELoss(), x, y))
    for options, converged in (({}, True), ({"maxiter": 1, "ncv": 5, "tol": 1e-9}, False)):
        found = run(model, nn.MSELoss(), x, y, px.TopEigenvalues(3, **options)).top_eigenvalues
        assert found.converged is model[0].weight.top_eigenvalues.converged is converged
        assert (found.residuals.max() <= 1e-3 * spectrum.abs().max()) == converged
        nearest = (spectrum[:, None] - found.values).abs().amin(0)
        assert (nearest <= found.residuals + 1e-9).all()


def test_products_are_of_vectors_one_after_the_other() -> None:
    model, loss = px.extend(mlp()), px.extend(nn.CrossEntropyLoss())
    with px.backpack(px.HMP(), px.GGNMP(), px.PCHMP()):
        loss(model(torch.randn(N, 5)), torch.randint(3, (N,))).backward(retain_graph=True)
    for p in model.parameters():
        shape = ", ".join(map(str, p.shape))
        for product in (p.hmp, p.ggnmp, p.pchmp):
            with pytest.raises(
                ValueError, match=rf"\[V, {shape}\].*got \[{shape}\]. Of one vector pass vector\[None\]"
            ):
                product(torch.randn(p.shape))
            with pytest.raises(ValueError, match=rf"\[V, {shape}\].*got \[2, 9\]"):
                product(torch.randn(2, 9))
            assert product(torch.randn(0, *p.shape)).shape == (0, *p.shape)


def test_products_of_a_loss_that_torch_differentiates_once() -> None:
    model, loss = px.extend(mlp()), px.extend(nn.MultiMarginLoss())
    for quantity in (px.HessianTrace(), px.TopEigenvalues()):
        with pytest.raises(px.UnsupportedUseError, match=r"multi_margin_loss.*Use a loss that"), px.backpack(quantity):
            loss(model(torch.randn(N, 5)), torch.randint(3, (N,))).backward()


class Normed(nn.Module):
    """A parametrization that is what torch's weight_norm is, in functions of which it knows the second derivatives."""

    def forward(self, size: Tensor, direction: Tensor) -> Tensor:
        return direction * (size / direction.norm(dim=1, keepdim=True))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.norm(dim=1, keepdim=True), weight


def test_products_through_a_norm_that_torch_differentiates_wrongly() -> None:
    """The second derivative of its fused weight_norm takes the norm for a constant (2.13)."""
    if knows_weight_norm():
        pytest.skip("right in this torch")
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    own = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    fused = copy.deepcopy(own)
    nn.utils.parametrize.register_parametrization(own[0], "weight", Normed())
    nn.utils.parametrizations.weight_norm(fused[0])
    whole = testing.hessian(own, nn.CrossEntropyLoss(), x, y)
    loss = px.extend(nn.CrossEntropyLoss())
    for model in (px.extend(own), px.extend(fused)):
        asked, start = [p for name, p in model.named_parameters() if model is own or not name.endswith("original1")], 0
        with px.backpack(px.HMP(), parameters=asked):
            loss(model(x), y).backward(retain_graph=True)
        for p in model.parameters():
            rows, start = slice(start, start + p.numel()), start + p.numel()
            if any(p is q for q in asked):
                v = torch.randn(1, *p.shape)
                torch.testing.assert_close(
                    p.hmp(v)[0].flatten(), whole[rows, rows] @ v.flatten(), rtol=1e-9, atol=1e-12
                )
    with px.backpack(px.HMP()):
        loss(fused(x), y).backward(retain_graph=True)
    with pytest.raises(px.UnsupportedUseError, match="direction of a weight_norm.*parametrization of your"):
        fused[0].parametrizations.weight.original1.hmp(torch.ones(1, 4, 5))
    for quantity in (px.HessianTrace(), px.DiagHessianMC(), px.TopEigenvalues()):
        fused.zero_grad()
        with pytest.raises(px.UnsupportedUseError, match="direction of a weight_norm"), px.backpack(quantity):
            loss(fused(x), y).backward()


def test_products_with_blocks() -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    loss = nn.CrossEntropyLoss()
    whole = testing.hessian(model, loss, x, y)
    rows = testing.curvature_rows(model, loss, x, y, weights=[1 / N] * N)
    px.extend(model)
    px.extend(loss)
    with px.backpack(px.HMP(), px.GGNMP(), px.TopEigenvalues(curvature="ggn", tol=1e-9)) as results:
        loss(model(x), y).backward(retain_graph=True)
    start = 0
    for name, p in model.named_parameters():
        stop, matrix = start + p.numel(), torch.randn(2, *p.shape)
        flat = matrix.flatten(1)
        torch.testing.assert_close(p.hmp(matrix).flatten(1), flat @ whole[start:stop, start:stop])
        torch.testing.assert_close(p.ggnmp(matrix).flatten(1), flat @ block(rows[name]))
        start = stop
    ggn = block(torch.cat([r.reshape(*r.shape[:2], -1) for r in rows.values()], 2))
    torch.testing.assert_close(results.top_eigenvalues.values[0], torch.linalg.eigvalsh(ggn)[-1])
    with px.backpack(px.HMP(), px.GGNMP()):
        loss(model(x), y).backward(retain_graph=False)
    for product in (model[0].weight.hmp, model[0].weight.ggnmp):
        with pytest.raises(px.PackextError, match="retain_graph=True"):
            product(torch.randn(1, *model[0].weight.shape))
        with pytest.raises(TypeError, match=r"Delete it first \(`del parameter.(hmp|ggnmp)`\)"):
            pickle.dumps(product)
    for p in model.parameters():
        del p.hmp, p.ggnmp
    assert pickle.loads(pickle.dumps(model))[0].weight.equal(model[0].weight)


@pytest.mark.parametrize("fails", [False, True])
def test_the_graph_is_kept_where_products_run_through_it(fails: bool) -> None:
    """And nowhere else: neither after the context nor with other quantities."""
    model, x, y = px.extend(mlp()), torch.randn(N, 5), torch.randint(3, (N,))
    loss, weight = px.extend(nn.CrossEntropyLoss()), model[0].weight
    with px.backpack(px.HMP()):
        loss(model(x), y).backward(retain_graph=True)
    matrix = torch.randn(2, *weight.shape)
    want = weight.hmp(matrix)
    try:
        with px.backpack(px.HMP(), px.BatchGrad()):
            (2 * loss(model(x), y)).backward(torch.tensor(2.0))
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    torch.testing.assert_close(weight.hmp(matrix), 4 * want)
    for context in (contextlib.nullcontext(), px.backpack(px.BatchGrad())):
        with context:
            value = loss(model(x), y)
            value.backward()
            with pytest.raises(RuntimeError, match="second time"):
                value.backward()


class Cumulative(nn.Module):
    """torch differentiates the gradient of logcumsumexp by way of its logarithm."""

    def forward(self, x: Tensor) -> Tensor:
        return x.logcumsumexp(1)


class Stacked(nn.Module):
    """The same without it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, : k + 1].logsumexp(1) for k in range(x.shape[1])], 1)


def test_products_where_the_gradient_has_no_derivative_at_zero() -> None:
    model, loss = nn.Sequential(nn.Linear(5, 4), Cumulative(), nn.Linear(4, 3)), nn.CrossEntropyLoss()
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    report = testing.check(model, loss, x, y, [px.GGNMP(), px.HMP()])
    assert report.ok, report
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    for quantity in (px.GGNMP(), px.HMP(), px.HessianTrace(), px.DiagHessianMC(), px.TopEigenvalues(1)):
        with pytest.raises(px.UnsupportedUseError, match=r"logcumsumexp .* zero.*logsumexp"):
            products = run(model, loss, x, y, quantity)
            getattr(products["0.weight"], quantity.savefield)(torch.ones(1, 4, 5))
    other, diagonals = nn.Sequential(model[0], Stacked(), model[2]), (px.DiagGGNExact(), px.DiagHessian())
    for asked in (*diagonals, px.GGNMP(), px.HMP()):
        report = testing.check(other, loss, x, y, [asked])
        assert report.ok, report
    found, want = (run(px.unextend(m), loss, x, y, *diagonals)["0.weight"] for m in (model, other))
    torch.testing.assert_close(found.diag_ggn_exact, want.diag_ggn_exact)
    torch.testing.assert_close(found.diag_h, want.diag_h)


class Shifted(nn.Module):
    """A normalisation with a bias, with a weight of ones or none, or the bias added to what it gives."""

    def __init__(self, kind: str, way: str) -> None:
        super().__init__()
        self.kind, self.way, self.bias = kind, way, nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.ones(3) if self.way in ("ones", "checkpointed") else None
        bias = None if self.way == "added" else self.bias
        x = x.view(len(x), 4, 3)
        if self.kind == "layer":
            x = F.layer_norm(x, (3,), weight, bias)
        elif self.kind == "instance":
            x = F.instance_norm(x.mT, None, None, weight, bias).mT
        else:
            x = F.batch_norm(x.mT, torch.zeros(3), torch.ones(3), weight, bias).mT
        return x + self.bias if bias is None else x


class Again(nn.Sequential):
    """Layers that run again for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self[0], x, use_reentrant=False)


def shifted(kind: str, way: str) -> nn.Module:
    layer = Shifted(kind, way)
    return nn.Sequential(nn.Linear(5, 12), Again(layer) if way == "checkpointed" else layer, nn.Tanh(), nn.Flatten())


@pytest.mark.parametrize("kind", ["layer", "instance", "batch"])
def test_products_with_the_bias_of_a_normalisation_without_a_weight(kind: str) -> None:
    """torch loses the derivative of that bias's gradient."""
    x, y, loss = torch.randn(N, 5), torch.randint(12, (N,)), nn.CrossEntropyLoss()
    models = {way: shifted(kind, way) for way in ("added", "ones", "checkpointed", "alone")}
    for model in models.values():
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(models["added"].parameters()), model.parameters())
    for way in ("added", "ones", "checkpointed"):
        report = testing.check(models[way], loss, x, y, [px.GGNMP(), px.HMP()])
        assert report.ok, report
    traces = []
    for way in ("added", "checkpointed"):  # of which torch unpacks a weight once in a pass
        trace = px.HessianTrace(mc_samples=2, generator=torch.Generator().manual_seed(0))
        traces += [*run(px.unextend(models[way]), loss, x, y, trace).values()]
    assert len(traces) == 6
    for want, found in zip(traces[:3], traces[3:], strict=True):
        torch.testing.assert_close(getattr(found, trace.savefield), getattr(want, trace.savefield))
    diagonals = px.DiagGGNExact(), px.DiagHessian()
    want, found = (run(models[way], loss, x, y, *diagonals) for way in ("added", "alone"))
    for name in ("1.bias", "0.weight"):
        torch.testing.assert_close(found[name].diag_ggn_exact, want[name].diag_ggn_exact)
        torch.testing.assert_close(found[name].diag_h, want[name].diag_h)
    for quantity in (px.GGNMP(), px.HMP(), px.HessianTrace(), px.DiagHessianMC(), px.TopEigenvalues(1)):
        with pytest.raises(px.UnsupportedUseError, match=r"bias of a normalisation without a weight.*torch\.ones"):
            products = run(px.unextend(models["alone"]), loss, x, y, quantity)
            getattr(products["1.bias"], quantity.savefield)(torch.ones(1, 3))


@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("quantity", [px.DiagGGNExact(), px.DiagHessian(), px.GGNMP(), px.HMP()], ids=repr)
def test_frequencies_have_no_curvature(table: Any, quantity: Any) -> None:
    model = px.extend(nn.Sequential(table(6, 4, scale_grad_by_freq=True), nn.Flatten(), nn.LazyLinear(3)))
    loss, x, y = px.extend(nn.CrossEntropyLoss()), torch.randint(6, (N, 2)), torch.randint(3, (N,))
    with pytest.raises(px.UnsupportedUseError, match=r"divides the gradient .* 0.weight.*parameters="):
        with px.backpack(quantity):
            loss(model(x), y).backward()
    with px.backpack(quantity, parameters=model[2].parameters()) as results:
        loss(model(x), y).backward()
    assert "2.weight" in results


LOSSES: dict[str, tuple[Any, Any]] = {
    "class weights": (lambda: nn.CrossEntropyLoss(torch.tensor([0.5, 2.0, 1.0]), reduction="sum"), torch.arange(N) % 3),
    "huber": (lambda: nn.HuberLoss("sum"), torch.arange(3.0 * N).view(N, 3).double() / 20),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("inside", [False, True])
def test_products_under_autocast(name: str, inside: bool) -> None:
    """The loss is computed again on what autocast rounded, with weights and targets that it did not."""
    model, x, (make, y) = mlp(), torch.randn(N, 5), LOSSES[name]
    rows = testing.curvature_rows(model, make(), x, y)
    model, loss = px.extend(model.float()), px.extend(make().float())
    with torch.autocast("cpu", torch.bfloat16), px.backpack(px.GGNMP(), px.PCHMP(), px.HMP()):
        value = loss(model(x.float()), y.float() if y.is_floating_point() else y)
        with torch.autocast("cpu", enabled=inside):
            value.backward(retain_graph=True)
    for key, p in model.named_parameters():
        v = torch.randn(2, *p.shape).float()
        products = [f(v) for f in (p.ggnmp, p.pchmp, p.hmp)]
        assert testing.relative_error(products[0].flatten(1), v.double().flatten(1) @ block(rows[key])) < 0.05, key
        with torch.autocast("cpu", torch.bfloat16):  # which was for the forward pass
            assert all(map(torch.equal, products, [f(v) for f in (p.ggnmp, p.pchmp, p.hmp)]))


@pytest.mark.parametrize("inside", [False, True])
def test_eigenvalues_under_autocast_are_refused_by_its_name(inside: bool) -> None:
    model, loss = px.extend(mlp().float()), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(N, 5).float(), torch.randint(3, (N,))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model(x), y)
        with pytest.raises(px.PackextError, match="eigsh: .*autocast"), px.backpack(px.TopEigenvalues()):
            with torch.autocast("cpu", enabled=inside):
                value.backward()


@pytest.mark.parametrize("gap", [20.0, 30.0])
@pytest.mark.parametrize("likely", [0, 1])
def test_products_of_confident_predictions_in_float32(likely: int, gap: float) -> None:
    model, x = nn.Linear(2, 2, bias=False), torch.ones(1, 2)
    with torch.no_grad():
        model.weight.zero_()[likely, 0] = gap
    p, q = model(x).detach().softmax(1)[0]
    model, loss, eye = px.extend(model.float()), px.extend(nn.CrossEntropyLoss()), torch.eye(4).view(4, 2, 2).float()
    with px.backpack(px.GGNMP()):
        loss(model(x.float()), torch.tensor([0])).backward(retain_graph=True)
    want = torch.kron(p * q * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), torch.ones(2, 2))
    torch.testing.assert_close(model.weight.ggnmp(eye).flatten(1).double(), want, rtol=1e-5, atol=0)


class Absolute(nn.Module):
    """Of the user's own, and piecewise linear."""

    reduction = "mean"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean()


def log_likelihood(path: str, model: Any, loss: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss on the way that `path` names."""
    logits = model(x)  # [N, T, C]
    if path == "positions in the rows":
        return loss(F.log_softmax(logits, -1).flatten(0, 1), y.flatten(0, 1))
    if y.dim() == 3:
        y = y.mT
    if path == "classes along axis 1":
        return loss(F.log_softmax(logits.transpose(1, 2), 1), y)
    return loss(logits.transpose(1, 2).softmax(1).log(), y)


LIKELIHOODS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "mean": (nn.NLLLoss, {}),
    "sum": (nn.NLLLoss, {"reduction": "sum"}),
    "weighted mean": (nn.NLLLoss, {"weight": torch.tensor([0.5, 2.0, 1.0]), "ignore_index": 1}),
    "weighted sum": (nn.NLLLoss, {"weight": torch.tensor([0.5, 2.0, 1.0]), "ignore_index": 1, "reduction": "sum"}),
    "divergence": (nn.KLDivLoss, {"reduction": "batchmean"}),
    "sum of divergences": (nn.KLDivLoss, {"reduction": "sum", "log_target": True}),
    "divergence over classes": (nn.KLDivLoss, {"reduction": "mean"}),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("path", ["classes along axis 1", "positions in the rows", "logarithm of softmax"])
def test_a_likelihood_of_log_probabilities_has_the_ggn_of_the_logits(path: str, name: str) -> None:
    """Split at the logits, next to dense matrices of torch.func; the Hessian is that of the loss either way."""
    kind, options = LIKELIHOODS[name]
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    model, x, y = mlp(), torch.randn(N, 2, 5), torch.tensor([[0, 1], [2, 2], [1, 0], [2, 1]])
    plain = kind(**options)
    if kind is nn.NLLLoss:
        cross_entropy, likely = nn.CrossEntropyLoss(**options), y
    else:  # of targets that need not sum to one
        t = torch.rand(N, 2, 3)
        divisor = {"sum": 1, "mean": t.numel()}.get(options["reduction"], 8 if "rows" in path else N)
        cross_entropy, likely, y = nn.CrossEntropyLoss(reduction="sum"), t / divisor, t.log() if plain.log_target else t
    flat, shapes = torch.nn.utils.parameters_to_vector(model.parameters()).detach(), dict(model.named_parameters())

    def logits(v: Tensor) -> Tensor:
        parts = v.split([p.numel() for p in shapes.values()])
        given = {k: part.view(p.shape) for part, (k, p) in zip(parts, shapes.items(), strict=True)}
        return torch.func.functional_call(model, given, (x,)).flatten(0, 1)

    def value(z: Tensor) -> Tensor:
        return log_likelihood(path, lambda _: z.view(N, 2, 3), plain, x, y)

    jacobian = torch.func.jacrev(logits)(flat).flatten(0, 1)
    split = torch.func.jacrev(torch.func.grad(value))(logits(flat)).reshape(len(jacobian), -1)
    ggn, hessian = jacobian.T @ split @ jacobian, torch.func.jacrev(torch.func.grad(lambda v: value(logits(v))))(flat)

    px.extend(model)
    parameters, loss = list(model.parameters()), px.extend(copy.deepcopy(plain))

    def whole(field: str) -> Tensor:
        return torch.cat([getattr(p, field).flatten() for p in parameters])

    with px.backpack(px.DiagGGNMC(2, torch.Generator().manual_seed(0))):
        inner = model(x)
        same = (inner.mT, likely.mT if likely.dim() == 3 else likely)
        if "rows" in path:
            same = (inner.flatten(0, 1), likely.flatten(0, 1))
        px.extend(cross_entropy)(*same).backward()
    same = whole("diag_ggn_mc")
    asked = (
        px.DiagGGNExact(), px.SqrtGGNExact(), px.DiagHessian(), px.GGNMP(), px.TopEigenvalues(curvature="ggn", tol=1e-9)
    )  # fmt: skip
    with px.backpack(*asked, px.DiagGGNMC(2, torch.Generator().manual_seed(0))) as results:
        log_likelihood(path, model, loss, x, y).backward(retain_graph=True)
    root = torch.cat([p.sqrt_ggn_exact.flatten(2) for p in parameters], 2).flatten(0, 1)
    torch.testing.assert_close(root.T @ root, ggn)
    torch.testing.assert_close(whole("diag_ggn_exact"), ggn.diagonal())
    torch.testing.assert_close(whole("diag_h"), hessian.diagonal())
    torch.testing.assert_close(results.top_eigenvalues.values, torch.linalg.eigvalsh(ggn)[-1:])
    torch.testing.assert_close(whole("diag_ggn_mc"), same)
    at = 0
    for p in parameters:
        block = ggn[at : at + p.numel(), at : at + p.numel()]
        torch.testing.assert_close(p.ggnmp(torch.eye(p.numel()).view(-1, *p.shape)).flatten(1), block)
        at += p.numel()


def test_scores_that_are_no_log_probabilities_have_no_ggn() -> None:
    model, x, t = px.extend(nn.Sequential(nn.Linear(5, 3), nn.LogSoftmax(1))), torch.randn(N, 5), torch.rand(N, 3)
    calls: list[tuple[nn.Module, Tensor, float]] = [
        (nn.NLLLoss(), torch.arange(N) % 3, 0.01),
        (nn.KLDivLoss(reduction="batchmean"), t, 0.01),
        (nn.KLDivLoss(reduction="batchmean"), t[:1], 0.0),  # for all samples
        (nn.KLDivLoss(reduction="none"), t, 0.0),
    ]
    for quantity, (loss, y, off) in itertools.product((px.DiagGGNExact(), px.TopEigenvalues(curvature="ggn")), calls):
        with pytest.raises(px.PackextError, match="log_softmax gives along axis 1"), px.backpack(quantity):
            px.extend(loss)(model(x) + off, y).sum().backward()
    for quantity in (px.DiagGGNExact(), px.TopEigenvalues(curvature="ggn")):
        with pytest.raises(px.PackextError, match="requires grad"), px.backpack(quantity):
            px.extend(nn.KLDivLoss(reduction="sum"))(model(x), model(-x).exp()).backward()
    with px.backpack(px.DiagGGNExact()):  # as of the cross entropy: a step that overflows
        px.extend(nn.NLLLoss())(model(x * torch.nan), torch.arange(N) % 3).backward()
    assert model[0].weight.diag_ggn_exact.isnan().all()


FLAT: dict[str, tuple[nn.Module, str]] = {
    "l1": (nn.L1Loss(), "Use HuberLoss"),
    "smooth l1": (nn.SmoothL1Loss(beta=0), "beta=0"),
    "own": (Absolute(), "linear in its first argument here"),
}


@pytest.mark.parametrize("name", FLAT)
def test_a_loss_without_curvature_has_no_ggn(name: str) -> None:
    """Zero is not what the GGN of the network and its likelihood is: it is refused by all quantities alike."""
    loss, match = FLAT[name]
    model, loss = px.extend(nn.Sequential(nn.Linear(5, 3), nn.LogSoftmax(1))), px.extend(loss)
    x, y = torch.randn(N, 5), torch.rand(N, 3)
    with px.backpack(px.GGNMP(), px.HMP()):
        loss(model(x), y).backward(retain_graph=True)
    refused = [lambda: model[0].weight.ggnmp(torch.randn(1, 3, 5))]
    for quantity in (px.TopEigenvalues(curvature="ggn"), px.DiagGGNExact(), px.KFAC(), px.PCHMP()):

        def step(quantity: Any = quantity) -> None:
            with px.backpack(quantity):
                loss(model(x), y).backward()

        refused.append(step)
    for call in refused:
        with pytest.raises(px.PackextError, match=match) as error:
            call()
        assert type(error.value) is px.PackextError
    assert model[0].weight.hmp(torch.randn(1, 3, 5)).any()


def test_a_loss_that_is_flat_only_here_has_a_ggn_of_zero() -> None:
    model, loss = px.extend(mlp()), px.extend(nn.HuberLoss())
    with px.backpack(px.GGNMP(), px.DiagGGNExact()):
        loss(model(torch.randn(N, 5)), torch.full((N, 3), 99.0)).backward(retain_graph=True)
    assert not model[0].weight.ggnmp(torch.randn(1, *model[0].weight.shape)).any()
    assert not model[0].weight.diag_ggn_exact.any()


def test_hessians_of_several_losses_add_up() -> None:
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    first, second = px.extend(nn.CrossEntropyLoss()), px.extend(nn.CrossEntropyLoss(reduction="sum"))
    want = testing.hessian(model, lambda z, t: first(z, t) + second(z, t), x, y).trace()
    px.extend(model)
    with px.backpack(px.HessianTrace(200)) as results:
        z = model(x)
        (first(z, y) + second(z, y)).backward()
    assert abs(results.hessian_trace.value - want) <= 5 * results.hessian_trace.standard_error
    with pytest.raises(px.PackextError, match="several losses"), px.backpack(px.TopEigenvalues()):
        z = model(x)
        (first(z, y) + second(z, y)).backward()


# -- a broken rule -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", range(2))
def test_a_broken_propagation_is_noticed(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from packext import _roots

    exact = _roots.exact
    change = (lambda c: itertools.islice(c, 1), lambda c: (1.01 * s for s in c))[wrong]
    monkeypatch.setattr(_roots, "exact", lambda *args: change(exact(*args)))
    model, x, y = mlp(), torch.randn(N, 5), torch.randint(3, (N,))
    rows = testing.curvature_rows(model, nn.CrossEntropyLoss(), x, y, weights=[1 / N] * N)
    run(model, nn.CrossEntropyLoss(), x, y, *quantities())
    with pytest.raises(AssertionError):
        compare(model, rows)


@pytest.mark.parametrize("quantity", [px.SqrtGGNExact(), px.DiagGGNMC(), px.KFAC()])
def test_a_negative_scale_has_no_root(quantity: px.Quantity) -> None:
    with pytest.raises(ValueError, match=f"{type(quantity).__name__} with scale=-1.0.*no root"):
        px.backpack(quantity, scale=-1.0)
    px.backpack(px.BatchGrad(), px.DiagHessian(), scale=-1.0)
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be finite"):
            px.backpack(px.BatchGrad(), scale=scale)


@pytest.mark.parametrize("scale", [1.0, 0.25, float(N)])
def test_the_empirical_fisher_is_linear_in_a_number(scale: float) -> None:
    """A number is a factor of what the loss as written gives; the samples' own losses are known from the loss."""
    model, loss_fn = px.extend(mlp()), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    with px.backpack(px.DiagEF()) as written:
        loss_fn(model(x), y).backward()
    with px.backpack(px.DiagEF(), scale=scale) as results:
        loss_fn(model(x), y).backward()
    for name in written:
        torch.testing.assert_close(results[name].diag_ef, scale * written[name].diag_ef)


def test_quantities_of_one_root_do_not_share_their_sums() -> None:
    class Another(px.DiagGGNExact):
        savefield = "another"

    model, loss_fn, x, y = px.extend(mlp()), px.extend(nn.CrossEntropyLoss()), torch.randn(N, 5), torch.arange(N) % 3
    with px.backpack(px.DiagGGNExact()):
        loss_fn(model(x), y).backward()
    alone = [p.diag_ggn_exact for p in model.parameters()]
    with px.backpack(px.DiagGGNExact(), Another()):
        loss_fn(model(x), y).backward()
    for want, p in zip(alone, model.parameters(), strict=True):
        torch.testing.assert_close(p.diag_ggn_exact, want)
        torch.testing.assert_close(p.another, want)


def test_columns_of_several_losses_have_no_gram_matrix_of_the_whole_model() -> None:
    model, loss_fn, x = px.extend(Two()), px.extend(nn.MSELoss()), torch.randn(N, 5)
    with pytest.raises(px.PackextError, match="several losses"), px.backpack(px.GGNGram()):
        z, h = model(x)
        (loss_fn(z, torch.zeros(N, 3)) + loss_fn(h, torch.zeros(N, 4))).backward()


def test_models_one_behind_the_other() -> None:
    """What one model gives is the next one's input: curvature of all of them, as if they were one."""
    a, b, c = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)
    whole, x, y = nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), c), torch.randn(4, 5), torch.randint(3, (4,))
    loss_fn = px.extend(nn.CrossEntropyLoss())
    asked = [px.DiagGGNExact(), px.KFAC(fisher="exact"), px.DiagHessian(), px.HMP()]

    def found(model: Any) -> list[list[Any]]:
        with px.backpack(*asked, attach=False) as results:
            loss_fn(model(x), y).backward(retain_graph=True)
            each = [results[p] for p in whole.parameters()]
            torch.manual_seed(1)
            products = [r.hmp(torch.randn(2, *p.shape)) for r, p in zip(each, whole.parameters(), strict=True)]
        return [[r.diag_ggn_exact, *r.kfac, r.diag_h, hmp] for r, hmp in zip(each, products, strict=True)]

    wanted = found(px.extend(whole))
    px.unextend(whole)
    first, second, third = (
        px.extend(nn.Sequential(a, nn.Tanh())),
        px.extend(nn.Sequential(b, nn.Tanh())),
        px.extend(c),
    )
    torch.testing.assert_close(found(lambda x: third(second(first(x)))), wanted)
    for part in (first, second):  # and a term of the loss that is made of what stands between them
        h = first(x)
        k = second(h)
        beside = (h if part is first else k).square().sum()
        with pytest.raises(px.PackextError, match="other terms"), px.backpack(px.DiagGGNExact()):
            (loss_fn(third(k), y) + beside).backward()


def test_the_oracle_of_the_hessian_of_a_group_norm() -> None:
    """Of which torch's second derivatives are wrong for several cotangents at once (2.13)."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.group_norm(self.map(x).mT, 2).mT

    model, x, y = Norm(), torch.randn(1, 2, 2), torch.randn(1, 2, 2)
    found = testing.hessian(model, nn.MSELoss(), x, y)
    slope = torch.autograd.grad(nn.MSELoss()(model(x), y), model.map.weight, create_graph=True)[0]
    want = [torch.autograd.grad(s, model.map.weight, retain_graph=True)[0].flatten() for s in slope.flatten()]
    torch.testing.assert_close(found, torch.stack(want))
