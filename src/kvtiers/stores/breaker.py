"""The breaker's states and when they change. Pure: the clock comes in as `now`, the caller's lock guards it (`guard.py`).

    CLOSED ──failures_to_open in a row, or a stall──▶ OPEN ──a probe begins──▶ HALF_OPEN ──it succeeds──▶ CLOSED
                                                       ▲                           │
                                                       └────────it fails───────────┘   the delay to the next one doubles

While OPEN or HALF_OPEN nothing but the probe reaches the store.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

_GROWTH: Final = 2.0


class BreakerState(StrEnum):
    """Whether operations reach the store."""

    CLOSED = "closed"
    """They do."""
    OPEN = "open"
    """They are refused at once."""
    HALF_OPEN = "half_open"
    """They are refused; one probe is under way."""


class Breaker:
    """Counts failures in a row and decides when to ask the store again."""

    def __init__(self, failures_to_open: int, probe_after_s: float, probe_after_max_s: float) -> None:
        self._failures_to_open = failures_to_open
        self._first_delay = probe_after_s
        self._longest_delay = probe_after_max_s
        self._delay = probe_after_s
        self._probe_at = 0.0
        self._unreported: list[BreakerState] = []
        self.state = BreakerState.CLOSED
        self.failures_in_a_row = 0
        self.opened = 0
        """How often it has opened."""

    def answered(self) -> None:
        """The store did what a working store does (also: "no such record", "no space")."""
        if self.state is BreakerState.CLOSED:
            self.failures_in_a_row = 0

    def failed(self, now: float) -> None:
        """One more operation failed, or went past its deadline."""
        if self.state is BreakerState.CLOSED:
            self.failures_in_a_row += 1
            if self.failures_in_a_row >= self._failures_to_open:
                self.trip(now)

    def trip(self, now: float) -> None:
        """Open at once."""
        if self.state is BreakerState.CLOSED:
            self._delay = self._first_delay
            self._probe_at = now + self._delay
            self.opened += 1
            self._enter(BreakerState.OPEN)

    def revived(self, now: float) -> None:
        """An operation given up as overdue has ended well after all: ask again now rather than at the end of the delay."""
        self._probe_at = min(self._probe_at, now)

    def claim_probe(self, now: float) -> bool:
        """Whether a probe is due. If it is, the next one becomes due a delay later, should this one never begin."""
        if self.state is not BreakerState.OPEN or now < self._probe_at:
            return False
        self._probe_at = now + self._delay
        return True

    def begin_probe(self) -> bool:
        """Whether the caller may probe now: only one at a time, and only while open."""
        if self.state is not BreakerState.OPEN:
            return False
        self._enter(BreakerState.HALF_OPEN)
        return True

    def probe_succeeded(self) -> None:
        """The store works again."""
        self.failures_in_a_row = 0
        self._enter(BreakerState.CLOSED)

    def probe_failed(self, now: float) -> None:
        """It does not; wait longer before the next probe."""
        self._delay = min(self._delay * _GROWTH, self._longest_delay)
        self._probe_at = now + self._delay
        self._enter(BreakerState.OPEN)

    def take_changes(self) -> tuple[BreakerState, ...]:
        """The states entered since the last call, in order; at most the last 8."""
        changes = tuple(self._unreported)
        self._unreported.clear()
        return changes

    def _enter(self, state: BreakerState) -> None:
        self.state = state
        self._unreported.append(state)
        del self._unreported[:-8]
