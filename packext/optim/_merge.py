"""What several backward passes and several processes give together: quantities of the loss that `.grad` is of.

Passes before a step add their losses up, as `.grad` adds their gradients; `DistributedDataParallel` takes the mean of
the processes' losses. Second moments of inputs are means over the positions of all samples; whatever carries the scale
of the loss is summed over passes, and averaged over processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import packext as px


@dataclass(frozen=True, eq=False)
class Factors:
    """Kronecker factors that can be merged.

    Attributes:
        pairs: what `px.KFAC` has absorbed: B with the scale of the loss, and A, a mean over `terms`, for each of the
            two ways in which a parameter may be stored.
        n: the number of samples.
    """

    pairs: list[Any]
    n: int

    def matrices(self, before: Sequence[Tensor] | None = None) -> list[Tensor]:
        """In the order of the parameter's axes, as `px.linalg` takes them.

        Args:
            before: those of earlier steps, of which blocks that no input met keep their A.

        Returns:
            One factor, or two.
        """
        found, first = px.KFAC.matrices(self.pairs), self.pairs[0]
        if before is None or [m.shape for m in before] != [m.shape for m in found]:
            return found
        if len(self.pairs) == 1 and first.inputs is not None:
            place, met = int(first.stored == "OI"), first.terms > 0
            if isinstance(met, Tensor):
                met = met[:, None, None] if len(first.outputs) > 1 and met.dim() else met
                found[place] = torch.where(met, found[place], before[place])
            elif not met:
                found[place] = before[place]
        return found


class _Counted:
    """Of a quantity of Kronecker factors: keeps the number of samples, and which factor is which."""

    def land(self: Any, held: Any, n: int, factor: float) -> Any:
        """The factors, of a Hessian times `factor`."""
        if isinstance(held, px.linalg.Joint):
            return held
        return Factors([self.sampled(pair.scaled(factor), n) for pair in held], n)


class KFAC(_Counted, px.KFAC):
    """`px.KFAC`, with results that can be merged over passes and processes: `Factors`, in `kfac`."""


class KFLR(_Counted, px.KFLR):
    """`px.KFLR`, with results that can be merged over passes and processes: `Factors`, in `kflr`."""


class KFRA(_Counted, px.KFRA):
    """`px.KFRA`, with results as of the others, `Factors`, in `kfra`.

    They cannot be merged: curvature is averaged over the samples of a pass at each layer, before the next one.
    """


class Count(px.BatchL2Grad):
    """How many samples there were, in `samples`; costs nothing."""

    savefield = "samples"

    def wants(self, form: Any) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def result(self, ask: Any) -> Any:
        """The number."""
        return ask.n


#: Results with the samples along this axis.
ROWS = {"grad_batch": 0, "sqrt_ggn_exact": 1, "sqrt_ggn_mc": 1}
#: Tensors that sum over samples, and the power in which the scale of the loss is in them.
SUMS = {"sum_grad_squared": 2, "diag_ggn_exact": 1, "diag_ggn_mc": 1, "diag_ef": 1, "diag_h": 1, "diag_h_mc": 1}


def received(field: str, value: Any) -> Any:
    """What of a result is kept, in a form that can be merged."""
    return value.value if field == "diag_h_mc" else value


def absent(field: str, like: Any, others: Iterable[dict[str, Any]]) -> Any:
    """What a parameter has of passes that did not reach it, but `others`: that of samples which contribute zeros."""
    joint = px.linalg.Joint
    shown = next((v for v in (values.get(field) for values in others) if v is not None and type(v) is not joint), None)
    if shown is None or isinstance(like, joint):
        return None
    if isinstance(like, Factors):
        return Factors([pair.absent(shown.n) for pair in like.pairs], shown.n)
    if isinstance(like, int):
        return shown
    if field not in ROWS:
        return None
    axis = ROWS[field]
    return like.new_zeros(*shown.shape[: axis + 1], *like.shape[axis + 1 :])


def _sum(one: Any, other: Any) -> Any:
    """The factors of two passes that are stored in the same way, as one."""
    return one.of_sums(a + b for a, b in zip(one.summands(), other.summands(), strict=True))


def joined(field: str, one: Any, other: Any) -> Any:
    """The results of two passes as one.

    Returns:
        The result of the sum of their losses; where one of them has none, the other.

    Raises:
        PackextError: for results that have no sum.
    """
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, px.linalg.Joint):
        return one
    if isinstance(one, px.linalg.KronEigh):
        return px.linalg.KronEigh(one.vectors, one.eigenvalues + other.eigenvalues)
    if field in ROWS:
        if ROWS[field]:  # losses of other numbers of outputs: a column of zeros adds nothing
            columns = max(len(one), len(other))
            one, other = (torch.cat([t, t.new_zeros(columns - len(t), *t.shape[1:])]) for t in (one, other))
        return torch.cat([one, other], ROWS[field])
    if field in SUMS or isinstance(one, int):
        return one + other
    if isinstance(one, Factors) and field != KFRA.savefield:
        here, there = ({pair.stored: pair for pair in each.pairs} for each in (one, other))
        pairs = []
        for stored in sorted({*here, *there}):
            a, b = here.get(stored) or there[stored].absent(one.n), there.get(stored) or here[stored].absent(other.n)
            pairs.append(_sum(a, b))
        return Factors(pairs, one.n + other.n)
    raise px.PackextError(f"{field} of several backward passes is not defined: take a step after each of them.")


def _count(value: Any) -> int:
    return value.n if isinstance(value, Factors) else value if isinstance(value, int) else 0


def _summands(field: str, value: Any, size: int) -> list[Tensor]:
    """Tensors whose sums over the processes `_merged` makes a result of."""
    if value is None or isinstance(value, (int, px.linalg.Joint)):
        return []
    if isinstance(value, Factors) and field != KFRA.savefield:
        return [t for pair in value.pairs for t in pair.scaled(1 / size).summands()]
    if isinstance(value, px.linalg.KronEigh):
        return [value.eigenvalues / size]
    if field in SUMS:
        return [value / size ** SUMS[field]]
    raise px.PackextError(f"{field} is defined within one process, and there are {size}.")


def _merged(value: Any, sums: list[Tensor], n: int) -> Any:
    if value is None or isinstance(value, px.linalg.Joint):
        return value
    if isinstance(value, Factors):
        each = iter(sums)
        return Factors([pair.of_sums([next(each) for _ in pair.summands()]) for pair in value.pairs], n)
    if isinstance(value, px.linalg.KronEigh):
        return px.linalg.KronEigh(value.vectors, sums[0])
    return n if isinstance(value, int) else sums[0]


def place(group: Any) -> tuple[int, int]:
    """Ask for the place of this process in a group; None is that of all.

    Returns:
        Its rank, and the number of processes: 0 of 1 before they have met.

    Raises:
        PackextError: if it is not in the group: torch sends and receives nothing then, and no more than warns.
    """
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise px.PackextError(
            f"Process {dist.get_rank()} is not in the process group that it was given. Give it one of its own "
            "(torch.distributed.new_group returns no group to the others), or leave it out there."
        )
    return rank, dist.get_world_size(group)


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """What of emitted values may be NaN."""
    found = []
    for value in values:
        if isinstance(value, Factors):
            found += [t for pair in value.pairs for t in (pair.outputs, pair.inputs)]
        else:
            found.append(value.eigenvalues if isinstance(value, px.linalg.KronEigh) else value)
    return [t for t in found if isinstance(t, Tensor)]


class Ranks:
    """The processes that share one training, as many as there are when it is asked."""

    def __init__(self, group: Any = None) -> None:
        """Take the process group over which gradients are averaged; by default that of all processes, if any."""
        self._group = group
        place(group)

    @property
    def size(self) -> int:
        """Their number; 1 before they have met."""
        return place(self._group)[1]

    @property
    def rank(self) -> int:
        """Of this one among them."""
        return place(self._group)[0]

    def everyone(self, mine: Any) -> list[Any]:
        """What all processes have, in the order of their ranks."""
        found: list[Any] = [mine] * self.size
        if self.size > 1:
            dist.all_gather_object(found, mine, group=self._group)
        return found

    def agree(self, problem: str | None) -> None:
        """Raise in all processes what is wrong in one, so that none waits for another.

        Raises:
            PackextError: if there is a problem in any.
        """
        found = enumerate(self.everyone(problem))
        wrong = [f"rank {k}: {text}" if self.size > 1 else text for k, text in found if text]
        if wrong:
            raise px.PackextError("; ".join(wrong))

    def merge(self, values: Sequence[dict[str, Any]], problem: str | None, even: bool = False) -> list[dict[str, Any]]:
        """Results of all processes together.

        Args:
            values: results of this process, for each parameter by savefield.
            problem: what hinders this process, if anything: all raise it then.
            even: whether all processes need equally many samples.

        Returns:
            The same for all processes.
        """
        if self.size == 1:
            self.agree(problem)
            return list(values)
        entries = [(field, value) for found in values for field, value in found.items()]
        parts: list[list[Tensor]] = []
        try:
            parts = [_summands(field, value, self.size) for field, value in entries]
        except px.PackextError as error:
            problem = problem or str(error)
        shapes = [[list(t.shape) for t in part] for part in parts]
        everyone = self.everyone((shapes, [_count(value) for _, value in entries]))
        if problem is None and any(other != shapes for other, _ in everyone):
            problem = "the processes have results for different parameters, or of different shapes"
        sizes = {max(counts, default=0) for _, counts in everyone}
        if problem is None and even and (len(sizes) > 1 or 0 in sizes):
            problem = "the empirical Fisher of several processes needs Kronecker factors, and batches of one size"
        self.agree(problem)
        sums = iter(summed([t for part in parts for t in part], self._group))
        counts = [sum(each) for each in zip(*(counts for _, counts in everyone), strict=True)]
        merged = iter(
            [_merged(v, [next(sums) for _ in p], n) for (_, v), p, n in zip(entries, parts, counts, strict=True)]
        )
        return [{field: next(merged) for field in found} for found in values]

    def spread(self, tensors: list[Tensor], owner: int) -> None:
        """Send what one process has computed to all others, which have room for it."""
        for t in tensors:
            dist.broadcast(t, owner if self._group is None else dist.get_global_rank(self._group, owner), self._group)

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        return sum(self.everyone(value)) / self.size


def summed(tensors: Sequence[Tensor], group: Any) -> list[Tensor]:
    """Sums over the processes of a group, in one message for each dtype and device."""
    out = list(tensors)
    for kind in sorted({(str(t.dtype), str(t.device)) for t in tensors}):
        where = [k for k, t in enumerate(tensors) if (str(t.dtype), str(t.device)) == kind]
        flat = torch.cat([tensors[k].reshape(-1) for k in where])
        dist.all_reduce(flat, group=group)
        for k, part in zip(where, flat.split([tensors[k].numel() for k in where]), strict=True):
            out[k] = part.view(tensors[k].shape)
    return out
