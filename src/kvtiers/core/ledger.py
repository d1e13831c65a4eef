"""Slots and leases: when memory is taken, held and given back.

The one rule: a slot returns to the free list only when its copy is detached from its chunk and nothing holds a lease on it.
So whoever may still write to a slot (an engine, a late read) keeps it from being reused for as long as it takes.
"""

from __future__ import annotations

from kvtiers.core.index import Chunk, MemoryCopy, MemoryState
from kvtiers.core.messages import Slots
from kvtiers.core.policies.base import Standing
from kvtiers.core.state import State
from kvtiers.core.tiers import MemoryTier
from kvtiers.model.errors import InvariantBroken
from kvtiers.model.parts import Parts
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier


class Ledger:
    """Takes, leases and frees the slots of the memory tiers."""

    def __init__(self, state: State) -> None:
        self._state = state

    def attach(self, chunk: Chunk, tier: MemoryTier, slots: Slots, parts: Parts, state: MemoryState, *, staged: bool) -> MemoryCopy:
        """Make `slots`, just taken from the tier, the chunk's copy there; it has one lease, the caller's."""
        copy = MemoryCopy(chunk, tier.tier, slots, parts.slot_bytes, state, staged=staged)
        copy.leases = 1
        if staged:
            tier.staged += copy.nbytes
        else:
            tier.used += copy.nbytes
        chunk.num_parts = len(parts)
        chunk.set_memory(tier.tier, copy)
        return copy

    def publish(self, copy: MemoryCopy, standing: Standing) -> None:
        """The copy's bytes are complete: from now on it can be hit, and, unless it is staged, evicted."""
        copy.state = MemoryState.READY
        if not copy.staged:
            self.enter_policy(copy, standing)

    def enter_policy(self, copy: MemoryCopy, standing: Standing) -> None:
        """The copy is part of the cache proper."""
        tier = self._state.memory(copy.tier)
        tier.policy.insert(copy.chunk, copy.chunk.parent, copy.nbytes, self._state.now, standing)
        self._state.counters.tiers[copy.tier].stored += 1

    def lease(self, copy: MemoryCopy) -> None:
        """Hold the copy's slots."""
        copy.leases += 1

    def unlease(self, copy: MemoryCopy) -> None:
        """Give one lease back; frees the slots if it was the last and the copy is detached."""
        if copy.leases < 1:
            raise InvariantBroken(f"a lease of chunk {copy.chunk.key.hex()[:12]} was given back twice")
        copy.leases -= 1
        if copy.leases:
            return
        if copy.detached:
            self._free(copy)
        elif copy.staged and copy.state is MemoryState.READY:
            self._state.unstaged.append(copy)

    def detach(self, copy: MemoryCopy, reason: MissReason) -> None:
        """The chunk has this copy no more; its slots are freed now or with the last lease."""
        if copy.detached:
            return
        copy.detached = True
        chunk = copy.chunk
        self._state.memory(copy.tier).policy.remove(chunk)
        if chunk.memory(copy.tier) is copy:
            chunk.set_memory(copy.tier, None)
        if copy.tier is Tier.CPU:
            for store in self._state.stores.values():
                store.backlog.pop(chunk, None)
        self.stay(copy)
        if not copy.leases:
            self._free(copy)
        self.release_chunk(chunk, reason)

    def leave(self, copy: MemoryCopy) -> None:
        """The copy is being brought to the next tier and will be dropped then."""
        if not copy.leaving:
            copy.leaving = True
            self._state.memory(copy.tier).leaving += copy.nbytes

    def stay(self, copy: MemoryCopy) -> None:
        """The copy is not to be dropped (any more)."""
        if copy.leaving:
            copy.leaving = False
            self._state.memory(copy.tier).leaving -= copy.nbytes

    def release_chunk(self, chunk: Chunk, reason: MissReason) -> None:
        """If no tier holds the chunk any more: a ghost, and its descendants are unreachable, so they go first."""
        if chunk.held:
            return
        self.expedite_below(chunk)
        self._state.index.let_go(chunk, reason)

    def expedite_below(self, chunk: Chunk) -> None:
        """Let what stands below an unreachable chunk go first, in every tier; leaves end up foremost."""
        state = self._state
        queue = list(chunk.children or ())
        budget = state.settings.max_hold
        while queue and budget:
            budget -= 1
            child = queue.pop(0)
            queue.extend(child.children or ())
            for tier in (state.cpu, state.gpu, *state.stores.values()):
                if tier is not None:
                    tier.policy.expedite(child)

    def _free(self, copy: MemoryCopy) -> None:
        tier = self._state.memory(copy.tier)
        tier.slots.give(copy.slots)
        if copy.staged:
            tier.staged -= copy.nbytes
        else:
            tier.used -= copy.nbytes
        copy.slots = ()
