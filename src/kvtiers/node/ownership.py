"""Who serves a socket path, and what the one before left behind.

A lock file beside the socket (`flock`, so it ends with its owner) says who serves it: two services can't fight over one path, and
whoever has the lock may replace the socket of one that was killed. The file also names the owner's arena, by its inode. As long as
engines have that arena mapped its memory is taken, so the next service first waits until no process maps it: memory doesn't double.
Engines drop it as soon as they notice the end, at their next step.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvtiers.model.errors import DirectoryInUse
from kvtiers.node.address import SocketRefused, prepare_directory

_log = logging.getLogger(__name__)

_ARENA_NAME: Final = "/memfd:kvtiers-arena"
_POLL_S: Final = 0.1
_MAX_RECORD_BYTES: Final = 4096


class LeftBehind(NamedTuple):
    """The arena of the service before this one."""

    pid: int
    inode: int
    nbytes: int


class Ownership:
    """Owns a socket path from `take` to `release`, or the end of the process."""

    def __init__(self, socket_path: Path) -> None:
        self.socket_path: Final = socket_path
        self._fd = -1

    def take(self) -> LeftBehind | None:
        """Returns what an earlier owner left. Raises DirectoryInUse naming the owner there is, SocketRefused."""
        prepare_directory(self.socket_path)
        path = self.socket_path.with_name(self.socket_path.name + ".lock")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise SocketRefused(f"{path} can't be opened: {error.strerror}") from error
        record = _read(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno != errno.EWOULDBLOCK:
                raise SocketRefused(f"{path} can't be locked: {error.strerror}") from error
            raise DirectoryInUse(
                f"{self.socket_path} is served by process {record.get('pid', '?')}: stop that service, or give --socket another path"
            ) from None
        self._fd = fd
        record = _read(fd)  # what was read before may have been the last owner's, still at work
        if record.get("inode") and record.get("boot") == _boot_id():
            return LeftBehind(int(record["pid"]), int(record["inode"]), int(record["nbytes"]))
        self._write({})
        return None

    def serves(self, arena_fd: int) -> None:
        """From now on engines may map this arena."""
        found = os.fstat(arena_fd)
        self._write({"inode": found.st_ino, "nbytes": found.st_size, "boot": _boot_id()})

    def release(self) -> None:
        """Idempotent. The file stays: removing it would let two owners lock two files of one name."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _write(self, arena: dict[str, Any]) -> None:
        record = json.dumps({"pid": os.getpid(), **arena}).encode()
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, record + b"\n", 0)


def wait_for_memory(
    left: LeftBehind,
    timeout: float,
    *,
    give_up: Callable[[], bool] = lambda: False,
    mappers: Callable[[int], list[int]] | None = None,
) -> list[int]:
    """Wait until no process maps that arena; returns those that still do at the time-out. `give_up`: asked ten times a second."""
    find = mappers or mappers_of
    deadline = time.monotonic() + timeout
    pids = find(left.inode)
    if pids:
        _log.warning(
            "processes %s still map the %.0f MiB of service %d, which has ended: waiting up to %.0f s for them to notice",
            ", ".join(map(str, pids)),
            left.nbytes / (1 << 20),
            left.pid,
            timeout,
        )
    while pids and time.monotonic() < deadline and not give_up():
        time.sleep(_POLL_S)
        pids = find(left.inode)
    return pids


def mappers_of(inode: int, proc: Path = Path("/proc")) -> list[int]:
    """Processes of this user that map the arena with this inode, as far as `/proc` shows them."""
    wanted = str(inode)
    return sorted(
        int(process.name)
        for process in proc.iterdir()
        if process.name.isdigit() and _maps(process / "maps", wanted)
    )


def _maps(path: Path, inode: str) -> bool:
    try:
        with path.open() as lines:
            return any(_ARENA_NAME in line and line.split(maxsplit=5)[4] == inode for line in lines)
    except OSError:  # another user's, or gone
        return False


def _boot_id() -> str:
    """Inodes of one boot mean nothing in another."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _read(fd: int) -> dict[str, Any]:
    try:
        record = json.loads(os.pread(fd, _MAX_RECORD_BYTES, 0) or b"{}")
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
