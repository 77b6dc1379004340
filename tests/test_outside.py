"""What is around a model: uses beside it, its inputs, the loss as it was called, threads and tasks."""

from __future__ import annotations

import asyncio
import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packext as px
from tests.helpers import rows_of, run_with_a_hook

N = 6


# -- parameters that are used outside, too -------------------------------------------------------------------


class Tied(nn.Module):
    """A table that is read at the start, and is the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 5), nn.Linear(5, 5)

    def logits(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.table(ids))), self.table.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(ids)


@pytest.mark.parametrize("name", ["forward", "logits"])
def test_a_parameter_between_the_model_and_the_loss_is_refused(name: str) -> None:
    """Where a method is called in place of the model, or a part is extended alone."""
    model, loss = px.extend(Tied()), px.extend(nn.CrossEntropyLoss())
    ids, y = torch.randint(7, (N,)), torch.randint(7, (N,))
    with pytest.raises(px.UnsupportedUseError, match=r"weight \[7, 5\].*once more between.*model\.forward"):
        with px.backpack(px.BatchL2Grad()):
            loss(getattr(model, name)(ids), y).backward()
    assert not any(vars(p) or p.grad is not None for p in model.parameters())
    mix = [*model.mix.parameters()]
    with px.backpack(px.BatchGrad(), parameters=mix):  # the others are right
        loss(getattr(model, name)(ids), y).backward()
    found = {k: p.grad_batch for k, p in model.mix.named_parameters()}
    rows = rows_of(model.mix, lambda: F.cross_entropy(model(ids), y, reduction="none") / N)
    torch.testing.assert_close(found, rows)


@pytest.mark.parametrize("alive", [False, True])
def test_weights_that_were_computed_from_the_models_own_are_refused(alive: bool) -> None:
    """A step of meta-learning; also while the graph of the pass before, in which they had uses, is alive."""
    model, loss = (
        px.extend(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))),
        px.extend(nn.CrossEntropyLoss()),
    )
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    own = dict(model.named_parameters())
    value = loss(model(x), y)
    moved = {k: p - 0.1 * g for (k, p), g in zip(own.items(), torch.autograd.grad(value, [*own.values()]), strict=True)}
    held = value if alive else None
    del value
    with pytest.raises(px.UnsupportedUseError, match=r"reach 0\.weight.*functional_call.*detach such a weight"):
        with px.backpack(px.BatchGrad()):
            loss(torch.func.functional_call(model, moved, (x,)), y).backward()
    assert (held is not None) == alive and all(p.grad is None for p in own.values())
    leaves = {k: v.detach().requires_grad_() for k, v in moved.items()}  # as the message says
    with px.backpack(px.BatchGrad()) as results:
        loss(torch.func.functional_call(model, leaves, (x,)), y).backward()
    assert all(torch.allclose(results[k].grad_batch.sum(0), v.grad) for k, v in leaves.items() if v.grad is not None)


class Policy(nn.Module):
    """Its method is called, and not the model: the mean is a model by itself then, and the spread is outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(5, 2), nn.Parameter(torch.zeros(2))

    def act(self, x: Tensor) -> Tensor:
        return self.mean(x) * self.spread.exp()


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("quantity", [px.BatchL2Grad(), px.HessianTrace()])
def test_a_parameter_beside_the_parts_that_run_is_refused(quantity: Any, copied: bool) -> None:
    model, loss = px.extend(Policy()), px.extend(nn.MSELoss())
    model = copy.deepcopy(model) if copied else model
    x, y = torch.randn(N, 5), torch.randn(N, 2)
    with pytest.raises(px.UnsupportedUseError, match=r"reach spread, .* no use of it: .*in another method"):
        with px.backpack(quantity):
            loss(model.act(x), y).backward()
    assert all(p.grad is None for p in model.mean.parameters())
    with px.backpack(quantity, parameters=model.mean.parameters()) as results:  # the others are right
        loss(model.act(x), y).backward()
    assert "mean.weight" in results and "spread" not in results
    with px.backpack(quantity) as results:
        loss(copy.deepcopy(model.mean)(x), y).backward()  # a copy of a part has no whole
    assert "mean.weight" in results


def test_a_hook_put_on_the_model_later_is_outside() -> None:
    model, loss = px.extend(nn.Linear(5, 5)), px.extend(nn.MSELoss())
    model.register_forward_hook(lambda module, args, out: F.linear(out, module.weight))
    with pytest.raises(px.UnsupportedUseError, match="hooks that are put on it after"), px.backpack(px.BatchGrad()):
        loss(model(torch.randn(N, 5)), torch.randn(N, 5)).backward()


