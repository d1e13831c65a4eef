"""Drives a `Core` without threads: a virtual clock, real bytes, and operations that end when, and how, the caller says.

The oracle uses it to let everything happen in every order; a replay uses it to run a trace in virtual time. Intents wait in
`pending` until `complete` carries them out on real arrays: reads and copies really overwrite their targets, also when they
fail or come late, so a slot that was reused too early shows as wrong bytes. Besides, it keeps a ledger of its own of who
writes to and who reads from each page, and notes every overlap in `violations`.

One thread. `call` is what the runtime's mutex is: one call into the core, then its intents and answers are taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from kvtiers.core.core import Core
from kvtiers.core.messages import (
    Cancel,
    Chunkmark,
    Completion,
    Copy,
    CopyDone,
    Delete,
    DeleteDone,
    MappersGone,
    News,
    OpId,
    Outcome,
    Probe,
    ProbeDone,
    Read,
    ReadDone,
    Seal,
    SealDone,
    SessionDied,
    SessionId,
    Slots,
    SpaceId,
    TicketId,
    Write,
    WriteDone,
)
from kvtiers.core.settings import CoreSettings
from kvtiers.core.tickets import LoadTicket, StoreTicket
from kvtiers.model.keys import ChunkKey
from kvtiers.model.layout import PAGE_BYTES, round_to_page
from kvtiers.model.parts import Parts, RecordRef
from kvtiers.model.tiers import Tier

T = TypeVar("T")
Operation: TypeAlias = Seal | Copy | Read | Write | Delete | Probe
Content: TypeAlias = Callable[[ChunkKey, int, int], bytes]
"""The payload of a part: from key, part number and size."""

_NOT_BEGUN = (Outcome.REFUSED, Outcome.CANCELLED)


class Record(NamedTuple):
    """A part in a store."""

    mark: Chunkmark
    payload: bytes
    checksum: bytes

    @property
    def stored_bytes(self) -> int:
        """A header page and the payload, padded."""
        return PAGE_BYTES + round_to_page(len(self.payload))


Records: TypeAlias = dict[Tier, dict[RecordRef, Record]]


def checksum(payload: bytes | memoryview) -> bytes:
    """16 bytes."""
    return hashlib.blake2b(payload, digest_size=16).digest()


class PageWatch:
    """Who writes to and who reads from each page of one memory: nobody may write where somebody reads or writes."""

    def __init__(self, tier: Tier, capacity: int, violations: list[str]) -> None:
        pages = capacity // PAGE_BYTES + 1
        self._tier = tier
        self._writers = np.zeros(pages, np.int32)
        self._readers = np.zeros(pages, np.int32)
        self._violations = violations

    def begin_write(self, pages: slice, who: str) -> None:
        if self._writers[pages].any() or self._readers[pages].any():
            self._violations.append(f"{who} writes to pages {pages} of {self._tier}, which are in use")
        self._writers[pages] += 1

    def begin_read(self, pages: slice, who: str) -> None:
        if self._writers[pages].any():
            self._violations.append(f"{who} reads pages {pages} of {self._tier}, which are being written")
        self._readers[pages] += 1

    def end_write(self, pages: slice) -> None:
        self._writers[pages] -= 1

    def end_read(self, pages: slice) -> None:
        self._readers[pages] -= 1

    @property
    def idle(self) -> bool:
        return not self._writers.any() and not self._readers.any()


class Place(NamedTuple):
    """A chunk's slots."""

    tier: Tier
    space: SpaceId
    slots: Slots


