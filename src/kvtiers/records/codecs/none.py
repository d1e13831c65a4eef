"""The codec that changes nothing. `sealing` passes its payload through without a copy."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from kvtiers.model.errors import CodecError
from kvtiers.records.codecs.base import Codec


class NoCodec(Codec):
    """Stored bytes are the payload."""

    name: ClassVar[str] = "none"

    def parameters(self, itemsize: int) -> bytes:
        return b""

    def bound(self, nbytes: int) -> int:
        return nbytes

    def encode(self, payload: memoryview, out: memoryview, itemsize: int) -> int:
        nbytes = len(payload)
        if len(out) < nbytes:
            raise CodecError(f"{nbytes} bytes do not fit into {len(out)}")
        np.copyto(np.frombuffer(out, np.uint8, nbytes), np.frombuffer(payload, np.uint8))
        return nbytes

    def decode(self, stored: memoryview, out: memoryview, parameters: bytes) -> None:
        if len(stored) != len(out) or parameters:
            raise CodecError(f"{len(stored)} stored bytes can't be a raw payload of {len(out)}")
        np.copyto(np.frombuffer(out, np.uint8), np.frombuffer(stored, np.uint8))
