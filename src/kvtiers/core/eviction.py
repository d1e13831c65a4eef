"""Making room in a tier of slots: leaf first, demoted where no slower tier has the chunk, else dropped.

A chunk that a slower tier has is dropped at once. One that has to be written first leaves when that is done: such room comes
later, so eviction, once begun, goes down to the low watermark, and a store that comes too early is refused, not delayed. If
the slower tier is out of order nothing waits for it: the chunk is dropped. That is for what an engine stores; for a second copy
of what another tier holds too nothing is ever lost.

An eviction that somebody asked for loses only what no slower tier will take. What the next tier can't take yet (its queue is
full) stays, and the eviction is pursued as writes end; what is stored or used meanwhile is not meant by it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from kvtiers.core.index import Chunk, MemoryCopy, MemoryState
from kvtiers.core.ledger import Ledger
from kvtiers.core.messages import Slots
from kvtiers.core.policies.base import Standing
from kvtiers.core.starving import Going, Starving
from kvtiers.core.state import State
from kvtiers.core.tiers import MemoryTier
from kvtiers.model.reasons import MissReason, Refusal


class Loss(Enum):
    """Whether a chunk that no other tier has, and none takes now, may be dropped."""

    ALLOWED = "allowed"
    """For what an engine stores: it does not wait."""
    LAST_RESORT = "last resort"
    """If no slower tier takes it later either."""
    FORBIDDEN = "forbidden"


class Evicted(NamedTuple):
    """What an eviction did."""

    chunks: int
    """Gone, being deleted, or waiting for their turn to be; these by their mean size."""
    nbytes: int
    demoting: int
    """Chunks that leave as soon as the next tier has them; those it can't take yet by their mean size."""
    more: bool = False
    """The share of one call is used up: call again."""


