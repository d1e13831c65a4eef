"""The process at the other end of a socket, and a descriptor that says when it is gone.

`SO_PEERPIDFD` (Linux 6.5) names the very process that connected; before that, `pidfd_open` of the pid in `SO_PEERCRED`.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from typing import Final, NamedTuple

from kvtiers.node.claims import Claims

_SO_PEERPIDFD: Final = 77
_UCRED: Final = struct.Struct("=iII")


class Peer(NamedTuple):
    """Who connected."""

    pid: int
    uid: int


def peer_of(sock: socket.socket) -> Peer:
    """From the kernel, as of the time of `connect`."""
    pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid, uid)


class Process:
    """A process that is watched until it ends. `fileno` becomes readable then."""

    def __init__(self, sock: socket.socket, claims: Claims) -> None:
        """The process that connected, and what it has open. Raises OSError (ProcessLookupError) if it can't be watched, or is gone already."""
        self.pid: Final = peer_of(sock).pid
        self._fd = _pidfd(sock, self.pid)
        self.claims: Final = claims

    def fileno(self) -> int:
        return self._fd

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        if self._fd < 0:
            return True
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Stop watching."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _pidfd(sock: socket.socket, pid: int) -> int:
    try:
        fd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        return os.pidfd_open(pid)
    os.set_inheritable(fd, False)
    return fd
