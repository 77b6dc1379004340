"""What happens around a pass: caught errors, contexts in hooks, several models and losses, copies of results."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
import time
from collections.abc import Callable
from operator import is_
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packext as px

pytestmark = pytest.mark.usefixtures("double")

N = 4


def perceptron() -> nn.Sequential:
    return px.extend(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 3), torch.randint(2, (N,))


def cross_entropy(reduction: str = "mean") -> nn.Module:
    return px.extend(nn.CrossEntropyLoss(reduction=reduction))


# -- several losses and models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reductions", [("mean", "sum"), ("sum", "mean")])
def test_losses_of_one_class_that_scale_samples_differently(reductions: tuple[str, str]) -> None:
    (x, y), model = batch(), perceptron()
    first, second = map(cross_entropy, reductions)
    with pytest.raises(px.PackextError, match=r"scale samples differently: CrossEntropyLoss \(\w+\) by \d"):
        with px.backpack(px.BatchL2Grad(), scale="sample"):
            (first(model(x), y) + second(model(x), y)).backward()
    first, second = cross_entropy("none"), cross_entropy("none")
    with pytest.raises(px.PackextError, match="scale samples differently"):
        with px.backpack(px.BatchL2Grad(), scale="sample"):
            (first(model(x), y).mean() + second(model(x), y).sum()).backward()


def two_models() -> tuple[nn.Module, nn.Module]:
    return px.extend(nn.Linear(3, 4)), px.extend(nn.Linear(4, 2))


def test_models_whose_parameters_have_equal_names() -> None:
    (x, y), (front, back) = batch(), two_models()
    with px.backpack(px.BatchL2Grad()) as results:
        cross_entropy()(back(front(x).tanh()), y).backward()
    parameters = [*front.parameters(), *back.parameters()]
    torch.testing.assert_close(results.batch_l2, sum(getattr(p, "batch_l2") for p in parameters))  # noqa: B009
    with pytest.raises(KeyError, match="several models"):
        results["weight"]
    found = [("weight", back.weight), ("bias", back.bias), ("weight", front.weight), ("bias", front.bias)]
    assert [(k, v.batch_l2) for k, v in results.items()] == [(k, getattr(p, "batch_l2")) for k, p in found]  # noqa: B009
    with px.backpack(px.BatchL2Grad(), parameters=front.parameters()) as results:  # a generator, and its discriminator
        cross_entropy()(back(front(x).tanh()), y).backward()
    assert results["weight"].batch_l2 is getattr(front.weight, "batch_l2")  # noqa: B009
    with pytest.raises(ValueError, match="equal names.*ModuleDict"), px.backpack(px.ClippedGrad(1.0, per_layer=True)):
        cross_entropy()(back(front(x).tanh()), y).backward()


def test_the_hook_is_called_for_every_model_of_a_pass() -> None:
    (x, y), (front, back) = batch(), two_models()
    seen: list[nn.Module] = []
    with px.backpack(px.Variance(), extension_hook=seen.append):
        cross_entropy()(back(front(x).tanh()), y).backward()
    assert seen == [back, front]


# -- passes that fail, or are others' --------------------------------------------------------------------------------


def test_a_pass_that_fails_takes_nothing_from_the_next() -> None:
    (x, y), model, fails = batch(), perceptron(), [True]

    def hook(module: nn.Module) -> None:
        if fails[0] and module is model[0]:
            raise ValueError("out of memory, say")
        if fails[0]:
            del vars(module.weight)["variance"]

    def attached() -> list[bool]:
        return [hasattr(p, "variance") for p in model.parameters()]

    with px.backpack(px.Variance(), extension_hook=hook):
        with pytest.raises(ValueError, match="out of memory"):
            cross_entropy()(model(x), y).backward()
        assert not any(attached())
        fails[0] = False
        cross_entropy()(model(x), y).backward()
    assert all(attached())


@pytest.mark.parametrize("options", [{}, {"extension_hook": lambda module: None}, {"accumulate": True}])
def test_a_pass_whose_end_fails_is_none(options: dict[str, Any]) -> None:
    """Attributes are as they were before, and the pass counts for nothing in those after it."""
    (x, y), model, fails = batch(), perceptron(), [True]

    def fail(_: px.Results) -> None:
        if fails[0]:
            raise ValueError("at the end")

    def attached() -> list[Any]:
        return [vars(p).get("variance") for p in model.parameters()]

    def run() -> None:
        cross_entropy()(model(x), y).backward()

    with px.backpack(px.Variance(), pass_hook=fail, **options):
        with pytest.raises(ValueError, match="at the end"):
            run()
        assert attached() == [None] * 4
        fails[0] = False
        run()
    before, fails[0] = attached(), True
    with px.backpack(px.Variance()):
        run()
    torch.testing.assert_close(attached(), before)
    before = attached()
    with pytest.raises(ValueError, match="at the end"), px.backpack(px.Variance(), pass_hook=fail, **options):
        run()
    assert all(map(is_, attached(), before))


@pytest.mark.parametrize("early", [True, False])
def test_a_context_in_a_hook(early: bool) -> None:
    (x, y), model, other = batch(), perceptron(), px.extend(nn.Linear(3, 2))
    inner: list[Tensor] = []

    def hook(_: Any) -> None:
        with torch.enable_grad(), px.backpack(px.BatchL2Grad()) as results:
            cross_entropy()(other(x), y).backward()
        inner.append(results.batch_l2)

    weight: Any = model[2 if early else 0].weight
    handle = weight.register_post_accumulate_grad_hook(hook)
    with px.backpack(px.BatchL2Grad()) as results:
        cross_entropy()(model(x), y).backward()
    handle.remove()
    with px.backpack(px.BatchL2Grad()) as wanted:
        cross_entropy()(model(x), y).backward()
    torch.testing.assert_close(results.batch_l2, wanted.batch_l2)
    with px.backpack(px.BatchL2Grad()) as wanted:
        cross_entropy()(other(x), y).backward()
    torch.testing.assert_close(inner, [wanted.batch_l2])


class Either(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 2)

    def forward(self, x: Tensor, first: bool) -> Tensor:
        return (self.a if first else self.b)(self.front(x).tanh())


def test_results_of_parameters_that_a_pass_did_not_reach_go() -> None:
    (x, y), model = batch(), px.extend(Either())
    with px.backpack(px.BatchL2Grad(), parameters=model.a.parameters()) as results:
        cross_entropy()(model(x, True), y).backward()
        assert "a.weight" in results and hasattr(model.a.weight, "batch_l2")
        cross_entropy()(model(x, False), y).backward()
        assert "a.weight" not in results and not hasattr(model.a.weight, "batch_l2")


def test_parts_are_asked_for_where_a_pass_is_overheard() -> None:
    (x, y), model = batch(), perceptron()
    with px.backpack(px.BatchL2Grad(), accumulate=True, attach=False, overhear=True), px.backpack(px.Variance()):
        cross_entropy()(model(x), y).backward()
        x.requires_grad_()
        with pytest.raises(px.PackextError, match="no parameter of the model a gradient"):
            torch.autograd.grad(cross_entropy()(model(x), y), x)


def test_a_context_that_is_used_again_and_hears_nothing() -> None:
    (x, y), model, context = batch(), perceptron(), px.backpack(px.Variance())
    with context:
        cross_entropy()(model(x), y).backward()
    with pytest.raises(px.NotExtendedError), context:
        pass


def test_what_is_known_of_a_parameter_does_not_grow() -> None:
    from packext import _use

    model = perceptron()
    for _ in range(50):
        model(torch.randn(N, 3))
    assert all(len(_use._LIVE[id(p)]) <= 5 for p in model.parameters())


def test_threads_that_run_one_model() -> None:
    """Each adds nodes to what is known of the parameters, and forgets those that are gone."""
    from packext import _use

    class Node:
        pass

    parameter, nodes = nn.Parameter(torch.zeros(1)), [[Node() for _ in range(300)] for _ in range(4)]

    def remember(mine: list[Node]) -> None:
        for node in mine:
            _use._remember(parameter, lambda node=node: node)

    threads = [threading.Thread(target=remember, args=(mine,)) for mine in nodes]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert len(_use.live_nodes(parameter)) == 1200
    del _use._LIVE[id(parameter)]


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch 2.9 never lets go of them")
def test_the_end_of_a_program_waits_for_what_its_threads_have_left() -> None:
    """Torch lets go of a thread's state after `join()`, and aborts the process if Python shuts down meanwhile."""
    from packext import _listening

    model, left = perceptron(), []

    def run() -> None:
        model(batch()[0])
        left.append(_listening.here())  # as torch does, for longer

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    model(batch()[0])
    assert thread in _listening._threads.values() and threading.main_thread() not in _listening._threads.values()
    threading.Timer(0.2, left.clear).start()
    start = time.monotonic()
    _listening._wait()
    assert 0.1 < time.monotonic() - start < 0.9 and thread not in _listening._threads.values()


