"""Which of many names are files: one stat each, one after the other where that is quick, several at a time where it is not.

On a local or cached directory a stat takes microseconds and threads would only cost; on a network it is a round trip or two
(each directory of a name is looked up as well), so a batch is spread over threads as soon as its first names took long.

The threads are daemons that end with the call: one hung in a dead mount keeps no process alive.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

_TRIED_ALONE: Final = 8
_QUICK_S: Final = 150e-6
"""A stat that takes longer went over a network."""
_ABSENT: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EACCES, errno.ELOOP})


def which_are_files(
    paths: Sequence[str], at_a_time: int, clock: Callable[[], float] = time.perf_counter
) -> list[bool]:
    """Whether each is a regular file; what can't be reached by us is none. Raises OSError where the file system failed."""
    found = [False] * len(paths)
    rest = iter(range(len(paths)))
    began = clock()
    for index in range(min(_TRIED_ALONE, len(paths))):
        found[next(rest)] = _is_file(paths[index])
    slow = clock() - began > _QUICK_S * _TRIED_ALONE
    threads = min(at_a_time, len(paths) - _TRIED_ALONE) if slow else 1
    if threads <= 1:
        for index in rest:
            found[index] = _is_file(paths[index])
    else:
        _spread(paths, found, rest, threads)
    return found


def _spread(paths: Sequence[str], found: list[bool], rest: Iterator[int], threads: int) -> None:
    lock = threading.Lock()
    failures: list[OSError] = []

    def work() -> None:
        while not failures:
            with lock:
                index = next(rest, None)
            if index is None:
                return
            try:
                found[index] = _is_file(paths[index])
            except OSError as error:
                failures.append(error)

    helpers = [threading.Thread(target=work, name="kvtiers-stat", daemon=True) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        raise
