"""Models for which the table of cases does not suffice: random, of many parts, with a batch that matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packext as px
from packext import _flight, testing
from tests.cases import Attend, Pool
from tests.helpers import assert_exact, batch, mlp, rows_of

pytestmark = pytest.mark.usefixtures("double")

N = 4


def each(output: Tensor, y: Tensor) -> Tensor:
    """Share of each sample in the mean loss."""
    return F.cross_entropy(output, y, reduction="none") / len(y)


class Regularised(nn.Module):
    """Dropout in every place that torch has for it."""

    def __init__(self, rnn: nn.Module, width: int) -> None:
        super().__init__()
        self.rnn, self.drop = rnn, nn.Dropout(0.4)
        self.attend = nn.MultiheadAttention(width, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.rnn(x)[0])
        return self.head(self.attend(y, y, y)[0].mean(1))


@pytest.mark.parametrize(
    "rnn, width",
    [
        (lambda: nn.LSTM(5, 6, 3, dropout=0.5, batch_first=True), 6),
        (lambda: nn.GRU(5, 6, 2, dropout=0.5, batch_first=True, bidirectional=True), 12),
        (lambda: nn.RNN(5, 6, 2, dropout=0.5, batch_first=True, bias=False), 6),
    ],
)
def test_dropout_in_training_mode(rnn: Any, width: int) -> None:
    model, (x, y) = Regularised(rnn(), width), (torch.randn(N, 4, 5), torch.randint(3, (N,)))

    def output() -> Tensor:
        torch.manual_seed(3)
        return model(x)

    rows = rows_of(model, lambda: each(output(), y))
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(model, lambda: loss_fn(output(), y), rows, N)


def test_observation_draws_no_random_numbers() -> None:
    model, (x, y) = (
        Regularised(nn.LSTM(5, 6, 2, dropout=0.5, batch_first=True), 6),
        (torch.randn(N, 4, 5), torch.randint(3, (N,))),
    )
    states = []
    for extended in (False, True):
        if extended:
            px.extend(model)
        torch.manual_seed(1)
        with px.backpack(*testing.all_quantities()[:-1] if extended else ()):
            F.cross_entropy(model(x), y).backward()
        states.append((torch.get_rng_state(), model.head.weight.grad.clone()))
        model.zero_grad()
    assert torch.equal(states[0][0], states[1][0])
    torch.testing.assert_close(states[0][1], states[1][1])


@pytest.mark.parametrize("padding", [None, 1])
def test_frequencies_of_the_batch(padding: int | None) -> None:
    embedding = nn.Embedding(5, 6, scale_grad_by_freq=True, padding_idx=padding)
    model = nn.Sequential(embedding, nn.Tanh(), Pool(), nn.Linear(6, 3))
    x, y = torch.randint(5, (N, 6)), torch.randint(3, (N,))
    rows = rows_of(model, lambda: each(model(x), y))
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(model, lambda: loss_fn(model(x), y), rows, N)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_frequencies_of_the_batch_in_bags(mode: str) -> None:
    model = nn.Sequential(nn.EmbeddingBag(5, 6, mode=mode, scale_grad_by_freq=True), nn.Linear(6, 3))
    x, y = torch.randint(5, (N, 6)), torch.randint(3, (N,))
    rows = rows_of(model, lambda: each(model(x), y))
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(model, lambda: loss_fn(model(x), y), rows, N)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("words", [11, 8, 1, 4])
def test_bags_of_different_sizes(mode: str, words: int) -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(5, 6, mode=mode), nn.Linear(6, 3)

        def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
            return self.head(self.bag(ids, offsets))

    model, ids, offsets, y = Ragged(), torch.randint(5, (words,)), torch.tensor([0, 1, 1, 1]), torch.randint(3, (N,))
    rows = rows_of(model, lambda: each(model(ids, offsets), y))
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(model, lambda: loss_fn(model(ids, offsets), y), rows, N)


@pytest.mark.parametrize("first", [1, 2, N, 7])
def test_the_batch_need_not_be_the_first_input(first: int) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, shift: Tensor, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh() + shift.mean())

    model, shift, (x, y) = Net(), torch.randn(first, 3), batch()
    rows = rows_of(model, lambda: each(model(shift, x), y))
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(model, lambda: loss_fn(model(shift, x), y), rows, N)


def test_an_input_that_all_samples_share_may_meet_a_parameter_beside_them() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 7), nn.Parameter(torch.randn(7, 3))

        def forward(self, x: Tensor, gains: Tensor) -> Tensor:
            return torch.einsum("ni,i,io->no", self.a(x).tanh(), gains, self.b)

    model, gains, (x, y) = Net(), torch.randn(7), batch()
    rows = rows_of(model, lambda: each(model(x, gains), y))
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(model, lambda: loss_fn(model(x, gains), y), rows, N)


def test_a_penalty_outside_of_the_model_is_no_samples_gradient() -> None:
    model, (x, y) = mlp(), batch()
    rows = rows_of(model, lambda: each(model(x), y))
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    with px.backpack(px.BatchGrad(), px.Variance(), px.GradDot()):
        (loss_fn(model(x), y) + sum(p.square().sum() for p in model.parameters())).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, rows[name].sum(0) + 2 * p.detach())
        torch.testing.assert_close(p.grad_batch, rows[name])
        torch.testing.assert_close(p.grad_dot, rows[name].flatten(1) @ rows[name].sum(0).flatten())


def test_attention_without_a_batch_counts_tokens_or_is_one_sample() -> None:
    """`[T, E]` inputs: axis 0 holds tokens, which attention couples."""
    model, x = Attend(need_weights=False), torch.randn(5, 8)

    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend, self.head = model.attend, nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attend(x, x, x)[0])

    unbatched = px.extend(Unbatched())
    with pytest.raises(px.CoupledSamplesError, match="batch_axis"):
        with px.backpack(px.BatchGrad()):
            F.cross_entropy(unbatched(x), torch.randint(3, (5,))).backward()
    assert all(p.grad is None and not hasattr(p, "grad_batch") for p in unbatched.parameters())


# -- several forwards, several models ------------------------------------------------------------------


def test_two_forwards_of_one_batch_add() -> None:
    model, (x, y), other = mlp(), batch(), torch.randn(N, 5)
    rows = rows_of(model, lambda: each(model(x) - 2 * model(other), y))
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(model, lambda: loss_fn(model(x) - 2 * model(other), y), rows, N)


def test_two_losses_on_two_forwards_add() -> None:
    model, (x, y), other = mlp(), batch(), torch.randn(N, 5)
    rows = rows_of(model, lambda: each(model(x), y) + each(model(other), y))
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(model, lambda: loss_fn(model(x), y) + loss_fn(model(other), y), rows, N)


def test_two_forwards_of_different_batches_are_refused() -> None:
    model, (x, y), (more, z) = px.extend(mlp()), batch(), batch(6)
    with (
        pytest.raises(px.PackextError, match="4 samples.*6|6 samples.*4|6 .*and.*4|4 and.*6"),
        px.backpack(px.BatchGrad()),
    ):
        (F.cross_entropy(model(x), y) + F.cross_entropy(model(more), z)).backward()
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())


def test_two_models_in_a_row() -> None:
    first, second, (x, y) = nn.Linear(5, 6), nn.Linear(6, 3), batch()
    both = nn.ModuleList([first, second])
    rows = rows_of(both, lambda: each(second(first(x).tanh()), y))
    px.extend(both)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    results = assert_exact(both, lambda: loss_fn(second(first(x).tanh()), y), rows, N)
    assert set(results) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    px.extend(first), px.extend(second)
    with px.backpack(px.BatchGrad()) as results:
        loss_fn(second(first(x).tanh()), y).backward()
    torch.testing.assert_close(first.weight.grad_batch, rows["0.weight"])
    torch.testing.assert_close(second.weight.grad_batch, rows["1.weight"])
    with pytest.raises(KeyError, match="extended one by one"):
        results["weight"]


def test_a_part_of_a_model() -> None:
    model, (x, y) = mlp(), batch()
    rows = rows_of(model, lambda: each(model(x), y))
    px.extend(model[2])
    with px.backpack(px.BatchGrad()) as results:
        F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(model[2].weight.grad_batch, rows["2.weight"])
    assert set(results) == {"bias", "weight"}
    assert not hasattr(model[0].weight, "grad_batch")


def test_extending_again_changes_nothing() -> None:
    model, (x, y) = mlp(), batch()
    rows = rows_of(model, lambda: each(model(x), y))
    px.extend(px.extend(model[2]))
    px.extend(px.extend(model))
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(model, lambda: loss_fn(model(x), y), rows, N)


def test_parameters_given_from_outside() -> None:
    """A module that reads a parameter of another one, and a list of parameters that no module runs."""

    class Borrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.store, self.head = (
                nn.ParameterList([nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(6))]),
                nn.Linear(6, 3),
            )
            self.table = nn.ParameterDict({"scale": nn.Parameter(torch.randn(6))})

        def forward(self, x: Tensor) -> Tensor:
            h = F.linear(x, self.store[0], self.store[1]).tanh() * self.table["scale"]
            return F.linear(h, self.head.weight)

    model, (x, y) = Borrowing(), batch()
    rows = rows_of(model, lambda: each(model(x), y))
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(model, lambda: loss_fn(model(x), y), rows, N)
    assert not hasattr(model.head.bias, "grad_batch")


def test_tied_names_are_aliases() -> None:
    model, (x, y) = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3)), batch()
    model[2].weight = model[0].weight
    px.extend(model)
    with px.backpack(px.Variance()) as results:
        F.cross_entropy(model(x), y).backward()
    assert results["0.weight"].variance is results["2.weight"].variance is model[0].weight.variance
    assert "2.weight" in results and len(results) == 5
    with pytest.raises(KeyError, match="the last backward pass reached"):
        results["9.weight"]
    with pytest.raises(AttributeError, match="asked for variance"):
        _ = results["0.weight"].batch_l2


def test_a_layer_that_later_passes_do_not_reach_has_no_stale_result() -> None:
    model, (x, y) = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)]), batch()

    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor, k: int) -> Tensor:
            return self.parts[k](x)

    choice = px.extend(Choice())
    for k in (0, 1):
        with px.backpack(px.BatchGrad()) as results:
            F.cross_entropy(choice(x, k), y).backward()
        assert set(results) == {f"parts.{k}.weight", f"parts.{k}.bias"}
        assert hasattr(model[k].weight, "grad_batch") and not hasattr(model[1 - k].weight, "grad_batch")


class States(nn.Module):
    """An LSTM that returns all it has, with a batch of as many samples as steps and layers."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 3, num_layers=3, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.rnn(x)
        return y, h.transpose(0, 1), c.transpose(0, 1)