# -- tensors that retain gradients -----------------------------------------------------------------------------------


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.front(x).tanh()
        self.h.retain_grad()
        return self.back(self.h)


@pytest.mark.parametrize(
    "quantity",
    [
        px.BatchGrad(),
        px.DiagGGNExact(),
        px.KFAC(),
        px.KFRA(),
        px.DiagHessian(),
        px.HMP(),
        px.GGNMP(),
        px.HessianTrace(),
    ],
    ids=repr,
)
def test_gradients_that_tensors_retain_are_those_of_the_pass(quantity: Any) -> None:
    (x, y), model = batch(), px.extend(Keeps())

    def retained() -> list[Tensor]:
        out = model(x)
        out.retain_grad()
        loss = cross_entropy()(out, y)
        loss.backward(retain_graph=True)
        if isinstance(quantity, (px.HMP, px.GGNMP)) and hasattr(model.front.weight, quantity.savefield):
            getattr(model.front.weight, quantity.savefield)(torch.ones(1, 5, 3))
        assert model.h.grad is not None and out.grad is not None
        return [model.h.grad, out.grad]

    wanted = retained()
    for _ in range(2):  # with the probe, and without
        with px.backpack(quantity):
            torch.testing.assert_close(retained(), wanted, rtol=0, atol=0)


