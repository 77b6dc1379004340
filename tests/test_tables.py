"""Kronecker factors of tables that are read at constant indices, of bags, and of what meets data entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packext as px
from packext import linalg, testing
from packext._factored import tables
from packext._factored.tables import entries_of

pytestmark = pytest.mark.usefixtures("double")

N, T, E, ROWS = 4, 5, 6, 8
LOSS = nn.CrossEntropyLoss()


def run(model: nn.Module, x: Any, y: Tensor, *asked: Any, **options: Any) -> px.Results:
    px.extend(model)
    loss = px.extend(nn.CrossEntropyLoss())
    model.zero_grad()
    with px.backpack(*asked, **options) as results:
        loss(testing.call(model, x), y).backward()
    return results


def words() -> tuple[Tensor, Tensor]:
    return torch.randint(9, (N, T)), torch.randint(3, (N,))


class Words(nn.Module):
    """Tokens, to which rows of a table of positions are added as `read` says; or in data's order, where `x` has it."""

    def __init__(self, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.wte, self.wpe, self.head = nn.Embedding(9, E), nn.Embedding(ROWS, E), nn.Linear(E, 3)
        self.types = nn.Embedding(2, E)
        self.read = read

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        x = self.wte(ids)
        if positions is None:
            read = self.read(self)
            if read.shape[:2] in ((T, N), (N, E)):
                x = (x.transpose(0, 1) + read).transpose(0, 1)
            else:
                x = x + (read if read.shape[-1] == E else read.mT)
        else:
            read = self.wpe(positions)
            x = x + (read if read.dim() == 3 else read[:, None]) + self.types(torch.zeros_like(ids))
        return self.head(x.tanh().mean(1))


AT = torch.tensor([3, 0, 0, 7, 1])

#: Ways to read rows of `wpe`, and which ones they are.
READS: dict[str, tuple[Callable[[Any], Tensor], Tensor]] = {
    "indices": (lambda m: m.wpe(AT), AT),
    "the first row": (lambda m: m.wpe(torch.zeros_like(AT)), torch.zeros_like(AT)),
    "an axis in front": (lambda m: m.wpe(torch.arange(T)[None]), torch.arange(T)),
    "for each sample": (lambda m: m.wpe(AT[None].expand(N, T)), AT),
    "for each sample, time first": (lambda m: m.wpe(AT[:, None].expand(T, N)), AT),
    "for each sample, not each position": (lambda m: m.wpe(AT[:N]), AT[:N]),
    "repeated": (lambda m: m.wpe(AT).repeat(N, 1, 1), AT),
    "a slice": (lambda m: m.wpe.weight[1 : T + 1], torch.arange(1, T + 1)),
    "indexed, from behind": (lambda m: m.wpe.weight[AT - ROWS], AT),
    "transposed": (lambda m: m.wpe(AT).T[None], AT),
    "in heads": (lambda m: m.wpe(AT).view(T, 2, 3).transpose(0, 1).contiguous().transpose(0, 1).flatten(1), AT),
    "turned": (lambda m: m.wpe.weight[:T].flip(0).roll(1, 0), torch.tensor([0, 4, 3, 2, 1])),
    "joined": (lambda m: torch.cat([m.wpe(AT[:2]), m.wpe.weight[6:7], m.wpe(AT[3:])]), torch.tensor([3, 0, 6, 7, 1])),
    "stacked": (lambda m: torch.stack([m.wpe.weight[k] for k in AT.tolist()]), AT),
    "one after another": (lambda m: torch.stack(m.wpe.weight.unbind(0)[:T]).clone(), torch.arange(T)),
    "other types": (lambda m: m.wpe(AT).float().double(), AT),
    "with another table": (lambda m: m.wpe(AT) + m.types(torch.zeros_like(AT)), AT),
}


def twin(model: Words) -> Words:
    other = Words(model.read)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("how", READS)
def test_a_table_read_at_constant_indices_has_the_factors_of_one_that_data_reads(how: str) -> None:
    read, positions = READS[how]
    model, (ids, y) = Words(read), words()
    model.wpe.weight.data = model.wpe.weight.detach().float().double()
    if how != "with another table":
        nn.init.zeros_(model.types.weight)
    other, moved = twin(model), positions.expand(N, T) if len(positions) == T else positions
    of_all = "for each" in how or how == "repeated"  # which a sample by itself is not
    rows = None if of_all else testing.curvature_rows(model, LOSS, ids, y, weights=[1 / N] * N)
    asked = px.KFAC(fisher="exact"), px.EKFAC(fisher="exact")
    run(model, ids, y, *asked)
    run(other, (ids, moved), y, *asked)
    torch.testing.assert_close(model.wpe.weight.kfac, other.wpe.weight.kfac, rtol=1e-9, atol=1e-12)
    assert model.wpe.weight.kfac[0].shape == (ROWS,)
    # The corrected eigenvalues in a basis, next to the definition or those of the twin.
    basis = {"wpe.weight": other.wpe.weight.ekfac}
    for m, x in ((model, ids), (other, (ids, moved))):
        run(m, x, y, px.EKFAC(basis, fisher="exact"), parameters=[m.wpe.weight])
    found = model.wpe.weight.ekfac.eigenvalues
    torch.testing.assert_close(found, other.wpe.weight.ekfac.eigenvalues)
    if rows is not None:
        want = basis["wpe.weight"].rotate(rows["wpe.weight"]).square().sum((0, 1))
        torch.testing.assert_close(found.reshape(want.shape), want)


def test_the_definition_by_single_samples_agrees() -> None:
    class Relative(nn.Module):
        """Attention with a bias for each distance and head: rows of 2 entries, read at T * T places."""

        def __init__(self) -> None:
            super().__init__()
            self.bias, self.head = nn.Embedding(2 * T - 1, 2), nn.Linear(E, 3)

        def forward(self, x: Tensor) -> Tensor:
            t = torch.arange(x.shape[1])
            scores = (x @ x.mT)[:, None] + self.bias(t[:, None] - t[None] + T - 1).permute(2, 0, 1)
            return self.head((scores.softmax(-1) @ x[:, None]).mean(1).tanh().mean(1))

    x, y = torch.randn(N, T, E), torch.randint(3, (N,))
    report = testing.check(Relative(), LOSS, x, y, [px.KFAC(fisher="exact"), px.KFLR()])
    assert report.ok and len(report) == 9, str(report)


# -- what meets data entry by entry ------------------------------------------------------------------------------


class Entrywise(nn.Module):
    def __init__(self, shape: tuple[int, ...], meet: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.p, self.meet, self.head = nn.Parameter(torch.randn(shape)), meet, nn.Linear(E, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.meet(x, self.p).tanh().mean(1))


MEETINGS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "positions": ((1, T, E), lambda x, p: x + p),
    "positions, no batch axis": ((T, E), lambda x, p: p - x),
    "scales of tables": ((T, E, 1), lambda x, p: (x[..., None] * p)[..., 0]),
    "a bias of axes": ((T, 1), lambda x, p: x + p),
    "learned queries": ((1, 3, E), lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1)),
    "a class token": ((1, 1, E), lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1)),
    "a scale of channels": ((T, 1), lambda x, p: x * p),
    "a number": ((), lambda x, p: x * p),
    "twice": ((T, E), lambda x, p: (x + p).tanh() * p),
}


