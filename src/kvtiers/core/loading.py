"""Loads: match the longest prefix, stage what lies in slower tiers, answer when it is there or the deadline has come.

- A load leases what memory holds at once, and reserves all the staging room its reads need in one step, cut to what the
  staging share can ever give. Loads that have to wait for room queue in order of arrival and hold none of it meanwhile.
- Two loads of one chunk share one read. A read that nobody waits for any more goes on, or is cancelled if it had not begun;
  either way its slots stay leased until it has ended.
- An answer counts only chunks that lie in memory, verified and leased. Whatever goes wrong only makes the prefix shorter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from kvtiers.core.index import Chunk, MemoryCopy, MemoryState, Space, StoredState
from kvtiers.core.ledger import Ledger
from kvtiers.core.messages import Cancel, Outcome, Priority, Read
from kvtiers.core.state import ReadPending, State
from kvtiers.core.tickets import LoadState, LoadTicket, Match
from kvtiers.core.tiers import StoreTier
from kvtiers.core.writing import StoreWriter
from kvtiers.model.errors import InvariantBroken
from kvtiers.model.keys import ChunkKey
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier

_REASON_OF = {
    Outcome.MISSING: MissReason.EVICTED,
    Outcome.CORRUPT: MissReason.CORRUPT,
    Outcome.UNAVAILABLE: MissReason.TIER_OPEN,
    Outcome.FAILED: MissReason.TIER_OPEN,
    Outcome.REFUSED: MissReason.NO_SLOT,
    Outcome.FULL: MissReason.NO_SLOT,
    Outcome.CANCELLED: MissReason.STAGING_TIMEOUT,
}


class Loading:
    """Looks up, stages and answers."""

    def __init__(
        self, state: State, ledger: Ledger, writer: StoreWriter, on_settled: Callable[[LoadTicket], None]
    ) -> None:
        self._state = state
        self._ledger = ledger
        self._writer = writer
        self._on_settled = on_settled
        self._queue: deque[LoadTicket] = deque()
        self._open: dict[LoadTicket, None] = {}
        self.settled: deque[LoadTicket] = deque()
        """Loads answered since the caller last looked."""

    def lookup(self, space: Space, keys: Sequence[ChunkKey]) -> Match:
        """Pure: what a load of these keys would find, in memory only. Counts and touches nothing."""
        tiers: list[Tier] = []
        pending = 0
        reason: MissReason | None = None
        for key in keys:
            copy, store, tier, reason = self._locate(space.chunks.get(key))
            if reason is not None:
                break
            if (copy is None and store is None) or tier is None:
                break
            tiers.append(tier)
            if copy is not None and copy.state is MemoryState.FILLING:
                pending += 1
        return Match(tuple(tiers), pending, reason)

    def open(self, ticket: LoadTicket) -> None:
        """Match the ticket's keys and begin to stage them; it may be settled at once."""
        self._open[ticket] = None
        space, state = ticket.space, self._state
        room = state.cpu.settings.staging
        for key in ticket.keys:
            copy, store, tier, reason = self._locate(space.chunks.get(key))
            if reason is not None or tier is None:
                ticket.stopped_by = reason
                break
            if copy is None and store is not None:
                nbytes = space.parts.slot_bytes if space.parts else 0
                if not nbytes or nbytes > room:
                    ticket.stopped_by = MissReason.NO_SLOT
                    break
                room -= nbytes
            ticket.tiers.append(tier)
            ticket.copies.append(copy)
            if copy is not None:
                self._join(ticket, copy)
        self._queue.append(ticket)
        self._advance(ticket)

    def release(self, ticket: LoadTicket) -> None:
        """The caller has copied what it wanted, or has given up: give the leases back."""
        if ticket.state is LoadState.RELEASED:
            return
        self._open.pop(ticket, None)
        if ticket.state is not LoadState.SETTLED:
            self._leave_queue(ticket)
        self._drop_from(ticket, 0)
        ticket.state = LoadState.RELEASED

    def advance_queue(self) -> None:
        """Begin the reads of waiting loads, in order of arrival, as far as the staging share allows."""
        while self._queue and self._begin_reads(self._queue[0]):
            ticket = self._queue.popleft()
            if ticket.state is LoadState.QUEUED:
                ticket.state = LoadState.STAGING
            self._settle_if_complete(ticket)

    def expire(self) -> None:
        """Answer loads whose deadline has come with the prefix that is there."""
        now = self._state.now
        for ticket in [ticket for ticket in self._open if ticket.deadline <= now]:
            ready = next((i for i, copy in enumerate(ticket.copies) if not _is_ready(copy)), len(ticket.copies))
            self._cut(ticket, ready, MissReason.STAGING_TIMEOUT)
            self._leave_queue(ticket)
            self._settle(ticket)

    def next_deadline(self) -> float | None:
        """When `expire` has to be called next."""
        return min((ticket.deadline for ticket in self._open), default=None)

    def read_done(self, pending: ReadPending, outcome: Outcome, checksums: tuple[bytes, ...]) -> None:
        """A read ended, in time or late: its chunk is ready, or it is cut from every load that waits for it."""
        state, copy, stored = self._state, pending.copy, pending.stored
        store = state.stores[pending.tier]
        stored.readers -= 1
        copy.filled_by = None
        waiters, copy.waiters = copy.waiters, []
        counters = state.counters.tiers
        if outcome is Outcome.OK and not copy.detached:
            copy.checksums = checksums
            copy.state = MemoryState.READY
            counters[pending.tier].promoted += 1
            for ticket in waiters:
                ticket.waiting -= 1
        else:
            if outcome not in (Outcome.OK, Outcome.CANCELLED, Outcome.REFUSED):
                counters[pending.tier].failed += 1
            if outcome is Outcome.CORRUPT:
                counters[pending.tier].corrupt += 1
            reason = _REASON_OF.get(outcome, MissReason.EVICTED)
            for ticket in waiters:
                ticket.waiting -= 1
                self._cut(ticket, ticket.copies.index(copy), reason)
            chunk = copy.chunk
            self._ledger.detach(copy, reason)
            if outcome in (Outcome.MISSING, Outcome.CORRUPT) and stored.state is StoredState.READY:
                self._writer.forget(chunk, stored, store, reason)
        for ticket in waiters:
            self._settle_if_complete(ticket)
        self._ledger.unlease(copy)

    def cut_settled(self, ticket: LoadTicket, index: int) -> None:
        """A chunk of an answered load turned out damaged in memory: shorten the answer and drop the chunk."""
        copy = ticket.copies[index]
        self._drop_from(ticket, index)
        ticket.stopped_by = MissReason.CORRUPT
        if copy is not None and not copy.detached:
            self._state.counters.tiers[copy.tier].corrupt += 1
            self._ledger.detach(copy, MissReason.CORRUPT)

    def check_integrity(self) -> list[str]:
        """Every open load stands where its state says."""
        problems = []
        for ticket in self._open:
            waiting = sum(1 for copy in ticket.copies if copy is not None and copy.state is MemoryState.FILLING)
            if waiting != ticket.waiting:
                problems.append(f"load {ticket.id} waits for {ticket.waiting} copies, {waiting} are being filled")
            if (ticket.state is LoadState.QUEUED) != (ticket in self._queue):
                problems.append(f"load {ticket.id} is {ticket.state} and {'in' if ticket in self._queue else 'not in'} the queue")
        return problems

    def leases(self) -> Iterator[MemoryCopy]:
        """One entry for each lease an unsettled load holds."""
        for ticket in self._open:
            yield from (copy for copy in ticket.copies if copy is not None)

    def _locate(self, chunk: Chunk | None) -> tuple[MemoryCopy | None, StoreTier | None, Tier | None, MissReason | None]:
        """The nearest tier that can give the chunk: a memory copy, or a store to read from; else the reason it can't."""
        if chunk is None:
            return None, None, None, MissReason.NEVER_SEEN if self._state.enabled else MissReason.DISABLED
        gpu, cpu = chunk.gpu, chunk.cpu
        if gpu is not None and gpu.state is MemoryState.READY:
            return gpu, None, Tier.GPU, None
        if cpu is not None and cpu.state is MemoryState.READY:
            return cpu, None, Tier.CPU, None
        if cpu is not None and cpu.state is MemoryState.FILLING and cpu.filled_by is not None:
            pending = self._state.pending.get(cpu.filled_by)
            if isinstance(pending, ReadPending):
                return cpu, None, pending.tier, None
        for tier, store in self._state.stores.items():
            stored = chunk.stored(tier)
            if stored is not None and stored.state is StoredState.READY and store.up and cpu is None:
                return None, store, tier, None
        return None, None, None, self._why_not(chunk)

    def _why_not(self, chunk: Chunk) -> MissReason:
        if chunk.gpu is not None or chunk.cpu is not None:
            return MissReason.IN_FLIGHT
        for tier, store in self._state.stores.items():
            stored = chunk.stored(tier)
            if stored is None:
                continue
            if stored.state is StoredState.PARTIAL:
                return MissReason.GROUP_STATE_MISSING
            if stored.state is StoredState.READY and not store.up:
                return MissReason.TIER_OPEN
            return MissReason.EVICTED
        return chunk.gone

    def _join(self, ticket: LoadTicket, copy: MemoryCopy) -> None:
        self._ledger.lease(copy)
        if copy.state is MemoryState.FILLING:
            copy.waiters.append(ticket)
            ticket.waiting += 1

    def _advance(self, ticket: LoadTicket) -> None:
        if None not in ticket.copies:  # needs no staging room: it waits behind nobody
            self._queue.remove(ticket)
            ticket.state = LoadState.STAGING
            self._settle_if_complete(ticket)
        else:
            self.advance_queue()

    def _begin_reads(self, ticket: LoadTicket) -> bool:
        """Begin all reads of the ticket in one step; False if the staging share has no room for all of them yet."""
        state, parts = self._state, ticket.space.parts
        if parts is None:
            raise InvariantBroken("a session loads from a namespace it has not attached to")
        plan: list[tuple[int, Chunk, StoreTier]] = []
        for index, copy in enumerate(ticket.copies):
            if copy is not None:
                continue
            chunk = ticket.space.chunks.get(ticket.keys[index])
            found, store, tier, reason = self._locate(chunk)  # things may have changed while it waited
            if reason is not None or tier is None or chunk is None:
                self._cut(ticket, index, reason or MissReason.EVICTED)
                break
            ticket.tiers[index] = tier
            if found is not None:
                ticket.copies[index] = found
                self._join(ticket, found)
            elif store is not None:
                plan.append((index, chunk, store))
        if parts.slot_bytes * len(plan) > state.cpu.staging_free:
            return False
        for position, (index, chunk, store) in enumerate(plan):
            slots = state.cpu.slots.take(parts)
            if slots is None:  # other size classes hold what was promised
                self._cut(ticket, index, MissReason.NO_SLOT)
                del plan[position:]
                break
            self._begin_read(ticket, index, chunk, store, slots)
        return True

    def _begin_read(self, ticket: LoadTicket, index: int, chunk: Chunk, store: StoreTier, slots: tuple[int, ...]) -> None:
        state, parts = self._state, ticket.space.parts
        stored = chunk.stored(store.tier)
        assert stored is not None and parts is not None  # located just now
        copy = self._ledger.attach(chunk, state.cpu, slots, parts, MemoryState.FILLING, staged=True)
        stored.readers += 1
        op = state.begin(ReadPending(copy, stored, store.tier))
        copy.filled_by = op
        ticket.copies[index] = copy
        self._join(ticket, copy)
        state.outbox.append(
            Read(op, chunk.space.id, store.tier, chunk.mark, slots, ticket.deadline, Priority.LOAD)
        )

    def _cut(self, ticket: LoadTicket, index: int, reason: MissReason) -> None:
        if index < len(ticket.copies):
            self._drop_from(ticket, index)
            ticket.stopped_by = reason

    def _drop_from(self, ticket: LoadTicket, index: int) -> None:
        dropped = ticket.copies[index:]
        del ticket.copies[index:]
        del ticket.tiers[index:]
        for copy in reversed(dropped):
            if copy is None:
                continue
            if copy.state is MemoryState.FILLING and ticket in copy.waiters:
                copy.waiters.remove(ticket)
                ticket.waiting -= 1
                if copy.leases == 2 and copy.filled_by is not None:  # this one and the read's
                    self._state.outbox.append(Cancel(copy.filled_by))
            self._ledger.unlease(copy)

    def _leave_queue(self, ticket: LoadTicket) -> None:
        if ticket.state is LoadState.QUEUED and ticket in self._queue:
            self._queue.remove(ticket)

    def _settle_if_complete(self, ticket: LoadTicket) -> None:
        if ticket.state is LoadState.STAGING and not ticket.waiting:
            self._settle(ticket)

    def _settle(self, ticket: LoadTicket) -> None:
        ticket.state = LoadState.SETTLED
        self._open.pop(ticket, None)
        self.settled.append(ticket)
        self._count(ticket)
        self._on_settled(ticket)

    def _count(self, ticket: LoadTicket) -> None:
        counters = self._state.counters
        counters.requests += 1
        tokens = ticket.space.chunk_tokens
        enabled = self._state.enabled
        hits = dict.fromkeys(Tier, 0)
        for tier in ticket.tiers:
            hits[tier] += 1
        remaining = len(ticket.keys)
        nbytes = sum(part.nbytes for part in ticket.space.parts or ())
        for tier in Tier:
            found = hits[tier]
            if tier in enabled or found:
                counters.tiers[tier].lookups += remaining
                counters.tiers[tier].hits += found
                counters.tiers[tier].hit_tokens += found * tokens
                counters.tiers[tier].hit_bytes += found * nbytes
            remaining -= found
        if ticket.stopped_by is not None:
            counters.misses[ticket.stopped_by] += 1


def _is_ready(copy: MemoryCopy | None) -> bool:
    return copy is not None and copy.state is MemoryState.READY
