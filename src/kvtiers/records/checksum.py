"""The one place that names the checksum: xxh3-128.

It guards against damage, not against an adversary. 128 bits, so that no number of records makes an accidental match
plausible; the GIL is released while it runs, so several I/O threads verify at once.
"""

from __future__ import annotations

from typing import Final

import xxhash

CHECKSUM_BYTES: Final = 16


def checksum(buffer: memoryview | bytes | bytearray) -> bytes:
    """xxh3-128 of a contiguous buffer, 16 bytes (canonical, big-endian)."""
    return xxhash.xxh3_128_digest(buffer)
