"""Activation checkpointing of both kinds: as without packext outside of contexts, as without checkpointing in them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint, checkpoint_sequential

import packext as px
from tests.helpers import assert_exact, double_precision, left_behind, processes, rows_of

pytestmark = [
    pytest.mark.usefixtures("double"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # torch's, of one within another
]

N = 4

#: How a part runs: `run(function, *args)`.
Run = Callable[..., Any]
KINDS: dict[str, Run] = {
    "plain": lambda function, *args: function(*args),
    "other": lambda function, *args: checkpoint(function, *args, use_reentrant=False),
    "reentrant": lambda function, *args: checkpoint(function, *args, use_reentrant=True),
}


class Layer(nn.Module):
    """Reads what is said by its second argument beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.slope = nn.Linear(6, 6), nn.LayerNorm(6), nn.Parameter(torch.randn(6))

    def forward(self, h: Tensor, more: Any = None) -> Tensor:
        h = self.norm(self.linear(h).tanh()) * self.slope
        if isinstance(more, Tensor):
            h = h + self.slope * more
        return h if more is None or isinstance(more, Tensor) else h * more["factor"]


class Two(Layer):
    def forward(self, h: Tensor, *more: Any) -> Any:
        return super().forward(h).tanh(), h, super().forward(h).relu_(), 3