def test_every_output_in_turn_on_one_graph() -> None:
    model, x = px.extend(States()), torch.randn(3, 3, 3)
    outputs = model(x)
    for chosen in ((0,), (1,), (0,), (2,), (0, 1, 2)):
        rows = rows_of(model, lambda chosen=chosen: sum(outputs[i].square().flatten(1).sum(1) for i in chosen))
        with px.backpack(px.BatchGrad()):
            sum(outputs[i].square().sum() for i in chosen).backward(retain_graph=True)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad_batch, rows[name])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_as_many_initial_states_as_samples(kind: Any) -> None:
    """Torch takes them with the samples along axis 1; both axes have 4 entries, and the model's own is axis 0."""

    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(2, 3, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x: Tensor, *states: Tensor) -> Tensor:
            return self.rnn(x, states if kind is nn.LSTM else states[0])[0]

    model, x = px.extend(Started()), torch.randn(N, 3, 2)
    states = [torch.randn(4, N, 3) for _ in range(2 if kind is nn.LSTM else 1)]
    rows = rows_of(model, lambda: model(x, *states).square().flatten(1).sum(1))
    with px.backpack(px.BatchGrad()) as results:
        model(x, *states).square().sum().backward()
    for name, row in rows.items():
        torch.testing.assert_close(results[name].grad_batch, row)


