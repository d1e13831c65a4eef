"""One cache: an arena, a core, its stores, and the threads that bring things from one to the other.

One mutex guards the core; any thread may call. Under it there is no I/O, no logging, no callback: what the core wants done is
taken out and handed to the offload engine after the mutex is free, answers are delivered after it is free, and what the engine
refuses comes back as completions. No call waits for a disk or for another call's I/O.

A ticker thread lets time pass: deadlines of loads, breakers, writes put off, space reports. A second thread compares the disk
with the index after the start. Both are daemons.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from kvtiers.core.core import Core
from kvtiers.core.eviction import Evicted
from kvtiers.core.messages import Completion, Intent, MappersGone, News, SessionDied, SessionId, SpaceId
from kvtiers.core.tickets import LoadTicket, Match, StoreTicket
from kvtiers.memory.arena import Arena
from kvtiers.memory.mapping import CloseOutcome
from kvtiers.model.errors import CacheClosed, DeadlineExceeded, DoesNotFit
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import Parts
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.runtime.audit import audit
from kvtiers.runtime.familiar import Familiar
from kvtiers.runtime.latency import Latencies
from kvtiers.runtime.loads import StagedLoad
from kvtiers.runtime.offload import OffloadEngine, Shape
from kvtiers.runtime.plan import NodePlan, StorePlan
from kvtiers.runtime.pools import WorkerPool
from kvtiers.runtime.tending import Tender
from kvtiers.runtime.transfer import ArenaSlots, PoolSlots, SlotMemory
from kvtiers.stores.guard import Guard, Operation, OpOutcome

_log = logging.getLogger(__name__)
T = TypeVar("T")
_MIB = 1 << 20
_LAST_WAIT_S = 1.0
"""What threads get to end in when the time for closing is used up."""


class CacheNode:
    """Holds everything that outlives a session. `TieredCache` is one session on it."""

    def __init__(self, plan: NodePlan, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Takes the memory, opens the stores, learns what they hold. Raises DoesNotFit, DirectoryInUse, StoreUnavailable."""
        self.plan = plan
        self._clock = clock
        self._lock = threading.Lock()
        self._quiet = threading.Condition(self._lock)
        self._core = Core(plan.core)
        self._loads: dict[int, StagedLoad] = {}
        self._answers: deque[StagedLoad] = deque()
        self._intents: deque[Intent] = deque()
        self._refused: deque[Completion] = deque()
        self._draining: set[int] = set()
        """Threads that are handing out at this moment."""
        self._closing = False
        self._closed = threading.Event()
        self.latencies = Latencies()
        self.familiar = Familiar()
        self._guards: dict[Tier, Guard] = {}
        with ExitStack() as undo:
            self.arena = Arena(
                max(plan.core.cpu.capacity, 1),
                huge_pages=plan.huge_pages,
                lock_memory=plan.lock_memory,
                numa=plan.numa,
            )
            undo.callback(self.arena.close)
            self.device_pool = plan.device_pool() if plan.device_pool is not None else None
            if self.device_pool is not None:
                undo.callback(self.device_pool.close)
            for tier, store in plan.stores.items():
                self._guards[tier] = self._guarded(tier, store)
                self._guards[tier].open()
                undo.callback(self._guards[tier].close)
            _log.info("%s", self.arena.describe())
            self._engine = OffloadEngine(
                arena=self.arena,
                device_pool=self.device_pool,
                memory_pool=WorkerPool("memory", plan.memory_workers, plan.memory_queue),
                stores=self._guards,
                store_pools={
                    tier: WorkerPool(str(tier), store.workers, store.max_queued)
                    for tier, store in plan.stores.items()
                },
                report=self._complete,
                latencies=self.latencies,
                verify_on_hit=plan.verify_on_hit,
            )
            undo.callback(self._engine.close, _LAST_WAIT_S)
            self.memory: dict[Tier, SlotMemory] = {Tier.CPU: ArenaSlots(self.arena)}
            if self.device_pool is not None:
                self.memory[Tier.GPU] = PoolSlots(self.device_pool)
            self._tender = Tender(self, self._guards, plan, clock)
            undo.callback(self._tender.stop, _LAST_WAIT_S)
            self._tender.start()
            undo.pop_all()

    def _guarded(self, tier: Tier, store: StorePlan) -> Guard:
        def observe(operation: Operation, seconds: float, _: OpOutcome) -> None:
            self.latencies.observe(tier, operation, seconds)

        return Guard(store.store, store.guard, clock=self._clock, on_finished=observe)

    # --- sessions -----------------------------------------------------------------------------------------------------

    def open_session(self) -> SessionId:
        """A new client of this node. Raises CacheClosed."""

        def begin(core: Core, _: float) -> SessionId:
            self._check_open()
            return core.open_session()

        return self._run(begin)

    def close_session(self, session: SessionId) -> None:
        """The client has ended and uses no slot any more: its leases go back, loads it still waits for are given up."""
        self.give_up_loads(session)
        self.tell([SessionDied(session), MappersGone(session)])

    def give_up_loads(self, session: SessionId | None = None) -> None:
        """End the loads that are still waiting (of one client, or all): released first, so what they are answered with is nothing."""
        with self._lock:
            waiting = [
                load for load in self._loads.values() if session is None or load.ticket.session == session
            ]
        for load in waiting:
            load.release()
            load.settle()

    def attach(self, namespace: bytes, parts: Parts, *, chunk_tokens: int, itemsize: int) -> SpaceId:
        """Declare a namespace and the shape of its chunks. Raises DoesNotFit if a chunk is too large for the tiers, CacheClosed."""
        self._check_chunk_fits(parts.slot_bytes)

        def declare(core: Core, _: float) -> SpaceId:
            self._check_open()
            space = core.attach(namespace, parts, chunk_tokens)
            self._engine.declare(space, Shape(parts, itemsize))
            return space

        return self._run(declare)

    # --- what clients ask ---------------------------------------------------------------------------------------------

    def lookup(self, space: SpaceId, keys: Sequence[ChunkKey]) -> Match:
        """What a load would find: pure, memory only."""
        with self._lock:
            self._check_open()
            return self._core.lookup(space, keys)

    def open_load(
        self, session: SessionId, space: SpaceId, keys: Sequence[ChunkKey], timeout: float
    ) -> StagedLoad:
        """Begin to stage the longest prefix of `keys`; answered within `timeout` seconds."""

        def begin(core: Core, now: float) -> StagedLoad:
            self._check_open()
            load = StagedLoad(core.open_load(session, space, keys, now, now + timeout), self.release)
            self._loads[load.ticket.id] = load
            return load

        load = self._run(begin)
        if not load.answered:
            self._tender.wake()
        return load

    def release(self, ticket: LoadTicket) -> None:
        """Give a load's leases back (`StagedLoad.release` calls this)."""

        def give_back(core: Core, now: float) -> None:
            core.release(ticket, now)
            self._loads.pop(ticket.id, None)

        self._run(give_back)

    def cut(self, ticket: LoadTicket, index: int) -> None:
        """Chunk `index` of an answered load failed its checksum: the answer ends before it."""
        self._run(lambda core, now: core.cut(ticket, index, now))

    def open_store(
        self, session: SessionId, space: SpaceId, root: ChunkKey, keys: Sequence[ChunkKey], *, first: int = 0
    ) -> StoreTicket:
        """Slots for the chunks `keys[first:]` that are wanted, refusals for the others."""

        def begin(core: Core, now: float) -> StoreTicket:
            self._check_open()
            return core.open_store(session, space, root, keys, now, first)

        return self._run(begin)

    def commit(self, ticket: StoreTicket, indices: Iterable[int] | None = None) -> None:
        """The slots hold their KV."""
        self._run(lambda core, now: core.commit(ticket, now, indices))

    def abort(self, ticket: StoreTicket) -> None:
        """The slots not committed go back."""
        self._run(lambda core, now: core.abort(ticket, now))

    def reattribute(self, ticket: LoadTicket, reason: MissReason) -> None:
        """The caller knows better why an answered load stopped."""
        with self._lock:
            self._core.reattribute(ticket, reason)

    def wait_for(self, space: SpaceId, keys: Sequence[ChunkKey], timeout: float) -> bool:
        """Wait until these chunks have reached their tiers, or were given up; False at the time-out."""
        deadline = time.monotonic() + timeout
        with self._lock:
            while self._core.on_their_way(space, keys):
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._quiet.wait(min(left, 0.1))
        return True

    def evict(self, tier: Tier, target_bytes: int) -> Evicted:
        """Evict until at most so many bytes stay, are on their way out, or may not go; records are deleted in the background."""
        with self._lock:
            self._check_open()
            entries = self._core.stats()["tiers"].get(tier, {}).get("entries", 0)
        total = Evicted(0, 0, 0)
        while True:
            step = self._run(lambda core, now: core.evict(tier, target_bytes, now))
            total = Evicted(*(sum(pair) for pair in zip(total, step, strict=True)))
            # what a store fails to delete, or a tier to take, comes up again: once round is enough
            if (
                step.chunks + step.demoting < self.plan.core.max_hold
                or total.chunks + total.demoting >= entries
            ):
                return total

    def capacity(self, tier: Tier) -> int:
        """Bytes of a tier; 0 for one that is disabled."""
        core = self.plan.core
        settings = {Tier.GPU: core.gpu, Tier.CPU: core.cpu, Tier.DISK: core.disk, Tier.REMOTE: core.remote}[
            tier
        ]
        return (settings.capacity or 0) if settings is not None else 0

    def tell(self, news: Sequence[News]) -> None:
        """News from the stores; a list, or what is taken from a store meanwhile would be taken under the mutex."""
        self._run(lambda core, now: core.tell_all(news, now))

    def tick(self) -> float | None:
        """Let time pass; returns when the next load's deadline is."""
        return self._run(lambda core, now: core.tick(now))

    # --- waiting, closing ---------------------------------------------------------------------------------------------

    def flush(self, timeout: float) -> None:
        """Wait until every accepted store has reached its tiers. Raises DeadlineExceeded."""
        left = self._wait_quiet(timeout)
        if left:
            raise DeadlineExceeded(
                f"{left} background operations had not ended after {timeout} s; they go on. See stats()['async'] and the log"
            )

    def close(self, timeout: float | None = None) -> bool:
        """Write out what only memory holds, as far as the time allows, and let everything go. Idempotent.

        False if something was still running at the time-out: then the arena stays mapped until that has ended; call again to
        ask again.
        """
        timeout = min(self.plan.close_timeout_s if timeout is None else timeout, threading.TIMEOUT_MAX)
        deadline = time.monotonic() + timeout
        with self._lock:
            first, self._closing = not self._closing, True
        if first:
            try:
                self._close(deadline)
            finally:
                self._closed.set()
        elif not self._closed.wait(timeout):
            return False
        return self._engine.close(max(0.0, deadline - time.monotonic()))

    def _close(self, deadline: float) -> None:
        self.give_up_loads()
        if self._guards:
            self._run(lambda core, now: core.drain(now))
            left = self._wait_quiet(max(0.0, deadline - time.monotonic()))
            if left:
                _log.warning("closing with %d background operations unfinished", left)
        self._tender.stop(max(0.0, deadline - time.monotonic()))
        self._tender.remember_order(max(_LAST_WAIT_S / 2, deadline - time.monotonic()))
        self._engine.close(max(_LAST_WAIT_S / 2, deadline - time.monotonic()))
        for guard in self._guards.values():
            guard.close()
        if self.device_pool is not None:
            self.device_pool.close()
        if self.arena.close() is CloseOutcome.LEAKED:
            _log.info("the arena stays mapped until those who still use it have ended")

    # --- what operators ask -------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Tiers, counters, queues and latencies as plain values."""
        with self._lock:
            stats = self._core.stats()
        stats["async"] = self._engine.health()
        stats["latency"] = self.latencies.snapshot()
        stats["arena"] = {
            "nbytes": self.arena.nbytes,
            "page_bytes": self.arena.report.page_bytes,
            "locked": self.arena.report.locked,
        }
        if Tier.GPU in stats["tiers"] and self.device_pool is not None:
            stats["tiers"][Tier.GPU]["simulated"] = self.device_pool.simulated
        for tier, guard in self._guards.items():
            stats["tiers"][tier]["breaker"] = str(guard.state)
            stats["tiers"][tier]["store"] = dict(guard.stats())
        return stats

    def check_integrity(self, timeout: float = 30.0) -> list[str]:
        """Walk index, arena, leases and disk, and return every inconsistency. Waits for background work to end first."""
        with self._lock:
            self._check_open()
        problems = (
            [] if self.wait_settled(timeout) else ["background work goes on: what follows may be its traces"]
        )
        return [*problems, *audit(self)]

    def wait_settled(self, timeout: float) -> bool:
        """Wait until nothing is under way: stores, reads, deletes, and comparing the disk with the index. False at the time-out."""
        deadline = time.monotonic() + timeout
        if not self._tender.reconciled.wait(timeout):
            return False
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or self._wait_quiet(left) or not self._engine.wait_idle(deadline - time.monotonic()):
                return False
            with self._lock:  # what ended last may have begun something else
                if not self._core.stats()["operations"] and not self._core.unfinished:
                    return True

    def inspect(self, look: Callable[[Core], T]) -> T:
        """Read the core under the mutex; `look` must be quick and change nothing."""
        with self._lock:
            return look(self._core)

    @property
    def guards(self) -> dict[Tier, Guard]:
        """The stores, guarded."""
        return self._guards

    @property
    def engine(self) -> OffloadEngine:
        """The offload engine."""
        return self._engine

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing

    # --- inside -------------------------------------------------------------------------------------------------------

    def _run(self, action: Callable[[Core, float], T]) -> T:
        try:
            with self._lock:
                return action(self._core, self._clock())
        finally:
            self._drain()

    def _drain(self) -> None:
        """With the mutex free: deliver answers and hand out intents; those refused come back as completions.

        All of them stand in queues of the node and are taken one by one, by whichever thread: an interrupt (Ctrl-C in a notebook)
        in the middle loses one at most, and the next call or tick goes on. What a callback does comes out of the loop it was
        called from, not out of a deeper one.
        """
        me = threading.get_ident()
        if me in self._draining:
            return
        self._draining.add(me)
        try:
            while self._collect():
                while (load := _pop(self._answers)) is not None:
                    load.settle()
                while (intent := _pop(self._intents)) is not None:
                    self._refused.extend(self._engine.submit((intent,)))
        finally:
            self._draining.discard(me)

    def _collect(self) -> bool:
        """Take from the core what is to be done; False if nothing is."""
        with self._lock:
            while self._refused:
                self._core.complete(self._refused.popleft(), self._clock())
            self._intents.extend(self._core.intents())
            self._answers.extend(self._answered())
            self._quiet.notify_all()
            return bool(self._intents or self._answers)

    def _complete(self, completion: Completion) -> None:
        self._run(lambda core, now: core.complete(completion, now))

    def _answered(self) -> list[StagedLoad]:
        loads = (self._loads.pop(ticket.id, None) for ticket in self._core.answered())
        return [load for load in loads if load is not None]

    def _wait_quiet(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        with self._lock:
            while self._core.unfinished:
                left = deadline - time.monotonic()
                if left <= 0:
                    return self._core.unfinished
                self._quiet.wait(min(left, 0.1))
        return 0

    def _check_open(self) -> None:
        if self._closing:
            raise CacheClosed("the cache is closed: open a new one")

    def _check_chunk_fits(self, slot_bytes: int) -> None:
        core = self.plan.core
        problems = []
        if core.cpu.ceiling and slot_bytes > core.cpu.ceiling:
            problems.append(
                f"one chunk takes {slot_bytes / _MIB:.1f} MiB, the CPU tier keeps {core.cpu.ceiling / _MIB:.1f} MiB"
            )
        if self._guards and slot_bytes > core.cpu.staging:
            problems.append(
                f"one chunk takes {slot_bytes / _MIB:.1f} MiB, the arena's share for staging loads is "
                f"{core.cpu.staging / _MIB:.1f} MiB (what lies above storage.cpu.eviction_threshold)"
            )
        if problems:
            raise DoesNotFit(
                [
                    *problems,
                    "set KVTIERS_STORAGE__CPU__BUFFER_SIZE higher, or KVTIERS_STORAGE__CHUNK_TOKENS lower",
                ],
                source="the model's chunks do not fit the cache",
            )


def _pop(queue: deque[T]) -> T | None:
    """The first one, or None: other threads take from it too."""
    try:
        return queue.popleft()
    except IndexError:
        return None
