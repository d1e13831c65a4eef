"""Pieces over RDMA. **Not run on an RDMA host**: see `rdma_client.py`, which knows the client.

Pieces alone go this way. Names are asked for, manifests read and swapped, and all is removed over TCP (`values.py`), which the same server serves on the same
port: there the client of InfiniStore's package has no time-outs, and would do nothing faster. Hosts with and without RDMA share records.

- Each call ends by its deadline. A connection whose answer did not come in time is given up, its buffer with it; there are never more of these that have not ended
  than connections in use, and beyond that calls fail.
- All goes through the connections' own buffers, one copy more. The arena is not registered: the server could write to it after a call that was given up.
- A read is not told the value's length: what is too short, too long or wrong shows in the checksums that every record has.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from kvtiers.model.errors import RecordMissing, StoreFull, StoreTransient, StoreUnavailable
from kvtiers.records.codecs.base import Codec
from kvtiers.stores.base import RecordStore
from kvtiers.stores.connections import Connections
from kvtiers.stores.infinistore.frames import Status
from kvtiers.stores.infinistore.rdma_client import Connection, Link, check, connect
from kvtiers.stores.infinistore.values import InfiniStoreSettings, InfiniStoreValues
from kvtiers.stores.key_values import Value
from kvtiers.stores.pieces import PiecedStore

_LEAST_BYTES: Final = 4096
"""Smaller pieces go over TCP."""


class RdmaValues(InfiniStoreValues):
    """A client of an InfiniStore server that moves pieces by RDMA."""

    def __init__(self, settings: InfiniStoreSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        self._lanes = Connections(
            settings.rdma_connections,
            settings.timeout_s,
            waits=self._connections.waits,
            key="storage.remote.infinistore.rdma_connections",
        )
        self._changed = threading.Condition()
        self._open = False
        self._idle: list[Link] = []
        self._ending: set[Link] = set()
        self._given_up = 0

    def open(self) -> None:
        """Raises StoreUnavailable without the package, the device, or the right to lock memory."""
        check(self._settings)
        super().open()
        with self._changed:
            self._open = True

    def put(self, values: Sequence[Value]) -> None:
        by_tcp, by_rdma = self._split(values)
        if by_tcp:
            super().put(by_tcp)
        if by_rdma:
            with self._link() as (link, until):
                for name, memory in by_rdma:
                    link.buffer[: memory.nbytes] = memory
                    self._transfer(link, name, memory.nbytes, until, writing=True)

    def get_into(self, values: Sequence[Value]) -> None:
        """A value of another length is not told from one that is wrong."""
        by_tcp, by_rdma = self._split(values)
        if by_tcp:
            super().get_into(by_tcp)
        if by_rdma:
            with self._link() as (link, until):
                for name, memory in by_rdma:
                    self._transfer(link, name, memory.nbytes, until, writing=False)
                    memory[:] = link.buffer[: memory.nbytes]

    def probe(self) -> None:
        """Also whether there is a connection for RDMA, or can be."""
        super().probe()
        with self._link():
            pass

    def close(self) -> None:
        super().close()
        with self._changed:
            self._open = False
            self._end_idle()
            self._changed.wait_for(lambda: not self._ending, self._timeout_s)

    def stats(self) -> Mapping[str, int]:
        """`rdma_given_up`: connections whose answer did not come; `rdma_ending`: those of these that have not ended, with their buffers."""
        with self._changed:
            counts = {"rdma_given_up": self._given_up, "rdma_ending": len(self._ending)}
        return {**super().stats(), **counts}

    # --- inside -------------------------------------------------------------------------------------------------------

    def _split(self, values: Sequence[Value]) -> tuple[list[Value], list[Value]]:
        """Those for TCP, and those for RDMA."""
        chosen: tuple[list[Value], list[Value]] = [], []
        for value in values:
            chosen[_LEAST_BYTES <= value.memory.nbytes <= self.piece_bytes].append(value)
        return chosen

    @contextmanager
    def _link(self) -> Iterator[tuple[Link, float]]:
        """A connection for one call, and the call's deadline."""
        with (
            self._channels.time.within(self._timeout_s) as until,
            self._connections.use(until),
            self._lanes.use(until),
        ):
            link = self._take(until)
            try:
                link.wait(until)
                yield link, until
            finally:
                self._put_back(link)

    def _transfer(self, link: Link, name: str, nbytes: int, until: float, *, writing: bool) -> None:
        try:
            code = link.transfer(name, nbytes, until, writing=writing)
        except TimeoutError:
            self._check_open()
            raise StoreTransient(f"{name}: no answer by RDMA within {self._timeout_s:g} s") from None
        if code == Status.MISSING:
            raise RecordMissing(f"{name} is not there")
        if code == Status.FULL:
            raise StoreFull(f"{name}: InfiniStore has no room for it")
        if code != Status.OK:
            raise StoreTransient(f"{name}: InfiniStore answers {code} by RDMA")

    def _check_open(self) -> None:
        if not self._open:
            raise StoreUnavailable("the InfiniStore client is closed")

    def _take(self, until: float) -> Link:
        most, left = self._settings.rdma_connections, max(0.0, until - time.monotonic())
        with self._changed:
            self._changed.wait_for(lambda: not self._open or self._idle or len(self._ending) < most, left)
            self._check_open()
            if self._idle:
                return self._idle.pop()
            if len(self._ending) >= most:
                raise StoreTransient(
                    f"{most} connections to InfiniStore by RDMA were given up and do not end"
                )
            return Link(self._connect, self.piece_bytes, self._has_ended)

    def _put_back(self, link: Link) -> None:
        with self._changed:
            if link.error is not None:
                return  # there never was a connection
            if link.usable and self._open:
                self._idle.append(link)
            else:
                self._given_up += not link.usable
                self._idle.append(link)
                self._end_idle()  # what has happened to one has happened to all
            self._changed.notify_all()

    def _end_idle(self) -> None:
        """With the lock held."""
        for link in self._idle:
            self._ending.add(link)
            link.end()
        self._idle.clear()

    def _has_ended(self, link: Link) -> None:
        with self._changed:
            self._ending.discard(link)
            self._idle = [one for one in self._idle if one is not link]
            self._changed.notify_all()

    def _connect(self, base: int, nbytes: int) -> Connection:
        """By the link's thread. The client's own try has neither a time-out nor a message: so the server is reached by TCP first."""
        with self._channels.use():
            pass
        return connect(self._settings, base, nbytes)


def infinistore_rdma_store(settings: InfiniStoreSettings, codec: Codec) -> RecordStore:
    """Records in the InfiniStore server that `settings` name, their pieces moved by RDMA."""
    return PiecedStore(RdmaValues(settings), codec=codec)