class Within(nn.Module):
    """A layer that is checkpointed in a module that may be, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.first = Layer(), nn.Linear(6, 6)

    def forward(self, h: Tensor, run: Run) -> Tensor:
        return run(self.layer, self.first(h).relu()).sin()


class Net(nn.Module):
    def __init__(self, part: Callable[[Net, Run, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.part, self.run = nn.Linear(5, 6), nn.Linear(6, 3), part, KINDS["plain"]
        self.a, self.b, self.two = Layer(), Layer(), Two()
        self.table, self.places = nn.Embedding(6, 6), nn.Parameter(torch.randn(6))
        self.within = Within()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.part(self, self.run, self.first(x).tanh()) + x.sum(1, keepdim=True))


def several(m: Net, run: Run, h: Tensor) -> Tensor:
    out, same, changed, number = run(m.two, h)
    return (out + changed * same) * number


def changed(m: Net, run: Run, h: Tensor) -> Tensor:
    h = run(m.a, h)
    h += m.first.bias
    return run(m.b, h.view(N, 2, 3).flatten(1)).mul_(2.0)


def inner(run: Run, kind: str) -> Run:
    return run if run is KINDS["plain"] else KINDS[kind]


PARTS: dict[str, Callable[[Net, Run, Tensor], Tensor]] = {
    "a module": lambda m, run, h: run(m.a, h),
    "functions of modules": lambda m, run, h: run(lambda t: m.b(m.a(t).tanh()) + t, h),
    "one after the other": lambda m, run, h: run(m.b, run(m.a, h)),
    "one twice": lambda m, run, h: run(m.a, run(m.a, h)) + m.a(h),
    "an argument that is no tensor": lambda m, run, h: run(m.a, h, {"factor": 2}),
    "a constant": lambda m, run, h: run(m.a, h, torch.arange(6.0)),
    "a value of parameters": lambda m, run, h: run(m.a, h, m.table(torch.arange(6)).sum(0) * m.places),
    "one that is expanded": lambda m, run, h: run(m.a, h, (m.places * 2).expand(N, 6)),
    "a parameter": lambda m, run, h: run(m.a, h, m.places),
    "data and parameters": lambda m, run, h: run(m.a, h, h * m.places),
    "several outputs": several,
    "changed in place": changed,
    "data that it closes over": lambda m, run, h: (lambda d: run(lambda t: m.b(t, d), m.a(h)))(h.detach().sin()),
    "a graph that it closes over": lambda m, run, h: run(lambda t: m.b(t, h.sin()), m.a(h)),
    "a value of parameters that it closes over": lambda m, run, h: run(lambda t, v=m.places * 2: m.b(t, v), h),
    "a parameter that it closes over": lambda m, run, h: run(lambda t: m.b(t, m.places), h),
    "in a module": lambda m, run, h: run(m.within, h, KINDS["plain"]),
    "reentrant in it": lambda m, run, h: run(m.within, h, inner(run, "reentrant")),
    "the other in it": lambda m, run, h: run(m.within, h, inner(run, "other")),
    "in a function": lambda m, run, h: run(lambda t: run(m.a, t).tanh(), h),
    "the other in a function": lambda m, run, h: run(lambda t: inner(run, "other")(m.a, t).tanh(), h),
    "reentrant in a function": lambda m, run, h: run(lambda t: inner(run, "reentrant")(m.a, t).tanh(), h),
    "without the state of random numbers": lambda m, run, h: (
        run(m.a, h) if run is KINDS["plain"] else checkpoint(m.a, h, use_reentrant=True, preserve_rng_state=False)
    ),
}
if hasattr(torch.utils.checkpoint, "_NoopSaveInputs"):  # 2.9 keeps one tensor more of the other kind: it refuses these
    del PARTS["in a function"], PARTS["reentrant in a function"]


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, 5), torch.randint(3, (N,))


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(got: dict[str, Tensor], want: dict[str, Tensor], **tolerance: float) -> None:
    torch.testing.assert_close(got, want, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("kind", ["other", "reentrant"])
@pytest.mark.parametrize("part", PARTS)
def test_it_is_exact(part: str, kind: str) -> None:
    """Every quantity, beside rows of the model without checkpointing; outside of contexts it trains as it is."""
    model, loss_fn, (x, y) = Net(PARTS[part]), nn.CrossEntropyLoss(), batch()
    rows = rows_of(model, lambda: nn.functional.cross_entropy(model(x), y, reduction="none") / N)
    model.run = KINDS[kind]

    def without_a_context() -> dict[str, Tensor] | None:
        value = loss_fn(model(x), y)
        if part == "a graph that it closes over" and kind == "reentrant":
            with pytest.raises(RuntimeError, match="through the graph a second time"):  # as torch does by itself
                value.backward()
            return grads(model) and None
        value.backward()
        return grads(model)

    want = without_a_context()
    px.extend(model), px.extend(loss_fn)
    for _ in range(2):
        again = without_a_context()
        assert_exact(model, lambda: loss_fn(model(x), y), rows, N)
        if want is not None and again is not None:
            same(again, want)
            same(grads(model), want, rtol=1e-12, atol=1e-14)


QUANTITIES = (px.BatchDiagGGNExact(), px.SqrtGGNExact(), px.KFAC(fisher="exact"), px.DiagHessian())


@pytest.mark.parametrize("kind", ["other", "reentrant"])
@pytest.mark.parametrize("part", PARTS)
def test_curvature(part: str, kind: str) -> None:
    model, loss_fn, (x, y) = px.extend(Net(PARTS[part])), px.extend(nn.CrossEntropyLoss()), batch()
    for quantity in QUANTITIES:
        found = []
        for name in ("plain", kind):
            model.run = KINDS[name]
            torch.manual_seed(3)
            try:
                with px.backpack(quantity) as results:
                    loss_fn(model(x), y).backward()
                found.append({k: getattr(r, quantity.savefield) for k, r in results.items()})
            except px.PackextError as error:
                found.append({str(error).partition("[")[0]: 0})
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["other", "reentrant"])
def test_a_sequence_in_segments(kind: str) -> None:
    layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Layer(), Layer(), nn.Linear(6, 3))

    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.on = layers, False

        def forward(self, x: Tensor) -> Tensor:
            on = checkpoint_sequential(self.layers, 3, x, use_reentrant=kind == "reentrant") if self.on else None
            return self.layers(x) if on is None else on

    model, (x, y), loss_fn = Segments(), batch(), px.extend(nn.CrossEntropyLoss())
    x.requires_grad_()
    rows = rows_of(model, lambda: nn.functional.cross_entropy(model(x), y, reduction="none") / N)
    model.on = True
    px.extend(model)
    for _ in range(2):
        assert_exact(model, lambda: loss_fn(model(x), y), rows, N)


@pytest.mark.parametrize("kind", ["other", "reentrant"])
def test_nothing_is_left_to_the_garbage_collector(kind: str) -> None:
    parts = ("in a module", "one that is expanded", "a value of parameters", "reentrant in it")
    model, loss_fn, (x, y) = px.extend(Net(PARTS["a module"])), px.extend(nn.CrossEntropyLoss()), batch()
    model.run = KINDS[kind]

    def step() -> None:
        for part in parts:
            model.part = PARTS[part]
            with px.backpack(px.BatchGrad(), px.DiagGGNExact()):
                loss_fn(model(x), y).backward()
            loss_fn(model(x), y).backward()

    step()
    assert not left_behind(step)


# -- side effects --------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Counts its runs, writes to a buffer, draws."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6) if norm else None, nn.Dropout(0.4)
        self.runs: Tensor
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        h = self.drop(self.linear(h)) if self.norm is None else self.norm(self.linear(h))
        h = h.tanh()
        self.runs += 1  # behind all that is saved: the other kind does not come so far again
        return h


def trained(kind: str, quantity: Any, norm: bool, steps: int = 3) -> tuple[Any, Any, Any]:
    with double_precision(seed=5):
        model, loss_fn = Net(lambda m, run, h: run(m.extra, h)), nn.CrossEntropyLoss()
        model.add_module("extra", Noisy(norm))
        model.run = KINDS[kind]
        if quantity is not None:
            px.extend(model), px.extend(loss_fn)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(steps):
            x, y = batch()
            optimizer.zero_grad()
            if quantity is None:
                loss_fn(model(x), y).backward()
            else:
                with px.backpack(quantity):
                    loss_fn(model(x), y).backward()
                if isinstance(quantity, px.HMP):
                    model.last.weight.hmp(torch.ones(1, 3, 6))
            optimizer.step()
        return dict(model.named_buffers()), dict(model.named_parameters()), torch.get_rng_state()


@pytest.mark.parametrize("kind", ["other", "reentrant"])
@pytest.mark.parametrize(
    ("quantity", "norm"),
    [
        (px.BatchGrad(), False),
        (px.DiagGGNExact(), False),
        (px.DiagHessian(), False),
        (px.HMP(), False),
        (px.HMP(), True),
        (px.GGNMP(), True),
        (px.HessianTrace(2, generator=torch.Generator().manual_seed(0)), True),
        (px.DiagHessianMC(2, generator=torch.Generator().manual_seed(0)), True),
    ],
    ids=repr,
)
def test_what_it_writes_and_draws(quantity: Any, norm: bool, kind: str) -> None:
    """Buffers, masks and the generator are those of a training without packext: none of its passes is in them."""
    buffers, parameters, state = trained(kind, None, norm)
    got, moved, after = trained(kind, quantity, norm)
    assert float(buffers["extra.runs"]) == (6 if kind == "reentrant" else 3)
    torch.testing.assert_close(got, buffers, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moved, parameters, rtol=1e-12, atol=1e-14)
    assert torch.equal(after, state)


def test_autocast_is_as_it_was() -> None:
    model, (x, y), loss_fn = px.extend(Net(PARTS["in a module"]).float()), batch(), px.extend(nn.CrossEntropyLoss())
    found = []
    for kind in KINDS:
        model.run = KINDS[kind]
        with px.backpack(px.BatchGrad()) as results:
            with torch.autocast("cpu", torch.bfloat16):
                value = loss_fn(model(x.float()), y)
            value.backward()
        found.append([r.grad_batch for r in results.values()])
    assert found[0]
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=0, atol=0)


# -- what reentrant checkpointing gives no graph -------------------------------------------------------------------


class Kept(nn.Module):
    """Leaves what it made in places beside what it returns, from where the loss takes it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.layer, self.last, self.where, self.run = nn.Linear(5, 6), Layer(), nn.Linear(6, 3), where, None
        self.left: Any = None

    def part(self, h: Tensor) -> Any:
        out = self.layer(h)
        extra = out.exp() * 2
        if self.where == "in a list that it returns":
            return out, [extra]
        self.left = extra[:, 1:] if self.where == "a view, in the forward pass" else extra
        return out.view(N, 6)

    def forward(self, x: Tensor) -> Any:
        h = checkpoint(self.part, self.first(x).tanh(), use_reentrant=True)
        if isinstance(h, tuple):
            h, (self.left,) = h
        out = self.last(h)
        return out if self.where == "behind the model" else out + self.left.sum(1, keepdim=True) * out


