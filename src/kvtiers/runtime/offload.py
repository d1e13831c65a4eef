"""The offload engine: carries out what the core intends, on the right pool, and reports each ending exactly once.

Seals and copies run on the memory pool, records on the pool of their store, behind its guard. Nothing here decides anything:
priorities, budgets and what to do after a failure are the core's. A job that is refused, dropped or cancelled reports that.
An operation holds its slots until its completion has been reported, however late that is.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np

from kvtiers.core.messages import (
    Cancel,
    Chunkmark,
    Completion,
    Copy,
    CopyDone,
    Delete,
    DeleteDone,
    Intent,
    Outcome,
    Probe,
    ProbeDone,
    Read,
    ReadDone,
    Seal,
    SealDone,
    Slots,
    SpaceId,
    Write,
    WriteDone,
)
from kvtiers.memory.arena import Arena
from kvtiers.model.errors import (
    CacheClosed,
    CodecError,
    InvariantBroken,
    RecordInvalid,
    RecordMissing,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from kvtiers.model.parts import Parts, RecordRef
from kvtiers.model.tiers import Tier
from kvtiers.records.checksum import checksum
from kvtiers.records.header import NO_WRITE_ID
from kvtiers.runtime.latency import Latencies
from kvtiers.runtime.pools import Job, WorkerPool
from kvtiers.runtime.transfer import wait_out
from kvtiers.stores.base import SealedPart, StoredRecord
from kvtiers.stores.guard import Guard

if TYPE_CHECKING:
    from kvtiers.memory.cuda import DevicePool

_log = logging.getLogger(__name__)

_TELL_EVERY_S: Final = 600.0

_Work: TypeAlias = Read | Write | Delete | Probe | Seal | Copy


class Shape(NamedTuple):
    """What an executor has to know of a namespace."""

    namespace: bytes
    parts: Parts
    itemsize: int


class OffloadEngine:
    """Executes intents on worker pools. `report` is called on the thread that finished the work."""

    def __init__(
        self,
        *,
        arena: Arena,
        device_pool: DevicePool | None,
        memory_pool: WorkerPool,
        stores: Mapping[Tier, Guard],
        store_pools: Mapping[Tier, WorkerPool],
        report: Callable[[Completion], None],
        latencies: Latencies,
        shared: Collection[Tier] = (),
        verify_on_hit: bool = False,
    ) -> None:
        """`shared`: tiers whose stores others write to, too: before a write they are asked. `verify_on_hit`: check also what is
        copied to the device, where hits can't be checked any more.
        """
        self._shared = frozenset(shared)
        self._verify_on_hit = verify_on_hit
        self._arena = arena
        self._device_pool = device_pool
        self._memory_pool = memory_pool
        self._stores = stores
        self._store_pools = store_pools
        self._report = report
        self._latencies = latencies
        self._shapes: dict[SpaceId, Shape] = {}
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._told_full_at: dict[Tier, float] = {}

    def declare(self, space: SpaceId, shape: Shape) -> None:
        """Before the first intent about a namespace."""
        self._shapes[space] = shape

    def submit(self, intents: Iterable[Intent]) -> list[Completion]:
        """Hand intents to their pools; returns completions of those that were refused. Never blocks."""
        refused: list[Completion] = []
        for intent in intents:
            if isinstance(intent, Cancel):
                for pool in self._store_pools.values():
                    if pool.cancel(intent.op):
                        break
                continue
            pool = self._pool_of(intent)
            job = Job(intent.op, intent.priority, self._runner(intent), self._dropper(intent))
            if not pool.submit(job):
                refused.append(_ended(intent, Outcome.REFUSED))
        return refused

    def run_on(self, tier: Tier, job: Job) -> bool:
        """Have a store's pool do something that is no intent of the core; False if it was refused."""
        return self._store_pools[tier].submit(job)

    def run_in_memory_pool(self, job: Job) -> bool:
        """Have the memory pool do something that is no intent of the core; False if it was refused."""
        return self._memory_pool.submit(job)

    def checksums(self, memory: Tier, slots: Slots, space: SpaceId) -> tuple[bytes, ...]:
        """Of the parts that lie in these slots at this moment; what is on the device is copied to the host for it."""
        parts = self._shapes[space].parts
        pool = self._device_pool
        if memory is Tier.CPU:
            return tuple(
                checksum(self._arena.buffer(slot, part.nbytes))
                for slot, part in zip(slots, parts, strict=True)
            )
        if pool is None:
            raise InvariantBroken("a chunk in a GPU pool that does not exist")
        sums = []
        for slot, part in zip(slots, parts, strict=True):
            host = np.empty(part.nbytes, np.uint8)
            wait_out(lambda slot=slot, host=host: pool.copy_to_host(slot, host))  # type: ignore[misc]
            sums.append(checksum(host.data))
        return tuple(sums)

    def health(self) -> dict[str, Any]:
        """Queues and workers of all pools, and what was done."""
        pools = [pool.health() for pool in self._pools()]
        with self._lock:
            done, failures = dict(self._done), dict(self._failures)
        return {
            "queue_size": sum(pool.queued for pool in pools),
            "pending_tasks": sum(pool.queued + pool.busy for pool in pools),
            "executor_workers": sum(pool.health().workers for pool in self._store_pools.values()),
            "pools": {pool.name: pool._asdict() for pool in pools},
            "completed": done,
            "failed": failures,
        }

    def wait_idle(self, timeout: float) -> bool:
        """Wait until every queue is empty and every thread idle at one time; False at the time-out."""
        deadline = time.monotonic() + timeout
        while True:
            if not all(pool.wait_idle(deadline - time.monotonic()) for pool in self._pools()):
                return False
            healths = [pool.health() for pool in self._pools()]
            if not any(health.queued or health.busy for health in healths):
                return True

    def close(self, timeout: float) -> bool:
        """Drop what has not begun; wait for what has. False if something was still running at the time-out."""
        deadline = time.monotonic() + timeout
        ended = [pool.close(max(0.0, deadline - time.monotonic())) for pool in self._pools()]
        return all(ended)

    # --- inside ---

    def _pools(self) -> list[WorkerPool]:
        return [self._memory_pool, *self._store_pools.values()]

    def _pool_of(self, intent: _Work) -> WorkerPool:
        if isinstance(intent, Seal | Copy):
            return self._memory_pool
        return self._store_pools[intent.tier]

    def _runner(self, intent: _Work) -> Callable[[], None]:
        def run() -> None:
            try:
                completion = self._carry_out(intent)
            except CacheClosed:  # the arena went while this was on its way
                completion = _ended(intent, Outcome.CANCELLED)
            except Exception:  # noqa: BLE001 - the slots must not stay leased for ever, whatever went wrong
                _log.exception(
                    "%s failed in a way it should not; this is a bug in kvtiers", type(intent).__name__
                )
                completion = _ended(intent, Outcome.FAILED)
            self._count(intent, completion.outcome)
            self._report(completion)

        return run

    def _dropper(self, intent: _Work) -> Callable[[], None]:
        return lambda: self._report(_ended(intent, Outcome.CANCELLED))

    def _carry_out(self, intent: _Work) -> Completion:
        if isinstance(intent, Read):
            return self._read(intent)
        if isinstance(intent, Write):
            return self._write(intent)
        if isinstance(intent, Delete):
            return self._delete(intent)
        if isinstance(intent, Probe):
            return self._probe(intent)
        if isinstance(intent, Seal):
            return self._seal(intent)
        return self._copy(intent)

    def _seal(self, intent: Seal) -> SealDone:
        started = time.monotonic()
        sums = self.checksums(Tier.CPU, intent.slots, intent.space)
        self._latencies.observe("cpu", "seal", time.monotonic() - started)
        return SealDone(intent.op, Outcome.OK, sums)

    def _copy(self, intent: Copy) -> CopyDone:
        pool = self._device_pool
        if pool is None:
            raise InvariantBroken("a copy to or from a GPU pool that does not exist")
        parts = self._shapes[intent.space].parts
        started = time.monotonic()
        up = intent.source is Tier.CPU
        if (
            up
            and self._verify_on_hit
            and intent.checksums
            and self.checksums(Tier.CPU, intent.source_slots, intent.space) != intent.checksums
        ):
            return CopyDone(intent.op, Outcome.CORRUPT)  # the next hit in the arena finds it and drops it
        sums: list[bytes] = []
        for source, target, part in zip(intent.source_slots, intent.target_slots, parts, strict=True):
            if not up:
                view = self._arena.view(target, part.nbytes)
                wait_out(lambda source=source, view=view: pool.copy_to_host(source, view))  # type: ignore[misc]
                sums.append(checksum(view.data))
            else:
                view = self._arena.view(source, part.nbytes)
                wait_out(lambda target=target, view=view: pool.copy_from_host(target, view))  # type: ignore[misc]
        self._latencies.observe("gpu", "promote" if up else "offload", time.monotonic() - started)
        return CopyDone(intent.op, Outcome.OK, intent.checksums if up else tuple(sums))

    def _read(self, intent: Read) -> ReadDone:
        store, parts, mark = self._stores[intent.tier], self._shapes[intent.space].parts, intent.mark
        records: list[StoredRecord] = []
        for number, (slot, part) in enumerate(zip(intent.slots, parts, strict=True)):
            ref = RecordRef(mark.namespace, mark.key, number)
            try:
                out = self._arena.buffer(slot, part.slot_bytes)
                records.append(store.read_into(ref, out, part.nbytes, deadline=intent.deadline))
            except StoreError as error:
                return ReadDone(intent.op, _outcome_of(error))
        if len({record.write_id for record in records}) > 1:
            return ReadDone(intent.op, self._refuse_mixture(store, records))
        return ReadDone(
            intent.op, Outcome.OK, tuple(record.checksum for record in records), _mark_of(records[0])
        )

    @staticmethod
    def _refuse_mixture(store: Guard, records: Iterable[StoredRecord]) -> Outcome:
        """Parts of two writes, as two instances or a kill may leave them: sound each, and never one chunk.

        What was read is removed, or the chunk would count as present for ever; what somebody has written anew meanwhile stays.
        """
        try:
            for record in records:
                store.discard(record)
        except StoreError as error:
            _log.info(
                "parts of two writes of a chunk stay in %s until they are read again: %s", store.name, error
            )
        return Outcome.MISSING

    def _write(self, intent: Write) -> WriteDone:
        store, shape, mark = self._stores[intent.tier], self._shapes[intent.space], intent.mark
        if intent.tier in self._shared and (present := self._is_there(store, mark)) is not None:
            return WriteDone(intent.op, present)
        stored, write_id = 0, secrets.token_bytes(len(NO_WRITE_ID))
        if mark.num_parts > 1:
            # what an earlier write left half: one that fails half-way now must not make a whole of parts of both
            try:
                _remove_parts(store, mark)
            except StoreError as error:
                return WriteDone(intent.op, _outcome_of(error))
        for number, (slot, part) in enumerate(zip(intent.slots, shape.parts, strict=True)):
            sealed = SealedPart(
                ref=RecordRef(mark.namespace, mark.key, number),
                parent=mark.parent,
                num_parts=mark.num_parts,
                token_start=mark.token_start,
                token_count=mark.token_count,
                itemsize=shape.itemsize,
                checksum=intent.checksums[number],
                payload=self._arena.buffer(slot, part.nbytes),
                write_id=write_id,
            )
            try:
                stored += store.write(sealed)
            except (StoreError, CodecError) as error:
                self._take_back(intent, number)
                if isinstance(error, StoreFull) and intent.tier in self._shared:
                    self._tell_full(intent.tier, error)
                outcome = _outcome_of(error)  # what can't be sealed now can't be sealed at once again either
                return WriteDone(intent.op, Outcome.FAILED if outcome is Outcome.CORRUPT else outcome)
        return WriteDone(intent.op, Outcome.OK, stored)

    @staticmethod
    def _is_there(store: Guard, mark: Chunkmark) -> Outcome | None:
        """PRESENT if somebody else has written the chunk; None if it is to be written."""
        refs = [RecordRef(mark.namespace, mark.key, number) for number in range(mark.num_parts)]
        try:
            return Outcome.PRESENT if all(store.exists(refs)) else None
        except StoreError as error:
            return _outcome_of(error)

    def _probe(self, intent: Probe) -> ProbeDone:
        shape = self._shapes[intent.space]
        parts = len(shape.parts)
        refs = [RecordRef(shape.namespace, key, part) for key in intent.keys for part in range(parts)]
        try:
            there = self._stores[intent.tier].exists(refs, deadline=intent.deadline)
        except StoreError as error:
            return ProbeDone(intent.op, _outcome_of(error))
        whole = tuple(all(there[start : start + parts]) for start in range(0, len(refs), parts))
        return ProbeDone(intent.op, Outcome.OK, whole)

    def _take_back(self, intent: Write, written: int) -> None:
        """Parts of a chunk are kept together: remove those written before one failed. What stays is found by the next start."""
        for number in range(written):
            try:
                self._stores[intent.tier].delete(RecordRef(intent.mark.namespace, intent.mark.key, number))
            except StoreError as error:
                _log.info(
                    "a part of a chunk that could not be stored whole stays in %s: %s", intent.tier, error
                )

    def _tell_full(self, tier: Tier, error: StoreFull) -> None:
        """Now and then: nobody here can make room there."""
        now = time.monotonic()
        with self._lock:
            if now < self._told_full_at.get(tier, float("-inf")) + _TELL_EVERY_S:
                return
            self._told_full_at[tier] = now
        _log.warning("the %s tier is full, and keeps what it has: %s", tier, error)

    def _delete(self, intent: Delete) -> DeleteDone:
        try:
            _remove_parts(self._stores[intent.tier], intent.mark)
        except StoreError as error:
            return DeleteDone(intent.op, _outcome_of(error))
        return DeleteDone(intent.op, Outcome.OK)

    def _count(self, intent: Intent, outcome: Outcome) -> None:
        name = type(intent).__name__.lower()
        if not isinstance(intent, Seal | Cancel) and not isinstance(intent, Copy):
            name = f"{intent.tier}_{name}"
        with self._lock:
            counts = self._done if outcome is Outcome.OK else self._failures
            key = name if outcome is Outcome.OK else f"{name}:{outcome}"
            counts[key] = counts.get(key, 0) + 1


