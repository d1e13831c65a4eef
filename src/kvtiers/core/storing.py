"""Stores: an engine gets slots for the chunks that no tier has, fills them, and commits.

A store is refused, never queued. A chunk that is present already, or that another session is storing, is passed over; any
other refusal ends the store, because what comes after it in the chain could never be found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvtiers.core.eviction import MemoryEvictor
from kvtiers.core.index import Chunk, MemoryCopy, MemoryState, Space, StoredState
from kvtiers.core.ledger import Ledger
from kvtiers.core.messages import Outcome, Priority, Seal, Slots
from kvtiers.core.moving import Mover
from kvtiers.core.policies.base import Standing
from kvtiers.core.state import SealPending, State
from kvtiers.core.tickets import StoreSlot, StoreTicket
from kvtiers.core.tiers import MemoryTier, StoreTier
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
        self._own_stores = {tier: store for tier, store in state.stores.items() if store.remembered is None}
        self._stage_budget = int(state.cpu.settings.capacity * state.settings.write_lease_share)

    def open(self, ticket: StoreTicket) -> None:
        """Begin to fill the ticket: `extend` goes on with it."""
        if ticket.space.parts is None:
            raise InvariantBroken("a session stores into a namespace it has not attached to")

    def extend(self, ticket: StoreTicket) -> bool:
        """Slots for those of the next chunks that are wanted, refusals for the others, at most `max_hold`; True: call again."""
        space, keys = ticket.space, ticket.keys
        begin = ticket.position
        end = min(len(keys), begin + self._state.settings.max_hold)
        if begin and begin < end and self._found(ticket.chain[-1]) is None:  # lost since the last call
            self._refuse_from(ticket, max(begin, ticket.first), Refusal.CHAIN_BROKEN)
            end = begin
        for index in range(begin, end):
            key = keys[index]
            chunk = space.chunks.get(key)
            refusal = self._found(chunk) if index < ticket.first else self._passed_over(chunk)
            if chunk is not None and refusal is not None:
                self._pass_over(ticket, chunk)
                if index >= ticket.first:
                    self._refuse(ticket, index, refusal)
                continue
            if index < ticket.first:
                self._refuse_from(ticket, ticket.first, Refusal.CHAIN_BROKEN)
                break
            if not ticket.copies and not ticket.pins:
                self._pin_chain(ticket)
            copy = self._reserve(ticket, key, keys[index - 1] if index else ticket.root, index)
            if isinstance(copy, Refusal):
                self._refuse_from(ticket, index, copy)
                break
            ticket.copies[index] = copy
            ticket.accepted.append(StoreSlot(index, copy.tier, copy.slots))
            ticket.chain.append(copy.chunk)
        else:
            ticket.position = max(end, ticket.position)
            if ticket.position < len(keys):
                return True
        ticket.position = len(keys)
        self.unpin(ticket)
        if not ticket.copies:
            self._toucher.touch(ticket.chain)
        return False

    def unpin(self, ticket: StoreTicket) -> None:
        """No room is being made for this store any more."""
        while ticket.pins:
            self._ledger.unlease(ticket.pins.pop())

    def commit(self, ticket: StoreTicket, indices: Iterable[int] | None = None) -> None:
        """The slots of these chunks (all that are left, if None) hold their KV: they can be hit from now on.

        Raises InvariantBroken for an index that is not open; then nothing is committed.
        """
        for index in self.to_commit(ticket, indices):
            self._publish(ticket.copies.pop(index))
        if not ticket.copies:
            self._toucher.touch(ticket.chain)

    @staticmethod
    def to_commit(ticket: StoreTicket, indices: Iterable[int] | None) -> list[int]:
        """Those of the ticket's chunks that a commit of `indices` is about, in order. Raises InvariantBroken for one that is not open."""
        chosen = sorted(ticket.copies if indices is None else set(indices))
        missing = [index for index in chosen if index not in ticket.copies]
        if missing:
            raise InvariantBroken(
                f"chunks {missing} of this store are not open: committed or aborted before?"
            )
        return chosen

    def abort(self, ticket: StoreTicket) -> None:
        """Give back the slots not committed; nobody writes to them any more."""
        self.unpin(ticket)
        ticket.position = len(ticket.keys)
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
        self._state.cpu.sources -= copy.nbytes
        if outcome is not Outcome.OK:
            self._state.counters.tiers[copy.tier].failed += 1
            self._ledger.detach(copy, MissReason.EVICTED)
        elif not copy.detached:
            copy.checksums = checksums
            promoted = copy.chunk.gpu
            if promoted is not None and promoted.state is MemoryState.READY and not promoted.checksums:
                promoted.checksums = checksums  # copied from this one before it was sealed
            self._writer.schedule_now(copy.chunk)
        self._ledger.unlease(copy)

    def _publish(self, copy: MemoryCopy) -> None:
        self._ledger.publish(copy)
        if copy.tier is Tier.GPU:
            self._mover.schedule_down(copy)
            self._ledger.unlease(copy)
            return
        op = self._state.begin(SealPending(copy))  # takes over the lease of the store
        self._state.cpu.sources += copy.nbytes
        self._state.outbox.append(Seal(op, copy.chunk.space.id, copy.slots, Priority.SEAL))

    def _passed_over(self, chunk: Chunk | None) -> Refusal | None:
        """Why a chunk need not be stored. That others share it is no reason: whoever has computed it could not load it from there."""
        return self._held_by(self._own_stores, chunk)

    def _found(self, chunk: Chunk | None) -> Refusal | None:
        """The same of a chunk that is only looked at, as what follows continues it."""
        return self._held_by(self._state.stores, chunk)

    @staticmethod
    def _held_by(stores: Mapping[Tier, StoreTier], chunk: Chunk | None) -> Refusal | None:
        if chunk is None:
            return None
        for copy in (chunk.gpu, chunk.cpu):
            if copy is not None:
                return Refusal.IN_FLIGHT if copy.state is MemoryState.STORING else Refusal.PRESENT
        for tier, store in stores.items():
            stored = chunk.stored(tier)
            if stored is not None and store.up and stored.state in (StoredState.READY, StoredState.WRITING):
                return Refusal.PRESENT
        return None

    def _pass_over(self, ticket: StoreTicket, chunk: Chunk) -> None:
        """The chain goes on with a chunk that is there: note what that leaves unprotected of the chunk before it."""
        if ticket.copies or ticket.pins:
            self._pin(ticket, chunk.gpu)
            self._pin(ticket, chunk.cpu)
        elif ticket.chain:
            before = ticket.chain[-1]
            for earlier, copy in ((before.gpu, chunk.gpu), (before.cpu, chunk.cpu)):
                if earlier is not None and (copy is None or copy.staged or copy.leaving):
                    ticket.edges.append(earlier)
        ticket.chain.append(chunk)

    def _pin_chain(self, ticket: StoreTicket) -> None:
        """Making room must not take the chain this store builds on. Chunks go leaf first, so its edges protect the rest."""
        for copy in ticket.edges:
            self._pin(ticket, copy)
        if ticket.chain:
            self._pin(ticket, ticket.chain[-1].gpu)
            self._pin(ticket, ticket.chain[-1].cpu)

    def _pin(self, ticket: StoreTicket, copy: MemoryCopy | None) -> None:
        if copy is None or copy.detached:
            return
        if copy.leaving:
            self._ledger.stay(copy)  # it is being built upon
        self._ledger.lease(copy)
        ticket.pins.append(copy)

    def _reserve(
        self, ticket: StoreTicket, key: ChunkKey, parent_key: ChunkKey, index: int
    ) -> MemoryCopy | Refusal:
        space = ticket.space
        if ticket.room is not None and ticket.room < space.slot_bytes:
            return Refusal.NO_SLOT
        place = self._find_slots(space, ticket.near)
        if isinstance(place, Refusal):
            return place
        if ticket.room is not None:
            ticket.room -= space.slot_bytes
        tier, slots = place
        start, count = index * space.chunk_tokens, space.chunk_tokens
        chunk = self._state.index.ensure(space, key, parent_key, start, count)
        if tier.keeps:
            return self._ledger.attach(chunk, tier, slots, MemoryState.STORING, Standing.ESTABLISHED)
        return self._ledger.attach_staged(chunk, slots, MemoryState.STORING)

    def _find_slots(self, space: Space, near: int | None) -> tuple[MemoryTier, Slots] | Refusal:
        """Slots in the nearest tier that can make room."""
        state, gpu, cpu = self._state, self._state.gpu, self._state.cpu
        nbytes = space.slot_bytes
        if not state.enabled:
            return Refusal.DISABLED
        if gpu is not None and self._gpu_evictor is not None and self._gpu_evictor.make_room(nbytes):
            slots = self._gpu_evictor.take(space.slot_sizes)
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
        slots = self._cpu_evictor.take(space.slot_sizes, near) if has_room else None
        return (cpu, slots) if slots is not None else Refusal.NO_SLOT

    def _refuse_from(self, ticket: StoreTicket, index: int, refusal: Refusal) -> None:
        """This chunk for its own reason, those behind it because they could never be found: nothing is left to look at."""
        end = ticket.position = len(ticket.keys)
        if index < end:
            self._refuse(ticket, index, refusal)
            ticket.refused += [(later, Refusal.CHAIN_BROKEN) for later in range(index + 1, end)]
            self._state.counters.refusals[Refusal.CHAIN_BROKEN] += end - index - 1

    def _refuse(self, ticket: StoreTicket, index: int, refusal: Refusal) -> None:
        ticket.refused.append((index, refusal))
        self._state.counters.refusals[refusal] += 1
