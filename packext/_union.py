"""Results of parts of a batch, of several passes or ranks, made into those of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from packext._errors import PackextError


@dataclass(frozen=True)
class Part:
    """What a quantity found in a part of the batch.

    Attributes:
        value: its result.
        n: number of samples.
        aside: what else the quantity needs to know of the part.
    """

    value: Any
    n: int
    aside: Any = None


class Here:
    """The parts are all here: nothing is to be fetched."""

    def sum(self, t: Tensor) -> Tensor:
        """The sum of `t` over all ranks."""
        return t

    def cat(self, t: Tensor, axis: int) -> Tensor:
        """The `t` of all ranks one after the other along `axis`, along which they may differ in size."""
        return t

    def count(self, n: int) -> int:
        """Samples of all ranks."""
        return n


HERE = Here()


def everyone(mine: Any, group: Any) -> list[Any]:
    """What all ranks of `group` have, in their order."""
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    return found


#: What ranks meet over when they leave the context, in place of parameters.
END = "the end of the context"


class Ranks(Here):
    """The parts are those of the ranks of a process group, in their order."""

    def __init__(self, group: Any) -> None:
        """Take the group, in which every rank makes the same calls.

        Raises:
            ValueError: if this rank is not in it.
        """
        if dist.get_rank(group) < 0:  # collectives of torch do nothing then
            raise ValueError(
                f"group=...: rank {dist.get_rank()} is not in this process group. Give it one of its own "
                "(torch.distributed.new_group returns no group to the others), or leave it out there."
            )
        self.group = group
        self.counts: list[int] = []

    def meet(self, found: Mapping[str, str], n: int, failed: str = "", asked: str = "") -> None:
        """Say what this rank has found, and hear what the others have.

        Args:
            found: shapes and dtypes of the parameters that have results, by name.
            n: samples here.
            failed: what went wrong here, if something did.
            asked: of the context.

        Raises:
            Elsewhere: if another rank failed, found something for other parameters, or was asked for something else.
        """
        heard = everyone((dict(found), n, failed, asked), self.group)
        self.counts = [count for _, count, *_ in heard]
        if failed:
            return
        for rank, (_, _, why, _) in enumerate(heard):
            if why:
                raise Elsewhere(f"Rank {rank} of the group failed, so that there are no results of all: {why}")
        for rank, (others, _, _, their) in enumerate(heard):
            if (END in others) != (END in found):
                raise Elsewhere(
                    f"Rank {rank} of the group and this one have run different numbers of backward passes in their "
                    "contexts: run as many on all ranks."
                )
            if their != asked:
                raise Elsewhere(
                    f"Rank {rank} of the group asks for {their}, and this one for {asked}: ask for the same."
                )
            differing = sorted({*others} ^ {*found})
            if differing:
                raise Elsewhere(
                    f"The backward passes of rank {rank} and of this one reached different parameters "
                    f"({', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''}): extend the same model on "
                    "all ranks, and use the same parts of it."
                )
            for name, kind in found.items():
                if others[name] != kind:
                    raise Elsewhere(
                        f"{name} is {others[name]} on rank {rank} and {kind} on this one: extend the same model on all "
                        "ranks of the group, and use it in the same way."
                    )

    def sum(self, t: Tensor) -> Tensor:
        t = t.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(t, group=self.group)
        return t

    def cat(self, t: Tensor, axis: int) -> Tensor:
        own = t.detach().movedim(axis, 0)
        per = own.shape[0] // max(1, self.counts[dist.get_rank(self.group)])
        padded = own.new_zeros(max(self.counts) * per, *own.shape[1:])
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded, group=self.group)
        together = torch.cat([part[: count * per] for part, count in zip(parts, self.counts, strict=True)])
        return together.movedim(0, axis)

    def count(self, n: int) -> int:
        return sum(self.counts)


class Elsewhere(PackextError):
    """Another rank failed, and knows of it."""
