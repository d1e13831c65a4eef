"""Which runs of servers were met: how a restart is noticed, with which all that a server held in memory may be gone. Any thread.

One name may stand for several servers (the configuration endpoint of a cluster, one that changes at a failover), and one server may
have several names, or come back at another address. So a run that was met under any name is no restart, wherever it is met again.
"""

from __future__ import annotations

import threading
from typing import Final, TypeVar

from kvtiers.stores.redis.settings import Address

_MET: Final = 1024

T = TypeVar("T")


class Runs:
    """The servers met last, and their runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[bytes, None] = {}
        self._servers: dict[Address, None] = {}
        self._restarts = 0

    def met(self, address: Address, run: bytes) -> None:
        """A server was connected to. `run`: empty if it does not say."""
        if not run:
            return
        with self._lock:
            self._restarts += address in self._servers and run not in self._runs
            _remember(self._servers, address)
            _remember(self._runs, run)

    def restarts(self) -> int:
        """How often a server that was known had begun a run that was not."""
        return self._restarts


def _remember(met: dict[T, None], one: T) -> None:
    """As the last of so many."""
    met.pop(one, None)
    met[one] = None
    if len(met) > _MET:
        del met[next(iter(met))]