@pytest.mark.parametrize(
    "where", ["in a list that it returns", "in the forward pass", "a view, in the forward pass", "behind the model"]
)
def test_what_it_leaves_elsewhere_is_a_constant(where: str) -> None:
    model, loss_fn, (x, y) = Kept(where), nn.CrossEntropyLoss(), batch()

    def loss() -> Tensor:
        value = loss_fn(model(x), y)
        return value + model.left.square().mean() if where == "behind the model" else value

    loss().backward()
    want = grads(model)
    px.extend(model), px.extend(loss_fn)
    loss().backward()
    same(grads(model), want)
    with px.backpack(px.BatchGrad()) as results:
        loss().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(results[name].grad_batch.sum(0), want[name], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(p.grad, want[name], rtol=1e-12, atol=1e-14)


def test_all_that_it_returns_requires_grad() -> None:
    """So that the next call has an argument that does, and its parameters get a gradient."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
            self.first.requires_grad_(False)

        def forward(self, x: Tensor, switch: Tensor) -> Tensor:
            h = checkpoint(lambda t, _: self.first(t), x, switch, use_reentrant=True)
            assert h.requires_grad
            return checkpoint(self.last, h, use_reentrant=True)

    model, loss_fn, (x, y) = Frozen(), nn.CrossEntropyLoss(), batch()
    switch = torch.zeros(N, requires_grad=True)
    with px.disable():
        loss_fn(model.last(model.first(x)), y).backward()
    want = grads(model)
    px.extend(model), px.extend(loss_fn)
    with px.backpack(px.BatchGrad()):
        loss_fn(model(x, switch), y).backward()
    torch.testing.assert_close(model.last.weight.grad_batch.sum(0), want["last.weight"])
    same(grads(model), want, rtol=1e-12, atol=1e-14)


def test_inputs_without_a_gradient() -> None:
    """Torch gives the part none, and says so; packext leaves it at that."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.first, x, use_reentrant=True))

    model, loss_fn, (x, y) = px.extend(First()), px.extend(nn.CrossEntropyLoss()), batch()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"), px.backpack(px.BatchGrad()):
        loss_fn(model(x), y).backward()
    assert model.first.weight.grad is None and not hasattr(model.first.weight, "grad_batch")
    torch.testing.assert_close(model.last.weight.grad_batch.sum(0), model.last.weight.grad)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, px.backpack():
            assert not model(x).requires_grad


# -- torch is as it was ---------------------------------------------------------------------------------------------


def test_torch_is_as_it_was() -> None:
    def fails(m: Net, run: Run, h: Tensor) -> Tensor:
        assert "apply" in vars(CheckpointFunction)
        raise RuntimeError("in the model")

    model, (x, y), loss_fn = px.extend(Net(PARTS["a module"])), batch(), px.extend(nn.CrossEntropyLoss())
    model.run = KINDS["reentrant"]
    names = {name for name, _ in vars(CheckpointFunction).items()}
    with px.backpack(px.BatchGrad()):
        value = loss_fn(model(x), y)
        assert set(vars(CheckpointFunction)) == names
        value.backward()
    model.part = fails
    with pytest.raises(RuntimeError, match="in the model"), px.backpack(px.BatchGrad()):
        model(x)
    assert set(vars(CheckpointFunction)) == names


def test_what_others_have_put_in_the_place_of_torchs_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    theirs = classmethod(lambda cls, *args: [calls.append(cls), super(CheckpointFunction, cls).apply(*args)][1])
    monkeypatch.setattr(CheckpointFunction, "apply", theirs, raising=False)
    kept = vars(CheckpointFunction)["apply"]
    x = torch.randn(N, 5, requires_grad=True)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with px.disable(), torch.no_grad():
                checkpoint(torch.tanh, x, use_reentrant=True)
            return x.tanh()

    model = px.extend(nn.Sequential(nn.Linear(5, 5), Model()))
    with px.backpack(px.BatchL2Grad()):
        model(x).square().sum().backward()
    assert vars(CheckpointFunction)["apply"] is kept
    assert calls == [CheckpointFunction]


def test_other_threads_are_left_alone() -> None:
    """While a model runs in a context, another thread's checkpointing, of an extended model or not, is torch's own."""
    running, done, nodes, x = threading.Event(), threading.Event(), [], torch.randn(N, 5)

    def wait(m: Net, run: Run, h: Tensor) -> Tensor:
        running.set()
        assert done.wait(30)
        return run(m.a, h)

    model, other = px.extend(Net(wait)), px.extend(Net(PARTS["a module"]))
    model.run = KINDS["reentrant"]
    first = nn.Linear(5, 6)

    def beside() -> None:
        assert running.wait(30)
        nodes.append(checkpoint(nn.Linear(6, 6), first(x), use_reentrant=True).grad_fn)
        other.part = lambda m, run, h: nodes.append((t := checkpoint(m.a, h, use_reentrant=True)).grad_fn) or t
        other(x)
        done.set()

    thread = threading.Thread(target=beside)
    thread.start()
    with px.backpack(px.BatchGrad()):
        model(x).square().sum().backward()
    thread.join()
    assert [type(node).__name__ for node in nodes] == ["CheckpointFunctionBackward"] * 2


def test_outside_of_a_context_it_is_torchs_own() -> None:
    nodes: list[Any] = []

    def look(m: Net, run: Run, h: Tensor) -> Tensor:
        nodes.append((h := run(m.a, h)).grad_fn)
        return h

    model, (x, y), loss_fn = px.extend(Net(look)), batch(), px.extend(nn.CrossEntropyLoss())
    model.run = KINDS["reentrant"]
    value = loss_fn(model(x), y)
    assert type(nodes[0]).__name__ == "CheckpointFunctionBackward"
    for quantity in (px.BatchGrad(), px.DiagGGNExact()):
        with pytest.raises(px.UnsupportedUseError, match="forward pass inside of the context"), px.backpack(quantity):
            value.backward(retain_graph=True)
        assert not grads(model)
    value.backward()
    assert grads(model)


def test_the_checkpointing_of_other_libraries_is_refused() -> None:
    copied = type("CheckpointFunction", (CheckpointFunction,), {})

    model, (x, y) = px.extend(Net(lambda m, run, h: copied.apply(m.a, True, h))), batch()
    loss_fn = px.extend(nn.CrossEntropyLoss())
    for quantity in (px.BatchGrad(), px.DiagGGNExact(), px.HMP()):
        with pytest.raises(px.UnsupportedUseError, match="another library's CheckpointFunction"):
            with px.backpack(quantity):
                loss_fn(model(x), y).backward()
        assert not grads(model)


# -- passes of other kinds ------------------------------------------------------------------------------------------


def test_graphs_that_are_kept_and_graphs_of_gradients() -> None:
    model, (x, y), loss_fn = Net(PARTS["in a module"]), batch(), px.extend(nn.CrossEntropyLoss())
    px.extend(model)
    found = []
    for kind in KINDS:
        model.run, per = KINDS[kind], []
        with px.backpack(px.BatchGrad(), px.DiagGGNExact()) as results:
            value = loss_fn(model(x), y)
            for _ in range(2):
                value.backward(retain_graph=True)
                per.append([r.grad_batch.clone() for r in results.values()])
                per.append([r.diag_ggn_exact.clone() for r in results.values()])
        model.zero_grad()
        with px.backpack(px.BatchL2Grad()) as results:
            torch.autograd.grad(loss_fn(model(x), y), [*model.within.parameters()], create_graph=True)
            norms = torch.stack([r.batch_l2.sum() for r in results.values()]).sum()
        per.append(list(torch.autograd.grad(norms, [*model.within.parameters()])))
        found.append(per)
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("around", ["other", "reentrant"])
def test_around_the_extended_model(around: str, kind: str) -> None:
    """Individual gradients are right, whatever it has in it; curvature does not come through the reentrant kind."""
    model, before, loss_fn, (x, y) = (
        px.extend(Net(PARTS["in a module"])),
        nn.Linear(5, 5),
        nn.CrossEntropyLoss(),
        batch(),
    )
    px.extend(loss_fn)
    found = []
    for quantity in (px.BatchGrad(), px.DiagGGNExact()):
        model.run = KINDS["plain"]
        with px.backpack(quantity) as results:
            loss_fn(model(before(x)), y).backward()
        want = [getattr(r, quantity.savefield) for r in results.values()]
        model.run = KINDS[kind]
        grads(model)
        if around == "reentrant" and isinstance(quantity, px.DiagGGNExact):
            with pytest.raises(px.UnsupportedUseError, match="what is around it"), px.backpack(quantity):
                loss_fn(KINDS[around](model, before(x)), y).backward()
            assert not grads(model)
            continue
        with px.backpack(quantity) as results:
            loss_fn(KINDS[around](model, before(x)), y).backward()
        found = [getattr(r, quantity.savefield) for r in results.values()]
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)
        grads(model)


