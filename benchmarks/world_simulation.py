"""Delayed and sparse synchronisation of many workers, event by event."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """d, and T; (0, 1) is synchronous."""

    delay: int
    every: int


def ring(workers: int, latency: float, size: int = 0, bandwidth: float = math.inf) -> float:
    """Seconds of Gloo's all-reduce of `size` bytes: 2 (n - 1) hops, before each of which the receiver is heard."""
    return 4 * (workers - 1) * latency + 2 * (workers - 1) / workers * size / bandwidth


def tree(workers: int, latency: float) -> float:
    """The same up and down a binary tree."""
    return 4 * math.ceil(math.log2(workers)) * latency


def simulate(
    workers: int,
    schedule: Schedule,
    compute: float,
    reduce: float,
    steps: int,
    warm: int,
    jitter: float = 0.0,
    channels: int = 2,
    seed: int = 0,
) -> float:
    """Seconds of a step, after the first `warm`.

    Args:
        workers: how many.
        schedule: d and T.
        compute: seconds of a step's own work (its median).
        reduce: seconds from when the last worker has sent a block until all have its mean.
        steps: of each worker.
        warm: how many of them are not counted.
        jitter: standard deviation of the logarithm of a step's own work.
        channels: reductions that may be under way together (Gloo has two threads).
        seed: of the jitter.
    """
    draw = random.Random(seed)
    cost = lambda: compute * math.exp(jitter * draw.gauss(0, 1)) if jitter else compute  # noqa: E731
    events: list[
        tuple[float, int, int, int]
    ] = []  # time, kind (0: a mean arrives, 1: a step's work is done), who, step
    sent: dict[int, int] = {}  # workers that have sent a block
    ready: list[int] = []  # blocks that all have sent, and that wait for a channel
    arrived: set[int] = set()
    waiting: dict[int, list[tuple[int, int]]] = {}  # workers that wait for a block
    busy, marks = 0, [0.0, 0.0]
    for k in range(workers):
        heapq.heappush(events, (cost(), 1, k, 1))

    def begin(now: float) -> None:
        nonlocal busy
        while ready and busy < channels:
            busy += 1
            heapq.heappush(events, (now + reduce, 0, ready.pop(0), 0))

    def go_on(now: float, k: int, step: int) -> None:
        """A worker has all that it needs after a step."""
        if step in (warm, steps):
            marks[step == steps] = max(marks[step == steps], now)
        if step < steps:
            heapq.heappush(events, (now + cost(), 1, k, step + 1))

    while events:
        now, kind, who, step = heapq.heappop(events)
        if kind == 0:
            arrived.add(who)
            busy -= 1
            begin(now)
            for k, at in waiting.pop(who, []):
                go_on(now, k, at)
            continue
        if step % schedule.every == 0:
            block = step // schedule.every
            sent[block] = sent.get(block, 0) + 1
            if sent[block] == workers:
                ready.append(block)
                begin(now)
        due = step - schedule.delay
        block = due // schedule.every
        if due > 0 and due % schedule.every == 0 and block not in arrived:
            waiting.setdefault(block, []).append((who, step))
        else:
            go_on(now, who, step)
    return (marks[1] - marks[0]) / (steps - warm)
