"""Roots of the Hessian of a loss with respect to its first argument, the model's output.

A root comes as cotangents of the output's shape. Each holds one column for every sample at once: row n of cotangent v
is column v of sample n's root, and the sum over v of `s_v[n] s_v[n]ᵀ` is the block `[D, D]` of sample n, D entries of
the output per sample. Samples lie along axis 0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from packext import _scratch
from packext._errors import CoupledSamplesError, PackextError
from packext._graph import inputs_first, name_of
from packext._layout import digits
from packext._precision import unrounded

#: The most entries of an output per sample for which a loss without a closed form gets its blocks `[N, D, D]`.
LARGEST = 4096

_SPLIT = (
    "the GGN is split between the network and a loss that is linear in its input, whose Hessian is zero. Let the model "
    "return the logits, and use CrossEntropyLoss on them instead. (It takes class probabilities as well. NLLLoss and "
    "KLDivLoss of what log_softmax gives along axis 1 are taken for it, but for KLDivLoss with reduction='none'.)"
)


class Call(NamedTuple):
    """Of a loss: `loss(output, *args, **kwargs)`.

    Attributes:
        loss: the loss module; its hooks are not run.
        output: what it was called with first, `[N, ...]`.
        args: its other positional arguments.
        kwargs: its keyword arguments.
        g: the gradient at what it returned: a scalar, or of the loss's shape for reduction "none".
    """

    loss: nn.Module
    output: Tensor
    args: tuple
    kwargs: dict
    g: Tensor

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.loss._get_name()} of an output {list(self.output.shape)}"


class _Flat(Exception):
    """The Hessian of a loss is zero: it has no root, and adds nothing to the Hessian with respect to parameters."""


#: Losses whose Hessian is zero wherever it exists, and what to do about it.
LINEAR: dict[type[nn.Module], str] = {
    nn.NLLLoss: _SPLIT,
    nn.KLDivLoss: _SPLIT,
    nn.L1Loss: "it is piecewise linear, so that its Hessian is zero. Use HuberLoss, SmoothL1Loss or MSELoss.",
}

_ZERO = "{} is linear in its first argument here: its Hessian is zero. Use a loss with curvature."


def of_logits(loss: nn.Module, output: Any, args: tuple, kwargs: dict) -> tuple[nn.Module, tuple, dict]:
    """The call of a loss at which the GGN is split: of `CrossEntropyLoss` for losses that take log-probabilities.

    Where p = exp(x) sums to one, `NLLLoss` gives the same, as softmax(x) is p, and `KLDivLoss` the same of its targets
    as class probabilities, less a constant; but both are linear in x. The Hessian `diag(p) - p pᵀ` in x is the one in
    logits, too: with J = I - 1 pᵀ, the Jacobian of log_softmax, `Jᵀ H J = H`.

    Args:
        loss: the loss module.
        output: what it was called with first.
        args: its other positional arguments.
        kwargs: its keyword arguments.

    Returns:
        The loss and its other arguments; as they are, if it is another one, if its input is none of log-probabilities
        along axis 1, and for `KLDivLoss` with reduction "none", where other gradients may arrive at a sample's classes.
    """
    kind, of = _kind(loss), cast(Any, loss)
    if kind not in (nn.NLLLoss, nn.KLDivLoss) or not isinstance(output, Tensor) or output.dim() < 2:
        return loss, args, kwargs
    away = _widened(output.detach()).logsumexp(1).abs()
    if (away >= torch.finfo(output.dtype).eps ** 0.5).any():  # NaN, of a step that overflows, is NaN of either
        return loss, args, kwargs
    if kind is nn.NLLLoss:
        same = nn.CrossEntropyLoss(weight=of.weight, ignore_index=of.ignore_index, reduction=of.reduction)
        return same, args, kwargs
    target = _widened(args[0] if args else kwargs["target"])
    divisor = {"sum": 1, "batchmean": len(output), "mean": output.numel()}.get(of.reduction)
    if divisor is None or target.shape != output.shape or target.requires_grad:
        return loss, args, kwargs
    return nn.CrossEntropyLoss(reduction="sum"), ((target.exp() if of.log_target else target) / divisor,), {}


def exact(call: Call, compact: bool = False) -> Iterator[Tensor]:
    """Cotangents whose sum of outer products is the Hessian of `sum(g * loss(output, *args, **kwargs))`.

    Args:
        call: of the loss.
        compact: as few columns as the rank allows: for `CrossEntropyLoss`, C - 1 per position in place of C; for a
            loss without a closed form those of eigenvectors, in place of one for each entry of an output.

    Returns:
        The columns, one after the other. Refusals are raised by the call, before the first of them.
    """
    with _refused():
        return _columns(call, compact)


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except _Flat as flat:
        raise PackextError(str(flat)) from None


def _columns(call: Call, compact: bool, part: bool = False) -> Iterator[Tensor]:
    """As `exact`; with `part`, what is negative of an indefinite Hessian is left out, in place of being refused."""
    call, output = _ready(call), call.output
    kind = _kind(call.loss)
    if kind is nn.CrossEntropyLoss:
        p, c = _softmax(call, *call.args, **call.kwargs)
        found = _softmax_columns(p, _positive(call, c, part), compact)
    elif kind is not None:
        c = _entries(DIAGONAL[kind], call, *call.args, **call.kwargs)
        found = _diagonal_columns(_positive(call, c, part).sqrt().reshape(len(c), -1))
    else:
        found = iter(_blocks_root(call, part, not compact).unbind(2))
    return (s.reshape(output.shape).to(output.dtype) for s in found)


def signed(call: Call) -> Iterator[tuple[Tensor, float]]:
    """Cotangents with signs, whose outer products times these add up to the Hessian, be it convex or not.

    Returns:
        Columns that are not zero, with 1.0 or -1.0; one column of zeros for a Hessian that is zero. Refusals are raised
        by the call, before the first of them.
    """
    found = []
    for sign in (1.0, -1.0):  # what is negative of a Hessian is positive of that of the loss's negative
        with contextlib.suppress(_Flat):
            found.append((sign, _columns(call._replace(g=sign * call.g), True, True)))

    def columns() -> Iterator[tuple[Tensor, float]]:
        some = False
        for sign, part in found:
            for s in part:
                if s.any():
                    some = True
                    yield s, sign
        if not some:
            yield torch.zeros_like(call.output), 1.0

    return columns()


def sampled(call: Call, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Cotangents, `draws` of them, whose expected sum of outer products is the Hessian that `exact` gives.

    They are gradients for labels drawn from the model's predictive distribution where the loss is the negative
    logarithm of one (`CrossEntropyLoss`, `BCEWithLogitsLoss`, `MSELoss`, `GaussianNLLLoss`), and otherwise the columns
    of the exact root, summed with random signs.

    Args:
        call: of the loss.
        draws: how many cotangents.
        generator: where all random numbers come from, drawn on its own device while the iterator advances.

    Returns:
        The cotangents, one after the other. Refusals are raised by the call, before the first of them.

    Raises:
        PackextError: if `draws` is less than 1, or where `exact` raises it.
    """
    if draws < 1:
        raise PackextError(f"{call.name}: a sampled root needs at least 1 draw, got {draws}.")
    with _refused():
        draw = _sampler(_ready(call), generator)
    return _drawn(draw, draws, call.output.shape, call.output.dtype)


