"""A TCP relay between a store and its engine that a test can make slow, or silent, or an endpoint of TLS.

Each connection has a thread a direction; the two directions of all connections share the limit of bytes per second.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from contextlib import suppress
from typing import Final, Self

from kvtiers.testing.servers.process import LOOPBACK

_CHUNK: Final = 65_536
_NAP_S: Final = 0.005
_CONNECT_S: Final = 10.0


class Relay:
    """Listens on a free port of the loopback and passes on to `target`."""

    def __init__(self, target: tuple[str, int], *, tls: ssl.SSLContext | None = None) -> None:
        """`tls`: speak TLS to those who connect, plain TCP to the target."""
        self._target = target
        self._tls = tls
        self._rate: float | None = None
        self._allowed_at = 0.0
        self._lock = threading.Lock()
        self._closing = False
        self._sockets: set[socket.socket] = set()
        self._listener = socket.create_server((LOOPBACK, 0))
        self._start(self._accept)

    @property
    def address(self) -> tuple[str, int]:
        """Where to connect."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def limit(self, bytes_per_s: float | None) -> None:
        """From now on; 0: nothing passes, None: no limit."""
        with self._lock:
            self._rate = bytes_per_s
            self._allowed_at = time.monotonic()

    def close(self) -> None:
        """End every connection."""
        with self._lock:
            self._closing = True
            ending = [self._listener, *self._sockets]
        for one in ending:
            _end(one)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        try:
            near.settimeout(_CONNECT_S)
            if self._tls is not None:
                near = self._tls.wrap_socket(near, server_side=True)
            near.settimeout(None)
            far = socket.create_connection(self._target, _CONNECT_S)
            far.settimeout(None)
        except OSError:  # also ssl.SSLError: who connects does not trust us, or the engine is gone
            _end(near)
            return
        with self._lock:
            self._sockets |= {near, far}
            closing = self._closing
        if closing:
            _end(near)
            _end(far)
        self._start(self._pump, near, far)
        self._start(self._pump, far, near)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(_CHUNK):
                self._wait_turn(len(data))
                sink.sendall(data)
        except OSError:
            pass
        for one in (source, sink):
            _end(one)
            with self._lock:
                self._sockets.discard(one)

    def _wait_turn(self, nbytes: int) -> None:
        while True:
            with self._lock:
                now = time.monotonic()
                if self._rate is None or self._closing:
                    return
                if self._rate > 0 and now >= self._allowed_at:
                    self._allowed_at = max(now, self._allowed_at) + nbytes / self._rate
                    return
            time.sleep(_NAP_S)

    @staticmethod
    def _start(target: object, *args: object) -> None:
        threading.Thread(target=target, args=args, name="test-relay", daemon=True).start()  # type: ignore[arg-type]


def _end(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
