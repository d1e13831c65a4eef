"""One record's file: opening it without ever blocking, reading its header, reading and verifying all of it. Any thread.

Needs no lock and no store: a published file never changes, it is only replaced as a whole. `DiskStore` and `kvtiers disk verify`
read through the same code.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

from kvtiers.model.errors import RecordCorrupt, RecordForeign
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.namespace import FORMAT_VERSION
from kvtiers.model.parts import RecordRef
from kvtiers.records.buffers import AlignedBuffers
from kvtiers.records.header import HEADER_BYTES, MAGIC, RecordHeader, check_header, decode_header
from kvtiers.records.sealing import is_raw_size, open_record
from kvtiers.stores.disk.direct_io import open_to_read, read_from_start
from kvtiers.stores.disk.failures import NotARegularFile

_VERSION_AT: Final = slice(8, 12)


class OtherVersion(RecordForeign):
    """A record of another format version: not ours to read, and not ours to remove."""


class OpenFile(NamedTuple):
    """A regular file, open to read."""

    fd: int
    status: os.stat_result


@contextmanager
def opened(path: str, direct_flags: int) -> Iterator[OpenFile]:
    """Raises OSError, NotARegularFile; never blocks on what is not a regular file."""
    fd = open_to_read(path, direct_flags)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise NotARegularFile(None, f"{path} is not a regular file")
        yield OpenFile(fd, status)
    finally:
        os.close(fd)


def read_record(
    file: OpenFile, ref: RecordRef, nbytes: int, out: memoryview, buffers: AlignedBuffers
) -> RecordHeader:
    """All of the record into `out[:nbytes]`, verified. Raises RecordInvalid (OtherVersion for one of these), OSError."""
    other_version = False

    def read(pages: Sequence[memoryview]) -> int:
        nonlocal other_version
        count = read_from_start(file.fd, pages)
        other_version = _is_other_version(pages[0])
        return count

    try:
        return open_record(ref, nbytes, file.status.st_size, out, read, buffers=buffers)
    except RecordForeign as error:
        if other_version:
            raise OtherVersion(str(error)) from error
        raise


def read_header(file: OpenFile, ref: RecordRef, buffers: AlignedBuffers) -> RecordHeader:
    """The header alone, checked against the name and the size of the file. Raises RecordInvalid (or OtherVersion), OSError."""
    with buffers.take(HEADER_BYTES) as page:
        count = read_from_start(file.fd, (page,))
        try:
            header = decode_header(page[:count])
        except RecordForeign as error:
            if _is_other_version(page):
                raise OtherVersion(str(error)) from error
            raise
    check_header(header, ref, header.payload_bytes)
    if header.record_bytes != file.status.st_size:
        raise RecordCorrupt(
            f"the file has {file.status.st_size} bytes, its header says {header.record_bytes}"
        )
    return header


def verify_record(file: OpenFile, ref: RecordRef, buffers: AlignedBuffers) -> RecordHeader:
    """Read all of it into scratch memory and check everything. Raises RecordInvalid (or OtherVersion), OSError."""
    header = read_header(file, ref, buffers)
    is_raw_size(header.payload_bytes, file.status.st_size)
    with buffers.take(max(header.payload_bytes, PAGE_BYTES)) as out:
        return read_record(file, ref, header.payload_bytes, out, buffers)


def _is_other_version(page: memoryview) -> bool:
    version = int.from_bytes(page[_VERSION_AT], "little")
    return bytes(page[: len(MAGIC)]) == MAGIC and version != FORMAT_VERSION
