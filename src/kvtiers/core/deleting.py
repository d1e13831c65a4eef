"""Records: which are deleted, when and why.

Deletes hold nothing, but each is a task of the store's; so no more of them are under way than half of its queue takes. Who needs
room comes back when some have ended. An eviction that somebody asked for is pursued as they end, until it is done; what is written
meanwhile is not meant by it.
"""

from __future__ import annotations

from typing import Final

from kvtiers.core.eviction import Evicted
from kvtiers.core.index import Chunk, StoredCopy, StoredState
from kvtiers.core.ledger import Ledger
from kvtiers.core.messages import Delete, Outcome, Priority
from kvtiers.core.policies.base import Standing
from kvtiers.core.state import DeletePending, State
from kvtiers.core.tiers import StoreTier
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier

RETRY_PAUSE_S: Final = 0.05
"""After a full queue, or a delete that failed: so long nothing is tried, so that refusals don't spin."""

_NEVER_SEEN: Final = frozenset({Outcome.REFUSED, Outcome.CANCELLED})
"""Ends of a delete that the store never saw: it is tried again."""


class Deleter:
    """Deletes chunks from the stores."""

    def __init__(self, state: State, ledger: Ledger) -> None:
        self._state = state
        self._ledger = ledger

    def make_room(self, store: StoreTier, nbytes: int) -> bool:
        """Whether so many bytes may be written; if not yet, deletes are begun, down to the low watermark."""
        if store.fits(nbytes):
            return True
        settings = store.settings
        if settings.low is None or settings.ceiling is None or not store.can_hold(nbytes):
            return False  # no delete of ours would make it fit
        target = settings.low - nbytes
        self.evict_to(store, target if store.foreign <= target else settings.ceiling - nbytes)
        return store.fits(nbytes)

    def forget_stale(self) -> None:
        """Of stores that others share: what was learnt too long ago. Chunks that are used after that are asked for, or written, again."""
        for store in self._state.stores.values():
            if store.remembered is None:
                continue
            for chunk in store.remembered.stale(self._state.now, self._state.settings.max_hold):
                stored = chunk.stored(store.tier)
                if stored is None:
                    continue
                if stored.state is StoredState.READY and not stored.readers:
                    self._forget_record(chunk, stored, store)
                    if not chunk.held:  # what stands below it can still be reached: whoever wants it asks
                        self._state.index.let_go(chunk, MissReason.NEVER_SEEN)
                else:
                    store.remembered.there(chunk, self._state.now)

    def trim(self) -> None:
        """Begin to bring every store below its ceiling that is above it: foreign files have grown, or it was set lower."""
        for store in self._state.stores.values():
            ceiling, low = store.settings.ceiling, store.settings.low
            if ceiling is not None and low is not None and not store.fits(0):
                self.evict_to(store, low if store.foreign <= low else ceiling)

    def give_back(self, store: StoreTier, nbytes: int) -> None:
        """Begin to delete at least so many bytes, if there are as many."""
        self.evict_to(store, store.used + store.foreign - store.leaving - nbytes)

    def evict_to(self, store: StoreTier, target: int) -> tuple[int, int]:
        """Begin to delete the coldest leaves until at most `target` bytes stay, or as many as the queue takes; returns chunks and bytes."""
        chunks = nbytes = 0
        most = min(self._state.settings.max_hold, max(1, store.settings.max_queued // 2) - store.deletes)
        while store.used + store.foreign - store.leaving > target and chunks < most:
            chunk = store.policy.victim(self._state.now, lambda victim: self.deletable(victim, store.tier))
            if chunk is None:
                break
            stored = chunk.stored(store.tier)
            assert stored is not None  # the policy holds only chunks that lie there
            chunks += 1
            nbytes += stored.nbytes
            self.begin_delete(chunk, stored, store, MissReason.EVICTED, evicts=True)
        return chunks, nbytes

    def evict_on_demand(self, store: StoreTier, target: int) -> Evicted:
        """Delete until at most `target` bytes stay: what the queue takes now, the rest as that is done."""
        chunks, nbytes = self.evict_to(store, target + store.arriving)
        ours = store.used - store.leaving - store.arriving
        owed = max(0, min(ours + store.foreign - target, ours))
        if store.leaving or owed:
            store.asked = max(0, target - store.foreign)
        return Evicted(chunks + -(-owed * len(store.policy) // max(1, ours)), nbytes + owed, 0)

    def pursue(self) -> None:
        """Go on with evictions on demand."""
        for store in self._state.stores.values():
            if store.asked is None:
                continue
            if store.up and self._state.now >= store.paused_until:
                self.evict_to(store, store.asked + store.foreign + store.arriving)
            # what is being read, or waits for a pause to end, may go later
            if store.used - store.arriving <= store.asked or not (
                store.leaving or store.reads or store.paused_until > self._state.now
            ):
                store.asked = None

    def deletable(self, chunk: Chunk, tier: Tier) -> bool:
        """Whether the chunk's records lie in the store and nobody is reading them."""
        stored = chunk.stored(tier)
        return (
            stored is not None
            and stored.state in (StoredState.READY, StoredState.PARTIAL)
            and not stored.readers
        )

    def begin_delete(
        self,
        chunk: Chunk,
        stored: StoredCopy,
        store: StoreTier,
        reason: MissReason,
        *,
        evicts: bool = False,
    ) -> None:
        """Have a store remove a chunk's records; its bytes count until that is done, and only then it counts as evicted."""
        op = self._state.begin(DeletePending(chunk, stored, store.tier, stored.state, evicts))
        stored.state = StoredState.DELETING
        stored.reason = reason
        store.policy.remove(chunk)
        store.partial.pop(chunk, None)
        store.leaving += stored.nbytes
        store.deletes += 1
        self._state.outbox.append(Delete(op, store.tier, chunk.mark, Priority.DELETE))

    def delete_done(self, pending: DeletePending, outcome: Outcome) -> None:
        """A delete ended; if it failed the records are still there, still counted, and go first next time."""
        chunk, stored = pending.chunk, pending.stored
        store = self._state.stores[pending.tier]
        store.leaving -= stored.nbytes
        store.deletes -= 1
        if outcome in (Outcome.OK, Outcome.MISSING):
            self._state.counters.tiers[store.tier].evicted += pending.evicts
            self.forget(chunk, stored, store, stored.reason)
            return
        if outcome not in _NEVER_SEEN:
            self._state.counters.tiers[store.tier].failed += 1
            store.asked = None  # the guard has tried again: whoever asked had better look at the store
        store.paused_until = max(store.paused_until, self._state.now + RETRY_PAUSE_S)
        stored.state = pending.before
        store.policy.insert(chunk, chunk.parent, stored.nbytes, self._state.now, Standing.ESTABLISHED)
        store.policy.expedite(chunk)

    def lost(self, chunk: Chunk, stored: StoredCopy, store: StoreTier, reason: MissReason) -> None:
        """A part of the chunk is missing or bad there: what is left of it goes too, where it takes space of ours."""
        if chunk.stored(store.tier) is not stored or stored.state not in (
            StoredState.READY,
            StoredState.PARTIAL,
        ):
            return  # another operation is on it already
        if store.settings.owned:
            stored.state = StoredState.PARTIAL  # also if the delete fails: it is not to be had
            self.begin_delete(chunk, stored, store, reason)
        else:
            self.forget(chunk, stored, store, reason)
            if store.remembered is not None:
                store.remembered.absent(chunk.space, chunk.key, self._state.now)

    def forget(self, chunk: Chunk, stored: StoredCopy, store: StoreTier, reason: MissReason) -> None:
        """The store has the chunk no more."""
        self._forget_record(chunk, stored, store)
        self._ledger.release_chunk(chunk, reason)

    @staticmethod
    def _forget_record(chunk: Chunk, stored: StoredCopy, store: StoreTier) -> None:
        store.policy.remove(chunk)
        store.partial.pop(chunk, None)
        if store.remembered is not None:
            store.remembered.forget(chunk)
        store.used -= stored.nbytes
        chunk.set_stored(store.tier, None)
