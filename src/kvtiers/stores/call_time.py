"""One deadline for what a thread asks of an engine in several steps: a record's pieces, its manifest, and what they replace."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class CallTime(threading.local):
    """The deadline of what this thread is doing; one object for each client of an engine."""

    until = math.inf
    """On `time.monotonic`."""

    def left(self) -> float:
        """Seconds; none if it has passed."""
        return max(0.0, self.until - time.monotonic())

    @contextmanager
    def within(self, seconds: float) -> Iterator[float]:
        """What is done inside ends in so many seconds, or at the deadline of what it is part of; gives that deadline."""
        outer = self.until
        self.until = min(outer, time.monotonic() + seconds)
        try:
            yield self.until
        finally:
            self.until = outer
