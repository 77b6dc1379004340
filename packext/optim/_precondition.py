"""Parts that divide the gradient by a curvature: its diagonal, or Kronecker factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

import packext as px
from packext.optim import _lists as lists
from packext.optim._base import Optimizer, check
from packext.optim._merge import KFAC, KFLR, KFRA
from packext.optim._work import Part, Skip, Work


def _weights(work: Work, decay: float | None, counts: list[int]) -> list[float]:
    """Of what is new in an average of so many: of all steps alike (decay None), or exponential after a while."""
    work.set("batches", [c + 1 for c in counts])
    # Martens & Grosse (2015), section 5: the old estimate keeps min(1 - 1/k, decay).
    return [1 / (c + 1) if decay is None else 1 - min(1 - 1 / (c + 1), decay) for c in counts]


class Diagonal(Part):
    """`u / (c + damping + weight_decay)`, with c the average of a diagonal of the curvature."""

    keeps = ("batches", "diagonal")

    def __init__(
        self, curvature: str = "diag_ggn_mc", damping: float = 1e-2, decay: float | None = None, mc_samples: int = 1
    ) -> None:
        """Choose.

        Args:
            curvature: "diag_ggn_exact", "diag_ggn_mc" or "diag_ef".
            damping: added to it.
            decay: of the exponential average over steps; None: all steps count alike.
            mc_samples: draws for each sample, with "diag_ggn_mc".
        """
        check(type(self).__name__, "decay", decay)
        diagonal(curvature, mc_samples)  # refuses what is unknown
        super().__init__(damping=damping)
        self.curvature, self.decay, self.mc_samples = curvature, decay, mc_samples

    @property
    def kind(self) -> str:
        """With the curvature."""
        return f"{type(self).__name__} of {self.curvature}"

    def quantities(self, optimizer: Optimizer) -> Sequence[Any]:
        """The diagonal, at each step."""
        return [diagonal(self.curvature, self.mc_samples, optimizer.generator)]

    def __call__(self, work: Work) -> None:
        """Average and divide."""
        new = work.emitted(self.curvature)
        old = [n if o is None else o for o, n in zip(work.old("diagonal"), new, strict=True)]
        mean = lists.lerp(old, new, _weights(work, self.decay, work.old("batches", 0)))
        work.set("diagonal", mean)
        work.updates = lists.div(work.updates, lists.add(mean, damping_of(work)))


class Kronecker(Part):
    """`(B + damping)⁻¹ u (A + damping)⁻¹`, with the factors' averages and Martens and Grosse's split of the damping.

    A parameter with one factor gets all of the damping, each of two its root, balanced by the factors' mean eigenvalues
    (`px.linalg.kron_inv`). With `bias="joint"`, weight and bias are one matrix and belong into one group.
    """

    keeps = ("batches", "partner", "factors", "inverses", "rank")

    def __init__(
        self,
        curvature: str = "kfac",
        damping: float = 1e-2,
        decay: float | None = None,
        every: int = 1,
        inverses_every: int = 1,
        **options: Any,
    ) -> None:
        """Choose.

        Args:
            curvature: "kfac", "kflr" or "kfra".
            damping: of the whole block of a parameter; weight decay is added to it.
            decay: of the exponential average of the factors; None: all batches count alike.
            every: how many steps there are from one batch of factors to the next; none is emitted between.
            inverses_every: how many steps there are from one inversion to the next, after the first three batches.
            options: of `px.KFAC`: mc_samples, approx, fisher, bias.
        """
        _known(curvature, ("kfac", "kflr", "kfra"))
        check(type(self).__name__, "decay", decay)
        super().__init__(damping=damping)
        self.curvature, self.decay, self.options = curvature, decay, options
        self.every, self.inverses_every = interval(every), interval(inverses_every)
        self._make(None)  # refuses what is unknown

    @property
    def kind(self) -> str:
        """With the curvature; drawn and exact targets have factors with the same mean, others have not."""
        factors = self._make(None)
        other = [factors.approx, factors.root[0]] if factors.root[0] == "empirical" else [factors.approx]
        return f"{type(self).__name__} of {' '.join([self.curvature, *other])}"

    def _make(self, generator: torch.Generator | None) -> Any:
        if self.curvature == "kfac":
            return KFAC(generator=generator, **self.options)
        return KFLR(**self.options) if self.curvature == "kflr" else KFRA(**self.options)

    def due(self, optimizer: Optimizer) -> bool:
        """Whether the coming step needs new factors."""
        return optimizer.steps % self.every == 0 or optimizer.lacking

    def inverting(self, optimizer: Optimizer) -> bool:
        """Whether a step with new factors inverts them: with the first three batches, and every so many steps."""
        batches = max((optimizer.state.get(p, {}).get("batches", 0) for p in optimizer.preconditioned()), default=0)
        return optimizer.steps % self.inverses_every == 0 or batches < 3 or optimizer.lacking

    def quantities(self, optimizer: Optimizer) -> Sequence[Any]:
        """The factors, on steps that need them."""
        return [self._make(optimizer.generator)] if self.due(optimizer) else []

    def __call__(self, work: Work) -> None:
        """Average, invert, and multiply."""
        inverses, ranks = work.old("inverses"), work.old("rank")
        if self.due(work.optimizer):
            emitted = work.emitted(self.curvature)
            factors, ranks = averaged(work, emitted, self.decay), [rank_of(each) for each in emitted]
            if self.inverting(work.optimizer):
                inverses = inverted(work, factors)
            work.set("inverses", inverses)
            work.set("rank", ranks)
        has_all(work, inverses)
        # A weight decay is in the gradient by now, and of full rank.
        ranks = [None if g.get("weight_decay") else rank for g, rank in zip(work.groups, ranks, strict=True)]
        work.updates = multiply(work, work.updates, lambda k, matrix: apply(inverses[k], matrix, ranks[k]))


def has_all(work: Work, held: list[Any]) -> None:
    """Put the step off where a parameter has no curvature yet, or that of another block.

    That is where it has its first gradient between two batches of factors, and where one of a weight and a bias with
    one block was frozen or thawed there.

    Raises:
        Skip: that names it.
    """
    biases = _biases(work)
    weights = {j: weight for weight, (j, _) in biases.items()}
    for k, (p, each) in enumerate(zip(work.params, held, strict=True)):
        why = "has its first gradient"
        if each is not None:
            size = p.numel() + (work.params[biases[p][0]].numel() if p in biases else 0)
            if _entries(each) == size if each else k in weights and weights[k].requires_grad:
                continue
            why = "has a block of its own, or one with its bias, since one of them was frozen or thawed"
        work.optimizer.param_groups[0]["lacking"] = True
        raise Skip(f"{work.optimizer.name_of(p)} {why} between two batches of curvature; the next step has one")


def _entries(matrices: Sequence[Tensor]) -> int:
    """Of what is multiplied with these, one for each axis."""
    groups = max((len(m) for m in matrices if m.dim() == 3), default=1)
    return groups * math.prod(m.shape[-1] for m in matrices)


def same_shapes(one: Any, other: Any) -> bool:
    """Whether a list of matrices, or None, is as another."""
    return one is None or [m.shape for m in one] == [m.shape for m in other]


def matrices_of(work: Work, emitted: list[Any]) -> list[list[Tensor]]:
    """The Kronecker factors of each parameter; none for a bias that has one block with its weight, which is noted."""
    before = work.old("factors")
    where = {p: k for k, p in enumerate(q for g in work.optimizer.param_groups for q in g["params"])}
    partners, found = [], []
    for p, group, each, old in zip(work.params, work.groups, emitted, before, strict=True):
        if not isinstance(each, px.linalg.Joint):
            partners.append(None)
            found.append(each.matrices(old))
            continue
        if all(each.weight is not other for other in group["params"]):
            raise px.PackextError(
                f"{type(work.optimizer).__name__}: {work.optimizer.name_of(p)} has one block with its weight, "
                f'{work.optimizer.name_of(each.weight)}, in another group: put them into one, or bias="separate".'
            )
        partners.append((where[each.weight], each.axis))
        found.append([])
    work.set("partner", partners)
    return found


def averaged(work: Work, emitted: list[Any], decay: float | None) -> list[list[Tensor]]:
    """Averages of Kronecker factors with those of the state, which gets them; of other shapes they begin anew."""
    found, before = matrices_of(work, emitted), work.old("factors")
    same = [same_shapes(held, new) for held, new in zip(before, found, strict=True)]
    counts = [k if s else 0 for k, s in zip(work.old("batches", 0), same, strict=True)]
    mixed = [
        [torch.lerp(o, n, weight) for o, n in zip(held if held and s else new, new, strict=True)]
        for held, new, s, weight in zip(before, found, same, _weights(work, decay, counts), strict=True)
    ]
    work.set("factors", mixed)
    return mixed


def damping_of(work: Work) -> list[float]:
    """Damping plus weight decay, for each parameter."""
    return [g["damping"] + g.get("weight_decay", 0.0) for g in work.groups]


def inverted(work: Work, factors: list[Any]) -> list[Any]:
    """Inverses of damped factors."""
    damping = damping_of(work)

    def invert(k: int) -> list[Tensor]:
        return [m.contiguous() for m in px.linalg.kron_inv(factors[k], damping[k])]

    return shared(work, factors, invert, lambda k: _room(factors[k]))


def shared(
    work: Work, factors: list[Any], do: Callable[[int], list[Tensor]], room: Callable[[int], list[Tensor]]
) -> list[Any]:
    """Of each parameter with factors what `do` makes of them: each process a share, which it sends to the others.

    Args:
        work: the step.
        factors: of each parameter.
        do: gives tensors, from a parameter's index.
        room: gives tensors of the same shapes, to receive them.

    Returns:
        The tensors of each parameter; none for one without factors.
    """
    ranks, problem = work.optimizer.ranks, None
    owners = shares([sum(m.shape[-1] ** 3 for m in f if m.dim() > 1) for f in factors], ranks.size)
    made: list[Any] = [room(k) if f else [] for k, f in enumerate(factors)] if ranks.size > 1 else [[] for _ in factors]
    for k, p in enumerate(work.params):
        if owners[k] == ranks.rank and factors[k]:
            try:
                made[k] = do(k)
            except (px.PackextError, ValueError) as error:
                problem = problem or f"{type(work.optimizer).__name__}, {work.optimizer.name_of(p)}: {error}"
    ranks.agree(problem)
    for k, owner in enumerate(owners if ranks.size > 1 else ()):
        ranks.spread(made[k], owner)
    return made


def _room(factors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in the shapes that `px.linalg.kron_inv` gives: all have groups where one has."""
    groups = max((len(m) for m in factors if m.dim() == 3), default=1)
    return [m.new_empty(groups, *m.shape[-2:]) if groups > 1 else torch.empty_like(m) for m in factors]


