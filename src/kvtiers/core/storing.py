"""Stores: an engine gets slots for the chunks that no tier has, fills them, and commits.

A store is refused, never queued. A chunk that is present already, or that another session is storing, is passed over; any
other refusal ends the store, because what comes after it in the chain could never be found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvtiers.core.eviction import MemoryEvictor
from kvtiers.core.index import Chunk, MemoryCopy, MemoryState, Space, StoredState
from kvtiers.core.ledger import Ledger
from kvtiers.core.messages import Outcome, Priority, Seal
from kvtiers.core.moving import Mover
from kvtiers.core.policies.base import Standing
from kvtiers.core.state import SealPending, State
from kvtiers.core.tickets import StoreSlot, StoreTicket
from kvtiers.core.tiers import MemoryTier
from kvtiers.core.touching import Toucher
from kvtiers.core.writing import StoreWriter
from kvtiers.model.errors import InvariantBroken
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import Parts
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier


class Storing:
    """Opens, commits and aborts stores."""

    def __init__(
        self,
        state: State,
        ledger: Ledger,
        writer: StoreWriter,
        cpu_evictor: MemoryEvictor,
        gpu_evictor: MemoryEvictor | None,
        mover: Mover,
        toucher: Toucher,
    ) -> None:
        self._state = state
        self._ledger = ledger
        self._writer = writer
        self._cpu_evictor = cpu_evictor
        self._gpu_evictor = gpu_evictor
        self._mover = mover
        self._toucher = toucher

    def open(self, ticket: StoreTicket, root: ChunkKey, keys: Sequence[ChunkKey], first: int) -> None:
        """Fill the ticket: slots for the chunks `keys[first:]` that are wanted, refusals for the others."""
        space = ticket.space
        parts = space.parts
        if parts is None:
            raise InvariantBroken("a session stores into a namespace it has not attached to")
        for index, key in enumerate(keys):
            chunk = space.chunks.get(key)
            refusal = self._passed_over(chunk)
            if refusal is None and index < first:
                refusal = Refusal.CHAIN_BROKEN
            copy: MemoryCopy | None = None
            if refusal is None:
                parent_key = keys[index - 1] if index else root
                copy, refusal = self._reserve(space, parts, key, parent_key, index)
            if copy is not None:
                ticket.copies[index] = copy
                ticket.accepted.append(StoreSlot(index, copy.tier, copy.slots))
                ticket.chain.append(copy.chunk)
            elif refusal in (Refusal.PRESENT, Refusal.IN_FLIGHT):
                assert chunk is not None  # what is passed over is known
                ticket.chain.append(chunk)
                if index >= first:
                    self._refuse(ticket, index, refusal)
            else:
                assert refusal is not None  # a chunk is either accepted or refused
                self._refuse(ticket, max(index, first), refusal)
                for later in range(max(index, first) + 1, len(keys)):
                    self._refuse(ticket, later, Refusal.CHAIN_BROKEN)
                break
        if not ticket.copies:
            self._toucher.touch(ticket.chain)

    def commit(self, ticket: StoreTicket, indices: Iterable[int] | None = None) -> None:
        """The slots of these chunks (all that are left, if None) hold their KV: they can be hit from now on.

        Raises InvariantBroken for an index that is not open.
        """
        chosen = sorted(ticket.copies) if indices is None else sorted(indices)
        copies: list[MemoryCopy] = []
        for index in chosen:
            copy = ticket.copies.pop(index, None)
            if copy is None:
                raise InvariantBroken(f"chunk {index} of this store is not open: committed or aborted before?")
            copies.append(copy)
        for copy in reversed(copies):
            self._publish(copy)
        self._toucher.touch(ticket.chain)

    def abort(self, ticket: StoreTicket) -> None:
        """Give back the slots not committed; nobody writes to them any more."""
        copies = [ticket.copies.pop(index) for index in sorted(ticket.copies, reverse=True)]
        for copy in copies:
            self._ledger.detach(copy, MissReason.NEVER_SEEN)
            self._ledger.unlease(copy)

    def seal_done(self, pending: SealPending, outcome: Outcome, checksums: tuple[bytes, ...]) -> None:
        """The checksums of a committed chunk are there; without them it can't be kept."""
        copy = pending.copy
        if outcome is Outcome.OK and not copy.detached:
            copy.checksums = checksums
            self._writer.schedule_now(copy.chunk)
        elif not copy.detached:
            self._ledger.detach(copy, MissReason.EVICTED)
        self._ledger.unlease(copy)

    def _publish(self, copy: MemoryCopy) -> None:
        self._ledger.publish(copy, Standing.ESTABLISHED)
        if copy.tier is Tier.GPU:
            self._mover.copy_down(copy)
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

    def _reserve(
        self, space: Space, parts: Parts, key: ChunkKey, parent_key: ChunkKey, index: int
    ) -> tuple[MemoryCopy | None, Refusal | None]:
        state = self._state
        if not state.enabled:
            return None, Refusal.DISABLED
        nbytes = parts.slot_bytes
        gpu, cpu = state.gpu, state.cpu
        if gpu is not None and self._gpu_evictor is not None and self._gpu_evictor.make_room(nbytes):
            copy = self._take(space, parts, key, parent_key, index, gpu, staged=False)
            if copy is not None:
                return copy, None
        if cpu.keeps:
            if self._cpu_evictor.make_room(nbytes):
                copy = self._take(space, parts, key, parent_key, index, cpu, staged=False)
                if copy is not None:
                    return copy, None
            return None, Refusal.NO_SLOT
        if not state.stores:
            return None, Refusal.NO_SLOT
        if not any(store.up for store in state.stores.values()):
            return None, Refusal.TIER_OPEN
        budget = int(cpu.settings.capacity * state.settings.write_lease_share)
        if cpu.staged > 0 and cpu.staged + nbytes > budget:
            return None, Refusal.NO_SLOT
        copy = self._take(space, parts, key, parent_key, index, cpu, staged=True)
        return (copy, None) if copy is not None else (None, Refusal.NO_SLOT)

    def _take(
        self, space: Space, parts: Parts, key: ChunkKey, parent_key: ChunkKey, index: int, tier: MemoryTier, *, staged: bool
    ) -> MemoryCopy | None:
        slots = tier.slots.take(parts)
        if slots is None:
            return None
        chunk = self._state.index.ensure(space, key, parent_key, index * space.chunk_tokens, space.chunk_tokens)
        return self._ledger.attach(chunk, tier, slots, parts, MemoryState.STORING, staged=staged)

    def _refuse(self, ticket: StoreTicket, index: int, refusal: Refusal) -> None:
        ticket.refused.append((index, refusal))
        self._state.counters.refusals[refusal] += 1
