"""Contexts, results and scales; extending and taking it back; copies."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import pickle
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call

import packext as px
from packext import _listening, testing
from packext._use import Use
from tests.helpers import assert_exact, batch, double_precision, fields, left_behind, mlp, rows_of

N = 4


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with double_precision():
        yield
    assert not _listening.here().contexts and not _listening.here().passes, "a context or pass was left behind"


def rows_and_batch(model: nn.Module, n: int = N) -> tuple[testing.Rows, Tensor, Tensor]:
    x, y = batch(n)
    return rows_of(model, lambda: F.cross_entropy(model(x), y, reduction="none") / n), x, y


def bare(model: nn.Module) -> bool:
    """Whether no parameter carries anything."""
    return not any(fields(model).values())


# -- where forward, backward and context may stand ---------------------------------------------------------


def test_forward_outside_the_context() -> None:
    model = px.extend(mlp())
    rows, x, y = rows_and_batch(model)
    loss = F.cross_entropy(model(x), y)
    with px.backpack(px.BatchGrad()):
        loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_batch, rows[name])


def test_several_backwards_in_a_context_give_the_last() -> None:
    model = px.extend(mlp())
    with px.backpack(px.BatchGrad()) as results:
        for n in (N, 6, 1):
            rows, x, y = rows_and_batch(model, n)
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for name, p in model.named_parameters():
                torch.testing.assert_close(p.grad_batch, rows[name])
                assert results[name].grad_batch is p.grad_batch


def test_several_backwards_through_a_retained_graph() -> None:
    model = px.extend(mlp())
    rows, x, y = rows_and_batch(model)
    loss = F.cross_entropy(model(x), y)
    with px.backpack(px.BatchGrad(), px.Variance()):
        for k in (1, 2, 3):
            loss.backward(retain_graph=True)
            for name, p in model.named_parameters():
                torch.testing.assert_close(p.grad_batch, rows[name])
                torch.testing.assert_close(p.grad, k * rows[name].sum(0))
        (5 * loss).backward()
    torch.testing.assert_close(model[0].weight.grad_batch, 5 * rows["0.weight"])
    with pytest.raises(RuntimeError, match="second time"), px.backpack(px.BatchGrad()):
        loss.backward()


def test_results_are_not_overwritten_where_they_are_kept() -> None:
    model = px.extend(mlp())
    kept, copies = [], []
    with px.backpack(px.BatchGrad(), px.Variance(), px.BatchL2Grad()) as results:
        for _ in range(3):
            x, y = batch()
            F.cross_entropy(model(x), y).backward()
            for tensor in (model[0].weight.grad_batch, results["2.weight"].variance, model[2].bias.batch_l2):
                kept.append(tensor)
                copies.append(tensor.clone())
    for tensor, value in zip(kept, copies, strict=True):
        assert torch.equal(tensor, value)


def in_another_process(tensor: Tensor) -> Tensor:
    """What another process has of a tensor that a queue of torch.multiprocessing has handed to it."""
    handed = torch.UntypedStorage._new_shared_fd_cpu(*tensor.untyped_storage()._share_fd_cpu_())
    return torch.tensor([]).set_(handed, 0, tensor.shape)


@pytest.mark.parametrize(
    "keep", [torch.detach, torch.flatten, Tensor.numpy, Tensor.untyped_storage, in_another_process, None]
)
def test_individual_gradients_are_written_over_where_nobody_has_them(keep: Callable[[Tensor], Any] | None) -> None:
    model = px.extend(nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 3)))
    x, y = batch()
    with px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y).backward()
        kept = None if keep is None else keep(model[0].weight.grad_batch)
        before, place = model[0].weight.grad_batch.clone(), model[0].weight.grad_batch.data_ptr()
        F.cross_entropy(model(3 * x), y).backward()
    if kept is None:
        assert model[0].weight.grad_batch.data_ptr() == place and not torch.equal(model[0].weight.grad_batch, before)
        return
    if isinstance(kept, torch.UntypedStorage):
        kept = torch.tensor([]).to(before).set_(kept, 0, before.shape)
    assert torch.equal(torch.as_tensor(kept).reshape(before.shape), before)


def test_a_pass_that_fails_leaves_no_rows_that_are_half_those_of_another() -> None:
    model = px.extend(nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3)))
    x, y = batch()

    def fail(g: Tensor) -> None:
        if broken:
            raise RuntimeError("half-way")

    broken = False
    model[1].register_forward_hook(lambda module, args, output: output.register_hook(fail) and None)
    for _ in range(2):  # in the third, no inner pass comes before the one that fails
        with px.backpack(px.BatchGrad()):
            F.cross_entropy(model(x), y).backward()
    before = {name: p.grad_batch.clone() for name, p in model.named_parameters()}
    broken = True
    with pytest.raises(RuntimeError, match="half-way"), px.backpack(px.BatchGrad()):
        F.cross_entropy(model(3 * x), y).backward()
    for name, p in model.named_parameters():
        assert not hasattr(p, "grad_batch") or torch.equal(p.grad_batch, before[name]), name
    assert not hasattr(model[2].weight, "grad_batch")  # its memory was written over


def test_a_scale_that_is_not_known_is_refused_before_anything_is_accumulated() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    with pytest.raises(px.NotExtendedError), px.backpack(px.ClippedGrad(1.0), parameters=model[0].parameters()):
        F.cross_entropy(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())


def test_nested_contexts_ask_for_what_the_innermost_says() -> None:
    model = px.extend(mlp())
    rows, x, y = rows_and_batch(model)
    with px.backpack(px.Variance()) as outer:
        with px.backpack(px.BatchL2Grad()) as inner:
            F.cross_entropy(model(x), y).backward()
        assert not hasattr(model[0].weight, "variance") and hasattr(model[0].weight, "batch_l2")
        with px.backpack():
            F.cross_entropy(model(x), y).backward()
        F.cross_entropy(model(x), y).backward()
    assert inner["0.weight"].batch_l2 is model[0].weight.batch_l2
    torch.testing.assert_close(outer["0.weight"].variance, rows["0.weight"].var(0, unbiased=False))


def test_a_context_around_passes_of_an_inner_one_does_not_complain() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    with px.backpack(px.Variance()), px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y).backward()


def test_a_context_can_be_entered_again() -> None:
    model = px.extend(mlp())
    context = px.backpack(px.BatchGrad())
    for _ in range(2):
        rows, x, y = rows_and_batch(model)
        with context as results:
            F.cross_entropy(model(x), y).backward()
        torch.testing.assert_close(results["2.bias"].grad_batch, rows["2.bias"])


def test_nothing_asked_for() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    with px.backpack():
        F.cross_entropy(model(x), y).backward()
    F.cross_entropy(model(x), y).backward()
    assert bare(model) and model[0].weight.grad is not None


@pytest.mark.parametrize("chosen", [["0.weight"], ["2.weight", "2.bias"], ["0.bias", "2.bias"]])
def test_backward_with_inputs(chosen: list[str]) -> None:
    model = px.extend(mlp())
    rows, x, y = rows_and_batch(model)
    with px.backpack(px.BatchGrad(), px.BatchL2Grad()) as results:
        F.cross_entropy(model(x), y).backward(inputs=[model.get_parameter(name) for name in chosen])
    torch.testing.assert_close(results.batch_l2, sum(rows[name].flatten(1).square().sum(1) for name in chosen))
    for name, p in model.named_parameters():
        if name in chosen:
            torch.testing.assert_close(p.grad, rows[name].sum(0))
            torch.testing.assert_close(p.grad_batch, rows[name])
        else:  # also where the pass comes by, as by the weight of a layer whose bias is chosen
            assert p.grad is None and not hasattr(p, "grad_batch")
    assert set(chosen) == set(results)


def test_autograd_grad_fills_results_as_well() -> None:
    model = px.extend(mlp())
    rows, x, y = rows_and_batch(model)
    with px.backpack(px.BatchGrad()):
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(grad, rows[name].sum(0))
        torch.testing.assert_close(p.grad_batch, rows[name])
        assert p.grad is None


def test_backward_from_the_output_itself() -> None:
    model, (x, _), v = px.extend(mlp()), batch(), torch.randn(N, 3)
    rows = rows_of(model, lambda: (model(x) * v).sum(1))
    with px.backpack(px.BatchGrad()):
        model(x).backward(v)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_batch, rows[name])


def test_gradient_accumulation() -> None:
    model = px.extend(mlp())
    first, x, y = rows_and_batch(model)
    second, z, w = rows_and_batch(model)
    with px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(model(z), w).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, first[name].sum(0) + second[name].sum(0))
        torch.testing.assert_close(p.grad_batch, second[name])


# -- hooks, disable, observation ---------------------------------------------------------------------------


def test_extension_hook() -> None:
    model = px.extend(
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 6), nn.PReLU()), nn.Linear(6, 3))
    )
    model[3].weight.requires_grad_(False)
    rows, x, y = rows_and_batch(model)
    called: list[nn.Module] = []
    freed: list[Any] = []

    def hook(module: nn.Module) -> None:
        gc.collect()
        assert all(ref() is None for ref in freed), "deleting the attribute frees the result"
        called.append(module)
        for p in module._parameters.values():
            if p.requires_grad:
                full = next(k for k, q in model.named_parameters() if q is p)
                torch.testing.assert_close(p.grad_batch, rows[full])
                freed.append(weakref.ref(p.grad_batch))
                del p.grad_batch

    with px.backpack(px.BatchGrad(), px.Variance(), extension_hook=hook) as results:
        F.cross_entropy(model(x), y).backward()
    assert called == [model[3], model[2][1], model[2][0], model[0]]
    assert not any(hasattr(p, "grad_batch") for p in model.parameters())
    assert hasattr(model[0].weight, "variance") and hasattr(results["0.weight"], "variance")
    with pytest.raises(AttributeError, match="grad_batch"):
        _ = results["0.weight"].grad_batch


def test_extension_hook_with_tied_parameters() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    model[2].weight = model[0].weight
    px.extend(model)
    rows, x, y = rows_and_batch(model)
    called = []

    def hook(module: nn.Module) -> None:
        called.append(module)
        for p in module.parameters():
            assert p.grad_batch.shape[0] == N

    with px.backpack(px.BatchGrad(), extension_hook=hook):
        F.cross_entropy(model(x), y).backward()
    assert sorted(map(id, called)) == sorted(map(id, (model[0], model[2], model[3])))


def test_disable() -> None:
    model = px.extend(mlp())
    rows, x, y = rows_and_batch(model)
    with px.disable():
        assert not px.disable.should_store_io()
        plain = model(x)
    assert px.disable.should_store_io()
    with pytest.raises(px.NotExtendedError), px.backpack(px.BatchGrad()):
        F.cross_entropy(plain, y).backward()
    assert bare(model)
    model.zero_grad()
    tapped = F.cross_entropy(model(x), y)
    with px.backpack(px.BatchGrad()):
        with px.disable():
            tapped.backward(retain_graph=True)
        assert bare(model) and model[0].weight.grad is not None
        tapped.backward()
    torch.testing.assert_close(model[0].weight.grad_batch, rows["0.weight"])


def test_a_graph_is_kept_by_passes_that_the_context_of_products_hears() -> None:
    model, (x, y), loss_fn = px.extend(mlp()), batch(), px.extend(nn.CrossEntropyLoss())

    def kept() -> bool:
        loss = loss_fn(model(x), y)
        loss.backward()
        try:
            torch.autograd.grad(loss, model[0].weight)
        except RuntimeError as error:
            assert "second time" in str(error)
            return False
        return True

    with px.backpack(px.HMP()):
        assert kept()
        with px.disable():
            assert not kept()
        for quantity in (px.Variance(), px.DiagGGNExact()):
            with px.backpack(quantity):
                assert not kept()
            with px.backpack(quantity, overhear=True, attach=False):
                assert kept()
        with px.backpack(px.Variance()), px.backpack(px.GGNMP()):
            assert kept()
        assert kept()
    with px.backpack(px.HMP(), overhear=True, attach=False), px.backpack(px.Variance()):
        assert kept()
    assert not kept()


def test_no_grad_and_inference_mode() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    want = model(x).detach()
    with px.backpack(px.BatchGrad()):
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                out = model(x)
            assert not out.requires_grad
            torch.testing.assert_close(out, want)
        F.cross_entropy(model(x), y).backward()
    assert model[0].weight.grad_batch.shape[0] == N


def test_an_output_is_what_the_plain_model_gives() -> None:
    model, (x, _) = mlp(), batch()
    want = model(x)
    got = px.extend(model)(x)
    assert torch.equal(got, want) and type(got) is Tensor and not vars(x)


def test_no_activations_are_kept_alive() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    loss_fn = px.extend(nn.CrossEntropyLoss())
    seen: list[Any] = []
    model[1].register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        out = model(x)
        del out
        assert seen[0]() is None
        for quantity in testing.all_quantities():
            with px.backpack(quantity):
                loss_fn(model(x), y).backward()
                assert seen[-1]() is None, quantity
    finally:
        gc.enable()
    assert len(seen) > 9 and model[0].weight.variance.grad_fn is None


def conv() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))


def normalised() -> nn.Module:
    """A weight that is made of two parameters."""
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3))


@pytest.mark.parametrize("build", [mlp, conv, normalised], ids=["mlp", "conv", "normalised"])
@pytest.mark.parametrize("asked", [False, True])
def test_a_step_leaves_nothing_to_the_garbage_collector(build: Any, asked: bool) -> None:
    model = px.extend(build())
    loss_fn = px.extend(nn.CrossEntropyLoss())

    def step() -> None:
        x, y = batch()
        loss_fn(model(x), y).backward()
        if asked:
            with px.backpack(*testing.all_quantities()):
                loss_fn(model(x), y).backward()

    step()
    assert not left_behind(step)


def test_a_model_can_be_collected() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    with px.backpack(px.BatchGrad(), px.ClippedGrad(1.0), scale=float(N)) as results:
        F.cross_entropy(model(x), y).backward()
    ref, parameter = weakref.ref(model), weakref.ref(model[0].weight)
    del model, results
    gc.collect()
    assert ref() is None and parameter() is None


# -- scales --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none then mean", "none then sum"])
def test_scales(reduction: str) -> None:
    model, (x, y) = mlp(), batch()
    mean = reduction.endswith("mean")
    own = rows_of(model, lambda: F.cross_entropy(model(x), y, reduction="none"))
    written = {k: r / N for k, r in own.items()} if mean else own
    px.extend(model)
    kind = reduction.split()[0]
    loss_fn = px.extend(nn.CrossEntropyLoss(reduction=kind))

    def loss() -> Tensor:
        value = loss_fn(model(x), y)
        return value if kind != "none" else value.mean() if mean else value.sum()

    assert_exact(model, loss, written, float(N) if mean else 1.0)
    for scale, rows in (("sample", own), (1.0, written), (7.0, {k: 7 * r for k, r in written.items()})):
        with px.backpack(px.BatchGrad(), px.Variance(), px.BatchL2Grad(), px.GradDot(), scale=scale):
            loss().backward()
        for name, p in model.named_parameters():
            flat = rows[name].reshape(N, -1)
            torch.testing.assert_close(p.grad_batch, rows[name])
            torch.testing.assert_close(p.variance, rows[name].var(0, unbiased=False))
            torch.testing.assert_close(p.batch_l2, flat.square().sum(1))
            torch.testing.assert_close(p.grad_dot, flat @ flat.mean(0))


def test_a_multiple_of_the_loss_shows_in_the_loss_as_written_alone() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    rows = rows_of(model, lambda: F.cross_entropy(model(x), y, reduction="none"))["0.weight"]
    loss_fn = px.extend(nn.CrossEntropyLoss())
    for k in (1024.0, -3.0):
        with px.backpack(px.BatchGrad()):
            (k * loss_fn(model(x), y)).backward()
        torch.testing.assert_close(model[0].weight.grad_batch, rows * k / N)
        with px.backpack(px.BatchGrad(), px.ClippedGrad(1e9), scale="sample"):
            (k * loss_fn(model(x), y)).backward()
        torch.testing.assert_close(model[0].weight.grad_batch, rows)
        torch.testing.assert_close(model[0].weight.clipped_grad, rows.sum(0))
        with px.backpack(px.BatchGrad(), scale="sample"):  # terms of one loss, with weights that are its own
            (k * loss_fn(model(x), y) + loss_fn(model(x), y)).backward()
        torch.testing.assert_close(model[0].weight.grad_batch, rows * (k + 1))
        with px.backpack(px.BatchGrad(), scale=N / k):
            (k * loss_fn(model(x), y)).backward()
        torch.testing.assert_close(model[0].weight.grad_batch, rows)


def test_uneven_weights_have_no_scale() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    loss_fn = px.extend(nn.CrossEntropyLoss(reduction="none"))
    with (
        pytest.raises(px.PackextError, match="weighted unevenly.*scale=<number>"),
        px.backpack(px.BatchGrad(), scale="sample"),
    ):
        (loss_fn(model(x), y) * torch.arange(4.0)).sum().backward()
    assert bare(model) and model[0].weight.grad is None
    rows = rows_of(model, lambda: F.cross_entropy(model(x), y, reduction="none") * torch.arange(4.0))
    with px.backpack(px.BatchGrad()):
        (loss_fn(model(x), y) * torch.arange(4.0)).sum().backward()
    torch.testing.assert_close(model[0].weight.grad_batch, rows["0.weight"])


@pytest.mark.parametrize("quantity", [px.BatchGrad, px.ClippedGrad, functools.partial(px.KFAC, fisher="empirical")])
def test_a_reduction_of_another_name_has_no_scale(quantity: Any) -> None:
    """It may be a mean: to take it for a sum would be wrong by N."""

    class Loss(nn.Module):
        reduction = "avg"

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output, target)

    model, loss_fn, (x, y) = px.extend(mlp()), px.extend(Loss()), batch(N)
    asked = quantity(1.0) if quantity is px.ClippedGrad else quantity()
    with pytest.raises(px.PackextError, match="Loss has reduction='avg'.*one of mean, batchmean, sum, none"):
        with px.backpack(asked, scale="sample"):
            loss_fn(model(x), y).backward()
    assert bare(model) and all(p.grad is None for p in model.parameters())
    loss_fn.reduction = "mean"
    with px.backpack(asked, scale="sample", attach=False) as expected:
        loss_fn(model(x), y).backward()
    loss_fn.reduction = "avg"
    with px.backpack(asked, scale=float(N), attach=False) as results:
        loss_fn(model(x), y).backward()
    for name in expected:
        torch.testing.assert_close(
            getattr(results[name], asked.savefield), getattr(expected[name], asked.savefield), rtol=1e-9, atol=0
        )


def test_one_number_without_a_reduction_has_no_scale() -> None:
    """The losses of samples one by one have."""

    class Loss(nn.Module):
        reduction = "none"

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output, target)

    model = px.extend(mlp())
    rows, x, y = rows_and_batch(model)
    with pytest.raises(px.PackextError, match="reduction='none' and gave one number, not the losses of 4 samples"):
        with px.backpack(px.BatchGrad(), scale="sample"):
            px.extend(Loss())(model(x), y).backward()
    assert bare(model) and all(p.grad is None for p in model.parameters())
    loss_fn = px.extend(nn.CrossEntropyLoss(reduction="none"))
    for one_by_one in (False, True):
        with px.backpack(px.BatchGrad(), scale="sample"):
            z = model(x)
            losses = [loss_fn(out, label) for out, label in zip(z, y, strict=True)] if one_by_one else loss_fn(z, y)
            (torch.stack(losses) if one_by_one else losses).mean().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad_batch, N * rows[name])


def test_two_losses_of_different_reduction_have_no_scale() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    mean, total = px.extend(nn.CrossEntropyLoss()), px.extend(nn.MultiMarginLoss(reduction="sum"))
    with (
        pytest.raises(px.PackextError, match="scale samples differently.*scale=<number>"),
        px.backpack(px.BatchGrad(), scale="sample"),
    ):
        out = model(x)
        (mean(out, y) + total(out, y)).backward()


def test_halves_of_a_batch_in_two_losses_are_as_the_page_on_trust_says() -> None:
    """Their weight is divided out, and each mean is taken for one over all samples; a number is right."""
    model = px.extend(mlp())
    rows, x, y = rows_and_batch(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    for scale, factor in (("sample", 2 * N), (float(N), N), ("loss", 1)):
        with px.backpack(px.BatchGrad(), scale=scale):
            z = model(x)
            (0.5 * loss_fn(z[:2], y[:2]) + 0.5 * loss_fn(z[2:], y[2:])).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad_batch, factor * rows[name])


def test_functional_loss_with_a_number_for_the_scale() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    own = rows_of(model, lambda: F.cross_entropy(model(x), y, reduction="none"))
    with px.backpack(px.BatchGrad(), scale=float(N)):
        F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(model[2].weight.grad_batch, own["2.weight"])


# -- arguments of quantities ---------------------------------------------------------------------------------


def run(model: nn.Module, *quantities: px.BatchGrad, n: int = N) -> tuple[testing.Rows, px.Results]:
    rows, x, y = rows_and_batch(model, n)
    px.extend(model)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    with px.backpack(*quantities) as results:
        loss_fn(model(x), y).backward()
    return rows, results


MODELS = {"mlp": mlp, "conv": conv}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("index", [[0], [3, 1], [2, 2, 0]])
def test_subsampling(build: Any, index: list[int]) -> None:
    model = build()
    rows, _ = run(model, px.BatchGrad(subsampling=index))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad_batch, rows[name][index])


def test_subsampling_out_of_range() -> None:
    with pytest.raises(IndexError, match=r"samples \[4\] of a batch of 4"):
        run(mlp(), px.BatchGrad(subsampling=[0, 4]))
    with pytest.raises(ValueError, match="subsampling"):
        px.BatchGrad(subsampling=[-1])


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_direction(build: Any) -> None:
    model = build()
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    rows, results = run(model, px.GradDot(direction))
    whole = torch.zeros(N)
    for name, p in model.named_parameters():
        want = rows[name].reshape(N, -1) @ direction[name].flatten()
        torch.testing.assert_close(p.grad_dot, want)
        whole += want
    torch.testing.assert_close(results.grad_dot, whole)
    by_parameter = {p: direction[name] for name, p in model.named_parameters()}
    x, y = batch()
    with px.backpack(px.GradDot(by_parameter)) as results:
        F.cross_entropy(model(x), y).backward()
    assert results.grad_dot.shape == (N,)


def test_direction_that_does_not_fit() -> None:
    model = mlp()
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"2.bias has shape \[1\], needed \[3\]"):
        run(model, px.GradDot({**direction, "2.bias": torch.ones(1)}))
    del direction["2.bias"]
    with pytest.raises(KeyError, match=r"nothing for 2.bias, shape \[3\]"):
        run(model, px.GradDot(direction))


@pytest.mark.parametrize("dim", [1, 2])
def test_a_histogram_counts_no_entry_that_is_no_number(dim: int) -> None:
    """Neither NaN in a gradient nor in a parameter (in a row that nobody reads)."""
    model, ids = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2)), torch.tensor([0, 1, 2])
    with torch.no_grad():
        model[0].weight[3, 0], model[0].weight[2, 1] = torch.nan, torch.nan
    px.extend(model)
    with px.backpack(px.GradHistogram(dim, bins=4, param_bins=3)):
        model(ids).square().sum().backward()
    rows = testing.individual_gradients(model, lambda out, y: out.square().sum(), ids, ids)
    for name, p in model.named_parameters():
        lost = rows[name].isnan() | (p.isnan() if dim == 2 else torch.zeros(()).bool())
        assert p.grad_histogram.counts.sum() == (~lost).sum(), name
        assert lost.any()


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_histogram_in_two_dimensions(build: Any) -> None:
    model = build()
    quantity = px.GradHistogram(2, bins=7, range=(-0.05, 0.05), param_bins=5, param_range=(-0.3, 0.3))
    rows, results = run(model, quantity)
    total = 0
    for name, p in model.named_parameters():
        want = testing.ORACLES[px.GradHistogram](quantity, rows, name, p.detach(), float(N))
        assert p.grad_histogram.counts.shape == (5, 7)
        assert torch.equal(p.grad_histogram.counts, want.counts)
        torch.testing.assert_close(
            p.grad_histogram.param_edges.double(), torch.linspace(-0.3, 0.3, 6), atol=1e-6, rtol=0
        )
        total += N * p.numel()
    assert results.grad_histogram.counts.sum() == total


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("max_norm", [1e-3, 0.7, 1e6])
def test_clipping(build: Any, per_layer: bool, max_norm: float) -> None:
    model = build()
    quantity = px.ClippedGrad(max_norm, per_layer=per_layer)
    rows, _ = run(model, quantity)
    report = testing.compare(model, [quantity], rows, float(N), 1e-9)
    assert report.ok, str(report)


def test_clipping_where_a_gradient_is_zero() -> None:
    model, x = px.extend(nn.Linear(3, 2)), torch.randn(N, 3)
    x[1] = 0
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None]
    loss_fn = px.extend(nn.MSELoss(reduction="sum"))
    with px.backpack(px.ClippedGrad(1.0)):
        loss_fn(model(x) * mask, torch.zeros(N, 2)).backward()
    assert model.weight.clipped_grad.isfinite().all()


def test_projection_preserves_inner_products_on_average() -> None:
    model = mlp()
    rows, x, y = rows_and_batch(model)
    px.extend(model)
    total = torch.zeros(N, N)
    for seed in range(200):
        with px.backpack(px.ProjectedGrad((6, 6), seed=seed)) as results:
            F.cross_entropy(model(x), y).backward()
        assert results.grad_projected.shape == (N, 36 + 6 + 36 + 6)
        total += results.grad_projected @ results.grad_projected.T / 200
    flat = torch.cat([r.reshape(N, -1) for r in rows.values()], 1)
    want = flat @ flat.T
    assert (total - want).abs().max() < 0.15 * want.abs().max()


def test_projections_do_not_hang_on_wrappers() -> None:
    model = mlp()
    _, x, y = rows_and_batch(model)
    found = []
    for wrapped in (model, nn.DataParallel(model), nn.DataParallel(nn.Sequential(*map(checkpoint_wrapper, model)))):
        px.extend(wrapped)
        with px.backpack(px.ProjectedGrad(2)) as results:
            F.cross_entropy(wrapped(x), y).backward()
        found.append(results.grad_projected)
        px.unextend(wrapped)
    torch.testing.assert_close(found[1:], found[:1] * 2)


def test_results_for_the_whole_model() -> None:
    model = mlp()
    rows, results = run(model, px.BatchL2Grad(), px.BatchDotGrad(), px.GradDot(), px.Variance())
    flat = torch.cat([r.reshape(N, -1) for r in rows.values()], 1)
    torch.testing.assert_close(results.batch_l2, flat.square().sum(1))
    torch.testing.assert_close(results.batch_dot, flat @ flat.T)
    torch.testing.assert_close(results.grad_dot, flat @ flat.sum(0))
    with pytest.raises(AttributeError, match="quantity of each parameter"):
        _ = results.variance
    with pytest.raises(AttributeError, match="asked for batch_l2, batch_dot"):
        _ = results.grad_batch
    assert results.keys() == [name for name, _ in results.items()] == list(rows) and len(results) == 4
    assert [found.variance.shape for found in results.values()] == [p.shape for p in model.parameters()]
    assert repr(results) == "Results of 4 parameters: batch_l2, batch_dot, grad_dot, variance"
    with pytest.raises(KeyError, match=r"'0.weigth': the last backward pass reached 4 parameters, among them 0.weight"):
        results["0.weigth"]
    with pytest.raises(KeyError, match=r"'head': the last backward pass reached .*0.weight, "):
        results["head"]


def test_results_are_in_the_order_of_the_model() -> None:
    """And not in that of the backward pass: rows of two batches are compared column by column."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, turned: bool) -> Tensor:
            values = [part(x) for part in ([self.b, self.a] if turned else [self.a, self.b])]
            return values[0] * values[1]

    model, (x, y) = px.extend(Turned()), batch()
    projected = []
    for turned in (False, True):
        with px.backpack(px.ProjectedGrad(2)) as results:
            F.cross_entropy(model(x, turned), y).backward()
        assert list(results) == [name for name, _ in model.named_parameters()]
        projected.append(results.grad_projected)
    torch.testing.assert_close(*projected)


