"""Stores: an engine gets slots for the chunks that no tier has, fills them, and commits.

A store is refused, never queued. A chunk that is present already, or that another session is storing, is passed over; any
other refusal ends the store, because what comes after it in the chain could never be found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtiers.core.eviction import MemoryEvictor
from kvtiers.core.index import Chunk, MemoryCopy, MemoryState, Space, StoredState
from kvtiers.core.ledger import Ledger
from kvtiers.core.messages import Outcome, Priority, Seal, Slots
from kvtiers.core.moving import Mover
from kvtiers.core.policies.base import Standing
from kvtiers.core.state import SealPending, State
from kvtiers.core.tickets import StoreSlot, StoreTicket
from kvtiers.core.tiers import MemoryTier
from kvtiers.core.touching import Toucher
from kvtiers.core.writing import StoreWriter
from kvtiers.model.errors import InvariantBroken
from kvtiers.model.keys import ChunkKey
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier


class Storing:
    """Opens, commits and aborts stores."""

    def __init__(
        self,
        state: State,
        ledger: Ledger,
        writer: StoreWriter,
        mover: Mover,
        toucher: Toucher,
        *,
        cpu_evictor: MemoryEvictor,
        gpu_evictor: MemoryEvictor | None,
    ) -> None:
        self._state = state
        self._ledger = ledger
        self._writer = writer
        self._mover = mover
        self._toucher = toucher
        self._cpu_evictor = cpu_evictor
        self._gpu_evictor = gpu_evictor
        self._stage_budget = int(state.cpu.settings.capacity * state.settings.write_lease_share)

    def open(self, ticket: StoreTicket, root: ChunkKey, keys: Sequence[ChunkKey], first: int) -> None:
        """Fill the ticket: slots for the chunks `keys[first:]` that are wanted, refusals for the others."""
        space = ticket.space
        if space.parts is None:
            raise InvariantBroken("a session stores into a namespace it has not attached to")
        pins: list[MemoryCopy] | None = None
        for index, key in enumerate(keys):
            chunk = space.chunks.get(key)
            refusal = self._passed_over(chunk)
            if chunk is not None and refusal is not None:
                ticket.chain.append(chunk)
                if index >= first:
                    self._refuse(ticket, index, refusal)
                if pins is not None:
                    self._pin(chunk, pins)
                continue
            if index < first:
                self._refuse_from(ticket, first, len(keys), Refusal.CHAIN_BROKEN)
                break
            if pins is None:  # making room must not take the chain this store builds on
                pins = []
                for earlier in ticket.chain:
                    self._pin(earlier, pins)
            copy = self._reserve(space, key, keys[index - 1] if index else root, index)
            if isinstance(copy, Refusal):
                self._refuse_from(ticket, index, len(keys), copy)
                break
            ticket.copies[index] = copy
            ticket.accepted.append(StoreSlot(index, copy.tier, copy.slots))
            ticket.chain.append(copy.chunk)
        for pinned in reversed(pins or ()):
            self._ledger.unlease(pinned)
        if not ticket.copies:
            self._toucher.touch(ticket.chain)

    def commit(self, ticket: StoreTicket, indices: Iterable[int] | None = None) -> None:
        """The slots of these chunks (all that are left, if None) hold their KV: they can be hit from now on.

        Raises InvariantBroken for an index that is not open; then nothing is committed.
        """
        chosen = sorted(ticket.copies if indices is None else set(indices))
        missing = [index for index in chosen if index not in ticket.copies]
        if missing:
            raise InvariantBroken(
                f"chunks {missing} of this store are not open: committed or aborted before?"
            )
        for index in chosen:
            self._publish(ticket.copies.pop(index))
        if not ticket.copies:
            self._toucher.touch(ticket.chain)

    def abort(self, ticket: StoreTicket) -> None:
        """Give back the slots not committed; nobody writes to them any more."""
        if not ticket.copies:
            return
        for index in sorted(ticket.copies, reverse=True):
            copy = ticket.copies.pop(index)
            self._ledger.detach(copy, MissReason.NEVER_SEEN)
            self._ledger.unlease(copy)
        self._toucher.touch(ticket.chain)

    def seal_done(self, pending: SealPending, outcome: Outcome, checksums: tuple[bytes, ...]) -> None:
        """The checksums of a committed chunk are there; without them it can't be kept."""
        copy = pending.copy
        if outcome is not Outcome.OK:
            self._state.counters.tiers[copy.tier].failed += 1
            self._ledger.detach(copy, MissReason.EVICTED)
        elif not copy.detached:
            copy.checksums = checksums
            self._writer.schedule_now(copy.chunk)
        self._ledger.unlease(copy)

    def _publish(self, copy: MemoryCopy) -> None:
        self._ledger.publish(copy)
        if copy.tier is Tier.GPU:
            self._mover.schedule_down(copy)
            self._ledger.unlease(copy)
            return
        op = self._state.begin(SealPending(copy))  # takes over the lease of the store
        self._state.outbox.append(Seal(op, copy.chunk.space.id, copy.slots, Priority.SEAL))

    def _passed_over(self, chunk: Chunk | None) -> Refusal | None:
        if chunk is None:
            return None
        for copy in (chunk.gpu, chunk.cpu):
            if copy is not None:
                return Refusal.IN_FLIGHT if copy.state is MemoryState.STORING else Refusal.PRESENT
        for tier, store in self._state.stores.items():
            stored = chunk.stored(tier)
            if stored is not None and store.up and stored.state in (StoredState.READY, StoredState.WRITING):
                return Refusal.PRESENT
        return None

    def _pin(self, chunk: Chunk, pins: list[MemoryCopy]) -> None:
        for copy in (chunk.gpu, chunk.cpu):
            if copy is not None:
                self._ledger.lease(copy)
                pins.append(copy)

    def _reserve(self, space: Space, key: ChunkKey, parent_key: ChunkKey, index: int) -> MemoryCopy | Refusal:
        place = self._find_slots(space)
        if isinstance(place, Refusal):
            return place
        tier, slots = place
        start, count = index * space.chunk_tokens, space.chunk_tokens
        chunk = self._state.index.ensure(space, key, parent_key, start, count)
        if tier.keeps:
            return self._ledger.attach(chunk, tier, slots, MemoryState.STORING, Standing.ESTABLISHED)
        return self._ledger.attach_staged(chunk, slots, MemoryState.STORING)

    def _find_slots(self, space: Space) -> tuple[MemoryTier, Slots] | Refusal:
        """Slots in the nearest tier that can make room."""
        state, gpu, cpu = self._state, self._state.gpu, self._state.cpu
        nbytes = space.slot_bytes
        if not state.enabled:
            return Refusal.DISABLED
        if gpu is not None and self._gpu_evictor is not None and self._gpu_evictor.make_room(nbytes):
            slots = gpu.slots.take(space.slot_sizes)
            if slots is not None:
                return gpu, slots
        if cpu.keeps:
            has_room = self._cpu_evictor.make_room(nbytes)
        elif not state.stores:
            return Refusal.NO_SLOT
        elif not any(store.up for store in state.stores.values()):
            return Refusal.TIER_OPEN
        else:  # the arena is only a passage to the stores: leave room in it for loads
            has_room = nbytes <= cpu.staging_free and not (
                cpu.staged and cpu.staged + nbytes > self._stage_budget
            )
        slots = cpu.slots.take(space.slot_sizes) if has_room else None
        return (cpu, slots) if slots is not None else Refusal.NO_SLOT

    def _refuse_from(self, ticket: StoreTicket, index: int, end: int, refusal: Refusal) -> None:
        """This chunk for its own reason, those behind it because they could never be found."""
        for later in range(index, end):
            self._refuse(ticket, later, refusal if later == index else Refusal.CHAIN_BROKEN)

    def _refuse(self, ticket: StoreTicket, index: int, refusal: Refusal) -> None:
        ticket.refused.append((index, refusal))
        self._state.counters.refusals[refusal] += 1
