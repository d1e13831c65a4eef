"""Does a directory's memory agree with its disk and its log? For `check_integrity`, when nothing else is going on. Changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator

from kvtiers.stores.disk.catalog import Catalog
from kvtiers.stores.disk.entry import IDENTITY_BYTES, allocated_bytes, file_bytes, identity_of, ref_of
from kvtiers.stores.disk.index_log import read_log
from kvtiers.stores.disk.names import LOG_NAME, record_name
from kvtiers.stores.disk.space import allocated
from kvtiers.stores.disk.walk import Kind, walk


def inconsistencies(catalog: Catalog) -> Iterator[str]:
    """A sentence for each. Raises OSError if the directory can't be looked at."""
    entries = {entry[:IDENTITY_BYTES]: entry for entry in catalog.table.snapshot()}
    summed = sum(map(allocated_bytes, entries.values()))
    if summed != catalog.table.record_bytes:
        yield f"{catalog.path}: the table sums up to {summed} bytes, its total says {catalog.table.record_bytes}"
    yield from _log_differs(catalog, entries)
    missing = dict(entries)
    seen: dict[int, int] = {}
    for found in walk(catalog.path):
        if found.kind is Kind.TEMP:
            yield f"{catalog.path}/{found.name} is a leftover of a write"
        seen[found.status.st_ino] = allocated(found.status)
        if found.ref is None:
            continue
        entry = missing.pop(identity_of(found.ref), None)
        if entry is None:
            yield f"{catalog.path}/{found.name} is on disk and not in the table"
        elif file_bytes(entry) != found.status.st_size:
            yield f"{catalog.path}/{found.name} has {found.status.st_size} bytes, the table says {file_bytes(entry)}"
        elif allocated_bytes(entry) != allocated(found.status):
            yield (
                f"{catalog.path}/{found.name} takes {allocated(found.status)} bytes, "
                f"the table says {allocated_bytes(entry)}"
            )
    for identity in missing:
        yield f"{catalog.path}/{record_name(ref_of(identity))} is in the table and not on disk"
    used = sum(seen.values())
    if used != catalog.used_bytes:
        yield f"{catalog.path} takes {used} bytes of the disk, usage says {catalog.used_bytes}"


def _log_differs(catalog: Catalog, entries: dict[bytes, bytes]) -> Iterator[str]:
    path = os.path.join(catalog.path, LOG_NAME)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        logged = read_log(fd)
    finally:
        os.close(fd)
    if logged.damaged:
        yield f"{path} has {logged.damaged} damaged entries; they are skipped and go with the next compaction"
    for identity in logged.entries.keys() - entries.keys():
        yield f"{path} names {record_name(ref_of(identity))}, which is not in the table"
    for identity in entries.keys() - logged.entries.keys():
        yield f"{path} lacks {record_name(ref_of(identity))}, which is in the table"
