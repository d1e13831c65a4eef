"""When a guard tries again, how long it waits before that, and how long the next try may take. Its clock is moved by the test only."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from kvtiers.model.errors import (
    RecordCorrupt,
    RecordForeign,
    RecordMissing,
    StoreError,
    StoreFull,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.stores.guard import Guard, GuardPolicy, Operation, OpOutcome
from kvtiers.testing.faulty_store import Delay, Fail, FaultyStore
from kvtiers.testing.store_kit import make_part, reads_back, slot

if TYPE_CHECKING:
    from tests.stores.conftest import Clock, MakeGuard


PART = make_part(1, 5000)


def test_a_passing_failure_is_retried_with_growing_pauses(
    guarded: MakeGuard, faulty: FaultyStore, clock: Clock
) -> None:
    guard = guarded()
    faulty.inject(Fail(StoreTransient), Operation.WRITE, times=3)
    assert guard.write(PART) > 0
    assert clock.slept == pytest.approx([0.1, 0.2, 0.4])
    assert guard.counters().retries == 3
    assert guard.counters().finished == {(Operation.WRITE, OpOutcome.OK): 1}
    assert reads_back(guard, PART)


def test_retries_end_and_the_last_error_comes_out(guarded: MakeGuard, faulty: FaultyStore) -> None:
    guard = guarded(max_retries=2)
    faults = faulty.inject(Fail(StoreTransient, "still broken"), Operation.WRITE, times=None)
    with pytest.raises(StoreTransient, match="still broken"):
        guard.write(PART)
    assert faults.hits == 3


@pytest.mark.parametrize("error", [RecordMissing, RecordCorrupt, RecordForeign, StoreFull, StoreUnavailable])
def test_nothing_but_a_passing_failure_is_retried(
    guarded: MakeGuard, faulty: FaultyStore, clock: Clock, error: type[StoreError]
) -> None:
    guard = guarded()
    faults = faulty.inject(Fail(error), Operation.READ, times=None)
    with pytest.raises(error):
        reads_back(guard, PART)
    assert faults.hits == 1
    assert clock.slept == []


def test_no_retry_begins_that_could_not_end_before_the_deadline(
    guarded: MakeGuard, faulty: FaultyStore, clock: Clock
) -> None:
    guard = guarded(max_retries=10, read_deadline_s=1.0)
    faulty.inject(Fail(StoreTransient), Operation.READ, times=None)
    started = clock.now
    with pytest.raises(StoreTransient):
        reads_back(guard, PART)
    assert clock.slept == pytest.approx([0.1, 0.2, 0.4])  # the next pause, .8, would end at 1.5
    assert clock.now - started < 1.0


def test_a_retry_is_given_only_what_remains_of_the_operations_time(
    faulty: FaultyStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []

    @contextmanager
    def within_time(seconds: float) -> Iterator[None]:
        given.append(seconds)
        yield

    def inject(times: int) -> None:
        monkeypatch.setattr(faulty, "within_time", within_time)
        for _ in range(times):
            faulty.inject(Delay(0.25), Operation.READ)
            faulty.inject(Fail(StoreTransient), Operation.READ)

    monkeypatch.setattr(faulty, "_sleep", clock.sleep)
    policy = GuardPolicy(jitter=0.0, base_delay_s=0.1, read_deadline_s=1.0)
    guard = Guard(faulty, policy, clock=clock, sleep=clock.sleep)
    guard.write(PART)
    inject(2)
    assert reads_back(guard, PART)
    assert given == pytest.approx([0.65, 0.2])  # nothing for the first try: the store's own time-out holds
    given.clear()
    inject(1)
    out = slot(5000)
    guard.read_into(PART.ref, out, 5000, deadline=clock.now + 0.5)
    assert given == pytest.approx([0.15])


def test_a_callers_nearer_deadline_counts(guarded: MakeGuard, faulty: FaultyStore, clock: Clock) -> None:
    guard = guarded(max_retries=10)
    faulty.inject(Fail(StoreTransient), Operation.EXISTS, times=None)
    with pytest.raises(StoreTransient):
        guard.exists([PART.ref], deadline=clock.now + 0.25)
    assert clock.slept == pytest.approx([0.1])


def test_a_deadline_that_has_passed_allows_one_try(guarded: MakeGuard, clock: Clock) -> None:
    guard = guarded()
    assert guard.exists([PART.ref], deadline=clock.now - 5) == [False]
    assert guard.tick().overdue == 0


def test_pauses_are_jittered_by_the_random_source_given(faulty: FaultyStore, clock: Clock) -> None:
    faulty.inject(Fail(StoreTransient), Operation.WRITE, times=3)
    policy = GuardPolicy(jitter=0.5, base_delay_s=1.0, backoff_factor=2)
    Guard(faulty, policy, clock=clock, sleep=clock.sleep, rng=random.Random(7)).write(PART)
    expected = random.Random(7)
    assert clock.slept == [pause * (1 - 0.5 * expected.random()) for pause in (1.0, 2.0, 4.0)]


def test_retrying_stops_when_the_breaker_opens(
    guarded: MakeGuard, faulty: FaultyStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = guarded(max_retries=10, failures_to_open=1, base_delay_s=0.01)
    faults = faulty.inject(Fail(StoreTransient), Operation.WRITE, times=None)
    faulty.inject(Fail(StoreUnavailable), Operation.READ)

    def sleep_while_another_call_fails(seconds: float) -> None:
        clock.sleep(seconds)
        if faults.hits == 2:
            with pytest.raises(StoreUnavailable):
                reads_back(guard, PART)

    monkeypatch.setattr(guard, "_sleep", sleep_while_another_call_fails)
    with pytest.raises(StoreTransient):
        guard.write(PART)
    assert faults.hits == 3
