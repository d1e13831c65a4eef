"""The contract of a payload codec.

A codec is stateless and thread-safe: several I/O threads share one. It releases the GIL for the heavy part, allocates
nothing of payload size on the steady path (it works in tiles, on scratch of its thread), and everything `decode` needs
stands in the parameters that the record's header carries: a codec made without options decodes what any options encoded.
Equal streams decode to equal bytes on every machine, also those of a lossy codec.

The checksum is over the payload as a reader gets it: whatever a damaged stream decodes to is caught by it, so `decode` may
raise or return garbage, but never writes outside `out`, and raises nothing but CodecError.

Views have format "B" and are contiguous, at any alignment; input may be read-only, and input and output never overlap. A
payload has at least one byte, and need not be a whole number of elements.

A new codec is one file with a subclass, an entry point in the group `kvtiers.codecs`, and `kvtiers.testing.codec_kit` green.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

MAX_NAME_BYTES = 16
MAX_PARAMETER_BYTES = 64


class Codec(ABC):
    """Turns raw KV bytes into stored bytes and back."""

    name: ClassVar[str]
    """At most 16 printable ASCII bytes, written into the header; also the entry point's name."""

    lossy: ClassVar[bool] = False
    """A lossy codec's name and parameters are part of the namespace."""

    @abstractmethod
    def parameters(self, itemsize: int) -> bytes:
        """At most 64 bytes for the header; with them alone `decode` works. `itemsize`: bytes per KV element."""

    @abstractmethod
    def bound(self, nbytes: int) -> int:
        """The largest number of stored bytes that `nbytes` raw bytes can become."""

    @abstractmethod
    def encode(self, payload: memoryview, out: memoryview, itemsize: int) -> int:
        """Encode into `out` (at least `bound(len(payload))` bytes); returns stored bytes, at least one."""

    @abstractmethod
    def decode(self, stored: memoryview, out: memoryview, parameters: bytes) -> None:
        """Fill `out` exactly. Raises CodecError when the stream does not give `len(out)` bytes."""