def _drawn(draw: Callable[[], Tensor], draws: int, shape: torch.Size, dtype: torch.dtype) -> Iterator[Tensor]:
    for left in reversed(range(draws)):
        column = (draw() / math.sqrt(draws)).reshape(shape).to(dtype)
        if not left:
            del draw  # and its tables: what follows is a pass with all activations alive
        yield column


def _sampler(call: Call, numbers: torch.Generator) -> Callable[[], Tensor]:
    """What gives a random cotangent at each call; the expected outer product is the Hessian."""
    kind, x = _kind(call.loss), call.output
    if kind is nn.CrossEntropyLoss:
        p, c = _softmax(call, *call.args, **call.kwargs)
        root, minus = _positive(call, c).sqrt()[:, None], -torch.ones_like(p[:, :1])
        reached = p.movedim(1, -1).clone(memory_format=torch.contiguous_format).double().cumsum_(-1)

        def softmax() -> Tensor:
            u = _uniform(c.shape, numbers, c.device)[..., None] * reached[..., -1:]
            y = torch.searchsorted(reached, u, right=True).clamp(max=p.shape[1] - 1)
            return root * p.scatter_add(1, y.movedim(-1, 1), minus)

        return softmax
    if kind is nn.BCEWithLogitsLoss:
        c = _entries(_bernoulli_weight, call, *call.args, **call.kwargs)
        p, root = x.sigmoid(), _positive(call, c).sqrt()
        return lambda: root * (p - (_uniform(x.shape, numbers, x.device) < p).to(x.dtype))
    if kind is not None:
        root = _positive(call, _entries(DIAGONAL[kind], call, *call.args, **call.kwargs)).sqrt()
        normal = kind in (nn.MSELoss, nn.GaussianNLLLoss)
        return lambda: root * (_normal if normal else _signs)(root.shape, numbers, root)
    roots = _blocks_root(call)
    return lambda: (roots * _signs((len(roots), 1, roots.shape[2]), numbers, roots)).sum(2)


