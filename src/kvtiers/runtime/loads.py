"""A load as its caller holds it: answered once, then released once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from kvtiers.core.tickets import LoadSlot, LoadTicket
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier

_log = logging.getLogger(__name__)


class StagedLoad:
    """Chunks being staged, then lying leased in memory. Release it when their bytes have been copied.

    After the answer: `slots` (one for each chunk matched), `tiers`, `stopped_by`.
    """

    __slots__ = ("_answered", "_callbacks", "_lock", "_release", "_released", "ticket")

    def __init__(self, ticket: LoadTicket, release: Callable[[LoadTicket], None]) -> None:
        self.ticket = ticket
        self._release = release
        self._lock = threading.Lock()
        self._answered = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._released = False

    @property
    def answered(self) -> bool:
        """Whether the answer is there."""
        return self._answered.is_set()

    def wait(self, timeout: float | None) -> bool:
        """Wait for the answer, which comes at the load's deadline at the latest; False at the time-out."""
        return self._answered.wait(timeout)

    def when_answered(self, callback: Callable[[], None]) -> None:
        """Call back once, on the thread that brings the answer, or at once if it is there. It must not block."""
        with self._lock:
            if not self._answered.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def slots(self) -> list[LoadSlot]:
        """Where the matched chunks lie. Only between answer and release."""
        return self.ticket.slots()

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Where each matched chunk came from."""
        return tuple(self.ticket.tiers)

    @property
    def stopped_by(self) -> MissReason | None:
        """Why no more chunks were matched; None if all were."""
        return self.ticket.stopped_by

    def release(self) -> None:
        """Give the leases back; idempotent."""
        with self._lock:
            if self._released:
                return
            self._released = True
        self._release(self.ticket)

    def settle(self) -> None:
        """For the node: the answer is there. Idempotent; it never raises: other loads are waiting for theirs on this thread."""
        with self._lock:
            self._answered.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback()
            except Exception:  # noqa: BLE001 - see above
                _log.exception(
                    "what was to follow a load's answer failed; this is a bug in whoever asked for it"
                )
