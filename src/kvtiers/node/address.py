"""Where the service listens: a socket in a directory that only its user can enter."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from kvtiers.model.errors import KvtiersError

_MAX_PATH_BYTES: Final = 107  # sun_path, less its terminating zero


class SocketRefused(KvtiersError):
    """The service can't listen there, and the message says what to change."""


def default_socket() -> Path:
    """`$XDG_RUNTIME_DIR/kvtiers/node.sock`, else `kvtiers-<uid>/node.sock` below the system's temporary directory.

    That one is open to all, which is why `prepare_directory` refuses what is not ours alone.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "kvtiers" / "node.sock"
    return Path(tempfile.gettempdir()) / f"kvtiers-{os.getuid()}" / "node.sock"


def operator_socket(socket_path: Path) -> Path:
    """Where the same service answers operators, by HTTP."""
    return socket_path.with_name(socket_path.name + ".http")


def prepare_directory(socket_path: Path) -> None:
    """Make the socket's directory, 0700. Raises SocketRefused if it is another's, open to others, or the path is too long."""
    directory = socket_path.parent
    longest = operator_socket(socket_path)
    if len(os.fsencode(longest)) > _MAX_PATH_BYTES:
        raise SocketRefused(
            f"--socket {socket_path}: a socket's path has at most {_MAX_PATH_BYTES} bytes, and {longest.name} is one too; "
            "take a shorter one"
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise SocketRefused(
            f"the directory {directory} can't be made: {error.strerror}; give --socket a path below one of yours"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise SocketRefused(
            f"{directory} is not a directory of user {os.getuid()}; give --socket a path below one that is"
        )
    if found.st_mode & 0o077:
        raise SocketRefused(
            f"others may enter {directory} (mode {found.st_mode & 0o777:o}): chmod 700 {directory}, or give --socket another path"
        )
