"""What is known of a store's health: when it was last checked, and what was wrong. Pure: the guard's lock guards it."""

from __future__ import annotations

from typing import NamedTuple


class StoreHealth(NamedTuple):
    """For an operator."""

    up: bool
    """Operations reach it, and it has answered since the last check-up that failed."""
    checked_s_ago: float
    """Seconds since a check-up last ended; opening the store was the first."""
    error: str | None
    """What is wrong; None while it is up."""


class HealthRecord:
    """Of one store."""

    __slots__ = ("_checked_at", "_error", "_unwell")

    def __init__(self, now: float) -> None:
        self._checked_at = now
        self._error: str | None = None
        self._unwell = False

    def checked(self, now: float) -> None:
        """A check-up has ended; `answered` or `failed` says how."""
        self._checked_at = now

    def answered(self) -> None:
        """The store did what a working store does."""
        self._error = None
        self._unwell = False

    def failed(self, error: str, *, check_up: bool) -> None:
        """An operation failed, or was not answered in time. One check-up that fails is bad news; another operation is tried again."""
        self._error = error
        self._unwell |= check_up

    def read(self, now: float, *, reached: bool) -> StoreHealth:
        """`reached`: whether operations reach the store at all."""
        up = reached and not self._unwell
        return StoreHealth(up, max(0.0, now - self._checked_at), None if up else self._error)


def told(error: BaseException | None) -> str:
    """An error as one line."""
    return f"{type(error).__name__}: {error}"
