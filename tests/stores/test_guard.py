"""The guard under a clock that only the test moves."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvtiers.model.errors import (
    ConfigError,
    RecordCorrupt,
    RecordForeign,
    RecordMissing,
    StoreError,
    StoreFull,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.model.parts import RecordRef
from kvtiers.stores.base import RecordStore
from kvtiers.stores.disk import DiskSettings, DiskStore
from kvtiers.stores.guard import BreakerState, Guard, GuardPolicy, Operation, OpOutcome
from kvtiers.testing.disk_damage import damage_file, record_files
from kvtiers.testing.faulty_store import Delay, Fail, FaultyStore, Stall
from kvtiers.testing.store_kit import Damage, RecordStoreContract, make_part, reads_back, slot

PATIENCE = 30.0


class Clock:
    """Time that passes only by sleeping or by `advance`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


MakeGuard = Callable[..., Guard]


@pytest.fixture
def guarded(faulty: FaultyStore, clock: Clock) -> MakeGuard:
    def make(**policy: float) -> Guard:
        settings = {"jitter": 0.0, "base_delay_s": 0.1, "failures_to_open": 3, **policy}
        return Guard(
            faulty,
            GuardPolicy(**settings),  # type: ignore[arg-type]
            clock=clock,
            sleep=clock.sleep,
            rng=random.Random(1),
        )

    return make


PART = make_part(1, 5000)


# --- retry ------------------------------------------------------------------------------------------------------------


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


# --- breaker ----------------------------------------------------------------------------------------------------------


def open_breaker(guard: Guard, faulty: FaultyStore) -> None:
    fault = faulty.inject(Fail(StoreUnavailable), Operation.READ, times=None)
    while guard.state is BreakerState.CLOSED:
        with pytest.raises(StoreUnavailable):
            reads_back(guard, PART)
    fault.cancel()


def test_failures_in_a_row_open_the_breaker(guarded: MakeGuard, faulty: FaultyStore) -> None:
    guard = guarded(failures_to_open=3)
    fault = faulty.inject(Fail(StoreUnavailable), Operation.READ, times=None)
    for _ in range(3):
        assert guard.state is BreakerState.CLOSED
        with pytest.raises(StoreUnavailable):
            reads_back(guard, PART)
    assert guard.state is BreakerState.OPEN
    with pytest.raises(StoreUnavailable, match="breaker is open"):
        reads_back(guard, PART)
    assert fault.hits == 3  # the store was left alone
    assert guard.counters().rejected == 1
    assert guard.counters().opened == 1


@pytest.mark.parametrize("answer", [None, RecordMissing, RecordCorrupt, StoreFull])
def test_any_answer_of_a_working_store_ends_the_row(
    guarded: MakeGuard, faulty: FaultyStore, answer: type[StoreError] | None
) -> None:
    guard = guarded(failures_to_open=2, max_retries=0)
    for _ in range(5):
        faulty.inject(Fail(StoreTransient), Operation.DELETE)
        with pytest.raises(StoreTransient):
            guard.delete(PART.ref)
        if answer is None:
            guard.exists([PART.ref])
        else:
            faulty.inject(Fail(answer), Operation.EXISTS)
            with pytest.raises(answer):
                guard.exists([PART.ref])
    assert guard.state is BreakerState.CLOSED


def test_an_exception_no_store_should_raise_counts_and_comes_out(
    guarded: MakeGuard, faulty: FaultyStore
) -> None:
    guard = guarded(failures_to_open=1)

    class Bug(StoreError):
        pass

    faulty.inject(Fail(Bug), Operation.WRITE)
    with pytest.raises(Bug):
        guard.write(PART)
    assert guard.state is BreakerState.OPEN
    assert guard.counters().finished == {(Operation.WRITE, OpOutcome.ERROR): 1}
    assert guard.counters().in_flight == 0


def test_a_probe_closes_the_breaker(guarded: MakeGuard, faulty: FaultyStore, clock: Clock) -> None:
    guard = guarded(probe_after_s=2.0)
    open_breaker(guard, faulty)
    assert guard.tick().changes == (BreakerState.OPEN,)
    clock.advance(1.9)
    assert not guard.tick().probe_due
    clock.advance(0.1)
    assert guard.tick().probe_due
    assert guard.run_probe() is BreakerState.CLOSED
    assert guard.tick().changes == (BreakerState.HALF_OPEN, BreakerState.CLOSED)
    guard.write(PART)


def test_failed_probes_come_ever_more_rarely_up_to_a_cap(
    guarded: MakeGuard, faulty: FaultyStore, clock: Clock
) -> None:
    guard = guarded(probe_after_s=1.0, probe_after_max_s=6.0)
    open_breaker(guard, faulty)
    faulty.inject(Fail(StoreUnavailable), Operation.PROBE, times=None)
    waits = []
    for _ in range(5):
        waited = 0.0
        while not guard.tick().probe_due:
            clock.advance(0.5)
            waited += 0.5
        waits.append(waited)
        assert guard.run_probe() is BreakerState.OPEN
    assert waits == [1.0, 2.0, 4.0, 6.0, 6.0]


