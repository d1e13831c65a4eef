"""How many connections there are, and for how long one may say nothing.

Uvicorn bounds neither those open nor how long one may take over a request, so that a few hundred silent ones would keep everybody
else out, a liveness probe first, and take the descriptors that the cache needs.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

_MOST_OPEN: Final = 256
"""Connections open; for one more the one that has been without a request for longest is closed, or it is itself."""
_IDLE_S: Final = 5
_LONGEST_REQUEST_S: Final = 120.0


class BoundedConnection(H11Protocol):
    """One connection."""

    _timer: asyncio.TimerHandle | None = None
    _seen: object = None
    """The request there was at the last look, and since when it is the same one."""
    _since = 0.0
    _heard_at = 0.0

    @property
    def idle(self) -> bool:
        """Whether no request is under way: it has not said all of one's head, or has had its answer."""
        request: Any = self.cycle  # None before the first one, whatever its type says
        return request is None or request.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = self._heard_at = self.loop.time()
        if len(self.connections) > _MOST_OPEN:
            self._make_room()
        if not transport.is_closing():
            self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self.loop.time()
        super().data_received(data)

    def _make_room(self) -> None:
        others = (one for one in self.connections if isinstance(one, BoundedConnection) and one is not self)
        idle = (one for one in others if one.idle and not one.transport.is_closing())
        last = min(idle, key=lambda one: one._heard_at, default=self)  # noqa: SLF001 - another one of these
        last.transport.abort()

    def _look_later(self) -> None:
        self._timer = self.loop.call_later(_IDLE_S, self._look)

    def _look(self) -> None:
        now = self.loop.time()
        request: object = self.cycle
        if request is not self._seen:
            self._seen, self._since = request, now
        silent = not self.idle and self.cycle.more_body and now - self._heard_at >= _IDLE_S
        if silent or now - self._since >= (_IDLE_S if self.idle else _LONGEST_REQUEST_S):
            self.transport.abort()
        else:
            self._look_later()
