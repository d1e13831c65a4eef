"""Named values in an InfiniStore server (0.2.35), over TCP. Any thread.

The client of its own wheel is not used: over TCP it waits for ever for a name that is missing, has no time-outs, and takes the process with it when the
server dies.

- The server has no step that swaps or compares. `swap` reads, then writes; `remove_if` reads, compares, then removes. Somebody may come between: of two
  writers one leaves pieces that nobody finds, until the server evicts them; a reader may remove a manifest that was just replaced, a miss.
- A value that is being sent stays as it was: the server has one thread.
- It answers a put that it has no room for before the value, and takes the value for the next request. So that connection is closed.
- **It dies of a read or a removal of a value that has not arrived in full**, and says that it exists. So names are written anew before they are removed; pieces, whose names
  are one writer's own, are read only when their manifest is there; and a manifest is sent in one packet. What a writer that died has left half-way takes
  memory until the server is purged.
- It dies when a connection ends too early: see `channel.py`.
- It knows no password and no encryption.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final

from kvtiers.model.errors import (
    ConfigError,
    RecordCorrupt,
    RecordMissing,
    StoreError,
    StoreFull,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.records.codecs.base import Codec
from kvtiers.stores.base import RecordStore
from kvtiers.stores.connections import Connections
from kvtiers.stores.host_port import host_and_port
from kvtiers.stores.infinistore import frames
from kvtiers.stores.infinistore.channel import Channel, Channels
from kvtiers.stores.infinistore.frames import Status
from kvtiers.stores.key_values import KeyValues, Value
from kvtiers.stores.pieces import PiecedStore

DEFAULT_PORT: Final = 22345
_SMALL_BYTES: Final = 64 << 10
_NAMES_AT_ONCE: Final = 256
"""Requests sent before their answers are read: both fit the buffers of a socket."""
_REMOVED_AT_ONCE: Final = 64
_NOBODY: Final = "kv1:probe"


@dataclass(frozen=True, slots=True)
class InfiniStoreSettings:
    """How to reach an InfiniStore server."""

    endpoint: str
    """host:port of its service port, or infinistore://host:port."""
    timeout_s: float = 5.0
    connection_pool_size: int = 32
    piece_bytes: int = 4 << 20
    """Largest value: the server needs that much of its memory in one run."""
    rdma_device: str = ""
    """Through which pieces travel by RDMA (`rdma.py`); empty: all goes over TCP."""
    rdma_port: int = 1
    """Of the device."""
    rdma_connections: int = 2
    """Transfers by RDMA under way at a time."""

    def __post_init__(self) -> None:
        problems = []
        try:
            host_and_port(self.endpoint, "infinistore", DEFAULT_PORT)
        except ValueError:
            problems.append(f"endpoint must be host:port, got {self.endpoint!r}")
        if self.timeout_s <= 0:
            problems.append(f"timeout_s must be above 0, got {self.timeout_s}")
        if self.connection_pool_size < 1:
            problems.append(f"connection_pool_size must be at least 1, got {self.connection_pool_size}")
        if not 65_536 <= self.piece_bytes < 2 << 30:
            problems.append(f"piece_bytes must be from 64 KiB to 2 GiB, got {self.piece_bytes}")
        if "/" in self.rdma_device or self.rdma_device in (".", ".."):
            problems.append(f"rdma_device must be the name of a device, got {self.rdma_device!r}")
        if not 1 <= self.rdma_port <= 255:
            problems.append(f"rdma_port must be from 1 to 255, got {self.rdma_port}")
        if self.rdma_connections < 1:
            problems.append(f"rdma_connections must be at least 1, got {self.rdma_connections}")
        if problems:
            raise ConfigError(problems, source="infinistore")

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return host_and_port(self.endpoint, "infinistore", DEFAULT_PORT)


def infinistore_store(settings: InfiniStoreSettings, codec: Codec) -> RecordStore:
    """Records in the InfiniStore server that `settings` name."""
    return PiecedStore(InfiniStoreValues(settings), codec=codec)


