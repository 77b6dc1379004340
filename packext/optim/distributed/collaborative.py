"""Batches that are gathered by processes of different speeds, and workers that join late."""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

import packext as px
from packext.optim._merge import Ranks, summed
from packext.optim._work import GATHERED, at_least_float32
from packext.optim.distributed._processes import waiting, world


@dataclass(frozen=True)
class Gathered:
    """A batch that all processes have gathered together.

    Attributes:
        samples: in all.
        shares: samples of each process.
        sums: of what was given with the samples, over all of them.
    """

    samples: int
    shares: list[int]
    sums: dict[str, Tensor]

    def mean(self, name: str) -> Tensor:
        """A sum by the number of samples."""
        return self.sums[name] / self.samples


class TargetBatch:
    """Gathers gradients of processes of different speeds until they are of a given number of samples together.

    Each process works through parts of its own, as fast as it can, and counts their samples in the store that all
    share. When all together have enough, each finishes the part that it is at, and gradients become the mean over all
    samples: fast processes have a greater share, and everything is merged by samples, never by processes.
    The batch has at least `target` samples, and at most one part of each process more.

    `.grad` holds sums until then: the loss of a part is a sum over its samples (`reduction="sum"`, or the mean times
    the number of samples). The model is not wrapped in `DistributedDataParallel`.

    Other quantities that add up over samples are given as `sums`: of `px.backpack(px.SumGradSquared(),
    px.BatchL2Grad(), scale="sample")`, say, `sum_grad_squared` of each parameter and the sum of `batch_l2`.

    With torchrun (`--nnodes=1:8 --max-restarts=...`) workers come and go: it starts all anew when their number changes,
    and `catch_up` gives the state of the one that is furthest to the others. Samples of a batch that was not complete
    are lost.

    - Formula: `.grad = sum of the gradients of all samples of all processes / number of these samples`
    - Cost: a message to the store for each part; gradients are summed once for each batch, in place of each pass
    - Source: as `target_batch_size` of hivemind has it, here on `torch.distributed`
    - Refused: different targets, parameters or sums in the processes; gradients that are not finite, in all of them;
      optimizers of `px.optim`, by their step

    Example:
        >>> gathered = TargetBatch(model.parameters(), target=4096)
        >>> steps = catch_up(steps, model=model, optimizer=optimizer)
        >>> while steps < 1000:
        ...     x, y = next(parts)
        ...     loss_fn(model(x), y).backward()  # reduction="sum"
        ...     if gathered.add(len(x)):
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         steps += 1

    Attributes:
        batches: that were completed.
    """

    def __init__(
        self, parameters: Iterable[Tensor], target: int, *, process_group: Any = None, store: Any = None
    ) -> None:
        """Agree on the target; all processes do so at the same time.

        Args:
            parameters: of the model, in the same order everywhere.
            target: number of samples, at least one.
            process_group: of the processes that train together; by default all.
            store: in which samples are counted, a `torch.distributed.Store`; by default that of the process group.

        Raises:
            ValueError: for a target below one.
            PackextError: if the processes have different targets or parameters, or one does not answer.
        """
        if target < 1:
            raise ValueError(f"need a target of at least one sample, got {target}.")
        self.parameters = list(parameters)
        self.target, self.process_group, self.batches = target, process_group, 0
        self.size, self.rank = world(process_group)
        mine = (target, [tuple(p.shape) for p in self.parameters], uuid.uuid4().hex)
        everyone = self._exchange(mine)
        for rank, other in enumerate(everyone):
            if other[:2] != mine[:2]:
                raise px.PackextError(
                    f"TargetBatch: rank {rank} has a target of {other[0]} samples and {len(other[1])} parameters, and "
                    f"this process {target} and {len(self.parameters)}, or of other shapes: give all the same."
                )
        store = distributed_c10d._get_default_store() if store is None else store
        self._store = distributed_c10d.PrefixStore(f"packext/{everyone[0][2]}", store)
        self._samples, self._sums = 0, {}

    def add(self, samples: int, sums: Mapping[str, Tensor] | None = None) -> Gathered | None:
        """Count a part whose backward pass has ended; every process calls it after each of its parts.

        Args:
            samples: of the part; 0 for none.
            sums: further quantities, summed over the samples of the part.

        Returns:
            None as long as samples are missing. Else the batch, and `.grad` is the mean over its samples; parameters
            that no process has a gradient of have none. If a gradient or sum of one process is not finite, or their
            sums differ, that is an error in all; `.grad` is as it was then, and the samples are forgotten.

        Raises:
            ValueError: for a negative number of samples.
        """
        if samples < 0:
            raise ValueError(f"a part has no {samples} samples.")
        for name, value in (sums or {}).items():
            value = value.detach()  # a loss may be given, whose graph nobody needs
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self._samples += samples
        with waiting("TargetBatch"):
            if self._store.add(str(self.batches), samples) < self.target:
                return None
        return self._merge()

    @torch.no_grad()
    def _merge(self) -> Gathered:
        own, held = self._samples, self._sums
        self._samples, self._sums = 0, {}
        self.batches += 1
        grads = [p.grad for p in self.parameters]
        finite = all(t.isfinite().all() for t in (*grads, *held.values()) if t is not None)
        used = [g is not None for g in grads]
        shapes = {name: (tuple(t.shape), t.dtype) for name, t in sorted(held.items())}
        everyone = self._exchange((own, used, shapes, finite))
        if self.rank == 0:  # all have left this batch's count behind
            self._store.delete_key(str(self.batches - 1))
        wrong = [f"rank {k}: a gradient or sum is not finite" for k, (*_, good) in enumerate(everyone) if not good]
        given = {k: theirs for k, (n, _, theirs, _) in enumerate(everyone) if n}
        shapes = next(iter(given.values()))
        if not wrong and any(theirs != shapes for theirs in given.values()):
            wrong = [f"rank {k}: sums {theirs}" for k, theirs in given.items()]
        if wrong:
            raise px.PackextError(f"TargetBatch, batch {self.batches}: {'; '.join(wrong)}. No gradient was changed.")
        shares = [n for n, *_ in everyone]
        total = sum(shares)
        anywhere = [any(each) for each in zip(*(flags for _, flags, *_ in everyone), strict=True)]
        # In float16 the sum may overflow where the mean does not.
        parts = [
            at_least_float32(torch.zeros_like(p) if g is None else g)
            for p, g, reached in zip(self.parameters, grads, anywhere, strict=True)
            if reached
        ]
        like = self.parameters[0]
        parts += [held.get(name, like.new_zeros(shape, dtype=dtype)) for name, (shape, dtype) in shapes.items()]
        with waiting(f"TargetBatch, batch {self.batches}"):
            sums = iter(summed(parts, self.process_group))
        for p, reached in zip(self.parameters, anywhere, strict=True):
            if reached:
                p.grad = (next(sums) / total).to(p.dtype)
                setattr(p.grad, GATHERED, True)
        return Gathered(total, shares, {name: next(sums) for name in shapes})

    def _exchange(self, mine: Any) -> list[Any]:
        with waiting("TargetBatch"):
            return Ranks(self.process_group).everyone(mine)


