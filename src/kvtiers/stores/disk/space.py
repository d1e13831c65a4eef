"""How many bytes the directory takes, kept as it changes: memory only, so that asking never waits for a disk.

    used = allocated blocks of the records in the table      (`table.py` sums them)
         + the index log                                     (`index_log.py` knows)
         + everything else: directories, lock, foreign and unreadable files   (here)

"Everything else" comes from the last run's note, grows with each directory made, and is set right by a walk. What appears
while the walk is under way may or may not have been seen by it: such bytes are kept by inode until the walk ends.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from kvtiers.stores.disk.entry import BLOCK_BYTES


def allocated(status: os.stat_result) -> int:
    """Bytes a file or directory takes of its file system: what `du` counts."""
    return status.st_blocks * BLOCK_BYTES


def free_bytes(path: str) -> int:
    """Bytes an ordinary user may still write on the file system of `path`."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


class OtherBytes:
    """Bytes below a path that are neither records in the table nor the log. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = 0
        self._during_walk: dict[int, int] | None = None
        self._gone_during_walk: set[int] = set()
        self._foreign: dict[int, int] = {}
        """Bytes of the foreign files, by inode."""
        self.foreign_files = 0
        """Files that are not ours, and ours that can't be read, as last counted."""
        self.foreign_bytes = 0
        """What these take; part of the total. The rest of it is overhead: directories and the lock."""

    @property
    def total(self) -> int:
        """As last known."""
        return self._bytes

    def reset(self, nbytes: int) -> None:
        """Begin from what an earlier run or a first look says."""
        with self._lock:
            self._bytes = nbytes

    def add(self, inode: int, nbytes: int) -> None:
        """A directory was made."""
        with self._lock:
            self._bytes += nbytes
            if self._during_walk is not None:
                self._during_walk[inode] = nbytes
                self._gone_during_walk.discard(inode)

    def set_aside(self, inode: int, nbytes: int) -> None:
        """A file turned out not to be ours to touch."""
        self.add(inode, nbytes)
        with self._lock:
            self._foreign[inode] = nbytes
            self.foreign_files += 1
            self.foreign_bytes += nbytes

    def give_up(self, inode: int) -> None:
        """This file has been replaced: if it was counted as foreign, or set aside, it is no more."""
        with self._lock:
            nbytes = self._foreign.pop(inode, None)
            if nbytes is None:
                return
            self.foreign_files -= 1
            self.foreign_bytes -= nbytes
        self.forget(inode, nbytes)

    def forget(self, inode: int, nbytes: int = 0) -> None:
        """What has this inode is gone; it took so many bytes, unless it was added during this walk with another number."""
        with self._lock:
            if self._during_walk is not None:
                nbytes = self._during_walk.pop(inode, nbytes)
                self._gone_during_walk.add(inode)
            self._bytes = max(0, self._bytes - nbytes)

    def begin_walk(self) -> None:
        """From now on keep what is added by inode."""
        with self._lock:
            self._during_walk = {}
            self._gone_during_walk = set()

    def end_walk(self, counted: dict[int, int], foreign: Sequence[int] = ()) -> None:
        """The walk saw these inodes with these bytes; `foreign`: the inodes of files that are not ours, one for each name."""
        with self._lock:
            self._foreign = {inode: counted[inode] for inode in foreign}
            self.foreign_files = len(foreign)
            self.foreign_bytes = sum(self._foreign.values())
            late = self._during_walk or {}
            there = {**late, **counted}
            self._during_walk = None
            self._bytes = sum(n for inode, n in there.items() if inode not in self._gone_during_walk)

    def abandon_walk(self) -> None:
        """The walk was broken off: keep what was known."""
        with self._lock:
            self._during_walk = None
