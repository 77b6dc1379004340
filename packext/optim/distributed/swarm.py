"""Sums over the samples of whoever is there, through hivemind, without a process group."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import packext as px
from packext.optim.distributed.collaborative import Gathered


class Swarm:
    """Merges sums over samples with the peers that hivemind finds, by their samples, never by their number.

    hivemind's all-reduce goes on without a peer that fails: it leaves its own values where a mean was to come, or a
    sender out of some parts, and logs a warning. So a number that each peer has drawn travels with every entry, and a
    merge in which one of their means is not that of all peers is refused. That doubles what is sent.

    Gradients are sums (`{"0.weight": p.grad, ...}` of a loss with `reduction="sum"`), and whatever else adds up over
    samples.

    - Formula: sums over the peers of samples and of sums: hivemind's mean times the number of peers
    - Cost: two float32 numbers are sent for each entry
    - Source: hivemind's `DecentralizedAverager`
    - Refused: a merge in which a peer has failed, or that no peer has joined in time; sums that are not finite

    Example:
        >>> dht = hivemind.DHT(initial_peers=peers, start=True)
        >>> with Swarm(like, dht, "my run", target_group_size=16) as swarm:
        ...     gathered = swarm.merge(len(x), sums)

    Attributes:
        averager: `hivemind.averaging.DecentralizedAverager`.
    """

    def __init__(self, like: Mapping[str, Tensor], dht: Any, name: str, **options: Any) -> None:
        """Meet the others.

        Args:
            like: tensors with the names and shapes of the sums, the same for all peers.
            dht: `hivemind.DHT`.
            name: of the run.
            options: of `hivemind.averaging.DecentralizedAverager`, such as `target_group_size` and
                `min_matchmaking_time`.

        Raises:
            ImportError: without hivemind.
        """
        try:
            from hivemind.averaging import DecentralizedAverager  # pyright: ignore
        except ImportError as error:
            raise ImportError("Swarm needs hivemind: pip install 'packext[hivemind]'") from error
        self._shapes = {key: (t.shape, t.dtype) for key, t in sorted(like.items())}
        size = sum(math.prod(shape) for shape, _ in self._shapes.values())
        # An entry and its mark are neighbours, so that they are averaged by the same peer.
        self.averager: Any = DecentralizedAverager([torch.zeros(size, 2)], dht, prefix=name, start=True, **options)

    def __enter__(self) -> Swarm:
        """This."""
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the swarm."""
        self.averager.shutdown()

    def merge(self, samples: int, sums: Mapping[str, Tensor], timeout: float = 60.0) -> Gathered:
        """Sums over the samples of all peers that were found.

        Args:
            samples: here, at least one.
            sums: over them, with the names and shapes of `like`.
            timeout: how long to look for peers and to wait for them, in seconds.

        Returns:
            Sums in the dtypes of `like`, with the precision of float32, in which hivemind adds; `shares` in the
            order of the peers' names.

        Raises:
            ValueError: for no samples, or sums with other names or shapes.
            PackextError: if no peer was found in time, one failed on the way, or a sum is not finite.
        """
        if samples < 1 or {key: t.shape for key, t in sums.items()} != {k: s for k, (s, _) in self._shapes.items()}:
            raise ValueError(f"need samples and sums of {list(self._shapes)}, got {samples} and {list(sums)}.")
        flat = torch.cat([sums[key].detach().float().cpu().reshape(-1) for key in self._shapes])
        if not flat.isfinite().all():
            raise px.PackextError("Swarm: a sum is not finite in float32, and nothing was sent.")
        mark = secrets.randbits(24) / 2**24
        with self.averager.get_tensors() as held:
            held[0][:, 0], held[0][:, 1] = flat, mark
        try:
            peers = self.averager.step(gather=(samples, mark), timeout=timeout, allow_retries=False)
        except Exception as error:  # of many kinds: hivemind hands on those of its processes
            raise px.PackextError(f"Swarm: no merge within {timeout} s, because of {error!r}. Try again.") from error
        if not peers:
            raise px.PackextError(f"Swarm: no peers were found within {timeout} s. Try again.")
        with self.averager.get_tensors() as held:
            means = held[0].clone()
        counts, marks = zip(*(said for _, said in sorted(peers.items(), key=lambda peer: str(peer[0]))), strict=True)
        if (means[:, 1] * len(marks) - sum(marks)).abs().max() > 1e-5 * len(marks):
            raise px.PackextError(
                "Swarm: a peer failed during the merge, and some of its samples are missing. Try again."
            )
        parts = (means[:, 0] * len(counts)).split([math.prod(shape) for shape, _ in self._shapes.values()])
        named = zip(self._shapes.items(), parts, strict=True)
        return Gathered(
            sum(counts), list(counts), {key: part.view(shape).to(dtype) for (key, (shape, dtype)), part in named}
        )
