"""An event loop on a daemon thread of its own: how threads call async code, always of one loop, always with a deadline.

Clients of remotes belong to the loop that first used them, so each backend keeps one loop for as long as it is driven. Code
that blocks the loop makes its callers' deadlines pass; it keeps neither them nor the process waiting.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

from kvtiers.model.errors import CacheClosed, DeadlineExceeded

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for other threads. The thread starts with the first of them, ends with `close` or with the object."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._owner = os.getpid()
        self._end: Callable[[], object] = _nothing

    def run(self, make: Callable[[], Coroutine[Any, Any, T]], timeout: float) -> T:
        """What the coroutine returns or raises. Raises DeadlineExceeded and cancels it at the deadline, CacheClosed after `close`."""
        future = self.start(make)
        try:
            return future.result(timeout)
        except TimeoutError:
            if future.done():
                return future.result()  # it came just now, or the error is its own
            future.cancel()
            raise DeadlineExceeded(f"{self._name} gave no answer within {timeout} s") from None
        except CancelledError:
            raise CacheClosed(
                f"{self._name} was closed, or gave up by itself, before it had answered"
            ) from None

    def start(self, make: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Begin a coroutine and don't wait. Raises CacheClosed."""
        with self._lock:
            if self._closed:
                raise CacheClosed(f"{self._name} is closed")
            if os.getpid() != self._owner:
                raise CacheClosed(f"{self._name} was made before this process was forked")
            loop = self._loop or self._begin()
            return asyncio.run_coroutine_threadsafe(make(), loop)

    def close(self, timeout: float) -> bool:
        """Cancel what runs and end the thread; idempotent. False if it had not ended at the time-out."""
        with self._lock:
            self._closed = True
        self._end()
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(timeout)
        return not thread.is_alive()

    def _begin(self) -> asyncio.AbstractEventLoop:
        """With the lock held."""
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run, args=(loop,), name=f"kvtiers-{self._name}", daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, _stop, loop, os.getpid())
        self._loop = loop
        return loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _stop(loop: asyncio.AbstractEventLoop, owner: int) -> None:
    if os.getpid() != owner:  # a forked child has the loop's pipe, but not its thread
        return
    try:
        loop.call_soon_threadsafe(loop.stop)
    except RuntimeError:
        pass  # closed already


def _nothing() -> None:
    """There is no thread to end."""
