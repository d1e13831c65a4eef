"""One process owns a disk directory: an advisory lock (`flock`) on `<path>/lock`, which holds the owner's pid.

The kernel drops the lock when the owner is gone, however it died; a stopped owner keeps it. `flock` belongs to the open file,
which a forked child inherits: it closes its copy at once, or an orphaned worker would keep the directory of a dead service.
"""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from typing import Final

from kvtiers.model.errors import DirectoryInUse, StoreUnavailable
from kvtiers.stores.disk.names import LOCK_NAME

_LOCK_BYTES: Final = 16
_HELD: Final[weakref.WeakSet[DirectoryLock]] = weakref.WeakSet()


class DirectoryLock:
    """Owns `directory` from `acquire` to `release` or the end of the process."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._fd = -1

    def acquire(self) -> None:
        """Raises DirectoryInUse naming the owner, StoreUnavailable if the file system has no locks."""
        path = os.path.join(self._directory, LOCK_NAME)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if not _is_lock(fd):
            os.close(fd)
            raise StoreUnavailable(
                f"{path} is a file of somebody else's, not a cache's lock; give the cache a directory of its own"
            )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = _owner_in(fd)
            os.close(fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise DirectoryInUse(
                    f"{self._directory} is in use by {owner}; close that cache, or give this one another path"
                ) from None
            raise StoreUnavailable(
                f"{path} can't be locked ({error.strerror}); use a file system with flock"
            ) from error
        try:
            os.pwrite(
                fd, b"%-15d\n" % os.getpid(), 0
            )  # in place: on a full disk a cache can still be opened and read
        except OSError:
            pass  # it is locked all the same, only its owner can't be told
        self._fd = fd
        _HELD.add(self)

    @property
    def holds(self) -> bool:
        """Whether what is locked still is what lies there: somebody may have emptied the directory, and another process locked it anew."""
        try:
            locked, there = os.fstat(self._fd), os.lstat(os.path.join(self._directory, LOCK_NAME))
        except OSError:
            return False
        return (locked.st_dev, locked.st_ino) == (there.st_dev, there.st_ino)

    def take_again(self) -> None:
        """Own the directory as it is now. Raises as `acquire`, and OSError; what was locked before stays so then."""
        lost, self._fd = self._fd, -1
        try:
            self.acquire()
        except BaseException:
            self._fd = lost
            raise
        os.close(lost)

    def release(self) -> None:
        """Idempotent. The file stays: removing it would let two owners lock two files of one name."""
        _HELD.discard(self)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def is_lock_file(path: str) -> bool:
    """Whether a file is a cache's lock, by its content. False if it can't be looked at."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return _is_lock(fd)
    finally:
        os.close(fd)


def _is_lock(fd: int) -> bool:
    """A number and blanks, or nothing, as a lock is on a full disk."""
    try:
        content = os.pread(fd, _LOCK_BYTES + 1, 0)
    except OSError:
        return False
    return len(content) <= _LOCK_BYTES and (not content or content.strip().isdigit())


def _owner_in(fd: int) -> str:
    try:
        pid = int(os.pread(fd, 32, 0))
    except (OSError, ValueError):
        return "another process"
    if pid == os.getpid():
        return f"this process ({pid})"
    return f"process {pid}"


def _let_go_after_fork() -> None:
    for lock in list(_HELD):
        lock.release()


os.register_at_fork(after_in_child=_let_go_after_fork)
