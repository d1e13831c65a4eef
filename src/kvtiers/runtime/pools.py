"""Worker threads with a bounded queue in order of priority, one pool for each store and one for memory.

One pool per store, so that a hung disk starves nobody else. The threads are our own daemons: one that is stuck in a system
call keeps neither `close()` nor the process waiting. With two or more threads one is kept free of background work, so that a
load never waits behind a queue of slow writes. A full queue refuses at once.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from kvtiers.core.messages import OpId, Priority

_log = logging.getLogger(__name__)


_MAX_LOADS: Final = 65_536
"""Loads that may wait beyond `max_queued`: what they hold is bounded already (staging share, leases), and a queue full of
background writes must not turn a hit into a miss."""


class Job(NamedTuple):
    """One piece of work. `refuse` is called instead of `run` if it is dropped from the queue; both must not raise."""

    op: OpId
    priority: Priority
    run: Callable[[], None]
    drop: Callable[[], None]


class PoolHealth(NamedTuple):
    """How a pool is doing."""

    name: str
    workers: int
    busy: int
    queued: int
    refused: int
    errors: int
    """Jobs that raised: bugs, each of them logged."""


class WorkerPool:
    """`workers` daemon threads over one queue of at most `max_queued` jobs, loads not counted."""

    def __init__(self, name: str, workers: int, max_queued: int) -> None:
        self.name = name
        self._max_queued = max_queued
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._heap: list[tuple[Priority, int, Job]] = []
        self._sequence = 0
        self._busy = 0
        self._busy_background = 0
        self._background_limit = max(1, workers - 1)
        self._refused = 0
        self._errors = 0
        self._closing = False
        self._threads = [
            threading.Thread(target=self._loop, name=f"kvtiers-{name}-{index}", daemon=True)
            for index in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> bool:
        """Queue a job; False if the queue is full or the pool is closing (then neither `run` nor `drop` is called)."""
        with self._lock:
            room = self._max_queued + (_MAX_LOADS if job.priority is Priority.LOAD else 0)
            if self._closing or len(self._heap) >= room:
                self._refused += 1
                return False
            self._sequence += 1
            heapq.heappush(self._heap, (job.priority, self._sequence, job))
            self._work.notify()
            return True

    def cancel(self, op: OpId) -> bool:
        """Drop a job that has not begun. O(queue)."""
        with self._lock:
            for index, (_, _, job) in enumerate(self._heap):
                if job.op == op:
                    self._heap[index] = self._heap[-1]
                    self._heap.pop()
                    heapq.heapify(self._heap)
                    break
            else:
                return False
        job.drop()
        return True

    def wait_idle(self, timeout: float) -> bool:
        """Wait until nothing is queued or running; False at the time-out."""
        deadline = time.monotonic() + timeout
        with self._lock:
            while self._heap or self._busy:
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._idle.wait(left)
            return True

    def close(self, timeout: float) -> bool:
        """Drop what is queued, let running jobs end; False if some had not ended at the time-out (their threads are daemons)."""
        with self._lock:
            self._closing = True
            dropped = [job for _, _, job in self._heap]
            self._heap.clear()
            self._work.notify_all()
        for job in dropped:
            job.drop()
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def health(self) -> PoolHealth:
        """A snapshot."""
        with self._lock:
            return PoolHealth(
                self.name, len(self._threads), self._busy, len(self._heap), self._refused, self._errors
            )

    def _loop(self) -> None:
        while True:
            job = self._next()
            if job is None:
                return
            try:
                job.run()
            except Exception:  # noqa: BLE001 - a worker survives whatever a job does; it is logged and counted
                with self._lock:
                    self._errors += 1
                _log.exception("a job of the pool %r failed; this is a bug in kvtiers", self.name)
            finally:
                background = job.priority is not Priority.LOAD
                del job  # a kept closure would keep its buffers alive while the thread waits
                with self._lock:
                    self._busy -= 1
                    self._busy_background -= background
                    if background and self._heap:
                        self._work.notify()
                    if not self._heap and not self._busy:
                        self._idle.notify_all()

    def _next(self) -> Job | None:
        with self._lock:
            while True:
                if self._heap and (
                    self._heap[0][0] is Priority.LOAD or self._busy_background < self._background_limit
                ):
                    _, _, job = heapq.heappop(self._heap)
                    self._busy += 1
                    self._busy_background += job.priority is not Priority.LOAD
                    if self._heap:
                        self._work.notify()
                    return job
                if self._closing and not self._heap:
                    return None
                self._work.wait()
