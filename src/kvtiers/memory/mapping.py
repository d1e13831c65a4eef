"""A sealed memfd and its one mapping, alive until it is closed and nobody has a view of it any more.

Sealed against resizing, so that no client who holds the descriptor can shrink it under us (SIGBUS). Not inherited by forked
children: neither the mapping (MADV_DONTFORK) nor the descriptor. A child that lives on keeps nothing alive and can't write.

Threads: made and closed by one thread; `memory` may be read and sliced by any.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from enum import Enum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtiers.memory import syscalls
from kvtiers.model.errors import CacheClosed

Bytes = npt.NDArray[np.uint8]

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PINNED: Final[list[Bytes]] = []  # what `leak()` keeps mapped until the process ends


class CloseOutcome(Enum):
    """What closing could do with the mapping."""

    UNMAPPED = "unmapped"
    LEAKED = "leaked"  # views are alive: the memory stays valid until the last of them goes, or for good after `leak()`


class SealedMapping:
    """`nbytes` (whole pages) of zeroed memory that no page exists of yet. Raises OSError with nothing left behind."""

    def __init__(self, nbytes: int, *, memfd_flags: int = 0) -> None:
        self._fd = -1  # for __del__, if the next line raises
        self._fd = os.memfd_create("kvtiers-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | memfd_flags)
        try:
            os.ftruncate(self._fd, nbytes)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            range_ = _MappedRange(self._fd, nbytes)
        except OSError:
            self.drop_descriptor()
            raise
        self._end = range_.end
        self._memory: Bytes | None = np.asarray(range_)
        self.address: Final[int] = self._memory.ctypes.data
        self.nbytes: Final = nbytes
        _open.add(self)

    def __del__(self) -> None:
        self.drop_descriptor()

    @property
    def memory(self) -> Bytes:
        """All of it; every slice of it keeps the mapping alive."""
        memory = self._memory
        if memory is None:
            raise CacheClosed("the arena is closed: open a new cache")
        return memory

    def fileno(self) -> int:
        """The memfd; negative after `close()` and in forked children."""
        return self._fd

    def close(self) -> CloseOutcome:
        """Unmaps at once if no view is alive, else when the last one goes. Idempotent: call again to ask again."""
        self._memory = None
        self.drop_descriptor()
        return CloseOutcome.LEAKED if self._end.alive else CloseOutcome.UNMAPPED

    def leak(self) -> CloseOutcome:
        """Close, but keep the mapping as long as the process lives."""
        if self._memory is not None:
            _PINNED.append(self._memory)
        return self.close()

    def drop_descriptor(self) -> None:
        """Close the memfd; the mapping stays."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _MappedRange:
    """The base of every view, so that the range is unmapped when the last of them is collected.

    Never in a forked child (the address may be something else's there), and never at interpreter exit, when daemon threads
    may still copy: the kernel unmaps when the process is gone.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        address = syscalls.map_shared(fd, nbytes)
        self.end: Final = weakref.finalize(self, _unmap_in, os.getpid(), address, nbytes)
        self.end.atexit = False
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
        }
        syscalls.advise(address, nbytes, syscalls.Advice.DONTFORK)


def _unmap_in(owner_pid: int, address: int, nbytes: int) -> None:
    if os.getpid() == owner_pid:
        syscalls.unmap(address, nbytes)


_open: Final[weakref.WeakSet[SealedMapping]] = weakref.WeakSet()


def _drop_descriptors_in_child() -> None:
    for mapping in list(_open):
        mapping.drop_descriptor()


os.register_at_fork(after_in_child=_drop_descriptors_in_child)
