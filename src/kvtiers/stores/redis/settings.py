"""What the Redis store needs to know, and what an endpoint says. Plain values: `runtime` makes them from the configuration.

    host:port                                     one server (port 6379 if none is given; IPv6 in brackets)
    redis://host:port[/database]                  the same
    rediss://host:port[/database]                 over TLS
    unix:///path                                  a Unix socket
    redis-cluster://h1:p1,h2:p2                   a cluster; any of its nodes, the others are learnt from them
    redis-sentinel://h1:p1,h2:p2/master[/database]  the master of that name, as the sentinels say

`rediss-cluster://` and `rediss-sentinel://` speak TLS. Credentials are no part of an endpoint: it is written to logs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final, NamedTuple

from kvtiers.model.errors import ConfigError

USERNAME_VARIABLE: Final = "KVTIERS_REMOTE_USERNAME"
PASSWORD_VARIABLE: Final = "KVTIERS_REMOTE_PASSWORD"  # noqa: S105 - the name of a variable
SENTINEL_USERNAME_VARIABLE: Final = "KVTIERS_REMOTE_SENTINEL_USERNAME"
SENTINEL_PASSWORD_VARIABLE: Final = "KVTIERS_REMOTE_SENTINEL_PASSWORD"  # noqa: S105 - likewise
_DEFAULT_PORT: Final = 6379
_SENTINEL_PORT: Final = 26_379
_SCHEME: Final = re.compile(r"^([a-z][a-z+-]*)://(.*)$", re.DOTALL)
_FORMS: Final = "host:port, redis://…, rediss://… (TLS), unix:///path, redis-cluster://h1:p1,h2:p2 or redis-sentinel://h1:p1,h2:p2/master"


class Topology(StrEnum):
    """How the servers are found."""

    SERVER = "server"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    """Or the path of a Unix socket."""
    port: int
    """0: a Unix socket."""

    def __str__(self) -> str:
        if not self.port:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Endpoint(NamedTuple):
    """An endpoint, read."""

    topology: Topology
    addresses: tuple[Address, ...]
    """Of the server, of some nodes, or of the sentinels."""
    tls: bool = False
    database: int = 0
    master: str = ""
    """Sentinel's name of it."""


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """Settings of one Redis store. Raises ConfigError if they make no sense."""

    endpoint: str
    timeout_s: float = 2.0
    """For each call, connecting included; and for a place among the connections before it."""
    connection_pool_size: int = 8
    """Connections to all servers together, idle ones included."""
    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    """Empty: none is sent. The user is sent with a password only (then "" is the default user)."""
    sentinel_username: str = field(default="", repr=False)
    sentinel_password: str = field(default="", repr=False)
    """For the sentinels themselves; empty: none is sent."""
    tls_ca_file: str = ""
    """PEM; empty: the authorities of the system."""
    tls_cert_file: str = ""
    """PEM of our own certificate, where the server wants one."""
    tls_key_file: str = ""
    tls_check_hostname: bool = True
    """Whether the server's certificate must be of the host that was asked for."""
    ttl_s: int | None = None
    """Seconds until the engine forgets a record; None: it evicts as it is told to."""
    piece_bytes: int = 4 << 20
    """A record is cut into values of at most so many bytes."""

    def __post_init__(self) -> None:
        problems = []
        try:
            read_endpoint(self.endpoint)
        except ValueError as error:
            problems.append(str(error))
        if not self.timeout_s > 0:
            problems.append(f"timeout_s must be above 0, got {self.timeout_s}")
        if self.connection_pool_size < 1:
            problems.append(f"connection_pool_size must be at least 1, got {self.connection_pool_size}")
        if self.username and not self.password:
            problems.append(f"username is set, but no password: set {PASSWORD_VARIABLE} as well")
        if self.ttl_s is not None and self.ttl_s < 1:
            problems.append(f"ttl_s must be at least 1, got {self.ttl_s}")
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            problems.append("tls_cert_file and tls_key_file need each other")
        if not 4096 <= self.piece_bytes <= 512 << 20:
            problems.append(f"piece_bytes must be between 4 KiB and 512 MiB, got {self.piece_bytes}")
        if problems:
            raise ConfigError(problems, source="redis settings")


def read_endpoint(text: str) -> Endpoint:
    """Raises ValueError, whose message never repeats what may be a credential."""
    found = _SCHEME.match(text)
    scheme, rest = (found[1], found[2]) if found else ("redis", text)
    if "@" in rest:
        raise ValueError(
            f"storage.remote.endpoint holds credentials; set {USERNAME_VARIABLE} and {PASSWORD_VARIABLE}, or a password "
            "file, and leave them out here"
        )
    if "?" in rest:
        raise ValueError(
            "storage.remote.endpoint takes nothing after a question mark: credentials belong into "
            f"{USERNAME_VARIABLE} and {PASSWORD_VARIABLE}, all else into keys of storage.remote"
        )
    if scheme == "unix":
        if not rest.startswith("/"):
            raise ValueError(f"storage.remote.endpoint must be unix:///absolute/path, got {text!r}")
        return Endpoint(Topology.SERVER, (Address(rest, 0),))
    kind, _, form = scheme.partition("-")
    topology = {"": Topology.SERVER, "cluster": Topology.CLUSTER, "sentinel": Topology.SENTINEL}.get(form)
    if kind not in ("redis", "rediss") or topology is None:
        raise ValueError(f"storage.remote.endpoint must be {_FORMS}; got {text!r}")
    hosts, *path = rest.rstrip("/").split("/")
    port = _SENTINEL_PORT if topology is Topology.SENTINEL else _DEFAULT_PORT
    addresses = tuple(_address(host, port, text) for host in hosts.split(","))
    master = ""
    if topology is Topology.SENTINEL:
        if not path:
            raise ValueError(
                f"storage.remote.endpoint must name the master after the sentinels (…/mymaster), got {text!r}"
            )
        master = path.pop(0)
    if (
        len(path) > 1
        or not all(number.isdecimal() for number in path)
        or (path and topology is Topology.CLUSTER)
    ):
        raise ValueError(
            f"storage.remote.endpoint: what stands behind the host must be the database's number, got {text!r}"
        )
    if topology is Topology.SERVER and len(addresses) > 1:
        raise ValueError(
            f"storage.remote.endpoint names several servers: redis-cluster://… or redis-sentinel://…/master, got {text!r}"
        )
    return Endpoint(topology, addresses, kind == "rediss", int(path[0]) if path else 0, master)


def remote_credentials(environ: Mapping[str, str], password_file: str = "") -> tuple[str, str]:
    """User and password from the environment; a file's first line goes before the variable. Raises ConfigError if it can't be read."""
    username, password = environ.get(USERNAME_VARIABLE, ""), environ.get(PASSWORD_VARIABLE, "")
    if password_file:
        path = Path(password_file)
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigError(
                    [f"{path}: others can read it: chmod 600 {path}"], source="storage.remote.password_file"
                )
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ConfigError([f"{password_file}: {reason}"], source="storage.remote.password_file") from None
        password = lines[0] if lines else ""
    return username, password


def _address(text: str, default_port: int, endpoint: str) -> Address:
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:/\s]+))(?::(\d{1,5}))?", text)
    if found is None or not 0 < int(found[3] or default_port) < 65_536:
        raise ValueError(f"storage.remote.endpoint: {text!r} is no host:port, in {endpoint!r}")
    return Address(found[1] or found[2], int(found[3] or default_port))