def test_projections_of_batches_that_reach_different_parameters() -> None:
    """Each parameter has its columns, zeros where the pass did not reach it; frozen ones and others have none.

    What `functional_call` puts in the place of a parameter has those of the parameter.
    """

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.head = nn.ModuleList(nn.Linear(5, 3) for _ in range(3)), nn.Linear(3, 3)

        def forward(self, x: Tensor, part: int) -> Tensor:
            return self.head(self.parts[part](x))

    model, (x, y) = px.extend(Routed()), batch()
    model.parts[2].requires_grad_(False)
    given = {k: p.detach().requires_grad_() for k, p in model.named_parameters() if p.requires_grad}
    rows = []
    for part in (0, 1):
        with px.backpack(px.ProjectedGrad((2, 3))) as results:
            F.cross_entropy(model(x, part), y).backward()
        for weights in (given, {k: p for k, p in given.items() if "head" in k}):
            with px.backpack(px.ProjectedGrad((2, 3))) as replaced:
                F.cross_entropy(functional_call(model, weights, (x, part)), y).backward()
            assert list(replaced) == list(results)
            torch.testing.assert_close(replaced.grad_projected, results.grad_projected)
        assert f"parts.{1 - part}.weight" not in results
        rows.append(results.grad_projected)
        own, other, rest = results.grad_projected.split([8, 8, 8], 1)
        own, other = (own, other) if part == 0 else (other, own)
        assert own.any() and rest.any() and not other.any()
    head = torch.cat([results["head.weight"].grad_projected.flatten(1), results["head.bias"].grad_projected], 1)
    torch.testing.assert_close(rows[0] @ rows[1].T, rows[0][:, 16:] @ head.T)
    with px.backpack(px.ProjectedGrad((2, 3)), parameters=model.head.parameters()) as results:
        F.cross_entropy(model(x, 0), y).backward()
    assert results.grad_projected.shape == (len(x), 8)


