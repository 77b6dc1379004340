"""What cannot be right is refused, with a message that helps, and nothing is changed by the refusal."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import packext as px
from packext import _flight, testing
from packext._quantity import refuse_vectors
from tests.cases import Lambda, Pool
from tests.helpers import assert_exact, batch, fields, mlp, rows_of

pytestmark = pytest.mark.usefixtures("double")

N = 4


def refused(
    model: nn.Module,
    x: Any,
    error: type[Exception],
    match: str,
    loss: Callable[[Any], Tensor] | None = None,
    axis: int = 0,
) -> None:
    """A pass raises `error`, leaves gradients, attributes and hooks alone, and one without a context runs."""
    px.extend(model, axis)
    loss = loss or (lambda y: y.square().mean())
    for p in model.parameters():
        if p.is_floating_point():
            p.grad, p.variance = torch.ones_like(p), "old"
    before, hooks = fields(model), [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(error, match=match):
        with px.backpack(px.BatchGrad(), px.Variance()):
            loss(model(*x) if isinstance(x, tuple) else model(x)).backward()
    assert fields(model) == before
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all((p.grad == 1).all() for p in model.parameters() if p.grad is not None)
    grads = []
    for _ in range(2):  # without a context: as the plain model
        model.zero_grad()
        loss(model(*x) if isinstance(x, tuple) else model(x)).backward()
        grads.append([None if p.grad is None else p.grad.to_dense() for p in model.parameters()])
        px.unextend(model)
    torch.testing.assert_close(*grads)


# -- samples that influence each other -------------------------------------------------------------------

COUPLINGS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm in training mode": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)),
        r"BatchNorm.*1 \[BatchNorm1d\].*eval\(\).*GroupNorm",
    ),
    "batch norm first": (lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)), r"0 \[BatchNorm1d\].*eval\(\)"),
    "batch norm alone": (lambda: nn.BatchNorm1d(5), r"BatchNorm1d.*eval\(\)"),
    "batch norm last": (lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), r"1 \[BatchNorm1d\].*eval\(\)"),
    "batch norm without affine": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3)),
        r"BatchNorm1d.*eval\(\)",
    ),
    "batch norm without running statistics, evaluation": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)).eval(),
        r"BatchNorm1d.*GroupNorm",
    ),
    "functional batch norm": (
        lambda: nn.Sequential(
            nn.Linear(5, 6), Lambda(lambda x: F.batch_norm(x, None, None, training=True)), nn.Linear(6, 3)
        ),
        "influence each other",
    ),
    "functional batch norm first": (
        lambda: nn.Sequential(
            Lambda(lambda x: F.batch_norm(x * torch.ones(5), None, None, training=True)), nn.Linear(5, 3), Centred()
        ),
        "influence each other",
    ),
    "statistics by hand": (lambda: nn.Sequential(nn.Linear(5, 6), Centred(), nn.Linear(6, 3)), r"linear.*0 \[Linear\]"),
    "statistics of the output": (lambda: nn.Sequential(nn.Linear(5, 3), Centred()), "influence each other"),
    "roll": (
        lambda: nn.Sequential(nn.Linear(5, 6), Lambda(lambda x: x + x.roll(1, 0)), nn.Linear(6, 3)),
        "influence each other",
    ),
    "roll alone": (
        lambda: nn.Sequential(nn.Linear(5, 6), Lambda(lambda x: x.roll(1, 0)), nn.Linear(6, 3)),
        "influence each other",
    ),
    "contrast": (
        lambda: nn.Sequential(nn.Linear(5, 6), Lambda(lambda z: z @ z.T)),
        "influence each other",
    ),
    "attention over the batch": (
        lambda: nn.Sequential(
            nn.Linear(5, 6), Lambda(lambda z: F.scaled_dot_product_attention(z[None], z[None], z[None])[0])
        ),
        "influence each other",
    ),
    "sorted batch": (
        lambda: nn.Sequential(nn.Linear(5, 6), Lambda(lambda z: z.sort(0).values), nn.Linear(6, 3)),
        "influence",
    ),
    "cumulated batch": (
        lambda: nn.Sequential(nn.Linear(5, 6), Lambda(lambda z: z.cumsum(0)), nn.Linear(6, 3)),
        "influence",
    ),
    "one of the batch": (
        lambda: nn.Sequential(nn.Linear(5, 6), Lambda(lambda z: z - z[:1]), nn.Linear(6, 3)),
        "influence",
    ),
    "coupled parameters": (lambda: Moments(), "influence each other"),
}


class Channels(nn.Module):
    """Keeps features apart, as depthwise layers do, and adds the last sample to all; returns time first."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = (x * self.scale).transpose(0, 1).contiguous()
        return (h + h[:, -1:]) * self.scale


def test_features_in_groups_are_not_taken_for_samples() -> None:
    """Where as many groups are kept apart as there are samples, and the axis of these is another."""
    refused(Channels(), torch.randn(3, 5, 6), px.CoupledSamplesError, "influence each other")


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Moments(nn.Module):
    """The batch meets a parameter after it has been averaged over."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(5, 6), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y * (y.mean(0) * self.scale)


@pytest.mark.parametrize("name", COUPLINGS)
def test_coupled_samples(name: str) -> None:
    build, match = COUPLINGS[name]
    refused(build(), torch.randn(N, 5), px.CoupledSamplesError, match)


@pytest.mark.parametrize("name", COUPLINGS)
def test_coupled_samples_in_large_batches(name: str) -> None:
    build, match = COUPLINGS[name]
    refused(build(), torch.randn(33, 5), px.CoupledSamplesError, match)


@pytest.mark.parametrize(
    "orders",
    [
        lambda z: z.sort(0).values,
        lambda z: torch.sort(z, dim=0)[0],
        lambda z: z.msort(),
        lambda z: z.topk(len(z), dim=0, largest=False).values,
        lambda z: z.cummax(0).values,
    ],
)
def test_an_order_that_one_batch_had_by_chance_is_not_taken_for_granted(orders: Any) -> None:
    """A batch whose samples are sorted already tells nothing of the next."""
    layer = nn.Linear(1, 6, bias=False)
    with torch.no_grad():
        layer.weight.abs_()
    model = px.extend(nn.Sequential(layer, Lambda(orders), nn.Linear(6, 3)))
    loss_fn = px.extend(nn.MSELoss())
    rising = torch.arange(1.0, 1 + N)[:, None]
    with px.backpack(px.BatchGrad()):
        loss_fn(model(rising), torch.zeros(N, 3)).backward()
    swapped = rising * torch.tensor([1.0, -1.0])[torch.arange(N) % 2][:, None]
    mixed = px.extend(nn.Sequential(nn.Linear(1, 6), Lambda(orders), nn.Linear(6, 3)))
    with pytest.raises(px.CoupledSamplesError), px.backpack(px.BatchGrad()):
        loss_fn(mixed(swapped), torch.zeros(N, 3)).backward()
    with torch.no_grad():
        layer.weight[::2] *= -1  # half of the features fall where the others rise
    with pytest.raises(px.CoupledSamplesError), px.backpack(px.BatchGrad()):
        loss_fn(model(rising), torch.zeros(N, 3)).backward()


class Contrast(nn.Module):
    """Scores of all pairs inside, one number per sample outside."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(5, 6), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.f(x) @ self.g(x).T
        return scores.log_softmax(1).diagonal()


