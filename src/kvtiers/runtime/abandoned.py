"""Caches that were collected without having been closed: what they held is let go of by the ticker.

The collector may run on a thread that holds any lock of ours, so adding takes none.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Protocol

from kvtiers.core.messages import SessionId


class Closable(Protocol):
    """A node, as far as it is needed here."""

    @property
    def closing(self) -> bool:
        """Whether `close` was called."""
        ...

    def close_session(self, session: SessionId) -> None:
        """End one client."""
        ...

    def close(self) -> bool:
        """End everything."""
        ...


class Abandoned:
    """Sessions to be closed; None stands for the node, which goes with its only cache."""

    def __init__(self) -> None:
        self._sessions: deque[SessionId | None] = deque()

    def add(self, session: SessionId | None) -> None:
        """On any thread, whatever it holds."""
        self._sessions.append(session)

    def let_go(self, node: Closable) -> None:
        """On the ticker, which can't close the node itself: that waits for it to end."""
        while self._sessions:
            session = self._sessions.popleft()
            if session is not None:
                node.close_session(session)
            elif not node.closing:
                threading.Thread(target=node.close, name="kvtiers-closer", daemon=True).start()