def test_attributes_of_what_functional_call_puts_in_a_parameters_place() -> None:
    """They are forgotten with the model's own where no pass reaches them, and the hook is called for the module."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, branch: str) -> Tensor:
            return getattr(self, branch)(x)

    model, (x, y), called = px.extend(Branches()), batch(), []
    given = {k: p.detach().requires_grad_() for k, p in model.named_parameters()}

    def hook(module: nn.Module) -> None:
        called.append(module)
        del vars(given["b.bias"])["variance"]

    for branch, asked in (("a", {}), ("b", {"extension_hook": hook})):
        with px.backpack(px.Variance(), **asked) as results:
            F.cross_entropy(functional_call(model, given, (x, branch)), y).backward()
        left = {k for k, p in given.items() if hasattr(p, "variance")}
        assert left == ({"a.weight", "a.bias"} if branch == "a" else {"b.weight"})
    assert called == [model.b] and not hasattr(results["b.bias"], "variance")


def test_parameters_that_another_module_borrows_keep_their_places() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3, bias=False)
            self.weights = nn.ParameterList(torch.randn(3, 5) for _ in range(2))

        def forward(self, x: Tensor, order: list[int]) -> Tensor:
            return sum(functional_call(self.layer, {"weight": self.weights[k]}, x).tanh() for k in order)

    model, (x, y), projected = px.extend(Ensemble()), batch(), []
    for order in ([0, 1], [1, 0]):
        with px.backpack(px.ProjectedGrad(2)) as results:
            F.cross_entropy(model(x, order), y).backward()
        assert list(results) == ["weights.0", "weights.1"]
        projected.append(results.grad_projected)
    torch.testing.assert_close(*projected)


def test_results_before_the_first_pass() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    with px.backpack(px.BatchL2Grad()) as results:
        assert len(results) == 0 and "0.weight" not in results
        assert repr(results) == "Results of no pass yet: batch_l2"
        with pytest.raises(KeyError, match="no backward pass"):
            results["0.weight"]
        with pytest.raises(AttributeError, match="no backward pass"):
            _ = results.batch_l2
        F.cross_entropy(model(x), y).backward()
        assert results.batch_l2.shape == (N,)


# -- stale results -------------------------------------------------------------------------------------------


def test_results_object_outlives_its_context_and_later_passes() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    with px.backpack(px.BatchGrad()) as first:
        F.cross_entropy(model(x), y).backward()
    kept = first["0.weight"].grad_batch.clone()
    with px.backpack(px.BatchGrad()) as second:
        F.cross_entropy(model(2 * x), y).backward()
    assert torch.equal(first["0.weight"].grad_batch, kept)
    assert model[0].weight.grad_batch is second["0.weight"].grad_batch is not first["0.weight"].grad_batch


#: Python 3.14 lends a call the reference of a name, so that `sys.getrefcount` counts one less; `real` counts two more
#: here, for the function that stands in its place.
BORROWING = """
import sys
real = sys.getrefcount
sys.getrefcount = lambda thing: real(thing) - 2
import torch
import packext as px