# -- results ---------------------------------------------------------------------------------------------------------


def test_results_that_no_model_has_as_a_whole() -> None:
    (x, y), model = batch(), perceptron()
    with px.backpack(px.DiagGGNExact(), px.KFAC(), px.DiagHessian(), px.HMP(), px.Variance()) as results:
        cross_entropy()(model(x), y).backward()
    for field in ("diag_ggn_exact", "kfac", "diag_h", "hmp", "variance"):
        with pytest.raises(AttributeError, match="quantity of each parameter"):
            getattr(results, field)


def test_results_can_be_copied() -> None:
    (x, y), model = batch(), perceptron()
    with px.backpack(px.Variance()) as results:
        cross_entropy()(model(x), y).backward()
    found = results["0.weight"]
    for made in (copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))):
        torch.testing.assert_close(made(found).variance, found.variance)


def test_results_that_a_hook_deleted() -> None:
    (x, y), model = batch(), perceptron()

    def delete(module: nn.Module) -> None:
        for p in module.parameters(recurse=False):
            delattr(p, "batch_l2")

    with px.backpack(px.BatchL2Grad(), extension_hook=delete) as results:
        cross_entropy()(model(x), y).backward()
    with pytest.raises(AttributeError, match="deleted"):
        _ = results.batch_l2


