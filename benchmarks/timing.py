"""Time by round-robin: every contender once per round, in an order drawn anew for each."""

from __future__ import annotations

import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], None]
SLOT = 0.05
"""Seconds that a contender's turn in a round takes at least, by repeating a short step."""


@dataclass(frozen=True)
class Ratio:
    """A contender's time over the plain gradient's, round by round."""

    median: float
    lower: float
    upper: float
    least: float
    """Ratio of the two shortest times, which other work on the machine disturbs less."""
    rounds: int
    milliseconds: float
    """Median time of one step; for the record, as it says more of the machine than of the code."""


def keep_pages() -> bool:
    """Let glibc keep what is freed, for the whole process, as the allocators of GPUs do, between steps.

    Contenders share one heap. When its end is given back depends on what others have left there: the same step takes up
    to a quarter longer from process to process, in page faults alone.

    Returns:
        Whether it does from now on; it does not with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    trim_threshold, mmap_max = -1, -4  # malloc.h
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))


def synchronise(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(step: Step, device: torch.device, repeats: int = 1, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time one step in seconds, as the mean of some, with the garbage collector out of the way."""
    gc.disable()
    try:
        synchronise(device)
        start = clock()
        for _ in range(repeats):
            step()
        synchronise(device)
        return (clock() - start) / repeats
    finally:
        gc.enable()


def round_robin(
    steps: Mapping[str, Step],
    device: torch.device,
    *,
    rounds: int,
    warmup: int,
    budget: float = float("inf"),
    tick: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time all steps, interleaved.

    Args:
        steps: What to run, by name.
        device: Where it runs.
        rounds: Number of rounds.
        warmup: Rounds before those, not counted.
        budget: Seconds after which no further round begins, once three have been counted.
        tick: Called after every round.
        clock: Gives seconds.

    Returns:
        Seconds by name, one entry per counted round.
    """
    order = list(steps)
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in steps}
    repeats = dict.fromkeys(steps, 1)
    start = time.perf_counter()
    for i in range(warmup + rounds):
        shuffle(order)
        gc.collect()
        for name in order:
            seconds = once(steps[name], device, repeats[name], clock)
            if i >= warmup:
                times[name].append(seconds)
            else:
                repeats[name] = min(math.ceil(SLOT / seconds), 10)
        tick()
        if i >= warmup + 2 and time.perf_counter() - start > budget:
            break
    return times


def ratios(times: Mapping[str, list[float]], unit: str) -> dict[str, Ratio]:
    """Return every contender's median of per-round ratios to the contender named ``unit``."""
    out = {}
    for name, seconds in times.items():
        quotients = [s / u for s, u in zip(seconds, times[unit], strict=True)]
        lower, median, upper = statistics.quantiles(quotients, n=4, method="inclusive")
        least = min(seconds) / min(times[unit])
        milliseconds = 1e3 * statistics.median(seconds)
        out[name] = Ratio(median, lower, upper, least, len(quotients), milliseconds)
    return out