class MemoryEvictor:
    """Evicts from one tier of slots."""

    def __init__(
        self,
        state: State,
        ledger: Ledger,
        tier: MemoryTier,
        *,
        is_clean: Callable[[MemoryCopy], bool],
        demote: Callable[[MemoryCopy, Loss], Refusal | None],
        can_demote: Callable[[], bool],
        takes_later: Callable[[MemoryCopy], bool],
        takes_ever: Callable[[MemoryCopy], bool],
    ) -> None:
        self._state = state
        self._ledger = ledger
        self._tier = tier
        self.is_clean = is_clean
        self._demote = demote
        self._can_demote = can_demote
        self._takes_later = takes_later
        self._takes_ever = takes_ever
        self._starving = Starving(state, tier, self)
        self._futile = -1
        """The tier's count of changes at the last search that found no victim: until it grows none need be made."""
        self.has_more = False
        """Whether the last pursuit ended because its share of one call was used up."""

    def make_room(self, nbytes: int, loss: Loss = Loss.ALLOWED) -> bool:
        """Whether so many bytes more fit under the ceiling now, after evicting if need be."""
        tier = self._tier
        return tier.used + nbytes <= tier.ceiling or self._make_room(nbytes, loss)

    def make_room_for_copy(self, nbytes: int) -> bool:
        """The same for another copy of what lies elsewhere: no chunk is lost for it."""
        return self._make_room(nbytes, Loss.FORBIDDEN)

    def take(
        self, sizes: tuple[int, ...], near: int | None = None, loss: Loss = Loss.ALLOWED
    ) -> Slots | None:
        """Slots of these sizes; if slots of other sizes hold the room, after evicting some of them. The caller has made room by bytes."""
        slots = self._tier.slots.take(sizes, near)
        return slots if slots is not None else self._starving.find(sizes, near, loss)

    @property
    def claimed(self) -> bool:
        """Whether slots that were refused are on their way."""
        return self._starving.claimed

    def evict_to(self, target: int, loss: Loss = Loss.ALLOWED, *, patient: bool = False) -> Evicted:
        """Evict until at most `target` bytes stay or are on their way out; at most `max_hold` chunks a call.

        `patient`: what is on its way out goes, however long the next tier pauses; else others go for it.
        """
        state, tier = self._state, self._tier
        chunks = nbytes = demoting = 0
        for _ in range(state.settings.max_hold):
            on_the_way = tier.leaving if tier.leaving and (patient or self._can_demote()) else 0
            if tier.used - on_the_way <= target or tier.changes == self._futile:
                break
            chunk = self.coldest()
            if chunk is None:
                break
            copy = chunk.memory(tier.tier)
            assert copy is not None  # the policy holds only chunks that lie here
            going = self.let_go(copy, loss)
            if going is Going.STAYS:
                break
            if going is Going.LEAVING:
                demoting += 1
            else:
                chunks += 1
                nbytes += copy.nbytes
        else:
            return Evicted(chunks, nbytes, demoting, more=True)
        return Evicted(chunks, nbytes, demoting)

    def coldest(self) -> Chunk | None:
        """The chunk to go next, of those that may."""
        tier = self._tier
        if tier.changes == self._futile:
            return None
        chunk = tier.policy.victim(self._state.now, self._may_go)
        if chunk is None:
            self._futile = tier.changes
        return chunk

    def let_go(self, copy: MemoryCopy, loss: Loss) -> Going:
        """Drop a copy that may go, or begin to bring it to the next tier if that lacks it."""
        counters = self._state.counters.tiers[self._tier.tier]
        reason = MissReason.EVICTED
        if not self.is_clean(copy):
            refusal = self._demote(copy, loss)
            if refusal is None:
                self._ledger.leave(copy)
                return Going.LEAVING
            if loss is Loss.FORBIDDEN or (loss is Loss.LAST_RESORT and self._takes_later(copy)):
                return Going.STAYS
            counters.dropped_dirty += 1
            if refusal is Refusal.NOT_ADMITTED:
                reason = MissReason.NOT_ADMITTED
        counters.evicted += 1
        self._ledger.detach(copy, reason)
        return Going.GONE

    def evict_on_demand(self, target: int) -> Evicted:
        """Evict until at most `target` bytes stay, now or as the next tier takes what only this one has."""
        tier = self._tier
        tier.asked = None
        done = self.evict_to(target, Loss.LAST_RESORT, patient=True)
        if done.more:
            return done
        tier.asked = target
        owed = self._owed()
        self._end_pursuit()
        if not owed:
            return done
        staying = tier.used - tier.leaving
        return done._replace(demoting=done.demoting + -(-owed * len(tier.policy) // staying))

    def pursue(self) -> None:
        """Go on with an eviction that waits for the next tier: drop what that has by now, demote what it takes. Loses nothing."""
        self.has_more = False
        if self._tier.asked is not None:
            self.has_more = self.evict_to(self._tier.asked, Loss.FORBIDDEN, patient=True).more
            if not self.has_more and self._is_hopeless():
                self._tier.asked = None
            self._end_pursuit()

    def keep(self, copy: MemoryCopy, standing: Standing) -> bool:
        """Make a staged copy part of the cache, if there is room for it."""
        if not self.make_room_for_copy(copy.nbytes):
            return False
        self._ledger.keep(copy, standing)
        return True

    def settle_unstaged(self) -> None:
        """Staged copies that nobody needs any more join the cache on probation, or their slots are freed."""
        unstaged = self._state.unstaged
        while unstaged:
            copy = unstaged.popleft()
            if copy.detached or copy.leases or not copy.staged:
                continue
            if not self.keep(copy, Standing.PROBATION):
                self._drop_staged(copy)

    def _drop_staged(self, copy: MemoryCopy) -> None:
        """Free a staged copy. One that no store has and the GPU pool does comes down again when it can be written."""
        state, chunk = self._state, copy.chunk
        dirty = not self.is_clean(copy)
        waits = dirty and any(store.is_to_write(chunk) for store in state.stores.values())
        if dirty and chunk.gpu is None:
            state.counters.tiers[self._tier.tier].dropped_dirty += 1
        self._ledger.detach(copy, MissReason.EVICTED)
        if waits and state.gpu is not None and chunk.gpu is not None:
            state.gpu.backlog.setdefault(chunk, None)

    def _make_room(self, nbytes: int, loss: Loss) -> bool:
        tier = self._tier
        if tier.used + nbytes <= tier.ceiling:
            return True
        if nbytes > tier.ceiling:
            return False
        self.evict_to(max(0, tier.settings.low - nbytes), loss)
        return tier.used + nbytes <= tier.ceiling

    def _owed(self) -> int:
        """Bytes above what was asked for that go as soon as the next tier has them, and are not on their way yet."""
        tier = self._tier
        if tier.asked is None:
            return 0
        owed = tier.used - tier.leaving - tier.asked
        if tier.changes == self._futile:  # the rest is held; only background work lets go soon
            owed = min(owed, tier.write_leased + tier.sources - tier.leaving)
        return max(0, owed)

    def _is_hopeless(self) -> bool:
        """Whether what would go next has to stay, as no slower tier can be expected to take it."""
        chunk = self.coldest() if self._owed() else None
        copy = chunk.memory(self._tier.tier) if chunk is not None else None
        return copy is not None and not self.is_clean(copy) and not self._takes_ever(copy)

    def _end_pursuit(self) -> None:
        tier = self._tier
        if tier.asked is None:
            return
        # what is leaving may yet come back: a disk can be full
        if tier.used <= tier.asked or not (self._owed() or tier.leaving):
            tier.asked = None

    def _may_go(self, chunk: Chunk) -> bool:
        copy = chunk.memory(self._tier.tier)
        return copy is not None and copy.state is MemoryState.READY and not copy.leases