model = px.extend(torch.nn.Linear(4, 3))
for keep in (True, False):
    results, addresses = [], set()
    for _ in range(4):
        with px.backpack(px.BatchGrad(), px.SumGradSquared()):
            model(torch.randn(5, 4)).square().sum().backward()
        found = [model.weight.grad_batch, model.weight.sum_grad_squared]
        addresses.add(found[0].data_ptr())
        results += [(t, t.clone()) for t in found] if keep else []
        del found
    assert all(torch.equal(t, then) for t, then in results)
    assert len(addresses) == 4 if keep else len(addresses) < 4
"""


def test_results_that_are_kept_never_change_where_python_counts_fewer_references() -> None:
    done = subprocess.run([sys.executable, "-c", BORROWING], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


#: What is made once, where packext is imported, has to be of use in every pass.
IMPORTED = """
import torch

with torch.inference_mode():
    import packext as px

model, loss = px.extend(torch.nn.Linear(4, 3)), px.extend(torch.nn.CrossEntropyLoss())
with px.backpack(px.BatchGrad(), px.Variance(), px.DiagGGNExact(), px.HMP()):
    loss(model(torch.randn(5, 4)), torch.arange(5) % 3).backward()
torch.testing.assert_close(model.weight.grad_batch.sum(0), model.weight.grad)
assert model.weight.hmp(torch.ones(1, 3, 4)).shape == (1, 3, 4)
"""


def test_imported_without_gradients() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr


def test_a_frozen_parameter_loses_its_result_in_the_next_pass() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    with px.backpack(px.BatchGrad()) as results:
        F.cross_entropy(model(x), y).backward()
        model[0].weight.requires_grad_(False)
        F.cross_entropy(model(x), y).backward()
    assert not hasattr(model[0].weight, "grad_batch") and "0.weight" not in results


def test_a_pass_without_a_context_leaves_results_of_the_last_that_asked() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    with px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y).backward()
    kept = model[0].weight.grad_batch
    F.cross_entropy(model(x), y).backward()
    assert model[0].weight.grad_batch is kept


# -- unextend and copies -------------------------------------------------------------------------------------


def state(model: nn.Module) -> Any:
    skip = {"_parameters", "_buffers", "_modules"}
    return [
        (name, {k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items() if k not in skip})
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("use", [False, True])
def test_unextend_leaves_no_trace(use: bool) -> None:
    model, loss_fn, (x, y) = mlp(), nn.CrossEntropyLoss(), batch()
    model[0].register_forward_hook(lambda *_: None)
    before, keys = (state(model), state(loss_fn)), list(model.state_dict())
    assert px.extend(model) is model and px.is_extended(model) and px.is_extended(model[1])
    px.extend(loss_fn)
    assert list(model.state_dict()) == keys
    if use:
        loss_fn(model(x), y).backward()
    assert px.unextend(model) is model and not px.is_extended(model)
    px.unextend(loss_fn)
    assert (state(model), state(loss_fn)) == before
    assert bare(model) and not vars(x) and not vars(y) and list(model.state_dict()) == keys
    px.unextend(model)
    with pytest.raises(px.NotExtendedError), px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y).backward()


def test_unextend_between_forward_and_backward() -> None:
    """The graph is as it was built: its results are right."""
    model = px.extend(mlp())
    rows, x, y = rows_and_batch(model)
    loss = F.cross_entropy(model(x), y)
    px.unextend(model)
    with px.backpack(px.BatchGrad()):
        loss.backward()
    torch.testing.assert_close(model[0].weight.grad_batch, rows["0.weight"])


def duplicates() -> dict[str, Any]:
    def saved(model: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("used", [False, True])
def test_copies_are_extended_and_independent(kind: str, used: bool) -> None:
    model = px.extend(mlp())
    rows, x, y = rows_and_batch(model)
    if used:
        with px.backpack(px.Variance()):
            F.cross_entropy(model(x), y).backward()
    before = fields(model)
    twin = duplicates()[kind](model)
    assert px.is_extended(twin)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(twin, lambda: loss_fn(twin(x), y), rows, N)
    assert fields(model) == before
    px.unextend(twin)
    assert px.is_extended(model)


def test_state_dict_of_an_extended_model_fits_the_plain_one() -> None:
    model = px.extend(mlp())
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))


def test_parts_that_are_added_or_moved_after_extend() -> None:
    """A part that was not there is not extended; its parameters are recognised by those who hold them, or refused."""
    model, (x, y) = px.extend(mlp()), batch()
    model.append(nn.Linear(3, 3))
    with pytest.raises(px.PackextError, match=r"3\.weight|3\.bias"), px.backpack(px.BatchGrad()):
        F.cross_entropy(model(x), y).backward()
    px.extend(model)
    model.double().to("cpu")
    rows = rows_of(model, lambda: F.cross_entropy(model(x), y, reduction="none") / N)
    loss_fn = px.extend(nn.CrossEntropyLoss())
    assert_exact(model, lambda: loss_fn(model(x), y), rows, N)


def test_a_part_of_two_models_has_the_names_of_each() -> None:
    """Also a part that was extended by itself since."""
    body, x = nn.Linear(5, 6), torch.randn(N, 5)
    one = px.extend(nn.Sequential(OrderedDict(encoder=body, head=nn.Linear(6, 3))))
    two = px.extend(nn.Sequential(OrderedDict(backbone=body, top=nn.Linear(6, 2))))
    for model in (one, two, one, two, px.extend(body), one):
        with px.backpack(px.BatchGrad()) as results:
            model(x).sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(results[name].grad_batch.sum(0), torch.autograd.grad(model(x).sum(), p)[0])


def chosen_head() -> tuple[nn.Sequential, list[Tensor]]:
    model = px.extend(mlp())
    return model, [model[2].weight]


def test_chosen_parameters() -> None:
    """Only what was asked for is computed, and what is of the whole model is of these parameters."""
    with double_precision():
        model, chosen = chosen_head()
        (x, y), loss_fn = batch(), px.extend(nn.CrossEntropyLoss())
        quantities = (px.BatchGrad(), px.BatchL2Grad(), px.ClippedGrad(0.1), px.DiagGGNExact(), px.HMP())
        with px.backpack(*quantities) as everything:
            loss_fn(model(x), y).backward(retain_graph=True)
        with px.backpack(*quantities, px.TopEigenvalues(), parameters=iter(chosen)) as found:
            loss_fn(model(x), y).backward(retain_graph=True)
        assert list(found) == ["2.weight"]
        assert not any(hasattr(p, "grad_batch") for name, p in model.named_parameters() if name != "2.weight")
        for field in ("grad_batch", "batch_l2", "diag_ggn_exact"):
            torch.testing.assert_close(getattr(found["2.weight"], field), getattr(everything["2.weight"], field))
        torch.testing.assert_close(found.batch_l2, found["2.weight"].batch_l2)
        own = 4 * found["2.weight"].grad_batch
        weight = (0.1 / own.flatten(1).norm(dim=1)).clamp(max=1.0)
        torch.testing.assert_close(found["2.weight"].clipped_grad, torch.tensordot(weight, own, 1))
        basis = torch.eye(chosen[0].numel()).reshape(-1, *chosen[0].shape)
        block = everything["2.weight"].hmp(basis).flatten(1)
        torch.testing.assert_close(found.top_eigenvalues.values[0], torch.linalg.eigvalsh(block)[-1])


def test_work_is_not_done_for_other_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules are not even asked, and what is refused for others does not matter."""
    model, chosen = chosen_head()
    (x, y), loss_fn = batch(), px.extend(nn.CrossEntropyLoss())
    with px.backpack(px.BatchGrad()):
        loss_fn(model(x), y).backward()  # the probe asks all of them, once
    asked = []
    factors = Use.factors
    monkeypatch.setattr(Use, "factors", lambda use, *args: asked.append(use.where) or factors(use, *args))
    with px.backpack(px.BatchGrad(), px.DiagGGNMC(), parameters=chosen):
        loss_fn(model(x), y).backward()
    assert asked == ["2 [Linear]"] * 2


