"""Worker pools: order, bounds, what happens to jobs that raise, hang or never begin."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from kvtiers.core.messages import OpId, Priority
from kvtiers.runtime.pools import Job, WorkerPool

WAIT_S = 20.0


class Script:
    """Makes jobs that note what became of them."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.dropped: list[int] = []

    def job(
        self, number: int, priority: Priority = Priority.STORE, work: Callable[[], object] | None = None
    ) -> Job:
        def run() -> None:
            if work is not None:
                work()
            self.ran.append(number)

        return Job(OpId(number), priority, run, lambda: self.dropped.append(number))


class Stuck:
    """Work that hangs until it is freed."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.free = threading.Event()

    def __call__(self) -> None:
        self.begun.release()
        self.free.wait(WAIT_S)

    def has_begun(self) -> bool:
        return self.begun.acquire(timeout=WAIT_S)


@pytest.fixture
def pools() -> Iterator[list[WorkerPool]]:
    made: list[WorkerPool] = []
    yield made
    for pool in made:
        assert pool.close(WAIT_S)


def make(pools: list[WorkerPool], workers: int, max_queued: int = 100) -> WorkerPool:
    pool = WorkerPool("test", workers, max_queued)
    pools.append(pool)
    return pool


def test_jobs_run_in_order_of_priority_then_of_arrival(pools: list[WorkerPool]) -> None:
    pool, script, stuck = make(pools, 1), Script(), Stuck()
    pool.submit(script.job(0, work=stuck))
    assert stuck.has_begun()
    wanted = [
        (1, Priority.DELETE),
        (2, Priority.LOAD),
        (3, Priority.STORE),
        (4, Priority.LOAD),
        (5, Priority.SEAL),
    ]
    for number, priority in wanted:
        assert pool.submit(script.job(number, priority))
    stuck.free.set()
    assert pool.wait_idle(WAIT_S)
    assert script.ran == [0, 2, 4, 5, 3, 1]


def test_a_full_queue_refuses_at_once_and_calls_neither_run_nor_drop(pools: list[WorkerPool]) -> None:
    pool, script, stuck = make(pools, 1, max_queued=2), Script(), Stuck()
    pool.submit(script.job(0, work=stuck))
    assert stuck.has_begun()
    assert pool.submit(script.job(1))
    assert pool.submit(script.job(2))
    assert not pool.submit(script.job(3, Priority.STORE))
    assert pool.health().queued == 2
    assert pool.health().refused == 1
    stuck.free.set()
    assert pool.wait_idle(WAIT_S)
    assert script.ran == [0, 1, 2]
    assert script.dropped == []


def test_a_job_that_has_not_begun_can_be_cancelled(pools: list[WorkerPool]) -> None:
    pool, script, stuck = make(pools, 1), Script(), Stuck()
    pool.submit(script.job(0, work=stuck))
    assert stuck.has_begun()
    for number in range(1, 6):
        pool.submit(script.job(number))
    assert pool.cancel(OpId(3))
    assert not pool.cancel(OpId(3))
    assert not pool.cancel(OpId(0)), "it runs already"
    stuck.free.set()
    assert pool.wait_idle(WAIT_S)
    assert script.ran == [0, 1, 2, 4, 5]
    assert script.dropped == [3]
    assert not pool.cancel(OpId(5)), "it has ended"


def test_one_thread_is_kept_for_loads_whatever_is_queued(pools: list[WorkerPool]) -> None:
    pool, script, stuck = make(pools, 3), Script(), Stuck()
    for number in range(6):
        pool.submit(script.job(number, Priority.STORE, stuck))
    assert stuck.has_begun()
    assert stuck.has_begun()
    loaded = threading.Event()
    pool.submit(script.job(10, Priority.LOAD, loaded.set))
    assert loaded.wait(WAIT_S), "two of three threads may do background work, the third is for loads"
    assert not stuck.begun.acquire(timeout=0.05), "a third store began"
    assert pool.health().busy == 2
    stuck.free.set()
    assert pool.wait_idle(WAIT_S)
    assert sorted(script.ran) == [0, 1, 2, 3, 4, 5, 10]


def test_a_single_thread_does_background_work_too(pools: list[WorkerPool]) -> None:
    pool, script = make(pools, 1), Script()
    pool.submit(script.job(1, Priority.DELETE))
    assert pool.wait_idle(WAIT_S)
    assert script.ran == [1]


def test_all_threads_serve_loads(pools: list[WorkerPool]) -> None:
    pool, script, stuck = make(pools, 3), Script(), Stuck()
    for number in range(3):
        pool.submit(script.job(number, Priority.LOAD, stuck))
    assert all(stuck.has_begun() for _ in range(3))
    stuck.free.set()
    assert pool.wait_idle(WAIT_S)


def test_a_job_that_raises_is_counted_and_the_thread_lives_on(pools: list[WorkerPool]) -> None:
    pool, script = make(pools, 1), Script()

    def fail() -> None:
        raise ZeroDivisionError

    for number in range(5):
        pool.submit(script.job(number, work=fail))
    pool.submit(script.job(9))
    assert pool.wait_idle(WAIT_S)
    assert script.ran == [9]
    assert pool.health().errors == 5
    assert pool.health().busy == 0


def test_closing_drops_what_is_queued_and_lets_what_runs_end(pools: list[WorkerPool]) -> None:
    pool, script, stuck = make(pools, 2), Script(), Stuck()
    pool.submit(script.job(0, Priority.STORE, stuck))
    assert stuck.has_begun()
    for number in range(1, 4):
        pool.submit(script.job(number, Priority.STORE))
    threading.Timer(0.05, stuck.free.set).start()
    assert pool.close(WAIT_S)
    assert script.ran == [0]
    assert sorted(script.dropped) == [1, 2, 3]
    assert not pool.submit(script.job(5))
    assert 5 not in script.dropped, "a refused job is not dropped as well"


def test_closing_does_not_wait_for_a_job_that_hangs() -> None:
    pool, script, stuck = WorkerPool("test", 2, 100), Script(), Stuck()
    pool.submit(script.job(0, Priority.LOAD, stuck))
    assert stuck.has_begun()
    assert not pool.close(0.05)  # a pool that waited for it would hang here until the test's own time-out
    assert not stuck.free.is_set()
    assert script.ran == []
    stuck.free.set()
    assert pool.close(WAIT_S)
    assert script.ran == [0]


def test_closing_from_a_job_of_the_pool_does_not_deadlock() -> None:
    pool, closed = WorkerPool("test", 1, 100), threading.Event()

    def close() -> None:
        pool.close(WAIT_S)
        closed.set()

    pool.submit(Script().job(0, work=close))
    assert closed.wait(WAIT_S)


def test_waiting_for_an_idle_pool_ends_at_the_time_out(pools: list[WorkerPool]) -> None:
    pool, script, stuck = make(pools, 1), Script(), Stuck()
    assert pool.wait_idle(0.0)
    pool.submit(script.job(0, work=stuck))
    assert not pool.wait_idle(0.05)
    stuck.free.set()
    assert pool.wait_idle(WAIT_S)


def test_no_job_is_lost_between_many_submitters_and_cancels(pools: list[WorkerPool]) -> None:
    pool, script = make(pools, 4, max_queued=10_000), Script()
    refused: list[int] = []

    def submit(first: int) -> None:
        for number in range(first, first + 500):
            priority = Priority(number % len(Priority))
            if not pool.submit(script.job(number, priority)):
                refused.append(number)
            if number % 7 == 0:
                pool.cancel(OpId(number))

    threads = [threading.Thread(target=submit, args=(first,)) for first in range(0, 4000, 500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert pool.wait_idle(WAIT_S)
    assert sorted([*script.ran, *script.dropped, *refused]) == list(range(4000))
