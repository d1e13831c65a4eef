"""What happened in a store since it was opened, by a closed list of names. Thread-safe; for `stats()`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from enum import StrEnum


class Event(StrEnum):
    """Names in `DiskStore.stats()`."""

    BYTES_WRITTEN = "bytes_written"
    BYTES_READ = "bytes_read"
    CORRUPT = "corrupt"
    """Records removed because their checksum, size or padding was wrong."""
    FOREIGN = "foreign"
    """Files under a record's name that hold another record (removed) or another format version (left alone)."""
    UNREADABLE = "unreadable"
    """Files that could not be opened or that are no regular files; left alone."""
    VANISHED = "vanished"
    """Records that were gone when they were looked for."""
    ADOPTED = "adopted"
    """Records found on disk that the index log did not know."""
    DUPLICATES = "duplicates"
    """Second copies on another path, removed."""
    LOG_DAMAGED = "log_damaged"
    """Entries of the index log skipped for a wrong checksum."""
    LOG_LOST = "log_lost"
    """Entries that could not be appended; the next start finds those records by walking."""
    LOG_COMPACTIONS = "log_compactions"
    TEMP_REMOVED = "temp_removed"
    """Files of a dead process's unfinished writes."""


class Counters:
    """A number for each event."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(Event, 0)

    def add(self, event: Event, count: int = 1) -> None:
        """Count `count` more."""
        with self._lock:
            self._counts[event] += count

    def snapshot(self) -> Mapping[str, int]:
        """All of them now."""
        with self._lock:
            return {str(event): count for event, count in self._counts.items()}