def test_chosen_parameters_and_extension_hook() -> None:
    """A module's hook runs when its chosen parameters are done."""
    model, chosen = chosen_head()
    x, y = batch()
    called: list[nn.Module] = []
    with px.backpack(px.BatchGrad(), parameters=chosen, extension_hook=called.append):
        nn.functional.cross_entropy(model(x), y).backward()
    assert called == [model[2]]


def test_chosen_parameters_that_make_no_sense() -> None:
    """Bad arguments, and parameters that the pass does not reach."""
    model, chosen = chosen_head()
    x, y = batch()
    unchecked = inspect.unwrap(px.backpack.__init__)
    for bad in (chosen[0], model[2], ["2.weight"], []):
        with pytest.raises(ValueError, match="parameters"):
            unchecked(px.backpack.__new__(px.backpack), px.BatchGrad(), parameters=bad)
    with (
        pytest.raises(px.NotExtendedError, match="one of the given parameters"),
        px.backpack(px.BatchGrad(), parameters=mlp().parameters()),
    ):
        nn.functional.cross_entropy(model(x), y).backward()


def test_results_by_parameter_and_nothing_attached() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    with px.backpack(px.BatchGrad(), px.Variance()):
        F.cross_entropy(model(x), y).backward()
    before = fields(model)
    with px.backpack(px.BatchGrad(), px.BatchL2Grad(), attach=False) as results:
        F.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        assert dict(p.__dict__) == before[name]
        assert p in results and results[p].batch_l2 is results[name].batch_l2
        torch.testing.assert_close(results[p].grad_batch, p.grad_batch)
    other = nn.Parameter(torch.ones(2))
    assert other not in results
    with pytest.raises(KeyError, match=r"a parameter of shape \[2\]"):
        results[other]
    with pytest.raises(ValueError, match="attach=False"):
        px.backpack(px.BatchGrad(), attach=False, extension_hook=print)


