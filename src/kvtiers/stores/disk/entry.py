"""An index entry: all that is known of a record without opening its file, packed into 144 bytes. Pure functions.

The packed form is what the log holds *and* what the table keeps in memory: loading a log is slicing it, and a million
entries are two million `bytes`, which the garbage collector never walks. Little-endian:

    offset  size
         0    32  namespace digest
        32    32  chunk key
        64     4  part index                               bytes 0 to 68 are the entry's identity
        68     4  number of parts of the chunk
        72    32  parent's key
       104     4  token count
       108     4  kind
       112     8  token start
       120     8  payload bytes (of a NOTE: bytes that are not records)
       128     4  size of the file in pages of 4 KiB
       132     4  allocated size in blocks of 512 bytes
       136     8  xxh3-64 of bytes 0 to 136, seeded with the version of this format
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

import xxhash

from kvtiers.model.keys import ChunkKey
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.parts import RecordRef
from kvtiers.records.header import RecordHeader
from kvtiers.stores.base import StoredRecord

ENTRY_BYTES: Final = 144
IDENTITY_BYTES: Final = 68
BLOCK_BYTES: Final = 512
"""The unit of `st_blocks`."""

VERSION_SEED: Final = 1
"""Seed of the entry checksums: entries of another version of this format don't pass."""
_BODY: Final = struct.Struct("<32s32sII32sIIQQII")
_IDENTITY: Final = struct.Struct("<32s32sI")
_CHECKSUM: Final = struct.Struct("<Q")
_FILE_PAGES: Final = struct.Struct("<I")
_FILE_PAGES_AT: Final = 128
_BLOCKS_AT: Final = 132
_BODY_BYTES: Final = _BODY.size


class Kind(IntEnum):
    """What an entry in the log says."""

    PUT = 1
    """The record is there, or is about to be."""
    TOMBSTONE = 2
    """The record is gone, or is about to be."""
    NOTE = 3
    """How many bytes below the path are not records, as last counted."""


def identity_of(ref: RecordRef) -> bytes:
    """The table's key for a record."""
    return _IDENTITY.pack(ref.namespace, ref.key, ref.part)


def ref_of(identity: bytes) -> RecordRef:
    """The inverse of `identity_of`; takes a whole entry too."""
    namespace, key, part = _IDENTITY.unpack_from(identity)
    return RecordRef(namespace, ChunkKey(key), part)


def pack_put(header: RecordHeader, allocated_bytes: int) -> bytes:
    """The entry of a record with this header that takes `allocated_bytes` on disk."""
    return _sealed(
        _BODY.pack(
            header.namespace,
            header.key,
            header.part,
            header.num_parts,
            header.parent,
            header.token_count,
            Kind.PUT,
            header.token_start,
            header.payload_bytes,
            header.record_bytes // PAGE_BYTES,
            allocated_bytes // BLOCK_BYTES,
        )
    )


def pack_tombstone(identity: bytes) -> bytes:
    """The entry that takes a record back."""
    namespace, key, part = _IDENTITY.unpack(identity)
    return _sealed(_BODY.pack(namespace, key, part, 0, b"", 0, Kind.TOMBSTONE, 0, 0, 0, 0))


def pack_note(other_bytes: int) -> bytes:
    """The entry that remembers how much of the directory is not records."""
    return _sealed(_BODY.pack(b"", b"", 0, 0, b"", 0, Kind.NOTE, 0, other_bytes, 0, 0))


def with_allocated(entry: bytes, allocated_bytes: int) -> bytes:
    """The same entry with another allocated size."""
    return _sealed(entry[:_BLOCKS_AT] + _FILE_PAGES.pack(allocated_bytes // BLOCK_BYTES))


def file_bytes(entry: bytes) -> int:
    """Size the file must have."""
    (pages,) = _FILE_PAGES.unpack_from(entry, _FILE_PAGES_AT)
    return int(pages) * PAGE_BYTES


def allocated_bytes(entry: bytes) -> int:
    """What the file takes of the disk."""
    (blocks,) = _FILE_PAGES.unpack_from(entry, _BLOCKS_AT)
    return int(blocks) * BLOCK_BYTES


def stored_record(entry: bytes) -> StoredRecord:
    """The entry in the store contract's form."""
    namespace, key, part, num_parts, parent, count, _, start, payload, _, blocks = _BODY.unpack_from(entry)
    # half the time of their own constructors; a start makes a million of them
    ref = tuple.__new__(RecordRef, (namespace, key, part))
    return tuple.__new__(
        StoredRecord, (ref, parent, num_parts, start, count, payload, blocks * BLOCK_BYTES, b"", b"")
    )


def note_value(entry: bytes) -> int:
    """The bytes a NOTE remembers."""
    return int(_BODY.unpack_from(entry)[8])


def _sealed(body: bytes) -> bytes:
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body, VERSION_SEED))