class InfiniStoreValues(KeyValues):
    """A client of an InfiniStore server."""

    label = "infinistore"

    def __init__(self, settings: InfiniStoreSettings) -> None:
        self.piece_bytes = settings.piece_bytes
        self._channels = Channels(
            *settings.address, settings.timeout_s, most_owed=settings.connection_pool_size
        )
        self._connections = Connections(settings.connection_pool_size, settings.timeout_s)
        self._timeout_s = settings.timeout_s

    def open(self) -> None:
        self._channels.open()

    def within_time(self, seconds: float = math.inf) -> AbstractContextManager[object]:
        return self._channels.time.within(min(seconds, self._timeout_s))

    def put(self, values: Sequence[Value]) -> None:
        with self._call() as channel:
            for name, memory in values:
                _put(channel, name, memory)

    def swap(self, name: str, value: bytes) -> bytes | None:
        with self._call() as channel:
            before = _get(channel, name)
            _put(channel, name, memoryview(value))
            return before

    def get(self, name: str) -> bytes:
        with self._call() as channel:
            value = _get(channel, name)
        if value is None:
            raise RecordMissing(f"{name} is not there")
        return value

    def get_into(self, values: Sequence[Value]) -> None:
        with self._call() as channel:
            missing = next((name for name, memory in values if not _get_into(channel, name, memory)), None)
        if missing is not None:
            raise RecordMissing(f"{missing} is not there")

    def exists(self, names: Sequence[str]) -> list[bool]:
        with self._call() as channel:
            return _exist(channel, names)

    def remove(self, names: Sequence[str]) -> int:
        with self._call() as channel:
            count = _exist(channel, names).count(True)
            for start in range(0, len(names), _REMOVED_AT_ONCE):
                _remove(channel, names[start : start + _REMOVED_AT_ONCE])
            return count

    def remove_if(self, name: str, value: bytes) -> bool:
        with self._call() as channel:
            return _get(channel, name) == value and _remove(channel, [name]) == 1

    def probe(self) -> None:
        self.exists([_NOBODY])

    def restarts(self) -> int:
        return self._channels.ended

    def close(self) -> None:
        self._channels.close()

    def stats(self) -> Mapping[str, int]:
        return {**self._connections.stats(), **self._channels.stats()}

    @contextmanager
    def _call(self) -> Iterator[Channel]:
        with self._connections.use(self._channels.time.until), self._channels.use() as channel:
            yield channel


def _put(channel: Channel, name: str, memory: memoryview) -> None:
    request = frames.put_request(name, memory.nbytes)
    try:
        if memory.nbytes <= _SMALL_BYTES:
            channel.send(request + memory)  # so that it most often arrives at once
        else:
            channel.send(request)
            channel.send(memory)
    except ConnectionError:  # it may have been refused before it was sent: then the answer is there
        _check(_status(channel), name)
        raise
    channel.expect(frames.STATUS.size)
    _check(_status(channel), name)


def _get(channel: Channel, name: str) -> bytes | None:
    """A small value; None if it is not there."""
    length = _ask_for(channel, name)
    if length is None:
        return None
    if length > _SMALL_BYTES:
        raise RecordCorrupt(f"{name} has {length} bytes, more than {_SMALL_BYTES}")
    value = bytearray(length)
    channel.receive_value(memoryview(value))
    return bytes(value)


def _get_into(channel: Channel, name: str, memory: memoryview) -> bool:
    """Whether it was there."""
    length = _ask_for(channel, name)
    if length is None:
        return False
    if length != memory.nbytes:
        raise RecordCorrupt(f"{name} has {length} bytes, not {memory.nbytes}")
    channel.receive_value(memory)
    return True


def _ask_for(channel: Channel, name: str) -> int | None:
    """The bytes of the value that follows; None if it is not there."""
    status, length = channel.ask_for_value(frames.get_request(name))
    if status == Status.MISSING:
        return None
    _check(status, name)
    return length


def _exist(channel: Channel, names: Sequence[str]) -> list[bool]:
    found: list[bool] = []
    for start in range(0, len(names), _NAMES_AT_ONCE):
        asked = names[start : start + _NAMES_AT_ONCE]
        channel.expect(frames.FOUND.size * len(asked))
        channel.send(b"".join(map(frames.exists_request, asked)))
        for _ in asked:
            _expect_ok(channel, "existence")
            found.append(_status(channel) == 0)
    return found


def _remove(channel: Channel, names: Sequence[str]) -> int:
    """Write each anew with one byte, and remove them, at once: the server dies of the removal of a value that has not arrived in full."""
    writes = b"".join(frames.put_request(name, 1) + b"x" for name in names)
    channel.expect(frames.STATUS.size * len(names) + frames.FOUND.size)
    channel.send(writes + frames.remove_request(names))
    for name in names:
        _expect_ok(channel, name)
    _expect_ok(channel, names[0])
    return _status(channel)  # how many


def _status(channel: Channel) -> int:
    (status,) = frames.STATUS.unpack(channel.receive(frames.STATUS.size))
    return int(status)


def _expect_ok(channel: Channel, what: str) -> None:
    """The first half of an answer of two, or one of several: an error has no second half, and may end the rest."""
    try:
        _check(_status(channel), what)
    except StoreError:
        channel.lose_count()
        raise


def _check(status: int, what: str) -> None:
    if status == Status.OK:
        return
    if status == Status.FULL:
        raise StoreFull(f"{what}: InfiniStore has no room for it")
    if status >= 500:
        raise StoreTransient(f"{what}: InfiniStore answers {status}")
    raise StoreUnavailable(f"{what}: InfiniStore answers {status}; is it a server of version 0.2.35?")
