"""Wakes an epoll loop from other threads: an eventfd that nobody writes to after it is closed."""

from __future__ import annotations

import os
import threading


class Wake:
    """`signal` from any thread makes `fileno` readable."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self._fd

    def signal(self) -> None:
        """Never blocks; nothing after `close`."""
        with self._lock:  # or the number could be another file's by now
            if self._fd >= 0:
                try:
                    os.eventfd_write(self._fd, 1)
                except BlockingIOError:
                    pass  # it is awake

    def clear(self) -> None:
        """Before looking at what the signals were about."""
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)
