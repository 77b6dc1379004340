"""What torch has once for all threads, and packext wants another way for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Switch:
    """Turned by the first who enters, in whatever thread, and turned back when the last has left."""

    def __init__(self, turn: Callable[[], Any], back: Callable[[Any], None]) -> None:
        """Take what turns it, and what turns it back, given what the other returned.

        That is `before` as long as it is turned.
        """
        self._turn, self._back = turn, back
        self._count, self._lock = 0, threading.Lock()
        self.before: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._count:
                self.before = self._turn()
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                self._back(self.before)
