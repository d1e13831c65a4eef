"""Slots and leases: when memory is taken, held and given back.

The one rule: a slot returns to the free list only when its copy is detached from its chunk and nothing holds a lease on it.
So whoever may still write to a slot (an engine, a late read) keeps it from being reused for as long as it takes.

A copy of the cache proper stands in its tier's policy from the moment its slots are taken, though it may not go before its
bytes are complete: so it protects its ancestors while an engine is still filling it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from kvtiers.core.index import Chunk, MemoryCopy, MemoryState
from kvtiers.core.messages import Slots
from kvtiers.core.policies.base import Standing
from kvtiers.core.state import State
from kvtiers.core.tiers import MemoryTier
from kvtiers.model.errors import InvariantBroken
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier


class Ledger:
    """Takes, leases and frees the slots of the memory tiers."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._policies = [
            tier.policy for tier in (state.gpu, state.cpu, *state.stores.values()) if tier is not None
        ]
        self._unreachable: deque[tuple[Chunk, Chunk]] = deque()
        """Chunks below which everything is to go first, each with the chunk whose loss made it so."""
        self._children: Iterator[Chunk] | None = None
        """Those of the first one, if they were too many for one call."""

    def attach(
        self, chunk: Chunk, tier: MemoryTier, slots: Slots, state: MemoryState, standing: Standing
    ) -> MemoryCopy:
        """Make `slots`, just taken from the tier, the chunk's copy there; it has one lease, the caller's."""
        copy = self._attach(chunk, tier, slots, state, staged=False)
        tier.used += copy.nbytes
        if tier.asked is not None:
            tier.asked += copy.nbytes
        tier.policy.insert(chunk, chunk.parent, copy.nbytes, self._state.now, standing)
        self._keep_above(chunk, tier)
        return copy

    def attach_staged(self, chunk: Chunk, slots: Slots, state: MemoryState) -> MemoryCopy:
        """The same in the staging share of the arena."""
        copy = self._attach(chunk, self._state.cpu, slots, state, staged=True)
        self._state.cpu.staged += copy.nbytes
        return copy

    def publish(self, copy: MemoryCopy) -> None:
        """The copy's bytes are complete: from now on it can be hit, and, unless it is staged, evicted."""
        copy.state = MemoryState.READY
        if not copy.staged:
            self._state.counters.tiers[copy.tier].stored += 1
            copy.home.changes += 1

    def keep(self, copy: MemoryCopy, standing: Standing) -> None:
        """A staged copy becomes part of the cache; the caller has made room for it."""
        tier = self._state.cpu
        copy.staged = False
        tier.staged -= copy.nbytes
        tier.used += copy.nbytes
        if tier.asked is not None:
            tier.asked += copy.nbytes
        tier.changes += 1
        tier.policy.insert(copy.chunk, copy.chunk.parent, copy.nbytes, self._state.now, standing)
        self._keep_above(copy.chunk, tier)
        self._state.counters.tiers[copy.tier].stored += 1

    def _keep_above(self, chunk: Chunk, tier: MemoryTier) -> None:
        """What a chunk of the cache continues is a leaf no more, and does not leave."""
        above = chunk.parent.memory(tier.tier) if chunk.parent is not None else None
        if above is not None and above.leaving:
            self.stay(above)

    def lease(self, copy: MemoryCopy) -> None:
        """Hold the copy's slots."""
        if not copy.leases:
            copy.home.leased += 1
        copy.leases += 1

    def unlease(self, copy: MemoryCopy) -> None:
        """Give one lease back; frees the slots if it was the last and the copy is detached."""
        if copy.leases < 1:
            raise InvariantBroken(f"a lease of chunk {copy.chunk.key.hex()[:12]} was given back twice")
        copy.leases -= 1
        if copy.leases:
            return
        tier = copy.home
        tier.leased -= 1
        tier.changes += 1
        if copy.detached:
            self._free(copy)
        elif copy.leaving:
            self._drop_left(copy)
        elif copy.staged and copy.state is MemoryState.READY:
            self._state.unstaged.append(copy)

    def detach(self, copy: MemoryCopy, reason: MissReason) -> None:
        """The chunk has this copy no more; its slots are freed now or with the last lease."""
        if copy.detached:
            return
        parent = copy.chunk.parent
        self._detach(copy, reason)
        above = parent.memory(copy.tier) if parent is not None else None
        if above is not None and above.leaving:
            self._drop_left(above)

    def leave(self, copy: MemoryCopy) -> None:
        """The copy is being brought to the next tier, and is dropped when that is done and its children there are gone.

        Until then it is no candidate for eviction, and its parent may leave too.
        """
        copy.leaving = True
        copy.home.leaving += copy.nbytes
        copy.home.changes += 1
        copy.home.policy.remove(copy.chunk)

    def stay(self, copy: MemoryCopy, *, meant: bool = False) -> None:
        """The copy is not to be dropped (any more), nor is what it continues. `meant`: an eviction on demand still is about it."""
        tier, now = copy.home, self._state.now
        staying: MemoryCopy | None = copy
        while staying is not None and staying.leaving:
            chunk = staying.chunk
            self._stop_leaving(staying)
            if tier.asked is not None and not meant:
                tier.asked += staying.nbytes
            tier.policy.insert(chunk, chunk.parent, staying.nbytes, now, Standing.ESTABLISHED)
            staying = chunk.parent.memory(tier.tier) if chunk.parent is not None else None

    def release_chunk(self, chunk: Chunk, reason: MissReason) -> None:
        """If no tier holds the chunk any more: a ghost, and its descendants are unreachable, so they go first."""
        if chunk.held:
            return
        self.let_go_below(chunk)
        self._state.index.let_go(chunk, reason)

    def let_go_below(self, chunk: Chunk) -> None:
        """No tier holds the chunk: what stands below it shall go first (`sweep`)."""
        if chunk.first_child is not None:
            self._unreachable.append((chunk, chunk))

    def sweep(self) -> None:
        """Have unreachable chunks go first in every tier, at most `max_hold` a call."""
        queue = self._unreachable
        budget = self._state.settings.max_hold
        while queue and budget > 0:
            lost, chunk = queue[0]
            # a list: some may be unlinked before the next call
            children = self._children or iter(list(chunk.children()))
            self._children = None
            some = () if lost.held else list(islice(children, budget))  # else it came back meanwhile
            for child in some:
                if not child.held:
                    continue  # what stands below it was queued when it was let go
                for policy in self._policies:
                    policy.expedite(child)
                if child.first_child is not None:
                    queue.append((lost, child))
            if len(some) == budget:
                self._children = children
                return
            budget -= len(some)
            queue.popleft()

    def _attach(
        self, chunk: Chunk, tier: MemoryTier, slots: Slots, state: MemoryState, *, staged: bool
    ) -> MemoryCopy:
        if chunk.memory(tier.tier) is not None:
            raise InvariantBroken(f"chunk {chunk.key.hex()[:12]} can't have a second copy in {tier.tier}")
        copy = MemoryCopy(chunk, tier, slots, state, staged=staged)
        tier.slots.assign(slots, copy)
        tier.leased += 1
        chunk.num_parts = len(slots)
        chunk.set_memory(tier.tier, copy)
        return copy

    def _detach(self, copy: MemoryCopy, reason: MissReason) -> None:
        copy.detached = True
        chunk, tier = copy.chunk, copy.home
        if copy.leaving:
            self._stop_leaving(copy)
        if not copy.staged:
            tier.policy.remove(chunk)
            tier.changes += 1
        chunk.set_memory(copy.tier, None)
        if copy.tier is Tier.CPU:
            for store in self._state.stores.values():
                if store.backlog:
                    store.backlog.pop(chunk, None)
                if store.resting:
                    store.resting.pop(chunk, None)
        elif tier.backlog:
            tier.backlog.pop(chunk, None)
        if not copy.leases:
            self._free(copy)
        if not chunk.held:
            self.release_chunk(chunk, reason)

    def _drop_left(self, copy: MemoryCopy) -> None:
        """Drop what is on its way out, held by nobody and without children in the tier; then the same with its parent."""
        counters = self._state.counters.tiers[copy.tier]
        leaving: MemoryCopy | None = copy
        while leaving is not None and leaving.leaving and not leaving.leases:
            parent = leaving.chunk.parent
            if leaving.chunk.children_in(copy.tier):
                return
            counters.evicted += 1
            counters.demoted += 1
            self._detach(leaving, MissReason.EVICTED)
            leaving = parent.memory(copy.tier) if parent is not None else None

    def _stop_leaving(self, copy: MemoryCopy) -> None:
        copy.leaving = False
        copy.home.leaving -= copy.nbytes

    def _free(self, copy: MemoryCopy) -> None:
        tier = copy.home
        tier.slots.give(copy.slots)
        if copy.staged:
            tier.staged -= copy.nbytes
        else:
            tier.used -= copy.nbytes
        copy.slots = ()