def test_contrastive_coupling_inside() -> None:
    refused(Contrast(), torch.randn(N, 5), px.CoupledSamplesError, "influence each other")


def test_wrong_batch_axis() -> None:
    rnn = nn.GRU(5, 6)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = rnn, nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    # Time first, axis 0 taken for the samples: with other sizes, and where both are equal.
    for t in (6, N):
        refused(Last(), torch.randn(t, N, 5), px.CoupledSamplesError, r"batch_axis")


def test_no_output_has_the_batch() -> None:
    model = nn.Sequential(nn.Linear(5, 3), Lambda(lambda y: y.mean()))
    refused(model, torch.randn(N, 5), px.PackextError, "axis of 4 entries.*batch_axis", lambda y: y)


def test_outputs_beside_a_loss_that_nobody_keeps() -> None:
    """They tell samples apart, for a loss that packext does not know; afterwards the structure is known."""

    class WithLoss(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = super().forward(x)
            return out, out.logsumexp(1).mean()

    x = torch.randn(N, 5)
    refused(WithLoss(5, 3), x, px.PackextError, r"the output \[4, 3\] .* not there any more: keep", lambda y: y[1])
    model = px.extend(WithLoss(5, 3))
    rows = rows_of(model, lambda: model(x)[0].logsumexp(1) / N)
    for keep in (True, False):
        with px.backpack(px.BatchGrad()):
            out = model(x)
            loss, out = out[1], out if keep else None
            loss.backward()
        torch.testing.assert_close(model.weight.grad_batch, rows["weight"])


def test_a_loss_computed_inside_is_taken_like_one_outside() -> None:
    """Even one that couples samples: rows are what passes through each sample, and add up to the gradient."""

    class Balanced(nn.Module):
        """Experts whose load is balanced over the batch by a loss that is computed inside."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.a = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            gate = self.gate(x).softmax(1)
            return self.a(x) * gate, gate.mean(0).square().sum()

    model, x = px.extend(Balanced()), torch.randn(N, 5)
    with px.backpack(px.BatchGrad()):
        outputs, balance = model(x)
        (outputs.mean() + balance).backward()
    for p in model.parameters():
        assert p.grad_batch.shape[0] == N
        torch.testing.assert_close(p.grad_batch.sum(0), p.grad)


class Turned(nn.Module):
    """Outputs with features first."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.a = nn.Linear(5, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).T


def test_an_axis_that_has_n_entries_by_accident() -> None:
    """The output's first axis has N entries, and is not the batch."""
    refused(Turned(N), torch.randn(N, 5), px.CoupledSamplesError, "batch_axis")


@pytest.mark.parametrize("sizes", [(6, 7, N), (N, 6)])
def test_samples_along_another_axis_of_an_output_than_before(sizes: tuple[int, ...]) -> None:
    """Time first in what comes out alone: as long as only the size of one axis is N, there is no doubt."""
    model = px.extend(nn.Sequential(Lambda(lambda x: x / 2), nn.Linear(5, 3), Lambda(lambda y: y.transpose(0, 1))))
    weight = model[1].weight

    def step(t: int) -> None:
        x = torch.randn(N, t, 5)
        with px.backpack(px.BatchGrad()):
            model(x).square().sum().backward()
        if t != N:
            rows = [torch.autograd.grad(model(x[i : i + 1]).square().sum(), weight)[0] for i in range(N)]
            torch.testing.assert_close(weight.grad_batch, torch.stack(rows))

    for t in sizes[:-1]:
        step(t)
    before = fields(model)
    for t in (*sizes[::-1], *sizes):  # from then on in all passes
        with pytest.raises(px.PackextError, match=r"4 samples are along axis [01], .* were along axis [01].*axis 0"):
            step(t)
    assert fields(model) == before


@pytest.mark.parametrize("features", [3, 5, 2 * N])
def test_samples_along_another_axis_are_found(features: int) -> None:
    model, x = Turned(features), torch.randn(N, 5)
    rows = rows_of(model, lambda: model(x).square().sum(0))
    px.extend(model)
    loss_fn = px.extend(nn.MSELoss(reduction="sum"))
    assert_exact(model, lambda: loss_fn(model(x), torch.zeros(features, N)), rows)


def test_pooled_over_the_batch_with_as_many_features() -> None:
    """`[N, N]` features averaged over samples look like a batch of outputs, and are none."""
    model = nn.Sequential(nn.Linear(5, N), Lambda(lambda y: y.mean(0)[:, None] * torch.ones(N, 2)))
    refused(model, torch.randn(N, 5), px.CoupledSamplesError, "influence each other")


def test_coupling_that_is_switched_on_later_is_found() -> None:
    """The layouts of an earlier pass are not taken for a pass that does something else."""

    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.inner, self.b = nn.Linear(5, 6), Inner(), nn.Linear(6, 3)

        def forward(self, x: Tensor, centre: bool = False) -> Tensor:
            y = self.inner(self.a(x))
            return self.b(y - y.mean(0) if centre else y)

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0) if self.training else x

    model, x = px.extend(Switch()), torch.randn(N, 5)
    model.inner.eval()
    for _ in range(2):
        with px.backpack(px.BatchGrad()):
            model(x).square().mean().backward()
    with pytest.raises(px.CoupledSamplesError), px.backpack(px.BatchGrad()):
        model(x, True).square().mean().backward()
    model.inner.train()
    with pytest.raises(px.CoupledSamplesError), px.backpack(px.BatchGrad()):
        model(x).square().mean().backward()


