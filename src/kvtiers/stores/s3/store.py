"""The remote tier in an object store: one object a record, the sealed record as it lies on a disk, under the same name.

    <prefix>/<namespace hex>/<hh>/<hh>/<key hex>.<part>.kv

The service makes a PUT visible whole or not at all, and answers a GET with the object's size first, which tells whether the record is
raw (`records/sealing.py`): a raw body is then streamed straight into the caller's slot, an encoded one into a pooled buffer.

There is one client, so that its connections are all there are. Calls of one request run in it with the GIL released, and end by its
time-out. Those that have less time than that (a retry), and those of several requests (a batch of existence, a look before a removal),
run as coroutines under a time-out of their own, in a loop that lives as long as the call.

A record that failed its checks is removed if its ETag is still that of the one read. Between that look and the removal another
instance may write the record anew and lose it: a miss, nothing worse. Services of this kind have no removal on a condition that all
of them share.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from enum import StrEnum
from typing import Any, Final, TypeVar

import numpy as np

from kvtiers.model.errors import (
    CodecError,
    RecordCorrupt,
    RecordForeign,
    RecordInvalid,
    RecordMissing,
    StoreError,
    StoreUnavailable,
)
from kvtiers.model.parts import RecordRef
from kvtiers.records.buffers import AlignedBuffers
from kvtiers.records.codecs.base import Codec
from kvtiers.records.header import HEADER_BYTES, decode_header
from kvtiers.records.sealing import UnknownCodec, open_record, seal
from kvtiers.stores.base import RecordStore, SealedPart, StoredRecord, StoreUsage
from kvtiers.stores.call_time import CallTime
from kvtiers.stores.connections import Connections
from kvtiers.stores.disk.gate import Gate
from kvtiers.stores.disk.names import record_name
from kvtiers.stores.own_records import OwnRecords
from kvtiers.stores.s3.client import make_client
from kvtiers.stores.s3.failures import as_store_error, is_bare_missing, is_client_error
from kvtiers.stores.s3.settings import S3Settings

T = TypeVar("T")

_STREAM_BYTES: Final = 1 << 20
_NEARLY_ALL: Final = 0.9
_PROBE_NAME: Final = "kvtiers-probe"
"""An object that nobody writes: an answer that it is not there shows that address, credentials and bucket are right."""


class Event(StrEnum):
    """What is counted; names in `S3Store.stats()`."""

    BYTES_WRITTEN = "bytes_written"
    BYTES_READ = "bytes_read"
    CORRUPT = "corrupt"
    """Records removed because their checksum, size or padding was wrong."""
    FOREIGN = "foreign"
    """Objects under a record's name that hold another record (removed), or one of a codec that is not installed here (left alone)."""


