"""`AsyncOffloadEngine`: stores KV in a tier in the background, for LMCache-compatible programs.

`submit` never waits: not for a worker, not for a storage, not for room in a queue. What became of a task is told by `result`, from any
event loop. A failed task changes nothing: the chunk is where it was, and its owner submits it again at its next touch or eviction
(the engine keeps no data of tasks that have ended).

Threads: any thread, any event loop. Work runs on daemon threads, `max_workers` for each target, started when first used.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Final, Self
from uuid import uuid4

from kvtiers.compat.answers import Answer
from kvtiers.compat.backend import StorageBackend
from kvtiers.compat.collected import when_collected
from kvtiers.compat.errors import (
    NoBackend,
    OffloadQueueFull,
    OffloadRetryableError,
    UnknownTask,
)
from kvtiers.compat.memory_backend import MemoryBackend
from kvtiers.compat.metrics import OffloadMetrics
from kvtiers.compat.offload_lane import Lane
from kvtiers.compat.payload import MemoryObj, Payload
from kvtiers.core.messages import OpId, Priority
from kvtiers.model.errors import CacheClosed, ConfigError, UnknownTier
from kvtiers.model.tiers import Tier
from kvtiers.runtime.pools import Job

_log = logging.getLogger(__name__)

_TARGETS: Final = (Tier.CPU, Tier.DISK, Tier.REMOTE)
_RESULT_TIMEOUT_S: Final = 60.0
_REMEMBERED: Final = 1000
"""Ended tasks whose outcome can be asked for, at least; never fewer than can be under way at once."""
_LAST_WAIT_S: Final = 0.5
"""What idle threads get to end in when the time for closing is used up."""
_HOW: Final = {
    Tier.DISK: "backends={'disk': DiskBackend('/path/to/cache')}",
    Tier.REMOTE: "backends={'remote': <your StorageBackend>}",
}


class OffloadTask:
    """A task under way or ended; awaiting it is `engine.result(task.id)`. It keeps no data."""

    __slots__ = ("_outcome", "id", "key", "target")

    def __init__(self, task_id: str, key: str, target: str) -> None:
        self.id = task_id
        self.key = key
        self.target = target
        self._outcome: Answer[Exception | None] = Answer()

    async def wait(self, timeout: float) -> None:  # noqa: ASYNC109 - every wait has a deadline
        """Returns when the data is stored. Raises OffloadRetryableError, DeadlineExceeded."""
        cause = await self._outcome.wait(timeout, self.id)
        if cause is not None:
            raise OffloadRetryableError(self.id, self.key, self.target) from cause

    def end(self, cause: Exception | None) -> None:
        """For the engine: it has ended."""
        self._outcome.succeed(cause)

    def __await__(self) -> Generator[Any, None, None]:
        return self.wait(_RESULT_TIMEOUT_S).__await__()


class AsyncOffloadEngine:
    """Offloads to "cpu" (memory of its own unless given), "disk" and "remote" (as given in `backends`)."""

    def __init__(
        self,
        max_workers: int = 4,
        queue_size: int = 1000,
        *,
        backends: Mapping[str, StorageBackend] | None = None,
        source: Callable[[str], MemoryObj] | None = None,
        cpu_pool_gb: float = 0.25,
        write_timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        new_id: Callable[[], str] = lambda: uuid4().hex[:8],
    ) -> None:
        """For each target `max_workers` tasks run and `queue_size` wait.

        `source`: gives a key's data, for `offload`. `cpu_pool_gb`: GiB of the "cpu" target's memory, taken when first used.
        `write_timeout_s`: how long a backend that is not ours may take. Backends given stay their owner's to close.
        """
        problems = [
            f"{name} must be above 0, got {value}"
            for name, value in (
                ("max_workers", max_workers),
                ("queue_size", queue_size),
                ("cpu_pool_gb", cpu_pool_gb),
                ("write_timeout_s", write_timeout_s),
            )
            if value <= 0
        ]
        if problems:
            raise ConfigError(problems, source="AsyncOffloadEngine")
        self._backends = {_target_of(name): backend for name, backend in (backends or {}).items()}
        self._max_workers = max_workers
        self._max_pending = max_workers + queue_size
        self._remembered = max(_REMEMBERED, len(_TARGETS) * self._max_pending)
        self._source = source
        self._cpu_pool_gb = cpu_pool_gb
        self._write_timeout_s = write_timeout_s
        self._clock = clock
        self._new_id = new_id
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._lanes: dict[Tier, Lane] = {}
        self._pending: dict[str, OffloadTask] = {}
        self._ended: OrderedDict[str, OffloadTask] = OrderedDict()
        self._closing = False
        self.metrics: Final = OffloadMetrics()
        self._keep = when_collected(self, partial(_close_all, self._lanes, _LAST_WAIT_S))

    # --- offloading ---------------------------------------------------------------------------------------------------

    async def submit(self, key: str, data: MemoryObj, target_tier: str) -> str:
        """Begin to store `data` under `key`; returns "offload_" and 8 hex digits, at once.

        Leave `data` alone until the task has ended: if it changes on the way, the task fails. Raises UnknownTier, NoBackend,
        LayoutMismatch for what is no contiguous buffer, OffloadQueueFull, CacheClosed.
        """
        lane = self._lane(_target_of(target_tier))
        payload = Payload(data)
        try:
            task = self._accept(key, lane)
        except BaseException:
            payload.let_go()
            raise
        # the only kind of work there is, so no worker is kept free for another: it runs at the first priority
        run, drop = partial(self._run, task, payload, lane), partial(self._drop, task, payload, lane)
        if not lane.pool.submit(Job(OpId(0), Priority.LOAD, run, drop)):
            drop()
        return task.id

    async def result(self, task_id: str, timeout: float = _RESULT_TIMEOUT_S) -> None:  # noqa: ASYNC109 - every wait has a deadline
        """Wait until the task has ended; returns if the data is stored. May be asked again, for the last 1,000 tasks or more.

        Raises OffloadRetryableError if it failed, DeadlineExceeded, UnknownTask.
        """
        with self._lock:
            task = self._pending.get(task_id) or self._ended.get(task_id)
        if task is None:
            raise UnknownTask(
                f"no task {task_id!r} is under way or among the last {self._remembered} that ended: ask earlier"
            )
        await task.wait(timeout)

    async def offload(self, key: str, target_tier: str) -> str:
        """Store what `source` gives for `key`, and wait for it: the hook that `TieredLRUPolicy.async_offloader` calls.

        Raises as `submit` and `result`, and whatever `source` raises.
        """
        if self._source is None:
            raise NoBackend(
                "offload(key, tier) needs to know where the data is: pass source=<function from key to data>"
            )
        task_id = await self.submit(key, self._source(key), target_tier)
        await self.result(task_id)
        return task_id

    async def flush(self, timeout: float = _RESULT_TIMEOUT_S) -> None:  # noqa: ASYNC109 - as above
        """Wait until all tasks submitted so far have ended, well or not. Raises DeadlineExceeded."""
        deadline = time.monotonic() + timeout
        for task in self.pending_tasks.values():
            try:
                await task.wait(max(0.0, deadline - time.monotonic()))
            except OffloadRetryableError:
                continue

    # --- looking ------------------------------------------------------------------------------------------------------

    async def check_health(self) -> dict[str, Any]:
        """`queue_size` (tasks waiting), `pending_tasks` (waiting or running), `executor_workers` (a target), `metrics`."""
        with self._lock:
            pools = [lane.pool for lane in self._lanes.values()]
            pending = len(self._pending)
        return {
            "queue_size": sum(pool.health().queued for pool in pools),
            "pending_tasks": pending,
            "executor_workers": self._max_workers,
            "metrics": self.metrics.to_dict(),
        }

    @property
    def pending_tasks(self) -> dict[str, OffloadTask]:
        """The tasks under way now, each awaitable."""
        with self._lock:
            return dict(self._pending)

    def backend(self, target_tier: str) -> StorageBackend:
        """Who stores for a target: to read back what was offloaded. Raises UnknownTier, NoBackend."""
        return self._lane(_target_of(target_tier)).backend

    # --- life ---------------------------------------------------------------------------------------------------------

    def close(self, timeout: float = 10.0) -> bool:
        """Let tasks end for as long as `timeout`; those that have not begun by then fail. Idempotent, blocks.

        False if something was still running: its thread is a daemon, and ends when its storage lets it.
        """
        deadline = time.monotonic() + timeout
        self._keep()
        with self._lock:
            self._closing = True
            lanes = list(self._lanes.values())
        for lane in lanes:
            lane.pool.wait_idle(max(0.0, deadline - time.monotonic()))
        return _close_all(self._lanes, max(_LAST_WAIT_S, deadline - time.monotonic()))

    async def aclose(self, timeout: float = 10.0) -> bool:  # noqa: ASYNC109 - as above
        """`close`, without blocking the event loop."""
        closed: Answer[bool] = Answer()

        def close() -> None:
            try:
                closed.succeed(self.close(timeout))
            except Exception as error:  # noqa: BLE001 - told to whoever waits
                closed.fail(error)

        threading.Thread(target=close, name="kvtiers-offload-close", daemon=True).start()
        return await closed.wait(timeout + 5.0, "closing the offload engine")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _lane(self, target: Tier) -> Lane:
        with self._lock:
            self._check_open()
            lane = self._lanes.get(target)
            if lane is None:
                make, let_go = self._storage_for(target)
                lane = self._lanes[target] = Lane(
                    str(target),
                    make,
                    let_go,
                    workers=self._max_workers,
                    max_pending=self._max_pending,
                    timeout_s=self._write_timeout_s,
                )
            return lane

    def _storage_for(self, target: Tier) -> tuple[Callable[[], StorageBackend], Callable[[], None]]:
        """How to get at it, and how to let it go at the end."""
        given = self._backends.get(target)
        if given is not None:
            return lambda: given, _nothing
        if target is not Tier.CPU:
            raise NoBackend(f"nothing stores for the {target} tier: AsyncOffloadEngine({_HOW[target]})")
        own = _OwnMemory(self._cpu_pool_gb)
        return own.make, own.close

    def _accept(self, key: str, lane: Lane) -> OffloadTask:
        with self._lock:
            self._check_open()
            if lane.pending >= self._max_pending:
                raise OffloadQueueFull(
                    f"{lane.pending} offloads to the {lane.target} tier are under way, no more than max_workers + "
                    f"queue_size={self._max_pending} may be; the chunk stays where it was"
                )
            task_id = f"offload_{self._new_id()}"
            while task_id in self._pending or task_id in self._ended:
                task_id = f"offload_{self._new_id()}"
            task = self._pending[task_id] = OffloadTask(task_id, key, lane.target)
            lane.pending += 1
        return task

    def _check_open(self) -> None:
        if self._closing:
            raise CacheClosed("the offload engine is closed: make a new one")
        if os.getpid() != self._owner:
            raise CacheClosed("the offload engine was made before this process was forked: make one here")

    def _run(self, task: OffloadTask, payload: Payload, lane: Lane) -> None:
        started = self._clock()
        try:
            lane.store(task.key, payload)
        except Exception as error:  # noqa: BLE001 - backends are other people's code; it is logged, counted and told
            _log.warning(
                "%s of %r to %s failed: %s: %s", task.id, task.key, task.target, type(error).__name__, error
            )
            self._end(task, payload, lane, _without_frames(error))
        else:
            self.metrics.record_success(task.target, self._clock() - started)
            self._end(task, payload, lane, None)

    def _drop(self, task: OffloadTask, payload: Payload, lane: Lane) -> None:
        self._end(task, payload, lane, CacheClosed("the offload engine was closed before this began"))

    def _end(self, task: OffloadTask, payload: Payload, lane: Lane, error: Exception | None) -> None:
        """Everything is in order before whoever waits is told."""
        payload.let_go()
        if error is not None:
            self.metrics.record_failure(task.target, error)
        with self._lock:
            lane.pending -= 1
            del self._pending[task.id]
            self._ended[task.id] = task
            while len(self._ended) > self._remembered:
                self._ended.popitem(last=False)
        task.end(error)


class _OwnMemory:
    """The "cpu" target's memory when nobody gave any."""

    def __init__(self, pool_size_gb: float) -> None:
        self._pool_size_gb = pool_size_gb
        self._backend: MemoryBackend | None = None

    def make(self) -> MemoryBackend:
        self._backend = MemoryBackend(pool_size_gb=self._pool_size_gb)
        return self._backend

    def close(self) -> None:
        if self._backend is not None:
            self._backend.close()


def _nothing() -> None:
    """What was given stays its owner's to close."""


def _target_of(name: str) -> Tier:
    if name not in _TARGETS:
        raise UnknownTier(f"can't offload to {name!r}: the targets are {', '.join(_TARGETS)}")
    return Tier(name)


def _close_all(lanes: Mapping[Tier, Lane], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    ended = [lane.close(max(0.0, deadline - time.monotonic())) for lane in list(lanes.values())]
    return all(ended)


def _without_frames(error: Exception) -> Exception:
    """The error and those behind it without their tracebacks: what is remembered must not keep the data that it failed with."""
    links: list[BaseException] = []
    ahead: list[BaseException | None] = [error]
    while ahead:
        link = ahead.pop()
        if link is not None and link not in links:
            links.append(link)
            ahead += [link.__cause__, link.__context__]
    for link in links:
        link.__traceback__ = None
    return error
