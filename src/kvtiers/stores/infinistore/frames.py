"""What is said to an InfiniStore server. Pure functions.

    request     u32 0xdeadbeef, u8 operation, u32 bytes of the body; body; for a put, the value
    answer      i32 status; for a found value u32 its bytes and the value, for the others an i32 unless the status is an error

Little-endian. The body is the bare name for EXISTS, else a FlatBuffer (https://flatbuffers.dev/internals/) of one of two tables, written here by
hand as their layout never changes:

    TCPPayloadRequest {key: string; value_length: int32; op: int8}
    DeleteKeysRequest {keys: [string]}
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final

_MAGIC: Final = 0xDEADBEEF
_HEADER: Final = struct.Struct("<IBI")
_PAYLOAD: Final = struct.Struct("<I5H2xiIib3x")
"""Root; vtable: its bytes, the table's, places of the fields; table: back to the vtable, key, length, operation."""
_DELETE: Final = struct.Struct("<I3H2xiI")

STATUS: Final = struct.Struct("<i")
LENGTH: Final = struct.Struct("<I")
FOUND: Final = struct.Struct("<ii")
"""Status, and 0 for a name that is there."""


class Status(IntEnum):
    """Those that are told apart."""

    OK = 200
    MISSING = 404
    FULL = 507


def put_request(name: str, nbytes: int) -> bytes:
    """To be followed by the value."""
    return _payload_request(b"P", name, nbytes)


def get_request(name: str) -> bytes:
    """For one value."""
    return _payload_request(b"G", name, 0)


def exists_request(name: str) -> bytes:
    """For one name; several may be sent at a time."""
    return _framed(b"C", name.encode())


def remove_request(names: Sequence[str]) -> bytes:
    """For several names."""
    offsets, strings = [], bytearray()
    for number, name in enumerate(names):
        offsets.append(4 * (len(names) - number) + len(strings))  # from its own place
        strings += _string(name)
    head = _DELETE.pack(12, 6, 8, 4, 8, 4)
    return _framed(b"X", head + struct.pack(f"<I{len(names)}I", len(names), *offsets) + strings)


def _payload_request(operation: bytes, name: str, nbytes: int) -> bytes:
    return _framed(b"L", _PAYLOAD.pack(16, 10, 16, 4, 8, 12, 12, 12, nbytes, operation[0]) + _string(name))


def _string(text: str) -> bytes:
    """Its length, its bytes, a zero, and zeros up to a multiple of four."""
    data = text.encode()
    return LENGTH.pack(len(data)) + data + bytes(4 - len(data) % 4)


def _framed(operation: bytes, body: bytes | bytearray) -> bytes:
    return _HEADER.pack(_MAGIC, operation[0], len(body)) + body
