"""Between the GPU pool and the arena: what is stored on the device is copied down in the background, what is hit in the arena up.

Copies down are bounded like writes (they hold arena slots): what does not fit the budget, or would push out of the arena what
nobody else has, waits in the pool's backlog and holds nothing. What is copied down is sealed on the way: a chunk in the GPU pool has no checksum until it reaches the arena.
"""

from __future__ import annotations

from collections.abc import Callable

from kvtiers.core.eviction import Loss, MemoryEvictor
from kvtiers.core.index import Chunk, MemoryCopy, MemoryState, StoredState
from kvtiers.core.ledger import Ledger
from kvtiers.core.messages import Copy, Outcome, Priority
from kvtiers.core.policies.base import Standing
from kvtiers.core.state import CopyPending, State
from kvtiers.core.tiers import MemoryTier
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier


class Mover:
    """Copies chunks between the GPU pool and the arena."""

    def __init__(
        self,
        state: State,
        ledger: Ledger,
        cpu_evictor: MemoryEvictor,
        schedule: Callable[[Chunk], None],
        takes_now: Callable[[MemoryCopy], bool],
    ) -> None:
        """`schedule`: write a chunk that has come down. `takes_now`: whether a store would begin to."""
        self._state = state
        self._ledger = ledger
        self._cpu_evictor = cpu_evictor
        self._schedule = schedule
        self._takes_now = takes_now
        self._lease_budget = int(state.cpu.settings.capacity * state.settings.write_lease_share)

    def is_clean(self, copy: MemoryCopy) -> bool:
        """Whether a slower tier has, or is receiving, what lies in this GPU copy."""
        chunk = copy.chunk
        if chunk.cpu is not None and chunk.cpu.state is MemoryState.READY and not chunk.cpu.staged:
            return True
        return any(
            stored is not None and stored.state in (StoredState.READY, StoredState.WRITING)
            for stored in (chunk.disk, chunk.remote)
        )

    def can_demote(self) -> bool:
        """Whether copies down can be expected to end: they always can."""
        return True

    def schedule_down(self, copy: MemoryCopy) -> None:
        """Have a chunk of the GPU pool copied into the arena as soon as the budget allows, if no slower tier has it."""
        gpu = self._state.gpu
        if gpu is None or not (self._state.cpu.keeps or self._state.stores):
            return
        if copy.chunk.cpu is None and not self.is_clean(copy):
            gpu.backlog.setdefault(copy.chunk, None)

    def drain(self) -> None:
        """Copy down everything that only the GPU pool holds, parents first."""
        gpu = self._state.gpu
        if gpu is None:
            return
        for chunk in reversed(list(gpu.policy.coldest_first())):
            if chunk.gpu is not None and chunk.gpu.state is MemoryState.READY:
                self.schedule_down(chunk.gpu)

    def pump(self) -> None:
        """Begin copies down from the backlog as far as the budget allows, in order of arrival."""
        gpu = self._state.gpu
        if gpu is None:
            return
        for _ in range(min(len(gpu.backlog), self._state.settings.max_hold)):
            chunk = next(iter(gpu.backlog))
            copy = chunk.gpu
            refusal = None if copy is None else self._copy_down(copy, Loss.FORBIDDEN)
            if refusal is Refusal.QUEUE_FULL and self._room_may_come():
                break
            gpu.backlog.pop(chunk, None)

    def copy_down(self, copy: MemoryCopy, loss: Loss) -> Refusal | None:
        """Begin to copy a chunk that is being pushed out of the GPU pool into the arena, where colder chunks may have to go for it."""
        return self._copy_down(copy, Loss.ALLOWED if loss is Loss.ALLOWED else Loss.LAST_RESORT)

    def takes_later(self, copy: MemoryCopy) -> bool:
        """Whether the arena can be expected to take the chunk, if not now."""
        return self._has_place(copy) and self._room_may_come()

    def _has_place(self, copy: MemoryCopy) -> bool:
        cpu = self._state.cpu
        if not cpu.keeps:
            return bool(self._state.stores) and copy.nbytes <= cpu.settings.staging
        return copy.nbytes <= cpu.settings.ceiling

    def _copy_down(self, copy: MemoryCopy, loss: Loss) -> Refusal | None:
        """QUEUE_FULL if there is no room yet."""
        state, chunk = self._state, copy.chunk
        cpu = state.cpu
        if chunk.cpu is not None or copy.state is not MemoryState.READY:
            return Refusal.PRESENT
        if not self._has_place(copy):
            return Refusal.NO_SLOT
        if cpu.write_leased and cpu.write_leased + copy.nbytes > self._lease_budget:
            return Refusal.QUEUE_FULL
        if cpu.keeps:
            has_room = self._cpu_evictor.make_room(copy.nbytes, loss)
        else:  # the arena only passes it on: what no store takes then would be dropped at once
            has_room = copy.nbytes <= cpu.staging_free and self._takes_now(copy)
        if not has_room:
            return Refusal.QUEUE_FULL
        slots = self._cpu_evictor.take(chunk.space.slot_sizes, loss=loss)
        if slots is None:  # slots of other sizes hold the room
            return Refusal.QUEUE_FULL if self._cpu_evictor.claimed else Refusal.NO_SLOT
        if cpu.keeps:
            target = self._ledger.attach(chunk, cpu, slots, MemoryState.FILLING, Standing.ESTABLISHED)
        else:
            target = self._ledger.attach_staged(chunk, slots, MemoryState.FILLING)
        cpu.write_leased += target.nbytes
        self._begin(copy, target, Priority.STORE)
        return None

    def copy_up(self, copy: MemoryCopy, gpu: MemoryTier, gpu_evictor: MemoryEvictor) -> bool:
        """Begin to copy a chunk that was hit in the arena into the GPU pool, if it is not there; False if there is no room."""
        chunk = copy.chunk
        if chunk.gpu is not None or copy.detached:
            return True
        if not gpu_evictor.make_room_for_copy(copy.nbytes):
            return False
        slots = gpu_evictor.take(chunk.space.slot_sizes, loss=Loss.FORBIDDEN)
        if slots is None:
            return False
        target = self._ledger.attach(chunk, gpu, slots, MemoryState.FILLING, Standing.PROBATION)
        self._begin(copy, target, Priority.PROMOTE)
        return True

    def copy_done(self, pending: CopyPending, outcome: Outcome, checksums: tuple[bytes, ...]) -> None:
        """A copy ended."""
        source, target = pending.source, pending.target
        down = target.tier is Tier.CPU
        counters = self._state.counters.tiers
        target.filled_by = None
        source.home.sources -= source.nbytes
        if down:
            self._state.cpu.write_leased -= target.nbytes
        if outcome is not Outcome.OK:
            counters[target.tier].failed += 1
            self._ledger.detach(target, MissReason.EVICTED)
        elif not target.detached:
            target.checksums = checksums or source.checksums  # sealed while it was copied
            self._ledger.publish(target)
            if down:
                source.checksums = checksums  # what the pool holds can be verified from now on
                self._schedule(target.chunk)
            else:
                counters[Tier.CPU].promoted += 1
        if target.detached:
            self._ledger.stay(source)
        self._ledger.unlease(target)
        self._ledger.unlease(source)  # drops it if it was leaving

    def _room_may_come(self) -> bool:
        """Whether something is under way, or waits for its turn, that ends with room or budget in the arena."""
        state = self._state
        return state.background > 0 or any(
            store.up
            and (store.backlog or (not state.cpu.keeps and (store.leaving or store.rests_until > state.now)))
            for store in state.stores.values()
        )

    def _begin(self, source: MemoryCopy, target: MemoryCopy, priority: Priority) -> None:
        self._ledger.lease(source)
        source.home.sources += source.nbytes
        op = self._state.begin(CopyPending(source, target))
        target.filled_by = op
        self._state.outbox.append(
            Copy(
                op,
                source.chunk.space.id,
                source.tier,
                source.slots,
                target.tier,
                target.slots,
                source.checksums,
                priority,
            )
        )
