"""Training across the world: what 2 and 3 processes do together is what a simulation in one process does."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

import packext as px
from packext.optim import distributed as pd
from tests import world_compression, world_training
from tests.helpers import processes

EVERYTHING = (*world_compression.TASKS, *world_training.TASKS)
#: Two processes, where halves are exact, for what an odd number cannot show.
PAIR = (
    world_compression.ratio_one_is_plain,
    world_compression.conserved,
    world_training.delayed_as_simulated,
    world_training.gathered,
)


def worker(rank: int, port: int, world: int, tasks: Any, last: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for task in tasks:
        task(rank, world)
    dist.barrier()
    if last is not None:
        last(rank, world)
        os._exit(0)  # one process has died: there is no way to leave the group together
    gc.collect()  # groups that outlive this in a model abort the process at its end
    dist.destroy_process_group()


@pytest.mark.parametrize(("world", "tasks"), [(2, PAIR), (3, EVERYTHING)])
def test_processes(world: int, tasks: Any) -> None:
    processes(worker, world, tasks, None if world == 2 else world_training.late, world=world)


def test_without_a_process_group() -> None:
    model = torch.nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    for make in (
        lambda: pd.TopK(model.named_parameters(), 0.1),
        lambda: pd.DGC(model.named_parameters(), sgd),
        lambda: pd.DSSGD(sgd),
        lambda: pd.AdaptiveAverager(),
        lambda: pd.TargetBatch(model.parameters(), 4),
        lambda: pd.catch_up(0, model=model),
    ):
        with pytest.raises(px.PackextError, match=r"There is no process group: call torch\.distributed\.init_process"):
            make()


@pytest.mark.parametrize(
    ("delay", "every", "channels", "seconds"),
    [
        (0, 1, 2, 1 + 7),  # waits for each
        (0, 4, 2, 1 + 7 / 4),
        (7, 1, 8, 1),  # hidden, if as many may be under way as there are
        (7, 1, 1, 7),  # one after the other
        (4, 4, 2, 11 / 8),  # a block is sent 4 seconds after the mean of the last but one was there: 7 + 4 for two
        (8, 4, 2, 1),
    ],
)
def test_the_simulation_of_the_benchmark_by_hand(delay: int, every: int, channels: int, seconds: float) -> None:
    simulation = pytest.importorskip("benchmarks.world_simulation", reason="only a checkout has the benchmarks")
    found = simulation.simulate(3, simulation.Schedule(delay, every), 1.0, 7.0, 48, 24, channels=channels)
    assert found == pytest.approx(seconds)
    assert simulation.ring(4, 0.5, 12, 2.0) == 6 + 9  # 12 latencies, and 1.5 times the bytes
