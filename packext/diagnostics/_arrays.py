"""Arrays of a record, which stay on disk until somebody asks for one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

import packext as px


def lacking(path: Path) -> px.PackextError:
    """The error for a file that ends before something that the record refers to."""
    return px.PackextError(
        f"{path} lacks something that the record refers to: copy or restore all files of the folder, or record into "
        "another."
    )


class Arrays(Mapping):
    """Arrays of one name by step, each read from disk when it is asked for; those of layers are parts of stacks."""

    def __init__(self, path: Path, places: dict[int, tuple[int, int | None]]) -> None:
        """Take the file, and of each step the place in it and which part of the stack there, if it is one."""
        self._path, self._places = path, places

    def __getitem__(self, step: int) -> np.ndarray:
        """The array of one step."""
        place, k = self._places[step]
        try:
            with self._path.open("rb") as file:
                file.seek(place)
                if k is None:
                    return np.load(file, allow_pickle=False)
                np.lib.format.read_magic(file)
                (_, *shape), _, dtype = np.lib.format.read_array_header_1_0(file)
                size = math.prod(shape) * dtype.itemsize
                file.seek(k * size, 1)
                return np.frombuffer(file.read(size), dtype).reshape(shape).copy()
        except (ValueError, EOFError, FileNotFoundError):
            raise lacking(self._path) from None

    def __iter__(self) -> Iterator[int]:
        """The steps, in the order of the record."""
        return iter(self._places)

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self._places)
