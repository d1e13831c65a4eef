"""A result that comes from another thread: awaited from any event loop, waited for by any thread, always with a deadline.

`asyncio.wrap_future` will not do: an awaiter that gives up cancels the work under everybody else, and a loop that was closed
meanwhile breaks the thread that brings the result.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from kvtiers.model.errors import DeadlineExceeded

T = TypeVar("T")


class Answer(Generic[T]):
    """Settled once, by `succeed` or `fail`; whoever comes second is ignored. Any number may wait, any number of times."""

    __slots__ = ("_error", "_event", "_lock", "_value", "_wakers")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._wakers: list[Callable[[], None]] = []
        self._value: T | None = None
        self._error: BaseException | None = None

    def succeed(self, value: T) -> None:
        """The result is there."""
        self._settle(value, None)

    def fail(self, error: BaseException) -> None:
        """There will be none."""
        self._settle(None, error)

    def done(self) -> bool:
        """Whether waiting returns at once."""
        return self._event.is_set()

    async def wait(self, timeout: float, what: str) -> T:  # noqa: ASYNC109 - every wait has a deadline
        """The result, or what went wrong. Raises DeadlineExceeded naming `what`. Giving up changes nothing for others."""
        loop = asyncio.get_running_loop()
        woken = asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(woken.set)
            except RuntimeError:  # the loop was closed; nobody waits there any more
                pass

        with self._lock:
            waiting = not self._event.is_set()
            if waiting:
                self._wakers.append(wake)
        if waiting:
            try:
                async with asyncio.timeout(timeout):
                    await woken.wait()
            except TimeoutError:
                raise _late(what, timeout) from None
            finally:
                with self._lock:
                    if wake in self._wakers:
                        self._wakers.remove(wake)
        return self._outcome()

    def wait_blocking(self, timeout: float, what: str) -> T:
        """The same for a thread without an event loop."""
        if not self._event.wait(timeout):
            raise _late(what, timeout)
        return self._outcome()

    def _settle(self, value: T | None, error: BaseException | None) -> None:
        with self._lock:
            if self._event.is_set():
                return
            self._value, self._error = value, error
            self._event.set()
            wakers, self._wakers = self._wakers, []
        for wake in wakers:
            wake()

    def _outcome(self) -> T:
        if self._error is not None:
            raise self._error.with_traceback(None)  # each raise would add to the last one's traceback
        return cast("T", self._value)


def _late(what: str, timeout: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"{what} has not ended after {timeout} s; it may still do so")
