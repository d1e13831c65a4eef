"""What a guard tells of its store's health, on a clock that only the test moves."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvtiers.model.errors import RecordMissing, StoreError, StoreFull, StoreTransient, StoreUnavailable
from kvtiers.model.parts import RecordRef
from kvtiers.stores.guard import BreakerState, Guard, GuardPolicy, Operation
from kvtiers.stores.health import StoreHealth
from kvtiers.testing.faulty_store import Fail, FaultyStore, Full, Stall
from kvtiers.testing.store_kit import make_part

PART = make_part(1, 5000)
ABSENT: RecordRef = make_part(2, 5000).ref


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guard(faulty: FaultyStore, clock: Clock) -> Guard:
    policy = GuardPolicy(max_retries=0, failures_to_open=3, read_deadline_s=5.0, write_deadline_s=5.0)
    return Guard(faulty, policy, clock=clock)


def fails(guard: Guard, faulty: FaultyStore, *on: Operation, error: type[StoreError], text: str) -> None:
    """One operation that ends so."""
    faulty.inject(Fail(error, text), *on, times=1)
    with pytest.raises(error):
        guard.check_up() if Operation.PROBE in on else guard.write(PART)


def test_a_store_that_was_just_opened_is_up(guard: Guard, clock: Clock) -> None:
    clock.now += 7
    assert guard.health() == StoreHealth(up=True, checked_s_ago=7, error=None)


def test_one_check_up_that_fails_is_shown_at_once(guard: Guard, faulty: FaultyStore, clock: Clock) -> None:
    clock.now += 30
    fails(guard, faulty, Operation.PROBE, error=StoreUnavailable, text="the cable is out")
    assert guard.state is BreakerState.CLOSED, "requests may still try"
    assert guard.health() == StoreHealth(False, 0, "StoreUnavailable: the cable is out")
    clock.now += 2
    assert guard.health().checked_s_ago == 2
    guard.check_up()
    assert guard.health() == StoreHealth(True, 0, None)


def test_any_answer_after_it_shows_that_the_store_works(guard: Guard, faulty: FaultyStore) -> None:
    fails(guard, faulty, Operation.PROBE, error=StoreTransient, text="busy")
    guard.write(PART)
    assert guard.health().up
    fails(guard, faulty, Operation.PROBE, error=StoreTransient, text="busy")
    with pytest.raises(RecordMissing):
        guard.read_into(ABSENT, memoryview(bytearray(8192)), 8192)
    assert guard.health().up
    fails(guard, faulty, Operation.PROBE, error=StoreTransient, text="busy")
    faulty.inject(Full(), Operation.WRITE)
    with pytest.raises(StoreFull):
        guard.write(make_part(3, 5000))
    assert guard.health().up


def test_an_operation_that_fails_is_no_verdict_until_the_breaker_opens(
    guard: Guard, faulty: FaultyStore
) -> None:
    for _ in range(2):
        fails(guard, faulty, Operation.WRITE, error=StoreUnavailable, text="a bad sector")
        assert guard.health() == StoreHealth(True, 0, None)
    fails(guard, faulty, Operation.WRITE, error=StoreUnavailable, text="a bad sector")
    assert guard.state is BreakerState.OPEN
    assert guard.health() == StoreHealth(False, 0, "StoreUnavailable: a bad sector")


def test_the_breakers_probes_tell_why_it_stays_open(guard: Guard, faulty: FaultyStore, clock: Clock) -> None:
    for _ in range(3):
        fails(guard, faulty, Operation.WRITE, error=StoreUnavailable, text="gone")
    for error, text in ((StoreUnavailable, "not mounted"), (StoreTransient, "mounting")):
        faulty.inject(Fail(error, text), Operation.PROBE, times=1)
        clock.now += 60
        assert guard.run_probe() is BreakerState.OPEN
        assert guard.health() == StoreHealth(False, 0, f"{error.__name__}: {text}")
    clock.now += 60
    assert guard.run_probe() is BreakerState.CLOSED
    assert guard.health() == StoreHealth(True, 0, None)


def test_a_store_that_hangs_is_down_before_it_has_answered(
    guard: Guard, faulty: FaultyStore, clock: Clock
) -> None:
    released = threading.Event()
    stalled = faulty.inject(Stall(released), Operation.PROBE)
    with ThreadPoolExecutor(1) as pool:
        hung = pool.submit(guard.check_up)
        try:
            assert stalled.wait_for_hit(30)
            clock.now += 5.5
            guard.tick()
            assert guard.health() == StoreHealth(False, 5.5, "no answer to a probe within 5 s")
        finally:
            released.set()
        hung.result(30)
    assert guard.health().checked_s_ago == 0
    assert not guard.health().up, "late is not well: the breaker's probe decides"
    assert guard.run_probe() is BreakerState.CLOSED
    assert guard.health().up
