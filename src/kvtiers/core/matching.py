"""Where a chunk can be had from, and why not. Pure: memory only, nothing is counted, touched or begun."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvtiers.core.index import Chunk, MemoryCopy, MemoryState, Space, StoredState
from kvtiers.core.probing import Prober
from kvtiers.core.state import ReadPending, State
from kvtiers.core.tickets import Match
from kvtiers.core.tiers import StoreTier
from kvtiers.model.keys import ChunkKey
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier


class Found(NamedTuple):
    """The nearest tier that can give a chunk: a copy in memory, or a store to read it from."""

    tier: Tier
    copy: MemoryCopy | None
    store: StoreTier | None


class Matcher:
    """Finds chunks in the nearest tier that can give them."""

    def __init__(self, state: State, prober: Prober) -> None:
        self._state = state
        self._prober = prober

    def lookup(self, space: Space, keys: Sequence[ChunkKey]) -> Match:
        """Pure: what a load of these keys would find, in memory only. Counts and touches nothing."""
        tiers: list[Tier] = []
        pending = 0
        chunks, ready, cpu = space.chunks, MemoryState.READY, Tier.CPU
        for key in keys:
            chunk = chunks.get(key)
            if chunk is not None and chunk.gpu is None and chunk.cpu is not None and chunk.cpu.state is ready:
                tiers.append(cpu)  # what most are like, in an eighth of the time of what follows
                continue
            found = self.locate(chunk) if chunk is not None else None
            if found is None:
                return Match(tuple(tiers), pending, self.why_not(chunk))
            tiers.append(found.tier)
            if found.copy is not None and found.copy.state is MemoryState.FILLING:
                pending += 1
        return Match(tuple(tiers), pending, None)

    def locate(self, chunk: Chunk) -> Found | None:
        """The nearest tier that can give the chunk."""
        gpu, cpu = chunk.gpu, chunk.cpu
        if gpu is not None and gpu.state is MemoryState.READY:
            return Found(Tier.GPU, gpu, None)
        if cpu is not None:
            if cpu.state is MemoryState.READY:
                return Found(Tier.CPU, cpu, None)
            if cpu.state is MemoryState.FILLING and cpu.filled_by is not None:
                pending = self._state.pending.get(cpu.filled_by)
                # nobody comes to wait for a read that a broken store is stuck in
                if isinstance(pending, ReadPending) and self._state.stores[pending.tier].up:
                    return Found(pending.tier, cpu, None)
            return None
        for tier, store in self._state.stores.items():
            stored = chunk.stored(tier)
            if stored is not None and stored.state is StoredState.READY and store.up:
                return Found(tier, None, store)
        return None

    def why_not(self, chunk: Chunk | None) -> MissReason:
        """Why no tier can give a chunk, known or not."""
        if not self._state.enabled:
            return MissReason.DISABLED
        reason = MissReason.NEVER_SEEN if chunk is None else self._why_not_here(chunk)
        if reason in (MissReason.NEVER_SEEN, MissReason.EVICTED) and self._prober.is_down(chunk):
            return MissReason.TIER_OPEN  # it may lie there
        return reason

    def _why_not_here(self, chunk: Chunk) -> MissReason:
        cpu = chunk.cpu
        if cpu is not None and cpu.filled_by is not None:
            pending = self._state.pending.get(cpu.filled_by)
            if isinstance(pending, ReadPending):
                return MissReason.TIER_OPEN
        if chunk.gpu is not None or cpu is not None:
            return MissReason.IN_FLIGHT
        reasons: list[MissReason] = []
        for tier in self._state.stores:
            stored = chunk.stored(tier)
            if stored is None:
                continue
            if stored.state is StoredState.READY:
                return MissReason.TIER_OPEN  # it lies there, but the store is down
            if stored.state is StoredState.WRITING:
                return MissReason.IN_FLIGHT
            partial = stored.state is StoredState.PARTIAL
            reasons.append(MissReason.GROUP_STATE_MISSING if partial else stored.reason)
        return reasons[0] if reasons else chunk.gone
