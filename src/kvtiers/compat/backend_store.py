"""A `RecordStore` over any LMCache-compatible `StorageBackend`, so that such a backend can be a tier of the cache.

A backend only keeps bytes, so nothing it does is believed: each value is a sealed record (header, checksums, padding, as on disk) and is
verified at every read. It can't be listed, so a new run finds its records by asking for them, never by looking.

Calls come from the store's I/O threads. The backend runs on one event loop of its own thread (its clients stay with one loop), each call
with a deadline, and no more at a time than it may have connections. Operations on one record follow each other. `usage` and the
records counted are this run's.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Any, Final, TypeVar

import numpy as np

from kvtiers.compat.backend import StorageBackend
from kvtiers.compat.key_locks import KeyLocks
from kvtiers.compat.loop_thread import LoopThread
from kvtiers.model.errors import (
    CacheClosed,
    CodecError,
    DeadlineExceeded,
    RecordCorrupt,
    RecordInvalid,
    RecordMissing,
    StoreError,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.parts import RecordRef
from kvtiers.records.buffers import AlignedBuffers
from kvtiers.records.codecs.base import Codec
from kvtiers.records.codecs.none import NoCodec
from kvtiers.records.header import HEADER_BYTES, decode_header
from kvtiers.records.sealing import UnknownCodec, open_record, seal
from kvtiers.stores.base import RecordStore, SealedPart, StoredRecord, StoreUsage
from kvtiers.stores.call_time import CallTime
from kvtiers.stores.connections import Connections

T = TypeVar("T")

_PROBE_KEY: Final = "kvtiers-probe"
_EXISTS_AT_ONCE: Final = 32
_SCRATCH_BYTES: Final = 256 << 20
_CLOSE_S: Final = 5.0
_MOST_KNOWN: Final = 1 << 20
"""Records counted in `usage`, of which others may have removed some; some 300 bytes each."""


class _Event(StrEnum):
    """Names in `BackendStore.stats()`."""

    BYTES_WRITTEN = "bytes_written"
    BYTES_READ = "bytes_read"
    CORRUPT = "corrupt"
    """Values that were not the record that was stored; they are removed."""
    NOT_REMOVED = "not_removed"
    """Of these, values whose removal failed: they will be found again."""


class BackendStore(RecordStore):
    """Keeps records in `backend`, which stays its owner's to close."""

    def __init__(
        self,
        backend: StorageBackend,
        *,
        name: str = "backend",
        codec: Codec | None = None,
        timeout_s: float = 10.0,
        connections: int = 32,
        scratch_buffers: int = 8,
    ) -> None:
        """`name`: label for metrics and messages. `codec`: for new records. `timeout_s`: for each call of the backend, of which
        `connections` may be under way at a time.
        """
        self.name = name
        self._backend = backend
        self._codec = codec or NoCodec()
        self._timeout_s = timeout_s
        self._time = CallTime()
        self._buffers = AlignedBuffers(scratch_buffers, _SCRATCH_BYTES)
        self._records = KeyLocks()
        self._connections = Connections(connections, timeout_s)
        self._loop = LoopThread(f"{name}-loop")
        self._lock = threading.Lock()
        self._known: dict[RecordRef, int] = {}
        self._known_bytes = 0
        self._counts = dict.fromkeys(_Event, 0)
        self._open = False

    # --- contract -----------------------------------------------------------------------------------------------------

    def within_time(self, seconds: float) -> AbstractContextManager[object]:
        return self._time.within(seconds)

    def open(self) -> None:
        self._open = True

    def write(self, part: SealedPart) -> int:
        key = key_of(part.ref)
        try:
            with seal(**part._asdict(), codec=self._codec, buffers=self._buffers) as record:
                data = b"".join(record.buffers)
        except CodecError as error:
            raise RecordCorrupt(f"the record can't be sealed: {error}") from error
        with self._records.held(part.ref):
            if not self._run(lambda: self._backend.write(key, data)):
                raise StoreTransient(f"{self.name} refused {key}")
            self._learn(part.ref, len(data))
        self._count(_Event.BYTES_WRITTEN, len(data))
        return len(data)

    def read_into(self, ref: RecordRef, out: memoryview, nbytes: int) -> StoredRecord:
        key = key_of(ref)
        with self._records.held(ref):
            data = self._run(lambda: self._backend.read(key))
            if data is None:
                self._forget(ref)
                raise RecordMissing(f"{self.name} has no {key}")
            try:
                record = self._opened(ref, out, nbytes, data)
            except UnknownCodec:
                raise  # others can read it
            except RecordInvalid:
                self._count(_Event.CORRUPT)
                self._forget(ref)
                self._give_up(key)
                raise
        self._count(_Event.BYTES_READ, len(data))
        return record

    def exists(self, refs: Sequence[RecordRef]) -> list[bool]:
        keys = [key_of(ref) for ref in refs]
        with (
            self._time.within(self._timeout_s) as until,
            self._connections.use_several(min(_EXISTS_AT_ONCE, len(keys)), until) as at_once,
        ):
            return self._call(lambda: self._which_exist(keys, at_once))

    def delete(self, ref: RecordRef) -> bool:
        key = key_of(ref)
        with self._records.held(ref):
            removed = bool(self._run(lambda: self._backend.delete(key)))
            self._forget(ref)
        return removed

    def discard(self, record: StoredRecord) -> bool:
        """What was written anew has another write id. The backend compares nothing, so somebody may come between: a miss."""
        ref, key = record.ref, key_of(record.ref)
        with self._records.held(ref):
            data = self._run(lambda: self._backend.read(key))
            try:
                if data is None or decode_header(bytes(data[:HEADER_BYTES])).write_id != record.write_id:
                    return False
            except RecordInvalid:
                return False
            removed = bool(self._run(lambda: self._backend.delete(key)))
            self._forget(ref)
        return removed

    def usage(self) -> StoreUsage:
        """What this run has stored; what an earlier one left, or another instance, is not known."""
        with self._lock:
            return StoreUsage(self._known_bytes, len(self._known), None)

    def probe(self) -> None:
        try:
            self._run(lambda: self._backend.exists(_PROBE_KEY))
        except StoreTransient as error:
            raise StoreUnavailable(str(error)) from error

    def close(self) -> None:
        self._open = False
        self._loop.close(_CLOSE_S)

    def stats(self) -> Mapping[str, int]:
        with self._lock:
            counts = {str(event): count for event, count in self._counts.items()}
        return {**counts, **self._connections.stats()}

    # --- inside -------------------------------------------------------------------------------------------------------

    def _run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        with self._time.within(self._timeout_s) as until, self._connections.use(until):
            return self._call(make)

    def _call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Call the backend, in the store contract's errors."""
        if not self._open:
            raise StoreUnavailable(f"the store over {self.name} is closed, or not open yet")
        try:
            return self._loop.run(make, self._time.left())
        except StoreError:
            raise
        except (ConnectionError, CacheClosed) as error:
            raise StoreUnavailable(
                f"{self.name} can't be reached: {type(error).__name__}: {error}"
            ) from error
        except DeadlineExceeded as error:
            raise StoreTransient(str(error)) from error
        except Exception as error:  # what other people's backends raise; the guard counts it
            raise StoreTransient(f"{self.name}: {type(error).__name__}: {error}") from error

    async def _which_exist(self, keys: list[str], at_once: int) -> list[bool]:
        found: list[bool] = []
        for start in range(0, len(keys), at_once):
            batch = keys[start : start + at_once]
            found += map(bool, await asyncio.gather(*(self._backend.exists(key) for key in batch)))
        return found

    def _opened(self, ref: RecordRef, out: memoryview, nbytes: int, data: object) -> StoredRecord:
        if not isinstance(data, bytes | bytearray | memoryview):
            raise RecordCorrupt(f"{self.name} gave a {type(data).__name__} instead of bytes")
        stored = data if isinstance(data, bytes) else bytes(data)

        def read(pages: Sequence[memoryview]) -> int:
            at = 0
            for page in pages:
                piece = np.frombuffer(stored, np.uint8)[at : at + len(page)]
                np.copyto(np.frombuffer(page, np.uint8)[: len(piece)], piece)
                at += len(piece)
            return at

        if len(stored) < HEADER_BYTES + PAGE_BYTES:
            raise RecordCorrupt(f"a record of {len(stored)} bytes has no room for a header and a page")
        header = open_record(ref, nbytes, len(stored), out, read, buffers=self._buffers)
        return StoredRecord.of(header, len(stored))

    def _give_up(self, key: str) -> None:
        """Make sure that this is not read again."""
        try:
            self._run(lambda: self._backend.delete(key))
        except StoreError:
            self._count(_Event.NOT_REMOVED)

    def _learn(self, ref: RecordRef, stored_bytes: int) -> None:
        with self._lock:
            self._known_bytes += stored_bytes - self._known.get(ref, 0)
            self._known[ref] = stored_bytes
            if len(self._known) > _MOST_KNOWN:
                self._known_bytes -= self._known.pop(next(iter(self._known)))

    def _forget(self, ref: RecordRef) -> None:
        with self._lock:
            self._known_bytes -= self._known.pop(ref, 0)

    def _count(self, event: _Event, count: int = 1) -> None:
        with self._lock:
            self._counts[event] += count


def key_of(ref: RecordRef) -> str:
    """The backend's key of a record; also a sound file name."""
    return f"kv1-{ref.namespace.hex()}-{ref.key.hex()}-{ref.part}"
