"""What the instrumented run relies on: the watch sees a wait on a lock held across I/O, and the store really hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import RecordRef
from kvtiers.ops.bench.lock_watch import LockWatch, WatchedLock, watched_locks
from kvtiers.ops.bench.watched_store import WatchedStore
from kvtiers.stores.disk.settings import DiskSettings
from kvtiers.stores.disk.store import DiskStore

REF = RecordRef(b"n" * 32, ChunkKey(b"k" * 32), 0)
WAIT_S = 20.0


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


@pytest.mark.parametrize("in_io", [True, False])
def test_a_wait_for_a_lock_whose_holder_is_inside_a_store_is_told_apart(in_io: bool) -> None:
    watch = LockWatch(engine=threading.get_ident(), in_io=lambda _: in_io)
    lock = WatchedLock(watch, "somewhere")
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            free.wait(WAIT_S)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(WAIT_S)
    threading.Timer(0.05, free.set).start()
    with lock:
        pass
    holder.join(WAIT_S)
    assert len(watch.engine_waits_s) == 1
    assert watch.engine_waits_s[0] > 0.0
    assert watch.engine_waits_on_io == (["somewhere"] if in_io else [])
    assert watch.engine_acquisitions == 1
    assert (lock.holds, lock.owner, lock.locked()) == (2, None, False)
    assert lock.longest_hold_s > 0.0


def test_a_lock_that_is_free_is_no_wait_and_a_try_that_fails_neither() -> None:
    watch = LockWatch(engine=threading.get_ident())
    lock = WatchedLock(watch, "")
    with lock:
        assert lock.owner == threading.get_ident()
        assert not lock.acquire(False)
    assert watch.engine_waits_s == []


def test_locks_made_inside_are_watched_and_work_in_conditions_and_events() -> None:
    watch = LockWatch()
    real = threading.Lock
    with watched_locks(watch):
        mine: object = threading.Lock()
        assert isinstance(mine, WatchedLock)
        condition = threading.Condition(cast("threading.Lock", mine))
        event = threading.Event()
    assert threading.Lock is real
    assert watch.of(__name__) == [mine]
    assert len(watch.locks) == 2, "the event's own is one too"
    threading.Timer(0.01, event.set).start()
    assert event.wait(WAIT_S)
    with condition:
        assert not condition.wait(0.001)


def test_a_stalled_store_hangs_in_every_call_until_it_is_released(tmp_path: Path) -> None:
    under: set[int] = set()
    store = WatchedStore(DiskStore(DiskSettings((str(tmp_path),), min_free_bytes=0)), under.__contains__)
    store.open()
    assert store.exists([REF]) == [False]
    assert store.inside == set()
    store.stall()
    answers: list[object] = []
    calls: list[Callable[[], object]] = [
        lambda: store.exists([REF]),
        lambda: store.delete(REF),
        store.probe,
    ]
    threads = [threading.Thread(target=lambda call=call: answers.append(call())) for call in calls]
    for thread in threads:
        thread.start()
    assert until(lambda: len(store.inside) == 3)
    assert answers == []
    assert store.usage().records == 0, "memory only: it does not hang"
    store.release()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(answers) == 3
    assert (store.inside, store.calls, store.calls_under_mutex) == (set(), 4, 0)
    under.add(threading.get_ident())
    store.probe()
    assert store.calls_under_mutex == 1
    store.close()
