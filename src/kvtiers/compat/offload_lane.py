"""One target of the offload engine: who stores for it, and the threads that wait for that storage.

Each target has threads of its own, so one that hangs takes nobody else's. Our own backends are called on these threads; any other is
driven on an event loop that belongs to the target, with a deadline, after which the thread is free again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from kvtiers.compat.backend import LocalBackend, StorageBackend
from kvtiers.compat.loop_thread import LoopThread
from kvtiers.compat.payload import Payload
from kvtiers.model.errors import StoreTransient
from kvtiers.runtime.pools import WorkerPool


class Lane:
    """`workers` threads that store for one target."""

    def __init__(
        self,
        target: str,
        make_backend: Callable[[], StorageBackend],
        let_go: Callable[[], None],
        *,
        workers: int,
        max_pending: int,
        timeout_s: float,
    ) -> None:
        """`make_backend` is called once, on the first thread that needs it; `let_go` when the last has ended."""
        self.target: Final = target
        self.pending = 0
        """Tasks accepted and not ended; guarded by the engine's lock."""
        self.pool: Final = WorkerPool(f"offload-{target}", workers, max_pending)
        self._make_backend = make_backend
        self._let_go = let_go
        self._backend: StorageBackend | None = None
        self._lock = threading.Lock()
        self._loop: Final = LoopThread(f"offload-{target}-loop")
        self._timeout_s = timeout_s

    @property
    def backend(self) -> StorageBackend:
        """Who stores; made if nobody needed it before. Raises what making it raises."""
        with self._lock:
            if self._backend is None:
                self._backend = self._make_backend()
            return self._backend

    def store(self, key: str, payload: Payload) -> None:
        """On a thread of the lane; raises whatever the backend raises, StoreTransient if it refuses, PayloadChanged."""
        backend = self.backend
        if isinstance(backend, LocalBackend):
            backend.put_now(key, payload.view, payload.digest)
            return
        data = payload.snapshot()
        if not self._loop.run(lambda: backend.write(key, data), self._timeout_s):
            raise StoreTransient(f"the {self.target} backend refused {key!r}")

    def close(self, timeout: float) -> bool:
        """Drop what waits, let what runs end; idempotent. False if something was still running at the time-out."""
        deadline = time.monotonic() + timeout
        ended = self.pool.close(timeout)
        ended = self._loop.close(max(0.0, deadline - time.monotonic())) and ended
        if ended:
            self._let_go()
        return ended
