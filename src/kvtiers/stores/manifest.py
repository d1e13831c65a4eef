"""The small value that makes a record of pieces: what the record is, where its pieces are, and how to check it. Pure functions.

    offset  size
         0   512  the record's header (`records/header.py`) without the zeros at its end
       512     8  piece id: the writer's own, so that the pieces of two writers never meet
       520     8  bytes of each piece but the last
       528     4  number of pieces
       532     4  zero
       536    16  xxh3-128 of what stands before

It is written when all pieces are there. Whoever finds it broken, or a piece of it missing, removes it, and only it.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from kvtiers.model.errors import RecordCorrupt
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.parts import RecordRef
from kvtiers.records.checksum import checksum
from kvtiers.records.header import HEADER_BYTES, RecordHeader, check_header, decode_header, encode_header

HEADER_PREFIX: Final = 512
_TAIL: Final = struct.Struct("<8sQI4x16s")
MANIFEST_BYTES: Final = HEADER_PREFIX + _TAIL.size
_REST_OF_HEADER: Final = bytes(HEADER_BYTES - HEADER_PREFIX)
PIECE_ID_BYTES: Final = 8


class Manifest(NamedTuple):
    """What one write of a record has left."""

    header: RecordHeader
    piece_id: bytes
    """8 bytes."""
    piece_bytes: int

    @property
    def num_pieces(self) -> int:
        """At least 1."""
        return -(-self.header.stored_bytes // self.piece_bytes)

    def spans(self) -> list[tuple[int, int]]:
        """Where each piece begins and ends in the stored bytes."""
        size, end = self.piece_bytes, self.header.stored_bytes
        return [(start, min(start + size, end)) for start in range(0, end, size)]

    def encode(self) -> bytes:
        """`MANIFEST_BYTES` bytes."""
        head = encode_header(self.header)
        assert not any(head[HEADER_PREFIX:])
        body = bytes(head[:HEADER_PREFIX]) + _TAIL.pack(
            self.piece_id, self.piece_bytes, self.num_pieces, bytes(16)
        )
        return body[:-16] + checksum(body[:-16])


def equal_pieces(stored_bytes: int, most: int) -> int:
    """Bytes of a piece: as few pieces as there can be, of equal size, whole pages.

    With equal pieces the borders of pieces are borders of layers wherever their number divides the layers'.
    """
    count = -(-stored_bytes // most)
    each = -(-stored_bytes // count)
    return min(most, -(-each // PAGE_BYTES) * PAGE_BYTES)


def decode_manifest(value: bytes, ref: RecordRef, nbytes: int | None = None) -> Manifest:
    """The manifest of `ref`, whose raw payload has `nbytes`. Raises RecordCorrupt, RecordForeign; believes no length unchecked."""
    if len(value) != MANIFEST_BYTES:
        raise RecordCorrupt(f"a manifest has {MANIFEST_BYTES} bytes, this one {len(value)}")
    if checksum(value[:-16]) != value[-16:]:
        raise RecordCorrupt("the manifest's checksum is wrong")
    piece_id, piece_bytes, num_pieces, _ = _TAIL.unpack_from(value, HEADER_PREFIX)
    header = decode_header(value[:HEADER_PREFIX] + _REST_OF_HEADER)
    check_header(header, ref, header.payload_bytes if nbytes is None else nbytes)
    manifest = Manifest(header, piece_id, piece_bytes)
    if piece_bytes < 1 or num_pieces != manifest.num_pieces:
        raise RecordCorrupt(
            f"the manifest makes no sense: {num_pieces} pieces of {piece_bytes} bytes for {header.stored_bytes}"
        )
    return manifest
