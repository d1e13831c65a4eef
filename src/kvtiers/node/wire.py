"""A client's socket: opened, read and written without ever blocking."""

from __future__ import annotations

import os
import socket
from collections import deque
from pathlib import Path
from typing import Any, Final, Self

from kvtiers.model.errors import KvtiersError
from kvtiers.node.framing import answer_decoder, encode_batches
from kvtiers.node.peers import peer_of
from kvtiers.node.protocol import Answer

_READ_BYTES: Final = 1 << 18
_READS_AT_ONCE: Final = 16
_CONGESTED_BYTES: Final = 4 << 20
_MAX_DESCRIPTORS: Final = 4
_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class LinkLost(KvtiersError):
    """The connection is over, and why."""


class ServiceLink:
    """One connection to the service. Every call raises LinkLost when it is over."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = answer_decoder()
        self._outgoing = bytearray()
        self._descriptors: deque[int] = deque()
        self._welcomed = False
        self._shared = False

    @classmethod
    def open(cls, path: Path) -> Self | str:
        """A connection to the service of our own user at `path`, or why there is none."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.connect(os.fspath(path))
            uid = peer_of(sock).uid
        except OSError as error:  # EAGAIN: its backlog is full
            sock.close()
            return error.strerror or str(error)
        if uid != os.getuid():
            sock.close()
            return f"it is of user {uid}"
        return cls(sock)

    @property
    def congested(self) -> bool:
        """Whether so much waits for the service to read it that nothing should be added."""
        return len(self._outgoing) >= _CONGESTED_BYTES

    def post(self, messages: list[Any]) -> None:
        """Queue them as one frame, or as few as it takes."""
        self._outgoing += encode_batches(messages)

    def flush(self) -> None:
        """Send what the socket takes."""
        while self._outgoing:
            try:
                sent = self._sock.send(self._outgoing, _FLAGS)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise LinkLost(error.strerror or str(error)) from None
            del self._outgoing[:sent]

    def receive(self) -> list[list[Answer]]:
        """The batches that are complete by now. Raises ProtocolError for nonsense, LinkLost only when all that came was given out."""
        batches: list[list[Answer]] = []
        for _ in range(_READS_AT_ONCE):
            try:
                received = self._read()
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                received, reason = b"", error.strerror or str(error)
            else:
                reason = "it closed the connection"
            if not received:
                if batches:
                    break  # the end is there at the next call too
                raise LinkLost(reason)
            self._decoder.feed(received)
            batches.extend(self._decoder.batches())
        return batches

    def take_descriptor(self) -> int:
        """The next descriptor that came, now the caller's; -1 if there is none."""
        self._welcomed = True
        return self._descriptors.popleft() if self._descriptors else -1

    def fileno(self) -> int:
        """Of the socket."""
        return self._sock.fileno()

    def leave_open(self) -> None:
        """From now on `close` gives up this process' hold on the connection only: in a forked child it is the parent's."""
        self._shared = True

    def close(self) -> None:
        """Idempotent."""
        if not self._shared:
            try:
                self._sock.shutdown(socket.SHUT_RDWR)  # whoever has a duplicate of it learns of the end too
            except OSError:
                pass  # the other side was first
        self._sock.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def _read(self) -> bytes:
        if self._welcomed:
            return self._sock.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        received, descriptors, _, _ = socket.recv_fds(self._sock, _READ_BYTES, _MAX_DESCRIPTORS, flags)
        self._descriptors.extend(descriptors)
        return received