def test_a_probe_that_never_began_becomes_due_again(
    guarded: MakeGuard, faulty: FaultyStore, clock: Clock
) -> None:
    guard = guarded(probe_after_s=1.0)
    open_breaker(guard, faulty)
    clock.advance(1.0)
    assert guard.tick().probe_due
    assert not guard.tick().probe_due  # asked once
    clock.advance(1.0)
    assert guard.tick().probe_due  # the runtime's queue was full, say


def test_a_probe_not_needed_does_not_reach_the_store(guarded: MakeGuard, faulty: FaultyStore) -> None:
    probes = faulty.inject(Fail(StoreUnavailable), Operation.PROBE, times=None)
    assert guarded().run_probe() is BreakerState.CLOSED
    assert probes.hits == 0


@pytest.mark.parametrize(
    "values",
    [
        {"max_retries": -1},
        {"jitter": 1.5},
        {"backoff_factor": 0.5},
        {"failures_to_open": 0},
        {"read_deadline_s": 0},
        {"probe_after_s": 10.0, "probe_after_max_s": 5.0},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(values))):
        GuardPolicy(**values)  # type: ignore[arg-type]


# --- deadlines of what can't be cancelled -------------------------------------------------------------------------------


def test_check_ups_that_fail_in_a_row_open_the_breaker(guarded: MakeGuard, faulty: FaultyStore) -> None:
    guard = guarded()
    faulty.inject(Fail(StoreUnavailable), Operation.PROBE, times=3)
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            guard.check_up()
    assert guard.state is BreakerState.OPEN
    reached = guard.counters().finished[Operation.PROBE, OpOutcome.UNAVAILABLE]
    with pytest.raises(StoreUnavailable, match="breaker is open"):
        guard.check_up()
    assert guard.counters().finished[Operation.PROBE, OpOutcome.UNAVAILABLE] == reached == 3


def test_a_check_up_that_succeeds_ends_the_row_of_failures(guarded: MakeGuard, faulty: FaultyStore) -> None:
    guard = guarded()
    for _ in range(3):
        faulty.inject(Fail(StoreUnavailable), Operation.WRITE, times=2)
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                guard.write(PART)
        guard.check_up()
    assert guard.state is BreakerState.CLOSED


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def released() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_a_stalled_disk_opens_the_breaker_though_only_one_thread_hangs(
    guarded: MakeGuard, faulty: FaultyStore, clock: Clock, pool: ThreadPoolExecutor, released: threading.Event
) -> None:
    guard = guarded(failures_to_open=5, read_deadline_s=10)
    stall = faulty.inject(Stall(released), Operation.READ)
    pool.submit(reads_back, guard, PART)
    assert stall.wait_for_hit(PATIENCE)
    clock.advance(9.9)
    assert guard.tick().state is BreakerState.CLOSED
    clock.advance(0.2)
    tick = guard.tick()
    assert tick.state is BreakerState.OPEN
    assert tick.overdue == 1
    assert tick.changes == (BreakerState.OPEN,)
    with pytest.raises(StoreUnavailable):
        guard.exists([PART.ref])


def test_one_slow_operation_beside_working_ones_is_one_failure(
    guarded: MakeGuard, faulty: FaultyStore, clock: Clock, pool: ThreadPoolExecutor, released: threading.Event
) -> None:
    guard = guarded(failures_to_open=2, read_deadline_s=10)
    stall = faulty.inject(Stall(released), Operation.READ)
    pool.submit(reads_back, guard, PART)
    assert stall.wait_for_hit(PATIENCE)
    overdue = 0
    for _ in range(60):
        clock.advance(0.5)
        guard.exists([PART.ref])
        overdue += guard.tick().overdue
    assert overdue == 1  # once, however long it hangs
    assert guard.state is BreakerState.CLOSED


def test_overdue_operations_count_towards_opening(
    guarded: MakeGuard, faulty: FaultyStore, clock: Clock, pool: ThreadPoolExecutor, released: threading.Event
) -> None:
    guard = guarded(failures_to_open=3, read_deadline_s=10, write_deadline_s=1000)
    stall = faulty.inject(Stall(released), Operation.READ, times=3)
    for _ in range(3):
        pool.submit(reads_back, guard, PART)
    assert stall.wait_for_hit(PATIENCE, hits=3)
    clock.advance(9)
    guard.write(PART)  # an answer: this is no stall of the whole store
    clock.advance(1.5)
    tick = guard.tick()
    assert tick.overdue == 3
    assert tick.state is BreakerState.OPEN


