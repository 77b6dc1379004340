"""Training across the world: what 2 and 3 processes do together is what a simulation in one process does."""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests import world_compression

TASKS: tuple[Callable[[int, int], None], ...] = (*world_compression.TASKS,)


def worker(rank: int, world: int, port: int, tasks: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        for task in tasks:
            task(rank, world)
        dist.barrier()  # who ends first takes the store with it
    finally:
        gc.collect()  # groups that outlive this in a model abort the process at its end
        dist.destroy_process_group()


def together(world: int, tasks: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (world, port, tasks), nprocs=world)


@pytest.mark.parametrize("world", [2, 3])
def test_processes(world: int) -> None:
    together(world, TASKS)
