"""Between the GPU pool and the arena: what is stored on the device is copied down in the background, what is hit in the arena up.

Copies down are bounded like writes (they hold arena slots), and what is copied down is sealed on the way: a chunk in the GPU
pool has no checksum until it reaches the arena.
"""

from __future__ import annotations

from collections.abc import Callable

from kvtiers.core.eviction import MemoryEvictor
from kvtiers.core.index import Chunk, MemoryCopy, MemoryState, StoredState
from kvtiers.core.ledger import Ledger
from kvtiers.core.messages import Copy, Outcome, Priority
from kvtiers.core.policies.base import Standing
from kvtiers.core.state import CopyPending, State
from kvtiers.core.tiers import MemoryTier
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier


class Mover:
    """Copies chunks between the GPU pool and the arena."""

    def __init__(
        self,
        state: State,
        ledger: Ledger,
        cpu_evictor: MemoryEvictor,
        schedule: Callable[[Chunk], None],
    ) -> None:
        self._state = state
        self._ledger = ledger
        self._cpu_evictor = cpu_evictor
        self._schedule = schedule

    def is_clean(self, copy: MemoryCopy) -> bool:
        """Whether a slower tier has what lies in this GPU copy."""
        chunk = copy.chunk
        if chunk.cpu is not None and chunk.cpu.state is MemoryState.READY and not chunk.cpu.staged:
            return True
        return any(
            stored is not None and stored.state is StoredState.READY for stored in (chunk.disk, chunk.remote)
        )

    def can_demote(self) -> bool:
        """Whether copies down can be expected to end: they always can."""
        return True

    def copy_down(self, copy: MemoryCopy) -> bool:
        """Begin to copy a chunk from the GPU pool into the arena; False if there is no room, or no need."""
        state, chunk = self._state, copy.chunk
        cpu = state.cpu
        if chunk.cpu is not None or not copy.chunk.space.parts or copy.state is not MemoryState.READY:
            return False
        if not cpu.keeps and not state.stores:
            return False
        budget = int(cpu.settings.capacity * state.settings.write_lease_share)
        if cpu.write_leased > 0 and cpu.write_leased + copy.nbytes > budget:
            return False
        if cpu.keeps:
            has_room = self._cpu_evictor.make_room(copy.nbytes)
        else:
            has_room = copy.nbytes <= cpu.staging_free
        slots = cpu.slots.take(chunk.space.parts) if has_room else None
        if slots is None:
            return False
        target = self._ledger.attach(
            chunk, cpu, slots, chunk.space.parts, MemoryState.FILLING, staged=not cpu.keeps
        )
        cpu.write_leased += target.nbytes
        self._begin(copy, target, Priority.STORE)
        return True

    def copy_up(self, copy: MemoryCopy, gpu: MemoryTier, gpu_evictor: MemoryEvictor) -> bool:
        """Begin to copy a chunk that was hit in the arena into the GPU pool; False if there is no room."""
        chunk = copy.chunk
        parts = chunk.space.parts
        if chunk.gpu is not None or copy.state is not MemoryState.READY or parts is None:
            return False
        slots = gpu.slots.take(parts) if gpu_evictor.make_room(copy.nbytes) else None
        if slots is None:
            return False
        target = self._ledger.attach(chunk, gpu, slots, parts, MemoryState.FILLING, staged=False)
        self._begin(copy, target, Priority.PROMOTE)
        return True

    def copy_done(self, pending: CopyPending, outcome: Outcome, checksums: tuple[bytes, ...]) -> None:
        """A copy ended."""
        source, target = pending.source, pending.target
        down = target.tier is Tier.CPU
        if down:
            self._state.cpu.write_leased -= target.nbytes
        counters = self._state.counters.tiers
        if target.detached:
            pass
        elif outcome is Outcome.OK:
            target.checksums = checksums
            self._ledger.publish(target, Standing.ESTABLISHED if down else Standing.PROBATION)
            if down:
                self._schedule(target.chunk)
            else:
                counters[Tier.CPU].promoted += 1
            if down and source.leaving and source.leases == 1:
                counters[Tier.GPU].demoted += 1
                counters[Tier.GPU].evicted += 1
                self._ledger.detach(source, MissReason.EVICTED)
        else:
            counters[target.tier].failed += 1
            self._ledger.detach(target, MissReason.EVICTED)
        self._ledger.stay(source)
        self._ledger.unlease(target)
        self._ledger.unlease(source)

    def _begin(self, source: MemoryCopy, target: MemoryCopy, priority: Priority) -> None:
        self._ledger.lease(source)
        op = self._state.begin(CopyPending(source, target))
        target.filled_by = op
        self._state.outbox.append(
            Copy(op, source.chunk.space.id, source.tier, source.slots, target.tier, target.slots, priority)
        )