@pytest.mark.parametrize("part", ["in a module", "a value of parameters", "one that is expanded", "the other in it"])
def test_what_is_saved_elsewhere(part: str) -> None:
    """Arguments of a part come back as other tensors."""
    model, loss_fn, (x, y) = px.extend(Net(PARTS[part])), px.extend(nn.CrossEntropyLoss()), batch()
    found = []
    for kind in KINDS:
        model.run = KINDS[kind]
        with px.backpack(px.BatchGrad(), px.DiagGGNExact()) as results:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
                value = loss_fn(model(x), y)
            value.backward()
        found.append([(r.grad_batch, r.diag_ggn_exact) for r in results.values()])
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("followed", [True, False])
@pytest.mark.parametrize("part", PARTS)
def test_losses_made_of_derivatives(part: str, followed: bool) -> None:
    """A gradient penalty, of which torch's own reentrant kind has none: as of the other kind."""
    model, (x, _) = Net(PARTS[part]), batch()
    for layer in (model.a, model.b, model.two, model.within.layer) if followed else ():
        layer.norm = nn.Tanh()  # in checkpointed parts normalisations are refused
    px.extend(model)
    x.requires_grad_()
    found: list[Any] = []
    for kind in KINDS:
        model.run = KINDS[kind]
        try:
            with px.backpack(px.BatchGrad()) as results:
                (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
                slope.square().sum(1).mean().backward()
            found.append([r.grad_batch for r in results.values()])
        except px.UnsupportedUseError as error:
            assert kind != "plain" and not followed and "layer_norm" in str(error)
    if followed:
        torch.testing.assert_close(found[1:], found[:1] * 2, rtol=1e-12, atol=1e-14)


def test_a_transform_in_the_model_keeps_torchs_error() -> None:
    model, (x, _) = px.extend(Net(lambda m, run, h: torch.vmap(lambda row: run(m.a, row))(h))), batch()
    model.run = KINDS["reentrant"]
    with pytest.raises(RuntimeError, match="setup_context"), px.backpack():
        model(x)


def _ddp(rank: int, port: int, kind: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    store = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model, loss_fn, (x, y) = px.extend(Net(PARTS["one after the other"])), px.extend(nn.CrossEntropyLoss()), batch()
    for name in ("two", "table", "within"):
        delattr(model, name)
    del model.places
    half = slice(rank * N // 2, (rank + 1) * N // 2)
    found = []
    for name in ("plain", kind):
        model.run = KINDS[name]
        parallel = nn.parallel.DistributedDataParallel(model)
        with px.backpack(px.BatchGrad(), px.DiagGGNExact()) as results:
            loss_fn(parallel(x[half]), y[half]).backward()
        found.append([[r.grad_batch, r.diag_ggn_exact] for r in results.values()])
        found.append([*grads(model).values()])
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-12, atol=1e-14)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["other", "reentrant"])
def test_several_processes(kind: str) -> None:
    processes(_ddp, kind)
