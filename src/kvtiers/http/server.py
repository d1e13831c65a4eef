"""The HTTP server beside a cache: binds first, so that a port already taken is an error at the start; serves on a daemon thread."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvtiers.http.seldom import warn_seldom
from kvtiers.model.errors import ConfigError

_log = logging.getLogger(__name__)
_BACKLOG: Final = 64
_CONCURRENT: Final = 64
"""Connections at a time; what comes beyond them is answered 503 at once."""
_MOST_OPEN: Final = 256
"""Connections that may be open, silent ones included; one more is closed at once."""
_IDLE_S: Final = 5
_LONGEST_REQUEST_S: Final = 120.0
_STOP_S: Final = 5.0


class HttpServer:
    """Serves `app` on a listening socket until `stop`."""

    def __init__(self, app: FastAPI, listening: socket.socket) -> None:
        warn_seldom()
        self._socket = listening
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                limit_concurrency=_CONCURRENT,
                timeout_keep_alive=_IDLE_S,
                timeout_graceful_shutdown=int(_STOP_S),
                server_header=False,
                http=_Bounded,
                ws="none",
            )
        )
        self._thread = threading.Thread(target=self._serve, name="kvtiers-http", daemon=True)

    @property
    def url(self) -> str:
        """Where it listens."""
        if self._socket.family == socket.AF_UNIX:
            return f"unix:{self._socket.getsockname()}"
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> Self:
        """Begin to serve; returns at once."""
        self._thread.start()
        _log.info("metrics and API on %s", self.url)
        return self

    def stop(self, timeout: float = _STOP_S) -> bool:
        """End what is being answered, as far as the time allows, and close the socket. False if something still runs."""
        self._server.should_exit = True
        self._thread.join(timeout)
        self._socket.close()
        return not self._thread.is_alive()

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        except Exception:  # noqa: BLE001 - whatever it is, engines are served all the same
            _log.exception("the HTTP server ended; the cache goes on without it")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Bounded(H11Protocol):
    """Uvicorn bounds neither the connections open nor how long one may take over a request, so that a few hundred silent ones
    would keep everybody else out, and take the descriptors that the cache needs.
    """

    _timer: asyncio.TimerHandle | None = None
    _seen: object = None
    """The request there was at the last look, and since when it is the same one."""
    _since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _MOST_OPEN:
            transport.abort()
            return
        self._since = self.loop.time()
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _look_later(self) -> None:
        self._timer = self.loop.call_later(_IDLE_S, self._look)

    def _look(self) -> None:
        now = self.loop.time()
        request: object = self.cycle
        if request is not self._seen:
            self._seen, self._since = request, now
        idle = request is None or self.cycle.response_complete
        if now - self._since >= (_IDLE_S if idle else _LONGEST_REQUEST_S):
            self.transport.abort()
        else:
            self._look_later()


def listen(host: str, port: int, *, has_token: bool) -> socket.socket:
    """A listening socket. Raises ConfigError: an address other than the loopback without a token, or a port already taken."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ConfigError(
            [f'observability.http_host = "{host}": an IP address such as 127.0.0.1 or 0.0.0.0 is needed']
        ) from None
    if not address.is_loopback and not has_token:
        raise ConfigError(
            [
                (
                    f'observability.http_host = "{host}": an address that others can reach needs observability.token_file, '
                    "because the API can evict; or use 127.0.0.1"
                )
            ]
        )
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named; without it each answer on a kept connection takes 44 ms
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart must not wait for TIME_WAIT
    try:
        listening.bind((str(address), port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(
            [
                (
                    f"observability.metrics_port = {port}: {host}:{port} can't be listened on ({error.strerror}); "
                    "choose another port, or end what uses it"
                )
            ]
        ) from error
    return listening


def listen_unix(path: Path) -> socket.socket:
    """A listening socket for processes of this user; what lies there is replaced. Raises ConfigError."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError([f"{path} can't be listened on: {error.strerror}"]) from error
    return listening


def read_token(path: Path) -> str:
    """The bearer token: the file's only line. Raises ConfigError if there is none, or if others may read it."""
    try:
        status = path.stat()
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError([f'observability.token_file = "{path}": {error}']) from error
    if status.st_mode & 0o077:
        raise ConfigError(
            [
                f'observability.token_file = "{path}": others may read it; chmod 600 it (it is {status.st_mode & 0o777:o})'
            ]
        )
    if not token or not token.isprintable() or " " in token:
        raise ConfigError(
            [f'observability.token_file = "{path}": one line with a token without spaces is needed']
        )
    return token