# -- what a loss is called with --------------------------------------------------------------------------------------


class OfPart(nn.MSELoss):
    """Takes its input out of a tuple or a dictionary."""

    def __init__(self, key: Any) -> None:
        super().__init__()
        self.key = key

    def forward(self, out: Any, y: Tensor) -> Tensor:
        return super().forward(out[self.key], y)


@pytest.mark.parametrize("quantity", [px.DiagGGNExact(), px.KFLR(), px.HMP(), px.GGNMP()], ids=repr)
@pytest.mark.parametrize(
    ("key", "wrap"),
    [(0, lambda o: (o,)), ("y", lambda o: {"y": o}), ("y", lambda o: {"y": o, "beside": None})],
    ids=["tuple", "dictionary", "with None"],
)
@pytest.mark.parametrize("large", [False, True])
def test_a_loss_of_one_tensor_in_something(
    key: Any, wrap: Callable[[Tensor], Any], quantity: Any, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:  # inputs that are not kept
        monkeypatch.setattr(px._scale, "SMALL", 0)
    model, x, y = px.extend(nn.Linear(3, 2)), torch.randn(N, 3), torch.randn(N, 2)

    def found(loss: nn.Module, out: Any) -> Any:
        px.extend(loss)(out, y).backward(retain_graph=True)
        value = getattr(model.weight, quantity.savefield)
        return value(torch.eye(6).view(6, 2, 3)) if callable(value) else value

    with px.backpack(quantity):
        wanted = found(nn.MSELoss(), out := model(x))
        torch.testing.assert_close(found(OfPart(key), wrap(out)), wanted)


class Named(nn.Module):
    reduction = "mean"

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target)


@pytest.mark.parametrize("quantity", [px.BatchL2Grad(), px.DiagGGNExact(), px.HMP()], ids=repr)
def test_a_loss_that_is_called_by_names(quantity: Any) -> None:
    (x, y), model = batch(), perceptron()
    with px.backpack(quantity, scale="sample"):
        px.extend(Named())(logits=model(x), target=y).backward()
    assert hasattr(model[0].weight, quantity.savefield)


def test_products_with_the_ggn_of_a_loss_of_which_the_target_depends_on_the_model() -> None:
    model, x = px.extend(nn.Linear(3, 4)), torch.randn(N, 3)
    for quantity, refused in ((px.GGNMP(), True), (px.HMP(), False)):
        with px.backpack(quantity) as results:
            out = model(x)
            px.extend(nn.MSELoss())(out[:, :2], out[:, 2:]).backward(retain_graph=True)
            product = getattr(results["weight"], quantity.savefield)
            if refused:
                with pytest.raises(px.PackextError, match=r"another argument, \[4, 2\], that requires grad"):
                    product(torch.ones(1, 4, 3))
            else:
                product(torch.ones(1, 4, 3))


@pytest.mark.parametrize("parted", [False, True])
def test_products_with_the_hessian_of_a_loss_of_several_arguments(parted: bool) -> None:
    """Anchor, positive and negative each come by a call of the model, or one by that of another."""
    model, x, loss = perceptron(), torch.randn(3, N, 3), px.extend(nn.TripletMarginLoss())
    last = px.extend(nn.Linear(3, 2)) if parted else model
    weights = [model[2].weight, *([last.weight] if parted else [])]
    slopes = torch.autograd.grad(loss(model(x[0]), model(x[1]), last(x[2])), weights, create_graph=True)
    for weight, slope in zip(weights, slopes, strict=True):
        unit = torch.eye(weight.numel()).view(-1, *weight.shape)
        with px.backpack(px.HMP()) as results:
            loss(model(x[0]), model(x[1]), last(x[2])).backward(retain_graph=True)
        wanted = [torch.autograd.grad(s, weight, retain_graph=True)[0] for s in slope.flatten()]
        torch.testing.assert_close(results[weight].hmp(unit), torch.stack(wanted))
    with pytest.raises(px.PackextError, match=r"another argument, \[4, 2\].*both as a tuple"):
        with px.backpack(px.DiagGGNExact()):
            loss(model(x[0]), model(x[1]), last(x[2])).backward()


