"""A dictionary that knows what a cache may serve, run against a `Core` on the driver's virtual machine.

Truth is small: a chunk may be served with the bytes of any store of it that was ever committed, whole, and nothing else may
ever be served. Every store writes a new generation of its chunks' bytes, so a stale or mixed chunk shows. `check` is run
after every step; it compares answered loads with the dictionary, the core's books with themselves and with what the driver
saw, and asks that nothing waits without a reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from kvtiers.core.core import Core
from kvtiers.core.index import MemoryState
from kvtiers.core.messages import (
    Damaged,
    MappersGone,
    OpId,
    Outcome,
    Recovered,
    RecoveryEnded,
    SessionDied,
    SessionId,
    SpaceId,
    SpaceReport,
    StoreUp,
    TicketId,
    Write,
)
from kvtiers.core.settings import CoreSettings
from kvtiers.core.tickets import LoadState, LoadTicket, StoreTicket
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import Parts, RecordRef
from kvtiers.model.tiers import Tier
from kvtiers.testing.core_driver import CoreDriver

_SETTLING_STEPS = 10_000
_TRIMMING_TICKS = 20
_GENERATION_BYTES = 8


@lru_cache(maxsize=20_000)
def payload_of(namespace: bytes, key: ChunkKey, generation: int, part: int, nbytes: int) -> bytes:
    """The bytes of a part: the generation, then noise made from all arguments."""
    seed = b"%b|%b|%d|%d" % (namespace, key, generation, part)
    noise = hashlib.blake2b(seed).digest()
    whole = generation.to_bytes(_GENERATION_BYTES, "little") + noise * (nbytes // len(noise) + 1)
    return whole[:nbytes]


@dataclass(frozen=True, slots=True)
class SpaceSpec:
    """A namespace the oracle works in."""

    namespace: bytes
    parts: Parts
    chunk_tokens: int = 16


@dataclass(slots=True)
class Truth:
    """What outlives a restart of the core."""

    committed: dict[tuple[bytes, ChunkKey], set[int]] = field(default_factory=dict)
    """Generations of each chunk that were committed."""
    generation: int = 0
    torn: set[RecordRef] = field(default_factory=set)
    """Records that a failing write may have left: the core can't know of them before the next start."""


