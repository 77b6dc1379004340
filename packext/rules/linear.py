"""Linear maps: `F.linear`, and products of matrices in which one factor is made of parameters."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packext._factored import Dense, Factored, Outer, Pulled, Terms, accumulation_dtype
from packext._precision import computes_in
from packext._shards import is_distributed
from packext._taps import OwnedRule
from packext._use import Gradients, Layouts, Rule, Use
from packext.rules._common import bind, handles

if TYPE_CHECKING:
    from packext._lineage import Tracer


class Linear(OwnedRule):
    """`y[..., O] = x[..., I] weight[O, I]ᵀ + bias`; the weight may be stored transposed."""

    name = "linear"
    positionwise = stacks = True

    def bias_axis(self, use: Use) -> int | None:
        return 0 if use.consts["transposed"] else 1

    def spares(self, use: Use) -> tuple[str, ...]:
        if "weight" not in use.sources:
            return "bias", "input"
        return ("bias", "weight") if "input" in use.still and "weight" in use.direct else ("bias",)

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Tensor:
        x, w, b = tensors["input"], tensors["weight"], tensors.get("bias")
        w = w.t() if use.consts["transposed"] else w
        dtype = x.dtype
        return F.linear(x, w if w.dtype is dtype else w.to(dtype), b if b is None or b.dtype is dtype else b.to(dtype))

    def gradients(self, use: Use, t: dict[str, Tensor], g: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        transposed = use.consts["transposed"]
        found: dict[str, Tensor] = {}
        flat = _rows(g)  # once, as it may be a copy
        if "input" in wanted:
            w = t["weight"].to(g.dtype)
            x = t["input"]
            found["input"] = (flat @ (w.t() if transposed else w)).view(x.shape).to(x.dtype)
        if "weight" in wanted:
            x = _rows(t["input"]).to(g.dtype)
            w = t["weight"]
            # In the order of torch, which the last bits depend on.
            turned = w.stride() == ((1, w.shape[0]) if transposed else (w.shape[1], 1))
            grad = flat.t() @ x if turned else x.t() @ flat
            found["weight"] = (grad.t() if turned == transposed else grad).to(w.dtype)
        if "bias" in wanted:
            found["bias"] = flat.sum(0).to(t["bias"].dtype)
        return found

    def back(self, use: Use, t: dict[str, Tensor]) -> tuple[Callable[..., Any], dict[str, Any]]:
        return F.linear, {"transposed": not use.consts["transposed"], "turned": not use.consts.get("turned")}

    def factors(self, use: Use, t: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored] | None:
        g, layout = gs[0], layouts[0]
        assert g is not None and layout is not None
        lead = g.dim() - 1
        if not layout.fits(g, lead):
            return None
        gs_ = layout.split(g, lead)  # [N, S, O]
        count, own = layout.positions(g, lead), functools.partial(layout.own, g.shape[:lead])
        forms: dict[str, Factored] = {}
        terms = Terms(gs_.mT[:, None])
        if "weight" in use.sources:
            xs = layout.split(t["input"], lead)  # [N, S, I]
            if use.consts["transposed"]:
                a, g_, stored, same = gs_[:, None], xs.mT[:, None], _stored(use, "IO"), None
            else:
                a, g_, stored, same = xs[:, None], terms.g, _stored(use, "OI"), terms
            shape = t["weight"].shape
            forms["weight"] = Outer(a, g_, shape, terms=same, stored=stored, positions=count, own=own)
        if "bias" in use.sources:
            forms["bias"] = Dense(gs_.sum(1, dtype=accumulation_dtype(g.dtype)), terms)
        return forms


def _rows(t: Tensor) -> Tensor:
    """`[..., F]` as a matrix; a single vector is a row."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])  # which torch.vmap knows, as it does not `flatten`


def _stored(use: Use, order: str) -> str:
    """The order of a weight's axes, in a second use that of the first, so that their forms are joined."""
    return order[::-1] if use.consts.get("turned") else order


LINEAR = Linear()


