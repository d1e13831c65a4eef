"""Unfinished files in a shared directory: names that no two stores give, and removing what dead hosts left.

    <path>/tmp/<host>-<pid>-<store>-<n>.tmp

Host and pid are for the operator who looks there; containers may have both in common, so a random number tells stores apart. Whether
a host is dead nobody can know. Age tells, by the clock of the file server alone: that of a file just written against theirs.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import socket
import stat
from typing import Final

from kvtiers.stores.disk.names import TEMP_DIRECTORY

_NAME: Final = re.compile(r"[A-Za-z0-9._]{1,64}-[0-9]+-[0-9a-f]{8}-[0-9]+\.tmp")
_LOOKED_AT_MOST: Final = 256


class TempFiles:
    """The unfinished files below `path`, of this store and of others."""

    def __init__(self, path: str) -> None:
        host = re.sub(r"[^A-Za-z0-9._]", "_", socket.gethostname())[:64] or "_"
        self.directory = f"{path}/{TEMP_DIRECTORY}"
        self._prefix = f"{self.directory}/{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self._numbers = itertools.count()
        self._passed = 0
        """Entries of the directory that were looked at and left where they are, since the last time from its beginning."""

    def new(self) -> str:
        """A path that nobody else uses."""
        return f"{self._prefix}-{next(self._numbers)}.tmp"

    def reap(self, older_than: float) -> int:
        """Remove unfinished files last written before that time of the file server. Raises OSError.

        Looks at 256 files, at most, and goes on behind them the next time, so that those which can't be removed hide no others.
        """
        looked = removed = 0
        with os.scandir(self.directory) as entries:
            for entry in itertools.islice(entries, self._passed, self._passed + _LOOKED_AT_MOST):
                looked += 1
                if _NAME.fullmatch(entry.name) and _remove_if_older(entry, older_than):
                    removed += 1
        self._passed = self._passed + looked - removed if looked == _LOOKED_AT_MOST else 0
        return removed


def _remove_if_older(entry: os.DirEntry[str], than: float) -> bool:
    try:
        status = entry.stat(follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or status.st_mtime >= than:
            return False
        os.unlink(entry.path)
    except OSError:
        return False  # another host did it, or it is not ours to remove
    return True
