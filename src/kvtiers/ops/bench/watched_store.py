"""A store that can be made to hang in everything it is asked, and that tells which threads are inside it.

Only for what runs above a store that starts empty: it hands on the calls of the contract that must be there, and no recovery.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from kvtiers.model.parts import RecordRef
from kvtiers.stores.base import RecordStore, SealedPart, StoredRecord, StoreUsage

_LONGEST_STALL_S: Final = 300.0


class WatchedStore(RecordStore):
    """`store`, with a gate before every call that does I/O."""

    def __init__(self, store: RecordStore, holds_mutex: Callable[[int], bool] = lambda _: False) -> None:
        """`holds_mutex`: whether a thread holds a lock that no store call may be made under."""
        self.name = store.name
        self._store = store
        self._open = threading.Event()
        self._open.set()
        self.inside: set[int] = set()
        """Threads that are in a call at this moment, hanging ones included. Adding and removing is atomic in CPython."""
        self.calls = 0
        self.calls_under_mutex = 0
        self._holds_mutex = holds_mutex

    def stall(self) -> None:
        """From now on every call hangs, as on a dead disk."""
        self._open.clear()

    def release(self) -> None:
        """The disk is back: what hangs goes on."""
        self._open.set()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        me = threading.get_ident()
        self.inside.add(me)
        self.calls += 1
        self.calls_under_mutex += self._holds_mutex(me)
        try:
            self._open.wait(_LONGEST_STALL_S)
            yield
        finally:
            self.inside.discard(me)

    def open(self) -> None:
        self._store.open()

    def write(self, part: SealedPart) -> int:
        with self._entered():
            return self._store.write(part)

    def read_into(self, ref: RecordRef, out: memoryview, nbytes: int) -> StoredRecord:
        with self._entered():
            return self._store.read_into(ref, out, nbytes)

    def exists(self, refs: Sequence[RecordRef]) -> list[bool]:
        with self._entered():
            return self._store.exists(refs)

    def delete(self, ref: RecordRef) -> bool:
        with self._entered():
            return self._store.delete(ref)

    def probe(self) -> None:
        with self._entered():
            self._store.probe()

    def usage(self) -> StoreUsage:
        return self._store.usage()

    def close(self) -> None:
        self._store.close()
