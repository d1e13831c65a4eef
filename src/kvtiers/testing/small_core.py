"""A core small enough to tell a story about: one namespace, one session, chunks of a page, sizes counted in chunks.

A chain is a word; each letter is a chunk, and words that begin alike share chunks. Every helper leaves the oracle's check
behind it, so a test that only tells what happens also proves that nothing else went wrong.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

from kvtiers.core.messages import Outcome
from kvtiers.core.settings import CoreSettings, MemorySettings, StoreSettings, WritePolicy
from kvtiers.core.tickets import LoadTicket, Match, StoreTicket
from kvtiers.model.keys import ChunkKey
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.parts import Part, Parts
from kvtiers.model.tiers import Tier
from kvtiers.testing.core_driver import Operation
from kvtiers.testing.oracle import CoreOracle, SpaceSpec

O = TypeVar("O", bound=Operation)  # noqa: E741 - an operation

NAMESPACE = b"n" * 32


def keys_of(word: str) -> list[ChunkKey]:
    """The keys of a chain: that of a letter depends on all before it."""
    return [ChunkKey(hashlib.sha256(word[: end + 1].encode()).digest()) for end in range(len(word))]


def memory_of(
    chunks: int, staging: int = 0, *, low: int | None = None, parts: int = 1, probation: float = 1.0
) -> MemorySettings:
    """A tier of slots for so many chunks, and so many more for staging. Probation is as good as established unless told."""
    chunk = PAGE_BYTES * parts
    kept = chunks * chunk
    return MemorySettings(
        capacity=kept + staging * chunk,
        ceiling=kept,
        low=kept if low is None else low * chunk,
        probation_share=probation,
    )


def store_of(
    chunks: int | None,
    *,
    low: int | None = None,
    parts: int = 1,
    write: WritePolicy = WritePolicy.WRITE_THROUGH,
    admission: str = "always",
    max_queued: int = 1000,
) -> StoreSettings:
    """A tier of records for so many chunks; None: it bounds itself."""
    record = 2 * PAGE_BYTES * parts
    size = None if chunks is None else chunks * record
    return StoreSettings(
        capacity=size,
        ceiling=size,
        low=size if low is None or size is None else low * record,
        write_policy=write,
        admission=admission,
        max_queued=max_queued,
    )


class SmallCore(CoreOracle):
    """The core, its oracle, and a few words for what engines and disks do."""

    def __init__(
        self,
        cpu: MemorySettings,
        *,
        gpu: MemorySettings | None = None,
        disk: StoreSettings | None = None,
        remote: StoreSettings | None = None,
        parts: int = 1,
        write_lease_share: float = 1.0,
        ghosts: int = 100,
        max_hold: int = 256,
    ) -> None:
        shards = Parts([Part(0, rank, PAGE_BYTES) for rank in range(parts)])
        settings = CoreSettings(
            cpu=cpu,
            gpu=gpu,
            disk=disk,
            remote=remote,
            write_lease_share=write_lease_share,
            ghosts=ghosts,
            max_hold=max_hold,
        )
        super().__init__(settings, [SpaceSpec(NAMESPACE, shards)])
        self.session = self.open_session()

    def begin_store(self, word: str, first: int = 0) -> StoreTicket:
        """Slots for a chain's chunks from number `first` on."""
        ticket = self.open_store(self.session, 0, ChunkKey(NAMESPACE), keys_of(word), first)
        self.check()
        return ticket

    def end_store(self, ticket: StoreTicket) -> None:
        """Commit all that is open."""
        self.commit(ticket, sorted(ticket.copies))
        self.check()

    def store(self, *words: str) -> None:
        """Store chains and let all background work end."""
        for word in words:
            ticket = self.begin_store(word)
            if ticket.copies:
                self.end_store(ticket)
            self.work()

    def load(self, word: str, timeout: float = 10.0) -> LoadTicket:
        """Begin to load a chain."""
        ticket = self.open_load(self.session, 0, keys_of(word), timeout)
        self.check()
        return ticket

    def use(self, *words: str) -> None:
        """Load chains, let all work end, release."""
        for word in words:
            ticket = self.load(word)
            self.work()
            self.done(ticket)

    def done(self, ticket: LoadTicket) -> None:
        """Release a load."""
        self.release(ticket)
        self.check()

    def find(self, word: str) -> Match:
        """What a lookup of the chain finds."""
        return self.driver.core.lookup(self.spaces[0], keys_of(word))

    def work(self) -> None:
        """Carry out everything that waits."""
        self.driver.run()
        self.check()

    def end(self, operation: Operation, outcome: Outcome = Outcome.OK, parts_done: int = 0) -> None:
        """One operation ends so."""
        self.complete(operation.op, outcome, parts_done)
        self.check()

    def wait(self, seconds: float) -> float | None:
        """Time passes; returns when the core wants to be called next."""
        wanted = self.driver.advance(seconds)
        self.check_deadlines()
        self.check()
        return wanted

    def empty(self, *tiers: Tier) -> None:
        """Evict all that may go from these tiers."""
        for tier in tiers:
            self.driver.call(lambda core, now, tier=tier: core.evict(tier, 0, now))  # type: ignore[misc]
            self.work()

    def waiting(self, kind: type[O]) -> list[O]:
        """Operations of a kind that have not ended."""
        return [operation for operation in self.driver.pending.values() if isinstance(operation, kind)]

    def held(self, tier: Tier, word: str) -> str:
        """Those letters of a chain whose chunks lie in a tier, ready."""
        chunks = self.driver.core._space(self.spaces[0]).chunks
        found = ""
        for letter, key in zip(word, keys_of(word), strict=True):
            chunk = chunks.get(key)
            if chunk is None:
                continue
            if tier in (Tier.GPU, Tier.CPU):
                copy = chunk.memory(tier)
                found += letter if copy is not None and copy.state.value == "ready" else ""
            else:
                stored = chunk.stored(tier)
                found += letter if stored is not None and stored.state.value == "ready" else ""
        return found
