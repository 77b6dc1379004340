"""Runs the library on a device that is not there (see pretend.py), and prints what is not as on the CPU.

Run by test_device.py in a process of its own.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import packext as px
from packext import attacks, defences, optim, testing
from packext.attacks.labels import ILRG, LLG
from packext.diagnostics import Cockpit
from tests.cases import CASES, Case
from tests.pretend import DEVICE, Device, Held

FIRST = [
    px.BatchGrad(), px.BatchL2Grad(), px.Variance(), px.SumGradSquared(), px.BatchDotGrad(), px.GradDot(),
    px.GradHistogram(range=(-1.0, 1.0)), px.ProjectedGrad((2, 3)), px.ClippedGrad(1.0),
]  # fmt: skip
CURVATURE = [px.DiagGGNExact(), px.GGNGram(), px.KFLR(), px.KFAC(fisher="empirical", approx="reduce")]

#: What the pretended device has not: fused cells, lengths that stay on the CPU, views of complex numbers.
LACKS = ("_thnn_fused", "batch_sizes should always be on CPU", "complex")


def to_device(value: Any) -> Any:
    return tree_map(lambda t: t.to(DEVICE) if isinstance(t, Tensor) else t, value)


def moved(model: nn.Module) -> nn.Module:
    """A copy on the device. `Module.to` gives a parameter of two modules twice, if its tensors are of another class."""
    found: dict[int, Tensor] = {}
    model = copy.deepcopy(model)
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if t is None:
                    continue
                if id(t) not in found:
                    there: Tensor = t.detach().to(DEVICE)
                    found[id(t)] = nn.Parameter(there, t.requires_grad) if isinstance(t, nn.Parameter) else there
                held[name] = found[id(t)]
    return model


def lacking(error: Exception) -> bool:
    """Whether the pretended device is to blame."""
    return any(lack in str(error) for lack in LACKS)


def outcome(case: Case, model: nn.Module, inputs: Any, targets: Any, asked: list[Any]) -> dict[str, Any] | Exception:
    """What a copy of the model gives, gradients and results by name, or the error."""
    model, loss = px.extend(copy.deepcopy(model), case.batch_axis), case.loss()
    loss = px.extend(loss.to(DEVICE) if any(isinstance(t, Held) for t in tree_leaves(targets)) else loss)
    try:
        with px.backpack(*asked, attach=False) as results:
            loss(testing.call(model, inputs), targets).backward()
    except Exception as error:
        return error
    found: dict[str, Any] = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    for name, r in results.items():
        found |= {f"{name}.{q.savefield}": getattr(r, q.savefield) for q in asked if hasattr(r, q.savefield)}
    return found


def differs(here: Any, there: Any) -> str | None:
    """Why what was found on the device is not what was found on the CPU."""
    mine, theirs = ([t for t in tree_leaves(v) if isinstance(t, Tensor)] for v in (here, there))
    if len(mine) != len(theirs):
        return "missing"
    for a, b in zip(mine, theirs, strict=True):
        if not isinstance(b, Held):
            return "on the CPU"
        if a.shape != b.shape or not torch.allclose(a, b.held, rtol=1e-6, atol=1e-9, equal_nan=True):
            return "another number"
    return None


def cases() -> None:
    count = 0
    for case in CASES:
        torch.manual_seed(0)
        model, inputs, targets = case.build()
        there, device_inputs, device_targets = moved(model), to_device(inputs), to_device(targets)
        try:  # without packext: models with constants of their own, which lie on the CPU
            case.loss().to(DEVICE)(testing.call(copy.deepcopy(there), device_inputs), device_targets).backward()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if "same device" in str(error) or lacking(error):
                continue
            raise
        for asked in (FIRST, CURVATURE):
            wanted = outcome(case, model, inputs, targets, asked)
            found = outcome(case, there, device_inputs, device_targets, asked)
            if isinstance(wanted, Exception):
                if not isinstance(wanted, px.PackextError):
                    raise wanted
                if not isinstance(found, type(wanted)):
                    print(f"{case.name}: not refused as on the CPU ({type(found).__name__})")
            elif isinstance(found, Exception):
                if not lacking(found):
                    print(f"{case.name}: {type(found).__name__} {found}")
            else:
                count += 1
                for name, value in wanted.items():
                    why = differs(value, found.get(name))
                    if why is not None and "complex" not in case.name:
                        print(f"{case.name}: {name} is {why}")
    if count < 200:
        print(f"no more than {count} passes of cases")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 6), nn.LayerNorm(6), nn.Sigmoid(), nn.Linear(6, 3)
    )


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 2, 6, 6), torch.randint(3, (8,))


def both(name: str, work: Callable[[nn.Module, Tensor, Tensor], Any], same: bool = True) -> None:
    """Compare what `work` finds on both devices, or, if it draws, only see that it finds it on the device."""
    wanted = work(net(), *batch())
    try:
        found = work(moved(net()), *to_device(batch()))
    except Exception as error:
        print(f"{name}: {type(error).__name__} {error}")
        return
    why = differs(wanted, found)
    if why is not None and (same or why != "another number"):
        print(f"{name}: {why}")


def steps(make: Callable[[nn.Module], Any]) -> Callable[[nn.Module, Tensor, Tensor], Any]:
    def work(model: nn.Module, x: Tensor, y: Tensor) -> Any:
        loss, optimizer = px.extend(nn.CrossEntropyLoss()), make(px.extend(model))
        for _ in range(3):
            optimizer.zero_grad()
            with optim.emit(optimizer):
                loss(model(x), y).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    return work


def optimizers() -> None:
    for kind in (optim.KFAC, optim.EKFAC, optim.SINGD, optim.MSVAG, optim.AdaHessian, optim.Sophia, optim.ENGDW,
                 optim.SPRING):  # fmt: skip
        work = steps(lambda model, kind=kind: kind(model.parameters(), lr=0.05))
        both(kind.__name__, work, same=kind is not optim.AdaHessian)


def monitor() -> None:
    def watched(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        loss, optimizer = px.extend(nn.CrossEntropyLoss()), torch.optim.SGD(px.extend(model).parameters(), 0.1)
        look = Cockpit(model, optimizer, "full")
        for _ in range(3):
            with look.step():
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
        return dict(look.values)

    wanted, found = watched(net(), *batch()), watched(moved(net()), *to_device(batch()))
    drawn = ("Time", "HessTrace", "TIC", "HessMaxEV")
    for name, value in wanted.items():
        if not name.startswith(drawn) and not np.allclose(found.get(name, np.nan), value, rtol=1e-5, equal_nan=True):
            print(f"Cockpit: {name} is {found.get(name)}, not {value}")
    if wanted.keys() != found.keys():
        print(f"Cockpit: {wanted.keys() ^ found.keys()} on one of the devices")


def drawn() -> None:
    for kind in (px.KFAC, px.DiagGGNMC, px.SqrtGGNMC, px.DiagHessianMC, px.HessianTrace, px.TopEigenvalues):
        for owner in (None, "cpu", DEVICE):

            def work(model: nn.Module, x: Tensor, y: Tensor, kind: Any = kind, owner: Any = owner) -> Any:
                there = owner if x.device == DEVICE or owner is None else "cpu"
                asked = kind(generator=None if there is None else torch.Generator(there))
                loss = px.extend(nn.CrossEntropyLoss())
                with px.backpack(asked, attach=False) as results:
                    loss(px.extend(model)(x), y).backward()
                return [getattr(r, asked.savefield, None) for _, r in results.items()]

            both(f"{kind.__name__}, generator of {owner}", work, same=False)


def checks() -> None:
    for quantity in (px.BatchGrad(), px.ProjectedGrad((2, 3)), px.GradHistogram(), px.DiagGGNExact(), px.DiagHessian(),
                     px.TopEigenvalues(2), px.HMP()):  # fmt: skip
        x, y = to_device(batch())
        try:
            report = testing.check(moved(net()), nn.CrossEntropyLoss(), (x,), y, quantities=[quantity])
        except Exception as error:
            print(f"check of {quantity}: {type(error).__name__} {error}")
        else:
            if not report.ok:
                print(f"check of {quantity}: {report}")


def leaks() -> None:
    plain = nn.CrossEntropyLoss()
    for name, work in {
        "share": lambda model, x, y: dict(attacks.share(model, plain, x, y).gradient),
        "ILRG": lambda model, x, y: ILRG()(model, attacks.share(model, plain, x, y)),
        "LLG": lambda model, x, y: LLG()(model, attacks.share(model, plain, x, y)),
        "DeepLeakage": lambda model, x, y: (
            attacks.DeepLeakage(2)(model, attacks.share(model, plain, x[:1], y[:1]), x.shape[1:], classes=3).inputs
        ),
        "signals": lambda model, x, y: vars(attacks.signals(model, plain, x, y)),
        "pruning": lambda model, x, y: dict(defences.Pruning(0.3)(attacks.share(model, plain, x, y)).gradient),
        "noise": lambda model, x, y: dict(defences.GaussianNoise(0.1)(attacks.share(model, plain, x, y)).gradient),
        "clipped": lambda model, x, y: dict(defences.Clipped(1.0, 1.0)(model, plain, x, y).gradient),
    }.items():  # fmt: skip
        both(name, work, name not in ("noise", "clipped", "DeepLeakage"))


class Centred(nn.Module):
    """Subtracts the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - x.mean(0)) - self.net(x).mean(0)


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for part in self.model.children():
            x = checkpoint(part, x, use_reentrant=self.reentrant, preserve_rng_state=False)
        return x