def _mark_of(record: StoredRecord) -> Chunkmark:
    ref = record.ref
    return Chunkmark(
        ref.namespace, ref.key, record.parent, record.num_parts, record.token_start, record.token_count
    )


def _remove_parts(store: Guard, mark: Chunkmark) -> None:
    for number in range(max(1, mark.num_parts)):
        store.delete(RecordRef(mark.namespace, mark.key, number))


def _outcome_of(error: Exception) -> Outcome:
    if isinstance(error, RecordMissing):
        return Outcome.MISSING
    if isinstance(error, RecordInvalid):
        return Outcome.CORRUPT
    if isinstance(error, StoreFull):
        return Outcome.FULL
    if isinstance(error, StoreUnavailable):
        return Outcome.UNAVAILABLE
    return Outcome.FAILED


def _ended(intent: _Work, outcome: Outcome) -> Completion:
    if isinstance(intent, Probe):
        return ProbeDone(intent.op, outcome)
    if isinstance(intent, Read):
        return ReadDone(intent.op, outcome)
    if isinstance(intent, Write):
        return WriteDone(intent.op, outcome)
    if isinstance(intent, Delete):
        return DeleteDone(intent.op, outcome)
    if isinstance(intent, Seal):
        return SealDone(intent.op, outcome)
    return CopyDone(intent.op, outcome)