@pytest.mark.parametrize("name", MEETINGS)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_what_meets_data_entry_by_entry(name: str, approx: str) -> None:
    shape, meet = MEETINGS[name]
    model, x, y = Entrywise(shape, meet), torch.randn(N, T, E), torch.randint(3, (N,))
    table = sum(size > 1 for size in shape) > 1
    asked = [px.KFAC(fisher=fisher, approx=approx) for fisher in ("exact", "empirical")]
    if table and approx == "reduce":
        with pytest.raises(px.UnsupportedUseError, match=r'for p \[.*approx="reduce".*Use approx="expand"'):
            testing.check(model, LOSS, x, y, asked[:1])
        return
    for each in asked:
        report = testing.check(model, LOSS, x, y, [each], tolerance=1e-10)
        assert report.ok and {e.parameter for e in report} == {"p", "head.weight", "head.bias"}, str(report)
    run(model, x, y, px.KFAC(fisher="exact"), px.EKFAC(fisher="exact"))
    want = linalg.kron_matvec(model.p.kfac, model.p.grad)
    torch.testing.assert_close(model.p.ekfac.matvec(model.p.grad), want)
    rows = testing.curvature_rows(model, LOSS, x, y, weights=[1 / N] * N)["p"]
    basis = {k: p.ekfac for k, p in model.named_parameters()}
    basis["p"] = linalg.KronEigh([v * 2 if v.dim() == 1 else v for v in basis["p"].vectors], basis["p"].eigenvalues)
    if not table:
        flat = rows.reshape(-1, model.p.numel())
        torch.testing.assert_close(linalg.kron(model.p.kfac), flat.T @ flat)
    run(model, x, y, px.EKFAC(basis, fisher="exact"))
    second = basis["p"].rotate(rows).square().sum((0, 1))
    torch.testing.assert_close(model.p.ekfac.eigenvalues.reshape(second.shape), second)


