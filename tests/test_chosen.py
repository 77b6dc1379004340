"""Curvature where rows of the model's output are chosen, or put into another order, between model and loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px
from packext import testing

pytestmark = pytest.mark.usefixtures("double")
N, T, C = 5, 6, 4
Choose = Callable[[Tensor], Tensor]


class Positions(nn.Module):
    """Logits of every position, `[N, T, C]`, each of which depends on those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh().cumsum(1))


class Quartic(nn.Module):
    """A convex loss that no closed form is known of."""

    reduction = "mean"

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return ((z - y) ** 4).flatten(1).sum(1).mean()


MASK = torch.tensor([[1, 0, 1, 0, 0, 1], [0] * 6, [1] * 6, [0, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]]).bool()
INDEX = torch.tensor([7, 3, 28, 3, 14, 9, 22, 21, 0])
CHOICES: dict[str, Choose] = {
    "mask": lambda t: t[MASK],
    "index": lambda t: t.flatten(0, 1)[INDEX],
    "turned": lambda t: t[[3, 1, 0, 4, 2]][:, ::2].flatten(0, 1),
    "one of each": lambda t: t[[2, 0, 1, 4, 3], [0, 5, 2, 2, 1]],
    "all": lambda t: t.flatten(0, 1).flip(0),
}
LOSSES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "cross-entropy": (nn.CrossEntropyLoss, lambda: torch.randint(C, (N, T))),
    "class weights": (lambda: nn.CrossEntropyLoss(torch.rand(C)), lambda: torch.randint(C, (N, T))),
    "sum": (lambda: nn.CrossEntropyLoss(reduction="sum"), lambda: torch.randint(C, (N, T))),
    "squares": (nn.MSELoss, lambda: torch.randn(N, T, C)),
    "quartic": (Quartic, lambda: torch.randn(N, T, C)),
}


def roots(model: nn.Module, loss: nn.Module, choose: Choose, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of each sample's share in the dense GGN, by the Hessian of the loss as a whole: `[N, D, D]` by name."""
    z, (names, parameters) = model(x), zip(*model.named_parameters(), strict=True)
    flat = z.flatten().detach()
    h = torch.autograd.functional.hessian(lambda f: loss(choose(f.view_as(z)), choose(y)), flat)
    j = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in z.flatten()]
    own, found = z[0].numel(), {}
    for k, name in enumerate(names):
        rows = torch.stack([each[k].flatten() for each in j])
        blocks = [slice(n * own, (n + 1) * own) for n in range(N)]
        assert torch.equal(h, torch.block_diag(*(h[b, b] for b in blocks)))
        found[name] = torch.stack([rows[b].T @ h[b, b] @ rows[b] for b in blocks])
    return found


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("choice", CHOICES)
def test_chosen_rows(choice: str, kind: str) -> None:
    make, targets = LOSSES[kind]
    model, loss, choose = Positions(), make(), CHOICES[choice]
    x, y = torch.randn(N, T, 3), targets()
    blocks = roots(model, loss, choose, x, y)
    px.extend(model)
    px.extend(loss)
    asked = (px.DiagGGNExact(), px.BatchDiagGGNExact(), px.SqrtGGNExact(), px.GGNGram(), px.GGNMP())
    with px.backpack(*asked):
        loss(0.5 * choose(model(x)) * 2, choose(y)).backward(retain_graph=True)
    for name, p in model.named_parameters():
        want = blocks[name]
        diagonals = want.diagonal(dim1=1, dim2=2).view(N, *p.shape)
        assert testing.relative_error(p.diag_ggn_exact, diagonals.sum(0)) < 1e-10, name
        assert testing.relative_error(p.diag_ggn_exact_batch, diagonals) < 1e-10, name
        v = p.sqrt_ggn_exact.flatten(2)
        assert testing.relative_error(torch.einsum("vna,vnb->nab", v, v), want) < 1e-10, name
        u = torch.randn(3, *p.shape)
        assert testing.relative_error(p.ggnmp(u).flatten(1), u.flatten(1) @ want.sum(0)) < 1e-10, name
        gram = p.ggn_gram.flatten(2).flatten(0, 1)  # it has the eigenvalues of the GGN
        assert testing.relative_error(gram.trace(), diagonals.sum()) < 1e-10, name
        assert testing.relative_error(gram.norm(), want.sum(0).norm()) < 1e-10, name


@pytest.mark.parametrize("kind", ["cross-entropy", "squares"])
def test_sampled_columns_of_chosen_rows(kind: str) -> None:
    make, targets = LOSSES[kind]
    model, loss, x, y = Positions(), make(), torch.randn(N, T, 3), targets()
    blocks = roots(model, loss, CHOICES["mask"], x, y)
    px.extend(model)
    px.extend(loss)
    with px.backpack(px.BatchDiagGGNMC(mc_samples=1000, generator=torch.Generator().manual_seed(0))):
        loss(model(x)[MASK], y[MASK]).backward()
    for name, p in model.named_parameters():
        want = blocks[name].diagonal(dim1=1, dim2=2)
        assert testing.relative_error(p.diag_ggn_mc_batch.flatten(1), want) < 0.15, name
        assert not p.diag_ggn_mc_batch[1].any()  # of which no row was chosen