def closed(loss: nn.Module) -> bool:
    """Whether the roots of a loss are a formula, which can be differentiated: that of its eigenvectors cannot."""
    return _kind(loss) is not None


def _kind(loss: nn.Module) -> type[nn.Module] | None:
    """The loss of torch whose `forward` this one runs, if it is one that is known here."""
    if "forward" in vars(loss):
        return None
    kinds = (nn.CrossEntropyLoss, *DIAGONAL, *LINEAR)
    return next((k for k in kinds if isinstance(loss, k) and type(loss).forward is k.forward), None)


def _ready(call: Call) -> Call:
    """With output and gradient of float32 at least, without a graph where none is made; refuses what has no root."""
    output, name = call.output, call.name
    if output.dim() == 0 or output.numel() == 0 or not output.is_floating_point():
        raise PackextError(f"{name} of {output.dtype}: pass real numbers, with one sample or more along axis 0.")
    refuse_arguments(name, call.args, call.kwargs)
    if why := _linear(call.loss):
        raise _Flat(f"{name} has no root of a Hessian: {why}")
    x = _widened(output if torch.is_grad_enabled() else output.detach())
    return call._replace(output=x, g=call.g.detach().to(x.dtype))


def _linear(loss: Any) -> str:
    """Why a loss has a Hessian of zero wherever it exists, and what to do about it; nothing if it has not."""
    kind = _kind(loss)
    if kind is nn.SmoothL1Loss and loss.beta == 0:
        return f"with beta=0 {LINEAR[nn.L1Loss]}"
    return LINEAR.get(kind, "") if kind else ""


def refuse_flat(loss: nn.Module, name: str, product: Callable[[], Sequence[Tensor]]) -> None:
    """Refuse a loss of which `exact` and `sampled` say that its Hessian is zero.

    Args:
        loss: the loss module.
        name: of the loss, for the message.
        product: gives products with the Hessian of random vectors.

    Raises:
        PackextError: if it is zero.
    """
    if why := _linear(loss):
        raise PackextError(f"{name} has no GGN: {why}")
    if _kind(loss) is None and not any(t.any() for t in product()):
        raise PackextError(_ZERO.format(name))


