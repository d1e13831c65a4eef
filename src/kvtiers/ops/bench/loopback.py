"""The loopback's own speed: one connection to a process that does nothing but `sendall` and `recv_into`, in pieces of a chunk.

That process is this module: `python -m kvtiers.ops.bench.loopback PORT PIECE_BYTES PIECES`.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Final, Self

from kvtiers.model.errors import InvariantBroken
from kvtiers.ops.bench.limits import Bytes, prefaulted
from kvtiers.ops.bench.measure import seconds_of

_HOST: Final = "127.0.0.1"
_PATIENCE_S: Final = 60.0
_SEND: Final = b">"
_TAKE: Final = b"<"
_DONE: Final = b"."


class Loopback:
    """A bare connection. Use it in a `with`; one thread calls."""

    def __init__(self, piece_bytes: int, pieces: int) -> None:
        self._sizes = piece_bytes, pieces
        self._memory = prefaulted(piece_bytes * pieces)
        with socket.create_server((_HOST, 0)) as listener:
            listener.settimeout(_PATIENCE_S)
            words = [str(one) for one in (listener.getsockname()[1], piece_bytes, pieces)]
            self._process = subprocess.Popen(  # noqa: S603 - this module
                [sys.executable, "-m", "kvtiers.ops.bench.loopback", *words], stdin=subprocess.DEVNULL
            )
            try:
                self._socket, _ = listener.accept()
            except TimeoutError:
                self._process.kill()
                raise InvariantBroken("the other end of the bare socket does not come") from None
        self._socket.settimeout(None)  # a blocking socket is the fastest; its peer is ours
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive(self) -> float:
        """All pieces, from the other process into memory here."""

        def work() -> None:
            self._socket.sendall(_SEND)
            _receive_all(self._socket, self._memory, *self._sizes)

        return seconds_of(work)

    def send(self) -> float:
        """All pieces, until the other process has them."""

        def work() -> None:
            self._socket.sendall(_TAKE)
            _send_all(self._socket, self._memory, *self._sizes)
            if self._socket.recv(1) != _DONE:
                raise InvariantBroken("the other end of the bare socket has ended")

        return seconds_of(work)

    def close(self) -> None:
        """The other process ends with the connection."""
        self._socket.close()
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _send_all(to: socket.socket, memory: Bytes, piece_bytes: int, pieces: int) -> None:
    for start in range(0, piece_bytes * pieces, piece_bytes):
        to.sendall(memory[start : start + piece_bytes].data)


def _receive_all(source: socket.socket, memory: Bytes, piece_bytes: int, pieces: int) -> None:
    view = memory.data
    for start in range(0, piece_bytes * pieces, piece_bytes):
        done, end = start, start + piece_bytes
        while done < end:
            count = source.recv_into(view[done:end])
            if not count:
                raise InvariantBroken("the other end of the bare socket has ended")
            done += count


def main(arguments: Sequence[str]) -> int:
    """The other process, until the connection ends."""
    port, piece_bytes, pieces = map(int, arguments)
    memory = prefaulted(piece_bytes * pieces)
    with socket.create_connection((_HOST, port), _PATIENCE_S) as connection:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while wish := connection.recv(1):
            if wish == _SEND:
                _send_all(connection, memory, piece_bytes, pieces)
            else:
                _receive_all(connection, memory, piece_bytes, pieces)
                connection.sendall(_DONE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
