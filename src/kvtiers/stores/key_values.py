"""What a key-value engine has to offer to keep records: a few calls on named values. `pieces.py` makes a `RecordStore` of it.

A new engine of this kind is one file with a subclass. All calls block, run on the store's I/O threads, several at once, and **end
within the time-out the subclass was made with, whatever its client does**. They raise the errors of the store contract
(`stores/base.py`): RecordMissing, StoreFull, StoreTransient for what may pass, StoreUnavailable for what can't be reached or refuses
us (a wrong password, a certificate). Messages never hold a credential. Nothing is retried here: that is the guard's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple


class Value(NamedTuple):
    """A name and the memory its bytes lie in, or are to be read into."""

    name: str
    memory: memoryview
    """Format "B", contiguous. To be written: leased, or ours, until the call has returned. To be read into: filled exactly."""


class KeyValues(ABC):
    """Named values of bytes in a shared engine that may forget any of them at any time."""

    label: str
    """For metrics and messages: "redis", "mooncake", …"""
    piece_bytes: int
    """Values larger than this are slow, or refused: a record is cut into pieces of at most so many bytes."""

    @abstractmethod
    def open(self) -> None:
        """Make ready, without waiting for the engine: it may come later. Raises StoreUnavailable if the client is not installed."""

    def within_time(self, seconds: float = math.inf) -> AbstractContextManager[object]:
        """The calls that this thread makes inside have one time-out together, of `seconds` at most, where the engine's client can be told;
        else each has its own.
        """
        return nullcontext()

    @abstractmethod
    def put(self, values: Sequence[Value]) -> None:
        """Set all of these. After an error some may be set."""

    @abstractmethod
    def swap(self, name: str, value: bytes) -> bytes | None:
        """Set a small value; returns what stood there, in one step where the engine can."""

    @abstractmethod
    def get(self, name: str) -> bytes:
        """A small value (at most 64 KiB). Raises RecordMissing."""

    @abstractmethod
    def get_into(self, values: Sequence[Value]) -> None:
        """Fill each memory with its value. Raises RecordMissing if one is not there, RecordCorrupt if one has another length.

        Anything may stand in the memories after an error, but nothing is written to them after the return.
        """

    @abstractmethod
    def exists(self, names: Sequence[str]) -> list[bool]:
        """Which of these are there: one round trip for some hundred names."""

    @abstractmethod
    def remove(self, names: Sequence[str]) -> int:
        """Remove; how many were there."""

    @abstractmethod
    def remove_if(self, name: str, value: bytes) -> bool:
        """Remove a small value if it is still this one, in one step where the engine can."""

    @abstractmethod
    def probe(self) -> None:
        """A cheap round trip. Raises StoreUnavailable if the engine does not work."""

    @abstractmethod
    def close(self) -> None:
        """Let go of connections; idempotent. Calls after it, and those it interrupts, raise StoreUnavailable."""

    def use_memory(self, memory: memoryview) -> None:
        """All of the arena, once, before the first call: what an engine with registered memory has to know."""
        return

    def used_bytes(self) -> int:
        """What the engine said at the last probe that it holds, of all its users; 0 if it does not say."""
        return 0

    def restarts(self) -> int:
        """How often the engine was found to have begun anew: what it was known to hold may be gone. Memory only."""
        return 0

    def stats(self) -> Mapping[str, int]:
        """Counters since `open`, by name; memory only."""
        return {}
