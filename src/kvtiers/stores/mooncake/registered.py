"""Memory that a Mooncake client was told about: only from and into such memory does it transfer.

The arena is registered as a whole. What lies elsewhere (an encoded payload, a manifest) goes through blocks of our own. A block
is in the hands of one call until the client has returned from it, however late that is.
"""

from __future__ import annotations

import math
import mmap
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from kvtiers.model.errors import StoreTransient
from kvtiers.stores.connections import Waits


class Region(NamedTuple):
    """A piece of this process's memory."""

    address: int
    nbytes: int

    def holds(self, address: int, nbytes: int) -> bool:
        """Whether all of it lies inside."""
        return self.address <= address and address + nbytes <= self.address + self.nbytes


class Block(NamedTuple):
    """A lent block."""

    address: int
    memory: memoryview


def region_of(memory: memoryview) -> Region:
    """Where the bytes of a contiguous memoryview lie."""
    return Region(np.frombuffer(memory, np.uint8).__array_interface__["data"][0], memory.nbytes)


class Blocks:
    """`count` blocks of `block_bytes` in one region. Pages that no call has used yet take no memory."""

    def __init__(self, count: int, block_bytes: int, timeout_s: float, waits: Waits) -> None:
        """`timeout_s`: how long a call waits for a block; `waits` counts those that do."""
        self.block_bytes = block_bytes
        self._memory = memoryview(mmap.mmap(-1, count * block_bytes))
        self._timeout_s = timeout_s
        self._waits = waits
        self.region = region_of(self._memory)
        self._free: queue.LifoQueue[int] = queue.LifoQueue()
        for number in reversed(range(count)):
            self._free.put(number * block_bytes)

    @contextmanager
    def take(self, until: float = math.inf) -> Iterator[Block]:
        """Hold a block. Raises StoreTransient if none gets free in time, or by `until` on `time.monotonic`."""
        try:
            offset = self._free.get_nowait()
        except queue.Empty:
            offset = self._wait(until)
        try:
            yield Block(self.region.address + offset, self._memory[offset : offset + self.block_bytes])
        finally:
            self._free.put(offset)

    def _wait(self, until: float) -> int:
        began = time.monotonic()
        try:
            return self._free.get(timeout=max(0.0, min(self._timeout_s, until - began)))
        except queue.Empty:
            raise StoreTransient(f"no registered buffer got free in {self._timeout_s:g} s") from None
        finally:
            self._waits.add(time.monotonic() - began)
