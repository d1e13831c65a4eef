"""Ctrl-C comes when a call has done its bookkeeping, not in the middle of it.

Python raises KeyboardInterrupt between any two instructions of the main thread: in the middle of the core's books that would be a
lease that never goes back. So what does not wait is done with the interrupt put off; what waits (`flush`, `result`, `close`) can
be interrupted while it does. Only for SIGINT, and only where Python code would handle it; other threads are never interrupted.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_active: _Noted | None = None
"""The main thread's, while it is inside."""


class _Noted:
    """Stands for a handler of SIGINT, and remembers that it was wanted."""

    __slots__ = ("came", "frame", "handler")

    def __init__(self, handler: Any) -> None:
        self.handler = handler
        self.came = False
        self.frame: FrameType | None = None

    def __call__(self, _: int, frame: FrameType | None) -> None:
        self.came, self.frame = True, frame


class Uninterrupted:
    """A `with` block that an interrupt can't cut: it is handled at the block's end, from where it may raise. Blocks may be nested."""

    __slots__ = ("_noted",)

    def __enter__(self) -> None:
        global _active
        self._noted: _Noted | None = None
        if _active is not None or threading.get_ident() != threading.main_thread().ident:
            return
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # ignored, or left to the system: no Python code would run
            return
        noted = self._noted = _Noted(handler)
        try:
            signal.signal(signal.SIGINT, noted)
        except ValueError:  # not the main interpreter: it is never interrupted either
            self._noted = None
            return
        _active = noted

    def __exit__(self, *_: object) -> None:
        global _active
        noted = self._noted
        if noted is None:
            return
        _active = None
        found: object = signal.signal(signal.SIGINT, noted.handler)
        if found is not noted:  # somebody has set another one meanwhile
            signal.signal(signal.SIGINT, found)  # type: ignore[arg-type]
        if noted.came:
            noted.handler(signal.SIGINT, noted.frame)
