"""The whole cache on a store that several of them share."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from kvtiers.compat.backend import StorageBackend
from kvtiers.model.errors import DeadlineExceeded, StoreUnavailable
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import namespace, small_config, wait_until
from kvtiers.testing.memory_values import MemoryEngine, MemoryValues, engine_at

if TYPE_CHECKING:
    from kvtiers.stores.registry import RemoteSettings

TOKENS = list(range(7000, 7100))
CHUNKS = 6


class Instances:
    """Caches on one remote store, each with a disk of its own on request."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder = folder
        self.endpoint = endpoint
        self.made: list[TieredCache] = []

    def make(self, values: Mapping[str, Any] | None = None, *, disk: bool = False) -> TieredCache:
        place = self.folder / f"disk{len(self.made)}" if disk else None
        remote = {
            "remote.enabled": True,
            "remote.backend": "kvtiers.testing.memory_values:memory_store",
            "remote.endpoint": self.endpoint,
        }
        config = small_config(place, {**remote, **(values or {})})
        self.made.append(TieredCache(config, SMALL_LAYOUT, namespace()))
        return self.made[-1]

    @property
    def engine(self) -> MemoryEngine:
        return engine_at(self.endpoint)


@pytest.fixture
def instances(tmp_path: Path) -> Iterator[Instances]:
    found = Instances(tmp_path, str(tmp_path))
    yield found
    problems = [problem for cache in found.made for problem in cache.check_integrity()]
    closed = [cache.close() for cache in found.made]
    assert all(closed)
    assert problems == []


def stored(cache: TieredCache, oracle: CacheOracle) -> None:
    assert cache.store(TOKENS, oracle.kv(TOKENS)).accepted == CHUNKS
    cache.flush()


def check(cache: TieredCache, oracle: CacheOracle, *tiers: Tier) -> None:
    loaded = cache.load(TOKENS).result()
    assert loaded.tiers == tiers
    oracle.check(TOKENS, loaded.num_tokens, loaded.kv)


def test_the_time_a_load_takes_counts_for_the_tier_that_a_probe_found(
    instances: Instances, oracle: CacheOracle
) -> None:
    stored(instances.make(), oracle)
    second = instances.make()
    check(second, oracle, *[Tier.REMOTE] * CHUNKS)
    assert second.stats()["latency"][Tier.REMOTE]["stage"]["count"] == 1


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_second_instance_loads_what_the_first_one_has_computed(
    instances: Instances, oracle: CacheOracle, codec: str
) -> None:
    first = instances.make({"remote.compression": codec})
    stored(first, oracle)
    assert len(instances.engine.values) == 2 * CHUNKS  # a piece and a manifest each
    second = instances.make({"remote.compression": codec})
    check(second, oracle, *[Tier.REMOTE] * CHUNKS)
    check(second, oracle, *[Tier.CPU] * CHUNKS)
    tiers = second.stats()["tiers"]
    assert tiers["remote"]["hits"] == CHUNKS
    assert tiers["remote"]["promoted"] == CHUNKS


def test_every_instance_writes_what_nobody_has_written_and_no_more(
    instances: Instances, oracle: CacheOracle
) -> None:
    first, second = instances.make(), instances.make()
    stored(first, oracle)
    stored(second, oracle)
    written = [cache.stats()["tiers"]["remote"]["stored"] for cache in (first, second)]
    assert written == [CHUNKS, 0]
    assert second.stats()["tiers"]["remote"]["present"] == CHUNKS


def test_what_comes_from_the_store_goes_to_the_own_disk(instances: Instances, oracle: CacheOracle) -> None:
    stored(instances.make(), oracle)
    second = instances.make(disk=True)
    check(second, oracle, *[Tier.REMOTE] * CHUNKS)
    second.flush()
    instances.engine.values.clear()
    second.evict("cpu")
    second.flush()
    check(second, oracle, *[Tier.DISK] * CHUNKS)


