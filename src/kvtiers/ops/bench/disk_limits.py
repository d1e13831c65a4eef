"""The disk's own speed: whole files of a record's size read and written by the plainest code, by one, two and four threads.

Past the page cache (O_DIRECT) and through it. A file is written under a temporary name and renamed, as any store must; with
`fsync` its data are synced before and its directory after that.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from kvtiers.model.layout import PAGE_BYTES
from kvtiers.ops.bench.limits import Bytes, prefaulted
from kvtiers.ops.bench.measure import Contestant, seconds_of
from kvtiers.ops.bench.page_cache import drop_from_page_cache

THREADS: Final = (1, 2, 4)


class DiskLimits:
    """`files` files of `record_bytes` (a multiple of 4 KiB) below `directory`, and the memory for them."""

    def __init__(self, directory: Path, files: int, record_bytes: int) -> None:
        self._directory = directory
        self._size = record_bytes
        self._count = files
        self._memory = prefaulted(files * record_bytes)
        self._memory[::PAGE_BYTES] = np.arange(len(self._memory) // PAGE_BYTES, dtype=np.uint32) % 251
        self._pools = {threads: ThreadPoolExecutor(threads, f"bench-disk-{threads}") for threads in THREADS}
        directory.mkdir()
        self.direct = _offers_direct(directory)
        self._to_read = [directory / f"read-{number}" for number in range(files)]
        for number, file in enumerate(self._to_read):
            _write(file, self._piece(number), os.O_DIRECT if self.direct else 0, sync=True)
        self.warm_shares: list[float] = []

    def readers(self) -> dict[str, Contestant]:
        """Cold reads of all files, each into memory of its own."""
        return {
            f"read {name}, {_threads(threads)}": self._reader(flags, threads)
            for name, flags in self._ways()
            for threads in THREADS
        }

    def writers(self, *, sync: bool) -> dict[str, Contestant]:
        """Writes of as many new files, removed afterwards."""
        return {
            f"write {name}, {_threads(threads)}": self._writer(flags, threads, sync)
            for name, flags in self._ways()
            for threads in THREADS
        }

    def _ways(self) -> list[tuple[str, int]]:
        return [*([("O_DIRECT", os.O_DIRECT)] if self.direct else []), ("buffered", 0)]

    def _reader(self, flags: int, threads: int) -> Contestant:
        def turn() -> float:
            self.warm_shares.append(drop_from_page_cache(self._to_read))
            return self._all(threads, lambda number: _read(self._to_read[number], self._piece(number), flags))

        return turn

    def _writer(self, flags: int, threads: int, sync: bool) -> Contestant:
        def write(number: int) -> None:
            _write(self._directory / f"write-{number}", self._piece(number), flags, sync=sync)

        def turn() -> float:
            seconds = self._all(threads, write)
            for number in range(self._count):
                (self._directory / f"write-{number}").unlink()
            return seconds

        return turn

    def _all(self, threads: int, work: Callable[[int], object]) -> float:
        pool = self._pools[threads]
        return seconds_of(lambda: list(pool.map(work, range(self._count))))

    def _piece(self, number: int) -> Bytes:
        return self._memory[number * self._size : (number + 1) * self._size]

    def close(self) -> None:
        """End the threads. The files go with their directory."""
        for pool in self._pools.values():
            pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _offers_direct(directory: Path) -> bool:
    probe = directory / "probe"
    page = prefaulted(PAGE_BYTES)
    try:
        _write(probe, page, os.O_DIRECT, sync=False)
        _read(probe, page, os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def _read(file: Path, into: Bytes, flags: int) -> None:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        done = 0
        while done < len(into):
            count = os.preadv(fd, [into[done:].data], done)
            if count == 0:
                raise OSError(errno.EIO, f"{file.name} ends after {done} of {len(into)} bytes")
            done += count
    finally:
        os.close(fd)


def _write(file: Path, data: Bytes, flags: int, *, sync: bool) -> None:
    temporary = file.with_suffix(".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | flags, 0o600)
    try:
        done = 0
        while done < len(data):
            done += os.pwritev(fd, [data[done:].data], done)
        if sync:
            os.fdatasync(fd)
    finally:
        os.close(fd)
    temporary.rename(file)
    if sync:
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
