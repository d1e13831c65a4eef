"""Looking at everything below a disk directory, one directory at a time, without following links or leaving the file system."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from kvtiers.model.parts import RecordRef
from kvtiers.stores.disk.names import LOCK_NAME, LOG_NAME, is_temp_name, parse_record_name


class Kind(Enum):
    """What something below a disk directory is, by its name and type alone."""

    RECORD = auto()
    """A regular file with a record's name."""
    DIRECTORY = auto()
    """Ours or not; comes after its files."""
    LOCK = auto()
    LOG = auto()
    TEMP = auto()
    """A record that is, or was, being written."""
    FOREIGN = auto()
    """Someone else's: any other file, link, socket or device."""


class Found(NamedTuple):
    """One thing below the directory."""

    name: str
    """Relative to the directory; "" for itself."""
    kind: Kind
    ref: RecordRef | None
    """Of a record."""
    status: os.stat_result
    children: int
    """Of a directory: how much was in it; -1 if it can't be listed."""


def walk(root: str) -> Iterator[Found]:
    """Everything below `root`, and `root` itself. What vanishes meanwhile is left out.

    Raises OSError only if `root` itself can't be looked at.
    """
    top = os.lstat(root)
    pending = [("", top)]
    while pending:
        directory, status = pending.pop()
        children = 0
        try:
            with os.scandir(os.path.join(root, directory)) as entries:
                for entry in entries:
                    children += 1
                    name = f"{directory}/{entry.name}" if directory else entry.name
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except OSError:
                        continue
                    if not stat.S_ISDIR(found.st_mode):
                        yield _identify(name, found)
                    elif found.st_dev == top.st_dev:
                        pending.append((name, found))
        except FileNotFoundError:
            continue
        except OSError:
            children = -1
        yield Found(directory, Kind.DIRECTORY, None, status, children)


def _identify(name: str, status: os.stat_result) -> Found:
    kind, ref = Kind.FOREIGN, None
    if stat.S_ISREG(status.st_mode):
        ref = parse_record_name(name)
        if ref is not None:
            kind = Kind.RECORD
        elif name == LOCK_NAME:
            kind = Kind.LOCK
        elif name == LOG_NAME:
            kind = Kind.LOG
        elif is_temp_name(name):
            kind = Kind.TEMP
    return Found(name, kind, ref, status, 0)