class Within(nn.Module):
    """Something between two layers that an attribute decides, by the same functions of torch either way."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.a, self.b, self.between, self.how = nn.Linear(5, 6), nn.Linear(6, 3), between, None

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x), self.how))


def _without_gradient(h: Tensor, how: bool) -> Tensor:
    with torch.set_grad_enabled(how):
        mean = h.mean(0)
    return h - mean


def _in_windows(h: Tensor, _: Any) -> Tensor:
    return h.reshape(-1, 4, 6).softmax(1).reshape(h.shape)


@pytest.mark.parametrize(
    ("between", "apart", "meeting"),
    [
        (lambda h, how: h - h.mean(how, keepdim=True), 1, 0),
        (lambda h, how: torch.softmax(h, dim=how), -1, 0),
        (lambda h, how: F.normalize(h, dim=how), 1, 0),
        (lambda h, how: torch.fft.fft(h, dim=how).real, 1, 0),
        (lambda h, how: h + torch.cat(torch.chunk(h, 2, how)[::-1], how), 1, 0),
        (lambda h, how: h + h[how], (slice(None), slice(0, 1)), (slice(0, 1), slice(None))),
        (lambda h, how: torch.einsum(how, h, h), "nd,ne->nd", "nd,me->nd"),
        (lambda h, how: F.batch_norm(h, torch.zeros(6), torch.ones(6), training=how), False, True),
        (_without_gradient, False, True),
        (lambda h, how: h + how * h.mean(0), 0.0, 0.5),
        (lambda h, how: torch.add(h, h.flip(0), alpha=how), 0, 2),
        (lambda h, how: torch.lerp(h.mean(0).expand_as(h), h, how), 1.0, 0.5),
    ],
)
def test_samples_that_an_argument_of_a_function_makes_meet_later_are_found(
    between: Any, apart: Any, meeting: Any
) -> None:
    model = px.extend(Within(between))
    for model.how in (apart, apart):
        with px.backpack(px.BatchGrad()):
            model(torch.randn(N, 5)).square().mean().backward()
    model.how = meeting
    with pytest.raises(px.CoupledSamplesError), px.backpack(px.BatchGrad()):
        model(torch.randn(N, 5)).square().mean().backward()


def _put(h: Tensor, order: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[order] = h
    return out


@pytest.mark.parametrize(
    "moved",
    [
        _put,
        lambda h, order: torch.zeros_like(h).index_copy(0, order, h),
        lambda h, order: torch.zeros_like(h).index_add(0, order, h),
        lambda h, order: torch.zeros_like(h).index_put((order,), h),
        lambda h, order: torch.zeros_like(h).scatter(0, order[:, None] + h.detach().mul(0).long(), h),
        lambda h, order: torch.zeros_like(h).scatter(0, order[:, None].expand_as(h), h),
        lambda h, order: h.gather(0, order[:, None].expand_as(h)),
        lambda h, order: torch.take_along_dim(h, order[:, None], dim=0),
    ],
)
def test_an_order_in_which_rows_are_put_is_not_taken_for_granted(moved: Any) -> None:
    """A permutation that was the identity by chance tells nothing of the next."""
    model = px.extend(Within(moved))
    model.how = torch.arange(N)
    for _ in range(2):  # the third pass is none in which an inner one looks again
        with px.backpack(px.BatchGrad()):
            model(torch.randn(N, 5)).square().mean().backward()
    model.how = model.how.flip(0)
    with pytest.raises(px.CoupledSamplesError), px.backpack(px.BatchGrad()):
        model(torch.randn(N, 5)).square().mean().backward()


@pytest.mark.parametrize(
    ("between", "apart", "meeting"),
    [
        (lambda h, how: h + how * torch.softmax(h @ h.T, 1) @ h, torch.zeros(()), torch.full((), 0.1)),
        (lambda h, how: how.to(h) @ h, torch.eye(N), torch.eye(N).roll(1, 0)),
        (lambda h, how: torch.where(how, h, h.flip(0)), torch.ones(N, 1) > 0, torch.zeros(N, 1) > 0),
        (lambda h, how: F.embedding(how, h), torch.arange(N), torch.arange(N).flip(0)),
        (lambda h, how: torch.vmap(lambda t: t - t.mean(0), in_dims=how, out_dims=how)(h), 0, 1),
    ],
    ids=["gate", "matrix", "where", "lookup", "vmap"],
)
def test_samples_that_meet_later_by_the_same_calls_are_found_in_the_next_power_of_two(
    between: Any, apart: Any, meeting: Any
) -> None:
    """By no argument that is looked at: the pass before is refused by nothing."""
    model, refused_in = px.extend(Within(between)), []
    for k in range(1, 20):
        model.how = apart if k < 6 or k > 12 else meeting
        try:
            with px.backpack(px.BatchGrad()):
                model(torch.randn(N, 5)).square().mean().backward()
        except px.CoupledSamplesError:
            refused_in.append(k)
    assert refused_in == [8, 9, 10, 11, 12]  # and in all after it, until samples are apart again


def test_a_gate_across_the_batch_that_learns_to_open_is_found() -> None:
    """In the second pass: what is multiplied with a parameter that starts at 0 tells nothing in the first."""
    model = Within(lambda h, gate: h + gate * torch.softmax(h @ h.T, 1) @ h)
    model.how = nn.Parameter(torch.zeros(()))
    px.extend(model)
    with px.backpack(px.BatchGrad()):
        model(torch.randn(N, 5)).square().mean().backward()
    with torch.no_grad():
        model.how.sub_(0.1 * model.how.grad)
    with pytest.raises(px.CoupledSamplesError), px.backpack(px.BatchGrad()):
        model(torch.randn(N, 5)).square().mean().backward()


def test_later_passes_send_one_cotangent_in_each_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, send = [], _flight.send
    monkeypatch.setattr(_flight, "send", lambda *args: (sent.append(k), send(*args))[1])
    model = px.extend(mlp())
    for k in range(1, 20):
        with px.backpack(px.BatchGrad()):
            model(torch.randn(N if k % 2 else N + 1, 5)).square().mean().backward()
    assert sent == [1] * 5 + [2, 4, 8, 16]  # the first: two digits and their opposites, and one sample alone


def test_samples_that_meet_in_folds_of_another_size_are_found() -> None:
    """Four steps at a time: a batch of samples with six of them fits as well."""
    model = px.extend(Within(_in_windows))
    for _ in range(2):
        with px.backpack(px.BatchGrad()):
            model(torch.randn(2, 8, 5)).square().mean().backward()
    with pytest.raises(px.CoupledSamplesError), px.backpack(px.BatchGrad()):
        model(torch.randn(2, 6, 5)).square().mean().backward()


def test_samples_that_stand_elsewhere_by_an_argument_of_a_function_are_found_there() -> None:
    model = Within(lambda h, how: torch.stack([h, 2 * h], how).reshape(-1, 6).tanh())
    x, names = torch.randn(N, 5), [name for name, _ in model.named_parameters()]
    px.extend(model)
    for model.how in (0, 1, 0):
        with px.disable():
            rows = [torch.autograd.grad(model(row).sum(), list(model.parameters())) for row in x.split(1)]
        with px.backpack(px.BatchGrad()) as results:
            model(x).sum().backward()
        for name, *row in zip(names, *rows, strict=True):
            torch.testing.assert_close(results[name].grad_batch, torch.stack(row))


def test_a_path_without_a_gradient_may_have_one_later() -> None:
    """The probe of a pass in which it had none knows nothing of the layers before it."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate, self.learns = nn.Linear(5, 3), nn.Linear(5, 3), False

        def forward(self, x: Tensor) -> Tensor:
            h, gate = self.a(x), self.gate(x)
            with torch.set_grad_enabled(self.learns):
                gate = gate.sigmoid()
            return h * gate

    model, x = px.extend(Gated()), torch.randn(N, 5)
    for model.learns in (False, True, False):
        with px.backpack(px.BatchGrad()) as results:
            model(x).square().sum().backward()
        assert ("gate.weight" in results) == model.learns
        for p in model.parameters() if model.learns else model.a.parameters():
            torch.testing.assert_close(results[p].grad_batch.sum(0), p.grad)
        model.zero_grad()


