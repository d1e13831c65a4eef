"""One cache: an arena, a core, its stores, and the threads that bring things from one to the other.

One mutex guards the core (`shared_core`); any thread may call. No call waits for a disk or for another call's I/O: what the core
wants done goes to the offload engine when the mutex is free.

A ticker thread lets time pass: deadlines of loads, breakers, writes put off, space reports. A second thread compares the disk
with the index after the start. Both are daemons.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from kvtiers.core.core import Core
from kvtiers.core.eviction import Evicted
from kvtiers.core.messages import MappersGone, News, SessionDied, SessionId, SpaceId
from kvtiers.core.tickets import LoadTicket, Match, StoreTicket
from kvtiers.memory.arena import Arena
from kvtiers.memory.mapping import CloseOutcome
from kvtiers.memory.numa import borders, segment_near
from kvtiers.model.errors import CacheClosed, DeadlineExceeded, InvalidArgument
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import Parts
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.runtime.abandoned import Abandoned
from kvtiers.runtime.at_exit import close_at_exit
from kvtiers.runtime.audit import audit
from kvtiers.runtime.familiar import Familiar
from kvtiers.runtime.forked import ParentsLock, left_to_the_parent
from kvtiers.runtime.guarded_stores import open_stores
from kvtiers.runtime.latency import Latencies
from kvtiers.runtime.loads import StagedLoad
from kvtiers.runtime.long_calls import LongCalls
from kvtiers.runtime.node_stats import node_stats
from kvtiers.runtime.offload import OffloadEngine, Shape
from kvtiers.runtime.pinning import ArenaPinning
from kvtiers.runtime.plan import NodePlan
from kvtiers.runtime.pools import WorkerPool
from kvtiers.runtime.shared_core import SharedCore
from kvtiers.runtime.tending import Tender
from kvtiers.runtime.transfer import ArenaSlots, PoolSlots, SlotMemory
from kvtiers.runtime.uninterrupted import Uninterrupted
from kvtiers.stores.guard import Guard

_log = logging.getLogger(__name__)
T = TypeVar("T")
_LAST_WAIT_S = 1.0
"""What threads get to end in when the time for closing is used up."""


class CacheNode:
    """Holds everything that outlives a session. `TieredCache` is one session on it."""

    def __init__(self, plan: NodePlan, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Takes the memory, opens the stores, learns what they hold. Raises DoesNotFit, DirectoryInUse, StoreUnavailable."""
        self.plan = plan
        self._clock = clock
        self._closing = False
        self._closed = threading.Event()
        self._disowned = False
        self.abandoned = Abandoned()
        self.latencies = Latencies()
        self.latencies.expect(Tier.CPU, "seal", "stage")
        self.familiar = Familiar()
        with ExitStack() as undo:
            self.arena = Arena(
                max(plan.core.cpu.capacity, 1),
                huge_pages=plan.huge_pages,
                lock_memory=plan.lock_memory,
                numa=plan.numa,
            )
            undo.callback(self.arena.close)
            core = Core(
                replace(
                    plan.core,
                    cpu=replace(plan.core.cpu, segments=borders(self.arena.segments, plan.core.cpu.capacity)),
                )
            )
            self._core = SharedCore(core, clock, lambda intent: self._engine.submit((intent,)))
            self._long = LongCalls(self._core, plan.core.max_hold, self._check_open)
            self.device_pool = plan.device_pool() if plan.device_pool is not None else None
            if self.device_pool is not None:
                undo.callback(self.device_pool.close)
            self._pinning: ArenaPinning | None = None
            self._guards = open_stores(plan, self.arena, self.latencies, clock, undo)
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
                report=self._core.complete,
                latencies=self.latencies,
                shared=plan.shared,
                verify_on_hit=plan.verify_on_hit,
            )
            undo.callback(self._engine.close, _LAST_WAIT_S)
            self.memory: dict[Tier, SlotMemory] = {Tier.CPU: ArenaSlots(self.arena)}
            if self.device_pool is not None:
                self.memory[Tier.GPU] = PoolSlots(self.device_pool)
            if self.device_pool is not None and not self.device_pool.simulated:
                self._pinning = ArenaPinning(self.arena, self.device_pool)
                undo.callback(self._pinning.close, _LAST_WAIT_S)
            self._tender = Tender(self, self._guards, plan, clock)
            undo.callback(self._tender.stop, _LAST_WAIT_S)
            self._tender.start()
            undo.pop_all()
        left_to_the_parent(self)
        close_at_exit(self)

    # --- sessions -----------------------------------------------------------------------------------------------------

    def open_session(self, pid: int = 0) -> SessionId:
        """A new client of this node: process `pid`, whose slots lie on its NUMA node where they can (0: this one). Raises CacheClosed."""
        near = segment_near(self.arena.segments, pid)

        def begin(core: Core, _: float) -> SessionId:
            self._check_open()
            return core.open_session(near)

        return self._core.run(begin)

    def close_session(self, session: SessionId) -> None:
        """The client has ended and uses no slot any more: its leases go back, loads it still waits for are given up."""
        self.give_up_loads(session)
        self.tell([SessionDied(session), MappersGone(session)])

    def let_go_of_abandoned(self) -> None:
        """Close what was collected unclosed (`abandoned`). For the ticker."""
        self.abandoned.let_go(self)

    def give_up_loads(self, session: SessionId | None = None) -> None:
        """End the loads that are still waiting (of one client, or all): released first, so what they are answered with is nothing."""
        waiting = self._core.look(
            lambda _: [
                load
                for load in self._core.loads.values()
                if session is None or load.ticket.session == session
            ]
        )
        for load in waiting:
            load.release()
            load.settle()

    def attach(
        self,
        namespace: bytes,
        parts: Parts,
        *,
        chunk_tokens: int,
        itemsize: int,
        session: SessionId | None = None,
    ) -> SpaceId:
        """Declare a namespace and the shape of its chunks. Raises DoesNotFit if a chunk is too large for the tiers, CacheClosed.

        It is known until the session detaches or ends, and no chunk of it is left; with None as long as the node is.
        """
        self.plan.check_chunk_fits(parts)
        self.plan.check_slots_fit(parts, max(one.nbytes for one in self.arena.segments))

        def declare(core: Core, _: float) -> SpaceId:
            self._check_open()
            space = core.attach(namespace, parts, chunk_tokens, session)
            self._engine.declare(space, Shape(namespace, parts, itemsize))
            return space

        return self._core.run(declare)

    def detach(self, session: SessionId, space: SpaceId) -> None:
        """The session asks for nothing of that namespace any more."""
        self._core.run(lambda core, _: core.detach(session, space))

    # --- what clients ask ---------------------------------------------------------------------------------------------

    def lookup(self, space: SpaceId, keys: Sequence[ChunkKey]) -> Match:
        """What a load would find: pure, memory only. Of a long chain some may have gone by the time the rest is looked at."""
        return self._long.lookup(space, keys)

    def open_load(
        self,
        session: SessionId,
        space: SpaceId,
        keys: Sequence[ChunkKey],
        timeout: float,
        *,
        touch_later: bool = False,
    ) -> StagedLoad:
        """Begin to stage the longest prefix of `keys`; answered within `timeout` seconds.

        `touch_later`: return as soon as it is answered; the rest of touching a long chain is `go_on`'s, or the calls' that follow.
        """
        opened: StagedLoad | None = None
        began = self._clock()

        def begin(core: Core, now: float) -> StagedLoad:
            nonlocal opened
            self._check_open()
            opened = StagedLoad(core.open_load(session, space, keys, now, now + timeout), self.release)
            self._core.loads[opened.ticket.id] = opened
            return opened

        try:
            load = self._core.run(begin)
            self._long.extend(load.ticket, lambda: touch_later and load.answered)
        except BaseException:
            if opened is not None:
                opened.release(used=range(0))
            raise
        if not load.answered:
            self._tender.wake()
        load.when_answered(partial(self._observe_stage, began, load, load.farthest))
        return load

    def go_on(self) -> None:
        """Do what earlier calls have left to do."""
        self._long.go_on()

    def release(self, ticket: LoadTicket, used: range | None = None) -> None:
        """Give a load's leases back (`StagedLoad.release` calls this)."""

        def give_back(core: Core, now: float) -> bool:
            self._core.loads.pop(ticket.id, None)
            return core.release(ticket, now, used)

        while self._core.run(give_back):
            pass

    def cut(self, ticket: LoadTicket, index: int, reason: MissReason = MissReason.CORRUPT) -> None:
        """Chunk `index` of an answered load failed its checksum, or can't be given for another reason: the answer ends before it."""
        self._core.run(lambda core, now: core.cut(ticket, index, now, reason))

    def is_intact(self, ticket: LoadTicket, index: int) -> bool:
        """Whether chunk `index` of an answered load lies in memory as it was committed. True also if nobody knows: a chunk that only
        the GPU pool has had no checksum made. Reads its bytes.
        """
        copy = ticket.copies[index]
        if copy is None:
            return True
        wanted = self._core.look(lambda _: copy.checksums)
        return not wanted or self._engine.checksums(copy.tier, copy.slots, ticket.space.id) == wanted

    def open_store(
        self,
        session: SessionId,
        space: SpaceId,
        root: ChunkKey,
        keys: Sequence[ChunkKey],
        *,
        first: int = 0,
        room: int | None = None,
    ) -> StoreTicket:
        """Slots for the chunks `keys[first:]` that are wanted, at most `room` bytes of them; refusals for the others."""
        opened: StoreTicket | None = None

        def begin(core: Core, now: float) -> StoreTicket:
            nonlocal opened
            self._check_open()
            opened = core.open_store(session, space, root, keys, now, first, room)
            return opened

        try:
            ticket = self._core.run(begin)
            self._long.extend(ticket)
        except BaseException:
            if opened is not None:
                self.abort(opened)
            raise
        return ticket

    def commit(self, ticket: StoreTicket, indices: Iterable[int] | None = None) -> None:
        """The slots hold their KV."""
        self._long.commit(ticket, indices)

    def abort(self, ticket: StoreTicket) -> None:
        """The slots not committed go back."""
        self._core.run(lambda core, now: core.abort(ticket, now))

    def reattribute(self, ticket: LoadTicket, reason: MissReason) -> None:
        """The caller knows better why an answered load stopped."""
        self._core.look(lambda core: core.reattribute(ticket, reason))

    def wait_for(self, space: SpaceId, keys: Sequence[ChunkKey], timeout: float) -> bool:
        """Wait until these chunks have reached their tiers, or were given up; False at the time-out."""
        return not self._core.wait_while(lambda core: core.on_their_way(space, keys), timeout)

    def evict(self, tier: Tier, target_bytes: int) -> Evicted:
        """Evict until at most so many bytes stay, are on their way out, or may not go; records are deleted in the background.

        What only memory has and the next tier can't take yet stays until it has it, and counts as `demoting`.
        """
        self._check_open()
        return self._long.evict(tier, target_bytes)

    def evict_down_to(self, tier: Tier, share: float) -> Evicted:
        """The same, down to a share of the tier's capacity. Raises InvalidArgument for one that has none of its own."""
        capacity = self.plan.capacity(tier)
        if capacity is None and share > 0:
            raise InvalidArgument(
                f"the {tier} tier bounds itself, so nobody knows a share of it: evict down to 0, or not at all"
            )
        return self.evict(tier, int((capacity or 0) * share))

    def capacity(self, tier: Tier) -> int:
        """Bytes of a tier; 0 for one that is disabled, or bounds itself."""
        return self.plan.capacity(tier) or 0

    def tell(self, news: Sequence[News]) -> None:
        """News from the stores; a list, or what is taken from a store meanwhile would be taken under the mutex."""
        self._core.run(lambda core, now: core.tell_all(news, now))

    def tick(self) -> float | None:
        """Let time pass; returns when the next load's deadline is."""
        return self._core.run(lambda core, now: core.tick(now))

    # --- waiting, closing ---------------------------------------------------------------------------------------------

    def flush(self, timeout: float) -> None:
        """Wait until every accepted store has reached its tiers, and what `evict` demotes or deletes too. Raises DeadlineExceeded."""
        left = self._wait_unfinished(timeout)
        if left:
            raise DeadlineExceeded(
                f"{left} background operations had not ended after {timeout} s; they go on. See stats()['async'] and the log"
            )

    def close(self, timeout: float | None = None) -> bool:
        """Write out what only memory holds, as far as the time allows, and let everything go; half a second more at most. Idempotent.

        False if something was still running at the time-out: then the arena stays mapped until that has ended; call again to
        ask again. In a forked child nothing is done, and True returned: the cache is the parent's.
        """
        if self._disowned:
            return True
        timeout = min(self.plan.close_timeout_s if timeout is None else timeout, threading.TIMEOUT_MAX)
        # what is put away at the end takes moments, or half a second where something hangs: of the time-out, if that is long enough
        deadline = time.monotonic() + timeout - min(_LAST_WAIT_S / 2, timeout / 4)
        first = False
        try:
            with Uninterrupted():
                first = self._core.look(lambda _: self._begin_closing())
            if first:
                self._write_out(deadline)
                self._wind_down(deadline)
        except BaseException:  # an interrupt: nothing more is waited for, and everything is let go
            deadline = time.monotonic()
            raise
        finally:
            if first:
                with Uninterrupted():
                    self._let_go(deadline)
                    self._closed.set()
        if not first and not self._closed.wait(timeout):
            return False
        return self._engine.close(max(0.0, deadline - time.monotonic()))

    def _write_out(self, deadline: float) -> None:
        self.give_up_loads()
        if self._guards:
            self._core.run(lambda core, now: core.drain(now))
            self.go_on()
            left = self._wait_unfinished(max(0.0, deadline - time.monotonic()))
            if left:
                _log.warning("closing with %d background operations unfinished", left)

    def _wind_down(self, deadline: float) -> None:
        self._tender.stop(max(0.0, deadline - time.monotonic()))
        deadline = max(deadline, time.monotonic() + _LAST_WAIT_S / 2)
        self._tender.remember_order(max(0.0, deadline - time.monotonic()))
        self._engine.close(max(0.0, deadline - time.monotonic()))

    def _let_go(self, deadline: float) -> None:
        """Behind `_wind_down`, however far that has come."""
        self._tender.stop(0.0)
        self._engine.close(0.0)
        for guard in self._guards.values():
            guard.close()
        if self._pinning is not None and not self._pinning.close(
            max(_LAST_WAIT_S / 2, deadline - time.monotonic())
        ):
            _log.warning("the arena stays pinned and mapped: a device copy, or CUDA itself, has not ended")
            self.arena.leak()
        if self.device_pool is not None:
            self.device_pool.close()
        if self.arena.close() is CloseOutcome.LEAKED:
            _log.info("the arena stays mapped until those who still use it have ended")

    # --- what operators ask -------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Tiers, counters, queues and latencies as plain values."""
        return node_stats(
            self._core.look(Core.stats),
            engine=self._engine,
            latencies=self.latencies,
            arena=self.arena,
            pinned_bytes=0 if self._pinning is None else self._pinning.nbytes,
            device_pool=self.device_pool,
            guards=self._guards,
        )

    def check_integrity(self, timeout: float = 30.0) -> list[str]:
        """Walk index, arena, leases and disk, and return every inconsistency. Waits for background work to end first."""
        self._core.look(lambda _: self._check_open())
        problems = (
            [] if self.wait_settled(timeout) else ["background work goes on: what follows may be its traces"]
        )
        return [*problems, *audit(self)]

    def wait_settled(self, timeout: float) -> bool:
        """Wait until nothing is under way: stores, reads, deletes, and comparing the disk with the index. False at the time-out."""
        self._core.look(lambda _: None)  # raises in a forked child, where what is waited for never comes
        deadline = time.monotonic() + timeout
        if not self._tender.reconciled.wait(timeout):
            return False
        while True:
            left = deadline - time.monotonic()
            if (
                left <= 0
                or self._wait_unfinished(left)
                or not self._engine.wait_idle(deadline - time.monotonic())
            ):
                return False
            if self._core.look(lambda core: not core.stats()["operations"] and not core.unfinished):
                return True  # what ended last has begun nothing else

    def inspect(self, look: Callable[[Core], T]) -> T:
        """Read the core under the mutex; `look` must be quick and change nothing."""
        return self._core.look(look)

    @property
    def guards(self) -> dict[Tier, Guard]:
        """The stores, guarded."""
        return self._guards

    @property
    def engine(self) -> OffloadEngine:
        """The offload engine."""
        return self._engine

    @property
    def clock(self) -> Callable[[], float]:
        """Monotonic seconds: what the core's times are of."""
        return self._clock

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        return self._closing

    @property
    def closed(self) -> bool:
        """Whether a call to `close` has ended, or nothing is to be closed here: a forked child."""
        return self._disowned or self._closed.is_set()

    @property
    def disowned(self) -> bool:
        """Whether this is a forked child's copy of its parent's node: every call raises, `close` does nothing."""
        return self._disowned

    def disown(self, lock: ParentsLock) -> None:
        """In a forked child: nobody gets at the core."""
        self._core.disown(lock)
        self._disowned = True

    # --- inside -------------------------------------------------------------------------------------------------------

    def _observe_stage(self, began: float, load: StagedLoad, known: Tier | None) -> None:
        farthest = load.farther(known)
        if farthest is not None:
            self.latencies.observe(farthest, "stage", self._clock() - began)

    def _wait_unfinished(self, timeout: float) -> int:
        return self._core.wait_while(lambda core: core.unfinished, timeout)

    def _begin_closing(self) -> bool:
        """Whether this is the first call to do so; under the mutex."""
        first, self._closing = not self._closing, True
        return first

    def _check_open(self) -> None:
        if self._closing:
            raise CacheClosed("the cache is closed: open a new one")
