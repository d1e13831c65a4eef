"""The service's arena as a client maps it: shared, not inherited by forks, unmapped when the last view is gone.

Nothing here trusts the descriptor: its seals and size are checked first, so that no later resize can turn a copy into SIGBUS.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvtiers.memory import syscalls
from kvtiers.model.layout import PAGE_BYTES
from kvtiers.node.framing import ProtocolError

Bytes = npt.NDArray[np.uint8]

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class MappedArena:
    """`nbytes` of the service's memory, mapped until it is dropped and no view is alive. Any thread."""

    def __init__(self, fd: int, nbytes: int, arena_id: bytes) -> None:
        """Takes `fd` over and closes it: the mapping needs it no more. Raises ProtocolError, OSError."""
        try:
            size = os.fstat(fd).st_size
            if size != nbytes:
                raise ProtocolError(f"the arena has {size} bytes, the service says {nbytes}")
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise ProtocolError("the arena is not sealed against resizing")
            range_ = _SharedRange(fd, nbytes)
        finally:
            os.close(fd)
        self._memory: Bytes | None = np.asarray(range_)
        self.id: Final = arena_id
        self.nbytes: Final = nbytes

    def view(self, offset: int, nbytes: int) -> Bytes | None:
        """The bytes `[offset, offset + nbytes)`, writable; `offset` is a multiple of 4 KiB. None after `drop`.

        Raises ProtocolError outside the arena.
        """
        memory = self._memory
        if memory is None:
            return None
        if offset % PAGE_BYTES or not 0 <= offset <= offset + nbytes <= self.nbytes:
            raise ProtocolError(f"a slot of {nbytes} bytes at {offset}: the arena has {self.nbytes}")
        return memory[offset : offset + nbytes]

    def drop(self) -> None:
        """No new views; unmapped at once, or with the last view."""
        self._memory = None


class _SharedRange:
    """The base of every view. Never unmapped in a forked child, where the address may be something else's."""

    def __init__(self, fd: int, nbytes: int) -> None:
        address = syscalls.map_shared(fd, nbytes)
        end = weakref.finalize(self, _unmap_in, os.getpid(), address, nbytes)
        end.atexit = False  # daemon threads may still copy; the kernel unmaps when the process is gone
        syscalls.advise(address, nbytes, syscalls.Advice.DONTFORK)
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
        }


def _unmap_in(owner_pid: int, address: int, nbytes: int) -> None:
    if os.getpid() == owner_pid:
        syscalls.unmap(address, nbytes)
