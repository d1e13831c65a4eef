"""Page-aligned scratch memory that is used again: a fresh payload-size mapping costs more than the copy into it.

Any thread may take a buffer; none ever waits for one. What the pool keeps is bounded in buffers and in bytes, lent ones
included; past the bound a buffer is mapped for one use and unmapped after it. A buffer holds whatever its last user left.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kvtiers.model.layout import PAGE_BYTES, round_to_page

_HUGE_PAGE_BYTES: Final = 2 << 20
_LOOSEST_FIT: Final = 2
"""A kept buffer serves requests down to half its size: one page must not occupy megabytes."""


class AlignedBuffers:
    """A pool of reusable page-aligned buffers that retains at most `max_buffers` and `max_bytes`."""

    def __init__(self, max_buffers: int, max_bytes: int) -> None:
        self._max_buffers = max_buffers
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._free: list[mmap.mmap] = []  # least recently returned first
        self._free_bytes = 0
        self._lent_buffers = 0
        self._lent_bytes = 0

    @contextmanager
    def take(self, nbytes: int) -> Iterator[memoryview]:
        """Lend a writable buffer of `nbytes` rounded up to 4 KiB, until the end of the `with` block.

        No slice or array of it may be used after the block. Raises OSError when the system has no memory to map.
        """
        length = max(round_to_page(nbytes), PAGE_BYTES)
        buffer = self._borrow(_size_class(length))
        view = memoryview(buffer)[:length]
        try:
            yield view
        finally:
            self._give_back(buffer, view)

    @property
    def retained_bytes(self) -> int:
        """Bytes mapped and waiting for their next use."""
        with self._lock:
            return self._free_bytes

    @property
    def lent_bytes(self) -> int:
        """Bytes in use at this moment."""
        with self._lock:
            return self._lent_bytes

    def _borrow(self, size: int) -> mmap.mmap:
        with self._lock:
            buffer = self._best_fit(size)
            if buffer is not None:
                self._free_bytes -= len(buffer)
            self._lent_buffers += 1
            self._lent_bytes += size if buffer is None else len(buffer)
        if buffer is not None:
            return buffer
        try:
            buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except BaseException:
            with self._lock:
                self._lent_buffers -= 1
                self._lent_bytes -= size
            raise
        if size >= _HUGE_PAGE_BYTES:
            try:
                buffer.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without transparent huge pages
                pass
        return buffer

    def _best_fit(self, size: int) -> mmap.mmap | None:
        best = -1
        for position in range(len(self._free) - 1, -1, -1):  # the last one returned is the warmest
            capacity = len(self._free[position])
            if size <= capacity <= size * _LOOSEST_FIT and (best < 0 or capacity < len(self._free[best])):
                best = position
        return self._free.pop(best) if best >= 0 else None

    def _give_back(self, buffer: mmap.mmap, view: memoryview) -> None:
        size = len(buffer)
        try:
            view.release()
            still_seen = False
        except BufferError:
            still_seen = True  # a system call of another thread is using it: never lend these bytes again
        dropped: list[mmap.mmap] = []  # unmapped outside the lock
        with self._lock:
            self._lent_buffers -= 1
            self._lent_bytes -= size
            if still_seen or size > self._max_bytes or self._max_buffers < 1:
                return
            self._free.append(buffer)
            self._free_bytes += size
            while self._free and (
                len(self._free) + self._lent_buffers > self._max_buffers
                or self._free_bytes + self._lent_bytes > self._max_bytes
            ):
                oldest = self._free.pop(0)
                self._free_bytes -= len(oldest)
                dropped.append(oldest)


def _size_class(nbytes: int) -> int:
    """Round up by at most an eighth, so that the slightly different lengths of encoded records fit the same buffers."""
    granule = max(PAGE_BYTES, 1 << max(nbytes.bit_length() - 4, 0))
    return -(-nbytes // granule) * granule