@pytest.mark.parametrize("again", ["forward", "retained graph"])
def test_coupling_in_a_head_that_is_used_later_is_found(again: str) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.a(x)
            return self.b(h), self.c(h - h.mean(0))

    model, x = px.extend(Heads()), torch.randn(N, 5)
    out = model(x)
    with px.backpack(px.BatchGrad()):
        out[0].square().mean().backward(retain_graph=True)
    if again == "forward":
        out = model(x)
    with pytest.raises(px.CoupledSamplesError), px.backpack(px.BatchGrad()):
        out[1].square().mean().backward()


def test_evaluation_mode_is_fine_and_training_mode_of_one_layer_is_not() -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), torch.randn(N, 5)
    px.extend(model.eval())
    with px.backpack(px.BatchGrad()):
        model(x).sum().backward()
    model[1].train()
    with pytest.raises(px.CoupledSamplesError, match=r"1 \[BatchNorm1d\]"), px.backpack(px.BatchGrad()):
        model(x).sum().backward()


# -- uses that have no per-sample gradient ----------------------------------------------------------------


def test_sparse_embedding() -> None:
    for model in (nn.Embedding(5, 6, sparse=True), nn.EmbeddingBag(5, 6, mode="sum", sparse=True)):
        refused(model, torch.randint(5, (N, 3)), px.UnsupportedUseError, r"sparse.*sparse=False")


def test_max_norm() -> None:
    for model in (nn.Embedding(5, 6, max_norm=1.0), nn.EmbeddingBag(5, 6, max_norm=1.0)):
        refused(
            nn.Sequential(model, nn.Linear(6, 3)),
            torch.randint(5, (N, 3)),
            px.UnsupportedUseError,
            r"0 \[Embedding.*max_norm",
        )


class Sequences(nn.Module):
    """An LSTM on packed sequences; `read` makes outputs of its steps `[N, T, H]` and last states `[N, H]`."""

    def __init__(self, read: Callable[..., Tensor], pairs: bool = False) -> None:
        super().__init__()
        self.rnn, self.read, self.pairs = nn.LSTM(5, 6, batch_first=True), read, pairs

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        x = torch.cat([x, x.flip(0)]) if self.pairs else x
        lengths = [4 - k // 2 for k in range(len(x))]
        rows, (last, _) = self.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))
        return self.read(nn.utils.rnn.pad_packed_sequence(rows, batch_first=True)[0], last[0], *more)


def test_packed_sequences_that_are_not_one_samples_each() -> None:
    x, error = torch.randn(N, 4, 5), px.CoupledSamplesError
    refused(Sequences(lambda y, h: h + h[:1]), x, error, r"Samples influence each other.*rnn \[LSTM\]")
    refused(
        Sequences(lambda y, h: y[:, 0] + y.roll(1, 0)[:, 1]), x, error, r"Samples influence each other.*rnn \[LSTM\]"
    )
    # Whether both were made of the sample's own input cannot be seen where no parameter comes before.
    twice = Sequences(lambda y, h: h[:N] + h[N:], pairs=True)
    refused(twice, x, error, r"lstm.*rnn \[LSTM\].*packed sequences.*serve one.*Pass a padded batch")