class Sums(nn.Module):
    def __init__(self, doubled: bool) -> None:
        super().__init__()
        self.layer, self.doubled = nn.Linear(3, 2), doubled

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.layer(x)
        total = F.cross_entropy(out, y)
        for _ in range(40 if self.doubled else 1500):
            total = total + (total if self.doubled else F.cross_entropy(out, y))
        return total


@pytest.mark.parametrize("doubled", [False, True])
def test_long_sums_of_losses(doubled: bool) -> None:
    (x, y), model = batch(), px.extend(Sums(doubled))
    with px.backpack(px.BatchGrad()):
        model(x, y).backward()
    torch.testing.assert_close(getattr(model.layer.weight, "grad_batch").sum(0), model.layer.weight.grad)  # noqa: B009


# -- what a model gives, and writes to ---------------------------------------------------------------------------------


class Solves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.solve_ex(x, self.b.expand(len(x), 3, 2)).result


def test_functions_whose_results_have_names() -> None:
    model, x = px.extend(Solves()), torch.randn(N, 3, 3) + 3 * torch.eye(3)
    with px.backpack(px.BatchGrad()):
        px.extend(nn.MSELoss())(model(x), torch.zeros(N, 3, 2)).backward()
    torch.testing.assert_close(getattr(model.b, "grad_batch").sum(0), model.b.grad)  # noqa: B009


class WritesThroughAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        inputs = torch.zeros(len(x), 3)
        inputs[:, :].copy_(x)
        return self.layer(inputs)


def test_data_written_through_a_view() -> None:
    (x, y), model, plain = batch(), px.extend(WritesThroughAView()), px.extend(nn.Linear(3, 2))
    plain.load_state_dict(model.layer.state_dict())
    for m in (model, plain):
        with px.backpack(px.BatchGrad()):
            cross_entropy()(m(x), y).backward()
    torch.testing.assert_close(getattr(model.layer.weight, "grad_batch"), getattr(plain.weight, "grad_batch"))  # noqa: B009


class RefersToItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        out: Any = type("Out", (), {})()
        out.logits, out.again = self.layer(x), out
        return out


def test_an_output_that_refers_to_itself() -> None:
    (x, y), model = batch(), px.extend(RefersToItself())
    with px.backpack(px.BatchGrad()):
        cross_entropy()(model(x).logits, y).backward()
    assert getattr(model.layer.weight, "grad_batch").shape == (N, 2, 3)  # noqa: B009


class Without(nn.Module):
    """Layers that have no features on one side, beside one that has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.into, self.out = nn.Linear(3, 2), nn.Linear(3, 0), nn.Linear(0, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.out(self.into(x))


@pytest.mark.parametrize("shape", [(), (5,)], ids=["rows", "positions"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_layers_without_features(shape: tuple[int, ...]) -> None:
    x, y = torch.randn(N, *shape, 3), torch.randn(N, *shape, 2)
    quantities = [
        px.BatchGrad(), px.BatchL2Grad(), px.BatchDotGrad(), px.GradDot(), px.SumGradSquared(), px.Variance(),
        px.DiagGGNExact(), px.GGNGram(), px.DiagHessian(),
    ]  # fmt: skip
    model = px.extend(Without())
    for q in quantities:
        with px.backpack(q):
            px.extend(nn.MSELoss())(model(x), y).backward()
        found, plain = getattr(model.out.bias, q.savefield), getattr(model.layer.bias, q.savefield)
        torch.testing.assert_close(found, plain)  # they are added to each other
        assert getattr(model.into.weight, q.savefield).sum() == 0