def shares(costs: Sequence[int], size: int) -> list[int]:
    """Who of so many does which: the costliest first, each to whom has least so far."""
    owners, load = [0] * len(costs), [0] * size
    for k in sorted(range(len(costs)), key=lambda k: -costs[k]):
        owners[k] = min(range(size), key=load.__getitem__)
        load[owners[k]] += costs[k]
    return owners


def multiply(work: Work, vectors: list[Tensor], by: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """Of a vector for each parameter `by(k, vector)`; of a weight and its bias with one block, as one matrix."""
    biases = _biases(work)
    joined = {j for j, _ in biases.values()}
    out = list(vectors)
    for k, p in enumerate(work.params):
        if p in biases:
            j, axis = biases.pop(p)
            joint = px.linalg.Joint(p, axis)
            out[k], out[j] = joint.split(by(k, joint.join(vectors[k], vectors[j])))
        elif k not in joined:
            out[k] = by(k, vectors[k])
    for j, _ in biases.values():
        raise px.PackextError(
            f"{type(work.optimizer).__name__}: {work.optimizer.name_of(work.params[j])} has one block with its weight, "
            'which has no gradient. Take bias="separate".'
        )
    return out


def _biases(work: Work) -> dict[Tensor, tuple[int, int]]:
    """By weight, the place of the bias that has one block with it, and the axis along which it is one row more."""
    params = [p for g in work.optimizer.param_groups for p in g["params"]]
    partners = [new.get("partner", old) for new, old in zip(work.new, work.old("partner"), strict=True)]
    return {params[found[0]]: (k, found[1]) for k, found in enumerate(partners) if found is not None}


def apply(matrices: Sequence[Tensor], x: Tensor, rank: int | None = None) -> Tensor:
    """As `px.linalg.kron_matvec` of one vector; two plain matrices by two products.

    Args:
        matrices: of each axis.
        x: the vector.
        rank: that it has at most as a matrix, by all that is known.

    Returns:
        The product, in the shape of x.
    """
    if len(matrices) == 2 and all(m.dim() == 2 for m in matrices):
        left, right = matrices
        matrix = x.reshape(left.shape[-1], -1)
        if matrix.shape[1] == right.shape[-1]:
            matrix = matrix.to(right.dtype)
            found = None if rank is None else _by_range(left, matrix, right, rank)
            return (left @ (matrix @ right.mT) if found is None else found).reshape(x.shape)
    return px.linalg.kron_matvec(matrices, x)


#: Random vectors beyond the rank, so that a basis of the range is well conditioned.
BEYOND = 8


def _by_range(left: Tensor, matrix: Tensor, right: Tensor, rank: int) -> Tensor | None:
    """`left @ matrix @ right.mT` of a matrix of low rank, by an orthonormal basis of its range.

    The gradient of a linear map without positions has no higher rank than there are samples. The basis is that of the
    range of random combinations of the columns (Halko, Martinsson & Tropp 2011, arXiv:0909.4061, algorithm 4.1); one
    combination more tells whether it holds all of the matrix, whatever has become of the gradient.

    Returns:
        None where the matrix has another rank, or this takes more than half of what plain products do. An accelerator
        is not asked, which would make the host wait.
    """
    (o, i), r = matrix.shape, rank + BEYOND
    if matrix.device.type != "cpu" or 2 * r * (o * o + i * i + 3 * o * i) > o * i * (o + i):
        return None
    generator = torch.Generator().manual_seed(0)
    mixed = matrix @ torch.randn(i, r + 1, generator=generator, dtype=matrix.dtype)
    basis, probe = torch.linalg.qr(mixed[:, :r])[0], mixed[:, r]
    beside = probe - basis @ (basis.mT @ probe)
    if not bool(beside.norm() <= 64 * torch.finfo(matrix.dtype).eps * probe.norm()):
        return None
    return (left @ basis) @ ((basis.mT @ matrix) @ right.mT)


def rank_of(emitted: Any) -> int | None:
    """The rank that a weight's gradient has at most, from its factors: how many outer products it is the sum of."""
    pairs = () if isinstance(emitted, px.linalg.Joint) else emitted.pairs
    if len(pairs) != 1 or pairs[0].inputs is None or pairs[0].samples is not None:  # "reduce" counts no positions
        return None
    terms = torch.as_tensor(pairs[0].terms)
    return math.ceil(terms.item()) if terms.numel() == 1 and terms.device.type == "cpu" else None


def diagonal(curvature: str, mc_samples: int, generator: torch.Generator | None = None) -> Any:
    """The quantity of a diagonal of the curvature; a ValueError refuses a choice that is none.

    Args:
        curvature: "diag_ggn_exact", "diag_ggn_mc" or "diag_ef".
        mc_samples: draws for each sample, with "diag_ggn_mc".
        generator: of the draws.

    Returns:
        The quantity.
    """
    _known(curvature, ("diag_ggn_exact", "diag_ggn_mc", "diag_ef"))
    if curvature == "diag_ggn_mc":
        return px.DiagGGNMC(mc_samples, generator)
    return px.DiagGGNExact() if curvature == "diag_ggn_exact" else px.DiagEF()


def _known(curvature: str, choices: tuple[str, ...]) -> None:
    if curvature not in choices:
        raise ValueError(f"curvature must be one of {', '.join(choices)}, got {curvature!r}.")


def interval(every: int) -> int:
    """The number of steps that is given.

    Returns:
        The same.

    Raises:
        ValueError: if it is no int of 1 or more.
    """
    if isinstance(every, bool) or not isinstance(every, Integral) or every < 1:
        raise ValueError(f"an interval (`every` and its like) must be an int of 1 or more steps, got {every!r}.")
    return int(every)
