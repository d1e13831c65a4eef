"""Locks that tell who waited for them, how long, and what the one who held them was doing.

`watched_locks` stands in for `threading.Lock` while a cache is made, so that every lock of its parts is watched: the node's mutex,
the pools', the store's. Locks made later (a load's own) are not: waiting for those is what their caller asked for.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final
from unittest.mock import patch

_REAL_LOCK: Final = threading.Lock


@dataclass(slots=True)
class LockWatch:
    """What was seen. `in_io`: whether a thread is inside a store at this moment."""

    in_io: Callable[[int], bool] = lambda _: False
    engine: int = 0
    """Ident of the thread that plays the engine; only its waits are counted."""
    locks: list[WatchedLock] = field(default_factory=list)
    engine_acquisitions: int = 0
    engine_waits_s: list[float] = field(default_factory=list)
    engine_waits_on_io: list[str] = field(default_factory=list)
    """Locks the engine waited for while their holder was inside a store."""

    def of(self, module: str) -> list[WatchedLock]:
        """Locks made by a module."""
        return [lock for lock in self.locks if lock.made_by == module]


class WatchedLock:
    """A `threading.Lock`, as far as `with`, `Condition` and `queue` use one."""

    def __init__(self, watch: LockWatch, made_by: str) -> None:
        self._watch = watch
        self._lock = _REAL_LOCK()
        self.made_by = made_by
        self.owner: int | None = None
        self.holds = 0
        self.longest_hold_s = 0.0
        self._since = 0.0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = threading.get_ident()
        got = self._lock.acquire(False)
        if not got and blocking:
            owner, began = self.owner, time.perf_counter()
            on_io = owner is not None and self._watch.in_io(owner)
            got = self._lock.acquire(True, timeout)
            if me == self._watch.engine:
                self._watch.engine_waits_s.append(time.perf_counter() - began)
                if on_io:
                    self._watch.engine_waits_on_io.append(self.made_by)
        if got:
            self.owner = me
            self.holds += 1
            self._since = time.perf_counter()
            if me == self._watch.engine:
                self._watch.engine_acquisitions += 1
        return got

    def release(self) -> None:
        self.longest_hold_s = max(self.longest_hold_s, time.perf_counter() - self._since)
        self.owner = None
        self._lock.release()

    def locked(self) -> bool:
        return self._lock.locked()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


@contextmanager
def watched_locks(watch: LockWatch) -> Iterator[None]:
    """Every `threading.Lock()` made inside, by whatever thread, is a watched one."""

    def make() -> WatchedLock:
        frame = inspect.currentframe()
        maker = frame.f_back if frame is not None else None
        lock = WatchedLock(watch, "" if maker is None else str(maker.f_globals.get("__name__", "")))
        watch.locks.append(lock)
        return lock

    with patch.object(threading, "Lock", make):
        yield
