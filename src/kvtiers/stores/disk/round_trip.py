"""Whether a directory works: one page written to it, read back and removed."""

from __future__ import annotations

import os

from kvtiers.model.errors import StoreUnavailable
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.records.buffers import AlignedBuffers
from kvtiers.stores.disk.direct_io import open_new, read_from_start, write_from_start
from kvtiers.stores.disk.record_file import opened


def page_goes_round(path: str, direct_flags: int, buffers: AlignedBuffers) -> None:
    """Write a page to `path`, which must not exist, read it back and remove it. Raises OSError, StoreUnavailable."""
    try:
        fd = open_new(path, direct_flags)
        try:
            with buffers.take(PAGE_BYTES) as page:
                page[:] = bytes(PAGE_BYTES)
                write_from_start(fd, (page,))
        finally:
            os.close(fd)
        with opened(path, direct_flags) as file, buffers.take(PAGE_BYTES) as page:
            if read_from_start(file.fd, (page,)) != PAGE_BYTES:
                raise StoreUnavailable(
                    f"{os.path.dirname(path)} did not give back the page that was written to it"
                )
    finally:
        try:
            os.unlink(path)
        except OSError:
            pass
