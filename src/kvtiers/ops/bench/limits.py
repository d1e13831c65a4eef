"""The machine's own speed in memory: bare copies, and copies with the checksum, by the plainest code there is.

Memory is mapped with huge pages where the kernel gives them, touched before the clock starts, and far larger than the caches.
Threads are started once; a round costs them two queue hand-overs.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from kvtiers.ops.bench.measure import seconds_of
from kvtiers.records.checksum import checksum

Bytes = npt.NDArray[np.uint8]
_THREADS: Final = 2


def prefaulted(nbytes: int) -> Bytes:
    """Page-aligned memory, every page of it there."""
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without transparent huge pages
        pass
    memory = np.frombuffer(mapping, np.uint8)
    memory.fill(1)
    return memory


def flat(array: npt.NDArray[Any]) -> Bytes:
    """The bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8)


class MemoryLimits:
    """Copies between two pieces of memory of equal size, cut into pieces of `piece_bytes` where a checksum follows."""

    def __init__(self, piece_bytes: int) -> None:
        self._piece = piece_bytes
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="bench-limit")

    def copy(self, target: Bytes, source: Bytes) -> float:
        """One thread."""
        return seconds_of(lambda: np.copyto(target, source))

    def copy_in_pieces(self, target: Bytes, source: Bytes) -> float:
        """One thread, a chunk at a time: what one call gains by its size (stores that bypass the caches) is left out."""
        return seconds_of(lambda: self._copy_pieces(target, source))

    def copy_in_two(self, target: Bytes, source: Bytes) -> float:
        """Half by each of two threads."""
        return self._halves(lambda start, end: np.copyto(target[start:end], source[start:end]), len(target))

    def copy_and_sum(self, target: Bytes, source: Bytes) -> float:
        """One thread: copy a chunk, take the xxh3-128 of what was written, next chunk."""
        return seconds_of(lambda: self._copy_sum(target, source, 0, len(target)))

    def copy_and_sum_in_two(self, target: Bytes, source: Bytes) -> float:
        """The same, half of the chunks by each of two threads."""
        return self._halves(lambda start, end: self._copy_sum(target, source, start, end), len(target))

    def copy_then_sum_beside(self, target: Bytes, source: Bytes) -> float:
        """One thread copies, the other follows it with the checksums."""

        def work() -> None:
            sums = []
            for start in range(0, len(target), self._piece):
                piece = slice(start, start + self._piece)
                np.copyto(target[piece], source[piece])
                sums.append(self._pool.submit(checksum, target[piece].data))
            for one in sums:
                one.result()

        return seconds_of(work)

    def _copy_pieces(self, target: Bytes, source: Bytes) -> None:
        for at in range(0, len(target), self._piece):
            piece = slice(at, at + self._piece)
            np.copyto(target[piece], source[piece])

    def _copy_sum(self, target: Bytes, source: Bytes, start: int, end: int) -> None:
        for at in range(start, end, self._piece):
            piece = slice(at, min(at + self._piece, end))
            np.copyto(target[piece], source[piece])
            checksum(target[piece].data)

    def _halves(self, work: Callable[[int, int], object], nbytes: int) -> float:
        middle = -(-nbytes // self._piece) // 2 * self._piece or nbytes // 2
        spans = [(0, middle), (middle, nbytes)]

        def both() -> None:
            for one in [self._pool.submit(work, *span) for span in spans]:
                one.result()

        return seconds_of(both)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
