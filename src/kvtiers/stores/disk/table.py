"""What lies in one disk directory, in memory: packed index entries by identity. Memory only; its lock is held for moments.

An entry passes through states, so that the index log can be compacted at any moment without losing one:

    intended   in the log (or about to be), its file not yet under its name
    published  the file is there: `exists` says so, reads try
    doomed     its tombstone is in the log (or about to be), its file about to go

Who changes the state of one identity holds that identity's stripe (`volume.py`); the table itself only stays consistent.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from kvtiers.stores.disk.entry import IDENTITY_BYTES, allocated_bytes


class Table:
    """Entries of one directory, least recently used first as far as is known."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._published: dict[bytes, bytes] = {}
        self._intended: dict[bytes, bytes] = {}
        self._doomed: set[bytes] = set()
        self._record_bytes = 0

    def __len__(self) -> int:
        return len(self._published)

    @property
    def record_bytes(self) -> int:
        """Allocated bytes of all published records."""
        return self._record_bytes

    def load(self, entries: dict[bytes, bytes]) -> None:
        """Begin with these, published."""
        with self._lock:
            self._published = entries
            self._record_bytes = sum(map(allocated_bytes, entries.values()))

    def get(self, identity: bytes) -> bytes | None:
        """The published entry, unless it is doomed."""
        entry = self._published.get(identity)
        return None if entry is None or identity in self._doomed else entry

    def which_exist(self, identities: Sequence[bytes]) -> list[bool]:
        """For each, whether it is published and not doomed."""
        with self._lock:
            published, doomed = self._published, self._doomed
            return [identity in published and identity not in doomed for identity in identities]

    def snapshot(self) -> list[bytes]:
        """Published entries, least recently used first."""
        with self._lock:
            return list(self._published.values())

    def identities(self) -> set[bytes]:
        """Of all published entries."""
        with self._lock:
            return set(self._published)

    def for_log(self) -> list[bytes]:
        """What a compacted log must say: published without the doomed, then intended."""
        with self._lock:
            if not self._doomed:
                return [*self._published.values(), *self._intended.values()]
            kept = [entry for identity, entry in self._published.items() if identity not in self._doomed]
            return [*kept, *self._intended.values()]

    def intend(self, entry: bytes) -> None:
        """A record is about to be published."""
        with self._lock:
            self._intended[entry[:IDENTITY_BYTES]] = entry

    def give_up(self, identity: bytes) -> bytes | None:
        """It won't be. Returns the entry that is published under this identity still."""
        with self._lock:
            self._intended.pop(identity, None)
            return self._published.get(identity)

    def publish(self, entry: bytes) -> None:
        """The record lies under its name; it becomes the most recently used."""
        identity = entry[:IDENTITY_BYTES]
        with self._lock:
            self._intended.pop(identity, None)
            old = self._published.pop(identity, None)
            self._published[identity] = entry
            self._record_bytes += allocated_bytes(entry) - (allocated_bytes(old) if old else 0)

    def correct(self, entry: bytes) -> None:
        """The same record with other sizes; its place in the order stays."""
        identity = entry[:IDENTITY_BYTES]
        with self._lock:
            old = self._published.get(identity)
            if old is not None:
                self._published[identity] = entry
                self._record_bytes += allocated_bytes(entry) - allocated_bytes(old)

    def doom(self, identity: bytes) -> bytes | None:
        """The record is about to go: `get` and `which_exist` deny it. Returns its entry; None if there is none."""
        with self._lock:
            entry = self._published.get(identity)
            if entry is not None:
                self._doomed.add(identity)
            return entry

    def spare(self, identity: bytes) -> None:
        """It could not be removed after all."""
        with self._lock:
            self._doomed.discard(identity)

    def remove(self, identity: bytes) -> None:
        """The record is gone."""
        with self._lock:
            self._doomed.discard(identity)
            entry = self._published.pop(identity, None)
            if entry is not None:
                self._record_bytes -= allocated_bytes(entry)

    def reorder(self, identities_by_use: Iterable[bytes]) -> None:
        """Put these, least recent first, behind all that are not named."""
        with self._lock:
            published = self._published
            for identity in identities_by_use:
                entry = published.pop(identity, None)
                if entry is not None:
                    published[identity] = entry
