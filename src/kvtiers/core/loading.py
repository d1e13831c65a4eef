"""Loads: match the longest prefix, stage what lies in slower tiers, answer when it is there or the deadline has come.

- A load leases at once what the cache proper holds in memory. What it needs of the staging share (chunks to be read, chunks
  staged for others) it takes in one step, cut to what the share can ever give. Loads that have to wait for room queue in
  order of arrival and hold none of the share meanwhile, so they can't wait for each other.
- Two loads of one chunk share one read. A read that nobody waits for any more goes on, or is cancelled if it had not begun;
  either way its slots stay leased until it has ended. If it was given up and somebody came to wait for it after that, it is
  begun anew.
- What others may have put into a shared store is asked for once, in one batch (`probing.py`); then matching goes on.
- An answer counts only chunks that lie in memory, verified and leased. Whatever goes wrong only makes the prefix shorter.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from kvtiers.core.deleting import Deleter
from kvtiers.core.eviction import Loss, MemoryEvictor
from kvtiers.core.index import Chunk, MemoryCopy, MemoryState, StoredState
from kvtiers.core.ledger import Ledger
from kvtiers.core.matching import Found, Matcher
from kvtiers.core.messages import Cancel, Chunkmark, Outcome, Priority, Read
from kvtiers.core.probing import Prober
from kvtiers.core.state import ProbePending, ReadPending, State
from kvtiers.core.tickets import LoadState, LoadTicket
from kvtiers.model.errors import InvariantBroken
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier

_REASON_OF = {
    Outcome.MISSING: MissReason.EVICTED,
    Outcome.CORRUPT: MissReason.CORRUPT,
    Outcome.UNAVAILABLE: MissReason.TIER_OPEN,
    Outcome.FAILED: MissReason.TIER_OPEN,
    Outcome.REFUSED: MissReason.STAGING_TIMEOUT,
    Outcome.FULL: MissReason.NO_SLOT,
    Outcome.CANCELLED: MissReason.STAGING_TIMEOUT,
}


_SHARE_FOR_ASKING = 0.5
"""Of its time, what a load waits for a probe at most if something else is to be read for it."""
_MOST_PROBES = 2
"""A load waits for one probe of its own, and before it perhaps for another one's that stops where it does."""