def test_a_learned_initial_state_beside_packed_sequences() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.start = nn.GRU(5, 6, batch_first=True), nn.Parameter(torch.randn(1, 1, 6))

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.rnn(packed, self.start.expand(-1, len(x), -1))[1][0]

    batch_of = torch.randn(N, 4, 5), torch.tensor([1, 4, 2, 3])
    refused(Learned(), batch_of, px.CoupledSamplesError, r"index_select.*rnn \[GRU\], parameters start")


def test_packed_sequences_that_serve_two_samples_from_the_second_pass_on() -> None:
    model = px.extend(Sequences(lambda y, h, partner: y[:, 0] + y[partner, 1]))
    x, own = torch.randn(N, 4, 5), torch.arange(N)
    with px.backpack(px.BatchGrad()):
        model(x, own).square().sum().backward()
    with pytest.raises(px.CoupledSamplesError, match="serves two samples"), px.backpack(px.BatchGrad()):
        model(x, own.roll(1)).square().sum().backward()


def test_convolution_without_a_batch() -> None:
    refused(nn.Conv2d(2, 3, 3), torch.randn(2, 5, 5), px.UnsupportedUseError, "no batch axis")


def test_vectors_without_a_batch() -> None:
    """A layer that is called on a single vector trains as ever, and one of a batch of one has individual gradients."""
    refused(nn.Linear(5, 3), torch.randn(5), px.PackextError, "No output .* axis of 5 entries")
    model = px.extend(nn.Sequential(Lambda(lambda x: x[0]), nn.Linear(5, 3), Lambda(lambda y: y[None])))
    x, y = batch(1)
    rows = rows_of(model, lambda: F.cross_entropy(model(x), y, reduction="none"))
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(model, lambda: loss_fn(model(x), y), rows)


def test_layers_called_on_some_of_the_samples() -> None:
    class Loop(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([super(Loop, self).forward(row) for row in x])

    refused(Loop(5, 3), torch.randn(N, 5), px.CoupledSamplesError, "calls a layer on some of the samples")


def test_parameter_written_in_place() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(N, 5))

        def forward(self, x: Tensor) -> Tensor:
            table = self.p * 1
            table += x
            return table

    refused(Writes(), torch.randn(N, 5), px.UnsupportedUseError, r"in place.*out-of-place")


@pytest.mark.parametrize("how", ["index", "copy_", "index of a view"])
def test_tokens_written_before_the_data(how: str) -> None:
    """What it says to do instead, the data first, is right; without the token, the data's layer has its gradients."""

    def write(out: Tensor, at: slice, value: Tensor) -> None:
        if how == "index":
            out[:, at] = value
        elif how == "copy_":
            out[:, at].copy_(value)
        else:
            out[:, at][:] = value

    class Tokens(nn.Module):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.first, self.linear, self.token = first, nn.Linear(5, 5), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            h, out = self.linear(x), torch.zeros(len(x), 4, 5, dtype=x.dtype)
            if self.first:
                write(out, slice(1), self.token)
            write(out, slice(1, None), h)
            if not self.first:
                write(out, slice(1), self.token)
            return out.tanh()

    class Masked(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            out = self.token.expand(x.shape).clone()
            out[x > 0] = 0.0
            return self.linear(x) * out

    x, y = torch.randn(N, 3, 5), torch.randn(N, 4, 5)
    refused(Masked(True), x, px.UnsupportedUseError, "in place.*out-of-place")
    refused(Tokens(True), x, px.UnsupportedUseError, "Write the data first, and the parameters over them")
    assert testing.check(Tokens(False), nn.MSELoss(), x, y).ok
    model = Tokens(True)
    assert testing.check(model, nn.MSELoss(), x, y, parameters=model.linear.parameters()).ok


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w**3

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, w = ctx.saved_tensors
        return grads[0] * w**3, (grads[0] * x * 3 * w**2).sum(0)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Cubed.apply(x, self.w))


def test_parameter_in_an_autograd_function() -> None:
    """Where it reads what the model was given: behind a layer there are individual gradients (`test_unseen`)."""
    refused(Custom(), torch.randn(N, 5), px.UnsupportedUseError, r"Cubed in .*data meets w in it.*before any layer")


@pytest.mark.parametrize("quantity", [px.DiagGGNExact(), px.DiagHessian(), px.HessianTrace(), px.TopEigenvalues()])
def test_curvature_of_a_parameter_in_an_autograd_function(quantity: Any) -> None:
    model = px.extend(Custom())
    with pytest.raises(px.UnsupportedUseError, match="data meets w in it"), px.backpack(quantity):
        px.extend(nn.CrossEntropyLoss())(model(torch.randn(N, 5)), torch.zeros(N, dtype=torch.int64)).backward()
    assert model.w.grad is None and not hasattr(model.head.weight, quantity.savefield)


@pytest.mark.parametrize("order", [0, 1])
def test_penalty_returned_by_the_model(order: int) -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Any:
            out = self.b(self.a(x)), self.a.weight.square().sum()
            return out if order == 0 else out[::-1]

    refused(
        Penalised(),
        torch.randn(N, 5),
        px.PackextError,
        "made of parameters alone.*a.weight",
        lambda y: y[0].mean() + y[1].mean(),
    )


def test_loss_on_a_tensor_that_forward_did_not_return() -> None:
    class Stash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.hidden = self.a(x)
            return self.b(x)

    model = Stash()
    refused(
        model, torch.randn(N, 5), px.PackextError, "without passing through an output", lambda y: model.hidden.sum()
    )
    model.hidden = None


def test_different_batches_in_one_pass() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model, x, more = px.extend(Net()), torch.randn(N, 5), torch.randn(6, 5)
    with pytest.raises(px.PackextError, match="6 samples.*4"), px.backpack(px.BatchGrad()):
        (model(x).mean() + model(more).mean()).backward()
    assert all(p.grad is None and not vars(p) for p in model.parameters())


