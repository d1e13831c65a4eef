"""The first page of a record: what it is, of what, and how to check it. Pure functions, any thread.

4 KiB, little-endian, so that the payload behind it starts on a page (O_DIRECT) and a directory scan reads one page a record:

    offset  size
         0     8  magic "KVTIERS" and a zero
         8     4  format version
        12     4  zero
        16    16  xxh3-128 of these 4096 bytes with this field zero
        32    32  namespace digest
        64    32  chunk key
        96    32  parent's key
       128     4  part index
       132     4  number of parts of the chunk
       136     4  bytes per KV element
       140     4  token count
       144     8  token start
       152     8  payload bytes (raw)
       160     8  stored bytes (encoded, before padding)
       168    16  xxh3-128 of the payload as a reader gets it
       184    16  xxh3-128 of the stored bytes; for a raw record the same again
       200    16  codec name, ASCII, padded with zeros
       216     1  length of the codec's parameters
       217    64  the parameters, padded with zeros
       281    16  write id: equal in all parts of one write of a chunk; zeros if the writer has none
       297  3799  zero

Magic, version and header checksum keep their places in every later format, so a damaged version field is told from a record
of another version. No length is believed before the checksum is right, and each is bounded after.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from kvtiers.model.errors import InvariantBroken, RecordCorrupt, RecordForeign
from kvtiers.model.keys import KEY_BYTES, ChunkKey
from kvtiers.model.layout import PAGE_BYTES, round_to_page
from kvtiers.model.namespace import FORMAT_VERSION
from kvtiers.model.parts import RecordRef
from kvtiers.records.checksum import CHECKSUM_BYTES, checksum
from kvtiers.records.codecs.base import MAX_NAME_BYTES, MAX_PARAMETER_BYTES

HEADER_BYTES: Final = PAGE_BYTES
MAGIC: Final = b"KVTIERS\0"
RAW_CODEC: Final = "none"
"""Name of the codec whose stored bytes are the payload."""

MAX_PARTS: Final = 1 << 16
MAX_PAYLOAD_BYTES: Final = 1 << 40
"""No part of a chunk is near this (1 TiB); a length above it is nonsense, whatever its checksum says."""

ITEMSIZES: Final = (1, 2, 4, 8)
"""Bytes of an element."""
MAX_TOKENS: Final = (1 << 32) - 1
"""Of a chunk."""
_FIELDS: Final = struct.Struct("<8sI4x16s32s32s32sIIIIQQQ16s16s16sB64s16s")
_RESERVED: Final = bytes(HEADER_BYTES - _FIELDS.size)
_CHECKSUM_AT: Final = slice(16, 32)
_NO_CHECKSUM: Final = bytes(CHECKSUM_BYTES)
NO_WRITE_ID: Final = bytes(16)


class RecordHeader(NamedTuple):
    """What the header page says. `encode_header` adds magic and header checksum."""

    namespace: bytes
    key: ChunkKey
    parent: ChunkKey
    part: int
    num_parts: int
    token_start: int
    token_count: int
    itemsize: int
    """Bytes per KV element: 1, 2, 4 or 8."""
    codec: str
    codec_parameters: bytes
    payload_bytes: int
    """Raw payload."""
    stored_bytes: int
    """Encoded payload, before padding."""
    checksum: bytes
    """xxh3-128 of the payload as a reader gets it."""
    stored_checksum: bytes
    """xxh3-128 of the stored bytes: a damaged stream is found before a decoder sees it."""
    write_id: bytes = NO_WRITE_ID
    """16 bytes: parts of two writes of a chunk never make a whole."""
    format_version: int = FORMAT_VERSION

    @property
    def ref(self) -> RecordRef:
        """The record's name in any store."""
        return RecordRef(self.namespace, self.key, self.part)

    @property
    def body_bytes(self) -> int:
        """Stored bytes with their padding."""
        return round_to_page(self.stored_bytes)

    @property
    def record_bytes(self) -> int:
        """Header, stored bytes and padding: the exact size of a sound file."""
        return HEADER_BYTES + self.body_bytes


def encode_header(header: RecordHeader) -> bytes:
    """The 4096 bytes. Raises InvariantBroken for a header that `decode_header` would refuse."""
    problem = _nonsense_in(header)
    if problem:
        raise InvariantBroken(f"a record header must not be written: {problem}")
    name = header.codec.encode("ascii")
    page = bytearray(HEADER_BYTES)
    _FIELDS.pack_into(
        page,
        0,
        MAGIC,
        header.format_version,
        _NO_CHECKSUM,
        header.namespace,
        header.key,
        header.parent,
        header.part,
        header.num_parts,
        header.itemsize,
        header.token_count,
        header.token_start,
        header.payload_bytes,
        header.stored_bytes,
        header.checksum,
        header.stored_checksum,
        name,
        len(header.codec_parameters),
        header.codec_parameters,
        header.write_id,
    )
    page[_CHECKSUM_AT] = checksum(page)
    return bytes(page)


