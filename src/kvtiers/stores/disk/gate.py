"""Who is inside a store right now, so that closing it waits for nobody and still takes nothing away from anybody.

A thread stuck in a system call on a hung disk can't be thrown out. `close` therefore only shuts the gate; whoever is last to
leave runs the cleanup, at once if nobody is in. Until then the directory stays locked: a write under way may still publish.

A forked child has a copy of the gate and of what lies behind it, which is its parent's: there it is shut, and cleans up nothing.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from kvtiers.model.errors import StoreUnavailable

_GATES: Final[weakref.WeakSet[Gate]] = weakref.WeakSet()


class Gate:
    """Counts who is inside; runs `when_empty` once, after `shut`, when nobody is left."""

    def __init__(self, name: str, when_empty: Callable[[], None]) -> None:
        self._name = name
        self._when_empty = when_empty
        self._lock = threading.Lock()
        self._inside = 0
        self._open = False
        self._finished = False
        self._state = "is not open"
        _GATES.add(self)

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
                raise StoreUnavailable(f"{self._name} {self._state}")
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
            self._state = "is closed"
            was_open, self._open = self._open, False
            empty = was_open and not self._inside
        if empty:
            self._when_empty()

    def _shut_in_child(self) -> None:
        """With a lock of its own: the inherited one may be held by a thread that did not come along."""
        self._lock = threading.Lock()
        self._open, self._finished = False, True
        self._state = "belongs to the parent process"


def _shut_after_fork() -> None:
    for gate in list(_GATES):
        gate._shut_in_child()  # noqa: SLF001 - of this module


os.register_at_fork(after_in_child=_shut_after_fork)
