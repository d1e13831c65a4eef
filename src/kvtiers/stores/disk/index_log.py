"""The index log of one directory: append-only, every entry checksummed, a hint for the next start. Headers are the truth.

Whatever is wrong with it costs nothing but the fast start for the entries concerned: a flipped or torn entry is skipped and
counted, a lost log means a slow first walk (`recovery.py`). Entries are replayed in order, the last of an identity wins, so
duplicates do no harm.

Any thread may append. One lock keeps appends in order and is held for one `pwrite` of 144 bytes into the page cache, and while
a compacted log takes the old one's place; never for a sync. Offsets are kept here, not by O_APPEND: what a full disk cut short
is overwritten by the next entry instead of shifting all that follow. A forked child closes its copy of the descriptor at once: two
processes with offsets of their own would overwrite each other's entries.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import xxhash

from kvtiers.stores.disk.entry import ENTRY_BYTES, IDENTITY_BYTES, VERSION_SEED, Kind, note_value
from kvtiers.stores.disk.space import allocated

_BODY_BYTES: Final = ENTRY_BYTES - 8
_KIND_WORD: Final = 108 // 4
_ENTRIES_PER_READ: Final = 32_768  # 4.5 MiB
_SLACK: Final = 4_096
"""Garbage that is never worth a compaction."""
_BLOCK: Final = 4_096


_OPEN: Final[weakref.WeakSet[IndexLog]] = weakref.WeakSet()


class LoadedLog(NamedTuple):
    """What a log said."""

    entries: dict[bytes, bytes]
    """PUT entries by identity that no tombstone followed, least recently written first."""
    note: int | None
    """Bytes that were not records, as last noted."""
    damaged: int
    """Entries skipped because their checksum was wrong, a torn tail included."""


class IndexLog:
    """The log file `path`; `load` before anything else."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._fd = -1
        self._offset = 0
        self._measured_block = -1
        self._allocated = 0
        self._compaction = threading.Lock()
        self._compact_above = 0
        self.has_damage = False
        """Whether the file holds entries that are no use to anyone."""

    @property
    def allocated_bytes(self) -> int:
        """What the file takes of the disk."""
        return self._allocated

    @property
    def entries(self) -> int:
        """Entries in the file, dead ones included."""
        return self._offset // ENTRY_BYTES

    @property
    def is_there(self) -> bool:
        """Whether what is appended to lies at its path: somebody may have removed or replaced it."""
        try:
            mine, there = os.fstat(self._fd), os.lstat(self._path)
        except OSError:
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def load(self) -> LoadedLog:
        """Open, create if need be, and replay. Raises OSError."""
        self._fd = os.open(
            self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600
        )
        _OPEN.add(self)
        loaded = read_log(self._fd)
        self.has_damage = loaded.damaged > 0
        self._offset = os.fstat(self._fd).st_size // ENTRY_BYTES * ENTRY_BYTES
        self._look_at_size()
        return loaded

    def append(self, entry: bytes) -> None:
        """Raises OSError; the log is then as before."""
        with self._lock:
            if self._fd < 0:
                raise OSError(errno.EBADF, "the index log is closed")
            if os.pwrite(self._fd, entry, self._offset) != len(entry):
                raise OSError(errno.ENOSPC, "no space for an entry of the index log")
            self._offset += len(entry)
            if (self._offset - 1) // _BLOCK != self._measured_block:
                self._look_at_size()

    def sync(self) -> None:
        """What was appended before survives a power cut. Raises OSError."""
        with self._lock:
            if self._fd < 0:
                return
            fd = os.dup(self._fd)  # the log may be swapped or closed meanwhile
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def wants_compaction(self, live: int) -> bool:
        """Whether garbage outweighs `live` entries."""
        return not self._compaction.locked() and self.entries > max(2 * live + _SLACK, self._compact_above)

    def compact(self, temp_path: str, live: Callable[[], Sequence[bytes]]) -> bool:
        """Rewrite the log through `temp_path` with only what `live` gives, atomically; waits for one under way.

        False if the log is closed. Raises OSError.

        `live` is called with the log locked, so that nothing appended before is missing in what it gives.
        """
        with self._compaction:
            with self._lock:
                if self._fd < 0:
                    return False
                mark = self._offset
                entries = live()
            new = -1
            try:
                new = os.open(temp_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                end = _write_entries(new, entries)
                os.fdatasync(new)
                self._swap(new, temp_path, mark, end)
                return True
            except OSError:
                self._compact_above = 2 * self.entries  # a full disk: not again at once
                if new >= 0:
                    os.close(new)
                _unlink(temp_path)
                raise

    def measure(self) -> None:
        """Look at the allocated size again. Raises OSError."""
        with self._lock:
            if self._fd >= 0:
                self._look_at_size()

    def close(self) -> None:
        """Idempotent. Later appends raise OSError."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def let_go(self) -> None:
        """In a forked child: close the descriptor without the locks, which may be held by threads that did not come along."""
        self._lock, self._compaction = threading.Lock(), threading.Lock()
        self.close()

    def _swap(self, new: int, path: str, mark: int, end: int) -> None:
        """Put the compacted log, `end` bytes long, in place, with what was appended to the old one since `mark`."""
        with self._lock:
            if self._fd < 0:
                raise OSError(errno.EBADF, "the index log was closed during its compaction")
            tail = os.pread(self._fd, self._offset - mark, mark)
            _pwrite_all(new, tail, end)
            os.rename(path, self._path)
            old, self._fd = self._fd, new
            self._offset = end + len(tail)
            self._compact_above = 0
            self.has_damage = False
            self._look_at_size()
        os.close(old)

    def _look_at_size(self) -> None:
        self._allocated = allocated(os.fstat(self._fd))
        self._measured_block = (self._offset - 1) // _BLOCK


def read_log(fd: int) -> LoadedLog:
    """Replay the log behind `fd`. Raises OSError.

    A loop over slices takes 0.7 µs an entry, checksum included: a million entries are 0.7 s.
    """
    entries: dict[bytes, bytes] = {}
    note: int | None = None
    damaged = 0
    offset = 0
    digest = xxhash.xxh3_64_intdigest
    put, tombstone = int(Kind.PUT), int(Kind.TOMBSTONE)
    while True:
        block = os.pread(fd, _ENTRIES_PER_READ * ENTRY_BYTES, offset)
        whole = len(block) // ENTRY_BYTES
        if not whole:
            return LoadedLog(entries, note, damaged + (len(block) > 0))
        offset += whole * ENTRY_BYTES
        words = np.frombuffer(block, "<u4", whole * (ENTRY_BYTES // 4)).reshape(whole, -1)
        kinds = words[:, _KIND_WORD].tolist()
        stated = np.ascontiguousarray(words[:, -2:]).view("<u8").ravel().tolist()
        start = 0
        for kind, checksum in zip(kinds, stated, strict=True):
            if digest(block[start : start + _BODY_BYTES], VERSION_SEED) != checksum:
                damaged += 1
            elif kind == put:
                identity = block[start : start + IDENTITY_BYTES]
                entries.pop(identity, None)
                entries[identity] = block[start : start + ENTRY_BYTES]
            elif kind == tombstone:
                entries.pop(block[start : start + IDENTITY_BYTES], None)
            elif kind == Kind.NOTE:
                note = note_value(block[start : start + ENTRY_BYTES])
            start += ENTRY_BYTES


def _write_entries(fd: int, entries: Sequence[bytes]) -> int:
    end = 0
    for first in range(0, len(entries), _ENTRIES_PER_READ):
        block = b"".join(entries[first : first + _ENTRIES_PER_READ])
        _pwrite_all(fd, block, end)
        end += len(block)
    return end


def _pwrite_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        if count == 0:
            raise OSError(errno.ENOSPC, "no space for the compacted index log")
        offset += count
        view = view[count:]


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


def _let_go_after_fork() -> None:
    for log in list(_OPEN):
        log.let_go()


os.register_at_fork(after_in_child=_let_go_after_fork)