def decode_header(buffer: memoryview | bytes | bytearray) -> RecordHeader:
    """Read the first 4096 bytes of a record.

    Raises RecordForeign for what is not a kvtiers record of this format version, RecordCorrupt for a damaged one.
    """
    if len(buffer) < HEADER_BYTES:
        raise RecordCorrupt(f"the record ends after {len(buffer)} of its header's {HEADER_BYTES} bytes")
    page = bytearray(buffer[:HEADER_BYTES])
    (
        magic,
        version,
        stated,
        namespace,
        key,
        parent,
        part,
        num_parts,
        itemsize,
        token_count,
        token_start,
        payload_bytes,
        stored_bytes,
        payload_checksum,
        stored_checksum,
        name,
        parameter_bytes,
        parameters,
        write_id,
    ) = _FIELDS.unpack_from(page)
    if magic != MAGIC:
        if not any(page):
            raise RecordCorrupt("the header page is all zeros: its write was cut short")
        raise RecordForeign(f"not a kvtiers record: it starts with {magic!r}, not {MAGIC!r}")
    page[_CHECKSUM_AT] = _NO_CHECKSUM
    if checksum(page) != stated:
        raise RecordCorrupt("the header's checksum is wrong")
    if version != FORMAT_VERSION:
        raise RecordForeign(
            f"a record of format version {version}; this kvtiers reads version {FORMAT_VERSION}"
        )
    if parameter_bytes > MAX_PARAMETER_BYTES or any(parameters[parameter_bytes:]):
        raise RecordCorrupt(f"the header makes no sense: {parameter_bytes} bytes of codec parameters")
    if page[12:16] != b"\0\0\0\0" or page[_FIELDS.size :] != _RESERVED:
        raise RecordCorrupt("the header makes no sense: reserved bytes are not zero")
    header = RecordHeader(
        namespace=namespace,
        key=ChunkKey(key),
        parent=ChunkKey(parent),
        part=part,
        num_parts=num_parts,
        token_start=token_start,
        token_count=token_count,
        itemsize=itemsize,
        codec=name.rstrip(b"\0").decode("ascii", errors="replace"),
        codec_parameters=parameters[:parameter_bytes],
        payload_bytes=payload_bytes,
        stored_bytes=stored_bytes,
        checksum=payload_checksum,
        stored_checksum=stored_checksum,
        write_id=write_id,
        format_version=version,
    )
    problem = _nonsense_in(header)
    if problem:
        raise RecordCorrupt(f"the header makes no sense: {problem}")
    return header


def check_header(header: RecordHeader, ref: RecordRef, nbytes: int) -> None:
    """Raises RecordForeign unless the record is `ref`'s and its raw payload has `nbytes` bytes."""
    if header.namespace != ref.namespace:
        raise RecordForeign(
            f"the record is of namespace {header.namespace.hex()[:16]}…, not {ref.namespace.hex()[:16]}…"
        )
    if header.key != ref.key:
        raise RecordForeign(f"the record is of chunk {header.key.hex()[:16]}…, not {ref.key.hex()[:16]}…")
    if header.part != ref.part:
        raise RecordForeign(f"the record is part {header.part} of its chunk, not {ref.part}")
    if header.payload_bytes != nbytes:
        raise RecordForeign(f"the record's payload has {header.payload_bytes} bytes, {nbytes} were expected")


def _nonsense_in(header: RecordHeader) -> str:
    """What can't be true of a header, or ""."""
    if not (len(header.namespace) == len(header.key) == len(header.parent) == KEY_BYTES):
        return f"namespace, key and parent must have {KEY_BYTES} bytes each"
    if not (len(header.checksum) == len(header.stored_checksum) == CHECKSUM_BYTES):
        return f"a checksum must have {CHECKSUM_BYTES} bytes"
    if len(header.write_id) != len(NO_WRITE_ID):
        return f"a write id must have {len(NO_WRITE_ID)} bytes"
    if not 0 <= header.part < header.num_parts <= MAX_PARTS:
        return f"part {header.part} of {header.num_parts}"
    if header.itemsize not in ITEMSIZES:
        return f"{header.itemsize} bytes per element"
    if not 1 <= header.token_count <= MAX_TOKENS or not 0 <= header.token_start < 1 << 63:
        return f"{header.token_count} tokens from {header.token_start} on"
    if not 1 <= header.payload_bytes <= MAX_PAYLOAD_BYTES:
        return f"a payload of {header.payload_bytes} bytes"
    name_is_plain = header.codec.isascii() and header.codec.isprintable()
    if not name_is_plain or not 1 <= len(header.codec) <= MAX_NAME_BYTES:
        return f"codec name {header.codec!r}"
    if len(header.codec_parameters) > MAX_PARAMETER_BYTES:
        return f"{len(header.codec_parameters)} bytes of codec parameters"
    if header.codec == RAW_CODEC:
        if header.stored_bytes != header.payload_bytes or header.codec_parameters:
            return f"{header.stored_bytes} stored bytes for a raw payload of {header.payload_bytes}"
        if header.stored_checksum != header.checksum:
            return "two checksums of one raw payload"
    elif header.stored_bytes < 1 or header.body_bytes >= round_to_page(header.payload_bytes):
        return f"{header.stored_bytes} encoded bytes for a payload of {header.payload_bytes}: no page saved"
    return ""
