"""What all methods here need of torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

import packext as px
from packext.optim._merge import place


def world(group: Any) -> tuple[int, int]:
    """Ask for the number of processes of a group, and the rank of this one among them.

    Returns:
        Both.

    Raises:
        PackextError: if there is no process group, or this process is not in the one that is given.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise px.PackextError("There is no process group: call torch.distributed.init_process_group first.")
    rank, size = place(group)
    return size, rank


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Wait for other processes inside, and say so if they do not answer.

    Raises:
        PackextError: where torch.distributed fails, because a process died or the time limit passed.
    """
    try:
        yield
    except px.PackextError:
        raise
    except RuntimeError as error:  # torch.distributed's errors are all of this kind
        raise px.PackextError(
            f"{what}: another process has died, or has not answered within the time limit. End this one, and start all "
            f"again from the last checkpoint. torch.distributed says: {error}"
        ) from error


def same_world(saved: Any, group: Any, what: str) -> None:
    """Compare where a state was saved with where it is loaded.

    Raises:
        PackextError: if it belongs to another rank, or to a world of another size.
    """
    here = world(group)
    if tuple(saved) != here:
        raise px.PackextError(
            f"This {what} was saved by rank {saved[1]} of {saved[0]} processes, and is loaded by rank {here[1]} of "
            f"{here[0]}: each process keeps what it alone has not sent yet. Save and load one file for each rank"
        )
