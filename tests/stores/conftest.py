"""A disk that can fail, and a guard around it with a clock that only the test moves."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvtiers.stores.disk import DiskStore
from kvtiers.stores.disk.settings import DiskSettings
from kvtiers.stores.guard import Guard, GuardPolicy
from kvtiers.testing.faulty_store import FaultyStore


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultyStore]:
    store = FaultyStore(DiskStore(DiskSettings(paths=(str(tmp_path / "disk"),), min_free_bytes=0)))
    store.open()
    yield store
    store.heal()
    store.close()


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
