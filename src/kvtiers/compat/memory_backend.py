"""`MemoryBackend`: the CPU target of the offload engine, values in a `MemoryAllocator`, the least recently used making room.

Any thread may call; nothing here waits for I/O, so the async calls run where they are awaited, at memory speed. A value that is
being read is held by a count: it may be evicted meanwhile, its memory is reused only after.
"""

from __future__ import annotations

import threading
from typing import Final

import numpy as np

from kvtiers.compat.allocator import MemoryAllocator
from kvtiers.compat.backend import LocalBackend
from kvtiers.compat.payload import MemoryObj, PayloadChanged, bytes_of
from kvtiers.compat.pointers import CPUPtr
from kvtiers.core.policies.base import Standing
from kvtiers.core.policies.lru import LeafFirstLRU
from kvtiers.model.errors import OutOfMemoryError
from kvtiers.model.layout import round_to_page
from kvtiers.records.checksum import checksum

_NOW: Final = 0.0
"""The order of use needs no clock."""


class MemoryBackend(LocalBackend):
    """Keeps bytes in `allocator`'s pool, or in one of its own of `pool_size_gb` GiB."""

    def __init__(self, allocator: MemoryAllocator | None = None, *, pool_size_gb: float = 0.25) -> None:
        """Raises ArenaDoesNotFit if its own pool is more than this machine has left."""
        self.allocator: Final = allocator or MemoryAllocator(-1, pool_size_gb)
        self._owns_allocator = allocator is None
        self._lock = threading.Lock()
        self._order: LeafFirstLRU[str] = LeafFirstLRU()
        self._values: dict[str, CPUPtr | None] = {}
        """None: no bytes at all."""
        self._bytes = 0
        self.evicted = 0
        """Values that made room for others."""

    async def write(self, key: str, data: MemoryObj) -> bool:
        """Store, evicting what was used least recently. True, or raises OutOfMemoryError."""
        payload = bytes_of(data)
        self.put_now(key, payload, checksum(payload))
        return True

    async def read(self, key: str) -> bytes | None:
        """A copy of the bytes; counts as a use."""
        with self._lock:
            if key not in self._values:
                return None
            self._order.touch(key, _NOW)
            pointer = self._values[key]
            if pointer is None:
                return b""
            pointer.retain()
        try:
            return bytes(pointer.data)
        finally:
            pointer.release()

    async def delete(self, key: str) -> bool:
        """False if it was not there."""
        with self._lock:
            return self._drop(key)

    async def exists(self, key: str) -> bool:
        """Whether it is there; counts as no use."""
        return key in self._values

    def put_now(self, key: str, payload: memoryview, digest: bytes) -> None:
        pointer = self._filled(payload, digest) if payload else None
        with self._lock:
            self._drop(key)
            self._values[key] = pointer
            self._order.insert(key, None, len(payload), _NOW, Standing.ESTABLISHED)
            self._bytes += round_to_page(len(payload))

    def __len__(self) -> int:
        """Values kept."""
        return len(self._values)

    def close(self) -> None:
        """Give everything back; idempotent."""
        with self._lock:
            for key in list(self._values):
                self._drop(key)
        if self._owns_allocator:
            self.allocator.close()

    def _filled(self, payload: memoryview, digest: bytes) -> CPUPtr:
        with self._lock:
            pointer = self._allocate(len(payload))
        try:
            view = pointer.view()
            np.copyto(view, np.frombuffer(payload, np.uint8))
            if checksum(view.data) != digest:
                raise PayloadChanged(
                    "the data changed while it was stored: leave it alone until the task has ended"
                )
        except BaseException:
            pointer.release()
            raise
        return pointer

    def _allocate(self, size: int) -> CPUPtr:
        """With the lock held. What can never fit evicts nothing."""
        others = self.allocator.allocated - self._bytes
        hopeless = round_to_page(size) > self.allocator.pool_size - others
        while True:
            try:
                return self.allocator.allocate(size)
            except OutOfMemoryError:
                victim = None if hopeless else self._order.victim(_NOW, lambda _: True)
                if victim is None:
                    raise
                self._drop(victim)
                self.evicted += 1

    def _drop(self, key: str) -> bool:
        """With the lock held."""
        if key not in self._values:
            return False
        pointer = self._values.pop(key)
        self._order.remove(key)
        if pointer is not None:
            self._bytes -= round_to_page(pointer.size)
            pointer.release()
        return True