def refuse_arguments(name: str, args: tuple, kwargs: dict) -> None:
    """Refuse other arguments of a loss through which the model may pass, too."""
    given = [*args, *kwargs.values()]
    for t in given if all(isinstance(t, Tensor) for t in given) else pytree.tree_leaves(given):
        if isinstance(t, Tensor) and t.requires_grad:
            raise PackextError(
                f"{name} has another argument, {list(t.shape)}, that requires grad. Only the Hessian in the first "
                "argument is known. Pass .detach() of the other one if it should be a constant, or both as a tuple: "
                "the first argument of an nn.Module of your own with an attribute `reduction`."
            )


def _widened(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32)) if t.is_floating_point() else t


def widened(tree: Any) -> Any:
    """The same structure, with its tensors of real numbers in float32 or better."""
    return pytree.tree_map(lambda t: _widened(t) if isinstance(t, Tensor) else t, tree)


@contextlib.contextmanager
def wide(loss: nn.Module, device: torch.device) -> Iterator[None]:
    """In here `loss` computes with what is `widened`: its own tensors are, too, and autocast rounds nothing."""
    held = [
        (tensors, key, t)
        for module in loss.modules()
        for tensors in (module._buffers, vars(module))
        for key, t in tensors.items()
        if isinstance(t, Tensor) and t.dtype != _widened(t).dtype
    ]
    try:
        for tensors, key, t in held:
            tensors[key] = _widened(t)
        with unrounded(device.type):
            yield
    finally:
        for tensors, key, t in held:
            tensors[key] = t


def _uniform(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64).to(device)


