"""Records: which chunks are written to the stores, and when. What is deleted to make room for them: `deleting`.

Writes lease arena slots, so they are bounded: in bytes (a share of the arena, and of the store's queue) and in number. What
may not be written yet waits in the store's backlog without holding anything; what is pushed out of memory meanwhile is
written as it leaves, or lost. Eviction never waits for a write.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from kvtiers.core.deleting import RETRY_PAUSE_S, Deleter
from kvtiers.core.index import Chunk, MemoryCopy, MemoryState, StoredCopy, StoredState
from kvtiers.core.ledger import Ledger
from kvtiers.core.messages import Outcome, Priority, Write
from kvtiers.core.policies.base import Standing
from kvtiers.core.settings import WritePolicy
from kvtiers.core.state import State, WritePending
from kvtiers.core.tiers import Resting, StoreTier, Waiting
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.reasons import MissReason, Refusal

_THERE: Final = (StoredState.READY, StoredState.WRITING)
_WRITE_THROUGH: Final = WritePolicy.WRITE_THROUGH

_REST_S: Final = 1.0
"""A chunk that a shared store could not take is offered again after so long: one shard of several may be lost, for long."""

_NOT_WANTED: Final = frozenset({Refusal.PRESENT, Refusal.NOT_ADMITTED, Refusal.CHAIN_BROKEN})
"""Refusals that end a chunk's wait in the backlog."""

_NOTHING_SENT: Final = frozenset({Outcome.PRESENT, Outcome.REFUSED, Outcome.CANCELLED})
"""Ends of a write that do not count for the pace of writes."""


_COMES_AGAIN: Final = frozenset({Outcome.FULL, Outcome.REFUSED, Outcome.CANCELLED})
"""Ends of a write after which it is tried again by itself: an eviction that waits for it goes on."""

_NO_FAILURE: Final = frozenset({Outcome.REFUSED, Outcome.CANCELLED})
"""Ends of an operation that the store never saw."""