def test_layers_that_were_put_in_later_are_named() -> None:
    model = px.extend(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))
    model[2] = nn.Linear(4, 2)
    with pytest.raises(px.UnsupportedUseError, match=r"2 \[Linear\]. Call px.extend\(model\) again"):
        with px.backpack(px.BatchGrad()):
            model(torch.randn(N, 5)).square().sum().backward()


# -- which input is the batch --------------------------------------------------------------------------------


class Weighted(nn.Module):
    """Returns its loss alone, and is given something else first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy((self.layer(x) * weights.sum()).flatten(0, -2), y.flatten())


@pytest.mark.parametrize("first", [1, 2, 3, 7])
def test_the_loss_inside_tells_which_input_is_the_batch(first: int) -> None:
    model, x, y = px.extend(Weighted()), torch.randn(N, 5), torch.randint(3, (N,))
    weights = torch.ones(first)
    with px.backpack(px.BatchGrad(), scale="sample"):
        model(weights, x, y).backward()
    rows = [torch.autograd.grad(model(weights, x[i : i + 1], y[i : i + 1]), model.layer.weight)[0] for i in range(N)]
    torch.testing.assert_close(model.layer.weight.grad_batch, torch.stack(rows))


@pytest.mark.parametrize(("first", "refused"), [(1, False), (7, False), (2, True), (4, True)])
def test_inputs_that_could_each_be_the_batch_are_refused(first: int, refused: bool) -> None:
    """The loss reads 24 rows: 6 samples of 4, or as many as the first input has."""
    model, x, y = px.extend(Weighted()), torch.randn(N, 4, 5), torch.randint(3, (N, 4))
    if refused:
        with pytest.raises(px.PackextError, match=rf"\[{first}, 6\] entries along axis 0"), px.backpack(px.BatchGrad()):
            model(torch.ones(first), x, y).backward()
        assert model.layer.weight.grad is None
        return
    with px.backpack(px.BatchGrad()):
        model(torch.ones(first), x, y).backward()
    assert model.layer.weight.grad_batch.shape == (N, 3, 5)


# -- structures ----------------------------------------------------------------------------------------------


class Moves(nn.Module):
    """Moves axes by numbers that may differ from pass to pass, and back."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.weight = nn.Linear(5, 5), nn.Parameter(torch.randn(5, 5))
        self.how, self.other = how, False

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).tanh()
        if self.how == "einsum":
            y = torch.einsum("bti,io->tbo" if self.other else "bti,io->bto", y, self.weight)
            return y.permute((1, 0, 2) if self.other else (0, 1, 2))
        if self.how == "permute":
            axes = (1, 0, 2) if self.other else (0, 1, 2)
            return (y.permute(axes) @ self.weight).permute(axes)
        k = 1 if self.other else 0
        return (y.roll(k, 0) @ self.weight).roll(-k, 0)


@pytest.mark.parametrize("how", ["einsum", "permute", "roll"])
def test_axes_that_are_numbers_belong_to_the_structure(how: str) -> None:
    """With as many tokens as samples, nothing else tells that the samples stand elsewhere."""
    model, x = px.extend(Moves(how)), torch.randn(4, 4, 5)
    for model.other in (False, True, False):
        with px.backpack(px.BatchGrad()):
            model(x).square().sum().backward()
        rows = [torch.autograd.grad(model(x[i : i + 1]).square().sum(), model.weight)[0] for i in range(4)]
        torch.testing.assert_close(model.weight.grad_batch, torch.stack(rows), rtol=1e-4, atol=1e-4)


# -- the loss, as it was called ------------------------------------------------------------------------------