@pytest.mark.parametrize("cast", [nn.Module.float, nn.Module.half, nn.Module.bfloat16])
@pytest.mark.parametrize("quantity", [px.BatchGrad, px.KFAC, px.HessianTrace, px.DiagHessianMC, px.TopEigenvalues])
def test_parameters_that_got_another_dtype_before_the_backward_pass(cast: Any, quantity: Any) -> None:
    model, loss_fn, (x, y) = px.extend(mlp()), px.extend(nn.CrossEntropyLoss()), batch(N)
    told = r"0.weight \[7, 5\] was torch.float64 on cpu in the forward pass.* converted or moved between them"
    with pytest.raises(px.PackextError, match=told), px.backpack(quantity()):
        loss = loss_fn(model(x), y)
        cast(model)
        loss.backward()
    assert not any(hasattr(p, quantity.savefield) for p in model.parameters())
    model.double()
    with px.backpack(quantity()):
        loss_fn(model(x), y).backward()
    assert all(hasattr(p, quantity.savefield) for p in model.parameters())


@pytest.mark.parametrize("layer", [None, 0, 2])
@pytest.mark.parametrize("quantity", [px.HessianTrace, px.DiagHessianMC, px.TopEigenvalues, px.HMP])
def test_parameters_that_got_another_dtype_and_their_own_again(layer: int | None, quantity: Any) -> None:
    """Torch has accumulated by another node since: products would be without these parameters."""
    model, loss_fn, (x, y) = px.extend(mlp()), px.extend(nn.CrossEntropyLoss()), batch(N)
    part = model if layer is None else model[layer]
    with pytest.raises(px.PackextError, match=r"\d.* was converted or moved .* and back"), px.backpack(quantity()):
        loss = loss_fn(model(x), y)
        part.float().double()
        loss.backward()
    assert not any(hasattr(p, quantity.savefield) for p in model.parameters())
    with px.backpack(quantity()):
        loss_fn(model(x), y).backward(inputs=[*part.parameters()])
    assert all(hasattr(p, quantity.savefield) for p in part.parameters())


@pytest.mark.parametrize("quantity", [px.BatchGrad, px.KFAC, px.DiagGGNExact])
def test_parameters_that_got_their_dtype_again_before_the_structure_is_probed(quantity: Any) -> None:
    """The probe asks for gradients at nodes that the graph does not have; rules that are known find the right ones."""
    model, loss_fn, (x, y) = px.extend(mlp()), px.extend(nn.CrossEntropyLoss()), batch(N)

    def run() -> None:
        with px.backpack(quantity()):
            loss = loss_fn(model(x), y)
            model[2].float().double()
            loss.backward()

    with pytest.raises(px.PackextError, match=r"2.\w+ \[.* was converted or moved .* and back") as info:
        run()
    assert not isinstance(info.value, px.WrongRuleError)
    assert not any(hasattr(p, quantity.savefield) or p.grad is not None for p in model.parameters())
    with px.backpack(quantity()):
        loss_fn(model(x), y).backward()
    run()
    assert all(hasattr(p, quantity.savefield) for p in model.parameters())


# -- bad input -------------------------------------------------------------------------------------------


def test_class_in_place_of_a_quantity() -> None:
    def make(*args: Any, **kwargs: Any) -> None:
        inspect.unwrap(px.backpack.__init__)(px.backpack.__new__(px.backpack), *args, **kwargs)

    with pytest.raises(ValueError, match=r"the class BatchGrad: write BatchGrad\(\)"):
        make(px.BatchGrad)
    with pytest.raises(ValueError, match="quantities such as"):
        make("variance")
    with pytest.raises(ValueError, match="two quantities write 'grad_batch'"):
        make(px.BatchGrad(), px.BatchGrad([0]))
    for scale in ("mean", None, True, 0, 0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale"):
            make(px.BatchGrad(), scale=scale)
    for hook in ("extension_hook", "pass_hook"):
        with pytest.raises(ValueError, match=f"{hook} must be a function, got 'x'"):
            make(px.BatchGrad(), **{hook: "x"})
    for flag in ("accumulate", "attach", "exact_grad", "grad", "overhear"):
        with pytest.raises(ValueError, match=f"{flag} must be True or False, got 4"):
            make(px.BatchGrad(), **{flag: 4})
    with pytest.raises(ValueError, match="parameters must be several tensors"):
        make(px.BatchGrad(), parameters=1)


def test_what_is_not_a_module() -> None:
    extend = inspect.unwrap(px.extend)
    with pytest.raises(TypeError, match="the class Linear"):
        extend(nn.Linear)
    with pytest.raises(TypeError, match="a function"):
        extend(F.mse_loss)
    for axis in (-1, True, 1.0):
        with pytest.raises(ValueError, match="batch_axis"):
            extend(nn.Linear(2, 2), axis)
    with pytest.raises(TypeError, match="unextend expects an nn.Module instance, got a list"):
        inspect.unwrap(px.unextend)([nn.Linear(2, 2)])


@pytest.mark.parametrize(
    ("kind", "arguments", "match"),
    [
        (px.EKFAC, {"basis": {"0.weight": [torch.eye(2)]}}, "basis has a list for 0.weight: .*KronEigh.of"),
        (px.ClippedGrad, {"max_norm": {"0.weight": 1.0}}, "max_norm must be a positive number"),
        (px.TopEigenvalues, {"k": 1.5}, "k an int of 1 or more, got 'LA' and 1.5"),
        (px.TopEigenvalues, {"start": {"0.weight": torch.ones(2)}}, "start must be .* by the parameter itself"),
        (px.GradHistogram, {"bins": 3.5}, "whole number of bins"),
        (px.GradHistogram, {"range": 5}, "low < high, finite; got 100 on 5"),
        (px.GradHistogram, {"param_range": (1.0,)}, "low < high, finite"),
        (px.GradHistogram, {"range": (-float("inf"), float("inf"))}, "low < high, finite"),
    ],
)
def test_arguments_that_no_quantity_can_use(kind: Any, arguments: dict[str, Any], match: str) -> None:
    """They are errors where the quantity is made, and not within a backward pass."""
    with pytest.raises(ValueError, match=match):
        inspect.unwrap(kind.__init__)(kind.__new__(kind), **arguments)


def test_products_of_what_is_no_tensor() -> None:
    with pytest.raises(ValueError, match="vectors in one tensor.* got a list"):
        inspect.unwrap(refuse_vectors)([torch.ones(3)], torch.ones(3))


def test_model_that_was_never_extended() -> None:
    model, (x, y) = mlp(), batch()
    with (
        pytest.raises(px.NotExtendedError, match=r"BatchGrad asked for.*px\.extend\(model\)"),
        px.backpack(px.BatchGrad()),
    ):
        F.cross_entropy(model(x), y).backward()


def test_backward_that_never_ran() -> None:
    model = px.extend(mlp())
    with pytest.raises(px.NotExtendedError, match="no backward pass"), px.backpack(px.BatchGrad()):
        model(torch.randn(N, 5))


def test_loss_that_was_never_extended() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    for quantity, scale in ((px.BatchGrad(), "sample"), (px.ClippedGrad(1.0), "loss")):
        with pytest.raises(px.NotExtendedError, match=r"px\.extend\(nn\.CrossEntropyLoss\(\)\) or pass scale"):
            with px.backpack(quantity, scale=scale, parameters=model[0].parameters()):  # the last that are reached
                F.cross_entropy(model(x), y).backward()
        assert all(p.grad is None and not vars(p) for p in model.parameters())


def test_loss_without_grad() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    with pytest.raises(RuntimeError, match="does not require grad"), px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y).detach().backward()
    with torch.no_grad():
        out = model(x)
    with pytest.raises(RuntimeError, match="does not require grad"), px.backpack(px.BatchGrad()):
        F.cross_entropy(out, y).backward()
    assert all(p.grad is None for p in model.parameters())


