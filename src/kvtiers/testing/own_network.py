"""A network namespace for a test whose servers would listen on every address of the host: a command run in it sees a loopback of its own.

Needs Linux with `unshare` and `ip`, and one of: root, user namespaces, sudo without a password.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Final

_UP: Final = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
_TRY_S: Final = 20.0


def in_own_network(command: Sequence[str]) -> list[str] | None:
    """`command`, to be run in a namespace of its own, as the same user; None if this process may not make one."""
    for way in _ways():
        if _works([*way, "true"]):
            return [*way, *command]
    return None


def _ways() -> list[list[str]]:
    if os.geteuid() == 0:
        return [["unshare", "--net", *_UP]]
    as_before = ["setpriv", f"--reuid={os.geteuid()}", f"--regid={os.getegid()}", "--init-groups"]
    return [
        ["unshare", "--user", "--map-root-user", "--net", *_UP],
        ["sudo", "-n", "--preserve-env", "unshare", "--net", *_UP, *as_before],
    ]


def _works(command: Sequence[str]) -> bool:
    if shutil.which(command[0]) is None:
        return False
    try:
        tried = subprocess.run(  # noqa: S603 - the words above
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TRY_S, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return tried.returncode == 0