def test_parameters_of_two_models_with_the_same_names() -> None:
    first, second, (x, y) = px.extend(nn.Linear(5, 4)), px.extend(nn.Linear(4, 3)), batch()
    with px.backpack(px.BatchGrad()) as results:
        F.cross_entropy(second(first(x)), y).backward()
    assert results[first.weight].grad_batch is first.weight.grad_batch
    assert results[second.weight].grad_batch is second.weight.grad_batch
    with pytest.raises(KeyError, match="ask by the parameter itself"):
        results["weight"]


def test_hook_at_the_end_of_each_pass() -> None:
    model, (x, y) = px.extend(mlp()), batch()
    seen = []

    def hook(results: px.Results) -> None:
        seen.append((results, results["0.weight"].batch_l2, model[0].weight.grad.clone()))

    with px.backpack(px.BatchL2Grad(), pass_hook=hook) as results:
        for k in (1.0, 2.0):
            (k * F.cross_entropy(model(x), y)).backward()
    assert [s[0] for s in seen] == [results, results]
    torch.testing.assert_close(seen[1][1], 4 * seen[0][1])
    torch.testing.assert_close(seen[1][2], 3 * seen[0][2])


@pytest.mark.parametrize("quantity", [px.BatchL2Grad(), px.Variance(), px.GradDot(), px.BatchGrad(), px.DiagGGNMC()])
def test_gradients_to_the_last_bit(quantity: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(24 * 64, 9))
    model, x, y = model.float(), torch.randn(16, 3, 12, 12, dtype=torch.float32), torch.randint(9, (16,))
    loss = px.extend(nn.CrossEntropyLoss())
    loss(model(x), y).backward()
    plain = [p.grad for p in model.parameters()]
    model.zero_grad()
    px.extend(model)
    with px.backpack(quantity, exact_grad=True):
        loss(model(x), y).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