def test_axis_that_inputs_do_not_have() -> None:
    model, (x, y) = px.extend(mlp(), batch_axis=2), batch()
    with pytest.raises(px.PackextError, match="no input tensor has an axis 2"), px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y).backward()


def test_model_without_tensor_inputs() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(3))

        def forward(self) -> Tensor:
            return self.p.exp()

    model = px.extend(Constant())
    with pytest.raises(px.PackextError, match="made of parameters alone"), px.backpack(px.BatchGrad()):
        model().sum().backward()


def test_empty_batch() -> None:
    refused(mlp(), torch.randn(0, 5), px.PackextError, "the batch is empty", lambda y: y.sum())


def test_integer_parameters() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.randint(-5, 5, (6, 5)), requires_grad=False)
            self.scale, self.head = nn.Parameter(torch.rand(6, 1)), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(x, self.codes * self.scale).tanh())

    model, (x, y) = Quantised(), batch()
    rows = rows_of(model, lambda: F.cross_entropy(model(x), y, reduction="none") / N)
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    results = assert_exact(model, lambda: loss_fn(model(x), y), rows, N)
    assert "codes" not in results


@pytest.mark.parametrize("sample", range(N))
def test_nan_passes_through_unaltered(sample: int) -> None:
    """A sample with NaN has NaN, the others have what they have without it."""
    model, (x, y) = mlp(), batch()
    loss_fn = px.extend(nn.CrossEntropyLoss(reduction="sum"))
    px.extend(model)
    with px.backpack(px.BatchGrad(), px.BatchL2Grad()):
        loss_fn(model(x), y).backward()
    clean = {n: (p.grad_batch, p.batch_l2) for n, p in model.named_parameters()}
    model.zero_grad()
    x[sample] = torch.nan
    plain = px.unextend(copy.deepcopy(model))
    F.cross_entropy(plain(x), y, reduction="sum").backward()
    fresh = px.extend(copy.deepcopy(model))  # its probe meets the NaN
    with px.backpack(px.BatchGrad(), px.BatchL2Grad(), px.Variance()):
        loss_fn(fresh(x), y).backward()
    others = [i for i in range(N) if i != sample]
    for (name, p), q in zip(fresh.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, equal_nan=True)
        torch.testing.assert_close(p.grad_batch[others], clean[name][0][others])
        torch.testing.assert_close(p.batch_l2[others], clean[name][1][others])
        assert p.batch_l2[sample].isnan() and p.grad_batch[sample].isnan().any()
        assert p.variance.isnan().any()


def test_infinite_loss_scale_passes_through() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    with px.backpack(px.BatchGrad()):
        (F.cross_entropy(model(x), y) * torch.inf).backward()
    assert all(not p.grad_batch.isfinite().any() for p in model.parameters())


# -- exceptions --------------------------------------------------------------------------------------------


class Trouble(Exception):
    pass


def test_exception_before_and_after_the_backward_pass() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    with pytest.raises(Trouble), px.backpack(px.BatchGrad()):
        model(x)
        raise Trouble
    assert all(not vars(p) and p.grad is None for p in model.parameters())
    with pytest.raises(Trouble), px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y).backward()
        raise Trouble
    assert all(p.grad_batch.shape[0] == N for p in model.parameters())
    _works(model, x, y)


def test_exception_in_the_forward_pass() -> None:
    def fail(x: Tensor) -> Tensor:
        raise Trouble

    model = px.extend(nn.Sequential(nn.Linear(5, 6), Lambda(fail), nn.Linear(6, 3)))
    x, y = batch()
    for _ in range(2):
        with pytest.raises(Trouble), px.backpack(px.BatchGrad()):
            model(x)
    model[1].f = torch.tanh
    assert not x.__dict__
    _works(model, x, y)


@pytest.mark.parametrize("context", [True, False])
def test_interrupt_in_the_forward_pass(context: bool) -> None:
    """After KeyboardInterrupt, torch runs no hook that would end the forward pass."""

    def fail(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model = px.extend(nn.Sequential(nn.Linear(5, 6), Lambda(fail), nn.Linear(6, 3)))
    x, y = batch()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), px.backpack(*[px.BatchGrad()] * context):
            model(x)
        assert not context or not torch.overrides._get_current_function_mode_stack()
    _works(px.extend(mlp()), x, y)  # another model
    assert not torch.overrides._get_current_function_mode_stack()
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model[1].f = torch.tanh
    _works(model, x, y)
    assert not torch.overrides._get_current_function_mode_stack()


