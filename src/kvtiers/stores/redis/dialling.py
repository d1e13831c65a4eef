"""Making a connection, and what to tell the operator when that fails. Any thread.

redis-py connects and does TLS. Who we are, and which database, is said over the wire, whose replies have a deadline. What a server
answers to that is never quoted: one that does not know AUTH repeats the password.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any, Final

from kvtiers.model.errors import StoreError, StoreFull, StoreTransient, StoreUnavailable
from kvtiers.stores.redis.settings import (
    PASSWORD_VARIABLE,
    SENTINEL_PASSWORD_VARIABLE,
    SENTINEL_USERNAME_VARIABLE,
    USERNAME_VARIABLE,
    Address,
    RedisSettings,
    read_endpoint,
)
from kvtiers.stores.redis.wire import ErrorReply, Reply, Wire, WireBroken

_SHORTEST_S: Final = 0.001
_SENTINEL_CREDENTIALS: Final = f"check {SENTINEL_USERNAME_VARIABLE} and {SENTINEL_PASSWORD_VARIABLE}"
_CREDENTIALS: Final = (
    f"check {USERNAME_VARIABLE} and {PASSWORD_VARIABLE} (or the password file) and the user's ACL"
)

_WHICH_RUN: Final = (b"INFO", b"server")
_PASSING: Final = frozenset(
    {"LOADING", "BUSY", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN", "READONLY", "NOREPLICAS", "MOVED", "ASK"}
)
"""Refusals that end by themselves: a restart, a failover, a cluster that is being rearranged."""
_BEFORE_WE_SPOKE: Final = ("DENIED ", "ERR max number of clients")
"""So begins what a server says to whoever connects, whatever is sent: it comes as the reply to the first thing said."""
_DOES_NOT_SAY: Final = ("NOAUTH ", "NOPERM ", "ERR unknown command")
"""So begins the reply to INFO of a server that may be of use without."""


class Dialler:
    """Connects to servers, or to sentinels, as the settings say."""

    def __init__(self, settings: RedisSettings, *, sentinels: bool = False) -> None:
        """Raises StoreUnavailable if redis-py is not installed, or a file of the TLS settings can't be used."""
        try:
            import redis
        except ImportError:
            raise StoreUnavailable("the client is not installed: pip install 'kvtiers[redis]'") from None
        endpoint = read_endpoint(settings.endpoint)
        self._redis = redis
        self._tls = endpoint.tls
        self._credentials = _SENTINEL_CREDENTIALS if sentinels else _CREDENTIALS
        self._options: dict[str, Any] = {
            "protocol": 2,
            "driver_info": None,
        }
        self._greeting: list[tuple[bytes, ...]] = []
        username = settings.sentinel_username if sentinels else settings.username
        password = settings.sentinel_password if sentinels else settings.password
        if password:
            user = (username.encode(),) if username else ()
            self._greeting.append((b"AUTH", *user, password.encode()))
        if endpoint.database and not sentinels:
            self._greeting.append((b"SELECT", b"%d" % endpoint.database))
        if not sentinels:
            self._greeting.append(_WHICH_RUN)
        if self._tls:
            _check_files(settings)
            self._tls_options = {
                "ssl_ca_certs": settings.tls_ca_file or None,
                "ssl_certfile": settings.tls_cert_file or None,
                "ssl_keyfile": settings.tls_key_file or None,
                "ssl_check_hostname": settings.tls_check_hostname,
            }

    def dial(self, address: Address, deadline: float) -> Wire:
        """A connection that is ready for commands. Raises StoreTransient, StoreUnavailable."""
        errors = self._redis.exceptions
        connection = self._connection(address, max(_SHORTEST_S, deadline - time.monotonic()))
        try:
            connection.connect()
        except errors.RedisError as error:
            connection.disconnect()
            raise self._explained(address, error) from None
        wire = Wire(connection, address)
        try:
            self._greet(wire, deadline)
        except BaseException:
            wire.dispose()
            raise
        return wire

    def _greet(self, wire: Wire, deadline: float) -> None:
        try:
            wire.send(self._greeting, deadline)
            for command in self._greeting:
                reply = wire.reply(deadline)
                if isinstance(reply, ErrorReply):
                    if command is not _WHICH_RUN or not reply.text.startswith(_DOES_NOT_SAY):
                        raise self._refusal(wire.address, command, reply)
                elif command is _WHICH_RUN:
                    wire.run = info_field(reply, b"run_id")
        except WireBroken as error:
            if error.refusal is not None:
                raise self._refusal(wire.address, self._greeting[0], error.refusal) from None
            if error.timed_out:
                raise self._too_late(wire.address) from None
            raise StoreUnavailable(f"{wire.address} does not let us in: {error}") from None

    def _refusal(self, address: Address, command: Sequence[bytes], reply: ErrorReply) -> StoreError:
        """What one of the greeting means."""
        if command is _WHICH_RUN or reply.text.startswith(_BEFORE_WE_SPOKE):
            return refused(address, reply.code, reply.text)
        if reply.code == "LOADING":
            return StoreTransient(f"{address} is loading its data")
        if reply.code in _PASSING:
            return StoreTransient(f"{address} says: {reply.code}")
        if command[0] == b"AUTH":
            return StoreUnavailable(
                f"{address} refuses our user or password ({reply.code}): {self._credentials}"
            )
        return StoreUnavailable(
            f"{address} has no database {command[1].decode()} ({reply.code}): check the endpoint"
        )

    def _too_late(self, address: Address) -> StoreTransient:
        hint = "; is it a TLS port?" if self._tls else ""
        return StoreTransient(f"{address} did not answer in time{hint}")

    def _connection(self, address: Address, timeout: float) -> Any:
        kinds: Any = self._redis.connection
        options = {**self._options, "socket_timeout": timeout, "socket_connect_timeout": timeout}
        if not address.port:
            return kinds.UnixDomainSocketConnection(path=address.host, **options)
        options |= {"host": address.host, "port": address.port, "socket_keepalive": True}
        if self._tls:
            return kinds.SSLConnection(**options, **self._tls_options)
        return kinds.Connection(**options)

    def _explained(self, address: Address, error: Exception) -> StoreError:
        errors, cause = self._redis.exceptions, error.__context__
        if isinstance(error, errors.TimeoutError):
            return self._too_late(address)
        if isinstance(cause, ssl.SSLCertVerificationError):
            reason = cause.verify_message
            return StoreUnavailable(
                f"the certificate of {address} is not accepted ({reason}): check tls_ca_file, and that the certificate "
                "is of this host"
            )
        if isinstance(cause, ssl.SSLError):
            return StoreUnavailable(
                f"TLS with {address} fails ({cause.reason or cause}): is it a TLS port, and does it want a certificate of "
                "ours (tls_cert_file)?"
            )
        if isinstance(cause, socket.gaierror):
            return StoreUnavailable(
                f"the host of {address} is not known ({cause.strerror}): check the endpoint"
            )
        if isinstance(cause, OSError):
            return StoreUnavailable(f"{address} can't be reached: {cause.strerror or cause}")
        return StoreUnavailable(f"{address} does not let us in: {_one_line(error)}")


