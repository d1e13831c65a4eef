"""What happens without anybody asking: stores are checked up on, and what others do in the directory is found out."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtiers.model.errors import StoreUnavailable
from kvtiers.model.tiers import Tier
from kvtiers.runtime import tending
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import plan_node
from kvtiers.stores.guard import BreakerState, Operation, OpOutcome
from kvtiers.testing.chaos import IMPATIENT, faulty_plan, small_config, wait_until
from kvtiers.testing.faulty_store import Fail, FaultyStore, Stall

if TYPE_CHECKING:
    from tests.runtime.conftest import MakeCache

    from kvtiers.testing.cache_oracle import CacheOracle

pytestmark = pytest.mark.slow

TOKENS = list(range(100))


@pytest.fixture
def idle(tmp_path: Path) -> Iterator[tuple[CacheNode, FaultyStore]]:
    """A node that nobody uses, checked up on 20 times a second."""
    plan, disk = faulty_plan(replace(plan_node(small_config(tmp_path / "cache")), health_check_s=0.05))
    node = CacheNode(plan)
    yield node, disk
    disk.heal()
    assert node.close()


def test_an_idle_store_is_asked_again_and_again(idle: tuple[CacheNode, FaultyStore]) -> None:
    guard = idle[0].guards[Tier.DISK]
    assert wait_until(lambda: guard.counters().finished.get((Operation.PROBE, OpOutcome.OK), 0) >= 3)
    assert guard.state is BreakerState.CLOSED


def test_an_idle_store_that_breaks_is_found_out_and_comes_back(idle: tuple[CacheNode, FaultyStore]) -> None:
    node, disk = idle
    guard = node.guards[Tier.DISK]
    disk.inject(Fail(StoreUnavailable), Operation.PROBE, times=None)
    assert wait_until(lambda: not node.stats()["tiers"]["disk"]["up"])
    assert guard.counters().opened == 1
    disk.heal()
    assert wait_until(lambda: bool(node.stats()["tiers"]["disk"]["up"]))


def test_an_idle_store_that_hangs_is_found_out_by_one_check_up(idle: tuple[CacheNode, FaultyStore]) -> None:
    node, disk = idle
    released = threading.Event()
    stalled = disk.inject(Stall(released), Operation.PROBE)
    assert stalled.wait_for_hit(20)
    assert wait_until(lambda: node.guards[Tier.DISK].state is not BreakerState.CLOSED)
    assert stalled.hits == 1
    released.set()
    assert wait_until(lambda: bool(node.stats()["tiers"]["disk"]["up"]))


def test_the_interval_is_the_configured_one(tmp_path: Path) -> None:
    small = small_config(tmp_path / "cache")
    observability = small.observability.model_copy(update={"health_check_interval": 7.5})
    assert plan_node(small).health_check_s == 30.0
    assert plan_node(small.model_copy(update={"observability": observability})).health_check_s == 7.5


def test_what_others_do_in_the_directory_is_found_out_while_the_cache_runs(
    make_cache: MakeCache, oracle: CacheOracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tending, "_WALK_EVERY_S", 0.05)
    cache, path = make_cache({"disk.write_policy": "write_through"}), tmp_path / "cache"
    cache.store(TOKENS, oracle.kv(TOKENS))
    cache.flush()
    cache.evict("cpu")
    disk = cache.stats()["tiers"]["disk"]
    assert disk["foreign_bytes"] == 0
    assert disk["overhead_bytes"] > 0, "directories, lock and log"

    stranger = path / "a-stranger's"
    stranger.write_bytes(b"x" * 1_000_000)
    taken = stranger.lstat().st_blocks * 512
    assert wait_until(lambda: cache.stats()["tiers"]["disk"]["foreign_bytes"] == taken)
    assert cache.stats()["tiers"]["disk"]["store"]["foreign_files"] == 1
    stranger.unlink()
    assert wait_until(lambda: cache.stats()["tiers"]["disk"]["foreign_bytes"] == 0)

    (record,) = path.rglob(f"{oracle.keys(TOKENS)[2].hex()}.0.kv")
    kept = tmp_path / "kept"
    shutil.copy(record, kept)
    record.unlink()
    assert wait_until(lambda: cache.lookup(TOKENS).num_tokens == 32)
    record.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(kept, tmp_path / "cache" / "copying")
    (path / "copying").rename(record)
    assert wait_until(lambda: cache.lookup(TOKENS).num_tokens == 96)
    loaded = cache.load(TOKENS).result()
    oracle.check(TOKENS, loaded.num_tokens, loaded.kv)
    assert loaded.num_tokens == 96


def test_walks_go_on_beside_stores_loads_and_evictions_and_all_stays_consistent(
    make_cache: MakeCache, oracle: CacheOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tending, "_WALK_EVERY_S", 0.0)
    monkeypatch.setattr(tending, "_REST", 0.0)
    cache = make_cache({"disk.max_size": "2Mi"})
    for number in range(60):
        tokens = list(range(number * 1000, number * 1000 + 100))
        cache.store(tokens, oracle.kv(tokens))
        if number % 5 == 4:
            cache.flush()
            cache.evict("disk", 0.3)
            cache.evict("cpu", 0.2)
        earlier = list(range((number - 1) * 1000, (number - 1) * 1000 + 100)) if number else tokens
        loaded = cache.load(earlier).result()
        oracle.check(earlier, loaded.num_tokens, loaded.kv)
    monkeypatch.setattr(tending, "_WALK_EVERY_S", 600.0)
    cache.flush()


def test_the_chunk_size_is_told_at_the_start(make_cache: MakeCache, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kvtiers"):
        make_cache()
    assert "a-model: chunks of 16 tokens, 9.0 KiB each" in caplog.messages


def test_a_store_that_stays_broken_is_checked_on_and_told_of_once(
    idle: tuple[CacheNode, FaultyStore], caplog: pytest.LogCaptureFixture
) -> None:
    node, disk = idle
    caplog.set_level(logging.INFO, "kvtiers.runtime.tending")
    broken = disk.inject(Fail(StoreUnavailable, "the cable is out"), Operation.PROBE, times=None)
    assert broken.wait_for_hit(30, hits=8)
    assert node.guards[Tier.DISK].state is not BreakerState.CLOSED
    disk.heal()
    assert wait_until(lambda: bool(node.stats()["tiers"]["disk"]["health"]["up"]))
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.partition(":")[0] for line in told] == [
        "the disk tier is out of order",
        "the disk tier works again",
    ]
    assert told[0].endswith(": StoreUnavailable: the cable is out")


def test_news_that_is_old_when_it_is_told_is_not_told(
    idle: tuple[CacheNode, FaultyStore], caplog: pytest.LogCaptureFixture
) -> None:
    """The breaker has closed, and a check-up has failed before the ticker passes that on: the last line says that it is out of order."""
    node, disk = idle
    tender, guard = node._tender, node.guards[Tier.DISK]
    tender.stop(30)
    broken = disk.inject(Fail(StoreUnavailable, "the cable is out"), Operation.PROBE, times=None)
    while guard.state is not BreakerState.OPEN:
        tender._check_up(Tier.DISK)
    broken.cancel()
    assert guard.run_probe() is BreakerState.CLOSED
    disk.inject(Fail(StoreUnavailable, "again"), Operation.PROBE)
    tender._check_up(Tier.DISK)
    tender._watch_guards()
    assert not guard.health().up
    told = [record.getMessage() for record in caplog.records if " tier " in record.getMessage()]
    assert told[-1].startswith("the disk tier is out of order")
    tender._check_up(Tier.DISK)
    assert caplog.messages[-1] == "the disk tier works again"


def test_while_a_store_is_down_it_is_asked_no_less_often_than_checked_up_on(tmp_path: Path) -> None:
    plan, disk = faulty_plan(
        replace(plan_node(small_config(tmp_path / "cache")), health_check_s=0.05),
        guard=replace(IMPATIENT, failures_to_open=1, probe_after_s=3600.0, probe_after_max_s=3600.0),
    )
    node = CacheNode(plan)
    try:
        disk.inject(Fail(StoreUnavailable), Operation.PROBE, times=2)
        assert wait_until(lambda: node.guards[Tier.DISK].counters().opened == 1)
        assert wait_until(lambda: bool(node.stats()["tiers"]["disk"]["health"]["up"]))
    finally:
        assert node.close()
