"""One lock per key in use, so that operations on one key follow each other and those on different keys never meet."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Final

from kvtiers.model.errors import StoreTransient

_PATIENCE_S: Final = 30.0


class _Entry:
    __slots__ = ("lock", "users")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


class KeyLocks:
    """Keeps nothing of keys that nobody uses."""

    def __init__(self, patience_s: float = _PATIENCE_S) -> None:
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._entries: dict[Hashable, _Entry] = {}

    @contextmanager
    def held(self, key: Hashable) -> Iterator[None]:
        """Have the key to oneself. Raises StoreTransient if whoever has it keeps it too long: its I/O hangs."""
        with self._lock:
            entry = self._entries.setdefault(key, _Entry())
            entry.users += 1
        try:
            if not entry.lock.acquire(timeout=self._patience_s):
                raise StoreTransient("an earlier operation on the same key has not ended: its storage hangs")
            try:
                yield
            finally:
                entry.lock.release()
        finally:
            with self._lock:
                entry.users -= 1
                if not entry.users:
                    del self._entries[key]

    def __len__(self) -> int:
        """Keys in use now."""
        return len(self._entries)
