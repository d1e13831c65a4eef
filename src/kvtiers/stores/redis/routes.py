"""Which server has a name: the one there is, the master that sentinels name, or a shard of a cluster. Any thread.

What was learnt is kept until a server fails or sends us elsewhere (`doubt`); then the next call asks again. One thread asks at a
time, the others wait for it no longer than their own deadline.
"""

from __future__ import annotations

import binascii
import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from kvtiers.model.errors import StoreError, StoreTransient, StoreUnavailable
from kvtiers.stores.redis.settings import Address
from kvtiers.stores.redis.wire import ErrorReply, Reply

_SLOTS: Final = 16_384
_LEARNT: Final = 8
"""So many nodes are asked for the table beside those of the endpoint."""

ASK = Callable[[Address, Sequence[Sequence[bytes]], float], list[Reply]]
"""Sends small commands to a server, with a deadline. Raises StoreTransient, StoreUnavailable."""


class Routes(ABC):
    """Where names are kept."""

    @abstractmethod
    def of(self, name: bytes, deadline: float) -> Address:
        """The server that has this name. Raises StoreTransient, StoreUnavailable."""

    @abstractmethod
    def all(self, deadline: float) -> list[Address]:
        """Every server that has some."""

    @abstractmethod
    def doubt(self) -> None:
        """A server has failed, or says that another one is in charge."""


class OneServer(Routes):
    """It has all names."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def of(self, name: bytes, deadline: float) -> Address:
        return self._address

    def all(self, deadline: float) -> list[Address]:
        return [self._address]

    def doubt(self) -> None:
        return


class SentinelMaster(Routes):
    """The master has all names; sentinels say which one it is now."""

    def __init__(self, sentinels: Sequence[Address], master: str, ask: ASK) -> None:
        self._sentinels = list(sentinels)
        self._name = master
        self._ask = ask
        self._turn = _Turn()
        self._master: Address | None = None

    def of(self, name: bytes, deadline: float) -> Address:
        found = self._master
        if found is None:
            with self._turn.taken(deadline):
                found = self._master = self._master or self._find(deadline)
        return found

    def all(self, deadline: float) -> list[Address]:
        return [self.of(b"", deadline)]

    def doubt(self) -> None:
        self._master = None

    def _find(self, deadline: float) -> Address:
        troubles: list[str] = []
        for sentinel, until in shared_out(self._sentinels, deadline):
            try:
                (answer,) = self._ask(
                    sentinel, [(b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._name.encode())], until
                )
            except StoreError as error:
                troubles.append(str(error))
                continue
            if isinstance(answer, list) and len(answer) == 2:
                host, port = answer
                if isinstance(host, bytes) and isinstance(port, bytes):
                    self._sentinels.remove(sentinel)
                    self._sentinels.insert(0, sentinel)
                    return Address(host.decode(), int(port))
            said = answer.text if isinstance(answer, ErrorReply) else f"no master {self._name!r} known"
            troubles.append(f"{sentinel} says: {said}")
        raise StoreUnavailable(f"no sentinel names a master: {'; '.join(troubles)}")


class ClusterSlots(Routes):
    """Names are spread over shards by the CRC of what stands in braces."""

    def __init__(self, seeds: Sequence[Address], ask: ASK) -> None:
        self._given = list(seeds)
        self._seeds = list(seeds)
        """In the order to be asked; changed by the thread whose turn it is."""
        self._ask = ask
        self._turn = _Turn()
        self._table: tuple[list[int], list[Address | None]] | None = None

    def of(self, name: bytes, deadline: float) -> Address:
        starts, owners = self._learnt(deadline)
        owner = owners[bisect_right(starts, slot_of(name)) - 1]
        if owner is None:
            self.doubt()
            raise StoreTransient("no server of the cluster has this slot")
        return owner

    def all(self, deadline: float) -> list[Address]:
        _, owners = self._learnt(deadline)
        return sorted({owner for owner in owners if owner is not None})

    def doubt(self) -> None:
        self._table = None

    def _learnt(self, deadline: float) -> tuple[list[int], list[Address | None]]:
        table = self._table
        if table is None:
            with self._turn.taken(deadline):
                table = self._table = self._table or self._learn(deadline)
        return table

    def _learn(self, deadline: float) -> tuple[list[int], list[Address | None]]:
        troubles: list[str] = []
        for node, until in shared_out(self._seeds, deadline):
            try:
                (answer,) = self._ask(node, [(b"CLUSTER", b"SLOTS")], until)
            except StoreError as error:
                troubles.append(str(error))
                self._seeds.remove(node)  # whoever hangs is asked last
                self._seeds.append(node)
                continue
            if isinstance(answer, ErrorReply):
                troubles.append(f"{node} says: {answer.text}")
                continue
            table = _table(answer, node)
            if table is None:
                troubles.append(f"{node} knows no slots")
                continue
            learnt = [node, *(owner for owner in table[1] if owner is not None)]
            self._seeds = list(dict.fromkeys([*list(dict.fromkeys(learnt))[:_LEARNT], *self._given]))
            return table
        raise StoreUnavailable(f"no node of the cluster tells where its slots are: {'; '.join(troubles)}")


def slot_of(name: bytes) -> int:
    """The hash slot of a name (Redis cluster specification: CRC-16/XMODEM of what stands in the first braces)."""
    start = name.find(b"{")
    if start >= 0:
        end = name.find(b"}", start + 1)
        if end > start + 1:
            name = name[start + 1 : end]
    return binascii.crc_hqx(name, 0) % _SLOTS


def _table(answer: Reply, asked: Address) -> tuple[list[int], list[Address | None]] | None:
    """Where each range of slots begins, and its master; None if the answer makes no sense or has no slots."""
    if not isinstance(answer, list):
        return None
    ranges: list[tuple[int, int, Address]] = []
    for entry in answer:
        match entry:
            case [int(first), int(last), [bytes() | None as host, int(port), *_], *_]:
                # No host: "the one you have asked".
                ranges.append((first, last, Address(host.decode() if host else asked.host, port)))
            case _:
                return None
    if not ranges:
        return None
    starts: list[int] = [0]
    owners: list[Address | None] = [None]
    for first, last, owner in sorted(ranges):
        if starts[-1] == first:
            owners[-1] = owner
        else:
            starts.append(first)
            owners.append(owner)
        starts.append(last + 1)
        owners.append(None)
    return starts, owners


def shared_out(addresses: Sequence[Address], deadline: float) -> Iterator[tuple[Address, float]]:
    """Each address with a deadline of its own, so that one that hangs leaves time for the others."""
    for place, address in enumerate(list(addresses)):
        now = time.monotonic()
        yield address, now + (deadline - now) / (len(addresses) - place)


class _Turn:
    """One thread asks, the others wait for what it learns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, deadline: float) -> Iterator[None]:
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise StoreTransient("it took too long to learn which server is in charge")
        try:
            yield
        finally:
            self._lock.release()
