"""A worker's side: copies between its blocks and the arena, in the background, each reported exactly once.

Two threads: loads, which a request waits for, never stand behind stores. The engine's thread only hands jobs over and asks what has
ended. A job is reported when no thread touches its blocks any more, whether it was copied or not; an arena that is not mapped any
more (the service has ended, or was replaced) makes it a failed one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, Protocol

from kvtiers.integrations.vllm.blocks import Blocks, Bytes
from kvtiers.integrations.vllm.messages import ChunkCopy, CopyReport, LoadJob, StepJobs, StoreJob

_log = logging.getLogger(__name__)
_END_WITHIN_S: Final = 10.0
_CONNECT_WITHIN_S: Final = 1.0
_LOOK_AGAIN_S: Final = 0.005


class Mapped(Protocol):
    """What a worker needs of its `NodeClient`."""

    @property
    def connected(self) -> bool:
        """Whether an arena is mapped."""
        ...

    def view(self, arena: bytes, offset: int, nbytes: int) -> Bytes | None:
        """A slot's bytes; None if that arena is not mapped."""
        ...

    def step(self) -> int:
        """Send and take what there is."""
        ...


class WorkerSide:
    """One rank's copies."""

    def __init__(
        self, client: Mapped, blocks: Blocks, *, rank: int, part_bytes: int, block_bytes: int
    ) -> None:
        self._client = client
        self._blocks = blocks
        self._rank = rank
        self._part_bytes = part_bytes
        self._block_bytes = block_bytes
        self._lock = threading.Lock()
        self._report = CopyReport()
        self._loaded: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._awaited: set[bytes] = set()
        """Arenas that were waited for once, and in vain."""
        # no bound of their own: loads wait in blocks that were allocated for them, stores in blocks that are pinned, up to a share
        self._loads: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._stores: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(queue,), name=f"kvtiers-vllm-{name}", daemon=True)
            for name, queue in (("loads", self._loads), ("stores", self._stores))
        ]
        for thread in self._threads:
            thread.start()

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def begin_loads(self, jobs: StepJobs) -> None:
        """Hand over what requests wait for."""
        self._client.step()
        for job in jobs.loads:
            self._loads.put(lambda job=job: self._load(job))  # type: ignore[misc]

    def begin_stores(self, jobs: StepJobs) -> None:
        """Hand over what is to be kept; after the step's forward pass was issued."""
        if not jobs.stores:
            return
        fence = self._blocks.fence()
        for job in jobs.stores:
            self._stores.put(lambda job=job: self._store(job, fence))  # type: ignore[misc]

    def take_loaded(self) -> tuple[set[str], set[int]]:
        """Requests whose loads have ended since the last call, and blocks among theirs that were not filled."""
        with self._lock:
            loaded, self._loaded = self._loaded, set()
            bad, self._bad_blocks = self._bad_blocks, set()
        return loaded, bad

    def take_report(self) -> CopyReport | None:
        """What else has ended since the last call."""
        with self._lock:
            if self._report.is_empty:
                return None
            report, self._report = self._report, CopyReport()
        return report

    def wait_idle(self, timeout: float) -> bool:
        """Wait for everything handed over. False at the time-out."""
        ended = [threading.Event() for _ in range(2)]
        for queue, event in zip((self._loads, self._stores), ended, strict=True):
            queue.put(event.set)
        deadline = time.monotonic() + timeout
        return all(event.wait(max(0.0, deadline - time.monotonic())) for event in ended)

    def close(self, timeout: float = _END_WITHIN_S) -> bool:
        """End what was handed over. False if a copy had not ended in time."""
        for queue in (self._loads, self._stores):
            queue.put(None)
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # --- the copying threads ------------------------------------------------------------------------------------------

    def _load(self, job: LoadJob) -> None:
        began, nbytes, bad = time.perf_counter(), 0, set[int]()
        for chunk in job.chunks:
            # what comes behind a hole is of no use: the engine computes from there on
            if bad or not self._copied(job.arena, chunk, self._fill):
                bad.update(chunk.blocks)
            else:
                nbytes += self._block_bytes * len(chunk.blocks)
        with self._lock:
            self._loaded.add(job.request_id)
            self._bad_blocks |= bad
            self._report.load_seconds += time.perf_counter() - began
            self._report.load_bytes += nbytes

    def _store(self, job: StoreJob, fence: Any) -> None:
        began, nbytes, good = time.perf_counter(), 0, True

        def keep(chunk: ChunkCopy, part: Bytes) -> None:
            self._blocks.read(chunk.blocks, part, chunk.first, fence)

        for chunk in job.chunks:
            good = good and self._copied(job.arena, chunk, keep)
            nbytes += self._block_bytes * len(chunk.blocks) if good else 0
        with self._lock:
            self._report.stored[job.number] = 1
            if not good:
                self._report.failed.add(job.number)
            self._report.store_seconds += time.perf_counter() - began
            self._report.store_bytes += nbytes

    def _fill(self, chunk: ChunkCopy, part: Bytes) -> None:
        self._blocks.write(part, chunk.first, chunk.blocks)

    def _copied(self, arena: bytes, chunk: ChunkCopy, copy: Callable[[ChunkCopy, Bytes], None]) -> bool:
        try:
            part = self._part(arena, chunk.offsets[self._rank])
            if part is None:
                return False
            copy(chunk, part)
        except Exception:  # noqa: BLE001 - the request is computed instead, whatever went wrong
            _log.exception("a chunk could not be copied; this is a bug in kvtiers")
            return False
        return True

    def _part(self, arena: bytes, offset: int) -> Bytes | None:
        """A rank that has just been started may still have to connect, which its engine's thread does; a dead service is waited for once."""
        deadline = time.monotonic() + (0.0 if arena in self._awaited else _CONNECT_WITHIN_S)
        while True:
            part = self._client.view(arena, offset, self._part_bytes)
            if part is not None or self._client.connected:
                return part
            if time.monotonic() >= deadline:
                self._awaited.add(arena)
                return None
            time.sleep(_LOOK_AGAIN_S)


def _work(queue: SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := queue.get()) is not None:
        job()
