"""The guard under a clock that only the test moves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtiers.model.errors import (
    ConfigError,
    InvariantBroken,
    RecordCorrupt,
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
from kvtiers.testing.faulty_store import Fail, FaultyStore, Stall
from kvtiers.testing.store_kit import Damage, RecordStoreContract, make_part, reads_back

if TYPE_CHECKING:
    from tests.stores.conftest import Clock, MakeGuard

PATIENCE = 30.0


PART = make_part(1, 5000)


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


def test_what_makes_no_record_is_no_fault_of_the_store(guarded: MakeGuard, faulty: FaultyStore) -> None:
    guard = guarded(failures_to_open=1)
    faulty.inject(Fail(InvariantBroken), Operation.WRITE)  # type: ignore[arg-type]  # as the header's encoder raises
    with pytest.raises(InvariantBroken):
        guard.write(PART)
    assert guard.state is BreakerState.CLOSED
    assert guard.counters().finished == {(Operation.WRITE, OpOutcome.INVALID): 1}


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
    """A guard in front of a store changes nothing of the store's contract."""

    alone = True

    def make_store(self, place: Path) -> RecordStore:
        return Guard(DiskStore(DiskSettings(paths=(str(place),), min_free_bytes=0)))

    def damage(self, store: RecordStore, ref: RecordRef, how: Damage) -> None:
        assert isinstance(store, Guard)
        assert isinstance(store.store, DiskStore)
        files = record_files(*map(Path, store.store.settings.paths))
        path = files.pop(ref)
        damage_file(path, how, next(iter(files.values()), None))