class S3Store(RecordStore):
    """A `RecordStore` of objects in one bucket."""

    name = "s3"

    def __init__(self, settings: S3Settings, codec: Codec) -> None:
        """`codec`: for new records; what others encoded is read as well."""
        self.settings = settings
        self._codec = codec
        self._buffers = AlignedBuffers(settings.scratch_buffers, settings.scratch_bytes)
        self._connections = Connections(settings.connection_pool_size, settings.timeout_s)
        self._time = CallTime()
        self._most_at_once = max(1, settings.connection_pool_size // 2)
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(Event, 0)
        self._records = OwnRecords()
        self._bucket_was_seen = False
        self._obstore: Any = None
        self._client: Any = None
        self._gate = Gate(f"the store at {settings.place}", self._let_go)

    # --- contract -----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Raises StoreUnavailable if the client is not installed, or has no credentials to use."""
        self._client = make_client(self.settings)
        import obstore

        self._obstore = obstore
        self._gate.unlock()

    def within_time(self, seconds: float) -> AbstractContextManager[object]:
        return self._time.within(seconds)

    def write(self, part: SealedPart) -> int:
        name = record_name(part.ref)
        with self._call():
            try:
                with seal(**part._asdict(), codec=self._codec, buffers=self._buffers) as record:
                    with self._errors():
                        self._request("put", name, list(record.buffers), use_multipart=False)
                    stored = record.record_bytes
            except CodecError as error:
                raise RecordCorrupt(f"the record can't be sealed: {error}") from error
            except RecordMissing as error:  # a PUT never misses an object
                raise StoreUnavailable(
                    f"{self.settings.place}: there is no such bucket, or no object store"
                ) from error
        self._count(Event.BYTES_WRITTEN, stored)
        self._records.written(part.ref)
        return stored

    def read_into(self, ref: RecordRef, out: memoryview, nbytes: int) -> StoredRecord:
        name = record_name(ref)
        with self._call():
            with self._errors():
                found = self._request("get", name)
                meta = found.meta
            try:
                header = open_record(
                    ref,
                    nbytes,
                    meta["size"],
                    out,
                    lambda pages: self._fill(found, pages),
                    buffers=self._buffers,
                )
            except UnknownCodec:
                self._count(Event.FOREIGN)
                raise
            except RecordInvalid as error:
                self._count(Event.FOREIGN if isinstance(error, RecordForeign) else Event.CORRUPT)
                with suppress(StoreError):  # it stays, and fails its checks again
                    self._remove_if_still(ref, name, meta["e_tag"])
                raise
        self._count(Event.BYTES_READ, header.record_bytes)
        return StoredRecord.of(header, header.record_bytes)

    def exists(self, refs: Sequence[RecordRef]) -> list[bool]:
        """A HEAD each, so many at a time as connections are free, at most half of all.

        A HEAD does not tell a missing bucket from a missing object; so it is asked for once, where nothing has shown it yet.
        """
        names = [record_name(ref) for ref in refs]
        if not names:
            return []
        with (
            self._gate.entered(),
            self._time.within(self.settings.timeout_s) as until,
            self._connections.use_several(min(self._most_at_once, len(names)), until) as at_a_time,
        ):
            found = self._run(lambda: self._which_exist(names, at_a_time))
            if not any(found) and not self._bucket_was_seen:
                with self._errors():
                    self._ask_for_nothing()
            return found

    def delete(self, ref: RecordRef) -> bool:
        """A HEAD first, as a removal does not tell whether there was anything."""
        name = record_name(ref)

        async def look_and_remove() -> bool:
            if await self._head(name) is None:
                return False
            await self._obstore.delete_async(self._client, name)
            return True

        with self._call():
            removed = self._run(look_and_remove)
        self._records.removed(ref)
        return removed

    def discard(self, record: StoredRecord) -> bool:
        """Its header is read again: what was written anew has another write id. Likewise in two steps."""
        name = record_name(record.ref)

        async def look() -> tuple[bytes, str | None]:
            found = await self._obstore.get_async(self._client, name, options={"range": (0, HEADER_BYTES)})
            return bytes(await found.bytes_async()), found.meta["e_tag"]

        with self._call():
            try:
                value, e_tag = self._run(look)
                header = decode_header(value)
            except (RecordMissing, RecordInvalid):
                return False
            if header.write_id != record.write_id:
                return False
            return self._remove_if_still(record.ref, name, e_tag)

    def usage(self) -> StoreUsage:
        """No object store says what it holds. `records`: those this instance wrote, less those it removed."""
        return StoreUsage(0, len(self._records), None)

    def probe(self) -> None:
        """Ask for an object that is not there. Raises StoreUnavailable; that writing is allowed is not tried."""
        with self._call():
            try:
                with self._errors():
                    self._ask_for_nothing()
            except StoreUnavailable:
                raise
            except StoreError as error:
                raise StoreUnavailable(str(error)) from error

    def close(self) -> None:
        self._gate.shut()

    def stats(self) -> Mapping[str, int]:
        with self._lock:
            counts = {str(event): count for event, count in self._counts.items()}
        return {**counts, **self._connections.stats()}

    # --- inside -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _call(self) -> Iterator[None]:
        """A place among the connections, and one deadline for all that is done inside."""
        with (
            self._gate.entered(),
            self._time.within(self.settings.timeout_s) as until,
            self._connections.use(until),
        ):
            yield

    def _has_the_clients_time(self) -> bool:
        """Whether the client's time-out ends a request at about the end of this call's time."""
        return self._time.left() >= _NEARLY_ALL * self.settings.timeout_s

    def _request(self, what: str, *arguments: Any, **options: Any) -> Any:
        """One request, which ends with the call's time. Raises the client's errors."""
        if self._has_the_clients_time():
            return getattr(self._obstore, what)(self._client, *arguments, **options)
        request = getattr(self._obstore, f"{what}_async")
        return self._bounded(lambda: request(self._client, *arguments, **options))

    def _fill(self, found: Any, pages: Sequence[memoryview]) -> int:
        """Stream the object's body into the pages, in order; returns bytes got, fewer only where it ends."""
        room = [page for page in pages if len(page)]
        done = 0

        def take(chunk: Any) -> None:
            nonlocal done
            data = np.frombuffer(chunk, np.uint8)
            while len(data) and room:
                count = min(len(data), len(room[0]))
                np.copyto(np.frombuffer(room[0][:count], np.uint8), data[:count])  # without the GIL
                data, room[0] = data[count:], room[0][count:]
                done += count
                if not len(room[0]):
                    room.pop(0)
            done += len(data)  # more than it said it had: the count tells

        async def take_all() -> None:
            async for chunk in found.stream(min_chunk_size=_STREAM_BYTES):
                take(chunk)

        with self._errors():
            if self._has_the_clients_time():
                for chunk in found.stream(min_chunk_size=_STREAM_BYTES):
                    take(chunk)
            else:
                self._bounded(take_all)
        return done

    def _ask_for_nothing(self) -> None:
        try:
            self._request("get", _PROBE_NAME)
        except FileNotFoundError as error:
            failed = as_store_error(error, self.settings.place, self.settings.timeout_s)
            if isinstance(failed, StoreUnavailable):
                raise failed from None
            if self.settings.scheme == "s3" and is_bare_missing(error):
                raise StoreUnavailable(
                    f"what answers for {self.settings.place} is no object store; check storage.remote.s3.endpoint_url"
                ) from None
        self._bucket_was_seen = True

    async def _which_exist(self, names: Sequence[str], at_a_time: int) -> list[bool]:
        found = [False] * len(names)
        rest = itertools.count()  # of one loop: its tasks take turns only where they await

        async def look() -> None:
            while (index := next(rest)) < len(names):
                found[index] = await self._head(names[index]) is not None

        await asyncio.gather(*(look() for _ in range(min(at_a_time, len(names)))))
        return found

    async def _head(self, name: str) -> Any:
        """The object's metadata, or None."""
        try:
            return await self._obstore.head_async(self._client, name)
        except FileNotFoundError:
            return None

    def _remove_if_still(self, ref: RecordRef, name: str, e_tag: str | None) -> bool:
        async def look_and_remove() -> bool:
            meta = await self._head(name)
            if meta is None or meta["e_tag"] != e_tag:
                return False
            await self._obstore.delete_async(self._client, name)
            return True

        removed = self._run(look_and_remove)
        if removed:
            self._records.removed(ref)
        return removed

    def _run(self, work: Callable[[], Awaitable[T]]) -> T:
        """To its end or to the time-out, whatever comes first; what is under way then is cancelled."""
        with self._errors():
            return self._bounded(work)

    def _bounded(self, work: Callable[[], Awaitable[T]]) -> T:
        """As `_run`, with the client's errors as they are."""
        if not self._time.left():
            raise TimeoutError

        async def bounded() -> T:
            async with asyncio.timeout(self._time.left()):
                return await work()

        return asyncio.run(bounded())

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the client's errors into the store's."""
        try:
            yield
        except Exception as error:
            if not is_client_error(error):
                raise
            raise as_store_error(error, self.settings.place, self.settings.timeout_s) from None

    def _let_go(self) -> None:
        self._client = None

    def _count(self, event: Event, count: int = 1) -> None:
        with self._lock:
            self._counts[event] += count