def test_a_flipped_bit_is_a_miss_counted_and_healed_by_the_next_store(
    instances: Instances, oracle: CacheOracle
) -> None:
    stored(instances.make(), oracle)
    values = instances.engine.values
    piece = max(values, key=lambda name: (len(values[name]), name))
    damaged = bytearray(values[piece])
    damaged[len(damaged) // 2] ^= 1
    values[piece] = bytes(damaged)
    second = instances.make()
    loaded = second.load(TOKENS).result()
    oracle.check(TOKENS, loaded.num_tokens, loaded.kv)
    assert loaded.num_tokens < CHUNKS * 16
    assert loaded.stopped_by is MissReason.CORRUPT
    assert second.stats()["tiers"]["remote"]["corrupt"] == 1
    stored_again = second.store(TOKENS, oracle.kv(TOKENS))
    assert stored_again.accepted >= 1
    second.flush()
    check(instances.make(), oracle, *[Tier.REMOTE] * CHUNKS)


def test_a_dead_store_costs_no_request_and_lookups_say_so(
    instances: Instances, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = instances.make({"remote.timeout_ms": 500})
    dead = threading.Event()

    def step(self: MemoryValues, name: str) -> None:
        if dead.is_set():
            raise StoreUnavailable(f"no answer to {name}")

    monkeypatch.setattr(MemoryValues, "_step", step)
    stored(cache, oracle)
    dead.set()
    for number in range(10):
        loaded = cache.load([number, *TOKENS]).result()
        assert loaded.num_tokens == 0
    assert wait_until(lambda: not cache.stats()["tiers"]["remote"]["up"], 10)
    loaded = cache.load([99, *TOKENS]).result()
    assert loaded.stopped_by is MissReason.TIER_OPEN
    assert cache.lookup([98, *TOKENS]).stopped_by is MissReason.TIER_OPEN
    check(cache, oracle, *[Tier.CPU] * CHUNKS)
    dead.clear()
    assert wait_until(lambda: cache.stats()["tiers"]["remote"]["up"], 20)
    assert cache.load([97, *TOKENS]).result().stopped_by is MissReason.NEVER_SEEN


def test_a_hanging_store_delays_nobody_beyond_the_deadline(
    instances: Instances, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    cache = instances.make({"cpu.buffer_size": "1Mi"})
    stored(cache, oracle)

    def step(self: MemoryValues, name: str) -> None:
        go_on.wait(30)

    monkeypatch.setattr(MemoryValues, "_step", step)
    try:
        pending = cache.load([5, *TOKENS], timeout=0.2)
        assert pending.result(timeout=10).stopped_by is MissReason.STAGING_TIMEOUT
        other = [6, *TOKENS]
        assert cache.store(other, oracle.kv(other)).accepted > 0
        check(cache, oracle, *[Tier.CPU] * CHUNKS)
    finally:
        go_on.set()


class Remembering(StorageBackend):
    """A backend of somebody's own, as a configuration names it."""

    shared: ClassVar[dict[str, dict[str, bytes]]] = {}

    def __init__(self, settings: RemoteSettings) -> None:
        self.kept = self.shared.setdefault(settings.endpoint, {})

    async def write(self, key: str, data: bytes) -> bool:
        self.kept[key] = data
        return True

    async def read(self, key: str) -> bytes | None:
        return self.kept.get(key)

    async def delete(self, key: str) -> bool:
        return self.kept.pop(key, None) is not None

    async def exists(self, key: str) -> bool:
        return key in self.kept


def test_a_storage_backend_of_ones_own_is_a_remote_tier(
    instances: Instances, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    from types import ModuleType

    module = ModuleType("somebodys")
    module.Backend = Remembering  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebodys", module)
    backend = {"remote.backend": "somebodys:Backend"}
    stored(instances.make(backend), oracle)
    check(instances.make(backend), oracle, *[Tier.REMOTE] * CHUNKS)


def test_a_backend_that_is_not_there_is_told_and_done_without(
    instances: Instances, oracle: CacheOracle, caplog: pytest.LogCaptureFixture
) -> None:
    cache = instances.make({"remote.backend": "nobodys"})
    stored(cache, oracle)
    assert "nobody has registered it" in caplog.text
    assert "remote" not in cache.stats()["tiers"]


def test_a_store_that_does_not_answer_at_the_start_is_told_at_once(
    instances: Instances, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: MemoryValues, name: str) -> None:
        raise StoreUnavailable("store.internal can't be reached")

    monkeypatch.setattr(MemoryValues, "_step", step)
    instances.make()
    assert wait_until(lambda: "the remote tier is out of order" in caplog.text)
    assert "store.internal can't be reached" in caplog.text


def test_flush_waits_for_what_an_eviction_removes(
    instances: Instances, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, answers, step = instances.make(), threading.Event(), MemoryValues._step

    def hung(self: MemoryValues, name: str) -> None:
        if name == "remove_if":
            assert answers.wait(60)
        step(self, name)

    stored(cache, oracle)
    monkeypatch.setattr(MemoryValues, "_step", hung)
    assert cache.evict("remote").chunks == CHUNKS
    with pytest.raises(DeadlineExceeded):
        cache.flush(0.05)
    assert instances.engine.values
    answers.set()
    cache.flush()
    assert not instances.engine.values
    assert cache.stats()["tiers"]["remote"]["usage_bytes"] == 0
