"""One client's socket in the service: bytes in, bounded bytes out. Never blocks; says what is wrong by raising ConnectionEnded."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

from kvtiers.model.errors import KvtiersError
from kvtiers.node.framing import encode_batches, request_decoder
from kvtiers.node.peers import Process
from kvtiers.node.protocol import Answer, Attach, Commit, OpenStore, Request, Stage
from kvtiers.node.session import EngineSession

_READ_BYTES: Final = 1 << 20
_TURN_BYTES: Final = 1 << 17
_MESSAGE_BYTES: Final = 64
_PART_BYTES: Final = 128
_INDEX_BYTES: Final = 4


class ConnectionEnded(KvtiersError):
    """This connection is over, and why. An empty reason: the client closed it."""


class NotReading(ConnectionEnded):
    """The client leaves its answers lying."""


class Connection:
    """A client as the control thread knows it."""

    def __init__(self, number: int, sock: socket.socket, process: Process, *, max_outbox_bytes: int) -> None:
        self.number: Final = number
        self.sock: Final = sock
        self.process: Final = process
        self.name = f"process {process.pid}"
        self.session: EngineSession | None = None
        """None until the client has said hello."""
        self.heard_at = 0.0
        self.closed = False
        self.inbox: deque[Request] = deque()
        """Heard, and not handled yet."""
        self._decoder = request_decoder()
        self._outbox = bytearray()
        self._max_outbox = max_outbox_bytes

    def receive(self) -> bool:
        """Take what has arrived into the inbox; False if nothing has. Raises ConnectionEnded, ProtocolError."""
        try:
            received = self.sock.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            raise ConnectionEnded(str(error)) from None
        if not received:
            raise ConnectionEnded("")
        self._decoder.feed(received)
        for batch in self._decoder.batches():
            self.inbox.extend(batch)
        return True

    def next_turn(self) -> Iterator[Request]:
        """What is handled before others have their turn: messages with about 4,096 keys or 1,024 parts, or 2,048 without."""
        left = _TURN_BYTES
        while self.inbox and left > 0 and not self.closed:
            message = self.inbox.popleft()
            left -= _weight(message)
            yield message

    def send(self, answers: Sequence[Answer], fd: int | None = None) -> None:
        """Queue the answers as one frame and send what the socket takes; nothing, if it is closed. `fd` goes with their first byte.

        Raises ConnectionEnded, also for a client that does not read.
        """
        if not answers or self.closed:
            return
        frames = encode_batches(list(answers))
        if fd is not None:
            frames = frames[self._send_with(fd, frames) :]
        self._outbox += frames
        self.flush()
        if len(self._outbox) > self._max_outbox:
            raise NotReading(f"it does not read: {len(self._outbox)} bytes of answers wait for it")

    def flush(self) -> None:
        """Send what the socket takes. Raises ConnectionEnded."""
        while self._outbox:
            try:
                sent = self.sock.send(self._outbox, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise ConnectionEnded(str(error)) from None
            del self._outbox[:sent]

    @property
    def wants_to_send(self) -> bool:
        """Whether something waits for the socket to take it."""
        return bool(self._outbox)

    def close(self) -> None:
        """Idempotent."""
        self.closed = True
        self.sock.close()

    def _send_with(self, fd: int, frames: bytes) -> int:
        try:
            return socket.send_fds(self.sock, [frames], [fd], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            raise ConnectionEnded(f"the arena could not be handed over: {error}") from None


def _weight(message: Request) -> int:
    """What handling it costs, in the bytes of keys that cost as much."""
    if isinstance(message, Attach):
        return _PART_BYTES * len(message.parts)
    if isinstance(message, Commit):
        return _MESSAGE_BYTES + _INDEX_BYTES * len(message.indices or ())
    if isinstance(message, Stage | OpenStore):
        return _MESSAGE_BYTES + len(message.keys)
    return _MESSAGE_BYTES
