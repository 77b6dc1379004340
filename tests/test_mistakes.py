"""What is typed by mistake is said to be one, where it was typed, with what would fit."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packext as px
from packext import attacks, audit, defences, diagnostics, linalg, optim, search, testing
from packext.diagnostics import Cockpit

X, Y = torch.randn(8, 5), torch.arange(8) % 3


def net() -> nn.Module:
    return px.extend(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))


def entered(context: Any) -> None:
    with context:
        pass


class Own(nn.Module):
    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -outputs.log_softmax(1)[torch.arange(len(targets)), targets].mean()


def passed(*asked: Any, around: Any = None, loss_fn: nn.Module | None = None, **options: Any) -> None:
    model, loss_fn = net(), px.extend(loss_fn or nn.CrossEntropyLoss())
    with px.backpack(*asked, **options), around or contextlib.nullcontext():
        loss_fn(model(X), Y).backward()


NET = net()
PRIVATE = optim.DPSGD(NET.parameters(), 0.1, max_norm=1.0, noise_multiplier=1.0, expected_batch_size=4)
SHARED = attacks.share(nn.Linear(5, 3), nn.CrossEntropyLoss(), X, Y)

MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "names with parameters": (
        lambda: px.backpack(px.BatchGrad(), parameters=net().named_parameters()),
        "parameters must be tensors .* got pairs of names and tensors",
    ),
    "a number of samples": (lambda: px.BatchGrad(subsampling=3), "a list of sample indices, got 3"),
    "a direction without names": (
        lambda: px.GradDot([torch.zeros(3)]),
        "direction must be a dictionary of tensors by name, .* got a list",
    ),
    "a loss that is a function": (
        lambda: testing.check(net(), F.cross_entropy, X, Y),
        "check takes a loss module, such as nn.CrossEntropyLoss",
    ),
    "one quantity to check": (
        lambda: testing.against(testing.Reference(net(), nn.CrossEntropyLoss(), X, Y), px.BatchGrad()),
        "quantities must be a list, got one BatchGrad",
    ),
    "the class of an optimizer": (lambda: entered(optim.emit(optim.KFAC)), "got the class KFAC"),
    "a quantity for an optimizer": (
        lambda: entered(optim.emit(px.BatchGrad())),
        r"For BatchGrad\(\) write px.backpack\(BatchGrad\(\)\)",
    ),
    "the class of a part": (
        lambda: optim.Optimizer(net().parameters(), [optim.Momentum, optim.Descend()]),
        "parts must be a list such as .* got <class",
    ),
    "a step uphill": (
        lambda: optim.Optimizer(net().parameters(), [optim.Adam()]),
        r"no part has a learning rate: .* Descend\(lr\), the last",
    ),
    "a data set for a sampler": (
        lambda: optim.AdaptiveBatchSampler(torch.utils.data.TensorDataset(X, Y), optim.NoiseScale()),
        "takes a sampler, .* got TensorDataset and NoiseScale",
    ),
    "an optimizer for a controller": (
        lambda: optim.AdaptiveBatchSampler(range(8), torch.optim.SGD(net().parameters(), 0.1)),
        "a controller of the batch size, .* got range and SGD",
    ),
    "model and gradients in turn": (
        lambda: attacks.ILRG()(SHARED, net()),
        r"reads what attacks.share\(model, loss_fn, x, y\) returns, got a Sequential",
    ),
    "a search of no iterations": (lambda: attacks.InvertingGradients(iterations=0), "need iterations >= 1"),
    "a box that is inside out": (lambda: attacks.InvertingGradients(low=1.0, high=0.0), "low < high"),
    "a search of gradients clipped to nothing": (lambda: attacks.DeepLeakage(clip=0.0), "a positive clip or None"),
    "a search without a start": (lambda: attacks.DeepLeakage(restarts=0), "restarts >= 1"),
    "no local steps": (lambda: attacks.LocalSteps(0, 0.1), "need steps >= 1, lr > 0"),
    "a list of defences": (
        lambda: defences.Compose([defences.Pruning(0.5)]),
        "Compose takes defences one by one: .* got .Pruning",
    ),
    "a dictionary for what is shared": (
        lambda: defences.Pruning(0.5)(dict(SHARED.gradient)),
        r"acts on what attacks.share\(model, loss_fn, x, y\) returns, got a dict",
    ),
    "a list for what is shared": (lambda: defences.TopK(0.5)([]), r"attacks.share\(.* returns, got a list"),
    "canaries of a training that is not private": (
        lambda: attacks.GradientCanaries(torch.optim.SGD(net().parameters(), 0.1)),
        "canaries test a px.optim.DPSGD or DPAdam, got a SGD",
    ),
    "a function for the loss of a client": (
        lambda: attacks.Shared({}, 4, nn.functional.cross_entropy).summed,
        r"take a module for the loss, such as nn.CrossEntropyLoss\(\)",
    ),
    "no defences": (lambda: defences.Compose(), "Compose takes defences one by one: .* got none"),
    "a defence of samples after one of messages": (
        lambda: defences.Compose(defences.Pruning(0.5), defences.Clipped(1.0)),
        "Clipped.* takes the place of attacks.share and can only be the first",
    ),
    "one among several after one of messages": (
        lambda: defences.Compose(defences.Pruning(0.5), defences.Compose(defences.Clipped(1.0))),
        "Clipped.* takes the place of attacks.share and can only be the first",
    ),
    "one of samples after one of messages, by other names": (
        lambda: defences.Compose(defences.Pruning(0.5), lambda net, loss, inputs, labels: SHARED),
        "takes the place of attacks.share and can only be the first",
    ),
    "labels for sharing": (
        lambda: audit.run(net(), nn.CrossEntropyLoss(), X, Y),
        "sharing must be a px.audit.Sharing, got Tensor",
    ),
    "arrays for tensors": (
        lambda: audit.run(net(), nn.CrossEntropyLoss(), (X.numpy(), Y.numpy()), audit.Sharing(batch_size=4)),
        r"members must be a pair of tensors \(x, y\), got tuple of ndarray, ndarray",
    ),
    "a function for proxies": (
        lambda: search.scores(net(), F.cross_entropy, X, Y),
        "scores takes a loss module, such as nn.CrossEntropyLoss",
    ),
    "a function for a search": (
        lambda: search.ProxylessNAS(net(), F.cross_entropy),
        "ProxylessNAS takes a loss module, such as nn.CrossEntropyLoss",
    ),
    "operations without names": (
        lambda: search.MixedOp([nn.Identity(), nn.Identity()]),
        "MixedOp takes its operations by name",
    ),
    "a matrix for a function": (
        lambda: linalg.cg(torch.eye(3), torch.ones(3)),
        "cg: matvec must be a function, such as matrix.mv",
    ),
    "more classes than outputs": (
        lambda: attacks.DeepLeakage(1)(nn.Linear(5, 3), SHARED, (5,), classes=7),
        r"inputs \[8, 5\] with labels \[8, 7\]: .*classes= the number of the model's outputs",
    ),
    "the shape of another input": (
        lambda: attacks.DeepLeakage(1)(nn.Linear(5, 3), SHARED, (6,), classes=3),
        r"inputs \[8, 6\] .*shape= is that of one input",
    ),
    "a label that there is not": (
        lambda: attacks.InvertingGradients(1, tv=0)(nn.Linear(5, 3), SHARED, (5,), labels=Y + 3),
        r"with labels \[8\]: .*labels= are one for each input",
    ),
    "noise without end": (
        lambda: optim.epsilon([optim.Spent(float("inf"), 10, 5)], 100, 1e-5),
        "noise_multiplier=inf.* is no number of private steps",
    ),
    "a race of one": (lambda: search.Race(1, 0.1), "2 operations or more, got 1"),
    "a number for TensorBoard": (lambda: diagnostics.TensorBoard(3), "a folder or a SummaryWriter, got 3"),
    "a data set for its size": (
        lambda: optim.PoissonSampler(torch.utils.data.TensorDataset(X, Y), 0.25, steps=4),
        r"samples must be their number, such as len\(dataset\), got a TensorDataset",
    ),
    "a seed for batches": (
        lambda: optim.PoissonSampler(100, 0.25, steps=4, generator=0),
        "generator must be one, such as torch.Generator",
    ),
    "instruments for a level": (
        lambda: Cockpit(NET, torch.optim.SGD(NET.parameters(), 0.1), [diagnostics.GradNorm()]),
        "level must be a name or None, got an object of list: instruments go by instruments=",
    ),
    "draws for a basis": (lambda: px.EKFAC(8), "basis must be a dictionary .* got a int"),
    "a seed for draws": (lambda: px.KFAC(1, generator=0), "generator must be one, such as torch.Generator"),
    "a seed for a start": (lambda: px.TopEigenvalues(generator=0), "generator must be one, such as"),
    "the class of a model": (
        lambda: testing.check(nn.Linear, nn.CrossEntropyLoss(), X, Y),
        "check takes a model, an object of a class of nn.Module, got <class",
    ),
    "a loader for a batch": (
        lambda: testing.check(net(), nn.CrossEntropyLoss(), torch.utils.data.DataLoader(range(8)), Y),
        "inputs are a tensor, a tuple of arguments or a dictionary .* got a DataLoader",
    ),
    "the class of a quantity to check": (
        lambda: testing.check(net(), nn.CrossEntropyLoss(), X, Y, [px.BatchGrad]),
        r"quantities must be instances, got the class BatchGrad: write BatchGrad\(\)",
    ),
    "a loss of your own without a reduction": (
        lambda: passed(px.BatchGrad(), loss_fn=Own(), scale="sample"),
        "not extended, or has no `reduction`.* of your own is an nn.Module with an attribute `reduction`.*without",
    ),
    "curvature of a loss of your own without a reduction": (
        lambda: passed(px.DiagGGNExact(), loss_fn=Own()),
        "came through no extended loss.* A loss of your own is an nn.Module with an attribute `reduction`.*for models",
    ),
    "a loss function to extend": (
        lambda: px.extend(F.cross_entropy),
        r"got a function. Functions need no extend, but for losses: take the module, such as nn.CrossEntropyLoss\(\)",
    ),
    "one part": (
        lambda: optim.Optimizer(NET.parameters(), optim.Descend(0.1)),
        "parts must be a list such as .* got <packext.*Descend",
    ),
    "an optimizer for its steps": (lambda: optim.epsilon(PRIVATE, 100, 1e-5), r"such as DPSGD.*spent, got one DPSGD"),
    "one kind of steps": (lambda: optim.epsilon(optim.Spent(1.0, 4, 9), 100, 1e-5), "a list of Spent.* got one Spent"),
    "one run to serve": (lambda: diagnostics.Server("runs/first"), r"a list of folders, such as \['runs/first'\]"),
    "a trace that there is not": (lambda: diagnostics.HessTrace("ggn-mc"), "one of 'ggn_mc', 'ggn', 'hessian', got"),
    "a norm in letters": (lambda: px.ClippedGrad("1"), "max_norm must be a positive number, got '1'"),
    "a dimension that is no int": (lambda: px.ProjectedGrad(1.5), "dim must be one or two positive ints, got 1.5"),
    "a generator for a seed": (lambda: px.ProjectedGrad(8, torch.Generator()), "seed must be an int, got <torch"),
    "the state of another optimizer": (
        lambda: optim.KFAC(NET.parameters()).load_state_dict(torch.optim.Adam(NET.parameters()).state_dict()),
        "of another optimizer than KFAC: its groups have no damping, fallback",
    ),
    "a rate without a policy": (
        lambda: optim.LearnedRate(torch.optim.Adam(NET.parameters())),
        'no policy was trained for Adam .* name it: policy="rmsprop"',
    ),
    "a batch for a scale": (
        lambda: Cockpit(NET, torch.optim.SGD(NET.parameters(), 0.1)).step(torch.zeros(100, 5)),
        r'(?s)scale must be "sample", "mean" or a number, got .{80}\.$',
    ),
    "a batch to explain": (lambda: px.explain(X, net()), "expects a model with parameters, got tensor.*[^\n]*$"),
    "parameters of another model": (
        lambda: passed(px.BatchGrad(), parameters=nn.Linear(5, 3).parameters()),
        r"backward\(\) inside .* Give parameters=... of that model that require grad\.",
    ),
    "a pass that is not listened to": (
        lambda: passed(px.BatchGrad(), around=px.disable()),
        r"no backward pass .* neither of them within px.disable\(\)",
    ),
    "a loss of samples to attribute": (
        lambda: px.adapters.Attributor(net(), lambda batch: batch, 4).fit([X[0]]),
        r"must return one number, as a tensor with a graph, got shape \[5\]",
    ),
}


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    """What each mistake raises in a process of its own, where no types are checked, as for users."""
    command = [sys.executable, "-m", "tests.test_mistakes"]
    root = Path(__file__).parent.parent
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_said(messages: dict[str, str], name: str) -> None:
    assert re.search(MISTAKES[name][1], messages[name])


def test_an_optimizer_that_is_not_told_the_scale() -> None:
    model = net()
    private = optim.DPSGD(model.parameters(), max_norm=1.0, noise_multiplier=1.0, expected_batch_size=8)
    with pytest.raises(px.NotExtendedError, match=r"pass scale=<number> to .* px\.optim\.emit, or"):
        with optim.emit(private):
            nn.functional.cross_entropy(model(X), Y).backward()


def test_one_proxy_by_its_name() -> None:
    (name,) = search.scores(net(), nn.CrossEntropyLoss(), X, Y, "snip")
    assert name == "snip"


def test_an_optimizer_is_called_what_it_is() -> None:
    model = net()
    optimizer = optim.KFAC(model.parameters())
    with pytest.raises(px.NotExtendedError, match="^KFAC asked for"), optim.emit(optimizer):
        nn.CrossEntropyLoss()(model(X), Y).backward()


def test_a_step_that_is_not_entered_or_within_itself() -> None:
    model, loss_fn = net(), px.extend(nn.CrossEntropyLoss())
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(KeyError, match="Loss: no step was looked at yet"):
        monitor.values["Loss"]
    monitor.step()
    with pytest.raises(RuntimeError, match="write `with monitor.step"):
        monitor.step()
    monitor = Cockpit(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(RuntimeError, match=r"^monitor.step\(\) within itself"), monitor.step(), monitor.step():
        pass
    with monitor.step():
        loss_fn(model(X), Y).backward()
    assert monitor.values["Loss"] > 0


def test_an_optimizer_of_another_model_is_seen() -> None:
    model, loss_fn = net(), px.extend(nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="the SGD holds no parameter of Sequential"):
        Cockpit(model, torch.optim.SGD(net().parameters(), 0.1))
    optimizer = torch.optim.SGD([*model[:1].parameters(), *net().parameters()], 0.1)
    monitor = Cockpit(model, optimizer)
    for _ in range(4):
        with monitor.step():
            loss_fn(model(X), Y).backward()
            optimizer.step()
            model.zero_grad()
    (verdict,) = monitor.verdicts
    assert "2.weight is not held by the optimizer (and 1 more" in str(verdict)


if __name__ == "__main__":
    found = {}
    for name, (call, _) in MISTAKES.items():
        try:
            found[name] = repr(call())
        except (TypeError, ValueError, px.PackextError) as error:
            found[name] = str(error)
    print(json.dumps(found))
