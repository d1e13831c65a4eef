"""A load as its caller holds it: chunks lie ready one after the other, it is answered once, then released once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from kvtiers.core.tickets import LoadSlot, LoadTicket
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier

_log = logging.getLogger(__name__)
_FARTHEST_FIRST: Final = tuple(reversed(Tier))


class StagedLoad:
    """Chunks being staged, then lying leased in memory. Release it when their bytes have been copied.

    After the answer: `slots` (one for each chunk matched), `tiers`, `stopped_by`.
    """

    __slots__ = (
        "_answered",
        "_callbacks",
        "_held",
        "_lock",
        "_on_ready",
        "_release",
        "_released",
        "_used",
        "ticket",
    )

    def __init__(self, ticket: LoadTicket, release: Callable[[LoadTicket, range | None], None]) -> None:
        self.ticket = ticket
        self._release = release
        self._lock = threading.Lock()
        self._answered = threading.Event()
        self._callbacks: list[Callable[[], None]] = []
        self._on_ready: Callable[[], None] | None = None
        self._held = False
        self._released = False
        self._used: range | None = None

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

    def when_ready(self, callback: Callable[[], None]) -> None:
        """Call back when more chunks are `ready` and the answer is still to come, on whichever thread brings them; at once if some
        are. It must not block. Calls may overlap each other, and the one of the answer.
        """
        self._on_ready = callback
        if self.ready:
            callback()

    @property
    def ready(self) -> int:
        """Chunks from the start that lie leased in memory, before the answer: what is counted here stays until the release."""
        return self.ticket.ready

    def slots(self, begin: int = 0, end: int | None = None) -> list[LoadSlot]:
        """Where the matched chunks lie. Only between answer and release; up to `ready` before the answer."""
        return self.ticket.slots(begin, end)

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Where each matched chunk came from."""
        return tuple(self.ticket.tiers)

    @property
    def farthest(self) -> Tier | None:
        """The slowest tier that anything of it was found in by now; None if nothing was."""
        return self.farther(None)

    def farther(self, known: Tier | None) -> Tier | None:
        """The same, or the tier that it was when the load was opened: a probe may have found a farther one, what was cut was waited for."""
        found = {known, *self.ticket.tiers}
        return next((tier for tier in _FARTHEST_FIRST if tier in found), None)

    @property
    def stopped_by(self) -> MissReason | None:
        """Why no more chunks were matched; None if all were."""
        return self.ticket.stopped_by

    def hold(self) -> bool:
        """Put every release off until `let_go`, as chunks are being copied before the answer; False if it has been released."""
        with self._lock:
            self._held = not self._released
            return self._held

    def let_go(self) -> None:
        """The copying has ended: a release that was put off is due."""
        with self._lock:
            due = self._held and self._released
            self._held = False
        if due:
            self._release(self.ticket, self._used)

    def release(self, used: range | None = None) -> None:
        """Give the leases back; idempotent. `used`: the chunks that were copied out, which count as hits; None: all."""
        with self._lock:
            if self._released:
                return
            self._released, self._used = True, used
            if self._held:
                return
        self._release(self.ticket, used)

    def advance(self) -> None:
        """For the node: more chunks are ready. It never raises, as `settle`."""
        if self._on_ready is None:
            return
        try:
            self._on_ready()
        except Exception:  # noqa: BLE001 - see settle
            _log.exception("copying what lies ready of a load failed to begin; this is a bug in kvtiers")

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
