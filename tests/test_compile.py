"""Models that torch.compile compiles: as they were written inside of a context, compiled outside."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import packext as px

# The compiler looks at `.grad` of what it is given, where that is no leaf: torch warns of it, without packext as well.
# On Python 3.13.0 alone it says that it is slow there.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0"),
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]
    yield
    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]


class Counted:
    """A backend that counts the graphs it is given, and how often they run."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


class Chain(nn.Sequential):
    """With a forward of its own, as not every torch compiles that of `nn.Sequential` where it has hooks."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for module in self:
            x = module(x)
        return x


def net() -> nn.Module:
    torch.manual_seed(0)
    return Chain(nn.Linear(5, 7), nn.Sequential(nn.Tanh(), nn.LayerNorm(7)), nn.Linear(7, 3)).double()


def step(model: Callable[[Tensor], Tensor], *quantities: Any) -> Any:
    torch.manual_seed(1)
    x, y, loss_fn = torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0]), px.extend(nn.CrossEntropyLoss())
    if not quantities:
        loss_fn(model(x), y).backward()
        return None
    with px.backpack(*quantities) as results:
        loss_fn(model(x), y).backward()
    return {name: (r.grad_batch, r.kfac) for name, r in results.items()}


QUANTITIES = (px.BatchGrad(), px.KFAC(fisher="empirical"))


def parts(model: nn.Module, backend: Any) -> nn.Module:
    assert isinstance(model, nn.Sequential)
    for k in (1, 2):
        model[k] = torch.compile(model[k], backend=backend)
    return model


def in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


WAYS: dict[str, Callable[[Any], nn.Module]] = {
    "extended, then compiled": lambda b: torch.compile(px.extend(net()), backend=b),  # type: ignore[return-value]
    "compiled, then extended": lambda b: px.extend(torch.compile(net(), backend=b)),  # type: ignore[arg-type]
    "compiled in place": lambda b: in_place(px.extend(net()), b),
    "parts": lambda b: px.extend(parts(net(), b)),
    "parts of an extended model": lambda b: parts(px.extend(net()), b),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_right_inside_and_compiled_outside(way: Any) -> None:
    want = step(px.extend(net()), *QUANTITIES)
    backend = Counted()
    model = way(backend)
    for asked in (True, False, True):
        runs = backend.runs
        if not asked:
            step(model)
            assert backend.runs > runs
            continue
        got = step(model, *QUANTITIES)
        assert backend.runs == runs
        assert [name.replace("_orig_mod.", "") for name in got] == list(want)
        for (rows, factors), (rows_, factors_) in zip(got.values(), want.values(), strict=True):
            torch.testing.assert_close(rows, rows_, rtol=0, atol=0)
            for a, b in zip(factors, factors_, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert backend.graphs == (2 if "parts" in str([k for k, v in WAYS.items() if v is way]) else 1)


def test_no_graph_break_outside() -> None:
    model = torch.compile(px.extend(net()), backend=Counted(), fullgraph=True)
    step(model)


def test_forward_outside_of_the_context() -> None:
    model = torch.compile(px.extend(net()), backend=Counted())
    loss = model(torch.randn(4, 5).double()).sum()
    with pytest.raises(px.NotExtendedError, match="torch.compile.*forward pass has to be inside"):
        with px.backpack(px.BatchGrad()):
            loss.backward()


def test_a_compiled_function_that_the_model_calls() -> None:
    backend = Counted()
    gelu = torch.compile(lambda t: t * torch.sigmoid(1.7 * t), backend=backend)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            return gelu(self.inner(x))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = px.extend(Model())
        x = torch.randn(4, 5).double()
        out = model(x)
        with px.backpack(px.BatchGrad()) as results:
            out.sum().backward()
    for k in range(4):
        model.zero_grad()
        model.inner(x[k : k + 1])
        with px.disable():
            gelu(model.inner(x[k : k + 1])).sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(results[name].grad_batch[k], p.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("broken", [False, True])
def test_a_compiled_step(broken: bool) -> None:
    """Around a context it is refused, inside of one it is as it was written, without one it is compiled."""
    model, x, backend = px.extend(net()), torch.ones(2, 5).double(), Counted()

    def loss() -> Tensor:
        if broken:
            torch._dynamo.graph_break()  # pyright: ignore[reportPrivateImportUsage]
        return model(x).sum()

    def compute() -> None:
        with px.backpack(px.BatchGrad()):
            loss().backward()

    with pytest.raises(px.PackextError, match="compile the model, and not the step"):
        torch.compile(compute, backend=backend)()
    run = torch.compile(loss, backend=backend)
    run().backward()
    assert backend.runs == backend.graphs > 0
    with px.backpack(px.BatchGrad()) as results:
        run().backward()
    assert backend.runs == backend.graphs
    assert len(results) == 6


def test_what_the_user_asked_of_the_compiler_is_left() -> None:
    backend = Counted()
    model = torch.compile(px.extend(net()), backend=backend)
    with torch.compiler.set_stance("force_eager"):
        step(model, *QUANTITIES)
        step(model)
    assert backend.runs == 0
    with pytest.raises(ZeroDivisionError):
        with px.backpack(px.BatchGrad()):
            raise ZeroDivisionError
    step(model)
    assert backend.runs == 1


def test_forward_passes_that_overlap() -> None:
    """Threads do not end in the order in which they began; nor does one that was interrupted in a context."""

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3)
            self.runs, self.go, self.error = threading.Event(), threading.Event(), False

        def forward(self, x: Tensor) -> Tensor:
            if self.error:
                raise KeyboardInterrupt
            self.runs.set()
            assert self.go.wait(60)
            return self.inner(x)

    x, first, second = torch.ones(2, 5), px.extend(Held()), px.extend(Held())
    threads = [threading.Thread(target=model, args=(x,)) for model in (first, second)]
    for model, thread in zip((first, second), threads, strict=True):
        thread.start()
        assert model.runs.wait(60)
    for model, thread in zip((first, second), threads, strict=True):
        model.go.set()
        thread.join()
    first.error = True
    with pytest.raises(KeyboardInterrupt), px.backpack(px.BatchGrad()):
        first(x)
    second(x)
    backend = Counted()
    step(torch.compile(px.extend(net()), backend=backend))
    assert backend.runs == 1


# torch warns of the hook by which a monitor knows the forward passes of a step.
@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")
@pytest.mark.parametrize("way", ["extended, then compiled", "compiled, then extended"])
def test_a_monitor_is_given_what_is_compiled(way: str) -> None:
    values = []
    for model in (px.extend(net()), WAYS[way](Counted())):
        assert px.is_extended(model)
        optimizer, loss_fn = torch.optim.SGD(model.parameters(), 0.1), px.extend(nn.CrossEntropyLoss())
        watch = (px.diagnostics.GradNorm(), px.diagnostics.SampleNorms(), px.diagnostics.OutputScale())
        monitor = px.diagnostics.Cockpit(model, optimizer, None, instruments=watch)
        torch.manual_seed(1)
        for _ in range(2):
            with monitor.step():
                loss_fn(model(torch.randn(4, 5).double()), torch.tensor([0, 1, 2, 0])).backward()
                optimizer.step()
        values.append({k: v for k, v in monitor.values.items() if "before" not in k})
    one, other = values
    assert one.keys() == other.keys() and "GradNorm/0.weight" in one
    assert all(torch.allclose(torch.as_tensor(v), torch.as_tensor(other[k]), rtol=1e-12) for k, v in one.items())


def test_explained_as_it_was_written() -> None:
    x = torch.randn(4, 2, 5).double()
    model = torch.compile(px.extend(net(), batch_axis=1), backend=Counted())
    assert str(px.explain(model, x)) == str(px.explain(px.extend(net(), batch_axis=1), x))  # type: ignore[arg-type]


def test_unextend() -> None:
    model = torch.compile(px.extend(net()), backend=Counted())
    px.unextend(model)  # type: ignore[arg-type]
    with pytest.raises(px.NotExtendedError):
        step(model, *QUANTITIES)
