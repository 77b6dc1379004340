"""What the command line works on: a model, a loss and a batch from what a user has typed."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from packext import testing
from packext._errors import PackextError

#: Losses by the names that they have on the command line.
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
    "bce": nn.BCEWithLogitsLoss,
}


class Mistake(PackextError):
    """Something that was typed does not fit: the message says what, and what would."""


@dataclass
class Subject:
    """A model with something to compute.

    Attributes:
        model: in the mode in which it is to be looked at.
        loss_fn: called with the model's output and the targets.
        inputs: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
        targets: what the loss takes beside the output.
        about: model, loss and batch in a line.
    """

    model: nn.Module
    loss_fn: nn.Module
    inputs: Any
    targets: Any
    about: str

    def loss(self, model: nn.Module, loss_fn: nn.Module) -> Tensor:
        """The loss of a copy of the model on the batch."""
        return loss_fn(testing.call(model, self.inputs), self.targets)


def subject(
    model: str,
    shape: str | None = None,
    tokens: int | None = None,
    batch: str | None = None,
    loss: str | None = None,
    samples: int = 4,
    seed: int = 0,
    train: bool = False,
    device: str | None = None,
) -> Subject:
    """Build it, and take its plain gradient once, without which there is nothing to look at.

    Args:
        model: `module:name` or `file.py:name`, of a model, a class of models, or a function that returns one.
        shape: of one sample's input, as in "3x32x32"; drawn from a normal distribution.
        tokens: how many there are, for a model of token indices: these are drawn in place of it.
        batch: `module:name` of a function that returns (inputs, targets), in place of what is drawn.
        loss: one of `LOSSES`, or `module:name`; by the shape of the outputs if omitted.
        samples: N of what is drawn.
        seed: of all draws, the model's initial values included.
        train: whether the model is looked at in training mode.
        device: to which all of it goes; where each part is, if omitted.

    Returns:
        The subject.

    Raises:
        Mistake: if a part is not there, is something else, or does not fit the others.
    """
    torch.manual_seed(seed)
    net = _made(model, nn.Module, "a model (an nn.Module, or a function that returns one)")
    if not any(p.requires_grad for p in net.parameters()):
        raise Mistake(f"{model}: {type(net).__name__} has no parameter that requires a gradient.")
    _run(lambda: net.train(train).to(device), f"--device {device}")
    targets = None
    if batch is not None:
        if shape is not None or tokens is not None:
            raise Mistake(f"{batch} returns the inputs: leave out --input and --tokens, by which some are drawn.")
        given = _made(batch, (tuple, list), "(inputs, targets), or a function that returns them")
        if len(given) != 2:
            raise Mistake(f"{batch} must return (inputs, targets), and returned {len(given)} things.")
        inputs, targets = given
    elif shape is not None:
        sizes = _sizes(shape)
        inputs = torch.randn(samples, *sizes) if tokens is None else torch.randint(tokens, (samples, *sizes))
    else:
        raise Mistake(
            "what the model is called with is not known. Say --input 3x32x32, the shape of one sample's input (with "
            "--tokens V for indices below V), or --batch module:name, a function that returns (inputs, targets)."
        )
    if device is not None:
        inputs, targets = pytree.tree_map_only(Tensor, lambda t: t.to(device), (inputs, targets))
    with torch.no_grad():
        drawn = ", drawn from a normal distribution (--tokens V draws indices)" if batch is None and not tokens else ""
        output = _run(lambda: testing.call(net, inputs), f"{type(net).__name__} on {_shapes(inputs)}{drawn}")
    if not isinstance(output, Tensor):
        raise Mistake(
            f"{type(net).__name__} returns a {type(output).__name__}, where a tensor is needed. Name a function that "
            "returns a module whose forward gives the tensor that the loss takes."
        )
    if not output.is_floating_point():
        raise Mistake(f"{type(net).__name__} returns {output.dtype}, of which parameters have no gradient.")
    name, loss_fn = _loss(loss, output, targets)
    loss_fn.to(device)
    if targets is None:
        targets = _targets(name, output)
    with torch.no_grad():
        value = _run(lambda: loss_fn(output, targets), f"the loss of outputs {list(output.shape)}")
    if not isinstance(value, Tensor) or value.dim():
        raise Mistake(f"the loss must be a scalar tensor, and {type(loss_fn).__name__} gave {_shapes(value)}.")
    mode = "training" if train else "evaluation"
    about = f"{type(net).__name__}, {mode} mode; inputs {_shapes(inputs)}, outputs {list(output.shape)}, {name}"
    made = Subject(net, loss_fn, inputs, targets, about)
    # Of copies, since a model that keeps what it has computed could not be copied any more.
    trial = _run(lambda: made.loss(*copy.deepcopy((net, loss_fn))), f"a copy of {type(net).__name__}")
    if not trial.requires_grad:
        raise Mistake(f"{type(net).__name__} has no gradient: is its output detached, or made under torch.no_grad()?")
    _run(trial.backward, f"the gradient of {type(net).__name__}")
    return made


def _made(path: str, kind: type | tuple[type, ...], what: str) -> Any:
    """The object that a path names, called if it is not of the kind yet."""
    value = _named(path)
    if not isinstance(value, kind):
        if not callable(value):
            raise Mistake(f"{path} is a {type(value).__name__}, not {what}.")
        value = _run(value, path)
    if not isinstance(value, kind):
        raise Mistake(f"{path} gave a {type(value).__name__}, not {what}.")
    return value


def _named(path: str) -> Any:
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise Mistake(f"{path!r} is not of the form module:name or file.py:name.")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if place.endswith(".py"):
        value: Any = _file(place)
    else:
        try:
            found = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise Mistake(f"there is no module {place!r} in {folder} or in what is installed.")
        value = _run(lambda: importlib.import_module(place), place)
    for part in name.split("."):
        if not hasattr(value, part):
            known = [n for n in vars(value) if not n.startswith("_")] if hasattr(value, "__dict__") else []
            raise Mistake(f"{place} has no {part!r}. It has {', '.join(known[:12]) or 'nothing public'}.")
        value = getattr(value, part)
    return value


def _file(place: str) -> Any:
    """The module that a file makes, once for model, batch and loss, and where data classes in it look for it."""
    name = f"file {Path(place).resolve()}".replace(".", "_")  # no import is of that name
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, place)
        if not Path(place).is_file() or spec is None or spec.loader is None:
            raise Mistake(f"{place} is not a file.")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            _run(lambda: spec.loader and spec.loader.exec_module(sys.modules[name]), place)
        except Mistake:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _run(call: Callable[[], Any], what: str) -> Any:
    """Run code that is not ours; what it raises is said in a line, with its place, and so is that it ends Python."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise Mistake(f"{what}: {type(error).__name__}: {error} ({last.filename}, line {last.lineno})") from None


