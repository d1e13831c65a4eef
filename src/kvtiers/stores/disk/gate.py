"""Who is inside a store right now, so that closing it waits for nobody and still takes nothing away from anybody.

A thread stuck in a system call on a hung disk can't be thrown out. `close` therefore only shuts the gate; whoever is last to
leave runs the cleanup, at once if nobody is in. Until then the directory stays locked: a write under way may still publish.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvtiers.model.errors import StoreUnavailable


class Gate:
    """Counts who is inside; runs `when_empty` once, after `shut`, when nobody is left."""

    def __init__(self, name: str, when_empty: Callable[[], None]) -> None:
        self._name = name
        self._when_empty = when_empty
        self._lock = threading.Lock()
        self._inside = 0
        self._open = False
        self._finished = False

    @property
    def is_open(self) -> bool:
        """Whether anybody may come in; long loops look at it."""
        return self._open

    def unlock(self) -> None:
        """Let operations in; once."""
        with self._lock:
            if self._finished:
                raise StoreUnavailable(f"{self._name} was closed; make a new store")
            self._open = True

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be inside. Raises StoreUnavailable when the store is not open."""
        with self._lock:
            if not self._open:
                raise StoreUnavailable(f"{self._name} is {'closed' if self._finished else 'not open'}")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                last = self._finished and self._inside == 0
            if last:
                self._when_empty()

    def shut(self) -> None:
        """Let nobody in any more; idempotent."""
        with self._lock:
            if self._finished:
                return
            self._finished = True
            was_open, self._open = self._open, False
            empty = was_open and not self._inside
        if empty:
            self._when_empty()
