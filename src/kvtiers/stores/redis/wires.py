"""The connections to all servers: few, kept open, each used by one call at a time. Any thread.

Places are bounded by `Connections`; idle wires count as well, and those to sentinels, so that never more than `limit` are open. A wire that is found dead takes
the other idle ones to that server with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from kvtiers.model.errors import StoreUnavailable
from kvtiers.stores.connections import Connections
from kvtiers.stores.redis.settings import Address
from kvtiers.stores.redis.wire import Wire, WireBroken

DIAL = Callable[[Address, float], Wire]


class Wires:
    """Wires to any number of servers."""

    def __init__(self, dial: DIAL, limit: int, timeout_s: float) -> None:
        self._dial = dial
        self._limit = limit
        self._places = Connections(limit, timeout_s)
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        """The last one used stands last."""
        self._busy: set[Wire] = set()
        self._dialling = 0
        self._closed = False
        self._made = 0

    @contextmanager
    def place(self, until: float) -> Iterator[None]:
        """A place for a call, which then uses one wire at a time. Raises StoreTransient if none gets free by then."""
        with self._places.use(until):
            yield

    @contextmanager
    def to(self, address: Address, deadline: float) -> Iterator[Wire]:
        """A wire to that server, for a call that has a place. Raises StoreTransient, StoreUnavailable; passes WireBroken on."""
        wire = self._take(address) or self._make(self._dial, address, deadline)
        try:
            yield wire
        except WireBroken:
            self._drop(wire)
            raise
        except BaseException:
            self._put_back(wire)
            raise
        self._put_back(wire)

    @contextmanager
    def once(self, dial: DIAL, address: Address, deadline: float) -> Iterator[Wire]:
        """A wire that `dial` makes, for this alone, in the place of a call that has no other one now. Raises as `to`."""
        wire = self._make(dial, address, deadline)
        try:
            yield wire
        finally:
            with self._lock:
                self._busy.discard(wire)
            wire.dispose()

    def close(self) -> None:
        """Calls under way end with WireBroken."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for wire in self._busy:
                wire.close()
        for wire in idle:
            wire.dispose()

    def closed(self) -> bool:
        """Whether `close` was called."""
        with self._lock:
            return self._closed

    def stats(self) -> Mapping[str, int]:
        """Counters and gauges."""
        with self._lock:
            counts = {
                "connections_open": len(self._idle) + len(self._busy),
                "connections_made": self._made,
            }
        return {**self._places.stats(), **counts}

    # --- inside -------------------------------------------------------------------------------------------------------

    def _take(self, address: Address) -> Wire | None:
        """An idle wire that lives."""
        while True:
            with self._lock:
                found = next((wire for wire in reversed(self._idle) if wire.address == address), None)
                if found is None:
                    return None
                self._idle.remove(found)
                self._busy.add(found)
            if found.is_idle():
                return found
            self._drop(found)

    def _make(self, dial: DIAL, address: Address, deadline: float) -> Wire:
        surplus: list[Wire] = []
        with self._lock:
            if self._closed:
                raise StoreUnavailable("the store is closed")
            self._dialling += 1
            while self._idle and len(self._idle) + len(self._busy) + self._dialling > self._limit:
                surplus.append(self._idle.pop(0))
        wire: Wire | None = None
        try:
            for one in surplus:
                one.dispose()
            wire = dial(address, deadline)
        finally:
            with self._lock:
                self._dialling -= 1
                if wire is not None:
                    self._busy.add(wire)
                    self._made += 1
        if self.closed():
            wire.close()
        return wire

    def _put_back(self, wire: Wire) -> None:
        with self._lock:
            self._busy.discard(wire)
            keep = not self._closed and wire.is_idle()
            if keep:
                self._idle.append(wire)
        if not keep:
            wire.dispose()

    def _drop(self, wire: Wire) -> None:
        """And the idle ones to the same server."""
        with self._lock:
            self._busy.discard(wire)
            dead = [one for one in self._idle if one.address == wire.address]
            self._idle = [one for one in self._idle if one.address != wire.address]
        for one in [wire, *dead]:
            one.dispose()