class StoreWriter:
    """Writes chunks to the stores."""

    def __init__(self, state: State, ledger: Ledger, deleter: Deleter) -> None:
        self._state = state
        self._ledger = ledger
        self._deleter = deleter
        self._draining = False
        self._to_drain: Iterator[Chunk] | None = None
        self._lease_budget = int(state.cpu.settings.capacity * state.settings.write_lease_share)

    def is_clean(self, copy: MemoryCopy) -> bool:
        """Whether some store holds, or is receiving, what lies in this arena copy."""
        for tier in self._state.stores:
            stored = copy.chunk.stored(tier)
            if stored is not None and stored.state in _THERE:
                return True
        return False

    def schedule(self, chunk: Chunk) -> None:
        """The chunk lies sealed in the arena and was stored or used: write it through to the stores that want it so."""
        for store in self._state.stores.values():
            store.admission.note(chunk.key)
            through = (
                store.settings.write_policy is _WRITE_THROUGH or not self._state.cpu.keeps or self._draining
            )
            if through and self._lacks(chunk, store) and store.admission.admits(chunk.key):
                self._enqueue(chunk, store)

    def schedule_now(self, chunk: Chunk) -> None:
        """Schedule and begin what may begin, while the caller still holds its lease: a disabled CPU tier keeps nothing without one."""
        self.schedule(chunk)
        self.pump()

    def drain(self) -> None:
        """Write out everything that only memory holds, parents first, and what is committed until that is done."""
        self._draining = True
        for store in self._state.stores.values():
            store.asked = None
        self._to_drain = iter(list(reversed(list(self._state.cpu.policy.coldest_first()))))

    @property
    def has_more(self) -> bool:
        """Whether chunks are still to be looked at for the end: `pump` goes on with it."""
        return self._to_drain is not None

    def _drain_some(self) -> None:
        if self._to_drain is None:
            return
        some = list(islice(self._to_drain, self._state.settings.max_hold))
        if len(some) < self._state.settings.max_hold:
            self._to_drain = None
        for chunk in some:
            for store in self._state.stores.values():
                if self._lacks(chunk, store):
                    self._enqueue(chunk, store)

    def pump(self) -> None:
        """Begin writes from the backlogs as far as the budgets allow, in order of arrival."""
        state = self._state
        self._drain_some()
        for store in state.stores.values():
            if self._draining and not store.up and not store.settings.owned:
                # the end does not wait for another machine to come back
                state.counters.abandoned_writes[Refusal.TIER_OPEN] += len(store.backlog) + len(store.resting)
                store.backlog.clear()
                store.resting.clear()
            self._wake_rested(store)
            for _ in range(min(len(store.backlog), state.settings.max_hold)):
                chunk, waiting = next(iter(store.backlog.items()))
                if self._waits_too_long(waiting, store):
                    store.backlog.pop(chunk, None)
                    state.counters.abandoned_writes[Refusal.QUEUE_FULL] += 1
                    continue
                refusal = self._begin(chunk, store, Priority.STORE)
                if refusal is None or refusal in _NOT_WANTED:
                    store.backlog.pop(chunk, None)
                    continue
                if chunk.cpu is not None and not store.can_hold(_estimate(chunk.cpu)):
                    store.backlog.pop(chunk, None)  # foreign files have grown meanwhile
                    state.counters.abandoned_writes[Refusal.NO_SLOT] += 1
                    continue
                if refusal is not waiting.refusal:
                    state.counters.deferred_writes[refusal] += 1
                    store.backlog[chunk] = waiting._replace(refusal=refusal)
                if refusal is not Refusal.IN_FLIGHT:
                    break
                store.backlog.move_to_end(chunk)  # its old record is being deleted
        if (
            self._draining
            and self._to_drain is None
            and not state.background
            and not any(store.backlog or store.resting for store in state.stores.values())
        ):
            self._draining = bool(state.gpu and state.gpu.backlog)

    def demote(self, copy: MemoryCopy) -> Refusal | None:
        """Begin to write a chunk that is being pushed out of the arena to the first store that takes it."""
        refusal: Refusal | None = Refusal.DISABLED
        for store in self._state.stores.values():
            refusal = self._begin(copy.chunk, store, Priority.DEMOTE)
            if refusal is None:
                break
        return refusal

    def takes_now(self, copy: MemoryCopy) -> bool:
        """Whether some store would begin to write the chunk at this moment; where that needs space, deletes are begun.

        Of two chunks on their way down at once, a store that keeps a pace would take one.
        """
        now = self._state.now
        return any(
            store.up
            and now >= store.rests_until
            and not (self._state.cpu.write_leased and store.settings.max_write_bytes_per_s)
            and copy.chunk.stored(store.tier) is None
            and store.admission.admits(copy.chunk.key)
            and not self._over_budget(store, copy.nbytes)
            and self._deleter.make_room(store, _estimate(copy))
            for store in self._state.stores.values()
        )

    def takes_later(self, copy: MemoryCopy) -> bool:
        """Whether a store that has refused the chunk can be expected to take it: it is up, and has, or can make, the space."""
        now = self._state.now
        return any(not (store.stuffed and now < store.paused_until) for store in self._takers(copy))

    def takes_ever(self, copy: MemoryCopy) -> bool:
        """The same of one that may have no space for now: what waits for that is no loss."""
        return any(True for _ in self._takers(copy))

    def _takers(self, copy: MemoryCopy) -> Iterator[StoreTier]:
        return (
            store
            for store in self._state.stores.values()
            if store.up and store.can_hold(_estimate(copy)) and store.admission.admits(copy.chunk.key)
        )

    def can_demote(self) -> bool:
        """Whether demotions under way can be expected to end."""
        now = self._state.now
        return any(store.up and now >= store.paused_until for store in self._state.stores.values())

    def write_done(self, pending: WritePending, outcome: Outcome, stored_bytes: int) -> None:
        """A write ended: on success the store has the chunk; otherwise it stays where it was."""
        state, copy, stored, chunk = self._state, pending.copy, pending.stored, pending.copy.chunk
        store = state.stores[pending.tier]
        store.writes -= 1
        store.writing_bytes -= copy.nbytes
        state.cpu.write_leased -= copy.nbytes
        store.used -= stored.nbytes
        store.arriving -= stored.nbytes
        if store.settings.max_write_bytes_per_s is not None and outcome in _NOTHING_SENT:
            store.next_write_at -= copy.nbytes / store.settings.max_write_bytes_per_s
        if outcome in (Outcome.OK, Outcome.PRESENT):
            if outcome is Outcome.OK:
                stored.nbytes = stored_bytes
                state.counters.tiers[store.tier].stored += 1
            else:
                state.counters.tiers[store.tier].present += 1
            stored.state = StoredState.READY
            store.stuffed = False
            store.used += stored.nbytes
            if store.asked is not None:
                store.asked += stored.nbytes  # it came after that was asked for
            store.policy.insert(chunk, chunk.parent, stored.nbytes, state.now, Standing.ESTABLISHED)
            if store.remembered is not None:
                store.remembered.there(chunk, state.now)
        else:
            chunk.set_stored(store.tier, None)
            self._write_failed(pending, store, outcome)
            self._ledger.stay(copy, meant=outcome in _COMES_AGAIN)
        self._ledger.unlease(copy)  # drops it if it was leaving
        self._ledger.release_chunk(chunk, MissReason.EVICTED)

    def _write_failed(self, pending: WritePending, store: StoreTier, outcome: Outcome) -> None:
        state, copy = self._state, pending.copy
        waiting = Waiting(pending.since)
        state.counters.tiers[store.tier].failed += outcome not in _NO_FAILURE
        if outcome is Outcome.FULL:
            known = (
                store.paused_until > state.now
            )  # writes begun before the first of them failed tell nothing new
            store.paused_until = state.now + store.settings.full_pause_s
            store.stuffed = store.used <= store.leaving
            if not known and store.settings.owned:  # else what leaves it is the store's to decide
                self._deleter.give_back(store, max(4 * copy.nbytes, store.used // 100))
        elif outcome is Outcome.FAILED:
            return  # the guard has retried; the next touch or eviction tries again
        elif outcome is Outcome.UNAVAILABLE and not store.settings.owned:
            store.paused_until = max(store.paused_until, state.now + RETRY_PAUSE_S)
            if not copy.detached and not self._draining:
                store.resting[copy.chunk] = Resting(waiting, state.now + _REST_S)
            return
        else:
            store.paused_until = max(store.paused_until, state.now + RETRY_PAUSE_S)
        if not copy.detached:
            store.backlog.setdefault(copy.chunk, waiting)

    def _wake_rested(self, store: StoreTier) -> None:
        now = self._state.now
        for _ in range(min(len(store.resting), self._state.settings.max_hold)):
            chunk, resting = next(iter(store.resting.items()))
            if resting.until > now:
                return
            del store.resting[chunk]
            store.backlog.setdefault(chunk, resting.waiting)

    def _enqueue(self, chunk: Chunk, store: StoreTier) -> None:
        """Have it written when its turn comes, unless foreign files leave no room for it whatever we delete."""
        if chunk.cpu is not None and not store.can_hold(_estimate(chunk.cpu)):
            self._state.counters.abandoned_writes[Refusal.NO_SLOT] += 1
            return
        if chunk not in store.resting:
            store.backlog.setdefault(chunk, Waiting(self._state.now))

    def _waits_too_long(self, waiting: Waiting, store: StoreTier) -> bool:
        most = store.settings.max_wait_s
        return most is not None and not self._draining and self._state.now - waiting.since > most

    def _lacks(self, chunk: Chunk, store: StoreTier) -> bool:
        stored, ceiling = chunk.stored(store.tier), store.settings.ceiling
        if stored is not None and stored.state in _THERE:
            return False
        return chunk.cpu is not None and (ceiling is None or _estimate(chunk.cpu) <= ceiling)

    def _begin(self, chunk: Chunk, store: StoreTier, priority: Priority) -> Refusal | None:
        state, copy = self._state, chunk.cpu
        if copy is None or copy.state is not MemoryState.READY or not copy.checksums:
            return Refusal.CHAIN_BROKEN
        stored = chunk.stored(store.tier)
        if stored is not None:
            if stored.state in _THERE:
                return Refusal.PRESENT
            if stored.state is StoredState.PARTIAL:
                self._deleter.begin_delete(chunk, stored, store, MissReason.GROUP_STATE_MISSING)
            return Refusal.IN_FLIGHT
        if not store.up:
            return Refusal.TIER_OPEN
        if not store.admission.admits(chunk.key):
            return Refusal.NOT_ADMITTED
        if state.now < store.rests_until or self._over_budget(store, copy.nbytes):
            return Refusal.QUEUE_FULL
        estimate = _estimate(copy)
        if not self._deleter.make_room(store, estimate):
            return Refusal.NO_SLOT
        stored = StoredCopy(estimate, StoredState.WRITING)
        chunk.set_stored(store.tier, stored)
        store.used += estimate
        store.arriving += estimate
        store.writes += 1
        store.writing_bytes += copy.nbytes
        state.cpu.write_leased += copy.nbytes
        self._ledger.lease(copy)
        if store.settings.max_write_bytes_per_s is not None:
            store.next_write_at = (
                max(state.now, store.next_write_at) + copy.nbytes / store.settings.max_write_bytes_per_s
            )
        waiting = store.backlog.get(chunk)
        since = state.now if waiting is None else waiting.since
        op = state.begin(WritePending(copy, stored, store.tier, since))
        state.outbox.append(
            Write(op, chunk.space.id, store.tier, chunk.mark, copy.slots, copy.checksums, priority)
        )
        return None

    def _over_budget(self, store: StoreTier, nbytes: int) -> bool:
        """Whether one more write would be too many. Each store is always allowed a single one, so that nothing gets stuck, and no
        more than its part of the leases, so that one that hangs leaves the others theirs.
        """
        settings, leased = store.settings, self._state.cpu.write_leased
        if store.writes >= settings.max_queued:
            return True
        sharers = len(self._state.stores) + (self._state.gpu is not None)
        most = min(settings.max_queued_bytes, self._lease_budget // sharers)
        return store.writing_bytes > 0 and (
            store.writing_bytes + nbytes > most or leased + nbytes > self._lease_budget
        )


def _estimate(copy: MemoryCopy) -> int:
    """What a chunk's records take at most: payloads, headers, padding."""
    return copy.nbytes + PAGE_BYTES * len(copy.slots)
