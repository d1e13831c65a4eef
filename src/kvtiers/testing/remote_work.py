"""Calls of a store that tests make while its engine dies or stops: each on a daemon thread, so that one that hangs fails its test and no other.

`Work` keeps a store busy; `ends` makes one call; `works` waits until the store's engine is back; `comes_back` reads a record that may be gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, ParamSpec, Self, TypeVar

from kvtiers.model.errors import (
    RecordInvalid,
    RecordMissing,
    StoreError,
    StoreFull,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.model.parts import RecordRef
from kvtiers.stores.base import RecordStore
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.sealed_parts import make_part, slot

T = TypeVar("T")
P = ParamSpec("P")

HANG_S: Final = 40.0
"""A call that takes longer than this hangs. Time-outs of the stores under test are a second or two; one call may be several of them."""
TROUBLE: Final = (StoreTransient, StoreUnavailable)


class Work:
    """Threads that write and read the same few records of 1 to 3 MiB again and again, and note what went wrong."""

    def __init__(self, store: RecordStore, *, writers: int, readers: int) -> None:
        self._store = store
        self._parts = [make_part(number, 1_000_000 * (number + 1) + number) for number in range(3)]
        self._payloads = [bytes(part.payload) for part in self._parts]
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._turns = 0
        self._troubled: set[int] = set()
        jobs = [self._write] * writers + [self._read] * readers
        self._threads = len(jobs)
        self._calls = [begin(self._loop, number, job) for number, job in enumerate(jobs)]

    def wait_for_turns(self, count: int) -> None:
        """Until so many more calls have gone well."""
        with self._lock:
            wanted = self._turns + count
        self._wait(lambda: self._turns >= wanted)

    def wait_for_trouble(self) -> None:
        """Until every thread has had a call that failed (from now on)."""
        with self._lock:
            self._troubled.clear()
        self._wait(lambda: len(self._troubled) == self._threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ending.set()
        if kind is None:
            for call in self._calls:
                call.result(HANG_S)

    def _wait(self, condition: Callable[[], bool]) -> None:
        assert wait_until(lambda: condition() or any(call.done() for call in self._calls), HANG_S)
        for call in self._calls:
            if call.done():
                call.result()
                raise AssertionError("a thread has ended too early")

    def _loop(self, number: int, job: Callable[[int], bool]) -> None:
        turn = number
        while not self._ending.is_set():
            turn += 1
            try:
                went_well = job(turn % len(self._parts))
            except (*TROUBLE, StoreFull):  # an engine that is coming back may not have its memory yet
                with self._lock:
                    self._troubled.add(number)
                self._ending.wait(0.02)
                continue
            with self._lock:
                self._turns += went_well

    def _write(self, which: int) -> bool:
        self._store.write(self._parts[which])
        return True

    def _read(self, which: int) -> bool:
        return comes_back(self._store, self._parts[which].ref, self._payloads[which])


def comes_back(store: RecordStore, ref: RecordRef, *payloads: bytes) -> bool:
    """Whether the record is there: then with one of these payloads, of equal size. AssertionError if it has other bytes, or is damaged."""
    nbytes = len(payloads[0])
    out = slot(nbytes)
    try:
        store.read_into(ref, out, nbytes)
    except RecordMissing:
        return False
    except RecordInvalid as error:
        raise AssertionError(f"nobody has damaged it: {error}") from error
    assert any(out[:nbytes] == payload for payload in payloads)
    return True


def works(store: RecordStore, timeout: float) -> bool:
    """Wait until its probe succeeds."""

    def probed() -> bool:
        try:
            ends(store.probe)
        except StoreError:
            return False
        return True

    return wait_until(probed, timeout)


def begin(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
    """On a daemon thread of its own."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="kit-call", daemon=True).start()
    return future


def ends(call: Callable[[], T]) -> T:
    """The call's result; TimeoutError if it hangs."""
    return begin(call).result(HANG_S)
