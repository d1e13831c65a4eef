"""System calls as a directory wants them that other hosts change at any step: what is gone, or is another file by now, is told apart."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")

NO_PLACE: Final = frozenset({errno.ENOENT, errno.ESTALE})
"""A directory on the way is not there (any more)."""


def again_if_stale(call: Callable[[], T]) -> T:
    """The call's result; if what it was about was replaced or removed elsewhere, looked up once more."""
    try:
        return call()
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
    return call()


def has_a_place(call: Callable[[], None]) -> bool:
    """False if a directory that the call needs is not there (any more)."""
    try:
        call()
    except OSError as error:
        if error.errno not in NO_PLACE:
            raise
        return False
    return True


def is_same_file(found: os.stat_result, seen: os.stat_result) -> bool:
    """Whether these are one file, not changed between. The inode alone doesn't tell: a server uses the numbers again."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) == (
        seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns,
    )  # fmt: skip


def sync_directory(path: str) -> None:
    """Make what was renamed in it durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
