"""The connections of a Redis store are bounded, whoever they are to. Wires are made up: what is tested is who keeps, and who closes them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from kvtiers.stores.redis import RedisSettings, RedisValues
from kvtiers.stores.redis.settings import Address
from kvtiers.stores.redis.wire import WireBroken
from kvtiers.stores.redis.wires import Wires

LIMIT = 2
SERVER, OTHER, SENTINEL = (Address(name, 1) for name in ("server", "other", "sentinel"))


class FakeWire:
    """A connection that is open until it is disposed of."""

    opened: set[FakeWire]

    def __init__(self, address: Address) -> None:
        self.address = address
        self.opened.add(self)

    def is_idle(self) -> bool:
        return True

    def close(self) -> None:
        return

    def dispose(self) -> None:
        self.opened.discard(self)


def dial(address: Address, deadline: float) -> FakeWire:
    assert len(FakeWire.opened) < LIMIT
    return FakeWire(address)


@pytest.fixture
def wires() -> Iterator[Wires]:
    FakeWire.opened = set()
    wires = Wires(dial, LIMIT, 1.0)  # type: ignore[arg-type]
    yield wires
    wires.close()
    assert not FakeWire.opened


def use(wires: Wires, address: Address) -> None:
    with wires.place(math.inf), wires.to(address, math.inf):
        pass


def test_a_question_to_a_sentinel_takes_the_place_of_an_idle_connection(wires: Wires) -> None:
    use(wires, SERVER)
    use(wires, OTHER)
    assert len(FakeWire.opened) == LIMIT
    with wires.place(math.inf):
        with wires.once(dial, SENTINEL, math.inf):  # type: ignore[arg-type]
            assert wires.stats()["connections_open"] == LIMIT
            assert len(FakeWire.opened) == LIMIT
        assert wires.stats()["connections_open"] == LIMIT - 1
        with wires.to(SERVER, math.inf):
            assert len(FakeWire.opened) <= LIMIT


def test_a_sentinel_that_breaks_off_leaves_nothing(wires: Wires) -> None:
    with (
        pytest.raises(WireBroken),
        wires.place(math.inf),
        wires.once(dial, SENTINEL, math.inf),  # type: ignore[arg-type]
    ):
        raise WireBroken("gone")
    assert wires.stats()["connections_open"] == 0


def test_a_shard_that_has_rested_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("kvtiers.stores.redis.values.time.monotonic", lambda: now[0])
    values = RedisValues(RedisSettings("redis-cluster://server:1"))
    for number in range(50):
        values._failed(Address(f"pod-{number}", 1), WireBroken("gone"))  # type: ignore[arg-type]
        now[0] += 0.5
    assert set(values._resting) == {Address("pod-48", 1), Address("pod-49", 1)}