class Warm(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction, self.calls = "mean", 0

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return 0.1 * self.calls * F.cross_entropy(z, y)


def changed() -> tuple[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    loss = px.extend(nn.CrossEntropyLoss())

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        loss.weight = torch.tensor([1.0, 2.0, 3.0])
        total = loss(model(x), y)
        loss.weight = torch.tensor([3.0, 1.0, 1.0])
        return total + loss(model(x), y)

    return loss, run


def hooked() -> tuple[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda module, args, out: out * 2)
    px.extend(loss)
    return loss, lambda model, x, y: loss(model(x), y)


def counts() -> tuple[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    loss = px.extend(Warm())
    return loss, lambda model, x, y: loss(model(x), y)


@pytest.mark.parametrize("make", [changed, hooked, counts])
@pytest.mark.parametrize("quantity", [px.DiagGGNExact(), px.KFAC(), px.DiagHessian(), px.GGNMP(), px.PCHMP()])
def test_curvature_of_a_loss_that_is_another_by_now_is_refused(make: Any, quantity: Any) -> None:
    model, (loss, run) = px.extend(nn.Sequential(nn.Linear(5, 3))), make()
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    with pytest.raises(px.PackextError, match="when it was called, and gives|several losses|one loss"):
        with px.backpack(quantity) as results:
            run(model, x, y).backward(retain_graph=True)
        getattr(results["0.bias"], quantity.savefield)(torch.eye(3))
    assert make is not counts or loss.calls == 1


def test_products_have_what_a_parameter_does_between_model_and_loss() -> None:
    """Individual gradients of it are refused, as no tap sees that; products go through all of the graph."""
    layer, loss = px.extend(nn.Linear(5, 3).double()), px.extend(nn.CrossEntropyLoss())
    x, y, v = torch.randn(N, 5).double(), torch.randint(3, (N,)), torch.randn(1, 3, 5).double()
    with px.backpack(px.HMP()):
        loss(layer(x) * layer.weight.sum(), y).backward(retain_graph=True)
        found = layer.weight.hmp(v)
    hessian = torch.autograd.functional.hessian(
        lambda w: F.cross_entropy(F.linear(x, w, layer.bias.detach()) * w.sum(), y), layer.weight.detach()
    )
    torch.testing.assert_close(found[0], torch.einsum("abcd,cd->ab", hessian, v[0]))


class Counted(Warm):
    """Counts its calls in a buffer, and gives the same each time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        self.count += 1
        return F.cross_entropy(z, y)


def test_buffers_of_a_loss_stay_as_its_call_has_left_them() -> None:
    model, loss = px.extend(nn.Linear(5, 3)), px.extend(Counted())
    with pytest.raises(px.PackextError, match="changes its buffers"), px.backpack(px.DiagGGNExact()):
        loss(model(torch.randn(N, 5)), torch.randint(3, (N,))).backward()
    assert loss.count.item() == 1


def test_products_are_of_the_loss_as_it_was() -> None:
    """They are made when the pass is long over; first order and the Hessian do without the module."""
    model, loss = px.extend(nn.Linear(5, 3)), px.extend(nn.HuberLoss(delta=0.3))
    x, y, unit = torch.randn(N, 5), torch.randn(N, 3), torch.eye(3)
    with px.backpack(px.GGNMP(), px.HMP(), px.BatchGrad()) as results:
        loss(model(x), y).backward(retain_graph=True)
    first = results["bias"].ggnmp(unit)
    torch.testing.assert_close(first, results["bias"].hmp(unit))
    loss.delta = 3.0
    torch.testing.assert_close(results["bias"].ggnmp(unit), first)


@pytest.mark.parametrize("quantity", [px.BatchGrad(), px.DiagGGNExact(), px.HMP()])
@pytest.mark.parametrize("last", [False, True])
def test_a_term_beside_the_extended_loss_is_what_the_error_says(quantity: Any, last: bool) -> None:
    model, loss = px.extend(nn.Linear(5, 3)), px.extend(nn.CrossEntropyLoss())
    x, y = torch.randn(N, 5), torch.randint(3, (N,))
    terms: list[Callable[[], Tensor]] = [lambda: loss(model(x), y), lambda: (model(x + 1) - 1).square().mean()]
    if not last and isinstance(quantity, px.BatchGrad):  # its scale is the extended loss's
        return
    with pytest.raises(px.PackextError, match="another term first|other terms than") as error:
        with px.backpack(quantity, scale="sample"):
            sum(term() for term in (terms if last else terms[::-1])).backward()
    assert not isinstance(error.value, px.NotExtendedError)


@pytest.mark.parametrize("factor", [1.0, 1024.0, 0.125])
def test_a_factor_on_losses_of_different_weights_is_not_known(factor: float) -> None:
    model, x, y = px.extend(nn.Linear(5, 3)), torch.randn(N, 5), torch.randint(3, (N,))
    ce, mse = px.extend(nn.CrossEntropyLoss()), px.extend(nn.MSELoss())

    def norms(weight: float) -> Tensor:
        with px.backpack(px.BatchL2Grad(), scale="sample") as results:
            z = model(x)
            (factor * (ce(z, y) + weight * mse(z, x[:, :3]))).backward()
        return results.batch_l2

    if factor == 1.0:
        norms(0.1)
    else:
        with pytest.raises(px.PackextError, match="none of which is 1.*scale=<number>"):
            norms(0.1)
    own = ce(model(x[:1]), y[:1]) + mse(model(x[:1]), x[:1, :3])
    expected = sum(g.square().sum() for g in torch.autograd.grad(own, [*model.parameters()]))
    torch.testing.assert_close(norms(1.0)[0], expected)  # one factor that all have is taken out


# -- threads, tasks, other tools -----------------------------------------------------------------------------


def test_two_threads_at_one_model_are_refused() -> None:
    model, loss = (
        px.extend(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))),
        px.extend(nn.CrossEntropyLoss()),
    )
    x, y, said = torch.randn(N, 5), torch.randint(3, (N,)), []

    def step() -> None:
        try:
            with px.backpack(px.BatchGrad(), attach=False):
                loss(model(x), y).backward()
        except px.PackextError as error:
            said.append(str(error))

    def beside(g: Tensor) -> None:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()

    results = run_with_a_hook(model, loss, x, y, beside)
    assert len(said) == 1 and "Two threads" in said[0]
    torch.testing.assert_close(results["2.weight"].grad_batch.sum(0), model[2].weight.grad)
    said.clear()
    step()
    assert not said


def test_threads_may_share_an_input() -> None:
    """What one model writes on it is not what the other reads."""
    x, models = torch.randn(N, 5), [px.extend(Skip()) for _ in range(2)]
    expected = rows_of(models[0], lambda: models[0](x).square().sum(1))

    def between() -> None:
        thread = threading.Thread(target=lambda: models[1](x))
        thread.start()
        thread.join()

    models[0].between = between
    with px.backpack(px.BatchGrad()) as results:
        models[0](x).square().sum().backward()
    torch.testing.assert_close({k: results[k].grad_batch for k in expected}, expected)


class Skip(nn.Module):
    """Reads its input twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.between: Callable[[], Any] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.between()
        return y.tanh() + self.second(x)


def test_tasks_that_share_a_thread_do_not_hear_each_other() -> None:
    model, loss = px.extend(nn.Linear(5, 3)), px.extend(nn.CrossEntropyLoss())

    async def client(before: float, after: float) -> Any:
        with px.backpack(px.BatchL2Grad(), attach=False) as results:
            await asyncio.sleep(before)
            loss(model(torch.randn(N, 5)), torch.randint(3, (N,))).backward()
            await asyncio.sleep(after)
        return results

    async def both() -> list[Any]:
        return await asyncio.gather(client(0.02, 0.01), client(0.01, 0.03), return_exceptions=True)

    found = asyncio.run(both())
    assert any(isinstance(each, px.PackextError) and "asyncio task" in str(each) for each in found)

    async def alone() -> Any:
        return await client(0.0, 0.0)

    assert asyncio.run(alone()).batch_l2.shape == (N,)


def test_a_quantised_copy_runs() -> None:
    model = px.extend(nn.Sequential(nn.Linear(5, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model))
    assert twin(torch.randn(N, 5)).shape == (N, 3)


def test_models_that_opacus_has_wrapped_are_refused() -> None:
    opacus = pytest.importorskip("opacus")
    model, loss = px.extend(nn.Sequential(nn.Linear(5, 3))), px.extend(nn.CrossEntropyLoss())
    wrapped = opacus.GradSampleModule(model)
    with pytest.raises(px.PackextError, match="GradSampleModule has hooks"), px.backpack(px.BatchGrad()):
        loss(wrapped(torch.randn(N, 5)), torch.randint(3, (N,))).backward()
    assert model[0].weight.grad is None


@pytest.mark.parametrize("chosen", [np.array([3, 0]), torch.tensor([3, 0]), range(0, 4, 3)])
def test_indices_of_samples_are_any_integers(chosen: Any) -> None:
    model, x = px.extend(nn.Linear(5, 3)), torch.randn(N, 5)
    with px.backpack(px.BatchGrad(subsampling=chosen)):
        model(x).sum().backward()
    torch.testing.assert_close(model.weight.grad_batch[:, 0], x[[int(i) for i in chosen]])


@pytest.mark.parametrize("chosen", [[-1], [True], torch.tensor([True, False])])
def test_what_is_no_index_is_refused(chosen: Any) -> None:
    with pytest.raises(ValueError, match="list of sample indices"):
        px.BatchGrad(subsampling=chosen)