def test_a_table_that_is_all_read_once_is_exact_for_one_sample_and_position() -> None:
    model, x, y = Entrywise((1, 1, E), lambda x, p: x + p), torch.randn(1, 1, E), torch.randint(3, (1,))
    other = Words(lambda m: m.wpe(torch.tensor([2])))
    for m, p, data in ((model, model.p, x), (other, other.wpe.weight, torch.tensor([[4]]))):
        rows = testing.curvature_rows(m, LOSS, data, y)
        rows = rows["p" if p is model.p else "wpe.weight"].flatten(2).flatten(0, 1)
        for approx in ("expand", "reduce"):
            m.types.weight.requires_grad_(False) if m is other else None
            run(m, data, y, px.KFAC(fisher="exact", approx=approx))
            torch.testing.assert_close(linalg.kron(p.kfac), rows.T @ rows)


@pytest.mark.parametrize("how", ["twice a bias", "of the samples' own"])
def test_a_vector_has_its_own_block_however_it_is_used(how: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.head = nn.Parameter(torch.randn(E if "bias" in how else N)), nn.Linear(E, 3)

        def forward(self, x: Tensor) -> Tensor:
            p = 2 * self.p.exp() if "bias" in how else self.p[:, None]
            return self.head((x + p).tanh())

    model, x, y = Net(), torch.randn(N, E), torch.randint(3, (N,))
    run(model, x, y, px.KFAC(fisher="exact"), px.SqrtGGNExact(), scale="sample")
    rows = model.p.sqrt_ggn_exact.flatten(0, 1)
    torch.testing.assert_close(model.p.kfac, [rows.T @ rows])
    basis = {k: linalg.KronEigh.of(p.kfac) for k, p in model.named_parameters()}
    run(model, x, y, px.EKFAC(basis, fisher="exact"), scale="sample")
    torch.testing.assert_close(model.p.ekfac.eigenvalues, basis["p"].rotate(rows).square().sum(0))


# -- bags ----------------------------------------------------------------------------------------------------------


class Bags(nn.Module):
    """A bag, or an embedding whose rows are put together behind it."""

    def __init__(self, mode: str, by_hand: bool, weighted: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(7, E) if by_hand else nn.EmbeddingBag(7, E, mode=mode)
        self.mode, self.by_hand, self.weighted, self.head = mode, by_hand, weighted, nn.Linear(E, 3)

    def forward(self, ids: Tensor) -> Tensor:
        weights = ids.double().cos() if self.weighted else None
        if not self.by_hand:
            return self.head(self.table(ids, per_sample_weights=weights).tanh())
        x = self.table(ids)
        x = x if weights is None else x * weights[..., None]
        return self.head((x.sum(1) if self.mode == "sum" else x.mean(1)).tanh())


@pytest.mark.parametrize(("mode", "weighted"), [("sum", False), ("mean", False), ("sum", True)])
def test_a_bag_has_the_factors_of_an_embedding_and_a_sum(mode: str, weighted: bool) -> None:
    ids, y = torch.randint(7, (N, T)), torch.randint(3, (N,))
    bag, hand = Bags(mode, False, weighted), Bags(mode, True, weighted)
    hand.load_state_dict(bag.state_dict())
    for model in (bag, hand):
        run(model, ids, y, px.KFAC(fisher="exact"), px.EKFAC(fisher="exact"))
    torch.testing.assert_close(bag.table.weight.kfac, hand.table.weight.kfac)
    basis = {k: p.ekfac for k, p in hand.named_parameters()}
    for model in (bag, hand):
        run(model, ids, y, px.EKFAC(basis, fisher="exact"))
    torch.testing.assert_close(bag.table.weight.ekfac.eigenvalues, hand.table.weight.ekfac.eigenvalues)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_different_sizes(mode: str) -> None:
    """Tokens are counted as they are, without those of the padding index, and an empty bag has none."""

    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(5, E, mode=mode, padding_idx=1), nn.Linear(E, 3)

        def forward(self, offsets: Tensor, tokens: Tensor) -> Tensor:
            return self.head(self.bag(tokens, offsets).tanh())

    model, y = Ragged(), torch.tensor([0, 2, 1, 1])
    tokens, offsets = torch.tensor([0, 1, 4, 2, 1, 0, 0]), torch.tensor([0, 3, 3, 5])
    run(model, (offsets, tokens), y, px.KFLR(), px.SqrtGGNExact())
    counts, outputs = model.bag.weight.kflr
    torch.testing.assert_close(counts, torch.tensor([3.0, 0, 1, 0, 1]) / 5)
    # Of a bag's gradient, from the rows of one of its tokens: 0 and 4, none, 2, 0 twice.
    root = model.bag.weight.sqrt_ggn_exact
    of, times = {0: 4, 2: 2, 3: 0}, {0: 1, 2: 1, 3: 2}
    want = torch.zeros(E, E)
    for n, size in {0: 2, 2: 1, 3: 2}.items():
        b = root[:, n, of[n]] / times[n]
        want += size * b.T @ b
    torch.testing.assert_close(outputs, want)


def test_bags_that_are_all_empty_have_no_factor_but_zero() -> None:
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(5, E), nn.Linear(E, 3)

        def forward(self, offsets: Tensor) -> Tensor:
            return self.head(self.bag(offsets.new_zeros(0), offsets))

    model = Empty()
    run(model, torch.zeros(N, dtype=torch.int64), torch.randint(3, (N,)), px.KFLR())
    assert not model.bag.weight.kflr[0].any() and not model.bag.weight.kflr[1].any()


class Twice(Words):
    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        read = self.wpe(AT)
        return self.head(((self.wte(ids) + read).tanh() * read).mean(1))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_rows_that_meet_data_in_two_places_are_read_once(fisher: str) -> None:
    model, (ids, y) = Twice(lambda m: m), words()
    asked = px.KFAC(fisher=fisher)
    report = testing.check(model, nn.CrossEntropyLoss(), ids, y, [asked], parameters=[model.wpe.weight])
    assert report.ok, str(report)


# -- what is refused -------------------------------------------------------------------------------------------------


#: Positions of the first sample, as many as there are samples.
OF_ONE = torch.arange(N * T).view(N, T, 1) < N

REFUSED: dict[str, Callable[[], nn.Module]] = {
    "computed": lambda: Words(lambda m: m.wpe(AT) * 2),
    "normalised": lambda: Words(lambda m: F.normalize(m.wpe(AT), dim=-1)),
    "added to itself": lambda: Words(lambda m: m.wpe(AT) + m.wpe(AT.flip(0))),
    "some columns": lambda: Words(lambda m: torch.cat([m.wpe(AT)[:, :2], m.types(AT % 2)[:, 2:]], 1)),
    "columns of two rows": lambda: Words(lambda m: torch.cat([m.wpe(AT)[:, :2], m.wpe(AT.flip(0))[:, 2:]], 1)),
    "of one sample": lambda: Words(lambda m: torch.where(OF_ONE, m.wpe(AT)[None], m.types(AT % 2)[None])),
    "columns in two orders": lambda: Words(lambda m: torch.cat([m.wpe(AT[:2]), m.wpe(AT[2:]).flip(1)])),
    "interpolated": lambda: Words(lambda m: F.interpolate(m.wpe.weight.T[None], T, mode="linear")[0].T),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_are_no_rows_are_refused(name: str) -> None:
    model, (ids, y) = REFUSED[name](), words()
    with pytest.raises(px.UnsupportedUseError, match=r"for wpe\.weight \[8, 6\], which .*parameters=\[\.\.\.\]"):
        run(model, ids, y, px.KFAC(), parameters=[model.wpe.weight])
    assert all(p.grad is None and not hasattr(p, "kfac") for p in model.parameters())
    run(model, ids, y, px.DiagGGNExact())


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}, {"padding_idx": 3}])
def test_embeddings_that_change_the_gradient_are_refused(options: Any) -> None:
    model, (ids, y) = Words(lambda m: m.wpe(AT)), words()
    model.wpe = nn.Embedding(ROWS, E, **options)
    with pytest.raises(px.UnsupportedUseError, match="for wpe.weight"):
        run(model, ids, y, px.KFAC())
    if "padding_idx" in options:  # of which nothing is read
        model.read = lambda m: m.wpe(AT.clamp(max=2))
        run(model, ids, y, px.KFAC(), parameters=[model.wpe.weight])
        torch.testing.assert_close(model.wpe.weight.kfac[0], AT.clamp(max=2).bincount(minlength=ROWS) / T)


