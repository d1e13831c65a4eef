"""When a client's slots may be used again: the books of who may still write to what it was given.

An engine is several processes that write to each other's slots (a scheduler is given them, its workers copy), so a lost client is
let go of when every process that its engine had at that time is gone, or has said that it uses no slot any more. A socket's end
alone proves nothing: a forked child may hold it, or the process may go on without it.

Pure: no sockets, no processes. Clients and processes are whatever the caller names them by.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

C = TypeVar("C", bound=Hashable)
P = TypeVar("P", bound=Hashable)


class Departures(Generic[C, P]):
    """Clients in, the clients to let go of out. Each client is let go of exactly once."""

    def __init__(self) -> None:
        self._process: dict[C, P] = {}
        self._engine: dict[C, Hashable] = {}
        self._members: dict[Hashable, set[C]] = {}
        self._gone: set[P] = set()
        self._waits: dict[C, set[P]] = {}

    def joined(self, client: C, process: P, engine: bytes) -> None:
        """A client maps the arena. `engine`: equal for all its processes; empty: this process is all of it."""
        group: Hashable = engine or ("process", process)
        self._process[client] = process
        self._engine[client] = group
        self._members.setdefault(group, set()).add(client)

    def lost(self, client: C) -> None:
        """Its connection is over, its processes may go on. Idempotent."""
        if client in self._engine and client not in self._waits:
            members = self._members[self._engine[client]]
            self._waits[client] = {self._process[member] for member in members} - self._gone

    def settled(self, client: C) -> list[C]:
        """It has said that nobody uses its slots any more."""
        return [client] if self._let_go(client) else []

    def goodbye(self, client: C) -> list[C]:
        """The same, and its process uses no slot of others either, unless it has another connection."""
        process, group = self._process.get(client), self._engine.get(client)
        released = self.settled(client)
        if released and process is not None:
            rest = self._members.get(group, set())
            if not any(self._process[member] == process for member in rest):
                released += self._stop_waiting(rest, process)
        return released

    def gone(self, process: P) -> list[C]:
        """The process has ended. Its clients count as lost; others may wait for it though its own were let go of before."""
        mine = [client for client, owner in self._process.items() if owner == process]
        if mine:
            self._gone.add(process)
        for client in mine:
            self.lost(client)
        return self._stop_waiting(self._waits, process)

    def knows(self, process: P) -> bool:
        """Whether anything still depends on this process."""
        return process in self._process.values() or any(process in waits for waits in self._waits.values())

    def _stop_waiting(self, members: Iterable[C], process: P) -> list[C]:
        released = []
        for client in list(members):
            waits = self._waits.get(client)
            if waits is not None:
                waits.discard(process)
                if not waits and self._let_go(client):
                    released.append(client)
        return released

    def _let_go(self, client: C) -> bool:
        process = self._process.pop(client, None)
        if process is None:
            return False
        self._waits.pop(client, None)
        group = self._engine.pop(client)
        self._members[group].discard(client)
        if not self._members[group]:
            del self._members[group]
        if process not in self._process.values():
            self._gone.discard(process)
        return True
