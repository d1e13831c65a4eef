"""Records: which chunks are written to the stores and when, and which records are deleted to make room.

Writes lease arena slots, so they are bounded: in bytes (a share of the arena), in number (the store's queue). What may not
be written yet waits in the store's backlog without holding anything; what is pushed out of memory meanwhile is written as
it leaves, or lost. Eviction never waits for a write.
"""

from __future__ import annotations

from kvtiers.core.index import Chunk, MemoryCopy, MemoryState, StoredCopy, StoredState
from kvtiers.core.ledger import Ledger
from kvtiers.core.messages import Delete, Outcome, Priority, Write
from kvtiers.core.policies.base import Standing
from kvtiers.core.settings import WritePolicy
from kvtiers.core.state import DeletePending, State, WritePending
from kvtiers.core.tiers import StoreTier
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier

_RETRY_PAUSE_S = 0.05
"""After a full queue: so long no write is tried, so that refusals don't spin."""


class StoreWriter:
    """Writes chunks to the stores and deletes them there."""

    def __init__(self, state: State, ledger: Ledger) -> None:
        self._state = state
        self._ledger = ledger

    def is_clean(self, copy: MemoryCopy) -> bool:
        """Whether some store holds, or is receiving, what lies in this arena copy."""
        for tier in self._state.stores:
            stored = copy.chunk.stored(tier)
            if stored is not None and stored.state in (StoredState.READY, StoredState.WRITING):
                return True
        return False

    def schedule(self, chunk: Chunk) -> None:
        """The chunk lies sealed in the arena: write it through to the stores that want it so."""
        for store in self._state.stores.values():
            through = store.settings.write_policy is WritePolicy.WRITE_THROUGH or not self._state.cpu.keeps
            if through and self._lacks(chunk, store):
                store.backlog[chunk] = None

    def schedule_now(self, chunk: Chunk) -> None:
        """Schedule and begin what may begin, while the caller still holds its lease: a disabled CPU tier keeps nothing without one."""
        self.schedule(chunk)
        self.pump()

    def schedule_all_dirty(self) -> None:
        """Write out everything that only memory holds (close, flush)."""
        for chunk in self._state.cpu.policy.coldest_first():
            for store in self._state.stores.values():
                if self._lacks(chunk, store):
                    store.backlog[chunk] = None

    def pump(self) -> None:
        """Begin writes from the backlogs as far as the budgets allow; oldest first, so parents before children."""
        for store in self._state.stores.values():
            for _ in range(min(len(store.backlog), self._state.settings.max_hold)):
                chunk = next(iter(store.backlog))
                refusal = self._begin(chunk, store, Priority.STORE)
                if refusal in (None, Refusal.PRESENT, Refusal.NOT_ADMITTED, Refusal.CHAIN_BROKEN):
                    store.backlog.pop(chunk, None)
                elif refusal is Refusal.IN_FLIGHT:  # its old record is being deleted
                    store.backlog.move_to_end(chunk)
                else:
                    break

    def demote(self, copy: MemoryCopy) -> bool:
        """Begin to write a chunk that is being pushed out of the arena; False if that can't be done now."""
        for store in self._state.stores.values():
            if self._begin(copy.chunk, store, Priority.DEMOTE) is None:
                return True
        return False

    def can_demote(self) -> bool:
        """Whether demotions under way can be expected to end."""
        return any(store.up and self._state.now >= store.paused_until for store in self._state.stores.values())

    def write_done(self, pending: WritePending, outcome: Outcome, stored_bytes: int) -> None:
        """A write ended: on success the store has the chunk; otherwise it stays where it was."""
        state, copy, stored, chunk = self._state, pending.copy, pending.stored, pending.copy.chunk
        store = state.stores[pending.tier]
        store.writes -= 1
        state.cpu.write_leased -= copy.nbytes
        store.used -= stored.nbytes
        if outcome is Outcome.OK:
            stored.nbytes = stored_bytes
            stored.state = StoredState.READY
            store.used += stored_bytes
            store.policy.insert(chunk, chunk.parent, stored_bytes, state.now, Standing.ESTABLISHED)
            state.counters.tiers[store.tier].stored += 1
            if copy.leaving:
                state.counters.tiers[Tier.CPU].demoted += 1
                if copy.leases == 1:
                    self._ledger.detach(copy, MissReason.EVICTED)
        else:
            chunk.set_stored(store.tier, None)
            self._write_failed(chunk, copy, store, outcome)
        self._ledger.stay(copy)
        self._ledger.unlease(copy)
        self._ledger.release_chunk(chunk, MissReason.EVICTED)

    def _write_failed(self, chunk: Chunk, copy: MemoryCopy, store: StoreTier, outcome: Outcome) -> None:
        state = self._state
        state.counters.tiers[store.tier].failed += 1
        if outcome is Outcome.FULL:
            store.paused_until = state.now + store.settings.full_pause_s
            self.give_back(store, max(4 * copy.nbytes, store.used // 100))
        elif outcome is Outcome.FAILED:
            return  # the guard has retried; the next touch or eviction tries again
        else:
            store.paused_until = state.now + _RETRY_PAUSE_S
        if not copy.detached:
            store.backlog[chunk] = None

    def make_room(self, store: StoreTier, nbytes: int) -> bool:
        """Whether so many bytes may be written; if not yet, deletes are begun, down to the low watermark."""
        if store.fits(nbytes):
            return True
        settings = store.settings
        if settings.low is not None and settings.ceiling is not None and nbytes <= settings.ceiling:
            self.evict_to(store, max(0, settings.low - nbytes))
        return store.fits(nbytes)

    def give_back(self, store: StoreTier, nbytes: int) -> None:
        """Begin to delete at least so many bytes, if there are as many."""
        self.evict_to(store, store.used + store.foreign - store.leaving - nbytes)

    def evict_to(self, store: StoreTier, target: int) -> tuple[int, int]:
        """Begin to delete the coldest leaves until at most `target` bytes stay; returns chunks and bytes."""
        chunks = nbytes = 0
        while store.used + store.foreign - store.leaving > target and chunks < self._state.settings.max_hold:
            chunk = store.policy.victim(self._state.now, lambda victim: self.deletable(victim, store.tier))
            if chunk is None:
                break
            stored = chunk.stored(store.tier)
            assert stored is not None  # the policy holds only chunks that lie there
            chunks += 1
            nbytes += stored.nbytes
            self._state.counters.tiers[store.tier].evicted += 1
            self.begin_delete(chunk, stored, store)
        return chunks, nbytes

    def begin_delete(self, chunk: Chunk, stored: StoredCopy, store: StoreTier) -> None:
        """Have a store remove a chunk's records; its bytes count until that is done."""
        op = self._state.begin(DeletePending(chunk, stored, store.tier, stored.state))
        stored.state = StoredState.DELETING
        store.policy.remove(chunk)
        store.leaving += stored.nbytes
        self._state.outbox.append(Delete(op, store.tier, chunk.mark, Priority.DELETE))

    def delete_done(self, pending: DeletePending, outcome: Outcome) -> None:
        """A delete ended; if it failed the records are still there, still counted, and go first next time."""
        chunk, stored = pending.chunk, pending.stored
        store = self._state.stores[pending.tier]
        store.leaving -= stored.nbytes
        if outcome in (Outcome.OK, Outcome.MISSING):
            self.forget(chunk, stored, store, MissReason.EVICTED)
            return
        self._state.counters.tiers[store.tier].failed += 1
        stored.state = pending.before
        if stored.state is StoredState.READY:
            store.policy.insert(chunk, chunk.parent, stored.nbytes, self._state.now, Standing.ESTABLISHED)
            store.policy.expedite(chunk)

    def forget(self, chunk: Chunk, stored: StoredCopy, store: StoreTier, reason: MissReason) -> None:
        """The store has the chunk no more."""
        store.policy.remove(chunk)
        store.used -= stored.nbytes
        if chunk.stored(store.tier) is stored:
            chunk.set_stored(store.tier, None)
        self._ledger.release_chunk(chunk, reason)

    def _lacks(self, chunk: Chunk, store: StoreTier) -> bool:
        stored = chunk.stored(store.tier)
        return stored is None or stored.state in (StoredState.DELETING, StoredState.PARTIAL)

    def deletable(self, chunk: Chunk, tier: Tier) -> bool:
        stored = chunk.stored(tier)
        return stored is not None and stored.state is StoredState.READY and not stored.readers

    def _begin(self, chunk: Chunk, store: StoreTier, priority: Priority) -> Refusal | None:
        state, copy = self._state, chunk.cpu
        if copy is None or copy.state is not MemoryState.READY or not copy.checksums:
            return Refusal.CHAIN_BROKEN
        stored = chunk.stored(store.tier)
        if stored is not None:
            if stored.state in (StoredState.READY, StoredState.WRITING):
                return Refusal.PRESENT
            if stored.state is StoredState.PARTIAL:
                self.begin_delete(chunk, stored, store)
            return Refusal.IN_FLIGHT
        if not store.up:
            return Refusal.TIER_OPEN
        budget = int(state.cpu.settings.capacity * state.settings.write_lease_share)
        over_budget = state.cpu.write_leased > 0 and state.cpu.write_leased + copy.nbytes > budget
        if state.now < store.paused_until or store.writes >= store.settings.max_queued or over_budget:
            state.counters.deferred_writes[Refusal.QUEUE_FULL] += 1
            return Refusal.QUEUE_FULL
        if priority is Priority.STORE and not store.admission.admits(chunk):
            state.counters.deferred_writes[Refusal.NOT_ADMITTED] += 1
            return Refusal.NOT_ADMITTED
        parts = chunk.space.parts
        if parts is None:
            return Refusal.CHAIN_BROKEN
        estimate = sum(part.slot_bytes + PAGE_BYTES for part in parts)
        if not self.make_room(store, estimate):
            state.counters.deferred_writes[Refusal.NO_SLOT] += 1
            return Refusal.NO_SLOT
        stored = StoredCopy(estimate, StoredState.WRITING)
        chunk.set_stored(store.tier, stored)
        store.used += estimate
        store.writes += 1
        state.cpu.write_leased += copy.nbytes
        self._ledger.lease(copy)
        op = state.begin(WritePending(copy, stored, store.tier))
        state.outbox.append(
            Write(op, chunk.space.id, store.tier, chunk.mark, copy.slots, copy.checksums, priority)
        )
        return None
