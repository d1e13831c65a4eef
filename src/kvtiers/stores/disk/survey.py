"""What lies in a disk directory, looked at from outside: no lock, nothing changed, while its owner may be at work.

For `kvtiers disk ls|verify`. What the owner removes or replaces meanwhile is no damage: a file that is gone when it is opened is
reported as vanished, and one that was opened is a whole record whatever happens to its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Final, NamedTuple

from kvtiers.model.errors import RecordInvalid
from kvtiers.model.parts import RecordRef
from kvtiers.records.buffers import AlignedBuffers
from kvtiers.stores.disk.lock import is_lock_file
from kvtiers.stores.disk.names import LOCK_NAME
from kvtiers.stores.disk.record_file import OtherVersion, opened, verify_record
from kvtiers.stores.disk.space import allocated
from kvtiers.stores.disk.walk import Kind, walk

_FILES_PER_REPORT: Final = 256


class RecordFile(NamedTuple):
    """A file with a record's name."""

    path: str
    ref: RecordRef
    allocated_bytes: int
    written_at: float
    """Seconds since the epoch."""


class Survey(NamedTuple):
    """All of one directory."""

    path: str
    records: list[RecordFile]
    used_bytes: int
    """Allocated bytes of everything, as `du` counts."""
    foreign_files: int
    foreign_bytes: int
    unfinished_files: int
    """Records being written right now; without an owner, what a killed one left. The next start removes them."""
    unreadable_directories: int
    """What lies in them is not known, and not counted."""
    owner: int | None
    """The process that has the directory open."""


class Verdict(StrEnum):
    """What verifying a file found."""

    SOUND = "sound"
    DAMAGED = "damaged"
    """Not what was stored: never served, removed when it is read."""
    OTHER_VERSION = "other_version"
    """A record of another format version."""
    UNREADABLE = "unreadable"
    VANISHED = "vanished"
    """Removed by the owner meanwhile."""


class Verified(NamedTuple):
    """One file and what it turned out to be."""

    file: RecordFile
    verdict: Verdict
    problem: str


def survey(path: str, looked_at: Callable[[int], None] = lambda _count: None) -> Survey:
    """Look at names and sizes. `looked_at` hears of every few hundred files. Raises OSError if `path` can't be looked at."""
    records: list[RecordFile] = []
    sizes: dict[tuple[int, int], int] = {}
    foreign_files = foreign_bytes = unfinished = unreadable = 0
    for number, found in enumerate(walk(path), start=1):
        if number % _FILES_PER_REPORT == 0:
            looked_at(_FILES_PER_REPORT)
        status = found.status
        sizes[status.st_dev, status.st_ino] = allocated(status)
        if found.ref is not None:
            records.append(
                RecordFile(os.path.join(path, found.name), found.ref, allocated(status), status.st_mtime)
            )
        elif found.kind is Kind.FOREIGN:
            foreign_files += 1
            foreign_bytes += allocated(status)
        elif found.kind is Kind.TEMP:
            unfinished += 1
        elif found.kind is Kind.DIRECTORY and found.children < 0:
            unreadable += 1
    return Survey(
        path,
        records,
        sum(sizes.values()),
        foreign_files,
        foreign_bytes,
        unfinished,
        unreadable,
        owner_of(path),
    )


def verify(file: RecordFile, buffers: AlignedBuffers) -> Verified:
    """Read the whole record, past the page cache where that works, and check everything."""
    try:
        with opened(file.path, os.O_DIRECT) as open_file:
            verify_record(open_file, file.ref, buffers)
    except OtherVersion as error:
        return Verified(file, Verdict.OTHER_VERSION, str(error))
    except RecordInvalid as error:
        return Verified(file, Verdict.DAMAGED, str(error))
    except FileNotFoundError:
        return Verified(file, Verdict.VANISHED, "")
    except OSError as error:
        return Verified(file, Verdict.UNREADABLE, error.strerror or str(error))
    return Verified(file, Verdict.SOUND, "")


def owner_of(path: str) -> int | None:
    """Pid of the process that owns the directory; None if nobody does, or if the kernel doesn't tell.

    Asks `/proc/locks`: trying the lock itself could turn away an owner that starts at this moment.
    """
    try:
        status = os.lstat(os.path.join(path, LOCK_NAME))
        with open("/proc/locks", encoding="ascii") as locks:
            held = any(_is_flock_on(status, line.split()) for line in locks)
        if not held:
            return None
        with open(os.path.join(path, LOCK_NAME), encoding="ascii") as file:
            return int(file.read(32))
    except (OSError, ValueError):
        return None


def _is_flock_on(status: os.stat_result, fields: list[str]) -> bool:
    """`1: FLOCK  ADVISORY  WRITE 4711 fe:00:2188416 0 EOF`, see proc_locks(5); the device is in hex."""
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return len(fields) >= 6 and fields[1] == "FLOCK" and fields[5] == device


def is_disk_directory(path: str) -> bool:
    """Whether a disk store was ever open here."""
    return is_lock_file(os.path.join(path, LOCK_NAME))


def by_namespace(records: list[RecordFile]) -> Iterator[tuple[bytes, list[RecordFile]]]:
    """Records grouped by namespace, the largest first."""
    groups: dict[bytes, list[RecordFile]] = {}
    for record in records:
        groups.setdefault(record.ref.namespace, []).append(record)
    yield from sorted(groups.items(), key=lambda group: -sum(record.allocated_bytes for record in group[1]))