class Loading:
    """Looks up, stages and answers."""

    def __init__(  # noqa: PLR0917 - the parts it works with, given once
        self,
        state: State,
        ledger: Ledger,
        deleter: Deleter,
        cpu_evictor: MemoryEvictor,
        prober: Prober,
        matcher: Matcher,
        on_settled: Callable[[LoadTicket], None],
    ) -> None:
        self._state = state
        self._ledger = ledger
        self._deleter = deleter
        self._cpu_evictor = cpu_evictor
        self._prober = prober
        self._matcher = matcher
        self._on_settled = on_settled
        self._resuming: deque[LoadTicket] = deque()
        """Loads whose probe was answered and whose matching goes on."""
        self._queue: deque[LoadTicket] = deque()
        self._wanted = 0
        """Staging bytes that the first in the queue was short of when it was last looked at."""
        self._open: dict[LoadTicket, None] = {}
        self.settled: deque[LoadTicket] = deque()
        """Loads answered since the caller last looked."""
        self.advanced: dict[LoadTicket, None] = {}
        """Loads still to be answered of which more lies ready than when the caller last looked."""

    def open(self, ticket: LoadTicket) -> None:
        """Begin to match the ticket's keys: `extend` goes on with it."""
        if ticket.space.parts is None:
            raise InvariantBroken("a session loads from a namespace it has not attached to")
        ticket.room = self._state.cpu.settings.staging
        ticket.asks_until = self._state.now + _SHARE_FOR_ASKING * (ticket.deadline - self._state.now)

    def extend(self, ticket: LoadTicket) -> bool:
        """Match and lease the next chunks, at most `max_hold`; True: call again.

        After the last all that is missing is staged in one step; then the ticket may be settled at once. One that has waited for a
        probe goes on by itself (`resume`).
        """
        return ticket not in self._open and self._match(ticket)

    def _match(self, ticket: LoadTicket) -> bool:
        if ticket.state is not LoadState.OPENING:
            return False
        begin = len(ticket.copies)
        end = begin + self._state.settings.max_hold
        chunks, copies, tiers, lease = ticket.space.chunks, ticket.copies, ticket.tiers, self._ledger.lease
        ready, cpu = MemoryState.READY, Tier.CPU
        for key in ticket.keys[begin:end]:
            chunk = chunks.get(key)
            copy = chunk.cpu if chunk is not None and chunk.gpu is None else None
            if copy is not None and copy.state is ready and not copy.staged:
                lease(copy)  # what most are like, in a third of the time of what follows
                tiers.append(cpu)
                copies.append(copy)
                continue
            found = self._matcher.locate(chunk) if chunk is not None else None
            if found is None:
                if ticket.probed < _MOST_PROBES and self._prober.begin(ticket, len(copies)):
                    self._open[ticket] = None
                    return False
                ticket.stopped_by = ticket.unasked or self._matcher.why_not(chunk)
                break
            copy = found.copy
            if copy is None or copy.staged:
                ticket.room -= ticket.space.slot_bytes
                if ticket.room < 0:
                    ticket.stopped_by = MissReason.NO_SLOT
                    break
                copy = None
            else:
                lease(copy)
            tiers.append(found.tier)
            copies.append(copy)
        else:
            if end < len(ticket.keys):
                return True
        self._stage(ticket)
        return False

    def release(self, ticket: LoadTicket, used: range | None = None) -> None:
        """The caller has copied what it wanted, or has given up: give all leases back. `used`: the chunks it took; None: all."""
        while self.release_some(ticket, used):
            pass

    def release_some(self, ticket: LoadTicket, used: range | None = None) -> bool:
        """The same for at most `max_hold` chunks, the last first; True: call again. It is never answered from the first call on."""
        if ticket.state is not LoadState.RELEASED:
            if ticket.state is LoadState.SETTLED:
                self._count(ticket, range(ticket.num_chunks) if used is None else used)
            self._open.pop(ticket, None)
            self.advanced.pop(ticket, None)
            self._leave_queue(ticket)
            self._stop_matching(ticket)
            ticket.state = LoadState.RELEASED
        self._drop_from(ticket, max(0, len(ticket.copies) - self._state.settings.max_hold))
        return bool(ticket.copies)

    def advance_queue(self) -> None:
        """Begin the reads of waiting loads, in order of arrival, as far as the staging share allows."""
        while self._queue and self._wanted <= self._state.cpu.staging_free:
            ticket = self._queue[0]
            if not self._begin(ticket):
                return
            self._leave_queue(ticket)

    def reconsider(self) -> None:
        """Something has happened to a store: the first in the queue may need less now."""
        self._wanted = 0

    def expire(self) -> None:
        """Answer loads whose deadline has come with the prefix that is there. Those that have asked for long enough go on without."""
        now = self._state.now
        for ticket in [ticket for ticket in self._open if self._due(ticket) <= now < ticket.deadline]:
            self._stop_matching(ticket)
            ticket.stopped_by = MissReason.STAGING_TIMEOUT
            self._stage(ticket)
        for ticket in [ticket for ticket in self._open if ticket.deadline <= now]:
            ready = 0
            while ready < len(ticket.copies) and self._is_ready(ticket, ready):
                ready += 1
            if ticket.state in (LoadState.PROBING, LoadState.OPENING):
                self._stop_matching(ticket)
                ticket.stopped_by = MissReason.STAGING_TIMEOUT
            self._cut(ticket, ready, MissReason.STAGING_TIMEOUT)
            self._leave_queue(ticket)
            self._settle(ticket)

    def next_deadline(self) -> float | None:
        """When `expire` has to be called next."""
        return min((self._due(ticket) for ticket in self._open), default=None)

    @property
    def has_more(self) -> bool:
        """Whether loads are to be matched further (`resume`)."""
        return self._prober.has_more or bool(self._resuming)

    def resume(self) -> None:
        """Learn what probes have answered, then go on with the first of the loads that waited for one; at most `max_hold` chunks."""
        if self._prober.has_more:
            self._prober.go_on()
        if not self._prober.has_more and self._resuming and not self._match(self._resuming[0]):
            self._resuming.popleft()

    def probe_done(self, pending: ProbePending, outcome: Outcome, found: tuple[bool, ...]) -> None:
        """A shared store has said what it has, or has failed to: those who wait go on with what is known now."""
        reason = self._prober.done(pending, outcome, found)
        for ticket in pending.waiters:
            ticket.state = LoadState.OPENING
            ticket.probed = _MOST_PROBES if reason is not None else ticket.probed + 1
            ticket.unasked = reason
            self._resuming.append(ticket)

    def read_done(
        self,
        pending: ReadPending,
        outcome: Outcome,
        checksums: tuple[bytes, ...],
        mark: Chunkmark | None = None,
    ) -> None:
        """A read ended, in time or late: its chunk is ready, or it is cut from every load that waits for it."""
        if outcome in (Outcome.CANCELLED, Outcome.FAILED) and self._read_again(pending):
            return
        state, copy, stored = self._state, pending.copy, pending.stored
        counters = state.counters.tiers[pending.tier]
        stored.readers -= 1
        state.stores[pending.tier].reads -= 1
        copy.filled_by = None
        waiters, copy.waiters = copy.waiters, ()
        for ticket in waiters:
            ticket.waiting -= 1
        if outcome is Outcome.OK and mark is not None:
            state.index.identify(copy.chunk, mark.parent, mark.token_start, mark.token_count)
        if outcome is Outcome.OK and not copy.detached:
            copy.checksums = checksums
            copy.state = MemoryState.READY
            counters.promoted += 1
            remembered = state.stores[pending.tier].remembered
            if remembered is not None:
                remembered.there(copy.chunk, state.now)
        else:
            counters.failed += outcome not in (Outcome.OK, Outcome.CANCELLED, Outcome.REFUSED)
            counters.corrupt += outcome is Outcome.CORRUPT
            reason = _REASON_OF.get(outcome, MissReason.EVICTED)
            for ticket in waiters:
                if copy in ticket.copies:
                    self._cut(ticket, ticket.copies.index(copy), reason)
            self._ledger.detach(copy, reason)
            if outcome in (Outcome.MISSING, Outcome.CORRUPT):
                self._deleter.lost(copy.chunk, stored, state.stores[pending.tier], reason)
        for ticket in waiters:
            self._settle_if_complete(ticket)
        self._ledger.unlease(copy)

    def cut_settled(self, ticket: LoadTicket, index: int, reason: MissReason) -> None:
        """Shorten the answer of an answered load; CORRUPT: as its chunk `index` turned out damaged in memory, which is dropped."""
        copy = ticket.copies[index]
        self._cut(ticket, index, reason)
        if copy is not None and reason is MissReason.CORRUPT:
            self.drop_damaged(copy.chunk, copy.tier, copy)

    def drop_damaged(self, chunk: Chunk, tier: Tier, copy: MemoryCopy) -> None:
        """A copy's bytes are not what was committed. What was copied from it to the GPU can't be trusted either."""
        if copy.detached or copy.state is not MemoryState.READY:
            return
        self._state.counters.tiers[tier].corrupt += 1
        self._ledger.detach(copy, MissReason.CORRUPT)
        if tier is Tier.CPU and chunk.gpu is not None and chunk.gpu.state is not MemoryState.STORING:
            self._ledger.detach(chunk.gpu, MissReason.CORRUPT)

    def check_integrity(self) -> list[str]:
        """Every open load stands where its state says, and waiting ones hold nothing of the staging share."""
        problems = []
        for ticket in self._open:
            copies = [copy for copy in ticket.copies if copy is not None]
            waiting = sum(copy.state is MemoryState.FILLING for copy in copies)
            name = f"load {ticket.id}"
            if waiting != ticket.waiting:
                problems.append(f"{name} waits for {ticket.waiting} copies, {waiting} are being filled")
            if ticket.state is LoadState.OPENING and ticket in self._resuming:
                continue
            if ticket.state not in (LoadState.PROBING, LoadState.QUEUED, LoadState.STAGING):
                problems.append(f"{name} is {ticket.state} and still to be answered")
            queued = ticket in self._queue
            if (ticket.state is LoadState.QUEUED) is not queued:
                problems.append(f"{name} is {ticket.state} and {'in' if queued else 'not in'} the queue")
            if queued and any(copy.staged for copy in copies):
                problems.append(f"{name} waits for staging room and holds some")
        return problems

    def _stop_matching(self, ticket: LoadTicket) -> None:
        self._prober.leave(ticket)
        if ticket in self._resuming:
            self._resuming.remove(ticket)

    def _due(self, ticket: LoadTicket) -> float:
        """When time does something to the load."""
        has_to_read = ticket.room < self._state.cpu.settings.staging
        return ticket.asks_until if ticket.state is LoadState.PROBING and has_to_read else ticket.deadline

    def _stage(self, ticket: LoadTicket) -> None:
        """It is matched as far as it will be: read what is missing, now or when there is room for it."""
        self._open[ticket] = None
        ticket.state = LoadState.QUEUED
        if not self._begin(ticket):
            self._queue.append(ticket)

    def _begin(self, ticket: LoadTicket) -> bool:
        """Take all that is missing in one step; False, and nothing of the staging share is held, if it has no room for that yet."""
        state = self._state
        plan: list[tuple[int, Chunk]] = []
        reads = 0
        for index, held in enumerate(ticket.copies):
            if held is not None:
                continue
            chunk = ticket.space.chunks.get(ticket.keys[index])
            found = self._matcher.locate(chunk) if chunk is not None else None
            if chunk is None or found is None:  # things have changed while it waited
                self._cut(ticket, index, self._matcher.why_not(chunk))
                break
            plan.append((index, chunk))
            reads += found.copy is None
        wanted = reads * ticket.space.slot_bytes
        waits_behind = bool(self._queue) and self._queue[0] is not ticket
        if reads and (waits_behind or wanted > state.cpu.staging_free):
            if not waits_behind:
                self._wanted = wanted
            return False
        for index, chunk in plan:
            found = self._matcher.locate(chunk)
            if found is None or not self._take(ticket, index, chunk, found):
                self._cut(ticket, index, MissReason.NO_SLOT)
                break
        ticket.state = LoadState.STAGING
        self._settle_if_complete(ticket)
        return True

    def _take(self, ticket: LoadTicket, index: int, chunk: Chunk, found: Found) -> bool:
        ticket.tiers[index] = found.tier
        if found.copy is not None:
            self._join(ticket, index, found.copy)
            return True
        stored = chunk.stored(found.tier)
        if stored is None:
            return False
        slots = self._cpu_evictor.take(chunk.space.slot_sizes, ticket.near, Loss.FORBIDDEN)
        if slots is None:  # slots of other sizes hold what was promised
            return False
        copy = self._ledger.attach_staged(chunk, slots, MemoryState.FILLING)  # the read's lease
        stored.readers += 1
        self._read(ReadPending(copy, stored, found.tier, ticket.deadline))
        self._join(ticket, index, copy)
        return True

    def _join(self, ticket: LoadTicket, index: int, copy: MemoryCopy) -> None:
        self._ledger.lease(copy)
        ticket.copies[index] = copy
        if copy.state is MemoryState.FILLING:
            copy.waiters += (ticket,)
            ticket.waiting += 1

    def _read(self, pending: ReadPending) -> None:
        copy, chunk = pending.copy, pending.copy.chunk
        op = self._state.begin(pending)
        copy.filled_by = op
        copy.cancelled = False
        self._state.stores[pending.tier].reads += 1
        self._state.outbox.append(
            Read(op, chunk.space.id, pending.tier, chunk.mark, copy.slots, pending.deadline, Priority.LOAD)
        )

    def _read_again(self, pending: ReadPending) -> bool:
        """Begin a read anew that was given up before its latest waiters came; into the same slots, under the same lease."""
        now, copy, stored = self._state.now, pending.copy, pending.stored
        deadline = max((ticket.deadline for ticket in copy.waiters), default=now)
        given_up = copy.cancelled or pending.deadline <= now
        store = self._state.stores[pending.tier]
        if not given_up or deadline <= now or copy.detached:
            return False
        if stored.state is not StoredState.READY or not store.up:
            return False
        store.reads -= 1
        self._read(pending._replace(deadline=deadline))
        return True

    def _is_ready(self, ticket: LoadTicket, index: int) -> bool:
        """Whether chunk `index` can be answered now; a load that waits for room takes what others have staged meanwhile."""
        copy = ticket.copies[index]
        if copy is None:
            chunk = ticket.space.chunks.get(ticket.keys[index])
            found = self._matcher.locate(chunk) if chunk is not None else None
            if found is None or found.copy is None or found.copy.state is not MemoryState.READY:
                return False
            ticket.tiers[index] = found.tier
            self._join(ticket, index, found.copy)
            return True
        return copy.state is MemoryState.READY

    def _cut(self, ticket: LoadTicket, index: int, reason: MissReason) -> None:
        if index < len(ticket.copies):
            self._drop_from(ticket, index)
            ticket.stopped_by = reason

    def _drop_from(self, ticket: LoadTicket, index: int) -> None:
        dropped = ticket.copies[index:]
        del ticket.copies[index:]
        del ticket.tiers[index:]
        filling = MemoryState.FILLING
        for copy in reversed(dropped):
            if copy is None:
                continue
            if copy.state is filling and ticket in copy.waiters:
                place = copy.waiters.index(ticket)
                copy.waiters = copy.waiters[:place] + copy.waiters[place + 1 :]
                ticket.waiting -= 1
                if not copy.waiters and not copy.cancelled and copy.filled_by is not None:
                    copy.cancelled = True
                    self._state.outbox.append(Cancel(copy.filled_by))
            self._ledger.unlease(copy)

    def _leave_queue(self, ticket: LoadTicket) -> None:
        if ticket in self._queue:
            self._queue.remove(ticket)
            self._wanted = 0

    def _settle_if_complete(self, ticket: LoadTicket) -> None:
        if ticket.state is not LoadState.STAGING:
            return
        if ticket.waiting:
            self._advance(ticket)
        else:
            self._settle(ticket)

    def _advance(self, ticket: LoadTicket) -> None:
        """Count what lies ready from the start: it can be copied while the rest is being read."""
        ready, copies = ticket.ready, ticket.copies
        while ready < len(copies) and (copy := copies[ready]) and copy.state is MemoryState.READY:
            ready += 1
        if ready > ticket.ready:
            ticket.ready = ready
            self.advanced[ticket] = None

    def _settle(self, ticket: LoadTicket) -> None:
        ticket.state = LoadState.SETTLED
        self._open.pop(ticket, None)
        self.advanced.pop(ticket, None)
        self.settled.append(ticket)
        self._on_settled(ticket)

    def _count(self, ticket: LoadTicket, used: range) -> None:
        """When it is released: what was staged for nothing is no hit, and a load of which nothing was taken counts as not made."""
        counters = self._state.counters
        hits = Counter(ticket.tiers[used.start : used.stop])
        unused = len(ticket.tiers) - hits.total()
        counters.unused += unused
        if unused and not hits:
            return
        counters.requests += 1
        enabled = self._state.enabled
        remaining = len(ticket.keys) - unused
        nbytes = ticket.space.payload_bytes
        for tier in Tier:
            found = hits[tier]
            if tier in enabled or found:
                of_tier = counters.tiers[tier]
                of_tier.lookups += remaining
                of_tier.hits += found
                of_tier.hit_tokens += found * ticket.space.chunk_tokens
                of_tier.hit_bytes += found * nbytes
            remaining -= found
        if ticket.stopped_by is not None:
            counters.misses[ticket.stopped_by] += 1
