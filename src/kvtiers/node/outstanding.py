"""Requests that wait for their answer, each with the time at which nobody waits any longer."""

from __future__ import annotations

import heapq
from typing import Final

from kvtiers.node.handles import Load, Store

_SPARE: Final = 4096


class Outstanding:
    """Loads and stores by op. Not thread-safe."""

    def __init__(self) -> None:
        self._waiting: dict[int, Load | Store] = {}
        self._deadlines: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, handle: Load | Store, deadline: float) -> None:
        """One more."""
        self._waiting[handle.op] = handle
        heapq.heappush(self._deadlines, (deadline, handle.op))
        if len(self._deadlines) > _SPARE + 2 * len(self._waiting):  # most were answered before their deadline
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._waiting]
            heapq.heapify(self._deadlines)

    def get(self, op: int) -> Load | Store | None:
        """It, if it still waits."""
        return self._waiting.get(op)

    def pop(self, op: int) -> Load | Store | None:
        """It waits no longer."""
        return self._waiting.pop(op, None)

    def overdue(self, now: float) -> list[Load | Store]:
        """Take those whose time is over."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, op = heapq.heappop(self._deadlines)
            handle = self._waiting.pop(op, None)
            if handle is not None:
                late.append(handle)
        return late

    def take_all(self) -> list[Load | Store]:
        """Take all of them."""
        handles = list(self._waiting.values())
        self._waiting.clear()
        self._deadlines.clear()
        return handles
