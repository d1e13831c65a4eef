"""Making reads cold: files out of the page cache, and a look at whether they really are (mincore(2))."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from kvtiers.model.layout import PAGE_BYTES

WARM_SHARE: Final = 0.01
"""With more than this in memory a read is not called cold."""


def drop_from_page_cache(files: Iterable[Path]) -> float:
    """Ask the kernel to forget these files, written out before; returns the share of their pages still in memory."""
    resident = pages = 0
    for file in files:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)  # a dirty page stays
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            there, of = _resident_pages(fd)
        finally:
            os.close(fd)
        resident += there
        pages += of
    return resident / pages if pages else 0.0


def cold_note(shares: Iterable[float]) -> str:
    """What a figure says about its reads. `shares`: what `drop_from_page_cache` returned, before each of them."""
    worst = max(shares, default=0.0)
    if worst > WARM_SHARE:
        return f"NOT COLD: up to {worst:.0%} of the files were still in the page cache"
    return "cold reads: files out of the page cache before each turn (fadvise), seen by mincore; a host below may cache them"


def _resident_pages(fd: int) -> tuple[int, int]:
    size = os.fstat(fd).st_size
    pages = -(-size // PAGE_BYTES)
    if not pages:
        return 0, 0
    libc = ctypes.CDLL(None, use_errno=True)
    state = (ctypes.c_ubyte * pages)()
    # Copy-on-write, so that ctypes may take its address; nothing is written, and looking brings no page in.
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
        first = ctypes.c_char.from_buffer(mapping)
        try:
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), state) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        finally:
            del first
    return sum(one & 1 for one in state), pages