def test_a_late_result_reaches_its_caller_and_brings_the_probe_forward(
    guarded: MakeGuard, faulty: FaultyStore, clock: Clock, pool: ThreadPoolExecutor, released: threading.Event
) -> None:
    guard = guarded(read_deadline_s=10, probe_after_s=60, probe_after_max_s=60)
    guard.write(PART)
    stall = faulty.inject(Stall(released), Operation.READ)
    late = pool.submit(reads_back, guard, PART)
    assert stall.wait_for_hit(PATIENCE)
    clock.advance(11)
    assert guard.tick().state is BreakerState.OPEN
    assert not guard.tick().probe_due
    released.set()
    assert late.result(PATIENCE) is True
    tick = guard.tick()
    assert tick.state is BreakerState.OPEN  # a late answer is no proof
    assert tick.probe_due
    assert guard.run_probe() is BreakerState.CLOSED


def test_a_late_failure_is_not_counted_twice(
    guarded: MakeGuard, faulty: FaultyStore, clock: Clock, pool: ThreadPoolExecutor, released: threading.Event
) -> None:
    guard = guarded(failures_to_open=2, read_deadline_s=10, max_retries=0)
    stall = faulty.inject(Stall(released), Operation.READ)
    faulty.inject(Fail(StoreTransient), Operation.READ)
    late = pool.submit(reads_back, guard, PART)
    assert stall.wait_for_hit(PATIENCE)
    clock.advance(9)
    guard.exists([PART.ref])
    clock.advance(2)
    assert guard.tick().overdue == 1
    released.set()
    assert isinstance(late.exception(PATIENCE), StoreTransient)
    assert guard.state is BreakerState.CLOSED


def test_a_hung_probe_occupies_one_thread_and_decides_when_it_ends(
    guarded: MakeGuard, faulty: FaultyStore, clock: Clock, pool: ThreadPoolExecutor, released: threading.Event
) -> None:
    guard = guarded(probe_after_s=1.0)
    open_breaker(guard, faulty)
    stall = faulty.inject(Stall(released), Operation.PROBE)
    clock.advance(1)
    assert guard.tick().probe_due
    probe = pool.submit(guard.run_probe)
    assert stall.wait_for_hit(PATIENCE)
    for _ in range(50):
        clock.advance(10)
        assert not guard.tick().probe_due
    assert guard.run_probe() is BreakerState.HALF_OPEN  # a second one does not reach the store
    released.set()
    assert probe.result(PATIENCE) is BreakerState.CLOSED


def test_an_idle_store_is_not_stalled(guarded: MakeGuard, clock: Clock) -> None:
    guard = guarded()
    guard.exists([PART.ref])
    clock.advance(10_000)
    assert guard.tick().state is BreakerState.CLOSED
    guard.exists([PART.ref])
    assert guard.tick().overdue == 0


def test_every_call_that_reached_the_store_is_reported_with_its_time(
    faulty: FaultyStore, clock: Clock
) -> None:
    seen: list[tuple[Operation, float, OpOutcome]] = []
    guard = Guard(
        faulty,
        GuardPolicy(jitter=0, base_delay_s=0.5, failures_to_open=1),
        clock=clock,
        sleep=clock.sleep,
        on_finished=lambda operation, seconds, outcome: seen.append((operation, seconds, outcome)),
    )
    faulty.inject(Fail(StoreTransient), Operation.WRITE)
    guard.write(PART)
    with pytest.raises(RecordMissing):
        reads_back(guard, make_part(2, 100))
    open_breaker(guard, faulty)
    with pytest.raises(StoreUnavailable):
        guard.write(PART)  # refused: never reached the store
    guard.run_probe()
    assert seen == [
        (Operation.WRITE, 0.5, OpOutcome.OK),
        (Operation.READ, 0.0, OpOutcome.MISSING),
        (Operation.READ, 0.0, OpOutcome.UNAVAILABLE),
        (Operation.PROBE, 0.0, OpOutcome.OK),
    ]


def test_answers_to_other_questions_are_no_answers(
    guarded: MakeGuard, faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = guarded(failures_to_open=1)
    monkeypatch.setattr(faulty, "exists", lambda refs: [True] * (len(refs) - 1))
    with pytest.raises(StoreUnavailable, match="asked for 2 records and answered 1"):
        guard.exists([PART.ref, make_part(2, 5000).ref])
    assert guard.state is BreakerState.OPEN


class TestGuardedDiskStore(RecordStoreContract):
    alone = True
    """A guard in front of a store changes nothing of the store's contract."""

    def make_store(self, place: Path) -> RecordStore:
        return Guard(DiskStore(DiskSettings(paths=(str(place),), min_free_bytes=0)))

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        assert isinstance(store, Guard)
        assert isinstance(store.store, DiskStore)
        files = record_files(*map(Path, store.store.settings.paths))
        path = files.pop(ref)
        damage_file(path, how, next(iter(files.values()), None))
