"""The core as many threads share it: one mutex, and what is done after it is free.

Under the mutex there is no I/O, no logging, no callback. What the core wants done is taken out under it and handed out behind it;
answers are delivered there, and what is refused comes back as completions. All of that stands in queues and is taken one by one, by
whichever thread. What a callback does comes out of the loop it was called from, not out of a deeper one. An interrupt (Ctrl-C in a
notebook) is put off until all of it is done.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar

from kvtiers.core.core import Core
from kvtiers.core.messages import Completion, Intent
from kvtiers.runtime.forked import ParentsLock
from kvtiers.runtime.loads import StagedLoad
from kvtiers.runtime.uninterrupted import Uninterrupted

T = TypeVar("T")
_LONGEST_WAIT_S = 0.1
"""A wait looks again after so long, should it have missed being woken."""


class SharedCore:
    """A core, its mutex, and the loads whose answers are due. Any thread may call."""

    def __init__(
        self, core: Core, clock: Callable[[], float], submit: Callable[[Intent], Iterable[Completion]]
    ) -> None:
        """`submit` hands an intent to whoever does it, without blocking, and returns completions of what it refuses."""
        self._core = core
        self._clock = clock
        self._submit = submit
        self._lock: threading.Lock | ParentsLock = threading.Lock()
        self._news: threading.Condition | ParentsLock = threading.Condition()
        """Not of the mutex: a wait that is interrupted might give back a lock that it does not hold."""
        self._changes = 0
        self.loads: dict[int, StagedLoad] = {}
        """Not released yet, by ticket; only touched under the mutex."""
        self._answers: deque[StagedLoad] = deque()
        self._notices: dict[StagedLoad, None] = {}
        """Loads of which more lies ready; a load stands here once at most."""
        self._intents: deque[Intent] = deque()
        self._refused: deque[Completion] = deque()
        self._going_on = False
        """Whether loads are to be matched further after what was refused; only touched under the mutex."""
        self._draining: set[int] = set()
        """Threads that are handing out at this moment."""
        self._disowned = False

    def run(self, action: Callable[[Core, float], T]) -> T:
        """Do something with the core, then what follows from it."""
        with Uninterrupted():
            try:
                with self._lock:
                    return action(self._core, self._clock())
            finally:
                self._drain()

    def look(self, action: Callable[[Core], T]) -> T:
        """Read the core; `action` must be quick and change nothing that has consequences."""
        with Uninterrupted(), self._lock:
            return action(self._core)

    def complete(self, completion: Completion) -> None:
        """An intent has ended."""
        more = self.run(lambda core, now: core.complete(completion, now))
        while more:
            more = self.run(lambda core, now: core.go_on(now))

    def wait_while(self, count: Callable[[Core], int], timeout: float) -> int:
        """Wait until `count` is 0; returns what it is at the time-out."""
        deadline = time.monotonic() + timeout
        while True:
            seen = self._changes
            left_over = self.look(count)
            left = deadline - time.monotonic()
            if not left_over or left <= 0:
                return left_over
            with self._news:
                if seen == self._changes:
                    self._news.wait(min(left, _LONGEST_WAIT_S))

    def disown(self, lock: ParentsLock) -> None:
        """In a forked child: nobody gets at the core."""
        self._lock = self._news = lock
        self._disowned = True

    def _drain(self) -> None:
        me = threading.get_ident()
        if me in self._draining or self._disowned:
            return
        try:
            self._draining.add(me)
            while self._collect():
                while (ready := _pop_key(self._notices)) is not None:
                    ready.advance()
                while (load := _pop(self._answers)) is not None:
                    load.settle()
                while (intent := _pop(self._intents)) is not None:
                    self._refused.extend(self._submit(intent))
        finally:
            self._draining.discard(me)

    def _collect(self) -> bool:
        """Take from the core what is to be done; False if nothing is."""
        with self._lock:
            while self._refused:
                self._going_on |= self._core.complete(self._refused.popleft(), self._clock())
            if self._going_on:
                self._going_on = self._core.go_on(self._clock())
            self._core.move_intents(self._intents)
            for ticket in self._core.advanced():
                if (load := self.loads.get(ticket.id)) is not None:
                    self._notices[load] = None
            answered = (self.loads.pop(ticket.id, None) for ticket in self._core.answered())
            self._answers.extend(load for load in answered if load is not None)
            more = bool(self._intents or self._answers or self._notices or self._going_on)
        with self._news:
            self._changes += 1
            self._news.notify_all()
        return more


def _pop_key(queue: dict[T, None]) -> T | None:
    """Any one, or None: other threads take from it too."""
    try:
        return queue.popitem()[0]
    except KeyError:
        return None


def _pop(queue: deque[T]) -> T | None:
    """The first one, or None: other threads take from it too."""
    try:
        return queue.popleft()
    except IndexError:
        return None