class CoreDriver:
    """One core, its memories and its stores."""

    def __init__(self, settings: CoreSettings, records: Records | None = None, *, now: float = 0.0) -> None:
        """`records`: what an earlier run left; the caller tells the core of it."""
        self.core = Core(settings)
        self.now = now
        self.records: Records = {Tier.DISK: {}, Tier.REMOTE: {}} if records is None else records
        self.shared = {
            tier
            for tier, store in ((Tier.DISK, settings.disk), (Tier.REMOTE, settings.remote))
            if store is not None and store.remember is not None
        }
        """Stores that others write to as well."""
        self.pending: dict[OpId, Operation] = {}
        """Begun and not ended, in order of issue."""
        self.cancelled: set[OpId] = set()
        """Among them those that nobody waits for."""
        self.answered: list[LoadTicket] = []
        """Loads answered since the caller last emptied this."""
        self.violations: list[str] = []
        self.damaged = False
        """Whether anything was damaged: then a write may find other bytes than were sealed."""
        sizes = {Tier.CPU: settings.cpu.capacity, Tier.GPU: settings.gpu.capacity if settings.gpu else 0}
        self.memory = {tier: np.zeros(size, np.uint8) for tier, size in sizes.items()}
        self.watch = {tier: PageWatch(tier, size, self.violations) for tier, size in sizes.items()}
        self._parts: dict[SpaceId, Parts] = {}
        self._storing: dict[tuple[SessionId, TicketId], dict[int, Place]] = {}
        """What engines write to."""
        self._loaded: dict[tuple[SessionId, TicketId], list[Place]] = {}
        """What engines read from."""

    # --- calls ---

    def call(self, action: Callable[[Core, float], T]) -> T:
        """One call into the core at the present time."""
        result = action(self.core, self.now)
        self._collect()
        return result

    def _repeat(self, action: Callable[[Core, float], bool]) -> None:
        """Calls until nothing is left to do: a long chain takes several."""
        while self.call(action):
            pass

    def attach(
        self, namespace: bytes, parts: Parts, chunk_tokens: int = 16, session: SessionId | None = None
    ) -> SpaceId:
        """Declare a namespace, for a session or for good."""
        space = self.call(lambda core, _: core.attach(namespace, parts, chunk_tokens, session))
        self._parts[space] = parts
        return space

    def open_store(
        self, session: SessionId, space: SpaceId, root: ChunkKey, keys: Sequence[ChunkKey], first: int = 0
    ) -> StoreTicket:
        """The engine begins to write at once, and anything stands in the slots until `commit`."""
        ticket = self.call(lambda core, now: core.open_store(session, space, root, keys, now, first))
        self._repeat(lambda core, now: core.extend(ticket, now))
        places = {slot.index: Place(slot.tier, space, slot.slots) for slot in ticket.accepted}
        self._storing[session, ticket.id] = places
        for place in places.values():
            self._begin_write(place, f"store {ticket.id}")
        return ticket

    def commit(self, ticket: StoreTicket, content: Content, indices: Iterable[int] | None = None) -> None:
        """The engine has written the payloads of these chunks (of all that are open, if None)."""
        places = self._storing[ticket.session, ticket.id]
        chosen = sorted(places) if indices is None else list(indices)
        for index in chosen:
            place = places.pop(index)
            key = ticket.copies[index].chunk.key
            for number, view in enumerate(self._views(place)):
                view[:] = np.frombuffer(content(key, number, len(view)), np.uint8)
            self._end_write(place)
        self.call(lambda core, now: core.commit(ticket, now, chosen))
        self._repeat(lambda core, now: core.go_on(now))

    def abort(self, ticket: StoreTicket) -> None:
        """The engine has stopped writing."""
        for place in self._storing.pop((ticket.session, ticket.id), {}).values():
            self._end_write(place)
        self.call(lambda core, now: core.abort(ticket, now))

    def open_load(
        self, session: SessionId, space: SpaceId, keys: Sequence[ChunkKey], timeout: float = 10.0
    ) -> LoadTicket:
        """Begin a load."""
        ticket = self.call(lambda core, now: core.open_load(session, space, keys, now, now + timeout))
        self._repeat(lambda core, now: core.extend(ticket, now))
        return ticket

    def release(self, ticket: LoadTicket, used: range | None = None) -> None:
        """The engine has copied what it wanted (None: all), or has given up."""
        self._end_reads((ticket.session, ticket.id))
        self._repeat(lambda core, now: core.release(ticket, now, used))

    def cut(self, ticket: LoadTicket, index: int) -> None:
        """A chunk of an answered load is damaged: the engine looks at it no more, nor at what follows."""
        self._end_reads((ticket.session, ticket.id), index)
        self.call(lambda core, now: core.cut(ticket, index, now))

    def advance(self, seconds: float) -> float | None:
        """Let time pass."""
        self.now += seconds
        return self.call(lambda core, now: core.tick(now))

    def tell(self, news: News) -> None:
        """News. A session that died reads no more, but writes to its slots until nobody maps the arena (`MappersGone`)."""
        if isinstance(news, SessionDied | MappersGone):
            for who in [who for who in self._loaded if who[0] == news.session]:
                self._end_reads(who)
        if isinstance(news, MappersGone):
            for who in [who for who in self._storing if who[0] == news.session]:
                for place in self._storing.pop(who).values():
                    self._end_write(place)
        self.call(lambda core, now: core.tell(news, now))

    # --- operations ---

    def complete(self, op: OpId, outcome: Outcome = Outcome.OK, parts_done: int = 0) -> Outcome:
        """Carry out one operation and tell the core; returns how it really ended (OK may turn out otherwise).

        Of a write or delete that fails, `parts_done` parts were done all the same.
        """
        intent = self.pending.pop(op)
        self.cancelled.discard(op)
        if isinstance(intent, Seal):
            completion: Completion = self._seal(intent, outcome)
        elif isinstance(intent, Copy):
            completion = self._copy(intent, outcome)
        elif isinstance(intent, Read):
            completion = self._read(intent, outcome)
        elif isinstance(intent, Write):
            completion = self._write(intent, outcome, parts_done)
        elif isinstance(intent, Probe):
            completion = self._probe(intent, outcome)
        else:
            completion = self._delete(intent, outcome, parts_done)
        if self.call(lambda core, now: core.complete(completion, now)):
            self._repeat(lambda core, now: core.go_on(now))
        return completion.outcome

    def run(self, limit: int = 100_000) -> int:
        """Carry out everything, by priority, and what comes of it; returns the number of operations."""
        done = 0
        while self.pending and done < limit:
            self.complete(min(self.pending, key=lambda op: (self.pending[op][-1], op)))
            done += 1
        return done

    def payloads(self, ticket: LoadTicket) -> list[list[bytes]]:
        """What stands in the slots of an answered load: for each chunk one payload for each part."""
        places = self._loaded.get((ticket.session, ticket.id), [])
        return [[view.tobytes() for view in self._views(place)] for place in places]

    def damage(self, tier: Tier, space: SpaceId, slots: Slots) -> None:
        """Flip bits where a chunk lies; the caller tells the core. Writes under way may bring them to a store, marked as sound."""
        self.damaged = True
        for view in self._views(Place(tier, space, slots)):
            view ^= 0x55

    def scribble(self, session: SessionId) -> None:
        """The session, or a fork of it, writes to the slots of its open stores."""
        for (owner, _), places in self._storing.items():
            if owner == session:
                for place in places.values():
                    self._scribble(place)

    # --- inside ---

    def _seal(self, intent: Seal, outcome: Outcome) -> SealDone:
        place = Place(Tier.CPU, intent.space, intent.slots)
        self._end_read(place)
        return SealDone(intent.op, outcome, self._sums(place) if outcome is Outcome.OK else ())

    def _copy(self, intent: Copy, outcome: Outcome) -> CopyDone:
        source = Place(intent.source, intent.space, intent.source_slots)
        target = Place(intent.target, intent.space, intent.target_slots)
        self._end_read(source)
        self._end_write(target)
        if outcome is Outcome.OK:
            for view, payload in zip(self._views(target), self._views(source), strict=True):
                view[:] = payload
        elif outcome not in _NOT_BEGUN:
            self._scribble(target)
        to_arena = outcome is Outcome.OK and intent.target is Tier.CPU
        return CopyDone(intent.op, outcome, self._sums(target) if to_arena else ())

    def _read(self, intent: Read, outcome: Outcome) -> ReadDone:
        place = Place(Tier.CPU, intent.space, intent.slots)
        self._end_write(place)
        if outcome in _NOT_BEGUN:
            return ReadDone(intent.op, outcome)
        self._scribble(place)
        refs = self._refs(intent.mark, len(self._parts[intent.space]))
        found = [self.records[intent.tier].get(ref) for ref in refs]
        records = [record for record in found if record is not None]
        if outcome is Outcome.OK and len(records) < len(refs):
            outcome = Outcome.MISSING
        if outcome is Outcome.OK and any(checksum(record.payload) != record.checksum for record in records):
            outcome = Outcome.CORRUPT
        if outcome in (Outcome.MISSING, Outcome.CORRUPT):
            self.records[intent.tier].pop(refs[-1], None)
        if outcome is not Outcome.OK:
            return ReadDone(intent.op, outcome)
        for view, record in zip(self._views(place), records, strict=True):
            view[:] = np.frombuffer(record.payload, np.uint8)
        return ReadDone(intent.op, outcome, tuple(record.checksum for record in records), records[0].mark)

    def _write(self, intent: Write, outcome: Outcome, parts_done: int) -> WriteDone:
        place = Place(Tier.CPU, intent.space, intent.slots)
        self._end_read(place)
        if outcome in _NOT_BEGUN:
            return WriteDone(intent.op, outcome)
        stored = 0
        refs = self._refs(intent.mark, len(intent.slots))
        there = [ref in self.records[intent.tier] for ref in refs]
        if outcome is Outcome.OK and intent.tier in self.shared and all(there):
            return WriteDone(intent.op, Outcome.PRESENT)  # as the runtime: others may have written it
        if len(refs) > 1 and (outcome is Outcome.OK or parts_done):
            for ref in refs:  # as the runtime: what an earlier write left half goes first
                self.records[intent.tier].pop(ref, None)
        for ref, view, sealed in zip(refs, self._views(place), intent.checksums, strict=True):
            if outcome is not Outcome.OK and ref.part >= parts_done:
                break
            record = Record(intent.mark, view.tobytes(), sealed)
            if checksum(record.payload) != sealed and not self.damaged:
                self.violations.append(f"write {intent.op} has other bytes than were sealed")
            self.records[intent.tier][ref] = record
            stored += record.stored_bytes
        return WriteDone(intent.op, outcome, stored if outcome is Outcome.OK else 0)

    def _probe(self, intent: Probe, outcome: Outcome) -> ProbeDone:
        if outcome is not Outcome.OK:
            return ProbeDone(intent.op, outcome)
        space = self.core._space(intent.space)
        records, parts = self.records[intent.tier], range(len(self._parts[intent.space]))
        found = tuple(
            all(RecordRef(space.digest, key, part) in records for part in parts) for key in intent.keys
        )
        return ProbeDone(intent.op, outcome, found)

    def _delete(self, intent: Delete, outcome: Outcome, parts_done: int) -> DeleteDone:
        if outcome not in _NOT_BEGUN:
            for ref in self._refs(intent.mark, max(1, intent.mark.num_parts)):
                if outcome in (Outcome.OK, Outcome.MISSING) or ref.part < parts_done:
                    self.records[intent.tier].pop(ref, None)
        return DeleteDone(intent.op, outcome)

    def _collect(self) -> None:
        for intent in self.core.intents():
            if isinstance(intent, Cancel):
                if intent.op in self.pending:
                    self.cancelled.add(intent.op)
                continue
            self.pending[intent.op] = intent
            who = f"{type(intent).__name__} {intent.op}"
            if isinstance(intent, Read):
                self._begin_write(Place(Tier.CPU, intent.space, intent.slots), who)
            elif isinstance(intent, Copy):
                self._begin_read(Place(intent.source, intent.space, intent.source_slots), who)
                self._begin_write(Place(intent.target, intent.space, intent.target_slots), who)
            elif isinstance(intent, Seal | Write):
                self._begin_read(Place(Tier.CPU, intent.space, intent.slots), who)
        for ticket in self.core.answered():
            places = [Place(slot.memory, ticket.space.id, slot.slots) for slot in ticket.slots()]
            self._loaded[ticket.session, ticket.id] = places
            for place in places:
                self._begin_read(place, f"load {ticket.id}")
            self.answered.append(ticket)

    def _refs(self, mark: Chunkmark, parts: int) -> list[RecordRef]:
        return [RecordRef(mark.namespace, mark.key, number) for number in range(parts)]

    def _views(self, place: Place) -> list[npt.NDArray[np.uint8]]:
        pairs = zip(place.slots, self._parts[place.space], strict=True)
        return [self.memory[place.tier][slot : slot + part.nbytes] for slot, part in pairs]

    def _sums(self, place: Place) -> tuple[bytes, ...]:
        return tuple(checksum(view.tobytes()) for view in self._views(place))

    def _scribble(self, place: Place) -> None:
        for view in self._views(place):
            view[:] = 0xEE

    def _pages(self, place: Place) -> list[slice]:
        pairs = zip(place.slots, self._parts[place.space], strict=True)
        return [slice(slot // PAGE_BYTES, (slot + part.slot_bytes) // PAGE_BYTES) for slot, part in pairs]

    def _begin_write(self, place: Place, who: str) -> None:
        """Anything may stand in a slot from now on until the write has ended."""
        for pages in self._pages(place):
            self.watch[place.tier].begin_write(pages, who)
        self._scribble(place)

    def _end_write(self, place: Place) -> None:
        for pages in self._pages(place):
            self.watch[place.tier].end_write(pages)

    def _begin_read(self, place: Place, who: str) -> None:
        for pages in self._pages(place):
            self.watch[place.tier].begin_read(pages, who)

    def _end_read(self, place: Place) -> None:
        for pages in self._pages(place):
            self.watch[place.tier].end_read(pages)

    def _end_reads(self, who: tuple[SessionId, TicketId], first: int = 0) -> None:
        places = self._loaded.get(who, [])
        for place in places[first:]:
            self._end_read(place)
        del places[first:]
        if not first:
            self._loaded.pop(who, None)
