"""Who is inside a session's calls right now, so that closing it takes no slot away from a copy under way.

A session's leases may go back only when none of its copies runs any more: else the slots would be somebody else's while they are
still written to or read from. So closing shuts the door, waits as long as it may, and whoever is last out does what is left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvtiers.model.errors import CacheClosed
from kvtiers.runtime.forked import ParentsLock, left_to_the_parent


class Activity:
    """Counts calls under way. `when_over` is called once: after `shut`, when nobody is inside."""

    def __init__(self, when_over: Callable[[], None]) -> None:
        self._when_over = when_over
        self._changed: threading.Condition | ParentsLock = threading.Condition()
        self._inside = 0
        self._open = True
        self._over = False
        left_to_the_parent(self)

    @property
    def is_open(self) -> bool:
        """Whether calls may begin."""
        return self._open

    def enter(self) -> None:
        """A call begins; `leave` ends it. Raises CacheClosed."""
        with self._changed:
            if not self._open:
                raise CacheClosed("the cache is closed: open a new one")
            self._inside += 1

    def leave(self) -> None:
        """A call has ended, on whatever thread."""
        with self._changed:
            self._inside -= 1
            last = not self._open and not self._inside
        if last:
            self._finish()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be inside for a `with` block. Raises CacheClosed."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def shut(self) -> bool:
        """No call begins any more; False if it was shut before."""
        with self._changed:
            if not self._open:
                return False
            self._open = False
            empty = not self._inside
        if empty:
            self._finish()
        return True

    def wait_over(self, timeout: float) -> bool:
        """Wait, after `shut`, until everybody is out and `when_over` has returned; False at the time-out."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not self._over:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def disown(self, lock: ParentsLock) -> None:
        """In a forked child: nobody enters."""
        self._changed = lock

    def _finish(self) -> None:
        """On one thread only: the count reaches 0 once after `shut`, as nobody comes in any more."""
        try:
            self._when_over()
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()
