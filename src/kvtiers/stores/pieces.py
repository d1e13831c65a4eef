"""Records in a key-value engine: pieces first, the manifest last, so that a record is there whole or not at all.

    kv1:<namespace>:{<key>}:<part>                the manifest (`manifest.py`)
    kv1:<namespace>:{<key>}:<part>:<id>:<n>       piece n of the writer with that id

The braces keep what belongs to a chunk on one shard of a cluster, so that a shard that goes takes whole chunks with it.

Nothing is locked, as nobody could hold a lock over machines that stop:

- A writer puts pieces under an id of its own and then swaps the manifest in. Of two writers the last one wins; the pieces of the
  other one are removed by whoever replaced its manifest. A writer that dies leaves pieces that nobody can find: the engine's own
  eviction (or its TTL) takes them.
- A reader verifies every byte. A piece that is missing (the engine evicts as it likes) or wrong ends the record: the reader removes
  the manifest that it has read, if it is still that one, and nothing else.

Raw payloads go from and into the arena's slots themselves; what is encoded goes through pooled buffers.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Final

from kvtiers.model.errors import CodecError, RecordCorrupt, RecordInvalid, RecordMissing, StoreError
from kvtiers.model.parts import RecordRef
from kvtiers.records.buffers import AlignedBuffers
from kvtiers.records.codecs.base import Codec
from kvtiers.records.codecs.none import NoCodec
from kvtiers.records.header import HEADER_BYTES, RAW_CODEC
from kvtiers.records.sealing import UnknownCodec, open_payload, seal
from kvtiers.stores.base import RecordStore, SealedPart, StoredRecord, StoreUsage
from kvtiers.stores.key_values import KeyValues, Value
from kvtiers.stores.manifest import (
    MANIFEST_BYTES,
    PIECE_ID_BYTES,
    Manifest,
    decode_manifest,
    equal_pieces,
)

_SCRATCH_BYTES: Final = 512 << 20
_EXISTS_AT_ONCE: Final = 1024


class Event(StrEnum):
    """What is counted; names in `PiecedStore.stats()`."""

    BYTES_WRITTEN = "bytes_written"
    BYTES_READ = "bytes_read"
    CORRUPT = "corrupt"
    """Records that were wrong; their manifest was removed."""
    INCOMPLETE = "incomplete"
    """Records of which a piece was gone; likewise."""
    REPLACED = "replaced"
    """Records that were there already, written by somebody at the same time or before."""


class PiecedStore(RecordStore):
    """A `RecordStore` over any `KeyValues`."""

    def __init__(
        self,
        values: KeyValues,
        *,
        codec: Codec | None = None,
        scratch_buffers: int = 16,
        scratch_bytes: int = _SCRATCH_BYTES,
    ) -> None:
        """`codec`: for new records; what others encoded is read as well."""
        self.name = values.label
        self._values = values
        self._codec = codec or NoCodec()
        self._buffers = AlignedBuffers(scratch_buffers, scratch_bytes)
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(Event, 0)
        self._records = 0

    # --- contract -----------------------------------------------------------------------------------------------------

    def use_memory(self, memory: memoryview) -> None:
        self._values.use_memory(memory)

    def within_time(self, seconds: float) -> AbstractContextManager[object]:
        return self._values.within_time(seconds)

    def open(self) -> None:
        self._values.open()

    def write(self, part: SealedPart) -> int:
        try:
            with seal(**part._asdict(), codec=self._codec, buffers=self._buffers) as record:
                header = record.header
                body = part.payload
                if header.codec != RAW_CODEC:
                    body = record.buffers[0][HEADER_BYTES : HEADER_BYTES + header.stored_bytes]
                piece_bytes = equal_pieces(header.stored_bytes, self._values.piece_bytes)
                manifest = Manifest(header, secrets.token_bytes(PIECE_ID_BYTES), piece_bytes)
                with self._values.within_time():
                    self._put(manifest, body)
        except CodecError as error:
            raise RecordCorrupt(f"the record can't be sealed: {error}") from error
        stored = header.stored_bytes + MANIFEST_BYTES
        self._count(Event.BYTES_WRITTEN, stored)
        return stored

    def read_into(self, ref: RecordRef, out: memoryview, nbytes: int) -> StoredRecord:
        with self._values.within_time():
            return self._read_into(ref, out, nbytes)

    def _read_into(self, ref: RecordRef, out: memoryview, nbytes: int) -> StoredRecord:
        name = _name(ref)
        value = self._values.get(name)
        try:
            manifest = decode_manifest(value, ref, nbytes)
            self._fill(manifest, out)
        except RecordMissing:
            self._count(Event.INCOMPLETE)
            self._give_up(name, value)
            raise
        except UnknownCodec:
            raise  # others can read it
        except RecordInvalid:
            self._count(Event.CORRUPT)
            self._give_up(name, value)
            raise
        stored = manifest.header.stored_bytes + MANIFEST_BYTES
        self._count(Event.BYTES_READ, stored)
        return StoredRecord.of(manifest.header, stored)

    def exists(self, refs: Sequence[RecordRef]) -> list[bool]:
        found: list[bool] = []
        with self._values.within_time():
            for start in range(0, len(refs), _EXISTS_AT_ONCE):
                found += self._values.exists([_name(ref) for ref in refs[start : start + _EXISTS_AT_ONCE]])
        return found

    def delete(self, ref: RecordRef) -> bool:
        with self._values.within_time():
            return self._delete(ref, lambda _: True)

    def discard(self, record: StoredRecord) -> bool:
        """In one step with the comparison, where the engine can."""
        with self._values.within_time():
            return self._delete(record.ref, lambda value: _write_id_of(value, record.ref) == record.write_id)

    def _delete(self, ref: RecordRef, wanted: Callable[[bytes], bool]) -> bool:
        name = _name(ref)
        try:
            value = self._values.get(name)
        except RecordMissing:
            return False
        if not wanted(value):
            return False
        removed = self._values.remove_if(name, value)
        if removed:
            self._change_records(-1)
            self._remove_pieces(value, ref)
        return removed

    def restarts(self) -> int:
        return self._values.restarts()

    def usage(self) -> StoreUsage:
        """`used_bytes`: of everybody, as the engine said at the last probe. `records`: those this instance wrote and still believes in."""
        with self._lock:
            return StoreUsage(self._values.used_bytes(), max(0, self._records), None)

    def probe(self) -> None:
        self._values.probe()

    def close(self) -> None:
        self._values.close()

    def stats(self) -> Mapping[str, int]:
        with self._lock:
            counts = {str(event): count for event, count in self._counts.items()}
        return {**counts, **self._values.stats()}

    # --- inside -------------------------------------------------------------------------------------------------------

    def _put(self, manifest: Manifest, body: memoryview) -> None:
        ref = manifest.header.ref
        pieces = _pieces(manifest, body)
        try:
            self._values.put(pieces)
            replaced = self._values.swap(_name(ref), manifest.encode())
        except StoreError:
            self._clean_up(
                [piece.name for piece in pieces]
            )  # if the manifest did arrive, it is of a record without pieces
            raise
        if replaced is None:
            self._change_records(1)
            return
        self._count(Event.REPLACED)
        self._remove_pieces(replaced, ref)

    def _fill(self, manifest: Manifest, out: memoryview) -> None:
        """Read, decode and verify the record's body into `out`."""
        header = manifest.header
        if header.codec == RAW_CODEC:
            stored = out[: header.body_bytes]
            self._read_body(manifest, stored)
            open_payload(header, stored, out, buffers=self._buffers)
            return
        with self._buffers.take(header.body_bytes) as scratch:
            stored = scratch[: header.body_bytes]
            self._read_body(manifest, stored)
            open_payload(header, stored, out, buffers=self._buffers)

    def _read_body(self, manifest: Manifest, stored: memoryview) -> None:
        end = manifest.header.stored_bytes
        self._values.get_into(_pieces(manifest, stored[:end]))
        stored[end:] = bytes(len(stored) - end)

    def _give_up(self, name: str, value: bytes) -> None:
        """Make sure that this is not served again. Its pieces stay: somebody may have written the record anew meanwhile."""
        try:
            if self._values.remove_if(name, value):
                self._change_records(-1)
        except StoreError:
            pass  # it will be found broken again: nothing unverified is ever served

    def _remove_pieces(self, value: bytes, ref: RecordRef) -> None:
        """Of a manifest that nobody can read any more."""
        try:
            manifest = decode_manifest(value, ref)
        except RecordInvalid:
            return
        self._clean_up([_piece_name(manifest, number) for number in range(manifest.num_pieces)])

    def _clean_up(self, names: Sequence[str]) -> None:
        try:
            self._values.remove(names)
        except StoreError:
            pass  # nobody can find them; the engine's eviction takes them

    def _count(self, event: Event, count: int = 1) -> None:
        with self._lock:
            self._counts[event] += count

    def _change_records(self, by: int) -> None:
        with self._lock:
            self._records += by


def _name(ref: RecordRef) -> str:
    return f"kv1:{ref.namespace.hex()}:{{{ref.key.hex()}}}:{ref.part}"


def _piece_name(manifest: Manifest, number: int) -> str:
    return f"{_name(manifest.header.ref)}:{manifest.piece_id.hex()}:{number}"


def _pieces(manifest: Manifest, body: memoryview) -> list[Value]:
    return [
        Value(_piece_name(manifest, number), body[start:end])
        for number, (start, end) in enumerate(manifest.spans())
    ]


def _write_id_of(value: bytes, ref: RecordRef) -> bytes | None:
    """Of a manifest; None if it makes no sense."""
    try:
        return decode_manifest(value, ref).header.write_id
    except RecordInvalid:
        return None