def test_factors_and_the_hessian_are_those_of_ignored_targets() -> None:
    """A mean over the chosen rows is the mean over targets that are not ignored."""
    model, loss = px.extend(Positions()), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(N, T, 3), torch.randint(C, (N, T))
    asked = (px.KFLR(), px.KFAC(fisher="exact", approx="reduce"), px.DiagHessian(), px.BatchDiagHessian(), px.DiagEF())
    found: list[list[Tensor]] = []
    for chosen in (True, False):
        with px.backpack(*asked) as results:
            z = model(x)
            if chosen:
                loss(z[MASK], y[MASK]).backward()
            else:
                loss(z.flatten(0, 1), y.masked_fill(~MASK, -100).flatten()).backward()
        kinds = ("kflr", "kfac", "diag_h", "diag_h_batch", "diag_ef")
        values = [getattr(p, kind) for p in model.parameters() for kind in kinds]
        found.append([t for value in values for t in ([value] if isinstance(value, Tensor) else value)])
        assert results
    for ours, theirs in zip(*found, strict=True):
        assert testing.relative_error(ours, theirs) < 1e-10


def test_every_pass_looks_anew() -> None:
    """One structure, and other rows in each pass; as many of each sample in one of them, but not in their order."""
    model, loss = px.extend(Positions()), px.extend(nn.CrossEntropyLoss())
    plain = Positions()
    plain.load_state_dict(model.state_dict())
    x, y = torch.randn(N, T, 3), torch.randint(C, (N, T))
    for _ in range(5):
        index = torch.randperm(N * T)[: 2 * N]
        choose: Choose = lambda t, index=index: t.flatten(0, 1)[index]  # noqa: E731
        with px.backpack(px.BatchDiagGGNExact()):
            loss(choose(model(x)), choose(y)).backward()
        for name, want in roots(plain, nn.CrossEntropyLoss(), choose, x, y).items():
            p = model.get_parameter(name)
            assert testing.relative_error(p.diag_ggn_exact_batch.flatten(1), want.diagonal(dim1=1, dim2=2)) < 1e-10


def test_rows_of_two_forward_passes() -> None:
    model, loss = px.extend(Positions()), px.extend(nn.CrossEntropyLoss(reduction="sum"))
    x, y = torch.randn(2, N, T, 3), torch.randint(C, (2, N, T))
    found = []
    for together in (True, False):
        with px.backpack(px.DiagGGNExact()):
            if together:
                z = torch.cat([model(x[0])[MASK], model(x[1])[~MASK]])
                loss(z, torch.cat([y[0][MASK], y[1][~MASK]])).backward()
            else:
                (loss(model(x[0])[MASK], y[0][MASK]) + loss(model(x[1])[~MASK], y[1][~MASK])).backward()
        found.append([p.diag_ggn_exact for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert testing.relative_error(one, other) < 1e-10


REFUSED: dict[str, Callable[[Tensor, Any], Any]] = {
    "a mean of all": lambda z, loss: loss(z[MASK] - z[MASK].mean(0), 0 * z[MASK][:, 0].long()),
    "one row of two": lambda z, loss: loss(
        torch.cat([z[MASK], z[:1, 0] + z[1:2, 0]]), torch.zeros(13, dtype=torch.long)
    ),
    "sorted": lambda z, loss: loss(z[MASK].cumsum(0), 0 * z[MASK][:, 0].long()),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_of_several_samples_are_refused(case: str) -> None:
    model, loss = px.extend(Positions()), px.extend(nn.CrossEntropyLoss())
    with pytest.raises(px.CoupledSamplesError, match="influence each other"), px.backpack(px.DiagGGNExact()):
        REFUSED[case](model(torch.randn(N, T, 3)), loss).backward()
    assert all(p.grad is None for p in model.parameters())


def test_chosen_rows_within_other_inputs_are_refused() -> None:
    class Named(nn.CrossEntropyLoss):
        def forward(self, z: dict[str, Tensor], y: Tensor) -> Tensor:
            return super().forward(z["logits"], y)

    model, loss = px.extend(Positions()), px.extend(Named())
    with (
        pytest.raises(px.CoupledSamplesError, match="call it with the chosen rows alone"),
        px.backpack(px.DiagGGNExact()),
    ):
        loss({"logits": model(torch.randn(N, T, 3))[MASK]}, torch.zeros(12, dtype=torch.long)).backward()
    chain, plain = px.extend(nn.Sequential(nn.Linear(3, C))), px.extend(nn.CrossEntropyLoss())
    with pytest.raises(px.PackextError, match="KFRA"), px.backpack(px.KFRA()):
        plain(chain(torch.randn(N, 3))[[3, 1, 0]], torch.zeros(3, dtype=torch.long)).backward()


def test_a_model_that_returns_chosen_rows_is_told_what_to_do() -> None:
    class Masked(Positions):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[MASK]

    model, loss = px.extend(Masked()), px.extend(nn.CrossEntropyLoss())
    with pytest.raises(px.PackextError, match="choose rows"), px.backpack(px.DiagGGNExact()):
        loss(model(torch.randn(N, T, 3)), torch.zeros(12, dtype=torch.long)).backward()