def test_a_table_with_the_samples_along_its_rows_is_refused() -> None:
    model, x, y = Entrywise((T, N), lambda x, p: x + p.T[..., None]), torch.randn(N, T, E), torch.randint(3, (N,))
    with pytest.raises(px.UnsupportedUseError, match=r"for p \[5, 4\]"):
        run(model, x, y, px.KFAC())


# -- how the entries are found ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("base", [4, 128])
def test_entries_are_those_of_the_same_call_on_their_numbers(
    dtype: torch.dtype, base: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BASE", base)
    p = nn.Parameter(torch.randn(128, 8, dtype=dtype))  # as many entries as a power of the base, all of which are read
    other = nn.Parameter(torch.randn(2, 8, dtype=dtype))
    number, index = torch.arange(p.numel()).view(128, 8), torch.randperm(128)

    def read(t: Tensor, rest: Tensor) -> Tensor:
        some = torch.cat([t[index], rest]).flip(1).view(2, 65, 8).transpose(0, 2)
        return torch.stack([some, some.flip(1)]).roll(3, 0)[None].expand(3, -1, -1, -1, -1)

    found = entries_of(read(p, other), p)
    assert found is not None
    assert torch.equal(found, read(number, torch.full((2, 8), -1)))
    assert entries_of(read(p, other).exp(), p) is None
    assert entries_of(torch.add(p, p.detach()[:1], alpha=1).view(-1), p) is not None  # entries as they are
    assert entries_of(p + p.flip(0), p) is None
    whole = tables.rows_of(found, 8)  # columns stand along an axis in the middle, in another order
    assert whole is not None
    place, row = whole
    assert torch.equal(found.flatten()[place], row[:, None] * 8 + torch.arange(8))
    assert torch.equal(row.sort()[0], index.repeat(6).sort()[0])
    assert entries_of(torch.add(other, p[:2], alpha=2), p) is None
    assert p.grad is None and other.grad is None


def test_quantities_of_individual_gradients_do_not_ask_where_entries_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr("packext._use.rows_in", asked)
    model, (ids, y) = Words(lambda m: m.wpe(AT)), words()
    run(model, ids, y, *testing.all_quantities(), px.DiagGGNExact())
    with pytest.raises(AssertionError, match="asked"):
        run(model, ids, y, px.KFAC())


def test_parts_of_a_batch_have_the_factors_of_the_whole() -> None:
    model, (ids, y) = Words(lambda m: m.wpe(AT)), words()
    whole = run(model, ids, y, px.KFAC(fisher="exact"), scale="sample")["wpe.weight"].kfac
    model.zero_grad()
    loss = px.extend(nn.CrossEntropyLoss())
    with px.backpack(px.KFAC(fisher="exact"), accumulate=True, scale="sample") as results:
        for part in (slice(0, 1), slice(1, N)):
            loss(model(ids[part]), y[part]).backward()
    torch.testing.assert_close(results["wpe.weight"].kfac, whole)