def checkpointing() -> None:
    """Parts run again on autograd's own thread."""
    for reentrant in (False, True):

        def work(model: nn.Module, x: Tensor, y: Tensor, reentrant: bool = reentrant) -> Any:
            model, loss = px.extend(Checkpointed(model, reentrant)), px.extend(nn.CrossEntropyLoss())
            found = []
            for quantity in (px.BatchGrad(), px.DiagGGNExact(), px.DiagHessian()):
                with px.backpack(quantity, attach=False) as results:
                    loss(model(x.requires_grad_()), y).backward()
                found.append([getattr(r, quantity.savefield) for r in results.values()])
            return found, [p.grad for p in model.parameters()]

        both(f"checkpointing{', reentrant' * reentrant}", work)


def refusals() -> None:
    """What is raised on the device's own thread reaches the caller, and leaves nothing behind."""
    model, (x, y) = px.extend(moved(Centred())), to_device(batch())
    for quantity in (px.BatchGrad(), px.DiagGGNExact()):
        try:
            with px.backpack(quantity):
                px.extend(nn.CrossEntropyLoss())(model(x), y).backward()
        except px.CoupledSamplesError:
            if any(p.grad is not None for p in model.parameters()):
                print(f"{quantity}: a gradient was left behind")
        else:
            print(f"{quantity}: samples that influence each other were not refused")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with Device(), sdpa_kernel(SDPBackend.MATH):
        for part in (cases, optimizers, monitor, drawn, checks, leaks, checkpointing, refusals):
            part()
    print("end")
    sys.stdout.flush()
    os._exit(0)  # autograd's thread of the device would be waited for
