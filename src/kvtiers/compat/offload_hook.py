"""Calls somebody's `offload(key, tier)` and hears how it ended, on threads with an event loop and on those without.

A coroutine runs on the caller's event loop if there is one, else on a loop thread that starts with the first of them. Each has a
deadline; no more than 1,000 are under way. `ended` is called once, with the error or None, on whatever thread brings the news.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

from kvtiers.compat.loop_thread import LoopThread
from kvtiers.model.errors import CacheClosed, StoreTransient

_MAX_UNDER_WAY: Final = 1000
_CLOSE_S: Final = 5.0

Ended: TypeAlias = Callable[[BaseException | None], object]


class AsyncOffloader(Protocol):
    """Moves the bytes of a key to another tier; `AsyncOffloadEngine` with a `source` is one. May be a plain function, too."""

    def offload(self, key: str, tier: str, /) -> Awaitable[object] | None:
        """Begin, and end when they are there. What it raises counts as a failure."""
        ...


class OffloadHook:
    """Drives an `AsyncOffloader`."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._under_way: set[asyncio.Future[object] | Future[object]] = set()
        """Held here, because an event loop holds its tasks weakly."""
        self._background: LoopThread | None = None

    def call(self, offloader: AsyncOffloader, key: str, tier: str, ended: Ended) -> bool:
        """Begin. False if it has ended before this returns: `ended` has been called. Never waits, raises nothing."""
        try:
            if len(self._under_way) >= _MAX_UNDER_WAY:
                raise StoreTransient(f"{_MAX_UNDER_WAY} offloads are under way already")
            outcome = offloader.offload(key, tier)
            if inspect.isawaitable(outcome):
                self._follow(outcome, ended)
                return True
        except Exception as error:  # noqa: BLE001 - the hook is other people's code; whoever waits is told
            ended(error)
        else:
            ended(None)
        return False

    def close(self) -> None:
        """End the loop thread, if there is one; idempotent."""
        with self._lock:
            background = self._background
        if background is not None:
            background.close(_CLOSE_S)

    def _follow(self, outcome: Awaitable[object], ended: Ended) -> None:
        async def bounded() -> object:
            async with asyncio.timeout(self._timeout_s):
                return await outcome

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            task: asyncio.Future[object] | Future[object] = self._in_background(bounded, outcome)
        else:
            task = asyncio.ensure_future(bounded())
        with self._lock:
            self._under_way.add(task)
        task.add_done_callback(partial(self._task_ended, ended))

    def _in_background(self, bounded: Callable[[], Any], outcome: Awaitable[object]) -> Future[object]:
        with self._lock:
            if self._background is None:
                self._background = LoopThread("lru-offload")
            background = self._background
        try:
            return background.start(bounded)
        except CacheClosed:
            if inspect.iscoroutine(outcome):
                outcome.close()
            raise

    def _task_ended(self, ended: Ended, task: Any) -> None:
        with self._lock:
            self._under_way.discard(task)
        ended(CacheClosed("its event loop was closed") if task.cancelled() else task.exception())