@handles(F.linear)
def linear(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`F.linear(input, weight, bias)`."""
    tensors, _ = bind(("input", "weight", "bias"), args, kwargs)
    if is_distributed(tensors["weight"]):
        from packext.rules.parallel import linear_of_parts  # which is made of what is here

        return linear_of_parts(tracer, func, tensors)
    w, b = tensors["weight"], tensors.get("bias")
    if w.dim() != 2 or not tracer.is_data(tensors["input"]):
        return NotImplemented
    if b is not None and b.shape != w.shape[:1] and computes_in((w, b)):  # which torch broadcasts
        with tracer:
            y = F.linear(tensors["input"], w)
            return y + b.to(y.dtype).expand_as(y)
    return tracer.owned(LINEAR, func, tensors, {"transposed": False})


@handles(torch.addmm, Tensor.addmm)
def addmm(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`bias + mat1 @ mat2`, the linear layer of GPT-2 with a transposed weight."""
    tensors, consts = bind(("input", "mat1", "mat2"), args, kwargs)
    if consts or len(tensors) != 3:
        return NotImplemented
    b, x, w = tensors["input"], tensors["mat1"], tensors["mat2"]
    if not (tracer.sources(w) and tracer.is_data(x)) or b.dim() != 1 or b.shape[0] != w.shape[1]:
        return NotImplemented
    return tracer.owned(LINEAR, func, {"input": x, "weight": w, "bias": b}, {"transposed": True})


@handles(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def matmul(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`x @ w` is a linear layer with a transposed weight; other products go the way of einsum."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    x, w = args
    if tracer.sources(w) and tracer.is_data(x) and w.dim() == 2 and x.dim() >= 2:
        return tracer.owned(LINEAR, func, {"input": x, "weight": w}, {"transposed": True})
    equation = _matmul_equation(x.dim(), w.dim())
    return NotImplemented if equation is None else contraction(tracer, func, equation, x, w, run=torch.matmul)


@handles(torch.bmm, Tensor.bmm)
def bmm(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """Batched products."""
    if len(args) != 2 or kwargs:
        return NotImplemented
    return contraction(tracer, func, "abc,acd->abd", *args, run=torch.bmm)


@handles(getattr(torch._VF, "einsum"))  # noqa: B009 - not in torch's stubs
def einsum(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """Einsum of two operands."""
    equation, operands = (
        args[0],
        args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:],
    )
    if len(operands) != 2:
        return NotImplemented
    return contraction(tracer, torch.einsum, equation, *operands, run=functools.partial(torch.einsum, equation))


def _matmul_equation(left: int, right: int) -> str | None:
    """Letters of a matrix product of factors with so many axes; None where one is a vector, or has too many."""
    if not 2 <= min(left, right) <= max(left, right) <= 10:
        return None
    batch = "abcdefgh"[: max(left, right) - 2]
    lefts, rights = batch[len(batch) - (left - 2) :], batch[len(batch) - (right - 2) :]
    return f"{lefts}xy,{rights}yz->{batch}xz"


def _letters(use: Use) -> list[str]:
    """Those of the data, of the parameter and of the result."""
    return use.consts["equation"].replace("->", ",").split(",")


class Contraction(Rule):
    """`einsum` of data and a parameter.

    Letters in all three are groups, those that the parameter shares with the data alone inputs, with the
    result alone outputs, and those of data and result are samples and positions.
    """

    name = "einsum"
    positionwise = True

    def call(self, use: Use, tensors: dict[str, Tensor]) -> Tensor:
        pair = (tensors["input"], tensors["weight"])
        return use.consts["run"](*(pair if use.consts["data first"] else pair[::-1]))

    def factors(self, use: Use, t: dict[str, Tensor], gs: Gradients, layouts: Layouts) -> dict[str, Factored] | None:
        g, layout = gs[0], layouts[0]
        assert g is not None and layout is not None
        x, w, result = _letters(use)
        shared = [c for c in result if c in x and c not in w]
        groups = [c for c in w if c in x and c in result]
        reads = [c for c in w if c in x and c not in result]
        writes = [c for c in w if c not in x]
        lead = len(shared)
        order = shared + groups + writes
        moved = g.permute([result.index(c) for c in order])
        if layout.axis is not None:
            layout = layout.at(order.index(result[layout.axis]))
        if not layout.fits(moved, lead):
            return None
        size = dict(zip(w, t["weight"].shape, strict=True))
        many = lambda letters: int(torch.Size([size[c] for c in letters]).numel())  # noqa: E731
        gs_ = layout.split(moved, lead)
        gs_ = gs_.reshape(*gs_.shape[:2], many(groups), many(writes)).permute(0, 2, 3, 1)
        data = t["input"]
        extra = [c for c in x if c not in shared and c not in w]
        data = data.permute([x.index(c) for c in shared + groups + reads + extra])
        if extra:
            data = data.sum(tuple(range(data.dim() - len(extra), data.dim())))
        xs = layout.split(data, lead)
        xs = xs.reshape(*xs.shape[:2], many(groups), many(reads)).transpose(1, 2)
        own = layout.positions(moved, lead)
        if groups + reads + writes == list(w):
            return {"weight": Outer(gs_.mT, xs.mT, t["weight"].shape, stored=_stored(use, "IO"), positions=own)}
        shape = [size[c] for c in groups + writes + reads]
        inner = Outer(xs, gs_, shape, stored=_stored(use, "OI"), positions=own)
        if groups + writes + reads == list(w):
            return {"weight": inner}
        back = [(groups + writes + reads).index(c) + 1 for c in w]
        return {"weight": Pulled(inner, t["weight"], lambda rows: rows.permute(0, *back))}


class OwnedContraction(Contraction, OwnedRule):
    """The same where the loss may be made of its derivative, which is an `einsum` as well.

    Every letter of the data is one of the weight or of the result.
    """

    def gradients(self, use: Use, t: dict[str, Tensor], g: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        x, w, result = _letters(use)
        found: dict[str, Tensor] = {}
        if "input" in wanted:
            found["input"] = torch.einsum(f"{result},{w}->{x}", g, t["weight"].to(g.dtype)).to(t["input"].dtype)
        if "weight" in wanted:
            found["weight"] = torch.einsum(f"{result},{x}->{w}", g, t["input"].to(g.dtype)).to(t["weight"].dtype)
        return found

    def back(self, use: Use, t: dict[str, Tensor]) -> tuple[Callable[..., Any], dict[str, Any]]:
        x, w, result = _letters(use)
        equation = f"{result},{w}->{x}"
        run = functools.partial(torch.einsum, equation)
        turned = not use.consts.get("turned")
        return torch.einsum, {"equation": equation, "run": run, "data first": True, "turned": turned}


CONTRACTION, OWNED_CONTRACTION = Contraction(), OwnedContraction()


def contraction(
    tracer: Tracer, func: Any, equation: str, x: Tensor, w: Tensor, run: Callable[[Tensor, Tensor], Tensor]
) -> Any:
    """Place the tap of an einsum of two operands, one of them made of parameters; `run` is the call as it was made."""
    equation = equation.replace(" ", "")
    if "->" not in equation:
        return NotImplemented
    inputs, result = equation.split("->")
    left, right = inputs.split(",")
    data_first = bool(tracer.sources(w)) or not tracer.sources(x)
    if not data_first:
        x, w, left, right = w, x, right, left
    letters_once = all(len(set(part)) == len(part) for part in (left, right, result))
    covered = all(c in left or c in result for c in right) and all(c in left or c in right for c in result)
    if not (letters_once and covered and tracer.is_data(x) and tracer.sources(w)):
        return NotImplemented
    if any(c in left and x.shape[left.index(c)] != w.shape[right.index(c)] for c in right):
        return NotImplemented
    consts = {"equation": f"{left},{right}->{result}", "run": run, "data first": data_first}
    if tracer.has_slope(x) and all(c in right or c in result for c in left):
        return tracer.owned(OWNED_CONTRACTION, func, {"input": x, "weight": w}, consts)
    return tracer.observed(CONTRACTION, func, {"input": x, "weight": w}, consts)


@handles(getattr(F, "linear_cross_entropy", None))
def linear_cross_entropy(tracer: Tracer, func: Any, args: Any, kwargs: Any) -> Any:
    """`F.linear_cross_entropy`, which is a linear map and a loss unless it is computed in chunks."""
    if kwargs.get("options") is None:
        return NotImplemented
    raise tracer.refuse(
        func,
        "with options=... it computes gradients in the forward pass, of all samples together",
        "Leave options out: then it is a linear map and a cross-entropy, as it is defined.",
    )