@pytest.mark.parametrize("dims", [(64, 5), (16, 4, 5)])
@pytest.mark.parametrize(
    ("call", "shape"),
    [(lambda x, p: x @ p, (5, 3)), (lambda x, p: x @ p.t(), (3, 5)), (lambda x, p: F.linear(x, p.t()), (5, 3))],
)
def test_gradients_of_a_transposed_weight_to_the_last_bit(call: Any, shape: Any, dims: Any) -> None:
    """torch multiplies the other way round where a matrix is stored by columns."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            return call(x, self.p)

    for _ in range(4):
        model, x = Product(), torch.randn(dims)
        plain = torch.autograd.grad(model(x).tanh().square().sum(), model.p)[0]
        px.extend(model)
        assert torch.equal(torch.autograd.grad(model(x).tanh().square().sum(), model.p)[0], plain)
        with px.backpack(px.BatchL2Grad(), exact_grad=True):
            model(x).tanh().square().sum().backward()
        assert model.p.grad is not None and torch.equal(model.p.grad, plain)


@pytest.mark.parametrize("quantity", [px.BatchGrad(), px.DiagGGNExact(), px.HessianTrace(2)])
@pytest.mark.parametrize("known", [False, True])
def test_a_parameter_that_is_frozen_between_the_passes(quantity: Any, known: bool) -> None:
    """Which torch gives no gradient then; the others are as before."""
    model, loss_fn = px.extend(mlp()), px.extend(nn.CrossEntropyLoss())
    x, y = batch()
    for freeze in (False, True) if known else (True,):
        model.zero_grad()
        with px.backpack(quantity) as results:
            loss = loss_fn(model(x), y)
            model[0].requires_grad_(not freeze)
            loss.backward()
    assert model[0].weight.grad is None and model[2].weight.grad is not None
    assert "2.weight" in results