def test_samples_are_told_apart_once_per_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []
    send = _flight._send_probe
    monkeypatch.setattr(_flight, "_send_probe", lambda *args: [sent.append(args), send(*args)][1])
    model = px.extend(States())
    # The second pass of a structure sends one cotangent more, and its third none.
    for chosen, n, passes in ((0, 3, 5), (0, 3, 6), (2, 3, 11), (0, 3, 11), (0, 4, 16), (0, 4, 17)):
        with px.backpack(px.BatchGrad()):
            model(torch.randn(n, 3, 3))[chosen].sum().backward()
        assert len(sent) == passes, (chosen, n)


def test_products_keep_their_memory_order() -> None:
    """Dropout draws in the order of memory: an extended model must keep that of the plain one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.einsum("st,nsc->ntc", self.mix, x)
            return F.dropout(self.mix @ y, 0.5)

    model, x = Net(), torch.randn(4, 3, 5)
    torch.manual_seed(0)
    plain = model(x)
    torch.manual_seed(0)
    extended = px.extend(model)(x)
    assert plain.stride() == extended.stride()
    torch.testing.assert_close(extended, plain)


class Sign(torch.autograd.Function):
    """Signs, with the gradient of what they are signs of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


class Unseen(nn.Module):
    """Activations and values of parameters from functions whose calls packext does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.scale, self.offset = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.outside = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        h = torch.vmap(lambda row: row.tanh())(self.a(x))  # made of data: autograd's graph leads to a use
        h = Sign.apply(F.linear(h, Sign.apply(self.b.weight), self.b.bias)) + h
        scale = torch.vmap(lambda s: s.exp())(self.scale)  # made of a parameter
        return self.c(h * scale + self.outside)


def test_values_that_unseen_functions_have_made() -> None:
    model, (x, y) = Unseen(), batch()
    model.outside = model.offset.sin()
    rows = rows_of(model, lambda: each(model(x), y))
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())

    def loss() -> Tensor:
        model.outside = model.offset.sin()  # before the model runs
        return loss_fn(model(x), y)

    assert_exact(model, loss, rows, N)


class Changed(nn.Module):
    """What a layer gives, changed in place, and a sum of it for each sample."""

    def __init__(self, layer: nn.Module, change: Any) -> None:
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y = y[0] if isinstance(y, tuple) else y
        self.change(y)
        return y.flatten(1).cumsum(1)[:, -3:]


CHANGES = {
    "/=": lambda y: y.__itruediv__(2.0),
    "+=": lambda y: y.__iadd__(y.detach().sin()),
    "relu_": lambda y: F.relu_(y),
    "an entry": lambda y: y[..., 0].zero_(),
    "[...]": lambda y: y.__setitem__((..., slice(2)), 0.5),
    "masked_fill_": lambda y: y.masked_fill_(y.detach() > 0.5, 0.0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "layer, shape",
    [
        (lambda: nn.Linear(5, 4), (N, 5)),
        (lambda: nn.Linear(5, 4), (N, 3, 5)),
        (lambda: nn.Linear(5, 4, bias=False), (N, 2, 3, 5)),
        (lambda: nn.Conv1d(3, 4, 3, padding=1), (N, 3, 5)),
        (lambda: nn.ConvTranspose2d(3, 4, 2), (N, 3, 2, 3)),
        (lambda: nn.LayerNorm(5), (N, 3, 5)),
        (lambda: nn.GroupNorm(2, 4), (N, 4, 5)),
        (lambda: nn.PReLU(), (N, 3, 5)),
        (lambda: nn.LSTM(5, 4, batch_first=True), (N, 3, 5)),
        (lambda: nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), (N, 3, 4)),
    ],
)
def test_what_layers_give_may_be_changed_in_place(layer: Any, shape: tuple[int, ...], change: str) -> None:
    model, x = Changed(layer(), CHANGES[change]), torch.randn(shape)
    y = torch.randint(3, (N,))
    rows = rows_of(model, lambda: each(model(x), y))
    px.extend(model)
    with px.backpack(px.BatchGrad()):
        px.extend(nn.CrossEntropyLoss())(model(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_batch, rows[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(p.grad, rows[name].sum(0), rtol=1e-9, atol=1e-12)
