"""Frames: u32 little-endian length, then that many bytes of msgpack, a list of messages. Pure of I/O.

A decoder is fed whatever arrived, cut anywhere, and gives whole batches. What makes no sense raises ProtocolError once and for
all: the stream has no point at which it could be picked up again, so its connection is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec

from kvtiers.model.errors import KvtiersError
from kvtiers.node.protocol import MAX_BATCH, Answer, Request

MAX_FRAME_BYTES: Final = 4 << 20
_LENGTH_BYTES: Final = 4
T = TypeVar("T")


class ProtocolError(KvtiersError):
    """The other side sent what the protocol does not know; the connection has to be closed."""


class FrameDecoder(Generic[T]):
    """Bytes in, batches of messages out. Holds at most one frame and what was fed last."""

    def __init__(self, batch_type: Any, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._decode = msgspec.msgpack.Decoder(batch_type).decode
        self._max = max_frame_bytes
        self._buffer = bytearray()
        self._broken: str | None = None

    def feed(self, received: bytes | memoryview) -> None:
        """Take what arrived. Decodes nothing."""
        self._buffer += received

    def batches(self) -> Iterator[list[T]]:
        """Every batch that is complete. Raises ProtocolError at the first that makes no sense, and at every later call."""
        if self._broken is not None:
            raise ProtocolError(self._broken)
        buffer = self._buffer
        start = 0
        try:
            while len(buffer) - start >= _LENGTH_BYTES:
                length = int.from_bytes(buffer[start : start + _LENGTH_BYTES], "little")
                if length > self._max:
                    raise ProtocolError(f"a frame of {length} bytes; at most {self._max} are allowed")
                end = start + _LENGTH_BYTES + length
                if len(buffer) < end:
                    break
                body = bytes(buffer[start + _LENGTH_BYTES : end])
                start = end
                yield self._messages(body)
        except ProtocolError as error:
            self._broken = str(error)
            raise
        finally:
            del buffer[:start]

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait for the rest of their frame."""
        return len(self._buffer)

    def _messages(self, body: bytes) -> list[T]:
        try:
            batch: list[T] = self._decode(body)
        except msgspec.MsgspecError as error:  # also not msgpack at all
            raise ProtocolError(f"a frame of {len(body)} bytes makes no sense: {error}") from None
        except (RecursionError, UnicodeDecodeError) as error:
            raise ProtocolError(f"a frame of {len(body)} bytes makes no sense: {error}") from None
        return batch


def request_decoder() -> FrameDecoder[Request]:
    """What the service reads with."""
    return FrameDecoder(Annotated[list[Request], msgspec.Meta(max_length=MAX_BATCH)])


def answer_decoder() -> FrameDecoder[Answer]:
    """What a client reads with."""
    return FrameDecoder(Annotated[list[Answer], msgspec.Meta(max_length=MAX_BATCH)])


_encoder: Final = msgspec.msgpack.Encoder()


def encode_batch(messages: Iterable[Request | Answer]) -> bytes:
    """One frame. Raises ProtocolError if it is larger or longer than a frame may be; `encode_batches` cuts."""
    batch = list(messages)
    if len(batch) > MAX_BATCH:
        raise ProtocolError(f"a batch of {len(batch)} messages; a frame has at most {MAX_BATCH}")
    body = _encoder.encode(batch)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a batch of {len(body)} bytes; a frame has at most {MAX_FRAME_BYTES}")
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def encode_batches(messages: list[Any]) -> bytes:
    """As many frames as it takes. Raises ProtocolError for a single message that fits none."""
    if not messages:
        return b""
    try:
        return encode_batch(messages)
    except ProtocolError:
        if len(messages) == 1:
            raise
        middle = len(messages) // 2
        return encode_batches(messages[:middle]) + encode_batches(messages[middle:])
