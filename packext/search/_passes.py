"""The passes that proxies read: one of the loss with individual gradients, one of the outputs' sum, one without any."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import packext as px

#: Name under which a layer of the copy holds the factors of its output's channels, all 1.
GATE = "packext_channel_gate"
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
#: Products that torch's own counter of operations leaves out, from the shapes of what they are given.
PRODUCTS: dict[Any, Any] = {
    torch.ops.aten.mv: lambda a, b, **_: 2 * math.prod(a),
    torch.ops.aten.addmv: lambda c, a, b, **_: 2 * math.prod(a),
    torch.ops.aten.dot: lambda a, b, **_: 2 * math.prod(a),
    # of nn.Bilinear: x [N, I], w [O, I, J], y [N, J]
    torch.ops.aten._trilinear: lambda x, w, y, *_, **__: 2 * x[0] * w[0] * w[2] * (w[1] + 1),
}
RELU = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


class Undefined(px.PackextError):
    """A score that is not defined of a model or batch of which others may be."""


@dataclass(frozen=True)
class Moments:
    """What is kept of the individual gradients g_n of one parameter, each in its shape.

    Attributes:
        mean: of g_n over the samples.
        mean_abs: of |g_n|.
        std: standard deviation of g_n, of the population (divided by N).
        signs: sum of sign(g_n), of which |signs| tells how far the samples agree.
    """

    mean: Tensor
    mean_abs: Tensor
    std: Tensor
    signs: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """Of individual gradients `[N, *p]`."""
        return cls(rows.mean(0), rows.abs().mean(0), rows.std(0, correction=0), rows.sign().sum(0))


def refuse_function(who: str, loss_fn: Any) -> None:
    """Refuse a loss that is a function.

    Raises:
        TypeError: if it is one.
    """
    if not isinstance(loss_fn, nn.Module):
        raise TypeError(f"{who} takes a loss module, such as nn.CrossEntropyLoss(), got {loss_fn!r:.80}.")


class Problem:
    """A model and a batch, as proxies see them: copies in float64, on which each pass runs once, when first asked for.

    Attributes:
        model: copy of the model, not extended.
        loss_fn: copy of it, weights in float64.
        x: inputs `[N, ...]`, in float64 if they are floating.
        y: targets.
        fisher: whether the pass of the loss carries factors of channels.
    """

    def __init__(self, model: nn.Module, loss_fn: nn.Module, x: Any, y: Any, fisher: bool) -> None:
        """Copy and check.

        Raises:
            PackextError: if no parameter requires grad, x is no tensor or has no sample, or something is not finite.
        """
        refuse_function("scores", loss_fn)
        if not isinstance(x, Tensor) or x.dim() < 1 or not len(x):
            what = f"shape {list(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise px.PackextError(f"Proxies are of a batch x [N, ...] with at least one sample; x is {what}.")
        if x.is_floating_point():
            x = x.detach().double()
            finite("the inputs x", x)
        self.model = px.unextend(copy.deepcopy(model)).double()
        self.loss_fn, self.x, self.y, self.fisher = copy.deepcopy(loss_fn).double(), x, y, fisher
        if isinstance(y, Tensor) and y.is_floating_point():
            self.y = y.detach().double()
        if not self.trained:
            raise px.PackextError(f"{type(model).__name__} has no parameter that requires grad.")
        for name, p in self.model.named_parameters():
            finite(name, p)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters of the copy that require grad, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """Those with two axes or more: matrices and kernels, not biases and scales."""
        return {name: p for name, p in self.trained.items() if p.dim() > 1}

    @functools.cached_property
    def losses(self) -> tuple[dict[str, Moments], float]:
        """Of every trained parameter the moments of the samples' own gradients, and the Fisher score.

        One extended backward pass. Individual gradients of a module are dropped as soon as it is complete.

        Raises:
            PackextError: if the loss is no scalar, not finite, or depends on nothing that is trained.
        """
        model, moments, total = copy.deepcopy(self.model), {}, [0.0]
        gated = [m for m in model.modules() if isinstance(m, LAYERS)] if self.fisher else []
        for module in gated:
            spatial = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)
            channels = module.weight.shape[0]
            gate = torch.ones(channels, *(1 for _ in range(spatial)), dtype=torch.float64, device=module.weight.device)
            module.register_parameter(GATE, nn.Parameter(gate))
            module.register_forward_hook(_gated)
        names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}

        def take(module: nn.Module) -> None:
            for p in module.parameters(recurse=False):
                rows = getattr(p, px.BatchGrad.savefield, None)
                if rows is None:
                    continue
                delattr(p, px.BatchGrad.savefield)
                name = names[id(p)]
                finite(f"an individual gradient of {name}", rows)
                if name.endswith(GATE):
                    total[0] += float(rows.square().mean(0).sum()) / 2
                else:
                    moments[name] = Moments.of(rows)

        px.extend(model)
        loss_fn = px.extend(copy.deepcopy(self.loss_fn))
        with px.backpack(px.BatchGrad(), extension_hook=take, scale="sample", grad=False):
            loss = loss_fn(model(self.x), self.y)
            if not isinstance(loss, Tensor) or loss.dim():
                what = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
                raise px.PackextError(
                    f'{type(self.loss_fn).__name__} gave {what}: use reduction="mean" or "sum", so that it is a scalar.'
                )
            finite("the loss", loss)
            if loss.grad_fn is None:
                raise px.PackextError("The loss depends on no parameter that requires grad.")
            loss.backward()
        for module in model.modules():
            take(module)
        zero = {k: torch.zeros_like(p) for k, p in self.trained.items() if k not in moments}
        moments |= {name: Moments(z, z, z, z) for name, z in zero.items()}  # what the loss does not reach
        return {name: moments[name] for name in self.trained}, total[0]

    @functools.cached_property
    def outputs(self) -> tuple[Tensor, Tensor | None]:
        """Of the sum of each sample's outputs: the Gram matrix of gradients by the weights, and gradients by x.

        One extended backward pass gives both. `[N, N]`, and `[N, D]` (None for inputs that are not floating).

        Raises:
            Undefined: if the output is no tensor `[N, ...]`, depends on nothing that is trained, or no weight is.
        """
        model = px.extend(copy.deepcopy(self.model))
        weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        if not weights:
            raise Undefined("No parameter with two axes or more requires grad: there is no kernel of weights.")
        x = self.x.clone().requires_grad_(self.x.is_floating_point())
        with px.backpack(px.BatchDotGrad(), parameters=weights, attach=False, grad=False) as results:
            _total(model(x), len(x)).backward()
        gram = results.batch_dot
        finite("the Gram matrix of the outputs' gradients", gram, Undefined)
        return gram, None if x.grad is None else x.grad.flatten(1)

    @functools.cached_property
    def codes(self) -> Tensor:
        """Which ReLUs each sample switches on: `[N, units]`, 0 or 1, from one forward pass.

        Raises:
            Undefined: if there is no ReLU, or one whose samples are not along its first axis.
        """
        seen: list[Tensor] = []
        with torch.no_grad(), _Codes(seen):
            self.model(self.x)
        if not seen or any(len(code) != len(self.x) for code in seen):
            raise Undefined(
                f"NASWOT reads which ReLUs a sample switches on; in {type(self.model).__name__} there is "
                + ("a ReLU without the batch axis first." if seen else "no ReLU.")
            )
        return torch.cat([code.flatten(1) for code in seen], 1)

    @functools.cached_property
    def flops(self) -> float:
        """Of a forward pass of one sample, a multiplication and an addition as two; products and convolutions only."""
        # The counter does not know torch's fused attention on CPUs, nor the fused layers that nn.MultiheadAttention and
        # nn.TransformerEncoderLayer take in evaluation mode, unless there is a function mode.
        with (
            torch.no_grad(), BaseTorchFunctionMode(), sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter,
        ):  # fmt: skip
            self.model(self.x)
        return counter.get_total_flops() / len(self.x)

    @functools.cached_property
    def paths(self) -> dict[str, Tensor]:
        """Of every weight W that entry's share W * dR/dW of the paths' sum R, without normalisations.

        R is the sum of outputs for an input of ones, with |W| in place of all parameters.

        Raises:
            Undefined: if x is not floating, the output no tensor `[1, ...]`, or a share negative or not finite.
        """
        model = copy.deepcopy(self.model)
        for path, module in list(model.named_modules(remove_duplicate=False)):  # one may stand in several places
            if isinstance(module, NORMS):
                if not path:
                    raise Undefined(f"SynFlow leaves normalisations out; {type(model).__name__} is nothing else.")
                parent, _, leaf = path.rpartition(".")
                setattr(model.get_submodule(parent), leaf, nn.Identity())
        model.eval()
        with torch.no_grad():
            for p in model.parameters():
                p.abs_()
        if not self.x.is_floating_point():
            raise Undefined(f"SynFlow sends ones through the model, in place of x of {self.x.dtype}.")
        _total(model(torch.ones_like(self.x[:1])), 1).backward()
        shares = {
            name: torch.zeros_like(p) if p.grad is None else p.detach() * p.grad
            for name, p in model.named_parameters()
            if p.requires_grad and p.dim() > 1
        }
        for name, share in shares.items():
            finite(f"SynFlow's share of {name}", share, Undefined)
            if share.min() < -1e-9 * share.abs().max():
                raise Undefined(
                    f"SynFlow: a path through {name} {list(share.shape)} counts less than nothing. It is defined for "
                    "networks of linear maps, ReLU and pooling; something else (a normalisation that is a function, "
                    "attention, GELU, a subtraction) is in the way."
                )
        return shares


def _total(output: Any, n: int) -> Tensor:
    """The sum of a model's outputs of n samples, which must be one tensor and depend on the parameters."""
    if not isinstance(output, Tensor) or output.dim() < 1 or len(output) != n:
        what = f"shape {list(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise Undefined(f"The output must be one tensor [N, ...] with N = {n}; it is {what}.")
    if output.grad_fn is None:
        raise Undefined("The output depends on no parameter that requires grad.")
    return output.sum()


def _gated(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * module.get_parameter(GATE)


class _Codes(TorchFunctionMode):
    """Notes the signs of what ReLUs receive."""

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RELU:
            x = args[0] if args else (kwargs or {})["input"]
            self.seen.append((x > 0).double())
        return func(*args, **(kwargs or {}))


def finite(what: str, value: Tensor, error: type[px.PackextError] = px.PackextError) -> None:
    """Refuse NaN and infinity.

    Args:
        what: name of the value.
        value: any tensor.
        error: the class to raise if an entry is not finite.
    """
    if not value.isfinite().all():
        raise error(f"{what}, of shape {list(value.shape)}, is not finite: no proxy can be read off it.")