def test_selective_checkpointing() -> None:
    """It keeps what it saves for one pass."""

    class Selective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = mlp(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
            return self.head(checkpoint(self.inner, x, use_reentrant=False, context_fn=contexts))

    refused(Selective(), torch.randn(N, 5), px.UnsupportedUseError, r"selective.*context_fn")


@pytest.mark.parametrize("where", ["0.weight", "2.weight", "hidden"])
def test_exception_of_a_hook_in_the_middle_of_the_backward_pass(where: str) -> None:
    model, (x, y) = px.extend(mlp()), batch()
    with px.backpack(px.BatchGrad(), px.Variance()):
        F.cross_entropy(model(x), y).backward()
    model.zero_grad()
    before = fields(model)

    def raising(grad: Tensor) -> None:
        raise Trouble

    def attach(module: Any, args: Any, output: Tensor) -> None:
        output.register_hook(raising)

    handle = (
        model[0].register_forward_hook(attach)
        if where == "hidden"
        else model.get_parameter(where).register_hook(raising)
    )
    with pytest.raises(Trouble), px.backpack(px.BatchGrad(), px.Variance()):
        F.cross_entropy(model(x), y).backward()
    handle.remove()
    assert fields(model) == before, "a pass that fails changes no result"
    _works(model, x, y)


def test_exception_of_the_extension_hook() -> None:
    model, (x, y) = px.extend(mlp()), batch()

    def hook(module: nn.Module) -> None:
        raise Trouble

    with pytest.raises(Trouble), px.backpack(px.BatchGrad(), extension_hook=hook):
        F.cross_entropy(model(x), y).backward()
    assert all(not vars(p) for p in model.parameters())
    _works(model, x, y)


def test_a_caught_failure_does_not_spoil_the_next_pass_of_the_same_context() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    bad = px.extend(nn.Sequential(nn.Linear(5, 3), Centred()))
    with px.backpack(px.BatchGrad()) as results:
        with pytest.raises(px.CoupledSamplesError):
            bad(x).square().sum().backward()
        F.cross_entropy(model(x), y).backward()
        assert set(results) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert not hasattr(bad[0].weight, "grad_batch")


def test_embedding_in_a_pool_is_what_the_message_says() -> None:
    """The message names path, class, function and shapes."""
    model = px.extend(nn.Sequential(nn.Embedding(9, 6), Pool(), Centred(), nn.Linear(6, 3)))
    with pytest.raises(px.CoupledSamplesError) as error, px.backpack(px.BatchGrad()):
        model(torch.randint(9, (N, 5))).square().sum().backward()
    for part in ("embedding", "0 [Embedding]", "0.weight", "[9, 6]", "[4, 5]", "batch_axis"):
        assert part in str(error.value)


def _works(model: nn.Module, x: Tensor, y: Tensor) -> None:
    rows = rows_of(model, lambda: F.cross_entropy(model(x), y, reduction="none") / len(y))
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(model, lambda: loss_fn(model(x), y), rows, len(y))


def test_complex_parameters_are_refused() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return (x.to(torch.complex128) @ self.weight).abs()

    model, loss_fn = px.extend(Complex()), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randint(3, (4,))
    with pytest.raises(px.UnsupportedUseError, match=r"weight \[5, 3\] is complex"), px.backpack(px.BatchGrad()):
        loss_fn(model(x), y).backward()
    loss_fn(model(x), y).backward()
    assert model.weight.grad is not None and not hasattr(model.weight, "grad_batch")


def test_custom_functions_are_named_and_their_parameters_may_be_left_out() -> None:
    model, loss_fn = px.extend(Custom()), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(4, 5), torch.randint(3, (4,))
    with (
        pytest.raises(px.UnsupportedUseError, match=r"Cubed .*parameters=\.\.\."),
        px.backpack(px.BatchGrad()),
    ):
        loss_fn(model(x), y).backward()
    with px.backpack(px.BatchGrad(), parameters=[*model.head.parameters()]):
        loss_fn(model(x), y).backward()
    assert torch.allclose(model.head.weight.grad_batch.sum(0), model.head.weight.grad)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_torchscript_is_refused_as_a_model_and_where_it_has_parameters() -> None:
    with pytest.raises(TypeError, match="extend got TorchScript"):
        px.extend(torch.jit.script(nn.Linear(5, 3)))
    model, loss_fn = nn.Sequential(nn.Linear(5, 4), torch.jit.script(nn.Linear(4, 3))), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(4, 5), torch.randint(3, (4,))
    px.extend(model)
    with pytest.raises(px.UnsupportedUseError, match=r"1\.weight, 1\.bias.*TorchScript"), px.backpack(px.BatchGrad()):
        loss_fn(model(x), y).backward()
    with px.backpack(px.BatchGrad(), parameters=[*model[0].parameters()]):
        loss_fn(model(x), y).backward()
    assert torch.allclose(model[0].weight.grad_batch.sum(0), model[0].weight.grad)
    px.unextend(model)
    assert not model[0]._forward_hooks and "_packext" not in model[1].__dict__


def test_a_hook_that_is_put_on_a_parameter_later_is_found() -> None:
    model = px.extend(nn.Linear(5, 3))

    def step() -> None:
        with px.backpack(px.BatchGrad()):
            model(torch.randn(N, 5)).square().sum().backward()

    step()
    hook = model.weight.register_hook(lambda g: 2 * g)
    with pytest.raises(px.WrongRuleError, match="hook"):
        step()
    hook.remove()
    step()


def test_a_hook_on_a_parameter_is_named_where_it_changes_the_gradient() -> None:
    model, loss_fn = px.extend(nn.Sequential(nn.Linear(5, 3))), px.extend(nn.CrossEntropyLoss())
    hook = model[0].weight.register_hook(lambda g: g / 2)
    x, y = torch.randn(4, 5), torch.randint(3, (4,))
    with pytest.raises(px.WrongRuleError, match=r"It has a hook \(Tensor.register_hook\)"), px.backpack(px.BatchGrad()):
        loss_fn(model(x), y).backward()
    assert len(model[0].weight._backward_hooks) == 1 and model[0].bias._backward_hooks is None, "those of the user"
    hook.remove()
    with px.backpack(px.BatchGrad()):
        loss_fn(model(x), y).backward()
