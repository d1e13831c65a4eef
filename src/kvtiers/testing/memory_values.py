"""A key-value engine in this process's memory: for tests of what is built on `KeyValues`, where each step must be in the test's hands.

It keeps what a shared engine promises and no more. It is no tier: the project stores KV in engines that exist.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from kvtiers.model.errors import RecordCorrupt, RecordMissing, StoreFull, StoreUnavailable
from kvtiers.stores.key_values import KeyValues, Value
from kvtiers.stores.pieces import PiecedStore
from kvtiers.stores.registry import RemoteSettings


def _nothing(step: str) -> None:  # noqa: ARG001 - of a callback
    return


class MemoryEngine:
    """What several clients share."""

    def __init__(self, capacity: int | None = None) -> None:
        self.lock = threading.Lock()
        self.values: dict[str, bytes] = {}
        self.capacity = capacity

    def room(self, nbytes: int) -> bool:
        """With the lock held."""
        return self.capacity is None or sum(map(len, self.values.values())) + nbytes <= self.capacity


class MemoryValues(KeyValues):
    """A client of it."""

    label = "memory"

    def __init__(
        self, engine: MemoryEngine, *, piece_bytes: int = 65_536, before: Callable[[str], None] | None = None
    ) -> None:
        """`before`: called with each step's name before it is done; may wait, or raise what the step shall raise."""
        self.engine = engine
        self.piece_bytes = piece_bytes
        self._before = before or _nothing
        self._open = False

    def open(self) -> None:
        self._open = True

    def close(self) -> None:
        self._open = False

    def put(self, values: Sequence[Value]) -> None:
        for value in values:
            self._step("put")
            with self.engine.lock:
                if not self.engine.room(len(value.memory)):
                    raise StoreFull(f"no room for {len(value.memory)} bytes")
                self.engine.values[value.name] = bytes(value.memory)

    def swap(self, name: str, value: bytes) -> bytes | None:
        self._step("swap")
        with self.engine.lock:
            before = self.engine.values.get(name)
            self.engine.values[name] = value
            return before

    def get(self, name: str) -> bytes:
        self._step("get")
        with self.engine.lock:
            found = self.engine.values.get(name)
        if found is None:
            raise RecordMissing(f"{name} is not there")
        return found

    def get_into(self, values: Sequence[Value]) -> None:
        for value in values:
            self._step("get_into")
            with self.engine.lock:
                found = self.engine.values.get(value.name)
            if found is None:
                raise RecordMissing(f"{value.name} is not there")
            if len(found) != len(value.memory):
                raise RecordCorrupt(f"{value.name} has {len(found)} bytes, not {len(value.memory)}")
            value.memory[:] = found

    def exists(self, names: Sequence[str]) -> list[bool]:
        self._step("exists")
        with self.engine.lock:
            return [name in self.engine.values for name in names]

    def remove(self, names: Sequence[str]) -> int:
        self._step("remove")
        with self.engine.lock:
            return sum(self.engine.values.pop(name, None) is not None for name in names)

    def remove_if(self, name: str, value: bytes) -> bool:
        self._step("remove_if")
        with self.engine.lock:
            same = self.engine.values.get(name) == value
            if same:
                del self.engine.values[name]
            return same

    def probe(self) -> None:
        self._step("probe")

    def used_bytes(self) -> int:
        with self.engine.lock:
            return sum(map(len, self.engine.values.values()))

    def _step(self, name: str) -> None:
        if not self._open:
            raise StoreUnavailable("the client is closed")
        self._before(name)


_ENGINES: dict[str, MemoryEngine] = {}


def memory_store(settings: RemoteSettings) -> PiecedStore:
    """For `storage.remote.backend: kvtiers.testing.memory_values:memory_store`; stores with one endpoint share an engine."""
    engine = _ENGINES.setdefault(settings.endpoint, MemoryEngine())
    return PiecedStore(MemoryValues(engine), codec=settings.codec)


def engine_at(endpoint: str) -> MemoryEngine:
    """What stores with that endpoint share."""
    return _ENGINES.setdefault(endpoint, MemoryEngine())
