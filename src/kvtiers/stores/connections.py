"""How many calls to an engine are under way at a time, and how long others wait for their turn. Any thread.

Clients of engines differ in how they pool connections, and none tells how long a caller waited for one. So the bound
(`connection_pool_size`) is here: a call holds one of the places for as long as it uses a connection.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kvtiers.model.errors import StoreTransient


class Waits:
    """How often calls to one engine had to wait for their turn, and for how long in all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        with self._lock:
            self._count += 1
            self._seconds += seconds

    def stats(self) -> Mapping[str, int]:
        """For a store's `stats`."""
        with self._lock:
            return {"connection_waits": self._count, "connection_wait_us": int(self._seconds * 1e6)}


class Connections:
    """Places for `limit` calls."""

    def __init__(
        self,
        limit: int,
        timeout_s: float,
        *,
        waits: Waits | None = None,
        key: str = "storage.remote.connection_pool_size",
    ) -> None:
        """`timeout_s`: how long a call waits for a place before it has failed. `waits`: counts for others too. `key`: of the configuration, where `limit` stands."""
        self._limit = limit
        self._timeout_s = timeout_s
        self._places = threading.BoundedSemaphore(limit)
        self._key = key
        self.waits = waits or Waits()
        """Also for what else a call with a place may have to wait for."""

    @contextmanager
    def use(self, until: float = math.inf) -> Iterator[None]:
        """Hold a place. Raises StoreTransient if none gets free in time, or by `until` on `time.monotonic`."""
        if not self._places.acquire(blocking=False):
            self._wait(until)
        try:
            yield
        finally:
            self._places.release()

    @contextmanager
    def use_several(self, wanted: int, until: float = math.inf) -> Iterator[int]:
        """Hold a place, and of those that are free now as many more as make `wanted`; gives how many. Raises as `use`."""
        with self.use(until):
            more = 0
            try:
                while more + 1 < wanted and self._places.acquire(blocking=False):
                    more += 1
                yield more + 1
            finally:
                for _ in range(more):
                    self._places.release()

    def stats(self) -> Mapping[str, int]:
        """Calls that had to wait, and for how long in all."""
        return self.waits.stats()

    def _wait(self, until: float) -> None:
        began = time.monotonic()
        free = self._places.acquire(timeout=max(0.0, min(self._timeout_s, until - began)))
        self.waits.add(time.monotonic() - began)
        if not free:
            raise StoreTransient(
                f"none of {self._limit} connections got free in {self._timeout_s:g} s; "
                f"set {self._key} higher if the engine has room"
            )
