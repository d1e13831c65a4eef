"""The core: one per arena. Calls, completions and news go in; intents and answered loads come out.

Not thread-safe and without a clock: whoever owns it serialises the calls and passes `now` (monotonic seconds). After every
call the owner takes `intents()` and `answered()` and acts on them outside its own lock. No call does I/O or waits; the
longest touches a request's chain once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kvtiers.core import walks
from kvtiers.core.deleting import Deleter
from kvtiers.core.eviction import Evicted, MemoryEvictor
from kvtiers.core.index import MemoryCopy, Space
from kvtiers.core.integrity import check_integrity
from kvtiers.core.ledger import Ledger
from kvtiers.core.loading import Loading
from kvtiers.core.matching import Matcher
from kvtiers.core.memory_map import MemoryMap
from kvtiers.core.messages import (
    Completion,
    CopyDone,
    DeleteDone,
    Intent,
    MappersGone,
    News,
    ProbeDone,
    ReadDone,
    SealDone,
    SessionDied,
    SessionId,
    SpaceId,
    TicketId,
    WriteDone,
)
from kvtiers.core.moving import Mover
from kvtiers.core.news import Newsroom
from kvtiers.core.probing import Prober
from kvtiers.core.sessions import Sessions
from kvtiers.core.settings import CoreSettings
from kvtiers.core.state import (
    CopyPending,
    DeletePending,
    ProbePending,
    ReadPending,
    SealPending,
    State,
    WritePending,
)
from kvtiers.core.storing import Storing
from kvtiers.core.tickets import LoadTicket, Match, Session, StoreTicket
from kvtiers.core.touching import Toucher
from kvtiers.core.writing import StoreWriter
from kvtiers.model.errors import InvariantBroken, LayoutMismatch, TierDisabled
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import Parts
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier


class Core:
    """Who is where."""

    def __init__(self, settings: CoreSettings) -> None:
        state = State(settings)
        ledger = Ledger(state)
        deleter = Deleter(state, ledger)
        writer = StoreWriter(state, ledger, deleter)
        cpu_evictor = MemoryEvictor(
            state,
            ledger,
            state.cpu,
            is_clean=writer.is_clean,
            demote=lambda copy, _: writer.demote(copy),
            can_demote=writer.can_demote,
            takes_later=writer.takes_later,
            takes_ever=writer.takes_ever,
        )
        mover = Mover(state, ledger, cpu_evictor, writer.schedule_now, writer.takes_now)
        gpu_evictor = None
        if state.gpu is not None:
            gpu_evictor = MemoryEvictor(
                state,
                ledger,
                state.gpu,
                is_clean=mover.is_clean,
                demote=mover.copy_down,
                can_demote=mover.can_demote,
                takes_later=mover.takes_later,
                takes_ever=mover.takes_later,
            )
        toucher = Toucher(state, ledger, writer, mover, cpu_evictor=cpu_evictor, gpu_evictor=gpu_evictor)
        self._state = state
        self._ledger = ledger
        self._deleter = deleter
        self._writer = writer
        self._mover = mover
        self._cpu_evictor = cpu_evictor
        self._gpu_evictor = gpu_evictor
        self._toucher = toucher
        self._evictors = [evictor for evictor in (gpu_evictor, cpu_evictor) if evictor is not None]
        self._storing = Storing(
            state, ledger, writer, mover, toucher, cpu_evictor=cpu_evictor, gpu_evictor=gpu_evictor
        )
        prober = Prober(state, deleter.forget_stale)
        self._matcher = Matcher(state, prober)
        self._loading = Loading(state, ledger, deleter, cpu_evictor, prober, self._matcher, toucher.settled)
        self._newsroom = Newsroom(state, ledger, deleter, self._loading)
        self._sessions = Sessions(state, ledger, self._loading, self._storing)
        self._last_id = 0

    # --- sessions and namespaces ---

    def open_session(self, near: int | None = None) -> SessionId:
        """A new client; it gets slots in the segment `near` of the arena as long as there are any (None: where most is free)."""
        session = Session(SessionId(self._next_id()), near)
        self._sessions[session.id] = session
        return session.id

    def attach(
        self, namespace: bytes, parts: Parts, chunk_tokens: int, session: SessionId | None = None
    ) -> SpaceId:
        """Declare the shape of a namespace's chunks. Raises LayoutMismatch if it was declared otherwise before.

        It is known until the session has ended or detaches, and no chunk of it is left; with None for good.
        """
        owner = self._sessions.living(session) if session is not None else None
        space = self._state.index.space(namespace)
        if space.parts is not None and (space.parts != parts or space.chunk_tokens != chunk_tokens):
            raise LayoutMismatch("the namespace is attached with other parts or another chunk size")
        space.declare(parts, chunk_tokens)
        if owner is None or space not in owner.spaces:
            space.attached += 1
        if owner is not None:
            owner.spaces[space] = None
        return space.id

    def detach(self, session: SessionId, space_id: SpaceId) -> None:
        """The session asks for nothing of that namespace any more. What is open of it goes on."""
        self._sessions.let_go_of(self._sessions.living(session), self._space(space_id))

    # --- what clients ask ---

    def lookup(self, space: SpaceId, keys: Sequence[ChunkKey]) -> Match:
        """What a load would find. Pure: counts, touches and begins nothing."""
        return self._matcher.lookup(self._space(space), keys)

    def open_load(
        self, session: SessionId, space: SpaceId, keys: Sequence[ChunkKey], now: float, deadline: float
    ) -> LoadTicket:
        """Begin to stage the longest prefix of `keys`. Answered when all of it is there, or at the deadline.

        Of a longer chain than `max_hold` only the beginning is matched: call `extend` until it says False.
        """
        self._state.now = now
        owner = self._sessions.living(session)
        ticket = LoadTicket(self._next_ticket(), session, self._space(space), keys, deadline, owner.near)
        self._loading.open(ticket)
        owner.tickets[ticket.id] = ticket
        self.extend(ticket, now)
        return ticket

    def open_store(  # noqa: PLR0917 - a chain and a time; all of it is always given
        self,
        session: SessionId,
        space: SpaceId,
        root: ChunkKey,
        keys: Sequence[ChunkKey],
        now: float,
        first: int = 0,
        room: int | None = None,
    ) -> StoreTicket:
        """Slots for the chunks `keys[first:]` that no tier has. `keys` is the whole chain; `root` the first one's parent.

        `room`: bytes of slots that its client may be given at most; what goes beyond is refused with NO_SLOT. Of a longer chain than `max_hold` only the beginning is decided: call `extend` until it says False.
        """
        self._state.now = now
        owner = self._sessions.living(session)
        ticket = StoreTicket(self._next_ticket(), session, self._space(space), root, keys, first, owner.near)
        ticket.room = room
        self._storing.open(ticket)
        owner.tickets[ticket.id] = ticket
        self.extend(ticket, now)
        return ticket

    def extend(self, ticket: LoadTicket | StoreTicket, now: float) -> bool:
        """Go on with opening a ticket, and with what earlier calls left to do, at most `max_hold` chunks of each; True: call again."""
        self._state.now = now
        owner = self._sessions.get(ticket.session)
        more = False
        if isinstance(ticket, LoadTicket):
            more = self._loading.extend(ticket)
        elif owner is not None and not owner.dead:
            if ticket.position < len(ticket.keys):
                more = self._storing.extend(ticket)
            if not more and not ticket.copies:
                owner.tickets.pop(ticket.id, None)
        self._settle_books()
        return more or self._has_more

    def go_on(self, now: float) -> bool:
        """Go on with what earlier calls left to do (long chains are touched in several steps); True: call again."""
        self._state.now = now
        self._settle_books()
        return self._has_more

    def to_commit(self, ticket: StoreTicket, indices: Iterable[int] | None = None) -> list[int]:
        """The chunks that a commit of `indices` is about, for whoever commits them part by part. Raises as `commit` does."""
        self._sessions.living(ticket.session)
        return self._storing.to_commit(ticket, indices)

    def commit(self, ticket: StoreTicket, now: float, indices: Iterable[int] | None = None) -> bool:
        """These chunks' slots hold their KV (all that are open, if None): they can be hit from now on.

        No more at a time than may be done in one hold of the owner's lock. True: call `go_on` until it says False. Raises
        InvariantBroken if one of them is not open, or the session is dead; then nothing is committed.
        """
        self._state.now = now
        self._sessions.living(ticket.session)  # a dead session's slots are in quarantine: refuse
        self._storing.commit(ticket, indices)
        self._close_store(ticket)
        return self._toucher.has_more

    def abort(self, ticket: StoreTicket, now: float) -> None:
        """Give back the slots that were not committed."""
        self._state.now = now
        self._storing.abort(ticket)
        self._close_store(ticket)

    def release(self, ticket: LoadTicket, now: float, used: range | None = None) -> bool:
        """Done with a load, or given up: its leases go back, at most `max_hold` a call; True: call again.

        `used`: the chunks that were copied out, which count as hits; None: all that it was answered with.
        """
        self._state.now = now
        more = self._loading.release_some(ticket, used)
        owner = self._sessions.get(ticket.session)
        if owner is not None and not more:
            owner.tickets.pop(ticket.id, None)
        self._settle_books()
        return more

    def cut(
        self, ticket: LoadTicket, index: int, now: float, reason: MissReason = MissReason.CORRUPT
    ) -> None:
        """Chunk `index` of an answered load failed its checksum in memory, or can't be given for another reason: the answer ends there."""
        self._state.now = now
        self._loading.cut_settled(ticket, index, reason)
        self._settle_books()

    def evict(self, tier: Tier, target_bytes: int, now: float) -> Evicted:
        """Evict until at most so many bytes stay; at most `max_hold` chunks a call. Raises TierDisabled.

        Of memory nothing is lost that a slower tier takes now or later: what it can't take yet goes when it has it. Of a store no
        more is deleted at a time than its queue takes; the rest follows by itself.
        """
        self._state.now = now
        if tier in self._state.stores:
            done = self._deleter.evict_on_demand(self._state.stores[tier], target_bytes)
        elif tier is Tier.CPU:
            done = self._cpu_evictor.evict_on_demand(target_bytes)
        elif self._gpu_evictor is not None and tier is Tier.GPU:
            done = self._gpu_evictor.evict_on_demand(target_bytes)
        else:
            raise TierDisabled(f"the {tier} tier is disabled: there is nothing to evict")
        self._settle_books()
        return done

    # --- what the outside tells ---

    def complete(self, completion: Completion, now: float) -> bool:
        """The one completion of an intent. True: some load could be matched further now: call `go_on` until it says False."""
        state = self._state
        state.now = now
        pending = state.finish(completion.op)
        if isinstance(completion, ReadDone) and isinstance(pending, ReadPending):
            self._loading.read_done(pending, completion.outcome, completion.checksums, completion.mark)
        elif isinstance(completion, WriteDone) and isinstance(pending, WritePending):
            self._writer.write_done(pending, completion.outcome, completion.stored_bytes)
        elif isinstance(completion, SealDone) and isinstance(pending, SealPending):
            self._storing.seal_done(pending, completion.outcome, completion.checksums)
        elif isinstance(completion, CopyDone) and isinstance(pending, CopyPending):
            self._mover.copy_done(pending, completion.outcome, completion.checksums)
        elif isinstance(completion, DeleteDone) and isinstance(pending, DeletePending):
            self._deleter.delete_done(pending, completion.outcome)
        elif isinstance(completion, ProbeDone) and isinstance(pending, ProbePending):
            self._loading.probe_done(pending, completion.outcome, completion.found)
        else:
            raise InvariantBroken(f"{completion} does not answer {pending}")
        self._settle_books()
        return self._loading.has_more

    def tell(self, news: News, now: float) -> None:
        """News from outside."""
        self.tell_all((news,), now)

    def tell_all(self, news: Iterable[News], now: float) -> None:
        """Several pieces of news, in order; no more at a time than may be done in one hold of the owner's lock."""
        self._state.now = now
        for item in news:
            if isinstance(item, SessionDied):
                self._sessions.died(item.session)
            elif isinstance(item, MappersGone):
                self._sessions.mappers_gone(item.session)
            else:
                self._newsroom.apply(item)
        self._settle_books()

    def tick(self, now: float) -> float | None:
        """Let time pass: deadlines, writes put off. Returns when it wants to be called next: at a deadline, at the end of a pause."""
        state = self._state
        state.now = now
        self._loading.expire()
        self._deleter.trim()
        self._deleter.forget_stale()
        self._settle_books()
        wanted = [
            again
            for store in state.stores.values()
            if store.up
            and (again := store.rests_until) > now
            and (
                store.backlog
                or store.asked is not None
                or state.cpu.asked is not None
                or (state.gpu and state.gpu.backlog)
            )
        ]
        wanted += [
            next(iter(store.resting.values())).until
            for store in state.stores.values()
            if store.up and store.resting
        ]
        if self._has_more or any(evictor.has_more for evictor in self._evictors):
            wanted.append(now)
        deadline = self._loading.next_deadline()
        if deadline is not None:
            wanted.append(deadline)
        return min(wanted, default=None)

    # --- what comes out ---

    def intents(self) -> list[Intent]:
        """Take what is to be done now."""
        taken: deque[Intent] = deque()
        self.move_intents(taken)
        return list(taken)

    def move_intents(self, to: deque[Intent]) -> None:
        """The same into a queue, in one step of the interpreter: an interrupt finds each of them here or there."""
        try:
            to.extend(iter(self._state.outbox.popleft, None))
        except IndexError:
            pass  # how the outbox says that it is empty

    def answered(self) -> list[LoadTicket]:
        """Take the loads that were settled since the last time."""
        taken = list(self._loading.settled)
        self._loading.settled.clear()
        return taken

    def advanced(self) -> list[LoadTicket]:
        """Take the loads that have more chunks `ready` than at the last time, and are still to be answered."""
        taken = list(self._loading.advanced)
        self._loading.advanced.clear()
        return taken

    def drain(self, now: float) -> None:
        """Write out everything that only memory holds; `unfinished` falls to 0 when it is done. Call `go_on` until it says False."""
        self._state.now = now
        self._writer.drain()
        self._mover.drain()
        self._settle_books()

    @property
    def unfinished(self) -> int:
        """Seals, copies and writes under way or waiting for their turn, and evictions that wait for a slower tier."""
        state = self._state
        waiting = sum(len(store.backlog) + len(store.resting) for store in state.stores.values())
        waiting += sum(memory.asked is not None for memory in (state.cpu, state.gpu) if memory is not None)
        waiting += sum(
            store.emptying or (store.asked is not None and store.paused_until > state.now)
            for store in state.stores.values()
        )
        return (
            state.background + self._writer.has_more + waiting + (len(state.gpu.backlog) if state.gpu else 0)
        )

    def order_of_use(self, tier: Tier) -> Iterator[tuple[bytes, ChunkKey, int]]:
        """Namespace, key and number of parts of all whole chunks in a store, least recently used first.

        The call takes a snapshot (3 ms for 100,000 chunks); walk it, which takes 50, outside the owner's lock.
        """
        return walks.order_of_use(self._state.stores[tier])

    def parts_in_doubt(self, tier: Tier) -> Iterator[int]:
        """Numbers of parts of chunks that a store has not whole: of these some are there, some not. A snapshot, as for `order_of_use`."""
        return walks.parts_in_doubt(self._state.stores[tier])

    def records(self, tier: Tier) -> Iterator[tuple[bytes, int]]:
        """Namespace and bytes of each chunk that a store has; a snapshot, as for `order_of_use`."""
        return walks.records(self._state.stores[tier])

    def namespaces(self) -> dict[bytes, dict[str, int]]:
        """What the chunks of each namespace are; zeros for one that was recovered and nobody has attached yet."""
        return {
            space.digest: {"chunk_tokens": space.chunk_tokens, "chunk_bytes": space.payload_bytes}
            for space in self._state.index.spaces()
        }

    def entries(self, tier: Tier) -> int:
        """Chunks that a tier's policy knows; 0 for a disabled tier."""
        state = self._state
        place = {Tier.CPU: state.cpu, Tier.GPU: state.gpu, **state.stores}.get(tier)
        return len(place.policy) if place is not None else 0

    def is_shared(self, tier: Tier) -> bool:
        """Whether others use the tier's store as well."""
        return self._state.stores[tier].remembered is not None

    def stored_bytes(self, tier: Tier) -> int:
        """Bytes that a store holds of ours, writes under way (estimated) included."""
        return self._state.stores[tier].used

    def copies(self, tier: Tier) -> list[MemoryCopy]:
        """All copies attached in a tier of slots. O(n)."""
        return walks.copies(self._state, tier)

    def memory_map(self, tier: Tier) -> MemoryMap | None:
        """Begin a walk over a memory tier's slots; None for a disabled one."""
        memory = {Tier.CPU: self._state.cpu, Tier.GPU: self._state.gpu}.get(tier)
        return None if memory is None else MemoryMap(memory, self._sessions.values())

    def on_their_way(self, space: SpaceId, keys: Iterable[ChunkKey]) -> int:
        """How many of these chunks are still being sealed, copied or written, or wait for that."""
        chunks = self._space(space).chunks
        found = (chunks.get(key) for key in keys)
        return sum(1 for chunk in found if chunk is not None and walks.is_on_its_way(self._state, chunk))

    def reattribute(self, ticket: LoadTicket, reason: MissReason) -> None:
        """The caller knows better why an answered load stopped (it has seen the tokens elsewhere): that counts when it is released."""
        ticket.stopped_by = reason

    def stats(self) -> dict[str, Any]:
        """Usage, queues and counters, as plain values."""
        from kvtiers.core.report import report

        return report(self._state, self._sessions)

    def check_integrity(self) -> list[str]:
        """Walk everything and return what does not add up.

        It has to see one moment, so it stops the cache: about 5 µs for each chunk known.
        """
        return check_integrity(self._state, self._sessions, self._loading)

    # --- inside ---

    @property
    def _has_more(self) -> bool:
        return self._toucher.has_more or self._loading.has_more or self._writer.has_more

    def _settle_books(self) -> None:
        """What every call ends with: nothing that could go on now is left waiting for the next call."""
        unstaged = self._state.unstaged
        self._loading.resume()
        self._loading.advance_queue()
        while unstaged:
            self._cpu_evictor.settle_unstaged()
            self._loading.advance_queue()
        self._toucher.go_on()
        for evictor in self._evictors:
            evictor.pursue()
        self._mover.pump()
        self._writer.pump()
        self._deleter.pursue()
        self._ledger.sweep()

    def _close_store(self, ticket: StoreTicket) -> None:
        if not ticket.copies:
            owner = self._sessions.get(ticket.session)
            if owner is not None:
                owner.tickets.pop(ticket.id, None)
        self._settle_books()

    def _space(self, space_id: SpaceId) -> Space:
        space = self._state.index.space_by_id(space_id)
        if space is None:
            raise InvariantBroken(f"namespace {space_id} is not attached")
        return space

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _next_ticket(self) -> TicketId:
        return TicketId(self._next_id())