def info_field(reply: Reply, name: bytes) -> bytes:
    """Of INFO; empty where that is not allowed, or does not say."""
    if isinstance(reply, bytes):
        for line in reply.splitlines():
            key, _, value = line.partition(b":")
            if key == name:
                return value.strip()
    return b""


def broken(address: Address, error: WireBroken) -> StoreError:
    """What the loss of a connection means: what the server said last, if it said anything."""
    if error.refusal is not None:
        return refused(address, error.refusal.code, error.refusal.text)
    return StoreTransient(f"{address}: {error}")


def refused(address: Address, code: str, text: str) -> StoreError:
    """What the refusal of a command means."""
    text = text.partition(", with args")[0]  # which may be a value
    if code in ("OOM", "MISCONF"):
        return StoreFull(f"{address} takes no more: {text}")
    if code in ("NOAUTH", "WRONGPASS", "NOPERM"):
        return StoreUnavailable(f"{address} refuses our user or password: {_CREDENTIALS}; it says: {text}")
    if code in _PASSING:
        return StoreTransient(f"{address} says: {text}")
    return StoreUnavailable(f"{address} refuses: {text}")


def _check_files(settings: RedisSettings) -> None:
    try:
        context = ssl.create_default_context(cafile=settings.tls_ca_file or None)
        if settings.tls_cert_file:
            context.load_cert_chain(settings.tls_cert_file, settings.tls_key_file)
    except OSError as error:  # also ssl.SSLError
        raise StoreUnavailable(
            f"tls_ca_file, tls_cert_file or tls_key_file can't be used: {error.strerror or error}"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