class CoreOracle:
    """One core under test, and what it may answer."""

    def __init__(self, settings: CoreSettings, specs: Sequence[SpaceSpec]) -> None:
        self.settings = settings
        self.specs = specs
        self.truth = Truth()
        self.driver = CoreDriver(settings)
        self.spaces: list[SpaceId] = []
        self.sessions: list[SessionId] = []
        self.dead: list[SessionId] = []
        self.stores: dict[TicketId, StoreTicket] = {}
        self.loads: dict[TicketId, LoadTicket] = {}
        """Not released yet, answered or not."""
        self.hits = 0
        """Chunks answered, as the counters should have them."""
        self.recovering: list[RecordRef] = []
        """Records of an earlier run that the core has not been told of yet."""
        self.roomy = True
        """Nothing but the core's own writes has filled the disk: no foreign bytes, no smaller capacity than before."""
        self._attach()

    # --- steps ---

    def open_session(self) -> SessionId:
        session = self.driver.call(lambda core, _: core.open_session())
        self.sessions.append(session)
        return session

    def open_store(
        self, session: SessionId, space: int, root: ChunkKey, keys: list[ChunkKey], first: int
    ) -> StoreTicket:
        ticket = self.driver.open_store(session, self.spaces[space], root, keys, first)
        taken = [slot.index for slot in ticket.accepted] + [index for index, _ in ticket.refused]
        assert sorted(taken) == list(range(first, len(keys))), (
            "every chunk asked for is accepted or refused, once"
        )
        if ticket.copies:
            self.stores[ticket.id] = ticket
        return ticket

    def commit(self, ticket: StoreTicket, indices: Sequence[int]) -> None:
        truth, namespace = self.truth, ticket.space.digest
        truth.generation += 1
        generation = truth.generation
        for index in indices:
            truth.committed.setdefault((namespace, ticket.copies[index].chunk.key), set()).add(generation)

        def content(key: ChunkKey, part: int, nbytes: int) -> bytes:
            return payload_of(namespace, key, generation, part, nbytes)

        self.driver.commit(ticket, content, indices)
        if not ticket.copies:
            del self.stores[ticket.id]

    def abort(self, ticket: StoreTicket) -> None:
        self.driver.abort(ticket)
        del self.stores[ticket.id]

    def open_load(self, session: SessionId, space: int, keys: list[ChunkKey], timeout: float) -> LoadTicket:
        match = self.lookup(space, keys)
        ticket = self.driver.open_load(session, self.spaces[space], keys, timeout)
        assert ticket.num_chunks <= match, "a load matches no more than a lookup"
        self.loads[ticket.id] = ticket
        return ticket

    def release(self, ticket: LoadTicket, used: range | None = None) -> None:
        """`used`: what its engine takes of it; None: all."""
        self._take_answers()
        if ticket.state is LoadState.SETTLED:
            self._check_load(ticket)
            self.hits += len(ticket.tiers if used is None else ticket.tiers[used.start : used.stop])
        self.driver.release(ticket, used)
        del self.loads[ticket.id]

    def cut(self, ticket: LoadTicket, index: int) -> None:
        self._take_answers()
        copy = ticket.copies[index]
        if copy is not None and copy.leases == 1:
            self.driver.damage(copy.tier, ticket.space.id, copy.slots)
        self.driver.cut(ticket, index)

    def damage(self, which: int) -> None:
        """A sealed chunk in the arena that nobody has been given turns bad, and somebody notices."""
        given = {id(copy) for ticket in self.loads.values() for copy in ticket.copies}
        copies = [
            copy
            for copy in self.driver.core.copies(Tier.CPU)
            if copy.state is MemoryState.READY and copy.checksums and id(copy) not in given
        ]
        if copies:
            copy = copies[which % len(copies)]
            space = copy.chunk.space
            self.driver.damage(Tier.CPU, space.id, copy.slots)
            self.driver.tell(Damaged(Tier.CPU, space.digest, copy.chunk.key))

    def lookup(self, space: int, keys: list[ChunkKey]) -> int:
        """Look up, and make sure that nothing changed by it; returns the number of chunks matched."""
        core = self.driver.core
        before = self._picture(core)
        match = core.lookup(self.spaces[space], keys)
        assert self._picture(core) == before, "a lookup changes nothing"
        assert (match.stopped_by is None) is (len(match.tiers) == len(keys)), "a match that stops says why"
        return len(match.tiers)

    def complete(self, op: OpId, outcome: Outcome, parts_done: int = 0) -> None:
        intent = self.driver.pending[op]
        if isinstance(intent, Write) and outcome is not Outcome.OK:
            mark = intent.mark
            self.truth.torn.update(
                RecordRef(mark.namespace, mark.key, part) for part in range(mark.num_parts)
            )
        self.driver.complete(op, outcome, parts_done)

    def die(self, session: SessionId) -> None:
        self._take_answers()
        self.driver.tell(SessionDied(session))
        self.sessions.remove(session)
        self.dead.append(session)
        self.stores = {i: ticket for i, ticket in self.stores.items() if ticket.session != session}
        self.loads = {i: ticket for i, ticket in self.loads.items() if ticket.session != session}

    def unmap(self, session: SessionId) -> None:
        if session in self.sessions:
            self.die(session)
        self.driver.tell(MappersGone(session))
        self.dead.remove(session)

    def restart(self, settings: CoreSettings, order: Callable[[list[RecordRef]], None]) -> None:
        """The process ends at once; the next one finds what the disk holds, in the order given."""
        records, now = self.driver.records, self.driver.now
        self.settings = settings
        self.driver = CoreDriver(settings, records, now=now)
        self.sessions, self.dead, self.spaces = [], [], []
        self.stores, self.loads, self.hits, self.roomy = {}, {}, 0, False
        self._attach()
        self.recovering = list(records[Tier.DISK]) if settings.disk else []
        order(self.recovering)
        self.truth.torn.clear()

    def recover(self, count: int) -> None:
        """Tell of some records of the earlier run; when all are told, that it is over."""
        for _ in range(min(count, len(self.recovering))):
            ref = self.recovering.pop()
            record = self.driver.records[Tier.DISK].get(ref)
            if record is not None:
                self.driver.tell(Recovered(Tier.DISK, record.mark, ref.part, record.stored_bytes))
        if not self.recovering and Tier.DISK in self.store_tiers:
            self.driver.tell(RecoveryEnded(Tier.DISK))

    # --- what must hold ---

    def check(self) -> None:
        """After every step."""
        driver, core = self.driver, self.driver.core
        assert not driver.violations, driver.violations
        problems = core.check_integrity()
        assert not problems, problems
        self._take_answers()
        for ticket in self.loads.values():
            if ticket.state is LoadState.SETTLED:
                self._check_load(ticket)
        self._check_waiting()
        self._check_counters(core)
        self._check_disk(core)

    def check_deadlines(self) -> None:
        """After time has passed."""
        late = [
            ticket
            for ticket in self.loads.values()
            if self._is_open(ticket) and ticket.deadline <= self.driver.now
        ]
        assert not late, "loads are answered at their deadline at the latest"

    def finish(self) -> None:
        """Let everything end well, and see that nothing is left: no lease, no staged byte, no work."""
        driver = self.driver
        self.recover(len(self.recovering))
        for tier in self.store_tiers:
            driver.tell(StoreUp(tier))
            driver.tell(SpaceReport(tier, 0))
        for store in list(self.stores.values()):
            self.commit(store, sorted(store.copies))
        for load in list(self.loads.values()):
            self.release(load)
        for session in [*self.sessions, *self.dead]:
            self.unmap(session)
        driver.call(lambda core, now: core.drain(now))
        for _ in range(_SETTLING_STEPS):
            driver.run()
            self.check()
            if not driver.core.unfinished:
                break
            driver.advance(10.0)
        for _ in range(_TRIMMING_TICKS):
            driver.advance(1.0)
            driver.run()
        stats = driver.core.stats()
        assert not driver.core.unfinished, f"background work never ends: {stats}"
        assert not stats["operations"]
        self._check_bounds()
        assert not stats["open_tickets"]
        for name in (Tier.GPU, Tier.CPU):
            tier = stats["tiers"].get(name)
            if tier is not None:
                assert not tier.get("staged_bytes"), f"{name} keeps staged bytes"
                assert not tier.get("leased_chunks"), f"{name} keeps leases"
                assert driver.watch[name].idle

    # --- inside ---

    def _check_bounds(self) -> None:
        for tier, store in ((Tier.DISK, self.settings.disk), (Tier.REMOTE, self.settings.remote)):
            if store is not None and store.ceiling is not None:
                assert self.driver.core.stored_bytes(tier) <= store.ceiling, f"{tier} stays above its ceiling"

    def _attach(self) -> None:
        for spec in self.specs:
            self.spaces.append(self.driver.attach(spec.namespace, spec.parts, spec.chunk_tokens))

    @property
    def store_tiers(self) -> list[Tier]:
        """Tiers of records that are enabled."""
        stores = ((Tier.DISK, self.settings.disk), (Tier.REMOTE, self.settings.remote))
        return [tier for tier, store in stores if store is not None]

    def _take_answers(self) -> None:
        for ticket in self.driver.answered:
            short = ticket.num_chunks < len(ticket.keys)
            assert (ticket.stopped_by is not None) is short, "an answer that stops says why"
        self.driver.answered.clear()

    def _is_open(self, ticket: LoadTicket) -> bool:
        return ticket.state in (LoadState.QUEUED, LoadState.STAGING)

    def _check_load(self, ticket: LoadTicket) -> None:
        chunks = self.driver.payloads(ticket)
        assert len(chunks) == ticket.num_chunks == len(ticket.tiers) == len(ticket.slots())
        namespace, parts = ticket.space.digest, ticket.space.parts
        for key, payloads in zip(ticket.keys, chunks, strict=False):
            generations = {int.from_bytes(payload[:_GENERATION_BYTES], "little") for payload in payloads}
            allowed = self.truth.committed.get((namespace, key), set())
            assert len(generations) == 1, "a chunk is made of one store's parts"
            generation = generations.pop()
            assert generation in allowed, (
                f"generation {generation} of {key.hex()[:8]} was never committed: {allowed}"
            )
            assert parts is not None
            right = [payload_of(namespace, key, generation, n, part.nbytes) for n, part in enumerate(parts)]
            assert payloads == right, f"wrong bytes for {key.hex()[:8]}"

    def _check_waiting(self) -> None:
        """With nothing under way and nothing held, no load has a reason to wait."""
        held = self.driver.pending or self.stores or self.dead
        if held or any(not self._is_open(ticket) for ticket in self.loads.values()):
            return
        waiting = [ticket.id for ticket in self.loads.values() if self._is_open(ticket)]
        assert not waiting, f"loads {waiting} wait for nothing"

    def _check_counters(self, core: Core) -> None:
        tiers = core.stats()["tiers"].values()
        assert sum(tier.get("hits", 0) for tier in tiers) == self.hits, (
            "each hit is counted for exactly one tier"
        )
        assert all(tier.get("hits", 0) <= tier.get("lookups", 0) for tier in tiers)

    def _check_disk(self, core: Core) -> None:
        disk = self.settings.disk
        if disk is None or disk.capacity is None:
            return
        unknown = {*self.truth.torn, *self.recovering}
        records = self.driver.records[Tier.DISK]
        known = sum(record.stored_bytes for ref, record in records.items() if ref not in unknown)
        assert known <= core.stored_bytes(Tier.DISK), "the disk holds bytes that nobody counts"
        if self.roomy:
            assert core.stored_bytes(Tier.DISK) <= disk.capacity, "the disk holds more than it may"

    def _picture(self, core: Core) -> object:
        state = core._state
        tiers = [tier for tier in (state.gpu, state.cpu, *state.stores.values()) if tier is not None]
        orders = [[chunk.key for chunk in tier.policy.coldest_first()] for tier in tiers]
        return core.stats(), orders, list(state.outbox), list(state.pending), state.index.num_ghosts