def _normal(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def _signs(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randint(2, shape, generator=generator, device=generator.device).to(like) * 2 - 1


def _weighted(call: Call, h: Tensor, total: Tensor | int) -> Tensor:
    """Weights `h` of the loss's entries, times what arrives at each of them: `total` divides those of a mean."""
    reduction, g, name = cast(Any, call.loss).reduction, call.g, call.name
    if reduction not in ("mean", "sum", "none"):
        raise PackextError(f"{name} has reduction={reduction!r}. Use 'mean', 'sum' or 'none'.")
    if g.shape != (h.shape if reduction == "none" else ()):
        raise PackextError(
            f"{name} with reduction={reduction!r} received a gradient {list(g.shape)}, where one of "
            f"{list(h.shape) if reduction == 'none' else []} belongs. Call backward on a value made of this loss alone."
        )
    c = h * (g / total if reduction == "mean" else g)
    # 0/0 if all targets are ignored; and of a zero no root has a derivative, where nothing arrives.
    return c.masked_fill((h == 0) | (c == 0), 0)


def _positive(call: Call, c: Tensor, part: bool = False) -> Tensor:
    """What `_weighted` gave, with what is negative of it refused, or left out."""
    if part:
        return c.clamp(min=0)
    if (c < 0).any():
        which = "a negative gradient arrives at it" if (call.g < 0).any() else "a weight or target of it is negative"
        raise PackextError(
            f"{call.name} has a negative Hessian, which has no real root: {which}. Minimise a positive multiple "
            "of the loss, or use quantities that need no root of the Hessian."
        )
    return c


# -- diagonal Hessians ------------------------------------------------------------------------------------


def _entries(rule: Callable[..., Tensor], call: Call, target: Tensor, *more: Any, **named: Any) -> Tensor:
    """What `rule` gives for every entry of the output, weighted by gradient and reduction, `[*x.shape]`."""
    x, target = call.output, target.to(call.output.dtype)
    if torch.broadcast_shapes(x.shape, target.shape) == x.shape:
        h = rule(call.loss, x, target.expand(x.shape), *more, **named)
        if h.shape == x.shape:
            return _weighted(call, h, x.numel())
    raise PackextError(
        f"{call.name} with a target {list(target.shape)} and its weights broadcasts to more entries than the "
        "output has. Give them the output's shape."
    )


def _gaussian_nll(loss: Any, x: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
    v = torch.as_tensor(var, dtype=x.dtype, device=x.device).clamp(min=loss.eps)
    if v.shape == x.shape[:-1]:
        v = v[..., None]
    return torch.ones_like(x) / v


def _poisson_nll(loss: Any, x: Tensor, target: Tensor) -> Tensor:
    return x.exp() if loss.log_input else target / (x + loss.eps).square()


def _smooth_l1(loss: Any, x: Tensor, target: Tensor) -> Tensor:
    return ((x - target).abs() < loss.beta).to(x.dtype) / loss.beta


def _bernoulli_weight(loss: Any, x: Tensor, target: Tensor) -> Tensor:
    """What stands before `p (1 - p)`, which is the variance of a label drawn with probability p."""
    h = torch.ones_like(x) if loss.pos_weight is None else (loss.pos_weight.detach().to(x) - 1) * target + 1
    return h if loss.weight is None else h * loss.weight.detach().to(x)


#: Losses whose entries each depend on one entry of the output: their second derivatives, not reduced.
DIAGONAL: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.MSELoss: lambda loss, x, target: torch.full_like(x, 2),
    nn.BCEWithLogitsLoss: lambda loss, x, t: _bernoulli_weight(loss, x, t) * x.sigmoid() * (-x).sigmoid(),
    nn.GaussianNLLLoss: _gaussian_nll,
    nn.PoissonNLLLoss: _poisson_nll,
    nn.HuberLoss: lambda loss, x, target: ((x - target).abs() < loss.delta).to(x.dtype),
    nn.SmoothL1Loss: _smooth_l1,
}


def _diagonal_columns(root: Tensor) -> Iterator[Tensor]:
    for v in range(root.shape[1]):
        s = torch.zeros_like(root)
        s[:, v] = root[:, v]
        yield s


# -- softmax ----------------------------------------------------------------------------------------------


def _softmax(call: Call, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities p `[N, C, ...]` and the coefficient of `diag(p) - p pᵀ` at every position, `[N, ...]`."""
    loss, x = cast(Any, call.loss), call.output
    if x.dim() < 2:
        raise PackextError(f"{call.name} has no axis of samples. Use outputs [N, C] or [N, C, ...].")
    # The loss at a position is `-sum over c of t_c log p_c`, and the coefficient is the sum of the t_c, its `mass`.
    w, smooth = None if loss.weight is None else loss.weight.detach().to(x), loss.label_smoothing
    if target.shape == x.shape:  # probabilities
        t = ((1 - smooth) * target.to(x.dtype) + smooth / x.shape[1]).movedim(1, -1)
        mass = (t if w is None else t * w).sum(-1)  # not a matrix product, which autocast would round
        total: Tensor | int = mass.numel()
    else:
        ignored = target.eq(loss.ignore_index)
        own = x.new_ones(target.shape) if w is None else w[target.masked_fill(ignored, 0).long()]
        own = mass = own.masked_fill(ignored, 0)
        if smooth:
            mass = ((1 - smooth) * own + smooth * (1 if w is None else w.mean())).masked_fill(ignored, 0)
        total = own.sum()
    return x.softmax(1), _weighted(call, mass, total)


def _softmax_columns(p: Tensor, c: Tensor, compact: bool) -> Iterator[Tensor]:
    """Columns in BackPACK's order, classes before positions; each is non-zero at one position.

    With r = sqrt(p), a unit vector, `diag(p) - p pᵀ = diag(r) (I - r rᵀ) diag(r)`, and `I - r rᵀ` is its own square:
    the columns of `diag(r) (I - r rᵀ)` are a root, column v being `r_v (e_v - p)`.

    Compact: with e the unit vector of the most probable class k and u = r + e, of which |u|² = 2 (1 + r·e), the
    reflection `Q = I - 2 u uᵀ/|u|²` takes e to `e - u = -r`. As Q is orthogonal, `I - r rᵀ = Q Qᵀ - (Qe) (Qe)ᵀ` is the
    sum of the outer products of the other columns of Q, `q_v = e_v - u r_v/(1 + r·e)`. Hence `diag(r) q_v`, with the
    last class in the place of k. No entry is a difference of almost equal numbers, however small all other
    probabilities are.

    Args:
        p: probabilities, `[N, C, ...]`.
        c: coefficients, `[N, ...]`.
        compact: C - 1 columns per position in place of C, where C is more than 1.

    Yields:
        Cotangents `[N, C, positions]`.
    """
    p, root = p.reshape(*p.shape[:2], -1), c.reshape(len(c), 1, -1).sqrt()
    r = torch.where(p > 0, p, 1).sqrt() * (p > 0)  # whose derivative is finite, where one is wanted
    down, compact = p, compact and p.shape[1] > 1
    classes, most = torch.arange(p.shape[1], device=p.device), p.argmax(1, keepdim=True)
    if compact:
        largest = r.gather(1, most)
        down = torch.where(classes[:, None] == most, largest, p / (1 + largest))  # diag(r) u / (1 + r·e)
    step = max(1, _scratch.TILE // max(1, p.numel())) if p.shape[2] == 1 else 1  # small ones take calls, and no time
    for some in classes[: p.shape[1] - compact].split(step):
        for at in range(p.shape[2]):
            own = some.expand(len(p), -1)
            own = torch.where(most[:, :, at] == own, p.shape[1] - 1, own) if compact else own
            weight = r[:, :, at].gather(1, own) * root[:, :, at]
            of_own = (classes == own[:, :, None]).to(p)
            for column in (weight[:, :, None] * (of_own - down[:, None, :, at])).unbind(1):
                yield column[:, :, None] if p.shape[2] == 1 else torch.zeros_like(p).select_scatter(column, 2, at)


def from_most_likely(loss: nn.Module, x: Tensor, vector: Tensor) -> Tensor:
    """The vector, less its entry of the most probable class where the loss has a softmax.

    Args:
        loss: the loss module.
        x: what it is called with first.
        vector: of the shape of x.

    Returns:
        A vector that has the same product with the Hessian: a constant that is added for all classes is in the null
        space of `diag(p) - p pᵀ`. With it, that would be a difference of almost equal numbers where p is confident.
    """
    if _kind(loss) is not nn.CrossEntropyLoss or x.dim() < 2:
        return vector
    return vector - vector.gather(1, x.argmax(1, keepdim=True))


# -- any other loss ---------------------------------------------------------------------------------------


def _blocks_root(call: Call, part: bool = False, symmetric: bool = False) -> Tensor:
    """Roots `[N, D, V]` of the Hessian's blocks: largest eigenvalue first, V the largest rank; or symmetric ones."""
    x, g, name, eps = call.output, call.g, call.name, torch.finfo(call.output.dtype).eps
    with wide(call.loss, x.device):
        h = _blocks(call).double()
    largest = h.abs().max()
    if not largest.isfinite():
        raise PackextError(f"{name} has a Hessian that is not finite here. Compute it in a form that is smooth there.")
    tolerance = 1e-6 if x.dtype == torch.float64 else 1e-4
    if (h - h.mT).abs().max() > tolerance * largest:
        raise PackextError(
            f"{name} has second derivatives that are not symmetric. "
            "Correct the backward of the autograd function that it uses."
        )
    values, vectors = torch.linalg.eigh((h + h.mT) / 2)
    own = values.abs().amax(1, keepdim=True)
    if not part and (values < -tolerance * own - 100 * eps * own.max()).any():
        raise PackextError(
            f"{name} is not convex here: eigenvalues of its Hessian go from {values.min():.2e} to {values.max():.2e}, "
            f"with gradients from {g.min():.2e} to {g.max():.2e} arriving at it. It has no real root. "
            "Use a convex loss, or quantities that need no root of the Hessian."
        )
    root = vectors * values.clamp(min=0).sqrt()[:, None]
    if symmetric:
        return root @ vectors.mT
    return root[:, :, (values > values.shape[1] * eps * own).any(0)].flip(2)


def _blocks(call: Call) -> Tensor:
    """The Hessian's blocks, a product with one unit vector for all samples at a time.

    Returns:
        The blocks, `[N, D, D]`.

    Raises:
        CoupledSamplesError: if the loss is not a sum over the samples.
        PackextError: if the Hessian is zero, too large, or cannot be computed.
    """
    loss, x, args, kwargs, g = call
    n, d, name = len(x), x.shape[1:].numel(), call.name
    if d > LARGEST:
        raise PackextError(
            f"{name} has no closed form here, and its Hessian has {d} x {d} entries for each of {n} samples; up to "
            f"{LARGEST} x {LARGEST} are computed. Use a loss of torch, such as CrossEntropyLoss or MSELoss."
        )
    args, kwargs = widened((args, kwargs))
    before = _state(loss, x)
    with torch.enable_grad(), torch.random.fork_rng([x.device] if x.is_cuda else []):
        x = x.requires_grad_()
        try:
            value = loss.forward(x.clone(), *args, **kwargs)  # a clone, since it may write into it
        except RuntimeError as error:
            raise PackextError(f"{name} cannot be computed again, in {x.dtype}: {error}") from error
        changed = _state(loss, x) != before
    if changed:
        raise PackextError(f"{name} draws random numbers or changes its buffers: it cannot be computed a second time.")
    if not isinstance(value, Tensor) or value.shape != g.shape:
        what = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise PackextError(
            f"{name} returned {what}, and a gradient {list(g.shape)} arrived. Return one tensor, and call backward on "
            "a value made of it alone."
        )
    zero = _Flat(_ZERO.format(name))
    if not value.requires_grad:
        raise zero
    try:
        with torch.enable_grad():
            g = g.clone().requires_grad_()  # functions that can be differentiated once note it only if this does
            slope = torch.autograd.grad((g * value).sum(), x, create_graph=True, materialize_grads=True)[0]
        if not slope.requires_grad:
            raise zero
        if any(name_of(node) == "torch::autograd::Error" for node in inputs_first([slope.grad_fn])):
            raise PackextError(f"{name} cannot be differentiated twice: a part of it is differentiable once.")

        def times(v: Tensor) -> Tensor:
            rows = torch.autograd.grad(slope, x, v.reshape(x.shape), retain_graph=True, materialize_grads=True)[0]
            return rows.detach().reshape(n, d)

        # Any two samples differ in a binary digit of their index: each product with the samples whose digit is 1 must
        # leave the others alone.
        numbers = torch.Generator().manual_seed(0)
        for some in digits(n):
            some = some.to(x.device)
            rows = times(torch.rand(n, d, generator=numbers, dtype=x.dtype).to(x.device) * some[:, None])
            if rows[~some].abs().max() > (1e-6 if x.dtype == torch.float64 else 1e-3) * rows.abs().max():
                raise CoupledSamplesError(
                    f"{name} couples samples: it is not a sum or a mean over axis 0. Its Hessian has no blocks. "
                    "Use a loss that is one."
                )
        blocks = x.new_empty(n, d, d)
        for v in range(d):
            blocks[:, :, v] = times(F.one_hot(torch.full((n,), v, device=x.device), d).to(x.dtype))
    except PackextError:
        raise
    except RuntimeError as error:
        raise PackextError(f"{name} cannot be differentiated twice: {error}.") from error
    if not blocks.any():
        raise zero
    return blocks


def _state(loss: nn.Module, x: Tensor) -> Any:
    """What a second call of the loss must leave as it was."""
    numbers = torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()
    return numbers.numpy().tobytes(), [(id(b), b._version) for b in loss.buffers()]