def _sizes(shape: str) -> list[int]:
    try:
        sizes = [int(part) for part in shape.replace(",", "x").split("x")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise Mistake(f"--input {shape}: the shape of one sample's input is positive numbers, as in 3x32x32.")
    return sizes


def _loss(loss: str | None, output: Tensor, targets: Any) -> tuple[str, nn.Module]:
    if loss is None:
        classes = output.dim() == 2 and output.shape[1] > 1
        labels = not isinstance(targets, Tensor) or not targets.is_floating_point()
        loss = "cross-entropy" if classes and labels else "mse"
    if loss in LOSSES:
        return loss, LOSSES[loss]()
    if ":" not in loss:
        raise Mistake(f"--loss {loss}: it is one of {', '.join(LOSSES)}, or module:name of a loss module.")
    return loss, _made(loss, nn.Module, "a loss module")


def _targets(name: str, output: Tensor) -> Tensor:
    if name == "cross-entropy":
        if output.dim() < 2:
            raise Mistake(f"cross entropy needs outputs [N, classes, ...], and these are {list(output.shape)}.")
        return torch.randint(output.shape[1], (output.shape[0], *output.shape[2:])).to(output.device)
    if name == "bce":
        return torch.randint(2, output.shape).to(output)
    if name == "mse":
        return torch.randn_like(output)
    raise Mistake("targets of a loss of your own are not known: say --batch module:name, which returns them too.")


def _shapes(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shapes(v)}" for k, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_shapes, value))
    return type(value).__name__
