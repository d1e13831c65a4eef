"""The contract between the cache and whatever keeps its records.

All calls block and run on I/O threads of the store's own pool, never on an engine's thread; several run at once. A store
keeps bytes and reports real sizes; *what* is kept and for how long is decided by the core alone. Deadlines, retries and
the breaker are `stores/guard.py`'s; a store raises at the first failure, with the class that tells what kind it is:

    RecordMissing      a miss                              never retried
    RecordInvalid      a miss; the store has already removed the record, or made sure that it is never served
    StoreFull          no space for a write; reads go on   never retried
    StoreTransient     may pass                            retried by the guard
    StoreUnavailable   can't be reached                    counts for the breaker

A new store is one file with a subclass, given to the node in a `StorePlan`, with `kvtiers.testing`'s kit green.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import RecordRef
from kvtiers.records.header import NO_WRITE_ID, RecordHeader


class SealedPart(NamedTuple):
    """A part on its way into a store. The payload stays leased until `write` has returned."""

    ref: RecordRef
    parent: ChunkKey
    num_parts: int
    """How many parts the chunk has in all."""
    token_start: int
    token_count: int
    itemsize: int
    """Bytes per KV element: byte-plane codecs need it."""
    checksum: bytes
    """xxh3-128 of the payload, 16 bytes, made at commit; a store never makes it anew."""
    payload: memoryview
    """The raw KV bytes, page-aligned, format "B"."""
    write_id: bytes = NO_WRITE_ID
    """Equal in all parts of one write of a chunk, so that a reader can tell parts of two writes apart."""


class StoredRecord(NamedTuple):
    """A record as a store knows it without having read its payload."""

    ref: RecordRef
    parent: ChunkKey
    num_parts: int
    token_start: int
    token_count: int
    payload_bytes: int
    """Raw payload bytes."""
    stored_bytes: int
    """What it takes of the store's capacity (disk: allocated blocks)."""
    checksum: bytes = b""
    """Payload checksum from the header; always set by `read_into`, empty where only a log or a listing was read."""
    write_id: bytes = b""
    """As for the checksum."""

    @classmethod
    def of(cls, header: RecordHeader, stored_bytes: int) -> StoredRecord:
        """All of it from a header that was checked."""
        return cls(
            ref=header.ref,
            parent=header.parent,
            num_parts=header.num_parts,
            token_start=header.token_start,
            token_count=header.token_count,
            payload_bytes=header.payload_bytes,
            stored_bytes=stored_bytes,
            checksum=header.checksum,
            write_id=header.write_id,
        )


class StoreUsage(NamedTuple):
    """What a store holds and has left, in bytes; None where it can't tell."""

    used_bytes: int
    """Everything that counts against its capacity, also what others left there."""
    records: int
    free_bytes: int | None


class DamagedRecord(RecordRef):
    """One that was known and is there no more, because what lay there failed its checks."""

    __slots__ = ()


class RecordStore(ABC):
    """Keeps sealed parts under their `RecordRef`."""

    name: str
    """Label for metrics and messages: "disk", "redis", …"""

    @abstractmethod
    def open(self) -> None:
        """Make ready. Raises DirectoryInUse, StoreUnavailable. A store across a network does not wait for its engine here."""

    @abstractmethod
    def write(self, part: SealedPart) -> int:
        """Store atomically: after a crash the record is there whole or not at all. Returns stored bytes.

        An equal ref is replaced. Raises StoreFull, StoreTransient, StoreUnavailable.
        """

    @abstractmethod
    def read_into(self, ref: RecordRef, out: memoryview, nbytes: int) -> StoredRecord:
        """Read the record of `ref` into `out[:nbytes]`, verified; `out` is a whole slot (page-aligned, a multiple of 4 KiB).

        Anything may stand in `out` after an error. Raises RecordMissing, RecordInvalid, StoreTransient, StoreUnavailable.
        """

    @abstractmethod
    def exists(self, refs: Sequence[RecordRef]) -> list[bool]:
        """Which of these are there, in one batch."""

    @abstractmethod
    def delete(self, ref: RecordRef) -> bool:
        """Remove; False if it was not there."""

    def discard(self, record: StoredRecord) -> bool:
        """Remove a record that `read_into` gave, unless it has been written anew since; False if it is not there any more.

        Where nobody else writes, that is a removal.
        """
        return self.delete(record.ref)

    def restarts(self) -> int:
        """How often the engine of a shared store was found to have begun anew: what it was known to hold may be gone. Memory only."""
        return 0

    @abstractmethod
    def usage(self) -> StoreUsage:
        """Bytes and records held, as last known; never walks the store."""

    @abstractmethod
    def probe(self) -> None:
        """A cheap round trip that raises StoreUnavailable if the store does not work (breaker, health check)."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and connections; idempotent."""

    def within_time(self, seconds: float) -> AbstractContextManager[object]:
        """What this thread asks inside ends in so many seconds, or earlier by the store's own time-out; for stores whose client can be told."""
        return nullcontext()

    def use_memory(self, memory: memoryview) -> None:
        """All of the arena, before the first call: payloads and slots lie in it. For clients that register memory."""
        return

    def scan(self) -> Iterator[StoredRecord]:
        """Every record there is, by looking (slow). A store that can't be listed yields none."""
        return iter(())

    def recover(self) -> Iterator[StoredRecord]:
        """What an earlier run left, fast, least recently used first. A shared store yields none: it is asked by `exists`."""
        return iter(())

    def reconcile(self) -> Iterator[StoredRecord | RecordRef]:
        """Compare memory with what really lies there, in the background after `recover`.

        Yields a StoredRecord for each found and not known (or known with other sizes), a RecordRef for each known and not found, a
        DamagedRecord where something was found that is none.
        """
        return iter(())

    def reconcile_steps(self) -> Iterator[list[StoredRecord | RecordRef]]:
        """`reconcile` in steps of bounded work, most often without news, so that the caller may pause or stop between them.

        What a step gives is true at that moment: pass it on at once.
        """
        for news in self.reconcile():
            yield [news]

    def remember(self, refs_by_use: Iterable[RecordRef]) -> None:
        """At a clean close: the order of use, least recent first, for the next `recover`."""
        return

    def check(self) -> Iterator[str]:
        """Each inconsistency between what the store believes and what is there, as a sentence; slow, for `check_integrity`."""
        return iter(())

    def stats(self) -> Mapping[str, int]:
        """Counters since `open`, by name; memory only."""
        return {}
