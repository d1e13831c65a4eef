"""A store that answers, but so late that nobody waits for it: its breaker opens as for one that fails."""

from __future__ import annotations

import random

import pytest

from kvtiers.stores.guard import BreakerState, Guard, GuardPolicy
from kvtiers.stores.pieces import PiecedStore
from kvtiers.testing.memory_values import MemoryEngine, MemoryValues
from kvtiers.testing.store_kit import make_part, reads_back

PART = make_part(1, 5000)


class Slow:
    """Time passes by what the store takes for each step."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.step_s = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, name: str) -> None:
        self.now += self.step_s


@pytest.fixture
def clock() -> Slow:
    return Slow()


@pytest.fixture
def guard(clock: Slow) -> Guard:
    store = PiecedStore(MemoryValues(MemoryEngine(), before=clock.step))
    store.open()
    policy = GuardPolicy(slow_s=2.0, failures_to_open=3, probe_after_s=1.0)
    guard = Guard(store, policy, clock=clock, rng=random.Random(1))
    guard.write(PART)
    return guard


def test_answers_that_come_too_late_to_be_of_use_open_the_breaker(guard: Guard, clock: Slow) -> None:
    clock.step_s = 1.5  # a read takes two steps
    for _ in range(2):
        assert reads_back(guard, PART)
        assert guard.state is BreakerState.CLOSED
    assert reads_back(guard, PART)
    assert guard.state is BreakerState.OPEN
    assert "takes longer than 2 s" in str(guard.health().error)


def test_it_stays_open_until_the_store_is_fast_again(guard: Guard, clock: Slow) -> None:
    clock.step_s = 3.0
    for _ in range(3):
        guard.exists([PART.ref])
    assert guard.state is BreakerState.OPEN
    clock.now += 1.0
    assert guard.run_probe() is BreakerState.OPEN
    clock.step_s = 0.1
    clock.now += 2.0
    assert guard.run_probe() is BreakerState.CLOSED


def test_writes_may_take_their_time(guard: Guard, clock: Slow) -> None:
    clock.step_s = 3.0
    for number in range(5):
        guard.write(make_part(number, 5000))
    assert guard.state is BreakerState.CLOSED


def test_one_late_answer_is_no_row(guard: Guard, clock: Slow) -> None:
    for _ in range(5):
        clock.step_s = 3.0
        guard.exists([PART.ref])
        clock.step_s = 0.0
        guard.exists([PART.ref])
    assert guard.state is BreakerState.CLOSED