def catch_up(steps: int, *, process_group: Any = None, **parts: Any) -> int:
    """Give everyone the state of the process that has taken most steps; all call it, after every start.

    Workers that have a checkpoint load it before, and joining ones begin with 0 steps.

    Args:
        steps: taken so far by this process.
        process_group: of the processes that train together; by default all.
        parts: what has `state_dict` and `load_state_dict`: model, optimizer, scheduler. The same names everywhere.

    Returns:
        The number of steps that all have taken now.

    Raises:
        PackextError: if processes name different parts, or one does not answer.
    """
    size, rank = world(process_group)
    with waiting("catch_up"):
        everyone = Ranks(process_group).everyone((steps, sorted(parts)))
    if any(names != sorted(parts) for _, names in everyone):
        raise px.PackextError(f"catch_up: processes name different parts: {[names for _, names in everyone]}.")
    furthest = max(range(size), key=lambda k: everyone[k][0])
    held: list[Any] = [None]
    if rank == furthest:
        buffer = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
        held = [buffer.getvalue()]
    source = furthest if process_group is None else dist.get_global_rank(process_group, furthest)
    with waiting("catch_up"):
        dist.broadcast_object_list(held, source, group=process_group)
    if rank != furthest:
        states = torch.load(io.BytesIO(held[0]), map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(states[name])
    return everyone[furthest][0]
