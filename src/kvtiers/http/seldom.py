"""Whoever reaches the port can make uvicorn warn at each request: such lines are logged once a minute, or they would fill the disk.

A filter of its logger. Any thread; errors pass as they are.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

UVICORN: Final = "uvicorn.error"
_PAUSE_S: Final = 60.0
_MOST_KINDS: Final = 64


class Seldom(logging.Filter):
    """Of equal warnings the first of each minute, with the number of those left out before it."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[float, int]] = {}
        """When it was last let through, and how many were not since."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this one is logged."""
        if record.levelno > logging.WARNING:
            return True
        text = record.getMessage()
        with self._lock:
            last, left_out = self._seen.get(text, (float("-inf"), 0))
            if record.created - last < _PAUSE_S:
                self._seen[text] = (last, left_out + 1)
                return False
            if len(self._seen) >= _MOST_KINDS:
                self._seen.clear()
            self._seen[text] = (record.created, 0)
        if left_out:
            record.msg, record.args = f"{text} ({left_out} more since the last such line)", ()
        return True


_seldom: Final = Seldom()


def warn_seldom() -> None:
    """Have uvicorn's warnings filtered in this process. Idempotent."""
    logging.getLogger(UVICORN).addFilter(_seldom)
