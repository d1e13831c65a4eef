"""The HTTP server beside a cache: binds first, so that a port already taken is an error at the start; serves on a daemon thread."""

from __future__ import annotations

import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import uvicorn
from fastapi import FastAPI

from kvtiers.http.connections import BoundedConnection
from kvtiers.http.requests import BoundedRequests
from kvtiers.http.seldom import warn_seldom
from kvtiers.model.errors import ConfigError

_log = logging.getLogger(__name__)
_BACKLOG: Final = 64
_KEPT_S: Final = 5
STOP_S: Final = 2.0
"""What requests that are under way get to end in."""
_UNWIND_S: Final = 0.5
"""What the server's thread takes for the rest."""


class HttpServer:
    """Serves `app` on a listening socket until `stop`."""

    def __init__(self, app: FastAPI, listening: socket.socket) -> None:
        warn_seldom()
        self._socket = listening
        self._server = uvicorn.Server(
            uvicorn.Config(
                BoundedRequests(app),
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_keep_alive=_KEPT_S,
                server_header=False,
                http=BoundedConnection,
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

    def stop(self, timeout: float = STOP_S) -> bool:
        """`stop_all` of this one."""
        return stop_all([self], timeout)

    def ask_to_stop(self, timeout: float) -> None:
        """Take no more requests, and cut off at the time-out those that have not ended by themselves."""
        self._server.config.timeout_graceful_shutdown = timeout  # type: ignore[assignment]  # it is waited for, and any number will do
        self._server.should_exit = True

    def wait_stopped(self, timeout: float) -> bool:
        """Wait for the end of its thread and close the socket. False if something still runs."""
        if self._thread.ident is not None:
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


def stop_all(servers: Sequence[HttpServer], timeout: float = STOP_S) -> bool:
    """End what is being answered, as far as the time allows, and close the sockets. False if something still runs."""
    deadline = time.monotonic() + timeout
    for server in servers:
        server.ask_to_stop(max(0.0, timeout - _UNWIND_S))
    ended = [server.wait_stopped(max(0.0, deadline - time.monotonic())) for server in servers]
    return all(ended)


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
